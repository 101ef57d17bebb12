"""Everything that describes a HyperFlow adapter but its weights."""

from __future__ import annotations

from transformers import PreTrainedConfig


class HyperFlowConfig(PreTrainedConfig):
    """Configuration of a `HyperFlowAdapter`.

    Args:
        backbone: what the adapter was made for: `name_or_path`, `model_type`, `hidden_size`, `num_blocks` and
            `fingerprint` (see `hf_hyperflow.fingerprint`).
        last_blocks: how many of the last blocks are adapted; the ones before are frozen and run once per image.
        pooling: the feature of an image: "cls" or "mean".
        middle: weight of what the blocks before the adapted ones say of an image beside the last one, see
            `SplitBackbone.joined`; 0: nothing.
        peft: the native PEFT config of the generated adapter, as `parameter_space.config_to_dict` gives it.
        tensor_names, tensor_shapes: the tensors that the flow moves, in order.
        frozen_tensors: parts of names of adapter tensors that keep their seeded start.
        adapter_seed: seed of that start.
        image_size: height and width of the images it was trained on, if known: larger ones are brought to this size to
            condition the flow, which has seen no others (and so takes no longer for them).
        encoder: None to encode the support set with the frozen first blocks of the target ("shared"), or the
            `to_dict()` of a `transformers` vision model's config, whose weights are then part of this checkpoint.
        drift_width, drift_depth, drift_heads: of the drift network.
        metric: whether images are compared in a measured metric (see `hf_hyperflow.metric`) or by plain cosines.
        n_steps, solver: how the flow is integrated unless `adapt` is told otherwise.
        weights_sha256: of `model.safetensors`, so that a damaged download is noticed.
    """

    model_type = "hyperflow"

    backbone: dict | None = None
    last_blocks: int = 4
    pooling: str = "cls"
    middle: float = 0.0
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
    metric: bool = False
    n_steps: int = 4
    solver: str = "euler"
    weights_sha256: str | None = None
