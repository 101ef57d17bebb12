"""`make train-demo` as a newcomer runs it, on a tiny backbone and with small numbers, interrupted and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest

from hf_hyperflow import HyperFlowAdapter
from tests.helpers.benchmark_runs import ENVIRONMENT, ROOT, with_known_costs
from tests.helpers.modules import module_command, run_module
from tests.helpers.tiny import tiny_dinov2, tiny_processor
from training.demo.run import Arguments

DEMO = "training.demo.run"
NUMBERS = {
    "max_classes": 6,
    "n_trajectories": 4,
    "n_unseen": 2,
    "matching_steps": 2,
    "annealing_steps": 1,
    "episodic_steps": 2,
    "n_episodes": 3,
    "gradient_episodes": 2,
}


@pytest.mark.slow
def test_every_stage_runs_and_an_interrupted_demo_goes_on(tmp_path):
    tiny_dinov2(num_hidden_layers=6).save_pretrained(tmp_path / "backbone")
    tiny_processor().save_pretrained(tmp_path / "backbone")
    output = tmp_path / "demo"
    numbers = [item for name, value in NUMBERS.items() for item in (f"--{name}", value)]
    options = ["--backbone", tmp_path / "backbone", "--output_dir", output, *numbers]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(
        module_command(DEMO, *options), cwd=ROOT, env=ENVIRONMENT, start_new_session=True, **quiet
    )
    while process.poll() is None and not (output / "data" / "made.json").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in output.glob("data/*/*.parquet")}
    with_known_costs(output / "benchmark")

    done = run_module(DEMO, *options)
    assert done.returncode == 0, done.stderr
    assert len(before) == 21
    assert {path: path.stat().st_mtime_ns for path in before} == before  # nothing was drawn twice
    assert done.stdout.count("\n=== ") == 7
    end = done.stdout.split("=== The demo is complete")[1]
    results = json.loads((output / "benchmark" / "results.json").read_text())
    found = {(r["domain"], r["method"]): r for r in results["records"]}
    unseen, methods = ("digits", "georgian", "tifinagh"), ("direct", "hyperflow", "bias", "bias-head")
    assert set(found) == {(domain, method) for domain in unseen for method in methods}
    for (domain, method), record in found.items():
        assert record["n_episodes"] == (2 if method.startswith("bias") else 3)
        assert any(line.split()[:3] == [domain, method, f"{record['accuracy']:.1f}"] for line in end.splitlines())
    assert "4 fine-tuned tasks" in end
    phases = json.loads((output / "adapter" / "training.json").read_text())["phases"]
    assert {name: phases[name]["runs"] for name in ("matching", "annealing", "episodic")} == {
        "matching": 2,
        "annealing": 1,
        "episodic": 2,
    }
    collection = json.loads((output / "trajectories" / "collection.json").read_text())
    seen = {domain["name"] for domain in collection["domains"]}
    assert len(seen) == 18
    assert not seen & set(unseen)
    HyperFlowAdapter.from_pretrained(output / "adapter")


def test_own_data_comes_in_two_parts():
    with pytest.raises(SystemExit, match=r"give both --dataset \(to train on\) and --unseen \(to report on\)"):
        Arguments(dataset=["a.parquet"])


@pytest.mark.slow
def test_a_stage_that_fails_ends_the_demo(tmp_path):
    (tmp_path / "empty").mkdir()
    own = ["--dataset", tmp_path / "empty", "--unseen", tmp_path / "empty", "--backbone", tmp_path / "nothing"]
    done = run_module(DEMO, *own, "--output_dir", tmp_path / "demo")
    assert done.returncode == 1
    message = "error: training.collect_trajectories ended with status 1. Run the same command again to go on."
    assert message in done.stderr
    assert done.stdout.count("=== ") == 1
