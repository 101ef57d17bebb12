"""The files of a saved task: a plain PEFT adapter, with the class prototypes and the labels beside it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import BeftConfig, LoraConfig, PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.warning import PeftWarning
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.image_processing_utils import BaseImageProcessor

from .backbones import SplitBackbone
from .checksums import CHECKSUMS, check_files
from .hub import fetch
from .images import load_processor
from .injection import ADAPTER_NAME, Injection
from .json_fields import parse_json, read_json
from .locks import ignored_warnings
from .peft_configs import build_peft_config
from .peft_validation import validate_peft
from .rejection import Rejection
from .saving import CheckpointError, reading
from .task_validation import validate_task
from .tensor_files import list_differences, read_tensors
from .trunks import IncompatibleBackboneError, get_name

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PROTOTYPES = "prototypes.safetensors"


@dataclass(frozen=True)
class TaskFiles:
    """The content of the folder of a saved task.

    Attributes:
        peft_config, adapter_state: config and tensors of the PEFT adapter.
        prototypes: `(n_way, width)`, to be used as they are.
        scale: the inverse temperature of the logits.
        rejection: tells images of none of the classes; None if the task cannot.
        class_names: the labels, in the order of the prototypes.
        start, pooling, intermediate_weight: of the `SplitBackbone` that the features come from.
        processor: the image processor; None if the task was saved without one.
    """

    peft_config: PeftConfig
    adapter_state: dict[str, torch.Tensor]
    prototypes: torch.Tensor
    scale: float
    rejection: Rejection | None
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
            files are damaged, or say what is not allowed (see `validate_task` and `validate_peft`).
    """
    folder = fetch(name_or_folder, "*.json", ADAPTER_WEIGHTS, PROTOTYPES, **hub)
    with reading(folder) as whole:
        if not (whole / CHECKSUMS).is_file():
            raise CheckpointError(f"{name_or_folder} holds no readable HyperFlow task: it has no {CHECKSUMS}.")
        return _read_folder(whole)


def _read_folder(folder: Path) -> TaskFiles:
    digests = check_files(folder, CHECKSUMS)  # version 0.1 listed only the two files that have to be there
    for name in (ADAPTER_WEIGHTS, PROTOTYPES):
        if name not in digests or not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing, or {CHECKSUMS} does not name it.")
    adapter_config = read_json(folder / ADAPTER_CONFIG)
    validate_peft(adapter_config, folder / ADAPTER_CONFIG)
    try:
        peft_config = build_peft_config(adapter_config)
    except (ValueError, TypeError) as error:  # fields that do not go together
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} describes no adapter that PEFT can build ({error}). The file is damaged: "
            "download or copy it again."
        ) from error
    tensors, description = read_tensors(folder / PROTOTYPES), _read_description(folder / PROTOTYPES)
    validate_task(tensors, description, folder / PROTOTYPES)
    prototypes = tensors["prototypes"].float()
    if "prototypes" not in description:  # the first tasks had plain class means
        prototypes = F.normalize(prototypes, dim=-1)
    return TaskFiles(
        peft_config=peft_config,
        adapter_state=read_tensors(folder / ADAPTER_WEIGHTS),
        prototypes=prototypes,
        scale=tensors["scale"].item(),
        rejection=_read_rejection(tensors),
        class_names=description["labels"],
        start=description["start"],
        pooling=description["pooling"],
        intermediate_weight=description["intermediate_weight"],
        processor=load_processor(folder),
    )


def _read_rejection(tensors: dict[str, torch.Tensor]) -> Rejection | None:
    """The rejection of a task; version 0.1 and adapters without one did not write it."""
    if "rejection" not in tensors:
        return None
    return Rejection(*tensors["rejection"].tolist())


def _read_description(path: Path) -> dict[str, Any]:
    """What the file of the prototypes says of the labels and the features, as JSON would hold it."""
    with safe_open(path, framework="pt") as file:
        description: dict[str, Any] = dict(file.metadata() or {})
    # Version 0.1 called the intermediate weight "middle"; the first tasks had none.
    description.setdefault("intermediate_weight", description.pop("middle", "0"))
    for name in ("labels", "start", "intermediate_weight"):
        if name in description:
            description[name] = parse_json(description[name], f"{path}: {name}")
    return description


def load_state(injection: Injection, state: dict[str, torch.Tensor], name: str) -> None:
    """Load the tensors of a saved adapter into an injection.

    Raises:
        IncompatibleBackboneError: tensors are missing, unknown or of another shape. Unknown ones are never loaded: they
            could be the backbone's own.
    """
    model = injection.peft_model
    # With `state_dict`, PEFT does not warn of LoRA's biases, which it takes for matrices that lost a part.
    expected = get_peft_model_state_dict(model, model.state_dict(), save_embedding_layers=False)
    wrong = list_differences(state, expected)
    if wrong:
        raise IncompatibleBackboneError(
            f"{name} does not fit this {type(injection.backbone).__name__}; missing, unknown or of another shape: "
            f"{', '.join(wrong[:8])}. Use the backbone that the task was made with."
        )
    set_peft_model_state_dict(model, state)


def write_adapter(folder: Path, injection: Injection) -> None:
    """Write the injected adapter with its weights, as PEFT does, and the name of its backbone, see `get_name`."""
    injection.peft_model.peft_config[ADAPTER_NAME].base_model_name_or_path = get_name(injection.backbone)
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
    folder: Path,
    prototypes: torch.Tensor,
    scale: float,
    rejection: Rejection | None,
    class_names: list[str],
    split: SplitBackbone,
) -> None:
    """Write the prototypes `(n_way, width)` and their labels.

    Beside them are the numbers that make scores of their products, and how the features are computed to multiply with.
    """
    tensors = {"prototypes": prototypes.cpu().contiguous(), "scale": torch.tensor(scale)}
    if rejection is not None:
        tensors["rejection"] = torch.tensor([rejection.offset, rejection.odds, rejection.cosine])
    metadata = {
        "labels": json.dumps(class_names, ensure_ascii=False),
        "pooling": split.pooling,
        "start": str(split.start),
        "intermediate_weight": str(split.intermediate_weight),
        "prototypes": "to be used as they are",
    }
    save_file(tensors, folder / PROTOTYPES, metadata)
