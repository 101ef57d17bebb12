"""Optional packages: which extra installs each, and what is said when one of them is missing.

The core installs what adapting needs. The other doors need more, and name their extra when a package is not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

#: Packages of each extra, by the name that they are imported under.
PACKAGES = {
    "cli": ("typer", "rich", "tqdm"),
    "benchmark": ("typer", "rich", "tqdm", "accelerate", "evaluate", "sklearn", "matplotlib", "pyarrow"),
    "train": ("torch", "tqdm", "accelerate", "yaml", "tensorboard", "sklearn", "matplotlib", "pyarrow"),
    "demo": ("typer", "rich", "tqdm", "gradio", "sklearn", "matplotlib"),
    "ode": ("torchdiffeq",),
    "onnx": ("torch", "onnxscript", "onnx_ir", "onnxruntime"),
    "weights": ("hf_hyperflow_weights",),
}


class MissingExtraError(ImportError):
    """An optional package is not installed; the message has the command that installs it."""


@contextmanager
def require_extra(extra: str, purpose: str) -> Iterator[None]:
    """Within, the failing import of an optional package is reported together with the extra that brings it.

    Args:
        extra: one of `PACKAGES`.
        purpose: what the package is needed for, the subject of the message ("the demo").

    Raises:
        MissingExtraError: a package of the extra is not installed. Other failing imports are left as they are.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in PACKAGES[extra]:
            raise
        raise MissingExtraError(
            f'{purpose} needs {package}, which is not installed: pip install "hf-hyperflow[{extra}]"'
        ) from error
