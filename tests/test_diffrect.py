"""diffrect.py against other ways to the same numbers: sets of pixels, Bayes' rule, plain loops,
closed forms; and what its runs leave behind."""

import dataclasses
import functools
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image
from torch import nn

import diffrect
from common import medical
from common.evaluate import load_predictor
from common.runtime import parse, read_json
from programs import (assert_identical, assert_same_run, draw_labels, error_of, lines_of, on_ranks,
                      ranks_draw_apart, recorded, run_as_program, seeded, state, stop_at)

IGNORE = 255
INFO = dataclasses.replace(medical.DATASETS["acdc"], adjust=(0.6, 1.4), blur=(0.3, 1.0))


def draw(seed, *shape):
    return torch.randn(*shape, generator=seeded(seed))


def close(ours, expected, rel=1e-5):
    """No element is farther off than this share of the largest one."""
    expected = torch.as_tensor(expected, dtype=ours.dtype)
    torch.testing.assert_close(ours, expected, rtol=0, atol=rel * float(expected.abs().max()))


# ---------------------------------------------------------------- Eq. 4: colours


def squared_distances(colors):
    """Of all pairs, the smallest first."""
    pairs = itertools.combinations(colors, 2)
    return sorted(sum((a - b) ** 2 for a, b in zip(*pair)) for pair in pairs)


@pytest.mark.parametrize("classes", range(1, 9))
def test_no_other_corners_are_farther_apart(classes):
    colors = diffrect.semantic_colors(classes)
    assert colors.dtype == torch.uint8 and colors.shape == (classes, 3)
    assert colors[0].tolist() == [0, 0, 0]
    corners = list(itertools.product((0, 255), repeat=3))
    assert set(map(tuple, colors.tolist())) <= set(corners)
    others = itertools.combinations_with_replacement(corners, classes - 1)
    best = max(squared_distances([(0, 0, 0), *choice]) for choice in others)
    assert squared_distances(colors.tolist()) == best


def test_the_nearest_colour_gives_the_label_back():
    colors, labels = diffrect.semantic_colors(5), draw_labels(0, 3, 7, 9, classes=5, ignored=0.2)
    for given in (labels, labels.byte()):
        painted = 255 * diffrect.color_masks(given, colors).movedim(1, 3).double()
        distance = (painted[..., None, :] - colors).square().sum(dim=-1)  # [3, 7, 9, C]
        assert distance.amin(dim=-1).max() < 1e-6
        assert torch.equal(distance.argmin(dim=-1), torch.where(labels == IGNORE, 0, labels))


# ---------------------------------------------------------------- Eq. 6: calibration guidance


def plain_overlap(first, second, classes):
    """(Dice, Jaccard) of two label maps [H, W] as sets of pixels."""
    places = [place for place in np.ndindex(*first.shape)
              if first[place] != IGNORE and second[place] != IGNORE]
    dices, jaccards = [], []
    for label in range(1, classes):
        a, b = ({place for place in places if map_[place] == label} for map_ in (first, second))
        if a or b:
            dices.append(2 * len(a & b) / (len(a) + len(b)))
            jaccards.append(len(a & b) / len(a | b))
    return (np.mean(dices), np.mean(jaccards)) if dices else (1, 1)


def test_dice_and_jaccard_of_every_slice_are_those_of_sets():
    first, other = (draw_labels(seed, 8, 6, 5, ignored=0.15) for seed in (10, 13))
    second = torch.where(torch.rand(first.shape, generator=seeded(12)) < 0.5, first, other)
    second[second == 1] = 0  # a class in one map only, and in some slices another in neither
    first[4:][first[4:] == 3], second[4:][second[4:] == 3] = 0, 0
    first[5], second[5], first[6] = 0, 0, IGNORE
    expected = [plain_overlap(a, b, 4) for a, b in zip(first.numpy(), second.numpy())]
    for maps in ((first, second), (second, first), (first.byte(), second.byte())):
        dice, jaccard = (diffrect.dice_coefficient(*maps, 4, kind) for kind in (False, True))
        close(dice, [pair[0] for pair in expected])
        close(jaccard, [pair[1] for pair in expected])
    assert dice[5] == dice[6] == 1 and len(set(dice.tolist())) >= 3


