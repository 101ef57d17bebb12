"""`hyperflow quickstart`, `benchmark`, `bench` and `demo`: the doors to what lives in other rooms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..extras import require_extra
from .options import Adapter
from .printing import hide_progress_bars


def quickstart(
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON and nothing else.")] = False,
    output: Annotated[
        Path, typer.Option("--output_dir", "--output", help="Folder for the picture and the task.")
    ] = Path("outputs/quickstart"),
) -> None:
    """Adapt the released backbone to ten handwritten digits and compare with fine-tuning, in about a minute."""
    hide_progress_bars()
    with require_extra("benchmark", "the quickstart"):
        from ..demo.quickstart import run
    run(output, as_json=as_json)


def benchmark(context: typer.Context) -> None:
    """Compare direct transfer, HyperFlow and fine-tuning on the same few-shot episodes, with what they cost."""
    hide_progress_bars()
    with require_extra("benchmark", "the benchmark"):
        from ..benchmark.runner import main
    main(_add_released_pair(context.args))


def bench(context: typer.Context) -> None:
    """Measure time, memory and operations of getting ready and of predicting, beside one look at the images."""
    hide_progress_bars()
    with require_extra("benchmark", "the bench"):
        from ..benchmark.bench.run import main
    from ..demo.released import ADAPTER, BACKBONE, find_released

    main(context.args, lambda: (find_released(BACKBONE), find_released(ADAPTER)))


def _add_released_pair(arguments: list[str]) -> list[str]:
    """The arguments of the benchmark, with the released adapter and backbone where no adapter is named."""
    names = {argument.partition("=")[0] for argument in arguments}
    if names & {"--adapter", "--help", "-h"}:
        return arguments
    from ..demo.released import ADAPTER, BACKBONE, find_released

    arguments = [*arguments, "--adapter", str(find_released(ADAPTER))]
    if "--backbone" not in names:
        arguments += ["--backbone", str(find_released(BACKBONE))]
    return arguments


def demo(
    adapter: Adapter = None,
    backbone: Annotated[
        str | None, typer.Option(help="Its backbone: folder or Hub id; by default the released one.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every network interface.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
) -> None:
    """Serve a page on which to adapt to classes of your own and to compare before and after."""
    hide_progress_bars()
    with require_extra("demo", "the demo"):
        from ..demo.app import main as serve
    from .loading import A_BACKBONE, AN_ADAPTER, require_kind

    for name, kind in ((adapter, AN_ADAPTER), (backbone, A_BACKBONE)):
        if name is not None:
            require_kind(name, kind)
    serve(adapter, backbone, host, port)
