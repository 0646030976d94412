"""common/convert.py: real data sets as their owners give them out, damaged ones, and runs that end in the middle."""

import concurrent.futures
import gzip
import hashlib
import io
import json
import os
import re
import signal
import struct
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest

from common import convert
from common.convert import prepare
from common.data import PublishedList
from common.medical import read_volume
from common.runtime import UserError
from programs import run, run_as_program, start

h5py = pytest.importorskip("h5py", reason="reads SSL4MIS's files, which needs h5py")
nibabel = pytest.importorskip("nibabel", reason="reads NIfTI files, which needs nibabel")

SHAPE = (7, 5, 3)  # x, y, z: no two alike
ZOOMS = (1.25, 1.5, 10.0)


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


def error_of(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        prepare(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def problems_of(capsys, *arguments, **options) -> tuple[list[str], str]:
    """The `error: ` lines of a run that cannot convert everything, and the message that it ends with."""
    capsys.readouterr()
    message = error_of(*arguments, **options)
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    return lines, message


# ---------------------------------------------------------------- files as the owners write them


def intensity(x, y, z, number: int):
    """Asymmetric along every axis, different for every volume, whole numbers as scanners give."""
    return (100 * x + 17 * y * y + 5 * z + 3 * x * z + 11 * number) % 997


def structure(x, y, z, values: tuple, number: int):
    """One of `values`, asymmetric along every axis."""
    return np.asarray(values)[(x + 2 * y + 3 * z + x * y + number) % len(values)]


def grid_zyx(shape=SHAPE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, y, z of every voxel of an array [Z, Y, X]: what the converted volume is compared on."""
    z, y, x = np.indices(shape[::-1])
    return x, y, z


def expected_image(number: int, shape=SHAPE) -> np.ndarray:
    raw = intensity(*grid_zyx(shape), number).astype(np.float64)
    return (raw - raw.min()) / (raw.max() - raw.min())


def write_nifti(path: Path, array: np.ndarray, zooms=ZOOMS, **header) -> Path:
    """An array [X, Y, Z(, C)] under an oblique affine with these voxel sizes, as scanners have it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]]) @ np.diag([-zooms[0], -zooms[1], zooms[2]])
    affine[:3, 3] = (90, -120, 30)
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_zooms((*zooms, *[1.0] * (array.ndim - 3))[: array.ndim])
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def nifti_pair(image: Path, label: Path, number: int, values: tuple, shape=SHAPE, zooms=ZOOMS) -> None:
    x, y, z = np.indices(shape)
    write_nifti(image, intensity(x, y, z, number).astype(np.int16), zooms)
    write_nifti(label, structure(x, y, z, values, number).astype(np.int16 if max(values) > 255 else np.uint8), zooms)


def write_hdf5(path: Path, **arrays) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip")
    return path


def ssl4mis_arrays(number: int, shape=SHAPE) -> dict[str, np.ndarray]:
    x, y, z = grid_zyx(shape)
    label = structure(x, y, z, (0, 1, 2, 3), number).astype(np.uint8)
    return {"image": expected_image(number, shape).astype(np.float32), "label": label, "scribble": np.full_like(label, 4)}


ACDC = {"train": [3, 1], "val": [4], "test": [2]}  # patients in the order of the lists
NUMBERS = {f"patient{patient:03}_frame{phase:02}": 10 * patient + phase for patient in range(1, 5) for phase in (1, 2)}


def list_text(patients: list[int]) -> str:
    return "".join(f"patient{patient:03}_frame{phase:02}\n" for patient in patients for phase in (1, 2))


@pytest.fixture
def published(monkeypatch) -> dict[str, bytes]:
    """The contents of SSL4MIS's lists, cut down to four patients."""
    contents = {name: list_text(patients).encode() for name, patients in ACDC.items()}
    monkeypatch.setattr(convert, "ACDC_LISTS", {
        name: PublishedList("HiLab-git/SSL4MIS", "06df6047a59a", f"data/ACDC/{name}.list", content.count(b"\n"), hashlib.sha256(content).hexdigest())
        for name, content in contents.items()})
    return contents


def add_lists(folder: Path, published: dict[str, bytes]) -> None:
    for name, content in published.items():
        (folder / f"{name}.list").write_bytes(content)


@pytest.fixture
def ssl4mis(tmp_path, published) -> Path:
    """Whole volumes of patients 1 to 3, slices of all four (those of patient 4 alone, and more than nine of them)."""
    source = tmp_path / "ACDC"
    for name, number in NUMBERS.items():
        arrays = ssl4mis_arrays(number, (7, 5, 12) if name.startswith("patient004") else SHAPE)
        if not name.startswith("patient004"):
            write_hdf5(source / "data" / f"{name}.h5", **arrays)
        for index in range(len(arrays["image"])):
            write_hdf5(source / "data" / "slices" / f"{name}_slice_{index + 1}.h5", **{key: array[index] for key, array in arrays.items()})
    add_lists(source, published)
    return source


