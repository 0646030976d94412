"""common/medical.py and the programs on volumes: files and lists that are wrong, slices by hand, scores by sets of voxels, NIfTI."""

import io
import itertools
import json
import math
import pickle
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from programs import refuse, run, run_as_program, succeed

import diffrect
from common import medical, scores
from common.medical import DATASETS, Slices, Volume, VolumeData, VolumeFile, load_volumes, read_volume, write_volume
from common.runtime import Context, UserError
from common.scores import METRICS

CPU = torch.device("cpu")
ALONE = Context(0, 1, CPU)
INFO = DATASETS["acdc"]  # 4 classes
SPACING = (10.0, 1.25, 1.5)


def error_of(function, *arguments) -> str:
    """The message of the UserError that the call raises: one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def random_volume(shape=(3, 7, 5), seed=0) -> Volume:
    rng = np.random.default_rng(seed)
    label = rng.choice(np.array([0, 1, 2, 3, 255], np.uint8), shape)
    return Volume(rng.normal(300, 80, shape).astype(np.float32), label, SPACING)


# ---------------------------------------------------------------- files


def test_volumes_come_back_as_they_were(tmp_path):
    volume = random_volume()
    low, high = volume.image.min(), volume.image.max()
    for name, changes in {"all": {}, "image": {"label": None, "spacing": None}, "no label": {"label": None}, "no spacing": {"spacing": None}}.items():
        wanted = replace(volume, **changes)
        write_volume(tmp_path / "deep" / name, wanted)  # makes the folder; the name may have any ending
        found = read_volume(tmp_path / "deep" / name, 4)
        assert found.image.dtype == np.float32 and found.image.min() == 0 and found.image.max() == 1
        np.testing.assert_array_equal(found.image, (volume.image - low) / (high - low))
        assert found.spacing == wanted.spacing and (found.label is None) == (wanted.label is None)
        if found.label is not None:
            assert found.label.dtype == np.uint8 and np.array_equal(found.label, volume.label)
        write_volume(tmp_path / "again", found)  # what is normalised already keeps its bits
        assert read_volume(tmp_path / "again").image.tobytes() == found.image.tobytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "deep"]  # no temporary file


@pytest.mark.parametrize("dtype", ["u1", "<i2", ">i2", "<i8", "f2", ">f4", "f8", "?"])
def test_numbers_of_any_kind_are_read(dtype, tmp_path):
    values = np.array([[[0, 1], [0, 1]]]) if dtype == "?" else np.array([[[0, 40], [100, 20]]])
    labels = np.array([[[0, 3], [255, 1]]]).astype(">i4")
    np.savez(tmp_path / "v.npz", image=values.astype(dtype), label=labels, spacing=np.array([1, 2, 3]))
    volume = read_volume(tmp_path / "v.npz", 4)
    np.testing.assert_allclose(volume.image, values / values.max(), atol=1e-7)
    assert np.array_equal(volume.label, labels) and volume.spacing == (1, 2, 3)


def test_an_image_without_contrast_is_zero(tmp_path):
    np.savez(tmp_path / "v.npz", image=np.full((2, 3, 4), 7.5))
    assert not read_volume(tmp_path / "v.npz").image.any()


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


GOOD = {"image": np.arange(12.0).reshape(3, 2, 2), "label": np.ones((3, 2, 2), np.uint8), "spacing": np.array(SPACING)}


def changed(name: str, place: tuple, value) -> np.ndarray:
    array = GOOD[name].copy()
    array[place] = value
    return array


BAD_ARRAYS = {
    "no image": ({"image": None}, "image"),
    "2-D": ({"image": np.zeros((3, 4))}, "[3, 4]"),
    "4-D": ({"image": np.zeros((3, 2, 2, 1))}, "[3, 2, 2, 1]"),
    "no slices": ({"image": np.zeros((0, 2, 2)), "label": None}, "[0, 2, 2]"),
    "text": ({"image": np.full((3, 2, 2), "x")}, "numbers"),
    "complex": ({"image": np.ones((3, 2, 2), complex)}, "complex128"),
    "nan": ({"image": changed("image", (1, 0, 1), np.nan)}, "not finite"),
    "infinite": ({"image": changed("image", (2, 1, 1), -np.inf)}, "not finite"),
    "too large for float32": ({"image": changed("image", (1, 0, 1), 1e300)}, "finite"),
    "label of another shape": ({"label": np.zeros((3, 2, 3), np.uint8)}, "[3, 2, 3]"),
    "label too large": ({"label": changed("label", (2, 0, 1), 4)}, "label 4"),
    "label far too large": ({"label": np.full((3, 2, 2), 256)}, "label 256"),  # 0 in 8 bits
    "label negative": ({"label": np.full((3, 2, 2), -1)}, "label -1"),  # 255 in 8 bits
    "label of floats": ({"label": np.ones((3, 2, 2))}, "float64"),
    "two spacings": ({"spacing": np.ones(2)}, "spacing"),
    "one spacing": ({"spacing": 5.0}, "spacing"),
    "spacing zero": ({"spacing": np.array([10.0, 0, 1])}, "spacing"),
    "spacing nan": ({"spacing": np.array([10.0, np.nan, 1])}, "spacing"),
    "spacing text": ({"spacing": np.array(["a", "b", "c"])}, "spacing"),
}


@pytest.mark.parametrize("bad", BAD_ARRAYS)
def test_wrong_arrays_are_named(bad, tmp_path):
    changes, says = BAD_ARRAYS[bad]
    path = tmp_path / "bad.npz"
    np.savez(path, **{name: array for name, array in {**GOOD, **changes}.items() if array is not None})
    message = error_of(read_volume, path, 4)
    assert str(path) in message and says in message


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "bad.npz"
    assert str(path) in error_of(read_volume, path)  # missing
    path.mkdir()
    assert str(path) in error_of(read_volume, path)
    path.rmdir()
    rng = np.random.default_rng(0)
    write_volume(path, random_volume())
    content = path.read_bytes()
    for length in {*range(0, len(content), 29), len(content) - 1}:
        path.write_bytes(content[:length])
        assert str(path) in error_of(read_volume, path)
    for noise in (rng.bytes(1000), b"PK\x03\x04" + rng.bytes(1000), b"\x93NUMPY" + rng.bytes(1000), b"<html>404</html>"):
        path.write_bytes(noise)
        assert str(path) in error_of(read_volume, path)


def test_flipped_bits_never_end_in_a_traceback(tmp_path):
    """Each is found out, or does no harm: names and times of a zip file are not covered by its checksums."""
    path = tmp_path / "bad.npz"
    write_volume(path, Volume(np.arange(4, dtype=np.float32).reshape(1, 2, 2), None, None))
    whole, content = read_volume(path), path.read_bytes()
    for place, bit in itertools.product(range(len(content)), (0, 3, 6)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        try:
            found = read_volume(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert found.image.tobytes() == whole.image.tobytes(), place


def test_foreign_contents_under_the_name_are_named(tmp_path):
    path = tmp_path / "bad.npz"
    single = io.BytesIO()
    np.save(single, GOOD["image"])
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999, 99999999, 99), }".ljust(117) + b"\n"
    members = {"image": b"hello", "image.npy": b"hello", "image.npy ": b""}
    huge = {"image.npy": b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header}
    path.write_bytes(single.getvalue())  # an .npy file renamed
    assert str(path) in error_of(read_volume, path)
    for entries in ({name: content} for name, content in {**members, **huge}.items()):
        with zipfile.ZipFile(path, "w") as file:
            for name, content in entries.items():
                file.writestr(name, content)
        assert str(path) in error_of(read_volume, path), entries


def test_pickled_objects_are_refused_and_not_executed(tmp_path):
    path, witness = tmp_path / "bad.npz", tmp_path / "executed"
    objects = np.empty((1, 2, 2), object)
    objects.fill(Evil(witness))
    for arrays in ({"image": objects}, {**GOOD, "label": objects}, {**GOOD, "spacing": objects}):
        np.savez(path, **arrays)
        assert str(path) in error_of(read_volume, path)
    path.write_bytes(pickle.dumps(Evil(witness)))
    assert str(path) in error_of(read_volume, path)
    assert not witness.exists()
    pickle.loads(pickle.dumps(Evil(witness)))
    assert witness.exists()  # it would have shown


# ---------------------------------------------------------------- resizing


@pytest.mark.parametrize("height, width, size", [(24, 24, 24), (30, 44, 16), (9, 13, 32), (40, 11, 20), (1, 7, 4), (64, 48, 16)])
def test_slices_are_resized_as_pillow_does(height, width, size):
    image = np.random.default_rng(0).random((3, height, width), np.float32)
    ours = medical.resize_slices(image, size)
    assert ours.shape == (3, size, size) and ours.dtype == np.uint8
    for result, picture in zip(ours, image):
        resized = np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR)) * 255  # float32, antialiased
        assert np.abs(result - resized).max() < 0.501  # rounded, never cut off
    label = np.random.default_rng(1).integers(0, 256, (3, height, width)).astype(np.uint8)
    resized = [np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.NEAREST)) for plane in label]
    assert np.array_equal(medical.resize_labels(label, size), resized)


def test_equal_size_changes_nothing_and_integer_factors_are_known():
    steps = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    assert np.array_equal(medical.resize_slices(steps / np.float32(255), 16), steps)
    label = np.random.default_rng(0).integers(0, 256, (2, 12, 12)).astype(np.uint8)
    assert np.array_equal(medical.resize_labels(label, 12), label)
    assert np.array_equal(medical.resize_labels(label, 4), label[:, 1::3, 1::3])
    assert np.array_equal(medical.resize_labels(label, 36), label.repeat(3, axis=1).repeat(3, axis=2))


def stripes(slices: int, size: int, blocks: int = 4) -> np.ndarray:
    """Classes [slices, size, size] in `blocks` stripes, rows in even and columns in odd slices, in another order in each slice."""
    stripe = np.arange(size) * blocks // size
    planes = [np.broadcast_to(((stripe * (1 + 2 * (number % 2)) + number) % 4)[:, None], (size, size)) for number in range(slices)]
    return np.stack([plane if number % 4 < 2 else plane.T for number, plane in enumerate(planes)])


@pytest.mark.parametrize("height, width", [(16, 16), (32, 48), (80, 8), (12, 100)])
@pytest.mark.parametrize("at_once", [1, 4, 7, 100])
def test_a_volume_is_segmented_on_its_own_grid(height, width, at_once, monkeypatch):
    monkeypatch.setattr(scores, "SLICES_AT_ONCE", at_once)
    pattern, sizes = torch.from_numpy(stripes(9, 16)), []

    def predict(slices):
        assert slices.shape[1:] == (1, 16, 16) and slices.dtype == torch.float32
        first = sum(sizes)
        sizes.append(len(slices))
        return 9 * torch.nn.functional.one_hot(pattern[first : first + len(slices)], 4).permute(0, 3, 1, 2).bfloat16()

    label = scores.segment_volume(predict, np.random.default_rng(0).random((9, height, width), np.float32), 16, CPU)
    assert label.shape == (9, height, width) and label.dtype == np.uint8
    assert max(sizes) <= at_once and sum(sizes) == 9
    rows, columns = ((2 * np.arange(length) + 1) * 16 // (2 * length) for length in (height, width))
    assert np.array_equal(label, pattern.numpy()[:, rows][:, :, columns])


def test_the_network_sees_bytes_and_its_logits_are_resized_before_the_argmax():
    seen = []

    def predict(slices):
        seen.append(slices)
        logits = torch.zeros(1, 3, 4, 4)  # class 1 wins in the second column, class 2 in the third
        logits[:, 1, :, 1], logits[:, 2, :, 2], logits[:, 0] = 1.0, 1.0, 0.8
        return logits

    label = scores.segment_volume(predict, np.full((1, 8, 12), 0.35, np.float32), 4, CPU)
    assert torch.equal(seen[0], torch.full((1, 1, 4, 4), 89 / 255))  # 89.25 of 255
    # Class 1 at columns 2 to 6 of 12: 1/3, 2/3, 1, 2/3, 1/3; class 0 is at 0.8 everywhere.
    assert np.array_equal(label[0], np.tile([0, 0, 0, 0, 1, 0, 0, 2, 0, 0, 0, 0], (8, 1)))


# ---------------------------------------------------------------- weak views


class Chosen:
    """A generator whose draws are given."""

    def __init__(self, up_down: bool, left_right: bool, angle: float | None = None):
        self.flips, self.angle = np.array([up_down, left_right]), angle

    def random(self, size=None):
        return np.where(self.flips, 0.0, 0.999) if size else (0.999 if self.angle is None else 0.0)

    def uniform(self, low, high):
        return self.angle or 0.0


def by_hand(size: int, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel of a picture turned anticlockwise about its middle comes from: row and column, from its upper left corner."""
    down, right = np.mgrid[:size, :size] + 0.5 - size / 2
    sine, cosine = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    return sine * right + cosine * down + size / 2, cosine * right - sine * down + size / 2


