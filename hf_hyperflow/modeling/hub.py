"""The Hub: download a repository into the cache, push a folder as one commit, and say clearly what went wrong."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .model_card import CARD, is_generated
from .saving import CheckpointError
from .version import __version__


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

    A dropped connection is taken up again where it broke. A file that arrived only in part is never in the folder.

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
        CheckpointError: there is no such folder or repository, it may not be read, or it is neither within reach nor in
            the cache.
    """
    if os.path.isdir(name_or_folder):
        return Path(name_or_folder)
    try:
        folder = snapshot_download(
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
    except Exception as error:  # errors of the client, of its HTTP library and of xet share no base class
        is_offline = local_files_only or constants.HF_HUB_OFFLINE
        raise _to_checkpoint_error(error, "load", str(name_or_folder), revision, is_offline=is_offline) from error
    return Path(folder)


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Push the files of a folder to a repository as one commit: all of them or none. Hidden files are left out.

    The repository and the branch are made if need be. Files that the Hub has already are not sent again. A card that
    somebody wrote on the Hub is kept (see `is_generated`).

    Args:
        folder: the folder to push.
        repo_id: "owner/name", or "name" for one of your own.
        repo_type: "model" or "dataset".
        private: whether a new repository is private; None leaves it to your settings on the Hub.
        token: of a user who may write to it; None takes that of `hf auth login` or HF_TOKEN.
        revision: the branch; None is "main".
        commit_message: None says what was uploaded.

    Returns:
        The commit: `oid` pins the revision, `commit_url` shows it.

    Raises:
        CheckpointError: there is no such folder, the token is missing, wrong or may not write, or the Hub cannot be
            reached. The repository holds what it held before.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder} to push.")
    files = _list_files(folder)
    api = HfApi(token=token, library_name="hf_hyperflow", library_version=__version__)
    try:
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
        card = Path(CARD)
        if card in files and is_generated(folder / card) and _has_own_card(api, repo_id, repo_type, revision):
            files.remove(card)
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(file.as_posix(), folder / file) for file in files],
            commit_message=commit_message or "Upload with hf_hyperflow",
            repo_type=repo_type,
            revision=revision,
        )
    except Exception as error:  # as in `fetch`
        raise _to_checkpoint_error(error, "push", repo_id, revision, is_offline=constants.HF_HUB_OFFLINE) from error


def _list_files(folder: Path) -> list[Path]:
    """Paths in a folder of all its files, without hidden ones and without caches of Python."""
    files = []
    for path in sorted(folder.rglob("*")):
        file = path.relative_to(folder)
        is_hidden = any(part.startswith((".", "__pycache__")) for part in file.parts)
        if path.is_file() and not is_hidden:
            files.append(file)
    return files


def make_repo(repo_id: str, *, token: str | bool | None = None) -> str:
    """Make a model repository unless it is there, and return its whole id. To be called before long work.

    Raises:
        CheckpointError: as `push_folder`.
    """
    api = HfApi(token=token, library_name="hf_hyperflow", library_version=__version__)
    try:
        repo_id = api.create_repo(repo_id, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)  # where the repository is there already, a reader's token gets this far
        return repo_id
    except Exception as error:  # as in `fetch`
        raise _to_checkpoint_error(error, "push", repo_id, None, is_offline=constants.HF_HUB_OFFLINE) from error


def _has_own_card(api: HfApi, repo_id: str, repo_type: str, revision: str | None) -> bool:
    """Whether the repository has a card that somebody wrote."""
    try:
        card = api.hf_hub_download(repo_id, CARD, repo_type=repo_type, revision=revision)
    except EntryNotFoundError:
        return False
    return not is_generated(card)


def _to_checkpoint_error(
    error: Exception, verb: str, repo_id: str, revision: str | None, *, is_offline: bool
) -> CheckpointError:
    """The error that says what went wrong on the way to "load" or "push" a repository, and what to do."""
    at = f" at revision {revision!r}" if revision else ""
    problem = _explain(error, verb, repo_id, revision, is_offline)
    return CheckpointError(f"cannot {verb} {repo_id}{at}: {problem}")


def _explain(error: Exception, verb: str, repo_id: str, revision: str | None, is_offline: bool) -> str:
    hub = constants.ENDPOINT
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    log_in = "log in with `hf auth login`, set HF_TOKEN or pass token="
    if isinstance(error, HFValidationError):
        return f"there is no folder {repo_id}, and it is no Hub id: those look like 'owner/name'."
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}. Give a branch, a tag or a whole commit sha that it has."
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated. Accept its terms at {hub}/{repo_id}, then {log_in}."
    if status == 401 and "credentials" in str(error).lower():
        return f"{hub} refused the token: it is wrong or expired. Make one at {hub}/settings/tokens, then {log_in}."
    if status == 401 and verb == "push":
        return f"{hub} wants to know who you are: {log_in} (a token that may write)."
    if status == 403:
        action = "write to" if verb == "push" else "read"
        return f"your token may not {action} it. Take one with that permission."
    if status in (401, 404) or isinstance(error, RepositoryNotFoundError):
        return (
            f"there is no folder {repo_id} and no such repository at {hub}, or it is private and you are not allowed "
            f"to see it. Check the name; if it is private, {log_in}."
        )
    if is_offline and isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        switched_off = "the Hub is switched off (HF_HUB_OFFLINE=1 or local_files_only=True)"
        if verb == "push":
            return f"{switched_off}. Go online to push."
        return f"{switched_off} and the cache does not hold all of {repo_id}. Load it once online, or give a folder."
    cause = error.__cause__ or error
    detail = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    kept = "nothing was changed there" if verb == "push" else "files that arrived whole are kept"
    return f"{hub} cannot be reached or the connection broke ({type(cause).__name__}: {detail}). Try again: {kept}."
