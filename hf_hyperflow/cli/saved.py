"""`hyperflow info` and `hyperflow push`: what lies in a folder, and how it gets to the Hub."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..modeling.tokens import hide_tokens
from .printing import hide_progress_bars, print_line


def info(name: Annotated[str, typer.Argument(metavar="DIR_OR_HUB_ID", help="An adapter or an adapted task.")]) -> None:
    """Say what an adapter or an adapted task is, after checking that its files are whole."""
    hide_progress_bars()
    from ..info import describe
    from .loading import folder_first, require_folder_or_hub_id

    require_folder_or_hub_id(name)
    with folder_first(name):
        rows = asdict(describe(name))
    width = max(len(key) for key in rows)
    for key, value in rows.items():
        label = key.replace("_", " ")
        print_line(f"{label:<{width}}  {value}")


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of an adapter or an adapted task.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="'owner/name', or 'name' for one of your own.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to push to, made if it is not there; by default main.")
    ] = None,
) -> None:
    """Push an adapter or an adapted task to the Hugging Face Hub, as one commit.

    Log in with `hf auth login` first, or set HF_TOKEN.
    """
    hide_progress_bars()
    from ..info import describe
    from ..modeling.hub import push_folder
    from ..modeling.saving import CheckpointError

    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder} to push.")
    kind = describe(folder).kind
    commit = push_folder(folder, repo_id, private=private or None, revision=revision)
    print_line(hide_tokens(f"Pushed the {kind} in {folder}: {commit.commit_url}"))
