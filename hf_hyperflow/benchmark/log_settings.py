"""The settings that stand in an episode log: what its rows depend on, so that others are not added to them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..data.domains import Domain
from ..modeling.fingerprint import compute_fingerprint
from ..modeling.saving import CheckpointError
from .arguments import BenchmarkArguments
from .episode_log import EpisodeLog
from .methods import FLOW_POINTS, DirectTransfer, FineTuning, Method, Target, list_labels

#: Names of settings: those of a run, and how those of a method and of a domain begin.
SETTINGS = (
    "protocol",
    "seed",
    "bf16",
    "views",
    "query_views",
    "n_way",
    "n_query",
    "adapter",
    "calibration",
    "backbone",
)
HYPERPARAMETERS, DOMAIN = "hyperparameters of ", "domain "


def describe_settings(
    arguments: BenchmarkArguments, methods: Sequence[Method], target: Target, domains: Sequence[Domain]
) -> dict[str, Any]:
    """What a row depends on beside method, domain, shots and index."""
    settings: dict[str, Any] = {"protocol": arguments.protocol, "seed": arguments.seed, "bf16": arguments.bf16}
    settings["views"] = arguments.views
    settings["query_views"] = arguments.query_views
    if arguments.protocol == "cdfsl":
        settings["n_way"] = arguments.n_way
    if arguments.protocol != "meta-dataset":
        settings["n_query"] = arguments.n_query
    settings["adapter"] = target.adapter.config.weights_sha256
    settings["calibration"] = asdict(target.adapter.calibration)
    settings["backbone"] = compute_fingerprint(target.backbone)
    for method in methods:
        if method.hyperparameters():
            settings[f"{HYPERPARAMETERS}{method.name}"] = method.hyperparameters()
        if isinstance(method, FineTuning):
            settings[f"{HYPERPARAMETERS}{DirectTransfer.name}"] = {"scale": method.scale}
    for domain in domains:
        settings[f"{DOMAIN}{domain.name}"] = compute_digest(domain)
    return settings


def require_known(log: EpisodeLog) -> None:
    """Check that a log has only methods and settings of this version, whose episodes can stand beside new ones.

    Raises:
        CheckpointError: it has others, as those of version 0.1 have.
    """
    methods = {*list_labels(), *(point.name for point in FLOW_POINTS)}
    strange = {row.method for row in log.rows} - methods
    for name in log.settings:
        if name not in SETTINGS and not name.startswith((HYPERPARAMETERS, DOMAIN)):
            strange.add(name)
    if strange:
        raise CheckpointError(
            f"{log.path} was written by another version of hf_hyperflow: {', '.join(sorted(strange))} is not known. "
            "Choose another folder for the results."
        )


def compute_digest(domain: Domain) -> str:
    """A digest of the images and labels of a domain, to tell them from others."""
    digest = hashlib.sha256(domain.images.numpy().tobytes())
    digest.update(domain.labels.numpy().tobytes())
    return digest.hexdigest()[:16]
