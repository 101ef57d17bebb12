"""Calibration of an adapter: what makes its scores probabilities, and tells images of none of the classes.

Temperature scaling (Guo et al. 2017) with a temperature that follows from the support set, see `Calibration`, and a
logistic regression for `RejectionCalibration`. Both are fitted to episodes with the flow in place, of domains that it
was best not trained on. Accuracies stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import AutoModel

from ..arguments import exit_on_error, parse
from ..benchmark.domain_features import DomainFeatures
from ..benchmark.methods import HyperFlow, Target
from ..benchmark.methods.hyperflow import flow_features
from ..data.domains import Domain, load_domain
from ..data.episodes import Episode, cdfsl_episode, episode_generator, meta_dataset_episode
from ..modeling.adapter import HyperFlowAdapter
from ..modeling.calibration import Calibration, TaskMeasures, measure_task
from ..modeling.prototypes import unit_means
from ..modeling.rejection import RejectionCalibration, compute_log_odds
from ..modeling.trunks import eval_mode
from .checkpoints import save_adapter

#: Ways and shots of the episodes; beside them are Meta-Dataset's, of variable ways and shots.
SHAPES = ((5, 1), (5, 5), (5, 20), (20, 5), (2, 5))

#: Most images of a class that are read, and most classes of an episode of variable ways.
MAX_PER_CLASS, MAX_WAY = 60, 20

#: Queries of a class. As many images of other classes are asked in all.
N_QUERY = 8

#: Terms that vary less than this in the given domains are not told apart by them, and get no large coefficients.
MIN_DEVIATION = 0.05

#: No scale is larger than the exponential of this.
MAX_LOG_SCALE = 8.0

#: Towards where the search starts, so that coefficients stay finite where every image is classified right.
WEIGHT_DECAY = 1e-3

#: The label of an image that is of none of the classes.
UNKNOWN = -1


@dataclass
class CalibrationConfig:
    """The settings of `calibrate`; the help of each field is in its metadata."""

    backbone: str = field(metadata={"help": "the target, a transformers vision model: Hub id or folder"})
    adapter: str = field(metadata={"help": "folder of the HyperFlow adapter"})
    dataset: list[str] = field(metadata={"help": "domains to calibrate on, best such that the flow was not trained on"})
    n_episodes: int = field(default=4, metadata={"help": "episodes of each domain and shape"})
    seed: int = field(default=1, metadata={"help": "of the episodes"})


@dataclass(frozen=True)
class Answers:
    """What an adapted task says of the queries of an episode.

    Attributes:
        cosines: `(n_query, n_way)`, products of features of length 1 with the prototypes.
        direct_cosines: the same of direct transfer.
        labels: `(n_query,)` in 0..n_way-1, or `UNKNOWN`.
        measures: of the support set.
    """

    cosines: torch.Tensor
    direct_cosines: torch.Tensor
    labels: torch.Tensor
    measures: TaskMeasures


@dataclass(frozen=True)
class CalibrationReport:
    """What was fitted, and the mean log losses of the episodes that it was fitted to.

    Attributes:
        calibration, rejection: as the adapter has them now.
        before, after: log loss of the adapter's scores.
        direct: log loss of direct transfer at its best scale.
        direct_scale: that scale.
    """

    calibration: Calibration
    rejection: RejectionCalibration
    before: float
    after: float
    direct: float
    direct_scale: float


def calibrate(config: CalibrationConfig) -> CalibrationReport:
    """Fit the calibration and the rejection of a saved adapter, and save it again. Its weights stay as they are.

    Raises:
        ValueError: the domains have too few images or classes.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = AutoModel.from_pretrained(config.backbone).float().eval()
    adapter = HyperFlowAdapter.from_pretrained(config.adapter).eval()
    target = Target(backbone.to(device), adapter.to(device))
    answers: list[Answers] = []
    for source in config.dataset:
        domain = load_domain(source, target.processor, max_per_class=MAX_PER_CLASS)
        episodes = list(draw_episodes(domain, config.n_episodes, config.seed))
        features = DomainFeatures(target, domain, views=adapter.config.views)
        for episode in tqdm(episodes, desc=domain.name, disable=None, leave=False):
            answers.append(answer_queries(features, episode, config.seed))
    before = mean_loss(adapter.calibration, answers)
    calibration = fit_calibration(answers)
    rejection = fit_rejection(answers, calibration)
    direct_answers = [Answers(a.direct_cosines, a.direct_cosines, a.labels, a.measures) for a in answers]
    direct = fit_calibration(direct_answers, constant_only=True)
    adapter.config.calibration, adapter.config.rejection = asdict(calibration), asdict(rejection)
    save_adapter(adapter, config.adapter)
    return CalibrationReport(
        calibration=calibration,
        rejection=rejection,
        before=before,
        after=mean_loss(calibration, answers),
        direct=mean_loss(direct, direct_answers),
        direct_scale=torch.tensor(direct.constant).exp().item(),
    )


