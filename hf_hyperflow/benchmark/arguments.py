"""The command line of `hyperflow benchmark`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..data.episodes import PROTOCOLS
from ..modeling.views import MAX_VIEWS
from .methods import METHODS, find_methods


@dataclass
class BenchmarkArguments:
    """What is compared on what; see `run`."""

    adapter: str = field(metadata={"help": "the HyperFlow adapter: folder or Hub id"})
    dataset: list[str] = field(metadata={"help": "domains to report: Parquet files, image folders, Hub ids"})
    output_dir: str = field(metadata={"aliases": ["--output"], "help": "folder for the results"})
    backbone: str | None = field(
        default=None, metadata={"help": "the target: folder or Hub id; default: the one that the adapter names"}
    )
    protocol: str = field(
        default="cdfsl",
        metadata={
            "help": "cdfsl (fixed ways and shots), meta-dataset (variable), or unbalanced (8, 4, 2, 1 and 1 images of "
            "five classes)"
        },
    )
    n_way: int = field(default=5, metadata={"help": "classes of an episode, or all where there are fewer (cdfsl)"})
    n_shot: list[int] = field(
        default_factory=lambda: [1, 5, 20], metadata={"help": "support images of a class, one or more (cdfsl)"}
    )
    n_query: int = field(default=15, metadata={"help": "query images of a class (cdfsl, unbalanced)"})
    n_episodes: int = field(default=600, metadata={"help": "episodes of each domain and number of shots"})
    methods: str = field(
        default=",".join(method.name for method in METHODS),
        metadata={"help": "separated by commas; easyfsl stands for that package's classifiers"},
    )
    max_episodes_gradient: int | None = field(
        default=None,
        metadata={"help": "fine-tuning runs on the first so many episodes; default: 60 on a CPU, all on a GPU"},
    )
    flow_episodes: int = field(
        default=60, metadata={"help": "the figures along the flow are drawn from the first so many episodes; 0: none"}
    )
    hyperparameters: str | None = field(
        default=None, metadata={"help": "hyper-parameters of the baselines: JSON of a grid search"}
    )
    views: int = field(
        default=1,
        metadata={"help": f"views of a support image (itself, crops, mirror) for all methods, at most {MAX_VIEWS}"},
    )
    query_views: int = field(default=1, metadata={"help": "the same of a query image"})
    bf16: bool = field(default=False, metadata={"help": "run the models under bfloat16 autocast"})
    cpu: bool = field(default=False, metadata={"help": "stay on the CPU also where there is a GPU"})
    seed: int = field(default=0, metadata={"help": "of the episodes"})

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"unknown protocol {self.protocol!r}: use one of {', '.join(PROTOCOLS)}.")
        numbers = {"n_episodes": self.n_episodes, "n_query": self.n_query, "n_shot": min(self.n_shot, default=0)}
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}.")
        for name, value in {"views": self.views, "query_views": self.query_views}.items():
            if not 1 <= value <= MAX_VIEWS:
                raise ValueError(f"{name} must be from 1 to {MAX_VIEWS}, not {value}.")
        if self.n_way < 2:
            raise ValueError(f"n_way must be at least 2, not {self.n_way}.")
        if self.flow_episodes < 0:
            raise ValueError(f"flow_episodes must not be negative, but is {self.flow_episodes}.")
        if self.max_episodes_gradient is not None and self.max_episodes_gradient < 1:
            raise ValueError(f"max_episodes_gradient must be at least 1, not {self.max_episodes_gradient}.")
        find_methods(self.methods)
        names = [Path(source).stem for source in self.dataset]
        if len(set(names)) < len(names):
            raise ValueError(f"two datasets have the same name among {names}: a domain is known by its name.")
