"""`hyperflow evaluate`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from sklearn.metrics import balanced_accuracy_score, confusion_matrix
from transformers import AutoModel

from hf_hyperflow import AdaptedTask, HyperFlowAdapter
from hf_hyperflow.cli.confusion import Confusion, draw_confusions, print_confusions
from tests.cli.running import fails, names
from tests.helpers.tiny import pictures, write_pictures


@pytest.fixture
def photos(tmp_path):
    """New pictures, some in a wrong folder, so that errors are made, and not equally many in each."""
    folder = write_pictures(tmp_path / "photos", pictures(n_way=3, n_shot=4, seed=5))
    for number in range(3):
        (folder / "red" / f"{number}.png").rename(folder / "blue" / f"was-red-{number}.png")
    (folder / "green" / "3.png").rename(folder / "red" / "was-green.png")
    return folder


def test_the_figures_are_those_of_the_library(saved, hyperflow, photos, tmp_path):
    evaluating = ["evaluate", "--task", saved / "task", "--support", saved / "pictures", photos]
    done = hyperflow(*evaluating, "--json", "--picture", "matrix.png")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["labels"] == ["blue", "green", "red"]
    files = sorted(photos.rglob("*.png"))
    true = [path.parent.name for path in files]
    backbone = AutoModel.from_pretrained(saved / "backbone").eval()
    direct = HyperFlowAdapter.from_pretrained(saved / "adapter").direct_transfer(backbone, saved / "pictures")
    predicted = {"direct_transfer": direct.predict(files)}
    predicted["adapted_task"] = AdaptedTask.from_pretrained(saved / "task", backbone).predict(files)
    for name, labels in predicted.items():
        figures = report[name]
        assert figures["confusion"] == confusion_matrix(true, labels).tolist()
        assert figures["accuracy"] == pytest.approx(100 * np.mean(np.array(true) == labels))
        assert figures["mean_class_accuracy"] == pytest.approx(100 * balanced_accuracy_score(true, labels))
        assert 0 < figures["accuracy"] < 100
        assert [row["n_images"] for row in figures["classes"]] == [7, 3, 2]
        for row, counts in zip(figures["classes"], np.array(figures["confusion"]), strict=True):
            assert row["accuracy"] == pytest.approx(100 * row["n_right"] / counts.sum())
    with PIL.Image.open(tmp_path / "matrix.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**6)) > 10

    # The table says the same.
    said = hyperflow(*evaluating).out
    figures = report["adapted_task"]
    line = f"adapted task: {figures['accuracy']:.1f} % right ({figures['n_right']} of 12), "
    assert f"{line}{figures['mean_class_accuracy']:.1f} % in the mean over classes\n" in said
    rows = [line.split() for line in said.splitlines()]
    direct_figures = report["direct_transfer"]["classes"]
    for number, (row, other) in enumerate(zip(figures["classes"], direct_figures, strict=True)):
        cells = [row["label"], str(row["n_images"]), f"{row['accuracy']:.1f}", "%", f"{other['accuracy']:.1f}", "%"]
        assert cells in rows
        assert [str(number + 1), row["label"], *map(str, figures["confusion"][number])] in rows


def test_folders_that_are_not_the_classes(saved, hyperflow, photos):
    evaluating = ["evaluate", "--task", saved / "task", "--json"]
    shutil.copytree(photos / "red", photos / "violet")
    shutil.rmtree(photos / "green")
    done = hyperflow(*evaluating, photos)
    assert done.code == 0, done.err
    assert "left out, no classes of the task: violet. The task's classes are: blue, green, red.\n" in done.err
    assert "classes without images in" in done.err
    report = json.loads(done.out)
    assert (report["unknown_classes"], report["missing_classes"]) == (["violet"], ["green"])
    assert report["adapted_task"]["classes"][1] == {"label": "green", "n_images": 0, "n_right": 0, "accuracy": None}
    assert report["direct_transfer"] is None
    blue, _, red = (row["accuracy"] for row in report["adapted_task"]["classes"])
    assert report["adapted_task"]["mean_class_accuracy"] == pytest.approx((blue + red) / 2)
    assert "without images" not in hyperflow(*evaluating, saved / "pictures").err
    assert "add --support" in hyperflow(*evaluating[:-1], photos).out

    shutil.rmtree(photos / "red")
    shutil.rmtree(photos / "blue")
    fails(hyperflow(*evaluating, photos), "It has: violet.", "The task's classes are: blue, green, red.")


def test_a_bad_image_is_named_and_the_others_counted(saved, hyperflow, photos):
    bad = photos / "red" / "3.png"
    bad.write_bytes(b"no image")
    done = hyperflow("evaluate", "--task", saved / "task", "--json", photos)
    assert done.code == 1
    assert f"error: {bad} cannot be read" in done.err
    assert json.loads(done.out)["adapted_task"]["n_images"] == 11
    skipped = hyperflow("evaluate", "--task", saved / "task", "--json", "--skip_bad", photos)
    assert (skipped.code, skipped.out) == (0, done.out)


def test_mistaken_folders(saved, hyperflow, photos, tmp_path):
    before = names(tmp_path)
    evaluating = ["evaluate", "--task", saved / "task"]
    fails(hyperflow(*evaluating, "nowhere"), "there is no folder nowhere")
    fails(hyperflow(*evaluating, saved / "adapter"), "is a HyperFlow adapter, not a folder of images")
    fails(hyperflow(*evaluating, photos, "--picture", photos / "red" / "a.png"), "is in the folder of the images")
    (tmp_path / "two").mkdir()
    for name in ("red", "violet"):
        shutil.copytree(photos / "red", tmp_path / "two" / name)
    fails(hyperflow(*evaluating, photos, "--support", "two"), "other classes (differing: blue, green, violet)")
    seen = hyperflow(*evaluating, saved / "pictures", "--support", saved / "pictures")
    assert "warning: 9 of the images are in" in seen.err
    assert names(tmp_path) == before | {"two"}


def test_many_classes(capsys, tmp_path: Path):
    """A matrix that no terminal has room for: the largest confusions instead; the picture has all."""
    counts = np.diag(np.full(30, 5))
    counts[7, 9], counts[2, 1] = 4, 2
    labels = [f"[bold]$class_{number}$" for number in range(30)]  # neither markup nor a formula
    confusion = Confusion("adapted task", labels, counts)
    print_confusions([confusion])
    said = capsys.readouterr().out.splitlines()
    assert [line.split() for line in said[-2:]] == [
        [labels[7], labels[9], "4", "of", "9"],
        [labels[2], labels[1], "2", "of", "7"],
    ]
    draw_confusions([confusion, confusion]).savefig(tmp_path / "many.png")
    assert (tmp_path / "many.png").stat().st_size > 10_000
