"""The tables of scores and of "none of these"."""

from __future__ import annotations

import json

import numpy as np
import PIL.Image
import pytest
import torch
from sklearn.metrics import auc, roc_auc_score
from transformers import AutoImageProcessor, AutoModel

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.benchmark.domain_features import DomainFeatures
from hf_hyperflow.benchmark.methods import Target
from hf_hyperflow.data.domains import load_domain, normalise
from hf_hyperflow.training.calibration import draw_others
from tests.helpers.tiny import tiny_adapter
from tests.helpers.training_runs import make_ground, make_images
from training.card import scores, unknown


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A backbone, an adapter that was calibrated, and domains of 6, 3 and 2 classes."""
    folder = make_ground(tmp_path_factory.mktemp("ground"))
    make_images(folder / "six", n_classes=6, n_images=24, seed=1)
    make_images(folder / "three", n_classes=3, n_images=24, seed=2)
    make_images(folder / "two", n_classes=2, n_images=24, seed=3)
    processor = AutoImageProcessor.from_pretrained(folder / "backbone", backend="pil")
    backbone = AutoModel.from_pretrained(folder / "backbone")
    adapter = tiny_adapter(backbone, processor=processor)
    adapter.save_pretrained(folder / "plain")
    adapter.config.calibration = {"constant": 2.0, "ways": 0.5, "shots": 0.1, "spread": 0.0}
    terms = {"constant": -1.0, "ways": 0.5, "shots": 0.2, "spread": 0.1}
    adapter.config.rejection = {**terms, "odds": 0.7, "distance": -1.5}
    adapter.save_pretrained(folder / "adapter")
    return folder


def run_unknown(ground, output, *domains: str, adapter: str = "adapter") -> dict:
    command = ["--backbone", ground / "backbone", "--adapter", ground / adapter, "--output_dir", output]
    command += ["--unseen", *(ground / domain for domain in domains), "--n_episodes", 2, "--n_shot", 1, 5]
    unknown.main([str(part) for part in command])
    return json.loads((output / "unknown.json").read_text())


def test_a_record_for_every_domain_and_number_of_shots(ground, tmp_path, capsys):
    content = run_unknown(ground, tmp_path, "six", "three", "two")
    records = content["records"]
    keys = [(r["domain"], r["n_shot"], r["n_way"]) for r in records if r["domain"] is not None]
    n_way = {name: min(5, len(list((ground / name).iterdir())) - 1) for name in ("six", "three")}
    assert keys == [(name, n_shot, n_way[name]) for n_shot in (1, 5, None) for name in ("six", "three")]
    assert {entry["domain"] for entry in content["left_out"]} == {"two"}
    for mean in records[-3:]:
        of_shots = [r for r in records if r["n_shot"] == mean["n_shot"] and r["domain"] is not None]
        for name in ("hyperflow", "direct", "difference", "kept"):
            assert mean[name] == pytest.approx(np.mean([r[name] for r in of_shots]), abs=0.01)
        for name, curve in zip(("hyperflow", "direct"), mean["curves"], strict=True):
            assert curve == sorted(curve)
            # Curves of 101 rates have, but for their steps, the area that is told.
            assert 100 * auc(content["false_positive_rates"], curve) == pytest.approx(mean[name], abs=1.5)
    table = (tmp_path / "unknown.md").read_text()
    assert table in capsys.readouterr().out
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| 1-shot", "| 5-shot", "| unbalanced"]
    assert PIL.Image.open(tmp_path / "unknown.png").width > 1000


@torch.no_grad()
def test_scores_are_those_of_tasks(ground):
    backbone = AutoModel.from_pretrained(ground / "backbone").eval()
    adapter = HyperFlowAdapter.from_pretrained(ground / "adapter").eval()
    features = DomainFeatures(Target(backbone, adapter), load_domain(ground / "six", adapter.processor))
    domain = features.domain
    episode = unknown.draw_episode(domain, None, 3, seed=0)
    known, cosines, is_query = unknown.score_episode(features, episode, seed=0)
    others = draw_others(domain, episode, 0)
    assert not set(domain.labels[others].tolist()) & set(episode.classes.tolist())
    assert is_query.sum() == len(episode.query) == 5 * 15
    rows = torch.cat([episode.query, others])
    pixels = normalise(domain.images[rows], adapter.processor)
    support = (normalise(domain.images[episode.support], adapter.processor), episode.support_labels)
    task = adapter.adapt(backbone, support)
    torch.testing.assert_close(known.float(), task.known_scores(pixels), rtol=2e-2, atol=2e-2)  # half precision
    direct = adapter.direct_transfer(backbone, support)
    torch.testing.assert_close(cosines.float(), direct.logits(pixels).amax(1), rtol=2e-2, atol=2e-2)
    measured = unknown.measure_episode(known, cosines, is_query)
    assert measured.direct == pytest.approx(100 * roc_auc_score(is_query, cosines))
    assert measured.kept == pytest.approx(100 * (known[is_query] >= 0.5).double().mean().item())


def test_perfect_and_useless_scores():
    is_query = torch.tensor([True, True, False, False])
    measured = unknown.measure_episode(torch.tensor([0.9, 0.4, 0.3, 0.1]), torch.ones(4), is_query)
    assert (measured.hyperflow, measured.direct) == (100, 50)
    assert (measured.kept, measured.refused) == (50, 100)
    assert measured.curves[0].tolist() == [1.0] * 101
    assert measured.curves[1] == pytest.approx(unknown.RATES)


def test_what_cannot_be_measured_is_said(ground, tmp_path):
    with pytest.raises(SystemExit, match=r"plain was not calibrated: run training/calibrate\.py"):
        run_unknown(ground, tmp_path, "six", adapter="plain")
    with pytest.raises(SystemExit, match="no domain has enough classes"):
        run_unknown(ground, tmp_path, "two")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit, match="file"):
        run_unknown(ground, tmp_path / "file", "six")


def mean_record(method: str, n_shot: int | None, **changes: object) -> dict:
    record = {"method": method, "n_shot": n_shot, "log_loss": 1.0, "log_loss_ci95": 0.01, "ece": 0.125}
    return record | {"log_loss_vs_direct": -0.25, "log_loss_vs_direct_ci95": None} | changes


def results(protocol: str, *shots: int | None, views: int = 1) -> dict:
    arguments = {"protocol": protocol, "n_way": 5, "views": views, "query_views": 1}
    means = [mean_record(method, n_shot) for n_shot in shots for method in ("direct", "no-flow", "hyperflow")]
    return {"arguments": arguments, "means": means}


def test_a_table_of_log_losses(tmp_path, capsys):
    contents = (results("cdfsl", 1, 5), results("unbalanced", None), results("meta-dataset", None, views=4))
    files = []
    for number, content in enumerate(contents):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(content))
    scores.main(["--results", *map(str, files)])
    lines = capsys.readouterr().out.splitlines()
    rest = "1.000 ± 0.010 | 1.000 ± 0.010 | -0.250 | 0.125 | 0.125 |"
    views = "Meta-Dataset's, views: 4 of the support, 1 of the queries"
    assert lines[2:] == [f"| {name} | {rest}" for name in ("5-way 1-shot", "5-way 5-shot", "unbalanced", views)]


def test_results_without_log_losses_are_named(tmp_path):
    old = results("cdfsl", 1)
    for mean in old["means"]:
        del mean["log_loss"]
    for content, words in ((old, "it was run by version 0.1"), ({}, "has no 'means'")):
        (tmp_path / "results.json").write_text(json.dumps(content))
        with pytest.raises(SystemExit, match=words):
            scores.main(["--results", str(tmp_path / "results.json")])
