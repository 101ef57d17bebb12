"""The two losses that the drift network is trained on: the episodic loss and velocity matching."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..data.domains import Domain, normalise
from ..data.tasks import task_images
from ..finetuning.interpolants import INTERPOLANTS
from ..finetuning.merged_target import MergedTarget
from ..finetuning.speedups import unfused_attention
from ..finetuning.trajectories import Trajectories
from ..modeling.adapter import HyperFlowAdapter
from ..modeling.backbones import Hidden, SplitBackbone
from ..modeling.prototypes import PrototypeClassifier, no_autocast
from ..modeling.task_encoder import TaskTokens, stack
from .prefix_cache import ImageKey, PrefixCache

#: Scales of logits that an episode can have: the decimal logarithms of the least and the largest, and how many.
SCALES = (0.5, 2.3, 32)


@dataclass(frozen=True)
class EpisodeImages:
    """One episode, ready for the backbone.

    Attributes:
        pixel_values: `(n_support + n_query, 3, height, width)`, the support set first.
        support_labels, query_labels: `(n_support,)` and `(n_query,)` in 0..n_way-1.
        keys: a name for each image, under which its hidden states can be kept; None where they change their looks.
    """

    pixel_values: torch.Tensor
    support_labels: torch.Tensor
    query_labels: torch.Tensor
    keys: list[ImageKey] | None = None


class EpisodicLoss(nn.Module):
    """Cross-entropy of query images through the weights that the flow arrives at.

    The drift network is integrated for the support set, the backbone is run with the resulting weights, and its
    features of the query images are compared with the prototypes of the support set. All of it is differentiable down
    to the drift network; the backbone's own weights stay as they are. The paper matches recorded velocities instead.
    Here nothing is imitated, so the result is not bounded by a teacher.

    Every episode has the scale of logits that is best for it. With one scale for all, the flow would learn how sure the
    scores of a task should be, and unseen domains would pay for it in accuracy. That is left to `calibrate`. The
    adapter's `logit_scale` is trained beside, to the best one for all episodes.

    Args:
        adapter: what is trained.
        split: the backbone. The adapter is injected into it, and a copy of it is run.
        dtype: the precision of the autocast that the loss is computed under; None if it is computed without.
        cache_bytes: most memory for hidden states of images that are seen again, see `PrefixCache`.

    Attributes:
        target: the copy of the backbone.
        prefix: runs its first blocks.
        start: theta `(n_tokens, token_dim)` at t = 0.
    """

    def __init__(
        self,
        adapter: HyperFlowAdapter,
        split: SplitBackbone,
        *,
        dtype: torch.dtype | None = None,
        cache_bytes: int = 0,
    ):
        super().__init__()
        self.adapter = adapter
        self.target = MergedTarget(adapter.space, split, dtype)
        self.prefix = PrefixCache(self.target, cache_bytes, dtype)
        self.start = self.target.start

    def forward(self, episodes: list[EpisodeImages]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss and mean accuracy (0 to 1) of the query images, every episode counting the same."""
        losses, accuracies = [], []
        for episode, cosines in zip(episodes, self.query_cosines(episodes), strict=True):
            labels = episode.query_labels
            with_own_scale = F.cross_entropy(find_best_scale(cosines, labels) * cosines, labels)
            with_one_scale = F.cross_entropy(self.adapter.logit_scale.exp() * cosines.detach(), labels)
            losses.append(with_own_scale + (with_one_scale - with_one_scale.detach()))
            is_correct = cosines.argmax(-1) == labels
            accuracies.append(is_correct.float().mean())
        return torch.stack(losses).mean(), torch.stack(accuracies).mean()

    def query_cosines(self, episodes: list[EpisodeImages]) -> list[torch.Tensor]:
        """Products `(n_query, n_way)` of the queries of each episode with its prototypes; see `PrototypeClassifier`.

        The flow of all episodes is integrated as one batch.
        """
        hiddens = self.forward_prefix(episodes)
        tokens = [self._encode(episode, hidden) for episode, hidden in zip(episodes, hiddens, strict=True)]
        with unfused_attention(self.start.device):
            end = self.adapter.flow(stack(tokens)).end
        cosines = []
        for z, hidden, episode in zip(end, hiddens, episodes, strict=True):
            features = self.target.compute_features(self.adapter.theta(z, self.start), hidden)
            cosines.append(self._classify(features, episode))
        return cosines

    def forward_prefix(self, episodes: list[EpisodeImages]) -> list[Hidden]:
        """What the frozen blocks compute of all images of each episode."""
        keys: list[ImageKey | None] = []
        for episode in episodes:
            keys += episode.keys or [None] * len(episode.pixel_values)
        hidden = self.prefix.forward_prefix(torch.cat([episode.pixel_values for episode in episodes]), keys)
        states = hidden.states.split([len(episode.pixel_values) for episode in episodes])
        return [Hidden(part, hidden.args, hidden.kwargs) for part in states]

    def _encode(self, episode: EpisodeImages, hidden: Hidden) -> TaskTokens:
        """The task tokens of the support set."""
        support = slice(len(episode.support_labels))
        images = episode.pixel_values[support]
        tokens, _ = self.adapter.encode(self.target.split, images, episode.support_labels, hidden[support])
        return tokens

    def _classify(self, features: torch.Tensor, episode: EpisodeImages) -> torch.Tensor:
        """Products of the query images with the prototypes, from the features of all images of the episode."""
        n_support = len(episode.support_labels)
        features = features.float()
        classifier = PrototypeClassifier.from_support(
            features[:n_support], episode.support_labels, scale=1.0, head=self.adapter.head
        )
        return classifier(features[n_support:])


