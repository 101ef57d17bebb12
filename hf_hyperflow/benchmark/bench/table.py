"""What `hyperflow bench` prints: ratios first, then what everything costs."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from .records import LABELS, PARTS, PREDICTION_LABELS, CostRecord, CostTable, Place, format_size
from .task import FORWARD, PIECES_OF_STEPS, READY

#: Where nothing was measured.
NOTHING = "-"

#: A terminal may be narrower, a file is not.
MIN_WIDTH = 200


def print_costs(table: CostTable) -> None:
    """Print the ratios of all places, then the costs place by place."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=MIN_WIDTH)
    console.print(build_ratio_table(table))
    console.print(build_prediction_table(table))
    for place in table.places():
        console.print(build_cost_table(table, place))


def build_ratio_table(table: CostTable) -> Table:
    """A row per place, number of images and number of steps."""
    ratios = Table(title="Ready over one forward pass; adaptation alone over full fine-tuning", box=box.SIMPLE_HEAD)
    _add_place_columns(ratios)
    ratios.add_column("images", justify="right")
    ratios.add_column("steps", justify="right")
    ratios.add_column("ready,\nfirst task", justify="right")
    ratios.add_column("\nnext task", justify="right")
    ratios.add_column("adaptation,\ntime", justify="right")
    ratios.add_column("\nnext task", justify="right")
    ratios.add_column("\nmemory", justify="right")
    for row in table.task_ratios():
        cells = [str(row.n_images), str(row.n_steps), _format_factor(row.ready), _format_factor(row.next_ready)]
        cells += [_format_share(row.adapt_time), _format_share(row.next_adapt_time), _format_share(row.adapt_memory)]
        ratios.add_row(*_list_place_cells(row.place), *cells)
    return ratios


def build_prediction_table(table: CostTable) -> Table:
    """A row per place and number of images at once."""
    predictions = Table(title="Predictions over the backbone alone", box=box.SIMPLE_HEAD)
    _add_place_columns(predictions)
    for heading in ("images at once", *PREDICTION_LABELS.values()):
        predictions.add_column(heading, justify="right")
    for row in table.prediction_ratios():
        cells = [str(row.n_images)]
        for work, ratio in zip(PREDICTION_LABELS, (None, row.task, row.merged), strict=True):
            record = table.find(row.place, work, row.n_images)
            seconds = NOTHING if record is None else format_seconds(record.seconds)
            cells.append(seconds if ratio is None else f"{_format_factor(ratio)} ({seconds})")
        predictions.add_row(*_list_place_cells(row.place), *cells)
    return predictions


def build_cost_table(table: CostTable, place: Place) -> Table:
    """A row per piece of work and method, with time, memory and operations for every number of images."""
    costs = Table(title=place.title, box=box.SIMPLE_HEAD)
    costs.add_column("")
    for n_images in table.images(place):
        for heading in (f"{n_images} images", "memory", "FLOPs"):
            costs.add_column(heading, justify="right")
    measured = {record.work for record in table.records if record.place == place}
    for work, label in LABELS.items():
        if work not in measured:
            continue
        for n_steps in table.steps(place) if work in PIECES_OF_STEPS else [None]:
            cells = [label if n_steps is None else f"{label}, {format_steps(n_steps)}"]
            for n_images in table.images(place):
                cells += _format_record(table.find(place, work, n_images, n_steps))
            costs.add_row(*cells, style="bold" if work in (FORWARD, READY) else "dim" if work in PARTS else "")
    return costs


def _add_place_columns(table: Table) -> None:
    for heading in ("backbone", "size", "device", "dtype"):
        table.add_column(heading)


def _list_place_cells(place: Place) -> list[str]:
    return [place.backbone, format_size(place.size), place.device, place.dtype]


def _format_record(record: CostRecord | None) -> list[str]:
    """Time, memory and operations."""
    if record is None:
        return [NOTHING, NOTHING, NOTHING]
    memory = NOTHING if record.peak_memory_mb is None else f"{record.peak_memory_mb:,.0f} MB"
    return [format_seconds(record.seconds), memory, _format_flops(record.flops)]


def format_seconds(seconds: float) -> str:
    """A duration in seconds or milliseconds, to three digits."""
    if seconds >= 100:
        return f"{seconds:,.0f} s"
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{1000 * seconds:.3g} ms"


def format_steps(n_steps: int) -> str:
    return "1 step" if n_steps == 1 else f"{n_steps} steps"


def _format_flops(flops: float | None) -> str:
    if flops is None:
        return NOTHING
    giga = flops / 1e9
    return f"{giga:,.0f} G" if giga >= 10 else f"{giga:.2g} G"


def _format_factor(ratio: float | None) -> str:
    return NOTHING if ratio is None else f"{ratio:.2f}x"


def _format_share(ratio: float | None) -> str:
    return NOTHING if ratio is None else f"{100 * ratio:.3g} %"
