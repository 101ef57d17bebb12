"""Pushing to the Hub what `save_pretrained` writes, for adapters and for adapted tasks."""

from __future__ import annotations

import os
import tempfile
from typing import Protocol

from huggingface_hub import CommitInfo

from .hub import push_folder


class _Savable(Protocol):
    def save_pretrained(self, save_directory: str | os.PathLike) -> None: ...


class Pushable:
    """Adds `push_to_hub` to a class that has `save_pretrained`."""

    def push_to_hub(
        self: _Savable,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
    ) -> CommitInfo:
        """Push everything that `save_pretrained` writes to the Hub, as one commit; see `push_folder`.

        Raises:
            CheckpointError: the token is missing, wrong or may not write, or the Hub cannot be reached. Nothing was
                changed there.
            RuntimeError: this is a task that was reset, or is merged.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(
                folder, repo_id, private=private, token=token, revision=revision, commit_message=commit_message
            )
