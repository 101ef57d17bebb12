"""The whole pipeline in one command: `make train-demo`.

    python -m training.demo.run [--dataset FILE_OR_HUB_ID [...] --unseen FILE_OR_HUB_ID [...]]

Runs one stage after another: images (`training.demo.images`, unless some are given), trajectories of a teacher, the
training of a flow on them and beyond them, a report on whether the flow goes where the teacher went, and the benchmark
on domains that nothing was trained on. Every command is shown as it could be typed. An interrupted demo goes on where
it was when the same command is run again.
"""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_hyperflow.arguments import parse

from ..card.stages import run

BACKBONE = Path(__file__).resolve().parents[2] / "model_cards" / "vit-s14-focus-70"
#: The teacher of the trajectories; the baseline of the benchmark does the same.
TEACHER_STEPS, TEACHER_LEARNING_RATE = 12, 1e-3


@dataclass
class Arguments:
    dataset: list[str] = field(
        default_factory=list, metadata={"help": "domains to train on; default: scripts drawn by training.demo.images"}
    )
    unseen: list[str] = field(
        default_factory=list, metadata={"help": "domains to report on; default: two more scripts and digits"}
    )
    backbone: str = field(default=str(BACKBONE), metadata={"help": "the target: Hub id or folder"})
    output_dir: str = field(default="outputs/demo", metadata={"help": "folder for everything that is made"})
    max_classes: int = field(default=24, metadata={"help": "characters of each script that are drawn"})
    n_trajectories: int = field(default=24, metadata={"help": "few-shot tasks that the teacher fine-tunes"})
    n_unseen: int = field(
        default=8, metadata={"help": "tasks of unseen domains, for the report; it takes as many of the others"}
    )
    matching_steps: int = field(default=60, metadata={"help": "optimiser steps of velocity matching"})
    annealing_steps: int = field(default=10, metadata={"help": "steps from velocity matching to the episodic loss"})
    episodic_steps: int = field(default=30, metadata={"help": "steps of the episodic loss alone"})
    n_episodes: int = field(default=15, metadata={"help": "5-way 5-shot episodes of each unseen domain"})
    gradient_episodes: int = field(default=3, metadata={"help": "how many of them are fine-tuned by gradients, too"})

    def __post_init__(self) -> None:
        if bool(self.dataset) != bool(self.unseen):
            raise SystemExit("error: give both --dataset (to train on) and --unseen (to report on), or neither.")


