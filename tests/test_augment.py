"""common/augment.py against PIL (geometry), torchvision (photometry), a scalar loop (CutMix)."""

import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as reference
from PIL import Image

from common import augment
from programs import seeded

# ---------------------------------------------------------------- geometry


def plain_geometry(image, mask, crop, scale, rng):
    """The recipe word by word: resize everything, pad at the right and bottom, crop, flip."""
    long = max(image.size)
    new_long = rng.integers(int(long * scale[0]), int(long * scale[1]), endpoint=True)
    size = [max(1, int(side * new_long / long + 0.5)) for side in image.size]
    resized = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    labels = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    bottom, right = max(crop - size[1], 0), max(crop - size[0], 0)
    resized = np.pad(resized, ((0, bottom), (0, right), (0, 0)))
    labels = np.pad(labels, ((0, bottom), (0, right)), constant_values=255)
    valid = np.pad(np.ones(size[::-1], bool), ((0, bottom), (0, right)))
    top = rng.integers(0, max(size[1] - crop, 0), endpoint=True)
    left = rng.integers(0, max(size[0] - crop, 0), endpoint=True)
    step = -1 if rng.random() < 0.5 else 1
    views = (resized, labels, valid)
    return [view[top : top + crop, left : left + crop][:, ::step] for view in views]


@pytest.mark.parametrize("height, width, crop", [  # larger and smaller, tall, wide, equal, tiny
    (60, 80, 40), (80, 60, 40), (30, 20, 64), (300, 17, 48), (17, 300, 48), (48, 48, 48),
    (3, 5, 16)])
def test_geometry_agrees_with_the_plain_way(height, width, crop):
    pixels = np.random.default_rng(0)
    for seed in range(25):
        image = Image.fromarray(pixels.integers(0, 256, (height, width, 3), dtype=np.uint8))
        mask = pixels.integers(0, 255, (height, width), dtype=np.uint8)
        ours, theirs = np.random.default_rng(seed), np.random.default_rng(seed)
        out, label, valid = augment.weak_geometry(image, mask, crop, (0.5, 2.0), ours)
        want, want_label, want_valid = plain_geometry(image, mask, crop, (0.5, 2.0), theirs)
        assert out.shape == (3, crop, crop) and out.dtype == np.uint8 and out.flags.c_contiguous
        assert valid.dtype == bool and label.dtype == np.uint8
        np.testing.assert_array_equal(label, want_label)
        np.testing.assert_array_equal(valid, want_valid)
        # PIL keeps the box in float32, which tips ties; half a pixel would make 20 levels.
        assert np.abs(out.astype(int) - want.transpose(2, 0, 1)).max() <= 2
        assert ours.random() == theirs.random()  # as many draws
        ours = np.random.default_rng(seed)
        again, none, _ = augment.weak_geometry(image, None, crop, (0.5, 2.0), ours)
        assert none is None
        np.testing.assert_array_equal(out, again)


def test_the_long_side_is_uniform_with_both_ends():
    white = Image.new("RGB", (20, 10), (255, 255, 255))
    rng = np.random.default_rng(0)
    drawn = [augment.weak_geometry(white, None, 64, (0.5, 2.0), rng)[2] for _ in range(3000)]
    sides = np.array([(valid.any(0).sum(), valid.any(1).sum()) for valid in drawn])
    counts = np.bincount(sides[:, 0], minlength=41)
    assert counts[:10].sum() == 0 and len(counts) == 41
    assert counts[10:].min() > 60 and counts[10:].max() < 145  # 97 expected
    assert (sides[:, 1] == (sides[:, 0] / 2 + 0.5).astype(int)).all()
    assert 0.46 < np.mean([valid[0, 0] for valid in drawn]) < 0.54  # the others are flipped


# ---------------------------------------------------------------- photometry


def images(batch: int = 6, height: int = 24, width: int = 31) -> torch.Tensor:
    """Noise, and what is special in one corner: black, white, grey, pure and tied colours."""
    x = torch.rand(batch, 3, height, width, generator=seeded(0))
    colors = torch.tensor(list(itertools.product((0.0, 0.5, 1.0), repeat=3)))
    x[:, :, :3, :9] = colors.T.reshape(3, 3, 9)
    x[0] = 0.25  # an image of one grey
    return x


