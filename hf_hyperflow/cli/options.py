"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Adapter = Annotated[str | None, typer.Option(help="HyperFlow adapter: folder or Hub id; by default the released one.")]
Backbone = Annotated[
    str | None,
    typer.Option(
        help="Vision model that the adapter was trained for: folder or Hub id; by default the released one "
        "or, with --adapter, the one that the adapter names."
    ),
]
SkipBad = Annotated[
    bool,
    typer.Option("--skip_bad", help="Leave out images that cannot be read, naming them; they are no error then."),
]
Task = Annotated[str, typer.Option(help="Adapted task: folder or Hub id.")]
TaskBackbone = Annotated[
    str | None, typer.Option(help="Its backbone: folder or Hub id; by default the one that the task names.")
]
Views = Annotated[
    int,
    typer.Option(
        min=1, max=4, help="Average the features of so many views of an image: itself, two crops, its mirror image."
    ),
]
AdaptViews = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=4,
        help="Learn from so many views of each image: itself, two crops, its mirror image; by default the adapter's.",
    ),
]
