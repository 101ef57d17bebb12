from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_hyperflow.modeling.lda import RegularisedLDA, spread_between, within_covariance
from hf_hyperflow.modeling.leave_one_out import leave_one_out_logits
from hf_hyperflow.modeling.prototypes import PrototypeClassifier, class_means, unit_means
from tests.helpers.tiny import pictures, tiny_adapter

LABELS = torch.tensor([0, 2, 1, 0, 0, 2, 0, 1, 0])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def lda():
    """A metric of width 6 with a prior."""
    lda = RegularisedLDA(6).double()
    root = random(6, 6, seed=5)
    lda.set_prior(root @ root.T, spread=5.0, count=3.0)
    return lda


def prior(lda, features, labels=LABELS):
    """What the lda adds to R^T R for these images, written out."""
    ridge = (spread_between(features, labels) / lda.spread) ** 4
    covariance = lda.directions @ lda.variances.diag() @ lda.directions.T
    return covariance + ridge * covariance.diagonal().mean() * torch.eye(len(covariance))


def test_it_starts_as_direct_transfer():
    features, balanced = random(9, 6), torch.arange(3).repeat(3)
    found = RegularisedLDA(6)(features, balanced)
    torch.testing.assert_close(found, unit_means(features, balanced), atol=1e-4, rtol=1e-4)


def test_mahalanobis_cosines(lda):
    """Against the inverse of the whole covariance; an image's own Mahalanobis length is taken to be the mean one."""
    labels = torch.tensor([0, 2, 1, 0, 1, 2, 0, 1, 2])
    features, query = random(9, 6), random(4, 6, seed=1)
    means = class_means(features, labels)
    spread = features - means[labels]
    inverse = torch.linalg.inv(spread.T @ spread + prior(lda, features, labels))
    lengths = torch.einsum("cd,de,ce->c", means, inverse, means).sqrt()
    logits = PrototypeClassifier.from_support(features, labels, head=lda)(query)
    units = [F.normalize(vectors, dim=1) for vectors in (features, query)]
    length = torch.einsum("nd,de,ne->n", units[0], inverse, units[0]).sqrt().mean()
    expected = units[1] @ inverse @ means.T / (lengths * length)
    torch.testing.assert_close(logits, 10 * expected)
    query_lengths = torch.einsum("nd,de,ne->n", units[1], inverse, units[1]).sqrt()[:, None]
    cosines = units[1] @ inverse @ means.T / (lengths * query_lengths)
    assert cosines.abs().max() <= 1
    torch.testing.assert_close(logits.argmax(1), cosines.argmax(1))


def expected_weights(lda, features, labels):
    """The weights of the classes from what signal and noise mean, image by image with inverse matrices."""
    counts = torch.bincount(labels)
    means = class_means(features, labels)
    residuals = features - means[labels]
    added = prior(lda, features, labels)
    inverse = torch.linalg.inv(residuals.T @ residuals + added)
    distances = []
    for i in range(len(labels)):
        if counts[labels[i]] == 1:
            continue
        kept = torch.arange(len(labels)) != i
        rest = features[kept] - class_means(features[kept], labels[kept])[labels[kept]]
        away = features[i] - features[kept & (labels == labels[i])].mean(dim=0)
        share = (counts[labels[i]] - 1) / counts[labels[i]]  # the others' mean has noise of its own
        distances.append(share * (away @ torch.linalg.inv(rest.T @ rest + added) @ away))
    noise = torch.stack(distances).mean()
    squares = torch.einsum("cd,de,ce->c", means, inverse, means)
    signal = torch.maximum((squares - noise / counts).mean(), 0.05 * squares.mean())
    typical = len(counts) / (1 / counts).sum()

    def expect_cosine(count):
        return signal / (signal + noise / count).sqrt()

    return (expect_cosine(typical) / expect_cosine(counts)).sqrt()


