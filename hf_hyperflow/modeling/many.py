"""Many support sets at once: how they are read, and how the flow follows a group of them together."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.image_processing_utils import BaseImageProcessor

from .backbones import Hidden, SplitBackbone
from .dataset_images import is_dataset
from .finite import NotFiniteError
from .images import ImageError
from .injection import Injection, unload
from .locks import get_lock
from .parameter_space import ParameterSpace
from .solvers import ADAPTIVE
from .support import SupportSet, SupportSetError, read_support
from .task_encoder import TaskTokens, stack
from .trunks import IncompatibleBackboneError

if TYPE_CHECKING:
    from .flow import Flow, WeightPath

#: The errors that a support set can cause, the general ones first.
_ERRORS = (ValueError, SupportSetError, ImageError, NotFiniteError, IncompatibleBackboneError, FileNotFoundError)


@dataclass(frozen=True)
class NamedSupport:
    """One of many support sets.

    Attributes:
        name: what errors call it.
        images: on the backbone's device and in its precision.
    """

    name: str
    images: SupportSet


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Within, errors about a support set begin with its name."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        kind: type[Exception] = ValueError
        for known in _ERRORS:
            if isinstance(error, known):
                kind = known
        raise kind(f"{name}: {error}") from error


@contextmanager
def unloaded_after_error(space: ParameterSpace, backbone: nn.Module) -> Iterator[None]:
    """An error within takes the adapter out of the backbone, unless it was there before."""
    was_in = space.is_in(backbone)
    try:
        yield
    except BaseException:
        with get_lock(backbone):
            if not was_in and space.is_in(backbone):
                unload(backbone)
        raise


def read_groups(
    supports: Any, backbone: nn.Module, processor: BaseImageProcessor | None, n_images: int, skip_bad: bool
) -> Iterator[list[NamedSupport]]:
    """Yield support sets in groups of about `n_images` images. They are read when the group is asked for.

    A support set is never divided, so that a group of a single large one can have more images.

    Args:
        supports: an iterable of support sets in the forms of `read_support`, or a mapping of names to them.
        backbone: on whose device and in whose precision the images are wanted.
        processor: its image processor.
        skip_bad: leave out images that cannot be read, with a warning.

    Raises:
        SupportSetError, ImageError, FileNotFoundError, ValueError: see `read_support`. The support set is named.
    """
    group: list[NamedSupport] = []
    n_waiting = 0
    for name, support in _iterate_supports(supports):
        with naming(name):
            images = read_support(support, processor, skip_bad=skip_bad)
        if images.skipped and images is not support:
            # Shown to whoever called `adapt_many`: two frames of torch and ours lie between.
            warnings.warn(f"{name}: left out: {' '.join(images.skipped)}", stacklevel=4)
        parameter = next(backbone.parameters())
        group.append(NamedSupport(name, images.to(parameter.device, parameter.dtype)))
        n_waiting += len(images.labels)
        if n_waiting >= n_images:
            yield group
            group, n_waiting = [], 0
    if group:
        yield group


def _iterate_supports(supports: Any) -> Iterator[tuple[str, Any]]:
    """Yield support sets with what errors call them."""
    is_tensors = isinstance(supports, tuple) and any(isinstance(item, torch.Tensor) for item in supports)
    is_single = isinstance(supports, SupportSet | str | os.PathLike | torch.Tensor)
    if is_tensors or is_single or is_dataset(supports) or not isinstance(supports, Iterable):
        raise SupportSetError(
            f"a {type(supports).__name__} does not hold several support sets. Give a list of them or a dict of names "
            "to them; `adapt` takes a single one."
        )
    if isinstance(supports, Mapping):
        for key, support in supports.items():
            yield f"support set {key!r}", support
    else:
        for number, support in enumerate(supports):
            yield f"support set {number}", support


def follow_group(
    flow: Flow,
    split: SplitBackbone,
    injection: Injection,
    group: list[NamedSupport],
    *,
    n_steps: int | None,
    solver: str | None,
    early_stopping: bool,
) -> list[WeightPath]:
    """The flows of a group of support sets, as `Flow.follow` gives them one by one.

    All images go through the frozen blocks together, and all support sets through the drift network. An adaptive solver
    chooses its steps by the errors of all that it integrates, so it takes one support set after the other.
    """
    tokens, hiddens = _encode_group(flow, split, group)
    size = 1 if (solver or flow.config.solver) in ADAPTIVE else len(group)
    paths: list[WeightPath] = []
    for first in range(0, len(group), size):
        trajectory = flow.flow(stack(tokens[first : first + size]), n_steps=n_steps, solver=solver)
        for row in range(size):
            images, hidden = group[first + row].images, hiddens[first + row]
            states = [state[row] for state in trajectory.states]
            path = flow.to_path(
                split, injection, trajectory, states, images.pixel_values, images.labels, hidden, early_stopping
            )
            paths.append(path)
    return paths


def _encode_group(
    flow: Flow, split: SplitBackbone, group: list[NamedSupport]
) -> tuple[list[TaskTokens], list[Hidden | None]]:
    """Task tokens of each support set (batch 1), and the hidden states of its images, see `Flow.encode`."""
    tokens: dict[int, TaskTokens] = {}
    hiddens: dict[int, Hidden | None] = {}
    for members in _group_by_size(group):
        pixel_values = torch.cat([group[number].images.pixel_values for number in members])
        with naming(group[members[0]].name):  # images of this size are an error or not, whatever is on them
            features, hidden = flow.encode_images(split, pixel_values)
        end = 0
        for number in members:
            labels = group[number].images.labels
            start, end = end, end + len(labels)
            own = features[start:end].to(flow.logit_scale.dtype)
            tokens[number] = flow.task_encoder(own, labels.to(flow.device))
            hiddens[number] = None if hidden is None else hidden[start:end]
    return [tokens[number] for number in range(len(group))], [hiddens[number] for number in range(len(group))]


def _group_by_size(group: list[NamedSupport]) -> list[list[int]]:
    """The numbers of the support sets whose images have one height and width, for each that there is."""
    members: dict[torch.Size, list[int]] = {}
    for number, support in enumerate(group):
        members.setdefault(support.images.pixel_values.shape[2:], []).append(number)
    return list(members.values())