FACTORS = (0.0, 0.3, 0.8, 1.0, 1.4, 2.5)
OPERATIONS = {
    "hue": (augment.adjust_hue, reference.adjust_hue, (-0.5, -0.25, 0.0, 0.1, 0.4, 0.5)),
    "blur": (augment.gaussian_blur, lambda x, s: reference.gaussian_blur(x, [17, 17], s),
             (0.1, 0.3, 0.6, 1, 1.5, 2)),
    "brightness": (augment.adjust_brightness, reference.adjust_brightness, FACTORS),
    "contrast": (augment.adjust_contrast, reference.adjust_contrast, FACTORS),
    "sharpness": (augment.adjust_sharpness, reference.adjust_sharpness, FACTORS),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("channels, height, width",
                         [(3, 24, 31), (1, 24, 31), (3, 9, 10), (3, 2, 9), (1, 1, 1)])
def test_operations_agree_with_torchvision_image_by_image(name, channels, height, width):
    if name == "hue" and channels == 1 or name == "blur" and height < 9:
        return  # torchvision's do not accept these either
    ours, theirs, values = OPERATIONS[name]
    for layout in (torch.contiguous_format, torch.channels_last):
        x = images()[:, :channels, -height:, -width:].contiguous(memory_format=layout)
        before = x.clone()
        out = ours(x, torch.tensor(values))
        want = torch.stack([theirs(image, value) for image, value in zip(x, values)])
        torch.testing.assert_close(out, want, atol=1e-5, rtol=0)
        assert torch.equal(x, before)


def strong_by_hand(x: torch.Tensor, jitter: float, low: float, high: float) -> tuple:
    """torchvision, image by image, on the same random numbers; and the orders of the jitter."""
    uniform = torch.rand(8, len(x)).double()
    orders = torch.rand(len(x), 4).argsort(1).tolist()
    steps = (reference.adjust_brightness, reference.adjust_contrast,
             reference.adjust_saturation, reference.adjust_hue)
    out = []
    for image, u, order in zip(x.double(), uniform.T.tolist(), orders):
        values = [1 - jitter + 2 * jitter * u[k] for k in range(3)] + [jitter * (u[3] - 0.5)]
        if u[5] < 0.8:
            for step in order:
                image = steps[step](image, values[step])
        if u[6] < 0.2:
            image = reference.rgb_to_grayscale(image, 3)
        if u[7] < 0.5:
            image = reference.gaussian_blur(image, [17, 17], low + (high - low) * u[4])
        out.append(image)
    return torch.stack(out).float(), {tuple(order) for order in orders}


@pytest.mark.parametrize("jitter, sigma", [(0.5, (0.1, 2.0)), (0.2, (0.1, 0.5)), (0, (0.1, 2.0))])
def test_strong_augment_is_torchvisions_on_the_same_draws(jitter, sigma):
    x = images(300, 11, 10)
    torch.manual_seed(0)
    photometry = augment.Photometry(jitter, sigma)
    out = augment.strong_augment(x, photometry)
    after = torch.rand(1)
    torch.manual_seed(0)
    want, orders = strong_by_hand(x, jitter, *sigma)
    assert len(orders) == 24 and torch.equal(torch.rand(1), after)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=0)
    assert out.min() >= 0 and out.max() <= 1
    assert jitter == 0 or len(out.flatten(1).unique(dim=0)) > 295
    torch.manual_seed(0)
    last = augment.strong_augment(x.contiguous(memory_format=torch.channels_last), photometry)
    torch.testing.assert_close(last, out, atol=1e-5, rtol=0)


def test_photometry_scales_from_the_recipes_to_none():
    recipe = augment.Photometry(0.5, (0.1, 1.0))
    assert recipe.scaled(1) == recipe and recipe.scaled(0.5) == (0.25, (0.1, 0.5))
    x = images(40, 11, 10)[:, :1].expand(-1, 3, -1, -1)
    out = augment.strong_augment(x, recipe.scaled(0))
    torch.testing.assert_close(out, x, atol=2e-4, rtol=0)  # grey's weights sum to 0.9999


