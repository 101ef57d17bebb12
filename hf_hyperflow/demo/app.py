"""The demo: a page on which a person adapts a backbone to classes of their own and sees what it changed."""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import gradio as gr
import PIL.Image
import torch
from matplotlib.figure import Figure
from torch import nn
from transformers import AutoModel

from ..modeling.adapter import HyperFlowAdapter
from ..modeling.backbones import SplitBackbone
from ..modeling.images import ImageError, decode
from ..modeling.prototypes import unit_means
from ..modeling.support import SupportSetError, read_support
from ..modeling.task import AdaptedTask
from .html import NAME_BUTTONS, STYLE, alert, comparison, note
from .quickstart import digits_episode
from .released import ADAPTER, BACKBONE, released

#: Rows of the page; the command line takes any number of classes.
MAX_CLASSES = 10

#: The largest upload, per file.
MAX_FILE_SIZE = "20mb"

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


class PageError(ValueError):
    """What a person reads on the page when something they gave cannot be used."""


@dataclass
class Session:
    """What one person adapted.

    Attributes:
        before: the task at t = 0, compared by plain cosines: direct transfer.
        after: the task where the flow was stopped.
        n_images: size of the support set.
        seconds: from the images in memory to being able to classify.
    """

    before: AdaptedTask
    after: AdaptedTask
    n_images: int
    seconds: float
    _folder: TemporaryDirectory = field(default_factory=lambda: TemporaryDirectory(prefix="hyperflow-"))

    def save(self) -> str:
        """Write the PEFT adapter with its prototypes to a zip file, which lives as long as the session."""
        folder = Path(self._folder.name)
        self.after.save_pretrained(folder / "hyperflow-task")
        return shutil.make_archive(str(folder / "hyperflow-task"), "zip", folder, "hyperflow-task")


class SharedModels:
    """The adapter and the backbone, which all sessions share one after the other.

    A task puts its own weights into the backbone when it is used, so whoever uses one holds the lock.
    """

    def __init__(self, adapter: HyperFlowAdapter, backbone: nn.Module):
        self.adapter = adapter.eval()
        self.backbone = backbone.eval()
        self._lock = threading.Lock()

    def adapt(self, images: dict[str, list[PIL.Image.Image]]) -> tuple[Session, str]:
        """Adapt to a support set; returns the session and the path of its zip file.

        Raises:
            SupportSetError: no class, one class, or a class without images.
        """
        with self._lock:
            started = time.perf_counter()
            support = read_support(images, self.adapter.processor)
            after = self.adapter.adapt(self.backbone, support, early_stopping=True)
            _ = after.prototypes
            seconds = time.perf_counter() - started
            before = self._direct_transfer(after, support.pixel_values, support.labels)
            session = Session(before, after, len(support.labels), seconds)
            return session, session.save()

    def compare(self, session: Session, images: list[PIL.Image.Image]) -> tuple[list, list]:
        """Labels with scores of images, best three first, before and after the adaptation."""
        with self._lock:
            return session.before(images, top_k=3), session.after(images, top_k=3)

    def _direct_transfer(self, task: AdaptedTask, pixel_values: torch.Tensor, labels: torch.Tensor) -> AdaptedTask:
        parameter = next(self.backbone.parameters())
        before = AdaptedTask(
            split=SplitBackbone(self.backbone, 0, self.adapter.config.pooling),
            space=task.space,
            theta=task.space.inject(self.backbone).start,
            class_names=task.class_names,
            scale=task.scale,
            processor=task.processor,
            support=(pixel_values.to(parameter.device, parameter.dtype), labels.to(parameter.device), unit_means),
        )
        _ = before.prototypes
        return before


def read_files(files: list[tuple[str, str | None]] | None) -> list[PIL.Image.Image]:
    """The images of a gallery, `(path, caption)` each.

    Raises:
        PageError: a file that is not an image; it is named as the person knows it.
    """
    images = []
    for path, _ in files or []:
        name = Path(path).name
        try:
            images.append(decode(path, name))
        except ImageError as error:
            raise PageError(str(error).replace(path, name)) from error
    return images


