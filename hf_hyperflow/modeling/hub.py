"""The Hub: download a repository into the cache, push a folder as one commit, and say clearly what went wrong."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, close_session, constants, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from .checksums import sha256
from .hub_errors import to_checkpoint_error
from .model_card import CARD, is_generated
from .pushed_files import list_files, remove_paths
from .saving import CheckpointError
from .version import __version__

T = TypeVar("T")

#: How many seconds all of a download may take. What arrived before is kept, and the next attempt goes on from there.
#: A push may take longer by the time that its files take on a slow line, of so many bytes a second.
DEADLINE = 600.0
SLOWEST_UPLOAD = 100_000


def fetch(
    name_or_folder: str | os.PathLike,
    *patterns: str,
    repo_type: str = "model",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """The folder that holds a Hub repository in the cache, after its files are downloaded. A folder is returned as is.

    A dropped connection is taken up again where it broke. A file that arrived only in part is never in the folder. All
    of it takes `DEADLINE` seconds at most, whatever the server does. Files that are not what the Hub announced (by
    their git or SHA-256 digest, which the cache names them by) are refused; large files of datasets are left to those
    who read them.

    Args:
        name_or_folder: a folder, or else a Hub id ("owner/name").
        patterns: the files to download, like "*.json".
        repo_type: "model" or "dataset".
        revision: a branch, a tag or a commit. The name of the returned folder is the sha of the commit.
        token: of a user who may read the repository; None takes that of `hf auth login` or HF_TOKEN.
        cache_dir: another cache than that of `huggingface_hub`.
        local_files_only: do not look at the Hub.
        force_download: also download files that are in the cache.

    Raises:
        CheckpointError: there is no such folder or repository, it may not be read, it is neither within reach nor in
            the cache, it takes too long, or a file is damaged.
    """
    if os.path.isdir(name_or_folder):
        return Path(name_or_folder)

    def download() -> str:
        return snapshot_download(
            str(name_or_folder),
            repo_type=repo_type,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            force_download=force_download,
            allow_patterns=list(patterns),
            library_name="hf_hyperflow",
            library_version=__version__,
        )

    try:
        folder = Path(within_deadline(download))
    except Exception as error:  # errors of the client, of its HTTP library and of xet share no base class
        is_offline = local_files_only or constants.HF_HUB_OFFLINE
        raise to_checkpoint_error(error, "load", str(name_or_folder), revision, is_offline=is_offline) from error
    for path in filter_repo_objects(sorted(folder.rglob("*")), allow_patterns=list(patterns), key=_relative_to(folder)):
        _require_announced(path, str(name_or_folder), with_large=repo_type == "model")
    return folder


def within_deadline(call: Callable[[], T], *, n_bytes_sent: int = 0) -> T:
    """What a function returns that calls the client of the Hub, some of whose requests wait for ever.

    Raises:
        TimeoutError: it takes more than `DEADLINE` seconds, and what the bytes that it sends take at `SLOWEST_UPLOAD`.
            The connections of the client are closed.
    """
    seconds = DEADLINE + n_bytes_sent / SLOWEST_UPLOAD
    outcome: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:  # raised again in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        thread.join(seconds)
    finally:
        if thread.is_alive():  # in vain, or interrupted
            close_session()  # or threads of the client that wait for a server would keep the process from ending
    if errors:
        raise errors[0]
    if not outcome:
        raise TimeoutError(f"it took longer than {seconds:.0f} s")
    return outcome[0]


def _relative_to(folder: Path) -> Callable[[Path], str]:
    return lambda path: path.relative_to(folder).as_posix()


def _require_announced(path: Path, name: str, *, with_large: bool) -> None:
    """Compare a file of the cache with the digest that the Hub announced it by, which is the name of its blob.

    Raises:
        CheckpointError: it is another file.
    """
    if not path.is_symlink() or not path.is_file():  # without links, the cache does not keep the digest
        return
    blob = path.resolve()
    if re.fullmatch("[0-9a-f]{40}", blob.name):  # of a small file: what git calls it
        content = blob.read_bytes()
        digest = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
        is_announced = digest.hexdigest() == blob.name
    elif with_large and re.fullmatch("[0-9a-f]{64}", blob.name):
        is_announced = sha256(blob) == blob.name
    else:
        return
    if not is_announced:
        raise CheckpointError(
            f"{path.name} of {name} is damaged: it is not what the Hub announced. Load it once with "
            f"force_download=True, or delete {blob}."
        )


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *patterns: str,
    repo_type: str = "model",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Push the files of an adapter or a task, or those of other patterns, to a repository as one commit or not at all.

    Other files of the folder stay where they are, and links are not followed. Where a config names a folder as the
    model that something was made for, the Hub gets an empty name. The repository and the branch are made if need be. A
    card that somebody wrote on the Hub is kept (see `is_generated`).

    Args:
        folder: the folder to push.
        repo_id: "owner/name", or "name" for one of your own.
        patterns: the files to push, like "data/*.parquet"; without any, what `save_pretrained` writes.
        repo_type: "model" or "dataset".
        private: whether a new repository is private; None leaves it to your settings on the Hub.
        token: of a user who may write to it; None takes that of `hf auth login` or HF_TOKEN.
        revision: the branch; None is "main".
        commit_message: None says what was uploaded.

    Returns:
        The commit: `oid` pins the revision, `commit_url` shows it.

    Raises:
        CheckpointError: there is no such folder, or it has no such files; one of them is a link; the token is missing,
            wrong or may not write, the Hub cannot be reached, or it takes too long (see `within_deadline`). The
            repository holds what it held before, or all of the commit if it broke off with the Hub's last answer.
    """
    folder = Path(folder)
    files = _list_pushed(folder, patterns)
    contents = remove_paths(folder, files)
    n_bytes = sum((folder / file).stat().st_size for file in files)
    api = HfApi(token=token, library_name="hf_hyperflow", library_version=__version__)

    def push() -> CommitInfo:
        nonlocal repo_id
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
        card = Path(CARD)
        if card in files and is_generated(folder / card) and _has_own_card(api, repo_id, repo_type, revision):
            files.remove(card)
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(file.as_posix(), contents.get(file, folder / file)) for file in files],
            commit_message=commit_message or "Upload with hf_hyperflow",
            repo_type=repo_type,
            revision=revision,
        )

    try:
        return within_deadline(push, n_bytes_sent=n_bytes)
    except Exception as error:  # as in `fetch`
        raise to_checkpoint_error(error, "push", repo_id, revision, is_offline=constants.HF_HUB_OFFLINE) from error


