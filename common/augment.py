"""Weak and strong augmentation.

Weak = geometry. It runs in the loader's workers, one image at a time, on uint8: random scale, crop with
padding, flip. Only the part of the picture that the crop shows is ever resized.

Strong = photometry (colour jitter, grayscale, blur) and CutMix. It runs on the training device, on whole
batches [B,3,H,W], and every image of the batch has its own parameters: a function takes tensors [B] where
torchvision takes numbers. Nothing here reads a value back from the device, so a training step is never stalled.

    image, mask, valid = weak_geometry(picture, mask, crop=321, scale=(0.5, 2.0), rng=rng)    # worker
    weak = to_float(images)                                                                    # device
    strong = strong_augment(weak, generator)
    boxes = cutmix_boxes(len(strong), strong.shape[-2:], generator, device=strong.device)
    logits = network(normalize(cutmix(boxes, strong, strong.flip(0))))

Recipe and its numbers: ST++ / UniMatch (released code), which the later methods of the field keep. Two things
differ there: its blur is PIL's (three box filters close to a Gaussian), its CutMix box is drawn in a Python loop.
"""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IGNORE = 255
BLUR_RADIUS = 8  # 17 taps: four standard deviations at sigma 2, the largest blur of the recipe
CUTMIX_TRIALS = 128  # candidates per image; see cutmix_boxes
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # what the numbers in color_jitter's `order` mean


# ---- Weak: geometry on uint8, in a loader worker -----------------------------------------------------


class Geometry(NamedTuple):
    """A drawn weak augmentation: resize the picture to height x width, cut at (top, left), flip."""

    height: int
    width: int
    top: int
    left: int
    flip: bool


def draw_geometry(height: int, width: int, crop: int, scale: tuple[float, float], rng: np.random.Generator) -> Geometry:
    """Draw a Geometry for a picture of height x width pixels.

    The long side becomes an integer drawn uniformly from [int(long * scale[0]), int(long * scale[1])], both ends
    included; the other side keeps the aspect, rounded. The place of the crop is uniform; flip has p 0.5.
    """
    long_side = max(height, width)
    new_long = int(rng.integers(int(long_side * scale[0]), int(long_side * scale[1]), endpoint=True))
    new_height, new_width = (max(1, int(side * new_long / long_side + 0.5)) for side in (height, width))
    top = int(rng.integers(0, max(new_height - crop, 0), endpoint=True))
    left = int(rng.integers(0, max(new_width - crop, 0), endpoint=True))
    return Geometry(new_height, new_width, top, left, bool(rng.random() < 0.5))


def _nearest_indices(source: int, target: int) -> np.ndarray:
    """Source index [target] of every pixel when PIL's NEAREST resizes a line from source to target pixels."""
    step = source / target
    steps = np.full(target, step)
    steps[0] = step * 0.5  # the centre of the first pixel
    # PIL adds the step again and again, so its rounding errors add up; to agree on every pixel so must ours.
    return np.add.accumulate(steps).astype(np.int64)


def apply_geometry(
    image: Image.Image, mask: np.ndarray | None, crop: int, geometry: Geometry
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Resize, pad at the right and bottom, crop and flip as `geometry` says; see weak_geometry for the shapes."""
    height, width, top, left, flip = geometry
    rows, columns = min(crop, height - top), min(crop, width - left)  # what the crop shows of the picture
    across, down = image.width / width, image.height / height
    # PIL's filter reads beyond `box` where the picture goes on, so the cut's borders are those of a whole resize.
    right, bottom = min((left + columns) * across, image.width), min((top + rows) * down, image.height)
    box = (left * across, top * down, right, bottom)
    resized = np.asarray(image.resize((columns, rows), Image.Resampling.BILINEAR, box=box))

    def place(pixels: np.ndarray, fill: int) -> np.ndarray:
        canvas = np.full((*pixels.shape[:-2], crop, crop), fill, pixels.dtype)
        view = canvas[..., ::-1] if flip else canvas  # writing through a mirrored view flips without a copy
        view[..., :rows, :columns] = pixels
        return canvas

    valid = place(np.ones((rows, columns), bool), False)
    if mask is not None:
        source_rows = _nearest_indices(image.height, height)[top : top + rows]
        source_columns = _nearest_indices(image.width, width)[left : left + columns]
        mask = place(mask[source_rows][:, source_columns], IGNORE)
    return place(resized.transpose(2, 0, 1), 0), mask, valid


def weak_geometry(
    image: Image.Image, mask: np.ndarray | None, crop: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Random scale, random crop with padding, random flip: the weak augmentation of the field.

    image: PIL RGB, any size. mask: uint8 [H,W] of the same size, or None for an unlabeled picture.
    Returns image uint8 [3,crop,crop] (padding 0), mask uint8 [crop,crop] (padding 255) or None, and
    valid bool [crop,crop], False on padding. Bilinear (antialiased, PIL) for the image, nearest for the mask.
    Raises ValueError when the image is not RGB or the mask has another size.
    """
    if image.mode != "RGB":
        raise ValueError(f"expected an RGB image, got mode {image.mode}")
    if mask is not None and mask.shape != (image.height, image.width):
        raise ValueError(f"mask {mask.shape} does not fit an image of {(image.height, image.width)}")
    return apply_geometry(image, mask, crop, draw_geometry(image.height, image.width, crop, scale, rng))


# ---- Strong: photometry on the device. x: float [B,3,H,W] in [0,1]; parameters: float [B] ----------------


def _per_image(parameter: Tensor) -> Tensor:
    """[B] -> [B,1,1,1]."""
    return parameter[:, None, None, None]


def _luminance(x: Tensor) -> Tensor:
    """ITU-R 601 grey [B,1,H,W], with torchvision's digits; grey pictures [B,1,H,W] are their own."""
    if x.shape[1] == 1:
        return x
    return 0.2989 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]


