"""The README.md of a saved adapter or task: what it is, how to use it, and metadata for the Hub."""

from __future__ import annotations

import json
import os
from pathlib import Path

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .configuration import HyperFlowConfig
from .parameter_space import ParameterSpace

CARD = "README.md"
#: A card with this line is ours to write anew; one without it belongs to whoever wrote it and is kept.
MARK = "<!-- Written by hf_hyperflow at every save and push; remove this line to keep what you write here. -->"
PAPER = "[HyperFlow](https://arxiv.org/abs/2504.15323) (Kim, Kim & Hong, 2025)"

ADAPTER = """\
# HyperFlow adapter for {backbone}

Adapts {backbone} to new image classes from a handful of labelled images, with forward passes of a small network
instead of gradient descent. Method: {paper}.

```python
from transformers import AutoModel
from hf_hyperflow import HyperFlowAdapter

backbone = AutoModel.from_pretrained("{load_backbone}")
adapter = HyperFlowAdapter.from_pretrained("<this repository or folder>")
task = adapter.adapt(backbone, {{"cat": [image, ...], "dog": [image, ...]}})
task(images)  # labels with scores
task.save_pretrained("my-task")  # a plain PEFT adapter
task.reset()  # the backbone is what it was
```

| | |
|---|---|
| Backbone | {backbone}, {num_blocks} blocks of width {hidden_size} |
| What it generates | a PEFT {peft_type} adapter for the last {last_blocks} blocks |
| Its size | {n_parameters:,} parameters in {n_tokens} tokens |
| Support encoder | {encoder} |
| Drift network | width {drift_width}, depth {drift_depth}, {drift_heads} heads |
| Solver | {solver}, {n_steps} steps |
| Images are compared | {compared} |
| Feature of an image | {feature} |
| Weights | safetensors, SHA-256 in `config.json` |
"""

TASK = """\
# Classifier of {n_way} kinds of images on {backbone}

A PEFT {peft_type} adapter ({n_parameters:,} parameters) and one prototype per class, generated from a support set by
{paper} without gradients.

Classes: {labels}

```python
from transformers import AutoModel
from hf_hyperflow import AdaptedTask

backbone = AutoModel.from_pretrained("{load_backbone}")
task = AdaptedTask.from_pretrained("<this repository or folder>", backbone)
task(images)  # labels with scores
```

Without `hf_hyperflow` it is an adapter like others (BEFT needs PEFT 0.20 or newer):

```python
from peft import PeftModel

model = PeftModel.from_pretrained(backbone, "<this repository or folder>")
```

The feature of an image is {feature}; its score for a class is the softmax over
`scale` x the product of the feature, divided by its length, and the prototype, with `scale` and `prototypes` (rows in
the order of the classes, not to be normalised) in `prototypes.safetensors`. `checksums.json` holds the SHA-256 of both
weight files.
"""


def adapter_card(config: HyperFlowConfig, space: ParameterSpace, training: dict | None = None) -> str:
    """The card of an adapter; `training` is what `training/train_drift.py` noted of its run, told in sections."""
    backbone = config.backbone
    text = ADAPTER.format(
        **_names(backbone["name_or_path"], backbone["model_type"]),
        **{key: backbone[key] for key in ("num_blocks", "hidden_size")},
        **{key: vars(config)[key] for key in ("last_blocks", "drift_width", "drift_depth", "drift_heads")},
        **{key: vars(config)[key] for key in ("solver", "n_steps")},
        peft_type=space.peft_config.peft_type.value,
        n_parameters=space.n_parameters,
        n_tokens=space.n_tokens,
        encoder=f"a {config.encoder['model_type']} of its own" if config.encoder else "the backbone's first blocks",
        compared="in a metric measured on the training domains" if config.lda else "by cosines to class means",
        feature=describe_feature(
            config.pooling, backbone["num_blocks"] - config.last_blocks, config.intermediate_weight
        ),
        paper=PAPER,
    )
    datasets: list[str] = []
    if training is not None and "phases" in training:
        text += training_sections(training)
        datasets = [name for name in training["arguments"]["dataset"] if _is_hub_id(name)]
    return _card(text, backbone["name_or_path"], "adapter", datasets)


