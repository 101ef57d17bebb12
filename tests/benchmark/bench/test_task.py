"""A task of the bench, and what a method does until it can classify."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hf_hyperflow.benchmark.bench.task import (
    ADAPT,
    ENCODE,
    FORWARD,
    INJECT,
    INTEGRATE,
    NEXT_ADAPT,
    NEXT_READY,
    PIECES,
    PROTOTYPES,
    READ,
    READY,
    WRITE,
    CostSetting,
    CostTask,
    Piece,
    prepare_task,
)
from hf_hyperflow.benchmark.cost import count_flops
from hf_hyperflow.benchmark.methods import METHODS, DirectTransfer, FineTuning, FullFineTuning, HyperFlow
from hf_hyperflow.finetuning.finetune import FineTuningConfig, draw_batches
from hf_hyperflow.modeling.injection import get_injection
from tests.helpers.tiny import SIZE, Snapshot


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_preparing_does_all_of_the_work(method, backbone, target, colours, episode):
    """It starts at the images: the backbone reads every image of the support set as often as it has to."""
    if isinstance(method, FineTuning):
        method = dataclasses.replace(method, steps=3, learning_rate=3e-3)
    n_read = []
    backbone.register_forward_pre_hook(lambda module, args: n_read.append(len(args[0])))
    images, labels = colours.images[episode.support], episode.support_labels
    classifier = prepare_task(method, target, images, labels)
    if method.name == "full":
        assert sum(n_read) == 3 * 20 + 10
    elif isinstance(method, FineTuning):  # frozen blocks run once for every view that one of the 3 steps draws
        views = set()
        for batch in draw_batches(labels, FineTuningConfig(steps=3, learning_rate=3e-3)):
            views |= set(zip(batch.augmented.tolist(), batch.views.tolist(), strict=True))
        assert sum(n_read) == 1 + 10 + len(views) + 10
        assert 10 < len(views) <= 3 * 10
    else:
        assert sum(n_read) == 10
    assert not any("beft" in name or "lora" in name for name, _ in backbone.named_parameters())
    assert classifier.predict(target.images(images)).shape == (10,)


def test_the_first_steps_of_fine_tuning(target, colours, episode):
    images, labels = colours.images[episode.support], episode.support_labels
    method = FullFineTuning(steps=5, learning_rate=1e-3)
    whole = prepare_task(method, target, images, labels)
    first = prepare_task(method, target, images, labels, fit=lambda support: method.fit_after(support, [1])[0])
    alone = prepare_task(dataclasses.replace(method, steps=1), target, images, labels)
    torch.testing.assert_close(first.prototypes, alone.prototypes, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(first.prototypes, whole.prototypes, atol=1e-3)


@pytest.mark.parametrize("method", [DirectTransfer(), HyperFlow()], ids=lambda method: method.name)
def test_every_view_costs(method, backbone, target, colours, episode):
    n_read = []
    backbone.register_forward_pre_hook(lambda module, args: n_read.append(len(args[0])))
    images, labels = colours.images[episode.support], episode.support_labels
    classifier = prepare_task(method, target, images, labels, views=3)
    assert sum(n_read) == 3 * 10
    n_read.clear()
    classifier.classify(target.images(images[:1], 4))
    assert sum(n_read) == 4


@pytest.fixture
def task(pair) -> CostTask:
    return CostTask(CostSetting(*pair, size=(SIZE, SIZE), n_images=6, n_way=3))


def test_the_pieces_do_the_work_of_a_task(task):
    """Operations of the parts are those of getting ready. A next task does as much as the first."""
    flops = {}
    for name in PIECES:
        work = task.build(Piece(name, 3))
        work.prepare()
        flops[name] = count_flops(work.run)
    assert flops[READ] == flops[INJECT] == 0
    # The networks run in these parts only. Beside them, the calibration and the head are a few products.
    assert flops[ADAPT] == flops[ENCODE] + flops[INTEGRATE]
    assert flops[READY] == flops[ADAPT] + flops[PROTOTYPES] + flops[WRITE]
    assert (flops[NEXT_ADAPT], flops[NEXT_READY]) == (flops[ADAPT], flops[READY])
    # Conditioning runs half of the blocks, and the prototypes go on from there. The last may run the CLS token alone.
    assert 0.7 * flops[FORWARD] < flops[ENCODE] + flops[PROTOTYPES] < 1.1 * flops[FORWARD]


def test_a_first_task_begins_without_an_adapter_and_a_next_one_with_it(task):
    backbone = task.target.backbone
    before = Snapshot(backbone)
    for name, has_adapter in ((FORWARD, False), (READY, False), (NEXT_READY, True), (WRITE, True), (ADAPT, False)):
        work = task.build(Piece(name, 1))
        work.prepare()
        assert (get_injection(backbone) is not None) == has_adapter, name
        work.run()
    task.target.unload()
    before.assert_unchanged()


def test_more_steps_are_more_work(task):
    one, four = [task.build(Piece(INTEGRATE, n_steps)) for n_steps in (1, 4)]
    assert 2 * count_flops(one.run) < count_flops(four.run) < 4 * count_flops(one.run)
