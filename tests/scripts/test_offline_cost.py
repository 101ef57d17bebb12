"""The bill: sums and break-evens worked out by hand."""

from __future__ import annotations

import json
import sys

import pytest

from hf_hyperflow.modeling.saving import write_json
from tests.helpers.training_runs import SCRIPTS
from training.card.offline_cost import bill, bill_markdown, break_even

CPU = {"device": "a CPU, 2 threads", "gpu": False, "processes": 1}


def training() -> dict:
    totals = {"rows": 100, "diverged": 1, "seconds": 360.0, "flops": 4_000_000_000_000, "bytes": 5_000_000}
    return {
        "arguments": {},
        "phases": {
            "matching": {"runs": 10, "seconds": 40.0, "flops": 1e12, "rows": 640, "episodes": 0},
            "task": {"runs": 20, "seconds": 600.0, "flops": 5e12, "rows": 0, "episodes": 80},
        },
        "trajectories": {"collections": [{"name": "rows", "hardware": CPU, "totals": totals}]},
        "hardware": CPU,
    }


def cost() -> dict:
    def row(seconds: float, flops: float) -> dict:
        return {"seconds": seconds, "flops": flops, "peak_memory_mb": 1.0}

    return {
        "hardware": CPU["device"],
        "70 px": {
            "direct": row(0.2, 1e10),
            "hyperflow ready": row(1.0, 2e10),
            "bias fine-tuning": row(26.0, 3e12 + 2e10),
            "full fine-tuning": row(1.0, 1e10),
        },
    }


@pytest.mark.parametrize(
    ("offline", "rival", "hyperflow", "tasks"),
    [(1000, 26, 1, 40), (1001, 26, 1, 41), (1000, 1, 1, None), (1000, 0.5, 1, None), (0, 2, 1, 0), (0.5, 2, 1, 1)],
)
def test_break_even(offline, rival, hyperflow, tasks):
    assert break_even(offline, rival, hyperflow) == tasks


def test_bill_adds_up():
    found = bill(training(), cost())
    assert found["total"] == {
        "seconds": 1000.0,
        "flops": 1e13,
        "episodes": 80,
        "trajectories": 99,
        "bytes": 5_000_000,
    }
    assert found["break_even"] == {
        "70 px": {
            "bias fine-tuning": {"seconds": 40, "flops": 4},
            "full fine-tuning": {"seconds": None, "flops": None},
        }
    }
    assert found["same_hardware"]


def test_processes_side_by_side_count_each():
    two = training() | {"hardware": CPU | {"processes": 2}}
    assert bill(two, cost())["total"]["seconds"] == 360 + 2 * 640


def test_backbone_is_listed_but_paid_by_nobody():
    """A record of an older version: seconds only, which began anew where the run was resumed."""
    history = [{"step": 0}, {"step": 10, "seconds": 100}, {"step": 20, "seconds": 210}, {"step": 30, "seconds": 90}]
    found = bill(training(), cost(), {"arguments": {}, "history": history})
    assert found["backbone"]["seconds"] == 300
    assert found["backbone"]["flops"] is None
    assert found["total"] == bill(training(), cost())["total"]
    phases = {"pretraining": {"runs": 3, "seconds": 7.0, "flops": 1e9, "images": 24}}
    counted = bill(training(), cost(), {"history": [], "phases": phases, "hardware": CPU})
    assert (counted["backbone"]["seconds"], counted["backbone"]["flops"]) == (7.0, 1e9)


def test_markdown_says_it_all():
    text = bill_markdown(bill(training(), cost(), {"history": [{"seconds": 7200}]}))
    assert "| pretraining the backbone | not recorded | 2.00 h | not recorded |" in text
    assert "| collecting rows | a CPU, 2 threads | 0.10 h | 4.0 T | 99 |  |" in text
    assert "**0.28 h** | **10.0 T** | 99 recorded | 80 |" in text
    assert "Stored trajectories: 5.0 MB." in text
    assert "| 70 px | bias fine-tuning | 26 s, 3,020 G | 1 s, 20 G | after 40 tasks | after 4 tasks |" in text
    assert "| 70 px | full fine-tuning | 1 s, 10 G | 1 s, 20 G | never | never |" in text
    assert "machine" not in text
    assert "image size" not in text


def test_other_hardware_per_task_is_said():
    text = bill_markdown(bill(training(), cost() | {"hardware": "a GPU"}))
    assert "those per task: a GPU" in text


def test_other_image_sizes_share_the_offline_cost():
    text = bill_markdown(bill(training(), cost() | {"224 px": cost()["70 px"]}))
    assert text.count("after 40 tasks") == 2
    assert "the image size the adapter was trained at" in text


def test_without_trajectories():
    found = bill(training() | {"trajectories": None}, cost())
    assert found["total"]["seconds"] == 640
    assert found["total"]["trajectories"] == found["total"]["bytes"] == 0


def test_files_that_say_too_little_are_named():
    with pytest.raises(ValueError, match="no `phases`"):
        bill({"arguments": {}, "history": []}, cost())
    with pytest.raises(ValueError, match="'hyperflow ready'"):
        bill(training(), {"hardware": "a CPU"})


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.delitem(sys.modules, "bill", raising=False)
    import bill as script

    (tmp_path / "adapter").mkdir()
    write_json(tmp_path / "adapter/training.json", training())
    write_json(tmp_path / "cost.json", cost())
    common = ["--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "bill.json")]
    script.main([*common, "--cost", str(tmp_path / "cost.json")])
    assert "after 40 tasks" in capsys.readouterr().out
    assert json.loads((tmp_path / "bill.json").read_text())["total"]["seconds"] == 1000
    with pytest.raises(SystemExit, match=r"nowhere\.json"):
        script.main([*common, "--cost", str(tmp_path / "nowhere.json")])
    write_json(tmp_path / "adapter/training.json", {"phases": training()["phases"]})
    with pytest.raises(SystemExit, match="has no 'hardware'"):
        script.main([*common, "--cost", str(tmp_path / "cost.json")])
