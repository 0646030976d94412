"""Data sets as their owners give them out, made into what training reads, once.

    python -m common.prepare coco --root data/coco                  # annotations/ -> masks/
    python -m common.prepare sbd --root data/pascal --download      # -> SegmentationClassAug/
    python -m common.prepare lucchi --root data/lucchi              # TIFF stacks -> VOC's layout
    python -m common.prepare acdc --root data/acdc --source ACDC    # -> volumes/ and lists/
    python -m common.prepare mscmrseg | prostate ...                # likewise

A mask or volume that is there is kept (Lucchi's are not), so the same command goes on where it was
stopped; delete a file to have it made again. Lists come last: a folder with lists is whole. The
packages pycocotools, scipy, h5py and nibabel are imported inside `reading`, whose message then
names a missing one.
"""

import glob
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence
from torchvision.datasets import SBDataset

from common.augment import IGNORE
from common.data import DATASETS, eight_bits, opened, published_list, published_lists, voc_folder
from common.figures import save_png
from common.medical import Volume, min_max, orientation, read_nifti, write_volume
from common.runtime import Parser, reading, require, run_main, write_lines


def with_progress(items: Sequence, what: str) -> Iterator:
    """The items; prints a line after every tenth of them."""
    for number, item in enumerate(items, 1):
        yield item
        if number * 10 // len(items) > (number - 1) * 10 // len(items):
            print(f"{what}: {number} of {len(items)}", flush=True)


def files_below(folder: Path) -> list[Path]:
    """Sorted, also in linked folders, but no hidden ones: macOS leaves a ._ double of each file."""
    require(folder.is_dir(), f"no folder {folder}")
    return [folder / name for name in sorted(glob.glob("**/*", root_dir=folder, recursive=True))]


# ---------------------------------------------------------------- pictures


def prepare_coco(source: Path, root: Path) -> None:
    """annotations/instances_{train,val}2017.json -> masks/{train,val}2017/<id>.png, 8-bit grey.

    0 is background, 1 to 80 are the categories in the order of their ids.
    """
    for split in ("train2017", "val2017"):
        path = source / "annotations" / f"instances_{split}.json"
        with reading(path):
            from pycocotools.coco import COCO

            coco = COCO(path)
            ids = sorted(coco.cats)
            names = tuple(coco.cats[number]["name"] for number in ids)
            require(names == DATASETS["coco"].classes[1:], f"{path}: not COCO's 80 categories")
        for image in with_progress(coco.dataset["images"], f"masks of {split}"):
            mask = root / "masks" / split / f"{image['id']:012}.png"
            if not mask.is_file():
                with reading(path):
                    save_png(Image.fromarray(label_map(coco, image, ids)), mask)


def label_map(coco, image: dict, ids: list[int]) -> np.ndarray:
    """uint8 [H, W]: crowd regions, above them the instances from the largest to the smallest.

    So the table does not hide the cake. Nothing is published on how the benchmark's masks were
    made: compare methods on one kind of them. `ids`: the categories in order of their class.
    """
    found = [(entry, coco.annToMask(entry).astype(bool)) for entry in coco.imgToAnns[image["id"]]]
    label = np.zeros((image["height"], image["width"]), np.uint8)
    for entry, region in sorted(found, key=lambda pair: (not pair[0]["iscrowd"], -pair[1].sum())):
        label[region] = 1 + ids.index(entry["category_id"])
    return label


def prepare_sbd(source: Path, root: Path, download: bool) -> None:
    """cls/<id>.mat, anywhere below `source` -> SegmentationClassAug/<id>.png, in VOC 2012's folder.

    VOC has masks of 1,464 training images; the other 9,118 of the field's 10,582 are SBD's, which
    have no ignored border. Images with a mask of VOC's get no second one.
    """
    voc, target = voc_folder(root), root / "SBD"
    require((voc / "JPEGImages").is_dir(), f"no JPEGImages below {root}: --root takes VOC 2012")
    if download and not (target / "cls").is_dir():
        with reading(SBDataset.url):
            SBDataset(str(target), mode="segmentation", download=True)
    source = target if download else source
    paths = [path for path in files_below(source) if path.match("cls/*.mat")]
    require(len(paths) > 0, f"no cls/*.mat below {source}: --download fetches SBD")
    for path in with_progress(paths, "masks of SBD"):
        mask = voc / "SegmentationClassAug" / f"{path.stem}.png"
        if mask.is_file() or (voc / "SegmentationClass" / mask.name).is_file():
            continue
        with reading(path):
            from scipy.io import loadmat

            label = loadmat(path)["GTcls"]["Segmentation"][0, 0]
            require(label.max() <= 20, f"{path} holds the class {label.max()}, VOC has 0 to 20")
            save_png(Image.fromarray(label.astype(np.uint8)), mask)


