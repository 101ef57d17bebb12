"""From the episodes of a benchmark to its results: means, 95 % intervals, and differences paired by episode."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

import numpy as np

from .easyfsl_methods import EASYFSL_METHODS
from .evaluation import mean_ci95
from .methods import IN_METRIC, METHODS

#: Accuracies in % by episode index, of one method on one domain with one number of shots.
Accuracies = dict[int, float]
Costs = dict[tuple[str, int, int], dict[str, float]]

ORDER = (*METHODS, *IN_METRIC.values(), *EASYFSL_METHODS)
FINE_TUNED = {name: method for method, name in IN_METRIC.items()}
REFERENCE = "direct"


def summarise(rows: list[dict], costs: Costs) -> dict[str, list[dict]]:
    """The results of a benchmark.

    Args:
        rows: of `EpisodeLog`.
        costs: of `task_cost` by method, ways and number of support images (`cost_key`); None where not measured.

    Returns:
        records: one per method, domain and number of shots. `diff_vs_direct` and its interval are paired on the
            `diff_n_episodes` episodes that both methods have.
        means: one per method and number of shots, every domain counting the same; `n_episodes` and
            `diff_n_episodes` are sums over the domains.
        hyperflow_against: HyperFlow minus every other method, paired on the `n_episodes` episodes that both have, by
            domain and (`domain` null) as the mean over domains.
        flow: accuracy at points along the flow (`t`) and at t = 1 with other numbers of solver steps (`steps`),
            against direct transfer and (`diff_vs_hyperflow`, null where it was not run) HyperFlow as it is, on the
            same episodes.
    """
    table = _table(rows)
    groups = sorted({(domain, shots) for domain, shots, _ in table}, key=lambda g: (g[1] or 0, g[0]))
    methods = [m for m in ORDER if any(key[2] == m for key in table)]
    records, against = [], []
    for domain, shots in groups:
        here = [r for r in rows if (r["domain"], r["n_shot"]) == (domain, shots)]
        for method in methods:
            found = table.get((domain, shots, method))
            if found is None:
                continue
            mine = [r for r in here if r["method"] == method]
            record = {"method": method, "domain": domain, "n_way": _common(r["n_way"] for r in mine), "n_shot": shots}
            record |= _mean(found)
            record |= _against_direct(found, table.get((domain, shots, REFERENCE)), method)
            record |= costs.get(cost_key(mine), dict.fromkeys(COST_FIELDS))
            records.append(record)
            if method != "hyperflow" and (domain, shots, "hyperflow") in table:
                difference = _paired(table[domain, shots, "hyperflow"], found)
                against.append({"method": method, "domain": domain, "n_shot": shots} | difference)
    return {
        "records": records,
        "means": _means(records),
        "hyperflow_against": against + _means_against(against),
        "flow": _flow_records(table),
    }


COST_FIELDS = ("seconds_per_task", "peak_memory_mb", "flops_per_task")


def cost_key(rows: list[dict]) -> tuple[str, int, int]:
    """Method, ways and number of support images that a task of these rows has; the medians where they differ.

    What a gradient method costs does not depend on the metric that its features are classified in.
    """
    n_way, n_support = (statistics.median_low(r[key] for r in rows) for key in ("n_way", "n_support"))
    return FINE_TUNED.get(rows[0]["method"], rows[0]["method"]), n_way, n_support


def _table(rows: list[dict]) -> dict[tuple[str, int | None, str], Accuracies]:
    table: dict[tuple[str, int | None, str], Accuracies] = {}
    for row in rows:
        table.setdefault((row["domain"], row["n_shot"], row["method"]), {})[row["index"]] = row["accuracy"]
    return table


def _common(values: Iterable[int]) -> float:
    """The one value, or the mean of several."""
    values = list(values)
    return values[0] if len(set(values)) == 1 else round(statistics.mean(values), 2)


def _rounded(value: float) -> float | None:
    """For JSON, which has no NaN: the interval of a single episode."""
    return None if np.isnan(value) else round(value, 4)


def _mean(found: Accuracies) -> dict[str, float | None]:
    mean, half = mean_ci95(list(found.values()))
    return {"n_episodes": len(found), "accuracy": _rounded(mean), "ci95": _rounded(half)}


def _paired(a: Accuracies, b: Accuracies) -> dict[str, float | None]:
    """Mean of a - b on the episodes of both."""
    both = sorted(a.keys() & b.keys())
    if not both:
        return {"n_episodes": 0, "diff": None, "diff_ci95": None}
    mean, half = mean_ci95([a[i] - b[i] for i in both])
    return {"n_episodes": len(both), "diff": _rounded(mean), "diff_ci95": _rounded(half)}


def _against_direct(found: Accuracies, direct: Accuracies | None, method: str) -> dict[str, float | None]:
    if direct is None or method == REFERENCE:
        return {"diff_vs_direct": None, "diff_ci95": None, "diff_n_episodes": None}
    paired = _paired(found, direct)
    return {
        "diff_vs_direct": paired["diff"],
        "diff_ci95": paired["diff_ci95"],
        "diff_n_episodes": paired["n_episodes"],
    }


def over_domains(values: list[float], halves: list[float | None]) -> tuple[float, float | None]:
    """Mean over domains and its half-width, None if one has none: domains as given, episodes as drawn, so variances
    add up.
    """
    mean = float(np.mean(values))
    if None in halves:
        return round(mean, 4), None
    return round(mean, 4), round(float(np.sqrt(np.square(halves).sum()) / len(halves)), 4)


def _means(records: list[dict]) -> list[dict]:
    means = []
    for shots, method in dict.fromkeys((r["n_shot"], r["method"]) for r in records):
        mine = [r for r in records if (r["n_shot"], r["method"]) == (shots, method)]
        accuracy, ci95 = over_domains([r["accuracy"] for r in mine], [r["ci95"] for r in mine])
        mean = {"method": method, "n_shot": shots, "n_domains": len(mine)}
        mean |= {"n_episodes": sum(r["n_episodes"] for r in mine), "accuracy": accuracy, "ci95": ci95}
        mean |= {"diff_vs_direct": None, "diff_ci95": None, "diff_n_episodes": None}
        if all(r["diff_vs_direct"] is not None for r in mine):
            gain, half = over_domains([r["diff_vs_direct"] for r in mine], [r["diff_ci95"] for r in mine])
            episodes = sum(r["diff_n_episodes"] for r in mine)
            mean |= {"diff_vs_direct": gain, "diff_ci95": half, "diff_n_episodes": episodes}
        means.append(mean)
    return means


def _means_against(against: list[dict]) -> list[dict]:
    means = []
    for shots, method in dict.fromkeys((r["n_shot"], r["method"]) for r in against):
        mine = [r for r in against if (r["n_shot"], r["method"]) == (shots, method) and r["diff"] is not None]
        if mine:
            gain, half = over_domains([r["diff"] for r in mine], [r["diff_ci95"] for r in mine])
            episodes = sum(r["n_episodes"] for r in mine)
            mean = {"method": method, "domain": None, "n_shot": shots, "n_domains": len(mine), "n_episodes": episodes}
            means.append(mean | {"diff": gain, "diff_ci95": half})
    return means


def _flow_records(table: dict[tuple[str, int | None, str], Accuracies]) -> list[dict]:
    records = []
    for (domain, shots, name), found in table.items():
        if name.startswith("hyperflow ") and (domain, shots, REFERENCE) in table:
            along, value = name.removeprefix("hyperflow ").split("=")
            direct = {i: a for i, a in table[domain, shots, REFERENCE].items() if i in found}
            record = {"domain": domain, "n_shot": shots, "along": along, "value": float(value)} | _mean(found)
            record |= _against_direct(found, direct, name)
            more = _paired(found, table.get((domain, shots, "hyperflow"), {}))
            records.append(record | {"diff_vs_hyperflow": more["diff"], "diff_vs_hyperflow_ci95": more["diff_ci95"]})
    return sorted(records, key=lambda r: (r["along"], r["n_shot"] or 0, r["domain"], r["value"]))
