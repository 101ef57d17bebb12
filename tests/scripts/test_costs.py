"""Costs on a tiny backbone: what is part of something costs less, and steps that are not run are counted rightly."""

from __future__ import annotations

import pytest
import torch

from hf_hyperflow.benchmark.cost import count_flops
from hf_hyperflow.benchmark.methods import BiasTuning, FullFineTuning, Target
from tests.helpers.tiny import SIZE, tiny_adapter, tiny_dinov2
from training.card.costs import ADAPT, COST_LABELS, DIRECT, FLOW, READY, Task, measure


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folders of a backbone and its adapter."""
    folder = tmp_path_factory.mktemp("pair")
    backbone = tiny_dinov2()
    backbone.save_pretrained(folder / "backbone")
    tiny_adapter(backbone).save_pretrained(folder / "adapter")
    return str(folder / "backbone"), str(folder / "adapter")


@pytest.mark.slow
def test_every_row_is_measured(pair):
    rows = {name: measure(name, *pair, SIZE, steps=4, timed_steps=2) for name in COST_LABELS}
    assert all(row["seconds"] > 0 and row["flops"] > 0 and row["peak_memory_mb"] >= 0 for row in rows.values())
    assert rows[FLOW]["flops"] < rows[ADAPT]["flops"] < rows[READY]["flops"]
    assert rows[DIRECT]["flops"] < rows[READY]["flops"]
    assert rows["bias"]["flops"] < rows["full"]["flops"]


@pytest.mark.parametrize("method", [BiasTuning(steps=4), FullFineTuning(steps=4)], ids=lambda method: method.name)
def test_operations_of_steps_that_are_not_run(pair, method):
    """All steps are alike, up to how many views of the images a step draws for the first time."""
    backbone = tiny_dinov2()
    task = Task.draw(Target(backbone, tiny_adapter(backbone)), SIZE)
    expected = count_flops(lambda: task.fine_tune(method, 4))
    assert measure(method.name, *pair, SIZE, steps=4, timed_steps=2)["flops"] == pytest.approx(expected, rel=1e-6)


def test_a_task_leaves_the_backbone_as_it_was():
    backbone = tiny_dinov2()
    before = {name: parameter.clone() for name, parameter in backbone.named_parameters()}
    task = Task.draw(Target(backbone, tiny_adapter(backbone)), SIZE)
    task.transfer_directly()
    task.adapt()
    task.fine_tune(FullFineTuning(steps=2), 2)
    task.adapt_with_prototypes()
    task.target.unload()
    assert before.keys() == dict(backbone.named_parameters()).keys()
    assert all(torch.equal(parameter, before[name]) for name, parameter in backbone.named_parameters())