@pytest.fixture
def challenge(tmp_path, published) -> Path:
    """The challenge's folders; patient 1's phases are frames 4 and 11, and patient 7 is in no list."""
    source = tmp_path / "database"
    for patient in (1, 2, 3, 4, 7):
        folder = source / "training" / f"patient{patient:03}"
        frames = (4, 11) if patient == 1 else (1, 12)
        for phase, frame in enumerate(frames, 1):
            name = f"patient{patient:03}_frame{frame:02}"
            nifti_pair(folder / f"{name}.nii.gz", folder / f"{name}_gt.nii.gz", 10 * patient + phase, (0, 1, 2, 3))
        write_nifti(folder / f"patient{patient:03}_4d.nii.gz", np.zeros((*SHAPE, 12), np.int16))
        (folder / "Info.cfg").write_text(f"ED: {frames[0]}\nES: {frames[1]}\nGroup: DCM\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0\n")
        (folder / f"._patient{patient:03}_frame01_gt.nii.gz").write_bytes(b"\0\5\26\7")
    add_lists(source, published)
    return source


def add_lge(source: Path, patient: int, ending: str = "_manual.nii.gz", shape=SHAPE, zooms=ZOOMS) -> tuple[Path, Path]:
    image, label = source / "lge" / f"patient{patient}_LGE.nii.gz", source / "gt" / f"patient{patient}_LGE{ending}"
    nifti_pair(image, label, patient, (0, 200, 500, 600), shape, zooms)
    return image, label


@pytest.fixture
def lge(tmp_path) -> Path:
    """Twelve patients of MS-CMRSEG beside pictures of other sequences."""
    source = tmp_path / "mscmrseg"
    for patient in range(1, 13):
        add_lge(source, patient, "_gd.nii" if patient == 2 else "_Manual.nii.gz" if patient == 3 else "_manual.nii.gz")
    nifti_pair(source / "c0" / "patient1_C0.nii.gz", source / "c0" / "patient1_C0_manual.nii.gz", 99, (0, 200, 500, 600))
    (source / "lge" / "._patient1_LGE.nii.gz").write_bytes(b"\0\5\26\7")
    return source


def add_prostate(task: Path, patient: int, channels: int = 2) -> None:
    x, y, z = np.indices(SHAPE)
    image, label = intensity(x, y, z, patient).astype(np.float32), structure(x, y, z, (0, 1, 2), patient).astype(np.float32)
    image = np.stack([image, *[2000 - 3 * image] * (channels - 1)], axis=3) if channels else image
    write_nifti(task / "imagesTr" / f"prostate_{patient:02}.nii.gz", image, (0.625, 0.5, 3.6))
    write_nifti(task / "labelsTr" / f"prostate_{patient:02}.nii.gz", label, (0.625, 0.5, 3.6))


@pytest.fixture
def prostate(tmp_path) -> Path:
    """The folder that holds Task05_Prostate; numbers have gaps, as the owners' have."""
    task = tmp_path / "Task05_Prostate"
    for patient in (0, 1, 2, 4, 47):
        add_prostate(task, patient)
        for folder in ("imagesTr", "labelsTr", "imagesTs"):
            (task / folder).mkdir(exist_ok=True)
            (task / folder / f"._prostate_{patient:02}.nii.gz").write_bytes(b"\0\5\26\7")
    write_nifti(task / "imagesTs" / "prostate_03.nii.gz", np.zeros((*SHAPE, 2), np.float32))
    (task / "dataset.json").write_text(json.dumps({"name": "PROSTATE", "modality": {"0": "T2", "1": "ADC"}, "numTraining": 32}))
    return tmp_path


# ---------------------------------------------------------------- content


def assert_volume(path: Path, number: int, values: dict, shape=SHAPE, spacing=ZOOMS[::-1]) -> None:
    """Voxel for voxel what the formulas say. `values`: in the source's file -> class."""
    volume, grid = read_volume(path), grid_zyx(shape)
    assert volume.image.dtype == np.float32 and volume.image.shape == shape[::-1]
    assert np.abs(volume.image - expected_image(number, shape)).max() < 1e-6
    truth = structure(*grid, tuple(values), number)
    assert all(np.array_equal(volume.label == label, truth == value) for value, label in values.items()) and volume.label.dtype == np.uint8
    assert volume.spacing == (None if spacing is None else pytest.approx(spacing))
    with np.load(path) as file:  # what is stored is normalised already
        assert file["image"].dtype == np.float32 and file["image"].min() == 0 and file["image"].max() == 1


def lines(root: Path, name: str) -> list[str]:
    return (root / "lists" / f"{name}.txt").read_text().splitlines()


def test_ssl4mis_volumes_and_slices(ssl4mis, tmp_path, capsys):
    root = tmp_path / "data"
    prepare("acdc", ssl4mis, root, workers=1)
    for name, number in NUMBERS.items():
        shape = (7, 5, 12) if name.startswith("patient004") else SHAPE  # twelve slices: 10 must follow 9, not 1
        assert_volume(root / "volumes" / f"{name}.npz", number, {0: 0, 1: 1, 2: 2, 3: 3}, shape, spacing=None)
    for name, patients in ACDC.items():
        assert lines(root, name) == [f"patient{patient:03} patient{patient:03}_frame{phase:02}" for patient in patients for phase in (1, 2)]
    text = capsys.readouterr().out
    assert "spacing      unknown" in text and "patients     4, volumes 8" in text
    assert "slices       42, 3 to 12 a volume" in text and "train 2 (4), val 1 (2), test 1 (2)" in text


