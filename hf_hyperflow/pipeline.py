"""`transformers.pipeline("few-shot-image-classification", model=..., adapter=..., support=...)`, or of a saved task."""

from __future__ import annotations

import os
from typing import Any

import torch
from huggingface_hub import CommitInfo
from transformers import AutoModel, BatchFeature, Pipeline, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .download import download, shorten
from .modeling.adapter import HyperFlowAdapter
from .modeling.images import decode
from .modeling.queries import require_count
from .modeling.task import AdaptedTask

TASK = "few-shot-image-classification"


class FewShotImageClassificationPipeline(Pipeline):
    """Classifies images into the classes of a support set, or of a saved task.

    `transformers.pipeline` makes it, once `hf_hyperflow` is imported:

        classify = pipeline("few-shot-image-classification", model=backbone, adapter=adapter, support=support)
        classify = pipeline("few-shot-image-classification", model=backbone, saved_task="my-task")
        classify(["a.png", "https://..."], batch_size=32, top_k=2)

    Args:
        model: the backbone, or its folder or Hub id; it is adapted when the pipeline is made.
        adapter: the `HyperFlowAdapter` made for it, or its folder or Hub id.
        support, n_steps, solver, early_stopping, skip_bad: see `HyperFlowAdapter.adapt`.
        saved_task: the folder or Hub id of a task that was saved, in place of all of these.

    Attributes:
        adapted: the `AdaptedTask`; `adapted.reset()` gives the backbone back as it was.

    Raises:
        TypeError: there is neither an adapter with a support set nor a saved task, or there are both.
        CheckpointError, IncompatibleBackboneError, SupportSetError, ImageError, ValueError: see
            `HyperFlowAdapter.from_pretrained`, `HyperFlowAdapter.adapt` and `AdaptedTask.from_pretrained`.
    """

    # The images are processed as the adapter was trained, not as the backbone's own folder may say.
    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_feature_extractor: Any = False
    _load_tokenizer: Any = False

    image_processor: BaseImageProcessor

    def __init__(
        self,
        *args: Any,
        adapter: HyperFlowAdapter | str | os.PathLike | None = None,
        support: Any = None,
        saved_task: str | os.PathLike | None = None,
        n_steps: int | None = None,
        solver: str | None = None,
        early_stopping: bool = False,
        skip_bad: bool = False,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        if saved_task is not None:
            options = (n_steps, solver, early_stopping, skip_bad)
            if adapter is not None or support is not None or options != (None, None, False, False):
                raise TypeError(
                    "a saved task is adapted already: give saved_task without adapter, support and options."
                )
            self.adapted = _load_task(saved_task, self.model)
        elif adapter is None or support is None:
            raise TypeError("this pipeline needs 'adapter' and 'support', or 'saved_task'.")
        else:
            self.adapted = _load_adapter(adapter, self.device).adapt(
                self.model, support, n_steps=n_steps, solver=solver, early_stopping=early_stopping, skip_bad=skip_bad
            )
        if self.adapted.processor is None:
            raise ValueError("this task was saved without an image processor: only AdaptedTask.logits can use it.")
        self.image_processor = self.adapted.processor

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> list:
        """Classify an image or several; labels with scores, best first.

        Args:
            inputs: an image, or a list, tuple, generator or `torch` dataset of images: paths, http(s) and data URLs,
                PIL images, `(h, w[, 1|3|4])` arrays, encoded bytes.
            batch_size: how many images go through the backbone at once (1).
            top_k: how many of the best classes to give (5).
            timeout: how many seconds a URL may take from the first moment to the last byte (30).

        A URL may lead to 50 MB and through 5 redirects, to http and https only. One that leads to a private, loopback
        or link-local address is refused, unless it was given with such an address; see `download`.

        Returns:
            `[{"label", "score"}, ...]` for an image, a list of such lists for several.

        Raises:
            ImageError: an image cannot be fetched within these limits, or cannot be read; it is named.
            ValueError: `batch_size` or `top_k` is not an integer of at least 1, or `timeout` is not a number above 0.
        """
        if kwargs.get("batch_size") is not None:
            require_count("batch_size", kwargs["batch_size"])
        if isinstance(inputs, tuple):
            inputs = list(inputs)
        if isinstance(inputs, list) and not inputs:  # of which the base class wants the first
            return []
        return super().__call__(inputs, *args, **kwargs)

    # The base class declares these four with arbitrary keywords; like transformers' own pipelines, this one names them.

    def _sanitize_parameters(  # type: ignore[override]
        self, top_k: int | None = None, timeout: float | None = None
    ) -> tuple[dict, dict, dict]:
        preprocess_options, postprocess_options = {}, {}
        if timeout is not None:
            if not timeout > 0:
                raise ValueError(f"timeout must be a number of seconds above 0, not {timeout}.")
            preprocess_options["timeout"] = timeout
        if top_k is not None:
            require_count("top_k", top_k)
            postprocess_options["top_k"] = top_k
        return preprocess_options, {}, postprocess_options

    def preprocess(self, image: Any, timeout: float = 30) -> BatchFeature:  # type: ignore[override]
        """Pixel values `(1, 3, height, width)` of an image."""
        name = "an image"
        if isinstance(image, str | os.PathLike):
            name = str(image)[:200]
        if isinstance(image, str) and image.startswith(("http://", "https://", "data:")):
            name = shorten(image)
            image = download(image, timeout)
        return self.image_processor(decode(image, name), return_tensors="pt")

    def _forward(self, model_inputs: BatchFeature) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"logits": self.adapted.logits(model_inputs["pixel_values"])}

    def postprocess(  # type: ignore[override]
        self, model_outputs: dict[str, torch.Tensor], top_k: int = 5
    ) -> list[dict]:
        """The best classes of an image, from its logits `(1, n_way)`."""
        names = self.adapted.class_names
        best = model_outputs["logits"][0].softmax(-1).topk(min(top_k, len(names)))
        predictions = []
        for score, label in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            predictions.append({"label": names[label], "score": score})
        return predictions

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write the adapted task; see `AdaptedTask.save_pretrained`."""
        self.adapted.save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> CommitInfo:
        """Push the adapted task to the Hub; see `AdaptedTask.push_to_hub`."""
        return self.adapted.push_to_hub(repo_id, **kwargs)


def _load_adapter(adapter: HyperFlowAdapter | str | os.PathLike, device: torch.device) -> HyperFlowAdapter:
    """An adapter that has an image processor; one that is loaded lies on this device.

    Raises:
        CheckpointError: see `HyperFlowAdapter.from_pretrained`.
        ValueError: it has no image processor.
    """
    if isinstance(adapter, HyperFlowAdapter):
        flow = adapter
    else:
        flow = HyperFlowAdapter.from_pretrained(adapter).eval()
        flow.to(device)
    if flow.processor is None:
        raise ValueError("this adapter was saved without an image processor: set adapter.processor to one.")
    return flow


def _load_task(saved_task: str | os.PathLike, backbone: PreTrainedModel) -> AdaptedTask:
    """A saved task on its backbone.

    Raises:
        CheckpointError, IncompatibleBackboneError: see `AdaptedTask.from_pretrained`.
        TypeError: it is a task in memory.
    """
    if isinstance(saved_task, AdaptedTask):
        raise TypeError("saved_task is a folder or a Hub id. A task in memory classifies by itself: task(images).")
    return AdaptedTask.from_pretrained(saved_task, backbone)


PIPELINE_REGISTRY.register_pipeline(TASK, FewShotImageClassificationPipeline, pt_model=AutoModel, type="image")
