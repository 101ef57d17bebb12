"""HyperFlow: adapt Hugging Face vision models to your classes from a handful of images, without gradients."""

from transformers import AutoConfig, AutoModel

from .modeling.adapter import HyperFlowAdapter
from .modeling.configuration import HyperFlowConfig
from .modeling.images import ImageError
from .modeling.saving import CheckpointError
from .modeling.support import SupportSetError
from .modeling.task import AdaptedTask
from .modeling.trunks import IncompatibleBackboneError
from .modeling.version import __version__
from .pipeline import FewShotImageClassificationPipeline
from .serving.mixed_batch import predict_mixed, score_mixed
from .serving.task_store import TaskStore

__all__ = [
    "AdaptedTask",
    "CheckpointError",
    "FewShotImageClassificationPipeline",
    "HyperFlowAdapter",
    "HyperFlowConfig",
    "ImageError",
    "IncompatibleBackboneError",
    "SupportSetError",
    "TaskStore",
    "__version__",
    "predict_mixed",
    "score_mixed",
]

# Where this package is installed, AutoModel loads an adapter by itself; elsewhere with trust_remote_code=True, for
# which save_pretrained puts the code beside the weights.
AutoConfig.register(HyperFlowConfig.model_type, HyperFlowConfig)
AutoModel.register(HyperFlowConfig, HyperFlowAdapter)
HyperFlowConfig.register_for_auto_class()
HyperFlowAdapter.register_for_auto_class("AutoModel")
