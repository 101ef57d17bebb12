"""The numbers of a model card: tables and metadata from the JSON files that `training.card.build` collects.

A card keeps its prose. What stands between `<!-- table: NAME -->` and `<!-- end -->` is written anew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_hyperflow.benchmark.evaluation import mean_ci95
from hf_hyperflow.benchmark.grid_search import TUNABLE
from hf_hyperflow.benchmark.methods import list_labels
from hf_hyperflow.benchmark.results import HYPERFLOW, TUNED_METHODS, average_over_domains

from .accuracy_tables import (
    build_domains_table,
    build_flow_table,
    build_methods_table,
    build_protocols_table,
    build_shots_table,
    build_summary_table,
)
from .break_even import format_offline_cost
from .cost_tables import build_cost_table, build_speed_table
from .markdown import format_interval, format_table
from .records import Records, get, select
from .scores import build_scores_by_domain_table, build_scores_table
from .unknown import build_unknown_table

TABLE = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
#: The benchmarks of which each kind of episodes has a row in the table of protocols.
PROTOCOLS = ("results", "many_classes", "meta_dataset", "unbalanced")


def build_conditioning_table(*sources: tuple[str, dict[str, Any]]) -> str:
    """What the flow gains by what it is conditioned on, means over domains.

    Args:
        sources: the kind of domains, and the JSON of `training.card.conditioning` of them.
    """
    headings = ["the flow is conditioned on"]
    rows: dict[str, list[str]] = {}
    for kind, content in sources:
        means = select(content["records"], domain=None)
        own = means[0]["condition"]
        headings += [f"{kind}: minus the head without the flow", f"{own} has more"]
        for mean in means:
            row = rows.setdefault(mean["condition"], [mean["condition"]])
            row.append(format_interval(mean["gain"], mean["gain_ci95"]))
            advantage = format_interval(mean["own_advantage"], mean["own_advantage_ci95"])
            row.append("" if mean["condition"] == own else advantage)
    return format_table(headings, rows.values())


def build_hyperparameters_table(content: dict[str, Any]) -> str:
    """What was chosen for the baselines, and how well it and the best and the worst setting of the grid do."""
    labels = list_labels()
    rows = []
    for method, chosen in content["hyperparameters"].items():
        entries = select(content["grid"], method=method)
        entry = get(entries, **chosen)
        rank, describe = _accuracy, _percent
        if TUNABLE[method].is_chosen_by_log_loss:
            rank, describe = _negative_log_loss, _format_log_loss
        best = max(entries, key=rank)
        worst = min(entries, key=rank)
        best_cell = describe(best)
        if best is not entry:
            best_cell += f" ({_format_settings(best, chosen)})"
        rows.append([labels[method], _format_settings(chosen, chosen), describe(entry), best_cell, describe(worst)])
    return format_table(["baseline", "chosen", "accuracy", "best of the grid", "worst"], rows)


def _accuracy(entry: dict[str, Any]) -> float:
    return entry["accuracy"]


def _percent(entry: dict[str, Any]) -> str:
    return f"{entry['accuracy']:.1f} %"


def _negative_log_loss(entry: dict[str, Any]) -> float:
    return -entry["log_loss"]


def _format_log_loss(entry: dict[str, Any]) -> str:
    return f"log loss {entry['log_loss']:.3f}"


def _format_settings(entry: Mapping[str, Any], names: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {entry[name]:g}" for name in names)


def build_ablations_table(rows: Records) -> str:
    """A row per variant, from the JSON of `training.card.ablations`.

    It has the variant's gain, and what it has more than the first on the same episodes.
    """
    first = rows[0]
    headings = ["variant", "gain over direct transfer", "from the flow", f"minus {first['variant']}"]
    headings.append("minutes of training")
    cells = []
    for row in rows:
        gain = format_interval(row["gain"], row["gain_ci95"])
        flow = format_interval(row["gain_of_the_flow"], row["gain_of_the_flow_ci95"])
        difference = ""
        if row is not first:
            difference = _paired_difference(row["accuracies"], first["accuracies"])
        cells.append([row["variant"], gain, flow, difference, str(row["training_minutes"])])
    return format_table(headings, cells)


def _paired_difference(one: dict[str, list[float]], other: dict[str, list[float]]) -> str:
    """Mean over the domains of the differences on the episodes that both have."""
    means, half_widths = [], []
    for domain in sorted(one.keys() & other.keys()):
        pairs = zip(one[domain], other[domain], strict=False)
        mean, half_width = mean_ci95([a - b for a, b in pairs])
        means.append(mean)
        half_widths.append(half_width)
    return format_interval(*average_over_domains(means, half_widths))


def make_tables(contents: Mapping[str, Any]) -> dict[str, str]:
    """The tables by name.

    Args:
        contents: of the JSON files, by the names of `training.card.build.FILES`; those that there are.
    """
    tables = {}
    if "results" in contents:
        results = contents["results"]
        tables["summary"] = build_summary_table(results)
        tables["domains"] = build_domains_table(results, 5)
        tables["shots"] = build_shots_table(results)
        tables["methods"] = build_methods_table((results, _list_methods(tuned=False)))
    if "fine_tuning" in contents:
        sources = [(contents["fine_tuning"], list(list_labels()))]
        if "results" in contents:
            sources.append((contents["results"], _list_methods(tuned=True)))
        tables["fine-tuning"] = build_methods_table(*sources)
        if contents["fine_tuning"]["flow"]:
            tables["time"] = build_flow_table(contents["fine_tuning"], "t")
            tables["steps"] = build_flow_table(contents["fine_tuning"], "steps")
    if "conditioning" in contents:
        kinds = [("unseen domains", contents["conditioning"])]
        if "conditioning_training" in contents:
            kinds.append(("training and validation domains", contents["conditioning_training"]))
        if "conditioning_many_classes" in contents:
            kinds.append(("unseen domains, 20-way", contents["conditioning_many_classes"]))
        if "conditioning_unbalanced" in contents:
            kinds.append(("unseen domains, unbalanced", contents["conditioning_unbalanced"]))
        tables["conditioning"] = build_conditioning_table(*kinds)
    if "cost" in contents:
        tables["cost"] = build_cost_table(contents["cost"])
        tables["speed"] = build_speed_table(contents["cost"])
    if "offline_cost" in contents:
        tables["offline-cost"] = format_offline_cost(contents["offline_cost"]).rstrip()
    if "hyperparameters" in contents:
        tables["hyperparameters"] = build_hyperparameters_table(contents["hyperparameters"])
    if "ablations" in contents:
        tables["ablations"] = build_ablations_table(contents["ablations"])
    if "unbalanced" in contents:
        tables["unbalanced"] = build_domains_table(contents["unbalanced"], None)
        if "scores" in contents:
            tables["scores"] = build_scores_table(contents["scores"], contents["unbalanced"])
            tables["scores-domains"] = build_scores_by_domain_table(contents["scores"])
    if "many_classes" in contents:
        tables["many-classes"] = build_domains_table(contents["many_classes"], 5)
    if "meta_dataset" in contents:
        tables["meta-dataset"] = build_domains_table(contents["meta_dataset"], None)
        benchmarks = [contents[name] for name in PROTOCOLS if name in contents]
        tables["protocols"] = build_protocols_table(*benchmarks)
    if "unknown" in contents:
        tables["unknown"] = build_unknown_table(contents["unknown"]["records"])
    return tables


def _list_methods(*, tuned: bool) -> list[str]:
    """The methods that tune the backbone by gradients, whichever classifier its features go to, or all others."""
    names = {*TUNED_METHODS, *TUNED_METHODS.values()}
    return [name for name in list_labels() if (name in names) == tuned]


def fill_tables(text: str, tables: Mapping[str, str]) -> str:
    """A text with its tables written anew.

    Raises:
        ValueError: it asks for a table that does not exist, or that nothing was measured for.
    """

    def replace(match: re.Match[str]) -> str:
        name = match[2]
        if name not in tables:
            raise ValueError(f"there is no table {name!r}: use one of {', '.join(tables)}.")
        return f"{match[1]}{tables[name]}\n{match[3]}"

    return TABLE.sub(replace, text)


def add_model_index(text: str, results: dict[str, Any], name: str) -> str:
    """A card whose metadata tell what HyperFlow reaches, by domain and number of shots (the Hub's model-index)."""
    card = ModelCard(text)
    assert isinstance(card.data, ModelCardData)
    card.data.model_name = name
    eval_results = []
    for record in select(results["records"], method=HYPERFLOW):
        episodes = f"{record['n_episodes']} episodes"
        metrics = (
            ("accuracy", record["accuracy"], f"accuracy in %, mean of {episodes}"),
            ("gain", record["diff_vs_direct"], f"points over direct transfer, {episodes}"),
        )
        for metric, value, metric_name in metrics:
            result = EvalResult(
                task_type="image-classification",
                task_name="few-shot image classification",
                dataset_type=record["domain"],
                dataset_name=record["domain"],
                dataset_config=f"{record['n_way']:g}-way {record['n_shot']}-shot",
                metric_type=metric,
                metric_value=round(value, 2),
                metric_name=metric_name,
            )
            eval_results.append(result)
    card.data.eval_results = eval_results
    return str(card)
