from __future__ import annotations

import doctest
import math

import numpy as np
import pytest

from hf_hyperflow.benchmark.evaluation import mean_ci95
from tests.helpers.benchmark_runs import ROOT

evaluate_metric = pytest.importorskip("hf_hyperflow.benchmark.evaluate_metric")
FewShotAccuracy = evaluate_metric.FewShotAccuracy


@pytest.fixture
def metric(tmp_path):
    return FewShotAccuracy(cache_dir=str(tmp_path))


def made(n_episodes: int, share: float, seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Predictions that are right with a probability of about `share`, and references, of episodes of many lengths."""
    generator = np.random.default_rng(seed)
    references = [generator.integers(0, 5, generator.integers(5, 40)) for _ in range(n_episodes)]
    predictions = [np.where(generator.random(len(r)) < share, r, (r + 1) % 5) for r in references]
    return [p.tolist() for p in predictions], [r.tolist() for r in references]


def test_mean_and_interval_over_episodes(metric):
    predictions, references = made(50, 0.7)
    found = metric.compute(predictions=predictions, references=references)
    each = [100 * np.mean(np.array(p) == np.array(r)) for p, r in zip(predictions, references, strict=True)]
    assert (found["accuracy"], found["ci95"]) == pytest.approx(mean_ci95(np.array(each)))
    assert found["n_episodes"] == 50
    assert set(found) == {"accuracy", "ci95", "n_episodes"}
    whole = 100 * np.mean(np.concatenate(predictions) == np.concatenate(references))
    assert found["accuracy"] != pytest.approx(whole, abs=1e-6)  # every episode counts the same, not every query


def test_the_difference_is_paired(metric):
    predictions, references = made(40, 0.6)
    better = [[r[0], *p[1:]] for p, r in zip(predictions, references, strict=True)]
    found = metric.compute(predictions=better, references=references, baseline=predictions)
    plain = metric.compute(predictions=predictions, references=references)
    assert found["baseline_accuracy"] == pytest.approx(plain["accuracy"])
    assert found["difference"] == pytest.approx(found["accuracy"] - plain["accuracy"])
    assert found["difference"] > 0
    assert found["difference_ci95"] < found["ci95"] / 3
    same = metric.compute(predictions=predictions, references=references, baseline=predictions)
    assert same["difference"] == same["difference_ci95"] == 0


def test_episode_by_episode_and_in_batches(metric):
    predictions, references = made(6, 0.5)
    expected = metric.compute(predictions=predictions, references=references)
    metric.add(prediction=predictions[0], reference=references[0])
    metric.add_batch(predictions=predictions[1:], references=references[1:])
    assert metric.compute() == expected


def test_a_single_episode_has_no_interval(metric):
    found = metric.compute(predictions=[[1, 2]], references=[[1, 0]])
    assert found["accuracy"] == 50
    assert math.isnan(found["ci95"])


def test_what_does_not_fit_is_named(metric):
    with pytest.raises(ValueError, match="episode 1 has 1 predictions and 2 references"):
        metric.compute(predictions=[[1, 2], [1]], references=[[1, 0], [1, 1]])
    with pytest.raises(ValueError, match="episode 0 has 0 predictions and 0 references"):
        metric.compute(predictions=[[], [1]], references=[[], [1]])
    with pytest.raises(ValueError, match="the baseline has 1 episodes, the references have 2"):
        metric.compute(predictions=[[1], [1]], references=[[1], [1]], baseline=[[1]])
    with pytest.raises(ValueError, match="episode 0 has 2 baseline and 1 references"):
        metric.compute(predictions=[[1], [1]], references=[[1], [1]], baseline=[[1, 1], [1]])


@pytest.mark.parametrize("text", ["README", "metric"])
def test_examples_say_what_is_returned(text, tmp_path, monkeypatch):
    """Those of the README and of the metric's own description."""
    monkeypatch.setattr(evaluate_metric.evaluate.Metric, "_data_dir_root", str(tmp_path), raising=False)
    monkeypatch.setattr(evaluate_metric.evaluate.config, "HF_METRICS_CACHE", str(tmp_path))
    content = (ROOT / "README.md").read_text() if text == "README" else evaluate_metric._INPUTS
    examples = doctest.DocTestParser().get_doctest(content, {}, text, text, 0)
    assert examples.examples
    assert doctest.DocTestRunner().run(examples).failed == 0
