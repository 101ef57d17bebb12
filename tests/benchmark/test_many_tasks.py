from __future__ import annotations

import pytest

from hf_hyperflow.benchmark.many_tasks import draw_many_tasks, extend_to_a_million, measure_many_tasks
from tests.helpers.tiny import Snapshot, tiny_dinov2


def test_every_number_of_tasks_is_measured(adapter, tmp_path):
    before = Snapshot(tiny_dinov2())
    first, second = measure_many_tasks(adapter, before.model, [1, 3], n_way=2, n_shot=2)
    before.assert_unchanged()
    assert (first.n_tasks, second.n_tasks, second.n_way, second.n_shot, second.device) == (1, 3, 2, 2, "cpu")
    assert (first.n_mixed, second.n_mixed) == (1, 3)
    for record in (first, second):
        seconds = {name: value for name, value in vars(record).items() if name.startswith("seconds_")}
        assert len(seconds) == 9
        assert all(value > 0 for value in seconds.values()), seconds
        assert record.tasks_per_second == record.n_tasks / record.seconds_adapt_many
        assert record.bytes_memory == 2 * adapter.space.n_tokens * adapter.space.token_dim + 4 * 2 * 32
        assert record.bytes_disk > record.bytes_memory  # the labels, the config, the card, ...
    assert f"{second.bytes_disk / 1000:,.0f} GB on disk" in extend_to_a_million(second)
    figure = draw_many_tasks([first, second])
    figure.savefig(tmp_path / "figure.png")
    time_axis, bytes_axis = figure.axes
    assert [line.get_label() for line in time_axis.lines][::2] == [
        "adapt in a loop",
        "adapt_many",
        "one forward pass over the images",
    ]
    assert time_axis.lines[2].get_ydata()[1] == second.seconds_adapt_many
    assert bytes_axis.lines[1].get_ydata()[1] == pytest.approx(1e6 * second.bytes_disk / 2**20)


@pytest.mark.parametrize("arguments", [{"n_tasks": [0]}, {"n_tasks": []}, {"n_way": 1}, {"n_shot": 0}])
def test_nothing_to_measure(adapter, backbone, arguments):
    with pytest.raises(ValueError, match="give at least one task, two classes and one image of each"):
        measure_many_tasks(adapter, backbone, **{"n_tasks": [1]} | arguments)
