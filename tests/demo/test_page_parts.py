"""The parts of the page without a browser: what is uploaded, what is said of it, and the example set."""

from __future__ import annotations

import re

import PIL.Image
import pytest

from hf_hyperflow.demo.digits import sample_digits, write_digits
from hf_hyperflow.demo.html import Comparison, compare
from hf_hyperflow.demo.report import describe, describe_flow, plot_flow
from hf_hyperflow.demo.sessions import SharedModels
from hf_hyperflow.demo.uploads import PageError, read_classes
from tests.helpers.tiny import picture, pictures, tiny_adapter, tiny_dinov2


@pytest.fixture
def files(tmp_path):
    """Galleries as Gradio gives them: two red pictures, a blue one, and a text that is called a picture."""
    for name in ("red-1.png", "red-2.png", "blue-1.png"):
        picture(1).save(tmp_path / name)
    (tmp_path / "notes.png").write_text("these are notes, not a picture")
    red = [(str(tmp_path / "red-1.png"), None), (str(tmp_path / "red-2.png"), None)]
    return {"red": red, "blue": [(str(tmp_path / "blue-1.png"), None)], "notes": [(str(tmp_path / "notes.png"), None)]}


def test_classes_are_read_and_empty_rows_passed_over(files):
    classes = read_classes([" red ", "", None, "blue"], [files["red"], None, [], files["blue"]])
    assert {name: len(images) for name, images in classes.items()} == {"red": 2, "blue": 1}


@pytest.mark.parametrize(
    ("names", "galleries", "words"),
    [
        (["red", "blue"], ["red", None], "Class 'blue' has no images"),
        (["red", " "], ["red", "blue"], "Class 2 has images but no name"),
        (["red", "red "], ["red", "blue"], "Two classes are called 'red'"),
        (["red", "blue"], ["red", "notes"], "^Class 'blue': notes.png cannot be read as an image"),
    ],
)
def test_what_is_wrong_with_a_class_is_said(files, names, galleries, words, tmp_path):
    with pytest.raises(PageError, match=words) as error:
        read_classes(names, [files.get(gallery) for gallery in galleries])
    assert str(tmp_path) not in str(error.value)  # where the server keeps a file is nobody's business


@pytest.mark.parametrize("n_shot", [1, 3])
def test_an_adaptation_in_words_and_in_a_plot(n_shot):
    backbone = tiny_dinov2()
    session, _ = SharedModels(tiny_adapter(backbone), backbone).adapt(pictures(n_way=3, n_shot=n_shot))
    text, more, plot = describe(session), describe_flow(session), plot_flow(session)
    assert text.startswith("Ready after ")
    assert f": 3 classes from {3 * n_shot} images, without gradients. " in text
    assert more.startswith("The drift network was run 4 times. ")
    if n_shot == 1:
        assert "Give every class a second image" in text
        assert "followed to its end" in more
        assert plot == ""
    else:
        measured = session.leave_one_out
        assert f"{measured.right_before} of 9 right before, {measured.right_after} after." in text
        assert plot.startswith("<svg")
        assert ">1.00</text>" in plot
        assert "#0" not in plot  # every colour is one of the page


def test_right_before_and_after_are_counted_by_leaving_each_image_out():
    """By adapting again without it, to the point where the flow was stopped; an image alone in its class is kept."""
    backbone = tiny_dinov2()
    adapter = tiny_adapter(backbone)
    support = pictures(n_way=4, n_shot=3)
    support["red"][0], support["blue"][0] = support["blue"][0], support["red"][0]  # so that some are wrong
    support["yellow"] = support["yellow"][:1]
    session, _ = SharedModels(adapter, backbone).adapt(support)
    right = 0
    for name, images in support.items():
        for left_out in images if len(images) > 1 else []:
            others = support | {name: [image for image in images if image is not left_out]}
            right += adapter.direct_transfer(backbone, others).predict([left_out]) == [name]
    measured, point = session.leave_one_out, session.stopping_point
    assert 0 < right < 9
    assert (measured.n_images, measured.right_before) == (9, right)
    assert measured.right_after == pytest.approx(9 * point.accuracies[point.time])


def test_before_is_direct_transfer_and_the_backbone_is_shared():
    backbone = tiny_dinov2()
    adapter = tiny_adapter(backbone)
    models, support = SharedModels(adapter, backbone), pictures(n_way=3, n_shot=2)
    session, _ = models.adapt(support)
    query = [images[0] for images in pictures(n_way=3, n_shot=1, seed=5).values()]
    before, after = models.compare(session, query)
    assert before == adapter.direct_transfer(backbone, support)(query, top_k=3)
    assert after == adapter.adapt(backbone, support, early_stopping=True)(query, top_k=3)


def scored(label: str) -> list[dict]:
    return [{"label": label, "score": 0.75}, {"label": "z", "score": 0.25}]


def test_predictions_side_by_side_are_escaped():
    image = PIL.Image.new("RGB", (9, 9))
    rows = [
        Comparison('<i>".png', image, scored("<b>"), scored("<b>"), truth="<b>"),
        Comparison("b.png", image, scored("c"), scored("d")),
    ]
    table = compare(rows, ["<b>", "c", "d", "z"])
    assert "changed the label of 1 of 2 images" in table
    assert table.count("hf-changed") == 1
    assert "<b>" not in table
    assert "<i>" not in table
    assert "&lt;i&gt;&quot;.png" in table
    assert table.count("75%") == 8  # each as a bar and as a number


def test_right_ones_are_counted_as_far_as_the_truth_is_known():
    image = PIL.Image.new("RGB", (9, 9))
    known = [
        Comparison("1.png", image, scored("a"), scored("b"), truth="b"),
        Comparison("2.png", image, scored("b"), scored("b"), truth="b"),
    ]
    unknown = Comparison("3.png", image, scored("a"), scored("b"))
    table = compare([*known, unknown], ["a", "b", "z"])
    words = " ".join(re.sub("<[^>]*>", "", table[: table.index("<table")]).split())
    assert words.startswith("1 of 2 right before, 2 after. The adaptation changed the label of 2 of 3 images.")
    assert re.findall('data-verdict="(.*?)"', table) == ["wrong", "right", "right", "right", "", ""]
    assert table.count('<option value="b" selected>') == 2
    assert 'data-count="known" hidden' in compare([unknown], ["a", "b", "z"])


def test_digits_are_an_episode(tmp_path):
    episode = sample_digits(n_shot=3, n_query=4, seed=1)
    assert list(episode.support) == [str(digit) for digit in range(10)]
    assert {len(shots) for shots in episode.support.values()} == {3}
    assert len(episode.query) == len(episode.query_labels) == 40
    assert episode.query_labels[:5].tolist() == [0, 0, 0, 0, 1]
    again = sample_digits(n_shot=3, n_query=4, seed=1)
    assert [image.tobytes() for image in again.query] == [image.tobytes() for image in episode.query]

    support, query = write_digits(tmp_path)
    assert sum(len(files) for files in support.values()) == 50
    assert query[1:3] == [(tmp_path / "new-0-2.png", "0"), (tmp_path / "new-1-1.png", "1")]
    assert {PIL.Image.open(path).size for path in (*support["7"], *(path for path, _ in query))} == {(96, 96)}
