"""Does the flow arrive where the teacher went? An adapter's flow against recorded trajectories.

Distances, angles and speeds are those of the scaled units that the flow is integrated in, z = (theta - start) /
token_scale. A distance is relative to how far the teacher went: 0 is its endpoint, 1 is not to have moved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers.image_processing_utils import BaseImageProcessor

from hf_hyperflow.benchmark.evaluation import compute_features, mean_ci95
from hf_hyperflow.data.domains import Domain, normalise
from hf_hyperflow.data.tasks import task_images
from hf_hyperflow.finetuning.interpolants import INTERPOLANTS
from hf_hyperflow.finetuning.trajectories import Trajectories
from hf_hyperflow.modeling.adapter import HyperFlowAdapter
from hf_hyperflow.modeling.backbones import SplitBackbone, eval_mode
from hf_hyperflow.modeling.parameter_space import ParameterSpace
from hf_hyperflow.modeling.prototypes import PrototypeClassifier
from hf_hyperflow.modeling.solvers import TABLEAUX, integrate
from hf_hyperflow.modeling.task_encoder import TaskTokens, stack

#: Where the flow is looked at: every eighth up to t = 1.5, with one step of RK4 between them.
GRID = [i / 8 for i in range(13)]
#: The grid's place of t = 1, where the teacher stopped.
ARRIVAL = GRID.index(1.0)
#: Where the target is run with the flow's weights, which takes far longer than the flow.
QUERY_GRID = GRID[::2]
#: Steps from t = 0 to t = 1 that the solvers are compared with, and those of the RK4 they are compared to.
N_STEPS, REFERENCE_STEPS = (1, 2, 4, 8, 16, 50), 100

Record = dict[str, str | float | None]


@dataclass(frozen=True)
class Followed:
    """A flow over `n` recorded tasks, measured in scaled units.

    Attributes:
        deltas: `(n, len(QUERY_GRID), n_tokens, token_dim)` on the CPU: theta minus the adapter's start along the flow.
        distance: `(n,)`, of z(1) to the recorded endpoint, relative to that of z(0) = 0.
        distance_from_start: `(n,)`, the same where the flow begins at the teacher's own, noisy start.
        distance_of_mean: `(n,)`, of one displacement for all tasks, the mean of the training trajectories.
        drifted: `(n,)`, how far the flow moves from t = 1 to t = 1.5, relative to how far the teacher went.
        cosine_path, cosine_flow: `(n, ARRIVAL)`, between predicted and recorded velocity where the path is, and
            where the flow is, at that time.
        speed, recorded_speed: `(n, len(GRID))`, of the flow and of the path at that time; 1 takes the flow from its
            start as far as the teacher went in a unit of time.
    """

    deltas: torch.Tensor
    distance: np.ndarray
    distance_from_start: np.ndarray
    distance_of_mean: np.ndarray
    drifted: np.ndarray
    cosine_path: np.ndarray
    cosine_flow: np.ndarray
    speed: np.ndarray
    recorded_speed: np.ndarray


@dataclass(frozen=True)
class QueryCurve:
    """Query loss, and accuracy in %, `(n_tasks, n_points)` each, at points of a trajectory."""

    loss: np.ndarray
    accuracy: np.ndarray


def some_rows(n_rows: int, n: int) -> list[int]:
    """At most `n` of so many rows, evenly spread: rows that were recorded together share ways and shots."""
    n = min(n, n_rows)
    return [i * n_rows // n for i in range(n)]


def some_of(trajectories: Trajectories, n_tasks: int) -> Trajectories:
    """At most `n_tasks` of a collection's rows, see `some_rows`."""
    rows = some_rows(len(trajectories), n_tasks)
    return dataclasses.replace(
        trajectories, tasks=[trajectories.tasks[row] for row in rows], deltas=trajectories.deltas[rows]
    )


def training_interpolant(adapter: HyperFlowAdapter) -> str:
    """The path whose velocities an adapter was trained to match; "linear" where it was not or nothing says so."""
    arguments = (adapter.training_record or {}).get("arguments", {})
    return arguments["path"] if arguments.get("trajectories") else "linear"


@torch.no_grad()
def task_tokens(adapter: HyperFlowAdapter, support: list[tuple[torch.Tensor, torch.Tensor]]) -> TaskTokens:
    """A batch of tasks from `hf_hyperflow.training.objectives.encode_recorded_support`."""
    device = adapter.device
    return stack([adapter.task_encoder(features.to(device), labels.to(device)) for features, labels in support])


