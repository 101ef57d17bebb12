"""The research behind the cards of the released checkpoints: `python -m training.card.NAME` from the root."""
