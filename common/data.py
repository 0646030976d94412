"""Data sets: classes, recipes, lists and splits. Reading and loaders are in common.loading.

A data set is an entry of `DATASETS`: classes, palette and the recipe that the field trains it with. Its pictures lie
as PASCAL VOC has them (JPEGImages/*.jpg, SegmentationClass/*.png with class indices and 255 = ignore,
ImageSets/Segmentation/*.txt); the embedded `shapes` sets are written in that layout and read by the same code. Your own
pictures are `folder` (common.folder); `cityscapes` and `coco` are read as their archives give them (common.cityscapes, common.coco); `lucchi` is written in VOC's layout once, from its TIFF stacks.

Published labeled lists are downloaded by commit and verified by SHA-256. The unlabeled list is the full training list
minus the labeled one, so nothing else is needed and nothing can be in both.
"""

import argparse
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common import cityscapes, coco, lucchi, synthetic
from common.augment import IGNORE
from common.files import names_below, read_text, write_atomically
from common.folder import class_names, folder_lists, present_classes
from common.pascal import download_voc, find_masks, voc_folder
from common.runtime import Context, UserError, main_first, run_main
from common.splits import PublishedList, cityscapes_lists, coco_lists, covering_choice, images_asked_for, pascal_lists, published_list, unimatch_list

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)


@dataclass(frozen=True)
class DatasetInfo:
    name: str
    classes: tuple[str, ...]
    default_labeled: str
    # Recipe of the field (UniMatch's for pascal). The learning rate belongs to `batch_size` labeled + as many unlabeled.
    backbone: str
    crop: int
    scale: tuple[float, float]  # the weak view's random resize
    blur: tuple[float, float]  # range of sigma in the strong view, pixels
    epochs: int
    batch_size: int
    lr: float
    head_lr_multiplier: float
    threshold: float  # confidence from which the baseline trusts a pseudo label
    evaluation: str  # "whole" image or "sliding" window
    eval_batch: int  # 1 where images differ in size
    colors: tuple[tuple[int, int, int], ...] = ()  # of the classes; empty: PASCAL VOC's
    ohem: float = 0.0  # probability up to which labeled pixels count as hard (common.ohem); 0: all are learned from
    # Truth of unlabeled images is read for logging only, where the data set has it at no cost to honesty.
    unlabeled_truth: bool = False
    full_list: PublishedList | str = "train"  # what the unlabeled list is computed from; a str is a list in ImageSets
    val_list: str = "val"
    labeled_lists: tuple[tuple[str, PublishedList], ...] = ()  # empty: ImageSets/Segmentation/labeled_<name>.txt

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        return self.colors or tuple(tuple(int(v) for v in colour) for colour in synthetic.voc_palette(256))


def shapes_info(name: str, crop: int, epochs: int, eval_batch: int) -> DatasetInfo:
    return DatasetInfo(
        name, synthetic.VARIANTS[name].classes, default_labeled="24", backbone="tiny", crop=crop, scale=(0.7, 1.4),
        blur=(0.1, 1.0), epochs=epochs, batch_size=8, lr=0.01, head_lr_multiplier=3, threshold=0.95, evaluation="whole",
        eval_batch=eval_batch, unlabeled_truth=True,
    )


DATASETS = {
    info.name: info
    for info in (
        shapes_info("shapes", crop=48, epochs=28, eval_batch=20),
        shapes_info("shapes_severe", crop=48, epochs=28, eval_batch=20),
        shapes_info("shapes_large", crop=96, epochs=40, eval_batch=20),
        DatasetInfo(
            "pascal", VOC_CLASSES, default_labeled="92", backbone="resnet101", crop=321, scale=(0.5, 2.0), blur=(0.1, 2.0), epochs=80,
            batch_size=8, lr=0.001, head_lr_multiplier=10, threshold=0.95, evaluation="whole", eval_batch=1,
            full_list=unimatch_list("splits/pascal/train_aug.txt", 10582,
                                    "f04ab664c71f84950a3a1fd28544b6851500c81a9aff890c4b9279639a32152c"),
            labeled_lists=tuple(pascal_lists().items()),
        ),
        DatasetInfo(
            "cityscapes", cityscapes.CLASSES, default_labeled="1/16", backbone="resnet101", crop=801, scale=(0.5, 2.0), blur=(0.1, 2.0), epochs=240,
            batch_size=8, lr=0.005, head_lr_multiplier=1, threshold=0.0, evaluation="sliding", eval_batch=1, ohem=0.7, colors=cityscapes.COLORS,
            labeled_lists=tuple(cityscapes_lists().items()),
        ),
        DatasetInfo(
            "coco", coco.CLASSES, default_labeled="1/512", backbone="xception65", crop=513, scale=(0.5, 2.0), blur=(0.1, 2.0), epochs=30, batch_size=8,
            lr=0.004, head_lr_multiplier=10, threshold=0.95, evaluation="whole", eval_batch=1, labeled_lists=tuple(coco_lists().items()),
        ),
        DatasetInfo(
            "lucchi", lucchi.CLASSES, default_labeled="10", backbone="resnet101", crop=512, scale=(0.5, 2.0), blur=(0.1, 2.0), epochs=400, batch_size=8,
            lr=0.001, head_lr_multiplier=10, threshold=0.95, evaluation="whole", eval_batch=1,
        ),
        DatasetInfo(
            "folder", (), default_labeled="all", backbone="resnet50", crop=321, scale=(0.5, 2.0), blur=(0.1, 2.0), epochs=80, batch_size=8, lr=0.001,
            head_lr_multiplier=10, threshold=0.95, evaluation="whole", eval_batch=1,
        ),
    )
}


