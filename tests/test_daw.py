"""daw.py against other ways to the same numbers: bisection and quadrature for Eq. 7-11, plain loops for the rest."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import daw
from common import augment, runtime

IGNORE = 255
BLUR = (0.1, 1.0)

# ---------------------------------------------------------------- Eq. 3, 4, 11: where the densities cross


def log_density(p, mean, variance, classes):
    """log of a Gaussian truncated to [1/C, 1]; p a float or an array."""
    scale = math.sqrt(2 * variance)
    mass = 0.5 * (math.erf((1 - mean) / scale) - math.erf((1 / classes - mean) / scale))
    return -((p - mean) ** 2) / (2 * variance) - math.log(mass) - 0.5 * math.log(2 * math.pi * variance)


def overtaking_by_bisection(mu_pos, var_pos, mu_neg, var_neg, classes):
    """Where g+ overtakes g-, found by looking at the densities on a grid and halving; None if it nowhere does."""

    def difference(p):
        return log_density(p, mu_pos, var_pos, classes) - log_density(p, mu_neg, var_neg, classes)

    grid = np.linspace(1 / classes, 1, 4001)
    values = difference(grid)
    upward = np.flatnonzero((values[:-1] < 0) & (values[1:] >= 0))
    if not len(upward):
        return None
    assert len(upward) == 1
    low, high = grid[upward[0]], grid[upward[0] + 1]
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if difference(middle) < 0 else (low, middle)
    return (low + high) / 2


def random_gaussians(count, seed, similar_variances=False):
    """(mu_pos, var_pos, mu_neg, var_neg, classes), `count` times."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        classes = int(rng.choice([2, 5, 21, 81]))
        means = rng.uniform(1 / classes, 1, 2)
        variances = np.exp(rng.uniform(math.log(0.03), math.log(0.7), 2)) ** 2
        if similar_variances:
            variances[1] = variances[0] * (1 + (0, 1e-15, -1e-15, 1e-12, -1e-9, 1e-7, -1e-5, 1e-3)[number % 8])
        yield float(means[0]), float(variances[0]), float(means[1]), float(variances[1]), classes


def test_threshold_is_where_the_densities_cross():
    seen = {"crossing, var_pos > var_neg": 0, "crossing, var_pos < var_neg": 0, "no crossing": 0}
    for gaussians in random_gaussians(600, seed=1):
        expected = overtaking_by_bisection(*gaussians)
        t_star = daw.optimal_threshold(*gaussians)
        assert type(t_star) is float
        if expected is None:
            seen["no crossing"] += 1
            assert t_star == 1 / gaussians[-1], gaussians
        else:
            seen["crossing, var_pos > var_neg" if gaussians[1] > gaussians[3] else "crossing, var_pos < var_neg"] += 1
            assert t_star == pytest.approx(expected, abs=1e-8), gaussians
    assert min(seen.values()) > 50, seen


def test_threshold_with_equal_and_nearly_equal_variances():
    crossings = 0
    for gaussians in random_gaussians(400, seed=2, similar_variances=True):
        expected = overtaking_by_bisection(*gaussians)
        crossings += expected is not None
        assert daw.optimal_threshold(*gaussians) == pytest.approx(expected or 1 / gaussians[-1], abs=1e-7), gaussians
    assert 100 < crossings < 300
    # Equal variances and means symmetric to the middle of [1/C, 1]: the middle.
    assert daw.optimal_threshold(0.9, 0.02, 0.6, 0.02, 2) == pytest.approx(0.75, abs=1e-12)


def test_threshold_agrees_with_scipys_truncated_gaussian():
    scipy_stats = pytest.importorskip("scipy.stats")
    brentq = pytest.importorskip("scipy.optimize").brentq
    crossings = 0
    for mu_pos, var_pos, mu_neg, var_neg, classes in random_gaussians(300, seed=3):
        grid = np.linspace(1 / classes, 1, 1001)
        truncated = [scipy_stats.truncnorm((1 / classes - mean) / std, (1 - mean) / std, mean, std)
                     for mean, std in ((mu_pos, math.sqrt(var_pos)), (mu_neg, math.sqrt(var_neg)))]
        values = truncated[0].logpdf(grid) - truncated[1].logpdf(grid)
        upward = np.flatnonzero((values[:-1] < 0) & (values[1:] >= 0))
        expected = 1 / classes
        if len(upward):
            crossings += 1
            expected = brentq(lambda p: truncated[0].logpdf(p) - truncated[1].logpdf(p), *grid[upward[0] : upward[0] + 2], xtol=1e-13)
        assert daw.optimal_threshold(mu_pos, var_pos, mu_neg, var_neg, classes) == pytest.approx(expected, abs=1e-8)
    assert crossings > 100


