from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import BeftConfig, LoraConfig, PeftConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_hyperflow import AdaptedTask, CheckpointError, ImageError, IncompatibleBackboneError, SupportSetError
from hf_hyperflow.modeling.checksums import sha256
from hf_hyperflow.modeling.peft_configs import bias_config, layernorm_config, lora_config
from tests.helpers.files import flip_bit, read_folder
from tests.helpers.tiny import Snapshot, picture, pictures, same_bits, tiny_adapter, tiny_dinov2, tiny_resnet, tiny_vit

CONFIGS = {
    "biases": lambda b: bias_config(b, 2, norms=False),
    "biases and norms": lambda b: bias_config(b, 2),
    "lora": lambda b: lora_config(b, 2),
    "layernorms": lambda b: layernorm_config(b, 2),
}
#: All that can be saved: each kind as it is, and what fits as LoRA.
SAVED = [*((kind, None) for kind in CONFIGS), *((kind, "lora") for kind in CONFIGS if kind != "layernorms")]
BACKBONES = {"dinov2": tiny_dinov2, "vit": tiny_vit}


@pytest.fixture
def task(adapter, backbone, support):
    return adapter.adapt(backbone, support)


@pytest.fixture
def saved(task, tmp_path) -> Path:
    task.save_pretrained(tmp_path / "task")
    return tmp_path / "task"


# Predicting


def assert_same_answer(answer: list[dict], expected: list[dict]) -> None:
    """The same labels in the same order, and the same scores but for rounding."""
    assert [entry["label"] for entry in answer] == [entry["label"] for entry in expected]
    assert [entry["score"] for entry in answer] == pytest.approx([entry["score"] for entry in expected], abs=1e-6)


@pytest.fixture
def one_shot(adapter, backbone):
    """A task and its only images, which it tells apart by a wide margin."""
    support = pictures(n_way=3, n_shot=1)
    return adapter.adapt(backbone, support), [images[0] for images in support.values()]


def test_call_gives_labels_with_scores_best_first(one_shot):
    task, images = one_shot
    results = task(images)
    assert len(results) == 3
    for row, expected in zip(results, task.scores(images).tolist(), strict=True):
        scores = [entry["score"] for entry in row]
        assert scores == sorted(scores, reverse=True)
        by_label = {entry["label"]: entry["score"] for entry in row}
        assert [by_label[name] for name in task.class_names] == pytest.approx(expected, abs=1e-6)
        assert sum(scores) == pytest.approx(1)
    assert task.predict(images) == [row[0]["label"] for row in results]


@pytest.mark.parametrize(("top_k", "n"), [(None, 3), (1, 1), (2, 2), (3, 3), (10, 3)])
def test_top_k(one_shot, top_k, n):
    task, images = one_shot
    assert [len(row) for row in task(images, top_k=top_k)] == [n, n, n]
    assert_same_answer(task(images[0], top_k=top_k), task(images[0])[:n])


def test_one_image_gives_one_answer_a_list_gives_a_list(one_shot, processor, tmp_path):
    task, (image, *_) = one_shot
    path = tmp_path / "x.png"
    image.save(path)
    (expected,) = task([image])
    (answer,) = task((image,))
    assert_same_answer(answer, expected)
    for form in (image, path, str(path), path.read_bytes(), np.asarray(image)):
        assert_same_answer(task(form), expected)
        assert task.predict(form) == task.predict([form])[0] == expected[0]["label"]
        torch.testing.assert_close(task.scores(form), task.scores([form])[0])
    pixel_values = processor([image], return_tensors="pt")["pixel_values"]
    assert_same_answer(task(pixel_values[0]), expected)
    assert task.predict(pixel_values[0]) == expected[0]["label"]
    (answer,) = task(pixel_values)
    assert_same_answer(answer, expected)
    assert task.predict(pixel_values) == [expected[0]["label"]]


