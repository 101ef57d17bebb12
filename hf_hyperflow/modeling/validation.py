"""Checks of all that a saved adapter or task says about itself, made before anything is built from it.

Whoever forges a file can also note its digest, so that a digest proves nothing but a whole download.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import reprlib
import unicodedata
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import BeftConfig, IA3Config, LNTuningConfig, LoraConfig, PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file

from .blocks import POOLINGS
from .configuration import HyperFlowConfig
from .saving import CheckpointError
from .solvers import ADAPTIVE, TABLEAUX

#: The kinds of PEFT adapters that are loaded. Others can start compilers, search for hours or change the backbone.
PEFT_CONFIGS: dict[str, type[PeftConfig]] = {
    "BEFT": BeftConfig,
    "LORA": LoraConfig,
    "LN_TUNING": LNTuningConfig,
    "IA3": IA3Config,
}

#: Vision models that can encode a support set. Each has `last_hidden_state` and a `hidden_size` or `hidden_sizes`.
ENCODERS = (
    *("beit", "clip_vision_model", "convnext", "convnextv2", "data2vec-vision", "deit", "dinov2"),
    *("dinov2_with_registers", "dinov3_convnext", "dinov3_vit", "hiera", "ijepa", "poolformer", "regnet", "resnet"),
    *("siglip_vision_model", "swin", "swinv2", "vit", "vit_msn"),
)

MAX_JSON_BYTES = 16 << 20
MAX_WIDTH = 1 << 16
MAX_BLOCKS = 1000
MAX_DRIFT_WIDTH = 4096
MAX_DRIFT_DEPTH = 64
MAX_MODULES = 10_000
MAX_STEPS = 1000
MAX_RANK = 256
MAX_IMAGE_SIZE = 1 << 14
#: Height and width that an image processor gives its images.
MAX_PROCESSED_SIZE = 2048
MAX_SCALE = 1e6
MAX_INTERMEDIATE_WEIGHT = 1000
MAX_LABELS = 100_000
MAX_LABEL_LENGTH = 1000
MAX_ENCODER_BLOCKS = 200

#: The last one is that of the counters in batch norms.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)
_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
_UNSAFE_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: there is no such file, it is larger than 16 MB, or it holds no JSON object. NaN, infinity and
            keys that occur twice are not accepted either.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}: the folder is incomplete. Download or copy it again.")
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {size:,} bytes, which is more than {MAX_JSON_BYTES:,}: it is refused.")
    content = parse_json(path.read_bytes(), str(path))
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object. Download or copy it again.")
    return content


def parse_json(text: str | bytes, source: str) -> Any:
    """Parse a JSON text without NaN, infinity and keys that occur twice.

    Raises:
        CheckpointError: the text is not such JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=_to_dict, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is damaged, it is no JSON ({error}). Download or copy it again.") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file, which the library checks against the length of the file.

    Raises:
        CheckpointError: the file is missing or damaged, or a tensor is not finite or of an unknown type.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}: the folder is incomplete. Download or copy it again.")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged or incomplete ({error}). Download or copy it again.") from error
    _validate_tensors(tensors, path)
    return tensors


def _to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key occurs twice")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