def test_threshold_without_a_crossing_uses_every_pseudo_label():
    assert daw.optimal_threshold(1 / 21, 1.0, 1 / 21, 1.0, 21) == 1 / 21  # the statistics' start
    assert daw.optimal_threshold(0.7, 0.01, 0.7, 0.01, 2) == 0.5
    assert daw.optimal_threshold(0.6, 0.02, 0.8, 0.02, 21) == 1 / 21  # wrong predictions are the confident ones
    assert daw.optimal_threshold(0.6, 0.02, 0.8, 0.01, 21) == 1 / 21  # g+ leads below, g- above
    # Extremes that training meets: nearly certain right predictions, the smallest variance that Statistics keeps.
    t_star = daw.optimal_threshold(1.0, 1e-8, 0.6, 0.03, 21)
    assert t_star == pytest.approx(overtaking_by_bisection(1.0, 1e-8, 0.6, 0.03, 21), abs=1e-8) and 0.999 < t_star < 1


def test_threshold_of_tensors_stays_on_the_device():
    cases = list(random_gaussians(50, seed=4))
    for *gaussians, classes in cases:
        t_star = daw.optimal_threshold(*(torch.tensor(value, dtype=torch.float64) for value in gaussians), classes)
        assert isinstance(t_star, torch.Tensor) and t_star.dim() == 0 and t_star.dtype == torch.float64
        assert float(t_star) == daw.optimal_threshold(*gaussians, classes)
    # The meta device has no values: whatever reads one back, or branches on one, raises there.
    on_meta = [torch.empty((), dtype=torch.float64, device="meta") for _ in range(4)]
    assert daw.optimal_threshold(*on_meta, 21).device.type == "meta"


# ---------------------------------------------------------------- Eq. 7-10: E1, E2 and their optimum


def cumulative(mean, variance, classes, nodes=100_001):
    """Confidences and the share of a truncated Gaussian below each, by the trapezoid rule."""
    p = np.linspace(1 / classes, 1, nodes)
    density = np.exp(-((p - mean) ** 2) / (2 * variance))
    below = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return p, below / below[-1]


def test_no_step_has_less_e1_plus_e2_than_the_one_at_t_star():
    without_crossing = 0
    cases = list(random_gaussians(60, seed=5)) + list(random_gaussians(16, seed=6, similar_variances=True))
    cases += [(0.6, 0.02, 0.8, 0.02, 21), (0.7, 0.01, 0.7, 0.01, 21)]
    for mu_pos, var_pos, mu_neg, var_neg, classes in cases:
        p, below_pos = cumulative(mu_pos, var_pos, classes)
        _, below_neg = cumulative(mu_neg, var_neg, classes)
        total = (1 - below_neg) + below_pos  # E1 + E2 of the step at each p
        t_star = daw.optimal_threshold(mu_pos, var_pos, mu_neg, var_neg, classes)
        at_t_star = 1 - np.interp(t_star, p, below_neg) + np.interp(t_star, p, below_pos)
        assert at_t_star <= total.min() + 1e-7
        if t_star == 1 / classes:
            without_crossing += 1
            assert total.min() > 1 - 1e-9  # neither does any other step gain anything
    assert 10 < without_crossing < 50


REALISTIC = (0.91, 0.012, 0.62, 0.03, 21)  # as after some epochs
GAUSSIANS = [REALISTIC, (1 / 21, 1.0, 1 / 21, 1.0, 21), (0.8, 0.05, 0.7, 0.01, 2), (0.97, 0.003, 0.4, 0.09, 8)]


def step(threshold):
    return lambda p: float(p >= threshold)


@pytest.mark.parametrize("gaussians", GAUSSIANS)
def test_tradeoff_agrees_with_quadrature(gaussians):
    quad = pytest.importorskip("scipy.integrate").quad
    mu_pos, var_pos, mu_neg, var_neg, classes = gaussians
    t_star = overtaking_by_bisection(*gaussians) or 1 / classes
    weightings = {"none": (lambda p: 1.0, None), "fixed": (step(0.95), 0.95), "power": (lambda p: p * p, None), "daw": (step(t_star), t_star)}
    assert set(weightings) == set(daw.WEIGHTINGS)
    for name, (weight, jump) in weightings.items():
        expected, highest = [], 0.0
        for mean, variance in ((mu_neg, var_neg), (mu_pos, var_pos)):
            def density(p):
                return math.exp(log_density(p, mean, variance, classes))

            expected.append(quad(lambda p: weight(p) * density(p), 1 / classes, 1, points=jump and [jump], limit=200)[0])
            highest = max(highest, density(min(max(mean, 1 / classes), 1)))
        e1, e2 = daw.tradeoff(lambda p: daw.pseudo_label_weight(p, name, jump), *gaussians)
        error = highest / 20_000 if jump else 1e-7  # a step may be one cell of the integration off
        assert e1 == pytest.approx(expected[0], abs=error) and e2 == pytest.approx(1 - expected[1], abs=error)


@pytest.mark.parametrize("gaussians", GAUSSIANS)
def test_tradeoff_of_all_and_of_nothing(gaussians):
    assert daw.tradeoff(torch.ones_like, *gaussians) == pytest.approx((1, 0), abs=1e-12)
    assert daw.tradeoff(torch.zeros_like, *gaussians) == pytest.approx((0, 1), abs=1e-12)


