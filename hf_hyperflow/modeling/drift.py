"""The drift network: the velocity of the adapter's tokens, given the time and the task."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .task_encoder import TaskTokens


class DriftNetwork(nn.Module):
    """h_phi(z, t | S) of HyperFlow (arXiv 2504.15323, section 3): a transformer over the tokens of the parameters.

    Tokens attend to each other and to the class tokens. Time and the task token shift, scale and gate every block
    (AdaLN, Peebles & Xie 2023). The output starts at zero, so that an untrained flow leaves the backbone as it is.

    Args:
        n_tokens, token_dim: shape of the parameter space.
        width, depth, heads: size of the transformer; `width` is even and a multiple of `heads`.

    Raises:
        ValueError: the width does not fit the heads.
    """

    def __init__(self, n_tokens: int, token_dim: int, width: int, depth: int, heads: int):
        super().__init__()
        if heads < 1 or width % heads or width % 2:
            raise ValueError(f"a width of {width} cannot be shared by {heads} heads and by sines and cosines.")
        self.width = width
        self.token_in = nn.Linear(token_dim, width)
        self.position = nn.Parameter(0.02 * torch.randn(n_tokens, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(DriftBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.token_out = nn.Linear(width, token_dim)
        nn.init.zeros_(self.token_out.weight)
        nn.init.zeros_(self.token_out.bias)

    def forward(self, z: torch.Tensor, t: torch.Tensor | float, task: TaskTokens) -> torch.Tensor:
        """Velocity at z `(batch, n_tokens, token_dim)`, of the same shape; t is a number or `(batch,)`."""
        t = torch.as_tensor(t, dtype=z.dtype, device=z.device).expand(len(z))
        condition = F.silu(self.time(time_features(t, self.width)) + task.task)
        tokens = self.token_in(z) + self.position
        for block in self.blocks:
            tokens = block(tokens, condition, task)
        return self.token_out(self.norm(tokens))


class DriftBlock(nn.Module):
    """Self-attention, cross-attention to the class tokens and an MLP, each modulated by the condition."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.self_attention = Attention(width, heads)
        self.cross_attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 9 * width)
        # The gates are open from the start, unlike in AdaLN-zero. The zero output already makes the untrained flow
        # stand still. With closed gates as well, it would first learn a shift that is the same for every task.
        nn.init.normal_(self.modulation.weight, std=0.02)
        nn.init.zeros_(self.modulation.bias)
        with torch.no_grad():
            gates = self.modulation.bias.view(3, 3, width)[:, 2]
            gates.fill_(0.5)

    def forward(self, x: torch.Tensor, condition: torch.Tensor, task: TaskTokens) -> torch.Tensor:
        """Tokens `(batch, n_tokens, width)` from such tokens and the condition `(batch, width)`."""
        modulation = self.modulation(condition).unsqueeze(1)
        shift1, scale1, gate1, shift2, scale2, gate2, shift3, scale3, gate3 = modulation.chunk(9, dim=-1)
        y = self.norm(x) * (1 + scale1) + shift1
        x = x + gate1 * self.self_attention(y, y)
        y = self.norm(x) * (1 + scale2) + shift2
        x = x + gate2 * self.cross_attention(y, task.classes, task.present)
        y = self.norm(x) * (1 + scale3) + shift3
        return x + gate3 * self.mlp(y)


class Attention(nn.Module):
    """Multi-head attention of tokens to a memory."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, memory: torch.Tensor, present: torch.Tensor | None = None) -> torch.Tensor:
        """Attend from x `(batch, n, width)` to the tokens of the memory `(batch, m, width)` that are `present`."""
        query = self._split_heads(self.query(x))
        keys, values = self.key_value(memory).chunk(2, dim=-1)
        mask = None if present is None else present[:, None, None, :]
        y = F.scaled_dot_product_attention(query, self._split_heads(keys), self._split_heads(values), attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))

    def _split_heads(self, y: torch.Tensor) -> torch.Tensor:
        """`(batch, n, width)` to `(batch, heads, n, width / heads)`."""
        return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def time_features(t: torch.Tensor, width: int) -> torch.Tensor:
    """Sines and cosines of times t in 0..1 at geometric frequencies, `(batch,)` to `(batch, width)`."""
    frequencies = torch.exp(torch.linspace(0, math.log(100.0), width // 2, device=t.device, dtype=t.dtype))
    angles = t[:, None] * frequencies[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
