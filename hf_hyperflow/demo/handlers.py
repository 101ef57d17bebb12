"""What the buttons of the page do."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr

from ..modeling.support import SupportSetError
from .digits import write_digits
from .html import Comparison, alert, compare
from .report import report
from .sessions import Session, SharedModels
from .uploads import MAX_CLASSES, MIN_CLASSES, Files, PageError, read_classes, read_files


class Handlers:
    """The functions behind the buttons. Each returns the new values of the components that `connect` names."""

    def __init__(self, models: SharedModels):
        self.models = models
        self._examples = TemporaryDirectory(prefix="hyperflow-digits-")

    def add_class(self, n_rows: int) -> list:
        """Show one row more."""
        return _show_rows(min(n_rows + 1, MAX_CLASSES))

    def remove_class(self, n_rows: int) -> list:
        """Show one row less. The browser itself has moved the rows up that were below the removed one."""
        return _show_rows(max(n_rows - 1, MIN_CLASSES))

    def load_digits(self) -> list:
        """Fill in the example: ten classes, and new images whose captions are their right classes."""
        support, query = write_digits(Path(self._examples.name))
        return [*_show_rows(MAX_CLASSES), *support, *support.values(), query]

    def start_again(self) -> list:
        """Empty the page, and forget what was adapted."""
        return [*_show_rows(MIN_CLASSES), *[""] * MAX_CLASSES, *[None] * MAX_CLASSES, None, *_nothing_adapted("")]

    def adapt(self, *fields: Any) -> list:
        """Adapt to the classes of the rows, or say what is wrong with them."""
        names, galleries = list(fields[:MAX_CLASSES]), list(fields[MAX_CLASSES:])
        try:
            session, archive = self.models.adapt(read_classes(names, galleries))
        except (PageError, SupportSetError) as error:
            return _nothing_adapted(alert(error))
        return [session, report(session), gr.DownloadButton(value=archive, visible=True), ""]

    def predict(self, session: Session | None, files: Files | None) -> str:
        """Compare the predictions of new images before and after the adaptation."""
        if session is None:
            return alert("There is nothing to predict with yet. Press Adapt first.")
        if not files:
            return alert("There are no new images. Add at least one.")
        try:
            images = read_files(files)
        except PageError as error:
            return alert(f"New images: {error}")
        class_names = session.after.class_names
        before, after = self.models.compare(session, images)
        rows = []
        for i, (path, caption) in enumerate(files):
            truth = caption if caption in class_names else None
            rows.append(Comparison(Path(path).name, images[i], before[i], after[i], truth))
        return compare(rows, class_names)


def _show_rows(n_rows: int) -> list:
    """New values of the number of rows, of the button that adds one, and of all the rows' groups."""
    groups = [gr.Group(visible=row < n_rows) for row in range(MAX_CLASSES)]
    return [n_rows, gr.Button(visible=n_rows < MAX_CLASSES), *groups]


def _nothing_adapted(status: str) -> list:
    """New values of the session, the status, the download and the results where there is no adapted task."""
    return [None, status, gr.DownloadButton(value=None, visible=False), ""]
