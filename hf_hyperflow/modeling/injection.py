"""A PEFT adapter inside a backbone: put in, filled with weights, merged and taken out again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from .locks import get_lock, ignored_warnings
from .trunks import IncompatibleBackboneError

if TYPE_CHECKING:
    from .parameter_space import ParameterSpace

#: The name of every adapter: PEFT saves the adapter of this name at the top of its folder.
ADAPTER_NAME = "default"

#: What PEFT's model puts before the names of the backbone's tensors.
_IN_PEFT_MODEL = "base_model.model."

#: The attribute of a backbone that holds the injection it carries. It lives, and is copied, with the backbone.
_INJECTION = "_hyperflow_injection"


def get_injection(backbone: nn.Module) -> Injection | None:
    """The injection that a backbone carries now, if any."""
    return vars(backbone).get(_INJECTION)


def unload(backbone: nn.Module) -> None:
    """Remove the injection that a backbone carries, if any.

    Raises:
        IncompatibleBackboneError: it is merged into the backbone.
    """
    with get_lock(backbone):
        injection = get_injection(backbone)
        if injection is None:
            return
        if injection.merged:
            raise IncompatibleBackboneError(
                f"a task is merged into this {type(backbone).__name__}: reset that task first."
            )
        injection.remove()


class Injection:
    """A PEFT adapter inside a backbone. `remove` restores the backbone bit for bit.

    `ParameterSpace.inject` makes injections and binds them to the space. If other threads use the backbone, the caller
    holds its lock from there to the end of what the injection is used for; see `get_lock`.

    Args:
        backbone: the model, changed in place. An injection that it carries already is removed.
        peft_config: what to put in; PEFT writes into a copy of it.
        seed: seed of the adapter's random start, which is drawn on the CPU.

    Attributes:
        space: the parameter space that the injection is bound to.
        parameters: the adapter's tensors in the order of the space.
        start: theta `(n_tokens, token_dim)` before anything is written.
        merged: whether the adapter is folded into the backbone's own weights.

    Raises:
        IncompatibleBackboneError: a target module is not in the backbone, PEFT cannot adapt it, or somebody else's
            adapter is in the backbone. The backbone is left as it was.
    """

    space: ParameterSpace
    parameters: list[nn.Parameter]
    start: torch.Tensor

    def __init__(self, backbone: nn.Module, peft_config: PeftConfig, seed: int):
        unload(backbone)
        if "peft_config" in vars(backbone):
            raise IncompatibleBackboneError(
                f"this {type(backbone).__name__} already carries a PEFT adapter. Unload or merge it first."
            )
        targets = _target_paths(backbone, peft_config)
        self.backbone = backbone
        self.merged = False
        self._written: torch.Tensor | None = None
        self._hook: RemovableHandle | None = None
        self._originals = {path: backbone.get_submodule(path) for path in targets}
        self._requires_grad = {name: p.requires_grad for name, p in backbone.named_parameters()}
        self._before_merge: dict[str, torch.Tensor] = {}
        modes = {module: module.training for module in backbone.modules()}
        peft_config = copy.deepcopy(peft_config)
        # Configs loaded from disk say True, and PEFT would mark no parameter as the adapter's.
        peft_config.inference_mode = False
        peft_targets = vars(peft_config).get("target_modules")
        try:
            self.peft_model = _build_peft_model(backbone, peft_config, seed)
        except BaseException as error:
            self.remove()
            if not isinstance(error, Exception):
                raise
            # PEFT raises whatever it stumbles over: ValueError, TypeError, StopIteration, ...
            raise IncompatibleBackboneError(
                f"PEFT cannot adapt this {type(backbone).__name__}: {error or type(error).__name__}"
            ) from error
        # PEFT cuts long lists of targets down to the ends of their names, of which several modules share one.
        vars(self.peft_model.peft_config[ADAPTER_NAME])["target_modules"] = copy.copy(peft_targets)
        for module in backbone.modules():
            module.training = modes.get(module, backbone.training)
        self._hook = backbone.register_state_dict_post_hook(partial(_leave_out_adapter, self._originals))

    def __getstate__(self) -> dict[str, Any]:
        """A copy may be made while another thread writes weights, so it does not take them for written."""
        return vars(self) | {"_written": None}

    def adapter_parameters(self, frozen: tuple[str, ...] = ()) -> dict[str, nn.Parameter]:
        """The adapter's parameters by their names in the backbone, without names that contain a part in `frozen`."""
        selected = {}
        for name, parameter in self.backbone.named_parameters():
            if parameter.requires_grad and not any(part in name for part in frozen):
                selected[name] = parameter
        return selected

    def bind(self, space: ParameterSpace, parameters: list[nn.Parameter]) -> None:
        """Make this the injection of a space, whose tensors are `parameters`, and note their start."""
        self.space = space
        self.parameters = parameters
        self.start = self.read()
        for parameter in self.adapter_parameters().values():
            parameter.requires_grad_(False)
        vars(self.backbone)[_INJECTION] = self

    @torch.no_grad()
    def read(self) -> torch.Tensor:
        """The adapter's weights as theta `(n_tokens, token_dim)`, float32."""
        return self.space.to_tokens(self.parameters)

    @torch.no_grad()
    def write(self, theta: torch.Tensor) -> None:
        """Set the adapter's weights to theta `(n_tokens, token_dim)`. The caller holds the backbone's lock."""
        self._written = None
        for parameter, tensor in zip(self.parameters, self.space.to_tensors(theta).values(), strict=True):
            parameter.copy_(tensor)

    @contextmanager
    def using(self, theta: torch.Tensor) -> Iterator[None]:
        """Within, the adapter has the weights theta `(n_tokens, token_dim)`.

        They stay in the backbone until others are used, and the same tensor is not written again while they do. Other
        threads wait before they use the backbone.
        """
        with get_lock(self.backbone):
            if get_injection(self.backbone) is not self:
                raise RuntimeError("this adapter was taken out of the backbone: inject it again.")
            if self._written is not theta:
                self.write(theta)
                self._written = theta
            yield

    @contextmanager
    def tuning(self) -> Iterator[list[nn.Parameter]]:
        """Yield the adapter's tensors at their start, to be changed in place. Afterwards they are back at it.

        Other threads wait before they use the backbone.
        """
        with get_lock(self.backbone):
            self.write(self.start)
            try:
                yield self.parameters
            finally:
                self.write(self.start)

    def merge(self) -> None:
        """Fold the adapter into the backbone's own weights and take PEFT's modules out.

        The weights that change are kept aside until `remove`.

        Raises:
            ValueError: PEFT cannot merge this kind of adapter into these layers.
        """
        with get_lock(self.backbone):
            for path, module in self._originals.items():
                for name, parameter in module.named_parameters():
                    self._before_merge[f"{path}.{name}"] = parameter.detach().clone()
            self.merged = True
            assert self._hook is not None
            self._hook.remove()
            self.peft_model.merge_and_unload()

    @torch.no_grad()
    def remove(self) -> None:
        """Take the adapter out. Modules, weights, `requires_grad` and attributes are again what they were."""
        with get_lock(self.backbone):
            for path, module in self._originals.items():
                self.backbone.set_submodule(path, module)
            for name, tensor in self._before_merge.items():
                self.backbone.get_parameter(name).copy_(tensor)
            for name, flag in self._requires_grad.items():
                self.backbone.get_parameter(name).requires_grad_(flag)
            vars(self.backbone).pop("peft_config", None)
            if self._hook is not None:
                self._hook.remove()
            if get_injection(self.backbone) is self:
                del vars(self.backbone)[_INJECTION]
            self._written, self.merged = None, False


