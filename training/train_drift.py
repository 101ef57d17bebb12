"""Train a HyperFlow adapter for a backbone on labelled image datasets (task objective).

    accelerate launch training/train_drift.py --config training/configs/hyperflow-vit-s14-70.yaml \
        --backbone FOLDER_OR_HUB_ID --dataset FILE_OR_HUB_ID [...] --output_dir adapter

Episode i is a function of (seed, i), so a killed run goes on with `--resume` as if it had not been interrupted and
several processes share the episodes of each step.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from arguments import described, parse
from checkpoints import load_checkpoint, save_checkpoint
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel
from transformers.image_processing_utils import BaseImageProcessor

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.domains import Domain, normalise
from hf_hyperflow.evaluation import compare_flow
from hf_hyperflow.objectives import EpisodeImages, TaskObjective
from hf_hyperflow.parameter_space import bias_config
from hf_hyperflow.training_tasks import draw_task, load_domains, task_images


@dataclass
class Arguments:
    backbone: str = field(metadata={"help": "the target: a transformers vision model, Hub id or folder"})
    dataset: list[str] = field(metadata={"help": "training domains: Parquet files, image folders, Hub ids"})
    output_dir: str = field(metadata={"help": "folder for checkpoints and the trained adapter"})
    holdout: list[str] = field(
        default_factory=list,
        metadata={"help": "NAME: this domain is kept for validation; NAME:K: only every K-th class of it is"},
    )
    max_per_class: int = field(default=300, metadata={"help": "images of a class that are used at most"})
    last_blocks: int = field(default=4, metadata={"help": "the last so many blocks are adapted"})
    norms: bool = field(default=True, metadata={"help": "also adapt the LayerNorms, not only the biases"})
    drift_width: int = field(default=192, metadata={"help": "width of the drift network"})
    drift_depth: int = field(default=4, metadata={"help": "its blocks"})
    n_steps: int = field(default=4, metadata={"help": "solver steps, in training and by default in use"})
    steps: int = field(default=1000, metadata={"help": "optimiser steps"})
    episodes_per_step: int = field(default=4, metadata={"help": "over all processes"})
    made_share: float = field(default=0.6, metadata={"help": "share of episodes whose domain is made from a real one"})
    learning_rate: float = field(default=5e-4, metadata={"help": "peak learning rate (cosine decay)"})
    warmup_steps: int = field(default=50, metadata={"help": "steps of linear warmup"})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW weight decay of matrices"})
    ema_decay: float = field(default=0.98, metadata={"help": "of the averaged weights that are saved"})
    validate_every: int = field(default=250, metadata={"help": "steps between validations and checkpoints"})
    validation_episodes: int = field(default=60, metadata={"help": "5-way 5-shot episodes of each validation domain"})
    mixed_precision: str = field(default="bf16", metadata={"help": "no, bf16 or fp16"})
    cpu: bool = field(default=False, metadata={"help": "stay on the CPU also where there is a GPU"})
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint in output_dir"})
    seed: int = field(default=0, metadata={"help": "of the episodes and of the drift network's start"})


def episode_images(
    domains: list[Domain], index: int, arguments: Arguments, processor: BaseImageProcessor, device: torch.device
) -> EpisodeImages:
    """The pixels of training task `index`."""
    task = draw_task(domains, index, seed=arguments.seed, made_share=arguments.made_share)
    domain = next(d for d in domains if d.name == task.episode.domain)
    pixel_values = normalise(task_images(task, domain, device), processor)
    return EpisodeImages(pixel_values, task.episode.support_labels.to(device), task.episode.query_labels.to(device))


def learning_rate_at(step: int, arguments: Arguments) -> float:
    """Linear warmup, then a cosine to zero; relative to the peak."""
    if step < arguments.warmup_steps:
        return (step + 1) / arguments.warmup_steps
    progress = (step - arguments.warmup_steps) / max(1, arguments.steps - arguments.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def main() -> None:
    arguments = parse(Arguments)
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision, cpu=arguments.cpu)
    set_seed(arguments.seed)
    output = Path(arguments.output_dir)

    processor = AutoImageProcessor.from_pretrained(arguments.backbone, backend="pil")
    training, validation = load_domains(
        arguments.dataset, processor, holdout=arguments.holdout, max_per_class=arguments.max_per_class
    )
    for kind, domains in (("train", training), ("validate", validation)):
        accelerator.print(f"{kind} on", ", ".join(f"{d.name} ({len(d.class_names)}/{len(d)})" for d in domains))

    backbone = AutoModel.from_pretrained(arguments.backbone).float().eval().requires_grad_(False).to(accelerator.device)
    adapter = HyperFlowAdapter.from_backbone(
        backbone,
        bias_config(backbone, arguments.last_blocks, norms=arguments.norms),
        last_blocks=arguments.last_blocks,
        processor=processor,
        drift_width=arguments.drift_width,
        drift_depth=arguments.drift_depth,
        n_steps=arguments.n_steps,
    )
    objective = TaskObjective(adapter, adapter.split(backbone))
    parameters = [p for p in adapter.parameters() if p.requires_grad]
    accelerator.print(
        f"{adapter.space.n_tokens} tokens, {adapter.space.n_parameters} adapted parameters, "
        f"{sum(p.numel() for p in parameters)} trained parameters"
    )
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": arguments.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=(0.9, 0.98))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_at(step, arguments))
    objective, optimizer = accelerator.prepare(objective, optimizer)
    averaged = AveragedModel(adapter, multi_avg_fn=get_ema_multi_avg_fn(arguments.ema_decay))
    accelerator.register_for_checkpointing(averaged, scheduler)
    first, history, recent = 0, [], []
    progress = load_checkpoint(accelerator, output) if arguments.resume else None
    if progress is not None:
        first, history, recent = progress["step"], progress["history"], progress["recent"]

    started = time.time()
    bar = tqdm(range(first, arguments.steps), disable=not accelerator.is_local_main_process, mininterval=10)
    for step in bar:
        indices = range(step * arguments.episodes_per_step, (step + 1) * arguments.episodes_per_step)
        mine = indices[accelerator.process_index :: accelerator.num_processes]
        episodes = [episode_images(training, i, arguments, processor, accelerator.device) for i in mine]
        with accelerator.autocast():
            loss, accuracy = objective(episodes)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        averaged.update_parameters(adapter)
        recent = [*recent[-49:], (loss.item(), accuracy.item())]
        loss_mean, accuracy_mean = (sum(column) / len(recent) for column in zip(*recent, strict=True))
        bar.set_postfix(loss=f"{loss_mean:.3f}", accuracy=f"{accuracy_mean:.3f}")
        done = step + 1 == arguments.steps
        if (step + 1) % arguments.validate_every == 0 or done:
            record = {"step": step + 1, "loss": loss_mean, "accuracy": accuracy_mean}
            record |= {"scale": adapter.log_scale.exp().item(), "seconds": round(time.time() - started)}
            if accelerator.is_main_process:
                with accelerator.autocast():
                    for domain in validation:
                        record[domain.name] = compare_flow(
                            averaged.module, backbone, domain, n_episodes=arguments.validation_episodes, n_shot=5
                        ).summary()
            history.append(record)
            accelerator.print(json.dumps(record))
            save_checkpoint(accelerator, output, step + 1, {"history": history, "recent": recent})

    if accelerator.is_main_process:
        averaged.module.processor = processor
        rounded = {name: t.half() if t.is_floating_point() else t for name, t in averaged.module.state_dict().items()}
        averaged.module.config.dtype = torch.float32  # half on disk, single in use
        averaged.module.save_pretrained(output, state_dict=rounded)
        (output / "training.json").write_text(
            json.dumps({"arguments": described(arguments), "history": history}, indent=1)
        )
        accelerator.print(f"wrote {output}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
