"""Does a flow read its support set? The flow of a task, conditioned on something else than the task's support set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from ..data.domains import Domain
from ..data.episodes import Episode, episode_generator
from .domain_features import DomainFeatures
from .evaluation import label_accuracy
from .methods import Classifier, HyperFlow, NearestPrototype, NoFlow, Target
from .methods.hyperflow import flow_features

OWN, OTHER_EPISODE, SHUFFLED = "own support set", "other episode", "shuffled labels"
OTHER_DOMAIN, UNCONDITIONAL = "other domain", "unconditional"
#: How many times as far from the unconditional weights as the flow of the own support set.
AMPLIFICATIONS = {2: "own support set, 2 times as far", 4: "own support set, 4 times as far"}
#: Longer ways from the backbone as it is.
TWICE_OWN, TWICE_UNCONDITIONAL = "twice the way of the own support set", "twice the unconditional way"
SUM = "the unconditional way, then that of the own support set"
CONDITIONS = (
    OWN,
    OTHER_EPISODE,
    SHUFFLED,
    OTHER_DOMAIN,
    UNCONDITIONAL,
    *AMPLIFICATIONS.values(),
    TWICE_OWN,
    TWICE_UNCONDITIONAL,
    SUM,
)

#: Accuracies in % of an episode, by condition and for the head without the flow.
Accuracies = dict[str, float]

DrawEpisode = Callable[[Domain, int], Episode]


@dataclass(frozen=True)
class ConditioningTest:
    """A flow that is conditioned on what it should not be.

    The backbone gets the weights at the end of a flow that is conditioned on one of these:

    - `own support set`: that of the episode, as HyperFlow does it;
    - `other episode`: the support set of the domain's next episode, which has other images and mostly other classes;
    - `shuffled labels`: the episode's own images, their labels shuffled among them;
    - `other domain`: the support set of an episode of another domain;
    - `unconditional`: the mean of the weights that the flow gives on tasks of many domains, the same for all tasks;
    - `own support set, k times as far`: that mean, plus k times the difference that the own support set makes;
    - `twice the way of ...`: the way from the backbone as it is to the weights, theta(1) - theta(0), is doubled;
    - `the unconditional way, then that of the own support set`: the sum of both ways.

    Queries are always compared with the episode's own support images.

    Attributes:
        target: the backbone and the adapter.
        draw: draws episode 0, 1, ... of a domain.
        seed: of the shuffled labels.
    """

    target: Target
    draw: DrawEpisode
    seed: int = 0

    def generate(self, domain: DomainFeatures, episode: Episode) -> torch.Tensor:
        """Weights `(n_tokens, token_dim)` at t = 1, conditioned on the support set of an episode."""
        return HyperFlow().follow_flow(domain.support(episode)).theta

    def average_weights(self, domains: Iterable[DomainFeatures], n_episodes: int) -> torch.Tensor:
        """The mean `(n_tokens, token_dim)` of the generated weights over the first episodes of domains."""
        thetas = []
        for domain in domains:
            for index in range(n_episodes):
                thetas.append(self.generate(domain, self.draw(domain.domain, index)))
        return torch.stack(thetas).mean(dim=0)

    def evaluate_episode(
        self, domain: DomainFeatures, other: DomainFeatures, index: int, unconditional: torch.Tensor
    ) -> Accuracies:
        """Accuracies on one episode, by condition and for the head without the flow.

        Args:
            other: the domain that the flow reads for `other domain`.
            unconditional: weights `(n_tokens, token_dim)`.
        """
        episode = self.draw(domain.domain, index)
        own = self.generate(domain, episode)
        thetas = {
            OWN: own,
            OTHER_EPISODE: self.generate(domain, self.draw(domain.domain, index + 1)),
            SHUFFLED: self.generate(domain, shuffle_labels(episode, self.seed)),
            OTHER_DOMAIN: self.generate(other, self.draw(other.domain, index)),
            UNCONDITIONAL: unconditional,
        }
        for times, condition in AMPLIFICATIONS.items():
            thetas[condition] = unconditional + times * (own - unconditional)
        start = self.target.adapter.space.inject(self.target.backbone).start
        thetas[TWICE_OWN] = start + 2 * (own - start)
        thetas[TWICE_UNCONDITIONAL] = start + 2 * (unconditional - start)
        thetas[SUM] = own + (unconditional - start)
        return self.measure_weights(domain, episode, thetas)

    def measure_weights(self, domain: DomainFeatures, episode: Episode, thetas: dict[str, torch.Tensor]) -> Accuracies:
        """Accuracies on an episode with given weights of the adapter, and of the head without the flow."""
        support, queries = domain.support(episode), domain.queries(episode)

        def measure(classifier: Classifier) -> float:
            return label_accuracy(classifier.predict(queries), episode.query_labels)

        no_flow = NoFlow()
        accuracies = {no_flow.name: measure(no_flow.fit(support))}
        for condition, theta in thetas.items():
            classifier = NearestPrototype(flow_features(support, theta), support, self.target.adapter.head)
            accuracies[condition] = measure(classifier)
        return accuracies


def shuffle_labels(episode: Episode, seed: int) -> Episode:
    """The episode with the labels of its support images shuffled among them."""
    generator = episode_generator(seed, f"{episode.domain}, shuffled labels", episode.index)
    order = torch.from_numpy(generator.permutation(len(episode.support)))
    return replace(episode, support_labels=episode.support_labels[order])


def list_differences(episodes: Sequence[Accuracies], condition: str, other: str) -> list[float]:
    """The paired differences of two conditions, one per episode, in points."""
    return [accuracies[condition] - accuracies[other] for accuracies in episodes]
