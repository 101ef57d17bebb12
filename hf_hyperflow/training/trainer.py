"""`DriftTrainer`: trains a HyperFlow adapter for a backbone on labelled image datasets."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import warnings
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from datasets import disable_progress_bars
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel, get_scheduler
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from ..arguments import describe_arguments, exit_on_error, parse
from ..data.domains import Domain
from ..data.tasks import MIN_WAY, load_domains, query_count, require_enough
from ..finetuning.trajectories import Trajectories, measure_token_scale
from ..modeling.adapter import HyperFlowAdapter
from ..modeling.backbones import SplitBackbone
from ..modeling.hub import make_repo, push_folder
from ..modeling.saving import CheckpointError
from ..modeling.trunks import find_trunk
from .batches import BatchSizes, StepBatches, load_recorded
from .building import build_adapter, copy_weights
from .checkpoints import exclusive_run, load_checkpoint, save_adapter, save_checkpoint
from .config import DriftTrainingConfig
from .cost_log import OfflineCost, describe_hardware, list_versions
from .lda_prior import measure_lda_prior
from .objectives import EpisodicLoss, VelocityMatchingLoss
from .optimizer import build_optimizer
from .precision import get_autocast_dtype
from .progress import TrainingProgress
from .schedule import METRICS, Schedule, ScheduledLoss
from .tracking import flatten, get_logging_folder, list_domains, require_tracker, start_tracker
from .validation import SHARED_TASKS, Validation, average_weights, validate_on_domains

#: Training tasks over which the way of a flow is averaged, where training goes on from its end.
START_TASKS = 64
#: Ways, shots and queries of the smallest training task; each training domain must have the images for it.
SMALLEST_TASK = (MIN_WAY, 1, query_count(MIN_WAY))
#: Those of the smallest validation episode, for the validation domains.
VALIDATION_TASK = (2, 5, 15)


class DriftTrainer:
    """Trains the drift network of a HyperFlow adapter, and measures the closed-form head it classifies with.

        config = DriftTrainingConfig(backbone="facebook/dinov2-small", dataset=["photos", "drawings"], output_dir="out")
        trainer = DriftTrainer(config)
        adapter = trainer.train()

    The batch of a step is a function of (seed, step). A run that was killed and resumed therefore equals an
    uninterrupted one, and any number of processes and of accumulated parts gives the same result, up to rounding.

    Args:
        config: the settings.

    Attributes:
        adapter: what is trained; `averaged_adapter`, the moving average of its weights, is what is saved.
        progress: how far the run has come.
        cost: what it has cost, phase by phase.

    Raises:
        ImportError: the package of `config.report_to` is not installed.
    """

    processor: BaseImageProcessor
    training_domains: list[Domain]
    validation_domains: list[Domain]
    backbone: PreTrainedModel
    adapter: HyperFlowAdapter
    split: SplitBackbone
    recorded: Trajectories | None
    init_adapter: HyperFlowAdapter | None
    episodic_loss: EpisodicLoss
    batches: StepBatches
    cost: OfflineCost

    def __init__(self, config: DriftTrainingConfig):
        require_tracker(config.report_to)
        self.config = config
        self.output = Path(config.output_dir)
        self.repo_id = config.hub_model_id or self.output.name
        self.schedule = Schedule(config.matching_steps, config.annealing_steps)
        self.progress = TrainingProgress()
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            cpu=config.cpu,
            log_with=None if config.report_to == "none" else config.report_to,
            project_dir=get_logging_folder(self.output, config.report_to),
            # The other processes wait for the longest validation, and that is no failure.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
        )

    def train(self) -> HyperFlowAdapter:
        """Train, or go on training, and save the adapter in `config.output_dir`.

        Returns:
            The trained adapter in evaluation mode, in single precision.

        Raises:
            CheckpointError: another run writes to the folder; it holds checkpoints and it was not said to resume; a
                checkpoint is damaged or of another run; the disk is full; or the Hub refuses the push.
            ValueError: a dataset cannot be read or is too small, the trajectories do not fit, or training diverges.
            IncompatibleBackboneError: the backbone is no vision transformer that can be split at its blocks.
        """
        config = self.config
        with exclusive_run(self.accelerator, self.output):
            self.prepare()
            bar = tqdm(
                range(self.progress.step, config.steps),
                disable=not self.accelerator.is_main_process,
                mininterval=10,
            )
            for step in bar:
                self.step(step)
                bar.set_postfix(self.progress.recent.means())
                if self._is_due(config.validate_every):
                    self.validate()
                if self._is_due(config.checkpointing_steps):
                    self.checkpoint()
            self.save()
        self.accelerator.end_training()
        return self.averaged_adapter.eval()

    def _is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now."""
        return self.progress.step % every == 0 or self.progress.step == self.config.steps

    @property
    def averaged_adapter(self) -> HyperFlowAdapter:
        """The exponential moving average of the adapter's weights."""
        adapter = self.averaged.module
        assert isinstance(adapter, HyperFlowAdapter)
        return adapter

    # Prepare

    def prepare(self) -> None:
        """Load data and backbone, build what is trained, and restore the checkpoint that is resumed from."""
        set_seed(self.config.seed)
        self._mute_other_processes()
        if self.config.push_to_hub and self.accelerator.is_main_process:
            # A token that may not write is an error now, and not after the training.
            self.repo_id = make_repo(self.repo_id)
        self._load_data()
        self._build_adapter()
        self._build_optimizer()
        is_resumed = self._resume()
        start_tracker(self.accelerator, describe_arguments(self.config))
        self.batches = StepBatches(self.config, self.training_domains, self.processor, self.recorded, self.accelerator)
        if not is_resumed:
            self._measure_start()
        if self.progress.step < self.schedule.end_of_matching:
            with self.cost.phase("preparation", every=1), self.accelerator.autocast():
                self.batches.encode_support(self.adapter, self.split)

    def _mute_other_processes(self) -> None:
        """Progress bars and warnings come once, and not once per process."""
        if not self.accelerator.is_main_process:
            disable_progress_bars()
            logging.disable_progress_bar()
            warnings.simplefilter("ignore")

    def _load_data(self) -> None:
        config = self.config
        self.processor = AutoImageProcessor.from_pretrained(config.backbone, backend="pil")
        self.training_domains, self.validation_domains = load_domains(
            config.dataset, self.processor, holdout=config.holdout, max_per_class=config.max_per_class
        )
        require_enough(self.training_domains, *SMALLEST_TASK)
        require_enough(self.validation_domains, *VALIDATION_TASK)
        self.accelerator.print("train on", list_domains(self.training_domains))
        if self.validation_domains:
            self.accelerator.print("validate on", list_domains(self.validation_domains))
        else:
            self.accelerator.print("no validation domains (choose some with --holdout)")

    def _build_adapter(self) -> None:
        """The backbone, an untrained adapter for it, and the trajectories that the adapter starts from."""
        config = self.config
        backbone = AutoModel.from_pretrained(config.backbone).float().eval().requires_grad_(False)
        self.backbone = find_trunk(backbone).to(self.accelerator.device)
        image_size = self.training_domains[0].images.shape[-2:]
        self.adapter = build_adapter(config, self.backbone, self.processor, image_size)
        self.init_adapter = None
        if config.init_adapter is not None:
            self.init_adapter = copy_weights(self.adapter, config.init_adapter)
        self.split = self.adapter.split(self.backbone)
        self.recorded = load_recorded(config.trajectories, self.adapter, self.training_domains)
        if config.token_scale is not None:
            self.adapter.token_scale.fill_(config.token_scale)
        elif self.recorded is not None:
            self.adapter.token_scale.copy_(measure_token_scale(self.recorded))

    def _build_optimizer(self) -> None:
        """The losses, and everything that changes the weights, under Accelerate's control."""
        config = self.config
        dtype = get_autocast_dtype(self.accelerator.mixed_precision)
        self.episodic_loss = EpisodicLoss(self.adapter, self.split, dtype=dtype, cache_bytes=config.prefix_cache_bytes)
        matching = None
        if self.recorded is not None:
            matching = VelocityMatchingLoss(self.adapter, self.recorded.times, interpolant=config.interpolant)
        loss = ScheduledLoss(self.adapter, self.episodic_loss, matching)
        self.parameters = [parameter for parameter in self.adapter.parameters() if parameter.requires_grad]
        self.accelerator.print(
            f"{self.adapter.space.n_tokens} tokens, {self.adapter.space.n_parameters} adapted parameters, "
            f"{sum(parameter.numel() for parameter in self.parameters)} trained parameters"
        )
        optimizer = build_optimizer(self.parameters, config.learning_rate, config.weight_decay, betas=(0.9, 0.98))
        # Not prepared: Accelerate would step it once per process, and the schedule is that of whole steps.
        self.scheduler = get_scheduler(config.lr_scheduler_type, optimizer, config.warmup_steps, config.steps)
        self.loss, self.optimizer = self.accelerator.prepare(loss, optimizer)
        self.averaged = AveragedModel(self.adapter, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        self.accelerator.register_for_checkpointing(self.averaged, self.scheduler)

    def _resume(self) -> bool:
        """Restore the checkpoint that the config asks for; False where training starts from the beginning.

        Raises:
            CheckpointError: see `load_checkpoint`; or the checkpoint was trained on other data.
        """
        state = load_checkpoint(self.accelerator, self.output, self.config.resume_from_checkpoint)
        if state is None:
            self.cost = OfflineCost(self.accelerator)
            return False
        self.progress = TrainingProgress.from_dict(state)
        self.cost = OfflineCost(self.accelerator, state["cost"])
        data = self._describe_data()
        if state["data"] != data:
            raise CheckpointError(
                f"{self.output} was trained so far on {state['data']}, and now there are {data}. Choose another "
                "--output_dir, or give the data it was started with."
            )
        arguments = describe_arguments(self.config)
        changed = [name for name, value in arguments.items() if value != state["arguments"].get(name)]
        if changed:
            self.accelerator.print(f"warning: other than when the checkpoint was written: {', '.join(sorted(changed))}")
        return True

    def _measure_start(self) -> None:
        """What a training starts from is measured on its first tasks: the learned start of the flow, and the LDA."""
        config = self.config
        if config.learned_start and self.init_adapter is not None and self.init_adapter.start_z is None:
            with self.cost.phase("start", every=1, episodes=START_TASKS), self.accelerator.autocast():
                self._start_where_flow_arrives()
        if config.lda:
            with self.cost.phase("lda", every=1, episodes=config.lda_tasks), self.accelerator.autocast():
                measure_lda_prior(self.accelerator, self.episodic_loss, self.batches, config.lda_tasks)
        # The prior is in buffers, and the average is one of parameters alone.
        self.averaged_adapter.load_state_dict(self.adapter.state_dict())

    @torch.no_grad()
    def _start_where_flow_arrives(self) -> None:
        """Move the start of the flow by its mean way. A flow that was trained briefly is too short, so it goes on."""
        tasks = self.batches.first_episodes(START_TASKS)
        mean = average_weights(self.accelerator, self.adapter, self.backbone, tasks)
        way = (mean - self.episodic_loss.start) / self.adapter.token_scale
        assert self.adapter.start_z is not None
        self.adapter.start_z.copy_(way * self.adapter.space.mask.to(way.device))

    # Step

    def step(self, step: int) -> None:
        """One optimiser step on the batch of step 0, 1, ...

        Raises:
            ValueError: the loss or its gradient is not finite. The weights are left as they were.
        """
        sizes = self.batches.sizes(step)
        with self.cost.phase(self.schedule.phase(step), episodes=sizes.episodes, rows=sizes.rows):
            metrics = self._accumulate_gradients(step, sizes)
            norm = float(self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm))
            values = dict(zip(METRICS, self.accelerator.reduce(metrics).tolist(), strict=True))
            self._require_finite(step, values["loss"], norm)
            self._update_weights()
        self.progress.step = step + 1
        self.progress.recent.add(values, self.schedule.measured(step))
        curves = self.progress.recent.latest()
        curves["matching_weight"] = self.schedule.weight(step)
        curves["learning_rate"] = self.scheduler.get_last_lr()[0]
        self.accelerator.log(curves, step=self.progress.step)

    def _accumulate_gradients(self, step: int, sizes: BatchSizes) -> torch.Tensor:
        """Gradients of this process's share of a batch, part by part, and its share of `METRICS`."""
        n_parts = self.config.gradient_accumulation_steps
        weight = self.schedule.weight(step)
        metrics = torch.zeros(len(METRICS), device=self.accelerator.device)
        for part in range(n_parts):
            is_last = part + 1 == n_parts
            # Processes exchange gradients once per step, in the last part.
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.loss):
                episodes, rows = self.batches.share(step, part)
                loss, measured = self.loss(episodes, rows, weight, sizes.episodes, sizes.rows)
                # DDP takes the mean of the processes, and the shares are to be summed.
                self.accelerator.backward(loss * self.accelerator.num_processes)
                metrics += measured
        return metrics

    def _require_finite(self, step: int, loss: float, gradient_norm: float) -> None:
        # Half precision looks after infinite gradients itself: it leaves the step out and lowers its scale.
        handles_overflow = self.accelerator.scaler is not None
        if not math.isfinite(loss) or (not handles_overflow and not math.isfinite(gradient_norm)):
            raise ValueError(
                f"the loss of step {step + 1} is {loss}, the norm of its gradient {gradient_norm}. Lower "
                "--learning_rate, lengthen --warmup_steps or use --mixed_precision no, and go on from the last "
                "checkpoint."
            )

    def _update_weights(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not self.accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
            self.averaged.update_parameters(self.adapter)

    # Validate

    def validate(self) -> Validation:
        """Compare the averaged adapter with direct transfer on every validation domain, and note it in the history.

        Whether the flow reads its support set is measured, too: by its gain over the same weights for all tasks, and by
        how much its way differs between tasks.
        """
        domains, n_episodes = self.validation_domains, self.config.validation_episodes
        adapter, backbone = self.averaged_adapter, self.backbone
        with self.cost.phase("validation", every=1, episodes=n_episodes * len(domains)):
            with self.accelerator.autocast():
                tasks = self.batches.first_episodes(SHARED_TASKS)
                shared = average_weights(self.accelerator, adapter, backbone, tasks)
            validation = validate_on_domains(
                self.accelerator, adapter, backbone, domains, n_episodes=n_episodes, shared_weights=shared
            )
        progress = self.progress
        entry: dict[str, Any] = {"step": progress.step, "phase": self.schedule.phase(progress.step - 1)}
        entry.update(progress.recent.means())
        entry["scale"] = self.adapter.logit_scale.exp().item()
        entry.update(validation.accuracies)
        curves = flatten(validation.accuracies, "validation/")
        if validation.shares is not None:
            for part, share in asdict(validation.shares).items():
                entry[f"share_{part}"] = curves[f"validation/share_{part}"] = round(share, 4)
        progress.history.append(entry)
        self.accelerator.print(json.dumps(entry))
        self.accelerator.log(curves, step=progress.step)
        return validation

    # Save

    def checkpoint(self) -> None:
        """Write a checkpoint that a killed run goes on from.

        Raises:
            CheckpointError: it cannot be written; the earlier ones are untouched.
        """
        state = self.progress.to_dict()
        state["cost"] = self.cost.state()
        state["arguments"] = describe_arguments(self.config)
        state["data"] = self._describe_data()
        limit = self.config.checkpoints_total_limit
        save_checkpoint(self.accelerator, self.output, self.progress.step, state, limit)

    def save(self) -> None:
        """Save the averaged adapter with the record of its training and, if the config says so, push it to the Hub.

        Raises:
            CheckpointError: the folder cannot be written, or the Hub refuses.
        """
        if self.accelerator.is_main_process:
            adapter = self.averaged_adapter
            adapter.training_record = self._build_record()
            save_adapter(adapter, self.output)
            self.accelerator.print(f"wrote {self.output}")
            if self.config.push_to_hub:
                # From a folder of its own: `output` holds checkpoints and curves, too.
                with tempfile.TemporaryDirectory() as folder:
                    save_adapter(adapter, folder)
                    self.accelerator.print(f"pushed to {push_folder(folder, self.repo_id).commit_url}")
        self.accelerator.wait_for_everyone()

    def _build_record(self) -> dict[str, Any]:
        """What `training.json` says: how the adapter was trained and what that cost."""
        return {
            "arguments": describe_arguments(self.config),
            "history": self.progress.history,
            "phases": self.cost.summary(),
            "trajectories": None if self.recorded is None else self.recorded.collection,
            "hardware": describe_hardware(self.accelerator),
            "versions": list_versions(),
            "continued_from": None if self.init_adapter is None else self.init_adapter.training_record,
        }

    def _describe_data(self) -> dict[str, Any]:
        """How much there is to train on. An interrupted run goes on with the same."""
        images = {domain.name: len(domain) for domain in self.training_domains}
        trajectories = {}
        if self.recorded is not None:
            for entry in self.recorded.collection["collections"]:
                trajectories[entry["name"]] = entry["totals"]["rows"]
        return {"images": images, "trajectories": trajectories}


def main(argv: list[str] | None = None) -> None:
    """The command line of `training/train_drift.py`."""
    with exit_on_error():
        DriftTrainer(parse(DriftTrainingConfig, argv)).train()
