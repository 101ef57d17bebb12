"""The whole pipeline in one command: `make train-demo`.

    python training/train_demo.py [--dataset FILE_OR_HUB_ID [...] --unseen FILE_OR_HUB_ID [...]]

Runs the scripts of this folder one after another: images (`demo_data.py`, where none are given), trajectories of a
teacher, the training of a flow on them and beyond them, the check that it goes where the teacher went, and the
benchmark on domains it has not seen. Every command is shown as it could be typed. Interrupted, the same command goes
on where it was.
"""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path

from hf_hyperflow.arguments import parse

from ..card.stages import HERE, run

BACKBONE = HERE.parent / "model_cards" / "vit-s14-focus-70"
#: The baseline of the benchmark does what the teacher of the trajectories does.
TEACHER_STEPS, TEACHER_LEARNING_RATE = 12, 1e-3


@dataclass
class Arguments:
    dataset: list[str] = field(
        default_factory=list, metadata={"help": "domains to train on; default: scripts drawn by demo_data.py"}
    )
    unseen: list[str] = field(
        default_factory=list, metadata={"help": "domains to report on; default: two more scripts and digits"}
    )
    backbone: str = field(default=str(BACKBONE), metadata={"help": "the target: Hub id or folder"})
    output_dir: str = field(default="outputs/demo", metadata={"help": "folder for everything that is made"})
    max_classes: int = field(default=24, metadata={"help": "characters of each script that are drawn"})
    n_trajectories: int = field(default=24, metadata={"help": "few-shot tasks that the teacher fine-tunes"})
    n_unseen: int = field(
        default=8, metadata={"help": "the same of unseen domains, for the report alone; of both it takes so many"}
    )
    matching_steps: int = field(default=60, metadata={"help": "optimiser steps that match the trajectories"})
    annealing_steps: int = field(default=10, metadata={"help": "steps of both objectives"})
    task_steps: int = field(default=30, metadata={"help": "steps of the task objective"})
    n_episodes: int = field(default=15, metadata={"help": "5-way 5-shot episodes of each unseen domain"})
    gradient_episodes: int = field(default=3, metadata={"help": "of them also with fine-tuning by gradients"})

    def __post_init__(self) -> None:
        if bool(self.dataset) != bool(self.unseen):
            raise SystemExit("error: give both --dataset (to train on) and --unseen (to report on), or neither.")


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def summary(output: Path) -> str:
    """What was made, where it is and what came out, from the files that the stages wrote."""
    recorded = read(output / "trajectories" / "collection.json")["totals"]
    correct = recorded["query_accuracy"]
    phases = read(output / "adapter" / "training.json")["phases"]
    steps = ", ".join(f"{name} {phase['runs']} in {phase['seconds']:.0f} s" for name, phase in phases.items())
    lines = [
        f"{output / 'trajectories'}: {recorded['rows']} fine-tuned tasks, {recorded['diverged']} of them diverged; of "
        f"their queries {correct['start']} % right before, {correct['end']} % after",
        f"{output / 'adapter'}: the trained flow ({steps})",
        f"{output / 'report'}: how near the flow comes to where the teacher went. 0 is its endpoint, 1 is not to move:",
    ]
    for record in read(output / "report" / "integration.json")["arrival"]:
        distance, ci95 = record["distance"], record["distance_ci95"]
        lines.append(f"    {record['tasks']:12} {distance:.2f} ± {ci95:.2f}   ({record['n_tasks']} tasks)")
    lines.append(f"{output / 'benchmark'}: domains that nothing was trained on, 5-way 5-shot, accuracy in %:")
    for record in read(output / "benchmark" / "results.json")["records"]:
        line = f"    {record['domain']:12} {record['method']:12} {record['accuracy']:5.1f} ± {record['ci95']:<4.1f}"
        if record["diff_vs_direct"] is not None:
            line += f" {record['diff_vs_direct']:+5.1f} ± {record['diff_ci95']:<4.1f} against direct"
        lines.append(f"{line} ({record['n_episodes']} episodes, {record['seconds_per_task']:.2f} s a task)")
    return "\n".join(lines)


def main() -> None:
    a = parse(Arguments)
    output, started = Path(a.output_dir), time.monotonic()
    training, unseen, short = a.dataset, a.unseen, {}
    if not training:
        run(
            short,
            "Images: the scripts of Matplotlib's fonts, scikit-learn's digits",
            *("demo_data.py", "--output_dir", output / "data", "--max_classes", a.max_classes),
        )
        parts = [output / "data" / part for part in ("train", "unseen")]
        training, unseen = (sorted(map(str, part.glob("*.parquet"))) for part in parts)
        short = {shlex.join(training): f"{parts[0]}/*.parquet", shlex.join(unseen): f"{parts[1]}/*.parquet"}
    backbone = ["--backbone", a.backbone]
    teacher = ["--teacher_steps", TEACHER_STEPS, "--learning_rate", TEACHER_LEARNING_RATE, "--group_size", 4]
    trajectories, others, adapter = (output / name for name in ("trajectories", "trajectories-unseen", "adapter"))
    collect = ["collect_trajectories.py", *backbone, *teacher]
    run(
        short,
        "Trajectories: how a teacher fine-tunes the backbone on few-shot tasks",
        *(*collect, "--dataset", *training, "--n_trajectories", a.n_trajectories, "--output_dir", trajectories),
    )
    run(
        short,
        "The flow: first it learns to follow the teacher, then to classify",
        *("train_drift.py", *backbone, "--dataset", *training, "--trajectories", trajectories),
        *("--matching_steps", a.matching_steps, "--matching_batch_size", 16, "--annealing_steps", a.annealing_steps),
        *("--steps", a.matching_steps + a.annealing_steps + a.task_steps, "--warmup_steps", 10),
        *("--metric_tasks", 32, "--checkpointing_steps", 20, "--resume_from_checkpoint", "latest"),
        *("--output_dir", adapter),
    )
    run(
        short,
        "Trajectories of unseen domains, to compare with",
        *(*collect, "--dataset", *unseen, "--n_trajectories", a.n_unseen, "--output_dir", others),
    )
    run(
        short,
        "Report: does the flow go where the teacher goes?",
        *("integration_report.py", *backbone, "--adapter", f"demo={adapter}", "--trajectories", trajectories),
        *("--unseen", others, "--dataset", *training, *unseen, "--output_dir", output / "report"),
        *("--n_tasks", a.n_unseen, "--solver_tasks", 2),
    )
    recipes = output / "recipes.json"
    settings = {"steps": TEACHER_STEPS, "learning_rate": TEACHER_LEARNING_RATE}
    recipes.write_text(json.dumps({"recipes": {"bias": settings}}))
    run(
        short,
        "Benchmark: unseen domains, against no adaptation and against the teacher",
        *("benchmark.py", *backbone, "--adapter", adapter, "--dataset", *unseen, "--n_shot", 5),
        *("--methods", "direct,hyperflow,bias", "--n_episodes", a.n_episodes),
        *("--max_episodes_gradient", a.gradient_episodes, "--recipes", recipes),
        *("--output_dir", output / "benchmark"),
    )
    print(f"\n=== What there is now, after {(time.monotonic() - started) / 60:.1f} minutes\n{summary(output)}")


if __name__ == "__main__":
    main()
