"""Measure everything that the card of an adapter tells, and write it into the card and its report.

    python -m training.card.build --backbone model_cards/vit-s14-focus-70 --adapter model_cards/hyperflow-vit-s14-70 \
        --dataset TRAINING_DOMAIN [...] --tuning TRAINING_DOMAIN [...] --unseen FILE_OR_HUB_ID [...] \
        --trajectories FOLDER --output_dir outputs/card --card README.md model_cards/hyperflow-vit-s14-70/README.md \
        model_cards/hyperflow-vit-s14-70/results/REPORT.md

Runs one stage after another, each shown as it could be typed: hyper-parameters of the baselines, the benchmark without
and with fine-tuning by gradients, the quality of scores, unbalanced support sets, images of none of the classes,
conditioning, costs, offline cost and ablations. The adapter was calibrated before, by `training/calibrate.py`. An
interrupted run goes on where it was when the same command is run again. The results are copied to `results/` beside the
adapter. In each card the tables between `<!-- table: NAME -->` and `<!-- end -->` are written anew, and the adapter's
own card gets its model-index.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_hyperflow.arguments import parse
from hf_hyperflow.benchmark.bench.run import FILE
from hf_hyperflow.benchmark.bench.subjects import OWN
from hf_hyperflow.benchmark.episode_log import EPISODES
from hf_hyperflow.benchmark.runner import RESULTS
from hf_hyperflow.modeling.atomic_file import atomic_file
from hf_hyperflow.modeling.model_card import CARD

from .cost_tables import N_IMAGES
from .stages import run
from .tables import add_model_index, fill_tables, make_tables

#: The files that tables are made of, by the names that `make_tables` knows them by.
FILES = {
    "results": "results.json",
    "fine_tuning": "fine_tuning.json",
    "conditioning": "conditioning.json",
    "conditioning_training": "conditioning_training.json",
    "conditioning_many_classes": "conditioning_many_classes.json",
    "conditioning_unbalanced": "conditioning_unbalanced.json",
    "cost": "cost.json",
    "offline_cost": "offline_cost.json",
    "hyperparameters": "hyperparameters.json",
    "ablations": "ablations.json",
    "scores": "scores.json",
    "unbalanced": "unbalanced.json",
    "many_classes": "many_classes.json",
    "meta_dataset": "meta_dataset.json",
    "unknown": "unknown.json",
}
#: Every episode of the benchmark with fine-tuning, which takes longest.
FINE_TUNING_EPISODES = "fine_tuning.parquet"
#: Folders of the benchmarks of many episodes and of all methods on the same few, and of the quality of scores.
BENCHMARK, FINE_TUNING, SCORES = "benchmark", "fine-tuning", "scores"
#: Folders of those of other tasks than five classes with equally many images.
UNBALANCED, MANY_CLASSES, META_DATASET = "unbalanced", "many-classes", "meta-dataset"
#: Folders of the measurement of "none of these" and of the costs.
UNKNOWN, BENCH = "unknown", "bench"
#: Figures by the folder of the stage that draws them.
FIGURES = {
    BENCHMARK: ("gain.png", "shots.png"),
    FINE_TUNING: ("accuracy_cost.png", "flow.png"),
    UNKNOWN: ("unknown.png",),
}
#: Options of the benchmark and of the conditioning test that choose the episodes.
FIVE_CLASSES = ("--n_shot", 1, 5, 20)
FIVE_SHOTS = ("--n_shot", 5)
TWENTY_CLASSES = ("--n_way", 20, "--n_shot", 5)
UNEQUAL_CLASSES = ("--protocol", "unbalanced")
VARIABLE = ("--protocol", "meta-dataset")
#: Methods of the benchmarks of scores.
SCORED_METHODS = "direct,no-flow,hyperflow"
#: Methods of the benchmark without gradients, then those and the episodes of the one with.
FORWARD_METHODS = "direct,no-flow,logistic,hyperflow,easyfsl"
GRADIENT: tuple[tuple[str, tuple[object, ...]], ...] = (
    ("direct,no-flow,logistic,hyperflow,hyperflow-early-stopping", FIVE_CLASSES),
    ("direct,hyperflow,bias", FIVE_CLASSES),
    ("direct,hyperflow,lora,layernorm,full", FIVE_SHOTS),
)


@dataclass
class Arguments:
    backbone: str = field(metadata={"help": "folder of the target"})
    adapter: str = field(metadata={"help": "folder of the adapter; its results go to `results/` in it"})
    dataset: list[str] = field(metadata={"help": "the domains it was trained on"})
    tuning: list[str] = field(metadata={"help": "those that the baselines' hyper-parameters are chosen on"})
    unseen: list[str] = field(metadata={"help": "domains to report on; nothing is chosen on them"})
    output_dir: str = field(metadata={"help": "folder for everything that is made on the way"})
    card: list[str] = field(metadata={"help": "Markdown files whose tables are written anew"})
    holdout: list[str] = field(default_factory=list, metadata={"help": "as for train_drift.py, for the ablations"})
    trajectories: list[str] = field(default_factory=list, metadata={"help": "recordings, for the ablations"})
    n_episodes: int = field(default=600, metadata={"help": "episodes of each unseen domain and number of shots"})
    max_episodes_gradient: int = field(default=60, metadata={"help": "how many of them are fine-tuned by gradients"})
    max_steps: int = field(default=100, metadata={"help": "of fine-tuning by gradients; less where time is short"})
    tuning_episodes: int = field(default=2, metadata={"help": "episodes of each domain for the grid search"})
    variants: list[str] = field(default_factory=list, metadata={"help": "ablations of these names only; default: all"})
    ablation_steps: int = field(default=300, metadata={"help": "optimiser steps of each ablation's training"})
    ablation_episodes: int = field(default=200, metadata={"help": "episodes of each unseen domain, per ablation"})


class Build:
    """The stages of a card, in the order in which they run. What is there is not measured again."""

    def __init__(self, arguments: Arguments):
        self.arguments = arguments
        self.output = Path(arguments.output_dir)
        self.pair = ["--backbone", arguments.backbone, "--adapter", arguments.adapter]
        self.n_gradient_episodes = min(arguments.max_episodes_gradient, arguments.n_episodes)

    def measure(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        few, many = self.n_gradient_episodes, self.arguments.n_episodes
        self.choose_hyperparameters()
        self.benchmark(BENCHMARK, FORWARD_METHODS, FIVE_CLASSES, many, flow_episodes=0)
        for methods, episodes in GRADIENT:
            self.benchmark(FINE_TUNING, methods, episodes, few, flow_episodes=few)
        self.benchmark(SCORES, SCORED_METHODS, FIVE_CLASSES, few, flow_episodes=0)
        self.benchmark(UNBALANCED, SCORED_METHODS, UNEQUAL_CLASSES, few, flow_episodes=0)
        self.benchmark(MANY_CLASSES, SCORED_METHODS, TWENTY_CLASSES, few, flow_episodes=0)
        self.benchmark(META_DATASET, SCORED_METHODS, VARIABLE, many, flow_episodes=0)
        self.measure_unknown()
        self.measure_conditioning("conditioning", self.arguments.unseen)
        self.measure_conditioning("conditioning_training", self.arguments.tuning)
        self.measure_conditioning("conditioning_many_classes", self.arguments.unseen, *TWENTY_CLASSES)
        self.measure_conditioning("conditioning_unbalanced", self.arguments.unseen, *UNEQUAL_CLASSES)
        self.measure_costs()
        self.measure_offline_cost()
        self.run_ablations()

    def path(self, name: str) -> Path:
        """Where the stages write one of `FILES`."""
        return self.output / FILES[name]

    def choose_hyperparameters(self) -> None:
        options: list[object] = [*self.pair, "--dataset", *self.arguments.tuning]
        options += ["--n_episodes", self.arguments.tuning_episodes, "--max_steps", self.arguments.max_steps]
        options += ["--output_file", self.path("hyperparameters")]
        run("Hyper-parameters of the baselines, on training domains", "training.card.grid_search", *options)

    def benchmark(
        self, folder: str, methods: str, episodes: tuple[object, ...], n_episodes: int, flow_episodes: int
    ) -> None:
        """Run a benchmark.

        Args:
            episodes: the options that choose them.
        """
        options: list[object] = [*self.pair, "--dataset", *self.arguments.unseen, "--methods", methods, *episodes]
        options += ["--n_episodes", n_episodes]
        options += ["--max_episodes_gradient", self.n_gradient_episodes, "--flow_episodes", flow_episodes]
        options += ["--hyperparameters", self.path("hyperparameters"), "--output_dir", self.output / folder]
        run(f"Benchmark: {methods}", "hf_hyperflow", "benchmark", *options)

    def measure_unknown(self) -> None:
        if (self.output / UNKNOWN / FILES["unknown"]).is_file():
            return
        options: list[object] = [*self.pair, "--unseen", *self.arguments.unseen]
        options += ["--n_episodes", self.n_gradient_episodes, "--output_dir", self.output / UNKNOWN]
        run("Images of none of the classes", "training.card.unknown", *options)

    def measure_conditioning(self, name: str, domains: list[str], *episodes: object) -> None:
        if self.path(name).is_file():
            return
        options: list[object] = [*self.pair, "--dataset", *self.arguments.dataset, "--unseen", *domains]
        options += [*episodes, "--n_episodes", self.n_gradient_episodes, "--output_file", self.path(name)]
        run("Conditioning: does the flow read its support set?", "training.card.conditioning", *options)

    def measure_costs(self) -> None:
        if self.path("cost").is_file():
            return
        options: list[object] = [*self.pair, "--backbones", OWN, f"{OWN}@224", "--images", N_IMAGES]
        run("Costs", "hf_hyperflow", "bench", *options, "--output_dir", self.output / BENCH)
        shutil.copy(self.output / BENCH / FILE, self.path("cost"))

    def measure_offline_cost(self) -> None:
        options: list[object] = ["--adapter", self.arguments.adapter, "--cost", self.path("cost")]
        # A backbone that somebody else made has no record of its training.
        if Path(self.arguments.backbone, "pretraining.json").is_file():
            options += ["--backbone", self.arguments.backbone]
        run("Offline cost", "training.card.break_even", *options, "--output_file", self.path("offline_cost"))

    def run_ablations(self) -> None:
        a = self.arguments
        options: list[object] = ["--backbone", a.backbone, "--dataset", *a.dataset, "--unseen", *a.unseen]
        for flag, values in (("--holdout", a.holdout), ("--trajectories", a.trajectories), ("--variants", a.variants)):
            if values:
                options += [flag, *values]
        options += ["--steps", a.ablation_steps, "--n_episodes", a.ablation_episodes]
        run("Ablations", "training.card.ablations", *options, "--output_dir", self.output / "ablations")

    def collect(self, results: Path) -> None:
        """Copy what the cards need to the folder `results`."""
        results.mkdir(exist_ok=True)
        sources = {FILES[name]: self.path(name) for name in FILES}
        for name, folder in (
            ("results", BENCHMARK),
            ("fine_tuning", FINE_TUNING),
            ("scores", SCORES),
            ("unbalanced", UNBALANCED),
            ("many_classes", MANY_CLASSES),
            ("meta_dataset", META_DATASET),
        ):
            sources[FILES[name]] = self.output / folder / RESULTS
        sources[FILES["unknown"]] = self.output / UNKNOWN / FILES["unknown"]
        sources[FINE_TUNING_EPISODES] = self.output / FINE_TUNING / EPISODES
        sources[FILES["ablations"]] = self.output / "ablations" / FILES["ablations"]
        for folder, names in FIGURES.items():
            for name in names:
                sources[name] = self.output / folder / name
        for name, source in sources.items():
            with atomic_file(results / name) as draft:
                shutil.copy(source, draft)


def read_results(results: Path) -> dict[str, Any]:
    """The content of those `FILES` that are in a folder, by name."""
    contents = {}
    for name, file in FILES.items():
        path = results / file
        if path.is_file():
            contents[name] = json.loads(path.read_text(encoding="utf-8"))
    return contents


def write_cards(cards: list[Path], adapter: Path, contents: dict[str, Any]) -> None:
    """Write the tables into all cards, and the model-index into the adapter's own.

    Raises:
        ValueError: a card asks for a table that there is not.
    """
    tables = make_tables(contents)
    for card in cards:
        text = fill_tables(card.read_text(encoding="utf-8"), tables)
        if card.resolve() == (adapter / CARD).resolve():
            text = add_model_index(text, contents["results"], adapter.resolve().name)
        with atomic_file(card) as draft:
            draft.write_text(text, encoding="utf-8")


def main() -> None:
    arguments = parse(Arguments)
    build = Build(arguments)
    build.measure()
    adapter = Path(arguments.adapter)
    build.collect(adapter / "results")
    write_cards([Path(card) for card in arguments.card], adapter, read_results(adapter / "results"))


if __name__ == "__main__":
    main()
