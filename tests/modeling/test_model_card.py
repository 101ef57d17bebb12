"""The README.md that a saved adapter or task carries."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import Dinov2Config, Dinov2Model

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.modeling.model_card import MARK, describe_feature, is_generated, task_card
from hf_hyperflow.modeling.peft_configs import bias_config
from hf_hyperflow.modeling.saving import CheckpointError
from hf_hyperflow.modeling.training_section import write_training_section
from tests.helpers.files import forget_digests


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_attention_heads=2, num_hidden_layers=4, image_size=28, patch_size=14)
    return Dinov2Model(config).eval()


@pytest.fixture
def adapter(backbone, monkeypatch):
    monkeypatch.setattr(backbone.config, "_name_or_path", "owner/backbone")
    return HyperFlowAdapter.from_backbone(
        backbone, bias_config(backbone, 2), last_blocks=2, drift_width=32, drift_depth=1, drift_heads=2
    )


@pytest.fixture
def task(adapter, backbone):
    task = adapter.adapt(backbone, (torch.randn(4, 3, 28, 28), torch.tensor([0, 0, 1, 1])))
    task.class_names = ["tabby | cat", 'größer "dog"']
    yield task
    task.reset()


def test_card_of_an_adapter(adapter, tmp_path):
    adapter.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "hf_hyperflow"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.base_model == "owner/backbone"
    assert {"hyperflow", "few-shot-learning", "adapter"} <= set(card.data.tags)
    assert f"{adapter.space.n_parameters:,} parameters in {adapter.space.n_tokens} tokens" in card.text
    assert "last 2 blocks" in card.text
    assert 'from_pretrained("owner/backbone")' in card.text
    compile(re.search(r"```python\n(.*?)```", card.text, re.DOTALL).group(1), "card", "exec")


def test_card_of_a_task_replaces_that_of_peft(task, tmp_path):
    task.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "hf_hyperflow"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.base_model == "owner/backbone"
    assert "peft" in card.data.tags
    assert '"tabby | cat", "größer \\"dog\\""' in card.text
    assert "PeftModel.from_pretrained" in card.text
    assert "More Information Needed" not in card.text, "PEFT's empty template"


def test_card_of_many_classes_is_short(adapter):
    card = task_card(
        "owner/backbone", "dinov2", adapter.space, [f"class {i}" for i in range(1000)], describe_feature("mean", 2, 0)
    )
    assert '"class 49" and 950 more' in card
    assert "class 50" not in card
    assert "the mean over all tokens" in card


@pytest.mark.parametrize("name", ["", "/models/backbone", "models/deep/backbone", "../backbone"])
def test_a_local_backbone_is_no_base_model(adapter, name, tmp_path):
    """The Hub refuses a `base_model` that is no repository, and a path says something about somebody's machine."""
    adapter.config.backbone = adapter.config.backbone | {"name_or_path": name}
    adapter.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is None
    assert "a dinov2 model" in card.text
    assert not name or name not in card.content