def _leave_out_adapter(
    originals: dict[str, nn.Module], backbone: nn.Module, state: dict[str, Any], prefix: str, metadata: dict
) -> None:
    """Make the state of a backbone what it is without the adapter, so that a checkpoint of it is whole.

    Saving the backbone, or a model that wraps it, would otherwise write names that nobody can load. PEFT, which saves
    the adapter, sees it as it is.

    Args:
        originals: the modules that PEFT's take the place of, by their paths.
        backbone, state, prefix, metadata: what `state_dict` calls its hooks with.
    """
    if prefix.endswith(_IN_PEFT_MODEL):
        return
    for path, module in originals.items():
        for name in list(state):
            if name.startswith(f"{prefix}{path}."):
                del state[name]
        module.state_dict(destination=state, prefix=f"{prefix}{path}.")


def _target_paths(backbone: nn.Module, peft_config: PeftConfig) -> list[str]:
    """Dotted paths of all modules that a PEFT config targets, sorted."""
    fields = vars(peft_config)
    targets = set(fields.get("target_modules") or ())
    targets.update(fields.get("modules_to_save") or ())
    existing = {path for path, _ in backbone.named_modules()}
    missing = sorted(targets - existing)
    if missing:
        more = f" and {len(missing) - 12} more" if len(missing) > 12 else ""
        raise IncompatibleBackboneError(
            f"this {type(backbone).__name__} has no modules {', '.join(missing[:12])}{more}. "
            "Use the backbone that the parameter space was made for."
        )
    return sorted(targets)


def _build_peft_model(backbone: nn.Module, peft_config: PeftConfig, seed: int) -> PeftModel:
    """Build PEFT's model around the backbone. Its start is drawn from `seed`; the global generator is not touched."""
    gradient_checkpointing = ("`is_gradient_checkpointing`", FutureWarning)  # from PEFT to transformers
    unsupported_layer = ("Unsupported layer type", Warning)  # PEFT does support norms of all kinds
    with ignored_warnings(gradient_checkpointing, unsupported_layer), _SeededDraws(seed):
        return get_peft_model(backbone, peft_config, ADAPTER_NAME, low_cpu_mem_usage=False)


class _SeededDraws(TorchDispatchMode):
    """Within, this thread draws its random numbers on the CPU from a generator of its own.

    PEFT draws from the generator that all threads share. To seed that one would disturb the others, and what they draw
    would change the start of the adapter.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        device = args[0].device if isinstance(args[0], torch.Tensor) else kwargs.get("device")
        is_on_cpu = device is None or device.type == "cpu"
        if torch.Tag.nondeterministic_seeded in func.tags and is_on_cpu:
            # The packet finds the variant with a generator: `torch.randn` has one beside that without.
            return func.overloadpacket(*args, **kwargs | {"generator": self.generator})
        return func(*args, **kwargs)
