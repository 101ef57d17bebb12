"""`calibrate.py`: the scale of the logits, and nothing else of an adapter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.training.calibration import best_logit_scale
from tests.helpers.tiny import tiny_adapter
from tests.helpers.training_runs import make_ground, run_here


def test_calibrate_moves_the_scale_alone(tmp_path):
    ground = make_ground(tmp_path)
    processor = AutoImageProcessor.from_pretrained(ground / "backbone", backend="pil")
    backbone = AutoModel.from_pretrained(ground / "backbone")
    tiny_adapter(backbone, processor=processor).save_pretrained(ground / "adapter")
    before = load_file(ground / "adapter" / "model.safetensors")
    common = ["--backbone", ground / "backbone", "--adapter", ground / "adapter", "--dataset", ground / "beta"]
    done = run_here("calibrate", *common, "--n_episodes", 3)
    assert done.exitcode == 0, done.output
    after = load_file(ground / "adapter" / "model.safetensors")
    assert {name for name in before if not torch.equal(before[name].half(), after[name].half())} == {"logit_scale"}
    printed = float(done.output.split("->")[1])
    assert after["logit_scale"].float().exp().item() == pytest.approx(printed, rel=0.01)
    HyperFlowAdapter.from_pretrained(ground / "adapter")  # its digest is the new one


def test_best_scale_is_that_of_the_probabilities():
    """Labels drawn from the softmax of known logits: the scale that is found is the one they were drawn with."""
    generator = torch.Generator().manual_seed(0)
    cosines = torch.rand(20_000, 5, generator=generator)
    labels = torch.multinomial((8 * cosines).softmax(dim=1), 1, generator=generator).flatten()
    scale = torch.tensor(best_logit_scale(cosines, labels)).exp()
    assert scale.item() == pytest.approx(8, rel=0.05)
    best = F.cross_entropy(scale * cosines, labels)
    assert best < F.cross_entropy(1.2 * scale * cosines, labels)
    assert best < F.cross_entropy(scale / 1.2 * cosines, labels)
