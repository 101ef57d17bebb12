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
    references: the true labels, in lists of the same lengths.
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
        """See `_INPUTS`.

        Raises:
            ValueError: an episode has no queries or another number of predictions than of references, or the baseline
                has another number of episodes; the episode is named.
        """
        accuracies = _compute_accuracies(predictions, references, "predictions")
        accuracy, half_width = mean_ci95(accuracies)
        result = {"accuracy": accuracy, "ci95": half_width, "n_episodes": len(accuracies)}
        if baseline is None:
            return result
        if len(baseline) != len(references):
            raise ValueError(f"the baseline has {len(baseline)} episodes, the references have {len(references)}.")
        baseline_accuracies = _compute_accuracies(baseline, references, "baseline")
        difference, half_width = mean_ci95(accuracies - baseline_accuracies)
        result["baseline_accuracy"] = float(baseline_accuracies.mean())
        result["difference"] = difference
        result["difference_ci95"] = half_width
        return result


def _compute_accuracies(predictions: list[list[int]], references: list[list[int]], name: str) -> np.ndarray:
    """Accuracy in % of each episode."""
    accuracies = []
    for i, (predicted, true) in enumerate(zip(predictions, references, strict=True)):
        if len(predicted) != len(true) or len(true) == 0:
            raise ValueError(f"episode {i} has {len(predicted)} {name} and {len(true)} references.")
        accuracies.append(100 * np.mean(np.asarray(predicted) == np.asarray(true)))
    return np.array(accuracies)
