"""Command-line arguments from a dataclass, with a YAML preset: flags override the preset, the preset the defaults."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TypeVar

import yaml
from transformers import HfArgumentParser

T = TypeVar("T")


def describe_arguments(arguments: object) -> dict:
    """Arguments as a record of the run: of files and folders their names, for paths mean nothing elsewhere."""
    elsewhere = ("output", "output_dir", "resume_from_checkpoint", "report_to", "push_to_hub", "hub_model_id")
    found = {key: value for key, value in vars(arguments).items() if key not in elsewhere}
    for key in ("dataset", "trajectories"):
        if key in found:
            found[key] = [short_name(source) for source in found[key]]
    return found | {key: short_name(found[key]) for key in ("backbone", "encoder") if found.get(key)}


def short_name(source: str) -> str:
    """A Hub id as it is, a file or folder without where it lies."""
    return Path(source).stem if Path(source).exists() else source


def parse(kind: type[T], argv: list[str] | None = None) -> T:
    """Parse `--config preset.yaml --flag value ...` into the dataclass `kind`.

    Raises:
        SystemExit: an unknown flag, a preset that cannot be read or has unknown keys, or a required value that
            neither gives.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(kind)
    parser.add_argument("--config", help="a YAML preset; flags override it")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    path = first.parse_known_args(argv)[0].config
    if path is not None:
        preset = _read_preset(path, parser)
        known = set(kind.__dataclass_fields__)
        unknown = sorted(set(preset) - known)
        if unknown:
            parser.error(f"{path} has unknown keys {unknown}; known: {sorted(known)}")
        for action in parser._actions:
            if action.dest in preset:
                action.required = False
                if action.choices and preset[action.dest] not in action.choices:
                    parser.error(f"{path}: {action.dest} is {preset[action.dest]!r}, choose from {action.choices}")
        parser.set_defaults(**preset)
    found = vars(parser.parse_args(argv))
    found.pop("config")
    return kind(**found)


def _read_preset(path: str, parser: argparse.ArgumentParser) -> dict:
    try:
        preset = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"cannot read the preset {path}: {error}")
    if not isinstance(preset, dict):
        parser.error(f"the preset {path} is not a list of `name: value` lines.")
    return preset
