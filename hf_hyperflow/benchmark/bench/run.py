"""`hyperflow bench`: what it costs to get ready for a task and to predict, beside one look at the images.

    hyperflow bench --backbones released vit-s vit-b --images 5 25 100 500 --steps 1 4 50 --dtype float32 bfloat16

A task has random images of five classes. It begins with pixel values in memory and ends when it can predict. Times are
medians of runs that take turns in one process. On a CPU, every peak memory has a process of its own. Fine-tuning takes
50 gradient steps, of which a few are timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from ...arguments import make_parser
from ...extras import require_extra
from ...modeling.atomic_file import write_json
from ...modeling.saving import atomic_folder, exclusive
from ..cost import ProcessKilledError, device_name
from ..methods import FineTuning, Method
from .arguments import BenchArguments
from .figure import draw_costs
from .measure import BATCH_SIZES, Measured, measure_memory, measure_method, measure_pieces, measure_predictions
from .records import ONNX_PREDICTION, ONNX_READY, RIVALS, CostRecord, CostTable, Place, format_size
from .subjects import FindReleased, Subject, find_subject
from .table import print_costs
from .task import N_WAY, PIECES, PIECES_OF_STEPS, CostSetting, Piece

FILE, FIGURE = "bench.json", "bench.png"
DPI = 140


def main(argv: list[str] | None, find_released: FindReleased) -> None:
    """The command line, from `argv` or that of the process."""
    parser = make_parser(BenchArguments, prog="hyperflow bench")
    (arguments,) = parser.parse_args_into_dataclasses(argv)
    run(arguments, find_released)


def run(arguments: BenchArguments, find_released: FindReleased) -> dict[str, Any]:
    """Measure everything, print tables, and write `bench.json` and `bench.png` to `output_dir`.

    What does not fit into the memory is left out, and the progress bar says so.

    Returns:
        the content of the JSON file, see `CostTable.to_json`.

    Raises:
        CheckpointError, FileNotFoundError: a model is not there or damaged, or the folder cannot be written.
        IncompatibleBackboneError: the backbone is not that of the adapter, or cannot see images of this size.
        ValueError: the adapter does not say what is needed of its backbone.
    """
    disable_progress_bar()  # those of transformers; the bench has its own
    output = Path(arguments.output_dir)
    with exclusive(output), TemporaryDirectory() as scratch:
        subjects: dict[Subject, None] = {}  # "released" and "released@70" are the same
        for choice in arguments.backbones:
            subject = find_subject(choice, arguments.adapter, arguments.backbone, find_released, Path(scratch))
            subjects[subject] = None
        records = Bench(arguments, list(subjects)).measure()
        table = CostTable(records)
        content: dict[str, Any] = {"n_way": N_WAY, "torch": torch.__version__}
        content.update(table.to_json())
        write_json(output / FILE, content)
        with atomic_folder(output) as draft:
            draw_costs(table).savefig(draft / FIGURE, dpi=DPI)
    print_costs(table)
    for name in (FILE, FIGURE):
        print(f"wrote {output / name}")
    return content


@dataclass
class Bench:
    """Measures all that the arguments ask for, one process after another.

    Attributes:
        records: what was measured so far.
    """

    arguments: BenchArguments
    subjects: list[Subject]
    records: list[CostRecord] = field(default_factory=list)

    def measure(self) -> list[CostRecord]:
        """Measure everything, with a progress bar."""
        self._bar = tqdm(total=self._count(), desc="bench", disable=None, leave=False)
        with self._bar:
            for subject in self.subjects:
                for device in self.arguments.device:
                    for dtype in self.arguments.dtype:
                        self._measure_place(subject, device, dtype)
        return self.records

    def _count(self) -> int:
        """How many measurements there will be."""
        count = 0
        for subject in self.subjects:
            n_pieces = len(self._list_pieces(subject))
            for device in self.arguments.device:
                n_memory = n_pieces if device == "cpu" else 0
                has_onnx = self.arguments.onnx and device == "cpu"
                count += int(has_onnx and "float32" in self.arguments.dtype)
                per_place = 1 + len(self.arguments.images) * (1 + n_memory + len(RIVALS))
                count += per_place * len(self.arguments.dtype)
        return count

    def _list_pieces(self, subject: Subject) -> list[Piece]:
        pieces = []
        for name in PIECES:
            if name in PIECES_OF_STEPS:
                pieces += [Piece(name, n_steps) for n_steps in self.arguments.steps or [subject.n_steps]]
            else:
                pieces.append(Piece(name))
        return pieces

    def _measure_place(self, subject: Subject, device: str, dtype: str) -> None:
        """Everything of one backbone on one device in one precision."""
        place = Place(subject.name, subject.size, device_name(device), dtype)
        setting = CostSetting(subject.backbone, subject.adapter, subject.size, device, dtype)
        for n_images in self.arguments.images:
            with_images = replace(setting, n_images=n_images)
            self._measure_task(place, with_images, self._list_pieces(subject))
            for method in RIVALS:
                self._measure_rival(place, with_images, method)
        with self._step(place, f"predictions of {BATCH_SIZES[0]} and {BATCH_SIZES[1]}"):
            for prediction, measured in measure_predictions(setting).items():
                record = CostRecord(
                    place=place,
                    work=prediction.by,
                    n_images=prediction.n_images,
                    seconds=measured.seconds,
                    flops=measured.flops,
                )
                self.records.append(record)
        if self.arguments.onnx and (device, dtype) == ("cpu", "float32"):
            self._measure_onnx(place, setting)

    def _measure_onnx(self, place: Place, setting: CostSetting) -> None:
        """Getting ready and predicting one image in ONNX Runtime, for every number of support images."""
        with require_extra("onnx", "--onnx"):
            from .onnx_times import measure_onnx
        with self._step(place, "ONNX Runtime"):
            for n_images, times in measure_onnx(setting, self.arguments.images).items():
                for work, seconds in ((ONNX_READY, times.ready), (ONNX_PREDICTION, times.prediction)):
                    record = CostRecord(
                        place=place,
                        work=work,
                        n_images=n_images,
                        seconds=seconds,
                    )
                    self.records.append(record)

    def _measure_task(self, place: Place, setting: CostSetting, pieces: list[Piece]) -> None:
        """HyperFlow and one forward pass."""
        measured: dict[Piece, Measured] = {}
        with self._step(place, f"{setting.n_images} images"):
            measured = measure_pieces(setting, pieces)
        for piece, costs in measured.items():
            if costs.peak_memory_mb is None:
                with self._step(place, f"{setting.n_images} images, memory of {piece.name}"):
                    costs = replace(costs, peak_memory_mb=measure_memory(setting, piece))
            record = CostRecord(
                place=place,
                work=piece.name,
                n_images=setting.n_images,
                n_steps=piece.n_steps,
                seconds=costs.seconds,
                flops=costs.flops,
                peak_memory_mb=costs.peak_memory_mb,
            )
            self.records.append(record)

    def _measure_rival(self, place: Place, setting: CostSetting, method: Method) -> None:
        if isinstance(method, FineTuning) and setting.dtype == "bfloat16":
            setting = replace(setting, dtype="float32", is_autocast=True)
        with self._step(place, f"{setting.n_images} images, {method.label}"):
            cost = measure_method(setting, method)
            record = CostRecord(
                place=place,
                work=method.name,
                n_images=setting.n_images,
                seconds=cost.seconds_per_task,
                flops=cost.flops_per_task,
                peak_memory_mb=cost.peak_memory_mb,
            )
            self.records.append(record)

    @contextmanager
    def _step(self, place: Place, what: str) -> Iterator[None]:
        """Within, something is measured. The bar says what. Where memory runs out, it is left out."""
        self._bar.set_description(f"{place.backbone}, {format_size(place.size)}, {place.dtype}: {what}")
        try:
            yield
        except (ProcessKilledError, torch.OutOfMemoryError) as error:
            self._bar.write(f"left out: {place.title}, {what} ({error})")
        finally:
            self._bar.update(1)
