"""diffmatch.py against other ways to the same numbers: closed forms in numpy, plain loops, Monte Carlo, finite differences."""

import dataclasses
import functools
import json
import math
import os
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import daw
import diffmatch
from common import augment, evaluate, predict, runtime, synthetic
from common.files import FORMAT
import programs
from programs import ROOT, assert_identical, kill_after_first_checkpoint, state, succeed

IGNORE = 255
BLUR = (0.1, 1.0)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- Eq. 3: the schedule and the noise


def log_snr(t):
    n = np.cos((np.asarray(t, np.float64) + 0.0002) / 1.00025 * np.pi / 2) ** 2
    return np.log(n / (1 - n))


def level_of(t):
    """alpha_bar through the log-SNR."""
    return 1 / (1 + np.exp(-log_snr(t)))


def printed_alpha(t):
    """The paper's pseudo-code as it is printed."""
    t = torch.as_tensor(t, dtype=torch.float64)
    n = torch.cos((t + 0.0002) / 1.00025 * math.pi / 2) ** -2
    return -torch.log(n - 1)


def is_schedule(function):
    values = function(torch.linspace(0, 1, 2001)).numpy()
    return (values > 0).all() and (values < 1).all() and (np.diff(values) < 0).all() and np.isfinite(np.sqrt(values) + np.sqrt(1 - values)).all()


def test_alpha_bar_is_a_schedule_and_has_its_closed_form():
    t = np.linspace(0, 1, 1001)
    ours = diffmatch.alpha_bar(torch.from_numpy(t))
    assert ours.dtype == torch.float64 and is_schedule(diffmatch.alpha_bar)
    np.testing.assert_allclose(ours, level_of(t), rtol=1e-6)
    np.testing.assert_allclose(ours, np.cos((t + 0.0002) / 1.00025 * np.pi / 2) ** 2, rtol=1e-12)
    assert ours[0] > 0.999999 and ours[-1] < 1e-6 and ours[500] == pytest.approx(0.5, abs=1e-3)
    for value in (0.0, 0.25, 1.0):
        assert diffmatch.alpha_bar(value).dim() == 0 and diffmatch.alpha_bar(value).item() == pytest.approx(level_of(value), rel=1e-6)
    assert diffmatch.alpha_bar(torch.rand(2, 3, dtype=torch.float32)).shape == (2, 3)


def test_the_printed_alpha_is_the_log_snr_and_no_schedule():
    np.testing.assert_allclose(printed_alpha(torch.linspace(0.01, 0.99, 99)), log_snr(torch.linspace(0.01, 0.99, 99).numpy()), rtol=1e-9, atol=1e-12)
    assert printed_alpha(0.1) > 1 and printed_alpha(0.9).sqrt().isnan() and not is_schedule(printed_alpha)


def test_add_noise_has_the_mean_and_variance_of_eq_3():
    t = torch.tensor([0.0, 0.1, 0.35, 0.6, 0.9, 1.0])
    y0 = torch.randn(6, 2, 1, 1, generator=seeded(0)).expand(-1, -1, 150, 150).contiguous()
    y_t = diffmatch.add_noise(y0, t, torch.randn(y0.shape, generator=seeded(1)))
    levels = level_of(t.double().numpy())
    for image, level in enumerate(levels):
        for channel in range(2):
            drawn, count = y_t[image, channel].double(), 150 * 150
            deviation = math.sqrt(1 - level)
            mean, error = math.sqrt(level) * y0[image, channel, 0, 0].item(), 4 * deviation / math.sqrt(count)
            assert drawn.mean().item() == pytest.approx(mean, abs=error + 1e-6)
            assert drawn.var().item() == pytest.approx(1 - level, rel=4 * math.sqrt(2 / count), abs=1e-8)


def test_add_noise_at_fixed_noise_equals_numpy():
    y0, noise = torch.randn(2, 3, 4, 5, 6, generator=seeded(2)).unbind()
    t = torch.tensor([0.05, 0.5, 0.98])
    levels = level_of(t.double().numpy()).reshape(3, 1, 1, 1)
    expected = np.sqrt(levels) * y0.numpy().astype(np.float64) + np.sqrt(1 - levels) * noise.numpy().astype(np.float64)
    y_t = diffmatch.add_noise(y0, t, noise)
    assert y_t.dtype == torch.float32
    np.testing.assert_allclose(y_t, expected, rtol=0, atol=2e-6)
    for image in range(3):
        torch.testing.assert_close(diffmatch.add_noise(y0, t[image].item(), noise)[image], y_t[image], rtol=0, atol=1e-6)


# ---------------------------------------------------------------- Algorithm 3: a step


def stays_on_the_path(step):
    """With the true y_0, a step from a point of Eq. 3 leads to the point of the same noise."""
    y0, noise = torch.randn(2, 4, 3, 5, 7, generator=seeded(3)).unbind()
    return all(torch.allclose(step(diffmatch.add_noise(y0, t_now, noise), y0, t_now, t_next), diffmatch.add_noise(y0, t_next, noise),
                              rtol=0, atol=1e-5) for t_now, t_next in ((1, 0.8), (0.9, 0.1), (0.5, 0.45), (0.3, 0.29)))


def slip(kind):
    """The printed line: the old noise level with the new mask's, or the predicted noise in place of the mask."""
    def step(y_t, y0, t_now, t_next):
        now, then = (torch.tensor(level_of(t)).float() for t in (t_now, t_next))
        noise = (y_t - now.sqrt() * y0) / (1 - now).sqrt()
        return then.sqrt() * (noise if kind == "mask" else y0) + (1 - (now if kind == "level" else then)).sqrt() * noise
    return step


def test_ddim_step_stays_on_the_path_and_the_printed_slips_do_not():
    assert stays_on_the_path(diffmatch.ddim_step) and stays_on_the_path(slip(None))
    assert not stays_on_the_path(slip("level")) and not stays_on_the_path(slip("mask"))


def test_ddim_step_ends_at_y0():
    y_t, y0 = torch.randn(2, 3, 2, 4, 5, generator=seeded(4)).unbind()
    assert torch.equal(diffmatch.ddim_step(y_t, y0, 0.7, 0), y0) and torch.equal(diffmatch.ddim_step(y_t, y0, 0.7, 0.0), y0)
    assert not torch.allclose(diffmatch.ddim_step(y_t, y0, 0.75, 0.25), y0, atol=0.1)


# ---------------------------------------------------------------- Algorithm 3: sampling


