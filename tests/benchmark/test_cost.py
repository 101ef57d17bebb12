from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_hyperflow.benchmark.cost import count_flops


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
