from __future__ import annotations

import json

import pytest
import torch

from hf_hyperflow import grid
from hf_hyperflow.benchmark.evaluation import DomainFeatures
from hf_hyperflow.benchmark.grid_search import grid_search
from hf_hyperflow.benchmark.hyperparameters import Hyperparameters, read_hyperparameters
from hf_hyperflow.benchmark.methods import Target, accuracies
from hf_hyperflow.data.domains import Domain, resize_images
from hf_hyperflow.data.episodes import cdfsl_episode
from tests.helpers.tiny import picture, tiny_adapter, tiny_dinov2, tiny_processor


def test_defaults_and_what_a_file_changes(tmp_path):
    assert read_hyperparameters(None) == Hyperparameters()
    path = tmp_path / "recipes.json"
    path.write_text(json.dumps({"recipes": {"bias": {"steps": 7, "learning_rate": 0.02}, "head": {"c": 3.0}}}))
    recipes = read_hyperparameters(path)
    assert (recipes.fine_tuning("bias").steps, recipes.fine_tuning("bias").learning_rate) == (7, 0.02)
    assert recipes.head_c == 3.0
    assert recipes.of("full") == Hyperparameters().of("full")
    assert recipes.of("direct") == {}


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "[]",
        "{}",
        '{"recipes": {"magic": {"steps": 3}}}',
        '{"recipes": {"bias": {"steps": 3}}}',
        '{"recipes": {"bias": {"steps": 0, "learning_rate": 0.1}}}',
        '{"recipes": {"head": {"c": "many"}}}',
        '{"recipes": {"head": 3}}',
    ],
)
def test_files_that_are_no_recipes_are_named(tmp_path, content):
    path = tmp_path / "recipes.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"recipes\.json is not the result"):
        read_hyperparameters(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json is not there"):
        read_hyperparameters(tmp_path / "nowhere.json")


@pytest.fixture
def small_grid(monkeypatch):
    monkeypatch.setattr(grid, "STEPS", (1, 3))
    monkeypatch.setattr(grid, "LEARNING_RATES", {"layernorm": (1e-3, 3e-2)})
    monkeypatch.setattr(grid, "HEAD_C", (0.01, 10.0))


def setting() -> tuple[Target, Domain]:
    backbone, processor = tiny_dinov2(), tiny_processor()
    colours = [(110 + 30 * (c % 2), 110 + 30 * (c // 2), 128) for c in range(4)]
    images = [picture(100 * c + i, colour=colour) for c, colour in enumerate(colours) for i in range(10)]
    labels = torch.arange(4).repeat_interleave(10)
    domain = Domain("colours", resize_images(images, processor), labels, [f"c{i}" for i in range(4)])
    return Target(backbone, tiny_adapter(backbone, processor=processor), Hyperparameters()), domain


def test_the_grid_is_run_written_and_its_best_chosen(tmp_path, small_grid):
    target, domain = setting()
    numbers = {"n_episodes": 3, "n_shot": [1, 2], "n_way": 4, "n_query": 4, "seed": 5}
    path = tmp_path / "recipes.json"
    chosen = grid_search(path, target, [domain], methods=("head", "layernorm"), **numbers)
    content = json.loads(path.read_text())
    assert content["recipes"] == chosen
    assert read_hyperparameters(path).of("layernorm") == chosen["layernorm"]
    entries = content["grid"]
    tuned = [(e["learning_rate"], e["steps"]) for e in entries if e["method"] == "layernorm"]
    assert tuned == [(1e-3, 1), (1e-3, 3), (3e-2, 1), (3e-2, 3)]
    assert all(e["n_episodes"] == 6 for e in entries)
    best = max((e for e in entries if e["method"] == "layernorm"), key=lambda e: e["accuracy"])
    assert chosen["layernorm"] == {"learning_rate": best["learning_rate"], "steps": best["steps"]}
    # What the grid says is what the benchmark would measure with these settings.
    last = Target(
        target.backbone, target.adapter, Hyperparameters(steps={"layernorm": 3}, learning_rates={"layernorm": 3e-2})
    )
    features = DomainFeatures(target.split, domain, target.adapter.processor)
    episodes = [
        cdfsl_episode(domain, i, n_way=4, n_shot=shots, n_query=4, seed=5) for shots in (1, 2) for i in range(3)
    ]
    mean = sum(accuracies("layernorm", last, features, e)["layernorm"] for e in episodes) / 6
    assert next(e["accuracy"] for e in entries if e.get("steps") == 3 and e["learning_rate"] == 3e-2) == pytest.approx(
        mean, abs=1e-3
    )


def test_a_grid_goes_on_where_it_was(tmp_path, small_grid, monkeypatch):
    target, domain = setting()
    numbers = {"n_episodes": 2, "n_shot": [1], "n_way": 3, "n_query": 2}
    path = tmp_path / "recipes.json"
    grid_search(path, target, [domain], methods=("head", "layernorm"), **numbers)
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"grid": whole["grid"][:4], "recipes": {}}))  # one learning rate is missing
    ran = []
    along = grid._along_grid
    monkeypatch.setattr(
        grid, "_along_grid", lambda *given: ran.append((given[0], given[1][0]["learning_rate"])) or along(*given)
    )
    grid_search(path, target, [domain], methods=("head", "layernorm"), **numbers)
    assert set(ran) == {("layernorm", 3e-2)}
    assert json.loads(path.read_text()) == whole
    with pytest.raises(ValueError, match=r"recipes\.json holds a grid of"):
        grid_search(path, target, [domain], **numbers | {"n_episodes": 3})
    grid_search(path, target, [domain], methods=["head"], **numbers)
    assert json.loads(path.read_text()) == whole  # what else is in the file stays
    with pytest.raises(ValueError, match=r"nothing to choose for \['direct'\]: give some of head, bias"):
        grid_search(path, target, [domain], methods=["direct"], **numbers)
    path.write_text("half a gr")
    with pytest.raises(ValueError, match=r"recipes\.json holds no grid"):
        grid_search(path, target, [domain], **numbers)


def test_a_grid_ends_where_there_is_no_more_time(tmp_path, small_grid):
    target, domain = setting()
    numbers = {"n_episodes": 1, "n_shot": [1], "n_way": 3, "n_query": 2}
    path = tmp_path / "recipes.json"
    chosen = grid_search(path, target, [domain], methods=["layernorm"], max_steps=2, **numbers)
    assert {entry["steps"] for entry in json.loads(path.read_text())["grid"]} == {1}
    assert chosen["layernorm"]["steps"] == 1
    with pytest.raises(ValueError, match="max_steps must be at least 1, not 0"):
        grid_search(path, target, [domain], methods=["layernorm"], max_steps=0, **numbers)
