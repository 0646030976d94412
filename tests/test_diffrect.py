"""diffrect.py against other ways to the same numbers: sets of pixels, Bayes' rule, plain loops, closed forms; and the program's runs."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image
from torch import nn

import diffrect
import programs
from common import medical, runtime, scores
from common.options import parse
from programs import assert_identical, kill_after_first_checkpoint, state, succeed

IGNORE = 255
CPU = runtime.Context(0, 1, torch.device("cpu"))
INFO = dataclasses.replace(medical.DATASETS["acdc"], adjust=(0.6, 1.4), blur=(0.3, 1.0))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw_labels(seed, *shape, classes=4, ignored=0.0):
    labels = torch.randint(classes, shape, generator=seeded(seed))
    return torch.where(torch.rand(shape, generator=seeded(seed + 1)) < ignored, IGNORE, labels)


def draw(seed, *shape):
    return torch.randn(*shape, generator=seeded(seed))


def resolved(**options) -> diffrect.Config:
    """A configuration in which no value is left to the recipe."""
    return diffrect.Config(**{"threshold": 0.3, "consistency": 1.0, "rectify_weight": 0.7, "lambda_u": 0.6, "lambda_l": 0.8, **options})


# ---------------------------------------------------------------- Eq. 4: colours


def distances(colors):
    """Squared distances of all pairs, the smallest first."""
    return sorted(sum((a - b) ** 2 for a, b in zip(*pair)) for pair in itertools.combinations(colors, 2))


@pytest.mark.parametrize("classes", range(1, 9))
def test_no_other_corners_are_farther_apart(classes):
    colors = diffrect.semantic_colors(classes)
    assert colors.dtype == torch.uint8 and colors.shape == (classes, 3) and colors[0].tolist() == [0, 0, 0]
    ours = distances(colors.tolist())
    corners = list(itertools.product((0, 255), repeat=3))
    assert set(map(tuple, colors.tolist())) <= set(corners)
    others = itertools.combinations_with_replacement(corners, classes - 1)  # the order of classes changes no distance
    assert ours == max(distances([(0, 0, 0), *choice]) for choice in others)


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_no_colours_of_the_whole_cube_are_farther_apart(classes):
    least = distances(diffrect.semantic_colors(classes).tolist())[0]
    rng = np.random.default_rng(classes)
    colors = rng.integers(0, 256, (20_000, classes, 3))
    colors[:, 0] = 0

    def nearest(colors):
        pairs = list(itertools.combinations(range(classes), 2))
        return np.min([((colors[:, a] - colors[:, b]) ** 2).sum(axis=1) for a, b in pairs], axis=0)

    best = colors[np.argsort(nearest(colors))[-200:]]
    for step in range(400):  # the best move on their own
        moved = (best + rng.integers(-40, 41, best.shape) * (rng.random(best.shape) < 0.4)).clip(0, 255)
        moved[:, 0] = 0
        best = np.where((nearest(moved) > nearest(best))[:, None, None], moved, best)
    assert 0.9 * least < nearest(best).max() <= least  # the search gets near


@pytest.mark.parametrize("classes", [9, 21, 256])
def test_further_colours_keep_as_far_as_the_grid_allows(classes):
    colors = diffrect.semantic_colors(classes).numpy().astype(np.int64)
    assert len({tuple(color) for color in colors}) == classes and not colors[0].any()
    assert {tuple(color) for color in colors[:8]} == set(itertools.product((0, 255), repeat=3))
    grid = np.stack(np.meshgrid(*[np.arange(16) * 17] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    for count in range(8, min(classes, 40)):
        room = ((grid[:, None] - colors[None, :count]) ** 2).sum(axis=2).min(axis=1).max()
        assert ((colors[:count] - colors[count]) ** 2).sum(axis=1).min() == room


@pytest.mark.parametrize("classes", [0, -1, 257])
def test_colours_for_no_or_too_many_classes_are_an_error(classes):
    with pytest.raises(ValueError, match=str(classes)):
        diffrect.semantic_colors(classes)


@pytest.mark.parametrize("classes, scs", [(3, True), (4, True), (21, True), (4, False), (21, False)])
def test_the_nearest_colour_gives_the_label_back(classes, scs):
    colors = diffrect.mask_colors(diffrect.Config(colors=scs), classes)
    assert colors.dtype == torch.uint8 and colors.shape == (classes, 3)
    labels = draw_labels(0, 3, 7, 9, classes=classes, ignored=0.2)
    for given in (labels, labels.byte()):
        painted = diffrect.color_masks(given, colors)
        assert painted.shape == (3, 3, 7, 9) and painted.dtype == torch.float32
        difference = 255 * painted.permute(0, 2, 3, 1).double()[..., None, :] - colors.double()
        assert difference.square().sum(dim=-1).amin(dim=-1).max() < 1e-6  # colours in [0, 1], nothing between them
        assert torch.equal(difference.square().sum(dim=-1).argmin(dim=-1), torch.where(labels == IGNORE, 0, labels))
    if not scs:
        assert (colors == colors[:, :1]).all() and colors[0, 0] == 0 and colors[-1, 0] == 255
        assert colors[:, 0].int().diff().min() >= 255 // (classes - 1) and colors[:, 0].int().diff().max() <= 255 // (classes - 1) + 1
    assert diffrect.color_masks(labels.to("meta"), colors).shape == (3, 3, 7, 9)


# ---------------------------------------------------------------- Eq. 6: calibration guidance


def plain_overlap(first, second, classes):
    """(Dice, Jaccard) of two label maps [H, W] as sets of pixels."""
    places = [place for place in np.ndindex(*first.shape) if first[place] != IGNORE and second[place] != IGNORE]
    dices, jaccards = [], []
    for label in range(1, classes):
        a, b = ({place for place in places if map_[place] == label} for map_ in (first, second))
        if a or b:
            dices.append(2 * len(a & b) / (len(a) + len(b)))
            jaccards.append(len(a & b) / len(a | b))
    return (np.mean(dices), np.mean(jaccards)) if dices else (1, 1)


@pytest.mark.parametrize("classes", [2, 4, 7])
def test_dice_and_jaccard_of_every_slice_are_those_of_sets(classes):
    first = draw_labels(10, 8, 6, 5, classes=classes, ignored=0.15)
    second = torch.where(torch.rand(first.shape, generator=seeded(12)) < 0.5, first, draw_labels(13, 8, 6, 5, classes=classes, ignored=0.15))
    if classes > 2:
        second[second == 1] = 0  # class 1 in one map only,
        first[4:][first[4:] == classes - 1], second[4:][second[4:] == classes - 1] = 0, 0  # and another in neither
    first[5], second[5] = 0, 0
    first[6] = IGNORE
    expected = np.array([plain_overlap(a, b, classes) for a, b in zip(first.numpy(), second.numpy())])
    for maps in ((first, second), (second, first), (first.byte(), second.byte())):
        dice, jaccard = (diffrect.dice_coefficient(*maps, classes, jaccard=which) for which in (False, True))
        assert dice.shape == jaccard.shape == (8,) and dice.dtype == torch.float32
        np.testing.assert_allclose(dice, expected[:, 0], atol=1e-6)
        np.testing.assert_allclose(jaccard, expected[:, 1], atol=1e-6)
    assert dice[5] == dice[6] == 1 and len(set(dice.tolist())) >= 3


def test_jaccard_of_one_class_follows_from_dice():
    first, second = (draw_labels(seed, 20, 6, 6, classes=2) for seed in (20, 22))
    dice, jaccard = (diffrect.dice_coefficient(first, second, 2, jaccard=which) for which in (False, True))
    torch.testing.assert_close(jaccard, dice / (2 - dice))
    assert 0 < dice.min() and dice.max() < 1


def test_guidance_of_every_kind():
    coarse, fine = (draw_labels(seed, 50, 6, 6, ignored=0.1) for seed in (30, 32))
    expected = torch.tensor([plain_overlap(a, b, 4) for a, b in zip(coarse.numpy(), fine.numpy())], dtype=torch.float32)
    guidance = {kind: diffrect.calibration_guidance(kind, coarse, fine, 4) for kind in ("dice", "jaccard", "both", "fixed", "random", "none")}
    assert {tau.shape for tau in guidance.values()} == {(50,)} and {tau.dtype for tau in guidance.values()} == {torch.float32}
    torch.testing.assert_close(guidance["dice"], expected[:, 0])
    torch.testing.assert_close(guidance["jaccard"], expected[:, 1])
    torch.testing.assert_close(guidance["both"], expected.sum(dim=1))
    assert (guidance["fixed"] == 0.5).all() and (guidance["none"] == 0).all()
    random = guidance["random"]
    assert 0 <= random.min() < 0.2 and 0.8 < random.max() <= 1 and len(set(random.tolist())) > 40
    assert not torch.equal(random, diffrect.calibration_guidance("random", coarse, fine, 4))


# ---------------------------------------------------------------- Eq. 1, 3, 7, 12: diffusion


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
def test_the_schedule_is_nichols_and_dhariwals(steps):
    alpha_bar = diffrect.cosine_alpha_bar(steps)
    assert alpha_bar.dtype == torch.float64 and alpha_bar.shape == (steps + 1,) and alpha_bar[0] == 1
    expected = [math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2 for t in range(steps)]
    expected.append(0.001 * expected[-1])  # beta would be 1 and is 0.999
    np.testing.assert_allclose(alpha_bar, expected, rtol=1e-9)
    assert (alpha_bar.diff() < 0).all() and alpha_bar[-1] > 0


def test_diffusing_at_once_equals_step_by_step():
    """q(z_t | z_0) is linear in z_0 and noise: its coefficients follow from those of single steps, and samples agree."""
    alpha_bar = diffrect.cosine_alpha_bar(10)
    z0, noise = torch.tensor([3.0, -1.0], dtype=torch.float64), torch.tensor([0.5, 2.0], dtype=torch.float64)
    scale, variance = 1.0, 0.0
    samples = torch.full((100_000,), 2.0, dtype=torch.float64)
    for step in range(1, 11):
        alpha = float(alpha_bar[step] / alpha_bar[step - 1])
        scale, variance = math.sqrt(alpha) * scale, alpha * variance + 1 - alpha
        torch.testing.assert_close(diffrect.diffuse(z0, alpha_bar[step], noise), scale * z0 + math.sqrt(variance) * noise)
        samples = math.sqrt(alpha) * samples + math.sqrt(1 - alpha) * torch.randn(len(samples), generator=seeded(step), dtype=torch.float64)
        at_once = diffrect.diffuse(torch.tensor(2.0), alpha_bar[step], torch.randn(len(samples), generator=seeded(100 + step), dtype=torch.float64))
        for drawn in (samples, at_once):
            assert drawn.mean().item() == pytest.approx(2 * scale, abs=0.02) and drawn.var().item() == pytest.approx(variance, abs=0.02)


def test_each_slice_is_diffused_by_its_own_step():
    alpha_bar, z0, noise = torch.tensor([0.9, 0.25])[:, None, None, None], draw(40, 2, 3, 4, 4), draw(41, 2, 3, 4, 4)
    z = diffrect.diffuse(z0, alpha_bar, noise)
    torch.testing.assert_close(z[0], math.sqrt(0.9) * z0[0] + math.sqrt(0.1) * noise[0])
    torch.testing.assert_close(z[1], 0.5 * z0[1] + math.sqrt(0.75) * noise[1])


PAIRS = [(10, 9), (9, 8), (5, 4), (2, 1), (10, 5), (5, 1)]


@pytest.mark.parametrize("step, following", [*PAIRS, (1, 0), (10, 0)])
def test_without_noise_a_reverse_step_stays_on_the_path(step, following):
    alpha_bar = diffrect.cosine_alpha_bar(10)
    z0, noise = (draw(seed, 2, 3, 4, 4).double() for seed in (50, 51))
    z = diffrect.reverse_step(diffrect.diffuse(z0, alpha_bar[step], noise), z0, alpha_bar[step], alpha_bar[following])
    torch.testing.assert_close(z, alpha_bar[following].sqrt() * z0 + (1 - alpha_bar[following]).sqrt() * noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("step, following", PAIRS)
def test_with_full_noise_a_reverse_step_is_the_posterior(step, following):
    """q(z_following | z_step, z_0): by the DDPM's formulas for neighbours, by Bayes' rule on a grid for all."""
    alpha_bar = diffrect.cosine_alpha_bar(10)
    z_t, z0 = torch.tensor([0.7, -1.3], dtype=torch.float64), torch.tensor([0.4, 0.9], dtype=torch.float64)
    step_from = functools.partial(diffrect.reverse_step, z_t, z0, alpha_bar[step], alpha_bar[following], 1.0)
    mean = step_from(torch.zeros_like(z_t))
    deviation = step_from(torch.ones_like(z_t)) - mean
    assert (deviation > 0).all()
    now, then = alpha_bar[step].item(), alpha_bar[following].item()
    alpha = now / then
    if step - following == 1:
        beta = 1 - alpha
        textbook = math.sqrt(then) * beta / (1 - now) * z0 + math.sqrt(alpha) * (1 - then) / (1 - now) * z_t
        torch.testing.assert_close(mean, textbook, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(deviation.square(), torch.full_like(z_t, (1 - then) / (1 - now) * beta), rtol=1e-9, atol=1e-12)
    grid = np.linspace(-8, 8, 200_001)
    for number in range(2):
        prior = -((grid - math.sqrt(then) * z0[number].item()) ** 2) / (2 * (1 - then))
        log = prior - (z_t[number].item() - math.sqrt(alpha) * grid) ** 2 / (2 * (1 - alpha))
        density = np.exp(log - log.max())
        density /= density.sum()
        by_bayes = (density * grid).sum()
        assert mean[number].item() == pytest.approx(by_bayes, abs=1e-6)
        assert deviation[number].item() ** 2 == pytest.approx((density * (grid - by_bayes) ** 2).sum(), rel=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_a_reverse_step_keeps_the_marginals(eta):
    """z_t from q(z_t | z_0) gives the earlier step's q, whatever eta: both are linear in independent normal noises."""
    alpha_bar = diffrect.cosine_alpha_bar(10)
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for step, following in [*PAIRS, (1, 0)]:
        def after(z0, noise, fresh):
            z_t = diffrect.diffuse(z0, alpha_bar[step], noise)
            return diffrect.reverse_step(z_t, z0, alpha_bar[step], alpha_bar[following], eta, fresh).item()

        assert after(one, zero, zero) == pytest.approx(math.sqrt(alpha_bar[following]), abs=1e-9)
        assert after(zero, one, zero) ** 2 + after(zero, zero, one) ** 2 == pytest.approx(1 - alpha_bar[following].item(), abs=1e-9)
        assert (after(zero, zero, one) > 0) is (eta > 0 and following > 0)


