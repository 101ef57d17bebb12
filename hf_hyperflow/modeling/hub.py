"""The Hub: fetch a repository into the cache, push a folder as one commit, say clearly what went wrong."""

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
    """A folder as it is, or the folder in the cache that a Hub repository was downloaded to.

    A dropped connection is taken up again where it broke; what arrived only in part is never in the folder.

    Args:
        name_or_folder: a folder, or else a Hub id ("owner/name").
        patterns: the files to download, like "*.json".
        repo_type: "model" or "dataset".
        revision: a branch, a tag or a commit; the folder's name is the sha of the commit.
        token: of a user who may read the repository; None takes the one of `hf auth login` or HF_TOKEN.
        cache_dir: another cache than that of `huggingface_hub`.
        local_files_only: do not look at the Hub.
        force_download: download what is in the cache, too.

    Raises:
        CheckpointError: no such folder or repository, no access, no connection and not in the cache.
    """
    if os.path.isdir(name_or_folder):
        return Path(name_or_folder)
    try:
        folder = snapshot_download(
            str(name_or_folder),
            repo_type=repo_type,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            allow_patterns=list(patterns),
            library_name="hf_hyperflow",
            library_version=__version__,
        )
    except Exception as error:  # the client's own, those of its HTTP library and of xet share no base class
        offline = local_files_only or constants.HF_HUB_OFFLINE
        raise _explained(error, "load", str(name_or_folder), revision, offline=offline) from error
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
    """Push all files of a folder but hidden ones to a repository, as one commit: all of them or none.

    The repository and the branch are made if need be. Files that are there already are not sent again, and a card
    that somebody wrote on the Hub is kept (see `hf_hyperflow.modeling.model_card`).

    Args:
        folder: what to push.
        repo_id: "owner/name", or "name" for one of your own.
        repo_type: "model" or "dataset".
        private: whether a new repository is private; None leaves it to your settings on the Hub.
        token: of a user who may write to it; None takes the one of `hf auth login` or HF_TOKEN.
        revision: the branch; None is "main".
        commit_message: None says what was uploaded.

    Returns:
        The commit: `oid` pins the revision, `commit_url` shows it.

    Raises:
        CheckpointError: no such folder, no or a wrong token, no permission, no connection; the repository holds
            what it held before.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder} to push.")
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [file for file in files if not any(p.startswith((".", "__pycache__")) for p in file.parts)]
    api = HfApi(token=token, library_name="hf_hyperflow", library_version=__version__)
    try:
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
        if Path(CARD) in files and is_generated(folder / CARD) and _has_own_card(api, repo_id, repo_type, revision):
            files.remove(Path(CARD))
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(file.as_posix(), folder / file) for file in files],
            commit_message=commit_message or "Upload with hf_hyperflow",
            repo_type=repo_type,
            revision=revision,
        )
    except Exception as error:  # as above
        raise _explained(error, "push", repo_id, revision, offline=constants.HF_HUB_OFFLINE) from error


def make_repo(repo_id: str, *, token: str | bool | None = None) -> str:
    """Make a model repository unless it is there, and return its whole id; before long work whose result goes there.

    Raises:
        CheckpointError: as `push_folder`.
    """
    api = HfApi(token=token, library_name="hf_hyperflow", library_version=__version__)
    try:
        repo_id = api.create_repo(repo_id, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)  # where there is a repository, a token that may only read got this far
        return repo_id
    except Exception as error:  # as above
        raise _explained(error, "push", repo_id, None, offline=constants.HF_HUB_OFFLINE) from error


def _has_own_card(api: HfApi, repo_id: str, repo_type: str, revision: str | None) -> bool:
    try:
        return not is_generated(api.hf_hub_download(repo_id, CARD, repo_type=repo_type, revision=revision))
    except EntryNotFoundError:
        return False


def _explained(error: Exception, verb: str, repo_id: str, revision: str | None, *, offline: bool) -> CheckpointError:
    """What went wrong between us and the Hub and what to do about it."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    hub, at = constants.ENDPOINT, f" at revision {revision!r}" if revision else ""
    log_in = "log in with `hf auth login`, set HF_TOKEN or pass token="
    if isinstance(error, HFValidationError):
        problem = f"there is no folder {repo_id}, and it is no Hub id: those look like 'owner/name'."
    elif isinstance(error, RevisionNotFoundError):
        problem = f"{repo_id} has no revision {revision!r}. Give a branch, a tag or a whole commit sha that it has."
    elif isinstance(error, GatedRepoError):
        problem = f"{repo_id} is gated. Accept its terms at {hub}/{repo_id}, then {log_in}."
    elif status == 401 and "credentials" in str(error).lower():
        problem = f"{hub} refused the token: it is wrong or expired. Make one at {hub}/settings/tokens, then {log_in}."
    elif status == 401 and verb == "push":
        problem = f"{hub} wants to know who you are: {log_in} (a token that may write)."
    elif status == 403:
        problem = f"your token may not {'write to' if verb == 'push' else 'read'} it. Take one with that permission."
    elif status in (401, 404) or isinstance(error, RepositoryNotFoundError):
        problem = f"there is no folder {repo_id} and no such repository at {hub}, or it is private and you are not "
        problem += f"allowed to see it. Check the name; if it is private, {log_in}."
    elif offline and isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        problem = "the Hub is switched off (HF_HUB_OFFLINE=1 or local_files_only=True)"
        problem += ". Go online to push." if verb == "push" else f" and the cache does not hold all of {repo_id}. "
        problem += "" if verb == "push" else "Load it once online, or give a folder."
    else:
        cause = error.__cause__ or error
        detail = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        problem = f"{hub} cannot be reached or the connection broke ({type(cause).__name__}: {detail}). Try again: "
        problem += "nothing was changed there." if verb == "push" else "files that arrived whole are kept."
    return CheckpointError(f"cannot {verb} {repo_id}{at}: {problem}")
