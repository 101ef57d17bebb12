"""What the frozen first blocks compute of training images, kept in memory for images that are seen again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..finetuning.merged_target import MergedTarget
from ..modeling.backbones import Hidden


class ImageKey(NamedTuple):
    """An image that is seen again: a row of a domain, mirrored or not."""

    domain: str
    row: int
    flip: bool


class PrefixCache:
    """Runs the frozen first blocks on images, once for each image that has a key.

    Images with a new look (`randomize_domain`) are never seen again and have no key. The hidden states of the others
    are kept in main memory, first come, first served, until there is no room.

    What is computed of an image with a key does not depend on what is kept: it is rounded to the precision that is
    kept in any case, and on a CPU it is run in a batch of one size, because the size of a batch can change the last
    bits. A resumed run begins with an empty cache and therefore equals an uninterrupted one.

    Args:
        target: whose first blocks are run.
        max_bytes: most memory for hidden states. An image of 70 x 70 pixels takes 20 kB with a ViT-S/14 in half
            precision. Nothing is kept where this is 0 or the backbone is not cut.
        dtype: what hidden states are kept in; None keeps them as they are.

    Attributes:
        n_bytes: memory of the hidden states that are kept.
    """

    def __init__(self, target: MergedTarget, max_bytes: int, dtype: torch.dtype | None = None):
        self.target = target
        self.max_bytes = max_bytes if target.split.is_cut else 0
        self.dtype = dtype
        self.n_bytes = 0
        self._states: dict[ImageKey, torch.Tensor] = {}
        self._sample: Hidden | None = None

    def __len__(self) -> int:
        """How many images are kept."""
        return len(self._states)

    def forward_prefix(self, pixel_values: torch.Tensor, keys: Sequence[ImageKey | None]) -> Hidden:
        """The hidden states of images `(n, 3, height, width)` behind the first blocks.

        Args:
            keys: of the `n` images; None for an image that is not seen again.
        """
        if not self.max_bytes:
            return self.target.forward_prefix(pixel_values)
        if self._sample is None:
            self._sample = self.target.forward_prefix(pixel_values[:1])
        shape = self._sample.states.shape[1:]
        states = self._sample.states.new_empty(len(keys), *shape)
        unnamed = [row for row, key in enumerate(keys) if key is None]
        if unnamed:
            states[unnamed] = self.target.forward_prefix(pixel_values[unnamed]).states
        named = [(row, key) for row, key in enumerate(keys) if key is not None]
        if named:
            found = self._look_up(pixel_values, dict(named))
            states[[row for row, _ in named]] = torch.stack(found).to(states)
        return Hidden(states, self._sample.args, self._sample.kwargs)

    def _look_up(self, pixel_values: torch.Tensor, keys: dict[int, ImageKey]) -> list[torch.Tensor]:
        """The hidden states of the images in these rows; those that are missing are computed and, with room, kept."""
        missing = {key: row for row, key in keys.items() if key not in self._states}
        computed: dict[ImageKey, torch.Tensor] = {}
        if missing:
            batch = self.target.forward_prefix(self._fill_up(pixel_values[list(missing.values())]))
            computed = dict(zip(missing, batch.states.to("cpu", self.dtype), strict=False))
        for key, states in computed.items():
            if self.n_bytes + states.nbytes <= self.max_bytes:
                self._states[key] = states.clone()  # a view would keep its whole batch in memory
                self.n_bytes += states.nbytes
        return [computed[key] if key in computed else self._states[key] for key in keys.values()]

    def _fill_up(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """On a CPU, images and black ones up to a whole number of batches."""
        n_black = -len(pixel_values) % self.target.images_at_once if pixel_values.device.type == "cpu" else 0
        return F.pad(pixel_values, (0, 0, 0, 0, 0, 0, 0, n_black))
