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
from .calibration import Calibration
from .finite import MAX_PIXEL_VALUE, NotFiniteError, find_bad_image, find_bad_row, require_finite_weights
from .images import ImageError
from .injection import Injection, unload
from .locks import get_lock
from .parameter_space import ParameterSpace
from .prototypes import Head, PrototypeClassifier
from .rejection import Rejection, RejectionCalibration
from .stopping import StoppingPoint
from .support import SupportSet
from .trunks import IncompatibleBackboneError, eval_mode
from .views import average_views, combine_views, make_view, require_views

T = TypeVar("T", bound="AdaptedBackbone")


@dataclass(frozen=True)
class SupportImages:
    """The support images of a task, kept until its prototypes are first needed.

    Attributes:
        support: pixel values, labels and the names that errors call the images.
        hidden: what the frozen blocks computed of the images; None if they were not run.
        head: turns the features of the images into prototypes.
        calibration: gives the scale of the logits.
        rejection: gives the rejection of the task; None if there is none.
        views: over how many views of an image its features are averaged.
    """

    support: SupportSet
    hidden: Hidden | None
    head: Head
    calibration: Calibration
    rejection: RejectionCalibration | None
    views: int = 1


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
        processor: BaseImageProcessor | None,
        support: SupportImages | None = None,
        prototypes: torch.Tensor | None = None,
        scale: float | None = None,
        rejection: Rejection | None = None,
        nfe: int = 0,
        stopping_point: StoppingPoint | None = None,
    ):
        self.backbone = split.backbone
        self.space = space
        self.theta = theta
        self.class_names = class_names
        self.processor = processor
        self.nfe = nfe
        self.stopping_point = stopping_point
        self._split = split
        self._support = support
        self._prototypes = prototypes
        self._scale = scale
        self._rejection = rejection
        self._merged: Injection | None = None
        self._is_reset = False

    @property
    def split(self) -> SplitBackbone:
        """The backbone as the task runs it.

        Raises:
            RuntimeError: the task was reset, or is merged.
        """
        self._require_alive()
        return self._split

    @property
    def prototypes(self) -> torch.Tensor:
        """Prototypes `(n_way, width)`, to be multiplied with features of length 1. Computed when first needed.

        Raises:
            RuntimeError: the task was reset before.
            ImageError, NotFiniteError: see `logits`.
        """
        self._learn_classes()
        assert self._prototypes is not None
        return self._prototypes

    @property
    def scale(self) -> float:
        """The inverse temperature of the logits, computed with the prototypes; errors are theirs."""
        self._learn_classes()
        assert self._scale is not None
        return self._scale

    @property
    def rejection(self) -> Rejection | None:
        """How the task tells images of none of its classes, computed with the prototypes; None if it cannot."""
        self._learn_classes()
        return self._rejection

    @torch.no_grad()
    def _learn_classes(self) -> None:
        """Compute the prototypes, the scale and the rejection from the support images, unless they are known."""
        with get_lock(self.backbone):
            if self._support is None:
                return
            images = self._support
            features = self._compute_support_features(images)
            labels, names = images.support.labels.to(features.device), images.support.names
            bad = find_bad_row(features)
            if bad is not None:
                self._raise_not_finite(_name_image(names, bad))
            prototypes = images.head(features, labels)
            if not prototypes.isfinite().all():
                if isinstance(images.head, nn.Module):
                    require_finite_weights(images.head, "the adapter's head")
                raise NotFiniteError("the features of the support set are too large or too small to be compared.")
            self._scale = images.calibration.compute_scale(features, labels)
            if images.rejection is not None:
                self._rejection = images.rejection.fit_task(features, labels)
            self._prototypes = prototypes
            self._support = None

    def _compute_support_features(self, images: SupportImages) -> torch.Tensor:
        """Features `(n, width)` float32 of the support images, averaged over their views."""
        parameter = next(self.backbone.parameters())
        place = parameter.device, parameter.dtype  # the backbone may have been moved since
        pixel_values = images.support.pixel_values.to(*place)
        features = []
        with self._adapted():
            for number in range(images.views):
                hidden = images.hidden
                if number > 0 or hidden is None or (hidden.states.device, hidden.states.dtype) != place:
                    hidden = self._split.forward_prefix(make_view(pixel_values, number))
                features.append(self._split.forward_suffix(hidden).float())
        return combine_views(features)

    @torch.no_grad()
    def logits(self, pixel_values: torch.Tensor, *, views: int = 1) -> torch.Tensor:
        """Logits `(n, n_way)` of pixel values `(n, 3, height, width)`. Their softmax is the scores. All are finite.

        Args:
            pixel_values: what the backbone reads.
            views: over how many views of an image its features are averaged, see `make_view`.

        Raises:
            ImageError: an image has NaN, infinity or values beyond a million, or the backbone makes such features of
                it. It is numbered.
            NotFiniteError: the task, its adapter or the backbone has NaN or infinite weights.
            RuntimeError: the task was reset.
            IncompatibleBackboneError: another task is merged into the backbone.
            ValueError: there are not so many views.
        """
        return self._compute_logits(pixel_values, (), require_views(views))

    @torch.no_grad()
    def _compute_logits(self, pixel_values: torch.Tensor, names: Sequence[str], views: int = 1) -> torch.Tensor:
        """Logits of images that errors call by these names, or by their numbers."""
        bad = find_bad_image(pixel_values)
        if bad is not None:
            raise ImageError(
                f"{_name_image(names, bad)} has NaN or infinite pixel values, or values beyond {MAX_PIXEL_VALUE:,.0f}. "
                "Replace it, or check the mean and standard deviation of the image processor."
            )
        parameter = next(self.backbone.parameters())
        pixel_values = pixel_values.to(parameter.device, parameter.dtype)
        prototypes = self.prototypes
        with self._adapted():
            features = average_views(self._split.forward_features, pixel_values, views)
        logits = PrototypeClassifier(prototypes.to(features.device), self.scale)(features)
        bad = find_bad_row(features)
        if bad is None and not logits.isfinite().all():
            bad = 0
        if bad is not None:
            self._raise_not_finite(_name_image(names, bad))
        return logits

    def _raise_not_finite(self, image: str) -> NoReturn:
        """Say why the features or the logits of an image are not finite: weights, settings, or the image itself."""
        parts = {"theta": self.theta, "prototypes": self._prototypes}
        if self._scale is not None:
            parts["scale"] = torch.tensor(self._scale)
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
