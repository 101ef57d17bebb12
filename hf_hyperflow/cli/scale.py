"""`hyperflow scale`: what many tasks on one backbone cost."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..extras import require_extra
from .options import Adapter, Backbone
from .printing import hide_progress_bars, print_line, print_table

if TYPE_CHECKING:
    from torch import nn

    from ..benchmark.many_tasks import ManyTasksRecord


def scale(
    adapter: Adapter = None,
    backbone: Backbone = None,
    n_tasks: Annotated[
        list[int] | None, typer.Option("--n_tasks", min=1, help="A number of tasks; can be repeated. [1, 16, 256]")
    ] = None,
    n_way: Annotated[int, typer.Option("--n_way", min=2, help="Classes of a task.")] = 5,
    n_shot: Annotated[int, typer.Option("--n_shot", min=1, help="Images of a class.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    figure: Annotated[
        Path | None, typer.Option(help="Draw cost against the number of tasks into this file (.png, .svg, .pdf).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON and nothing else.")] = False,
) -> None:
    """Measure what many tasks on one backbone cost: tasks per second, time to switch, bytes, mixed batches."""
    hide_progress_bars()
    with require_extra("benchmark", "measuring many tasks"):
        from ..benchmark.many_tasks import draw_many_tasks, extend_to_a_million, measure_many_tasks
    from .loading import choose_backbone, load_adapter, load_backbone

    flow = load_adapter(adapter)
    model = load_backbone(backbone or choose_backbone(adapter, flow))
    modules: list[nn.Module] = [flow, model]
    for module in modules:
        module.to(device)
    records = measure_many_tasks(flow, model, n_tasks or [1, 16, 256], n_way=n_way, n_shot=n_shot)
    if figure is not None:
        draw_many_tasks(records).savefig(figure, dpi=140)
    if as_json:
        print_line(json.dumps([asdict(record) for record in records]))
        return
    _print_records(records)
    print_line(extend_to_a_million(records[-1]))


def _print_records(records: list[ManyTasksRecord]) -> None:
    rows = [["tasks", "tasks/s", "adapt in a loop", "to one forward pass", "bytes in memory", "on disk"]]
    for record in records:
        rows.append(
            [
                str(record.n_tasks),
                f"{record.tasks_per_second:.1f}",
                f"{record.n_tasks / record.seconds_adapt:.1f}",
                f"{record.seconds_adapt_many / record.seconds_forward:.2f} x",
                f"{record.bytes_memory:,}",
                f"{record.bytes_disk:,}",
            ]
        )
    print_table(rows)
    last = records[-1]
    print_line(
        f"One image: {1e3 * last.seconds_predict:.1f} ms by the task before, {1e3 * last.seconds_switch:.1f} ms by "
        f"another one. Save a task: {1e3 * last.seconds_save:.0f} ms; load: {1e3 * last.seconds_load:.0f} ms."
    )
    print_line(
        f"{last.n_mixed} images of as many tasks: {1e3 * last.seconds_mixed:.0f} ms in a mixed batch, "
        f"{1e3 * last.seconds_one_by_one:.0f} ms one by one."
    )
