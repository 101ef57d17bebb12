from __future__ import annotations

import pytest
import torch

from hf_hyperflow.modeling.task_encoder import TaskEncoder, pool_tokens, stack

LABELS = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3, 3])


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return TaskEncoder(12, 8)


@pytest.fixture
def features():
    return torch.randn(10, 12, generator=torch.Generator().manual_seed(0))


def test_shapes(encoder, features):
    tokens = encoder(features, LABELS)
    assert tokens.classes.shape == (1, 4, 8)
    assert tokens.present.shape == (1, 4)
    assert tokens.present.all()
    assert tokens.task.shape == (1, 8)


def test_order_of_images_does_not_matter(encoder, features):
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    plain, shuffled = encoder(features, LABELS), encoder(features[order], LABELS[order])
    torch.testing.assert_close(shuffled.classes, plain.classes)
    torch.testing.assert_close(shuffled.task, plain.task)


def test_order_of_classes_permutes_class_tokens_and_leaves_the_task_token(encoder, features):
    order = torch.tensor([3, 1, 0, 2])  # class c is now called order[c]
    plain, renamed = encoder(features, LABELS), encoder(features, order[LABELS])
    torch.testing.assert_close(renamed.classes[:, order], plain.classes)
    torch.testing.assert_close(renamed.task, plain.task)


def test_tokens_tell_mean_spread_shots_and_ways_apart(encoder):
    base = torch.randn(4, 12, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([0, 0, 1, 1])
    tokens = encoder(base, labels)
    mean = base[:2].mean(dim=0, keepdim=True)
    narrow = encoder(torch.cat([mean, mean, base[2:]]), labels)
    assert not torch.allclose(narrow.classes[0, 0], tokens.classes[0, 0], atol=1e-3)
    more_shots = encoder(torch.cat([base, base]), torch.cat([labels, labels]))
    assert not torch.allclose(more_shots.classes, tokens.classes, atol=1e-3)
    more_ways = encoder(torch.cat([base, base]), torch.cat([labels, labels + 2]))
    assert not torch.allclose(more_ways.task, tokens.task, atol=1e-3)
    torch.testing.assert_close(more_ways.classes[:, :2], tokens.classes)


def test_one_image_per_class_is_finite_also_in_its_gradient(encoder):
    features = torch.randn(3, 12, requires_grad=True)
    tokens = encoder(features, torch.arange(3))
    (tokens.classes.sum() + tokens.task.sum()).backward()
    assert tokens.classes.isfinite().all()
    assert features.grad.isfinite().all()


def test_half_precision_features(encoder, features):
    half = encoder(features.half(), LABELS)
    assert half.classes.dtype == torch.float32
    torch.testing.assert_close(half.classes, encoder(features, LABELS).classes, rtol=0.01, atol=0.01)


def test_stack_keeps_single_tasks_and_pads_the_rest(encoder, features):
    tasks = [encoder(features, LABELS), encoder(features[:5], LABELS[:5]), encoder(features[3:5], torch.arange(2))]
    stacked = stack(tasks)
    assert stacked.classes.shape == (3, 4, 8)
    assert stacked.present.sum(dim=1).tolist() == [4, 3, 2]
    for i, task in enumerate(tasks):
        n_way = task.classes.shape[1]
        assert torch.equal(stacked.classes[i, :n_way], task.classes[0])
        assert stacked.present[i, :n_way].all()
        assert not stacked.present[i, n_way:].any()
        assert torch.equal(stacked.task[i], task.task[0])


def test_pool_tokens():
    states = torch.randn(2, 5, 3)
    torch.testing.assert_close(pool_tokens(states), torch.cat([states[:, 0], states[:, 1:].mean(1)], dim=-1))
    feature_map = torch.randn(2, 3, 4, 5)
    flat = feature_map.flatten(2)
    torch.testing.assert_close(pool_tokens(feature_map), torch.cat([flat.mean(-1), flat.amax(-1)], dim=-1))
