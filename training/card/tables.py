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
from hf_hyperflow.benchmark.methods import NoFlow, list_labels
from hf_hyperflow.benchmark.results import HYPERFLOW, REFERENCE, TUNED_METHODS, average_over_domains

from .break_even import format_offline_cost
from .cost_tables import build_cost_table, build_speed_table
from .markdown import format_interval, format_table
from .records import Records, column, find, get, list_values, select
from .scores import build_scores_by_domain_table, build_scores_table
from .unknown import build_unknown_table

TABLE = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
NO_FLOW = NoFlow.name


def format_accuracy(record: dict[str, Any]) -> str:
    return format_interval(record["accuracy"], record["ci95"], ".1f")


def format_gain(record: dict[str, Any] | None) -> str:
    """What a method gains over direct transfer."""
    return "" if record is None else format_interval(record["diff_vs_direct"], record["diff_ci95"])


def format_difference(record: dict[str, Any] | None) -> str:
    """What HyperFlow has more than a method."""
    return "" if record is None else format_interval(record["diff"], record["diff_ci95"])


def build_summary_table(results: dict[str, Any]) -> str:
    """A row per number of shots: means over the domains, and which part of the gain is the head's and the flow's."""
    rows = []
    for shots in list_values(results["means"], "n_shot"):
        direct = get(results["means"], n_shot=shots, method=REFERENCE)
        head = get(results["means"], n_shot=shots, method=NO_FLOW)
        hyperflow = get(results["means"], n_shot=shots, method=HYPERFLOW)
        flow = get(results["hyperflow_against"], domain=None, n_shot=shots, method=NO_FLOW)
        accuracies = [f"{direct['accuracy']:.1f}", f"{hyperflow['accuracy']:.1f}"]
        parts = [format_gain(head), format_difference(flow)]
        rows.append([f"{shots}", *accuracies, f"**{format_gain(hyperflow)}**", *parts])
    headings = ["images per class", "direct transfer", "HyperFlow", "gain, points", "from the head", "from the flow"]
    return format_table(headings, rows)


def build_domains_table(results: dict[str, Any], n_shot: int | None) -> str:
    """A row per domain: direct transfer, HyperFlow, the gain, and which part of it is the flow's."""
    domains = list_values(results["records"], "domain")
    rows = []
    for domain in domains:
        direct = get(results["records"], domain=domain, n_shot=n_shot, method=REFERENCE)
        hyperflow = get(results["records"], domain=domain, n_shot=n_shot, method=HYPERFLOW)
        flow = get(results["hyperflow_against"], domain=domain, n_shot=n_shot, method=NO_FLOW)
        accuracies = [format_accuracy(direct), format_accuracy(hyperflow)]
        ways = f"{hyperflow['n_way']:g}"
        rows.append([domain, ways, *accuracies, format_gain(hyperflow), format_difference(flow)])
    direct = get(results["means"], n_shot=n_shot, method=REFERENCE)
    hyperflow = get(results["means"], n_shot=n_shot, method=HYPERFLOW)
    flow = get(results["hyperflow_against"], domain=None, n_shot=n_shot, method=NO_FLOW)
    accuracies = [f"{direct['accuracy']:.1f}", f"{hyperflow['accuracy']:.1f}"]
    gain = f"**{format_gain(hyperflow)}**"
    rows.append([f"**mean of {len(domains)}**", "", *accuracies, gain, format_difference(flow)])
    return format_table(["domain", "ways", "direct transfer", "HyperFlow", "gain, points", "from the flow"], rows)


def build_shots_table(results: dict[str, Any]) -> str:
    """A row per domain and one for the mean: the gain at each number of shots, and which part of it is the flow's."""
    shots_there = list_values(results["records"], "n_shot")
    headings = ["gain, points"]
    for shots in shots_there:
        headings += [f"{shots}-shot", "from the flow"]
    rows = []
    for domain in list_values(results["records"], "domain"):
        row = [domain]
        for shots in shots_there:
            where = {"domain": domain, "n_shot": shots}
            row.append(format_gain(find(results["records"], method=HYPERFLOW, **where)))
            row.append(format_difference(find(results["hyperflow_against"], method=NO_FLOW, **where)))
        rows.append(row)
    row = ["**mean**"]
    for shots in shots_there:
        row.append(format_gain(find(results["means"], n_shot=shots, method=HYPERFLOW)))
        against = find(results["hyperflow_against"], domain=None, n_shot=shots, method=NO_FLOW)
        row.append(format_difference(against))
    rows.append(row)
    return format_table(headings, rows)


def build_methods_table(*sources: tuple[dict[str, Any], list[str]]) -> str:
    """A row per method: its mean gain over direct transfer at each number of shots, and what HyperFlow has more.

    Means over only some of the domains, which an interrupted benchmark has, are left out.

    Args:
        sources: results of a benchmark, and the names of the methods to take from it.
    """
    rows_of: list[tuple[dict[str, Any], str]] = []
    shots_there: set[int] = set()
    for results, methods in sources:
        for method in methods:
            means = select(results["means"], method=method)
            if means:
                rows_of.append((results, method))
                shots_there.update(list_values(means, "n_shot"))
    headings = ["gain over direct transfer, points"]
    for shots in sorted(shots_there):
        headings += [f"{shots}-shot", "HyperFlow has more"]
    rows = []
    for results, method in rows_of:
        all_domains = max(column(results["means"], "n_domains"))
        row = [_method_label(results, method)]
        for shots in sorted(shots_there):
            mean = find(results["means"], n_shot=shots, method=method, n_domains=all_domains)
            against = find(results["hyperflow_against"], domain=None, n_shot=shots, method=method)
            row.append(format_gain(mean))
            row.append("" if mean is None else format_difference(against))
        rows.append(row)
    return format_table(headings, rows)


def _method_label(results: dict[str, Any], method: str) -> str:
    """A method in words, with its gradient steps in this benchmark."""
    label = list_labels()[method]
    settings = results["arguments"]["hyperparameters"].get(TUNED_METHODS.get(method, method), {})
    if "steps" in settings:
        label += f", {settings['steps']} steps"
    return f"**{label}**" if method == HYPERFLOW else label


def build_flow_table(results: dict[str, Any], along: str) -> str:
    """Means over domains at points of the flow (`along` "t") or by the number of solver steps (`along` "steps").

    Each is told as the gain over direct transfer, and as the difference to HyperFlow as it is on the same episodes.
    """
    points = select(results["flow"], along=along)
    values = list_values(points, "value")
    headings = ["t" if along == "t" else "solver steps to t = 1"]
    headings += [f"{value:g}" for value in values]
    rows = []
    for shots in list_values(points, "n_shot"):
        gains, differences = [f"{shots}-shot, minus direct transfer"], [f"{shots}-shot, minus HyperFlow as it is"]
        for value in values:
            at_value = select(points, n_shot=shots, value=value)
            gains.append(_mean_over_domains(at_value, "diff_vs_direct", "diff_ci95"))
            differences.append(_mean_over_domains(at_value, "diff_vs_hyperflow", "diff_vs_hyperflow_ci95"))
        rows += [gains, differences]
    return format_table(headings, rows)


def _mean_over_domains(records: Records, key: str, half_width_key: str) -> str:
    return format_interval(*average_over_domains(column(records, key), column(records, half_width_key)))


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
