"""What each part is worth: short trainings that differ in one thing, and what each gains on unseen domains.

    python training/ablations.py --backbone model_cards/vit-s14-focus-70 --dataset TRAINING_DOMAIN [...] \
        --unseen FILE_OR_HUB_ID [...] --trajectories FOLDER [...] --output_dir ablations

All but one variant compare images by plain cosines, as the paper does: so the flow has everything to do, and what
changes it shows after few steps. Writes `ablations.json`, with the accuracy of every episode, and `ablations.md`.
Interrupted, the same command goes on where it was; a row that is in the JSON file is not measured again, and more
variants can be added to it. Nothing is chosen by this table: its domains are those that are reported.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from hf_hyperflow.arguments import parse
from hf_hyperflow.benchmark.episode_log import EpisodeLog
from hf_hyperflow.benchmark.runner import RESULTS
from hf_hyperflow.modeling.adapter import TRAINING_RECORD
from hf_hyperflow.modeling.saving import atomic_file, write_json

from .stages import run
from .tables import ablations_table

ABLATIONS = "ablations.json"
#: The variant that the others are compared with, and the one that has the metric and features of a released adapter.
FIRST, METRIC = "task objective", "with metric and middle"

#: Of so few steps a long warmup and average would leave little, and nobody reads the validation.
SHORT = ("--warmup_steps", 8, "--ema_decay", 0.9, "--validation_episodes", 4)


@dataclass
class Arguments:
    backbone: str = field(metadata={"help": "the target: Hub id or folder"})
    dataset: list[str] = field(metadata={"help": "domains to train on"})
    unseen: list[str] = field(metadata={"help": "domains to report on"})
    output_dir: str = field(metadata={"help": "folder for the adapters, their benchmarks and the table"})
    holdout: list[str] = field(default_factory=list, metadata={"help": "as for train_drift.py"})
    trajectories: list[str] = field(
        default_factory=list, metadata={"help": "recordings to match, without the task objective: a row and path each"}
    )
    steps: int = field(default=300, metadata={"help": "optimiser steps of every training, if it says nothing else"})
    learning_rate: float = field(default=1e-3, metadata={"help": "its peak, higher than usual for so few steps"})
    variants: list[str] = field(default_factory=list, metadata={"help": "only those of these names; default: all"})
    n_shot: int = field(default=5, metadata={"help": "support images of a class"})
    n_episodes: int = field(default=200, metadata={"help": "episodes of each unseen domain"})


def fewer(a: Arguments, every: int) -> list[str]:
    """The domains that something is held out of, and of the others every so many-th."""
    kept = {entry.split(":")[0] for entry in a.holdout}
    others = [source for source in a.dataset if Path(source).stem not in kept]
    return [source for source in a.dataset if Path(source).stem in kept] + others[::every]


def variants(a: Arguments) -> dict[str, list[object]]:
    """What is trained, by name: arguments of `train_drift.py` beside the common ones."""
    found = {
        FIRST: [],
        METRIC: [],
        "LayerNorms": ["--parameters", "layernorm"],
        "LoRA": ["--parameters", "lora"],
        "separate encoder": ["--encoder", a.backbone],
        "half as long": ["--steps", a.steps // 2],
        "a quarter as long": ["--steps", a.steps // 4],
        "every second domain": ["--dataset", *fewer(a, 2)],
        "every fourth domain": ["--dataset", *fewer(a, 4)],
        "no made-up domains": ["--randomize_prob", 0],
    }
    for folder in a.trajectories:
        rows = json.loads((Path(folder) / "collection.json").read_text())["totals"]["rows"]
        for letters, path in (("L", "linear"), ("PL", "piecewise"), ("C", "cubic")):
            matching = ["--trajectories", folder, "--path", path, "--matching_steps", a.steps, "--steps", a.steps]
            found[f"{letters}, {rows} trajectories"] = matching
    unknown = sorted(set(a.variants) - set(found))
    if unknown:
        raise SystemExit(f"error: there are no variants {unknown}: choose from {', '.join(found)}.")
    plain = ["--no_metric", "--middle", 0]
    found = {name: more if name == METRIC else [*plain, *more] for name, more in found.items()}
    return {name: more for name, more in found.items() if name in a.variants or not a.variants}


def accuracies(benchmark: Path) -> dict[str, list[float]]:
    """HyperFlow's in a benchmark's folder, by domain, in the order of the episodes."""
    found: dict[str, list[float]] = {}
    for row in EpisodeLog(benchmark, {}).rows:
        if row["method"] == "hyperflow":
            found.setdefault(row["domain"], []).append(round(row["accuracy"], 3))
    return found


def result(name: str, settings: dict, adapter: Path, benchmark: Path) -> dict:
    """A row: means over the domains with their 95 % half-widths, and the accuracies they come from."""
    record = json.loads((adapter / TRAINING_RECORD).read_text())
    found = json.loads((benchmark / RESULTS).read_text())
    gain = next(m for m in found["means"] if m["method"] == "hyperflow")
    flow = next(m for m in found["hyperflow_against"] if m["method"] == "metric" and m["domain"] is None)
    return {
        "variant": name,
        "settings": settings,
        "gain": gain["diff_vs_direct"],
        "gain_ci95": gain["diff_ci95"],
        "gain_of_the_flow": flow["diff"],
        "gain_of_the_flow_ci95": flow["diff_ci95"],
        "n_episodes": gain["diff_n_episodes"],
        "training_minutes": round(sum(phase["seconds"] for phase in record["phases"].values()) / 60, 1),
        "accuracies": accuracies(benchmark),
        "arguments": record["arguments"],
    }


def known_rows(path: Path) -> list[dict]:
    """The rows that are in the file.

    Raises:
        SystemExit: it is no such file.
    """
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text())
        _ = [(row["variant"], row["settings"], row["accuracies"]) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"error: {path} holds no ablations ({error!r}): remove it to measure again.") from error
    return rows


def main() -> None:
    a = parse(Arguments)
    output = Path(a.output_dir)
    rows = known_rows(output / ABLATIONS)
    common = {key: vars(a)[key] for key in ("steps", "learning_rate", "n_shot", "n_episodes", "holdout")}
    common |= {key: [Path(source).stem for source in vars(a)[key]] for key in ("dataset", "unseen")}
    for name, more in variants(a).items():
        settings = common | {"options": [Path(part).stem if Path(part).exists() else part for part in map(str, more)]}
        if any(row["variant"] == name and row["settings"] == settings for row in rows):
            continue
        folder = output / name.replace(",", "").replace(" ", "-")
        adapter, benchmark = folder / "adapter", folder / "benchmark"
        if not (adapter / TRAINING_RECORD).is_file():
            run(
                {},
                f"{name}: training",
                *("train_drift.py", "--backbone", a.backbone, "--steps", a.steps, "--validate_every", a.steps),
                *("--learning_rate", a.learning_rate, *SHORT),
                *([] if "--dataset" in more else ["--dataset", *a.dataset]),
                *(["--holdout", *a.holdout] if a.holdout else []),
                *(*more, "--checkpointing_steps", 50, "--resume_from_checkpoint", "latest", "--output_dir", adapter),
            )
        run(
            {},
            f"{name}: benchmark",
            *("benchmark.py", "--backbone", a.backbone, "--adapter", adapter, "--dataset", *a.unseen),
            *("--methods", "direct,metric,hyperflow", "--n_shot", a.n_shot, "--n_episodes", a.n_episodes),
            *("--flow_episodes", 0, "--output_dir", benchmark),
        )
        rows = [row for row in rows if row["variant"] != name]
        rows.append(result(name, settings, adapter, benchmark))
        rows.sort(key=lambda row: row["variant"] != FIRST)
        write_json(output / ABLATIONS, rows)
        with atomic_file(output / "ablations.md") as draft:
            draft.write_text(ablations_table(rows) + "\n")
    print(ablations_table(rows))


if __name__ == "__main__":
    main()
