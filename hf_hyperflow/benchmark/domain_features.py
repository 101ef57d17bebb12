"""What the frozen backbone computes of the images of a domain, each image once."""

from __future__ import annotations

from functools import cached_property

import torch

from ..data.domains import Domain, normalise
from ..data.episodes import Episode
from ..modeling.backbones import Hidden
from .methods.target import Images, Support, Target


class DomainFeatures:
    """Hidden states behind the frozen first blocks, and features of the backbone without an adapter, of a domain.

    Hidden states are kept in half precision, all on the CPU. An image is always run together with the same others,
    those of its block of `BLOCK` rows. The result therefore does not depend on which images were asked for before.
    """

    BLOCK = 32

    def __init__(self, target: Target, domain: Domain):
        self.target = target
        self.domain = domain
        n_blocks = -(-len(domain) // self.BLOCK)
        self._states: torch.Tensor | None = None
        self._is_computed = torch.zeros(n_blocks, dtype=torch.bool)
        self._features: dict[int, torch.Tensor] = {}
        self._block_args: tuple = ()
        self._block_kwargs: dict = {}

    def support(self, episode: Episode) -> Support:
        """An episode's support set. Its seed is the number of the episode."""
        images = DomainImages(self, episode.support)
        return Support(images, episode.support_labels.to(self.target.device), seed=episode.index)

    def queries(self, episode: Episode) -> Images:
        """An episode's query images."""
        return DomainImages(self, episode.query)

    @torch.no_grad()
    def hidden(self, rows: torch.Tensor) -> Hidden:
        """Hidden states of the images `rows`, on the backbone's device and in its precision."""
        parameter = next(self.target.backbone.parameters())
        blocks = (rows // self.BLOCK).unique()
        for block in blocks[~self._is_computed[blocks]].tolist():
            self._compute_block(block)
        assert self._states is not None, "the first block makes room for all"
        states = self._states[rows].to(parameter.device, parameter.dtype)
        return Hidden(states, self._block_args, self._block_kwargs)

    def _compute_block(self, block: int) -> None:
        parameter = next(self.target.backbone.parameters())
        rows = slice(block * self.BLOCK, (block + 1) * self.BLOCK)
        images = self.domain.images[rows].to(parameter.device)
        pixel_values = normalise(images, self.target.processor).to(parameter.dtype)
        hidden = self.target.split.forward_prefix(pixel_values)
        if self._states is None:
            self._block_args, self._block_kwargs = hidden.args, hidden.kwargs
            self._states = torch.empty(len(self.domain), *hidden.states.shape[1:], dtype=torch.float16)
        self._states[rows] = hidden.states.half().cpu()
        self._is_computed[block] = True

    @torch.no_grad()
    def features(self, rows: torch.Tensor) -> torch.Tensor:
        """Features `(n, feature_width)` float32 of the images `rows`, see `Images.features`."""
        # The adapter is put in, at its start, so that features are the same bits whichever method ran before.
        injection = self.target.adapter.space.inject(self.target.backbone)
        features = []
        for row in rows.tolist():
            block, place = divmod(row, self.BLOCK)
            if block not in self._features:
                last = min((block + 1) * self.BLOCK, len(self.domain))
                hidden = self.hidden(torch.arange(block * self.BLOCK, last))
                with injection.using(injection.start):
                    self._features[block] = self.target.split.forward_suffix(hidden).float()
            features.append(self._features[block][place])
        return torch.stack(features)


class DomainImages(Images):
    """The images `rows` of a domain."""

    def __init__(self, domain_features: DomainFeatures, rows: torch.Tensor):
        self.target = domain_features.target
        self._domain_features = domain_features
        self._rows = rows

    @cached_property
    def raw(self) -> torch.Tensor:
        return self._domain_features.domain.images[self._rows].to(self.target.device)

    @cached_property
    def hidden(self) -> Hidden:
        return self._domain_features.hidden(self._rows)

    @cached_property
    def features(self) -> torch.Tensor:
        return self._domain_features.features(self._rows)

    @cached_property
    def final_features(self) -> torch.Tensor:
        return self.target.split.final_features(self.features)
