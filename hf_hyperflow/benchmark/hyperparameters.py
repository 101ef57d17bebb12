"""Settings of the baselines, chosen by grid on episodes of training domains; never on the domains that are reported."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from ..finetuning.finetune import FineTuningConfig


@dataclass(frozen=True)
class Hyperparameters:
    """Settings of the methods that have any.

    Attributes:
        steps: gradient steps of each gradient method.
        learning_rates: of Adam, of each gradient method.
        head_c: `C` of the logistic regression.
    """

    steps: dict[str, int] = field(default_factory=lambda: {"bias": 50, "lora": 50, "layernorm": 50, "full": 50})
    learning_rates: dict[str, float] = field(
        default_factory=lambda: {"bias": 1e-3, "lora": 1e-3, "layernorm": 1e-3, "full": 3e-5}
    )
    head_c: float = 10.0

    def fine_tuning(self, method: str) -> FineTuningConfig:
        """The recipe of a gradient method."""
        return FineTuningConfig(steps=self.steps[method], learning_rate=self.learning_rates[method])

    def of(self, method: str) -> dict[str, float]:
        """A method's settings, for the record; empty for one without."""
        if method == "head":
            return {"c": self.head_c}
        if method in self.steps:
            return {"steps": self.steps[method], "learning_rate": self.learning_rates[method]}
        return {}


def read_hyperparameters(path: str | Path | None) -> Hyperparameters:
    """The result of `grid_search` in a JSON file; methods that are not in it, or all without a file, keep their
    defaults.

    Raises:
        ValueError: the file is no such JSON, or names methods or settings that there are not; it is named.
        FileNotFoundError: the file is not there.
    """
    recipes = Hyperparameters()
    if path is None:
        return recipes
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: make it with training/grid_search.py, or leave it out.")
    try:
        found = json.loads(path.read_text())["recipes"]
        for method, settings in found.items():
            expected = recipes.of(method)
            if set(settings) != set(expected) or not all(value > 0 for value in settings.values()):
                raise ValueError(f"{method} has {settings}, expected positive numbers for {sorted(expected)}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the result of training/grid_search.py: {error}") from error
    tuned = {method: settings for method, settings in found.items() if method != "head"}
    return Hyperparameters(
        steps=recipes.steps | {m: int(settings["steps"]) for m, settings in tuned.items()},
        learning_rates=recipes.learning_rates | {m: float(settings["learning_rate"]) for m, settings in tuned.items()},
        head_c=float(found["head"]["c"]) if "head" in found else recipes.head_c,
    )
