"""How long getting ready and predicting take in ONNX Runtime, see `hyperflow export`. The extra `onnx` is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory

import torch

from ...export.exporting import export_onnx
from ...export.hyperflow_onnx import HyperFlow
from ..cost import Work, measure_in_turn, run_in_fresh_process
from .subjects import resize_processor
from .task import CostSetting, CostTask


@dataclass(frozen=True)
class OnnxTimes:
    """Median seconds in ONNX Runtime, on a CPU in float32, with as many threads as PyTorch has.

    Attributes:
        ready: from a support set in memory to prototypes.
        prediction: the scores of one image.
    """

    ready: float
    prediction: float


def measure_onnx(setting: CostSetting, n_images: Sequence[int]) -> dict[int, OnnxTimes]:
    """Export a pair and time it in a process of its own, for each number of support images.

    Raises:
        IncompatibleBackboneError, ValueError: it cannot be exported, see `export_onnx`.
    """
    return run_in_fresh_process(_measure_onnx, setting, tuple(n_images), torch.get_num_threads())


def _measure_onnx(setting: CostSetting, n_images: tuple[int, ...], n_threads: int) -> dict[int, OnnxTimes]:
    torch.set_num_threads(n_threads)
    target = CostTask(replace(setting, n_images=setting.n_way)).target
    target.adapter.processor = resize_processor(target.processor, setting.size)
    with TemporaryDirectory() as folder:
        export_onnx(target.adapter, target.backbone, folder)
        model = HyperFlow(folder, threads=n_threads)
        return {n: _time(model, CostTask(replace(setting, n_images=n))) for n in n_images}


def _time(model: HyperFlow, task: CostTask) -> OnnxTimes:
    pixels, labels = task.pixel_values.numpy(), task.labels.numpy()
    class_names = [str(number) for number in range(task.setting.n_way)]
    learned = model.adapt_pixels(pixels, labels, class_names)
    works = {
        "ready": Work(lambda: model.adapt_pixels(pixels, labels, class_names)),
        "prediction": Work(lambda: learned.score_pixels(pixels[:1])),
    }
    costs = measure_in_turn(works)
    return OnnxTimes(costs["ready"].seconds, costs["prediction"].seconds)
