"""Writes single files whole or not at all. For folders, whose files belong together, see `saving`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .file_locks import LockTimeoutError, wait_for_lock
from .saving import WRITER_PATIENCE, CheckpointError, sync


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a new, empty file to write to. It takes the place of `path` in one move when the block has ended well.

    At every moment, also after a kill or a power cut, `path` holds either its old or its new content. The next writer
    of the file clears what a killed one left.

    Raises:
        CheckpointError: the file cannot be written, or another process or thread is writing it.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.new")
    try:
        # The draft's name is always the same, so that none is left for ever. Hence the lock.
        lock = _lock_draft_of_file(path, draft)
        try:
            yield draft
            sync(draft)
            os.replace(draft, path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        finally:
            os.close(lock)
        sync(path.parent)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"cannot write {path}: {error}. Choose a folder you may write to, with room left."
        ) from error


def _lock_draft_of_file(path: Path, draft: Path) -> int:
    """Make an empty draft of a file and lock it. Returns the descriptor that holds the lock."""

    def make() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if draft.is_symlink():
            raise FileExistsError(f"{draft} is in the way")
        draft.touch()

    try:
        lock = wait_for_lock(draft, seconds=WRITER_PATIENCE, make=make)
    except LockTimeoutError:
        raise CheckpointError(f"another command is writing {path} now. Wait until it is done.") from None
    os.truncate(draft, 0)
    return lock


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write JSON to a file, whole or not at all.

    Raises:
        CheckpointError: the file cannot be written.
    """
    with atomic_file(path) as draft:
        draft.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
