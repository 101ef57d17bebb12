"""Does the flow read its support set? HyperFlow against the same flow, conditioned on something else.

    python training/conditioning.py --backbone model_cards/vit-s14-focus-70 --adapter model_cards/hyperflow-vit-s14-70 \
        --dataset TRAINING_DOMAIN [...] --unseen FILE_OR_HUB_ID [...] --output conditioning.json

On the same episodes of unseen domains, 5-way or of all classes there are, the backbone gets the weights where the flow
ends, conditioned on

- `own support`: the episode's support set, as HyperFlow does it;
- `next episode`: the support set of the domain's next episode, so other images and mostly other classes;
- `shuffled labels`: its own images, their labels shuffled among them;
- `other domain`: the support set of an episode of the next unseen domain (for the last one: of a training domain);
- `nothing`: the mean of where the flow ends on tasks of the training domains, an adapter that is the same for all.

Queries are always compared with the episode's own support images. The JSON has, for each condition and domain and for
the mean of the domains, the gain over the same classifier without the flow and what the own support set has more,
paired by episode, in points with 95 % half-widths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModel

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.arguments import parse
from hf_hyperflow.benchmark.evaluation import (
    DomainFeatures,
    compute_features,
    flow_thetas,
    mean_ci95,
    prototype_accuracy,
)
from hf_hyperflow.benchmark.results import over_domains
from hf_hyperflow.data.domains import load_domain
from hf_hyperflow.data.episodes import Episode, cdfsl_episode, episode_generator
from hf_hyperflow.modeling.backbones import eval_mode
from hf_hyperflow.modeling.saving import atomic_folder, write_json

OWN, NEXT, SHUFFLED, OTHER, NOTHING = "own support", "next episode", "shuffled labels", "other domain", "nothing"
CONDITIONS = (OWN, NEXT, SHUFFLED, OTHER, NOTHING)
WITHOUT = "without the flow"


@dataclass
class Arguments:
    backbone: str = field(metadata={"help": "the target: Hub id or folder"})
    adapter: str = field(metadata={"help": "the HyperFlow adapter: Hub id or folder"})
    dataset: list[str] = field(metadata={"help": "training domains, for the adapter that reads nothing"})
    unseen: list[str] = field(metadata={"help": "domains to report on"})
    output: str = field(metadata={"help": "JSON file to write"})
    n_episodes: int = field(default=60, metadata={"help": "episodes of each unseen domain"})
    n_training_episodes: int = field(default=5, metadata={"help": "episodes of each training domain"})
    n_shot: int = field(default=5, metadata={"help": "support images of a class"})
    seed: int = field(default=0, metadata={"help": "of the episodes"})

    def __post_init__(self) -> None:
        if not self.after_the_last:
            raise SystemExit(f"error: --dataset needs a domain beside {self.unseen[-1]}, to condition on another one.")
        if min(self.n_episodes, self.n_training_episodes, self.n_shot) < 1:
            raise SystemExit("error: --n_episodes, --n_training_episodes and --n_shot must be at least 1.")

    @property
    def after_the_last(self) -> list[str]:
        """Training domains, those that are the last unseen one left out."""
        return [source for source in self.dataset if source != self.unseen[-1]]


class Flow:
    """Where the flow of an adapter ends, and how well the backbone classifies from there.

    Args:
        backbone: at its start, with the adapter in it or not.
        a: numbers of the episodes.
    """

    def __init__(self, adapter: HyperFlowAdapter, backbone: torch.nn.Module, a: Arguments):
        self.adapter, self.a = adapter, a
        self.split = adapter.split(backbone)
        self.injection = adapter.space.inject(backbone)

    def load(self, source: str) -> DomainFeatures:
        return DomainFeatures(self.split, load_domain(source, self.adapter.processor), self.adapter.processor)

    def episode(self, features: DomainFeatures, index: int) -> Episode:
        return cdfsl_episode(features.domain, index, n_way=5, n_shot=self.a.n_shot, seed=self.a.seed)

    def end(self, features: DomainFeatures, episode: Episode) -> torch.Tensor:
        """Weights `(n_tokens, token_dim)` at t = 1, conditioned on an episode's support set."""
        return flow_thetas(self.adapter, features, self.injection.start, episode)[1][-1]

    def accuracy(self, features: DomainFeatures, episode: Episode, theta: torch.Tensor) -> float:
        """Accuracy in % of the backbone with these weights."""
        self.injection.write(theta)
        found = compute_features(self.split, features.hidden(torch.cat([episode.support, episode.query])))
        self.injection.write(self.injection.start)
        return prototype_accuracy(found, episode, self.adapter.head)


