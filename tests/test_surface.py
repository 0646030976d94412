"""common/surface.py against scipy, medpy, all pairs of voxels, Python sets, and distances known by hand."""

import time

import numpy as np
import pytest
import torch

from common import surface

SHAPES = [(5, 9, 12), (12, 5, 9), (9, 12, 5), (1, 7, 8), (8, 8, 8), (2, 2, 2), (1, 1, 1), (6, 1, 1), (17, 11), (11, 17), (1, 9), (13,), (3, 4, 5, 6)]
SPACINGS = [None, (10.0, 1.5625, 1.5625), (0.3, 2.0, 7.5)]


def random_mask(shape, share, seed=0):
    return np.random.default_rng(seed).random(shape) < share


def ellipsoid(shape, centre, radii):
    grid = np.indices(shape)
    return sum(((axis - c) / r) ** 2 for axis, c, r in zip(grid, centre, radii)) < 1


def heart(shape, shift=(0, 0, 0), grow=0.0):
    """A ring closed at one end, as the myocardium is, beside another component and a single voxel far away."""
    centre = np.array(shape) / 2 + shift
    outer = ellipsoid(shape, centre, np.array(shape) / (2.4, 4, 4) + grow)
    hollow = ellipsoid(shape, centre + (1, 0, 0), np.array(shape) / (2.4, 6, 6) - grow)
    beside = ellipsoid(shape, centre + (0, 0, shape[2] / 3), (2, 3, 2))
    mask = outer & ~hollow | beside
    mask[tuple(np.array(shape) - 2)] = True
    return mask


def pairs():
    """Name -> (prediction, label), both not empty."""
    shape = (7, 24, 30)
    corner, opposite, one = (np.zeros(shape, bool) for _ in range(3))
    corner[0, 0, 0] = opposite[-1, -1, -1] = one[3, 10, 20] = True
    border, slab = np.zeros(shape, bool), np.zeros(shape, bool)
    border[:, :8, :], slab[:, :, 25:] = True, True
    return {
        "heart": (heart(shape), heart(shape, (0, 1.3, -2.1), 0.7)),
        "the same": (heart(shape), heart(shape)),
        "inside": (ellipsoid(shape, (3, 12, 15), (2, 4, 4)), ellipsoid(shape, (3, 12, 15), (3.5, 9, 11))),
        "touching all borders": (border, slab),
        "full": (np.ones(shape, bool), heart(shape)),
        "corners": (corner, opposite),
        "one voxel": (one, heart(shape)),
        "speck": (heart(shape) | corner, heart(shape, (1, 0, 0))),
        "half random": (random_mask(shape, 0.5, 1), random_mask(shape, 0.5, 2)),
        "hardly random": (random_mask(shape, 0.002, 3), random_mask(shape, 0.004, 4)),
        "random and one": (random_mask(shape, 0.5, 5), corner),
        "one slice": (heart(shape)[3:4], heart(shape, (0, 2, 1))[3:4]),
        "picture": (heart(shape)[3], heart(shape, (0, 2, 1))[3]),
        "line": (random_mask((40,), 0.1, 6), random_mask((40,), 0.2, 7)),
        "tall": (heart((40, 11, 9)), heart((40, 11, 9), (2, 0, 0), 0.5)),
    }


PAIRS = pairs()


def spacings_of(mask):
    return [None] + [spacing[-mask.ndim :] for spacing in SPACINGS[1:]]


def all_pairs(points, mask, spacing):
    """Distance of each point to the nearest voxel of the mask, by trying them all."""
    scale = np.ones(mask.ndim) if spacing is None else np.array(spacing)
    here, there = np.argwhere(points) * scale, np.argwhere(mask) * scale
    return np.sqrt(((here[:, None] - there) ** 2).sum(axis=2)).min(axis=1)


def bare_surface(mask):
    """By the definition: a voxel of the mask with one of its face neighbours outside."""
    padded = np.pad(mask, 1)
    found = np.zeros(mask.shape, bool)
    for index in np.argwhere(mask):
        for axis in range(mask.ndim):
            for step in (0, 2):
                neighbour = index + 1
                neighbour[axis] = index[axis] + step
                found[tuple(index)] |= not padded[tuple(neighbour)]
    return found


