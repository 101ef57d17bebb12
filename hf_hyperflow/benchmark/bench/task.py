"""A task of random images on loaded models, and the pieces of work that it consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import PIL.Image
import torch
from transformers import AutoModel
from transformers.utils.logging import disable_progress_bar

from ...modeling.adapter import HyperFlowAdapter
from ...modeling.backbones import Hidden
from ...modeling.injection import Injection
from ...modeling.support import read_support
from ..cost import Work
from ..methods import Classifier, Method, Support, Target
from .subjects import resize_processor

N_WAY = 5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

#: Pieces of work, as records name them. The first three come before and beside the flow.
FORWARD, READ, INJECT = "forward", "read", "inject"
ENCODE, INTEGRATE, WRITE, PROTOTYPES = "encode", "integrate", "write", "prototypes"
#: What users call: for the first task of a backbone, and for a next one.
ADAPT, READY, NEXT_ADAPT, NEXT_READY = "adapt", "ready", "next_adapt", "next_ready"

#: All of them, and those that depend on the number of solver steps.
PIECES = (FORWARD, READ, INJECT, ENCODE, INTEGRATE, WRITE, PROTOTYPES, ADAPT, READY, NEXT_ADAPT, NEXT_READY)
PIECES_OF_STEPS = (INTEGRATE, ADAPT, READY, NEXT_ADAPT, NEXT_READY)


@dataclass(frozen=True)
class CostSetting:
    """What a cost is measured on.

    Attributes:
        backbone, adapter: folders or Hub ids.
        size: height and width of the images.
        device: "cpu" or "cuda".
        dtype: that of the backbone's weights, one of `DTYPES`. The adapter's are always float32.
        is_autocast: under bfloat16 autocast.
        n_way: number of classes.
        n_images: number of support images.
        views, query_views: over how many views of a support image and of a query its features are combined.
    """

    backbone: str
    adapter: str
    size: tuple[int, int]
    device: str = "cpu"
    dtype: str = "float32"
    is_autocast: bool = False
    n_way: int = N_WAY
    n_images: int = 25
    views: int = 1
    query_views: int = 1


@dataclass(frozen=True)
class Piece:
    """A piece of work.

    Attributes:
        name: one of `PIECES`.
        n_steps: solver steps; None for pieces that do not depend on them.
    """

    name: str
    n_steps: int | None = None


class CostTask:
    """A support set of random images in memory, and the models that are adapted to it.

    Attributes:
        target: the backbone with its adapter. Both have been run, so that the libraries' own start is not measured.
        images: `(n, 3, height, width)` uint8.
        pixel_values: the same as the backbone reads them, in its precision.
        labels: `(n,)`.
    """

    def __init__(self, setting: CostSetting):
        disable_progress_bar()
        device = setting.device
        self.setting = setting
        backbone = AutoModel.from_pretrained(setting.backbone).eval().to(device, DTYPES[setting.dtype])
        adapter = HyperFlowAdapter.from_pretrained(setting.adapter).eval().to(device)
        self.target = Target(backbone, adapter)
        self.images = draw_images(setting.n_images, setting.size).to(device)
        self.labels = (torch.arange(setting.n_images) % setting.n_way).to(device)
        with torch.no_grad():
            self.target.backbone(self.target.images(self.images[:1]).pixel_values)
        self.pixel_values = self.target.images(self.images).pixel_values

    def build(self, piece: Piece) -> Work:
        """A piece of work with its inputs.

        These are made without running any of the other pieces on all images. On a CPU, memory that is free again would
        hide what a piece takes.
        """
        n_steps = piece.n_steps
        works: dict[str, Callable[[], Work]] = {
            FORWARD: lambda: Work(self._forward, self.target.unload),
            READ: self._build_read,
            INJECT: lambda: Work(self._inject, self.target.unload),
            ENCODE: lambda: Work(self._encode),
            INTEGRATE: lambda: self._build_integrate(n_steps),
            WRITE: self._build_write,
            PROTOTYPES: self._build_prototypes,
            ADAPT: lambda: Work(lambda: self._adapt(n_steps), self.target.unload),
            READY: lambda: Work(lambda: self._get_ready(n_steps), self.target.unload),
            NEXT_ADAPT: lambda: Work(lambda: self._adapt(n_steps), self._inject),
            NEXT_READY: lambda: Work(lambda: self._get_ready(n_steps), self._inject),
        }
        return works[piece.name]()

    @torch.no_grad()
    def _forward(self) -> object:
        """The limit: nothing that looks at all of the images can be faster."""
        return self.target.backbone(self.pixel_values)

    def _build_read(self) -> Work:
        """From decoded pictures to pixel values. One forward pass and all methods need this, too."""
        processor = resize_processor(self.target.processor, self.setting.size)
        pictures: dict[str, list[PIL.Image.Image]] = {}
        for image, label in zip(self.images.cpu(), self.labels.tolist(), strict=True):
            pictures.setdefault(str(label), []).append(PIL.Image.fromarray(image.permute(1, 2, 0).numpy()))
        return Work(lambda: read_support(pictures, processor))

    def _inject(self) -> Injection:
        return self.target.adapter.space.inject(self.target.backbone)

    @torch.no_grad()
    def _encode(self) -> object:
        """What the flow is conditioned on: features of the images from the first blocks or a separate encoder."""
        return self.target.adapter.encode_images(self.target.split, self.pixel_values)

    @torch.no_grad()
    def _build_integrate(self, n_steps: int | None) -> Work:
        """The task encoder and the solver, which is all that the paper counts."""
        adapter = self.target.adapter
        features, _ = adapter.encode_images(self.target.split, self.pixel_values[:1])
        features = torch.randn(len(self.labels), features.shape[-1], device=features.device)

        @torch.no_grad()
        def integrate() -> object:
            return adapter.flow(adapter.task_encoder(features, self.labels), n_steps=n_steps)

        return Work(integrate)

    def _build_write(self) -> Work:
        adapter = self.target.adapter
        z = torch.randn(adapter.space.n_tokens, adapter.space.token_dim, device=self.target.device)

        @torch.no_grad()
        def write() -> None:
            injection = self._inject()  # it is there already
            injection.write(adapter.theta(z, injection.start))

        return Work(write, self._inject)

    @torch.no_grad()
    def _build_prototypes(self) -> Work:
        """The adapted blocks and the head, or the whole backbone where the flow is not conditioned on the images as
        they are.
        """
        adapter, split = self.target.adapter, self.target.split
        _, first = adapter.encode_images(split, self.pixel_values[:1])
        hidden = None
        if first is not None:
            states = torch.randn(len(self.labels), *first.states.shape[1:], device=self.target.device)
            hidden = Hidden(states.to(first.states), first.args, first.kwargs)
        rejection = adapter.rejection

        @torch.no_grad()
        def make_prototypes() -> object:
            features = split.forward_suffix(hidden or split.forward_prefix(self.pixel_values)).float()
            adapter.calibration.compute_scale(features, self.labels)
            if rejection is not None:
                rejection.fit_task(features, self.labels)
            return adapter.head(features, self.labels)

        return Work(make_prototypes, self._inject)

    def _adapt(self, n_steps: int | None) -> object:
        target = self.target
        return target.adapter.adapt(target.backbone, (self.pixel_values, self.labels), n_steps=n_steps)

    def _get_ready(self, n_steps: int | None) -> object:
        target = self.target
        task = target.adapter.adapt(target.backbone, (self.pixel_values, self.labels), n_steps=n_steps)
        return task.prototypes

    def prepare(self, method: Method, fit: Callable[[Support], Classifier] | None = None) -> Classifier:
        """See `prepare_task`."""
        return prepare_task(method, self.target, self.images, self.labels, fit, self.setting.views)


def draw_images(n_images: int, size: tuple[int, int]) -> torch.Tensor:
    """Random images `(n, 3, height, width)` uint8."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n_images, 3, *size), generator=generator, dtype=torch.uint8)


def prepare_task(
    method: Method,
    target: Target,
    images: torch.Tensor,
    labels: torch.Tensor,
    fit: Callable[[Support], Classifier] | None = None,
    views: int = 1,
) -> Classifier:
    """Do all the work between holding a support set and being able to classify. Nothing is taken from a cache.

    A method that does its work in `predict` is given the support set itself to classify.

    Args:
        images: `(n, 3, height, width)` uint8 on the backbone's device.
        labels: `(n,)` there.
        fit: what is run in place of `method.fit`, such as the first gradient steps of fine-tuning.
        views: over how many views of an image its features are combined.
    """
    support = target.support(images, labels, views=views)
    classifier = (fit or method.fit)(support)
    if method.works_in_predict:
        classifier.predict(support.images)
    target.unload()
    return classifier
