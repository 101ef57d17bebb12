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
        learned_start=config.learned_start,
        n_steps=config.n_steps,
        lda=config.lda,
        intermediate_weight=config.intermediate_weight,
        image_size=list(image_size),
    )


@torch.no_grad()
def copy_weights(adapter: HyperFlowAdapter, source: str) -> HyperFlowAdapter:
    """Give a new adapter the weights of a trained one: a folder or a Hub id.

    A learned start that the trained one does not have stays where it is.

    Returns:
        The trained one.

    Raises:
        CheckpointError: there is no such adapter, or it is damaged.
        ValueError: it generates other parameters, or its networks have other sizes.
    """
    trained = HyperFlowAdapter.from_pretrained(source)
    weights, own = trained.state_dict(), adapter.state_dict()
    if adapter.start_z is not None and trained.start_z is None:
        weights["start_z"] = own["start_z"]
    if trained.space.key != adapter.space.key or _list_shapes(weights) != _list_shapes(own):
        raise ValueError(
            f"--init_adapter {source} is another adapter than these settings describe: give the --parameters, "
            "--last_blocks, --drift_width, --drift_depth, --intermediate_weight, --learned_start and head of its run."
        )
    adapter.load_state_dict(weights)
    return trained


def _list_shapes(weights: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items()}