def test_guidance_of_every_kind():
    coarse, fine = (draw_labels(seed, 50, 6, 6, ignored=0.1) for seed in (30, 32))
    guidance = {kind: diffrect.calibration_guidance(kind, coarse, fine, 4)
                for kind in diffrect.GUIDANCE}
    assert {tau.shape for tau in guidance.values()} == {(50,)}
    pairs = [plain_overlap(a, b, 4) for a, b in zip(coarse.numpy(), fine.numpy())]
    close(guidance["dice"], [dice for dice, _ in pairs])
    close(guidance["jaccard"], [jaccard for _, jaccard in pairs])
    close(guidance["both"], [sum(pair) for pair in pairs])
    assert (guidance["fixed"] == 0.5).all() and (guidance["none"] == 0).all()
    by_class = []  # of the batch as one map, with background
    for label in range(4):
        a, b = ((map_ == label) & (fine != IGNORE) & (coarse != IGNORE) for map_ in (coarse, fine))
        by_class.append(float(2 * (a & b).sum() / (a.sum() + b.sum())))
    close(guidance["released"], [1 - np.mean(by_class)] * 50)
    random = guidance["random"]
    assert 0 <= random.min() < 0.2 and 0.8 < random.max() <= 1 and len(set(random.tolist())) > 40


# ---------------------------------------------------------------- Eq. 1, 3, 7, 12: diffusion


@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_the_schedule_is_nichols_and_dhariwals(steps):
    f = [math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(steps)]
    expected = [value / f[0] for value in f]
    expected.append(0.001 * expected[-1])  # beta would be 1 and is 0.999
    alpha_bar = diffrect.cosine_alpha_bar(steps)
    assert alpha_bar.dtype == torch.float64
    np.testing.assert_allclose(alpha_bar, expected, rtol=1e-9)


def test_noise_at_once_equals_noise_step_by_step():
    """q(z_t | z_0) is linear in z_0 and noise: its coefficients follow from those of each step."""
    alpha_bar, scale, variance = diffrect.cosine_alpha_bar(10), 1.0, 0.0
    z0, noise = draw(1, 2, 3, 4, 4).double(), draw(2, 2, 3, 4, 4).double()
    for step in range(1, 11):
        alpha = float(alpha_bar[step] / alpha_bar[step - 1])
        scale, variance = math.sqrt(alpha) * scale, alpha * variance + 1 - alpha
        expected = scale * z0 + math.sqrt(variance) * noise
        torch.testing.assert_close(diffrect.add_noise(z0, alpha_bar[step], noise), expected)


PAIRS = [(10, 9), (5, 4), (2, 1), (10, 5), (5, 1)]


@pytest.mark.parametrize("step, following", [*PAIRS, (1, 0), (10, 0)])
def test_without_noise_a_reverse_step_stays_on_the_path(step, following):
    alpha_bar = diffrect.cosine_alpha_bar(10)
    z0, noise = (draw(seed, 2, 3, 4, 4).double() for seed in (50, 51))
    z_t = diffrect.add_noise(z0, alpha_bar[step], noise)
    z = diffrect.reverse_step(z_t, z0, alpha_bar[step], alpha_bar[following])
    expected = diffrect.add_noise(z0, alpha_bar[following], noise)
    close(z, expected, rel=1e-10)


@pytest.mark.parametrize("step, following", PAIRS)
def test_with_full_noise_a_reverse_step_is_the_posterior(step, following):
    """q(z_following | z_step, z_0) by Bayes' rule on a grid."""
    steps = diffrect.cosine_alpha_bar(10)[[step, following]]
    now, then = steps.tolist()
    grid = np.linspace(-8, 8, 200_001)
    for z_t, z0 in ((0.7, 0.4), (-1.3, 0.9)):
        given = torch.tensor([z_t, z0], dtype=torch.float64)
        mean, shifted = (diffrect.reverse_step(*given, *steps, noise).item() for noise in (0, 1))
        log = -((grid - math.sqrt(then) * z0) ** 2) / (2 * (1 - then))
        log -= (z_t - math.sqrt(now / then) * grid) ** 2 / (2 * (1 - now / then))
        density = np.exp(log - log.max())
        density /= density.sum()
        by_bayes = (density * grid).sum()
        assert mean == pytest.approx(by_bayes, abs=1e-6) and shifted > mean
        variance = (density * (grid - by_bayes) ** 2).sum()
        assert (shifted - mean) ** 2 == pytest.approx(variance, rel=1e-5)
        half = diffrect.reverse_step(*given[:, None].half(), *steps, 0).item()
        assert half == pytest.approx(mean, abs=3e-3)  # of what half of z_t rounds away


# ---------------------------------------------------------------- losses


def plain_loss(logits, label, used, count, dice=True):
    """Eq. 14 pixel by pixel and class by class, float64."""
    logits, classes = logits.double(), logits.shape[1]
    loss, both, squares = logits.new_zeros(()), [0.0] * classes, [0.0] * classes
    for b, row, column in used.nonzero().tolist():
        z, own = logits[b, :, row, column], int(label[b, row, column])
        p = z.exp() / z.exp().sum()
        loss = loss - p[own].log() / float(count)
        for k in range(classes):
            both[k] = both[k] + p[k] * (k == own)
            squares[k] = squares[k] + p[k] ** 2 + (k == own)
    dices = [(2 * a + 1e-5) / (b + 1e-5) for a, b in zip(both, squares)]
    return loss + sum(1 - value for value in dices) / classes if dice else loss


