"""What training has cost: runs, seconds and operations counted by hand."""

from __future__ import annotations

import json
import time

import pytest
import torch
from accelerate import Accelerator

from hf_hyperflow.training.cost_log import OfflineCost, describe_hardware, list_versions


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def work(size: int) -> None:
    """A matrix product of 2 size^3 operations."""
    torch.ones(size, size) @ torch.ones(size, size)


def test_operations_of_counted_runs_stand_for_all(accelerator):
    cost = OfflineCost(accelerator)
    for size in (4, 100, 8, 100, 4):  # the first, third and fifth are counted
        with cost.phase("products", every=2, products=3):
            work(size)
    found = cost.summary()["products"]
    assert found["flops"] == 5 * (2 * 4**3 + 2 * 8**3 + 2 * 4**3) / 3
    assert (found["runs"], found["products"]) == (5, 15)


def test_seconds_are_those_of_the_block(accelerator):
    cost = OfflineCost(accelerator)
    for _ in range(2):
        with cost.phase("sleep"):
            time.sleep(0.06)
        time.sleep(0.06)
    assert 0.1 <= cost.summary()["sleep"]["seconds"] < 10


def test_goes_on_from_its_state(accelerator):
    whole, first = OfflineCost(accelerator), OfflineCost(accelerator)
    for size in (4, 8, 4, 8):
        with whole.phase("products", every=2):
            work(size)
    for size in (4, 8, 4):
        with first.phase("products", every=2):
            work(size)
    second = OfflineCost(accelerator, json.loads(json.dumps(first.state())))  # as a checkpoint keeps it
    with second.phase("products", every=2):
        work(8)
    one, two = whole.summary()["products"], second.summary()["products"]
    assert one["flops"] == two["flops"] == 4 * 2 * 4**3
    assert one["runs"] == two["runs"]


def test_hardware_and_versions(accelerator):
    found = describe_hardware(accelerator)
    assert found["device"].endswith(f"CPU, {torch.get_num_threads()} threads")
    assert not found["gpu"]
    assert found["processes"] == 1
    assert list_versions()["torch"].startswith(torch.__version__.split("+")[0])