class Oracle:
    """Knows the truth [B, h, w] whatever it is shown, and writes down what that was."""

    def __init__(self, truth, classes=4):
        self.truth, self.classes, self.shown = truth, classes, []
        self.codes = torch.randn(classes, 3, generator=seeded(5)) / 10

    def encode(self, label):
        return self.codes[label].permute(0, 3, 1, 2)

    def denoise(self, z, y_t, t):
        self.shown.append((y_t, t))
        return 5 * F.one_hot(self.truth, self.classes).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_sampling_with_an_oracle_returns_the_truth_at_every_step(steps):
    truth = torch.randint(4, (2, 5, 6), generator=seeded(6))
    for images in (1, 2):
        oracle, noise = Oracle(truth), torch.randn(images, 3, 5, 6, generator=seeded(7))
        predictions = diffmatch.sample(oracle, torch.zeros(2, 8, 5, 6), steps, noise)
        assert len(predictions) == len(oracle.shown) == steps
        assert all(torch.equal(logits.argmax(dim=1), truth) for logits in predictions)
        for number, (y_t, t) in enumerate(oracle.shown):
            assert y_t.shape == (2, 3, 5, 6) and t.shape == (2,) and t.tolist() == pytest.approx([1 - number / steps] * 2)
        assert torch.equal(oracle.shown[0][0], noise.expand(2, -1, -1, -1))
        if steps > 1:
            assert torch.equal(oracle.shown[-1][0], oracle.encode(truth))


class Threshold:
    """Two classes and one mask channel: class 1 where y_t is over a value that depends on time and place."""

    def __init__(self):
        self.shown = []

    def encode(self, label):
        return 0.8 * (2 * label[:, None].float() - 1)

    def denoise(self, z, y_t, t):
        self.shown.append(y_t)
        over = y_t > 0.9 * torch.cos(7 * t).view(-1, 1, 1, 1) + z[:, :1]
        return torch.cat([~over, over], dim=1).float()


@pytest.mark.parametrize("time_difference", [0, 1, 2])
@pytest.mark.parametrize("steps", [2, 3, 5])
def test_sampling_equals_a_simulation_of_single_pixels(steps, time_difference):
    z, noise = 0.5 * torch.randn(2, 1, 6, 7, generator=seeded(8)), torch.randn(2, 1, 6, 7, generator=seeded(9))
    model = Threshold()
    predictions = diffmatch.sample(model, z, steps, noise, time_difference)
    changes = 0
    for place in np.ndindex(2, 1, 6, 7):
        y, threshold = noise[place].item(), z[place].item()
        classes = []
        for k in range(steps):
            t_now = 1 - k / steps
            t_next = max(1 - (k + 1 + time_difference) / steps, 0)
            assert model.shown[k][place].item() == pytest.approx(y, abs=1e-4)
            classes.append(int(y > 0.9 * math.cos(7 * t_now) + threshold))
            assert predictions[k].argmax(dim=1)[place[0], place[2], place[3]] == classes[-1]
            mask = 0.8 if classes[-1] else -0.8
            residue = (y - math.sqrt(level_of(t_now)) * mask) / math.sqrt(1 - level_of(t_now))
            y = mask if t_next == 0 else math.sqrt(level_of(t_next)) * mask + math.sqrt(1 - level_of(t_next)) * residue
        changes += len(set(classes)) > 1
    assert changes > 5


def test_without_a_mask_sampling_is_one_pass_at_time_zero():
    oracle = Oracle(torch.zeros(2, 4, 4, dtype=torch.long))
    assert len(diffmatch.sample(oracle, torch.zeros(2, 8, 4, 4), 3, torch.zeros(1, 0, 4, 4))) == 1
    ((y_t, t),) = oracle.shown
    assert y_t is None and t.tolist() == [0, 0]


# ---------------------------------------------------------------- Eq. 9: the debiased adjustment


def softmax(values):
    values = np.exp(values - values.max())
    return values / values.sum()


def plain_penalty(logits, prior, t, tau):
    """One pixel in float64."""
    probs, prior = softmax(np.asarray(logits, np.float64)), np.asarray(prior, np.float64)
    debiased = probs / (len(prior) * prior)
    return tau * t * ((probs - debiased / debiased.sum()) ** 2).sum()


def draw_logits_and_prior(seed, classes=5, shape=(3, 4, 5)):
    batch, height, width = shape
    logits = 2 * torch.randn(batch, classes, height, width, generator=seeded(seed))
    prior = torch.rand(classes, generator=seeded(seed + 1), dtype=torch.float64) ** 3 + 0.001
    return logits, prior / prior.sum()


@pytest.mark.parametrize("classes", [2, 5, 21])
def test_penalty_equals_numpy_pixel_by_pixel(classes):
    logits, prior = draw_logits_and_prior(10, classes)
    t = torch.tensor([0.0, 0.3, 1.0])
    penalty = diffmatch.debias_penalty(logits, prior, t, 0.7)
    assert penalty.shape == (3, 4, 5)
    for image, row, column in np.ndindex(3, 4, 5):
        expected = plain_penalty(logits[image, :, row, column].numpy(), prior.numpy(), t[image].item(), 0.7)
        assert penalty[image, row, column].item() == pytest.approx(expected, rel=1e-4, abs=1e-8)
    assert not penalty[0].any() and penalty[1:].max() > 0.01
    torch.testing.assert_close(diffmatch.debias_penalty(logits, prior, 0.5 * t, 2.1), 1.5 * penalty)
    assert not diffmatch.debias_penalty(logits, prior, t, 0.0).any()
    assert diffmatch.debias_penalty(logits, torch.full((classes,), 1 / classes, dtype=torch.float64), t, 1.0).abs().max() < 1e-12


def test_penalty_moves_probability_from_head_to_tail():
    def one_step(logits, prior):
        logits = torch.tensor(logits, dtype=torch.float64).view(1, -1, 1, 1).requires_grad_()
        (slope,) = torch.autograd.grad(diffmatch.debias_penalty(logits, prior, torch.ones(1), 1.0).sum(), logits)
        before, after = logits.softmax(dim=1), (logits - 0.01 * slope).softmax(dim=1)
        return (after - before).flatten().tolist()

    two, five = torch.tensor([0.9, 0.1]), torch.tensor([0.6, 0.2, 0.1, 0.07, 0.03])
    for logits in ([0.0, 0.0], [2.0, 0.0], [-1.0, 1.5]):
        head, tail = one_step(logits, two)
        assert head < -1e-5 and tail == pytest.approx(-head)
    for logits in ([0.0] * 5, [0.5, 0.2, 0.0, -0.1, -0.3], [1.0, 0.0, 0.0, 0.0, 0.0]):
        change = one_step(logits, five)
        assert change[0] == min(change) < -1e-5 and change[-1] == max(change) > 1e-5


def test_the_debiased_target_is_a_constant_for_the_gradient():
    logits, prior = draw_logits_and_prior(12, shape=(2, 2, 2))
    logits, t, h = logits.double().requires_grad_(), torch.tensor([0.4, 0.9]), 1e-6
    (slope,) = torch.autograd.grad(diffmatch.debias_penalty(logits, prior, t, 0.3).sum(), logits)
    moving = 0.0
    for image, row, column in np.ndindex(2, 2, 2):
        at = logits[image, :, row, column].detach().numpy()
        target = softmax(at) / prior.numpy()
        target /= target.sum()
        for c in range(5):
            steps = [at + sign * h * np.eye(5)[c] for sign in (1, -1)]
            frozen = np.subtract(*(0.3 * t[image].item() * ((softmax(step) - target) ** 2).sum() for step in steps)) / (2 * h)
            assert slope[image, c, row, column].item() == pytest.approx(frozen, rel=1e-4, abs=1e-8)
            both = np.subtract(*(plain_penalty(step, prior.numpy(), t[image].item(), 0.3) for step in steps)) / (2 * h)
            moving = max(moving, abs(both - frozen))
    assert moving > 1e-3  # the two could be told apart


