"""`HyperFlowAdapter.adapt_many`: many support sets at once lead to the tasks that they lead to one by one."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image

from hf_hyperflow import ImageError, IncompatibleBackboneError, SupportSetError
from hf_hyperflow.modeling.peft_configs import bias_config, layernorm_config, lora_config
from hf_hyperflow.modeling.support import read_support
from tests.helpers.tiny import (
    SIZE,
    Snapshot,
    picture,
    pictures,
    same_bits,
    tiny_adapter,
    tiny_dinov2,
    tiny_resnet,
    tiny_vit,
    write_pictures,
)


def draw_tensors(labels: list[int], size: int = SIZE, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(labels), 3, size, size, generator=generator), torch.tensor(labels)


@pytest.fixture
def supports(tmp_path) -> list:
    """Support sets in all forms, of different numbers of classes and images, and of two sizes."""
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    rows = {"image": [picture(i) for i in range(3)], "label": [0, 1, 1]}
    return [
        pictures(n_way=3, n_shot=2),
        draw_tensors([0, 1, 2, 3, 0, 0], seed=1),
        write_pictures(tmp_path / "folder", pictures(n_way=2, n_shot=3, seed=2)),
        draw_tensors([1, 0], size=2 * SIZE, seed=3),
        [(picture(i), name) for i, name in enumerate(["x", "y", "x"])],
        Dataset.from_dict(rows, features=features),
    ]


ADAPTERS = {
    "biases and norms, LDA": (bias_config, {"lda": True, "intermediate_weight": 0.5}, {}),
    "lora, early stopping": (lora_config, {}, {"early_stopping": True, "n_steps": 2}),
    "norms, views, midpoint": (layernorm_config, {}, {"views": 2, "solver": "midpoint"}),
    "an encoder of its own": (bias_config, {"encoder": tiny_resnet()}, {}),
    "large images are reduced": (bias_config, {"image_size": [SIZE, SIZE]}, {"early_stopping": True}),
    "no flow": (bias_config, {}, {"n_steps": 0}),
}


#: The others run with the slow tests.
FAST = ("biases and norms, LDA", "lora, early stopping")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in FAST else pytest.mark.slow) for k in ADAPTERS])
def test_the_tasks_are_those_of_adapt_up_to_rounding(supports, pixels, kind):
    config, arguments, options = ADAPTERS[kind]
    backbone = tiny_dinov2()
    adapter = tiny_adapter(backbone, config(backbone, 2), **arguments)
    expected = [adapter.adapt(backbone, support, **options) for support in supports]
    before = Snapshot(tiny_dinov2())
    actual = adapter.adapt_many(before.model, supports, **options, batch_size=8)
    assert len(actual) == len(supports)
    for task, single in zip(actual, expected, strict=True):
        assert (task.class_names, task.nfe) == (single.class_names, single.nfe)
        assert task.stopping_point.time == single.stopping_point.time
        assert task.stopping_point.accuracies == pytest.approx(single.stopping_point.accuracies)
        torch.testing.assert_close(task.theta, single.theta, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(task.prototypes, single.prototypes, rtol=1e-4, atol=1e-4)
        assert task.scale == pytest.approx(single.scale, rel=1e-4)
        torch.testing.assert_close(task.scores(pixels), single.scores(pixels), rtol=1e-3, atol=1e-4)
    if not options:
        assert (actual[0].theta - actual[1].theta).abs().max() > 1e-3, "the flow reads the support sets"
    actual[0].reset()
    before.assert_unchanged()


def test_an_adaptive_solver_takes_one_after_the_other(adapter, backbone):
    """Together they would share their steps, and the easy ones would take as many as the hard ones."""
    supports = [draw_tensors([0, 1, 1], seed=1), draw_tensors([0, 1, 2, 3], seed=2)]
    expected = [adapter.adapt(backbone, support, solver="dopri5") for support in supports]
    actual = adapter.adapt_many(backbone, supports, solver="dopri5")
    assert [task.nfe for task in actual] == [task.nfe for task in expected]
    for task, single in zip(actual, expected, strict=True):
        torch.testing.assert_close(task.theta, single.theta, rtol=1e-4, atol=1e-5)


def test_support_sets_are_read_batch_by_batch_and_their_images_are_not_kept(adapter, backbone):
    alive: list[weakref.ref] = []
    most = 0

    def generate():
        nonlocal most
        for seed in range(8):
            support = read_support(draw_tensors([0, 1], seed=seed), None)
            alive.append(weakref.ref(support.pixel_values))
            yield support
            del support
            most = max(most, sum(reference() is not None for reference in alive))

    tasks = adapter.adapt_many(backbone, generate(), batch_size=4)
    assert len(tasks) == 8
    assert most <= 3, "a batch is two support sets of two images, and the next one is read"
    assert not any(reference() is not None for reference in alive)


# What is wrong is named, and nothing is left changed

GOOD = draw_tensors([0, 1], seed=1)
NAN = torch.full((2, 3, SIZE, SIZE), torch.nan)


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (draw_tensors([0, 0]), SupportSetError, "there is only one class"),
        ((NAN, torch.tensor([0, 1])), SupportSetError, "image 0 has NaN"),
        ({"a": [picture(0)], "b": [b"rubbish"]}, ImageError, "image 0 of class 'b' cannot be read"),
        ("nowhere", FileNotFoundError, "nowhere is not a folder"),
        (
            draw_tensors([0, 1], size=5),
            IncompatibleBackboneError,
            "does not run on pixel values of shape 2 x 3 x 5 x 5",
        ),
        (Dataset.from_dict({"number": [1, 2]}), ValueError, "image"),
        ((3e38 * torch.ones(2, 3, SIZE, SIZE), torch.tensor([0, 1])), SupportSetError, "image 0"),
    ],
)
def test_a_bad_support_set_is_named(adapter, bad, error, words):
    before = Snapshot(tiny_dinov2())
    # The good ones are adapted to, batch by batch, before the bad one is read.
    with pytest.raises(error, match=f"^support set 2: .*{words}"):
        adapter.adapt_many(before.model, [GOOD, GOOD, bad, GOOD], batch_size=2)
    before.assert_unchanged()
    with pytest.raises(error, match=f"^support set 'my pets': .*{words}"):
        adapter.adapt_many(before.model, {"good": GOOD, "my pets": bad}, batch_size=100)
    before.assert_unchanged()


def test_after_an_error_an_adapter_that_was_in_stays_in(adapter):
    before = Snapshot(tiny_dinov2())
    task = adapter.adapt(before.model, GOOD)
    expected, modules = task.logits(GOOD[0]), list(dict(before.model.named_modules()))
    with pytest.raises(SupportSetError, match=r"^support set 2: "):
        adapter.adapt_many(before.model, [GOOD, GOOD, draw_tensors([0, 0])], batch_size=2)
    assert list(dict(before.model.named_modules())) == modules
    assert same_bits(task.logits(GOOD[0]), expected)
    task.reset()
    before.assert_unchanged()


def test_an_image_that_is_too_large_for_the_precision_is_named(adapter):
    """It is found when the backbone has run, on all of a batch together."""
    backbone = tiny_dinov2().half()
    values, labels = draw_tensors([0, 1])
    with pytest.raises(ImageError, match=r"^support set 1: image 1 has or makes values that are NaN, infinite or too"):
        adapter.adapt_many(backbone, [GOOD, (values * torch.tensor([1, 1e5]).view(2, 1, 1, 1), labels)])


@pytest.mark.parametrize(
    "single", [GOOD, "pets", Dataset.from_dict({"a": [1]}), GOOD[0], read_support(GOOD, None), None], ids=repr
)
def test_a_single_support_set(adapter, backbone, single):
    before = Snapshot(backbone)
    with pytest.raises(SupportSetError, match=r"does not hold several support sets\. Give a list"):
        adapter.adapt_many(backbone, single)
    before.assert_unchanged()


def test_bad_arguments(adapter, backbone):
    for arguments, words in [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"views": 9}, "views must be"),
        ({"n_steps": -1}, "n_steps must be at least 1"),
        ({"solver": "magic"}, "unknown solver 'magic'"),
    ]:
        before = Snapshot(backbone)
        with pytest.raises(ValueError, match=words):
            adapter.adapt_many(backbone, [GOOD, GOOD], **arguments)
        before.assert_unchanged()
    with pytest.raises(IncompatibleBackboneError, match="num_blocks is 3, expected 4"):
        adapter.adapt_many(tiny_dinov2(num_hidden_layers=3), [GOOD])
    assert adapter.adapt_many(backbone, []) == []


def test_left_out_images_are_named_with_their_support_set(adapter, backbone):
    support = pictures(n_way=2, n_shot=2)
    support["red"].append(b"rubbish")
    with pytest.warns(UserWarning, match="^support set 'b': left out: image 2 of class 'red' cannot be read") as caught:
        _, task = adapter.adapt_many(backbone, {"a": GOOD, "b": support}, skip_bad=True)
    assert caught[0].filename == __file__
    assert task.class_names == ["red", "green"]


@pytest.mark.slow
def test_threads_predict_meanwhile(adapter, backbone):
    """Each gets, bit for bit, what it gets alone."""
    supports = [draw_tensors([0, 1, 1], seed=seed) for seed in range(6)]
    task = adapter.adapt(backbone, GOOD)
    expected = task.logits(GOOD[0])
    alone = adapter.adapt_many(backbone, supports, batch_size=6)
    wrong: list[str] = []

    def predict() -> None:
        for _ in range(20):
            if not same_bits(task.logits(GOOD[0]), expected):
                wrong.append("prediction")

    def adapt() -> None:
        for again, first in zip(adapter.adapt_many(backbone, supports, batch_size=6), alone, strict=True):
            if not (same_bits(again.theta, first.theta) and same_bits(again.prototypes, first.prototypes)):
                wrong.append("adaptation")

    threads = [threading.Thread(target=target) for target in (predict, adapt, predict, adapt)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_task_that_is_merged_is_in_the_way(adapter, backbone):
    task = adapter.adapt(backbone, GOOD)
    task.merge()
    with pytest.raises(IncompatibleBackboneError, match="a task is merged into this Dinov2Model: reset that task"):
        adapter.adapt_many(backbone, [GOOD])
    task.reset()


def test_vit():
    """Another backbone, in bfloat16."""
    backbone = tiny_vit().to(torch.bfloat16)
    adapter = tiny_adapter(tiny_vit())
    supports = [draw_tensors([0, 1, 2], seed=seed) for seed in range(2)]
    for task, support in zip(adapter.adapt_many(backbone, supports), supports, strict=True):
        single = adapter.adapt(backbone, support)
        torch.testing.assert_close(task.theta, single.theta, rtol=0.05, atol=0.05)
        assert task.predict(support[0]) == ["0", "1", "2"]
