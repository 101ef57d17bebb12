"""The README.md of a saved adapter or task: what it is, how to use it, and metadata for the Hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .configuration import HyperFlowConfig
from .parameter_space import ParameterSpace
from .peft_configs import get_kind
from .training_section import write_training_section

CARD = "README.md"
#: A card with this line was generated and may be replaced. A card without it belongs to whoever wrote it and is kept.
MARK = "<!-- Written by hf_hyperflow at every save and push; remove this line to keep what you write here. -->"
PAPER = "[HyperFlow](https://arxiv.org/abs/2504.15323) (Kim, Kim & Hong, 2025)"

ADAPTER = """\
# HyperFlow adapter for {backbone}

Adapts {backbone} to new image classes from a handful of labelled images. It runs a small network forward instead of
descending a gradient. Method: {paper}.

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
{ask_for_backbone}
Without `hf_hyperflow`, `AutoModel.from_pretrained("<this repository or folder>", trust_remote_code=True)` loads the
adapter with the code beside it. That needs torch, transformers, peft and Pillow. Support sets that are `datasets` also
need the package `datasets`.

| | |
|---|---|
| Backbone | {backbone}, {num_blocks} blocks of width {hidden_size} |
| Generated adapter | a PEFT {peft_type} adapter for the last {last_blocks} blocks |
| Its size | {n_parameters:,} parameters in {n_tokens} tokens |
| Support encoder | {encoder} |
| Drift network | width {drift_width}, depth {drift_depth}, {drift_heads} heads |
| Start of the flow | {start} |
| Solver | {solver}, {n_steps} steps |
| Head | {head} |
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
{ask_for_backbone}
Without `hf_hyperflow` it is a PEFT adapter like any other (BEFT needs PEFT 0.20 or newer){trunk}:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(backbone, "<this repository or folder>")
```

The feature of an image is {feature}. Divide it by its length, multiply it with the prototype of each class and with
`scale`: the softmax of these products are the scores. `prototypes.safetensors` holds `scale` and `prototypes`, whose
rows are in the order of the classes and are used as they are. `checksums.json` holds the SHA-256 of both weight files.
"""


def adapter_card(config: HyperFlowConfig, space: ParameterSpace, training: dict[str, Any] | None = None) -> str:
    """The card of an adapter.

    Args:
        config, space: of the adapter.
        training: the record of its training, see `write_training_section`; None if it is not known.
    """
    backbone = config.backbone
    name = backbone["name_or_path"]
    n_frozen = backbone["num_blocks"] - config.last_blocks
    encoder = f"a {config.encoder['model_type']} of its own" if config.encoder else "the backbone's first blocks"
    head = "plain cosines to class means"
    if config.lda:
        head = "regularised LDA, with a covariance from the training domains"
    start = "learned weights, the same for every task" if config.learned_start else "the backbone's own weights"
    text = ADAPTER.format(
        backbone=_describe_backbone(name, backbone["model_type"]),
        load_backbone=_get_loadable_name(name),
        ask_for_backbone=_ask_for_backbone(name),
        num_blocks=backbone["num_blocks"],
        hidden_size=backbone["hidden_size"],
        last_blocks=config.last_blocks,
        peft_type=get_kind(space.peft_config),
        n_parameters=space.n_parameters,
        n_tokens=space.n_tokens,
        encoder=encoder,
        drift_width=config.drift_width,
        drift_depth=config.drift_depth,
        drift_heads=config.drift_heads,
        start=start,
        solver=config.solver,
        n_steps=config.n_steps,
        head=head,
        feature=describe_feature(config.pooling, n_frozen, config.intermediate_weight),
        paper=PAPER,
    )
    datasets = []
    if training is not None and "phases" in training:
        text += write_training_section(training)
        datasets = [dataset for dataset in training["arguments"]["dataset"] if is_hub_id(dataset)]
    return _add_metadata(text, name, "adapter", datasets)


def task_card(name_or_path: str, model_type: str, space: ParameterSpace, class_names: list[str], feature: str) -> str:
    """The card of an adapted task.

    Args:
        name_or_path, model_type: of its backbone.
        space: the parameter space of its adapter.
        class_names: its labels. The first 50 are listed.
        feature: what `describe_feature` says.
    """
    labels = ", ".join(json.dumps(name, ensure_ascii=False) for name in class_names[:50])
    if len(class_names) > 50:
        labels += f" and {len(class_names) - 50} more"
    text = TASK.format(
        backbone=_describe_backbone(name_or_path, model_type),
        load_backbone=_get_loadable_name(name_or_path),
        ask_for_backbone=_ask_for_backbone(name_or_path),
        peft_type=get_kind(space.peft_config),
        n_parameters=space.n_parameters,
        n_way=len(class_names),
        labels=labels,
        feature=feature,
        paper=PAPER,
        # AutoModel loads CLIP with its text model around the vision model that carries the adapter.
        trunk=". Where `backbone` has a `vision_model`, give PEFT that" if "vision" in model_type else "",
    )
    return _add_metadata(text, name_or_path, "peft", [])


def describe_feature(pooling: str, start: int, intermediate_weight: float) -> str:
    """What the feature of an image is, in the words of transformers; see `SplitBackbone`."""
    final, tokens = "the mean over all tokens of the last hidden state", "all tokens"
    if pooling == "cls":
        final, tokens = "the CLS token of the last hidden state", "all tokens but the first"
    elif pooling == "pooler":
        final = "the `pooler_output`"
    if not intermediate_weight:
        return final
    return (
        f"{final}, followed by the mean over {tokens} of `hidden_states[{start}]`, brought to {intermediate_weight:g} "
        "of its length"
    )


def write_card(card: str, draft: Path, target: str | os.PathLike) -> None:
    """Put the card into the folder `draft`, unless the folder `target`, where it goes, has one that somebody wrote."""
    existing = Path(target, CARD)
    if existing.is_file() and not is_generated(existing):
        (draft / CARD).unlink(missing_ok=True)  # PEFT writes a card of its own
    else:
        (draft / CARD).write_text(card, encoding="utf-8")


def is_generated(path: str | os.PathLike) -> bool:
    """Whether a README.md was written by this package and may be replaced."""
    return MARK in Path(path).read_text(encoding="utf-8", errors="replace")


def _describe_backbone(name_or_path: str, model_type: str) -> str:
    """A backbone's Hub id, or its kind: paths say something about somebody's machine."""
    return f"`{name_or_path}`" if is_hub_id(name_or_path) else f"a {model_type} model"


def _ask_for_backbone(name_or_path: str) -> str:
    """What a card says where the backbone cannot be loaded by its name."""
    if is_hub_id(name_or_path):
        return ""
    return "\nThe backbone has no name on the Hub: name it yourself (`--backbone` on the command line).\n"


def _get_loadable_name(name_or_path: str) -> str:
    return name_or_path if is_hub_id(name_or_path) else "<the backbone>"


def is_hub_id(name_or_path: str) -> bool:
    """Whether a model's name is that of a repository, "owner/name", and not that of a folder here."""
    try:
        validate_repo_id(name_or_path)
    except HFValidationError:
        return False
    return "/" in name_or_path and not os.path.isdir(name_or_path)


def _add_metadata(text: str, backbone: str, tag: str, datasets: list[str]) -> str:
    """The card with the Hub's metadata and the mark of a generated card in front."""
    metadata = ModelCardData(
        library_name="hf_hyperflow",
        datasets=datasets or None,
        base_model=backbone if is_hub_id(backbone) else None,  # the Hub refuses anything else
        pipeline_tag="image-classification",
        tags=["hyperflow", "few-shot-learning", tag],
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n{MARK}\n\n{text}"