def draw_episodes(domain: Domain, n_episodes: int, seed: int) -> Iterator[Episode]:
    """Episodes of all shapes that the domain has the images for. One with all of its classes has no images of
    others.
    """
    shapes: list[Callable[[int], Episode]] = []
    for n_way, n_shot in SHAPES:
        if len(domain.classes_with(n_shot + N_QUERY)) >= 2:
            shapes.append(_draw_fixed(domain, n_way, n_shot, seed))
    shapes.append(lambda index: meta_dataset_episode(domain, index, seed=seed, max_way=MAX_WAY))
    for draw in shapes:
        for index in range(n_episodes):
            yield draw(index)


def _draw_fixed(domain: Domain, n_way: int, n_shot: int, seed: int) -> Callable[[int], Episode]:
    def draw(index: int) -> Episode:
        return cdfsl_episode(domain, index, n_way=n_way, n_shot=n_shot, n_query=N_QUERY, seed=seed)

    return draw


@torch.no_grad()
def answer_queries(features: DomainFeatures, episode: Episode, seed: int) -> Answers:
    """Adapt to an episode, and compare its queries and as many images of the domain's other classes."""
    target = features.target
    others = draw_others(features.domain, episode, seed)
    queries = features.query_images(torch.cat([episode.query, others]))
    labels = torch.cat([episode.query_labels, torch.full_like(others, UNKNOWN)])
    support = features.support(episode)
    with eval_mode(target.backbone), eval_mode(target.adapter):
        path = HyperFlow().follow_flow(support)
        compute_features = flow_features(support, path.theta)
        support_features, query_features = compute_features(support.images), compute_features(queries)
        prototypes = target.adapter.head(support_features, support.labels)
        direct_prototypes = unit_means(support.images.final_features, support.labels)
        direct_features = queries.final_features
    return Answers(
        cosines=(F.normalize(query_features, dim=-1) @ prototypes.T).cpu(),
        direct_cosines=(F.normalize(direct_features, dim=-1) @ direct_prototypes.T).cpu(),
        labels=labels,
        measures=measure_task(support_features, support.labels),
    )


def draw_others(domain: Domain, episode: Episode, seed: int) -> torch.Tensor:
    """Images `(n,)` of classes that the episode does not have, at most as many as it has queries."""
    images = domain.indices_by_class()
    classes = set(range(len(images))) - set(episode.classes.tolist())
    if not classes:
        return torch.empty(0, dtype=torch.long)
    candidates = torch.cat([images[c] for c in sorted(classes)])
    generator = episode_generator(seed + 1, domain.name, episode.index)
    order = torch.from_numpy(generator.permutation(len(candidates)))
    return candidates[order[: len(episode.query)]]


def mean_loss(calibration: Calibration, answers: Sequence[Answers]) -> float:
    """The mean cross-entropy of the queries that are of a class, every episode counting the same."""
    losses = []
    for answer in answers:
        is_known = answer.labels != UNKNOWN
        scale = calibration.scale_of(answer.measures)
        losses.append(F.cross_entropy(scale * answer.cosines[is_known], answer.labels[is_known]))
    return torch.stack(losses).mean().item()


