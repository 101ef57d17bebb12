"""`HyperFlowAdapter`: adapts a vision backbone to a support set by integrating a learned flow over its parameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from .adapted_backbone import SupportImages
from .backbones import SplitBackbone
from .calibration import COSINE_SCALE, Calibration
from .configuration import HyperFlowConfig, require_known_fields
from .fingerprint import compute_fingerprint, fingerprints_match
from .finite import NotFiniteError, find_bad_image, find_bad_row, require_finite_weights
from .flow import WeightPath
from .gate import find_blocks
from .images import ImageError
from .injection import Injection, unload
from .locks import get_lock
from .many import follow_group, naming, read_groups, unloaded_after_error
from .new_adapter import describe_backbone, require_in_last_blocks, require_running
from .parameter_space import ParameterSpace
from .peft_configs import config_to_dict
from .prototypes import unit_means
from .queries import require_count
from .saved_flow import SavedFlow
from .stopping import StoppingPoint
from .support import SupportSet, read_support
from .task import AdaptedTask
from .trunks import eval_mode, find_trunk
from .views import require_views


class HyperFlowAdapter(SavedFlow):
    """Generates the weights of a PEFT adapter from a support set, with forward passes of small networks only.

    HyperFlow (Kim, Kim & Hong, arXiv 2504.15323): theta(1) = theta(0) + integral of h_phi(theta, t | S) over t in 0..1.
    `Flow` holds the networks and lists the attributes; `SavedFlow` saves and loads them.
    """

    @classmethod
    def from_backbone(
        cls,
        backbone: PreTrainedModel,
        peft_config: PeftConfig,
        *,
        last_blocks: int,
        processor: BaseImageProcessor | None = None,
        frozen_tensors: tuple[str, ...] = (),
        encoder: PreTrainedModel | None = None,
        **config: Any,
    ) -> HyperFlowAdapter:
        """A new, untrained adapter for a backbone. The backbone is left as it was, and other threads can use it.

        Args:
            backbone: a vision model of transformers, or a wrapper of one, see `find_trunk`.
            peft_config: which weights are generated, with full dotted paths as targets. `bias_config`, `lora_config`
                and `layernorm_config` of `hf_hyperflow.modeling.peft_configs` make the usual ones.
            last_blocks: how many of the last blocks are adapted. All targets lie in them or behind them.
            processor: the backbone's image processor, saved with the adapter.
            frozen_tensors: parts of the names of adapter tensors that stay at their seeded start (LoRA's "lora_A").
            encoder: a separate pretrained vision model to encode support sets; None shares the backbone's first blocks.
            config: further fields of `HyperFlowConfig`.

        Raises:
            IncompatibleBackboneError: the backbone cannot be adapted, or it has no such targets.
            TypeError: there is no such field.
        """
        require_known_fields(config)
        backbone = find_trunk(backbone)
        with get_lock(backbone):
            space = ParameterSpace.from_backbone(backbone, peft_config, frozen=frozen_tensors)
            blocks = find_blocks(backbone)
            require_in_last_blocks(space, blocks, last_blocks)
            split = SplitBackbone(backbone, len(blocks) - last_blocks, config.pop("pooling", None), blocks)
            split.check()
            require_running(split, space)
            fingerprint = compute_fingerprint(backbone)
        encoder_config = None if encoder is None else encoder.config.to_dict()
        model = cls(
            HyperFlowConfig(
                backbone=describe_backbone(split, space.token_dim, fingerprint),
                last_blocks=last_blocks,
                pooling=split.pooling,
                peft=config_to_dict(peft_config),
                tensor_names=space.names,
                tensor_shapes=[list(shape) for shape in space.shapes],
                frozen_tensors=list(frozen_tensors),
                encoder=encoder_config,
                **config,
            )
        )
        if encoder is not None and model.encoder is not None:
            model.encoder.load_state_dict(encoder.state_dict())
        model.processor = processor
        return model

    @torch.no_grad()
    def adapt(
        self,
        backbone: PreTrainedModel,
        support: Any,
        *,
        n_steps: int | None = None,
        solver: str | None = None,
        early_stopping: bool = False,
        views: int | None = None,
        skip_bad: bool = False,
    ) -> AdaptedTask:
        """Adapt a backbone to the classes of a support set, without gradients.

        Any number of threads may adapt one backbone, and use its tasks, at the same time; see `AdaptedTask`.

        Args:
            backbone: the model that the adapter was trained for, on any device and in any precision. PEFT's modules
                wrap its own until `AdaptedTask.reset`. Several tasks can share one backbone.
            support: labelled images in any of the forms of `read_support`: a `datasets.Dataset`, a dict of class name
                to images or to a folder, a folder with one folder per class, pairs `(image, label)`, or
                `(pixel_values, labels)`.
            n_steps: number of solver steps from t = 0 to t = 1; None takes the config's. With 0 there is no flow: the
                backbone stays as it is, and the head alone classifies.
            solver: euler, midpoint, heun, rk4, or with torchdiffeq dopri5, dopri8, bosh3; None takes the config's.
            early_stopping: stop the flow where the leave-one-out accuracy on the support set is best. Of equal points
                the earliest is taken, t = 0 included. Some class needs two images or more. The adapted blocks are run
                on the support set at every step.
            views: from how many views of each support image its class is learned, 1 to 4, see `make_view`. The backbone
                is run once for each. None takes the config's.
            skip_bad: leave out images that cannot be read.

        Returns:
            The adapted task. Its prototypes are computed when they are first needed.

        Raises:
            SupportSetError, ImageError, FileNotFoundError: see `read_support`.
            IncompatibleBackboneError: the backbone is not of the adapter's kind. It is left as it was.
            NotFiniteError: the backbone or the adapter has NaN or infinite weights, or the flow diverges.
            ValueError: see `read_support`; or `n_steps`, the solver or the number of views is not allowed.
        """
        views = require_views(self.config.views if views is None else views)
        calibration = self.calibration
        self._warn_if_untrained(n_steps)
        split = self.split(backbone)
        backbone = split.backbone
        images = self._read(support, backbone, skip_bad)
        with get_lock(backbone), self._injected(backbone) as injection, eval_mode(backbone):
            path = self.follow(
                split,
                injection,
                images.pixel_values,
                images.labels,
                n_steps=n_steps,
                solver=solver,
                early_stopping=early_stopping,
            )
            return self._finish(split, path, images, calibration, views)

    @torch.no_grad()
    def adapt_many(
        self,
        backbone: PreTrainedModel,
        supports: Any,
        *,
        n_steps: int | None = None,
        solver: str | None = None,
        early_stopping: bool = False,
        views: int | None = None,
        skip_bad: bool = False,
        batch_size: int = 64,
    ) -> list[AdaptedTask]:
        """Adapt a backbone to many support sets. The tasks are those of `adapt`, one by one, up to rounding.

        Images go through the frozen blocks in common batches, and support sets through the drift network. Prototypes
        are computed at once, so that no images are kept. Threads may do what they may beside `adapt`; the lock of the
        backbone is taken for one batch at a time.

        Args:
            backbone, n_steps, solver, early_stopping, views, skip_bad: see `adapt`.
            supports: support sets in any of the forms of `adapt`, of any numbers of classes and images: an iterable,
                which is read batch by batch, or a mapping of names to them.
            batch_size: support sets are put together until they have so many images. A larger one is run whole.

        Returns:
            One task for each support set, in their order.

        Raises:
            SupportSetError: `supports` is a single support set.
            ValueError: `batch_size` is not an integer of at least 1.
            And what `adapt` raises. An error about a support set begins with its key or its position. The backbone is
                left as it was.
        """
        require_count("batch_size", batch_size)
        self._warn_if_untrained(n_steps)
        views = require_views(self.config.views if views is None else views)
        split, calibration = self.split(backbone), self.calibration
        backbone = split.backbone
        tasks: list[AdaptedTask] = []
        with unloaded_after_error(self.space, backbone):
            for group in read_groups(supports, backbone, self.processor, batch_size, skip_bad):
                with get_lock(backbone), self._injected(backbone) as injection, eval_mode(backbone):
                    paths = follow_group(
                        self, split, injection, group, n_steps=n_steps, solver=solver, early_stopping=early_stopping
                    )
                    for support, path in zip(group, paths, strict=True):
                        with naming(support.name):
                            task = self._finish(split, path, support.images, calibration, views)
                            _ = task.prototypes
                        tasks.append(task)
        return tasks

    def _finish(
        self, split: SplitBackbone, path: WeightPath, images: SupportSet, calibration: Calibration, views: int
    ) -> AdaptedTask:
        """The task at the end of a flow. The backbone carries the adapter, and the caller holds its lock."""
        if not torch.stack(path.thetas).isfinite().all():
            self._raise_not_finite(split, images)
        # The task writes theta into the backbone whenever it is used, so that several tasks can share it.
        kept = SupportImages(images, path.hidden, self.head, calibration, self.rejection, views)
        return self._build_task(split, path.theta, kept, nfe=path.nfe, stopping_point=path.stopping_point)

    @torch.no_grad()
    def direct_transfer(
        self, backbone: PreTrainedModel, support: Any, *, views: int = 1, skip_bad: bool = False
    ) -> AdaptedTask:
        """The baseline: the backbone is not adapted, and images are compared by cosines with the class means.

        Arguments and errors are those of `adapt`. The task that is returned has theta at its start. Its scores are not
        calibrated: the scale is `COSINE_SCALE`.
        """
        require_views(views)
        split = self.split(backbone)
        backbone, blocks = split.backbone, split.blocks
        images = self._read(support, backbone, skip_bad)
        with get_lock(backbone), self._injected(backbone) as injection:
            theta = injection.start
        kept = SupportImages(images, None, unit_means, Calibration(math.log(COSINE_SCALE)), None, views)
        return self._build_task(SplitBackbone(backbone, 0, self.config.pooling, blocks), theta, kept)

    def _build_task(
        self,
        split: SplitBackbone,
        theta: torch.Tensor,
        support: SupportImages,
        *,
        nfe: int = 0,
        stopping_point: StoppingPoint | None = None,
    ) -> AdaptedTask:
        return AdaptedTask(
            split=split,
            space=self.space,
            theta=theta,
            class_names=support.support.class_names,
            processor=self.processor,
            support=support,
            nfe=nfe,
            stopping_point=stopping_point,
        )

    def _read(self, support: Any, backbone: nn.Module, skip_bad: bool) -> SupportSet:
        """Read a support set, on the backbone's device and in its precision."""
        parameter = next(backbone.parameters())
        images = read_support(support, self.processor, skip_bad=skip_bad)
        if images.skipped and images is not support:
            count = "1 file" if len(images.skipped) == 1 else f"{len(images.skipped)} files"
            warnings.warn(
                f"{count} of the support set left out: {' '.join(images.skipped)}",
                stacklevel=4,  # whoever called `adapt`: a frame of torch and ours lie between
            )
        return images.to(parameter.device, parameter.dtype)

    def _warn_if_untrained(self, n_steps: int | None) -> None:
        if n_steps != 0 and not self.drift.token_out.weight.any():
            warnings.warn(
                "this adapter was not trained: its flow leaves the backbone as it is, and the head alone classifies. "
                "Train it, or say n_steps=0.",
                stacklevel=4,  # whoever called `adapt`: a frame of torch and ours lie between
            )

    def _raise_not_finite(self, split: SplitBackbone, images: SupportSet) -> NoReturn:
        """Say why the generated weights are not finite: an image, the backbone's weights or the adapter's, or the flow.

        The backbone carries the adapter, and it is in evaluation mode.
        """
        bad = find_bad_image(images.pixel_values)  # again, in the backbone's precision
        if bad is None:
            require_finite_weights(split.backbone, f"this {type(split.backbone).__name__}")
            require_finite_weights(self, "the adapter")
            features, _ = self.encode_images(split, images.pixel_values)
            bad = find_bad_row(features.float())
        if bad is not None:
            name = images.names[bad] if images.names else f"image {bad}"
            raise ImageError(
                f"{name} has or makes values that are NaN, infinite or too large for {images.pixel_values.dtype}. "
                "Replace it, or check the mean and standard deviation of the image processor."
            )
        raise NotFiniteError("the flow leaves the range of finite numbers: use more steps or another solver.")

    @contextmanager
    def _injected(self, backbone: PreTrainedModel) -> Iterator[Injection]:
        """Within, the adapter is inside the backbone. An error takes it out again, unless it was there before.

        The caller holds the lock of the backbone.
        """
        was_in = self.space.is_in(backbone)
        fingerprint = None
        if not was_in:
            unload(backbone)
            fingerprint = compute_fingerprint(backbone)  # while it carries no adapter
        injection = self.space.inject(backbone)
        try:
            if fingerprint is not None:
                self._warn_of_other_weights(backbone, fingerprint)
            yield injection
        except BaseException:
            if not was_in:
                injection.remove()
            raise

    def _warn_of_other_weights(self, backbone: nn.Module, fingerprint: list[float]) -> None:
        expected = self.config.backbone.get("fingerprint")
        if expected and not fingerprints_match(expected, fingerprint):
            warnings.warn(
                f"the weights of this {type(backbone).__name__} are not those the adapter was trained for "
                f"({self.config.backbone['name_or_path']}): expect no gain.",
                stacklevel=6,  # whoever called `adapt`: four frames of contextlib, torch and ours lie between
            )