def test_slices_may_start_at_zero_and_a_volume_is_preferred(ssl4mis, tmp_path):
    slices = ssl4mis / "data" / "slices"
    for number in range(1, 13):
        (slices / f"patient004_frame01_slice_{number}.h5").rename(slices / f"patient004_frame01_slice_{number - 1}.h5")
    (slices / "patient001_frame01_slice_2.h5").write_bytes(b"never read: the volume is there")
    prepare("acdc", ssl4mis, tmp_path / "data", workers=1)
    assert_volume(tmp_path / "data" / "volumes" / "patient004_frame01.npz", 41, {0: 0, 1: 1, 2: 2, 3: 3}, (7, 5, 12), spacing=None)


def test_challenge_folders(challenge, tmp_path, capsys):
    root = tmp_path / "data"
    prepare("acdc", challenge, root, workers=1)
    for name, number in NUMBERS.items():
        assert_volume(root / "volumes" / f"{name}.npz", number, {0: 0, 1: 1, 2: 2, 3: 3})
    assert lines(root, "train")[0] == "patient003 patient003_frame01" and len(list((root / "volumes").iterdir())) == 8
    text = capsys.readouterr().out
    assert "z 10 / 10 / 10, y 1.5 / 1.5 / 1.5, x 1.25 / 1.25 / 1.25 (mm: min / median / max)" in text and "5 x 7 (8)" in text
    counts = sum(np.bincount(structure(*grid_zyx(), (0, 1, 2, 3), number).ravel(), minlength=4) for number in NUMBERS.values())
    for name, count in zip(("background", "right ventricle", "myocardium", "left ventricle"), counts):
        assert f"{name} {100 * count / (8 * 105):.2f} %" in text
    assert f"next         python diffrect.py --dataset acdc --data-root {root} --labeled 1" in text  # a tenth of the training patients


def test_the_two_forms_of_acdc_give_the_same_voxels(ssl4mis, challenge, tmp_path):
    for source in (ssl4mis, challenge):
        prepare("acdc", source, tmp_path / source.name / "out", workers=1)
    for name in list(NUMBERS)[:6]:  # patient 4 has more slices in one of the fixtures
        ours, theirs = (read_volume(tmp_path / source.name / "out" / "volumes" / f"{name}.npz") for source in (ssl4mis, challenge))
        assert np.array_equal(ours.image, theirs.image) and np.array_equal(ours.label, theirs.label)


def test_mscmrseg(lge, tmp_path, capsys):
    root = tmp_path / "data"
    prepare("mscmrseg", lge, root, workers=1)
    for patient in range(1, 13):
        assert_volume(root / "volumes" / f"patient{patient}_LGE.npz", patient, {0: 0, 200: 2, 500: 3, 600: 1})
    assert len(list((root / "volumes").iterdir())) == 12
    text = capsys.readouterr().out
    assert "found 12 of 45 patients: not the paper's set" in text
    assert "train 9 (9), val 3 (3), train_split2 9 (9), val_split2 3 (3)" in text and "--labeled 2" in text  # 7 of 35, and 10 of 45
    assert all(line.split()[1] == f"{line.split()[0]}_LGE" for line in lines(root, "train"))


def test_prostate(prostate, tmp_path, capsys):
    for source, root in ((prostate, tmp_path / "one"), (prostate / "Task05_Prostate", tmp_path / "two")):
        prepare("prostate", source, root, workers=1)
        for patient in (0, 1, 2, 4, 47):  # T2, not ADC, which is made to be its negative
            assert_volume(root / "volumes" / f"prostate_{patient:02}.npz", patient, {0: 0, 1: 1, 2: 2}, spacing=(3.6, 0.5, 0.625))
        assert len(list((root / "volumes").iterdir())) == 5
    assert "peripheral zone" in capsys.readouterr().out
    assert len(lines(root, "train")) == 3 and len(lines(root, "val")) == 2


def test_prostate_with_one_channel_or_none(prostate, tmp_path):
    for patient, channels in ((1, 1), (2, 0)):
        add_prostate(prostate / "Task05_Prostate", patient, channels)
    prepare("prostate", prostate, tmp_path / "data", workers=1)
    for patient in (0, 1, 2):
        assert_volume(tmp_path / "data" / "volumes" / f"prostate_{patient:02}.npz", patient, {0: 0, 1: 1, 2: 2}, spacing=(3.6, 0.5, 0.625))


def test_scaled_and_singleton_files(tmp_path):
    """A scale factor in the header, rounding errors in a float label, [X, Y, Z, 1]: all of it occurs."""
    x, y, z = np.indices(SHAPE)
    for patient in (1, 2, 3):
        image, label = add_lge(tmp_path / "in", patient)
        if patient == 2:
            write_nifti(label, structure(x, y, z, (0, 200, 500, 600), patient).astype(np.float32)[..., None] + 1e-4)
            write_nifti(image, intensity(x, y, z, patient).astype(np.float64)[..., None])
        if patient == 3:
            raw = bytearray(write_nifti(image.with_name("raw.nii"), (intensity(x, y, z, patient) - 30).astype(np.int16)).read_bytes())
            raw[112:120] = struct.pack("<ff", 2.5, 75)  # scl_slope, scl_inter: intensities are 2.5 x stored + 75
            image.write_bytes(gzip.compress(bytes(raw)))
    prepare("mscmrseg", tmp_path / "in", tmp_path / "data", workers=1)
    for patient in (1, 2, 3):
        assert_volume(tmp_path / "data" / "volumes" / f"patient{patient}_LGE.npz", patient, {0: 0, 200: 2, 500: 3, 600: 1})


# ---------------------------------------------------------------- lists


