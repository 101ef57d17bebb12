"""Calibration of an adapter: one number turns its cosines into logits whose softmax can be read as probabilities."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import AutoModel, PreTrainedModel

from ..arguments import exit_on_error, parse
from ..data.domains import Domain, load_domain, normalise
from ..data.episodes import cdfsl_episode
from ..modeling.adapter import HyperFlowAdapter
from .checkpoints import save_adapter

#: Most images of a class that calibration reads.
MAX_PER_CLASS = 60


@dataclass
class CalibrationConfig:
    """The settings of `calibrate`; the help of each field is in its metadata."""

    backbone: str = field(metadata={"help": "the target, a transformers vision model: Hub id or folder"})
    adapter: str = field(metadata={"help": "folder of the HyperFlow adapter"})
    dataset: list[str] = field(metadata={"help": "domains to calibrate on"})
    n_episodes: int = field(default=20, metadata={"help": "episodes of each domain"})
    seed: int = field(default=1, metadata={"help": "of the episodes"})


def calibrate(config: CalibrationConfig) -> tuple[float, float]:
    """Set the logit scale of a saved adapter to what suits 5-way 5-shot episodes best, and save it again.

    This is temperature scaling (Guo et al. 2017): one number is fitted to the query loss of the adapted backbone, and
    accuracies stay as they are.

    Returns:
        The scale before and after.
    """
    backbone = AutoModel.from_pretrained(config.backbone).float().eval()
    adapter = HyperFlowAdapter.from_pretrained(config.adapter).eval()
    assert adapter.processor is not None, "a trained adapter has an image processor"
    cosines, labels = [], []
    for source in config.dataset:
        domain = load_domain(source, adapter.processor, max_per_class=MAX_PER_CLASS)
        for index in tqdm(range(config.n_episodes), desc=domain.name, disable=None):
            episode_cosines, episode_labels = compute_cosines(adapter, backbone, domain, index, config.seed)
            cosines.append(episode_cosines)
            labels.append(episode_labels)
    before = adapter.logit_scale.exp().item()
    with torch.no_grad():
        adapter.logit_scale.fill_(best_logit_scale(torch.cat(cosines), torch.cat(labels)))
    save_adapter(adapter, config.adapter)
    return before, adapter.logit_scale.exp().item()


def compute_cosines(
    adapter: HyperFlowAdapter, backbone: PreTrainedModel, domain: Domain, index: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines `(n_query, n_way)` of the queries of a 5-way 5-shot episode with the adapted prototypes, and labels."""
    assert adapter.processor is not None
    episode = cdfsl_episode(domain, index, n_way=5, n_shot=5, seed=seed)
    support = normalise(domain.images[episode.support], adapter.processor)
    query = normalise(domain.images[episode.query], adapter.processor)
    task = adapter.adapt(backbone, (support, episode.support_labels))
    cosines = task.logits(query) / task.scale
    task.reset()
    return cosines, episode.query_labels


def best_logit_scale(cosines: torch.Tensor, labels: torch.Tensor) -> float:
    """The logarithm of the scale, between 1 and 100, with the least cross-entropy.

    Args:
        cosines: `(n, n_way)`.
        labels: `(n,)`.
    """
    candidates = torch.linspace(0, 4.6, 461)
    losses = torch.stack([F.cross_entropy(candidate.exp() * cosines, labels) for candidate in candidates])
    return candidates[losses.argmin()].item()


def main(argv: list[str] | None = None) -> None:
    """The command line of `training/calibrate.py`."""
    with exit_on_error():
        before, after = calibrate(parse(CalibrationConfig, argv))
    print(f"scale {before:.2f} -> {after:.2f}")
