"""`hyperflow predict`."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
import pytest
from transformers import AutoModel

from hf_hyperflow import AdaptedTask, CheckpointError
from hf_hyperflow.cli.images import ImageReader
from hf_hyperflow.cli.loading import folder_first
from hf_hyperflow.cli.predict import Result, print_csv, print_json, print_lines
from hf_hyperflow.cli.printing import print_line
from hf_hyperflow.modeling.checksums import sha256
from hf_hyperflow.modeling.hub import fetch
from tests.cli.running import Outcome, fails


def test_predictions_are_those_of_the_library(saved, hyperflow):
    images = sorted(str(p) for p in (saved / "new").iterdir())
    backbone = AutoModel.from_pretrained(saved / "backbone").eval()
    expected = AdaptedTask.from_pretrained(saved / "task", backbone)(images)
    printed = hyperflow("predict", "--task", saved / "task", "--top_k", "9", "--json", *images)
    assert printed.code == 0, printed.err
    records = json.loads(printed.out)
    assert [record["image"] for record in records] == images
    for record, predictions in zip(records, expected, strict=True):
        scores = {p["label"]: p["score"] for p in record["predictions"]}
        assert scores == pytest.approx({p["label"]: p["score"] for p in predictions}, abs=1e-5)
        assert list(scores.values()) == sorted(scores.values(), reverse=True)

    # The other formats say the same of the best class, which is ahead by far in these pictures of one colour each.
    rows = list(csv.DictReader(io.StringIO(hyperflow("predict", "--task", saved / "task", "--csv", *images).out)))
    assert len(rows) == len(images)
    for row, image, predictions in zip(rows, images, expected, strict=True):
        best, second = predictions[:2]
        assert best["score"] > second["score"] + 0.01
        assert (row["image"], row["rank"], row["label"]) == (image, "1", best["label"])
        assert float(row["score"]) == pytest.approx(best["score"], abs=1e-5)
    lines = hyperflow("predict", "--task", saved / "task", images[0], images[0]).out.splitlines()
    assert len(lines) == 2
    for line in lines:
        name, label, score = line.rsplit(" ", 2)
        assert (name, label) == (f"{images[0]}:", expected[0][0]["label"])
        assert float(score.removesuffix("%")) == pytest.approx(100 * expected[0][0]["score"], abs=0.06)


@pytest.fixture
def photos(saved, tmp_path):
    """Folders in folders, with files that are no images, a link round and what file managers leave behind."""
    folder = tmp_path / "photos"
    (folder / "2025" / "may").mkdir(parents=True)
    shutil.copy(saved / "new/red.png", folder / "a.png")
    shutil.copy(saved / "new/green.png", folder / "2025" / "b.png")
    shutil.copy(saved / "new/blue.png", folder / "2025" / "may" / "without-an-ending")
    (folder / "notes.txt").write_text("no photo")
    (folder / "2025" / "again").symlink_to(folder)
    (folder / "__MACOSX").mkdir()
    shutil.copy(saved / "new/red.png", folder / "__MACOSX" / "a.png")
    shutil.copy(saved / "new/red.png", folder / ".hidden.png")
    return folder


def predict_labels(done: Outcome) -> list[tuple[str, str]]:
    """The images and their best labels, of results as JSON."""
    return [(record["image"], record["predictions"][0]["label"]) for record in json.loads(done.out)]


def test_folders_and_patterns(saved, hyperflow, photos):
    predicting = ["predict", "--task", saved / "task", "--json"]
    done = hyperflow(*predicting, "photos", "photos/a.png")
    assert done.code == 0, done.err
    in_folder = [("photos/2025/b.png", "green"), ("photos/2025/may/without-an-ending", "blue"), ("photos/a.png", "red")]
    assert predict_labels(done) == [*in_folder, ("photos/a.png", "red")]
    assert done.err == "left out, no images: photos/notes.txt\n"
    (photos / "2025" / "again").unlink()
    done = hyperflow(*predicting, "photos/2025/**/*", "photos/?.png")  # no shell has expanded these
    assert done.code == 0, done.err
    assert predict_labels(done)[-1] == ("photos/a.png", "red")
    assert in_folder[0] in predict_labels(done)
    assert len(set(predict_labels(done))) == len(predict_labels(done))
    (photos / "a[1].png").write_bytes((photos / "a.png").read_bytes())  # as browsers name a second download
    assert predict_labels(hyperflow(*predicting, "photos/a[1].png")) == [("photos/a[1].png", "red")]


def test_bad_images_are_named_and_the_others_classified(saved, hyperflow, tmp_path):
    good, bad = str(saved / "new/red.png"), str(tmp_path / "bad.png")
    (tmp_path / "bad.png").write_bytes(Path(good).read_bytes()[:99])
    (tmp_path / "empty").mkdir()
    arguments = ["predict", "--task", saved / "task", "--json", good, bad, "nowhere.png", "*.gif", "empty", good]
    done = hyperflow(*arguments)
    assert done.code == 1
    assert predict_labels(done) == [(good, "red"), (good, "red")]
    *said, last = done.err.splitlines()
    assert last.startswith("error: 4 files or folders could not be read, see above. 2 images were read")
    assert said[:2] == ["error: no file is named like *.gif.", "error: the folder empty has no images."]
    assert said[2].startswith(f"error: {bad} cannot be read as an image")
    assert said[3:] == ["error: nowhere.png: there is no file nowhere.png."]
    skipped = hyperflow(*arguments, "--skip_bad")
    assert (skipped.code, skipped.out) == (0, done.out)
    assert [line.split(":")[0] for line in skipped.err.splitlines()] == ["skipped"] * 4
    nothing = hyperflow(*arguments[:4], "--skip_bad", bad)
    assert (nothing.code, nothing.out) == (1, "[]\n")
    assert nothing.err.splitlines()[-1] == "error: none of the images can be read."


@pytest.mark.parametrize("print_results", [print_lines, print_csv, print_json])
def test_results_are_printed_as_they_come(capfd, print_results):
    def work() -> Iterator[Result]:
        for number in range(3):
            yield Result(f"{number}.png", [{"label": "cat", "score": 0.5}])
            seen.append(capfd.readouterr().out)
            assert f"{number}.png" in seen[-1]
        raise ValueError("in the middle")

    seen: list[str] = []
    with pytest.raises(ValueError, match="in the middle"):
        print_results(work())
    if print_results is print_json:
        assert len(json.loads("".join(seen) + capfd.readouterr().out)) == 3


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_a_terminal_and_not_in_the_results(saved, monkeypatch, capsys):
    files = sorted(str(path) for path in (saved / "pictures").rglob("*.png"))
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for decoded in ImageReader(skip_bad=False).read(files):
        for number in decoded:
            print_line(files[number])
    assert capsys.readouterr().out.splitlines() == files
    assert "0/9" in terminal.getvalue()


def test_what_is_no_task(hyperflow, saved):
    image = saved / "new/red.png"
    fails(hyperflow("predict", "--task", saved / "task", "--backbone", saved / "vit", image), "ViTModel", "no modules")
    fails(hyperflow("predict", "--task", saved / "adapter", image), "is a HyperFlow adapter, not an adapted task")
    fails(hyperflow("predict", "--task", saved / "new", image), "is a folder of images, not an adapted task")
    fails(hyperflow("predict", "--task", image, image), f"{image} is a file. Give the folder.")


def test_there_is_no_folder_comes_before_the_hub(hyperflow, saved):
    for arguments in (["--task", "nowhere"], ["--task", saved / "task", "--backbone", "./my/vit"]):
        done = hyperflow("predict", *arguments, saved / "new")
        fails(done, f"error: there is no folder {arguments[-1]}.")
        assert "Hub" not in done.err
    # A name that could be one on the Hub.
    message = "^cannot load my/task: there is no folder my/task, the Hub is switched off"
    with pytest.raises(CheckpointError, match=message), folder_first("my/task"):
        fetch("my/task", local_files_only=True)


def test_file_names_of_any_bytes(hyperflow, saved, tmp_path):
    """A file name that is no UTF-8 is printed as it is."""
    PIL.Image.open(saved / "new/red.png").save(os.fsencode(tmp_path) + b"/\xff.png", format="png")
    found = hyperflow("predict", "--task", saved / "task", os.fsdecode(b"\xff.png"))
    assert found.code == 0, found.err
    assert (tmp_path / "output-0" / "out").read_bytes().startswith(b"\xff.png: red ")


def name_backbone(task: Path, name: str) -> None:
    """Put another name into the PEFT config of a saved task, and its new digest into the list of digests."""
    path, checksums = task / "adapter_config.json", task / "checksums.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))
    digests = json.loads(checksums.read_text())
    checksums.write_text(json.dumps(digests | {path.name: sha256(path)}))


def test_a_task_without_the_name_of_its_backbone(saved, hyperflow, tmp_path):
    """As it comes from the Hub, where nobody has this folder."""
    shutil.copytree(saved / "task", tmp_path / "task")
    name_backbone(tmp_path / "task", "")
    image = saved / "new/red.png"
    fails(hyperflow("predict", "--task", "task", image), "task does not name its backbone", "give it with --backbone")
    assert "unnamed" in hyperflow("info", "task").out
    assert hyperflow("predict", "--task", "task", "--backbone", saved / "backbone", image).code == 0
    name_backbone(tmp_path / "task", "/somebody/elses/folder")
    fails(hyperflow("predict", "--task", "task", image), "/somebody/elses/folder", "name it with --backbone")
