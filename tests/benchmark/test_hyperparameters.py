from __future__ import annotations

import json

import pytest

from hf_hyperflow.benchmark.hyperparameters import read_hyperparameters, with_hyperparameters
from hf_hyperflow.benchmark.methods import METHODS, NoFlow, find_methods

BIAS = {"steps": 7, "learning_rate": 0.02}


def test_defaults_and_what_a_file_changes(tmp_path):
    assert with_hyperparameters(METHODS, read_hyperparameters(None)) == list(METHODS)
    path = tmp_path / "hyperparameters.json"
    values = {"bias": BIAS, "logistic": {"c": 3.0}}
    path.write_text(json.dumps({"hyperparameters": values}))
    methods = with_hyperparameters(find_methods("bias,logistic,full,direct"), read_hyperparameters(path))
    assert methods[0].scale == 10
    bias, logistic, *others = methods
    assert (bias.steps, bias.learning_rate) == (7, 0.02)
    assert logistic.c == 3.0
    assert others == find_methods("full,direct")


def test_fine_tuning_has_the_scale_of_direct_transfer(tmp_path):
    path = tmp_path / "hyperparameters.json"
    path.write_text(json.dumps({"hyperparameters": {"direct": {"scale": 28.0}, "bias": BIAS}}))
    for names in ("direct,bias,no-flow", "bias,no-flow"):
        *scaled, no_flow = with_hyperparameters(find_methods(names), read_hyperparameters(path))
        assert {method.scale for method in scaled} == {28.0}
        assert no_flow == NoFlow()
    assert scaled[0].hyperparameters() == BIAS


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "[]",
        "{}",
        '{"hyperparameters": {"magic": {"steps": 3}}}',
        '{"hyperparameters": {"direct": {}}}',
        '{"hyperparameters": {"bias": {"steps": 3}}}',
        '{"hyperparameters": {"bias": {"steps": 0, "learning_rate": 0.1}}}',
        '{"hyperparameters": {"logistic": {"c": "many"}}}',
        '{"hyperparameters": {"logistic": 3}}',
    ],
)
def test_other_files_are_named(tmp_path, content):
    path = tmp_path / "hyperparameters.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"hyperparameters\.json is not the result"):
        read_hyperparameters(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json is not there"):
        read_hyperparameters(tmp_path / "nowhere.json")
