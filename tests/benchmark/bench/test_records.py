"""Ratios worked out by hand."""

from __future__ import annotations

import pytest

from hf_hyperflow.benchmark.bench.records import CostRecord, CostTable, Place, format_size
from hf_hyperflow.benchmark.bench.table import format_seconds

PLACE = Place("released", (70, 70), "a CPU, 2 threads", "float32")
OTHER = Place("vit-s", (224, 224), "a GPU", "bfloat16")


def record(place: Place, work: str, n_images: int, seconds: float, memory: float | None, n_steps=None) -> CostRecord:
    return CostRecord(
        place=place, work=work, n_images=n_images, n_steps=n_steps, seconds=seconds, flops=1e9, peak_memory_mb=memory
    )


RECORDS = [
    record(PLACE, "forward", 25, 0.2, 10.0),
    record(PLACE, "adapt", 25, 0.1, 5.0, n_steps=4),
    record(PLACE, "ready", 25, 0.3, 12.0, n_steps=4),
    record(PLACE, "next_adapt", 25, 0.05, 5.0, n_steps=4),
    record(PLACE, "next_ready", 25, 0.25, 12.0, n_steps=4),
    record(PLACE, "ready", 25, 0.4, 12.0, n_steps=50),
    record(PLACE, "full", 25, 100.0, 1000.0),
    record(PLACE, "plain", 1, 0.02, None),
    record(PLACE, "task", 1, 0.03, None),
    record(PLACE, "merged", 1, 0.02, None),
    record(OTHER, "ready", 5, 1.0, 1.0, n_steps=4),  # its forward pass did not fit into the memory
    record(OTHER, "plain", 32, 0.02, None),
    record(OTHER, "task", 32, 0.03, None),
]


def test_ratios_of_tasks():
    four, fifty, missing = CostTable(RECORDS).task_ratios()
    assert (four.place, four.n_images, four.n_steps) == (PLACE, 25, 4)
    assert (four.ready, four.next_ready, four.ready_time) == pytest.approx((1.5, 1.25, 0.003))
    assert (four.adapt_time, four.next_adapt_time, four.adapt_memory) == pytest.approx((0.001, 0.0005, 0.005))
    assert (fifty.ready, fifty.adapt_time, fifty.adapt_memory) == (pytest.approx(2), None, None)
    assert (missing.place, missing.ready, missing.adapt_time) == (OTHER, None, None)


def test_ratios_of_predictions():
    one, batch = CostTable(RECORDS).prediction_ratios()
    assert (one.place, one.n_images, one.task, one.merged) == (PLACE, 1, pytest.approx(1.5), 1)
    assert (batch.place, batch.n_images, batch.task, batch.merged) == (OTHER, 32, pytest.approx(1.5), None)


def test_json_begins_with_the_ratios():
    content = CostTable(RECORDS).to_json()
    assert list(content) == ["task_ratios", "prediction_ratios", "records"]
    assert content["records"][0] == {
        "backbone": "released",
        "size": (70, 70),
        "device": "a CPU, 2 threads",
        "dtype": "float32",
        "work": "forward",
        "n_images": 25,
        "n_steps": None,
        "seconds": 0.2,
        "flops": 1e9,
        "peak_memory_mb": 10.0,
    }


def test_words():
    assert (format_size((70, 70)), format_size((70, 90))) == ("70 px", "70 x 90 px")
    words = {0.00123: "1.23 ms", 0.9996: "1 s", 65.29: "65.3 s", 2011: "2,011 s"}
    assert {seconds: format_seconds(seconds) for seconds in words} == words
