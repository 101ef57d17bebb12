"""How long getting ready and classifying take in ONNX Runtime, beside PyTorch."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from ..modeling.adapter import HyperFlowAdapter
from .hyperflow_onnx import HyperFlow


def compare_times(
    folder: str | os.PathLike,
    adapter: HyperFlowAdapter,
    backbone: PreTrainedModel,
    pixel_values: torch.Tensor,
    labels: torch.Tensor,
    *,
    repeats: int = 8,
) -> dict[str, float]:
    """Median seconds of getting ready for a support set, and of classifying one image, in both.

    The runs of both alternate. ONNX Runtime gets as many threads as PyTorch has.

    Args:
        folder: what `export_onnx` wrote of the adapter and the backbone.
        pixel_values, labels: the support set, `(n, 3, height, width)` and `(n,)`.
        repeats: how often each is timed, after one run that is not counted.

    Returns:
        `ready_torch`, `ready_onnx`, `predict_torch` and `predict_onnx`.
    """
    model = HyperFlow(folder, threads=torch.get_num_threads())
    pixels, numbers = pixel_values.numpy(), labels.numpy()
    class_names = [str(number) for number in range(int(labels.max()) + 1)]
    task = adapter.adapt(backbone, (pixel_values, labels))
    learned = model.adapt_pixels(pixels, numbers, class_names)
    runs: dict[str, Callable[[], object]] = {
        "ready_torch": lambda: adapter.adapt(backbone, (pixel_values, labels)).prototypes,
        "ready_onnx": lambda: model.adapt_pixels(pixels, numbers, class_names),
        "predict_torch": lambda: task.logits(pixel_values[:1]),
        "predict_onnx": lambda: learned.score_pixels(pixels[:1]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}
