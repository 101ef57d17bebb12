"""Checks of what a saved adapter says about itself in its config, made before it is built."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

from .blocks import POOLINGS
from .calibration import Calibration
from .configuration import HyperFlowConfig
from .json_fields import Fields, is_bounded
from .peft_validation import validate_peft
from .rejection import RejectionCalibration
from .solvers import ADAPTIVE, TABLEAUX
from .views import MAX_VIEWS

#: Vision models that can encode a support set. Each has `last_hidden_state` and a `hidden_size` or `hidden_sizes`.
ENCODERS = (
    *("beit", "clip_vision_model", "convnext", "convnextv2", "data2vec-vision", "deit", "dinov2"),
    *("dinov2_with_registers", "dinov3_convnext", "dinov3_vit", "hiera", "ijepa", "poolformer", "regnet", "resnet"),
    *("siglip_vision_model", "swin", "swinv2", "vit", "vit_msn"),
)

MAX_WIDTH = 1 << 16
MAX_BLOCKS = 1000
MAX_DRIFT_WIDTH = 4096
MAX_DRIFT_DEPTH = 64
MAX_STEPS = 1000
MAX_IMAGE_SIZE = 1 << 14
MAX_INTERMEDIATE_WEIGHT = 1000
MAX_ENCODER_BLOCKS = 200

#: Of a calibration.
MAX_COEFFICIENT = 1000


def validate_config(config: HyperFlowConfig, source: str | Path) -> None:
    """Check every field of an adapter's config.

    The weights bound the sizes further: no model is built that they do not fill.

    Args:
        config: of an adapter that was saved.
        source: the file that it was read from, for errors.

    Raises:
        CheckpointError: a value is not allowed. The error names the file, the field and what is allowed.
    """
    fields = Fields(source, vars(config))
    backbone = _validate_backbone(Fields(source, config.backbone, "backbone."))
    fields.integer("last_blocks", 1, backbone.content["num_blocks"])
    fields.choice("pooling", POOLINGS)
    fields.number("intermediate_weight", 0, MAX_INTERMEDIATE_WEIGHT)
    validate_peft(config.peft, source, "peft.")
    _validate_tensor_list(fields, backbone.content["hidden_size"])
    fields.names("frozen_tensors", low=0)
    fields.integer("adapter_seed", 0, 2**63 - 1)
    if config.image_size is not None:
        fields.integers("image_size", 2, 1, MAX_IMAGE_SIZE)
    if config.reduced_size is not None:
        fields.integers("reduced_size", 2, 1, MAX_IMAGE_SIZE)
        if config.image_size is None:
            fields.refuse("reduced_size", "null where image_size is null, for then no image is larger")
    if config.encoder is not None:
        _validate_encoder(Fields(source, config.encoder, "encoder."))
    width = fields.integer("drift_width", 2, MAX_DRIFT_WIDTH)
    fields.integer("drift_depth", 1, MAX_DRIFT_DEPTH)
    heads = fields.integer("drift_heads", 1, width)
    if width % 2 or width % heads:
        fields.refuse("drift_width", f"an even multiple of drift_heads={heads}")
    fields.flag("learned_start")
    fields.flag("lda")
    fields.integer("views", 1, MAX_VIEWS)
    for name, kind in (("calibration", Calibration), ("rejection", RejectionCalibration)):
        if fields.content[name] is not None:
            _validate_coefficients(Fields(source, fields.content[name], f"{name}."), kind)
    fields.integer("n_steps", 1, MAX_STEPS)
    fields.choice("solver", (*TABLEAUX, *ADAPTIVE))
    if config.weights_sha256 is not None and not re.fullmatch("[0-9a-f]{64}", fields.text("weights_sha256")):
        fields.refuse("weights_sha256", "64 hexadecimal digits")


def _validate_coefficients(fields: Fields, kind: type[Calibration | RejectionCalibration]) -> None:
    """Check that the fields are those of a dataclass of numbers."""
    names = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(fields.content) - names)
    if unknown:
        fields.refuse(unknown[0], f"nothing: the fields are {', '.join(sorted(names))}")
    for name in names:
        fields.number(name, -MAX_COEFFICIENT, MAX_COEFFICIENT)


def _validate_backbone(fields: Fields) -> Fields:
    fields.text("name_or_path")
    fields.text("model_type")
    fields.integer("hidden_size", 1, MAX_WIDTH)
    n_blocks = fields.integer("num_blocks", 1, MAX_BLOCKS)
    if "prefix_width" in fields.content:
        fields.integer("prefix_width", 1, MAX_WIDTH)
    fingerprint = fields.content.get("fingerprint")
    if fingerprint is not None:
        allowed = f"a list of {n_blocks} numbers"
        if not isinstance(fingerprint, list) or len(fingerprint) != n_blocks:
            fields.refuse("fingerprint", allowed)
        if any(type(value) not in (int, float) or not abs(value) <= 1e30 for value in fingerprint):
            fields.refuse("fingerprint", allowed)
    return fields


def _validate_tensor_list(fields: Fields, token_dim: int) -> None:
    names = fields.names("tensor_names")
    shapes = fields.content["tensor_shapes"]
    allowed = f"a list of {len(names)} shapes of 1 to 4 positive whole numbers, each of at most {MAX_WIDTH**2:,} values"
    if not isinstance(shapes, list) or len(shapes) != len(names):
        fields.refuse("tensor_shapes", allowed)
    for shape in shapes:
        if not isinstance(shape, list) or not 1 <= len(shape) <= 4:
            fields.refuse("tensor_shapes", allowed)
        if any(type(size) is not int or size < 1 for size in shape) or math.prod(shape) > MAX_WIDTH**2:
            fields.refuse("tensor_shapes", allowed)


def _validate_encoder(fields: Fields) -> None:
    """Check the config of a support encoder: a known vision model of bounded sizes, without code or kernels."""
    fields.choice("model_type", ENCODERS)
    for name in ("auto_map", "quantization_config", "attn_implementation", "_attn_implementation"):
        if fields.content.get(name) is not None:
            fields.refuse(name, "null")
    for name, value in fields.content.items():
        limit = MAX_WIDTH
        if "layers" in name or "depth" in name or "blocks" in name:
            limit = MAX_ENCODER_BLOCKS
        if not is_bounded(value, limit):
            fields.refuse(name, f"a value with numbers up to {limit} and texts of up to 1000 characters")
