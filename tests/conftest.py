"""Fixtures shared by all tests; what they are made of is in `tiny.py`."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.helpers.tiny import SIZE, pictures, tiny_adapter, tiny_dinov2, tiny_processor


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its first settings for the life of a process, and tests share one."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def backbone():
    """A Dinov2 of 4 blocks of width 32, for 28 px, in evaluation mode."""
    return tiny_dinov2()


@pytest.fixture
def processor():
    return tiny_processor()


@pytest.fixture
def adapter(backbone):
    """A HyperFlow adapter for `backbone`: biases and norms of the last two blocks, with a flow that moves."""
    return tiny_adapter(backbone)


@pytest.fixture
def support():
    """Three classes of two PIL images each."""
    return pictures(n_way=3, n_shot=2)


@pytest.fixture
def pixels():
    """Pixel values `(5, 3, 28, 28)`."""
    return torch.randn(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