def test_daw_has_the_least_negative_effect_of_table_1():
    t_star = daw.optimal_threshold(*REALISTIC)
    effects = {name: sum(daw.tradeoff(lambda p: daw.pseudo_label_weight(p, name, t_star if name == "daw" else 0.95), *REALISTIC))
               for name in daw.WEIGHTINGS}
    assert effects["daw"] < min(effects[name] for name in ("none", "fixed", "power")) - 0.05
    assert effects["none"] == pytest.approx(1)


def test_report_has_every_weighting_and_reads_the_statistics():
    statistics = daw.Statistics(21, 0.99)
    statistics.mean.copy_(torch.tensor([0.91, 0.62]))
    statistics.variance.copy_(torch.tensor([0.012, 0.03]))
    line = daw.report(statistics, {"used_known": 40.0, "used_right": 30.0}, daw.Config(threshold=0.95))
    assert line["t_star"] == pytest.approx(overtaking_by_bisection(*REALISTIC), abs=1e-4)
    assert (line["mu_pos"], line["mu_neg"], line["used_accuracy"]) == (0.91, 0.62, 0.75)
    assert (line["sigma_pos"], line["sigma_neg"]) == pytest.approx((0.012**0.5, 0.03**0.5), abs=1e-5)
    assert line["E1_none"] == 1 and line["E2_none"] == 0
    assert line["E1_daw"] + line["E2_daw"] < min(line[f"E1_{name}"] + line[f"E2_{name}"] for name in ("none", "fixed", "power"))
    json.dumps(line, allow_nan=False)
    assert "used_accuracy" not in daw.report(statistics, {}, daw.Config(threshold=0.95))


# ---------------------------------------------------------------- Eq. 12: alignment


def test_alignment_equals_a_plain_loop_and_sums_to_one():
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(2, 4, 3, 5, generator=generator).softmax(dim=1)
    labeled, unlabeled = (torch.rand(4, generator=generator, dtype=torch.float64) + 0.1 for _ in range(2))
    aligned = daw.align_distribution(probs, labeled, unlabeled)
    assert aligned.dtype == probs.dtype and aligned.shape == probs.shape
    torch.testing.assert_close(aligned.sum(dim=1), torch.ones(2, 3, 5))
    for b, row, column in np.ndindex(2, 3, 5):
        scaled = [probs[b, c, row, column].item() * labeled[c].item() / unlabeled[c].item() for c in range(4)]
        assert aligned[b, :, row, column].tolist() == pytest.approx([value / sum(scaled) for value in scaled], rel=1e-5)
    # Only the proportions of the two means count, and equal means change nothing.
    torch.testing.assert_close(daw.align_distribution(probs, 3 * labeled, 0.2 * unlabeled), aligned)
    torch.testing.assert_close(daw.align_distribution(probs, labeled, labeled), probs)
    assert daw.align_distribution(probs[:, :, 0, 0], labeled, unlabeled).shape == (2, 4)


# ---------------------------------------------------------------- Eq. 5, 6: statistics


def draw_batch(seed, images=3, classes=5, height=7, width=6):
    """Predictions, labels and valid pixels; the first image is all right, and the last of several all ignored."""
    generator = torch.Generator().manual_seed(seed)
    labeled, unlabeled = ((2 * torch.randn(images, classes, height, width, generator=generator)).softmax(dim=1) for _ in range(2))
    label = torch.randint(classes, (images, height, width), generator=generator)
    label = torch.where(torch.rand(label.shape, generator=generator) < 0.5, labeled.argmax(dim=1), label)
    label[0] = labeled[0].argmax(dim=0)
    label[torch.rand(label.shape, generator=generator) < 0.2] = IGNORE
    if images > 2:
        label[-1] = IGNORE
    valid = torch.rand(label.shape, generator=generator) < 0.7
    return labeled, label.byte(), unlabeled, valid


class PlainStatistics:
    """Eq. 5, 6 and the means of Eq. 12, image by image and pixel by pixel."""

    def __init__(self, classes, momentum):
        self.mean, self.variance, self.momentum = [1 / classes] * 2, [1.0] * 2, momentum
        self.class_mean = [[1 / classes] * classes for _ in range(2)]

    def update(self, labeled, label, unlabeled, valid):
        labeled, label, unlabeled, valid = (tensor.tolist() for tensor in (labeled, label, unlabeled, valid))
        right, wrong = [], []  # confidences of each image
        vectors = [[], []]
        for image, truth in zip(labeled, label):
            right.append([]), wrong.append([])
            for row in range(len(truth)):
                for column in range(len(truth[0])):
                    if truth[row][column] != IGNORE:
                        q = [channel[row][column] for channel in image]
                        (right if q.index(max(q)) == truth[row][column] else wrong)[-1].append(max(q))
                        vectors[0].append(q)
        for image, flags in zip(unlabeled, valid):
            for row in range(len(flags)):
                for column in range(len(flags[0])):
                    if flags[row][column]:
                        vectors[1].append([channel[row][column] for channel in image])
        m = self.momentum
        for sign, groups in enumerate((right, wrong)):
            total = sum(len(group) for group in groups)
            groups = [group for group in groups if group]
            if total < 10:
                continue
            mean = sum(sum(group) / len(group) for group in groups) / len(groups)
            variance = sum(sum((p - mean) ** 2 for p in group) / len(group) for group in groups) / len(groups)
            self.mean[sign] = m * self.mean[sign] + (1 - m) * mean
            self.variance[sign] = m * self.variance[sign] + (1 - m) * total / (total - 1) * variance
        for part in range(2):
            if vectors[part]:
                means = [sum(values) / len(values) for values in zip(*vectors[part])]
                self.class_mean[part] = [m * old + (1 - m) * new for old, new in zip(self.class_mean[part], means)]

    def check(self, statistics, rel=1e-5):
        assert statistics.mean.tolist() == pytest.approx(self.mean, rel=rel)
        assert statistics.variance.tolist() == pytest.approx(self.variance, rel=rel)
        for ours, plain in zip(statistics.class_mean.tolist(), self.class_mean):
            assert ours == pytest.approx(plain, rel=rel)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
