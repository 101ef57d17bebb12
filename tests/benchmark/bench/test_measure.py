"""Costs on a tiny backbone: what is part of something costs less, and steps that are not run are counted rightly."""

from __future__ import annotations

import dataclasses
import os

import pytest

from hf_hyperflow.benchmark.bench.measure import measure_method
from hf_hyperflow.benchmark.bench.task import CostSetting, CostTask
from hf_hyperflow.benchmark.cost import ProcessKilledError, count_flops, run_in_fresh_process
from hf_hyperflow.benchmark.methods import BiasTuning, DirectTransfer, FullFineTuning
from tests.helpers.tiny import SIZE


@pytest.fixture
def setting(pair) -> CostSetting:
    return CostSetting(*pair, size=(SIZE, SIZE), n_images=10)


@pytest.mark.slow
def test_costs_of_methods(setting):
    direct = measure_method(dataclasses.replace(setting, views=2, query_views=4), DirectTransfer())
    full = measure_method(setting, FullFineTuning(steps=3, learning_rate=1e-4))
    image = full.flops_per_prediction
    assert direct.flops_per_prediction == pytest.approx(4 * image, rel=0.01)
    assert direct.flops_per_task == pytest.approx(2 * 10 * image, rel=0.01)
    # A step runs 20 images forwards and, at twice the cost, backwards, but for what is behind the first layer.
    assert 4.5 * 3 < full.flops_per_task / (10 * image) < 6 * 3 + 1.5
    assert full.seconds_per_task > direct.seconds_per_task > 0
    assert full.peak_memory_mb > direct.peak_memory_mb > 0


@pytest.mark.slow
def test_a_process_that_is_killed_is_said():
    with pytest.raises(ProcessKilledError, match="was killed, probably because memory ran out"):
        run_in_fresh_process(os._exit, 1)


@pytest.mark.parametrize("method", [BiasTuning(steps=6), FullFineTuning(steps=6)], ids=lambda method: method.name)
def test_operations_of_steps_that_are_not_run(setting, method):
    """All steps are alike, up to how many views of the images a step draws for the first time."""
    task = CostTask(setting)
    expected = count_flops(lambda: task.prepare(method))
    extrapolated = method.count_operations(lambda fit: count_flops(lambda: task.prepare(method, fit)))
    assert extrapolated == pytest.approx(expected, rel=1e-6)
