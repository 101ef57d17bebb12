"""Writers in processes of their own, on a full disk or at once. For those that are killed see `test_writing.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hf_hyperflow import CheckpointError
from hf_hyperflow.modeling.saving import atomic_folder
from tests.helpers.files import read_folder

pytestmark = pytest.mark.slow


@pytest.fixture
def saved(adapter, tmp_path) -> Path:
    adapter.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def save(folder: Path, text: str) -> None:
    with atomic_folder(folder) as draft:
        (draft / "a.txt").write_text(text)
        (draft / "sub").mkdir()
        (draft / "sub" / "b.txt").write_text(text)


def test_two_processes_at_once(tmp_path):
    """One of two processes that write to the same folder is turned away, and nothing of it is mixed in."""
    code = f"""
import sys
from hf_hyperflow.modeling.saving import atomic_folder
with atomic_folder({str(tmp_path / "x")!r}) as draft:
    (draft / "a.txt").write_text("first")
    print("writing", flush=True)
    sys.stdin.readline()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as first:
        assert first.stdout.readline() == "writing\n"
        (tmp_path / "alias").symlink_to(tmp_path / "x")
        for name in ("x", "alias"):
            with pytest.raises(CheckpointError, match=rf"another command is writing to .*{name} now\. Wait until"):
                save(tmp_path / name, "second")
        save(tmp_path / "y", "second")  # another folder is free
        first.communicate("\n")
    assert read_folder(tmp_path / "x") == {"a.txt": b"first"}
    save(tmp_path / "x", "new")
    assert read_folder(tmp_path / "x") == {"a.txt": b"new", "sub": b"/", "sub/b.txt": b"new"}


def test_an_adapter_on_a_full_disk(saved):
    """Files may grow to half of what is needed, so the save fails in the middle."""
    before = read_folder(saved)
    limit = (saved / "model.safetensors").stat().st_size // 2
    code = f"""
import resource, signal, sys
from hf_hyperflow import HyperFlowAdapter
adapter = HyperFlowAdapter.from_pretrained({str(saved)!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
for folder in ({str(saved)!r}, {str(saved.parent / "new")!r}):
    try:
        adapter.save_pretrained(folder)
    except OSError as error:
        print("@", type(error).__name__, error)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    errors = [line for line in process.stdout.splitlines() if line.startswith("@")]
    assert len(errors) == 2
    assert all(line.startswith("@ CheckpointError cannot write to") for line in errors), errors
    assert read_folder(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
