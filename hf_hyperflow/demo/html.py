"""The parts of the page that Gradio does not bring: style, messages, and predictions side by side."""

from __future__ import annotations

import base64
import io
from html import escape

import PIL.Image

STYLE = """<style>
.gradio-container { max-width: 1000px !important; margin: 0 auto !important; }
.hf-classes { display: grid !important; grid-template-columns: repeat(auto-fill, minmax(min(100%, 290px), 1fr)); }
.hf-gallery { border: 1px solid var(--border-color-primary) !important; }
.hf-class > * { min-width: 0 !important; }
.hf-gallery .wrap { font-size: var(--text-md); }
.hf-gallery .grid-wrap { padding-top: 36px !important; overflow-y: auto !important; }
.hf-gallery .grid-container { padding: 0 !important; gap: 6px !important;
  grid-template: none / repeat(auto-fill, 48px) !important; grid-auto-rows: 48px !important; }
.hf-gallery .gallery-item:focus-within .delete-button { opacity: 1; }
.hf-gallery .delete-button { padding: 1px 4px !important; }
@media (hover: none) { .hf-gallery .delete-button { opacity: 1 !important; } }
.hf-note, .hf-alert { padding: 12px 16px; border-radius: 8px; border-left: 4px solid; overflow-wrap: anywhere; }
.hf-note { border-color: #2563eb; background: var(--background-fill-secondary); }
.hf-alert { border-color: #b91c1c; background: var(--error-background-fill); color: var(--error-text-color); }
.hf-results { width: 100%; border: 0 !important; border-collapse: collapse; table-layout: fixed; }
.hf-results :is(th, td) { padding: 8px 6px !important; border: 0 solid var(--border-color-primary) !important;
  text-align: left; vertical-align: top; overflow-wrap: anywhere; font-weight: normal; }
.hf-results tbody :is(th, td) { border-top-width: 1px !important; }
.hf-results :is(thead, tbody, tr) { border: 0 !important; }
.hf-results thead th { font-weight: 600; }
.hf-results .hf-image { width: 84px; }
.hf-results img { width: 56px; height: 56px; object-fit: contain; display: block; margin: 0 !important; }
.hf-results small { color: var(--body-text-color-subdued); font-weight: normal; }
.hf-score { display: flex; justify-content: space-between; gap: 8px; padding: 1px 6px; margin-bottom: 3px;
  border-radius: 4px; background: linear-gradient(to right, rgba(37, 99, 235, 0.25) var(--share), transparent 0); }
.hf-score:first-child { font-weight: 600; }
.hf-changed { display: inline-block; padding: 0 6px; border-radius: 4px; font-size: 0.8em;
  color: #1e3a8a; background: #dbeafe; }
</style>"""

#: Gradio gives the buttons of every gallery the same names. This puts the gallery's label before them, now and whenever
#: the page changes.
NAME_BUTTONS = """() => {
  const name = () => document.querySelectorAll(".hf-gallery").forEach((gallery) => {
    const label = gallery.querySelector("[data-testid=block-label]").textContent.trim();
    gallery.querySelectorAll("button[aria-label], input[type=file]").forEach((control) => {
      const own = control.getAttribute("aria-label");
      if (!own.startsWith(label + ": ")) control.setAttribute("aria-label", label + ": " + own);
    });
  });
  name();
  const changes = { subtree: true, childList: true, attributes: true, attributeFilter: ["aria-label"] };
  new MutationObserver(name).observe(document.body, changes);
}"""


def note(message: str) -> str:
    """A message that screen readers announce when they are done."""
    return f'<p class="hf-note" role="status">{escape(message)}</p>'


def alert(message: str | Exception) -> str:
    """A message of what is wrong, announced at once."""
    text = str(message)
    return f'<p class="hf-alert" role="alert">{escape(text[:1].upper() + text[1:])}</p>'


def comparison(names: list[str], images: list[PIL.Image.Image], before: list[list], after: list[list]) -> str:
    """A table of images with their labels and scores before and after the adaptation.

    Args:
        names: file names, one per image.
        before, after: for each image `[{"label", "score"}, ...]`, best first.
    """
    rows, n_changed = [], 0
    for name, image, scores_before, scores_after in zip(names, images, before, after, strict=True):
        badge = ""
        if scores_before[0]["label"] != scores_after[0]["label"]:
            n_changed += 1
            badge = '<span class="hf-changed">changed</span>'
        rows.append(
            f'<tr><th scope="row">{_thumbnail(image, name)}<small>{escape(name)}</small></th>'
            f"<td>{_bars(scores_before)}</td><td>{_bars(scores_after)}{badge}</td></tr>"
        )
    return (
        f"{note(f'The adaptation changed the label of {n_changed} of {len(images)} images.')}"
        '<table class="hf-results"><thead><tr><th scope="col" class="hf-image">Image</th>'
        '<th scope="col">Before<br><small>direct transfer</small></th>'
        '<th scope="col">After<br><small>adapted</small></th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _bars(predictions: list[dict]) -> str:
    """A bar for each class, as long as its score."""
    bars = []
    for prediction in predictions:
        percentage = f"{prediction['score']:.0%}"
        bars.append(
            f'<div class="hf-score" style="--share: {percentage}">'
            f"<span>{escape(prediction['label'])}</span><span>{percentage}</span></div>"
        )
    return "".join(bars)


def _thumbnail(image: PIL.Image.Image, name: str) -> str:
    small = image.copy()
    small.thumbnail((152, 152))
    file = io.BytesIO()
    small.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(name)}">'
