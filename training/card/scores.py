"""Are HyperFlow's scores probabilities? Log loss and calibration error against direct transfer's, as a Markdown table.

    python -m training.card.scores --results benchmark/results.json unbalanced/results.json [...]

Each file is what `hyperflow benchmark` wrote. A row is the mean over the domains of a file with one number of shots.
For a fair comparison, direct transfer has the scale of least log loss on training domains: that is what
`training.card.grid_search` chooses, and the benchmark reads it with `--hyperparameters`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_hyperflow.arguments import parse
from hf_hyperflow.benchmark.results import HYPERFLOW, REFERENCE

from .break_even import read_json
from .markdown import format_interval, format_table
from .records import get, list_values

HEADINGS = [
    "episodes",
    "log loss: direct transfer",
    "HyperFlow",
    "HyperFlow minus direct transfer",
    "calibration error: direct transfer",
    "HyperFlow",
]


@dataclass
class Arguments:
    results: list[str] = field(metadata={"help": "results.json of one or more benchmarks"})


def build_scores_table(*sources: dict[str, Any]) -> str:
    """A row per benchmark and number of shots: means over the domains.

    Args:
        sources: contents of results.json.

    Raises:
        ValueError: direct transfer or HyperFlow was not run, or by a version without log losses.
    """
    rows = []
    for results in sources:
        for n_shot in list_shots(results):
            direct = get(results["means"], n_shot=n_shot, method=REFERENCE)
            hyperflow = get(results["means"], n_shot=n_shot, method=HYPERFLOW)
            if direct.get("log_loss") is None or hyperflow.get("log_loss") is None:
                raise ValueError("a benchmark has no log losses: it was run by version 0.1. Run it again.")
            rows.append([describe_episodes(results["arguments"], n_shot), *_list_cells(direct, hyperflow)])
    return format_table(HEADINGS, rows)


def build_scores_by_domain_table(results: dict[str, Any]) -> str:
    """A row per domain; for each number of shots HyperFlow's log loss minus direct transfer's, and both errors.

    Args:
        results: content of results.json, with fixed numbers of shots.
    """
    shots_there = list_values(results["records"], "n_shot")
    headings = ["domain"]
    for n_shot in shots_there:
        headings += [f"{n_shot}-shot: log loss, HyperFlow minus direct transfer", "calibration errors of the two"]
    rows = []
    for domain in list_values(results["records"], "domain"):
        row = [domain]
        for n_shot in shots_there:
            direct = get(results["records"], domain=domain, n_shot=n_shot, method=REFERENCE)
            hyperflow = get(results["records"], domain=domain, n_shot=n_shot, method=HYPERFLOW)
            row.append(format_interval(hyperflow["log_loss_vs_direct"], hyperflow["log_loss_vs_direct_ci95"], "+.3f"))
            row.append(f"{hyperflow['ece']:.3f}, {direct['ece']:.3f}")
        rows.append(row)
    return format_table(headings, rows)


def _list_cells(direct: dict[str, Any], hyperflow: dict[str, Any]) -> list[str]:
    cells = [format_interval(mean["log_loss"], mean["log_loss_ci95"], ".3f") for mean in (direct, hyperflow)]
    cells.append(format_interval(hyperflow["log_loss_vs_direct"], hyperflow["log_loss_vs_direct_ci95"], "+.3f"))
    return cells + [f"{mean['ece']:.3f}" for mean in (direct, hyperflow)]


def list_shots(results: dict[str, Any]) -> list[int | None]:
    """The numbers of shots of a benchmark in their order; None alone where it is variable."""
    shots_there: list[int | None] = []
    for mean in results["means"]:
        if mean["n_shot"] not in shots_there:
            shots_there.append(mean["n_shot"])
    return shots_there


def describe_episodes(arguments: dict[str, Any], n_shot: int | None) -> str:
    """The episodes of a benchmark in words, from the arguments in its results."""
    words = {"meta-dataset": "Meta-Dataset's", "unbalanced": "unbalanced"}.get(arguments["protocol"])
    if words is None:
        words = f"{arguments['n_way']}-way {n_shot}-shot"
    if arguments["views"] > 1 or arguments["query_views"] > 1:
        words += f", views: {arguments['views']} of the support, {arguments['query_views']} of the queries"
    return words


def main(argv: list[str] | None = None) -> None:
    arguments = parse(Arguments, argv)
    try:
        print(build_scores_table(*[read_json(Path(path)) for path in arguments.results]))
    except KeyError as error:
        raise SystemExit(f"error: one of the files has no {error}: it was written by something else.") from error
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
