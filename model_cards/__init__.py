"""The package `hf_hyperflow_weights`: folders of the released checkpoints of hf_hyperflow, and no code."""
