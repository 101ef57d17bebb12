"""Ways on which a user of PEFT and transformers would get something broken without a word."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, Dinov2ForImageClassification

from hf_hyperflow import HyperFlowAdapter, IncompatibleBackboneError
from hf_hyperflow.modeling.peft_configs import bias_config, layernorm_config, lora_config
from tests.helpers.tiny import Snapshot, pictures, same_bits, tiny_adapter, tiny_dinov2

SIZES = {"drift_width": 16, "drift_depth": 1, "drift_heads": 2}


@pytest.mark.parametrize("make", [bias_config, lora_config, layernorm_config])
def test_a_backbone_that_is_saved_while_a_task_is_in_is_the_plain_one(make, support, pixels, tmp_path):
    backbone = tiny_dinov2()
    plain = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    task = tiny_adapter(backbone, make(backbone, 2)).adapt(backbone, support)
    expected = task.logits(pixels)
    for model in (backbone, copy.deepcopy(task).backbone, pickle.loads(pickle.dumps(backbone))):
        state = model.state_dict()
        assert sorted(state) == sorted(plain)
        assert all(same_bits(state[name], tensor) for name, tensor in plain.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone.save_pretrained(tmp_path / "plain")
    loaded = AutoModel.from_pretrained(tmp_path / "plain").state_dict()
    assert all(same_bits(loaded[name], tensor) for name, tensor in plain.items())
    assert same_bits(task.logits(pixels), expected), "the task is still in"
    if make is lora_config:  # what is merged is saved as it is
        merged = task.merge()
        changed = merged.state_dict()
        assert sorted(changed) == sorted(plain)
        assert not all(same_bits(changed[name], tensor) for name, tensor in plain.items())
        merged.save_pretrained(tmp_path / "merged")
        features = AutoModel.from_pretrained(tmp_path / "merged").eval()(pixels).last_hidden_state
        torch.testing.assert_close(features, merged(pixels).last_hidden_state)
    task.reset()
    assert list(backbone.state_dict()) == list(plain)


def test_a_model_that_wraps_the_backbone_is_saved_without_the_task(support, tmp_path):
    model = Dinov2ForImageClassification(tiny_dinov2().config).eval()
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    task = tiny_adapter(model).adapt(model, support)
    model.save_pretrained(tmp_path)
    loaded = Dinov2ForImageClassification.from_pretrained(tmp_path).state_dict()
    assert all(same_bits(loaded[name], tensor) for name, tensor in plain.items())
    task.save_pretrained(tmp_path / "task")  # PEFT, which saves the adapter, sees it
    assert (tmp_path / "task" / "adapter_model.safetensors").stat().st_size > 1000


def test_an_adapter_in_bfloat16(backbone, support, pixels, tmp_path):
    adapter = tiny_adapter(backbone, lda=True, intermediate_weight=0.5)
    expected = adapter.adapt(backbone, support)
    adapter.save_pretrained(tmp_path)
    half = HyperFlowAdapter.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.drift.token_out.weight.dtype == torch.bfloat16
    for task in (half.adapt(backbone, support), *half.adapt_many(backbone, [support])):
        assert (task.theta - expected.theta).abs().max() < 0.1 * expected.theta.abs().max()
        torch.testing.assert_close(task.scores(pixels), expected.scores(pixels), rtol=0.2, atol=0.1)


def test_a_backbone_with_an_adapter_of_somebody_else(adapter, support):
    backbone = tiny_dinov2()
    model = get_peft_model(backbone, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(IncompatibleBackboneError, match=r"is a PeftModel, which carries an adapter already. Pass what"):
        adapter.adapt(model, support)
    with pytest.raises(IncompatibleBackboneError, match=r"already carries a PEFT adapter. Unload or merge it first"):
        adapter.adapt(backbone, support)
    adapter.adapt(model.unload(), support)


def test_a_field_that_is_not_there(backbone):
    before = Snapshot(backbone)
    for name, words in [("drift_widht", "did you mean 'drift_width'?"), ("xyz", "there are backbone, last_blocks")]:
        with pytest.raises(TypeError, match=f"has no field '{name}': {words}".replace("?", r"\?")):
            HyperFlowAdapter.from_backbone(backbone, bias_config(backbone, 1), last_blocks=1, **{name: 64})
    before.assert_unchanged()


def test_an_adapter_that_was_not_trained(backbone, support):
    adapter = HyperFlowAdapter.from_backbone(backbone, bias_config(backbone, 1), last_blocks=1, **SIZES)
    adapter.processor = tiny_adapter(backbone).processor
    for adapt, supports in ((adapter.adapt, support), (adapter.adapt_many, [support])):
        with pytest.warns(UserWarning, match="this adapter was not trained: its flow leaves the backbone") as caught:
            adapt(backbone, supports)
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adapt(backbone, supports, n_steps=0)
    adapter.direct_transfer(backbone, support)


@pytest.mark.slow
def test_a_compiled_backbone(adapter, support, pixels):
    backbone = tiny_dinov2()
    compiled = torch.compile(backbone, backend="eager")
    with pytest.raises(IncompatibleBackboneError, match=r"this backbone is compiled.*: adapt first, then compile"):
        adapter.adapt(compiled, support)
    task = adapter.adapt(backbone, support)
    expected = task.logits(pixels)
    backbone.compile(backend="eager")  # in place, after adapting, as the error says
    torch.testing.assert_close(task.logits(pixels), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(IncompatibleBackboneError, match="this backbone is compiled"):
        adapter.adapt(backbone, pictures())
