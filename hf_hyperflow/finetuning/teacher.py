"""The teacher that the flow learns from: it fine-tunes many tasks at once and records where their parameters go.

The tasks of a group have one shape and share every matrix product with the frozen weights: `torch.func.vmap` runs the
target over each task's own theta. Adam acts on each number by itself, so that one Adam on the stacked thetas is one
Adam per task.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.image_processing_utils import BaseImageProcessor

from ..data.augmentation import random_views
from ..data.domains import normalise
from ..modeling.backbones import Hidden
from ..modeling.parameter_space import ParameterSpace
from ..modeling.prototypes import no_autocast
from .merged_target import MergedTarget


@dataclass(frozen=True)
class Teacher:
    """How tasks are fine-tuned, after PMF (Hu et al. 2022), and which points of the way are recorded.

    In every step prototypes are made of the clean support images, the cross-entropy of augmented support images is
    taken, and Adam makes a step along the gradients through both. The start is noisy.

    Attributes:
        steps: number of gradient steps.
        learning_rate: of Adam.
        scale: of the cosine logits in the loss.
        noise: standard deviation of what is added to every parameter at the start.
        n_views: how many augmented views of each image there are. The frozen first blocks run once for each, and every
            step draws one view of each image.
        n_points: how many points of the trajectory are recorded; all of them where there are fewer.

    Raises:
        ValueError: `steps` or `n_views` is below 1, or `n_points` below 2.
    """

    steps: int = 12
    learning_rate: float = 1e-3
    scale: float = 10.0
    noise: float = 5e-4
    n_views: int = 4
    n_points: int = 8

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("n_views", 1), ("n_points", 2)):
            if vars(self)[name] < least:
                raise ValueError(f"the teacher's {name} must be at least {least}, not {vars(self)[name]}.")

    @property
    def recorded(self) -> list[int]:
        """The numbers of steps after which theta is recorded: from 0 to `steps`, denser early, where it moves fast."""
        last = self.n_points - 1
        return sorted({round(self.steps * (point / last) ** 1.5) for point in range(self.n_points)})

    @property
    def times(self) -> list[float]:
        """The recorded points on the clock of the flow, 0 to 1."""
        return [step / self.steps for step in self.recorded]


@dataclass(frozen=True)
class Recording:
    """The trajectories of `n` tasks, on the CPU.

    Attributes:
        deltas: `(n, n_points, n_tokens, token_dim)` float32, theta minus the adapter's start; the first point is the
            noise at the start.
        losses: `(n, steps + 1)`: before each step, and after the last (on one more draw of views).
        support_accuracy, query_accuracy: `(n, n_points)` in %: of a draw of augmented support images, and of the query
            images, by the prototypes of the clean support images.
        diverged: `(n,)` bool: a loss is not finite, or theta is not in half precision, in which it is stored.
    """

    deltas: torch.Tensor
    losses: torch.Tensor
    support_accuracy: torch.Tensor
    query_accuracy: torch.Tensor
    diverged: torch.Tensor


@dataclass(frozen=True)
class RandomDraws:
    """All that is random in the fine-tuning of a task; stacked, that of `n` tasks in a first dimension.

    Attributes:
        noise: `(n_tokens, token_dim)`, added to theta at the start.
        views: `(n_views, n_support, 3, height, width)` float32 in 0..255.
        choices: `(steps + 1, n_support)`, which view each step takes of each image.
    """

    noise: torch.Tensor
    views: torch.Tensor
    choices: torch.Tensor

    @classmethod
    def draw(
        cls, space: ParameterSpace, support: torch.Tensor, teacher: Teacher, generator: torch.Generator
    ) -> RandomDraws:
        """The draws for support images `(n_support, 3, height, width)` in 0..255, from a CPU generator."""
        noise = teacher.noise * torch.randn(space.mask.shape, generator=generator) * space.mask
        views = random_views(support.repeat(teacher.n_views, 1, 1, 1), generator)
        choices = torch.randint(teacher.n_views, (teacher.steps + 1, len(support)), generator=generator)
        return cls(noise.to(support.device), views.view(teacher.n_views, *support.shape), choices.to(support.device))


def fine_tune_tasks(
    target: MergedTarget,
    images: torch.Tensor,
    support_labels: torch.Tensor,
    query_labels: torch.Tensor,
    processor: BaseImageProcessor,
    teacher: Teacher,
    generators: list[torch.Generator],
) -> Recording:
    """Fine-tune a target on `n` tasks of one shape at once; a task's result does not depend on the others'.

    This may run under autocast; cosines are computed in float32 anyway.

    Args:
        target: of a backbone that is split where all that theta moves lies in the second half. It is left as it is.
        images: `(n, n_support + n_query, 3, height, width)` in 0..255 on the backbone's device, support first.
        support_labels, query_labels: `(n, n_support)` and `(n, n_query)`, 0..n_way-1.
        processor: the image processor, for its mean and standard deviation.
        generators: a CPU generator for each task.
    """
    draws = _draw_for_tasks(target.space, images[:, : support_labels.shape[1]], teacher, generators)
    # On a CPU, vmap runs fused attention one task after the other; plain matrix products it runs for all at once.
    with sdpa_kernel(SDPBackend.MATH):
        group = _TaskGroup(target, images, support_labels, query_labels, processor, teacher.scale, draws)
        return _record(group, target.start, teacher)


def _draw_for_tasks(
    space: ParameterSpace, support: torch.Tensor, teacher: Teacher, generators: list[torch.Generator]
) -> RandomDraws:
    """The stacked draws for support images `(n, n_support, 3, height, width)`, each task's from its own generator."""
    noise, views, choices = [], [], []
    for images, generator in zip(support, generators, strict=True):
        draws = RandomDraws.draw(space, images, teacher, generator)
        noise.append(draws.noise)
        views.append(draws.views)
        choices.append(draws.choices)
    return RandomDraws(torch.stack(noise), torch.stack(views), torch.stack(choices))