# ---------------------------------------------------------------- p(y_0)


def test_prior_starts_at_the_labels_shares_and_follows_the_pseudo_labels():
    counts = torch.tensor([600, 300, 0, 100])
    prior = diffmatch.ClassPrior(counts, 0.9)
    assert prior.labels.tolist() == prior.pseudo_labels.tolist() == pytest.approx([0.6, 0.3, 0.25, 0.1])  # 1/C: no adjustment
    pseudo = torch.tensor([10, 0, 70, 20], dtype=torch.float64)
    for number in range(1, 6):
        prior.update(pseudo)
        kept = 0.9**number
        expected = [kept * begin + (1 - kept) * share for begin, share in zip((0.6, 0.3, 0.25, 0.1), (0.1, 0, 0.25, 0.2))]  # 1/C for ever
        assert prior.pseudo_labels.tolist() == pytest.approx(expected, rel=1e-9)
    before = prior.pseudo_labels.clone()
    prior.update(torch.zeros(4, dtype=torch.float64))
    assert torch.equal(prior.pseudo_labels, before)
    assert prior.labels.tolist() == pytest.approx([0.6, 0.3, 0.25, 0.1])
    other = diffmatch.ClassPrior(torch.ones(4), 0.9)
    other.load_state_dict(prior.state_dict())
    assert torch.equal(other.pseudo_labels, prior.pseudo_labels) and torch.equal(other.labels, prior.labels)
    assert not list(prior.parameters())


def test_prior_has_a_floor_and_momentum_zero_forgets():
    prior = diffmatch.ClassPrior(torch.tensor([10**7, 1]), 0.0)
    assert prior.labels.tolist() == pytest.approx([1, diffmatch.LEAST_PRIOR])
    prior.update(torch.tensor([0.0, 50.0], dtype=torch.float64))
    assert prior.pseudo_labels.tolist() == pytest.approx([diffmatch.LEAST_PRIOR, 1])


def test_class_counts_equal_bincount_and_leave_out_what_is_ignored():
    label = torch.randint(6, (3, 7, 8), generator=seeded(13))
    label[:, 2:4] = IGNORE
    counts = diffmatch.class_counts(label, 6)
    assert counts.dtype == torch.float64
    assert counts.tolist() == np.bincount(label[label != IGNORE].numpy(), minlength=6).tolist() and counts.sum() == 3 * 5 * 8


# ---------------------------------------------------------------- label encodings and sizes


@pytest.mark.parametrize("classes, bits", [(2, 2), (3, 2), (7, 3), (8, 4), (15, 4), (16, 5), (21, 5), (81, 7), (254, 8)])
def test_analog_bits_are_the_classes_binary_digits(classes, bits):
    encode = diffmatch.LabelEncoding("bits", classes, 32, 0.3)
    label = torch.arange(classes + 1).view(1, 1, -1)
    codes = encode(label)
    assert encode.channels == bits and codes.shape == (1, bits, 1, classes + 1)
    assert codes.unique().tolist() == pytest.approx([-0.3, 0.3])
    assert [sum(2**bit for bit in range(bits) if codes[0, bit, 0, c] > 0) for c in range(classes + 1)] == list(range(classes + 1))
    assert not list(encode.parameters()) and not encode.state_dict()


def test_learned_codes_lie_within_the_scale():
    torch.manual_seed(0)
    encode = diffmatch.LabelEncoding("embedding", 8, 16, 0.1)
    label = torch.randint(9, (2, 5, 6), generator=seeded(20))
    codes = encode(label)
    assert encode.channels == 16 and codes.shape == (2, 16, 5, 6) and codes.abs().max() < 0.1 and codes.std() > 0.01
    table = encode.embedding.detach().double().numpy()
    for image, row, column in np.ndindex(2, 5, 6):
        expected = (2 / (1 + np.exp(-table[label[image, row, column]])) - 1) * 0.1
        np.testing.assert_allclose(codes[image, :, row, column].detach(), expected, rtol=0, atol=1e-7)
    codes.sum().backward()  # they are learned
    assert encode.embedding.grad[label.unique()].all()


@pytest.mark.parametrize("kind", ["embedding", "bits"])
def test_the_nearest_code_is_the_label_and_unknown_is_class_c(kind):
    torch.manual_seed(1)
    encode = diffmatch.LabelEncoding(kind, 21, 32, 0.1)
    codes = encode(torch.arange(22).view(1, 1, 22))[0, :, 0].T.detach()
    label = torch.randint(22, (2, 7, 5), generator=seeded(21))
    noisy = encode(label).detach() + 0.005 * torch.randn(2, encode.channels, 7, 5, generator=seeded(22))
    assert torch.equal(torch.cdist(noisy.permute(0, 2, 3, 1).flatten(0, 2), codes).argmin(dim=1).view(label.shape), label)
    unknown = torch.where(label == 21, IGNORE, label)
    assert torch.equal(encode(unknown), encode(label)) and torch.equal(encode(unknown.byte()), encode(label))
    assert torch.equal(codes[21], encode(torch.tensor([[[IGNORE]]]))[0, :, 0, 0])


@pytest.mark.parametrize("full, small", [((32, 48), (8, 12)), ((33, 29), (9, 8)), ((64, 64), (16, 16)), ((321, 321), (81, 81)), ((13, 9), (4, 3))])
def test_downsampling_undoes_upsampling(full, small):
    label = torch.randint(5, (2, *full), generator=seeded(23))
    label[0, -1, 0] = IGNORE
    down = diffmatch.downsample(label, small)
    assert down.shape == (2, *small) and down.dtype == label.dtype
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert torch.equal(down[:, row, column], label[:, row, column])
    assert torch.equal(diffmatch.downsample(label, full), label)
    low = torch.randint(5, (2, *small), generator=seeded(24))
    logits = diffmatch.upsample(F.one_hot(low, 5).permute(0, 3, 1, 2).float(), full)
    assert logits.shape == (2, 5, *full) and torch.equal(diffmatch.downsample(logits.argmax(dim=1), small), low)


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize("layers, millions", [(1, 42.4), (2, 43.3), (4, 44.9), (6, 45.8), (12, 49.9)])
def test_sizes_of_table_7(layers, millions):
    with torch.device("meta"):
        model = diffmatch.build_model(diffmatch.Config(backbone="resnet50", weights="none", layers=layers), 21)
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=1.0)
    assert sum(parameter.numel() for parameter in model.extractor.parameters()) / 1e6 == pytest.approx(40.5, abs=0.3)
    assert f"{count:.2f} M parameters" in diffmatch.parameter_report(model)


def tiny(seed=0, classes=4, **options):
    config = diffmatch.Config(backbone="tiny", weights="none", crop=32, **options)
    torch.manual_seed(seed)
    model = diffmatch.build_model(config, classes)
    if model.mask_channels:  # starts at zero
        nn.init.normal_(model.denoiser.fuse_mask.weight)
    return model, config