@pytest.mark.parametrize("dataset, patients, train", [
    ("mscmrseg", 45, 35), ("prostate", 32, 22), ("mscmrseg", 40, 31), ("mscmrseg", 2, 1), ("prostate", 3, 2)])
def test_splits(dataset, patients, train, capsys):
    items = [convert.Item(f"p{number}", f"v{number}", (), None, {}, "") for number in range(patients)]
    lists, again = convert.random_splits(dataset, items), convert.random_splits(dataset, items)
    assert lists == again and list(lists) == ["train", "val", "train_split2", "val_split2"]
    names = sorted(item.volume for item in items)
    for suffix in ("", "_split2"):
        assert len(lists[f"train{suffix}"]) == train and sorted(lists[f"train{suffix}"] + lists[f"val{suffix}"]) == names
    if patients > 10:
        assert set(lists["val"]) != set(lists["val_split2"]) and lists["train"] != sorted(lists["train"], key=names.index)
    note = "not the paper's set" in capsys.readouterr().out
    assert note == (patients not in (45, 32))


def test_splits_are_those_that_results_are_reported_on():
    """Pinned: with other numbers, results before and after could not be compared."""
    def first(dataset, count, name):
        items = [convert.Item("", str(number), (), None, {}, "") for number in range(count)]
        return [int(volume) for volume in convert.random_splits(dataset, items)[name][:7]]

    assert first("mscmrseg", 45, "train") == [32, 24, 2, 15, 0, 9, 14] and first("mscmrseg", 45, "train_split2") == [19, 41, 15, 44, 4, 0, 40]
    assert first("prostate", 32, "train")[:4] == [5, 21, 6, 30] and first("prostate", 32, "train_split2")[:4] == [27, 10, 30, 18]


def test_patients_are_ordered_by_number(lge, tmp_path):
    """patient10 after patient9: else a split would depend on how names sort."""
    prepare("mscmrseg", lge, tmp_path / "data", workers=1)
    order = np.random.default_rng([2019, 1]).permutation(12)
    assert [line.split()[0] for line in lines(tmp_path / "data", "train") + lines(tmp_path / "data", "val")] == [f"patient{index + 1}" for index in order]


def test_published_lists_are_pinned():
    assert [(entry.path, entry.lines, len(entry.sha256)) for entry in convert.ACDC_LISTS.values()] == [
        ("data/ACDC/train.list", 140, 64), ("data/ACDC/val.list", 20, 64), ("data/ACDC/test.list", 40, 64)]


def serve(monkeypatch, contents: dict[str, bytes]) -> list[str]:
    """Downloads give these files; returns the addresses asked for."""
    asked = []

    def urlopen(url, timeout=None):
        asked.append(url)
        name = url.rsplit("/", 1)[1].removesuffix(".list")
        if name not in contents:
            raise urllib.error.URLError("no route to host")
        return io.BytesIO(contents[name])

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def test_lists_from_the_source_need_no_download(ssl4mis, published, tmp_path, monkeypatch):
    asked = serve(monkeypatch, {})
    (ssl4mis / "train.list").write_bytes(published["train"].replace(b"\n", b"\r\n").rstrip())  # as some unpackers leave it
    prepare("acdc", ssl4mis, tmp_path / "data", download=True, workers=1)
    assert asked == [] and len(lines(tmp_path / "data", "train")) == 4


def test_lists_are_downloaded_once_and_only_if_asked(ssl4mis, published, tmp_path, monkeypatch, capsys):
    root = tmp_path / "data"
    for name in ("train", "val"):
        (ssl4mis / f"{name}.list").unlink()
    message = error_of("acdc", ssl4mis, root)
    assert "no train.list" in message and "--download" in message and "https://raw.githubusercontent.com/HiLab-git/SSL4MIS" in message
    assert not (root / "volumes").exists()
    asked = serve(monkeypatch, published)
    prepare("acdc", ssl4mis, root, download=True, workers=1)
    assert [url.rsplit("/", 1)[1] for url in asked] == ["train.list", "val.list"] and len(lines(root, "val")) == 2
    prepare("acdc", ssl4mis, root, workers=1)  # kept, so the second run needs neither
    assert len(asked) == 2


def test_a_list_that_is_not_the_published_one(ssl4mis, published, tmp_path, monkeypatch, capsys):
    root = tmp_path / "data"
    (ssl4mis / "val.list").write_text(list_text([3]))  # would validate on a training patient
    assert f"{ssl4mis / 'val.list'} is not SSL4MIS's list: --download" in error_of("acdc", ssl4mis, root)
    serve(monkeypatch, published)
    prepare("acdc", ssl4mis, root, download=True, workers=1)
    assert lines(root, "val")[0] == "patient004 patient004_frame01" and "using the published one" in capsys.readouterr().out


@pytest.mark.parametrize("contents", [{}, {"train": b"patient001_frame01\n"}], ids=["unreachable", "changed"])
def test_lists_that_cannot_be_fetched(ssl4mis, tmp_path, monkeypatch, contents):
    (ssl4mis / "train.list").unlink()
    serve(monkeypatch, contents)
    assert "train.list" in error_of("acdc", ssl4mis, tmp_path / "data", download=True)
    assert not (tmp_path / "data" / "lists").exists()


