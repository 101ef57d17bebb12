from __future__ import annotations

import json

import pytest

from hf_hyperflow.benchmark.hyperparameters import read_hyperparameters, with_hyperparameters
from hf_hyperflow.benchmark.methods import METHODS, find_methods


def test_defaults_and_what_a_file_changes(tmp_path):
    assert with_hyperparameters(METHODS, read_hyperparameters(None)) == list(METHODS)
    path = tmp_path / "hyperparameters.json"
    values = {"bias": {"steps": 7, "learning_rate": 0.02}, "logistic": {"c": 3.0}}
    path.write_text(json.dumps({"hyperparameters": values}))
    methods = with_hyperparameters(find_methods("bias,logistic,full,direct"), read_hyperparameters(path))
    bias, logistic, *others = methods
    assert (bias.steps, bias.learning_rate) == (7, 0.02)
    assert logistic.c == 3.0
    assert others == find_methods("full,direct")


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
