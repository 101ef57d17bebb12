"""Compare settings of the metric on training domains, each with what was measured on the others.

    python training/choose_metric.py --backbone BACKBONE --dataset FILE_OR_HUB_ID [...] --output metric.json

Every dataset and some made-up versions of it are evaluated with the covariance and the spread of all the other
datasets, so what is seen is what an unknown domain would get. The JSON file holds for every count, power and number of
shots the mean gain over direct transfer and that of the domain that gains least.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from arguments import described, parse
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel

from hf_hyperflow.augmentation import made_domain
from hf_hyperflow.backbones import SplitBackbone, find_blocks
from hf_hyperflow.domains import Domain, load_domain, normalise
from hf_hyperflow.episodes import cdfsl_episode
from hf_hyperflow.evaluation import prototype_accuracy
from hf_hyperflow.metric import SupportMetric, spread_between, within_covariance
from hf_hyperflow.prototypes import unit_means
from hf_hyperflow.saving import write_json


@dataclass
class Arguments:
    backbone: str = field(metadata={"help": "Hub id or folder"})
    dataset: list[str] = field(metadata={"help": "training domains, none that is reported: Parquet files, ..."})
    output: str = field(metadata={"help": "JSON file to write"})
    last_blocks: int = field(default=4, metadata={"help": "of the adapter: the middle is before them"})
    middle: float = field(default=0.5, metadata={"help": "see SplitBackbone.joined"})
    count: list[float] = field(default_factory=lambda: [30.0, 100.0, 300.0], metadata={"help": "see set_prior"})
    power: list[float] = field(default_factory=lambda: [0.0, 2.0, 4.0, 6.0], metadata={"help": "see SupportMetric"})
    made: int = field(default=3, metadata={"help": "made-up versions of each domain"})
    max_per_class: int = field(default=60, metadata={"help": "images of a class that are used at most"})
    n_way: int = field(default=5, metadata={"help": "classes of an episode"})
    n_shot: list[int] = field(default_factory=lambda: [1, 5, 20], metadata={"help": "support images of a class"})
    n_episodes: int = field(default=24, metadata={"help": "episodes of each domain and number of shots"})
    seed: int = field(default=0, metadata={"help": "of the made-up domains and of the episodes"})


@dataclass(frozen=True)
class Measured:
    """A domain, what the backbone makes of all its images `(n, width)`, and what goes into a prior."""

    source: str
    domain: Domain
    features: torch.Tensor
    covariance: torch.Tensor
    spread: torch.Tensor


def versions(domain: Domain, n_made: int, seed: int) -> Iterator[Domain]:
    """A domain as it is and changed as a whole, in `n_made` ways."""
    yield domain
    for i in range(n_made):
        generator = torch.Generator().manual_seed(1000 * seed + i)
        images = made_domain(domain.images.float(), generator).round().byte()
        yield replace(domain, name=f"{domain.name}, made up {i + 1}", images=images)


@torch.no_grad()
def measured(domain: Domain, source: str, split: SplitBackbone, processor: object) -> Measured:
    """Run a domain through the backbone."""
    chunks = [split.extract(normalise(images, processor)).float() for images in domain.images.split(128)]
    features = torch.cat(chunks)
    covariance = within_covariance(features, domain.labels)
    return Measured(source, domain, features, covariance, spread_between(features, domain.labels))


def metrics_without(source: str, known: list[Measured], counts: list[float], powers: list[float]) -> dict:
    """Metrics by count and power whose prior is that of all but one source: every domain counts the same."""
    others = [m for m in known if m.source != source]
    variances = torch.stack([m.covariance.diagonal().mean() for m in others])
    covariance = torch.stack([m.covariance / v for m, v in zip(others, variances, strict=True)]).mean(0)
    spread = torch.stack([m.spread for m in others]).mean()
    found = {}
    for power in powers:
        for count in counts:
            found[count, power] = SupportMetric(len(covariance), power)
            found[count, power].set_prior(variances.mean() * covariance, spread, count=count)
    return found


@torch.no_grad()
def gains(one: Measured, metrics: dict, split: SplitBackbone, arguments: Arguments, n_shot: int) -> dict:
    """Mean gain of each metric over direct transfer, in points, on a domain's episodes.

    Raises:
        ValueError: the domain has too few images for one.
    """
    found = {key: [] for key in metrics}
    for index in range(arguments.n_episodes):
        episode = cdfsl_episode(one.domain, index, n_way=arguments.n_way, n_shot=n_shot, seed=arguments.seed)
        features = one.features[torch.cat([episode.support, episode.query])]
        direct = prototype_accuracy(split.last(features), episode, unit_means)
        for key, metric in metrics.items():
            found[key].append(prototype_accuracy(features, episode, metric) - direct)
    return {key: sum(values) / len(values) for key, values in found.items()}


def main() -> None:
    arguments = parse(Arguments)
    if len(arguments.dataset) < 2:
        raise SystemExit("error: give at least two datasets: one is evaluated with what was measured on the others.")
    processor = AutoImageProcessor.from_pretrained(arguments.backbone, backend="pil")
    backbone = AutoModel.from_pretrained(arguments.backbone).float().eval()
    split = SplitBackbone(backbone, len(find_blocks(backbone)) - arguments.last_blocks, middle=arguments.middle)
    known = []
    for source in tqdm(arguments.dataset, desc="features", disable=None):
        domain = load_domain(source, processor, max_per_class=arguments.max_per_class)
        for version in versions(domain, arguments.made, arguments.seed):
            known.append(measured(version, source, split, processor))
    table = {shots: {} for shots in arguments.n_shot}
    for one in tqdm(known, desc="episodes", disable=None):
        metrics = metrics_without(one.source, known, arguments.count, arguments.power)
        for shots in arguments.n_shot:
            try:
                table[shots][one.domain.name] = gains(one, metrics, split, arguments, shots)
            except ValueError:
                continue  # too few images for so many shots
    records = []
    for shots, by_domain in table.items():
        for count, power in metrics if by_domain else ():
            mine = {name: found[count, power] for name, found in by_domain.items()}
            worst = min(mine, key=mine.get)
            record = {"n_shot": shots, "count": count, "power": power, "n_domains": len(mine)}
            record |= {"gain": round(sum(mine.values()) / len(mine), 2)}
            records.append(record | {"worst": round(mine[worst], 2), "worst_domain": worst})
            print(json.dumps(records[-1]))
    write_json(arguments.output, {"arguments": described(arguments), "records": records})
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
