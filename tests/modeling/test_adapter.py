from __future__ import annotations

import inspect
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, Image
from safetensors.torch import load_file, save_file
from torch.autograd.graph import saved_tensors_hooks

from hf_hyperflow import (
    CheckpointError,
    HyperFlowAdapter,
    HyperFlowConfig,
    ImageError,
    IncompatibleBackboneError,
    SupportSetError,
)
from hf_hyperflow.modeling import flow as flow_module
from hf_hyperflow.modeling.backbones import SplitBackbone
from hf_hyperflow.modeling.checksums import sha256
from hf_hyperflow.modeling.fingerprint import compute_fingerprint
from hf_hyperflow.modeling.peft_configs import bias_config, layernorm_config, lora_config
from hf_hyperflow.modeling.prototypes import PrototypeClassifier, unit_means
from hf_hyperflow.modeling.solvers import ADAPTIVE, TABLEAUX
from hf_hyperflow.modeling.stopping import StoppingPoint
from hf_hyperflow.modeling.support import read_support
from tests.helpers.files import flip_bit, forget_digests, read_folder
from tests.helpers.tiny import (
    SIZE,
    Snapshot,
    pictures,
    same_bits,
    tiny_adapter,
    tiny_dinov2,
    tiny_processor,
    tiny_resnet,
    tiny_vit,
)

SIZES = {"drift_width": 16, "drift_depth": 1, "drift_heads": 2}


def separate(backbone, **arguments) -> HyperFlowAdapter:
    return tiny_adapter(backbone, encoder=tiny_resnet(), **arguments)


