"""Print the oldest release of each package that pyproject.toml allows, as pip's requirements: `name==1.2`.

They are those of the library, its benchmarks, training and tests; torch, gradio, Selenium and pillow-heif are left out.
This needs Python 3.11.
"""

from __future__ import annotations

from pathlib import Path

import tomllib

EXTRAS = ("cli", "benchmark", "train", "ode", "test")
LEFT_OUT = ("hf-hyperflow", "torch", "selenium", "pillow-heif")


def find_lowest() -> dict[str, str]:
    """The oldest release of each package."""
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
    requirements = list(project["dependencies"])
    for extra in EXTRAS:
        requirements += project["optional-dependencies"][extra]
    lowest = {}
    for requirement in requirements:
        name, _, bounds = requirement.partition(">=")
        if name.split("[")[0] not in LEFT_OUT:
            lowest[name] = bounds.split(",")[0]
    return lowest


if __name__ == "__main__":
    print(*(f"{name}=={release}" for name, release in find_lowest().items()))
