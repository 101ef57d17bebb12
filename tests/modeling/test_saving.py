from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_hyperflow import CheckpointError
from hf_hyperflow.modeling.checksums import require_sha256, sha256
from hf_hyperflow.modeling.saving import atomic_folder, exclusive
from tests.helpers.files import read_folder


def save(folder: Path, text: str) -> None:
    with atomic_folder(folder) as draft:
        (draft / "a.txt").write_text(text)
        (draft / "sub").mkdir()
        (draft / "sub" / "b.txt").write_text(text)


WHOLE = {"a.txt": b"new", "sub": b"/", "sub/b.txt": b"new"}


def test_a_new_folder(tmp_path):
    save(tmp_path / "deep" / "er", "new")
    assert read_folder(tmp_path / "deep" / "er") == WHOLE
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["er"]


def test_files_are_replaced_and_others_kept(tmp_path):
    save(tmp_path / "x", "old")
    (tmp_path / "x" / "mine.txt").write_text("mine")
    save(tmp_path / "x", "new")
    inside = {f"x/{name}": text for name, text in WHOLE.items()}
    assert read_folder(tmp_path) == {"x": b"/", "x/mine.txt": b"mine"} | inside


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_an_error_leaves_everything_as_it_was(tmp_path, error):
    save(tmp_path / "x", "old")
    before = read_folder(tmp_path)

    def interrupted(folder):
        with atomic_folder(folder) as draft:
            (draft / "a.txt").write_text("half")
            raise error("enough")

    raised = CheckpointError if error is OSError else error
    for folder in (tmp_path / "x", tmp_path / "new" / "folder"):
        with pytest.raises(raised, match="enough"):
            interrupted(folder)
        assert read_folder(tmp_path) == before


def test_a_file_that_cannot_be_put_in_place_leaves_everything_as_it_was(tmp_path):
    save(tmp_path / "x", "old")
    (tmp_path / "x" / "sub" / "b.txt").unlink()
    (tmp_path / "x" / "sub").rmdir()
    (tmp_path / "x" / "sub").write_text("mine")  # in the way, and the last in order
    before = read_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot write to .*x: .*sub is in the way"):
        save(tmp_path / "x", "new")
    assert read_folder(tmp_path) == before


@pytest.mark.parametrize("below", ["", "sub", "sub/sub"])
def test_a_file_in_the_way(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"cannot write to .*file.*Choose a folder you may write to"):
        save(tmp_path / "file" / below, "new")
    assert read_folder(tmp_path) == {"file": b"mine"}


def test_a_folder_that_not_even_root_can_write():
    with pytest.raises(CheckpointError, match=r"cannot write to /proc/self/x: .*Choose a folder you may write to"):
        save(Path("/proc/self/x"), "new")
    with pytest.raises(CheckpointError, match="cannot write to /proc/self: "):
        save(Path("/proc/self"), "new")


def test_a_folder_on_another_disk_than_its_parent():
    """As a container's mounted volume is: renaming from outside it fails."""
    volume = Path("/dev/shm")
    if not os.path.ismount(volume):
        pytest.skip("/dev/shm is not a mount point here")
    name = f"hyperflow-test-{os.getpid()}.txt"
    try:
        with atomic_folder(volume) as draft:
            (draft / name).write_text("new")
        assert (volume / name).read_text() == "new"
        assert not list(volume.glob(".draft-*"))
    finally:
        (volume / name).unlink(missing_ok=True)


def test_sha256(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(path) == digest
    require_sha256(path, digest)
    require_sha256(path, None)
    path.write_bytes(b"abd")
    with pytest.raises(CheckpointError, match=rf"{path} is damaged or incomplete: .*Download or copy it again"):
        require_sha256(path, digest)


def test_two_threads_at_once(tmp_path):
    """The second is turned away, also under another name of the folder. Two processes are in tests/robustness."""
    save(tmp_path / "x", "old")
    (tmp_path / "alias").symlink_to(tmp_path / "x")
    with atomic_folder(tmp_path / "x") as draft, ThreadPoolExecutor(1) as other:
        (draft / "a.txt").write_text("first")
        for name in ("x", "alias"):
            with pytest.raises(CheckpointError, match=rf"another command is writing to .*{name} now\. Wait until"):
                other.submit(save, tmp_path / name, "second").result()
        other.submit(save, tmp_path / "y", "second").result()  # another folder is free
    assert (tmp_path / "x" / "a.txt").read_text() == "first"
    assert (tmp_path / "x" / "sub" / "b.txt").read_text() == "old"


def test_whoever_has_locked_a_folder_may_write_to_it(tmp_path):
    with exclusive(tmp_path / "x"):
        save(tmp_path / "x", "new")
        save(tmp_path / "x", "new")
    assert read_folder(tmp_path) == {"x": b"/"} | {f"x/{name}": text for name, text in WHOLE.items()}
