"""Choose the settings of the baselines by grid, on episodes of training domains."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..data.domains import Domain
from ..data.episodes import Episode, cdfsl_episode
from ..finetuning.finetune import FineTuningConfig
from ..modeling.backbones import eval_mode
from ..modeling.fingerprint import compute_fingerprint
from ..modeling.saving import write_json
from .evaluation import DomainFeatures, mean_ci95, prototype_accuracy
from .methods import GRADIENT_METHODS, Target, fine_tuned_features, head_classifier, label_accuracy

STEPS = (5, 10, 20, 50, 100)
LEARNING_RATES = {
    "bias": (3e-4, 1e-3, 3e-3, 1e-2),
    "lora": (3e-4, 1e-3, 3e-3, 1e-2),
    "layernorm": (3e-4, 1e-3, 3e-3, 1e-2),
    "full": (3e-6, 1e-5, 3e-5, 1e-4),
}
#: Methods that have settings to choose.
TUNED = ("head", *GRADIENT_METHODS)
HEAD_C = (0.1, 1.0, 10.0, 100.0, 1000.0)


def grid_search(
    path: str | Path,
    target: Target,
    domains: list[Domain],
    *,
    methods: Sequence[str] = TUNED,
    max_steps: int = STEPS[-1],
    n_episodes: int = 20,
    n_shot: list[int],
    n_way: int = 5,
    n_query: int = 15,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Run every method over its grid and write the grid and the best settings to a JSON file.

    All settings of all methods meet the same CD-FSL episodes; the best mean over domains, numbers of shots and
    episodes wins, ties go to the earlier in the grid (fewer steps). The file is written after every run of a learning
    rate, and a run that is in it already is not done again.

    Args:
        path: the JSON file; `read_hyperparameters` reads it.
        domains: training domains, never those that are reported.
        max_steps: gradient steps that there is time for; the grid ends there, and of what is in the file already no
            setting of more steps is chosen.
        n_episodes: of each domain and number of shots.

    Returns:
        The best settings of each method.

    Raises:
        ValueError: a method has nothing to choose; the file there is of another grid or no JSON; or a domain has too
            few images for an episode.
    """
    unknown = [method for method in methods if method not in TUNED]
    if unknown:
        raise ValueError(f"there is nothing to choose for {unknown}: give some of {', '.join(TUNED)}.")
    path = Path(path)
    settings = {"domains": [d.name for d in domains], "n_episodes": n_episodes, "n_shot": list(n_shot)}
    settings |= {"n_way": n_way, "n_query": n_query, "seed": seed}
    settings |= {"backbone": compute_fingerprint(target.plain()), "last_blocks": target.adapter.config.last_blocks}
    grid = _known(path, settings)
    steps = [n for n in STEPS if n <= max_steps]
    if not steps:
        raise ValueError(f"max_steps must be at least {STEPS[0]}, not {max_steps}.")
    tasks = [
        (features, cdfsl_episode(features.domain, index, n_way=n_way, n_shot=shots, n_query=n_query, seed=seed))
        for features in [DomainFeatures(target.split, d, target.adapter.processor) for d in domains]
        for shots in n_shot
        for index in range(n_episodes)
    ]
    for method in methods:
        for learning_rate in LEARNING_RATES.get(method, (None,)):
            if any(e["method"] == method and e.get("learning_rate") == learning_rate for e in grid):
                continue
            bar = tqdm(tasks, desc=f"{method} {learning_rate or ''}", disable=None, leave=False)
            points = _points(method, learning_rate, steps)
            found = [_along_grid(method, points, target, *task) for task in bar]
            for point, values in zip(points, zip(*found, strict=True), strict=True):
                mean, half = mean_ci95(values)
                measured = {"accuracy": round(mean, 3), "ci95": round(half, 3) if len(values) > 1 else None}
                grid.append({"method": method} | point | measured | {"n_episodes": len(values)})
            write_json(path, {"settings": settings, "grid": grid, "recipes": _best(grid, max_steps)})
    write_json(path, {"settings": settings, "grid": grid, "recipes": _best(grid, max_steps)})
    return _best(grid, max_steps)


def _best(grid: list[dict], max_steps: int) -> dict[str, dict[str, float]]:
    """The best settings, of no more steps, of every method whose grid is complete."""
    recipes = {}
    for method in TUNED:
        entries = [e for e in grid if e["method"] == method and e.get("steps", 0) <= max_steps]
        rates = LEARNING_RATES.get(method, (None,))
        if {e.get("learning_rate") for e in entries} == set(rates):
            best = max(entries, key=lambda e: e["accuracy"])
            recipes[method] = {key: best[key] for key in ("c", "learning_rate", "steps") if key in best}
    return recipes


def _points(method: str, learning_rate: float | None, steps: list[int]) -> list[dict[str, float]]:
    """The points of the grid that one run gives."""
    if method == "head":
        return [{"c": c} for c in HEAD_C]
    return [{"learning_rate": learning_rate, "steps": n} for n in steps]


def _along_grid(
    method: str, points: list[dict[str, float]], target: Target, features: DomainFeatures, episode: Episode
) -> list[float]:
    """Accuracies in % at the points of one run."""
    if method != "head":
        recipe, steps = FineTuningConfig(learning_rate=points[0]["learning_rate"]), [point["steps"] for point in points]
        found = fine_tuned_features(method, target, features, episode, recipe, steps)
        return [prototype_accuracy(each, episode) for each in found]
    with torch.no_grad(), eval_mode(target.plain()):
        found = features.plain(torch.cat([episode.support, episode.query]))
    support, query = found[: len(episode.support)], found[len(episode.support) :]
    heads = [head_classifier(support, episode.support_labels, point["c"]) for point in points]
    return [label_accuracy(head(query), episode) for head in heads]


def _known(path: Path, settings: dict) -> list[dict]:
    """The part of the grid that is in the file."""
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text())
        known, grid = content["settings"], content["grid"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no grid ({error}): remove it or choose another file.") from error
    if known != settings:
        raise ValueError(f"{path} holds a grid of {known}, not of {settings}: remove it or choose another file.")
    return grid
