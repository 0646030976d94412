"""Volumes: medical data sets as slices to train on and as patients to score.

ROOT/volumes/<name>.npz holds `image` [Z, H, W] and, if known, `label` [Z, H, W] (255 = ignore) and
`spacing` (mm along z, y, x); ROOT/lists/train.txt, val.txt, test.txt a patient and a name a line.
The embedded phantoms are made on first use; common.prepare converts other data sets.
"""

import gzip
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common.augment import IGNORE, to_float
from common.data import collate_training, copies_of, digest_of, make_loader, training_batches
from common.figures import sample_grid, voc_palette
from common.runtime import (all_reduce_sum, evaluating, main_first, option, rank, reading,
                            require, require_finite, world_size, write_atomically)
from common.synthetic import CARDIAC_CLASSES, generate

METRICS = ("dice", "jaccard", "hd95", "asd", "assd", "hd95_mm", "asd_mm", "assd_mm")
Spacing = tuple[float, float, float]  # mm between voxel centres along z, y, x
RELEASED_EMPTY = (0, 0, 50, 10, *4 * [np.nan])  # what DiffRect's test script gives an empty mask


@dataclass(frozen=True)
class VolumeInfo:
    """Classes and recipe. The defaults are DiffRect's, as released."""

    name: str
    classes: tuple[str, ...] = CARDIAC_CLASSES
    default_labeled: str = "7"  # patients
    embedded: bool = False  # made on first use; unlabeled slices' labels are for the log alone
    crop: int = 256  # slices are resized to crop x crop
    channels: int = 16  # of the U-Net's first level
    batch_size: int = 3  # labeled slices a step, and as many unlabeled ones
    lr: float = 0.01  # for that batch size
    iterations: int = 30_000
    consistency: float = 0.1  # weight of pseudo labels, once it has risen
    rampup: float = 1.0  # share of these iterations in which it rises
    rectify_weight: float = 1.0  # of rectified labels
    warmup: float = 1 / 30  # share of these iterations before they are used
    adjust: tuple[float, float] = (1.0, 1.1)  # strong view: contrast, sharpness, brightness
    blur: tuple[float, float] = (0.1, 1.0)  # strong view: sigma, pixels

    @property
    def num_classes(self) -> int:
        return len(self.classes)


DATASETS = {info.name: info for info in (
    VolumeInfo("phantom", default_labeled="3", embedded=True, crop=64, channels=8, batch_size=4,
               lr=0.02, iterations=1200, consistency=1.0, rampup=0.3, rectify_weight=0.3,
               warmup=0.3, adjust=(0.6, 1.4)),
    VolumeInfo("acdc"),
    VolumeInfo("mscmrseg"),
    VolumeInfo("prostate", ("background", "peripheral zone", "transition zone"), "2"),
)}


@dataclass
class VolumeOptions:
    """Which volumes, and which of them are labeled."""

    dataset: str = option("phantom", "phantom is embedded", choices=tuple(DATASETS))
    data_root: str | None = option(None, "folder of the data set (data/<dataset>)")
    labeled: str | None = option(
        None, "labeled patients, or all; 3_split2: of train_split2.txt (the data set's: 2, 3 or 7)")
    split_seed: int | None = option(None, "draw --labeled many patients by this seed", low=0)
    labeled_list: str | None = option(None, "file of labeled volumes: a patient and a name a line")
    unlabeled_list: str | None = option(None, "likewise (other patients of train.txt)")
    lists: str | None = option(None, "refuse other lists of volumes than those with this digest")


# ---------------------------------------------------------------- volumes and lists


@dataclass
class Volume:
    image: np.ndarray  # float32 [Z, H, W] in [0, 1]
    label: np.ndarray | None  # uint8 [Z, H, W]: class indices, 255 = ignore
    spacing: Spacing | None


class VolumeFile(NamedTuple):
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
    tag: str  # "acdc_7": for the name of a run folder
    tune: tuple = ()  # volumes have no such list

    @property
    def digest(self) -> str:
        parts = (self.labeled, self.unlabeled, self.val, self.test)
        return digest_of([[f"{file.patient} {file.name}" for file in part] for part in parts])


