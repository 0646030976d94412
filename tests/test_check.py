"""`python -m common.data check`: counts, shares and sizes against the fixture's files, and each kind of damage."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from common import check, medical
from common.data import DATASETS
from common.options import TrainingOptions
from common.runtime import UserError
from programs import run_as_program, succeed


@pytest.fixture
def voc(voc_root, monkeypatch) -> TrainingOptions:
    monkeypatch.setitem(DATASETS, "tinyvoc", replace(DATASETS["pascal"], name="tinyvoc", full_list="train", labeled_lists=()))
    lists = voc_root / "ImageSets" / "Segmentation"
    (lists / "labeled_3.txt").write_text("".join(line + "\n" for line in (lists / "train.txt").read_text().split()[:3]))
    return TrainingOptions(dataset="tinyvoc", data_root=str(voc_root), labeled="3")


def test_counts_sizes_and_shares(voc, voc_root):
    text = check.report(voc)
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert " 3 images, 3 with masks" in lines["labeled"] and " 6 images, 0 with masks" in lines["unlabeled"] and " 5 images, 5 with masks" in lines["val"]
    names = (voc_root / "ImageSets" / "Segmentation" / "labeled_3.txt").read_text().split()
    sizes = [Image.open(voc_root / "JPEGImages" / f"{name}.jpg").size for name in names]
    assert f"{min(w for w, _ in sizes)} to {max(w for w, _ in sizes)} pixels wide, {min(h for _, h in sizes)} to {max(h for _, h in sizes)} high" in lines["labeled"]
    values = np.concatenate([np.asarray(Image.open(voc_root / "SegmentationClass" / f"{name}.png")).ravel() for name in names])
    assert float(lines["bottle"].split()[1]) == pytest.approx(100 * (values == 5).sum() / (values != 255).sum(), abs=0.006)
    assert float(lines["(ignored)"].split()[1]) == pytest.approx(100 * (values == 255).mean(), abs=0.006)
    assert lines["tvmonitor"].split()[1] == "none"  # class 20 is in none of the three
    assert "321x321" in text.splitlines()[-1]


def test_every_problem_is_listed_and_counted(voc, voc_root, capsys):
    names = (voc_root / "ImageSets" / "Segmentation" / "train.txt").read_text().split()
    (voc_root / "JPEGImages" / f"{names[0]}.jpg").write_bytes(b"no picture")
    mask = voc_root / "SegmentationClass" / f"{names[1]}.png"
    Image.fromarray(np.full(np.asarray(Image.open(mask)).shape, 77, np.uint8)).save(mask)
    Image.new("L", (7, 7)).save(voc_root / "SegmentationClass" / f"{names[2]}.png")
    (voc_root / "JPEGImages" / f"{names[5]}.jpg").write_bytes(b"")  # an unlabeled one
    with pytest.raises(UserError, match="^4 files cannot be used: "):
        check.report(voc)
    printed = capsys.readouterr().out
    assert printed.count("error: ") == 4 and all(names[index] in printed for index in (0, 1, 2, 5)) and "77" in printed and "7x7" in printed


def test_volumes(tmp_path, capsys):
    rng = np.random.default_rng(0)
    labels = {}
    (tmp_path / "lists").mkdir()
    for name, patients in (("train", "abc"), ("val", "d"), ("test", "ef")):
        for patient in patients:
            label = None if patient == "c" else rng.integers(0, 4, (3, 8, 10), dtype=np.uint8)
            labels[patient] = label
            medical.write_volume(tmp_path / "volumes" / f"{patient}_1.npz", medical.Volume(rng.random((3, 8, 10), np.float32), label, None))
        (tmp_path / "lists" / f"{name}.txt").write_text("".join(f"{patient} {patient}_1\n" for patient in patients))
    options = TrainingOptions(dataset="acdc", data_root=str(tmp_path), labeled="2")
    lines = {line.split()[0]: line for line in check.report(options).splitlines() if line}
    assert "2 patients, 2 volumes, 6 slices (3 to 3 a volume), 10x8" in lines["labeled"] and "1 patients" in lines["unlabeled"]
    share = 100 * np.mean([labels["a"] == 2, labels["b"] == 2])
    assert float(lines["myocardium"].split()[1]) == pytest.approx(share, abs=0.006) and "256x256" in list(lines.values())[-1]
    with pytest.raises(UserError, match="1 files"):
        check.report(replace(options, labeled="3"))  # c has no label
    assert "c_1.npz" in capsys.readouterr().out


def test_the_command(monkeypatch, capfd, tmp_path):
    succeed("-m", "common.synthetic", "--variant", "shapes", "--root", tmp_path / "shapes")
    text = succeed("-m", "common.data", "check", "--dataset", "shapes", "--data-root", tmp_path / "shapes")
    assert "24 images" in text and "576 images" in text and "blocks" in text and "all files can be read" in text
    status, _, err = run_as_program("common/data.py", monkeypatch, capfd, "check", "--dataset", "pascal", "--data-root", tmp_path)
    assert status == 1 and "JPEGImages" in err and "Traceback" not in err