def test_statistics_equal_plain_loops(momentum):
    statistics, plain = daw.Statistics(5, momentum), PlainStatistics(5, momentum)
    plain.check(statistics)  # start: 1/C and 1.0
    for seed in range(3):
        batch = draw_batch(seed)
        before = [buffer.clone() for buffer in statistics.buffers()]
        statistics.after(daw.batch_sums(*batch))
        assert all(torch.equal(old, new) for old, new in zip(before, statistics.buffers()))  # `after` stores nothing
        statistics.update(daw.batch_sums(*batch))
        plain.update(*batch)
        plain.check(statistics)


def test_means_are_per_image_not_pooled():
    """One image of 20 wrong pixels and one of 10: Eq. 5 weighs the images alike."""
    confidence = torch.cat([torch.full((20,), 0.6), torch.full((10,), 0.9)])
    probs = torch.full((2, 2, 1, 20), 0.5)
    probs[0, 0, 0], probs[1, 0, 0, :10] = confidence[:20], confidence[20:]
    probs[:, 1] = 1 - probs[:, 0]
    label = torch.ones(2, 1, 20, dtype=torch.uint8)
    label[1, 0, 10:] = IGNORE
    statistics = daw.Statistics(2, 0.0)
    statistics.update(daw.batch_sums(probs, label, probs, torch.ones(2, 1, 20, dtype=torch.bool)))
    assert statistics.mean[1].item() == pytest.approx(0.75)  # pooled: 0.7
    assert statistics.variance[1].item() == pytest.approx(0.15**2 * 30 / 29, rel=1e-5)


@pytest.mark.parametrize("wrong, kept", [(0, True), (9, True), (10, False)])
def test_few_pixels_keep_the_old_values(wrong, kept):
    labeled, label, unlabeled, valid = draw_batch(5, images=1)
    label[0] = labeled[0].argmax(dim=0)
    label.view(-1)[:wrong] = (label.view(-1)[:wrong] + 1) % 5
    statistics = daw.Statistics(5, 0.9)
    statistics.update(daw.batch_sums(labeled, label, unlabeled, valid))
    assert (statistics.mean[1] == 1 / 5).item() is kept and (statistics.variance[1] == 1).item() is kept
    assert statistics.mean[0] != 1 / 5 and statistics.variance[0] != 1


def test_nothing_labeled_and_nothing_valid_keep_everything():
    labeled, label, unlabeled, valid = draw_batch(6)
    statistics = daw.Statistics(5, 0.9)
    expected = [buffer.clone() for buffer in statistics.buffers()]
    statistics.update(daw.batch_sums(labeled, torch.full_like(label, IGNORE), unlabeled, torch.zeros_like(valid)))
    statistics.update(statistics.empty_sums())
    for old, new in zip(expected, statistics.buffers()):
        torch.testing.assert_close(new, old, rtol=0, atol=0)


def test_sums_of_parts_add_up_to_those_of_the_batch():
    batch = draw_batch(7, images=4)
    whole = daw.batch_sums(*batch)
    assert whole.shape == daw.Statistics(5, 0.9).empty_sums().shape == (2, 10) and whole.dtype == torch.float64
    parts = sum(daw.batch_sums(*(tensor[part : part + 1] for tensor in batch)) for part in range(4))
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)


def test_class_means_read_valid_pixels_only():
    labeled, label, unlabeled, valid = draw_batch(8)
    sums = daw.batch_sums(labeled, label, unlabeled, valid)
    spoiled = torch.full_like(labeled, 0.2)
    changed = daw.batch_sums(torch.where((label == IGNORE)[:, None], spoiled, labeled), label,
                             torch.where(valid[:, None], unlabeled, spoiled), valid)
    assert torch.equal(sums, changed)


def test_the_variance_never_reaches_zero():
    probs = torch.zeros(1, 2, 5, 5)
    probs[:, 0] = 1
    statistics = daw.Statistics(2, 0.0)
    statistics.update(daw.batch_sums(probs, torch.zeros(1, 5, 5).byte(), probs, torch.ones(1, 5, 5).bool()))
    assert statistics.mean[0] == 1 and 0 < statistics.variance[0] < 1e-6
    assert 0 < daw.optimal_threshold(*(float(v[i]) for i in (0, 1) for v in (statistics.mean, statistics.variance)), 2) <= 1


