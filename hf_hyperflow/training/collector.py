"""Record how a teacher fine-tunes a backbone on many few-shot tasks: what the flow is matched to.

    accelerate launch training/collect_trajectories.py --config training/configs/trajectories-vit-s14-70.yaml \
        --backbone FOLDER_OR_HUB_ID --dataset FILE_OR_HUB_ID [...] --output_dir trajectories

Tasks come in groups of one shape (ways, shots) that are trained together and stored as one shard. Row i is a function
of (seed, i), and so is its group, which is always run whole: `--n_trajectories` is rounded up to whole groups. With n
processes, process p makes the groups p, p + n, p + 2n, ... Run again, the command makes what is missing or damaged,
and with more `--n_trajectories` it goes on. The folder opens with `datasets.load_dataset(folder)`.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from peft import PeftConfig
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel
from transformers.image_processing_utils import BaseImageProcessor

from ..arguments import parse
from ..benchmark.cost import flop_counter
from ..data.domains import Domain
from ..data.episodes import episode_generator
from ..data.tasks import TrainingTask, draw_group_shape, draw_task, load_domains, task_images
from ..finetuning.collection import COLLECTION, describe_domain, describe_space, read_collection
from ..finetuning.collection_card import collection_card
from ..finetuning.shards import shard_columns, shard_path, shard_problem, totals, write_shard
from ..finetuning.teacher import Recording, Teacher, fine_tune_tasks
from ..modeling.backbones import SplitBackbone, find_blocks
from ..modeling.fingerprint import compute_fingerprint, fingerprints_match
from ..modeling.hub import push_folder
from ..modeling.model_card import write_card
from ..modeling.parameter_space import ParameterSpace
from ..modeling.peft_configs import bias_config, layernorm_config, lora_config
from ..modeling.saving import CheckpointError, exclusive, write_json
from .cost_log import hardware, versions
from .precision import HELP, MixedPrecision, resolve_precision


@dataclass
class Arguments:
    backbone: str = field(metadata={"help": "the target: a transformers vision model, Hub id or folder"})
    dataset: list[str] = field(metadata={"help": "training domains: Parquet files, image folders, Hub ids"})
    output_dir: str = field(metadata={"help": "folder of the trajectories"})
    holdout: list[str] = field(
        default_factory=list,
        metadata={"help": "NAME: nothing is drawn from this domain; NAME:K: nothing from every K-th class of it"},
    )
    max_per_class: int = field(default=300, metadata={"help": "images of a class that are used at most"})
    parameters: str = field(default="bias", metadata={"help": "what is fine-tuned: bias, lora or layernorm"})
    last_blocks: int = field(default=4, metadata={"help": "in the last so many blocks"})
    norms: bool = field(default=True, metadata={"help": "bias: also the LayerNorms"})
    n_trajectories: int = field(default=1024, metadata={"help": "tasks to record, rounded up to whole groups"})
    group_size: int = field(default=16, metadata={"help": "tasks of one shape that make a shard"})
    images_per_pass: int = field(
        default=128, metadata={"help": "support images, clean and augmented, that go through the target at once"}
    )
    randomize_prob: float = field(default=0.6, metadata={"help": "share of tasks whose domain is made from a real one"})
    teacher_steps: int = field(default=12, metadata={"help": "gradient steps of the teacher"})
    n_points: int = field(default=8, metadata={"help": "points of a trajectory that are recorded, denser early"})
    learning_rate: float = field(default=1e-3, metadata={"help": "of the teacher's Adam"})
    noise: float = field(default=5e-4, metadata={"help": "standard deviation of the noise on the teacher's start"})
    n_views: int = field(default=4, metadata={"help": "augmented views of each support image to draw from"})
    mixed_precision: MixedPrecision = field(default="auto", metadata={"help": HELP})
    cpu: bool = field(default=False, metadata={"help": "stay on the CPU also where there is a GPU"})
    seed: int = field(default=0, metadata={"help": "of the tasks and the teacher"})
    push_to_hub: str | None = field(default=None, metadata={"help": "Hub id of the dataset repository to push to"})

    def __post_init__(self) -> None:
        self.mixed_precision = resolve_precision(self.mixed_precision, cpu=self.cpu)
        for name in ("n_trajectories", "group_size", "images_per_pass", "max_per_class", "teacher_steps"):
            if vars(self)[name] < 1:
                raise SystemExit(f"--{name} must be at least 1, not {vars(self)[name]}.")
        if self.parameters not in ("bias", "lora", "layernorm"):
            raise SystemExit(f"--parameters must be bias, lora or layernorm, not {self.parameters!r}.")

    def teacher(self) -> Teacher:
        return Teacher(
            steps=self.teacher_steps,
            learning_rate=self.learning_rate,
            noise=self.noise,
            n_views=self.n_views,
            n_points=self.n_points,
        )

    def peft_config(self, backbone: nn.Module) -> PeftConfig:
        if self.parameters == "lora":
            return lora_config(backbone, self.last_blocks)
        if self.parameters == "layernorm":
            return layernorm_config(backbone, self.last_blocks)
        return bias_config(backbone, self.last_blocks, norms=self.norms)


class Collector:
    """What a process needs to make any group; used by `benchmark_teacher.py`, too."""

    def __init__(self, arguments: Arguments, accelerator: Accelerator):
        self.arguments, self.accelerator, self.teacher = arguments, accelerator, arguments.teacher()
        self.processor: BaseImageProcessor = AutoImageProcessor.from_pretrained(arguments.backbone, backend="pil")
        self.domains, _ = load_domains(
            arguments.dataset, self.processor, holdout=arguments.holdout, max_per_class=arguments.max_per_class
        )
        self.by_name: dict[str, Domain] = {domain.name: domain for domain in self.domains}
        backbone = AutoModel.from_pretrained(arguments.backbone).float().eval().requires_grad_(False)
        self.backbone = backbone.to(accelerator.device)
        self.fingerprint = compute_fingerprint(backbone)
        self.space = ParameterSpace.from_backbone(backbone, arguments.peft_config(backbone))
        self.split = SplitBackbone(backbone, len(find_blocks(backbone)) - arguments.last_blocks)
        self.flops: dict[tuple[int, int], int] = {}

    def tasks(self, group: int) -> list[TrainingTask]:
        """The tasks of a group: rows `group * group_size` and on."""
        a = self.arguments
        n_way, n_shot = draw_group_shape(self.domains, group, seed=a.seed)
        rows = range(group * a.group_size, (group + 1) * a.group_size)
        drawing = {"seed": a.seed, "randomize_prob": a.randomize_prob, "n_way": n_way, "n_shot": n_shot}
        return [draw_task(self.domains, i, **drawing) for i in rows]

    def fine_tune(self, tasks: list[TrainingTask]) -> Recording:
        """Fine-tune the tasks of a group, as many at once as `images_per_pass` allows."""
        device = self.accelerator.device
        at_once = max(1, self.arguments.images_per_pass // (2 * len(tasks[0].episode.support)))
        parts = []
        for first in range(0, len(tasks), at_once):
            some = tasks[first : first + at_once]
            episodes = [task.episode for task in some]
            with self.accelerator.autocast():
                recording = fine_tune_tasks(
                    self.space,
                    self.split,
                    torch.stack([task_images(task, self.by_name[task.episode.domain], device) for task in some]),
                    torch.stack([episode.support_labels for episode in episodes]).to(device),
                    torch.stack([episode.query_labels for episode in episodes]).to(device),
                    self.processor,
                    self.teacher,
                    [teacher_generator(self.arguments.seed, episode.index) for episode in episodes],
                )
            parts.append(recording)
        names = [entry.name for entry in dataclasses.fields(Recording)]
        return Recording(**{name: torch.cat([vars(part)[name] for part in parts]) for name in names})

    def write(self, group: int) -> None:
        """Make a group and write its shard. Operations are counted in the first group of each shape."""
        started = time.perf_counter()
        tasks = self.tasks(group)
        shape = (tasks[0].episode.n_way, len(tasks[0].episode.support))
        counter = nullcontext() if shape in self.flops else flop_counter()
        with counter:
            recording = self.fine_tune(tasks)
        if shape not in self.flops:
            self.flops[shape] = counter.get_total_flops() // len(tasks)
        seconds = (time.perf_counter() - started) / len(tasks)
        columns = shard_columns(
            tasks, recording, self.space.mask, self.teacher.times, seconds=seconds, flops=self.flops[shape]
        )
        write_shard(self.arguments.output_dir, group, columns)


def teacher_generator(seed: int, index: int) -> torch.Generator:
    """The random numbers of the teacher on task `index`."""
    return torch.Generator().manual_seed(int(episode_generator(seed, "teacher", index).integers(2**62)))


def description(collector: Collector, groups: int) -> dict:
    """`collection.json` before anything is collected."""
    a = collector.arguments
    left_out = ("output_dir", "push_to_hub", "n_trajectories", "cpu", "backbone", "dataset")
    return {
        "arguments": {key: value for key, value in vars(a).items() if key not in left_out},
        "teacher": dataclasses.asdict(collector.teacher) | {"recorded": collector.teacher.recorded},
        "times": collector.teacher.times,
        "backbone": {"name": Path(a.backbone).name, "fingerprint": collector.fingerprint},
        "parameter_space": describe_space(collector.space),
        "domains": [describe_domain(domain, a.max_per_class) for domain in collector.domains],
        "groups": groups,
        "versions": versions(),
        "hardware": hardware(collector.accelerator),
        "totals": None,
    }


def begin(folder: Path, wanted: dict) -> dict:
    """Note in the folder what will be collected; a collection that is there already is gone on with.

    Raises:
        CheckpointError: what is there is of another recipe, backbone or other images; the differences are named.
    """
    if (folder / COLLECTION).is_file():
        there = read_collection(folder)
        different = [
            f"{key}.{name}" if isinstance(wanted[key], dict) else key
            for key in ("arguments", "teacher", "parameter_space", "domains")
            for name in (wanted[key] if isinstance(wanted[key], dict) else [None])
            if (there[key].get(name) != wanted[key][name] if name is not None else there[key] != wanted[key])
        ]
        if not fingerprints_match(there["backbone"]["fingerprint"], wanted["backbone"]["fingerprint"]):
            different.append("the backbone's weights")
        if different:
            raise CheckpointError(
                f"{folder} holds other trajectories: {', '.join(different)} differ. Choose another --output_dir, or "
                "give the arguments and datasets that these were collected with."
            )
        wanted["groups"] = max(wanted["groups"], there["groups"])
        if all(shard_problem(folder, group) is None for group in range(wanted["groups"])):
            wanted |= {key: there[key] for key in ("hardware", "versions")}  # nothing will be made here and now
    write_json(folder / COLLECTION, wanted)
    return wanted


def collect(collector: Collector) -> None:
    """Make the groups of this process that are missing or damaged."""
    a, accelerator = collector.arguments, collector.accelerator
    groups = -(-a.n_trajectories // a.group_size)
    mine = range(accelerator.process_index, groups, accelerator.num_processes)
    problems = {group: shard_problem(a.output_dir, group) for group in mine}
    for group, problem in problems.items():
        if problem is not None and shard_path(a.output_dir, group).exists():
            print(f"warning: {problem}; it is collected again.", file=sys.stderr)
    missing = [group for group in mine if problems[group] is not None]
    with tqdm(missing, desc="groups", disable=not accelerator.is_main_process, mininterval=5) as bar:
        for group in bar:
            try:
                collector.write(group)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{error} Whole shards in {a.output_dir} are kept: when there is room, the same command goes on."
                ) from error


def finish(collector: Collector, collection: dict) -> None:
    """Add up the costs and write the card."""
    folder = Path(collector.arguments.output_dir)
    collection["totals"] = totals(folder, collection["groups"])
    write_json(folder / COLLECTION, collection)
    write_card(collection_card(collection), folder, folder)
    done = collection["totals"]
    print(
        f"wrote {folder}: {done['rows']} trajectories, {done['diverged']} diverged, "
        f"{done['seconds'] / done['rows']:.2f} s and {done['bytes'] / done['rows'] / 1e6:.2f} MB each; queries right "
        f"{done['query_accuracy']['start']} % at the start, {done['query_accuracy']['end']} % at the end"
    )


def main() -> None:
    arguments = parse(Arguments)
    # Processes end at different times, after a resumed run by hours.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision, cpu=arguments.cpu, kwargs_handlers=[patience])
    folder = Path(arguments.output_dir)
    try:
        with exclusive(folder) if accelerator.is_main_process else nullcontext():
            collector = Collector(arguments, accelerator)
            groups = -(-arguments.n_trajectories // arguments.group_size)
            accelerator.print(
                f"{groups} groups of {arguments.group_size} tasks on "
                + ", ".join(f"{d.name} ({len(d.class_names)}/{len(d)})" for d in collector.domains)
                + f"; {collector.space.n_parameters} parameters move"
            )
            if accelerator.is_main_process:
                collection = begin(folder, description(collector, groups))
            accelerator.wait_for_everyone()
            collect(collector)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                finish(collector, collection)
                if arguments.push_to_hub is not None:
                    commit = push_folder(folder, arguments.push_to_hub, repo_type="dataset")
                    print(f"pushed to {commit.commit_url}")
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    accelerator.end_training()