@pytest.mark.parametrize("length", [0, 1, 7, 300])
def test_the_ramp_rises_to_one(length):
    assert diffrect.ramp(0, length) == pytest.approx(math.exp(-5))
    for iteration in range(1, 2 * length + 3):
        expected = math.exp(-5 * (1 - iteration / length) ** 2) if iteration < length else 1
        assert diffrect.ramp(iteration, length) == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------- Eq. 14: CE + Dice


def plain_loss(logits, label, used, count, dice=True):
    """Pixel by pixel and class by class, float64."""
    logits, (size, classes, height, width) = logits.double(), logits.shape
    cross_entropy, both, squares = logits.new_zeros(()), [0.0] * classes, [0.0] * classes
    for b, row, column in itertools.product(range(size), range(height), range(width)):
        if not used[b, row, column]:
            continue
        z, own = logits[b, :, row, column], int(label[b, row, column])
        p = z.exp() / z.exp().sum()
        cross_entropy = cross_entropy - p[own].log() / float(count)
        for k in range(classes):
            both[k] = both[k] + p[k] * (k == own)
            squares[k] = squares[k] + p[k] ** 2 + (k == own)
    dices = [(2 * a + 1e-5) / (b + 1e-5) for a, b in zip(both, squares)]
    return cross_entropy + sum(1 - value for value in dices) / classes if dice else cross_entropy