# ---------------------------------------------------------------- overlap


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_overlap_against_sets(shape, share):
    first, second = random_mask(shape, share, 1), random_mask(shape, 0.4, 2)
    first.flat[0] = True
    a, b = (set(map(tuple, np.argwhere(mask))) for mask in (first, second))
    assert surface.dice(first, second) == pytest.approx(2 * len(a & b) / (len(a) + len(b)), abs=1e-15)
    assert surface.jaccard(first, second) == pytest.approx(len(a & b) / len(a | b), abs=1e-15)


@pytest.mark.parametrize("metric", [surface.dice, surface.jaccard])
def test_overlap_of_empty_masks(metric):
    empty, some = np.zeros((2, 3, 4), bool), random_mask((2, 3, 4), 0.5)
    assert metric(empty, empty) == 1.0
    assert metric(empty, some) == metric(some, empty) == 0.0
    assert metric(some, some) == 1.0 and metric(some, ~some) == 0.0
    assert all(type(metric(*masks)) is float for masks in ((empty, empty), (empty, some), (some, some)))


def test_overlap_by_hand():
    assert surface.dice(np.array([1, 1, 1, 0, 0]), np.array([0, 1, 1, 1, 1])) == pytest.approx(4 / 7)
    assert surface.jaccard(np.array([1, 1, 1, 0, 0]), np.array([0, 1, 1, 1, 1])) == pytest.approx(2 / 5)


# ---------------------------------------------------------------- distance transform


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_distance_transform_against_all_pairs(shape, share, spacing):
    mask = random_mask(shape, share)
    mask.flat[len(mask.flat) // 3] = True
    if spacing is not None:
        spacing = (spacing + (0.7,))[: mask.ndim]
    found = surface.distance_transform(mask, spacing)
    assert found.dtype == torch.float64 and found.shape == shape
    np.testing.assert_allclose(found.flatten().numpy(), all_pairs(np.ones(shape), mask, spacing), rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", PAIRS)
def test_distance_transform_against_scipy(name):
    ndimage = pytest.importorskip("scipy.ndimage", reason="compares with scipy's distance transform")
    for mask in PAIRS[name]:
        for spacing in spacings_of(mask):
            expected = ndimage.distance_transform_edt(~mask, sampling=spacing)
            np.testing.assert_allclose(surface.distance_transform(mask, spacing).numpy(), expected, rtol=1e-13, atol=0)


def test_distance_transform_without_spacing_is_the_root_of_a_whole_number():
    found = surface.distance_transform(heart((7, 24, 30)))
    squares = found.square().round()
    assert torch.equal(found, squares.sqrt())


@pytest.mark.parametrize("shape", SHAPES)
def test_distance_transform_of_an_empty_mask(shape):
    found = surface.distance_transform(np.zeros(shape, bool))
    assert found.shape == shape and found.dtype == torch.float64 and torch.isposinf(found).all()


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (1.0,) * 4, (), *((1.0, wrong, 1.0) for wrong in (0.0, -1.0, float("nan"), float("inf")))])
def test_wrong_spacing(spacing):
    mask = np.ones((2, 3, 4), bool)
    for call in (surface.distance_transform, lambda mask, spacing: surface.distance_metrics(mask, mask, spacing)):
        with pytest.raises(ValueError, match="spacing"):
            call(mask, spacing)


# ---------------------------------------------------------------- surface


@pytest.mark.parametrize("name", PAIRS)
def test_surface_against_the_definition_and_scipy(name):
    found = [surface.surface(mask) for mask in PAIRS[name]]
    for mask, ours in zip(PAIRS[name], found):
        assert ours.dtype == torch.bool
        np.testing.assert_array_equal(ours.numpy(), bare_surface(mask))
    ndimage = pytest.importorskip("scipy.ndimage", reason="compares with scipy's erosion")
    for mask, ours in zip(PAIRS[name], found):
        structure = ndimage.generate_binary_structure(mask.ndim, 1)
        np.testing.assert_array_equal(ours.numpy(), mask ^ ndimage.binary_erosion(mask, structure, iterations=1))


@pytest.mark.parametrize("shape", SHAPES)
def test_surface_of_a_full_volume_is_its_border(shape):
    expected = np.ones(shape, bool)
    expected[(slice(1, -1),) * len(shape)] = False
    np.testing.assert_array_equal(surface.surface(np.ones(shape, bool)).numpy(), expected)
    assert not surface.surface(np.zeros(shape, bool)).any()


# ---------------------------------------------------------------- surface distances


