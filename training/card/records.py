"""Records of the JSON files: lists of dicts with the same keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Records = list[dict[str, Any]]


def select(records: Records, **values: object) -> Records:
    """The records with these values."""
    selected = records
    for key, value in values.items():
        selected = [record for record in selected if record[key] == value]
    return selected


def find(records: Records, **values: object) -> dict[str, Any] | None:
    """The record with these values, None if there is none."""
    selected = select(records, **values)
    return selected[0] if selected else None


def get(records: Records, **values: object) -> dict[str, Any]:
    """The record with these values.

    Raises:
        ValueError: there is none.
    """
    record = find(records, **values)
    if record is None:
        raise ValueError(f"there is no record with {values}: run the benchmark with this method, domain and shots.")
    return record


def column(records: Records, key: str) -> list[Any]:
    """The values of a key, one per record."""
    return [record[key] for record in records]


def list_values(records: Records, key: str) -> list[Any]:
    """The different values of a key, sorted."""
    return sorted(set(column(records, key)))


def list_stems(sources: list[str]) -> list[str]:
    """The names of domains, from their files, folders or Hub ids."""
    return [Path(source).stem for source in sources]