@pytest.mark.parametrize("dice", [True, False])
def test_the_loss_of_a_mask_equals_a_plain_loop(dice):
    label = draw_labels(60, 2, 3, 5, ignored=0.2)
    label[label == 1] = 0  # a class that does not occur
    valid = label != IGNORE
    used = valid & (torch.rand(label.shape, generator=seeded(62)) < 0.7)
    logits = (2 * draw(63, 2, 4, 3, 5)).requires_grad_()
    ours = diffrect.mask_loss(logits, label, used, valid, dice)
    expected = plain_loss(logits, label, used, valid.sum(), dice)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    slope, by_loop = (torch.autograd.grad(loss, logits)[0] for loss in (ours, expected))
    close(slope, by_loop, rel=1e-4)
    unused = ~used[:, None].expand_as(slope)
    assert unused.any() and not slope[unused].any() and slope[~unused].all()
    nothing = torch.zeros_like(used)
    none = diffrect.mask_loss(logits, torch.full_like(label, IGNORE), nothing, nothing, dice)
    assert none == 0 and not torch.autograd.grad(none, logits)[0].any()


def test_pseudo_labels_of_paper_and_release():
    logits, inside = 3 * draw(80, 2, 4, 5, 6), draw_labels(81, 2, 5, 6, classes=3) > 0
    label, used = diffrect.pseudo_labels(logits, inside, 0.8)
    gated, learned = diffrect.pseudo_labels(logits, inside, 0.8, released=True)
    assert torch.equal(learned, inside)
    kinds = set()
    for b, row, column in np.ndindex(2, 5, 6):
        place, p = (b, row, column), logits[b, :, row, column].double().exp()
        p, within = (p / p.sum()).tolist(), bool(inside[b, row, column])
        likeliest = p.index(max(p)) if within else 0
        assert label[place] == likeliest and used[place] == (within and max(p) >= 0.8)
        passes = (max(p) - min(p)) / max(p) > 0.8
        assert gated[place] == (likeliest if passes else 0)
        kinds.add((within, max(p) >= 0.8, passes))
    assert {(True, True, True), (True, False, True), (True, False, False)} <= kinds


def test_the_complementary_loss_is_that_of_the_release():
    """By torch.distributions' entropy of a class over pixels, and cross entropy of 1 - p."""
    label, weak = draw_labels(90, 3, 6, 7), 2 * draw(91, 3, 4, 6, 7)
    strong, every = (2 * draw(92, 3, 4, 6, 7)).requires_grad_(), torch.ones_like(label) > 0
    some = every & (draw_labels(93, 3, 6, 7) > 0)
    assert torch.equal(diffrect.fixmatch_loss(strong, weak, label, some, every),
                       diffrect.mask_loss(strong, label, some, every, dice=False))
    ours = diffrect.fixmatch_loss(strong, weak, label, every, every, released=True)
    probs = strong.double().softmax(dim=1)
    entropy = torch.distributions.Categorical(probs=probs.flatten(2)).entropy()
    weight = 1 - (entropy / math.log(42)).mean()
    least = nn.functional.cross_entropy(1 - probs, weak.argmin(dim=1))
    expected = plain_loss(strong, label, every, every.sum()) + weight**2 * least
    assert 0.01 < weight and ours.item() == pytest.approx(expected.item(), rel=1e-5)
    slope, by_hand = (torch.autograd.grad(loss, strong)[0] for loss in (ours, expected))
    close(slope, by_hand, rel=1e-4)


# ---------------------------------------------------------------- networks


def make_rectifier(seed=0, **options):
    """With running statistics as after some training."""
    torch.manual_seed(seed)
    rectifier = diffrect.Rectifier(diffrect.semantic_colors(4), 2, **options)
    for part in rectifier.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -0.3, 0.3)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    return rectifier


def draw_pairs(seed, size=2, crop=64):
    """(coarse, fine, slices, tau) for a rectifier."""
    coarse, fine = (draw_labels(seed + number, size, crop, crop) for number in (0, 2))
    slices = torch.rand(size, 1, crop, crop, generator=seeded(seed + 4))
    return coarse, fine, slices, torch.rand(size, generator=seeded(seed + 5))


def test_networks_have_the_released_sizes():
    with torch.device("meta"):
        networks = diffrect.UNet(4, 16), diffrect.Rectifier(torch.empty(4, 3), 16)
    sizes = [sum(parameter.numel() for parameter in part.parameters()) for part in networks]
    shares = [part.p for part in networks[0].modules() if isinstance(part, nn.Dropout)]
    assert shares == [0.05, 0.1, 0.2, 0.3, 0.5, 0, 0, 0, 0]
    assert [round(size / 1e6, 2) for size in sizes] == [1.81, 17.47]


