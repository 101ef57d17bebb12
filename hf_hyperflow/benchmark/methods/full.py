"""Fine-tuning of all weights of the backbone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ...modeling.backbones import SplitBackbone
from .fine_tuning import FineTuning
from .target import Target


@dataclass(frozen=True)
class FullFineTuning(FineTuning):
    """Tunes every parameter of the backbone."""

    learning_rate: float = 3e-5

    grid_rates: ClassVar[tuple[float, ...]] = (3e-6, 1e-5, 3e-5, 1e-4)

    name = "full"
    label = "full fine-tuning"

    def get_weights(self, target: Target) -> AllWeights:
        target.unload()
        return AllWeights(target.backbone)

    def split(self, target: Target) -> SplitBackbone:
        return target.split_before(0)


class AllWeights:
    """All parameters of a model without an adapter; see `Weights`."""

    def __init__(self, model: nn.Module):
        self.parameters = list(model.parameters())

    @torch.no_grad()
    def read(self) -> torch.Tensor:
        """All parameters in one row."""
        return torch.cat([parameter.flatten() for parameter in self.parameters])

    @torch.no_grad()
    def write(self, theta: torch.Tensor) -> None:
        sizes = [parameter.numel() for parameter in self.parameters]
        for parameter, values in zip(self.parameters, theta.split(sizes), strict=True):
            parameter.copy_(values.view_as(parameter))

    @contextmanager
    def using(self, theta: torch.Tensor) -> Iterator[None]:
        """Within, the parameters are `theta`; afterwards they are what they were before."""
        with self.tuning():
            self.write(theta)
            yield

    @contextmanager
    def tuning(self) -> Iterator[list[nn.Parameter]]:
        """The parameters, to be changed in place; afterwards they are what they were before."""
        start = self.read()
        try:
            yield self.parameters
        finally:
            self.write(start)