def min_max(image: np.ndarray) -> np.ndarray:
    """Scaled to [0, 1] over the volume, float32; all zeros for a constant one."""
    image = image.astype(np.float32)
    low, high = float(image.min()), float(image.max())
    return (image - low) / (high - low) if high > low else np.zeros_like(image)


def read_volume(path: Path, num_classes: int = IGNORE, with_label: bool = True) -> Volume:
    """The volume of a file, min-max normalised. Raises UserError for what cannot be right."""
    with reading(path), np.load(path, allow_pickle=False) as file:
        image = file["image"].astype(np.float32)
        require(not with_label or "label" in file, f"{path} has no label")
        label = file["label"] if with_label else None
        spacing = tuple(map(float, file["spacing"])) if "spacing" in file else None
    finite = image.ndim == 3 and image.size > 0 and bool(np.isfinite(image).all())
    require(finite, f"{path}: the image must be finite numbers [Z, H, W], not {image.shape}")
    require(spacing is None or len(spacing) == 3 and all(0 < step < np.inf for step in spacing),
            f"{path}: the spacing must be three positive numbers, not {spacing}")
    if label is not None:
        require(label.shape == image.shape, f"{path}: label {label.shape}, image {image.shape}")
        unknown = np.setdiff1d(label, [*range(num_classes), IGNORE])
        require(not unknown.size, f"{path} holds the labels {unknown[:3]}; there are {num_classes} "
                                  f"classes (0 to {num_classes - 1}, and {IGNORE} = ignore)")
        label = label.astype(np.uint8)
    return Volume(min_max(image), label, spacing)


def write_volume(path: Path, volume: Volume) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{k: v for k, v in vars(volume).items() if v is not None})
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))


def read_nifti(path: Path, first_channel: bool = False) -> tuple:
    """(nibabel's file, its voxels [Z, Y, X] by `turn`, spacing); to be called inside `reading`."""
    import nibabel

    content = path.read_bytes()
    if path.suffix.lower() == ".gz":
        content = gzip.decompress(content)  # to its check sum, where nibabel would not look
    kinds = [kind for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image)
             if kind.header_class.may_contain_header(content)]
    require(bool(kinds), f"{path} is no NIfTI file")
    file = kinds[0].from_bytes(content)
    head = type(file.header)(content[: file.header.sizeof_hdr], check=False)  # it makes 1 mm of 0
    zooms = tuple(abs(float(zoom)) for zoom in head.get_zooms()[:3])
    unit = head.get_xyzt_units()[0]
    usable = all(0 < zoom < np.inf for zoom in zooms) and unit in ("mm", "unknown")
    require(usable, f"{path}: voxels of {zooms} {unit}, not mm")
    lie = np.isfinite(file.affine).all() and np.linalg.det(file.affine[:3, :3]) != 0
    require(lie and file.dataobj.offset >= file.header.sizeof_hdr,
            f"{path}: its header is damaged (where voxels begin, or how they lie)")
    array = np.asarray(file.dataobj)
    array = array.reshape(*array.shape[:3], -1)[..., : 1 if first_channel else None]
    require(array.shape[3:] == (1,) and array.dtype.kind in "biuf",
            f"{path} does not hold numbers [X, Y, Z] but {array.dtype} {list(file.shape)}")
    axes = orientation(file)[:, 0].tolist()  # where x, y, z go
    spacing = tuple(zooms[axes.index(axis)] for axis in (2, 1, 0))
    return file, turn(array[..., 0], file).T, spacing


def orientation(file) -> np.ndarray:
    """Where the axes of a NIfTI file go, as nibabel has it, [3, 2]; but the axis between slices,
    where they are clearly thicker than pixels, is z, however a heart's short axis lies.

    The scales of the affine do not count: ACDC's headers contradict each other.
    """
    from nibabel import io_orientation

    ways, zooms = io_orientation(file.affine), np.abs(file.header.get_zooms()[:3])
    if zooms.max() > 1.5 * np.median(zooms):
        slices, head = zooms.argmax(), ways[:, 0].argmax()
        ways[[slices, head], 0] = ways[[head, slices], 0]
    return ways


