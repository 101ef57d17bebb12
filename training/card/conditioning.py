"""Does the flow read its support set? HyperFlow against the same flow, conditioned on something else.

    python -m training.card.conditioning --backbone model_cards/vit-s14-focus-70 \
        --adapter model_cards/hyperflow-vit-s14-70 --dataset TRAINING_DOMAIN [...] --unseen FILE_OR_HUB_ID [...] \
        --output_file conditioning.json

`hf_hyperflow.benchmark.conditioning.ConditioningTest` says what the conditions are. `other domain` is the next unseen
domain (for the last one: a training domain). `unconditional` is the mean over the training domains. `--protocol` and
`--n_way` choose the episodes.

The JSON has a record for each condition and domain, and one for the mean of the domains. `gain` is the accuracy minus
that of the same head without the flow. `own_advantage` is the accuracy of `own support set` minus that of the
condition. Both are paired by episode, in points with the half-widths of 95 % intervals. `shares` says how much of the
way of the flow is the same for all tasks, how much differs between domains and how much between tasks of one domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModel

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.arguments import parse
from hf_hyperflow.benchmark.conditioning import CONDITIONS, OWN, Accuracies, ConditioningTest, list_differences
from hf_hyperflow.benchmark.domain_features import DomainFeatures
from hf_hyperflow.benchmark.endpoints import DomainWays, share_endpoints
from hf_hyperflow.benchmark.evaluation import mean_ci95
from hf_hyperflow.benchmark.methods import NoFlow, Target
from hf_hyperflow.benchmark.results import average_over_domains
from hf_hyperflow.data.domains import Domain, load_domain
from hf_hyperflow.data.episodes import PROTOCOLS, Episode, draw_episode
from hf_hyperflow.modeling.atomic_file import write_json
from hf_hyperflow.modeling.saving import atomic_folder
from hf_hyperflow.modeling.trunks import eval_mode

from .records import Records, column


@dataclass
class Arguments:
    backbone: str = field(metadata={"help": "the target: Hub id or folder"})
    adapter: str = field(metadata={"help": "the HyperFlow adapter: Hub id or folder"})
    dataset: list[str] = field(metadata={"help": "training domains, for the weights that are the same for all tasks"})
    unseen: list[str] = field(metadata={"help": "domains to report on"})
    output_file: str = field(metadata={"help": "JSON file to write"})
    n_episodes: int = field(default=60, metadata={"help": "episodes of each unseen domain"})
    n_training_episodes: int = field(default=5, metadata={"help": "episodes of each training domain"})
    protocol: str = field(default="cdfsl", metadata={"help": f"one of {', '.join(PROTOCOLS)}"})
    n_way: int = field(default=5, metadata={"help": "classes of an episode, or all where there are fewer (cdfsl)"})
    n_shot: int = field(default=5, metadata={"help": "support images of a class (cdfsl)"})
    seed: int = field(default=0, metadata={"help": "of the episodes"})

    def __post_init__(self) -> None:
        if not self.after_the_last:
            raise SystemExit(f"error: --dataset needs a domain beside {self.unseen[-1]}, to condition on another one.")
        if min(self.n_episodes, self.n_training_episodes, self.n_shot) < 1:
            raise SystemExit("error: --n_episodes, --n_training_episodes and --n_shot must be at least 1.")
        if self.n_way < 2:
            raise SystemExit("error: --n_way must be at least 2.")
        if self.protocol not in PROTOCOLS:
            raise SystemExit(f"error: --protocol must be one of {', '.join(PROTOCOLS)}, not {self.protocol!r}.")

    @property
    def after_the_last(self) -> list[str]:
        """The training domains but the last unseen one, which may be among them."""
        return [source for source in self.dataset if source != self.unseen[-1]]

    def draw(self, domain: Domain, index: int) -> Episode:
        """Episode `index` of a domain, of the protocol that was chosen."""
        return draw_episode(self.protocol, domain, index, n_way=self.n_way, n_shot=self.n_shot, seed=self.seed)


class Experiment:
    """The test on several domains.

    Args:
        target: the backbone and the adapter.
        arguments: domains and numbers of the episodes.
    """

    def __init__(self, target: Target, arguments: Arguments):
        self.target = target
        self.arguments = arguments
        self.test = ConditioningTest(target, arguments.draw, arguments.seed)

    def load(self, source: str) -> DomainFeatures:
        return DomainFeatures(self.target, load_domain(source, self.target.processor))

    def compute_unconditional(self) -> torch.Tensor:
        """The mean of the generated weights over tasks of the training domains, `(n_tokens, token_dim)`."""
        sources = tqdm(self.arguments.dataset, desc="training domains", disable=None)
        return self.test.average_weights(map(self.load, sources), self.arguments.n_training_episodes)

    def run(self) -> tuple[dict[str, list[Accuracies]], list[DomainWays]]:
        """Accuracies by domain, one entry per episode, and the ways of the flow on each domain."""
        unconditional = self.compute_unconditional()
        domains = [self.load(source) for source in (*self.arguments.unseen, self.arguments.after_the_last[0])]
        by_domain, ways = {}, []
        for domain, other in pairwise(domains):
            name = domain.domain.name
            episodes = []
            for index in tqdm(range(self.arguments.n_episodes), desc=name, disable=None):
                episodes.append(self.test.evaluate_episode(domain, other, index, unconditional))
            by_domain[name] = episodes
            ways.append(self._measure_ways(domain))
        return by_domain, ways

    def _measure_ways(self, domain: DomainFeatures) -> DomainWays:
        """The ways theta(1) - theta(0) of the flow on the episodes of a domain."""
        start = self.target.adapter.space.inject(self.target.backbone).start
        ways = []
        for index in range(self.arguments.n_episodes):
            ways.append(self.test.generate(domain, self.arguments.draw(domain.domain, index)) - start)
        return DomainWays.of(ways)


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
    mean, half_width = mean_ci95(list_differences(episodes, condition, other))
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


def compute_shares(ways: Sequence[DomainWays]) -> dict[str, float] | None:
    """The parts of the way of the flow, see `share_endpoints`; None where there are too few domains or episodes."""
    if len(ways) < 2 or min(domain.n_tasks for domain in ways) < 2:
        return None
    return asdict(share_endpoints(ways))


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    arguments = parse(Arguments, argv)
    with atomic_folder(Path(arguments.output_file).parent):
        pass  # raises now, and not after all the work, where nothing can be written
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = AutoModel.from_pretrained(arguments.backbone).float().eval().to(device)
    adapter = HyperFlowAdapter.from_pretrained(arguments.adapter).eval().to(device)
    with eval_mode(backbone), eval_mode(adapter):
        by_domain, ways = Experiment(Target(backbone, adapter), arguments).run()
    records = summarise(by_domain)
    for record in records:
        if record["domain"] is None:
            print(record)
    shares = compute_shares(ways)
    if shares is not None:
        print("shares of the way:", shares)
    content = {"protocol": arguments.protocol, "n_way": arguments.n_way, "n_shot": arguments.n_shot}
    content |= {"seed": arguments.seed, "records": records, "shares": shares}
    write_json(arguments.output_file, content)


if __name__ == "__main__":
    main()
