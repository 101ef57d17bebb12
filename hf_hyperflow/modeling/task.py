"""`AdaptedTask`: a backbone adapted to the classes of one support set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import BeftConfig, LoraConfig
from transformers import PreTrainedModel

from .adapted_backbone import AdaptedBackbone
from .backbones import IncompatibleBackboneError, SplitBackbone
from .checksums import CHECKSUMS, write_checksums
from .images import PROCESSOR, decode, process_images
from .locks import get_lock
from .model_card import describe_feature, task_card, write_card
from .parameter_space import ParameterSpace
from .peft_configs import get_kind
from .pushing import Pushable
from .saving import atomic_folder
from .task_files import load_state, read_task, write_adapter, write_biases_as_lora, write_prototypes


class AdaptedTask(Pushable, AdaptedBackbone):
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
                load_state(injection, files.adapter_state, str(name_or_folder))
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


def _name_query(image: Any, number: int) -> str:
    """What errors call an image: the path that it was given as, or its number."""
    return str(image) if isinstance(image, str | Path) else f"image {number}"
