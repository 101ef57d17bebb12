"""The quickstart: its measurements on tiny models, and all of it as a new user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from peft import PeftModel
from transformers import AutoModel

from hf_hyperflow.benchmark.methods import DirectTransfer, HyperFlow
from hf_hyperflow.demo.digits import sample_digits
from hf_hyperflow.demo.quickstart import measure_method, save_task
from hf_hyperflow.modeling.adapter import HyperFlowAdapter
from tests.helpers.environments import Environment, build_wheels
from tests.helpers.tiny import tiny_adapter, tiny_dinov2


@pytest.fixture
def folders(tmp_path):
    """A backbone and an adapter for it."""
    tiny_dinov2().save_pretrained(tmp_path / "backbone")
    tiny_adapter(AutoModel.from_pretrained(tmp_path / "backbone")).save_pretrained(tmp_path / "adapter")
    return tmp_path / "backbone", tmp_path / "adapter"


def test_measurements_are_those_of_the_library(folders):
    backbone = AutoModel.from_pretrained(folders[0]).eval()
    adapter = HyperFlowAdapter.from_pretrained(folders[1]).eval()
    episode = sample_digits()
    for method, adapt in ((DirectTransfer(), adapter.direct_transfer), (HyperFlow(), adapter.adapt)):
        measurement = measure_method(method, *folders)
        predicted = adapt(backbone, episode.support).predict(episode.query)
        accuracy = 100 * np.mean([int(label) for label in predicted] == episode.query_labels)
        # A tiny random model has images on the border between two digits, which fall to either side.
        assert measurement.accuracy == pytest.approx(accuracy, abs=1)
        assert measurement.seconds > 0


@pytest.mark.slow
def test_the_task_is_saved_and_peft_agrees(folders, tmp_path):
    assert save_task(*folders, tmp_path / "task") >= 0.99
    assert {path.suffix for path in (tmp_path / "task").iterdir()} == {".json", ".safetensors", ".md"}
    PeftModel.from_pretrained(AutoModel.from_pretrained(folders[0]), tmp_path / "task")


@pytest.mark.slow
def test_quickstart_of_the_two_wheels_where_there_is_no_clone(tmp_path):
    """Nothing is downloaded. Without the second wheel, the error says how to get the weights."""
    environment = Environment(tmp_path)
    library, weights = build_wheels(tmp_path)
    environment.install(library)
    refused = environment.run_command("hyperflow", "quickstart")
    assert (refused.returncode, refused.stdout) == (1, "")
    for remedy in ("install the package hf-hyperflow-weights", "or set HYPERFLOW_WEIGHTS to a folder"):
        assert remedy in refused.stderr
    environment.install(weights)
    done = environment.run_command("hyperflow", "quickstart", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    figures = json.loads(done.stdout)
    methods = figures["methods"]
    assert set(methods) == {"direct", "hyperflow", "bias"}
    assert methods["hyperflow"]["accuracy"] > methods["direct"]["accuracy"]
    assert methods["hyperflow"]["seconds"] < methods["bias"]["seconds"]
    assert methods["hyperflow"]["peak_memory_mb"] < methods["bias"]["peak_memory_mb"]
    assert figures["plain_peft_agreement"] == 1.0
    assert (tmp_path / figures["task"] / "adapter_model.safetensors").is_file()
    assert not list(Path(tmp_path, figures["task"]).glob("*.npy"))
    assert np.asarray(PIL.Image.open(tmp_path / figures["picture"])).std() > 10
