"""Seeded few-shot episodes: CD-FSL's with fixed ways and shots, Meta-Dataset's with variable ones, unbalanced ones.

An episode is a function of `(seed, domain name, index)` alone: it is the same on every machine, in any order of
drawing and for any number of processes.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .domains import Domain

PROTOCOLS = ("cdfsl", "meta-dataset", "unbalanced")

#: Support images of the classes of an unbalanced episode.
UNBALANCED_SHOTS = (8, 4, 2, 1, 1)


@dataclass(frozen=True)
class Episode:
    """A few-shot task, as indices into a `Domain`.

    Attributes:
        domain: name of the domain.
        index: which episode of that domain this is.
        classes: the domain's class of each way, `(n_way,)`.
        support, query: image indices, `(n_support,)` and `(n_query,)`.
        support_labels, query_labels: their labels in 0..n_way-1, of the same shapes.
    """

    domain: str
    index: int
    classes: torch.Tensor
    support: torch.Tensor
    support_labels: torch.Tensor
    query: torch.Tensor
    query_labels: torch.Tensor

    @property
    def n_way(self) -> int:
        return len(self.classes)


def episode_generator(seed: int, domain: str, index: int) -> np.random.Generator:
    """The random numbers of episode `index`: a PCG64 stream whose seed is `(seed, domain, index)`."""
    return np.random.Generator(np.random.PCG64([seed, zlib.crc32(domain.encode()), index]))


def cdfsl_episode(domain: Domain, index: int, *, n_way: int, n_shot: int, n_query: int = 15, seed: int = 0) -> Episode:
    """An episode of fixed ways and shots (CD-FSL, Guo et al. 2020).

    Each class gives `n_shot` support and `n_query` query images. A domain with fewer usable classes than `n_way`
    gives an episode of all of them; `Episode.n_way` tells how many.

    Raises:
        ValueError: fewer than two classes have `n_shot + n_query` images; the message says what there is.
    """
    generator = episode_generator(seed, domain.name, index)
    classes = generator.permutation(_usable_classes(domain, n_shot + n_query))[:n_way]
    return _draw_images(domain, index, classes, [n_shot] * len(classes), n_query, generator)


def meta_dataset_episode(domain: Domain, index: int, *, seed: int = 0, max_way: int = 50) -> Episode:
    """An episode of variable ways and shots (Meta-Dataset, Triantafillou et al. 2020, section 3.2).

    The number of ways is uniform in 5..min(`max_way`, number of classes). All classes have the same number of queries,
    at most 10 and at most half of the smallest class. The support set has at most 500 images and at most 100 of a
    class, and is unbalanced: the shots follow noisy class sizes. Where class names are `<group>/<class>` (Omniglot's
    alphabets), an episode keeps to one group.

    Raises:
        ValueError: fewer than two classes have two images; the message says what there is.
    """
    generator = episode_generator(seed, domain.name, index)
    usable = _usable_classes(domain, 2)
    if all("/" in domain.class_names[c] for c in usable):
        usable = _draw_group(domain, usable, generator)
    most = min(max_way, len(usable))
    n_way = int(generator.integers(min(5, most), most + 1))
    classes = generator.permutation(usable)[:n_way]
    sizes = domain.class_sizes().numpy()[classes]
    n_query = int(min(10, (sizes // 2).min()))
    shots = _draw_shots(sizes, n_query, generator)
    return _draw_images(domain, index, classes, shots, n_query, generator)


def unbalanced_episode(
    domain: Domain, index: int, *, shots: Sequence[int] = UNBALANCED_SHOTS, n_query: int = 15, seed: int = 0
) -> Episode:
    """An episode whose classes have different numbers of support images, and the same number of queries.

    Every class that is drawn has the images for the largest number. The numbers are dealt to the classes at random. A
    domain with fewer usable classes than `shots` gives an episode of all of them, with the first of the numbers.

    Raises:
        ValueError: fewer than two classes have `max(shots) + n_query` images; the message says what there is.
    """
    generator = episode_generator(seed, domain.name, index)
    classes = generator.permutation(_usable_classes(domain, max(shots) + n_query))[: len(shots)]
    dealt = generator.permutation(shots[: len(classes)]).tolist()
    return _draw_images(domain, index, classes, dealt, n_query, generator)


def draw_episode(
    protocol: str, domain: Domain, index: int, *, n_way: int = 5, n_shot: int = 5, n_query: int = 15, seed: int = 0
) -> Episode:
    """Episode `index` of a domain, of one of the `PROTOCOLS`.

    Args:
        n_way, n_shot: classes and support images of a class, where the protocol leaves them open (cdfsl).
        n_query: query images of a class, likewise (cdfsl, unbalanced).

    Raises:
        ValueError: the domain has too few images, or the protocol is not known.
    """
    if protocol == "cdfsl":
        return cdfsl_episode(domain, index, n_way=n_way, n_shot=n_shot, n_query=n_query, seed=seed)
    if protocol == "meta-dataset":
        return meta_dataset_episode(domain, index, seed=seed)
    if protocol == "unbalanced":
        return unbalanced_episode(domain, index, n_query=n_query, seed=seed)
    raise ValueError(f"unknown protocol {protocol!r}: use one of {', '.join(PROTOCOLS)}.")


def _draw_shots(sizes: np.ndarray, n_query: int, generator: np.random.Generator) -> list[int]:
    """Support images of each class, from the class sizes `(n_way,)`: Meta-Dataset, section 3.2, steps 2 and 3."""
    n_way = len(sizes)
    available = sizes - n_query
    beta = 1.0 - generator.random()  # in (0, 1]
    n_support = min(500, int(np.ceil(beta * np.minimum(100, available)).sum()))
    weights = sizes * np.exp(generator.uniform(-math.log(2), math.log(2), n_way))
    shares = weights / weights.sum()
    shots = np.minimum((shares * max(0, n_support - n_way)).astype(int) + 1, available)
    return shots.tolist()


def _usable_classes(domain: Domain, n_images: int) -> list[int]:
    """The classes with at least `n_images` images; ValueError if they are fewer than two."""
    usable = domain.classes_with(n_images)
    if len(usable) < 2:
        largest = domain.class_sizes().sort(descending=True).values[:5].tolist()
        raise ValueError(
            f"domain {domain.name!r} has {len(usable)} classes of at least {n_images} images and an episode needs two; "
            f"its largest classes hold {largest}. Ask for fewer shots or queries, or give more images."
        )
    return usable


def group_classes(domain: Domain, classes: Iterable[int]) -> dict[str, list[int]]:
    """Classes whose names are `<group>/<class>`, by group; groups and classes keep their order."""
    groups: dict[str, list[int]] = {}
    for c in classes:
        group = domain.class_names[c].split("/")[0]
        groups.setdefault(group, []).append(c)
    return groups


def _draw_group(domain: Domain, usable: list[int], generator: np.random.Generator) -> list[int]:
    """The classes of a random group with five or more of them, or else two or more; all classes if there is none."""
    groups = group_classes(domain, usable).values()
    for n_classes in (5, 2):
        large = [classes for classes in groups if len(classes) >= n_classes]
        if large:
            return large[int(generator.integers(len(large)))]
    return usable


def _draw_images(
    domain: Domain,
    index: int,
    classes: np.ndarray,
    shots: Sequence[int],
    n_query: int,
    generator: np.random.Generator,
) -> Episode:
    """The episode of these classes, each with its number of support images and `n_query` queries."""
    images = domain.indices_by_class()
    support, query = [], []
    for c, n_shot in zip(classes, shots, strict=True):
        order = torch.from_numpy(generator.permutation(len(images[c])))
        chosen = images[c][order[: n_shot + n_query]]
        support.append(chosen[:n_shot])
        query.append(chosen[n_shot:])
    ways = torch.arange(len(classes))
    return Episode(
        domain=domain.name,
        index=index,
        classes=torch.from_numpy(np.array(classes, dtype=np.int64)),
        support=torch.cat(support),
        support_labels=ways.repeat_interleave(torch.tensor(shots)),
        query=torch.cat(query),
        query_labels=ways.repeat_interleave(n_query),
    )
