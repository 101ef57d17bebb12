"""What the cards of the released checkpoints rest on: run from the repository root as `python -m training.card.NAME`."""
