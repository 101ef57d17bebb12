"""NaN, infinity and huge numbers in all that a task is made of: its scores are finite, or an error says why not."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

from hf_hyperflow import AdaptedTask, HyperFlowAdapter, ImageError, SupportSetError
from hf_hyperflow.modeling.finite import NotFiniteError
from hf_hyperflow.modeling.lda import RegularisedLDA
from hf_hyperflow.modeling.prototypes import PrototypeClassifier
from tests.helpers.tiny import SIZE, Snapshot, picture, pictures, tiny_adapter, tiny_dinov2

BAD = [float("nan"), float("inf"), float("-inf")]
HUGE = [1e30, -1e30]


def support_tensors(n_way: int = 2, n_shot: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    pixel_values = torch.randn(n_way * n_shot, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    return pixel_values, torch.arange(n_way).repeat_interleave(n_shot)


def require_scores(task: AdaptedTask, pixels: torch.Tensor) -> None:
    """Assert that all that a task says of images is finite."""
    assert task.logits(pixels).isfinite().all()
    scores = task.scores(pixels)
    assert scores.isfinite().all()
    torch.testing.assert_close(scores.sum(1), torch.ones(len(pixels)))


VERDICTS: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def printed_verdicts() -> Iterator[None]:
    """What became of all tasks of which `find_problem` was asked."""
    yield
    print(dict(VERDICTS))


def find_problem(adapt: Callable[[], AdaptedTask], pixels: torch.Tensor) -> str:
    """What the error says if a task cannot be made or used; empty if all is finite."""
    try:
        require_scores(adapt(), pixels)
    except (NotFiniteError, ImageError) as error:
        VERDICTS["clear error"] += 1
        return str(error)
    VERDICTS["right"] += 1
    return ""


def make_lda(adapter: HyperFlowAdapter) -> HyperFlowAdapter:
    adapter.head = RegularisedLDA(32)
    root = torch.randn(32, 32, generator=torch.Generator().manual_seed(5))
    adapter.head.set_prior(root @ root.T / 32, spread=10.0, count=3.0)
    return adapter


# Images


@pytest.mark.parametrize("value", BAD + HUGE)
@pytest.mark.parametrize("door", ["adapt", "direct_transfer"])
def test_support_pixels(backbone, adapter, door, value):
    pixel_values, labels = support_tensors()
    pixel_values[2, 1, 3, 4] = value
    before = Snapshot(backbone)
    with pytest.raises(SupportSetError, match=r"^image 2 has NaN or infinite pixels, or values beyond 1,000,000"):
        getattr(adapter, door)(backbone, (pixel_values, labels))
    before.assert_unchanged()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_support_pixels_in_another_precision(backbone, adapter, dtype):
    pixel_values, labels = support_tensors()
    pixel_values[1] = float("inf")
    with pytest.raises(SupportSetError, match=r"^image 1 has NaN or infinite"):
        adapter.adapt(backbone, (pixel_values.to(dtype), labels))
    wide = support_tensors()[0].double()
    wide[3, 0, 0, 0] = 1e300  # infinity in float32
    with pytest.raises(SupportSetError, match=r"^image 3 has NaN or infinite"):
        adapter.adapt(backbone, (wide, labels))


@pytest.mark.parametrize("value", BAD + HUGE)
@pytest.mark.parametrize("door", ["logits", "scores", "predict", "__call__"])
def test_query_pixels(backbone, adapter, support, pixels, door, value):
    task = adapter.adapt(backbone, support)
    expected = task.logits(pixels)
    broken = pixels.clone()
    broken[3, 0, 0, 0] = value
    with pytest.raises(ImageError, match=r"^image 3 has NaN or infinite pixel values, or values beyond 1,000,000"):
        getattr(task, door)(broken)
    assert torch.equal(task.logits(pixels), expected)


def test_queries_are_numbered_across_batches(backbone, adapter, support, pixels):
    task = adapter.adapt(backbone, support)
    pixels[4] = float("nan")
    with pytest.raises(ImageError, match=r"^image 4 has NaN"):
        task.scores(pixels, batch_size=2)


@pytest.mark.parametrize("value", BAD)
def test_queries_are_named(backbone, adapter, support, tmp_path, value):
    task = adapter.adapt(backbone, support)
    array = np.full((8, 8), 0.5)
    array[2, 3] = value
    with pytest.raises(ImageError, match=r"^image 1 has NaN or infinite pixels"):
        task.predict([picture(0), array])
    path = tmp_path / "float.tiff"
    PIL.Image.fromarray(array.astype(np.float32)).save(path)
    with pytest.raises(ImageError, match=r"float\.tiff cannot be read as an image \(it has NaN or infinite pixels"):
        task.predict([picture(0), path])


def test_large_pixels_that_half_precision_cannot_hold(adapter):
    backbone = tiny_dinov2().half()
    pixel_values, labels = support_tensors()
    pixel_values[1] *= 1e5
    before = Snapshot(backbone)
    with pytest.raises(
        ImageError, match=r"^image 1 has or makes values that are NaN, infinite or too large for torch\.float16"
    ):
        adapter.adapt(backbone, (pixel_values, labels))
    before.assert_unchanged()
    task = adapter.adapt(backbone, support_tensors())
    with pytest.raises(ImageError, match=r"^image 1 makes features that are too large for torch\.float16"):
        task.logits(pixel_values)


@pytest.mark.parametrize("value", [1e5, -1e5, 1e-30, 0.0])
def test_large_and_small_pixels_have_finite_scores(backbone, adapter, value):
    pixel_values, labels = support_tensors()
    for lda in (False, True):
        flow = make_lda(adapter) if lda else adapter
        task = flow.adapt(backbone, (torch.full_like(pixel_values, value), labels))
        require_scores(task, torch.full_like(pixel_values, value))
        require_scores(task, pixel_values)


# Weights


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize(
    "name",
    ["embeddings.cls_token", "encoder.layer.0.mlp.fc1.weight", "encoder.layer.3.mlp.fc1.weight"],
)
def test_weights_of_the_backbone(backbone, adapter, support, pixels, name, early_stopping, value):
    before = adapter.adapt(backbone, support)
    _ = before.prototypes
    with torch.no_grad():
        backbone.get_parameter(find_name(backbone, name)).view(-1)[5] = value
    with pytest.raises(NotFiniteError, match=rf"{name.split('.')[-1]} of this Dinov2Model has NaN or infinite values"):
        _ = adapter.adapt(backbone, support, early_stopping=early_stopping).prototypes
    with pytest.raises(NotFiniteError, match=r"of this Dinov2Model has NaN or infinite values"):
        before.scores(pixels)


def find_name(backbone: torch.nn.Module, name: str) -> str:
    """The name of a parameter, whose module PEFT may have wrapped."""
    names = dict(backbone.named_parameters())
    parent, leaf = name.rsplit(".", 1)
    for candidate in (name, f"{parent}.base_layer.{leaf}", f"{parent}.original_module.{leaf}"):
        if candidate in names:
            return candidate
    raise KeyError(name)


@pytest.mark.slow
def test_huge_weights_of_the_backbone(backbone, adapter, support, pixels):
    for parameter in backbone.parameters():
        saved = parameter.detach().clone()
        with torch.no_grad():
            parameter.fill_(1e30)
        problem = find_problem(lambda: adapter.adapt(backbone, support), pixels)
        assert not problem or "too large" in problem
        with torch.no_grad():
            parameter.copy_(saved)
    require_scores(adapter.adapt(backbone, support), pixels)


@pytest.mark.slow
@pytest.mark.parametrize("value", BAD + HUGE)
def test_every_weight_of_the_adapter(backbone, support, pixels, value):
    adapter = make_lda(tiny_adapter(backbone))
    state = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    for name, tensor in adapter.state_dict().items():
        with torch.no_grad():
            tensor.view(-1)[0] = value
        problem = find_problem(lambda: adapter.adapt(backbone, support), pixels)
        if value in HUGE:
            assert not problem or "too large" in problem or "range of finite" in problem or name in problem, problem
        else:
            assert not problem or name.removeprefix("head.") in problem
        adapter.load_state_dict(state)
    require_scores(adapter.adapt(backbone, support), pixels)


@pytest.mark.parametrize("early_stopping", [False, True])
def test_an_error_leaves_the_backbone_as_it_was(backbone, adapter, support, early_stopping):
    before = Snapshot(backbone)
    with torch.no_grad():
        adapter.token_scale[3] = float("nan")
    with pytest.raises(NotFiniteError, match=r"^token_scale of the adapter has NaN or infinite values: load it again"):
        adapter.adapt(backbone, support, early_stopping=early_stopping)
    before.assert_unchanged()


@pytest.mark.parametrize("value", [1e3, -1e3, *BAD])
def test_the_scale_of_the_logits(backbone, adapter, support, value):
    with torch.no_grad():
        adapter.logit_scale.fill_(value)
    with pytest.raises(NotFiniteError, match=r"^logit_scale of the adapter is "):
        adapter.adapt(backbone, support)


# Tasks


def set_theta(task: AdaptedTask, value: float) -> None:
    task.theta = task.theta.clone()
    task.theta[0, 0] = value


def set_prototypes(task: AdaptedTask, value: float) -> None:
    task.prototypes[1, 2] = value


def set_scale(task: AdaptedTask, value: float) -> None:
    task._scale = value


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(
    ("change", "name"), [(set_theta, "theta"), (set_prototypes, "prototypes"), (set_scale, "scale")]
)
def test_parts_of_a_task(backbone, adapter, support, pixels, change: Callable, name, value):
    task = adapter.adapt(backbone, support)
    _ = task.prototypes
    change(task, value)
    with pytest.raises(NotFiniteError, match=f"^{name} of this task has NaN or infinite values: adapt again"):
        task.predict(pixels)


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize("change", [set_theta, set_prototypes, set_scale])
def test_huge_parts_of_a_task(backbone, adapter, support, pixels, change, value):
    task = adapter.adapt(backbone, support)
    _ = task.prototypes
    change(task, value)
    problem = find_problem(lambda: task, pixels)
    assert not problem or "too large" in problem or "infinite" in problem


def test_a_scale_that_overflows(backbone, adapter, support, pixels):
    task = adapter.adapt(backbone, support)
    _ = task.prototypes
    task._scale = 1e39  # infinity in float32
    with pytest.raises(NotFiniteError, match=r"^scale of this task"):
        task.scores(pixels)


def test_a_merged_task(backbone, adapter, support, pixels):
    task = adapter.adapt(backbone, support)
    task.merge()
    pixels[2] = float("nan")
    with pytest.raises(ImageError, match=r"^image 2 has NaN"):
        task.scores(pixels)
    require_scores(task, pixels[:2])


def test_a_copied_task(backbone, adapter, support, pixels):
    task = copy.deepcopy(adapter.adapt(backbone, support))
    require_scores(task, pixels)


# Settings


@pytest.mark.parametrize("n_steps", [float("nan"), float("inf"), 8.0, 1e30, "8"])
def test_steps_that_are_no_integers(backbone, adapter, support, n_steps):
    with pytest.raises(ValueError, match=r"^n_steps must be an integer, not "):
        adapter.adapt(backbone, support, n_steps=n_steps)


@pytest.mark.parametrize("value", BAD)
def test_the_intermediate_weight(backbone, support, value):
    adapter = tiny_adapter(backbone, intermediate_weight=value)
    with pytest.raises(NotFiniteError, match=f"^intermediate_weight is {value}: give a finite number"):
        _ = adapter.adapt(backbone, support).prototypes


@pytest.mark.parametrize("value", [*BAD, *HUGE])
@pytest.mark.parametrize("name", ["image_mean", "image_std", "rescale_factor"])
def test_settings_of_the_image_processor(backbone, adapter, support, name, value):
    task = adapter.adapt(backbone, support)
    setattr(adapter.processor, name, value if name == "rescale_factor" else [0.5, value, 0.5])
    with pytest.raises(NotFiniteError, match=f"^{name} of the image processor is "):
        task.scores(support["red"])
    with pytest.raises(NotFiniteError, match=f"^{name} of the image processor is "):
        adapter.adapt(backbone, support)


def test_a_standard_deviation_of_zero(backbone, adapter, support):
    adapter.processor.image_std = [0.2, 0.0, 0.2]
    with pytest.raises(NotFiniteError, match=r"^image_std of the image processor is \[0\.2, 0\.0, 0\.2\]"):
        adapter.adapt(backbone, support)


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (0, "must be at least 1, not 0"),
        (-1, "must be at least 1, not -1"),
        (1.5, r"must be an integer, not 1\.5"),
        ("8", "must be an integer, not '8'"),
    ],
)
def test_sizes_of_batches_and_numbers_of_labels(backbone, adapter, support, pixels, count, message):
    task = adapter.adapt(backbone, support)
    for use in (task.predict, task.scores, task):
        with pytest.raises(ValueError, match=f"^batch_size {message}"):
            use(pixels, batch_size=count)
    with pytest.raises(ValueError, match=f"^top_k {message}"):
        task(pixels, top_k=count)


# LDA


LDA_FEATURES = {
    "zero": torch.zeros(4, 6),
    "one image, four times": torch.ones(4, 6),
    "one image a class": torch.arange(12.0).reshape(2, 6),
    "tiny": torch.full((4, 6), 1e-30),
}


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-10, 1e5, 1e10, 1e15])
@pytest.mark.parametrize("name", [*LDA_FEATURES, "random"])
def test_lda_of_odd_features(name, scale):
    features = LDA_FEATURES.get(name, torch.randn(4, 6, generator=torch.Generator().manual_seed(0))) * scale
    labels = torch.arange(2).repeat_interleave(len(features) // 2)
    trained = RegularisedLDA(6)
    trained.set_prior(torch.diag(torch.arange(1.0, 7.0)), spread=1.0)
    for lda in (RegularisedLDA(6), trained):
        logits = PrototypeClassifier.from_support(features, labels, head=lda)(features)
        assert logits.isfinite().all()


@pytest.mark.parametrize("scale", [1e5, 1e10, 1e15])
def test_lda_of_large_features_is_that_of_direct_transfer(scale):
    """The wider the classes are apart, the less the prior counts; in the end the means alone decide."""
    features = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    lda = RegularisedLDA(6)
    lda.set_prior(torch.diag(torch.arange(1.0, 7.0)), spread=1.0)
    prototypes = lda(scale * features, torch.arange(3))
    torch.testing.assert_close(F.normalize(prototypes, dim=1), F.normalize(features, dim=1))


def test_features_that_no_length_can_be_told_of(backbone, adapter, support):
    """Features of 1e30 are finite, but their squares are not."""
    make_lda(adapter)
    with torch.no_grad():
        backbone.layernorm.weight.fill_(1e30)
    with pytest.raises(
        ImageError, match=r"image 0 of class 'red' makes features that are too large for torch\.float32"
    ):
        _ = adapter.direct_transfer(backbone, support).prototypes


@pytest.mark.parametrize("lda", [False, True])
@pytest.mark.parametrize("n_shot", [1, 3])
def test_identical_images(backbone, adapter, pixels, lda, n_shot):
    flow = make_lda(adapter) if lda else adapter
    image = picture(0)
    support = {"a": [image] * n_shot, "b": [image] * n_shot}
    for early_stopping in (False, True):
        task = flow.adapt(backbone, support, early_stopping=early_stopping)
        require_scores(task, pixels)
    require_scores(flow.direct_transfer(backbone, support), pixels)


def test_one_image_a_class(backbone, adapter, pixels):
    require_scores(make_lda(adapter).adapt(backbone, pictures(3, 1), early_stopping=True), pixels)
