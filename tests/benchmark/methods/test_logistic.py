from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression as Regression

from hf_hyperflow.benchmark.methods import LogisticRegression
from hf_hyperflow.data.domains import normalise
from hf_hyperflow.data.episodes import cdfsl_episode


def test_it_is_a_regression_on_unit_features(backbone, target, colours, episode):
    support, queries = colours.images[episode.support], colours.images[episode.query]
    classifier = LogisticRegression(c=2.0).fit(target.support(support, episode.support_labels))
    with torch.no_grad():
        pixels = normalise(torch.cat([support, queries]), target.processor)
        unit = F.normalize(backbone(pixels).last_hidden_state[:, 0], dim=1).numpy()
    expected = Regression(C=2.0, max_iter=1000).fit(unit[:10], episode.support_labels.numpy())
    assert classifier.regression.coef_ == pytest.approx(expected.coef_, abs=1e-4)
    probabilities = torch.from_numpy(expected.predict_proba(unit[10:]))
    predicted = classifier.predict(target.images(queries))
    chosen = probabilities.gather(1, predicted.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(chosen, probabilities.amax(dim=1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n_way", [2, 5])
def test_its_probabilities_are_those_of_scikit_learn(target, colours, n_way):
    episode = cdfsl_episode(colours, 0, n_way=n_way, n_shot=2, n_query=6)
    classifier = LogisticRegression().fit(target.support(colours.images[episode.support], episode.support_labels))
    queries = target.images(colours.images[episode.query])
    unit = F.normalize(queries.final_features, dim=-1).numpy()
    expected = classifier.regression.predict_proba(unit)
    predictions = classifier.classify(queries)
    assert predictions.log_probabilities.exp().numpy() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(predictions.labels, predictions.log_probabilities.argmax(-1))


def test_scikit_learn_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r'pip install "hf-hyperflow\[benchmark\]"'):
        LogisticRegression().require_packages()
