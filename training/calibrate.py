"""Calibrate an adapter: fit the scale of its cosine logits to 5-way 5-shot episodes of the given domains.

    python training/calibrate.py --backbone BACKBONE --adapter outputs/adapter --dataset FILE_OR_HUB_ID [...]

Use training or validation domains. Accuracies stay as they are. The adapter's folder is rewritten.
"""

from hf_hyperflow.training.calibration import main

if __name__ == "__main__":
    main()
