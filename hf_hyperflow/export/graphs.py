"""What is exported: getting ready and classifying, each as one function of tensors without branches or locks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from ..modeling.adapter import HyperFlowAdapter
from ..modeling.backbones import Hidden, SplitBackbone
from ..modeling.calibration import MIN_SPREAD
from ..modeling.injection import Injection
from ..modeling.lda import RegularisedLDA, spread_by_class
from ..modeling.prototypes import PrototypeClassifier, means_by_class
from ..modeling.rejection import Rejection
from ..modeling.trials import split_arguments
from ..modeling.trunks import run_trunk
from ..modeling.views import combine_views, make_view


class TracedBackbone(SplitBackbone):
    """A split backbone for tracers, which an exception inside the backbone would throw out of step.

    The blocks behind the cut are run and their results dropped. No graph that is cleaned up keeps them.
    """

    def _stop_at_start(self, pixel_values: torch.Tensor) -> Hidden:
        reached: list[Hidden] = []

        def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
            reached.append(Hidden(*split_arguments(args, kwargs)))

        block = self.backbone.get_submodule(self.blocks.paths[self.start])
        handle = block.register_forward_pre_hook(note, with_kwargs=True)
        try:
            run_trunk(self.backbone, pixel_values)
        finally:
            handle.remove()
        return reached[0]


class _Graph(nn.Module):
    """An adapter and the backbone that carries its injection."""

    def __init__(self, adapter: HyperFlowAdapter, split: SplitBackbone):
        super().__init__()
        self.adapter = adapter
        self.split = split

    def compute_features(self, theta: torch.Tensor, hidden: Hidden) -> torch.Tensor:
        """Features `(n, width)` of the backbone with the adapter's weights theta `(n_tokens, token_dim)`."""
        tensors = {f"backbone.{name}": tensor for name, tensor in self.adapter.space.to_tensors(theta).items()}
        return functional_call(self.split, tensors, (hidden,)).float()


class AdaptGraph(_Graph):
    """From a support set to all that a task is: `HyperFlowAdapter.adapt` and what is computed when it is first used.

    Args:
        adapter: in evaluation mode, on the CPU and in float32, as is the backbone.
        split: the backbone, which carries the injection.
        injection: the adapter in the backbone.
        n_steps, solver: how the flow is integrated.
    """

    start: torch.Tensor

    def __init__(
        self, adapter: HyperFlowAdapter, split: SplitBackbone, injection: Injection, n_steps: int, solver: str
    ):
        super().__init__(adapter, split)
        self.register_buffer("start", injection.start.clone())
        self.n_steps = n_steps
        self.solver = solver
        self.calibration = adapter.calibration  # read here, because it reads a weight as a number
        self.rejection = adapter.rejection

    def forward(self, pixel_values: torch.Tensor, one_hot: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Theta `(n_tokens, token_dim)`, prototypes `(n_way, width)`, the scale `()` and maybe the rejection `(3,)`.

        Args:
            pixel_values: `(n, 3, height, width)`.
            one_hot: the labels as rows `(n, n_way)` of zeros and a one.
        """
        labels = one_hot.argmax(dim=1)
        image_features, hidden = self.adapter.encode_images(self.split, pixel_values)
        tokens = self.adapter.task_encoder(image_features, labels, one_hot)
        flow = self.adapter.flow(tokens, n_steps=self.n_steps, solver=self.solver)
        theta = self.adapter.theta(flow.end[0], self.start)
        features = self._average_views(theta, pixel_values, hidden)
        if isinstance(self.adapter.head, RegularisedLDA):
            prototypes = self.adapter.head(features, labels, one_hot)
        else:
            prototypes = F.normalize(means_by_class(features, one_hot), dim=-1)
        return theta, prototypes, *self._scale_scores(features, one_hot)

    def _average_views(self, theta: torch.Tensor, pixel_values: torch.Tensor, hidden: Hidden | None) -> torch.Tensor:
        """Features `(n, width)` of the support images, averaged over the views that the adapter is made for."""
        if hidden is None:
            hidden = self.split.forward_prefix(pixel_values)
        features = [self.compute_features(theta, hidden)]
        for number in range(1, self.adapter.config.views):
            view = self.split.forward_prefix(make_view(pixel_values, number))
            features.append(self.compute_features(theta, view))
        return combine_views(features)

    def _scale_scores(self, features: torch.Tensor, one_hot: torch.Tensor) -> list[torch.Tensor]:
        """What `Calibration` and `RejectionCalibration` compute, with tensors in place of numbers."""
        counts = one_hot.sum(dim=0)
        ways = (torch.ones_like(counts).sum() / 5).log()
        shots = -(1 / counts).mean().log()
        spread = spread_by_class(F.normalize(features, dim=-1), one_hot).clamp_min(MIN_SPREAD).log()
        fit = self.calibration
        numbers = [(fit.constant + fit.ways * ways + fit.shots * shots + fit.spread * spread).exp()]
        known = self.rejection
        if known is not None:
            offset = known.constant + known.ways * ways + known.shots * shots + known.spread * spread
            nearness = -known.distance * (-spread).exp()
            numbers.append(torch.stack([offset - nearness, torch.full_like(offset, known.odds), nearness]))
        return numbers


class PredictGraph(_Graph):
    """From images and what `AdaptGraph` returns to the scores of a task."""

    def forward(
        self,
        pixel_values: torch.Tensor,
        theta: torch.Tensor,
        prototypes: torch.Tensor,
        scale: torch.Tensor,
        rejection: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Scores `(n, n_way)` and, with a rejection, the probabilities `(n,)` of being of one of the classes at all."""
        features = self.compute_features(theta, self.split.forward_prefix(pixel_values))
        logits = PrototypeClassifier(prototypes, scale)(features)
        scores = logits.softmax(dim=-1)
        if rejection is None:
            return (scores,)
        # A rejection holds numbers; what it computes with them is the same for tensors.
        offset, odds, cosine = rejection.unbind()
        known = Rejection(offset, odds, cosine).compute_known(logits, scale)  # type: ignore[arg-type]
        return scores, known
