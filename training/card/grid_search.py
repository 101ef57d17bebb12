"""Choose the hyper-parameters of the benchmark's baselines by grid search, on episodes of training domains.

    python -m training.card.grid_search --backbone model_cards/vit-s14-focus-70 \
        --adapter model_cards/hyperflow-vit-s14-70 --dataset TRAINING_DOMAIN [...] --output_file hyperparameters.json
    hyperflow benchmark --hyperparameters hyperparameters.json ...

The JSON file holds the whole grid and the best settings. An interrupted search goes on where it was when the same
command is run again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import torch
from transformers import AutoModel

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.arguments import parse
from hf_hyperflow.benchmark.grid_search import TUNABLE, GridSettings, grid_search
from hf_hyperflow.benchmark.methods import Target
from hf_hyperflow.benchmark.methods.fine_tuning import GRID_STEPS
from hf_hyperflow.data.domains import load_domain


@dataclass
class Arguments:
    backbone: str = field(metadata={"help": "the target: Hub id or folder"})
    adapter: str = field(metadata={"help": "the HyperFlow adapter: Hub id or folder"})
    dataset: list[str] = field(metadata={"help": "training domains, none that is reported: Parquet files, ..."})
    output_file: str = field(metadata={"help": "JSON file to write"})
    methods: str = field(
        default=",".join(TUNABLE),
        metadata={"help": f"separated by commas, of {', '.join(TUNABLE)}; other methods in the file are kept"},
    )
    max_steps: int = field(
        default=GRID_STEPS[-1],
        metadata={"help": f"the grid ends there; where time is short, less than {GRID_STEPS[-1]}"},
    )
    n_way: int = field(default=5, metadata={"help": "classes of an episode"})
    n_shot: list[int] = field(default_factory=lambda: [5], metadata={"help": "support images of a class"})
    n_query: int = field(default=15, metadata={"help": "query images of a class"})
    n_episodes: int = field(default=20, metadata={"help": "episodes of each domain and number of shots"})
    views: int = field(default=1, metadata={"help": "views of a support image, as the benchmark has them"})
    query_views: int = field(default=1, metadata={"help": "the same of a query image"})
    bf16: bool = field(default=False, metadata={"help": "run the models under bfloat16 autocast"})
    seed: int = field(default=0, metadata={"help": "of the episodes"})


def main() -> None:
    arguments = parse(Arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = AutoModel.from_pretrained(arguments.backbone).float().eval().to(device)
    adapter = HyperFlowAdapter.from_pretrained(arguments.adapter).eval().to(device)
    target = Target(backbone, adapter)
    settings = GridSettings(
        n_episodes=arguments.n_episodes,
        n_shot=tuple(arguments.n_shot),
        n_way=arguments.n_way,
        n_query=arguments.n_query,
        seed=arguments.seed,
        views=arguments.views,
        query_views=arguments.query_views,
    )
    with torch.autocast(device, torch.bfloat16, enabled=arguments.bf16):
        hyperparameters = grid_search(
            arguments.output_file,
            target,
            [load_domain(source, target.processor) for source in arguments.dataset],
            settings,
            methods=arguments.methods.split(","),
            max_steps=arguments.max_steps,
        )
    print(json.dumps(hyperparameters, indent=1))


if __name__ == "__main__":
    main()
