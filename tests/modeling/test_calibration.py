from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.modeling.calibration import Calibration, measure_task
from hf_hyperflow.modeling.finite import NotFiniteError
from hf_hyperflow.modeling.saving import CheckpointError
from tests.helpers.tiny import pictures

LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 2])
COEFFICIENTS = {"constant": 2.0, "ways": 0.3, "shots": 0.5, "spread": -1.0}


@pytest.fixture
def features():
    return torch.randn(7, 16, generator=torch.Generator().manual_seed(0))


def test_measures_of_a_task(features):
    units = F.normalize(features, dim=1)
    distances = torch.cdist(units, units).square()
    pairs = []
    for first, second in ((0, 1), (0, 2), (1, 2)):
        pairs.append(distances[first == LABELS][:, second == LABELS].mean())
    measures = measure_task(features, LABELS)
    assert measures.ways == pytest.approx(math.log(3 / 5))
    assert measures.shots == pytest.approx(math.log(3 / (1 / 4 + 1 / 2 + 1)))
    assert measures.spread == pytest.approx(math.log(torch.stack(pairs).mean().item() / 2), rel=1e-4)


def test_scale(features):
    measures = measure_task(features, LABELS)
    expected = math.exp(2 + 0.3 * measures.ways + 0.5 * measures.shots - measures.spread)
    assert Calibration(**COEFFICIENTS).compute_scale(features, LABELS) == pytest.approx(expected)
    assert Calibration(math.log(7)).compute_scale(features, LABELS) == pytest.approx(7)


def test_images_that_hardly_differ_do_not_make_certain_scores(features):
    """The scale grows as the spread gets smaller, but not without end."""
    calibration = Calibration(**COEFFICIENTS)
    scales = [calibration.compute_scale(torch.ones(7, 16) + noise * features, LABELS) for noise in (1, 0.1, 0.01, 0)]
    assert scales[0] < scales[1] == pytest.approx(scales[2]) == pytest.approx(scales[3])


@pytest.mark.parametrize("constant", [1e4, -1e4, math.inf, math.nan])
def test_a_scale_that_is_not_finite(features, constant):
    with pytest.raises(NotFiniteError, match="makes a scale of"):
        Calibration(constant).compute_scale(features, LABELS)


def test_a_calibrated_adapter(adapter, backbone, pixels, tmp_path):
    plain = adapter.adapt(backbone, pictures())
    cosines = plain.logits(pixels) / plain.scale
    adapter.config.calibration = COEFFICIENTS
    adapter.save_pretrained(tmp_path)
    loaded = HyperFlowAdapter.from_pretrained(tmp_path).eval()
    task = loaded.adapt(backbone, pictures())
    assert task.scale == pytest.approx(adapter.adapt(backbone, pictures()).scale)
    assert abs(task.scale - plain.scale) > 0.1
    torch.testing.assert_close(task.logits(pixels), task.scale * cosines, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("calibration", {**COEFFICIENTS, "ways": "0.3"}, "calibration.ways"),
        ("calibration", {**COEFFICIENTS, "ways": 1e9}, "calibration.ways"),
        ("calibration", {"constant": 2.0}, "calibration"),
        ("calibration", {**COEFFICIENTS, "more": 1.0}, "calibration.more"),
        ("calibration", [1.0, 2.0], "calibration"),
        ("rejection", COEFFICIENTS, "rejection"),
        ("rejection", 3, "rejection"),
        ("views", 5, "views"),
        ("views", 0, "views"),
    ],
)
def test_settings_that_are_refused(adapter, tmp_path, field, value, message):
    setattr(adapter.config, field, value)
    adapter.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        HyperFlowAdapter.from_pretrained(tmp_path)