def test_a_folder_is_no_base_model(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/backbone").mkdir(parents=True)
    adapter.save_pretrained(tmp_path / "adapter")
    assert ModelCard.load(tmp_path / "adapter/README.md").data.base_model is None


def test_our_card_is_renewed_and_that_of_a_person_kept(adapter, task, tmp_path):
    card = tmp_path / "README.md"
    for thing in (adapter, task):
        card.write_text(f"{MARK}\nof an older version", encoding="utf-8")
        thing.save_pretrained(tmp_path)
        assert is_generated(card)
        assert "older version" not in card.read_text(encoding="utf-8")
        card.write_bytes(b"my own words \xe9")
        thing.save_pretrained(tmp_path)
        assert card.read_bytes() == b"my own words \xe9"


def training_record() -> dict:
    accuracies = {"direct": 60.04, "direct_ci95": 1.0, "hyperflow": 62.0, "hyperflow_ci95": 1.1}
    accuracies |= {"difference": 1.96, "difference_ci95": 0.5}
    flow = {"no_flow": 61.6, "no_flow_ci95": 1.0, "flow": 0.4, "flow_ci95": 0.3}
    totals = {"rows": 1024, "diverged": 0, "seconds": 7200.0, "flops": 4.0e15, "bytes": 300_000_000}
    phase = {"runs": 600, "seconds": 90.0, "flops": 1.5e14, "rows": 0, "episodes": 2400}
    return {
        "arguments": {"dataset": ["owner/birds", "photos"], "holdout": ["scans"], "learning_rate": 0.0005},
        "history": [{"step": 600, "loss": 1.0, "scans": accuracies | flow, "older": accuracies}],
        "phases": {"episodic": phase},
        "trajectories": {"collections": [{"name": "rows", "totals": totals, "hardware": {"device": "a CPU"}}]},
        "hardware": {"device": "a GPU", "processes": 2, "mixed_precision": "bf16"},
        "versions": {"torch": "2.13.0"},
    }


def test_card_of_a_trained_adapter_tells_data_validation_settings_and_cost(adapter, tmp_path):
    adapter.training_record = training_record()
    adapter.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.datasets == ["owner/birds"], "what is on the Hub"
    assert "Training domains: `owner/birds`, `photos`." in card.text
    assert "every k-th class of a domain): `scans`." in card.text
    assert "| scans | 60.0 ± 1.0 | 62.0 ± 1.1 | +1.96 ± 0.50 | +0.40 ± 0.30 |" in card.text
    assert "| older | 60.0 ± 1.0 | 62.0 ± 1.1 | +1.96 ± 0.50 | not recorded |" in card.text
    assert "| collecting `rows` (a CPU) | | 1,024 | | 2.0 h | 4e+15 |" in card.text
    assert "| episodic | 600 | 0 | 2,400 | 1.5 min | 1.5e+14 |" in card.text
    assert "The trajectories take 300.0 MB. Trained on a GPU, 2 process(es), bf16 mixed precision." in card.text
    assert "| `learning_rate` | `0.0005` |" in card.text
    assert "Versions: torch 2.13.0." in card.text
    loaded = HyperFlowAdapter.from_pretrained(tmp_path)
    assert loaded.training_record == training_record(), "it stays with the adapter"


def test_damaged_training_record_is_named(adapter, tmp_path):
    adapter.training_record = training_record()
    adapter.save_pretrained(tmp_path)
    forget_digests(tmp_path)
    (tmp_path / "training.json").write_text('{"arguments"')
    with pytest.raises(CheckpointError, match=r"training\.json is damaged"):
        HyperFlowAdapter.from_pretrained(tmp_path)


RELEASED = Path(__file__).resolve().parents[2] / "model_cards" / "hyperflow-vit-s14-70" / "training.json"


def test_the_record_of_a_released_adapter_is_rendered():
    """It went on from an adapter of version 0.1, whose record has the names of that time."""
    record = json.loads(RELEASED.read_text())
    section = write_training_section(record)
    assert "| trashnet | 46.0 ± 3.5 | 50.5 ± 3.0 | +4.53 ± 3.65 | +2.00 ± 2.54 |" in section
    assert "| metric, run 1 | 1 | 0 | 256 | 1.5 min | 1.69e+13 |" in section
    assert "| task, run 1 | 1,500 | 0 | 6,000 | 47.3 min | 5.46e+14 |" in section
    assert "| episodic, run 2 | 1,500 | 0 | 24,000 | 13.6 min | 2.08e+15 |" in section
    assert "Run 1 was trained on x86_64 CPU" in section
    assert "Run 2 was trained on NVIDIA H200, 4 process(es), bf16 mixed precision." in section
    earlier = write_training_section(record["continued_from"])
    assert "| trashnet | 43.8 ± 1.8 | 46.5 ± 1.8 | +2.71 ± 1.26 | not recorded |" in earlier
    assert "| `made_share` | `0.8` |" in earlier
    assert "The trajectories take" not in earlier, "it was trained without"