def prepare_lucchi(source: Path, root: Path) -> None:
    """EPFL's {training,testing}{,_groundtruth}.tif -> pictures and lists in VOC's layout."""
    lists = {}
    for split, stack in (("val", "testing"), ("train", "training")):
        images = read_stack(source / f"{stack}.tif")
        labels = read_stack(source / f"{stack}_groundtruth.tif")
        require(images.shape == labels.shape and {*np.unique(labels)} <= {0, labels.max()},
                f"{source}: {stack}_groundtruth.tif has another size than {stack}.tif, or other "
                f"values than 0 and 255")
        names = [f"{split}_{number:03}" for number in range(len(images))]
        for name, image, label in zip(names, images, labels):
            mask = (label > 0).astype(np.uint8)
            save_png(Image.fromarray(image), root / "JPEGImages" / f"{name}.png")
            save_png(Image.fromarray(mask), root / "SegmentationClass" / f"{name}.png")
        lists[split] = [f"JPEGImages/{name}.png SegmentationClass/{name}.png" for name in names]
    for name, lines in lists.items():
        write_lines(root / "ImageSets" / "Segmentation" / f"{name}.txt", lines)


def read_stack(path: Path) -> np.ndarray:
    """All pages of a TIFF file: uint8 [N, H, W]."""
    with opened(path, stack=True) as stack:
        pages = [eight_bits(page, path).convert("L") for page in ImageSequence.Iterator(stack)]
        return np.stack(pages)


# ---------------------------------------------------------------- medical volumes

# Images and labels, anywhere below --source; the group is the volume's name. ACDC: the challenge's
# folders, or SSL4MIS's HDF5 files, which hold both. Prostate: Decathlon's Task05.
NIFTI = r"\.nii(?:\.gz)?"
PATTERNS = {
    "acdc": (rf"(patient\d+_frame\d+)(?:{NIFTI}|\.h5)",
             rf"(patient\d+_frame\d+)(?:_gt{NIFTI}|\.h5)"),
    "mscmrseg": (rf"(patient\d+_LGE){NIFTI}", rf"(patient\d+_LGE)_(?:manual|gd){NIFTI}"),
    "prostate": (rf"imagesTr/(prostate_\d+){NIFTI}", rf"labelsTr/(prostate_\d+){NIFTI}"),
}
CLASSES = {  # of the labels' values
    "acdc": {0: 0, 1: 1, 2: 2, 3: 3},
    "mscmrseg": {0: 0, 600: 1, 200: 2, 500: 3},
    "prostate": {0: 0, 1: 1, 2: 2},
}
SPLITS = {"mscmrseg": (35, 45, 2019), "prostate": (22, 32, 2018)}  # train of all patients, seed


def prepare_volumes(dataset: str, source: Path, root: Path, download: bool) -> None:
    """Files of the owners -> volumes/<volume>.npz and lists/*.txt.

    Nothing is resampled. NIfTI's axes are turned to the left, back and head, so that image and
    label agree, and transposed to [Z, Y, X]. Intensities are min-max normalised per volume.
    """
    volumes = find_volumes(dataset, source)
    require(len(volumes) > 1, f"no two labeled volumes of {dataset} below {source}")
    if dataset == "acdc":
        lists = acdc_lists(source, root, download)
    else:
        lists = random_splits(list(volumes), *SPLITS[dataset])
    listed = sorted({name for names in lists.values() for name in names})
    missing = [name for name in listed if name not in volumes]
    require(not missing, f"{len(missing)} of {len(listed)} listed volumes are not below {source}, "
                         f"among them {missing[:1]}")
    for name in with_progress(listed, f"volumes of {dataset}"):
        path = root / "volumes" / f"{name}.npz"
        if not path.is_file():
            write_volume(path, read_pair(*volumes[name], CLASSES[dataset]))
    for split, names in lists.items():
        lines = [f"{re.split('_(?:frame|LGE)', name)[0]} {name}" for name in names]
        write_lines(root / "lists" / f"{split}.txt", lines)


