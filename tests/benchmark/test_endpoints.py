"""The parts of the way of a flow."""

from __future__ import annotations

import pytest
import torch

from hf_hyperflow.benchmark.endpoints import DomainWays, share_endpoints


def draw_ways(n_domains: int, n_tasks: int, mean: float, between: float, within: float) -> list[DomainWays]:
    """Ways of 400 numbers with known parts, each given as a standard deviation of every number."""
    generator = torch.Generator().manual_seed(0)
    domains = []
    for _ in range(n_domains):
        centre = mean + between * torch.randn(4, 100, generator=generator)
        domains.append(
            DomainWays.of([centre + within * torch.randn(4, 100, generator=generator) for _ in range(n_tasks)])
        )
    return domains


@pytest.mark.parametrize(("mean", "between", "within"), [(1, 2, 1), (3, 0, 1), (0, 1, 0), (0, 0, 1)])
def test_parts_are_those_that_the_ways_were_made_of(mean, between, within):
    shares = share_endpoints(draw_ways(40, 3, mean, between, within))
    total = mean**2 + between**2 + within**2
    assert shares.mean == pytest.approx(mean**2 / total, abs=0.03)
    assert shares.between == pytest.approx(between**2 / total, abs=0.03)
    assert shares.within == pytest.approx(within**2 / total, abs=0.03)
    assert shares.mean + shares.conditional == pytest.approx(1)


def test_differences_by_chance_do_not_count_as_differences_between_domains():
    """Two tasks a domain: their means differ although the domains do not."""
    assert share_endpoints(draw_ways(50, 2, 1, 0, 1)).between < 0.03


def test_a_flow_that_does_not_move_and_too_few_tasks_are_named():
    still = DomainWays.of([torch.zeros(2, 3), torch.zeros(2, 3)])
    with pytest.raises(ValueError, match="does not move"):
        share_endpoints([still, still])
    with pytest.raises(ValueError, match="two domains of two tasks"):
        share_endpoints([still])
    with pytest.raises(ValueError, match="two domains of two tasks"):
        share_endpoints([still, DomainWays.of([torch.ones(2, 3)])])
