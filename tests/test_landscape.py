"""The loss landscape against closed forms, plain loops and the invariance that filter normalisation is for."""

import json
import math
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import landscape
from common.landscape import filter_normalized_direction, moved, save, scan, sharpness, summary, table

DISTANCES = [-1.0, -0.5, 0.0, 0.5, 1.0]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class Parts(nn.Module):
    """Every kind of parameter that the methods' networks have."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 2, 2)
        self.linear = nn.Linear(5, 6)
        self.layer_norm = nn.LayerNorm(6)
        self.gamma = nn.Parameter(torch.full((6,), 0.1))
        self.temperature = nn.Parameter(torch.tensor(2.0))
        self.cls_token = nn.Parameter(torch.randn(1, 1, 6))
        self.pos_embed = nn.Parameter(torch.randn(1, 7, 6))
        self.frozen = nn.Parameter(torch.randn(3, 3), requires_grad=False)


@pytest.fixture
def parts():
    torch.manual_seed(0)
    return Parts()


def bits(model):
    return {name: tensor.clone().view(torch.int32) if tensor.dtype == torch.float32 else tensor.clone()
            for name, tensor in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------- directions


def test_every_filter_of_a_direction_has_the_norm_of_the_weights(parts):
    with torch.no_grad():
        parts.conv.weight[2] = 0  # a filter that is off stays off
    direction = filter_normalized_direction(parts, seeded(1))
    assert list(direction) == [name for name, _ in parts.named_parameters()]

    def length(values):
        return math.sqrt(sum(value * value for value in values.flatten().tolist()))

    for name in ("conv.weight", "linear.weight", "cls_token", "pos_embed"):
        weights = parts.get_parameter(name)
        for index in range(len(weights)):
            assert length(direction[name][index]) == pytest.approx(length(weights[index]), rel=1e-6)
    for index in range(2):  # a transposed convolution's filters
        assert length(direction["up.weight"][:, index]) == pytest.approx(length(parts.up.weight[:, index]), rel=1e-6)
    assert direction["conv.weight"][2].abs().max() == 0
    cosine = F.cosine_similarity(direction["pos_embed"].flatten(), parts.pos_embed.flatten(), dim=0)
    assert abs(cosine) < 0.6  # not the weights themselves


def test_vectors_scalars_and_frozen_weights_do_not_move(parts):
    direction = filter_normalized_direction(parts, seeded(1))
    still = {name for name, values in direction.items() if not values.any()}
    assert still == {"conv.bias", "norm.weight", "norm.bias", "up.bias", "linear.bias", "layer_norm.weight",
                     "layer_norm.bias", "gamma", "temperature", "frozen"}
    for name, values in direction.items():
        assert values.shape == parts.get_parameter(name).shape and not values.requires_grad
    parts.requires_grad_(False)
    with pytest.raises(ValueError, match="requires grad"):  # it would be a flat line
        filter_normalized_direction(parts, seeded(1))


def test_a_seed_is_a_direction(parts):
    first, again, other = (filter_normalized_direction(parts, seeded(seed)) for seed in (3, 3, 4))
    assert same(first, again)
    moving = [name for name in first if first[name].any()]
    assert not any(torch.equal(first[name], other[name]) for name in moving)
    parts.conv.requires_grad_(False)  # the Gaussians after a frozen layer stay what they were
    assert torch.equal(filter_normalized_direction(parts, seeded(3))["linear.weight"], first["linear.weight"])


def test_twice_the_weights_twice_the_direction(parts):
    first = filter_normalized_direction(parts, seeded(3))
    with torch.no_grad():
        for parameter in parts.parameters():
            parameter.mul_(2)
    second = filter_normalized_direction(parts, seeded(3))
    assert all(torch.equal(second[name], 2 * first[name]) for name in first)


def test_direction_has_the_weights_dtype(parts):
    direction = filter_normalized_direction(parts.bfloat16(), seeded(3))
    assert {values.dtype for values in direction.values()} == {torch.bfloat16}


# ---------------------------------------------------------------- steps


def test_moved_reaches_the_point_and_restores_every_bit(parts):
    before, direction = bits(parts), filter_normalized_direction(parts, seeded(5))
    expected = {name: parameter + 0.3 * direction[name] for name, parameter in parts.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in parts.named_buffers()}
    with moved(parts, direction, 0.3):
        for name, parameter in parts.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[name].detach())
            assert torch.equal(parameter, expected[name]) or direction[name].any()
        assert not same(bits(parts), before) and torch.is_grad_enabled()
        assert same(dict(parts.named_buffers()), buffers)
    assert same(bits(parts), before)

    with torch.no_grad():  # a step there and back would lose these
        parts.linear.weight[0] = torch.tensor([1e-30, -0.0, 1e30, float("inf"), float("nan")])
    before = bits(parts)
    with pytest.raises(KeyboardInterrupt):
        with moved(parts, direction, 1e4):
            raise KeyboardInterrupt
    assert same(bits(parts), before)
    with pytest.raises(KeyError):  # a direction of another network: the first parameters have moved already
        with moved(parts, {name: direction[name] for name in list(direction)[:4]}, 1.0):
            pass
    assert same(bits(parts), before)


# ---------------------------------------------------------------- scans


def test_scan_of_a_quadratic_is_the_closed_form():
    torch.manual_seed(0)
    model, calls = nn.Linear(4, 3, bias=False).double(), []

    def measure():
        calls.append(1)
        return {"loss": model.weight.square().sum().item() / 2}

    rows = scan(model, measure, DISTANCES, directions=3, seed=2)
    assert [(row["direction"], row["distance"]) for row in rows] == [(k, a) for k in range(3) for a in DISTANCES]
    assert len(calls) == 3 * 4 + 1  # the centre once
    weights = model.weight.detach()
    for row in rows:
        d = filter_normalized_direction(model, seeded(2000 + row["direction"]))["weight"]
        expected = sum((w + row["distance"] * e) ** 2 for w, e in zip(weights.flatten().tolist(), d.flatten().tolist())) / 2
        assert row["loss"] == pytest.approx(expected, rel=1e-12)
    # ||d|| = ||W||, so that f(a) + f(-a) - 2 f(0) = a^2 ||W||^2; the linear term cancels in the mean over +a and -a
    square = weights.square().sum().item()
    assert sharpness(rows, radius=0.5) == pytest.approx(square / 2 * 0.25, rel=1e-9)
    assert sharpness(rows, radius=1.0) == pytest.approx(square / 2 * (0.25 + 1) / 2, rel=1e-9)


def relu_network(scale=1.0):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16, bias=False), nn.ReLU(), nn.Linear(16, 3, bias=False)).double()
    with torch.no_grad():
        model[0].weight.mul_(scale)
        model[2].weight.div_(scale)
    return model


def relu_losses(model):
    generator = seeded(0)
    inputs = torch.randn(32, 6, generator=generator, dtype=torch.float64)
    label = torch.randint(3, (32,), generator=generator)
    rows = scan(model, lambda: {"loss": F.cross_entropy(model(inputs), label).item()}, DISTANCES, 2, seed=7)
    return [row["loss"] for row in rows]


def test_rescaled_relu_networks_have_one_landscape(monkeypatch):
    curve = relu_losses(relu_network())
    assert max(curve) > min(curve) + 0.1
    assert relu_losses(relu_network(10.0)) == pytest.approx(curve, rel=1e-9)

    def gaussian(model, generator):  # without the normalisation the two differ: the test can fail
        return {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in model.named_parameters()}

    monkeypatch.setattr(landscape, "filter_normalized_direction", gaussian)
    assert relu_losses(relu_network(10.0)) != pytest.approx(relu_losses(relu_network()), rel=0.1)


# ---------------------------------------------------------------- numbers, table, files


def parabola(curvature, far=None):
    """Loss and mIoU along two directions, the second twice as steep; `far` instead of the loss at distance 1."""
    rows = [{"direction": k, "distance": a, "loss": 0.25 + (k + 1) * curvature * a * a, "miou": 70 - 10 * abs(a)}
            for k in range(2) for a in DISTANCES]
    rows[-1]["loss"] = rows[-1]["loss"] if far is None else None
    return rows


def test_summary_and_sharpness():
    rows = parabola(2.0)
    assert summary(rows[::-1], "loss") == {a: (0.25 + 3 * a * a, 0.25 + 2 * a * a, 0.25 + 4 * a * a) for a in DISTANCES}
    assert list(summary(rows[::-1], "loss")) == DISTANCES
    assert sharpness(rows) == pytest.approx(0.75) and sharpness(rows, radius=1.0) == pytest.approx((0.75 + 3) / 2)
    assert sharpness(rows, "miou") == pytest.approx(-5)
    tenths = [{"distance": 0.1 * k, "loss": float(k)} for k in range(4)]
    assert sharpness(tenths, radius=0.3) == pytest.approx(2)  # 0.1 * 3 > 0.3 in floating point
    assert sharpness(rows, radius=0.1) is None  # no distance within
    assert sharpness([row for row in rows if row["distance"]]) is None  # no centre
    broken = parabola(2.0, far="nan")
    assert sharpness(broken) == pytest.approx(0.75) and sharpness(broken, radius=1.0) is None
    assert summary(broken, "loss")[1.0] is None and summary(broken, "loss")[-1.0] is not None


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_has_a_row_for_each_checkpoint_and_measure():
    header, rule, *rows = table({"sharp": parabola(20.0, far="nan"), "flat": parabola(2.0)}).splitlines()
    assert cells(header) == ["checkpoint", "measure", "-1", "-0.5", "0", "0.5", "1", "mean rise within 0.5"]
    assert set(rule) == {"|", "-"} and len({len(line) for line in (header, rule, *rows)}) == 1
    assert [cells(row) for row in rows] == [
        ["sharp", "loss", "30.25", "7.75", "0.25", "7.75", "-", "7.5"],
        ["sharp", "miou", "60", "65", "70", "65", "60", "-5"],
        ["flat", "loss", "3.25", "1", "0.25", "1", "3.25", "0.75"],
        ["flat", "miou", "60", "65", "70", "65", "60", "-5"],
    ]


def test_table_of_many_distances_shows_both_ends_and_the_centre():
    rows = [{"direction": 0, "distance": a / 10, "loss": a * a / 100} for a in range(-10, 11)]
    shown = [float(cell) for cell in cells(table({"x": rows}).splitlines()[0])[2:-1]]
    assert len(shown) == landscape.COLUMNS and (shown[0], shown[4], shown[-1]) == (-1, 0, 1)
    assert shown == [-a for a in shown[::-1]]
    assert cells(table({"x": rows[10:11]}).splitlines()[2]) == ["x", "loss", "0", "-"]


def test_saved_numbers_are_every_row(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    curves = {"POS": parabola(2.0), "uniform": parabola(20.0, far="nan")}
    save(curves, tmp_path / "new", {"loss": "training loss"})
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["landscape.json"]
    assert json.loads((tmp_path / "new" / "landscape.json").read_text()) == curves


def test_exploding_losses_become_null(tmp_path):
    model = nn.Linear(3, 2, bias=False)
    norm = model.weight.norm().item()

    def measure():  # inf on one side, nan on the other, and an undefined mIoU
        excess = model.weight.norm().item() / norm - 1.2
        return {"loss": 1.0 if excess < 0 else (math.nan if model.weight[0, 0] > 0 else math.inf), "miou": None}

    rows = scan(model, measure, DISTANCES, 2, seed=0)
    assert {row["loss"] for row in rows} == {1.0, None} and {row["miou"] for row in rows} == {None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save({"x": rows}, tmp_path, {"loss": "training loss", "miou": "mIoU (%)"})
    text = (tmp_path / "landscape.json").read_text()
    assert "null" in text and "NaN" not in text and "Infinity" not in text and json.loads(text) == {"x": rows}
    assert set(cells(table({"x": rows}).splitlines()[3])[2:]) == {"-"}


def test_picture_has_a_panel_for_each_measure(tmp_path, drawn):
    save({"POS": parabola(2.0), "uniform": parabola(20.0, far="nan")}, tmp_path, {"loss": "training loss", "miou": "mIoU (%)"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["landscape.json", "landscape.png"]
    assert (tmp_path / "landscape.png").read_bytes().startswith(b"\x89PNG")
    left, right = drawn[0].axes
    assert (left.get_ylabel(), right.get_ylabel()) == ("training loss", "mIoU (%)")
    pos, uniform = left.lines
    assert list(pos.get_xdata()) == DISTANCES and list(pos.get_ydata()) == [3.25, 1, 0.25, 1, 3.25]
    assert math.isnan(uniform.get_ydata()[-1]) and list(uniform.get_ydata()[:2]) == [30.25, 7.75]
    corners = left.collections[0].get_paths()[0].vertices  # the band: from the lowest direction to the highest
    assert {(1.0, 2.25), (1.0, 4.25)} <= {tuple(corner) for corner in corners.tolist()}
    assert pos.get_color() != uniform.get_color() == right.lines[1].get_color()
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["POS", "uniform"]
