"""Chooses the hyper-parameters of the baselines on episodes of training domains."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..data.domains import Domain
from ..data.episodes import Episode, cdfsl_episode
from ..modeling.atomic_file import write_json
from ..modeling.fingerprint import compute_fingerprint
from ..modeling.trunks import eval_mode
from .domain_features import DomainFeatures
from .evaluation import Outcome, judge, mean_ci95
from .hyperparameters import Hyperparameters
from .methods import METHODS, Method, Target
from .methods.fine_tuning import GRID_STEPS

#: The methods that have a grid, by name.
TUNABLE: dict[str, Method] = {method.name: method for method in METHODS if method.grid()}

Task = tuple[DomainFeatures, Episode]


@dataclass(frozen=True)
class GridSettings:
    """The episodes of a grid search.

    Attributes:
        n_episodes: of each domain and number of shots.
        n_shot: numbers of support images of a class.
        views, query_views: over how many views of a support image and of a query its features are combined.
    """

    n_episodes: int = 20
    n_shot: tuple[int, ...] = (5,)
    n_way: int = 5
    n_query: int = 15
    seed: int = 0
    views: int = 1
    query_views: int = 1


def grid_search(
    path: str | Path,
    target: Target,
    domains: list[Domain],
    settings: GridSettings,
    *,
    methods: Sequence[str] = tuple(TUNABLE),
    max_steps: int = GRID_STEPS[-1],
) -> Hyperparameters:
    """Run every method over its grid; write the grid and the best hyper-parameters to a JSON file.

    All points of all grids meet the same CD-FSL episodes. The best mean over domains, numbers of shots and episodes
    wins; of equals the earlier in the grid (fewer steps). It is the mean accuracy, or the mean log loss where a method
    is chosen by that. The file is written after every group of `Method.grid`, and
    a group that is in it already is not run again.

    Args:
        path: the JSON file; `read_hyperparameters` reads it.
        domains: training domains, never those that are reported.
        methods: names of some of `TUNABLE`.
        max_steps: gradient steps that there is time for. The grids end there, and of what is in the file already, no
            point of more steps is chosen.

    Returns:
        The best hyper-parameters of each method.

    Raises:
        ValueError: a method has nothing to choose, or nothing of so few steps; the file is of another grid or no
            JSON; or a domain has too few images for an episode.
    """
    unknown = [method for method in methods if method not in TUNABLE]
    if unknown:
        raise ValueError(f"there is nothing to choose for {unknown}: give some of {', '.join(TUNABLE)}.")
    groups: list[list[Method]] = []
    for name in methods:
        groups += _list_groups(TUNABLE[name], max_steps)
    description = _describe(settings, target, domains)
    grid = _read_grid(Path(path), description)
    tasks = _draw_tasks(target, domains, settings)
    for group in groups:
        if not _is_in_grid(group[0], grid):
            grid += _run(group, tasks)
            _write(path, description, grid, max_steps)
    _write(path, description, grid, max_steps)
    return choose_best(grid, max_steps)


def choose_best(grid: list[dict[str, Any]], max_steps: int) -> Hyperparameters:
    """The best point, of no more steps, of every method whose grid is complete."""
    best = {}
    for name, method in TUNABLE.items():
        entries = []
        for entry in grid:
            if entry["method"] == name and entry.get("steps", 0) <= max_steps:
                entries.append(entry)
        if all(_is_in_grid(group[0], entries) for group in method.grid()):
            if method.is_chosen_by_log_loss:
                best_entry = min(entries, key=lambda e: e["log_loss"])
            else:
                best_entry = max(entries, key=lambda e: e["accuracy"])
            best[name] = {key: best_entry[key] for key in method.hyperparameters()}
    return best


def _describe(settings: GridSettings, target: Target, domains: list[Domain]) -> dict[str, Any]:
    """What the accuracies of a grid depend on."""
    target.unload()
    description: dict[str, Any] = {"domains": [domain.name for domain in domains]}
    description.update(asdict(settings))
    description["n_shot"] = list(settings.n_shot)
    description["backbone"] = compute_fingerprint(target.backbone)
    description["last_blocks"] = target.adapter.config.last_blocks
    return description


def _draw_tasks(target: Target, domains: list[Domain], settings: GridSettings) -> list[Task]:
    tasks = []
    ways = {"n_way": settings.n_way, "n_query": settings.n_query, "seed": settings.seed}
    for domain in domains:
        features = DomainFeatures(target, domain, settings.views, settings.query_views)
        for n_shot in settings.n_shot:
            for index in range(settings.n_episodes):
                tasks.append((features, cdfsl_episode(domain, index, n_shot=n_shot, **ways)))
    return tasks


def _list_groups(method: Method, max_steps: int) -> list[list[Method]]:
    """The groups of a method's grid, without the candidates of more steps.

    Raises:
        ValueError: no candidate of a group has so few steps.
    """
    groups: list[list[Method]] = []
    for group in method.grid():
        candidates: list[Method] = []
        for candidate in group:
            if candidate.hyperparameters().get("steps", 0) <= max_steps:
                candidates.append(candidate)
        if not candidates:
            fewest = group[0].hyperparameters()["steps"]
            raise ValueError(f"max_steps must be at least {fewest}, not {max_steps}.")
        groups.append(candidates)
    return groups


def _is_in_grid(candidate: Method, grid: list[dict[str, Any]]) -> bool:
    """Whether the group of a candidate was run: an entry has its settings, with however many steps."""
    settings: dict[str, Any] = {"method": candidate.name}
    settings.update(candidate.hyperparameters())
    settings.pop("steps", None)
    return any(settings.items() <= entry.items() for entry in grid)


def _run(candidates: list[Method], tasks: Iterable[Task]) -> list[dict[str, Any]]:
    """The grid's entries of a group of candidates."""
    title = f"{candidates[0].name} {candidates[0].hyperparameters()}"
    rows = []
    for features, episode in tqdm(tasks, desc=title, disable=None, leave=False):
        rows.append(evaluate_candidates(candidates, features, episode))
    entries = []
    for candidate, outcomes in zip(candidates, zip(*rows, strict=True), strict=True):
        entries.append(_describe_point(candidate, outcomes))
    return entries


