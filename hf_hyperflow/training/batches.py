"""What each step of `train_drift.py` is trained on: episodes and recorded rows, a function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from transformers.image_processing_utils import BaseImageProcessor

from hf_hyperflow import HyperFlowAdapter

from ..arguments import short_name
from ..data.domains import Domain, normalise
from ..data.tasks import draw_task, task_images
from ..finetuning.trajectories import Trajectories, load_trajectories
from ..modeling.backbones import SplitBackbone
from .config import Arguments
from .objectives import EpisodeImages, encode_recorded_support
from .schedule import MatchingRows, Schedule, rows_of_step

#: Velocities are matched at times up to here; beyond 1 they are zero, so that the flow stays where it lands.
END_TIME = 1.5
#: Share of the rows whose place on the path the drift network does not get to see, see `VelocityMatchingLoss`.
HIDDEN_SHARE = 0.5


def load_recorded(sources: list[str], adapter: HyperFlowAdapter, domains: list[Domain]) -> Trajectories | None:
    """The rows of all collections as one, `collection` being a list of what each says of itself; None without any.

    Raises:
        ValueError: one was made with another parameter space, backbone or data, or at other times than the first.
        CheckpointError: one is missing or has no whole shard.
    """
    if not sources:
        return None
    fingerprint = adapter.config.backbone["fingerprint"]
    found = [load_trajectories(s, adapter.space, domains=domains, fingerprint=fingerprint) for s in sources]
    for source, other in zip(sources, found, strict=True):
        if not torch.equal(other.times, found[0].times):
            raise ValueError(
                f"{source} was recorded at the times {other.times.tolist()}, {sources[0]} at "
                f"{found[0].times.tolist()}: collect both with the same steps and recorded points."
            )
    described = [
        {"name": short_name(source)} | {key: value for key, value in t.collection.items() if key != "parameter_space"}
        for source, t in zip(sources, found, strict=True)
    ]
    return Trajectories(
        tasks=[task for t in found for task in t.tasks],
        times=found[0].times,
        deltas=torch.cat([t.deltas for t in found]),
        mask=found[0].mask,
        diverged=sum(t.diverged for t in found),
        collection={"collections": described},
    )


class StepBatches:
    """The batch of each step, dealt out to processes and accumulated parts.

    Args:
        domains: that the episodes come from.
        recorded: trajectories, where the schedule has matching.

    Raises:
        ValueError: a batch is smaller than the number of shares it is dealt out to.
    """

    def __init__(
        self,
        arguments: Arguments,
        domains: list[Domain],
        processor: BaseImageProcessor,
        recorded: Trajectories | None,
        accelerator: Accelerator,
    ):
        self.arguments = arguments
        self.schedule = Schedule(arguments.matching_steps, arguments.annealing_steps)
        self.domains = {domain.name: domain for domain in domains}
        self.processor = processor
        self.recorded = recorded
        self.device = accelerator.device
        self.process = accelerator.process_index
        self.n_shares = accelerator.num_processes * arguments.gradient_accumulation_steps
        self.support: list[tuple[torch.Tensor, torch.Tensor]] = []
        sizes = {"episodes_per_step": arguments.episodes_per_step}
        if recorded is not None:
            sizes["matching_batch_size"] = arguments.matching_batch_size
        small = [f"--{name} {size}" for name, size in sizes.items() if size < self.n_shares]
        if small:
            raise ValueError(
                f"{', '.join(small)} cannot be shared by {accelerator.num_processes} processes and "
                f"{arguments.gradient_accumulation_steps} accumulated parts: give at least {self.n_shares}."
            )

    def sizes(self, step: int) -> dict[str, int]:
        """How many `episodes` and `rows` the whole batch of a step has."""
        weight = self.schedule.weight(step)
        return {
            "episodes": self.arguments.episodes_per_step if weight < 1 else 0,
            "rows": self.arguments.matching_batch_size if weight > 0 else 0,
        }

    def encode_support(self, adapter: HyperFlowAdapter, split: SplitBackbone) -> None:
        """Run the frozen support encoder on the support sets of all recorded rows, once for all of training."""
        self.support = encode_recorded_support(adapter, split, self.recorded, list(self.domains.values()))

    def mine(self, n_tasks: int) -> Iterator[EpisodeImages]:
        """This process's share of the first tasks."""
        n_processes = self.n_shares // self.arguments.gradient_accumulation_steps
        return (self._episode(index) for index in range(self.process, n_tasks, n_processes))

    def share(self, step: int, part: int) -> tuple[list[EpisodeImages], MatchingRows | None]:
        """This process's episodes and rows in an accumulated part of a step."""
        sizes = self.sizes(step)
        mine = slice(self.process * self.arguments.gradient_accumulation_steps + part, None, self.n_shares)
        first = step * self.arguments.episodes_per_step
        episodes = [self._episode(index) for index in range(first, first + sizes["episodes"])[mine]]
        return episodes, self._rows(step, mine) if sizes["rows"] else None

    def _episode(self, index: int) -> EpisodeImages:
        task = draw_task(
            list(self.domains.values()), index, seed=self.arguments.seed, randomize_prob=self.arguments.randomize_prob
        )
        images = task_images(task, self.domains[task.episode.domain], self.device)
        labels = (task.episode.support_labels.to(self.device), task.episode.query_labels.to(self.device))
        return EpisodeImages(normalise(images, self.processor), *labels)

    def _rows(self, step: int, mine: slice) -> MatchingRows:
        size, seed = self.arguments.matching_batch_size, self.arguments.seed
        rows = rows_of_step(len(self.recorded), step, size, seed)[mine]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        t = END_TIME * torch.rand(size, generator=generator)[mine].to(self.device)
        hidden = (torch.rand(size, generator=generator) < HIDDEN_SHARE)[mine].to(self.device)
        support = [tuple(tensor.to(self.device) for tensor in self.support[row]) for row in rows]
        return MatchingRows(support, self.recorded.deltas[rows].float().to(self.device), t, hidden)
