"""What people on the page share, the two models, and what each of them has alone, an adapted task."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import PIL.Image
from transformers import PreTrainedModel

from ..modeling.adapter import HyperFlowAdapter
from ..modeling.locks import get_lock
from ..modeling.stopping import StoppingPoint
from ..modeling.support import read_support
from ..modeling.task import AdaptedTask


@dataclass
class Session:
    """What one person adapted.

    Attributes:
        before: the backbone as it is, compared by plain cosines: direct transfer.
        after: the task where the flow was stopped.
        n_images: size of the support set.
        seconds: from holding the images in memory to being able to classify.
        has_other_head: whether `after` compares images with classes in another way than `before`.
    """

    before: AdaptedTask
    after: AdaptedTask
    n_images: int
    seconds: float
    has_other_head: bool
    _folder: TemporaryDirectory = field(default_factory=lambda: TemporaryDirectory(prefix="hyperflow-"))

    @property
    def stopping_point(self) -> StoppingPoint:
        """Where the flow was stopped, and why."""
        assert self.after.stopping_point is not None, "the task was adapted here, not loaded"
        return self.after.stopping_point

    def save(self) -> str:
        """Write the PEFT adapter with its prototypes to a zip file, which lives as long as the session."""
        folder = Path(self._folder.name)
        self.after.save_pretrained(folder / "hyperflow-task")
        return shutil.make_archive(str(folder / "hyperflow-task"), "zip", folder, "hyperflow-task")


class SharedModels:
    """The adapter and the backbone, which any number of sessions use at once; they take turns."""

    def __init__(self, adapter: HyperFlowAdapter, backbone: PreTrainedModel):
        self.adapter = adapter.eval()
        self.backbone = backbone.eval()

    def adapt(self, images: dict[str, list[PIL.Image.Image]]) -> tuple[Session, str]:
        """Adapt to a support set; returns the session and the path of its zip file.

        Raises:
            SupportSetError: no class, one class, or a class without images.
        """
        with get_lock(self.backbone):  # so that the time is not that of waiting for others
            start = time.perf_counter()
            support = read_support(images, self.adapter.processor)
            after = self.adapter.adapt(self.backbone, support, early_stopping=True)
            _ = after.prototypes  # computed on first use, which belongs to the time
            seconds = time.perf_counter() - start
        before = self.adapter.direct_transfer(self.backbone, support)
        _ = before.prototypes  # a session does not keep the images
        session = Session(before, after, len(support.labels), seconds, self.adapter.config.lda)
        return session, session.save()

    def compare(self, session: Session, images: list[PIL.Image.Image]) -> tuple[list, list]:
        """Labels with scores of images, best three first, before and after the adaptation."""
        return session.before(images, top_k=3), session.after(images, top_k=3)
