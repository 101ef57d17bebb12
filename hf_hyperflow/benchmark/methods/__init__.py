"""The methods that the benchmark compares: one class each, with a name, a label and hyper-parameters.

    target = Target(backbone, adapter)
    classifier = HyperFlow().fit(target.support(images, labels))
    predicted = classifier.predict(target.images(queries))

A new method is a file beside these with a subclass of `Method`, and an instance of it in `METHODS`. Its words in
tables, its grid of hyper-parameters and how its cost is counted are members of the class.
"""

from __future__ import annotations

from .adapted import AdaptedBackbone
from .base import Classifier, Method, NearestPrototype, Predictions
from .direct import DirectTransfer
from .easyfsl import EasyBdcspn, EasyFinetune, EasyFsl, EasyLaplacianShot, EasyPrototypical, EasySimpleShot
from .fine_tuning import FineTuning
from .full import FullFineTuning
from .hyperflow import FLOW_POINTS, HyperFlow
from .logistic import LogisticRegression
from .no_flow import NoFlow
from .peft_tuning import BiasTuning, LayerNormTuning, LoraTuning
from .shared_weights import SharedWeights
from .target import Images, Support, Target

#: What the benchmark runs by default, with default hyper-parameters.
METHODS: tuple[Method, ...] = (
    DirectTransfer(),
    NoFlow(),
    LogisticRegression(),
    HyperFlow(),
    HyperFlow(early_stopping=True),
    BiasTuning(),
    LoraTuning(),
    LayerNormTuning(),
    FullFineTuning(),
)

#: What it runs on demand: those of the easyfsl package.
EASYFSL_METHODS: tuple[Method, ...] = (
    EasyPrototypical(),
    EasySimpleShot(),
    EasyLaplacianShot(),
    EasyBdcspn(),
    EasyFinetune(),
)

__all__ = [
    "EASYFSL_METHODS",
    "FLOW_POINTS",
    "METHODS",
    "AdaptedBackbone",
    "BiasTuning",
    "Classifier",
    "DirectTransfer",
    "EasyFsl",
    "FineTuning",
    "FullFineTuning",
    "HyperFlow",
    "Images",
    "LayerNormTuning",
    "LogisticRegression",
    "LoraTuning",
    "Method",
    "NearestPrototype",
    "NoFlow",
    "Predictions",
    "SharedWeights",
    "Support",
    "Target",
    "find_methods",
    "list_labels",
]


def find_methods(names: str) -> list[Method]:
    """Methods by a comma-separated list of names; `easyfsl` stands for all of `EASYFSL_METHODS`.

    Raises:
        ValueError: an unknown or repeated name, or none.
    """
    by_name = {method.name: method for method in (*METHODS, *EASYFSL_METHODS)}
    methods: list[Method] = []
    for name in names.replace(" ", "").split(","):
        if name == "easyfsl":
            methods += EASYFSL_METHODS
        elif name in by_name:
            methods.append(by_name[name])
        elif name:
            raise ValueError(f"unknown method {name!r} in {names!r}: choose from {', '.join([*by_name, 'easyfsl'])}.")
    if not methods:
        raise ValueError(f"no methods in {names!r}: choose from {', '.join([*by_name, 'easyfsl'])}.")
    if len(set(methods)) < len(methods):
        raise ValueError(f"{names!r} has a method twice.")
    return methods


def list_labels() -> dict[str, str]:
    """Labels by name, in the order of tables and figures, those of tuned features in the adapter's head included."""
    labels = {method.name: method.label for method in METHODS}
    for method in METHODS:
        if method.head_name is not None and method.head_label is not None:
            labels[method.head_name] = method.head_label
    for method in EASYFSL_METHODS:
        labels[method.name] = method.label
    return labels
