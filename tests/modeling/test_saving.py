from __future__ import annotations

import ast
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from hf_hyperflow import CheckpointError
from hf_hyperflow.modeling import saving
from hf_hyperflow.modeling.saving import DRAFT, atomic_folder, draft_of, exclusive, mark_removed, reading, recover
from tests.helpers.files import read_folder
from tests.helpers.kills import ends_when_killed_before, watch


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
        assert not (volume / DRAFT).exists()
    finally:
        (volume / name).unlink(missing_ok=True)


def test_two_threads_at_once(tmp_path, monkeypatch):
    """The second is turned away, also under another name of the folder. Two processes are in tests/robustness."""
    monkeypatch.setattr(saving, "WRITER_PATIENCE", 0.1)
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


# Kills


@pytest.fixture
def quick_path(tmp_path) -> Iterator[Path]:
    """A folder in memory if there is such: many saves take long on a disk, because each waits for it."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def save_without_extra(folder: Path, text: str) -> None:
    with atomic_folder(folder) as draft:
        (draft / "a.txt").write_text(text)
        (draft / "sub").mkdir()
        (draft / "sub" / "b.txt").write_text(text)
        mark_removed(draft, "extra.txt")


OLD = {"a.txt": b"old", "extra.txt": b"old", "sub": b"/", "sub/b.txt": b"old"}


def make_old(folder: Path) -> Path:
    with atomic_folder(folder) as draft:
        for name in OLD:
            (draft / name).parent.mkdir(exist_ok=True)
            if name != "sub":
                (draft / name).write_text("old")
    return folder


def see(folder: Path) -> dict[str, bytes]:
    """What a reader sees."""
    with reading(folder) as whole:
        return {name: (whole / name).read_bytes() for name in WHOLE_AND_OLD if (whole / name).is_file()}


WHOLE_AND_OLD = ("a.txt", "extra.txt", "sub/b.txt")
SEEN_OLD = dict.fromkeys(WHOLE_AND_OLD, b"old")
SEEN_NEW = {"a.txt": b"new", "sub/b.txt": b"new"}


def list_killed(tmp_path: Path) -> list[Path]:
    """Copies of a folder with old content, in which writers of new content were killed: before each operation one."""
    folders = []
    while True:
        folder = make_old(tmp_path / f"killed-{len(folders) + 1}")
        if ends_when_killed_before(len(folders) + 1, folder, lambda to=folder: save_without_extra(to, "new")):
            assert see(folder) == SEEN_NEW
            return folders
        folders.append(folder)


def test_killed_before_every_operation(quick_path):
    """A reader sees the old version or the new one; the next save works; nothing stays behind."""
    versions = []
    for folder in list_killed(quick_path):
        copy = shutil.copytree(folder, quick_path / f"{folder.name}-copy")
        versions.append(see(folder))
        assert versions[-1] in (SEEN_OLD, SEEN_NEW), folder
        assert not (folder / DRAFT).exists()
        save_without_extra(copy, "new")  # whoever comes next may also be a writer
        assert read_folder(copy) == WHOLE
    n_old = versions.count(SEEN_OLD)
    assert versions == [SEEN_OLD] * n_old + [SEEN_NEW] * (len(versions) - n_old), "it never goes back"
    assert n_old > 5
    assert len(versions) - n_old > 5


def test_a_reader_that_may_not_write_sees_what_counts(quick_path):
    """The folder belongs to somebody else, who was killed while files were moved."""
    for folder in list_killed(quick_path)[::3]:
        before = read_folder(folder)
        with closed_to_writing(folder):
            seen = see_as_nobody(folder)
        assert seen in (SEEN_OLD, SEEN_NEW), folder
        assert read_folder(folder) == before
        assert seen == see(folder), "what counts does not change when it is put in place"


@contextmanager
def closed_to_writing(folder: Path) -> Iterator[None]:
    """Within, nobody but root can write to a folder, and everybody can read it."""
    parents = [path for path in folder.parents if path.stat().st_uid == os.getuid() and path != Path("/")]
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    modes = {path: path.stat().st_mode for path in [*folders, *parents]}
    for path in parents:
        path.chmod(modes[path] | 0o555)
    for path in folders:
        path.chmod(0o555)
    try:
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


def see_as_nobody(folder: Path) -> dict[str, bytes]:
    """What a reader sees who is not root."""
    end, other_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            os.write(other_end, repr(see(folder)).encode())
        finally:
            os._exit(0)
    os.close(other_end)
    os.waitpid(pid, 0)
    with open(end, "rb") as file:
        return ast.literal_eval(file.read().decode())


def test_all_is_on_the_disk_before_it_counts(tmp_path):
    """Every file and folder of the new version is synced before the rename that makes it count, and none after."""
    folder = make_old(tmp_path / "x")
    end, other_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            watch(folder, lambda n, operation: os.write(other_end, f"{operation}\n".encode()))
            save_without_extra(folder, "new")
        finally:
            os._exit(0)
    os.close(other_end)
    os.waitpid(pid, 0)
    with open(end) as file:
        operations = file.read().splitlines()
    new = draft_of(folder)
    counts = operations.index(f"os.rename {new} {folder / DRAFT / 'committed'}")
    synced = {line.removeprefix("fsync ") for line in operations[:counts] if line.startswith("fsync ")}
    expected = {new, new / "a.txt", new / "sub", new / "sub/b.txt", folder / DRAFT, folder}
    assert {str(path) for path in expected} <= synced
    written = [i for i, line in enumerate(operations) if line.startswith("open ") and str(new) in line]
    assert max(written) < counts
    assert operations[counts + 1] == f"fsync {folder / DRAFT}"
    assert f"fsync {folder}" in operations[counts:], "moved files stay moved"


# Several at once


def test_a_reader_beside_150_saves(quick_path):
    """It sees whole versions only, later ones after earlier ones."""
    folder = quick_path / "x"
    save(folder, "0")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for number in range(1, 151):
                save(folder, str(number))
            code = 0
        finally:
            os._exit(code)
    numbers = []
    while not numbers or numbers[-1] < 150:
        seen = see(folder)
        assert len(set(seen.values())) == 1, seen
        numbers.append(int(seen["a.txt"]))
        assert len(seen) == 2
    assert os.waitpid(pid, 0)[1] == 0
    assert numbers == sorted(numbers)
    assert len(set(numbers)) > 10


def test_a_writer_waits_for_readers(tmp_path, monkeypatch):
    save(tmp_path / "x", "old")
    with ThreadPoolExecutor(1) as other:
        with reading(tmp_path / "x") as whole:
            saving_now = other.submit(save, tmp_path / "x", "new")
            while not (tmp_path / "x" / DRAFT / "new" / "sub" / "b.txt").is_file():
                pass
            assert (whole / "a.txt").read_text() == (whole / "sub/b.txt").read_text() == "old"
        saving_now.result()
    assert read_folder(tmp_path / "x") == WHOLE
    monkeypatch.setattr(saving, "READER_PATIENCE", 0.1)
    with ThreadPoolExecutor(1) as other, reading(tmp_path / "x"), pytest.raises(CheckpointError, match="been reading"):
        other.submit(save, tmp_path / "x", "newer").result()
    assert read_folder(tmp_path / "x") == WHOLE


def test_two_processes_with_different_folders_for_temporary_files(tmp_path):
    """The lock hangs on the folder alone."""
    (tmp_path / "tmp").mkdir()
    with ThreadPoolExecutor(1) as other:
        with atomic_folder(tmp_path / "x") as draft:
            (draft / "a.txt").write_text("first")
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    saving._held.folders.clear()  # as in a process that was not forked here
                    os.environ["TMPDIR"], saving.tempfile.tempdir = str(tmp_path / "tmp"), None
                    saving.WRITER_PATIENCE = 0.1
                    save(tmp_path / "x", "second")
                except CheckpointError as error:
                    code = 3 if "another command is writing" in str(error) else 2
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
        other.submit(save, tmp_path / "x", "new").result()
    assert read_folder(tmp_path / "x") == WHOLE


# Folders that came from strangers


def test_drafts_are_not_looked_for_behind_links(tmp_path):
    """A link in a downloaded folder neither empties another folder nor brings its files in."""
    (tmp_path / "mine/committed").mkdir(parents=True)
    (tmp_path / "mine/committed/a.txt").write_text("mine")
    (tmp_path / "mine/new").mkdir()
    (tmp_path / "mine/new/b.txt").write_text("mine")
    before = read_folder(tmp_path / "mine")
    for name, target in ((DRAFT, "mine"), (f"{DRAFT}/committed", "mine/committed"), (f"{DRAFT}/new", "mine/new")):
        folder = tmp_path / name.replace("/", "-").strip(".")
        (folder / name).parent.mkdir(parents=True)
        (folder / name).symlink_to(tmp_path / target)
        assert see(folder) == {}
        recover(folder)
        assert read_folder(tmp_path / "mine") == before
        with suppress(CheckpointError):
            save(folder, "new")
        assert read_folder(tmp_path / "mine") == before
