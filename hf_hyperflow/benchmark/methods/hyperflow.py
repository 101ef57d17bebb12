"""HyperFlow (Kim, Kim & Hong, arXiv 2504.15323), at any point of the flow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...modeling.flow import WeightPath
from ...modeling.injection import Injection
from ...modeling.stopping import StoppingPoint
from .adapted import AdaptedBackbone
from .base import Method, NearestPrototype
from .no_flow import NoFlow
from .target import Images, Support

#: The times in the figures along the flow are quarters of t, so each quarter is divided into whole steps.
QUARTERS = 4


@dataclass(frozen=True)
class HyperFlow(Method):
    """The flow from the backbone as it is to `end_time`, with the adapter's head; what `HyperFlowAdapter.adapt` does.

    Attributes:
        n_steps: solver steps to `end_time`. By default the adapter's own or, if there is an `end_time`, steps of
            the adapter's own length or a little shorter, so that quarters of t are ends of steps.
        end_time: where to stop; None is t = 1. At 0 the flow has not begun. This is `NoFlow`, unless the adapter starts
            from learned weights.
        early_stopping: stop where the leave-one-out accuracy on the support set is best.
    """

    n_steps: int | None = None
    end_time: float | None = None
    early_stopping: bool = False

    @property
    def name(self) -> str:
        name = "hyperflow"
        if self.early_stopping:
            name += "-early-stopping"
        if self.end_time is not None:
            name += f" t={self.end_time:g}"
        if self.n_steps is not None:
            name += f" steps={self.n_steps}"
        return name

    @property
    def label(self) -> str:
        label = "HyperFlow"
        if self.early_stopping:
            label += " with early stopping"
        if self.end_time is not None:
            label += f", t = {self.end_time:g}"
        if self.n_steps is not None:
            label += f", {self.n_steps} steps"
        return label

    def hyperparameters(self) -> dict[str, int | float]:
        settings: dict[str, int | float] = {}
        if self.n_steps is not None:
            settings["n_steps"] = self.n_steps
        if self.end_time is not None:
            settings["end_time"] = self.end_time
        return settings

    @torch.no_grad()
    def fit(self, support: Support) -> NearestPrototype:
        if self.end_time == 0:
            return _fit_start(support)
        path = self.follow_flow(support)
        return FlowClassifier(support, path.theta, path.stopping_point)

    @torch.no_grad()
    def follow_flow(self, support: Support) -> WeightPath:
        """The weights along the flow, see `HyperFlowAdapter.follow`."""
        target, images = support.target, support.images
        adapter = target.adapter
        return adapter.follow(
            target.split,
            adapter.space.inject(target.backbone),
            images.pixel_values,
            support.labels,
            images.hidden,
            n_steps=self.count_steps(adapter.config.n_steps),
            end_time=1.0 if self.end_time is None else self.end_time,
            early_stopping=self.early_stopping,
        )

    def count_steps(self, adapter_steps: int) -> int:
        """Solver steps to the end, with an adapter that takes `adapter_steps` to t = 1."""
        if self.n_steps is not None:
            return self.n_steps
        if self.end_time is None:
            return adapter_steps
        steps_per_quarter = math.ceil(adapter_steps / QUARTERS)
        return round(self.end_time * QUARTERS * steps_per_quarter)


def _fit_start(support: Support) -> NearestPrototype:
    """The adapter's head on the features of the backbone with the weights that the flow starts from."""
    adapter = support.target.adapter
    if adapter.start_z is None:
        return NoFlow().fit(support)
    theta = adapter.theta(adapter.start_z, adapter.space.inject(support.target.backbone).start)
    return FlowClassifier(support, theta, StoppingPoint(0.0))


#: Points of the flow for the figures: along it, and at t = 1 with other numbers of steps.
END_TIMES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
NUMBERS_OF_STEPS = (1, 2, 4, 8, 16, 50)


def _list_flow_points() -> tuple[HyperFlow, ...]:
    points = [HyperFlow(end_time=end_time) for end_time in END_TIMES]
    for n_steps in NUMBERS_OF_STEPS:
        points.append(HyperFlow(n_steps=n_steps))
    return tuple(points)


FLOW_POINTS = _list_flow_points()


class FlowClassifier(NearestPrototype):
    """The adapter's head on the features of the backbone with weights that the flow gave.

    Attributes:
        theta: these weights, `(n_tokens, token_dim)`.
        stopping_point: where the flow was stopped.
    """

    def __init__(self, support: Support, theta: torch.Tensor, stopping_point: StoppingPoint):
        self.theta = theta
        self.stopping_point = stopping_point
        adapter = support.target.adapter
        super().__init__(flow_features(support, theta), support, adapter.head, adapter.calibration)


def flow_features(support: Support, theta: torch.Tensor) -> Callable[[Images], torch.Tensor]:
    """A function that computes features of images with `theta` in the adapter's parameters."""
    target = support.target

    def get_weights() -> Injection:
        return target.adapter.space.inject(target.backbone)

    return AdaptedBackbone(target.split, get_weights, theta).features
