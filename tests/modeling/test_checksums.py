from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hf_hyperflow import AdaptedTask, CheckpointError, HyperFlowAdapter
from hf_hyperflow.modeling.checksums import CHECKSUMS, MODEL_CHECKSUMS, check_files, require_sha256, sha256
from tests.helpers.files import flip_bit
from tests.helpers.tiny import tiny_adapter
from tests.modeling.test_model_card import training_record

DIGEST = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_sha256(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert sha256(path) == DIGEST
    require_sha256(path, DIGEST)
    require_sha256(path, None)
    path.write_bytes(b"abd")
    with pytest.raises(CheckpointError, match=rf"{path} is damaged or incomplete: .*Download or copy it again"):
        require_sha256(path, DIGEST)


@pytest.mark.parametrize(
    "name", ["../a", "/etc/passwd", "sub/a", "..", ".", "", ".hidden", "..\\a", "a\u0000b", "a\nb", "sub/"]
)
def test_names_elsewhere_are_refused(tmp_path, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "in" / CHECKSUMS).write_text(json.dumps({name: DIGEST}))
    with pytest.raises(CheckpointError, match=rf"{CHECKSUMS} is damaged .*is not the name of a file beside it"):
        check_files(tmp_path / "in", CHECKSUMS)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"a": 3}', '{"a": "b"}', '{"a": null}', "[" * 100_000, "\xff"]
)
def test_a_damaged_list(tmp_path, text):
    (tmp_path / CHECKSUMS).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=rf"{CHECKSUMS} is damaged"):
        check_files(tmp_path, CHECKSUMS)


def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    (tmp_path / CHECKSUMS).write_text(json.dumps({"a.json": DIGEST}))
    with pytest.raises(CheckpointError, match=r"a\.json is missing"):
        check_files(tmp_path, CHECKSUMS)


# Every file of an adapter and of a task


@pytest.fixture
def saved_adapter(adapter, tmp_path) -> Path:
    adapter.training_record = training_record()
    adapter.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def saved_task(adapter, backbone, support, tmp_path) -> Path:
    task = adapter.adapt(backbone, support)
    task.save_pretrained(tmp_path / "task")
    task.reset()
    return tmp_path / "task"


def check_every_file(folder: Path, load) -> None:
    """A changed or missing file is named; its owner may edit the card."""
    load()
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        if path.name == "README.md":
            path.write_text("mine")
            load()
            continue
        path.write_bytes(flip_bit(whole, len(whole) // 2, 0))
        with pytest.raises(CheckpointError, match=str(folder)):
            load()
        if path.name != MODEL_CHECKSUMS and path.suffix != ".py":  # old adapters have no list; code is not downloaded
            path.unlink()
            with pytest.raises(CheckpointError):
                load()
        path.write_bytes(whole)
    load()


def test_every_file_of_an_adapter(saved_adapter):
    names = {path.name for path in saved_adapter.iterdir()}
    listed = set(json.loads((saved_adapter / MODEL_CHECKSUMS).read_text()))
    assert listed > {"config.json", "model.safetensors", "preprocessor_config.json", "training.json", "adapter.py"}
    assert names == listed | {"README.md", MODEL_CHECKSUMS}
    check_every_file(saved_adapter, lambda: HyperFlowAdapter.from_pretrained(saved_adapter))


def test_every_file_of_a_task(saved_task, backbone):
    names = {path.name for path in saved_task.iterdir()}
    assert set(json.loads((saved_task / CHECKSUMS).read_text())) == names - {"README.md", CHECKSUMS}
    check_every_file(saved_task, lambda: AdaptedTask.from_pretrained(saved_task, backbone).reset())


def test_a_task_of_version_0_1_lists_two_files(saved_task, backbone):
    digests = json.loads((saved_task / CHECKSUMS).read_text())
    names = ("adapter_model.safetensors", "prototypes.safetensors")
    (saved_task / CHECKSUMS).write_text(json.dumps({name: digests[name] for name in names}))
    AdaptedTask.from_pretrained(saved_task, backbone).reset()
    for name in names:
        (saved_task / CHECKSUMS).write_text(json.dumps({name: digests[name]}))
        with pytest.raises(CheckpointError, match=rf"is missing, or {CHECKSUMS} does not name it"):
            AdaptedTask.from_pretrained(saved_task, backbone)


def test_an_adapter_of_version_0_1_has_no_list(saved_adapter):
    (saved_adapter / MODEL_CHECKSUMS).unlink()
    HyperFlowAdapter.from_pretrained(saved_adapter)


def test_a_list_without_the_config_or_the_weights_is_damaged(saved_adapter):
    path = saved_adapter / MODEL_CHECKSUMS
    digests = json.loads(path.read_text())
    for name in ("config.json", "model.safetensors"):
        path.write_text(json.dumps({key: value for key, value in digests.items() if key != name}))
        with pytest.raises(CheckpointError, match=rf"{MODEL_CHECKSUMS} is damaged: it does not name {name}"):
            HyperFlowAdapter.from_pretrained(saved_adapter)


def test_nothing_of_the_version_before_is_taken_for_the_new_one(saved_adapter, backbone):
    """Neither a record nor a processor that the new version does not have; other files stay."""
    (saved_adapter / "mine.txt").write_text("mine")
    tiny_adapter(backbone, processor=None).save_pretrained(saved_adapter)
    again = HyperFlowAdapter.from_pretrained(saved_adapter)
    assert (again.processor, again.training_record) == (None, None)
    names = {path.name for path in saved_adapter.iterdir() if path.suffix != ".py"}
    assert names == {"README.md", MODEL_CHECKSUMS, "config.json", "mine.txt", "model.safetensors"}


def test_a_processor_that_somebody_put_there_stays(adapter, backbone, tmp_path):
    adapter.processor.save_pretrained(tmp_path)
    tiny_adapter(backbone, processor=None).save_pretrained(tmp_path)
    assert HyperFlowAdapter.from_pretrained(tmp_path).processor is not None