def turn(array: np.ndarray, file, back: bool = False) -> np.ndarray:
    """A NIfTI file's [X, Y, Z] -> axes that go to the left, the back and the head (LPS), or `back`;
    across slices: see `orientation`."""
    from nibabel import orientations

    ways = [orientation(file), orientations.axcodes2ornt("LPS")]
    ways = ways[::-1] if back else ways
    return orientations.apply_orientation(array, orientations.ornt_transform(*ways))


def read_list(path: Path, root: Path) -> list[VolumeFile]:
    known = ", ".join(sorted(file.name for file in path.parent.glob("*.txt")))
    require(path.is_file(), f"no list {path}; there are {known or 'none: see common.prepare'}")
    with reading(path):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    pairs = [tuple(line.split()) for line in lines if line.strip()]
    require({len(pair) for pair in pairs} <= {2}, f"{path}: a line must be a patient and a volume")
    names = {name for _, name in pairs}
    require(0 < len(names) == len(pairs), f"{path} lists no volume, or one of them twice")
    return [VolumeFile(patient, name, root / f"volumes/{name}.npz") for patient, name in pairs]


def load_volumes(options: VolumeOptions) -> VolumeData:
    """The lists of a data set. Raises UserError if a patient is in two or a file is missing."""
    info = DATASETS[options.dataset]
    root = Path(options.data_root or f"data/{info.name}")
    if info.embedded:
        with main_first():
            generate(root, info.name)
    wanted = options.labeled or info.default_labeled  # "7", "all", "3_split2"
    count, _, split = wanted.partition("_")
    lists = []
    for name in ("train", "val", "test"):
        path = root / f"lists/{name}_{split}.txt"
        if not split or name != "train" and not path.is_file():  # train at least is the split's own
            path = root / f"lists/{name}.txt"
        lists.append(read_list(path, root) if path.is_file() or name != "test" else [])
    train, val, test = lists
    if options.labeled_list:
        require(options.labeled is None and options.split_seed is None,
                "--labeled-list says which are labeled: leave --labeled and --split-seed out")
        labeled = read_list(Path(options.labeled_list), root)
        wanted = Path(options.labeled_list).stem
    else:
        patients = list(dict.fromkeys(file.patient for file in train))
        if options.split_seed is not None:
            rng = np.random.default_rng(options.split_seed)
            patients = rng.permutation(sorted(patients)).tolist()
        numbers = {str(n): n for n in range(1, len(patients) + 1)} | {"all": len(patients)}
        require(count in numbers, f"--labeled {wanted}: {info.name} takes 1 to {len(patients)} "
                                  f"patients or all, or those of a train_splitK.txt as in 3_split2")
        labeled = [file for file in train if file.patient in patients[: numbers[count]]]
    pool = read_list(Path(options.unlabeled_list), root) if options.unlabeled_list else train
    known = {file.patient for file in labeled}
    unlabeled = [file for file in pool if file.patient not in known]
    a, b, c = ({file.patient for file in files} for files in (labeled + unlabeled, val, test))
    shared = sorted(a & b | a & c | b & c)
    require(not shared, f"patients {shared[:3]} are in two of train, val and test: no fair score")
    for file in labeled + unlabeled + val + test:
        require(file.path.is_file(), f"{file.path} is listed but missing")
    learned, chosen, tested = ([file.path for file in part]
                               for part in (labeled + unlabeled, val, test))
    copies = copies_of(chosen + tested, learned) | copies_of(tested, chosen)
    first = min(copies, default=None)
    require(not copies, f"{first} is in two of train, val and test, by another name: remove one")
    drawn = "" if options.split_seed is None else f"_random{options.split_seed}"
    data = VolumeData(info, root, labeled, unlabeled, val, test, f"{info.name}_{wanted}{drawn}")
    require(options.lists in (None, data.digest),
            f"the lists of volumes in {root} have the digest {data.digest}, not {options.lists}")
    return data


# ---------------------------------------------------------------- slices to train on


