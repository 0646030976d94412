"""Volumes: medical data sets as slices to train on and as patients to score.

One form is read, `.npz` with `image` [Z, H, W], `label` [Z, H, W] (class indices, 255 = ignore) and `spacing` (mm along z, y, x), in

    ROOT/volumes/<volume>.npz    ROOT/lists/train.txt, val.txt, test.txt: "<patient> <volume>" a line

`--labeled 3` are all volumes of the first three patients of train.txt; `3_split2` reads train_split2.txt (and val_split2.txt where there
is one). The embedded `phantom` is written in that form on first use; others are converted once:

    python -m common.medical prepare --dataset acdc --source ACDC/training --root data/acdc

Training sees single slices, resized to a square and rounded to 8 bits; loader workers flip and turn them. Scores are made by common.scores.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from common import phantom, synthetic
from common.augment import IGNORE
from common.files import read_text, write_atomically
from common.loading import TrainingBatches, collate_training, loader
from common.runtime import Context, UserError, main_first, run_main

CARDIAC = phantom.CLASSES  # ACDC's labels


@dataclass(frozen=True)
class VolumeInfo:
    """A medical data set: classes and the recipe it is trained with. The learning rate belongs to `batch_size` labeled + as many unlabeled."""

    name: str
    classes: tuple[str, ...]
    default_labeled: str  # patients
    crop: int  # slices are resized to crop x crop
    channels: int  # width of the U-Net's first level
    batch_size: int
    lr: float
    iterations: int
    threshold: float  # confidence from which FixMatch trusts a pseudo label
    consistency: float  # weight of the loss on pseudo labels after its ramp
    rampup: float  # share of the training over which that weight rises
    warmup: float  # share of the training before rectified labels are learned from
    rectify_weight: float  # of the loss on rectified labels
    adjust: tuple[float, float]  # strong view: range of the factors of contrast, sharpness and brightness
    blur: tuple[float, float]  # strong view: range of sigma, pixels
    unlabeled_truth: bool = False  # whether truth of unlabeled slices may be read, for logging only
    backbone: str = "unet"
    ohem: float = 0.0
    head_lr_multiplier: float = 1.0
    epochs: int = 0

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(tuple(int(v) for v in colour) for colour in synthetic.voc_palette(256))


def published(name: str, classes: tuple[str, ...], labeled: str) -> VolumeInfo:
    """The paper's recipe; the strengths of the strong view are those of the released code."""
    return VolumeInfo(name, classes, labeled, crop=256, channels=16, batch_size=3, lr=0.01, iterations=30_000, threshold=0.8, consistency=0.1,
                      rampup=1.0, warmup=1 / 30, rectify_weight=1.0, adjust=(1.0, 1.1), blur=(0.1, 1.0))


def embedded(name: str, crop: int, channels: int, iterations: int) -> VolumeInfo:
    return VolumeInfo(name, CARDIAC, "3", crop=crop, channels=channels, batch_size=4, lr=0.02, iterations=iterations, threshold=0.8,
                      consistency=1.0, rampup=0.3, warmup=0.3, rectify_weight=0.3, adjust=(0.6, 1.4), blur=(0.1, 1.0), unlabeled_truth=True)


DATASETS = {
    info.name: info
    for info in (
        embedded("phantom", crop=64, channels=8, iterations=1200),
        embedded("phantom_large", crop=128, channels=16, iterations=10_000),
        published("acdc", CARDIAC, "7"),
        published("mscmrseg", CARDIAC, "7"),
        published("prostate", ("background", "peripheral zone", "transition zone"), "2"),
    )
}


# ---------------------------------------------------------------- volumes


@dataclass
class Volume:
    image: np.ndarray  # float32 [Z, H, W] in [0, 1]
    label: np.ndarray | None  # uint8 [Z, H, W]: class indices, 255 = ignore
    spacing: tuple[float, float, float] | None  # mm between voxel centres along z, y, x; None if unknown


def min_max(image: np.ndarray) -> np.ndarray:
    """Scaled to [0, 1] over the volume, float32; all zeros for a constant one."""
    image = image.astype(np.float32)
    low, high = float(image.min()), float(image.max())
    return (image - low) / (high - low) if high > low else np.zeros_like(image)


