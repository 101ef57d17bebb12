"""What a few-shot method is: fitted to a support set, it gives a classifier of queries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...modeling.calibration import COSINE_SCALE, Calibration
from ...modeling.prototypes import Head, PrototypeClassifier, unit_means
from .target import Images, Support

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Method(ABC):
    """A way to make a classifier from a support set; a subclass is a frozen dataclass of its hyper-parameters.

    Attributes:
        works_in_predict: whether the classifier does its work when it predicts and not when it is fitted.
        is_slow: whether a task takes so long that a benchmark runs fewer episodes of it.
        is_chosen_by_log_loss: whether a grid search takes the hyper-parameters of the lowest log loss, and not those of
            the highest accuracy.
    """

    works_in_predict = False
    is_slow = False
    is_chosen_by_log_loss = False

    @property
    @abstractmethod
    def name(self) -> str:
        """What results and command lines call it."""

    @property
    @abstractmethod
    def label(self) -> str:
        """What tables and figures call it, in words."""

    @property
    def head_name(self) -> str | None:
        """What results call its features in the adapter's head (`Classifier.in_head`); None if it has none there."""
        return None

    @property
    def head_label(self) -> str | None:
        """What tables and figures call that."""
        return None

    def hyperparameters(self) -> dict[str, int | float]:
        """The settings that its accuracy depends on, for the record; empty for a method without."""
        return {}

    def grid(self) -> list[list[Self]]:
        """What a grid search tries: groups of candidates that `fit_group` fits together; empty for nothing to choose.

        All candidates of a group have the same hyper-parameters but for `steps`, the number of gradient steps, and
        ascend in these.
        """
        return []

    def require_packages(self) -> None:  # noqa: B027
        """Import the packages that only this method needs, before any work.

        Raises:
            ImportError: one is not installed; the message says how to install it.
        """

    @abstractmethod
    def fit(self, support: Support) -> Classifier:
        """A classifier of the support set's classes.

        The backbone's own weights are as before; a PEFT adapter may be left in it, see `Target`.
        """

    @classmethod
    def fit_group(cls, candidates: Sequence[Self], support: Support) -> Sequence[Classifier]:
        """The classifiers of a group of `grid`, one for each candidate."""
        return [candidate.fit(support) for candidate in candidates]

    def count_operations(self, count: Callable[[Callable[[Support], Classifier]], int]) -> int:
        """Operations of a task, of which a method of many equal steps needs to run only some.

        Args:
            count: takes a function like `fit`, runs it, and returns its number of operations.
        """
        return count(self.fit)


@dataclass(frozen=True)
class Predictions:
    """What a classifier says of queries, on the CPU.

    Attributes:
        labels: `(n,)`, the predicted ones.
        log_probabilities: `(n, n_way)` float64; None where a classifier has no probabilities.
    """

    labels: torch.Tensor
    log_probabilities: torch.Tensor | None = None


class Classifier(ABC):
    """What a method makes of a support set."""

    @property
    def in_head(self) -> Classifier | None:
        """A second classifier, of the same features in the adapter's head; most methods have none."""
        return None

    @abstractmethod
    def classify(self, queries: Images) -> Predictions:
        """Labels and, if the classifier has them, log-probabilities of all queries."""

    def predict(self, queries: Images) -> torch.Tensor:
        """Labels `(n,)` of all queries, on the CPU."""
        return self.classify(queries).labels


class NearestPrototype(Classifier):
    """Picks the class whose prototype is most similar to an image's features.

    Args:
        compute_features: takes images and gives their features `(n, width)`.
        support: the prototypes are made of it at once.
        head: makes prototypes of features.
        calibration: gives the scale of the logits, from the support set.
        scale: their scale where there is no calibration.

    Attributes:
        prototypes: `(n_way, width)`.
        scale: the inverse temperature of the logits, whose softmax are the probabilities.
    """

    def __init__(
        self,
        compute_features: Callable[[Images], torch.Tensor],
        support: Support,
        head: Head = unit_means,
        calibration: Calibration | None = None,
        scale: float = COSINE_SCALE,
    ):
        self.compute_features = compute_features
        with torch.no_grad():
            features = compute_features(support.images)
            self.prototypes = head(features, support.labels)
        self.scale = scale
        if calibration is not None:
            self.scale = calibration.compute_scale(features, support.labels)

    def classify(self, queries: Images) -> Predictions:
        products = self._compute_products(queries)
        return Predictions(products.argmax(-1).cpu(), self._scale(products).log_softmax(-1))

    def compute_logits(self, queries: Images) -> torch.Tensor:
        """Logits `(n, n_way)` float64, on the CPU."""
        return self._scale(self._compute_products(queries))

    @torch.no_grad()
    def _compute_products(self, queries: Images) -> torch.Tensor:
        """Logits of one and the same scale for all tasks.

        Labels are chosen by these. They do not depend on the scale of the task, not even where two classes are equal
        but for rounding.
        """
        return PrototypeClassifier(self.prototypes, COSINE_SCALE)(self.compute_features(queries))

    def _scale(self, products: torch.Tensor) -> torch.Tensor:
        return products.cpu().double() * (self.scale / COSINE_SCALE)
