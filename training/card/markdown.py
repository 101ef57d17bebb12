"""Tables and numbers in Markdown."""

from __future__ import annotations

from collections.abc import Iterable


def format_table(headings: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table without a line break at its end."""
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    for row in rows:
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def format_interval(value: float | None, half_width: float | None, style: str = "+.2f") -> str:
    """A number with the half-width of its 95 % interval, which a single episode has not; nothing for no number."""
    if value is None:
        return ""
    if half_width is None:
        return f"{value:{style}}"
    return f"{value:{style}} ± {half_width:{style.removeprefix('+')}}"
