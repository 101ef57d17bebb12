"""The parameters that the flow moves: the tensors of a native PEFT adapter, as rows of tokens.

PEFT's own tuners (BEFT biases, LoRA, LayerNorm tuning, ...) hold the generated weights. An adapted task is therefore a
plain PEFT adapter, which needs nothing of this package.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel

from .gate import find_blocks
from .injection import Injection, get_injection
from .locks import get_lock
from .peft_configs import config_to_dict
from .trunks import IncompatibleBackboneError, find_trunk

#: Fields of a PEFT config that say where an adapter comes from. Its tensors do not depend on them.
_ORIGIN = ("auto_mapping", "base_model_name_or_path", "inference_mode", "revision")


class ParameterSpace:
    """Maps the tensors of a PEFT adapter on a kind of backbone to tokens `theta` `(n_tokens, token_dim)`, and back.

    Every moving tensor of the adapter is flattened, padded with zeros to whole rows and stacked in a fixed order. Tall
    matrices are flattened column by column, so that a row of theta is one rank of a LoRA factor.

    Args:
        peft_config: a native PEFT config whose `target_modules` are full dotted paths.
        token_dim: length of a row, usually the length of the backbone's features. Tensors of other widths, as in
            the stages of a hierarchical model, take as many rows as they need.
        names: names of the moving tensors, as PEFT names them inside the backbone.
        shapes: their shapes.
        frozen: parts of the names of adapter tensors that stay at their seeded start ("lora_A", say).
        seed: seed of the adapter's own random start (LoRA's A).

    Attributes:
        rows: how many rows of theta each tensor takes.

    Raises:
        ValueError: the numbers of names and of shapes differ.
    """

    def __init__(
        self,
        peft_config: PeftConfig,
        token_dim: int,
        names: list[str],
        shapes: Sequence[Sequence[int]],
        *,
        frozen: tuple[str, ...] = (),
        seed: int = 0,
    ):
        if len(names) != len(shapes):
            raise ValueError(f"{len(names)} names of tensors, but {len(shapes)} shapes.")
        self.peft_config = peft_config
        self.token_dim = token_dim
        self.names = list(names)
        self.shapes = [tuple(shape) for shape in shapes]
        self.frozen = tuple(frozen)
        self.seed = seed
        self.rows = [math.ceil(math.prod(shape) / token_dim) for shape in self.shapes]

    @cached_property
    def mask(self) -> torch.Tensor:
        """`(n_tokens, token_dim)` bool, False where a row is padded."""
        return self.to_tokens(torch.ones(shape) for shape in self.shapes) > 0

    @cached_property
    def key(self) -> str:
        """Equal for spaces whose adapters are the same, of which one can be used in place of the other."""
        names = json.dumps([self.names, self.shapes])
        return _describe(self.peft_config, self.token_dim, self.frozen, self.seed) + names

    @property
    def n_tokens(self) -> int:
        """Number of rows of theta."""
        return sum(self.rows)

    @property
    def n_parameters(self) -> int:
        """How many numbers the flow moves."""
        return int(self.mask.sum())

    @classmethod
    def from_backbone(
        cls,
        backbone: PreTrainedModel,
        peft_config: PeftConfig,
        *,
        token_dim: int | None = None,
        frozen: tuple[str, ...] = (),
        seed: int = 0,
    ) -> ParameterSpace:
        """The space of a PEFT config on a backbone. The backbone is left as it was, but for another adapter in it.

        An adapter of this config that is in the backbone already stays there, and its space is returned.

        Raises:
            IncompatibleBackboneError: a target of the config is not in the backbone, or PEFT cannot adapt it.
        """
        backbone = find_trunk(backbone)
        if token_dim is None:
            token_dim = find_blocks(backbone).width
        with get_lock(backbone):
            current = get_injection(backbone)
            key = _describe(peft_config, token_dim, frozen, seed)
            if current is not None and not current.merged and current.space.key.startswith(key):
                return current.space
            injection = Injection(backbone, peft_config, seed)
            try:
                parameters = injection.adapter_parameters(frozen)
            finally:
                injection.remove()
        shapes = [tuple(parameter.shape) for parameter in parameters.values()]
        return cls(peft_config, token_dim, list(parameters), shapes, frozen=frozen, seed=seed)

    def is_in(self, backbone: nn.Module) -> bool:
        """Whether the adapter is inside a backbone now, and not merged into it.

        Another space of the same adapter is as good, such as that of a task which was loaded.
        """
        injection = get_injection(backbone)
        if injection is None or injection.merged:
            return False
        return injection.space is self or injection.space.key == self.key

    def inject(self, backbone: nn.Module) -> Injection:
        """Put the adapter into a backbone, unless it is there already. Another injection is removed first.

        Raises:
            IncompatibleBackboneError: names or shapes of tensors differ from the space's. All of them are listed, and
                the backbone is left as it was. Or another adapter is merged into the backbone.
        """
        with get_lock(backbone):
            current = get_injection(backbone)
            if current is not None and self.is_in(backbone):
                return current
            injection = Injection(backbone, self.peft_config, self.seed)
            parameters = injection.adapter_parameters(self.frozen)
            differences = self._list_differences(parameters)
            if differences:
                injection.remove()
                raise IncompatibleBackboneError(
                    f"this {type(backbone).__name__} does not fit the adapter's parameter space:\n  "
                    + "\n  ".join(differences)
                    + "\nUse the backbone that the adapter was trained for."
                )
            injection.bind(self, [parameters[name] for name in self.names])
            return injection

    def _list_differences(self, parameters: dict[str, nn.Parameter]) -> list[str]:
        """The differences between the space's tensors and an adapter's, one line each."""
        expected = dict(zip(self.names, self.shapes, strict=True))
        lines = []
        for name, shape in expected.items():
            if name not in parameters:
                lines.append(f"{name}: expected {shape}, not there")
        for name, parameter in parameters.items():
            shape = tuple(parameter.shape)
            if name not in expected:
                lines.append(f"{name}: {shape}, not expected")
            elif shape != expected[name]:
                lines.append(f"{name}: expected {expected[name]}, found {shape}")
        return lines

    def to_tokens(self, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        """Theta `(n_tokens, token_dim)`, float32, from tensors in the order of `names`."""
        return torch.cat([_to_rows(tensor.float(), self.token_dim) for tensor in tensors])

    def to_tensors(self, theta: torch.Tensor) -> dict[str, torch.Tensor]:
        """The named tensors from theta `(n_tokens, token_dim)`. Exactly the inverse of `to_tokens`, and differentiable.

        Raises:
            ValueError: theta has another shape.
        """
        if theta.shape != (self.n_tokens, self.token_dim):
            raise ValueError(f"theta has shape {tuple(theta.shape)}, expected {(self.n_tokens, self.token_dim)}.")
        pieces = theta.split(self.rows)
        tensors = {}
        for name, piece, shape in zip(self.names, pieces, self.shapes, strict=True):
            tensors[name] = _from_rows(piece, shape)
        return tensors


def _describe(peft_config: PeftConfig, token_dim: int, frozen: tuple[str, ...], seed: int) -> str:
    """All that the tensors of an adapter on a given backbone depend on."""
    fields = config_to_dict(peft_config)
    for name in _ORIGIN:
        fields.pop(name, None)
    return json.dumps([fields, token_dim, frozen, seed], sort_keys=True, default=str)


def _is_tall(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and shape[0] > shape[1]


def _to_rows(tensor: torch.Tensor, token_dim: int) -> torch.Tensor:
    if _is_tall(tuple(tensor.shape)):
        tensor = tensor.T
    flat = tensor.reshape(-1)
    return nn.functional.pad(flat, (0, -len(flat) % token_dim)).view(-1, token_dim)


def _from_rows(rows: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    flat = rows.reshape(-1)[: math.prod(shape)]
    if _is_tall(shape):
        return flat.view(shape[1], shape[0]).T
    return flat.view(shape)
