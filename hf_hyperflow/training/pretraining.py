"""Re-train the last blocks of a vision backbone as a cosine classifier, so that prototypes separate new classes.

    accelerate launch training/pretrain_backbone.py --config training/configs/vit-s14-focus-70.yaml \
        --dataset FILE_OR_HUB_ID [...] --output_dir backbone

Classes whose label is a multiple of `--holdout_every` are not trained on: 5-way episodes of them measure the
backbone before and after. A killed run goes on from its last checkpoint with `--resume_from_checkpoint latest`, image
for image as if it had not been interrupted.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModel, get_scheduler
from transformers.image_processing_utils import BaseImageProcessor

from ..arguments import describe_arguments, parse
from ..data.augmentation import random_views
from ..data.domains import Domain, join_domains, load_domain, normalise
from ..data.episodes import cdfsl_episode
from ..modeling.backbones import SplitBackbone, find_blocks
from ..modeling.prototypes import PrototypeClassifier
from ..modeling.saving import CheckpointError, exclusive, write_json
from .checkpoints import load_checkpoint, save_checkpoint
from .cost_log import OfflineCost, hardware, versions
from .precision import HELP, MixedPrecision, resolve_precision


@dataclass
class Arguments:
    dataset: list[str] = field(
        metadata={"help": "labelled image datasets (Parquet files, image folders, Hub ids) of the same classes"}
    )
    output_dir: str = field(metadata={"help": "folder for checkpoints and the final model"})
    backbone: str = field(
        default="facebook/dinov2-small", metadata={"help": "a transformers vision model: Hub id or folder"}
    )
    from_scratch: bool = field(default=False, metadata={"help": "keep the architecture, forget the weights"})
    trained_blocks: int = field(default=6, metadata={"help": "the last so many blocks are trained, the rest is frozen"})
    holdout_every: int = field(default=4, metadata={"help": "every n-th class is kept apart; 0: none"})
    steps: int = field(default=1500, metadata={"help": "optimiser steps"})
    batch_size: int = field(default=128, metadata={"help": "images a step, over all processes"})
    learning_rate: float = field(default=2e-4, metadata={"help": "peak learning rate"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "a schedule of transformers.get_scheduler"})
    warmup_steps: int = field(default=100, metadata={"help": "steps of linear warmup"})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW weight decay of matrices"})
    label_smoothing: float = field(default=0.1, metadata={"help": "cross-entropy label smoothing"})
    temperature: float = field(default=16.0, metadata={"help": "scale of the cosine logits"})
    checkpointing_steps: int = field(default=200, metadata={"help": "steps between checkpoints"})
    checkpoints_total_limit: int | None = field(default=2, metadata={"help": "how many of the last ones are kept"})
    mixed_precision: MixedPrecision = field(default="auto", metadata={"help": HELP})
    cpu: bool = field(default=False, metadata={"help": "stay on the CPU also where there is a GPU"})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "go on from a checkpoint: its folder, or `latest` in output_dir"}
    )
    seed: int = field(default=0, metadata={"help": "of the order, the crops and the head"})

    def __post_init__(self) -> None:
        self.mixed_precision = resolve_precision(self.mixed_precision, cpu=self.cpu)


class CosineClassifier(nn.Module):
    """Backbone features against one learned direction per class."""

    def __init__(self, backbone: nn.Module, n_classes: int, temperature: float):
        super().__init__()
        self.features = SplitBackbone(backbone, start=0)
        # Short, so that Adam turns them quickly: only their direction counts.
        self.directions = nn.Parameter(0.02 * torch.randn(n_classes, backbone.config.hidden_size))
        self.temperature = temperature

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self.features.forward_features(pixel_values).float()
        return self.temperature * F.normalize(features, dim=-1) @ F.normalize(self.directions, dim=-1).T


def batch_indices(n_images: int, step: int, batch_size: int, seed: int) -> torch.Tensor:
    """Images of a step: a slice of the epoch's permutation, itself a function of (seed, epoch)."""
    per_epoch = max(1, n_images // batch_size)
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(n_images, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[position * batch_size : (position + 1) * batch_size]


@torch.no_grad()
def held_out_accuracy(
    model: CosineClassifier, domain: Domain, processor: BaseImageProcessor, accelerator: Accelerator, seed: int
) -> dict[str, float]:
    """Mean 5-way accuracy of cosine prototypes on 200 episodes of the held-out classes, 1-shot and 5-shot, in %."""
    model.eval()
    chunks = []
    for images in domain.images.split(256):
        with accelerator.autocast():
            pixels = normalise(images.to(accelerator.device), processor)
            chunks.append(model.features.forward_features(pixels).float().cpu())
    features = torch.cat(chunks)
    result = {}
    for n_shot in (1, 5):
        hits = []
        for index in range(200):
            episode = cdfsl_episode(domain, index, n_way=5, n_shot=n_shot, seed=seed)
            classifier = PrototypeClassifier.from_support(features[episode.support], episode.support_labels)
            predicted = classifier(features[episode.query]).argmax(-1)
            hits.append((predicted == episode.query_labels).float().mean())
        result[f"accuracy_{n_shot}_shot"] = round(100 * torch.stack(hits).mean().item(), 2)
    model.train()
    return result


def main(argv: list[str] | None = None) -> None:
    arguments = parse(Arguments, argv)
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision, cpu=arguments.cpu)
    try:
        with exclusive(arguments.output_dir) if accelerator.is_main_process else contextlib.nullcontext():
            pretrain(arguments, accelerator)
    except (CheckpointError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    accelerator.end_training()


def pretrain(arguments: Arguments, accelerator: Accelerator) -> None:
    """The whole run, from the data to the saved backbone."""
    set_seed(arguments.seed)
    output = Path(arguments.output_dir)

    processor = AutoImageProcessor.from_pretrained(arguments.backbone, backend="pil")
    everything = join_domains([load_domain(source, processor) for source in arguments.dataset], "pretraining")
    held_out = [
        c for c in range(len(everything.class_names)) if arguments.holdout_every and c % arguments.holdout_every == 0
    ]
    trained = [c for c in range(len(everything.class_names)) if c not in held_out]
    domain = everything.select_classes(trained)
    held_out_domain = everything.select_classes(held_out, "held-out") if held_out else None
    accelerator.print(f"{len(domain)} images of {len(trained)} classes; {len(held_out)} classes held out")

    if arguments.from_scratch:
        backbone = AutoModel.from_config(AutoConfig.from_pretrained(arguments.backbone))
    else:
        backbone = AutoModel.from_pretrained(arguments.backbone)
    backbone = backbone.float()
    blocks = find_blocks(backbone)
    if not arguments.from_scratch:
        trainable = blocks.after(len(blocks) - arguments.trained_blocks)
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(name in trainable)
    model = CosineClassifier(backbone, len(trained), arguments.temperature)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": arguments.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate)
    scheduler = get_scheduler(arguments.lr_scheduler_type, optimizer, arguments.warmup_steps, arguments.steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(scheduler)
    first, history, cost = 0, [], OfflineCost(accelerator)
    progress = load_checkpoint(accelerator, output, arguments.resume_from_checkpoint)
    if progress is not None:
        first, history, cost = progress["step"], progress["history"], OfflineCost(accelerator, progress["cost"])
    elif held_out_domain is not None and accelerator.is_main_process:
        before = held_out_accuracy(
            accelerator.unwrap_model(model), held_out_domain, processor, accelerator, arguments.seed
        )
        history.append({"step": 0, **before})
        accelerator.print(history[-1])

    model.train()
    bar = tqdm(range(first, arguments.steps), disable=not accelerator.is_main_process, mininterval=10)
    for step in bar:
        indices = batch_indices(len(domain), step, arguments.batch_size, arguments.seed)
        mine = indices[accelerator.process_index :: accelerator.num_processes]
        generator = torch.Generator().manual_seed((arguments.seed * 1_000_003 + step) * 97 + accelerator.process_index)
        with cost.phase("pretraining", images=len(indices)):
            images = domain.images[mine].to(accelerator.device)
            pixels = normalise(random_views(images, generator), processor)
            labels = domain.labels[mine].to(accelerator.device)
            with accelerator.autocast():
                logits = model(pixels)
            loss = F.cross_entropy(logits, labels, label_smoothing=arguments.label_smoothing)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        if (step + 1) % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        done = step + 1 == arguments.steps
        if (step + 1) % arguments.checkpointing_steps == 0 or done:
            record = {"step": step + 1, "loss": round(loss.item(), 4)}
            if done and held_out_domain is not None and accelerator.is_main_process:
                whole = accelerator.unwrap_model(model)
                record |= held_out_accuracy(whole, held_out_domain, processor, accelerator, arguments.seed)
            history.append(record)
            accelerator.print(record)
            state = {"history": history, "cost": cost.state}
            save_checkpoint(accelerator, output, step + 1, state, arguments.checkpoints_total_limit)

    if accelerator.is_main_process:
        # Half precision on disk (rounded once, here), single precision when loaded: CPUs are slow in half.
        rounded = {name: t.half() for name, t in backbone.state_dict().items()}
        backbone.config.dtype = torch.float32
        backbone.save_pretrained(output, state_dict=rounded)
        processor.save_pretrained(output)
        record = {
            "arguments": describe_arguments(arguments),
            "history": history,
            "phases": cost.summary(),
            "hardware": hardware(accelerator),
            "versions": versions(),
        }
        write_json(output / "pretraining.json", record)
        accelerator.print(f"wrote {output}")
