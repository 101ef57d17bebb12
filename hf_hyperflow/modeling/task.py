"""`AdaptedTask`: a backbone adapted to the classes of one support set."""

from __future__ import annotations

import copy
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
from .checksums import CHECKSUMS, write_checksums
from .hub import push_folder
from .images import PROCESSOR, decode
from .injection import Injection, unload
from .locks import get_lock
from .model_card import describe_feature, task_card, write_card
from .parameter_space import ParameterSpace
from .peft_configs import get_kind
from .prototypes import Head, PrototypeClassifier
from .saving import atomic_folder
from .stopping import StoppingPoint
from .task_files import (
    read_task,
    write_adapter,
    write_biases_as_lora,
    write_prototypes,
)


@dataclass(frozen=True)
class SupportImages:
    """The support images of a task, kept until its prototypes are first needed.

    Attributes:
        images: what the frozen blocks computed of the images or, if they were not run, the pixel values.
        labels: `(n,)` in 0..n_way-1.
        head: turns the features of the images into prototypes.
    """

    images: Hidden | torch.Tensor
    labels: torch.Tensor
    head: Head


class AdaptedTask:
    """A backbone adapted to one task. `HyperFlowAdapter.adapt` and `AdaptedTask.from_pretrained` make such tasks.

    Several tasks can share a backbone: each writes its own weights into it when it is used. Any number of threads may
    adapt one backbone, and predict with, save, load, merge and reset its tasks. Each gets, bit for bit, what it would
    get alone, or an error which says that the task was reset or that another one is merged. Whoever runs, moves, copies
    or pickles the shared backbone itself in the meantime holds its lock, see `get_lock`.

    Threads that share a backbone take turns. To predict in parallel, give each thread a backbone of its own. There are
    two ways: `copy.deepcopy(task)` copies a task with its backbone, which is the same as to load the saved task on a
    copy of the backbone. `copy.deepcopy(task.merge())` copies the adapted backbone alone, as a plain model.

    Attributes:
        backbone: the model that was adapted.
        space: the parameter space of the adapter.
        theta: the adapter's weights, `(n_tokens, token_dim)`.
        class_names: the labels, in the order of the scores.
        scale: the inverse temperature of the logits.
        processor: the backbone's image processor; None if only tensors can be classified.
        stopping_point: how far the flow was followed; None without a flow, and for a task that was loaded.
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
        """Prototypes `(n_way, width)`, to be multiplied with features of length 1. Computed when first needed.

        Raises:
            RuntimeError: the task was reset before.
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
            features = self._split.forward_suffix(hidden)
        return support.head(features.float(), support.labels)

    @torch.no_grad()
    def logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits `(n, n_way)` of pixel values `(n, 3, height, width)`. Their softmax is the scores.

        Raises:
            RuntimeError: the task was reset.
            IncompatibleBackboneError: another task is merged into the backbone.
        """
        classifier = PrototypeClassifier(self.prototypes, self.scale)
        parameter = next(self.backbone.parameters())
        with self._adapted():
            features = self._split.forward_features(pixel_values.to(parameter.device, parameter.dtype))
        return classifier(features.float())

    def scores(self, images: Any, *, batch_size: int = 64) -> torch.Tensor:
        """Scores `(n, n_way)`, on the CPU, of images (paths, bytes, PIL images, arrays) or a tensor of pixel values.

        Raises:
            ImageError: an image cannot be read. It is named.
            ValueError: the task has no image processor, and the images are not a tensor.
            RuntimeError, IncompatibleBackboneError: see `logits`.
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
        """Pixel values `(n, 3, height, width)` of images. `offset` is the number of the first one, for errors."""
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
        """The label with the highest score of each image; see `scores`."""
        best = self.scores(images, batch_size=batch_size).argmax(-1)
        return [self.class_names[i] for i in best.tolist()]

    def __call__(self, images: Any, *, top_k: int | None = None, batch_size: int = 64) -> list:
        """Labels with scores, best first: `[{"label": ..., "score": ...}, ...]`.

        A list or a batch of images gives a list of such lists.

        Args:
            images: an image, a list of images, or pixel values `(3, height, width)` or `(n, 3, height, width)`.
            top_k: how many labels; None gives all.
            batch_size: how many images are run at a time.

        Raises:
            ImageError, ValueError, RuntimeError, IncompatibleBackboneError: see `scores`.
        """
        batch = images
        if isinstance(images, torch.Tensor):
            is_single = images.ndim == 3
            if is_single:
                batch = images.unsqueeze(0)
        else:
            is_single = not isinstance(images, list | tuple)
            if is_single:
                batch = [images]
        n_best = min(top_k or len(self.class_names), len(self.class_names))
        best = self.scores(batch, batch_size=batch_size).topk(n_best, dim=-1)
        results = []
        for scores, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            pairs = zip(scores, indices, strict=True)
            results.append([{"label": self.class_names[i], "score": score} for score, i in pairs])
        return results[0] if is_single else results

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

    def save_pretrained(self, save_directory: str | os.PathLike, *, format: str | None = None) -> None:
        """Write a plain PEFT adapter, the prototypes with their labels, the image processor and a model card.

        All of it is written or nothing: whoever loads the task at any moment, also after a kill or a power cut, gets
        the old or the new one. A README.md that somebody wrote there is kept. Where this package is not installed,
        `PeftModel.from_pretrained(backbone, folder)` loads the adapter.

        Args:
            save_directory: the folder, which is made if need be.
            format: None saves the adapter in its own kind (BEFT, as released). "lora" writes generated biases as a LoRA
                adapter of rank 1 with A = B = 0 and `lora_bias`, for tools that know only LoRA.

        Raises:
            CheckpointError: the folder cannot be written, or another process or thread is writing to it.
            ValueError: the format is not known, or "lora" is asked of weights that are neither LoRA nor biases.
            RuntimeError: the task was reset, or is merged.
        """
        if format not in (None, "lora"):
            raise ValueError(f"unknown format {format!r}: use 'lora' or None.")
        peft_config = self.space.peft_config
        if format == "lora" and not isinstance(peft_config, BeftConfig | LoraConfig):
            raise ValueError(f"a {get_kind(peft_config)} adapter cannot be written as LoRA: save it without format.")
        self._require_alive()
        prototypes = self.prototypes
        # The lock of the backbone is taken inside that of the folder, everywhere.
        with atomic_folder(save_directory) as draft:
            with get_lock(self.backbone):
                self._require_alive()
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
            write_checksums(draft, CHECKSUMS, save_directory, optional=(PROCESSOR,))
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
            CheckpointError: the token is missing, wrong or may not write, or the Hub cannot be reached. Nothing was
                changed there.
            RuntimeError: the task was reset, or is merged.
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
            CheckpointError: there is no task, it may not be read, or it is neither within reach nor in the cache; or
                its files are damaged.
            IncompatibleBackboneError: the adapter does not fit the backbone, which is left as it was.
        """
        files = read_task(name_or_folder, **hub)
        with get_lock(backbone):
            split = SplitBackbone(backbone, files.start, files.pooling, intermediate_weight=files.intermediate_weight)
            space = ParameterSpace.from_backbone(backbone, files.peft_config)
            injection = space.inject(backbone)
            problem = _load_state(injection, files.adapter_state)
            if problem is not None:
                injection.remove()
                raise IncompatibleBackboneError(
                    f"{name_or_folder} does not fit this {type(backbone).__name__}{problem}"
                )
            theta = injection.read()
        return cls(
            split=split,
            space=space,
            theta=theta,
            class_names=files.class_names,
            scale=files.scale,
            processor=files.processor,
            prototypes=files.prototypes.to(next(backbone.parameters()).device),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedTask:
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


def _load_state(injection: Injection, state: dict[str, torch.Tensor]) -> str | None:
    """Load a saved adapter's tensors into an injection. Returns None, or the end of a sentence on what does not fit."""
    try:
        loaded: Any = set_peft_model_state_dict(injection.peft_model, state)
    except (RuntimeError, KeyError) as error:  # of another shape, or missing
        return f": {error}"
    expected = {f"base_model.model.{name}" for name in injection.space.names}
    wrong = sorted(expected & set(loaded.missing_keys)) + sorted(loaded.unexpected_keys)
    if wrong:
        return f"; missing or unknown: {', '.join(wrong[:8])}"
    return None