# ---------------------------------------------------------------- lists and splits


@dataclass(frozen=True)
class Sample:
    """One picture: paths relative to the data set's folder, mask None where there is none to read."""

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
    val: list[Sample]
    tune: list[Sample]  # for choosing options; empty where the data set has no such list


def dataset_info(name: str, classes: str | None = None) -> DatasetInfo:
    """The entry of `DATASETS`; for "folder" with the class names of `--classes`. Raises UserError for an unknown name."""
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: --dataset takes one of {', '.join(DATASETS)}")
    if name != "folder":
        if classes:
            raise UserError(f"--classes is for --dataset folder; {name} has its own")
        return DATASETS[name]
    return replace(DATASETS[name], classes=class_names(classes))


def load_data(config, context: Context) -> Data:
    """The lists of `config.dataset`, checked: each file exists, labeled, unlabeled and validation are disjoint.

    Raises UserError for an unknown data set or split, and for a list that is missing, empty or wrong.
    """
    info = dataset_info(config.dataset, config.classes)
    root = Path(config.data_root or Path("data") / info.name)
    if config.dataset == "folder":
        config.classes = ",".join(info.classes)  # what a checkpoint keeps
        data = Data(info, root, *folder_lists(root, config.labeled or info.default_labeled, config.split_seed, info.num_classes, Sample), tune=[])
        check_lists(data)
        return data
    with main_first(context):
        if config.dataset in synthetic.VARIANTS:
            synthetic.generate(root, config.dataset)
        elif config.dataset == "lucchi":
            lucchi.prepare(root)
        elif config.download and config.dataset == "pascal":
            download_voc(root)
        archives = {"cityscapes": cityscapes, "coco": coco}.get(config.dataset)  # whose files say what the full lists are
        pascal = info.classes == VOC_CLASSES
        top, root = root, root if archives else voc_folder(root)
        if archives:
            full, val = (archives.listed(root, split, Sample) for split in ("train", "val"))
        else:
            val = read_list(image_set(root, info.val_list))
        if config.unlabeled_list:
            full = read_list(Path(config.unlabeled_list))
        elif isinstance(info.full_list, PublishedList):
            full = read_list(published_list(info.full_list, root, config.download))
        elif not archives:
            full = read_list(image_set(root, info.full_list))
        if config.labeled_list:
            labeled = read_list(Path(config.labeled_list))
        elif config.split_seed is not None:
            if pascal:
                full = find_masks(full, root, top, config.download)
            labeled = random_split(info, root, full, config.labeled or info.default_labeled, config.split_seed)
            if context.is_main:
                print(f"labeled images: a random split (--split-seed {config.split_seed}), not a published one", flush=True)
        elif archives and config.labeled == "all":
            labeled = full
        else:
            labeled = labeled_split(info, root, config.labeled or info.default_labeled, config.download)
        if archives:
            labeled = archives.located(labeled, root)
        if pascal:
            labeled, val = (find_masks(samples, root, top, config.download) for samples in (labeled, val))
    data = Data(info, root, labeled, unlabeled=[], val=val,
                tune=read_list(image_set(root, "tune")) if image_set(root, "tune").is_file() else [])
    chosen = {sample.image for sample in data.labeled}
    unlabeled = [sample for sample in full if sample.image not in chosen]
    known = info.unlabeled_truth and all(sample.mask for sample in unlabeled)  # all or none: every step logs the same
    data.unlabeled = unlabeled if known else [Sample(sample.image, None) for sample in unlabeled]
    check_lists(data)
    return data


def random_split(info: DatasetInfo, root: Path, full: list[Sample], labeled: str, seed: int) -> list[Sample]:
    """A choice of ours from `full`, every class among them; kept in `root`/splits/random and found there again."""
    count = images_asked_for(labeled, len(full))
    path = root / "splits" / "random" / f"{count}_seed{seed}.txt"
    if not path.is_file():
        if any(sample.mask is None for sample in full):
            raise UserError("--split-seed chooses from images with masks, and the full list names some without")
        print(f"reading {len(full)} masks to draw a split in which every class occurs", flush=True)
        present = present_classes(full, root, info.num_classes)
        lines = [f"{full[index].image} {full[index].mask}\n" for index in covering_choice(present, count, np.random.default_rng(seed))]
        write_atomically(path, lambda temporary: temporary.write_text("".join(lines)))
    samples = read_list(path)
    if len(samples) != count:
        raise UserError(f"{path} lists {len(samples)} images instead of {count}: delete it")
    return samples


