"""Write folders whole or not at all, and notice damaged files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError


class CheckpointError(OSError):
    """A checkpoint that cannot be written, is missing, damaged or of another kind; the message names the file."""


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """A new folder to write to, whose files and folders are moved into `folder` when everything is there.

    On an error or an interrupt nothing of it remains and what `folder` held is untouched. Other files in `folder` are
    kept; a folder in it is replaced whole by one of the same name.

    Raises:
        CheckpointError: the folder cannot be written, or is being written by another; the message says why.
    """
    with exclusive(folder), _drafted(Path(folder)) as draft:
        yield draft


@contextmanager
def exclusive(folder: str | Path) -> Iterator[None]:
    """Keep everybody else on this machine from writing to a folder with `atomic_folder`, until the end of the block.

    Within the block the same thread can claim it again. The claim ends with the process, however that ends.

    Raises:
        CheckpointError: another process or thread has exclusive it.
    """
    digest = hashlib.sha256(os.fsencode(Path(folder).resolve())).hexdigest()[:32]
    # Not in the folder: it would be pushed or zipped with it, and a lock cannot be deleted safely.
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
def _drafted(folder: Path) -> Iterator[Path]:
    made, drafts = [], None
    try:
        made = [p for p in (folder, *folder.parents) if not p.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        # Inside the folder, for it may be on another disk than the one it is in.
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
        for path in made:
            with suppress(OSError):
                path.rmdir()  # goes through only where nothing was put


def _put_in_place(new: Path, drafts: Path, folder: Path) -> None:
    """Move what is in `new` into `folder`; if that fails in the middle, put everything back."""
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


def sha256(path: str | Path) -> str:
    """Hex digest of a file's content."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def require_sha256(path: str | Path, expected: str | None) -> None:
    """Compare a file with the digest that was noted when it was saved; None compares nothing.

    Raises:
        CheckpointError: the file has changed since.
    """
    if expected is not None and sha256(path) != expected:
        raise CheckpointError(
            f"{path} is damaged or incomplete: its SHA-256 is not the one noted when it was saved. "
            "Download or copy it again."
        )


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A new file to write to, which takes the place of `path` in one move when the block ends well.

    At every moment, also of a crash, `path` is what it was or what it shall be.

    Raises:
        CheckpointError: it cannot be written.
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


def write_json(path: str | Path, content: object) -> None:
    """Write JSON to a file, whole or not at all.

    Raises:
        CheckpointError: the file cannot be written.
    """
    with atomic_file(path) as draft:
        draft.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_record(path: Path) -> dict | None:
    """A training record, or None if there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}). Download or copy it again.") from error
