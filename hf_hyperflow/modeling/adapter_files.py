"""The files of a saved adapter: found in a folder or on the Hub, and checked before anything is made of them."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from .checksums import CHECKSUMS, MODEL_CHECKSUMS, check_files, require_sha256
from .config_validation import validate_config
from .configuration import HyperFlowConfig, get_own_fields
from .hub import fetch
from .json_fields import read_json
from .model_card import adapter_card
from .parameter_space import ParameterSpace
from .saving import CheckpointError, reading
from .tensor_files import read_tensors

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
TRAINING_RECORD = "training.json"

#: Arguments of `from_pretrained` that say how to load from the Hub.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")

#: Patterns of the names of weights in checkpoints of version 0.1, and their names today.
RENAMED_WEIGHTS = {r"^metric\.": "head.", r"^log_scale$": "logit_scale"}


@contextmanager
def open_adapter(
    name: str | os.PathLike, hub: dict[str, Any], subfolder: str = "", config: HyperFlowConfig | None = None
) -> Iterator[tuple[Path, HyperFlowConfig]]:
    """Fetch an adapter, check that its files are there and whole, and yield their folder and its config.

    Within, the files in the folder are those of one version, see `reading`.

    Args:
        name: a folder or a Hub id.
        hub: values for some of `HUB_ARGUMENTS`.
        subfolder: the folder in it that holds the adapter.
        config: a config to use instead of that of the adapter.

    Raises:
        CheckpointError: there is no adapter, it may not be read, or it is neither within reach nor in the cache; or a
            file is damaged or missing, or the config has a value that is not allowed (see `validate_config`).
    """
    root = fetch(name, "*.json", **hub)
    with reading(root / subfolder) as folder:
        if config is None:
            config = _read_config(name, folder)
        else:  # transformers' AutoConfig made it of a file
            own_fields = {key: vars(config)[key] for key in get_own_fields()}
            config = HyperFlowConfig(**own_fields)
        validate_config(config, folder / CONFIG)
        # The weights are fetched only once this is known to be an adapter, and from the same commit.
        if not os.path.isdir(name):
            hub = dict(hub, revision=root.name)
        fetch(name, f"*{WEIGHTS}", **hub)
        if not (folder / WEIGHTS).is_file():
            raise CheckpointError(f"{name} has no {WEIGHTS}: the adapter is incomplete.")
        _check_files(folder, config)
        yield folder, config


def _check_files(folder: Path, config: HyperFlowConfig) -> None:
    """Compare the files with their digests. The first adapters noted only that of the weights, in their config.

    Raises:
        CheckpointError: a file is damaged or missing, or the config is of another version than the weights.
    """
    try:
        digests = check_files(folder, MODEL_CHECKSUMS)
    except FileNotFoundError:
        require_sha256(folder / WEIGHTS, config.weights_sha256)
        return
    for name in (WEIGHTS, CONFIG):
        if name not in digests:
            raise CheckpointError(f"{folder / MODEL_CHECKSUMS} is damaged: it does not name {name}.")
    if config.weights_sha256 not in (None, digests[WEIGHTS]):
        raise CheckpointError(f"the adapter in {folder} is another one than when its config was read. Load it again.")


def _read_config(name: str | os.PathLike, folder: Path) -> HyperFlowConfig:
    """The fields of an adapter in `config.json`. What any config of transformers can hold besides is left out."""
    hint = ""
    if (folder / CHECKSUMS).is_file():
        hint = " It is an adapted task: load it with AdaptedTask.from_pretrained."
    if not (folder / CONFIG).exists():
        raise CheckpointError(f"{name} holds no HyperFlow adapter: it has no {CONFIG}.{hint}")
    content = read_json(folder / CONFIG)
    if content.get("model_type") != HyperFlowConfig.model_type or not content.get("peft"):
        raise CheckpointError(f"{name} does not describe a HyperFlow adapter in its {CONFIG}.{hint}")
    known, general = get_own_fields(), PreTrainedConfig().to_dict().keys()
    own = {}
    for key, value in content.items():
        key = HyperFlowConfig.attribute_map.get(key, key)
        if key in known:
            own[key] = value
        elif key not in general and key not in ("auto_map", "torch_dtype"):
            raise CheckpointError(
                f"{folder / CONFIG} has a field {reprlib.repr(key)} that is not known. The file is damaged or was made "
                "by a newer version: update hf_hyperflow, or download the adapter again."
            )
    return HyperFlowConfig(**own)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read the weights of an adapter, under the names of today; for the errors see `read_tensors`."""
    weights = {}
    for name, tensor in read_tensors(path).items():
        for pattern, new in RENAMED_WEIGHTS.items():
            name = re.sub(pattern, new, name)
        weights[name] = tensor
    return weights


def read_training_record(path: Path, config: HyperFlowConfig, space: ParameterSpace) -> dict[str, Any] | None:
    """Read a training record and check that the adapter's card can be written from it; None if there is none.

    Args:
        path: the file.
        config, space: of the adapter.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not path.exists():
        return None
    record = read_json(path)
    try:
        adapter_card(config, space, record)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{path} is damaged, it is no record of a training ({type(error).__name__}: {error}). Download or copy it "
            "again."
        ) from error
    return record
