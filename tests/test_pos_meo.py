"""pos_meo.py against other ways to the same numbers: a search for the shortest vector, autograd.grad, plain loops, daw.py."""

import contextlib
import copy
import dataclasses
import functools
import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import daw
import pos_meo
from common import evaluate, landscape, predict, runtime, synthetic
from common.files import FORMAT
from pos_meo import STATISTICS, SUP, UNSUP
import programs
from programs import assert_identical, kill_after_first_checkpoint, state, succeed

ALONE = runtime.Context(0, 1, torch.device("cpu"))
IGNORE = 255
BLUR = (0.1, 1.0)
BASELINES = ("unimatch_v1", "unimatch_v2")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- Eq. 5, 6: the weights


def alpha_by_search(g_sup, g_unsup):
    """alpha_u of the shortest vector of the segment: a fine grid, then golden section around its best point."""
    a, b = g_sup.double().numpy(), g_unsup.double().numpy()

    def length(alpha):
        return np.linalg.norm((1 - alpha) * a + alpha * b)

    grid = np.linspace(0, 1, 401)
    best = int(np.argmin([length(alpha) for alpha in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, 400)]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(50):
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if length(left) < length(right) else (left, high)
    return min((0.0, 1.0, (low + high) / 2), key=length)  # golden section never reaches an end


def alpha_by_projection(g_sup, g_unsup):
    """alpha_u by least squares on the line through both gradients, then cut to the segment."""
    a, b = g_sup.double(), g_unsup.double()
    return min(max(torch.linalg.lstsq((b - a)[:, None], -a[:, None]).solution.item(), 0.0), 1.0)


def random_pairs(count, seed, sizes=(1, 2, 3, 10, 1000)):
    """Pairs of float32 gradients, `count` times: all angles, one up to a thousand times the other, of many sizes."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        ours, other = rng.standard_normal((2, sizes[number % len(sizes)]))
        cosine, ratio, scale = rng.uniform(-1, 1), 10 ** rng.uniform(-3, 3), 10 ** rng.uniform(-6, 3)
        pair = scale * ours, scale * ratio * (cosine * ours + math.sqrt(1 - cosine**2) * other)
        yield tuple(torch.from_numpy(vector).float() for vector in (pair if number % 2 else pair[::-1]))


def pair_at(angle, ratio, size=50, seed=0):
    """Gradients of lengths 1 and `ratio` at this angle, float32."""
    basis = torch.linalg.qr(torch.randn(size, 2, generator=seeded(seed), dtype=torch.float64)).Q
    return basis[:, 0].float(), (ratio * (math.cos(angle) * basis[:, 0] + math.sin(angle) * basis[:, 1])).float()


def weights_of(g_sup, g_unsup):
    weights = pos_meo.pareto_weights(g_sup, g_unsup)
    assert isinstance(weights, tuple) and all(weight.dim() == 0 and weight.dtype == torch.float64 for weight in weights)
    assert all(0 <= weight <= 1 for weight in weights) and sum(weights) == 1
    return [weight.item() for weight in weights]


def test_weights_give_the_shortest_vector_of_the_segment():
    seen = {"inside": 0, "g_sup": 0, "g_unsup": 0}
    for pair in random_pairs(250, seed=1):
        expected = alpha_by_search(*pair)
        assert alpha_by_projection(*pair) == pytest.approx(expected, abs=1e-6)
        assert weights_of(*pair) == pytest.approx([1 - expected, expected], abs=1e-6)
        seen["g_sup" if expected == 0 else "g_unsup" if expected == 1 else "inside"] += 1
    assert min(seen.values()) > 30, seen


@pytest.mark.parametrize("size", [1, 2, 7, 1000, 12345])
def test_weights_of_parallel_opposite_and_zero_gradients(size):
    g, zero = torch.randn(size, generator=seeded(size)), torch.zeros(size)
    assert weights_of(g, 2 * g) == [1, 0] and weights_of(g, 0.5 * g) == [0, 1]  # the shorter one
    assert weights_of(g, g) == [0.5, 0.5]
    assert weights_of(g, -g) == pytest.approx([0.5, 0.5], abs=1e-12)
    assert weights_of(g, -3 * g) == pytest.approx([0.75, 0.25], abs=1e-6)
    # A minimum-norm point of zero would stop the other loss.
    assert weights_of(g, zero) == weights_of(zero, g) == weights_of(zero, zero) == [0.5, 0.5]
    assert weights_of(1e-20 * g, -3e-20 * g) == pytest.approx([0.75, 0.25], abs=1e-6)


@pytest.mark.parametrize("difference", [2**-7, 2**-10, 2**-13, 2**-17])
def test_weights_of_nearly_equal_and_nearly_opposite_gradients(difference):
    """Where float32 products would cancel: |g_s - g_u| is down to 1e-5 of |g_s|. Small powers of two, so nothing is rounded here."""
    across = torch.randint(-8, 9, (10_000,), generator=seeded(3)).repeat_interleave(2).float() / 4
    base = torch.tensor([1.0, -1.0]).repeat(10_000)  # at right angles to `across`
    for foot in (0.25, 0.5, 0.75):  # where on the line the shortest vector ends
        g_sup, g_unsup = base - foot * difference * across, base + (1 - foot) * difference * across
        assert weights_of(g_sup, g_unsup)[UNSUP] == pytest.approx(foot, abs=1e-4)

        g_unsup = -2 * g_unsup
        a, b = g_sup.double(), g_unsup.double()
        expected = alpha_by_projection(g_sup, g_unsup)
        assert weights_of(g_sup, g_unsup)[UNSUP] == pytest.approx(expected, abs=1e-7)
        products = pos_meo.inner_products(g_sup, g_unsup)
        magnified = pos_meo.magnification(products, pos_meo.minimum_norm_weights(products)).item()
        shortest = torch.linalg.norm((1 - expected) * a + expected * b).item()
        assert magnified == pytest.approx(torch.linalg.norm((a + b) / 2).item() / shortest, rel=1e-4)


def capped_by_search(g_sup, g_unsup, cap, nodes=4001):
    """alpha_u on a grid: of the steps that harm no loss the shortest whose weights are within the cap, or else the one closest to it."""
    a, b = g_sup.double(), g_unsup.double()
    alphas = torch.linspace(0, 1, nodes, dtype=torch.float64)
    steps = (1 - alphas)[:, None] * a + alphas[:, None] * b
    scale = torch.linalg.norm(a) * torch.linalg.norm(b)
    harmless = torch.minimum(steps @ a, steps @ b) >= -1e-3 / nodes * scale
    excess = (torch.maximum(alphas, 1 - alphas) - cap).clamp(min=1e-9)
    excess[~harmless] = torch.inf
    lengths = torch.linalg.norm(steps, dim=1)
    lengths[excess > excess.min()] = torch.inf
    return alphas[lengths.argmin()].item()


@pytest.mark.parametrize("cap", [0.5, 0.8, 0.95])
def test_capped_weights_are_those_of_a_search_and_harm_no_loss(cap):
    seen = {"Eq. 6": 0, "cap": 0, "harm": 0}
    for number, cosine in enumerate(np.linspace(-0.95, 0.95, 20)):
        for ratio in (0.03, 0.3, 0.8, 1.0, 1.5, 5.0, 40.0):
            pair = pair_at(math.acos(cosine), ratio, seed=number)
            products = pos_meo.inner_products(*pair)
            weights = pos_meo.minimum_norm_weights(products, cap)
            assert weights.sum() == 1 and weights.min() >= 0
            assert weights[UNSUP].item() == pytest.approx(capped_by_search(*pair, cap), abs=1e-3), (cosine, ratio)
            step = sum(weight * g.double() for weight, g in zip(weights, pair))
            assert all(step @ g.double() >= -1e-9 * torch.linalg.norm(step) * torch.linalg.norm(g) for g in pair)
            of_eq_6 = abs(weights[UNSUP].item() - alpha_by_projection(*pair)) < 1e-6
            within = max(weights) <= cap + 1e-6
            assert of_eq_6 or max(weights) >= cap - 1e-6  # changed only as far as needed
            seen["Eq. 6" if of_eq_6 else "cap" if within else "harm"] += 1
            for strategy in pos_meo.PARETO:
                ours = pos_meo.strategy_weights(products, strategy, cap=cap)
                assert (ours[UNSUP] / ours.sum()).item() == pytest.approx(weights[UNSUP].item(), abs=1e-12)
            statistics = pos_meo.gradient_statistics(products, weights, cap)
            assert statistics[STATISTICS.index("alpha_unsup")].item() == pytest.approx(weights[UNSUP].item(), abs=1e-6)
    assert min(seen.values()) > 5, seen
    g, zero = torch.randn(9, generator=seeded(6)), torch.zeros(9)
    for pair in ((g, zero), (zero, g), (zero, zero), (g, g), (g, -g)):
        assert pos_meo.minimum_norm_weights(pos_meo.inner_products(*pair), cap).tolist() == pytest.approx([0.5, 0.5], abs=1e-12)


@pytest.mark.parametrize("chunk", [1, 7, 50, 64, 2**20])
def test_inner_products_are_those_of_float64_whatever_the_chunk(chunk, monkeypatch):
    monkeypatch.setattr(pos_meo, "CHUNK", chunk)
    for pair in random_pairs(12, seed=2, sizes=(1, 49, 50, 640)):
        products = pos_meo.inner_products(*pair)
        vectors = [vector.double().numpy() for vector in pair]
        scale = np.outer(*2 * [[np.linalg.norm(vector) for vector in vectors]])
        np.testing.assert_allclose(products.numpy() / scale, [[a @ b for b in vectors] for a in vectors] / scale, rtol=0, atol=1e-14)
        assert products.dtype == torch.float64 and products[SUP, UNSUP] == products[UNSUP, SUP]


# ---------------------------------------------------------------- Eq. 5, 13: the step


@pytest.mark.parametrize("ratio", [0.02, 0.5, 1.0, 1.3, 40.0])
def test_no_step_harms_a_loss_and_meo_has_the_uniform_steps_length(ratio, monkeypatch):
    harmful = 0
    for number, angle in enumerate(np.linspace(0.01, math.pi - 0.02, 40)):
        g_sup, g_unsup = pair_at(angle, ratio, seed=number)
        shortest = pos_meo.integrate_gradients(g_sup, g_unsup, magnitude_enhancement=False)
        enhanced = pos_meo.integrate_gradients(g_sup, g_unsup)
        assert shortest.dtype == enhanced.dtype == torch.float32 and enhanced.shape == g_sup.shape
        uniform = (g_sup + g_unsup) / 2
        for g in (g_sup, g_unsup):
            for step in (shortest, enhanced):
                assert F.cosine_similarity(step.double(), g.double(), dim=0) >= -1e-5, (angle, ratio)
            harmful += bool(uniform @ g < 0)
        assert torch.linalg.norm(enhanced).item() == pytest.approx(torch.linalg.norm(uniform).item(), rel=1e-5)
        torch.testing.assert_close(F.normalize(enhanced, dim=0), F.normalize(shortest, dim=0), rtol=0, atol=1e-5)
        for alpha in np.linspace(0, 1, 21):
            assert torch.linalg.norm(shortest) <= torch.linalg.norm((1 - alpha) * g_sup + alpha * g_unsup) + 1e-6
        with monkeypatch.context() as patch:
            patch.setattr(pos_meo, "CHUNK", 8)
            torch.testing.assert_close(pos_meo.integrate_gradients(g_sup, g_unsup), enhanced, rtol=1e-5, atol=1e-7)
    assert harmful > 0 or ratio == 1.0  # the uniform step does harm one


def test_a_stationary_point_gives_a_zero_step():
    g = torch.randn(300, generator=seeded(4))
    for ratio in (1.0, 2.0, 1.7, 0.013):
        assert not pos_meo.integrate_gradients(g, -ratio * g).any()
        shortest = pos_meo.integrate_gradients(g, -ratio * g, magnitude_enhancement=False)
        assert torch.linalg.norm(shortest) < 1e-6 * torch.linalg.norm(g)
    zero = torch.zeros(300)
    for enhance in (True, False):
        assert not pos_meo.integrate_gradients(zero, zero, enhance).any()
        for pair in ((g, zero), (zero, g)):  # no loss is stopped by the other's zero
            torch.testing.assert_close(pos_meo.integrate_gradients(*pair, enhance), g / 2)


# ---------------------------------------------------------------- strategies, statistics


def steps_written_out(g_sup, g_unsup, fixed):
    """{strategy: its step} of float64 gradients."""
    alpha = alpha_by_projection(g_sup, g_unsup)
    uniform, shortest = (g_sup + g_unsup) / 2, (1 - alpha) * g_sup + alpha * g_unsup
    return {"uniform": uniform, "fixed": (fixed[0] * g_sup + fixed[1] * g_unsup) / sum(fixed), "pos": shortest,
            "pos_meo": shortest * torch.linalg.norm(uniform) / torch.linalg.norm(shortest)}


def cosine(a, b):
    return F.cosine_similarity(a, b, dim=0, eps=1e-40).item()


def test_strategies_and_statistics_equal_those_of_the_vectors():
    conflicts = 0
    for pair in random_pairs(60, seed=5, sizes=(3, 10, 400)):
        products = pos_meo.inner_products(*pair)
        g_sup, g_unsup = (g.double() for g in pair)
        fixed = (2.0, 6.0)
        steps = steps_written_out(g_sup, g_unsup, fixed)
        assert steps.keys() == set(pos_meo.STRATEGIES)
        uniform, shortest = steps["uniform"], steps["pos"]
        conflicts += cosine(g_sup, g_unsup) < 0
        for strategy, step in steps.items():
            weights = pos_meo.strategy_weights(products, strategy, fixed)
            assert weights.shape == (2,) and weights.dtype == torch.float64
            torch.testing.assert_close(weights[SUP] * g_sup + weights[UNSUP] * g_unsup, step, rtol=0,
                                       atol=1e-6 * torch.linalg.norm(step).item())
            statistics = pos_meo.gradient_statistics(products, weights)
            assert statistics.shape == (7,) and statistics.dtype == torch.float32
            expected = {
                "cosine": cosine(g_sup, g_unsup), "norm_sup": torch.linalg.norm(g_sup).item(), "norm_unsup": torch.linalg.norm(g_unsup).item(),
                "alpha_unsup": alpha_by_projection(g_sup, g_unsup),
                "lambda": (torch.linalg.norm(uniform) / torch.linalg.norm(shortest)).item(),
                "min_cosine_uniform": min(cosine(uniform, g_sup), cosine(uniform, g_unsup)),
                "min_cosine": min(cosine(step, g_sup), cosine(step, g_unsup))}
            assert dict(zip(STATISTICS, statistics.tolist())) == pytest.approx(expected, rel=1e-5, abs=2e-6)
    assert 20 < conflicts < 40


def test_fixed_weights_sum_to_one():
    products = torch.eye(2, dtype=torch.float64)
    for fixed in ((2.0, 1.0), (4.0, 2.0)):
        assert pos_meo.strategy_weights(products, "fixed", fixed).tolist() == pytest.approx([2 / 3, 1 / 3])
    assert pos_meo.strategy_weights(products, "fixed", (1.0, 0.0)).tolist() == [1, 0]  # labels alone
    assert pos_meo.strategy_weights(products, "uniform").tolist() == [0.5, 0.5]


@pytest.mark.parametrize("strategy", pos_meo.STRATEGIES)
def test_statistics_of_zero_and_opposite_gradients_are_finite(strategy):
    g, zero = torch.randn(9, generator=seeded(6)), torch.zeros(9)
    for pair in ((g, zero), (zero, g), (zero, zero), (g, g), (g, -g)):
        products = pos_meo.inner_products(*pair)
        weights = pos_meo.strategy_weights(products, strategy, (1.0, 2.0))
        statistics = dict(zip(STATISTICS, pos_meo.gradient_statistics(products, weights).tolist()))
        assert weights.isfinite().all() and all(map(math.isfinite, statistics.values()))
        assert [statistics["norm_sup"], statistics["norm_unsup"]] == pytest.approx([torch.linalg.norm(g).item() for g in pair])
        assert statistics["alpha_unsup"] == 0.5
        if not all(g.any() for g in pair):
            assert statistics["cosine"] == statistics["min_cosine"] == statistics["min_cosine_uniform"] == 0
    assert statistics["cosine"] == pytest.approx(-1) and statistics["lambda"] == 0


def test_summary_of_a_table_by_hand():
    nothing = [math.nan] * 7
    steps = torch.tensor([
        # cosine, norm_sup, norm_unsup, alpha_unsup, lambda, min_cosine_uniform, min_cosine
        [0.5, 1.0, 3.0, 0.25, 1.5, 0.2, 0.6], nothing, [-0.5, 3.0, 1.0, 0.75, 2.5, -0.3, 0.1], nothing,
        [-0.1, 2.0, 1.0, 0.5, 2.0, 0.4, -1e-7], [0.3, 2.0, 1.0, 1.0, 1.0, 0.1, -0.02], nothing])  # -1e-7 is rounding, -0.02 harms
    summary = pos_meo.summarize(steps)
    assert summary == pytest.approx({
        "cosine": 0.05, "norm_sup": 2.0, "norm_unsup": 1.5, "alpha_unsup": 0.625, "lambda": 1.75, "min_cosine_uniform": 0.1,
        "min_cosine": 0.17, "norm_sup_variance": 2 / 3, "norm_unsup_variance": 1.0, "lowest_min_cosine_uniform": -0.3,
        "lowest_min_cosine": -0.02, "conflict": 0.5, "harmful_uniform": 0.25, "harmful": 0.25, "remark_1": 0.75, "remark_2": 0.5},
        rel=1e-5)
    assert all(type(value) is float for value in summary.values())
    json.dumps(pos_meo.summarize(steps[:1]), allow_nan=False)  # the variance of one step is no number
    assert pos_meo.summarize(steps[1:2]) == pos_meo.summarize(steps[:0]) == {}


def test_a_line_of_the_log_has_the_steps_since_the_last_one():
    history, rows = nn.Module(), torch.rand(10, 7, generator=seeded(7))
    history.steps = torch.full((10, 7), math.nan)
    history.steps[2:] = rows[2:]
    config = pos_meo.Config(log_every=4)
    line = pos_meo.report(history, 7, {"used_known": 40.0, "used_right": 30.0}, config)
    assert line["norm_sup"] == pytest.approx(rows[4:8, 1].mean().item(), rel=1e-5) and line["used_accuracy"] == 0.75
    for iteration, measured in ((3, rows[2:4]), (9, rows[8:])):  # a run's last line may come early
        assert pos_meo.report(history, iteration, {}, config)["norm_sup"] == pytest.approx(measured[:, 1].mean().item(), rel=1e-5)
    assert pos_meo.report(history, 1, {"used_known": 0.0, "used_right": 0.0}, config) == {}


def test_gradients_are_drawn(tmp_path, monkeypatch):
    steps = torch.rand(12, 7, generator=seeded(8)) - 0.3
    steps[::3] = math.nan
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
        patch.setitem(sys.modules, "matplotlib.figure", None)
        pos_meo.plot_gradients(steps, "pos_meo", tmp_path)
    assert not list(tmp_path.iterdir())
    pytest.importorskip("matplotlib")
    pos_meo.plot_gradients(steps[:1], "uniform", tmp_path)  # no step was measured: nothing to draw
    assert not list(tmp_path.iterdir())
    pos_meo.plot_gradients(steps, "pos_meo", tmp_path)
    assert (tmp_path / "gradients.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------- two gradients of one graph


class SharedTrunk(nn.Module):
    """Two losses on one graph; batch norm, and a parameter that is not trained."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
        self.frozen = nn.Parameter(torch.tensor(0.7), requires_grad=False)

    def forward(self, images):
        features = self.norm(self.conv(images)).relu()
        return (self.out(features) ** 2).mean(), 3 * features.mul(self.frozen).sigmoid().mean() - self.conv.bias.sum()


def trunk_and_gradients(channels_last):
    """(model, its Gradients, images of two parts, by autograd.grad: [part][loss][parameter])."""
    torch.manual_seed(0)
    model = SharedTrunk()
    if channels_last:
        model.to(memory_format=torch.channels_last)
    parts = [torch.randn(2, 3, 6, 6, generator=seeded(part)) for part in range(2)]
    trained = [model.conv.weight, model.conv.bias, model.norm.weight, model.norm.bias, model.out.weight, model.out.bias]
    expected = []
    for images in parts:
        losses = model(images)
        expected.append([torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True, materialize_grads=True) for loss in losses])
    assert all(parameter.grad is None for parameter in model.parameters())
    return model, pos_meo.Gradients(model, rows=2), parts, expected


