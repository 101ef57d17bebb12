"""One displacement for all tasks: what a flow that reads its support set has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import Method, NearestPrototype
from .hyperflow import flow_features
from .target import Support


@dataclass(frozen=True, eq=False)
class SharedWeights(Method):
    """The same weights of the adapter for every task, with the adapter's head.

    Attributes:
        theta: the weights, `(n_tokens, token_dim)`.
    """

    theta: torch.Tensor

    name = "shared-weights"
    label = "the same weights for all tasks"

    def fit(self, support: Support) -> NearestPrototype:
        adapter = support.target.adapter
        return NearestPrototype(flow_features(support, self.theta), support, adapter.head, adapter.calibration)
