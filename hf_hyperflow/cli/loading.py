"""Loads adapters, backbones and tasks by the names that were typed, and says what was mistaken for what."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..demo.released import ADAPTER, BACKBONE, find_released
from ..modeling.adapter import HyperFlowAdapter
from ..modeling.checksums import CHECKSUMS
from ..modeling.configuration import HyperFlowConfig
from ..modeling.hub import fetch, within_deadline
from ..modeling.images import IMAGE_SUFFIXES
from ..modeling.model_card import is_hub_id
from ..modeling.saving import CheckpointError, reading
from ..modeling.support import list_visible
from ..modeling.task import AdaptedTask
from ..modeling.task_files import ADAPTER_CONFIG, read_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: What a folder can be taken for.
AN_ADAPTER, A_BACKBONE, A_TASK, IMAGES = "a HyperFlow adapter", "a backbone", "an adapted task", "a folder of images"


def identify(folder: Path) -> str | None:
    """What a folder holds, as far as names of files and the config say; None if they say nothing."""
    if (folder / CHECKSUMS).is_file() or (folder / ADAPTER_CONFIG).is_file():
        return A_TASK
    if (folder / "config.json").is_file():
        return _identify_model(folder / "config.json")
    return IMAGES if has_images(folder) else None


def has_images(folder: Path) -> bool:
    """Whether there are images in a folder or in the folders in it, by their names."""
    for path in list_visible(folder):
        names = [path]
        if path.is_dir():
            names = list_visible(path)
        if any(name.suffix.lower() in IMAGE_SUFFIXES for name in names):
            return True
    return False


def _identify_model(config: Path) -> str | None:
    try:
        content = json.loads(config.read_bytes())
    except ValueError:  # whoever loads it says what is damaged
        return None
    if not isinstance(content, dict) or not content.get("model_type"):
        return None
    return AN_ADAPTER if content["model_type"] == HyperFlowConfig.model_type else A_BACKBONE


def require_folder_or_hub_id(name: str) -> None:
    """Raise an error about a name that is neither a folder here nor can be that of a repository on the Hub.

    Raises:
        CheckpointError: there is no such folder.
    """
    if os.path.isfile(name):
        raise CheckpointError(f"{name} is a file. Give the folder.")
    if not os.path.isdir(name) and not is_hub_id(name):
        raise CheckpointError(f"there is no folder {name}.")


def require_kind(name: str, wanted: str) -> None:
    """Raise an error about a folder that is not there or that holds something else, before the Hub is asked.

    Args:
        name: a folder or a Hub id.
        wanted: one of the kinds above.

    Raises:
        CheckpointError: there is no such folder, or it holds something else.
    """
    require_folder_or_hub_id(name)
    if not os.path.isdir(name):
        return
    found = identify(Path(name))
    if found not in (None, wanted):
        raise CheckpointError(f"{name} is {found}, not {wanted}. Were two options mixed up?")


def require_apart(output: Path, images: Path, what: str) -> None:
    """Raise an error if an output is a folder of images or lies in it, where it would be taken for a class or an image.

    Args:
        output: where something will be written.
        images: a folder of images.
        what: what will be written, in words.

    Raises:
        CheckpointError: it lies there.
    """
    inside, outside = output.resolve(), images.resolve()
    if inside == outside or outside in inside.parents:
        raise CheckpointError(f"{output} is in the folder of the images, {images}: choose another place for {what}.")


@contextmanager
def folder_first(name: str) -> Iterator[None]:
    """Within, an error about a name that is no folder here begins with that: it is the likelier mistake.

    Raises:
        CheckpointError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        text = str(error)
        if os.path.isdir(name) or "there is no folder" in text:
            raise
        raise CheckpointError(f"there is no folder {name}; as a Hub id: {text}") from error


def load_adapter(name: str | None) -> HyperFlowAdapter:
    """An adapter from a folder or the Hub, by default the released one, in evaluation mode."""
    if name is None:
        return HyperFlowAdapter.from_pretrained(find_released(ADAPTER)).eval()
    require_kind(name, AN_ADAPTER)
    with folder_first(name):
        return HyperFlowAdapter.from_pretrained(name).eval()


def choose_backbone(adapter: str | None, flow: HyperFlowAdapter) -> str:
    """The backbone of an adapter where none is given: the released one for the released adapter, else the one it names.

    Args:
        adapter: as given; None for the released adapter.
        flow: the same, loaded.

    Raises:
        CheckpointError: the adapter does not name its backbone, or names a folder that is not here.
    """
    if adapter is None:
        return str(find_released(BACKBONE))
    return _locate(flow.config.backbone["name_or_path"], adapter, "trained for")


def load_backbone(name: str) -> PreTrainedModel:
    """A backbone from a folder or the Hub, in evaluation mode."""
    from transformers import AutoModel

    require_kind(name, A_BACKBONE)
    # A task notes the path that its backbone came from, and is to find it from every other folder.
    path = os.path.abspath(name) if os.path.isdir(name) else name
    with folder_first(name):
        try:
            model = within_deadline(lambda: AutoModel.from_pretrained(path))
        except Exception as error:  # what transformers raises for a bad folder is of many kinds
            raise CheckpointError(
                f"cannot load the backbone {name}: {str(error) or type(error).__name__}. "
                "If the model lies elsewhere, name it with --backbone."
            ) from error
    if isinstance(model, HyperFlowAdapter):  # from the Hub, where `require_kind` sees nothing
        raise CheckpointError(f"{name} is {AN_ADAPTER}, not {A_BACKBONE}: give the model it was trained for.")
    return model.eval()


def load_task(name: str, backbone: str | None) -> AdaptedTask:
    """A saved task on its backbone, by default the one that its PEFT config names."""
    require_kind(name, A_TASK)
    return AdaptedTask.from_pretrained(name, load_backbone(backbone or _read_backbone_name(name)))


def _read_backbone_name(task: str) -> str:
    with folder_first(task):
        fetched = fetch(task, "*.json")
    with reading(fetched) as folder:
        if not (folder / CHECKSUMS).is_file():
            raise CheckpointError(f"{task} is not an adapted task: it has no {CHECKSUMS}.")
    return _locate(read_task(task).peft_config.base_model_name_or_path, task, "made with")


def _locate(name: str | None, owner: str, verb: str) -> str:
    """The folder or Hub id of the backbone that an adapter or a task names.

    Raises:
        CheckpointError: it names none, or a folder that is not here.
    """
    if not name:
        raise CheckpointError(
            f"{owner} does not name its backbone, the model that it was {verb}: give it with --backbone."
        )
    if os.path.isdir(name) or is_hub_id(name):
        return name
    if Path(name).name == BACKBONE:  # the released one, which lies elsewhere on each machine
        return str(find_released(BACKBONE))
    raise CheckpointError(
        f"{owner} was {verb} the backbone in {name}, and there is no such folder here: name it with --backbone."
    )
