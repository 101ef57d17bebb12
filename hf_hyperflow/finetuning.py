"""Fine-tuning by gradient descent: the baseline, and the teacher that the flow can imitate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .augmentation import random_views
from .backbones import Hidden, SplitBackbone, plain_attention
from .domains import normalise
from .first_token import first_token_in_last_mlp
from .prototypes import PrototypeClassifier


@dataclass(frozen=True)
class FineTuning:
    """The recipe of PMF (Hu et al. 2022): prototypes of clean support, cross-entropy on augmented support, Adam.

    Attributes:
        steps: gradient steps.
        learning_rate: of Adam.
        scale: of the cosine logits in the loss.
        n_views: augmented views in each image's pool, of which every step draws one for every image, where the first
            blocks are frozen: they run once for each view. Where they are trained, every step has new views.
        seed: of the augmentation.
    """

    steps: int = 50
    learning_rate: float = 1e-3
    scale: float = 10.0
    n_views: int = 8
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
        split: the backbone, cut at 0 or where all that moves is behind the cut.
        parameters: what moves; everything else is left alone.
        images: `(n, 3, height, width)` uint8, on the backbone's device.
        labels: `(n,)` in 0..n_way-1.
        processor: the image processor, for mean and standard deviation.
        after_step: called after every step with its number, 1 for the first. Features are as ever then; tokens that
            no feature is made of may not be.

    Returns:
        The loss of every step.
    """
    sample, features_of_step = _clean_and_augmented(split, images, processor, recipe)
    before = [p.requires_grad for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=recipe.learning_rate)
    losses = []
    try:
        with plain_attention(split.backbone), first_token_in_last_mlp(split, sample):
            for step in range(1, recipe.steps + 1):
                features = features_of_step().float()
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


def _clean_and_augmented(
    split: SplitBackbone, images: torch.Tensor, processor: object, recipe: FineTuning
) -> tuple[Hidden, Callable[[], torch.Tensor]]:
    """One image behind the first blocks, and a function of features.

    At every call it gives those of the images and then of a view of each, `(2 n, width)`.
    """
    generator, n = torch.Generator().manual_seed(recipe.seed), len(images)
    clean = normalise(images, processor)

    def view() -> torch.Tensor:
        return normalise(random_views(images, generator), processor)

    if split.start == 0:
        with torch.no_grad():
            sample = split.prefix(clean[:1])
        return sample, lambda: split.extract(torch.cat([clean, view()]))
    with torch.no_grad():
        pool = [split.prefix(clean), *(split.prefix(view()) for _ in range(recipe.n_views))]
    states = torch.stack([hidden.states for hidden in pool])

    def drawn() -> torch.Tensor:
        choices = torch.cat([torch.zeros(n, dtype=torch.long), torch.randint(1, len(pool), (n,), generator=generator)])
        return split(Hidden(states[choices, torch.arange(n).repeat(2)], pool[0].args, pool[0].kwargs))

    return pool[0][:1], drawn
