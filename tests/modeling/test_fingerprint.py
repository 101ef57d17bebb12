from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_hyperflow import IncompatibleBackboneError
from hf_hyperflow.modeling.fingerprint import compute_fingerprint, fingerprints_match
from tests.helpers.tiny import scrambled, tiny_dinov2, tiny_resnet


def test_one_number_per_block_is_the_mean_of_its_vectors(backbone):
    fingerprint = compute_fingerprint(backbone)
    assert len(fingerprint) == 4
    vectors = [p.abs().mean() for p in backbone.encoder.layer[2].parameters() if p.ndim == 1]
    assert fingerprint[2] == pytest.approx(torch.stack(vectors).mean().item(), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_same_weights_match_in_any_precision(dtype):
    expected = compute_fingerprint(tiny_dinov2())
    assert fingerprints_match(expected, compute_fingerprint(tiny_dinov2().to(dtype)))


def test_other_weights_and_depths_do_not_match(backbone):
    expected = compute_fingerprint(backbone)
    assert not fingerprints_match(expected, compute_fingerprint(tiny_dinov2(seed=9)))
    assert not fingerprints_match(expected, expected[:-1])
    assert not fingerprints_match(expected, [*expected[:-1], 1.02 * expected[-1]])
    assert fingerprints_match(expected, [*expected[:-1], 1.002 * expected[-1]])


def test_the_stages_of_a_convolutional_network_have_fingerprints():
    """Its blocks have vectors in their batch norms alone."""
    model = tiny_resnet()
    expected = compute_fingerprint(model)
    assert len(expected) == 2
    scrambled(model)
    assert not fingerprints_match(expected, compute_fingerprint(model))


def test_a_model_without_blocks():
    with pytest.raises(IncompatibleBackboneError, match="Linear is not a model of transformers"):
        compute_fingerprint(nn.Linear(3, 3))
