"""Writes folders and files whole or not at all, and notices damaged ones."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError


class CheckpointError(OSError):
    """A checkpoint that cannot be written, is missing, damaged or of another kind; the message names the file."""


@contextmanager
def atomic_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield a new folder to write to. Its content is moved into `folder` when the block has ended well.

    After an error or an interrupt nothing of it remains, and the content of `folder` is untouched. Other files in
    `folder` are kept. A folder in it is replaced as a whole by one of the same name.

    Raises:
        CheckpointError: the folder cannot be written, or another process or thread is writing to it.
    """
    with exclusive(folder), _draft(Path(folder)) as draft:
        yield draft


@contextmanager
def exclusive(folder: str | os.PathLike) -> Iterator[None]:
    """Within, nobody else on this machine can write to a folder with `atomic_folder`.

    The same thread can lock the folder again. The lock ends with the process, however that ends.

    Raises:
        CheckpointError: another process or thread has locked the folder.
    """
    digest = hashlib.sha256(os.fsencode(Path(folder).resolve())).hexdigest()[:32]
    # Not in the folder: the lock would be pushed or zipped with it, and a lock cannot be deleted safely.
    path = Path(tempfile.gettempdir(), f"hf_hyperflow-{digest}.lock")
    lock = FileLock(path, timeout=0, mode=0o666, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise CheckpointError(
            f"another command is writing to {folder} now. Wait until it is done, or choose another folder."
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"cannot make the lock {path}: {error}. Set TMPDIR to a folder you may write to."
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _draft(folder: Path) -> Iterator[Path]:
    """Yield a new folder to write to, and put its content into `folder` at the end; see `atomic_folder`."""
    missing: list[Path] = []
    drafts = None
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        # Inside the folder, because its parent may be on another disk.
        drafts = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder))
        (drafts / "new").mkdir()
        yield drafts / "new"
        _put_in_place(drafts / "new", drafts, folder)
    except (OSError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"cannot write to {folder}: {error}. Choose a folder you may write to, with room left."
        ) from error
    finally:
        if drafts is not None:
            shutil.rmtree(drafts, ignore_errors=True)
        for path in missing:
            with suppress(OSError):
                path.rmdir()  # goes through only where nothing was put


def _put_in_place(new: Path, drafts: Path, folder: Path) -> None:
    """Move the content of `new` into `folder`. If that fails in the middle, put everything back."""
    aside = drafts / "old"
    aside.mkdir()
    moved = []
    try:
        for path in sorted(new.iterdir()):
            target = folder / path.name
            if target.exists() and target.is_dir() != path.is_dir():
                raise FileExistsError(f"{target} is in the way")
            moved.append(target)
            if target.exists():
                os.replace(target, aside / path.name)
            os.replace(path, target)
    except BaseException:
        for target in moved:
            if (aside / target.name).exists():
                if target.is_dir():
                    shutil.rmtree(target)
                os.replace(aside / target.name, target)
            elif not (new / target.name).exists():
                os.replace(target, new / target.name)
        raise


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of the content of a file, in hex digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def require_sha256(path: str | os.PathLike, expected: str | None) -> None:
    """Compare a file with the digest that was noted when it was saved. None stands for a digest that was not noted.

    Raises:
        CheckpointError: the file has changed since.
    """
    if expected is not None and sha256(path) != expected:
        raise CheckpointError(
            f"{path} is damaged or incomplete: its SHA-256 is not the one noted when it was saved. "
            "Download or copy it again."
        )


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a new file to write to. It takes the place of `path` in one move when the block has ended well.

    At every moment, also after a crash, `path` holds either its old or its new content.

    Raises:
        CheckpointError: the file cannot be written.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        with open(draft, "rb") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error}. Choose a folder you may write to, with room left."
        ) from error
    finally:
        with suppress(OSError):
            draft.unlink()


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write JSON to a file, whole or not at all.

    Raises:
        CheckpointError: the file cannot be written.
    """
    with atomic_file(path) as draft:
        draft.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_record(path: Path) -> dict[str, Any] | None:
    """Read a training record; None if there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}). Download or copy it again.") from error
