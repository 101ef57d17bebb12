"""`HyperFlowAdapter`: adapts a vision backbone to a support set by integrating a learned flow over its parameters."""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import CommitInfo
from peft import PeftConfig, get_peft_config
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from .adapter_files import HUB_ARGUMENTS, RENAMED_WEIGHTS, TRAINING_RECORD, WEIGHTS, fetch_adapter, require_all_weights
from .backbones import Blocks, Hidden, IncompatibleBackboneError, SplitBackbone, eval_mode, find_blocks
from .configuration import HyperFlowConfig
from .drift import DriftNetwork
from .fingerprint import compute_fingerprint, fingerprints_match
from .hub import push_folder
from .images import load_processor
from .injection import Injection, unload
from .lda import RegularisedLDA
from .model_card import adapter_card, write_card
from .parameter_space import ParameterSpace
from .peft_configs import config_to_dict
from .prototypes import Head, unit_means
from .saving import CheckpointError, atomic_folder, read_record, sha256, write_json
from .solvers import Trajectory, integrate
from .stopping import StoppingPoint, choose_stopping_point
from .support import SupportSet, read_support
from .task import AdaptedTask, SupportImages
from .task_encoder import TaskEncoder, TaskTokens, pool_tokens


class HyperFlowAdapter(PreTrainedModel):
    """Generates the weights of a PEFT adapter from a support set, with forward passes of small networks only.

    HyperFlow (Kim, Kim & Hong, arXiv 2504.15323): theta(1) = theta(0) + integral of h_phi(theta, t | S) over t in 0..1.

    Attributes:
        space: the parameters that move, see `ParameterSpace`.
        processor: the image processor of the backbone, saved with the adapter; None if it was made without.
        training_record: how it was trained and what that cost, saved as `training.json` and told by the model card;
            None if that is not known.
        encoder: the separate support encoder, or None when the first blocks of the target are shared.
        token_scale: `(n_tokens, 1)`, what one unit of the flow is worth in each row of theta.
        logit_scale: logarithm of the scale of the cosine logits.
        head: makes prototypes of the support set: a regularised LDA, or plain class means.
    """

    config_class = HyperFlowConfig
    base_model_prefix = "hyperflow"
    main_input_name = "pixel_values"
    token_scale: torch.Tensor

    def __init__(self, config: HyperFlowConfig):
        super().__init__(config)
        if not 1 <= config.last_blocks <= config.backbone["num_blocks"]:
            raise ValueError(f"last_blocks={config.last_blocks}, but there are {config.backbone['num_blocks']} blocks.")
        if config.image_size is not None and (len(config.image_size) != 2 or min(config.image_size) < 1):
            raise ValueError(f"image_size={config.image_size}, expected a height and a width.")
        self.space = ParameterSpace(
            get_peft_config(dict(config.peft)),
            config.backbone["hidden_size"],
            config.tensor_names,
            config.tensor_shapes,
            frozen=tuple(config.frozen_tensors or ()),
            seed=config.adapter_seed,
        )
        self.processor: BaseImageProcessor | None = None
        self.training_record: dict | None = None
        width = config.backbone["hidden_size"]
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
        # Where calibration is to be expected to end, so that training has not far to go.
        scale = 20.0 if config.lda else 10.0
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        feature_width = 2 * width if config.intermediate_weight else width
        self.head: Head = RegularisedLDA(feature_width) if config.lda else unit_means
        self.register_buffer("token_scale", torch.full((self.space.n_tokens, 1), 0.02))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the parts start themselves (the output of the drift network at zero)."""

    def train(self, mode: bool = True) -> HyperFlowAdapter:
        """Training mode for all but the support encoder, which is frozen."""
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
        """A new, untrained adapter for a backbone, which is left as it was.

        Args:
            backbone: a transformers vision model.
            peft_config: what is to be generated, with full dotted paths as targets; `bias_config`, `lora_config` and
                `layernorm_config` of `hf_hyperflow.modeling.peft_configs` make the usual ones.
            last_blocks: all targets lie in the last so many blocks (or behind them).
            processor: the backbone's image processor, saved with the adapter.
            frozen_tensors: parts of names of adapter tensors that keep their seeded start (LoRA's "lora_A").
            encoder: a separate pretrained vision model to encode support sets; None shares the target's first blocks.
            config: further fields of `HyperFlowConfig`.

        Raises:
            IncompatibleBackboneError: the backbone has no blocks, no such targets, or cannot be split.
        """
        space = ParameterSpace.from_backbone(backbone, peft_config, frozen=frozen_tensors)
        blocks = find_blocks(backbone)
        _require_in_last_blocks(space, blocks, last_blocks)
        SplitBackbone(backbone, len(blocks) - last_blocks, blocks=blocks).check()
        model = cls(
            HyperFlowConfig(
                backbone={
                    "name_or_path": str(backbone.config._name_or_path),
                    "model_type": backbone.config.model_type,
                    "hidden_size": space.token_dim,
                    "num_blocks": len(blocks),
                    "fingerprint": compute_fingerprint(backbone),
                },
                last_blocks=last_blocks,
                peft=config_to_dict(peft_config),
                tensor_names=space.names,
                tensor_shapes=[list(shape) for shape in space.shapes],
                frozen_tensors=list(frozen_tensors),
                encoder=None if encoder is None else encoder.config.to_dict(),
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
        """Adapt a backbone to the classes of a support set: no gradients, no optimiser.

        Args:
            backbone: the model the adapter was trained for, on any device and in any precision. Its modules are
                wrapped by PEFT's until `AdaptedTask.reset`; several tasks can share one backbone.
            support: a `datasets.Dataset`, a dict of class name to images, an image folder or `(pixel_values, labels)`.
            n_steps: solver steps from t = 0 to t = 1.
            solver: euler, midpoint, heun, rk4, or with torchdiffeq dopri5, dopri8, bosh3.
            early_stopping: stop the flow where the leave-one-out accuracy on the support set is best (earliest of
                equals, t = 0 included). It needs a class with two images or more, and runs the adapted blocks.
            skip_bad: leave out images that cannot be read.

        Returns:
            The adapted task. Its prototypes are computed when they are first needed.

        Raises:
            SupportSetError, ImageError: see `read_support`.
            IncompatibleBackboneError: the backbone is not of the adapter's kind; it is left as it was.
            ValueError: an unknown solver, or no steps.
        """
        split = self.split(backbone)
        images = self._read(support, backbone, skip_bad)
        with self._injected(backbone) as injection, eval_mode(backbone):
            tokens, hidden = self.encode(split, images.pixel_values, images.labels)
            trajectory = self.flow(tokens, n_steps=n_steps, solver=solver)
            thetas = [self.theta(z[0], injection.start) for z in trajectory.states]
            stopping_point = StoppingPoint(trajectory.times[-1])
            if early_stopping:
                hidden = hidden or split.forward_prefix(images.pixel_values)
                stopping_point = choose_stopping_point(
                    split, injection, hidden, images.labels, trajectory.times, thetas, self.head
                )
        return AdaptedTask(
            split=split,
            space=self.space,
            theta=thetas[trajectory.times.index(stopping_point.time)],
            class_names=images.class_names,
            scale=self.logit_scale.exp().item(),
            processor=self.processor,
            support=SupportImages(hidden or images.pixel_values, images.labels, self.head),
            nfe=trajectory.nfe,
            stopping_point=stopping_point,
        )

    @torch.no_grad()
    def direct_transfer(self, backbone: PreTrainedModel, support: Any, *, skip_bad: bool = False) -> AdaptedTask:
        """The baseline: the backbone as it is, classifying by plain cosines to the class means of a support set.

        Arguments, results and errors as for `adapt`; what is returned has theta at its start.
        """
        blocks = self.split(backbone).blocks
        images = self._read(support, backbone, skip_bad)
        with self._injected(backbone) as injection:
            theta = injection.start
        return AdaptedTask(
            split=SplitBackbone(backbone, 0, self.config.pooling, blocks),
            space=self.space,
            theta=theta,
            class_names=images.class_names,
            scale=self.logit_scale.exp().item(),
            processor=self.processor,
            support=SupportImages(images.pixel_values, images.labels, unit_means),
        )

    def _read(self, support: Any, backbone: nn.Module, skip_bad: bool) -> SupportSet:
        """A support set with its tensors where the backbone is."""
        parameter = next(backbone.parameters())
        return read_support(support, self.processor, skip_bad=skip_bad).to(parameter.device, parameter.dtype)

    def split(self, backbone: PreTrainedModel) -> SplitBackbone:
        """The backbone in two halves, after a check that it is of the kind the adapter was made for.

        Raises:
            IncompatibleBackboneError: another width or depth; the message names both.
        """
        expected = self.config.backbone
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
        """The adapter inside the backbone; taken out again if something fails, unless it was there before."""
        was_in = self.space.is_in(backbone)
        if not was_in:
            unload(backbone)
            self._warn_of_other_weights(backbone)
        injection = self.space.inject(backbone)
        try:
            yield injection
        except BaseException:
            if not was_in:
                injection.remove()
            raise

    def _warn_of_other_weights(self, backbone: nn.Module) -> None:
        expected = self.config.backbone.get("fingerprint")
        if expected and not fingerprints_match(expected, compute_fingerprint(backbone)):
            warnings.warn(
                f"the weights of this {type(backbone).__name__} are not those the adapter was trained for "
                f"({self.config.backbone['name_or_path']}): expect no gain.",
                stacklevel=5,
            )

    def encode(
        self, split: SplitBackbone, pixel_values: torch.Tensor, labels: torch.Tensor, hidden: Hidden | None = None
    ) -> tuple[TaskTokens, Hidden | None]:
        """Task tokens of one support set (batch 1), and `hidden` as `encode_images` gives it."""
        features, hidden = self.encode_images(split, pixel_values, hidden)
        return self.task_encoder(features.to(self.logit_scale.dtype), labels.to(self.device)), hidden

    def encode_images(
        self, split: SplitBackbone, pixel_values: torch.Tensor, hidden: Hidden | None = None
    ) -> tuple[torch.Tensor, Hidden | None]:
        """Features `(n, feature_dim)` for the task encoder and, with a shared encoder, what the first blocks computed.

        Of images larger than `config.image_size` the features are those at that size, and what the first blocks would
        say of them as they are is not computed.

        Args:
            pixel_values: `(n, 3, height, width)`.
            hidden: what the first blocks computed, if it is known already.
        """
        reduced = self._reduce(pixel_values)
        if self.encoder is not None:
            states = self.encoder(reduced.to(self.device, self.encoder.dtype)).last_hidden_state
            return pool_tokens(states), hidden
        if hidden is None and reduced is not pixel_values:
            return pool_tokens(split.forward_prefix(reduced).states).to(self.device), None
        if hidden is None:
            hidden = split.forward_prefix(pixel_values)
        return pool_tokens(hidden.states).to(self.device), hidden

    def _reduce(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixel values as they are or, of larger images, at the size the adapter was trained at."""
        size = self.config.image_size
        if size is None or math.prod(pixel_values.shape[-2:]) <= math.prod(size):
            return pixel_values
        small = F.interpolate(pixel_values.float(), size=tuple(size), mode="bicubic", antialias=True)
        return small.to(pixel_values.dtype)

    def flow(
        self, tasks: TaskTokens, *, n_steps: int | None = None, solver: str | None = None, end_time: float = 1.0
    ) -> Trajectory:
        """Integrate the velocity from z = 0 for a batch of tasks: states `(batch, n_tokens, token_dim)`."""
        start = torch.zeros(
            len(tasks.task), self.space.n_tokens, self.space.token_dim, dtype=tasks.task.dtype, device=self.device
        )
        return integrate(
            lambda z, t: self.velocity(z, t, tasks),
            start,
            n_steps=self.config.n_steps if n_steps is None else n_steps,
            method=solver or self.config.solver,
            end_time=end_time,
        )

    def velocity(self, z: torch.Tensor, t: torch.Tensor | float, tasks: TaskTokens) -> torch.Tensor:
        """d z / d t at z `(batch, n_tokens, token_dim)` and time t, a number or `(batch,)`; zero on padding."""
        return self.drift(z, t, tasks) * self.space.mask.to(z.device)

    def theta(self, z: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """The adapter's weights at a point z of the flow: start + token_scale * z, `(..., n_tokens, token_dim)`.

        Args:
            start: `(n_tokens, token_dim)`, see `Injection`.
        """
        return start + (self.token_scale * z).to(start)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write config, weights (safetensors), image processor, training record and a model card, all or nothing.

        A README.md that somebody wrote there is kept.

        Raises:
            CheckpointError: the folder cannot be written; or, with `push_to_hub=True`, see there.
        """
        push = kwargs.pop("push_to_hub", False)
        repo_id = kwargs.pop("repo_id", None) or Path(save_directory).name
        push_arguments = {}
        for key in ("private", "token", "revision", "commit_message"):
            if key in kwargs:
                push_arguments[key] = kwargs.pop(key)
        with atomic_folder(save_directory) as draft:
            super().save_pretrained(draft, **kwargs)
            self.config.weights_sha256 = sha256(draft / WEIGHTS)
            self.config.save_pretrained(draft)
            if self.processor is not None:
                self.processor.save_pretrained(draft)
            if self.training_record is not None:
                write_json(draft / TRAINING_RECORD, self.training_record)
            write_card(adapter_card(self.config, self.space, self.training_record), draft, save_directory)
        if push:
            self.push_to_hub(repo_id, **push_arguments)

    def push_to_hub(
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
            CheckpointError: no token, a wrong one, no permission or no connection; nothing was changed there.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(
                folder, repo_id, private=private, token=token, revision=revision, commit_message=commit_message
            )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> HyperFlowAdapter:
        """Load an adapter from a folder or the Hub.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id; `revision` (a branch, tag or commit), `token`,
                `cache_dir`, `local_files_only`, `force_download`, `subfolder` and the other arguments of
                `PreTrainedModel.from_pretrained` hold.

        Raises:
            CheckpointError: no adapter there, no access to it, no connection and not in the cache; or its files are
                damaged, truncated or incomplete.
        """
        name = pretrained_model_name_or_path
        hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        config = kwargs.pop("config", None)
        if not isinstance(config, HyperFlowConfig):
            config = None
        folder, config = fetch_adapter(name, hub, kwargs.pop("subfolder", ""), config)
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("dtype", torch.float32)
        kwargs.update(
            config=config,
            key_mapping=RENAMED_WEIGHTS,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        try:
            model, info = super().from_pretrained(folder, *args, **kwargs)
        except Exception as error:  # a damaged header or config can fail anywhere in the making of the parts
            raise CheckpointError(
                f"{folder / WEIGHTS} is damaged or does not fit config.json ({type(error).__name__}: {error})"
            ) from error
        require_all_weights(folder, info)
        model._weight_conversions = []  # or transformers would save it again under the names of old checkpoints
        model.config.name_or_path = model.name_or_path = str(name)
        model.processor = load_processor(folder)
        model.training_record = read_record(folder / TRAINING_RECORD)
        return (model, info) if wants_info else model


def _get_encoder_width(config: Any) -> int:
    """The width of a vision model's last hidden states; convolutional ones list a width per stage."""
    sizes = vars(config).get("hidden_sizes")
    return sizes[-1] if sizes else config.hidden_size


def _require_in_last_blocks(space: ParameterSpace, blocks: Blocks, last_blocks: int) -> None:
    modules = tuple(name.rsplit(".", 1)[0] for name in blocks.after(len(blocks) - last_blocks))
    for name in space.names:
        if not name.startswith(modules):
            raise IncompatibleBackboneError(f"{name} is not in the last {last_blocks} blocks: raise last_blocks.")