def shuffled(episode: Episode, seed: int) -> Episode:
    """The episode with the labels of its support images shuffled among them."""
    order = episode_generator(seed, f"{episode.domain}, shuffled labels", episode.index).permutation(
        len(episode.support)
    )
    return replace(episode, support_labels=episode.support_labels[torch.from_numpy(order)])


def accuracies(
    flow: Flow, features: DomainFeatures, other: DomainFeatures, same_for_all: torch.Tensor
) -> Iterator[dict[str, float]]:
    """Accuracy in % by condition, of one episode of a domain after the other.

    Args:
        other: what the flow reads for `other domain`.
        same_for_all: weights `(n_tokens, token_dim)` for `nothing`.
    """
    for index in range(flow.a.n_episodes):
        episode = flow.episode(features, index)
        thetas = {
            WITHOUT: flow.injection.start,
            OWN: flow.end(features, episode),
            NEXT: flow.end(features, flow.episode(features, index + 1)),
            SHUFFLED: flow.end(features, shuffled(episode, flow.a.seed)),
            OTHER: flow.end(other, flow.episode(other, index)),
            NOTHING: same_for_all,
        }
        yield {condition: flow.accuracy(features, episode, theta) for condition, theta in thetas.items()}


def records(by_domain: dict[str, list[dict[str, float]]]) -> list[dict]:
    """For each condition one record per domain, then one for the mean over domains (`domain` null).

    Args:
        by_domain: accuracies in % by condition, an entry per episode.
    """
    found = []
    for condition in CONDITIONS:
        mine = []
        for domain, rows in by_domain.items():
            gain, gain_ci95 = mean_ci95([row[condition] - row[WITHOUT] for row in rows])
            more, more_ci95 = mean_ci95([row[OWN] - row[condition] for row in rows])
            figures = {"gain": gain, "gain_ci95": gain_ci95, "own_has_more": more, "own_has_more_ci95": more_ci95}
            rounded = {key: None if value != value else round(value, 4) for key, value in figures.items()}
            mine.append({"condition": condition, "domain": domain, "n_episodes": len(rows)} | rounded)
        mean = {"condition": condition, "domain": None, "n_episodes": sum(r["n_episodes"] for r in mine)}
        for key in ("gain", "own_has_more"):
            pair = over_domains([r[key] for r in mine], [r[f"{key}_ci95"] for r in mine])
            mean |= dict(zip((key, f"{key}_ci95"), pair, strict=True))
        found += [*mine, mean]
    return found


@torch.no_grad()
def main() -> None:
    a = parse(Arguments)
    with atomic_folder(Path(a.output).parent):
        pass  # that nothing can be written there is to be known now, not after all the work
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = AutoModel.from_pretrained(a.backbone).float().eval().to(device)
    adapter = HyperFlowAdapter.from_pretrained(a.adapter).eval().to(device)
    flow = Flow(adapter, backbone, a)
    with eval_mode(backbone), eval_mode(adapter):
        ends = []
        for source in tqdm(a.dataset, desc="training domains", disable=None):
            features = flow.load(source)
            ends += [flow.end(features, flow.episode(features, i)) for i in range(a.n_training_episodes)]
        same_for_all = torch.stack(ends).mean(dim=0)
        by_domain, domains = {}, [flow.load(source) for source in (*a.unseen, a.after_the_last[0])]
        for features, other in pairwise(domains):
            rows = accuracies(flow, features, other, same_for_all)
            by_domain[features.domain.name] = list(
                tqdm(rows, total=a.n_episodes, desc=features.domain.name, disable=None)
            )
    found = records(by_domain)
    for record in found:
        if record["domain"] is None:
            print({key: value for key, value in record.items() if key != "domain"})
    write_json(a.output, {"n_shot": a.n_shot, "seed": a.seed, "records": found})


if __name__ == "__main__":
    main()
