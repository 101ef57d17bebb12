"""The demo: a page on which a person adapts a backbone to classes of their own and sees what it changed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from transformers import AutoModel, PreTrainedModel

from ..modeling.adapter import HyperFlowAdapter
from ..modeling.support import SupportSetError
from .digits import write_digits
from .html import NAME_BUTTONS, STYLE, alert, comparison, note
from .limits import VisitorLimits
from .released import ADAPTER, BACKBONE, find_released
from .report import describe, plot_flow
from .sessions import Session, SharedModels
from .uploads import MAX_NAME_LENGTH, Files, PageError, read_classes, read_files

#: Rows of the page; the command line takes any number of classes.
MAX_CLASSES = 10

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

INTRODUCTION = """
# HyperFlow: your classes from a handful of images

Name two classes or more, give each a few images, and press **Adapt**. A small network generates the weights of a PEFT
adapter for the backbone: no gradients, no training run. Then try new images and compare. Images are used for
this page alone and deleted within a day.
"""


@dataclass(frozen=True)
class ClassSection:
    """Part 1 of the page: a row of components for each of `MAX_CLASSES` classes, of which `n_rows` are shown."""

    n_rows: gr.State
    example: gr.Button
    groups: list[gr.Group]
    names: list[gr.Textbox]
    galleries: list[gr.Gallery]
    add: gr.Button


@dataclass(frozen=True)
class AdaptSection:
    """Part 2 of the page: adapt, and what came of it."""

    button: gr.Button
    status: gr.HTML
    plot: gr.Plot
    download: gr.DownloadButton


@dataclass(frozen=True)
class PredictSection:
    """Part 3 of the page: new images, before and after."""

    gallery: gr.Gallery
    button: gr.Button
    results: gr.HTML


class Handlers:
    """What the buttons do. Each returns the new values of the components that `_connect` names."""

    def __init__(self, models: SharedModels):
        self.models = models
        self._examples = TemporaryDirectory(prefix="hyperflow-digits-")

    def add_class(self, n_rows: int) -> list:
        return _show_rows(min(n_rows + 1, MAX_CLASSES))

    def load_digits(self) -> list:
        support, query = write_digits(Path(self._examples.name))
        return [*_show_rows(MAX_CLASSES), *support, *support.values(), query]

    def adapt(self, *rows: Any) -> list:
        names, galleries = list(rows[:MAX_CLASSES]), list(rows[MAX_CLASSES:])
        try:
            session, archive = self.models.adapt(read_classes(names, galleries))
        except (PageError, SupportSetError) as error:
            return [None, alert(error), gr.Plot(visible=False), gr.DownloadButton(value=None, interactive=False), ""]
        figure = plot_flow(session)
        plot = gr.Plot(value=figure, visible=figure is not None)
        return [session, note(describe(session)), plot, gr.DownloadButton(value=archive, interactive=True), ""]

    def predict(self, session: Session | None, files: Files | None) -> str:
        if session is None:
            return alert("There is nothing to predict with yet. Press Adapt first.")
        if not files:
            return alert("There are no new images. Add at least one.")
        try:
            images = read_files(files)
        except PageError as error:
            return alert(f"New images: {error}")
        before, after = self.models.compare(session, images)
        return comparison([Path(path).name for path, _ in files], images, before, after)


def build_demo(adapter: HyperFlowAdapter, backbone: PreTrainedModel) -> gr.Blocks:
    """Build the page. Every browser window has a task of its own; all share the two models, one after the other.

    Nobody stops the others: a class has at most `MAX_IMAGES` images of `MAX_FILE_SIZE`, and an error ends one request
    alone. `launch` adds that `QUEUE_SIZE` requests can wait, and `VisitorLimits` says how many can be of one visitor.

    Args:
        adapter: with its image processor.
        backbone: the model that the adapter was trained for.

    Raises:
        IncompatibleBackboneError: the backbone is not of the adapter's kind.
    """
    adapter.split(backbone)
    handlers = Handlers(SharedModels(adapter, backbone))
    with gr.Blocks(title="HyperFlow", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        gr.HTML(STYLE)
        gr.Markdown(INTRODUCTION)
        classes = _lay_out_classes()
        adaptation = _lay_out_adaptation()
        prediction = _lay_out_prediction()
        _connect(handlers, classes, adaptation, prediction)
        page.load(None, js=NAME_BUTTONS)
    return page


def _lay_out_classes() -> ClassSection:
    n_rows = gr.State(2)
    gr.Markdown("## 1. Classes")
    example = gr.Button("Use the example set: handwritten digits", elem_id="example")
    groups, names, galleries = [], [], []
    with gr.Row(elem_classes="hf-classes"):
        for row in range(1, MAX_CLASSES + 1):
            with gr.Group(visible=row <= 2, elem_classes="hf-class") as group:
                names.append(
                    gr.Textbox(label=f"Name of class {row}", max_length=MAX_NAME_LENGTH, elem_id=f"name-{row}")
                )
                galleries.append(_make_gallery(f"Images of class {row}", f"images-{row}"))
            groups.append(group)
    add = gr.Button("Add a class", elem_id="add-class")
    return ClassSection(n_rows, example, groups, names, galleries, add)


def _lay_out_adaptation() -> AdaptSection:
    gr.Markdown("## 2. Adapt")
    button = gr.Button("Adapt", variant="primary", elem_id="adapt")
    status = gr.HTML(elem_id="status")
    plot = gr.Plot(label="Accuracy along the flow", show_label=False, visible=False, elem_id="flow")
    download = gr.DownloadButton("Download the PEFT adapter (zip)", interactive=False, elem_id="download")
    return AdaptSection(button, status, plot, download)


def _lay_out_prediction() -> PredictSection:
    gr.Markdown("## 3. Try new images")
    gallery = _make_gallery("New images", "queries")
    button = gr.Button("Predict", variant="primary", elem_id="predict")
    results = gr.HTML(elem_id="results")
    return PredictSection(gallery, button, results)


def _connect(handlers: Handlers, classes: ClassSection, adaptation: AdaptSection, prediction: PredictSection) -> None:
    """Say what each button reads and what it changes."""
    session = gr.State(time_to_live=24 * 3600)
    rows = [classes.n_rows, classes.add, *classes.groups]
    fields = [*classes.names, *classes.galleries]
    # These two need no models, so they do not wait behind those who use them, and do not count as runs.
    classes.add.click(handlers.add_class, classes.n_rows, rows, queue=False)
    classes.example.click(handlers.load_digits, None, [*rows, *fields, prediction.gallery], queue=False)
    adaptation.button.click(
        handlers.adapt,
        fields,
        [session, adaptation.status, adaptation.plot, adaptation.download, prediction.results],
        concurrency_limit=1,
        concurrency_id="models",
    )
    prediction.button.click(
        handlers.predict, [session, prediction.gallery], prediction.results, concurrency_id="models"
    )


def _make_gallery(label: str, elem_id: str) -> gr.Gallery:
    return gr.Gallery(
        label=label,
        elem_id=elem_id,
        elem_classes="hf-gallery",
        type="filepath",
        file_types=["image"],
        sources=["upload"],
        interactive=True,
        columns=5,
        height=120,
        object_fit="contain",
        allow_preview=False,
        buttons=[],
    )


def _show_rows(n_rows: int) -> list:
    """New values of the number of rows, of the button that adds one, and of all the rows' groups."""
    groups = [gr.Group(visible=row < n_rows) for row in range(MAX_CLASSES)]
    return [n_rows, gr.Button(interactive=n_rows < MAX_CLASSES), *groups]


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
    flow = HyperFlowAdapter.from_pretrained(adapter or find_released(ADAPTER))
    page = build_demo(flow, AutoModel.from_pretrained(backbone or find_released(BACKBONE)))
    try:
        launch(page, host, port)
    except OSError as error:
        raise OSError(f"cannot listen on {host}, port {port}: is it taken? Choose another port or host.") from error
    print(f"The demo is at http://{host}:{port} (stop it with Ctrl-C).", flush=True)
    page.block_thread()