@pytest.mark.parametrize("options", [{}, {"encoding": "bits", "ffn_channels": 24, "layers": 2}, {"discriminative": True}])
def test_every_parameter_is_optimised_once_and_learns(options):
    model, config = tiny(**options)
    encoder, head = model.parameter_groups(0.1, 10.0)
    assert (encoder["lr"], head["lr"]) == (0.1, 1.0)
    assert {id(parameter) for parameter in encoder["params"]} == {id(parameter) for parameter in model.extractor.encoder.parameters()}
    listed = [id(parameter) for group in (encoder, head) for parameter in group["params"]]
    assert len(listed) == len(set(listed)) and set(listed) == {id(parameter) for parameter in model.parameters()}
    z, perturbed = model(torch.randn(4, 3, 32, 40, generator=seeded(25)), perturb=1)
    assert z.shape[0] == 4 and perturbed.shape[0] == 1 and z.shape[1:] == perturbed.shape[1:]
    y_t = model.encode(torch.randint(5, (4, *z.shape[2:]), generator=seeded(26))) if model.mask_channels else None
    logits = model(denoise=(z, y_t, torch.rand(4)))
    assert logits.shape == (4, 4, *z.shape[2:])
    logits.square().mean().backward()
    still = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not still, still


def test_the_denoiser_looks_at_features_mask_and_time():
    model, _ = tiny(layers=1, normalize_mask=True)
    model.eval()
    z, y_t, t = torch.randn(2, 32, 6, 5), 0.1 * torch.randn(2, model.mask_channels, 6, 5), torch.tensor([0.2, 0.7])
    base = model.denoise(z, y_t, t)
    for other in ((z + 0.1, y_t, t), (z, -y_t, t), (z, y_t, t.flip(0))):
        changed = model.denoise(*other)
        assert all((changed[image] - base[image]).abs().max() > 1e-4 for image in range(2))
    # Only the mask's direction counts, of each image on its own, where it is normalised.
    louder = y_t * torch.tensor([3.0, 0.5]).view(2, 1, 1, 1)
    torch.testing.assert_close(model.denoise(z, louder, t), base, rtol=0, atol=1e-5)
    unit = y_t / y_t.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    plain, _ = tiny(layers=1, normalize_mask=False)
    torch.testing.assert_close(plain.eval().denoise(z, unit, t), base, rtol=0, atol=1e-5)
    assert (plain.denoise(z, louder, t) - base).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    for image in range(2):  # images do not see each other
        alone = model.denoise(z[image : image + 1], y_t[image : image + 1], t[image : image + 1])
        torch.testing.assert_close(alone[0], base[image], rtol=0, atol=1e-5)


# ---------------------------------------------------------------- Algorithm 1: the loss


class Stub(nn.Module):
    """z = every `stride`-th pixel of the images, which have C channels; the denoiser works on each pixel and keeps a record."""

    def __init__(self, classes=4, stride=1, discriminative=False, gain=1.0):
        super().__init__()
        self.stride, self.gain, self.calls = stride, gain, []
        self.encode = None if discriminative else diffmatch.LabelEncoding("bits", classes, 8, 1.0)
        self.mask_channels = 0 if discriminative else self.encode.channels
        self.mix = 0.3 * torch.randn(classes, max(self.mask_channels, 1), generator=seeded(27))

    def forward(self, images=None, perturb=0, denoise=None):
        if denoise is not None:
            return self.denoise(*denoise)
        z = images[:, :, :: self.stride, :: self.stride]
        return (z, 0.5 * z[-perturb:].detach()) if perturb else z

    def denoise(self, z, y_t, t):
        logits = self.gain * z * (1 + 0.2 * t).view(-1, 1, 1, 1)
        if y_t is not None:
            logits = logits + torch.einsum("ck,bkhw->bchw", self.mix, y_t)
        self.calls.append((z, y_t, t, logits.detach()))
        return logits


def draw_views(seed, size=3, classes=4, height=9, width=13):
    """Views whose pictures are leaves, so that gradients show what is learned from."""
    generator = seeded(seed)
    views = {name: (2 * torch.randn(size, classes, height, width, generator=generator)).requires_grad_()
             for name in ("labeled", "weak", "strong_1", "strong_2")}
    for name in ("label", "truth"):
        label = torch.randint(classes, (size, height, width), generator=generator)
        label[torch.rand(label.shape, generator=generator) < 0.25] = IGNORE
        views[name] = label.byte()
    views["valid"] = torch.rand(size, height, width, generator=generator) < 0.7
    for name in ("strong_1", "strong_2"):
        boxes = torch.zeros(size, height, width, dtype=torch.bool)
        boxes[0, 2:6, 3:9] = boxes[-1, 1:, :5] = True
        views[name + "_boxes"] = boxes if name == "strong_1" else boxes.flip(2)
        views[name + "_valid"] = torch.where(views[name + "_boxes"], views["valid"].roll(1, 0), views["valid"])
    return views


def settled_prior():
    prior = diffmatch.ClassPrior(torch.tensor([700, 200, 60, 40]), 0.9)
    prior.update(torch.tensor([1.0, 3, 5, 91], dtype=torch.float64))
    return prior


def loss_of(stub, views, config, prior=None, counts=None):
    torch.manual_seed(0)
    return diffmatch.diffmatch_loss(stub, stub, views, counts or diffmatch.pixel_counts([views]), prior or settled_prior(), config)


