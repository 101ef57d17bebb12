"""Direct transfer: the backbone as it is, with plain cosines to the class means (Snell et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from ...modeling.calibration import COSINE_SCALE
from .base import Method, NearestPrototype
from .target import Images, Support

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class DirectTransfer(Method):
    """Cosines to class means of the last block's features, with the backbone as it is.

    Attributes:
        scale: the inverse temperature of its logits. Predicted labels do not depend on it, the log loss does.
        grid_scales: those that a grid search tries.
    """

    scale: float = COSINE_SCALE

    grid_scales: ClassVar[tuple[float, ...]] = (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 18, 20, 24, 28, 40)

    name = "direct"
    label = "direct transfer"
    is_chosen_by_log_loss = True

    def hyperparameters(self) -> dict[str, int | float]:
        return {"scale": self.scale}

    def grid(self) -> list[list[Self]]:
        return [[replace(self, scale=scale)] for scale in self.grid_scales]

    def fit(self, support: Support) -> NearestPrototype:
        return NearestPrototype(get_final_features, support, scale=self.scale)


def get_final_features(images: Images) -> torch.Tensor:
    return images.final_features
