"""The part of HyperFlow's gain that is its closed-form head's: the head on the features of the backbone as it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import Method, NearestPrototype
from .target import Images, Support


@dataclass(frozen=True)
class NoFlow(Method):
    """HyperFlow's features and head (plain cosines if the adapter has no other), with the backbone as it is.

    The head was fitted where the flow starts. With a learned start that was taken over from another training, this is
    not the backbone as it is, and a head that was fitted there would gain more.
    """

    name = "no-flow"
    label = "HyperFlow's head without the flow"

    def fit(self, support: Support) -> NearestPrototype:
        adapter = support.target.adapter
        return NearestPrototype(get_features, support, adapter.head, adapter.calibration)


def get_features(images: Images) -> torch.Tensor:
    return images.features
