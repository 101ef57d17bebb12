"""Does the flow arrive where the teacher went? A report on trained adapters: JSON and figures.

    python training/integration_report.py --backbone BACKBONE --adapter L=adapter-linear C=adapter-cubic \
        --trajectories trajectories --unseen trajectories-unseen --dataset FILE_OR_HUB_ID [...] --output_dir report

`--trajectories` are what the adapters were matched to, `--unseen` are tasks that they were not: a collection of
`collect_trajectories.py` with another `--seed`, or of domains kept apart. The recorded velocity that an adapter is
compared with is that of the path it was trained on. The report is in `integration.json`; `distance.png`, `cosine.png`,
`loss.png` and `solvers.png` are drawn from it, and a summary is printed.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.arguments import parse, short_name
from hf_hyperflow.data.domains import Domain
from hf_hyperflow.data.tasks import load_domains
from hf_hyperflow.finetuning.collection import COLLECTION, describe_space, read_collection
from hf_hyperflow.finetuning.trajectories import Trajectories, load_trajectories
from hf_hyperflow.modeling.fingerprint import compute_fingerprint
from hf_hyperflow.modeling.hub import fetch
from hf_hyperflow.modeling.saving import CheckpointError, exclusive, write_json
from hf_hyperflow.training.cost_log import hardware, versions
from hf_hyperflow.training.objectives import encode_recorded_support
from hf_hyperflow.training.precision import HELP, MixedPrecision, resolve_precision

from .integration import (
    Record,
    along_records,
    arrival_record,
    compare_solvers,
    follow,
    query_curves,
    some_of,
    some_rows,
    task_tokens,
    teacher_records,
    training_interpolant,
)
from .integration_figures import draw_integration


@dataclass
class Arguments:
    backbone: str = field(metadata={"help": "the target: Hub id or folder"})
    adapter: list[str] = field(metadata={"help": "NAME=FOLDER_OR_HUB_ID of each trained adapter"})
    trajectories: list[str] = field(metadata={"help": "the collections they were matched to: folders or Hub ids"})
    dataset: list[str] = field(metadata={"help": "the datasets that all collections were made from"})
    output_dir: str = field(metadata={"help": "folder for integration.json and the figures"})
    unseen: list[str] = field(default_factory=list, metadata={"help": "collections of tasks they were not matched to"})
    n_tasks: int = field(default=64, metadata={"help": "tasks of each collection, spread evenly over it"})
    solver_tasks: int = field(default=16, metadata={"help": "of them, those that all solvers are compared on"})
    mixed_precision: MixedPrecision = field(default="auto", metadata={"help": f"{HELP}; the drift is in float32"})
    cpu: bool = field(default=False, metadata={"help": "stay on the CPU also where there is a GPU"})

    def __post_init__(self) -> None:
        """Raises ValueError where the settings make no sense."""
        self.mixed_precision = resolve_precision(self.mixed_precision, cpu=self.cpu)
        if self.n_tasks < 2 or self.solver_tasks < 2:
            raise ValueError("--n_tasks and --solver_tasks must be at least 2: there is no interval of one task.")
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"--mixed_precision must be no or bf16, not {self.mixed_precision!r}.")
        names = [entry.partition("=")[0] for entry in self.adapter]
        wrong = [entry for entry in self.adapter if not all(entry.partition("="))]
        if wrong or len(set(names)) < len(names):
            raise ValueError(f"--adapter takes NAME=FOLDER_OR_HUB_ID with names of their own, not {self.adapter}.")


@dataclass(frozen=True)
class TaskSet:
    """Some tasks of a collection, and how the report calls them."""

    name: str
    recorded: Trajectories
    domains: list[Domain]


def load_adapters(entries: list[str], backbone: torch.nn.Module) -> dict[str, HyperFlowAdapter]:
    """The adapters by name, in single precision on the backbone's device.

    Raises:
        ValueError: they move other parameters than the first, or were trained for another backbone.
    """
    found: dict[str, HyperFlowAdapter] = {}
    expected = compute_fingerprint(backbone)
    for name, _, source in (entry.partition("=") for entry in entries):
        adapter = HyperFlowAdapter.from_pretrained(source).float().eval().to(backbone.device)
        adapter.split(backbone)  # of the same width and depth
        there = adapter.config.backbone["fingerprint"]
        if any(abs(a - b) > 0.01 * abs(a) for a, b in zip(there, expected, strict=True)):
            raise ValueError(f"adapter {name!r} was trained for a backbone of other weights: report it with its own.")
        first = next(iter(found.values()), adapter)
        if describe_space(adapter.space) != describe_space(first.space):
            raise ValueError(
                f"adapter {name!r} moves other parameters than the first one: make a report for each kind."
            )
        found[name] = adapter
    return found


class DomainStore:
    """The domains of collections, read as each was, those alike only once."""

    def __init__(self, sources: list[str], processor: object):
        self.sources, self.processor = sources, processor
        self._known: dict[tuple, list[Domain]] = {}

    def of(self, source: str, collection: dict) -> list[Domain]:
        """The domains that a collection was made from.

        Raises:
            ValueError: one is not among the datasets.
        """
        needed = [domain["name"] for domain in collection["domains"]]
        missing = sorted(set(needed) - {Path(s).stem for s in self.sources})
        if missing:
            raise ValueError(f"{source} was made from {needed}: give {missing} with --dataset, too.")
        holdout = [entry for entry in collection["arguments"]["holdout"] if entry.partition(":")[0] in needed]
        key = (*needed, *holdout, collection["arguments"]["max_per_class"])
        if key not in self._known:
            sources = [s for s in self.sources if Path(s).stem in needed]
            self._known[key], _ = load_domains(sources, self.processor, holdout=holdout, max_per_class=key[-1])
        return self._known[key]


def load_sets(arguments: Arguments, adapter: HyperFlowAdapter, processor: object) -> tuple[list[TaskSet], torch.Tensor]:
    """The tasks to report on, and the mean displacement `(n_tokens, token_dim)` of all training trajectories.

    Raises:
        ValueError, CheckpointError: a collection is of something else, too small or damaged.
    """
    store, sets, ends = DomainStore(arguments.dataset, processor), [], []
    for kind, sources in (("training", arguments.trajectories), ("unseen", arguments.unseen)):
        for source in sources:
            collection = read_collection(fetch(source, COLLECTION, repo_type="dataset"))
            domains = store.of(source, collection)
            expected = adapter.config.backbone["fingerprint"]
            recorded = load_trajectories(source, adapter.space, domains=domains, fingerprint=expected)
            if len(recorded) < 2:
                raise ValueError(f"{source} has {len(recorded)} usable trajectories: a report needs two or more.")
            name = kind if len(sources) == 1 else f"{kind}: {short_name(source)}"
            sets.append(TaskSet(name, some_of(recorded, arguments.n_tasks), domains))
            if kind == "training":
                ends.append(recorded.deltas[:, -1])
    return sets, torch.cat(ends).float().mean(dim=0)


def report_on(
    adapters: dict[str, HyperFlowAdapter],
    tasks: TaskSet,
    backbone: torch.nn.Module,
    mean_end: torch.Tensor,
    n_solver_tasks: int,
    autocast: AbstractContextManager,
    bar: tqdm,
) -> dict[str, list[Record]]:
    """The records of all adapters on one set of tasks."""
    recorded, few = tasks.recorded, some_of(tasks.recorded, n_solver_tasks)
    followed, solvers = {}, []
    for name, adapter in adapters.items():
        with autocast:
            support = encode_recorded_support(adapter, adapter.split(backbone), recorded, tasks.domains)
        path = training_interpolant(adapter)
        followed[name] = follow(adapter, task_tokens(adapter, support), recorded, path=path, mean_end=mean_end)
        some = task_tokens(adapter, [support[row] for row in some_rows(len(support), n_solver_tasks)])
        labels = {"adapter": name, "tasks": tasks.name, "n_tasks": len(few)}
        solvers += [labels | record for record in compare_solvers(adapter, some, few)]
        bar.update()
    first = next(iter(adapters.values()))
    with autocast:
        teacher, *curves = query_curves(
            first.split(backbone),
            first.space,
            first.processor,
            recorded,
            tasks.domains,
            [recorded.deltas, *(found.deltas for found in followed.values())],
        )
    bar.update()
    arrival, along = [], []
    for (name, found), curve in zip(followed.items(), curves, strict=True):
        labels = {"adapter": name, "tasks": tasks.name}
        arrival.append(labels | arrival_record(found, curve, teacher))
        along += [labels | record for record in along_records(found, curve)]
    reference = [{"tasks": tasks.name} | record for record in teacher_records(teacher, recorded.times)]
    return {"arrival": arrival, "along": along, "teacher": reference, "solvers": solvers}


def summary(report: dict[str, list[Record]]) -> str:
    """Markdown: where each adapter's flow arrives."""
    lines = [
        "| adapter | tasks | distance to the endpoint | from the teacher's start | of the mean displacement | "
        "moves after t = 1 | query loss | after t = 1 | teacher's | query accuracy | teacher's |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in report["arrival"]:
        cells = [
            f"{record[key]:{style}} ± {record[f'{key}_ci95']:{style.lstrip('+')}}"
            for key, style in {
                "distance": ".3f",
                "distance_from_start": ".3f",
                "distance_of_mean": ".3f",
                "drifted": ".3f",
                "loss_gain": "+.3f",
                "loss_after": "+.3f",
                "teacher_loss_gain": "+.3f",
                "accuracy_gain": "+.2f",
                "teacher_accuracy_gain": "+.2f",
            }.items()
        ]
        lines.append(f"| {record['adapter']} | {record['tasks']} ({record['n_tasks']}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def run(arguments: Arguments) -> None:
    started = time.monotonic()
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision, cpu=arguments.cpu)
    processor = AutoImageProcessor.from_pretrained(arguments.backbone, backend="pil")
    backbone = AutoModel.from_pretrained(arguments.backbone).float().eval().requires_grad_(False)
    adapters = load_adapters(arguments.adapter, backbone.to(accelerator.device))
    sets, mean_end = load_sets(arguments, next(iter(adapters.values())), processor)
    report: dict[str, list[Record]] = {"arrival": [], "along": [], "teacher": [], "solvers": []}
    autocast = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=arguments.mixed_precision == "bf16")
    with tqdm(total=len(sets) * (len(adapters) + 1), desc="flows, then queries") as bar:
        for tasks in sets:
            found = report_on(adapters, tasks, backbone, mean_end, arguments.solver_tasks, autocast, bar)
            for key, records in found.items():
                report[key] += records
    about = {
        "backbone": short_name(arguments.backbone),
        "adapters": {name: {"path": training_interpolant(adapter)} for name, adapter in adapters.items()},
        "tasks": {s.name: sorted({task.episode.domain for task in s.recorded.tasks}) for s in sets},
        "seconds": round(time.monotonic() - started, 1),
        "hardware": hardware(accelerator),
        "versions": versions(),
    }
    folder = Path(arguments.output_dir)
    write_json(folder / "integration.json", about | report)
    draw_integration(report, folder)
    print(summary(report))
    print(f"wrote {folder}")


def main(argv: list[str] | None = None) -> None:
    try:
        arguments = parse(Arguments, argv)
        with exclusive(arguments.output_dir):
            run(arguments)
    except (CheckpointError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
