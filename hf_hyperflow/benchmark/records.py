"""The records that the results of a benchmark consist of, as `results.json` holds them."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean over episodes with the half-width of its 95 % interval; None where no episodes, or too few, were run."""

    mean: float | None
    ci95: float | None
    n_episodes: int | None


NO_ESTIMATE = Estimate(None, None, None)


@dataclass(frozen=True)
class Record:
    """A method on a domain with a number of shots (None: variable). Accuracies are in %, differences in points.

    Attributes:
        n_way: the mean where episodes differ.
        diff_vs_direct, diff_ci95: minus direct transfer, paired on the `diff_n_episodes` episodes of both.
        log_loss, log_loss_ci95: mean over the episodes, in nats; None for methods without probabilities.
        log_loss_vs_direct, log_loss_vs_direct_ci95: minus that of direct transfer, paired in the same way.
        ece: expected calibration error of all queries together, 0 to 1, see `compute_ece`.
        seconds_per_task, peak_memory_mb, flops_per_task, flops_per_prediction: see `TaskCost`; None where not measured.
    """

    method: str
    domain: str
    n_way: float
    n_shot: int | None
    n_episodes: int
    accuracy: float
    ci95: float | None
    diff_vs_direct: float | None
    diff_ci95: float | None
    diff_n_episodes: int | None
    log_loss: float | None
    log_loss_ci95: float | None
    log_loss_vs_direct: float | None
    log_loss_vs_direct_ci95: float | None
    ece: float | None
    seconds_per_task: float | None
    peak_memory_mb: float | None
    flops_per_task: int | None
    flops_per_prediction: int | None


@dataclass(frozen=True)
class MeanRecord:
    """A method with a number of shots, every domain counting the same; numbers of episodes are sums.

    The fields are those of `Record`. `ece` is the mean of the domains' errors.
    """

    method: str
    n_shot: int | None
    n_domains: int
    n_episodes: int
    accuracy: float
    ci95: float | None
    diff_vs_direct: float | None
    diff_ci95: float | None
    diff_n_episodes: int | None
    log_loss: float | None
    log_loss_ci95: float | None
    log_loss_vs_direct: float | None
    log_loss_vs_direct_ci95: float | None
    ece: float | None


@dataclass(frozen=True)
class AgainstRecord:
    """HyperFlow minus a method on a domain, paired on the `n_episodes` episodes of both."""

    method: str
    domain: str
    n_shot: int | None
    n_episodes: int
    diff: float | None
    diff_ci95: float | None


@dataclass(frozen=True)
class MeanAgainstRecord:
    """HyperFlow minus a method, every domain counting the same; `domain` is None."""

    method: str
    domain: None
    n_shot: int | None
    n_domains: int
    n_episodes: int
    diff: float
    diff_ci95: float | None


@dataclass(frozen=True)
class FlowRecord:
    """A point of the flow on a domain.

    Attributes:
        along: "t", where `value` is the end of the flow, or "steps", where it is the number of steps to t = 1.
        diff_vs_hyperflow, diff_vs_hyperflow_ci95: minus HyperFlow as it is, on the episodes of both.
    """

    domain: str
    n_shot: int | None
    along: str
    value: float
    n_episodes: int
    accuracy: float
    ci95: float | None
    diff_vs_direct: float | None
    diff_ci95: float | None
    diff_n_episodes: int | None
    diff_vs_hyperflow: float | None
    diff_vs_hyperflow_ci95: float | None


@dataclass(frozen=True)
class Results:
    """The results of a benchmark.

    Attributes:
        records: one per method, domain and number of shots.
        means: one per method and number of shots.
        hyperflow_against: HyperFlow against every other method, by domain and as the mean over domains.
        flow: one per point of the flow, domain and number of shots.
    """

    records: list[Record]
    means: list[MeanRecord]
    hyperflow_against: list[AgainstRecord | MeanAgainstRecord]
    flow: list[FlowRecord]

    def to_json(self) -> dict[str, list[dict]]:
        return asdict(self)