class Fields:
    """The fields of an object in a file. Each method checks one of them and returns its value.

    Args:
        source: the file, for errors.
        content: the object.
        place: where the object is in the file ("peft."), for errors.

    Raises:
        CheckpointError: the object is not a dict, and in every method: the value is not allowed. The error names the
            file, the field and what is allowed.
    """

    def __init__(self, source: str | Path, content: Any, place: str = ""):
        self.source = source
        self.place = place
        if not isinstance(content, dict):
            raise CheckpointError(f"{source}: {place.rstrip('.')} is {reprlib.repr(content)}; an object is expected.")
        self.content: dict[str, Any] = content

    def refuse(self, name: str, allowed: str) -> NoReturn:
        """Raise the error about a field."""
        value = "missing"
        if name in self.content:
            value = reprlib.repr(self.content[name])
        raise CheckpointError(
            f"{self.source}: {self.place}{name} is {value}; allowed is {allowed}. The file is damaged or was made by "
            "another version: download or copy it again."
        )

    def integer(self, name: str, low: int, high: int) -> int:
        value = self.content.get(name)
        if type(value) is not int or not low <= value <= high:
            self.refuse(name, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float) -> float:
        value = self.content.get(name)
        if (
            isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        ):  # NaN is in no range
            return float(value)
        self.refuse(name, f"a number from {low:g} to {high:g}")

    def flag(self, name: str) -> bool:
        value = self.content.get(name)
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def choice(self, name: str, options: Collection[Any]) -> Any:
        value = self.content.get(name)
        for option in options:
            if type(value) is type(option) and value == option:
                return value
        self.refuse(name, f"one of {', '.join(map(repr, options))}")

    def text(self, name: str, max_length: int = 1000) -> str:
        value = self.content.get(name)
        if not isinstance(value, str) or len(value) > max_length or not is_printable(value):
            self.refuse(name, f"a text of at most {max_length} characters without control characters")
        return value

    def names(self, name: str, *, low: int = 1, high: int = MAX_MODULES) -> list[str]:
        """Distinct dotted names of modules or tensors."""
        value = self.content.get(name)
        allowed = f"a list of {low} to {high} different names like 'encoder.layer.0'"
        if not isinstance(value, list) or not low <= len(value) <= high:
            self.refuse(name, allowed)
        for item in value:
            if not isinstance(item, str) or len(item) > 256 or not _NAME.fullmatch(item):
                self.refuse(name, allowed)
        if len(set(value)) < len(value):
            self.refuse(name, allowed)
        return value

    def integers(self, name: str, length: int, low: int, high: int) -> list[int]:
        value = self.content.get(name)
        if not isinstance(value, list) or len(value) != length:
            self.refuse(name, f"a list of {length} whole numbers")
        if any(type(item) is not int or not low <= item <= high for item in value):
            self.refuse(name, f"a list of {length} whole numbers from {low} to {high}")
        return value


def is_printable(text: str) -> bool:
    """Whether a text has no control characters, line separators or halves of surrogate pairs."""
    return not any(unicodedata.category(character) in _UNSAFE_CATEGORIES for character in text)


def find_label_problem(labels: list[str]) -> str | None:
    """What is wrong with the names of classes, as a sentence with the fix; None if nothing is."""
    seen = set()
    for label in labels:
        if not label.strip() or len(label) > MAX_LABEL_LENGTH or not is_printable(label):
            return (
                f"the class name {reprlib.repr(label)} is empty, longer than {MAX_LABEL_LENGTH} characters or has "
                "control characters. Rename the class."
            )
        if label in seen:
            return f"two classes are called {reprlib.repr(label)}. Rename one of them."
        seen.add(label)
    return None


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
    if config.encoder is not None:
        _validate_encoder(Fields(source, config.encoder, "encoder."))
    width = fields.integer("drift_width", 2, MAX_DRIFT_WIDTH)
    fields.integer("drift_depth", 1, MAX_DRIFT_DEPTH)
    heads = fields.integer("drift_heads", 1, width)
    if width % 2 or width % heads:
        fields.refuse("drift_width", f"an even multiple of drift_heads={heads}")
    fields.flag("lda")
    fields.integer("n_steps", 1, MAX_STEPS)
    fields.choice("solver", (*TABLEAUX, *ADAPTIVE))
    if config.weights_sha256 is not None and not re.fullmatch("[0-9a-f]{64}", fields.text("weights_sha256")):
        fields.refuse("weights_sha256", "64 hexadecimal digits")


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


