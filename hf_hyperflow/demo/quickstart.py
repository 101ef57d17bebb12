"""`hyperflow quickstart`: ten handwritten digits from five examples each, HyperFlow beside two baselines."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import PIL.Image
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from transformers import AutoModel
from transformers.utils.logging import disable_progress_bar

from ..benchmark.cost import measure_cost, run_in_fresh_process
from ..benchmark.methods import BiasTuning, Classifier, DirectTransfer, HyperFlow, Method, Target
from ..data.domains import resize_images
from ..modeling.adapter import HyperFlowAdapter
from .digits import Digits, sample_digits
from .released import ADAPTER, BACKBONE, find_released
from .report import format_seconds

#: What a user without this package runs to use a saved task. The quickstart runs it to see that it agrees.
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
    prototypes, scale, metadata = file.get_tensor("prototypes"), file.get_tensor("scale"), file.metadata()
start, weight = int(metadata["start"]), float(metadata["intermediate_weight"])

def unit_features(pixel_values):
    output = model(pixel_values, output_hidden_states=True)
    features = normalize(output.last_hidden_state[:, 0], dim=-1)
    if weight:
        intermediate = normalize(output.hidden_states[start][:, 1:].mean(dim=1), dim=-1)
        features = normalize(torch.cat([features, weight * intermediate], dim=-1), dim=-1)
    return features

with torch.no_grad():
    features = torch.cat([unit_features(batch) for batch in torch.from_numpy(np.load(pixels)).split(64)])
logits = scale * features @ prototypes.T
assert "hf_hyperflow" not in sys.modules
print(json.dumps(logits.argmax(-1).tolist()))
"""

METHODS: tuple[Method, ...] = (DirectTransfer(), HyperFlow(), BiasTuning(steps=20))


@dataclass(frozen=True)
class Measurement:
    """What a method reached on the digits and what it took.

    Attributes:
        accuracy: on the queries, in %.
        seconds, peak_memory_mb: of all the work between holding the support images and being able to classify.
    """

    accuracy: float
    seconds: float
    peak_memory_mb: float


@dataclass(frozen=True)
class Figures:
    """What `hyperflow quickstart --json` prints.

    Attributes:
        methods: measurements by the name of the method.
        task: folder of the saved task.
        plain_peft_agreement: share of the predictions that are the same when `peft` alone loads the task.
        picture: the bar chart of the measurements.
    """

    n_way: int
    n_shot: int
    n_query: int
    methods: dict[str, Measurement]
    task: str
    plain_peft_agreement: float
    picture: str


def run(output: Path, *, as_json: bool = False) -> Figures:
    """Measure the methods on the digits, show the figures, save HyperFlow's task and reload it with `peft` alone.

    Args:
        output: folder for the picture and the saved task.
        as_json: print the figures as JSON and nothing else.
    """
    backbone, adapter = find_released(BACKBONE), find_released(ADAPTER)
    console = Console(quiet=as_json)
    console.print("Ten handwritten digits, five examples of each (scikit-learn), 500 other images to classify.\n")
    measurements = {}
    for method in METHODS:
        with console.status(f"{label(method)} ..."):
            measurements[method.name] = run_in_fresh_process(measure_method, method, backbone, adapter)
    with console.status("saving and reloading the task ..."):
        agreement = save_task(backbone, adapter, output / "task")
    figures = Figures(
        n_way=10,
        n_shot=5,
        n_query=500,
        methods=measurements,
        task=str(output / "task"),
        plain_peft_agreement=agreement,
        picture=str(_draw(measurements, output / "quickstart.png")),
    )
    if as_json:
        print(json.dumps(asdict(figures), indent=1))
    else:
        _print(figures, console)
    return figures


def label(method: Method) -> str:
    """The method in words, with the number of gradient steps if it takes any."""
    if isinstance(method, BiasTuning):
        return f"{method.label}, {method.steps} steps"
    return method.label