def test_statistics_survive_a_checkpoint():
    statistics, restored = daw.Statistics(5, 0.9), daw.Statistics(5, 0.9)
    statistics.update(daw.batch_sums(*draw_batch(9)))
    restored.load_state_dict(statistics.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(statistics.buffers(), restored.buffers()))
    assert len(list(restored.buffers())) == 3


# ---------------------------------------------------------------- Eq. 1, 2: losses


def cross_entropy_and_gradient(logits, label):
    """-log softmax(logits)[label] of one pixel, and its gradient softmax - onehot, in plain numbers."""
    highest = max(logits)
    exponentials = [math.exp(value - highest) for value in logits]
    probs = [value / sum(exponentials) for value in exponentials]
    return -math.log(probs[label]), [p - (c == label) for c, p in enumerate(probs)]


def plain_loss(logits, label, weight):
    """Sum of weight x cross entropy and its gradient [B, C, H, W], pixel by pixel; label may be 255 where weight is 0."""
    total, gradient = 0.0, torch.zeros_like(logits)
    for b, row, column in np.ndindex(*label.shape):
        w = float(weight[b, row, column])
        if w:
            loss, slope = cross_entropy_and_gradient(logits[b, :, row, column].tolist(), int(label[b, row, column]))
            total += w * loss
            gradient[b, :, row, column] = w * torch.tensor(slope)
    return total, gradient


def test_losses_and_their_gradients_equal_plain_formulas():
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 4, 3, 5, generator=generator)).requires_grad_()
    label = torch.randint(4, (2, 3, 5), generator=generator, dtype=torch.uint8)
    label[torch.rand(label.shape, generator=generator) < 0.3] = IGNORE
    loss = daw.supervised_loss(logits, label)
    (gradient,) = torch.autograd.grad(loss, logits)
    expected, expected_gradient = plain_loss(logits.detach(), label, label != IGNORE)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
    assert not gradient.permute(0, 2, 3, 1)[label == IGNORE].any()

    pseudo_label = torch.randint(4, (2, 3, 5), generator=generator)
    weight = torch.rand(2, 3, 5, generator=generator) * (torch.rand(2, 3, 5, generator=generator) < 0.6)
    loss = daw.weighted_loss(logits, pseudo_label, weight)
    (gradient,) = torch.autograd.grad(loss, logits)
    expected, expected_gradient = plain_loss(logits.detach(), pseudo_label, weight)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
    assert not gradient.permute(0, 2, 3, 1)[weight == 0].any()

    everything_ignored = daw.supervised_loss(logits, torch.full_like(label, IGNORE))
    assert everything_ignored.item() == 0 and everything_ignored.requires_grad


def test_weights_of_table_1():
    confidence = torch.tensor([[0.2, 0.95, 0.5], [0.94, 1.0, 0.6]])
    assert daw.pseudo_label_weight(confidence, "none", None).tolist() == [[1, 1, 1], [1, 1, 1]]
    assert daw.pseudo_label_weight(confidence, "fixed", 0.95).tolist() == [[0, 1, 0], [0, 1, 0]]
    torch.testing.assert_close(daw.pseudo_label_weight(confidence, "power", None), confidence * confidence)
    by_tensor = daw.pseudo_label_weight(confidence, "daw", torch.tensor(0.55, dtype=torch.float64))
    assert by_tensor.tolist() == [[0, 1, 0], [1, 1, 1]] and by_tensor.dtype == torch.float32


class Playback(nn.Module):
    """A "network" that answers with prepared logits, so that each use of each view has its own gradient."""

    def __init__(self, labeled_and_weak, perturbed, strong):
        super().__init__()
        self.first, self.perturbed, self.strong = (nn.Parameter(logits) for logits in (labeled_and_weak, perturbed, strong))

    def forward(self, images, perturb=0):
        if perturb:
            assert len(images) == len(self.first) and perturb == len(self.perturbed)
            return self.first, self.perturbed
        assert len(images) == len(self.strong)
        return self.strong


def playback_and_views(seed, size=3, classes=4, height=4, width=5, device="cpu"):
    """(network, views): random logits, labels, padding and CutMix boxes for `size` labeled and `size` unlabeled images."""
    generator = torch.Generator().manual_seed(seed)

    def logits(images):
        return 2 * torch.randn(images, classes, height, width, generator=generator)

    def flags(share):
        return torch.rand(size, height, width, generator=generator) < share

    label = torch.randint(classes, (size, height, width), generator=generator, dtype=torch.uint8)
    label[flags(0.2)] = IGNORE
    truth = torch.randint(classes, (size, height, width), generator=generator, dtype=torch.uint8)
    truth[flags(0.2)] = IGNORE
    image = torch.zeros(size, 3, height, width)
    views = {"labeled": image, "label": label, "weak": image, "valid": flags(0.8), "strong_1": image, "strong_2": image, "truth": truth}
    for view in ("strong_1", "strong_2"):
        boxes = torch.zeros(size, height, width, dtype=torch.bool)
        boxes[0, 1:3, 1:4] = boxes[1, 0:4, 2:4] = boxes[size - 1, 1:, :3] = True
        views[view + "_boxes"] = boxes if view == "strong_1" else boxes.flip(0)
        views[view + "_valid"] = torch.where(views[view + "_boxes"], views["valid"].roll(1, 0), views["valid"])
    network = Playback(logits(2 * size), logits(size), logits(2 * size))
    return network.to(device), {name: value.to(device) for name, value in views.items()}