@torch.no_grad()
def find_best_scale(cosines: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The one of `SCALES` with the least cross-entropy of `scale * cosines`.

    Where a loss is least over the scale, its gradient is that of the loss with this scale held fixed.

    Args:
        cosines: `(n, n_way)`.
        labels: `(n,)`.
    """
    scales = torch.logspace(*SCALES, device=cosines.device)
    logits = scales.view(-1, 1, 1) * cosines
    losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(scales)), reduction="none")
    return scales[losses.view(len(scales), -1).mean(dim=1).argmin()]


@dataclass(frozen=True)
class MatchingRows:
    """Recorded trajectories, each with the time at which its velocity is matched.

    Attributes:
        support: for each row the features `(n_support, feature_dim)` and labels `(n_support,)` of its support set.
        deltas: `(n_rows, n_points, n_tokens, token_dim)`, recorded theta minus the adapter's start.
        t: `(n_rows,)`, 0 or more.
        masked: `(n_rows,)` bool, whether the drift network gets zero in place of z.
    """

    support: list[tuple[torch.Tensor, torch.Tensor]]
    deltas: torch.Tensor
    t: torch.Tensor
    masked: torch.Tensor

    def __len__(self) -> int:
        return len(self.t)


class VelocityMatchingLoss(nn.Module):
    """Squared error between the drift and the velocity of recorded fine-tuning (HyperFlow, arXiv 2504.15323, eq. 5).

    Velocities are compared in the units of the flow, z = (theta - start) / token_scale, at points of a curve through
    the recorded ones. From t = 1 on the velocity to learn is zero, so that the flow stays where the teacher stopped.

    On a straight curve the velocity is (z - z(0)) / t for every task, so z alone tells where a trajectory is going. A
    drift network that learns only this is right on the recorded curves and lost off them, which is where the flow
    runs. In masked rows z is therefore zero, and the velocity has to be told from the support set.

    Args:
        adapter: what is trained.
        times: `(n_points,)` from 0 to 1, when the points of the trajectories were recorded.
        interpolant: "linear", "piecewise" or "cubic", see `hf_hyperflow.finetuning.interpolants`.

    Raises:
        ValueError: an unknown interpolant.
    """

    times: torch.Tensor

    def __init__(self, adapter: HyperFlowAdapter, times: torch.Tensor, *, interpolant: str = "linear"):
        super().__init__()
        if interpolant not in INTERPOLANTS:
            raise ValueError(f"unknown interpolant {interpolant!r}: use one of {', '.join(INTERPOLANTS)}.")
        self.adapter = adapter
        self.interpolate = INTERPOLANTS[interpolant]
        self.register_buffer("times", times.float(), persistent=False)

    def forward(self, rows: MatchingRows) -> torch.Tensor:
        """The mean over rows and over the parameters of the adapter, without the padding of theta."""
        tokens = stack([self.adapter.task_encoder(features, labels) for features, labels in rows.support])
        points = rows.deltas.float() / self.adapter.token_scale
        with no_autocast(points):
            z, velocity = self.interpolate(points, self.times.to(rows.t.device), rows.t)
        z = z * ~rows.masked.view(-1, 1, 1)
        mask = self.adapter.space.mask.to(z.device)
        with unfused_attention(z.device):
            predicted = self.adapter.velocity(z, rows.t, tokens)
        error = (predicted.float() - velocity) * mask
        return error.square().sum() / (len(rows) * mask.sum())


@torch.no_grad()
def encode_recorded_support(
    adapter: HyperFlowAdapter, split: SplitBackbone, trajectories: Trajectories, domains: list[Domain]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Features of the support set of every recorded task. The support encoder is frozen, so once is enough.

    Returns:
        For each row features `(n_support, feature_dim)`, float16 on the CPU, and labels `(n_support,)`.
    """
    assert adapter.processor is not None, "an adapter in training has an image processor"
    domains_by_name = {domain.name: domain for domain in domains}
    parameter = next(split.backbone.parameters())
    encoded = []
    for task in trajectories.tasks:
        episode = task.episode
        images = task_images(task, domains_by_name[episode.domain], parameter.device)
        support_images = images[: len(episode.support)]
        pixel_values = normalise(support_images, adapter.processor).to(parameter.dtype)
        features, _ = adapter.encode_images(split, pixel_values)
        encoded.append((features.half().cpu(), episode.support_labels))
    return encoded
