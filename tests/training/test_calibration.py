"""`calibrate.py`: the scores of an adapter, and nothing else of it."""

from __future__ import annotations

import ast
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.data.domains import Domain
from hf_hyperflow.data.episodes import cdfsl_episode
from hf_hyperflow.modeling.calibration import TaskMeasures
from hf_hyperflow.modeling.rejection import Rejection, compute_log_odds
from hf_hyperflow.training.calibration import UNKNOWN, Answers, draw_others, fit_calibration, fit_rejection, mean_loss
from tests.helpers.tiny import tiny_adapter
from tests.helpers.training_runs import make_ground, run_here


def test_calibrate_moves_scores_alone(tmp_path):
    ground = make_ground(tmp_path)
    processor = AutoImageProcessor.from_pretrained(ground / "backbone", backend="pil")
    backbone = AutoModel.from_pretrained(ground / "backbone")
    tiny_adapter(backbone, processor=processor).save_pretrained(ground / "adapter")
    before = load_file(ground / "adapter" / "model.safetensors")
    common = ["--backbone", ground / "backbone", "--adapter", ground / "adapter", "--dataset", ground / "beta"]
    done = run_here("calibrate", *common, "--n_episodes", 1)
    assert done.exitcode == 0, done.output
    after = load_file(ground / "adapter" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name].half(), after[name].half())}
    assert not changed  # weights are saved in half precision
    adapter = HyperFlowAdapter.from_pretrained(ground / "adapter").eval()
    for name in ("calibration", "rejection"):
        printed = done.output.split(f"{name} ")[1].splitlines()[0]
        assert ast.literal_eval(printed) == getattr(adapter.config, name)
    losses = done.output.split("log loss ")[1].split()
    assert float(losses[2]) <= float(losses[0])


def draw_answers(n_answers: int, generator: torch.Generator, scale_of) -> list[Answers]:
    """Answers whose labels are drawn from the softmax of their cosines at the scale of their measures."""
    answers = []
    for _ in range(n_answers):
        n_way = int(torch.randint(2, 12, (), generator=generator))
        shots, spread = torch.rand(2, generator=generator).tolist()
        measures = TaskMeasures(math.log(n_way / 5), 3 * shots, spread - 2)
        cosines = torch.rand(400, n_way, generator=generator)
        labels = torch.multinomial((scale_of(measures) * cosines).softmax(1), 1, generator=generator).flatten()
        answers.append(Answers(cosines, cosines, labels, measures))
    return answers


def test_the_calibration_is_that_of_the_probabilities():
    """Labels drawn from the softmax of known logits: the coefficients found are those they were drawn with."""

    def scale_of(measures: TaskMeasures) -> float:
        return math.exp(1.5 + 0.3 * measures.ways + 0.4 * measures.shots - 0.5 * measures.spread)

    answers = draw_answers(150, torch.Generator().manual_seed(0), scale_of)
    found = fit_calibration(answers)
    for answer in answers[:20]:
        assert found.scale_of(answer.measures) == pytest.approx(scale_of(answer.measures), rel=0.1)
    constant = fit_calibration(answers, constant_only=True)
    assert (constant.ways, constant.shots, constant.spread) == (0, 0, 0)
    assert mean_loss(found, answers) < mean_loss(constant, answers)
    by_hand = [F.cross_entropy(found.scale_of(a.measures) * a.cosines, a.labels) for a in answers]
    assert mean_loss(found, answers) == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-5)


def test_rejection_is_that_of_the_probabilities():
    """Images are made unknown with probabilities of a known form, which is found again."""
    generator = torch.Generator().manual_seed(0)
    answers = draw_answers(150, generator, lambda measures: 6.0)
    calibration = fit_calibration(answers, constant_only=True)
    drawn = []
    for answer in answers:
        scale = calibration.scale_of(answer.measures)
        nearness = 0.3 * math.exp(-answer.measures.spread)
        true = Rejection(-1.0 - nearness, 0.6, nearness)
        known = true.compute_known(scale * answer.cosines, scale)
        is_known = torch.rand(len(known), generator=generator) < known
        labels = torch.where(is_known, answer.labels, UNKNOWN)
        drawn.append(Answers(answer.cosines, answer.cosines, labels, answer.measures))
    found = fit_rejection(drawn, calibration)
    assert found.odds == pytest.approx(0.6, abs=0.1)
    assert found.distance == pytest.approx(-0.3, abs=0.1)
    for name in ("ways", "shots", "spread"):
        assert abs(getattr(found, name)) < 0.1, name


def test_rejection_needs_images_of_other_classes():
    answers = draw_answers(3, torch.Generator().manual_seed(0), lambda measures: 6.0)
    with pytest.raises(ValueError, match="give one with more"):
        fit_rejection(answers, fit_calibration(answers, constant_only=True))


def test_log_odds_are_of_the_best_class():
    logits = torch.tensor([[0.5, 2.0, 1.0]])
    best = logits.softmax(1).max()
    torch.testing.assert_close(compute_log_odds(logits), torch.log(best / (1 - best)).unsqueeze(0))


def test_images_of_other_classes():
    labels = torch.arange(6).repeat_interleave(10)
    domain = Domain("d", torch.zeros(60, 3, 4, 4, dtype=torch.uint8), labels, [str(c) for c in range(6)])
    episode = cdfsl_episode(domain, 3, n_way=4, n_shot=2, n_query=5)
    others = draw_others(domain, episode, seed=1)
    assert len(others) == len(episode.query)
    assert not set(labels[others].tolist()) & set(episode.classes.tolist())
    np.testing.assert_array_equal(others, draw_others(domain, episode, seed=1))
    assert len(draw_others(domain, cdfsl_episode(domain, 0, n_way=6, n_shot=2, n_query=5), seed=1)) == 0
