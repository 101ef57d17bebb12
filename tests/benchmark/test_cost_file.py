from __future__ import annotations

import pytest

from hf_hyperflow.benchmark.bench.measure import TaskCost
from hf_hyperflow.benchmark.cost_file import CostFile, CostKey
from hf_hyperflow.modeling.saving import CheckpointError


def test_a_cost_file_keeps_costs_of_every_device(tmp_path):
    key, cost = CostKey("direct", 5, 25), TaskCost(0.5, 2.0, 1000, 100)
    file = CostFile(tmp_path / "costs.json", "cpu")
    assert file.costs == {}
    file.add(key, cost)
    assert CostFile(tmp_path / "costs.json", "cpu").costs == {key: cost}
    text = (tmp_path / "costs.json").read_text().replace("CPU", "other machine")
    (tmp_path / "costs.json").write_text(text)
    file = CostFile(tmp_path / "costs.json", "cpu")
    assert file.costs == {}
    file.add(key, cost)
    assert (tmp_path / "costs.json").read_text().count("device") == 2


@pytest.mark.parametrize(
    ("content", "words"), [('[{"method": "direct"', "is damaged"), ('[{"a": 1}]', "is not the costs of a benchmark of")]
)
def test_damaged_costs_are_named(tmp_path, content, words):
    (tmp_path / "costs.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"costs\.json {words}"):
        CostFile(tmp_path / "costs.json", "cpu")