@pytest.mark.parametrize("dice", [True, False])
def test_cross_entropy_and_dice_equal_a_plain_loop(dice, classes=4):
    function = diffrect.cross_entropy_and_dice if dice else diffrect.cross_entropy
    label = draw_labels(60, 2, 3, 5, classes=classes, ignored=0.2)
    label[label == 1] = 0  # a class that does not occur
    used = (label != IGNORE) & (torch.rand(label.shape, generator=seeded(62)) < 0.7)
    logits, count = (2 * draw(63, 2, classes, 3, 5)).requires_grad_(), torch.tensor(41.0)
    losses = [function(logits, label, used, count), plain_loss(logits, label, used, count, dice)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    slope, expected = (torch.autograd.grad(loss, logits)[0] for loss in losses)
    torch.testing.assert_close(slope, expected.float(), rtol=1e-4, atol=1e-6)
    unused = ~used[:, None].expand_as(slope)
    assert unused.any() and not slope[unused].any() and slope[~unused].all()
    scrambled = torch.where(used, label, draw_labels(65, 2, 3, 5, classes=classes, ignored=0.3))  # what is not used does not matter
    assert torch.equal(function(torch.where(unused, 50.0, logits), scrambled, used, count), losses[0])


def test_cross_entropy_and_dice_slopes_are_differences(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    label = draw_labels(70, 2, 3, 3, ignored=0.2)
    logits = draw(72, 2, 4, 3, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: diffrect.cross_entropy_and_dice(x, label, label != IGNORE, torch.tensor(14.0)), logits)


def test_nothing_used_is_no_loss():
    logits = draw(75, 2, 4, 3, 3).requires_grad_()
    loss = diffrect.cross_entropy_and_dice(logits, torch.full((2, 3, 3), IGNORE), torch.zeros(2, 3, 3, dtype=torch.bool), torch.tensor(1.0))
    loss.backward()
    assert loss == 0 and not logits.grad.any()


def test_a_perfect_mask_has_no_loss_and_a_wrong_one_the_largest_dice():
    label = draw_labels(76, 2, 4, 4)
    sure = 200.0 * nn.functional.one_hot(label, 4).permute(0, 3, 1, 2)
    loss = functools.partial(diffrect.cross_entropy_and_dice, label=label, used=label >= 0)
    assert loss(sure, count=torch.tensor(32.0)).item() == pytest.approx(0, abs=1e-6)
    assert loss(sure.roll(1, dims=1), count=torch.tensor(1e12)).item() == pytest.approx(1, abs=1e-5)


# ---------------------------------------------------------------- networks


def make_networks(seed=0, channels=2, gain=None, **options):
    """A U-Net and a rectifier with running statistics as after some training. With a gain, the U-Net in evaluation mode sees all classes."""
    torch.manual_seed(seed)
    networks = diffrect.UNet(4, channels), diffrect.Rectifier(4, channels, **options)
    for network in networks:
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.uniform_(part.running_mean, -0.3, 0.3)
                nn.init.uniform_(part.running_var, 0.5, 1.5)
    if gain:
        with torch.no_grad():
            logits = networks[0].eval()(torch.rand(2, 1, 64, 64))
            classifier = networks[0].decoder.classifier
            classifier.bias -= logits.mean(dim=(0, 2, 3))
            scale = gain / logits.std(dim=(0, 2, 3))
            classifier.weight *= scale[:, None, None, None]
            classifier.bias *= scale
    return networks


def draw_pairs(seed, size=2, crop=64):
    """(condition, target, slices, tau) for a rectifier."""
    colors = diffrect.semantic_colors(4)
    condition, target = (diffrect.color_masks(draw_labels(seed + number, size, crop, crop), colors) for number in (0, 2))
    return condition, target, torch.rand(size, 1, crop, crop, generator=seeded(seed + 4)), torch.rand(size, generator=seeded(seed + 5))


def test_networks_have_the_released_sizes():
    with torch.device("meta"):
        sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in (diffrect.UNet(4, 16), diffrect.Rectifier(4, 16))]
    assert [round(size / 1e6, 2) for size in sizes] == [1.81, 17.47]


@pytest.mark.parametrize("height, width", [(16, 16), (64, 64), (32, 80)])
def test_the_unet_keeps_the_size(height, width):
    unet, _ = make_networks()
    assert unet(torch.rand(2, 1, height, width)).shape == (2, 4, height, width)
    features = unet.encoder(torch.rand(2, 1, height, width))
    assert [tuple(part.shape) for part in features] == [(2, 2 << level, height >> level, width >> level) for level in range(5)]


@pytest.mark.parametrize("options", [{}, {"decoder": "upsample"}, {"diffusion_steps": None}, {"diffusion_steps": None, "decoder": "upsample"}])
@pytest.mark.parametrize("crop", [64, 128])
def test_the_rectifier_keeps_the_size(crop, options):
    _, rectifier = make_networks(**options)
    condition, target, slices, tau = draw_pairs(80, 3, crop)
    logits, latent_loss = rectifier(condition, target, slices, tau)
    assert logits.shape == (3, 4, crop, crop) and latent_loss.shape == (3,)
    labels = rectifier.rectify(condition, slices, tau)
    assert labels.shape == (3, crop, crop) and labels.dtype == torch.int64 and 0 <= labels.min() and labels.max() < 4
    if "decoder" in options:  # nothing but the latent is decoded
        flat = rectifier.decode([torch.zeros(3, 1, crop, crop)], torch.ones(3, 32, crop // 16, crop // 16), None)
        torch.testing.assert_close(flat, rectifier.decoder(torch.ones(3, 32, 1, 1)).expand_as(flat))


def test_guidance_step_condition_slices_and_masks_all_matter():
    _, rectifier = make_networks()
    rectifier.eval()
    condition, target, slices, tau = draw_pairs(90)
    z_t = draw(96, 2, 32, 4, 4)

    def outputs(condition=condition, slices=slices, tau=tau, z_t=z_t, step=3):
        guidance = rectifier.guidance(diffrect.TAU_SCALE * tau)
        features = rectifier.embed(condition, slices, guidance, rectifier.slice_encoder(slices, guidance))
        denoised = rectifier.denoiser(z_t, features[-1], torch.full((2,), step))
        return *features, denoised, rectifier.decode(features, denoised, guidance)

    def changed(**arguments):
        return [not torch.equal(a, b) for a, b in zip(outputs(), outputs(**arguments))]

    assert changed() == 7 * [False]
    assert changed(condition=target) == changed(slices=1 - slices) == changed(tau=1 - tau) == 7 * [True]
    assert changed(z_t=z_t + 1) == changed(step=4) == [False] * 5 + 2 * [True]
    guidance = rectifier.guidance(torch.zeros(2)), rectifier.guidance(torch.full((2,), 500.0))
    features = outputs()[:5]
    assert not torch.allclose(*(rectifier.decode(features, features[-1], embedding) for embedding in guidance), rtol=1e-3)  # the decoder is guided, too


def test_numbers_are_embedded_by_sines_and_cosines():
    layer = diffrect.Sinusoidal(8, 5)
    values = torch.tensor([0.0, 3.0, 612.5, 1000.0])
    given = []
    layer.layers.register_forward_hook(lambda module, inputs, output: given.append(inputs[0]))
    assert layer(values).shape == (4, 5)
    for row, value in zip(given[0].tolist(), values.tolist()):
        angles = [value / 10_000 ** (k / 7) for k in range(8)]
        assert row == pytest.approx([*map(math.sin, angles), *map(math.cos, angles)], abs=1e-3)


def embedded(rectifier, masks, slices, tau):
    """Eq. 5 of masks: features of five levels. Slices' features are added to what each level gives."""
    guidance = rectifier.guidance(1000 * tau)
    of_slices = slices
    x, features = torch.cat([slices, masks], dim=1), []
    for level in range(5):
        of_slices = rectifier.slice_encoder.blocks[level](nn.functional.max_pool2d(of_slices, 2) if level else of_slices, guidance)
        x = rectifier.mask_encoder.blocks[level](nn.functional.max_pool2d(x, 2) if level else x, guidance) + of_slices
        features.append(x)
    return features


def test_the_rectifier_learns_to_recover_the_targets_latent():
    """Eq. 7, 9, 11: what goes into the denoiser, what its output is compared with, and what is decoded."""
    _, rectifier = make_networks()
    rectifier.eval()
    condition, target, slices, tau = draw_pairs(100, size=64)
    calls = []
    rectifier.denoiser.register_forward_hook(lambda module, inputs, output: calls.append((*inputs, output)))
    decoded = []
    rectifier.decode = lambda features, latent, guidance: decoded.append((features, latent, guidance)) or latent
    with torch.no_grad():
        torch.manual_seed(1)
        logits, latent_loss = rectifier(condition, target, slices, tau)
        clean, features = embedded(rectifier, target, slices, tau)[-1], embedded(rectifier, condition, slices, tau)
    (z_t, given, step, recovered), = calls
    torch.testing.assert_close(given, features[-1], rtol=1e-4, atol=1e-5)
    assert step.shape == (64,) and set(step.tolist()) == set(range(1, 11))
    alpha_bar = diffrect.cosine_alpha_bar(10).float()[step][:, None, None, None]
    noise = (z_t - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()
    assert abs(noise.mean()) < 0.02 and abs(noise.var() - 1) < 0.03 and len(set(noise[:, 0, 0, 0].tolist())) == 64
    assert abs((noise * clean).mean() / clean.std()) < 0.02
    torch.testing.assert_close(latent_loss, (recovered - clean).square().mean(dim=(1, 2, 3)), rtol=1e-4, atol=1e-6)
    assert latent_loss.min() > 0 and decoded[0][1] is recovered
    for ours, theirs in zip(decoded[0][0], features):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decoded[0][2], rectifier.guidance(1000 * tau))


def test_the_target_does_not_learn():
    _, rectifier = make_networks()
    condition, target, slices, tau = draw_pairs(110)
    for part in (condition, target):
        part.requires_grad_()
    logits, latent_loss = rectifier(condition, target, slices, tau)
    for value in (latent_loss.sum(), logits.sum()):
        of_condition, of_target = torch.autograd.grad(value, (condition, target), retain_graph=True, allow_unused=True)
        assert of_condition.any() and of_target is None


def test_without_diffusion_the_condition_is_decoded():
    _, rectifier = make_networks(diffusion_steps=None)
    rectifier.eval()
    assert rectifier.denoiser is None and not [name for name in rectifier.state_dict() if name.startswith(("denoiser", "alpha"))]
    condition, target, slices, tau = draw_pairs(120)
    with torch.no_grad():
        logits, latent_loss = rectifier(condition, target, slices, tau)
        features = embedded(rectifier, condition, slices, tau)
        expected = rectifier.decoder(features, rectifier.guidance(1000 * tau))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert latent_loss.tolist() == [0, 0]
    assert torch.equal(rectifier.rectify(condition, slices, tau), logits.argmax(dim=1))


class Perfect(nn.Module):
    """A denoiser that knows the answer."""

    def __init__(self, z0):
        super().__init__()
        self.z0, self.calls = z0, []

    def forward(self, z_t, condition, step):
        self.calls.append((z_t, condition, step))
        return self.z0


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("sampling_steps", [1, 2, 3, 10])
def test_with_a_perfect_denoiser_labels_are_rectified_to_the_truth(sampling_steps, eta):
    _, rectifier = make_networks(decoder="upsample")
    z0, (condition, _, slices, tau) = draw(130, 2, 32, 4, 4), draw_pairs(131)
    rectifier.denoiser = Perfect(z0)
    labels = rectifier.rectify(condition, slices, tau, sampling_steps, eta)
    with torch.no_grad():
        logits = nn.functional.interpolate(rectifier.decoder(z0), (64, 64), mode="bilinear")
        rectifier.eval()
        latent = embedded(rectifier, condition, slices, tau)[-1]
    assert torch.equal(labels, logits.argmax(dim=1))
    steps = {1: [10], 2: [10, 5], 3: [10, 7, 3], 10: list(range(10, 0, -1))}[sampling_steps]
    assert [step.tolist() for _, _, step in rectifier.denoiser.calls] == [[step, step] for step in steps]
    alpha_bar = diffrect.cosine_alpha_bar(10)
    noises = [(z_t - alpha_bar[step].sqrt() * z0) / (1 - alpha_bar[step]).sqrt() for step, (z_t, _, _) in zip(steps, rectifier.denoiser.calls)]
    first = rectifier.denoiser.calls[0][0]
    assert first.dtype == torch.float32 and abs(first.mean()) < 0.15 and abs(first.var() - 1) < 0.2
    for (_, given, _), noise in zip(rectifier.denoiser.calls, noises):
        torch.testing.assert_close(given, latent, rtol=1e-4, atol=1e-5)
        assert torch.allclose(noise, noises[0], atol=1e-4) is (eta == 0 or noise is noises[0]) and abs(noise.var() - 1) < 0.2


@pytest.mark.parametrize("training", [True, False])
def test_rectifying_changes_nothing_in_the_rectifier(training):
    _, rectifier = make_networks()
    rectifier.train(training)
    before = {name: value.clone() for name, value in rectifier.state_dict().items()}
    condition, _, slices, tau = draw_pairs(140)
    condition.requires_grad_()
    decode, latents = rectifier.decode, []
    rectifier.decode = lambda features, latent, guidance: latents.append(latent) or decode(features, latent, guidance)
    labels = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        labels.append(rectifier.rectify(condition, slices, tau))
    assert torch.equal(labels[0], labels[1]) and torch.equal(latents[0], latents[1])
    assert not torch.allclose(latents[0], latents[2], rtol=1e-3)
    assert not latents[0].requires_grad
    assert_identical(rectifier.state_dict(), before)
    assert {part.training for part in rectifier.modules()} == {training}
    rectifier.eval()
    torch.manual_seed(0)
    assert torch.equal(rectifier.rectify(condition, slices, tau), labels[0])  # the mode before does not matter


# ---------------------------------------------------------------- views


def test_strong_views_are_torchvisions():
    """All four changes in their order, strengths fixed."""
    slices = torch.rand(3, 1, 24, 20, generator=seeded(150))
    strong = diffrect.strong_view(slices, dataclasses.replace(INFO, adjust=(1.3, 1.3), blur=(0.8, 0.8)), p=1.0)
    expected = slices
    for adjust in (tv.adjust_contrast, tv.adjust_sharpness, tv.adjust_brightness):
        expected = torch.stack([adjust(image, 1.3) for image in expected])
    torch.testing.assert_close(strong, tv.gaussian_blur(expected, [17, 17], [0.8, 0.8]), rtol=0, atol=2e-3)  # its sharpness rounds
    assert strong.shape == slices.shape and not torch.allclose(strong, slices, atol=0.05)


def test_every_slice_has_its_own_strong_view():
    slices = torch.rand(1, 1, 16, 16, generator=seeded(151)).repeat(400, 1, 1, 1)
    assert torch.equal(diffrect.strong_view(slices, INFO, p=0.0), slices)
    torch.manual_seed(0)
    strong = diffrect.strong_view(slices, INFO)
    assert strong.min() >= 0 and strong.max() <= 1 + 1e-5
    assert len({view.numpy().tobytes() for view in strong}) > 340  # the others: one in sixteen is the weak view
    assert 8 <= sum(torch.equal(view, slices[0]) for view in strong) <= 50
    flat = diffrect.strong_view(torch.full((400, 1, 9, 9), 0.5), INFO)[:, 0, 4, 4]  # only brightness changes it
    changed = flat[(flat - 0.5).abs() > 1e-5]
    assert 150 < len(changed) < 250 and 0.3 - 1e-5 <= changed.min() < 0.32 and 0.68 < changed.max() <= 0.7 + 1e-5
    dot = torch.zeros(400, 1, 17, 17)
    dot[:, :, 8, 8] = 1
    middle = diffrect.strong_view(dot, dataclasses.replace(INFO, adjust=(1, 1)))[:, 0, 8, 8]  # only blur changes it
    blurred = middle[middle < 1 - 1e-6]
    weights = np.exp(-np.arange(-8, 9) ** 2 / 2.0)
    assert 150 < len(blurred) < 250 and weights.sum() ** -2 - 1e-5 <= blurred.min() < weights.sum() ** -2 + 0.03 and blurred.max() > 0.8


def test_views_are_those_that_the_model_needs(monkeypatch):
    monkeypatch.setattr(diffrect, "strong_view", lambda slices, info: 1 - slices)
    batch = {name: torch.randint(256, (2, 1, 8, 8), generator=seeded(160), dtype=torch.uint8) for name in ("labeled", "unlabeled")}
    batch["unlabeled"] = 255 - batch["unlabeled"] // 2
    batch |= {"label": draw_labels(161, 2, 8, 8, ignored=0.2).byte(), "valid": draw_labels(163, 2, 8, 8) > 0, "truth": draw_labels(164, 2, 8, 8).byte()}
    unlabeled = {"weak", "strong", "valid", "truth"}
    for options, more in [({"model": "supervised"}, set()), ({"model": "supervised", "strong_labeled": True}, {"labeled_strong"}),
                          ({"model": "fixmatch"}, unlabeled), ({"model": "lcc"}, unlabeled), ({"model": "diffrect"}, unlabeled),
                          ({"model": "diffrect", "s2w": False}, unlabeled), ({"model": "diffrect", "w2g": False}, unlabeled | {"labeled_strong"})]:
        views = diffrect.make_views(batch, diffrect.Config(**options), INFO)
        assert views.keys() == {"labeled", "label"} | more
        torch.testing.assert_close(views["labeled"], batch["labeled"].float() / 255)
        assert views["label"].dtype == torch.int64 and torch.equal(views["label"], batch["label"].long())
        if "weak" in views:
            torch.testing.assert_close(views["weak"], batch["unlabeled"].float() / 255)
            assert torch.equal(views["strong"], 1 - views["weak"]) and torch.equal(views["valid"], batch["valid"])
            assert views["truth"].dtype == torch.int64 and torch.equal(views["truth"], batch["truth"].long())
        if "labeled_strong" in views:
            assert torch.equal(views["labeled_strong"], 1 - views["labeled"])
    del batch["truth"]
    assert "truth" not in diffrect.make_views(batch, diffrect.Config(), INFO)


@pytest.mark.parametrize("options, expected", [
    ({"model": "supervised"}, [["labeled"]]), ({"model": "supervised", "strong_labeled": True}, [["labeled_strong"]]),
    ({"model": "fixmatch"}, [["labeled", "weak"], ["strong"]]), ({"model": "diffrect"}, [["labeled", "weak"], ["strong"]]),
    ({"model": "diffrect", "w2g": False}, [["labeled", "weak"], ["labeled_strong", "strong"]])])
def test_views_that_share_batch_statistics(options, expected):
    values = {"labeled": 1.0, "weak": 2.0, "strong": 3.0, "labeled_strong": 4.0}
    views = {name: torch.full((2, 1, 4, 4), value) for name, value in values.items() if name in sum(expected, []) or name == "labeled"}
    calls = []

    def network(slices):
        calls.append(slices[:, 0, 0, 0].tolist())
        return slices.expand(-1, 4, -1, -1)

    outputs = diffrect.forward_views(network, views, diffrect.Config(**options))
    assert calls == [[values[name] for name in names for _ in range(2)] for names in expected]
    supervised = options["model"] == "supervised"
    for name, logits in outputs.items():
        assert logits.shape == (2, 4, 4, 4) and (logits == values[expected[0][0] if supervised else name]).all()
    assert outputs.keys() == ({"labeled"} if supervised else set(sum(expected, [])))


def test_embedded_masks_are_background_outside():
    views = {"label": draw_labels(170, 2, 5, 6, ignored=0.3), "valid": draw_labels(172, 2, 5, 6) > 0}
    outputs = {name: draw(173 + number, 2, 4, 5, 6).requires_grad_() for number, name in enumerate(("labeled", "weak", "strong", "labeled_strong"))}
    masks = diffrect.embedded_masks(outputs, views)
    assert masks.keys() == outputs.keys()
    for name, mask in masks.items():
        assert mask.dtype == torch.int64 and not mask.requires_grad
        for place in np.ndindex(2, 5, 6):
            inside = views["valid"][place] if name in ("weak", "strong") else views["label"][place] != IGNORE
            scores = outputs[name][(place[0], slice(None), *place[1:])].tolist()
            assert mask[place] == (scores.index(max(scores)) if inside else 0)


def test_pseudo_labels_are_used_from_the_threshold_on():
    logits = torch.tensor([[0.5, 0.5], [0.8, 0.2], [0.25, 0.75], [0.79, 0.21], [0.1, 0.9]]).log().T[None, :, None]
    valid = torch.tensor([True, True, True, True, False])[None, None]
    assert diffrect.confident(logits, valid, 0.7999).tolist() == [[[False, True, False, False, False]]]
    assert diffrect.confident(logits, valid, 0.6).tolist() == [[[False, True, True, True, False]]]
    assert diffrect.confident(torch.zeros(1, 4, 1, 1), valid[..., :1], 0.25).all()  # reaching it is enough


# ---------------------------------------------------------------- Eq. 13: the two losses


def draw_step(seed, size=2, height=3, width=5):
    """Outputs and views of a step as leaves, small enough for plain loops."""
    views = {"label": draw_labels(seed, size, height, width, ignored=0.2), "truth": draw_labels(seed + 2, size, height, width, ignored=0.1)}
    views["valid"] = draw_labels(seed + 4, size, height, width) > 0
    names = ("labeled", "weak", "strong", "labeled_strong")
    views |= {name: torch.rand(size, 1, height, width, generator=seeded(seed + 10 + number)) for number, name in enumerate(names)}
    outputs = {name: (2 * draw(seed + 20 + number, size, 4, height, width)).requires_grad_() for number, name in enumerate(names)}
    return outputs, views, runtime.pixel_counts([views])


def by_hand(outputs, views, threshold):
    """(pseudo labels, used) of the weak view."""
    probs = outputs["weak"].detach().double().exp()
    probs = probs / probs.sum(dim=1, keepdim=True)
    return probs.argmax(dim=1), (probs.amax(dim=1) >= threshold) & views["valid"]


@pytest.mark.parametrize("model, warm, dice", [("supervised", True, False), ("fixmatch", True, True), ("fixmatch", True, False), ("lcc", True, True),
                                               ("diffrect", True, False), ("diffrect", False, False)])
def test_the_segmentation_loss_is_its_equation(model, warm, dice):
    outputs, views, counts = draw_step(200)
    rectified = draw_labels(210, 2, 3, 5) if warm and model in ("lcc", "diffrect") else None
    config = resolved(model=model, threshold=0.6, rectify_weight=0.7, pseudo_dice=dice)
    loss, terms = diffrect.segmentation_loss(outputs, views, counts, rectified, 0.4, config)
    pseudo_label, used = by_hand(outputs, views, 0.6)
    assert 0.2 < used.sum() / views["valid"].sum() < 0.9
    known, valid = views["label"] != IGNORE, views["valid"]
    expected = {"loss_sup": (1.0, plain_loss(outputs["labeled"], views["label"], known, known.sum()))}
    if model != "supervised":
        expected["loss_unsup"] = (0.4, plain_loss(outputs["strong"], pseudo_label, used, valid.sum(), dice))
        dices = [[plain_overlap(a, b, 4)[0] for a, b in zip(labels.numpy(), views["truth"].numpy())] for labels in
                 (pseudo_label, pseudo_label if rectified is None else rectified)]
        assert terms["used"].item() == pytest.approx((used.sum() / valid.sum()).item())
        assert terms["pseudo_dice"].item() == pytest.approx(np.mean(dices[0]))
    if model in ("lcc", "diffrect"):
        assert terms["rectified_dice"].item() == pytest.approx(np.mean(dices[1]))
        expected["loss_rectified"] = (0.7, plain_loss(outputs["weak"], rectified, valid, valid.sum()) if warm else torch.zeros(()))
    assert {name for name in terms if name.startswith("loss")} == {"loss", *expected}
    for name, (_, value) in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-5)
    total = sum(weight * value for weight, value in expected.values())
    assert loss.item() == terms["loss"].item() == pytest.approx(total.item(), rel=1e-5)
    leaves = list(outputs.values())
    for ours, theirs in zip(torch.autograd.grad(loss, leaves, allow_unused=True), torch.autograd.grad(total, leaves, allow_unused=True)):
        torch.testing.assert_close(torch.zeros(()) if ours is None else ours, torch.zeros(()) if theirs is None else theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model, s2w, w2g, guidance, dice", [
    ("diffrect", True, True, "dice", False), ("diffrect", True, True, "jaccard", True), ("diffrect", False, True, "dice", True),
    ("diffrect", True, False, "dice", False), ("lcc", True, True, "dice", True)])
def test_the_rectifiers_loss_is_its_equation(model, s2w, w2g, guidance, dice):
    outputs, views, counts = draw_step(220)
    if w2g:
        del outputs["labeled_strong"], views["labeled_strong"]
    config = resolved(model=model, s2w=s2w, w2g=w2g, guidance=guidance, threshold=0.6, lambda_u=0.7, lambda_l=0.3, pseudo_dice=dice)
    colors, masks = diffrect.semantic_colors(4), diffrect.embedded_masks(outputs, views)
    before = {name: mask.clone() for name, mask in masks.items()}
    size = 4 if s2w else 2
    logits, latent = draw(240, size, 4, 3, 5).requires_grad_(), torch.rand(size, generator=seeded(241)).requires_grad_()
    calls = []
    loss, terms = diffrect.rectifier_loss(lambda *given: calls.append(given) or (logits, latent), masks, views, counts, colors, outputs, 0.4, config)

    (condition, target, slices, tau), = calls
    pairs = [(before["labeled"], views["label"], views["labeled"])] if w2g else [(before["labeled_strong"], before["labeled"], views["labeled_strong"])]
    pairs.append((before["strong"], before["weak"], views["strong"]))
    of_pairs = [torch.tensor([plain_overlap(a, b, 4)[guidance == "jaccard"] for a, b in zip(coarse.numpy(), fine.numpy())], dtype=torch.float32)
                for coarse, fine, _ in pairs]
    assert not torch.allclose(*of_pairs)
    torch.testing.assert_close(masks["tau_l"], of_pairs[0])
    torch.testing.assert_close(masks["tau_u"], of_pairs[1])
    assert_identical({name: mask for name, mask in masks.items() if name in before}, before)
    if not s2w:
        pairs.pop(), of_pairs.pop()
    coarse, fine, expected = (torch.cat(column) for column in zip(*pairs))
    torch.testing.assert_close(tau, torch.cat(of_pairs))
    assert torch.equal(slices, expected)
    for painted, labels in ((condition, coarse), (target, fine)):
        for place in np.ndindex(*labels.shape):
            label = 0 if labels[place] == IGNORE else labels[place]
            assert (255 * painted[(place[0], slice(None), *place[1:])]).tolist() == colors[label].tolist()

    known, valid = views["label"] != IGNORE, views["valid"]
    _, used = by_hand(outputs, views, 0.6)
    expected = {"loss_decoded": (1.0, plain_loss(logits[:2], views["label"], known, known.sum()))}
    if model == "diffrect":
        expected["loss_latent_l"] = (0.3, (latent[0] + latent[1]) / 2)
    if s2w:
        expected["loss_decoded_u"] = (0.4, plain_loss(logits[2:], before["weak"], used, valid.sum(), dice))
        if model == "diffrect":
            expected["loss_latent_u"] = (0.7, (latent[2] + latent[3]) / 2)
    assert {name for name in terms if name.startswith("loss")} == {"loss_rectifier", *expected}
    for name, (_, value) in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-5)
    total = sum(weight * value for weight, value in expected.values())
    assert loss.item() == terms["loss_rectifier"].item() == pytest.approx(total.item(), rel=1e-5)
    leaves = [logits, latent, *outputs.values()]
    slopes = [torch.autograd.grad(value, leaves, allow_unused=True) for value in (loss, total)]
    for ours, theirs in zip(*slopes):
        assert (ours is None) is (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert slopes[0][2:] == (None,) * len(outputs)  # the U-Net learns nothing from it
    assert terms["tau_l"].item() == pytest.approx(masks["tau_l"].mean().item()) and terms["tau_u"].item() == pytest.approx(masks["tau_u"].mean().item())


def draw_views(seed, size=2, crop=64):
    """Views of real size. Slices differ in how much of them is labeled and valid."""
    names = ("labeled", "weak", "strong", "labeled_strong")
    views = {name: torch.rand(size, 1, crop, crop, generator=seeded(seed + number)) for number, name in enumerate(names)}
    views |= {"label": draw_labels(seed + 4, size, crop, crop), "truth": draw_labels(seed + 6, size, crop, crop)}
    views["valid"] = torch.zeros(size, crop, crop, dtype=torch.bool)
    for number in range(size):
        views["valid"][number, 9 * number :] = True
        views["label"][number, :, 12 * number + 16 :] = IGNORE
    return views


def both_losses(networks, views, config, device="cpu"):
    """(segmentation loss, rectifier's loss, all terms) of a step as `train` makes it. `networks`: U-Net, rectifier and what is called for each."""
    unet, rectifier, network, rectifier_network = networks
    counts = runtime.pixel_counts([views])
    colors = diffrect.mask_colors(config, 4).to(device)
    outputs = diffrect.forward_views(network, views, config)
    masks = diffrect.embedded_masks(outputs, views)
    loss, terms = diffrect.rectifier_loss(rectifier_network, masks, views, counts, colors, outputs, 0.6, config)
    rectified = rectifier.rectify(diffrect.color_masks(masks["weak"], colors), views["weak"], masks["tau_u"], config.sampling_steps, config.eta)
    of_unet, own_terms = diffrect.segmentation_loss(outputs, views, counts, rectified, 0.6, config)
    return of_unet, loss, {**terms, **own_terms}


VARIANTS = {"diffrect": {}, "no s2w": {"s2w": False}, "no w2g": {"w2g": False}, "upsample": {"decoder": "upsample"}, "grey": {"colors": False},
            "no w2g, upsample": {"w2g": False, "decoder": "upsample"}, "lcc": {"model": "lcc"},
            "lcc, upsample": {"model": "lcc", "decoder": "upsample"}}


def make_step(options, device="cpu"):
    config = resolved(**options)
    unet, rectifier = make_networks(diffusion_steps=10 if config.model == "diffrect" else None, decoder=config.decoder)
    views = draw_views(250)
    if config.w2g:
        del views["labeled_strong"]
    unet.to(device), rectifier.to(device)
    views = {name: value.to(device) for name, value in views.items()}
    return unet, rectifier, both_losses((unet, rectifier, unet, rectifier), views, config, device)


@pytest.mark.parametrize("name", VARIANTS)
def test_each_loss_trains_all_of_its_own_network_and_nothing_else(name):
    """Data-parallel training would wait for a parameter without a gradient."""
    unet, rectifier, (of_unet, of_rectifier, _) = make_step(VARIANTS[name])
    for loss, own, other in ((of_unet, unet, rectifier), (of_rectifier, rectifier, unet)):
        for part in (unet, rectifier):
            part.zero_grad(set_to_none=True)
        loss.backward(retain_graph=True)
        assert all(parameter.grad is None for parameter in other.parameters())
        assert not [name for name, parameter in own.named_parameters() if parameter.grad is None or parameter.dim() > 1 and not parameter.grad.any()]


@pytest.mark.parametrize("name", ["diffrect", "no w2g", "lcc, upsample"])
def test_a_step_reads_nothing_back_from_the_device(name):
    """On the meta device tensors have no values: .item(), boolean indexing and branches on values raise there."""
    _, _, (of_unet, of_rectifier, terms) = make_step(VARIANTS[name], "meta")
    (of_unet + of_rectifier).backward()
    assert of_unet.device.type == of_rectifier.device.type == "meta" and {value.dim() for value in terms.values()} == {0}
    assert diffrect.strong_view(torch.empty(2, 1, 16, 16, device="meta"), INFO).device.type == "meta"
    with pytest.raises(Exception):
        of_unet.item()


def test_nothing_labeled_and_nothing_valid_give_numbers():
    outputs, views, _ = draw_step(260)
    views["label"], views["valid"] = torch.full_like(views["label"], IGNORE), views["valid"] & False
    counts = runtime.pixel_counts([views])
    loss, terms = diffrect.segmentation_loss(outputs, views, counts, draw_labels(262, 2, 3, 5), 1.0, resolved(threshold=0.5, pseudo_dice=True))
    loss.backward()
    assert loss == 0 and all(value.isfinite() for value in terms.values())
    assert not any(part.grad.any() for part in outputs.values() if part.grad is not None)


def noise_of(x, dtype=None):
    """Instead of torch.randn_like: the same noise for a slice, whatever batch it is in."""
    return torch.cos(37 * x).to(dtype or x.dtype)


def fixed_steps(low, high, size, device=None):
    """Instead of torch.randint."""
    return torch.full(size, 4, device=device)


def step_in_float64(context):
    """Terms and gradients of a step on this rank's part of a batch, in float64: in float32, convolutions of half a batch round differently."""
    unet, rectifier = (network.double().eval() for network in make_networks(gain=1))
    with torch.no_grad():
        for parameter in (*unet.parameters(), *rectifier.parameters()):
            parameter += context.rank  # ranks must start from rank 0's weights
    config = resolved(w2g=False, threshold=0.35, pseudo_dice=True)
    networks = [runtime.wrap(network, config, context) for network in (unet, rectifier)]
    views = {name: value.chunk(context.world_size)[context.rank] for name, value in draw_views(270, size=4).items()}
    views = {name: value.double() if value.is_floating_point() else value for name, value in views.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(torch, "randn_like", noise_of)
        patch.setattr(torch, "randint", fixed_steps)
        of_unet, of_rectifier, terms = both_losses((unet, rectifier, *networks), views, config)
        of_rectifier.backward()
        of_unet.backward()
    gradients = [torch.cat([parameter.grad.flatten() for parameter in network.parameters()]) for network in (unet, rectifier)]
    return {name: value.item() for name, value in terms.items()}, gradients


# ---------------------------------------------------------------- programs


QUICK = ["--dataset", "acdc", "--labeled", "2", "--crop", "64", "--channels", "2", "--batch-size", "2", "--num-workers", "0", "--device", "cpu",
         "--threshold", "0.3", "--log-every", "1"]
LONGER = [*QUICK, "--iterations", "6", "--warmup", "2", "--rampup", "4", "--eval-every", "4", "--save-every", "1", "--consistency", "0.5",
          "--rectify-weight", "0.7", "--lambda-u", "0.6", "--lambda-l", "0.8", "--lr", "0.01", "--rectifier-lr", "0.02",
          "--sampling-steps", "3", "--eta", "1", "--ema-decay", "0.9"]
PARTS = ("model", "rectifier", "optimizer", "rectifier_optimizer", "ema", "rng", "iteration", "last", "best")

refuse = functools.partial(programs.refuse, "diffrect.py")
run_as_program = functools.partial(programs.run_as_program, "diffrect.py")


@pytest.fixture(scope="module")
def hearts(tmp_path_factory) -> Path:
    """A small ACDC in the form that training reads: eight patients, three slices of rings each."""
    root = tmp_path_factory.mktemp("data") / "acdc"
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:40, :48]
    (root / "lists").mkdir(parents=True)
    names = [f"p{number}" for number in range(8)]
    for name in names:
        label = np.zeros((3, 40, 48), np.uint8)
        for number in range(3):
            radius = np.hypot(rows - rng.integers(16, 24), columns - rng.integers(18, 30)) / rng.uniform(0.8, 1.2)
            for value, outer in ((1, 15), (2, 10), (3, 6)):
                label[number][radius < outer] = value
        image = 100.0 * label + rng.normal(0, 30, label.shape)
        medical.write_volume(root / "volumes" / f"{name}.npz", medical.Volume(image.astype(np.float32), label, (10.0, 1.5, 1.5)))
    for split, part in (("train", names[:5]), ("val", names[5:7]), ("test", names[7:])):
        (root / "lists" / f"{split}.txt").write_text("".join(f"{name} {name}\n" for name in part))
    return root


def configured(*arguments) -> diffrect.Config:
    return parse(diffrect.Config, [str(argument) for argument in arguments])


@contextlib.contextmanager
def handlers_kept():
    """For fixtures of a module, as the fixture keep_signal_handlers."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def trained(hearts, tmp_path_factory) -> Path:
    """A finished run, never interrupted."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with handlers_kept():
        diffrect.train(configured(*LONGER, "--data-root", hearts, "--output", folder))
    return folder


def lines_of(folder) -> list[dict]:
    return [line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in line]


def files(folder) -> dict:
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_leaves_its_folder(trained):
    assert set(files(trained)) == {"config.json", "metrics.jsonl", "results.json", "latest.pt", "best.pt", "samples.png", "rectified.png"}
    results, saved = json.loads((trained / "results.json").read_text()), state(trained)
    assert results["method"] == "diffrect" and results["last"]["iteration"] == saved["iteration"] == 6
    assert results["last"]["volumes"] == 2 and results["test"]["volumes"] == 1 and set(results["test"]["scores"]) == {"p7"}
    assert results["best"]["dice"] == max(results["best"]["dice"], results["last"]["dice"])
    lengths = {}
    for name in ("samples.png", "rectified.png"):
        with Image.open(trained / name) as picture:
            lengths[name] = picture.size
    assert lengths["rectified.png"][0] > lengths["samples.png"][0] and lengths["rectified.png"][1] == lengths["samples.png"][1]  # a column more
    best = torch.load(trained / "best.pt", weights_only=True)
    unet = diffrect.UNet(4, 2)
    assert best["model"].keys() == saved["model"].keys() == saved["ema"].keys() == unet.state_dict().keys() and "rectifier" not in best
    assert diffrect.predictor(unet, None) is unet and not unet.training


def test_each_line_of_the_log_adds_up(trained):
    lines = lines_of(trained)
    assert [line["iteration"] for line in lines] == list(range(1, 7))
    for k, line in enumerate(lines):
        weight = 0.5 * math.exp(-5 * (1 - min(k, 4) / 4) ** 2)
        assert line["loss"] == pytest.approx(line["loss_sup"] + weight * line["loss_unsup"] + 0.7 * line["loss_rectified"], abs=1e-5)
        assert line["loss_rectifier"] == pytest.approx(line["loss_decoded"] + 0.8 * line["loss_latent_l"] + weight * line["loss_decoded_u"]
                                                       + 0.6 * line["loss_latent_u"], abs=1e-5)
        assert (line["loss_rectified"] > 0) is (k >= 2)
        assert 0 < line["used"] <= 1 and 0 <= line["tau_u"] <= 1 and 0 <= line["tau_l"] < 1 and line["loss_latent_l"] > 0
        assert "pseudo_dice" not in line  # truth of unlabeled slices is not read here


def test_learning_rates_fall_and_both_networks_learn(trained):
    saved = state(trained)
    for name, initial in (("optimizer", 0.01), ("rectifier_optimizer", 0.02)):
        group, = saved[name]["param_groups"]
        assert group["initial_lr"] == initial and group["lr"] == pytest.approx(initial * (1 / 6) ** 0.9)
        assert (group["momentum"], group["weight_decay"]) == (0.9, 1e-4)
    runtime.seed_everything(0)
    for name, network in (("model", diffrect.UNet(4, 2)), ("rectifier", diffrect.Rectifier(4, 2))):
        fresh = dict(network.named_parameters())
        assert fresh.keys() <= saved[name].keys()
        moved = {parameter: (saved[name][parameter] - value.detach()).abs().max().item() for parameter, value in fresh.items()}
        assert all(0 < move < 0.5 for parameter, move in moved.items() if parameter.endswith("weight")), moved
    assert not torch.equal(saved["ema"]["decoder.classifier.weight"], saved["model"]["decoder.classifier.weight"])
    assert saved["rectifier"]["mask_encoder.blocks.0.first.1.num_batches_tracked"] == 12  # conditions and targets, never while rectifying
    assert saved["model"]["encoder.blocks.0.first.1.num_batches_tracked"] == 12  # two passes a step


def test_a_step_of_the_loop(hearts, tmp_path, monkeypatch, keep_signal_handlers):
    """Each optimizer goes along the gradient of its own loss, with nothing left in .grad; what is rectified, and that it is learned from."""
    models, wanted, steps, calls = [], {}, [], []
    wrap, step, rectify = runtime.wrap, torch.optim.SGD.step, diffrect.Rectifier.rectify
    monkeypatch.setattr(runtime, "wrap", lambda model, *rest: models.append(model) or wrap(model, *rest))

    def note(name, number):
        function = getattr(diffrect, name)

        def noted(*arguments):
            assert all(part.training for model in models for part in model.modules())  # after evaluations and rectifying, too
            loss, terms = function(*arguments)
            parameters = list(models[number].parameters())
            wanted.update(zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True)))
            calls.append((name, arguments))
            return loss, terms

        monkeypatch.setattr(diffrect, name, noted)

    def check(self, *arguments):
        for parameter in self.param_groups[0]["params"]:
            torch.testing.assert_close(parameter.grad, wanted[parameter], rtol=1e-4, atol=1e-6)
        steps.append([list(model.parameters())[0] is self.param_groups[0]["params"][0] for model in models].index(True))
        return step(self, *arguments)

    note("segmentation_loss", 0)
    note("rectifier_loss", 1)
    monkeypatch.setattr(torch.optim.SGD, "step", check)
    monkeypatch.setattr(diffrect.Rectifier, "rectify", lambda *given: calls.append(("rectify", (*given, rectify(*given)))) or calls[-1][1][-1])
    diffrect.train(configured(*QUICK, "--iterations", "3", "--warmup", "1", "--eval-every", "1", "--sampling-steps", "3", "--eta", "1",
                              "--data-root", hearts, "--output", tmp_path / "run"))
    assert steps == [1, 0] * 3 and len(models) == 2
    names = ["rectifier_loss", "segmentation_loss"] + 2 * ["rectifier_loss", "rectify", "segmentation_loss"]
    assert [name for name, _ in calls[: len(names)]] == names and calls[1][1][3] is None
    for number in (2, 5):
        (_, masks, views, counts, colors, outputs, *_), rectified, learned = (arguments for _, arguments in calls[number : number + 3])
        assert rectified[0] is models[1] and rectified[2] is views["weak"] and rectified[3] is masks["tau_u"]
        assert len(rectified) == 7 and rectified[4:6] == (3, 1.0)
        assert torch.equal(rectified[1], diffrect.color_masks(masks["weak"], colors))
        assert learned[0] is outputs and learned[1] is views and learned[2] is counts and learned[3] is rectified[-1]