@pytest.mark.parametrize("options", [{}, {"tau": 0.0}, {"single_view": True, "tau": 2.0}, {"discriminative": True}, {"pseudo_steps": 2, "tau": 1.0}])
@pytest.mark.parametrize("stride", [1, 4])
def test_loss_equals_plain_loops(options, stride, monkeypatch):
    """Algorithm 1, Eq. 6-11 pixel by pixel, from the logits that the denoiser has put out."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)  # so that y_t tells y_0
    config = diffmatch.Config(threshold=0.7, **options)
    stub, views, prior = Stub(stride=stride, discriminative=config.discriminative), draw_views(28), settled_prior()
    loss, terms, pixels = loss_of(stub, views, config, prior)
    size, classes, height, width = views["weak"].shape
    steps = 1 if config.discriminative else config.pseudo_steps
    assert len(stub.calls) == steps + 1

    # Pseudo labels: pure noise to begin with, on the weak view.
    z, y_t, t, _ = stub.calls[0]
    assert torch.equal(z, views["weak"][:, :, ::stride, ::stride])
    assert t.tolist() == [0 if config.discriminative else 1] * size
    assert y_t is None if config.discriminative else y_t.std() == pytest.approx(1, abs=0.25)
    weak = F.interpolate(stub.calls[steps - 1][3], size=(height, width), mode="bilinear", align_corners=True)
    confidence, pseudo = weak.double().softmax(dim=1).max(dim=1)
    labels, learned = [views["label"].long()], [views["label"] != IGNORE]
    pseudo, used = torch.where(views["valid"], pseudo, IGNORE), (confidence >= 0.7) & views["valid"]
    if not config.single_view:
        labels, learned = [*labels, pseudo], [*learned, used]
    views_used = ("strong_1",) if config.single_view else ("strong_1", "strong_2")
    for name in views_used:
        label, flags = pseudo.clone(), used.clone()
        for image, row, column in np.ndindex(size, height, width):
            if views[name + "_boxes"][image, row, column]:
                label[image, row, column] = pseudo[(image - 1) % size, row, column]
                flags[image, row, column] = used[(image - 1) % size, row, column]
        labels, learned = [*labels, label], [*learned, flags]
    assert 0.1 < used.sum() / views["valid"].sum() < 0.9

    # One pass of the denoiser, each image with a time of its own and its own mask.
    z, y_t, times, logits = stub.calls[-1]
    parts = [views["labeled"], *([] if config.single_view else [0.5 * views["weak"]]), *((0.5 if config.single_view else 1) * views[name] for name in views_used)]
    torch.testing.assert_close(z, torch.cat(parts)[:, :, ::stride, ::stride])
    if config.discriminative:
        assert y_t is None and not times.any()
    else:
        assert len(times.unique()) == len(times) == size * len(parts) and 0 <= times.min() and times.max() < 1
        small = z.shape[2:]
        for image, row, column in np.ndindex(len(times), *small):
            source = [math.floor(place * (full - 1) / (count - 1) + 0.5) for place, full, count in zip((row, column), (height, width), small)]
            label = min(torch.cat(labels)[image][tuple(source)].item(), classes)
            code = [math.sqrt(level_of(times[image].item())) * (1 if label >> bit & 1 else -1) for bit in range(3)]
            assert y_t[image, :, row, column].tolist() == pytest.approx(code, abs=1e-5)

    # Eq. 9-11.
    logits = F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=True).double().numpy()
    masks = [views["label"] != IGNORE, *([] if config.single_view else [views["valid"]]), *(views[name + "_valid"] for name in views_used)]
    divisors = [mask.sum() for mask in masks]
    sums, penalties = [], []
    for number, (label, flags) in enumerate(zip(labels, learned)):
        own_prior = (prior.pseudo_labels if number else prior.labels).numpy()
        total = penalty = 0.0
        for image, row, column in np.ndindex(size, height, width):
            if label[image, row, column] != IGNORE:
                pixel, time = logits[number * size + image, :, row, column], times[number * size + image].item()
                penalty += plain_penalty(pixel, own_prior, time, config.tau)
                if flags[image, row, column]:
                    total -= math.log(softmax(pixel)[label[image, row, column]])
        sums.append((total + penalty) / divisors[number].item())
        penalties.append(penalty)
    assert bool(penalties[0] > 0.1) is (config.tau > 0 and not config.discriminative)
    loss_unsup = sums[1] if config.single_view else sums[1] / 2 + (sums[2] + sums[3]) / 4
    assert terms["loss_sup"].item() == pytest.approx(sums[0], rel=1e-5)
    assert terms["loss_unsup"].item() == pytest.approx(loss_unsup, rel=1e-5)
    assert loss.item() == terms["loss"].item() == pytest.approx((sums[0] + loss_unsup) / 2, rel=1e-5)
    assert ("penalty_sup" in terms) is bool(penalties[0] > 0)
    assert float(torch.as_tensor(terms.get("penalty_sup", 0)).detach()) == pytest.approx(penalties[0] / divisors[0].item(), rel=1e-5, abs=1e-9)

    truth = views["truth"].long()
    assert terms["used"].item() == pytest.approx(used.sum().item() / views["valid"].sum().item())
    assert terms["used_known"] == (used & (truth != IGNORE)).sum() and terms["used_right"] == (used & (truth == pseudo)).sum()
    for row, label in zip(pixels, (pseudo[views["valid"]], pseudo[used], truth[truth != IGNORE]), strict=True):
        assert row.tolist() == np.bincount(label.numpy(), minlength=classes).tolist()


def test_each_training_image_gets_standard_noise():
    stub, views = Stub(), draw_views(29, height=40, width=40)
    loss_of(stub, views, diffmatch.Config(threshold=0.7, tau=0.0))
    _, y_t, times, _ = stub.calls[-1]
    labels = views["label"].long()
    for image in range(3):
        level = level_of(times[image].item())
        noise = (y_t[image] - math.sqrt(level) * stub.encode(labels[image : image + 1])[0]) / math.sqrt(1 - level)
        assert abs(noise.mean()) < 0.1 and noise.std() == pytest.approx(1, abs=0.1)


def test_pseudo_labels_carry_no_gradient_and_ignored_pixels_none():
    config = diffmatch.Config(threshold=0.7, tau=3.0)
    stub, views = Stub(), draw_views(30)
    loss, _, pixels = loss_of(stub, views, config)
    loss.backward()
    assert views["weak"].grad is None or not views["weak"].grad.any()
    seen = {"labeled": views["label"] != IGNORE, "strong_1": views["strong_1_valid"], "strong_2": views["strong_2_valid"]}
    for name, mask in seen.items():
        slope = views[name].grad.abs().amax(dim=1)
        assert not slope[~mask].any() and slope[mask].all(), name
    # Whatever the network says at pixels that are nobody's: the same loss, the same gradients, the same counts.
    again = {name: value.detach().clone() for name, value in views.items()}
    for name, mask in {**seen, "weak": views["valid"]}.items():
        again[name] = torch.where(mask[:, None], again[name], again[name].flip(1) + 3).requires_grad_()
    changed, _, changed_pixels = loss_of(Stub(), again, config)
    changed.backward()
    assert changed.item() == loss.item() and torch.equal(changed_pixels, pixels)
    for name in seen:
        assert torch.equal(again[name].grad, views[name].grad)
    assert pixels[0].sum() == views["valid"].sum()


def test_pseudo_labels_below_the_threshold_only_meet_the_penalty():
    views = draw_views(31)
    loss, terms, pixels = loss_of(Stub(), views, diffmatch.Config(threshold=1.1, tau=0.0))
    loss.backward()
    assert terms["used"] == terms["loss_unsup"] == 0 and not pixels[1].any() and pixels[0].sum() == views["valid"].sum()
    assert not views["strong_1"].grad.any() and views["labeled"].grad.any() and loss > 0.1
    assert loss_of(Stub(), draw_views(31), diffmatch.Config(threshold=1.1, tau=1.0))[1]["loss_unsup"] > 0
    views = draw_views(31)
    _, terms, pixels = loss_of(Stub(), views, diffmatch.Config(threshold=0.0))
    assert terms["used"] == 1 and torch.equal(pixels[0], pixels[1])


def test_nothing_labeled_or_nothing_valid_gives_zero_not_nan():
    views = draw_views(32)
    views["label"] = torch.full_like(views["label"], IGNORE)
    for name in ("valid", "strong_1_valid", "strong_2_valid"):
        views[name] = torch.zeros_like(views[name])
    loss, terms, pixels = loss_of(Stub(), views, diffmatch.Config(threshold=0.7))
    loss.backward()
    assert loss == 0 and all(value.isfinite() for value in terms.values()) and not pixels[:2].any()
    assert all(views[name].grad.isfinite().all() for name in ("labeled", "strong_1", "strong_2"))


def leave_out_chance(patch):
    """The same time for every image and no noise; draw what is random before."""
    patch(torch, "rand_like", lambda x: torch.full_like(x, 0.4))
    patch(torch, "randn_like", torch.zeros_like)
    patch(torch, "randn", lambda *shape, device: torch.zeros(shape, device=device))


@pytest.mark.parametrize("options", [{}, {"single_view": True}, {"discriminative": True}])
def test_accumulated_parts_equal_the_whole_batch(options, monkeypatch):
    """Without CutMix, which mixes within a part. Parts have different numbers of labeled and valid pixels."""
    config = diffmatch.Config(threshold=0.6, **options)
    views, stubs = {name: value.detach() for name, value in draw_views(33, size=4).items()}, {}
    for count in (1, 2, 4):
        stubs[count] = Stub(discriminative=config.discriminative)
    leave_out_chance(monkeypatch.setattr)
    for name in ("strong_1", "strong_2"):
        views[name + "_boxes"], views[name + "_valid"] = torch.zeros_like(views["valid"]), views["valid"]
    views["label"][:2, :, 3:] = IGNORE
    results = []
    for count in (1, 2, 4):
        parts = runtime.split_batch(views, count, torch.device("cpu"))
        counts = diffmatch.pixel_counts(parts)
        assert counts["label"] == (views["label"] != IGNORE).sum() and counts["valid"] == views["valid"].sum()
        losses = [loss_of(stubs[count], part, config, counts=counts) for part in parts]
        results.append((sum(loss for loss, _, _ in losses), sum(terms["loss_unsup"] for _, terms, _ in losses), sum(pixels for *_, pixels in losses)))
    assert 0 < results[0][2][1].sum() < results[0][2][0].sum()
    for loss, unsup, pixels in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(unsup, results[0][1])
        assert torch.equal(pixels, results[0][2])


@pytest.mark.parametrize("options", [{}, {"discriminative": True, "single_view": True}])
def test_a_step_reads_nothing_back_from_the_device(options):
    """On the meta device tensors have no values: .item(), boolean indexing and branches on values raise there."""
    config = diffmatch.Config(threshold=0.7, **options)
    stub, prior = Stub(discriminative=config.discriminative).to("meta"), settled_prior().to("meta")
    stub.mix = stub.mix.to("meta")
    views = {name: value.to("meta") for name, value in draw_views(34).items()}
    loss, terms, pixels = loss_of(stub, views, config, prior)
    prior.update(pixels[0])
    assert loss.device.type == pixels.device.type == "meta" and {value.dim() for value in terms.values()} == {0}
    with pytest.raises(Exception):
        loss.item()


def test_compiled_networks_learn_the_same(monkeypatch):
    """By the compiler's front end; the network is called three times for one backward pass."""
    dynamo = pytest.importorskip("torch._dynamo")
    compile_fully, results = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda model: compile_fully(model, backend="aot_eager"))
    views = draw_views(41, size=2, height=32, width=32)
    for name in ("labeled", "weak", "strong_1"):
        views[name] = views[name].detach()[:, :3]
    for compiled in (False, True):
        model, config = tiny(layers=1, single_view=True, threshold=0.0, tau=1.0, compile=compiled)
        network = runtime.wrap(model, config, runtime.Context(0, 1, torch.device("cpu")))
        assert (network is model) is not compiled
        torch.manual_seed(0)
        loss = diffmatch.diffmatch_loss(network, model, views, diffmatch.pixel_counts([views]), settled_prior(), config)[0]
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    dynamo.reset()
    for plain, compiled in zip(*results):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)


