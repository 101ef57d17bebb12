"""The parts of the page that Gradio does not bring: messages, details, and predictions side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import PIL.Image

_FOLDER = Path(__file__).parent

STYLE = f"<style>{(_FOLDER / 'page.css').read_text('utf-8')}</style>"

#: What the browser does itself: one function, run once.
SCRIPT = (_FOLDER / "page.js").read_text("utf-8")

_ASK = "Choose the right class of an image, and the page counts."


@dataclass(frozen=True)
class Comparison:
    """What was predicted of one new image.

    Attributes:
        name: of its file.
        before, after: `[{"label", "score"}, ...]`, best first.
        truth: its right class, if it is known and one of the classes.
    """

    name: str
    image: PIL.Image.Image
    before: list[dict]
    after: list[dict]
    truth: str | None = None

    @property
    def is_changed(self) -> bool:
        """Whether the best label after is another one than before."""
        return self.before[0]["label"] != self.after[0]["label"]


def note(message: str) -> str:
    """A message that screen readers announce when they are done."""
    return f'<p class="hf-note" role="status">{escape(message)}</p>'


def alert(message: str | Exception) -> str:
    """A message of what is wrong, announced at once."""
    text = str(message)
    return f'<p class="hf-alert" role="alert">{escape(text[:1].upper() + text[1:])}</p>'


def details(text: str, svg: str) -> str:
    """Text and a picture that are shown to those who ask for them."""
    figure = f"<figure>{svg}</figure>" if svg else ""
    return f'<details class="hf-details"><summary>Details</summary><p>{escape(text)}</p>{figure}</details>'


def make_message_line(max_images: int, max_classes: int) -> str:
    """The line in which `SCRIPT` says what it did with a folder, and from which it knows the limits."""
    return f'<p class="hf-line" role="status" data-max-images="{max_images}" data-max-classes="{max_classes}"></p>'


def compare(rows: Sequence[Comparison], class_names: Sequence[str]) -> str:
    """A table of images with their labels and scores before and after the adaptation.

    Below each image a list asks for its right class. `SCRIPT` counts again whenever one is chosen.
    """
    body = "".join(_make_row(row, class_names) for row in rows)
    return (
        f"{_summarise(rows)}"
        '<table class="hf-results"><thead><tr><th scope="col" class="hf-image">Image</th>'
        '<th scope="col">Before<br><small>direct transfer</small></th>'
        '<th scope="col">After<br><small>adapted</small></th></tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def _summarise(rows: Sequence[Comparison]) -> str:
    """How many labels are right, as far as the truth is known, and how many changed."""
    known = [row for row in rows if row.truth is not None]
    before = sum(row.before[0]["label"] == row.truth for row in known)
    after = sum(row.after[0]["label"] == row.truth for row in known)
    n_changed = sum(row.is_changed for row in rows)
    counts = (
        f'<strong data-count="known" {"" if known else "hidden"}><span data-count="before">{before}</span> of '
        f'<span data-count="all">{len(known)}</span> right before, <span data-count="after">{after}</span> after. '
        "</strong>"
    )
    ask = f'<span data-count="ask" {"hidden" if known else ""}> {_ASK}</span>'
    changed = f"The adaptation changed the label of {n_changed} of {len(rows)} images."
    return f'<p class="hf-note" role="status">{counts}{changed}{ask}</p>'


def _make_row(row: Comparison, class_names: Sequence[str]) -> str:
    badge = '<span class="hf-changed">changed</span>' if row.is_changed else ""
    name = escape(row.name)
    options = ['<option value="">?</option>']
    for class_name in class_names:
        selected = "selected" if class_name == row.truth else ""
        options.append(f'<option value="{escape(class_name)}" {selected}>{escape(class_name)}</option>')
    choice = f'<select aria-label="Right class of {name}">{"".join(options)}</select>'
    return (
        f'<tr><th scope="row">{_make_thumbnail(row.image, row.name)}<small>{name}</small>'
        f"<label>It is {choice}</label></th>"
        f"{_make_cell(row.before, row.truth, 'before')}{_make_cell(row.after, row.truth, 'after', badge)}</tr>"
    )


def _make_cell(predictions: list[dict], truth: str | None, when: str, badge: str = "") -> str:
    """A bar for each class, as long as its score, and whether the first is right."""
    label = predictions[0]["label"]
    verdict = ""
    if truth is not None:
        verdict = "right" if label == truth else "wrong"
    bars = []
    for prediction in predictions:
        percentage = f"{prediction['score']:.0%}"
        bars.append(
            f'<div class="hf-score" style="--share: {percentage}">'
            f"<span>{escape(prediction['label'])}</span><span>{percentage}</span></div>"
        )
    opening = f'<td class="hf-{when}" data-label="{escape(label)}" data-verdict="{verdict}">'
    return f"{opening}{''.join(bars)}{badge}</td>"


def _make_thumbnail(image: PIL.Image.Image, name: str) -> str:
    small = image.copy()
    small.thumbnail((192, 192))
    file = io.BytesIO()
    small.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(name)}">'