def find_volumes(dataset: str, source: Path) -> dict[str, tuple[Path, Path]]:
    """{volume: (image, label)} in order of the patients' numbers, of images that have labels."""
    paths = files_below(source)
    images, labels = (find_files(paths, pattern) for pattern in PATTERNS[dataset])
    for name in labels:
        require(name in images, f"{labels[name]} has no image of the same name")
    files = sorted(labels, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    names = files
    if dataset == "acdc":  # SSL4MIS calls the two frames of a patient 01 and 02
        patients = [name.split("_")[0] for name in files]
        require(patients[::2] == patients[1::2], f"not two labeled frames of each in {source}")
        names = [f"{patient}_frame0{1 + place % 2}" for place, patient in enumerate(patients)]
    return {name: (images[file], labels[file]) for name, file in zip(names, files)}


def find_files(paths: list[Path], pattern: str) -> dict[str, Path]:
    """{volume: path}. Raises UserError for two files of one volume."""
    found = {}
    for path in paths:
        match = re.search(f"(?:^|/){pattern}$", path.as_posix(), re.IGNORECASE)
        if match and path.is_file():
            other = found.setdefault(match[1], path)
            require(other is path, f"{path} and {other} are one volume: keep one of them")
    return found


def read_pair(image_path: Path, label_path: Path, classes: dict[int, int]) -> Volume:
    """The volume, checked: shapes alike, intensities finite, no label without a class."""
    files, (image, values), (spacing, _) = zip(read_array(image_path, "image"),
                                               read_array(label_path, "label"))
    with reading(label_path):
        require(None in files or lie_alike(*files), f"{label_path}: its header turns the label "
                f"another way than {image_path}, and elsewhere: save it with the image's affine")
    image, values = image.astype(np.float32), values.astype(np.float64)
    require(image.shape == values.shape and image.ndim == 3,
            f"{label_path}: the label is {list(values.shape)}, its image {list(image.shape)}")
    require(np.isfinite(image).all() and image.min() < image.max(),
            f"{image_path}: the intensities are constant, nan or infinite")
    known = [abs(values - value) < 1e-3 for value in classes]  # a scale factor may leave an error
    label = np.select(known, list(classes.values()), default=IGNORE).astype(np.uint8)
    require(IGNORE not in label,
            f"{label_path} holds {values[label == IGNORE][:1]}, known are {list(classes)}")
    return Volume(min_max(image), label, spacing)


def lie_alike(*files) -> bool:
    """Whether axes of NIfTI files have the same directions or, turned, first voxels one place."""
    from nibabel import orientations

    ways, lps = [orientation(file) for file in files], orientations.axcodes2ornt("LPS")
    first = [file.as_reoriented(orientations.ornt_transform(way, lps)).affine[:, 3]
             for file, way in zip(files, ways)]
    apart = np.abs(np.subtract(*first)).max()
    said = [file.header["sform_code"] + file.header["qform_code"] > 0 for file in files]
    near = said[0] == said[1] and apart < min(files[0].header.get_zooms()[:3])
    return near or np.array_equal(*ways)


def read_array(path: Path, name: str) -> tuple:
    """(NIfTI file or None, [Z, Y, X], spacing in mm): of HDF5 the array `name`, or of NIfTI."""
    with reading(path):
        if path.suffix.lower() == ".h5":
            import h5py

            with h5py.File(path) as file:
                array = np.asarray(file[name])
            require(array.dtype.kind in "biuf" and array.size, f"{path}: no numbers in {name}")
            return None, array, None
        return read_nifti(path, path.parent.name.lower() == "imagestr")  # T2, beside ADC


def random_splits(names: list[str], train: int, total: int, seed: int) -> dict[str, list[str]]:
    """Two splits of ours: the authors' are not in their repository."""
    if len(names) != total:
        print(f"found {len(names)} of {total} patients: not the whole set", flush=True)
    count = len(names) - max(1, round(len(names) * (1 - train / total)))
    lists = {}
    for split, suffix in ((1, ""), (2, "_split2")):
        shuffled = np.random.default_rng([seed, split]).permutation(names).tolist()
        lists[f"train{suffix}"], lists[f"val{suffix}"] = shuffled[:count], shuffled[count:]
    return lists


def acdc_lists(source: Path, root: Path, download: bool) -> dict[str, list[str]]:
    """SSL4MIS's lists: those that lie unchanged below `source`, else fetched."""
    lists = {}
    for split, published in published_lists("acdc").items():
        paths = [path for path in files_below(source) if path.name == f"{split}.list"
                 and hashlib.sha256(path.read_bytes()).hexdigest() == published["sha256"]]
        path = paths[0] if paths else published_list("acdc", split, root, download)
        lists[split] = path.read_text().split()
    return lists


def main() -> None:
    parser = Parser(prog="python -m common.prepare", description=__doc__.split("\n\n")[0])
    parser.add_argument("dataset", choices=("coco", "sbd", "lucchi", *PATTERNS))
    parser.add_argument("--root", type=Path, required=True, help="folder to write")
    parser.add_argument("--source", type=Path, help="folder of what you downloaded (--root)")
    parser.add_argument("--download", action="store_true", help="fetch SBD, or ACDC's lists")
    args = parser.parse_args()
    source = args.source or args.root
    if args.dataset == "coco":
        prepare_coco(source, args.root)
    elif args.dataset == "sbd":
        prepare_sbd(source, args.root, args.download)
    elif args.dataset == "lucchi":
        prepare_lucchi(source, args.root)
    else:
        prepare_volumes(args.dataset, source, args.root, args.download)


if __name__ == "__main__":
    run_main(main)
