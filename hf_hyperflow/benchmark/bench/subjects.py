"""The pairs of backbone and adapter that are measured: the released one, one's own, and untrained ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
from torch import nn
from transformers import BitImageProcessorPil, ViTConfig, ViTModel
from transformers.image_processing_utils import BaseImageProcessor

from ...modeling.adapter import HyperFlowAdapter
from ...modeling.images import process_images
from ...modeling.model_card import is_hub_id
from ...modeling.peft_configs import bias_config

RELEASED, OWN = "released", "own"

#: Models without training, whose times are those of trained ones: ViT-S/16 and ViT-B/16 (Dosovitskiy et al. 2021).
UNTRAINED = {
    "vit-s": ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536),
    "vit-b": ViTConfig(hidden_size=768, num_attention_heads=12, intermediate_size=3072),
}

#: What else the adapter of such a model has in common with the released one.
UNTRAINED_ADAPTER: dict[str, Any] = {"last_blocks": 4, "intermediate_weight": 0.5, "lda": True}

#: Finds the folders of the released backbone and of its adapter.
FindReleased = Callable[[], tuple[Path, Path]]


@dataclass(frozen=True)
class Subject:
    """A backbone with its adapter, at one image size.

    Attributes:
        name: what results call the pair.
        backbone, adapter: folders or Hub ids.
        size: height and width of the images in pixels.
        n_steps: solver steps that the adapter takes unless it is told otherwise.
    """

    name: str
    backbone: str
    adapter: str
    size: tuple[int, int]
    n_steps: int


def read_choice(choice: str) -> tuple[str, int | None]:
    """A choice such as "released" or "vit-s@384" as a name and a size in pixels, None for the model's own.

    Raises:
        ValueError: there is no such name, or the size is no number of pixels.
    """
    name, has_size, size = choice.partition("@")
    known = (RELEASED, OWN, *UNTRAINED)
    if name not in known:
        raise ValueError(f"--backbones {choice!r} is unknown: use {', '.join(known)}, or one of them @PIXELS.")
    if not has_size:
        return name, None
    if not size.isdecimal() or int(size) == 0:
        raise ValueError(f"--backbones {choice!r}: behind the @ is the size of the images in pixels, such as @224.")
    return name, int(size)


def find_subject(
    choice: str, adapter: str | None, backbone: str | None, find_released: FindReleased, scratch: Path
) -> Subject:
    """The pair that a choice of the command line names.

    Args:
        adapter, backbone: those of the choice "own".
        scratch: a folder for models that are made now.

    Raises:
        CheckpointError, FileNotFoundError: a model is not there or damaged.
        ValueError: the adapter does not say where its backbone is, or how large its images are.
    """
    name, side = read_choice(choice)
    if name == RELEASED:
        folders = find_released()
        backbone, adapter = str(folders[0]), str(folders[1])
    elif name != OWN:
        backbone, adapter = make_untrained(name, scratch / name)
    assert adapter is not None
    model = HyperFlowAdapter.from_pretrained(adapter)
    size = (side, side) if side else _find_size(model, adapter)
    return Subject(name, backbone or _find_backbone(model, adapter), adapter, size, model.config.n_steps)


def make_untrained(name: str, folder: Path) -> tuple[str, str]:
    """The folders of a model with random weights and of an adapter for it, made in `folder` if they are not there.

    Args:
        name: one of `UNTRAINED`.
    """
    backbone_folder, adapter_folder = str(folder / "backbone"), str(folder / "adapter")
    if not folder.is_dir():
        config = UNTRAINED[name]
        backbone = ViTModel(config).eval()
        size = {"height": config.image_size, "width": config.image_size}
        processor = BitImageProcessorPil(size=size, crop_size=size)
        adapter = HyperFlowAdapter.from_backbone(
            backbone,
            bias_config(backbone, UNTRAINED_ADAPTER["last_blocks"]),
            processor=processor,
            image_size=[config.image_size, config.image_size],
            **UNTRAINED_ADAPTER,
        )
        # Its flow moves, as a trained one does, and a step costs what it costs anywhere.
        nn.init.normal_(adapter.drift.token_out.weight, std=1e-3)
        backbone.save_pretrained(backbone_folder)
        adapter.save_pretrained(adapter_folder)
    return backbone_folder, adapter_folder


def resize_processor(processor: BaseImageProcessor, size: tuple[int, int]) -> BaseImageProcessor:
    """The processor, which makes images of another size."""
    pixels = {"height": size[0], "width": size[1]}
    settings = processor.to_dict()
    settings["size"] = pixels
    if settings.get("crop_size"):
        settings["crop_size"] = pixels
    return type(processor).from_dict(settings)


def _find_size(adapter: HyperFlowAdapter, name: str) -> tuple[int, int]:
    """Height and width of the images that an adapter was trained for, or else of those that its processor makes."""
    if adapter.config.image_size is not None:
        height, width = adapter.config.image_size
        return height, width
    if adapter.processor is None:
        raise ValueError(f"{name} does not say how large its images are: use --backbones {OWN}@PIXELS.")
    height, width = process_images([PIL.Image.new("RGB", (512, 512))], adapter.processor).shape[-2:]
    return height, width


def _find_backbone(adapter: HyperFlowAdapter, name: str) -> str:
    backbone = adapter.config.backbone["name_or_path"]
    if not (os.path.isdir(backbone) or is_hub_id(backbone)):
        raise ValueError(f"{name} does not say where its backbone lies: give it with --backbone.")
    return backbone
