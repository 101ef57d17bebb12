"""Random views of images, and new domains made out of old ones (training only)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def random_views(images: torch.Tensor, generator: torch.Generator, *, min_area: float = 0.35) -> torch.Tensor:
    """A random resized crop, flip and colour change of each image.

    Args:
        images: `(n, 3, h, w)` uint8.
        generator: a CPU generator; the views are a function of its state.
        min_area: smallest share of the image's area that a crop keeps.

    Returns:
        `(n, 3, h, w)` float32 in 0..255, on the images' device.
    """
    n = len(images)

    def uniform(low: float, high: float) -> torch.Tensor:
        return (low + (high - low) * torch.rand(n, generator=generator)).to(images.device)

    area, ratio = uniform(min_area, 1.0), torch.exp(uniform(-0.29, 0.29))
    width, height = (area * ratio).sqrt().clamp(max=1.0), (area / ratio).sqrt().clamp(max=1.0)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    affine = torch.zeros(n, 2, 3, device=images.device)
    affine[:, 0, 0], affine[:, 1, 1] = width * flip, height
    affine[:, 0, 2], affine[:, 1, 2] = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    views = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return _recoloured(views, uniform(0.7, 1.3), uniform(0.7, 1.3), uniform(0.6, 1.4))


def _recoloured(
    images: torch.Tensor, brightness: torch.Tensor, contrast: torch.Tensor, saturation: torch.Tensor
) -> torch.Tensor:
    brightness, contrast, saturation = (x.view(-1, 1, 1, 1) for x in (brightness, contrast, saturation))
    grey = images.mean(dim=1, keepdim=True)
    images = grey + saturation * (images - grey)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (brightness * (mean + contrast * (images - mean))).clamp(0, 255)


def randomize_domain(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A new domain out of an old one: one random chain of one to three changes, the same for all images.

    Labels keep their meaning; what the images look like does not. Against overfitting the flow to the few domains it
    is trained on (random convolutions: Lee et al. 2020; made-up tasks: Wang & Deng 2021). A change that would leave
    one of the images without content (thresholded to one grey, zoomed into its margin) is left out for all of them,
    so that no image comes out constant that did not go in so.

    Args:
        images: `(n, 3, h, w)` in 0..255, uint8 or float.
        generator: a CPU generator; the chain is a function of its state.

    Returns:
        `(n, 3, h, w)` float32 in 0..255.
    """
    images = images.float()
    content = _contrast(images) >= _LEAST_CONTRAST
    length = int(torch.randint(1, 4, (), generator=generator))
    for choice in torch.randperm(len(_CHANGES), generator=generator)[:length].tolist():
        changed = _CHANGES[choice](images, generator).clamp(0, 255)
        if (_contrast(changed)[content] >= _LEAST_CONTRAST).all():
            images = changed
    return images.contiguous()


#: Grey levels between the darkest and the brightest pixel (of a channel) below which a picture shows nothing.
_LEAST_CONTRAST = 8


def _contrast(images: torch.Tensor) -> torch.Tensor:
    pixels = images.flatten(2)
    return (pixels.amax(2) - pixels.amin(2)).amax(1)


def _number(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _invert(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return 255 - images


def _mix_colours(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    mixing = torch.softmax(2 * torch.randn(3, 3, generator=generator), dim=1).to(images.device)
    return torch.einsum("oc,nchw->nohw", mixing, images)


def _grey(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return images.mean(dim=1, keepdim=True).expand_as(images)


def _edges(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=images.device)
    kernels = torch.stack([kernel, kernel.T]).unsqueeze(1)
    slopes = F.conv2d(F.pad(images.mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate"), kernels)
    return slopes.norm(dim=1, keepdim=True).mul(0.5).clamp(max=255).expand_as(images)


def _blur(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    size = int(torch.randint(1, 3, (), generator=generator))
    for _ in range(2):
        images = F.avg_pool2d(F.pad(images, (size,) * 4, mode="reflect"), 2 * size + 1, stride=1)
    return images


def _rotate(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    angle = _number(generator, -math.pi, math.pi)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]])
    grid = F.affine_grid(turn.expand(len(images), 2, 3).to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _random_convolution(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    size = 1 + 2 * int(torch.randint(0, 3, (), generator=generator))
    weight = torch.randn(3, 3, size, size, generator=generator).to(images.device) / math.sqrt(3 * size * size)
    changed = F.conv2d(F.pad(images / 127.5 - 1, (size // 2,) * 4, mode="replicate"), weight)
    share = _number(generator, 0.3, 1.0)
    return share * (changed.clamp(-1, 1) + 1) * 127.5 + (1 - share) * images


def _threshold(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    levels = int(torch.randint(2, 5, (), generator=generator))
    return (images / 255 * (levels - 1)).round() * (255 / (levels - 1))


def _coarsen(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    small = F.interpolate(images, scale_factor=_number(generator, 0.25, 0.6), mode="area")
    return F.interpolate(small, size=images.shape[-2:], mode="bilinear", align_corners=False)


def _zoom(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    height, width = images.shape[-2:]
    share = _number(generator, 0.45, 0.8)
    top, left = (round(_number(generator, 0, (1 - share) * side)) for side in (height, width))
    part = images[:, :, top : top + round(share * height), left : left + round(share * width)]
    return F.interpolate(part, size=(height, width), mode="bilinear", align_corners=False)


def _noise(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    return images + _number(generator, 10, 50) * noise


def _fade(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    contrast, level = _number(generator, 0.2, 0.6), _number(generator, 40, 215)
    return level + contrast * (images - images.mean())


_CHANGES = (
    _invert,
    _mix_colours,
    _grey,
    _edges,
    _blur,
    _rotate,
    _random_convolution,
    _threshold,
    _coarsen,
    _zoom,
    _noise,
    _fade,
)
