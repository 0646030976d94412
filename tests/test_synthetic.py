"""common/synthetic.py: both embedded data sets, their files and lists, and the shipped encoders."""

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from programs import error_of, ids, in_processes, refuse, run_as_program

from common import synthetic
from common.backbones import build_encoder
from common.figures import voc_palette
from common.synthetic import (LV, MYOCARDIUM, PHANTOMS, RV, SHAPES, choose_labeled, draw_patient,
                              draw_shapes, generate, with_changes)

SMALL_PHANTOM = with_changes(PHANTOMS["phantom"], size=32, train=5, val=2, test=3)
SUFFIXES = ("", "_split1", "_split2")


@pytest.fixture(scope="module", autouse=True)
def phantom_root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PHANTOMS, "small_phantom", SMALL_PHANTOM)
        generate(folder, "small_phantom")
        yield folder


@pytest.fixture(scope="module")
def patients() -> list:
    return [patient(number) for number in range(16)]


def patient(number: int, dials=PHANTOMS["phantom"]) -> list[tuple]:
    return draw_patient(dials, np.random.default_rng([77, number]))


def contents(root: Path) -> dict[str, bytes]:
    files = (file for file in sorted(root.rglob("*")) if file.is_file())
    return {str(file.relative_to(root)): file.read_bytes() for file in files}


def read_label(root: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(root / "SegmentationClass" / f"{name}.png"))


# ---------------------------------------------------------------- shapes


def test_layout_and_formats(shapes):
    assert {entry.name for entry in shapes.iterdir()} == {
        "JPEGImages", "SegmentationClass", "ImageSets", "classes.txt", "generator.json"}
    assert (shapes / "classes.txt").read_text().split() == list(SHAPES["shapes"].classes)
    splits = {split: ids(shapes, split) for split in ("train", "val", "tune")}
    assert {split: len(set(names)) for split, names in splits.items()} == {
        "train": 60, "val": 4, "tune": 3}
    names, seen = {name for split in splits.values() for name in split}, set()
    assert len(names) == 67
    assert {file.stem for file in (shapes / "JPEGImages").iterdir()} == names
    assert {file.stem for file in (shapes / "SegmentationClass").iterdir()} == names
    for name in names:
        image = Image.open(shapes / "JPEGImages" / f"{name}.jpg")
        label = Image.open(shapes / "SegmentationClass" / f"{name}.png")
        assert (image.mode, image.format, image.size) == ("RGB", "JPEG", (64, 64))
        assert (label.mode, label.format, label.size) == ("P", "PNG", (64, 64))
        assert np.array_equal(np.reshape(label.getpalette(), (-1, 3)), voc_palette())
        seen |= set(np.unique(label).tolist())
    assert seen == set(range(8)) | {255}


def test_shapes_files_hold_what_was_drawn(shapes):
    for s, split in enumerate(("train", "val", "tune")):
        image, label = draw_shapes(SHAPES["shapes"], np.random.default_rng([1, s, 2]))
        assert np.array_equal(read_label(shapes, f"{split}_000002"), label)
        stored = np.asarray(Image.open(shapes / "JPEGImages" / f"{split}_000002.jpg")).astype(int)
        assert np.abs(stored - image).mean() < 6  # JPEG at quality 95


def test_the_draws_have_not_changed():
    """Tables in the documentation were measured on these very pictures; FORMAT marks a change."""
    _, label = draw_shapes(SHAPES["shapes"], np.random.default_rng([1, 0, 0]))
    counts = [(label == k).sum() for k in (0, 1, 7, 255)]
    assert counts == pytest.approx([3020, 505, 406, 165], abs=3)
    _, _, heart, spacing = patient(0)[1]
    assert np.bincount(heart.ravel()) == pytest.approx([21563, 620, 2048, 345], abs=3)
    assert spacing == (6.22, 1.5304, 1.5304)


def test_borders_are_thin_and_only_at_changes():
    _, label = draw_shapes(SHAPES["shapes"], np.random.default_rng(3))
    assert 0 < (label == 255).mean() < 0.15
    for one, other in ((label[:, :-1], label[:, 1:]), (label[:-1], label[1:])):
        inner = (one != 255) & (other != 255)
        assert (one == other)[inner].all()  # without a border between them, neighbours agree


