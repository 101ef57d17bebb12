"""`hyperflow scale`."""

from __future__ import annotations

import json

import pytest


@pytest.mark.slow
def test_scale(hyperflow, saved, tmp_path):
    pair = ["--adapter", saved / "adapter", "--backbone", saved / "backbone"]
    done = hyperflow("scale", *pair, "--n_tasks", "1", "--n_tasks", "2", "--json", "--figure", "cost.png")
    assert done.code == 0, done.err
    records = json.loads(done.out)
    assert [record["n_tasks"] for record in records] == [1, 2]
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
    said = hyperflow("scale", *pair, "--n_tasks", "2").out
    for words in ("tasks/s", "by another one. Save a task:", "in a mixed batch", "On paper, a million such tasks take"):
        assert words in said
