"""`collection.json`: how a collection of trajectories was made, and whether it fits what is trained on it now."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from ..data.domains import Domain
from ..modeling.fingerprint import fingerprints_match
from ..modeling.parameter_space import ParameterSpace
from ..modeling.peft_configs import config_to_dict
from ..modeling.saving import CheckpointError

COLLECTION = "collection.json"

#: What every `collection.json` has.
_KEYS = {"arguments", "teacher", "times", "backbone", "parameter_space", "domains", "groups", "totals"}


def read_collection(folder: str | os.PathLike) -> dict:
    """`collection.json` of a folder.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = Path(folder, COLLECTION)
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no trajectories: there is no {COLLECTION} in it.")
    try:
        collection = json.loads(path.read_text(encoding="utf-8"))
        if not set(collection) >= _KEYS:
            raise ValueError("it has not the keys of a collection")
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}). Download or collect it again.") from error
    # What version 0.1 called this argument.
    if "made_share" in collection["arguments"]:
        collection["arguments"]["randomize_prob"] = collection["arguments"].pop("made_share")
    return collection


def describe_space(space: ParameterSpace) -> dict:
    """A parameter space for `collection.json`: trajectories of one space are of no use for another."""
    description = {
        "peft": config_to_dict(space.peft_config),
        "token_dim": space.token_dim,
        "frozen": space.frozen,
        "seed": space.seed,
        "n_parameters": space.n_parameters,
        "tensors": list(zip(space.names, space.shapes, strict=True)),
    }
    return json.loads(json.dumps(description))  # tuples become lists, so that it equals what is read back


def describe_domain(domain: Domain, max_per_class: int | None) -> dict:
    """A domain for `collection.json`, with the SHA-256 of its labels and decoded images."""
    digest = hashlib.sha256(domain.labels.numpy().tobytes())
    digest.update(domain.images.contiguous().numpy().data)
    return {
        "name": domain.name,
        "classes": len(domain.class_names),
        "images": len(domain),
        "max_per_class": max_per_class,
        "sha256": digest.hexdigest(),
    }


def check_space(collection: dict, source: str | os.PathLike, space: ParameterSpace) -> None:
    """Check that the trajectories are of this parameter space.

    Raises:
        ValueError: they are of another; the message says what differs.
    """
    recorded, current = collection["parameter_space"], describe_space(space)
    keys = sorted(set(recorded) | set(current))
    different = [key for key in keys if recorded.get(key) != current.get(key)]
    if different:
        raise ValueError(
            f"the trajectories of {source} are of another parameter space ({', '.join(different)} differ): "
            f"{recorded['n_parameters']} parameters of {recorded['peft']['peft_type']} in {len(recorded['tensors'])} "
            f"tensors, here {current['n_parameters']} of {current['peft']['peft_type']} in {len(current['tensors'])}. "
            "Train with the backbone and the parameter set they were collected with, or collect anew."
        )


def check_backbone(collection: dict, source: str | os.PathLike, fingerprint: list[float]) -> None:
    """Check that the trajectories were collected on the backbone with this fingerprint.

    Raises:
        ValueError: they were collected on another; the message names it.
    """
    expected = collection["backbone"]["fingerprint"]
    if not fingerprints_match(expected, fingerprint):
        raise ValueError(
            f"the trajectories of {source} were collected on {collection['backbone']['name']}, and this backbone has "
            f"other weights (fingerprint {fingerprint}, expected {expected}). Use that backbone, or collect anew."
        )


def check_domains(collection: dict, source: str | os.PathLike, domains: Sequence[Domain]) -> None:
    """Check that the domains the trajectories were collected from are among these, with the same labels and pixels.

    Raises:
        ValueError: one is missing or differs; the message names it.
    """
    by_name = {domain.name: domain for domain in domains}
    for recorded in collection["domains"]:
        name = recorded["name"]
        if name not in by_name:
            raise ValueError(
                f"the trajectories of {source} need the domain {name!r}, and the domains given are {sorted(by_name)}. "
                "Give all datasets they were collected from, with the same --holdout."
            )
        current = describe_domain(by_name[name], recorded["max_per_class"])
        if current["sha256"] != recorded["sha256"]:
            raise ValueError(
                f"domain {name!r} is not the one that the trajectories of {source} were collected from: it has "
                f"{current['images']} images of {current['classes']} classes, theirs {recorded['images']} of "
                f"{recorded['classes']} (max_per_class {recorded['max_per_class']}), or other pixels. Give the same "
                "dataset, --max_per_class, --holdout and image processor, or collect anew."
            )
