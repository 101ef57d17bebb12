"""`AdaptedTask`: a backbone adapted to the classes of one support set."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from peft import BeftConfig, LoraConfig, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from .backbones import Hidden, IncompatibleBackboneError, SplitBackbone, eval_mode
from .hub import push_folder
from .images import decode
from .injection import Injection, unload
from .model_card import describe_feature, task_card, write_card
from .parameter_space import ParameterSpace
from .prototypes import Head, PrototypeClassifier
from .saving import atomic_folder
from .stopping import StoppingPoint
from .task_files import (
    read_task,
    write_adapter,
    write_biases_as_lora,
    write_checksums,
    write_prototypes,
)


@dataclass(frozen=True)
class SupportImages:
    """What the prototypes of a task are made of, when they are first needed.

    Attributes:
        images: what the frozen blocks computed of the support images or, not run yet, their pixel values.
        labels: `(n,)` in 0..n_way-1.
        head: makes prototypes of their features.
    """

    images: Hidden | torch.Tensor
    labels: torch.Tensor
    head: Head


class AdaptedTask:
    """A backbone adapted to one task; made by `HyperFlowAdapter.adapt` or `AdaptedTask.from_pretrained`.

    Several tasks can share a backbone: each puts its own weights in when it is used.

    Attributes:
        class_names: the labels, in the order of the scores.
        theta: the adapter's weights, `(n_tokens, token_dim)`.
        stopping_point: how far the flow was followed; None for a task that was loaded.
        nfe: how often the drift network was run (number of function evaluations).
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
        """`(n_way, width)`, multiplied with the features of an image, brought to length 1; computed on first use."""
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
            features = self._split.forward_suffix(hidden)
        return support.head(features.float(), support.labels)

    @torch.no_grad()
    def logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits `(n, n_way)` of pixel values `(n, 3, height, width)`; their softmax is the score of each class."""
        classifier = PrototypeClassifier(self.prototypes, self.scale)
        parameter = next(self.backbone.parameters())
        with self._adapted():
            features = self._split.forward_features(pixel_values.to(parameter.device, parameter.dtype))
        return classifier(features.float())

    def scores(self, images: Any, *, batch_size: int = 64) -> torch.Tensor:
        """Scores `(n, n_way)` of images (paths, bytes, PIL images, arrays) or of a tensor of pixel values.

        Raises:
            ImageError: an image cannot be read; it is named.
            ValueError: images without a processor.
        """
        if not isinstance(images, torch.Tensor):
            images = list(images)
        scores = []
        for start in range(0, len(images), batch_size):
            pixel_values = self._read_pixels(images[start : start + batch_size], start)
            scores.append(self.logits(pixel_values).softmax(-1).cpu())
        if not scores:
            return torch.empty(0, len(self.class_names))
        return torch.cat(scores)

    def _read_pixels(self, images: torch.Tensor | Iterable, offset: int) -> torch.Tensor:
        """Pixel values `(n, 3, height, width)`; `offset` is the number of the first image, for errors."""
        if isinstance(images, torch.Tensor):
            return images
        if self.processor is None:
            raise ValueError("this task has no image processor: give a tensor of pixel values.")
        decoded = []
        for number, image in enumerate(images, start=offset):
            name = str(image) if isinstance(image, str | Path) else f"image {number}"
            decoded.append(decode(image, name))
        return self.processor(decoded, return_tensors="pt")["pixel_values"]

    def predict(self, images: Any, *, batch_size: int = 64) -> list[str]:
        """The best label of each image; see `scores`."""
        best = self.scores(images, batch_size=batch_size).argmax(-1)
        return [self.class_names[i] for i in best.tolist()]

    def __call__(self, images: Any, *, top_k: int | None = None, batch_size: int = 64) -> list:
        """Labels with scores, best first: `[{"label", "score"}, ...]` of an image, a list of those of several."""
        if isinstance(images, torch.Tensor):
            single = images.ndim == 3
        else:
            single = not isinstance(images, list | tuple)
        if single:
            images = images.unsqueeze(0) if isinstance(images, torch.Tensor) else [images]
        n_best = min(top_k or len(self.class_names), len(self.class_names))
        best = self.scores(images, batch_size=batch_size).topk(n_best, dim=-1)
        results = []
        for scores, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            pairs = zip(scores, indices, strict=True)
            results.append([{"label": self.class_names[i], "score": score} for score, i in pairs])
        return results[0] if single else results

    def reset(self) -> None:
        """Take the adaptation out: the backbone is, bit for bit and module for module, what it was before.

        Other tasks on the same backbone put theirs back when they are used; this one is over.

        Raises:
            IncompatibleBackboneError: another task is merged into the backbone.
        """
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
            IncompatibleBackboneError: PEFT cannot merge it (a bias for a layer that has none).
        """
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
        peft_config = self.space.peft_config
        if format == "lora" and not isinstance(peft_config, BeftConfig | LoraConfig):
            kind = peft_config.peft_type.value
            raise ValueError(f"a {kind} adapter cannot be written as LoRA: save it without format.")
        self._require_alive()
        prototypes = self.prototypes
        with atomic_folder(save_directory) as draft:
            if format == "lora" and isinstance(peft_config, BeftConfig):
                biases = self.space.to_tensors(self.theta)
                write_biases_as_lora(draft, self.backbone, peft_config, biases)
            else:
                injection = self._inject()
                with injection.using(self.theta):
                    write_adapter(draft, injection)
            write_prototypes(draft, prototypes, self.scale, self.class_names, self._split)
            if self.processor is not None:
                self.processor.save_pretrained(draft)
            write_checksums(draft)
            write_card(self._build_card(), draft, save_directory)

    def _build_card(self) -> str:
        split, config = self._split, self.backbone.config
        feature = describe_feature(split.pooling, split.start, split.intermediate_weight)
        return task_card(config._name_or_path, config.model_type, self.space, self.class_names, feature)

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
    def from_pretrained(cls, name_or_folder: str | os.PathLike, backbone: PreTrainedModel, **hub: Any) -> AdaptedTask:
        """Load a saved task onto its backbone.

        Args:
            name_or_folder: a folder or a Hub id.
            backbone: the model that the task was made with.
            hub: `revision` (a branch, tag or commit), `token`, `cache_dir`, `local_files_only`, `force_download`;
                see `fetch`.

        Raises:
            CheckpointError: no task there, no access to it, no connection and not in the cache; or its files are
                damaged.
            IncompatibleBackboneError: the backbone lacks the adapter's modules or has others; it is left as it was.
        """
        files = read_task(name_or_folder, **hub)
        split = SplitBackbone(backbone, files.start, files.pooling, intermediate_weight=files.intermediate_weight)
        space = ParameterSpace.from_backbone(backbone, files.peft_config)
        injection = space.inject(backbone)
        problem = _load_state(injection, files.adapter_state)
        if problem is not None:
            injection.remove()
            raise IncompatibleBackboneError(f"{name_or_folder} does not fit this {type(backbone).__name__}{problem}")
        return cls(
            split=split,
            space=space,
            theta=injection.read(),
            class_names=files.class_names,
            scale=files.scale,
            processor=files.processor,
            prototypes=files.prototypes.to(next(backbone.parameters()).device),
        )

    def _require_alive(self) -> None:
        if self._is_reset:
            raise RuntimeError("this task was reset and its backbone restored: adapt again, or load a saved task.")
        if self._merged is not None:
            raise RuntimeError("this task is merged into its backbone: reset it to get the adapter out again.")

    def _inject(self) -> Injection:
        """The adapter inside the backbone, put there if another one is."""
        self._require_alive()
        return self.space.inject(self.backbone)

    @contextmanager
    def _adapted(self) -> Iterator[None]:
        """The backbone in evaluation mode with this task's weights in it."""
        if self._merged is not None:  # merged weights are at work as they are
            with eval_mode(self.backbone):
                yield
            return
        with self._inject().using(self.theta), eval_mode(self.backbone):
            yield


def _load_state(injection: Injection, state: dict[str, torch.Tensor]) -> str | None:
    """Load a saved adapter's tensors into an injection; what does not fit, or None."""
    try:
        loaded = set_peft_model_state_dict(injection.peft_model, state)
    except (RuntimeError, KeyError) as error:  # of another shape, or missing
        return f": {error}"
    expected = {f"base_model.model.{name}" for name in injection.space.names}
    wrong = sorted(expected & set(loaded.missing_keys)) + sorted(loaded.unexpected_keys)
    if wrong:
        return f"; missing or unknown: {', '.join(wrong[:8])}"
    return None
