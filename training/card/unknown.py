"""Does a task know what it does not know? "None of these" on unseen domains, with ROC curves.

    python -m training.card.unknown --backbone model_cards/vit-s14-focus-70 \
        --adapter model_cards/hyperflow-vit-s14-70 --unseen FILE_OR_HUB_ID [...] --output_dir unknown

An episode has up to five classes of a domain, with 1, 5 or 20 images each, or unbalanced. Its queries are asked
together with as many images of other classes of the domain. One class at least is always left for these, so that a
domain of five classes is run 4-way. What is measured is how well a score tells the two apart: the area under the ROC
curve, which is the probability that a query has a higher score than an image of another class. The scores are

- of HyperFlow: `AdaptedTask.known_scores`, the probability that an image is of one of the classes;
- of direct transfer: the largest cosine of an image with a class.

`kept` and `refused` tell what `predict(..., reject=True)` does: the share of the queries that get a class, and that of
the other images that get none. The folder gets `unknown.json` with a record for each domain and one for their mean,
`unknown.md` with a table of the means, and `unknown.png` with the curves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score, roc_curve
from tqdm.auto import tqdm
from transformers import AutoModel

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.arguments import parse, short_name
from hf_hyperflow.benchmark.domain_features import DomainFeatures
from hf_hyperflow.benchmark.evaluation import mean_ci95
from hf_hyperflow.benchmark.methods import DirectTransfer, HyperFlow, Target, list_labels
from hf_hyperflow.benchmark.results import HYPERFLOW, REFERENCE, average_over_domains
from hf_hyperflow.data.domains import Domain, load_domain
from hf_hyperflow.data.episodes import UNBALANCED_SHOTS, Episode, cdfsl_episode, unbalanced_episode
from hf_hyperflow.modeling.atomic_file import atomic_file, write_json
from hf_hyperflow.modeling.saving import CheckpointError, atomic_folder
from hf_hyperflow.modeling.trunks import eval_mode
from hf_hyperflow.training.calibration import draw_others

from .markdown import format_interval, format_table
from .records import Records, column, select

N_WAY, N_QUERY = 5, 15
#: False positive rates at which the curves of episodes are averaged.
RATES = np.linspace(0, 1, 101)
#: The probability below which `predict(..., reject=True)` gives no class.
THRESHOLD = 0.5


@dataclass
class Arguments:
    backbone: str = field(metadata={"help": "the target: Hub id or folder"})
    adapter: str = field(metadata={"help": "the HyperFlow adapter, calibrated: Hub id or folder"})
    unseen: list[str] = field(metadata={"help": "domains to report on"})
    output_dir: str = field(metadata={"help": "folder for the JSON, the table and the figure"})
    n_shot: list[int] = field(default_factory=lambda: [1, 5, 20], metadata={"help": "support images of a class"})
    n_episodes: int = field(default=60, metadata={"help": "episodes of each domain and number of shots"})
    seed: int = field(default=0, metadata={"help": "of the episodes"})

    def __post_init__(self) -> None:
        if min(self.n_episodes, *self.n_shot) < 1:
            raise SystemExit("error: --n_episodes and --n_shot must be at least 1.")


@dataclass(frozen=True)
class Measured:
    """What an episode tells.

    Attributes:
        hyperflow, direct: areas under the ROC curves, in %.
        curves: true positive rates at `RATES`, of HyperFlow and of direct transfer, `(2, len(RATES))`.
        kept, refused: see the module, in %.
    """

    hyperflow: float
    direct: float
    curves: np.ndarray
    kept: float
    refused: float


def draw_episode(domain: Domain, n_shot: int | None, index: int, seed: int) -> Episode:
    """An episode that leaves a class of the domain out. The number of shots is None in unbalanced ones.

    Raises:
        ValueError: the domain has fewer than three classes, or too few images.
    """
    n_way = min(N_WAY, len(domain.classes_with(1)) - 1)
    if n_way < 2:
        raise ValueError("an episode needs two classes, and a third for other images.")
    if n_shot is None:
        shots = UNBALANCED_SHOTS[:n_way]
        return unbalanced_episode(domain, index, shots=shots, n_query=N_QUERY, seed=seed)
    return cdfsl_episode(domain, index, n_way=n_way, n_shot=n_shot, n_query=N_QUERY, seed=seed)


@torch.no_grad()
def score_episode(
    features: DomainFeatures, episode: Episode, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores `(n,)` of HyperFlow and of direct transfer, and whether the image is a query, for queries and others."""
    adapter = features.target.adapter
    assert adapter.rejection is not None, "see `main`"
    support = features.support(episode)
    others = draw_others(features.domain, episode, seed)
    images = features.query_images(torch.cat([episode.query, others]))
    flow = HyperFlow().fit(support)
    rejection = adapter.rejection.fit_task(flow.compute_features(support.images), support.labels)
    known = rejection.compute_known(flow.compute_logits(images), flow.scale)
    cosines = DirectTransfer().fit(support).compute_logits(images).amax(dim=1)
    is_query = torch.arange(len(known)) < len(episode.query)
    return known, cosines, is_query


