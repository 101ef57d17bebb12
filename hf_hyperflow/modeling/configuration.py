"""The configuration of a HyperFlow adapter: all that describes it except its weights."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import field, fields
from typing import Any

from transformers import PreTrainedConfig


class HyperFlowConfig(PreTrainedConfig):
    """Configuration of a `HyperFlowAdapter`.

    Args:
        backbone: the model that the adapter was made for: `name_or_path`, `model_type`, `hidden_size` (length of its
            features), `num_blocks`, `prefix_width` (what enters the adapted blocks; `hidden_size` if missing)
            and `fingerprint` (see `compute_fingerprint`).
        last_blocks: how many of the last blocks are adapted. The blocks before are frozen and run once per image.
        pooling: the feature of an image: "cls" (the CLS token), "mean" (the mean over the tokens) or "pooler" (the
            backbone's own pooled features), see `read_features`.
        intermediate_weight: the weight of the intermediate features beside the final ones, see
            `SplitBackbone.concat_features`; 0 leaves them out.
        peft: the native PEFT config of the generated adapter, in the form of `config_to_dict`.
        tensor_names, tensor_shapes: the tensors that the flow moves, in order.
        frozen_tensors: parts of the names of adapter tensors that stay at their seeded start.
        adapter_seed: the seed of that start.
        image_size: height and width in pixels of the training images, if known. Larger images condition the flow at
            this size, because it has seen no larger ones.
        reduced_size: height and width in pixels to which larger images are brought instead. A smaller size is faster.
        encoder: None if the frozen first blocks of the backbone encode the support set. Otherwise the `to_dict()` of
            the config of a `transformers` vision model, whose weights are part of this checkpoint.
        drift_width, drift_depth, drift_heads: size of the drift network.
        learned_start: whether the flow starts from learned weights, the same for every task, or from those of the
            backbone.
        lda: whether the head is a regularised LDA (see `RegularisedLDA`) or compares by plain cosines.
        views: from how many views of a support image its features are averaged unless `adapt` is told otherwise, see
            `make_view`; 1 is the image as it is.
        calibration: the fields of a `Calibration`, by which scores become probabilities; None if every task has the
            scale `logit_scale` of the weights.
        rejection: the fields of a `RejectionCalibration`, by which tasks tell images of none of their classes; None if
            they cannot.
        n_steps, solver: how the flow is integrated unless `adapt` is told otherwise.
        weights_sha256: SHA-256 of `model.safetensors`, by which a damaged download is noticed.
    """

    model_type = "hyperflow"
    # Version 0.1 called these fields otherwise.
    attribute_map = {"metric": "lda", "middle": "intermediate_weight"}  # noqa: RUF012 (transformers wants a plain dict)

    backbone: dict[str, Any] = field(default_factory=dict)
    last_blocks: int = 4
    pooling: str = "cls"
    intermediate_weight: float = 0.0
    peft: dict[str, Any] = field(default_factory=dict)
    tensor_names: list[str] = field(default_factory=list)
    tensor_shapes: list[list[int]] = field(default_factory=list)
    frozen_tensors: list[str] = field(default_factory=list)
    adapter_seed: int = 0
    image_size: list[int] | None = None
    reduced_size: list[int] | None = None
    encoder: dict[str, Any] | None = None
    drift_width: int = 192
    drift_depth: int = 4
    drift_heads: int = 6
    learned_start: bool = False
    lda: bool = False
    views: int = 1
    calibration: dict[str, float] | None = None
    rejection: dict[str, float] | None = None
    n_steps: int = 4
    solver: str = "euler"
    weights_sha256: str | None = None


def get_own_fields() -> list[str]:
    """Names of the fields that a `HyperFlowConfig` has beside those of any config of transformers."""
    general = {item.name for item in fields(PreTrainedConfig)}
    return [item.name for item in fields(HyperFlowConfig) if item.name not in general]


def require_known_fields(names: Iterable[str]) -> None:
    """Check that names are of fields of a `HyperFlowConfig`, since transformers takes any.

    Raises:
        TypeError: one is not.
    """
    known = get_own_fields()
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}."
            raise TypeError(f"a HyperFlowConfig has no field {name!r}: {remedy}")
