"""`hyperflow export`: an adapter and its backbone as ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..extras import require_extra
from .options import Adapter, Backbone
from .printing import hide_progress_bars, print_line, quote


def export(
    output: Annotated[Path, typer.Option("--output_dir", "--output", help="Folder for the ONNX files.")],
    adapter: Adapter = None,
    backbone: Backbone = None,
    n_steps: Annotated[
        int | None, typer.Option("--n_steps", min=1, help="Solver steps; by default the adapter's.")
    ] = None,
    solver: Annotated[str | None, typer.Option(help="euler, midpoint, heun or rk4; by default the adapter's.")] = None,
) -> None:
    """Write an adapter and its backbone as ONNX, to adapt and predict where there is no PyTorch.

    hyperflow_onnx.py in the folder does both with numpy, Pillow and onnxruntime, and index.html does both in a browser.
    What is written is compared with PyTorch before it is put in place.
    """
    hide_progress_bars()
    with require_extra("onnx", "the export"):
        from ..export.exporting import export_onnx
    from ..info import format_size
    from ..modeling.saving import CheckpointError, exclusive
    from .loading import choose_backbone, load_adapter, load_backbone

    if (output / "config.json").exists():
        raise CheckpointError(f"{output} holds a model (config.json): choose another folder for the export.")
    with exclusive(output):
        flow = load_adapter(adapter)
        model = load_backbone(backbone or choose_backbone(adapter, flow))
        export_onnx(flow, model, output, n_steps=n_steps, solver=solver)
    print_line(f"Saved {output} ({format_size(output)}). Both can be had without PyTorch, with onnxruntime:")
    program = quote(output / "hyperflow_onnx.py")
    print_line(f"  python {program} adapt SUPPORT_FOLDER --task my-task.npz")
    print_line(f"  python {program} predict IMAGE ... --task my-task.npz")
    print_line("Or in a browser, at http://127.0.0.1:8000, with:")
    print_line(f"  python -m http.server --bind 127.0.0.1 --directory {quote(output)}")
