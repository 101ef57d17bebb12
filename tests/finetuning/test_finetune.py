"""Fine-tuning: it learns, moves what it is given and nothing else, and draws what its config says."""

from __future__ import annotations

import pytest
import torch

from hf_hyperflow.data.domains import normalise, resize_images
from hf_hyperflow.finetuning.finetune import FineTuningConfig, draw_batches, fine_tune
from hf_hyperflow.modeling.backbones import SplitBackbone
from hf_hyperflow.modeling.parameter_space import ParameterSpace
from hf_hyperflow.modeling.peft_configs import bias_config
from hf_hyperflow.modeling.trunks import IncompatibleBackboneError
from tests.helpers.tiny import Snapshot, pictures, same_bits

LABELS = torch.arange(3).repeat_interleave(4)


@pytest.fixture
def images(processor):
    return resize_images([image for images in pictures(3, 4).values() for image in images], processor)


def test_the_loss_goes_down_and_only_given_parameters_move(backbone, images, processor):
    before = Snapshot(backbone)
    moving = {n: p for n, p in backbone.named_parameters() if n.endswith(".bias")}
    config = FineTuningConfig(steps=20, learning_rate=3e-3)
    losses = fine_tune(SplitBackbone(backbone, 0), list(moving.values()), images, LABELS, processor, config)
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


def test_a_run_is_a_function_of_its_config(backbone, images, processor):
    space = ParameterSpace.from_backbone(backbone, bias_config(backbone, 2))
    split, injection = SplitBackbone(backbone, 2), space.inject(backbone)

    def run(seed: int, global_seed: int) -> tuple[list[float], torch.Tensor]:
        torch.manual_seed(global_seed)
        config = FineTuningConfig(steps=3, seed=seed)
        with injection.tuning() as parameters:
            return fine_tune(split, parameters, images, LABELS, processor, config), injection.read()

    first, theta = run(0, global_seed=1)
    again, theta_again = run(0, global_seed=2)
    other, _ = run(1, global_seed=1)
    assert again == pytest.approx(first, rel=1e-5)
    torch.testing.assert_close(theta_again, theta)
    assert other != pytest.approx(first, rel=1e-3)
    assert not any(p.requires_grad for p in injection.parameters)


def test_frozen_blocks_run_once_for_each_view(backbone, images, processor):
    space = ParameterSpace.from_backbone(backbone, bias_config(backbone, 2))
    injection = space.inject(backbone)
    seen = []
    backbone.embeddings.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    losses = {}
    for start, steps in ((2, 5), (2, 1), (0, 1)):
        config, split = FineTuningConfig(steps=steps, n_views=1), SplitBackbone(backbone, start)
        with injection.tuning() as parameters:
            losses[start, steps] = fine_tune(split, parameters, images, LABELS, processor, config)
    assert sum(seen[:6]) == 2 * (1 + 12 + 12)
    assert losses[2, 5][0] == pytest.approx(losses[2, 1][0], rel=1e-5)
    assert losses[0, 1][0] == pytest.approx(losses[2, 1][0], rel=1e-5)


@pytest.mark.parametrize("start", [0, 2])
def test_a_large_support_set_is_gone_through_in_batches(backbone, images, processor, start):
    """As many of each class as there is room for, drawn anew; nothing but the batches is run."""
    labels = torch.tensor([0] * 6 + [1] * 5 + [2])
    config, split = FineTuningConfig(steps=4, batch_size=7), SplitBackbone(backbone, start)
    batches = draw_batches(labels, config)
    assert len(batches) == 4
    drawn = [rows for batch in batches for rows in (batch.clean, batch.augmented)]
    for rows in drawn:
        assert torch.bincount(labels[rows]).tolist() == [2, 2, 1]
        assert len(rows.unique()) == len(rows)
    assert len({tuple(rows.tolist()) for rows in drawn}) > 4
    seen = []
    backbone.encoder.layer[3].register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    parameters = list(backbone.layernorm.parameters())
    losses = fine_tune(split, parameters, images, labels, processor, config)
    assert seen[-4:] == [10, 10, 10, 10]
    assert all(loss > 0 for loss in losses)