def test_a_finished_run_trains_nothing_and_other_options_are_refused(trained, hearts, monkeypatch, capfd, keep_signal_handlers):
    command = [*LONGER, "--data-root", hearts, "--output", trained]
    before, results, lines = files(trained), (trained / "results.json").read_text(), (trained / "metrics.jsonl").read_text()
    message = refuse(monkeypatch, capfd, *command, "--guidance", "none")
    assert "other options" in message and "--guidance dice" in message
    for options in (["--rectifier-lr", "0.03"], ["--model", "fixmatch"], ["--no-w2g"], ["--eta", "0"]):
        with pytest.raises(runtime.UserError, match="other options"):
            diffrect.train(configured(*command, *options))
    assert files(trained) == before
    monkeypatch.setattr(diffrect, "rectifier_loss", None)
    assert diffrect.train(configured(*command)) == json.loads(results)["last"]
    after = files(trained)
    assert {name: after[name] for name in ("latest.pt", "best.pt")} == {name: before[name] for name in ("latest.pt", "best.pt")}
    assert (trained / "results.json").read_text() == results and (trained / "metrics.jsonl").read_text() == lines


def test_sigkill_then_the_same_command_ends_with_identical_bits(trained, hearts, tmp_path, monkeypatch, capfd, keep_signal_handlers):
    command = [*LONGER, "--data-root", hearts, "--output", tmp_path]
    interrupted_at = kill_after_first_checkpoint(tmp_path, "diffrect.py", *command)["iteration"]
    assert interrupted_at < 6, "the run ended before it could be killed"
    status, out, err = run_as_program(monkeypatch, capfd, *command)
    assert status == 0 and f"resuming {tmp_path} at iteration {interrupted_at}" in out, err
    ours, theirs = state(tmp_path), state(trained)
    for name in PARTS:
        assert_identical(ours[name], theirs[name], name)
    assert (tmp_path / "results.json").read_text() == (trained / "results.json").read_text()
    lines = [lines_of(folder) for folder in (tmp_path, trained)]
    for line in sum(lines, []):
        del line["images_per_second"]
    assert lines[0] == lines[1]


