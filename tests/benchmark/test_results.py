from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from hf_hyperflow.benchmark.bench.measure import TaskCost
from hf_hyperflow.benchmark.cost_file import CostKey
from hf_hyperflow.benchmark.episode_log import EpisodeResult
from hf_hyperflow.benchmark.evaluation import mean_ci95
from hf_hyperflow.benchmark.results import average_over_domains, build_cost_key, summarise


def rows(
    domain: str, method: str, accuracies: list[float], n_shot: int | None = 5, n_way: int = 5
) -> list[EpisodeResult]:
    n_support = n_way * (n_shot or 3)
    return [EpisodeResult(domain, n_shot, method, i, n_way, n_support, 10, a) for i, a in enumerate(accuracies)]


@pytest.fixture
def accuracies() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    direct = generator.uniform(40, 80, 50)
    return {
        "direct": direct,
        "hyperflow": direct + generator.normal(2, 1, 50),
        "bias": (direct + generator.normal(1, 3, 50))[:10],
    }


def test_differences_are_paired_on_the_episodes_of_both(accuracies):
    results = summarise([r for method, a in accuracies.items() for r in rows("a", method, a.tolist())], {})
    direct, hyperflow, bias = results.records
    assert [r.method for r in results.records] == ["direct", "hyperflow", "bias"]
    assert (direct.diff_vs_direct, direct.diff_n_episodes) == (None, None)
    for record, method in ((hyperflow, "hyperflow"), (bias, "bias")):
        mean, half = mean_ci95(accuracies[method] - accuracies["direct"][: len(accuracies[method])])
        assert (record.diff_vs_direct, record.diff_ci95) == pytest.approx((mean, half), abs=1e-4)
        assert record.diff_n_episodes == record.n_episodes == len(accuracies[method])
    assert hyperflow.diff_ci95 < hyperflow.ci95 / 5
    against = {r.method: r for r in results.hyperflow_against if r.domain == "a"}
    assert set(against) == {"direct", "bias"}
    mean, half = mean_ci95(accuracies["hyperflow"][:10] - accuracies["bias"])
    assert (against["bias"].diff, against["bias"].diff_ci95) == pytest.approx((mean, half), abs=1e-4)
    assert against["bias"].n_episodes == 10


def test_only_common_episodes_are_compared():
    few = rows("a", "direct", [10.0, 20.0, 30.0])[1:] + rows("a", "bias", [50.0, 21.0])
    (_, bias) = summarise(few, {}).records
    assert (bias.diff_vs_direct, bias.diff_n_episodes, bias.diff_ci95) == (1.0, 1, None)
    apart = rows("a", "direct", [10.0])[:1] + rows("a", "bias", [50.0, 21.0])[1:]
    assert summarise(apart, {}).records[1].diff_vs_direct is None


def test_domains_count_the_same_in_the_mean(accuracies):
    many = [r for m in ("direct", "hyperflow") for r in rows("a", m, accuracies[m].tolist())]
    many += rows("b", "direct", [50.0, 60.0]) + rows("b", "hyperflow", [40.0, 52.0], n_way=3)
    results = summarise(many, {})
    mean = next(m for m in results.means if m.method == "hyperflow")
    gain, half = mean_ci95(accuracies["hyperflow"] - accuracies["direct"])
    gain_b, half_b = mean_ci95([-10.0, -8.0])
    assert mean.diff_vs_direct == pytest.approx((gain + gain_b) / 2, abs=1e-3)
    assert mean.diff_ci95 == pytest.approx(np.hypot(half, half_b) / 2, abs=1e-3)
    assert (mean.n_domains, mean.n_episodes) == (2, 52)
    overall = next(r for r in results.hyperflow_against if r.domain is None)
    assert (overall.diff, overall.diff_ci95) == (mean.diff_vs_direct, mean.diff_ci95)


def test_points_of_the_flow_are_compared_on_their_episodes():
    episodes = rows("a", "direct", [50.0, 60.0, 70.0]) + rows("a", "hyperflow t=0.5", [51.0, 63.0])
    episodes += rows("a", "hyperflow steps=16", [52.0, 64.0])
    results = summarise(episodes, {})
    assert [r.method for r in results.records] == ["direct"]
    steps, time = results.flow
    assert (time.along, time.value, time.diff_vs_direct) == ("t", 0.5, 2.0)
    assert (steps.along, steps.value, steps.diff_vs_direct) == ("steps", 16.0, 3.0)
    assert steps.diff_vs_hyperflow is None
    steps, time = summarise(episodes + rows("a", "hyperflow", [54.0, 64.0, 90.0]), {}).flow
    assert (time.diff_vs_hyperflow, steps.diff_vs_hyperflow) == (-2.0, -1.0)
    assert steps.diff_vs_hyperflow_ci95 == pytest.approx(mean_ci95([-2.0, 0.0])[1], abs=1e-4)


