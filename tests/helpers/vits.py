"""One tiny model of every kind of vision transformer that is supported, and two that are not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import (
    BeitConfig,
    BeitModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedConfig,
    SwinConfig,
    SwinModel,
)

from tests.helpers.tiny import SIZE, scrambled, tiny_dinov2, tiny_vit

SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "image_size": SIZE,
    "patch_size": 14,
}


def _build(model: type, config: PreTrainedConfig) -> nn.Module:
    torch.manual_seed(0)
    return scrambled(model(config))


def tiny_deit() -> nn.Module:
    return _build(DeiTModel, DeiTConfig(intermediate_size=64, **SIZES))


def tiny_dinov2_with_registers() -> nn.Module:
    return _build(Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**SIZES))


def tiny_dinov3() -> nn.Module:
    return _build(DINOv3ViTModel, DINOv3ViTConfig(intermediate_size=64, num_register_tokens=2, **SIZES))


def tiny_beit() -> nn.Module:
    return _build(BeitModel, BeitConfig(intermediate_size=64, use_mean_pooling=False, **SIZES))


def tiny_clip() -> nn.Module:
    return _build(CLIPVisionModel, CLIPVisionConfig(intermediate_size=64, **SIZES))


def tiny_swin() -> nn.Module:
    config = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=4)
    return _build(SwinModel, config)


VITS: dict[str, Callable[[], nn.Module]] = {
    "dinov2": tiny_dinov2,
    "vit": tiny_vit,
    "deit": tiny_deit,
    "dinov2 with registers": tiny_dinov2_with_registers,
    "dinov3": tiny_dinov3,
    "beit": tiny_beit,
}
