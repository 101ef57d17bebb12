"""What a saved adapter or a saved task is, in words."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import PeftConfig, PeftType
from torch import nn

from .modeling.adapter import HyperFlowAdapter
from .modeling.checksums import CHECKSUMS
from .modeling.hub import fetch
from .modeling.model_card import describe_feature
from .modeling.saving import CheckpointError, reading
from .modeling.task_files import TaskFiles, read_task

#: How many names of classes or files are listed in a line.
MAX_NAMES = 10


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter in words; every field is a row of `hyperflow info`."""

    kind: str
    backbone: str
    generates: str
    support_encoder: str
    task_encoder: str
    drift_network: str
    solver: str
    head: str
    image_processor: str
    size: str


@dataclass(frozen=True)
class TaskInfo:
    """An adapted task in words; every field is a row of `hyperflow info`."""

    kind: str
    classes: str
    backbone: str
    adapter: str
    prototypes: str
    size: str


def describe(name_or_folder: str | os.PathLike) -> AdapterInfo | TaskInfo:
    """Describe an adapter or an adapted task, after checking that its files are whole.

    Args:
        name_or_folder: a folder or a Hub id.

    Raises:
        CheckpointError: there is neither an adapter nor a task, its files are damaged, or the Hub does not give them.
    """
    with reading(fetch(name_or_folder, "*.json", "*.safetensors")) as folder:
        size = format_size(folder)
        if (folder / CHECKSUMS).is_file():
            return _describe_task(read_task(folder), size)
        if (folder / "config.json").is_file():
            return _describe_adapter(HyperFlowAdapter.from_pretrained(folder), size)
    raise CheckpointError(
        f"{name_or_folder} is neither a HyperFlow adapter nor an adapted task: it has no config.json, no {CHECKSUMS}."
    )


def list_names(names: Sequence[str]) -> str:
    """Names in a row, of which no more than `MAX_NAMES` are listed: "a, b, c and 97 more"."""
    text = ", ".join(names[:MAX_NAMES])
    if len(names) > MAX_NAMES:
        text += f" and {len(names) - MAX_NAMES} more"
    return text


def format_size(folder: Path) -> str:
    """The size of all files of a folder, in MB or kB."""
    n_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if n_bytes >= 1e6:
        return f"{n_bytes / 1e6:.1f} MB"
    return f"{n_bytes / 1e3:.1f} kB"


def _describe_adapter(adapter: HyperFlowAdapter, size: str) -> AdapterInfo:
    config, space, backbone = adapter.config, adapter.space, adapter.config.backbone
    name = backbone["name_or_path"] or "unnamed"
    encoder = "the first blocks of the backbone"
    if adapter.encoder is not None and config.encoder is not None:
        encoder = f"a separate {config.encoder['model_type']}, {_count_parameters(adapter.encoder)} parameters"
    head = "cosines to the class means"
    if config.lda:
        head = "a regularised LDA whose covariance was measured on the training domains"
    solver = f"{config.solver}, {config.n_steps} steps"
    if config.learned_start:
        solver += ", from learned weights that are the same for every task"
    processor = "none"
    if adapter.processor is not None:
        processor = type(adapter.processor).__name__
    return AdapterInfo(
        kind="HyperFlow adapter",
        backbone=f"{name} ({backbone['model_type']}, {backbone['num_blocks']} blocks of width "
        f"{backbone['hidden_size']})",
        generates=f"a PEFT {_get_peft_name(space.peft_config)} adapter for the last {config.last_blocks} blocks, "
        f"{space.n_parameters:,} parameters in {space.n_tokens} tokens",
        support_encoder=encoder,
        task_encoder=f"{_count_parameters(adapter.task_encoder)} parameters",
        drift_network=f"{_count_parameters(adapter.drift)} parameters: width {config.drift_width}, "
        f"depth {config.drift_depth}, {config.drift_heads} heads",
        solver=solver,
        head=head,
        image_processor=processor,
        size=size,
    )


def _describe_task(files: TaskFiles, size: str) -> TaskInfo:
    n_way, width = files.prototypes.shape
    n_parameters = sum(tensor.numel() for tensor in files.adapter_state.values())
    feature = describe_feature(files.pooling, files.start, files.intermediate_weight)
    return TaskInfo(
        kind="adapted task",
        classes=f"{n_way}: {list_names(files.class_names)}",
        backbone=files.peft_config.base_model_name_or_path or "unnamed",
        adapter=f"PEFT {_get_peft_name(files.peft_config)}, {n_parameters:,} parameters",
        prototypes=f"{n_way} of width {width}, of {feature}",
        size=size,
    )


def _get_peft_name(peft_config: PeftConfig) -> str:
    return PeftType(peft_config.peft_type).value


def _count_parameters(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()):,}"
