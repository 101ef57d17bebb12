"""Train a HyperFlow adapter on image folders of your own, from Python.

    python -m training.demo.train_on_folders PHOTOS DRAWINGS --backbone facebook/dinov2-small --output_dir my-adapter

A folder is a domain: it has one folder of images per class. The adapter learns from the first folder, and the second
shows what it gains over direct transfer on images of another kind. `DriftTrainingConfig` lists all other settings.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_hyperflow.training import DriftTrainer, DriftTrainingConfig


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("train", help="image folder to train on: 3 classes of 9 images or more")
    parser.add_argument("validate", help="image folder to validate on: 2 classes of 20 images or more")
    parser.add_argument("--backbone", default="model_cards/vit-s14-focus-70", help="vision transformer: folder or id")
    parser.add_argument("--output_dir", default="outputs/my-adapter", help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=500, help="optimiser steps")
    arguments = parser.parse_args()

    domain = Path(arguments.validate).stem
    config = DriftTrainingConfig(
        backbone=arguments.backbone,
        dataset=[arguments.train, arguments.validate],
        holdout=[domain],
        output_dir=arguments.output_dir,
        steps=arguments.steps,
        lda_tasks=64,
        validation_episodes=30,
    )
    trainer = DriftTrainer(config)
    trainer.train()

    result = trainer.progress.history[-1][domain]
    print(f"{domain}: direct transfer {result['direct']:.1f} %, HyperFlow {result['hyperflow']:.1f} %.")
    print(f"Of the difference of {result['difference']:.1f} points, {result['flow']:.1f} are the flow's.")
    models = f"--adapter {arguments.output_dir} --backbone {arguments.backbone}"
    print(f"Next: hyperflow adapt {models} --support FOLDER --output_dir my-task")


if __name__ == "__main__":
    main()
