"""In what precision to train: bfloat16 where the device computes in it, otherwise float32."""

from __future__ import annotations

from typing import Literal

import torch

MixedPrecision = Literal["auto", "no", "bf16", "fp16"]
HELP = "of autocast; auto: bf16 where the device computes in it, else no"


def resolve_precision(mixed_precision: MixedPrecision, *, cpu: bool) -> MixedPrecision:
    """What `auto` means on this machine; everything else is what it is.

    Processors without bfloat16 instructions emulate them: matrix products take ten times as long as in float32 (AVX2).
    """
    if mixed_precision != "auto":
        return mixed_precision
    return "bf16" if _computes_in_bf16(cpu or not torch.cuda.is_available()) else "no"


def _computes_in_bf16(on_cpu: bool) -> bool:
    if not on_cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
