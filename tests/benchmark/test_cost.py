from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F

from hf_hyperflow.benchmark.cost import MAX_ROUNDS, Work, count_flops, measure_in_turn


@pytest.mark.parametrize("trained", [False, True])
def test_attention_counts(trained):
    """Two matrix products of 2 * 3 * 7 * 7 * 4 operations each; five in the backward pass, which does one again."""
    x = torch.randn(2, 3, 7, 4, requires_grad=trained)

    def attend() -> None:
        y = F.scaled_dot_product_attention(x, x, x)
        if trained:
            y.sum().backward()

    product = 2 * 2 * 3 * 7 * 7 * 4
    assert count_flops(attend) == product * (2 + 5 * trained)


def test_products_count_two_a_multiplication():
    x = torch.randn(5, 7)
    assert count_flops(lambda: x @ x.T) == 2 * 5 * 5 * 7
    assert count_flops(lambda: x + 1) == 0


def test_works_take_turns():
    """Every run has its preparation before it, outside of the clock; slow runs do not stand for the median."""
    done = []

    def run_slowly_at_first() -> None:
        time.sleep(0.2 * ("a" not in done))
        done.append("a")

    works = {
        "a": Work(run_slowly_at_first, lambda: done.append("before a")),
        "b": Work(lambda: done.append("b"), lambda: time.sleep(0.01)),
    }
    costs = measure_in_turn(works)
    assert done == ["before a", "a", "b"] * (1 + MAX_ROUNDS)
    assert 0 < costs["a"].seconds < 0.2
    assert 0 < costs["b"].seconds < 0.01
    assert costs["a"].peak_memory_mb >= 0
