"""Hidden states of training images: computed once, and the same to the bit whatever is kept."""

from __future__ import annotations

import pytest
import torch

from hf_hyperflow.benchmark.cost import count_flops
from hf_hyperflow.finetuning.merged_target import MergedTarget
from hf_hyperflow.modeling.backbones import SplitBackbone
from hf_hyperflow.modeling.parameter_space import ParameterSpace
from hf_hyperflow.modeling.peft_configs import bias_config
from hf_hyperflow.training.prefix_cache import ImageKey, PrefixCache
from tests.helpers.tiny import SIZE

N_IMAGES = 50
KEYS = [ImageKey("alpha", row, False) for row in range(N_IMAGES)]


@pytest.fixture
def target(backbone):
    return MergedTarget(ParameterSpace.from_backbone(backbone, bias_config(backbone, 2)), SplitBackbone(backbone, 2))


@pytest.fixture
def images():
    return torch.randn(N_IMAGES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_image_has_the_same_states_whatever_came_before(target, images, dtype):
    """To the bit: in other company, at another place, from the cache or not. Otherwise a resumed run would differ."""
    orders = [torch.arange(N_IMAGES), torch.arange(N_IMAGES).flip(0), torch.tensor([7]), torch.tensor([3, 7, 49, 11])]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        whole = PrefixCache(target, 10**9, dtype).forward_prefix(images, KEYS).states
        exact = target.forward_prefix(images).states
        worn, full = PrefixCache(target, 10**9, dtype), PrefixCache(target, 1, dtype)
        for order in orders:
            keys = [KEYS[row] for row in order]
            for cache in (PrefixCache(target, 10**9, dtype), worn, full):
                assert torch.equal(cache.forward_prefix(images[order], keys).states, whole[order])
    assert len(worn) == N_IMAGES
    assert len(full) == 0
    torch.testing.assert_close(whole, exact, rtol=1e-5 if dtype is None else 1e-2, atol=1e-5)


def test_an_image_is_run_once_and_one_without_a_key_every_time(target, images):
    cache = PrefixCache(target, 10**9)
    keys = [None, *KEYS[1:]]
    first = cache.forward_prefix(images, keys).states
    per_image = count_flops(lambda: target.forward_prefix(images[:1]))
    assert count_flops(lambda: cache.forward_prefix(images, keys)) == per_image
    assert torch.equal(cache.forward_prefix(images, keys).states, first)
    mirrored = [ImageKey(key.domain, key.row, True) for key in KEYS]
    states = cache.forward_prefix(images.flip(-1), mirrored).states
    assert (states - first).abs().max() > 0.01
    assert len(cache) == 2 * N_IMAGES - 1


def test_no_more_is_kept_than_there_is_room_for(target, images):
    n_bytes = target.forward_prefix(images[:1]).states.nbytes // 2
    cache = PrefixCache(target, 10 * n_bytes + 1, torch.bfloat16)
    cache.forward_prefix(images, KEYS)
    assert (len(cache), cache.n_bytes) == (10, 10 * n_bytes)
    whole = SplitBackbone(target.split.backbone, 2)
    whole.is_cut = False
    target.split = whole
    cache = PrefixCache(target, 10**9)
    assert torch.equal(cache.forward_prefix(images, KEYS).states, images), "nothing is run, so nothing is kept"
    assert len(cache) == 0
