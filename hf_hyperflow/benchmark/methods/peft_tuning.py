"""Fine-tuning of a PEFT adapter in the blocks that the flow adapts: biases, LoRA or LayerNorms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from peft import PeftConfig
from transformers import PreTrainedModel

from ...modeling.injection import Injection
from ...modeling.peft_configs import bias_config, layernorm_config, lora_config
from .fine_tuning import FineTuning
from .target import Target


@dataclass(frozen=True)
class PeftTuning(FineTuning):
    """Fine-tuning of the parameters of a PEFT adapter; subclasses say of which.

    Attributes:
        make_config: makes the PEFT config for a backbone and a number of last blocks.
    """

    make_config: ClassVar[Callable[[PreTrainedModel, int], PeftConfig]]

    def get_weights(self, target: Target) -> Injection:
        return target.parameter_space(type(self).make_config).inject(target.backbone)


@dataclass(frozen=True)
class BiasTuning(PeftTuning):
    """Tunes all biases and norms: the parameters that the released adapters move."""

    name = "bias"
    label = "bias and norm tuning"
    make_config = staticmethod(bias_config)


@dataclass(frozen=True)
class LoraTuning(PeftTuning):
    """Tunes LoRA factors (Hu et al. 2021)."""

    name = "lora"
    label = "LoRA tuning"
    make_config = staticmethod(lora_config)


@dataclass(frozen=True)
class LayerNormTuning(PeftTuning):
    """Tunes scale and shift of the LayerNorms."""

    name = "layernorm"
    label = "LayerNorm tuning"
    make_config = staticmethod(layernorm_config)
