"""From the features of a support set to the tokens that condition the flow."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .prototypes import class_means


class TaskTokens(NamedTuple):
    """What the drift network knows of a batch of tasks.

    Attributes:
        classes: `(batch, n_way, width)`, one token per class, padded.
        present: `(batch, n_way)` bool, False on padding.
        task: `(batch, width)`, one token for the whole support set.
    """

    classes: torch.Tensor
    present: torch.Tensor
    task: torch.Tensor


def stack(tasks: list[TaskTokens]) -> TaskTokens:
    """Single tasks (`batch` 1) with any numbers of classes as one padded batch."""
    n_way = max(t.classes.shape[1] for t in tasks)
    classes = [F.pad(t.classes, (0, 0, 0, n_way - t.classes.shape[1])) for t in tasks]
    present = [F.pad(t.present, (0, n_way - t.present.shape[1])) for t in tasks]
    return TaskTokens(torch.cat(classes), torch.cat(present), torch.cat([t.task for t in tasks]))


def pool_tokens(states: torch.Tensor) -> torch.Tensor:
    """Hidden states to one vector per image, first token and mean of the rest: `(n, tokens, d)` to `(n, 2 d)`.

    A feature map `(n, channels, height, width)` gives its mean and its maximum: `(n, 2 channels)`.
    """
    if states.ndim == 4:
        return torch.cat([states.mean(dim=(2, 3)), states.amax(dim=(2, 3))], dim=-1)
    return torch.cat([states[:, 0], states[:, 1:].mean(dim=1)], dim=-1)


class TaskEncoder(nn.Module):
    """Class tokens from the mean and spread of each class's features, a task token from those of all classes.

    Means over images and over classes are all there is, so the order of neither matters.

    Args:
        feature_dim: length of the features from `pool_tokens`.
        width: length of the tokens.
    """

    def __init__(self, feature_dim: int, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(feature_dim, elementwise_affine=False)
        self.class_token = nn.Sequential(nn.Linear(2 * feature_dim + 1, width), nn.GELU(), nn.Linear(width, width))
        self.task_token = nn.Sequential(nn.Linear(3 * feature_dim + 2, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> TaskTokens:
        """Tokens of one task (batch 1) from features `(n, feature_dim)` and labels `(n,)` in 0..n_way-1."""
        features = self.norm(features.float())
        means = class_means(features, labels)
        spreads = class_means((features - means[labels]).abs(), labels)
        log_shots = torch.bincount(labels).to(features).log().unsqueeze(1)
        classes = self.class_token(torch.cat([means, spreads, log_shots], dim=1))
        centre = means.mean(dim=0)
        log_way = torch.full((1,), len(means), device=features.device).to(features).log()
        between = (means - centre).abs().mean(dim=0)
        task = self.task_token(torch.cat([centre, between, spreads.mean(dim=0), log_shots.mean(dim=0), log_way]))
        present = torch.ones(1, len(means), dtype=torch.bool, device=features.device)
        return TaskTokens(classes.unsqueeze(0), present, task.unsqueeze(0))
