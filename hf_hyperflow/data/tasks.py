"""Training tasks: few-shot tasks drawn from labelled image datasets, some of them with the look of a new domain.

A task is a function of `(seed, index)` alone. Collecting trajectories and training on them therefore see the same
tasks, and so do any number of processes and a resumed run. Images are never stored: a task names its domain and the
rows of its images there.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets.exceptions import DatasetsError
from transformers.image_processing_utils import BaseImageProcessor

from .augmentation import randomize_domain
from .domains import Domain, load_domain
from .episodes import Episode, cdfsl_episode, episode_generator, group_classes

#: Ways and shots of drawn tasks; the number of ways is uniform, that of shots log-uniform from 1.
MIN_WAY, MAX_WAY, MAX_SHOT = 3, 10, 10


@dataclass(frozen=True)
class TrainingTask:
    """A task that the flow is trained on.

    Attributes:
        episode: which images, as indices into the domain it names.
        transform_seed: seed of `randomize_domain`, which changes what the images look like; None: nothing changes.
        flip: whether all images are mirrored.
    """

    episode: Episode
    transform_seed: int | None
    flip: bool


def load_domains(
    sources: Sequence[str],
    processor: BaseImageProcessor,
    *,
    holdout: Sequence[str] = (),
    max_per_class: int | None = None,
) -> tuple[list[Domain], list[Domain]]:
    """The domains to train on, and those to validate on.

    Args:
        sources: labelled image datasets, see `hf_hyperflow.data.domains.open_dataset`.
        holdout: what is kept for validation: NAME is a whole domain, NAME:K every K-th class of it.
        max_per_class: how many images of a class are used at most.

    Raises:
        ValueError: a dataset cannot be read or is too small for a task, an entry of `holdout` is malformed or names
            none of the domains, two domains have one name, or no domain is left to train on. The message names the
            dataset and what is needed.
    """
    periods = {}
    for entry in holdout:
        name, period = _parse_holdout(entry)
        periods[name] = period
    training, validation = [], []
    for source in sources:
        domain = _load_source(source, processor, max_per_class)
        trained, held_out = _hold_out(domain, periods.get(domain.name))
        if trained is not None:
            training.append(trained)
        if held_out is not None:
            validation.append(held_out)
    _check_names([domain.name for domain in (*training, *validation)], set(periods))
    if not training:
        raise ValueError("no domain is left to train on: give more datasets, or hold fewer out.")
    require_enough(training, MIN_WAY, 1, query_count(MIN_WAY))
    return training, validation


def _parse_holdout(entry: str) -> tuple[str, int]:
    """NAME and K of `NAME:K`; K is 1 where only NAME is given, for every class is held out then."""
    name, colon, period = entry.partition(":")
    if not name or (colon and not (period.isdecimal() and int(period) >= 2)):
        raise ValueError(f"holdout {entry!r}: give NAME for a whole domain, or NAME:K, K at least 2, for some classes.")
    return name, int(period or 1)


def _load_source(source: str, processor: BaseImageProcessor, max_per_class: int | None) -> Domain:
    try:
        return load_domain(source, processor, max_per_class=max_per_class)
    except (DatasetsError, FileNotFoundError, ValueError) as error:
        needed = f"{MIN_WAY} classes of {1 + query_count(MIN_WAY)} images"
        raise ValueError(f"cannot train on {source}, a domain of at least {needed} is needed: {error}") from error


def _hold_out(domain: Domain, period: int | None) -> tuple[Domain | None, Domain | None]:
    """What to train on and what to validate on, where every `period`-th class of a domain is held out."""
    if period is None:
        return domain, None
    if period == 1:
        return None, domain
    classes = range(len(domain.class_names))
    trained = [c for c in classes if c % period != 0]
    return domain.select_classes(trained), domain.select_classes(list(classes[::period]), f"{domain.name}-held-out")


def _check_names(names: list[str], held_out: set[str]) -> None:
    """ValueError if a held-out name is none of the domains', or if two domains have one name."""
    unknown = sorted(held_out - set(names))
    if unknown:
        raise ValueError(f"holdout names {unknown}, but the domains are {names}.")
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise ValueError(f"several datasets are called {repeated}: a task names its domain, so rename the files.")


