"""`FewShotAccuracy`: few-shot accuracy as a metric of the `evaluate` library."""

from __future__ import annotations

import datasets
import numpy as np

from ..extras import require_extra
from .evaluation import mean_ci95

with require_extra("benchmark", "FewShotAccuracy"):
    import evaluate

_DESCRIPTION = "Mean accuracy over few-shot episodes with its 95 % interval, and the difference paired by episode."

_INPUTS = """
Args:
    predictions: the predicted labels of each episode's queries, a list of lists; episodes may differ in length.
    references: the true labels, likewise.
    baseline: the labels that another method predicted for the same queries (optional).
Returns:
    accuracy: mean over episodes, in %.
    ci95: half-width of its 95 % interval, 1.96 s / sqrt(N) with ddof 1; NaN for a single episode.
    n_episodes: N.
    baseline_accuracy, difference, difference_ci95: with a baseline, its accuracy and the mean and half-width of the
        differences episode by episode, in points.
Examples:
    >>> from hf_hyperflow.benchmark.evaluate_metric import FewShotAccuracy
    >>> metric = FewShotAccuracy()
    >>> metric.compute(predictions=[[0, 1, 1], [1, 0]], references=[[0, 1, 0], [1, 0]])["n_episodes"]
    2
"""

_CITATION = """\
@inproceedings{guo2020broader,
  title={A Broader Study of Cross-Domain Few-Shot Learning},
  author={Guo, Yunhui and Codella, Noel C and Karlinsky, Leonid and Codella, James V and Smith, John R and
          Saenko, Kate and Rosing, Tajana and Feris, Rogerio},
  booktitle={ECCV},
  year={2020}
}
"""


class FewShotAccuracy(evaluate.Metric):
    """Mean accuracy over episodes with its 95 % interval; an example is an episode.

    Nothing is fetched from the Hub. `add(prediction=..., reference=...)` takes one episode, `add_batch` several,
    `compute` all at once; `compute(baseline=...)` compares with another method, paired by episode.
    """

    def _info(self) -> evaluate.MetricInfo:
        labels = datasets.List(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": labels, "references": labels}),
        )

    def _compute(
        self, predictions: list[list[int]], references: list[list[int]], baseline: list[list[int]] | None = None
    ) -> dict[str, float]:
        """See the inputs' description.

        Raises:
            ValueError: an episode without queries or with another number of predictions than of references, or a
                baseline of another number of episodes; the episode is named.
        """
        found = _accuracies(predictions, references, "predictions")
        mean, half = mean_ci95(found)
        result = {"accuracy": mean, "ci95": half, "n_episodes": len(found)}
        if baseline is None:
            return result
        if len(baseline) != len(references):
            raise ValueError(f"the baseline has {len(baseline)} episodes, the references have {len(references)}.")
        others = _accuracies(baseline, references, "baseline")
        difference, difference_half = mean_ci95(found - others)
        return result | {
            "baseline_accuracy": float(others.mean()),
            "difference": difference,
            "difference_ci95": difference_half,
        }


def _accuracies(predictions: list[list[int]], references: list[list[int]], name: str) -> np.ndarray:
    """Accuracy in % of each episode."""
    for i, (predicted, true) in enumerate(zip(predictions, references, strict=True)):
        if len(predicted) != len(true) or len(true) == 0:
            raise ValueError(f"episode {i} has {len(predicted)} {name} and {len(true)} references.")
    pairs = zip(predictions, references, strict=True)
    return np.array([100 * np.mean(np.asarray(p) == np.asarray(r)) for p, r in pairs])
