"""The released checkpoints of this repository."""

import json

import PIL.Image
import pytest
import torch
from peft import PeftModel
from transformers import AutoImageProcessor, AutoModel

from hf_hyperflow import AdaptedTask, HyperFlowAdapter
from hf_hyperflow.demo.digits import sample_digits
from hf_hyperflow.demo.released import ADAPTER, BACKBONE, find_released
from hf_hyperflow.modeling.prototypes import PrototypeClassifier
from hf_hyperflow.modeling.saving import CheckpointError
from tests.helpers.benchmark_runs import ROOT

OTHERS = {
    "hyperflow-lora-vit-s14-70": "vit-s14-focus-70",
    "hyperflow-norms-vit-s14-70": "vit-s14-focus-70",
    "hyperflow-convnext-64": "convnext-64",
}


@pytest.fixture(scope="module")
def backbone():
    return AutoModel.from_pretrained(find_released(BACKBONE)).eval()


@pytest.fixture(scope="module")
def adapter():
    return HyperFlowAdapter.from_pretrained(find_released(ADAPTER)).eval()


def test_both_fit_in_64_mb_of_half_precision():
    folders = [find_released(BACKBONE), find_released(ADAPTER)]
    assert sum(f.stat().st_size for folder in folders for f in folder.rglob("*") if f.is_file()) < 64e6
    for folder in folders:
        assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"  # what it is loaded as


def test_the_pair_is_taken_from_the_folder_that_the_user_names(tmp_path, monkeypatch):
    folders = {name: find_released(name) for name in (BACKBONE, ADAPTER)}
    monkeypatch.setenv("HYPERFLOW_WEIGHTS", f"{tmp_path}/")
    for name, folder in folders.items():
        with pytest.raises(CheckpointError, match=f"HYPERFLOW_WEIGHTS is .*there is no folder {tmp_path}/{name}"):
            find_released(name)
        (tmp_path / name).mkdir()
        with pytest.raises(CheckpointError, match=r"HYPERFLOW_WEIGHTS is .*has no model\.safetensors"):
            find_released(name)
        (tmp_path / name / "model.safetensors").symlink_to(folder / "model.safetensors")
        assert find_released(name) == tmp_path / name


def test_other_weights_are_refused(tmp_path, monkeypatch):
    weights = bytearray((find_released(ADAPTER) / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / ADAPTER).mkdir()
    (tmp_path / ADAPTER / "model.safetensors").write_bytes(weights)
    monkeypatch.setenv("HYPERFLOW_WEIGHTS", str(tmp_path))
    with pytest.raises(CheckpointError, match=f"is not that of the released {ADAPTER}: its SHA-256 is another"):
        find_released(ADAPTER)


def test_backbone_loads_with_transformers_alone(backbone):
    assert next(backbone.parameters()).dtype == torch.float32
    processor = AutoImageProcessor.from_pretrained(find_released(BACKBONE), backend="pil")
    pixels = processor([PIL.Image.new("RGB", (90, 64))], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 70, 70)
    with torch.no_grad():
        assert backbone(pixels).last_hidden_state.shape == (1, 26, 384)


@pytest.mark.slow
def test_adapter_beats_direct_transfer_on_digits(backbone, adapter, recwarn):
    """On the mean of three episodes: single ones go either way."""
    adapted, direct, sure_hits, unsure_hits = [], [], [], []
    for seed in (0, 1, 2):
        episode = sample_digits(n_query=15, seed=seed)
        labels = torch.from_numpy(episode.query_labels)
        task = adapter.adapt(backbone, episode.support)
        scores = task.scores(episode.query)
        task.reset()
        hits = (scores.argmax(-1) == labels).float()
        sure = scores.amax(-1) >= scores.amax(-1).median()
        adapted.append(hits.mean())
        sure_hits.append(hits[sure].mean())
        unsure_hits.append(hits[~sure].mean())
        support = [image for images in episode.support.values() for image in images]
        features = []
        for pictures in (support, episode.query):
            rgb = [picture.convert("RGB") for picture in pictures]
            with torch.no_grad():
                output = backbone(adapter.processor(rgb, return_tensors="pt")["pixel_values"])
            features.append(output.last_hidden_state[:, 0])
        classifier = PrototypeClassifier.from_support(features[0], torch.arange(10).repeat_interleave(5))
        direct.append((classifier(features[1]).argmax(-1) == labels).float().mean())
    assert sum(adapted) > sum(direct)
    # Scores mean something: the surer half of the answers is right more often, by far.
    assert sum(sure_hits) > sum(unsure_hits) + 0.15
    assert not [w for w in recwarn if "not those the adapter was trained for" in str(w.message)]


def test_the_adapter_warns_about_other_weights(adapter):
    other = AutoModel.from_config(AutoModel.from_pretrained(find_released(BACKBONE)).config)
    with pytest.warns(UserWarning, match="not those the adapter was trained for"):
        adapter.adapt(other, sample_digits().support)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_the_other_adapters_work_with_their_backbones(name, tmp_path, recwarn):
    """They adapt to digits better than direct transfer, and plain PEFT computes the features of a saved task."""
    folder = ROOT / "model_cards" / OTHERS[name]
    backbone = AutoModel.from_pretrained(folder).eval()
    adapter = HyperFlowAdapter.from_pretrained(ROOT / "model_cards" / name).eval()
    assert (adapter.config.calibration is None, adapter.config.rejection is None) == (False, False)
    episode = sample_digits(n_query=15)
    labels = torch.from_numpy(episode.query_labels)
    direct = adapter.direct_transfer(backbone, episode.support)
    hits = (direct.scores(episode.query).argmax(-1) == labels).float().mean()
    direct.reset()
    task = adapter.adapt(backbone, episode.support)
    scores = task.scores(episode.query)
    assert (scores.argmax(-1) == labels).float().mean() > hits + 0.1
    task.save_pretrained(tmp_path)
    pixels = adapter.processor([picture.convert("RGB") for picture in episode.query[:4]], return_tensors="pt")
    with torch.no_grad():
        ours = task.backbone(**pixels).last_hidden_state
    task.reset()
    torch.testing.assert_close(AdaptedTask.from_pretrained(tmp_path, backbone).scores(episode.query), scores)
    plain = PeftModel.from_pretrained(AutoModel.from_pretrained(folder), str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(**pixels).last_hidden_state, ours, rtol=1e-4, atol=1e-4)
    assert not [w for w in recwarn if "not those the adapter was trained for" in str(w.message)]


def test_the_lora_adapter_saves_nothing_but_factors():
    """PEFT's mixed batches, hotswapping and weighted sums refuse `modules_to_save`."""
    config = json.loads((ROOT / "model_cards" / "hyperflow-lora-vit-s14-70" / "config.json").read_text())
    assert config["peft"]["peft_type"] == "LORA"
    assert not config["peft"].get("modules_to_save")
    assert all(".lora_" in tensor for tensor in config["tensor_names"])
