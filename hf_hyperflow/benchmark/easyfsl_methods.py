"""What people pick today for few-shot classification: classifiers of the `easyfsl` package, on given features.

easyfsl (MIT) asks for torchvision, which its classifiers do not need: `pip install --no-deps easyfsl` is enough.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec, module_from_spec
from types import ModuleType

import torch

EASYFSL_METHODS = (
    "easyfsl-prototypical",
    "easyfsl-simpleshot",
    "easyfsl-laplacianshot",
    "easyfsl-bdcspn",
    "easyfsl-finetune",
)

_MODULES = ("prototypical_networks", "simple_shot", "laplacian_shot", "bd_cspn", "finetune")


@cache
def import_easyfsl() -> dict[str, ModuleType]:
    """The modules of easyfsl's classifiers, by name, without its own imports of torchvision.

    `easyfsl.methods` imports networks that torchvision defines. It is put in place as a package that is not run, the
    modules in it are imported one by one, and it is taken out again, so that who has torchvision gets the whole of it.

    Raises:
        ImportError: easyfsl is not installed.
    """
    if find_spec("easyfsl") is None:
        raise ImportError("the methods `easyfsl` need easyfsl: pip install --no-deps easyfsl")
    name = "easyfsl.methods"
    before = {key: module for key, module in sys.modules.items() if key.startswith(name)}
    for key in before:
        del sys.modules[key]
    sys.modules[name] = module_from_spec(find_spec(name))
    try:
        return {module: importlib.import_module(f"{name}.{module}") for module in _MODULES}
    finally:
        for key in [key for key in sys.modules if key.startswith(name)]:
            del sys.modules[key]
        sys.modules.update(before)


def easyfsl_classifier(
    method: str, features: torch.Tensor, labels: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A classifier of easyfsl with its own defaults, fitted on a support set.

    Features are L2-normalised but for `easyfsl-prototypical`, as in the papers. LaplacianShot and BD-CSPN are
    transductive: they use that all queries are classified together, which the other methods do not.

    Args:
        method: one of `EASYFSL_METHODS`.
        features: `(n, width)` of the support images, any device.
        labels: `(n,)` in 0..n_way-1.

    Returns:
        A function from features `(n, width)` of all queries to labels `(n,)` on the CPU.

    Raises:
        ImportError: easyfsl is not installed.
    """
    modules = import_easyfsl()
    make = {
        "easyfsl-prototypical": modules["prototypical_networks"].PrototypicalNetworks,
        "easyfsl-simpleshot": modules["simple_shot"].SimpleShot,
        "easyfsl-laplacianshot": modules["laplacian_shot"].LaplacianShot,
        "easyfsl-bdcspn": modules["bd_cspn"].BDCSPN,
        "easyfsl-finetune": modules["finetune"].Finetune,
    }[method]
    classifier = make(feature_normalization=None if method == "easyfsl-prototypical" else 2.0)
    features, labels = features.float().cpu(), labels.cpu()
    classifier.process_support_set(features, labels)

    def classify(queries: torch.Tensor) -> torch.Tensor:
        if method == "easyfsl-laplacianshot":
            classifier.knn = min(classifier.knn, len(queries))
        with torch.autocast("cpu", enabled=False):  # cosines in bfloat16 would be ties
            return classifier(queries.float().cpu()).argmax(-1)

    return classify