def fit_calibration(answers: Sequence[Answers], *, constant_only: bool = False) -> Calibration:
    """The coefficients with the least `mean_loss`; with `constant_only`, one scale for all episodes."""
    measures = torch.stack([_to_row(answer.measures) for answer in answers])
    if constant_only:
        measures = measures[:, :1]
    known = [(answer.cosines[answer.labels != UNKNOWN], answer.labels[answer.labels != UNKNOWN]) for answer in answers]

    def compute_loss(coefficients: torch.Tensor) -> torch.Tensor:
        scales = (measures @ coefficients).clamp_max(MAX_LOG_SCALE).exp()  # the search may go far astray
        losses = []
        for scale, (cosines, labels) in zip(scales, known, strict=True):
            losses.append(F.cross_entropy(scale * cosines, labels))
        return torch.stack(losses).mean()

    coefficients = _minimise(compute_loss, measures, start=2.5)
    return Calibration(*[round(value, 4) for value in coefficients.tolist()])


def fit_rejection(answers: Sequence[Answers], calibration: Calibration) -> RejectionCalibration:
    """Logistic regression of whether a query is of a class. Both kinds count the same in all.

    Raises:
        ValueError: every episode has all classes of its domain.
    """
    rows, targets = [], []
    for answer in answers:
        logits = calibration.scale_of(answer.measures) * answer.cosines
        terms = _to_row(answer.measures).repeat(len(logits), 1)
        distances = (1 - answer.cosines.max(dim=1).values) * math.exp(-answer.measures.spread)
        rows.append(torch.cat([terms, compute_log_odds(logits).unsqueeze(1), distances.unsqueeze(1)], dim=1))
        targets.append((answer.labels != UNKNOWN).float())
    terms, is_known = torch.cat(rows), torch.cat(targets)
    n_unknown = (1 - is_known).sum()
    if n_unknown == 0:
        raise ValueError("every domain has as few classes as a task: give one with more, to ask for images of others.")
    weights = torch.where(is_known.bool(), 0.5 / is_known.sum(), 0.5 / n_unknown)

    def compute_loss(coefficients: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(terms @ coefficients, is_known, weights, reduction="sum")

    coefficients = _minimise(compute_loss, terms, start=0.0)
    return RejectionCalibration(*[round(value, 4) for value in coefficients.tolist()])


def _to_row(measures: TaskMeasures) -> torch.Tensor:
    """The terms of the constant, the ways, the shots and the spread, `(4,)`."""
    return torch.tensor([1.0, measures.ways, measures.shots, measures.spread])


def _minimise(
    compute_loss: Callable[[torch.Tensor], torch.Tensor], terms: torch.Tensor, *, start: float
) -> torch.Tensor:
    """The coefficients `(n_terms,)` of least loss, by L-BFGS. The first term is the constant.

    Args:
        compute_loss: a function of the coefficients.
        terms: `(n, n_terms)`. The search has coefficients of terms of mean 0 and variance 1.
        start: where the constant starts; the others start at 0.
    """
    mean, deviation = terms.mean(dim=0), terms.std(dim=0).clamp_min(MIN_DEVIATION)
    mean[0], deviation[0] = 0.0, 1.0
    origin = torch.zeros(terms.shape[1])
    origin[0] = start
    standardised = origin.clone().requires_grad_(True)

    def to_coefficients(values: torch.Tensor) -> torch.Tensor:
        scaled = values / deviation
        constant = scaled[0] - (scaled[1:] * mean[1:]).sum()
        return torch.cat([constant.unsqueeze(0), scaled[1:]])

    optimizer = torch.optim.LBFGS([standardised], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = compute_loss(to_coefficients(standardised)) + WEIGHT_DECAY * (standardised - origin).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return to_coefficients(standardised.detach())


def main(argv: list[str] | None = None) -> None:
    """The command line of `training/calibrate.py`."""
    with exit_on_error():
        report = calibrate(parse(CalibrationConfig, argv))
    print(f"calibration {asdict(report.calibration)}")
    print(f"rejection {asdict(report.rejection)}")
    print(f"log loss {report.before:.3f} -> {report.after:.3f}")
    print(f"direct transfer has {report.direct:.3f} at its best scale, {report.direct_scale:.2f}")
