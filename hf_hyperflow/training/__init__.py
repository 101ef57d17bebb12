"""Training of the drift network (`DriftTrainer`), and what may come before it: pretraining, recording trajectories."""

from ..extras import require_extra

with require_extra("train", "training"):
    from .config import DriftTrainingConfig
    from .trainer import DriftTrainer

__all__ = ["DriftTrainer", "DriftTrainingConfig"]
