"""Views of images: mirror images and crops. What several views of an image have in common tells more of it than one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F

#: The most views there are: the image as it is, two crops, and the mirror image.
MAX_VIEWS = 4

#: Part of an image's height and width that a crop has.
CROP = 0.8


def require_views(views: Any) -> int:
    """The number of views, if there are as many.

    Raises:
        ValueError: it is not a whole number from 1 to 4.
    """
    is_whole = isinstance(views, Integral) and not isinstance(views, bool)
    if not is_whole or not 1 <= int(views) <= MAX_VIEWS:
        raise ValueError(f"views must be a whole number from 1 to {MAX_VIEWS}, not {views!r}.")
    return int(views)


def make_view(pixel_values: torch.Tensor, number: int) -> torch.Tensor:
    """View `number` of images `(n, 3, height, width)`, of the same shape.

    View 0 is the images as they are. Views 1 and 2 are crops of the top left and the bottom right corner, brought to
    the size of the image. View 3 is the mirror image.
    """
    if number == 0:
        return pixel_values
    if number == 3:
        return pixel_values.flip(-1)
    height, width = pixel_values.shape[-2:]
    n_rows, n_columns = max(1, round(CROP * height)), max(1, round(CROP * width))
    top, left = 0, 0
    if number == 2:
        top, left = height - n_rows, width - n_columns
    crop = pixel_values[..., top : top + n_rows, left : left + n_columns]
    resized = F.interpolate(crop.float(), size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    return resized.to(pixel_values.dtype)


def average_views(
    compute_features: Callable[[torch.Tensor], torch.Tensor], pixel_values: torch.Tensor, views: int
) -> torch.Tensor:
    """Features `(n, width)` float32 of images, averaged over the first `views` views.

    Args:
        compute_features: takes pixel values and gives their features `(n, width)`.
        pixel_values: `(n, 3, height, width)`.
    """
    features = [compute_features(make_view(pixel_values, number)).float() for number in range(views)]
    return combine_views(features)


def combine_views(features: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean direction of the features `(n, width)` of several views, with the lengths of the first.

    Lengths carry no class. They stay those of the images as they are, because a mean of several vectors is shorter
    than each, and the head would take that for less noise.
    """
    if len(features) == 1:
        return features[0]
    directions = torch.stack([F.normalize(view, dim=-1) for view in features])
    mean = F.normalize(directions.mean(dim=0), dim=-1)
    return mean * features[0].norm(dim=-1, keepdim=True)