def test_costs_and_variable_shots():
    cost = TaskCost(seconds_per_task=1.5, peak_memory_mb=3.0, flops_per_task=7, flops_per_prediction=2)
    episodes = rows("a", "direct", [50.0, 60.0], n_shot=None, n_way=7) + rows("a", "direct", [1.0], n_shot=None)
    assert build_cost_key(episodes) == CostKey("direct", 7, 21)
    (record,) = summarise(episodes, {CostKey("direct", 7, 21): cost}).records
    assert (record.seconds_per_task, record.flops_per_prediction) == (1.5, 2)
    assert record.n_shot is None
    (record,) = summarise(episodes, {}).records
    assert record.flops_per_task is None
    json.dumps(summarise(episodes, {}).to_json(), allow_nan=False)


def test_log_losses_are_paired_and_errors_pooled():
    generator = np.random.default_rng(1)
    episodes, losses, gaps = [], {}, generator.normal(0, 0.1, (4, 10))
    for domain in "ab":
        for method, shift in (("direct", 1.5), ("hyperflow", 1.2)):
            losses[domain, method] = generator.normal(shift, 0.1, 4)
            for row, loss, gap in zip(rows(domain, method, [50.0] * 4), losses[domain, method], gaps, strict=True):
                episodes.append(replace(row, log_loss=float(loss), confidence_gaps=tuple(gap)))
        episodes += rows(domain, "easyfsl-finetune", [50.0] * 4)
    results = summarise(episodes, {})
    direct, hyperflow, without = results.records[:3]
    assert direct.log_loss == pytest.approx(losses["a", "direct"].mean(), abs=1e-4)
    assert direct.log_loss_vs_direct is None
    mean, half = mean_ci95(losses["a", "hyperflow"] - losses["a", "direct"])
    found = (hyperflow.log_loss_vs_direct, hyperflow.log_loss_vs_direct_ci95)
    assert found == pytest.approx((mean, half), abs=1e-4)
    assert hyperflow.ece == pytest.approx(np.abs(gaps.mean(axis=0)).sum(), abs=1e-4)
    assert (without.log_loss, without.log_loss_vs_direct, without.ece) == (None, None, None)
    mean = next(m for m in results.means if m.method == "hyperflow")
    other, half_b = mean_ci95(losses["b", "hyperflow"] - losses["b", "direct"])
    assert mean.log_loss_vs_direct == pytest.approx((found[0] + other) / 2, abs=1e-4)
    assert mean.log_loss_vs_direct_ci95 == pytest.approx(np.hypot(half, half_b) / 2, abs=1e-4)
    assert mean.ece == hyperflow.ece
    without = next(m for m in results.means if m.method == "easyfsl-finetune")
    assert (without.log_loss, without.ece) == (None, None)


def test_tuned_features_in_the_adapter_s_head_cost_what_tuning_costs():
    assert (
        build_cost_key(rows("a", "bias-head", [50.0]))
        == build_cost_key(rows("a", "bias", [60.0]))
        == CostKey("bias", 5, 25)
    )


def test_the_json_has_the_fields_of_the_records():
    episodes = rows("a", "direct", [50.0]) + rows("a", "hyperflow", [51.0]) + rows("a", "hyperflow t=1", [51.0])
    content = summarise(episodes, {}).to_json()
    assert list(content) == ["records", "means", "hyperflow_against", "flow"]
    assert list(content["records"][0])[:6] == ["method", "domain", "n_way", "n_shot", "n_episodes", "accuracy"]
    domain, mean = content["hyperflow_against"]
    assert (domain["domain"], mean["domain"]) == ("a", None)
    assert set(mean) - set(domain) == {"n_domains"}


def test_an_interval_that_a_domain_lacks():
    assert average_over_domains([1.0, 2.0], [3.0, 4.0]) == (1.5, 2.5)
    assert average_over_domains([1.0, 2.0], [3.0, None]) == (1.5, None)
