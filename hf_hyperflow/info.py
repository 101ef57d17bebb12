"""What a saved adapter or task is, for people."""

from __future__ import annotations

import json
import os
from pathlib import Path

from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from torch import nn

from .modeling.adapter import HyperFlowAdapter
from .modeling.hub import fetch
from .modeling.model_card import describe_feature
from .modeling.saving import CheckpointError, require_sha256
from .modeling.task_files import ADAPTER_WEIGHTS, CHECKSUMS, PROTOTYPES


def describe(name_or_folder: str | os.PathLike) -> dict[str, str]:
    """Properties of an adapter or an adapted task, after a check that it is whole.

    Args:
        name_or_folder: a folder or a Hub id.

    Raises:
        CheckpointError: neither of them is there, it is damaged, or the Hub does not give it.
    """
    folder = fetch(name_or_folder, "*.json", "*.safetensors")
    if (folder / CHECKSUMS).is_file():
        return _describe_task(folder)
    if (folder / "config.json").is_file():
        adapter = HyperFlowAdapter.from_pretrained(folder)
        return _describe_adapter(adapter) | {"size": size(folder)}
    raise CheckpointError(
        f"{name_or_folder} is neither a HyperFlow adapter nor an adapted task: it has no config.json, no {CHECKSUMS}."
    )


def size(folder: Path) -> str:
    """How much disk the files of a folder take."""
    n_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:.1f} kB"


def _describe_adapter(adapter: HyperFlowAdapter) -> dict[str, str]:
    config, space, backbone = adapter.config, adapter.space, adapter.config.backbone
    if adapter.encoder is None:
        encoder = "the first blocks of the backbone"
    else:
        encoder = f"a {config.encoder['model_type']} of its own, {_count(adapter.encoder)} parameters"
    return {
        "what": "HyperFlow adapter",
        "backbone": f"{backbone['name_or_path'] or 'unnamed'} ({backbone['model_type']}, {backbone['num_blocks']} "
        f"blocks of width {backbone['hidden_size']})",
        "generates": f"a PEFT {space.peft_config.peft_type.value} adapter for the last {config.last_blocks} blocks, "
        f"{space.n_parameters:,} parameters in {space.n_tokens} tokens",
        "support encoder": encoder,
        "task encoder": f"{_count(adapter.task_encoder)} parameters",
        "drift network": f"{_count(adapter.drift)} parameters: width {config.drift_width}, depth {config.drift_depth}, "
        f"{config.drift_heads} heads",
        "solver": f"{config.solver}, {config.n_steps} steps",
        "classes compared": "by plain cosines"
        if adapter.head is None
        else "in a metric measured on the training domains",
        "image processor": "none" if adapter.processor is None else type(adapter.processor).__name__,
    }


def _describe_task(folder: Path) -> dict[str, str]:
    try:
        for name, digest in json.loads((folder / CHECKSUMS).read_text()).items():
            require_sha256(folder / name, digest)
        peft_config = PeftConfig.from_pretrained(str(folder))
        with safe_open(folder / PROTOTYPES, framework="pt") as file:
            metadata, (n_way, width) = file.metadata(), file.get_slice("prototypes").get_shape()
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            n_parameters = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 (not a dict)
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder} holds no readable HyperFlow task: {error}") from error
    feature = describe_feature(metadata["pooling"], int(metadata["start"]), float(metadata.get("middle", 0)))
    return {
        "what": "adapted task",
        "classes": f"{n_way}: {', '.join(json.loads(metadata['labels']))}",
        "backbone": peft_config.base_model_name_or_path or "unnamed",
        "adapter": f"PEFT {peft_config.peft_type.value}, {n_parameters:,} parameters",
        "prototypes": f"{n_way} of width {width}, of {feature}",
        "size": size(folder),
    }


def _count(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()):,}"
