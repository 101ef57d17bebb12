"""The released checkpoints, as folders of a clone of this repository."""

from __future__ import annotations

from pathlib import Path

#: The backbone: a ViT-S/14 at 70 px.
BACKBONE = "vit-s14-focus-70"

#: The adapter trained for it.
ADAPTER = "hyperflow-vit-s14-70"

_FOLDER = Path(__file__).resolve().parent.parent / "model_cards"


def released(name: str) -> Path:
    """Folder of a released checkpoint.

    Raises:
        FileNotFoundError: this is not an editable install of a clone; the message says what to do.
    """
    folder = _FOLDER / name
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the released checkpoint {name} is not at {folder}: it comes with a clone of the repository "
            "(`make quickstart` there). Elsewhere, name the folders or Hub ids of a backbone and an adapter."
        )
    return folder
