"""Mixed batches: each image is classified by a task of its own, and all of them run through the backbone together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..modeling.backbones import Hidden
from ..modeling.finite import find_bad_image, find_bad_row
from ..modeling.images import NamedImage, decode, is_one_image, process_images
from ..modeling.locks import get_lock
from ..modeling.prototypes import PrototypeClassifier
from ..modeling.queries import iterate_queries, require_count
from ..modeling.task import AdaptedTask
from ..modeling.trunks import eval_mode


def predict_mixed(tasks: Sequence[AdaptedTask], images: Any, *, batch_size: int = 64) -> list[str]:
    """The label of each image with the highest score, by its own task.

    Arguments and errors are those of `score_mixed`.
    """
    scores = score_mixed(tasks, images, batch_size=batch_size)
    return [task.class_names[int(row.argmax())] for task, row in zip(tasks, scores, strict=True)]


def score_mixed(tasks: Sequence[AdaptedTask], images: Any, *, batch_size: int = 64) -> list[torch.Tensor]:
    """Scores `(n_way,)` of each image by its own task, on the CPU: those of `AdaptedTask.scores` up to rounding.

    A batch takes about as long as one of a single task: the frozen blocks run once for all images, and in the adapted
    ones each image has the generated weights of its own task (`torch.func.vmap`). This works with any adapter, where
    PEFT's own mixed batches (`adapter_names`) are of LoRA.

    Threads may do what they may with the tasks alone. Views and rejection are of `AdaptedTask` alone.

    Args:
        tasks: the task of each image. They share a backbone; the same task can occur many times.
        images: as many images, in a form of `AdaptedTask.scores` that holds several.
        batch_size: how many images are run at a time.

    Raises:
        ValueError: there are not as many images as tasks, the tasks are of different backbones, `batch_size` is not an
            integer of at least 1, or a task has no image processor, and the images are not pixel values.
        ImageError, NotFiniteError, RuntimeError, IncompatibleBackboneError: see `AdaptedTask.scores`.
    """
    require_count("batch_size", batch_size)
    if is_one_image(images):
        raise ValueError("this is one image: give a list of images, or use the task itself.")
    if len({id(task.backbone) for task in tasks}) > 1:
        raise ValueError("the tasks are of different backbones: give those of one backbone at a time.")
    queries = list(iterate_queries(images, []))
    if len(queries) != len(tasks):
        raise ValueError(f"there are {len(queries)} images for {len(tasks)} tasks: name the task of each image.")
    scores = []
    pairs = zip(tasks, queries, strict=True)
    while batch := list(itertools.islice(pairs, batch_size)):
        logits = _classify_batch([task for task, _ in batch], [query for _, query in batch])
        scores += [row.softmax(-1).cpu() for row in logits]
    return scores


@torch.no_grad()
def _classify_batch(tasks: list[AdaptedTask], queries: list[NamedImage]) -> list[torch.Tensor]:
    """Logits `(n_way,)` of each image by its own task."""
    pixel_values = [_read(task, query) for task, query in zip(tasks, queries, strict=True)]
    prototypes = [task.prototypes for task in tasks]
    features: dict[int, torch.Tensor] = {}
    with get_lock(tasks[0].backbone), eval_mode(tasks[0].backbone):
        for rows in _group_rows(tasks, pixel_values):
            batch = torch.stack([pixel_values[row] for row in rows])
            features.update(zip(rows, _compute_features([tasks[row] for row in rows], batch), strict=True))
    logits = []
    for row, task in enumerate(tasks):
        own = features[row].unsqueeze(0)
        result = PrototypeClassifier(prototypes[row].to(own.device), task.scale)(own)
        image = pixel_values[row].unsqueeze(0)
        is_bad = find_bad_image(image) is not None or find_bad_row(own) is not None
        if is_bad or not result.isfinite().all():
            result = task._compute_logits(image, [queries[row].name])  # alone, the task says what is wrong
        logits.append(result[0])
    return logits


def _read(task: AdaptedTask, query: NamedImage) -> torch.Tensor:
    """Pixel values `(3, height, width)` of an image."""
    if isinstance(query.image, torch.Tensor):
        return query.image
    if task.processor is None:
        raise ValueError("this task has no image processor: give a tensor of pixel values.")
    return process_images([decode(query.image, query.name)], task.processor)[0]


def _group_rows(tasks: list[AdaptedTask], pixel_values: list[torch.Tensor]) -> list[list[int]]:
    """The rows of a batch that can be run together: of images of one size, and of tasks of one kind of adapter."""
    groups: dict[tuple, list[int]] = {}
    for row, (task, image) in enumerate(zip(tasks, pixel_values, strict=True)):
        split = task.split
        kind = (task.space.key, split.start, split.pooling, split.intermediate_weight, image.shape)
        groups.setdefault(kind, []).append(row)
    return list(groups.values())


def _compute_features(tasks: list[AdaptedTask], pixel_values: torch.Tensor) -> torch.Tensor:
    """Features `(n, width)` float32 of images `(n, 3, height, width)`, each with the weights of its own task.

    The tasks are of one kind. The caller holds the lock of the backbone, which is in evaluation mode.
    """
    split, space = tasks[0].split, tasks[0].space
    injection = space.inject(split.backbone)
    place = injection.parameters[0]
    hidden = split.forward_prefix(pixel_values.to(place.device, place.dtype))
    thetas = torch.stack([task.theta.to(place.device) for task in tasks])
    dtypes = [parameter.dtype for parameter in injection.parameters]

    def run(theta: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The features `(width,)` of one image."""
        tensors = {}
        for (name, tensor), dtype in zip(space.to_tensors(theta).items(), dtypes, strict=True):
            tensors[f"backbone.{name}"] = tensor.to(dtype)
        image = Hidden(states.unsqueeze(0), hidden.args, hidden.kwargs)
        return functional_call(split, tensors, (image,))[0]

    # On a CPU, vmap runs fused attention one image after the other; plain matrix products it runs for all at once.
    with sdpa_kernel(SDPBackend.MATH):
        return vmap(run)(thetas, hidden.states).float()