def draw_batch(seed, size=4, crop=16):
    generator = seeded(seed)
    batch = {name: torch.randint(256, (size, 3, crop, crop), generator=generator, dtype=torch.uint8) for name in ("labeled", "unlabeled")}
    batch |= {name: torch.randint(4, (size, crop, crop), generator=generator, dtype=torch.uint8) for name in ("label", "truth")}
    batch["valid"] = torch.zeros(size, crop, crop, dtype=torch.bool)
    for number in range(size):
        batch["valid"][number, : 4 * (number + 1)] = True
    return batch


def test_strong_views_show_the_neighbour_inside_the_box(monkeypatch):
    monkeypatch.setattr(augment, "strong_augment", lambda x, blur_sigma: x)
    batch, mixed = draw_batch(35), 0
    weak = augment.normalize(batch["unlabeled"])
    torch.manual_seed(3)
    views = diffmatch.make_views(batch, diffmatch.Config(crop=16), BLUR)
    for name in ("strong_1", "strong_2"):
        mixed += int(views[name + "_boxes"].flatten(1).any(dim=1).sum())
        for image, inside in enumerate(views[name + "_boxes"]):
            for mask, source in ((inside, image - 1), (~inside, image)):
                torch.testing.assert_close(views[name][image][:, mask], weak[source][:, mask])
                assert torch.equal(views[name + "_valid"][image][mask], batch["valid"][source][mask])
    assert mixed >= 3
    single = diffmatch.make_views(batch, diffmatch.Config(crop=16, single_view=True, cutmix=False), BLUR)
    assert "strong_2" not in single and not single["strong_1_boxes"].any()
    assert diffmatch.pixel_counts([single]).keys() == {"label", "valid", "strong_1_valid"}


# ---------------------------------------------------------------- prediction


@pytest.mark.parametrize("options", [{}, {"encoding": "bits", "scale": 0.5, "steps": 2}, {"discriminative": True}])
def test_a_prediction_depends_neither_on_the_batch_nor_on_its_order(options):
    model, config = tiny(36, **options)
    predict_ = diffmatch.predictor(model, config)
    images = torch.randn(3, 3, 32, 36, generator=seeded(37))
    with torch.inference_mode():
        batch = predict_(images)
        assert batch.shape == (3, 4, 32, 36) and torch.equal(predict_(images), batch)
        torch.testing.assert_close(predict_(images.flip(0)).flip(0), batch, rtol=0, atol=1e-4)
        alone = torch.cat([diffmatch.predictor(model, config)(image[None]) for image in images])
        torch.testing.assert_close(alone, batch, rtol=0, atol=1e-4)
        assert len(predict_.trajectory(images)) == (1 if config.discriminative else config.steps)
        assert torch.equal(F.interpolate(predict_.trajectory(images)[-1], (32, 36), mode="bilinear", align_corners=True), batch)
        other = diffmatch.predictor(model, dataclasses.replace(config, noise_seed=1))(images)
        assert torch.equal(other, batch) is config.discriminative
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with torch.inference_mode():
        diffmatch.predictor(model, config)(images)
    assert torch.equal(torch.get_rng_state(), before)  # evaluating does not move training's random numbers


# ---------------------------------------------------------------- programs


QUICK = ["--batch-size", "2", "--iterations", "6", "--eval-every", "6", "--save-every", "1", "--log-every", "2", "--num-workers", "0",
         "--crop", "32", "--threshold", "0.1", "--device", "cpu"]  # so early there are no confident pixels
PARTS = ("model", "optimizer", "prior", "rng", "iteration")


