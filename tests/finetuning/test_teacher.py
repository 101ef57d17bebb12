"""The batched teacher against a plain loop, task by task; tasks that go wrong keep it to themselves."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from hf_hyperflow.data.domains import normalise
from hf_hyperflow.finetuning.merged_target import MergedTarget
from hf_hyperflow.finetuning.teacher import RandomDraws, Recording, Teacher, fine_tune_tasks
from hf_hyperflow.modeling.backbones import SplitBackbone
from hf_hyperflow.modeling.parameter_space import ParameterSpace
from hf_hyperflow.modeling.peft_configs import bias_config, layernorm_config, lora_config
from hf_hyperflow.modeling.prototypes import PrototypeClassifier
from tests.helpers.tiny import SIZE, Snapshot

N_WAY, N_SHOT, N_QUERY = 3, 2, 4
LABELS, QUERY_LABELS = (torch.arange(N_WAY).repeat_interleave(n) for n in (N_SHOT, N_QUERY))
TEACHER = Teacher(steps=5, n_points=4, n_views=2, learning_rate=3e-3)
CONFIGS = {"bias": bias_config, "lora": lora_config, "layernorm": layernorm_config}


def seeds(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in range(n)]


@pytest.fixture
def images():
    """Four tasks whose classes differ in colour, under noise."""
    generator = torch.Generator().manual_seed(0)
    colours = 255 * (0.35 + 0.3 * torch.rand(4, N_WAY, 3, 1, 1, generator=generator))
    clean = torch.cat([colours[:, LABELS], colours[:, QUERY_LABELS]], dim=1)
    return (clean + 60 * torch.randn(4, clean.shape[1], 3, SIZE, SIZE, generator=generator)).clamp(0, 255)


def run(space, backbone, images, processor, teacher=TEACHER, generators=None):
    n = len(images)
    labels, query_labels = LABELS.expand(n, -1), QUERY_LABELS.expand(n, -1)
    target = MergedTarget(space, SplitBackbone(backbone, 2))
    return fine_tune_tasks(target, images, labels, query_labels, processor, teacher, generators or seeds(n))


def bound_accuracy(logits, labels) -> tuple[float, float]:
    """The least and the greatest accuracy in % that rounding may give: classes may be level."""
    best, second = logits.topk(2).values.T
    is_right, is_level = logits.argmax(-1) == labels, best - second < 0.01
    least, most = is_right & ~is_level, is_right | is_level
    return 100 * least.float().mean().item() - 0.01, 100 * most.float().mean().item() + 0.01


def plain_loop(space, backbone, images, processor, generator):
    """The same on one task: ordinary forward passes of the whole model, Adam on PEFT's own parameters."""
    injection = space.inject(backbone)
    start = injection.start
    n_support = len(LABELS)
    draws = RandomDraws.draw(space, images[:n_support], TEACHER, generator)
    injection.write(start + draws.noise)
    for parameter in injection.parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(injection.parameters, lr=TEACHER.learning_rate)
    deltas, losses, support_accuracy, query_accuracy = [], [], [], []
    for step in range(TEACHER.steps + 1):
        views = draws.views[draws.choices[step], torch.arange(n_support)]
        pixels = normalise(torch.cat([images, views]), processor)
        features = backbone(pixels).last_hidden_state[:, 0]
        support, query, augmented = features.split([n_support, len(QUERY_LABELS), n_support])
        classifier = PrototypeClassifier.from_support(support, LABELS, TEACHER.scale)
        loss = F.cross_entropy(classifier(augmented), LABELS)
        losses.append(loss.item())
        if step in TEACHER.recorded:
            deltas.append(injection.read() - start)
            support_accuracy.append(bound_accuracy(classifier(augmented), LABELS))
            query_accuracy.append(bound_accuracy(classifier(query), QUERY_LABELS))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for parameter in injection.parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    injection.write(start)
    return torch.stack(deltas), torch.tensor(losses), torch.tensor(support_accuracy), torch.tensor(query_accuracy)


@pytest.mark.parametrize("kind", CONFIGS)
def test_equals_a_plain_loop(backbone, images, processor, kind):
    space = ParameterSpace.from_backbone(backbone, CONFIGS[kind](backbone, 2))
    recording = run(space, backbone, images, processor)
    assert recording.deltas.shape == (4, 4, space.n_tokens, space.token_dim)
    assert not recording.diverged.any()
    for i, generator in enumerate(seeds(4)):
        deltas, losses, support, query = plain_loop(space, backbone, images[i], processor, generator)
        torch.testing.assert_close(recording.losses[i], losses, rtol=1e-3, atol=1e-4)
        for accuracy, bounds in ((recording.support_accuracy[i], support), (recording.query_accuracy[i], query)):
            assert ((bounds[:, 0] <= accuracy) & (accuracy <= bounds[:, 1])).all()
            assert (bounds[:, 1] - bounds[:, 0]).mean() < 20, "most answers are compared"
        # Adam turns gradients of nearly zero into steps of a sign that rounding decides: compare almost all numbers.
        close = ((recording.deltas[i] - deltas).abs() < 1e-4)[:, space.mask]
        assert close.float().mean() > 0.98
    moved = (recording.deltas[:, -1] - recording.deltas[:, 0])[:, space.mask].abs()
    assert 1e-3 < moved.mean() < 5 * 3e-3
    assert not recording.deltas[:, :, ~space.mask].any()


