"""`TaskStore`: many tasks of one backbone, on disk, of which those in use are in memory."""

from __future__ import annotations

import copy
import os
import re
import shutil
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..modeling.checksums import CHECKSUMS
from ..modeling.saving import recover
from ..modeling.task import AdaptedTask
from ..modeling.trunks import find_trunk
from .mixed_batch import predict_mixed

#: What a task can be called: its folder has this name.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")

#: What the names of folders begin with that are being removed.
_REMOVED = ".removed-"


@dataclass(frozen=True)
class _Entry:
    """A task in memory.

    Attributes:
        task: as it was loaded. Nobody outside gets it, but copies of it.
        version: which file it was loaded from.
        n_bytes: of its tensors.
    """

    task: AdaptedTask
    version: tuple[int, int]
    n_bytes: int


class TaskStore:
    """Many tasks behind one backbone: all are on disk, and those that were used last are in memory.

        store = TaskStore("tasks", backbone)
        store.add("alice", adapter.adapt(backbone, support))
        store.predict("alice", images)
        store.predict_mixed(["alice", "bob"], [image_of_alice, image_of_bob])

    Each task is a folder as `AdaptedTask.save_pretrained` writes it, so that a task that was added is there after a
    kill, and a folder that was saved or copied into the store is a task of it. What is used is always what is on disk:
    other processes can add and remove tasks of the same folder.

    Any number of threads can use a store. They take turns with the backbone, as threads do that share tasks, see
    `AdaptedTask`. Tasks of one adapter share its place in the backbone, so that changing from one to another costs a
    copy of the generated weights.

    Args:
        folder: where the tasks are. It is made if need be.
        backbone: the model that the tasks were made with, or a wrapper of it, see `find_trunk`.
        max_bytes: how much memory the tensors of tasks in memory may take. The task that was used last is always kept.
        half: save tasks in half precision, and keep their generated weights so. A task takes about half the space.

    Raises:
        ValueError: `max_bytes` is negative.
    """

    def __init__(
        self, folder: str | os.PathLike, backbone: PreTrainedModel, *, max_bytes: int = 2**30, half: bool = False
    ):
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be 0 or more, not {max_bytes}.")
        self.folder = Path(folder)
        self.backbone = find_trunk(backbone)
        self.max_bytes = max_bytes
        self.half = half
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._lock = threading.Lock()  # of the entries alone: nothing is waited for while it is held
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(f"{_REMOVED}*"):  # left by a kill
            shutil.rmtree(path, ignore_errors=True)

    @property
    def n_bytes(self) -> int:
        """How much memory the tensors of the tasks in memory take."""
        with self._lock:
            return sum(entry.n_bytes for entry in self._entries.values())

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[str]:
        """The names of all tasks, sorted."""
        for name in sorted(os.listdir(self.folder)):
            if name in self:
                yield name

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and _NAME.fullmatch(name) is not None and self._read_version(name) is not None

    def __getitem__(self, name: str) -> AdaptedTask:
        """A task of the store. To reset or to merge it leaves the store's own as it is.

        Raises:
            KeyError: there is no such task.
            ValueError: no task can have this name.
            CheckpointError, IncompatibleBackboneError: see `AdaptedTask.from_pretrained`.
        """
        folder = self._locate(name)
        # The version is read first: if the task is replaced now, it counts as outdated the next time.
        version = self._read_version(name)
        if version is None:
            with self._lock:
                self._entries.pop(name, None)
            raise KeyError(f"there is no task {name!r} in {self.folder}.")
        with self._lock:
            entry = self._entries.get(name)
            if entry is not None and entry.version == version:
                self._entries.move_to_end(name)
                return copy.copy(entry.task)
        task = AdaptedTask.from_pretrained(folder, self.backbone)
        if self.half:
            task.theta = task.theta.half()
        tensors = (task.theta, task.prototypes)
        n_bytes = sum(tensor.nbytes for tensor in tensors)
        with self._lock:
            self._entries[name] = _Entry(task, version, n_bytes)
            self._entries.move_to_end(name)
            self._forget_oldest()
        return copy.copy(task)

    def add(self, name: str, task: AdaptedTask) -> None:
        """Save a task under a name, in place of one that has it. When this returns, no kill can undo it.

        Args:
            name: up to 100 letters, digits, dots, dashes and underscores; it begins with neither dot nor dash.
            task: a task of any backbone of the same kind.

        Raises:
            ValueError: no task can have this name, or a weight is too large for half precision.
            CheckpointError, RuntimeError: see `AdaptedTask.save_pretrained`.
        """
        task.save_pretrained(self._locate(name), half=self.half)

    def remove(self, name: str) -> None:
        """Remove a task, in memory and on disk.

        Raises:
            KeyError: there is no such task.
            ValueError: no task can have this name.
        """
        folder = self._locate(name)
        removed = self.folder / f"{_REMOVED}{uuid.uuid4().hex}"
        try:
            os.rename(folder, removed)  # at one moment it is there, at the next it is not
        except FileNotFoundError:
            raise KeyError(f"there is no task {name!r} in {self.folder}.") from None
        with self._lock:
            self._entries.pop(name, None)
        shutil.rmtree(removed, ignore_errors=True)

    def predict(self, name: str, images: Any, **options: Any) -> Any:
        """The labels of images by one task, see `AdaptedTask.predict`. Further errors are those of `store[name]`."""
        return self[name].predict(images, **options)

    def predict_mixed(self, names: Sequence[str], images: Any, *, batch_size: int = 64) -> list[str]:
        """The label of each image by the task of the name beside it; see `predict_mixed` and `store[name]`."""
        tasks = {name: self[name] for name in names}
        return predict_mixed([tasks[name] for name in names], images, batch_size=batch_size)

    def _locate(self, name: str) -> Path:
        if _NAME.fullmatch(name) is None:
            raise ValueError(
                f"{name!r} cannot be the name of a task: use up to 100 letters, digits, dots, dashes and underscores, "
                "the first a letter, a digit or an underscore."
            )
        return self.folder / name

    def _read_version(self, name: str) -> tuple[int, int] | None:
        """Which file of checksums a task has on disk, since every save writes a new one; None if there is no task."""
        recover(self.folder / name)  # finishes what counts already, if a writer was killed
        try:
            status = os.stat(self.folder / name / CHECKSUMS)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_ino, status.st_mtime_ns

    def _forget_oldest(self) -> None:
        """Forget the tasks that were used longest ago, until the rest fits. The caller holds the lock."""
        total = sum(entry.n_bytes for entry in self._entries.values())
        while total > self.max_bytes and len(self._entries) > 1:
            _, oldest = self._entries.popitem(last=False)
            total -= oldest.n_bytes
