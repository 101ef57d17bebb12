"""The core stands alone, and a door whose packages are missing names the extra that installs them."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
from transformers import AutoModel

from hf_hyperflow.__main__ import main
from hf_hyperflow.extras import PACKAGES, MissingExtraError, require_extra
from tests.helpers.environments import ROOT, Environment
from tests.helpers.tiny import pictures, tiny_adapter, tiny_dinov2, write_pictures

#: What no package of the core brings along, as it is called in `site-packages`.
OPTIONAL = (
    *("typer", "rich", "sklearn", "scikit_learn", "matplotlib", "gradio", "torchdiffeq", "evaluate", "tensorboard"),
    *("pytest", "selenium", "easyfsl", "ruff", "mypy"),
)

#: Names that packages are imported under, where they are not those of the distribution.
MODULES = {
    "scikit-learn": "sklearn",
    "pyyaml": "yaml",
    "onnx-ir": "onnx_ir",
    "hf-hyperflow-weights": "hf_hyperflow_weights",
}

ADAPT = """
import sys
from transformers import AutoModel, pipeline
from hf_hyperflow import AdaptedTask, HyperFlowAdapter
from hf_hyperflow.info import describe

backbone, adapter, pictures, output = sys.argv[1:]
backbone = AutoModel.from_pretrained(backbone).eval()
adapter = HyperFlowAdapter.from_pretrained(adapter)
task = adapter.adapt(backbone, pictures, early_stopping=True)
images = [f"{pictures}/red/0.png", f"{pictures}/blue/1.png"]
labels = task.predict(images)
task.save_pretrained(output)
task.reset()
assert AdaptedTask.from_pretrained(output, backbone).predict(images) == labels
classify = pipeline("few-shot-image-classification", model=backbone, adapter=adapter, support=pictures)
assert len(classify(images)) == 2
print(describe(output).kind)
print(adapter.adapt(backbone, pictures, solver="dopri5"))
"""


@pytest.fixture(scope="module")
def core(tmp_path_factory) -> Environment:
    """An environment with what the core needs, and this package."""
    environment = Environment(tmp_path_factory.mktemp("core"), missing=OPTIONAL, has_package=True)
    for name in ("typer", "sklearn", "gradio"):
        assert environment.run(f"import {name}").returncode == 1
    return environment


@pytest.mark.slow
def test_the_core_adapts_saves_and_predicts(core, tmp_path):
    tiny_dinov2().save_pretrained(tmp_path / "backbone")
    tiny_adapter(AutoModel.from_pretrained(tmp_path / "backbone")).save_pretrained(tmp_path / "adapter")
    write_pictures(tmp_path / "pictures", pictures(n_way=3, n_shot=2))
    folders = [tmp_path / name for name in ("backbone", "adapter", "pictures", "task")]
    done = core.run(ADAPT, *folders)
    assert done.stdout.splitlines()[-1:] == ["adapted task"], done.stderr
    assert done.stderr.endswith("solver 'dopri5' needs torchdiffeq: pip install \"hf-hyperflow[ode]\"\n")


@pytest.mark.slow
def test_the_command_without_typer(core):
    done = core.run_module("hf_hyperflow", "info", "nowhere")
    assert (done.returncode, done.stdout) == (1, "")
    expected = 'error: the command line needs typer, which is not installed: pip install "hf-hyperflow[cli]"\n'
    assert done.stderr == expected


def test_the_entry_point_without_typer(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)  # what makes an import fail
    monkeypatch.delitem(sys.modules, "hf_hyperflow.cli", raising=False)
    with pytest.raises(SystemExit, match=r'^error: the command line needs typer, .* "hf-hyperflow\[cli\]"$'):
        main()


def test_the_metric_without_evaluate(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    monkeypatch.delitem(sys.modules, "hf_hyperflow.benchmark.evaluate_metric", raising=False)
    with pytest.raises(MissingExtraError, match=r'FewShotAccuracy needs evaluate, .* "hf-hyperflow\[benchmark\]"$'):
        importlib.import_module("hf_hyperflow.benchmark.evaluate_metric")


def test_only_the_packages_of_the_extra_are_explained():
    command = r'the plot needs matplotlib, .*: pip install "hf-hyperflow\[demo\]"$'
    with pytest.raises(MissingExtraError, match=command), require_extra("demo", "the plot"):
        raise ModuleNotFoundError("no", name="matplotlib.figure")
    for name in ("hf_hyperflow.nowhere", "pyarrow", None):  # a mistake of ours, a package that is not the demo's
        with pytest.raises(ModuleNotFoundError, match="no"), require_extra("demo", "the plot"):
            raise ModuleNotFoundError("no", name=name)


def read_extras() -> dict[str, list[str]]:
    """The requirements of each extra, those of the extras that it includes among them."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    project = tomllib.loads(Path(ROOT, "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for requirements in extras.values():
        for requirement in list(requirements):
            included = re.fullmatch(r"hf-hyperflow\[(.*)\]", requirement)
            if included:
                requirements.remove(requirement)
                for name in included[1].split(","):
                    requirements += extras[name]
    return extras


def test_packages_are_those_of_the_extras():
    extras = read_extras()
    assert {"test", "dev"} == set(extras) - set(PACKAGES)
    for extra, packages in PACKAGES.items():
        distributions = [re.split("[<>=]", requirement)[0] for requirement in extras[extra]]
        assert sorted(packages) == sorted(MODULES.get(name, name) for name in distributions)
