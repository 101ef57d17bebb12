"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Adapter = Annotated[str | None, typer.Option(help="HyperFlow adapter: folder or Hub id; by default the released one.")]
SkipBad = Annotated[
    bool,
    typer.Option("--skip_bad", help="Leave out images that cannot be read, naming them; they are no error then."),
]
Task = Annotated[str, typer.Option(help="Adapted task: folder or Hub id.")]
TaskBackbone = Annotated[
    str | None, typer.Option(help="Its backbone: folder or Hub id; by default the one that the task names.")
]
