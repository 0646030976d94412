"""common/augment.py against torchvision (photometry), the plain way (geometry) and a scalar loop (CutMix boxes)."""

import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as reference
from PIL import Image

from common import augment

SCALE = (0.5, 2.0)
# height, width, crop: larger and smaller than the crop, tall, wide, equal, tiny
SIZES = [(60, 80, 40), (80, 60, 40), (30, 20, 64), (300, 17, 48), (17, 300, 48), (48, 48, 48), (3, 5, 16), (97, 131, 9)]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def picture(height: int, width: int, seed: int) -> Image.Image:
    """Noise: the hardest picture to resize alike."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# ---- geometry -------------------------------------------------------------------------------------


def plain_geometry(image, mask, crop, geometry):
    """The recipe word by word: resize everything, pad at the right and bottom, crop, flip."""
    size = (geometry.width, geometry.height)
    resized = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    resized_mask = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    bottom, right = max(crop - geometry.height, 0), max(crop - geometry.width, 0)
    padded = np.pad(resized, ((0, bottom), (0, right), (0, 0)))
    padded_mask = np.pad(resized_mask, ((0, bottom), (0, right)), constant_values=255)
    valid = np.pad(np.ones(resized_mask.shape, bool), ((0, bottom), (0, right)))
    window = (slice(geometry.top, geometry.top + crop), slice(geometry.left, geometry.left + crop))
    padded, padded_mask, valid = padded[window], padded_mask[window], valid[window]
    if geometry.flip:
        padded, padded_mask, valid = padded[:, ::-1], padded_mask[:, ::-1], valid[:, ::-1]
    return padded.transpose(2, 0, 1), padded_mask, valid


@pytest.mark.parametrize("height,width,crop", SIZES)
def test_geometry_agrees_with_the_plain_way(height, width, crop):
    rng = np.random.default_rng(height * 1000 + width)
    for seed in range(20):
        image = picture(height, width, seed)
        mask = rng.integers(0, 255, (height, width), dtype=np.uint8)
        geometry = augment.draw_geometry(height, width, crop, SCALE, rng)
        out, out_mask, valid = augment.apply_geometry(image, mask, crop, geometry)
        want, want_mask, want_valid = plain_geometry(image, mask, crop, geometry)

        assert out.shape == (3, crop, crop) and out.dtype == np.uint8 and out.flags.c_contiguous
        assert valid.dtype == bool and out_mask.dtype == np.uint8
        np.testing.assert_array_equal(out_mask, want_mask)
        np.testing.assert_array_equal(valid, want_valid)
        # The box's edges are float32 inside PIL, which tips ties of the rounding; half a pixel would make 20 levels.
        assert np.abs(out.astype(int) - want).max() <= 2


def test_nearest_indices_are_those_of_pil():
    rng = np.random.default_rng(0)
    for source, target in rng.integers(1, 1200, (300, 2)):
        line = Image.fromarray(np.arange(source, dtype=np.int32)[None])
        want = np.asarray(line.resize((int(target), 1), Image.Resampling.NEAREST))[0]
        np.testing.assert_array_equal(augment._nearest_indices(int(source), int(target)), want)


def test_geometry_is_drawn_as_the_recipe_says():
    rng = np.random.default_rng(0)
    drawn = [augment.draw_geometry(30, 21, 25, SCALE, rng) for _ in range(4000)]
    heights = np.array([g.height for g in drawn])
    counts = np.bincount(heights, minlength=61)
    assert heights.min() == 15 and heights.max() == 60  # both ends included
    assert counts[15:].min() > 40 and counts[15:].max() < 150  # uniform: 87 expected
    assert all(g.width == int(21 * g.height / 30 + 0.5) for g in drawn)
    assert 0.46 < np.mean([g.flip for g in drawn]) < 0.54
    for place, side in (("top", "height"), ("left", "width")):
        room = np.array([max(getattr(g, side) - 25, 0) for g in drawn])
        at = np.array([getattr(g, place) for g in drawn])
        assert (at >= 0).all() and (at <= room).all() and (at == room)[room > 0].any() and (at == 0)[room > 0].any()
        assert abs((at / np.maximum(room, 1))[room > 5].mean() - 0.5) < 0.03


def test_weak_geometry_flips_picture_mask_and_valid_together():
    ramp = np.tile(np.arange(40, dtype=np.uint8), (40, 1))
    image = Image.fromarray(np.stack([ramp] * 3, -1))
    seen = set()
    for seed in range(20):
        out, mask, valid = augment.weak_geometry(image, ramp, 50, (1.0, 1.0), np.random.default_rng(seed))
        flipped = bool(mask[0, 0] == 255)  # padding is at the right, unless flipped
        row = np.concatenate([ramp[0], np.full(10, 255)])
        want = row[::-1] if flipped else row
        np.testing.assert_array_equal(mask[0], want)
        np.testing.assert_array_equal(valid[0], want != 255)
        np.testing.assert_array_equal(out[:, 0], np.tile(np.where(want == 255, 0, want), (3, 1)))
        assert (mask[40:] == 255).all() and not valid[40:].any() and not out[:, 40:].any()
        seen.add(flipped)
    assert seen == {True, False}


def test_weak_geometry_keeps_labels_unmixed_and_repeats_with_its_generator():
    mask = np.random.default_rng(0).choice(np.array([0, 7, 20, 255], np.uint8), (50, 70))
    image = picture(50, 70, 0)
    for seed in range(20):
        out, out_mask, valid = augment.weak_geometry(image, mask, 64, SCALE, np.random.default_rng(seed))
        assert set(np.unique(out_mask)) <= {0, 7, 20, 255} and (out_mask[~valid] == 255).all()
        again, none, valid_again = augment.weak_geometry(image, None, 64, SCALE, np.random.default_rng(seed))
        assert none is None
        np.testing.assert_array_equal(out, again)
        np.testing.assert_array_equal(valid, valid_again)


def test_weak_geometry_refuses_what_would_go_wrong_silently():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="RGB"):
        augment.weak_geometry(picture(20, 20, 0).convert("L"), None, 16, SCALE, rng)
    with pytest.raises(ValueError, match="mask"):
        augment.weak_geometry(picture(20, 30, 0), np.zeros((30, 20), np.uint8), 16, SCALE, rng)


# ---- photometry -----------------------------------------------------------------------------------


def images(batch: int = 6, height: int = 24, width: int = 31) -> torch.Tensor:
    """Noise, with what is special to colour operations in one corner: black, white, grey, pure and tied colours."""
    x = draw(0, batch, 3, height, width)
    corner = torch.tensor(list(itertools.product((0.0, 0.5, 1.0), repeat=3))).T.reshape(3, 3, 9)
    x[:, :, :3, :9] = corner
    x[0] = 0.25  # an image of one grey
    return x


OPERATIONS = {
    "brightness": (augment.adjust_brightness, reference.adjust_brightness, (0.0, 0.3, 0.8, 1.0, 1.4, 2.5)),
    "contrast": (augment.adjust_contrast, reference.adjust_contrast, (0.0, 0.3, 0.8, 1.0, 1.4, 2.5)),
    "saturation": (augment.adjust_saturation, reference.adjust_saturation, (0.0, 0.3, 0.8, 1.0, 1.4, 2.5)),
    "hue": (augment.adjust_hue, reference.adjust_hue, (-0.5, -0.25, 0.0, 0.1, 0.4, 0.5)),
    "blur": (augment.gaussian_blur, lambda x, s: reference.gaussian_blur(x, [17, 17], s), (0.1, 0.3, 0.6, 1, 1.5, 2)),
    "gray": (lambda x, _: augment.to_grayscale(x), lambda x, _: reference.rgb_to_grayscale(x, 3), (0.0,) * 6),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_agrees_with_torchvision_image_by_image(name, memory_format):
    ours, theirs, values = OPERATIONS[name]
    x = images().to(memory_format=memory_format)
    before = x.clone()
    out = ours(x, torch.tensor(values))
    want = torch.stack([theirs(image, value) for image, value in zip(x, values)])
    torch.testing.assert_close(out, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(x, before, atol=0, rtol=0)  # inputs stay as they were


def test_color_jitter_agrees_with_torchvision_in_all_24_orders():
    orders = list(itertools.permutations(range(4)))
    x = images(24, 12, 15)
    strengths = draw(1, 3, 24) * 1.5
    hue = draw(2, 24) - 0.5
    out = augment.color_jitter(x, *strengths, hue, torch.tensor(orders))
    steps = (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation, reference.adjust_hue)
    parameters = [*strengths.tolist(), hue.tolist()]
    for i, order in enumerate(orders):
        want = x[i]
        for operation in order:
            want = steps[operation](want, parameters[operation][i])
        torch.testing.assert_close(out[i], want, atol=1e-5, rtol=0)
    same_order = augment.color_jitter(x, *strengths, hue, torch.tensor(orders[:1] * 24))
    assert (out[1:] - same_order[1:]).abs().amax((1, 2, 3)).gt(1e-3).sum() > 15  # the order does matter


@pytest.mark.parametrize("height,width", [(5, 40), (3, 2), (8, 9), (1, 6)])
def test_blur_of_an_image_smaller_than_its_padding_reflects_again_and_again(height, width):
    x, sigma = draw(0, 2, 3, height, width), (0.7, 2.0)
    out = augment.gaussian_blur(x, torch.tensor(sigma))
    for image, blurred, s in zip(x.numpy(), out.numpy(), sigma):
        kernel = np.exp(-0.5 * (np.arange(-8, 9) / s) ** 2)
        kernel = np.outer(kernel, kernel) / kernel.sum() ** 2
        padded = np.pad(image, ((0, 0), (8, 8), (8, 8)), mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (17, 17), axis=(1, 2))
        np.testing.assert_allclose(blurred, (windows * kernel).sum((-1, -2)), atol=1e-5)


def test_strong_augment_stays_in_range_and_follows_its_generator():
    x = images(16)
    state = torch.Generator().manual_seed(3)
    out = augment.strong_augment(x, state)
    assert out.shape == x.shape and out.dtype == torch.float32 and out.min() >= 0 and out.max() <= 1
    other = augment.strong_augment(x, state)
    again = augment.strong_augment(x, torch.Generator().manual_seed(3))
    assert torch.equal(out, again) and not torch.equal(out, other)
    last = augment.strong_augment(x.to(memory_format=torch.channels_last), torch.Generator().manual_seed(3))
    torch.testing.assert_close(out, last, atol=1e-5, rtol=0)


def test_strong_augment_differs_within_the_batch_and_has_the_asked_probabilities():
    x = draw(0, 1, 3, 6, 6).expand(3000, 3, 6, 6)
    generator = torch.Generator().manual_seed(0)

    def share(**probabilities):
        out = augment.strong_augment(x, generator, **{"jitter_p": 0.0, "gray_p": 0.0, "blur_p": 0.0, **probabilities})
        return (out != x).flatten(1).any(1).float().mean().item(), out

    assert share()[0] == 0
    for name, p in (("jitter_p", 0.8), ("gray_p", 0.2), ("blur_p", 0.5)):
        assert abs(share(**{name: p})[0] - p) < 0.04
    assert len(share(jitter_p=1.0)[1].flatten(1).unique(dim=0)) == 3000  # everyone its own jitter
    # sigma 0.1 leaves the picture as it is, to 1e-21: nearly everyone differs, not quite all
    assert len(share(blur_p=1.0)[1].flatten(1).unique(dim=0)) > 2500
    gray = share(gray_p=1.0)[1]
    assert torch.equal(gray[:, 0], gray[:, 1]) and torch.equal(gray[:, 0], gray[:, 2])


def test_strong_augment_draws_factors_from_the_asked_ranges(monkeypatch):
    drawn = {}
    monkeypatch.setattr(augment, "color_jitter", lambda x, *p: drawn.update(jitter=p) or x)
    monkeypatch.setattr(augment, "gaussian_blur", lambda x, sigma: drawn.update(sigma=sigma) or x)
    augment.strong_augment(torch.rand(4000, 3, 1, 1), torch.Generator().manual_seed(0), jitter=(0.5, 0.4, 0.3, 0.25))
    *factors, order = drawn["jitter"]
    ranges = [(0.5, 1.5), (0.6, 1.4), (0.7, 1.3), (-0.25, 0.25), (0.1, 2.0)]
    for values, (low, high) in zip([*factors, drawn["sigma"]], ranges):
        grid = low + (high - low) * torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
        quantiles = torch.quantile(values, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
        torch.testing.assert_close(quantiles, grid, atol=0.04 * (high - low), rtol=0)
        assert values.min() >= low and values.max() <= high
    assert torch.equal(order.sort(1).values, torch.arange(4).expand(4000, 4))
    counts = torch.unique(order, dim=0, return_counts=True)[1]
    assert len(counts) == 24 and counts.min() > 110 and counts.max() < 230  # 167 expected
    everything = torch.stack([*factors, drawn["sigma"]])
    assert (torch.corrcoef(everything) - torch.eye(5)).abs().max() < 0.08  # drawn independently


# ---- CutMix, normalisation ------------------------------------------------------------------------


def scalar_box(height, width, rng, p=0.5, area=(0.02, 0.4), aspect=(0.3, 1 / 0.3)):
    """The rejection sampler as a loop: (x, y, w, h), or None for no box."""
    if rng.random() > p:
        return None
    pixels = rng.uniform(*area) * height * width
    while True:
        ratio = rng.uniform(*aspect)
        w, h = int(np.sqrt(pixels / ratio)), int(np.sqrt(pixels * ratio))
        x, y = rng.integers(0, width), rng.integers(0, height)
        if x + w <= width and y + h <= height:
            return x, y, w, h


def box_table(boxes: torch.Tensor) -> np.ndarray:
    """(x, y, w, h) of every box [N,4]; asserts that each is one filled rectangle."""
    rows, columns = boxes.any(2), boxes.any(1)
    assert torch.equal(boxes, rows[:, :, None] & columns[:, None, :])
    h, w = rows.sum(1), columns.sum(1)
    y, x = rows.int().argmax(1), columns.int().argmax(1)
    for line, start, length in ((rows, y, h), (columns, x, w)):
        position = torch.arange(line.shape[1])
        assert torch.equal(line, (position >= start[:, None]) & (position < (start + length)[:, None]))
    return torch.stack([x, y, w, h], 1).numpy()


@pytest.mark.parametrize("size", [96, (64, 128)])
def test_cutmix_boxes_are_distributed_as_the_scalar_loop_has_them(size):
    height, width = (size, size) if isinstance(size, int) else size
    number = 10000
    boxes = augment.cutmix_boxes(number, size, torch.Generator().manual_seed(0))
    assert boxes.shape == (number, height, width) and boxes.dtype == torch.bool
    has_box = boxes.flatten(1).any(1)
    assert abs(has_box.float().mean().item() - 0.5) < 0.02
    ours = box_table(boxes[has_box])
    rng = np.random.default_rng(0)
    theirs = np.array([box for box in (scalar_box(height, width, rng) for _ in range(number)) if box])

    def describe(table):
        x, y, w, h = table.T
        return {"x": x, "y": y, "w": w, "h": h, "area": w * h, "aspect": h / w, "right": x + w, "bottom": y + h}

    ours, theirs = describe(ours), describe(theirs)
    for name in ours:
        # Largest gap between the two distribution functions (Kolmogorov-Smirnov): 0.04 is passed by chance 1 in 1,000.
        values = np.union1d(ours[name], theirs[name])
        mine, other = (np.searchsorted(np.sort(t[name]), values, "right") / len(t[name]) for t in (ours, theirs))
        assert np.abs(mine - other).max() < 0.04, name
        assert abs(ours[name].mean() / theirs[name].mean() - 1) < 0.06, name


def test_cutmix_boxes_probability_area_and_generator():
    def boxes(seed=0, **options):
        return augment.cutmix_boxes(500, 40, torch.Generator().manual_seed(seed), **options)

    assert not boxes(p=0.0).any()
    assert boxes(p=1.0).flatten(1).any(1).float().mean() > 0.98
    assert torch.equal(boxes(), boxes()) and not torch.equal(boxes(), boxes(1))
    half = boxes(p=1.0, area=(0.25, 0.25), aspect=(1.0, 1.0)).sum((1, 2))
    assert set(half.tolist()) <= {0, 400} and (half == 400).float().mean() > 0.98
    assert not boxes(p=1.0, area=(0.5, 0.5), aspect=(4.0, 4.0)).any()  # too tall to ever fit: no box


def test_cutmix_takes_the_partner_inside_the_box():
    boxes = augment.cutmix_boxes(4, (9, 11), torch.Generator().manual_seed(0), p=1.0, area=(0.2, 0.4))
    assert boxes.flatten(1).any(1).all()
    own, partner = draw(0, 4, 3, 9, 11), draw(1, 4, 3, 9, 11)
    mixed = augment.cutmix(boxes, own, partner)
    labels = augment.cutmix(boxes, torch.zeros(4, 9, 11, dtype=torch.long), torch.ones(4, 9, 11, dtype=torch.long))
    assert torch.equal(labels, boxes.long())
    for i, y, x in itertools.product(range(4), range(9), range(11)):
        assert torch.equal(mixed[i, :, y, x], (partner if boxes[i, y, x] else own)[i, :, y, x])
    three = augment.cutmix(boxes[:3], torch.zeros(3, 9, 11), torch.ones(3, 9, 11))  # a batch of 3 is not 3 channels
    assert torch.equal(three, boxes[:3].float())


def test_normalize_takes_bytes_and_floats():
    pixels = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(augment.to_float(pixels), pixels.float() / 255)
    want = reference.normalize(pixels / 255.0, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    for x in (pixels, pixels / 255.0, (pixels / 255.0).to(memory_format=torch.channels_last)):
        torch.testing.assert_close(augment.normalize(x), want, atol=1e-6, rtol=0)
    torch.testing.assert_close(augment.normalize(pixels[0]), want[0], atol=1e-6, rtol=0)


# ---- no host sync ---------------------------------------------------------------------------------


def device_step(device: str) -> torch.Tensor:
    generator = None if device == "meta" else torch.Generator(device).manual_seed(0)
    pixels = torch.zeros(3, 3, 32, 40, dtype=torch.uint8, device=device)
    strong = augment.strong_augment(augment.to_float(pixels), generator)
    boxes = augment.cutmix_boxes(3, (32, 40), generator, device=device)
    return augment.normalize(augment.cutmix(boxes, strong, strong.flip(0)))


def test_nothing_depends_on_values():
    """Meta tensors have no values: .item(), boolean indexing or an `if` on a tensor would raise here."""
    assert device_step("meta").shape == (3, 3, 32, 40)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_agrees_with_cpu_and_does_not_wait():
    device_step("cuda")  # kernels loaded
    try:
        torch.cuda.set_sync_debug_mode("error")
        device_step("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    x, s = images(), torch.tensor([0.3, 0.5, 0.8, 1.0, 1.3, 1.9])
    order = draw(5, 6, 4).argsort(1)
    for operation, arguments in (
        (augment.color_jitter, (x, s, s, s, s / 4, order)),
        (augment.gaussian_blur, (x, s)),
    ):
        on_gpu = operation(*(argument.cuda() for argument in arguments)).cpu()
        torch.testing.assert_close(on_gpu, operation(*arguments), atol=1e-5, rtol=0)


# ---- pictures of one channel, and sharpness ---------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("height, width", [(24, 31), (3, 3), (4, 3), (2, 9), (9, 2), (1, 1)])  # a side below 3 has no middle to smooth
def test_brightness_contrast_and_sharpness_of_any_channels_agree_with_torchvision_image_by_image(channels, height, width):
    x = images(6, 24, 31)[:, :channels, -height:, -width:].contiguous()
    before, factors = x.clone(), (0.0, 0.3, 0.8, 1.0, 1.4, 2.5)
    for name in ("brightness", "contrast", "sharpness"):
        ours, theirs = getattr(augment, f"adjust_{name}"), getattr(reference, f"adjust_{name}")
        out = ours(x, torch.tensor(factors))
        want = torch.stack([theirs(image, factor) for image, factor in zip(x, factors)])
        torch.testing.assert_close(out, want, atol=1e-5, rtol=0)
        torch.testing.assert_close(x, before, atol=0, rtol=0)
    sharp = augment.adjust_sharpness(x, torch.tensor(factors))
    assert torch.equal(sharp[0], x[0]) and torch.equal(sharp[3], x[3])  # an image of one grey, and factor 1
    assert torch.equal(sharp[:, :, 0], x[:, :, 0]) and (min(height, width) < 3 or not torch.equal(sharp[1], x[1]))


def test_one_channel_is_blurred_as_three_equal_ones():
    x, sigma = images()[:, :1], torch.tensor([0.1, 0.3, 0.6, 1, 1.5, 2])
    assert torch.equal(augment.gaussian_blur(x.expand(-1, 3, -1, -1), sigma)[:, :1], augment.gaussian_blur(x, sigma))
