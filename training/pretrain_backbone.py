"""Re-train the last blocks of a vision backbone as a cosine classifier, so that prototypes separate new classes.

    accelerate launch training/pretrain_backbone.py --config training/configs/vit-s14-focus-70.yaml \
        --dataset FILE_OR_HUB_ID [...] --output_dir backbone

Every `--holdout_every`-th class is held out: 5-way episodes of these classes measure the backbone before and after. A
killed run goes on with `--resume_from_checkpoint latest` as if it had not been interrupted.
"""

from hf_hyperflow.training.pretraining import main

if __name__ == "__main__":
    main()
