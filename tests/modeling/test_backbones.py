from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutput

from hf_hyperflow import IncompatibleBackboneError
from hf_hyperflow.modeling.backbones import SplitBackbone
from hf_hyperflow.modeling.gate import find_blocks
from hf_hyperflow.modeling.parameter_space import ParameterSpace
from hf_hyperflow.modeling.peft_configs import (
    bias_config,
    find_linear_paths,
    find_norm_paths,
    layernorm_config,
    lora_config,
)
from hf_hyperflow.modeling.trunks import eval_mode, get_name
from tests.helpers.tiny import Snapshot, pictures, tiny_adapter, tiny_dinov2, tiny_vit
from tests.helpers.vits import VITS


@pytest.fixture(params=VITS)
def vit(request):
    return VITS[request.param]()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("start", [0, 2, 3])
def test_prefix_and_rest_equal_the_whole(vit, pixels, start, pooling):
    split = SplitBackbone(vit, start, pooling)
    split.check()
    with torch.no_grad():
        states = vit(pixels).last_hidden_state
        expected = states[:, 0] if pooling == "cls" else states.mean(dim=1)
        torch.testing.assert_close(split.forward_suffix(split.forward_prefix(pixels)), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(split.forward_features(pixels), expected, rtol=1e-5, atol=1e-6)


def test_some_of_the_images(vit, pixels):
    split = SplitBackbone(vit, 2)
    with torch.no_grad():
        hidden, expected = split.forward_prefix(pixels), split.forward_features(pixels)
        rows = torch.tensor([4, 1])
        torch.testing.assert_close(split.forward_suffix(hidden[rows]), expected[rows], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(split.forward_suffix(hidden[:2]), expected[:2], rtol=1e-5, atol=1e-6)


def test_the_rest_runs_adapters_injected_later(vit, pixels):
    split = SplitBackbone(vit, 2)
    space = ParameterSpace.from_backbone(vit, bias_config(vit, 2))
    with torch.no_grad():
        hidden, plain = split.forward_prefix(pixels), split.forward_features(pixels)
        injection = space.inject(vit)
        injection.write(injection.start + 0.3 * torch.randn(space.n_tokens, space.token_dim) * space.mask)
        adapted = split.forward_features(pixels)
        assert (adapted - plain).abs().max() > 1e-2
        torch.testing.assert_close(split.forward_suffix(hidden), adapted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_intermediate_features(vit, pixels, pooling):
    plain, split = SplitBackbone(vit, 2, pooling), SplitBackbone(vit, 2, pooling, intermediate_weight=0.5)
    with torch.no_grad():
        hidden, final = split.forward_prefix(pixels), plain.forward_features(pixels)
        features = split.forward_features(pixels)
        torch.testing.assert_close(split.forward_suffix(hidden), features, rtol=1e-5, atol=1e-6)
    tokens = hidden.states[:, 1:] if pooling == "cls" else hidden.states
    torch.testing.assert_close(split.final_features(features), final, rtol=1e-5, atol=1e-6)
    intermediate = features[:, final.shape[1] :]
    torch.testing.assert_close(intermediate.norm(dim=1), 0.5 * final.norm(dim=1))
    torch.testing.assert_close(F.normalize(intermediate, dim=1), F.normalize(tokens.mean(1), dim=1))
    assert plain.final_features(final) is final


def test_prefix_runs_no_block_behind_the_split_and_leaves_no_hook(vit, pixels):
    before, ran = Snapshot(vit), []
    split, handles = SplitBackbone(vit, 2), []
    for i, path in enumerate(split.blocks.paths):
        handles.append(vit.get_submodule(path).register_forward_hook(lambda *_, i=i: ran.append(i)))
    split.forward_prefix(pixels)
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]
    before.assert_unchanged()


def test_where_the_blocks_are(vit):
    blocks = find_blocks(vit)
    assert len(blocks) == 4
    assert isinstance(vit.get_submodule(blocks.norm), nn.LayerNorm)
    inside = blocks.after(3)
    assert {name for name in inside if name.startswith(blocks.norm)} == {f"{blocks.norm}.weight", f"{blocks.norm}.bias"}
    rest = {name for name in inside if not name.startswith(blocks.norm)}
    assert blocks.paths[3].endswith(".3")
    assert rest == {n for n in blocks.names if n.startswith(f"{blocks.paths[3]}.")}


def test_block_10_is_not_taken_for_block_1():
    model = tiny_dinov2(num_hidden_layers=12)
    inside = find_blocks(model).after(11)
    assert not any(name.startswith(("encoder.layer.1.", "encoder.layer.10.")) for name in inside)


@pytest.mark.parametrize("make", [bias_config, lora_config, layernorm_config])
def test_adapters_inside_do_not_hide_the_parts(vit, make):
    expected = find_blocks(vit), find_linear_paths(vit, 2), find_norm_paths(vit, 2)
    space = ParameterSpace.from_backbone(vit, make(vit, 2))
    space.inject(vit)
    found = find_blocks(copy.deepcopy(vit))  # a copy was not seen before, and is tried out with the adapter in it
    assert found == expected[0]
    assert (find_linear_paths(vit, 2), find_norm_paths(vit, 2)) == expected[1:]


def test_a_block_that_is_never_run(backbone, pixels, monkeypatch):
    split = SplitBackbone(backbone, 2)
    monkeypatch.setattr(backbone, "forward", lambda pixel_values: BaseModelOutput(pixel_values.flatten(2)))
    with pytest.raises(IncompatibleBackboneError, match=r"does not run encoder\.layer\.2"):
        split.forward_prefix(pixels)
    with pytest.raises(IncompatibleBackboneError, match=r"blocks once and in turn \(encoder\.layer\.0"):
        find_blocks(copy.deepcopy(backbone))


def test_forward_is_the_suffix(backbone, pixels):
    """The name that `torch.func.functional_call` calls."""
    split = SplitBackbone(backbone, 2)
    with torch.no_grad():
        hidden = split.forward_prefix(pixels)
        torch.testing.assert_close(split(hidden), split.forward_suffix(hidden))


def test_eval_mode_gives_every_module_its_mode_back(backbone):
    backbone.train()
    backbone.encoder.layer[1].eval()
    before = Snapshot(backbone)
    modes = []

    def fail() -> None:
        with eval_mode(backbone):
            modes.extend(module.training for module in backbone.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not any(modes)
    before.assert_unchanged()


@pytest.mark.parametrize("start", [-1, 4])
def test_start_outside_the_blocks(backbone, start):
    with pytest.raises(IncompatibleBackboneError, match=f"starts at block {start}, but Dinov2Model has 4 blocks"):
        SplitBackbone(backbone, start)


def test_check_notices_a_change_between_the_blocks(backbone):
    split = SplitBackbone(backbone, 2)
    split.check()
    backbone.encoder.register_forward_hook(
        lambda module, args, output: type(output)(last_hidden_state=output.last_hidden_state.flip(-1))
    )
    with pytest.raises(IncompatibleBackboneError, match=r"from encoder\.layer\.2 on differs from its forward"):
        split.check()


def test_a_folder_is_noted_by_its_whole_path(tmp_path, monkeypatch):
    """As it was typed, it would be found from one directory only, and pass for a Hub id everywhere else."""
    tiny_vit().save_pretrained(tmp_path / "models" / "vit")
    monkeypatch.chdir(tmp_path)
    backbone = AutoModel.from_pretrained("models/vit")
    adapter = tiny_adapter(backbone)
    assert adapter.config.backbone["name_or_path"] == str(tmp_path / "models" / "vit")
    adapter.adapt(backbone, pictures()).save_pretrained("task")
    noted = json.loads(Path("task/adapter_config.json").read_text())["base_model_name_or_path"]
    assert noted == str(tmp_path / "models" / "vit")
    assert get_name(tiny_vit()) == ""
    backbone.config._name_or_path = "google/vit"
    assert get_name(backbone) == "google/vit"