def test_batch_size_does_not_matter(one_shot):
    task, images = one_shot
    expected = task.scores(images)
    for batch_size in (1, 2, 3):
        torch.testing.assert_close(task.scores(images, batch_size=batch_size), expected, rtol=1e-5, atol=1e-6)
    assert task.predict(iter(images), batch_size=2) == task.predict(images)


def test_no_images(task):
    assert task.scores([]).shape == (0, 3)
    assert task([]) == []
    assert task.predict([]) == []
    assert task.scores(torch.empty(0, 3, 28, 28)).shape == (0, 3)


def test_repr_says_what_the_task_is(backbone, adapter, support):
    task = adapter.adapt(backbone, support)
    n_parameters = sum(tensor.numel() for tensor in task.space.to_tensors(task.theta).values())
    beginning = (
        f"<AdaptedTask: 3 classes ['red', 'green', 'blue'], a BEFT adapter of {n_parameters:,} parameters for the "
    )
    assert repr(task) == beginning + "Dinov2Model, ready>"
    backbone.config._name_or_path = "facebook/dinov2-small"
    task.merge()
    assert repr(task) == beginning + "Dinov2Model facebook/dinov2-small, merged into the backbone>"
    task.reset()
    assert repr(task).endswith("facebook/dinov2-small, reset, to be used no more>")
    many = adapter.adapt(backbone, {f"{'long ' * 20}{i}": [picture(i)] for i in range(40)})
    assert "40 classes" in repr(many)
    assert len(repr(many)) < 500


def test_support_images_are_recognised(one_shot):
    task, images = one_shot
    assert task.predict(images) == task.class_names


def test_an_unreadable_image_is_named(task, tmp_path):
    (tmp_path / "cut.png").write_bytes(b"rubbish")
    with pytest.raises(ImageError, match=r"cut\.png cannot be read"):
        task([picture(0), tmp_path / "cut.png"])
    with pytest.raises(ImageError, match="image 3 cannot be read"):
        task([*(picture(i) for i in range(3)), b"rubbish"], batch_size=2)


def test_images_without_a_processor(backbone, pixels):
    adapter = tiny_adapter(backbone, processor=None)
    task = adapter.adapt(backbone, (pixels[:4], torch.tensor([0, 0, 1, 1])))
    assert len(task(pixels)) == 5
    with pytest.raises(ValueError, match="no image processor: give a tensor of pixel values"):
        task(picture(0))


def test_a_backbone_in_training_mode_predicts_as_in_evaluation_and_stays_in_training(support, pixels):
    backbone = tiny_dinov2(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5, drop_path_rate=0.5)
    adapter = tiny_adapter(backbone)
    expected = adapter.adapt(backbone, support).logits(pixels)
    backbone.train()
    task = adapter.adapt(backbone, support)
    assert backbone.training
    assert all(module.training for module in backbone.modules())
    torch.testing.assert_close(task.logits(pixels), expected)
    task.logits(pixels)
    assert all(module.training for module in backbone.modules())


# Reset


@pytest.mark.parametrize("make", BACKBONES.values(), ids=BACKBONES)
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("used", ["not at all", "predicted", "saved", "stopped early"])
def test_reset_restores_the_backbone_bit_for_bit(make, kind, used, support, pixels, tmp_path):
    backbone = make().train()
    backbone.get_submodule("layernorm").eval()
    backbone.get_submodule("embeddings").requires_grad_(False)
    adapter = tiny_adapter(backbone, CONFIGS[kind](backbone))
    before = Snapshot(backbone)
    task = adapter.adapt(backbone, support, early_stopping=used == "stopped early")
    if used == "predicted":
        task.logits(pixels)
    if used == "saved":
        task.save_pretrained(tmp_path / "task")
        if kind.startswith("biases"):
            task.save_pretrained(tmp_path / "lora", format="lora")
    task.reset()
    before.assert_unchanged()