def settled_statistics(momentum=0.9, classes=4, means=(0.85, 0.6), variances=(0.02, 0.03)):
    """Statistics as after some training, and the plain ones in the same state."""
    statistics, plain = daw.Statistics(classes, momentum), PlainStatistics(classes, momentum)
    plain.mean, plain.variance = list(means), list(variances)
    plain.class_mean = [[0.4, 0.3, 0.2, 0.1], [0.2, 0.2, 0.25, 0.35]]
    for buffer, value in zip((statistics.mean, statistics.variance, statistics.class_mean), (plain.mean, plain.variance, plain.class_mean)):
        buffer.copy_(torch.tensor(value, dtype=torch.float64))
    return statistics, plain


def one_part(network, views, statistics, config):
    return daw.daw_loss(network, views, daw.pixel_counts([views]), statistics, statistics.empty_sums(), config)


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("weighting", daw.WEIGHTINGS)
def test_daw_loss_equals_plain_loops(weighting, align):
    """Eq. 1-13 pixel by pixel: thresholds, alignment, CutMix labels from the neighbour, averages, and where gradients go."""
    network, views = playback_and_views(seed=1)
    size, classes, height, width = network.perturbed.shape
    statistics, plain = settled_statistics()
    config = daw.Config(weighting=weighting, align=align, threshold=0.8)
    loss, terms, observed = one_part(network, views, statistics, config)
    loss.backward()

    # The labeled statistics include this batch; the pseudo labels come from the weak view.
    probs = network.first.detach().softmax(dim=1)
    plain.update(probs[:size], views["label"], probs[size:], views["valid"])
    threshold = {"fixed": 0.8}.get(weighting)
    if weighting == "daw":
        threshold = overtaking_by_bisection(plain.mean[0], plain.variance[0], plain.mean[1], plain.variance[1], classes)
    pseudo_label, weight = torch.zeros(size, height, width, dtype=torch.long), torch.zeros(size, height, width)
    for b, row, column in np.ndindex(size, height, width):
        q = probs[size + b, :, row, column].tolist()
        if align:
            q = [value * l / u for value, l, u in zip(q, *plain.class_mean)]
            q = [value / sum(q) for value in q]
        pseudo_label[b, row, column] = q.index(max(q))
        f = {"none": 1.0, "power": max(q) ** 2}.get(weighting, float(max(q) >= (threshold or 0)))
        weight[b, row, column] = f * float(views["valid"][b, row, column])
    assert 0 < (weight > 0).sum() and (weighting in ("none", "power") or (weight[views["valid"]] == 0).any())

    seen = views["label"] != IGNORE
    loss_sup, slope_sup = plain_loss(network.first.detach()[:size], views["label"], seen)
    loss_sup, slope_sup = loss_sup / seen.sum().item(), slope_sup / seen.sum()
    valid = views["valid"].sum()
    loss_perturbed, slope_perturbed = plain_loss(network.perturbed.detach(), pseudo_label, weight)
    loss_perturbed, slope_perturbed = loss_perturbed / valid.item(), slope_perturbed / valid
    loss_strong, slope_strong = [], []
    for number, view in enumerate(("strong_1", "strong_2")):
        mixed_label, mixed_weight, mixed_valid = pseudo_label.clone(), weight.clone(), views["valid"].clone()
        for b, row, column in np.ndindex(size, height, width):
            if views[view + "_boxes"][b, row, column]:
                neighbour = (b - 1) % size
                mixed_label[b, row, column] = pseudo_label[neighbour, row, column]
                mixed_weight[b, row, column] = weight[neighbour, row, column]
                mixed_valid[b, row, column] = views["valid"][neighbour, row, column]
        value, slope = plain_loss(network.strong.detach()[number * size : (number + 1) * size], mixed_label, mixed_weight)
        loss_strong.append(value / mixed_valid.sum().item())
        slope_strong.append(slope / mixed_valid.sum())
    loss_unsup = 0.5 * (0.5 * loss_strong[0] + 0.5 * loss_strong[1]) + 0.5 * loss_perturbed

    assert terms["loss_sup"].item() == pytest.approx(loss_sup, rel=1e-5)
    assert terms["loss_unsup"].item() == pytest.approx(loss_unsup, rel=1e-5)
    assert loss.item() == terms["loss"].item() == pytest.approx((loss_sup + loss_unsup) / 2, rel=1e-5)
    assert terms["used"].item() == pytest.approx((weight.sum() / valid).item(), rel=1e-5)
    known = weight * (views["truth"] != IGNORE)
    assert terms["used_known"].item() == pytest.approx(known.sum().item(), rel=1e-5)
    assert terms["used_right"].item() == pytest.approx(known[pseudo_label == views["truth"]].sum().item(), rel=1e-5)

    close = {"rtol": 1e-4, "atol": 1e-7}
    torch.testing.assert_close(network.first.grad[:size], slope_sup / 2, **close)
    assert not network.first.grad[size:].any()  # no gradient through pseudo labels
    torch.testing.assert_close(network.perturbed.grad, slope_perturbed / 4, **close)
    torch.testing.assert_close(network.strong.grad, torch.cat(slope_strong) / 8, **close)
    statistics.update(observed)
    plain.check(statistics)


