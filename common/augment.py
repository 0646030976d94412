"""Weak and strong augmentation: the recipe of ST++ and UniMatch (released code).

Weak is geometry, in a loader's worker. Strong is photometry and CutMix, on the device, on batches
[B, 3, H, W] in [0, 1]: each image has its own parameters, tensors [B] where torchvision takes
numbers, and nothing is read back from the device.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import rgb_to_grayscale

IGNORE = 255
BLUR_RADIUS = 8  # 17 taps: four standard deviations of the largest blur of the recipe
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # in the order of the colour jitter


def weak_geometry(image: Image.Image, mask: np.ndarray | None, crop: int, scale, rng):
    """Resized within scale, in whole pixels, cropped (padded right and bottom), flipped with p 0.5.

    image: PIL RGB; mask: uint8 [H, W] or None. Returns the image uint8 [3, crop, crop], the mask
    uint8 [crop, crop] or None, and valid, bool [crop, crop]; on padding 0, 255 and False.
    """
    long_side = max(image.size)
    least, most = (int(long_side * factor) for factor in scale)
    drawn = int(rng.integers(least, most, endpoint=True))  # the new long side
    width, height = (max(1, int(side * drawn / long_side + 0.5)) for side in image.size)
    top = int(rng.integers(0, max(height - crop, 0), endpoint=True))
    left = int(rng.integers(0, max(width - crop, 0), endpoint=True))
    bottom, right = min(top + crop, height), min(left + crop, width)

    # Only what the crop shows is resized; PIL's filter reads beyond `box`, as in a whole resize.
    box = (left * image.width / width, top * image.height / height,
           right * image.width / width, bottom * image.height / height)
    resized = image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=box)
    views = np.zeros((5, crop, crop), np.uint8)  # red, green, blue, label, valid
    views[3] = IGNORE
    shown = views[:, : bottom - top, : right - left]
    shown[:3] = np.asarray(resized).transpose(2, 0, 1)
    shown[4] = True
    if mask is not None:
        labels = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
        shown[3] = labels.crop((left, top, right, bottom))
    if rng.random() < 0.5:
        views = np.ascontiguousarray(views[:, :, ::-1])
    return views[:3], None if mask is None else views[3], views[4].view(bool)


def per_image(values: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return values[:, None, None, None]


def blend(x: Tensor, reference: Tensor, factor: Tensor) -> Tensor:
    """factor * x + (1 - factor) * reference, clamped to [0, 1]; factor [B] >= 0, 1 keeps x."""
    return torch.lerp(reference, x, per_image(factor)).clamp(0, 1)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * per_image(factor)).clamp(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    return blend(x, rgb_to_grayscale(x).mean((1, 2, 3), keepdim=True), factor)


def adjust_sharpness(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with PIL's smoothed version: weights 5 in the middle, 1 around it; the border stays."""
    h, w = x.shape[2] - 2, x.shape[3] - 2
    around = sum(x[:, :, i : i + h, j : j + w] for i in range(3) for j in range(3))
    smooth = x.clone()
    smooth[:, :, 1:-1, 1:-1] = (around + 4 * x[:, :, 1:-1, 1:-1]) / 13
    return blend(x, smooth, factor)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of each image by shift [B] in [-0.5, 0.5] of the colour circle.

    With hue h in sixths of the circle and chroma c = max - min (HSV), channel n = 5, 3, 1 (red,
    green, blue) is  max - c clamp(min(k, 4 - k), 0, 1)  at  k = (n + h) mod 6.
    """
    red, green, blue = x.split(1, dim=1)
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    divisor = chroma.masked_fill(chroma == 0, 1)  # grey has no hue: chroma 0 hides any
    h = torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    h = torch.where(value == red, (green - blue) / divisor, h)
    n = torch.arange(5, 0, -2, device=x.device, dtype=x.dtype)[:, None, None]
    k = (n + h + 6 * per_image(shift)) % 6
    return (value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)).clamp(0, 1)


def adjust_in_order(x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast, saturation as blends: factors [B, n], operations `order` [B, n]."""
    for factor, operation in zip(factors.T, order.T):
        gray = rgb_to_grayscale(x)
        contrast = per_image(operation == CONTRAST)
        reference = torch.where(contrast, gray.mean((1, 2, 3), keepdim=True), gray)
        x = blend(x, reference * per_image(operation != BRIGHTNESS), factor)
    return x


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Sigma [B] in pixels, below about 3; borders reflect, so at least 9 x 9 pixels."""
    offsets = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=x.device, dtype=x.dtype)
    weights = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    weights = weights / weights.sum(1, keepdim=True)  # [B, 17]
    x = F.pad(x, 4 * (BLUR_RADIUS,), mode="reflect")
    for dim in (3, 2):
        padded, size = x, x.shape[dim] - 2 * BLUR_RADIUS
        x = torch.zeros_like(padded.narrow(dim, 0, size))
        for tap, weight in enumerate(weights.T):  # unlike conv2d exact under autocast and TF32
            x.addcmul_(padded.narrow(dim, tap, size), per_image(weight))
    return x


class Photometry(NamedTuple):
    """Strength of the strong view."""

    jitter: float = 0.5  # torchvision's ColorJitter(jitter, jitter, jitter, jitter / 2)
    blur: tuple[float, float] = (0.1, 2.0)  # sigma, pixels; 0.1 leaves an image as it is

    def scaled(self, strength: float) -> "Photometry":
        jitter, (least, most) = self
        return Photometry(strength * jitter, (least, max(least, strength * most)))


def strong_augment(x: Tensor, photometry: Photometry = Photometry()) -> Tensor:
    """Colour jitter (p 0.8), grayscale (p 0.2), blur (p 0.5) of x, float [B, 3, H, W] in [0, 1].

    Jitter: three factors U(1 - j, 1 + j), hue's shift U(-j / 2, j / 2), any order. Blur:
    sigma U(least, most).
    """
    jitter, (least, most) = photometry
    uniform = torch.rand(8, len(x), device=x.device, dtype=x.dtype)  # 3 factors, hue, sigma, 3 p
    order = torch.rand(len(x), 4, device=x.device).argsort(1)
    factors, shift = 1 + jitter * (2 * uniform[:3] - 1), jitter / 2 * (2 * uniform[3] - 1)
    sigma = least + (most - least) * uniform[4]
    jitters, grays, blurs = (per_image(u < p) for u, p in zip(uniform[5:], (0.8, 0.2, 0.5)))
    # All images take every operation and torch.where keeps what was drawn. Likewise the hue, the
    # costly one, comes once: after three blends and before three, with factor 1 out of turn.
    factors = torch.cat([factors, torch.ones_like(shift)[None]]).T.gather(1, order)
    later = (order == HUE).cumsum(1) > 0
    jittered = adjust_in_order(x, factors.masked_fill(later, 1)[:, :3], order[:, :3])
    jittered = adjust_hue(jittered, shift)
    jittered = adjust_in_order(jittered, factors.masked_fill(~later, 1)[:, 1:], order[:, 1:])
    x = torch.where(jitters, jittered, x)
    x = torch.where(grays, rgb_to_grayscale(x), x)
    return torch.where(blurs, gaussian_blur(x, sigma).clamp(0, 1), x)


def cutmix_boxes(batch: int, size: int, p: float = 0.5, device="cpu") -> Tensor:
    """One random box per image with probability p: bool [B, size, size], True inside.

    UniMatch's rejection sampling, 128 trials at once: the area is drawn once, then aspect and upper
    left corner until the box lies inside. Should no trial fit (1 box in 60,000), there is none.
    """
    trials = (batch, 128)
    wanted = torch.rand(batch, 1, device=device) < p
    area = (0.02 + 0.38 * torch.rand(batch, 1, device=device)) * size**2
    aspect = 0.3 + (1 / 0.3 - 0.3) * torch.rand(trials, device=device)  # height / width
    width, height = (area / aspect).sqrt().long(), (area * aspect).sqrt().long()
    left = torch.randint(size, trials, device=device)
    top = torch.randint(size, trials, device=device)
    fits = wanted & (left + width <= size) & (top + height <= size)
    first = fits.int().argmax(1, keepdim=True)
    chosen = (trial.gather(1, first) for trial in (left, top, width, height, fits))
    left, top, width, height, fits = chosen  # each [B, 1]
    line = torch.arange(size, device=device)
    rows = (top <= line) & (line < top + height) & fits
    columns = (left <= line) & (line < left + width)
    return rows[:, :, None] & columns[:, None, :]


def cutmix(boxes: Tensor, own: Tensor, partner: Tensor) -> Tensor:
    """Partner's pixels inside boxes [B, H, W]; own and partner [B, C, H, W] or [B, H, W]."""
    return torch.where(boxes if own.dim() == 3 else boxes[:, None], partner, own)


def to_float(images: Tensor) -> Tensor:
    """uint8 -> float32 in [0, 1]; float images pass through as they are."""
    return images if images.is_floating_point() else images.float() / 255


def normalize(images: Tensor) -> Tensor:
    """uint8, or float in [0, 1], [..., 3, H, W] -> float without ImageNet's mean and deviation."""
    x = to_float(images)
    # Filled on the device: torch.tensor(..., device="cuda") copies from the host and waits for it.
    mean = torch.cat([x.new_full((1, 1, 1), value) for value in (0.485, 0.456, 0.406)])
    std = torch.cat([x.new_full((1, 1, 1), value) for value in (0.229, 0.224, 0.225)])
    return (x - mean) / std
