from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_hyperflow.modeling.views import MAX_VIEWS, combine_views, make_view, require_views
from tests.helpers.tiny import pictures


@pytest.fixture
def images():
    return torch.randn(2, 3, 20, 30, generator=torch.Generator().manual_seed(0))


def test_views_of_images(images):
    torch.testing.assert_close(make_view(images, 0), images, rtol=0, atol=0)
    torch.testing.assert_close(make_view(images, 3)[..., 0], images[..., -1], rtol=0, atol=0)
    corners = {1: images[..., :16, :24], 2: images[..., 4:, 6:]}
    for number, corner in corners.items():
        expected = F.interpolate(corner, size=(20, 30), mode="bicubic", antialias=True)
        torch.testing.assert_close(make_view(images, number), expected)
    assert {make_view(images.half(), number).dtype for number in range(MAX_VIEWS)} == {torch.float16}


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (3, 1)])
def test_views_of_tiny_images(size):
    image = torch.ones(1, 3, *size)
    for number in range(MAX_VIEWS):
        torch.testing.assert_close(make_view(image, number), image)


def test_combined_features_have_the_mean_direction_and_the_first_length():
    first, second = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 100.0]])
    torch.testing.assert_close(combine_views([first, second]), torch.tensor([[1.0, 1.0]]) * 3 / 2**0.5)
    assert combine_views([first]) is first


@pytest.mark.parametrize("views", [0, 5, -1, 2.0, "4", True])
def test_numbers_of_views(views, adapter, backbone):
    with pytest.raises(ValueError, match="views must be a whole number from 1 to 4"):
        require_views(views)
    with pytest.raises(ValueError, match="views must be"):
        adapter.adapt(backbone, pictures(), views=views)
    with pytest.raises(ValueError, match="views must be"):
        adapter.adapt(backbone, pictures()).predict(pictures()["red"], views=views)


def test_views_of_the_support_set(adapter, backbone):
    """The prototypes are those of the averaged features of each image and its views, whatever the task's weights."""
    support = pictures()
    task = adapter.adapt(backbone, support, views=4)
    plain = adapter.adapt(backbone, support)
    values = adapter.processor([image for shots in support.values() for image in shots], return_tensors="pt")
    features = []
    for number in range(4):
        view = make_view(values["pixel_values"], number)
        with torch.no_grad(), plain._adapted():
            features.append(plain._split.forward_features(view))
    means = combine_views(features).unflatten(0, (3, 2)).mean(1)
    torch.testing.assert_close(task.prototypes, F.normalize(means, dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(task.theta, plain.theta, rtol=0, atol=0)  # the flow reads the images as they are
    assert (task.prototypes - plain.prototypes).abs().max() > 1e-3


def test_views_of_the_images_to_classify(adapter, backbone, pixels):
    task = adapter.adapt(backbone, pictures())
    features = []
    for number in range(2):
        with torch.no_grad(), task._adapted():
            features.append(task._split.forward_features(make_view(pixels, number)))
    expected = task.scale * F.normalize(combine_views(features), dim=1) @ task.prototypes.T
    torch.testing.assert_close(task.logits(pixels, views=2), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(task.scores(pixels, views=2), expected.softmax(1), rtol=1e-4, atol=1e-4)


def test_mirrored_images_are_classified_alike_with_all_views(adapter, backbone, pixels):
    """The image and its mirror image have the first and the last view in common."""
    task = adapter.adapt(backbone, pictures())
    by_hand = []
    for images in (pixels, pixels.flip(-1)):
        with torch.no_grad(), task._adapted():
            views = [task._split.forward_features(make_view(images, number)) for number in (0, 3)]
        by_hand.append(F.normalize(combine_views(views), dim=1))
    torch.testing.assert_close(by_hand[0], by_hand[1], rtol=1e-4, atol=1e-4)


def test_the_number_of_views_is_the_adapters_by_default(adapter, backbone):
    expected = adapter.adapt(backbone, pictures(), views=3).prototypes
    adapter.config.views = 3
    torch.testing.assert_close(adapter.adapt(backbone, pictures()).prototypes, expected, rtol=0, atol=0)


def test_a_backbone_that_is_moved_before_the_classes_are_learned(adapter, backbone):
    task, support = adapter.adapt(backbone, pictures(), views=2), pictures()
    backbone.to(torch.bfloat16)
    assert task.scores(support["red"]).isfinite().all()
