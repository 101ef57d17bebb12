"""`HyperFlowAdapter`: adapts a vision backbone to a support set by integrating a learned flow over its parameters."""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from huggingface_hub import CommitInfo
from peft import PeftConfig
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from .adapter_files import (
    CONFIG,
    HUB_ARGUMENTS,
    TRAINING_RECORD,
    WEIGHTS,
    open_adapter,
    read_training_record,
    read_weights,
)
from .backbones import Blocks, Hidden, IncompatibleBackboneError, SplitBackbone, eval_mode, find_blocks
from .checksums import MODEL_CHECKSUMS, sha256, write_checksums
from .configuration import HyperFlowConfig
from .drift import DriftNetwork
from .fingerprint import compute_fingerprint, fingerprints_match
from .finite import NotFiniteError, find_bad_image, find_bad_row, require_finite_weights
from .hub import push_folder
from .images import PROCESSOR, ImageError, load_processor
from .injection import Injection, unload
from .lda import RegularisedLDA
from .locks import get_lock
from .model_card import adapter_card, write_card
from .parameter_space import ParameterSpace
from .peft_configs import build_peft_config, config_to_dict
from .prototypes import Head, unit_means
from .saving import CheckpointError, atomic_folder, write_json
from .solvers import Trajectory, integrate
from .stopping import StoppingPoint, choose_stopping_point
from .support import SupportSet, read_support
from .task import AdaptedTask, SupportImages
from .task_encoder import TaskEncoder, TaskTokens, pool_tokens
from .tensor_files import list_differences


class WeightPath(NamedTuple):
    """The weights along the flow of one support set.

    Attributes:
        times: from 0 to the end of the flow.
        thetas: the adapter's weights at each of these times, `(n_tokens, token_dim)`.
        stopping_point: where the flow was stopped.
        nfe: how often the velocity was computed.
        hidden: what the first blocks compute of the support images; None where that was not needed.
    """

    times: list[float]
    thetas: list[torch.Tensor]
    stopping_point: StoppingPoint
    nfe: int
    hidden: Hidden | None

    @property
    def theta(self) -> torch.Tensor:
        """The weights where the flow was stopped."""
        return self.thetas[self.times.index(self.stopping_point.time)]


