"""The drift network: the velocity of the adapter's tokens, given the time and the task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .task_encoder import TaskTokens


@dataclass(frozen=True)
class Conditions:
    """What the drift network computes of a batch of tasks alone, once for all steps of a flow.

    Attributes:
        task: `(batch, width)`, see `TaskTokens`.
        memories: of each block, the keys and the values `(batch, heads, n_way, width / heads)` of the class tokens.
        mask: `(batch, 1, 1, n_way)`, what is added to the products with the keys: minus infinity on padding, else 0.
        modulations: of each time that is known beforehand, those of all blocks, see `DriftNetwork.modulate`.
    """

    task: torch.Tensor
    memories: list[tuple[torch.Tensor, torch.Tensor]]
    mask: torch.Tensor
    modulations: dict[float, list[torch.Tensor]]


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

    blocks: Sequence[DriftBlock]

    def __init__(self, n_tokens: int, token_dim: int, width: int, depth: int, heads: int):
        super().__init__()
        if heads < 1 or width % heads or width % 2:
            raise ValueError(f"a width of {width} cannot be shared by {heads} heads and by sines and cosines.")
        self.width = width
        self.token_in = nn.Linear(token_dim, width)
        self.position = nn.Parameter(0.02 * torch.randn(n_tokens, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(DriftBlock(width, heads) for _ in range(depth))  # type: ignore[assignment]
        self.norm = nn.LayerNorm(width)
        self.token_out = nn.Linear(width, token_dim)
        nn.init.zeros_(self.token_out.weight)
        nn.init.zeros_(self.token_out.bias)

    def forward(self, z: torch.Tensor, t: torch.Tensor | float, task: TaskTokens) -> torch.Tensor:
        """Velocity at z `(batch, n_tokens, token_dim)`, of the same shape; t is a number or `(batch,)`."""
        return self.move(z, t, self.prepare(task))

    def prepare(self, task: TaskTokens, times: Sequence[float] = ()) -> Conditions:
        """Compute what does not depend on z. To give all times beforehand spares reading the weights once for each."""
        memories = []
        for block in self.blocks:
            memories.append(block.cross_attention.project_memory(task.classes))
        padding = task.task.new_zeros(task.present.shape).masked_fill(~task.present, -math.inf)
        modulations = {}
        if times:
            steps = torch.tensor(times, dtype=task.task.dtype, device=task.task.device)
            of_blocks = self.modulate(steps[:, None], task.task)
            for number, time in enumerate(times):
                modulations[time] = [rows[number] for rows in of_blocks]
        return Conditions(task.task, memories, padding[:, None, None, :], modulations)

    def modulate(self, t: torch.Tensor, task: torch.Tensor) -> list[torch.Tensor]:
        """How time and task modulate each block, `(..., batch, 9 * width)` for times `(..., batch)` or `(..., 1)`."""
        condition = F.silu(self.time(time_features(t, self.width)) + task)
        return [block.modulation(condition) for block in self.blocks]

    def move(self, z: torch.Tensor, t: torch.Tensor | float, conditions: Conditions) -> torch.Tensor:
        """`forward` of tasks that were prepared."""
        modulations = None if isinstance(t, torch.Tensor) else conditions.modulations.get(t)
        if modulations is None:
            t = torch.as_tensor(t, dtype=z.dtype, device=z.device).expand(len(z))
            modulations = self.modulate(t, conditions.task)
        tokens = self.token_in(z) + self.position
        for block, modulation, memory in zip(self.blocks, modulations, conditions.memories, strict=True):
            tokens = block(tokens, modulation, memory, conditions.mask)
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

    def forward(
        self,
        x: torch.Tensor,
        modulation: torch.Tensor,
        memory: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Tokens `(batch, n_tokens, width)` from such tokens and a modulation `(batch, 9 * width)`.

        Args:
            memory, mask: see `Conditions`.
        """
        shift1, scale1, gate1, shift2, scale2, gate2, shift3, scale3, gate3 = modulation.unsqueeze(1).chunk(9, dim=-1)
        y = torch.addcmul(shift1, self.norm(x), 1 + scale1)
        x = torch.addcmul(x, gate1, self.self_attention(y, self.self_attention.project_memory(y)))
        y = torch.addcmul(shift2, self.norm(x), 1 + scale2)
        x = torch.addcmul(x, gate2, self.cross_attention(y, memory, mask))
        y = torch.addcmul(shift3, self.norm(x), 1 + scale3)
        return torch.addcmul(x, gate3, self.mlp(y))


class Attention(nn.Module):
    """Multi-head attention of tokens to a memory."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def project_memory(self, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `(batch, heads, m, width / heads)` of the tokens of the memory `(batch, m, width)`."""
        keys, values = self.key_value(memory).chunk(2, dim=-1)
        return self._split_heads(keys), self._split_heads(values)

    def forward(
        self, x: torch.Tensor, memory: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend from x `(batch, n, width)` to keys and values.

        Args:
            memory: see `project_memory`.
            mask: `(batch, 1, 1, m)`, added to the products of queries and keys.
        """
        y = F.scaled_dot_product_attention(self._split_heads(self.query(x)), *memory, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))

    def _split_heads(self, y: torch.Tensor) -> torch.Tensor:
        """`(batch, n, width)` to `(batch, heads, n, width / heads)`."""
        return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def time_features(t: torch.Tensor, width: int) -> torch.Tensor:
    """Sines and cosines of times t in 0..1 at geometric frequencies, `(...)` to `(..., width)`."""
    frequencies = torch.exp(torch.linspace(0, math.log(100.0), width // 2, device=t.device, dtype=t.dtype))
    angles = t.unsqueeze(-1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