def test_use_after_reset(task, backbone, pixels, tmp_path):
    task.logits(pixels)
    task.reset()
    before = Snapshot(backbone)
    task.reset()
    for use in (lambda: task.logits(pixels), task.merge, lambda: task.save_pretrained(tmp_path / "task")):
        with pytest.raises(RuntimeError, match="this task was reset and its backbone restored: adapt again"):
            use()
    with pytest.raises(RuntimeError, match="this task was reset"):
        task.save_pretrained(tmp_path / "task", format="lora")
    before.assert_unchanged()
    assert not (tmp_path / "task").exists()


def test_reset_before_first_use(task, pixels):
    task.reset()
    with pytest.raises(RuntimeError, match="this task was reset"):
        _ = task.prototypes


# Several tasks on a backbone


@pytest.mark.parametrize("make", BACKBONES.values(), ids=BACKBONES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_two_tasks_share_a_backbone(make, kind, pixels):
    """Each predicts as if it were alone, in any order, also after the other is over."""
    backbone, alone = make(), []
    adapter = tiny_adapter(backbone, CONFIGS[kind](backbone))
    before = Snapshot(backbone)
    supports = [pictures(3, 2, seed=1), pictures(2, 3, seed=2)]
    for support in supports:
        task = adapter.adapt(backbone, support)
        alone.append((task.logits(pixels), task.prototypes.clone()))
        task.reset()
    assert (alone[0][1][:2] - alone[1][1]).abs().max() > 1e-2
    tasks = [adapter.adapt(backbone, support) for support in supports]
    for i in (1, 0, 0, 1, 0):
        torch.testing.assert_close(tasks[i].prototypes, alone[i][1])
        torch.testing.assert_close(tasks[i].logits(pixels), alone[i][0])
    tasks[0].reset()
    before.assert_unchanged()
    torch.testing.assert_close(tasks[1].logits(pixels), alone[1][0])
    tasks[1].reset()
    before.assert_unchanged()


def test_tasks_of_two_adapters_share_a_backbone(backbone, support, pixels):
    adapters = [tiny_adapter(backbone), tiny_adapter(backbone, lora_config(backbone, 1), last_blocks=1)]
    before, alone = Snapshot(backbone), []
    for adapter in adapters:
        task = adapter.adapt(backbone, support)
        alone.append(task.logits(pixels))
        task.reset()
    tasks = [adapter.adapt(backbone, support) for adapter in adapters]
    for i in (0, 1, 1, 0):
        torch.testing.assert_close(tasks[i].logits(pixels), alone[i])
    for task in tasks:
        task.reset()
        before.assert_unchanged()


def test_a_task_with_its_own_encoder_shares_a_backbone(backbone, support, pixels):
    """Its prototypes are computed late, when another task's weights may be in the backbone."""
    adapter = tiny_adapter(backbone, encoder=tiny_resnet())
    alone = adapter.adapt(backbone, support)
    expected = alone.logits(pixels)
    alone.reset()
    late, other = adapter.adapt(backbone, support), adapter.adapt(backbone, pictures(seed=4))
    other.logits(pixels)
    torch.testing.assert_close(late.logits(pixels), expected)


# Merge


@pytest.mark.parametrize("make", BACKBONES.values(), ids=BACKBONES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_merge_and_reset(make, kind, support, pixels):
    backbone = make().train()
    adapter = tiny_adapter(backbone, CONFIGS[kind](backbone))
    names = list(backbone.state_dict())
    before = Snapshot(backbone)
    task = adapter.adapt(backbone, support)
    expected = task.logits(pixels)
    merged = task.merge()
    assert merged is backbone
    assert list(merged.state_dict()) == names
    torch.testing.assert_close(task.logits(pixels), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        features = copy.deepcopy(merged).eval()(pixels).last_hidden_state[:, 0]
    by_hand = task.scale * F.normalize(features, dim=-1) @ task.prototypes.T
    torch.testing.assert_close(by_hand, expected, rtol=1e-4, atol=1e-4)
    task.reset()
    before.assert_unchanged()


def test_nothing_else_may_use_a_merged_backbone(adapter, backbone, support, pixels, tmp_path):
    before = Snapshot(backbone)
    other = adapter.adapt(backbone, pictures(seed=2))
    expected = other.logits(pixels)
    task = adapter.adapt(backbone, support)
    adapted = task.logits(pixels)
    task.merge()
    uses = (lambda: other.logits(pixels), lambda: adapter.adapt(backbone, support), other.reset)
    for use in uses:
        with pytest.raises(IncompatibleBackboneError, match="a task is merged into this Dinov2Model: reset that task"):
            use()
    for format_ in (None, "lora"):
        with pytest.raises(RuntimeError, match="this task is merged into its backbone: reset it"):
            task.save_pretrained(tmp_path / "task", format=format_)
    torch.testing.assert_close(task.logits(pixels), adapted, rtol=1e-4, atol=1e-4)
    task.reset()
    before.assert_unchanged()
    torch.testing.assert_close(other.logits(pixels), expected)
    other.reset()
    before.assert_unchanged()


def test_a_bias_for_a_layer_without_one_cannot_be_merged(support, pixels):
    backbone = tiny_vit(qkv_bias=False)
    adapter = tiny_adapter(backbone, BeftConfig(target_modules=["layers.3.attention.q_proj"]))
    before = Snapshot(backbone)
    task = adapter.adapt(backbone, support)
    task.logits(pixels)
    with pytest.raises(IncompatibleBackboneError, match="PEFT cannot merge this adapter"):
        task.merge()
    before.assert_unchanged()
    task.logits(pixels)  # the task goes on
    task.reset()
    before.assert_unchanged()


# Saving, and loading with PEFT alone


@pytest.mark.parametrize("make", BACKBONES.values(), ids=BACKBONES)
@pytest.mark.parametrize(("kind", "format_"), SAVED)
def test_plain_peft_computes_the_same(make, kind, format_, support, pixels, tmp_path):
    backbone = make()
    adapter = tiny_adapter(backbone, CONFIGS[kind](backbone))
    task = adapter.adapt(backbone, support)
    expected = task.logits(pixels)
    task.save_pretrained(tmp_path, format=format_)
    torch.testing.assert_close(task.logits(pixels), expected, rtol=1e-6, atol=1e-6)  # saving changes nothing
    task.reset()
    if format_ == "lora":
        assert isinstance(PeftConfig.from_pretrained(tmp_path), LoraConfig)
    plain = PeftModel.from_pretrained(make(), tmp_path).eval()
    saved = load_file(tmp_path / "prototypes.safetensors")
    with torch.no_grad():
        features = plain(pixels).last_hidden_state[:, 0]
    logits = saved["scale"] * F.normalize(features, dim=-1) @ saved["prototypes"].T
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", BACKBONES.values(), ids=BACKBONES)
def test_a_task_with_intermediate_features_is_saved_loaded_and_computed_by_plain_peft(make, support, pixels, tmp_path):
    """Images are compared by the last block and by the frozen ones before, which transformers shows as well."""
    backbone = make()
    adapter = tiny_adapter(backbone, intermediate_weight=0.5, lda=True)
    adapter.head.set_prior(torch.diag(torch.linspace(0.1, 2, 64)), spread=2.0, count=3.0)
    adapter.save_pretrained(tmp_path / "adapter")
    task = type(adapter).from_pretrained(tmp_path / "adapter").adapt(backbone, support)
    expected = task.logits(pixels)
    assert task.prototypes.shape == (len(support), 64)
    task.save_pretrained(tmp_path / "task")
    task.reset()
    torch.testing.assert_close(AdaptedTask.from_pretrained(tmp_path / "task", make()).logits(pixels), expected)
    card = (tmp_path / "task" / "README.md").read_text()
    assert "all tokens but the first of `hidden_states[2]`, brought to 0.5 of its length" in card
    plain = PeftModel.from_pretrained(make(), tmp_path / "task").eval()
    saved = load_file(tmp_path / "task" / "prototypes.safetensors")
    with torch.no_grad():
        output = plain(pixels, output_hidden_states=True)
    middle = output.hidden_states[2][:, 1:].mean(1)
    halves = [F.normalize(output.last_hidden_state[:, 0], dim=-1), 0.5 * F.normalize(middle, dim=-1)]
    logits = saved["scale"] * F.normalize(torch.cat(halves, dim=-1), dim=-1) @ saved["prototypes"].T
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_peft_alone_in_another_process(task, pixels, tmp_path):
    expected = task.logits(pixels)
    task.save_pretrained(tmp_path / "task")
    task.reset()
    task.backbone.save_pretrained(tmp_path / "backbone")
    save_file({"pixels": pixels}, tmp_path / "pixels.safetensors")
    code = """
import json, sys
from pathlib import Path
import torch, torch.nn.functional as F
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel
folder = Path(sys.argv[1])
model = PeftModel.from_pretrained(AutoModel.from_pretrained(folder / "backbone"), folder / "task").eval()
saved = load_file(folder / "task" / "prototypes.safetensors")
with torch.no_grad():
    features = model(load_file(folder / "pixels.safetensors")["pixels"]).last_hidden_state[:, 0]
assert "hf_hyperflow" not in sys.modules
print(json.dumps((saved["scale"] * F.normalize(features) @ saved["prototypes"].T).tolist()))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    torch.testing.assert_close(torch.tensor(json.loads(found.stdout.splitlines()[-1])), expected, rtol=1e-4, atol=1e-4)


def test_layernorms_cannot_be_written_as_lora(backbone, support, tmp_path):
    task = tiny_adapter(backbone, layernorm_config(backbone, 2)).adapt(backbone, support)
    with pytest.raises(ValueError, match="a LN_TUNING adapter cannot be written as LoRA: save it without format"):
        task.save_pretrained(tmp_path / "task", format="lora")
    with pytest.raises(ValueError, match="unknown format 'onnx': use 'lora' or None"):
        task.save_pretrained(tmp_path / "task", format="onnx")
    assert not list(tmp_path.iterdir())


def test_what_is_saved(saved, task):
    assert {p.name for p in saved.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "checksums.json",
        "preprocessor_config.json",
        "prototypes.safetensors",
        "README.md",
    }
    assert same_bits(load_file(saved / "prototypes.safetensors")["prototypes"], task.prototypes)


def test_saving_does_not_disturb_another_task(adapter, backbone, task, pixels, tmp_path):
    other = adapter.adapt(backbone, pictures(seed=5))
    expected = other.logits(pixels)
    task.save_pretrained(tmp_path / "a")
    task.save_pretrained(tmp_path / "b", format="lora")
    torch.testing.assert_close(other.logits(pixels), expected)


def test_a_folder_that_cannot_be_written(task, backbone, pixels, tmp_path):
    expected = task.logits(pixels)
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/self/task-of-mine")):
        with pytest.raises(CheckpointError, match=f"cannot write to {folder}"):
            task.save_pretrained(folder)
    assert read_folder(tmp_path) == {"file": b"mine"}
    torch.testing.assert_close(task.logits(pixels), expected)


# Loading with hf_hyperflow


@pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize("make", BACKBONES.values(), ids=BACKBONES)
@pytest.mark.parametrize(("kind", "format_"), SAVED)
def test_from_pretrained(make, kind, format_, support, pixels, tmp_path):
    backbone = make()
    adapter = tiny_adapter(backbone, CONFIGS[kind](backbone))
    task = adapter.adapt(backbone, support)
    expected = task.logits(pixels)
    task.save_pretrained(tmp_path, format=format_)
    other = make().train()
    before = Snapshot(other)
    again = AdaptedTask.from_pretrained(tmp_path, other)
    assert again.class_names == task.class_names
    assert again.processor.to_dict() == task.processor.to_dict()
    torch.testing.assert_close(again.logits(pixels), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again.scores([picture(0)]), task.scores([picture(0)]), rtol=1e-4, atol=1e-4)
    assert other.training
    again.reset()
    before.assert_unchanged()


def test_a_loaded_task_can_be_saved_merged_and_shares_a_backbone(adapter, backbone, task, saved, pixels, tmp_path):
    before_logits = task.logits(pixels)
    loaded = AdaptedTask.from_pretrained(saved, backbone)
    other = adapter.adapt(backbone, pictures(seed=3))
    other.logits(pixels)
    torch.testing.assert_close(loaded.logits(pixels), before_logits)
    loaded.save_pretrained(tmp_path / "again")
    first, second = (load_file(f / "adapter_model.safetensors") for f in (saved, tmp_path / "again"))
    assert all(same_bits(first[name], second[name]) for name in first | second)
    loaded.merge()
    torch.testing.assert_close(loaded.logits(pixels), before_logits, rtol=1e-4, atol=1e-4)
    loaded.reset()
    torch.testing.assert_close(task.logits(pixels), before_logits)


def test_labels_of_any_language(adapter, backbone, tmp_path):
    names = ["søløve", "猫", 'a "quoted" one', "🦊\u200d"]
    support = dict(zip(names, pictures(4).values(), strict=True))
    adapter.adapt(backbone, support).save_pretrained(tmp_path)
    assert AdaptedTask.from_pretrained(tmp_path, backbone).class_names == names


@pytest.mark.parametrize("name", ["", " ", "new\nline", "\x1b[2J", "\u2028", "\ud800", "x" * 1001])
def test_class_names_that_cannot_be_shown(adapter, backbone, name):
    support = dict(zip(["cat", name], pictures(2).values(), strict=True))
    with pytest.raises(SupportSetError, match=r"the class name .* Rename the class"):
        adapter.adapt(backbone, support)


def test_class_names_that_read_alike(adapter, backbone):
    support = dict(zip([1, "1"], pictures(2).values(), strict=True))
    with pytest.raises(SupportSetError, match="two classes are called '1'"):
        adapter.adapt(backbone, support)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_dinov2(hidden_size=48), "does not fit this Dinov2Model"),
        (lambda: tiny_dinov2(num_hidden_layers=3), r"Dinov2Model has no modules encoder\.layer\.3"),
        (lambda: tiny_dinov2(num_hidden_layers=2), "starts at block 2, but Dinov2Model has 2 blocks"),
        (tiny_vit, r"ViTModel has no modules encoder\.layer"),
        (tiny_resnet, "starts at block 2, but ResNetModel has 2 blocks"),
    ],
    ids=["width", "depth", "few blocks", "another model", "no transformer"],
)
def test_another_backbone(saved, make, message):
    other = make()
    before = Snapshot(other)
    with pytest.raises(IncompatibleBackboneError, match=message):
        AdaptedTask.from_pretrained(saved, other)
    before.assert_unchanged()


def rewritten(saved: Path, **changes: torch.Tensor | None) -> str:
    """Change tensors of the adapter whose name ends so, note the new digest; gives the full name of the last."""
    path = saved / "adapter_model.safetensors"
    state, found = load_file(path), ""
    for end, tensor in changes.items():
        found = next((name for name in state if name.endswith(end)), end)
        if tensor is None:
            del state[found]
        else:
            state[found] = tensor
    save_file(state, path)
    digests = json.loads((saved / "checksums.json").read_text())
    digests[path.name] = sha256(path)
    (saved / "checksums.json").write_text(json.dumps(digests))
    return found


@pytest.mark.parametrize("end", ["beft_bias", "norm1.weight"])
def test_missing_tensors_are_not_taken_as_zeros(backbone, saved, end):
    name = rewritten(saved, **{end: None})
    before = Snapshot(tiny_dinov2())
    other = before.model
    with pytest.raises(IncompatibleBackboneError, match=f"does not fit this Dinov2Model.*{end}"):
        AdaptedTask.from_pretrained(saved, other)
    assert name.endswith(end)
    before.assert_unchanged()


@pytest.mark.parametrize("change", [{"norm9.weight": torch.zeros(32)}, {"norm1.weight": torch.zeros(7)}])
def test_unknown_tensors_and_other_shapes(saved, change):
    rewritten(saved, **change)
    other = tiny_dinov2()
    before = Snapshot(other)
    with pytest.raises(IncompatibleBackboneError, match="does not fit this Dinov2Model"):
        AdaptedTask.from_pretrained(saved, other)
    before.assert_unchanged()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "prototypes.safetensors"])
def test_damaged_weights(backbone, saved, task, name):
    task.reset()
    before = Snapshot(backbone)
    whole = (saved / name).read_bytes()
    for damaged in (whole[: len(whole) // 2], flip_bit(whole, len(whole) - 1, 4)):  # more in tests/robustness
        (saved / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{saved / name} is damaged or incomplete"):
            AdaptedTask.from_pretrained(saved, backbone)
        before.assert_unchanged()


@pytest.mark.parametrize(
    "name",
    ["adapter_config.json", "adapter_model.safetensors", "checksums.json", "prototypes.safetensors"],
)
def test_missing_files(backbone, saved, task, name):
    task.reset()
    before = Snapshot(backbone)
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=f"{saved}"):
        AdaptedTask.from_pretrained(saved, backbone)
    before.assert_unchanged()


@pytest.mark.parametrize("name", ["adapter_config.json", "checksums.json", "preprocessor_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}"])
def test_broken_json(backbone, saved, task, name, text):
    task.reset()
    digests = json.loads((saved / "checksums.json").read_text())
    weights = {key: digest for key, digest in digests.items() if key.endswith(".safetensors")}
    (saved / "checksums.json").write_text(json.dumps(weights))  # as in version 0.1, so that the file itself is read
    before = Snapshot(backbone)
    (saved / name).write_text(text)
    with pytest.raises(CheckpointError, match=f"{saved}"):
        AdaptedTask.from_pretrained(saved, backbone)
    before.assert_unchanged()


@pytest.mark.parametrize("metadata", [None, {}, {"labels": "[", "start": "2", "pooling": "cls"}])  # more in robustness
def test_prototypes_without_labels(backbone, saved, metadata):
    path = saved / "prototypes.safetensors"
    save_file(load_file(path), path, metadata)
    digests = json.loads((saved / "checksums.json").read_text())
    (saved / "checksums.json").write_text(json.dumps(digests | {path.name: sha256(path)}))
    with pytest.raises(CheckpointError, match=f"{path}: (start is missing; allowed is|labels is damaged)"):
        AdaptedTask.from_pretrained(saved, backbone)


def test_a_task_saved_with_class_means_classifies_as_it_did(backbone, saved, pixels):
    """As tasks were saved before prototypes could be of another length than 1."""
    expected = AdaptedTask.from_pretrained(saved, backbone).logits(pixels)
    path = saved / "prototypes.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    del metadata["prototypes"], metadata["intermediate_weight"]
    tensors = load_file(path)
    save_file(tensors | {"prototypes": 3 * tensors["prototypes"]}, path, metadata)
    digests = json.loads((saved / "checksums.json").read_text())
    (saved / "checksums.json").write_text(json.dumps(digests | {path.name: sha256(path)}))
    torch.testing.assert_close(AdaptedTask.from_pretrained(saved, backbone).logits(pixels), expected)


def test_no_task_there(backbone, tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path} holds no readable HyperFlow task"):
        AdaptedTask.from_pretrained(tmp_path, backbone)


def test_an_adapter_is_no_task(adapter, backbone, tmp_path):
    adapter.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"{tmp_path} holds no readable HyperFlow task"):
        AdaptedTask.from_pretrained(tmp_path, backbone)