RUNS = {
    "supervised": ["--model", "supervised"],
    "supervised, strong": ["--model", "supervised", "--strong-labeled", "--labeled", "all"],
    "fixmatch": ["--model", "fixmatch"],
    "lcc": ["--model", "lcc", "--no-colors", "--guidance", "none"],
    "lcc, upsample": ["--model", "lcc", "--decoder", "upsample"],
    "diffrect": [],
    "one slice": ["--batch-size", "1"],
    "no s2w": ["--no-s2w", "--guidance", "random"],
    "no w2g": ["--no-w2g", "--guidance", "fixed"],
    "no colors": ["--no-colors", "--guidance", "jaccard"],
    "ddpm": ["--sampling-steps", "4", "--diffusion-steps", "4", "--eta", "1", "--guidance", "both"],
    "upsample": ["--decoder", "upsample", "--pseudo-dice", "--ema-decay", "0.9"],
    "amp": ["--amp", "--decoder", "upsample"],
    "amp, unet": ["--amp", "--no-w2g", "--eta", "0.5"],
    "compile": ["--compile"],
}


@pytest.mark.parametrize("name", RUNS)
def test_variants_train(name, hearts, tmp_path, monkeypatch, keep_signal_handlers):
    if name == "compile":  # traces the graphs; making kernels of them would take a minute
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    seen, averaged, evaluated = [], [], []
    rectify, average, evaluate = diffrect.Rectifier.rectify, runtime.WeightAverage.update, scores.evaluate_volumes

    def noted(self, masks, *arguments):
        seen.append((masks, self.alpha_bar, arguments[2:]))
        return rectify(self, masks, *arguments)

    def note_evaluation(predict, files, *arguments):
        evaluated.append(([file.name for file in files], {name: value.clone() for name, value in predict.state_dict().items()}, predict.training))
        return evaluate(predict, files, *arguments)

    monkeypatch.setattr(diffrect.Rectifier, "rectify", noted)
    monkeypatch.setattr(runtime.WeightAverage, "update", lambda self, iteration: averaged.append(iteration) or average(self, iteration))
    monkeypatch.setattr(scores, "evaluate_volumes", note_evaluation)
    config = configured(*QUICK, "--iterations", "2", "--warmup", "1", "--data-root", hearts, "--output", tmp_path / "run", *RUNS[name])
    last = diffrect.train(config)
    folder, saved = tmp_path / "run", state(tmp_path / "run")
    lines = lines_of(folder)
    assert last["iteration"] == saved["iteration"] == len(lines) == 2 and last["volumes"] == 2
    losses = [(key, value) for line in lines for key, value in line.items() if key.startswith("loss")]
    assert all(0 < value < 100 for key, value in losses if key != "loss_rectified")
    assert [value > 0 for key, value in losses if key == "loss_rectified"] == ([False, True] if config.model in ("lcc", "diffrect") else [])
    assert json.loads((folder / "results.json").read_text())["test"]["volumes"] == 1
    model = config.model
    logged = {"loss", "loss_sup"} | ({"loss_unsup"} if model != "supervised" else set())
    if model in ("lcc", "diffrect"):
        logged |= {"loss_rectified", "loss_rectifier", "loss_decoded", "loss_decoded_u"}
        logged |= {"loss_latent_l", "loss_latent_u"} if model == "diffrect" else set()
    if name == "no s2w":
        logged -= {"loss_latent_u", "loss_decoded_u"}
    assert {key for key in lines[0] if key.startswith("loss")} == logged
    rectifies = model in ("lcc", "diffrect")
    assert (folder / "rectified.png").exists() is rectifies is ("rectifier" in saved) is ("rectifier_optimizer" in saved) is bool(seen)
    assert (folder / "samples.png").exists()
    if rectifies:
        assert len(seen) == 3 and {options for _, _, options in seen} == {(config.sampling_steps, config.eta)}  # one step, two pictures
        assert {len(alpha_bar) for _, alpha_bar, _ in seen} == {1 + (config.diffusion_steps if model == "diffrect" else 1)}
        assert (model == "lcc") is not [key for key in saved["rectifier"] if key.startswith("denoiser")]
        assert ("decoder.weight" in saved["rectifier"]) is ("upsample" in RUNS[name])
        colors = {tuple(color) for masks, _, _ in seen for color in (255 * masks).round().int().movedim(1, 3).reshape(-1, 3).tolist()}
        assert len(colors) > 1 and colors <= set(map(tuple, diffrect.mask_colors(config, 4).tolist()))
        taus = {"none": 0, "fixed": 0.5}
        if config.guidance in taus:
            assert all(line["tau_u"] == line["tau_l"] == taus[config.guidance] for line in lines)
    ema = "--ema-decay" in RUNS[name]
    assert averaged == ([0, 1] if ema else []) and ("ema" in saved) is ema
    assert [names for names, *_ in evaluated] == [["p5", "p6"], ["p7"]]
    for weights in (*(weights for _, weights, _ in evaluated), torch.load(folder / "best.pt", weights_only=True)["model"]):
        assert_identical(weights, saved["ema" if ema else "model"])
    assert not any(training for *_, training in evaluated)


