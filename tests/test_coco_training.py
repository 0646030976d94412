"""--dataset coco: lists from the pictures that are there, masks of ours or UniMatch's, made where there are none; every method on them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import coco
from common.data import DATASETS, load_data
from common.loading import EvaluationSet
from common.options import TrainingOptions
from common.runtime import Context, UserError
from programs import run_as_program

ALONE = Context(0, 1, torch.device("cpu"))
NUMBERS = {"train2017": (9, 25, 30, 34, 36), "val2017": (139, 285)}


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """Pictures of 60x44 and the instances JSON of each split: one square each, of the categories 1 (person) and 90 (toothbrush) in turn."""
    monkeypatch.setattr(coco, "IMAGES", {split.removesuffix("2017"): len(numbers) for split, numbers in NUMBERS.items()})
    monkeypatch.setitem(DATASETS, "coco", replace(DATASETS["coco"], crop=33))
    ids = [number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]  # COCO's gaps
    (tmp_path / "annotations").mkdir()
    for split, numbers in NUMBERS.items():
        (tmp_path / split).mkdir()
        images, annotations = [], []
        for place, number in enumerate(numbers):
            Image.fromarray(np.random.default_rng(number).integers(0, 256, (44, 60, 3), dtype=np.uint8)).save(tmp_path / split / f"{number:012}.jpg")
            images.append({"id": number, "file_name": f"{number:012}.jpg", "height": 44, "width": 60})
            annotations.append({"id": 1000 + number, "image_id": number, "category_id": (1, 90)[place % 2], "iscrowd": 0, "area": 400.0, "bbox": [10, 10, 20, 20],
                                "segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]]})
        content = {"images": images, "annotations": annotations, "categories": [{"id": number, "name": name} for number, name in zip(ids, coco.CLASSES[1:])]}
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return tmp_path


def options(root: Path) -> TrainingOptions:
    (root / "labeled.txt").write_text("".join(f"train2017/{number:012}.jpg masks/{number:012}.png\n" for number in NUMBERS["train2017"][:2]))  # as UniMatch's
    return TrainingOptions(dataset="coco", data_root=str(root), labeled_list=str(root / "labeled.txt"))


def test_masks_are_made_once(root, capsys):
    data = load_data(options(root), ALONE)
    assert [sample.mask for sample in data.labeled] == ["masks/train2017/000000000009.png", "masks/train2017/000000000025.png"]
    assert len(data.unlabeled) == 3 and len(data.val) == 2 and all(sample.mask is None for sample in data.unlabeled)
    items = list(EvaluationSet(data.labeled + data.val, data.root, 81))
    assert [sorted(np.unique(item["label"]).tolist()) for item in items] == [[0, 1], [0, 80], [0, 1], [0, 80]]
    assert all(int((item["label"] > 0).sum()) == 400 for item in items)
    assert "masks in" in capsys.readouterr().out
    load_data(options(root), ALONE)
    assert "masks" not in capsys.readouterr().out


def test_unimatchs_masks_are_used_where_they_lie(root):
    (root / "masks").mkdir()
    for number in (*NUMBERS["train2017"], *NUMBERS["val2017"]):
        Image.fromarray(np.full((44, 60), 7, np.uint8)).save(root / "masks" / f"{number:012}.png")
    data = load_data(options(root), ALONE)
    assert [sample.mask for sample in data.labeled] == ["masks/000000000009.png", "masks/000000000025.png"]
    assert set(np.unique(EvaluationSet(data.val, data.root, 81)[0]["label"])) == {7}


def test_mistakes_are_named(root):
    (root / "val2017" / f"{NUMBERS['val2017'][0]:012}.jpg").unlink()
    with pytest.raises(UserError, match="1 pictures in val2017, COCO has 2"):
        load_data(options(root), ALONE)
    Image.new("RGB", (60, 44)).save(root / "val2017" / f"{NUMBERS['val2017'][0]:012}.jpg")
    with pytest.raises(UserError, match="1/512"):  # what there is
        load_data(TrainingOptions(dataset="coco", data_root=str(root), labeled="1/2"), ALONE)


@pytest.mark.parametrize("script", ["daw.py", "pos_meo.py", "diffmatch.py", "usrn.py"])
def test_every_method_trains(script, root, monkeypatch, capfd):
    options(root)
    coco.prepare(root, workers=1)
    status, _, err = run_as_program(script, monkeypatch, capfd, "--dataset", "coco", "--data-root", root, "--labeled-list", root / "labeled.txt", "--backbone", "tiny",
                                    "--batch-size", "2", "--iterations", "2", "--num-workers", "0", "--output", root / "run")
    assert status == 0, err
    results = json.loads((root / "run" / "results.json").read_text())["last"]
    assert list(results["iou"]) == list(coco.CLASSES) and results["images"] == 2
