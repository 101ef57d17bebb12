"""Validation of an adapter in training, on domains that it is not trained on: what it gains, and whether it reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from ..benchmark.domain_features import DomainFeatures
from ..benchmark.endpoints import DomainWays, EndpointShares, share_endpoints
from ..benchmark.evaluation import compare_flow
from ..benchmark.methods import HyperFlow, Target
from ..data.domains import Domain
from ..data.episodes import cdfsl_episode
from ..modeling.adapter import HyperFlowAdapter
from .objectives import EpisodeImages

#: Training tasks over which the weights are averaged that are the same for all tasks.
SHARED_TASKS = 24
#: Tasks of a validation domain whose ways are compared.
WAYS = 6


@dataclass(frozen=True)
class Validation:
    """What a validation found.

    Attributes:
        accuracies: by domain, see `Comparison.summary`.
        shares: the parts of the way of the flow; None with a single domain, or before the flow moves.
    """

    accuracies: dict[str, dict[str, float]]
    shares: EndpointShares | None


@torch.no_grad()
def average_weights(
    accelerator: Accelerator, adapter: HyperFlowAdapter, backbone: PreTrainedModel, episodes: Iterable[EpisodeImages]
) -> torch.Tensor:
    """The mean `(n_tokens, token_dim)` of the weights that the flow gives on tasks, over all processes.

    Args:
        episodes: this process's share of the tasks.
    """
    split = adapter.split(backbone)
    injection = adapter.space.inject(split.backbone)
    total = torch.zeros_like(injection.start)
    n_tasks = torch.zeros((), device=total.device)
    for episode in episodes:
        images = episode.pixel_values[: len(episode.support_labels)]
        total += adapter.follow(split, injection, images, episode.support_labels).theta.float()
        n_tasks += 1
    return accelerator.reduce(total) / accelerator.reduce(n_tasks)


@torch.no_grad()
def validate_on_domains(
    accelerator: Accelerator,
    adapter: HyperFlowAdapter,
    backbone: PreTrainedModel,
    domains: list[Domain],
    *,
    n_episodes: int,
    shared_weights: torch.Tensor,
) -> Validation:
    """Compare an adapter with direct transfer, and with the same weights for all tasks, on 5-way 5-shot episodes.

    The domains are dealt out to the processes. Every process gets the whole result.

    Args:
        shared_weights: `(n_tokens, token_dim)`, see `average_weights`.
    """
    results = []
    with accelerator.autocast():
        for domain in domains[accelerator.process_index :: accelerator.num_processes]:
            comparison = compare_flow(
                adapter, backbone, domain, n_episodes=n_episodes, n_shot=5, shared_weights=shared_weights
            )
            results.append((domain.name, comparison.summary(), _measure_ways(adapter, backbone, domain)))
    accuracies, ways = {}, {}
    for name, summary, domain_ways in gather_object(results):
        accuracies[name], ways[name] = summary, domain_ways
    in_order = [domain.name for domain in domains]
    shares = _share([ways[name] for name in in_order])
    return Validation({name: accuracies[name] for name in in_order}, shares)


def _measure_ways(adapter: HyperFlowAdapter, backbone: PreTrainedModel, domain: Domain) -> DomainWays:
    """The ways theta(1) - theta(0) of the flow on the first episodes of a domain."""
    target = Target(backbone, adapter)
    features = DomainFeatures(target, domain)
    start = adapter.space.inject(target.backbone).start
    ways = []
    for index in range(WAYS):
        support = features.support(cdfsl_episode(domain, index, n_way=5, n_shot=5))
        ways.append(HyperFlow().follow_flow(support).theta.float() - start)
    return DomainWays.of(ways)


def _share(ways: list[DomainWays]) -> EndpointShares | None:
    if len(ways) < 2 or all(domain.mean_square == 0 for domain in ways):
        return None
    return share_endpoints(ways)