def test_labels_follow_the_textures():
    """Without noise, horizontal stripes change along y, and only where the label says so."""
    plain = with_changes(SHAPES["shapes"], noise=(0, 0), warp=(0, 0), tilt=0, contrast=(0.25, 0.25),
                         saturation=(1, 1))
    for seed in range(10):
        image, label = draw_shapes(plain, np.random.default_rng(seed), ["hstripe"])
        grey = image.astype(float).mean(axis=2)
        down, right = np.abs(np.diff(grey, axis=0))[:, :-1], np.abs(np.diff(grey, axis=1))[:-1]
        corners = np.stack([label[:-1, :-1], label[1:, :-1], label[:-1, 1:]])
        one, zero = (corners == 1).all(axis=0), (corners == 0).all(axis=0)
        assert down[one].mean() > 3 * right[one].mean()
        assert down[one].mean() > 3 * down[zero].mean()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_labeled_lists_are_nested_and_cover_the_classes(shapes, suffix):
    lists = {size: ids(shapes, f"labeled_{size}{suffix}") for size in (12, 24, 48)}
    assert set(lists[12]) < set(lists[24]) < set(lists[48]) < set(ids(shapes, "train"))
    for (size, names), wanted in zip(lists.items(), (2, 3, 4)):
        assert len(set(names)) == len(names) == size
        labels = [read_label(shapes, name) for name in names]
        for k in range(1, 8):
            assert sum((label == k).mean() >= 0.01 for label in labels) >= wanted


def test_labeled_choice_takes_what_there_is(shapes):
    present = np.zeros((60, 3), bool)
    present[:, 0], present[:30, 1], present[7, 2] = True, True, True  # one shows the last class
    sets = choose_labeled(present, np.random.default_rng(0))
    assert {size: len(set(rows)) for size, rows in sets.items()} == {12: 12, 24: 24, 48: 48}
    assert 7 in sets[12]
    assert len({tuple(ids(shapes, f"labeled_12{suffix}")) for suffix in SUFFIXES}) == 3


@pytest.mark.parametrize("name", ["shapes", "shapes_severe"])
def test_exponent_sets_the_frequencies(name):
    dials = with_changes(SHAPES[name], size=24, blobs=(1, 1), distractors=0, radius=(6, 8))
    labels = [draw_shapes(dials, np.random.default_rng([99, i]))[1] for i in range(400)]
    measured = np.array([np.mean([(label == k).any() for label in labels]) for k in range(1, 8)])
    expected = np.arange(1, 8) ** -dials.exponent
    assert np.abs(measured - expected / expected.sum()).max() < 0.07


# ---------------------------------------------------------------- phantom


def test_form_of_a_patient(patients):
    counts, spacings = set(), []
    for (ed, image, label, spacing), (es, image2, label2, spacing2) in patients:
        assert (ed, es) == ("ED", "ES") and spacing == spacing2
        assert image.shape == label.shape == image2.shape == label2.shape == (len(image), 64, 64)
        for values in (image, image2):  # min-max normalisation, which readers do, changes nothing
            assert values.dtype == np.float32 and values.min() == 0 and values.max() == 1
            assert np.abs(255 * values - np.rint(255 * values)).max() < 1e-4
        assert label.dtype == label2.dtype == np.uint8
        counts.add(len(image))
        spacings.append(spacing)
    assert counts == {6, 7, 8, 9, 10}
    z, y, x = zip(*spacings)
    assert x == y and 1.2 <= min(x) < max(x) <= 1.8 and 5 <= min(z) < max(z) <= 10


