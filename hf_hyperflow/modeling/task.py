"""`AdaptedTask`: a backbone adapted to the classes of one support set."""

from __future__ import annotations

import itertools
import math
import os
import reprlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import BeftConfig, LoraConfig
from transformers import PreTrainedModel

from .adapted_backbone import AdaptedBackbone
from .backbones import SplitBackbone
from .checksums import CHECKSUMS, write_checksums
from .images import PROCESSOR, ImageError, NamedImage, decode_all, is_one_image, process_images
from .locks import get_lock
from .model_card import describe_feature, task_card, write_card
from .parameter_space import ParameterSpace
from .peft_configs import get_kind
from .pushing import Pushable
from .queries import iterate_queries, require_count
from .rejection import NONE_OF_THESE
from .saving import atomic_folder
from .task_files import ADAPTER_WEIGHTS, load_state, read_task, write_adapter, write_biases_as_lora, write_prototypes
from .tensor_files import halve_tensors
from .trunks import IncompatibleBackboneError, find_trunk
from .views import require_views


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
        rejection: tells images of none of the classes, see `known_scores`; None if the adapter was not calibrated for
            that.
        processor: the backbone's image processor; None if only tensors can be classified.
        stopping_point: how far the flow was followed; None without a flow, and for a task that was loaded.
        nfe: how often the drift network was run (number of function evaluations).
    """

    def __repr__(self) -> str:
        config = self.backbone.config
        name = f" {config._name_or_path}" if config._name_or_path else ""
        state = "ready"
        if self._is_reset:
            state = "reset, to be used no more"
        elif self._merged is not None:
            state = "merged into the backbone"
        return (
            f"<AdaptedTask: {len(self.class_names)} classes {reprlib.repr(self.class_names)}, a "
            f"{get_kind(self.space.peft_config)} adapter of {self.space.n_parameters:,} parameters for the "
            f"{type(self.backbone).__name__}{name}, {state}>"
        )

    def scores(self, images: Any, *, batch_size: int = 64, views: int = 1, skip_bad: bool = False) -> torch.Tensor:
        """Scores of images, on the CPU: `(n_way,)` of one image, `(n, n_way)` of several.

        All scores are finite, and those of an image add up to 1.

        Args:
            images: one image (a path, bytes, a PIL image, an array or pixel values `(3, height, width)`), or several:
                see `iterate_queries`. They are read as they are needed, `batch_size` at a time.
            batch_size: how many images are run at a time.
            views: over how many views of an image its features are averaged, 1 to 4: the image, two crops, and its
                mirror image. The backbone is run once for each.
            skip_bad: give images that cannot be read NaN as their scores, and say in a warning why, instead of raising
                an `ImageError`.

        Raises:
            ImageError: an image cannot be read, see `decode`, or it has or makes values that are not finite. It is
                named.
            ValueError: see `iterate_queries`; the task has no image processor, and the images are not pixel values;
                `batch_size` is not an integer of at least 1; or there are not so many views.
            NotFiniteError, RuntimeError, IncompatibleBackboneError: see `logits`.
        """
        scores, _ = self._score(images, batch_size, views, skip_bad)
        return scores[0] if is_one_image(images) else scores

    def known_scores(
        self, images: Any, *, batch_size: int = 64, views: int = 1, skip_bad: bool = False
    ) -> torch.Tensor:
        """The probabilities that images are of one of the classes at all: `()` of one image, `(n,)` of several.

        The released adapter is calibrated for one view of support images and of others. Arguments and errors are those
        of `scores`.

        Raises:
            ValueError: see `scores`; or the task has no `rejection`.
        """
        self.require_rejection()
        _, known = self._score(images, batch_size, views, skip_bad)
        return known[0] if is_one_image(images) else known

    def predict(
        self, images: Any, *, batch_size: int = 64, views: int = 1, skip_bad: bool = False, reject: bool = False
    ) -> Any:
        """The label with the highest score: one label of one image, a list of labels of several.

        Args:
            images, batch_size, views: see `scores`.
            skip_bad: see `scores`. The place of an image that cannot be read has None.
            reject: answer `NONE_OF_THESE`, which no class should be called, where it is less likely than not that an
                image is of one of the classes, see `known_scores`.

        Raises:
            ImageError, NotFiniteError, RuntimeError, IncompatibleBackboneError: see `scores`.
            ValueError: see `scores`; or the task has no `rejection`, and `reject` asks for it.
        """
        if reject:
            self.require_rejection()
        labels: list[str | None] = []
        scores, known = self._score(images, batch_size, views, skip_bad)
        for row, probability in zip(scores, known.tolist(), strict=True):
            if row.isnan().any():
                labels.append(None)
            elif reject and probability < 0.5:
                labels.append(NONE_OF_THESE)
            else:
                labels.append(self.class_names[int(row.argmax())])
        return labels[0] if is_one_image(images) else labels

    def require_rejection(self) -> None:
        """Raise a ValueError if the task cannot tell images of none of its classes."""
        if self.rejection is None:
            raise ValueError(
                "this task cannot tell images of none of its classes: its adapter was not calibrated for that, or it "
                "was saved by version 0.1. Adapt again with a calibrated adapter (training/calibrate.py)."
            )

    def __call__(
        self,
        images: Any,
        *,
        top_k: int | None = None,
        batch_size: int = 64,
        views: int = 1,
        skip_bad: bool = False,
        reject: bool = False,
    ) -> Any:
        """Labels with scores, best first: `[{"label": ..., "score": ...}, ...]`.

        One image gives one such list, several give a list of them.

        Args:
            images, batch_size, views: see `scores`.
            top_k: how many labels; None gives all.
            skip_bad: see `scores`. The place of an image that cannot be read has None.
            reject: see `predict`. Such an image has one entry, the label `NONE_OF_THESE` with the probability that it
                is of none of the classes.

        Raises:
            ImageError, NotFiniteError, RuntimeError, IncompatibleBackboneError: see `scores`.
            ValueError: see `predict`; or `top_k` is not an integer of at least 1.
        """
        if reject:
            self.require_rejection()
        n_best = len(self.class_names)
        if top_k is not None:
            require_count("top_k", top_k)
            n_best = min(top_k, n_best)
        results: list[list[dict[str, Any]] | None] = []
        scores, known = self._score(images, batch_size, views, skip_bad)
        for row, probability in zip(scores, known.tolist(), strict=True):
            if row.isnan().any():
                results.append(None)
            elif reject and probability < 0.5:
                results.append([{"label": NONE_OF_THESE, "score": 1 - probability}])
            else:
                results.append(self._name_best(row, n_best))
        return results[0] if is_one_image(images) else results

    def _name_best(self, scores: torch.Tensor, n_best: int) -> list[dict[str, Any]]:
        """The best labels of an image, from its scores `(n_way,)`."""
        best = scores.topk(n_best)
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        return [{"label": self.class_names[i], "score": score} for score, i in pairs]

    def _score(self, images: Any, batch_size: int, views: int, skip_bad: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores `(n, n_way)` and probabilities `(n,)` to be of a class at all, of one image or several.

        Those of a bad image are NaN if it may be skipped.
        """
        require_count("batch_size", batch_size)
        require_views(views)
        skipped: list[str] = []
        left_out: list[str] = []
        queries = iterate_queries(images, left_out)
        logits = [torch.empty(0, len(self.class_names))]
        while batch := list(itertools.islice(queries, batch_size)):
            logits.append(self._classify_batch(batch, views, skipped if skip_bad else None))
        # The warnings are shown to whoever called the public method.
        if skipped:
            warnings.warn(f"no scores for bad images: {' '.join(skipped)}", stacklevel=3)
        if left_out:
            warnings.warn(f"files that are no images left out: {' '.join(left_out)}", stacklevel=3)
        rows = torch.cat(logits)
        known = torch.ones(len(rows))
        rejection = self.rejection
        if len(rows) and rejection is not None:
            known = rejection.compute_known(rows, self.scale)
        return rows.softmax(-1), known

    def _classify_batch(self, batch: list[NamedImage], views: int, skipped: list[str] | None) -> torch.Tensor:
        """Logits `(n, n_way)` on the CPU. With `skipped`, bad images are noted there, and their logits are NaN."""
        rows = list(range(len(batch)))
        if all(isinstance(query.image, torch.Tensor) for query in batch):
            pixel_values = torch.stack([query.image for query in batch])
        elif self.processor is None:
            raise ValueError("this task has no image processor: give a tensor of pixel values.")
        else:
            rows = []
            pixel_values = process_images(decode_all(batch, rows, skipped), self.processor)
        logits = torch.full((len(batch), len(self.class_names)), math.nan)
        if rows:
            names = [batch[row].name for row in rows]
            logits[rows] = self._classify_pixels(pixel_values, names, views, skipped)
        return logits

    def _classify_pixels(
        self, pixel_values: torch.Tensor, names: Sequence[str], views: int, skipped: list[str] | None
    ) -> torch.Tensor:
        """Logits `(n, n_way)`. With `skipped`, images that make no finite features are looked for by halves."""
        try:
            return self._compute_logits(pixel_values, names, views).cpu()
        except ImageError as error:
            if skipped is None:
                raise
            if len(names) == 1:
                skipped.append(str(error))
                return torch.full((1, len(self.class_names)), math.nan)
        half = len(names) // 2
        first = self._classify_pixels(pixel_values[:half], names[:half], views, skipped)
        return torch.cat([first, self._classify_pixels(pixel_values[half:], names[half:], views, skipped)])

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, format: str | None = None, half: bool = False
    ) -> None:
        """Write a plain PEFT adapter, the prototypes with their labels, the image processor and a model card.

        All of it is written or nothing: whoever loads the task at any moment, also after a kill or a power cut, gets
        the old or the new one. A README.md that somebody wrote there is kept. Where this package is not installed,
        `PeftModel.from_pretrained(backbone, folder)` loads the adapter.

        Args:
            save_directory: the folder, which is made if need be.
            format: None saves the adapter in its own kind (BEFT, as released). "lora" writes generated biases as a LoRA
                adapter of rank 1 with A = B = 0 and `lora_bias`, for tools that know only LoRA.
            half: round weights and prototypes to half precision (float16), which takes half the space. Scores change a
                little.

        Raises:
            CheckpointError: the folder cannot be written, or another process or thread is writing to it.
            ValueError: the format is not known, or "lora" is asked of weights that are neither LoRA nor biases; or a
                weight is too large for half precision.
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
            if half:
                halve_tensors(draft / ADAPTER_WEIGHTS)
                prototypes = prototypes.half()
            write_prototypes(draft, prototypes, self.scale, self.rejection, self.class_names, self._split)
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
            backbone: the model that the task was made with, or a wrapper of it, see `find_trunk`.
            hub: `revision` (a branch, tag or commit), `token`, `cache_dir`, `local_files_only`, `force_download`;
                see `fetch`.

        Raises:
            CheckpointError: there is no task, it may not be read, or it is neither within reach nor in the cache; or
                its files are damaged or say what no task says. Every field is checked before anything is built.
            IncompatibleBackboneError: the adapter does not fit the backbone. After any error the backbone is left as it
                was, bit for bit.
        """
        files = read_task(name_or_folder, **hub)
        backbone = find_trunk(backbone)
        with get_lock(backbone):
            split = SplitBackbone(backbone, files.start, files.pooling, intermediate_weight=files.intermediate_weight)
            expected = split.feature_width
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
            injection.write(theta)  # the injection may be that of other tasks: it forgets whose weights it had
        return cls(
            split=split,
            space=space,
            theta=theta,
            class_names=files.class_names,
            scale=files.scale,
            rejection=files.rejection,
            processor=files.processor,
            prototypes=files.prototypes.to(next(backbone.parameters()).device),
        )