def measure_method(method: Method, backbone_folder: Path, adapter_folder: Path) -> Measurement:
    """Fit one method to the digits and classify the queries, in a process of its own."""
    target = _load_target(backbone_folder, adapter_folder)
    episode = sample_digits()
    queries = target.images(_to_pixels(episode.query, target))
    with torch.no_grad():
        target.backbone(queries.pixel_values[:2])  # the first call pays for the start of the libraries

    def fit() -> Classifier:
        return _fit(method, target, episode)

    classifier, cost = measure_cost(fit)
    seconds = cost.seconds
    if not isinstance(method, BiasTuning):  # a short fit still pays for that start: three more are timed
        repeated = [measure_cost(fit)[1].seconds for _ in range(3)]
        seconds = median(repeated)
    is_right = classifier.predict(queries).numpy() == episode.query_labels
    return Measurement(100 * float(is_right.mean()), seconds, cost.peak_memory_mb)


def _load_target(backbone_folder: Path, adapter_folder: Path) -> Target:
    disable_progress_bar()  # those of transformers; the console has its own
    backbone = AutoModel.from_pretrained(backbone_folder).float().eval()
    return Target(backbone, HyperFlowAdapter.from_pretrained(adapter_folder).eval())


def _fit(method: Method, target: Target, episode: Digits) -> Classifier:
    target.unload()  # or PEFT's adapter would be there already the second time
    pictures, labels = [], []
    for number, shots in enumerate(episode.support.values()):
        pictures += shots
        labels += [number] * len(shots)
    return method.fit(target.support(_to_pixels(pictures, target), torch.tensor(labels)))


def _to_pixels(pictures: list[PIL.Image.Image], target: Target) -> torch.Tensor:
    """Pictures as uint8 `(n, 3, height, width)`."""
    return resize_images([picture.convert("RGB") for picture in pictures], target.processor)


def save_task(backbone_folder: Path, adapter_folder: Path, folder: Path) -> float:
    """Adapt to the digits, save the task, and return the share of predictions on which `peft` alone agrees."""
    target = _load_target(backbone_folder, adapter_folder)
    episode = sample_digits()
    pixel_values = target.images(_to_pixels(episode.query, target)).pixel_values
    task = target.adapter.adapt(target.backbone, episode.support)
    predicted = torch.cat([task.logits(batch).argmax(-1) for batch in pixel_values.split(64)])
    task.save_pretrained(folder)
    with TemporaryDirectory() as scratch:
        pixels = Path(scratch, "pixels.npy")
        np.save(pixels, pixel_values.numpy())
        command = [sys.executable, "-c", PLAIN_PEFT, str(backbone_folder), str(folder), str(pixels)]
        completed = subprocess.run(command, capture_output=True, text=True, check=True)
    by_peft = np.array(json.loads(completed.stdout.splitlines()[-1]))
    return float((by_peft == predicted.numpy()).mean())


def _print(figures: Figures, console: Console) -> None:
    table = Table("method", "accuracy", "ready after", "peak memory")
    for method in METHODS:
        row = figures.methods[method.name]
        table.add_row(
            label(method), f"{row.accuracy:.1f} %", format_seconds(row.seconds), f"{row.peak_memory_mb:.0f} MB"
        )
    console.print(table)
    console.print(f"Saved the adapted task as a plain PEFT adapter: {figures.task}")
    console.print(f"Reloaded with peft alone: {100 * figures.plain_peft_agreement:.1f} % of the predictions agree.")
    console.print(f"Picture: {figures.picture}")


def _draw(measurements: dict[str, Measurement], path: Path) -> Path:
    """Draw accuracy, time and memory of the methods side by side."""
    names = [label(method).replace(", ", ",\n") for method in METHODS]
    rows = [measurements[method.name] for method in METHODS]
    panels: dict[str, list[float]] = {"accuracy, %": [], "ready after, s": [], "peak memory, MB": []}
    for row in rows:
        panels["accuracy, %"].append(row.accuracy)
        panels["ready after, s"].append(row.seconds)
        panels["peak memory, MB"].append(row.peak_memory_mb)
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        bars = axis.bar(names, values, color=["#9aa5b1", "#2f6fde", "#d98e32"])
        axis.bar_label(bars, fmt="%.3g")
        axis.set_title(title)
        axis.margins(y=0.15)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    return path