def bilinear(image: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    padded = np.pad(image.astype(float), 1, mode="edge")
    rows, columns = rows + 0.5, columns + 0.5
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    down, right = rows - top, columns - left
    return sum(weight * padded[top + i, left + j] for i, j, weight in (
        (0, 0, (1 - down) * (1 - right)), (0, 1, (1 - down) * right), (1, 0, down * (1 - right)), (1, 1, down * right)))


@pytest.mark.parametrize("up_down, left_right", [(False, False), (False, True), (True, False), (True, True)])
def test_flips_and_quarter_turns_are_exact(up_down, left_right):
    rng = np.random.default_rng(0)
    image, label = (rng.integers(0, 256, (9, 9)).astype(np.uint8) for _ in range(2))
    before = image.copy(), label.copy()
    for angle in (None, 0.0, 90.0, 180.0, 270.0):
        out, out_label, valid = medical.slice_geometry(image, label, Chosen(up_down, left_right, angle))
        for result, source in ((out, image), (out_label, label)):
            flipped = source[:: -1 if up_down else 1, :: -1 if left_right else 1]
            assert np.array_equal(result, np.rot90(flipped, int((angle or 0) / 90))) and result.dtype == np.uint8
        assert valid.dtype == bool and valid.all()
    assert np.array_equal(image, before[0]) and np.array_equal(label, before[1])


@pytest.mark.parametrize("size", [32, 33])
@pytest.mark.parametrize("angle", [1.0, 30.0, 45.0, 123.4, 200.0, 359.0])
def test_turns_are_those_by_hand(size, angle):
    rng = np.random.default_rng(0)
    image, label = rng.integers(1, 256, (size, size)).astype(np.uint8), rng.integers(0, 255, (size, size)).astype(np.uint8)
    out, out_label, valid = medical.slice_geometry(image, label, Chosen(False, False, angle))
    rows, columns = by_hand(size, angle)
    inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
    clear = (np.abs(rows - rows.round()) > 1e-2) & (np.abs(columns - columns.round()) > 1e-2)  # not on the border of two pixels
    assert clear.mean() > 0.9 and np.array_equal(valid[clear], inside[clear])
    assert np.array_equal(out_label == 255, ~valid) and np.array_equal(out == 0, ~valid)  # neither is in the slice
    nearest = label[np.floor(rows).astype(int).clip(0, size - 1), np.floor(columns).astype(int).clip(0, size - 1)]
    assert np.array_equal(out_label[clear & inside], nearest[clear & inside])
    assert np.abs(out - bilinear(image, rows.clip(0, size), columns.clip(0, size)))[clear & inside].max() < 1.01


def test_image_and_label_turn_together_about_the_middle():
    rows, columns = np.mgrid[:33, :33]
    label = ((rows // 11) * 3 + columns // 11).astype(np.uint8)
    label[16, 16] = 100
    image = (20 * label + 10).astype(np.uint8)
    for seed in range(60):
        out, out_label, valid = medical.slice_geometry(image, label, np.random.default_rng(seed))
        assert out_label[16, 16] == 100
        windows = np.lib.stride_tricks.sliding_window_view(out_label, (3, 3))
        flat = (windows == windows[:, :, 1:2, 1:2]).all((2, 3)) & valid[1:-1, 1:-1]  # bilinear mixes at the borders of the parts
        assert flat.sum() > 300
        assert np.array_equal(out[1:-1, 1:-1][flat], 20 * out_label[1:-1, 1:-1][flat] + 10)
        assert (out_label[~valid] == 255).all() and not out[~valid].any() and (out_label[valid] != 255).all()
        again = medical.slice_geometry(image, None, np.random.default_rng(seed))
        assert again[1] is None and np.array_equal(again[0], out) and np.array_equal(again[2], valid)


def test_flips_and_turns_are_drawn_evenly():
    image, label = np.random.default_rng(1).integers(0, 256, (33, 33)).astype(np.uint8), np.zeros((33, 33), np.uint8)
    label[14:19, 26:31], label[26:31, 14:19] = 1, 2  # to the right of the middle and below it: a flip changes their order
    flipped = [image.tobytes(), image[::-1].tobytes(), image[:, ::-1].tobytes(), image[::-1, ::-1].tobytes()]
    upright, turned, number, rng = np.zeros(4), np.zeros((2, 8)), 2000, np.random.default_rng(0)
    for _ in range(number):
        out, out_label, _ = medical.slice_geometry(image, label, rng)
        if out.tobytes() in flipped:
            upright[flipped.index(out.tobytes())] += 1
        else:
            (down, right), (down2, right2) = ((np.argwhere(out_label == value) - 16).mean(axis=0) for value in (1, 2))
            turned[int(down * right2 > right * down2), int(math.atan2(down, right) % math.tau / math.tau * 8)] += 1
    assert np.abs(upright / number - 1 / 8).max() < 0.03  # none, either or both flips, not turned
    assert np.abs(turned / number - 1 / 32).max() < 0.015  # any direction, mirrored or not


# ---------------------------------------------------------------- batches


def write_slices(path: Path, values: list[int], label: bool = True) -> VolumeFile:
    """A volume [4, 10, 14] whose slices are each of one grey, 85 x value, and of one class, the value."""
    plane = np.broadcast_to(np.array(values, np.float32)[:, None, None] / 3, (4, 10, 14))
    write_volume(path, Volume(plane, np.rint(3 * plane).astype(np.uint8) if label else None, SPACING))
    return VolumeFile(path.stem, path.stem, path)


@pytest.fixture
def slices(tmp_path) -> VolumeData:
    labeled = [write_slices(tmp_path / f"l{number}.npz", [3, 0, 1, 2]) for number in range(2)]
    unlabeled = [write_slices(tmp_path / f"u{number}.npz", [0, 3, 2, 1], label=False) for number in range(3)]
    return VolumeData(INFO, tmp_path, labeled, unlabeled, [], [])


def batches(data: VolumeData, start=0, total=6, rank=0, ranks=1, workers=0, unlabeled=True, seed=5) -> list[dict]:
    config = SimpleNamespace(crop=16, batch_size=4, seed=seed, num_workers=workers)
    return list(medical.slice_loader(data, config, Context(rank, ranks, CPU), start, total, unlabeled))


def assert_same_batches(left: list[dict], right: list[dict]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_batches_hold_slices_and_their_labels(slices):
    for batch in batches(slices):
        assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()} == {
            "labeled": (torch.uint8, (4, 1, 16, 16)), "label": (torch.uint8, (4, 16, 16)),
            "unlabeled": (torch.uint8, (4, 1, 16, 16)), "valid": (torch.bool, (4, 16, 16))}
        inside = batch["label"] != 255
        assert torch.equal(batch["labeled"][:, 0][inside], 85 * batch["label"][inside]) and inside[:, 8, 8].all()
        assert not batch["labeled"][:, 0][~inside].any() and not batch["unlabeled"][:, 0][~batch["valid"]].any()
    middles = [int(value) for batch in batches(slices) for value in batch["label"][:, 8, 8]]
    assert [sorted(middles[first : first + 8]) for first in (0, 8, 16)] == 3 * [[0, 0, 1, 1, 2, 2, 3, 3]]  # each slice once a pass
    assert all(batch.keys() == {"labeled", "label"} for batch in batches(slices, unlabeled=False))


def test_truth_of_unlabeled_slices_is_read_only_where_it_is_allowed(slices, tmp_path):
    slices.unlabeled = [write_slices(tmp_path / f"u{number}.npz", [0, 3, 2, 1]) for number in range(3)]
    assert all("truth" not in batch for batch in batches(slices))  # it is there, and yet not handed on
    allowed = replace(slices, info=DATASETS["phantom"])
    for batch, without in zip(batches(allowed), batches(slices)):
        truth = batch.pop("truth")
        assert_same_batches([batch], [without])
        assert torch.equal(truth != 255, batch["valid"]) and torch.equal(85 * truth[batch["valid"]], batch["unlabeled"][:, 0][batch["valid"]])
    write_slices(tmp_path / "u1.npz", [0, 3, 2, 1], label=False)
    assert "u1.npz has no label" in error_of(batches, allowed)
    slices.labeled[0] = write_slices(tmp_path / "l0.npz", [0, 3, 2, 1], label=False)
    assert "l0.npz has no label" in error_of(batches, slices)


def test_samples_depend_neither_on_ranks_nor_on_workers_nor_on_a_restart(slices):
    whole = batches(slices)
    assert_same_batches(batches(slices, workers=2), whole)
    assert_same_batches(batches(slices, start=4), whole[4:])
    parts = [batches(slices, rank=rank, ranks=2) for rank in (0, 1)]
    assert_same_batches([{name: torch.cat([a[name], b[name]]) for name in a} for a, b in zip(*parts)], whole)
    assert len(parts[0][0]["labeled"]) == 2
    assert any(not torch.equal(a["unlabeled"], b["unlabeled"]) for a, b in zip(batches(slices, seed=6), whole))


def test_a_slice_has_another_view_each_time_and_in_each_stream():
    noise = np.random.default_rng(0).integers(0, 256, (1, 16, 16)).astype(np.uint8)
    views = medical.SliceSet((Slices(noise, noise), Slices(noise, None)), seed=5)
    seen = [[views[stream, 0, position]["image"].numpy().tobytes() for position in range(16)] for stream in (0, 1)]
    assert len(set(seen[0])) > 6 and len(set(seen[1])) > 6 and sum(a == b for a, b in zip(*seen)) < 8  # half are turned, the others one of 4 flips
    assert seen[0] == [views[0, 0, position]["image"].numpy().tobytes() for position in range(16)]
    item = views[1, 0, 0]
    assert item.keys() == {"image", "valid", "stream"} and item["stream"] == 1 and views[0, 0, 0].keys() == {"image", "valid", "stream", "label"}


# ---------------------------------------------------------------- lists


LISTS = {
    "train": "b b_1\na a_1\n\nb   b_2  \r\nc c_1\na a_2\n",
    "val": "d d_1\nd d_2\n", "test": "e e_1\nf f_1\n",
    "train_split2": "c c_1\nd d_1\nb b_1\n", "val_split2": "a a_1\n",
    "train_split3": "a a_1\nb b_1\n",
}


@pytest.fixture
def listed(tmp_path) -> SimpleNamespace:
    """Options of a data set whose volumes are empty files: only lists are read here."""
    for folder in ("lists", "volumes"):
        (tmp_path / folder).mkdir()
    for name, text in LISTS.items():
        (tmp_path / "lists" / f"{name}.txt").write_text(text)
        for line in filter(str.strip, text.splitlines()):
            (tmp_path / "volumes" / f"{line.split()[1]}.npz").touch()
    return SimpleNamespace(dataset="acdc", data_root=str(tmp_path), labeled="2", labeled_list=None, unlabeled_list=None, split_seed=None)


def names(files: list[VolumeFile]) -> list[str]:
    return [file.name for file in files]


def with_(options: SimpleNamespace, **changes) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(options), **changes})


def lists_of(options: SimpleNamespace, **changes) -> tuple[list[str], ...]:
    data = load_volumes(with_(options, **changes), ALONE)
    return tuple(names(getattr(data, name)) for name in ("labeled", "unlabeled", "val", "test"))


def test_labeled_volumes_are_those_of_the_first_patients(listed, tmp_path):
    rest = (["d_1", "d_2"], ["e_1", "f_1"])
    assert lists_of(listed, labeled="1") == (["b_1", "b_2"], ["a_1", "c_1", "a_2"], *rest)
    assert lists_of(listed, labeled="2") == (["b_1", "a_1", "b_2", "a_2"], ["c_1"], *rest)
    for everything in ("3", "all"):
        assert lists_of(listed, labeled=everything) == (["b_1", "a_1", "b_2", "c_1", "a_2"], [], *rest)
    data = load_volumes(listed, ALONE)
    assert data.info is INFO and data.root == tmp_path and not data.tune
    assert data.labeled[1] == VolumeFile("a", "a_1", tmp_path / "volumes" / "a_1.npz")
    assert len(names(load_volumes(with_(listed, dataset="prostate", labeled=None), ALONE).labeled)) == 4  # its default: 2 patients


def test_splits_have_lists_of_their_own(listed, tmp_path):
    (tmp_path / "lists" / "test.txt").unlink()  # no test list is no error
    assert lists_of(listed, labeled="1_split2") == (["c_1"], ["d_1", "b_1"], ["a_1"], [])
    assert lists_of(listed, labeled="all_split2")[:2] == (["c_1", "d_1", "b_1"], [])
    assert lists_of(listed, labeled="1_split3") == (["a_1"], ["b_1"], ["d_1", "d_2"], [])  # val.txt, for want of its own
    (tmp_path / "lists" / "test_split2.txt").write_text("e e_1\n")
    assert lists_of(listed, labeled="1_split2")[3] == ["e_1"]


def test_lists_of_ones_own(listed, tmp_path):
    (tmp_path / "mine.txt").write_text("c c_1\nb b_1\n")
    (tmp_path / "pool.txt").write_text("a a_2\nb b_2\n")
    assert lists_of(listed, labeled_list=str(tmp_path / "mine.txt"))[:2] == (["c_1", "b_1"], ["a_1", "a_2"])  # nothing of patient b is left
    assert lists_of(listed, unlabeled_list=str(tmp_path / "pool.txt"), labeled="1")[:2] == (["b_1", "b_2"], ["a_2"])
    assert lists_of(listed, unlabeled_list=str(tmp_path / "pool.txt"), labeled_list=str(tmp_path / "mine.txt"))[:2] == (["c_1", "b_1"], ["a_2"])
    (tmp_path / "mine.txt").write_text("d d_1\n")
    assert "the first is d" in error_of(load_volumes, with_(listed, labeled_list=str(tmp_path / "mine.txt")), ALONE)


@pytest.mark.parametrize("labeled", ["0", "4", "99", "-1", "two", "1.5", "_split2", "0_split2", "4_split2"])
def test_numbers_of_patients_that_there_are_not(labeled, listed):
    message = error_of(load_volumes, with_(listed, labeled=labeled, dataset="mscmrseg"), ALONE)
    assert "mscmrseg" in message and "1 to 3" in message and f"--labeled {labeled}" in message


def test_data_sets_and_lists_that_are_not_there(listed, tmp_path):
    message = error_of(load_volumes, with_(listed, dataset="heart"), ALONE)
    assert "'heart'" in message and "acdc" in message and "phantom" in message
    message = error_of(load_volumes, with_(listed, data_root=str(tmp_path / "nowhere")), ALONE)
    assert str(tmp_path / "nowhere") in message and "python -m common.medical prepare --dataset acdc" in message
    message = error_of(load_volumes, with_(listed, labeled="2_split7"), ALONE)
    assert "train_split7.txt" in message and "train_split2.txt" in message  # what is missing, and what is there
    for option in ("labeled_list", "unlabeled_list"):
        assert str(tmp_path / "no.txt") in error_of(load_volumes, with_(listed, **{option: str(tmp_path / "no.txt")}), ALONE)
    (tmp_path / "lists" / "val.txt").unlink()
    assert "val.txt" in error_of(load_volumes, listed, ALONE)


@pytest.mark.parametrize("name, text, says", [
    ("train", "a a_1\n\na a_2 more\n", "line 3"), ("train", "a\n", "line 1"), ("train", "a ../a_1\n", "line 1"), ("train", "a x\\a_1\n", "line 1"),
    ("train", "a a_1\nb b_1\na a_1\n", "line 3: a_1 is listed twice"), ("train", "a a_1\nb a_1\n", "line 2: a_1 is listed twice"),
    ("train", " \n\n", "no volume"), ("val", "", "no volume"), ("test", "\n", "no volume"),
])
def test_bad_lines_are_named(name, text, says, listed, tmp_path):
    path = tmp_path / "lists" / f"{name}.txt"
    path.write_text(text)
    message = error_of(load_volumes, with_(listed, labeled="1"), ALONE)
    assert str(path) in message and says in message


def test_a_list_that_is_no_text_is_named(listed, tmp_path):
    path = tmp_path / "lists" / "train.txt"
    path.write_bytes(b"\xff\xfe\x80 a_1\n")
    assert str(path) in error_of(load_volumes, listed, ALONE)


@pytest.mark.parametrize("name, text", [("val", "d d_1\na a_2\n"), ("test", "e e_1\nc c_1\n"), ("test", "f f_1\nd d_1\n")])
def test_a_patient_in_two_lists_is_refused(name, text, listed, tmp_path):
    (tmp_path / "lists" / f"{name}.txt").write_text(text)
    message = error_of(load_volumes, listed, ALONE)
    assert f"{name} list" in message and f"the first is {text.splitlines()[1][0]}" in message


def test_listed_volumes_must_be_there(listed, tmp_path):
    for number, name in enumerate(("f_1", "d_2", "c_1"), 1):
        (tmp_path / "volumes" / f"{name}.npz").unlink()
        message = error_of(load_volumes, listed, ALONE)
        assert str(tmp_path / "volumes" / f"{name}.npz") in message and ("more" in message) == (number > 1)
    assert f"{number - 1} more" in message


# ---------------------------------------------------------------- scores


def voxels_of(mask: np.ndarray) -> set[tuple]:
    return set(map(tuple, np.argwhere(mask).tolist()))


def surface_of(mask: set[tuple]) -> np.ndarray:
    """Voxels with a face neighbour outside."""
    steps = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
    return np.array([voxel for voxel in sorted(mask) if any(tuple(np.add(voxel, step)) not in mask for step in steps)], float)


def score_by_hand(prediction: np.ndarray, label: np.ndarray, spacing) -> list[dict]:
    rows = []
    for value in (1, 2, 3):
        ours, theirs = voxels_of((prediction == value) & (label != 255)), voxels_of(label == value)
        row = dict.fromkeys(METRICS, math.nan)
        both, either = len(ours & theirs), len(ours | theirs)
        row["dice"] = 2 * both / (len(ours) + len(theirs)) if either else 1.0
        row["jaccard"] = both / either if either else 1.0
        for ending, scale in (("", (1, 1, 1)), ("_mm", spacing)):
            if ours and theirs and scale:
                pairs = ((surface_of(ours)[:, None] - surface_of(theirs)[None]) * scale) ** 2
                there, back = (np.sqrt(pairs.sum(axis=2)).min(axis=axis) for axis in (1, 0))
                row[f"hd95{ending}"] = np.percentile(np.concatenate([there, back]), 95)
                row[f"asd{ending}"], row[f"assd{ending}"] = there.mean(), (there.mean() + back.mean()) / 2
        rows.append(row)
    return rows


def test_scores_of_slabs_are_known():
    label, prediction = np.zeros((2, 9, 12, 40), np.uint8)
    prediction[2, :, :10], label[5, :, :10] = 1, 1  # three slices apart
    prediction[:, :, 15], label[:, :, 15], label[:, :, 21] = 2, 2, 2  # half of the label is missed, 6 columns away
    label[:, 2:5, 30:33], prediction[:, 2:5, 30:33], prediction[:, 9:, 36:] = 3, 3, 3
    label[:, 9:, 36:] = 255  # a false alarm that nobody judges
    table = scores.score(prediction, label, 4, SPACING)
    assert table.shape == (3, len(METRICS)) and table.dtype == np.float64
    first, second, third = (dict(zip(METRICS, row)) for row in table)
    assert first == {"dice": 0, "jaccard": 0, "hd95": 3, "asd": 3, "assd": 3, "hd95_mm": 30, "asd_mm": 30, "assd_mm": 30}
    assert second == {"dice": pytest.approx(2 / 3), "jaccard": 0.5, "hd95": 6, "asd": 0, "assd": 1.5, "hd95_mm": 9, "asd_mm": 0, "assd_mm": 2.25}
    assert third == {"dice": 1, "jaccard": 1, **dict.fromkeys(METRICS[2:], 0)}
    without = scores.score(prediction, label, 4, None)
    assert np.array_equal(without[:, :5], table[:, :5]) and np.isnan(without[:, 5:]).all()


def decode(slices: torch.Tensor) -> torch.Tensor:
    """A network that reads the classes in the grey levels 0 to 3 of 4; 4 is background too, and spans the range of every volume."""
    level = (4 * slices[:, 0]).round().long()
    return 5 * torch.nn.functional.one_hot(torch.where(level == 4, 0, level), 4).permute(0, 3, 1, 2).float()


CASES = ("plain", "missed", "invented", "absent", "ignored", "plain too")


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> tuple[list[VolumeFile], dict[str, list[dict]]]:
    """Volumes on whose images `decode` finds given classes, and their scores by hand."""
    root, rng, files, tables = tmp_path_factory.mktemp("scored"), np.random.default_rng(0), [], {}
    for number, name in enumerate(CASES):
        shape = (3 + number, 16, 16)
        coarse = rng.integers(0, 4, (shape[0], 4, 4)).repeat(4, axis=1).repeat(4, axis=2)
        label, prediction = (np.where(rng.random(shape) < share, rng.integers(0, 4, shape), coarse) for share in (0.03, 0.1))
        if name in ("missed", "absent"):
            prediction[prediction == 2] = 0
        if name in ("invented", "absent"):
            label[label == 2] = 0
        if name == "ignored":
            label[:, 8:] = 255
            label[0, 0, :4], prediction[0, 0, 0] = 3, 3
            prediction[:, :8][prediction[:, :8] == 1] = 0  # class 1 is predicted only where nobody looks
            label[0, 0, 4:8] = 1
        levels = prediction.astype(np.float32) / 4
        levels[0, 0, 15], levels[0, 1, 15] = 1, 0
        prediction[0, :2, 15] = 0
        spacing = None if name == "plain too" else (10.0 + number, 1.25, 1.5)
        write_volume(root / f"{name}.npz", Volume(levels, label.astype(np.uint8), spacing))
        files.append(VolumeFile(name.split()[0], name, root / f"{name}.npz"))
        tables[name] = score_by_hand(prediction, label, spacing)
    return files, tables


def summed_by_hand(tables: dict[str, list[dict]]) -> dict[str, list[float | None]]:
    """{metric: means of the classes and the mean of these}; Dice and Jaccard in %."""
    means = {}
    for metric in METRICS:
        scale = 100 if metric in ("dice", "jaccard") else 1
        of_classes = []
        for number in range(3):
            values = [scale * rows[number][metric] for rows in tables.values() if not math.isnan(rows[number][metric])]
            of_classes.append(sum(values) / len(values) if values else None)
        known = [value for value in of_classes if value is not None]
        means[metric] = [*of_classes, sum(known) / len(known) if known else None]
    return means


def assert_results(results: dict, tables: dict[str, list[dict]]) -> None:
    json.dumps(results, allow_nan=False)
    for metric, (*of_classes, mean) in summed_by_hand(tables).items():
        for name, value in zip(INFO.classes[1:], of_classes, strict=True):
            assert results["per_class"][name][metric] == (value if value is None else pytest.approx(value)), (name, metric)
        assert results[metric] == (mean if mean is None else pytest.approx(mean)), metric
    for name, rows in tables.items():
        for class_name, row in zip(INFO.classes[1:], rows):
            for metric, value in row.items():
                found = results["scores"][name][class_name][metric]
                assert found is None if math.isnan(value) else found == pytest.approx(value * (100 if metric in ("dice", "jaccard") else 1))


def test_evaluation_equals_counting_by_hand(scored):
    files, tables = scored
    info = replace(INFO, crop=16)
    results = scores.evaluate_volumes(decode, files, info, ALONE)
    assert_results(results, tables)
    assert results["volumes"] == 6 and results["patients"] == 5 and list(results["scores"]) == list(CASES)
    two = INFO.classes[2]
    assert results["empty"] == [{"volume": "missed", "class": two, "empty": "prediction"}, {"volume": "invented", "class": two, "empty": "label"},
                                {"volume": "absent", "class": two, "empty": "both"},
                                {"volume": "ignored", "class": INFO.classes[1], "empty": "prediction"}]
    assert results["empty_masks"] == 4
    assert [results["scores"][name][two]["dice"] for name in ("missed", "invented", "absent")] == [0, 0, 100]
    assert results["scores"]["plain too"][two]["hd95_mm"] is None and results["scores"]["plain too"][two]["hd95"] > 0
    text = scores.report(results)
    assert len(text.splitlines()) == 1 + 3 + 1 + 1 + 4 + 1 and "leave these out" in text and f"{results['dice']:.2f}" in text and "6 volumes of 5 patients" in text

    released = {name: [dict(row) for row in rows] for name, rows in tables.items()}
    for case in results["empty"]:  # DiffRect's test script: 0, 0, 50, 10, and no word on mm
        released[case["volume"]][INFO.classes.index(case["class"]) - 1].update(dice=0, jaccard=0, hd95=50, asd=10)
    results = scores.evaluate_volumes(decode, files, info, ALONE, released_empty=True)
    assert_results(results, released)
    assert results["empty_masks"] == 4


def test_a_mean_of_nothing_is_none(scored):
    files, tables = scored
    for name in ("missed", "absent"):
        only = [file for file in files if file.name == name]
        results = scores.evaluate_volumes(decode, only, replace(INFO, crop=16), ALONE)
        assert_results(results, {name: tables[name]})
        assert results["per_class"][INFO.classes[2]]["hd95"] is None and results["hd95"] is not None  # the other classes have one
        assert " - " in scores.report(results)
    nothing = scores.evaluate_volumes(lambda slices: decode(0 * slices), files[:1], replace(INFO, crop=16), ALONE)
    assert nothing["dice"] == 0 and nothing["hd95"] is None and nothing["empty_masks"] == 3
    json.dumps(nothing, allow_nan=False)


@pytest.mark.parametrize("ranks", [2, 4, 9])
def test_ranks_share_the_volumes(ranks, scored, monkeypatch):
    files, _ = scored
    info, tables, seen = replace(INFO, crop=16), [], []
    alone = scores.evaluate_volumes(decode, files, info, ALONE)

    class Enough(Exception):
        pass

    def collect(table):
        tables.append(table.clone())
        if len(tables) < ranks:
            raise Enough
        return sum(tables)

    monkeypatch.setattr(scores, "all_reduce_sum", collect)
    read = medical.read_volume
    monkeypatch.setattr(scores, "read_volume", lambda path, classes: seen.append(path) or read(path, classes))
    for rank in reversed(range(1, ranks)):
        with pytest.raises(Enough):
            scores.evaluate_volumes(decode, files, info, Context(rank, ranks, CPU))
    assert scores.evaluate_volumes(decode, files, info, Context(0, ranks, CPU)) == alone
    assert sorted(seen) == sorted(file.path for file in files)  # each once


def test_volumes_of_a_folder(scored, tmp_path):
    files, _ = scored
    found = medical.volumes_in(files[0].path.parent)
    assert set(names(found)) == set(CASES) and len(found) == 6 and all(file.patient == file.name for file in found)
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert str(folder) in error_of(medical.volumes_in, folder)
    write_volume(tmp_path / "bare.npz", replace(random_volume(), label=None))
    assert "bare.npz has no label" in error_of(scores.evaluate_volumes, decode, medical.volumes_in(tmp_path), replace(INFO, crop=16), ALONE)


# ---------------------------------------------------------------- the programs


QUICK = ["--dataset", "acdc", "--crop", "64", "--channels", "2", "--model", "fixmatch", "--iterations", "4", "--labeled", "1", "--batch-size", "2",
         "--num-workers", "0", "--device", "cpu"]
PATIENTS = {"train": "abc", "val": "d", "test": "ef"}


def heart(number: int) -> Volume:
    """Three classes in and around a ring, [3, 40, 48]."""
    z, y, x = np.indices((3, 40, 48))
    radius = np.hypot(y - 18 - number, x - 25 + number) + z
    label = np.select([radius < 7, radius < 11, (radius < 16) & (x < 20)], [3, 2, 1], 0).astype(np.uint8)
    noise = np.random.default_rng(number).normal(0, 0.1, label.shape)
    return Volume((np.array([0.1, 0.9, 0.3, 0.8])[label] + noise).astype(np.float32), label, (10.0, 1.5, 1.5 + number / 10))


@pytest.fixture(scope="module")
def acdc(tmp_path_factory) -> Path:
    """Two volumes of each of six patients; the unlabeled ones have no labels."""
    root = tmp_path_factory.mktemp("acdc")
    (root / "lists").mkdir()
    for name, patients in PATIENTS.items():
        (root / "lists" / f"{name}.txt").write_text("".join(f"{patient} {patient}_{frame}\n" for patient in patients for frame in (1, 2)))
        for patient, frame in itertools.product(patients, (1, 2)):
            volume = heart(2 * "abcdef".index(patient) + frame)
            write_volume(root / "volumes" / f"{patient}_{frame}.npz", replace(volume, label=None) if patient in "bc" else volume)
    return root


@pytest.fixture(scope="module")
def trained(acdc, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "fixmatch" / "seed0"
    succeed("diffrect.py", *QUICK, "--data-root", acdc, "--output", folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(acdc, trained, tmp_path_factory) -> Path:
    """The trained network made to find classes 0, 1 and 3 somewhere, and 2 nowhere."""
    content = torch.load(trained / "best.pt", weights_only=True)
    network = diffrect.UNet(4, 2).eval()
    network.load_state_dict(content["model"])
    classifier = network.decoder.classifier
    with torch.no_grad():
        classifier.weight.copy_(torch.linspace(-1, 1, classifier.weight.numel()).view(classifier.weight.shape).sin())
        image = torch.from_numpy(read_volume(acdc / "volumes" / "e_1.npz").image)[:, None, :32, :32]
        classifier.bias -= network(image).transpose(0, 1).flatten(1).median(dim=1).values  # each class wins somewhere
        classifier.bias[2] = -1e4
    content["model"] = network.state_dict()
    path = tmp_path_factory.mktemp("checkpoint") / "edited.pt"
    torch.save(content, path)
    return path


@pytest.fixture
def evaluate(monkeypatch, capfd, tmp_path):
    def call(checkpoint: Path, *arguments) -> tuple[dict, str]:
        status, out, err = run_as_program("common/evaluate.py", monkeypatch, capfd, "--checkpoint", checkpoint, "--device", "cpu", "--output",
                                          tmp_path / "results.json", *arguments)
        assert status == 0, err
        return json.loads((tmp_path / "results.json").read_text()), out

    return call


@pytest.fixture
def predict(monkeypatch, capfd):
    def call(checkpoint: Path, *arguments) -> tuple[int, str, list[str]]:
        status, out, err = run_as_program("common/predict.py", monkeypatch, capfd, "--checkpoint", checkpoint, "--device", "cpu", *arguments)
        assert "Traceback" not in err
        return status, out, [line for line in err.splitlines() if line.startswith("error: ")]

    return call


def test_a_run_scores_its_validation_and_test_lists(trained, evaluate):
    results = json.loads((trained / "results.json").read_text())
    assert results["method"] == "diffrect" and results["last"]["iteration"] == 4 and results["best"] == results["last"]
    assert results["last"]["volumes"] == 2 and results["test"]["volumes"] == 4 and results["test"]["patients"] == 2
    for split, known in (("val", results["last"]), ("test", results["test"])):
        again, out = evaluate(trained / "best.pt", "--split", split)
        assert again["checkpoint"] == str(trained / "best.pt") and again["split"] == split and not again["released_empty"]
        for name in ("scores", "per_class", "empty", "empty_masks", *METRICS):
            assert again[name] == known[name], name
        assert f"{again['volumes']} volumes of {again['patients']} patients" in out and "HD95 mm" in out


def test_predictions_are_what_was_scored(acdc, checkpoint, evaluate, predict, tmp_path):
    results, out = evaluate(checkpoint, "--split", "test")
    sources = [acdc / "volumes" / f"{patient}_{frame}.npz" for patient in "ef" for frame in (1, 2)]
    status, said, problems = predict(checkpoint, "--output", tmp_path / "out", *sources)
    assert status == 0 and not problems and said.count(" -> ") == 4
    for source in sources:
        truth, found = read_volume(source), read_volume(tmp_path / "out" / source.name, 4)
        assert found.image.tobytes() == truth.image.tobytes() and found.spacing == truth.spacing
        assert set(np.unique(found.label)) == {0, 1, 3}  # so that the comparison says something
        for number, rows in enumerate(score_by_hand(found.label, truth.label, truth.spacing)):
            scores = results["scores"][source.stem][INFO.classes[number + 1]]
            assert scores == {name: None if math.isnan(value) else pytest.approx(value * (100 if name in ("dice", "jaccard") else 1))
                              for name, value in rows.items()}
    assert [case["class"] for case in results["empty"]] == [INFO.classes[2]] * 4 and out.count("empty mask:") == 4
    released, _ = evaluate(checkpoint, "--split", "test", "--released-empty")
    two = INFO.classes[2]
    assert released["released_empty"] and released["per_class"][two] == {**dict.fromkeys(METRICS), "dice": 0, "jaccard": 0, "hd95": 50, "asd": 10}
    assert released["hd95"] == pytest.approx((50 + sum(results["per_class"][name]["hd95"] for name in INFO.classes[1:] if name != two)) / 3)

    folder, _ = evaluate(checkpoint, "--volumes", tmp_path / "out")  # against what it predicted itself
    assert folder["volumes"] == folder["patients"] == 4 and folder["split"] == str(tmp_path / "out") and folder["dice"] == 100
    assert folder["hd95"] == 0 and {case["empty"] for case in folder["empty"]} == {"both"}


def test_evaluation_refuses_what_does_not_fit(acdc, checkpoint, monkeypatch, capfd, tmp_path):
    def say(*arguments) -> str:
        return refuse("common/evaluate.py", monkeypatch, capfd, "--checkpoint", checkpoint, "--device", "cpu", *arguments)

    assert "--mode" in say("--mode", "whole") and "--mode" in say("--threshold", "0.5")
    assert "--steps" in say("--steps", "3")
    assert "tune" in say("--split", "tune")
    assert "b_1.npz has no label" in say("--split", "unlabeled")
    assert "b_1.npz has no label" in say("--volumes", acdc / "volumes")
    assert str(tmp_path / "nowhere") in say("--volumes", tmp_path / "nowhere")
    assert "prepare" in say("--data-root", tmp_path / "nowhere")
    shutil.copy(acdc / "volumes" / "b_1.npz", tmp_path / "bad.npz")
    (tmp_path / "bad.npz").write_bytes((tmp_path / "bad.npz").read_bytes()[:-30])
    assert str(tmp_path / "bad.npz") in say("--volumes", tmp_path)
    assert "--mode" in refuse("common/predict.py", monkeypatch, capfd, "--checkpoint", checkpoint, "--device", "cpu", "--mode", "whole", tmp_path)


def oblique(zooms: tuple) -> np.ndarray:
    affine = np.eye(4)
    turn = np.array([[0.8, -0.6, 0], [0.6 * 0.28, 0.8 * 0.28, -0.96], [0.6 * 0.96, 0.8 * 0.96, 0.28]])
    affine[:3, :3], affine[:3, 3] = turn @ np.diag([-zooms[0], zooms[1], zooms[2]]), (90, -120, 30)
    return affine


def test_nifti_files_are_segmented_on_their_grid(acdc, checkpoint, predict, tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="reads NIfTI files, which needs nibabel")
    volume = read_volume(acdc / "volumes" / "e_1.npz")
    array = (1000 * volume.image).astype(np.int16).transpose(2, 1, 0)  # [X, Y, Z]
    write_volume(tmp_path / "in" / "same.npz", Volume(array.transpose(2, 1, 0).astype(np.float32), None, None))
    affine, zooms = oblique((1.25, 1.5, 9.0)), (1.25, 1.5, 9.0)
    scaled = nibabel.Nifti1Image(array, affine)
    scaled.header.set_slope_inter(0.5, -20)
    second = nibabel.Nifti2Image(array[..., None].astype(np.float64), affine)
    plain = nibabel.Nifti1Image(array, affine)
    files = {"plain.nii": plain, "a.b.nii.gz": plain, "SHOUTED.NII.GZ": plain, "scaled.nii.gz": scaled, "second.nii": second}
    for name, image in files.items():
        nibabel.save(image, tmp_path / "in" / name)
    status, said, problems = predict(checkpoint, "--output", tmp_path / "out", tmp_path / "in")
    assert status == 0 and not problems and said.count(" -> ") == len(files) + 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*files, "same.npz"])  # and nothing temporary
    wanted = read_volume(tmp_path / "out" / "same.npz").label.transpose(2, 1, 0)
    assert set(np.unique(wanted)) == {0, 1, 3}
    for name in files:
        result = nibabel.load(tmp_path / "out" / name)
        assert result.shape == array.shape and result.get_data_dtype() == np.uint8
        assert np.asarray(result.dataobj).dtype == np.uint8 and np.array_equal(np.asarray(result.dataobj), wanted), name
        np.testing.assert_allclose(result.affine, affine, atol=1e-4)
        np.testing.assert_allclose(result.header.get_zooms(), zooms, rtol=1e-6)
        assert ((tmp_path / "out" / name).read_bytes()[:2] == b"\x1f\x8b") == name.lower().endswith(".gz")


def test_what_cannot_be_predicted_is_named_and_the_others_are_written(acdc, checkpoint, predict, tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="reads NIfTI files, which needs nibabel")
    bad, rng = tmp_path / "bad", np.random.default_rng(0)
    bad.mkdir()
    whole = nibabel.Nifti1Image(rng.integers(0, 900, (9, 8, 3)).astype(np.int16), np.eye(4))
    nibabel.save(whole, bad / "cut.nii.gz")
    (bad / "cut.nii.gz").write_bytes((bad / "cut.nii.gz").read_bytes()[:-40])
    (bad / "noise.nii").write_bytes(rng.bytes(900))
    nibabel.save(nibabel.Nifti1Image(np.zeros((9, 8, 3, 2), np.int16), np.eye(4)), bad / "four.nii")
    nibabel.save(nibabel.Nifti1Image(np.full((9, 8, 3), np.nan, np.float32), np.eye(4)), bad / "nan.nii")
    nibabel.save(whole, bad / "nowhere.nii")
    content = (bad / "nowhere.nii").read_bytes()
    (bad / "nowhere.nii").write_bytes(content[:280] + np.full(12, np.nan, np.float32).tobytes() + content[328:])  # its affine
    (bad / "noise.npz").write_bytes(rng.bytes(900))
    (bad / "flat.npz").write_bytes(b"")
    (bad / "notes.txt").write_text("not a volume")
    (bad / "empty").mkdir()
    shutil.copy(acdc / "volumes" / "e_1.npz", bad / "SHOUTED.NPZ")
    wrong = ["cut.nii.gz", "noise.nii", "four.nii", "nan.nii", "nowhere.nii", "noise.npz", "flat.npz", "notes.txt", "empty", "missing.npz"]
    status, said, problems = predict(checkpoint, "--output", tmp_path / "out", bad / "notes.txt", bad / "empty", bad / "missing.npz", bad,
                                     acdc / "volumes" / "e_1.npz", acdc / "volumes" / "e_1.npz")
    assert status == 1
    for name in wrong:
        assert sum(str(bad / name) in line for line in problems) == 1, (name, problems)
    assert len(problems) == len(wrong), problems
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["SHOUTED.NPZ", "e_1.npz"] and said.count(" -> ") == 2


def test_a_full_disk_is_named_and_leaves_nothing(monkeypatch, tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="reads NIfTI files, which needs nibabel")
    nibabel.save(nibabel.Nifti1Image(np.arange(24, dtype=np.int16).reshape(4, 3, 2), np.eye(4)), tmp_path / "heart.nii.gz")

    def fill(image, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nibabel, "save", fill)
    target = tmp_path / "out" / "heart.nii.gz"
    message = error_of(scores.predict_file, decode, tmp_path / "heart.nii.gz", target, 16, CPU)
    assert str(target) in message and "No space left" in message and not any(target.parent.iterdir())


def test_predictions_never_replace_their_volumes(acdc, checkpoint, predict, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(acdc / "volumes" / "e_1.npz", tmp_path / folder / "heart.npz")
    before = (tmp_path / "a" / "heart.npz").read_bytes()
    status, _, (problem,) = predict(checkpoint, "--output", tmp_path / "a", tmp_path / "a")
    assert status == 1 and "--output" in problem and (tmp_path / "a" / "heart.npz").read_bytes() == before
    status, said, (problem,) = predict(checkpoint, "--output", tmp_path / "out", tmp_path / "a", tmp_path / "b")  # two of one name
    assert status == 1 and str(tmp_path / "b" / "heart.npz") in problem and said.count(" -> ") == 1


WITHOUT = """
import runpy, sys
sys.modules["nibabel"] = sys.modules["h5py"] = None
sys.argv = ["predict", *sys.argv[1:]]
runpy.run_module("common.predict", run_name="__main__")
"""


def test_without_nibabel_the_package_is_named_and_npz_files_are_read(acdc, checkpoint, tmp_path):
    (tmp_path / "without.py").write_text(WITHOUT)
    (tmp_path / "heart.nii.gz").touch()
    done = run(tmp_path / "without.py", "--checkpoint", checkpoint, "--device", "cpu", "--output", tmp_path / "out", tmp_path / "heart.nii.gz",
               acdc / "volumes" / "e_1.npz")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and "pip install nibabel" in line and "heart.nii.gz" in line and "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["e_1.npz"]


# ---------------------------------------------------------------- tables


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_tables_of_volumes(trained, monkeypatch, capfd, tmp_path):
    shutil.copytree(trained, tmp_path / "fixmatch" / "seed0", ignore=shutil.ignore_patterns("*.pt"))
    first = json.loads((trained / "results.json").read_text())["test"]

    def table(*arguments) -> list[list[str]]:
        status, out, err = run_as_program("common/results.py", monkeypatch, capfd, tmp_path, *arguments)
        assert status == 0, err
        header, _, *rows = out.splitlines()
        return [cells(line) for line in (header, *rows)]

    columns = ("dice", "jaccard", "hd95", "asd", "empty_masks")
    numbers = ["-" if first[name] is None else f"{first[name]:.1f}" for name in columns]
    assert table() == [["run", "seeds", "Dice", "Jaccard", "HD95", "ASD", "empty masks"], ["fixmatch", "1", *numbers]]

    folder = tmp_path / "by hand" / "seed0"
    for seed, shift in ((0, 0), (1, 4)):  # the row with a validation list only
        folder = tmp_path / "by hand" / f"seed{seed}"
        folder.mkdir(parents=True)
        last = {"iteration": 9, "dice": 80.0 + shift, "jaccard": 60.0, "hd95": None if seed else 5.0, "asd": 1.25, "empty_masks": seed,
                "per_class": {name: {"dice": 70.0 + number + shift if number else None} for number, name in enumerate(INFO.classes[1:])}}
        (folder / "config.json").write_text(json.dumps({"iterations": 9}))
        (folder / "results.json").write_text(json.dumps({"last": last, "best": last}))
    row = next(row for row in table() if row[0] == "by hand")
    assert row == ["by hand", "2", "82.0 ± 2.8", "60.0 ± 0.0", "5.0", "1.2 ± 0.0", "0.5 ± 0.7"]
    header, *rows = table("--per-class")
    assert header == ["run", "seeds", *INFO.classes[1:]]
    assert next(row for row in rows if row[0] == "by hand") == ["by hand", "2", "-", "73.0 ± 2.8", "74.0 ± 2.8"]
    assert next(row for row in rows if row[0] == "fixmatch")[2:] == [f"{first['per_class'][name]['dice']:.1f}" for name in INFO.classes[1:]]

    images = tmp_path / "pictures" / "seed0"
    images.mkdir(parents=True)
    last = {"iteration": 9, "miou": 40.0, "head_miou": 50.0, "tail_miou": None, "ece": 0.05, "iou": {"sky": 1.0}}
    (images / "config.json").write_text(json.dumps({"iterations": 9}))
    (images / "results.json").write_text(json.dumps({"last": last, "best": last}))
    for option in ([], ["--per-class"]):
        assert "folders of their own" in refuse("common/results.py", monkeypatch, capfd, tmp_path, *option)