def measure_episode(known: torch.Tensor, cosines: torch.Tensor, is_query: torch.Tensor) -> Measured:
    """Compare the scores of queries with those of other images, all `(n,)`."""
    areas, curves = [], []
    for scores in (known, cosines):
        areas.append(100 * float(roc_auc_score(is_query, scores)))
        false_rates, true_rates, _ = roc_curve(is_query, scores)
        curves.append(np.interp(RATES, false_rates, true_rates))
    is_kept = known >= THRESHOLD
    kept = 100 * is_kept[is_query].double().mean().item()
    refused = 100 * (~is_kept[~is_query]).double().mean().item()
    return Measured(areas[0], areas[1], np.array(curves), kept, refused)


def summarise_domain(domain: str, n_shot: int | None, n_way: int, episodes: list[Measured]) -> dict[str, Any]:
    """The record of a domain and number of shots."""
    hyperflow = np.array([episode.hyperflow for episode in episodes])
    direct = np.array([episode.direct for episode in episodes])
    record: dict[str, Any] = {"domain": domain, "n_shot": n_shot, "n_way": n_way, "n_episodes": len(episodes)}
    for name, values in ((HYPERFLOW, hyperflow), (REFERENCE, direct), ("difference", hyperflow - direct)):
        mean, half_width = mean_ci95(values)
        record[name] = round(mean, 3)
        record[f"{name}_ci95"] = round(half_width, 3) if len(episodes) > 1 else None
    record["kept"] = round(float(np.mean([episode.kept for episode in episodes])), 2)
    record["refused"] = round(float(np.mean([episode.refused for episode in episodes])), 2)
    record["curves"] = np.mean([episode.curves for episode in episodes], axis=0).round(4).tolist()
    return record


def average(records: Records) -> Records:
    """For each number of shots the mean over its domains (`domain` null)."""
    means = []
    for n_shot in list_shots(records):
        of_shots = select(records, n_shot=n_shot)
        mean: dict[str, Any] = {"domain": None, "n_shot": n_shot, "n_domains": len(of_shots)}
        mean["n_episodes"] = sum(column(of_shots, "n_episodes"))
        for name in (HYPERFLOW, REFERENCE, "difference"):
            half_widths = column(of_shots, f"{name}_ci95")
            mean[name], mean[f"{name}_ci95"] = average_over_domains(column(of_shots, name), half_widths)
        mean["kept"] = round(float(np.mean(column(of_shots, "kept"))), 2)
        mean["refused"] = round(float(np.mean(column(of_shots, "refused"))), 2)
        mean["curves"] = np.mean(column(of_shots, "curves"), axis=0).round(4).tolist()
        means.append(mean)
    return means


def list_shots(records: Records) -> list[int | None]:
    """The numbers of shots in their order."""
    return list(dict.fromkeys(column(records, "n_shot")))


def name_shots(n_shot: int | None) -> str:
    return "unbalanced" if n_shot is None else f"{n_shot}-shot"


def build_unknown_table(records: Records) -> str:
    """A row per number of shots: means over the domains."""
    rows = []
    for mean in select(records, domain=None):
        areas = [format_interval(mean[name], mean[f"{name}_ci95"], ".1f") for name in (REFERENCE, HYPERFLOW)]
        difference = format_interval(mean["difference"], mean["difference_ci95"], "+.2f")
        shares = [f"{mean['kept']:.0f} %", f"{mean['refused']:.0f} %"]
        rows.append([name_shots(mean["n_shot"]), str(mean["n_domains"]), *areas, difference, *shares])
    headings = ["episodes", "domains", "area under the ROC, %: direct transfer", "HyperFlow", "difference, points"]
    return format_table([*headings, "queries that get a class", "other images that get none"], rows)


