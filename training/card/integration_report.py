"""Does the flow arrive where the teacher went? A report on trained adapters: JSON and figures.

    python -m training.card.integration_report --backbone BACKBONE --adapter L=adapter-linear C=adapter-cubic \
        --trajectories trajectories --unseen trajectories-unseen --dataset FILE_OR_HUB_ID [...] --output_dir report

`--trajectories` are the collections that the adapters were matched to. `--unseen` are collections of other tasks, made
by `training/collect_trajectories.py` with another `--seed`, or of domains that were kept apart. An adapter is compared
with the velocity of the interpolant that it was trained on. The report is in `integration.json`; `distance.png`,
`cosine.png`, `loss.png` and `solvers.png` are drawn from it, and a summary is printed.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.arguments import parse, short_name
from hf_hyperflow.data.domains import Domain
from hf_hyperflow.data.tasks import load_domains
from hf_hyperflow.finetuning.collection import COLLECTION, describe_space, read_collection
from hf_hyperflow.finetuning.trajectories import Trajectories, load_trajectories
from hf_hyperflow.modeling.atomic_file import write_json
from hf_hyperflow.modeling.fingerprint import compute_fingerprint, fingerprints_match
from hf_hyperflow.modeling.hub import fetch
from hf_hyperflow.modeling.saving import CheckpointError, exclusive
from hf_hyperflow.training.cost_log import describe_hardware, list_versions
from hf_hyperflow.training.objectives import encode_recorded_support
from hf_hyperflow.training.precision import HELP, MixedPrecision, resolve_precision

from .arrival import (
    FlowMeasures,
    compare_solvers,
    encode_tasks,
    get_interpolant,
    measure_flow,
    measure_queries,
    select_rows,
    select_tasks,
    summarise_along_flow,
    summarise_arrival,
    summarise_teacher,
)
from .arrival_figures import Report, draw_integration
from .markdown import format_interval, format_table
from .records import column, list_stems

#: Columns of the summary: heading, key of an arrival record, number format.
COLUMNS = (
    ("distance to the endpoint", "distance", ".3f"),
    ("from the teacher's start", "distance_from_start", ".3f"),
    ("of the mean displacement", "distance_of_mean", ".3f"),
    ("moves after t = 1", "drifted", ".3f"),
    ("query loss", "loss_gain", "+.3f"),
    ("after t = 1", "loss_after", "+.3f"),
    ("teacher's", "teacher_loss_gain", "+.3f"),
    ("query accuracy", "accuracy_gain", "+.2f"),
    ("teacher's", "teacher_accuracy_gain", "+.2f"),
)


@dataclass
class Arguments:
    backbone: str = field(metadata={"help": "the target: Hub id or folder"})
    adapter: list[str] = field(metadata={"help": "NAME=FOLDER_OR_HUB_ID of each trained adapter"})
    trajectories: list[str] = field(metadata={"help": "the collections they were matched to: folders or Hub ids"})
    dataset: list[str] = field(metadata={"help": "the datasets that all collections were made from"})
    output_dir: str = field(metadata={"help": "folder for integration.json and the figures"})
    unseen: list[str] = field(default_factory=list, metadata={"help": "collections of tasks they were not matched to"})
    n_tasks: int = field(default=64, metadata={"help": "tasks of each collection, spread evenly over it"})
    solver_tasks: int = field(default=16, metadata={"help": "tasks of them that all solvers are compared on"})
    mixed_precision: MixedPrecision = field(default="auto", metadata={"help": f"{HELP}; the drift is in float32"})
    cpu: bool = field(default=False, metadata={"help": "stay on the CPU also where there is a GPU"})

    def __post_init__(self) -> None:
        """Raises ValueError where the settings make no sense."""
        self.mixed_precision = resolve_precision(self.mixed_precision, cpu=self.cpu)
        if self.n_tasks < 2 or self.solver_tasks < 2:
            raise ValueError("--n_tasks and --solver_tasks must be at least 2: there is no interval of one task.")
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"--mixed_precision must be no or bf16, not {self.mixed_precision!r}.")
        names = set()
        for entry in self.adapter:
            name, _, source = entry.partition("=")
            if name and source:
                names.add(name)
        if len(names) < len(self.adapter):
            raise ValueError(f"--adapter takes NAME=FOLDER_OR_HUB_ID with names of their own, not {self.adapter}.")


@dataclass(frozen=True)
class TaskSet:
    """Some tasks of a collection, and their name in the report."""

    name: str
    recorded: Trajectories
    domains: list[Domain]


def load_adapters(entries: list[str], backbone: PreTrainedModel) -> dict[str, HyperFlowAdapter]:
    """The adapters by name, in single precision on the backbone's device.

    Raises:
        ValueError: they move other parameters than the first, or were trained for another backbone.
    """
    adapters: dict[str, HyperFlowAdapter] = {}
    fingerprint = compute_fingerprint(backbone)
    for entry in entries:
        name, _, source = entry.partition("=")
        adapter = HyperFlowAdapter.from_pretrained(source).float().eval().to(backbone.device)
        adapter.split(backbone)  # raises where width or depth differ
        if not fingerprints_match(adapter.config.backbone["fingerprint"], fingerprint):
            raise ValueError(f"adapter {name!r} was trained for a backbone of other weights: report it with its own.")
        first = next(iter(adapters.values()), adapter)
        if describe_space(adapter.space) != describe_space(first.space):
            raise ValueError(
                f"adapter {name!r} moves other parameters than the first one: make a report for each kind."
            )
        adapters[name] = adapter
    return adapters


class DomainStore:
    """The domains of collections, loaded as each collection had them; those of equal settings are loaded once."""

    def __init__(self, sources: list[str], processor: BaseImageProcessor):
        self.sources, self.processor = sources, processor
        self._loaded: dict[tuple[Any, ...], list[Domain]] = {}

    def load(self, source: str, collection: dict[str, Any]) -> list[Domain]:
        """The domains that a collection was made from.

        Raises:
            ValueError: one is not among the datasets.
        """
        needed = column(collection["domains"], "name")
        missing = sorted(set(needed) - set(list_stems(self.sources)))
        if missing:
            raise ValueError(f"{source} was made from {needed}: give {missing} with --dataset, too.")
        arguments = collection["arguments"]
        holdout = [entry for entry in arguments["holdout"] if entry.partition(":")[0] in needed]
        key = (*needed, *holdout, arguments["max_per_class"])
        if key not in self._loaded:
            sources = [source for source in self.sources if Path(source).stem in needed]
            self._loaded[key], _ = load_domains(
                sources, self.processor, holdout=holdout, max_per_class=arguments["max_per_class"]
            )
        return self._loaded[key]


def load_sets(
    arguments: Arguments, adapter: HyperFlowAdapter, processor: BaseImageProcessor
) -> tuple[list[TaskSet], torch.Tensor]:
    """The tasks to report on, and the mean displacement `(n_tokens, token_dim)` of all training trajectories.

    Raises:
        ValueError, CheckpointError: a collection belongs to something else, is too small or damaged.
    """
    store = DomainStore(arguments.dataset, processor)
    fingerprint = adapter.config.backbone["fingerprint"]
    sets, ends = [], []
    for kind, sources in (("training", arguments.trajectories), ("unseen", arguments.unseen)):
        for source in sources:
            collection = read_collection(fetch(source, COLLECTION, repo_type="dataset"))
            domains = store.load(source, collection)
            recorded = load_trajectories(source, adapter.space, domains=domains, fingerprint=fingerprint)
            if len(recorded) < 2:
                raise ValueError(f"{source} has {len(recorded)} usable trajectories: a report needs two or more.")
            name = kind if len(sources) == 1 else f"{kind}: {short_name(source)}"
            sets.append(TaskSet(name, select_tasks(recorded, arguments.n_tasks), domains))
            if kind == "training":
                ends.append(recorded.deltas[:, -1])
    return sets, torch.cat(ends).float().mean(dim=0)


class Reporter:
    """Measures adapters on sets of tasks.

    Args:
        adapters: by name.
        mean_end: see `measure_flow`.
        n_solver_tasks: tasks of a set that the solvers are compared on.
        autocast: the precision that the backbone runs in.

    Attributes:
        report: the records, filled by `add`.
    """

    def __init__(
        self,
        adapters: dict[str, HyperFlowAdapter],
        backbone: PreTrainedModel,
        mean_end: torch.Tensor,
        n_solver_tasks: int,
        autocast: AbstractContextManager,
    ):
        self.adapters, self.backbone = adapters, backbone
        self.mean_end, self.n_solver_tasks, self.autocast = mean_end, n_solver_tasks, autocast
        self.report: Report = {"arrival": [], "along": [], "teacher": [], "solvers": []}

    def add(self, tasks: TaskSet, bar: tqdm) -> None:
        """Measure all adapters on one set of tasks; `bar` advances once per adapter, and once for the queries."""
        measures, deltas = {}, [tasks.recorded.deltas]
        for name in self.adapters:
            measures[name] = self._measure_flow(name, tasks)
            deltas.append(measures[name].deltas)
            bar.update()
        first = next(iter(self.adapters.values()))
        assert first.processor is not None, "trained adapters have the processor of their backbone"
        with self.autocast:
            split = first.split(self.backbone)
            teacher, *curves = measure_queries(
                split, first.space, first.processor, tasks.recorded, tasks.domains, deltas
            )
        bar.update()
        for record in summarise_teacher(teacher, tasks.recorded.times):
            self._append("teacher", record, tasks=tasks.name)
        for (name, measure), curve in zip(measures.items(), curves, strict=True):
            self._append("arrival", summarise_arrival(measure, curve, teacher), adapter=name, tasks=tasks.name)
            for record in summarise_along_flow(measure, curve):
                self._append("along", record, adapter=name, tasks=tasks.name)

    def _measure_flow(self, name: str, tasks: TaskSet) -> FlowMeasures:
        """Measure the flow of one adapter, and add the records of the solvers."""
        adapter, recorded = self.adapters[name], tasks.recorded
        with self.autocast:
            support = encode_recorded_support(adapter, adapter.split(self.backbone), recorded, tasks.domains)
        solver_rows = select_rows(len(support), self.n_solver_tasks)
        solver_tokens = encode_tasks(adapter, [support[row] for row in solver_rows])
        for record in compare_solvers(adapter, solver_tokens, select_tasks(recorded, self.n_solver_tasks)):
            self._append("solvers", record, adapter=name, tasks=tasks.name, n_tasks=len(solver_rows))
        interpolant, tokens = get_interpolant(adapter), encode_tasks(adapter, support)
        return measure_flow(adapter, tokens, recorded, interpolant=interpolant, mean_end=self.mean_end)

    def _append(self, kind: str, record: dict[str, Any], **labels: Any) -> None:
        """Add a record, its labels first."""
        labels.update(record)
        self.report[kind].append(labels)


def format_summary(report: Report) -> str:
    """Where the flow of each adapter arrives, in Markdown."""
    headings = ["adapter", "tasks"]
    headings += [heading for heading, _, _ in COLUMNS]
    rows = []
    for record in report["arrival"]:
        row = [record["adapter"], f"{record['tasks']} ({record['n_tasks']})"]
        for _, key, style in COLUMNS:
            row.append(format_interval(record[key], record[f"{key}_ci95"], style))
        rows.append(row)
    return format_table(headings, rows)


def run(arguments: Arguments) -> None:
    started = time.monotonic()
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision, cpu=arguments.cpu)
    processor = AutoImageProcessor.from_pretrained(arguments.backbone, backend="pil")
    backbone = AutoModel.from_pretrained(arguments.backbone).float().eval().requires_grad_(False)
    adapters = load_adapters(arguments.adapter, backbone.to(accelerator.device))
    sets, mean_end = load_sets(arguments, next(iter(adapters.values())), processor)
    use_bf16 = arguments.mixed_precision == "bf16"
    autocast = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=use_bf16)
    reporter = Reporter(adapters, backbone, mean_end, arguments.solver_tasks, autocast)
    with tqdm(total=len(sets) * (len(adapters) + 1), desc="flows, then queries") as bar:
        for tasks in sets:
            reporter.add(tasks, bar)
    adapter_records = {name: {"interpolant": get_interpolant(adapter)} for name, adapter in adapters.items()}
    domain_names = {tasks.name: _list_domain_names(tasks) for tasks in sets}
    content: dict[str, Any] = {
        "backbone": short_name(arguments.backbone),
        "adapters": adapter_records,
        "tasks": domain_names,
        "seconds": round(time.monotonic() - started, 1),
        "hardware": describe_hardware(accelerator),
        "versions": list_versions(),
    }
    content.update(reporter.report)
    folder = Path(arguments.output_dir)
    write_json(folder / "integration.json", content)
    draw_integration(reporter.report, folder)
    print(format_summary(reporter.report))
    print(f"wrote {folder}")


def _list_domain_names(tasks: TaskSet) -> list[str]:
    return sorted({task.episode.domain for task in tasks.recorded.tasks})


def main(argv: list[str] | None = None) -> None:
    try:
        arguments = parse(Arguments, argv)
        with exclusive(arguments.output_dir):
            run(arguments)
    except (CheckpointError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
