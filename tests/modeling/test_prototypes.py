from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_hyperflow.modeling.leave_one_out import leave_one_out_logits
from hf_hyperflow.modeling.prototypes import PrototypeClassifier, class_means


@pytest.fixture
def features():
    return torch.randn(9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


UNBALANCED = torch.tensor([0, 2, 1, 0, 0, 2, 0, 1, 0])


def test_unbalanced_means_are_the_means_of_each_class(features):
    means = class_means(features, UNBALANCED)
    for c in range(3):
        torch.testing.assert_close(means[c], features[c == UNBALANCED].mean(dim=0))


def test_logits_are_scaled_cosines(features):
    classifier = PrototypeClassifier.from_support(features, UNBALANCED, scale=7.0)
    query = torch.randn(4, 6, dtype=torch.float64)
    expected = 7 * F.cosine_similarity(query[:, None], classifier.prototypes[None], dim=-1)
    torch.testing.assert_close(classifier(query), expected)
    torch.testing.assert_close(classifier(3 * query), expected)


def test_one_shot_prototypes_are_the_images_themselves(features):
    classifier = PrototypeClassifier.from_support(features, torch.arange(9))
    torch.testing.assert_close(classifier.prototypes, F.normalize(features, dim=1))
    assert classifier(features).argmax(-1).tolist() == list(range(9))


def test_order_of_images_does_not_matter(features):
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    shuffled = class_means(features[order], UNBALANCED[order])
    torch.testing.assert_close(shuffled, class_means(features, UNBALANCED))


def test_order_of_classes_permutes_the_logits(features):
    order = torch.tensor([2, 0, 1])  # class c is now called order[c]
    plain = PrototypeClassifier.from_support(features, UNBALANCED)(features)
    renamed = PrototypeClassifier.from_support(features, order[UNBALANCED])(features)
    torch.testing.assert_close(renamed[:, order], plain)


def test_scores_sum_to_one_and_the_scale_sharpens_them(features):
    soft = PrototypeClassifier.from_support(features, UNBALANCED, scale=1.0)(features).softmax(-1)
    sharp = PrototypeClassifier.from_support(features, UNBALANCED, scale=50.0)(features).softmax(-1)
    torch.testing.assert_close(soft.sum(-1), torch.ones(9, dtype=torch.float64))
    torch.testing.assert_close(sharp.sum(-1), torch.ones(9, dtype=torch.float64))
    assert (sharp.amax(-1) > soft.amax(-1)).all()


def test_differentiable_in_features_and_scale(features):
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    features.requires_grad_(True)

    def loss(f, s):
        return F.cross_entropy(PrototypeClassifier.from_support(f, UNBALANCED, s)(f), UNBALANCED)

    assert torch.autograd.gradcheck(loss, (features, scale))


def test_leave_one_out_against_brute_force(features):
    found = leave_one_out_logits(features, UNBALANCED, 5.0)
    for i in range(9):
        kept = torch.arange(9) != i
        oracle = PrototypeClassifier.from_support(features[kept], UNBALANCED[kept], 5.0)(features[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], oracle)


def test_leave_one_out_of_a_class_with_one_image_is_nan(features):
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2])
    found = leave_one_out_logits(features, labels, 1.0)
    assert found[8].isnan().all()
    assert found[:8].isfinite().all()


def test_autocast_leaves_the_cosines_exact(features):
    single = features.float()
    expected = PrototypeClassifier.from_support(single, UNBALANCED)(single)
    with torch.autocast("cpu", torch.bfloat16):
        found = PrototypeClassifier.from_support(single, UNBALANCED)(single)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
