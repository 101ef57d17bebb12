"""Where a flow ends on different tasks: how much of the way is the same for all, and how much depends on the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class EndpointShares:
    """The parts of the mean squared way theta(1) - theta(0) of a flow, which add up to one.

    Attributes:
        mean: the displacement that all tasks share.
        between: the differences between the means of the domains.
        within: the differences between tasks of one domain.
    """

    mean: float
    between: float
    within: float

    @property
    def conditional(self) -> float:
        """The part that depends on the support set."""
        return self.between + self.within


@dataclass(frozen=True)
class DomainWays:
    """The ways of a flow on tasks of one domain, summed up.

    Attributes:
        mean: their mean, `(n_tokens, token_dim)`.
        mean_square: the mean of their squared lengths.
        n_tasks: how many there are.
    """

    mean: torch.Tensor
    mean_square: float
    n_tasks: int

    @classmethod
    def of(cls, ways: Sequence[torch.Tensor]) -> DomainWays:
        """Sum up ways theta(1) - theta(0), `(n_tokens, token_dim)` each, of at least one task."""
        stacked = torch.stack([way.double().cpu() for way in ways])
        return cls(stacked.mean(dim=0), stacked.square().sum(dim=(1, 2)).mean().item(), len(ways))


def share_endpoints(domains: Sequence[DomainWays]) -> EndpointShares:
    """Divide the mean squared way into its parts, every domain counting the same.

    The mean of few tasks differs from that of many by chance. This part of the differences between domains is counted
    as one within domains, as in an analysis of variance.

    Raises:
        ValueError: there are no two domains of two tasks, or the flow does not move.
    """
    if len(domains) < 2 or min(domain.n_tasks for domain in domains) < 2:
        raise ValueError("the parts of a flow's way need two domains of two tasks.")
    means = torch.stack([domain.mean for domain in domains])
    total, within, by_chance = 0.0, 0.0, 0.0
    for domain in domains:
        variance = domain.mean_square - domain.mean.square().sum().item()
        total += domain.mean_square / len(domains)
        within += variance * domain.n_tasks / (domain.n_tasks - 1) / len(domains)
        by_chance += variance / (domain.n_tasks - 1) / len(domains)
    if total == 0:
        raise ValueError("the flow does not move: its adapter is not trained.")
    differences = (means - means.mean(dim=0)).square().sum(dim=(1, 2))
    between = differences.sum().item() / (len(domains) - 1) - by_chance
    between = max(0.0, between)
    shared = max(0.0, total - between - within)
    sum_of_parts = shared + between + within
    return EndpointShares(shared / sum_of_parts, between / sum_of_parts, within / sum_of_parts)