# ---------------------------------------------------------------- CutMix, normalisation


def scalar_box(size, rng):
    """UniMatch's rejection sampler as a loop: (x, y, w, h), or None for no box."""
    if rng.random() > 0.5:
        return None
    pixels = rng.uniform(0.02, 0.4) * size * size
    while True:
        ratio = rng.uniform(0.3, 1 / 0.3)
        w, h = int(np.sqrt(pixels / ratio)), int(np.sqrt(pixels * ratio))
        x, y = rng.integers(0, size), rng.integers(0, size)
        if x + w <= size and y + h <= size:
            return x, y, w, h


def box_table(boxes: torch.Tensor) -> np.ndarray:
    """(x, y, w, h) of every box [N, 4]; asserts that each is one filled rectangle."""
    rows, columns = boxes.any(2), boxes.any(1)
    h, w = rows.sum(1), columns.sum(1)
    y, x = rows.int().argmax(1), columns.int().argmax(1)
    for index, (x0, y0, dx, dy) in enumerate(torch.stack([x, y, w, h], 1).tolist()):
        assert boxes[index, y0 : y0 + dy, x0 : x0 + dx].all() and boxes[index].sum() == dx * dy
    return torch.stack([x, y, w, h], 1).numpy()


def test_cutmix_boxes_are_distributed_as_the_scalar_loop_has_them():
    number, size, rng = 10000, 48, np.random.default_rng(0)
    torch.manual_seed(0)
    boxes = augment.cutmix_boxes(number, size)
    assert boxes.shape == (number, size, size) and boxes.dtype == torch.bool
    has_box = boxes.flatten(1).any(1)
    assert abs(has_box.float().mean().item() - 0.5) < 0.02
    theirs = [box for box in (scalar_box(size, rng) for _ in range(number)) if box]

    def describe(table):
        x, y, w, h = table.T
        return {"x": x, "y": y, "w": w, "h": h, "area": w * h, "aspect": h / w, "right": x + w}

    ours, theirs = describe(box_table(boxes[has_box])), describe(np.array(theirs))
    for name in ours:
        # Largest gap of the distribution functions (Kolmogorov-Smirnov): 0.04 by chance 1 in 1,000
        values = np.union1d(ours[name], theirs[name])
        mine, other = (np.searchsorted(np.sort(table[name]), values, "right") / len(table[name])
                       for table in (ours, theirs))
        assert np.abs(mine - other).max() < 0.04, name
    assert not augment.cutmix_boxes(200, 32, p=0.0).any()
    assert augment.cutmix_boxes(200, 32, p=1.0).flatten(1).any(1).all()


def test_normalize_takes_bytes_and_floats():
    pixels = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    assert torch.equal(augment.to_float(pixels), pixels.float() / 255)
    want = reference.normalize(pixels / 255.0, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    for x in (pixels, pixels / 255.0):
        torch.testing.assert_close(augment.normalize(x), want)
    torch.testing.assert_close(augment.normalize(pixels[0]), want[0])


def device_step(device: str) -> torch.Tensor:
    pixels = torch.zeros(3, 3, 32, 32, dtype=torch.uint8, device=device)
    strong = augment.strong_augment(augment.to_float(pixels))
    boxes = augment.cutmix_boxes(3, 32, device=device)
    return augment.normalize(augment.cutmix(boxes, strong, strong.flip(0)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_agrees_with_cpu_and_does_not_wait():
    device_step("cuda")  # kernels loaded
    try:
        torch.cuda.set_sync_debug_mode("error")
        device_step("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    x, strength = images(), torch.tensor([0.3, 0.5, 0.8, 1.0, 1.3, 1.9])
    for ours, _, _ in OPERATIONS.values():
        on_gpu = ours(x.cuda(), strength.cuda()).cpu()
        torch.testing.assert_close(on_gpu, ours(x, strength), atol=1e-5, rtol=0)