run_as_program = functools.partial(programs.run_as_program, "diffmatch.py")
refuse = functools.partial(programs.refuse, "diffmatch.py")


def evaluate_as_program(monkeypatch, root, checkpoint, output, *options) -> dict:
    monkeypatch.setattr(sys, "argv", ["evaluate", "--checkpoint", str(checkpoint), "--data-root", str(root), "--num-workers", "0", "--output",
                                      str(output), "--device", "cpu", *options])
    evaluate.main()
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """The embedded data with short lists."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    synthetic.generate(root, "shapes")
    lists = root / "ImageSets" / "Segmentation"
    val, train = ((lists / f"{name}.txt").read_text().splitlines() for name in ("val", "train"))
    labeled = (lists / "labeled_24.txt").read_text().splitlines()
    (lists / "val.txt").write_text("".join(line + "\n" for line in val[:8]))
    (lists / "train.txt").write_text("".join(line + "\n" for line in labeled + [line for line in train if line not in labeled][:10]))
    return root


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory) -> Path:
    """A finished run, never interrupted."""
    folder = tmp_path_factory.mktemp("trained")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["diffmatch.py", *QUICK, "--data-root", str(shapes), "--output", str(folder)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / "diffmatch.py"), run_name="__main__")
        assert not caught.value.code
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return folder


def test_a_run_leaves_its_folder(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"config.json", "metrics.jsonl", "results.json", "latest.pt", "best.pt", "samples.png", "trajectory.png", "unlabeled.json"} <= names
    assert not [name for name in names if name.endswith(".part")]
    for name in ("samples.png", "trajectory.png"):
        assert (trained / name).read_bytes().startswith(b"\x89PNG")
    results, unlabeled = (json.loads((trained / name).read_text()) for name in ("results.json", "unlabeled.json"))
    assert results["last"]["iteration"] == 6 and 0 <= results["last"]["miou"] <= 100 and results["last"]["images"] == 8
    assert unlabeled["images"] == 10 and 0 <= unlabeled["ece"] <= 1 and np.sum(unlabeled["confusion"]) > 10 * 1000
    lines = [line for line in map(json.loads, (trained / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
    assert [line["iteration"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert line["loss"] == pytest.approx((line["loss_sup"] + line["loss_unsup"]) / 2, abs=1e-5) and line["penalty_sup"] > 0
        assert sum(value for name, value in line.items() if name.startswith("pseudo ")) == pytest.approx(1, abs=1e-4)
        assert sum(value for name, value in line.items() if name.startswith("used ")) == pytest.approx(line["used"], abs=1e-4)
    saved = state(trained)
    prior, config = saved["prior"], saved["config"]
    assert (config["threshold"], config["steps"]) == (0.1, 3)
    assert prior["labels"].sum() == pytest.approx(1) and not torch.equal(prior["labels"], prior["pseudo_labels"])


def test_a_run_draws_its_figures(trained):
    pytest.importorskip("matplotlib", reason="draws figures only where matplotlib is installed")
    for name in ("pseudo_labels.png", "unlabeled.png"):
        assert (trained / name).read_bytes().startswith(b"\x89PNG")


def test_sigterm_saves_and_the_same_command_ends_with_identical_bits(trained, shapes, tmp_path, monkeypatch, capfd, keep_signal_handlers):
    from common.run import Run

    hide_matplotlib(monkeypatch)
    command, log = [*QUICK, "--save-every", "100", "--data-root", shapes, "--output", tmp_path], Run.log

    def log_and_stop(self, iteration, *arguments, **options):
        log(self, iteration, *arguments, **options)
        if iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log_and_stop)
        status, out, err = run_as_program(monkeypatch, capfd, *command)
    assert status == 128 + signal.SIGTERM and "stopped by SIGTERM" in out and "Traceback" not in err
    assert state(tmp_path)["iteration"] == 3
    status, out, err = run_as_program(monkeypatch, capfd, *command)
    assert status == 0 and "at iteration 3" in out, err
    for name in PARTS:
        assert_identical(state(tmp_path)[name], state(trained)[name], name)
    for name in ("results.json", "unlabeled.json"):
        assert (tmp_path / name).read_text() == (trained / name).read_text()


def test_sigkill_then_the_same_command_ends_with_identical_bits(trained, shapes, tmp_path, monkeypatch, capfd, keep_signal_handlers):
    hide_matplotlib(monkeypatch)
    command = [*QUICK, "--data-root", shapes, "--output", tmp_path]
    interrupted_at = kill_after_first_checkpoint(tmp_path, "diffmatch.py", *command)["iteration"]
    assert interrupted_at < 6, "the run ended before it could be killed"
    status, out, err = run_as_program(monkeypatch, capfd, *command)
    assert status == 0 and f"at iteration {interrupted_at}" in out, err
    for name in PARTS:
        assert_identical(state(tmp_path)[name], state(trained)[name], name)


def test_the_noise_seed_changes_the_evaluation_only(trained, shapes, tmp_path, monkeypatch, capfd, keep_signal_handlers):
    hide_matplotlib(monkeypatch)
    assert run_as_program(monkeypatch, capfd, *QUICK, "--noise-seed", "1", "--data-root", shapes, "--output", tmp_path)[0] == 0
    for name in PARTS:
        assert_identical(state(tmp_path)[name], state(trained)[name], name)
    ours, theirs = (json.loads((folder / "unlabeled.json").read_text()) for folder in (tmp_path, trained))
    assert ours["reliability"] != theirs["reliability"]  # so early the mask counts little: confidences move, hardly a class does


RANKS = """
import sys
import torch
import diffmatch
from common import runtime

sys.path.insert(0, "tests")
import test_diffmatch

finish = diffmatch.finish


def keep(run, *arguments):
    torch.save(run.state["model"].state_dict() | {"prior": run.state["prior"].pseudo_labels}, f"{sys.argv[2]}/{run.context.rank}.pt")
    finish(run, *arguments)


diffmatch.finish = keep
common = dict(data_root=sys.argv[1], crop=32, batch_size=4, grad_accum=2, iterations=3, log_every=1, threshold=0.1, num_workers=0, device="cpu")
diffmatch.train(diffmatch.Config(output=sys.argv[2] + "/run", **common))

