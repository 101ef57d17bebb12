"""HyperFlow: adapt Hugging Face vision models to your classes from a handful of images, without gradients."""

from transformers import AutoConfig, AutoModel

from .adapter import HyperFlowAdapter
from .backbones import IncompatibleBackboneError
from .configuration import HyperFlowConfig
from .images import ImageError
from .pipeline import FewShotImageClassificationPipeline
from .saving import CheckpointError
from .support import SupportSetError
from .task import AdaptedTask
from .version import __version__

__all__ = [
    "AdaptedTask",
    "CheckpointError",
    "FewShotImageClassificationPipeline",
    "HyperFlowAdapter",
    "HyperFlowConfig",
    "ImageError",
    "IncompatibleBackboneError",
    "SupportSetError",
    "__version__",
]

# Where this package is installed, AutoModel loads an adapter by itself; elsewhere with trust_remote_code=True, for
# which save_pretrained puts the code beside the weights.
AutoConfig.register(HyperFlowConfig.model_type, HyperFlowConfig)
AutoModel.register(HyperFlowConfig, HyperFlowAdapter)
HyperFlowConfig.register_for_auto_class()
HyperFlowAdapter.register_for_auto_class("AutoModel")
