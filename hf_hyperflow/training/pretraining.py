"""`BackbonePretrainer`: re-trains the last blocks of a vision backbone as a cosine classifier."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel, get_scheduler
from transformers.image_processing_utils import BaseImageProcessor

from ..arguments import describe_arguments, exit_on_error, parse
from ..data.augmentation import random_views
from ..data.domains import Domain, join_domains, load_domain, normalise
from ..data.episodes import cdfsl_episode
from ..modeling.atomic_file import write_json
from ..modeling.backbones import SplitBackbone
from ..modeling.gate import find_blocks
from ..modeling.prototypes import PrototypeClassifier
from ..modeling.trunks import find_trunk
from .checkpoints import exclusive_run, load_checkpoint, save_checkpoint
from .cost_log import OfflineCost, describe_hardware, list_versions
from .optimizer import build_optimizer
from .precision import HELP, MixedPrecision, resolve_precision

#: Episodes that measure the backbone on held-out classes, for each number of shots.
N_EPISODES = 200


@dataclass
class PretrainingConfig:
    """The settings of `BackbonePretrainer`; the help of each field is in its metadata."""

    dataset: list[str] = field(
        metadata={"help": "labelled image datasets (Parquet files, image folders, Hub ids) of the same classes"}
    )
    output_dir: str = field(metadata={"help": "folder for checkpoints and the final model"})
    backbone: str = field(
        default="facebook/dinov2-small", metadata={"help": "a transformers vision model: Hub id or folder"}
    )
    from_scratch: bool = field(default=False, metadata={"help": "keep the architecture, forget the weights"})
    trained_blocks: int = field(default=6, metadata={"help": "how many of the last blocks are trained"})
    holdout_every: int = field(default=4, metadata={"help": "every n-th class is held out; 0: none"})
    steps: int = field(default=1500, metadata={"help": "optimiser steps"})
    batch_size: int = field(default=128, metadata={"help": "images of a step, over all processes"})
    learning_rate: float = field(default=2e-4, metadata={"help": "peak learning rate"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "a schedule of transformers.get_scheduler"})
    warmup_steps: int = field(default=100, metadata={"help": "steps of linear warmup"})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW weight decay of matrices"})
    label_smoothing: float = field(default=0.1, metadata={"help": "label smoothing of the cross-entropy"})
    temperature: float = field(default=16.0, metadata={"help": "scale of the cosine logits"})
    checkpointing_steps: int = field(default=200, metadata={"help": "steps between checkpoints"})
    checkpoints_total_limit: int | None = field(default=2, metadata={"help": "how many of the last ones are kept"})
    mixed_precision: MixedPrecision = field(default="auto", metadata={"help": HELP})
    cpu: bool = field(default=False, metadata={"help": "stay on the CPU even if there is a GPU"})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "go on from a checkpoint: its folder, or `latest` in output_dir"}
    )
    seed: int = field(default=0, metadata={"help": "of the order, the crops and the head"})

    def __post_init__(self) -> None:
        self.mixed_precision = resolve_precision(self.mixed_precision, cpu=self.cpu)


class CosineClassifier(nn.Module):
    """Logits `(n, n_classes)`: cosines between the backbone's features and one learned direction per class."""

    def __init__(self, backbone: PreTrainedModel, n_classes: int, temperature: float):
        super().__init__()
        self.features = SplitBackbone(backbone, start=0)
        # Short, so that Adam turns them quickly: only their direction counts.
        self.directions = nn.Parameter(0.02 * torch.randn(n_classes, self.features.width))
        self.temperature = temperature

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self.features.forward_features(pixel_values).float()
        return self.temperature * F.normalize(features, dim=-1) @ F.normalize(self.directions, dim=-1).T


