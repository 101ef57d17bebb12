"""What serves the cards of the released checkpoints: run from the root as `python -m training.card.NAME`."""
