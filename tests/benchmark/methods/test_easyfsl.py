from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from hf_hyperflow.benchmark.bench.task import prepare_task
from hf_hyperflow.benchmark.evaluation import evaluate_method
from hf_hyperflow.benchmark.methods import EASYFSL_METHODS, Support
from hf_hyperflow.benchmark.methods.easyfsl import EasyLaplacianShot, import_easyfsl
from hf_hyperflow.modeling.prototypes import class_means


@pytest.fixture(autouse=True)
def fresh_import():
    import_easyfsl.cache_clear()


@dataclass
class GivenFeatures:
    """Images of which only features are known."""

    final_features: torch.Tensor


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "easyfsl", None)
    for method in EASYFSL_METHODS:
        with pytest.raises(ImportError, match="pip install --no-deps easyfsl"):
            method.require_packages()


def test_torchvision_is_not_needed():
    pytest.importorskip("easyfsl")
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "from hf_hyperflow.benchmark.methods.easyfsl import import_easyfsl\n"
        "print(sorted(import_easyfsl()), [m for m in sys.modules if m.startswith('easyfsl.methods')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = ["bd_cspn", "finetune", "laplacian_shot", "prototypical_networks", "simple_shot"]
    assert done.stdout.strip() == f"{modules} []"


@pytest.mark.parametrize("method", EASYFSL_METHODS, ids=lambda method: method.name)
def test_accuracy_and_cost(method, target, features, colours, episode):
    pytest.importorskip("easyfsl")
    assert 0 <= evaluate_method(method, features, episode)[method.name].accuracy <= 100
    prepare_task(method, target, colours.images[episode.support], episode.support_labels)


@pytest.mark.parametrize("method", EASYFSL_METHODS, ids=lambda method: method.name)
def test_features_that_are_well_apart(method):
    pytest.importorskip("easyfsl")
    generator = torch.Generator().manual_seed(0)
    centres = 5 * torch.randn(4, 16, generator=generator)
    labels, true = torch.arange(4).repeat_interleave(3), torch.arange(4).repeat_interleave(6)
    support = centres[labels] + torch.randn(12, 16, generator=generator)
    queries = centres[true] + torch.randn(24, 16, generator=generator)
    classifier = method.fit(Support(GivenFeatures(support), labels))
    assert torch.equal(classifier.predict(GivenFeatures(queries)), true)
    if method.name == "easyfsl-simpleshot":
        prototypes = class_means(F.normalize(support, dim=1), labels)
        expected = (F.normalize(queries, dim=1) @ F.normalize(prototypes, dim=1).T).argmax(-1)
        assert torch.equal(classifier.predict(GivenFeatures(queries)), expected)


def test_laplacian_shot_with_a_single_query():
    pytest.importorskip("easyfsl")
    support = Support(GivenFeatures(torch.eye(4)[:2]), torch.arange(2))
    assert EasyLaplacianShot().fit(support).predict(GivenFeatures(torch.eye(4)[1:2])).tolist() == [1]
