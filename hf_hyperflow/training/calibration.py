"""Calibrate an adapter: the scale of its cosine logits that suits 5-way 5-shot episodes of the given domains best.

    python training/calibrate.py --backbone BACKBONE --adapter outputs/adapter --dataset FILE_OR_HUB_ID [...]

Temperature scaling (Guo et al. 2017): one number is fitted to the query loss of the adapted model, accuracies stay as
they are. Use training or validation domains. The adapter's folder is rewritten.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import AutoModel

from hf_hyperflow import HyperFlowAdapter

from ..arguments import parse
from ..data.domains import load_domain, normalise
from ..data.episodes import cdfsl_episode
from .checkpoints import save_adapter


@dataclass
class Arguments:
    backbone: str = field(metadata={"help": "the target: Hub id or folder"})
    adapter: str = field(metadata={"help": "folder of the HyperFlow adapter"})
    dataset: list[str] = field(metadata={"help": "domains to calibrate on"})
    n_episodes: int = field(default=20, metadata={"help": "episodes of each domain"})
    seed: int = field(default=1, metadata={"help": "of the episodes"})


def best_logit_scale(cosines: torch.Tensor, labels: torch.Tensor) -> float:
    """Logarithm of the scale in 1..100 with the least cross-entropy; cosines `(n, n_way)`, labels `(n,)`."""
    candidates = torch.linspace(0, 4.6, 461)
    losses = torch.stack([F.cross_entropy(c.exp() * cosines, labels) for c in candidates])
    return candidates[losses.argmin()].item()


@torch.no_grad()
def main() -> None:
    arguments = parse(Arguments)
    backbone = AutoModel.from_pretrained(arguments.backbone).float().eval()
    adapter = HyperFlowAdapter.from_pretrained(arguments.adapter).eval()
    cosines, labels = [], []
    for source in arguments.dataset:
        domain = load_domain(source, adapter.processor, max_per_class=60)
        for index in tqdm(range(arguments.n_episodes), desc=domain.name, disable=None):
            episode = cdfsl_episode(domain, index, n_way=5, n_shot=5, seed=arguments.seed)
            support, query = (
                normalise(domain.images[rows], adapter.processor) for rows in (episode.support, episode.query)
            )
            task = adapter.adapt(backbone, (support, episode.support_labels))
            cosines.append(task.logits(query) / task.scale)
            labels.append(episode.query_labels)
            task.reset()
    logit_scale = best_logit_scale(torch.cat(cosines), torch.cat(labels))
    print(f"scale {adapter.logit_scale.exp().item():.2f} -> {torch.tensor(logit_scale).exp().item():.2f}")
    adapter.logit_scale.fill_(logit_scale)
    save_adapter(adapter, arguments.adapter)