def read_classes(names: list[str], galleries: list) -> dict[str, list[PIL.Image.Image]]:
    """Class names and images of the rows of the page; rows with neither are passed over.

    Raises:
        PageError: images without a class name, a name without images, two rows of one name, a file that is no image.
    """
    classes: dict[str, list[PIL.Image.Image]] = {}
    for row, (name, files) in enumerate(zip(names, galleries, strict=True), start=1):
        name = (name or "").strip()
        if not name and not files:
            continue
        if not name:
            raise PageError(f"Class {row} has images but no name. Give it one.")
        if not files:
            raise PageError(f"Class {name!r} has no images. Give it at least one, or clear its name.")
        if name in classes:
            raise PageError(f"Two classes are called {name!r}. Rename one, or put their images together.")
        try:
            classes[name] = read_files(files)
        except PageError as error:
            raise PageError(f"Class {name!r}: {error}") from error
    return classes


def describe(session: Session) -> str:
    """What the adaptation took and where the flow was stopped, in words."""
    task, accuracies = session.after, session.after.stopping_point.accuracies
    duration = f"{session.seconds:.1f} s" if session.seconds >= 1 else f"{1000 * session.seconds:.0f} ms"
    lines = [
        f"Adapted to {len(task.class_names)} classes from {session.n_images} images in {duration},"
        f" with {task.nfe} function evaluations (runs of the drift network) and no gradients."
    ]
    if not accuracies:
        lines.append(
            "Every class has a single image, so none can be left out to measure the accuracy along the flow: "
            "give a class a second one."
        )
    elif task.stopping_point.time == 0:
        lines.append(
            f"Nowhere along the flow was the leave-one-out accuracy on your images above the {accuracies[0.0]:.0%} at "
            "t = 0, so the backbone is used as it is: before and after are the same."
        )
    else:
        lines.append(
            f"Leave-one-out accuracy on your images: {accuracies[0.0]:.0%} before (t = 0), "
            f"{accuracies[task.stopping_point.time]:.0%} at t = {task.stopping_point.time:g}, where the flow was stopped."
        )
    return " ".join(lines)