def plain_block(block, x, embedding=None):
    x = block.first(x)
    if embedding is not None:
        silu = embedding / (1 + (-embedding).exp())
        x = x + (silu @ block.shift.weight.T + block.shift.bias)[:, :, None, None]
    return block.second(x)


def plain_up(up, x, skip, embedding=None):
    x = torch.einsum("oi,bihw->bohw", up.narrow.weight[:, :, 0, 0], x)
    x = x + up.narrow.bias.view(-1, 1, 1)
    rows, columns = (
        (1 - abs(torch.linspace(0, size - 1, 2 * size)[:, None] - torch.arange(size))).clamp(min=0)
        for size in x.shape[2:])  # bilinear, corner to corner
    x = torch.einsum("Hh,bchw,Ww->bcHW", rows, x, columns)
    return plain_block(up.block, torch.cat([skip, x], dim=1), embedding)


def test_unet_and_denoiser_equal_their_formulas():
    rectifier = make_rectifier().eval().requires_grad_(False)
    slices, embedding = draw(94, 2, 4, 64, 128), draw(95, 2, 64)
    encoder, denoiser, decoder = rectifier.mask_encoder, rectifier.denoiser, rectifier.decoder
    added, pool, features = draw(96, 5), nn.MaxPool2d(2), []
    for level, block in enumerate(encoder.blocks):
        x = pool(features[-1]) if level else slices
        features.append(plain_block(block, x, embedding) + added[level])
    for ours, expected in zip(encoder(slices, embedding, added), features, strict=True):
        close(ours, expected, rel=1e-4)

    *skips, z = features
    z, condition, step = z / 2, z / 2 + 1, torch.tensor([3, 7])
    angles = step[:, None] / 10_000 ** (torch.arange(8) / 7)
    time = denoiser.time[2](denoiser.time[1](denoiser.time[0](
        torch.cat([angles.sin(), angles.cos()], dim=1))))
    first = plain_block(denoiser.down1, pool(z + condition), time)
    x = plain_up(denoiser.up1, plain_block(denoiser.down2, pool(first), time), first, time)
    z, expected = denoiser(z, condition, step), plain_up(denoiser.up2, x, z + condition, time)
    close(z, expected, rel=1e-4)
    x = z
    for up, skip in zip(decoder.ups, skips[::-1], strict=True):
        x = plain_up(up, x, skip, embedding)
    close(decoder([*skips, z], embedding), decoder.classifier(x), rel=1e-4)


