"""Adapters and their backbones as ONNX, for places without PyTorch."""