@pytest.mark.parametrize("name", PAIRS)
def test_surface_distances_against_all_pairs(name):
    prediction, label = PAIRS[name]
    ends = bare_surface(prediction), bare_surface(label)
    for spacing in spacings_of(label):
        found = surface.surface_distances(prediction, label, spacing)
        for ours, points, mask in zip(found, ends, ends[::-1]):
            assert ours.dtype == torch.float64
            np.testing.assert_allclose(ours.numpy(), all_pairs(points, mask, spacing), rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", PAIRS)
def test_metrics_against_scipy(name):
    """What medpy computes, written with scipy and numpy: on the whole volume, without any cropping."""
    ndimage = pytest.importorskip("scipy.ndimage", reason="compares with scipy's distance transform")
    structure = ndimage.generate_binary_structure(PAIRS[name][0].ndim, 1)
    ends = [mask ^ ndimage.binary_erosion(mask, structure) for mask in PAIRS[name]]
    for spacing in spacings_of(ends[0]):
        there, back = (ndimage.distance_transform_edt(~mask, sampling=spacing)[points] for points, mask in (ends, ends[::-1]))
        found = surface.distance_metrics(*PAIRS[name], spacing)
        assert list(found) == ["hd95", "asd", "assd"] and all(type(value) is float for value in found.values())
        assert found["hd95"] == pytest.approx(np.percentile(np.concatenate([there, back]), 95), rel=1e-12, abs=1e-12)
        assert found["asd"] == pytest.approx(there.mean(), rel=1e-12, abs=1e-12)
        assert found["assd"] == pytest.approx((there.mean() + back.mean()) / 2, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_metrics_against_medpy(name):
    medpy = pytest.importorskip("medpy.metric.binary", reason="compares with medpy")
    prediction, label = PAIRS[name]
    assert surface.dice(prediction, label) == pytest.approx(medpy.dc(prediction, label), abs=1e-15)
    assert surface.jaccard(prediction, label) == pytest.approx(medpy.jc(prediction, label), abs=1e-15)
    for spacing in spacings_of(label):
        found = surface.distance_metrics(prediction, label, spacing)
        there, back = medpy.asd(prediction, label, spacing), medpy.asd(label, prediction, spacing)
        assert found["hd95"] == pytest.approx(medpy.hd95(prediction, label, spacing), rel=1e-12, abs=1e-12)
        assert found["asd"] == pytest.approx(there, rel=1e-12, abs=1e-12)
        assert found["assd"] == pytest.approx((there + back) / 2, rel=1e-12, abs=1e-12)  # medpy.assd: this up to 0.5.1, pooled since


@pytest.mark.parametrize("shift", [(0, 0, 5), (0, 3, 4), (6, 0, 0), (1, 2, 2)])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_moved_voxel_is_as_far_as_it_was_moved(shift, spacing):
    first, second = np.zeros((9, 20, 20), bool), np.zeros((9, 20, 20), bool)
    first[1, 4, 5] = second[1 + shift[0], 4 + shift[1], 5 + shift[2]] = True
    length = np.linalg.norm(np.multiply(shift, spacing or (1, 1, 1)))
    assert surface.distance_metrics(first, second, spacing) == pytest.approx({"hd95": length, "asd": length, "assd": length})


def test_moved_plates_by_hand():
    """Plates of one voxel's thickness: every voxel is surface, and its nearest lies straight across."""
    first, second = np.zeros((12, 6, 7), bool), np.zeros((12, 6, 7), bool)
    first[2], second[9] = True, True
    assert surface.distance_metrics(first, second) == {"hd95": 7.0, "asd": 7.0, "assd": 7.0}
    assert surface.distance_metrics(first, second, (0.5, 3.0, 2.0)) == {"hd95": 3.5, "asd": 3.5, "assd": 3.5}


def test_a_moved_line_by_hand():
    """Voxels 0..9 and 3..12 of a line, each of them surface: 3, 2, 1 and seven times 0 to go, from either."""
    first, second = np.zeros((1, 1, 20), bool), np.zeros((1, 1, 20), bool)
    first[..., :10], second[..., 3:13] = True, True
    found = surface.distance_metrics(first, second)
    assert found["asd"] == found["assd"] == pytest.approx(0.6)
    assert found["hd95"] == pytest.approx(3.0)  # place 0.95 * 19 of 0, ..., 1, 1, 2, 2, 3, 3


def test_percentile_is_of_both_directions_together_and_asd_of_one():
    """A small prediction within a long label: the label's voxels are many and far, the prediction's lie on it."""
    prediction, label = np.zeros((1, 1, 101), bool), np.ones((1, 1, 101), bool)
    prediction[..., 0] = True
    found = surface.distance_metrics(prediction, label)
    pooled = [0] + list(range(101))  # sorted: place p > 0 holds p - 1
    assert found["hd95"] == pytest.approx(0.95 * (len(pooled) - 1) - 1)
    assert found["asd"] == 0.0 and found["assd"] == pytest.approx(25.0)
    swapped = surface.distance_metrics(label, prediction)
    assert swapped["asd"] == pytest.approx(50.0)
    assert swapped["hd95"] == found["hd95"] and swapped["assd"] == found["assd"]


@pytest.mark.parametrize("name", ["heart", "half random", "touching all borders"])
def test_space_around_changes_nothing_but_at_the_border(name):
    """Outside of the volume counts as empty space does, so more of it around both masks makes no difference."""
    masks = PAIRS[name]
    wide = [np.pad(mask, ((2, 3), (30, 1), (0, 17))) for mask in masks]
    assert surface.distance_metrics(*wide, (3.0, 1.0, 1.5)) == surface.distance_metrics(*masks, (3.0, 1.0, 1.5))


@pytest.mark.parametrize("empty", ["prediction", "label"])
def test_distance_to_an_empty_mask(empty):
    some, none = heart((5, 12, 12)), np.zeros((5, 12, 12), bool)
    masks = (none, some) if empty == "prediction" else (some, none)
    for call in (surface.surface_distances, surface.distance_metrics):
        with pytest.raises(ValueError, match=f"the {empty} is empty"):
            call(*masks)


@pytest.mark.parametrize("call", [surface.dice, surface.jaccard, surface.surface_distances, surface.distance_metrics])
@pytest.mark.parametrize("other", [(2, 3, 5), (3, 4), (1, 3, 4), (2, 4, 3)])
def test_wrong_shapes(call, other):
    """Also where numpy would broadcast."""
    with pytest.raises(ValueError, match="shapes"):
        call(np.ones((2, 3, 4), bool), np.ones(other, bool))


def test_kinds_of_masks():
    """Arrays of numbers, turned, read-only and strided ones, and tensors; none is changed."""
    prediction, label = PAIRS["speck"]
    expected = surface.distance_metrics(prediction, label), surface.dice(prediction, label)
    locked = np.asfortranarray(prediction)
    locked.setflags(write=False)
    turned = np.ascontiguousarray(label[::-1, :, ::-1])[::-1, :, ::-1]
    every_other = np.repeat(label, 2, axis=2)[..., ::2]
    permuted = torch.tensor(label.transpose(2, 0, 1).copy()).permute(1, 2, 0)
    for first in (prediction.astype(np.uint8) * 3, locked, prediction.astype(np.float32), torch.tensor(prediction)):
        for second in (turned, every_other, permuted, torch.tensor(label).to(torch.uint8)):
            kept = [torch.tensor(mask.tolist()) for mask in (first, second)]
            assert (surface.distance_metrics(first, second), surface.dice(first, second)) == expected
            assert surface.surface_distances(first, second)[0].tolist() == surface.surface_distances(prediction, label)[0].tolist()
            np.testing.assert_array_equal(surface.distance_transform(second).numpy(), surface.distance_transform(label).numpy())
            assert all(torch.equal(before, torch.tensor(after.tolist())) for before, after in zip(kept, (first, second)))


@pytest.mark.parametrize("kind", ["hearts", "hearts and specks", "half random", "half random against one voxel"])
def test_a_volume_takes_less_than_two_seconds(kind):
    shape = (10, 256, 256)
    prediction, label = heart(shape), heart(shape, (0, 4, -3), 1.0)
    if kind == "hearts and specks":
        prediction[0, 0, 0] = prediction[-1, -1, -1] = True
    if kind.startswith("half"):
        prediction, label = random_mask(shape, 0.5, 1), random_mask(shape, 0.5, 2)
    if kind.endswith("one voxel"):
        label[:] = False
        label[0, 0, 0] = True
    start = time.process_time()  # what others do on the machine does not count
    surface.distance_metrics(prediction, label)
    assert time.process_time() - start < 2
