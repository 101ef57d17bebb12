"""What the regularised LDA knows before it sees a support set: the covariance within classes on training tasks."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..modeling.lda import RegularisedLDA, spread_between, within_covariance
from .batches import StepBatches
from .objectives import EpisodicLoss


@torch.no_grad()
def measure_lda_prior(accelerator: Accelerator, loss: EpisodicLoss, batches: StepBatches, n_tasks: int) -> None:
    """Set the prior of the adapter's LDA to what the first training tasks are like, each counting the same.

    Args:
        loss: of the adapter, whose backbone is used with the weights that the flow starts from.
        n_tasks: over all processes.

    Raises:
        ValueError: in every task the images of a class are all the same.
    """
    head = loss.adapter.head
    assert isinstance(head, RegularisedLDA), "the adapter classifies by an LDA"
    width = len(head.directions)
    theta = loss.start
    if loss.adapter.start_z is not None:
        theta = loss.adapter.theta(loss.adapter.start_z, theta)
    covariances = torch.zeros(width, width, device=accelerator.device, dtype=torch.float64)
    sums = torch.zeros(3, device=accelerator.device, dtype=torch.float64)
    bar = tqdm(total=n_tasks, desc="measuring the head", disable=not accelerator.is_main_process, mininterval=5)
    for episode in batches.first_episodes(n_tasks):
        (hidden,) = loss.forward_prefix([episode])
        features = loss.target.compute_features(theta, hidden).double()
        labels = torch.cat([episode.support_labels, episode.query_labels])
        covariance = within_covariance(features, labels)
        variance = covariance.diagonal().mean()
        if variance > 0:  # a randomised domain can be blank
            covariances += covariance / variance
            sums += torch.stack([torch.ones_like(variance), variance, spread_between(features, labels)])
        bar.update(min(accelerator.num_processes, n_tasks - bar.n))
    bar.close()
    n_measured, variance_sum, spread_sum = accelerator.reduce(sums)
    if n_measured == 0:
        raise ValueError(f"the LDA cannot be measured: in {n_tasks} tasks the images of each class are all the same.")
    covariance = variance_sum / n_measured * accelerator.reduce(covariances) / n_measured
    head.set_prior(covariance, (spread_sum / n_measured).item())
