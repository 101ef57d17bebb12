from __future__ import annotations

import pytest
import torch

from hf_hyperflow.data.domains import resize_images
from hf_hyperflow.finetuning.finetune import FineTuningConfig, draw_batches, fine_tune
from hf_hyperflow.modeling.backbones import SplitBackbone
from hf_hyperflow.modeling.parameter_space import ParameterSpace
from hf_hyperflow.modeling.peft_configs import bias_config
from tests.helpers.tiny import Snapshot, pictures, same_bits

LABELS = torch.arange(3).repeat_interleave(4)


@pytest.fixture
def images(processor):
    return resize_images([image for images in pictures(3, 4).values() for image in images], processor)


def test_the_loss_goes_down_and_only_given_parameters_move(backbone, images, processor):
    before = Snapshot(backbone)
    moving = {n: p for n, p in backbone.named_parameters() if n.endswith(".bias")}
    recipe = FineTuningConfig(steps=20, learning_rate=3e-3)
    losses = fine_tune(SplitBackbone(backbone, 0), list(moving.values()), images, LABELS, processor, recipe)
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    now = backbone.state_dict()
    moved = {name for name, tensor in before.bits.items() if not same_bits(now[name], tensor)}
    keys = {name for name in moving if "k_proj" in name}  # softmax forgets them: all but no gradient
    assert set(moving) - keys <= moved <= set(moving)
    with torch.no_grad():
        for name, tensor in before.bits.items():
            now[name].copy_(tensor)
    before.assert_unchanged()


def test_flags_and_gradients_are_as_before(backbone, images, processor):
    for parameter in backbone.embeddings.parameters():
        parameter.requires_grad_(False)
    backbone.layernorm.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in backbone.named_parameters()}
    moving = [backbone.layernorm.weight, backbone.encoder.layer[3].mlp.fc2.bias]
    fine_tune(SplitBackbone(backbone, 0), moving, images, LABELS, processor, FineTuningConfig(steps=2))
    assert {name: p.requires_grad for name, p in backbone.named_parameters()} == flags
    assert all(p.grad is None for p in backbone.parameters())


def test_full_fine_tuning_with_parameters_that_are_not_used(backbone, images, processor):
    """The mask token of a Dinov2 takes no part in a forward pass."""
    mask_token = backbone.embeddings.mask_token.detach().clone()
    losses = fine_tune(
        SplitBackbone(backbone, 0), list(backbone.parameters()), images, LABELS, processor, FineTuningConfig(steps=3)
    )
    assert losses[-1] < losses[0]
    assert torch.equal(backbone.embeddings.mask_token, mask_token)


def test_the_recipe_decides_alone(backbone, images, processor):
    space = ParameterSpace.from_backbone(backbone, bias_config(backbone, 2))
    split, injection = SplitBackbone(backbone, 2), space.inject(backbone)

    def run(seed: int) -> tuple[list[float], torch.Tensor]:
        injection.write(injection.start)
        torch.manual_seed(torch.seed() % 1000)
        losses = fine_tune(split, injection.parameters, images, LABELS, processor, FineTuningConfig(steps=3, seed=seed))
        return losses, injection.read()

    (first, theta), (again, theta_again), (other, _) = run(0), run(0), run(1)
    assert first == again
    assert torch.equal(theta, theta_again)
    assert first != other
    assert not any(p.requires_grad for p in injection.parameters)


def test_frozen_blocks_run_once_for_each_view(backbone, images, processor):
    space = ParameterSpace.from_backbone(backbone, bias_config(backbone, 2))
    injection = space.inject(backbone)
    seen = []
    backbone.embeddings.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    losses = {}
    for start, steps in ((2, 5), (2, 1), (0, 1)):
        injection.write(injection.start)
        recipe, split = FineTuningConfig(steps=steps, n_views=1), SplitBackbone(backbone, start)
        losses[start, steps] = fine_tune(split, injection.parameters, images, LABELS, processor, recipe)
    assert sum(seen[:6]) == 2 * (1 + 12 + 12)
    assert losses[2, 5][0] == losses[2, 1][0] == pytest.approx(losses[0, 1][0], rel=1e-5)


@pytest.mark.parametrize("start", [0, 2])
def test_a_large_support_set_is_gone_through_in_batches(backbone, images, processor, start):
    """As many of each class as there is room for, drawn anew; nothing but the batches is run."""
    labels = torch.tensor([0] * 6 + [1] * 5 + [2])
    recipe, split = FineTuningConfig(steps=4, batch_size=7), SplitBackbone(backbone, start)
    batches = draw_batches(labels, recipe)
    assert len(batches) == 4
    drawn = [rows for batch in batches for rows in (batch.clean, batch.augmented)]
    for rows in drawn:
        assert torch.bincount(labels[rows]).tolist() == [2, 2, 1]
        assert len(rows.unique()) == len(rows)
    assert len({tuple(rows.tolist()) for rows in drawn}) > 4
    seen = []
    backbone.encoder.layer[3].register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    parameters = list(backbone.layernorm.parameters())
    losses = fine_tune(split, parameters, images, labels, processor, recipe)
    assert seen[-4:] == [10, 10, 10, 10]
    assert all(loss > 0 for loss in losses)


def test_a_small_support_set_is_taken_whole():
    whole = torch.arange(len(LABELS))
    for batch in draw_batches(LABELS, FineTuningConfig(steps=3, batch_size=12)):
        assert torch.equal(batch.clean, whole)
        assert torch.equal(batch.augmented, whole)
    many_classes = torch.arange(40).repeat_interleave(2)
    for batch in draw_batches(many_classes, FineTuningConfig(steps=3)):
        assert torch.equal(many_classes[batch.clean], torch.arange(40))
        assert torch.equal(many_classes[batch.augmented], torch.arange(40))


def test_no_steps_move_nothing(backbone, images, processor):
    before = Snapshot(backbone)
    assert (
        fine_tune(
            SplitBackbone(backbone, 0),
            list(backbone.parameters()),
            images,
            LABELS,
            processor,
            FineTuningConfig(steps=0),
        )
        == []
    )
    before.assert_unchanged()


@pytest.mark.parametrize("start", [0, 2])
def test_flags_are_restored_after_an_error(backbone, images, processor, start):
    parameters = list(backbone.layernorm.parameters())
    for parameter in parameters:
        parameter.requires_grad_(False)
    before = Snapshot(backbone)
    with pytest.raises(RuntimeError):
        fine_tune(
            SplitBackbone(backbone, start),
            parameters,
            images[:, :, :5, :5],
            LABELS,
            processor,
            FineTuningConfig(steps=1),
        )
    before.assert_unchanged()


def test_what_a_step_costs_can_be_seen_without_all_of_them(backbone, images, processor):
    """The first steps alone, with all that is done once for the whole recipe."""
    space = ParameterSpace.from_backbone(backbone, bias_config(backbone, 2))
    injection, split, recipe = space.inject(backbone), SplitBackbone(backbone, 2), FineTuningConfig(steps=6)
    seen, losses = [], []
    backbone.embeddings.register_forward_hook(lambda module, args, output: seen[-1].append(len(args[0])))
    for only in (2, None):
        seen.append([])
        injection.write(injection.start)
        losses.append(fine_tune(split, injection.parameters, images, LABELS, processor, recipe, only=only))
    assert losses[0] == losses[1][:2]
    assert len(losses[1]) == 6
    assert seen[0] == seen[1]
