"""`transformers.pipeline("few-shot-image-classification", model=..., adapter=..., support=...)`."""

from __future__ import annotations

import os
from urllib.request import Request, urlopen

import torch
from huggingface_hub import CommitInfo
from transformers import AutoModel, BatchFeature, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .modeling.adapter import HyperFlowAdapter
from .modeling.images import ImageError, decode
from .modeling.version import __version__

TASK = "few-shot-image-classification"


class FewShotImageClassificationPipeline(Pipeline):
    """Classifies images into the classes of a support set.

    Made by `transformers.pipeline`, once `hf_hyperflow` is imported:

        classify = pipeline("few-shot-image-classification", model=backbone, adapter=adapter, support=support)
        classify(["a.png", "https://..."], batch_size=32, top_k=2)

    Args:
        model: the backbone, or its folder or Hub id; it is adapted when the pipeline is made.
        adapter: the `HyperFlowAdapter` made for it, or its folder or Hub id.
        support, n_steps, solver, early_stopping, skip_bad: see `HyperFlowAdapter.adapt`.

    Attributes:
        adapted: the `AdaptedTask`; `adapted.reset()` gives the backbone back as it was.

    Raises:
        CheckpointError, IncompatibleBackboneError, SupportSetError, ImageError, ValueError: see
            `HyperFlowAdapter.from_pretrained` and `HyperFlowAdapter.adapt`.
    """

    # The images are processed as the adapter was trained, not as the backbone's own folder may say.
    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(
        self,
        *args: object,
        adapter: HyperFlowAdapter | str | os.PathLike,
        support: object,
        n_steps: int | None = None,
        solver: str | None = None,
        early_stopping: bool = False,
        skip_bad: bool = False,
        **kwargs: object,
    ):
        super().__init__(*args, **kwargs)
        if not isinstance(adapter, HyperFlowAdapter):
            adapter = HyperFlowAdapter.from_pretrained(adapter).eval().to(self.device)
        if adapter.processor is None:
            raise ValueError("this adapter was saved without an image processor: set adapter.processor to one.")
        self.image_processor = adapter.processor
        self.adapted = adapter.adapt(
            self.model, support, n_steps=n_steps, solver=solver, early_stopping=early_stopping, skip_bad=skip_bad
        )

    def __call__(self, inputs: object, **kwargs: object) -> list:
        """Labels with scores, best first.

        Args:
            inputs: an image, or a list, generator or `torch` dataset of images: paths, http(s) and data URLs, PIL
                images, `(h, w[, 1|3|4])` arrays, encoded bytes.
            batch_size: images that go through the backbone at once (1).
            top_k: how many of the best classes to give (5).
            timeout: seconds to wait for a URL to answer (30).

        Returns:
            `[{"label", "score"}, ...]` of an image, a list of those of several.

        Raises:
            ImageError: an image cannot be fetched or read; it is named.
        """
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, top_k: int | None = None, timeout: float | None = None) -> tuple[dict, dict, dict]:
        return {"timeout": timeout} if timeout else {}, {}, {"top_k": top_k} if top_k else {}

    def preprocess(self, image: object, timeout: float = 30) -> BatchFeature:
        """Pixel values `(1, 3, height, width)` of an image."""
        name = str(image)[:200] if isinstance(image, str | os.PathLike) else "an image"
        if isinstance(image, str) and image.startswith(("http://", "https://", "data:")):
            image = _fetch(image, name, timeout)
        return self.image_processor(decode(image, name), return_tensors="pt")

    def _forward(self, model_inputs: BatchFeature) -> dict[str, torch.Tensor]:
        return {"logits": self.adapted.logits(model_inputs["pixel_values"])}

    def postprocess(self, model_outputs: dict[str, torch.Tensor], top_k: int = 5) -> list[dict]:
        """The best classes of an image, from its logits `(1, n_way)`."""
        names = self.adapted.class_names
        best = model_outputs["logits"][0].softmax(-1).topk(min(top_k, len(names)))
        return [
            {"label": names[i], "score": score}
            for score, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: object) -> None:
        """Write the adapted task; see `AdaptedTask.save_pretrained`."""
        self.adapted.save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: object) -> CommitInfo:
        """Push the adapted task to the Hub; see `AdaptedTask.push_to_hub`."""
        return self.adapted.push_to_hub(repo_id, **kwargs)


def _fetch(url: str, name: str, timeout: float) -> bytes:
    """The encoded image at a URL, so that it is decoded as the same image in a file would be."""
    try:
        with urlopen(Request(url, headers={"User-Agent": f"hf_hyperflow/{__version__}"}), timeout=timeout) as answer:
            return answer.read()
    except (OSError, ValueError) as error:
        raise ImageError(f"{name} cannot be fetched ({error}). Check the address.") from error


PIPELINE_REGISTRY.register_pipeline(TASK, FewShotImageClassificationPipeline, pt_model=AutoModel, type="image")
