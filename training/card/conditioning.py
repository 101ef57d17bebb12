"""Does the flow read its support set? HyperFlow against the same flow, conditioned on something else.

    python -m training.card.conditioning --backbone model_cards/vit-s14-focus-70 \
        --adapter model_cards/hyperflow-vit-s14-70 --dataset TRAINING_DOMAIN [...] --unseen FILE_OR_HUB_ID [...] \
        --output_file conditioning.json

The episodes are those of unseen domains, 5-way or of all classes there are. The backbone gets the weights at the end of
a flow that is conditioned on one of these:

- `own support set`: that of the episode, as HyperFlow does it;
- `other episode`: the support set of the domain's next episode, which has other images and mostly other classes;
- `shuffled labels`: the episode's own images, their labels shuffled among them;
- `other domain`: the support set of an episode of the next unseen domain (for the last one: of a training domain);
- `unconditional`: the mean of the weights that the flow gives on tasks of the training domains, the same for all tasks.

Queries are always compared with the episode's own support images. The JSON has a record for each condition and domain,
and one for the mean of the domains. `gain` is the accuracy minus that of the same head without the flow.
`own_advantage` is the accuracy of `own support set` minus that of the condition. Both are paired by episode, in points
with the half-widths of 95 % intervals.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModel

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.arguments import parse
from hf_hyperflow.benchmark.domain_features import DomainFeatures
from hf_hyperflow.benchmark.evaluation import label_accuracy, mean_ci95
from hf_hyperflow.benchmark.methods import Classifier, HyperFlow, NearestPrototype, NoFlow, Target
from hf_hyperflow.benchmark.methods.hyperflow import flow_features
from hf_hyperflow.benchmark.results import average_over_domains
from hf_hyperflow.data.domains import load_domain
from hf_hyperflow.data.episodes import Episode, cdfsl_episode, episode_generator
from hf_hyperflow.modeling.atomic_file import write_json
from hf_hyperflow.modeling.saving import atomic_folder
from hf_hyperflow.modeling.trunks import eval_mode

from .records import Records, column

OWN, OTHER_EPISODE, SHUFFLED = "own support set", "other episode", "shuffled labels"
OTHER_DOMAIN, UNCONDITIONAL = "other domain", "unconditional"
CONDITIONS = (OWN, OTHER_EPISODE, SHUFFLED, OTHER_DOMAIN, UNCONDITIONAL)

#: Accuracies in % of an episode, by condition and for the head without the flow.
Accuracies = dict[str, float]


@dataclass
class Arguments:
    backbone: str = field(metadata={"help": "the target: Hub id or folder"})
    adapter: str = field(metadata={"help": "the HyperFlow adapter: Hub id or folder"})
    dataset: list[str] = field(metadata={"help": "training domains, for the weights that are the same for all tasks"})
    unseen: list[str] = field(metadata={"help": "domains to report on"})
    output_file: str = field(metadata={"help": "JSON file to write"})
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
        """The training domains but the last unseen one, which may be among them."""
        return [source for source in self.dataset if source != self.unseen[-1]]


class Experiment:
    """A flow that is conditioned on what it should not be.

    Args:
        target: the backbone and the adapter.
        arguments: numbers of the episodes.
    """

    def __init__(self, target: Target, arguments: Arguments):
        self.target = target
        self.arguments = arguments

    def load(self, source: str) -> DomainFeatures:
        return DomainFeatures(self.target, load_domain(source, self.target.processor))

    def draw_episode(self, domain: DomainFeatures, index: int) -> Episode:
        arguments = self.arguments
        return cdfsl_episode(domain.domain, index, n_way=5, n_shot=arguments.n_shot, seed=arguments.seed)

    def generate(self, domain: DomainFeatures, episode: Episode) -> torch.Tensor:
        """Weights `(n_tokens, token_dim)` at t = 1, conditioned on the support set of an episode."""
        return HyperFlow().follow_flow(domain.support(episode)).theta

    def compute_unconditional(self) -> torch.Tensor:
        """The mean of the generated weights over tasks of the training domains, `(n_tokens, token_dim)`."""
        thetas = []
        for source in tqdm(self.arguments.dataset, desc="training domains", disable=None):
            domain = self.load(source)
            for index in range(self.arguments.n_training_episodes):
                thetas.append(self.generate(domain, self.draw_episode(domain, index)))
        return torch.stack(thetas).mean(dim=0)

    def evaluate_episode(
        self, domain: DomainFeatures, other: DomainFeatures, index: int, unconditional: torch.Tensor
    ) -> Accuracies:
        """Accuracies on one episode.

        Args:
            other: the domain that the flow reads for `other domain`.
            unconditional: weights `(n_tokens, token_dim)`.
        """
        episode = self.draw_episode(domain, index)
        thetas = {
            OWN: self.generate(domain, episode),
            OTHER_EPISODE: self.generate(domain, self.draw_episode(domain, index + 1)),
            SHUFFLED: self.generate(domain, shuffle_labels(episode, self.arguments.seed)),
            OTHER_DOMAIN: self.generate(other, self.draw_episode(other, index)),
            UNCONDITIONAL: unconditional,
        }
        support, queries = domain.support(episode), domain.queries(episode)

        def measure(classifier: Classifier) -> float:
            return label_accuracy(classifier.predict(queries), episode.query_labels)

        no_flow = NoFlow()
        accuracies = {no_flow.name: measure(no_flow.fit(support))}
        for condition, theta in thetas.items():
            classifier = NearestPrototype(flow_features(support, theta), support, self.target.adapter.head)
            accuracies[condition] = measure(classifier)
        return accuracies

    def run(self) -> dict[str, list[Accuracies]]:
        """Accuracies by domain, one entry per episode."""
        unconditional = self.compute_unconditional()
        domains = [self.load(source) for source in (*self.arguments.unseen, self.arguments.after_the_last[0])]
        by_domain = {}
        for domain, other in pairwise(domains):
            name = domain.domain.name
            episodes = []
            for index in tqdm(range(self.arguments.n_episodes), desc=name, disable=None):
                episodes.append(self.evaluate_episode(domain, other, index, unconditional))
            by_domain[name] = episodes
        return by_domain


def shuffle_labels(episode: Episode, seed: int) -> Episode:
    """The episode with the labels of its support images shuffled among them."""
    generator = episode_generator(seed, f"{episode.domain}, shuffled labels", episode.index)
    order = torch.from_numpy(generator.permutation(len(episode.support)))
    return replace(episode, support_labels=episode.support_labels[order])


def summarise(by_domain: dict[str, list[Accuracies]]) -> Records:
    """For each condition one record per domain, then one for the mean over domains (`domain` null)."""
    records = []
    for condition in CONDITIONS:
        of_condition = []
        for domain, episodes in by_domain.items():
            of_condition.append(_summarise_domain(condition, domain, episodes))
        records += [*of_condition, _mean_record(condition, of_condition)]
    return records


def _summarise_domain(condition: str, domain: str, episodes: list[Accuracies]) -> dict[str, Any]:
    gain, gain_ci95 = _mean_difference(episodes, condition, NoFlow.name)
    advantage, advantage_ci95 = _mean_difference(episodes, OWN, condition)
    return {
        "condition": condition,
        "domain": domain,
        "n_episodes": len(episodes),
        "gain": gain,
        "gain_ci95": gain_ci95,
        "own_advantage": advantage,
        "own_advantage_ci95": advantage_ci95,
    }


def _mean_difference(episodes: list[Accuracies], condition: str, other: str) -> tuple[float, float | None]:
    """The mean of the paired differences and its half-width, None for a single episode."""
    mean, half_width = mean_ci95([accuracies[condition] - accuracies[other] for accuracies in episodes])
    if len(episodes) == 1:
        return round(mean, 4), None
    return round(mean, 4), round(half_width, 4)


def _mean_record(condition: str, records: Records) -> dict[str, Any]:
    """The mean over domains."""
    mean: dict[str, Any] = {"condition": condition, "domain": None}
    mean["n_episodes"] = sum(column(records, "n_episodes"))
    for key in ("gain", "own_advantage"):
        values, half_widths = column(records, key), column(records, f"{key}_ci95")
        mean[key], mean[f"{key}_ci95"] = average_over_domains(values, half_widths)
    return mean


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    arguments = parse(Arguments, argv)
    with atomic_folder(Path(arguments.output_file).parent):
        pass  # raises now, and not after all the work, where nothing can be written
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = AutoModel.from_pretrained(arguments.backbone).float().eval().to(device)
    adapter = HyperFlowAdapter.from_pretrained(arguments.adapter).eval().to(device)
    with eval_mode(backbone), eval_mode(adapter):
        by_domain = Experiment(Target(backbone, adapter), arguments).run()
    records = summarise(by_domain)
    for record in records:
        if record["domain"] is None:
            print(record)
    write_json(arguments.output_file, {"n_shot": arguments.n_shot, "seed": arguments.seed, "records": records})


if __name__ == "__main__":
    main()
