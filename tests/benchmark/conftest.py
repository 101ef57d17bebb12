"""A tiny target with a regularised LDA, and a domain of five colours for it."""

from __future__ import annotations

import pytest
import torch

from hf_hyperflow.benchmark.domain_features import DomainFeatures
from hf_hyperflow.benchmark.methods import Target
from hf_hyperflow.data.domains import Domain, resize_images
from hf_hyperflow.data.episodes import Episode, cdfsl_episode
from tests.helpers.tiny import picture, tiny_adapter


@pytest.fixture
def colours(processor) -> Domain:
    images = []
    for c in range(5):
        colour = (110 + 30 * (c % 2), 110 + 30 * (c // 2 % 2), 110 + 30 * (c // 4))
        images += [picture(100 * c + i, colour=colour) for i in range(10)]
    labels = torch.arange(5).repeat_interleave(10)
    return Domain("colours", resize_images(images, processor), labels, list("abcde"))


@pytest.fixture
def target(backbone, processor) -> Target:
    adapter = tiny_adapter(backbone, processor=processor, lda=True, intermediate_weight=0.5)
    adapter.head.set_prior(torch.eye(64), spread=10.0, count=3.0)
    return Target(backbone, adapter)


@pytest.fixture
def pair(target, tmp_path) -> tuple[str, str]:
    """The folders of the target's backbone and adapter."""
    target.backbone.save_pretrained(tmp_path / "backbone")
    target.adapter.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "backbone"), str(tmp_path / "adapter")


@pytest.fixture
def features(target, colours) -> DomainFeatures:
    return DomainFeatures(target, colours)


@pytest.fixture
def episode(colours) -> Episode:
    """5 ways, 2 shots, 6 queries of each class."""
    return cdfsl_episode(colours, 0, n_way=5, n_shot=2, n_query=6)
