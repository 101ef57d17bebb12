"""What the names of classes may be."""

from __future__ import annotations

import reprlib

from .json_fields import is_printable

#: The characters of a name.
MAX_LENGTH = 1000


def find_label_problem(labels: list[str]) -> str | None:
    """What is wrong with the names of classes, as a sentence with the fix; None if nothing is."""
    seen = set()
    for label in labels:
        if not label.strip() or len(label) > MAX_LENGTH or not is_printable(label):
            return (
                f"the class name {reprlib.repr(label)} is empty, longer than {MAX_LENGTH} characters or has "
                "control characters. Rename the class."
            )
        if label in seen:
            return f"two classes are called {reprlib.repr(label)}. Rename one of them."
        seen.add(label)
    return None
