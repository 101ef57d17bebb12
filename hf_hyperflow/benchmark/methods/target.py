"""What a method works on: a backbone with its adapter, and the images of a task in every form a method may ask for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ...data.domains import normalise
from ...modeling.adapter import HyperFlowAdapter
from ...modeling.backbones import Hidden, SplitBackbone
from ...modeling.injection import get_injection, unload
from ...modeling.parameter_space import ParameterSpace
from ...modeling.views import combine_views, make_view

#: Images that the backbone runs at once.
BATCH_SIZE = 256


class Target:
    """A backbone with its adapter. One thread at a time uses it.

    Args:
        backbone: on its device and in evaluation mode. Methods put PEFT adapters into it and leave them there, see
            `unload`; its own weights are the same after every method.
        adapter: on the same device and in evaluation mode.

    Attributes:
        split: the backbone, split where the adapter splits it.
    """

    def __init__(self, backbone: PreTrainedModel, adapter: HyperFlowAdapter):
        self.adapter = adapter
        self.split = adapter.split(backbone)
        self.backbone = self.split.backbone
        self._spaces: dict[Callable, ParameterSpace] = {}

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @property
    def processor(self) -> BaseImageProcessor:
        """The adapter's image processor.

        Raises:
            ValueError: the adapter was made without one.
        """
        if self.adapter.processor is None:
            raise ValueError("the adapter has no image processor: set adapter.processor to that of the backbone.")
        return self.adapter.processor

    def images(self, images: torch.Tensor, views: int = 1) -> Images:
        """Images `(n, 3, height, width)` uint8, for the methods.

        Args:
            views: over how many views of an image its features are combined, see `make_view`.
        """
        return combine_images([UncachedImages(self, images, view) for view in range(views)])

    def support(self, images: torch.Tensor, labels: torch.Tensor, seed: int = 0, views: int = 1) -> Support:
        """A support set of images `(n, 3, height, width)` uint8 with labels `(n,)` in 0..n_way-1.

        Args:
            seed: of what a method does at random.
            views: see `images`.
        """
        return Support(self.images(images, views), labels.to(self.device), seed)

    def split_before(self, start: int) -> SplitBackbone:
        """The backbone, split before block `start`; its features are those of the last block only."""
        return SplitBackbone(self.backbone, start, self.adapter.config.pooling, self.split.blocks)

    def parameter_space(self, make_config: Callable[[nn.Module, int], PeftConfig]) -> ParameterSpace:
        """The tensors of a PEFT adapter in the blocks that the flow adapts.

        Args:
            make_config: takes a backbone and a number of last blocks, as `bias_config` does.
        """
        if make_config not in self._spaces:
            config = make_config(self.backbone, self.adapter.config.last_blocks)
            self._spaces[make_config] = ParameterSpace.from_backbone(self.backbone, config)
        return self._spaces[make_config]

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """Within, the backbone computes what it computes without any adapter."""
        injection = get_injection(self.backbone)
        if injection is None:
            yield
            return
        with injection.using(injection.start):
            yield

    def unload(self) -> None:
        """Take out the PEFT adapter that a method left in the backbone, if there is one."""
        unload(self.backbone)


class Images(ABC):
    """The images of a support or query set. Every form of them is computed when a method first asks for it.

    Attributes:
        view: the number of the view that is made of the images, see `make_view`.
    """

    target: Target
    view: int = 0

    @property
    def views(self) -> tuple[Images, ...]:
        """The images in each of the views that features are combined of; mostly that is one."""
        return (self,)

    @cached_property
    @abstractmethod
    def raw(self) -> torch.Tensor:
        """Pixels `(n, 3, height, width)` uint8 of the images as they are, on the backbone's device."""

    @cached_property
    def pixel_values(self) -> torch.Tensor:
        """What the backbone reads, `(n, 3, height, width)`, in its precision."""
        parameter = next(self.target.backbone.parameters())
        return make_view(normalise(self.raw, self.target.processor).to(parameter.dtype), self.view)

    @cached_property
    @abstractmethod
    def hidden(self) -> Hidden:
        """What the frozen first blocks compute of the images."""

    @cached_property
    @abstractmethod
    def features(self) -> torch.Tensor:
        """Features `(n, feature_width)` float32 of the backbone without an adapter, as the adapter's head reads them
        (with the intermediate features, if the adapter has any).
        """

    @cached_property
    @abstractmethod
    def final_features(self) -> torch.Tensor:
        """Features `(n, width)` float32 of the last block of the backbone without an adapter."""


class UncachedImages(Images):
    """Images of which nothing is known beforehand.

    Args:
        images: `(n, 3, height, width)` uint8, on any device.
        view: the number of the view.
    """

    def __init__(self, target: Target, images: torch.Tensor, view: int = 0):
        self.target = target
        self.view = view
        self._images = images

    @cached_property
    def raw(self) -> torch.Tensor:
        return self._images.to(self.target.device)

    @cached_property
    @torch.no_grad()
    def hidden(self) -> Hidden:
        parts = [self.target.split.forward_prefix(batch) for batch in self.pixel_values.split(BATCH_SIZE)]
        states = torch.cat([part.states for part in parts])
        return Hidden(states, parts[0].args, parts[0].kwargs)

    @cached_property
    @torch.no_grad()
    def features(self) -> torch.Tensor:
        with self.target.at_start():
            return forward_images(self.target.split, self.pixel_values)

    @cached_property
    @torch.no_grad()
    def final_features(self) -> torch.Tensor:
        with self.target.at_start():
            return forward_images(self.target.split_before(0), self.pixel_values)


class CombinedImages(Images):
    """Images whose features are combined over several views.

    The flow, and fine-tuning with its own augmentation, read the first view: the images as they are.

    Args:
        views: the same images in different views.
    """

    def __init__(self, views: Sequence[Images]):
        self.target = views[0].target
        self._views = tuple(views)

    @property
    def views(self) -> tuple[Images, ...]:
        return self._views

    @property
    def raw(self) -> torch.Tensor:
        return self._views[0].raw

    @property
    def pixel_values(self) -> torch.Tensor:
        return self._views[0].pixel_values

    @property
    def hidden(self) -> Hidden:
        return self._views[0].hidden

    @cached_property
    def features(self) -> torch.Tensor:
        return combine_views([view.features for view in self._views])

    @cached_property
    def final_features(self) -> torch.Tensor:
        return combine_views([view.final_features for view in self._views])


def combine_images(views: Sequence[Images]) -> Images:
    """Images whose features are combined over these views; a single view is left as it is."""
    return views[0] if len(views) == 1 else CombinedImages(views)


@dataclass(frozen=True)
class Support:
    """A support set, as a method is fitted to it.

    Attributes:
        images: of all classes.
        labels: `(n,)` in 0..n_way-1, on the backbone's device; every class has an image.
        seed: of what a method does at random. In a benchmark it is the number of the episode.
    """

    images: Images
    labels: torch.Tensor
    seed: int = 0

    @property
    def target(self) -> Target:
        return self.images.target


def forward_images(split: SplitBackbone, pixel_values: torch.Tensor) -> torch.Tensor:
    """Features float32 of pixel values, with the backbone as it is now."""
    batches = pixel_values.split(BATCH_SIZE)
    return torch.cat([split.forward_features(batch) for batch in batches]).float()


def forward_hidden(split: SplitBackbone, hidden: Hidden, batch_size: int = 512) -> torch.Tensor:
    """Features float32 of what the first blocks computed, with the backbone as it is now."""
    starts = range(0, len(hidden.states), batch_size)
    return torch.cat([split.forward_suffix(hidden[start : start + batch_size]) for start in starts]).float()