def _record(group: _TaskGroup, start: torch.Tensor, teacher: Teacher) -> Recording:
    """Take the teacher's steps on all tasks of a group, from `start` `(n_tokens, token_dim)` plus noise."""
    theta = (start + group.draws.noise).requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=teacher.learning_rate)
    points = _Points()
    for step in range(teacher.steps + 1):
        is_last = step == teacher.steps
        with torch.set_grad_enabled(not is_last):
            loss, logits, prototypes = group.classify_support(theta, step)
        points.losses.append(loss.detach())
        if step in teacher.recorded:
            points.deltas.append(theta.detach() - start)
            points.support_accuracy.append(_compute_accuracy(logits, group.support_labels))
            query_logits = group.classify_queries(theta, prototypes)
            points.query_accuracy.append(_compute_accuracy(query_logits, group.query_labels))
        if not is_last:
            theta.grad = None
            loss.sum().backward()
            optimizer.step()
    return points.to_recording()


@dataclass
class _Points:
    """What is recorded along the way: a tensor `(n, ...)` for each step, or for each recorded point."""

    deltas: list[torch.Tensor] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    support_accuracy: list[torch.Tensor] = field(default_factory=list)
    query_accuracy: list[torch.Tensor] = field(default_factory=list)

    def to_recording(self) -> Recording:
        deltas = torch.stack(self.deltas, dim=1).cpu()
        losses = torch.stack(self.losses, dim=1).cpu()
        is_finite = deltas.half().isfinite().flatten(1).all(dim=1) & losses.isfinite().all(dim=1)
        return Recording(
            deltas=deltas,
            losses=losses,
            support_accuracy=torch.stack(self.support_accuracy, dim=1).cpu(),
            query_accuracy=torch.stack(self.query_accuracy, dim=1).cpu(),
            diverged=~is_finite,
        )


class _TaskGroup:
    """`n` tasks of one shape, their images behind the frozen first blocks, and the target that classifies them.

    Arguments as for `fine_tune_tasks`, and the stacked draws of the tasks.
    """

    def __init__(
        self,
        target: MergedTarget,
        images: torch.Tensor,
        support_labels: torch.Tensor,
        query_labels: torch.Tensor,
        processor: BaseImageProcessor,
        scale: float,
        draws: RandomDraws,
    ):
        self.target = target
        self.support_labels = support_labels
        self.query_labels = query_labels
        self.scale = scale
        self.draws = draws
        n_support = support_labels.shape[1]
        states, self.call = _forward_prefix(target, images, processor)
        self.support, self.query = states[:, :n_support], states[:, n_support:]
        self.views, _ = _forward_prefix(target, draws.views, processor)

    def classify_support(self, theta: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The teacher's forward pass: augmented support images against the prototypes of the clean ones.

        Args:
            theta: `(n, n_tokens, token_dim)`.
            step: whose draw of views is classified.

        Returns:
            The loss of each task `(n,)`, logits `(n, n_support, n_way)` and prototypes `(n, n_way, width)`.
        """
        n, n_support = self.support_labels.shape
        tasks = torch.arange(n, device=theta.device).unsqueeze(1)
        columns = torch.arange(n_support, device=theta.device)
        augmented = self.views[tasks, self.draws.choices[:, step], columns]
        features = self._compute_features(theta, torch.cat([self.support, augmented], dim=1))
        prototypes = _compute_prototypes(features[:, :n_support], self.support_labels)
        logits = _compute_logits(features[:, n_support:], prototypes, self.scale)
        loss = F.cross_entropy(logits.mT, self.support_labels, reduction="none").mean(dim=1)
        return loss, logits, prototypes

    @torch.no_grad()
    def classify_queries(self, theta: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
        """Logits `(n, n_query, n_way)` of the query images."""
        return _compute_logits(self._compute_features(theta, self.query), prototypes, self.scale)

    def _compute_features(self, theta: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Features `(n, n_images, width)` float32 of hidden states `(n, n_images, tokens, width)`."""
        return vmap(self._run_task)(theta, states).float()

    def _run_task(self, theta: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The target's second half on the images of one task, with the adapter's weights `theta`."""
        return self.target.compute_features(theta, Hidden(states, self.call.args, self.call.kwargs))


def _forward_prefix(
    target: MergedTarget, images: torch.Tensor, processor: BaseImageProcessor
) -> tuple[torch.Tensor, Hidden]:
    """Run the first blocks on images `(..., 3, height, width)` in 0..255.

    Returns:
        Hidden states `(..., tokens, width)`, and a `Hidden` that tells what else a block is called with.
    """
    hidden = target.forward_prefix(normalise(images.flatten(0, -4), processor))
    return hidden.states.view(*images.shape[:-3], *hidden.states.shape[1:]), hidden


def _compute_prototypes(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`(n, n_way, width)` class means of features `(n, n_support, width)`."""
    one_hot = F.one_hot(labels).to(features.dtype)
    with no_autocast(features):
        return one_hot.mT @ features / one_hot.sum(dim=1).unsqueeze(2)


def _compute_logits(features: torch.Tensor, prototypes: torch.Tensor, scale: float) -> torch.Tensor:
    """Scaled cosines `(n, n_images, n_way)`."""
    with no_autocast(features):
        return scale * F.normalize(features, dim=-1) @ F.normalize(prototypes, dim=-1).mT


def _compute_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The share of right answers in %, `(n,)`."""
    return 100 * (logits.detach().argmax(-1) == labels).float().mean(dim=1)
