"""common/deformable.py against plain loops over heads, pixels and points, and finite differences."""

import math

import numpy as np
import pytest
import torch

from common import deformable


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def softmax(values):
    values = np.exp(values - values.max())
    return values / values.sum()


def value_at(table, x, y):
    """Bilinear interpolation of table [h, w, d] at pixel coordinates; zeros outside."""
    height, width, _ = table.shape
    found = np.zeros(table.shape[2])
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                found += (1 - abs(x - column)) * (1 - abs(y - row)) * table[row, column]
    return found


def plain_bilinear_sum(value, x, y, weight, height, width):
    value, x, y, weight = (part.detach().double().numpy() for part in (value, x, y, weight))
    batch, pixels, heads, points = x.shape
    out = np.zeros((batch, pixels, heads, value.shape[-1]))
    for image, pixel, head, point in np.ndindex(batch, pixels, heads, points):
        at = (image, pixel, head, point)
        out[at[:3]] += weight[at] * value_at(value[image, :, head].reshape(height, width, -1), x[at], y[at])
    return torch.from_numpy(out.reshape(batch, pixels, -1))


def draw_points(seed, batch, height, width, heads, points, channels, dtype=torch.float32):
    """Values and points of every kind: within, exactly on pixels, between border and outside, just and far outside."""
    generator = seeded(seed)
    value = torch.randn(batch, height * width, heads, channels, generator=generator, dtype=dtype)
    shape = (batch, height * width, heads, points)
    weight = torch.rand(shape, generator=generator, dtype=dtype) + 0.1
    x, y = ((torch.rand(shape, generator=generator, dtype=dtype) * (size + 3)) - 2 for size in (width, height))
    kind = torch.rand(shape, generator=generator)
    for part, size in ((x, width), (y, height)):
        part[kind < 0.3] = part[kind < 0.3].round()
        far = (kind > 0.8) & (torch.rand(shape, generator=generator) < 0.5)
        part[far] = (part[far] - size / 2) * 40
    special = [0.0, -1.0, -0.5, -0.999, width - 1.0, width - 0.5, float(width), width - 2.0, 0.001, -1000.0, 1e6]
    x.view(-1)[: len(special)] = torch.tensor(special, dtype=dtype)
    y.view(-1)[: len(special)] = torch.tensor([height - 1 - min(max(0.0, s), height - 1) for s in special], dtype=dtype)
    return value, x, y, weight


@pytest.mark.parametrize("batch, height, width, heads, points, channels", [(2, 4, 6, 3, 4, 2), (1, 7, 2, 2, 3, 5), (3, 2, 5, 1, 1, 1)])
def test_both_paths_of_bilinear_sum_equal_a_plain_loop(batch, height, width, heads, points, channels):
    inputs = draw_points(14, batch, height, width, heads, points, channels)
    expected = plain_bilinear_sum(*inputs, height, width)
    kept = [part.clone() for part in inputs]
    for path in (deformable.bilinear_sum_by_grid_sample, deformable.bilinear_sum_by_rows):
        found = path(*inputs, height, width)
        assert found.shape == (batch, height * width, heads * channels)
        far = 2e-4 if path is deformable.bilinear_sum_by_grid_sample else 2e-5
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=far)
        assert all(torch.equal(part, before) for part, before in zip(inputs, kept))
    doubles = [part.double() for part in inputs]
    for path in (deformable.bilinear_sum_by_grid_sample, deformable.bilinear_sum_by_rows):
        torch.testing.assert_close(path(*doubles, height, width), expected, rtol=0, atol=1e-9)


def test_bilinear_sum_takes_rows_only_without_gradients(monkeypatch):
    inputs, called = draw_points(15, 2, 4, 5, 2, 2, 3), []
    for name in ("bilinear_sum_by_grid_sample", "bilinear_sum_by_rows"):
        monkeypatch.setattr(deformable, name, lambda *arguments, path=getattr(deformable, name), name=name: called.append(name) or path(*arguments))
    training = deformable.bilinear_sum(*inputs, 4, 5)
    with torch.no_grad():
        torch.testing.assert_close(deformable.bilinear_sum(*inputs, 4, 5), training, rtol=0, atol=1e-4)
    assert called == ["bilinear_sum_by_grid_sample", "bilinear_sum_by_rows"]