class Demo:
    """The stages of the demo, in the order in which they run."""

    def __init__(self, arguments: Arguments):
        self.arguments = arguments
        self.output = Path(arguments.output_dir)
        self.training, self.unseen = arguments.dataset, arguments.unseen
        self.abbreviations: dict[str, str] = {}

    def draw_images(self) -> None:
        """Draw the domains that were not given."""
        folder = self.output / "data"
        self._run(
            "Images: the scripts of Matplotlib's fonts, scikit-learn's digits",
            "training.demo.images",
            *("--output_dir", folder, "--max_classes", self.arguments.max_classes),
        )
        self.training = _find_files(folder / "train")
        self.unseen = _find_files(folder / "unseen")
        self.abbreviations[shlex.join(self.training)] = f"{folder / 'train'}/*.parquet"
        self.abbreviations[shlex.join(self.unseen)] = f"{folder / 'unseen'}/*.parquet"

    def collect_trajectories(self) -> None:
        self._collect(
            "Trajectories: how a teacher fine-tunes the backbone on few-shot tasks",
            self.training,
            self.arguments.n_trajectories,
            "trajectories",
        )

    def collect_unseen_trajectories(self) -> None:
        self._collect(
            "Trajectories of unseen domains, to compare with",
            self.unseen,
            self.arguments.n_unseen,
            "trajectories-unseen",
        )

    def _collect(self, title: str, domains: list[str], n_trajectories: int, folder: str) -> None:
        self._run(
            title,
            "training.collect_trajectories",
            *("--backbone", self.arguments.backbone, "--dataset", *domains),
            *("--teacher_steps", TEACHER_STEPS, "--learning_rate", TEACHER_LEARNING_RATE, "--group_size", 4),
            *("--n_trajectories", n_trajectories, "--output_dir", self.output / folder),
        )

    def train(self) -> None:
        a = self.arguments
        self._run(
            "The flow: first it learns to follow the teacher, then to classify",
            "training.train_drift",
            *("--backbone", a.backbone, "--dataset", *self.training, "--trajectories", self.output / "trajectories"),
            *("--matching_steps", a.matching_steps, "--matching_batch_size", 16),
            *("--annealing_steps", a.annealing_steps),
            *("--steps", a.matching_steps + a.annealing_steps + a.episodic_steps, "--warmup_steps", 10),
            *("--lda_tasks", 32, "--checkpointing_steps", 20, "--resume_from_checkpoint", "latest"),
            *("--output_dir", self.output / "adapter"),
        )

    def report(self) -> None:
        self._run(
            "Report: does the flow go where the teacher goes?",
            "training.card.integration_report",
            *("--backbone", self.arguments.backbone, "--adapter", f"demo={self.output / 'adapter'}"),
            *("--trajectories", self.output / "trajectories", "--unseen", self.output / "trajectories-unseen"),
            *("--dataset", *self.training, *self.unseen, "--output_dir", self.output / "report"),
            *("--n_tasks", self.arguments.n_unseen, "--solver_tasks", 2),
        )

    def benchmark(self) -> None:
        a = self.arguments
        path = self.output / "hyperparameters.json"
        settings = {"steps": TEACHER_STEPS, "learning_rate": TEACHER_LEARNING_RATE}
        path.write_text(json.dumps({"hyperparameters": {"bias": settings}}))
        self._run(
            "Benchmark: unseen domains, against no adaptation and against the teacher",
            "hf_hyperflow",
            *("benchmark", "--backbone", a.backbone, "--adapter", self.output / "adapter"),
            *("--dataset", *self.unseen, "--n_shot", 5, "--methods", "direct,hyperflow,bias"),
            *("--n_episodes", a.n_episodes, "--max_episodes_gradient", a.gradient_episodes),
            *("--hyperparameters", path, "--output_dir", self.output / "benchmark"),
        )

    def _run(self, title: str, module: str, *options: object) -> None:
        run(title, module, *options, abbreviations=self.abbreviations)


def _find_files(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.glob("*.parquet"))


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def format_summary(output: Path) -> str:
    """What was made, where it is and how well it does, from the files that the stages wrote."""
    totals = read_json(output / "trajectories" / "collection.json")["totals"]
    correct = totals["query_accuracy"]
    phases = read_json(output / "adapter" / "training.json")["phases"]
    steps = ", ".join(f"{name} {phase['runs']} in {phase['seconds']:.0f} s" for name, phase in phases.items())
    lines = [
        f"{output / 'trajectories'}: {totals['rows']} fine-tuned tasks, {totals['diverged']} of them diverged; of "
        f"their queries {correct['start']} % right before, {correct['end']} % after",
        f"{output / 'adapter'}: the trained flow ({steps})",
        f"{output / 'report'}: distance of the flow's end to the teacher's, from 0 (arrived) to 1 (not moved):",
    ]
    for record in read_json(output / "report" / "integration.json")["arrival"]:
        distance, ci95 = record["distance"], record["distance_ci95"]
        lines.append(f"    {record['tasks']:12} {distance:.2f} ± {ci95:.2f}   ({record['n_tasks']} tasks)")
    lines.append(f"{output / 'benchmark'}: domains that nothing was trained on, 5-way 5-shot, accuracy in %:")
    for record in read_json(output / "benchmark" / "results.json")["records"]:
        line = f"    {record['domain']:12} {record['method']:12} {record['accuracy']:5.1f} ± {record['ci95']:<4.1f}"
        if record["diff_vs_direct"] is not None:
            line += f" {record['diff_vs_direct']:+5.1f} ± {record['diff_ci95']:<4.1f} against direct"
        lines.append(f"{line} ({record['n_episodes']} episodes, {record['seconds_per_task']:.2f} s a task)")
    return "\n".join(lines)


def main() -> None:
    arguments, started = parse(Arguments), time.monotonic()
    demo = Demo(arguments)
    if not arguments.dataset:
        demo.draw_images()
    demo.collect_trajectories()
    demo.train()
    demo.collect_unseen_trajectories()
    demo.report()
    demo.benchmark()
    minutes = (time.monotonic() - started) / 60
    print(f"\n=== The demo is complete, after {minutes:.1f} minutes\n{format_summary(demo.output)}")


if __name__ == "__main__":
    main()
