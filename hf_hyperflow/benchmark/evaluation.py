"""Accuracy over episodes, quality of scores, means with 95 % intervals, and differences paired by episode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from ..data.domains import Domain
from ..data.episodes import Episode, cdfsl_episode
from ..modeling.adapter import HyperFlowAdapter
from ..modeling.trunks import eval_mode
from .domain_features import DomainFeatures
from .methods import DirectTransfer, HyperFlow, Method, NoFlow, Predictions, SharedWeights, Target
from .scores import measure_scores


def mean_ci95(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval, 1.96 s / sqrt(N) with ddof 1; NaN for a single value."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    return float(values.mean()), float(1.96 * values.std(ddof=1) / np.sqrt(len(values)))


def label_accuracy(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    """Accuracy in % of predicted labels `(n,)`."""
    return 100 * (predicted.cpu() == labels.cpu()).float().mean().item()


@dataclass(frozen=True)
class Outcome:
    """How well the queries of an episode were classified.

    Attributes:
        accuracy: in %.
        log_loss, confidence_gaps: see `ScoreQuality`; None for classifiers without probabilities.
    """

    accuracy: float
    log_loss: float | None = None
    confidence_gaps: tuple[float, ...] | None = None


def judge(predictions: Predictions, labels: torch.Tensor) -> Outcome:
    """Compare predictions with true labels `(n,)`."""
    accuracy = label_accuracy(predictions.labels, labels)
    if predictions.log_probabilities is None:
        return Outcome(accuracy)
    quality = measure_scores(predictions.log_probabilities, predictions.labels, labels)
    return Outcome(accuracy, quality.log_loss, quality.confidence_gaps)


def evaluate_method(method: Method, features: DomainFeatures, episode: Episode) -> dict[str, Outcome]:
    """What a method reaches on an episode's queries, by name.

    A method that also has its features classified in the adapter's head has a second name, its `head_name`.

    Args:
        features: of the episode's domain.
    """
    target, queries = features.target, features.queries(episode)
    with eval_mode(target.backbone), eval_mode(target.adapter):
        classifier = method.fit(features.support(episode))
        outcomes = {method.name: judge(classifier.classify(queries), episode.query_labels)}
        if method.head_name is not None and classifier.in_head is not None:
            outcomes[method.head_name] = judge(classifier.in_head.classify(queries), episode.query_labels)
    return outcomes


@dataclass(frozen=True)
class Comparison:
    """Accuracies in % on the same episodes, `(n_episodes,)` each: of direct transfer, of the adapter's head without
    the flow, of HyperFlow, and of the same weights for all tasks, if these were given.
    """

    domain: str
    n_way: int
    n_shot: int
    direct: np.ndarray
    no_flow: np.ndarray
    adapted: np.ndarray
    shared: np.ndarray | None = None

    def summary(self) -> dict[str, float]:
        """Means, the paired difference, the part of it that is the flow's, and their 95 % half-widths, in points.

        `reading` is what the weights of the flow gain over the same weights for all tasks, if these were given.
        """
        columns = {
            "direct": self.direct,
            "no_flow": self.no_flow,
            "hyperflow": self.adapted,
            "difference": self.adapted - self.direct,
            "flow": self.adapted - self.no_flow,
        }
        if self.shared is not None:
            columns["reading"] = self.adapted - self.shared
        figures = {}
        for name, values in columns.items():
            mean, half_width = mean_ci95(values)
            figures[name] = round(mean, 2)
            figures[f"{name}_ci95"] = round(half_width, 2)
        return figures


def compare_flow(
    adapter: HyperFlowAdapter,
    backbone: PreTrainedModel,
    domain: Domain,
    *,
    n_episodes: int,
    n_shot: int,
    n_way: int = 5,
    n_query: int = 15,
    seed: int = 0,
    n_steps: int | None = None,
    shared_weights: torch.Tensor | None = None,
) -> Comparison:
    """Direct transfer against the flow on the same CD-FSL episodes of a domain.

    A domain with fewer classes than `n_way` is run with those it has. The backbone is left as it was; an adapter that
    was in it stays in.

    Args:
        shared_weights: weights of the adapter `(n_tokens, token_dim)` that every task is also tried with.

    Raises:
        ValueError: no episodes, or the domain has too few images for one.
    """
    if n_episodes < 1:
        raise ValueError(f"n_episodes must be at least 1, not {n_episodes}.")
    was_in = adapter.space.is_in(backbone)
    target = Target(backbone, adapter)
    features = DomainFeatures(target, domain)
    methods: list[Method] = [DirectTransfer(), NoFlow(), HyperFlow(n_steps=n_steps)]
    if shared_weights is not None:
        methods.append(SharedWeights(shared_weights))
    columns: list[list[float]] = [[] for _ in methods]
    try:
        for index in range(n_episodes):
            episode = cdfsl_episode(domain, index, n_way=n_way, n_shot=n_shot, n_query=n_query, seed=seed)
            for method, column in zip(methods, columns, strict=True):
                column.append(evaluate_method(method, features, episode)[method.name].accuracy)
    finally:
        if not was_in:
            target.unload()
    return Comparison(domain.name, episode.n_way, n_shot, *np.array(columns))
