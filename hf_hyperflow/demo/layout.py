"""What is on the page, from top to bottom, and which button reads and changes what."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from .handlers import Handlers
from .html import make_message_line
from .uploads import MAX_CLASSES, MAX_IMAGES, MAX_NAME_LENGTH, MIN_CLASSES

_INTRODUCTION = """
# HyperFlow: your classes from a handful of images

Name two classes or more, give each a few images, and press **Adapt**: seconds, not a training run. Then try new images
and compare. Your images are used for this page alone and deleted within a day.
"""

#: Takes the values of all names and all galleries, and returns them without those of a row.
_MOVE_UP = """(...fields) => {
  const columns = [fields.slice(0, fields.length / 2), fields.slice(fields.length / 2)];
  columns.forEach((column) => column.splice(ROW, 1));
  return [...columns[0], "", ...columns[1], []];
}"""


@dataclass(frozen=True)
class ClassSection:
    """Part 1 of the page: a row of components for each of `MAX_CLASSES` classes, of which `n_rows` are shown."""

    n_rows: gr.State
    example: gr.Button
    groups: list[gr.Group]
    names: list[gr.Textbox]
    galleries: list[gr.Gallery]
    removes: list[gr.Button]
    add: gr.Button
    start_again: gr.Button

    @property
    def fields(self) -> list:
        """What a person fills in: first all names, then all galleries."""
        return [*self.names, *self.galleries]

    @property
    def rows(self) -> list:
        """What changes with the number of rows."""
        return [self.n_rows, self.add, *self.groups]


@dataclass(frozen=True)
class AdaptSection:
    """Part 2 of the page: adapt, and what came of it."""

    button: gr.Button
    status: gr.HTML
    download: gr.DownloadButton


@dataclass(frozen=True)
class PredictSection:
    """Part 3 of the page: new images, before and after."""

    gallery: gr.Gallery
    button: gr.Button
    results: gr.HTML


def lay_out(handlers: Handlers, advice: str) -> None:
    """Put everything on the page that is being built.

    Args:
        handlers: what the buttons do.
        advice: a line beside the first button: which images the models are good at.
    """
    gr.Markdown(_INTRODUCTION)
    classes = _lay_out_classes(advice)
    adaptation = _lay_out_adaptation()
    prediction = _lay_out_prediction()
    _connect_classes(handlers, classes, prediction)
    _connect_models(handlers, classes, adaptation, prediction)


def _lay_out_classes(advice: str) -> ClassSection:
    n_rows = gr.State(MIN_CLASSES)
    gr.Markdown("## 1. Classes")
    with gr.Row(elem_classes="hf-begin"):
        example = gr.Button("Try the example: handwritten digits", elem_id="example")
        gr.Markdown(advice, elem_id="advice", elem_classes="hf-advice")
    groups, names, galleries, removes = [], [], [], []
    with gr.Row(elem_classes="hf-classes"):
        for row in range(1, MAX_CLASSES + 1):
            with gr.Group(visible=row <= MIN_CLASSES, elem_id=f"class-{row}", elem_classes="hf-class") as group:
                names.append(
                    gr.Textbox(label=f"Name of class {row}", max_length=MAX_NAME_LENGTH, elem_id=f"name-{row}")
                )
                galleries.append(_make_gallery(f"Images of class {row}", f"images-{row}"))
                removes.append(gr.Button("Remove", size="sm", elem_id=f"remove-{row}", elem_classes="hf-remove"))
            groups.append(group)
    with gr.Row():
        add = gr.Button("Add a class", elem_id="add-class")
        gr.Button("Open a folder", elem_id="folder")  # page.js does the rest
        start_again = gr.Button("Start again", elem_id="start-again")
    gr.HTML(make_message_line(MAX_IMAGES, MAX_CLASSES), elem_id="said")
    return ClassSection(n_rows, example, groups, names, galleries, removes, add, start_again)


def _lay_out_adaptation() -> AdaptSection:
    gr.Markdown("## 2. Adapt")
    button = gr.Button("Adapt", variant="primary", elem_id="adapt")
    status = gr.HTML(elem_id="status")
    download = gr.DownloadButton("Download the PEFT adapter (zip)", visible=False, elem_id="download")
    return AdaptSection(button, status, download)


def _lay_out_prediction() -> PredictSection:
    gr.Markdown("## 3. Try new images")
    gallery = _make_gallery("New images", "queries")
    button = gr.Button("Predict", variant="primary", elem_id="predict")
    results = gr.HTML(elem_id="results")
    return PredictSection(gallery, button, results)


def _make_gallery(label: str, elem_id: str) -> gr.Gallery:
    return gr.Gallery(
        label=label,
        elem_id=elem_id,
        elem_classes="hf-gallery",
        type="filepath",
        file_types=["image"],
        sources=["upload", "webcam"],  # from the clipboard, and folders: page.js
        interactive=True,
        object_fit="contain",
        allow_preview=False,
        buttons=[],
    )


def _connect_classes(handlers: Handlers, classes: ClassSection, prediction: PredictSection) -> None:
    """Connect the buttons that need no models: they do not wait behind those who use them, and do not count as runs."""
    filled = [*classes.rows, *classes.fields, prediction.gallery]
    classes.example.click(handlers.load_digits, None, filled, queue=False)
    classes.add.click(handlers.add_class, classes.n_rows, classes.rows, queue=False)
    for row, button in enumerate(classes.removes):
        # Images do not travel: the browser moves names and images up, and the server hides the last row.
        button.click(None, classes.fields, classes.fields, js=_MOVE_UP.replace("ROW", str(row)))
        button.click(handlers.remove_class, classes.n_rows, classes.rows, queue=False)


def _connect_models(
    handlers: Handlers, classes: ClassSection, adaptation: AdaptSection, prediction: PredictSection
) -> None:
    """Connect the buttons that make, use and drop a visitor's task."""
    session = gr.State(time_to_live=24 * 3600)
    adapted = [session, adaptation.status, adaptation.download, prediction.results]
    adaptation.button.click(
        handlers.adapt, classes.fields, adapted, concurrency_limit=1, concurrency_id="models", api_name="adapt"
    )
    prediction.button.click(
        handlers.predict,
        [session, prediction.gallery],
        prediction.results,
        concurrency_id="models",
        api_name="predict",
    )
    # What was said of other images than those in the gallery goes; the browser does that alone.
    prediction.gallery.change(None, None, prediction.results, js="() => ''")
    emptied = [*classes.rows, *classes.fields, prediction.gallery, *adapted]
    classes.start_again.click(handlers.start_again, None, emptied, queue=False)
