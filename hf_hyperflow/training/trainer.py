"""Train a HyperFlow adapter for a backbone on labelled image datasets.

    accelerate launch training/train_drift.py --config training/configs/hyperflow-vit-s14-70.yaml \
        --backbone FOLDER_OR_HUB_ID --dataset FILE_OR_HUB_ID [...] --output_dir adapter

The flow is trained by the task objective and, with `--trajectories` of `collect_trajectories.py`, first by matching
what a teacher did (`--matching_steps`, `--annealing_steps`). Episodes and rows of a step are functions of (seed, step): a
killed run goes on with `--resume_from_checkpoint latest` as if it had not been interrupted, and any number of
processes and of accumulated parts share the work of each step.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object, set_seed
from datasets import disable_progress_bars
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel, get_scheduler
from transformers.utils import logging

from hf_hyperflow import HyperFlowAdapter

from ..arguments import describe_arguments, parse
from ..benchmark.evaluation import compare_flow
from ..data.domains import Domain
from ..data.tasks import MIN_WAY, load_domains, query_count, require_enough
from ..finetuning.trajectories import Trajectories, measure_token_scale
from ..modeling.hub import make_repo, push_folder
from ..modeling.lda import spread_between, within_covariance
from ..modeling.peft_configs import bias_config, layernorm_config, lora_config
from ..modeling.saving import CheckpointError, exclusive
from .batches import StepBatches, load_recorded
from .checkpoints import load_checkpoint, save_adapter, save_checkpoint
from .config import Arguments
from .cost_log import OfflineCost, hardware, versions
from .objectives import EpisodicLoss, VelocityMatchingLoss
from .schedule import METRICS, Schedule, ScheduledLoss
from .tracking import flat, logging_folder, require_tracker, start_tracker

#: Means in the history are over so many steps.
WINDOW = 50
#: Ways, shots and queries that every domain must have: of the smallest training task, of a validation of 5 shots.
SMALLEST_TASK, VALIDATION_TASK = (MIN_WAY, 1, query_count(MIN_WAY)), (2, 5, 15)


def new_adapter(
    arguments: Arguments, backbone: nn.Module, processor: object, image_size: torch.Size
) -> HyperFlowAdapter:
    """The untrained adapter that the arguments describe, for images of this height and width."""
    if arguments.parameters == "bias":
        peft_config = bias_config(backbone, arguments.last_blocks, norms=arguments.norms)
    elif arguments.parameters == "lora":
        peft_config = lora_config(backbone, arguments.last_blocks)
    else:
        peft_config = layernorm_config(backbone, arguments.last_blocks)
    encoder = None if arguments.encoder is None else AutoModel.from_pretrained(arguments.encoder).float()
    return HyperFlowAdapter.from_backbone(
        backbone,
        peft_config,
        last_blocks=arguments.last_blocks,
        processor=processor,
        encoder=encoder,
        drift_width=arguments.drift_width,
        drift_depth=arguments.drift_depth,
        n_steps=arguments.n_steps,
        lda=arguments.lda,
        intermediate_weight=arguments.intermediate_weight,
        image_size=list(image_size),
    )


@torch.no_grad()
def measure_lda(accelerator: Accelerator, task: EpisodicLoss, batches: StepBatches, n_tasks: int) -> None:
    """Set the adapter's metric to what training tasks, all of which count the same, are like.

    Raises:
        ValueError: in no task do the images of a class differ.
    """
    width = len(task.adapter.head.variances)
    covariances = torch.zeros(width, width, device=accelerator.device, dtype=torch.float64)
    sums = torch.zeros(3, device=accelerator.device, dtype=torch.float64)
    for episode in batches.mine(n_tasks):
        features = task.adapted_features(task.start, task.split.forward_prefix(episode.pixel_values)).double()
        labels = torch.cat([episode.support_labels, episode.query_labels])
        covariance = within_covariance(features, labels)
        variance = covariance.diagonal().mean()
        if variance > 0:  # a made-up domain can be blank
            covariances += covariance / variance
            sums += torch.stack([torch.ones_like(variance), variance, spread_between(features, labels)])
    n_measured, variance, spread = accelerator.reduce(sums)
    if n_measured == 0:
        raise ValueError(
            f"the metric cannot be measured: in {n_tasks} tasks the images of each class are all the same."
        )
    covariance = variance / n_measured * accelerator.reduce(covariances) / n_measured
    task.adapter.head.set_prior(covariance, spread / n_measured)


def validate(
    accelerator: Accelerator, adapter: HyperFlowAdapter, backbone: nn.Module, domains: list[Domain], n_episodes: int
) -> dict[str, dict]:
    """5-way 5-shot accuracies of each domain, dealt out to the processes."""
    mine = domains[accelerator.process_index :: accelerator.num_processes]
    with accelerator.autocast():
        found = [
            (domain.name, compare_flow(adapter, backbone, domain, n_episodes=n_episodes, n_shot=5).summary())
            for domain in mine
        ]
    by_name = dict(gather_object(found))
    return {domain.name: by_name[domain.name] for domain in domains}


def trained_on(training: list[Domain], recorded: Trajectories | None) -> dict[str, object]:
    """How much there is to train on: a run that was interrupted goes on with the same."""
    collections = [] if recorded is None else recorded.collection["collections"]
    return {
        "images": {domain.name: len(domain) for domain in training},
        "trajectories": {c["name"]: c["totals"]["rows"] for c in collections},
    }


def main(argv: list[str] | None = None) -> None:
    try:
        arguments = parse(Arguments, argv)
        require_tracker(arguments.report_to)
        accelerator = Accelerator(
            mixed_precision=arguments.mixed_precision,
            cpu=arguments.cpu,
            log_with=None if arguments.report_to == "none" else arguments.report_to,
            project_dir=logging_folder(Path(arguments.output_dir), arguments.report_to),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],  # a long validation is no failure
        )
        with exclusive(arguments.output_dir) if accelerator.is_main_process else contextlib.nullcontext():
            train(arguments, accelerator)
    except (CheckpointError, ImportError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    accelerator.end_training()


def train(arguments: Arguments, accelerator: Accelerator) -> None:
    """The whole run, from the data to the saved adapter."""
    set_seed(arguments.seed)
    if not accelerator.is_main_process:  # bars and warnings once, not once per process
        disable_progress_bars()
        logging.disable_progress_bar()
        warnings.simplefilter("ignore")
    output = Path(arguments.output_dir)
    repo_id = arguments.hub_model_id or output.name
    if arguments.push_to_hub and accelerator.is_main_process:
        repo_id = make_repo(repo_id)  # what is wrong with the token should be known before, not after the training

    processor = AutoImageProcessor.from_pretrained(arguments.backbone, backend="pil")
    training, validation = load_domains(
        arguments.dataset, processor, holdout=arguments.holdout, max_per_class=arguments.max_per_class
    )
    for kind, domains, needed in (("train", training, SMALLEST_TASK), ("validate", validation, VALIDATION_TASK)):
        require_enough(domains, *needed)
        accelerator.print(f"{kind} on", ", ".join(f"{d.name} ({len(d.class_names)}/{len(d)})" for d in domains))

    backbone = AutoModel.from_pretrained(arguments.backbone).float().eval().requires_grad_(False).to(accelerator.device)
    adapter = new_adapter(arguments, backbone, processor, training[0].images.shape[-2:])
    schedule = Schedule(arguments.matching_steps, arguments.annealing_steps)
    recorded = load_recorded(arguments.trajectories, adapter, training)
    if arguments.token_scale is not None:
        adapter.token_scale.fill_(arguments.token_scale)
    elif recorded is not None:
        adapter.token_scale.copy_(measure_token_scale(recorded))
    split = adapter.split(backbone)
    task = EpisodicLoss(adapter, split)
    matching = None if recorded is None else VelocityMatchingLoss(adapter, recorded.times, path=arguments.interpolant)
    objective = ScheduledLoss(adapter, task, matching)
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
    scheduler = get_scheduler(arguments.lr_scheduler_type, optimizer, arguments.warmup_steps, arguments.steps)
    objective, optimizer = accelerator.prepare(objective, optimizer)
    averaged = AveragedModel(adapter, multi_avg_fn=get_ema_multi_avg_fn(arguments.ema_decay))
    accelerator.register_for_checkpointing(averaged, scheduler)

    record, data = describe_arguments(arguments), trained_on(training, recorded)
    progress = load_checkpoint(accelerator, output, arguments.resume_from_checkpoint)
    first, history, recent, cost = 0, [], {}, OfflineCost(accelerator)
    if progress is not None:
        first, history, recent = progress["step"], progress["history"], progress["recent"]
        cost = OfflineCost(accelerator, progress["cost"])
        if progress["data"] != data:
            raise CheckpointError(
                f"{output} was trained so far on {progress['data']}, and now there are {data}. Choose another "
                "--output_dir, or give the data it was started with."
            )
        changed = sorted(key for key in record if record[key] != progress["arguments"].get(key))
        if changed:
            accelerator.print(f"warning: other than when the checkpoint was written: {', '.join(changed)}")
    start_tracker(accelerator, record)
    batches = StepBatches(arguments, training, processor, recorded, accelerator)
    if progress is None and adapter.head is not None:
        with cost.phase("metric", every=1, episodes=arguments.lda_tasks), accelerator.autocast():
            measure_lda(accelerator, task, batches, arguments.lda_tasks)
        averaged.module.head.load_state_dict(adapter.head.state_dict())  # buffers are not averaged
    if first < schedule.matching_steps + schedule.annealing_steps:
        with cost.phase("preparation", every=1), accelerator.autocast():
            batches.encode_support(adapter, split)

    bar = tqdm(range(first, arguments.steps), disable=not accelerator.is_main_process, mininterval=10)
    for step in bar:
        weight, phase = schedule.weight(step), schedule.phase(step)
        sizes = batches.sizes(step)
        with cost.phase(phase, **sizes):
            metrics = torch.zeros(len(METRICS), device=accelerator.device)
            for part in range(arguments.gradient_accumulation_steps):
                last = part + 1 == arguments.gradient_accumulation_steps
                with contextlib.nullcontext() if last else accelerator.no_sync(objective):
                    episodes, rows = batches.share(step, part)
                    loss, measured = objective(episodes, rows, weight, sizes["episodes"], sizes["rows"])
                    accelerator.backward(loss * accelerator.num_processes)  # DDP takes the mean of the processes
                    metrics += measured
            norm = float(accelerator.clip_grad_norm_(parameters, arguments.max_grad_norm))
            values = dict(zip(METRICS, accelerator.reduce(metrics).tolist(), strict=True))
            # Half precision looks after infinite gradients itself: it leaves the step out and lowers its scale.
            if not math.isfinite(values["loss"]) or (accelerator.scaler is None and not math.isfinite(norm)):
                raise ValueError(
                    f"the loss of step {step + 1} is {values['loss']}, the norm of its gradient {norm}. Lower "
                    "--learning_rate, lengthen --warmup_steps or use --mixed_precision no, and go on from the last "
                    "checkpoint."
                )
            optimizer.step()
            optimizer.zero_grad()
            if not accelerator.optimizer_step_was_skipped:
                scheduler.step()
                averaged.update_parameters(adapter)
        unused = {"task_loss", "accuracy"} if weight == 1 else {"matching_loss"} if weight == 0 else set()
        recent = {key: [*recent.get(key, [])[1 - WINDOW :], v] for key, v in values.items() if key not in unused}
        means = {key: sum(column) / len(column) for key, column in recent.items()}
        bar.set_postfix({key: f"{mean:.3f}" for key, mean in means.items()})
        now = {key: column[-1] for key, column in recent.items()} | {"matching_weight": weight}
        accelerator.log(now | {"learning_rate": scheduler.get_last_lr()[0]}, step=step + 1)
        done = step + 1 == arguments.steps
        if (step + 1) % arguments.validate_every == 0 or done:
            n_episodes = arguments.validation_episodes
            with cost.phase("validation", every=1, episodes=n_episodes * len(validation)):
                accuracies = validate(accelerator, averaged.module, backbone, validation, n_episodes)
            found = (
                {"step": step + 1, "phase": phase} | means | {"scale": adapter.logit_scale.exp().item()} | accuracies
            )
            history.append(found)
            accelerator.print(json.dumps(found))
            accelerator.log(flat({"validation": accuracies}), step=step + 1)
        if (step + 1) % arguments.checkpointing_steps == 0 or done:
            state = {"history": history, "recent": recent, "cost": cost.state}
            state |= {"arguments": record, "data": data}
            save_checkpoint(accelerator, output, step + 1, state, arguments.checkpoints_total_limit)

    if accelerator.is_main_process:
        trained = averaged.module
        trained.training_record = {
            "arguments": record,
            "history": history,
            "phases": cost.summary(),
            "trajectories": None if recorded is None else recorded.collection,
            "hardware": hardware(accelerator),
            "versions": versions(),
        }
        save_adapter(trained, output)
        accelerator.print(f"wrote {output}")
        if arguments.push_to_hub:
            with tempfile.TemporaryDirectory() as folder:
                save_adapter(trained, folder)
                accelerator.print(f"pushed to {push_folder(folder, repo_id).commit_url}")
    accelerator.wait_for_everyone()
