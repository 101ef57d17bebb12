"""Every vision family of transformers, as the README's table says: it works, it needs something, or it is refused.

The models are tiny and random, and their weights are rough: in a new model one norm passes for another.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers.models.auto import modeling_auto

from hf_hyperflow import AdaptedTask, HyperFlowAdapter, IncompatibleBackboneError
from hf_hyperflow.modeling.backbones import SplitBackbone
from hf_hyperflow.modeling.gate import find_blocks
from hf_hyperflow.modeling.peft_configs import bias_config, layernorm_config, lora_config
from hf_hyperflow.modeling.trials import draw_images
from hf_hyperflow.modeling.trunks import find_trunk
from tests.helpers.families import FAMILIES, REFUSED, Family, Member, render_table
from tests.helpers.tiny import same_bits, tiny_adapter

README = Path(__file__).resolve().parents[2] / "README.md"
SPACES = {"biases": bias_config, "LoRA": lora_config, "norms": layernorm_config}
MEMBERS = [(family, member) for family in FAMILIES for member in family.members]
TRIED = [(refused, member) for refused in REFUSED for member in refused.members]


def list_cases() -> list:
    """Every member with one of its spaces, each in its turn, and each family with all of its spaces."""
    cases = []
    for family in FAMILIES:
        spaces = itertools.cycle(family.spaces)
        for member in family.members:
            space = next(spaces)
            cases.append(pytest.param(family, member, space, id=f"{member.name}-{space}"))
    return cases


def draw_task(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Six images of three classes."""
    images = draw_images(find_trunk(model), find_blocks(model).image_size)
    noise = torch.randn(6, 3, *images.shape[-2:], generator=torch.Generator().manual_seed(1))
    return images.repeat_interleave(2, dim=0) + 0.3 * noise, torch.arange(3).repeat_interleave(2)


def describe_cut(split: SplitBackbone) -> str:
    blocks = split.blocks
    if split.pooling not in blocks.tails:
        return "none"
    return {0: "any", len(blocks) - 1: "last"}.get(blocks.first_cut, "none")


@pytest.mark.parametrize(("family", "member", "space"), list_cases())
def test_a_family_that_works(family: Family, member: Member, space: str, tmp_path):
    """It is cut where the table says, has the spaces that the table says, and goes through all doors."""
    model = member.build(**member.remedy)
    assert describe_cut(SplitBackbone(model, 0)) == family.cut
    for name, make in SPACES.items():
        if name not in family.spaces:
            with pytest.raises(IncompatibleBackboneError, match=r"Use (layernorm_config|another kind)"):
                HyperFlowAdapter.from_backbone(model, make(model, 1), last_blocks=1)
    check_member(member, space, tmp_path)


def check_member(member: Member, space: str, folder: Path) -> None:
    """A model is adapted, saved, loaded by this package and by PEFT alone, and is afterwards what it was."""
    model = member.build(**member.remedy)
    trunk = find_trunk(model)
    before = copy_state(trunk)
    for start in range(len(find_blocks(model))):
        SplitBackbone(model, start).check()
    last_blocks = 1 if space == "biases" else 2
    adapter = tiny_adapter(model, SPACES[space](model, last_blocks), last_blocks=last_blocks)
    assert_same_state(trunk, before)

    images, labels = draw_task(model)
    plain = compute_features(adapter.direct_transfer(model, (images, labels)), images)
    task = adapter.adapt(model, (images, labels))
    logits, features = task.logits(images), compute_features(task, images)
    assert (features - plain).abs().max() > 1e-3 * plain.abs().max(), "the adapter changes nothing"
    task.save_pretrained(folder)
    task.reset()
    assert_same_state(trunk, before)

    copied = copy.deepcopy(model)
    loaded = AdaptedTask.from_pretrained(folder, copied)
    torch.testing.assert_close(loaded.logits(images), logits, rtol=1e-4, atol=1e-4)
    loaded.reset()
    plain_trunk = find_trunk(copied)
    PeftModel.from_pretrained(plain_trunk, str(folder)).eval()
    with torch.no_grad():
        split = SplitBackbone(trunk, 0)
        split.backbone = plain_trunk
        torch.testing.assert_close(split.forward_features(images), features, rtol=1e-4, atol=1e-4)


def copy_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    """The same modules with the same bits. Some models note the sizes of images in attributes when they run."""
    state = model.state_dict()
    assert list(state) == list(expected)
    assert all(same_bits(state[name], tensor) for name, tensor in expected.items())


@torch.no_grad()
def compute_features(task: AdaptedTask, images: torch.Tensor) -> torch.Tensor:
    with task.space.inject(task.backbone).using(task.theta):
        return SplitBackbone(task.backbone, 0).forward_features(images)


@pytest.mark.parametrize(("refused", "member"), TRIED, ids=[member.name for _, member in TRIED])
def test_a_family_that_is_refused(refused, member):
    with pytest.raises(IncompatibleBackboneError, match=refused.error) as caught:
        find_blocks(member.build())
    assert "Use" in str(caught.value), "the error says what to do"


NEEDY = [member for _, member in MEMBERS if member.remedy]


@pytest.mark.parametrize("member", NEEDY, ids=[member.name for member in NEEDY])
def test_a_family_that_needs_something_is_told_what(member):
    (setting,) = member.remedy
    with pytest.raises(IncompatibleBackboneError, match=f"Set {setting}=0"):
        find_blocks(member.build())


#: Of timm: a vision transformer, one with maps `(n, height, width, channels)`, and stages beside each other.
TIMM_MODELS = {
    "vit_tiny_patch16_224": ({"img_size": 32, "depth": 3, "embed_dim": 32, "num_heads": 2}, "biases"),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 64, "window_size": 4, "embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)},
        "LoRA",
    ),
    "resnet18": ({"channels": (8, 8, 16, 24)}, "norms"),
    "convnext_atto": ({"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 24)}, "norms"),
}


@pytest.mark.parametrize("architecture", TIMM_MODELS)
def test_timm(architecture, tmp_path):
    pytest.importorskip("timm", reason="transformers wraps models of timm only where timm is installed")
    arguments, space = TIMM_MODELS[architecture]
    member = Member("timm_wrapper", {"architecture": architecture, "model_args": arguments})
    check_member(member, space, tmp_path)


def test_every_vision_model_of_transformers_has_its_line():
    """A new one makes this fail: add it to `tests/helpers/families.py`, as what it turns out to be."""
    known = {member.model_type for _, member in [*MEMBERS, *TRIED]} | {"timm_wrapper"}
    for refused in REFUSED:
        known |= set(refused.untried)
    types = {*modeling_auto.MODEL_FOR_IMAGE_MAPPING_NAMES, *modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES}
    types |= {*modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES}
    types |= {*modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES}
    assert not types - known, "vision models without a line in the table of backbones"


def test_the_table_of_the_readme():
    text = README.read_text(encoding="utf-8")
    table = text.split("<!-- backbones -->\n")[1].split("\n<!-- end -->")[0]
    assert table == render_table()
