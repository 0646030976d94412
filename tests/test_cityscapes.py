"""Cityscapes in its owners' layout, tiny: folders or archives, labelIds or labelTrainIds, both kinds of published lists, the server's format."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import check, cityscapes
from common.data import DATASETS, load_data, read_list
from common.loading import EvaluationSet, open_mask
from common.ohem import LEAST, hard_pixel_loss
from common.options import TrainingOptions
from common.runtime import Context, UserError
from programs import run_as_program

ALONE = Context(0, 1, torch.device("cpu"))
TRAIN = ("aachen_000000_000019", "aachen_000001_000019", "bochum_000000_000313", "ulm_000094_000019")
VAL = ("frankfurt_000000_000294", "lindau_000000_000019")
# The table of Cityscapes' scripts, written out: labelId of each evaluated class by name
LABEL_IDS = {"road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19, "traffic sign": 20, "vegetation": 21,
             "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33}


def error_of(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """Four training and two validation pictures of 64x32 with labelIds (all 34 occur), as the archives unpack."""
    monkeypatch.setattr(cityscapes, "IMAGES", {"train": len(TRAIN), "val": len(VAL)})
    monkeypatch.setitem(DATASETS, "cityscapes", replace(DATASETS["cityscapes"], crop=33))
    rng = np.random.default_rng(0)
    for split, names in (("train", TRAIN), ("val", VAL)):
        for name in names:
            city = name.split("_")[0]
            picture, mask = (tmp_path / kind / split / city for kind in ("leftImg8bit", "gtFine"))
            picture.mkdir(parents=True, exist_ok=True), mask.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 64, 3), dtype=np.uint8)).save(picture / f"{name}_leftImg8bit.png")
            labels = (np.arange(32 * 64).reshape(32, 64) // 61 % 34).astype(np.uint8)
            Image.fromarray(labels).save(mask / f"{name}_gtFine_labelIds.png")
            Image.fromarray(labels).convert("RGB").save(mask / f"{name}_gtFine_color.png")
            (mask / f"{name}_gtFine_polygons.json").write_text("{}")
    return tmp_path


def options(root: Path, **more) -> TrainingOptions:
    (root / "labeled.txt").write_text("".join(f"leftImg8bit/train/{name.split('_')[0]}/{name}_leftImg8bit.png gtFine/train/{name.split('_')[0]}/"
                                              f"{name}_gtFine_labelTrainIds.png\n" for name in TRAIN[1:3]))  # as UniMatch's lists
    return TrainingOptions(dataset="cityscapes", data_root=str(root), labeled_list=str(root / "labeled.txt"), **more)


def zip_up(root: Path, folder: str) -> None:
    with zipfile.ZipFile(root / f"{folder}_trainvaltest.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((root / folder).rglob("*")):
            archive.write(path, path.relative_to(root))  # folders too, as in the real ones
    for path in sorted((root / folder).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (root / folder).rmdir()


def test_classes_and_labels():
    assert dict(zip(cityscapes.CLASSES, cityscapes.LABEL_IDS)) == LABEL_IDS and DATASETS["cityscapes"].num_classes == 19
    for train_id, label_id in enumerate(LABEL_IDS.values()):
        assert cityscapes.TO_CLASS[label_id] == train_id and cityscapes.TO_LABEL_ID[train_id] == label_id
    assert sum(cityscapes.TO_CLASS != 255) == 19 and len(set(cityscapes.COLORS)) == 19


@pytest.mark.parametrize("zipped", [(), ("gtFine",), ("leftImg8bit", "gtFine")])
def test_folders_or_archives(root, zipped):
    for folder in zipped:
        zip_up(root, folder)
    data = load_data(options(root), ALONE)
    assert [sample.name for sample in data.labeled] == [f"{name}_leftImg8bit" for name in TRAIN[1:3]]
    assert sorted(sample.name for sample in data.unlabeled) == [f"{TRAIN[0]}_leftImg8bit", f"{TRAIN[3]}_leftImg8bit"]
    assert [sample.name for sample in data.val] == [f"{name}_leftImg8bit" for name in VAL] and all(sample.mask is None for sample in data.unlabeled)
    for item in EvaluationSet(data.labeled + data.val, data.root, 19):
        expected = np.arange(32 * 64).reshape(32, 64) // 61 % 34
        ids = np.full(34, 255)
        ids[list(LABEL_IDS.values())] = range(19)
        assert item["image"].shape == (3, 32, 64) and np.array_equal(item["label"].numpy(), ids[expected])
    text = check.report(options(root))
    assert " 2 images, 2 with masks" in text and "bicycle" in text and "all files can be read" in text


def test_train_ids_are_preferred(root):
    mask = root / "gtFine" / "train" / "aachen" / f"{TRAIN[1]}_gtFine_labelTrainIds.png"
    Image.fromarray(np.full((32, 64), 18, np.uint8)).save(mask)
    data = load_data(options(root), ALONE)
    assert [Path(sample.mask).name.split("_")[-1] for sample in data.labeled] == ["labelTrainIds.png", "labelIds.png"]
    assert set(np.unique(open_mask(root / data.labeled[0].mask, 19))) == {18}


def test_usrns_lists_leave_out_the_cities(root):
    path = root / "usrn.txt"
    path.write_text("".join(f"images/train/{name}_leftImg8bit.png segmentation/train/{name}_gtFine_labelTrainIds.png\n" for name in TRAIN[:2]))
    for sample, name in zip(cityscapes.located(read_list(path), root), TRAIN):
        assert (root / sample.image).is_file() and (root / sample.mask).is_file() and name in sample.image and name in sample.mask


def test_all_labeled_and_random_splits(root):
    data = load_data(TrainingOptions(dataset="cityscapes", data_root=str(root), labeled="all"), ALONE)
    assert len(data.labeled) == 4 and data.unlabeled == []
    data = load_data(TrainingOptions(dataset="cityscapes", data_root=str(root), labeled="1/2", split_seed=3), ALONE)
    assert len(data.labeled) == len(data.unlabeled) == 2


def test_mistakes_are_named(root):
    message = error_of(load_data, TrainingOptions(dataset="cityscapes", data_root=str(root), labeled="186"), ALONE)
    assert "1_16/labeled.txt" in message and "--download" in message
    assert "1/16" in error_of(load_data, TrainingOptions(dataset="cityscapes", data_root=str(root), labeled="187"), ALONE)
    (root / "gtFine" / "train" / "aachen" / f"{TRAIN[1]}_gtFine_labelIds.png").unlink()
    assert f"{TRAIN[1]}_gtFine_labelIds.png is listed but missing" in error_of(load_data, options(root), ALONE)
    (root / "leftImg8bit" / "val" / "lindau" / f"{VAL[1]}_leftImg8bit.png").unlink()
    assert "1 pictures in leftImg8bit/val" in error_of(load_data, options(root), ALONE)
    (root / "gtFine_trainvaltest.zip").write_bytes(b"PK no archive")
    (root / "gtFine").rename(root / "elsewhere")
    (root / "leftImg8bit").rename(root / "pictures")
    (root / "leftImg8bit_trainvaltest.zip").write_bytes(b"PK no archive")
    assert "leftImg8bit_trainvaltest.zip cannot be read" in error_of(load_data, options(root), ALONE)


@pytest.mark.parametrize("script", ["daw.py", "pos_meo.py", "diffmatch.py", "usrn.py"])
def test_every_method_trains_from_the_archives(script, root, monkeypatch, capfd):
    for folder in ("leftImg8bit", "gtFine"):
        zip_up(root, folder)
    options(root)
    status, _, err = run_as_program(script, monkeypatch, capfd, "--dataset", "cityscapes", "--data-root", root, "--labeled-list", root / "labeled.txt", "--backbone",
                                    "tiny", "--batch-size", "2", "--iterations", "2", "--num-workers", "1" if script == "daw.py" else "0", "--output", root / "run")
    assert status == 0, err
    config = json.loads((root / "run" / "config.json").read_text())
    assert config["ohem"] == 0.7 and config["crop"] == 33 and config["threshold"] in (0.0, 0.75)
    if script == "daw.py":
        results = json.loads((root / "run" / "results.json").read_text())["last"]
        assert set(results["iou"]) == set(LABEL_IDS) and results["images"] == 2
        Image.new("RGB", (70, 40)).save(root / "berlin_000000_000019_leftImg8bit.png")
        status, _, err = run_as_program("common/predict.py", monkeypatch, capfd, "--checkpoint", root / "run" / "best.pt", "--output", root / "out",
                                        root / "berlin_000000_000019_leftImg8bit.png")
        assert status == 0, err
        with Image.open(root / "out" / "berlin_000000_000019_leftImg8bit.png") as picture:
            assert picture.mode == "L" and picture.size == (70, 40) and set(np.unique(np.asarray(picture))) <= set(LABEL_IDS.values())


# ---------------------------------------------------------------- OHEM


def test_hard_pixels_by_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    for trial in range(30):
        label = torch.randint(0, 5, (2, 6, 7), generator=generator)
        label[torch.rand(label.shape, generator=generator) < 0.2] = 255
        logits = (torch.randn(2, 5, 6, 7, generator=generator) * (1 + trial % 4)).requires_grad_()
        loss = torch.nn.functional.cross_entropy(logits, label, ignore_index=255, reduction="none")
        least, threshold = (LEAST, 0.7) if trial % 2 else (0.6, 0.1)
        probabilities = logits.detach().double().softmax(dim=1)
        pixels = sorted((float(probabilities[b, label[b, i, j], i, j]), float(-probabilities[b, label[b, i, j], i, j].log()))
                        for b in range(2) for i in range(6) for j in range(7) if label[b, i, j] != 255)
        limit = max(threshold, pixels[max(1, int(len(pixels) * least)) - 1][0])
        hard = [value for probability, value in pixels if probability <= limit + 1e-9]
        mean = hard_pixel_loss(loss, label, threshold, least) / len(pixels)
        assert mean.item() == pytest.approx(sum(hard) / len(hard), rel=1e-5)
        (gradient,) = torch.autograd.grad(mean, logits)
        easy = torch.zeros_like(label, dtype=torch.bool)
        for b, i, j in (label != 255).nonzero().tolist():
            easy[b, i, j] = float(probabilities[b, label[b, i, j], i, j]) > limit + 1e-6
        assert not gradient.abs().sum(dim=1)[easy | (label == 255)].any() and gradient.abs().sum() > 0


def test_without_labels_nothing_is_learned():
    label = torch.full((1, 4, 4), 255)
    assert float(hard_pixel_loss(torch.zeros(1, 4, 4), label, 0.7)) == 0
