"""Lucchi from multi-page TIFF files as EPFL gives them (8-bit grey, ground truth 0 and 255)."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from common import lucchi
from common.data import DATASETS, load_data
from common.loading import EvaluationSet, open_mask
from common.options import TrainingOptions
from common.runtime import Context, UserError
from programs import run_as_program

ALONE = Context(0, 1, torch.device("cpu"))
SLICES = {"training": 21, "testing": 4}


def write_stacks(root, height=24, width=40):
    """{stack: (images, labels)} as written; a slice's label moves with its number."""
    rng, stacks = np.random.default_rng(0), {}
    root.mkdir(exist_ok=True)
    for stack, count in SLICES.items():
        images = rng.integers(0, 256, (count, height, width), dtype=np.uint8)
        labels = np.zeros((count, height, width), np.uint8)
        for number in range(count):
            labels[number, 3:9, number : number + 9] = 255
        for name, pages, compression in ((stack, images, None), (f"{stack}_groundtruth", labels, "tiff_lzw")):
            first, *others = (Image.fromarray(page) for page in pages)
            first.save(root / f"{name}.tif", save_all=True, append_images=others, compression=compression)
        stacks[stack] = images, labels
    return stacks


def test_every_slice_and_list(tmp_path, capsys):
    stacks = write_stacks(tmp_path)
    data = load_data(TrainingOptions(dataset="lucchi", data_root=str(tmp_path), labeled="5"), ALONE)
    assert [sample.name for sample in data.labeled] == ["train_002", "train_006", "train_010", "train_014", "train_018"]  # 21 / 5 apart
    assert len(data.unlabeled) == 16 and [sample.name for sample in data.val] == [f"val_{number:03d}" for number in range(4)]
    for samples, (images, labels) in ((load_data(TrainingOptions(dataset="lucchi", data_root=str(tmp_path), labeled="all"), ALONE).labeled, stacks["training"]),
                                      (data.val, stacks["testing"])):
        for item, image, label in zip(EvaluationSet(samples, tmp_path, 2), images, labels, strict=True):
            assert np.array_equal(item["image"][1], image) and np.array_equal(item["label"], label // 255)
    written = (tmp_path / "JPEGImages" / "train_000.png").stat().st_mtime_ns
    capsys.readouterr()
    assert len(load_data(TrainingOptions(dataset="lucchi", data_root=str(tmp_path)), ALONE).labeled) == 10
    assert (tmp_path / "JPEGImages" / "train_000.png").stat().st_mtime_ns == written and "written" not in capsys.readouterr().out
    assert DATASETS["lucchi"].num_classes == 2


def test_an_interrupted_conversion_is_done_again(tmp_path):
    stacks = write_stacks(tmp_path)
    lucchi.prepare(tmp_path)
    (tmp_path / "ImageSets" / "Segmentation" / "train.txt").unlink()  # the last file that is written
    Image.new("L", (1, 1)).save(tmp_path / "SegmentationClass" / "val_001.png")
    lucchi.prepare(tmp_path)
    assert np.array_equal(open_mask(tmp_path / "SegmentationClass" / "val_001.png", 2), stacks["testing"][1][1] // 255)


@pytest.mark.parametrize(("harm", "words"), [
    (lambda root: (root / "testing.tif").unlink(), "no testing.tif"),
    (lambda root: (root / "training.tif").write_bytes(b"II*\0 nothing"), "training.tif"),
    (lambda root: (root / "training.tif").write_bytes((root / "training.tif").read_bytes()[:9000]), "training.tif"),
    (lambda root: Image.new("L", (40, 24)).save(root / "training_groundtruth.tif"), "ground truth [1, 24, 40]"),
    (lambda root: shutil.copy(root / "training.tif", root / "training_groundtruth.tif"), "256 values"),
])
def test_stacks_that_cannot_be_used_are_named(tmp_path, harm, words):
    write_stacks(tmp_path)
    harm(tmp_path)
    with pytest.raises(UserError) as caught:
        lucchi.prepare(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "ImageSets" / "Segmentation" / "train.txt").exists()


@pytest.mark.parametrize("script", ["daw.py", "pos_meo.py", "diffmatch.py", "usrn.py"])
def test_every_method_trains_on_it(script, tmp_path, monkeypatch, capfd):
    write_stacks(tmp_path / "lucchi")
    status, _, err = run_as_program(script, monkeypatch, capfd, "--dataset", "lucchi", "--data-root", tmp_path / "lucchi", "--labeled", "5", "--backbone", "tiny", "--crop", "32",
                                    "--batch-size", "2", "--iterations", "2", "--num-workers", "0", "--output", tmp_path / "run")
    assert status == 0, err
    assert (tmp_path / "run" / "samples.png").is_file()