def query_count(n_way: int) -> int:
    """How many queries each class of a task has: about 40 for all classes, but at least 4 for each."""
    return max(4, min(8, 40 // n_way))


def require_enough(domains: Sequence[Domain], n_way: int, n_shot: int, n_query: int) -> None:
    """Check that every domain has the classes and images of an episode.

    Raises:
        ValueError: a domain is too small; the message says what it has and what is needed.
    """
    needed = n_shot + n_query
    for domain in domains:
        n_usable = len(domain.classes_with(needed))
        if n_usable < n_way:
            sizes = domain.class_sizes().sort(descending=True).values.tolist()
            largest = ", ".join(map(str, sizes[:5]))
            raise ValueError(
                f"domain {domain.name!r} has {n_usable} classes of at least {needed} images, and a {n_way}-way "
                f"{n_shot}-shot task with {n_query} queries of each class needs {n_way} classes of {needed} images. "
                f"It has {len(sizes)} classes, the largest of {largest} images. Give more images or classes, or leave "
                "the dataset out."
            )


def draw_shape(domain: Domain, generator: np.random.Generator) -> tuple[int, int]:
    """Ways (3 to 10) and shots (1 to 10, log-uniform) of a task, fewer where the domain has no more.

    Raises:
        ValueError: the domain is too small for the smallest task, see `require_enough`.
    """
    n_way = int(generator.integers(MIN_WAY, MAX_WAY + 1))
    n_shot = round(math.exp(generator.uniform(0, math.log(MAX_SHOT))))
    while True:
        n_usable = len(domain.classes_with(n_shot + query_count(n_way)))
        if n_usable >= n_way:
            return n_way, n_shot
        # Fewer ways where that is enough, and otherwise fewer shots, which make more classes usable.
        if n_way > MIN_WAY and (n_usable >= MIN_WAY or n_shot == 1):
            n_way -= 1
        elif n_shot > 1:
            n_shot -= 1
        else:
            require_enough([domain], n_way, n_shot, query_count(n_way))


def draw_group_shape(domains: Sequence[Domain], group: int, *, seed: int) -> tuple[int, int]:
    """Ways and shots that all tasks of group `group` share: those of one task of a random domain."""
    generator = episode_generator(seed, "group", group)
    return draw_shape(_draw_domain(domains, generator), generator)


def draw_task(
    domains: Sequence[Domain],
    index: int,
    *,
    seed: int,
    randomize_prob: float,
    n_way: int | None = None,
    n_shot: int | None = None,
) -> TrainingTask:
    """Training task `index`: 3 to 10 ways, 1 to 10 shots, about 40 queries, from a random domain.

    Where class names are `<group>/<class>` (Omniglot's alphabets), half of the tasks keep to one group.

    Args:
        randomize_prob: probability that the images of a task are given a new look.
        n_way, n_shot: ways and shots of the task, both or neither. If they are given, the task has exactly these and
            comes from a domain that is large enough; if not, a small domain gives smaller tasks.

    Raises:
        ValueError: no domain has classes and images enough, or only one of `n_way` and `n_shot` is given.
    """
    if (n_way is None) != (n_shot is None):
        raise ValueError(f"n_way={n_way} and n_shot={n_shot}: give both or neither.")
    generator = episode_generator(seed, "training", index)
    if n_way is not None and n_shot is not None:
        domains = _large_enough(domains, n_way, n_shot)
    domain = _draw_domain(domains, generator)
    group = _draw_group(domain, n_way or MIN_WAY, n_shot or 1, generator)
    part = domain if group is None else domain.select_classes(group)
    if n_way is None or n_shot is None:
        n_way, n_shot = draw_shape(part, generator)
    episode = cdfsl_episode(part, index, n_way=n_way, n_shot=n_shot, n_query=query_count(n_way), seed=seed)
    if group is not None:
        episode = _to_whole_domain(episode, domain, group)
    transform_seed = None
    if generator.random() < randomize_prob:
        transform_seed = int(generator.integers(2**31))
    return TrainingTask(episode, transform_seed, flip=bool(generator.random() < 0.5))


def _draw_domain(domains: Sequence[Domain], generator: np.random.Generator) -> Domain:
    return domains[int(generator.integers(len(domains)))]


def _large_enough(domains: Sequence[Domain], n_way: int, n_shot: int) -> list[Domain]:
    """The domains with classes and images enough for a task; ValueError if there is none."""
    needed = n_shot + query_count(n_way)
    large = [domain for domain in domains if len(domain.classes_with(needed)) >= n_way]
    if not large:
        require_enough(domains, n_way, n_shot, query_count(n_way))
    return large


def _draw_group(domain: Domain, n_way: int, n_shot: int, generator: np.random.Generator) -> list[int] | None:
    """The classes that a task keeps to; None for all, if the domain has no groups or the group drawn is too small."""
    if "/" not in domain.class_names[0] or generator.random() >= 0.5:
        return None
    groups = group_classes(domain, range(len(domain.class_names)))
    names = sorted(groups)
    group = groups[names[int(generator.integers(len(names)))]]
    sizes = domain.class_sizes()[torch.tensor(group)]
    n_usable = int((sizes >= n_shot + query_count(n_way)).sum())
    return group if n_usable >= n_way else None


def _to_whole_domain(episode: Episode, domain: Domain, group: list[int]) -> Episode:
    """An episode of `domain.select_classes(group)`, as one of `domain`."""
    classes = torch.tensor(group)
    rows = torch.nonzero(torch.isin(domain.labels, classes)).flatten()
    return dataclasses.replace(
        episode, classes=classes[episode.classes], support=rows[episode.support], query=rows[episode.query]
    )


def task_images(task: TrainingTask, domain: Domain, device: torch.device | str = "cpu") -> torch.Tensor:
    """The pixels of a task, `(n_support + n_query, 3, height, width)` float32 in 0..255, the support set first.

    Raises:
        ValueError: the task was drawn from another domain.
    """
    episode = task.episode
    if domain.name != episode.domain:
        raise ValueError(f"the task was drawn from {episode.domain!r}, not from {domain.name!r}.")
    images = domain.images[torch.cat([episode.support, episode.query])].to(device).float()
    if task.transform_seed is not None:
        images = randomize_domain(images, torch.Generator().manual_seed(task.transform_seed))
    return images.flip(-1) if task.flip else images
