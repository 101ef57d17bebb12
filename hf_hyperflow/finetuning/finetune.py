"""Fine-tuning by gradient descent: the baseline, and the teacher that the flow can imitate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..data.augmentation import random_views
from ..data.domains import normalise
from ..modeling.backbones import Hidden, SplitBackbone
from ..modeling.prototypes import PrototypeClassifier
from .speedups import first_token_in_last_mlp, plain_attention


@dataclass(frozen=True)
class FineTuningConfig:
    """The recipe of PMF (Hu et al. 2022): prototypes of clean support, cross-entropy on augmented support, Adam.

    Attributes:
        steps: gradient steps.
        learning_rate: of Adam.
        scale: of the cosine logits in the loss.
        batch_size: support images that give the prototypes of a step, and as many whose views are classified: the same
            number of each class (at least one), both drawn anew in every step. All of them where there are no more.
        n_views: augmented views in each image's pool, of which every step draws one for every image, where the first
            blocks are frozen: they run once for each view that is drawn. Where they are trained, every step has new
            views.
        seed: of the augmentation.
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
    processor: object,
    recipe: FineTuningConfig,
    *,
    only: int | None = None,
    after_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Fine-tune `parameters` of a backbone on a support set, in place.

    Args:
        split: the backbone, cut at 0 or where all that moves is behind the cut.
        parameters: what moves; everything else is left alone.
        images: `(n, 3, height, width)` uint8, on the backbone's device.
        labels: `(n,)` in 0..n_way-1.
        processor: the image processor, for mean and standard deviation.
        only: run only the first so many of the recipe's steps, to see what a step costs: the frozen blocks are run on
            all views that the whole recipe draws.
        after_step: called after every step with its number, 1 for the first. Features are as ever then; tokens that
            no feature is made of may not be.

    Returns:
        The loss of every step.
    """
    batches = draw_batches(labels.cpu(), recipe)
    sample, compute_features = _clean_and_augmented(split, images, processor, recipe, batches)
    before = [p.requires_grad for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=recipe.learning_rate)
    losses = []
    try:
        with plain_attention(split.backbone), first_token_in_last_mlp(split, sample):
            for step, batch in enumerate(batches[:only], start=1):
                clean, augmented = labels[batch.clean], labels[batch.augmented]
                features = compute_features(batch).float()
                classifier = PrototypeClassifier.from_support(features[: len(clean)], clean, recipe.scale)
                loss = F.cross_entropy(classifier(features[len(clean) :]), augmented)
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


@dataclass(frozen=True)
class Batch:
    """The support images of a step.

    Attributes:
        clean: rows of those that give the prototypes.
        augmented: rows of those whose views are classified.
        views: which view of each of the latter, 1..n_views, where there is a pool.
    """

    clean: torch.Tensor
    augmented: torch.Tensor
    views: torch.Tensor


def draw_batches(labels: torch.Tensor, recipe: FineTuningConfig) -> list[Batch]:
    """The support images of every step, from labels `(n,)` on the CPU; a step's do not depend on how many follow."""
    generator = torch.Generator().manual_seed(2 * recipe.seed)
    classes = [(labels == label).nonzero().flatten() for label in labels.unique()]
    room = max(1, recipe.batch_size // len(classes))

    def drawn() -> torch.Tensor:
        chosen = [rows[torch.randperm(len(rows), generator=generator)[:room]] for rows in classes]
        return torch.cat(chosen).sort().values

    batches = []
    for _ in range(recipe.steps):
        clean, augmented = drawn(), drawn()
        views = torch.randint(1, recipe.n_views + 1, (len(augmented),), generator=generator)
        batches.append(Batch(clean, augmented, views))
    return batches


def _clean_and_augmented(
    split: SplitBackbone, images: torch.Tensor, processor: object, recipe: FineTuningConfig, batches: list[Batch]
) -> tuple[Hidden, Callable[[Batch], torch.Tensor]]:
    """One image behind the first blocks, and a function of features.

    Of a batch it gives those of its clean images and then those of its views, `(n_clean + n_augmented, width)`.
    """
    generator = torch.Generator().manual_seed(2 * recipe.seed + 1)
    clean = normalise(images, processor)
    with torch.no_grad():
        sample = split.forward_prefix(clean[:1])
    if split.start == 0:

        def whole(batch: Batch) -> torch.Tensor:
            views = normalise(random_views(images[batch.augmented], generator), processor)
            return split.forward_features(torch.cat([clean[batch.clean], views]))

        return sample, whole

    pool = sample.states.new_zeros(recipe.n_views + 1, len(images), *sample.states.shape[1:])
    with torch.no_grad():
        pool[0] = split.forward_prefix(clean).states
        for view in range(1, recipe.n_views + 1):
            views = normalise(random_views(images, generator), processor)
            used = torch.zeros(len(images), dtype=torch.bool)
            for batch in batches:
                used[batch.augmented[batch.views == view]] = True
            if used.any():
                pool[view, used] = split.forward_prefix(views[used]).states

    def behind(batch: Batch) -> torch.Tensor:
        states = torch.cat([pool[0, batch.clean], pool[batch.views, batch.augmented]])
        return split.forward_suffix(Hidden(states, sample.args, sample.kwargs))

    return sample, behind
