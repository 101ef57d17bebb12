"""Fine-tuning by gradient descent: the baseline, and the teacher that the flow can imitate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .augmentation import random_views
from .backbones import SplitBackbone
from .domains import normalise
from .prototypes import PrototypeClassifier


@dataclass(frozen=True)
class FineTuning:
    """The recipe of PMF (Hu et al. 2022): prototypes of clean support, cross-entropy on augmented support, Adam.

    Attributes:
        steps: gradient steps.
        learning_rate: of Adam.
        scale: of the cosine logits in the loss.
        seed: of the augmentation.
    """

    steps: int = 50
    learning_rate: float = 1e-3
    scale: float = 10.0
    seed: int = 0


def fine_tune(
    split: SplitBackbone,
    parameters: list[nn.Parameter],
    images: torch.Tensor,
    labels: torch.Tensor,
    processor: object,
    recipe: FineTuning,
    *,
    after_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Fine-tune `parameters` of a backbone on a support set, in place.

    Args:
        split: the backbone. Its first blocks are run with the rest: they may be among what is trained.
        parameters: what moves; everything else is left alone.
        images: `(n, 3, height, width)` uint8, on the backbone's device.
        labels: `(n,)` in 0..n_way-1.
        processor: the image processor, for mean and standard deviation.
        after_step: called after every step with its number, 1 for the first.

    Returns:
        The loss of every step.
    """
    before = [p.requires_grad for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=recipe.learning_rate)
    generator = torch.Generator().manual_seed(recipe.seed)
    clean = normalise(images, processor)
    losses = []
    try:
        for step in range(1, recipe.steps + 1):
            views = normalise(random_views(images, generator), processor)
            features = split.extract(torch.cat([clean, views])).float()
            classifier = PrototypeClassifier.from_support(features[: len(images)], labels, recipe.scale)
            logits = classifier(features[len(images) :])
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward(inputs=parameters)
            optimizer.step()
            losses.append(loss.item())
            if after_step is not None:
                after_step(step)
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = None
    return losses
