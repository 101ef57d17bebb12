"""The parts of the page without a browser: what is uploaded, what is said of it, and the example set."""

from __future__ import annotations

import PIL.Image
import pytest

from hf_hyperflow.demo.digits import sample_digits, write_digits
from hf_hyperflow.demo.html import comparison
from hf_hyperflow.demo.report import describe, plot_flow
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
    text, figure = describe(session), plot_flow(session)
    assert text.startswith(f"Adapted to 3 classes from {3 * n_shot} images in ")
    assert "with 4 function evaluations" in text
    if n_shot == 1:
        assert "single image" in text
        assert figure is None
    else:
        assert "leave-one-out accuracy on your images" in text.lower()
        [axis] = figure.axes
        curve, _ = axis.lines
        assert list(curve.get_xdata()) == [0, 0.25, 0.5, 0.75, 1]


def test_before_is_direct_transfer_and_the_backbone_is_shared():
    backbone = tiny_dinov2()
    adapter = tiny_adapter(backbone)
    models, support = SharedModels(adapter, backbone), pictures(n_way=3, n_shot=2)
    session, _ = models.adapt(support)
    query = [images[0] for images in pictures(n_way=3, n_shot=1, seed=5).values()]
    before, after = models.compare(session, query)
    assert before == adapter.direct_transfer(backbone, support)(query, top_k=3)
    assert after == adapter.adapt(backbone, support, early_stopping=True)(query, top_k=3)


def test_predictions_side_by_side_are_escaped():
    def scores(label: str) -> list[dict]:
        return [{"label": label, "score": 0.75}, {"label": "z", "score": 0.25}]

    images = [PIL.Image.new("RGB", (9, 9)), PIL.Image.new("RGB", (9, 9))]
    table = comparison(["<i>.png", "b.png"], images, [scores("<b>"), scores("c")], [scores("<b>"), scores("d")])
    assert "changed the label of 1 of 2 images" in table
    assert table.count("hf-changed") == 1
    assert "<b>" not in table
    assert "<i>" not in table
    assert table.count("&lt;b&gt;") == 2
    assert table.count("75%") == 8  # each as a bar and as a number


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
    assert query[:3] == [tmp_path / name for name in ("new-0-1.png", "new-0-2.png", "new-1-1.png")]
    assert {PIL.Image.open(path).size for path in (*support["7"], *query)} == {(96, 96)}
