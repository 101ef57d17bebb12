"""Fine-tuning by gradient descent: what the methods that do it have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch

from ...finetuning.finetune import FineTuningConfig, fine_tune
from ...modeling.backbones import SplitBackbone
from ...modeling.calibration import COSINE_SCALE
from ...modeling.views import combine_views
from .adapted import AdaptedBackbone, Weights
from .base import Classifier, Method, NearestPrototype
from .target import Images, Support, Target

if TYPE_CHECKING:
    from typing_extensions import Self

#: Numbers of gradient steps that a grid search tries.
GRID_STEPS = (5, 10, 20, 50, 100)


@dataclass(frozen=True)
class FineTuning(Method):
    """Fine-tunes some weights of the backbone on the support set, by Adam with the loss of PMF (Hu et al. 2022).

    Plain cosines to class means classify the features that it arrives at. `in_head`, the classifier has the same
    features in the adapter's head.

    Attributes:
        steps: gradient steps.
        learning_rate: of Adam.
        scale: the inverse temperature of the logits: that of direct transfer, see `with_hyperparameters`.
        grid_rates: learning rates that a grid search tries.
    """

    steps: int = 50
    learning_rate: float = 1e-3
    scale: float = COSINE_SCALE

    is_slow = True
    grid_rates: ClassVar[tuple[float, ...]] = (3e-4, 1e-3, 3e-3, 1e-2)

    @property
    def head_name(self) -> str:
        return f"{self.name}-head"

    @property
    def head_label(self) -> str:
        return f"{self.label}, in HyperFlow's head"

    def hyperparameters(self) -> dict[str, int | float]:
        return {"steps": self.steps, "learning_rate": self.learning_rate}

    def grid(self) -> list[list[Self]]:
        groups = []
        for learning_rate in self.grid_rates:
            group = [replace(self, steps=steps, learning_rate=learning_rate) for steps in GRID_STEPS]
            groups.append(group)
        return groups

    @abstractmethod
    def get_weights(self, target: Target) -> Weights:
        """The weights that are tuned; an adapter that holds them is put into the backbone, if there is one."""

    def split(self, target: Target) -> SplitBackbone:
        """The backbone, split before the first block that is tuned."""
        return target.split_before(target.split.start)

    def fit(self, support: Support) -> TunedClassifier:
        (classifier,) = self.fit_after(support, [self.steps])
        return classifier

    def fit_after(self, support: Support, steps: Sequence[int]) -> list[TunedClassifier]:
        """The classifiers after so many gradient steps of one run, which ends with the last of them.

        Args:
            steps: numbers of steps, none above the method's own.

        Raises:
            ValueError: a number of steps that the run does not have.
        """
        if not 1 <= min(steps) <= max(steps) <= self.steps:
            raise ValueError(f"steps must be in 1..{self.steps}, the steps of {self.name}, not {list(steps)}.")
        target = support.target
        weights, split = self.get_weights(target), self.split(target)
        thetas: dict[int, torch.Tensor] = {}

        def keep(step: int) -> None:
            if step in steps:
                thetas[step] = weights.read()

        config = FineTuningConfig(steps=self.steps, learning_rate=self.learning_rate, seed=support.seed)
        images, labels = support.images.raw, support.labels
        with weights.tuning() as parameters:
            fine_tune(
                split, parameters, images, labels, target.processor, config, run_steps=max(steps), after_step=keep
            )
        classifiers = []
        for step in steps:
            tuned = AdaptedBackbone(split, lambda: self.get_weights(target), thetas[step])
            classifiers.append(TunedClassifier(tuned, support, self.scale))
        return classifiers

    @classmethod
    def fit_group(cls, candidates: Sequence[Self], support: Support) -> Sequence[Classifier]:
        """All of them by the one run of the last, which has the most steps."""
        return candidates[-1].fit_after(support, [candidate.steps for candidate in candidates])

    def count_operations(self, count: Callable[[Callable[[Support], Classifier]], int]) -> int:
        """All gradient steps are alike, so that two are enough to count."""
        one = count(self._first_steps(1))
        if self.steps == 1:
            return one
        two = count(self._first_steps(2))
        return one + (self.steps - 1) * (two - one)

    def _first_steps(self, n_steps: int) -> Callable[[Support], Classifier]:
        """A function that fits by the first steps of the run alone."""

        def fit(support: Support) -> Classifier:
            return self.fit_after(support, [n_steps])[0]

        return fit


class TunedClassifier(NearestPrototype):
    """Plain cosines to the class means of a tuned backbone's features, with logits of a given scale."""

    def __init__(self, tuned: AdaptedBackbone, support: Support, scale: float):
        super().__init__(tuned.features, support, scale=scale)
        self.tuned = tuned
        self.support = support

    @cached_property
    def in_head(self) -> Classifier | None:
        """A classifier of the same features in the adapter's head; None if that is plain cosines, too."""
        adapter = self.support.target.adapter
        if not adapter.config.lda:
            return None
        return NearestPrototype(self._compute_both, self.support, adapter.head, adapter.calibration)

    def _compute_both(self, images: Images) -> torch.Tensor:
        """The tuned features with the intermediate ones of the backbone as it is: the head was made for these."""
        split = self.support.target.split
        features = []
        for view in images.views:
            features.append(split.concat_features(self.tuned.features(view), view.hidden))
        return combine_views(features)
