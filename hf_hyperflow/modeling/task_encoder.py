"""The task encoder: from the features of a support set to the tokens that condition the flow."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .prototypes import means_by_class


class TaskTokens(NamedTuple):
    """What the drift network is told about a batch of tasks.

    Attributes:
        classes: `(batch, n_way, width)`, one token per class, padded.
        present: `(batch, n_way)` bool, False on padding.
        task: `(batch, width)`, one token for the whole support set.
    """

    classes: torch.Tensor
    present: torch.Tensor
    task: torch.Tensor


def stack(tasks: list[TaskTokens]) -> TaskTokens:
    """Join single tasks (batch 1) with any numbers of classes into one padded batch."""
    n_way = max(tokens.classes.shape[1] for tokens in tasks)
    classes, present, task = [], [], []
    for tokens in tasks:
        n_missing = n_way - tokens.classes.shape[1]
        classes.append(F.pad(tokens.classes, (0, 0, 0, n_missing)))
        present.append(F.pad(tokens.present, (0, n_missing)))
        task.append(tokens.task)
    return TaskTokens(torch.cat(classes), torch.cat(present), torch.cat(task))


def pool_tokens(states: torch.Tensor) -> torch.Tensor:
    """Pool hidden states to one vector per image.

    Tokens `(n, tokens, d)` give the CLS token and the mean of the others, `(n, 2 d)`. A feature map
    `(n, channels, height, width)` gives its mean and its maximum, `(n, 2 channels)`.
    """
    if states.ndim == 4:
        return torch.cat([states.mean(dim=(2, 3)), states.amax(dim=(2, 3))], dim=-1)
    return torch.cat([states[:, 0], states[:, 1:].mean(dim=1)], dim=-1)


class TaskEncoder(nn.Module):
    """Encodes a support set as one token per class and one token for the whole task.

    A class token is computed from the mean and the spread of the features of its images, the task token from those of
    all classes. Both see means over images and over classes only, so the order of neither matters.

    Args:
        feature_dim: length of the features that `pool_tokens` returns.
        width: length of the tokens.
    """

    def __init__(self, feature_dim: int, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(feature_dim, elementwise_affine=False)
        self.class_token = nn.Sequential(nn.Linear(2 * feature_dim + 1, width), nn.GELU(), nn.Linear(width, width))
        self.task_token = nn.Sequential(nn.Linear(3 * feature_dim + 2, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, features: torch.Tensor, labels: torch.Tensor, one_hot: torch.Tensor | None = None) -> TaskTokens:
        """Tokens of one task (batch 1) from features `(n, feature_dim)` and labels `(n,)` in 0..n_way-1.

        A graph that is traced for any number of classes needs the labels as one-hot rows `(n, n_way)`, too.
        """
        one_hot = F.one_hot(labels) if one_hot is None else one_hot
        features = self.norm(features.float())
        means = means_by_class(features, one_hot)
        spreads = means_by_class((features - means[labels]).abs(), one_hot)
        log_shots = one_hot.sum(dim=0).to(features).log().unsqueeze(1)
        dtype = next(self.parameters()).dtype  # of an adapter in half precision; the means are taken in float32
        classes = self.class_token(torch.cat([means, spreads, log_shots], dim=1).to(dtype))
        centre = means.mean(dim=0)
        between = (means - centre).abs().mean(dim=0)
        log_way = torch.ones_like(log_shots).sum(dim=0).log()
        whole = torch.cat([centre, between, spreads.mean(dim=0), log_shots.mean(dim=0), log_way])
        task = self.task_token(whole.to(dtype))
        present = torch.ones(1, means.shape[0], dtype=torch.bool, device=features.device)
        return TaskTokens(classes.unsqueeze(0), present, task.unsqueeze(0))
