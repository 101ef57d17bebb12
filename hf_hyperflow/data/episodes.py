"""Seeded few-shot episodes: CD-FSL's fixed way and shot, Meta-Dataset's variable ones.

Episode `index` of a domain is a function of `(seed, domain name, index)` alone: the same on any machine, in any order
and for any number of processes.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np
import torch

from .domains import Domain


@dataclass(frozen=True)
class Episode:
    """A few-shot task, as indices into a `Domain`.

    Attributes:
        domain: name of the domain.
        index: which episode of that domain.
        classes: the domain's class of each way, `(n_way,)`.
        support, query: image indices, `(n_support,)` and `(n_query,)`.
        support_labels, query_labels: 0..n_way-1, of the same lengths.
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
    """The random numbers of episode `index`: a PCG64 stream keyed by `(seed, domain, index)`."""
    return np.random.Generator(np.random.PCG64([seed, zlib.crc32(domain.encode()), index]))


def cdfsl_episode(domain: Domain, index: int, *, n_way: int, n_shot: int, n_query: int = 15, seed: int = 0) -> Episode:
    """A fixed way/shot episode (Guo et al. 2020, CD-FSL): `n_shot` support and `n_query` query images of each class.

    Domains with fewer usable classes than `n_way` give episodes of all of them (`Episode.n_way` says how many).

    Raises:
        ValueError: fewer than two classes have `n_shot + n_query` images; the message says what there is.
    """
    generator = episode_generator(seed, domain.name, index)
    by_class = domain.indices_by_class()
    usable = [c for c, images in enumerate(by_class) if len(images) >= n_shot + n_query]
    _require_two_classes(domain, usable, n_shot + n_query)
    classes = generator.permutation(usable)[:n_way]
    counts = [(n_shot, n_query)] * len(classes)
    return _draw(domain, index, classes, counts, by_class, generator)


def meta_dataset_episode(domain: Domain, index: int, *, seed: int = 0, max_way: int = 50) -> Episode:
    """A variable way/shot episode (Triantafillou et al. 2020, Meta-Dataset, section 3.2).

    Ways are U{5..min(50, C)}; all classes get the same number of queries, at most 10 and half of the smallest; the
    support set has at most 500 images, at most 100 a class, unbalanced in proportion to noisy class sizes. Where
    class names are `<group>/<class>` (Omniglot's alphabets), an episode keeps to one group.

    Raises:
        ValueError: fewer than two classes have two images.
    """
    generator = episode_generator(seed, domain.name, index)
    by_class = domain.indices_by_class()
    usable = [c for c, images in enumerate(by_class) if len(images) >= 2]
    _require_two_classes(domain, usable, 2)
    if all("/" in domain.class_names[c] for c in usable):
        usable = _one_group(domain, usable, generator)
    most = min(max_way, len(usable))
    n_way = int(generator.integers(min(5, most), most + 1))
    classes = generator.permutation(usable)[:n_way]
    sizes = np.array([len(by_class[c]) for c in classes])
    n_query = int(min(10, (sizes // 2).min()))
    rest = sizes - n_query
    beta = 1.0 - generator.random()  # in (0, 1]
    n_support = min(500, sum(math.ceil(beta * min(100, r)) for r in rest))
    weights = sizes * np.exp(generator.uniform(-math.log(2), math.log(2), n_way))
    shares = weights / weights.sum()
    shots = np.minimum((shares * max(0, n_support - n_way)).astype(int) + 1, rest)
    counts = [(int(shot), n_query) for shot in shots]
    return _draw(domain, index, classes, counts, by_class, generator)


def _require_two_classes(domain: Domain, usable: list[int], needed: int) -> None:
    if len(usable) < 2:
        sizes = sorted((len(images) for images in domain.indices_by_class()), reverse=True)[:5]
        raise ValueError(
            f"domain {domain.name!r} has {len(usable)} classes of at least {needed} images and an episode needs two; "
            f"its largest classes hold {sizes}. Ask for fewer shots or queries, or give more images."
        )


def _one_group(domain: Domain, usable: list[int], generator: np.random.Generator) -> list[int]:
    groups: dict[str, list[int]] = {}
    for c in usable:
        groups.setdefault(domain.class_names[c].split("/")[0], []).append(c)
    large = [classes for classes in groups.values() if len(classes) >= 5]
    large = large or [classes for classes in groups.values() if len(classes) >= 2] or [usable]
    return large[int(generator.integers(len(large)))]


def _draw(
    domain: Domain,
    index: int,
    classes: np.ndarray,
    counts: list[tuple[int, int]],
    by_class: list[torch.Tensor],
    generator: np.random.Generator,
) -> Episode:
    support, query = [], []
    for c, (n_shot, n_query) in zip(classes, counts, strict=True):
        order = torch.from_numpy(generator.permutation(len(by_class[c])))
        chosen = by_class[c][order[: n_shot + n_query]]
        support.append(chosen[:n_shot])
        query.append(chosen[n_shot:])
    return Episode(
        domain=domain.name,
        index=index,
        classes=torch.from_numpy(np.array(classes, dtype=np.int64)),
        support=torch.cat(support),
        support_labels=torch.repeat_interleave(torch.arange(len(classes)), torch.tensor([len(s) for s in support])),
        query=torch.cat(query),
        query_labels=torch.repeat_interleave(torch.arange(len(classes)), torch.tensor([len(q) for q in query])),
    )
