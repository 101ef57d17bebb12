"""PEFT configs for biases, LoRA factors and LayerNorms of the last blocks."""

from __future__ import annotations

import json

import pytest
from peft import get_peft_config
from torch import nn

from hf_hyperflow import IncompatibleBackboneError
from hf_hyperflow.modeling.parameter_space import ParameterSpace
from hf_hyperflow.modeling.peft_configs import (
    bias_config,
    config_to_dict,
    find_linear_paths,
    find_norm_paths,
    get_kind,
    layernorm_config,
    lora_config,
)
from tests.helpers.tiny import tiny_dinov2, tiny_vit

KINDS = {
    "biases": lambda b, k: bias_config(b, k, norms=False),
    "biases and norms": bias_config,
    "lora": lambda b, k: lora_config(b, k, r=3),
    "layernorms": layernorm_config,
}


@pytest.fixture(params=[tiny_dinov2, tiny_vit], ids=["dinov2", "vit"])
def any_backbone(request):
    return request.param()


def space_of(backbone, kind, last_blocks) -> ParameterSpace:
    return ParameterSpace.from_backbone(backbone, KINDS[kind](backbone, last_blocks))


def test_biases_of_the_last_blocks_but_for_the_keys(backbone):
    space = space_of(backbone, "biases", last_blocks=1)
    expected = [f"encoder.layer.3.{p}.beft_bias.default" for p in ("attention.q_proj", "attention.v_proj")]
    expected += [f"encoder.layer.3.{p}.beft_bias.default" for p in ("attention.o_proj", "mlp.fc1", "mlp.fc2")]
    assert sorted(space.names) == sorted(expected)
    assert space.n_tokens == 1 + 1 + 1 + 4 + 1


@pytest.mark.parametrize("last_blocks", [1, 2, 4])
def test_number_of_parameters_of_the_last_blocks(any_backbone, last_blocks):
    hidden = 128 if any_backbone.config.model_type == "dinov2" else 64
    biases, norms = 4 * 32 + hidden, 4 * 32
    assert space_of(any_backbone, "biases", last_blocks).n_parameters == last_blocks * biases
    with_norms = last_blocks * (biases + norms) + 2 * 32  # the final norm, too
    assert space_of(any_backbone, "biases and norms", last_blocks).n_parameters == with_norms
    assert space_of(any_backbone, "layernorms", last_blocks).n_parameters == last_blocks * norms + 2 * 32


@pytest.mark.parametrize("last_blocks", [0, 5])
def test_more_blocks_than_there_are(backbone, last_blocks):
    with pytest.raises(IncompatibleBackboneError, match=f"last_blocks={last_blocks}, but the backbone has 4 blocks"):
        find_linear_paths(backbone, last_blocks)
    with pytest.raises(IncompatibleBackboneError, match=f"last_blocks={last_blocks}"):
        find_norm_paths(backbone, last_blocks)


@pytest.mark.parametrize("kind", KINDS)
def test_config_to_dict_survives_json(backbone, kind):
    config = KINDS[kind](backbone, 2)
    again = get_peft_config(json.loads(json.dumps(config_to_dict(config))))
    assert type(again) is type(config)
    assert config_to_dict(again) == config_to_dict(config)
    space, other = (ParameterSpace.from_backbone(backbone, c) for c in (config, again))
    assert (space.names, space.shapes) == (other.names, other.shapes)


def test_a_network_without_blocks():
    with pytest.raises(IncompatibleBackboneError, match="Sequential is not a model of transformers"):
        bias_config(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), 1)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("biases", "BEFT"), ("biases and norms", "BEFT"), ("lora", "LORA"), ("layernorms", "LN_TUNING")],
)
def test_kinds_are_called_what_peft_calls_them(backbone, kind, name):
    config = KINDS[kind](backbone, 2)
    assert get_kind(config) == config_to_dict(config)["peft_type"] == name