def resize_slices(image: np.ndarray, size: int) -> np.ndarray:
    """float32 [Z, H, W] in [0, 1] -> uint8 [Z, size, size] in 0..255, bilinear and antialiased."""
    slices = torch.from_numpy(np.ascontiguousarray(image))[:, None]  # [Z, 1, H, W]
    resized = F.interpolate(slices, (size, size), mode="bilinear", antialias=True)
    return (255 * resized[:, 0]).round().clamp(0, 255).byte().numpy()


def resize_labels(label: np.ndarray, size: int) -> np.ndarray:
    """uint8 [Z, H, W] -> [Z, size, size]: the label at the middle of each new pixel."""
    middles = np.arange(size) + 0.5
    rows, columns = ((middles * length / size).astype(int) for length in label.shape[1:])
    return label[:, rows][:, :, columns]


def read_slices(files: list[VolumeFile], num_classes: int, size: int, with_labels: bool) -> list:
    """(image, label) of every slice, uint8 [size, size]; the label is None unless `with_labels`."""
    pairs = []
    for file in files:
        volume = read_volume(file.path, num_classes, with_labels)
        images = resize_slices(volume.image, size)
        labels = resize_labels(volume.label, size) if with_labels else [None] * len(images)
        pairs += zip(images, labels)
    return pairs


def slice_geometry(image: np.ndarray, label: np.ndarray | None, rng: np.random.Generator) -> tuple:
    """The weak view of a slice, uint8 [S, S]: each flip, and a turn by any angle, with p = 0.5.

    Returns image (0 outside), label (255 outside) or None, and valid, bool [S, S], False outside.
    """
    up_down, left_right = rng.random(2) < 0.5
    turned, angle = rng.random() < 0.5, float(rng.uniform(0, 360))

    def move(plane: np.ndarray, resample: Image.Resampling, outside: int) -> np.ndarray:
        picture = Image.fromarray(plane[:: -1 if up_down else 1, :: -1 if left_right else 1])
        return np.array(picture.rotate(angle, resample, fillcolor=outside) if turned else picture)

    valid = move(np.ones_like(image), Image.Resampling.NEAREST, 0) > 0
    moved = None if label is None else move(label, Image.Resampling.NEAREST, IGNORE)
    return move(image, Image.Resampling.BILINEAR, 0), moved, valid


@dataclass
class SliceSet(Dataset):
    """Weak views. A key is (stream, slice, position in the run), see `training_batches`."""

    streams: list[list[tuple]]  # the (image, label)s of labeled and of unlabeled slices
    seed: int

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[int, tuple]:
        stream, index, position = key
        rng = np.random.default_rng([self.seed, stream, position])
        image, label, valid = slice_geometry(*self.streams[stream][index], rng)
        return stream, (image[None], label, valid)


def slice_loader(data: VolumeData, crop: int, batch_size: int, seed: int, start: int, total: int,
                 device: torch.device, unlabeled: bool = True,
                 num_workers: int | None = None) -> DataLoader:
    """This rank's part of the batches of steps `start` to `total` (see `collate_training`)."""
    classes = data.info.num_classes
    streams = [read_slices(data.labeled, classes, crop, with_labels=True)]
    if unlabeled:
        streams.append(read_slices(data.unlabeled, classes, crop, data.info.embedded))
    for file in data.val + data.test:  # said now, not when it is first scored
        with reading(file.path), np.load(file.path) as content:
            require("label" in content, f"{file.path} has no label")
    batches = training_batches([len(pairs) for pairs in streams], batch_size, seed, start, total)
    return make_loader(SliceSet(streams, seed), device, num_workers,
                       batch_sampler=batches, collate_fn=collate_training)


# ---------------------------------------------------------------- two masks


