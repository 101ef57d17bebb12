"""Writes graphs as ONNX files that share one file of weights."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from torch import nn

from ..modeling.locks import ignored_warnings
from ..modeling.trunks import IncompatibleBackboneError
from .linear_solve import TRANSLATIONS

#: The newest operators that are used. All versions of ONNX Runtime since 1.14 know them.
OPSET = 18

#: Tensors of fewer bytes stay in their graph.
MIN_SHARED = 1024

#: Where tensors begin in the file of weights: at multiples of this.
ALIGNMENT = 64


def convert(
    graph: nn.Module,
    inputs: dict[str, torch.Tensor],
    outputs: list[str],
    dynamic_shapes: tuple[dict[int, torch.export.Dim] | None, ...],
) -> ir.Model:
    """Convert a module to ONNX.

    Args:
        graph: in evaluation mode.
        inputs: example inputs by name, in the order of its arguments.
        outputs: names of what it returns.
        dynamic_shapes: for each input, the dimensions that can have any size.

    Raises:
        IncompatibleBackboneError: it cannot be converted.
    """
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(graph, tuple(inputs.values()), dynamic_shapes=dynamic_shapes, strict=False)
            program.graph_module.graph.eliminate_dead_code()  # what is traced behind the place of a cut
            # What optimising would save, ONNX Runtime saves when it loads the graph, in a hundredth of the time.
            converted = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=outputs,
                custom_translation_table=TRANSLATIONS,
                optimize=False,
                verbose=False,
            )
    except Exception as error:  # tracers raise whatever they stumble over
        reason = str(error).strip().splitlines()
        raise IncompatibleBackboneError(
            f"this backbone cannot be exported: PyTorch cannot trace its forward pass for any number of images, or has "
            f"no ONNX for a part of it ({reason[-1] if reason else type(error).__name__})."
        ) from error
    assert converted is not None
    model = converted.model
    RemoveUnusedNodesPass()(model)
    ClearMetadataAndDocStringPass()(model)  # stack traces, with the paths of this machine
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Within, PyTorch does not tell which of its parts are outdated, nor that torchvision is not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with ignored_warnings((".*is deprecated", FutureWarning)):
            yield
    finally:
        logger.setLevel(level)


class WeightsFile:
    """A file of weights that several graphs read. A tensor that several of them have is in it once.

    Args:
        path: of the file, which is made.
    """

    def __init__(self, path: Path):
        self.path = path
        self._places: dict[str, int] = {}
        path.touch()

    def save(self, model: ir.Model, path: Path) -> None:
        """Write a graph beside the file, and its weights into it."""
        with open(self.path, "ab") as file:
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is not None and tensor.nbytes >= MIN_SHARED:
                    content = tensor.tobytes()
                    offset = self._places.setdefault(hashlib.sha256(content).hexdigest(), file.tell())
                    if offset == file.tell():
                        file.write(content + b"\0" * (-len(content) % ALIGNMENT))
                    value.const_value = ir.ExternalTensor(
                        self.path.name,
                        offset,
                        len(content),
                        tensor.dtype,
                        shape=ir.Shape(tensor.shape.numpy()),
                        name=tensor.name or value.name or "",
                        base_dir=self.path.parent,
                    )
        ir.save(model, path)