# The loss of a batch that both share; CutMix takes neighbours from the other rank.
rank = runtime.start("cpu").rank
views = {name: value.detach().chunk(2)[rank] for name, value in test_diffmatch.draw_views(40, size=4).items()}
stub = test_diffmatch.Stub()
test_diffmatch.leave_out_chance(setattr)
loss, terms, pixels = test_diffmatch.loss_of(stub, views, diffmatch.Config(threshold=0.6))
torch.save((loss, terms, pixels), f"{sys.argv[2]}/loss_{rank}.pt")
runtime.finish()
"""


def test_two_ranks_train_and_evaluate_like_one_process(shapes, tmp_path, monkeypatch):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    succeed(script, shapes, tmp_path, torchrun=2)
    saved, (first, second) = state(tmp_path / "run"), (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_identical(first, second)
    assert saved["iteration"] == 3 and len(saved["rng"]) == 2
    assert_identical(saved["model"], {name: value for name, value in first.items() if name != "prior"})
    assert_identical(saved["prior"]["pseudo_labels"], first["prior"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [math.isfinite(line["loss"]) for line in lines if "loss" in line] == [True] * 3
    two = json.loads((tmp_path / "run" / "results.json").read_text())["last"]
    one = evaluate_as_program(monkeypatch, shapes, tmp_path / "run" / "latest.pt", tmp_path / "one.json")
    assert one["confusion"] == two["confusion"] and one["iou"] == two["iou"] and one["images"] == two["images"] == 8
    assert one["ece"] == pytest.approx(two["ece"], abs=1e-6)  # other batches of images, other last digits of the logits
    two = json.loads((tmp_path / "run" / "unlabeled.json").read_text())
    one = evaluate_as_program(monkeypatch, shapes, tmp_path / "run" / "latest.pt", tmp_path / "one.json", "--split", "unlabeled")
    assert one["confusion"] == two["confusion"]

    ranks, views, stub = [torch.load(tmp_path / f"loss_{rank}.pt") for rank in range(2)], draw_views(40, size=4), Stub()
    leave_out_chance(monkeypatch.setattr)
    loss, terms, pixels = loss_of(stub, views, diffmatch.Config(threshold=0.6))
    torch.testing.assert_close((ranks[0][0] + ranks[1][0]) / 2, loss.detach())
    assert torch.equal(ranks[0][2] + ranks[1][2], pixels) and ranks[0][0] != ranks[1][0]
    for name in ("loss_sup", "loss_unsup", "used", "penalty_sup"):
        torch.testing.assert_close((ranks[0][1][name] + ranks[1][1][name]) / 2, terms[name].detach())


def test_evaluation_is_repeatable_and_takes_steps(trained, shapes, tmp_path, monkeypatch):
    first, again = (evaluate_as_program(monkeypatch, shapes, trained / "latest.pt", tmp_path / f"{name}.json") for name in "ab")
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    assert first["confusion"] == json.loads((trained / "results.json").read_text())["last"]["confusion"] and first["steps"] == 3
    different = {str(first["reliability"])}
    for steps in (1, 2, 5):
        results = evaluate_as_program(monkeypatch, shapes, trained / "latest.pt", tmp_path / "c.json", "--steps", str(steps))
        assert results["steps"] == steps and results["images"] == 8
        different.add(str(results["reliability"]))
    assert len(different) == 4


def test_predict_takes_steps(trained, tmp_path, monkeypatch):
    from PIL import Image

    Image.radial_gradient("L").convert("RGB").resize((91, 50)).save(tmp_path / "mine.png")
    for steps in (("--steps", "2"), ()):
        monkeypatch.setattr(sys, "argv", ["predict", "--checkpoint", str(trained / "best.pt"), "--output", str(tmp_path / "out"), "--device", "cpu",
                                          str(tmp_path / "mine.png"), *steps])
        assert not predict.main()
    with Image.open(tmp_path / "out" / "mine.png") as prediction:
        assert prediction.mode == "P" and prediction.size == (91, 50) and np.asarray(prediction).max() < 8


def test_trajectory_as_a_program(trained, tmp_path, monkeypatch, capfd):
    from PIL import Image

    widths = []
    for steps in (2, 4):
        status, out, err = run_as_program(monkeypatch, capfd, "--trajectory", trained / "latest.pt", "--steps", steps, "--output",
                                          tmp_path / str(steps), "--device", "cpu")
        assert status == 0 and "trajectory.png" in out, err
        with Image.open(tmp_path / str(steps) / "trajectory.png") as picture:
            widths.append(picture.width)
    assert widths[1] > 1.3 * widths[0]  # two columns more


def hide_matplotlib(monkeypatch):
    """As where it is not installed; drawing takes longer than the rest of a short run."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)


VARIANTS = {
    "table 7": ["--layers", "1", "--ffn-channels", "64", "--encoding", "bits", "--scale", "0.5", "--normalize-mask", "--threshold", "0"],
    "tables 5 and 9": ["--tau", "0", "--steps", "2", "--pseudo-steps", "3", "--time-difference", "0", "--grad-accum", "2", "--ema-decay", "0.9"],
    "eq 6": ["--single-view", "--no-cutmix", "--amp", "--prior-momentum", "0", "--layers", "2"],
    "discriminative": ["--discriminative", "--crop", "33", "--layers", "2"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_run(name, shapes, tmp_path, monkeypatch, capfd, keep_signal_handlers):
    hide_matplotlib(monkeypatch)
    status, _, err = run_as_program(monkeypatch, capfd, *QUICK, "--iterations", "3", "--log-every", "1", "--data-root", shapes,
                                    "--output", tmp_path, *VARIANTS[name])
    assert status == 0, err
    saved = state(tmp_path)
    assert saved["iteration"] == 3 and not (tmp_path / "unlabeled.png").exists()
    lines = [line for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
    assert len(lines) == 3 and all(0 < line["loss"] < 100 for line in lines)
    assert all(("penalty_sup" not in line) is (name in ("tables 5 and 9", "discriminative")) for line in lines)
    if name == "table 7":
        assert all(line["used"] == 1 for line in lines)


@pytest.mark.parametrize("options, named", [
    (["--steps", "0"], "--steps"), (["--pseudo-steps", "0"], "--pseudo-steps"), (["--tau", "-1"], "--tau"), (["--scale", "0"], "--scale"),
    (["--prior-momentum", "1"], "--prior-momentum"), (["--layers", "0"], "--layers"), (["--ffn-channels", "-1"], "--ffn-channels"),
    (["--time-difference", "-1"], "--time-difference"), (["--labeled", "all"], "unlabeled")])
def test_bad_options_give_one_line(options, named, shapes, tmp_path, monkeypatch, capfd):
    assert named in refuse(monkeypatch, capfd, *QUICK, "--data-root", shapes, "--output", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_trajectory_refuses_what_is_no_checkpoint_of_this_method(trained, tmp_path, monkeypatch, capfd):
    config = daw.Config(backbone="tiny", weights="none", crop=32)
    content = {"format": FORMAT, "method": "daw", "dataset": "shapes", "config": dataclasses.asdict(config),
               "model": daw.build_model(config, 8).state_dict(), "iteration": 1}
    torch.save(content, tmp_path / "other.pt")
    for path in (tmp_path / "other.pt", tmp_path / "missing.pt"):
        assert path.name in refuse(monkeypatch, capfd, "--trajectory", path, "--output", tmp_path / "a", "--device", "cpu")
    zero = ["--trajectory", trained / "latest.pt", "--steps", "0", "--output", tmp_path / "a", "--device", "cpu"]
    assert "--steps" in refuse(monkeypatch, capfd, *zero)
    assert not (tmp_path / "a").exists()


def test_other_options_do_not_go_on_with_a_run(trained, shapes, monkeypatch, capfd, keep_signal_handlers):
    message = refuse(monkeypatch, capfd, *QUICK, "--encoding", "bits", "--data-root", shapes, "--output", trained)
    assert "other options" in message and "--encoding embedding" in message
