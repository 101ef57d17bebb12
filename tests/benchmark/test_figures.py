from __future__ import annotations

import pytest

from hf_hyperflow.benchmark.figures import COLOURS, draw_accuracy_cost, draw_gain, draw_shots
from hf_hyperflow.benchmark.results import COST_FIELDS, cost_key, summarise


def results() -> dict:
    """Two methods at 1 and 5 shots, and bias tuning at 5 shots only, on fewer episodes."""
    rows = [
        {"domain": d, "n_shot": shots, "method": method, "index": i, "accuracy": 50.0 + i + shift}
        | {"n_way": 5, "n_support": 5 * shots, "n_query": 10}
        for d in "ab"
        for shots in (1, 5)
        for method, shift, n in (("direct", 0, 6), ("hyperflow", 2, 6), ("bias", 1, 3))
        if (shots, method) != (1, "bias")
        for i in range(n)
    ]
    costs = {cost_key([row]): dict.fromkeys(COST_FIELDS, 1.0) for row in rows}
    return summarise(rows, costs)


@pytest.mark.parametrize("draw", [draw_accuracy_cost, draw_gain])
def test_every_method_is_named_once(draw):
    figure = draw(results())
    (legend,) = figure.legends
    methods = {"direct", "hyperflow", "bias"} - ({"direct"} if draw is draw_gain else set())
    assert sorted(text.get_text() for text in legend.get_texts()) == sorted(methods)


def test_fewer_episodes_are_drawn_by_their_paired_difference():
    """Direct transfer has 52.5 on all six episodes, bias tuning 1 more on the first three."""
    (axis,) = draw_shots(results()).axes
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert list(lines["bias"].get_xdata()) == ["5-shot"]
    assert list(lines["bias"].get_ydata()) == [53.5]
    assert list(lines["hyperflow"].get_ydata()) == [54.5, 54.5]
    assert lines["bias"].get_color() == COLOURS["bias"]
