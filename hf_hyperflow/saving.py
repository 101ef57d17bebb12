"""Write folders whole or not at all, and notice damaged files."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class CheckpointError(OSError):
    """A checkpoint that cannot be written, is missing, damaged or of another kind; the message names the file."""


@contextmanager
def written_whole(folder: str | Path) -> Iterator[Path]:
    """A new folder to write to, moved into `folder` file by file when everything is there.

    On an error or an interrupt nothing of it remains and what `folder` held is untouched.

    Raises:
        CheckpointError: the folder cannot be written; the message says why.
    """
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file")
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"no permission to write in {folder}")
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error}. Choose a folder you may write to.") from error
    try:
        yield draft
        folder.mkdir(exist_ok=True)
        for file in sorted(p for p in draft.rglob("*") if p.is_file()):
            target = folder / file.relative_to(draft)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"cannot write to {folder}: {error}. Free some space or choose another folder."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


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