def plot_flow(session: Session) -> Figure | None:
    """Leave-one-out accuracy on the support set at each time along the flow; None if it could not be measured."""
    choice = session.after.stopping_point
    if not choice.accuracies:
        return None
    times, values = list(choice.accuracies), [100 * a for a in choice.accuracies.values()]
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    axis.plot(times, values, "o-", color="#2563eb")
    chosen = 100 * choice.accuracies[choice.time]
    axis.plot(choice.time, chosen, "o", markersize=13, markerfacecolor="none", color="#c2410c", label="stopped here")
    axis.set(xlabel="t along the flow", ylabel="accuracy, %", xticks=times, ylim=(-5, 105))
    axis.set_title("Leave-one-out accuracy on the support set", fontsize="medium")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def write_digits(folder: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """The example set as files: five images of each of scikit-learn's ten digits, and twenty others to try."""
    episode = digits_episode(n_shot=5, n_query=2)
    support: dict[str, list[Path]] = {}
    for digit, pictures in episode.support.items():
        support[digit] = [_write(picture, folder / f"{digit}-{i}.png") for i, picture in enumerate(pictures, start=1)]
    query = [
        _write(picture, folder / f"new-{digit}-{i % 2 + 1}.png")
        for i, (picture, digit) in enumerate(zip(episode.query, episode.query_labels, strict=True))
    ]
    return support, query


def _write(picture: PIL.Image.Image, path: Path) -> Path:
    picture.resize((96, 96), PIL.Image.Resampling.BICUBIC).save(path)
    return path


def build_demo(adapter: HyperFlowAdapter, backbone: nn.Module) -> gr.Blocks:
    """The page. Every browser window has a task of its own; all share the two models.

    Args:
        adapter: with its image processor.
        backbone: the model the adapter was trained for.

    Raises:
        IncompatibleBackboneError: the backbone is not of the adapter's kind.
    """
    adapter.split(backbone)
    models = SharedModels(adapter, backbone)
    examples = TemporaryDirectory(prefix="hyperflow-digits-")

    def add_class(n_rows: int) -> list:
        n_rows = min(n_rows + 1, MAX_CLASSES)
        return [n_rows, gr.Button(interactive=n_rows < MAX_CLASSES), *_rows_shown(n_rows)]

    def load_digits() -> list:
        support, query = write_digits(Path(examples.name))
        shown = [MAX_CLASSES, gr.Button(interactive=False), *_rows_shown(MAX_CLASSES)]
        return [*shown, *support, *support.values(), query]

    def adapt(*rows: object) -> list:
        names, galleries = list(rows[:MAX_CLASSES]), list(rows[MAX_CLASSES:])
        try:
            session, archive = models.adapt(read_classes(names, galleries))
        except (PageError, SupportSetError) as error:
            return [None, alert(error), gr.Plot(visible=False), gr.DownloadButton(value=None, interactive=False), ""]
        figure = plot_flow(session)
        plot = gr.Plot(value=figure, visible=figure is not None)
        return [session, note(describe(session)), plot, gr.DownloadButton(value=archive, interactive=True), ""]

    def predict(session: Session | None, files: list | None) -> str:
        if session is None:
            return alert("There is nothing to predict with yet. Press Adapt first.")
        if not files:
            return alert("There are no new images. Add at least one.")
        try:
            images = read_files(files)
        except PageError as error:
            return alert(f"New images: {error}")
        before, after = models.compare(session, images)
        return comparison([Path(path).name for path, _ in files], images, before, after)

    with gr.Blocks(title="HyperFlow", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as demo:
        session, n_rows = gr.State(), gr.State(2)
        gr.HTML(STYLE)
        gr.Markdown(INTRODUCTION)
        gr.Markdown("## 1. Classes")
        example = gr.Button("Use the example set: handwritten digits", elem_id="example")
        groups, names, galleries = [], [], []
        with gr.Row(elem_classes="hf-classes"):
            for row in range(1, MAX_CLASSES + 1):
                with gr.Group(visible=row <= 2, elem_classes="hf-class") as group:
                    names.append(gr.Textbox(label=f"Name of class {row}", max_length=80, elem_id=f"name-{row}"))
                    galleries.append(_gallery(f"Images of class {row}", f"images-{row}"))
                groups.append(group)
        add = gr.Button("Add a class", elem_id="add-class")
        gr.Markdown("## 2. Adapt")
        adapt_button = gr.Button("Adapt", variant="primary", elem_id="adapt")
        status = gr.HTML(elem_id="status")
        plot = gr.Plot(label="Accuracy along the flow", show_label=False, visible=False, elem_id="flow")
        download = gr.DownloadButton("Download the PEFT adapter (zip)", interactive=False, elem_id="download")
        gr.Markdown("## 3. Try new images")
        queries = _gallery("New images", "queries")
        predict_button = gr.Button("Predict", variant="primary", elem_id="predict")
        results = gr.HTML(elem_id="results")

        rows = [n_rows, add, *groups]
        add.click(add_class, n_rows, rows)
        example.click(load_digits, None, [*rows, *names, *galleries, queries])
        adapt_button.click(adapt, [*names, *galleries], [session, status, plot, download, results])
        predict_button.click(predict, [session, queries], results)
        demo.load(None, js=NAME_BUTTONS)
    return demo


def _gallery(label: str, elem_id: str) -> gr.Gallery:
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


def _rows_shown(n_rows: int) -> list[gr.Group]:
    return [gr.Group(visible=row < n_rows) for row in range(MAX_CLASSES)]


def main(adapter: str | None = None, backbone: str | None = None, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Load the models and serve the page until interrupted.

    Args:
        adapter, backbone: folders or Hub ids; the released ones of this repository by default.
        host, port: where to listen; "0.0.0.0" on every network interface.

    Raises:
        CheckpointError, IncompatibleBackboneError: the adapter is damaged, or was made for another backbone.
        OSError: no backbone there, or the port is taken.
    """
    loaded = HyperFlowAdapter.from_pretrained(adapter or released(ADAPTER))
    page = build_demo(loaded, AutoModel.from_pretrained(backbone or released(BACKBONE)))
    try:
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
        )
    except OSError as error:
        raise OSError(f"cannot listen on {host}, port {port}: is it taken? Choose another port or host.") from error
    print(f"The demo is at http://{host}:{port} (stop it with Ctrl-C).", flush=True)
    page.block_thread()