def draw_curves(records: Records) -> Figure:
    """The mean curves over the domains, a panel for each number of shots, with what `reject=True` does as a point."""
    means = select(records, domain=None)
    figure = Figure(figsize=(3.6 * len(means), 3.8), layout="constrained")
    for axis, mean in zip(figure.subplots(1, len(means), squeeze=False)[0], means, strict=True):
        for name, curve in zip((HYPERFLOW, REFERENCE), mean["curves"], strict=True):
            axis.plot(RATES, curve, label=f"{list_labels()[name]}: {mean[name]:.1f} %")
        axis.plot(1 - mean["refused"] / 100, mean["kept"] / 100, "o", color="C0", label="reject=True")
        axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
        axis.set_title(f"{name_shots(mean['n_shot'])}, {mean['n_domains']} domains")
        axis.set_xlabel("share of other images taken for a class")
        axis.legend(loc="lower right", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_aspect("equal")
    figure.axes[0].set_ylabel("share of queries taken for a class")
    return figure


def measure(target: Target, arguments: Arguments) -> tuple[Records, Records]:
    """Records of all domains and of their means, which have the curves, and what was left out with the reason."""
    records: Records = []
    left_out: Records = []
    shapes: list[int | None] = [*arguments.n_shot, None]
    for source in arguments.unseen:
        features = DomainFeatures(target, load_domain(source, target.processor))
        for n_shot in shapes:
            name = features.domain.name
            try:
                n_way = draw_episode(features.domain, n_shot, 0, arguments.seed).n_way
            except ValueError as error:
                print(f"{name}, {name_shots(n_shot)}: left out ({error})")
                left_out.append({"domain": name, "n_shot": n_shot, "reason": str(error)})
                continue
            indices = tqdm(range(arguments.n_episodes), desc=f"{name}, {name_shots(n_shot)}", disable=None, leave=False)
            episodes = measure_domain(features, n_shot, indices, arguments.seed)
            records.append(summarise_domain(name, n_shot, n_way, episodes))
    records.sort(key=lambda record: shapes.index(record["n_shot"]))
    means = average(records)
    for record in records:
        del record["curves"]
    return records + means, left_out


def measure_domain(features: DomainFeatures, n_shot: int | None, indices: Iterable[int], seed: int) -> list[Measured]:
    """What the episodes of these numbers tell."""
    episodes = []
    for index in indices:
        episode = draw_episode(features.domain, n_shot, index, seed)
        episodes.append(measure_episode(*score_episode(features, episode, seed)))
    return episodes


def run(arguments: Arguments) -> None:
    folder = Path(arguments.output_dir)
    with atomic_folder(folder):
        pass  # raises now, and not after all the work, where nothing can be written
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = AutoModel.from_pretrained(arguments.backbone).float().eval().to(device)
    adapter = HyperFlowAdapter.from_pretrained(arguments.adapter).eval().to(device)
    if adapter.rejection is None:
        raise ValueError(f"{arguments.adapter} was not calibrated: run training/calibrate.py on it first.")
    with eval_mode(backbone), eval_mode(adapter):
        records, left_out = measure(Target(backbone, adapter), arguments)
    if not records:
        raise ValueError("no domain has enough classes and images for an episode.")
    content = {
        "adapter": short_name(arguments.adapter),
        "seed": arguments.seed,
        "left_out": left_out,
        "false_positive_rates": RATES.round(2).tolist(),
        "records": records,
    }
    write_json(folder / "unknown.json", content)
    table = build_unknown_table(records)
    with atomic_file(folder / "unknown.md") as draft:
        draft.write_text(table + "\n", encoding="utf-8")
    with atomic_file(folder / "unknown.png") as draft:
        draw_curves(records).savefig(draft, dpi=140, format="png")
    print(table)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(Arguments, argv)
    try:
        run(arguments)
    except (CheckpointError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
