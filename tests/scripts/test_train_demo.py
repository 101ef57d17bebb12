"""`make train-demo` as a newcomer runs it, on a tiny backbone and with small numbers, interrupted and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from hf_hyperflow import HyperFlowAdapter
from tests.benchmark.test_runner import ENVIRONMENT, with_known_costs
from tests.helpers.tiny import tiny_dinov2, tiny_processor

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = {
    "max_classes": 6,
    "n_trajectories": 8,
    "n_unseen": 4,
    "matching_steps": 2,
    "annealing_steps": 1,
    "task_steps": 2,
    "n_episodes": 4,
    "gradient_episodes": 2,
}


def command(*options: object) -> list[str]:
    return [sys.executable, str(ROOT / "training" / "train_demo.py"), *map(str, options)]


def test_every_stage_runs_and_an_interrupted_demo_goes_on(tmp_path):
    tiny_dinov2(num_hidden_layers=6).save_pretrained(tmp_path / "backbone")
    tiny_processor().save_pretrained(tmp_path / "backbone")
    output = tmp_path / "demo"
    numbers = [item for name, value in NUMBERS.items() for item in (f"--{name}", value)]
    demo = command("--backbone", tmp_path / "backbone", "--output_dir", output, *numbers)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(demo, env=ENVIRONMENT, start_new_session=True, **quiet)
    while process.poll() is None and not (output / "data" / "made.json").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in output.glob("data/*/*.parquet")}
    with_known_costs(output / "benchmark")

    done = subprocess.run(demo, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(before) == 21
    assert {path: path.stat().st_mtime_ns for path in before} == before  # nothing was drawn twice
    assert done.stdout.count("\n=== ") == 7
    end = done.stdout.split("=== What there is now")[1]
    results = json.loads((output / "benchmark" / "results.json").read_text())
    found = {(r["domain"], r["method"]): r for r in results["records"]}
    unseen, methods = ("digits", "georgian", "tifinagh"), ("direct", "hyperflow", "bias", "bias-metric")
    assert set(found) == {(domain, method) for domain in unseen for method in methods}
    for (domain, method), record in found.items():
        assert record["n_episodes"] == (2 if method.startswith("bias") else 4)
        assert any(line.split()[:3] == [domain, method, f"{record['accuracy']:.1f}"] for line in end.splitlines())
    assert "8 fine-tuned tasks" in end
    phases = json.loads((output / "adapter" / "training.json").read_text())["phases"]
    assert {name: phases[name]["runs"] for name in ("matching", "blend", "task")} == {
        "matching": 2,
        "blend": 1,
        "task": 2,
    }
    collection = json.loads((output / "trajectories" / "collection.json").read_text())
    seen = {domain["name"] for domain in collection["domains"]}
    assert len(seen) == 18
    assert not seen & set(unseen)
    HyperFlowAdapter.from_pretrained(output / "adapter")


def test_own_data_comes_in_two_parts():
    done = subprocess.run(command("--dataset", "a.parquet"), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "give both --dataset (to train on) and --unseen (to report on)" in done.stderr


def test_a_stage_that_fails_ends_the_demo(tmp_path):
    (tmp_path / "empty").mkdir()
    own = ["--dataset", tmp_path / "empty", "--unseen", tmp_path / "empty", "--backbone", tmp_path / "nothing"]
    done = subprocess.run(
        command(*own, "--output_dir", tmp_path / "demo"), env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "error: collect_trajectories.py ended with status 1. The same command goes on where it was." in done.stderr
    assert done.stdout.count("=== ") == 1
