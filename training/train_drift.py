"""Train a HyperFlow adapter for a backbone on labelled image datasets.

    accelerate launch training/train_drift.py --config training/configs/hyperflow-vit-s14-70.yaml \
        --backbone FOLDER_OR_HUB_ID --dataset FILE_OR_HUB_ID [...] --output_dir adapter

The flow is trained by the task objective and, with `--trajectories` of `collect_trajectories.py`, first by matching
what a teacher did (`--matching_steps`, `--annealing_steps`). Episodes and rows of a step are functions of (seed, step): a
killed run goes on with `--resume_from_checkpoint latest` as if it had not been interrupted, and any number of
processes and of accumulated parts share the work of each step.
"""

from hf_hyperflow.training.trainer import main

if __name__ == "__main__":
    main()
