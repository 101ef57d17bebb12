"""Checks of a saved PEFT config: which kinds of adapters are built, and from which fields."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

from peft import BeftConfig, IA3Config, LNTuningConfig, LoraConfig, PeftConfig

from .json_fields import Fields

#: The kinds of PEFT adapters that are loaded. Others can start compilers, search for hours or change the backbone.
PEFT_CONFIGS: dict[str, type[PeftConfig]] = {
    "BEFT": BeftConfig,
    "LORA": LoraConfig,
    "LN_TUNING": LNTuningConfig,
    "IA3": IA3Config,
}

MAX_RANK = 256


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
