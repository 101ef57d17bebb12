"""`AdaptedTask`: a backbone adapted to the classes of one support set."""

from __future__ import annotations

import copy
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub import CommitInfo
from peft import BeftConfig, LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from .backbones import Hidden, IncompatibleBackboneError, SplitBackbone, eval_mode
from .checksums import CHECKSUMS, write_checksums
from .finite import MAX_PIXEL_VALUE, NotFiniteError, find_bad_image, find_bad_row, require_finite_weights
from .hub import push_folder
from .images import PROCESSOR, ImageError, decode, process_images
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
from .tensor_files import list_differences


@dataclass(frozen=True)
class SupportImages:
    """The support images of a task, kept until its prototypes are first needed.

    Attributes:
        images: what the frozen blocks computed of the images or, if they were not run, the pixel values.
        labels: `(n,)` in 0..n_way-1.
        head: turns the features of the images into prototypes.
        names: what errors call the images; empty if they are only numbered.
    """

    images: Hidden | torch.Tensor
    labels: torch.Tensor
    head: Head
    names: Sequence[str] = ()


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
            ImageError, NotFiniteError: see `logits`.
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
            features = self._split.forward_suffix(hidden).float()
        bad = find_bad_row(features)
        if bad is not None:
            self._raise_not_finite(_name_image(support.names, bad))
        prototypes = support.head(features, support.labels)
        if not prototypes.isfinite().all():
            if isinstance(support.head, nn.Module):
                require_finite_weights(support.head, "the adapter's head")
            raise NotFiniteError("the features of the support set are too large or too small to be compared.")
        return prototypes

    @torch.no_grad()
    def logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits `(n, n_way)` of pixel values `(n, 3, height, width)`. Their softmax is the scores. All are finite.

        Raises:
            ImageError: an image has NaN, infinity or values beyond a million, or the backbone makes such features of
                it. It is numbered.
            NotFiniteError: the task, its adapter or the backbone has NaN or infinite weights.
            RuntimeError: the task was reset.
            IncompatibleBackboneError: another task is merged into the backbone.
        """
        return self._compute_logits(pixel_values, ())

    @torch.no_grad()
    def _compute_logits(self, pixel_values: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
        """Logits of images that errors call by these names, or by their numbers."""
        bad = find_bad_image(pixel_values)
        if bad is not None:
            raise ImageError(
                f"{_name_image(names, bad)} has NaN or infinite pixel values, or values beyond {MAX_PIXEL_VALUE:,.0f}. "
                "Replace it, or check the mean and standard deviation of the image processor."
            )
        classifier = PrototypeClassifier(self.prototypes, self.scale)
        parameter = next(self.backbone.parameters())
        with self._adapted():
            features = self._split.forward_features(pixel_values.to(parameter.device, parameter.dtype)).float()
        logits = classifier(features)
        bad = find_bad_row(features)
        if bad is None and not logits.isfinite().all():
            bad = 0
        if bad is not None:
            self._raise_not_finite(_name_image(names, bad))
        return logits

    def _raise_not_finite(self, image: str) -> NoReturn:
        """Say why the features or the logits of an image are not finite: weights, settings, or the image itself."""
        parts = {"theta": self.theta, "prototypes": self._prototypes, "scale": torch.tensor(self.scale)}
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

    def scores(self, images: Any, *, batch_size: int = 64) -> torch.Tensor:
        """Scores `(n, n_way)`, on the CPU, of images (paths, bytes, PIL images, arrays) or a tensor of pixel values.

        All scores are finite, and those of an image add up to 1.

        Raises:
            ImageError: an image cannot be read, see `decode`, or it has or makes values that are not finite. It is
                named.
            ValueError: the task has no image processor, and the images are not a tensor; or `batch_size` is below 1.
            NotFiniteError, RuntimeError, IncompatibleBackboneError: see `logits`.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
        if not isinstance(images, torch.Tensor):
            images = list(images)
        scores = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            names = [_name_query(image, number) for number, image in enumerate(batch, start=start)]
            logits = self._compute_logits(self._read_pixels(batch, names), names)
            scores.append(logits.softmax(-1).cpu())
        if not scores:
            return torch.empty(0, len(self.class_names))
        return torch.cat(scores)

    def _read_pixels(self, images: torch.Tensor | list, names: Sequence[str]) -> torch.Tensor:
        """Pixel values `(n, 3, height, width)` of images, which errors call by these names."""
        if isinstance(images, torch.Tensor):
            return images
        if self.processor is None:
            raise ValueError("this task has no image processor: give a tensor of pixel values.")
        decoded = (decode(image, name) for image, name in zip(images, names, strict=True))
        return process_images(decoded, self.processor)

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
            ImageError, NotFiniteError, RuntimeError, IncompatibleBackboneError: see `scores`.
            ValueError: see `scores`; or `top_k` is below 1.
        """
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {top_k}.")
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
                its files are damaged or say what no task says. Every field is checked before anything is built.
            IncompatibleBackboneError: the adapter does not fit the backbone. After any error the backbone is left as it
                was, bit for bit.
        """
        files = read_task(name_or_folder, **hub)
        with get_lock(backbone):
            split = SplitBackbone(backbone, files.start, files.pooling, intermediate_weight=files.intermediate_weight)
            expected = (2 if files.intermediate_weight else 1) * backbone.config.hidden_size
            if files.prototypes.shape[1] != expected:
                raise IncompatibleBackboneError(
                    f"{name_or_folder} does not fit this {type(backbone).__name__}: its prototypes have width "
                    f"{files.prototypes.shape[1]}, the features {expected}. Use the backbone that the task was made "
                    "with."
                )
            space = ParameterSpace.from_backbone(backbone, files.peft_config)
            injection = space.inject(backbone)
            try:
                _load_state(injection, files.adapter_state, str(name_or_folder))
            except BaseException:
                injection.remove()
                raise
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


def _name_query(image: Any, number: int) -> str:
    """What errors call an image: the path that it was given as, or its number."""
    return str(image) if isinstance(image, str | Path) else f"image {number}"


def _name_image(names: Sequence[str], number: int) -> str:
    return names[number] if names else f"image {number}"


def _load_state(injection: Injection, state: dict[str, torch.Tensor], name: str) -> None:
    """Load the tensors of a saved adapter into an injection.

    Raises:
        IncompatibleBackboneError: tensors are missing, unknown or of another shape. Unknown ones are never loaded: they
            could be the backbone's own.
    """
    model = injection.peft_model
    # With `state_dict`, PEFT does not warn of LoRA's biases, which it takes for matrices that lost a part.
    expected = get_peft_model_state_dict(model, model.state_dict(), save_embedding_layers=False)
    wrong = list_differences(state, expected)
    if wrong:
        raise IncompatibleBackboneError(
            f"{name} does not fit this {type(injection.backbone).__name__}; missing, unknown or of another shape: "
            f"{', '.join(wrong[:8])}. Use the backbone that the task was made with."
        )
    set_peft_model_state_dict(model, state)
