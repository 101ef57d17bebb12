"""What people pick today for few-shot classification: classifiers of the `easyfsl` package, with their own defaults.

easyfsl (MIT) asks for torchvision, which its classifiers do not need: `pip install --no-deps easyfsl` is enough.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any, ClassVar

import torch

from .base import Classifier, Method, Predictions
from .target import Images, Support

PACKAGE = "easyfsl.methods"
MODULES = ("prototypical_networks", "simple_shot", "laplacian_shot", "bd_cspn", "finetune")


@dataclass(frozen=True)
class EasyFsl(Method):
    """A classifier of easyfsl on the features of the backbone's last block.

    Attributes:
        module, class_name: where the classifier is in `easyfsl.methods`.
        feature_normalization: the norm by which features are brought to length 1, as in the papers; None: as they are.
    """

    module: ClassVar[str]
    class_name: ClassVar[str]
    feature_normalization: ClassVar[float | None] = 2.0

    works_in_predict = True

    def require_packages(self) -> None:
        import_easyfsl()

    def fit(self, support: Support) -> EasyFslClassifier:
        make = getattr(import_easyfsl()[self.module], self.class_name)
        classifier = make(feature_normalization=self.feature_normalization)
        classifier.process_support_set(support.images.final_features.cpu(), support.labels.cpu())
        return EasyFslClassifier(classifier)


class EasyFslClassifier(Classifier):
    """A classifier of easyfsl that has its support set. What it computes is not meant to be read as probabilities."""

    def __init__(self, classifier: Any):
        self.classifier = classifier

    @torch.no_grad()
    def classify(self, queries: Images) -> Predictions:
        features = queries.final_features.cpu()
        if hasattr(self.classifier, "knn"):  # LaplacianShot cannot have more neighbours than there are queries
            self.classifier.knn = min(self.classifier.knn, len(features))
        with torch.autocast("cpu", enabled=False):  # cosines in bfloat16 would be ties
            return Predictions(self.classifier(features).argmax(-1))


@dataclass(frozen=True)
class EasyPrototypical(EasyFsl):
    """Distances to class means (Snell et al. 2017)."""

    name = "easyfsl-prototypical"
    label = "Prototypical Networks (easyfsl)"
    module = "prototypical_networks"
    class_name = "PrototypicalNetworks"
    feature_normalization = None


@dataclass(frozen=True)
class EasySimpleShot(EasyFsl):
    """Cosines to class means (Wang et al. 2019)."""

    name = "easyfsl-simpleshot"
    label = "SimpleShot (easyfsl)"
    module = "simple_shot"
    class_name = "SimpleShot"


@dataclass(frozen=True)
class EasyLaplacianShot(EasyFsl):
    """Transductive: neighbouring queries get the same label (Ziko et al. 2020). All queries are classified together."""

    name = "easyfsl-laplacianshot"
    label = "LaplacianShot (easyfsl), transductive"
    module = "laplacian_shot"
    class_name = "LaplacianShot"


@dataclass(frozen=True)
class EasyBdcspn(EasyFsl):
    """Transductive: prototypes move towards the queries (Liu et al. 2020). All queries are classified together."""

    name = "easyfsl-bdcspn"
    label = "BD-CSPN (easyfsl), transductive"
    module = "bd_cspn"
    class_name = "BDCSPN"


@dataclass(frozen=True)
class EasyFinetune(EasyFsl):
    """Tunes the prototypes by gradient descent (Chen et al. 2019)."""

    name = "easyfsl-finetune"
    label = "prototype tuning (easyfsl)"
    module = "finetune"
    class_name = "Finetune"


@cache
def import_easyfsl() -> dict[str, ModuleType]:
    """The modules of easyfsl's classifiers, by name, without its own imports of torchvision.

    `easyfsl.methods` imports networks that torchvision defines. It is put in place as a package that is not run, the
    modules in it are imported one by one, and it is taken out again, so that who has torchvision gets the whole of it.

    Raises:
        ImportError: easyfsl is not installed.
    """
    spec = None
    if find_spec("easyfsl") is not None:
        spec = find_spec(PACKAGE)
    if spec is None:
        raise ImportError("the methods `easyfsl` need easyfsl: pip install --no-deps easyfsl")
    before = _pop_modules()
    sys.modules[PACKAGE] = module_from_spec(spec)
    try:
        return {module: importlib.import_module(f"{PACKAGE}.{module}") for module in MODULES}
    finally:
        _pop_modules()
        sys.modules.update(before)


def _pop_modules() -> dict[str, ModuleType]:
    """Take what is imported of `easyfsl.methods` out of `sys.modules`."""
    modules = {}
    for name in list(sys.modules):
        if name.startswith(PACKAGE):
            modules[name] = sys.modules.pop(name)
    return modules
