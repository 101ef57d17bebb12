"""What a saved adapter or task says about itself is checked before anything is built from it.

More changes, drawn at random, are in `test_properties.py`.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftType, VeraConfig
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from hf_hyperflow import AdaptedTask, CheckpointError, HyperFlowAdapter, IncompatibleBackboneError
from hf_hyperflow.modeling.config_validation import ENCODERS
from hf_hyperflow.modeling.flow import _get_encoder_width
from hf_hyperflow.modeling.json_fields import MAX_JSON_BYTES
from hf_hyperflow.modeling.peft_configs import find_linear_paths
from hf_hyperflow.modeling.peft_validation import PEFT_CONFIGS
from tests.helpers.forgeries import Forgery, Prisoner, Saved
from tests.helpers.tiny import Snapshot, pictures, same_bits, tiny_adapter, tiny_dinov2

ADAPTER_CONFIGS = [
    ("views", 5, "from 1 to 4"),
    ("calibration", [1, 2], "an object"),
    ("calibration.spread", 1e9, "from -1000 to 1000"),
    ("rejection.more", 1, "rejection.more is 1; allowed is nothing"),
    ("rejection.odds", "0.5", "from -1000 to 1000"),
    ("backbone", "dinov2", "backbone is 'dinov2'; an object"),
    ("backbone.hidden_size", 0, "from 1 to 65536"),
    ("backbone.hidden_size", True, "from 1 to 65536"),
    ("backbone.hidden_size", 10**9, "from 1 to 65536"),
    ("backbone.num_blocks", 1.5, "from 1 to 1000"),
    ("backbone.name_or_path", ["x"], "a text of at most 1000"),
    ("backbone.name_or_path", "a\x1b[2J", "without control characters"),
    ("backbone.model_type", None, "a text of at most 1000"),
    ("backbone.fingerprint", [1.0], "a list of 4 numbers"),
    ("backbone.fingerprint", ["a"] * 4, "a list of 4 numbers"),
    ("last_blocks", 0, "from 1 to 4"),
    ("last_blocks", 5, "from 1 to 4"),
    ("pooling", "max", "one of 'cls', 'mean'"),
    ("pooling", ["cls"], "one of 'cls', 'mean'"),
    ("intermediate_weight", -0.1, "a number from 0 to 1000"),
    ("intermediate_weight", 1e300, "a number from 0 to 1000"),
    ("intermediate_weight", True, "a number from 0 to 1000"),
    ("tensor_names", ["x"] * 20, "different names"),
    ("tensor_names", [{}], "different names"),
    ("tensor_shapes", [[1]], "a list of 20 shapes"),
    ("tensor_shapes", [[0]] * 20, "positive whole numbers"),
    ("tensor_shapes", [[-4, -8]] * 20, "positive whole numbers"),
    ("tensor_shapes", [[2**20, 2**20]] * 20, "positive whole numbers"),
    ("frozen_tensors", [""], "different names"),
    ("frozen_tensors", "lora_A", "different names"),
    ("adapter_seed", -1, "a whole number from 0"),
    ("adapter_seed", 2**64, "a whole number from 0"),
    ("image_size", [28, 28, 28], "a list of 2 whole numbers"),
    ("image_size", [10**9, 10**9], "from 1 to 16384"),
    ("encoder", "resnet", "an object is expected"),
    ("encoder", {"model_type": "bert"}, "one of 'beit'"),
    ("encoder", {"model_type": "timm_wrapper", "architecture": "hf-hub:a/b"}, "one of 'beit'"),
    ("encoder", {"model_type": "vit", "num_hidden_layers": 10**6}, "numbers up to 200"),
    ("encoder", {"model_type": "vit", "hidden_size": 10**9}, "numbers up to 65536"),
    ("encoder", {"model_type": "resnet", "depths": [10**6] * 4}, "numbers up to 200"),
    ("encoder", {"model_type": "vit", "auto_map": {"AutoModel": "a--b.c"}}, "auto_map is .*; allowed is null"),
    ("encoder", {"model_type": "vit", "attn_implementation": "a/kernel"}, "allowed is null"),
    ("encoder", {"model_type": "vit", "quantization_config": {}}, "allowed is null"),
    ("encoder", {"model_type": "vit", "hidden_act": "x"}, "describes no adapter that can be built"),
    ("drift_width", 10**6, "from 2 to 4096"),
    ("drift_width", 15, "an even multiple of drift_heads=2"),
    ("drift_depth", 10**9, "from 1 to 64"),
    ("drift_heads", 0, "a whole number from 1"),
    ("lda", "true", "true or false"),
    ("n_steps", 0, "from 1 to 1000"),
    ("n_steps", 1001, "from 1 to 1000"),
    ("n_steps", 4.0, "from 1 to 1000"),
    ("solver", "adjoint", "one of 'euler', 'midpoint'"),
    ("weights_sha256", "0" * 63, "64 hexadecimal digits"),
    ("no_such_field", 1, "has a field 'no_such_field' that is not known"),
    ("quantization_config", {"quant_method": "bitsandbytes"}, "that is not known"),
    ("transformers_weights", "../other.safetensors", "that is not known"),
    ("_attn_implementation", "a/kernel", "that is not known"),
    ("peft", ["BEFT"], "an object is expected"),
]

#: Fields of a PEFT config, which an adapter and a task have in common.
PEFT_FIELDS = [
    ("peft_type", "beft", "one of 'BEFT', 'LORA', 'LN_TUNING', 'IA3'"),
    ("peft_type", None, "one of 'BEFT'"),
    ("target_modules", None, "different names"),
    ("target_modules", "all-linear", "different names"),
    ("target_modules", ["(a+)+$"], "different names"),
    ("target_modules", ["encoder..layer"], "different names"),
    ("target_modules", ["x" * 257], "different names"),
    ("target_modules", [f"x{i}" for i in range(10_001)], "different names"),
    ("target_modules", ["encoder.layer.2", "encoder.layer.2.mlp"], "lie side by side"),
    ("modules_to_save", ["encoder.layer.2.mlp.fc1"], "lie side by side"),
    ("modules_to_save", ["encoder"], "lie side by side"),
    ("modules_to_save", "layernorm", "different names"),
    ("init_weights", "yes", "true or false"),
    ("inference_mode", 1, "true or false"),
    ("task_type", "CAUSAL_LM", "one of 'FEATURE_EXTRACTION'"),
    ("auto_mapping", [1], "an object is expected"),
    ("base_model_name_or_path", "\x1b]0;", "without control characters"),
    ("revision", 7, "a text"),
    ("a_field_of_the_future", 1, "a_field_of_the_future is 1"),
]

LORA_FIELDS = [
    ("r", 0, "from 1 to 256"),
    ("r", 10**9, "from 1 to 256"),
    ("r", "8", "from 1 to 256"),
    ("lora_alpha", 0, "a number from"),
    ("lora_alpha", 1e300, "a number from"),
    ("lora_dropout", 1.0, "from 0 to 0.99"),
    ("init_lora_weights", "pissa_niter_999999999", "one of True, False, 'gaussian'"),
    ("init_lora_weights", "eva", "one of True, False, 'gaussian'"),
    ("init_lora_weights", 1, "one of True, False, 'gaussian'"),
    ("init_lora_weights", "gaussian", "describes no adapter that .*buil"),
    ("bias", "all", "allowed is 'none'"),
    ("use_dora", "x", "true or false"),
    ("fan_in_fan_out", True, "allowed is False"),
    ("layers_to_transform", [0], "allowed is None"),
    ("rank_pattern", {"(a+)+$": 10**9}, "allowed is {}"),
    ("alpha_pattern", {"x": 1}, "allowed is {}"),
    ("target_parameters", ["x"], "allowed is None"),
    ("trainable_token_indices", [0], "allowed is None"),
    ("layer_replication", [[0, 10**6]], "allowed is None"),
    ("megatron_config", {"x": 1}, "allowed is None"),
    ("loftq_config", {"loftq_iter": 10**9}, "allowed is {}"),
]

DESCRIPTIONS = [
    ("start", "-1", "from 0 to 999"),
    ("start", "2.0", "from 0 to 999"),
    ("start", "[[", "start is damaged"),
    ("pooling", "max", "one of 'cls', 'mean'"),
    ("intermediate_weight", "-1", "from 0 to 1000"),
    ("intermediate_weight", "NaN", "NaN is no number"),
    ("intermediate_weight", "1e999", "from 0 to 1000"),
    ("labels", '["a", "b"]', "a list of 3 texts, one for each prototype"),
    ("labels", '["a", "b", 3]', "a list of 3 texts"),
    ("labels", '{"a": 0, "b": 1, "c": 2}', "a list of 3 texts"),
    ("labels", '["a", "b", "a"]', "two classes are called 'a'"),
    ("labels", '["a", "b", ""]', "the class name '' is empty"),
    ("labels", '["a", "b", "\\u001b[2J"]', "has control characters"),
    ("labels", "[" * 100_000, "labels is damaged"),
]

PROCESSORS = [
    ("image_processor_type", "Dinov2Model", "the class of an image processor"),
    ("image_processor_type", "NoSuchImageProcessor", "describes no image processor"),
    ("auto_map", {"AutoImageProcessor": "evil.Processor"}, "auto_map is .*; allowed is null"),
    ("size", {"shortest_edge": 10**6}, "sizes of 1 to 2048 pixels"),
    ("size", {"edge": 28}, "describes no image processor"),
    ("crop_size", {"height": 0, "width": 28}, "sizes of 1 to 2048 pixels"),
    ("image_mean", [0.5, "x", 0.5], "describes no image processor"),
    ("image_std", [0.0, 0.0, 0.0], "values that are not finite"),
    ("image_std", [1.0], "describes no image processor"),
    ("rescale_factor", {}, "describes no image processor"),
    ("resample", 99, "describes no image processor"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Saved:
    return Saved(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def prisoner(saved):
    prisoner = Prisoner(saved)
    yield prisoner
    prisoner.close()


def load(saved: Saved, kind: str) -> HyperFlowAdapter | AdaptedTask:
    if kind == "adapter":
        return HyperFlowAdapter.from_pretrained(saved.folders[kind])
    return AdaptedTask.from_pretrained(saved.folders[kind], saved.backbone)


def assert_refused(saved: Saved, forgery: Forgery, words: str) -> None:
    """The error names the file and the field, and nothing has happened to the backbone."""
    before = Snapshot(saved.backbone)
    folder = saved.folders[forgery.kind]
    saved.write(forgery)
    try:
        with pytest.raises(CheckpointError, match=rf"{folder / forgery.file}.*{words}"):
            load(saved, forgery.kind)
    finally:
        saved.restore(forgery.kind)
    before.assert_unchanged()


def place(field: str) -> list[str]:
    return field.split(".")


@pytest.mark.parametrize(("field", "value", "words"), ADAPTER_CONFIGS)
def test_config_of_an_adapter(saved, field, value, words):
    assert_refused(saved, Forgery("adapter", "config.json", "set", place(field), value), words)


@pytest.mark.parametrize(("field", "value", "words"), PEFT_FIELDS)
def test_peft_config(saved, field, value, words):
    assert_refused(saved, Forgery("adapter", "config.json", "set", ["peft", field], value), words)
    assert_refused(saved, Forgery("task", "adapter_config.json", "set", [field], value), words)


@pytest.mark.parametrize(("field", "value", "words"), LORA_FIELDS)
def test_lora_config(saved, field, value, words):
    content = {"peft_type": "LORA", "target_modules": ["encoder.layer.2.mlp.fc1"], "lora_bias": True, field: value}
    assert_refused(saved, Forgery("adapter", "config.json", "set", ["peft"], content), words)
    assert_refused(saved, Forgery("task", "adapter_config.json", "set", [], content), words)


@pytest.mark.parametrize("value", [["encoder.layer.3.mlp.fc1"], "fc1", None])
def test_ia3_config(saved, value):
    content = {"peft_type": "IA3", "target_modules": ["encoder.layer.2.mlp.fc1"], "feedforward_modules": value}
    assert_refused(saved, Forgery("task", "adapter_config.json", "set", [], content), "feedforward_modules is ")


@pytest.mark.parametrize("kind", [kind.value for kind in PeftType])
def test_every_kind_that_peft_knows(saved, kind):
    """Only those in the list are built, whatever the installed PEFT knows besides."""
    forgery = Forgery("task", "adapter_config.json", "set", ["peft_type"], kind)
    if kind == "BEFT":
        assert saved.attempt(forgery).verdict == "right"
    elif kind in PEFT_CONFIGS:  # allowed, but its tensors are not those of the task
        outcome = saved.attempt(forgery)
        assert outcome.verdict == "clear error"
    else:
        assert_refused(saved, forgery, "peft_type is .*; allowed is one of 'BEFT', 'LORA', 'LN_TUNING', 'IA3'")


@pytest.mark.parametrize(("field", "value", "words"), DESCRIPTIONS)
def test_description_of_a_task(saved, field, value, words):
    forgery = Forgery("task", "prototypes.safetensors", "set", ["__metadata__", field], value)
    assert_refused(saved, forgery, words)


@pytest.mark.parametrize(("field", "value", "words"), PROCESSORS)
@pytest.mark.parametrize("kind", ["adapter", "task"])
def test_image_processor(saved, kind, field, value, words):
    assert_refused(saved, Forgery(kind, "preprocessor_config.json", "set", [field], value), words)


@pytest.mark.parametrize(
    ("kind", "file", "tensor"),
    [
        ("adapter", "model.safetensors", "drift.position"),
        ("task", "prototypes.safetensors", "prototypes"),
        ("task", "prototypes.safetensors", "scale"),
        ("task", "prototypes.safetensors", "rejection"),
        ("task", "adapter_model.safetensors", "base_model.model.layernorm.bias"),
    ],
)
def test_tensors_that_are_not_finite(saved, kind, file, tensor):
    for operation in ("nan", "infinite"):
        assert_refused(saved, Forgery(kind, file, operation, tensor, 0), f"{tensor[-4:]}' has NaN or infinite values")


@pytest.mark.parametrize("operation", ["longer", "integer", "renamed"])
def test_rejection_of_a_task(saved, operation):
    value = "factor" if operation == "renamed" else 0
    assert_refused(saved, Forgery("task", "prototypes.safetensors", operation, "rejection", value), "")


@pytest.mark.parametrize("operation", ["zero", "flat", "longer", "integer", "gone", "renamed"])
def test_scale_of_a_task(saved, operation):
    value = "factor" if operation == "renamed" else 0
    assert_refused(saved, Forgery("task", "prototypes.safetensors", operation, "scale", value), "")


@pytest.mark.parametrize("kind", ["adapter", "task"])
def test_json_that_is_too_much(saved, kind):
    file = "config.json" if kind == "adapter" else "adapter_config.json"
    refused = [
        (Forgery(kind, file, "text", 0, " " * (MAX_JSON_BYTES + 1)), "more than 16,777,216: it is refused"),
        (Forgery(kind, file, "nest", ["peft_type"], 100_000), "is damaged, it is no JSON"),
        (Forgery(kind, file, "set", ["peft_type"], float("nan")), "NaN is no number"),
        (Forgery(kind, file, "duplicate", ["model_type" if kind == "adapter" else "peft_type"], "x"), "occurs twice"),
        (Forgery(kind, file, "text", 0, "[]"), "holds no JSON object"),
        (Forgery(kind, file, "text", 0, "1" * 5000), "is damaged, it is no JSON"),
    ]
    for forgery, words in refused:
        assert_refused(saved, forgery, words)


@pytest.mark.parametrize("text", ["3", "[", '{"phases": 3}', '{"phases": {}, "arguments": {}}'])
def test_training_record(saved, text):
    assert_refused(saved, Forgery("adapter", "training.json", "text", 0, text), "is damaged")


def test_values_at_the_ends_of_what_is_allowed(saved):
    for field, value in [("n_steps", 1), ("n_steps", 40), ("solver", "rk4"), ("image_size", None), ("last_blocks", 1)]:
        outcome = saved.attempt(Forgery("adapter", "config.json", "set", [field], value))
        assert outcome.verdict == "right", (field, value, outcome)
    for field in ("base_model_name_or_path", "revision", "peft_version"):
        assert saved.attempt(Forgery("task", "adapter_config.json", "set", [field], "x")).verdict == "right"
    for value in (None, False, [], {}):
        outcome = saved.attempt(Forgery("task", "adapter_config.json", "set", ["a_field_of_the_future"], value))
        assert outcome.verdict == "right", "PEFT writes all fields, those that are not used as well"


def test_sizes_are_those_of_the_weights(prisoner):
    """No memory is taken that the weights do not fill: these would be 7 GB of drift network, or a process that dies."""
    for field, value in [("drift_width", 4096), ("drift_depth", 64), ("tensor_shapes", [[4096, 4096]] * 20)]:
        outcome = prisoner.attempt(Forgery("adapter", "config.json", "set", [field], value))
        assert outcome.verdict == "clear error", (field, outcome)
        assert "does not fit config.json; missing, unknown or of another shape: " in outcome.detail
    content = {"model_type": "vit", "hidden_size": 60_000, "num_attention_heads": 10, "num_hidden_layers": 200}
    outcome = prisoner.attempt(Forgery("adapter", "config.json", "set", ["encoder"], content))
    assert outcome.verdict == "clear error"


def test_a_config_object_is_checked_too(saved):
    """`AutoModel` reads the file itself and hands over what it made of it."""
    saved.write(Forgery("adapter", "config.json", "set", ["n_steps"], 10**9))
    try:
        with pytest.raises(CheckpointError, match=r"config\.json: n_steps is 1000000000; allowed is"):
            AutoModel.from_pretrained(saved.folders["adapter"])
    finally:
        saved.restore("adapter")


@pytest.mark.parametrize(
    ("kind", "name", "content"),
    [
        ("adapter", "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "no/such-model"}),
        ("adapter", "model.safetensors.index.json", {"weight_map": {"x": "../x.safetensors"}}),
        ("adapter", "processor_config.json", {"image_processor": {"image_processor_type": "x", "size": 10**9}}),
        ("adapter", "generation_config.json", {"max_length": "x"}),
        ("task", "processor_config.json", {"image_processor": {"image_processor_type": "x", "size": 10**9}}),
        ("task", "config.json", {"model_type": "x", "auto_map": {"AutoConfig": "x.X"}}),
    ],
)
def test_files_that_do_not_belong_there_are_not_read(saved, kind, name, content):
    forgery = Forgery(kind, name, "text", 0, json.dumps(content))
    outcome = saved.attempt(forgery)
    assert outcome.verdict == "right", outcome


@pytest.mark.parametrize("kind", ["adapter", "task"])
def test_nobody_waits_for_a_pipe(saved, prisoner, kind):
    for name in saved.files[kind]:
        path = saved.folders[kind] / name
        path.unlink()
        os.mkfifo(path)
        try:
            outcome = prisoner.attempt(Forgery(kind, "a-file-beside.json", "text", 0, "{}", False))
        finally:
            path.unlink()
            saved.restore(kind)
        assert outcome.verdict == "clear error", (name, outcome)


def test_weights_of_the_backbone_in_the_adapter(saved):
    """PEFT would load them into the backbone, for good."""
    name = "base_model.model.encoder.layer.0.norm1.weight"
    forgery = Forgery("task", "adapter_model.safetensors", "renamed", "base_model.model.layernorm.bias", name)
    outcome = saved.attempt(forgery)
    assert outcome.verdict == "clear error"
    assert name in outcome.detail


def test_another_task_survives_a_load_that_fails(saved, tmp_path):
    backbone = tiny_dinov2()
    before = Snapshot(backbone)
    task = AdaptedTask.from_pretrained(saved.folders["task"], backbone)
    images = pictures(n_way=1)["red"]
    expected = task.scores(images)
    shutil.copytree(saved.folders["task"], tmp_path / "task")
    for kind in ("LN_TUNING", "BOFT", "LORA"):
        path = tmp_path / "task" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": kind}))
        with pytest.raises((CheckpointError, IncompatibleBackboneError)):
            AdaptedTask.from_pretrained(tmp_path / "task", backbone)
        assert same_bits(task.scores(images), expected)
    task.reset()
    before.assert_unchanged()


def _make_ia3(backbone: torch.nn.Module) -> IA3Config:
    targets = find_linear_paths(backbone, 2)
    return IA3Config(target_modules=targets, feedforward_modules=[path for path in targets if path.endswith("fc2")])


def _make_lora(backbone: torch.nn.Module, **arguments: Any) -> LoraConfig:
    return LoraConfig(target_modules=find_linear_paths(backbone, 2), **arguments)


@pytest.mark.parametrize(
    "make",
    [
        _make_ia3,
        lambda backbone: _make_lora(backbone, r=3, lora_alpha=0.5, use_rslora=True),
        lambda backbone: _make_lora(backbone, use_dora=True, init_lora_weights="gaussian"),
        lambda backbone: _make_lora(backbone, modules_to_save=["layernorm"], lora_dropout=0.1),
    ],
    ids=["ia3", "rank-stabilised", "dora", "saved modules"],
)
def test_allowed_peft_configs_go_round(make, tmp_path):
    backbone = tiny_dinov2()
    adapter = tiny_adapter(backbone, make(backbone))
    adapter.save_pretrained(tmp_path / "adapter")
    loaded = HyperFlowAdapter.from_pretrained(tmp_path / "adapter")
    task = loaded.adapt(backbone, pictures())
    images = pictures(n_way=1)["red"]
    expected = task.scores(images)
    task.save_pretrained(tmp_path / "task")
    task.reset()
    again = AdaptedTask.from_pretrained(tmp_path / "task", backbone)
    torch.testing.assert_close(again.scores(images), expected)


def test_a_kind_that_could_not_be_loaded_again_is_not_made():
    backbone = tiny_dinov2()
    config = VeraConfig(target_modules=["encoder.layer.2.mlp.fc1"])
    with pytest.raises(ValueError, match="PEFT's VERA is not supported: use one of BEFT, LORA, LN_TUNING, IA3"):
        tiny_adapter(backbone, config)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ENCODERS)
def test_every_encoder_in_the_list_can_be_one(model_type):
    config = AutoConfig.for_model(model_type)
    with torch.device("meta"):
        encoder = AutoModel.from_config(config).eval()
        states = encoder(torch.zeros(2, 3, 224, 224)).last_hidden_state
    width = states.shape[1] if states.ndim == 4 else states.shape[2]
    assert width == _get_encoder_width(config)


def test_nothing_is_unpickled(saved, tmp_path):
    """A pickle in place of the weights, and one beside them."""
    path = tmp_path / "pickle.bin"
    torch.save(load_file(saved.folders["adapter"] / "model.safetensors"), path)
    content = path.read_bytes()
    folder: Path = saved.folders["adapter"]
    try:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
            HyperFlowAdapter.from_pretrained(folder)
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
            HyperFlowAdapter.from_pretrained(folder)
    finally:
        (folder / "pytorch_model.bin").unlink()
        saved.restore("adapter")
