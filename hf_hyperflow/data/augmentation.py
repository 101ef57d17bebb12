"""Random views of images, and domain randomisation: new looks for whole tasks (training only)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

#: An image shows something if the darkest and the brightest pixel of a channel differ by so many grey levels.
_LEAST_CONTRAST = 8


def random_views(images: torch.Tensor, generator: torch.Generator, *, min_area: float = 0.35) -> torch.Tensor:
    """A random resized crop, flip and colour change of each image.

    Args:
        images: `(n, 3, h, w)` uint8, or float in 0..255.
        generator: a CPU generator; the views are a function of its state.
        min_area: smallest share of the image's area that a crop keeps.

    Returns:
        `(n, 3, h, w)` float32 in 0..255, on the images' device.
    """

    def uniform(low: float, high: float) -> torch.Tensor:
        """One number per image, `(n,)`."""
        return (low + (high - low) * torch.rand(len(images), generator=generator)).to(images.device)

    area = uniform(min_area, 1.0)
    ratio = torch.exp(uniform(-0.29, 0.29))
    width = (area * ratio).sqrt().clamp(max=1.0)
    height = (area / ratio).sqrt().clamp(max=1.0)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    affine = torch.zeros(len(images), 2, 3, device=images.device)
    affine[:, 0, 0] = width * flip
    affine[:, 1, 1] = height
    affine[:, 0, 2] = uniform(-1, 1) * (1 - width)
    affine[:, 1, 2] = uniform(-1, 1) * (1 - height)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    views = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    brightness, contrast, saturation = uniform(0.7, 1.3), uniform(0.7, 1.3), uniform(0.6, 1.4)
    return _change_colours(views, brightness, contrast, saturation)


def _change_colours(
    images: torch.Tensor, brightness: torch.Tensor, contrast: torch.Tensor, saturation: torch.Tensor
) -> torch.Tensor:
    """Images `(n, 3, h, w)` in 0..255 with each of their three properties multiplied by a factor, `(n,)` each."""
    shape = (-1, 1, 1, 1)
    grey = images.mean(dim=1, keepdim=True)
    images = grey + saturation.view(shape) * (images - grey)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (brightness.view(shape) * (mean + contrast.view(shape) * (images - mean))).clamp(0, 255)


def randomize_domain(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Domain randomisation: one to three random transforms, the same for all images.

    Labels keep their meaning, but what the images look like changes. That keeps the flow from overfitting to the few
    domains it is trained on (random convolutions: Lee et al. 2020; augmented tasks: Wang & Deng 2021). A transform that
    would leave an image without content (thresholded to a single grey, zoomed into its margin) is skipped for all
    images, so that no image comes out blank unless it went in blank.

    Args:
        images: `(n, 3, h, w)` in 0..255, uint8 or float.
        generator: a CPU generator; the transforms are a function of its state.

    Returns:
        `(n, 3, h, w)` float32 in 0..255.
    """
    images = images.float()
    has_content = _measure_contrast(images) >= _LEAST_CONTRAST
    n_transforms = int(torch.randint(1, 4, (), generator=generator))
    for choice in torch.randperm(len(_TRANSFORMS), generator=generator)[:n_transforms].tolist():
        transformed = _TRANSFORMS[choice](images, generator).clamp(0, 255)
        if (_measure_contrast(transformed)[has_content] >= _LEAST_CONTRAST).all():
            images = transformed
    return images.contiguous()


def _measure_contrast(images: torch.Tensor) -> torch.Tensor:
    """The largest difference between two pixels of one channel, `(n,)`."""
    pixels = images.flatten(2)
    return (pixels.amax(2) - pixels.amin(2)).amax(1)


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


# The transforms take images `(n, 3, h, w)`, float in 0..255, to images of the same shape, not yet clamped to 0..255.


def _invert(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return 255 - images


def _mix_colours(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    mixing = torch.softmax(2 * torch.randn(3, 3, generator=generator), dim=1).to(images.device)
    return torch.einsum("oc,nchw->nohw", mixing, images)


def _to_grey(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return images.mean(dim=1, keepdim=True).expand_as(images)


def _find_edges(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=images.device)
    kernels = torch.stack([sobel, sobel.T]).unsqueeze(1)
    slopes = F.conv2d(F.pad(images.mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate"), kernels)
    return slopes.norm(dim=1, keepdim=True).mul(0.5).clamp(max=255).expand_as(images)


def _blur(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    size = int(torch.randint(1, 3, (), generator=generator))
    for _ in range(2):
        images = F.avg_pool2d(F.pad(images, (size,) * 4, mode="reflect"), 2 * size + 1, stride=1)
    return images


def _rotate(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    angle = _uniform(generator, -math.pi, math.pi)
    rotation = torch.tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]])
    grid = F.affine_grid(rotation.expand(len(images), 2, 3).to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _convolve(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    size = 1 + 2 * int(torch.randint(0, 3, (), generator=generator))
    weight = torch.randn(3, 3, size, size, generator=generator).to(images.device) / math.sqrt(3 * size * size)
    convolved = F.conv2d(F.pad(images / 127.5 - 1, (size // 2,) * 4, mode="replicate"), weight)
    share = _uniform(generator, 0.3, 1.0)
    return share * (convolved.clamp(-1, 1) + 1) * 127.5 + (1 - share) * images


def _threshold(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    levels = int(torch.randint(2, 5, (), generator=generator))
    return (images / 255 * (levels - 1)).round() * (255 / (levels - 1))


def _coarsen(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    small = F.interpolate(images, scale_factor=_uniform(generator, 0.25, 0.6), mode="area")
    return F.interpolate(small, size=images.shape[-2:], mode="bilinear", align_corners=False)


def _zoom(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    height, width = images.shape[-2:]
    share = _uniform(generator, 0.45, 0.8)
    top = round(_uniform(generator, 0, (1 - share) * height))
    left = round(_uniform(generator, 0, (1 - share) * width))
    part = images[:, :, top : top + round(share * height), left : left + round(share * width)]
    return F.interpolate(part, size=(height, width), mode="bilinear", align_corners=False)


def _add_noise(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    return images + _uniform(generator, 10, 50) * noise


def _fade(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    contrast, level = _uniform(generator, 0.2, 0.6), _uniform(generator, 40, 215)
    return level + contrast * (images - images.mean())


#: Recorded tasks depend on which transforms there are and in what order: with others, their seeds give other images.
_TRANSFORMS = (
    _invert,
    _mix_colours,
    _to_grey,
    _find_edges,
    _blur,
    _rotate,
    _convolve,
    _threshold,
    _coarsen,
    _zoom,
    _add_noise,
    _fade,
)
