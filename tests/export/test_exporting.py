"""What is exported computes what PyTorch does, and what cannot be exported is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from peft import IA3Config
from sklearn.datasets import load_digits, load_sample_images
from transformers import CLIPImageProcessorPil, Dinov2Model

from hf_hyperflow import IncompatibleBackboneError
from hf_hyperflow.export.exporting import USERS, export_onnx
from hf_hyperflow.export.hyperflow_onnx import NONE_OF_THESE, HyperFlow
from tests.helpers.environments import Environment
from tests.helpers.exported_page import ExportedPage
from tests.helpers.tiny import SIZE, Snapshot, pictures, tiny_adapter, tiny_dinov2, write_pictures

SUPPORTS = {
    "two images": [0, 1],
    "unbalanced": [0, 0, 0, 0, 1, 2, 2, 3, 4],
    "balanced, in any order": [2, 0, 1, 1, 0, 2, 0, 2, 1],
}


def draw(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow
def test_one_export_serves_all_sizes(exported):
    """Of support sets and of batches."""
    model = HyperFlow(exported.folder)
    for name, numbers in SUPPORTS.items():
        labels = torch.tensor(numbers)
        support = draw(len(labels), seed=1)
        expected = exported.adapter.adapt(exported.backbone, (support, labels))
        found = model.adapt_pixels(support.numpy(), labels.numpy(), expected.class_names)
        assert np.allclose(found.arrays["theta"], expected.theta, atol=1e-4, rtol=0), name
        assert np.allclose(found.arrays["prototypes"], expected.prototypes, atol=1e-4, rtol=0), name
        assert np.allclose(found.arrays["scale"], expected.scale, rtol=1e-4), name
        for n in (1, 6):
            images = draw(n, seed=n)
            scores, known = found.score_pixels(images.numpy())
            assert np.allclose(scores, expected.logits(images).softmax(-1), atol=1e-4, rtol=0), name
            assert (known is None) == (expected.rejection is None)
            if known is not None:
                assert np.allclose(known, expected.known_scores(images), atol=1e-4, rtol=0), name


@pytest.mark.slow
def test_the_files_of_an_export(exported):
    files = {path.name for path in exported.folder.iterdir()}
    assert files == {"adapt.onnx", "predict.onnx", "weights.bin", "hyperflow.json", *USERS}
    weights = (exported.folder / "weights.bin").stat().st_size
    n_parameters = sum(p.numel() for model in (exported.adapter, exported.backbone) for p in model.parameters())
    assert weights < 1.3 * 4 * n_parameters, "both graphs share their weights"
    for name in ("adapt.onnx", "predict.onnx"):
        content = (exported.folder / name).read_bytes()
        assert b"site-packages" not in content, "no paths of this machine"
        assert b"hf_hyperflow/" not in content


@pytest.mark.slow
def test_without_torch(exported, tmp_path):
    """In an environment of numpy, Pillow and onnxruntime, from folders of images, by the program and the module."""
    environment = Environment(tmp_path, only=("numpy", "PIL", "pillow", "onnxruntime"))
    images = pictures(n_way=3, n_shot=3)
    del images["green"][1:]
    support = write_pictures(tmp_path / "support", images)
    new = write_pictures(tmp_path / "new", pictures(n_way=3, n_shot=1, seed=7))
    program = exported.folder / "hyperflow_onnx.py"
    adapted = environment.run_file(program, "adapt", support, "--task", "task.npz")
    assert adapted.stdout == "Saved task.npz: 3 classes (blue, green, red).\n", adapted.stderr
    predicted = environment.run_file(program, "predict", new, "--task", "task.npz")
    code = f"""
import json, sys
try:
    import torch
except ImportError:
    pass
else:
    raise SystemExit("torch is here")
