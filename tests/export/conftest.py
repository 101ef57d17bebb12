"""Exports of tiny adapters, each made once: tracing takes seconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.modeling.peft_configs import bias_config, lora_config
from tests.helpers.tiny import tiny_adapter, tiny_dinov2


@dataclass
class Exported:
    """A folder of an export, and what it was made of."""

    folder: Path
    adapter: HyperFlowAdapter
    backbone: object


def make_bias_adapter(backbone: object) -> HyperFlowAdapter:
    """Like the released one: biases, LDA, intermediate features, calibrated scores and rejection; and two views."""
    return tiny_adapter(
        backbone,
        bias_config(backbone, 1),
        last_blocks=1,
        drift_depth=1,
        n_steps=2,
        lda=True,
        intermediate_weight=0.5,
        views=2,
        calibration={"constant": 1.6, "ways": 0.4, "shots": 0.6, "spread": -1.5},
        rejection={"constant": 2.8, "ways": -0.1, "shots": -0.5, "spread": 1.0, "odds": 0.2, "distance": -5.0},
    )


def make_lora_adapter(backbone: object) -> HyperFlowAdapter:
    """LoRA with cosines and another solver; support images are larger than those that condition the flow."""
    return tiny_adapter(
        backbone,
        lora_config(backbone, 1),
        last_blocks=1,
        drift_depth=1,
        n_steps=1,
        solver="heun",
        image_size=[14, 14],
    )


@pytest.fixture(scope="session", params=[make_bias_adapter, make_lora_adapter], ids=["bias", "lora"])
def exported(request, tmp_path_factory):
    from hf_hyperflow.export.exporting import export_onnx

    folder = tmp_path_factory.mktemp("exported")
    backbone = tiny_dinov2(num_hidden_layers=2)
    adapter = request.param(backbone)
    export_onnx(adapter, backbone, folder)
    return Exported(folder, adapter, backbone)