def _blend(x: Tensor, reference: Tensor, factor: Tensor) -> Tensor:
    """factor * x + (1 - factor) * reference, clamped to [0,1]; factor [B] may exceed 1."""
    return torch.lerp(reference, x, _per_image(factor)).clamp(0, 1)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with black. factor [B] >= 0; 1 changes nothing."""
    return (x * _per_image(factor)).clamp(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean grey of each image. factor [B] >= 0; 1 changes nothing."""
    return _blend(x, _luminance(x).mean((1, 2, 3), keepdim=True), factor)


def adjust_sharpness(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with a smoothed version: weights 5 in the middle and 1 around it, of 13; the border stays as it is (PIL's filter)."""
    height, width = x.shape[2:]
    if min(height, width) < 3:
        return x
    around = sum(x[:, :, i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3))
    smooth = x.clone()
    smooth[:, :, 1:-1, 1:-1] = (around + 4 * x[:, :, 1:-1, 1:-1]) / 13
    return _blend(x, smooth, factor)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey version of each image. factor [B] >= 0; 1 changes nothing."""
    return _blend(x, _luminance(x), factor)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of each image by shift [B] in [-0.5, 0.5] of the colour circle.

    Goes through HSV without storing it: with hue h in sixths of the circle and chroma c = max - min, channel
    n = 5, 3, 1 (red, green, blue) is  max - c * clamp(min(k, 4 - k), 0, 1),  k = (n + h) mod 6.
    """
    red, green, blue = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    divisor = chroma.masked_fill(chroma == 0, 1)  # grey has no hue; chroma 0 silences whatever comes out
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    channel = torch.arange(5, 0, -2, device=x.device, dtype=x.dtype)[:, None, None]
    k = (channel + hue + 6 * _per_image(shift)) % 6
    return (value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)).clamp(0, 1)


def to_grayscale(x: Tensor) -> Tensor:
    """Grey version, still three channels."""
    return _luminance(x).repeat(1, 3, 1, 1)


def _blur_along(x: Tensor, weights: Tensor, dim: int) -> Tensor:
    """Convolve x [B,3,H,W] along one dimension with weights [B,17], reflecting at the borders."""
    size = x.shape[dim]
    # Reflection written as indices: it bounces back and forth as often as needed, where F.pad refuses small images.
    last = max(size - 1, 1)
    position = torch.arange(-BLUR_RADIUS, size + BLUR_RADIUS, device=x.device) % (2 * last)
    padded = x.index_select(dim, (last - (position - last).abs()).clamp(max=size - 1))
    # Sums of shifted pictures rather than a grouped conv2d: exact under autocast and TF32.
    blurred = torch.zeros_like(x)
    for tap in range(2 * BLUR_RADIUS + 1):
        blurred.addcmul_(padded.narrow(dim, tap, size), _per_image(weights[:, tap]))
    return blurred


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with sigma [B] > 0 in pixels; 17 taps per direction, so keep sigma below about 3.

    Borders reflect. An image smaller than the 8 pixels of padding is reflected again and again (as numpy's
    pad(mode="reflect") does); a side of one pixel stays as it is.
    """
    offsets = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=x.device, dtype=x.dtype)
    weights = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    weights = weights / weights.sum(1, keepdim=True)
    return _blur_along(_blur_along(x, weights, 3), weights, 2)


def color_jitter(
    x: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor, order: Tensor
) -> Tensor:
    """The four adjustments, for each image with its own strengths [B] and in its own order.

    order: int64 [B,4], every row a permutation of BRIGHTNESS, CONTRAST, SATURATION, HUE; applied left to right.

    Brightness, contrast and saturation are one operation, a blend, with different references (black, mean grey,
    grey). So an order is: some blends, the hue, the other blends. All images take three blends, the hue, three
    blends; a blend that is not an image's turn gets factor 1, which changes nothing. That is 6 cheap
    operations and one costly one, where trying every operation at every place would take 16.
    """
    factors = torch.stack([brightness, contrast, saturation, torch.ones_like(hue)], dim=1).gather(1, order)
    hue_is_past = (order == HUE).cumsum(1) > 0
    factors_before, factors_after = factors.masked_fill(hue_is_past, 1), factors.masked_fill(~hue_is_past, 1)

    def blend(x: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
        gray = _luminance(x)
        reference = torch.where(_per_image(operation == CONTRAST), gray.mean((1, 2, 3), keepdim=True), gray)
        return _blend(x, reference * _per_image(operation != BRIGHTNESS), factor)

    for slot in (0, 1, 2):
        x = blend(x, order[:, slot], factors_before[:, slot])
    x = adjust_hue(x, hue)
    for slot in (1, 2, 3):
        x = blend(x, order[:, slot], factors_after[:, slot])
    return x


def strong_augment(
    x: Tensor,
    generator: torch.Generator | None = None,
    jitter: tuple[float, float, float, float] = (0.5, 0.5, 0.5, 0.25),
    jitter_p: float = 0.8,
    gray_p: float = 0.2,
    blur_p: float = 0.5,
    blur_sigma: tuple[float, float] = (0.1, 2.0),
) -> Tensor:
    """Colour jitter, then grayscale, then blur, each with its probability and drawn anew for every image.

    x: float [B,3,H,W] in [0,1], returned likewise (not normalised). generator: on x.device.
    jitter: brightness, contrast and saturation factors are U(1 - v, 1 + v) with v <= 1, the hue shift is U(-v, v).
    Defaults: those of UniMatch's released code.
    """
    # All images take every operation and torch.where keeps what was drawn: the device need not ask which.
    uniform = torch.rand(8, len(x), generator=generator, device=x.device, dtype=x.dtype)
    order = torch.rand(len(x), 4, generator=generator, device=x.device).argsort(1)
    brightness, contrast, saturation, hue = (v * (2 * u - 1) for v, u in zip(jitter, uniform[:4]))
    sigma = blur_sigma[0] + (blur_sigma[1] - blur_sigma[0]) * uniform[4]
    jittered = color_jitter(x, 1 + brightness, 1 + contrast, 1 + saturation, hue, order)
    x = torch.where(_per_image(uniform[5] < jitter_p), jittered, x)
    x = torch.where(_per_image(uniform[6] < gray_p), to_grayscale(x), x)
    return torch.where(_per_image(uniform[7] < blur_p), gaussian_blur(x, sigma).clamp(0, 1), x)


# ---- CutMix and normalisation -------------------------------------------------------------------------


def cutmix_boxes(
    batch: int,
    size: int | tuple[int, int],
    generator: torch.Generator | None = None,
    p: float = 0.5,
    area: tuple[float, float] = (0.02, 0.4),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    device: torch.device | str = "cpu",
) -> Tensor:
    """One random box per image, bool [batch,H,W], True inside; an image has a box with probability p.

    UniMatch's rejection sampling, all trials at once: the area (a share of the image) is drawn once, then
    height / width ~ U(aspect) and the upper left corner ~ U(image) until the box lies inside the image. Of 128 trials
    the first that fits counts; should none fit (1 box in 100,000 with the defaults), there is no box.
    """
    height, width = (size, size) if isinstance(size, int) else size
    options = {"generator": generator, "device": device}
    trials = (batch, CUTMIX_TRIALS)
    wanted = torch.rand(batch, **options) < p
    pixels = (area[0] + (area[1] - area[0]) * torch.rand(batch, 1, **options)) * (height * width)
    ratio = aspect[0] + (aspect[1] - aspect[0]) * torch.rand(trials, **options)
    box_width, box_height = (pixels / ratio).sqrt().long(), (pixels * ratio).sqrt().long()
    left, top = torch.randint(width, trials, **options), torch.randint(height, trials, **options)
    fits = (left + box_width <= width) & (top + box_height <= height)

    first = fits.int().argmax(1, keepdim=True)
    left, top, right, bottom = (edge.gather(1, first) for edge in (left, top, left + box_width, top + box_height))
    across, down = torch.arange(width, device=device), torch.arange(height, device=device)
    in_columns = (left <= across) & (across < right) & (wanted & fits.any(1))[:, None]
    in_rows = (top <= down) & (down < bottom)
    return in_rows[:, :, None] & in_columns[:, None, :]


def cutmix(boxes: Tensor, own: Tensor, partner: Tensor) -> Tensor:
    """Partner's pixels inside the boxes [B,H,W], own pixels outside; own and partner [B,C,H,W] or [B,H,W]."""
    return torch.where(boxes if own.dim() == 3 else boxes.unsqueeze(1), partner, own)


def to_float(images: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in [0,1]; float images pass through as they are."""
    return images if images.is_floating_point() else images.float() / 255


def normalize(images: Tensor) -> Tensor:
    """uint8, or float in [0,1], [...,3,H,W] -> float with ImageNet's mean and deviation taken out."""
    x = to_float(images)
    # Filled on the device: torch.tensor(IMAGENET_MEAN, device="cuda") would copy from the host and wait for it.
    mean, std = (
        torch.cat([x.new_full((1, 1, 1), value) for value in values]) for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return (x - mean) / std
