"""Tables of accuracies in a model card: by number of shots, domain, kind of episodes, method and point of the flow."""

from __future__ import annotations

from typing import Any

from hf_hyperflow.benchmark.methods import NoFlow, list_labels
from hf_hyperflow.benchmark.results import HYPERFLOW, REFERENCE, TUNED_METHODS, average_over_domains

from .markdown import format_interval, format_table
from .records import Records, column, find, get, list_values, select
from .scores import describe_episodes, list_shots

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


def build_protocols_table(*sources: dict[str, Any]) -> str:
    """A row per kind of episodes: means over the domains, and which part of the gain is the head's and the flow's.

    Args:
        sources: results of benchmarks.
    """
    rows = []
    for results in sources:
        for shots in list_shots(results):
            direct = get(results["means"], n_shot=shots, method=REFERENCE)
            head = get(results["means"], n_shot=shots, method=NO_FLOW)
            hyperflow = get(results["means"], n_shot=shots, method=HYPERFLOW)
            flow = get(results["hyperflow_against"], domain=None, n_shot=shots, method=NO_FLOW)
            row = [describe_episodes(results["arguments"], shots), f"{direct['accuracy']:.1f}"]
            row += [f"{hyperflow['accuracy']:.1f}", f"**{format_gain(hyperflow)}**"]
            rows.append([*row, format_gain(head), format_difference(flow)])
    headings = ["episodes", "direct transfer", "HyperFlow", "gain, points", "from the head", "from the flow"]
    return format_table(headings, rows)


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
