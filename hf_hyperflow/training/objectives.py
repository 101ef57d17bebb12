"""What the drift network is trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from ..data.domains import Domain, normalise
from ..data.tasks import task_images
from ..finetuning.interpolants import INTERPOLANTS
from ..finetuning.speedups import cls_only_last_mlp, plain_attention
from ..finetuning.trajectories import Trajectories
from ..modeling.adapter import HyperFlowAdapter
from ..modeling.backbones import Hidden, SplitBackbone
from ..modeling.prototypes import PrototypeClassifier, no_autocast
from ..modeling.task_encoder import stack


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


class EpisodicLoss(nn.Module):
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
        with plain_attention(self.split.backbone), cls_only_last_mlp(self.split, hidden[:1]):
            return functional_call(self.split, {f"backbone.{n}": t for n, t in tensors.items()}, (hidden,))

    def query_logits(self, theta: torch.Tensor, hidden: Hidden, episode: EpisodeImages) -> torch.Tensor:
        """Logits `(n_query, n_way)` against the prototypes of the support images."""
        features = self.adapted_features(theta, hidden).float()
        n_support = len(episode.support_labels)
        scale = self.adapter.logit_scale.exp()
        classifier = PrototypeClassifier.from_support(
            features[:n_support], episode.support_labels, scale, self.adapter.head
        )
        return classifier(features[n_support:])

    def forward(self, episodes: list[EpisodeImages]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean query loss and the share of queries that are right, over the batch."""
        hiddens, tasks = [], []
        for episode in episodes:
            with torch.no_grad():
                hidden = self.split.forward_prefix(episode.pixel_values)
                rows = slice(len(episode.support_labels))
                features, _ = self.adapter.encode_images(self.split, episode.pixel_values[rows], hidden[rows])
            hiddens.append(hidden)
            tasks.append(self.adapter.task_encoder(features, episode.support_labels))
        z = self.adapter.flow(stack(tasks)).end
        losses, accuracies = [], []
        for z_task, hidden, episode in zip(z, hiddens, episodes, strict=True):
            logits = self.query_logits(self.adapter.theta(z_task, self.start), hidden, episode)
            losses.append(F.cross_entropy(logits, episode.query_labels))
            accuracies.append((logits.argmax(-1) == episode.query_labels).float().mean())
        return torch.stack(losses).mean(), torch.stack(accuracies).mean()

    @torch.no_grad()
    def direct_accuracy(self, episodes: list[EpisodeImages]) -> torch.Tensor:
        """The share of queries that direct transfer, t = 0, gets right on the same episodes."""
        accuracies = []
        for episode in episodes:
            logits = self.query_logits(self.start, self.split.forward_prefix(episode.pixel_values), episode)
            accuracies.append((logits.argmax(-1) == episode.query_labels).float().mean())
        return torch.stack(accuracies).mean()


class VelocityMatchingLoss(nn.Module):
    """Squared error between the drift and the velocity of recorded fine-tuning (HyperFlow, arXiv 2504.15323, eq. 5).

    Velocities are compared in scaled units, z = (theta - start) / token_scale, at points of a path through the
    recorded ones. From t = 1 on the velocity to learn is zero: the flow stays where the teacher stopped.

    Where a trajectory is tells where it is going: on a straight path the velocity is (z - z(0)) / t, whatever the
    task. A drift network that learns this is right on the recorded paths and lost off them, where the flow is. So
    for some of the rows z is hidden (zero), and the velocity must come from the support set. Measured on 256
    trajectories of a ViT-S without: cosine 0.78 on the recorded path and 0.26 along the flow, which ended farther
    from the teacher's endpoint (1.11) than it began (1).

    Args:
        adapter: what is trained.
        times: `(n_points,)`, when the points of the trajectories were recorded, 0 to 1.
        path: "linear", "piecewise" or "cubic", see `hf_hyperflow.finetuning.interpolants`.

    Raises:
        ValueError: an unknown path.
    """

    def __init__(self, adapter: HyperFlowAdapter, times: torch.Tensor, *, path: str = "linear"):
        super().__init__()
        if path not in INTERPOLANTS:
            raise ValueError(f"unknown path {path!r}: use one of {', '.join(INTERPOLANTS)}.")
        self.adapter = adapter
        self.path = INTERPOLANTS[path]
        self.register_buffer("times", times.float(), persistent=False)

    def forward(
        self,
        support: list[tuple[torch.Tensor, torch.Tensor]],
        deltas: torch.Tensor,
        t: torch.Tensor,
        hidden: torch.Tensor,
    ) -> torch.Tensor:
        """The mean over rows and over parameters, padding left out.

        Args:
            support: of each row the features `(n_support, feature_dim)` and labels `(n_support,)` of its images.
            deltas: `(n_rows, n_points, n_tokens, token_dim)`, recorded theta minus the adapter's start.
            t: `(n_rows,)`, 0 or more.
            hidden: `(n_rows,)` bool, where the drift network gets zero instead of z.
        """
        tasks = stack([self.adapter.task_encoder(features, labels) for features, labels in support])
        points = deltas.float() / self.adapter.token_scale
        with no_autocast(points):
            z, velocity = self.path(points, self.times.to(t.device), t)
        z = z * ~hidden.view(-1, 1, 1)
        mask = self.adapter.space.mask.to(z.device)
        difference = (self.adapter.velocity(z, t, tasks).float() - velocity) * mask
        return difference.square().sum() / (len(t) * mask.sum())


@torch.no_grad()
def encode_recorded_support(
    adapter: HyperFlowAdapter, split: SplitBackbone, trajectories: Trajectories, domains: list[Domain]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the support encoder, which is frozen, makes of every recorded task's support images.

    Returns:
        For each row features `(n_support, feature_dim)`, float16 on the CPU, and labels `(n_support,)`.
    """
    by_name = {domain.name: domain for domain in domains}
    parameter = next(split.backbone.parameters())
    found = []
    for task in trajectories.tasks:
        episode = task.episode
        images = task_images(task, by_name[episode.domain], parameter.device)[: len(episode.support)]
        pixel_values = normalise(images, adapter.processor).to(parameter.dtype)
        features, _ = adapter.encode_images(split, pixel_values)
        found.append((features.half().cpu(), episode.support_labels))
    return found
