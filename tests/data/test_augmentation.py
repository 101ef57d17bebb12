from __future__ import annotations

import pytest
import torch

from hf_hyperflow.data.augmentation import _CHANGES, random_views, randomize_domain


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (4, 3, 20, 28), dtype=torch.uint8, generator=generator)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("function", [random_views, randomize_domain])
def test_shape_range_and_seed(images, function):
    before = images.clone()
    for seed in range(30):
        torch.manual_seed(seed)
        views = function(images, seeded(seed))
        assert views.shape == images.shape
        assert views.dtype == torch.float32
        assert views.isfinite().all()
        assert views.min() >= 0
        assert views.max() <= 255
        torch.manual_seed(seed + 1)
        assert torch.equal(function(images, seeded(seed)), views)
        assert not torch.equal(function(images, seeded(seed + 100)), views)
    assert torch.equal(images, before)


def test_views_of_one_image_differ(images):
    views = random_views(images[:1].expand(8, -1, -1, -1), seeded(0))
    assert torch.pdist(views.flatten(1)).min() > 1


def test_an_even_picture_stays_even_in_every_view():
    """Crops and flips invent no edges, and colours change for the whole picture at once."""
    plain = torch.tensor([200, 100, 50], dtype=torch.uint8).view(1, 3, 1, 1).expand(16, 3, 20, 20)
    views = random_views(plain, seeded(0))
    assert (views.flatten(2).amax(-1) - views.flatten(2).amin(-1)).max() < 1e-2
    assert torch.equal(views[:, :, 0, 0].argsort(dim=1, descending=True), torch.arange(3).expand(16, 3))


def test_whole_area_is_at_most_a_flip_and_a_change_of_ratio(images):
    views = random_views(images, seeded(3), min_area=1.0)
    assert views.shape == images.shape
    with pytest.raises(AssertionError):
        torch.testing.assert_close(views, images.float())


@pytest.mark.parametrize("seed", range(24))
def test_a_made_domain_is_the_same_change_for_all_images(seed):
    """A picture in a domain of equal pictures comes out equal at every place, also when noise is not in the chain."""
    picture = torch.randint(0, 256, (1, 3, 24, 24), generator=seeded(50))
    batch = picture.expand(5, -1, -1, -1)
    made = randomize_domain(batch, seeded(seed))
    if any(_CHANGES[i].__name__ == "_noise" for i in chain(seed)):
        assert (made - made[:1]).abs().mean() < 60  # noise is drawn for each image, of the same strength
    else:
        torch.testing.assert_close(made, made[:1].expand(5, -1, -1, -1), rtol=1e-5, atol=1e-3)


def chain(seed: int) -> list[int]:
    """The changes that `randomize_domain` makes with this seed."""
    generator = seeded(seed)
    length = int(torch.randint(1, 4, (), generator=generator))
    return torch.randperm(len(_CHANGES), generator=generator)[:length].tolist()


@pytest.mark.parametrize("change", _CHANGES, ids=lambda change: change.__name__)
def test_each_change_keeps_the_shape_and_changes_something(images, change):
    changed = change(images.float(), seeded(4)).clamp(0, 255)
    assert changed.shape == images.shape
    assert changed.isfinite().all()
    assert (changed - images).abs().max() > 1


def test_every_change_is_used():
    assert {i for seed in range(120) for i in chain(seed)} == set(range(len(_CHANGES)))


def pictures_of_every_kind() -> torch.Tensor:
    """Bright, dark, nearly empty, low in contrast, of one stroke, of one colour but for a corner."""
    images = torch.full((7, 3, 24, 24), 255.0)
    images[0] = 235 + 20 * torch.rand(3, 24, 24, generator=seeded(1))
    images[1] = 20 * torch.rand(3, 24, 24, generator=seeded(2))
    images[2, :, 3:6, 4] = 0
    images[3] = 120 + 10 * torch.rand(3, 24, 24, generator=seeded(3))
    images[4, :, 12] = 0
    images[5] = 0
    images[5, :, :4, :4] = 60
    images[6] = torch.randint(0, 256, (3, 24, 24), generator=seeded(4))
    return images


def test_a_made_domain_leaves_content_in_every_image():
    images = pictures_of_every_kind()
    for seed in range(500):
        made = randomize_domain(images, seeded(seed))
        pixels = made.flatten(2)
        assert (pixels.amax(2) - pixels.amin(2)).amax(1).min() >= 8, f"seed {seed}: {chain(seed)}"


def test_a_picture_without_content_does_not_stop_the_changes():
    blank = torch.cat([pictures_of_every_kind()[6:], torch.full((1, 3, 24, 24), 90.0)])
    assert sum(not torch.equal(randomize_domain(blank, seeded(seed)), blank) for seed in range(40)) == 40
