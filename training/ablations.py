"""What each part is worth: short trainings that differ in one thing, and what each gains on unseen domains.

    python training/ablations.py --backbone model_cards/vit-s14-focus-70 --dataset TRAINING_DOMAIN [...] \
        --unseen FILE_OR_HUB_ID [...] --trajectories FOLDER [...] --output_dir ablations

All but one variant compare images by plain cosines, as the paper does: so the flow has everything to do, and what
changes it shows after few steps. Writes `ablations.json` and `ablations.md`. Interrupted, the same command goes on
where it was; what is finished is not done again. Nothing is chosen by this table: its domains are those that are
reported.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from arguments import parse
from stages import run

from hf_hyperflow.adapter import TRAINING_RECORD
from hf_hyperflow.benchmark import RESULTS
from hf_hyperflow.episode_log import EpisodeLog
from hf_hyperflow.evaluation import mean_ci95
from hf_hyperflow.results import over_domains
from hf_hyperflow.saving import replaced, write_json

#: The variant that has the metric and features of a released adapter.
METRIC = "with metric and middle"


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
        "task objective": [],
        METRIC: [],
        "LayerNorms": ["--parameters", "layernorm"],
        "LoRA": ["--parameters", "lora"],
        "separate encoder": ["--encoder", a.backbone],
        "half as long": ["--steps", a.steps // 2],
        "a quarter as long": ["--steps", a.steps // 4],
        "every second domain": ["--dataset", *fewer(a, 2)],
        "every fourth domain": ["--dataset", *fewer(a, 4)],
        "no made-up domains": ["--made_share", 0],
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


def of_hyperflow(benchmark: Path) -> dict[str, dict[int, float]]:
    """Accuracies of HyperFlow in a benchmark's folder, by domain and episode."""
    found: dict[str, dict[int, float]] = {}
    for row in EpisodeLog(benchmark, {}).rows:
        if row["method"] == "hyperflow":
            found.setdefault(row["domain"], {})[row["index"]] = row["accuracy"]
    return found


def paired(one: Path, other: Path) -> tuple[float, float | None]:
    """Mean over the domains of one benchmark's HyperFlow minus another's on the same episodes, and its half-width."""
    a, b = of_hyperflow(one), of_hyperflow(other)
    found = [mean_ci95([a[d][i] - b[d][i] for i in sorted(a[d].keys() & b[d].keys())]) for d in sorted(a)]
    return over_domains([mean for mean, _ in found], [half for _, half in found])


def result(name: str, adapter: Path, benchmark: Path, first: Path) -> dict:
    """A row of the table; differences are paired, means over the domains, with their 95 % half-widths."""
    record = json.loads((adapter / TRAINING_RECORD).read_text())
    found = json.loads((benchmark / RESULTS).read_text())
    gain = next(m for m in found["means"] if m["method"] == "hyperflow")
    flow = next(m for m in found["hyperflow_against"] if m["method"] == "metric" and m["domain"] is None)
    difference, half = paired(benchmark, first)
    return {
        "variant": name,
        "gain": gain["diff_vs_direct"],
        "gain_ci95": gain["diff_ci95"],
        "gain_of_the_flow": flow["diff"],
        "gain_of_the_flow_ci95": flow["diff_ci95"],
        "against_the_first": difference,
        "against_the_first_ci95": half,
        "n_episodes": gain["diff_n_episodes"],
        "training_minutes": round(sum(phase["seconds"] for phase in record["phases"].values()) / 60, 1),
        "arguments": record["arguments"],
    }


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    minus_first = f"minus {rows[0]['variant']}"
    heads = ["variant", "gain over direct transfer", "of it the flow", minus_first, "minutes of training"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        gain = f"{row['gain']:+.2f} ± {row['gain_ci95']:.2f}"
        flow = f"{row['gain_of_the_flow']:+.2f} ± {row['gain_of_the_flow_ci95']:.2f}"
        minus = f"{row['against_the_first']:+.2f} ± {row['against_the_first_ci95']:.2f}" if row is not rows[0] else ""
        lines.append(f"| {row['variant']} | {gain} | {flow} | {minus} | {row['training_minutes']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    a = parse(Arguments)
    output, rows, first = Path(a.output_dir), [], None
    for name, more in variants(a).items():
        folder = output / name.replace(",", "").replace(" ", "-")
        adapter, benchmark = folder / "adapter", folder / "benchmark"
        if not (adapter / TRAINING_RECORD).is_file():
            run(
                {},
                f"{name}: training",
                *("train_drift.py", "--backbone", a.backbone, "--steps", a.steps, "--validate_every", a.steps),
                *("--learning_rate", a.learning_rate),
                *([] if "--dataset" in more else ["--dataset", *a.dataset]),
                *(["--holdout", *a.holdout] if a.holdout else []),
                *(*more, "--checkpointing_steps", 50, "--resume_from_checkpoint", "latest", "--output_dir", adapter),
            )
        run(
            {},
            f"{name}: benchmark",
            *("benchmark.py", "--backbone", a.backbone, "--adapter", adapter, "--dataset", *a.unseen, "--bf16"),
            *("--methods", "direct,metric,hyperflow", "--n_shot", a.n_shot, "--n_episodes", a.n_episodes),
            *("--flow_episodes", 0, "--output_dir", benchmark),
        )
        first = first or benchmark
        rows.append(result(name, adapter, benchmark, first))
        write_json(output / "ablations.json", rows)
        with replaced(output / "ablations.md") as draft:
            draft.write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