def labeled_split(info: DatasetInfo, root: Path, name: str, download: bool) -> list[Sample]:
    if name == "all":
        return read_list(image_set(root, "train"))
    published = dict(info.labeled_lists)
    if published:
        if name not in published:
            raise UserError(f"{info.name} has no published list of {name} labeled images: --labeled takes "
                            f"{', '.join(published)} or all; --labeled-list FILE takes your own")
        return read_list(published_list(published[name], root, download), rooted=published[name].rooted)
    path = image_set(root, f"labeled_{name}")
    if not path.is_file():
        known = sorted(file.stem.removeprefix("labeled_") for file in path.parent.glob("labeled_*.txt"))
        raise UserError(f"{info.name} has no labeled list {name!r}: --labeled takes {', '.join(known)} or all")
    return read_list(path)


def image_set(root: Path, name: str) -> Path:
    return root / "ImageSets" / "Segmentation" / f"{name}.txt"


def read_list(path: Path, rooted: bool = False) -> list[Sample]:
    """One sample a line: an id of VOC's, or an image path and a mask path relative to the data set's folder.

    `rooted`: the list writes a slash before such paths.
    """
    if not path.is_file():
        raise UserError(f"no list at {path}")
    samples, seen = [], set()
    for number, line in enumerate(read_text(path).splitlines(), 1):
        words = [word.removeprefix("/") if rooted else word for word in line.split()]
        if not words:
            continue
        if len(words) == 1 and "/" not in words[0] and not words[0].lower().endswith((".jpg", ".jpeg", ".png")):
            words = [f"JPEGImages/{words[0]}.jpg", f"SegmentationClass/{words[0]}.png"]
        if len(words) > 2:
            raise UserError(f"{path}, line {number}: expected an id, or an image and a mask path, found {line.strip()!r}")
        if any(Path(word).is_absolute() or ".." in Path(word).parts for word in words):
            raise UserError(f"{path}, line {number}: paths must stay inside the data set's folder, found {line.strip()!r}")
        words = [Path(word).as_posix() for word in words]  # ./a.jpg and a.jpg are one image
        if words[0] in seen:
            raise UserError(f"{path}, line {number}: {words[0]} is listed twice")
        seen.add(words[0])
        samples.append(Sample(words[0], words[1] if len(words) == 2 else None))
    if not samples:
        raise UserError(f"{path} lists no image")
    return samples


def check_lists(data: Data) -> None:
    evaluated = {sample.image: name for name in ("val", "tune") for sample in getattr(data, name)}
    for name in ("labeled", "unlabeled"):
        shared = [sample.image for sample in getattr(data, name) if sample.image in evaluated]
        if shared:
            raise UserError(f"{len(shared)} {name} images are also in the {evaluated[shared[0]]} list, the first is {shared[0]}: "
                            f"scores would be meaningless")
    for name in ("labeled", "val"):
        if any(sample.mask is None for sample in getattr(data, name)):
            raise UserError(f"the {name} list names no mask for some images: give an id, or an image and a mask path, a line")
    # One directory listing instead of a stat per file: ten thousand stats take minutes on network storage.
    present: dict[Path, set[str]] = {}
    for sample in data.labeled + data.unlabeled + data.val + data.tune:
        for file in filter(None, (sample.image, sample.mask)):
            folder = data.root / Path(file).parent
            if folder not in present:
                present[folder] = set(os.listdir(folder)) if folder.is_dir() else {
                    Path(name).name for name in names_below(data.root, Path(file).parent.as_posix())}  # in an archive
            if Path(file).name not in present[folder]:
                hint = ": masks of the augmented set are looked for in SegmentationClassAug and in SBD's cls/*.mat, which --download fetches"
                raise UserError(f"{data.root / file} is listed but missing" + (hint if data.info.classes == VOC_CLASSES and file == sample.mask else ""))


# ---------------------------------------------------------------- command line


def main() -> None:
    from common import check  # which needs this module
    from common.options import TrainingOptions

    parser = argparse.ArgumentParser(prog="python -m common.data", description="Look at a data set before training on it.")
    command = parser.add_subparsers(required=True, metavar="check").add_parser("check", help="what is there, pixel shares, what is missing")
    command.add_argument("--dataset", required=True)
    command.add_argument("--data-root")
    command.add_argument("--classes")
    command.add_argument("--labeled")
    command.add_argument("--split-seed", type=int)
    command.add_argument("--labeled-list")
    command.add_argument("--unlabeled-list")
    command.add_argument("--download", action="store_true")
    args = vars(parser.parse_args())
    print(check.report(TrainingOptions(**{name: value for name, value in args.items() if value is not None})))


if __name__ == "__main__":
    run_main(main)
