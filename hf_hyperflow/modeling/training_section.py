"""The part of an adapter's card that tells how it was trained, from its `training.json`."""

from __future__ import annotations

from typing import Any


def write_training_section(training: dict[str, Any]) -> str:
    """Data, validation, offline cost and settings of a training run, as Markdown.

    Args:
        training: the record that the trainer wrote. Records of version 0.1 are rendered as well.
    """
    lines = ["", "## How it was trained", ""]
    lines += _list_data(training["arguments"])
    lines += _list_validation(training["history"])
    lines += _list_cost(training)
    lines += _list_settings(training)
    return "\n".join(lines)


def list_runs(training: dict[str, Any]) -> list[dict[str, Any]]:
    """The record of a run after those of the adapters that it went on from, the first one first."""
    runs: list[dict[str, Any]] = []
    record: dict[str, Any] | None = training
    while record is not None:
        runs.insert(0, record)
        record = record.get("continued_from")
    return runs


def name_phase(phase: str, run: int, runs: list[dict[str, Any]]) -> str:
    """What a table calls a phase of run 0, 1, ... of `list_runs`."""
    return phase if len(runs) == 1 else f"{phase}, run {run + 1}"


def _list_data(arguments: dict[str, Any]) -> list[str]:
    lines = [f"Training domains: {_quote(arguments['dataset'])}."]
    if arguments["holdout"]:
        lines.append(
            f"Kept for validation (`name:k` stands for every k-th class of a domain): {_quote(arguments['holdout'])}."
        )
    return lines


def _list_validation(history: list[dict[str, Any]]) -> list[str]:
    """A table of the last validation, if there was one."""
    last = history[-1] if history else {}
    domains = {name: figures for name, figures in last.items() if isinstance(figures, dict)}
    if not domains:
        return []
    lines = [
        "",
        f"Validation after {last['step']:,} steps: 5-way 5-shot accuracy in %, with 95 % intervals. Differences are "
        "in percentage points and paired by episode.",
        "",
        "| domain | direct transfer | HyperFlow | difference | of it from the flow |",
        "|---|---|---|---|---|",
    ]
    for name, figures in domains.items():
        direct = f"{figures['direct']:.1f} ± {figures['direct_ci95']:.1f}"
        adapted = f"{figures['hyperflow']:.1f} ± {figures['hyperflow_ci95']:.1f}"
        difference = f"{figures['difference']:+.2f} ± {figures['difference_ci95']:.2f}"
        flow = "not recorded"
        if "flow" in figures:
            flow = f"{figures['flow']:+.2f} ± {figures['flow_ci95']:.2f}"
        lines.append(f"| {name} | {direct} | {adapted} | {difference} | {flow} |")
    return lines


def _list_cost(training: dict[str, Any]) -> list[str]:
    """A table of the offline cost: one row per collection of trajectories and per phase of training."""
    lines = ["", "| offline cost | runs | trajectories | episodes | time | FLOPs |", "|---|---|---|---|---|---|"]
    trajectories = training["trajectories"] or {}
    stored = 0
    for collection in trajectories.get("collections", []):
        totals = collection["totals"]
        n_rows = totals["rows"] - totals["diverged"]
        stored += totals["bytes"]
        lines.append(
            f"| collecting `{collection['name']}` ({collection['hardware']['device']}) | | {n_rows:,} | | "
            f"{_format_duration(totals['seconds'])} | {totals['flops']:.3g} |"
        )
    runs = list_runs(training)
    for number, run in enumerate(runs):
        for name, phase in run["phases"].items():
            lines.append(
                f"| {name_phase(name, number, runs)} | {phase['runs']:,} | {phase.get('rows', 0):,} | "
                f"{phase.get('episodes', 0):,} | {_format_duration(phase['seconds'])} | {phase['flops']:.3g} |"
            )
    places = [_describe_place(number, run, runs) for number, run in enumerate(runs)]
    storage = f"The trajectories take {stored / 1e6:,.1f} MB. " if stored else ""
    lines += [
        "",
        f"{storage}{' '.join(places)} Time is wall-clock, without reading the datasets. FLOPs are those of matrix "
        "products, convolutions and attention. Those of training steps are counted at every fiftieth step and "
        "extrapolated.",
    ]
    return lines


def _describe_place(number: int, run: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """Where a run was trained."""
    hardware = run["hardware"]
    subject = "Trained" if len(runs) == 1 else f"Run {number + 1} was trained"
    return (
        f"{subject} on {hardware['device']}, {hardware['processes']} process(es), {hardware['mixed_precision']} mixed "
        "precision."
    )


def _list_settings(training: dict[str, Any]) -> list[str]:
    lines = ["", "<details><summary>All settings</summary>", "", "| argument | value |", "|---|---|"]
    for name, value in training["arguments"].items():
        lines.append(f"| `{name}` | {_quote(value)} |")
    versions = [f"{name} {number}" for name, number in training["versions"].items()]
    lines += ["", f"Versions: {', '.join(versions)}.", "", "</details>", ""]
    return lines


def _quote(value: Any) -> str:
    """A value, or all values of a list, in Markdown's code quotes."""
    values = value if isinstance(value, list) else [value]
    return ", ".join(f"`{item}`" for item in values)


def _format_duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min"