def overlap(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Of bool masks: dice, 2 |A and B| / (|A| + |B|), jaccard, |A and B| / |A or B|; of none 1."""
    both, either = int((a & b).sum()), int((a | b).sum())
    if not either:
        return {"dice": 1.0, "jaccard": 1.0}
    return {"dice": 2 * both / (both + either), "jaccard": both / either}


def surface(mask: np.ndarray) -> np.ndarray:
    """Voxels with a face neighbour outside of the mask or of the volume, bool [Z, H, W]."""
    padded = np.pad(mask, 1)
    neighbours = [np.roll(padded, step, axis) for axis in range(3) for step in (1, -1)]
    return mask & ~np.all(neighbours, axis=0)[1:-1, 1:-1, 1:-1]


def distances(points: np.ndarray, mask: np.ndarray, spacing: Spacing) -> np.ndarray:
    """From each voxel of `points` to the nearest of `mask`, both bool [Z, H, W]: float64 [N].

    Exact. Squared distances are sums over axes, so the minimum is found axis by axis (Felzenszwalb
    and Huttenlocher, "Distance Transforms of Sampled Functions", 2012), the last at `points` only.
    """
    slices, rows = np.arange(len(mask)), np.arange(mask.shape[1])[:, None]
    above = np.maximum.accumulate(np.where(mask, rows, -np.inf), axis=1)  # its last row so far
    below = np.minimum.accumulate(np.where(mask, rows, np.inf)[:, ::-1], axis=1)[:, ::-1]
    squared = (spacing[1] * np.minimum(rows - above, below - rows)) ** 2  # [Z, H, W]
    to_slices = (spacing[0] * (slices[:, None] - slices)) ** 2  # [Z, Z]
    columns, nearest = np.arange(mask.shape[2]), []
    for shown, added in zip(points, to_slices):
        plane, (y, x) = (squared + added[:, None, None]).min(axis=0), shown.nonzero()
        across = (spacing[2] * (x[:, None] - columns)) ** 2  # [points of the slice, W]
        nearest.append((plane[y] + across).min(axis=1))
    return np.sqrt(np.concatenate(nearest))


def surface_distances(prediction: np.ndarray, label: np.ndarray,
                      spacing: Spacing = (1, 1, 1)) -> dict[str, float]:
    """hd95, asd and assd of two bool masks [Z, H, W], neither empty, in voxels or `spacing`'s unit.

    hd95: 95th percentile of both directions' distances in one list; asd: mean distance from the
    prediction's surface to the label's; assd: mean of it and its reverse. hd95 and asd are medpy's;
    MONAI's hd95 is the larger of two percentiles, medpy's assd since 0.5.2 the mean of one list.
    """
    # Cropped to both: what is cut off is in neither, and so counts like the outside of the volume.
    corners = np.argwhere(prediction | label)
    box = tuple(map(slice, corners.min(axis=0), corners.max(axis=0) + 1))
    ours, theirs = surface(prediction[box]), surface(label[box])
    there, back = distances(ours, theirs, spacing), distances(theirs, ours, spacing)
    asd, reverse = float(there.mean()), float(back.mean())
    hd95 = float(np.percentile(np.concatenate([there, back]), 95))
    return {"hd95": hd95, "asd": asd, "assd": (asd + reverse) / 2}


# ---------------------------------------------------------------- scores


@torch.inference_mode()
def segment_volume(predict, image: np.ndarray, size: int, device: torch.device) -> np.ndarray:
    """float32 [Z, H, W] in [0, 1] -> classes uint8 [Z, H, W].

    predict: slices float [B, 1, size, size] in [0, 1] -> logits [B, C, size, size], which are
    resized (bilinear) to the volume's own grid before the argmax.
    """
    slices = torch.from_numpy(resize_slices(image, size))[:, None]  # [Z, 1, size, size]
    labels = []
    for part in slices.split(16):
        logits = predict(to_float(part.to(device))).float()
        logits = F.interpolate(logits, image.shape[1:], mode="bilinear")
        require_finite(logits)
        labels.append(logits.argmax(dim=1).byte().cpu())
    return torch.cat(labels).numpy()


def score(prediction: np.ndarray, label: np.ndarray, spacing: Spacing | None) -> list[float]:
    """METRICS of two bool masks [Z, H, W], nan where there is none, and the masks' voxels."""
    values = overlap(prediction, label)
    if prediction.any() and label.any():
        values |= surface_distances(prediction, label)
        if spacing is not None:
            in_mm = surface_distances(prediction, label, spacing)
            values |= {f"{name}_mm": value for name, value in in_mm.items()}
    return [*(values.get(name, np.nan) for name in METRICS), prediction.sum(), label.sum()]


def evaluate_volumes(network: nn.Module, files: list[VolumeFile], info: VolumeInfo, crop: int,
                     device: torch.device, released_empty: bool = False) -> dict:
    """Scores of every volume on its own grid, shared among ranks; the same plain dict on each.

    Dice and Jaccard are in %, distances in voxels and (`_mm`) mm: means over classes but 0
    (`per_class`) of means over volumes (`scores`). Label 255 does not count. A class without voxels
    in prediction or label has no distance: `empty` lists these cases, and means of distances leave
    them out, unless `released_empty` scores all as DiffRect's test script. A mean of nothing is
    None. The network is put into eval mode, with statistics averaged over ranks, and back again.
    """
    classes = info.classes[1:]
    table = np.zeros((len(files), len(classes), len(METRICS) + 2))
    with evaluating(network):
        for index in range(rank(), len(files), world_size()):
            volume = read_volume(files[index].path, info.num_classes)
            prediction = segment_volume(network, volume.image, crop, device)
            prediction[volume.label == IGNORE] = IGNORE
            table[index] = [score(prediction == number, volume.label == number, volume.spacing)
                            for number in range(1, info.num_classes)]
    total = all_reduce_sum(torch.from_numpy(table).to(device)).cpu()
    scores, voxels = total.split([len(METRICS), 2], dim=2)
    require(bool(voxels[..., 1].any()), "no volume of the evaluated list shows a class but 0")
    is_empty = (voxels == 0).any(dim=2)
    if released_empty:
        scores[is_empty] = scores.new_tensor(RELEASED_EMPTY)
    scores[..., :2] *= 100
    empty = []
    for volume, number in is_empty.nonzero().tolist():
        predicted, labeled = voxels[volume, number]
        where = "prediction" if labeled else "label" if predicted else "both"
        empty.append({"volume": files[volume].name, "class": classes[number], "empty": where})

    def named(row: Tensor) -> dict[str, float | None]:
        values = [None if np.isnan(value) else value for value in row.tolist()]
        return dict(zip(METRICS, values))

    def by_class(rows: Tensor) -> dict[str, dict]:
        return {name: named(row) for name, row in zip(classes, rows)}

    means = scores.nanmean(dim=0)  # of volumes
    return {
        **named(means.nanmean(dim=0)),
        "volumes": len(files),
        "patients": len({file.patient for file in files}),
        "empty_masks": len(empty),
        "per_class": by_class(means),
        "empty": empty,
        "scores": {file.name: by_class(rows) for file, rows in zip(files, scores)},
    }


def report(results: dict) -> str:
    """The results as a table to print."""
    lines = [f"{'':18}" + "".join(f"{name:>9}" for name in METRICS)]
    for name, values in {**results["per_class"], "mean": results}.items():
        cells = ["-" if values[key] is None else f"{values[key]:.2f}" for key in METRICS]
        lines.append(f"{name:18}" + "".join(f"{cell:>9}" for cell in cells))
    lines.append(f"{results['volumes']} volumes of {results['patients']} patients; overlap in %, "
                 f"distances in voxels or mm")
    for case in results["empty"]:
        lines.append(f"empty mask: {case['class']} of {case['volume']} ({case['empty']})")
    return "\n".join(lines)


@torch.inference_mode()
def write_sample_grid(label_maps: Callable[[Tensor], list[Tensor]], captions: Sequence[str],
                      data: VolumeData, crop: int, device: torch.device, path: Path) -> None:
    """Middle slices of six validation volumes | label | `label_maps`(slice [1, 1, S, S]).

    Slices are in [0, 1]. Written by the first rank.
    """
    if rank() != 0:
        return
    rows = []
    for file in data.val[:6]:
        slices = read_slices([file], data.info.num_classes, crop, with_labels=True)
        image, label = slices[len(slices) // 2]
        maps = label_maps(to_float(torch.from_numpy(image)[None, None].to(device)))
        rows.append((np.stack([image] * 3), label, *torch.cat(maps).byte().cpu()))
    sample_grid(rows, data.info.classes, voc_palette(), path, captions)