def validate_task(tensors: dict[str, torch.Tensor], description: dict[str, Any], source: str | Path) -> None:
    """Check the prototypes of a task and what it says about its labels and features.

    Args:
        tensors: "prototypes" `(n_way, width)` and "scale", a number.
        description: "labels", "start", "pooling" and "intermediate_weight".
        source: the file that both come from, for errors.

    Raises:
        CheckpointError: a tensor has another name or shape, or a value is not allowed.
    """
    n_dimensions = {name: tensor.ndim for name, tensor in tensors.items() if tensor.is_floating_point()}
    if len(tensors) != 2 or n_dimensions != {"prototypes": 2, "scale": 0}:
        raise CheckpointError(
            f"{source} holds {reprlib.repr(sorted(tensors))}; expected are floats, prototypes (n_way, width) and a "
            "number scale. Download or copy it again."
        )
    if not 0 < tensors["scale"].item() <= MAX_SCALE:
        scale = tensors["scale"].item()
        raise CheckpointError(f"{source}: scale is {scale:g}; allowed is a positive number up to {MAX_SCALE:g}.")
    fields = Fields(source, description)
    fields.integer("start", 0, MAX_BLOCKS - 1)
    fields.choice("pooling", POOLINGS)
    fields.number("intermediate_weight", 0, MAX_INTERMEDIATE_WEIGHT)
    n_way = len(tensors["prototypes"])
    labels = description.get("labels")
    if not isinstance(labels, list) or len(labels) != n_way or any(not isinstance(label, str) for label in labels):
        fields.refuse("labels", f"a list of {n_way} texts, one for each prototype")
    problem = find_label_problem(labels)
    if problem is not None or not labels:
        raise CheckpointError(f"{source}: {problem or 'there are no labels'}")


def validate_peft(content: Any, source: str | Path, place: str = "") -> None:
    """Check the fields of a PEFT config, given as a dict. All that is not listed here has to be at its default.

    Raises:
        CheckpointError: the kind of adapter or a value is not allowed.
    """
    fields = Fields(source, content, place)
    kind = fields.choice("peft_type", tuple(PEFT_CONFIGS))
    _validate_targets(fields)
    checked = {"peft_type", "target_modules", "modules_to_save"}
    checked |= _validate_descriptions(fields)
    if kind == "LORA":
        checked |= _validate_lora(fields)
    for name in ("init_weights", "init_ia3_weights"):
        if name in content:
            fields.flag(name)
            checked.add(name)
    if kind == "IA3":
        checked.add("feedforward_modules")
        if not set(fields.names("feedforward_modules", low=0)) <= set(content["target_modules"]):
            fields.refuse("feedforward_modules", "a list of names that are in target_modules as well")
    defaults = {field.name: get_default(field) for field in dataclasses.fields(PEFT_CONFIGS[kind])}
    for name in content.keys() - checked:
        default = defaults.get(name)
        value = content[name]
        is_default = type(value) is type(default) and value == default
        if not is_default and (name in defaults or value not in (None, False, [], {})):
            fields.refuse(name, repr(default))


def get_default(field: dataclasses.Field) -> Any:
    """The default of a field of a dataclass."""
    if field.default_factory is dataclasses.MISSING:
        return field.default
    return field.default_factory()


def _validate_targets(fields: Fields) -> None:
    """Check the modules of a PEFT config. None lies inside another, so that each can be taken out by itself."""
    paths = list(fields.names("target_modules"))
    if fields.content.get("modules_to_save") is not None:
        paths += fields.names("modules_to_save", low=0)
    ordered = sorted(path + "." for path in paths)
    for path, following in itertools.pairwise(ordered):
        if following.startswith(path):
            fields.refuse(
                "target_modules", f"modules that lie side by side; {path[:-1]} is there twice or holds others"
            )


def _validate_descriptions(fields: Fields) -> set[str]:
    """Check the fields that only describe; returns their names."""
    for name in ("base_model_name_or_path", "revision", "peft_version"):
        if fields.content.get(name) is not None:
            fields.text(name)
    if "inference_mode" in fields.content:
        fields.flag("inference_mode")
    if fields.content.get("task_type") is not None:
        fields.choice("task_type", ("FEATURE_EXTRACTION",))
    mapping = fields.content.get("auto_mapping")
    if mapping is not None:
        classes = Fields(fields.source, mapping, f"{fields.place}auto_mapping.")
        classes.text("base_model_class")
        classes.text("parent_library")
    return {"base_model_name_or_path", "revision", "peft_version", "inference_mode", "task_type", "auto_mapping"}


