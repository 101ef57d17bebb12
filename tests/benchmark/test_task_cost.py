from __future__ import annotations

import dataclasses

import pytest
import torch

from hf_hyperflow.benchmark.methods import METHODS, DirectTransfer, FineTuning, FullFineTuning, HyperFlow
from hf_hyperflow.benchmark.task_cost import CostFile, CostKey, CostSetting, TaskCost, measure_task_cost, prepare_task
from hf_hyperflow.finetuning.finetune import FineTuningConfig, draw_batches
from hf_hyperflow.modeling.saving import CheckpointError


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
        assert sum(n_read) == 1 + 3 * 20 + 10  # one image is tried beforehand
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


@pytest.mark.slow
def test_costs_are_measured(target, tmp_path):
    target.backbone.save_pretrained(tmp_path / "backbone")
    target.adapter.save_pretrained(tmp_path / "adapter")
    setting = CostSetting(
        backbone=str(tmp_path / "backbone"),
        adapter=str(tmp_path / "adapter"),
        device="cpu",
        bf16=False,
        size=(28, 28),
    )
    views = dataclasses.replace(setting, views=2, query_views=4)
    direct = measure_task_cost(DirectTransfer(), views, 5, 10)
    full = measure_task_cost(FullFineTuning(steps=3, learning_rate=1e-4), setting, 5, 10)
    image = full.flops_per_prediction
    assert direct.flops_per_prediction == pytest.approx(4 * image, rel=0.01)
    assert direct.flops_per_task == pytest.approx(2 * 10 * image, rel=0.01)
    # A step runs 20 images forwards and, at twice the cost, backwards, but for what is behind the first layer.
    assert 4.5 * 3 < full.flops_per_task / (10 * image) < 6 * 3 + 1.5
    assert full.seconds_per_task > direct.seconds_per_task > 0
    assert full.peak_memory_mb > direct.peak_memory_mb > 0


def test_a_cost_file_keeps_costs_of_every_device(tmp_path):
    key, cost = CostKey("direct", 5, 25), TaskCost(0.5, 2.0, 1000, 100)
    file = CostFile(tmp_path / "costs.json", "cpu")
    assert file.costs == {}
    file.add(key, cost)
    assert CostFile(tmp_path / "costs.json", "cpu").costs == {key: cost}
    text = (tmp_path / "costs.json").read_text().replace("CPU", "other machine")
    (tmp_path / "costs.json").write_text(text)
    file = CostFile(tmp_path / "costs.json", "cpu")
    assert file.costs == {}
    file.add(key, cost)
    assert (tmp_path / "costs.json").read_text().count("device") == 2


@pytest.mark.parametrize(
    ("content", "words"), [('[{"method": "direct"', "is damaged"), ('[{"a": 1}]', "is not the costs of a benchmark of")]
)
def test_damaged_costs_are_named(tmp_path, content, words):
    (tmp_path / "costs.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"costs\.json {words}"):
        CostFile(tmp_path / "costs.json", "cpu")
