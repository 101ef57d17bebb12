"""`HyperFlowAdapter`: adapts a vision backbone to a support set by integrating a learned flow over its parameters."""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import CommitInfo
from peft import PeftConfig, get_peft_config
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from .backbones import Hidden, IncompatibleBackboneError, SplitBackbone, find_blocks
from .configuration import HyperFlowConfig
from .drift import DriftNetwork
from .fingerprint import fingerprint, same_fingerprint
from .guard import Choice, choose_time
from .hub import fetch, push_folder
from .images import load_processor
from .metric import SupportMetric
from .model_card import adapter_card, write_card
from .parameter_space import ParameterSpace, config_to_dict, take_out
from .prototypes import Prototypes, unit_means
from .saving import CheckpointError, read_record, require_sha256, sha256, write_json, written_whole
from .solvers import Trajectory, integrate
from .support import read_support
from .task import CHECKSUMS, AdaptedTask, evaluating
from .task_encoder import TaskEncoder, TaskTokens, pooled_tokens

WEIGHTS = "model.safetensors"
TRAINING_RECORD = "training.json"


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
        log_scale: logarithm of the scale of the cosine logits.
        metric: what makes prototypes of the support set; None for plain cosines to class means.
    """

    config_class = HyperFlowConfig
    base_model_prefix = "hyperflow"
    main_input_name = "pixel_values"

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
        if config.encoder is None:
            self.encoder, feature_dim = None, 2 * config.backbone["hidden_size"]
        else:
            encoder_config = AutoConfig.for_model(**config.encoder)
            self.encoder = AutoModel.from_config(encoder_config).eval().requires_grad_(False)
            sizes = vars(encoder_config).get("hidden_sizes")
            feature_dim = 2 * (sizes[-1] if sizes else encoder_config.hidden_size)
        self.task_encoder = TaskEncoder(feature_dim, config.drift_width)
        self.drift = DriftNetwork(
            self.space.n_tokens, self.space.token_dim, config.drift_width, config.drift_depth, config.drift_heads
        )
        # Where the scale that training/calibrate.py finds is to be expected, so that training has not far to go.
        self.log_scale = nn.Parameter(torch.tensor(math.log(20.0 if config.metric else 10.0)))
        width = config.backbone["hidden_size"] * (2 if config.middle else 1)
        self.metric = SupportMetric(width) if config.metric else None
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
        backbone: nn.Module,
        peft_config: PeftConfig,
        *,
        last_blocks: int,
        processor: BaseImageProcessor | None = None,
        frozen_tensors: tuple[str, ...] = (),
        encoder: nn.Module | None = None,
        **config: object,
    ) -> HyperFlowAdapter:
        """A new, untrained adapter for a backbone, which is left as it was.

        Args:
            backbone: a transformers vision model.
            peft_config: what is to be generated, with full dotted paths as targets; `bias_config`, `lora_config` and
                `layernorm_config` of `hf_hyperflow.parameter_space` make the usual ones.
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
        inside = blocks.after(len(blocks) - last_blocks)
        outside = [n for n in space.names if not any(n.startswith(i.rsplit(".", 1)[0]) for i in inside)]
        if outside:
            raise IncompatibleBackboneError(f"{outside[0]} is not in the last {last_blocks} blocks: raise last_blocks.")
        size, parameter = backbone.config.image_size, next(backbone.parameters())
        with evaluating(backbone):
            pixel_values = parameter.new_zeros(1, 3, *((size, size) if isinstance(size, int) else size))
            SplitBackbone(backbone, len(blocks) - last_blocks, blocks=blocks).check(pixel_values)
        model = cls(
            HyperFlowConfig(
                backbone={
                    "name_or_path": str(backbone.config._name_or_path),
                    "model_type": backbone.config.model_type,
                    "hidden_size": space.token_dim,
                    "num_blocks": len(blocks),
                    "fingerprint": fingerprint(backbone),
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
        if encoder is not None:
            model.encoder.load_state_dict(encoder.state_dict())
        model.processor = processor
        return model

    def split(self, backbone: nn.Module) -> SplitBackbone:
        """The backbone in two halves, after a check that it is of the kind the adapter was made for.

        Raises:
            IncompatibleBackboneError: another width or depth; the message names both.
        """
        expected, config = self.config.backbone, backbone.config
        blocks = find_blocks(backbone)
        found = {"hidden_size": config.hidden_size, "num_blocks": len(blocks)}
        wrong = [
            f"{key} is {value}, expected {expected[key]}" for key, value in found.items() if value != expected[key]
        ]
        if wrong:
            raise IncompatibleBackboneError(
                f"this {type(backbone).__name__} is not the backbone of the adapter: {'; '.join(wrong)}. "
                f"Use {expected['name_or_path'] or 'the ' + expected['model_type'] + ' it was trained for'}."
            )
        start = len(blocks) - self.config.last_blocks
        return SplitBackbone(backbone, start, self.config.pooling, blocks, self.config.middle)

    def support_features(
        self, split: SplitBackbone, pixel_values: torch.Tensor, hidden: Hidden | None = None
    ) -> tuple[torch.Tensor, Hidden | None]:
        """Features `(n, feature_dim)` for the task encoder and, with a shared encoder, what the first blocks computed.

        `hidden` is that if it is known already. Of images larger than `config.image_size` the features are those at
        that size, and what the first blocks would say of them as they are is not computed.
        """
        reduced = self._reduced(pixel_values)
        if self.encoder is not None:
            states = self.encoder(reduced.to(self.device, self.encoder.dtype)).last_hidden_state
            return pooled_tokens(states), hidden
        if hidden is None and reduced is not pixel_values:
            return pooled_tokens(split.prefix(reduced).states).to(self.device), None
        hidden = hidden or split.prefix(pixel_values)
        return pooled_tokens(hidden.states).to(self.device), hidden

    def _reduced(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixel values as they are or, of larger images, at the size the adapter was trained at."""
        size = self.config.image_size
        if size is None or math.prod(pixel_values.shape[-2:]) <= math.prod(size):
            return pixel_values
        small = F.interpolate(pixel_values.float(), size=tuple(size), mode="bicubic", antialias=True)
        return small.to(pixel_values.dtype)

    @property
    def prototypes(self) -> Prototypes:
        """What makes prototypes `(n_way, width)` from support features `(n, width)` and labels `(n,)`."""
        return unit_means if self.metric is None else self.metric

    def flow(
        self, tasks: TaskTokens, *, n_steps: int | None = None, solver: str | None = None, end_time: float = 1.0
    ) -> Trajectory:
        """Integrate the drift from zero for a batch of tasks: states `(batch, n_tokens, token_dim)`, scaled."""
        mask = self.space.mask.to(self.device)
        start = torch.zeros(len(tasks.task), *mask.shape, dtype=tasks.task.dtype, device=self.device)
        return integrate(
            lambda z, t: self.drift(z, t, tasks) * mask,
            start,
            n_steps=self.config.n_steps if n_steps is None else n_steps,
            method=solver or self.config.solver,
            end_time=end_time,
        )

    @torch.no_grad()
    def adapt(
        self,
        backbone: nn.Module,
        support: object,
        *,
        n_steps: int | None = None,
        solver: str | None = None,
        guard: str | None = None,
        skip_bad: bool = False,
    ) -> AdaptedTask:
        """Adapt a backbone to the classes of a support set: no gradients, no optimiser.

        Args:
            backbone: the model the adapter was trained for, on any device and in any precision. Its modules are
                wrapped by PEFT's until `AdaptedTask.reset`; several tasks can share one backbone.
            support: a `datasets.Dataset`, a dict of class name to images, an image folder or `(pixel_values, labels)`.
            n_steps: solver steps from t = 0 to t = 1.
            solver: euler, midpoint, heun, rk4, or with torchdiffeq dopri5, dopri8, bosh3.
            guard: "loo" stops the flow where the leave-one-out accuracy on the support set is best (earliest of
                equals, t = 0 included); needs a class with two images or more. It runs the target's adapted blocks.
            skip_bad: leave out images that cannot be read.

        Returns:
            The adapted task. Its prototypes are computed when they are first needed.

        Raises:
            SupportSetError, ImageError: see `read_support`.
            IncompatibleBackboneError: the backbone is not of the adapter's kind; it is left as it was.
            ValueError: an unknown solver or guard, or no steps.
        """
        if guard not in (None, "loo"):
            raise ValueError(f"unknown guard {guard!r}: use 'loo' or None.")
        split = self.split(backbone)
        data = read_support(support, self.processor, skip_bad=skip_bad)
        was_in = self.space.is_in(backbone)
        if not was_in:
            take_out(backbone)
            found = fingerprint(backbone)
        parameter = next(backbone.parameters())
        pixel_values = data.pixel_values.to(parameter.device, parameter.dtype)
        labels = data.labels.to(parameter.device)
        injection = self.space.inject(backbone)
        try:
            if not was_in:
                self._warn_if_other_weights(backbone, found)
            with evaluating(backbone):
                features, hidden = self.support_features(split, pixel_values)
                tasks = self.task_encoder(features.to(self.log_scale.dtype), labels.to(self.device))
                trajectory = self.flow(tasks, n_steps=n_steps, solver=solver)
                steps = [injection.start + (self.token_scale * z[0]).to(injection.start) for z in trajectory.states]
                choice = Choice(time=trajectory.times[-1])
                if guard == "loo":
                    hidden = hidden or split.prefix(pixel_values)
                    choice = choose_time(split, injection, hidden, labels, trajectory.times, steps, self.prototypes)
        except BaseException:
            if not was_in:
                injection.remove()
            raise
        return AdaptedTask(
            split=split,
            space=self.space,
            theta=steps[trajectory.times.index(choice.time)],
            class_names=data.class_names,
            scale=self.log_scale.exp().item(),
            processor=self.processor,
            support=(hidden or pixel_values, labels, self.prototypes),
            n_evaluations=trajectory.n_evaluations,
            choice=choice,
        )

    def _warn_if_other_weights(self, backbone: nn.Module, found: list[float]) -> None:
        expected = self.config.backbone.get("fingerprint")
        if expected and not same_fingerprint(expected, found):
            warnings.warn(
                f"the weights of this {type(backbone).__name__} are not those the adapter was trained for "
                f"({self.config.backbone['name_or_path']}): expect no gain.",
                stacklevel=3,
            )

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: object) -> None:
        """Write config, weights (safetensors), image processor, training record and a model card, all or nothing.

        A README.md that somebody wrote there is kept.

        Raises:
            CheckpointError: the folder cannot be written; or, with `push_to_hub=True`, see there.
        """
        push = kwargs.pop("push_to_hub", False)
        target = {k: kwargs.pop(k) for k in ("private", "token", "revision", "commit_message") if k in kwargs}
        repo_id = kwargs.pop("repo_id", None) or Path(save_directory).name
        with written_whole(save_directory) as draft:
            super().save_pretrained(draft, **kwargs)
            self.config.weights_sha256 = sha256(draft / WEIGHTS)
            self.config.save_pretrained(draft)
            if self.processor is not None:
                self.processor.save_pretrained(draft)
            if self.training_record is not None:
                write_json(draft / TRAINING_RECORD, self.training_record)
            write_card(adapter_card(self.config, self.space, self.training_record), draft, save_directory)
        if push:
            self.push_to_hub(repo_id, **target)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
    ) -> CommitInfo:
        """Push everything that `save_pretrained` writes to the Hub, as one commit; see `hf_hyperflow.hub.push_folder`.

        Raises:
            CheckpointError: no token, a wrong one, no permission or no connection; nothing was changed there.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(
                folder, repo_id, private=private, token=token, revision=revision, commit_message=commit_message
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args, **kwargs) -> HyperFlowAdapter:
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
        keys = ("revision", "token", "cache_dir", "local_files_only", "force_download")
        hub = {k: kwargs.pop(k) for k in keys if k in kwargs}
        folder = fetch(name, "*.json", **hub)
        if not os.path.isdir(name):
            hub["revision"] = folder.name  # the weights of the same commit, and only once it is known to be an adapter
        folder /= kwargs.pop("subfolder", "")
        if not isinstance(kwargs.get("config"), HyperFlowConfig):
            try:
                found, _ = HyperFlowConfig.get_config_dict(folder)
                is_adapter = found.get("model_type") == HyperFlowConfig.model_type and bool(found.get("peft"))
                kwargs["config"] = HyperFlowConfig.from_pretrained(folder) if is_adapter else None
            except Exception as error:  # what is in the file may be anything
                raise CheckpointError(f"{name} holds no readable HyperFlow adapter: {error}") from error
            if not is_adapter:
                is_task = (folder / CHECKSUMS).is_file()
                hint = " It is an adapted task: load it with AdaptedTask.from_pretrained." if is_task else ""
                raise CheckpointError(f"{name} does not describe a HyperFlow adapter in its config.json.{hint}")
        fetch(name, f"*{WEIGHTS}", **hub)
        weights = folder / WEIGHTS
        if not weights.is_file():
            raise CheckpointError(f"{name} has no {WEIGHTS}: the adapter is incomplete.")
        require_sha256(weights, kwargs["config"].weights_sha256)
        wanted = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        try:
            model, info = super().from_pretrained(folder, *args, **{"dtype": torch.float32} | kwargs | wanted)
        except Exception as error:  # a damaged header or config can fail anywhere in the making of the parts
            raise CheckpointError(
                f"{weights} is damaged or does not fit config.json ({type(error).__name__}: {error})"
            ) from error
        wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
        wrong += sorted(key for key, *_ in info["mismatched_keys"])
        if wrong:
            raise CheckpointError(
                f"{weights} does not fit config.json; missing, unknown or of another shape: {', '.join(wrong[:8])}"
            )
        model.config.name_or_path = model.name_or_path = str(name)
        model.processor = load_processor(folder)
        model.training_record = read_record(folder / TRAINING_RECORD)
        return (model, info) if kwargs.get("output_loading_info") else model