class BackbonePretrainer:
    """Trains the last blocks of a backbone, so that prototypes separate classes that it has not seen.

    Classes whose label is a multiple of `holdout_every` are held out: 5-way episodes of them measure the backbone
    before and after. The images and crops of a step are functions of (seed, step), so that a killed and resumed run
    equals an uninterrupted one.

    Args:
        config: the settings.
    """

    processor: BaseImageProcessor
    domain: Domain
    held_out: Domain | None
    backbone: PreTrainedModel
    cost: OfflineCost

    def __init__(self, config: PretrainingConfig):
        self.config = config
        self.output = Path(config.output_dir)
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=config.cpu)
        self.n_done = 0
        self.history: list[dict[str, Any]] = []

    def train(self) -> None:
        """Train, or go on training, and save the backbone in `config.output_dir`.

        Raises:
            CheckpointError: as `DriftTrainer.train`.
            ValueError: the datasets have different classes or cannot be read.
        """
        config = self.config
        with exclusive_run(self.accelerator, self.output):
            self.prepare()
            bar = tqdm(range(self.n_done, config.steps), disable=not self.accelerator.is_main_process, mininterval=10)
            for step in bar:
                loss = self.step(step)
                if self.n_done % 10 == 0:
                    bar.set_postfix(loss=f"{loss.item():.3f}")
                if self.n_done % config.checkpointing_steps == 0 or self.n_done == config.steps:
                    self.checkpoint(loss.item())
            self.save()
        self.accelerator.end_training()

    def prepare(self) -> None:
        """Load data and backbone, build what is trained, and restore the checkpoint that is resumed from."""
        set_seed(self.config.seed)
        self._load_data()
        self._load_backbone()
        self._build_optimizer()
        state = load_checkpoint(self.accelerator, self.output, self.config.resume_from_checkpoint)
        if state is None:
            self.cost = OfflineCost(self.accelerator)
            self._measure_before()
        else:
            self.n_done, self.history = state["step"], state["history"]
            self.cost = OfflineCost(self.accelerator, state["cost"])
        self.model.train()

    def _load_data(self) -> None:
        config = self.config
        self.processor = AutoImageProcessor.from_pretrained(config.backbone, backend="pil")
        domains = [load_domain(source, self.processor) for source in config.dataset]
        merged_domain = join_domains(domains, "pretraining")
        trained: list[int] = []
        held_out: list[int] = []
        for label in range(len(merged_domain.class_names)):
            if config.holdout_every > 0 and label % config.holdout_every == 0:
                held_out.append(label)
            else:
                trained.append(label)
        self.domain = merged_domain.select_classes(trained)
        self.held_out = merged_domain.select_classes(held_out, "held-out") if held_out else None
        self.accelerator.print(f"{len(self.domain)} images of {len(trained)} classes; {len(held_out)} classes held out")

    def _load_backbone(self) -> None:
        config = self.config
        if config.from_scratch:
            self.backbone = AutoModel.from_config(AutoConfig.from_pretrained(config.backbone)).float()
            return
        self.backbone = find_trunk(AutoModel.from_pretrained(config.backbone)).float()
        blocks = find_blocks(self.backbone)
        trainable = blocks.after(max(0, len(blocks) - config.trained_blocks))
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(name in trainable)

    def _build_optimizer(self) -> None:
        config = self.config
        self.classifier = CosineClassifier(self.backbone, len(self.domain.class_names), config.temperature)
        self.parameters = [parameter for parameter in self.classifier.parameters() if parameter.requires_grad]
        optimizer = build_optimizer(self.parameters, config.learning_rate, config.weight_decay)
        self.scheduler = get_scheduler(config.lr_scheduler_type, optimizer, config.warmup_steps, config.steps)
        # `model` is the classifier, wrapped where there are several processes.
        self.model, self.optimizer = self.accelerator.prepare(self.classifier, optimizer)
        self.accelerator.register_for_checkpointing(self.scheduler)

    def _measure_before(self) -> None:
        if self.held_out is None or not self.accelerator.is_main_process:
            return
        entry: dict[str, Any] = {"step": 0}
        entry.update(self.measure_held_out_accuracy(self.held_out))
        self.history.append(entry)
        self.accelerator.print(entry)

    def step(self, step: int) -> torch.Tensor:
        """One optimiser step on the images of step 0, 1, ...; its loss, of this process's share."""
        config, accelerator = self.config, self.accelerator
        indices = draw_images(len(self.domain), step, config.batch_size, config.seed)
        share = indices[accelerator.process_index :: accelerator.num_processes]
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + step) * 97 + accelerator.process_index)
        with self.cost.phase("pretraining", images=len(indices)):
            images = self.domain.images[share].to(accelerator.device)
            pixel_values = normalise(random_views(images, generator), self.processor)
            labels = self.domain.labels[share].to(accelerator.device)
            with accelerator.autocast():
                logits = self.model(pixel_values)
            loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
        self.n_done = step + 1
        return loss.detach()

    def checkpoint(self, loss: float) -> None:
        """Note the loss, at the end also the accuracy on held-out classes, and write a checkpoint."""
        entry: dict[str, Any] = {"step": self.n_done, "loss": round(loss, 4)}
        is_last = self.n_done == self.config.steps
        if is_last and self.held_out is not None and self.accelerator.is_main_process:
            entry.update(self.measure_held_out_accuracy(self.held_out))
        self.history.append(entry)
        self.accelerator.print(entry)
        state = {"history": self.history, "cost": self.cost.state()}
        limit = self.config.checkpoints_total_limit
        save_checkpoint(self.accelerator, self.output, self.n_done, state, limit)

    @torch.no_grad()
    def measure_held_out_accuracy(self, domain: Domain) -> dict[str, float]:
        """Mean accuracy in % of cosine prototypes on 5-way episodes of a domain, of 1 and of 5 shots."""
        self.classifier.eval()
        chunks = []
        for images in domain.images.split(256):
            with self.accelerator.autocast():
                pixel_values = normalise(images.to(self.accelerator.device), self.processor)
                chunks.append(self.classifier.features.forward_features(pixel_values).float().cpu())
        self.classifier.train()
        features = torch.cat(chunks)
        return {
            "accuracy_1_shot": _measure_accuracy(features, domain, 1, self.config.seed),
            "accuracy_5_shot": _measure_accuracy(features, domain, 5, self.config.seed),
        }

    def save(self) -> None:
        """Save the backbone, its image processor and `pretraining.json`, the record of the run."""
        if not self.accelerator.is_main_process:
            return
        # Half precision on disk (rounded once, here) and single precision when loaded: CPUs are slow in half.
        rounded = {name: tensor.half() for name, tensor in self.backbone.state_dict().items()}
        self.backbone.config.dtype = torch.float32
        self.backbone.save_pretrained(self.output, state_dict=rounded)
        self.processor.save_pretrained(self.output)
        record = {
            "arguments": describe_arguments(self.config),
            "history": self.history,
            "phases": self.cost.summary(),
            "hardware": describe_hardware(self.accelerator),
            "versions": list_versions(),
        }
        write_json(self.output / "pretraining.json", record)
        self.accelerator.print(f"wrote {self.output}")


def draw_images(n_images: int, step: int, batch_size: int, seed: int) -> torch.Tensor:
    """Indices of the images of a step: a slice of the epoch's permutation, which is a function of (seed, epoch)."""
    steps_per_epoch = max(1, n_images // batch_size)
    epoch, position = divmod(step, steps_per_epoch)
    order = torch.randperm(n_images, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[position * batch_size : (position + 1) * batch_size]


def _measure_accuracy(features: torch.Tensor, domain: Domain, n_shot: int, seed: int) -> float:
    """Mean accuracy in % over 5-way episodes, from the features `(n_images, width)` of the domain."""
    accuracies = []
    for index in range(N_EPISODES):
        episode = cdfsl_episode(domain, index, n_way=5, n_shot=n_shot, seed=seed)
        classifier = PrototypeClassifier.from_support(features[episode.support], episode.support_labels)
        predicted = classifier(features[episode.query]).argmax(-1)
        accuracies.append((predicted == episode.query_labels).float().mean())
    return round(100 * torch.stack(accuracies).mean().item(), 2)


def main(argv: list[str] | None = None) -> None:
    """The command line of `training/pretrain_backbone.py`."""
    with exit_on_error():
        BackbonePretrainer(parse(PretrainingConfig, argv)).train()