@pytest.mark.parametrize("channels_last", [False, True])
def test_rows_are_the_gradients_of_the_losses(channels_last):
    model, gradients, parts, expected = trunk_and_gradients(channels_last)
    trained = [parameter for name, parameter in model.named_parameters() if name != "frozen"]
    assert gradients.flat.shape == (2, sum(parameter.numel() for parameter in trained)) and gradients.flat.dtype == torch.float32
    assert len(gradients.parameters) == len(trained) and all(a is b for a, b in zip(gradients.parameters, trained))
    total = [[torch.zeros_like(parameter) for parameter in trained] for _ in (SUP, UNSUP)]
    for images, of_part in zip(parts, expected):
        loss_sup, loss_unsup = model(images)
        for row, loss in ((SUP, loss_sup), (UNSUP, loss_unsup)):
            gradients.backward(loss, row, retain_graph=row == SUP)
            total[row] = [a + b for a, b in zip(total[row], of_part[row])]  # parts add up
            for parameter, wanted in zip(trained, total[row]):
                torch.testing.assert_close(parameter.grad, wanted, rtol=1e-5, atol=1e-7)
                assert parameter.grad.stride() == parameter.stride()
    for row in (SUP, UNSUP):
        if not channels_last:
            torch.testing.assert_close(gradients.flat[row], torch.cat([g.flatten() for g in total[row]]), rtol=1e-5, atol=1e-7)
        # Every number of a row belongs to one parameter, whatever the memory format.
        torch.testing.assert_close(gradients.flat[row].sort().values, torch.cat([g.flatten() for g in total[row]]).sort().values,
                                   rtol=1e-5, atol=1e-6)
    assert model.frozen.grad is None

    gradients.integrate(torch.tensor([0.3, 1.9], dtype=torch.float64))
    for parameter, g_sup, g_unsup in zip(trained, *total):
        torch.testing.assert_close(parameter.grad, 0.3 * g_sup + 1.9 * g_unsup, rtol=1e-5, atol=1e-6)
        assert parameter.grad.stride() == parameter.stride()
    assert model.frozen.grad is None
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last) is channels_last


