"""`AdaptedTask`: a backbone adapted to the classes of one support set."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import CommitInfo
from peft import BeftConfig, LoraConfig, PeftConfig, set_peft_model_state_dict
from peft.utils.warning import PeftWarning
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.image_processing_utils import BaseImageProcessor

from .backbones import Hidden, IncompatibleBackboneError, SplitBackbone
from .guard import Choice
from .hub import fetch, push_folder
from .images import decode, load_processor
from .model_card import feature_text, task_card, write_card
from .parameter_space import Injection, ParameterSpace, take_out
from .prototypes import PrototypeClassifier, Prototypes
from .saving import CheckpointError, require_sha256, sha256, written_whole

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PROTOTYPES = "prototypes.safetensors"
CHECKSUMS = "checksums.json"


@contextmanager
def evaluating(backbone: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class AdaptedTask:
    """A backbone adapted to one task; made by `HyperFlowAdapter.adapt` or `AdaptedTask.from_pretrained`.

    Several tasks can share a backbone: each puts its own weights in when it is used.

    Attributes:
        class_names: the labels, in the order of the scores.
        theta: the adapter's weights, `(n_tokens, token_dim)`.
        choice: how far the flow was followed.
        n_evaluations: how often the drift network was run.
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
        support: tuple[Hidden | torch.Tensor, torch.Tensor, Prototypes] | None = None,
        prototypes: torch.Tensor | None = None,
        n_evaluations: int = 0,
        choice: Choice | None = None,
    ):
        self.backbone = split.backbone
        self.space = space
        self.theta = theta
        self.class_names = class_names
        self.scale = scale
        self.processor = processor
        self.n_evaluations = n_evaluations
        self.choice = choice
        self._split = split
        self._support = support
        self._prototypes = prototypes
        self._ended: str | None = None

    @property
    def prototypes(self) -> torch.Tensor:
        """`(n_way, width)`, what the features of an image, of length 1, are multiplied with; computed on first use."""
        if self._prototypes is None:
            source, labels, make = self._support
            with torch.no_grad(), self._active():
                hidden = source if isinstance(source, Hidden) else self._split.prefix(source)
                self._prototypes = make(self._split(hidden).float(), labels)
            self._support = None
        return self._prototypes

    @torch.no_grad()
    def logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits `(n, n_way)` of pixel values `(n, 3, height, width)`; their softmax is the score of each class."""
        classifier = PrototypeClassifier(self.prototypes, self.scale)
        parameter = next(self.backbone.parameters())
        with self._active():
            features = self._split.extract(pixel_values.to(parameter.device, parameter.dtype))
        return classifier(features.float())

    def scores(self, images: object, *, batch_size: int = 64) -> torch.Tensor:
        """Scores `(n, n_way)` of images (paths, bytes, PIL images, arrays) or of a tensor of pixel values.

        Raises:
            ImageError: an image cannot be read; it is named.
            ValueError: images without a processor.
        """
        if not isinstance(images, torch.Tensor):
            images = list(images)
        chunks = [self._pixels(images[i : i + batch_size], i) for i in range(0, len(images), batch_size)]
        if not chunks:
            return torch.empty(0, len(self.class_names))
        return torch.cat([self.logits(chunk).softmax(-1).cpu() for chunk in chunks])

    def predict(self, images: object, *, batch_size: int = 64) -> list[str]:
        """The best label of each image; see `scores`."""
        return [self.class_names[i] for i in self.scores(images, batch_size=batch_size).argmax(-1).tolist()]

    def __call__(self, images: object, *, top_k: int | None = None, batch_size: int = 64) -> list:
        """Labels with scores, best first: `[{"label", "score"}, ...]` of an image, a list of those of several."""
        single = not isinstance(images, list | tuple) and not (isinstance(images, torch.Tensor) and images.ndim == 4)
        if single:
            images = images.unsqueeze(0) if isinstance(images, torch.Tensor) else [images]
        k = min(top_k or len(self.class_names), len(self.class_names))
        best = self.scores(images, batch_size=batch_size).topk(k, dim=-1)
        results = [
            [{"label": self.class_names[i], "score": s} for s, i in zip(scores, indices, strict=True)]
            for scores, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        return results[0] if single else results

    def reset(self) -> None:
        """Take the adaptation out: the backbone is, bit for bit and module for module, what it was before.

        Other tasks on the same backbone put theirs back when they are used; this one is over.

        Raises:
            IncompatibleBackboneError: another task is merged into the backbone.
        """
        if self._ended is None:
            take_out(self.backbone)
        elif self._ended == "merged":
            self._merged.remove()
        self._ended = "reset"

    def merge(self) -> nn.Module:
        """Fold the adapter into the backbone's own weights, without PEFT modules, and return the backbone.

        `reset` still restores the weights that were there before, bit for bit.

        Raises:
            IncompatibleBackboneError: PEFT cannot merge it (a bias for a layer that has none).
        """
        _ = self.prototypes
        self._activate()
        injection = self.space.inject(self.backbone)
        try:
            injection.merge()
        except ValueError as error:
            injection.remove()
            raise IncompatibleBackboneError(f"PEFT cannot merge this adapter: {error}") from error
        self._merged, self._ended = injection, "merged"
        return self.backbone

    def save_pretrained(self, save_directory: str | os.PathLike, *, format: str | None = None) -> None:
        """Write a plain PEFT adapter, the prototypes with the labels, image processor and model card; all or nothing.

        `PeftModel.from_pretrained(backbone, folder)` loads it where this package is not installed. A README.md that
        somebody wrote there is kept.

        Args:
            save_directory: the folder; made if need be.
            format: None saves the adapter in its own kind (BEFT, as released); "lora" writes generated biases as a
                LoRA adapter of rank 1 with A = B = 0 and `lora_bias`, for tools that know only LoRA.

        Raises:
            CheckpointError: the folder cannot be written.
            ValueError: an unknown format, or "lora" of weights that are neither LoRA nor biases.
        """
        if format not in (None, "lora"):
            raise ValueError(f"unknown format {format!r}: use 'lora' or None.")
        own = self.space.peft_config
        if format == "lora" and not isinstance(own, BeftConfig | LoraConfig):
            raise ValueError(f"a {own.peft_type.value} adapter cannot be written as LoRA: save it without format.")
        self._activate()
        prototypes = self.prototypes
        with written_whole(save_directory) as draft:
            with warnings.catch_warnings():
                # PEFT takes the bias of a LoRA layer, a vector, for a matrix of which a part was lost.
                warnings.filterwarnings("ignore", r".*LoRA tensor\(s\) have invalid shape: .*bias", PeftWarning)
                if format == "lora" and isinstance(own, BeftConfig):
                    self._save_as_lora(draft)
                else:
                    self.space.inject(self.backbone).peft_model.save_pretrained(str(draft))
            tensors = {"prototypes": prototypes.cpu().contiguous(), "scale": torch.tensor(self.scale)}
            metadata = {
                "labels": json.dumps(self.class_names, ensure_ascii=False),
                "pooling": self._split.pooling,
                "start": str(self._split.start),
                "middle": str(self._split.middle),
                "prototypes": "to be used as they are",
            }
            save_file(tensors, draft / PROTOTYPES, metadata)
            if self.processor is not None:
                self.processor.save_pretrained(draft)
            digests = {name: sha256(draft / name) for name in (ADAPTER_WEIGHTS, PROTOTYPES)}
            (draft / CHECKSUMS).write_text(json.dumps(digests, indent=1))
            config = self.backbone.config
            feature = feature_text(self._split.pooling, self._split.start, self._split.middle)
            card = task_card(config._name_or_path, config.model_type, self.space, self.class_names, feature)
            write_card(card, draft, save_directory)

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

    def _save_as_lora(self, folder: Path) -> None:
        own = self.space.peft_config
        state = dict(
            zip(self.space.names, [p.clone() for p in self.space.inject(self.backbone).parameters], strict=True)
        )
        config = LoraConfig(
            r=1, lora_alpha=1, lora_bias=True, target_modules=own.target_modules, modules_to_save=own.modules_to_save
        )
        injection = Injection(self.backbone, config, seed=0)
        try:
            with torch.no_grad():
                for name, parameter in injection.adapter_parameters().items():
                    bias_name = name.replace("lora_B.default.bias", "beft_bias.default")
                    parameter.copy_(state[bias_name].view_as(parameter)) if bias_name in state else parameter.zero_()
            injection.peft_model.save_pretrained(str(folder))
        finally:
            injection.remove()

    @classmethod
    def from_pretrained(cls, name_or_folder: str | os.PathLike, backbone: nn.Module, **hub: object) -> AdaptedTask:
        """Load a saved task onto its backbone.

        Args:
            name_or_folder: a folder or a Hub id.
            backbone: the model that the task was made with.
            hub: `revision` (a branch, tag or commit), `token`, `cache_dir`, `local_files_only`, `force_download`;
                see `hf_hyperflow.hub.fetch`.

        Raises:
            CheckpointError: no task there, no access to it, no connection and not in the cache; or its files are
                damaged.
            IncompatibleBackboneError: the backbone lacks the adapter's modules or has others; it is left as it was.
        """
        folder = fetch(name_or_folder, "*.json", ADAPTER_WEIGHTS, PROTOTYPES, **hub)
        try:
            digests = json.loads((folder / CHECKSUMS).read_text())
            for name in (ADAPTER_WEIGHTS, PROTOTYPES):
                require_sha256(folder / name, digests[name])
            peft_config = PeftConfig.from_pretrained(str(folder))
            if peft_config.peft_type is None:
                raise ValueError("its adapter_config.json names no kind of adapter")
            state = load_file(folder / ADAPTER_WEIGHTS)
            with safe_open(folder / PROTOTYPES, framework="pt") as file:
                metadata, prototypes, scale = file.metadata(), file.get_tensor("prototypes"), file.get_tensor("scale")
            if "prototypes" not in metadata:  # class means, as tasks were saved before there was a metric
                prototypes = F.normalize(prototypes, dim=-1)
            start, pooling, class_names = int(metadata["start"]), metadata["pooling"], json.loads(metadata["labels"])
            middle = float(metadata.get("middle", 0))  # tasks of older versions have none
        except CheckpointError:
            raise
        except Exception as error:  # what is in the files may be anything
            raise CheckpointError(f"{name_or_folder} holds no readable HyperFlow task: {error}") from error
        processor = load_processor(folder)
        split = SplitBackbone(backbone, start, pooling, middle=middle)
        space = ParameterSpace.from_backbone(backbone, peft_config)
        injection = space.inject(backbone)
        try:
            loaded = set_peft_model_state_dict(injection.peft_model, state)
        except (RuntimeError, KeyError) as error:  # of another shape, or missing
            injection.remove()
            raise IncompatibleBackboneError(
                f"{name_or_folder} does not fit this {type(backbone).__name__}: {error}"
            ) from error
        missing = {f"base_model.model.{name}" for name in space.names} & set(loaded.missing_keys)
        wrong = sorted(missing) + sorted(loaded.unexpected_keys)
        if wrong:
            injection.remove()
            raise IncompatibleBackboneError(
                f"{name_or_folder} does not fit this {type(backbone).__name__}; missing or unknown: "
                + ", ".join(wrong[:8])
            )
        task = cls(
            split=split,
            space=space,
            theta=injection.read(),
            class_names=class_names,
            scale=scale.item(),
            processor=processor,
            prototypes=prototypes.to(next(backbone.parameters()).device),
        )
        injection.owner = task
        return task

    def _activate(self) -> None:
        """Put this task's weights into the backbone, unless they are there."""
        if self._ended == "reset":
            raise RuntimeError("this task was reset and its backbone restored: adapt again, or load a saved task.")
        if self._ended == "merged":
            raise RuntimeError("this task is merged into its backbone: reset it to get the adapter out again.")
        injection = self.space.inject(self.backbone)
        if injection.owner is not self:
            injection.write(self.theta)
            injection.owner = self

    @contextmanager
    def _active(self) -> Iterator[None]:
        if self._ended != "merged":  # merged weights are at work as they are
            self._activate()
        with evaluating(self.backbone):
            yield

    def _pixels(self, images: torch.Tensor | Iterable, offset: int) -> torch.Tensor:
        if isinstance(images, torch.Tensor):
            return images
        if self.processor is None:
            raise ValueError("this task has no image processor: give a tensor of pixel values.")
        named = [(x, str(x) if isinstance(x, str | Path) else f"image {offset + i}") for i, x in enumerate(images)]
        return self.processor([decode(x, name) for x, name in named], return_tensors="pt")["pixel_values"]
