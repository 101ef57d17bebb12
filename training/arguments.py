"""Command-line arguments from a dataclass, with a YAML preset: flags override the preset, the preset the defaults."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TypeVar

import yaml
from transformers import HfArgumentParser

T = TypeVar("T")


def described(arguments: object) -> dict:
    """Arguments as a record of the run: of files and folders their names, for paths mean nothing elsewhere."""
    elsewhere = ("output_dir", "resume_from_checkpoint", "report_to", "push_to_hub", "hub_model_id")
    found = {key: value for key, value in vars(arguments).items() if key not in elsewhere}
    for key in ("dataset", "trajectories"):
        if key in found:
            found[key] = [named(source) for source in found[key]]
    return found | {"backbone": named(found["backbone"])}


def named(source: str) -> str:
    """A Hub id as it is, a file or folder without where it lies."""
    return Path(source).stem if Path(source).exists() else source


def parse(kind: type[T], argv: list[str] | None = None) -> T:
    """Parse `--config preset.yaml --flag value ...` into the dataclass `kind`.

    Raises:
        SystemExit: an unknown flag, an unknown key in the preset or a required value that neither gives.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(kind)
    parser.add_argument("--config", help="a YAML preset; flags override it")
    if "--config" in argv:
        path = Path(argv[argv.index("--config") + 1])
        preset = yaml.safe_load(path.read_text())
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