def test_hearts_could_be_hearts(patients):
    shares = np.bincount(np.concatenate([label.ravel() for p in patients for _, _, label, _ in p]))
    assert 0.85 < shares[0] / shares.sum() < 0.92 and (shares[1:] / shares.sum() > 0.02).all()
    for (_, _, ed, _), (_, _, es, _) in patients:
        assert (es == LV).sum() < 0.85 * (ed == LV).sum() and (es == RV).sum() < (ed == RV).sum()
        for label in (ed, es):
            for middle in label[len(label) // 4 : len(label) // 2 + 1]:
                assert set(np.unique(middle)) == {0, RV, MYOCARDIUM, LV}
            present = (label == RV).any(axis=(1, 2))
            assert present[0] and not present[-1]
            assert (np.diff(present.astype(int)) <= 0).all()  # once gone, it stays away
            assert (label[-1] == LV).sum() < 0.6 * (label[1] == LV).sum()


def test_myocardium_encloses_the_cavity_and_touches_the_right_ventricle(patients):
    """In every slice but the first, where the ring may be open."""
    ndimage = pytest.importorskip("scipy.ndimage", reason="floods with scipy")
    opened = []
    for label in (label for phases in patients for _, _, label, _ in phases):
        for z, one in enumerate(label):
            muscle, right = one == MYOCARDIUM, one == RV
            leaks = ((one == LV) & ~ndimage.binary_fill_holes(muscle)).any()
            assert z == 0 or not leaks
            opened += [leaks] if z == 0 else []
            beside = right & ndimage.binary_dilation(muscle)
            touching = ndimage.binary_propagation(beside, mask=right)
            assert touching.sum() >= 0.95 * right.sum()
    assert 0.1 < np.mean(opened) < 0.7


def test_labels_lie_on_the_picture():
    """In a plain style, the muscle is darker than the blood on both sides."""
    clear = with_changes(PHANTOMS["phantom"], noise=(0, 0), blur=(0.01, 0.01), bias=(0, 0),
                         gamma=(0, 0), bias_bowl=(0, 0), papillary=(0.01, 0.01), muscle=(0.3, 0.3),
                         rv_blood=(1, 1), wall=(4, 4))
    for number in range(4):
        for _, image, label, _ in patient(number, clear):
            inner = np.ones(label.shape, bool)  # neighbours have the same label: no soft edges
            for axis, step in ((1, 1), (1, -1), (2, 1), (2, -1)):
                inner &= np.roll(label, step, axis) == label
            dark = np.quantile(image[inner & (label == MYOCARDIUM)], 0.98)
            for blood in (LV, RV):
                assert np.quantile(image[inner & (label == blood)], 0.02) > 1.3 * dark


def test_phantom_lists_and_files(phantom_root):
    folder = phantom_root / "lists"
    lists = {file.stem: [line.split() for line in file.read_text().splitlines()]
             for file in folder.iterdir()}
    orders = [lists.pop(f"train{suffix}") for suffix in SUFFIXES]
    assert {name: len(lines) for name, lines in lists.items()} == {"val": 4, "test": 6}
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2]) and len(orders[0]) == 10
    assert orders[0] != orders[1] != orders[2] != orders[0]
    volumes = [volume for lines in (orders[0], *lists.values()) for _, volume in lines]
    assert len(set(volumes)) == 20
    assert {file.stem for file in (phantom_root / "volumes").iterdir()} == set(volumes)
    for lines in (*orders, *lists.values()):  # the phases of a patient stay together
        for (name, ed), (name2, es) in zip(lines[::2], lines[1::2]):
            assert name == name2 and (ed, es) == (f"{name}_ED", f"{name}_ES")
    for s, first in enumerate((1, 6, 8)):
        rng = np.random.default_rng([SMALL_PHANTOM.seed, s, 0])
        for phase, image, label, spacing in draw_patient(SMALL_PHANTOM, rng):
            with np.load(phantom_root / "volumes" / f"patient{first:03d}_{phase}.npz") as file:
                assert np.array_equal(file["image"], image) and np.array_equal(file["label"], label)
                assert tuple(file["spacing"]) == spacing


# ---------------------------------------------------------------- repeated, refused, interrupted


@pytest.mark.parametrize("name, draw, other", [("shapes", "draw_shapes", "shapes_severe"),
                                               ("small_phantom", "draw_patient", "phantom")])
