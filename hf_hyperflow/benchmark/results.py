"""From the episodes of a benchmark to its results: means, 95 % intervals, and differences paired by episode."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, TypeVar

import numpy as np

from .bench.measure import TaskCost
from .cost_file import CostKey
from .episode_log import EpisodeResult
from .evaluation import mean_ci95
from .methods import FLOW_POINTS, METHODS, HyperFlow, list_labels
from .records import (
    NO_ESTIMATE,
    AgainstRecord,
    Estimate,
    FlowRecord,
    MeanAgainstRecord,
    MeanRecord,
    Record,
    Results,
)
from .scores import compute_ece

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

#: What was measured by episode index, of one method on one domain with one number of shots.
Measured = dict[int, float]

#: The method that all others are compared with, and the one that is compared with all others.
REFERENCE, HYPERFLOW = "direct", "hyperflow"

#: The cost of a method whose cost was not measured.
NO_COST: dict[str, Any] = dict.fromkeys(field.name for field in fields(TaskCost))

#: The method that was run, by the name that its tuned features have in the adapter's head.
TUNED_METHODS = {method.head_name: method.name for method in METHODS if method.head_name is not None}


def group_by(records: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Records by their key, in the order in which the keys come first."""
    groups: dict[K, list[T]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


class EpisodeTable:
    """The rows of a benchmark by domain, number of shots and method."""

    def __init__(self, rows: Iterable[EpisodeResult]):
        self._rows = group_by(rows, lambda row: (row.domain, row.n_shot, row.method))

    def rows(self, domain: str, n_shot: int | None, method: str) -> list[EpisodeResult]:
        return self._rows.get((domain, n_shot, method), [])

    def accuracies(self, domain: str, n_shot: int | None, method: str) -> Measured:
        """Accuracies in %."""
        return {row.index: row.accuracy for row in self.rows(domain, n_shot, method)}

    def log_losses(self, domain: str, n_shot: int | None, method: str) -> Measured:
        """Log losses in nats; none of a method without probabilities."""
        return {row.index: row.log_loss for row in self.rows(domain, n_shot, method) if row.log_loss is not None}

    def groups(self) -> list[tuple[str, int | None]]:
        """Domain and number of shots of all that was run: fewest shots first, then by the domain's name."""
        groups = {(domain, n_shot) for domain, n_shot, _ in self._rows}
        return sorted(groups, key=lambda group: (group[1] or 0, group[0]))


def summarise(rows: Sequence[EpisodeResult], costs: Mapping[CostKey, TaskCost]) -> Results:
    """The results of the rows of an `EpisodeLog`, with the costs that are known by `build_cost_key`."""
    table = EpisodeTable(rows)
    records: list[Record] = []
    against: list[AgainstRecord] = []
    for domain, n_shot in table.groups():
        hyperflow = table.accuracies(domain, n_shot, HYPERFLOW)
        for method in list_labels():
            method_rows = table.rows(domain, n_shot, method)
            if not method_rows:
                continue
            records.append(_summarise_method(table, method_rows, costs.get(build_cost_key(method_rows))))
            if hyperflow and method != HYPERFLOW:
                difference = _compare(hyperflow, table.accuracies(domain, n_shot, method))
                against.append(_build_against(domain, n_shot, method, difference))
    return Results(
        records=records,
        means=_average(records),
        hyperflow_against=[*against, *_average_against(against)],
        flow=_summarise_flow(table),
    )


def _build_against(domain: str, n_shot: int | None, method: str, difference: Estimate) -> AgainstRecord:
    return AgainstRecord(
        method=method,
        domain=domain,
        n_shot=n_shot,
        n_episodes=difference.n_episodes or 0,
        diff=difference.mean,
        diff_ci95=difference.ci95,
    )


def build_cost_key(rows: Sequence[EpisodeResult]) -> CostKey:
    """What the cost of a method's episodes depends on; medians where the episodes differ.

    The cost of fine-tuning does not depend on the head that its features are classified in.
    """
    method = rows[0].method
    n_way = statistics.median_low(row.n_way for row in rows)
    n_support = statistics.median_low(row.n_support for row in rows)
    return CostKey(TUNED_METHODS.get(method, method), n_way, n_support)


def average_over_domains(values: Sequence[float], half_widths: Sequence[float | None]) -> tuple[float, float | None]:
    """Mean over domains and its half-width, None if one has none.

    Domains are taken as given and episodes as drawn, so that variances add up.
    """
    mean = round(float(np.mean(values)), 4)
    squares = 0.0
    for half_width in half_widths:
        if half_width is None:
            return mean, None
        squares += half_width**2
    return mean, round(float(np.sqrt(squares)) / len(half_widths), 4)


def average_estimates(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of the domains' estimates, of all their episodes; no estimate if a domain has none."""
    means, half_widths, n_episodes = [], [], 0
    for estimate in estimates:
        if estimate.mean is None:
            return NO_ESTIMATE
        means.append(estimate.mean)
        half_widths.append(estimate.ci95)
        n_episodes += estimate.n_episodes or 0
    return Estimate(*average_over_domains(means, half_widths), n_episodes)


def _summarise_method(table: EpisodeTable, rows: list[EpisodeResult], cost: TaskCost | None) -> Record:
    """The record of a method's rows of one domain and number of shots."""
    domain, n_shot, method = rows[0].domain, rows[0].n_shot, rows[0].method
    accuracy = _estimate([row.accuracy for row in rows])
    difference = _compare_with_direct(table.accuracies, domain, n_shot, method)
    log_loss = _estimate(list(table.log_losses(domain, n_shot, method).values()))
    log_loss_difference = _compare_with_direct(table.log_losses, domain, n_shot, method)
    assert accuracy.mean is not None
    measured_cost = NO_COST if cost is None else asdict(cost)
    return Record(
        method=method,
        domain=domain,
        n_way=_common_value([row.n_way for row in rows]),
        n_shot=n_shot,
        n_episodes=len(rows),
        accuracy=accuracy.mean,
        ci95=accuracy.ci95,
        diff_vs_direct=difference.mean,
        diff_ci95=difference.ci95,
        diff_n_episodes=difference.n_episodes,
        log_loss=log_loss.mean,
        log_loss_ci95=log_loss.ci95,
        log_loss_vs_direct=log_loss_difference.mean,
        log_loss_vs_direct_ci95=log_loss_difference.ci95,
        ece=_pool_ece(rows),
        **measured_cost,
    )


def _pool_ece(rows: list[EpisodeResult]) -> float | None:
    gaps = [row.confidence_gaps for row in rows if row.confidence_gaps is not None]
    return round(compute_ece(gaps), 4) if gaps else None


def _common_value(values: list[int]) -> float:
    """The one value, or the mean of several."""
    if len(set(values)) == 1:
        return values[0]
    return round(statistics.mean(values), 2)


def _estimate(values: list[float]) -> Estimate:
    if not values:
        return Estimate(None, None, 0)
    mean, half_width = mean_ci95(values)
    ci95 = None if np.isnan(half_width) else round(half_width, 4)  # JSON has no NaN
    return Estimate(round(mean, 4), ci95, len(values))


def _compare(measured: Measured, others: Measured) -> Estimate:
    """The mean difference on the episodes of both."""
    indices = sorted(measured.keys() & others.keys())
    return _estimate([measured[index] - others[index] for index in indices])


def _compare_with_direct(
    get_measured: Callable[[str, int | None, str], Measured], domain: str, n_shot: int | None, method: str
) -> Estimate:
    direct = get_measured(domain, n_shot, REFERENCE)
    if not direct or method == REFERENCE:
        return NO_ESTIMATE
    return _compare(get_measured(domain, n_shot, method), direct)


def _average(records: list[Record]) -> list[MeanRecord]:
    """The mean over domains for every number of shots and method."""
    means = []
    for (n_shot, method), group in group_by(records, lambda record: (record.n_shot, record.method)).items():
        accuracies, differences, log_losses, log_loss_differences = [], [], [], []
        for record in group:
            accuracies.append(Estimate(record.accuracy, record.ci95, record.n_episodes))
            differences.append(Estimate(record.diff_vs_direct, record.diff_ci95, record.diff_n_episodes))
            log_losses.append(Estimate(record.log_loss, record.log_loss_ci95, None))
            log_loss_differences.append(Estimate(record.log_loss_vs_direct, record.log_loss_vs_direct_ci95, None))
        accuracy, difference = average_estimates(accuracies), average_estimates(differences)
        log_loss, log_loss_difference = average_estimates(log_losses), average_estimates(log_loss_differences)
        assert accuracy.mean is not None
        mean = MeanRecord(
            method=method,
            n_shot=n_shot,
            n_domains=len(group),
            n_episodes=accuracy.n_episodes or 0,
            accuracy=accuracy.mean,
            ci95=accuracy.ci95,
            diff_vs_direct=difference.mean,
            diff_ci95=difference.ci95,
            diff_n_episodes=difference.n_episodes,
            log_loss=log_loss.mean,
            log_loss_ci95=log_loss.ci95,
            log_loss_vs_direct=log_loss_difference.mean,
            log_loss_vs_direct_ci95=log_loss_difference.ci95,
            ece=_mean_ece(group),
        )
        means.append(mean)
    return means


def _mean_ece(records: list[Record]) -> float | None:
    errors = [record.ece for record in records if record.ece is not None]
    return round(statistics.mean(errors), 4) if errors else None


def _average_against(records: list[AgainstRecord]) -> list[MeanAgainstRecord]:
    """The mean over the domains that have common episodes."""
    comparable = [record for record in records if record.diff is not None]
    means = []
    for (n_shot, method), group in group_by(comparable, lambda record: (record.n_shot, record.method)).items():
        estimates = [Estimate(record.diff, record.diff_ci95, record.n_episodes) for record in group]
        difference = average_estimates(estimates)
        assert difference.mean is not None
        mean = MeanAgainstRecord(
            method=method,
            domain=None,
            n_shot=n_shot,
            n_domains=len(group),
            n_episodes=difference.n_episodes or 0,
            diff=difference.mean,
            diff_ci95=difference.ci95,
        )
        means.append(mean)
    return means


def _summarise_flow(table: EpisodeTable) -> list[FlowRecord]:
    """The points of the flow on domains where direct transfer was run, too."""
    records = []
    for domain, n_shot in table.groups():
        for point in FLOW_POINTS:
            if table.rows(domain, n_shot, point.name) and table.rows(domain, n_shot, REFERENCE):
                records.append(_summarise_point(table, domain, n_shot, point))
    return sorted(records, key=lambda r: (r.along, r.n_shot or 0, r.domain, r.value))


def _summarise_point(table: EpisodeTable, domain: str, n_shot: int | None, point: HyperFlow) -> FlowRecord:
    accuracies = table.accuracies(domain, n_shot, point.name)
    accuracy = _estimate(list(accuracies.values()))
    difference = _compare_with_direct(table.accuracies, domain, n_shot, point.name)
    from_hyperflow = _compare(accuracies, table.accuracies(domain, n_shot, HYPERFLOW))
    along, value = _locate(point)
    assert accuracy.mean is not None
    return FlowRecord(
        domain=domain,
        n_shot=n_shot,
        along=along,
        value=value,
        n_episodes=len(accuracies),
        accuracy=accuracy.mean,
        ci95=accuracy.ci95,
        diff_vs_direct=difference.mean,
        diff_ci95=difference.ci95,
        diff_n_episodes=difference.n_episodes,
        diff_vs_hyperflow=from_hyperflow.mean,
        diff_vs_hyperflow_ci95=from_hyperflow.ci95,
    )


def _locate(point: HyperFlow) -> tuple[str, float]:
    """What a point of the flow differs in from HyperFlow as it is, and its value."""
    if point.end_time is not None:
        return "t", point.end_time
    assert point.n_steps is not None
    return "steps", float(point.n_steps)
