"""The PEFT configs whose weights a flow can generate: biases, LoRA factors, norms."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft import BeftConfig, LNTuningConfig, LoraConfig, PeftConfig, PeftType
from torch import nn

from .gate import find_blocks
from .peft_validation import PEFT_CONFIGS, get_default
from .trunks import IncompatibleBackboneError, find_trunk, is_norm, plain_modules


def find_linear_paths(backbone: nn.Module, last_blocks: int) -> list[str]:
    """Dotted paths of every `nn.Linear` in the last blocks, except the keys of attention.

    A bias on the keys adds the same number to all scores of a query, which softmax cancels.

    Raises:
        IncompatibleBackboneError: the backbone cannot be adapted, or it has fewer than `last_blocks` blocks.
    """
    paths = []
    for path, module in _last_block_modules(backbone, last_blocks):
        if isinstance(module, nn.Linear) and not path.endswith(("k_proj", ".key")):
            paths.append(path)
    return paths


def find_convolution_paths(backbone: nn.Module, last_blocks: int) -> list[str]:
    """Dotted paths of every `nn.Conv2d` in the last blocks, except depthwise and other grouped ones.

    Raises:
        IncompatibleBackboneError: see `find_linear_paths`.
    """
    paths = []
    for path, module in _last_block_modules(backbone, last_blocks):
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            paths.append(path)
    return paths


def find_norm_paths(backbone: nn.Module, last_blocks: int) -> list[str]:
    """Dotted paths of every norm with a weight in the last blocks, and of those behind the last block.

    Raises:
        IncompatibleBackboneError: see `find_linear_paths`.
    """
    paths = [path for path, module in _last_block_modules(backbone, last_blocks) if is_norm(module)]
    return paths + list(find_blocks(backbone).norms)


def _last_block_modules(backbone: nn.Module, last_blocks: int) -> list[tuple[str, nn.Module]]:
    trunk = find_trunk(backbone)
    blocks = find_blocks(trunk)
    if not 1 <= last_blocks <= len(blocks):
        raise IncompatibleBackboneError(f"last_blocks={last_blocks}, but the backbone has {len(blocks)} blocks.")
    prefixes = tuple(f"{path}." for path in blocks.paths[len(blocks) - last_blocks :])
    return [(path, module) for path, module in plain_modules(trunk) if path.startswith(prefixes)]


def _leave_out_shared(backbone: nn.Module, paths: list[str]) -> list[str]:
    """The paths without those that are the ends of other modules' paths.

    PEFT would take these modules as well: with "layernorm", for one, also "embeddings.layernorm".
    """
    others = [path for path, _ in plain_modules(find_trunk(backbone)) if path not in paths]
    return [path for path in paths if not any(other.endswith(path) for other in others)]


def _require_targets(backbone: nn.Module, paths: list[str], missing: str, remedy: str) -> list[str]:
    """The paths that PEFT takes for nothing else; an error if there are none."""
    paths = _leave_out_shared(backbone, paths)
    if not paths:
        raise IncompatibleBackboneError(
            f"the last blocks of {type(backbone).__name__} have no {missing}. Use {remedy}, or raise last_blocks."
        )
    return paths


def bias_config(backbone: nn.Module, last_blocks: int, *, norms: bool = True) -> BeftConfig:
    """Bias tuning of the last blocks (Ben Zaken et al. 2022), the parameter set of the HyperFlow paper.

    Args:
        norms: also move the weights and biases of the norms, which PEFT carries in `modules_to_save`.

    Raises:
        IncompatibleBackboneError: see `find_linear_paths`; or there is no linear layer, as in ResNet, whose biases are
            those of its norms.
    """
    paths = find_linear_paths(backbone, last_blocks)
    return BeftConfig(
        target_modules=_require_targets(backbone, paths, "linear layers", "layernorm_config or lora_config"),
        modules_to_save=_leave_out_shared(backbone, find_norm_paths(backbone, last_blocks)) if norms else None,
    )


def lora_config(backbone: nn.Module, last_blocks: int, *, r: int = 2) -> LoraConfig:
    """LoRA (Hu et al. 2022) of rank `r` on every linear layer and ungrouped convolution of the last blocks.

    The keys of attention are left out.

    Raises:
        IncompatibleBackboneError: see `find_linear_paths`; or there is no such layer.
    """
    paths = find_linear_paths(backbone, last_blocks) + find_convolution_paths(backbone, last_blocks)
    targets = _require_targets(backbone, paths, "linear layers or ungrouped convolutions", "layernorm_config")
    return LoraConfig(r=r, lora_alpha=r, target_modules=targets)


def layernorm_config(backbone: nn.Module, last_blocks: int) -> LNTuningConfig:
    """Tuning of the norms (Zhao et al. 2024) of the last blocks and of those behind: layer, RMS and batch norms.

    Raises:
        IncompatibleBackboneError: see `find_linear_paths`; or there is no norm.
    """
    paths = find_norm_paths(backbone, last_blocks)
    return LNTuningConfig(target_modules=_require_targets(backbone, paths, "norms", "lora_config"))


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
