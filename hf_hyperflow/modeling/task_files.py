"""The files of a saved task: a plain PEFT adapter, with the class prototypes and the labels beside it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import BeftConfig, LoraConfig, PeftConfig
from peft.utils.warning import PeftWarning
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.image_processing_utils import BaseImageProcessor

from .backbones import SplitBackbone
from .checksums import CHECKSUMS, check_files
from .hub import fetch
from .images import load_processor
from .injection import Injection
from .locks import ignored_warnings
from .saving import CheckpointError, reading

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PROTOTYPES = "prototypes.safetensors"


@dataclass(frozen=True)
class TaskFiles:
    """The content of the folder of a saved task.

    Attributes:
        peft_config, adapter_state: config and tensors of the PEFT adapter.
        prototypes: `(n_way, width)`, to be used as they are.
        scale: the inverse temperature of the logits.
        class_names: the labels, in the order of the prototypes.
        start, pooling, intermediate_weight: of the `SplitBackbone` that the features come from.
        processor: the image processor; None if the task was saved without one.
    """

    peft_config: PeftConfig
    adapter_state: dict[str, torch.Tensor]
    prototypes: torch.Tensor
    scale: float
    class_names: list[str]
    start: int
    pooling: str
    intermediate_weight: float
    processor: BaseImageProcessor | None


def read_task(name_or_folder: str | os.PathLike, **hub: Any) -> TaskFiles:
    """Read a saved task from a folder or the Hub, after a check that its files are whole and of one version.

    Args:
        name_or_folder: a folder or a Hub id.
        hub: arguments of `fetch`.

    Raises:
        CheckpointError: there is no task, it may not be read, or it is neither within reach nor in the cache; or its
            files are damaged.
    """
    folder = fetch(name_or_folder, "*.json", ADAPTER_WEIGHTS, PROTOTYPES, **hub)
    try:
        with reading(folder) as whole:
            return _read_folder(whole)
    except CheckpointError:
        raise
    except Exception as error:  # the files may hold anything
        raise CheckpointError(f"{name_or_folder} holds no readable HyperFlow task: {error}") from error


def _read_folder(folder: Path) -> TaskFiles:
    digests = check_files(folder, CHECKSUMS)  # version 0.1 listed only the two files that have to be there
    for name in (ADAPTER_WEIGHTS, PROTOTYPES):
        if name not in digests or not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing, or {CHECKSUMS} does not name it.")
    peft_config = PeftConfig.from_pretrained(str(folder))
    if peft_config.peft_type is None:
        raise ValueError("its adapter_config.json names no kind of adapter")
    with safe_open(folder / PROTOTYPES, framework="pt") as file:
        metadata = file.metadata()
        prototypes, scale = file.get_tensor("prototypes"), file.get_tensor("scale")
    if "prototypes" not in metadata:  # the first tasks had plain class means
        prototypes = F.normalize(prototypes, dim=-1)
    # Version 0.1 called the intermediate weight "middle"; the first tasks had none.
    intermediate_weight = metadata.get("intermediate_weight", metadata.get("middle", "0"))
    return TaskFiles(
        peft_config=peft_config,
        adapter_state=load_file(folder / ADAPTER_WEIGHTS),
        prototypes=prototypes,
        scale=scale.item(),
        class_names=json.loads(metadata["labels"]),
        start=int(metadata["start"]),
        pooling=metadata["pooling"],
        intermediate_weight=float(intermediate_weight),
        processor=load_processor(folder),
    )


def write_adapter(folder: Path, injection: Injection) -> None:
    """Write the injected adapter with its current weights, as PEFT does."""
    # PEFT takes the bias of a LoRA layer, which is a vector, for a matrix that lost a part.
    invalid_shape = (r".*LoRA tensor\(s\) have invalid shape: .*bias", PeftWarning)
    with ignored_warnings(invalid_shape):
        injection.peft_model.save_pretrained(str(folder))


def write_biases_as_lora(
    folder: Path, backbone: nn.Module, config: BeftConfig, biases: dict[str, torch.Tensor]
) -> None:
    """Write generated biases as a LoRA adapter of rank 1 with A = B = 0 and `lora_bias`.

    An injection that the backbone carries is taken out.

    Args:
        folder: where to write.
        backbone: the model that the adapter is for.
        config: the config of the adapter that the biases belong to.
        biases: tensors of that adapter, as PEFT names them inside the backbone.
    """
    lora_config = LoraConfig(
        r=1,
        lora_alpha=1,
        lora_bias=True,
        target_modules=config.target_modules,
        modules_to_save=config.modules_to_save,
    )
    injection = Injection(backbone, lora_config, seed=0)
    try:
        with torch.no_grad():
            for name, parameter in injection.adapter_parameters().items():
                bias = biases.get(name.replace("lora_B.default.bias", "beft_bias.default"))
                if bias is None:
                    parameter.zero_()
                else:
                    parameter.copy_(bias.view_as(parameter))
        write_adapter(folder, injection)
    finally:
        injection.remove()


def write_prototypes(
    folder: Path, prototypes: torch.Tensor, scale: float, class_names: list[str], split: SplitBackbone
) -> None:
    """Write the prototypes `(n_way, width)`, their labels and how the features are computed that they compare with."""
    tensors = {"prototypes": prototypes.cpu().contiguous(), "scale": torch.tensor(scale)}
    metadata = {
        "labels": json.dumps(class_names, ensure_ascii=False),
        "pooling": split.pooling,
        "start": str(split.start),
        "intermediate_weight": str(split.intermediate_weight),
        "prototypes": "to be used as they are",
    }
    save_file(tensors, folder / PROTOTYPES, metadata)
