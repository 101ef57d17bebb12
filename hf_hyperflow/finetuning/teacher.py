"""The teacher whose fine-tuning the flow learns to emulate: many tasks trained at once, and where they went recorded.

Tasks of one shape share every matrix product with the frozen weights: the target is run by `torch.func.vmap` over
each task's own theta. Adam acts on each number by itself, so one Adam on the stacked thetas is one Adam per task.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..data.augmentation import random_views
from ..data.domains import normalise
from ..modeling.backbones import Hidden, SplitBackbone, eval_mode
from ..modeling.parameter_space import ParameterSpace
from ..modeling.prototypes import no_autocast
from .speedups import first_token_in_last_mlp


@dataclass(frozen=True)
class Teacher:
    """The recipe of PMF (Hu et al. 2022) from a noisy start: prototypes of clean support, cross-entropy on augmented
    support, Adam, gradients through both.

    Attributes:
        steps: gradient steps.
        learning_rate: of Adam.
        scale: of the cosine logits in the loss.
        noise: standard deviation of what is added to every parameter at the start.
        n_views: augmented views in each image's pool. The frozen first blocks run once for each of them, and every
            step draws one of them for every image.
        n_points: how many points of the trajectory are recorded, or all where there are fewer.
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
        """After how many steps theta is recorded: 0, then denser where it moves fast, last all `steps`."""
        last = self.n_points - 1
        return sorted({round(self.steps * (point / last) ** 1.5) for point in range(self.n_points)})

    @property
    def times(self) -> list[float]:
        """The recorded points on the clock of the flow, 0 to 1."""
        return [step / self.steps for step in self.recorded]


@dataclass(frozen=True)
class Recording:
    """Where the teacher took `n` tasks, on the CPU.

    Attributes:
        deltas: `(n, n_points, n_tokens, token_dim)` float32: theta minus the adapter's start; the first point is the
            noise of the start.
        losses: `(n, steps + 1)`: before each step, and after the last (on one more draw of views).
        support_accuracy, query_accuracy: `(n, n_points)` in %: of a draw of augmented support images, and of the
            queries, against the prototypes of the clean support images.
        diverged: `(n,)` bool: a loss or theta is not finite (in half precision, as it is stored).
    """

    deltas: torch.Tensor
    losses: torch.Tensor
    support_accuracy: torch.Tensor
    query_accuracy: torch.Tensor
    diverged: torch.Tensor


@dataclass(frozen=True)
class Chance:
    """All that is random in the fine-tuning of one task.

    Attributes:
        noise: `(n_tokens, token_dim)` of the start.
        views: `(n_views, n_support, 3, height, width)` float32 in 0..255.
        choices: `(steps + 1, n_support)`, which view each step takes of each image.
    """

    noise: torch.Tensor
    views: torch.Tensor
    choices: torch.Tensor

    @classmethod
    def draw(cls, space: ParameterSpace, support: torch.Tensor, teacher: Teacher, generator: torch.Generator) -> Chance:
        """Drawn for support images `(n_support, 3, height, width)` in 0..255 from a CPU generator."""
        noise = teacher.noise * torch.randn(space.mask.shape, generator=generator) * space.mask
        views = random_views(support.repeat(teacher.n_views, 1, 1, 1), generator)
        choices = torch.randint(teacher.n_views, (teacher.steps + 1, len(support)), generator=generator)
        return cls(noise.to(support.device), views.view(teacher.n_views, *support.shape), choices.to(support.device))


