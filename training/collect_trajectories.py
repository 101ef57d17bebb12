"""Record how a teacher fine-tunes a backbone on many few-shot tasks: the trajectories that the flow can be matched to.

    accelerate launch training/collect_trajectories.py --config training/configs/trajectories-vit-s14-70.yaml \
        --backbone FOLDER_OR_HUB_ID --dataset FILE_OR_HUB_ID [...] --output_dir trajectories

Run again, the same command makes what is missing or damaged; with a larger `--n_trajectories` it makes more. The folder
opens with `datasets.load_dataset(folder)`.
"""

from hf_hyperflow.training.collector import main

if __name__ == "__main__":
    main()
