"""common/phantom.py: hearts that could be hearts, files, lists, repeated and interrupted generation."""

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from programs import refuse, succeed

from common import phantom
from common.medical import read_volume
from common.phantom import CLASSES, LV, MYOCARDIUM, RV, VARIANTS, Phantom, blur, coverage, draw_patient, ellipse, generate
from common.runtime import UserError

DEFAULT = VARIANTS["phantom"]
SMALL = replace(DEFAULT, size=32, train=5, val=2, test=3)


def patient(number: int, dials: Phantom = DEFAULT):
    return draw_patient(dials, np.random.default_rng([77, number]))


@pytest.fixture(scope="module")
def patients():
    return [patient(number) for number in range(40)]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phantom") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, "small", SMALL)
        generate(folder, "small")
    return folder


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(VARIANTS, "small", SMALL)


def contents(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def read_list(root: Path, name: str) -> list[list[str]]:
    return [line.split() for line in (root / "lists" / f"{name}.txt").read_text().splitlines()]


def flood(free: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """The part of `free` that 4-neighbour steps reach from `seeds`; both bool [H, W]."""
    reached = seeds & free
    while True:
        grown = reached.copy()
        grown[1:] |= reached[:-1]
        grown[:-1] |= reached[1:]
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown &= free
        if (grown == reached).all():
            return reached
        reached = grown


# ---------------------------------------------------------------- a patient


def test_same_seed_same_patient_another_seed_another():
    first, again, other = patient(3), patient(3), patient(4)
    for (name, image, label, spacing), (name2, image2, label2, spacing2) in zip(first, again):
        assert name == name2 and spacing == spacing2
        assert image.tobytes() == image2.tobytes() and label.tobytes() == label2.tobytes()
    assert first[0][3] != other[0][3]
    slices = min(len(first[0][1]), len(other[0][1]))
    assert np.abs(first[0][1][:slices] - other[0][1][:slices]).mean() > 0.05
    assert (first[0][2][:slices] != other[0][2][:slices]).any()


def test_form_of_a_patient(patients):
    counts, spacings = set(), []
    for phases in patients:
        (ed, image, label, spacing), (es, image2, label2, spacing2) = phases
        assert (ed, es) == ("ED", "ES") and spacing == spacing2
        assert image.shape == label.shape == image2.shape == label2.shape == (len(image), 64, 64)
        for i in (image, image2):
            assert i.dtype == np.float32 and i.min() == 0 and i.max() == 1  # so reading, which scales to [0, 1], changes nothing
            assert np.abs(255 * i - np.rint(255 * i)).max() < 1e-4
        assert label.dtype == label2.dtype == np.uint8 and max(label.max(), label2.max()) < len(CLASSES)
        counts.add(len(image))
        spacings.append(spacing)
    assert counts == {6, 7, 8, 9, 10}
    z, y, x = zip(*spacings)
    assert x == y and 1.2 <= min(x) < 1.35 and 1.65 < max(x) <= 1.8 and 5 <= min(z) < 6 and 9 < max(z) <= 10


def test_share_of_the_classes(patients):
    labels = np.concatenate([label for phases in patients for _, _, label, _ in phases])
    share = np.bincount(labels.ravel(), minlength=4) / labels.size
    assert 0.85 < share[0] < 0.92
    assert (share[1:] > 0.02).all()
    for phases in patients:
        for _, _, label, _ in phases:
            middle = label[len(label) // 4 : len(label) // 2 + 1]
            assert all(set(np.unique(one)) == {0, RV, MYOCARDIUM, LV} for one in middle)


def test_ventricles_contract(patients):
    for (_, _, ed, _), (_, _, es, _) in patients:
        assert (es == LV).sum() < 0.85 * (ed == LV).sum()
        assert (es == RV).sum() < (ed == RV).sum()
        for diastole, systole in zip(ed, es):
            assert (systole == LV).sum() <= (diastole == LV).sum()


def test_myocardium_encloses_the_cavity(patients):
    """In every slice but the first, where the ring may be open: nothing gets from the image's edge into the cavity."""
    opened = 0
    edge = np.pad(np.zeros((62, 62), bool), 1, constant_values=True)
    for phases in patients:
        for _, _, label, _ in phases:
            for z, one in enumerate(label):
                outside = flood(one != MYOCARDIUM, edge)
                if z > 0:
                    assert not (outside & (one == LV)).any()
                    assert ((one == LV) | (one == MYOCARDIUM) | outside).all()  # and nothing else lies within the ring
                else:
                    opened += (outside & (one == LV)).any()
    assert 0.15 < opened / (2 * len(patients)) < 0.6


def test_right_ventricle_lies_on_the_septum_and_ends_before_the_apex(patients):
    for phases in patients:
        for _, _, label, _ in phases:
            present = (label == RV).any(axis=(1, 2))
            assert present[: len(label) // 2].all() and not present[-1]
            assert (np.diff(present.astype(int)) <= 0).all()  # once gone, it stays away
            for one in label[present]:
                right, muscle = one == RV, np.pad(one == MYOCARDIUM, 1)
                beside = muscle[2:, 1:-1] | muscle[:-2, 1:-1] | muscle[1:-1, 2:] | muscle[1:-1, :-2]
                assert (right & beside).sum() >= 3
                assert flood(right, right & beside).sum() > 0.95 * right.sum()  # no part elsewhere
                towards = np.argwhere(right) - np.argwhere(one >= MYOCARDIUM).mean(axis=0)
                assert (towards @ towards.mean(axis=0) < 0).mean() < 0.03  # on one side of the LV
                assert not (right & ~flood(one != MYOCARDIUM, ~muscle[1:-1, 1:-1] & (one == 0))).any()


def test_the_apex_is_smaller_and_sometimes_closed(patients):
    closed = 0
    for phases in patients:
        for _, _, label, _ in phases:
            assert (label[-1] == MYOCARDIUM).sum() > 0
            assert (label[-1] == LV).sum() < 0.6 * (label[1] == LV).sum()
            closed += not (label[-1] == LV).any()
    assert 0.05 < closed / (2 * len(patients)) < 0.5


def test_labels_lie_on_the_picture():
    """Plain style: blood is bright, muscle is dark, and in between every pixel of the ring is darker than the cavity."""
    clear = replace(DEFAULT, noise=(0, 0), blur=(0, 0), bias=(0, 0), bias_bowl=(0, 0), gamma=(0, 0), papillary=(0.01, 0.01),
                    muscle=(0.3, 0.3), rv_blood=(1, 1), wall=(4, 4))
    for number in range(8):
        for _, image, label, _ in patient(number, clear):
            inner = np.zeros(label.shape, bool)  # pixels whose neighbours have the same label: no soft edges
            inner[:, 1:-1, 1:-1] = True
            for axis in (1, 2):
                for step in (-1, 1):
                    inner &= np.roll(label, step, axis) == label
            low, high = (np.quantile(image[inner & (label == LV)], 0.02), np.quantile(image[inner & (label == MYOCARDIUM)], 0.98))
            assert low > 1.3 * high
            assert np.quantile(image[inner & (label == RV)], 0.02) > 1.3 * high


def test_style_differs_between_patients_and_not_between_phases(patients):
    def contrast(image, label):
        return image[label == MYOCARDIUM].mean() / image[label == LV].mean()

    values = np.array([[contrast(image, label) for _, image, label, _ in phases] for phases in patients])
    assert values[:, 0].std() > 4 * (values[:, 0] - values[:, 1]).std()


def test_geometry_scales_with_the_image():
    """The same seed at twice the size is the same picture, averaged over 2x2 pixels, and the same heart."""
    clear = replace(DEFAULT, noise=(0, 0), blur=(1, 1))
    for number in range(4):
        for (_, image, label, spacing), (_, image2, label2, spacing2) in zip(patient(number, clear), patient(number, replace(clear, size=128))):
            blocks = (len(label), 64, 2, 64, 2)
            assert np.abs(image2.reshape(blocks).mean(axis=(2, 4)) - image).mean() < 0.004
            for k in (RV, MYOCARDIUM, LV):
                share = (label2 == k).reshape(blocks).mean(axis=(2, 4))
                assert ((share > 0) >= (label == k)).mean() > 0.9995
                for axis in (1, 2):  # centre of mass
                    positions = np.arange(64).reshape([-1 if a == axis else 1 for a in range(3)])
                    assert abs((share * positions).sum() / share.sum() - (positions * (label == k)).sum() / (label == k).sum()) < 0.1
            assert spacing[0] == spacing2[0] and spacing[1] == pytest.approx(2 * spacing2[1], rel=1e-3)


# ---------------------------------------------------------------- shapes


def test_ellipse_is_a_distance_near_its_edge():
    angle = np.linspace(0, 2 * np.pi, 50)
    for a, b in ((5.0, 5.0), (4.0, 9.0), (8.0, 3.0)):
        edge, normal = np.stack([a * np.cos(angle), b * np.sin(angle)]), np.stack([np.cos(angle) / a, np.sin(angle) / b])
        normal /= np.linalg.norm(normal, axis=0)
        for offset in (-0.2, 0.0, 0.2):
            assert ellipse(*(edge + offset * normal), a, b) == pytest.approx(-offset, abs=0.02)
        assert ellipse(np.zeros(1), np.zeros(1), a, b)[0] > 0
    assert coverage(np.array([-50.0, 0.0, 50.0])) == pytest.approx([0, 0.5, 1])


@pytest.mark.parametrize("sigma", [0.3, 0.56, 1.7])
def test_blur_is_scipys(sigma):
    ndimage = pytest.importorskip("scipy.ndimage")
    volume = np.random.default_rng(0).standard_normal((3, 20, 24))
    radius = int(np.ceil(3 * sigma))
    expected = ndimage.gaussian_filter(volume, (0, sigma, sigma), mode="mirror", radius=(0, radius, radius))
    assert np.allclose(blur(volume, sigma), expected, atol=1e-12)


def test_no_blur_at_zero():
    volume = np.random.default_rng(0).standard_normal((2, 8, 8))
    assert np.array_equal(blur(volume, 0.0), volume)


# ---------------------------------------------------------------- files and lists


def test_layout(root):
    assert {entry.name for entry in root.iterdir()} == {"volumes", "lists", "classes.txt", "generator.json"}
    assert (root / "classes.txt").read_text().splitlines() == list(CLASSES)
    assert {file.name for file in (root / "lists").iterdir()} == {
        "train.txt", "train_split1.txt", "train_split2.txt", "val.txt", "test.txt"}


def test_lists_are_complete_and_disjoint(root):
    lists = {name: read_list(root, name) for name in ("train", "val", "test")}
    assert {name: len(lines) for name, lines in lists.items()} == {"train": 10, "val": 4, "test": 6}  # two volumes a patient
    owners = [{patient for patient, _ in lines} for lines in lists.values()]
    assert [len(o) for o in owners] == [5, 2, 3] and len(set.union(*owners)) == 10
    volumes = [volume for lines in lists.values() for _, volume in lines]
    assert sorted(volumes) == sorted(file.stem for file in (root / "volumes").iterdir())
    for lines in lists.values():
        for (patient, ed), (patient2, es) in zip(lines[::2], lines[1::2]):
            assert patient == patient2 and (ed, es) == (f"{patient}_ED", f"{patient}_ES")


def test_splits_are_other_orders_of_the_same_patients(root):
    orders = [read_list(root, name) for name in ("train", "train_split1", "train_split2")]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert all(a[0] == b[0] for lines in orders for a, b in zip(lines[::2], lines[1::2]))  # phases stay together
    assert orders[0] != sorted(orders[0])


def test_files_hold_what_was_drawn(root):
    for s, split in enumerate(("train", "val", "test")):
        name = sorted({patient for patient, _ in read_list(root, split)})[1]
        for phase, image, label, spacing in draw_patient(SMALL, np.random.default_rng([SMALL.seed, s, 1])):
            volume = read_volume(root / "volumes" / f"{name}_{phase}.npz", num_classes=4)
            assert np.array_equal(volume.image, image) and np.array_equal(volume.label, label)
            assert tuple(volume.spacing) == spacing


def test_variants_share_no_patients():
    assert len({dials.seed for dials in VARIANTS.values()}) == len(VARIANTS)


# ---------------------------------------------------------------- repeated, refused, interrupted, simultaneous


def test_deterministic_and_idempotent(root, tmp_path, monkeypatch, small):
    generate(tmp_path / "again", "small")
    before, again = contents(root), contents(tmp_path / "again")
    assert before.keys() == again.keys()
    for name in before:  # archives may hold the time of writing
        if name.endswith(".npz"):
            with np.load(root / name) as one, np.load(tmp_path / "again" / name) as two:
                assert set(one) == set(two) and all(np.array_equal(one[key], two[key]) for key in one)
        else:
            assert before[name] == again[name]
    stamps = {file: file.stat().st_mtime_ns for file in root.rglob("*")}
    monkeypatch.setattr(phantom, "draw_patient", None)  # is not called again
    generate(root, "small")
    assert stamps == {file: file.stat().st_mtime_ns for file in root.rglob("*")}


def test_refuses_other_dials_versions_and_foreign_folders(root, tmp_path, monkeypatch, small):
    before = contents(root)
    with pytest.raises(UserError, match="delete that folder") as error:
        generate(root, "phantom")
    assert str(root) in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setattr(phantom, "FORMAT", phantom.FORMAT + 1)
    with pytest.raises(UserError, match="another version"):
        generate(root, "small")
    assert contents(root) == before
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not generated here") as error:
        generate(tmp_path, "small")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot write .*choose another folder") as error:
        generate(tmp_path / "thesis.txt" / "data", "small")
    assert "\n" not in str(error.value)
    assert contents(tmp_path) == {"thesis.txt": b"mine"}
    with pytest.raises(KeyError):
        generate(tmp_path / "x", "no such variant")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interruption_leaves_nothing(tmp_path, monkeypatch, small, error):
    drawn = []

    def interrupted(dials, rng):
        if len(drawn) == 3:
            raise error
        drawn.append(draw_patient(dials, rng))
        return drawn[-1]

    monkeypatch.setattr(phantom, "draw_patient", interrupted)
    with pytest.raises(error):
        generate(tmp_path / "data", "small")
    assert len(drawn) == 3 and list(tmp_path.iterdir()) == []


def test_simultaneous_processes_agree(tmp_path, small):
    context = multiprocessing.get_context("fork")  # spawning would spend the time on importing torch
    processes = [context.Process(target=generate, args=(tmp_path / "data", "small")) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]  # no temporary folder is left
    assert json.loads((tmp_path / "data" / "generator.json").read_text())["dials"]["train"] == 5
    assert len(list((tmp_path / "data" / "volumes").iterdir())) == 20


def test_command_line(tmp_path, monkeypatch, capfd):
    """The default data set: it takes a few seconds, fits into 12 MB, and is not written over anything."""
    succeed("-m", "common.phantom", "--variant", "phantom", "--root", tmp_path / "data")
    files = contents(tmp_path / "data")
    assert sum(len(content) for content in files.values()) < 12e6
    assert len([name for name in files if name.endswith(".npz")]) == 140
    assert [len(read_list(tmp_path / "data", name)) for name in ("train", "val", "test")] == [80, 20, 40]
    line = refuse("common/phantom.py", monkeypatch, capfd, "--variant", "phantom_large", "--root", tmp_path / "data")
    assert "phantom_large" in line and "delete that folder" in line
    assert contents(tmp_path / "data") == files
