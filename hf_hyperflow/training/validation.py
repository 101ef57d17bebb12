"""Validation of an adapter in training: HyperFlow against direct transfer on domains that it is not trained on."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from ..benchmark.evaluation import compare_flow
from ..data.domains import Domain
from ..modeling.adapter import HyperFlowAdapter


def compare_on_domains(
    accelerator: Accelerator,
    adapter: HyperFlowAdapter,
    backbone: PreTrainedModel,
    domains: list[Domain],
    *,
    n_episodes: int,
) -> dict[str, dict[str, float]]:
    """Compare an adapter with direct transfer on 5-shot episodes. The domains are dealt out to the processes.

    Returns:
        By domain, accuracies in % and their paired differences in percentage points. Every process gets all of them.
    """
    summaries = []
    with accelerator.autocast():
        for domain in domains[accelerator.process_index :: accelerator.num_processes]:
            comparison = compare_flow(adapter, backbone, domain, n_episodes=n_episodes, n_shot=5)
            summaries.append((domain.name, comparison.summary()))
    gathered = dict(gather_object(summaries))
    return {domain.name: gathered[domain.name] for domain in domains}
