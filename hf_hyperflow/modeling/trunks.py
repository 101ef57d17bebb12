"""What a backbone is: its vision trunk inside a wrapper, its name, its modules without adapters, and how it is run."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

#: Where models of images and text keep their vision model.
_VISION_PARTS = ("vision_model", "vision_tower")

#: What the forward pass of a model raises if it cannot take an input.
FORWARD_ERRORS = (RuntimeError, ValueError, TypeError, AssertionError, IndexError, KeyError, AttributeError)


class IncompatibleBackboneError(ValueError):
    """The backbone cannot be adapted, or it is not the one that the adapter was made for."""


def find_trunk(backbone: nn.Module) -> PreTrainedModel:
    """The vision model that a backbone is or wraps, as `transformers.AutoModel` would load it.

    A model with a classification head wraps its `base_model`, and a model of images and text wraps a `vision_model`.
    Adapters are put into the trunk and saved by the names of its modules, so that they fit every wrapper of it. Its
    lock (`get_lock`) is that of the trunk. A trunk whose config has no name, as in CLIPModel, gets that of the wrapper.

    Raises:
        IncompatibleBackboneError: the backbone is not a model of transformers, it carries somebody else's adapter, or
            it does not take images.
    """
    if isinstance(backbone, PeftModel):
        raise IncompatibleBackboneError(
            "this backbone is a PeftModel, which carries an adapter already. Pass what `merge_and_unload()` or "
            "`unload()` of it returns."
        )
    if _is_compiled(backbone):
        raise IncompatibleBackboneError(
            "this backbone is compiled, and adapting it changes its modules: adapt first, then compile."
        )
    if not isinstance(backbone, PreTrainedModel):
        raise IncompatibleBackboneError(
            f"{type(backbone).__name__} is not a model of transformers. Use a vision model that AutoModel loads; "
            "models of timm are loaded as AutoModel.from_pretrained('timm/...')."
        )
    trunk = backbone
    while (inner := _unwrap(trunk)) is not trunk:
        trunk = inner
    if not trunk.config._name_or_path:
        trunk.config._name_or_path = backbone.config._name_or_path
    name = type(trunk).__name__
    if not _takes_images(trunk):
        raise IncompatibleBackboneError(f"{name} takes {trunk.main_input_name}, not images. Use a vision model.")
    if trunk.config.is_encoder_decoder:
        raise IncompatibleBackboneError(
            f"{name} has a decoder, which makes features of objects, not of images. Use the vision model that it is "
            "built on."
        )
    channels = vars(trunk.config).get("num_channels", 3)
    if channels != 3:
        raise IncompatibleBackboneError(f"{name} takes {channels} channels. Use a model of RGB images.")
    return trunk


def _is_compiled(model: nn.Module) -> bool:
    """Whether a model is what `torch.compile` returns, or was compiled in place by its method `compile`."""
    if not isinstance(model, nn.Module):
        return False
    return model._compiled_call_impl is not None or "_orig_mod" in dict(model.named_children())


def _unwrap(model: PreTrainedModel) -> PreTrainedModel:
    """The vision part of a model or, without one, its base model: in the end the model itself."""
    for name, child in model.named_children():
        if name in _VISION_PARTS and isinstance(child, PreTrainedModel):
            return child
    base = model.base_model
    return base if isinstance(base, PreTrainedModel) and _takes_images(base) else model


def _takes_images(model: PreTrainedModel) -> bool:
    return "pixel_values" in inspect.signature(model.forward).parameters


def get_name(backbone: nn.Module) -> str:
    """The Hub id that a backbone was loaded by, or the whole path of its folder; "" if it has no name.

    A path as it was typed would mean nothing in another directory, and one like "models/vit" would pass for a Hub id.
    """
    config: Any = backbone.config
    name = str(config._name_or_path)
    return os.path.abspath(name) if os.path.isdir(name) else name


def plain_modules(backbone: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield `named_modules()` as they are without PEFT adapters: wrapped modules under the path of their wrapper."""
    wrapper = None
    for path, module in backbone.named_modules():
        if wrapper is not None and path.startswith(wrapper):
            continue
        if isinstance(module, BaseTunerLayer):
            wrapper, module = f"{path}.", module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            wrapper, module = f"{path}.", module.original_module
        yield path, module


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm with a weight: a layer, RMS, group or batch norm, of torch, transformers or timm."""
    known = isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.BatchNorm1d | nn.BatchNorm2d)
    if not known and not type(module).__name__.lower().endswith("rmsnorm"):
        return False
    return any(name == "weight" for name, _ in module.named_parameters(recurse=False))


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within, the model is in evaluation mode. Afterwards the modules that were in training mode are in it again.

    If other threads use the model, the caller holds its lock.
    """
    training = [module for module in model.modules() if module.training]
    if training:  # to set modes takes longer than to look at them
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def run_trunk(trunk: nn.Module, pixel_values: torch.Tensor) -> ModelOutput:
    """Run a trunk on images `(n, 3, height, width)`; its output has `last_hidden_state` and maybe `pooler_output`.

    Raises:
        IncompatibleBackboneError: it cannot see images of this size: they are smaller than a patch, say. Or it returns
            no hidden states.
    """
    try:
        output = trunk(*_prepare_inputs(trunk, pixel_values))
    except torch.OutOfMemoryError:
        raise
    except FORWARD_ERRORS as error:
        shape = " x ".join(str(size) for size in pixel_values.shape)
        raise IncompatibleBackboneError(
            f"this {type(trunk).__name__} does not run on pixel values of shape {shape}: {error}. Use the "
            "image processor of the backbone."
        ) from error
    states = output.get("last_hidden_state") if isinstance(output, ModelOutput) else None
    if not isinstance(states, torch.Tensor) or states.ndim not in (3, 4):
        raise IncompatibleBackboneError(
            f"{type(trunk).__name__} does not return a last_hidden_state of tokens or maps. Use the model that "
            "AutoModel loads (Dinov2Model, not Dinov2Backbone), with return_dict=True in its config."
        )
    return output


def _prepare_inputs(trunk: nn.Module, pixel_values: torch.Tensor) -> tuple[Any, ...]:
    """What the forward pass of a trunk takes for images. SigLIP 2 alone takes patches, their mask and their numbers."""
    config: Any = trunk.config
    if config.model_type != "siglip2_vision_model":
        return (pixel_values,)
    n, _, height, width = pixel_values.shape
    rows, columns = height // config.patch_size, width // config.patch_size
    patches = pixel_values[:, :, : rows * config.patch_size, : columns * config.patch_size]
    patches = patches.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))  # n, channel, row, y, column, x
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    return patches, None, torch.tensor([[rows, columns]]).expand(n, 2)
