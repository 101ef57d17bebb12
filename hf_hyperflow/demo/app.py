"""The demo: a page on which a person adapts a backbone to classes of their own and sees what it changed."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
import PIL.Image
from starlette.middleware import Middleware
from transformers import AutoModel, PreTrainedModel

from ..modeling.adapter import HyperFlowAdapter
from ..modeling.images import process_images
from .handlers import Handlers
from .html import SCRIPT, STYLE
from .layout import lay_out
from .limits import VisitorLimits
from .released import ADAPTER, BACKBONE, find_released
from .sessions import SharedModels

#: The largest upload, per file.
MAX_FILE_SIZE = "20mb"

#: Visitors who can wait for their turn with the models.
QUEUE_SIZE = 100

#: Visitors whose adapted tasks are kept; those of the longest unused go first.
MAX_SESSIONS = 500

#: Fonts that the visitor's system has, and a colour that white text can be read on.
THEME = gr.themes.Default(
    primary_hue="blue",
    font=[gr.themes.Font(name) for name in ("Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")],
    font_mono=[gr.themes.Font("monospace")],
).set(button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700")

#: Which images the released adapter is good at: where its gains were measured, see its report.
GOOD_AT = "Helps most with satellite images, X-rays, surfaces; least with photos."


def build_demo(adapter: HyperFlowAdapter, backbone: PreTrainedModel, good_at: str = "") -> gr.Blocks:
    """Build the page. Every browser window has a task of its own; all share the two models, one after the other.

    Nobody stops the others: a class has at most `MAX_IMAGES` images of `MAX_FILE_SIZE`, and an error ends one request
    alone. `launch` adds that `QUEUE_SIZE` requests can wait, and `VisitorLimits` says how many can be of one visitor.

    Args:
        adapter: with its image processor.
        backbone: the model that the adapter was trained for.
        good_at: a sentence for visitors, on which images the two are good at.

    Raises:
        IncompatibleBackboneError: the backbone is not of the adapter's kind.
        ValueError: the adapter has no image processor.
    """
    adapter.split(backbone)
    if adapter.processor is None:
        raise ValueError("the adapter has no image processor, so the page cannot read images: set adapter.processor.")
    handlers = Handlers(SharedModels(adapter, backbone))
    height, width = process_images([PIL.Image.new("RGB", (64, 64))], adapter.processor).shape[-2:]
    advice = f"{good_at} Looks at {width} \N{MULTIPLICATION SIGN} {height} pixels.".strip()
    with gr.Blocks(title="HyperFlow", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        gr.HTML(STYLE)
        lay_out(handlers, advice)
        page.load(None, js=SCRIPT)
    return page


def launch(page: gr.Blocks, host: str, port: int) -> None:
    """Serve the page in a thread, within the limits that keep one visitor from stopping another.

    Raises:
        OSError: the port is taken.
    """
    page.queue(max_size=QUEUE_SIZE, default_concurrency_limit=1, api_open=False)
    page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        theme=THEME,
        max_file_size=MAX_FILE_SIZE,
        state_session_capacity=MAX_SESSIONS,
        app_kwargs={"middleware": [Middleware(VisitorLimits)]},
    )


def main(adapter: str | None = None, backbone: str | None = None, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Load the models and serve the page until interrupted.

    Args:
        adapter, backbone: folders or Hub ids; the released ones of this repository by default.
        host, port: where to listen; "0.0.0.0" on every network interface.

    Raises:
        CheckpointError, IncompatibleBackboneError: the adapter is damaged, or was made for another backbone.
        OSError: there is no backbone, or the port is taken.
    """
    name = adapter or find_released(ADAPTER)
    good_at = GOOD_AT if Path(name).name == ADAPTER else ""
    flow = HyperFlowAdapter.from_pretrained(name)
    page = build_demo(flow, AutoModel.from_pretrained(backbone or find_released(BACKBONE)), good_at)
    try:
        launch(page, host, port)
    except OSError as error:
        raise OSError(f"cannot listen on {host}, port {port}: is it taken? Choose another port or host.") from error
    print(f"The demo is at http://{host}:{port} (stop it with Ctrl-C).", flush=True)
    page.block_thread()