def test_gradients_of_bilinear_sum():
    value, x, y, weight = draw_points(16, 2, 3, 4, 2, 2, 2, torch.float64)
    x, y = (part.floor() + 0.1 + 0.8 * (part - part.floor()) for part in (x, y))  # between pixels: no kinks
    inputs = [part.clone().requires_grad_() for part in (value, x, y, weight)]
    assert torch.autograd.gradcheck(lambda *parts: deformable.bilinear_sum(*parts, 3, 4), inputs)


def attention_of(channels, heads, points, seed=0):
    """A module whose offsets and weights differ from pixel to pixel."""
    torch.manual_seed(seed)
    module = deformable.DeformableAttention(channels, heads, points).double()
    with torch.no_grad():
        module.sampling.weight.normal_(std=0.5)
        module.sampling.bias.add_(0.37 * torch.randn(module.sampling.bias.shape))
        module.value.bias.normal_()
        module.out.bias.normal_()
    return module


def plain_attention(module, x, height, width):
    """Deformable DETR's Eq. 2 head by head, from the module's weights: x offsets, y offsets, then logits with the heads last."""
    heads, points = module.heads, module.points
    weights = {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}
    out = np.zeros(x.shape)
    for image in range(len(x)):
        rows = x[image].detach().numpy()
        value = (rows @ weights["value.weight"].T + weights["value.bias"]).reshape(height, width, heads, -1)
        for pixel in range(height * width):
            where = weights["sampling.weight"] @ rows[pixel] + weights["sampling.bias"]
            size, attended = heads * points, []
            for head in range(heads):
                attention = softmax(np.array([where[2 * size + point * heads + head] for point in range(points)]))
                total = np.zeros(value.shape[3])
                for point in range(points):
                    dx, dy = where[head * points + point], where[size + head * points + point]
                    total += attention[point] * value_at(value[:, :, head], pixel % width + dx, pixel // width + dy)
                attended.append(total)
            out[image, pixel] = weights["out.weight"] @ np.concatenate(attended) + weights["out.bias"]
    return torch.from_numpy(out)


@pytest.mark.parametrize("height, width", [(4, 6), (5, 2)])
def test_attention_equals_a_plain_loop_in_training_and_inference(height, width):
    module, x = attention_of(12, 3, 4), torch.randn(2, height * width, 12, generator=seeded(17), dtype=torch.float64)
    kept, expected = x.clone(), plain_attention(module, x, height, width)
    torch.testing.assert_close(module(x, height, width), expected, rtol=0, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(module(x, height, width), expected, rtol=0, atol=1e-9)
    with torch.inference_mode():
        torch.testing.assert_close(module.float()(x.float(), height, width), expected.float(), rtol=0, atol=1e-4)
    assert torch.equal(x, kept)


def test_gradients_of_attention():
    module, x = attention_of(4, 2, 2, seed=1), torch.randn(2, 6, 4, generator=seeded(18), dtype=torch.float64)
    names, parameters = zip(*module.named_parameters())

    def function(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters)), (x, 2, 3))

    assert torch.autograd.gradcheck(function, (x.requires_grad_(), *(parameter.detach().clone().requires_grad_() for parameter in parameters)))


def test_attention_starts_as_in_deformable_detr():
    module = deformable.DeformableAttention(64)
    assert (module.heads, module.points) == (8, 4) and not module.sampling.weight.any()
    x, y, logits = module.sampling.bias.detach().chunk(3)
    assert not logits.any()
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    offsets = torch.stack([x.view(8, 4), y.view(8, 4)], dim=2)
    for head, direction in enumerate(directions):
        for point in range(4):
            assert offsets[head, point].tolist() == pytest.approx([(point + 1) * part for part in direction], abs=1e-5)
    # With identity projections, a head's output is the mean of the four pixels in its direction.
    with torch.no_grad():
        for linear in (module.value, module.out):
            linear.weight.copy_(torch.eye(64))
    picture = torch.randn(9, 9, 64, generator=seeded(19))
    out = module(picture.view(1, 81, 64), 9, 9).view(9, 9, 8, 8)
    for head, (dx, dy) in enumerate(directions):
        mean = sum(picture[4 + point * dy, 4 + point * dx, 8 * head : 8 * head + 8] for point in range(1, 5)) / 4
        torch.testing.assert_close(out[4, 4, head], mean, rtol=0, atol=1e-4)
    with pytest.raises(ValueError):
        deformable.DeformableAttention(10, heads=4)