def test_known_batches():
    """What a seed draws may not change: computed with version 0.1."""
    labels = torch.tensor([0, 1, 0, 1, 1, 2])
    batches = draw_batches(labels, FineTuningConfig(steps=3, batch_size=3))
    assert [batch.clean.tolist() for batch in batches] == [[0, 1, 5], [2, 4, 5], [0, 1, 5]]
    assert [batch.augmented.tolist() for batch in batches] == [[0, 3, 5], [0, 1, 5], [2, 4, 5]]
    assert [batch.views.tolist() for batch in batches] == [[4, 8, 2], [1, 1, 5], [1, 2, 6]]


def test_a_step_does_not_depend_on_how_many_follow():
    few, many = (draw_batches(LABELS, FineTuningConfig(steps=steps, batch_size=6)) for steps in (2, 7))
    for one, other in zip(few, many[:2], strict=True):
        assert torch.equal(one.clean, other.clean)
        assert torch.equal(one.augmented, other.augmented)
        assert torch.equal(one.views, other.views)


def test_after_each_step_the_features_are_those_of_the_step(backbone, images, processor):
    split, seen = SplitBackbone(backbone, 0), []
    pixels = normalise(images[:2], processor)

    def compute_features(step: int) -> None:
        with torch.no_grad():
            seen.append((step, split.forward_features(pixels)))

    parameters, config = list(backbone.layernorm.parameters()), FineTuningConfig(steps=3)
    fine_tune(split, parameters, images, LABELS, processor, config, after_step=compute_features)
    assert [step for step, _ in seen] == [1, 2, 3]
    assert (seen[0][1] - seen[2][1]).abs().max() > 1e-4
    with torch.no_grad():
        torch.testing.assert_close(seen[2][1], split.forward_features(pixels))


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
    split, config = SplitBackbone(backbone, 0), FineTuningConfig(steps=0)
    assert fine_tune(split, list(backbone.parameters()), images, LABELS, processor, config) == []
    before.assert_unchanged()


@pytest.mark.parametrize("start", [0, 2])
def test_flags_are_restored_after_an_error(backbone, images, processor, start):
    parameters = list(backbone.layernorm.parameters())
    for parameter in parameters:
        parameter.requires_grad_(False)
    before = Snapshot(backbone)
    split, config = SplitBackbone(backbone, start), FineTuningConfig(steps=1)

    def fail(step: int) -> None:
        raise RuntimeError(f"after step {step}")

    with pytest.raises(IncompatibleBackboneError, match="does not run on pixel values of shape"):
        fine_tune(split, parameters, images[:, :, :5, :5], LABELS, processor, config)
    before.assert_unchanged()
    weights = [parameter.detach().clone() for parameter in parameters]
    with pytest.raises(RuntimeError, match="after step 1"):
        fine_tune(split, parameters, images, LABELS, processor, config, after_step=fail)
    with torch.no_grad():
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)
    before.assert_unchanged()


def test_what_a_step_costs_can_be_seen_without_all_of_them(backbone, images, processor):
    """The first steps alone, with all that is done once for the whole config."""
    space = ParameterSpace.from_backbone(backbone, bias_config(backbone, 2))
    injection, split, config = space.inject(backbone), SplitBackbone(backbone, 2), FineTuningConfig(steps=6)
    seen, losses = [], []
    backbone.embeddings.register_forward_hook(lambda module, args, output: seen[-1].append(len(args[0])))
    for run_steps in (2, None):
        seen.append([])
        with injection.tuning() as parameters:
            losses.append(fine_tune(split, parameters, images, LABELS, processor, config, run_steps=run_steps))
    assert losses[0] == pytest.approx(losses[1][:2], rel=1e-5)
    assert len(losses[1]) == 6
    assert seen[0] == seen[1]