def assert_same_weights(a: torch.Tensor, b: torch.Tensor) -> None:
    """But for the last bit: kernels add up differently where tensors lie differently in memory."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# A new adapter


@pytest.mark.parametrize("encoder", [None, tiny_resnet, lambda: tiny_vit(seed=5)], ids=["shared", "resnet", "vit"])
def test_from_backbone_describes_the_backbone_and_leaves_it(backbone, encoder):
    backbone.train()
    before = Snapshot(backbone)
    encoder = encoder and encoder()
    adapter = HyperFlowAdapter.from_backbone(
        backbone, bias_config(backbone, 2), last_blocks=2, processor=tiny_processor(), encoder=encoder, **SIZES
    )
    before.assert_unchanged()
    described = adapter.config.backbone
    assert (described["model_type"], described["hidden_size"], described["num_blocks"]) == ("dinov2", 32, 4)
    assert described["fingerprint"] == compute_fingerprint(backbone)
    assert adapter.config.tensor_names == adapter.space.names
    if encoder is not None:
        theirs = adapter.encoder.state_dict()
        assert all(same_bits(theirs[name], tensor) for name, tensor in encoder.state_dict().items())


def test_an_untrained_adapter_is_direct_transfer(backbone, support, processor, pixels):
    adapter = HyperFlowAdapter.from_backbone(
        backbone, bias_config(backbone, 2), last_blocks=2, processor=processor, **SIZES
    )
    data = read_support(support, processor)
    split = SplitBackbone(backbone, 0)
    with torch.no_grad():
        direct = PrototypeClassifier.from_support(split.forward_features(data.pixel_values), data.labels, 10.0)
        expected = direct(split.forward_features(pixels))
    torch.testing.assert_close(adapter.adapt(backbone, support).logits(pixels), expected, rtol=1e-4, atol=1e-4)


def test_targets_outside_the_last_blocks(backbone):
    with pytest.raises(IncompatibleBackboneError, match=r"encoder\.layer\.2\..* is not in the last 1 blocks: raise"):
        HyperFlowAdapter.from_backbone(backbone, bias_config(backbone, 2), last_blocks=1, **SIZES)


# Adapting

CONFIGS = {
    "biases": (lambda b: bias_config(b, 2, norms=False), ()),
    "biases and norms": (lambda b: bias_config(b, 2), ()),
    "lora": (lambda b: lora_config(b, 2), ()),
    "lora, A frozen": (lambda b: lora_config(b, 2), ("lora_A",)),
    "layernorms": (lambda b: layernorm_config(b, 2), ()),
}


@pytest.mark.parametrize("reduced", [None, SIZE // 2], ids=["as in training", "smaller"])
@pytest.mark.parametrize("encoder", [None, tiny_resnet], ids=["shared", "separate"])
def test_larger_images_condition_the_flow_at_the_size_it_was_trained_at(backbone, encoder, reduced):
    """It has seen no larger ones; prototypes are those of the images as they are."""
    sizes = {"image_size": [SIZE, SIZE], "reduced_size": reduced and [reduced, reduced]}
    adapter = tiny_adapter(backbone, encoder=encoder and encoder(), **sizes)
    plain = tiny_adapter(backbone, encoder=encoder and encoder())
    large = torch.randn(6, 3, 2 * SIZE, 2 * SIZE, generator=torch.Generator().manual_seed(1))
    height = reduced or SIZE
    small = F.interpolate(large, size=(height, height), mode="bicubic", antialias=True)
    labels = torch.arange(3).repeat_interleave(2)
    seen = []
    handle = backbone.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[-2:])))
    task = adapter.adapt(backbone, (large, labels))
    assert set(seen) <= {(height, height)}  # a shared encoder's; a separate one runs no target
    handle.remove()
    assert_same_weights(task.theta, plain.adapt(backbone, (small, labels)).theta)
    assert (task.theta - plain.adapt(backbone, (large, labels)).theta).abs().max() > 1e-4
    with torch.no_grad(), adapter.space.inject(backbone).using(task.theta):
        features = SplitBackbone(backbone, 0).forward_features(large)
    torch.testing.assert_close(task.prototypes, unit_means(features, labels), rtol=1e-4, atol=1e-5)
    for pixels in (small, large[..., :SIZE, :14]):  # what is no larger is taken as it is
        assert_same_weights(
            adapter.adapt(backbone, (pixels, labels)).theta, plain.adapt(backbone, (pixels, labels)).theta
        )
    stopped = adapter.adapt(backbone, (large, labels), early_stopping=True)
    assert stopped.stopping_point.accuracies


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("make", [tiny_dinov2, tiny_vit])
def test_adapt_moves_what_it_says(make, kind, support, pixels):
    backbone = make()
    config, frozen = CONFIGS[kind]
    adapter = tiny_adapter(backbone, config(backbone), frozen_tensors=frozen)
    before = Snapshot(backbone)
    with torch.no_grad():
        plain = backbone(pixels).last_hidden_state
    task = adapter.adapt(backbone, support)
    assert task.theta.shape == (adapter.space.n_tokens, 32)
    assert task.logits(pixels).shape == (5, 3)
    with torch.no_grad():
        assert (backbone(pixels).last_hidden_state - plain).abs().max() > 1e-2
    task.reset()
    before.assert_unchanged()


@pytest.mark.parametrize("solver", [*TABLEAUX, *ADAPTIVE])
def test_every_solver_goes_to_the_same_place(adapter, backbone, support, solver):
    if solver in ADAPTIVE:
        pytest.importorskip("torchdiffeq")
    fine = adapter.adapt(backbone, support, solver="rk4", n_steps=50)
    steps = 200 if solver == "euler" else 20
    task = adapter.adapt(backbone, support, solver=solver, n_steps=steps)
    moved = (fine.theta - adapter.adapt(backbone, support, n_steps=1).theta).abs().max()
    assert (task.theta - fine.theta).abs().max() < 0.1 * moved
    if solver in TABLEAUX:
        assert task.nfe == steps * {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}[solver]
    else:
        assert task.nfe > 10


@pytest.mark.parametrize("early_stopping", [False, True])
def test_without_steps_the_head_alone_classifies(backbone, support, pixels, early_stopping):
    adapter = tiny_adapter(backbone, lda=True)
    plain = backbone(read_support(support, adapter.processor).pixel_values).last_hidden_state[:, 0]
    expected = adapter.head(plain, torch.arange(3).repeat_interleave(2))
    task = adapter.adapt(backbone, support, n_steps=0, early_stopping=early_stopping)
    torch.testing.assert_close(task.prototypes, expected, rtol=1e-4, atol=1e-5)
    assert (task.nfe, task.stopping_point.time) == (0, 0.0)
    moved = adapter.adapt(backbone, support)
    assert (moved.prototypes - task.prototypes).abs().max() > 1e-2


def test_steps_and_solver_of_the_config_are_the_default(backbone, support):
    adapter = tiny_adapter(backbone, n_steps=3, solver="heun")
    task = adapter.adapt(backbone, support)
    assert task.nfe == 6
    assert_same_weights(task.theta, adapter.adapt(backbone, support, n_steps=3, solver="heun").theta)
    assert task.stopping_point.time == 1.0
    assert task.stopping_point.accuracies == {}


def test_all_forms_of_a_support_set_give_the_same_weights(adapter, backbone, tmp_path):
    support = dict(sorted(pictures().items()))
    for name, images in support.items():
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            image.save(tmp_path / name / f"{i}.png")
    features = Features({"image": Image(), "label": ClassLabel(names=list(support))})
    rows = {"image": [i for images in support.values() for i in images], "label": [0, 0, 1, 1, 2, 2]}
    data = read_support(support, adapter.processor)
    expected = adapter.adapt(backbone, support)
    for form in (tmp_path, Dataset.from_dict(rows, features=features), data):
        task = adapter.adapt(backbone, form)
        assert_same_weights(task.theta, expected.theta)
        assert task.class_names == ["blue", "green", "red"]
    task = adapter.adapt(backbone, (data.pixel_values, data.labels))
    assert_same_weights(task.theta, expected.theta)
    assert task.class_names == ["0", "1", "2"]


def test_order_of_classes_and_images_does_not_matter(adapter, backbone, pixels):
    support = pictures(n_way=4, n_shot=3)
    shuffled = {name: support[name][::-1] for name in ("blue", "red", "yellow", "green")}
    first, second = adapter.adapt(backbone, support), adapter.adapt(backbone, shuffled)
    torch.testing.assert_close(first.theta, second.theta, rtol=1e-4, atol=1e-5)
    order = [second.class_names.index(name) for name in first.class_names]
    torch.testing.assert_close(first.scores(pixels), second.scores(pixels)[:, order], rtol=1e-3, atol=1e-4)


def test_other_support_sets_give_other_weights(adapter, backbone):
    thetas = [adapter.adapt(backbone, pictures(seed=seed)).theta for seed in range(2)]
    assert (thetas[0] - thetas[1]).abs().max() > 1e-3


def test_one_shot_and_unbalanced_shots(adapter, backbone, pixels):
    support = pictures(3, 4)
    for shots in ((1, 1, 1), (4, 1, 2)):
        part = {name: images[:k] for (name, images), k in zip(support.items(), shots, strict=True)}
        scores = adapter.adapt(backbone, part).scores(pixels)
        assert scores.isfinite().all()
        torch.testing.assert_close(scores.sum(-1), torch.ones(5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_backbone_in_another_precision(adapter, backbone, support, pixels, dtype):
    with torch.no_grad():
        expected = adapter.adapt(backbone, support)
        logits = expected.logits(pixels)
        expected.reset()
        backbone.to(dtype)
    before = Snapshot(backbone)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # the fingerprint is the same in any precision
        task = adapter.adapt(backbone, support)
    torch.testing.assert_close(task.logits(pixels).float(), logits, rtol=0.1, atol=0.6)
    task.reset()
    before.assert_unchanged()


def test_images_of_another_size_than_the_backbone_was_trained_at(adapter, backbone):
    pixel_values = torch.randn(4, 3, 42, 56)
    task = adapter.adapt(backbone, (pixel_values, torch.tensor([0, 0, 1, 1])))
    assert task.logits(pixel_values).shape == (4, 2)


# Nothing is differentiated, and the target is not run


@pytest.mark.parametrize("make", [tiny_adapter, separate], ids=["shared encoder", "own encoder"])
@pytest.mark.parametrize("early_stopping", [False, True])
def test_no_gradient_is_computed(backbone, support, pixels, make, early_stopping):
    adapter = make(backbone)
    for model in (adapter, backbone):
        model.requires_grad_(True)
    graph, calls = [], []

    def watch(module, args, output):
        calls.append(torch.is_grad_enabled())
        states = output if isinstance(output, torch.Tensor) else output[0]
        if isinstance(states, torch.Tensor) and (states.requires_grad or states.grad_fn is not None):
            graph.append(module)

    def packed(tensor):
        graph.append(tensor)
        return tensor

    parts = [adapter.drift, adapter.task_encoder, *adapter.drift.modules(), *backbone.modules()]
    handles = [m.register_forward_hook(watch) for m in {*parts, *(adapter.encoder or adapter).modules()}]
    with saved_tensors_hooks(packed, lambda tensor: tensor):
        task = adapter.adapt(backbone, support, early_stopping=early_stopping)
        n_calls = len(calls)
        scores = task.scores(pixels)
    for handle in handles:
        handle.remove()
    assert n_calls > 20
    assert len(calls) > n_calls
    assert not any(calls)
    assert graph == []
    assert not task.theta.requires_grad
    assert not task.prototypes.requires_grad
    assert not scores.requires_grad
    assert all(p.grad is None for model in (adapter, backbone) for p in model.parameters())


def count_runs(backbone) -> list:
    """Grows with every forward pass of the backbone or of one of its parts that comes to its end."""
    ran = []
    for module in backbone.modules():
        module.register_forward_hook(lambda module, args, output: ran.append(type(module).__name__))
    return ran


def test_with_its_own_encoder_the_target_is_not_run(backbone, support, pixels):
    adapter = separate(backbone)
    ran = count_runs(backbone)
    task = adapter.adapt(backbone, support)
    assert ran == []
    assert task.prototypes.shape == (3, 32)
    once = ran.count("Dinov2Layer")
    assert once == 4
    _ = task.prototypes
    assert ran.count("Dinov2Layer") == once
    task.logits(pixels)
    assert ran.count("Dinov2Layer") == once + 4


def test_with_a_shared_encoder_only_the_first_blocks_are_run(adapter, backbone, support):
    ran = count_runs(backbone)
    task = adapter.adapt(backbone, support)
    assert ran.count("Dinov2Layer") == 2
    _ = task.prototypes
    assert ran.count("Dinov2Layer") == 4  # the first two were not run again


def test_early_stopping_runs_the_adapted_blocks_at_every_time(adapter, backbone, support):
    ran = count_runs(backbone)
    task = adapter.adapt(backbone, support, n_steps=3, early_stopping=True)
    assert ran.count("Dinov2Layer") == 2 + 2 * 4
    assert list(task.stopping_point.accuracies) == pytest.approx([0, 1 / 3, 2 / 3, 1])


@pytest.mark.parametrize("step", [0, 2])
def test_an_early_stop_has_the_weights_of_its_time(adapter, backbone, support, step, monkeypatch):
    images = read_support(support, adapter.processor)
    with torch.no_grad():
        tokens, _ = adapter.encode(adapter.split(backbone), images.pixel_values, images.labels)
        trajectory = adapter.flow(tokens, n_steps=3)
    point = StoppingPoint(trajectory.times[step], {trajectory.times[step]: 1.0})
    monkeypatch.setattr(flow_module, "choose_stopping_point", lambda *arguments: point)
    task = adapter.adapt(backbone, support, n_steps=3, early_stopping=True)
    assert task.stopping_point is point
    start = adapter.space.inject(backbone).start
    assert_same_weights(task.theta, start + adapter.token_scale * trajectory.states[step][0])


def test_an_early_stop_at_the_start_is_direct_transfer(adapter, backbone, pixels):
    """Classes that direct transfer tells apart without a mistake: nothing is better, and ties go to the start."""
    generator = torch.Generator().manual_seed(0)
    patterns = 3 * torch.randn(3, 3, SIZE, SIZE, generator=generator).repeat_interleave(4, dim=0)
    support = (patterns + 0.05 * torch.randn(patterns.shape, generator=generator), torch.arange(12) // 4)
    task = adapter.adapt(backbone, support, early_stopping=True)
    assert task.stopping_point.accuracies[0.0] == 1.0
    assert task.stopping_point.time == 0.0
    split = SplitBackbone(tiny_dinov2(), 0)
    mean = split.forward_features(support[0][:4]).mean(0)
    torch.testing.assert_close(task.prototypes[0], mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_the_support_encoder_stays_frozen_in_training(backbone, support):
    adapter = separate(backbone).train()
    assert adapter.drift.training
    statistics = {name: tensor.clone() for name, tensor in adapter.encoder.state_dict().items()}
    first, second = adapter.adapt(backbone, support), adapter.adapt(backbone, support)
    assert_same_weights(first.theta, second.theta)
    now = adapter.encoder.state_dict()
    assert all(same_bits(now[name], tensor) for name, tensor in statistics.items())
    assert not any(p.requires_grad for p in adapter.encoder.parameters())


@pytest.mark.parametrize("mode", [True, False])
def test_modes_stay(adapter, backbone, support, pixels, mode):
    backbone.train(mode)
    backbone.encoder.layer[1].train(not mode)
    before = Snapshot(backbone)
    task = adapter.adapt(backbone, support)
    task.logits(pixels)
    assert backbone.training is mode
    assert backbone.encoder.layer[1].training is not mode
    task.reset()
    before.assert_unchanged()


# What is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_dinov2(hidden_size=48), "hidden_size is 48, expected 32"),
        (lambda: tiny_dinov2(num_hidden_layers=5), "num_blocks is 5, expected 4"),
        (lambda: tiny_dinov2(48, 3), "hidden_size is 48, expected 32; num_blocks is 3, expected 4"),
        (tiny_vit, "has no modules encoder.layer"),
        (tiny_resnet, "ResNetModel"),
    ],
    ids=["width", "depth", "both", "another model", "no transformer"],
)
def test_another_backbone(adapter, support, make, message):
    other = make()
    before = Snapshot(other)
    with pytest.raises(IncompatibleBackboneError, match=message):
        adapter.adapt(other, support)
    before.assert_unchanged()


def test_another_width_of_the_mlp(adapter, support):
    other = tiny_dinov2(mlp_ratio=2)
    before = Snapshot(other)
    with pytest.raises(IncompatibleBackboneError, match=r"fc1\.beft_bias\.default: expected \(.*128.*\), found \(.*64"):
        adapter.adapt(other, support)
    before.assert_unchanged()


def test_other_weights_are_warned_of(adapter, backbone, support):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapter.adapt(backbone, support)
    message = "weights of this Dinov2Model are not those the adapter was trained for"
    for use in (adapter.adapt, adapter.direct_transfer):
        other = tiny_dinov2(seed=9)
        line = inspect.currentframe().f_lineno + 2
        with pytest.warns(UserWarning, match=message) as caught:
            use(other, support)
        (warning,) = caught
        assert (warning.filename, warning.lineno) == (__file__, line), "it points at whoever called"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n_steps": -1}, ValueError, "n_steps must be at least 1, not -1"),
        ({"solver": "leapfrog"}, ValueError, "unknown solver 'leapfrog'"),
    ],
)
def test_bad_arguments_leave_the_backbone_as_it_was(adapter, backbone, support, arguments, error, message):
    before = Snapshot(backbone)
    with pytest.raises(error, match=message):
        adapter.adapt(backbone, support, **arguments)
    before.assert_unchanged()


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"a": pictures()["red"]},
        {"a": pictures()["red"], "b": []},
        {"a": pictures()["red"], "b": [b"rubbish"]},
        (torch.full((2, 3, SIZE, SIZE), float("nan")), torch.tensor([0, 1])),
        (torch.zeros(2, 3, SIZE, SIZE), torch.tensor([0, -1])),
    ],
    ids=["empty", "one class", "empty class", "unreadable", "NaN", "label out of range"],
)
def test_bad_support_sets_leave_the_backbone_as_it_was(adapter, backbone, bad):
    before = Snapshot(backbone)
    with pytest.raises((SupportSetError, ImageError)):
        adapter.adapt(backbone, bad)
    before.assert_unchanged()


def test_images_too_small_for_the_backbone_leave_it_as_it_was(support):
    backbone = tiny_vit()
    adapter = tiny_adapter(backbone)
    before = Snapshot(backbone)
    with pytest.raises(ValueError, match="image size"):
        adapter.adapt(backbone, (torch.zeros(2, 3, 14, 14), torch.tensor([0, 1])))
    before.assert_unchanged()


def test_a_failed_adapt_keeps_the_tasks_there_are(adapter, backbone, support, pixels):
    task = adapter.adapt(backbone, support)
    logits = task.logits(pixels)
    with pytest.raises(ValueError, match="unknown solver"):
        adapter.adapt(backbone, pictures(seed=3), solver="leapfrog")
    torch.testing.assert_close(task.logits(pixels), logits)


def test_skip_bad(adapter, backbone, support, tmp_path):
    (tmp_path / "cut.png").write_bytes(b"rubbish")
    expected = adapter.adapt(backbone, support)
    support["red"].append(tmp_path / "cut.png")
    with pytest.raises(ImageError, match=r"cut\.png"):
        adapter.adapt(backbone, support)
    assert_same_weights(adapter.adapt(backbone, support, skip_bad=True).theta, expected.theta)


# Saving and loading


@pytest.fixture
def saved(adapter, tmp_path) -> Path:
    adapter.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("make", [tiny_adapter, separate], ids=["shared encoder", "own encoder"])
def test_save_and_load(backbone, support, pixels, tmp_path, make):
    adapter = make(backbone, n_steps=5, solver="midpoint")
    adapter.save_pretrained(tmp_path / "adapter")
    again = HyperFlowAdapter.from_pretrained(tmp_path / "adapter")
    # Beside the code, for trust_remote_code, that is in the package.
    assert {p.name for p in (tmp_path / "adapter").iterdir() if p.suffix != ".py"} == {
        "config.json",
        "model.safetensors",
        "model_checksums.json",
        "preprocessor_config.json",
        "README.md",
    }
    state = again.state_dict()
    assert all(same_bits(state[name], tensor) for name, tensor in adapter.state_dict().items())
    assert again.processor.to_dict() == adapter.processor.to_dict()
    assert (again.config.n_steps, again.config.solver) == (5, "midpoint")
    first, second = adapter.adapt(backbone, support), again.adapt(backbone, support)
    assert_same_weights(first.theta, second.theta)
    torch.testing.assert_close(first.logits(pixels), second.logits(pixels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_parameter_space_survives(backbone, support, tmp_path, kind):
    config, frozen = CONFIGS[kind]
    adapter = tiny_adapter(backbone, config(backbone), frozen_tensors=frozen, adapter_seed=7)
    adapter.save_pretrained(tmp_path)
    again = HyperFlowAdapter.from_pretrained(tmp_path)
    expected = adapter.adapt(backbone, support)
    frozen_a = {n: p.clone() for n, p in backbone.named_parameters() if "lora_A" in n}
    expected.reset()
    assert_same_weights(again.adapt(backbone, support).theta, expected.theta)
    assert all(torch.equal(dict(backbone.named_parameters())[n], tensor) for n, tensor in frozen_a.items())


def test_without_a_processor(backbone, support, tmp_path):
    adapter = tiny_adapter(backbone, processor=None)
    adapter.save_pretrained(tmp_path)
    again = HyperFlowAdapter.from_pretrained(tmp_path)
    assert again.processor is None
    with pytest.raises(SupportSetError, match="images need an image processor"):
        again.adapt(backbone, support)


@pytest.mark.parametrize("make", [tiny_adapter, separate], ids=["shared encoder", "own encoder"])
def test_half_precision_weights(backbone, support, pixels, tmp_path, make):
    adapter = make(backbone)
    expected = adapter.adapt(backbone, support).scores(pixels)
    adapter.half().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.float16}
    again = HyperFlowAdapter.from_pretrained(tmp_path)
    assert {t.dtype for t in again.state_dict().values() if t.is_floating_point()} == {torch.float32}
    assert all(torch.equal(again.state_dict()[name].half(), t.half()) for name, t in state.items() if t.ndim)
    torch.testing.assert_close(again.adapt(backbone, support).scores(pixels), expected, rtol=0.05, atol=0.02)


def test_saving_again_over_it(adapter, backbone, support, saved):
    (saved / "notes.txt").write_text("mine")
    with torch.no_grad():
        adapter.logit_scale.add_(1)
    adapter.save_pretrained(saved)
    assert HyperFlowAdapter.from_pretrained(saved).logit_scale == adapter.logit_scale
    assert (saved / "notes.txt").read_text() == "mine"


def test_a_file_in_place_of_the_folder(adapter, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match=r"cannot write to .*file"):
            adapter.save_pretrained(folder)
    assert read_folder(tmp_path) == {"file": b"mine"}


def test_a_folder_that_not_even_root_can_write(adapter):
    with pytest.raises(CheckpointError, match="cannot write to /proc/self/adapter"):
        adapter.save_pretrained("/proc/self/adapter")


# Damaged checkpoints


def test_no_checkpoint_there(tmp_path):
    with pytest.raises(CheckpointError, match=rf"{tmp_path}"):
        HyperFlowAdapter.from_pretrained(tmp_path)


def test_a_model_of_another_kind(backbone, tmp_path):
    backbone.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}.* does not describe a HyperFlow adapter"):
        HyperFlowAdapter.from_pretrained(tmp_path)


def test_no_weights(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors: the adapter is incomplete"):
        HyperFlowAdapter.from_pretrained(saved)


@pytest.mark.parametrize("keep", [0, 8, 0.5])
@pytest.mark.parametrize("noted", [True, False], ids=["digest", "no digest"])
def test_truncated_weights(saved, keep, noted):
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    if not noted:
        forget_digests(saved)
    with pytest.raises(CheckpointError, match=rf"{path} is damaged"):
        HyperFlowAdapter.from_pretrained(saved)


def test_a_flipped_bit(saved):
    """More of them are in tests/robustness."""
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    for position in (20, len(whole) - 1):
        path.write_bytes(flip_bit(whole, position, 1))
        with pytest.raises(CheckpointError, match=rf"{path} is damaged or incomplete"):
            HyperFlowAdapter.from_pretrained(saved)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_weights_that_do_not_fit_the_config(saved, change):
    path = saved / "model.safetensors"
    state = load_file(path)
    if change == "missing":
        del state["drift.position"]
    elif change == "unknown":
        state["extra"] = torch.zeros(3)
    else:
        state["drift.position"] = torch.zeros(2, 2)
    save_file(state, path, {"format": "pt"})
    forget_digests(saved)
    name = "extra" if change == "unknown" else r"drift\.position"
    with pytest.raises(CheckpointError, match=rf"{path} .*{name}"):
        HyperFlowAdapter.from_pretrained(saved)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '"hyperflow"', "{}", '{"model_type": "hyperflow"}', b"\xff\xfe\x00"],
    ids=["empty", "cut", "list", "null", "number", "string", "nothing in it", "bare", "binary"],
)
def test_a_broken_config(saved, text):
    forget_digests(saved)
    path = saved / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=rf"{saved}"):
        HyperFlowAdapter.from_pretrained(saved)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("backbone", None),
        ("backbone", {}),
        ("backbone", {"hidden_size": "wide"}),
        ("peft", {"peft_type": "NO_SUCH_THING"}),
        ("peft", {"target_modules": ["x"]}),
        ("peft", "BEFT"),
        ("peft", {"peft_type": "BEFT", "no_such_field": 1}),
        ("tensor_names", None),
        ("tensor_names", ["x"]),
        ("tensor_shapes", [[1], [2]]),
        ("tensor_shapes", [["a"]]),
        ("drift_width", 17),
        ("drift_width", -4),
        ("drift_width", "wide"),
        ("drift_heads", 3),
        ("drift_heads", 0),
        ("drift_depth", 1),
        ("encoder", {"model_type": "no_such_model"}),
        ("encoder", {}),
        ("last_blocks", "two"),
        ("image_size", 28),
        ("image_size", [28]),
        ("image_size", [28, 0]),
        ("image_size", ["28", "28"]),
        ("reduced_size", [28, 0]),
        ("reduced_size", [28, 28]),  # of an adapter that does not know the size of its training images
        ("learned_start", "yes"),
    ],
)
def test_a_config_with_wrong_values(saved, key, value):
    forget_digests(saved)
    config = json.loads((saved / "config.json").read_text())
    config[key] = value
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"{saved}"):
        HyperFlowAdapter.from_pretrained(saved)


def test_a_broken_preprocessor_config(saved):
    forget_digests(saved)
    (saved / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=rf"{saved}.*preprocessor_config\.json"):
        HyperFlowAdapter.from_pretrained(saved)


def test_a_config_object_goes_round_by_json(adapter, saved):
    config = HyperFlowConfig.from_pretrained(saved)
    assert config.weights_sha256 == sha256(saved / "model.safetensors")
    again = HyperFlowConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert HyperFlowAdapter(again).space.names == adapter.space.names


def test_a_moved_folder_loads(saved, tmp_path):
    shutil.move(saved, tmp_path / "elsewhere")
    HyperFlowAdapter.from_pretrained(str(tmp_path / "elsewhere"))