def test_listed_volumes_that_are_not_there(ssl4mis, challenge, tmp_path):
    for file in [*ssl4mis.rglob("patient002_*"), *ssl4mis.rglob("patient003_frame02*")]:
        file.unlink()
    message = error_of("acdc", ssl4mis, tmp_path / "data")
    assert "3 of 8" in message and "patient002_frame01" in message and str(ssl4mis) in message and not (tmp_path / "data").exists()
    next(challenge.rglob("patient003_frame12_gt.nii.gz")).unlink()
    message = error_of("acdc", challenge, tmp_path / "data")
    assert "1 of 8" in message and "patient003_frame02" in message


# ---------------------------------------------------------------- what is refused at once


def test_arguments_and_folders_that_hold_nothing(tmp_path, lge):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "mscmrseg" in error_of("brats", empty, tmp_path / "data")
    assert str(tmp_path / "none") in error_of("acdc", tmp_path / "none", tmp_path / "data")
    assert "--workers" in error_of("mscmrseg", lge, tmp_path / "data", workers=0)
    for dataset, name in (("acdc", "patient001_frame01_gt.nii.gz"), ("mscmrseg", "patient1_LGE_manual.nii.gz"), ("prostate", "prostate_00.nii.gz")):
        message = error_of(dataset, empty, tmp_path / "data")
        assert name in message and str(empty) in message and "http" in message
    assert "looked for" in error_of("prostate", lge, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_copies_and_orphans(lge, challenge, ssl4mis, tmp_path):
    double = lge / "copy" / "patient4_LGE.nii.gz"
    double.parent.mkdir()
    double.write_bytes((lge / "lge" / "patient4_LGE.nii.gz").read_bytes())
    message = error_of("mscmrseg", lge, tmp_path / "data")
    assert str(double) in message and str(lge / "lge" / "patient4_LGE.nii.gz") in message
    double.unlink()
    (lge / "lge" / "patient5_LGE.nii.gz").unlink()
    assert str(lge / "gt" / "patient5_LGE_manual.nii.gz") in error_of("mscmrseg", lge, tmp_path / "data")
    (tmp_path / "both").mkdir()
    for source in (challenge, ssl4mis):
        source.rename(tmp_path / "both" / source.name)
    assert "holds both SSL4MIS's .h5 files" in error_of("acdc", tmp_path / "both", tmp_path / "data")


def test_linked_folders_are_entered_once(lge, tmp_path):
    farm = tmp_path / "farm"
    farm.mkdir()
    (farm / "one").symlink_to(lge)
    (farm / "two").symlink_to(lge)
    (lge / "lge" / "up").symlink_to(farm)  # and around
    prepare("mscmrseg", farm, tmp_path / "data", workers=1)
    assert len(times(tmp_path / "data")) == 12


def test_images_without_a_label_are_counted(lge, tmp_path, capsys):
    for patient in (6, 7):
        (lge / "gt" / f"patient{patient}_LGE_manual.nii.gz").unlink()
    prepare("mscmrseg", lge, tmp_path / "data", workers=1)
    text = capsys.readouterr().out
    assert "2 images without a label" in text and "patient6_LGE.nii.gz" in text and "found 10 of 45" in text
    for patient in range(2, 13):
        for file in (lge / "gt").glob(f"patient{patient}_*"):
            file.unlink()
    assert "patient1 alone" in error_of("mscmrseg", lge, tmp_path / "data")


@pytest.mark.parametrize("content, says", [
    ('{"modality": {"0": "ADC", "1": "T2"}}', "'ADC'"), ('{"modality": {"0": "FLAIR"}}', "'FLAIR'"), ("{", "modality"),
    ('{"name": "PROSTATE"}', "modality"), ('["T2"]', "modality")])
def test_another_order_of_channels_is_refused(prostate, tmp_path, content, says):
    path = prostate / "Task05_Prostate" / "dataset.json"
    path.write_text(content)
    message = error_of("prostate", prostate, tmp_path / "data")
    assert str(path) in message and says in message


def test_dataset_json_may_be_missing(prostate, tmp_path):
    (prostate / "Task05_Prostate" / "dataset.json").unlink()
    prepare("prostate", prostate, tmp_path / "data", workers=1)
    assert len(lines(tmp_path / "data", "train")) == 3


@pytest.mark.parametrize("package", ["h5py", "nibabel"])
def test_a_missing_package_is_named_once(package, ssl4mis, challenge, tmp_path, monkeypatch, capsys):
    source, other = (ssl4mis, challenge) if package == "h5py" else (challenge, ssl4mis)
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install {package}" in error_of("acdc", source, tmp_path / "data") and capsys.readouterr().err == ""
    prepare("acdc", other, tmp_path / "other", workers=1)  # the other form does not need it


# ---------------------------------------------------------------- damaged files


def patch(path: Path, offset: int, content: bytes) -> None:
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[offset : offset + len(content)] = content
    path.write_bytes(gzip.compress(bytes(raw)))


def change_voxel(path: Path, value: float, dtype=np.float32) -> None:
    array = np.asarray(nibabel.load(path).dataobj).astype(dtype)
    array[1, 2, 0] = value
    write_nifti(path, array)


def flip_bit(path: Path) -> None:
    """In the checksum: every voxel can still be unpacked."""
    raw = bytearray(path.read_bytes())
    raw[-6] ^= 1
    path.write_bytes(bytes(raw))


RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
PIXDIM = 76  # offset of pixdim in the header, float32 [8]
NIFTI_DAMAGE = [  # what is done to (image, label), which file the message names, what it says
    ("cut off", lambda image, label: image.write_bytes(image.read_bytes()[:-60]), "image", "cannot be read as NIfTI"),
    ("cut off in the header", lambda image, label: label.write_bytes(gzip.compress(gzip.decompress(label.read_bytes())[:200])), "label", "NIfTI"),
    ("voxels missing", lambda image, label: image.write_bytes(gzip.compress(gzip.decompress(image.read_bytes())[:-30])), "image", "NIfTI"),
    ("bit flipped", lambda image, label: flip_bit(image), "image", "CRC"),
    ("nothing in it", lambda image, label: label.write_bytes(b""), "label", "cannot be read as NIfTI"),
    ("a page of the site", lambda image, label: image.write_bytes(b"<html>please log in</html>" * 40), "image", "Not a gzip"),
    ("packed nonsense", lambda image, label: image.write_bytes(gzip.compress(b"nonsense" * 100)), "image", "cannot be read as NIfTI"),
    ("4-D", lambda image, label: write_nifti(image, np.zeros((*SHAPE, 2), np.int16)), "image", "4-D [7, 5, 3, 2]"),
    ("2-D", lambda image, label: write_nifti(label, np.zeros(SHAPE[:2], np.uint8), ZOOMS), "label", "2-D"),
    ("another shape", lambda image, label: write_nifti(label, np.zeros((5, 7, 3), np.uint8)), "label", "[3, 7, 5], its image [3, 5, 7]"),
    ("unknown value", lambda image, label: change_voxel(label, 1220, np.int16), "label", "holds 1220, which stands for no class; known are 0, 200"),
    ("negative value", lambda image, label: change_voxel(label, -1, np.int16), "label", "holds -1,"),
    ("no whole number", lambda image, label: change_voxel(label, 200.5), "label", "200.5, which is not a whole number"),
    ("label nan", lambda image, label: change_voxel(label, np.nan), "label", "nan, which is not a whole number"),
    ("image nan", lambda image, label: change_voxel(image, np.nan), "image", "1 intensities that are nan or infinite"),
    ("image infinite", lambda image, label: change_voxel(image, -np.inf), "image", "nan or infinite"),
    ("image beyond float32", lambda image, label: change_voxel(image, 1e300, np.float64), "image", "nan or infinite"),
    ("constant", lambda image, label: write_nifti(image, np.full(SHAPE, 7, np.int16)), "image", "empty volume: every voxel is 7"),
    ("no slice", lambda image, label: [write_nifti(path, np.zeros((7, 5, 0), np.uint8)) for path in (image, label)], "image", "empty volume"),
    ("zoom zero", lambda image, label: patch(image, PIXDIM + 12, struct.pack("<f", 0)), "image", "voxels of 1.25 x 1.5 x 0 mm"),
    ("zoom nan", lambda image, label: patch(image, PIXDIM + 4, struct.pack("<f", np.nan)), "image", "voxels of nan x 1.5 x 10 mm"),
    ("colours", lambda image, label: write_nifti(image, np.zeros(SHAPE, RGB)), "image", "no numbers"),
    ("colours in the label", lambda image, label: write_nifti(label, np.zeros(SHAPE, RGB)), "label", "no numbers"),
    ("a dead link", lambda image, label: (image.unlink(), image.symlink_to("gone")), "image", "No such file"),
]


def test_every_damaged_nifti_file_is_one_line(tmp_path, monkeypatch, capfd):
    """All at once, through the command: the sound volumes are converted, each damaged one has its line, and there are no lists."""
    source, root = tmp_path / "in", tmp_path / "data"
    named = []
    for patient, (_, spoil, which, _) in enumerate(NIFTI_DAMAGE, 1):
        files = dict(zip(("image", "label"), add_lge(source, patient)))
        spoil(*files.values())
        named.append(files[which])
    for patient in (98, 99):
        add_lge(source, patient)
    status, out, err = run_as_program("common/medical.py", monkeypatch, capfd, "prepare", "--dataset", "mscmrseg", "--source", source, "--root", root,
                                      "--workers", 1)
    errors = err.splitlines()
    assert status == 1 and "Traceback" not in err and len(errors) == len(NIFTI_DAMAGE) + 1
    for path, (what, _, _, says) in zip(named, NIFTI_DAMAGE):
        mine = [line for line in errors if str(path) in line]
        assert len(mine) == 1 and mine[0].startswith("error: ") and says in mine[0], (what, mine)
    assert errors[-1].startswith(f"error: {len(NIFTI_DAMAGE)} of {len(NIFTI_DAMAGE) + 2} volumes could not be converted")
    assert sorted(path.name for path in (root / "volumes").iterdir()) == ["patient98_LGE.npz", "patient99_LGE.npz"]
    assert not (root / "lists").exists() and "next" not in out


def spoil_hdf5(path: Path, **changes) -> None:
    with h5py.File(path) as file:
        arrays = {name: file[name][()] for name in ("image", "label")}
    for name, change in changes.items():
        arrays[name] = change(arrays[name])
    write_hdf5(path, **{name: array for name, array in arrays.items() if array is not None})


def with_voxel(value: float):
    def change(array: np.ndarray) -> np.ndarray:
        array.flat[3] = value
        return array

    return change


def group_instead(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_group("image"), file.create_group("label")


HDF5_DAMAGE = [
    ("cut off", lambda path: path.write_bytes(path.read_bytes()[:-200]), "cannot be read as HDF5"),
    ("nothing in it", lambda path: path.write_bytes(b""), "cannot be read as HDF5"),
    ("a page", lambda path: path.write_bytes(b"<html>" * 200), "cannot be read as HDF5"),
    ("no label", lambda path: spoil_hdf5(path, label=lambda array: None), "holds no data set label"),
    ("groups", group_instead, "cannot be read as HDF5"),
    ("another shape", lambda path: spoil_hdf5(path, label=lambda array: array[..., :-1]), "its image"),
    ("unknown value", lambda path: spoil_hdf5(path, label=with_voxel(4)), "holds 4, which stands for no class; known are 0, 1, 2, 3"),
    ("nan", lambda path: spoil_hdf5(path, image=with_voxel(np.nan)), "1 intensities"),
    ("fewer dimensions", lambda path: spoil_hdf5(path, image=lambda array: array[0], label=lambda array: array[0]), "is expected"),
    ("words", lambda path: spoil_hdf5(path, image=lambda array: np.full(array.shape, b"a", "S1")), "no numbers"),
]


@pytest.mark.parametrize("what, spoil, says", HDF5_DAMAGE, ids=[entry[0] for entry in HDF5_DAMAGE])
def test_every_damaged_hdf5_file_is_one_line(what, spoil, says, ssl4mis, tmp_path, capsys):
    volume, part = ssl4mis / "data" / "patient002_frame01.h5", ssl4mis / "data" / "slices" / "patient004_frame02_slice_11.h5"
    for path in (volume, part):
        spoil(path)
    errors, message = problems_of(capsys, "acdc", ssl4mis, tmp_path / "data", workers=1)
    assert len(errors) == 2 and message.startswith("2 of 8 volumes could not be converted")
    assert all(str(path) in line and says in line for path, line in zip((volume, part), errors)), errors
    assert len(list((tmp_path / "data" / "volumes").iterdir())) == 6 and not (tmp_path / "data" / "lists").exists()


def test_slices_that_do_not_make_a_volume(ssl4mis, tmp_path, capsys):
    slices = ssl4mis / "data" / "slices"
    array = ssl4mis_arrays(1, (6, 5, 1))
    write_hdf5(slices / "patient004_frame01_slice_5.h5", image=array["image"][0], label=array["label"][0])
    errors, _ = problems_of(capsys, "acdc", ssl4mis, tmp_path / "data", workers=1)
    assert len(errors) == 1 and "patient004_frame01_slice_5.h5 is [5, 6], the volume's first slice [5, 7]" in errors[0]
    (slices / "patient004_frame01_slice_5.h5").unlink()
    message = error_of("acdc", ssl4mis, tmp_path / "data")
    assert "slice 5 of this volume is missing" in message and "patient004_frame01_slice_12.h5" in message


def test_a_folder_that_cannot_be_written(lge, tmp_path, capsys):
    (tmp_path / "data").write_text("a file")
    message = error_of("mscmrseg", lge, tmp_path / "data", workers=1)
    assert str(tmp_path / "data") in message


# ---------------------------------------------------------------- running again


def times(root: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (root / "volumes").glob("*.npz")}


def test_only_what_changed_is_converted_again(lge, tmp_path, capsys):
    root = tmp_path / "data"
    prepare("mscmrseg", lge, root, workers=1)
    before, summary = times(root), capsys.readouterr().out.split("\npatients")[1]
    prepare("mscmrseg", lge, root, workers=1)
    text = capsys.readouterr().out
    assert times(root) == before and "12 converted before, 0 to convert" in text and text.split("\npatients")[1] == summary
    lge.rename(tmp_path / "moved")  # the same files elsewhere
    prepare("mscmrseg", tmp_path / "moved", root, workers=1)
    assert times(root) == before
    changed = tmp_path / "moved" / "gt" / "patient5_LGE_manual.nii.gz"
    array = np.asarray(nibabel.load(changed).dataobj)
    write_nifti(changed, np.where(array == 500, 0, array))
    os.utime(tmp_path / "moved" / "lge" / "patient6_LGE.nii.gz", ns=(1, 1))
    (root / "volumes" / "patient7_LGE.npz").unlink()
    (root / "volumes" / "patient8_LGE.npz").write_bytes((root / "volumes" / "patient8_LGE.npz").read_bytes()[:-9])
    prepare("mscmrseg", tmp_path / "moved", root, workers=1)
    after = times(root)
    assert {name for name in after if after[name] != before[name]} == {f"patient{number}_LGE.npz" for number in (5, 6, 7, 8)}
    assert not (read_volume(root / "volumes" / "patient5_LGE.npz").label == 3).any()
    assert_volume(root / "volumes" / "patient8_LGE.npz", 8, {0: 0, 200: 2, 500: 3, 600: 1})


@pytest.mark.parametrize("change", [lambda text: "", lambda text: text[:-9], lambda text: "[]", lambda text: text.replace('"volumes"', '"files"'),
                                    lambda text: text.replace('"format": 1', '"format": 0')], ids=["empty", "cut", "list", "foreign", "older"])
def test_a_damaged_or_older_manifest_costs_time_only(change, lge, tmp_path, capsys):
    prepare("mscmrseg", lge, tmp_path / "data", workers=1)
    before, path = times(tmp_path / "data"), tmp_path / "data" / "prepare.json"
    assert change(path.read_text()) != path.read_text()
    path.write_text(change(path.read_text()))
    prepare("mscmrseg", lge, tmp_path / "data", workers=1)
    assert "0 converted before, 12 to convert" in capsys.readouterr().out and all(times(tmp_path / "data")[name] != before[name] for name in before)


def test_two_data_sets_do_not_share_a_folder(lge, prostate, tmp_path):
    prepare("mscmrseg", lge, tmp_path / "data", workers=1)
    message = error_of("prostate", prostate, tmp_path / "data")
    assert str(tmp_path / "data") in message and "mscmrseg" in message and "--root" in message


def test_mended_files_complete_the_set(lge, tmp_path, capsys):
    root, path = tmp_path / "data", lge / "lge" / "patient9_LGE.nii.gz"
    sound = path.read_bytes()
    path.write_bytes(sound[:100])
    errors, message = problems_of(capsys, "mscmrseg", lge, root, workers=1)
    assert len(errors) == 1 and "1 of 12" in message and not (root / "lists").exists()
    before = times(root)
    errors, _ = problems_of(capsys, "mscmrseg", lge, root, workers=1)  # again, and nothing else is touched
    assert len(errors) == 1 and times(root) == before
    path.write_bytes(sound)
    prepare("mscmrseg", lge, root, workers=1)
    assert before.items() < times(root).items() and len(lines(root, "train")) == 9


def test_progress_off_a_terminal_is_a_line_each_tenth(tmp_path, capsys):
    for patient in range(1, 41):
        add_lge(tmp_path / "in", patient)
    prepare("mscmrseg", tmp_path / "in", tmp_path / "data", workers=1)
    text = capsys.readouterr().out
    assert re.findall(r"converted (\d+) of 40", text) == [str(count) for count in range(4, 41, 4)] and "\r" not in text
    assert len(text.splitlines()) < 24


def test_progress_on_a_terminal_stays_on_its_line(lge, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    prepare("mscmrseg", lge, tmp_path / "data", workers=1)
    shown = [line for line in capsys.readouterr().out.split("\n") if "\r" in line]
    assert len(shown) == 1 and shown[0].count("\r") == 12 and shown[0].endswith("converted 12 of 12")


def test_a_worker_that_dies_is_explained(lge, tmp_path, monkeypatch):
    class Pool:
        def __init__(self, *arguments, **options):
            self.futures = []

        def submit(self, function, *arguments):
            self.futures.append(concurrent.futures.Future())
            if len(self.futures) < 4:
                self.futures[-1].set_result(function(*arguments))
            else:
                self.futures[-1].set_exception(BrokenProcessPool("A process in the pool was terminated abruptly"))
            return self.futures[-1]

        def shutdown(self, cancel_futures: bool) -> None:
            pass

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Pool)
    message = error_of("mscmrseg", lge, tmp_path / "data", workers=2)
    assert "memory" in message and "--workers 1" in message and not (tmp_path / "data" / "lists").exists()


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    """kill -9 in the middle: no process stays behind, finished volumes are kept, and the end is that of a run left alone."""
    source, root = tmp_path / "in", tmp_path / "data"
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 4000, (192, 160, 16)).astype(np.int16)
    image, label = write_nifti(tmp_path / "image.nii", raw), write_nifti(tmp_path / "label.nii", 200 * (raw % 2))
    source.mkdir()
    for patient in range(1, 37):  # one file under all names: writing them takes longer than the test
        os.link(image, source / f"patient{patient}_LGE.nii")
        os.link(label, source / f"patient{patient}_LGE_manual.nii")
    process = start("-m", "common.medical", "prepare", "--dataset", "mscmrseg", "--source", source, "--root", root, "--workers", 2)
    while not (root / "prepare.json").is_file():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)  # waits for the workers too: they hold the pipes
    finished = json.loads((root / "prepare.json").read_text())["volumes"]
    assert 1 <= len(finished) < 36 and not (root / "lists").exists()
    for path in (root / "volumes").glob("*.npz"):
        assert read_volume(path).image.shape == (16, 160, 192)  # whole or not there
    before = times(root)
    prepare("mscmrseg", source, root, workers=1)
    after = times(root)
    assert len(after) == 36 and all(after[f"{name}.npz"] == before[f"{name}.npz"] for name in finished)
    assert len(lines(root, "train")) == 28 and len(lines(root, "val")) == 8
    expected = ((raw - float(raw.min())) / (float(raw.max()) - float(raw.min()))).transpose(2, 1, 0)
    for name in ("patient1_LGE", next(iter(finished)), "patient36_LGE"):
        assert np.abs(read_volume(root / "volumes" / f"{name}.npz").image - expected).max() < 1e-6


def test_workers_give_what_one_process_gives(lge, tmp_path):
    """Through the real command, with a damaged file among them."""
    (lge / "gt" / "patient10_LGE_manual.nii.gz").write_bytes(b"")
    with pytest.raises(UserError):
        prepare("mscmrseg", lge, tmp_path / "one", workers=1)
    done = run("-m", "common.medical", "prepare", "--dataset", "mscmrseg", "--source", lge, "--root", tmp_path / "two", "--workers", 2)
    errors = done.stderr.splitlines()
    assert done.returncode == 1 and len(errors) == 2 and "patient10_LGE_manual.nii.gz" in errors[0] and "1 of 12" in errors[1], done.stderr
    one, two = (sorted((tmp_path / name / "volumes").iterdir()) for name in ("one", "two"))
    assert len(two) == 11 and all(a.name == b.name and a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))
    manifests = [json.loads((tmp_path / name / "prepare.json").read_text()) for name in ("one", "two")]
    assert manifests[0] == manifests[1]
