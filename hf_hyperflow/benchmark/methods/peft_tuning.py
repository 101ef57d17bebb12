"""Fine-tuning of a PEFT adapter in the blocks that the flow adapts: biases, LoRA or LayerNorms."""

from __future__ import annotations

from dataclasses import dataclass

from ...modeling.injection import Injection
from ...modeling.peft_configs import bias_config, layernorm_config, lora_config
from .fine_tuning import FineTuning
from .target import Target


@dataclass(frozen=True)
class BiasTuning(FineTuning):
    """Tunes all biases and norms: the parameters that the released adapters move."""

    name = "bias"
    label = "bias and norm tuning"

    def get_weights(self, target: Target) -> Injection:
        return target.parameter_space(bias_config).inject(target.backbone)


@dataclass(frozen=True)
class LoraTuning(FineTuning):
    """Tunes LoRA factors (Hu et al. 2021)."""

    name = "lora"
    label = "LoRA tuning"

    def get_weights(self, target: Target) -> Injection:
        return target.parameter_space(lora_config).inject(target.backbone)


@dataclass(frozen=True)
class LayerNormTuning(FineTuning):
    """Tunes scale and shift of the LayerNorms."""

    name = "layernorm"
    label = "LayerNorm tuning"

    def get_weights(self, target: Target) -> Injection:
        return target.parameter_space(layernorm_config).inject(target.backbone)
