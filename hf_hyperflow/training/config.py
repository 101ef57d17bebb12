"""The settings of a training run. Every field is also a flag of `training/train_drift.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from .precision import HELP, MixedPrecision, resolve_precision
from .tracking import Tracker

#: What the flow generates: biases (and LayerNorms), LoRA factors, or LayerNorms alone.
ParameterKind = Literal["bias", "lora", "layernorm"]

#: Settings that must be at least 1.
POSITIVE = (
    "steps",
    "episodes_per_step",
    "matching_batch_size",
    "gradient_accumulation_steps",
    "lda_tasks",
    "validate_every",
    "validation_episodes",
    "checkpointing_steps",
    "checkpoints_total_limit",
)


@dataclass
class DriftTrainingConfig:
    """The settings of `DriftTrainer`; the help of each field is in its metadata.

    Raises:
        ValueError: settings that contradict each other or are out of range; they are named as flags.
    """

    backbone: str = field(metadata={"help": "the target, a transformers vision model: Hub id or folder"})
    dataset: list[str] = field(metadata={"help": "training domains: Parquet files, image folders, Hub ids"})
    output_dir: str = field(metadata={"help": "folder for checkpoints and the trained adapter"})
    holdout: list[str] = field(
        default_factory=list,
        metadata={"help": "NAME keeps this domain for validation; NAME:K keeps every K-th class of it"},
    )
    max_per_class: int = field(default=300, metadata={"help": "most images of a class that are used"})
    trajectories: list[str] = field(
        default_factory=list, metadata={"help": "recorded by collect_trajectories.py: folders or Hub ids"}
    )
    interpolant: Literal["linear", "piecewise", "cubic"] = field(
        default="piecewise", metadata={"help": "how the recorded points are connected"}
    )
    matching_steps: int = field(default=0, metadata={"help": "first steps, of velocity matching alone"})
    annealing_steps: int = field(
        default=0, metadata={"help": "steps after them, in which the episodic loss takes over linearly"}
    )
    matching_batch_size: int = field(default=64, metadata={"help": "trajectories of a step, over all processes"})
    parameters: ParameterKind = field(
        default="bias", metadata={"help": "what is generated: biases, LoRA factors or LayerNorms"}
    )
    norms: bool = field(default=True, metadata={"help": "with biases, generate the LayerNorms too"})
    last_blocks: int = field(default=4, metadata={"help": "how many of the last blocks are adapted"})
    encoder: str | None = field(
        default=None,
        metadata={"help": "a frozen vision model that encodes support sets; default: the target's first blocks"},
    )
    drift_width: int = field(default=192, metadata={"help": "width of the drift network"})
    drift_depth: int = field(default=4, metadata={"help": "blocks of the drift network"})
    learned_start: bool = field(
        default=False,
        metadata={"help": "learn the weights that the flow starts from, too; they are the same for every task"},
    )
    init_adapter: str | None = field(
        default=None,
        metadata={
            "help": "start training from the weights of this adapter: folder or Hub id. With --learned_start, the flow "
            "starts where that adapter's arrives on average, unless it has a learned start of its own"
        },
    )
    n_steps: int = field(default=4, metadata={"help": "solver steps, in training and by default in use"})
    lda: bool = field(
        default=True, metadata={"help": "classify by a regularised LDA, measured on the training domains"}
    )
    intermediate_weight: float = field(
        default=0.5, metadata={"help": "weight of the last frozen block's features; 0 uses the final features alone"}
    )
    lda_tasks: int = field(default=256, metadata={"help": "training tasks that the LDA is measured on"})
    token_scale: float | None = field(
        default=None, metadata={"help": "one unit of the flow; default: measured on the trajectories, else 0.02"}
    )
    steps: int = field(default=1000, metadata={"help": "optimiser steps, those of matching included"})
    episodes_per_step: int = field(default=4, metadata={"help": "over all processes and accumulated parts"})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "parts that a step's batch is run in: less memory, the same result"}
    )
    prefix_cache_bytes: int = field(
        default=2_000_000_000,
        metadata={"help": "memory of a process for what the first blocks compute of images that are seen again"},
    )
    randomize_prob: float = field(default=0.6, metadata={"help": "share of episodes whose domain is randomised"})
    learning_rate: float = field(default=5e-4, metadata={"help": "peak learning rate"})
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup"] = field(
        default="cosine", metadata={"help": "schedule of the learning rate after the warmup"}
    )
    warmup_steps: int = field(default=50, metadata={"help": "steps of linear warmup"})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW weight decay of matrices"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    ema_decay: float = field(default=0.98, metadata={"help": "decay of the averaged weights, which are what is saved"})
    validate_every: int = field(default=250, metadata={"help": "steps between validations"})
    validation_episodes: int = field(default=60, metadata={"help": "5-way 5-shot episodes of each validation domain"})
    checkpointing_steps: int = field(default=250, metadata={"help": "steps between checkpoints"})
    checkpoints_total_limit: int | None = field(default=2, metadata={"help": "how many of the last ones are kept"})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "go on from a checkpoint: its folder, or `latest` in output_dir"}
    )
    report_to: Tracker = field(default="none", metadata={"help": "where the curves go"})
    push_to_hub: bool = field(default=False, metadata={"help": "push the trained adapter to the Hub"})
    hub_model_id: str | None = field(default=None, metadata={"help": "its repository; default: output_dir's name"})
    mixed_precision: MixedPrecision = field(default="auto", metadata={"help": HELP})
    cpu: bool = field(default=False, metadata={"help": "stay on the CPU even if there is a GPU"})
    seed: int = field(default=0, metadata={"help": "of the episodes and of the drift network's start"})

    def __post_init__(self) -> None:
        self.mixed_precision = resolve_precision(self.mixed_precision, cpu=self.cpu)
        self._require_matching_is_whole()
        if self.learned_start and self.trajectories:
            raise ValueError(
                "--learned_start and --trajectories: recorded trajectories start at the backbone. Drop one."
            )
        self._require_in_range()

    def _require_matching_is_whole(self) -> None:
        is_matching = self.matching_steps + self.annealing_steps > 0
        if self.trajectories and not is_matching:
            raise ValueError("--trajectories are given but never used: set --matching_steps or --annealing_steps.")
        if is_matching and not self.trajectories:
            raise ValueError("matching needs --trajectories: record some with collect_trajectories.py.")

    def _require_in_range(self) -> None:
        wrong = []
        for name in POSITIVE:
            value = vars(self)[name]
            if value is not None and value < 1:
                wrong.append(f"--{name} {value}")
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: must be at least 1.")
        if self.prefix_cache_bytes < 0:
            raise ValueError(f"--prefix_cache_bytes {self.prefix_cache_bytes}: must not be negative.")
        if self.validation_episodes == 1:
            raise ValueError("--validation_episodes 1: must be at least 2, for a single one has no interval.")
        if not 0 <= self.intermediate_weight < math.inf:
            raise ValueError(f"--intermediate_weight {self.intermediate_weight}: must be a number and not negative.")