def _list_pushed(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files to push, relative to their folder; errors as in `push_folder`."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder} to push.")
    files = list_files(folder, *patterns)
    if not files:
        raise CheckpointError(f"{folder} holds nothing to push: neither an adapter nor a task.")
    return files


def make_repo(repo_id: str, *, token: str | bool | None = None) -> str:
    """Make a model repository unless it is there, and return its whole id. To be called before long work.

    Raises:
        CheckpointError: as `push_folder`.
    """
    api = HfApi(token=token, library_name="hf_hyperflow", library_version=__version__)

    def make() -> str:
        whole_id = api.create_repo(repo_id, exist_ok=True).repo_id
        api.auth_check(whole_id, write=True)  # where the repository is there already, a reader's token gets this far
        return whole_id

    try:
        return within_deadline(make)
    except Exception as error:  # as in `fetch`
        raise to_checkpoint_error(error, "push", repo_id, None, is_offline=constants.HF_HUB_OFFLINE) from error


def _has_own_card(api: HfApi, repo_id: str, repo_type: str, revision: str | None) -> bool:
    """Whether the repository has a card that somebody wrote."""
    try:
        card = api.hf_hub_download(repo_id, CARD, repo_type=repo_type, revision=revision)
    except EntryNotFoundError:
        return False
    return not is_generated(card)
