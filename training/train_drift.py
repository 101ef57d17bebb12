"""Train a HyperFlow adapter for a backbone on labelled image datasets.

    accelerate launch training/train_drift.py --config training/configs/hyperflow-vit-s14-70.yaml \
        --backbone FOLDER_OR_HUB_ID --dataset FILE_OR_HUB_ID [...] --output_dir adapter

The flow is trained by the episodic loss. With `--trajectories` of `collect_trajectories.py`, it is first matched to
what a teacher did (`--matching_steps`, `--annealing_steps`). With `--resume_from_checkpoint latest`, a killed run goes
on as if it had not been interrupted. From Python, use `hf_hyperflow.training.DriftTrainer`.
"""

from hf_hyperflow.training.trainer import main

if __name__ == "__main__":
    main()