@torch.no_grad()
def follow(
    adapter: HyperFlowAdapter, tasks: TaskTokens, recorded: Trajectories, *, path: str, mean_end: torch.Tensor
) -> Followed:
    """Integrate the flow over recorded tasks and measure it against them.

    Args:
        adapter: in evaluation mode.
        tasks: the support sets of `recorded`.
        path: which of `INTERPOLANTS` the recorded velocity is that of.
        mean_end: `(n_tokens, token_dim)`, a displacement that serves as the guess that knows no task.
    """
    velocity, points, times = (
        _drift(adapter, tasks),
        _scaled(adapter, recorded.deltas),
        recorded.times.to(adapter.device),
    )
    start, end = points[:, 0], points[:, -1]
    went = _norm(end)
    states = adapter.flow(tasks, n_steps=len(GRID) - 1, solver="rk4", end_time=GRID[-1]).states
    own = integrate(velocity, start, n_steps=ARRIVAL, method="rk4").end
    cosine_path, cosine_flow, speed, recorded_speed = [], [], [], []
    for t, z in zip(GRID, states, strict=True):
        place, target = INTERPOLANTS[path](points, times, times.new_full((len(z),), t))
        on_flow = velocity(z, t)
        speed.append(_norm(on_flow) / went)
        recorded_speed.append(_norm(target) / went)
        if t < 1:
            cosine_path.append(_cosine(velocity(place, t), target))
            cosine_flow.append(_cosine(on_flow, target))
    return Followed(
        deltas=(torch.stack(states[::2], dim=1) * adapter.token_scale).cpu(),
        distance=_numpy(_norm(states[ARRIVAL] - end) / went),
        distance_from_start=_numpy(_norm(own - end) / _norm(start - end)),
        distance_of_mean=_numpy(_norm(_scaled(adapter, mean_end) - end) / went),
        drifted=_numpy(_norm(states[-1] - states[ARRIVAL]) / went),
        cosine_path=_numpy(torch.stack(cosine_path, dim=1)),
        cosine_flow=_numpy(torch.stack(cosine_flow, dim=1)),
        speed=_numpy(torch.stack(speed, dim=1)),
        recorded_speed=_numpy(torch.stack(recorded_speed, dim=1)),
    )


@torch.no_grad()
def compare_solvers(adapter: HyperFlowAdapter, tasks: TaskTokens, recorded: Trajectories) -> list[Record]:
    """Every solver with 1 to 50 steps: where it arrives, and at how many evaluations of the drift network.

    Returns:
        One record each: `distance` as in `Followed`, and `difference` to a fine RK4, relative to how far the teacher
        went, with their 95 % intervals over the tasks.
    """
    end = _scaled(adapter, recorded.deltas)[:, -1]
    went = _norm(end)
    exact = adapter.flow(tasks, n_steps=REFERENCE_STEPS, solver="rk4").end
    records = []
    for solver in TABLEAUX:
        for n_steps in N_STEPS:
            found = adapter.flow(tasks, n_steps=n_steps, solver=solver)
            record = {"solver": solver, "n_steps": n_steps, "nfe": found.nfe}
            record |= _mean("distance", _numpy(_norm(found.end - end) / went))
            records.append(record | _mean("difference", _numpy(_norm(found.end - exact) / went)))
    return records


