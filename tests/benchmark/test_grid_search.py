from __future__ import annotations

import dataclasses
import json

import pytest

from hf_hyperflow.benchmark import grid_search as module
from hf_hyperflow.benchmark.domain_features import DomainFeatures
from hf_hyperflow.benchmark.evaluation import evaluate_method
from hf_hyperflow.benchmark.grid_search import GridSettings, grid_search
from hf_hyperflow.benchmark.hyperparameters import read_hyperparameters
from hf_hyperflow.benchmark.methods import (
    DirectTransfer,
    LayerNormTuning,
    LogisticRegression,
    Method,
    NearestPrototype,
    NoFlow,
    Support,
    fine_tuning,
)
from hf_hyperflow.data.episodes import cdfsl_episode

FEW = GridSettings(n_episodes=2, n_shot=(1,), n_way=3, n_query=2)


@pytest.fixture(autouse=True)
def small_grid(monkeypatch):
    monkeypatch.setattr(fine_tuning, "GRID_STEPS", (1, 3))
    monkeypatch.setattr(LayerNormTuning, "grid_rates", (1e-3, 3e-2))
    monkeypatch.setattr(LogisticRegression, "grid_c", (0.01, 10.0))
    monkeypatch.setattr(DirectTransfer, "grid_scales", (2, 10, 40))


def test_the_grid_is_run_written_and_its_best_chosen(tmp_path, target, colours):
    settings = GridSettings(n_episodes=3, n_shot=(1, 2), n_way=4, n_query=4, seed=5)
    path = tmp_path / "hyperparameters.json"
    best = grid_search(path, target, [colours], settings, methods=("logistic", "layernorm"))
    content = json.loads(path.read_text())
    assert content["hyperparameters"] == best
    assert read_hyperparameters(path) == best
    entries = [entry for entry in content["grid"] if entry["method"] == "layernorm"]
    points = [(entry["learning_rate"], entry["steps"]) for entry in entries]
    assert points == [(1e-3, 1), (1e-3, 3), (3e-2, 1), (3e-2, 3)]
    assert all(entry["n_episodes"] == 6 for entry in entries)
    first_best = max(entries, key=lambda entry: entry["accuracy"])
    assert best["layernorm"] == {"learning_rate": first_best["learning_rate"], "steps": first_best["steps"]}
    # What the grid says is what the benchmark would measure with these hyper-parameters.
    method, features = LayerNormTuning(steps=3, learning_rate=3e-2), DomainFeatures(target, colours)
    accuracies = []
    for n_shot in (1, 2):
        for index in range(3):
            episode = cdfsl_episode(colours, index, n_way=4, n_shot=n_shot, n_query=4, seed=5)
            accuracies.append(evaluate_method(method, features, episode)["layernorm"].accuracy)
    assert entries[-1]["accuracy"] == pytest.approx(sum(accuracies) / 6, abs=1.1)  # of 96 queries, one may be a tie


def test_the_scale_of_direct_transfer_is_that_of_the_lowest_log_loss(tmp_path, target, colours):
    settings = dataclasses.replace(FEW, views=2, query_views=3)
    best = grid_search(tmp_path / "grid.json", target, [colours], settings, methods=["direct"])
    grid = json.loads((tmp_path / "grid.json").read_text())["grid"]
    assert len({entry["accuracy"] for entry in grid}) == 1
    features, log_losses = DomainFeatures(target, colours, 2, 3), {}
    for scale in DirectTransfer.grid_scales:
        losses = []
        for index in range(2):
            episode = cdfsl_episode(colours, index, n_way=3, n_shot=1, n_query=2)
            losses.append(evaluate_method(DirectTransfer(scale), features, episode)["direct"].log_loss)
        log_losses[scale] = sum(losses) / 2
    assert {entry["scale"]: entry["log_loss"] for entry in grid} == pytest.approx(log_losses, abs=1e-5)
    assert best["direct"]["scale"] == min(log_losses, key=log_losses.get)


def test_a_grid_goes_on_where_it_was(tmp_path, target, colours, monkeypatch):
    path = tmp_path / "hyperparameters.json"
    grid_search(path, target, [colours], FEW, methods=("logistic", "layernorm"))
    whole = json.loads(path.read_text())
    path.write_text(
        json.dumps(whole | {"grid": whole["grid"][:4], "hyperparameters": {}})
    )  # a learning rate is missing
    runs = []
    evaluate = module.evaluate_candidates

    def evaluate_and_note(candidates, *task):
        runs.append((candidates[0].name, candidates[0].learning_rate))
        return evaluate(candidates, *task)

    monkeypatch.setattr(module, "evaluate_candidates", evaluate_and_note)
    grid_search(path, target, [colours], FEW, methods=("logistic", "layernorm"))
    assert set(runs) == {("layernorm", 3e-2)}
    assert json.loads(path.read_text()) == whole
    grid_search(path, target, [colours], FEW, methods=["logistic"])
    assert json.loads(path.read_text()) == whole  # what else is in the file stays


def test_what_does_not_fit_is_named(tmp_path, target, colours):
    path = tmp_path / "hyperparameters.json"
    grid_search(path, target, [colours], FEW, methods=["logistic"])
    with pytest.raises(ValueError, match=r"hyperparameters\.json holds a grid of"):
        grid_search(path, target, [colours], dataclasses.replace(FEW, n_episodes=3))
    with pytest.raises(ValueError, match=r"nothing to choose for \['no-flow'\]: give some of direct, logistic, bias"):
        grid_search(path, target, [colours], FEW, methods=["no-flow"])
    path.write_text("half a gr")
    with pytest.raises(ValueError, match=r"hyperparameters\.json holds no grid"):
        grid_search(path, target, [colours], FEW)


def test_a_grid_ends_where_there_is_no_more_time(tmp_path, target, colours):
    path = tmp_path / "hyperparameters.json"
    best = grid_search(path, target, [colours], FEW, methods=["layernorm"], max_steps=2)
    assert {entry["steps"] for entry in json.loads(path.read_text())["grid"]} == {1}
    assert best["layernorm"]["steps"] == 1
    with pytest.raises(ValueError, match="max_steps must be at least 1, not 0"):
        grid_search(path, target, [colours], FEW, methods=["layernorm"], max_steps=0)


@dataclasses.dataclass(frozen=True)
class Knn(Method):
    """A method as somebody may add it: hyper-parameters, and no gradient descent."""

    k: int = 3

    name = "knn"
    label = "k nearest neighbours"

    def hyperparameters(self):
        return {"k": self.k}

    def grid(self):
        return [[Knn(1)], [Knn(3)]]

    def fit(self, support: Support) -> NearestPrototype:
        return NoFlow().fit(support)


def test_a_new_method_brings_its_own_grid(tmp_path, target, colours, monkeypatch):
    path = tmp_path / "hyperparameters.json"
    monkeypatch.setitem(module.TUNABLE, "knn", Knn())
    best = grid_search(path, target, [colours], FEW, methods=["knn"])
    assert [entry["k"] for entry in json.loads(path.read_text())["grid"]] == [1, 3]
    assert best == {"knn": {"k": 1}}  # of equals the earlier


@dataclasses.dataclass(frozen=True)
class Fixed(Knn):
    """The same without a grid: there is nothing to choose."""

    name = "fixed"

    def grid(self):
        return []


def test_hyperparameters_without_a_grid_are_not_searched():
    assert Fixed().hyperparameters() == {"k": 3}
    assert set(module.TUNABLE) == {"direct", "logistic", "bias", "lora", "layernorm", "full"}