def _validate_lora(fields: Fields) -> set[str]:
    """Check the fields of LoRA that may differ from their defaults; returns their names."""
    checked = set()
    for name in ("lora_bias", "use_rslora", "use_dora"):
        if name in fields.content:
            fields.flag(name)
            checked.add(name)
    if "r" in fields.content:
        fields.integer("r", 1, MAX_RANK)
    if "lora_alpha" in fields.content:
        fields.number("lora_alpha", 1e-6, 1e6)
    if "lora_dropout" in fields.content:
        fields.number("lora_dropout", 0, 0.99)
    if "init_lora_weights" in fields.content:
        fields.choice("init_lora_weights", (True, False, "gaussian"))
    return checked | {"r", "lora_alpha", "lora_dropout", "init_lora_weights"}


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
        if not _is_bounded(value, limit):
            fields.refuse(name, f"a value with numbers up to {limit} and texts of up to 1000 characters")


def _is_bounded(value: Any, limit: float, depth: int = 0) -> bool:
    """Whether a JSON value has short texts, numbers of at most this limit, and few levels and items."""
    if isinstance(value, str):
        return len(value) <= 1000
    if isinstance(value, int | float):
        return abs(value) <= limit
    items: Any = ()
    if isinstance(value, dict):
        items = [*value.values(), *(key for key in value if not isinstance(key, int))]
    elif isinstance(value, list):
        items = value
    if len(items) > MAX_LABELS or depth > 3:
        return False
    return all(_is_bounded(item, limit, depth + 1) for item in items)


def validate_processor(content: dict[str, Any], source: str | Path) -> None:
    """Check the fields of an image processor: sizes, means and scales within bounds, and no code of its own.

    Raises:
        CheckpointError: a value is not allowed.
    """
    fields = Fields(source, content)
    name = fields.text("image_processor_type", 100)
    if not re.fullmatch(r"[A-Za-z0-9]+ImageProcessor(Fast|Pil)?", name):
        fields.refuse("image_processor_type", "the class of an image processor of transformers")
    for name, value in content.items():
        if name == "auto_map" and value is not None:
            fields.refuse(name, "null")
        if (name == "size" or name.endswith("_size")) and not _is_bounded_size(value):
            fields.refuse(name, f"sizes of 1 to {MAX_PROCESSED_SIZE} pixels")
        if not _is_bounded(value, MAX_WIDTH):
            fields.refuse(name, f"a value with numbers up to {MAX_WIDTH} and texts of up to 1000 characters")


def _is_bounded_size(value: Any) -> bool:
    """Whether a size of images is None, a number of pixels or some of them."""
    sizes = [value]
    if isinstance(value, dict):
        sizes = list(value.values())
    elif isinstance(value, list):
        sizes = value
    return all(size is None or (type(size) is int and 1 <= size <= MAX_PROCESSED_SIZE) for size in sizes)


def _validate_tensors(tensors: dict[str, torch.Tensor], source: str | Path) -> None:
    """Raise an error about a tensor that is not finite or of an unknown type."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"{source}: {reprlib.repr(name)} is {tensor.dtype}; allowed are float16, bfloat16, float32, float64 "
                "and, for counters, int64."
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{source}: {reprlib.repr(name)} has NaN or infinite values. The file is damaged: download or copy it "
                "again."
            )


def list_differences(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are missing, unknown, or of another shape or kind of numbers than expected, printable."""
    wrong = []
    for name in sorted(tensors.keys() | expected.keys()):
        if name not in tensors or name not in expected or not _is_alike(tensors[name], expected[name]):
            wrong.append(name if is_printable(name) and len(name) < 256 else reprlib.repr(name))
    return wrong


def _is_alike(tensor: torch.Tensor, expected: torch.Tensor) -> bool:
    return tensor.shape == expected.shape and tensor.is_floating_point() == expected.is_floating_point()
