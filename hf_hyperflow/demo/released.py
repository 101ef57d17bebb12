"""Where the released checkpoints lie: in a clone of this repository."""

from __future__ import annotations

from pathlib import Path

#: The backbone: a ViT-S/14 for images of 70 x 70 pixels.
BACKBONE = "vit-s14-focus-70"

#: The adapter that was trained for it.
ADAPTER = "hyperflow-vit-s14-70"

_MODEL_CARDS = Path(__file__).resolve().parents[2] / "model_cards"


def find_released(name: str) -> Path:
    """The folder of a released checkpoint, `BACKBONE` or `ADAPTER`.

    Raises:
        FileNotFoundError: this is not an editable install of a clone; the message says what to do.
    """
    folder = _MODEL_CARDS / name
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the released checkpoint {name} is not at {folder}: it comes with a clone of the repository "
            "(`make quickstart` there). Elsewhere, name the folders or Hub ids of a backbone and an adapter."
        )
    return folder