@pytest.mark.parametrize(
    "labels", [[0, 2, 1, 0, 0, 2, 0, 1, 0], [0, 0, 0, 0, 0, 1, 1, 2, 0], [0, 1, 2, 3, 3, 3, 3, 3, 3]]
)
def test_classes_with_few_images_are_weighed_up(lda, labels):
    labels = torch.tensor([int(label) for label in labels])
    centres = 3 * random(4, 6, seed=2)
    features = centres[labels] + 0.5 * random(9, 6)
    weights = expected_weights(lda, features, labels)
    counts = torch.bincount(labels)
    assert weights[counts.argmin()] > 1 > weights[counts.argmax()]
    means = class_means(features, labels)
    residuals = features - means[labels]
    inverse = torch.linalg.inv(residuals.T @ residuals + prior(lda, features, labels))
    lengths = torch.einsum("cd,de,ce->c", means, inverse, means).sqrt()
    units = F.normalize(features, dim=1)
    image_length = torch.einsum("nd,de,ne->n", units, inverse, units).sqrt().mean()
    expected = weights[:, None] * means @ inverse / (lengths[:, None] * image_length)
    torch.testing.assert_close(lda(features, labels), expected)


def test_an_unbalanced_support_set_is_classified_as_well_as_a_balanced_one():
    """Images of one and of eleven a class, in a geometry that is known: small classes are found as often as large."""
    width, generator = 64, torch.Generator().manual_seed(0)
    lda = RegularisedLDA(width)
    lda.set_prior(torch.eye(width), spread=1.0)
    labels = torch.tensor([0] * 11 + [1])
    recalls = []
    for _ in range(200):
        centres = torch.randn(2, width, generator=generator)
        features = centres[labels] + 1.5 * torch.randn(12, width, generator=generator)
        queries = centres.repeat(20, 1) + 1.5 * torch.randn(40, width, generator=generator)
        is_right = PrototypeClassifier(lda(features, labels))(queries).argmax(1) == torch.arange(2).repeat(20)
        recalls.append(is_right.view(20, 2).float().mean(dim=0))
    large, small = torch.stack(recalls).mean(dim=0).tolist()
    assert small > 0.75
    assert abs(large - small) < 0.1


def test_prior_is_what_it_is_set_to():
    root = random(6, 6)
    lda = RegularisedLDA(6).double()
    lda.set_prior(root @ root.T, spread=2.0, count=10.0)
    torch.testing.assert_close(lda.directions @ lda.variances.diag() @ lda.directions.T, 10 * root @ root.T)
    assert lda.spread == 2


@pytest.mark.parametrize(
    ("covariance", "spread"),
    [(torch.zeros(6, 6), 1.0), (torch.full((6, 6), float("nan")), 1.0), (torch.eye(6), 0.0)],
    ids=["zero", "NaN", "no spread"],
)
def test_a_covariance_of_nothing_is_an_error(covariance, spread):
    with pytest.raises(ValueError, match="zero or not finite"):
        RegularisedLDA(6).set_prior(covariance, spread)


def test_classes_far_apart_are_compared_by_plain_cosines():
    """The wider the spread, the less the prior counts."""
    lda = RegularisedLDA(6).double()
    lda.set_prior(torch.diag(torch.arange(1.0, 7.0).double()), spread=1.0)
    features = F.normalize(random(3, 6), dim=1)
    angles = []
    for scale in (0.5, 1.0, 2.0, 4.0):
        prototypes = lda(scale * features, torch.arange(3))
        angles.append(1 - (F.normalize(prototypes, dim=1) * features).sum(1).mean())
    assert angles == sorted(angles, reverse=True)
    assert angles[-1] < 1e-4 < angles[0]


def test_a_singular_covariance_is_no_obstacle():
    lda = RegularisedLDA(6)
    lda.set_prior(torch.diag(torch.tensor([1.0, 1, 0, 0, 0, 0])), spread=1e6)
    assert lda(random(9, 6).float(), LABELS).isfinite().all()


def test_spread_is_half_the_squared_distance_of_images_of_different_classes():
    features = random(9, 6)
    means = [
        torch.cdist(features[c == LABELS], features[d == LABELS]).square().mean() / 2
        for c, d in [(0, 1), (0, 2), (1, 2)]
    ]
    torch.testing.assert_close(spread_between(features, LABELS), torch.stack(means).mean())


