"""What could be gained by reading? A displacement that knows the domain, and one that is the same for all.

    python -m training.card.oracles --backbone model_cards/vit-s14-focus-70 \
        --adapter model_cards/hyperflow-vit-s14-70 --dataset TRAINING_DOMAIN [...] --unseen FILE_OR_HUB_ID [...] \
        --output_file oracles.json

The classes of each unseen domain are dealt to two halves. Displacements of the adapter's weights are tuned by gradients
on the episodic loss, and compared on episodes of the second half:

- `universal`: tuned on episodes of the training domains, the same for all tasks;
- `domain oracle`: goes on from `universal`, with episodes of the first half of the domain;
- `own support set`: the flow as it is, for comparison.

A support set can tell of which kind a domain is, at best. The domain oracle has seen many labelled images of it, so it
bounds what can be gained by reading. The JSON has a record for each kind and domain, and one for the mean of the
domains. `gain` is the accuracy minus that of the same head without the flow, and `over_universal` is the accuracy minus
that of `universal`. Both are paired by episode, in points with the half-widths of 95 % intervals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import AutoModel

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.arguments import parse
from hf_hyperflow.benchmark.conditioning import OWN, Accuracies, ConditioningTest, list_differences
from hf_hyperflow.benchmark.domain_features import DomainFeatures
from hf_hyperflow.benchmark.evaluation import mean_ci95
from hf_hyperflow.benchmark.methods import NoFlow, Target
from hf_hyperflow.benchmark.results import average_over_domains
from hf_hyperflow.data.domains import Domain, load_domain
from hf_hyperflow.data.episodes import Episode, cdfsl_episode, episode_generator
from hf_hyperflow.finetuning.merged_target import MergedTarget
from hf_hyperflow.modeling.atomic_file import write_json
from hf_hyperflow.modeling.backbones import Hidden
from hf_hyperflow.modeling.prototypes import PrototypeClassifier
from hf_hyperflow.modeling.saving import atomic_folder
from hf_hyperflow.modeling.trunks import eval_mode

from .records import Records, column

UNIVERSAL, ORACLE = "universal", "domain oracle"
KINDS = (UNIVERSAL, ORACLE, OWN)
#: Support images and queries of a class in the episodes that displacements are tuned on.
TUNING_SHOTS, TUNING_QUERIES = 5, 4
#: A half of a domain with fewer classes makes no episode worth tuning on.
MIN_CLASSES = 3


@dataclass
class Arguments:
    backbone: str = field(metadata={"help": "the target: Hub id or folder"})
    adapter: str = field(metadata={"help": "the HyperFlow adapter: Hub id or folder"})
    dataset: list[str] = field(metadata={"help": "training domains, for the universal displacement"})
    unseen: list[str] = field(metadata={"help": "domains to report on"})
    output_file: str = field(metadata={"help": "JSON file to write"})
    n_episodes: int = field(default=60, metadata={"help": "episodes of each unseen domain"})
    n_way: int = field(default=5, metadata={"help": "classes of an episode, or all of a half where there are fewer"})
    n_shot: int = field(default=5, metadata={"help": "support images of a class"})
    steps: int = field(default=100, metadata={"help": "gradient steps of each displacement"})
    episodes_per_step: int = field(default=4, metadata={"help": "episodes of a gradient step"})
    learning_rate: float = field(default=2e-3, metadata={"help": "of Adam"})
    seed: int = field(default=0, metadata={"help": "of the episodes"})

    def __post_init__(self) -> None:
        numbers = (self.n_episodes, self.n_shot, self.steps, self.episodes_per_step)
        if min(numbers) < 1:
            raise SystemExit("error: --n_episodes, --n_shot, --steps and --episodes_per_step must be at least 1.")
        if self.n_way < 2:
            raise SystemExit("error: --n_way must be at least 2.")


class DisplacementTuner:
    """Tunes the adapter's weights on many tasks by gradients, in the adapter's own head.

    Args:
        target: the backbone and the adapter.
        arguments: how it is tuned.
    """

    def __init__(self, target: Target, arguments: Arguments):
        self.adapter = target.adapter
        self.arguments = arguments
        self.target = MergedTarget(target.adapter.space, target.split)

    def tune(self, theta: torch.Tensor, tasks: Iterator[tuple[DomainFeatures, Episode]], name: str) -> torch.Tensor:
        """Weights `(n_tokens, token_dim)` after the gradient steps that begin at `theta`.

        Args:
            tasks: endless.
            name: of the progress bar.
        """
        arguments, mask = self.arguments, self.adapter.space.mask.to(theta.device)
        theta = theta.clone().requires_grad_()
        optimizer = torch.optim.Adam([theta], lr=arguments.learning_rate, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
        for _ in tqdm(range(arguments.steps), desc=name, disable=None):
            for _ in range(arguments.episodes_per_step):
                domain, episode = next(tasks)
                loss = self._compute_loss(theta, domain, episode) / arguments.episodes_per_step
                loss.backward()
            assert theta.grad is not None, "the loss depends on theta"
            theta.grad.mul_(mask)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return theta.detach()

    def _compute_loss(self, theta: torch.Tensor, domain: DomainFeatures, episode: Episode) -> torch.Tensor:
        """Cross-entropy of the queries of an episode with these weights."""
        support, queries = domain.support(episode), domain.queries(episode)
        first, second = support.images.hidden, queries.hidden
        hidden = Hidden(torch.cat([first.states, second.states]), first.args, first.kwargs)
        features = self.target.compute_features(theta, hidden).float()
        n_support = len(support.labels)
        scale = self.adapter.logit_scale.exp()
        classifier = PrototypeClassifier.from_support(features[:n_support], support.labels, scale, self.adapter.head)
        return F.cross_entropy(classifier(features[n_support:]), episode.query_labels.to(theta.device))


def split_classes(domain: Domain, seed: int) -> tuple[Domain, Domain] | None:
    """Two halves of the classes of a domain, under its name; None if they are too few."""
    order = episode_generator(seed, f"{domain.name}, halves", 0).permutation(len(domain.class_names))
    middle = len(order) // 2
    if middle < MIN_CLASSES:
        return None
    first, second = sorted(order[:middle].tolist()), sorted(order[middle:].tolist())
    return domain.select_classes(first), domain.select_classes(second)


def draw_tasks(domains: Sequence[DomainFeatures], seed: int) -> Iterator[tuple[DomainFeatures, Episode]]:
    """Endless tasks of 3 to 10 ways, each of a random domain; smaller ones where a domain has no more."""
    index = 0
    while True:
        generator = episode_generator(seed, "oracle", index)
        domain = domains[int(generator.integers(len(domains)))]
        yield domain, _draw_tuning_episode(domain.domain, index, int(generator.integers(3, 11)), seed)
        index += 1


def _draw_tuning_episode(domain: Domain, index: int, n_way: int, seed: int) -> Episode:
    """An episode of few shots where the classes of a domain have no images for more."""
    for n_shot in range(TUNING_SHOTS, 1, -1):
        if len(domain.classes_with(n_shot + TUNING_QUERIES)) >= MIN_CLASSES:
            return cdfsl_episode(domain, index, n_way=n_way, n_shot=n_shot, n_query=TUNING_QUERIES, seed=seed + 1)
    return cdfsl_episode(domain, index, n_way=n_way, n_shot=1, n_query=1, seed=seed + 1)


class Experiment:
    """The comparison on several domains.

    Args:
        target: the backbone and the adapter.
        arguments: domains, numbers of episodes and how displacements are tuned.
    """

    def __init__(self, target: Target, arguments: Arguments):
        self.target = target
        self.arguments = arguments
        self.tuner = DisplacementTuner(target, arguments)
        self.test = ConditioningTest(target, self.draw)

    def draw(self, domain: Domain, index: int) -> Episode:
        arguments = self.arguments
        return cdfsl_episode(domain, index, n_way=arguments.n_way, n_shot=arguments.n_shot, seed=arguments.seed)

    def load(self, source: str) -> Domain:
        return load_domain(source, self.target.processor)

    def run(self) -> dict[str, list[Accuracies]]:
        """Accuracies by domain, one entry per episode. What is left out for few classes or images is printed."""
        training = [DomainFeatures(self.target, self.load(source)) for source in self.arguments.dataset]
        tasks = draw_tasks(training, self.arguments.seed)
        universal = self.tuner.tune(self.tuner.target.start, tasks, UNIVERSAL)
        by_domain = {}
        for source in self.arguments.unseen:
            domain = self.load(source)
            halves = split_classes(domain, self.arguments.seed)
            if halves is None:
                print(f"{domain.name} is left out: it has {len(domain.class_names)} classes, and six are needed.")
                continue
            try:
                self.draw(halves[1], 0)
            except ValueError as error:
                print(f"{domain.name} is left out: {error}")
                continue
            by_domain[domain.name] = self._run_domain(*halves, universal)
        return by_domain

    def _run_domain(self, first: Domain, second: Domain, universal: torch.Tensor) -> list[Accuracies]:
        """Accuracies on episodes of the second half of a domain."""
        tasks = draw_tasks([DomainFeatures(self.target, first)], self.arguments.seed)
        oracle = self.tuner.tune(universal, tasks, f"{first.name}, {ORACLE}")
        features = DomainFeatures(self.target, second)
        episodes = []
        for index in tqdm(range(self.arguments.n_episodes), desc=second.name, disable=None):
            episode = self.draw(second, index)
            with torch.no_grad():
                thetas = {UNIVERSAL: universal, ORACLE: oracle, OWN: self.test.generate(features, episode)}
                episodes.append(self.test.measure_weights(features, episode, thetas))
        return episodes


def summarise(by_domain: dict[str, list[Accuracies]]) -> Records:
    """For each kind of displacement one record per domain, then one for the mean over domains (`domain` null)."""
    records = []
    for kind in KINDS:
        of_kind = []
        for domain, episodes in by_domain.items():
            record: dict[str, Any] = {"kind": kind, "domain": domain, "n_episodes": len(episodes)}
            for key, other in (("gain", NoFlow.name), ("over_universal", UNIVERSAL)):
                mean, half_width = mean_ci95(list_differences(episodes, kind, other))
                record[key] = round(mean, 4)
                record[f"{key}_ci95"] = None if np.isnan(half_width) else round(half_width, 4)
            of_kind.append(record)
        records += [*of_kind, _average(kind, of_kind)]
    return records


def _average(kind: str, records: Records) -> dict[str, Any]:
    """The mean over domains."""
    mean: dict[str, Any] = {"kind": kind, "domain": None, "n_episodes": sum(column(records, "n_episodes"))}
    for key in ("gain", "over_universal"):
        values, half_widths = column(records, key), column(records, f"{key}_ci95")
        mean[key], mean[f"{key}_ci95"] = average_over_domains(values, half_widths)
    return mean


def main(argv: list[str] | None = None) -> None:
    arguments = parse(Arguments, argv)
    with atomic_folder(Path(arguments.output_file).parent):
        pass  # raises now, and not after all the work, where nothing can be written
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = AutoModel.from_pretrained(arguments.backbone).float().eval().requires_grad_(False).to(device)
    adapter = HyperFlowAdapter.from_pretrained(arguments.adapter).eval().requires_grad_(False).to(device)
    with eval_mode(backbone), eval_mode(adapter):
        by_domain = Experiment(Target(backbone, adapter), arguments).run()
    if not by_domain:
        raise SystemExit("error: none of the --unseen domains has the classes and images that are needed, see above.")
    records = summarise(by_domain)
    for record in records:
        if record["domain"] is None:
            print(record)
    settings = {"n_way": arguments.n_way, "n_shot": arguments.n_shot, "steps": arguments.steps}
    settings |= {"episodes_per_step": arguments.episodes_per_step, "seed": arguments.seed}
    write_json(arguments.output_file, settings | {"records": records})


if __name__ == "__main__":
    main()
