"""From imitating a teacher to what counts: the schedule of the two objectives, behind one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..modeling.adapter import HyperFlowAdapter
from .objectives import EpisodeImages, EpisodicLoss, VelocityMatchingLoss

#: What `ScheduledLoss` measures, in this order.
METRICS = ("loss", "task_loss", "accuracy", "matching_loss")


@dataclass(frozen=True)
class Schedule:
    """Matching of recorded trajectories first, then a blend, then the task objective alone.

    Attributes:
        matching_steps: steps of matching only, in which no episode is run.
        annealing_steps: the steps after them, over which the weight of matching falls linearly.
    """

    matching_steps: int = 0
    annealing_steps: int = 0

    def __post_init__(self) -> None:
        if self.matching_steps < 0 or self.annealing_steps < 0:
            raise ValueError(
                f"matching_steps={self.matching_steps} and annealing_steps={self.annealing_steps} must be >= 0."
            )

    def weight(self, step: int) -> float:
        """The weight of matching in step 0, 1, ...; the task objective has the rest of one."""
        into_blend = max(0, step - self.matching_steps + 1)
        return max(0.0, 1 - into_blend / (self.annealing_steps + 1))

    def phase(self, step: int) -> str:
        """The name of what step 0, 1, ... does: "matching", "blend" or "task"."""
        weight = self.weight(step)
        return "matching" if weight == 1 else "blend" if weight else "task"


@dataclass(frozen=True)
class MatchingRows:
    """Recorded trajectories as the matching objective takes them.

    Attributes:
        support: of each row the support images' features `(n_support, feature_dim)` and labels `(n_support,)`.
        deltas: `(n_rows, n_points, n_tokens, token_dim)`, theta minus the adapter's start.
        t: `(n_rows,)`, the time at which the velocity of each is compared.
        hidden: `(n_rows,)` bool, whether the drift network must do without knowing where the trajectory is.
    """

    support: list[tuple[torch.Tensor, torch.Tensor]]
    deltas: torch.Tensor
    t: torch.Tensor
    hidden: torch.Tensor


def rows_of_step(n_rows: int, step: int, batch_size: int, seed: int) -> list[int]:
    """Rows of a matching step: the next ones of shuffled passes over all rows, a function of (seed, step) alone."""
    orders: dict[int, torch.Tensor] = {}
    rows = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, n_rows)
        if epoch not in orders:
            orders[epoch] = torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        rows.append(int(orders[epoch][place]))
    return rows


class ScheduledLoss(nn.Module):
    """Both objectives behind one forward pass, as `DistributedDataParallel` wants it.

    Returns sums in which every row and episode counts as one part of the step's batch, so that the losses of unequal
    shares of the batch, on any number of processes and in any number of parts, add up to that of the whole.

    Args:
        adapter: what is trained.
        task: the task objective of `adapter`.
        matching: the matching objective of `adapter`; None without trajectories.
    """

    def __init__(self, adapter: HyperFlowAdapter, task: EpisodicLoss, matching: VelocityMatchingLoss | None = None):
        super().__init__()
        self.adapter = adapter
        self._objectives = (task, matching)  # in a tuple, so that the adapter is registered and saved only once

    def forward(
        self, episodes: list[EpisodeImages], rows: MatchingRows | None, weight: float, n_episodes: int, n_rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The part of a step's loss that a share of its batch makes up.

        Args:
            episodes: the share's; not looked at where `weight` is one.
            rows: the share's; not looked at where `weight` is zero.
            weight: of matching, see `Schedule`.
            n_episodes, n_rows: of the step's whole batch.

        Returns:
            The loss and, detached, `METRICS` `(4,)`, each the share's part of the mean over the whole batch.
        """
        task, matching = self._objectives
        zero = 0.0 * self.adapter.logit_scale  # matching does not use the scale; DDP wants a gradient of everything
        task_loss, accuracy, matching_loss = zero, zero, zero
        if weight < 1:
            share = len(episodes) / n_episodes
            task_loss, accuracy = (share * value for value in task(episodes))
        if weight > 0:
            matching_loss = len(rows.t) / n_rows * matching(rows.support, rows.deltas, rows.t, rows.hidden)
        loss = zero + weight * matching_loss + (1 - weight) * task_loss
        return loss, torch.stack([loss, task_loss, accuracy, matching_loss]).detach()
