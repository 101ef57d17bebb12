"""From velocity matching to the episodic loss: the schedule, and both losses behind one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..modeling.adapter import HyperFlowAdapter
from .objectives import EpisodeImages, EpisodicLoss, MatchingRows, VelocityMatchingLoss

#: What `ScheduledLoss` measures, in this order.
METRICS = ("loss", "episodic_loss", "accuracy", "matching_loss")


@dataclass(frozen=True)
class Schedule:
    """Velocity matching first, then annealing, then the episodic loss alone.

    Attributes:
        matching_steps: steps of matching alone, in which no episode is run.
        annealing_steps: the steps after them, over which the weight of matching falls linearly.
    """

    matching_steps: int = 0
    annealing_steps: int = 0

    def __post_init__(self) -> None:
        if self.matching_steps < 0 or self.annealing_steps < 0:
            raise ValueError(
                f"matching_steps={self.matching_steps} and annealing_steps={self.annealing_steps} must be >= 0."
            )

    @property
    def end_of_matching(self) -> int:
        """The first step in which matching has no weight."""
        return self.matching_steps + self.annealing_steps

    def weight(self, step: int) -> float:
        """The weight of matching in step 0, 1, ...; the episodic loss has the rest of one."""
        n_annealed = max(0, step - self.matching_steps + 1)
        return max(0.0, 1 - n_annealed / (self.annealing_steps + 1))

    def phase(self, step: int) -> str:
        """The name of what step 0, 1, ... does: "matching", "annealing" or "episodic"."""
        weight = self.weight(step)
        if weight == 1:
            return "matching"
        return "annealing" if weight > 0 else "episodic"

    def measured(self, step: int) -> tuple[str, ...]:
        """Those of `METRICS` that step 0, 1, ... measures."""
        weight = self.weight(step)
        if weight == 1:
            return ("loss", "matching_loss")
        if weight == 0:
            return ("loss", "episodic_loss", "accuracy")
        return METRICS


def draw_rows(n_rows: int, step: int, batch_size: int, seed: int) -> list[int]:
    """The rows of a matching step: the next ones of shuffled passes over all rows, a function of (seed, step) alone."""
    orders: dict[int, torch.Tensor] = {}
    rows = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, n_rows)
        if epoch not in orders:
            orders[epoch] = torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        rows.append(int(orders[epoch][place]))
    return rows


class ScheduledLoss(nn.Module):
    """Both losses behind one forward pass, as `DistributedDataParallel` wants it.

    Every row and every episode counts as one part of the step's whole batch. The losses of unequal shares of a batch,
    on any number of processes and in any number of parts, therefore add up to the loss of the whole.

    Args:
        adapter: what is trained.
        episodic: the episodic loss of `adapter`.
        matching: the velocity matching loss of `adapter`; None without trajectories.
    """

    def __init__(self, adapter: HyperFlowAdapter, episodic: EpisodicLoss, matching: VelocityMatchingLoss | None = None):
        super().__init__()
        self.adapter = adapter
        # In a tuple, so that the adapter is registered and saved only once.
        self._losses = (episodic, matching)

    def forward(
        self, episodes: list[EpisodeImages], rows: MatchingRows | None, weight: float, n_episodes: int, n_rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a share of a step's batch adds to the loss of the step.

        Args:
            episodes: of the share; not looked at where `weight` is one.
            rows: of the share; not looked at where `weight` is zero.
            weight: of matching, see `Schedule`.
            n_episodes, n_rows: sizes of the whole batch.

        Returns:
            The loss and, detached, `METRICS` `(4,)`, each of them the share's part of the mean over the whole batch.
        """
        episodic, matching = self._losses
        # Matching does not use the scale of the logits, and DDP wants a gradient for every parameter.
        zero = 0.0 * self.adapter.logit_scale
        episodic_loss, accuracy, matching_loss = zero, zero, zero
        if weight < 1:
            share = len(episodes) / n_episodes
            mean_loss, mean_accuracy = episodic(episodes)
            episodic_loss, accuracy = share * mean_loss, share * mean_accuracy
        if weight > 0:
            assert matching is not None, "a step of matching has trajectories"
            assert rows is not None, "a share of a matching step has rows"
            matching_loss = len(rows) / n_rows * matching(rows)
        loss = zero + weight * matching_loss + (1 - weight) * episodic_loss
        return loss, torch.stack([loss, episodic_loss, accuracy, matching_loss]).detach()
