"""The images of the demo: what is drawn is what the label says, and every run draws the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from fontTools.ttLib import TTFont

from hf_hyperflow.data.domains import load_domain
from tests.helpers.modules import run_module
from tests.helpers.tiny import tiny_processor
from training.demo import images as demo_images
from training.demo.images import SCRIPTS, UNSEEN_SCRIPTS, choose_characters, draw_glyph, fonts_with


def options(folder: Path, seed: int = 0) -> list[str]:
    numbers = ["--max_classes", 6, "--images_per_class", 3, "--seed", seed]
    return [*map(str, numbers), "--output_dir", str(folder)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    done = run_module("training.demo.images", *options(folder))
    assert done.returncode == 0, done.stderr
    assert "unseen/digits.parquet: 10 classes, 30 images" in done.stdout
    return folder


@pytest.mark.parametrize("script", list(SCRIPTS))
def test_characters_have_glyphs_and_look_different(script):
    characters = choose_characters(script, 24)
    assert 20 <= len(set(characters)) == len(characters) <= 24
    drawn = []
    for character in characters:
        path = fonts_with(character)[0]
        ink = np.asarray(draw_glyph(character, path, 48, stroke=0), dtype=float)
        assert ink.sum() > 20 * 255
        assert (ink[[0, -1]] == 0).all()  # nothing is cut off
        assert (ink[:, [0, -1]] == 0).all()
        drawn.append(ink)
    for i, ink in enumerate(drawn):
        for other in drawn[:i]:
            assert np.abs(ink - other).sum() > 0.1 * (ink + other).sum()


def test_no_font_draws_a_box_for_a_missing_character():
    cmaps = {path: TTFont(path, lazy=True).getBestCmap() for path in demo_images.find_fonts()}
    assert len(cmaps) > 15
    for script in SCRIPTS:
        for character in choose_characters(script, 24):
            for path in fonts_with(character):
                assert cmaps[path].get(ord(character), ".notdef") != ".notdef", (character, path)


def test_an_image_depends_on_seed_script_character_and_number_alone(tmp_path):
    arguments = demo_images.Arguments(str(tmp_path), max_classes=3, images_per_class=2)
    images = list(demo_images.script_images("hebrew", arguments))
    assert [character for _, character in images] == [c for c in choose_characters("hebrew", 3) for _ in range(2)]
    alone = demo_images.draw_image(images[3][1], np.random.default_rng([0, *b"hebrew", ord(images[3][1]), 1]))
    assert np.array_equal(np.asarray(images[3][0]), np.asarray(alone))
    assert not np.array_equal(np.asarray(images[2][0]), np.asarray(alone))


@pytest.mark.slow
def test_domains_are_read_as_they_were_drawn(data):
    domains = {path.stem: load_domain(path, tiny_processor()) for path in data.glob("*/*.parquet")}
    assert set(domains) == {*SCRIPTS, demo_images.DIGITS}
    assert {path.stem for path in (data / "unseen").iterdir()} == {*UNSEEN_SCRIPTS, demo_images.DIGITS}
    for name, domain in domains.items():
        expected = list("0123456789") if name == demo_images.DIGITS else choose_characters(name, 6)
        assert domain.class_names == expected
        assert all(len(rows) == 3 for rows in domain.indices_by_class())
        assert domain.images.float().flatten(1).std(dim=1).min() > 5  # something is to be seen on every image
        assert len(domain.images.flatten(1).unique(dim=0)) == len(domain)
    generator = np.random.default_rng([0, *b"hebrew", ord("א"), 1])
    rows = Dataset.from_parquet(str(data / "train" / "hebrew.parquet"))
    assert rows.features["label"].int2str(rows["label"][1]) == "א"
    assert np.array_equal(np.asarray(rows[1]["image"]), np.asarray(demo_images.draw_image("א", generator)))


@pytest.mark.slow
def test_made_once_and_always_the_same(data, tmp_path, capsys):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in data.glob("*/*.parquet")}
    demo_images.main(options(data))
    assert "is complete" in capsys.readouterr().out
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before
    next(iter(before)).unlink()  # as if interrupted
    demo_images.main(options(data))
    assert {path: path.read_bytes() for path in before} == {path: content for path, (_, content) in before.items()}
    demo_images.main(options(tmp_path, seed=1))
    name = "train/greek_small.parquet"
    assert (tmp_path / name).read_bytes() != (data / name).read_bytes()
    assert json.loads((tmp_path / "made.json").read_text())["seed"] == 1