def test_the_rectified_picture(hearts, tmp_path, monkeypatch, capsys):
    config = configured(*QUICK, "--data-root", hearts)
    data = medical.load_volumes(config, CPU)
    config.crop = 64
    unet, rectifier = make_networks()
    grids = []
    monkeypatch.setattr(diffrect, "sample_grid", lambda *arguments: grids.append(arguments))
    monkeypatch.setattr(diffrect.Rectifier, "rectify", lambda self, masks, slices, tau, *options: (masks[:, 0] + 2 * tau[0]).long())
    diffrect.write_rectified(unet, rectifier, diffrect.semantic_colors(4), data, config, CPU.device, tmp_path / "rectified.png")
    (rows, classes, palette, path, titles), = grids
    assert len(rows) == 2 and path == tmp_path / "rectified.png" and len(titles) == len(rows[0]) == 4
    assert not unet.training
    for row, file in zip(rows, data.val):
        volume = medical.read_volume(file.path)
        image = medical.resize_slices(volume.image[1:2], 64)
        with torch.no_grad():
            label = unet(torch.from_numpy(image)[None].float() / 255).argmax(dim=1)
        assert row[0].shape == (64, 64, 3) and (row[0] == image[0][..., None]).all()
        assert np.array_equal(row[1], label[0].numpy()) and np.array_equal(row[3], medical.resize_labels(volume.label[1:2], 64)[0])
        assert np.array_equal(row[2], 2 + diffrect.color_masks(label, diffrect.semantic_colors(4))[0, 0].numpy())  # tau of a mask and itself is 1


