"""The settings of `TrajectoryCollector`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..finetuning.teacher import Teacher
from .config import ParameterKind
from .precision import HELP, MixedPrecision, resolve_precision


@dataclass
class CollectionConfig:
    """The settings of `TrajectoryCollector`; the help of each field is in its metadata.

    Raises:
        ValueError: a number is out of range.
    """

    backbone: str = field(metadata={"help": "the target, a transformers vision model: Hub id or folder"})
    dataset: list[str] = field(metadata={"help": "training domains: Parquet files, image folders, Hub ids"})
    output_dir: str = field(metadata={"help": "folder of the trajectories"})
    holdout: list[str] = field(
        default_factory=list,
        metadata={"help": "NAME: nothing is drawn from this domain; NAME:K: nothing from every K-th class of it"},
    )
    max_per_class: int = field(default=300, metadata={"help": "most images of a class that are used"})
    parameters: ParameterKind = field(
        default="bias", metadata={"help": "what is fine-tuned: biases, LoRA factors or LayerNorms"}
    )
    last_blocks: int = field(default=4, metadata={"help": "how many of the last blocks are fine-tuned"})
    norms: bool = field(default=True, metadata={"help": "with biases, fine-tune the LayerNorms too"})
    n_trajectories: int = field(default=1024, metadata={"help": "tasks to record, rounded up to whole groups"})
    group_size: int = field(default=16, metadata={"help": "tasks of one shape that make a shard"})
    images_per_pass: int = field(
        default=128, metadata={"help": "support images, clean and augmented, that go through the target at once"}
    )
    randomize_prob: float = field(default=0.6, metadata={"help": "share of tasks whose domain is randomised"})
    teacher_steps: int = field(default=12, metadata={"help": "gradient steps of the teacher"})
    n_points: int = field(default=8, metadata={"help": "points of a trajectory that are recorded, denser early"})
    learning_rate: float = field(default=1e-3, metadata={"help": "learning rate of the teacher's Adam"})
    noise: float = field(default=5e-4, metadata={"help": "standard deviation of the noise on the teacher's start"})
    n_views: int = field(default=4, metadata={"help": "augmented views of each support image to draw from"})
    mixed_precision: MixedPrecision = field(default="auto", metadata={"help": HELP})
    cpu: bool = field(default=False, metadata={"help": "stay on the CPU even if there is a GPU"})
    seed: int = field(default=0, metadata={"help": "of the tasks and the teacher"})
    push_to_hub: str | None = field(default=None, metadata={"help": "Hub id of the dataset repository to push to"})

    def __post_init__(self) -> None:
        self.mixed_precision = resolve_precision(self.mixed_precision, cpu=self.cpu)
        for name in ("n_trajectories", "group_size", "images_per_pass", "max_per_class", "teacher_steps"):
            if vars(self)[name] < 1:
                raise ValueError(f"--{name} must be at least 1, not {vars(self)[name]}.")

    @property
    def n_groups(self) -> int:
        return -(-self.n_trajectories // self.group_size)

    @property
    def teacher(self) -> Teacher:
        return Teacher(
            steps=self.teacher_steps,
            learning_rate=self.learning_rate,
            noise=self.noise,
            n_views=self.n_views,
            n_points=self.n_points,
        )
