"""Where the released backbone and adapter lie: on a share or the Hub, in an installed package, or in a clone."""

from __future__ import annotations

import importlib.resources
import os
from contextlib import suppress
from pathlib import Path

from ..modeling.adapter_files import WEIGHTS
from ..modeling.checksums import sha256
from ..modeling.hub import fetch
from ..modeling.saving import CheckpointError

#: The backbone: a ViT-S/14 for images of 70 x 70 pixels.
BACKBONE = "vit-s14-focus-70"

#: The adapter that was trained for it.
ADAPTER = "hyperflow-vit-s14-70"

#: SHA-256 of the weights of each. Wherever they come from, they are these or they are refused.
DIGESTS = {
    BACKBONE: "c4c96cc7fbd94eeecdb3003d0c28ad8959d476fbb5d7bba42a03bbeb67822848",
    ADAPTER: "58bd2a75f7559796dbbcbe9c17a973e9f4fc74227b832e39c9bee71df97c4bc3",
}

#: The environment variable that names another place: a folder that holds both folders, or their owner on the Hub.
PLACE = "HYPERFLOW_WEIGHTS"

#: The package that brings both, made from `model_cards/`, and that folder itself where this is a clone.
_PACKAGE = "hf_hyperflow_weights"
_MODEL_CARDS = Path(__file__).resolve().parents[2] / "model_cards"


def find_released(name: str) -> Path:
    """The folder of a released checkpoint, after its weights were compared with `DIGESTS`.

    If the environment variable HYPERFLOW_WEIGHTS is set, only what it names counts. Otherwise the package
    `hf-hyperflow-weights` is looked at first and then the clone of the repository that this code runs in.

    Args:
        name: `BACKBONE` or `ADAPTER`.

    Raises:
        FileNotFoundError: it is in none of these places; the message says what to do.
        CheckpointError: the place that HYPERFLOW_WEIGHTS names does not give it, or the weights are others.
    """
    place = os.environ.get(PLACE)
    if place:
        folder = _fetch(name, place)
    else:
        folder = _find_installed(name)
    if sha256(folder / WEIGHTS) != DIGESTS[name]:
        raise CheckpointError(
            f"{folder / WEIGHTS} is not that of the released {name}: its SHA-256 is another one. Install, copy or "
            "download it again. A model of your own is named with --backbone or --adapter instead."
        )
    return folder


def _fetch(name: str, place: str) -> Path:
    """The folder in a place that the user named. Its files are downloaded if the place is on the Hub."""
    try:
        # Together these are the path of a folder, or the owner and the name of a repository.
        folder = fetch(f"{place.rstrip('/')}/{name}", "*.json", WEIGHTS)
    except CheckpointError as error:
        raise CheckpointError(f"{PLACE} is {place!r}: {error}") from error
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{PLACE} is {place!r}, but {folder} has no {WEIGHTS}. Copy or upload {name} whole.")
    return folder


def _find_installed(name: str) -> Path:
    """The folder in the package of the weights, or else in the clone."""
    places = []
    with suppress(ModuleNotFoundError):
        places.append(Path(str(importlib.resources.files(_PACKAGE))))
    for place in (*places, _MODEL_CARDS):
        if (place / name / WEIGHTS).is_file():
            return place / name
    raise FileNotFoundError(
        f"the released checkpoint {name} is not installed. Either install the package hf-hyperflow-weights (`pip "
        f"install ./model_cards` in a clone of the repository, or its wheel), or set {PLACE} to a folder that holds "
        f"{BACKBONE} and {ADAPTER}, or to the owner of these two on the Hub."
    )
