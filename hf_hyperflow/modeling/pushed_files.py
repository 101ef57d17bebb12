"""What a push sends: the files that this package writes, with no links and no paths of this machine in them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from .checksums import CHECKSUMS, MODEL_CHECKSUMS
from .model_card import CARD, is_hub_id
from .saving import CheckpointError

#: Lists of the SHA-256 of other files, by their names.
CHECKSUM_LISTS = (CHECKSUMS, MODEL_CHECKSUMS)

#: Configs, in which libraries note the folder that a model was loaded from.
CONFIGS = ("config.json", "adapter_config.json")

#: Fields of these that name a model.
NAME_FIELDS = ("name_or_path", "_name_or_path", "base_model_name_or_path")

#: The files of an adapter or a task. Code that travels with an adapter is named as the files of this folder.
SAVED_FILES = (
    CARD,
    *CONFIGS,
    *CHECKSUM_LISTS,
    "model.safetensors",
    "training.json",
    "adapter_model.safetensors",
    "prototypes.safetensors",
    "preprocessor_config.json",
)


def list_files(folder: Path, *patterns: str) -> list[Path]:
    """The files that `push_folder` sends, by their paths in the folder.

    Raises:
        CheckpointError: one of them is a link, or lies behind one: links are not followed.
    """
    if not patterns:
        code = [path.name for path in Path(__file__).parent.glob("[!_]*.py")]
        patterns = (*SAVED_FILES, *code)
    files: set[Path] = set()
    for pattern in patterns:
        files.update(path.relative_to(folder) for path in folder.glob(pattern))
    for file in files:
        for part in (file, *file.parents[:-1]):
            if (folder / part).is_symlink():
                raise CheckpointError(f"{folder / part} is a link, which is not followed: put the file itself there.")
    return sorted(file for file in files if (folder / file).is_file())


def remove_paths(folder: Path, files: list[Path]) -> dict[Path, bytes]:
    """The new content of the configs that name a folder of this machine, and of the lists that hold their digests.

    Raises:
        CheckpointError: one of these files is damaged.
    """
    contents: dict[Path, bytes] = {}
    for file in files:
        if file.name in CONFIGS:
            config = _read_json(folder / file)
            if _empty_paths(config):
                contents[file] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    for file in files:
        if contents and file.name in CHECKSUM_LISTS:
            digests = _read_json(folder / file)
            for changed, content in contents.items():
                if changed.name in digests:
                    digests[changed.name] = hashlib.sha256(content).hexdigest()
            contents[file] = json.dumps(digests, indent=1).encode()
    return contents


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}). Download or copy it again.") from error


def _empty_paths(config: Any) -> bool:
    """Empty the names of models in a config that are no Hub ids, also in configs inside it; whether there were any."""
    is_changed = False
    if isinstance(config, list):
        for item in config:
            is_changed |= _empty_paths(item)
    if isinstance(config, dict):
        for key, value in config.items():
            if key in NAME_FIELDS and isinstance(value, str) and value and not is_hub_id(value):
                config[key] = ""
                is_changed = True
            else:
                is_changed |= _empty_paths(value)
    return is_changed