def test_the_rectifier_learns_to_recover_the_latent_of_the_fine_mask():
    """Eq. 7, 9, 11: what the denoiser is given, and what its output is compared with."""
    rectifier = make_rectifier().eval()
    coarse, fine, slices, tau = draw_pairs(100, size=32)
    calls = []
    rectifier.denoiser.register_forward_hook(lambda module, given, out: calls.append((*given, out)))
    with torch.no_grad():
        torch.manual_seed(1)
        _, latent_loss = rectifier(coarse, fine, slices, tau)
        guidance = rectifier.guidance(1000 * tau)
        slice_features = rectifier.slice_encoder(slices, guidance)
        embed = functools.partial(rectifier.embed, slices=slices, guidance=guidance,
                                  slice_features=slice_features)
        condition, clean = embed(coarse)[-1], embed(fine)[-1]
    (z_t, given, step, recovered), = calls
    close(given, condition, rel=1e-4)
    with torch.no_grad():  # the slice itself is looked at
        assert not torch.equal(embed(coarse, slices=0 * slices)[-1], condition)
    close(latent_loss, (recovered - clean).square().mean(dim=(1, 2, 3)), rel=1e-4)
    assert set(step.tolist()) <= set(range(1, 11)) and len(set(step.tolist())) > 6
    alpha_bar = diffrect.cosine_alpha_bar(10).float()[step][:, None, None, None]
    noise = (z_t - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()
    assert abs(noise.mean()) < 0.03 and abs(noise.var() - 1) < 0.05
    assert abs((noise * clean).mean() / clean.std()) < 0.03


def test_the_coarse_mask_learns_and_the_fine_one_does_not(monkeypatch):
    rectifier = make_rectifier()
    coarse, fine, slices, tau = draw_pairs(110)
    painted = []

    def note(labels, colors, paint=diffrect.color_masks):
        painted.append(paint(labels, colors).requires_grad_())
        return painted[-1]

    monkeypatch.setattr(diffrect, "color_masks", note)
    for value in rectifier(coarse, fine, slices, tau):
        slopes = torch.autograd.grad(value.sum(), painted, retain_graph=True, allow_unused=True)
        assert slopes[0].any() and slopes[1] is None


@pytest.mark.parametrize("released, steps", [(False, [*range(10, 0, -1)]), (True, [10, 1])])
def test_with_a_perfect_denoiser_the_latent_of_the_truth_is_decoded(released, steps, monkeypatch):
    rectifier, (coarse, _, slices, tau) = make_rectifier().eval(), draw_pairs(131)
    z0, decoded, calls = draw(130, 2, 32, 4, 4), [], []
    rectifier.denoiser.forward = lambda z_t, condition, step: calls.append((z_t, step)) or z0
    rectifier.decoder.register_forward_pre_hook(lambda module, given: decoded.append(given[0][-1]))
    rectifier.rectify(coarse, slices, tau, released)
    z0 = z0.clamp(-1, 1) if released else z0
    close(decoded[0], z0, rel=1e-4)
    assert [step.tolist() for _, step in calls] == [[step, step] for step in steps]
    alpha_bar = diffrect.cosine_alpha_bar(10)
    noises = [(z_t - alpha_bar[step].sqrt() * z0) / (1 - alpha_bar[step]).sqrt()
              for step, (z_t, _) in zip(steps, calls)]
    for noise in noises:
        assert abs(noise.var() - 1) < 0.2
        same = torch.allclose(noise, noises[0], atol=1e-3)
        assert same is (released or noise is noises[0])


@pytest.mark.parametrize("diffusion_steps", [10, 0])
def test_the_rectifier_rectifies_with_batch_statistics_and_without_dropout(diffusion_steps):
    """In training a slice's logits depend on the others; the same draws give the same logits."""
    coarse, _, slices, tau = draw_pairs(140, size=3)
    coarse[1:], slices[1:], tau[1:] = coarse[:1], slices[:1], tau[:1]  # three times one slice
    darker = torch.cat([slices[:2], slices[2:] / 2])

    def rectify(rectifier, slices):
        torch.manual_seed(0)
        return rectifier.rectify(coarse, slices, tau)

    for training, batch_statistics in itertools.product((True, False), repeat=2):
        rectifier = make_rectifier(diffusion_steps=diffusion_steps,
                                   batch_statistics=batch_statistics).train(training)
        before = {name: value.clone() for name, value in rectifier.named_parameters()}
        logits, others = (rectify(rectifier, images)[:2] for images in (slices, darker))
        assert torch.allclose(logits, others, atol=1e-4) is not (training and batch_statistics)
        assert torch.equal(rectify(rectifier, slices)[:2], logits)
        assert diffusion_steps or torch.allclose(logits[0], logits[1], atol=1e-4)
        assert_identical(dict(rectifier.named_parameters()), before)
        assert {part.training for part in rectifier.modules()} == {training}
        rectifier.decoder.eval()  # frozen: stays so
        rectify(rectifier, slices)
        assert rectifier.training is training and not rectifier.decoder.ups[0].training
    if not diffusion_steps:  # LCC alone: what the decoder makes of the mask's own latent
        with torch.no_grad():
            close(rectifier(coarse, coarse, slices, tau)[0][:2], logits)


def test_strong_views_are_torchvisions():
    slices = torch.rand(1, 1, 24, 20, generator=seeded(150))
    fixed = dataclasses.replace(INFO, adjust=(1.3, 1.3), blur=(0.8, 0.8))
    adjustments = tv.adjust_contrast, tv.adjust_sharpness, tv.adjust_brightness
    expected = []
    for chosen in itertools.product((False, True), repeat=4):
        view = slices
        for adjust, which in zip(adjustments, chosen):
            view = adjust(view, 1.3) if which else view
        expected.append(tv.gaussian_blur(view, [17, 17], [0.8, 0.8]) if chosen[3] else view)
    torch.manual_seed(0)
    strong = diffrect.strong_view(slices.repeat(400, 1, 1, 1), fixed)
    distance = torch.cdist(strong.flatten(1), torch.cat(expected).flatten(1), p=float("inf"))
    assert distance.amin(dim=1).max() < 3e-3  # torchvision's sharpness rounds
    counts = distance.argmin(dim=1).bincount(minlength=16)
    assert counts.min() >= 8 and counts.max() <= 50  # 25 of each are expected


def test_a_step_reads_nothing_back_from_the_device():
    rectifier = make_rectifier().to("meta")
    coarse, fine, slices, tau = (part.to("meta") for part in draw_pairs(150, size=4))
    tau = diffrect.calibration_guidance("dice", coarse, fine, 4)
    logits, latent = rectifier(coarse, fine, diffrect.strong_view(slices, INFO), tau)
    label, used = fine[:2], fine[:2] > 0
    (diffrect.mask_loss(logits[:2], label, used, used) + latent.mean()).backward(retain_graph=True)
    for released in (False, True):
        masks, used = diffrect.pseudo_labels(logits, fine > 0, 0.8, released)
        diffrect.fixmatch_loss(logits, logits, masks, used, used, released).backward(
            retain_graph=True)
        assert rectifier.rectify(masks, slices, tau, released).device.type == "meta"


# ---------------------------------------------------------------- runs


SHORT = ["--dataset", "acdc", "--labeled", "2", "--crop", "64", "--channels", "2",
         "--batch-size", "2", "--num-workers", "0", "--device", "cpu", "--threshold", "0.3",
         "--log-every", "1"]
LONGER = [*SHORT, "--iterations", "5", "--warmup", "2", "--rampup", "4", "--eval-every", "3",
          "--consistency", "0.5", "--rectify-weight", "0.7", "--lr", "0.01"]


@pytest.fixture(scope="module")
def hearts(tmp_path_factory) -> Path:
    """A small ACDC in the form that training reads: eight patients, three slices of rings each."""
    root = tmp_path_factory.mktemp("data") / "acdc"
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:40, :48]
    (root / "lists").mkdir(parents=True)
    (root / "volumes").mkdir()
    names = [f"p{number}" for number in range(8)]
    for name in names:
        label = np.zeros((3, 40, 48), np.uint8)
        for plane in label:
            radius = np.hypot(rows - rng.integers(16, 24), columns - rng.integers(18, 30))
            for value, outer in ((1, 15), (2, 10), (3, 6)):
                plane[radius < outer] = value
        image = 100.0 * label + rng.normal(0, 30, label.shape)
        np.savez(root / "volumes" / f"{name}.npz", image=image.astype(np.float32), label=label,
                 spacing=(10.0, 1.5, 1.5))
    for split, part in (("train", names[:5]), ("val", names[5:7]), ("test", names[7:])):
        (root / "lists" / f"{split}.txt").write_text("".join(f"{name} {name}\n" for name in part))
    return root


