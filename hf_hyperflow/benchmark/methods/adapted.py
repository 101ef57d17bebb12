"""A backbone with other weights in it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from ...modeling.backbones import SplitBackbone
from ...modeling.views import combine_views
from .target import Images, forward_hidden, forward_images


class Weights(Protocol):
    """Weights of a backbone that a method changes: those of a PEFT adapter (`Injection`), or all (`AllWeights`)."""

    def read(self) -> torch.Tensor:
        """A copy of the weights as they are now."""

    def using(self, theta: torch.Tensor) -> AbstractContextManager[None]:
        """Within, the weights are `theta`, as `read` gave it."""

    def tuning(self) -> AbstractContextManager[list[nn.Parameter]]:
        """The weights at their start, to be changed in place; afterwards they are at their start again."""


@dataclass(frozen=True)
class AdaptedBackbone:
    """A backbone as it is with the weights `theta`.

    Attributes:
        split: the backbone, split before the first block that has such weights.
        get_weights: finds the place of `theta` in the backbone, or makes it: another method may have removed it.
        theta: see `Weights.read`.
    """

    split: SplitBackbone
    get_weights: Callable[[], Weights]
    theta: torch.Tensor

    @torch.no_grad()
    def features(self, images: Images) -> torch.Tensor:
        """Features `(n, width)` float32, combined over the views of the images."""
        features = []
        with self.get_weights().using(self.theta):
            for view in images.views:
                if self.split.start == 0:
                    features.append(forward_images(self.split, view.pixel_values))
                else:
                    features.append(forward_hidden(self.split, view.hidden))
        return combine_views(features)
