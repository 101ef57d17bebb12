"""What `hyperflow bench` writes: a record per piece of work, and the ratios that the records are measured for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..methods import BiasTuning, DirectTransfer, FullFineTuning, LogisticRegression, LoraTuning
from .measure import MERGED, PLAIN, TASK
from .task import (
    ADAPT,
    ENCODE,
    FORWARD,
    INJECT,
    INTEGRATE,
    NEXT_ADAPT,
    NEXT_READY,
    PIECES_OF_STEPS,
    PROTOTYPES,
    READ,
    READY,
    WRITE,
)

#: What is compared with HyperFlow.
RIVALS = (DirectTransfer(), LogisticRegression(), BiasTuning(), LoraTuning(), FullFineTuning())
FULL = FullFineTuning.name

#: The parts of getting ready, in their order. Reading comes before: one forward pass needs it, too.
PARTS = (INJECT, ENCODE, INTEGRATE, WRITE, PROTOTYPES)

#: What is measured of a task, in words, in the order of tables.
LABELS = {
    FORWARD: "one forward pass (the limit)",
    READ: "read: pictures to pixel values",
    INJECT: "inject: PEFT's modules",
    ENCODE: "encode: images to features",
    INTEGRATE: "integrate: features to weights",
    WRITE: "write: weights into the backbone",
    PROTOTYPES: "prototypes",
    ADAPT: "adaptation alone, first task",
    NEXT_ADAPT: "adaptation alone, next task",
    READY: "ready to predict, first task",
    NEXT_READY: "ready to predict, next task",
}
#: The same in ONNX Runtime, which is measured on demand.
ONNX_READY, ONNX_PREDICTION = "onnx_ready", "onnx_prediction"
LABELS[ONNX_READY] = "ready to predict, ONNX Runtime"
LABELS[ONNX_PREDICTION] = "prediction of one image, ONNX Runtime"
for _rival in RIVALS:
    LABELS[_rival.name] = _rival.label

#: What predicts, in words.
PREDICTION_LABELS = {PLAIN: "the backbone alone", TASK: "a task", MERGED: "a task, merged"}


@dataclass(frozen=True)
class Place:
    """What records can be compared on.

    Attributes:
        backbone: name of the pair of backbone and adapter, see `Subject`.
        size: height and width of the images in pixels.
        device: in words, see `device_name`.
        dtype: that of the backbone's weights; fine-tuning has float32 weights under autocast instead of bfloat16.
    """

    backbone: str
    size: tuple[int, int]
    device: str
    dtype: str

    @property
    def title(self) -> str:
        """All of it in words."""
        return f"{self.backbone}, {format_size(self.size)}, {self.dtype}, {self.device}"


@dataclass(frozen=True, kw_only=True)
class CostRecord:
    """What a piece of work costs.

    Attributes:
        place: see `Place`.
        work: a key of `LABELS`, or of `PREDICTION_LABELS`.
        n_images: number of support images, or of images that are predicted at once.
        n_steps: solver steps, None where they do not matter.
        seconds: the median of several runs.
        flops: floating-point operations of the networks; None where they are not counted.
        peak_memory_mb: beyond the loaded models, in MiB (see `Cost`); None where it is not measured.
    """

    place: Place
    work: str
    n_images: int
    n_steps: int | None = None
    seconds: float
    flops: float | None = None
    peak_memory_mb: float | None = None


@dataclass(frozen=True)
class TaskRatios:
    """How the costs of a task compare. Each ratio is None if one of the two was not measured.

    Attributes:
        ready: time until the first task of a backbone can predict, over that of one forward pass over its images.
        next_ready: the same of a next task.
        adapt_time, adapt_memory: the adaptation alone of the first task, over full fine-tuning.
        next_adapt_time: its time for a next task.
        ready_time: all until the first task can predict, over full fine-tuning.
    """

    place: Place
    n_images: int
    n_steps: int
    ready: float | None
    next_ready: float | None
    adapt_time: float | None
    adapt_memory: float | None
    next_adapt_time: float | None
    ready_time: float | None


@dataclass(frozen=True)
class PredictionRatios:
    """The time of a prediction over that of the backbone alone; None for a task that cannot be merged."""

    place: Place
    n_images: int
    task: float
    merged: float | None


class CostTable:
    """Records by what they are of."""

    def __init__(self, records: Sequence[CostRecord]):
        self.records = records
        self._records: dict[tuple[Place, str, int, int | None], CostRecord] = {}
        for record in records:
            self._records[record.place, record.work, record.n_images, record.n_steps] = record

    def find(self, place: Place, work: str, n_images: int, n_steps: int | None = None) -> CostRecord | None:
        """The record of a piece of work; its `n_steps` is ignored where solver steps do not matter."""
        return self._records.get((place, work, n_images, n_steps if work in PIECES_OF_STEPS else None))

    def places(self) -> list[Place]:
        return list(dict.fromkeys(record.place for record in self.records))

    def images(self, place: Place) -> list[int]:
        """Numbers of support images, ascending."""
        return sorted({r.n_images for r in self.records if r.place == place and r.work in LABELS})

    def steps(self, place: Place) -> list[int]:
        """Numbers of solver steps, ascending."""
        return sorted({r.n_steps for r in self.records if r.place == place and r.n_steps is not None})

    def batches(self, place: Place) -> list[int]:
        """How many images are predicted at once, ascending."""
        return sorted({r.n_images for r in self.records if r.place == place and r.work == PLAIN})

    def task_ratios(self) -> list[TaskRatios]:
        ratios = []
        for place in self.places():
            for n_images in self.images(place):
                for n_steps in self.steps(place):
                    ratios.append(self._compare_task(place, n_images, n_steps))
        return ratios

    def _compare_task(self, place: Place, n_images: int, n_steps: int) -> TaskRatios:
        def divide(work: str, other: str) -> float | None:
            one, two = self.find(place, work, n_images, n_steps), self.find(place, other, n_images)
            return None if one is None or two is None else one.seconds / two.seconds

        memory = None
        adapt, full = self.find(place, ADAPT, n_images, n_steps), self.find(place, FULL, n_images)
        if adapt is not None and full is not None and adapt.peak_memory_mb is not None and full.peak_memory_mb:
            memory = adapt.peak_memory_mb / full.peak_memory_mb
        return TaskRatios(
            place=place,
            n_images=n_images,
            n_steps=n_steps,
            ready=divide(READY, FORWARD),
            next_ready=divide(NEXT_READY, FORWARD),
            adapt_time=divide(ADAPT, FULL),
            adapt_memory=memory,
            next_adapt_time=divide(NEXT_ADAPT, FULL),
            ready_time=divide(READY, FULL),
        )

    def prediction_ratios(self) -> list[PredictionRatios]:
        ratios = []
        for place in self.places():
            for n_images in self.batches(place):
                plain, task = self.find(place, PLAIN, n_images), self.find(place, TASK, n_images)
                merged = self.find(place, MERGED, n_images)
                if plain is None or task is None:
                    continue
                merged_ratio = None if merged is None else merged.seconds / plain.seconds
                ratios.append(PredictionRatios(place, n_images, task.seconds / plain.seconds, merged_ratio))
        return ratios

    def to_json(self) -> dict[str, list[dict[str, Any]]]:
        """Ratios first, then all records."""
        return {
            "task_ratios": [_flatten(ratios) for ratios in self.task_ratios()],
            "prediction_ratios": [_flatten(ratios) for ratios in self.prediction_ratios()],
            "records": [_flatten(record) for record in self.records],
        }


def _flatten(record: CostRecord | TaskRatios | PredictionRatios) -> dict[str, Any]:
    """A record as a dict, its place's fields among its own."""
    content = asdict(record)
    fields = content.pop("place")
    fields.update(content)
    return fields


def format_size(size: Sequence[int]) -> str:
    """The size of images in words: "70 px"."""
    height, width = size
    return f"{height} px" if height == width else f"{height} x {width} px"