def test_a_direction_in_which_classes_spread_counts_less():
    """Two classes that differ in the second feature alone; the first is noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2).repeat_interleave(20)
    features = torch.stack([5 * torch.randn(40, generator=generator), 2.0 * labels - 1], dim=1)
    query = torch.stack([5 * torch.randn(200, generator=generator), 2.0 * torch.arange(200).remainder(2) - 1], dim=1)
    lda = RegularisedLDA(2)
    lda.set_prior(torch.eye(2), spread=10.0, count=1.0)
    accuracies = [
        (PrototypeClassifier.from_support(features, labels, head=head)(query).argmax(1) == torch.arange(200) % 2)
        .float()
        .mean()
        for head in (unit_means, lda)
    ]
    assert accuracies[1] > 0.95 > accuracies[0]


def test_order_of_images_and_classes(lda):
    features = random(9, 6)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    expected = lda(features, LABELS)
    torch.testing.assert_close(lda(features[order], LABELS[order]), expected)
    names = torch.tensor([2, 0, 1])
    torch.testing.assert_close(lda(features, names[LABELS])[names], expected)


def test_differentiable(lda):
    assert torch.autograd.gradcheck(lambda features: lda(features, LABELS), random(9, 6).requires_grad_())


@pytest.mark.parametrize("features", [torch.zeros(4, 6), torch.ones(4, 6)], ids=["zeros", "all the same"])
def test_degenerate_images_give_finite_prototypes(features):
    lda = RegularisedLDA(6)
    assert lda(features, torch.tensor([0, 0, 1, 1])).isfinite().all()


def test_one_image_of_each_class_is_compared_in_the_measured_part(lda):
    features, query = random(3, 6), random(4, 6, seed=1)
    logits = PrototypeClassifier.from_support(features, torch.arange(3), head=lda)(query)
    inverse = torch.linalg.inv(prior(lda, features, torch.arange(3)))
    expected = query @ inverse @ features.T / torch.einsum("cd,de,ce->c", features, inverse, features).sqrt()
    torch.testing.assert_close(F.normalize(logits, dim=1), F.normalize(expected, dim=1))


def test_leave_one_out_against_brute_force(lda):
    features = random(9, 6)
    logits = leave_one_out_logits(features, LABELS, 5.0, lda)
    for i in range(9):
        kept = torch.arange(9) != i
        oracle = PrototypeClassifier.from_support(features[kept], LABELS[kept], 5.0, lda)(features[i : i + 1])
        torch.testing.assert_close(logits[i], oracle[0])


def test_within_covariance_is_that_of_the_centred_classes():
    features = random(9, 6)
    expected = sum(features[c == LABELS].T.cov() * ((c == LABELS).sum() - 1) for c in range(3)) / 6
    torch.testing.assert_close(within_covariance(features, LABELS), expected)


def test_the_adapter_classifies_by_its_lda(backbone, pixels, tmp_path):
    """In use, saved and loaded again, and with early stopping."""
    adapter = tiny_adapter(backbone, lda=True)
    root = random(32, 32).float()
    adapter.head.set_prior(root @ root.T / 32, spread=10.0, count=3.0)
    support = pictures(n_way=3, n_shot=4)
    task = adapter.adapt(backbone, support)
    with torch.no_grad():
        logits = task.logits(pixels)
        split = adapter.split(backbone)
        values = adapter.processor([image for c in support.values() for image in c], return_tensors="pt")
        features = split.forward_features(values["pixel_values"])
        labels = torch.arange(3).repeat_interleave(4)
        scale = adapter.logit_scale.exp()
        expected = PrototypeClassifier.from_support(features, labels, scale, adapter.head)(
            split.forward_features(pixels)
        )
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    adapter.save_pretrained(tmp_path)
    again = type(adapter).from_pretrained(tmp_path)
    assert torch.equal(again.head.directions, adapter.head.directions)
    torch.testing.assert_close(again.adapt(backbone, support).logits(pixels), logits)
    assert adapter.adapt(backbone, support, early_stopping=True).stopping_point.accuracies
