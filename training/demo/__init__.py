"""The whole training in a few minutes, on images that are drawn: `python -m training.demo.run`."""