def _describe_point(candidate: Method, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The grid's entry of a candidate."""
    mean, half_width = mean_ci95([outcome.accuracy for outcome in outcomes])
    entry: dict[str, Any] = {"method": candidate.name}
    entry.update(candidate.hyperparameters())
    entry["accuracy"] = round(mean, 3)
    entry["ci95"] = round(half_width, 3) if len(outcomes) > 1 else None
    log_losses = [outcome.log_loss for outcome in outcomes if outcome.log_loss is not None]
    if log_losses:
        entry["log_loss"] = round(statistics.mean(log_losses), 5)
    entry["n_episodes"] = len(outcomes)
    return entry


def evaluate_candidates(candidates: list[Method], features: DomainFeatures, episode: Episode) -> list[Outcome]:
    """What a group of candidates reaches on an episode."""
    support, queries, target = features.support(episode), features.queries(episode), features.target
    with eval_mode(target.backbone), eval_mode(target.adapter):
        classifiers = type(candidates[0]).fit_group(candidates, support)
        outcomes = []
        for classifier in classifiers:
            outcomes.append(judge(classifier.classify(queries), episode.query_labels))
    return outcomes


def _read_grid(path: Path, description: dict[str, Any]) -> list[dict[str, Any]]:
    """The part of the grid that is in the file."""
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text())
        description_in_file, grid = content["settings"], content["grid"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no grid ({error}): remove it or choose another file.") from error
    if description_in_file != description:
        raise ValueError(
            f"{path} holds a grid of {description_in_file}, not of {description}: remove it or choose another file."
        )
    return grid


def _write(path: str | Path, description: dict[str, Any], grid: list[dict[str, Any]], max_steps: int) -> None:
    best = choose_best(grid, max_steps)
    write_json(path, {"settings": description, "grid": grid, "hyperparameters": best})
