"""Offline cost and break-even: sums worked out by hand."""

from __future__ import annotations

import json

import pytest

from hf_hyperflow.modeling.atomic_file import write_json
from training.card.break_even import compute_break_even, compute_offline_cost, format_offline_cost, main

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


def cost_record(work: str, seconds: float, flops: float) -> dict:
    """A record of `hyperflow bench`."""
    place = {"backbone": "own", "size": [70, 70], "device": CPU["device"], "dtype": "float32"}
    task = {"work": work, "n_images": 25, "n_steps": None}
    return place | task | {"seconds": seconds, "flops": flops, "peak_memory_mb": 1.0}


def cost() -> dict:
    records = [
        cost_record("direct", 0.2, 1e10),
        cost_record("ready", 1.0, 2e10),
        cost_record("bias", 26.0, 3e12 + 2e10),
        cost_record("full", 1.0, 1e10),
        cost_record("ready", 9.0, 9e10) | {"n_images": 100},  # is not what a card tells
    ]
    return {"records": records}


def with_records(**changes: object) -> dict:
    """The same costs, with other values in every record."""
    return {"records": [record | changes for record in cost()["records"]]}


@pytest.mark.parametrize(
    ("offline", "rival", "hyperflow", "tasks"),
    [(1000, 26, 1, 40), (1001, 26, 1, 41), (1000, 1, 1, None), (1000, 0.5, 1, None), (0, 2, 1, 0), (0.5, 2, 1, 1)],
)
def test_break_even(offline, rival, hyperflow, tasks):
    assert compute_break_even(offline, rival, hyperflow) == tasks


def test_stages_add_up():
    record = compute_offline_cost(training(), cost())
    assert record["total"] == {
        "seconds": 1000.0,
        "flops": 1e13,
        "episodes": 80,
        "trajectories": 99,
        "bytes": 5_000_000,
    }
    assert record["break_even"] == {
        "70 px": {
            "bias": {"seconds": 40, "flops": 4},
            "full": {"seconds": None, "flops": None},
        }
    }
    assert record["same_hardware"]


def test_what_an_adapter_went_on_from_counts_too():
    earlier = training()
    later = training() | {"trajectories": None, "hardware": CPU | {"device": "a GPU", "gpu": True}}
    record = compute_offline_cost(later | {"continued_from": earlier}, cost())
    names = ["collecting rows", "matching, run 1", "task, run 1", "matching, run 2", "task, run 2"]
    assert [stage["stage"] for stage in record["offline"]] == names
    assert [stage["gpu"] for stage in record["offline"]] == [False] * 3 + [True] * 2
    assert record["total"]["flops"] == 1e13 + 6e12
    assert record["total"]["bytes"] == 5_000_000
    assert not record["same_hardware"]


def test_processes_side_by_side_count_each():
    two = training() | {"hardware": CPU | {"processes": 2}}
    assert compute_offline_cost(two, cost())["total"]["seconds"] == 360 + 2 * 640


def test_backbone_is_listed_but_counts_for_no_break_even():
    """A record of an older version: seconds only, which began anew where the run was resumed."""
    history = [{"step": 0}, {"step": 10, "seconds": 100}, {"step": 20, "seconds": 210}, {"step": 30, "seconds": 90}]
    record = compute_offline_cost(training(), cost(), {"arguments": {}, "history": history})
    assert record["backbone"]["seconds"] == 300
    assert record["backbone"]["flops"] is None
    assert record["total"] == compute_offline_cost(training(), cost())["total"]
    phases = {"pretraining": {"runs": 3, "seconds": 7.0, "flops": 1e9, "images": 24}}
    counted = compute_offline_cost(training(), cost(), {"history": [], "phases": phases, "hardware": CPU})
    assert (counted["backbone"]["seconds"], counted["backbone"]["flops"]) == (7.0, 1e9)


def test_markdown_says_it_all():
    text = format_offline_cost(compute_offline_cost(training(), cost(), {"history": [{"seconds": 7200}]}))
    assert "| pretraining the backbone | not recorded | 2.00 h | not recorded |" in text
    assert "| collecting rows | a CPU, 2 threads | 0.10 h | 4.0 T | 99 |  |" in text
    assert "**0.28 h** | **10.0 T** | 99 recorded | 80 |" in text
    assert "Stored trajectories: 5.0 MB." in text
    assert "| 70 px | bias and norm tuning | 26 s, 3,020 G | 1 s, 20 G | after 40 tasks | after 4 tasks |" in text
    assert "| 70 px | full fine-tuning | 1 s, 10 G | 1 s, 20 G | never | never |" in text
    assert "machine" not in text
    assert "image size" not in text


def test_other_hardware_per_task_is_said():
    text = format_offline_cost(compute_offline_cost(training(), with_records(device="a GPU")))
    assert "those per task: a GPU" in text


def test_other_image_sizes_share_the_offline_cost():
    both = {"records": cost()["records"] + with_records(size=[224, 224])["records"]}
    text = format_offline_cost(compute_offline_cost(training(), both))
    assert text.count("after 40 tasks") == 2
    assert "the image size the adapter was trained at" in text


def test_without_trajectories():
    record = compute_offline_cost(training() | {"trajectories": None}, cost())
    assert record["total"]["seconds"] == 640
    assert record["total"]["trajectories"] == record["total"]["bytes"] == 0


def test_files_that_say_too_little_are_named():
    with pytest.raises(ValueError, match="no `phases`"):
        compute_offline_cost({"arguments": {}, "history": []}, cost())
    with pytest.raises(ValueError, match="no records of 25 images"):
        compute_offline_cost(training(), {"hardware": "a CPU"})
    with pytest.raises(ValueError, match="at 70 px have no record 'full'"):
        compute_offline_cost(training(), {"records": cost()["records"][:3]})


def test_command(tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    write_json(tmp_path / "adapter/training.json", training())
    write_json(tmp_path / "cost.json", cost())
    common = ["--adapter", str(tmp_path / "adapter"), "--output_file", str(tmp_path / "offline_cost.json")]
    main([*common, "--cost", str(tmp_path / "cost.json")])
    assert "after 40 tasks" in capsys.readouterr().out
    assert json.loads((tmp_path / "offline_cost.json").read_text())["total"]["seconds"] == 1000
    with pytest.raises(SystemExit, match=r"nowhere\.json"):
        main([*common, "--cost", str(tmp_path / "nowhere.json")])
    write_json(tmp_path / "adapter/training.json", {"phases": training()["phases"]})
    with pytest.raises(SystemExit, match="has no 'hardware'"):
        main([*common, "--cost", str(tmp_path / "cost.json")])
