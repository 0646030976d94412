"""Random splits, lists with rooted paths, and PASCAL's masks where users have them: SegmentationClassAug, SBD's .mat files."""

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import daw
from common import medical
from common.data import DATASETS, load_data, read_list
from common.loading import open_mask
from common.options import TrainingOptions, fill_from_recipe
from common.pascal import SBD_FOLDERS, find_masks
from common.runtime import Context, UserError
from common.splits import PublishedList, covering_choice, images_asked_for
from programs import refuse

ALONE = Context(0, 1, torch.device("cpu"))


def error_of(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def voc(voc_root, monkeypatch) -> TrainingOptions:
    """Options of a data set with pascal's classes: 9 training images in `voc_root`, no published lists."""
    monkeypatch.setitem(DATASETS, "tinyvoc", replace(DATASETS["pascal"], name="tinyvoc", full_list="train", labeled_lists=(), default_labeled="8"))
    return TrainingOptions(dataset="tinyvoc", data_root=str(voc_root), crop=49, batch_size=4, num_workers=0)


def names_in(path: Path) -> list[str]:
    return path.read_text().split()


# ---------------------------------------------------------------- random splits


@pytest.mark.parametrize(("labeled", "total", "count"), [("92", 10582, 92), ("1/16", 10582, 661), ("1/4", 9, 2), ("9", 9, 9), ("2/3", 9, 6)])
def test_how_many_images_are_asked_for(labeled, total, count):
    assert images_asked_for(labeled, total) == count


@pytest.mark.parametrize("labeled", ["0", "10", "1/0", "1/10", "x", "-3", "1/", "usrn_331", "u2pl_1/16", "3.5", ""])
def test_nonsense_is_refused(labeled):
    assert "--split-seed" in error_of(images_asked_for, labeled, 9)


def test_every_class_that_occurs_is_in_a_choice_and_the_rest_is_random():
    rng = np.random.default_rng(0)
    for trial in range(100):
        present = rng.random((40, 7)) < np.array([0.9, 0.5, 0.2, 0.1, 0.05, 0.025, 0])
        seen = present.any(axis=0)
        chosen = covering_choice(present, 10, np.random.default_rng(trial))
        assert len(set(chosen)) == 10 and chosen == sorted(chosen) and chosen == covering_choice(present, 10, np.random.default_rng(trial))
        assert np.array_equal(present[chosen].any(axis=0), seen)
    # with one class that all have, each image is as likely as any other
    counts = np.zeros(20)
    for trial in range(2000):
        counts[covering_choice(np.ones((20, 1), bool), 5, np.random.default_rng(trial))] += 1
    assert abs(counts / 2000 - 0.25).max() < 0.06  # six standard deviations


def test_a_choice_that_is_too_small_for_the_classes_is_refused():
    assert "needs 4" in error_of(covering_choice, np.eye(4, dtype=bool), 3, np.random.default_rng(0))


def test_a_random_split_of_the_training_list(voc, voc_root, capsys):
    data = load_data(replace(voc, split_seed=1), ALONE)
    assert "not a published one" in capsys.readouterr().out
    chosen = [sample.name for sample in data.labeled]
    everything = names_in(voc_root / "ImageSets" / "Segmentation" / "train.txt")
    assert len(chosen) == 8 and sorted(chosen + [sample.name for sample in data.unlabeled]) == everything
    masks = {name: set(np.unique(open_mask(voc_root / "SegmentationClass" / f"{name}.png", 21)).tolist()) - {255} for name in everything}
    assert set().union(*(masks[name] for name in chosen)) == set().union(*masks.values())
    again = load_data(replace(voc, split_seed=1), ALONE)
    assert again.labeled == data.labeled and "reading" not in capsys.readouterr().out  # kept
    others = {tuple(sample.name for sample in load_data(replace(voc, split_seed=seed), ALONE).labeled) for seed in range(2, 8)}
    assert len(others) > 1
    assert len(load_data(replace(voc, split_seed=1, labeled="8/9"), ALONE).labeled) == 8
    config = replace(voc, split_seed=1)
    fill_from_recipe(config, "daw", data, ALONE)
    assert config.output == "runs/daw_tinyvoc_8_random1_seed0"
    (voc_root / "splits" / "random" / "8_seed1.txt").write_text("2007_000001\n")
    assert "delete it" in error_of(load_data, replace(voc, split_seed=1), ALONE)


def test_a_split_seed_draws_patients(tmp_path):
    rng = np.random.default_rng(0)
    lists = {"train": [f"p{n}" for n in range(8)], "val": ["v0"]}
    for name, patients in lists.items():
        for patient in patients:
            volume = medical.Volume(rng.random((2, 8, 8), np.float32), np.zeros((2, 8, 8), np.uint8), None)
            medical.write_volume(tmp_path / "volumes" / f"{patient}_a.npz", volume)
        (tmp_path / "lists").mkdir(exist_ok=True)
        (tmp_path / "lists" / f"{name}.txt").write_text("".join(f"{patient} {patient}_a\n" for patient in patients))
    options = TrainingOptions(dataset="acdc", data_root=str(tmp_path), labeled="3")
    drawn = [tuple(file.patient for file in medical.load_volumes(replace(options, split_seed=seed), ALONE).labeled) for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 2 and all(len(patients) == 3 for patients in drawn)
    assert tuple(file.patient for file in medical.load_volumes(options, ALONE).labeled) == ("p0", "p1", "p2")


# ---------------------------------------------------------------- masks of the augmented set


def test_a_rooted_list(tmp_path):
    path = tmp_path / "usrn.txt"
    path.write_text("/JPEGImages/2008_008423.jpg /SegmentationClassAug/2008_008423.png\n")
    (sample,) = read_list(path, rooted=True)
    assert (sample.image, sample.mask) == ("JPEGImages/2008_008423.jpg", "SegmentationClassAug/2008_008423.png")
    assert "inside" in error_of(read_list, path)
    path.write_text("//etc/passwd.jpg\n")
    assert "inside" in error_of(read_list, path, True)


def test_usrns_list_finds_masks_under_either_name(voc_root, monkeypatch):
    names = names_in(voc_root / "ImageSets" / "Segmentation" / "train.txt")
    content = "".join(f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png\n" for name in names[:3])
    source = PublishedList("Dayan-Guan/USRN", "e" * 40, "3.txt", 3, hashlib.sha256(content.encode()).hexdigest(), rooted=True)
    file = voc_root / "splits" / "Dayan-Guan_USRN" / ("e" * 10) / "3.txt"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    monkeypatch.setitem(DATASETS, "pascal", replace(DATASETS["pascal"], full_list="train", labeled_lists=(("usrn_3", source),)))
    options = TrainingOptions(dataset="pascal", data_root=str(voc_root), labeled="usrn_3")
    assert [sample.mask for sample in load_data(options, ALONE).labeled] == [f"SegmentationClass/{name}.png" for name in names[:3]]
    (voc_root / "SegmentationClass").rename(voc_root / "SegmentationClassAug")
    data = load_data(options, ALONE)
    assert [sample.mask for sample in data.labeled + data.val] == [
        f"SegmentationClassAug/{name}.png" for name in names[:3] + names_in(voc_root / "ImageSets" / "Segmentation" / "val.txt")]


def write_sbd(folder: Path, masks: dict[str, np.ndarray]) -> None:
    """As SBD does: a struct GTcls with Boundaries, Segmentation and CategoriesPresent, compressed."""
    savemat = pytest.importorskip("scipy.io").savemat
    folder.mkdir(parents=True)
    for name, mask in masks.items():
        present = np.unique(mask[mask > 0]).astype(np.uint8)[:, None]
        savemat(folder / f"{name}.mat", {"GTcls": {"Boundaries": np.zeros((20, 1)), "Segmentation": mask, "CategoriesPresent": present}},
                do_compression=True)


@pytest.mark.parametrize("place", SBD_FOLDERS)
def test_masks_are_made_from_sbd(voc, voc_root, place, capsys):
    lost = names_in(voc_root / "ImageSets" / "Segmentation" / "train.txt")[2:5]
    masks = {}
    for name in lost:
        mask = open_mask(voc_root / "SegmentationClass" / f"{name}.png", 21).copy()
        mask[mask == 255] = 0  # SBD has no ignored border
        masks[name] = mask
        (voc_root / "SegmentationClass" / f"{name}.png").unlink()
    message = error_of(load_data, replace(voc, labeled="all"), ALONE)
    assert lost[0] in message and "SBD" in message and "--download" in message
    write_sbd(voc_root / place, masks)
    data = load_data(replace(voc, labeled="all"), ALONE)
    assert "3 of 3" in capsys.readouterr().out
    assert [sample.mask.split("/")[0] for sample in data.labeled].count("SegmentationClassAug") == 3
    for name, mask in masks.items():
        path = voc_root / "SegmentationClassAug" / f"{name}.png"
        assert np.array_equal(open_mask(path, 21), mask) and Image.open(path).mode == "L"
    load_data(replace(voc, labeled="all"), ALONE)
    assert "SBD" not in capsys.readouterr().out  # once


def test_sbd_beside_the_unpacked_archive(voc, voc_root):
    """--data-root holds VOCdevkit/VOC2012 and SBD."""
    name = names_in(voc_root / "ImageSets" / "Segmentation" / "train.txt")[0]
    (voc_root / "SegmentationClass" / f"{name}.png").unlink()
    write_sbd(voc_root.parent / "SBD" / "cls", {name: np.ones((43, 59), np.uint8)})
    samples = find_masks(read_list(voc_root / "ImageSets" / "Segmentation" / "train.txt"), voc_root, voc_root.parent, False)
    assert samples[0].mask == f"SegmentationClassAug/{name}.png" and samples[1].mask.startswith("SegmentationClass/")


@pytest.mark.parametrize("content", [b"no matlab file", b""])
def test_a_damaged_file_of_sbd_is_named(voc, voc_root, content):
    pytest.importorskip("scipy.io")
    name = names_in(voc_root / "ImageSets" / "Segmentation" / "train.txt")[0]
    (voc_root / "SegmentationClass" / f"{name}.png").unlink()
    (voc_root / "SBD" / "cls").mkdir(parents=True)
    (voc_root / "SBD" / "cls" / f"{name}.mat").write_bytes(content)
    assert f"{name}.mat" in error_of(load_data, replace(voc, labeled="all"), ALONE)
    assert not list((voc_root / "SegmentationClassAug").glob("*")) if (voc_root / "SegmentationClassAug").exists() else True


def test_sbd_without_scipy(voc, voc_root, monkeypatch):
    name = names_in(voc_root / "ImageSets" / "Segmentation" / "train.txt")[0]
    (voc_root / "SegmentationClass" / f"{name}.png").unlink()
    (voc_root / "SBD" / "cls").mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert "pip install scipy" in error_of(load_data, replace(voc, labeled="all"), ALONE)


def test_a_fraction_in_the_output_folders_name(voc, voc_root):
    config = daw.Config(dataset="pascal", labeled="1/16")
    fill_from_recipe(config, "daw", load_data(replace(voc, labeled="all"), ALONE), ALONE)
    assert config.output == "runs/daw_tinyvoc_1_16_seed0"


def test_the_program_says_what_a_split_seed_takes(voc_root, tmp_path, monkeypatch, capfd):
    (tmp_path / "full.txt").write_text((voc_root / "ImageSets" / "Segmentation" / "train.txt").read_text())
    message = refuse("daw.py", monkeypatch, capfd, "--dataset", "pascal", "--data-root", voc_root, "--unlabeled-list", tmp_path / "full.txt", "--split-seed", "0", "--labeled", "30")
    assert "1 to 9" in message