BAD = [
    (["--crop", "60"], "--crop must be a multiple of 64"), (["--crop", "96"], "--crop"), (["--grad-accum", "2"], "--grad-accum"),
    (["--epochs", "3"], "--epochs"), (["--backbone", "resnet50"], "--backbone"), (["--threshold", "1"], "--threshold"),
    (["--threshold", "-0.1"], "--threshold"), (["--eta", "2"], "--eta"), (["--eta", "-0.5"], "--eta"),
    (["--sampling-steps", "11"], "--sampling-steps takes 1 to 10"), (["--sampling-steps", "0"], "--sampling-steps"),
    (["--diffusion-steps", "3", "--sampling-steps", "4"], "1 to 3"), (["--channels", "0"], "--channels"), (["--rectifier-lr", "0"], "--rectifier-lr"),
    (["--no-s2w", "--no-w2g"], "--model lcc"), (["--model", "fixmatch", "--no-s2w"], "--no-s2w"), (["--model", "lcc", "--no-w2g"], "--no-w2g"),
    (["--no-s2w", "--batch-size", "1"], "batch norm needs two"), (["--batch-size", "0"], "--batch-size"), (["--strong-labeled"], "--strong-labeled"),
    (["--model", "fixmatch", "--labeled", "all"], "no unlabeled patient is left"), (["--labeled", "6"], "--labeled 6"),
    (["--dataset", "brats"], "brats"),
]


