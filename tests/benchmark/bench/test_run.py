"""`hyperflow bench` as a user meets it."""

from __future__ import annotations

import json

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoModel

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.benchmark.bench.arguments import BenchArguments
from hf_hyperflow.benchmark.bench.records import LABELS, ONNX_PREDICTION, ONNX_READY, PREDICTION_LABELS, RIVALS
from hf_hyperflow.benchmark.bench.run import run
from hf_hyperflow.benchmark.bench.subjects import find_subject
from hf_hyperflow.benchmark.bench.task import PIECES, PIECES_OF_STEPS
from tests.helpers.tiny import SIZE

#: What ONNX Runtime does, whose memory is not measured.
WITHOUT_MEMORY = (ONNX_READY, ONNX_PREDICTION)


def refuse_to_find_released():
    raise AssertionError("the released pair is not asked for")


@pytest.mark.slow
def test_bench(pair, tmp_path, capsys):
    """One number of images: what is measured, printed and drawn."""
    backbone, adapter = pair
    arguments = BenchArguments(
        adapter=adapter,
        backbone=backbone,
        images=[6],
        steps=[3],
        device=["cpu"],
        onnx=True,
        output_dir=str(tmp_path / "out"),
    )
    content = run(arguments, refuse_to_find_released)
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == json.loads(json.dumps(content))
    records = {(r["work"], r["n_images"], r["n_steps"]): r for r in content["records"]}
    expected = {(work, 6, 3) for work in PIECES_OF_STEPS}
    expected |= {(work, 6, None) for work in set(PIECES) - set(PIECES_OF_STEPS)}
    expected |= {(rival.name, 6, None) for rival in RIVALS}
    expected |= {(work, 6, None) for work in WITHOUT_MEMORY}
    expected |= {(work, n_images, None) for work in PREDICTION_LABELS for n_images in (1, 32)}
    assert set(records) == expected
    assert len(content["records"]) == len(expected)
    for (work, _, _), record in records.items():
        assert (record["backbone"], record["size"], record["dtype"]) == ("own", (SIZE, SIZE), "float32")
        assert record["seconds"] > 0
        assert (record["peak_memory_mb"] is None) == (work in (*PREDICTION_LABELS, *WITHOUT_MEMORY))
    assert records["ready", 6, 3]["seconds"] < records["full", 6, None]["seconds"]
    (ratios,) = content["task_ratios"]
    assert ratios["ready"] == records["ready", 6, 3]["seconds"] / records["forward", 6, None]["seconds"]
    printed = capsys.readouterr().out
    assert printed.index("Ready over one forward pass") < printed.index("Predictions over the backbone alone")
    for label in (*LABELS.values(), *PREDICTION_LABELS.values()):
        assert label in printed
    picture = PIL.Image.open(tmp_path / "out" / "bench.png").convert("L")
    assert picture.width > 1000
    assert np.asarray(picture).std() > 10


@pytest.mark.slow
def test_an_untrained_pair(tmp_path):
    """A ViT-S/16 with random weights, whose adapter fits it."""
    subject = find_subject("vit-s", None, None, refuse_to_find_released, tmp_path)
    assert (subject.name, subject.size, subject.n_steps) == ("vit-s", (224, 224), 4)
    backbone = AutoModel.from_pretrained(subject.backbone).eval()
    assert 21e6 < sum(p.numel() for p in backbone.parameters()) < 23e6
    pixel_values = torch.randn(2, 3, *subject.size)
    task = HyperFlowAdapter.from_pretrained(subject.adapter).adapt(backbone, (pixel_values, torch.tensor([0, 1])))
    assert task.prototypes.shape == (2, 2 * 384)
    larger = find_subject("vit-s@384", None, None, refuse_to_find_released, tmp_path)
    assert (larger.backbone, larger.size) == (subject.backbone, (384, 384))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backbones": ["resnet"]}, "--backbones 'resnet' is unknown: use released, own, vit-s, vit-b, or one of"),
        ({"backbones": ["vit-s@"]}, "behind the @ is the size of the images in pixels"),
        ({"backbones": ["vit-s@-1"]}, "behind the @ is the size of the images in pixels"),
        ({"backbones": ["vit-s", "vit-s"]}, "--backbones has a value twice: vit-s vit-s"),
        ({"backbones": ["own"]}, "--backbones own is the adapter of yours: name it with --adapter"),
        ({"backbones": ["vit-s"], "adapter": "a"}, "--adapter is measured as own, which --backbones leaves out"),
        ({"backbone": "b"}, "--backbone is that of --adapter: name both"),
        ({"images": [25, 4]}, "--images must be at least 5, one of each of 5 classes, not 4"),
        ({"images": [25, 25]}, "--images has a value twice: 25 25"),
        ({"steps": [0]}, "--steps must be at least 1, not 0"),
        ({"device": ["tpu"]}, "--device 'tpu' is unknown: use cpu or cuda"),
        ({"dtype": ["float16"]}, "--dtype 'float16' is unknown: use float32 or bfloat16"),
    ],
)
def test_bad_arguments(changes, words):
    with pytest.raises(ValueError, match=words):
        BenchArguments(**changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    assert BenchArguments().device == ["cpu"]
    with pytest.raises(ValueError, match="PyTorch sees no GPU here"):
        BenchArguments(device=["cuda"])
