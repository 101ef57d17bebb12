"""The precision to train in: bfloat16 where the device computes in it, and float32 elsewhere."""

from __future__ import annotations

from typing import Literal

import torch

MixedPrecision = Literal["auto", "no", "bf16", "fp16"]
HELP = "precision of autocast; auto: bf16 where the device computes in it, else no"


def resolve_precision(mixed_precision: MixedPrecision, *, cpu: bool) -> MixedPrecision:
    """What `auto` means on this machine. Every other value is returned as it is.

    Processors without bfloat16 instructions emulate them, which is much slower than float32.

    Args:
        cpu: whether training stays on the CPU even if there is a GPU.
    """
    if mixed_precision != "auto":
        return mixed_precision
    on_cpu = cpu or not torch.cuda.is_available()
    return "bf16" if _computes_in_bf16(on_cpu) else "no"


def get_autocast_dtype(mixed_precision: str) -> torch.dtype | None:
    """What autocast computes in where Accelerate is given this precision; None for no autocast."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)


def _computes_in_bf16(on_cpu: bool) -> bool:
    if not on_cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
