"""Calibrate an adapter: the scale of its cosine logits that suits 5-way 5-shot episodes of the given domains best.

    python training/calibrate.py --backbone BACKBONE --adapter outputs/adapter --dataset FILE_OR_HUB_ID [...]

Temperature scaling (Guo et al. 2017): one number is fitted to the query loss of the adapted model, accuracies stay as
they are. Use training or validation domains. The adapter's folder is rewritten.
"""

from hf_hyperflow.training.calibration import main

if __name__ == "__main__":
    main()