def assert_same_task(recording: Recording, other: Recording, row: int, other_row: int) -> None:
    """The same fine-tuning up to rounding, which Adam can turn into a step of another sign where a gradient is zero."""
    torch.testing.assert_close(recording.losses[row], other.losses[other_row], rtol=1e-3, atol=1e-4)
    is_close = (recording.deltas[row] - other.deltas[other_row]).abs() < 1e-4
    assert is_close.float().mean() > 0.98


def test_learns_and_leaves_the_backbone_alone(backbone, images, processor):
    space = ParameterSpace.from_backbone(backbone, bias_config(backbone, 2))
    space.inject(backbone)
    before = Snapshot(backbone)
    recording = run(space, backbone, images, processor, Teacher(steps=30, n_points=2, learning_rate=3e-3))
    before.assert_unchanged()
    assert (recording.losses[:, -5:].mean(dim=1) < recording.losses[:, :5].mean(dim=1)).all()
    assert ((recording.query_accuracy >= 0) & (recording.query_accuracy <= 100)).all()


def test_a_task_does_not_depend_on_the_others(backbone, images, processor):
    space = ParameterSpace.from_backbone(backbone, bias_config(backbone, 2))
    recording = run(space, backbone, images, processor)
    other = images.clone()
    other[1:] = 255 - other[1:]
    again = run(space, backbone, other, processor)
    assert_same_task(again, recording, 0, 0)
    assert (again.losses[1] - recording.losses[1]).abs().max() > 1e-2
    alone = run(space, backbone, images[2:3], processor, generators=seeds(3)[2:])
    assert_same_task(alone, recording, 0, 2)


def test_a_task_that_diverges_is_marked_and_harms_no_other(backbone, images, processor):
    space = ParameterSpace.from_backbone(backbone, bias_config(backbone, 2))
    recording = run(space, backbone, images, processor)
    broken = images.clone()
    broken[1, 0] = float("nan")
    beside = run(space, backbone, broken, processor)
    assert beside.diverged.tolist() == [False, True, False, False]
    for row in (0, 2, 3):
        assert_same_task(beside, recording, row, row)
    assert run(space, backbone, images, processor, Teacher(steps=3, learning_rate=1e30)).diverged.all()
    # What half precision cannot hold counts, too.
    assert run(space, backbone, images[:1], processor, Teacher(steps=1, noise=1e6)).diverged.all()


def test_start_is_noisy_and_what_is_drawn_is_the_tasks_own(backbone, images, processor):
    space = ParameterSpace.from_backbone(backbone, lora_config(backbone, 2))
    recording = run(space, backbone, images, processor, Teacher(steps=2, noise=0.01))
    start = recording.deltas[:, 0][:, space.mask]
    assert start.std().item() == pytest.approx(0.01, rel=0.1)
    assert torch.pdist(start).min() > 0
    exact = run(space, backbone, images, processor, Teacher(steps=2, noise=0))
    assert not exact.deltas[:, 0].any()


def test_points_are_denser_early_and_end_at_the_end():
    assert Teacher().recorded == [0, 1, 2, 3, 5, 7, 10, 12]
    assert Teacher(steps=3).recorded == [0, 1, 2, 3]
    assert Teacher(steps=50, n_points=2).times == [0.0, 1.0]
    steps = Teacher(steps=100, n_points=6).recorded
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert gaps == sorted(gaps)


@pytest.mark.parametrize(("name", "least"), [("steps", 1), ("n_views", 1), ("n_points", 2)])
def test_a_teacher_that_cannot_teach_is_refused(name, least):
    with pytest.raises(ValueError, match=f"{name} must be at least {least}, not {least - 1}"):
        Teacher(**{name: least - 1})


def test_known_draws(backbone):
    """Recorded trajectories name seeds: what a seed draws may not change. Computed with version 0.1."""
    space = ParameterSpace.from_backbone(backbone, bias_config(backbone, 2))
    support = 255 * torch.linspace(0, 1, 6 * 3 * SIZE * SIZE).view(6, 3, SIZE, SIZE)
    teacher, generator = Teacher(steps=3, n_views=2), torch.Generator().manual_seed(7)
    draws = RandomDraws.draw(space, support, teacher, generator)
    assert draws.noise[0, :4].tolist() == pytest.approx([-4.1007e-4, 1.9782e-4, 4.4945e-4, -6.9420e-4], abs=1e-7)
    assert draws.choices.tolist() == [[1, 0, 0, 0, 1, 0], [1, 1, 1, 1, 1, 0], [1, 1, 0, 1, 1, 1], [0, 1, 0, 0, 0, 0]]
    assert draws.views.shape == (2, *support.shape)
    assert draws.views[:, 2].mean(dim=(1, 2, 3)).tolist() == pytest.approx([135.54, 136.06], abs=0.1)