def fine_tune_tasks(
    space: ParameterSpace,
    split: SplitBackbone,
    images: torch.Tensor,
    support_labels: torch.Tensor,
    query_labels: torch.Tensor,
    processor: object,
    teacher: Teacher,
    generators: list[torch.Generator],
) -> Recording:
    """Fine-tune `space` on `n` tasks of one shape at once; a task's result does not depend on the others'.

    The backbone keeps the space's adapter, at its start. May run under autocast; cosines are in float32.

    Args:
        split: the backbone, cut where all that `space` moves is in its second half.
        images: `(n, n_support + n_query, 3, height, width)` in 0..255 on the backbone's device, support first.
        support_labels, query_labels: `(n, n_support)` and `(n, n_query)`, 0..n_way-1.
        processor: the image processor, for mean and standard deviation.
        generators: a CPU generator for each task.
    """
    n_support = support_labels.shape[1]
    start = space.inject(split.backbone).start
    chances = [Chance.draw(space, task[:n_support], teacher, g) for task, g in zip(images, generators, strict=True)]
    # vmap runs the fused attention of CPUs one task after the other; plain matrix products it batches.
    with eval_mode(split.backbone), sdpa_kernel(SDPBackend.MATH):
        clean, rest = _hidden(split, images, processor)
        views, _ = _hidden(split, torch.stack([chance.views for chance in chances]), processor)
        choices = torch.stack([chance.choices for chance in chances], dim=1)
        rows = torch.arange(len(images), device=images.device).unsqueeze(1)
        columns = torch.arange(n_support, device=images.device)

        def one_task(theta: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
            tensors = {f"backbone.{name}": tensor for name, tensor in space.to_tensors(theta).items()}
            return functional_call(split, tensors, (Hidden(states, rest.args, rest.kwargs),))

        sample = Hidden(clean[0, :1], rest.args, rest.kwargs)
        recorded = teacher.recorded
        theta = (start + torch.stack([chance.noise for chance in chances])).requires_grad_()
        optimizer = torch.optim.Adam([theta], lr=teacher.learning_rate)
        deltas, losses, support_accuracy, query_accuracy = [], [], [], []
        with first_token_in_last_mlp(split, sample):
            for step in range(teacher.steps + 1):
                drawn = views[rows, choices[step], columns]
                with torch.set_grad_enabled(step < teacher.steps):
                    features = vmap(one_task)(theta, torch.cat([clean[:, :n_support], drawn], dim=1)).float()
                    prototypes = _prototypes(features[:, :n_support], support_labels)
                    logits = _logits(features[:, n_support:], prototypes, teacher.scale)
                    loss = F.cross_entropy(logits.mT, support_labels, reduction="none").mean(dim=1)
                losses.append(loss.detach())
                if step in recorded:
                    deltas.append(theta.detach() - start)
                    support_accuracy.append(_accuracy(logits, support_labels))
                    with torch.no_grad():
                        queries = vmap(one_task)(theta, clean[:, n_support:]).float()
                        query_accuracy.append(_accuracy(_logits(queries, prototypes, teacher.scale), query_labels))
                if step < teacher.steps:
                    theta.grad = None
                    loss.sum().backward()
                    optimizer.step()
    deltas, losses = torch.stack(deltas, dim=1).cpu(), torch.stack(losses, dim=1).cpu()
    return Recording(
        deltas=deltas,
        losses=losses,
        support_accuracy=torch.stack(support_accuracy, dim=1).cpu(),
        query_accuracy=torch.stack(query_accuracy, dim=1).cpu(),
        diverged=~(deltas.half().isfinite().flatten(1).all(dim=1) & losses.isfinite().all(dim=1)),
    )


@torch.no_grad()
def _hidden(split: SplitBackbone, images: torch.Tensor, processor: object) -> tuple[torch.Tensor, Hidden]:
    """States `(..., tokens, width)` behind the first blocks of images `(..., 3, height, width)`, and the rest."""
    parameter = next(split.backbone.parameters())
    parts = [
        split.forward_prefix(normalise(part, processor).to(parameter.dtype))
        for part in images.flatten(0, -4).split(_PREFIX)
    ]
    states = torch.cat([part.states for part in parts])
    return states.view(*images.shape[:-3], *states.shape[1:]), parts[0]


#: Images that the frozen first blocks run at once.
_PREFIX = 256


def _prototypes(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`(n, n_way, width)` class means of features `(n, n_support, width)`."""
    one_hot = F.one_hot(labels).to(features.dtype)
    with no_autocast(features):
        return one_hot.mT @ features / one_hot.sum(dim=1).unsqueeze(2)


def _logits(features: torch.Tensor, prototypes: torch.Tensor, scale: float) -> torch.Tensor:
    with no_autocast(features):
        return scale * F.normalize(features, dim=-1) @ F.normalize(prototypes, dim=-1).mT


def _accuracy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return 100 * (logits.detach().argmax(-1) == labels).float().mean(dim=1)
