from __future__ import annotations

import math

import pytest
import torch

from hf_hyperflow import AdaptedTask
from hf_hyperflow.modeling.calibration import measure_task
from hf_hyperflow.modeling.rejection import NONE_OF_THESE, Rejection, RejectionCalibration, compute_log_odds
from tests.helpers.tiny import pictures

CALIBRATION = {"constant": -1.0, "ways": 0.2, "shots": 0.1, "spread": 0.3, "odds": 0.5, "distance": -2.0}


def test_probability_of_being_known():
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.1, 0.0]])
    scores = logits.softmax(1).max(1).values
    log_odds = torch.log(scores / (1 - scores))
    expected = torch.sigmoid(-1 + 0.5 * log_odds + 2 * logits.max(1).values / 4)
    torch.testing.assert_close(Rejection(-1, 0.5, 2).compute_known(logits, 4.0), expected)


def test_a_certain_score_is_finite():
    known = Rejection(0, 1, 1).compute_known(torch.tensor([[1e30, -1e30], [-1e30, 1e30]]), 1e30)
    assert known.isfinite().all()


def test_rejection_of_a_task():
    features, labels = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 1, 1, 2, 2])
    measures = measure_task(features, labels)
    rejection = RejectionCalibration(**CALIBRATION).fit_task(features, labels)
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    distances = (1 - logits.max(1).values / 4) / math.exp(measures.spread)
    expected = -1 + 0.2 * measures.ways + 0.1 * measures.shots + 0.3 * measures.spread
    expected = expected + 0.5 * compute_log_odds(logits) - 2 * distances
    torch.testing.assert_close(rejection.compute_known(logits, 4.0), torch.sigmoid(expected))


@pytest.fixture
def rejecting(adapter, backbone, pixels):
    """A task and as many pixel values as it takes; half of them are of no class, by its own measure."""
    adapter.config.rejection = CALIBRATION
    task = adapter.adapt(backbone, pictures())
    middle = torch.logit(task.known_scores(pixels)).median().item()
    adapter.config.rejection = {**CALIBRATION, "constant": CALIBRATION["constant"] - middle}
    return adapter.adapt(backbone, pictures()), pixels


def test_images_of_none_of_the_classes(rejecting):
    task, pixels = rejecting
    known = task.known_scores(pixels)
    assert known.shape == (len(pixels),)
    is_rejected = (known < 0.5).tolist()
    assert 0 < sum(is_rejected) < len(pixels)
    expected = []
    for label, rejected in zip(task.predict(pixels), is_rejected, strict=True):
        expected.append(NONE_OF_THESE if rejected else label)
    assert task.predict(pixels, reject=True) == expected
    answers = task(pixels, reject=True)
    assert [answer[0]["label"] for answer in answers] == expected
    for answer, probability, rejected in zip(answers, known.tolist(), is_rejected, strict=True):
        if rejected:
            assert answer == [{"label": NONE_OF_THESE, "score": pytest.approx(1 - probability)}]
        else:
            assert len(answer) == 3
    assert task.known_scores(pixels[0]).shape == ()
    assert task.predict(pixels[0], reject=True) == expected[0]


def test_a_saved_task_rejects_the_same(rejecting, backbone, tmp_path):
    task, pixels = rejecting
    task.save_pretrained(tmp_path / "task")
    loaded = AdaptedTask.from_pretrained(tmp_path / "task", backbone)
    torch.testing.assert_close(loaded.known_scores(pixels), task.known_scores(pixels))


def test_a_task_without_rejection_says_so(adapter, backbone, pixels, tmp_path):
    task = adapter.adapt(backbone, pictures())
    task.save_pretrained(tmp_path / "task")
    for each in (
        task,
        AdaptedTask.from_pretrained(tmp_path / "task", backbone),
        adapter.direct_transfer(backbone, pictures()),
    ):
        assert each.rejection is None
        with pytest.raises(ValueError, match="cannot tell images of none of its classes"):
            each.predict(pixels, reject=True)
        with pytest.raises(ValueError, match="cannot tell"):
            each.known_scores(pixels)
        with pytest.raises(ValueError, match="cannot tell"):
            each(pixels, reject=True)


def test_a_task_of_the_largest_coefficients_can_be_loaded_again(adapter, backbone, tmp_path):
    adapter.config.rejection = dict.fromkeys(CALIBRATION, 1000.0) | {"distance": -1000.0}
    adapter.config.calibration = {"constant": 13.0, "ways": 0.0, "shots": 0.0, "spread": 0.0}
    task = adapter.adapt(backbone, pictures())
    task.save_pretrained(tmp_path / "task")
    assert AdaptedTask.from_pretrained(tmp_path / "task", backbone).scale == pytest.approx(task.scale)
