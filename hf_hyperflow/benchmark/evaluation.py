"""Accuracy over episodes: means, 95 % intervals, and differences paired by episode."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..data.domains import Domain, normalise
from ..data.episodes import Episode, cdfsl_episode
from ..modeling.adapter import HyperFlowAdapter
from ..modeling.backbones import Hidden, SplitBackbone, eval_mode
from ..modeling.prototypes import Head, PrototypeClassifier, unit_means


def mean_ci95(values: np.ndarray) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval, 1.96 s / sqrt(N) with ddof 1; NaN for a single value."""
    values = np.asarray(values, dtype=np.float64)
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return float(values.mean()), float(half)


@dataclass(frozen=True)
class Comparison:
    """Accuracies in % on the same episodes, `(n_episodes,)` each: of direct transfer, of the adapter's classifier
    without the flow, and of HyperFlow.
    """

    domain: str
    n_way: int
    n_shot: int
    direct: np.ndarray
    no_flow: np.ndarray
    adapted: np.ndarray

    def summary(self) -> dict[str, float]:
        """Means, the paired difference, the part of it that is the flow's, and their 95 % half-widths, in points."""
        columns = {
            "direct": self.direct,
            "no_flow": self.no_flow,
            "hyperflow": self.adapted,
            "difference": self.adapted - self.direct,
            "flow": self.adapted - self.no_flow,
        }
        figures = {}
        for name, values in columns.items():
            mean, half_width = mean_ci95(values)
            figures[name], figures[f"{name}_ci95"] = round(mean, 2), round(half_width, 2)
        return figures


class DomainFeatures:
    """What the frozen first blocks, and the plain backbone, compute of a domain's images, each image once.

    Hidden states are kept in half precision, all on the CPU. An image is always run together with the same others,
    those of its block of `BLOCK` rows: what is found does not depend on which images were asked for before.
    """

    BLOCK = 32

    def __init__(self, split: SplitBackbone, domain: Domain, processor: BaseImageProcessor):
        self.split = split
        self.domain = domain
        self.processor = processor
        self._states: torch.Tensor | None = None
        self._known = torch.zeros(-(-len(domain) // self.BLOCK), dtype=torch.bool)
        self._plain: dict[int, torch.Tensor] = {}
        self._rest: tuple = ((), {})

    @torch.no_grad()
    def hidden(self, rows: torch.Tensor) -> Hidden:
        """Hidden states of the images `rows`, on the backbone's device and in its precision."""
        parameter = next(self.split.backbone.parameters())
        blocks = (rows // self.BLOCK).unique()
        for block in blocks[~self._known[blocks]].tolist():
            chunk = slice(block * self.BLOCK, (block + 1) * self.BLOCK)
            pixels = normalise(self.domain.images[chunk].to(parameter.device), self.processor).to(parameter.dtype)
            found = self.split.forward_prefix(pixels)
            self._rest = (found.args, found.kwargs)
            if self._states is None:
                self._states = torch.empty(len(self.domain), *found.states.shape[1:], dtype=torch.float16)
            self._states[chunk] = found.states.half().cpu()
            self._known[block] = True
        return Hidden(self._states[rows].to(parameter.device, parameter.dtype), *self._rest)

    @torch.no_grad()
    def plain(self, rows: torch.Tensor) -> torch.Tensor:
        """Features `(n, width)` float32 of the images `rows` with the backbone as it is: call it with an adapter in it
        at its start only. With a middle they have both halves.
        """
        places = [divmod(row, self.BLOCK) for row in rows.tolist()]
        for block in {block for block, _ in places} - self._plain.keys():
            chunk = torch.arange(block * self.BLOCK, min((block + 1) * self.BLOCK, len(self.domain)))
            self._plain[block] = self.split.forward_suffix(self.hidden(chunk)).float()
        return torch.stack([self._plain[block][place] for block, place in places])


def compute_features(split: SplitBackbone, hidden: Hidden, batch_size: int = 512) -> torch.Tensor:
    """Features `(n, width)` float32 of what the first blocks computed, with the backbone as it is now."""
    parts = [
        split.forward_suffix(hidden[start : start + batch_size]) for start in range(0, len(hidden.states), batch_size)
    ]
    return torch.cat(parts).float()


def prototype_accuracy(features: torch.Tensor, episode: Episode, head: Head = unit_means) -> float:
    """Accuracy in % of the prototype classifier on an episode.

    Args:
        features: `(n_support + n_query, width)`, the support images first.
        head: makes prototypes of the support features.
    """
    n_support = len(episode.support)
    labels, query_labels = episode.support_labels.to(features.device), episode.query_labels.to(features.device)
    classifier = PrototypeClassifier.from_support(features[:n_support], labels, head=head)
    logits = classifier(features[n_support:])
    return 100 * (logits.argmax(-1) == query_labels).float().mean().item()


@torch.no_grad()
def flow_thetas(
    adapter: HyperFlowAdapter,
    features: DomainFeatures,
    start: torch.Tensor,
    episode: Episode,
    *,
    n_steps: int | None = None,
    end_time: float = 1.0,
) -> tuple[list[float], list[torch.Tensor]]:
    """Where the flow from `start` comes by with an episode's support set: times from 0 to `end_time`, and theta
    `(n_tokens, token_dim)` at each.
    """
    pixels = normalise(features.domain.images[episode.support], adapter.processor)
    tasks, _ = adapter.encode(features.split, pixels, episode.support_labels, features.hidden(episode.support))
    trajectory = adapter.flow(tasks, n_steps=n_steps, end_time=end_time)
    return trajectory.times, [adapter.theta(z[0], start) for z in trajectory.states]


@torch.no_grad()
def compare_flow(
    adapter: HyperFlowAdapter,
    backbone: PreTrainedModel,
    domain: Domain,
    *,
    n_episodes: int,
    n_shot: int,
    n_way: int = 5,
    n_query: int = 15,
    seed: int = 0,
    n_steps: int | None = None,
) -> Comparison:
    """Direct transfer against the flow on the same CD-FSL episodes of a domain.

    A domain with fewer classes than `n_way` is run with those it has. The backbone is left as it was; an adapter that
    was in it stays in.

    Raises:
        ValueError: no episodes, or the domain has too few images for one.
    """
    if n_episodes < 1:
        raise ValueError(f"n_episodes must be at least 1, not {n_episodes}.")
    split, was_in = adapter.split(backbone), adapter.space.is_in(backbone)
    injection = adapter.space.inject(backbone)
    features = DomainFeatures(split, domain, adapter.processor)
    direct, no_flow, adapted = [], [], []
    try:
        with eval_mode(backbone), eval_mode(adapter):
            for index in range(n_episodes):
                episode = cdfsl_episode(domain, index, n_way=n_way, n_shot=n_shot, n_query=n_query, seed=seed)
                rows = torch.cat([episode.support, episode.query])
                with injection.using(injection.start):
                    plain = features.plain(rows)
                direct.append(prototype_accuracy(split.final_features(plain), episode))
                no_flow.append(prototype_accuracy(plain, episode, adapter.head))
                _, thetas = flow_thetas(adapter, features, injection.start, episode, n_steps=n_steps)
                with injection.using(thetas[-1]):
                    moved = compute_features(split, features.hidden(rows))
                adapted.append(prototype_accuracy(moved, episode, adapter.head))
    finally:
        if not was_in:
            injection.remove()
    return Comparison(
        domain=domain.name,
        n_way=episode.n_way,
        n_shot=n_shot,
        direct=np.array(direct),
        no_flow=np.array(no_flow),
        adapted=np.array(adapted),
    )
