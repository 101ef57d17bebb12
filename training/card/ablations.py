"""What each part is worth: short trainings that differ in one thing, and what each gains on unseen domains.

    python -m training.card.ablations --backbone model_cards/vit-s14-focus-70 --dataset TRAINING_DOMAIN [...] \
        --unseen FILE_OR_HUB_ID [...] --trajectories FOLDER [...] --output_dir ablations

All but one variant compare images by plain cosines, as the paper does. The flow then has everything to do, and few
steps show what a change is worth. The command writes `ablations.json`, with the accuracy of every episode, and
`ablations.md`. An interrupted run goes on where it was when the same command is run again: a row of the JSON file is
not measured again, and more variants can be added. Nothing is chosen by this table, for its domains are those that are
reported.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_hyperflow.arguments import parse
from hf_hyperflow.benchmark.episode_log import EpisodeLog
from hf_hyperflow.benchmark.methods import NoFlow
from hf_hyperflow.benchmark.results import HYPERFLOW, REFERENCE
from hf_hyperflow.benchmark.runner import RESULTS
from hf_hyperflow.modeling.adapter_files import TRAINING_RECORD
from hf_hyperflow.modeling.atomic_file import atomic_file, write_json

from .records import Records, find, get, list_stems
from .stages import run
from .tables import build_ablations_table

ABLATIONS = "ablations.json"
#: The variant that the others are compared with, and the one that has the head and features of a released adapter.
FIRST, WITH_HEAD = "episodic loss", "with head and intermediate features"
#: What the other variants have instead: plain cosines of the last features.
PLAIN = ("--no_lda", "--intermediate_weight", 0)
#: In so few steps a long warmup and average would leave little, and nobody reads the validation.
SHORT = ("--warmup_steps", 8, "--ema_decay", 0.9, "--validation_episodes", 4)
#: The paper's names of the interpolants.
INTERPOLANTS = (("L", "linear"), ("PL", "piecewise"), ("C", "cubic"))


@dataclass
class Arguments:
    backbone: str = field(metadata={"help": "the target: Hub id or folder"})
    dataset: list[str] = field(metadata={"help": "domains to train on"})
    unseen: list[str] = field(metadata={"help": "domains to report on"})
    output_dir: str = field(metadata={"help": "folder for the adapters, their benchmarks and the table"})
    holdout: list[str] = field(default_factory=list, metadata={"help": "as for train_drift.py"})
    trajectories: list[str] = field(
        default_factory=list,
        metadata={"help": "recordings for velocity matching alone: a row for each interpolant and recording"},
    )
    steps: int = field(default=300, metadata={"help": "optimiser steps of a training, unless a variant has its own"})
    learning_rate: float = field(default=1e-3, metadata={"help": "its peak, higher than usual for so few steps"})
    variants: list[str] = field(default_factory=list, metadata={"help": "only those of these names; default: all"})
    n_shot: int = field(default=5, metadata={"help": "support images of a class"})
    n_episodes: int = field(default=200, metadata={"help": "episodes of each unseen domain"})


def thin_out(arguments: Arguments, every: int) -> list[str]:
    """The domains that something is held out of, and every `every`-th of the others."""
    with_holdout = [entry.split(":")[0] for entry in arguments.holdout]
    kept, others = [], []
    for source in arguments.dataset:
        if Path(source).stem in with_holdout:
            kept.append(source)
        else:
            others.append(source)
    return kept + others[::every]


def list_variants(arguments: Arguments) -> dict[str, list[object]]:
    """What is trained, by name: options of `train_drift.py` beside the common ones.

    Raises:
        SystemExit: `--variants` names one that does not exist.
    """
    changes: dict[str, list[object]] = {
        FIRST: [],
        WITH_HEAD: [],
        "LayerNorms": ["--parameters", "layernorm"],
        "LoRA": ["--parameters", "lora"],
        "separate encoder": ["--encoder", arguments.backbone],
        "half as long": ["--steps", arguments.steps // 2],
        "a quarter as long": ["--steps", arguments.steps // 4],
        "every second domain": ["--dataset", *thin_out(arguments, 2)],
        "every fourth domain": ["--dataset", *thin_out(arguments, 4)],
        "no domain randomisation": ["--randomize_prob", 0],
    }
    for folder in arguments.trajectories:
        rows = json.loads((Path(folder) / "collection.json").read_text())["totals"]["rows"]
        for letters, interpolant in INTERPOLANTS:
            changes[f"{letters}, {rows} trajectories"] = [
                *("--trajectories", folder, "--interpolant", interpolant),
                *("--matching_steps", arguments.steps, "--steps", arguments.steps),
            ]
    unknown = sorted(set(arguments.variants) - set(changes))
    if unknown:
        raise SystemExit(f"error: there are no variants {unknown}: choose from {', '.join(changes)}.")
    variants = {}
    for name, options in changes.items():
        if name in arguments.variants or not arguments.variants:
            variants[name] = options if name == WITH_HEAD else [*PLAIN, *options]
    return variants


def describe_settings(arguments: Arguments, options: list[object]) -> dict[str, Any]:
    """What a row depends on; of files and folders the names only."""
    words = []
    for option in options:
        word = str(option)
        words.append(Path(word).stem if Path(word).exists() else word)
    return {
        "steps": arguments.steps,
        "learning_rate": arguments.learning_rate,
        "n_shot": arguments.n_shot,
        "n_episodes": arguments.n_episodes,
        "holdout": arguments.holdout,
        "dataset": list_stems(arguments.dataset),
        "unseen": list_stems(arguments.unseen),
        "options": words,
    }


def train(name: str, options: list[object], arguments: Arguments, adapter: Path) -> None:
    """Train a variant."""
    data: list[object] = [] if "--dataset" in options else ["--dataset", *arguments.dataset]
    if arguments.holdout:
        data += ["--holdout", *arguments.holdout]
    run(
        f"{name}: training",
        "training.train_drift",
        *("--backbone", arguments.backbone, *data),
        *("--steps", arguments.steps, "--validate_every", arguments.steps),
        *("--learning_rate", arguments.learning_rate, *SHORT),
        *(*options, "--checkpointing_steps", 50, "--resume_from_checkpoint", "latest", "--output_dir", adapter),
    )


def benchmark(name: str, arguments: Arguments, adapter: Path, output: Path) -> None:
    """Measure a variant on the unseen domains."""
    methods = ",".join([REFERENCE, NoFlow.name, HYPERFLOW])
    run(
        f"{name}: benchmark",
        "hf_hyperflow",
        *("benchmark", "--backbone", arguments.backbone, "--adapter", adapter, "--dataset", *arguments.unseen),
        *("--methods", methods, "--n_shot", arguments.n_shot, "--n_episodes", arguments.n_episodes),
        *("--flow_episodes", 0, "--output_dir", output),
    )


def read_accuracies(benchmark_folder: Path) -> dict[str, list[float]]:
    """HyperFlow's accuracies by domain, in the order of the episodes."""
    accuracies: dict[str, list[float]] = {}
    for row in EpisodeLog(benchmark_folder, {}).rows:
        if row.method == HYPERFLOW:
            accuracies.setdefault(row.domain, []).append(round(row.accuracy, 3))
    return accuracies


