"""Writes folders whole or not at all, and reads folders of which every file is of one version.

While something is written to a folder, it holds a draft:

    .hyperflow-draft/             locked by its writer, for as long as that lives
    .hyperflow-draft/new/         what is being written; it does not count
    .hyperflow-draft/committed/   a whole new version: each file in it counts instead of that of the same name outside

One rename turns `new` into `committed`. Then the files are moved into place and the draft is removed. Whoever comes
next does so for a writer that was killed in between.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from .file_locks import LockTimeoutError, try_lock, wait_for_lock

DRAFT = ".hyperflow-draft"

_NEW, _COMMITTED = "new", "committed"

#: In a draft: a file that says that its writer waits for readers.
_WAITING = "waiting"

#: In a new version: a folder of empty files, named after what is to be removed of the version before.
_REMOVED = ".removed"

#: For how many seconds a writer waits for another writer. A reader that clears a draft is done much sooner.
WRITER_PATIENCE = 2.0

#: For how many seconds a writer waits for those who read the version before, and they for it.
READER_PATIENCE = 60.0


class CheckpointError(OSError):
    """A checkpoint that cannot be written, is missing, damaged or of another kind; the message names the file."""


class _Held(threading.local):
    """The folders that this thread has locked."""

    def __init__(self) -> None:
        self.folders: set[Path] = set()


_held = _Held()


@contextmanager
def atomic_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield a new folder to write to. Its content is moved into `folder` when the block has ended well.

    At every moment, also after a kill or a power cut, readers in `reading` see the old content or the new one, whole.
    After an error or an interrupt in the block, nothing of the draft remains and the content of `folder` is untouched.
    Other files in `folder` are kept, but for those that `mark_removed` names. A folder in it is replaced as a whole by
    one of the same name.

    Raises:
        CheckpointError: the folder cannot be written, or another process or thread is writing to it.
    """
    folder = Path(folder)
    with exclusive(folder), _writing_to(folder):
        new = draft_of(folder)
        try:
            new.mkdir()
            yield new
            _commit(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def draft_of(folder: Path) -> Path:
    """The folder that `atomic_folder` yields for a folder."""
    return folder / DRAFT / _NEW


def mark_removed(draft: Path, name: str) -> None:
    """Say in a draft of `atomic_folder` that a file or folder beside it is removed when the draft is put in place."""
    (draft / _REMOVED).mkdir(exist_ok=True)
    (draft / _REMOVED / name).touch()


@contextmanager
def exclusive(folder: str | os.PathLike) -> Iterator[None]:
    """Within, nobody else can write to a folder with `atomic_folder`. Others can read it.

    The folder is made if need be, and removed at the end if it is still empty. What a killed writer left is finished
    or cleared first. The same thread can lock the folder again. The lock ends with the process, however that ends.

    Raises:
        CheckpointError: another process or thread has locked the folder, or it cannot be written.
    """
    folder = Path(folder)
    key = folder.resolve()
    if key in _held.folders:
        yield
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = None
    try:
        with _writing_to(folder):
            lock = _lock_draft(folder)
            _finish_or_clear(folder)
        _held.folders.add(key)
        yield
    finally:
        _held.folders.discard(key)
        if lock is not None:
            # What cannot be removed now is left to whoever comes next. A version that counts always is.
            with suppress(OSError):
                _remove_draft(folder)
            os.close(lock)
        for path in missing:
            with suppress(OSError):
                path.rmdir()  # goes through only where nothing was put


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    """Turn errors of the system into a `CheckpointError` that names the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"cannot write to {folder}: {error}. Choose a folder you may write to, with room left."
        ) from error


def _lock_draft(folder: Path) -> int:
    """Make the folder of a folder's drafts and lock it. Returns the descriptor that holds the lock."""
    drafts = folder / DRAFT

    def make() -> None:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in missing:
            sync(path.parent)
        with suppress(FileExistsError):
            drafts.mkdir()
        # Another writer may have removed it again, which is no error: the lock is tried anew.
        if os.path.lexists(drafts) and not _is_real_folder(drafts):
            raise FileExistsError(f"{drafts} is in the way")

    try:
        return wait_for_lock(drafts, seconds=WRITER_PATIENCE, make=make)
    except LockTimeoutError:
        raise CheckpointError(
            f"another command is writing to {folder} now. Wait until it is done, or choose another folder."
        ) from None


def _is_real_folder(path: Path) -> bool:
    """Whether there is a folder that is no link: drafts are never looked for behind a link that came with a folder."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def _has_committed(folder: Path) -> bool:
    """Whether a version counts that is not in its place, because its writer was killed or failed."""
    return _is_real_folder(folder / DRAFT) and _is_real_folder(folder / DRAFT / _COMMITTED)


def _commit(folder: Path) -> None:
    """Make the new content of a folder count, and move it into place."""
    new = draft_of(folder)
    for path in new.iterdir():
        target = folder / path.name
        if target.exists() and target.is_dir() != path.is_dir():
            raise FileExistsError(f"{target} is in the way")
    sync_all([new, *new.rglob("*"), new.parent, folder])
    with _no_reader(folder):
        os.rename(new, folder / DRAFT / _COMMITTED)
        sync(folder / DRAFT)
        _roll_forward(folder)


@contextmanager
def _no_reader(folder: Path) -> Iterator[None]:
    """Within, nobody reads a folder in `reading`, and nobody else moves files into it."""
    waiting = folder / DRAFT / _WAITING
    waiting.touch()
    try:
        lock = wait_for_lock(folder, seconds=READER_PATIENCE)
    except LockTimeoutError:
        raise CheckpointError(
            f"cannot write to {folder}: others have been reading it for {READER_PATIENCE:.0f} s. Try again later."
        ) from None
    finally:
        waiting.unlink(missing_ok=True)
    try:
        yield
    finally:
        os.close(lock)


def _roll_forward(folder: Path) -> None:
    """Move what counts into place. It can be killed at any moment and called again."""
    committed = folder / DRAFT / _COMMITTED
    for name in _list_names(committed / _REMOVED):
        if _is_real_folder(folder / name):
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    for name in _list_names(committed):
        if name == _REMOVED:
            continue
        source, target = committed / name, folder / name
        if _is_real_folder(source) and _is_real_folder(target):
            shutil.rmtree(target)
        os.replace(source, target)
    sync(folder)
    shutil.rmtree(committed)


def _list_names(folder: Path) -> list[str]:
    """The names in a folder, sorted; none if there is no such folder."""
    if not _is_real_folder(folder):
        return []
    return sorted(os.listdir(folder))


def _finish_or_clear(folder: Path) -> None:
    """Finish what a killed writer has committed, and clear what it has not. The caller holds the lock of the draft."""
    if _has_committed(folder):
        with _no_reader(folder):
            _roll_forward(folder)
    if _is_real_folder(draft_of(folder)):
        shutil.rmtree(draft_of(folder))
    (folder / DRAFT / _WAITING).unlink(missing_ok=True)


def _remove_draft(folder: Path) -> None:
    if not _has_committed(folder):
        shutil.rmtree(folder / DRAFT)


def recover(folder: str | os.PathLike) -> None:
    """Finish or clear what a killed writer left in a folder. Nothing happens where a writer is alive.

    Where the folder cannot be written, it is left as it is; `reading` finds there what counts.
    """
    folder = Path(folder)
    if not _is_real_folder(folder / DRAFT):
        return
    lock = None
    with suppress(OSError):
        lock = try_lock(folder / DRAFT)
    if lock is None:
        return
    try:
        _finish_or_clear(folder)
        _remove_draft(folder)
    except OSError:
        pass
    finally:
        os.close(lock)


@contextmanager
def reading(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield a folder to read from: within, its files are those of one version, whoever writes to it meanwhile.

    What a killed writer left is finished or cleared first; where that is not allowed, the yielded folder is another
    one, of links to the files that count. Writers wait with their last step until the block has ended.

    Raises:
        CheckpointError: a writer has been moving files for a minute.
    """
    folder = Path(folder)
    if not folder.is_dir():
        yield folder
        return
    recover(folder)
    _let_writer_pass(folder)
    try:
        lock = wait_for_lock(folder, is_shared=True, seconds=READER_PATIENCE)
    except PermissionError:  # a folder that may be searched but not listed cannot be locked
        yield folder
        return
    except LockTimeoutError:
        raise CheckpointError(f"cannot read {folder}: another command is writing to it now. Try again later.") from None
    try:
        with _view(folder) as whole:
            yield whole
    finally:
        os.close(lock)


def _let_writer_pass(folder: Path) -> None:
    """Wait while a writer waits for readers, or many readers together would never let it in.

    Not for long: it may have been killed, in a folder that cannot be cleared here.
    """
    deadline = time.monotonic() + 1
    while (folder / DRAFT / _WAITING).exists() and time.monotonic() < deadline:
        time.sleep(0.005)


@contextmanager
def _view(folder: Path) -> Iterator[Path]:
    """Yield the folder, or one of links to what counts if a writer was killed and cannot be finished here."""
    if not _has_committed(folder):
        yield folder
        return
    committed = folder / DRAFT / _COMMITTED
    sources = {name: folder / name for name in os.listdir(folder) if name != DRAFT}
    for name in _list_names(committed / _REMOVED):
        sources.pop(name, None)
    for name in _list_names(committed):
        sources[name] = committed / name
    with tempfile.TemporaryDirectory() as view:
        for name, source in sources.items():
            Path(view, name).symlink_to(source.absolute())
        yield Path(view)


def sync(path: Path) -> None:
    """Bring the content of a file, or the names in a folder, to the disk."""
    is_folder = path.is_dir()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every system can sync a folder
            raise
    finally:
        os.close(descriptor)


def sync_all(paths: Iterable[Path]) -> None:
    """Bring files and folders to the disk, several at a time: the disk then waits once for many."""
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(sync, paths):
            pass  # raises the error of the first that failed
