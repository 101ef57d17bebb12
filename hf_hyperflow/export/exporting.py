"""Writes an adapter and its backbone as ONNX, and compares with PyTorch what is written."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..modeling.adapter import HyperFlowAdapter
from ..modeling.locks import get_lock
from ..modeling.peft_configs import get_kind
from ..modeling.saving import atomic_folder
from ..modeling.solvers import TABLEAUX
from ..modeling.trunks import IncompatibleBackboneError, eval_mode, find_trunk, get_name
from ..modeling.version import __version__
from . import hyperflow_onnx
from .graphs import AdaptGraph, PredictGraph, TracedBackbone
from .onnx_files import WeightsFile, convert
from .preprocessing import describe

#: The kinds of PEFT adapters that are exported.
KINDS = ("BEFT", "LORA", "LN_TUNING")

#: How much what ONNX Runtime computes may differ from what PyTorch does.
TOLERANCE = 1e-4

SETTINGS, WEIGHTS = "hyperflow.json", "weights.bin"

#: What uses an export: files of this folder that are written beside it.
USERS = ("hyperflow_onnx.py", "hyperflow_web.js", "index.html")


def export_onnx(
    adapter: HyperFlowAdapter,
    backbone: PreTrainedModel,
    folder: str | os.PathLike,
    *,
    n_steps: int | None = None,
    solver: str | None = None,
) -> None:
    """Write an adapter and its backbone as ONNX, for adapting and classifying without PyTorch.

    All files are written or none. `hyperflow_onnx.py` among them is a module and a program that uses the others; it
    needs numpy, Pillow and onnxruntime. `index.html` is a page that does so in a browser, by `hyperflow_web.js`, when
    any server of files serves the folder. What is written is run and compared before it is put in place.

        adapt.onnx    pixel_values (n, 3, h, w), one_hot (n, n_way) -> theta, prototypes, scale, rejection
        predict.onnx  pixel_values (n, 3, h, w), theta, prototypes, scale, rejection -> scores (n, n_way), known (n,)

    Both compute in float32 what `HyperFlowAdapter.adapt` and `AdaptedTask.scores` do. An adapter without calibrated
    rejection has neither `rejection` nor `known`. Support images are seen in as many views as the adapter's config
    says, others in one.

    Args:
        adapter: an adapter with an image processor that gives images of one size.
        backbone: the model that it was trained for. Both are left as they are.
        folder: where to write, made if need be.
        n_steps, solver: how the flow is integrated; None takes the config's.

    Raises:
        IncompatibleBackboneError: the backbone is not of the adapter's kind, or cannot be traced.
        ValueError: an adapter of this kind, its solver or its image processor cannot be exported.
        CheckpointError: the folder cannot be written.
    """
    n_steps = adapter.config.n_steps if n_steps is None else n_steps
    solver = solver or adapter.config.solver
    _require_exportable(adapter, n_steps, solver)
    assert adapter.processor is not None
    preprocessing = describe(adapter.processor)
    with get_lock(find_trunk(backbone)):
        backbone = copy.deepcopy(find_trunk(backbone))
    adapter = copy.deepcopy(adapter)
    models: tuple[nn.Module, ...] = (adapter, backbone)
    for model in models:
        model.to("cpu", torch.float32).eval().requires_grad_(False)
    with atomic_folder(folder) as draft:
        _write_graphs(draft, adapter, backbone, (preprocessing["height"], preprocessing["width"]), n_steps, solver)
        settings = {
            "preprocessing": preprocessing,
            "adapter": adapter.config.name_or_path and Path(adapter.config.name_or_path).name,
            "backbone": Path(get_name(backbone)).name,
            "n_steps": n_steps,
            "solver": solver,
            "export": _compute_digest(draft),
            "version": __version__,
        }
        (draft / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        for name in USERS:
            shutil.copyfile(Path(__file__).with_name(name), draft / name)
        _require_equal(draft, adapter, backbone, n_steps, solver)


def _require_exportable(adapter: HyperFlowAdapter, n_steps: int, solver: str) -> None:
    """Raise a ValueError if an adapter cannot be exported."""
    kind = get_kind(adapter.space.peft_config)
    if kind not in KINDS:
        raise ValueError(f"a {kind} adapter cannot be exported: only {', '.join(KINDS)} can.")
    if solver not in TABLEAUX:
        raise ValueError(
            f"the solver {solver!r} cannot be exported, because its steps depend on the images: use one of "
            f"{', '.join(TABLEAUX)} (solver=, --solver)."
        )
    if n_steps < 1:
        raise ValueError(f"n_steps must be at least 1, not {n_steps}.")
    if adapter.processor is None:
        raise ValueError("this adapter has no image processor, which says how images become pixel values: set one.")


def _write_graphs(
    folder: Path, adapter: HyperFlowAdapter, backbone: PreTrainedModel, size: tuple[int, int], n_steps: int, solver: str
) -> None:
    """Write `adapt.onnx`, `predict.onnx` and their weights."""
    split = adapter.split(backbone)
    injection = adapter.space.inject(backbone)
    traced = TracedBackbone(backbone, split.start, split.pooling, split.blocks, split.intermediate_weight)
    adapting = AdaptGraph(adapter, traced, injection, n_steps, solver).eval()
    labels = torch.tensor([0, 0, 0, 1, 2])
    one_hot = F.one_hot(labels).float()
    pixel_values = torch.randn(len(labels), 3, *size, generator=torch.Generator().manual_seed(0))
    n, n_way = torch.export.Dim("n", min=2), torch.export.Dim("n_way", min=2)
    names = ["theta", "prototypes", "scale", "rejection"]
    if adapter.rejection is None:
        names.remove("rejection")
    weights = WeightsFile(folder / WEIGHTS)
    with eval_mode(backbone), torch.no_grad():
        learned = dict(zip(names, adapting(pixel_values, one_hot), strict=True))
        support = {"pixel_values": pixel_values, "one_hot": one_hot}
        weights.save(convert(adapting, support, names, ({0: n}, {0: n, 1: n_way})), folder / "adapt.onnx")
        shapes = [{0: n_way} if name == "prototypes" else None for name in names]
        outputs = ["scores", "known"][: len(names) - 2]
        predicting = PredictGraph(adapter, traced).eval()
        images = {"pixel_values": pixel_values, **learned}
        weights.save(convert(predicting, images, outputs, ({0: n}, *shapes)), folder / "predict.onnx")


def _compute_digest(folder: Path) -> str:
    """SHA-256 of the graphs and their weights, by which a task knows its export."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _require_equal(
    folder: Path, adapter: HyperFlowAdapter, backbone: PreTrainedModel, n_steps: int, solver: str
) -> None:
    """Raise an error if an export computes something else than PyTorch, of a support set of noise.

    Raises:
        IncompatibleBackboneError: it does.
    """
    model = hyperflow_onnx.HyperFlow(folder)
    height, width = model.settings["preprocessing"]["height"], model.settings["preprocessing"]["width"]
    labels = np.array([0, 1, 1, 2, 3, 3, 0])  # of another number than those that were traced
    pixel_values = np.random.default_rng(0).standard_normal((len(labels), 3, height, width), dtype=np.float32)
    found = model.adapt_pixels(pixel_values, labels, list("abcd"))
    scores, _ = found.score_pixels(pixel_values[:1])
    support = torch.from_numpy(pixel_values), torch.from_numpy(labels)
    task = adapter.adapt(backbone, support, n_steps=n_steps, solver=solver)
    expected = task.logits(support[0][:1]).softmax(dim=-1)
    pairs = {"theta": (found.arrays["theta"], task.theta), "prototypes": (found.arrays["prototypes"], task.prototypes)}
    pairs["scores"] = scores, expected
    for name, (array, tensor) in pairs.items():
        difference = np.abs(array - tensor.numpy()).max()
        if not difference <= TOLERANCE * max(1.0, float(tensor.abs().max())):
            raise IncompatibleBackboneError(
                f"ONNX Runtime computes other {name} than PyTorch, by up to {difference:.2g}: this "
                f"{type(backbone).__name__} cannot be exported."
            )