@pytest.mark.parametrize("options, named", BAD, ids=[" ".join(options) for options, _ in BAD])
def test_bad_options_give_one_line_and_write_nothing(options, named, hearts, tmp_path):
    with pytest.raises(runtime.UserError) as caught:
        diffrect.train(configured(*QUICK, "--data-root", hearts, "--output", tmp_path / "run", *options))
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_one_slice_a_rank_is_refused_where_batch_norm_needs_two(hearts):
    ranks = runtime.Context(0, 2, torch.device("cpu"))
    for options, refused in (([], True), (["--crop", "128"], False), (["--batch-size", "4"], False)):
        config = configured(*QUICK, "--iterations", "2", "--lr", "0.01", "--data-root", hearts, "--no-s2w", *options)
        data = medical.load_volumes(config, CPU)
        diffrect.fill_from_recipe(config, "diffrect", data, ranks)
        with pytest.raises(runtime.UserError, match="one slice a rank") if refused else contextlib.nullcontext():
            diffrect.check(config, data, ranks)


@pytest.mark.parametrize("options, named", [(["--crop", "60"], "--crop"), (["--data-root", "nowhere"], "no lists/train.txt in nowhere")])
def test_the_program_refuses_in_one_line(options, named, hearts, tmp_path, monkeypatch, capfd, keep_signal_handlers):
    assert named in refuse(monkeypatch, capfd, *QUICK, "--data-root", hearts, "--output", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_test_list(hearts, tmp_path, keep_signal_handlers):
    shutil.copytree(hearts, tmp_path / "data")
    (tmp_path / "data" / "lists" / "test.txt").unlink()
    diffrect.train(configured(*QUICK, "--model", "supervised", "--iterations", "1", "--data-root", tmp_path / "data", "--output", tmp_path / "run"))
    assert "test" not in json.loads((tmp_path / "run" / "results.json").read_text())


RANKS = """
import sys

import torch
import diffrect
from common import options, runtime
from common.run import Run

sys.path.insert(0, "tests")
import test_diffrect

save = Run.save


def save_each_rank(self, iteration):
    save(self, iteration)
    torch.save({name: part.state_dict() for name, part in self.state.items()}, f"{sys.argv[1]}/{self.context.rank}.pt")


Run.save = save_each_rank
diffrect.train(options.parse(diffrect.Config, sys.argv[2:]))
context = runtime.start("cpu")
torch.save(test_diffrect.step_in_float64(context), f"{sys.argv[1]}/step_{context.rank}.pt")
runtime.finish()
"""


def test_two_ranks_train_like_one_process(hearts, tmp_path):
    script, folder = tmp_path / "ranks.py", tmp_path / "run"
    script.write_text(RANKS)
    command = [*LONGER, "--iterations", "3", "--data-root", hearts, "--output", folder]
    succeed(script, tmp_path, *command, torchrun=2)
    saved, ranks = state(folder), [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert saved["iteration"] == 3 and len(saved["rng"]) == 2 and not torch.equal(saved["rng"][0]["cpu"], saved["rng"][1]["cpu"])
    assert_identical(*ranks)
    assert_identical({name: saved[name] for name in ranks[0]}, ranks[0])
    assert len(lines_of(folder)) == 3 and all(math.isfinite(line["loss"]) for line in lines_of(folder))
    results = json.loads((folder / "results.json").read_text())
    assert results["last"]["volumes"] == 2 and results["test"]["volumes"] == 1 and (folder / "rectified.png").exists()

    whole, gradients = step_in_float64(CPU)
    (first, first_gradients), (second, second_gradients) = (torch.load(tmp_path / f"step_{rank}.pt") for rank in range(2))
    assert 0.02 < whole["used"] < 0.98 and all(gradient.any() for gradient in gradients)
    for ours, theirs, expected in zip(first_gradients, second_gradients, gradients, strict=True):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-11)
    averages = {name: (first[name] + second[name]) / 2 for name in first}
    assert averages == pytest.approx(whole, rel=1e-6)  # tau and what it is for the log are float32
    assert abs(first["loss"] - second["loss"]) > 1e-3 and abs(first["loss_rectifier"] - second["loss_rectifier"]) > 1e-4


def test_the_benchmark_of_a_step(monkeypatch, capfd):
    status, out, err = programs.run_as_program("common/benchmark.py", monkeypatch, capfd, "rectification", "--crop", "64", "--batch", "2", "--rounds", "1", "--channels", "2")
    assert status == 0 and "without rectifier" in out, err
