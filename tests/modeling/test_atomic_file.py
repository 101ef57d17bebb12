from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_hyperflow import CheckpointError
from hf_hyperflow.modeling.atomic_file import atomic_file, write_json
from tests.helpers.kills import ends_when_killed_before


@pytest.mark.parametrize("to_file", [atomic_file, write_json], ids=["atomic_file", "write_json"])
def test_a_file_killed_before_every_operation(tmp_path, to_file):
    def write(path: Path, text: str) -> None:
        if to_file is write_json:
            write_json(path, text)
        else:
            with atomic_file(path) as draft:
                draft.write_text(text)

    path, contents = tmp_path / "file.json", set()
    write(path, "new")
    new = path.read_text()
    write(path, "old")
    old = path.read_text()
    for k in range(1, 100):
        if ends_when_killed_before(k, tmp_path, lambda: write(path, "new")):
            break
        contents.add(path.read_text())
        write(path, "old")
        assert os.listdir(tmp_path) == ["file.json"]
    assert contents == {old, new}
    assert path.read_text() == new


def test_two_writers_of_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_hyperflow.modeling.atomic_file.WRITER_PATIENCE", 0.1)
    path = tmp_path / "file.json"
    with ThreadPoolExecutor(1) as other:
        with atomic_file(path) as draft:
            draft.write_text("first")
            with pytest.raises(CheckpointError, match=r"another command is writing .*file\.json now"):
                other.submit(write_json, path, "second").result()
        assert path.read_text() == "first"
        other.submit(write_json, path, "second").result()
    assert path.read_text() == '"second"\n'
    assert os.listdir(tmp_path) == ["file.json"]
