"""The Hub: download a repository into the cache, push a folder as one commit, and say clearly what went wrong."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, close_session, constants, snapshot_download
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
from huggingface_hub.utils import filter_repo_objects

from .checksums import CHECKSUMS, MODEL_CHECKSUMS, sha256
from .model_card import CARD, is_generated, is_hub_id
from .saving import CheckpointError
from .tokens import hide_tokens
from .version import __version__

T = TypeVar("T")

#: How many seconds all of a download may take. What arrived before is kept, and the next attempt goes on from there.
DEADLINE = 600.0

#: Lists of the SHA-256 of other files, by their names.
CHECKSUM_LISTS = (CHECKSUMS, MODEL_CHECKSUMS)

#: Configs, in which libraries note the folder that a model was loaded from.
CONFIGS = ("config.json", "adapter_config.json")

#: Fields of these that name a model.
NAME_FIELDS = ("name_or_path", "_name_or_path", "base_model_name_or_path")

#: The files of an adapter or a task. Code that travels with an adapter is named as the files of this folder.
SAVED_FILES = (
    CARD,
    *CONFIGS,
    *CHECKSUM_LISTS,
    "model.safetensors",
    "training.json",
    "adapter_model.safetensors",
    "prototypes.safetensors",
    "preprocessor_config.json",
)


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
        raise _to_checkpoint_error(error, "load", str(name_or_folder), revision, is_offline=is_offline) from error
    for path in filter_repo_objects(sorted(folder.rglob("*")), allow_patterns=list(patterns), key=_relative_to(folder)):
        _require_announced(path, str(name_or_folder), with_large=repo_type == "model")
    return folder


def within_deadline(load: Callable[[], T]) -> T:
    """What a function returns that downloads with the client of the Hub, some of whose requests wait for ever.

    Raises:
        TimeoutError: it takes more than `DEADLINE` seconds. The connections of the client are closed.
    """
    outcome: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(load())
        except BaseException as error:  # raised again in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        thread.join(DEADLINE)
    finally:
        if thread.is_alive():  # in vain, or interrupted
            close_session()  # or threads of the client that wait for a server would keep the process from ending
    if errors:
        raise errors[0]
    if not outcome:
        raise TimeoutError(f"it took longer than {DEADLINE:g} s")
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
    model that something was made for, the Hub gets an empty name. The repository and the branch are made if need be.
    Files that the Hub has already are not sent again. A card that somebody wrote on the Hub is kept (see
    `is_generated`).

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
            wrong or may not write, or the Hub cannot be reached. The repository holds what it held before.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder} to push.")
    files = list_files(folder, *patterns)
    if not files:
        raise CheckpointError(f"{folder} holds nothing to push: neither an adapter nor a task.")
    contents = _remove_paths(folder, files)
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
            [CommitOperationAdd(file.as_posix(), contents.get(file, folder / file)) for file in files],
            commit_message=commit_message or "Upload with hf_hyperflow",
            repo_type=repo_type,
            revision=revision,
        )
    except Exception as error:  # as in `fetch`
        raise _to_checkpoint_error(error, "push", repo_id, revision, is_offline=constants.HF_HUB_OFFLINE) from error


def list_files(folder: Path, *patterns: str) -> list[Path]:
    """The files that `push_folder` sends, by their paths in the folder.

    Raises:
        CheckpointError: one of them is a link, or lies behind one: links are not followed.
    """
    if not patterns:
        code = [path.name for path in Path(__file__).parent.glob("[!_]*.py")]
        patterns = (*SAVED_FILES, *code)
    files: set[Path] = set()
    for pattern in patterns:
        files.update(path.relative_to(folder) for path in folder.glob(pattern))
    for file in files:
        for part in (file, *file.parents[:-1]):
            if (folder / part).is_symlink():
                raise CheckpointError(f"{folder / part} is a link, which is not followed: put the file itself there.")
    return sorted(file for file in files if (folder / file).is_file())


def _remove_paths(folder: Path, files: list[Path]) -> dict[Path, bytes]:
    """The new content of the configs that name a folder of this machine, and of the lists that hold their digests.

    Raises:
        CheckpointError: one of these files is damaged.
    """
    contents: dict[Path, bytes] = {}
    for file in files:
        if file.name in CONFIGS:
            config = _read_json(folder / file)
            if _empty_paths(config):
                contents[file] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    for file in files:
        if contents and file.name in CHECKSUM_LISTS:
            digests = _read_json(folder / file)
            for changed, content in contents.items():
                if changed.name in digests:
                    digests[changed.name] = hashlib.sha256(content).hexdigest()
            contents[file] = json.dumps(digests, indent=1).encode()
    return contents


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}). Download or copy it again.") from error


def _empty_paths(config: Any) -> bool:
    """Empty the names of models in a config that are no Hub ids, also in configs inside it; whether there were any."""
    is_changed = False
    if isinstance(config, list):
        for item in config:
            is_changed |= _empty_paths(item)
    if isinstance(config, dict):
        for key, value in config.items():
            if key in NAME_FIELDS and isinstance(value, str) and value and not is_hub_id(value):
                config[key] = ""
                is_changed = True
            else:
                is_changed |= _empty_paths(value)
    return is_changed


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
    problem = hide_tokens(_explain(error, verb, repo_id, revision, is_offline))
    return CheckpointError(f"cannot {verb} {repo_id}{at}: {problem}")


def _explain(error: Exception, verb: str, repo_id: str, revision: str | None, is_offline: bool) -> str:
    hub = constants.ENDPOINT
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    log_in = "log in with `hf auth login`, set HF_TOKEN or pass token="
    if isinstance(error, HFValidationError):
        return f"there is no folder {repo_id}, and it is no Hub id: those look like 'owner/name'."
    if isinstance(error, ValueError) and str(error).startswith("Invalid metadata"):  # of the client, before it commits
        _, _, problem = " ".join(str(error).split()).partition("- ")
        return f"{hub} refuses the metadata at the top of its {CARD}: {problem} Correct it and push again."
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
    if isinstance(error, TimeoutError):
        return f"{error}, so it was given up. Try again: what arrived is kept."
    cause = error.__cause__ or error
    detail = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    kept = "nothing was changed there" if verb == "push" else "files that arrived whole are kept"
    return f"{hub} cannot be reached or the connection broke ({type(cause).__name__}: {detail}). Try again: {kept}."
