"""Record how a teacher fine-tunes a backbone on many few-shot tasks: what the flow is matched to.

    accelerate launch training/collect_trajectories.py --config training/configs/trajectories-vit-s14-70.yaml \
        --backbone FOLDER_OR_HUB_ID --dataset FILE_OR_HUB_ID [...] --output_dir trajectories

Tasks come in groups of one shape (ways, shots) that are trained together and stored as one shard. Row i is a function
of (seed, i), and so is its group, which is always run whole: `--n_trajectories` is rounded up to whole groups. With n
processes, process p makes the groups p, p + n, p + 2n, ... Run again, the command makes what is missing or damaged,
and with more `--n_trajectories` it goes on. The folder opens with `datasets.load_dataset(folder)`.
"""

from hf_hyperflow.training.collector import main

if __name__ == "__main__":
    main()