@pytest.mark.parametrize("weighting", ["fixed", "daw"])
def test_a_batch_without_a_confident_pixel_still_trains(weighting):
    network, views = playback_and_views(seed=2)
    with torch.no_grad():
        network.first *= 0.01  # every confidence is about 1/4
    statistics, _ = settled_statistics(momentum=1.0, means=(0.95, 0.5), variances=(0.001, 0.01))
    loss, terms, _ = one_part(network, views, statistics, daw.Config(weighting=weighting, align=False, threshold=0.95))
    loss.backward()
    assert terms["used"] == 0 and terms["loss_unsup"] == 0
    assert loss.item() == pytest.approx(terms["loss_sup"].item() / 2) and loss.item() > 0.5
    assert network.first.grad[:3].any() and network.first.grad.isfinite().all()
    assert not network.perturbed.grad.any() and not network.strong.grad.any()


def test_nothing_labeled_or_nothing_valid_gives_zero_not_nan():
    network, views = playback_and_views(seed=3)
    views["label"] = torch.full_like(views["label"], IGNORE)
    for name in ("valid", "strong_1_valid", "strong_2_valid"):
        views[name] = torch.zeros_like(views[name])
    statistics, _ = settled_statistics()
    loss, terms, observed = one_part(network, views, statistics, daw.Config(align=True, threshold=0.95))
    loss.backward()
    assert loss == 0 and all(parameter.grad.isfinite().all() for parameter in network.parameters())
    statistics.update(observed)
    assert all(buffer.isfinite().all() for buffer in statistics.buffers())


@pytest.mark.parametrize("weighting", daw.WEIGHTINGS)
def test_a_step_reads_nothing_back_from_the_device(weighting):
    """On the meta device tensors have no values: .item(), boolean indexing and branches on values raise there."""
    network, views = playback_and_views(seed=4, device="meta")
    statistics = daw.Statistics(4, 0.9).to("meta")
    loss, terms, observed = one_part(network, views, statistics, daw.Config(weighting=weighting, align=True, threshold=0.95))
    loss.backward()
    statistics.update(observed)
    assert loss.device.type == "meta" and {value.dim() for value in terms.values()} == {0}
    with pytest.raises(Exception):
        loss.item()


# ---------------------------------------------------------------- views and accumulation


class Pointwise(nn.Module):
    """A linear classifier of each pixel's colour; its "perturbed features" are the colours times a constant."""

    def __init__(self, classes=4, gain=6.0):
        super().__init__()
        weight = gain * torch.randn(classes, 3, 1, 1, generator=torch.Generator().manual_seed(0))
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(torch.zeros(classes))

    def forward(self, images, perturb=0):
        logits = F.conv2d(images, self.weight, self.bias)
        return (logits, F.conv2d(0.5 * images[-perturb:], self.weight, self.bias)) if perturb else logits


def draw_training_batch(seed, size=4, crop=16, classes=4):
    """What the loader gives. Images differ in how much of them is labeled and valid."""
    generator = torch.Generator().manual_seed(seed)
    batch = {name: torch.randint(256, (size, 3, crop, crop), generator=generator, dtype=torch.uint8) for name in ("labeled", "unlabeled")}
    for name in ("label", "truth"):
        batch[name] = torch.randint(classes, (size, crop, crop), generator=generator, dtype=torch.uint8)
    batch["valid"] = torch.zeros(size, crop, crop, dtype=torch.bool)
    for number in range(size):
        batch["valid"][number, : 4 * (number + 1)] = True
        batch["label"][number, :, 3 * number + 2 :] = IGNORE
    return batch


