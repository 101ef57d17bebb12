"""The main job on data that every install has: ten handwritten digits from five examples each."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from transformers import AutoModel

from ..benchmark.cost import Cost, measure_cost, run_in_fresh_process
from ..data.domains import normalise, resize_images
from ..finetuning.finetune import FineTuningConfig, fine_tune
from ..modeling.adapter import HyperFlowAdapter
from ..modeling.backbones import SplitBackbone, eval_mode
from ..modeling.prototypes import PrototypeClassifier, unit_means
from .released import ADAPTER, BACKBONE, released

#: What a user without this package runs to use a saved task; `run` runs it to see that it agrees.
PLAIN_PEFT = """
import json, sys
import numpy as np, torch
from peft import PeftModel
from safetensors import safe_open
from torch.nn.functional import normalize
from transformers import AutoModel

backbone, task, pixels = sys.argv[1:4]
model = PeftModel.from_pretrained(AutoModel.from_pretrained(backbone), task).eval()
with safe_open(f"{task}/prototypes.safetensors", "pt") as file:
    prototypes, scale, about = file.get_tensor("prototypes"), file.get_tensor("scale"), file.metadata()
start, middle = int(about["start"]), float(about["middle"])

def unit_features(x):
    output = model(x, output_hidden_states=True)
    halves = [normalize(output.last_hidden_state[:, 0], dim=-1)]
    if middle:
        halves.append(middle * normalize(output.hidden_states[start][:, 1:].mean(dim=1), dim=-1))
    return normalize(torch.cat(halves, dim=-1), dim=-1)

with torch.no_grad():
    features = torch.cat([unit_features(x) for x in torch.from_numpy(np.load(pixels)).split(64)])
logits = scale * features @ prototypes.T
assert "hf_hyperflow" not in sys.modules
print(json.dumps(logits.argmax(-1).tolist()))
"""

METHODS = {
    "direct": "direct transfer",
    "hyperflow": "HyperFlow",
    "bias": "bias fine-tuning, 20 steps",
}


@dataclass(frozen=True)
class Digits:
    """An episode of scikit-learn's digits (Alpaydin & Kaynak 1998): PIL images of the support and the query set."""

    support: dict[str, list[PIL.Image.Image]]
    query: list[PIL.Image.Image]
    query_labels: np.ndarray


def digits_episode(n_shot: int = 5, n_query: int = 50, seed: int = 0) -> Digits:
    """Ten ways, `n_shot` support and `n_query` query images of each digit; 8x8 pixels, white on black."""
    data = load_digits()
    pictures = [PIL.Image.fromarray((image * (255 / 16)).astype(np.uint8)) for image in data.images]
    generator = np.random.default_rng(seed)
    rows = [generator.permutation(np.flatnonzero(data.target == digit)) for digit in range(10)]
    return Digits(
        support={str(digit): [pictures[i] for i in rows[digit][:n_shot]] for digit in range(10)},
        query=[pictures[i] for digit in range(10) for i in rows[digit][n_shot : n_shot + n_query]],
        query_labels=np.repeat(np.arange(10), n_query),
    )


def measure_method(method: str, backbone_folder: str, adapter_folder: str, task_folder: str | None) -> dict:
    """One method on the digits, in a process of its own: accuracy on the queries and the cost of getting ready.

    Getting ready is all between holding the support images and being able to classify: adapting (if the method does)
    and computing the prototypes.
    """
    backbone = AutoModel.from_pretrained(backbone_folder).float().eval()
    adapter = HyperFlowAdapter.from_pretrained(adapter_folder).eval()
    episode = digits_episode()
    pixels = adapter.processor(episode.query, return_tensors="pt")["pixel_values"]
    prepare = {"direct": _prepare_direct, "hyperflow": _prepare_hyperflow, "bias": _prepare_bias}[method]
    with torch.no_grad():
        backbone(pixels[:2])
    (predict, task), cost = measure_cost(lambda: prepare(backbone, adapter, episode.support))
    if method != "bias":  # the first call pays for the start of the libraries: report the median of three more
        again = [measure_cost(lambda: prepare(backbone, adapter, episode.support)) for _ in range(3)]
        predict, task = again[-1][0]
        cost = Cost(sorted(warm.seconds for _, warm in again)[1], cost.peak_memory_mb)
    predicted = torch.cat([predict(chunk) for chunk in pixels.split(64)]).numpy()
    if task is not None and task_folder is not None:
        task.save_pretrained(task_folder)
        np.save(Path(task_folder) / "query_pixels.npy", pixels.numpy())
    hits = predicted == episode.query_labels
    return asdict(cost) | {"accuracy": 100 * float(hits.mean()), "predicted": predicted.tolist()}


