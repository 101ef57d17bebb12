"""The command line of `hyperflow bench`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .subjects import OWN, RELEASED, read_choice
from .task import DTYPES, N_WAY

DEVICES = ("cpu", "cuda")


@dataclass
class BenchArguments:
    """What is measured; see `run`. Every combination of the lists is measured."""

    backbones: list[str] = field(
        default_factory=list,
        metadata={
            "help": "released (the released pair), own (that of --adapter), vit-s and vit-b (ViT-S/16 and ViT-B/16 "
            "with random weights and an untrained adapter); at another size in pixels as released@224; default: "
            "released, or own with --adapter"
        },
    )
    adapter: str | None = field(default=None, metadata={"help": "a HyperFlow adapter of your own: folder or Hub id"})
    backbone: str | None = field(
        default=None, metadata={"help": "its backbone: folder or Hub id; default: the one that the adapter names"}
    )
    images: list[int] = field(
        default_factory=lambda: [5, 25, 100], metadata={"help": f"numbers of support images, of {N_WAY} classes"}
    )
    steps: list[int] = field(
        default_factory=list, metadata={"help": "numbers of solver steps; default: those of the adapter"}
    )
    device: list[str] = field(
        default_factory=list, metadata={"help": "cpu, cuda; default: cuda where there is a GPU, otherwise cpu"}
    )
    dtype: list[str] = field(
        default_factory=lambda: ["float32"],
        metadata={"help": "float32, bfloat16: the backbone's; fine-tuning in bfloat16 runs under autocast"},
    )
    onnx: bool = field(
        default=False,
        metadata={"help": "with ONNX Runtime beside it, on the CPU in float32 with the adapter's steps (extra onnx)"},
    )
    output_dir: str = field(
        default="outputs/bench", metadata={"aliases": ["--output"], "help": "folder for bench.json and bench.png"}
    )

    def __post_init__(self) -> None:
        if not self.backbones:
            self.backbones = [RELEASED if self.adapter is None else OWN]
        if not self.device:
            self.device = ["cuda" if torch.cuda.is_available() else "cpu"]
        _require_numbers("images", self.images, at_least=N_WAY, why=f", one of each of {N_WAY} classes")
        _require_numbers("steps", self.steps, at_least=1)
        _require_known("device", self.device, DEVICES)
        _require_known("dtype", self.dtype, tuple(DTYPES))
        if "cuda" in self.device and not torch.cuda.is_available():
            raise ValueError("--device cuda: PyTorch sees no GPU here. Leave it out, or install PyTorch for your GPU.")
        self._require_models()

    def _require_models(self) -> None:
        names = [read_choice(choice)[0] for choice in self.backbones]
        _require_different("backbones", self.backbones)
        if OWN in names and self.adapter is None:
            raise ValueError(f"--backbones {OWN} is the adapter of yours: name it with --adapter.")
        if self.adapter is not None and OWN not in names:
            raise ValueError(f"--adapter is measured as {OWN}, which --backbones leaves out: add it.")
        if self.backbone is not None and self.adapter is None:
            raise ValueError("--backbone is that of --adapter: name both, or neither.")


def _require_numbers(name: str, values: Sequence[int], *, at_least: int, why: str = "") -> None:
    for value in values:
        if value < at_least:
            raise ValueError(f"--{name} must be at least {at_least}{why}, not {value}.")
    _require_different(name, values)


def _require_known(name: str, values: Sequence[str], known: Sequence[str]) -> None:
    for value in values:
        if value not in known:
            raise ValueError(f"--{name} {value!r} is unknown: use {' or '.join(known)}.")
    _require_different(name, values)


def _require_different(name: str, values: Sequence[object]) -> None:
    if len(set(values)) < len(values):
        raise ValueError(f"--{name} has a value twice: {' '.join(map(str, values))}.")
