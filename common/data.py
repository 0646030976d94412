"""Data sets: classes, recipes, lists and splits. Reading and loaders are in common.loading.

A data set is an entry of `DATASETS`: classes, palette and the recipe that the field trains it with. Its pictures lie
as PASCAL VOC has them (JPEGImages/*.jpg, SegmentationClass/*.png with class indices and 255 = ignore,
ImageSets/Segmentation/*.txt); the embedded `shapes` sets are written in that layout and read by the same code.

Published labeled lists are downloaded by commit and verified by SHA-256. The unlabeled list is the full training list
minus the labeled one, so nothing else is needed and nothing can be in both.
"""

import hashlib
import http.client
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from common import synthetic
from common.augment import IGNORE
from common.files import read_text, write_atomically
from common.runtime import Context, UserError, main_first

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)


@dataclass(frozen=True)
class PublishedList:
    """A list of a public repository, pinned by commit and content."""

    repository: str
    commit: str
    path: str
    lines: int
    sha256: str

    @property
    def url(self) -> str:
        return f"https://raw.githubusercontent.com/{self.repository}/{self.commit}/{self.path}"


def unimatch_list(path: str, lines: int, sha256: str) -> PublishedList:
    return PublishedList("LiheYoung/UniMatch", "0324f3dd4a22128105a5eb135d2586c0bb3cc647", path, lines, sha256)


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
        return tuple(tuple(int(v) for v in colour) for colour in synthetic.voc_palette(256))


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
            labeled_lists=tuple(
                (count, unimatch_list(f"splits/pascal/{count}/labeled.txt", int(count), sha256)) for count, sha256 in {
                    "92": "8a02aa6a1253178b105bd25b36f0a27daeedf6b3959f399aa47d24783f3a8306",
                    "183": "de3f4680391cb15324402dae17ac0919933d0d9004c11a641c924f3f67147f9f",
                    "366": "74f6bd1e459a8b46fc204529d70b603769f8a45aef4553df8a5c04b5698e77b7",
                    "732": "02c8ec5b62e27364f5bc91eb95bccf54debaa721e9d31c50c07507aea258fd0f",
                    "1464": "b20486876df309c57c8230e957b2957fff5392ff5cb11f225e8453ed6c50ba3e",
                }.items()
            ),
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


def load_data(config, context: Context) -> Data:
    """The lists of `config.dataset`, checked: each file exists, labeled, unlabeled and validation are disjoint.

    Raises UserError for an unknown data set or split, and for a list that is missing, empty or wrong.
    """
    if config.dataset not in DATASETS:
        raise UserError(f"unknown data set {config.dataset!r}: --dataset takes one of {', '.join(DATASETS)}")
    info = DATASETS[config.dataset]
    root = Path(config.data_root or Path("data") / info.name)
    with main_first(context):
        if config.dataset in synthetic.VARIANTS:
            synthetic.generate(root, config.dataset)
        elif config.download:
            download_voc(root)
        root = voc_folder(root)
        if config.unlabeled_list:
            full = read_list(Path(config.unlabeled_list))
        elif isinstance(info.full_list, PublishedList):
            full = read_list(published_list(info.full_list, root, config.download))
        else:
            full = read_list(image_set(root, info.full_list))
        if config.labeled_list:
            labeled = read_list(Path(config.labeled_list))
        else:
            labeled = labeled_split(info, root, config.labeled or info.default_labeled, config.download)
    data = Data(info, root, labeled, unlabeled=[], val=read_list(image_set(root, info.val_list)),
                tune=read_list(image_set(root, "tune")) if image_set(root, "tune").is_file() else [])
    chosen = {sample.image for sample in data.labeled}
    unlabeled = [sample for sample in full if sample.image not in chosen]
    known = info.unlabeled_truth and all(sample.mask for sample in unlabeled)  # all or none: every step logs the same
    data.unlabeled = unlabeled if known else [Sample(sample.image, None) for sample in unlabeled]
    check_lists(data)
    return data


def labeled_split(info: DatasetInfo, root: Path, name: str, download: bool) -> list[Sample]:
    if name == "all":
        return read_list(image_set(root, "train"))
    published = dict(info.labeled_lists)
    if published:
        if name not in published:
            raise UserError(f"{info.name} has no published list of {name} labeled images: --labeled takes "
                            f"{', '.join(published)} or all; --labeled-list FILE takes your own")
        return read_list(published_list(published[name], root, download))
    path = image_set(root, f"labeled_{name}")
    if not path.is_file():
        known = sorted(file.stem.removeprefix("labeled_") for file in path.parent.glob("labeled_*.txt"))
        raise UserError(f"{info.name} has no labeled list {name!r}: --labeled takes {', '.join(known)} or all")
    return read_list(path)


def voc_folder(root: Path) -> Path:
    """The folder that holds JPEGImages: `root`, or VOCdevkit/VOC2012 below it, where the official archive unpacks."""
    for folder in (root, root / "VOCdevkit" / "VOC2012", root / "VOC2012"):
        if (folder / "JPEGImages").is_dir():
            return folder
    raise UserError(f"no folder JPEGImages in {root} (nor in VOCdevkit/VOC2012 below it): point --data-root at VOC2012, "
                    f"or fetch it with --download")


def image_set(root: Path, name: str) -> Path:
    return root / "ImageSets" / "Segmentation" / f"{name}.txt"


def download_voc(root: Path) -> None:
    from torchvision.datasets import VOCSegmentation

    try:
        voc_folder(root)
    except UserError:
        root.mkdir(parents=True, exist_ok=True)
        try:
            VOCSegmentation(str(root), year="2012", image_set="trainval", download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(f"PASCAL VOC 2012 could not be downloaded into {root}: {error}".replace("\n", " ")) from error


def published_list(source: PublishedList, root: Path, download: bool) -> Path:
    """The list's file below `root`/splits, downloaded if asked for, and verified in any case."""
    path = root / "splits" / source.repository.replace("/", "_") / source.commit[:10] / source.path
    if not path.is_file():
        if not download:
            raise UserError(f"no list at {path}: --download fetches it from {source.url}, or fetch it yourself and put it "
                            f"there, or give your own with --labeled-list and --unlabeled-list FILE")
        try:
            with urllib.request.urlopen(source.url, timeout=60) as response:
                content = response.read()
        except (OSError, http.client.HTTPException) as error:  # the latter where the connection breaks off
            raise UserError(f"{source.url} could not be downloaded: {error}") from error
        verify(content, source, source.url)
        write_atomically(path, lambda temporary: temporary.write_bytes(content))
    verify(path.read_bytes(), source, path)
    return path


def verify(content: bytes, source: PublishedList, where) -> None:
    if hashlib.sha256(content).hexdigest() != source.sha256:
        raise UserError(f"{where} is not the published list of {source.lines} images (SHA-256 {source.sha256[:12]}… expected, "
                        f"{hashlib.sha256(content).hexdigest()[:12]}… found): delete it and fetch it again")


def read_list(path: Path) -> list[Sample]:
    """One sample a line: an id of VOC's, or an image path and a mask path relative to the data set's folder."""
    if not path.is_file():
        raise UserError(f"no list at {path}")
    samples, seen = [], set()
    for number, line in enumerate(read_text(path).splitlines(), 1):
        words = line.split()
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
                present[folder] = set(os.listdir(folder)) if folder.is_dir() else set()
            if Path(file).name not in present[folder]:
                raise UserError(f"{data.root / file} is listed but missing")