def test_one_row_is_enough_for_one_loss():
    model, _, (images, _), (expected, _) = trunk_and_gradients(channels_last=True)
    gradients = pos_meo.Gradients(model, rows=1)
    loss_sup, loss_unsup = model(images)
    gradients.backward((loss_sup + loss_unsup) / 2, SUP)
    for parameter, g_sup, g_unsup in zip(gradients.parameters, *expected):
        torch.testing.assert_close(parameter.grad, (g_sup + g_unsup) / 2, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------- Eq. 1-3: the losses of the baselines


def plain_loss(logits, label, weight):
    """Sum of weight x cross entropy over pixels and its gradient [B, C, H, W], pixel by pixel in float64."""
    total, gradient = 0.0, torch.zeros_like(logits)
    for b, row, column in np.ndindex(*label.shape):
        if weight[b, row, column]:
            probs = np.exp(logits[b, :, row, column].double().numpy())
            probs /= probs.sum()
            onehot = np.arange(len(probs)) == int(label[b, row, column])
            total -= float(weight[b, row, column]) * math.log(probs[onehot].item())
            gradient[b, :, row, column] = float(weight[b, row, column]) * torch.from_numpy(probs - onehot)
    return total, gradient


def draw_views(seed, size=2, side=32, classes=4, mixed=True, device="cpu"):
    """Views of `size` labeled and `size` unlabeled images; images differ in how much of them is labeled and valid."""
    generator = seeded(seed)
    names = ("labeled", "weak", "strong_1", "strong_2")
    views = {name: torch.randn(size, 3, side, side, generator=generator) for name in names}
    for name in ("label", "truth"):
        views[name] = torch.randint(classes, (size, side, side), generator=generator, dtype=torch.uint8)
    views["valid"] = torch.rand(size, side, side, generator=generator) < torch.linspace(0.5, 1, size)[:, None, None]
    views["label"][torch.rand(size, side, side, generator=generator) > torch.linspace(1, 0.5, size)[:, None, None]] = IGNORE
    for number, view in enumerate(("strong_1", "strong_2")):
        boxes = torch.zeros(size, side, side, dtype=torch.bool)
        if mixed:
            boxes[0, 1 : side // 2, 2 : side - 1] = boxes[-1, side // 4 :, : side // 2 + number] = True
        views[view + "_boxes"] = boxes
        views[view + "_valid"] = torch.where(boxes, views["valid"].roll(1, 0), views["valid"])
    return {name: value.to(device) for name, value in views.items()}


def pseudo_labels_by_loop(logits, valid, threshold):
    """(pseudo label, 1 where it is used) of Eq. 2."""
    pseudo_label, used = torch.zeros(valid.shape, dtype=torch.long), torch.zeros(valid.shape)
    for b, row, column in np.ndindex(*valid.shape):
        probs = torch.exp(logits[b, :, row, column]) / torch.exp(logits[b, :, row, column]).sum()
        pseudo_label[b, row, column] = max(range(len(probs)), key=lambda c: probs[c])
        used[b, row, column] = float(max(probs) >= threshold and valid[b, row, column])
    return pseudo_label, used


def strong_losses_by_loop(logits, pseudo_label, used, views):
    """Mean over the strong views of Eq. 3 with each view's pasted labels, and its gradient."""
    total, slopes = 0.0, []
    for view, logits_view in zip(("strong_1", "strong_2"), logits.chunk(2)):
        label, weight, valid = pseudo_label.clone(), used.clone(), 0
        for b, row, column in np.ndindex(*label.shape):
            source = (b - 1) % len(label) if views[view + "_boxes"][b, row, column] else b
            label[b, row, column], weight[b, row, column] = pseudo_label[source, row, column], used[source, row, column]
            valid += int(views["valid"][source, row, column])
        loss, slope = plain_loss(logits_view, label, weight)
        total += loss / valid / 2
        slopes.append(slope / valid / 2)
    return total, torch.cat(slopes)


class PlaybackV1(nn.Module):
    """A network that answers with prepared logits, so that each use of each view has its own gradient."""

    def __init__(self, size, classes, side):
        super().__init__()
        self.first, self.perturbed, self.strong = (nn.Parameter(2 * torch.randn(images, classes, side, side, generator=seeded(seed)))
                                                   for seed, images in enumerate((2 * size, size, 2 * size)))
        self.seen = []

    def forward(self, images, perturb=0):
        self.seen.append((images, perturb))
        return (self.first, self.perturbed) if perturb else self.strong


def test_unimatch_v1_losses_equal_plain_loops_and_daw():
    views, size = draw_views(0, size=3, side=5), 3
    network = PlaybackV1(size, 4, 5)
    loss_sup, loss_unsup, pseudo_label, used = pos_meo.unimatch_v1_losses(network, views, pos_meo.pixel_counts([views]), 0.6)
    (labeled_and_weak, perturb), (strong, no_perturb) = network.seen
    assert torch.equal(labeled_and_weak, torch.cat([views["labeled"], views["weak"]])) and perturb == size
    assert torch.equal(strong, torch.cat([views["strong_1"], views["strong_2"]])) and not no_perturb

    expected_label, expected_used = pseudo_labels_by_loop(network.first.detach()[size:], views["valid"], 0.6)
    assert torch.equal(pseudo_label, expected_label) and torch.equal(used, expected_used)
    assert 0.2 < used.mean() < 0.8
    labeled = views["label"] != IGNORE
    expected_sup, slope_sup = plain_loss(network.first.detach()[:size], views["label"], labeled)
    assert loss_sup.item() == pytest.approx(expected_sup / labeled.sum().item(), rel=1e-5)
    perturbed, slope_perturbed = plain_loss(network.perturbed.detach(), expected_label, expected_used)
    strong, slope_strong = strong_losses_by_loop(network.strong.detach(), expected_label, expected_used, views)
    valid = views["valid"].sum().item()
    assert loss_unsup.item() == pytest.approx(0.5 * strong + 0.5 * perturbed / valid, rel=1e-5)

    parameters, close = [network.first, network.perturbed, network.strong], {"rtol": 1e-4, "atol": 1e-7}
    sup, unsup = (torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
                  for loss in (loss_sup, loss_unsup))
    torch.testing.assert_close(sup[0][:size], slope_sup / labeled.sum(), **close)
    assert not (sup[0][size:].any() or sup[1].any() or sup[2].any() or unsup[0].any())  # none through pseudo labels
    torch.testing.assert_close(unsup[1], slope_perturbed / valid / 2, **close)
    torch.testing.assert_close(unsup[2], slope_strong / 2, **close)

    # daw.py's UniMatch is the same baseline.
    statistics = daw.Statistics(4, 0.9)
    loss, terms, _ = daw.daw_loss(network, views, daw.pixel_counts([views]), statistics, statistics.empty_sums(),
                                  daw.Config(weighting="fixed", align=False, threshold=0.6))
    assert loss.item() == pytest.approx(((loss_sup + loss_unsup) / 2).item(), rel=1e-6)
    assert terms["used"].item() == pytest.approx((used.sum() / valid).item(), rel=1e-6)
    for ours, theirs in zip(torch.autograd.grad((loss_sup + loss_unsup) / 2, parameters), torch.autograd.grad(loss, parameters)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("truth", [True, False])
def test_views_are_those_of_daw(truth):
    generator = seeded(9)
    part = {name: torch.randint(256, (3, 3, 16, 16), generator=generator, dtype=torch.uint8) for name in ("labeled", "unlabeled")}
    part |= {name: torch.randint(4, (3, 16, 16), generator=generator, dtype=torch.uint8) for name in ("label", "truth")[: 1 + truth]}
    part["valid"] = torch.rand(3, 16, 16, generator=generator) < 0.7
    made = []
    for method in (pos_meo, daw):
        torch.manual_seed(1)
        made.append(method.make_views(part, method.Config(crop=16), BLUR))
    ours, theirs = made
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ("truth" in ours) is truth
    ours, theirs = pos_meo.pixel_counts([ours, ours]), daw.pixel_counts([theirs, theirs])
    assert ours == theirs and ours["valid"] == 2 * part["valid"].sum()


class PlaybackV2(nn.Module):
    """Student or teacher: answers the calls in turn with prepared logits and remembers what it was shown."""

    def __init__(self, *images, classes=4, side=5, seed=0):
        super().__init__()
        self.answers = nn.ParameterList([2 * torch.randn(n, classes, side, side, generator=seeded(seed + k)) for k, n in enumerate(images)])
        self.encoder = nn.Module()
        self.encoder.dim = 96
        self.seen = []

    def forward(self, images, channel_mask=None):
        self.seen.append((images, channel_mask, torch.is_grad_enabled()))
        return self.answers[len(self.seen) - 1] * 1.0


def test_unimatch_v2_losses_equal_plain_loops():
    views, size = draw_views(1, size=3, side=5), 3
    student, teacher = PlaybackV2(size, 2 * size, seed=10), PlaybackV2(size, seed=20)
    loss_sup, loss_unsup, pseudo_label, used = pos_meo.unimatch_v2_losses(student, teacher, views, pos_meo.pixel_counts([views]), 0.6)

    ((weak, no_mask, recorded),) = teacher.seen  # the teacher sees the weak view, and that alone
    assert torch.equal(weak, views["weak"]) and no_mask is None and not recorded
    (labeled, no_mask, _), (strong, masks, _) = student.seen
    assert torch.equal(labeled, views["labeled"]) and no_mask is None
    assert torch.equal(strong, torch.cat([views["strong_1"], views["strong_2"]]))
    assert masks.shape == (2 * size, 96) and torch.equal(masks[:size] + masks[size:], torch.full((size, 96), 2.0))

    expected_label, expected_used = pseudo_labels_by_loop(teacher.answers[0].detach(), views["valid"], 0.6)
    assert torch.equal(pseudo_label, expected_label) and torch.equal(used, expected_used) and 0.2 < used.mean() < 0.8
    with_label = views["label"] != IGNORE
    expected_sup, slope_sup = plain_loss(student.answers[0].detach(), views["label"], with_label)
    expected_unsup, slope_unsup = strong_losses_by_loop(student.answers[1].detach(), expected_label, expected_used, views)
    assert loss_sup.item() == pytest.approx(expected_sup / with_label.sum().item(), rel=1e-5)
    assert loss_unsup.item() == pytest.approx(expected_unsup, rel=1e-5)
    (loss_sup + loss_unsup).backward()
    torch.testing.assert_close(student.answers[0].grad, slope_sup / with_label.sum(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(student.answers[1].grad, slope_unsup, rtol=1e-4, atol=1e-7)
    assert teacher.answers[0].grad is None


def test_complementary_masks():
    torch.manual_seed(0)
    masks = pos_meo.complementary_masks(600, 256, torch.device("cpu"))
    assert masks.shape == (1200, 256) and set(masks.unique().tolist()) == {0, 1, 2}
    first, second = masks.chunk(2)
    assert torch.equal(first + second, torch.full((600, 256), 2.0))
    kept = (first == 1).all(dim=1)  # images that keep all channels; of the others every channel is in one view only
    assert 250 < kept.sum() < 350 and not (first[~kept] == 1).any()
    assert (first[~kept] == 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert (first[~kept][0] != first[~kept][1]).any()  # every image has its own


# ---------------------------------------------------------------- a step


def config_of(baseline, **options):
    second = baseline == "unimatch_v2"
    defaults = {"backbone": "tiny_vit" if second else "tiny", "weights": "none", "threshold": 0.6, "lr": 0.002 if second else 0.02,
                "head_lr_multiplier": 3.0, "weight_decay": 0.1, "ema_decay": 0.9 if second else 0.0, "amp": False, "cap": 1.0}
    return pos_meo.Config(baseline=baseline, **{**defaults, **options})


def make_model(config):
    """(student, teacher), some of whose confidences are above 0.6."""
    torch.manual_seed(0)
    model = pos_meo.build_model(config, 4)
    with torch.no_grad():
        model.classifier.weight *= 30 if config.baseline == "unimatch_v2" else 5
    model.to(memory_format=torch.channels_last)
    return model.train(), copy.deepcopy(model).requires_grad_(False).eval()


# Some gradients are zero but for rounding (a bias before a batch norm, of attention's keys), and AdamW makes steps of full
# length of them: with a larger epsilon it does not, and parameters can be compared.
EPSILON = 1e-2


def our_steps(config, steps, measure=False):
    """Parameters, statistics and logged numbers after one step on each entry of `steps`, a list of parts."""
    model, teacher = make_model(config)
    optimizer = pos_meo.build_optimizer(model, config)
    for group in optimizer.param_groups:
        if "eps" in group:
            group["eps"] = EPSILON
    gradients = pos_meo.Gradients(model, rows=2 if config.strategy in pos_meo.PARETO or measure else 1)
    table, lines = [], []
    for number, parts in enumerate(steps):
        torch.manual_seed(number)
        logged, statistics = pos_meo.optimizer_step(model, teacher, parts, gradients, optimizer, config, ALONE, measure)
        table.append(statistics)
        lines.append({name: value.item() for name, value in logged.items()})
    return list(model.parameters()), table, lines


def plain_steps(config, steps, write_gradients):
    """The parameters after plain steps; write_gradients(loss_sup, loss_unsup, trained parameters) fills .grad."""
    model, teacher = make_model(config)
    encoder = [parameter for name, parameter in model.named_parameters() if name.startswith("encoder.")]
    rest = [parameter for name, parameter in model.named_parameters() if not name.startswith("encoder.")]
    groups = [{"params": encoder, "lr": config.lr}, {"params": rest, "lr": config.lr * config.head_lr_multiplier}]
    if config.baseline == "unimatch_v1":
        optimizer = torch.optim.SGD(groups, lr=0, momentum=0.9, weight_decay=config.weight_decay)
    else:
        optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, eps=EPSILON)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for number, (views,) in enumerate(steps):
        torch.manual_seed(number)
        counts = pos_meo.pixel_counts([views])
        if config.baseline == "unimatch_v1":
            loss_sup, loss_unsup, _, used = pos_meo.unimatch_v1_losses(model, views, counts, config.threshold)
        else:
            loss_sup, loss_unsup, _, used = pos_meo.unimatch_v2_losses(model, teacher, views, counts, config.threshold)
        assert config.threshold > 1 or 0.05 < used.mean() < 0.95
        optimizer.zero_grad()
        write_gradients(loss_sup, loss_unsup, trained)
        optimizer.step()
    return list(model.parameters())


def assert_same_parameters(ours, theirs, atol=1e-6):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def largest_difference(ours, theirs):
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs))


STEPS = [[draw_views(2)], [draw_views(3)]]  # the second one meets the optimizer's state


@pytest.mark.parametrize("measure", [True, False])
@pytest.mark.parametrize("baseline", BASELINES)
def test_uniform_and_fixed_steps_equal_those_of_the_summed_loss(baseline, measure):
    def descend(w_sup, w_unsup):
        return lambda loss_sup, loss_unsup, trained: ((w_sup * loss_sup + w_unsup * loss_unsup) / (w_sup + w_unsup)).backward()

    start = list(make_model(config_of(baseline))[0].parameters())
    uniform, statistics, lines = our_steps(config_of(baseline, strategy="uniform"), STEPS, measure)
    assert_same_parameters(uniform, plain_steps(config_of(baseline), STEPS, descend(1, 1)))
    assert all((row is not None) is measure for row in statistics)
    for line in lines:
        assert line["loss"] == pytest.approx((line["loss_sup"] + line["loss_unsup"]) / 2) and line["loss_unsup"] > 0
    fixed, _, _ = our_steps(config_of(baseline, strategy="fixed", fixed_weights=(2.0, 1.0)), STEPS, measure)
    assert_same_parameters(fixed, plain_steps(config_of(baseline), STEPS, descend(2, 1)))
    assert_same_parameters(our_steps(config_of(baseline, strategy="fixed", fixed_weights=(4.0, 2.0)), STEPS, measure)[0], fixed)
    assert largest_difference(uniform, start) > 1e-3 and largest_difference(uniform, fixed) > 1e-4


@pytest.mark.parametrize("strategy", pos_meo.PARETO)
@pytest.mark.parametrize("baseline", BASELINES)
def test_pareto_steps_equal_those_with_alpha_by_projection(baseline, strategy):
    alphas = []

    def shortest(loss_sup, loss_unsup, trained):
        g_sup, g_unsup = (torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True, materialize_grads=True)
                          for loss in (loss_sup, loss_unsup))
        flat_sup, flat_unsup = (torch.cat([g.flatten() for g in gradient]).double() for gradient in (g_sup, g_unsup))
        alpha = alpha_by_projection(flat_sup, flat_unsup)
        alphas.append(alpha)
        factor = 1.0
        if strategy == "pos_meo":
            factor = torch.linalg.norm((flat_sup + flat_unsup) / 2) / torch.linalg.norm((1 - alpha) * flat_sup + alpha * flat_unsup)
        for parameter, a, b in zip(trained, g_sup, g_unsup):
            parameter.grad = (float(factor) * ((1 - alpha) * a.double() + alpha * b.double())).float()

    theirs = plain_steps(config_of(baseline), STEPS, shortest)
    ours, statistics, _ = our_steps(config_of(baseline, strategy=strategy), STEPS)
    assert_same_parameters(ours, theirs)
    assert any(0.02 < alpha < 0.98 and abs(alpha - 0.5) > 0.02 for alpha in alphas), alphas
    assert [row[STATISTICS.index("alpha_unsup")].item() for row in statistics] == pytest.approx(alphas, abs=1e-4)
    for row in statistics:
        assert dict(zip(STATISTICS, row.tolist()))["min_cosine"] >= -1e-6


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_batch_without_a_confident_pixel_trains_on_its_labels(baseline):
    config = config_of(baseline, threshold=1.1)
    expected = plain_steps(config, STEPS, lambda loss_sup, loss_unsup, trained: (0.5 * loss_sup).backward())
    for strategy in ("uniform", *pos_meo.PARETO):
        parameters, statistics, lines = our_steps(dataclasses.replace(config, strategy=strategy), STEPS, measure=True)
        assert_same_parameters(parameters, expected)
        for row, line in zip(statistics, lines):
            numbers = dict(zip(STATISTICS, row.tolist()))
            assert numbers["norm_unsup"] == numbers["cosine"] == line["loss_unsup"] == line["used"] == 0 and numbers["norm_sup"] > 0
            assert numbers["alpha_unsup"] == 0.5 and numbers["lambda"] == 1 and row.isfinite().all()
    after = our_steps(dataclasses.replace(config, strategy="pos_meo"), STEPS + STEPS)[0]
    assert all(parameter.isfinite().all() for parameter in after)


@pytest.mark.parametrize("strategy", ["fixed", "pos_meo"])
@pytest.mark.parametrize("baseline", BASELINES)
def test_a_step_reads_nothing_back_from_the_device(baseline, strategy):
    """On the meta device tensors have no values: .item(), boolean indexing and branches on values raise there."""
    config = config_of(baseline, strategy=strategy, fixed_weights=(2.0, 1.0))
    model, teacher = (network.to("meta") for network in make_model(config))
    gradients, history = pos_meo.Gradients(model, rows=2), torch.full((3, 7), math.nan, device="meta")
    parts = [draw_views(seed, device="meta") for seed in range(2)]
    logged, statistics = pos_meo.optimizer_step(model, teacher, parts, gradients, pos_meo.build_optimizer(model, config), config, ALONE, True)
    history[1] = statistics
    assert statistics.device.type == "meta" and {value.dim() for value in logged.values()} == {0}
    assert {value.device.type for value in logged.values()} == {"meta"}
    with pytest.raises(Exception):
        statistics.tolist()
    part = {"unlabeled": torch.empty(2, 3, 16, 16, dtype=torch.uint8), "labeled": torch.empty(2, 3, 16, 16, dtype=torch.uint8),
            "label": torch.empty(2, 16, 16, dtype=torch.uint8), "valid": torch.empty(2, 16, 16, dtype=torch.bool)}
    views = pos_meo.make_views({name: value.to("meta") for name, value in part.items()}, pos_meo.Config(crop=16), BLUR)
    assert {value.device.type for value in views.values()} == {"meta"}


@pytest.mark.parametrize("strategy", ["uniform", "pos_meo"])
def test_accumulated_parts_equal_the_whole_batch(strategy, monkeypatch):
    """No batch norm, no CutMix, no dropped channel: the parts see what the whole batch sees."""
    monkeypatch.setattr(pos_meo, "complementary_masks", lambda batch, channels, device: torch.ones(2 * batch, channels))
    config = config_of("unimatch_v2", strategy=strategy)
    whole = [draw_views(seed, size=4, mixed=False) for seed in (4, 5)]
    expected, expected_statistics, expected_lines = our_steps(config, [[views] for views in whole], measure=True)
    parts = [runtime.split_batch(views, 2, torch.device("cpu")) for views in whole]
    parameters, statistics, lines = our_steps(config, parts, measure=True)
    assert_same_parameters(parameters, expected)
    torch.testing.assert_close(torch.stack(statistics), torch.stack(expected_statistics), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(lines, expected_lines):
        assert ours == pytest.approx(theirs, rel=1e-5) and 0.05 < ours["used"] < 0.95


def gradients_of_a_step(config, network, teacher, model):
    gradients = pos_meo.Gradients(model, rows=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    torch.manual_seed(0)
    rows = []
    with pytest.MonkeyPatch.context() as patch:  # integration writes over g_s
        patch.setattr(gradients, "integrate", lambda weights: rows.extend(gradients.flat.clone()))
        _, statistics = pos_meo.optimizer_step(network, teacher, [draw_views(6)], gradients, optimizer, config, ALONE, False)
    return torch.stack(rows), statistics


@pytest.mark.parametrize("baseline", BASELINES)
def test_bf16_autocast_gives_float32_gradients(baseline):
    rows = []
    for amp in (False, True):
        config = config_of(baseline, amp=amp)
        model, teacher = make_model(config)
        gradients, statistics = gradients_of_a_step(config, model, teacher, model)
        assert gradients.dtype == torch.float32 and gradients.isfinite().all() and statistics.isfinite().all()
        rows.append(gradients)
    assert not torch.allclose(*rows, rtol=1e-4, atol=1e-6)  # bf16 it was
    assert F.cosine_similarity(*rows, dim=1).min() > 0.9


def test_compiled_networks_give_the_same_two_gradients(monkeypatch):
    """By the compiler's front end, which splits forward from backward and frees what it thinks is not needed twice."""
    dynamo, functorch = pytest.importorskip("torch._dynamo"), pytest.importorskip("torch._functorch.config")
    compile_fully = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_fully(model, backend="aot_eager"))
    rows = []
    # PyTorch's default, which must be changed; its own patch, as pytest's deletes the option when it ends
    with functorch.patch(donated_buffer=True) if hasattr(functorch, "donated_buffer") else contextlib.nullcontext():
        for compiled in (False, True):
            config = config_of("unimatch_v1", compile=compiled)
            model, teacher = make_model(config)
            network = runtime.wrap(model, config, ALONE, average_gradients=False)
            assert (network is model) is not compiled
            rows.append(gradients_of_a_step(config, network, teacher, model)[0])
    dynamo.reset()
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- ranks


RANKS = """
import sys
import torch
import torch.distributed as dist
import pos_meo
from common import runtime

context = runtime.start("cpu")
pos_meo.complementary_masks = lambda batch, channels, device: torch.ones(2 * batch, channels)
reduced, all_reduce = [], dist.all_reduce


def counted(tensor, *args, **kwargs):
    reduced.append(tensor.numel())
    return all_reduce(tensor, *args, **kwargs)


dist.all_reduce = counted
torch.set_default_dtype(torch.float64)  # in float32, convolutions of half a batch round differently, by version
batches = torch.load(sys.argv[1])
results = {}
for name, strategy, parts in (("pos_meo", "pos_meo", 1), ("parts", "pos_meo", 2), ("uniform", "uniform", 1)):
    config = pos_meo.Config(baseline="unimatch_v2", backbone="tiny_vit", weights="none", strategy=strategy, threshold=0.6, lr=0.002,
                            head_lr_multiplier=3.0, weight_decay=0.1, amp=False, cap=1.0)
    torch.manual_seed(context.rank)  # ranks must start from rank 0's weights all the same
    model = pos_meo.build_model(config, 4)
    with torch.no_grad():
        model.classifier.weight *= 30
    network = runtime.wrap(model, config, context, average_gradients=False)
    average = runtime.WeightAverage(model, 0.9)
    optimizer = pos_meo.build_optimizer(model, config)
    for group in optimizer.param_groups:
        group["eps"] = 1e-2
    gradients = pos_meo.Gradients(model, rows=2)
    results[name] = {"statistics": [], "loss_sup": [], "loss_unsup": [], "used": [], "large": []}
    for iteration, batch in enumerate(batches[name]):
        mine = {key: value.chunk(context.world_size)[context.rank] for key, value in batch.items()}
        mine = {key: value.double() if value.is_floating_point() else value for key, value in mine.items()}
        reduced.clear()
        logged, statistics = pos_meo.optimizer_step(network, average.model, runtime.split_batch(mine, parts, context.device), gradients,
                                                    optimizer, config, context, strategy == "pos_meo")
        average.update(iteration)
        results[name]["large"].append([size for size in reduced if size > 1000])
        for key in ("loss_sup", "loss_unsup", "used"):
            results[name][key].append(logged[key].item())
        if statistics is not None:
            results[name]["statistics"].append(statistics)
    results[name]["parameters"] = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    results[name]["size"] = gradients.flat.shape[1]
    results[name]["type"] = type(network).__name__
torch.save(results, f"{sys.argv[2]}/{context.world_size}_{context.rank}.pt")
torch.set_default_dtype(torch.float32)
if context.world_size > 1:  # the program as it is; a data-parallel wrapper could not be called
    torch.nn.parallel.DistributedDataParallel = None
    pos_meo.train(pos_meo.Config(data_root=sys.argv[3], output=sys.argv[2] + "/run", batch_size=2, iterations=2, log_every=1, threshold=0.1,
                                 num_workers=0))
runtime.finish()
"""


def test_two_ranks_take_the_step_of_one_process(shapes, tmp_path, monkeypatch):
    mixed, apart = ([draw_views(seed, size=4, mixed=mixed) for seed in (7, 8)] for mixed in (True, False))
    torch.save({"pos_meo": mixed, "parts": apart, "uniform": mixed}, tmp_path / "batches.pt")
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    succeed(script, tmp_path / "batches.pt", tmp_path, shapes, torchrun=2)
    trained = state(tmp_path / "run")
    assert trained["iteration"] == len(trained["rng"]) == 2 and trained["history"]["steps"].isfinite().all()
    for module, name in ((pos_meo, "complementary_masks"), (torch.distributed, "all_reduce")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back what the script changes
    monkeypatch.setattr(sys, "argv", ["ranks.py", str(tmp_path / "batches.pt"), str(tmp_path)])
    runpy.run_path(str(script))
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    for name in one:
        alone, ranks = one[name], (first[name], second[name])
        assert torch.equal(ranks[0]["parameters"], ranks[1]["parameters"])  # bit for bit
        torch.testing.assert_close(ranks[0]["parameters"], alone["parameters"], rtol=0, atol=1e-6)
        for rank in ranks:
            assert rank["type"] == "DPT"  # no data-parallel wrapper, whose hooks would reduce too
            assert rank["large"] == 2 * [[alone["size"] * (1 if name == "uniform" else 2)]]  # one collective a step, for both gradients
            assert len(rank["statistics"]) == (0 if name == "uniform" else 2)
            for ours, expected in zip(rank["statistics"], alone["statistics"]):
                torch.testing.assert_close(ours, expected, rtol=2e-5, atol=1e-5)
        for key in ("loss_sup", "loss_unsup", "used"):  # what is logged is a mean over ranks
            means = [(a + b) / 2 for a, b in zip(ranks[0][key], ranks[1][key])]
            assert means == pytest.approx(alone[key], rel=1e-5) and abs(ranks[0][key][0] - ranks[1][key][0]) > 1e-3
        assert alone["large"] == [[], []]
    alpha = STATISTICS.index("alpha_unsup")
    assert any(0.02 < row[alpha] < 0.98 for row in one["pos_meo"]["statistics"])


# ---------------------------------------------------------------- programs


QUICK = ["--batch-size", "2", "--iterations", "8", "--eval-every", "8", "--save-every", "2", "--log-every", "2", "--num-workers", "0",
         "--threshold", "0.1"]  # so early there are no confident pixels
SECOND = ["--baseline", "unimatch_v2"]


run_as_program = functools.partial(programs.run_as_program, "pos_meo.py")
refuse = functools.partial(programs.refuse, "pos_meo.py")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """The embedded data with a short validation list."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    synthetic.generate(root, "shapes")
    val = root / "ImageSets" / "Segmentation" / "val.txt"
    val.write_text("".join(line + "\n" for line in val.read_text().splitlines()[:12]))
    return root


@pytest.fixture(scope="module")
def first(shapes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    succeed("pos_meo.py", *QUICK, "--strategy", "pos_meo", "--data-root", shapes, "--output", folder)
    return folder


@pytest.fixture(scope="module")
def second(shapes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("second")
    succeed("pos_meo.py", *QUICK, *SECOND, "--data-root", shapes, "--output", folder)
    return folder


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_run_leaves_its_folder(baseline, request):
    folder = request.getfixturevalue("first" if baseline == "unimatch_v1" else "second")
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "metrics.jsonl", "results.json", "latest.pt", "best.pt", "samples.png", "gradients.json"} <= names
    assert not [name for name in names if name.endswith(".part")]
    history = state(folder)["history"]["steps"]
    assert history.shape == (8, 7) and history.isfinite().all()  # POS measures every step
    column = dict(zip(STATISTICS, history.unbind(dim=1)))
    assert column["min_cosine"].min() >= -1e-5 and (column["alpha_unsup"] != 0.5).all()
    assert column["norm_sup"].min() > 0 and 0 <= column["alpha_unsup"].min() and column["alpha_unsup"].max() <= 1
    summary = json.loads((folder / "gradients.json").read_text())
    assert summary["strategy"] == "pos_meo" and summary["alpha_unsup"] == pytest.approx(column["alpha_unsup"].mean().item(), abs=1e-5)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert [line["iteration"] for line in logged] == [2, 4, 6, 8] and any("miou" in line for line in lines)
    for number, line in enumerate(logged):
        assert {"cosine", "norm_sup", "norm_unsup", "alpha_unsup", "lambda", "lowest_min_cosine", "conflict", "remark_1"} <= line.keys()
        assert line["norm_sup"] == pytest.approx(column["norm_sup"][2 * number : 2 * number + 2].mean().item(), rel=1e-4)
        assert line["loss"] == pytest.approx((line["loss_sup"] + line["loss_unsup"]) / 2, abs=1e-5)
    results = json.loads((folder / "results.json").read_text())
    assert results["last"]["iteration"] == 8 and 0 <= results["last"]["miou"] <= 100 and results["last"]["images"] == 12
    assert ("ema" in state(folder)) is (baseline == "unimatch_v2")


def test_a_run_draws_its_gradients(second):
    pytest.importorskip("matplotlib", reason="draws gradients.png only where matplotlib is installed")
    assert (second / "gradients.png").read_bytes().startswith(b"\x89PNG")


def test_sigkill_then_the_same_command_ends_with_identical_bits(second, shapes, tmp_path):
    command = ["pos_meo.py", *QUICK, *SECOND, "--data-root", shapes, "--output", tmp_path]
    interrupted = kill_after_first_checkpoint(tmp_path, *command)
    assert interrupted["iteration"] < 8, "the run ended before it could be killed"
    assert interrupted["history"]["steps"].isnan().any()
    assert f"at iteration {interrupted['iteration']}" in succeed(*command)
    ours, theirs = state(tmp_path), state(second)
    for name in ("model", "optimizer", "ema", "history", "rng", "iteration"):
        assert_identical(ours[name], theirs[name], name)
    for name in ("gradients.json", "results.json"):
        assert (tmp_path / name).read_text() == (second / name).read_text()


def test_evaluate_and_predict_take_a_vit_checkpoint(second, shapes, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(sys, "argv", ["evaluate", "--checkpoint", str(second / "latest.pt"), "--data-root", str(shapes), "--num-workers", "0",
                                      "--output", str(tmp_path / "results.json"), "--device", "cpu"])
    evaluate.main()
    again, trained = (json.loads(path.read_text()) for path in (tmp_path / "results.json", second / "results.json"))
    assert again["iou"] == trained["last"]["iou"] and again["miou"] == trained["last"]["miou"]  # of the EMA, as in training
    Image.radial_gradient("L").convert("RGB").resize((91, 50)).save(tmp_path / "mine.png")  # neither is a multiple of the patch
    monkeypatch.setattr(sys, "argv", ["predict", "--checkpoint", str(second / "best.pt"), "--output", str(tmp_path / "out"), "--device", "cpu",
                                      str(tmp_path / "mine.png")])
    assert not predict.main()
    with Image.open(tmp_path / "out" / "mine.png") as prediction:
        assert prediction.mode == "P" and prediction.size == (91, 50) and np.asarray(prediction).max() < 8
    assert (tmp_path / "out" / "mine_overlay.png").is_file()


def test_landscape_of_two_checkpoints(first, second, shapes, tmp_path, monkeypatch, capsys):
    for name, value in {"LANDSCAPE_DISTANCES": [-0.5, 0.0, 0.5], "LANDSCAPE_DIRECTIONS": 1, "LANDSCAPE_BATCHES": 2}.items():
        monkeypatch.setattr(pos_meo, name, value)
    paths = [str(first / "latest.pt"), str(second / "latest.pt")]
    config = pos_meo.Config(landscape=",".join(paths), data_root=str(shapes), output=str(tmp_path / "a"), device="cpu")
    pos_meo.landscape(config)
    assert all(path in capsys.readouterr().out for path in paths[1:])
    curves = json.loads((tmp_path / "a" / "landscape.json").read_text())
    assert list(curves) == paths
    for path, folder in zip(paths, (first, second)):
        rows = curves[path]
        assert [row["distance"] for row in rows] == [-0.5, 0, 0.5] and all(0 < row["loss"] < 100 for row in rows)
        assert rows[1]["miou"] == pytest.approx(json.loads((folder / "results.json").read_text())["last"]["miou"], abs=1e-4)
        assert len({row["loss"] for row in rows}) == 3
    # The same batches and directions for the same seed.
    pos_meo.landscape(dataclasses.replace(config, landscape=paths[1], output=str(tmp_path / "b")))
    assert json.loads((tmp_path / "b" / "landscape.json").read_text()) == {paths[1]: curves[paths[1]]}


def test_landscape_as_a_program(second, shapes, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(landscape, "scan", lambda model, measure, *rest: [{"direction": 0, "distance": 0.0, **measure()}])
    status, out, err = run_as_program(monkeypatch, capfd, "--landscape", second / "latest.pt", "--data-root", shapes, "--output", tmp_path / "a",
                                      "--device", "cpu")
    assert status == 0, err
    assert (tmp_path / "a" / "landscape.json").is_file() and "latest.pt" in out


def test_landscape_refuses_what_is_no_checkpoint_of_this_method(tmp_path, monkeypatch, capfd):
    config = daw.Config(backbone="tiny", weights="none", crop=32)
    content = {"format": FORMAT, "method": "daw", "dataset": "shapes", "config": dataclasses.asdict(config),
               "model": daw.build_model(config, 8).state_dict(), "iteration": 1}
    torch.save(content, tmp_path / "other.pt")
    message = refuse(monkeypatch, capfd, "--landscape", tmp_path / "other.pt", "--output", tmp_path / "a", "--device", "cpu")
    assert "other.pt" in message and "pos_meo" in message
    assert "missing.pt" in refuse(monkeypatch, capfd, "--landscape", tmp_path / "missing.pt", "--output", tmp_path / "a", "--device", "cpu")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("options, named", [
    (["--strategy", "fixed", "--fixed-weights", "0", "0"], "--fixed-weights"),
    (["--strategy", "fixed", "--fixed-weights", "-1", "1"], "--fixed-weights"),
    (["--baseline", "unimatch_v2", "--ema-decay", "0"], "--ema-decay"), (["--baseline", "unimatch_v2", "--backbone", "resnet50"], "resnet50"),
    (["--baseline", "unimatch_v1", "--backbone", "tiny_vit"], "tiny_vit"), (["--strategy", "fixed"], "--fixed-weights"),
    (["--cap", "0.3"], "--cap"), (["--labeled", "all"], "unlabeled")])
def test_bad_options_give_one_line(options, named, shapes, tmp_path, monkeypatch, capfd):
    assert named in refuse(monkeypatch, capfd, *QUICK, "--data-root", shapes, "--output", tmp_path / "run", "--device", "cpu", *options)
    assert not (tmp_path / "run").exists()


def test_another_strategy_does_not_go_on_with_a_run(second, shapes, monkeypatch, capfd, keep_signal_handlers):
    message = refuse(monkeypatch, capfd, *QUICK, *SECOND, "--strategy", "pos", "--data-root", shapes, "--output", second, "--device", "cpu")
    assert "other options" in message and "--strategy pos_meo" in message
