"""The demo page, the quickstart, and where the released checkpoints lie."""