def make_row(name: str, settings: dict[str, Any], adapter: Path, benchmark_folder: Path) -> dict[str, Any]:
    """Means over the domains with their 95 % half-widths, and the accuracies they come from."""
    record = json.loads((adapter / TRAINING_RECORD).read_text())
    results = json.loads((benchmark_folder / RESULTS).read_text())
    gain = get(results["means"], method=HYPERFLOW)
    flow = get(results["hyperflow_against"], method=NoFlow.name, domain=None)
    seconds = sum(phase["seconds"] for phase in record["phases"].values())
    return {
        "variant": name,
        "settings": settings,
        "gain": gain["diff_vs_direct"],
        "gain_ci95": gain["diff_ci95"],
        "gain_of_the_flow": flow["diff"],
        "gain_of_the_flow_ci95": flow["diff_ci95"],
        "n_episodes": gain["diff_n_episodes"],
        "training_minutes": round(seconds / 60, 1),
        "accuracies": read_accuracies(benchmark_folder),
        "arguments": record["arguments"],
    }


def read_rows(path: Path) -> Records:
    """The rows of the JSON file; none if there is no file.

    Raises:
        SystemExit: it holds something else.
    """
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text())
        for row in rows:
            for key in ("variant", "settings", "accuracies"):
                row[key]
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"error: {path} holds no ablations ({error!r}): remove it to measure again.") from error
    return rows


def main() -> None:
    arguments = parse(Arguments)
    output = Path(arguments.output_dir)
    rows = read_rows(output / ABLATIONS)
    for name, options in list_variants(arguments).items():
        settings = describe_settings(arguments, options)
        if find(rows, variant=name, settings=settings):
            continue
        folder = output / name.replace(",", "").replace(" ", "-")
        if not (folder / "adapter" / TRAINING_RECORD).is_file():
            train(name, options, arguments, folder / "adapter")
        benchmark(name, arguments, folder / "adapter", folder / "benchmark")
        rows = [row for row in rows if row["variant"] != name]
        rows.append(make_row(name, settings, folder / "adapter", folder / "benchmark"))
        rows.sort(key=lambda row: row["variant"] != FIRST)
        write_json(output / ABLATIONS, rows)
        with atomic_file(output / "ablations.md") as draft:
            draft.write_text(build_ablations_table(rows) + "\n")
    print(build_ablations_table(rows))


if __name__ == "__main__":
    main()
