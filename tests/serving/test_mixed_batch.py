"""Mixed batches: each image by its own task, with PEFT's `adapter_names` and with our `predict_mixed`."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file

from hf_hyperflow import AdaptedTask, ImageError, IncompatibleBackboneError, predict_mixed, score_mixed
from hf_hyperflow.modeling.injection import get_injection
from hf_hyperflow.modeling.peft_configs import bias_config, layernorm_config, lora_config
from tests.helpers.families import FAMILIES
from tests.helpers.tiny import SIZE, Snapshot, picture, pictures, same_bits, tiny_adapter, tiny_dinov2, tiny_vit

CONFIGS = {
    "biases": lambda b: bias_config(b, 2, norms=False),
    "biases and norms": lambda b: bias_config(b, 2),
    "lora": lambda b: lora_config(b, 2),
    "layernorms": lambda b: layernorm_config(b, 2),
}

#: Of support sets with 2, 3, 2 and 3 classes, the number of the task of each image.
ORDER = [0, 2, 1, 1, 0, 3, 2, 1]


def adapt_to_four(adapter, backbone) -> list[AdaptedTask]:
    supports = [pictures(n_way=2 + seed % 2, n_shot=1 + seed // 2, seed=seed) for seed in range(4)]
    return adapter.adapt_many(backbone, supports)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(len(ORDER), 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def tasks(adapter, backbone) -> list[AdaptedTask]:
    return adapt_to_four(adapter, backbone)


def assert_as_one_by_one(tasks: list[AdaptedTask], images: torch.Tensor, **options: int) -> None:
    """Up to rounding. The tasks differ by much more."""
    expected = [task.scores(image) for task, image in zip(tasks, images, strict=True)]
    actual = score_mixed(tasks, images, **options)
    for row, single in zip(actual, expected, strict=True):
        torch.testing.assert_close(row, single, rtol=1e-4, atol=1e-5)
    labels = [task.predict(image) for task, image in zip(tasks, images, strict=True)]
    assert predict_mixed(tasks, images, **options) == labels


KINDS = [
    pytest.param(tiny_dinov2, "biases and norms"),
    pytest.param(tiny_dinov2, "lora"),
    pytest.param(tiny_dinov2, "layernorms", marks=pytest.mark.slow),
    pytest.param(tiny_vit, "biases", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("make", "kind"), KINDS)
def test_any_adapter_as_one_by_one(make, kind, images, tmp_path):
    backbone = make().train()
    before = Snapshot(backbone)
    adapter = tiny_adapter(backbone, CONFIGS[kind](backbone), lda=True, intermediate_weight=0.5)
    tasks = adapt_to_four(adapter, backbone)
    tasks[3].save_pretrained(tmp_path)
    tasks[3] = AdaptedTask.from_pretrained(tmp_path, backbone)
    injection = get_injection(backbone)
    chosen = [tasks[number] for number in ORDER]
    assert_as_one_by_one(chosen, images)
    assert_as_one_by_one(chosen, images, batch_size=3)
    assert get_injection(backbone) is injection, "tasks of one adapter share it, loaded or not"
    wrong = score_mixed([tasks[1]] * len(images), images)[2]
    assert (wrong - tasks[1].scores(images[0])).abs().max() > 1e-4
    tasks[0].reset()
    before.assert_unchanged()


def test_tasks_of_several_adapters_and_of_none(backbone, images):
    """With and without a flow, cut at several blocks, and in half precision."""
    backbone.to(torch.bfloat16)
    plain = tiny_adapter(tiny_dinov2())
    lora = tiny_adapter(tiny_dinov2(), lora_config(tiny_dinov2(), 1), last_blocks=1)
    support = pictures(n_way=3, n_shot=1)
    tasks = [plain.adapt(backbone, support), lora.adapt(backbone, support), plain.direct_transfer(backbone, support)]
    chosen = [tasks[number % 3] for number in ORDER]
    expected = [task.scores(image) for task, image in zip(chosen, images, strict=True)]
    for row, single in zip(score_mixed(chosen, images), expected, strict=True):
        torch.testing.assert_close(row, single, rtol=0.05, atol=0.05)


NOT_CUT = [family.members[0] for family in FAMILIES if family.cut == "none" and "biases" in family.spaces]


@pytest.mark.parametrize("member", NOT_CUT[-1:], ids=[member.name for member in NOT_CUT[-1:]])
def test_a_backbone_that_cannot_be_cut(member):
    model = member.build(**member.remedy)
    adapter = tiny_adapter(model, bias_config(model, 1), last_blocks=1)
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    supports = [(images + seed, torch.tensor([0, 1, 1, 2])) for seed in range(3)]
    tasks = adapter.adapt_many(model, supports)
    for task, support in zip(tasks, supports, strict=True):
        single = adapter.adapt(model, support)
        torch.testing.assert_close(task.theta, single.theta, rtol=1e-4, atol=1e-4)
    assert_as_one_by_one([tasks[number] for number in (2, 0, 1, 0)], images)


def test_images_in_all_forms_and_sizes(tasks, tmp_path):
    picture(5).save(tmp_path / "a.png")
    mixed = [picture(1), tmp_path / "a.png", str(tmp_path / "a.png"), (picture(3, size=(60, 90)), "a label")]
    labels = [task.predict([image])[0] for task, image in zip(tasks, mixed, strict=True)]
    assert predict_mixed(tasks, mixed) == labels
    assert predict_mixed(tasks, iter(mixed), batch_size=1) == labels
    values = [torch.randn(3, SIZE + 14 * (i % 2), SIZE) for i in range(4)]
    expected = [task.scores(image) for task, image in zip(tasks, values, strict=True)]
    for row, single in zip(score_mixed(tasks, values), expected, strict=True):
        torch.testing.assert_close(row, single, rtol=1e-4, atol=1e-5)
    assert predict_mixed([], []) == []


def test_what_is_wrong_is_named(tasks, images, adapter):
    with pytest.raises(ValueError, match="there are 8 images for 4 tasks: name the task of each image"):
        predict_mixed(tasks, images)
    with pytest.raises(ValueError, match="this is one image: give a list of images"):
        predict_mixed(tasks[:1], images[0])
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        predict_mixed(tasks, images[:4], batch_size=0)
    with pytest.raises(ImageError, match="image 2 cannot be read"):
        predict_mixed(tasks, [picture(0), picture(1), b"rubbish", picture(2)])
    with pytest.raises(ImageError, match="image 1 has NaN or infinite pixel values"):
        predict_mixed(tasks, torch.cat([images[:1], torch.full((1, 3, SIZE, SIZE), torch.nan), images[2:4]]))
    with pytest.raises(IncompatibleBackboneError, match="does not run on pixel values of shape 1 x 3 x 5 x 5"):
        predict_mixed(tasks[:1], [torch.zeros(3, 5, 5)])
    other = adapter.adapt(tiny_dinov2(), pictures())
    with pytest.raises(ValueError, match="the tasks are of different backbones"):
        predict_mixed([tasks[0], other], images[:2])


def test_a_task_that_was_reset_or_is_merged(tasks, images):
    backbone = tasks[0].backbone
    tasks[1].merge()
    with pytest.raises(RuntimeError, match="this task is merged into its backbone"):
        predict_mixed(tasks, images[:4])
    with pytest.raises(IncompatibleBackboneError, match="a task is merged into this"):
        predict_mixed(tasks[2:], images[:2])
    tasks[1].reset()
    with pytest.raises(RuntimeError, match="this task was reset"):
        predict_mixed(tasks, images[:4])
    assert_as_one_by_one(tasks[2:], images[:2])
    tasks[2].reset()
    assert get_injection(backbone) is None


@pytest.mark.slow
def test_threads_predict_meanwhile(tasks, images):
    chosen = [tasks[number] for number in ORDER if number]
    expected = score_mixed(chosen, images[: len(chosen)])
    alone = tasks[0].scores(images)
    wrong: list[str] = []

    def mix() -> None:
        for _ in range(5):
            rows = score_mixed(chosen, images[: len(chosen)])
            if not all(same_bits(row, first) for row, first in zip(rows, expected, strict=True)):
                wrong.append("mixed")

    def predict() -> None:
        for _ in range(10):
            if not same_bits(tasks[0].scores(images), alone):
                wrong.append("alone")

    threads = [threading.Thread(target=target) for target in (mix, predict, mix, predict)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# PEFT's own: tasks of a LoRA adapter are saved, and what PEFT does with several adapters gives the same results


@pytest.fixture(params=[(), ("lora_A",)], ids=["lora", "lora, A frozen"])
def lora(request, tmp_path, images):
    """Three saved tasks, what each says of the images, and their folders."""
    backbone = tiny_dinov2()
    adapter = tiny_adapter(backbone, lora_config(backbone, 2), frozen_tensors=request.param)
    tasks = adapt_to_four(adapter, backbone)[:3]
    folders = [tmp_path / f"task{number}" for number in range(3)]
    for task, folder in zip(tasks, folders, strict=True):
        task.save_pretrained(folder)
    return tasks, folders


def classify(features: torch.Tensor, folder: Path) -> torch.Tensor:
    """Scores from CLS features `(n, width)` by what a saved task holds, without this package."""
    saved = load_file(folder / "prototypes.safetensors")
    return (saved["scale"] * F.normalize(features, dim=-1) @ saved["prototypes"].T).softmax(-1)


@torch.no_grad()
def test_peft_runs_a_mixed_batch_of_lora_tasks(lora, images):
    tasks, folders = lora
    order = [0, 2, 1, 1, 0, 2, 2, 1]
    model = PeftModel.from_pretrained(tiny_dinov2(), str(folders[0]), adapter_name="task0").eval()
    for number in (1, 2):
        model.load_adapter(str(folders[number]), adapter_name=f"task{number}")
    features = model(images, adapter_names=[f"task{number}" for number in order]).last_hidden_state[:, 0]
    mixed = score_mixed([tasks[number] for number in order], images)
    for row, number in enumerate(order):
        single = tasks[number].scores(images[row])
        theirs = classify(features[row : row + 1], folders[number])[0]
        torch.testing.assert_close(theirs, single, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mixed[row], single, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_peft_swaps_and_adds_lora_tasks(lora, images):
    tasks, folders = lora
    model = PeftModel.from_pretrained(tiny_dinov2(), str(folders[0])).eval()
    for number in (1, 2, 0):
        hotswap_adapter(model, str(folders[number]), adapter_name="default")
        features = model(images).last_hidden_state[:, 0]
        torch.testing.assert_close(
            classify(features, folders[number]), tasks[number].scores(images), rtol=1e-4, atol=1e-5
        )
    model.load_adapter(str(folders[1]), adapter_name="other")
    model.add_weighted_adapter(["default", "other"], [0.25, 0.75], "mixture", combination_type="cat")
    model.set_adapter("mixture")
    by_hand = tiny_dinov2()
    for path, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            delta = 0.25 * module.get_delta_weight("default") + 0.75 * module.get_delta_weight("other")
            by_hand.get_parameter(f"{path}.weight").add_(delta)
    torch.testing.assert_close(model(images).last_hidden_state, by_hand(images).last_hidden_state, rtol=1e-4, atol=1e-4)