def configured(*arguments) -> diffrect.Config:
    return parse(diffrect.Config, argv=[str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(hearts, tmp_path_factory) -> Path:
    """A finished run, never interrupted."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    diffrect.train(configured(*LONGER, "--data-root", hearts, "--output", folder))
    return folder


def columns_of(picture: Path) -> int:
    """Of a grid with two rows."""
    width, height = Image.open(picture).size
    return round(2 * width / height)


def test_a_run_leaves_its_folder(trained):
    assert {path.name for path in trained.iterdir()} == {
        ".lock", "config.json", "metrics.jsonl", "results.json", "latest.pt", "best.pt",
        "samples.png"}
    results = read_json(trained / "results.json")
    assert results["method"] == "diffrect" and results["last"]["iteration"] == 5
    assert results["last"]["volumes"] == 2 and set(results["test"]["scores"]) == {"p7"}
    assert columns_of(trained / "samples.png") == 4


def test_each_line_of_the_log_adds_up(trained):
    lines = lines_of(trained)
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5]
    for k, line in enumerate(lines):
        weight = 0.5 * math.exp(-5 * (1 - min(k, 4) / 4) ** 2)
        segmentation = line["loss_sup"] + weight * line["loss_unsup"]
        segmentation += 0.7 * line.get("loss_rectified", 0)
        rectification = line["loss_decoded"] + line["loss_latent_l"] + line["loss_latent_u"]
        rectification += weight * line["loss_decoded_u"]
        assert line["loss"] == pytest.approx(segmentation, abs=1e-5)
        assert line["loss_diff"] == pytest.approx(rectification, abs=1e-5)
        assert ("loss_rectified" in line) is (k >= 2) and line["loss_latent_l"] > 0
        assert 0 < line["used"] <= 1 and 0 <= line["tau_u"] <= 1 and 0 <= line["tau_l"] < 1
        assert "pseudo_dice" not in line  # truth of unlabeled slices is not read here


def test_the_checkpoint_is_scored_as_in_training(trained, hearts):
    cpu = torch.device("cpu")
    files = medical.load_volumes(medical.VolumeOptions("acdc", str(hearts), "2")).val
    results = read_json(trained / "results.json")
    for name, noted in (("latest.pt", results["last"]), ("best.pt", results["best"])):
        network, config, info = load_predictor(trained / name, cpu)
        scores = medical.evaluate_volumes(network, files, info, config["crop"], cpu)
        assert {name: noted[name] for name in scores} == json.loads(json.dumps(scores))


def test_a_stopped_program_ends_with_identical_bits(trained, hearts, tmp_path, monkeypatch, capfd):
    command = (*LONGER, "--data-root", hearts, "--output", tmp_path)
    program = functools.partial(run_as_program, "diffrect.py", monkeypatch, capfd, *command)
    stop_at(4, tmp_path, program)
    saved = state(tmp_path)
    group, = saved["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(0.01 * (1 - 4 / 5) ** 0.9)
    assert (group["momentum"], group["weight_decay"]) == (0.9, 1e-4)
    learned = [name for part in ("model", "rectifier") for name in saved[part] if "run" not in name]
    assert len(saved["optimizer"]["state"]) == sum("num" not in name for name in learned)
    assert program()[0] == 0
    assert_same_run(tmp_path, trained)


RUNS = {
    "supervised": ["--model", "supervised", "--strong-labeled", "--labeled", "all"],
    "fixmatch": ["--model", "fixmatch", "--no-dropout"],
    "fixmatch released": ["--model", "fixmatch", "--rules", "released"],
    "lcc": ["--model", "lcc", "--no-colors", "--guidance", "none"],
    "no s2w": ["--no-s2w", "--guidance", "random", "--no-batch-statistics"],
    "no w2g": ["--no-w2g", "--guidance", "fixed", "--amp"],
    "released": ["--rules", "released", "--rampup", "5"],
}


@pytest.mark.parametrize("name", RUNS)
def test_variants_train(name, hearts, tmp_path, monkeypatch):
    views, shown, rectified, built, seeds = (recorded(monkeypatch, *of) for of in (
        (diffrect, "strong_view"), (diffrect.UNet, "forward"),
        (diffrect.Rectifier, "rectify"), (diffrect, "Rectifier"), (torch, "manual_seed")))
    draws = recorded(monkeypatch, np.random, "default_rng")
    diffrect.train(configured(*SHORT, "--iterations", "2", "--warmup", "1", "--data-root", hearts,
                              "--output", tmp_path, "--seed", "3", *RUNS[name]))
    assert seeds[:2] == [(3,), (3,)] and {seed for ((seed, *_),) in draws} == {3}
    lines, rectifies = lines_of(tmp_path), not name.startswith(("supervised", "fixmatch"))
    (weak, _), (model, first) = views[0], shown[0]
    rates = {part.p for part in model.modules() if isinstance(part, nn.Dropout)}
    assert (rates == {0}) is ("--no-dropout" in RUNS[name])
    assert (first is weak) is ("--strong-labeled" not in RUNS[name])
    for colors, _, steps, batch_statistics in built:
        assert torch.equal(colors, colors[:, :1].expand(4, 3)) is ("--no-colors" in RUNS[name])
        assert batch_statistics is ("--no-batch-statistics" not in RUNS[name])
        assert steps == (0 if name == "lcc" else 10)
    assert len(built) == rectifies
    assert name != "released" or len(rectified[0][3].unique()) == 1  # tau of labeled slices for all
    logged = {key for key in lines[1] if key.startswith("loss_")}
    expected = {"loss_sup"} | ({"loss_unsup"} if name != "supervised" else set())
    if rectifies:
        expected |= {"loss_rectified", "loss_diff", "loss_decoded", "loss_latent_l"}
        expected |= {"loss_decoded_u", "loss_latent_u"} if name != "no s2w" else set()
        assert ["loss_rectified" in line for line in lines] == [False, True]
        assert all((line["loss_latent_l"] > 0) is (name != "lcc") for line in lines)
    assert logged == expected and all(0 <= lines[1][key] < 100 for key in logged)
    assert columns_of(tmp_path / "samples.png") == 3 + rectifies
    tau = {"lcc": 0, "no w2g": 0.5}.get(name)
    assert tau is None or all(line["tau_u"] == line["tau_l"] == tau for line in lines)
    if "released" in name:
        assert all(line["used"] == 1 for line in lines)
    for k, line in enumerate(lines if name == "released" else ()):  # lambda_1 rises, Eq. 13
        weight = 0.1 * math.exp(-5 * (1 - k / 5) ** 2)
        unlabeled = weight * (line["loss_decoded_u"] + line["loss_latent_u"])
        expected = line["loss_decoded"] + line["loss_latent_l"] + unlabeled
        assert line["loss_diff"] == pytest.approx(expected, abs=1e-5)
        assert 1e-3 < unlabeled and line["loss_latent_u"] > 0 or k == 0


WEAK, STRONG, RECTIFIED, GREY = 1, 2, 3, 0.25


@pytest.mark.parametrize("options", [[], ["--no-w2g"]])
def test_who_goes_where(options, hearts, tmp_path, monkeypatch):
    """Label maps that say whose they are, strong views that are grey: what each part is shown."""
    made, shown = iter([WEAK, STRONG, RECTIFIED]), []

    def marked(logits, inside, *rest):
        shown.append(logits)
        return torch.full(inside.shape, next(made)), inside

    monkeypatch.setattr(diffrect, "pseudo_labels", marked)
    monkeypatch.setattr(diffrect, "strong_view", lambda slices, info: slices * 0 + GREY)
    learned, transports, rectified = (recorded(monkeypatch, *of) for of in (
        (diffrect, "mask_loss"), (diffrect.Rectifier, "forward"), (diffrect.Rectifier, "rectify")))
    cleared = recorded(monkeypatch, torch.optim.Optimizer, "zero_grad")
    diffrect.train(configured(*SHORT, "--iterations", "1", "--warmup", "0", "--data-root", hearts,
                              "--output", tmp_path, *options))
    truth = learned[0][1]
    assert [to_none for _, to_none in cleared] == [True, True]  # so the other network rests
    assert len(truth.unique()) > 2 and len(truth) == 2
    for (_, label, *_), expected in zip(learned, (truth, WEAK, truth, WEAK, RECTIFIED)):
        assert (label == expected).all()
    of_weak, of_strong, decoded, decoded_u, of_rectified = (given[0] for given in learned)
    for labeled, unlabeled in ((of_weak, of_rectified), (decoded, decoded_u)):  # of one output
        assert labeled._base is unlabeled._base is not of_strong._base
        assert torch.equal(labeled._base, torch.cat([labeled, unlabeled]))
    assert all(torch.equal(part, part._base[2:]) for part in (of_strong, shown[-1]))
    assert [given[4:] for given in learned] == [(), (False,), (), (False,), ()]  # Dice but of those
    _, coarse, fine, slices, tau = transports[0]
    assert (coarse[2:] == STRONG).all() and (fine[2:] == WEAK).all() and (slices[2:] == GREY).all()
    assert (tau[2:] == 0).all()  # Dice of a map of ones and a map of twos
    if options:
        assert (coarse == STRONG).all() and (fine == WEAK).all() and (slices == GREY).all()
    else:
        assert (coarse[:2] == WEAK).all() and torch.equal(fine[:2], truth)
        assert slices[:2].std() > 0.1 and (tau[:2] > 0).all()
    _, labels, slices, guidance, _ = rectified[0]
    assert (labels == WEAK).all() and slices.std() > 0.1 and torch.equal(guidance, tau)


@pytest.mark.parametrize("options, named", [
    (["--no-s2w", "--no-w2g"], "--model lcc"),
    (["--model", "fixmatch", "--no-s2w"], "--model diffrect"),
    (["--strong-labeled"], "--strong-labeled"),
    (["--eval-split", "tune"], "there is no tune list"),
    (["--checkpoint-activations"], "--checkpoint-activations")])
def test_options_that_do_not_go_together_are_refused(options, named, hearts, tmp_path):
    folder = tmp_path / "run"
    config = configured(*SHORT, "--data-root", hearts, "--output", folder, *options)
    assert named in error_of(diffrect.train, config) and not folder.exists()


def test_what_is_left_to_the_recipes(hearts):
    data = medical.load_volumes(medical.VolumeOptions("acdc", str(hearts), "2"))
    config = diffrect.complete(configured("--batch-size", "6"), data, torch.device("cpu"))
    assert (config.lr, config.iterations) == (0.02, 30_000)
    assert "a multiple of 64, not 96" in error_of(configured, "--crop", "96")
    assert (config.consistency, config.rectify_weight) == (0.1, 1)
    assert (config.rampup, config.warmup, config.threshold) == (30_000, 1000, 0.8)
    assert config.guidance == "dice" and config.batch_statistics and data.info.adjust == (1, 1.1)
    data = dataclasses.replace(data, info=medical.DATASETS["phantom"])
    options = configured("--iterations", "100", "--lr", "0.5")
    config = diffrect.complete(options, data, torch.device("cpu"))
    assert (config.lr, config.channels) == (0.5, 8)
    assert (config.consistency, config.rectify_weight) == (1, 0.3)
    assert (config.rampup, config.warmup) == (360, 360) and options.rampup is None
    assert diffrect.ramp(0, 0) == diffrect.ramp(7, 5) == 1 > 0.007 > diffrect.ramp(0, 5)


def test_two_ranks_have_the_loss_of_one_process(tmp_path):
    """DDP takes the mean of their gradients."""
    label, logits = draw_labels(300, 4, 3, 5, ignored=0.3), draw(302, 4, 4, 3, 5)
    used = (label != IGNORE) & (draw_labels(304, 4, 3, 5) > 0)

    def step(rank, ranks):
        own, *others = (part.chunk(ranks)[rank] for part in (logits, label, used, label != IGNORE))
        own = own.clone().requires_grad_()
        loss = diffrect.mask_loss(own, *others)
        return loss.detach(), torch.autograd.grad(loss, own)[0]

    losses, gradients = zip(*on_ranks(lambda rank: step(rank, 2), tmp_path))
    loss, gradient = step(0, 1)
    close(sum(losses) / 2, loss)
    close(torch.cat(gradients) / 2, gradient, rel=1e-4)


def test_two_ranks_train(hearts, tmp_path):
    config = configured(*LONGER, "--iterations", "3", "--data-root", hearts, "--output", tmp_path)
    on_ranks(lambda rank: diffrect.train(config), tmp_path)
    saved = state(tmp_path)
    assert saved["iteration"] == 3 and ranks_draw_apart(tmp_path)
    assert all(math.isfinite(line["loss"]) for line in lines_of(tmp_path))
    results = read_json(tmp_path / "results.json")
    assert results["last"]["volumes"] == 2 and (tmp_path / "samples.png").exists()
