from __future__ import annotations

import pytest
import torch

from hf_hyperflow.training.precision import resolve_precision


@pytest.mark.parametrize("given", ["no", "bf16", "fp16"])
def test_what_is_asked_for_is_taken(given):
    assert resolve_precision(given, cpu=True) == given


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_f": False}, "no"),
        ({"avx512_f": True, "avx512_bf16": False}, "no"),
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
        ({"neon": True, "bf16": True}, "bf16"),
        ({"neon": True, "bf16": False}, "no"),
    ],
)
def test_auto_is_what_the_processor_has_instructions_for(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_precision("auto", cpu=True) == expected
