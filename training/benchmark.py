"""Accuracy and cost of HyperFlow, of direct transfer and of fine-tuning on the same few-shot episodes.

    accelerate launch training/benchmark.py --backbone model_cards/vit-s14-focus-70 \
        --adapter model_cards/hyperflow-vit-s14-70 --dataset FILE_OR_HUB_ID [...] --n_shot 1 5 20 --n_episodes 600 \
        --output_dir results

The same as `hyperflow benchmark`, with `--config preset.yaml` as the other scripts; several processes share the
episodes (on CPUs: `torchrun --standalone --nproc_per_node 2 training/benchmark.py --cpu ...`) and end with the
results of one.
"""

from __future__ import annotations

from arguments import parse

from hf_hyperflow.benchmark import BenchmarkArguments, run
from hf_hyperflow.saving import CheckpointError

if __name__ == "__main__":
    try:
        run(parse(BenchmarkArguments))
    except (CheckpointError, ImportError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
