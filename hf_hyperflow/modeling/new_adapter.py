"""A new adapter: what it notes of its backbone, whether this runs with it, and whether it lies where it is said to."""

from __future__ import annotations

from typing import Any

from .backbones import SplitBackbone
from .blocks import Blocks
from .parameter_space import ParameterSpace
from .trunks import IncompatibleBackboneError, get_name


def describe_backbone(split: SplitBackbone, width: int, fingerprint: list[float]) -> dict[str, Any]:
    """What the config of an adapter says of the backbone that it is made for, see `HyperFlowConfig.backbone`."""
    backbone = split.backbone
    return {
        "name_or_path": get_name(backbone),
        "model_type": backbone.config.model_type,
        "hidden_size": width,
        "num_blocks": len(split.blocks),
        "prefix_width": split.prefix_width,
        "fingerprint": fingerprint,
    }


def require_running(split: SplitBackbone, space: ParameterSpace) -> None:
    """Raise an error if the backbone does not run with the adapter in it, because it reads attributes of a layer."""
    injection = space.inject(split.backbone)
    try:
        split.check()
    except IncompatibleBackboneError as error:
        raise IncompatibleBackboneError(
            f"{type(split.backbone).__name__} does not run with such an adapter in its layers "
            f"({error.__cause__ or error}). Use another kind, such as layernorm_config."
        ) from error
    finally:
        injection.remove()


def require_in_last_blocks(space: ParameterSpace, blocks: Blocks, last_blocks: int) -> None:
    """Raise an error if a tensor of the space lies before the last blocks."""
    modules = tuple(name.rsplit(".", 1)[0] for name in blocks.after(len(blocks) - last_blocks))
    for name in space.names:
        if not name.startswith(modules):
            raise IncompatibleBackboneError(f"{name} is not in the last {last_blocks} blocks: raise last_blocks.")
