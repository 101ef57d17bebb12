"""The files of a saved adapter: found in a folder or on the Hub, and checked before anything is made of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .checksums import CHECKSUMS, MODEL_CHECKSUMS, check_files, require_sha256
from .configuration import HyperFlowConfig
from .hub import fetch
from .saving import CheckpointError, reading

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
            file is damaged or missing.
    """
    root = fetch(name, "*.json", **hub)
    with reading(root / subfolder) as folder:
        if config is None:
            config = _read_config(name, folder)
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
