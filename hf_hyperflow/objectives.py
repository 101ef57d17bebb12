"""What the drift network is trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from .adapter import HyperFlowAdapter
from .backbones import Hidden, SplitBackbone
from .prototypes import PrototypeClassifier
from .task_encoder import stack


@dataclass(frozen=True)
class EpisodeImages:
    """One task as the objective takes it.

    Attributes:
        pixel_values: `(n_support + n_query, 3, height, width)`, the support set first.
        support_labels, query_labels: 0..n_way-1.
    """

    pixel_values: torch.Tensor
    support_labels: torch.Tensor
    query_labels: torch.Tensor


class TaskObjective(nn.Module):
    """Query loss of a batch of tasks through the integrated weights.

    The drift network is integrated over the support set, theta(1) is written into the target and the cross-entropy of
    the query images against the support prototypes is taken, differentiable down to the drift network. The target's
    own weights stay as they are; its first blocks are run without gradients. This goes beyond the paper's matching of
    recorded velocities: nothing is imitated, so the result is not bounded by a teacher.

    Args:
        adapter: what is trained.
        split: the target; the adapter is injected into it.
    """

    def __init__(self, adapter: HyperFlowAdapter, split: SplitBackbone):
        super().__init__()
        self.adapter = adapter
        self._target = (split,)  # in a tuple, so that the target is no part of what is trained and saved
        self.start = adapter.space.inject(split.backbone).start

    @property
    def split(self) -> SplitBackbone:
        return self._target[0]

    def adapted_features(self, theta: torch.Tensor, hidden: Hidden) -> torch.Tensor:
        """Features `(n, width)` of the target with the adapter's weights `theta`, differentiable in theta."""
        self.adapter.space.inject(self.split.backbone)  # again, if another adapter was in between (a validation)
        tensors = self.adapter.space.to_tensors(theta)
        return functional_call(self.split, {f"backbone.{n}": t for n, t in tensors.items()}, (hidden,))

    def query_logits(self, theta: torch.Tensor, hidden: Hidden, episode: EpisodeImages) -> torch.Tensor:
        """Logits `(n_query, n_way)` against the prototypes of the support images."""
        features = self.adapted_features(theta, hidden).float()
        n_support = len(episode.support_labels)
        scale = self.adapter.log_scale.exp()
        classifier = PrototypeClassifier.from_support(features[:n_support], episode.support_labels, scale)
        return classifier(features[n_support:])

    def forward(self, episodes: list[EpisodeImages]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean query loss and the share of queries that are right, over the batch."""
        hiddens, tasks = [], []
        for episode in episodes:
            with torch.no_grad():
                hidden = self.split.prefix(episode.pixel_values)
                rows = slice(len(episode.support_labels))
                features, _ = self.adapter.support_features(self.split, episode.pixel_values[rows], hidden[rows])
            hiddens.append(hidden)
            tasks.append(self.adapter.task_encoder(features, episode.support_labels))
        z = self.adapter.flow(stack(tasks)).end
        losses, accuracies = [], []
        for z_task, hidden, episode in zip(z, hiddens, episodes, strict=True):
            logits = self.query_logits(self.start + self.adapter.token_scale * z_task.float(), hidden, episode)
            losses.append(F.cross_entropy(logits, episode.query_labels))
            accuracies.append((logits.argmax(-1) == episode.query_labels).float().mean())
        return torch.stack(losses).mean(), torch.stack(accuracies).mean()

    @torch.no_grad()
    def direct_accuracy(self, episodes: list[EpisodeImages]) -> torch.Tensor:
        """The share of queries that direct transfer, t = 0, gets right on the same episodes."""
        accuracies = []
        for episode in episodes:
            logits = self.query_logits(self.start, self.split.prefix(episode.pixel_values), episode)
            accuracies.append((logits.argmax(-1) == episode.query_labels).float().mean())
        return torch.stack(accuracies).mean()
