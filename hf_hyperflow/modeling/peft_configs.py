"""The PEFT configs whose weights a flow can generate: biases, LoRA factors, LayerNorms."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft import BeftConfig, LNTuningConfig, LoraConfig, PeftConfig, PeftType
from torch import nn

from .backbones import IncompatibleBackboneError, find_blocks, plain_modules
from .peft_validation import PEFT_CONFIGS, get_default


def find_linear_paths(backbone: nn.Module, last_blocks: int) -> list[str]:
    """Dotted paths of every `nn.Linear` in the last blocks, except the keys of attention.

    A bias on the keys adds the same number to all scores of a query, which softmax cancels.

    Raises:
        IncompatibleBackboneError: the backbone has no blocks, or fewer than `last_blocks`.
    """
    paths = []
    for path, module in _last_block_modules(backbone, last_blocks):
        if isinstance(module, nn.Linear) and not path.endswith(("k_proj", ".key")):
            paths.append(path)
    return paths


def find_norm_paths(backbone: nn.Module, last_blocks: int) -> list[str]:
    """Dotted paths of every LayerNorm in the last blocks and of the final one.

    Raises:
        IncompatibleBackboneError: the backbone has no blocks, or fewer than `last_blocks`.
    """
    paths = []
    for path, module in _last_block_modules(backbone, last_blocks):
        if isinstance(module, nn.LayerNorm):
            paths.append(path)
    final = find_blocks(backbone).norm
    if final is not None:
        paths.append(final)
    return paths


def _last_block_modules(backbone: nn.Module, last_blocks: int) -> list[tuple[str, nn.Module]]:
    blocks = find_blocks(backbone)
    if not 1 <= last_blocks <= len(blocks):
        raise IncompatibleBackboneError(f"last_blocks={last_blocks}, but the backbone has {len(blocks)} blocks.")
    prefixes = tuple(f"{blocks.path}.{i}." for i in range(len(blocks) - last_blocks, len(blocks)))
    return [(path, module) for path, module in plain_modules(backbone) if path.startswith(prefixes)]


def bias_config(backbone: nn.Module, last_blocks: int, *, norms: bool = True) -> BeftConfig:
    """Bias tuning of the last blocks (Ben Zaken et al. 2022), the parameter set of the HyperFlow paper.

    Args:
        norms: also move the weights and biases of the LayerNorms, which PEFT carries in `modules_to_save`.
    """
    return BeftConfig(
        target_modules=find_linear_paths(backbone, last_blocks),
        modules_to_save=find_norm_paths(backbone, last_blocks) if norms else None,
    )


def lora_config(backbone: nn.Module, last_blocks: int, *, r: int = 2) -> LoraConfig:
    """LoRA (Hu et al. 2022) of rank `r` on every linear layer of the last blocks except the keys of attention."""
    return LoraConfig(r=r, lora_alpha=r, target_modules=find_linear_paths(backbone, last_blocks))


def layernorm_config(backbone: nn.Module, last_blocks: int) -> LNTuningConfig:
    """LayerNorm tuning of the last blocks and of the final norm (Zhao et al. 2024)."""
    return LNTuningConfig(target_modules=find_norm_paths(backbone, last_blocks))


def get_kind(peft_config: PeftConfig) -> str:
    """PEFT's name of a kind of adapter: "BEFT", "LORA", "LN_TUNING", ..."""
    return PeftType(peft_config.peft_type).value


def config_to_dict(peft_config: PeftConfig) -> dict[str, Any]:
    """The fields of a PEFT config that differ from their defaults, ready for JSON.

    `build_peft_config` is the inverse.
    """
    content: dict[str, Any] = {"peft_type": get_kind(peft_config)}
    for field in dataclasses.fields(peft_config):
        if not field.init or field.name in ("peft_type", "peft_version"):
            continue
        value = vars(peft_config)[field.name]
        if value != get_default(field):
            content[field.name] = sorted(value) if isinstance(value, set) else value
    return content


def build_peft_config(content: dict[str, Any]) -> PeftConfig:
    """The PEFT config of fields that `validate_peft` accepts. Fields that this release of PEFT lacks are left out.

    Raises:
        ValueError: an adapter of this kind could be made but not loaded again.
    """
    config_class = PEFT_CONFIGS.get(content["peft_type"])
    if config_class is None:
        raise ValueError(f"PEFT's {content['peft_type']} is not supported: use one of {', '.join(PEFT_CONFIGS)}.")
    known = {field.name for field in dataclasses.fields(config_class) if field.init}
    return config_class(**{name: value for name, value in content.items() if name in known})
