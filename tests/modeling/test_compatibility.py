"""Adapters and tasks that version 0.1 saved, under the names of that time, load and are saved under today's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hf_hyperflow import AdaptedTask, HyperFlowAdapter, HyperFlowConfig
from hf_hyperflow.modeling.checksums import MODEL_CHECKSUMS, sha256
from tests.helpers.tiny import same_bits, tiny_adapter

RELEASED = Path(__file__).resolve().parents[2] / "model_cards" / "hyperflow-vit-s14-70"


def name_as_in_version_0_1(folder: Path) -> None:
    """Rewrite a saved adapter with the names of weights and config keys of version 0.1."""
    path = folder / "model.safetensors"
    weights = {}
    for name, tensor in load_file(path).items():
        name = "log_scale" if name == "logit_scale" else name
        weights[name.replace("head.", "metric.")] = tensor
    save_file(weights, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["metric"] = config.pop("lda")
    config["middle"] = config.pop("intermediate_weight")
    config["weights_sha256"] = sha256(path)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / MODEL_CHECKSUMS).unlink()


def assert_same_state(a: HyperFlowAdapter, b: HyperFlowAdapter) -> None:
    expected, actual = a.state_dict(), b.state_dict()
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert same_bits(actual[name], tensor), name


@pytest.fixture
def lda_adapter(backbone):
    """An adapter whose head is an LDA with a prior, on features with intermediate ones."""
    adapter = tiny_adapter(backbone, lda=True, intermediate_weight=0.5)
    adapter.head.set_prior(torch.diag(torch.linspace(0.1, 2, 64)), spread=2.0, count=3.0)
    return adapter


@pytest.mark.parametrize("load", [HyperFlowAdapter.from_pretrained, AutoModel.from_pretrained])
def test_an_old_adapter_loads_and_is_saved_under_new_names(lda_adapter, tmp_path, load):
    lda_adapter.save_pretrained(tmp_path / "old")
    name_as_in_version_0_1(tmp_path / "old")
    loaded = load(tmp_path / "old")
    assert (loaded.config.lda, loaded.config.intermediate_weight) == (True, 0.5)
    assert_same_state(loaded, lda_adapter)
    loaded.save_pretrained(tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (config["lda"], config["intermediate_weight"]) == (True, 0.5)
    assert not {"metric", "middle"} & config.keys()
    names = load_file(tmp_path / "new" / "model.safetensors").keys()
    assert {"logit_scale", "head.directions", "head.variances", "head.spread"} <= names
    assert not any(name.startswith(("metric", "log_scale")) for name in names)
    assert_same_state(load(tmp_path / "new"), lda_adapter)


def test_a_config_object_with_old_names():
    config = HyperFlowConfig(metric=True, middle=0.25)
    assert (config.lda, config.intermediate_weight) == (True, 0.25)
    assert (config.metric, config.middle) == (True, 0.25)
    assert not {"metric", "middle"} & config.to_dict().keys()


def test_the_released_adapter_loads_and_is_saved_bit_for_bit(tmp_path):
    weights = load_file(RELEASED / "model.safetensors")
    adapter = HyperFlowAdapter.from_pretrained(RELEASED)
    adapter.save_pretrained(tmp_path)
    again = HyperFlowAdapter.from_pretrained(tmp_path)
    assert_same_state(again, adapter)
    assert (again.config.lda, again.config.intermediate_weight) == (True, 0.5)
    state = again.state_dict()
    for name, tensor in weights.items():
        renamed = name.replace("metric.", "head.").replace("log_scale", "logit_scale")
        assert same_bits(state[renamed].to(tensor.dtype), tensor), name  # released in half precision
    assert len(state) == len(weights)
    assert again.training_record == adapter.training_record
    assert "## How it was trained" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_an_old_task_loads_as_it_was(lda_adapter, backbone, support, pixels, tmp_path):
    """Its intermediate weight is called `middle`."""
    task = lda_adapter.adapt(backbone, support)
    expected = task.logits(pixels)
    task.save_pretrained(tmp_path / "task")
    task.reset()
    path = tmp_path / "task" / "prototypes.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    metadata["middle"] = metadata.pop("intermediate_weight")
    save_file(load_file(path), path, metadata)
    digests = json.loads((tmp_path / "task" / "checksums.json").read_text())
    digests[path.name] = sha256(path)
    (tmp_path / "task" / "checksums.json").write_text(json.dumps(digests))
    loaded = AdaptedTask.from_pretrained(tmp_path / "task", backbone)
    torch.testing.assert_close(loaded.logits(pixels), expected)
    loaded.save_pretrained(tmp_path / "again")
    with safe_open(tmp_path / "again" / path.name, framework="pt") as file:
        assert file.metadata()["intermediate_weight"] == "0.5"
        assert "middle" not in file.metadata()
