"""Fine-tuning by gradient descent on one support set: the baseline that HyperFlow is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.image_processing_utils import BaseImageProcessor

from ..data.augmentation import random_views
from ..data.domains import normalise
from ..modeling.backbones import Hidden, SplitBackbone
from ..modeling.prototypes import PrototypeClassifier
from .speedups import plain_attention


@dataclass(frozen=True)
class FineTuningConfig:
    """How a backbone is fine-tuned on a support set, after PMF (Hu et al. 2022).

    In every step prototypes are made of clean support images, the cross-entropy of augmented support images is taken,
    and Adam makes a step.

    Attributes:
        steps: number of gradient steps.
        learning_rate: of Adam.
        scale: of the cosine logits in the loss.
        batch_size: how many support images give the prototypes of a step, and how many are classified. Both are drawn
            anew in every step, the same number of each class and at least one; a smaller support set is used whole.
        n_views: how many augmented views of each image there are to draw from, where the first blocks are frozen and
            need to run only once for each. Where they are trained, every step has new views.
        seed: of the batches and the augmentation.
    """

    steps: int = 50
    learning_rate: float = 1e-3
    scale: float = 10.0
    batch_size: int = 25
    n_views: int = 8
    seed: int = 0


def fine_tune(
    split: SplitBackbone,
    parameters: list[nn.Parameter],
    images: torch.Tensor,
    labels: torch.Tensor,
    processor: BaseImageProcessor,
    config: FineTuningConfig,
    *,
    run_steps: int | None = None,
    after_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Fine-tune `parameters` of a backbone on a support set, in place.

    Args:
        split: the backbone, split at 0 or where all that is tuned lies in the second half.
        parameters: what is tuned; everything else stays as it is.
        images: `(n, 3, height, width)` uint8, on the backbone's device.
        labels: `(n,)` in 0..n_way-1.
        processor: the image processor, for its mean and standard deviation.
        run_steps: stop after so many of the config's steps, to measure what a step costs. The frozen blocks are run as
            for all steps.
        after_step: called after each step with its number, which starts at 1.

    Returns:
        The loss of every step.
    """
    batches = draw_batches(labels.cpu(), config)
    source: _FreshViews | _ViewPool
    if split.start == 0:
        source = _FreshViews(split, images, processor, config)
    else:
        source = _ViewPool(split, images, processor, config, batches)
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
    losses = []
    with _trainable(parameters), plain_attention(split.backbone):
        for step, batch in enumerate(batches[:run_steps], start=1):
            clean, augmented = source.features(batch)
            classifier = PrototypeClassifier.from_support(clean, labels[batch.clean], config.scale)
            loss = F.cross_entropy(classifier(augmented), labels[batch.augmented])
            optimizer.zero_grad()
            loss.backward(inputs=parameters)
            optimizer.step()
            losses.append(loss.item())
            if after_step is not None:
                after_step(step)
    return losses


@contextmanager
def _trainable(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within, the parameters take gradients; afterwards their flags are as before and their gradients are gone."""
    flags = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = None


@dataclass(frozen=True)
class Batch:
    """The support images of one step.

    Attributes:
        clean: rows of the images that give the prototypes.
        augmented: rows of the images whose views are classified.
        views: which view of each of the latter is taken, 1..n_views, where there is a pool of views.
    """

    clean: torch.Tensor
    augmented: torch.Tensor
    views: torch.Tensor


def draw_batches(labels: torch.Tensor, config: FineTuningConfig) -> list[Batch]:
    """The batches of all steps, from labels `(n,)` on the CPU; a step's does not depend on how many steps follow."""
    generator = torch.Generator().manual_seed(2 * config.seed)
    rows_by_class = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
    per_class = max(1, config.batch_size // len(rows_by_class))
    batches = []
    for _ in range(config.steps):
        clean = _draw_rows(rows_by_class, per_class, generator)
        augmented = _draw_rows(rows_by_class, per_class, generator)
        views = torch.randint(1, config.n_views + 1, (len(augmented),), generator=generator)
        batches.append(Batch(clean, augmented, views))
    return batches


def _draw_rows(rows_by_class: list[torch.Tensor], per_class: int, generator: torch.Generator) -> torch.Tensor:
    """Up to `per_class` rows of each class, ascending."""
    drawn = []
    for rows in rows_by_class:
        drawn.append(rows[torch.randperm(len(rows), generator=generator)[:per_class]])
    return torch.cat(drawn).sort().values


def _view_generator(config: FineTuningConfig) -> torch.Generator:
    """The random numbers of the augmentation: another stream than the batches' for every seed."""
    return torch.Generator().manual_seed(2 * config.seed + 1)


class _FreshViews:
    """Features of batches where the whole backbone is trained: it is run whole, on new views in every step."""

    def __init__(
        self, split: SplitBackbone, images: torch.Tensor, processor: BaseImageProcessor, config: FineTuningConfig
    ):
        self.split = split
        self.images = images
        self.processor = processor
        self.generator = _view_generator(config)

    def features(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the clean images and of the views, `(n, width)` float32 each."""
        clean = normalise(self.images[batch.clean], self.processor)
        views = normalise(random_views(self.images[batch.augmented], self.generator), self.processor)
        features = self.split.forward_features(torch.cat([clean, views])).float()
        return features[: len(clean)], features[len(clean) :]


class _ViewPool:
    """Features of batches where the first blocks are frozen: they have run, once for each view that is drawn."""

    def __init__(
        self,
        split: SplitBackbone,
        images: torch.Tensor,
        processor: BaseImageProcessor,
        config: FineTuningConfig,
        batches: list[Batch],
    ):
        self.split = split
        generator = _view_generator(config)
        with torch.no_grad():
            # Of one image, so that what else the blocks are called with fits batches of any size.
            self.sample = split.forward_prefix(normalise(images[:1], processor))
            clean = split.forward_prefix(normalise(images, processor)).states
            # Row 0 is of the clean images, row v of their views number v, where a batch has drawn them.
            self.states = clean.new_zeros(config.n_views + 1, *clean.shape)
            self.states[0] = clean
            for view in range(1, config.n_views + 1):
                pixels = random_views(images, generator)
                drawn = _find_drawn(view, len(images), batches)
                if drawn.any():
                    self.states[view, drawn] = split.forward_prefix(normalise(pixels[drawn], processor)).states

    def features(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the clean images and of the views, `(n, width)` float32 each."""
        states = torch.cat([self.states[0, batch.clean], self.states[batch.views, batch.augmented]])
        hidden = Hidden(states, self.sample.args, self.sample.kwargs)
        features = self.split.forward_suffix(hidden).float()
        return features[: len(batch.clean)], features[len(batch.clean) :]


def _find_drawn(view: int, n_images: int, batches: list[Batch]) -> torch.Tensor:
    """For which images a batch has drawn view number `view`, `(n_images,)` bool."""
    drawn = torch.zeros(n_images, dtype=torch.bool)
    for batch in batches:
        drawn[batch.augmented[batch.views == view]] = True
    return drawn
