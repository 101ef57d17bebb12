"""`AdaptedBackbone`: a backbone with the weights of one task in it, which classifies tensors of pixel values."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn
from transformers.image_processing_utils import BaseImageProcessor

from .backbones import Hidden, SplitBackbone
from .finite import MAX_PIXEL_VALUE, NotFiniteError, find_bad_image, find_bad_row, require_finite_weights
from .images import ImageError
from .injection import Injection, unload
from .locks import get_lock
from .parameter_space import ParameterSpace
from .prototypes import Head, PrototypeClassifier
from .stopping import StoppingPoint
from .trunks import IncompatibleBackboneError, eval_mode

T = TypeVar("T", bound="AdaptedBackbone")


@dataclass(frozen=True)
class SupportImages:
    """The support images of a task, kept until its prototypes are first needed.

    Attributes:
        images: what the frozen blocks computed of the images or, if they were not run, the pixel values.
        labels: `(n,)` in 0..n_way-1.
        head: turns the features of the images into prototypes.
        names: what errors call the images; empty if they are only numbered.
    """

    images: Hidden | torch.Tensor
    labels: torch.Tensor
    head: Head
    names: Sequence[str] = ()


class AdaptedBackbone:
    """A backbone adapted to one task, which classifies pixel values.

    `AdaptedTask` adds images and files to it, says what threads may do with it, and lists the attributes.
    """

    def __init__(
        self,
        *,
        split: SplitBackbone,
        space: ParameterSpace,
        theta: torch.Tensor,
        class_names: list[str],
        scale: float,
        processor: BaseImageProcessor | None,
        support: SupportImages | None = None,
        prototypes: torch.Tensor | None = None,
        nfe: int = 0,
        stopping_point: StoppingPoint | None = None,
    ):
        self.backbone = split.backbone
        self.space = space
        self.theta = theta
        self.class_names = class_names
        self.scale = scale
        self.processor = processor
        self.nfe = nfe
        self.stopping_point = stopping_point
        self._split = split
        self._support = support
        self._prototypes = prototypes
        self._merged: Injection | None = None
        self._is_reset = False

    @property
    def prototypes(self) -> torch.Tensor:
        """Prototypes `(n_way, width)`, to be multiplied with features of length 1. Computed when first needed.

        Raises:
            RuntimeError: the task was reset before.
            ImageError, NotFiniteError: see `logits`.
        """
        with get_lock(self.backbone):
            if self._prototypes is None:
                self._prototypes = self._compute_prototypes()
                self._support = None
            return self._prototypes

    @torch.no_grad()
    def _compute_prototypes(self) -> torch.Tensor:
        support = self._support
        assert support is not None, "a task has prototypes or what they are made of"
        with self._adapted():
            hidden = support.images
            if isinstance(hidden, torch.Tensor):
                hidden = self._split.forward_prefix(hidden)
            features = self._split.forward_suffix(hidden).float()
        bad = find_bad_row(features)
        if bad is not None:
            self._raise_not_finite(_name_image(support.names, bad))
        prototypes = support.head(features, support.labels)
        if not prototypes.isfinite().all():
            if isinstance(support.head, nn.Module):
                require_finite_weights(support.head, "the adapter's head")
            raise NotFiniteError("the features of the support set are too large or too small to be compared.")
        return prototypes

    @torch.no_grad()
    def logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits `(n, n_way)` of pixel values `(n, 3, height, width)`. Their softmax is the scores. All are finite.

        Raises:
            ImageError: an image has NaN, infinity or values beyond a million, or the backbone makes such features of
                it. It is numbered.
            NotFiniteError: the task, its adapter or the backbone has NaN or infinite weights.
            RuntimeError: the task was reset.
            IncompatibleBackboneError: another task is merged into the backbone.
        """
        return self._compute_logits(pixel_values, ())

    @torch.no_grad()
    def _compute_logits(self, pixel_values: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
        """Logits of images that errors call by these names, or by their numbers."""
        bad = find_bad_image(pixel_values)
        if bad is not None:
            raise ImageError(
                f"{_name_image(names, bad)} has NaN or infinite pixel values, or values beyond {MAX_PIXEL_VALUE:,.0f}. "
                "Replace it, or check the mean and standard deviation of the image processor."
            )
        classifier = PrototypeClassifier(self.prototypes, self.scale)
        parameter = next(self.backbone.parameters())
        with self._adapted():
            features = self._split.forward_features(pixel_values.to(parameter.device, parameter.dtype)).float()
        logits = classifier(features)
        bad = find_bad_row(features)
        if bad is None and not logits.isfinite().all():
            bad = 0
        if bad is not None:
            self._raise_not_finite(_name_image(names, bad))
        return logits

    def _raise_not_finite(self, image: str) -> NoReturn:
        """Say why the features or the logits of an image are not finite: weights, settings, or the image itself."""
        parts = {"theta": self.theta, "prototypes": self._prototypes, "scale": torch.tensor(self.scale)}
        for name, tensor in parts.items():
            if tensor is not None and not tensor.float().isfinite().all():
                raise NotFiniteError(f"{name} of this task has NaN or infinite values: adapt again, or load it again.")
        if not math.isfinite(self._split.intermediate_weight):
            raise NotFiniteError(f"intermediate_weight is {self._split.intermediate_weight}: give a finite number.")
        require_finite_weights(self.backbone, f"this {type(self.backbone).__name__}")
        dtype = next(self.backbone.parameters()).dtype
        raise ImageError(
            f"{image} makes features that are too large for {dtype}. Replace it, or use another precision."
        )

    def reset(self) -> None:
        """Take the adaptation out. The backbone is what it was before, bit for bit and module for module.

        This task cannot be used any more. Other tasks on the same backbone can: they put their adaptation back.

        Raises:
            IncompatibleBackboneError: another task is merged into the backbone.
        """
        with get_lock(self.backbone):
            if self._merged is not None:
                self._merged.remove()
                self._merged = None
            elif not self._is_reset:
                unload(self.backbone)
            self._is_reset = True

    def merge(self) -> nn.Module:
        """Fold the adapter into the backbone's own weights, without PEFT modules, and return the backbone.

        `reset` still restores the weights that were there before, bit for bit.

        Raises:
            IncompatibleBackboneError: PEFT cannot merge the adapter (a bias for a layer that has none).
            RuntimeError: the task was reset, or is merged already.
        """
        with get_lock(self.backbone):
            _ = self.prototypes
            injection = self._inject()
            try:
                with injection.using(self.theta):
                    injection.merge()
            except ValueError as error:
                injection.remove()
                raise IncompatibleBackboneError(f"PEFT cannot merge this adapter: {error}") from error
            self._merged = injection
            return self.backbone

    def __deepcopy__(self: T, memo: dict[int, Any]) -> T:
        """A copy with a backbone of its own. No thread is in the middle of something while that is copied."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        with get_lock(self.backbone):
            vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def _require_alive(self) -> None:
        if self._is_reset:
            raise RuntimeError("this task was reset and its backbone restored: adapt again, or load a saved task.")
        if self._merged is not None:
            raise RuntimeError("this task is merged into its backbone: reset it to get the adapter out again.")

    def _inject(self) -> Injection:
        """Put the adapter into the backbone, unless it is there already. The caller holds the lock of the backbone."""
        self._require_alive()
        return self.space.inject(self.backbone)

    @contextmanager
    def _adapted(self) -> Iterator[None]:
        """Within, the backbone has this task's weights and is in evaluation mode, and other threads wait."""
        with get_lock(self.backbone):
            if self._merged is None:
                with self._inject().using(self.theta), eval_mode(self.backbone):
                    yield
            else:  # the weights are the backbone's own now
                with eval_mode(self.backbone):
                    yield


def _name_image(names: Sequence[str], number: int) -> str:
    return names[number] if names else f"image {number}"
