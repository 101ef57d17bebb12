"""The files of a saved adapter: found in a folder or on the Hub, and checked before anything is made of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .configuration import HyperFlowConfig
from .hub import fetch
from .saving import CheckpointError, require_sha256
from .task_files import CHECKSUMS

WEIGHTS = "model.safetensors"
TRAINING_RECORD = "training.json"

#: Arguments of `from_pretrained` that say how to load from the Hub.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")

#: Patterns of the names of weights in checkpoints of version 0.1, and their names today.
RENAMED_WEIGHTS = {r"^metric\.": "head.", r"^log_scale$": "logit_scale"}


def fetch_adapter(
    name: str | os.PathLike, hub: dict[str, Any], subfolder: str = "", config: HyperFlowConfig | None = None
) -> tuple[Path, HyperFlowConfig]:
    """Fetch an adapter, check that its files are there and whole, and return their folder and its config.

    Args:
        name: a folder or a Hub id.
        hub: values for some of `HUB_ARGUMENTS`.
        subfolder: the folder in it that holds the adapter.
        config: a config to use instead of that of the adapter.

    Raises:
        CheckpointError: there is no adapter, it may not be read, or it is neither within reach nor in the cache; or a
            file is damaged or missing.
    """
    root = fetch(name, "*.json", **hub)
    folder = root / subfolder
    if config is None:
        config = _read_config(name, folder)
    # The weights are fetched only once this is known to be an adapter, and from the same commit.
    if not os.path.isdir(name):
        hub = dict(hub, revision=root.name)
    fetch(name, f"*{WEIGHTS}", **hub)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{name} has no {WEIGHTS}: the adapter is incomplete.")
    require_sha256(folder / WEIGHTS, config.weights_sha256)
    return folder, config


def _read_config(name: str | os.PathLike, folder: Path) -> HyperFlowConfig:
    try:
        content, _ = HyperFlowConfig.get_config_dict(folder)
        is_adapter = content.get("model_type") == HyperFlowConfig.model_type and bool(content.get("peft"))
        if is_adapter:
            return HyperFlowConfig.from_pretrained(folder)
    except Exception as error:  # the file may hold anything
        raise CheckpointError(f"{name} holds no readable HyperFlow adapter: {error}") from error
    hint = ""
    if (folder / CHECKSUMS).is_file():
        hint = " It is an adapted task: load it with AdaptedTask.from_pretrained."
    raise CheckpointError(f"{name} does not describe a HyperFlow adapter in its config.json.{hint}")


def require_all_weights(folder: Path, info: dict[str, Any]) -> None:
    """Check the `output_loading_info` of `PreTrainedModel.from_pretrained`: all weights were loaded, and no others.

    Raises:
        CheckpointError: weights are missing, unknown or of another shape. They are named.
    """
    wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    wrong += sorted(key for key, *_ in info["mismatched_keys"])
    if wrong:
        raise CheckpointError(
            f"{folder / WEIGHTS} does not fit config.json; missing, unknown or of another shape: {', '.join(wrong[:8])}"
        )
