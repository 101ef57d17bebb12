"""The numbers of a model card: tables and metadata from the JSON files that `card.py` collects.

A card keeps its prose; what stands between `<!-- table: NAME -->` and `<!-- end -->` is written anew.
"""

from __future__ import annotations

import re

from huggingface_hub import EvalResult, ModelCard

from hf_hyperflow.benchmark.evaluation import mean_ci95
from hf_hyperflow.benchmark.methods import GRADIENT_METHODS, IN_METRIC
from hf_hyperflow.benchmark.results import ORDER, over_domains

from .offline_cost import bill_markdown

TABLE = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
LABELS = {
    "direct": "direct transfer (cosines to class means)",
    "metric": "the metric and features of HyperFlow, without the flow",
    "head": "logistic regression",
    "hyperflow": "**HyperFlow**",
    "hyperflow-guard": "HyperFlow, with the guard",
    "bias": "bias and norm tuning",
    "lora": "LoRA tuning",
    "layernorm": "LayerNorm tuning",
    "full": "full fine-tuning",
}
WITH_GRADIENTS = [*GRADIENT_METHODS, *IN_METRIC.values()]
COSTS = {
    "direct": "direct transfer",
    "hyperflow integrate": "HyperFlow, the flow alone, of images that are encoded",
    "hyperflow adapt": "HyperFlow, the adaptation alone",
    "hyperflow ready": "**HyperFlow, ready to predict**",
}


def label(method: str, steps: int | None = None) -> str:
    """A method in words, with its gradient steps; `bias-metric` is bias tuning, classified in the metric."""
    of_steps = "" if steps is None else f", {steps} steps"
    if method.endswith("-metric"):
        return f"{LABELS[method.removesuffix('-metric')]}{of_steps}, in the metric"
    return LABELS.get(method, f"`{method}`") + of_steps


def interval(value: float | None, half: float | None, digits: str = "+.2f") -> str:
    """A number with its 95 % half-width, which a single episode has not."""
    if value is None:
        return ""
    return f"{value:{digits}}" if half is None else f"{value:{digits}} ± {half:{digits.removeprefix('+')}}"


def _one(records: list[dict], **values: object) -> dict | None:
    """The record with these values, if there is one."""
    return next((r for r in records if all(r[key] == value for key, value in values.items())), None)


def _shots(results: dict) -> list[int]:
    return sorted({r["n_shot"] for r in results["records"]})


def domains_table(results: dict, n_shot: int) -> str:
    """A row per domain: direct transfer and HyperFlow, their difference, and what of it is the flow's."""
    lines = [
        "| domain | ways | direct transfer | HyperFlow | difference, points | of it the flow |",
        "|---|" + 5 * "---|",
    ]
    domains = sorted({r["domain"] for r in results["records"]})
    for domain in domains:
        direct, flow = (
            _one(results["records"], domain=domain, n_shot=n_shot, method=m) for m in ("direct", "hyperflow")
        )
        alone = _one(results["hyperflow_against"], domain=domain, n_shot=n_shot, method="metric")
        accuracies = [interval(r["accuracy"], r["ci95"], ".1f") for r in (direct, flow)]
        gain = interval(flow["diff_vs_direct"], flow["diff_ci95"])
        row = [domain, f"{flow['n_way']:g}", *accuracies, gain, interval(alone["diff"], alone["diff_ci95"])]
        lines.append(f"| {' | '.join(row)} |")
    direct, flow = (_one(results["means"], n_shot=n_shot, method=m) for m in ("direct", "hyperflow"))
    alone = _one(results["hyperflow_against"], domain=None, n_shot=n_shot, method="metric")
    gain, share = interval(flow["diff_vs_direct"], flow["diff_ci95"]), interval(alone["diff"], alone["diff_ci95"])
    lines.append(
        f"| **mean of {len(domains)}** | | {direct['accuracy']:.1f} | {flow['accuracy']:.1f} | **{gain}** | {share} |"
    )
    return "\n".join(lines)


