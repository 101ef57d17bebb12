"""`TrajectoryCollector`: records how a teacher fine-tunes a backbone on many few-shot tasks."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel
from transformers.image_processing_utils import BaseImageProcessor

from ..arguments import exit_on_error, parse
from ..benchmark.cost import flop_counter
from ..data.domains import Domain
from ..data.episodes import episode_generator
from ..data.tasks import TrainingTask, draw_group_shape, draw_task, load_domains, task_images
from ..finetuning.collection import COLLECTION, describe_domain, describe_space, read_collection
from ..finetuning.collection_card import collection_card
from ..finetuning.merged_target import MergedTarget
from ..finetuning.shards import (
    DATA,
    build_shard_columns,
    find_shard_problem,
    get_shard_path,
    summarise_shards,
    write_shard,
)
from ..finetuning.teacher import Recording, fine_tune_tasks
from ..modeling.atomic_file import write_json
from ..modeling.backbones import SplitBackbone
from ..modeling.fingerprint import compute_fingerprint, fingerprints_match
from ..modeling.gate import find_blocks
from ..modeling.hub import push_folder
from ..modeling.model_card import CARD, write_card
from ..modeling.parameter_space import ParameterSpace
from ..modeling.saving import CheckpointError
from ..modeling.trunks import find_trunk
from .building import build_peft_config
from .checkpoints import exclusive_run
from .collection_config import CollectionConfig
from .cost_log import describe_hardware, list_versions
from .precision import get_autocast_dtype
from .tracking import list_domains

#: Settings that may differ when a collection is gone on with, or that its record holds elsewhere.
NOT_COMPARED = ("output_dir", "push_to_hub", "n_trajectories", "cpu", "backbone", "dataset")


class TrajectoryCollector:
    """Collects trajectories in a folder, which `hf_hyperflow.finetuning.trajectories` reads.

    Tasks come in groups of one shape (ways, shots), which are trained together and stored as one shard. Row i is a
    function of (seed, i) and belongs to group i // group_size. With n processes, process p makes the groups p, p + n,
    p + 2 n, ... A group is made whole or not at all, so that a killed run goes on where it was.

    Args:
        config: the settings.
    """

    processor: BaseImageProcessor
    domains: list[Domain]
    fingerprint: list[float]
    space: ParameterSpace
    target: MergedTarget

    def __init__(self, config: CollectionConfig):
        self.config = config
        self.teacher = config.teacher
        self.folder = Path(config.output_dir)
        # Processes end at different times; if only one of them has shards to repair, by hours.
        patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision, cpu=config.cpu, kwargs_handlers=[patience]
        )
        self.flops_by_shape: dict[tuple[int, int], int] = {}

    def collect(self) -> None:
        """Make the trajectories that are missing or damaged, and write the collection's record and card.

        Raises:
            CheckpointError: another run writes to the folder; it holds trajectories of other settings, backbone or
                images; the disk is full; or the Hub refuses the push.
            ValueError: a dataset cannot be read or is too small, or the backbone has no such parameters.
        """
        is_main = self.accelerator.is_main_process
        with exclusive_run(self.accelerator, self.folder):
            self.prepare()
            if is_main:
                collection = self.begin()
            self.accelerator.wait_for_everyone()
            self.make_missing_groups()
            self.accelerator.wait_for_everyone()
            if is_main:
                self.finish(collection)
        self.accelerator.end_training()

    def prepare(self) -> None:
        """Load the datasets and the backbone."""
        config = self.config
        self.processor = AutoImageProcessor.from_pretrained(config.backbone, backend="pil")
        self.domains, _ = load_domains(
            config.dataset, self.processor, holdout=config.holdout, max_per_class=config.max_per_class
        )
        self.domains_by_name = {domain.name: domain for domain in self.domains}
        backbone = AutoModel.from_pretrained(config.backbone).float().eval().requires_grad_(False)
        backbone = find_trunk(backbone).to(self.accelerator.device)
        self.fingerprint = compute_fingerprint(backbone)
        peft_config = build_peft_config(config.parameters, backbone, config.last_blocks, norms=config.norms)
        self.space = ParameterSpace.from_backbone(backbone, peft_config)
        split = SplitBackbone(backbone, len(find_blocks(backbone)) - config.last_blocks)
        self.target = MergedTarget(self.space, split, get_autocast_dtype(self.accelerator.mixed_precision))
        self.accelerator.print(
            f"{config.n_groups} groups of {config.group_size} tasks on {list_domains(self.domains)}; "
            f"{self.space.n_parameters} parameters move"
        )

    def begin(self) -> dict[str, Any]:
        """Note in the folder what will be collected; a collection that is there already is gone on with.

        Returns:
            What `collection.json` says.

        Raises:
            CheckpointError: what is there has other settings, another backbone or other images; the differences are
                named.
        """
        collection = self.describe()
        if (self.folder / COLLECTION).is_file():
            previous = read_collection(self.folder)
            _require_same_collection(self.folder, previous, collection)
            collection["groups"] = max(collection["groups"], previous["groups"])
            if self._is_complete(collection["groups"]):
                # Nothing will be made here and now.
                collection["hardware"], collection["versions"] = previous["hardware"], previous["versions"]
        write_json(self.folder / COLLECTION, collection)
        return collection

    def _is_complete(self, n_groups: int) -> bool:
        return all(find_shard_problem(self.folder, group) is None for group in range(n_groups))

    def describe(self) -> dict[str, Any]:
        """What `collection.json` says before anything is collected."""
        config = self.config
        teacher = asdict(self.teacher)
        teacher["recorded"] = self.teacher.recorded
        arguments = {name: value for name, value in vars(config).items() if name not in NOT_COMPARED}
        domains = [describe_domain(domain, config.max_per_class) for domain in self.domains]
        return {
            "arguments": arguments,
            "teacher": teacher,
            "times": self.teacher.times,
            "backbone": {"name": Path(config.backbone).name, "fingerprint": self.fingerprint},
            "parameter_space": describe_space(self.space),
            "domains": domains,
            "groups": config.n_groups,
            "versions": list_versions(),
            "hardware": describe_hardware(self.accelerator),
            "totals": None,
        }

    def make_missing_groups(self) -> None:
        """Make those groups of this process that are missing or damaged.

        Raises:
            CheckpointError: a shard cannot be written.
        """
        missing = []
        for group in range(self.accelerator.process_index, self.config.n_groups, self.accelerator.num_processes):
            problem = find_shard_problem(self.folder, group)
            if problem is None:
                continue
            missing.append(group)
            if get_shard_path(self.folder, group).exists():
                print(f"warning: {problem}; it is collected again.", file=sys.stderr)
        bar = tqdm(missing, desc="groups", disable=not self.accelerator.is_main_process, mininterval=5)
        for group in bar:
            try:
                self.make_group(group)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{error} Whole shards in {self.folder} are kept: when there is room, the same command goes on."
                ) from error

    def make_group(self, group: int) -> None:
        """Fine-tune the tasks of a group and write its shard."""
        started = time.perf_counter()
        tasks = self.draw_tasks(group)
        recording = self._fine_tune_and_count(tasks)
        seconds = (time.perf_counter() - started) / len(tasks)
        columns = build_shard_columns(
            tasks,
            recording,
            self.space.mask,
            self.teacher.times,
            seconds=seconds,
            flops=self.flops_by_shape[_get_shape(tasks)],
        )
        write_shard(self.folder, group, columns)

    def draw_tasks(self, group: int) -> list[TrainingTask]:
        """The tasks of a group, rows `group * group_size` and on."""
        config = self.config
        n_way, n_shot = draw_group_shape(self.domains, group, seed=config.seed)
        tasks = []
        for row in range(group * config.group_size, (group + 1) * config.group_size):
            task = draw_task(
                self.domains,
                row,
                seed=config.seed,
                randomize_prob=config.randomize_prob,
                n_way=n_way,
                n_shot=n_shot,
            )
            tasks.append(task)
        return tasks

    def _fine_tune_and_count(self, tasks: list[TrainingTask]) -> Recording:
        """`fine_tune`, with the operations counted in the first group of each shape."""
        shape = _get_shape(tasks)
        if shape in self.flops_by_shape:
            return self.fine_tune(tasks)
        with flop_counter() as counter:
            recording = self.fine_tune(tasks)
        self.flops_by_shape[shape] = counter.get_total_flops() // len(tasks)
        return recording

    def fine_tune(self, tasks: list[TrainingTask]) -> Recording:
        """Fine-tune the tasks of a group, as many at once as `images_per_pass` allows."""
        n_images = 2 * len(tasks[0].episode.support)
        n_at_once = max(1, self.config.images_per_pass // n_images)
        parts = []
        for first in range(0, len(tasks), n_at_once):
            parts.append(self._fine_tune_at_once(tasks[first : first + n_at_once]))
        columns = {}
        for entry in fields(Recording):
            columns[entry.name] = torch.cat([vars(part)[entry.name] for part in parts])
        return Recording(**columns)

    def _fine_tune_at_once(self, tasks: list[TrainingTask]) -> Recording:
        device = self.accelerator.device
        images, support_labels, query_labels, generators = [], [], [], []
        for task in tasks:
            episode = task.episode
            images.append(task_images(task, self.domains_by_name[episode.domain], device))
            support_labels.append(episode.support_labels)
            query_labels.append(episode.query_labels)
            generators.append(teacher_generator(self.config.seed, episode.index))
        with self.accelerator.autocast():
            return fine_tune_tasks(
                self.target,
                torch.stack(images),
                torch.stack(support_labels).to(device),
                torch.stack(query_labels).to(device),
                self.processor,
                self.teacher,
                generators,
            )

    def finish(self, collection: dict[str, Any]) -> None:
        """Add up the costs, write the card, and push the folder if the config says so."""
        collection["totals"] = summarise_shards(self.folder, collection["groups"])
        write_json(self.folder / COLLECTION, collection)
        write_card(collection_card(collection), self.folder, self.folder)
        done = collection["totals"]
        print(
            f"wrote {self.folder}: {done['rows']} trajectories, {done['diverged']} diverged, "
            f"{done['seconds'] / done['rows']:.2f} s and {done['bytes'] / done['rows'] / 1e6:.2f} MB each; "
            f"query accuracy {done['query_accuracy']['start']} % at the start, "
            f"{done['query_accuracy']['end']} % at the end"
        )
        if self.config.push_to_hub is not None:
            commit = push_folder(
                self.folder, self.config.push_to_hub, CARD, COLLECTION, f"{DATA}/shard-*", repo_type="dataset"
            )
            print(f"pushed to {commit.commit_url}")


def teacher_generator(seed: int, index: int) -> torch.Generator:
    """The random numbers of the teacher on task `index`."""
    return torch.Generator().manual_seed(int(episode_generator(seed, "teacher", index).integers(2**62)))


def _get_shape(tasks: list[TrainingTask]) -> tuple[int, int]:
    """Ways and support images of a group; they decide how many operations its fine-tuning takes."""
    episode = tasks[0].episode
    return episode.n_way, len(episode.support)


def _require_same_collection(folder: Path, previous: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises CheckpointError where a collection cannot be gone on with; all differences are named."""
    different = []
    for key in ("arguments", "teacher", "parameter_space"):
        for name, value in wanted[key].items():
            if previous[key].get(name) != value:
                different.append(f"{key}.{name}")
    if previous["domains"] != wanted["domains"]:
        different.append("domains")
    if not fingerprints_match(previous["backbone"]["fingerprint"], wanted["backbone"]["fingerprint"]):
        different.append("the backbone's weights")
    if different:
        raise CheckpointError(
            f"{folder} holds other trajectories: {', '.join(different)} differ. Choose another --output_dir, or "
            "give the arguments and datasets that these were collected with."
        )


def main(argv: list[str] | None = None) -> None:
    """The command line of `training/collect_trajectories.py`."""
    with exit_on_error():
        TrajectoryCollector(parse(CollectionConfig, argv)).collect()
