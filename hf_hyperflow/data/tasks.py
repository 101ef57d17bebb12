"""Training tasks: few-shot tasks drawn from labelled image datasets, some as they are, some changed in looks.

Task `index` is a function of `(seed, index)` alone, so that collecting trajectories and training on them, any number
of processes and a resumed run see the same tasks. Images are never stored: a task names its domain and rows.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from datasets.exceptions import DatasetsError
from transformers.image_processing_utils import BaseImageProcessor

from .augmentation import randomize_domain
from .domains import Domain, load_domain
from .episodes import Episode, cdfsl_episode, episode_generator

#: Ways and shots of drawn tasks (shots log-uniform).
MIN_WAY, MAX_WAY, MAX_SHOT = 3, 10, 10


@dataclass(frozen=True)
class TrainingTask:
    """A task of the training of the flow.

    Attributes:
        episode: which images, as indices into the domain it names.
        transform_seed: of `randomize_domain`, which changes what the images look like; None: the real images.
        flip: whether all images are mirrored.
    """

    episode: Episode
    transform_seed: int | None
    flip: bool


def load_domains(
    sources: list[str], processor: BaseImageProcessor, *, holdout: list[str] = (), max_per_class: int | None = None
) -> tuple[list[Domain], list[Domain]]:
    """Training and validation domains.

    Args:
        sources: labelled image datasets, see `hf_hyperflow.data.domains.open_dataset`.
        holdout: NAME keeps that domain for validation, NAME:K only every K-th class of it.
        max_per_class: images of a class that are used at most.

    Raises:
        ValueError: a dataset cannot be read or is too small for a task (it says how many images are needed), a
            holdout is not among the domains or not NAME or NAME:K, two domains have one name, or none is left to train
            on.
    """
    training, validation = [], []
    kept = dict(_holdout(entry) for entry in holdout)
    for source in sources:
        try:
            domain = load_domain(source, processor, max_per_class=max_per_class)
        except (DatasetsError, FileNotFoundError, ValueError) as error:
            needed = f"{MIN_WAY} classes of {1 + query_count(MIN_WAY)} images"
            raise ValueError(f"cannot train on {source}, a domain of at least {needed} is needed: {error}") from error
        if domain.name not in kept:
            training.append(domain)
        elif kept[domain.name] == 1:
            validation.append(domain)
        else:
            every, classes = kept[domain.name], range(len(domain.class_names))
            training.append(domain.with_classes([c for c in classes if c % every]))
            validation.append(domain.with_classes([c for c in classes if c % every == 0], f"{domain.name}-held-out"))
    names = [domain.name for domain in (*training, *validation)]
    unknown = sorted(set(kept) - set(names))
    if unknown:
        raise ValueError(f"holdout names {unknown}, but the domains are {names}.")
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"several datasets are called {doubled}: a task names its domain, so rename the files.")
    if not training:
        raise ValueError("no domain is left to train on: give more datasets, or hold fewer out.")
    require_enough(training, MIN_WAY, 1, query_count(MIN_WAY))
    return training, validation


def _holdout(entry: str) -> tuple[str, int]:
    """NAME and K of `NAME:K`; 1 without K: every class is held out."""
    name, colon, every = entry.partition(":")
    if not name or (colon and not (every.isdecimal() and int(every) >= 2)):
        raise ValueError(f"holdout {entry!r}: give NAME for a whole domain, or NAME:K, K at least 2, for some classes.")
    return name, int(every or 1)


def query_count(n_way: int) -> int:
    """Queries of each class: about 40 of a task, at least 4."""
    return max(4, min(8, 40 // n_way))


def usable_classes(domain: Domain, n_images: int) -> int:
    """How many classes of a domain have `n_images` images."""
    return int((torch.bincount(domain.labels, minlength=len(domain.class_names)) >= n_images).sum())


def require_enough(domains: list[Domain], n_way: int, n_shot: int, n_query: int) -> None:
    """Check that every domain has the classes and images of an episode.

    Raises:
        ValueError: one has not; it says what there is and how many are needed.
    """
    needed = n_shot + n_query
    for domain in domains:
        usable = usable_classes(domain, needed)
        if usable < n_way:
            sizes = sorted(torch.bincount(domain.labels, minlength=len(domain.class_names)).tolist(), reverse=True)
            raise ValueError(
                f"domain {domain.name!r} has {usable} classes of at least {needed} images, and a {n_way}-way {n_shot}-"
                f"shot task with {n_query} queries of each class needs {n_way} classes of {needed} images. It has "
                f"{len(sizes)} classes, the largest of {', '.join(map(str, sizes[:5]))} images. Give more images or "
                "classes, or leave the dataset out."
            )


def draw_shape(domain: Domain, generator: np.random.Generator) -> tuple[int, int]:
    """Ways (3 to 10) and shots (1 to 10, log-uniform) of a task, fewer where the domain has no more.

    The domain has enough for the smallest task (see `require_enough`).
    """
    n_way = int(generator.integers(MIN_WAY, MAX_WAY + 1))
    n_shot = round(math.exp(generator.uniform(0, math.log(MAX_SHOT))))
    while (usable := usable_classes(domain, n_shot + query_count(n_way))) < n_way:
        if n_way > MIN_WAY and (usable >= MIN_WAY or n_shot == 1):
            n_way -= 1
        elif n_shot > 1:
            n_shot -= 1
        else:
            require_enough([domain], n_way, n_shot, query_count(n_way))
    return n_way, n_shot


def draw_group_shape(domains: list[Domain], group: int, *, seed: int) -> tuple[int, int]:
    """Ways and shots that the tasks of group `group` share: those of a task of a random domain."""
    generator = episode_generator(seed, "group", group)
    return draw_shape(domains[int(generator.integers(len(domains)))], generator)


def draw_task(
    domains: list[Domain],
    index: int,
    *,
    seed: int,
    randomize_prob: float,
    n_way: int | None = None,
    n_shot: int | None = None,
) -> TrainingTask:
    """Training task `index`: 3 to 10 ways, 1 to 10 shots, about 40 queries, from a random domain.

    Of domains whose class names are `<group>/<class>` (Omniglot's alphabets), half the tasks keep to one group.

    Args:
        randomize_prob: share of the tasks whose domain is made from a real one.
        n_way, n_shot: of the task, both or none. A task with given numbers has exactly these and is drawn from the
            domains that have them; without, a small domain gives smaller tasks.

    Raises:
        ValueError: no domain has classes and images enough.
    """
    generator = episode_generator(seed, "training", index)
    if n_way is not None:
        needed = n_shot + query_count(n_way)
        enough = [domain for domain in domains if usable_classes(domain, needed) >= n_way]
        if not enough:
            require_enough(domains, n_way, n_shot, query_count(n_way))
        domains = enough
    domain = domains[int(generator.integers(len(domains)))]
    classes, part = None, domain
    if "/" in domain.class_names[0] and generator.random() < 0.5:
        groups = _groups(domain)
        classes = groups[int(generator.integers(len(groups)))]
        part = domain.with_classes(classes)
        smallest = (n_way, needed) if n_way is not None else (MIN_WAY, 1 + query_count(MIN_WAY))
        if usable_classes(part, smallest[1]) < smallest[0]:
            classes, part = None, domain
    if n_way is None:
        n_way, n_shot = draw_shape(part, generator)
    episode = cdfsl_episode(part, index, n_way=n_way, n_shot=n_shot, n_query=query_count(n_way), seed=seed)
    if classes is not None:
        rows, classes = torch.nonzero(torch.isin(domain.labels, torch.tensor(classes))).flatten(), torch.tensor(classes)
        episode = dataclasses.replace(
            episode, classes=classes[episode.classes], support=rows[episode.support], query=rows[episode.query]
        )
    transform_seed = int(generator.integers(2**31)) if generator.random() < randomize_prob else None
    return TrainingTask(episode, transform_seed, flip=bool(generator.random() < 0.5))


def _groups(domain: Domain) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for c, name in enumerate(domain.class_names):
        groups.setdefault(name.split("/")[0], []).append(c)
    return [groups[name] for name in sorted(groups)]


def task_images(task: TrainingTask, domain: Domain, device: torch.device | str = "cpu") -> torch.Tensor:
    """The pixels of a task: `(n_support + n_query, 3, height, width)` float32 in 0..255, the support set first.

    Raises:
        ValueError: `domain` is not the one the task was drawn from.
    """
    episode = task.episode
    if domain.name != episode.domain:
        raise ValueError(f"the task was drawn from {episode.domain!r}, not from {domain.name!r}.")
    images = domain.images[torch.cat([episode.support, episode.query])].to(device).float()
    if task.transform_seed is not None:
        images = randomize_domain(images, torch.Generator().manual_seed(task.transform_seed))
    return images.flip(-1) if task.flip else images