def training_sections(training: dict) -> str:
    """Data, validation, settings and offline cost of a run, from its `training.json`."""
    arguments, hardware = training["arguments"], training["hardware"]
    lines = ["", "## How it was trained", "", f"On the domains {_listed(arguments['dataset'])}."]
    if arguments["holdout"]:
        lines.append(f"Kept for validation (`name:k`: every k-th class of it): {_listed(arguments['holdout'])}.")
    lines += _validation_table(training["history"])
    lines += ["", "| offline cost | runs | trajectories | episodes | time | FLOPs |", "|---|---|---|---|---|---|"]
    collections = (training["trajectories"] or {}).get("collections", [])
    for collection in collections:
        totals = collection["totals"]
        used = totals["rows"] - totals["diverged"]
        lines.append(
            f"| collecting `{collection['name']}` ({collection['hardware']['device']}) | | {used:,} | | "
            f"{_duration(totals['seconds'])} | {totals['flops']:.3g} |"
        )
    for name, phase in training["phases"].items():
        lines.append(
            f"| {name} | {phase['runs']:,} | {phase.get('rows', 0):,} | {phase.get('episodes', 0):,} | "
            f"{_duration(phase['seconds'])} | {phase['flops']:.3g} |"
        )
    stored = sum(collection["totals"]["bytes"] for collection in collections)
    storage = f"The trajectories take {stored / 1e6:,.1f} MB. " if collections else ""
    lines += [
        "",
        f"{storage}Trained on {hardware['device']}, {hardware['processes']} process(es), {hardware['mixed_precision']} "
        "mixed precision. Time is wall-clock, without reading the datasets; FLOPs are of matrix products, convolutions "
        "and attention; those of training steps are counted in every fiftieth and extrapolated.",
        "",
        "<details><summary>All settings</summary>",
        "",
        "| argument | value |",
        "|---|---|",
        *(f"| `{key}` | {_listed(value)} |" for key, value in arguments.items()),
        "",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in training["versions"].items()) + ".",
        "",
        "</details>",
        "",
    ]
    return "\n".join(lines)


def _validation_table(history: list[dict]) -> list[str]:
    """The last validation of every domain, if there was one."""
    last = history[-1] if history else {}
    domains = {name: found for name, found in last.items() if isinstance(found, dict)}
    if not domains:
        return []
    lines = ["", f"Validation after {last['step']:,} steps: 5-way 5-shot accuracy in %, differences paired by episode."]
    lines += [
        "",
        "| domain | direct transfer | HyperFlow | difference, points | of it the flow |",
        "|---|---|---|---|---|",
    ]
    for name, found in domains.items():
        direct, adapted = (f"{found[key]:.1f} ± {found[f'{key}_ci95']:.1f}" for key in ("direct", "hyperflow"))
        gain = f"{found['difference']:+.2f} ± {found['difference_ci95']:.2f}"
        flow = f"{found['flow']:+.2f} ± {found['flow_ci95']:.2f}" if "flow" in found else "not recorded"
        lines.append(f"| {name} | {direct} | {adapted} | {gain} | {flow} |")
    return lines


def _listed(value: object) -> str:
    return ", ".join(f"`{item}`" for item in (value if isinstance(value, list) else [value]))


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def describe_feature(pooling: str, start: int, middle: float) -> str:
    """What the feature of an image is, in the words of transformers; see `SplitBackbone`."""
    text = f"{'the first token' if pooling == 'cls' else 'the mean over all tokens'} of the last hidden state"
    if middle:
        tokens = "all tokens but the first" if pooling == "cls" else "all tokens"
        text += f", followed by the mean over {tokens} of `hidden_states[{start}]`, brought to {middle:g} of its length"
    return text


def task_card(name_or_path: str, model_type: str, space: ParameterSpace, class_names: list[str], feature: str) -> str:
    """The card of an adapted task, from the name and type of its backbone, its space, its labels and
    `describe_feature`.
    """
    labels = ", ".join(json.dumps(name, ensure_ascii=False) for name in class_names[:50])
    if len(class_names) > 50:
        labels += f" and {len(class_names) - 50} more"
    text = TASK.format(
        **_names(name_or_path, model_type),
        peft_type=space.peft_config.peft_type.value,
        n_parameters=space.n_parameters,
        n_way=len(class_names),
        labels=labels,
        feature=feature,
        paper=PAPER,
    )
    return _card(text, name_or_path, "peft")


def write_card(card: str, draft: Path, target: str | os.PathLike) -> None:
    """Put the card into `draft`, unless `target`, where the draft will go, has one that somebody wrote."""
    if Path(target, CARD).is_file() and not is_generated(Path(target, CARD)):
        (draft / CARD).unlink(missing_ok=True)  # PEFT writes one, too
    else:
        (draft / CARD).write_text(card, encoding="utf-8")


def is_generated(path: str | os.PathLike) -> bool:
    """Whether a README.md was written here and may be written anew."""
    return MARK in Path(path).read_text(encoding="utf-8", errors="replace")


def _names(name_or_path: str, model_type: str) -> dict[str, str]:
    on_hub = _is_hub_id(name_or_path)
    return {
        "backbone": f"`{name_or_path}`" if on_hub else f"a {model_type} model",
        "load_backbone": name_or_path if on_hub else "<the backbone>",
    }


def _is_hub_id(name_or_path: str) -> bool:
    try:
        validate_repo_id(name_or_path)
    except HFValidationError:
        return False
    return "/" in name_or_path and not os.path.isdir(name_or_path)


def _card(text: str, name_or_path: str, tag: str, datasets: list[str] | None = None) -> str:
    data = ModelCardData(
        library_name="hf_hyperflow",
        datasets=datasets or None,
        base_model=name_or_path if _is_hub_id(name_or_path) else None,
        pipeline_tag="image-classification",
        tags=["hyperflow", "few-shot-learning", tag],
    )
    return f"---\n{data.to_yaml()}\n---\n\n{MARK}\n\n{text}"