def methods_table(*sources: tuple[dict, list[str]]) -> str:
    """A row per method: its mean gain over direct transfer at each number of shots, and what HyperFlow has more.

    Means over some of the domains only, of a benchmark that was interrupted, are left out.

    Args:
        sources: results of a benchmark, and the methods to take from it.
    """
    rows = [(results, m) for results, methods in sources for m in methods if _one(results["means"], method=m)]
    shots_there = sorted({mean["n_shot"] for results, m in rows for mean in results["means"] if mean["method"] == m})
    head = [f"{shots}-shot | HyperFlow has more" for shots in shots_there]
    lines = [f"| gain over direct transfer, points | {' | '.join(head)} |", "|---|" + 2 * len(shots_there) * "---|"]
    for results, method in rows:
        cells, all_domains = [], max(mean["n_domains"] for mean in results["means"])
        for shots in shots_there:
            mean = _one(results["means"], n_shot=shots, method=method, n_domains=all_domains)
            against = _one(results["hyperflow_against"], domain=None, n_shot=shots, method=method) if mean else None
            cells.append(interval(mean["diff_vs_direct"], mean["diff_ci95"]) if mean else "")
            cells.append(interval(against["diff"], against["diff_ci95"]) if against else "")
        recipe = results["arguments"]["recipes"].get(method.removesuffix("-metric"), {})
        lines.append(f"| {label(method, recipe.get('steps'))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shots_table(results: dict) -> str:
    """A row per domain and one for the mean: the gain at each number of shots, and what of it is the flow's."""
    shots_there = _shots(results)
    head = " | ".join(f"{shots}-shot | of it the flow" for shots in shots_there)
    lines = [f"| HyperFlow minus direct transfer | {head} |", "|---|" + 2 * len(shots_there) * "---|"]
    rows = [
        (domain, results["records"], {"domain": domain}) for domain in sorted({r["domain"] for r in results["records"]})
    ]
    for name, records, where in [*rows, ("**mean**", results["means"], {})]:
        cells = []
        for shots in shots_there:
            flow = _one(records, n_shot=shots, method="hyperflow", **where)
            alone = _one(results["hyperflow_against"], n_shot=shots, method="metric", **(where or {"domain": None}))
            cells.append(interval(flow["diff_vs_direct"], flow["diff_ci95"]) if flow else "")
            cells.append(interval(alone["diff"], alone["diff_ci95"]) if alone else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def flow_table(results: dict, along: str) -> str:
    """Means over domains at points of the flow (`along` "t") or by solver `steps`: gains over direct transfer, and over
    HyperFlow as it is on the same episodes.
    """
    points = [r for r in results["flow"] if r["along"] == along]
    values = sorted({r["value"] for r in points})
    title = "t" if along == "t" else "solver steps to t = 1"
    lines = [f"| {title} | {' | '.join(f'{value:g}' for value in values)} |", "|---|" + len(values) * "---|"]
    rows = (("direct transfer", "diff_vs_direct", "diff_ci95"),)
    rows += (("HyperFlow as it is", "diff_vs_hyperflow", "diff_vs_hyperflow_ci95"),)
    for shots in sorted({r["n_shot"] for r in points}):
        for other, diff, half in rows:
            cells = []
            for value in values:
                mine = [r for r in points if (r["n_shot"], r["value"]) == (shots, value)]
                cells.append(interval(*over_domains([r[diff] for r in mine], [r[half] for r in mine])))
            lines.append(f"| {shots}-shot, minus {other} | {' | '.join(cells)} |")
    return "\n".join(lines)


def conditioning_table(*sources: tuple[str, dict]) -> str:
    """What the flow gains by what it reads, means over domains.

    Args:
        sources: what kind of domains, and the JSON of `conditioning.py` of them.
    """
    heads, lines = ["the flow reads"], {}
    for kind, found in sources:
        own, *others = (r for r in found["records"] if r["domain"] is None)
        heads += [f"{kind}: minus the metric without the flow", f"{own['condition']} has more"]
        for r in (own, *others):
            more = "" if r is own else interval(r["own_has_more"], r["own_has_more_ci95"])
            lines.setdefault(r["condition"], []).extend([interval(r["gain"], r["gain_ci95"]), more])
    rows = [f"| {' | '.join([condition, *cells])} |" for condition, cells in lines.items()]
    return "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *rows])


def cost_table(cost: dict) -> str:
    """Time, memory and operations of getting ready for a task, from the JSON of `benchmark_cost.py`."""
    sizes = [key for key in cost if key != "hardware"]
    head = " | ".join(f"{size}: time | memory | FLOPs | of full fine-tuning's time, memory" for size in sizes)
    lines = [f"| 25 images, 5 ways | {head} |", "|---|" + 4 * len(sizes) * "---|"]
    for method in cost[sizes[0]]:
        cells = []
        for size in sizes:
            c = cost[size][method]
            cells += [f"{c['seconds']:.3g} s", f"{c['peak_memory_mb']:,.0f} MB", f"{c['flops'] / 1e9:,.0f} G"]
            cells.append(f"{100 * c['time_share_of_full']:.3g} %, {100 * c['memory_share_of_full']:.3g} %")
        lines.append(f"| {COSTS.get(method, method)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def recipes_table(recipes: dict) -> str:
    """What was chosen for the baselines, and how it and the best and the worst setting of the grid did."""
    lines = ["| baseline | chosen | accuracy | best of the grid | worst |", "|---|---|---|---|---|"]
    for method, chosen in recipes["recipes"].items():
        entries = [entry for entry in recipes["grid"] if entry["method"] == method]
        best, worst = (choose(entries, key=lambda e: e["accuracy"]) for choose in (max, min))
        mine = _one(entries, **chosen)
        cells = [label(method), _settings(chosen, chosen), f"{mine['accuracy']:.1f} %", f"{best['accuracy']:.1f} %"]
        if mine is not best:
            cells[-1] += f" ({_settings(best, chosen)})"
        lines.append(f"| {' | '.join([*cells, format(worst['accuracy'], '.1f') + ' %'])} |")
    return "\n".join(lines)


def _settings(entry: dict, keys: dict) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {entry[key]:g}" for key in keys)


def ablations_table(rows: list[dict]) -> str:
    """A row per variant, from the JSON of `ablations.py`: its gain, and what it has more than the first on the same
    episodes.
    """
    heads = ["variant", "gain over direct transfer", "of it the flow", f"minus {rows[0]['variant']}"]
    heads.append("minutes of training")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        gain, flow = (interval(row[key], row[f"{key}_ci95"]) for key in ("gain", "gain_of_the_flow"))
        minus = "" if row is rows[0] else interval(*_minus(row["accuracies"], rows[0]["accuracies"]))
        lines.append(f"| {row['variant']} | {gain} | {flow} | {minus} | {row['training_minutes']} |")
    return "\n".join(lines)


def _minus(one: dict[str, list[float]], other: dict[str, list[float]]) -> tuple[float, float | None]:
    """Mean over the domains of the differences on the same episodes, and its half-width."""
    pairs = [list(zip(one[domain], other[domain], strict=False)) for domain in sorted(one.keys() & other.keys())]
    found = [mean_ci95([a - b for a, b in episodes]) for episodes in pairs]
    return over_domains([mean for mean, _ in found], [half for _, half in found])


def tables(found: dict[str, dict | list]) -> dict[str, str]:
    """The tables by name, of what was measured.

    Args:
        found: `results` (of the benchmark), `fine_tuning` (of the one with gradients), `conditioning` (on unseen
            domains), `conditioning_training`, `cost`, `bill`, `recipes`, and `ablations`, or some.
    """
    by_name = {}
    if "results" in found:
        by_name["domains"] = domains_table(found["results"], 5)
        by_name["shots"] = shots_table(found["results"])
        by_name["methods"] = methods_table((found["results"], [m for m in ORDER if m not in WITH_GRADIENTS]))
    if "fine_tuning" in found:
        also = [(found["results"], WITH_GRADIENTS)] if "results" in found else []
        by_name["fine-tuning"] = methods_table((found["fine_tuning"], [*ORDER]), *also)
        if found["fine_tuning"]["flow"]:
            by_name["time"] = flow_table(found["fine_tuning"], "t")
            by_name["steps"] = flow_table(found["fine_tuning"], "steps")
    if "conditioning" in found:
        kinds = {"conditioning": "unseen domains", "conditioning_training": "training and validation domains"}
        by_name["conditioning"] = conditioning_table(
            *((kind, found[key]) for key, kind in kinds.items() if key in found)
        )
    if "cost" in found:
        by_name["cost"] = cost_table(found["cost"])
    if "bill" in found:
        by_name["bill"] = bill_markdown(found["bill"]).rstrip()
    if "recipes" in found:
        by_name["recipes"] = recipes_table(found["recipes"])
    if "ablations" in found:
        by_name["ablations"] = ablations_table(found["ablations"])
    return by_name


def filled(text: str, by_name: dict[str, str]) -> str:
    """A text with its tables written anew.

    Raises:
        ValueError: it asks for a table that there is not, or that nothing was measured for.
    """

    def table(match: re.Match) -> str:
        if match[2] not in by_name:
            raise ValueError(f"there is no table {match[2]!r}: use one of {', '.join(by_name)}.")
        return f"{match[1]}{by_name[match[2]]}\n{match[3]}"

    return TABLE.sub(table, text)


def with_model_index(text: str, results: dict, name: str) -> str:
    """A card whose metadata say what HyperFlow reached, by domain and number of shots (the Hub's model-index)."""
    card = ModelCard(text)
    card.data.model_name, card.data.eval_results = name, []
    for record in results["records"]:
        if record["method"] != "hyperflow":
            continue
        task = {"task_type": "image-classification", "task_name": "few-shot image classification"}
        config = f"{record['n_way']:g}-way {record['n_shot']}-shot"
        where = {"dataset_type": record["domain"], "dataset_name": record["domain"], "dataset_config": config}
        over = f"{record['n_episodes']} episodes"
        accuracy = {"metric_value": round(record["accuracy"], 2), "metric_name": f"accuracy in %, mean of {over}"}
        gain = {
            "metric_value": round(record["diff_vs_direct"], 2),
            "metric_name": f"points over direct transfer, {over}",
        }
        card.data.eval_results.append(EvalResult(**task, **where, metric_type="accuracy", **accuracy))
        card.data.eval_results.append(EvalResult(**task, **where, metric_type="gain", **gain))
    return str(card)
