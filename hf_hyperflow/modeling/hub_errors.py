"""What went wrong on the way to the Hub or from it, and what to do, in words."""

from __future__ import annotations

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .model_card import CARD
from .saving import CheckpointError
from .tokens import hide_tokens


def to_checkpoint_error(
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
        no_id = "it is no Hub id: those look like 'owner/name'."
        return no_id if verb == "push" else f"there is no folder {repo_id}, and {no_id}"
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
        missing = f"no folder {repo_id} and no such repository"
        if verb == "push":
            missing = "no such repository"
        return (
            f"there is {missing} at {hub}, or it is private and you are not allowed to see it. Check the name; if it "
            f"is private, {log_in}."
        )
    if is_offline and isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        switched_off = "the Hub is switched off (HF_HUB_OFFLINE=1 or local_files_only=True)"
        if verb == "push":
            return f"{switched_off}. Go online to push."
        return (
            f"there is no folder {repo_id}, {switched_off}, and the cache does not hold all of {repo_id}. Load it once "
            "online, or give a folder."
        )
    if isinstance(error, TimeoutError) and verb == "push":
        return f"{error}, so it was given up. Look at {hub}/{repo_id} whether it arrived, or try again."
    if isinstance(error, TimeoutError):
        return f"{error}, so it was given up. Try again: what arrived is kept."
    cause = error.__cause__ or error
    detail = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    broken = f"{hub} cannot be reached or the connection broke ({type(cause).__name__}: {detail}). Try again"
    if verb == "push":
        return f"{broken}: nothing was changed there."
    return f"there is no folder {repo_id}, and {broken}: files that arrived whole are kept."
