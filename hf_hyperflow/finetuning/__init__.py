"""Fine-tuning by gradient descent: the baseline, and the teacher whose trajectories the flow learns from."""
