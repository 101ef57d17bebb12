"""Does the flow arrive where the teacher went? An adapter's flow, measured against recorded trajectories.

Distances, angles and speeds are in the scaled units that the flow is integrated in, z = (theta - start) / token_scale.
A distance is relative to how far the teacher went: 0 is the teacher's endpoint, 1 means that the flow did not move.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers.image_processing_utils import BaseImageProcessor

from hf_hyperflow.benchmark.evaluation import mean_ci95
from hf_hyperflow.benchmark.methods.target import forward_hidden
from hf_hyperflow.data.domains import Domain, normalise
from hf_hyperflow.data.tasks import TrainingTask, task_images
from hf_hyperflow.finetuning.interpolants import INTERPOLANTS
from hf_hyperflow.finetuning.trajectories import Trajectories
from hf_hyperflow.modeling.adapter import HyperFlowAdapter
from hf_hyperflow.modeling.backbones import Hidden, SplitBackbone
from hf_hyperflow.modeling.parameter_space import ParameterSpace
from hf_hyperflow.modeling.prototypes import PrototypeClassifier
from hf_hyperflow.modeling.solvers import TABLEAUX, integrate
from hf_hyperflow.modeling.task_encoder import TaskTokens, stack
from hf_hyperflow.modeling.trunks import eval_mode

#: Times at which the flow is measured: every eighth up to t = 1.5, with one step of RK4 between them.
GRID = [i / 8 for i in range(13)]
#: Index in the grid of t = 1, where the teacher stopped.
ARRIVAL = GRID.index(1.0)
#: Times at which the target is run with the flow's weights, which takes far longer than the flow.
QUERY_GRID = GRID[::2]
#: Steps from t = 0 to t = 1 that the solvers are compared with, and those of the RK4 they are compared to.
N_STEPS, REFERENCE_STEPS = (1, 2, 4, 8, 16, 50), 100

Record = dict[str, str | float | None]


@dataclass(frozen=True)
class FlowMeasures:
    """A flow over `n` recorded tasks, measured in scaled units.

    Attributes:
        deltas: `(n, len(QUERY_GRID), n_tokens, token_dim)` on the CPU, theta minus the adapter's start along the flow.
        distance: `(n,)`, from z(1) to the recorded endpoint.
        distance_from_start: `(n,)`, the same for a flow that begins at the teacher's own, noisy start.
        distance_of_mean: `(n,)`, of the one displacement that is the mean of all training trajectories.
        drifted: `(n,)`, how far the flow moves from t = 1 to t = 1.5.
        cosine_on_path: `(n, ARRIVAL)`, between predicted and recorded velocity, predicted on the recorded path.
        cosine_on_flow: `(n, ARRIVAL)`, the same, predicted where the flow is at that time.
        speed: `(n, len(GRID))`, of the flow; 1 goes as far as the teacher went in a unit of time.
        recorded_speed: `(n, len(GRID))`, of the recorded path at that time.
    """

    deltas: torch.Tensor
    distance: np.ndarray
    distance_from_start: np.ndarray
    distance_of_mean: np.ndarray
    drifted: np.ndarray
    cosine_on_path: np.ndarray
    cosine_on_flow: np.ndarray
    speed: np.ndarray
    recorded_speed: np.ndarray


@dataclass(frozen=True)
class QueryCurve:
    """Query loss, and accuracy in %, at points of a trajectory: `(n_tasks, n_points)` each."""

    loss: np.ndarray
    accuracy: np.ndarray


def select_rows(n_rows: int, n: int) -> list[int]:
    """At most `n` of `n_rows` rows, evenly spread, for rows that were recorded together share ways and shots."""
    n = min(n, n_rows)
    return [i * n_rows // n for i in range(n)]


def select_tasks(trajectories: Trajectories, n_tasks: int) -> Trajectories:
    """At most `n_tasks` of the rows of a collection, see `select_rows`."""
    rows = select_rows(len(trajectories), n_tasks)
    tasks = [trajectories.tasks[row] for row in rows]
    return dataclasses.replace(trajectories, tasks=tasks, deltas=trajectories.deltas[rows])


def get_interpolant(adapter: HyperFlowAdapter) -> str:
    """The interpolant whose velocities an adapter was trained to match; "linear" if it was trained on none."""
    arguments = (adapter.training_record or {}).get("arguments", {})
    if not arguments.get("trajectories"):
        return "linear"
    return arguments["interpolant"]


@torch.no_grad()
def encode_tasks(adapter: HyperFlowAdapter, support: list[tuple[torch.Tensor, torch.Tensor]]) -> TaskTokens:
    """A batch of task tokens from what `hf_hyperflow.training.objectives.encode_recorded_support` gives."""
    tokens = []
    for features, labels in support:
        tokens.append(adapter.task_encoder(features.to(adapter.device), labels.to(adapter.device)))
    return stack(tokens)


@torch.no_grad()
def measure_flow(
    adapter: HyperFlowAdapter, tasks: TaskTokens, recorded: Trajectories, *, interpolant: str, mean_end: torch.Tensor
) -> FlowMeasures:
    """Integrate the flow over recorded tasks and measure it against them.

    Args:
        adapter: in evaluation mode.
        tasks: the support sets of `recorded`.
        interpolant: the one of `INTERPOLANTS` that gives the recorded velocity.
        mean_end: `(n_tokens, token_dim)`, the displacement of a guess that knows no task.
    """
    points = _scale(adapter, recorded.deltas)
    times = recorded.times.to(adapter.device)
    start, end = points[:, 0], points[:, -1]
    teacher_way = _norm(end)
    states = adapter.flow(tasks, n_steps=len(GRID) - 1, solver="rk4", end_time=GRID[-1]).states

    def velocity(z: torch.Tensor, t: float) -> torch.Tensor:
        return adapter.velocity(z, t, tasks)

    end_from_start = integrate(velocity, start, n_steps=ARRIVAL, method="rk4").end
    cosines_on_path, cosines_on_flow, speeds, recorded_speeds = [], [], [], []
    for t, z in zip(GRID, states, strict=True):
        place, target = INTERPOLANTS[interpolant](points, times, times.new_full((len(z),), t))
        on_flow = velocity(z, t)
        speeds.append(_norm(on_flow) / teacher_way)
        recorded_speeds.append(_norm(target) / teacher_way)
        if t < 1:
            cosines_on_path.append(_cosine(velocity(place, t), target))
            cosines_on_flow.append(_cosine(on_flow, target))
    return FlowMeasures(
        deltas=(torch.stack(states[::2], dim=1) * adapter.token_scale).cpu(),
        distance=_to_numpy(_norm(states[ARRIVAL] - end) / teacher_way),
        distance_from_start=_to_numpy(_norm(end_from_start - end) / _norm(start - end)),
        distance_of_mean=_to_numpy(_norm(_scale(adapter, mean_end) - end) / teacher_way),
        drifted=_to_numpy(_norm(states[-1] - states[ARRIVAL]) / teacher_way),
        cosine_on_path=_to_numpy(torch.stack(cosines_on_path, dim=1)),
        cosine_on_flow=_to_numpy(torch.stack(cosines_on_flow, dim=1)),
        speed=_to_numpy(torch.stack(speeds, dim=1)),
        recorded_speed=_to_numpy(torch.stack(recorded_speeds, dim=1)),
    )


@torch.no_grad()
def compare_solvers(adapter: HyperFlowAdapter, tasks: TaskTokens, recorded: Trajectories) -> list[Record]:
    """Every solver with 1 to 50 steps: where it arrives, and after how many evaluations of the drift network.

    Returns:
        One record each. `distance` is that of `FlowMeasures`; `difference` is the one to a fine RK4, relative to how
        far the teacher went. Both are means over the tasks with 95 % intervals.
    """
    end = _scale(adapter, recorded.deltas)[:, -1]
    teacher_way = _norm(end)
    reference = adapter.flow(tasks, n_steps=REFERENCE_STEPS, solver="rk4").end
    records = []
    for solver in TABLEAUX:
        for n_steps in N_STEPS:
            trajectory = adapter.flow(tasks, n_steps=n_steps, solver=solver)
            record: Record = {"solver": solver, "n_steps": n_steps, "nfe": trajectory.nfe}
            _add_mean(record, "distance", _to_numpy(_norm(trajectory.end - end) / teacher_way))
            _add_mean(record, "difference", _to_numpy(_norm(trajectory.end - reference) / teacher_way))
            records.append(record)
    return records


@torch.no_grad()
def measure_queries(
    split: SplitBackbone,
    space: ParameterSpace,
    processor: BaseImageProcessor,
    recorded: Trajectories,
    domains: list[Domain],
    deltas: list[torch.Tensor],
) -> list[QueryCurve]:
    """Query loss and accuracy of recorded tasks with other weights in the target.

    Cosines are scaled by 10 in the loss, as the teacher does it. The images go through the frozen first blocks once.
    May run under autocast. The backbone is left as it was.

    Args:
        split: the target.
        deltas: for every curve `(n_tasks, n_points, n_tokens, token_dim)`, theta minus the adapter's start.
    """
    by_name = {domain.name: domain for domain in domains}
    was_in = space.is_in(split.backbone)
    injection = space.inject(split.backbone)
    curves: list[list[list[tuple[float, float]]]] = [[] for _ in deltas]
    try:
        with eval_mode(split.backbone):
            for i, task in enumerate(recorded.tasks):
                hidden = _encode_images(split, processor, task, by_name[task.episode.domain])
                for curve, rows in zip(curves, deltas, strict=True):
                    points = []
                    for delta in rows[i]:
                        with injection.using(injection.start + delta.to(injection.start)):
                            points.append(_classify_queries(split, hidden, task))
                    curve.append(points)
    finally:
        if not was_in:
            injection.remove()
    results = []
    for curve in curves:
        loss, accuracy = np.moveaxis(np.array(curve), -1, 0)
        results.append(QueryCurve(loss, accuracy))
    return results


def _encode_images(split: SplitBackbone, processor: BaseImageProcessor, task: TrainingTask, domain: Domain) -> Hidden:
    """What the frozen blocks make of the support and query images of a task."""
    parameter = next(split.backbone.parameters())
    images = task_images(task, domain, parameter.device)
    return split.forward_prefix(normalise(images, processor).to(parameter.dtype))


def _classify_queries(split: SplitBackbone, hidden: Hidden, task: TrainingTask) -> tuple[float, float]:
    """Query loss, and accuracy in %, of a task with the weights that the backbone has now."""
    features = split.final_features(forward_hidden(split, hidden))
    support_labels = task.episode.support_labels.to(features.device)
    query_labels = task.episode.query_labels.to(features.device)
    n_support = len(support_labels)
    logits = PrototypeClassifier.from_support(features[:n_support], support_labels)(features[n_support:])
    correct = (logits.argmax(-1) == query_labels).float().mean()
    return F.cross_entropy(logits, query_labels).item(), 100 * correct.item()


def summarise_arrival(measures: FlowMeasures, curve: QueryCurve, teacher: QueryCurve) -> Record:
    """Where a flow arrives, and whether it goes too far: means over tasks with 95 % intervals.

    `loss_gain` and `accuracy_gain` are changes from t = 0 to t = 1, `loss_after` and `accuracy_after` from t = 1 to
    t = 1.5. `teacher_...` are changes from the teacher's first recorded point to its last.
    """
    arrival = QUERY_GRID.index(1.0)
    record: Record = {"n_tasks": len(measures.distance)}
    _add_mean(record, "distance", measures.distance)
    _add_mean(record, "distance_from_start", measures.distance_from_start)
    _add_mean(record, "distance_of_mean", measures.distance_of_mean)
    _add_mean(record, "drifted", measures.drifted)
    curves = {
        "loss": (curve.loss, teacher.loss),
        "accuracy": (curve.accuracy, teacher.accuracy),
    }
    for kind, (values, reference) in curves.items():
        _add_mean(record, f"{kind}_gain", values[:, arrival] - values[:, 0])
        _add_mean(record, f"{kind}_after", values[:, -1] - values[:, arrival])
        _add_mean(record, f"teacher_{kind}_gain", reference[:, -1] - reference[:, 0])
    return record


def summarise_along_flow(measures: FlowMeasures, curve: QueryCurve) -> list[Record]:
    """One record for each time of `GRID`: means over tasks with 95 % intervals.

    Cosines are None from t = 1 on; loss and accuracy are None between the times of `QUERY_GRID`.
    """
    records = []
    for i, t in enumerate(GRID):
        record: Record = {"t": t}
        cosine_on_path = measures.cosine_on_path[:, i] if t < 1 else None
        cosine_on_flow = measures.cosine_on_flow[:, i] if t < 1 else None
        _add_mean(record, "cosine_path", cosine_on_path)
        _add_mean(record, "cosine_flow", cosine_on_flow)
        _add_mean(record, "speed", measures.speed[:, i])
        _add_mean(record, "recorded_speed", measures.recorded_speed[:, i])
        loss = accuracy = None
        if t in QUERY_GRID:
            loss = curve.loss[:, QUERY_GRID.index(t)]
            accuracy = curve.accuracy[:, QUERY_GRID.index(t)]
        _add_mean(record, "loss", loss)
        _add_mean(record, "accuracy", accuracy)
        records.append(record)
    return records


def summarise_teacher(teacher: QueryCurve, times: torch.Tensor) -> list[Record]:
    """One record for each recorded point of the teacher."""
    records = []
    for i, t in enumerate(times.tolist()):
        record: Record = {"t": round(t, 4)}
        _add_mean(record, "loss", teacher.loss[:, i])
        _add_mean(record, "accuracy", teacher.accuracy[:, i])
        records.append(record)
    return records


def _add_mean(record: Record, name: str, values: np.ndarray | None) -> None:
    """Add a mean and its half-width to a record, or None twice."""
    record[name] = record[f"{name}_ci95"] = None
    if values is not None:
        mean, half_width = mean_ci95(values)
        record[name] = round(mean, 5)
        record[f"{name}_ci95"] = round(half_width, 5)


def _scale(adapter: HyperFlowAdapter, deltas: torch.Tensor) -> torch.Tensor:
    """Displacements of theta in the units of the flow."""
    return deltas.to(adapter.device).float() / adapter.token_scale


def _norm(z: torch.Tensor) -> torch.Tensor:
    return z.flatten(1).norm(dim=1)


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.cosine_similarity(a.flatten(1), b.flatten(1), dim=1)


def _to_numpy(values: torch.Tensor) -> np.ndarray:
    return values.double().cpu().numpy()