sys.path.insert(0, {str(exported.folder)!r})
from hyperflow_onnx import HyperFlow
task = HyperFlow().load_task("task.npz")
print(json.dumps(task.scores(sys.argv[1:]).tolist()))
"""
    paths = sorted(new.rglob("*.png"))
    scores = environment.run(code, *paths)
    assert scores.returncode == 0, scores.stderr
    task = exported.adapter.adapt(exported.backbone, support)
    expected = task.scores(paths)
    assert np.allclose(json.loads(scores.stdout), expected, atol=1e-4, rtol=0)
    best = expected.max(dim=1)
    lines = []
    for path, number, score in zip(paths, best.indices, best.values, strict=True):
        lines.append((str(path), task.class_names[number], pytest.approx(float(score), abs=2e-4)))
    found = [line.split("\t") for line in predicted.stdout.splitlines()]
    assert [(path, label, float(score)) for path, label, score in found] == lines


@pytest.mark.slow
def test_a_task_knows_its_export(exported, tmp_path):
    model = HyperFlow(exported.folder)
    task = model.adapt(pictures(n_way=2, n_shot=1))
    task.save(tmp_path / "task.npz")
    new = pictures(n_way=2, n_shot=1, seed=3)["red"]
    assert np.array_equal(model.load_task(tmp_path / "task.npz").scores(new), task.scores(new))
    assert set(task.predict(new, reject=task.known_scores(new) is not None)) <= {"red", "green", NONE_OF_THESE}
    model.settings["export"] = "another"
    with pytest.raises(ValueError, match="another export"):
        model.load_task(tmp_path / "task.npz")


def write_photographs(folder: Path) -> None:
    """Folders of parts of two photographs and of scans of handwriting, with names that are no HTML."""
    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        for kind, tops in (("support", (0, 90, 180)), ("new", (240,))):
            (folder / kind / name).mkdir(parents=True)
            for top in tops:
                part = PIL.Image.fromarray(photograph[top : top + 150, 2 * top : 2 * top + 170])
                part.save(folder / kind / name / f"{name} {top}.png")
    digits = (load_digits().images * 15.9).astype(np.uint8)
    for number, kind in enumerate(("support", "support", "new")):
        (folder / kind / "<i>digits").mkdir(exist_ok=True)
        PIL.Image.fromarray(digits[number]).save(folder / kind / "<i>digits" / f"<b>{number}&amp;.png")
    (folder / "support" / "china" / "notes.txt").touch()
    (folder / "support" / "__MACOSX").mkdir()
    shutil.copy(folder / "new" / "china" / "china 240.png", folder / "support" / "__MACOSX")


@pytest.mark.browser
def test_in_a_browser(exported, served, runtime, browser, tmp_path):
    """From files to scores, which are those of PyTorch to 1e-4; and what bad input gets."""
    folder, url = served
    name = exported.folder.parent.name
    shutil.copytree(exported.folder, folder / name)
    (folder / name / "ort").symlink_to(runtime)
    write_photographs(tmp_path)
    new = sorted((tmp_path / "new").rglob("*.png"))
    (tmp_path / "<b>bad.png").write_text("these are notes, not a picture")
    page = ExportedPage(browser, f"{url}/{name}/")
    assert page.loaded.endswith("It looks at images at 28 by 28 pixels.")
    assert page.alert("predict", "predicted").endswith("Press Adapt first.")

    assert page.alert("adapt", "adapted").startswith("There are fewer than two classes. Add one")
    page.fill(0, "red")
    assert page.alert("adapt", "adapted") == "Class 'red' has no images. Give it at least one, or remove it."
    page.fill(1, "", new[0])
    assert page.alert("adapt", "adapted") == f"The class of {new[0].name} has no name. Give it one."
    page.fill(1, " red ")
    assert page.alert("adapt", "adapted") == "Two classes are called 'red'. Rename one of them."
    page.fill(0, "<b>blue", tmp_path / "<b>bad.png")
    refused = "<b>bad.png cannot be read as an image by this browser. Replace or remove it."
    assert page.alert("adapt", "adapted") == refused
    page.all("[title='Remove <b>bad.png']")[0].click()
    assert page.alert("adapt", "adapted").startswith("Class '<b>blue' has no images.")
    for remove in page.all(".remove"):
        remove.click()

    page.open_folder(tmp_path / "support")
    assert page.read_names() == ["<i>digits", "china", "flower"]
    said = page.message("adapt", "adapted")
    assert re.fullmatch(r"Ready after \d+\.\d\d s: 3 classes from 8 images, without gradients\.", said)
    assert page.alert("predict", "predicted").startswith("There are no new images.")
    page.drop("#queries", *new)
    assert page.message("predict", "predicted").startswith("Predicted in")
    with pytest.warns(UserWarning, match="notes.txt cannot be read.*__MACOSX is no class"):
        task = exported.adapter.adapt(exported.backbone, tmp_path / "support")
    for found, expected in zip(page.read_scores(), task(new), strict=True):
        assert list(found) == [result["label"] for result in expected]
        assert list(found.values()) == pytest.approx([result["score"] for result in expected], abs=1e-4)
    assert [image.get_property("alt") for image in page.all(".result img")] == [path.name for path in new]

    (folder / name / "predict.onnx").unlink()
    missing = "predict.onnx cannot be loaded from beside this page (404). Serve the whole folder that"
    assert ExportedPage(browser, f"{url}/{name}/").loaded.startswith(missing)


class BranchingModel(Dinov2Model):
    """Does something else with dark images, which no graph can."""

    def forward(self, pixel_values, **arguments):
        if pixel_values.mean() < -100:
            pixel_values = pixel_values + 100
        return super().forward(pixel_values, **arguments)


def test_what_cannot_be_exported(tmp_path):
    backbone = tiny_dinov2(num_hidden_layers=2)
    before = Snapshot(backbone)
    path = "encoder.layer.1.mlp.fc1"
    other = tiny_adapter(backbone, IA3Config(target_modules=[path], feedforward_modules=[path]), last_blocks=1)
    adapter = tiny_adapter(backbone, last_blocks=1, drift_depth=1, n_steps=1)
    with pytest.raises(ValueError, match="IA3 adapter cannot be exported: only BEFT, LORA, LN_TUNING"):
        export_onnx(other, backbone, tmp_path / "out")
    with pytest.raises(ValueError, match=r"'dopri5' cannot be exported.*use one of euler"):
        export_onnx(adapter, backbone, tmp_path / "out", solver="dopri5")
    with pytest.raises(ValueError, match="n_steps must be at least 1"):
        export_onnx(adapter, backbone, tmp_path / "out", n_steps=0)
    branching = BranchingModel(backbone.config).eval()
    branching.load_state_dict(backbone.state_dict())
    with pytest.raises(IncompatibleBackboneError, match="cannot be exported: PyTorch cannot trace"):
        export_onnx(adapter, branching, tmp_path / "out")
    adapter.processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, do_center_crop=False)
    with pytest.raises(ValueError, match="images of different sizes"):
        export_onnx(adapter, backbone, tmp_path / "out")
    adapter.processor = None
    with pytest.raises(ValueError, match="no image processor"):
        export_onnx(adapter, backbone, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    before.assert_unchanged()