def test_strong_views_show_and_are_labeled_as_the_neighbour_inside_the_box(monkeypatch):
    monkeypatch.setattr(augment, "strong_augment", lambda x, blur_sigma: x)
    config = daw.Config(weighting="none", align=False, crop=16, threshold=0.95)
    batch = draw_training_batch(0)
    torch.manual_seed(3)
    views = daw.make_views(batch, config, BLUR)
    weak = augment.normalize(batch["unlabeled"])
    mixed = 0
    for view in ("strong_1", "strong_2"):
        boxes = views[view + "_boxes"]
        mixed += int(boxes.flatten(1).any(dim=1).sum())
        for image in range(4):
            inside = boxes[image]
            torch.testing.assert_close(views[view][image][:, inside], weak[image - 1][:, inside])
            torch.testing.assert_close(views[view][image][:, ~inside], weak[image][:, ~inside])
            assert torch.equal(views[view + "_valid"][image][inside], batch["valid"][image - 1][inside])
            assert torch.equal(views[view + "_valid"][image][~inside], batch["valid"][image][~inside])
    assert mixed >= 3
    assert not torch.equal(views["strong_1_boxes"], views["strong_2_boxes"])
    torch.testing.assert_close(views["weak"], weak)

    # Without photometry a pixelwise network says the same about a pixel wherever CutMix puts it, so with the right labels
    # the strong loss is the mean of -log(confidence), and any other label would cost more.
    network, confidence = Pointwise(), []
    for view in ("strong_1", "strong_2"):
        probs = network(views[view]).softmax(dim=1).amax(dim=1)
        confidence.append(-probs.log()[views[view + "_valid"]].mean().item())
    perturbed = network(torch.cat([weak, weak]), perturb=4)[1]
    loss_perturbed = F.cross_entropy(perturbed, network(weak).argmax(dim=1), reduction="none")[batch["valid"]].mean().item()
    terms = one_part(network, views, daw.Statistics(4, 0.9), config)[1]
    assert terms["loss_unsup"].item() == pytest.approx(sum(confidence) / 4 + loss_perturbed / 2, rel=1e-5)


def test_supervised_views_hold_labeled_images_only():
    batch = draw_training_batch(1)
    plain = daw.make_views(batch, daw.Config(supervised=True, crop=16), BLUR)
    assert plain.keys() == {"labeled", "label"}
    torch.testing.assert_close(plain["labeled"], augment.normalize(batch["labeled"]))
    strong = daw.make_views(batch, daw.Config(supervised=True, strong_labeled=True, crop=16), BLUR)
    assert not torch.allclose(strong["labeled"], plain["labeled"]) and torch.equal(strong["label"], batch["label"])


def accumulate(batch, parts, config, statistics):
    """The gradient part of train's loop: (logged terms, gradients, statistics after the step)."""
    network = Pointwise()
    views = [daw.make_views(part, config, BLUR) for part in runtime.split_batch(batch, parts, torch.device("cpu"))]
    counts = daw.pixel_counts(views)
    observed, logged = statistics.empty_sums(), {}
    for part in views:
        loss, terms, observed = daw.daw_loss(network, part, counts, statistics, observed, config)
        loss.backward()
        logged = {name: value.item() + logged.get(name, 0.0) for name, value in terms.items()}
    return logged, [parameter.grad for parameter in network.parameters()], statistics.after(observed)


@pytest.mark.parametrize("weighting, align, momentum", [
    ("none", False, 0.9), ("fixed", False, 0.9), ("power", False, 0.9), ("daw", True, 1.0), ("fixed", True, 1.0)])
def test_accumulated_parts_equal_the_whole_batch(monkeypatch, weighting, align, momentum):
    """CutMix off, photometry fixed, no batch norm. Momentum 1: the parts see the same t* and the same class means."""
    monkeypatch.setattr(augment, "strong_augment", lambda x, blur_sigma: 1 - x)
    monkeypatch.setattr(augment, "cutmix_boxes", lambda batch, size, device: torch.zeros(batch, size, size, dtype=torch.bool))
    config = daw.Config(weighting=weighting, align=align, threshold=0.8, crop=16)
    batch = draw_training_batch(2)
    whole, whole_gradients, whole_statistics = accumulate(batch, 1, config, settled_statistics(momentum)[0])
    assert 0.05 < whole["used"] and (weighting in ("none", "power") or whole["used"] < 0.95)
    for parts in (2, 4):
        logged, gradients, statistics = accumulate(batch, parts, config, settled_statistics(momentum)[0])
        assert logged == pytest.approx(whole, rel=1e-5)
        for ours, theirs in zip(gradients + list(statistics), whole_gradients + list(whole_statistics)):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_accumulated_statistics_equal_the_whole_batchs_with_daw(monkeypatch):
    monkeypatch.setattr(augment, "cutmix_boxes", lambda batch, size, device: torch.zeros(batch, size, size, dtype=torch.bool))
    config = daw.Config(weighting="daw", align=True, threshold=0.8, crop=16)
    batch = draw_training_batch(3)
    expected = accumulate(batch, 1, config, settled_statistics(0.5)[0])[2]
    for ours, theirs in zip(accumulate(batch, 4, config, settled_statistics(0.5)[0])[2], expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


# ---------------------------------------------------------------- picture


def test_distributions_are_drawn_from_the_log(tmp_path):
    pytest.importorskip("matplotlib")
    statistics = settled_statistics()[0]
    lines = [{"iteration": 20 * (number + 1), "loss": 1.0, **daw.report(statistics, {}, daw.Config(threshold=0.95))} for number in range(3)]
    log = tmp_path / "metrics.jsonl"
    log.write_text(json.dumps({"iteration": 20, "miou": 5.0}) + "\n")
    daw.plot_distributions(tmp_path)  # a supervised run has no Gaussians: nothing to draw
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    daw.plot_distributions(tmp_path)
    assert (tmp_path / "distributions.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2
