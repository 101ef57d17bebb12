"""Saved adapters and tasks with flipped bits and cut ends: they are never loaded as if they were whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_hyperflow import AdaptedTask, CheckpointError, HyperFlowAdapter
from tests.helpers.files import cut_ends, flipped_bits, forget_digests, header_length
from tests.helpers.tiny import Snapshot

pytestmark = pytest.mark.slow


@pytest.fixture
def saved_adapter(adapter, tmp_path) -> Path:
    adapter.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def saved_task(adapter, backbone, support, tmp_path) -> Path:
    task = adapter.adapt(backbone, support)
    task.save_pretrained(tmp_path / "task")
    task.reset()
    return tmp_path / "task"


def test_weights_of_an_adapter(saved_adapter):
    path = saved_adapter / "model.safetensors"
    whole = path.read_bytes()
    header = header_length(whole)
    damaged = [
        *flipped_bits(whole, 15, last=header - 1),
        *flipped_bits(whole, 15, first=header),
        *cut_ends(whole, 10),
    ]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{path} is damaged or incomplete"):
            HyperFlowAdapter.from_pretrained(saved_adapter)
    path.write_bytes(whole)
    HyperFlowAdapter.from_pretrained(saved_adapter)


def test_weights_of_an_adapter_without_a_digest(saved_adapter):
    """A checkpoint from elsewhere may have no digest: the error still names the file, and is never another one.

    A flip in a shape may also go unnoticed; a cut never does.
    """
    forget_digests(saved_adapter)
    path = saved_adapter / "model.safetensors"
    whole = path.read_bytes()
    n_noticed = 0
    for content in flipped_bits(whole, 40, last=header_length(whole) - 1):
        path.write_bytes(content)
        try:
            HyperFlowAdapter.from_pretrained(saved_adapter)
        except CheckpointError as error:
            assert str(path) in str(error)  # noqa: PT017
            n_noticed += 1
    assert n_noticed > 20
    for content in cut_ends(whole, 10):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{path} is damaged"):
            HyperFlowAdapter.from_pretrained(saved_adapter)


def test_config_of_an_adapter(saved_adapter):
    """Without digests, what still is a sound config loads. Everything else is a `CheckpointError`."""
    forget_digests(saved_adapter)
    path = saved_adapter / "config.json"
    n_errors = 0
    for content in flipped_bits(path.read_bytes(), 80):
        path.write_bytes(content)
        try:
            HyperFlowAdapter.from_pretrained(saved_adapter)
        except CheckpointError:
            n_errors += 1
    assert n_errors > 5


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "prototypes.safetensors"])
def test_weights_of_a_task(backbone, saved_task, name):
    before = Snapshot(backbone)
    path = saved_task / name
    whole = path.read_bytes()
    header = header_length(whole)
    damaged = [
        *flipped_bits(whole, 10, last=header - 1),
        *flipped_bits(whole, 10, first=header),
        *cut_ends(whole, 10),
    ]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{path} is damaged or incomplete"):
            AdaptedTask.from_pretrained(saved_task, backbone)
        before.assert_unchanged()
    path.write_bytes(whole)
    AdaptedTask.from_pretrained(saved_task, backbone)
