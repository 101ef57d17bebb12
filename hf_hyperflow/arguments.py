"""The flags of every command line: one per field of a dataclass, with an optional YAML preset.

A flag overrides the preset and the preset overrides the default. Flags are written as the fields are, with underscores
(`--last_blocks 4`); dashes are accepted too. A field that is true by default is switched off with `--no_`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from transformers import HfArgumentParser

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

#: Arguments that say where results go and do not change them.
NOT_RECORDED = ("output_file", "output_dir", "resume_from_checkpoint", "report_to", "push_to_hub", "hub_model_id")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help of an option, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, []):
            return action.help
        return super()._get_help_string(action)


def make_parser(kind: type[DataclassInstance], **options: Any) -> HfArgumentParser:
    """A parser with a flag for each field of the dataclass `kind`.

    Args:
        options: those of `argparse.ArgumentParser`.
    """
    # Its own annotation wants the type of a type.
    return HfArgumentParser(kind, formatter_class=HelpFormatter, **options)  # type: ignore[arg-type]


def parse(kind: type[T], argv: list[str] | None = None) -> T:
    """Parse `--config preset.yaml --flag value ...` into the dataclass `kind`.

    Args:
        argv: the command line; None reads that of this process.

    Raises:
        SystemExit: a flag is unknown, the preset cannot be read or has unknown keys, or a required value is missing.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser(kind)
    parser.add_argument("--config", help="a YAML preset; flags override it")
    preset_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    preset_parser.add_argument("--config")
    path = preset_parser.parse_known_args(argv)[0].config
    if path is not None:
        _apply_preset(parser, path, kind)
    values = vars(parser.parse_args(argv))
    values.pop("config")
    return kind(**values)


def _apply_preset(parser: argparse.ArgumentParser, path: str, kind: type[DataclassInstance]) -> None:
    """Make the values of a preset the parser's defaults."""
    preset = _read_preset(path, parser)
    names = {entry.name for entry in dataclasses.fields(kind)}
    unknown = sorted(set(preset) - names)
    if unknown:
        parser.error(f"{path} has unknown keys {unknown}; known: {sorted(names)}")
    for action in parser._actions:
        if action.dest not in preset:
            continue
        action.required = False
        # argparse checks the choices of flags, but not those of defaults.
        if action.choices and preset[action.dest] not in action.choices:
            parser.error(f"{path}: {action.dest} is {preset[action.dest]!r}, choose from {action.choices}")
    parser.set_defaults(**preset)


def _read_preset(path: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    try:
        preset = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"cannot read the preset {path}: {error}")
    if not isinstance(preset, dict):
        parser.error(f"the preset {path} is not a list of `name: value` lines.")
    return preset


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Within, an error that the user can mend ends the program with one line and no traceback.

    Raises:
        SystemExit: in place of an ImportError, OSError (CheckpointError is one) or ValueError.
    """
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


def describe_arguments(arguments: DataclassInstance) -> dict[str, Any]:
    """Arguments for the record of a run. Files and folders appear by name, since paths mean nothing elsewhere."""
    record: dict[str, Any] = {}
    for name, value in vars(arguments).items():
        if name in NOT_RECORDED:
            continue
        if name in ("dataset", "trajectories"):
            record[name] = [short_name(source) for source in value]
        elif name in ("backbone", "encoder", "init_adapter") and value:
            record[name] = short_name(value)
        else:
            record[name] = value
    return record


def short_name(source: str) -> str:
    """A Hub id as it is; a file or folder by its name alone."""
    path = Path(source)
    return path.stem if path.exists() else source
