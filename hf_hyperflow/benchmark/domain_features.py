"""What the frozen backbone computes of the images of a domain, each view of an image once."""

from __future__ import annotations

from functools import cached_property

import torch

from ..data.domains import Domain, normalise
from ..data.episodes import Episode
from ..modeling.backbones import Hidden
from ..modeling.views import make_view
from .methods.target import Images, Support, Target, combine_images


class DomainFeatures:
    """The images of a domain for the methods, with everything that was computed of them before.

    Args:
        target: the backbone and the adapter.
        domain: the images.
        views: over how many views of a support image its features are combined, see `make_view`.
        query_views: the same of a query.
    """

    def __init__(self, target: Target, domain: Domain, views: int = 1, query_views: int = 1):
        self.target = target
        self.domain = domain
        self._n_views = views
        self._n_query_views = query_views
        self._views = [ViewFeatures(target, domain, number) for number in range(max(views, query_views))]

    def support(self, episode: Episode) -> Support:
        """An episode's support set. Its seed is the number of the episode."""
        images = self._images(episode.support, self._n_views)
        return Support(images, episode.support_labels.to(self.target.device), seed=episode.index)

    def queries(self, episode: Episode) -> Images:
        """An episode's query images."""
        return self.query_images(episode.query)

    def query_images(self, rows: torch.Tensor) -> Images:
        """The images `rows` of the domain, as queries."""
        return self._images(rows, self._n_query_views)

    def _images(self, rows: torch.Tensor, views: int) -> Images:
        return combine_images([DomainImages(view, rows) for view in self._views[:views]])


class ViewFeatures:
    """Hidden states behind the frozen first blocks, and features without an adapter, of one view of a domain's images.

    Hidden states are kept in half precision, all on the CPU. An image is always run together with the same others,
    those of its block of `BLOCK` rows. The result therefore does not depend on which images were asked for before.
    """

    BLOCK = 32

    def __init__(self, target: Target, domain: Domain, view: int = 0):
        self.target = target
        self.domain = domain
        self.view = view
        n_blocks = -(-len(domain) // self.BLOCK)
        self._states: torch.Tensor | None = None
        self._is_computed = torch.zeros(n_blocks, dtype=torch.bool)
        self._features: dict[int, torch.Tensor] = {}
        self._block_args: tuple = ()
        self._block_kwargs: dict = {}

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
        pixel_values = make_view(normalise(images, self.target.processor).to(parameter.dtype), self.view)
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
    """The images `rows` of a domain, in one view."""

    def __init__(self, view_features: ViewFeatures, rows: torch.Tensor):
        self.target = view_features.target
        self.view = view_features.view
        self._view_features = view_features
        self._rows = rows

    @cached_property
    def raw(self) -> torch.Tensor:
        return self._view_features.domain.images[self._rows].to(self.target.device)

    @cached_property
    def hidden(self) -> Hidden:
        return self._view_features.hidden(self._rows)

    @cached_property
    def features(self) -> torch.Tensor:
        return self._view_features.features(self._rows)

    @cached_property
    def final_features(self) -> torch.Tensor:
        return self.target.split.final_features(self.features)
