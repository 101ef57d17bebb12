"""The parameters that the flow moves: the tensors of a native PEFT adapter, as rows of tokens.

PEFT's own tuners (BEFT biases, LoRA, LayerNorm tuning, ...) hold the generated weights, so that an adapted task is a
plain PEFT adapter that needs nothing of this package.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterable
from functools import cached_property

import torch
from peft import BeftConfig, LNTuningConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from .backbones import IncompatibleBackboneError, find_blocks, plain_modules

#: The one adapter name in use: PEFT saves the adapter of this name at the top of its folder.
ADAPTER_NAME = "default"

#: Attribute of a backbone that holds the injection it carries now: it lives, and is copied, with the backbone.
_INJECTION = "_hyperflow_injection"


def linear_paths(backbone: nn.Module, last_blocks: int) -> list[str]:
    """Dotted paths of every `nn.Linear` in the last blocks, but for the keys of attention.

    A bias on the keys adds the same number to all scores of a query, and softmax forgets it.
    """
    modules = _last_blocks(backbone, last_blocks)
    return [p for p, module in modules if isinstance(module, nn.Linear) and not p.endswith(("k_proj", ".key"))]


def norm_paths(backbone: nn.Module, last_blocks: int) -> list[str]:
    """Dotted paths of every LayerNorm in the last blocks and of the final one."""
    paths = [p for p, module in _last_blocks(backbone, last_blocks) if isinstance(module, nn.LayerNorm)]
    final = find_blocks(backbone).norm
    return paths + ([final] if final is not None else [])


def _last_blocks(backbone: nn.Module, last_blocks: int) -> list[tuple[str, nn.Module]]:
    blocks = find_blocks(backbone)
    if not 1 <= last_blocks <= len(blocks):
        raise IncompatibleBackboneError(f"last_blocks={last_blocks}, but the backbone has {len(blocks)} blocks.")
    inside = tuple(f"{blocks.path}.{i}." for i in range(len(blocks) - last_blocks, len(blocks)))
    return [(path, module) for path, module in plain_modules(backbone) if path.startswith(inside)]


def bias_config(backbone: nn.Module, last_blocks: int, *, norms: bool = True) -> BeftConfig:
    """Bias tuning of the last blocks (Ben Zaken et al. 2022), the parameter set of the HyperFlow paper.

    Args:
        norms: also move the LayerNorms (weights and biases), carried by PEFT's `modules_to_save`.
    """
    return BeftConfig(
        target_modules=linear_paths(backbone, last_blocks),
        modules_to_save=norm_paths(backbone, last_blocks) if norms else None,
    )


def lora_config(backbone: nn.Module, last_blocks: int, *, r: int = 2) -> LoraConfig:
    """LoRA (Hu et al. 2022) of rank `r` on every linear layer of the last blocks but the keys of attention."""
    return LoraConfig(r=r, lora_alpha=r, target_modules=linear_paths(backbone, last_blocks))


def layernorm_config(backbone: nn.Module, last_blocks: int) -> LNTuningConfig:
    """LayerNorm tuning of the last blocks and of the final norm (Zhao et al. 2024)."""
    return LNTuningConfig(target_modules=norm_paths(backbone, last_blocks))


def config_to_dict(peft_config: PeftConfig) -> dict:
    """What of a PEFT config differs from its defaults, ready for JSON; the inverse of `peft.get_peft_config`."""
    result = {"peft_type": str(peft_config.peft_type.value)}
    for entry in dataclasses.fields(peft_config):
        value = vars(peft_config)[entry.name]
        default = entry.default_factory() if entry.default_factory is not dataclasses.MISSING else entry.default
        if value != default and entry.init and entry.name not in ("peft_type", "peft_version"):
            result[entry.name] = sorted(value) if isinstance(value, set) else value
    return result


class ParameterSpace:
    """A PEFT config on a kind of backbone <-> tokens `theta` of shape `(n_tokens, token_dim)`.

    Every moving tensor of the adapter is flattened (tall matrices column by column, so that a row of theta is one
    rank of a LoRA factor), padded with zeros to whole rows and stacked in a fixed order.

    Args:
        peft_config: a native PEFT config whose `target_modules` are full dotted paths.
        token_dim: length of a row, usually the backbone's hidden size.
        names: the moving tensors, as PEFT names them inside the backbone.
        shapes: their shapes.
        frozen: parts of names of adapter tensors that keep their seeded start ("lora_A", say).
        seed: of the adapter's own random start (LoRA's A).
    """

    def __init__(
        self,
        peft_config: PeftConfig,
        token_dim: int,
        names: list[str],
        shapes: list[tuple[int, ...]],
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
        self.rows = [-(-torch.Size(shape).numel() // token_dim) for shape in self.shapes]

    @cached_property
    def mask(self) -> torch.Tensor:
        """`(n_tokens, token_dim)` bool, False where a row is padded."""
        return torch.cat([_to_rows(torch.ones(shape), self.token_dim) for shape in self.shapes]) > 0

    @property
    def n_tokens(self) -> int:
        return sum(self.rows)

    @property
    def n_parameters(self) -> int:
        """How many numbers the flow moves."""
        return int(self.mask.sum())

    @classmethod
    def from_backbone(
        cls,
        backbone: nn.Module,
        peft_config: PeftConfig,
        *,
        token_dim: int | None = None,
        frozen: tuple[str, ...] = (),
        seed: int = 0,
    ) -> ParameterSpace:
        """The space of `peft_config` on `backbone`, which is left as it was.

        Raises:
            IncompatibleBackboneError: a target of the config is not in the backbone.
        """
        injection = Injection(backbone, peft_config, seed)
        try:
            moving = injection.adapter_parameters(frozen)
            names, shapes = list(moving), [tuple(p.shape) for p in moving.values()]
        finally:
            injection.remove()
        if token_dim is None:
            token_dim = backbone.config.hidden_size
        return cls(peft_config, token_dim, names, shapes, frozen=frozen, seed=seed)

    def is_in(self, backbone: nn.Module) -> bool:
        """Whether the adapter is inside `backbone` now."""
        injection = vars(backbone).get(_INJECTION)
        return injection is not None and injection.space is self and not injection.merged

    def inject(self, backbone: nn.Module) -> Injection:
        """The adapter inside `backbone`, put there now unless it is there already, its tensors checked.

        Another injection is removed first.

        Raises:
            IncompatibleBackboneError: names or shapes differ from the space's; all of them are listed and the
                backbone is left as it was. Or another adapter is merged into the backbone.
        """
        if self.is_in(backbone):
            return vars(backbone)[_INJECTION]
        injection = Injection(backbone, self.peft_config, self.seed)
        found = injection.adapter_parameters(self.frozen)
        differences = self._differences({name: tuple(p.shape) for name, p in found.items()})
        if differences:
            injection.remove()
            raise IncompatibleBackboneError(
                f"this {type(backbone).__name__} does not fit the adapter's parameter space:\n  "
                + "\n  ".join(differences)
                + "\nUse the backbone that the adapter was trained for."
            )
        injection.bind(self, [found[name] for name in self.names])
        return injection

    def _differences(self, found: dict[str, tuple[int, ...]]) -> list[str]:
        expected = dict(zip(self.names, self.shapes, strict=True))
        lines = [f"{name}: expected {shape}, not there" for name, shape in expected.items() if name not in found]
        lines += [f"{name}: {shape}, not expected" for name, shape in found.items() if name not in expected]
        both = [name for name in expected if name in found]
        return lines + [f"{n}: expected {expected[n]}, found {found[n]}" for n in both if expected[n] != found[n]]

    def to_tokens(self, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        """Tensors in the order of `names` to theta `(n_tokens, token_dim)`, float32."""
        return torch.cat([_to_rows(tensor.float(), self.token_dim) for tensor in tensors])

    def to_tensors(self, theta: torch.Tensor) -> dict[str, torch.Tensor]:
        """Theta `(n_tokens, token_dim)` to the named tensors: exactly the inverse, and differentiable.

        Raises:
            ValueError: theta has another shape.
        """
        if theta.shape != (self.n_tokens, self.token_dim):
            raise ValueError(f"theta has shape {tuple(theta.shape)}, expected {(self.n_tokens, self.token_dim)}.")
        pieces = theta.split(self.rows)
        return {n: _from_rows(p, s) for n, p, s in zip(self.names, pieces, self.shapes, strict=True)}


def _is_tall(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and shape[0] > shape[1]


def _to_rows(tensor: torch.Tensor, token_dim: int) -> torch.Tensor:
    flat = (tensor.T if _is_tall(tuple(tensor.shape)) else tensor).reshape(-1)
    return nn.functional.pad(flat, (0, -len(flat) % token_dim)).view(-1, token_dim)


def _from_rows(rows: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    flat = rows.reshape(-1)[: torch.Size(shape).numel()]
    return flat.view(shape[1], shape[0]).T if _is_tall(shape) else flat.view(shape)


def take_out(backbone: nn.Module) -> None:
    """Remove the injection that a backbone carries, if any.

    Raises:
        IncompatibleBackboneError: it is merged into the backbone.
    """
    present = vars(backbone).get(_INJECTION)
    if present is not None and present.merged:
        raise IncompatibleBackboneError(f"a task is merged into this {type(backbone).__name__}: reset that task first.")
    if present is not None:
        present.remove()


class Injection:
    """A PEFT adapter inside a backbone, and the way back: `remove` restores the backbone bit for bit.

    Args:
        backbone: changed in place.
        peft_config: copied; PEFT writes into the copy.
        seed: of the adapter's random start, drawn on the CPU.

    Raises:
        IncompatibleBackboneError: a target module is not in the backbone, or PEFT cannot adapt it; the backbone is
            left as it was.
    """

    def __init__(self, backbone: nn.Module, peft_config: PeftConfig, seed: int):
        take_out(backbone)
        if "peft_config" in vars(backbone):
            raise IncompatibleBackboneError(
                f"this {type(backbone).__name__} already carries a PEFT adapter. Unload or merge it first."
            )
        targets = sorted(set(peft_config.target_modules or ()) | set(vars(peft_config).get("modules_to_save") or ()))
        paths = {path for path, _ in backbone.named_modules()}
        missing = [path for path in targets if path not in paths]
        if missing:
            raise IncompatibleBackboneError(
                f"this {type(backbone).__name__} has no modules {', '.join(missing[:12])}"
                + (f" and {len(missing) - 12} more" if len(missing) > 12 else "")
                + ". Use the backbone that the parameter space was made for."
            )
        self.backbone = backbone
        self.space: ParameterSpace | None = None
        self.owner: object | None = None
        self.merged = False
        self._originals = {path: backbone.get_submodule(path) for path in targets}
        self._requires_grad = {name: p.requires_grad for name, p in backbone.named_parameters()}
        self._copies: dict[str, torch.Tensor] = {}
        modes = {module: module.training for module in backbone.modules()}
        own = copy.deepcopy(peft_config)
        own.inference_mode = False  # as loaded from disk it is True, and PEFT would mark nothing as the adapter's
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft to transformers
                torch.manual_seed(seed)
                self.peft_model: PeftModel = get_peft_model(backbone, own, ADAPTER_NAME, low_cpu_mem_usage=False)
        except (ValueError, TypeError) as error:
            self.remove()
            raise IncompatibleBackboneError(f"PEFT cannot adapt this {type(backbone).__name__}: {error}") from error
        for module in backbone.modules():
            module.training = modes.get(module, backbone.training)

    def adapter_parameters(self, frozen: tuple[str, ...] = ()) -> dict[str, nn.Parameter]:
        """The adapter's parameters by their name in the backbone, those with a part of `frozen` in it left out."""
        named = self.backbone.named_parameters()
        return {n: p for n, p in named if p.requires_grad and not any(part in n for part in frozen)}

    def bind(self, space: ParameterSpace, parameters: list[nn.Parameter]) -> None:
        """Make this the backbone's injection of `space`, whose tensors are `parameters`."""
        self.space = space
        self.parameters = parameters
        self.start = self.read()
        for parameter in self.adapter_parameters().values():
            parameter.requires_grad_(False)
        vars(self.backbone)[_INJECTION] = self

    @torch.no_grad()
    def read(self) -> torch.Tensor:
        """Theta `(n_tokens, token_dim)` of the adapter as it is now, float32."""
        return self.space.to_tokens(self.parameters)

    @torch.no_grad()
    def write(self, theta: torch.Tensor) -> None:
        """Set the adapter's tensors to `theta`."""
        for parameter, tensor in zip(self.parameters, self.space.to_tensors(theta).values(), strict=True):
            parameter.copy_(tensor)

    def merge(self) -> None:
        """Fold the adapter into the backbone's own weights and take PEFT's modules out.

        The weights that change are kept aside until `remove`.
        """
        self._copies = {
            f"{path}.{name}": parameter.detach().clone()
            for path, module in self._originals.items()
            for name, parameter in module.named_parameters()
        }
        self.merged = True
        self.peft_model.merge_and_unload()

    @torch.no_grad()
    def remove(self) -> None:
        """Take the adapter out: modules, weights, `requires_grad` and attributes are what they were."""
        for path, module in self._originals.items():
            self.backbone.set_submodule(path, module)
        for name, tensor in self._copies.items():
            self.backbone.get_parameter(name).copy_(tensor)
        for name, flag in self._requires_grad.items():
            self.backbone.get_parameter(name).requires_grad_(flag)
        vars(self.backbone).pop("peft_config", None)
        if vars(self.backbone).get(_INJECTION) is self:
            del vars(self.backbone)[_INJECTION]
        self.owner, self.merged = None, False
