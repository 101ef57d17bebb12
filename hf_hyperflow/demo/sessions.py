"""What people on the page share, the two models, and what each of them has alone, an adapted task."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import PIL.Image
import torch
from transformers import PreTrainedModel

from ..modeling.adapter import HyperFlowAdapter
from ..modeling.backbones import SplitBackbone
from ..modeling.leave_one_out import leave_one_out_logits
from ..modeling.locks import get_lock
from ..modeling.stopping import StoppingPoint
from ..modeling.support import SupportSet, read_support
from ..modeling.task import AdaptedTask
from ..modeling.trunks import find_trunk


@dataclass(frozen=True)
class LeaveOneOut:
    """How many of the support images are classified right by all the others.

    Attributes:
        n_images: those that can be left out, because their class has another image.
        right_before: by direct transfer, which is what the page calls "before".
        right_after: by the task where the flow was stopped.
    """

    n_images: int
    right_before: int
    right_after: int


@dataclass
class Session:
    """What one person adapted.

    Attributes:
        before: the backbone as it is, compared by plain cosines: direct transfer.
        after: the task where the flow was stopped.
        n_images: size of the support set.
        leave_one_out: None if every class has a single image.
        seconds: from holding the images in memory to being able to classify.
        has_other_head: whether `after` compares images with classes in another way than `before`.
    """

    before: AdaptedTask
    after: AdaptedTask
    n_images: int
    leave_one_out: LeaveOneOut | None
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
        self.backbone = find_trunk(backbone).eval()

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
        leave_one_out = self._leave_one_out(support, before, after)
        session = Session(before, after, len(support.labels), leave_one_out, seconds, self.adapter.config.lda)
        return session, session.save()

    def _leave_one_out(self, support: SupportSet, before: AdaptedTask, after: AdaptedTask) -> LeaveOneOut | None:
        """Measure the accuracies before and after on the support set itself."""
        point = after.stopping_point
        if point is None or not point.accuracies:
            return None
        labels = support.labels
        is_counted = torch.bincount(labels)[labels] > 1
        logits = leave_one_out_logits(self._compute_plain_features(support, before), labels, before.scale)
        is_right = logits.argmax(-1) == labels
        n_images = int(is_counted.sum())
        return LeaveOneOut(
            n_images=n_images,
            right_before=int(is_right[is_counted].sum()),
            right_after=round(point.accuracies[point.time] * n_images),
        )

    @torch.no_grad()
    def _compute_plain_features(self, support: SupportSet, before: AdaptedTask) -> torch.Tensor:
        """Features of the support images by which `before` classifies, `(n, width)`."""
        split = SplitBackbone(self.backbone, 0, self.adapter.config.pooling)
        parameter = next(self.backbone.parameters())
        pixel_values = support.pixel_values.to(parameter.device, parameter.dtype)
        with get_lock(self.backbone), self.adapter.space.inject(self.backbone).using(before.theta):
            return split.forward_features(pixel_values).float().cpu()

    def compare(self, session: Session, images: list[PIL.Image.Image]) -> tuple[list, list]:
        """Labels with scores of images, best three first, before and after the adaptation.

        The only place where the page asks its tasks: calibrated scores show up here, and so does a way to say "none".
        """
        return session.before(images, top_k=3), session.after(images, top_k=3)
