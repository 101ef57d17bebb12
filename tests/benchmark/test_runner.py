"""The benchmark as a user meets it: in this process, killed and resumed, in two processes, from the command line."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoModel

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.benchmark.episode_log import EpisodeLog, EpisodeResult
from hf_hyperflow.benchmark.evaluation import compare_flow
from hf_hyperflow.benchmark.records import Record
from hf_hyperflow.benchmark.runner import BenchmarkArguments, run
from hf_hyperflow.data.domains import load_domain
from hf_hyperflow.modeling.saving import CheckpointError
from tests.helpers.benchmark_runs import ENVIRONMENT, with_known_costs
from tests.helpers.tiny import picture, tiny_adapter, tiny_dinov2, tiny_processor


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    return make_ground(tmp_path_factory.mktemp("ground"))


def make_ground(folder: Path) -> Path:
    """A backbone, an adapter with a flow that moves, and two image folders: `six` and `three` classes of 12 images."""
    backbone = tiny_dinov2()
    backbone.save_pretrained(folder / "backbone")
    tiny_adapter(backbone).save_pretrained(folder / "adapter")
    tiny_processor().save_pretrained(folder / "adapter")
    for name, n_classes in (("six", 6), ("three", 3)):
        for c in range(n_classes):
            (folder / name / f"class{c}").mkdir(parents=True)
            colour = (100 + 50 * (c % 2), 100 + 50 * (c // 2 % 2), 100 + 50 * (c // 4))
            for i in range(12):
                picture(100 * c + i, (28, 28), colour).save(folder / name / f"class{c}" / f"{i}.png")
    return folder


def arguments(ground: Path, output: Path, **changes: object) -> BenchmarkArguments:
    settings = {
        "adapter": str(ground / "adapter"),
        "backbone": str(ground / "backbone"),
        "dataset": [str(ground / "six"), str(ground / "three")],
        "output_dir": str(output),
        "n_shot": [1, 3],
        "n_query": 4,
        "n_episodes": 5,
        "flow_episodes": 2,
        "methods": "direct,hyperflow",
        "cpu": True,
    }
    return BenchmarkArguments(**settings | changes)


def episodes(output: Path) -> list[dict]:
    return pq.read_table(output / "episodes.parquet").to_pylist()


def accuracies(output: Path, method: str, domain: str, n_shot: int | None) -> list[float]:
    rows = [r for r in episodes(output) if (r["method"], r["domain"], r["n_shot"]) == (method, domain, n_shot)]
    assert [r["index"] for r in rows] == list(range(len(rows)))
    return [r["accuracy"] for r in rows]


@pytest.fixture(scope="module")
def finished(ground, tmp_path_factory) -> tuple[Path, dict]:
    """A run of four methods, the gradient method on the first 2 of 5 episodes, and its results."""
    output = with_known_costs(tmp_path_factory.mktemp("finished"))
    methods = "direct,logistic,hyperflow,layernorm"
    results = run(arguments(ground, output, n_shot=[1, 3, 50], methods=methods, max_episodes_gradient=2))
    return output, results


def test_direct_and_hyperflow_are_those_of_compare_flow(ground, finished):
    backbone = AutoModel.from_pretrained(ground / "backbone").eval()
    adapter = HyperFlowAdapter.from_pretrained(ground / "adapter").eval()
    for name in ("six", "three"):
        domain = load_domain(ground / name, adapter.processor)
        for n_shot in (1, 3):
            comparison = compare_flow(adapter, backbone, domain, n_episodes=5, n_shot=n_shot, n_way=5, n_query=4)
            assert accuracies(finished[0], "direct", name, n_shot) == comparison.direct.tolist()
            assert accuracies(finished[0], "hyperflow", name, n_shot) == comparison.adapted.tolist()
            # Along the flow, t = 1 and as many steps as the adapter's own are the same point.
            for point in ("t=1", f"steps={adapter.config.n_steps}"):
                assert accuracies(finished[0], f"hyperflow {point}", name, n_shot) == comparison.adapted[:2].tolist()
    assert accuracies(finished[0], "direct", "six", 1) != accuracies(finished[0], "hyperflow", "six", 1)


def test_results_hold_a_record_per_method_domain_and_shots(finished):
    output, results = finished
    assert json.loads((output / "results.json").read_text()) == results
    keys = {(r["method"], r["domain"], r["n_shot"]) for r in results["records"]}
    methods = ("direct", "logistic", "hyperflow", "layernorm")
    assert keys == {(m, d, s) for m in methods for d in ("six", "three") for s in (1, 3)}
    assert len(results["records"]) == len(keys)
    fields = {field.name for field in dataclasses.fields(Record)}
    for record in results["records"]:
        assert set(record) == fields
        assert record["n_way"] == {"six": 5, "three": 3}[record["domain"]]
        assert record["n_episodes"] == (2 if record["method"] == "layernorm" else 5)
        key = (record["domain"], record["n_shot"])
        values = np.array(accuracies(output, record["method"], *key))
        assert record["accuracy"] == pytest.approx(values.mean(), abs=1e-3)
        rows = [r for r in episodes(output) if (r["method"], r["domain"], r["n_shot"]) == (record["method"], *key)]
        assert record["log_loss"] == pytest.approx(np.mean([r["log_loss"] for r in rows]), abs=1e-4)
        gaps = np.mean([r["confidence_gaps"] for r in rows], axis=0)
        assert record["ece"] == pytest.approx(np.abs(gaps).sum(), abs=1e-4)
        if record["method"] == "direct":
            assert record["diff_vs_direct"] is None
        else:
            differences = values - accuracies(output, "direct", *key)[: len(values)]
            assert record["diff_n_episodes"] == len(values)
            assert record["diff_vs_direct"] == pytest.approx(differences.mean(), abs=1e-3)
            expected = 1.96 * differences.std(ddof=1) / np.sqrt(len(values))
            assert record["diff_ci95"] == pytest.approx(expected, abs=1e-3)
    left_out = {(entry["domain"], entry["n_shot"]) for entry in results["left_out"]}
    assert left_out == {("six", 50), ("three", 50)}


def test_figures(finished):
    for name in ("accuracy_cost.png", "gain.png", "shots.png", "flow.png"):
        picture = PIL.Image.open(finished[0] / name).convert("L")
        assert picture.width > 400
        assert len(picture.getcolors()) > 20


def test_what_is_left_out_or_reduced_is_said(ground, tmp_path, capsys):
    run(arguments(ground, with_known_costs(tmp_path), n_shot=[1, 9], n_episodes=1, methods="direct"))
    said = capsys.readouterr().out
    assert "three has 3 classes to use: run 3-way" in said
    assert "six has too few images for 9 shots: left out" in said


def test_more_episodes_methods_and_shots_are_added(ground, finished, tmp_path):
    with_known_costs(tmp_path)
    run(arguments(ground, tmp_path, dataset=[str(ground / "six")], n_shot=[3], n_episodes=2))
    first = (tmp_path / "episodes.parquet").read_bytes()
    run(arguments(ground, tmp_path, dataset=[str(ground / "six")], n_shot=[3], n_episodes=2))
    assert (tmp_path / "episodes.parquet").read_bytes() == first  # nothing was left to do
    methods = "direct,logistic,hyperflow,layernorm"
    run(arguments(ground, tmp_path, methods=methods, max_episodes_gradient=2))
    assert episodes(tmp_path) == episodes(finished[0])


def command(ground: Path, output: Path) -> list[str]:
    """The finished run, as arguments of Python."""
    sources = ["--dataset", ground / "six", ground / "three", "--output_dir", output, "--cpu"]
    models = ["--backbone", ground / "backbone", "--adapter", ground / "adapter"]
    numbers = ["--n_shot", 1, 3, "--n_query", 4, "--n_episodes", 5, "--flow_episodes", 2, "--max_episodes_gradient", 2]
    everything = [*models, *sources, *numbers, "--methods", "direct,logistic,hyperflow,layernorm"]
    return ["-m", "hf_hyperflow", "benchmark", *map(str, everything)]


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(ground, finished, tmp_path):
    with_known_costs(tmp_path)
    process = subprocess.Popen([sys.executable, *command(ground, tmp_path)], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "episodes.parquet").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "results.json").exists()
    assert 0 < len(episodes(tmp_path)) < len(episodes(finished[0]))
    methods = "direct,logistic,hyperflow,layernorm"
    run(arguments(ground, tmp_path, methods=methods, max_episodes_gradient=2))
    assert episodes(tmp_path) == episodes(finished[0])


@pytest.mark.slow
def test_two_processes_end_with_the_results_of_one(ground, finished, tmp_path):
    with_known_costs(tmp_path)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, *command(ground, tmp_path)], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("three has 3 classes to use") == 2  # once per number of shots: one process speaks
    assert episodes(tmp_path) == episodes(finished[0])
    results = json.loads((tmp_path / "results.json").read_text())
    costs = {
        "seconds_per_task",
        "peak_memory_mb",
        "flops_per_task",
        "flops_per_prediction",
    }  # of the device: its threads may differ
    for record, expected in zip(results["records"], finished[1]["records"], strict=True):
        assert record.keys() == expected.keys()
        for key in record.keys() - costs:
            assert record[key] == expected[key]


@pytest.mark.parametrize("damage", ["cut", "changed", "text"])
def test_a_damaged_file_is_named_and_kept(ground, tmp_path, damage):
    with_known_costs(tmp_path)
    once = arguments(ground, tmp_path, dataset=[str(ground / "six")], n_shot=[1], n_episodes=2, flow_episodes=0)
    assert run(once)["flow"] == []
    path = tmp_path / "episodes.parquet"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "changed":
        table = pq.read_table(path)
        better = pa.array([100.0] * len(table))
        pq.write_table(table.set_column(table.schema.get_field_index("accuracy"), "accuracy", better), path)
    else:
        path.write_text("not a table")
    content = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"episodes\.parquet is damaged"):
        run(once)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"n_query": 3}, "n_query was 4 and is 3"),
        ({"protocol": "meta-dataset"}, "protocol was cdfsl and is meta-dataset"),
    ],
)
def test_another_benchmark_in_the_folder(ground, finished, change, words):
    before = (finished[0] / "episodes.parquet").read_bytes()
    with pytest.raises(CheckpointError, match=words):
        run(arguments(ground, finished[0], **change))
    assert (finished[0] / "episodes.parquet").read_bytes() == before


@pytest.mark.parametrize(("name", "method"), [("recipe bias", "bias"), ("seed", "hyperflow-guard")])
def test_a_folder_of_version_0_1(ground, tmp_path, name, method):
    """It had other names for methods and for their settings."""
    EpisodeLog(tmp_path, {name: 0}).append([EpisodeResult("six", 1, method, 0, 5, 5, 20, 50.0)])
    before = (tmp_path / "episodes.parquet").read_bytes()
    strange = method if name == "seed" else name
    with pytest.raises(CheckpointError, match=rf"by another version of hf_hyperflow: {strange} is not known"):
        run(arguments(ground, tmp_path))
    assert (tmp_path / "episodes.parquet").read_bytes() == before


def test_other_images_under_the_same_name(ground, finished, tmp_path):
    for c in range(3):
        (tmp_path / "three" / f"class{c}").mkdir(parents=True)
        for i in range(12):
            picture(i, (28, 28)).save(tmp_path / "three" / f"class{c}" / f"{i}.png")
    with pytest.raises(CheckpointError, match=r"domain three was \w+ and is \w+"):
        run(arguments(ground, finished[0], dataset=[str(tmp_path / "three")]))


@pytest.mark.slow
def test_a_command_ends_with_a_message(ground, tmp_path):
    (tmp_path / "episodes.parquet").write_text("not a table")
    done = subprocess.run(
        [sys.executable, *command(ground, tmp_path)], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr


def test_damaged_costs_are_named(ground, tmp_path):
    (tmp_path / "costs.json").write_text('[{"method": "direct"')
    with pytest.raises(CheckpointError, match=r"costs\.json is damaged"):
        run(arguments(ground, tmp_path, n_episodes=1, n_shot=[1], methods="direct"))


def test_meta_dataset_protocol(ground, tmp_path):
    with_known_costs(tmp_path)
    results = run(arguments(ground, tmp_path, protocol="meta-dataset", n_episodes=3))
    records = results["records"]
    assert {(r["domain"], r["method"], r["n_shot"]) for r in records} == {
        (d, m, None) for d in ("six", "three") for m in ("direct", "hyperflow")
    }
    rows = [r for r in episodes(tmp_path) if r["domain"] == "six" and r["method"] == "direct"]
    assert {r["n_way"] for r in rows} <= {5, 6}
    assert len({r["n_support"] for r in rows}) > 1
    record = next(r for r in records if (r["domain"], r["method"]) == ("six", "direct"))
    assert record["n_way"] == pytest.approx(np.mean([r["n_way"] for r in rows]), abs=0.01)
    assert record["seconds_per_task"] == 0.5


def test_unbalanced_protocol_with_views(ground, tmp_path):
    changes = {"protocol": "unbalanced", "n_query": 4, "n_episodes": 3, "flow_episodes": 0}
    run(arguments(ground, with_known_costs(tmp_path / "one"), **changes))
    results = run(arguments(ground, with_known_costs(tmp_path / "views"), views=4, query_views=2, **changes))
    records = results["records"]
    assert {(r["domain"], r["n_way"], r["n_shot"]) for r in records} == {("six", 5, None), ("three", 3, None)}
    assert results["arguments"]["views"] == 4
    one, views = episodes(tmp_path / "one"), episodes(tmp_path / "views")
    assert {r["n_support"] for r in views if r["domain"] == "six"} == {8 + 4 + 2 + 1 + 1}
    assert {r["n_support"] for r in views if r["domain"] == "three"} == {8 + 4 + 2}
    assert all(a["log_loss"] != b["log_loss"] for a, b in zip(one, views, strict=True))
    with pytest.raises(CheckpointError, match="views was 1 and is 4"):
        run(arguments(ground, tmp_path / "one", views=4, **changes))


@pytest.mark.slow
def test_the_command_line(ground, tmp_path):
    script = "from hf_hyperflow.cli import main; main()"
    options = ["--adapter", ground / "adapter", "--backbone", ground / "backbone", "--dataset", ground / "three"]
    options += ["--n_way", 5, "--n_shot", 1, 2, "--n_query", 2, "--n_episodes", 2, "--protocol", "cdfsl", "--seed", 3]
    options += ["--methods", "direct,hyperflow", "--max_episodes_gradient", 1, "--output", with_known_costs(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", script, "benchmark", *map(str, options)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert [r["n_shot"] for r in results["records"]] == [1, 1, 2, 2]
    assert results["arguments"]["seed"] == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": "direct,magic"}, "unknown method 'magic'"),
        ({"protocol": "imagenet"}, "unknown protocol 'imagenet'"),
        ({"n_episodes": 0}, "n_episodes must be at least 1, not 0"),
        ({"n_shot": []}, "n_shot must be at least 1"),
        ({"flow_episodes": -1}, "flow_episodes must not be negative, but is -1"),
        ({"views": 5}, "views must be from 1 to 4, not 5"),
        ({"query_views": 0}, "query_views must be from 1 to 4, not 0"),
        ({"n_way": 1}, "n_way must be at least 2, not 1"),
        ({"max_episodes_gradient": 0}, "max_episodes_gradient must be at least 1, not 0"),
        ({"dataset": ["a/x.parquet", "b/x.parquet"]}, "two datasets have the same name"),
    ],
)
def test_arguments_that_make_no_sense(ground, tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        arguments(ground, tmp_path, **change)


def test_a_backbone_whose_name_is_no_place_is_asked_for(ground, tmp_path):
    """As that of the released adapter, which has no owner."""
    adapter = HyperFlowAdapter.from_pretrained(ground / "adapter")
    adapter.config.backbone = adapter.config.backbone | {"name_or_path": "vit"}
    adapter.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="does not say where its backbone lies: give it with --backbone"):
        run(arguments(ground, tmp_path / "output", adapter=str(tmp_path / "adapter"), backbone=None))
