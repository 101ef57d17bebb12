"""What the settings of a training or a collection describe: the PEFT config, and the untrained adapter."""

from __future__ import annotations

import torch
from peft import PeftConfig
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..modeling.adapter import HyperFlowAdapter
from ..modeling.peft_configs import bias_config, layernorm_config, lora_config
from .config import DriftTrainingConfig, ParameterKind


def build_peft_config(kind: ParameterKind, backbone: nn.Module, last_blocks: int, *, norms: bool) -> PeftConfig:
    """The PEFT config of what is generated in the last blocks of a backbone.

    Args:
        norms: with biases, the LayerNorms too.

    Raises:
        ValueError: an unknown kind.
        IncompatibleBackboneError: the backbone has no such targets.
    """
    if kind == "bias":
        return bias_config(backbone, last_blocks, norms=norms)
    if kind == "lora":
        return lora_config(backbone, last_blocks)
    if kind == "layernorm":
        return layernorm_config(backbone, last_blocks)
    raise ValueError(f"parameters must be bias, lora or layernorm, not {kind!r}.")


def build_adapter(
    config: DriftTrainingConfig, backbone: PreTrainedModel, processor: BaseImageProcessor, image_size: torch.Size
) -> HyperFlowAdapter:
    """The untrained adapter that a config describes, for images of this height and width."""
    encoder = None
    if config.encoder is not None:
        encoder = AutoModel.from_pretrained(config.encoder).float()
    return HyperFlowAdapter.from_backbone(
        backbone,
        build_peft_config(config.parameters, backbone, config.last_blocks, norms=config.norms),
        last_blocks=config.last_blocks,
        processor=processor,
        encoder=encoder,
        drift_width=config.drift_width,
        drift_depth=config.drift_depth,
        n_steps=config.n_steps,
        lda=config.lda,
        intermediate_weight=config.intermediate_weight,
        image_size=list(image_size),
    )
