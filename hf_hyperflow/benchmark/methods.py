"""The methods that the benchmark compares, on one episode each: accuracy, and all the work of getting ready.

`direct` classifies by prototypes with the backbone as it is, `metric` does so in the adapter's metric (by plain cosines
if it has none), `head` fits a logistic regression on the same features, `hyperflow` follows the flow and uses the
metric, `hyperflow-guard` stops it where the leave-one-out accuracy on the support set is best. `bias`, `lora`,
`layernorm` and `full` fine-tune by gradient descent, the first three through PEFT in the blocks that the flow adapts;
what they arrive at is classified by plain cosines and, as `bias-metric` and so on, in the metric. `easyfsl-...` are in
`hf_hyperflow.benchmark.easyfsl_methods`. What is classified in the metric has the features of the adapter, with a middle if it
has one; all else sees what the last block gives.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn

from ..data.domains import normalise
from ..data.episodes import Episode
from ..finetuning.finetune import FineTuningConfig, fine_tune
from ..modeling.adapter import HyperFlowAdapter
from ..modeling.backbones import SplitBackbone, eval_mode
from ..modeling.parameter_space import ParameterSpace
from ..modeling.peft_configs import bias_config, layernorm_config, lora_config
from ..modeling.prototypes import unit_means
from ..modeling.stopping import choose_stopping_point
from .easyfsl_methods import EASYFSL_METHODS, easyfsl_classifier
from .evaluation import DomainFeatures, compute_features, flow_thetas, prototype_accuracy
from .hyperparameters import Hyperparameters

GRADIENT_METHODS = ("bias", "lora", "layernorm", "full")
METHODS = ("direct", "metric", "head", "hyperflow", "hyperflow-guard", *GRADIENT_METHODS)
#: What a gradient method is called where its features are classified in the adapter's metric; comes with it.
IN_METRIC = {method: f"{method}-metric" for method in GRADIENT_METHODS}


def method_list(names: str) -> list[str]:
    """Methods from a comma-separated list; `easyfsl` stands for all of `EASYFSL_METHODS`.

    Raises:
        ValueError: an unknown or repeated name, or none.
    """
    methods: list[str] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        methods += EASYFSL_METHODS if name == "easyfsl" else [name]
    unknown = [m for m in methods if m not in (*METHODS, *EASYFSL_METHODS)]
    repeated = sorted({m for m in methods if methods.count(m) > 1})
    if unknown or repeated or not methods:
        what = f"unknown methods {unknown}" if unknown else f"methods {repeated} twice" if repeated else "no methods"
        raise ValueError(f"{what} in {names!r}: choose from {', '.join((*METHODS, 'easyfsl', *EASYFSL_METHODS))}.")
    return methods


def flow_points(n_steps: int) -> dict[str, tuple[int, float]]:
    """Points of the flow for the figures, by name: `(solver steps, end time)`.

    Along the flow, at steps as long as those of an adapter with `n_steps` (or shorter, so that quarters of t are
    ends of steps), from the backbone as it is at t = 0 to beyond t = 1; and at t = 1 with other numbers of steps.
    """
    per_unit = 4 * math.ceil(n_steps / 4)
    along = {f"hyperflow t={t:g}": (round(t * per_unit), t) for t in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)}
    return along | {f"hyperflow steps={n}": (n, 1.0) for n in (1, 2, 4, 8, 16, 50)}


class Target:
    """A backbone with its adapter, as the methods find it.

    Args:
        backbone: on its device; it may hold the adapter or an injection of `bias`, `lora` or `layernorm`, always at
            its start: every method leaves it so.
        adapter: on the same device.
        recipes: settings of the gradient methods and of the head.
    """

    def __init__(self, backbone: nn.Module, adapter: HyperFlowAdapter, recipes: Hyperparameters):
        self.backbone = backbone
        self.adapter = adapter
        self.recipes = recipes
        self.split = adapter.split(backbone)
        self.points = flow_points(adapter.config.n_steps)
        self._spaces: dict[str, ParameterSpace] = {}

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    def space(self, method: str) -> ParameterSpace:
        """The parameter space of `bias`, `lora` or `layernorm`: the blocks that the flow adapts."""
        if method not in self._spaces:
            make = {"bias": bias_config, "lora": lora_config, "layernorm": layernorm_config}[method]
            config = make(self.backbone, self.adapter.config.last_blocks)
            self._spaces[method] = ParameterSpace.from_backbone(self.backbone, config)
        return self._spaces[method]

    def cut(self, method: str) -> SplitBackbone:
        """The backbone, cut before the first block that a gradient method moves."""
        start = 0 if method == "full" else self.split.start
        return SplitBackbone(self.backbone, start, self.adapter.config.pooling, self.split.blocks)

    def plain(self) -> nn.Module:
        """The backbone without any adapter in it."""
        self.adapter.space.inject(self.backbone).remove()
        return self.backbone

    @contextmanager
    def moving(self, method: str) -> Iterator[list[nn.Parameter]]:
        """The parameters that a gradient method moves, at their start; afterwards they are there again."""
        if method == "full":
            parameters = list(self.plain().parameters())
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Unsupported layer type .*LayerNorm")  # PEFT does support it
                parameters = self.space(method).inject(self.backbone).parameters
        start = [p.detach().clone() for p in parameters]
        try:
            yield parameters
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, start, strict=True):
                    parameter.copy_(value)


def accuracies(method: str, target: Target, features: DomainFeatures, episode: Episode) -> dict[str, float]:
    """Accuracy in % of a method on an episode's queries, by name: a gradient method has two, see `IN_METRIC`.

    Args:
        method: one of `METHODS`, `EASYFSL_METHODS` or `target.points`.
        features: of the episode's domain.
    """
    adapter = target.adapter
    if method in GRADIENT_METHODS:
        recipe = target.recipes.fine_tuning(method)
        (found,) = fine_tuned_features(method, target, features, episode, recipe, [recipe.steps])
        reached = {method: prototype_accuracy(found, episode)}
        if adapter.head is not None:
            hidden = features.hidden(torch.cat([episode.support, episode.query]))
            found = target.split.concat_features(found, hidden)
            reached[IN_METRIC[method]] = prototype_accuracy(found, episode, adapter.head)
        return reached
    return {method: _forward_accuracy(method, target, features, episode)}


def _forward_accuracy(method: str, target: Target, features: DomainFeatures, episode: Episode) -> float:
    """Accuracy in % of a method without gradients."""
    adapter, rows, n_support = target.adapter, torch.cat([episode.support, episode.query]), len(episode.support)
    n_steps, end_time = target.points.get(method, (None, 1.0))
    injection = adapter.space.inject(target.backbone)
    with torch.no_grad(), eval_mode(target.backbone), eval_mode(adapter):
        if method.startswith("hyperflow") and end_time > 0:
            start, hidden = injection.start, features.hidden(rows)
            times, thetas = flow_thetas(adapter, features, start, episode, n_steps=n_steps, end_time=end_time)
            theta = thetas[-1]
            if method == "hyperflow-guard":
                labels, split = episode.support_labels.to(target.device), target.split
                choice = choose_stopping_point(
                    split, injection, hidden[:n_support], labels, times, thetas, adapter.head
                )
                theta = thetas[times.index(choice.time)]
            injection.write(theta)
            found = compute_features(target.split, hidden)
            injection.write(start)
        else:
            found = features.plain(rows)
        if method == "metric" or method.startswith("hyperflow"):
            return prototype_accuracy(found, episode, adapter.head)
        found = target.split.final_features(found)
        if method == "direct":
            return prototype_accuracy(found, episode)
        if method == "head":
            classify = head_classifier(found[:n_support], episode.support_labels, target.recipes.head_c)
        else:
            classify = easyfsl_classifier(method, found[:n_support], episode.support_labels)
        predicted = classify(found[n_support:])
    return label_accuracy(predicted, episode)


def label_accuracy(predicted: torch.Tensor, episode: Episode) -> float:
    """Accuracy in % of predicted labels `(n_query,)`."""
    return 100 * (predicted.cpu() == episode.query_labels).float().mean().item()


def head_classifier(features: torch.Tensor, labels: torch.Tensor, c: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """A logistic regression on L2-normalised features (Tian et al. 2020), fitted by scikit-learn on the CPU.

    Args:
        features: `(n, width)` of the support images.
        labels: `(n,)`.
        c: scikit-learn's `C`, the inverse of the weight decay.

    Returns:
        A function from features `(n, width)` to labels `(n,)` on the CPU.
    """

    def unit(x: torch.Tensor) -> np.ndarray:
        return F.normalize(x.float(), dim=-1).cpu().numpy()

    head = LogisticRegression(C=c, max_iter=1000).fit(unit(features), labels.cpu().numpy())
    return lambda x: torch.from_numpy(head.predict(unit(x)))


def fine_tuned_features(
    method: str,
    target: Target,
    features: DomainFeatures,
    episode: Episode,
    recipe: FineTuningConfig,
    at_steps: list[int],
) -> list[torch.Tensor]:
    """Features `(n_support + n_query, width)` of an episode's images after so many gradient steps, ascending, of one
    run of fine-tuning.

    The augmentation of episode i is seeded by i: what is found depends on the episode and the recipe alone.
    """
    processor, rows = target.adapter.processor, torch.cat([episode.support, episode.query])
    images = features.domain.images[rows].to(target.device)
    labels, n_support = episode.support_labels.to(target.device), len(episode.support)
    split, found = target.cut(method), []

    @torch.no_grad()
    def note(step: int) -> None:
        if step not in at_steps:
            return
        if split.start > 0:
            found.append(compute_features(split, features.hidden(rows)))
            return
        parts = [split.forward_features(normalise(chunk, processor)) for chunk in images.split(256)]
        found.append(torch.cat(parts).float())

    recipe = replace(recipe, steps=at_steps[-1], seed=episode.index)
    with eval_mode(target.backbone), target.moving(method) as parameters:
        fine_tune(split, parameters, images[:n_support], labels, processor, recipe, after_step=note)
    return found


def get_ready(
    method: str, target: Target, images: torch.Tensor, labels: torch.Tensor, only: int | None = None
) -> object:
    """All the work between holding a support set and being able to classify: what a task costs.

    Nothing is taken from a cache. easyfsl's classifiers do their work when they classify: they are given the support
    set itself to classify.

    Args:
        images: `(n, 3, height, width)` uint8 on the backbone's device.
        labels: `(n,)` there.
        only: run only the first so many gradient steps, see `fine_tune`.

    Returns:
        What classifies: prototypes, a head or a task that was reset.
    """
    processor = target.adapter.processor
    pixels = normalise(images, processor)
    whole = SplitBackbone(target.backbone, 0, target.adapter.config.pooling)
    if method.startswith("hyperflow"):
        guard = "loo" if method == "hyperflow-guard" else None
        task = target.adapter.adapt(target.backbone, (pixels, labels), guard=guard)
        _ = task.prototypes
        task.reset()
        return task
    if method in GRADIENT_METHODS:
        recipe = target.recipes.fine_tuning(method)
        with eval_mode(target.backbone), target.moving(method) as parameters:
            fine_tune(target.cut(method), parameters, images, labels, processor, recipe, run_steps=only)
            with torch.no_grad():
                return unit_means(whole.forward_features(pixels).float(), labels)
    with torch.no_grad(), eval_mode(target.plain()):
        if method == "metric":
            return target.adapter.head(target.split.forward_features(pixels).float(), labels)
        found = whole.forward_features(pixels).float()
        if method == "direct":
            return unit_means(found, labels)
        if method == "head":
            return head_classifier(found, labels, target.recipes.head_c)
        return easyfsl_classifier(method, found, labels)(found)
