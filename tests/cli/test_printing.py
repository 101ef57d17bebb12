"""Names that are not for the terminal, and what is left as it is."""

from __future__ import annotations

import csv
import io
import json
import unicodedata

import pytest

from hf_hyperflow.cli.printing import make_printable
from tests.cli.running import fails
from tests.helpers.tiny import picture

ESCAPE, OVERRIDE = "\x1b[31m\x9b2J", "\u202e"


def is_printable(text: str) -> bool:
    return not any(unicodedata.category(c) in ("Cc", "Zl", "Zp") or c == OVERRIDE for c in text.replace("\n", ""))


@pytest.fixture
def hostile_task(saved, hyperflow, adapting, tmp_path):
    """A task whose labels are formulas; and a hostile name of an image."""
    labels = [f"dog{OVERRIDE}gnp.exe", "=1+1", "-2", "@SUM(A1)", "+3"]
    for number, label in enumerate(labels):
        folder = tmp_path / "support" / label
        folder.mkdir(parents=True)
        picture(number).save(folder / "0.png")
    done = hyperflow(*adapting, "--support", tmp_path / "support", "--output", "task")
    assert done.code == 0, done.err
    name = f"=cmd{ESCAPE}{OVERRIDE}.png"
    picture(0).save(tmp_path / name)
    return sorted(labels), name


@pytest.mark.parametrize("label", [f"cat{ESCAPE}", "two\nlines\u2028three"])
def test_control_characters_in_class_names_are_refused(saved, hyperflow, adapting, tmp_path, label):
    for number, name in enumerate((label, "plain")):
        folder = tmp_path / "support" / name
        folder.mkdir(parents=True)
        picture(number).save(folder / "0.png")
    refused = hyperflow(*adapting, "--support", tmp_path / "support", "--output", "task")
    fails(refused, "control characters", "Rename the class")
    assert is_printable(refused.err)


def test_control_characters_do_not_reach_the_terminal(hyperflow, hostile_task):
    labels, name = hostile_task
    arguments = ["predict", "--task", "task", "--top_k", "9", name]
    for arguments_of_format in (arguments, [*arguments, "--csv"]):
        said = hyperflow(*arguments_of_format)
        assert said.code == 0, said.err
        assert is_printable(said.out)
        assert "=cmd\\x1b[31m\\x9b2J\\u202e.png" in said.out
    failed = hyperflow("predict", "--task", "task", f"nowhere{name}")
    assert failed.code == 1
    assert "nowhere=cmd\\x1b[31m\\x9b2J\\u202e.png" in failed.err
    assert is_printable(failed.err)
    said = hyperflow("--debug", "predict", "--task", f"no{ESCAPE}where", name)
    assert said.code == 1
    assert is_printable(said.err)
    [record] = json.loads(hyperflow(*arguments, "--json").out)
    assert record["image"] == name
    assert sorted(prediction["label"] for prediction in record["predictions"]) == labels


def test_formulas_are_text_in_csv(hyperflow, hostile_task):
    labels, name = hostile_task
    said = hyperflow("predict", "--task", "task", "--top_k", "9", "--csv", name)
    rows = list(csv.DictReader(io.StringIO(said.out)))
    assert len(rows) == len(labels)
    assert {row["label"] for row in rows} == {"dog\\u202egnp.exe", "'=1+1", "'-2", "'@SUM(A1)", "'+3"}
    assert {row["image"][:5] for row in rows} == {"'=cmd"}
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in rows for cell in row.values())
    assert "apostrophe" in hyperflow("predict", "--help").out


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("plain", "plain"),
        ("日本語 é 👩\u200d🔬", "日本語 é 👩\u200d🔬"),
        ("a\tb\r\n", "a\\tb\\r\\n"),
        ("\udcff.png", "\udcff.png"),  # a byte of a file name that is no UTF-8
        ("\udcc2\udc9b", "\\udcc2\\udc9b"),  # bytes that together are a control character
        ("\ud800", "\\ud800"),
        ("\u2066\u0085", "\\u2066\\x85"),
    ],
)
def test_what_terminals_print_is_left(text, printed):
    assert make_printable(text) == printed