class HyperFlowAdapter(PreTrainedModel):
    """Generates the weights of a PEFT adapter from a support set, with forward passes of small networks only.

    HyperFlow (Kim, Kim & Hong, arXiv 2504.15323): theta(1) = theta(0) + integral of h_phi(theta, t | S) over t in 0..1.

    Attributes:
        space: the parameters that the flow moves, see `ParameterSpace`.
        processor: the backbone's image processor, saved with the adapter; None if the adapter was made without one.
        training_record: how the adapter was trained and what that cost. It is saved as `training.json` and rendered
            in the model card; None if it is not known.
        encoder: the separate support encoder; None where the frozen first blocks of the backbone encode the support.
        task_encoder: turns the features of a support set into task tokens.
        drift: the drift network h_phi.
        token_scale: `(n_tokens, 1)`, the change of theta, row by row, that one unit of the flow stands for.
        logit_scale: logarithm of the scale of the logits.
        head: turns support features into prototypes: a regularised LDA, or plain class means.
    """

    config_class = HyperFlowConfig
    base_model_prefix = "hyperflow"
    main_input_name = "pixel_values"
    config: HyperFlowConfig
    token_scale: torch.Tensor

    def __init__(self, config: HyperFlowConfig):
        super().__init__(config)
        n_blocks, width = config.backbone["num_blocks"], config.backbone["hidden_size"]
        if not 1 <= config.last_blocks <= n_blocks:
            raise ValueError(f"last_blocks={config.last_blocks}, but there are {n_blocks} blocks.")
        if config.image_size is not None and (len(config.image_size) != 2 or min(config.image_size) < 1):
            raise ValueError(f"image_size={config.image_size}, expected a height and a width.")
        self.space = ParameterSpace(
            build_peft_config(config.peft),
            width,
            config.tensor_names,
            config.tensor_shapes,
            frozen=tuple(config.frozen_tensors),
            seed=config.adapter_seed,
        )
        self.processor: BaseImageProcessor | None = None
        self.training_record: dict[str, Any] | None = None
        self.encoder: PreTrainedModel | None = None
        encoder_width = width
        if config.encoder is not None:
            encoder_config = AutoConfig.for_model(**config.encoder)
            self.encoder = AutoModel.from_config(encoder_config).eval().requires_grad_(False)
            encoder_width = _get_encoder_width(encoder_config)
        self.task_encoder = TaskEncoder(2 * encoder_width, config.drift_width)
        self.drift = DriftNetwork(
            self.space.n_tokens, self.space.token_dim, config.drift_width, config.drift_depth, config.drift_heads
        )
        self.register_buffer("token_scale", torch.full((self.space.n_tokens, 1), 0.02))
        # Calibration usually ends near these scales, so training starts there.
        scale = 20.0 if config.lda else 10.0
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        feature_width = 2 * width if config.intermediate_weight else width
        self.head: Head = RegularisedLDA(feature_width) if config.lda else unit_means
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: each part initialises itself (the drift network with an output of zero)."""

    def train(self, mode: bool = True) -> HyperFlowAdapter:
        """Switch to training mode; the support encoder is frozen and stays in evaluation mode."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()
        return self

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
            backbone: a transformers vision model.
            peft_config: which weights are generated, with full dotted paths as targets. `bias_config`, `lora_config`
                and `layernorm_config` of `hf_hyperflow.modeling.peft_configs` make the usual ones.
            last_blocks: how many of the last blocks are adapted. All targets lie in them or behind them.
            processor: the backbone's image processor, saved with the adapter.
            frozen_tensors: parts of the names of adapter tensors that stay at their seeded start (LoRA's "lora_A").
            encoder: a separate pretrained vision model to encode support sets; None shares the backbone's first blocks.
            config: further fields of `HyperFlowConfig`.

        Raises:
            IncompatibleBackboneError: the backbone has no blocks or no such targets, or it cannot be split.
        """
        with get_lock(backbone):
            space = ParameterSpace.from_backbone(backbone, peft_config, frozen=frozen_tensors)
            blocks = find_blocks(backbone)
            _require_in_last_blocks(space, blocks, last_blocks)
            SplitBackbone(backbone, len(blocks) - last_blocks, blocks=blocks).check()
            fingerprint = compute_fingerprint(backbone)
        encoder_config = None if encoder is None else encoder.config.to_dict()
        model = cls(
            HyperFlowConfig(
                backbone={
                    "name_or_path": str(backbone.config._name_or_path),
                    "model_type": backbone.config.model_type,
                    "hidden_size": space.token_dim,
                    "num_blocks": len(blocks),
                    "fingerprint": fingerprint,
                },
                last_blocks=last_blocks,
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
        skip_bad: bool = False,
    ) -> AdaptedTask:
        """Adapt a backbone to the classes of a support set, without gradients.

        Any number of threads may adapt one backbone, and use its tasks, at the same time; see `AdaptedTask`.

        Args:
            backbone: the model that the adapter was trained for, on any device and in any precision. PEFT's modules
                wrap its own until `AdaptedTask.reset`. Several tasks can share one backbone.
            support: a `datasets.Dataset`, a dict of class name to images, an image folder or `(pixel_values, labels)`.
            n_steps: number of solver steps from t = 0 to t = 1; None takes the config's.
            solver: euler, midpoint, heun, rk4, or with torchdiffeq dopri5, dopri8, bosh3; None takes the config's.
            early_stopping: stop the flow where the leave-one-out accuracy on the support set is best. Of equal points
                the earliest is taken, t = 0 included. Some class needs two images or more. The adapted blocks are run
                on the support set at every step.
            skip_bad: leave out images that cannot be read.

        Returns:
            The adapted task. Its prototypes are computed when they are first needed.

        Raises:
            SupportSetError, ImageError: see `read_support`.
            IncompatibleBackboneError: the backbone is not of the adapter's kind. It is left as it was.
            NotFiniteError: the backbone or the adapter has NaN or infinite weights, or the flow diverges.
            ValueError: the solver is not known, or `n_steps` is not an integer of at least 1.
        """
        split = self.split(backbone)
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
            if not torch.stack(path.thetas).isfinite().all():
                self._raise_not_finite(split, images)
        # The task writes theta into the backbone whenever it is used, so that several tasks can share it.
        return AdaptedTask(
            split=split,
            space=self.space,
            theta=path.theta,
            class_names=images.class_names,
            scale=self._get_scale(),
            processor=self.processor,
            support=SupportImages(path.hidden or images.pixel_values, images.labels, self.head, images.names),
            nfe=path.nfe,
            stopping_point=path.stopping_point,
        )

    @torch.no_grad()
    def direct_transfer(self, backbone: PreTrainedModel, support: Any, *, skip_bad: bool = False) -> AdaptedTask:
        """The baseline: the backbone is not adapted, and images are compared by cosines with the class means.

        Arguments and errors are those of `adapt`. The task that is returned has theta at its start.
        """
        blocks = self.split(backbone).blocks
        images = self._read(support, backbone, skip_bad)
        with get_lock(backbone), self._injected(backbone) as injection:
            theta = injection.start
        return AdaptedTask(
            split=SplitBackbone(backbone, 0, self.config.pooling, blocks),
            space=self.space,
            theta=theta,
            class_names=images.class_names,
            scale=self._get_scale(),
            processor=self.processor,
            support=SupportImages(images.pixel_values, images.labels, unit_means, images.names),
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

    def _get_scale(self) -> float:
        """The scale of the logits."""
        scale = self.logit_scale.exp().item()
        if not 0 < scale < math.inf:
            exponent = self.logit_scale.item()
            raise NotFiniteError(f"logit_scale of the adapter is {exponent:g}, which makes a scale of {scale:g}.")
        return scale

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

    def split(self, backbone: PreTrainedModel) -> SplitBackbone:
        """The backbone in two halves: the frozen first blocks and the adapted last ones.

        Raises:
            IncompatibleBackboneError: the backbone has another width or depth than the adapter was made for.
        """
        expected = self.config.backbone
        with get_lock(backbone):
            blocks = find_blocks(backbone)
        wrong = []
        for key, value in (("hidden_size", backbone.config.hidden_size), ("num_blocks", len(blocks))):
            if value != expected[key]:
                wrong.append(f"{key} is {value}, expected {expected[key]}")
        if wrong:
            raise IncompatibleBackboneError(
                f"this {type(backbone).__name__} is not the backbone of the adapter: {'; '.join(wrong)}. "
                f"Use {expected['name_or_path'] or 'the ' + expected['model_type'] + ' it was trained for'}."
            )
        start = len(blocks) - self.config.last_blocks
        return SplitBackbone(backbone, start, self.config.pooling, blocks, self.config.intermediate_weight)

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

    def follow(
        self,
        split: SplitBackbone,
        injection: Injection,
        pixel_values: torch.Tensor,
        labels: torch.Tensor,
        hidden: Hidden | None = None,
        *,
        n_steps: int | None = None,
        solver: str | None = None,
        end_time: float = 1.0,
        early_stopping: bool = False,
    ) -> WeightPath:
        """The flow of one support set, as weights. This is `adapt` without reading images and without locks.

        Args:
            injection: the adapter in the backbone.
            pixel_values: `(n, 3, height, width)`.
            labels: `(n,)` in 0..n_way-1.
            hidden: the hidden states of the images behind the first blocks, if they are known already.
            n_steps, solver, end_time: see `flow`.
            early_stopping: see `adapt`.
        """
        tokens, hidden = self.encode(split, pixel_values, labels, hidden)
        trajectory = self.flow(tokens, n_steps=n_steps, solver=solver, end_time=end_time)
        times, thetas = trajectory.times, [self.theta(z[0], injection.start) for z in trajectory.states]
        stopping_point = StoppingPoint(times[-1])
        # Weights that are not finite are an error of the caller's, which no stopping point mends.
        if early_stopping and torch.stack(thetas).isfinite().all():
            hidden = hidden or split.forward_prefix(pixel_values)
            stopping_point = choose_stopping_point(split, injection, hidden, labels, times, thetas, self.head)
        return WeightPath(times, thetas, stopping_point, trajectory.nfe, hidden)

    def encode(
        self, split: SplitBackbone, pixel_values: torch.Tensor, labels: torch.Tensor, hidden: Hidden | None = None
    ) -> tuple[TaskTokens, Hidden | None]:
        """Task tokens of one support set (batch 1), and the hidden states of its images, see `encode_images`."""
        features, hidden = self.encode_images(split, pixel_values, hidden)
        return self.task_encoder(features.to(self.logit_scale.dtype), labels.to(self.device)), hidden

    def encode_images(
        self, split: SplitBackbone, pixel_values: torch.Tensor, hidden: Hidden | None = None
    ) -> tuple[torch.Tensor, Hidden | None]:
        """Features `(n, feature_dim)` of images for the task encoder, and the hidden states behind the first blocks.

        Images larger than `config.image_size` are encoded at that size, because the flow has seen no larger ones. For
        these, and with a separate encoder, the features do not come from the hidden states of the images as they are,
        and the second result is `hidden` as it was given.

        Args:
            pixel_values: `(n, 3, height, width)`.
            hidden: the hidden states behind the first blocks, if they are known already.
        """
        reduced = self._reduce(pixel_values)
        if self.encoder is not None:
            states = self.encoder(reduced.to(self.device, self.encoder.dtype)).last_hidden_state
            return pool_tokens(states), hidden
        if reduced is not pixel_values:
            states = split.forward_prefix(reduced).states
            return pool_tokens(states).to(self.device), hidden
        if hidden is None:
            hidden = split.forward_prefix(pixel_values)
        return pool_tokens(hidden.states).to(self.device), hidden

    def _reduce(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Bring images larger than those of training down to their size; leave others as they are."""
        size = self.config.image_size
        if size is None or math.prod(pixel_values.shape[-2:]) <= math.prod(size):
            return pixel_values
        small = F.interpolate(pixel_values.float(), size=tuple(size), mode="bicubic", antialias=True)
        return small.to(pixel_values.dtype)

    def flow(
        self, tokens: TaskTokens, *, n_steps: int | None = None, solver: str | None = None, end_time: float = 1.0
    ) -> Trajectory:
        """Integrate the velocity from z = 0 at t = 0 to `end_time`, for a batch of tasks.

        The states are `(batch, n_tokens, token_dim)`; `theta` turns them into weights. Differentiable.

        Raises:
            ValueError, ImportError: see `integrate`.
        """
        shape = (len(tokens.task), self.space.n_tokens, self.space.token_dim)
        start = torch.zeros(shape, dtype=tokens.task.dtype, device=self.device)
        return integrate(
            lambda z, t: self.velocity(z, t, tokens),
            start,
            n_steps=self.config.n_steps if n_steps is None else n_steps,
            method=solver or self.config.solver,
            end_time=end_time,
        )

    def velocity(self, z: torch.Tensor, t: torch.Tensor | float, tokens: TaskTokens) -> torch.Tensor:
        """d z / d t at z `(batch, n_tokens, token_dim)` and time t, a number or `(batch,)`; zero on padding."""
        return self.drift(z, t, tokens) * self.space.mask.to(z.device)

    def theta(self, z: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """The adapter's weights at a point z of the flow: start + token_scale * z.

        Args:
            z: `(..., n_tokens, token_dim)`, as is the result.
            start: `(n_tokens, token_dim)`, the weights before the flow, see `Injection.start`.
        """
        return start + (self.token_scale * z).to(start)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write config, weights (safetensors), image processor, training record, code and a model card.

        All of it is written or nothing: whoever loads the adapter at any moment, also after a kill or a power cut, gets
        the old or the new one. A README.md that somebody wrote there is kept. Further arguments are those of
        `PreTrainedModel.save_pretrained`.

        Raises:
            CheckpointError: the folder cannot be written, or another process or thread is writing to it; with
                `push_to_hub=True` also as `push_to_hub`.
        """
        push = kwargs.pop("push_to_hub", False)
        repo_id = kwargs.pop("repo_id", None) or Path(save_directory).name
        push_arguments = {}
        for key in ("private", "token", "revision", "commit_message"):
            if key in kwargs:
                push_arguments[key] = kwargs.pop(key)
        with atomic_folder(save_directory) as draft:
            super().save_pretrained(draft, *args, **kwargs)
            self.config.weights_sha256 = sha256(draft / WEIGHTS)
            self.config.save_pretrained(draft)
            if self.processor is not None:
                self.processor.save_pretrained(draft)
            if self.training_record is not None:
                write_json(draft / TRAINING_RECORD, self.training_record)
            write_checksums(draft, MODEL_CHECKSUMS, save_directory, optional=(PROCESSOR, TRAINING_RECORD))
            write_card(adapter_card(self.config, self.space, self.training_record), draft, save_directory)
        if push:
            self.push_to_hub(repo_id, **push_arguments)

    # Fewer arguments than transformers', and the commit instead of its address.
    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
    ) -> CommitInfo:
        """Push everything that `save_pretrained` writes to the Hub, as one commit; see `push_folder`.

        Raises:
            CheckpointError: the token is missing, wrong or may not write, or the Hub cannot be reached. Nothing was
                changed there.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(
                folder, repo_id, private=private, token=token, revision=revision, commit_message=commit_message
            )

    @classmethod
    def from_pretrained(  # type: ignore[override]  # a name is needed, and further arguments have no order
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> HyperFlowAdapter:
        """Load an adapter from a folder or the Hub.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id.
            args, kwargs: `revision` (a branch, tag or commit), `token`, `cache_dir`, `local_files_only`,
                `force_download`, `subfolder` and the other arguments of `PreTrainedModel.from_pretrained`.

        Raises:
            CheckpointError: there is no adapter, it may not be read, or it is neither within reach nor in the cache;
                or its files are damaged, truncated or incomplete, or they say what no adapter says: every field is
                checked before anything is built from it, and nothing is run or unpickled.
        """
        name = pretrained_model_name_or_path
        hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        config = kwargs.pop("config", None)
        if not isinstance(config, HyperFlowConfig):
            config = None
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("dtype", torch.float32)
        with open_adapter(name, hub, kwargs.pop("subfolder", ""), config) as (folder, config):
            weights = read_weights(folder / WEIGHTS)
            wrong = list_differences(weights, cls._build_skeleton(config, folder).state_dict())
            if wrong:
                raise CheckpointError(
                    f"{folder / WEIGHTS} does not fit {CONFIG}; missing, unknown or of another shape: "
                    f"{', '.join(wrong[:8])}. Download or copy the folder again."
                )
            # The files are read here. transformers would also follow others in the folder, to base models and kernels.
            loaded: Any = super().from_pretrained(
                None, *args, config=config, state_dict=weights, output_loading_info=True, **kwargs
            )
            model: HyperFlowAdapter = loaded[0]
            model.processor = load_processor(folder)
            model.training_record = read_training_record(folder / TRAINING_RECORD, config, model.space)
        model.config.name_or_path = model.name_or_path = str(name)
        return loaded if wants_info else model

    @classmethod
    def _build_skeleton(cls, config: HyperFlowConfig, folder: Path) -> HyperFlowAdapter:
        """An adapter without memory for its weights, whatever sizes the config names."""
        try:
            with torch.device("meta"):
                return cls(config)
        except Exception as error:  # the encoder's model may raise anything
            raise CheckpointError(
                f"{folder / CONFIG} describes no adapter that can be built ({type(error).__name__}: {error}). The file "
                "is damaged: download or copy it again."
            ) from error


def _get_encoder_width(config: PreTrainedConfig) -> int:
    """The width of a vision model's last hidden states. Convolutional models list one width per stage."""
    sizes = vars(config).get("hidden_sizes")
    return sizes[-1] if sizes else config.hidden_size


def _require_in_last_blocks(space: ParameterSpace, blocks: Blocks, last_blocks: int) -> None:
    """Raise an error if a tensor of the space lies before the last blocks."""
    modules = tuple(name.rsplit(".", 1)[0] for name in blocks.after(len(blocks) - last_blocks))
    for name in space.names:
        if not name.startswith(modules):
            raise IncompatibleBackboneError(f"{name} is not in the last {last_blocks} blocks: raise last_blocks.")
