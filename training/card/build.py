"""Measure everything that the card of an adapter says, and write it into the card.

    python training/card.py --backbone model_cards/vit-s14-focus-70 --adapter model_cards/hyperflow-vit-s14-70 \
        --dataset TRAINING_DOMAIN [...] --tuning TRAINING_DOMAIN [...] --unseen FILE_OR_HUB_ID [...] \
        --trajectories FOLDER --output_dir outputs/card --card model_cards/hyperflow-vit-s14-70/README.md README.md

Runs the scripts of this folder one after another, each shown as it could be typed: recipes of the baselines, the
benchmark without and with fine-tuning by gradients, what the flow reads, costs, bill and ablations. Interrupted, the
same command goes on where it was. What was found is copied to `results/` beside the adapter; in each card the tables
between `<!-- table: NAME -->` and `<!-- end -->` are written anew, and the adapter's own card gets its model-index.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from hf_hyperflow.arguments import parse
from hf_hyperflow.benchmark.episode_log import EPISODES
from hf_hyperflow.benchmark.runner import RESULTS
from hf_hyperflow.modeling.model_card import CARD
from hf_hyperflow.modeling.saving import atomic_file

from .stages import run
from .tables import filled, tables, with_model_index

#: What the tables are made of, by the names that `tables` knows them by.
FILES = {
    "results": "results.json",
    "fine_tuning": "fine_tuning.json",
    "conditioning": "conditioning.json",
    "conditioning_training": "conditioning_training.json",
    "cost": "cost.json",
    "bill": "bill.json",
    "recipes": "recipes.json",
    "ablations": "ablations.json",
}
#: Every episode of the benchmark with fine-tuning, which takes longest.
FINE_TUNING_EPISODES = "fine_tuning.parquet"
#: Figures by the benchmark that draws them: of many episodes, and of all methods on the same few.
FIGURES = {"benchmark": ("gain.png", "shots.png"), "fine-tuning": ("accuracy_cost.png", "flow.png")}
#: Methods and numbers of shots of the benchmark without gradients, then of those with.
FORWARD = (("direct,metric,head,hyperflow,easyfsl", (1, 5, 20)),)
GRADIENT = (
    ("direct,metric,head,hyperflow,hyperflow-guard", (1, 5, 20)),
    ("direct,hyperflow,bias", (1, 5, 20)),
    ("direct,hyperflow,lora,layernorm,full", (5,)),
)


@dataclass
class Arguments:
    backbone: str = field(metadata={"help": "folder of the target"})
    adapter: str = field(metadata={"help": "folder of the adapter; its results go to `results/` in it"})
    dataset: list[str] = field(metadata={"help": "the domains it was trained on"})
    tuning: list[str] = field(metadata={"help": "those of them that the baselines' recipes are chosen on"})
    unseen: list[str] = field(metadata={"help": "domains to report on; nothing is chosen on them"})
    output_dir: str = field(metadata={"help": "folder for everything that is made on the way"})
    card: list[str] = field(metadata={"help": "Markdown files whose tables are written anew"})
    holdout: list[str] = field(default_factory=list, metadata={"help": "as for train_drift.py, for the ablations"})
    trajectories: list[str] = field(default_factory=list, metadata={"help": "recordings, for the ablations"})
    n_episodes: int = field(default=600, metadata={"help": "episodes of each unseen domain and number of shots"})
    max_episodes_gradient: int = field(default=60, metadata={"help": "of them with fine-tuning by gradients"})
    max_steps: int = field(default=100, metadata={"help": "of fine-tuning by gradients; less where time is short"})
    tuning_episodes: int = field(default=2, metadata={"help": "episodes of each domain that recipes are chosen on"})
    variants: list[str] = field(default_factory=list, metadata={"help": "ablations of these names only; default: all"})
    ablation_steps: int = field(default=300, metadata={"help": "optimiser steps of each ablation's training"})
    ablation_episodes: int = field(default=200, metadata={"help": "episodes of each unseen domain, per ablation"})


def measure(a: Arguments, output: Path) -> None:
    """All stages; what is there is not done again."""
    pair = ["--backbone", a.backbone, "--adapter", a.adapter]
    run(
        {},
        "Hyperparameters of the baselines, on training domains",
        *("grid_search.py", *pair, "--dataset", *a.tuning, "--n_episodes", a.tuning_episodes),
        *("--max_steps", a.max_steps, "--output", output / FILES["recipes"]),
    )
    few = min(a.max_episodes_gradient, a.n_episodes)
    stages = [("benchmark", *stage, a.n_episodes, 0) for stage in FORWARD]
    stages += [("fine-tuning", *stage, few, few) for stage in GRADIENT]
    for folder, methods, shots, n_episodes, flow_episodes in stages:
        run(
            {},
            f"Benchmark: {methods}",
            *("benchmark.py", *pair, "--dataset", *a.unseen, "--methods", methods, "--n_shot", *shots),
            *("--n_episodes", n_episodes, "--max_episodes_gradient", few, "--flow_episodes", flow_episodes),
            *("--recipes", output / FILES["recipes"], "--output_dir", output / folder),
        )
    for name, domains in (("conditioning", a.unseen), ("conditioning_training", a.tuning)):
        if not (output / FILES[name]).is_file():
            run(
                {},
                "What the flow reads",
                *("conditioning.py", *pair, "--dataset", *a.dataset, "--unseen", *domains, "--n_episodes", few),
                *("--output", output / FILES[name]),
            )
    if not (output / FILES["cost"]).is_file():
        run({}, "Costs", "benchmark_cost.py", *pair, "--output", output / FILES["cost"])
    # Of a backbone that somebody else made there is no record to list.
    known = ["--backbone", a.backbone] if Path(a.backbone, "pretraining.json").is_file() else []
    bill = ["bill.py", "--adapter", a.adapter, *known, "--cost", output / FILES["cost"]]
    run({}, "Bill", *bill, "--output", output / FILES["bill"])
    run(
        {},
        "Ablations",
        *("ablations.py", "--backbone", a.backbone, "--dataset", *a.dataset, "--unseen", *a.unseen),
        *(["--holdout", *a.holdout] if a.holdout else []),
        *(["--trajectories", *a.trajectories] if a.trajectories else []),
        *(["--variants", *a.variants] if a.variants else []),
        *("--steps", a.ablation_steps, "--n_episodes", a.ablation_episodes, "--output_dir", output / "ablations"),
    )


def collect(output: Path, results: Path) -> None:
    """Copy what the card needs beside the adapter."""
    results.mkdir(exist_ok=True)
    sources = {name: output / folder / name for folder, names in FIGURES.items() for name in names}
    sources |= {name: output / name for name in FILES.values()}
    sources[FILES["results"]] = output / "benchmark" / RESULTS
    sources[FILES["fine_tuning"]] = output / "fine-tuning" / RESULTS
    sources[FINE_TUNING_EPISODES] = output / "fine-tuning" / EPISODES
    sources[FILES["ablations"]] = output / "ablations" / FILES["ablations"]
    for name, source in sources.items():
        with atomic_file(results / name) as draft:
            shutil.copy(source, draft)


def read(results: Path) -> dict[str, dict | list]:
    """What `tables` needs, from the files beside an adapter that are there."""
    there = {name: results / file for name, file in FILES.items() if (results / file).is_file()}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in there.items()}


def write_cards(cards: list[Path], adapter: Path, found: dict[str, dict | list]) -> None:
    """Write the tables into all cards, and the model-index into the adapter's own."""
    by_name = tables(found)
    for card in cards:
        text = filled(card.read_text(encoding="utf-8"), by_name)
        if card.resolve() == (adapter / CARD).resolve():
            text = with_model_index(text, found["results"], adapter.resolve().name)
        with atomic_file(card) as draft:
            draft.write_text(text, encoding="utf-8")


def main() -> None:
    a = parse(Arguments)
    output, results = Path(a.output_dir), Path(a.adapter, "results")
    output.mkdir(parents=True, exist_ok=True)
    measure(a, output)
    collect(output, results)
    write_cards([Path(card) for card in a.card], Path(a.adapter), read(results))


if __name__ == "__main__":
    main()
