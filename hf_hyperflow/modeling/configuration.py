"""Everything that describes a HyperFlow adapter but its weights."""

from __future__ import annotations

from transformers import PreTrainedConfig


class HyperFlowConfig(PreTrainedConfig):
    """Configuration of a `HyperFlowAdapter`.

    Args:
        backbone: what the adapter was made for: `name_or_path`, `model_type`, `hidden_size`, `num_blocks` and
            `fingerprint` (see `fingerprint.py`).
        last_blocks: how many of the last blocks are adapted; the ones before are frozen and run once per image.
        pooling: the feature of an image: "cls" or "mean".
        intermediate_weight: weight of the intermediate features, those of the last frozen block, beside the final ones,
            see `SplitBackbone.concat_features`; 0: none.
        peft: the native PEFT config of the generated adapter, as `config_to_dict` gives it.
        tensor_names, tensor_shapes: the tensors that the flow moves, in order.
        frozen_tensors: parts of names of adapter tensors that keep their seeded start.
        adapter_seed: seed of that start.
        image_size: height and width in pixels of the images it was trained on, if known. Larger ones are brought to
            this size to condition the flow, which has seen no others.
        encoder: None to encode the support set with the frozen first blocks of the target ("shared"), or the
            `to_dict()` of a `transformers` vision model's config, whose weights are then part of this checkpoint.
        drift_width, drift_depth, drift_heads: of the drift network.
        lda: whether the head is a regularised LDA (see `RegularisedLDA`) or compares by plain cosines.
        n_steps, solver: how the flow is integrated unless `adapt` is told otherwise.
        weights_sha256: of `model.safetensors`, so that a damaged download is noticed.
    """

    model_type = "hyperflow"
    # The names that these fields had in version 0.1.
    attribute_map = {"metric": "lda", "middle": "intermediate_weight"}  # noqa: RUF012 (transformers wants a plain dict)

    backbone: dict | None = None
    last_blocks: int = 4
    pooling: str = "cls"
    intermediate_weight: float = 0.0
    peft: dict | None = None
    tensor_names: list | None = None
    tensor_shapes: list | None = None
    frozen_tensors: list | None = None
    adapter_seed: int = 0
    image_size: list | None = None
    encoder: dict | None = None
    drift_width: int = 192
    drift_depth: int = 4
    drift_heads: int = 6
    lda: bool = False
    n_steps: int = 4
    solver: str = "euler"
    weights_sha256: str | None = None
