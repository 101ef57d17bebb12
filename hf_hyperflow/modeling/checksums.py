"""Lists of the SHA-256 of every file of a saved adapter or task, by which damage and mixtures are noticed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path

from .json_fields import read_json
from .saving import CheckpointError, mark_removed

#: The list of a task's files, by which a task is told from an adapter, and that of an adapter's.
CHECKSUMS, MODEL_CHECKSUMS = "checksums.json", "model_checksums.json"

#: Files that are not noted: the lists themselves, and the model card, which its owner may edit.
_NOT_NOTED = (CHECKSUMS, MODEL_CHECKSUMS, "README.md")


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of the content of a file, in hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


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


def write_checksums(draft: Path, checksums: str, folder: str | os.PathLike, optional: tuple[str, ...]) -> None:
    """Note the digests of all files of a draft, but for its card, in a new list beside them.

    Args:
        draft: what `atomic_folder` yielded.
        checksums: the name of the list.
        folder: the folder that the draft will be put into.
        optional: names of files that not every version has. If the version in `folder` lists one and the draft has
            none, it is removed, so that it is not taken for one of the new version.
    """
    digests = {}
    for path in sorted(draft.iterdir()):
        if path.name not in _NOT_NOTED:
            digests[path.name] = sha256(path)
    (draft / checksums).write_text(json.dumps(digests, indent=1), encoding="utf-8")
    digests_before: dict[str, str] = {}
    with suppress(OSError):  # there is none, or a damaged one
        digests_before = read_checksums(Path(folder, checksums))
    for name in optional:
        if name in digests_before and name not in digests:
            mark_removed(draft, name)


def read_checksums(path: Path) -> dict[str, str]:
    """Read a list of digests by the names of the files beside it.

    Raises:
        FileNotFoundError: there is no such list.
        CheckpointError: the list is damaged, or names something else than files beside it.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}.")
    digests = read_json(path)
    for name, digest in digests.items():
        problem = None
        if not _is_plain(name):
            problem = f"{name!r} is not the name of a file beside it"
        elif not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            problem = f"the digest of {name} is {digest!r}"
        if problem is not None:
            raise CheckpointError(f"{path} is damaged ({problem}). Download or copy it again.")
    return digests


def _is_plain(name: str) -> bool:
    """Whether a name is that of a visible file in the same folder, and no path."""
    is_visible = bool(name) and not name.startswith(".") and name.isprintable()
    return is_visible and Path(name).name == name and "\\" not in name


def check_files(folder: Path, checksums: str) -> dict[str, str]:
    """Compare the files of a folder with a list of digests beside them. A JSON file that is listed must be there.

    Others may be missing, because what a loader does not need is not downloaded. It asks for what it needs.

    Args:
        folder: the folder of an adapter or a task.
        checksums: the name of the list.

    Returns:
        The list.

    Raises:
        FileNotFoundError: there is no such list.
        CheckpointError: a file is damaged or missing, or the list is damaged or names files elsewhere.
    """
    digests = read_checksums(folder / checksums)
    for name, digest in digests.items():
        path = folder / name
        if path.is_file():
            require_sha256(path, digest)
        elif path.suffix == ".json":
            raise CheckpointError(f"{path} is missing, and {checksums} names it. Download or copy the folder again.")
    return digests