def test_generation_is_deterministic_idempotent_and_refuses_other_folders(
        shapes, phantom_root, tmp_path, monkeypatch, name, draw, other):
    folder = shapes if name == "shapes" else phantom_root
    before = contents(folder)
    generate(tmp_path / "again", name)
    assert contents(tmp_path / "again") == before
    monkeypatch.setattr(synthetic, draw, None)  # is not called again
    generate(folder, name)
    line = error_of(generate, folder, other)
    assert "delete that folder" in line and str(folder) in line
    monkeypatch.setattr(synthetic, "FORMAT", synthetic.FORMAT + 1)
    assert "of this version" in error_of(generate, folder, name)
    (tmp_path / "thesis.txt").write_text("mine")
    assert "not empty" in error_of(generate, tmp_path, name)
    assert "cannot write" in error_of(generate, tmp_path / "thesis.txt" / "data", name)
    assert contents(folder) == before and (tmp_path / "thesis.txt").read_text() == "mine"


def test_an_interruption_leaves_nothing_and_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "data").mkdir()
    drawn = mock.Mock(side_effect=[*2 * [patient(0, SMALL_PHANTOM)], KeyboardInterrupt])
    with mock.patch.object(synthetic, "draw_patient", drawn), pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "data", "small_phantom")
    assert list(tmp_path.rglob("*")) == [tmp_path / "data"]
    generate(tmp_path / "data", "small_phantom")
    assert len(list((tmp_path / "data" / "volumes").iterdir())) == 20


def test_simultaneous_processes_agree(tmp_path):
    in_processes(generate, 3 * [(tmp_path / "data", "small_phantom")])
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]  # no temporary folder is left
    generator = json.loads((tmp_path / "data" / "generator.json").read_text())
    assert generator["name"] == "small_phantom" and generator["dials"]["train"] == 5


# ---------------------------------------------------------------- the shipped encoders


def test_every_texture_is_normalised():
    for name in synthetic.TEXTURES:
        field = synthetic.texture(name, SHAPES["shapes"], np.random.default_rng(0))
        assert field.shape == (64, 64) and field.dtype == np.float32
        assert abs(field.mean()) < 1e-3
        assert abs(field.std() - (name != "plain")) < 1e-3


@pytest.mark.parametrize("backbone", ["tiny", "tiny_vit"])
def test_shipped_encoder_tells_textures_apart(backbone):
    """Nearest class centroid in pooled features, on pictures never used in pretraining."""
    file = {"tiny": "tiny_encoder.pt", "tiny_vit": "tiny_vit.pt"}[backbone]
    path = Path(synthetic.__file__).with_name(file)
    assert path.stat().st_size <= 2**20
    for key, value in torch.load(path, weights_only=True).items():
        assert value.dtype == torch.float16 or key.endswith("num_batches_tracked"), key
    count = len(synthetic.TEXTURES)
    kinds = [i % count for i in range(24 * count)]
    x, y, half = synthetic.single_blobs(kinds, seed=1234), torch.tensor(kinds), len(kinds) // 2

    def accuracy(encoder) -> float:
        with torch.no_grad():
            features = synthetic.pooled_features(encoder.eval(), x)
        features = (features - features[:half].mean(dim=0)) / (features[:half].std(dim=0) + 1e-6)
        centroids = [features[:half][y[:half] == k].mean(dim=0) for k in range(count)]
        nearest = torch.cdist(features[half:], torch.stack(centroids)).argmin(dim=1)
        return (nearest == y[half:]).float().mean().item()

    torch.manual_seed(0)
    random, shipped = accuracy(build_encoder(backbone, "none")), accuracy(build_encoder(backbone))
    assert shipped > 0.6 and shipped > random + 0.3, (shipped, random)


@pytest.mark.parametrize("backbone", ["tiny", "tiny_vit"])
def test_command_line(tmp_path, monkeypatch, capfd, backbone):
    command = ("common/synthetic.py", monkeypatch, capfd)
    arguments = ("--epochs", 1, "--pictures", 160, "--output", tmp_path / "encoder.pt")
    status, out, _ = run_as_program(*command, "--encoder", backbone, *arguments)
    assert status == 0 and "epoch 1" in out
    assert [file.name for file in tmp_path.iterdir()] == ["encoder.pt"]
    build_encoder(backbone, str(tmp_path / "encoder.pt"))
    assert "give --dataset or --encoder" in refuse(*command)
    line = refuse(*command, "--dataset", "phantom", "--output", tmp_path)
    assert "not empty" in line and str(tmp_path) in line
