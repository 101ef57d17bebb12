"""The gate in front of all that takes a backbone: it finds things by trying, and leaves no trace of it."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    BertConfig,
    BertModel,
    CLIPModel,
    DPTForDepthEstimation,
)

from hf_hyperflow import IncompatibleBackboneError
from hf_hyperflow.modeling.gate import find_blocks
from hf_hyperflow.modeling.peft_configs import bias_config
from hf_hyperflow.modeling.trunks import find_trunk
from tests.helpers.families import BOTH, PLAIN, STAGES, VIT, Member
from tests.helpers.tiny import Snapshot, scrambled, tiny_adapter, tiny_dinov2


@pytest.mark.parametrize(
    ("model_type", "config", "norm", "pooling"),
    [
        ("clip_vision_model", PLAIN, "post_layernorm", "pooler"),
        ("siglip_vision_model", PLAIN, "post_layernorm", "pooler"),
        ("vit", PLAIN, "layernorm", "cls"),
        ("dinov2", VIT, "layernorm", "cls"),
    ],
)
def test_a_new_model_does_not_hide_which_norm_counts(model_type, config, norm, pooling):
    """The norms of a new model all do the same, so that a look at the features would not tell them apart."""
    blocks = find_blocks(AutoModel.from_config(AutoConfig.for_model(model_type, **config)))
    assert (blocks.norm, blocks.pooling, blocks.first_cut) == (norm, pooling, 0)


@pytest.mark.parametrize(("model_type", "config"), [("dinov2", VIT), ("convnext", STAGES)])
def test_it_leaves_no_trace(model_type, config):
    model = Member(model_type, config).build().train()
    before, random_state = Snapshot(model), torch.get_rng_state()
    find_blocks(model)
    before.assert_unchanged()
    assert torch.equal(torch.get_rng_state(), random_state)


@torch.no_grad()
def test_swin_keeps_its_windows():
    """It shrinks them for good when it runs on images smaller than its own."""
    config = {"image_size": 128, "window_size": 8, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2]}
    model, images = Member("swin", config).build(), torch.randn(2, 3, 128, 128)
    expected = model(images).pooler_output
    find_blocks(model)
    torch.testing.assert_close(model(images).pooler_output, expected, rtol=0, atol=0)


def test_a_wrapper_is_as_good_as_what_it_wraps(pixels):
    """An adapter that was made for a model fits that model in a wrapper, and takes the trunk out of it."""
    config = AutoConfig.for_model("vit", **{**PLAIN, "image_size": 28, "patch_size": 14})
    wrapper = scrambled(AutoModelForImageClassification.from_config(config))
    labels = torch.arange(len(pixels)) % 2
    adapter = tiny_adapter(wrapper.vit)
    expected = adapter.adapt(copy.deepcopy(wrapper.vit), (pixels, labels)).logits(pixels)
    before = Snapshot(wrapper)
    task = adapter.adapt(wrapper, (pixels, labels))
    assert task.backbone is wrapper.vit
    torch.testing.assert_close(task.logits(pixels), expected)
    task.reset()
    before.assert_unchanged()


def test_the_vision_model_of_a_wrapper():
    clip = CLIPModel(AutoConfig.for_model("clip", **BOTH))
    assert find_trunk(clip) is clip.vision_model
    neck = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}
    dpt = DPTForDepthEstimation(AutoConfig.for_model("dpt", **PLAIN, **neck))
    assert find_trunk(dpt) is dpt.dpt
    dinov2 = tiny_dinov2()
    assert find_trunk(dinov2) is dinov2


def build_peft_model() -> nn.Module:
    return get_peft_model(tiny_dinov2(), LoraConfig(target_modules=["q_proj"]))


def build_bert() -> nn.Module:
    config = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    return BertModel(config)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Linear(3, 3), "Linear is not a model of transformers. Use a vision model that AutoModel loads"),
        (build_peft_model, "is a PeftModel, which carries an adapter already. Pass what"),
        (build_bert, "BertModel takes input_ids, not images. Use a vision model"),
        (lambda: tiny_dinov2(num_channels=1), "Dinov2Model takes 1 channels. Use a model of RGB images"),
    ],
    ids=["not of transformers", "PEFT", "text", "grey"],
)
def test_what_is_no_backbone(build, message):
    model = build()
    for door in (find_blocks, lambda m: bias_config(m, 1), tiny_adapter):
        with pytest.raises(IncompatibleBackboneError, match=message):
            door(model)


def test_features_that_depend_on_the_other_images_of_a_batch():
    """With one image alone all would be well."""
    model = tiny_dinov2()
    model.encoder.layer[1].register_forward_hook(lambda _, args, output: output - output.mean(dim=0, keepdim=True))
    with pytest.raises(IncompatibleBackboneError, match="mixes the images of a batch"):
        find_blocks(model)
