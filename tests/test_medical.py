"""common/medical.py: wrong files and lists, slices by hand, distances by trying all pairs."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common import medical
from common.medical import DATASETS, METRICS, Volume, VolumeData, VolumeFile, VolumeOptions
from common.medical import load_volumes, read_volume, write_volume
from programs import assert_identical, error_of, on_ranks

CPU = torch.device("cpu")
INFO = DATASETS["acdc"]  # 4 classes
SPACING = (10.0, 1.25, 1.5)


def random_volume() -> Volume:
    rng = np.random.default_rng(0)
    label = rng.choice(np.array([0, 1, 2, 3, 255], np.uint8), (3, 7, 5))
    return Volume(rng.normal(300, 80, label.shape).astype(np.float32), label, SPACING)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("missing", [(), ("label", "spacing"), ("label",), ("spacing",)])
def test_volumes_come_back_as_they_were(missing, tmp_path):
    volume = replace(random_volume(), **dict.fromkeys(missing))
    path = tmp_path / "deep" / "any.ending"
    write_volume(path, volume)
    found = read_volume(path, 4, "label" not in missing)
    low, high = volume.image.min(), volume.image.max()
    assert found.image.dtype == np.float32 and found.spacing == volume.spacing
    np.testing.assert_array_equal(found.image, (volume.image - low) / (high - low))
    np.testing.assert_array_equal(found.label, volume.label)  # None is None
    write_volume(path, found)  # what is normalised already keeps its bits
    assert read_volume(path, 4, found.label is not None).image.tobytes() == found.image.tobytes()
    assert list(path.parent.iterdir()) == [path]  # no temporary file
    assert not medical.min_max(np.full((2, 3, 4), 7.5)).any()  # without contrast


IMAGE, LABEL = np.arange(12.0).reshape(3, 2, 2), np.ones((3, 2, 2), int)


@pytest.mark.parametrize("changes, says", [
    ({"image": None}, "image"),
    ({"image": np.zeros((3, 4))}, "(3, 4)"),
    ({"image": np.zeros((0, 2, 2))}, "(0, 2, 2)"),
    ({"image": np.where(IMAGE == 5, np.nan, IMAGE)}, "finite"),
    ({"label": np.ones((3, 2, 3))}, "(3, 2, 3)"),
    ({"label": np.where(IMAGE == 5, 4, LABEL)}, "[4]"),
    ({"label": np.where(IMAGE == 5, 256, LABEL)}, "[256]"),  # 0 in 8 bits
    ({"label": np.where(IMAGE == 5, -1, LABEL)}, "[-1]"),  # 255 in 8 bits
    ({"label": LABEL * 0.5}, "[0.5]"),
    ({"label": LABEL.astype(object)}, "allow_pickle"),
    ({"spacing": np.ones(2)}, "spacing"),
    ({"spacing": np.array([10.0, 0, 1])}, "spacing")])
def test_wrong_arrays_are_named(changes, says, tmp_path):
    arrays = {"image": IMAGE, "label": LABEL, "spacing": np.array(SPACING), **changes}
    path = tmp_path / "bad.npz"
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    message = error_of(read_volume, path, 4)
    assert str(path) in message and says in message


def test_damaged_and_foreign_files_are_named(tmp_path):
    path = tmp_path / "bad.npz"
    assert str(path) in error_of(read_volume, path)  # missing
    write_volume(path, random_volume())
    content, noise = path.read_bytes(), np.random.default_rng(0).bytes(1000)
    for damaged in (b"", content[:40], content[:-1], noise, b"\x93NUMPY" + noise, b"<html>404"):
        path.write_bytes(damaged)
        assert str(path) in error_of(read_volume, path)


# ---------------------------------------------------------------- lists

LISTS = {
    "train": "b b_1\na a_1\n\nb   b_2  \r\nc c_1\na a_2\n",
    "val": "d d_1\nd d_2\n", "test": "e e_1\nf f_1\n",
    "train_split2": "c c_1\nd d_1\nb b_1\n",
    "val_split2": "a a_1\n",
    "train_split3": "a a_1\nb b_1\n",
}
REST = (["d_1", "d_2"], ["e_1", "f_1"])


@pytest.fixture
def listed(tmp_path) -> VolumeOptions:
    """Options of a data set whose volumes are none: only lists are read here."""
    (tmp_path / "lists").mkdir()
    (tmp_path / "volumes").mkdir()
    for name, text in LISTS.items():
        (tmp_path / "lists" / f"{name}.txt").write_text(text)
        for line in filter(str.strip, text.splitlines()):
            (tmp_path / "volumes" / f"{line.split()[1]}.npz").write_text(line)
    return VolumeOptions(dataset="acdc", data_root=str(tmp_path), labeled="2")


def lists_of(options: VolumeOptions, **changes) -> tuple[list[str], ...]:
    data = load_volumes(replace(options, **changes))
    lists = (data.labeled, data.unlabeled, data.val, data.test)
    return tuple([file.name for file in files] for files in lists)


def refused(options: VolumeOptions, **changes) -> str:
    return error_of(load_volumes, replace(options, **changes))


def test_labeled_volumes_are_those_of_the_first_patients(listed, tmp_path):
    assert lists_of(listed, labeled="1") == (["b_1", "b_2"], ["a_1", "c_1", "a_2"], *REST)
    assert lists_of(listed, labeled="2") == (["b_1", "a_1", "b_2", "a_2"], ["c_1"], *REST)
    assert lists_of(listed, labeled="all") == (["b_1", "a_1", "b_2", "c_1", "a_2"], [], *REST)
    data = load_volumes(listed)
    assert data.info is INFO and data.root == tmp_path and data.tag == "acdc_2"
    assert data.labeled[1] == VolumeFile("a", "a_1", tmp_path / "volumes" / "a_1.npz")
    prostate = load_volumes(replace(listed, dataset="prostate", labeled=None))
    assert len(prostate.labeled) == 4 and prostate.tag == "prostate_2"  # its default: 2 patients


def test_labeled_patients_may_be_drawn_by_a_seed(listed, tmp_path):
    def draws():
        return [sorted(lists_of(listed, labeled="1", split_seed=seed)[0]) for seed in range(8)]

    drawn, path = draws(), tmp_path / "lists" / "train.txt"
    path.write_text("\n".join(sorted(path.read_text().splitlines())))  # an order that says nothing
    assert draws() == drawn and {names[0] for names in drawn} == {"a_1", "b_1", "c_1"}
    assert load_volumes(replace(listed, split_seed=3)).tag == "acdc_2_random3"


def test_splits_have_lists_of_their_own(listed, tmp_path):
    (tmp_path / "lists" / "test.txt").unlink()  # no test list is no error
    assert lists_of(listed, labeled="1_split2") == (["c_1"], ["d_1", "b_1"], ["a_1"], [])
    assert lists_of(listed, labeled="1_split3") == (["a_1"], ["b_1"], ["d_1", "d_2"], [])  # val.txt
    (tmp_path / "lists" / "test_split2.txt").write_text("e e_1\n")
    assert lists_of(listed, labeled="1_split2")[3] == ["e_1"]
    message = refused(listed, labeled="2_split7")
    assert "train_split7.txt" in message and "train_split2.txt" in message
    assert "common.prepare" in refused(listed, data_root=str(tmp_path / "nowhere"))


def test_lists_of_ones_own(listed, tmp_path):
    mine, pool = tmp_path / "mine.txt", tmp_path / "pool.txt"
    mine.write_text("c c_1\nb b_1\n")
    pool.write_text("a a_2\nb b_2\n")
    # Nothing of a labeled patient is learned from without labels.
    own = {"labeled_list": str(mine), "labeled": None}
    assert lists_of(listed, **own)[:2] == (["c_1", "b_1"], ["a_1", "a_2"])
    assert lists_of(listed, unlabeled_list=str(pool), labeled="1")[:2] == (["b_1", "b_2"], ["a_2"])
    both = replace(listed, **own, unlabeled_list=str(pool))
    assert lists_of(both)[:2] == (["c_1", "b_1"], ["a_2"])
    assert load_volumes(both).tag == "acdc_mine"
    mine.write_text("d d_1\n")
    assert "'d'" in refused(listed, **own)
    for also in ({"labeled": "2"}, {"split_seed": 3}):  # would not be looked at
        assert "--labeled-list" in refused(listed, **(own | also))
    digest = load_volumes(listed).digest
    assert load_volumes(replace(listed, lists=digest)).digest == digest
    (tmp_path / "lists" / "test.txt").write_text("e e_1\n")
    assert digest in refused(listed, lists=digest)
    assert digest in refused(listed, lists=digest, labeled="1")
    for scored in ("d_1", "e_1"):  # under another patient's name
        path = tmp_path / "volumes" / f"{scored}.npz"
        path.write_bytes((tmp_path / "volumes" / "a_1.npz").read_bytes())
        assert "a_1.npz" in refused(listed)
        path.write_text(scored)
    (tmp_path / "volumes" / "e_1.npz").write_text("d_1")  # of test, and chosen by
    assert "d_1.npz" in refused(listed)


@pytest.mark.parametrize("labeled", ["0", "4", "-1", "two", "1.5", "_split2", "4_split2"])
def test_numbers_of_patients_that_there_are_not(labeled, listed):
    message = refused(listed, labeled=labeled, dataset="mscmrseg")
    assert "mscmrseg" in message and "1 to 3" in message and f"--labeled {labeled}" in message


@pytest.mark.parametrize("name, text", [("train", "a a_1\na a_2 x\n"), ("val", ""), ("test", " \n"),
                                        ("train", "a a_1\nb a_1\n")])
def test_bad_lists_are_named(name, text, listed, tmp_path):
    path = tmp_path / "lists" / f"{name}.txt"
    path.write_text(text)
    assert str(path) in refused(listed, labeled="1")
    path.write_bytes(b"\xff\xfe\x80 a_1\n")
    assert str(path) in refused(listed, labeled="1")


@pytest.mark.parametrize("name, line", [("val", "a a_2"), ("test", "c c_1"), ("test", "d d_1")])
def test_a_patient_in_two_lists_is_refused(name, line, listed, tmp_path):
    (tmp_path / "lists" / f"{name}.txt").write_text(LISTS[name] + line)
    assert f"['{line[0]}'] are in two" in refused(listed)


@pytest.mark.parametrize("name", ["a_2", "c_1", "d_2", "f_1"])  # labeled, unlabeled, val, test
def test_listed_volumes_must_be_there(name, listed, tmp_path):
    (tmp_path / "volumes" / f"{name}.npz").unlink()
    assert f"{name}.npz" in refused(listed)


# ---------------------------------------------------------------- slices


@pytest.mark.parametrize("height, width, size", [(24, 24, 24), (30, 44, 16), (9, 13, 32)])
def test_slices_are_resized_as_pillow_does(height, width, size):
    rng = np.random.default_rng(0)
    image = rng.random((3, height, width), np.float32)
    label = rng.integers(0, 256, (3, height, width)).astype(np.uint8)
    ours, our_labels = medical.resize_slices(image, size), medical.resize_labels(label, size)
    assert ours.shape == (3, size, size) and ours.dtype == np.uint8
    for number in range(3):
        resized = Image.fromarray(image[number]).resize((size, size), Image.Resampling.BILINEAR)
        assert np.abs(ours[number] - 255 * np.asarray(resized)).max() < 0.501  # rounded
        picture = Image.fromarray(label[number]).resize((size, size), Image.Resampling.NEAREST)
        np.testing.assert_array_equal(our_labels[number], np.asarray(picture))


@pytest.mark.parametrize("flips", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("size", [32, 33])
def test_flips_and_turns_are_those_by_hand(size, flips):
    rng = np.random.default_rng(0)
    image = rng.integers(1, 256, (size, size)).astype(np.uint8)
    label = rng.integers(0, 255, (size, size)).astype(np.uint8)
    axes = [axis for axis in (0, 1) if flips[axis]]
    for angle in (0.0, 90.0, 30.0, 123.4, 200.0):
        draws = iter([np.where(flips, 0.0, 0.999), 0.0])
        rng = SimpleNamespace(random=lambda size=None: next(draws), uniform=lambda *ends: angle)
        out, out_label, valid = medical.slice_geometry(image, label, rng)
        # Where each pixel of the result comes from, measured from the upper left corner.
        down, right = np.mgrid[:size, :size] + 0.5 - size / 2
        sine, cosine = math.sin(math.radians(angle)), math.cos(math.radians(angle))
        rows = sine * right + cosine * down + size / 2
        columns = cosine * right - sine * down + size / 2
        inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
        # Not on the border of two pixels, where rounding decides.
        clear = (np.abs(rows - rows.round()) > 0.01) & (np.abs(columns - columns.round()) > 0.01)
        assert clear.mean() > 0.9 and np.array_equal(valid[clear], inside[clear])
        assert np.array_equal(out_label == 255, ~valid) and np.array_equal(out == 0, ~valid)
        i, j = (np.floor(at).astype(int).clip(0, size - 1) for at in (rows, columns))
        known = clear & inside
        assert np.array_equal(out_label[known], np.flip(label, axes)[i, j][known])
        if angle in (0, 90):
            assert np.array_equal(out[known], np.flip(image, axes)[i, j][known])


def test_views_are_drawn_evenly_by_seed_stream_and_position():
    image, counts = np.arange(81, dtype=np.uint8).reshape(9, 9), np.zeros(4, int)
    upright = [image, image[::-1], image[:, ::-1], image[::-1, ::-1]]
    views = medical.SliceSet([[], [(image.T, None), (image, None)]], seed=5)
    for position in range(800):
        _, ((out,), *_) = views[1, 1, position]
        rng = np.random.default_rng([5, 1, position])
        assert np.array_equal(out, medical.slice_geometry(image, None, rng)[0])
        counts += [np.array_equal(out, view) for view in upright]
    assert (np.abs(counts - 100) < 35).all()  # an eighth each, half are turned: 3.7 sigma


# ---------------------------------------------------------------- batches


def write_slices(path: Path, values: list[int], label: bool = True) -> VolumeFile:
    """Each slice is of one grey, 85 x value, and of one class, the value."""
    plane = np.broadcast_to(np.array(values, np.float32)[:, None, None] / 3, (len(values), 10, 14))
    classes = np.rint(3 * plane).astype(np.uint8) if label else None
    write_volume(path, Volume(plane, classes, SPACING))
    return VolumeFile(path.stem, path.stem, path)


@pytest.fixture
def data(tmp_path) -> VolumeData:
    labeled = [write_slices(tmp_path / f"l{number}.npz", [3, 0, 1, 2]) for number in range(2)]
    unlabeled = [write_slices(tmp_path / f"u{n}.npz", [0, 3, 2, 1], label=False) for n in range(3)]
    return VolumeData(INFO, tmp_path, labeled, unlabeled, [], [], "acdc_2")


def batches(data: VolumeData, start=0, total=6, workers=0, unlabeled=True, seed=5) -> list[dict]:
    loader = medical.slice_loader(data, 16, 4, seed, start, total, CPU, unlabeled, workers)
    return list(loader)


def test_batches_hold_slices_and_their_labels(data):
    middles = []
    for batch in batches(data):
        assert batch.keys() == {"labeled", "label", "unlabeled", "valid"}
        assert batch["labeled"].shape == batch["unlabeled"].shape == (4, 1, 16, 16)
        inside = batch["label"] != 255
        assert torch.equal(batch["labeled"][:, 0][inside], 85 * batch["label"][inside])
        assert not batch["unlabeled"][:, 0][~batch["valid"]].any()
        middles += batch["label"][:, 8, 8].tolist()
    for first in (0, 8, 16):  # each of the 8 labeled slices once a pass
        assert sorted(middles[first : first + 8]) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(batch.keys() == {"labeled", "label"} for batch in batches(data, unlabeled=False))


def test_truth_of_unlabeled_slices_is_read_only_where_it_is_allowed(data, tmp_path):
    data.unlabeled = [write_slices(tmp_path / f"u{n}.npz", [0, 3, 2, 1]) for n in range(3)]
    with np.load(data.unlabeled[0].path) as stored:
        np.savez(data.unlabeled[0].path, image=stored["image"], label=stored["label"] + 9)
    hidden = batches(data)
    assert all("truth" not in batch for batch in hidden)  # it is there, and yet not handed on
    write_slices(tmp_path / "u0.npz", [0, 3, 2, 1])
    allowed = replace(data, info=DATASETS["phantom"])
    for batch, without in zip(batches(allowed), hidden):
        truth, valid = batch.pop("truth"), batch["valid"]
        assert_identical([batch], [without])
        assert torch.equal(truth != 255, valid)
        assert torch.equal(85 * truth[valid], batch["unlabeled"][:, 0][valid])
    write_slices(tmp_path / "l0.npz", [0, 3, 2, 1], label=False)
    assert "l0.npz has no label" in error_of(batches, data)


@pytest.mark.parametrize("name", ["val", "test"])
def test_volumes_to_score_have_labels_before_the_first_step(data, name, tmp_path):
    getattr(data, name).append(write_slices(tmp_path / "s.npz", [0, 3]))
    assert batches(data)
    write_slices(tmp_path / "s.npz", [0, 3], label=False)
    assert "s.npz has no label" in error_of(batches, data)


def test_batches_depend_neither_on_workers_nor_on_a_restart(data):
    whole = batches(data)
    assert_identical(batches(data, workers=2), whole)
    assert_identical(batches(data, start=4), whole[4:])
    assert not torch.equal(batches(data, seed=6)[0]["unlabeled"], whole[0]["unlabeled"])


# ---------------------------------------------------------------- two masks


SHAPE = (7, 24, 30)
Z, Y, X = np.indices(SHAPE)
CORNER = Z + Y + X == 0
RING = (np.hypot(Y - 12, X - 15) < 8) & ((np.hypot(Y - 11, X - 15) > 5) | (Z < 2))
MOVED = np.roll(RING, (2, -3), (1, 2)) | CORNER  # with a voxel far away
RANDOM = np.random.default_rng(0).random((2, *SHAPE))
PAIRS = {
    "rings": (RING, MOVED),
    "the same": (RING, RING),
    "corners": (CORNER, CORNER[::-1, ::-1, ::-1]),
    "half random": RANDOM < 0.5,
    "hardly random": RANDOM < 0.003,
    "one slice": (RING[3:4], MOVED[3:4]),
    "turned": (RING[::-1, :, ::-1].transpose(1, 0, 2), MOVED[::-1].transpose(1, 0, 2)),
}


def bare_surface(mask: np.ndarray) -> np.ndarray:
    """Indices [N, 3] of voxels of the mask with a face neighbour outside."""
    inside = set(map(tuple, np.argwhere(mask).tolist()))
    steps = np.concatenate([np.eye(3, dtype=int), -np.eye(3, dtype=int)])
    return np.array([voxel for voxel in sorted(inside)
                     if not inside.issuperset(map(tuple, (steps + voxel).tolist()))])


def metrics_by_hand(ours: np.ndarray, theirs: np.ndarray, spacing) -> dict[str, float]:
    """By trying all pairs of surface voxels."""
    here, there = (bare_surface(mask) * spacing for mask in (ours, theirs))
    squares = ((here[:, None] - there) ** 2).sum(axis=2)
    forth, back = np.sqrt(squares.min(axis=1)), np.sqrt(squares.min(axis=0))
    return {"hd95": np.percentile(np.concatenate([forth, back]), 95), "asd": forth.mean(),
            "assd": (forth.mean() + back.mean()) / 2}


@pytest.mark.parametrize("spacing", [(1, 1, 1), (10.0, 1.5625, 1.25), (0.3, 2.0, 7.5)])
@pytest.mark.parametrize("name", PAIRS)
def test_distances_against_all_pairs_and_medpy(name, spacing):
    ours, theirs = PAIRS[name]
    found = medical.surface_distances(ours, theirs, spacing)
    assert found == pytest.approx(metrics_by_hand(ours, theirs, spacing), rel=1e-12, abs=1e-12)
    medpy = pytest.importorskip("medpy.metric.binary", reason="compares with medpy")
    hd95, asd = medpy.hd95(ours, theirs, spacing), medpy.asd(ours, theirs, spacing)
    assert (found["hd95"], found["asd"]) == pytest.approx((hd95, asd), rel=1e-12, abs=1e-12)
    expected = {"dice": medpy.dc(ours, theirs), "jaccard": medpy.jc(ours, theirs)}
    assert medical.overlap(ours, theirs) == pytest.approx(expected, rel=1e-14)


def test_distances_and_overlap_known_by_hand():
    # A small prediction within a long label, whose voxels are many and far.
    small, long = np.zeros((1, 1, 101), bool), np.ones((1, 1, 101), bool)
    small[..., 0] = True
    found = medical.surface_distances(small, long)  # 0 and 0 to 100, in one list
    assert found == pytest.approx({"hd95": 0.95 * 101 - 1, "asd": 0, "assd": 25})
    assert medical.surface_distances(long, small)["asd"] == pytest.approx(50)

    some, other, empty = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
    assert medical.overlap(some, other) == {"dice": 4 / 7, "jaccard": 2 / 5}
    assert medical.overlap(empty, empty) == {"dice": 1, "jaccard": 1}
    for pair in ((empty, some), (some, empty)):
        assert medical.overlap(*pair) == {"dice": 0, "jaccard": 0}


# ---------------------------------------------------------------- scores


def test_logits_are_resized_to_the_volume_before_the_argmax():
    seen = []

    def predict(slices):
        seen.append(slices)
        logits = torch.zeros(len(slices), 3, 4, 4)  # 1 wins in the second column, 2 in the third
        logits[:, 1, :, 1], logits[:, 2, :, 2], logits[:, 0] = 1.0, 1.0, 0.8
        return logits.bfloat16()

    label = medical.segment_volume(predict, np.full((20, 8, 12), 0.35, np.float32), 4, CPU)
    assert torch.equal(torch.cat(seen), torch.full((20, 1, 4, 4), 89 / 255))  # 89.25 of 255
    assert label.shape == (20, 8, 12) and label.dtype == np.uint8
    # Class 1 at columns 2 to 6 of 12: 1/3, 2/3, 1, 2/3, 1/3; class 0 is at 0.8 everywhere.
    assert (label == [0, 0, 0, 0, 1, 0, 0, 2, 0, 0, 0, 0]).all()


class Decode(torch.nn.Module):
    """Reads the classes in the grey levels 0 to 3 of 4; 4 is background too."""

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        assert not self.training
        level = (4 * slices[:, 0]).round().long() % 4
        return torch.nn.functional.one_hot(level, 4).permute(0, 3, 1, 2).float()


CASES = ("plain", "missed", "invented", "absent", "ignored", "plain too")


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> tuple[list[VolumeFile], np.ndarray]:
    """Volumes on whose images `Decode` finds given classes; METRICS by hand [V, 3, 8] or nan."""
    root, rng = tmp_path_factory.mktemp("scored"), np.random.default_rng(0)
    files, table = [], np.full((len(CASES), 3, len(METRICS)), np.nan)
    for number, name in enumerate(CASES):
        shape = (3 + number, 16, 16)
        label = rng.integers(0, 4, (shape[0], 4, 4)).repeat(4, axis=1).repeat(4, axis=2)
        prediction = np.where(rng.random(shape) < 0.1, rng.integers(0, 4, shape), label)
        if name in ("missed", "absent"):
            prediction[prediction == 2] = 0
        if name in ("invented", "absent"):
            label[label == 2] = 0
        if name == "ignored":  # class 1 is predicted only where nobody looks
            label[:, 8:] = 255
            prediction[:, :8][prediction[:, :8] == 1] = 0
        levels = prediction.astype(np.float32) / 4
        levels[0, 0, 15], levels[0, 1, 15] = 1, 0  # so that min-max changes nothing
        prediction[0, :2, 15] = 0
        spacing = None if name == "plain too" else (10.0 + number, 1.25, 1.5)
        write_volume(root / f"{name}.npz", Volume(levels, label.astype(np.uint8), spacing))
        files.append(VolumeFile(name.split()[0], name, root / f"{name}.npz"))
        for value, row in zip((1, 2, 3), table[number]):
            ours, theirs = (prediction == value) & (label != 255), label == value
            both, either = (ours & theirs).sum(), (ours | theirs).sum()
            row[:2] = (200 * both / (both + either), 100 * both / either) if either else 100
            if ours.any() and theirs.any():
                row[2:5] = list(metrics_by_hand(ours, theirs, (1, 1, 1)).values())
            if ours.any() and theirs.any() and spacing:
                row[5:] = list(metrics_by_hand(ours, theirs, spacing).values())
    return files, table


def assert_results(results: dict, table: np.ndarray) -> None:
    json.dumps(results, allow_nan=False)  # None instead of nan
    classes, of_classes = INFO.classes[1:], np.nanmean(table, axis=0)
    parts = [(results, np.nanmean(of_classes, axis=0))]
    parts += zip([results["per_class"][name] for name in classes], of_classes)
    for case, rows in zip(CASES, table):
        parts += zip([results["scores"][case][name] for name in classes], rows)
    for found, row in parts:
        values = np.array([found[name] for name in METRICS], float)  # None becomes nan
        np.testing.assert_allclose(values, row, rtol=1e-12)


def test_evaluation_equals_counting_by_hand(scored):
    files, table = scored
    network = Decode()
    network.frozen = torch.nn.Identity().eval()
    results = medical.evaluate_volumes(network, files, INFO, 16, CPU)
    assert network.training and not network.frozen.training  # again
    assert_results(results, table)
    assert results["volumes"] == 6 and results["patients"] == 5 and results["empty_masks"] == 4
    _, one, two, _ = INFO.classes
    assert results["empty"] == [
        {"volume": "missed", "class": two, "empty": "prediction"},
        {"volume": "invented", "class": two, "empty": "label"},
        {"volume": "absent", "class": two, "empty": "both"},
        {"volume": "ignored", "class": one, "empty": "prediction"},
    ]
    text = medical.report(results)
    assert f"{results['dice']:.2f}" in text and text.count("empty mask: ") == 4

    released = table.copy()  # DiffRect's test script: 0, 0, 50, 10, and no word on the others
    for volume, number in ((1, 1), (2, 1), (3, 1), (4, 0)):
        released[volume, number, :4] = 0, 0, 50, 10
    results = medical.evaluate_volumes(Decode(), files, INFO, 16, CPU, released_empty=True)
    assert_results(results, released)

    network.forward = lambda slices: Decode.forward(network, 0 * slices)  # sees nothing
    results = medical.evaluate_volumes(network, files[:1], INFO, 16, CPU)
    assert results["dice"] == 0 and results["hd95"] is None and " - " in medical.report(results)


def test_ranks_share_the_volumes(scored, tmp_path):
    def results(rank: int) -> dict:
        network, mean = Decode(), torch.tensor([1.5 * rank, 2])
        network.register_buffer("mean", mean)
        found = medical.evaluate_volumes(network, scored[0], INFO, 16, CPU)
        assert mean.tolist() == [2.25 * (medical.world_size() == 4), 2]  # of all ranks
        return found

    assert on_ranks(results, tmp_path, ranks=4) == 4 * [results(0)]


def test_a_volume_without_label_has_no_score(tmp_path):
    write_volume(tmp_path / "bare.npz", replace(random_volume(), label=None))
    bare = (Decode(), [VolumeFile("a", "bare", tmp_path / "bare.npz")], INFO, 16, CPU)
    assert "bare.npz has no label" in error_of(medical.evaluate_volumes, *bare)
    empty = replace(random_volume(), label=np.full_like(random_volume().label, 255))
    write_volume(tmp_path / "bare.npz", empty)  # all empty masks agree, at a Dice of 100
    assert "no volume" in error_of(medical.evaluate_volumes, *bare)
    image = np.zeros((2, 8, 8), np.float32)
    diverged = error_of(medical.segment_volume, lambda slices: slices / 0, image, 16, CPU)
    assert "not finite" in diverged


def test_pictures_are_of_middle_slices(scored, tmp_path, monkeypatch):
    files, _ = scored
    rows = []
    monkeypatch.setattr(medical, "sample_grid", lambda given, *rest: rows.extend(given))
    data = VolumeData(INFO, tmp_path, [], [], files, [], "acdc_2")
    network = Decode().eval()
    medical.write_sample_grid(lambda slices: [network(slices).argmax(dim=1)], ("", "", ""), data,
                              16, CPU, tmp_path / "samples.png")
    image, label, prediction = rows[2]  # of 5 slices
    volume = read_volume(files[2].path)
    np.testing.assert_array_equal(image, np.rint(255 * volume.image[[2, 2, 2]]))
    np.testing.assert_array_equal(label, volume.label[2])
    np.testing.assert_array_equal(prediction, 4 * volume.image[2] % 4)
    monkeypatch.setattr(medical, "rank", lambda: 1)
    medical.write_sample_grid(None, (), data, 16, CPU, tmp_path / "samples.png")
    assert len(rows) == 6
