"""Logistic regression on the features of the backbone as it is (Tian et al. 2020)."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from .base import Classifier, Method, Predictions
from .target import Images, Support

if TYPE_CHECKING:
    import sklearn.linear_model
    from typing_extensions import Self


@dataclass(frozen=True)
class LogisticRegression(Method):
    """A logistic regression on the last block's features at length 1, fitted by scikit-learn on the CPU.

    Attributes:
        c: scikit-learn's `C`, the inverse of the weight decay.
        grid_c: those that a grid search tries.
    """

    c: float = 10.0

    grid_c: ClassVar[tuple[float, ...]] = (0.1, 1.0, 10.0, 100.0, 1000.0)

    name = "logistic"
    label = "logistic regression"

    def hyperparameters(self) -> dict[str, int | float]:
        return {"c": self.c}

    def grid(self) -> list[list[Self]]:
        return [[replace(self, c=c)] for c in self.grid_c]

    def require_packages(self) -> None:
        try:
            importlib.import_module("sklearn.linear_model")
        except ImportError as error:
            raise ImportError(
                'the method "logistic" needs scikit-learn: pip install "hf-hyperflow[benchmark]"'
            ) from error

    def fit(self, support: Support) -> LogisticClassifier:
        self.require_packages()
        from sklearn.linear_model import LogisticRegression as Regression

        regression = Regression(C=self.c, max_iter=1000)
        return LogisticClassifier(regression.fit(_to_unit(support.images), support.labels.cpu().numpy()))


class LogisticClassifier(Classifier):
    """A fitted regression of scikit-learn."""

    def __init__(self, regression: sklearn.linear_model.LogisticRegression):
        self.regression = regression

    def classify(self, queries: Images) -> Predictions:
        """The probabilities are those of `predict_proba`, computed so that their logarithms are finite."""
        unit = _to_unit(queries)
        logits = torch.from_numpy(self.regression.decision_function(unit)).double()
        if logits.ndim == 1:  # of two classes there is one number
            logits = torch.stack([torch.zeros_like(logits), logits], dim=1)
        return Predictions(torch.from_numpy(self.regression.predict(unit)), logits.log_softmax(-1))


def _to_unit(images: Images) -> np.ndarray:
    """Features `(n, width)` of length 1."""
    return F.normalize(images.final_features, dim=-1).cpu().numpy()
