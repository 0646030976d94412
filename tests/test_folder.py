"""--dataset folder: own pictures of all kinds, which lists come of them, every mistake, and each program on it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import check
from common.data import load_data
from common.evaluate import load_model
from common.folder import class_names
from common.loading import open_mask
from common.options import TrainingOptions
from common.runtime import Context, UserError
from programs import run_as_program, succeed

ALONE = Context(0, 1, torch.device("cpu"))
NAMES = "background,road,a tree"


def error_of(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_pictures(root: Path, labeled: int = 10, unlabeled: int = 3, alone: int = 2) -> TrainingOptions:
    """`labeled` pictures with masks, `alone` in images/ without, of odd sizes, modes and formats, one with a blank in its name."""
    rng = np.random.default_rng(0)
    for folder in ("images", "masks", "unlabeled"):
        (root / folder).mkdir(parents=True)
    kinds = [("RGB", "jpg"), ("L", "png"), ("RGBA", "png"), ("P", "png"), ("CMYK", "jpg"), ("I;16", "png"), ("RGB", "bmp"), ("RGB", "tif")]
    for number in range(labeled + alone + unlabeled):
        mode, suffix = kinds[number % len(kinds)]
        height, width = 33 + 3 * (number % 4), 41 - 2 * (number % 3)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
        name = "my holiday" if number == 0 else f"p{number:02d}"
        picture.save(root / ("unlabeled" if number >= labeled + alone else "images") / f"{name}.{suffix}")
        if number < labeled:
            mask = np.zeros((height, width), np.uint8)
            mask[5:20, 3:30] = 1 if number % 2 else 2
            mask[:2] = 255
            Image.fromarray(mask).save(root / "masks" / f"{name}.png")
    (root / "names.txt").write_text("background\nroad\na tree\n")
    return TrainingOptions(dataset="folder", data_root=str(root), classes=str(root / "names.txt"))


def test_lists(tmp_path):
    options = write_pictures(tmp_path)
    data = load_data(options, ALONE)
    assert data.info.classes == ("background", "road", "a tree") and options.classes == NAMES  # what a checkpoint keeps
    assert len(data.labeled) == 8 and len(data.val) == 2 and all(sample.mask for sample in data.labeled + data.val)
    assert sorted(sample.name for sample in data.labeled + data.val) == sorted(["my holiday", *(f"p{number:02d}" for number in range(1, 10))])
    assert sorted(sample.name for sample in data.unlabeled) == [f"p{number}" for number in range(10, 15)] and not any(sample.mask for sample in data.unlabeled)
    assert load_data(replace(options, classes=NAMES), ALONE).val == data.val  # the same ones each time, without the file too


def test_some_of_the_masks(tmp_path):
    options = write_pictures(tmp_path)
    everything = load_data(options, ALONE)
    for labeled, count in (("2", 2), ("1/4", 2), ("6", 6)):
        data = load_data(replace(options, labeled=labeled), ALONE)
        assert len(data.labeled) == count and len(data.unlabeled) == 5 + 8 - count and data.val == everything.val
        assert {sample.image for sample in data.labeled}.isdisjoint(sample.image for sample in data.unlabeled)
        seen = set().union(*(np.unique(open_mask(tmp_path / sample.mask, 3)).tolist() for sample in data.labeled))
        assert seen >= {0, 1, 2}
    assert len({tuple(load_data(replace(options, labeled="4", split_seed=seed), ALONE).labeled) for seed in range(6)}) > 1
    assert "1 to 8" in error_of(load_data, replace(options, labeled="9"), ALONE)


def test_a_folder_for_validation(tmp_path):
    options = write_pictures(tmp_path)
    for folder in ("val_images", "val_masks"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "val_images" / "v.jpg")
    assert "v has no mask" in error_of(load_data, options, ALONE)
    Image.new("L", (9, 9)).save(tmp_path / "val_masks" / "v.png")
    data = load_data(options, ALONE)
    assert [sample.name for sample in data.val] == ["v"] and len(data.labeled) == 10


@pytest.mark.parametrize(("classes", "words"), [
    (None, "--classes"), ("nothing.txt", "nothing.txt"), ("road", "no file road"), ("a,a", "different"), ("a,,b", "different"),
    (",".join(map(str, range(256))), "255")])
def test_class_names_that_cannot_be(classes, words):
    assert words in error_of(class_names, classes)


def test_a_file_of_one_class_and_one_that_is_no_text(tmp_path):
    (tmp_path / "one.txt").write_text("road\n\n")
    assert "found 1" in error_of(class_names, str(tmp_path / "one.txt"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00a")
    assert "binary" in error_of(class_names, str(tmp_path / "binary"))


def test_mistakes_are_named(tmp_path):
    options = write_pictures(tmp_path / "a", labeled=4, alone=0, unlabeled=0)
    root = tmp_path / "a"
    assert "--classes is for" in error_of(load_data, replace(options, dataset="shapes"), ALONE)
    assert "images/" in error_of(load_data, replace(options, data_root=str(tmp_path)), ALONE)
    Image.new("L", (3, 3)).save(root / "masks" / "stray.png")
    assert "stray has no picture" in error_of(load_data, options, ALONE)
    (root / "masks" / "stray.png").unlink()
    Image.new("RGB", (3, 3)).save(root / "images" / "p01.bmp")
    message = error_of(load_data, options, ALONE)
    assert "p01.bmp" in message and "p01.png" in message
    (root / "images" / "p01.bmp").unlink()
    Image.new("L", (3, 3)).save(root / "masks" / "p01.png")
    with pytest.raises(UserError, match="1 files"):
        check.report(replace(options))
    for name in ("p01", "p02", "p03"):
        (root / "masks" / f"{name}.png").unlink()
    assert "one to validate" in error_of(load_data, options, ALONE)


@pytest.mark.parametrize("script", ["daw.py", "pos_meo.py", "diffmatch.py", "usrn.py"])
def test_every_method_trains_evaluates_and_predicts(script, tmp_path, monkeypatch, capfd):
    write_pictures(tmp_path / "data", labeled=6)
    arguments = [script, "--dataset", "folder", "--data-root", tmp_path / "data", "--classes", tmp_path / "data" / "names.txt", "--backbone", "tiny",
                 "--crop", "32", "--batch-size", "2", "--iterations", "2", "--num-workers", "0", "--output", tmp_path / "run"]
    if script == "daw.py":
        succeed(*arguments)
        (tmp_path / "data" / "names.txt").unlink()  # the checkpoint knows the names
        for module, *more in (("common.evaluate", "--output", tmp_path / "scores.json"), ("common.predict", "--output", tmp_path / "out", tmp_path / "data" / "unlabeled")):
            succeed("-m", module, "--checkpoint", tmp_path / "run" / "best.pt", *more)
        assert list(json.loads((tmp_path / "scores.json").read_text())["iou"]) == NAMES.split(",")
        assert len(list((tmp_path / "out").glob("*_overlay.png"))) == 3
    else:
        status, _, err = run_as_program(script, monkeypatch, capfd, *arguments[1:])
        assert status == 0, err
    assert load_model(tmp_path / "run" / "best.pt", "cpu")[2].classes == tuple(NAMES.split(","))
