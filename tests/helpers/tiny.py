"""Tiny but real models, adapters and support sets for the tests."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from peft import PeftConfig
from torch import nn
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel, ViTConfig, ViTModel

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.modeling.peft_configs import bias_config

SIZE = 28


def scrambled(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode with every parameter moved, so that biases and norms are not at their trivial start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tiny_dinov2(hidden_size: int = 32, num_hidden_layers: int = 4, seed: int = 0, **config: object) -> Dinov2Model:
    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=hidden_size,
        num_attention_heads=2,
        num_hidden_layers=num_hidden_layers,
        image_size=SIZE,
        patch_size=14,
        **config,
    )
    return scrambled(Dinov2Model(config), seed)


def tiny_vit(seed: int = 0, **config: object) -> ViTModel:
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=32,
        num_attention_heads=2,
        num_hidden_layers=4,
        intermediate_size=64,
        image_size=SIZE,
        patch_size=14,
        **config,
    )
    return scrambled(ViTModel(config), seed)


def tiny_resnet() -> ResNetModel:
    torch.manual_seed(0)
    return ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")).eval()


def tiny_processor() -> BitImageProcessorPil:
    return BitImageProcessorPil(
        size={"shortest_edge": SIZE + 4},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def moving(adapter: HyperFlowAdapter, seed: int = 0) -> HyperFlowAdapter:
    """The adapter, its drift network no longer at zero: the flow moves, differently for each task and time."""
    generator = torch.Generator().manual_seed(seed)
    moved = list(adapter.drift.parameters())
    if adapter.start_z is not None:
        moved.append(adapter.start_z)
    with torch.no_grad():
        for parameter in moved:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        adapter.token_scale.copy_(0.1 + 0.1 * torch.rand(adapter.token_scale.shape, generator=generator))
    return adapter.eval()


def tiny_adapter(
    backbone: nn.Module, peft_config: PeftConfig | None = None, *, last_blocks: int = 2, **arguments: object
) -> HyperFlowAdapter:
    """An adapter for a backbone, with a flow that moves."""
    torch.manual_seed(0)
    if peft_config is None:
        peft_config = bias_config(backbone, last_blocks)
    sizes = {"drift_width": 16, "drift_depth": 2, "drift_heads": 2}
    arguments = {"processor": tiny_processor()} | sizes | arguments
    return moving(HyperFlowAdapter.from_backbone(backbone, peft_config, last_blocks=last_blocks, **arguments))


def picture(seed: int, size: tuple[int, int] = (40, 36), colour: tuple[int, int, int] = (128, 128, 128)):
    """An RGB picture `(width, height)`: a colour with noise on it."""
    noise = np.random.default_rng(seed).integers(-60, 60, (size[1], size[0], 3))
    return PIL.Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))


def pictures(n_way: int = 3, n_shot: int = 2, seed: int = 0) -> dict[str, list[PIL.Image.Image]]:
    """A support set: one colour per class."""
    colours = [(220, 40, 40), (40, 200, 60), (50, 60, 220), (210, 200, 50), (120, 40, 160)]
    names = ["red", "green", "blue", "yellow", "violet"]
    return {
        names[c]: [picture(1000 * seed + 100 * c + i, colour=colours[c]) for i in range(n_shot)] for c in range(n_way)
    }


def write_pictures(folder: Path, images: dict[str, list[PIL.Image.Image]]) -> Path:
    """Write a support set as an image folder: `red/0.png`, `red/1.png`, ..."""
    for name, shots in images.items():
        (folder / name).mkdir(parents=True)
        for i, shot in enumerate(shots):
            shot.save(folder / name / f"{i}.png")
    return folder


class Snapshot:
    """All that a model is: which modules, flags, attributes and bits. `assert_unchanged` compares it with now."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.modules = dict(model.named_modules())
        self.training = {path: module.training for path, module in self.modules.items()}
        self.vars = {path: self._vars(module) for path, module in self.modules.items()}
        self.parameters = dict(model.named_parameters())
        self.requires_grad = {name: p.requires_grad for name, p in self.parameters.items()}
        self.bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.config = copy.deepcopy(model.config.to_dict())

    @staticmethod
    def _vars(module: nn.Module) -> dict[str, int]:
        """Attributes by identity, and the keys of the dicts among them (hooks, parameters, submodules)."""
        own = {key: id(value) for key, value in vars(module).items() if key != "training"}
        inside = {f"{k}[]": sorted(map(str, v)) for k, v in vars(module).items() if isinstance(v, dict)}
        return own | inside

    def assert_unchanged(self) -> None:
        modules = dict(self.model.named_modules())
        assert list(modules) == list(self.modules)
        assert all(modules[path] is module for path, module in self.modules.items())
        assert {path: module.training for path, module in modules.items()} == self.training
        assert {path: self._vars(module) for path, module in modules.items()} == self.vars
        parameters = dict(self.model.named_parameters())
        assert list(parameters) == list(self.parameters)
        assert all(parameters[name] is p for name, p in self.parameters.items())
        assert {name: p.requires_grad for name, p in parameters.items()} == self.requires_grad
        bits = self.model.state_dict()
        assert list(bits) == list(self.bits)
        assert all(same_bits(bits[name], tensor) for name, tensor in self.bits.items())
        assert self.model.config.to_dict() == self.config


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit, the sign of zero and NaN included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = [tensor.detach().cpu().contiguous().view(-1).view(torch.uint8) for tensor in (a, b)]
    return torch.equal(*bits)
