"""A saved adapter brings the code to load it: in an environment without this package, `AutoModel` alone does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from hf_hyperflow import AdaptedTask, HyperFlowAdapter, HyperFlowConfig
from tests.helpers.environments import Environment
from tests.helpers.tiny import write_pictures

ADAPT = """
import sys
from safetensors.torch import save_file
from transformers import AutoModel

backbone, adapter, pictures, output = sys.argv[1:]
model = AutoModel.from_pretrained(adapter, trust_remote_code=True).eval()
print(type(model).__module__, type(model).__name__)
backbone = AutoModel.from_pretrained(backbone).eval()
task = model.adapt(backbone, pictures)
task.save_pretrained(output)
scores = task.scores([f"{pictures}/red/0.png", f"{pictures}/blue/1.png"])
save_file({"scores": scores}, f"{output}/scores.safetensors")
model.save_pretrained(f"{output}/again")
"""

LOAD_UNTRUSTED = """
import sys
from transformers import AutoModel

AutoModel.from_pretrained(sys.argv[1], trust_remote_code=False)
"""


#: What torch, transformers, peft and Pillow, which the card names, do not bring along.
NOT_NEEDED = ("datasets", "pyarrow", "pandas", "sklearn", "scikit_learn", "matplotlib", "evaluate", "torchdiffeq")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("elsewhere"), missing=NOT_NEEDED)
    for name in ("hf_hyperflow", "datasets"):
        found = environment.run(f"import peft, transformers; import {name}")
        assert f"ModuleNotFoundError: No module named '{name}'" in found.stderr, found.stderr
    return environment


@pytest.fixture
def folders(tmp_path, backbone, adapter, support):
    """Saved backbone, adapter and support pictures."""
    backbone.save_pretrained(tmp_path / "backbone")
    adapter.save_pretrained(tmp_path / "adapter")
    write_pictures(tmp_path / "pictures", support)
    return tmp_path


@pytest.mark.slow
def test_adapts_where_the_package_is_not_installed(folders, elsewhere):
    found = elsewhere.run(ADAPT, folders / "backbone", folders / "adapter", folders / "pictures", folders / "out")
    assert found.returncode == 0, found.stderr
    module, name = found.stdout.split()[-2:]
    assert module.startswith("transformers_modules.")
    assert name == "HyperFlowAdapter"
    backbone = AutoModel.from_pretrained(folders / "backbone").eval()
    task = HyperFlowAdapter.from_pretrained(folders / "adapter").eval().adapt(backbone, folders / "pictures")
    scores = task.scores([folders / "pictures" / "red" / "0.png", folders / "pictures" / "blue" / "1.png"])
    torch.testing.assert_close(load_file(folders / "out" / "scores.safetensors")["scores"], scores)
    task.reset()
    # What was saved there is as good as what is saved here.
    there = AdaptedTask.from_pretrained(folders / "out", backbone)
    torch.testing.assert_close(there.theta, task.theta)
    again = HyperFlowAdapter.from_pretrained(folders / "out" / "again")
    assert again.config.to_dict() | {"_name_or_path": ""} == task_config(folders / "adapter")


def task_config(folder: Path) -> dict:
    return HyperFlowAdapter.from_pretrained(folder).config.to_dict() | {"_name_or_path": ""}


@pytest.mark.slow
def test_code_is_run_only_if_trusted(folders, elsewhere):
    found = elsewhere.run(LOAD_UNTRUSTED, folders / "adapter")
    assert found.returncode == 1
    assert "trust_remote_code=True" in found.stderr


def test_loads_by_auto_model_where_the_package_is_installed(folders, adapter, pixels):
    config = AutoConfig.from_pretrained(folders / "adapter")
    assert type(config) is HyperFlowConfig
    loaded = AutoModel.from_pretrained(folders / "adapter")
    assert type(loaded) is HyperFlowAdapter
    assert loaded.processor.to_dict() == adapter.processor.to_dict()
    for name, tensor in adapter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_what_is_saved_holds_all_the_code_and_nothing_of_the_doors(folders):
    config = json.loads((folders / "adapter" / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration.HyperFlowConfig",
        "AutoModel": "adapter.HyperFlowAdapter",
    }
    code = {path.stem for path in (folders / "adapter").glob("*.py")}
    assert {"adapter", "configuration", "drift", "solvers", "task"} <= code
    assert not {"cli", "demo", "pipeline", "quickstart", "__init__"} & code
