from __future__ import annotations

import pytest

from hf_hyperflow.benchmark.bench.measure import TaskCost
from hf_hyperflow.benchmark.episode_log import EpisodeResult
from hf_hyperflow.benchmark.figures import STYLES, choose_styles, draw_accuracy_cost, draw_flow, draw_gain, draw_shots
from hf_hyperflow.benchmark.methods import list_labels
from hf_hyperflow.benchmark.records import Results
from hf_hyperflow.benchmark.results import build_cost_key, summarise

LABELS = list_labels()


def rows(domain: str, n_shot: int, method: str, gain: float, n_episodes: int) -> list[EpisodeResult]:
    """Direct transfer has 50, 51, 52, ... %."""
    return [EpisodeResult(domain, n_shot, method, i, 5, 5 * n_shot, 10, 50.0 + i + gain) for i in range(n_episodes)]


@pytest.fixture
def results() -> Results:
    """Two methods at 1 and 5 shots, bias tuning at 5 shots only and on fewer episodes, and points of the flow."""
    episodes = []
    for domain in "ab":
        for n_shot in (1, 5):
            episodes += rows(domain, n_shot, "direct", 0, 6) + rows(domain, n_shot, "hyperflow", 2, 6)
        episodes += rows(domain, 5, "bias", 1, 3)
        for t in (0, 0.5, 1):
            episodes += rows(domain, 5, f"hyperflow t={t:g}", 2 * t, 6)
    costs = {build_cost_key([row]): TaskCost(1.0, 1.0, 1, 1) for row in episodes}
    return summarise(episodes, costs)


@pytest.mark.parametrize("draw", [draw_accuracy_cost, draw_gain])
def test_every_method_is_labelled_once(results, draw):
    (legend,) = draw(results).legends
    methods = {"direct", "hyperflow", "bias"}
    if draw is draw_gain:
        methods.remove("direct")
    assert sorted(text.get_text() for text in legend.get_texts()) == sorted(LABELS[method] for method in methods)


def test_fewer_episodes_are_drawn_by_their_paired_difference(results):
    """Direct transfer has 52.5 on all six episodes, bias tuning 1 more on the first three."""
    (axis,) = draw_shots(results).axes
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert list(lines[LABELS["bias"]].get_xdata()) == ["5-shot"]
    assert list(lines[LABELS["bias"]].get_ydata()) == [53.5]
    assert list(lines[LABELS["hyperflow"]].get_ydata()) == [54.5, 54.5]
    assert lines[LABELS["bias"]].get_color() == STYLES["bias"].colour


def test_gains_along_the_flow(results):
    time_axis, steps_axis = draw_flow(results).axes
    line = time_axis.get_lines()[0]
    assert list(line.get_xdata()) == [0, 0.5, 1]
    assert list(line.get_ydata()) == [0, 1, 2]
    assert len(steps_axis.get_lines()) == 1  # the zero alone


def test_methods_have_styles_of_their_own():
    assert set(STYLES) == set(LABELS)
    assert len({style.colour for style in STYLES.values()}) == len(LABELS)


@pytest.mark.parametrize("n_new", [1, 2, 30])
def test_new_methods_have_styles_of_their_own_too(n_new):
    methods = [*LABELS, *(f"new-{i}" for i in range(n_new))]
    styles = choose_styles(methods)
    assert list(styles) == methods
    assert len(set(styles.values())) == len(methods)
    assert styles["direct"] == STYLES["direct"]