@torch.no_grad()
def query_curves(
    split: SplitBackbone,
    space: ParameterSpace,
    processor: BaseImageProcessor,
    recorded: Trajectories,
    domains: list[Domain],
    deltas: list[torch.Tensor],
) -> list[QueryCurve]:
    """Query loss and accuracy of recorded tasks with other weights written into the target.

    Cosines are scaled by 10 in the loss, as the teacher does it. The images go through the frozen first blocks once.
    May run under autocast. The backbone is left as it was.

    Args:
        split: the target.
        deltas: of every curve `(n_tasks, n_points, n_tokens, token_dim)`: theta minus the adapter's start.
    """
    by_name = {domain.name: domain for domain in domains}
    parameter = next(split.backbone.parameters())
    was_in = space.is_in(split.backbone)
    injection = space.inject(split.backbone)
    found: list[list[list[tuple[float, float]]]] = [[] for _ in deltas]
    try:
        with eval_mode(split.backbone):
            for i, task in enumerate(recorded.tasks):
                images = task_images(task, by_name[task.episode.domain], parameter.device)
                hidden = split.forward_prefix(normalise(images, processor).to(parameter.dtype))
                labels = [task.episode.support_labels, task.episode.query_labels]
                support_labels, query_labels = (part.to(parameter.device) for part in labels)
                for curve, rows in zip(found, deltas, strict=True):
                    curve.append([])
                    for delta in rows[i]:
                        injection.write(injection.start + delta.to(injection.start))
                        features = split.final_features(compute_features(split, hidden))
                        classifier = PrototypeClassifier.from_support(features[: len(support_labels)], support_labels)
                        logits = classifier(features[len(support_labels) :])
                        right = (logits.argmax(-1) == query_labels).float().mean()
                        curve[-1].append((F.cross_entropy(logits, query_labels).item(), 100 * right.item()))
    finally:
        injection.write(injection.start)
        injection.owner = None
        if not was_in:
            injection.remove()
    return [QueryCurve(*np.moveaxis(np.array(curve), -1, 0)) for curve in found]


def arrival_record(followed: Followed, curve: QueryCurve, teacher: QueryCurve) -> Record:
    """Where a flow arrives, and whether it goes too far: means over tasks and 95 % intervals.

    `loss_gain` and `accuracy_gain` are from t = 0 to t = 1, `loss_after` and `accuracy_after` from t = 1 to t = 1.5;
    `teacher_...` is from the teacher's first recorded point to its last.
    """
    names = ("distance", "distance_from_start", "distance_of_mean", "drifted")
    record, arrival = {"n_tasks": len(followed.distance)}, QUERY_GRID.index(1.0)
    for name in names:
        record |= _mean(name, vars(followed)[name])
    for kind in ("loss", "accuracy"):
        values, reference = vars(curve)[kind], vars(teacher)[kind]
        record |= _mean(f"{kind}_gain", values[:, arrival] - values[:, 0])
        record |= _mean(f"{kind}_after", values[:, -1] - values[:, arrival])
        record |= _mean(f"teacher_{kind}_gain", reference[:, -1] - reference[:, 0])
    return record


def along_records(followed: Followed, curve: QueryCurve) -> list[Record]:
    """One record for each time of `GRID`, means over tasks and 95 % intervals.

    Cosines are None from t = 1 on, loss and accuracy between the times of `QUERY_GRID`.
    """
    records = []
    for i, t in enumerate(GRID):
        record = {"t": t}
        for name in ("cosine_path", "cosine_flow"):
            record |= _mean(name, vars(followed)[name][:, i]) if t < 1 else _nothing(name)
        for name in ("speed", "recorded_speed"):
            record |= _mean(name, vars(followed)[name][:, i])
        for name in ("loss", "accuracy"):
            record |= _mean(name, vars(curve)[name][:, QUERY_GRID.index(t)]) if t in QUERY_GRID else _nothing(name)
        records.append(record)
    return records


def teacher_records(teacher: QueryCurve, times: torch.Tensor) -> list[Record]:
    """One record for each recorded point of the teacher."""
    return [
        {"t": round(t, 4)} | _mean("loss", teacher.loss[:, i]) | _mean("accuracy", teacher.accuracy[:, i])
        for i, t in enumerate(times.tolist())
    ]


def _nothing(name: str) -> Record:
    return {name: None, f"{name}_ci95": None}


def _mean(name: str, values: np.ndarray) -> dict[str, float]:
    mean, half = mean_ci95(values)
    return {name: round(mean, 5), f"{name}_ci95": round(half, 5)}


def _drift(adapter: HyperFlowAdapter, tasks: TaskTokens) -> Callable[[torch.Tensor, float], torch.Tensor]:
    mask = adapter.space.mask.to(adapter.device)
    return lambda z, t: adapter.drift(z, t, tasks) * mask


def _scaled(adapter: HyperFlowAdapter, deltas: torch.Tensor) -> torch.Tensor:
    return deltas.to(adapter.device).float() / adapter.token_scale


def _norm(z: torch.Tensor) -> torch.Tensor:
    return z.flatten(1).norm(dim=1)


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.cosine_similarity(a.flatten(1), b.flatten(1), dim=1)


def _numpy(values: torch.Tensor) -> np.ndarray:
    return values.double().cpu().numpy()
