"""The arguments of `train_drift.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from .precision import HELP, MixedPrecision, resolve_precision
from .tracking import Tracker


@dataclass
class Arguments:
    backbone: str = field(metadata={"help": "the target: a transformers vision model, Hub id or folder"})
    dataset: list[str] = field(metadata={"help": "training domains: Parquet files, image folders, Hub ids"})
    output_dir: str = field(metadata={"help": "folder for checkpoints and the trained adapter"})
    holdout: list[str] = field(
        default_factory=list,
        metadata={"help": "NAME: this domain is kept for validation; NAME:K: only every K-th class of it is"},
    )
    max_per_class: int = field(default=300, metadata={"help": "images of a class that are used at most"})
    trajectories: list[str] = field(
        default_factory=list, metadata={"help": "recorded by collect_trajectories.py: folders or Hub ids"}
    )
    interpolant: Literal["linear", "piecewise", "cubic"] = field(
        default="piecewise", metadata={"help": "what connects the recorded points"}
    )
    matching_steps: int = field(default=0, metadata={"help": "first steps, which only match the trajectories"})
    annealing_steps: int = field(default=0, metadata={"help": "steps after them, of matching less and less"})
    matching_batch_size: int = field(default=64, metadata={"help": "trajectories of a step, over all processes"})
    parameters: Literal["bias", "lora", "layernorm"] = field(
        default="bias", metadata={"help": "what is generated: biases, LoRA factors or LayerNorms"}
    )
    norms: bool = field(default=True, metadata={"help": "with biases: the LayerNorms, too"})
    last_blocks: int = field(default=4, metadata={"help": "the last so many blocks are adapted"})
    encoder: str | None = field(
        default=None,
        metadata={"help": "a vision model that encodes support sets, frozen; default: the target's first blocks"},
    )
    drift_width: int = field(default=192, metadata={"help": "width of the drift network"})
    drift_depth: int = field(default=4, metadata={"help": "its blocks"})
    n_steps: int = field(default=4, metadata={"help": "solver steps, in training and by default in use"})
    lda: bool = field(default=True, metadata={"help": "compare images in a metric measured on the training domains"})
    intermediate_weight: float = field(
        default=0.5,
        metadata={"help": "weight of what the blocks before the adapted ones say of an image; 0: the last alone"},
    )
    lda_tasks: int = field(default=256, metadata={"help": "training tasks that the metric is measured on"})
    token_scale: float | None = field(
        default=None, metadata={"help": "one unit of the flow; default: measured on the trajectories, else 0.02"}
    )
    steps: int = field(default=1000, metadata={"help": "optimiser steps, those of matching included"})
    episodes_per_step: int = field(default=4, metadata={"help": "over all processes and accumulated parts"})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "a step's batch is run in so many parts: less memory, the same result"}
    )
    randomize_prob: float = field(
        default=0.6, metadata={"help": "share of episodes whose domain is made from a real one"}
    )
    learning_rate: float = field(default=5e-4, metadata={"help": "peak learning rate"})
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup"] = field(
        default="cosine", metadata={"help": "of the learning rate, after the warmup"}
    )
    warmup_steps: int = field(default=50, metadata={"help": "steps of linear warmup"})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW weight decay of matrices"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    ema_decay: float = field(default=0.98, metadata={"help": "of the averaged weights that are saved"})
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
    cpu: bool = field(default=False, metadata={"help": "stay on the CPU also where there is a GPU"})
    seed: int = field(default=0, metadata={"help": "of the episodes and of the drift network's start"})

    def __post_init__(self) -> None:
        """Raises ValueError where the settings contradict each other."""
        self.mixed_precision = resolve_precision(self.mixed_precision, cpu=self.cpu)
        if self.trajectories and not self.matching_steps + self.annealing_steps:
            raise ValueError("--trajectories are given but never used: set --matching_steps or --annealing_steps.")
        if self.matching_steps + self.annealing_steps and not self.trajectories:
            raise ValueError("matching needs --trajectories: record some with collect_trajectories.py.")
        positive = ("steps", "episodes_per_step", "matching_batch_size", "gradient_accumulation_steps")
        positive += ("lda_tasks", "validate_every", "validation_episodes", "checkpointing_steps")
        wrong = [f"--{name} {value}" for name, value in vars(self).items() if name in positive and value < 1]
        if self.checkpoints_total_limit is not None and self.checkpoints_total_limit < 1:
            wrong.append(f"--checkpoints_total_limit {self.checkpoints_total_limit}")
        if self.validation_episodes == 1:
            wrong.append("--validation_episodes 1 (there is no interval of one)")
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: must be at least 1.")
        if not 0 <= self.intermediate_weight < math.inf:
            raise ValueError(f"--intermediate_weight {self.intermediate_weight}: must be a number and not negative.")