def _prepare_hyperflow(backbone: torch.nn.Module, adapter: HyperFlowAdapter, support: dict) -> tuple:
    task = adapter.adapt(backbone, support)
    _ = task.prototypes
    return (lambda pixels: task.logits(pixels).argmax(-1)), task


def _prepare_direct(backbone: torch.nn.Module, adapter: HyperFlowAdapter, support: dict) -> tuple:
    split = SplitBackbone(backbone, 0, adapter.config.pooling)
    images, labels = _images(adapter, support)
    with torch.no_grad():
        prototypes = unit_means(split.forward_features(normalise(images, adapter.processor)), labels)

    @torch.no_grad()
    def predict(pixels: torch.Tensor) -> torch.Tensor:
        return PrototypeClassifier(prototypes)(split.forward_features(pixels)).argmax(-1)

    return predict, None


def _prepare_bias(backbone: torch.nn.Module, adapter: HyperFlowAdapter, support: dict) -> tuple:
    split = SplitBackbone(backbone, adapter.split(backbone).start, adapter.config.pooling)
    injection = adapter.space.inject(backbone)
    images, labels = _images(adapter, support)
    with eval_mode(backbone):
        recipe = FineTuningConfig(steps=20, batch_size=len(images))
        fine_tune(split, injection.parameters, images, labels, adapter.processor, recipe)
    return _prepare_direct(backbone, adapter, support)


def _images(adapter: HyperFlowAdapter, support: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Support images as uint8 `(n, 3, height, width)` and their labels."""
    pictures = [image.convert("RGB") for images in support.values() for image in images]
    labels = torch.arange(len(support)).repeat_interleave(len(pictures) // len(support))
    return resize_images(pictures, adapter.processor), labels


def run(json_output: bool = False, output: Path | None = None) -> dict:
    """Adapt the released backbone to the digits three ways, show the figures, save the task, reload it with `peft`.

    Args:
        json_output: print the figures as JSON and nothing else.
        output: folder for the picture and the saved task; `outputs/quickstart` by default.

    Returns:
        The figures.
    """
    output = Path(output or "outputs/quickstart")
    backbone, adapter, task_folder = released(BACKBONE), released(ADAPTER), output / "task"
    console = Console(quiet=json_output)
    console.print("Ten handwritten digits, five examples of each (scikit-learn), 500 other images to classify.\n")
    figures: dict = {"n_way": 10, "n_shot": 5, "n_query": 500, "methods": {}}
    for method, title in METHODS.items():
        with console.status(f"{title} ..."):
            found = run_in_fresh_process(
                measure_method, method, str(backbone), str(adapter), str(task_folder) if method == "hyperflow" else None
            )
        predicted = found.pop("predicted")
        figures["methods"][method] = found
        if method == "hyperflow":
            agreement = _plain_peft_agreement(backbone, task_folder, predicted)
            figures |= {"task": str(task_folder), "plain_peft_agreement": agreement}
    figures["picture"] = str(_draw(figures["methods"], output / "quickstart.png"))
    if json_output:
        print(json.dumps(figures, indent=1))
        return figures
    table = Table("method", *("accuracy", "ready after", "peak memory"))
    for method, title in METHODS.items():
        row = figures["methods"][method]
        table.add_row(title, f"{row['accuracy']:.1f} %", _time(row["seconds"]), f"{row['peak_memory_mb']:.0f} MB")
    console.print(table)
    console.print(f"Saved the adapted task as a plain PEFT adapter: {figures['task']}")
    console.print(f"Reloaded with peft alone: {100 * figures['plain_peft_agreement']:.1f} % of the predictions agree.")
    console.print(f"Picture: {figures['picture']}")
    return figures


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _plain_peft_agreement(backbone: Path, task: Path, predicted: list[int]) -> float:
    """Share of predictions that are the same when `peft` loads the task in a process without this package."""
    pixels = task / "query_pixels.npy"
    command = [sys.executable, "-c", PLAIN_PEFT, str(backbone), str(task), str(pixels)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    pixels.unlink()
    return float(np.mean(np.array(json.loads(found.stdout.splitlines()[-1])) == np.array(predicted)))


def _draw(methods: dict, path: Path) -> Path:
    """Accuracy, time and memory of the methods side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [METHODS[m].replace(", ", "\n") for m in methods]
    panels = {"accuracy": "accuracy, %", "seconds": "ready after, s", "peak_memory_mb": "peak memory, MB"}
    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        values = [row[key] for row in methods.values()]
        bars = axis.bar(names, values, color=["#9aa5b1", "#2f6fde", "#d98e32"])
        axis.bar_label(bars, fmt="%.3g")
        axis.set_title(title)
        axis.margins(y=0.15)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
    return path
