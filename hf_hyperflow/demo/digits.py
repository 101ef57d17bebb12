"""An example task that every install has: scikit-learn's handwritten digits (Alpaydin & Kaynak 1998)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
from sklearn.datasets import load_digits


@dataclass(frozen=True)
class Digits:
    """An episode of the ten digits, 8 x 8 pixels each, white on black.

    Attributes:
        support: digit to PIL images.
        query: PIL images, all of the digit 0 first, then those of 1, ...
        query_labels: `(n_query * 10,)`, the digit of each.
    """

    support: dict[str, list[PIL.Image.Image]]
    query: list[PIL.Image.Image]
    query_labels: np.ndarray


def sample_digits(n_shot: int = 5, n_query: int = 50, seed: int = 0) -> Digits:
    """Draw `n_shot` support and `n_query` query images of each digit."""
    data = load_digits()
    generator = np.random.default_rng(seed)
    support: dict[str, list[PIL.Image.Image]] = {}
    query: list[PIL.Image.Image] = []
    for digit in range(10):
        rows = generator.permutation(np.flatnonzero(data.target == digit))[: n_shot + n_query]
        pictures = [_to_picture(data.images[row]) for row in rows]
        support[str(digit)] = pictures[:n_shot]
        query += pictures[n_shot:]
    return Digits(support, query, query_labels=np.repeat(np.arange(10), n_query))


def _to_picture(image: np.ndarray) -> PIL.Image.Image:
    """A grey picture of an `(8, 8)` array with values in 0..16."""
    return PIL.Image.fromarray((image * (255 / 16)).astype(np.uint8))


def write_digits(folder: Path) -> tuple[dict[str, list[Path]], list[tuple[Path, str]]]:
    """Write an episode as PNG files: five support images of each digit, and twenty others to try, with their digits."""
    n_query = 2
    episode = sample_digits(n_shot=5, n_query=n_query)
    support: dict[str, list[Path]] = {}
    for digit, pictures in episode.support.items():
        support[digit] = []
        for number, picture in enumerate(pictures, start=1):
            support[digit].append(_write(picture, folder / f"{digit}-{number}.png"))
    query = []
    for position, picture in enumerate(episode.query):
        digit, number = episode.query_labels[position], position % n_query + 1
        query.append((_write(picture, folder / f"new-{digit}-{number}.png"), str(digit)))
    return support, query


def _write(picture: PIL.Image.Image, path: Path) -> Path:
    """Write a picture at twelve times its size: browsers blur what is smaller."""
    picture.resize((96, 96), PIL.Image.Resampling.BICUBIC).save(path)
    return path
