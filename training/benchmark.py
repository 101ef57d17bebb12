"""Accuracy of HyperFlow against direct transfer on CD-FSL episodes, paired by episode.

    python training/benchmark.py --backbone model_cards/vit-s14-focus-70 --adapter model_cards/hyperflow-vit-s14-70 \
        --dataset FILE_OR_HUB_ID [...] --n_shot 1 5 20 --n_episodes 600 --output_dir results

Writes `results.json` (one record per domain and number of shots, and the mean over domains), `episodes.json` (every
episode) and `gain.png`. A number of shots that a domain has too few images for is left out, saying so.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from arguments import parse
from tqdm.auto import tqdm
from transformers import AutoModel

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.domains import load_domain
from hf_hyperflow.evaluation import Comparison, compare_flow, mean_ci95


@dataclass
class Arguments:
    backbone: str = field(metadata={"help": "the target: Hub id or folder"})
    adapter: str = field(metadata={"help": "the HyperFlow adapter: Hub id or folder"})
    dataset: list[str] = field(metadata={"help": "domains to report: Parquet files, image folders, Hub ids"})
    output_dir: str = field(metadata={"help": "folder for the results"})
    n_way: int = field(default=5, metadata={"help": "classes of an episode, or all where there are fewer"})
    n_shot: list[int] = field(default_factory=lambda: [5], metadata={"help": "support images of a class"})
    n_query: int = field(default=15, metadata={"help": "query images of a class"})
    n_episodes: int = field(default=600, metadata={"help": "episodes of each domain and number of shots"})
    bf16: bool = field(default=False, metadata={"help": "run the models under bfloat16 autocast"})
    seed: int = field(default=0, metadata={"help": "of the episodes"})


def mean_over_domains(comparisons: list[Comparison]) -> dict[str, float]:
    """Mean paired difference over the domains, each counting the same, and its 95 % half-width.

    Domains are taken as given, episodes as drawn: the variance of the mean is the mean of the variances over the
    number of domains.
    """
    found = [mean_ci95(c.adapted - c.direct) for c in comparisons]
    means, halves = np.array(found).T
    return {
        "direct": round(float(np.mean([c.direct.mean() for c in comparisons])), 2),
        "hyperflow": round(float(np.mean([c.adapted.mean() for c in comparisons])), 2),
        "difference": round(float(means.mean()), 2),
        "difference_ci95": round(float(np.sqrt((halves**2).sum()) / len(halves)), 2),
    }


def draw(records: list[dict], path: Path) -> None:
    """Gain over direct transfer of every domain, with intervals, one colour per number of shots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    domains = list(dict.fromkeys(r["domain"] for r in records))
    shots = sorted({r["n_shot"] for r in records})
    figure, axis = pyplot.subplots(figsize=(8, 0.6 + 0.3 * len(domains) * max(2, len(shots))), layout="constrained")
    for i, n_shot in enumerate(shots):
        chosen = [r for r in records if r["n_shot"] == n_shot]
        heights = [len(domains) - 1 - domains.index(r["domain"]) + 0.2 * ((len(shots) - 1) / 2 - i) for r in chosen]
        gains, halves = [r["difference"] for r in chosen], [r["difference_ci95"] for r in chosen]
        axis.errorbar(gains, heights, xerr=halves, fmt="o", capsize=3, label=f"{n_shot}-shot")
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.set_yticks(range(len(domains)), domains[::-1])
    axis.set_xlabel("HyperFlow minus direct transfer, points (95 % interval)")
    axis.legend()
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def main() -> None:
    arguments = parse(Arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = AutoModel.from_pretrained(arguments.backbone).float().eval().to(device)
    adapter = HyperFlowAdapter.from_pretrained(arguments.adapter).eval().to(device)
    domains = [load_domain(source, adapter.processor) for source in arguments.dataset]
    records, episodes, means = [], {}, {}
    for n_shot in arguments.n_shot:
        comparisons = []
        for domain in tqdm(domains, desc=f"{n_shot}-shot", disable=None):
            if sorted(len(c) for c in domain.indices_by_class())[-2] < n_shot + arguments.n_query:
                print(f"{domain.name} has too few images a class for {n_shot} shots: left out")
                continue
            with torch.autocast(device, torch.bfloat16, enabled=arguments.bf16):
                comparison = compare_flow(
                    adapter,
                    backbone,
                    domain,
                    n_episodes=arguments.n_episodes,
                    n_way=arguments.n_way,
                    n_shot=n_shot,
                    n_query=arguments.n_query,
                    seed=arguments.seed,
                )
            comparisons.append(comparison)
            record = {"domain": domain.name, "n_way": comparison.n_way, "n_shot": n_shot}
            records.append(record | {"n_episodes": arguments.n_episodes} | comparison.summary())
            print(json.dumps(records[-1]), flush=True)
            key = f"{domain.name}/{n_shot}"
            episodes[key] = {"direct": comparison.direct.tolist(), "hyperflow": comparison.adapted.tolist()}
        means[n_shot] = mean_over_domains(comparisons)
        print(f"mean over {len(comparisons)} domains, {n_shot}-shot: {json.dumps(means[n_shot])}", flush=True)
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    result = {"arguments": asdict(arguments), "records": records, "mean_over_domains": means}
    (output / "results.json").write_text(json.dumps(result, indent=1))
    (output / "episodes.json").write_text(json.dumps(episodes))
    draw(records, output / "gain.png")


if __name__ == "__main__":
    main()
