"""What each step is trained on: episodes and recorded rows, both a function of (seed, step) alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from transformers.image_processing_utils import BaseImageProcessor

from ..arguments import short_name
from ..data.domains import Domain, normalise
from ..data.tasks import TrainingTask, draw_task, task_images
from ..finetuning.trajectories import Trajectories, load_trajectories
from ..modeling.adapter import HyperFlowAdapter
from ..modeling.backbones import SplitBackbone
from .config import DriftTrainingConfig
from .objectives import EpisodeImages, MatchingRows, encode_recorded_support
from .prefix_cache import ImageKey
from .schedule import Schedule, draw_rows

#: Velocities are matched at times up to here. From 1 on they are zero, so that the flow stays where it lands.
END_TIME = 1.5
#: Probability that the drift network does not get to see z of a row, see `VelocityMatchingLoss`.
MASK_PROB = 0.5


def load_recorded(sources: list[str], adapter: HyperFlowAdapter, domains: list[Domain]) -> Trajectories | None:
    """The rows of all collections as one, or None if there are no collections.

    The `collection` of the result lists what each of them says of itself.

    Raises:
        ValueError: one was made with another parameter space, backbone or data, or at other times than the first.
        CheckpointError: one is missing or has no whole shard.
    """
    if not sources:
        return None
    fingerprint = adapter.config.backbone["fingerprint"]
    collections = [load_trajectories(s, adapter.space, domains=domains, fingerprint=fingerprint) for s in sources]
    first = collections[0]
    tasks: list[TrainingTask] = []
    deltas: list[torch.Tensor] = []
    descriptions = []
    diverged = 0
    for source, trajectories in zip(sources, collections, strict=True):
        if not torch.equal(trajectories.times, first.times):
            raise ValueError(
                f"{source} was recorded at the times {trajectories.times.tolist()}, {sources[0]} at "
                f"{first.times.tolist()}: collect both with the same steps and recorded points."
            )
        tasks += trajectories.tasks
        deltas.append(trajectories.deltas)
        diverged += trajectories.diverged
        descriptions.append(_describe_collection(source, trajectories.collection))
    return Trajectories(
        tasks=tasks,
        times=first.times,
        deltas=torch.cat(deltas),
        mask=first.mask,
        diverged=diverged,
        collection={"collections": descriptions},
    )


def _describe_collection(source: str, collection: dict[str, Any]) -> dict[str, Any]:
    """A collection for the record of a run. Its parameter space is left out: it is long, and that of the adapter."""
    description: dict[str, Any] = {"name": short_name(source)}
    for key, value in collection.items():
        if key != "parameter_space":
            description[key] = value
    return description


@dataclass(frozen=True)
class BatchSizes:
    """How many episodes and recorded rows the whole batch of a step has."""

    episodes: int
    rows: int


class StepBatches:
    """The batch of each step, dealt out to processes and accumulated parts.

    Args:
        domains: the episodes come from them.
        recorded: trajectories, if the schedule has matching.

    Raises:
        ValueError: a batch is smaller than the number of shares that it is dealt out to.
    """

    def __init__(
        self,
        config: DriftTrainingConfig,
        domains: list[Domain],
        processor: BaseImageProcessor,
        recorded: Trajectories | None,
        accelerator: Accelerator,
    ):
        self.config = config
        self.schedule = Schedule(config.matching_steps, config.annealing_steps)
        self.domains = domains
        self.domains_by_name = {domain.name: domain for domain in domains}
        self.processor = processor
        self.recorded = recorded
        self.device = accelerator.device
        self.process = accelerator.process_index
        self.n_processes = accelerator.num_processes
        self.n_shares = accelerator.num_processes * config.gradient_accumulation_steps
        self.support: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._require_a_share_for_all()

    def _require_a_share_for_all(self) -> None:
        too_small = []
        if self.config.episodes_per_step < self.n_shares:
            too_small.append(f"--episodes_per_step {self.config.episodes_per_step}")
        if self.recorded is not None and self.config.matching_batch_size < self.n_shares:
            too_small.append(f"--matching_batch_size {self.config.matching_batch_size}")
        if too_small:
            raise ValueError(
                f"{', '.join(too_small)} cannot be shared by {self.n_processes} processes and "
                f"{self.config.gradient_accumulation_steps} accumulated parts: give at least {self.n_shares}."
            )

    def sizes(self, step: int) -> BatchSizes:
        """The sizes of the whole batch of a step; a loss without weight gets nothing."""
        weight = self.schedule.weight(step)
        n_episodes = self.config.episodes_per_step if weight < 1 else 0
        n_rows = self.config.matching_batch_size if weight > 0 else 0
        return BatchSizes(n_episodes, n_rows)

    def encode_support(self, adapter: HyperFlowAdapter, split: SplitBackbone) -> None:
        """Run the frozen support encoder on the support sets of all recorded rows, once for the whole training."""
        assert self.recorded is not None, "only recorded rows are encoded"
        self.support = encode_recorded_support(adapter, split, self.recorded, self.domains)

    def first_episodes(self, n_episodes: int) -> Iterator[EpisodeImages]:
        """This process's share of episodes 0 to `n_episodes`."""
        for index in range(self.process, n_episodes, self.n_processes):
            yield self._load_episode(index)

    def share(self, step: int, part: int) -> tuple[list[EpisodeImages], MatchingRows | None]:
        """This process's episodes and recorded rows in an accumulated part of a step."""
        sizes = self.sizes(step)
        share = slice(self.process * self.config.gradient_accumulation_steps + part, None, self.n_shares)
        # Numbers go on through steps of matching alone, so that an episode does not depend on the schedule.
        first = step * self.config.episodes_per_step
        indices = range(first, first + sizes.episodes)[share]
        episodes = [self._load_episode(index) for index in indices]
        rows = self._load_rows(step, share) if sizes.rows else None
        return episodes, rows

    def _load_episode(self, index: int) -> EpisodeImages:
        task = draw_task(self.domains, index, seed=self.config.seed, randomize_prob=self.config.randomize_prob)
        episode = task.episode
        images = task_images(task, self.domains_by_name[episode.domain], self.device)
        keys = None
        if task.transform_seed is None:
            rows = torch.cat([episode.support, episode.query]).tolist()
            keys = [ImageKey(episode.domain, row, task.flip) for row in rows]
        return EpisodeImages(
            pixel_values=normalise(images, self.processor),
            support_labels=episode.support_labels.to(self.device),
            query_labels=episode.query_labels.to(self.device),
            keys=keys,
        )

    def _load_rows(self, step: int, share: slice) -> MatchingRows:
        assert self.recorded is not None, "a step of matching has recorded rows"
        size, seed = self.config.matching_batch_size, self.config.seed
        rows = draw_rows(len(self.recorded), step, size, seed)[share]
        # Drawn for the whole batch and then dealt out, so that the number of shares changes nothing.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        t = END_TIME * torch.rand(size, generator=generator)
        masked = torch.rand(size, generator=generator) < MASK_PROB
        support = []
        for row in rows:
            features, labels = self.support[row]
            support.append((features.to(self.device), labels.to(self.device)))
        return MatchingRows(
            support=support,
            deltas=self.recorded.deltas[rows].float().to(self.device),
            t=t[share].to(self.device),
            masked=masked[share].to(self.device),
        )