def write_volume(path: Path, volume: Volume) -> None:
    arrays = {"image": volume.image}
    if volume.label is not None:
        arrays["label"] = volume.label.astype(np.uint8)
    if volume.spacing is not None:
        arrays["spacing"] = np.asarray(volume.spacing, np.float64)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # a file object: savez would add .npz to a name
            np.savez_compressed(file, **arrays)

    write_atomically(path, write)


def read_volume(path: Path, num_classes: int | None = None) -> Volume:
    """The volume of a file, its image min-max normalised. Raises UserError for anything wrong with it.

    `num_classes`: labels must lie below it or be 255.
    """
    if not path.is_file():
        raise UserError(f"no volume at {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in ("image", "label", "spacing") if name in file.files}
    except Exception as error:  # a damaged or foreign file can raise anything; each means the same to the user
        raise UserError(f"cannot read the volume {path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
    if "image" not in arrays:
        raise UserError(f"{path} holds no array named image")
    image, label, spacing = arrays["image"], arrays.get("label"), arrays.get("spacing")
    if image.ndim != 3 or image.size == 0 or image.dtype.kind not in "fiub":
        raise UserError(f"{path}: image must be numbers [slices, height, width], not {image.dtype} {list(image.shape)}")
    with np.errstate(over="ignore"):
        image = image.astype(np.float32)
    if not np.isfinite(image).all():
        raise UserError(f"{path}: the image holds values that are not finite")
    if label is not None:
        if label.shape != image.shape:
            raise UserError(f"{path}: the label is {list(label.shape)}, the image {list(image.shape)}")
        if label.dtype.kind not in "iub":
            raise UserError(f"{path}: the label must hold whole numbers, not {label.dtype}")
        wrong = (label < 0) | (label != IGNORE) & (label >= (num_classes or IGNORE))
        if wrong.any():
            raise UserError(f"{path} holds the label {label[wrong][0]}; there are {num_classes or IGNORE} classes (0 to {(num_classes or IGNORE) - 1})")
        label = label.astype(np.uint8)
    if spacing is not None:
        if spacing.shape != (3,) or spacing.dtype.kind not in "fiu" or not (np.isfinite(spacing) & (spacing > 0)).all():
            raise UserError(f"{path}: spacing must be three positive numbers (mm along z, y, x)")
        spacing = tuple(float(value) for value in spacing)
    return Volume(min_max(image), label, spacing)


def resize_slices(image: np.ndarray, size: int) -> np.ndarray:
    """float [Z, H, W] in [0, 1] -> uint8 [Z, size, size], bilinear (antialiased), what networks see divided by 255."""
    resized = F.interpolate(torch.from_numpy(np.ascontiguousarray(image))[:, None], (size, size), mode="bilinear", align_corners=False, antialias=True)
    return (255 * resized[:, 0]).round().clamp(0, 255).byte().numpy()


def resize_labels(label: np.ndarray, size: int) -> np.ndarray:
    """uint8 [Z, H, W] -> [Z, size, size]: the label at the middle of each new pixel."""
    rows, columns = (((np.arange(size) + 0.5) * old / size).astype(np.int64) for old in label.shape[1:])
    return label[:, rows][:, :, columns]


# ---------------------------------------------------------------- lists and splits


@dataclass(frozen=True)
class VolumeFile:
    patient: str
    name: str
    path: Path


@dataclass
class VolumeData:
    info: VolumeInfo
    root: Path
    labeled: list[VolumeFile]
    unlabeled: list[VolumeFile]
    val: list[VolumeFile]
    test: list[VolumeFile]
    tune: tuple = ()  # no such list: options are chosen on val, reported on test


def load_volumes(config, context: Context) -> VolumeData:
    """The lists of `config.dataset`, checked: every file is there, no patient is in two of training, validation and test.

    Raises UserError for an unknown data set or split and for a list that is missing, empty or wrong.
    """
    if config.dataset not in DATASETS:
        raise UserError(f"unknown data set {config.dataset!r}: --dataset takes one of {', '.join(DATASETS)}")
    info = DATASETS[config.dataset]
    root = Path(config.data_root or Path("data") / info.name)
    if config.dataset in phantom.VARIANTS:
        with main_first(context):
            phantom.generate(root, config.dataset)
    if not (root / "lists" / "train.txt").is_file():
        raise UserError(f"no lists/train.txt in {root}: python -m common.medical prepare --dataset {info.name} --source FOLDER --root {root} "
                        f"converts what you downloaded")
    count, _, split = (config.labeled or info.default_labeled).partition("_")
    suffix = f"_{split}" if split else ""
    train, val, test = (list_of(root, name, suffix) for name in ("train", "val", "test"))
    patients = list(dict.fromkeys(file.patient for file in train))
    if config.split_seed is not None:
        patients = np.random.default_rng(config.split_seed).permutation(sorted(patients)).tolist()
    if config.labeled_list:
        labeled = read_list(Path(config.labeled_list), root)
    elif count == "all":
        labeled = train
    elif count.isdecimal() and 1 <= int(count) <= len(patients):
        chosen = set(patients[: int(count)])
        labeled = [file for file in train if file.patient in chosen]
    else:
        raise UserError(f"--labeled {config.labeled}: {info.name} takes 1 to {len(patients)} patients or all, from train_splitK.txt as in 3_split2")
    known = {file.patient for file in labeled}
    pool = read_list(Path(config.unlabeled_list), root) if config.unlabeled_list else train
    data = VolumeData(info, root, labeled, [file for file in pool if file.patient not in known], val, test)
    check_lists(data)
    return data


def list_of(root: Path, name: str, suffix: str) -> list[VolumeFile]:
    """The list `name` of a split; only train must have one of its own, and only test may be missing."""
    path = root / "lists" / f"{name}{suffix}.txt"
    if not path.is_file() and name != "train":
        path = root / "lists" / f"{name}.txt"
        if not path.is_file() and name == "test":
            return []
    return read_list(path, root)


def read_list(path: Path, root: Path) -> list[VolumeFile]:
    if not path.is_file():
        known = sorted(file.name for file in path.parent.glob("*.txt"))
        raise UserError(f"no list at {path}" + (f"; there are {', '.join(known)}" if known else ""))
    files = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or "/" in words[1] or "\\" in words[1]:
            raise UserError(f"{path}, line {number}: expected a patient and a volume, found {line.strip()!r}")
        if any(file.name == words[1] for file in files):
            raise UserError(f"{path}, line {number}: {words[1]} is listed twice")
        files.append(VolumeFile(words[0], words[1], root / "volumes" / f"{words[1]}.npz"))
    if not files:
        raise UserError(f"{path} lists no volume")
    return files


def volumes_in(folder: Path) -> list[VolumeFile]:
    """All .npz files of a folder, each a patient of its own."""
    files = [VolumeFile(path.stem, path.stem, path) for path in sorted(folder.glob("*.npz"))]
    if not files:
        raise UserError(f"no .npz volume in {folder}")
    return files


def check_lists(data: VolumeData) -> None:
    training = {file.patient for file in data.labeled + data.unlabeled}
    for name, others in (("val", training), ("test", training | {file.patient for file in data.val})):
        shared = sorted({file.patient for file in getattr(data, name)} & others)
        if shared:
            raise UserError(f"{len(shared)} patients of the {name} list are also in another one, the first is {shared[0]}: scores would be meaningless")
    missing = [file for file in data.labeled + data.unlabeled + data.val + data.test if not file.path.is_file()]
    if missing:
        raise UserError(f"{missing[0].path} is listed but missing" + (f", and {len(missing) - 1} more" if len(missing) > 1 else ""))


# ---------------------------------------------------------------- slices to train on


@dataclass
class Slices:
    """All slices of some volumes, resized: images uint8 [N, S, S], labels uint8 [N, S, S] or None."""

    images: np.ndarray
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.images)


def read_slices(files: list[VolumeFile], info: VolumeInfo, size: int, labels: bool) -> Slices:
    """Raises UserError for a volume without a label where labels are asked for."""
    images, masks = [np.zeros((0, size, size), np.uint8)], [np.zeros((0, size, size), np.uint8)]
    for file in files:
        volume = read_volume(file.path, info.num_classes)
        images.append(resize_slices(volume.image, size))
        if labels:
            if volume.label is None:
                raise UserError(f"{file.path} has no label")
            masks.append(resize_labels(volume.label, size))
    return Slices(np.concatenate(images), np.concatenate(masks) if labels else None)


def slice_geometry(image: np.ndarray, label: np.ndarray | None, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """The weak view of a slice uint8 [S, S]: flips, each with p 0.5, and with p 0.5 a turn by any angle.

    Returns image (bilinear; 0 outside), label (nearest; 255 outside) and valid, bool [S, S], False outside.
    """
    flips, turn, angle = rng.random(2) < 0.5, rng.random() < 0.5, float(rng.uniform(0, 360))
    valid = np.ones(image.shape, bool)
    for axis in (0, 1):
        if flips[axis]:
            image, label = np.flip(image, axis), None if label is None else np.flip(label, axis)
    if turn:
        image = np.asarray(Image.fromarray(image).rotate(angle, Image.Resampling.BILINEAR))
        valid = np.asarray(Image.fromarray(valid.astype(np.uint8)).rotate(angle)) > 0
        label = None if label is None else np.asarray(Image.fromarray(label).rotate(angle, fillcolor=IGNORE))
    return np.array(image), None if label is None else np.array(label), valid


class SliceSet(Dataset):
    """Weak views of slices. An index is (stream, slice, position), as common.loading's `TrainingBatches` gives them."""

    def __init__(self, streams: tuple[Slices, Slices], seed: int):
        self.streams, self.seed = streams, seed

    def __getitem__(self, key: tuple[int, int, int]) -> dict:
        stream, index, position = key
        slices = self.streams[stream]
        rng = np.random.default_rng([self.seed, stream, position])
        image, label, valid = slice_geometry(slices.images[index], None if slices.labels is None else slices.labels[index], rng)
        item = {"image": torch.from_numpy(image)[None], "valid": torch.from_numpy(valid), "stream": stream}
        if label is not None:
            item["label"] = torch.from_numpy(label)
        return item


@dataclass
class SliceStreams:
    labeled: Slices
    unlabeled: Slices


def slice_loader(data: VolumeData, config, context: Context, start: int, total: int, unlabeled: bool) -> DataLoader:
    """Batches of this rank for steps `start` to `total`, as common.loading's `collate_training` describes them, with one channel."""
    info = data.info
    streams = SliceStreams(read_slices(data.labeled, info, config.crop, labels=True),
                           read_slices(data.unlabeled if unlabeled else [], info, config.crop, labels=info.unlabeled_truth))
    batches = TrainingBatches(streams, config.batch_size // context.world_size, unlabeled, config.seed, context, start, total)
    return loader(SliceSet((streams.labeled, streams.unlabeled), config.seed), config.num_workers, context,
                  batch_sampler=batches, collate_fn=collate_training)


# ---------------------------------------------------------------- command line


def main() -> None:
    from common import convert

    parser = argparse.ArgumentParser(prog="python -m common.medical", description="Convert a medical data set into the form that training reads.")
    command = parser.add_subparsers(required=True, metavar="prepare").add_parser("prepare", help="convert; what is converted already is kept")
    command.add_argument("--dataset", required=True, choices=[name for name in DATASETS if name not in phantom.VARIANTS])
    command.add_argument("--source", required=True, type=Path, help="the folder that you downloaded")
    command.add_argument("--root", type=Path, help="folder to write; default: data/<dataset>")
    command.add_argument("--download", action="store_true", help="fetch the published lists of acdc where they are not in --source")
    command.add_argument("--workers", type=int, help="processes; default: from the number of CPU cores")
    args = parser.parse_args()
    convert.prepare(args.dataset, args.source, args.root or Path("data") / args.dataset, args.download, args.workers)


if __name__ == "__main__":
    run_main(main)
