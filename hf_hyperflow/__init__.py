"""HyperFlow: adapt Hugging Face vision models to your classes from a handful of images, without gradients."""

from .adapter import HyperFlowAdapter
from .backbones import IncompatibleBackboneError
from .configuration import HyperFlowConfig
from .images import ImageError
from .saving import CheckpointError
from .support import SupportSetError
from .task import AdaptedTask
from .version import __version__

__all__ = [
    "AdaptedTask",
    "CheckpointError",
    "HyperFlowAdapter",
    "HyperFlowConfig",
    "ImageError",
    "IncompatibleBackboneError",
    "SupportSetError",
    "__version__",
]
