"""JSON that comes with an adapter or a task: read without surprises, and checked field by field.

Whoever forges a file can also note its digest, so that a digest proves nothing but a whole download.
"""

from __future__ import annotations

import json
import re
import reprlib
import unicodedata
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

from .saving import CheckpointError

MAX_JSON_BYTES = 16 << 20

#: Names of modules or tensors in a list.
MAX_MODULES = 10_000

#: Values in any other list or object.
MAX_ITEMS = 100_000

_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
_UNSAFE_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: there is no such file, it is larger than 16 MB, or it holds no JSON object. NaN, infinity and
            keys that occur twice are not accepted either.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}: the folder is incomplete. Download or copy it again.")
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {size:,} bytes, which is more than {MAX_JSON_BYTES:,}: it is refused.")
    content = parse_json(path.read_bytes(), str(path))
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object. Download or copy it again.")
    return content


def parse_json(text: str | bytes, source: str) -> Any:
    """Parse a JSON text without NaN, infinity and keys that occur twice.

    Raises:
        CheckpointError: the text is not such JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=_to_dict, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is damaged, it is no JSON ({error}). Download or copy it again.") from error


def _to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key occurs twice")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


class Fields:
    """The fields of an object in a file. Each method checks one of them and returns its value.

    Args:
        source: the file, for errors.
        content: the object.
        place: where the object is in the file ("peft."), for errors.

    Raises:
        CheckpointError: the object is not a dict, and in every method: the value is not allowed. The error names the
            file, the field and what is allowed.
    """

    def __init__(self, source: str | Path, content: Any, place: str = ""):
        self.source = source
        self.place = place
        if not isinstance(content, dict):
            raise CheckpointError(f"{source}: {place.rstrip('.')} is {reprlib.repr(content)}; an object is expected.")
        self.content: dict[str, Any] = content

    def refuse(self, name: str, allowed: str) -> NoReturn:
        """Raise the error about a field."""
        value = "missing"
        if name in self.content:
            value = reprlib.repr(self.content[name])
        raise CheckpointError(
            f"{self.source}: {self.place}{name} is {value}; allowed is {allowed}. The file is damaged or was made by "
            "another version: download or copy it again."
        )

    def integer(self, name: str, low: int, high: int) -> int:
        value = self.content.get(name)
        if type(value) is not int or not low <= value <= high:
            self.refuse(name, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float) -> float:
        value = self.content.get(name)
        if (
            isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        ):  # NaN is in no range
            return float(value)
        self.refuse(name, f"a number from {low:g} to {high:g}")

    def flag(self, name: str) -> bool:
        value = self.content.get(name)
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def choice(self, name: str, options: Collection[Any]) -> Any:
        value = self.content.get(name)
        for option in options:
            if type(value) is type(option) and value == option:
                return value
        self.refuse(name, f"one of {', '.join(map(repr, options))}")

    def text(self, name: str, max_length: int = 1000) -> str:
        value = self.content.get(name)
        if not isinstance(value, str) or len(value) > max_length or not is_printable(value):
            self.refuse(name, f"a text of at most {max_length} characters without control characters")
        return value

    def names(self, name: str, *, low: int = 1, high: int = MAX_MODULES) -> list[str]:
        """Distinct dotted names of modules or tensors."""
        value = self.content.get(name)
        allowed = f"a list of {low} to {high} different names like 'encoder.layer.0'"
        if not isinstance(value, list) or not low <= len(value) <= high:
            self.refuse(name, allowed)
        for item in value:
            if not isinstance(item, str) or len(item) > 256 or not _NAME.fullmatch(item):
                self.refuse(name, allowed)
        if len(set(value)) < len(value):
            self.refuse(name, allowed)
        return value

    def integers(self, name: str, length: int, low: int, high: int) -> list[int]:
        value = self.content.get(name)
        if not isinstance(value, list) or len(value) != length:
            self.refuse(name, f"a list of {length} whole numbers")
        if any(type(item) is not int or not low <= item <= high for item in value):
            self.refuse(name, f"a list of {length} whole numbers from {low} to {high}")
        return value


def is_bounded(value: Any, limit: float, depth: int = 0) -> bool:
    """Whether a JSON value has short texts, numbers of at most this limit, and few levels and items."""
    if isinstance(value, str):
        return len(value) <= 1000
    if isinstance(value, int | float):
        return abs(value) <= limit
    items: Any = ()
    if isinstance(value, dict):
        items = [*value.values(), *(key for key in value if not isinstance(key, int))]
    elif isinstance(value, list):
        items = value
    if len(items) > MAX_ITEMS or depth > 3:
        return False
    return all(is_bounded(item, limit, depth + 1) for item in items)


def is_printable(text: str) -> bool:
    """Whether a text has no control characters, line separators or halves of surrogate pairs."""
    return not any(unicodedata.category(character) in _UNSAFE_CATEGORIES for character in text)
