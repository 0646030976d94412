"""Real medical data sets, converted once into the form that common.medical reads: volumes/*.npz and lists/*.txt.

`python -m common.medical prepare` calls `prepare`. What --source holds, in any folder below it:

    acdc      SSL4MIS's processed files (patient001_frame01.h5, or its slices patient001_frame01_slice_1.h5), or the challenge's own
              (patient001/patient001_frame01.nii.gz, patient001_frame01_gt.nii.gz). SSL4MIS calls a patient's two annotated frames frame01 and
              frame02 whatever their numbers; so do we. 200 volumes of 100 patients, in SSL4MIS's lists: 70 train, 10 val, 20 test
    mscmrseg  MS-CMRSEG 2019, LGE: patient1_LGE.nii.gz, patient1_LGE_manual.nii.gz. 45 patients: 35 train, 10 val
    prostate  Decathlon's Task05_Prostate: imagesTr/prostate_00.nii.gz (T2 and ADC; we take T2), labelsTr/prostate_00.nii.gz.
              32 patients: 22 train, 10 val

The paper's two random splits of the last two are not in its repository. Ours are permutations of the patients by a fixed seed: train.txt and
val.txt, and train_split2.txt and val_split2.txt. Neither images nor labels are resampled or turned: a NIfTI array [X, Y, Z] is transposed to
[Z, Y, X], which is how SSL4MIS stores it; intensities are min-max normalised per volume.
"""

import concurrent.futures
import gzip
import importlib
import json
import logging
import multiprocessing
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.splits import PublishedList, published_list, verify
from common.files import write_atomically, write_json
from common.medical import DATASETS, Volume, min_max, write_volume
from common.runtime import UserError

FORMAT = 1  # of prepare.json and of what the volumes hold; volumes of another one are converted again


def ssl4mis_list(name: str, lines: int, sha256: str) -> PublishedList:
    return PublishedList("HiLab-git/SSL4MIS", "06df6047a59aba9988ced8331998b5957ecb356b", f"data/ACDC/{name}.list", lines, sha256)


ACDC_LISTS = {
    "train": ssl4mis_list("train", 140, "97a399f7bdbfe96b93cf8731a4bf3dd78562269bada57464fdc0dbc3f0f45746"),
    "val": ssl4mis_list("val", 20, "61b935c936d8e12f7889e82d954f421fa25fb95305e92a476096b3242de8777d"),
    "test": ssl4mis_list("test", 40, "98161bdfaad072bf5713d7345751ab5a2bf3e5468b8edb03fd9ebfedc4503671"),
}


@dataclass(frozen=True)
class Source:
    """What is known of a data set as its owners give it out."""

    patients: int  # in the paper, `train` of them to train on
    train: int
    labels: dict[int, int]  # value in the files -> class
    files: str  # what is looked for below --source
    home: str
    seed: int | None = None  # of our own splits; None: the lists are published


SOURCES = {
    "acdc": Source(100, 70, {0: 0, 1: 1, 2: 2, 3: 3}, "patient001_frame01.h5, patient001_frame01_slice_1.h5 or patient001_frame01_gt.nii.gz",
                   "https://www.creatis.insa-lyon.fr/Challenge/acdc"),
    "mscmrseg": Source(45, 35, {0: 0, 600: 1, 200: 2, 500: 3}, "patient1_LGE_manual.nii.gz beside patient1_LGE.nii.gz",
                       "https://zmiclab.github.io/zxh/0/mscmrseg19", seed=2019),
    "prostate": Source(32, 22, {0: 0, 1: 1, 2: 2}, "labelsTr/prostate_00.nii.gz and imagesTr/prostate_00.nii.gz", "http://medicaldecathlon.com",
                       seed=2018),
}


@dataclass(frozen=True)
class Item:
    """A volume to convert: its files and what their labels mean."""

    patient: str
    volume: str
    images: tuple[Path, ...]  # one file, or the HDF5 slices in order
    label: Path | None  # None: the HDF5 files hold it
    labels: dict[int, int]
    package: str
    first_channel: bool = False  # the image may have channels; only the first is taken

    def fingerprint(self) -> list:
        """Names, sizes and times of the files: another value means another source."""
        files = [*self.images, self.label] if self.label else self.images
        return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def prepare(dataset: str, source: Path, root: Path, download: bool = False, workers: int | None = None) -> None:
    """Convert the `dataset` that lies in `source` into `root`; volumes converted before are kept unless their files have changed.

    Prints progress, one line per volume that cannot be converted, and a summary. Lists are written last, so that a folder with lists is whole.
    Raises UserError for anything missing or wrong.
    """
    source, root = Path(source), Path(root)
    if dataset not in SOURCES:
        raise UserError(f"unknown data set {dataset!r}: --dataset takes one of {', '.join(SOURCES)}")
    if workers is not None and workers < 1:
        raise UserError(f"--workers takes a number from 1 on, not {workers}")
    if not source.is_dir():
        raise UserError(f"no folder {source}: --source takes the folder that holds what you downloaded from {SOURCES[dataset].home}")
    files = files_below(source)
    items = {"acdc": find_acdc, "mscmrseg": find_mscmrseg, "prostate": find_prostate}[dataset](files, source)
    if not items:
        raise UserError(f"no file of {dataset} in {source} or below it: looked for {SOURCES[dataset].files}; get them from {SOURCES[dataset].home}")
    lists = acdc_lists(files, source, root, download) if dataset == "acdc" else random_splits(dataset, items)
    items = listed_items(lists, items, source)
    try:
        importlib.import_module(items[0].package)  # here, not in each worker: one message instead of one per volume
    except ImportError as error:
        raise UserError(f"reading {items[0].images[0].name} needs the package {items[0].package}: pip install {items[0].package}") from error
    converted = convert_all(dataset, items, root, workers)
    patients = {item.volume: item.patient for item in items}
    for name, volumes in lists.items():
        text = "".join(f"{patients[volume]} {volume}\n" for volume in volumes)
        write_atomically(root / "lists" / f"{name}.txt", lambda temporary, text=text: temporary.write_text(text))
    print(summary(dataset, {volume: converted[volume] for volume in patients}, patients, lists, root))


# ---------------------------------------------------------------- what lies in the source


def files_below(source: Path) -> list[Path]:
    """Every file; linked folders are entered, each once."""
    files, seen = [], set()
    for folder, folders, names in os.walk(source, followlinks=True):
        if os.path.realpath(folder) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        files += [Path(folder) / name for name in names]
    return sorted(files)


def matches(files: list[Path], pattern: str, folder: str | None = None) -> dict[tuple, Path]:
    """The files whose whole name matches (so not the ._ doubles that macOS leaves), in a `folder` of that name: {groups as numbers: path}.

    Raises UserError if two files have the same groups.
    """
    found: dict[tuple, Path] = {}
    for path in files:
        match = re.fullmatch(pattern, path.name, re.IGNORECASE) if folder in (None, path.parent.name) else None
        if match:
            key = tuple(int(group) for group in match.groups())
            if key in found:
                raise UserError(f"{path} and {found[key]} are the same volume: keep one of them, or point --source at one copy")
            found[key] = path
    return found


def find_acdc(files: list[Path], source: Path) -> list[Item]:
    stacks: dict[tuple, dict[int, Path]] = {}
    for (patient, frame, number), path in matches(files, r"patient(\d{3})_frame(\d+)_slice_(\d+)\.h5").items():
        stacks.setdefault((patient, frame), {})[number] = path
    whole = matches(files, r"patient(\d{3})_frame(\d+)\.h5")
    images, truths = (matches(files, rf"patient(\d{{3}})_frame(\d+){end}\.nii(?:\.gz)?") for end in ("", "_gt"))
    if (whole or stacks) and truths:
        raise UserError(f"{source} holds both SSL4MIS's .h5 files and the challenge's .nii.gz files: point --source at one of the two")
    keys, items = sorted(whole.keys() | stacks.keys() | truths.keys()), []
    for patient, frame in keys:
        frames = [key[1] for key in keys if key[0] == patient]
        phase = 1 + frames.index(frame) if len(frames) == 2 else frame  # not two: some listed volume will be missing under its own name
        name, label = f"patient{patient:03}", truths.get((patient, frame))
        if label is not None:
            paths = (image_of(label, images.get((patient, frame))),)
        else:
            paths = (whole[patient, frame],) if (patient, frame) in whole else slices_in_order(stacks[patient, frame])
        items.append(Item(name, f"{name}_frame{phase:02}", paths, label, SOURCES["acdc"].labels, "nibabel" if label else "h5py"))
    return items


def slices_in_order(slices: dict[int, Path]) -> tuple[Path, ...]:
    """Raises UserError where a number is missing; they start at 0 or 1."""
    numbers = sorted(slices)
    missing = sorted(set(range(1, numbers[-1])) - set(numbers))
    if missing:
        raise UserError(f"{slices[numbers[-1]]}: slice {missing[0]} of this volume is missing beside it: unpack the archive again")
    return tuple(slices[number] for number in numbers)


def image_of(label: Path, image: Path | None) -> Path:
    if image is None:
        raise UserError(f"{label} has no image of the same name in --source: unpack the archive again, or take the label away")
    return image


def find_mscmrseg(files: list[Path], source: Path) -> list[Item]:
    images = matches(files, r"patient(\d+)_LGE\.nii(?:\.gz)?")
    truths = matches(files, r"patient(\d+)_LGE_(?:manual|gd)\.nii(?:\.gz)?")
    unlabeled = sorted(images.keys() - truths.keys())
    if unlabeled:
        print(f"{len(unlabeled)} images without a label are left out, the first is {images[unlabeled[0]]}")
    return [Item(f"patient{key[0]}", f"patient{key[0]}_LGE", (image_of(label, images.get(key)),), label, SOURCES["mscmrseg"].labels, "nibabel")
            for key, label in sorted(truths.items())]


def find_prostate(files: list[Path], source: Path) -> list[Item]:
    images = matches(files, r"prostate_(\d+)\.nii(?:\.gz)?", "imagesTr")
    truths = matches(files, r"prostate_(\d+)\.nii(?:\.gz)?", "labelsTr")
    for folder in {path.parent.parent for path in images.values()}:
        check_modality(folder / "dataset.json")
    return [Item(f"prostate_{key[0]:02}", f"prostate_{key[0]:02}", (image_of(label, images.get(key)),), label, SOURCES["prostate"].labels,
                 "nibabel", first_channel=True) for key, label in sorted(truths.items())]


def check_modality(path: Path) -> None:
    """Decathlon's dataset.json says which channel is which: the first must be T2. No such file, no check."""
    if not path.is_file():
        return
    try:
        first = json.loads(path.read_text())["modality"]["0"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not say what the images' channels are (modality): unpack the archive again") from error
    if first != "T2":
        raise UserError(f"{path}: the images' first channel is {first!r}, not T2: is this Task05_Prostate?")


# ---------------------------------------------------------------- lists


def acdc_lists(files: list[Path], source: Path, root: Path, download: bool) -> dict[str, list[str]]:
    """SSL4MIS's lists, {name: volumes}: those in the source if they are the published ones, else the ones kept in `root` or downloaded."""
    lists = {}
    for name, published in ACDC_LISTS.items():
        wanted, content = Path(published.path).name, None
        candidates = [path for path in files if path.name == wanted]
        for path in candidates:
            try:
                content = path.read_bytes().replace(b"\r\n", b"\n").rstrip() + b"\n"  # an unpacker may have changed line ends
                verify(content, published, path)
                break
            except (UserError, OSError):
                content = None
        if content is None:
            state = f"{candidates[0]} is not SSL4MIS's list" if candidates else f"no {wanted} in {source} or below it"
            if not download and not any((root / "splits").rglob(wanted)):
                raise UserError(f"{state}: --download fetches it from {published.url}, or fetch it yourself and put it into {source}")
            if candidates:
                print(f"{state}: using the published one")
            content = published_list(published, root, download).read_bytes()
        lists[name] = content.decode().split()
    return lists


def random_splits(dataset: str, items: list[Item]) -> dict[str, list[str]]:
    """{name: volumes} of two splits: a permutation of the patients in order of their numbers, the first part to train and the rest to validate."""
    known, volumes = SOURCES[dataset], [item.volume for item in items]
    if len(items) != known.patients:
        print(f"found {len(items)} of {known.patients} patients: not the paper's set")
    if len(items) < 2:
        raise UserError(f"{dataset} needs 2 patients at least, one to train and one to validate; found {items[0].patient} alone")
    train = len(items) - max(1, round(len(items) * (1 - known.train / known.patients)))
    lists = {}
    for split, suffix in ((1, ""), (2, "_split2")):
        order = [volumes[index] for index in np.random.default_rng([known.seed, split]).permutation(len(volumes))]
        lists[f"train{suffix}"], lists[f"val{suffix}"] = order[:train], order[train:]
    return lists


def listed_items(lists: dict[str, list[str]], items: list[Item], source: Path) -> list[Item]:
    """The items that a list names, in order of their names; ACDC's 50 later patients are in none."""
    names = set().union(*lists.values())
    missing = sorted(names - {item.volume for item in items})
    if missing:
        raise UserError(f"{len(missing)} of {len(names)} listed volumes are not in {source}, the first is {missing[0]}: unpack the whole archive")
    return [item for item in items if item.volume in names]


# ---------------------------------------------------------------- reading


def unreadable(path: Path, form: str, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f"{path} cannot be read as {form}: {reason}; unpack or download it again")


def check_shape(array: np.ndarray, dimensions: int, path: Path) -> None:
    if array.size == 0:
        raise UserError(f"{path} is an empty volume {list(array.shape)}: unpack or download it again")
    if array.ndim != dimensions:
        raise UserError(f"{path} is {array.ndim}-D {list(array.shape)}, where {dimensions}-D is expected: is it another file under this name?")


def read_nifti(path: Path, first_channel: bool = False) -> tuple[np.ndarray, tuple[float, float, float]]:
    """A 3-D image as [Z, Y, X] and its spacing in mm along z, y, x."""
    import nibabel
    from nibabel.openers import ImageOpener

    nibabel.imageglobals.logger.setLevel(logging.CRITICAL)  # what matters is checked here
    try:
        if path.name.lower().endswith(".gz"):
            with gzip.open(path) as file:  # to its end, where the checksum is: nibabel stops at the last voxel
                while file.read(1 << 20):
                    pass
        image = nibabel.load(path)
        array = np.asarray(image.dataobj)
        with ImageOpener(path) as file:  # unchecked: load makes 1 mm of a zero
            zooms = np.abs(type(image.header).from_fileobj(file, check=False).get_zooms()[:3]).astype(float)
    except Exception as error:  # a damaged or foreign file can raise anything; each means the same to the user
        raise unreadable(path, "NIfTI", error) from error
    if first_channel and array.ndim == 4:
        array = array[..., 0]
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    check_shape(array, 3, path)
    if not (np.isfinite(zooms) & (zooms > 0)).all():
        raise UserError(f"{path}: the header gives voxels of {' x '.join(f'{zoom:g}' for zoom in zooms)} mm: mend it or download the file again")
    return array.transpose(2, 1, 0), tuple(float(zoom) for zoom in zooms[::-1])


def read_hdf5(path: Path, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and label of SSL4MIS's volume [Z, H, W] or slice [H, W]."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            missing = [name for name in ("image", "label") if name not in file]
            image, label = (np.asarray(file[name][()]) for name in ("image", "label")) if not missing else (None, None)
    except Exception as error:  # as above
        raise unreadable(path, "HDF5", error) from error
    if missing:
        raise UserError(f"{path} holds no data set {missing[0]}: is it one of SSL4MIS's files?")
    check_shape(image, dimensions, path)
    return image, label


def checked_image(image: np.ndarray, path: Path) -> np.ndarray:
    """As float32. Raises UserError for values that are not finite numbers."""
    if image.dtype.kind not in "biuf":
        raise UserError(f"{path} holds no numbers but {image.dtype}: is it another file under this name?")
    with np.errstate(over="ignore"):
        image = image.astype(np.float32)
    broken = image.size - np.isfinite(image).sum()
    if broken:
        raise UserError(f"{path} holds {broken} intensities that are nan or infinite: download it again or leave it out")
    return image


def class_indices(label: np.ndarray, shape: tuple[int, ...], labels: dict[int, int], path: Path) -> np.ndarray:
    """The file's values as classes, uint8. Raises UserError for another shape than the image's and for any value not in `labels`."""
    if label.shape != shape:
        raise UserError(f"{path}: the label is {list(label.shape)}, its image {list(shape)}: are they of the same patient?")
    if label.dtype.kind not in "biuf":
        raise UserError(f"{path} holds no numbers but {label.dtype}: is it another file under this name?")
    values, indices = np.unique(label, return_inverse=True)
    table = np.zeros(len(values), np.uint8)
    for number, value in enumerate(values):
        whole = round(float(value)) if np.isfinite(value) else None
        if whole is None or abs(float(value) - whole) > 1e-3:  # a header's scale factor may leave a rounding error
            raise UserError(f"{path}: the label holds {value:g}, which is not a whole number: is it a resampled or a soft label?")
        if whole not in labels:
            raise UserError(f"{path}: the label holds {whole}, which stands for no class; known are {', '.join(map(str, sorted(labels)))}")
        table[number] = labels[whole]
    return table[indices].reshape(shape)


def read_item(item: Item) -> Volume:
    """The volume as its files have it, min-max normalised. Raises UserError for anything wrong with them."""
    if item.label is not None:
        (array, spacing), (truth, _) = read_nifti(item.images[0], item.first_channel), read_nifti(item.label)
        image = checked_image(array, item.images[0])
        label = class_indices(truth, image.shape, item.labels, item.label)
    else:
        dimensions = 2 if re.search(r"_slice_\d+$", item.images[0].stem) else 3
        parts, spacing = [], None  # not in these files
        for path in item.images:
            array, truth = read_hdf5(path, dimensions)
            part = checked_image(array, path)
            parts.append((part, class_indices(truth, part.shape, item.labels, path)))
            if part.shape != parts[0][0].shape:
                raise UserError(f"{path} is {list(part.shape)}, the volume's first slice {list(parts[0][0].shape)}: are they of the same volume?")
        image, label = (np.stack(arrays) if dimensions == 2 else arrays[0] for arrays in zip(*parts))
    if image.min() == image.max():
        raise UserError(f"{item.images[0]} is an empty volume: every voxel is {image.min():g}; download it again or leave it out")
    return Volume(min_max(image), label, spacing)


# ---------------------------------------------------------------- converting


def convert(item: Item, path: Path) -> dict | str:
    """Write the volume; returns its entry in prepare.json, or the reason why there is none."""
    try:
        source = item.fingerprint()  # before reading: a file that changes meanwhile is converted again next time
        volume = read_item(item)
        write_volume(path, volume)
    except (UserError, OSError) as error:
        return str(error)
    voxels = np.bincount(volume.label.ravel(), minlength=max(item.labels.values()) + 1)
    return {"source": source, "bytes": path.stat().st_size, "shape": list(volume.image.shape),
            "spacing": None if volume.spacing is None else list(volume.spacing), "voxels": voxels.tolist()}


def convert_all(dataset: str, items: list[Item], root: Path, workers: int | None) -> dict[str, dict]:
    """{volume: its entry in prepare.json}. Converts what is not done yet; raises UserError, when through, if some could not be."""
    manifest = root / "prepare.json"
    done = read_manifest(manifest, dataset)
    paths = {item.volume: root / "volumes" / f"{item.volume}.npz" for item in items}
    todo = [item for item in items if not is_done(done.get(item.volume), item, paths[item.volume])]
    print(f"{dataset}: {len(items)} volumes in the lists, {len(items) - len(todo)} converted before, {len(todo)} to convert", flush=True)
    problems, saved = [], time.monotonic()
    for count, (item, result) in enumerate(run_jobs(todo, paths, min(workers or default_workers(), len(todo))), 1):
        if isinstance(result, str):
            problems.append((item.volume, result))
        else:
            done[item.volume] = result
        if count == len(todo) or time.monotonic() - saved > 0.25:  # what a killed run repeats at most
            write_json(manifest, {"format": FORMAT, "dataset": dataset, "volumes": done})
            saved = time.monotonic()
        show_progress(count, len(todo))
    for _, reason in sorted(problems):
        print(f"error: {reason}", file=sys.stderr, flush=True)
    if problems:
        raise UserError(f"{len(problems)} of {len(items)} volumes could not be converted: mend what is named above and run the same command again "
                        f"(the others are kept)")
    return done


def default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


def run_jobs(items: list[Item], paths: dict[str, Path], workers: int):
    """Yields (item, `convert`'s result) as they are ready."""
    if workers <= 1:
        yield from ((item, convert(item, paths[item.volume])) for item in items)
        return
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=follow_parent)
    try:
        futures = {pool.submit(convert, item, paths[item.volume]): item for item in items}
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()
    except concurrent.futures.BrokenExecutor as error:
        raise UserError("a worker process was ended from outside, perhaps for want of memory: run the same command again with --workers 1 "
                        "(what is converted is kept)") from error
    finally:
        pool.shutdown(cancel_futures=True)


def follow_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and end with it even if it is killed (a pool's idle workers would stay for ever)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def read_manifest(path: Path, dataset: str) -> dict[str, dict]:
    """The volumes converted so far; none where there is no such file, or a damaged or older one: they are converted again."""
    try:
        content = json.loads(path.read_text())
        known, found, volumes = content["format"] == FORMAT, content["dataset"], dict(content["volumes"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    if found != dataset:
        raise UserError(f"{path.parent} holds {found} already: give {dataset} another folder with --root")
    return volumes if known else {}


def is_done(entry: dict | None, item: Item, path: Path) -> bool:
    try:
        return entry is not None and entry["source"] == item.fingerprint() and path.stat().st_size == entry["bytes"]
    except OSError:  # no such file any more
        return False


def show_progress(count: int, total: int) -> None:
    if sys.stdout.isatty():
        print(f"\r\033[Kconverted {count} of {total}", end="\n" if count == total else "", flush=True)
    elif count * 10 // total != (count - 1) * 10 // total:
        print(f"converted {count} of {total}", flush=True)


# ---------------------------------------------------------------- summary


def summary(dataset: str, volumes: dict[str, dict], patients: dict[str, str], lists: dict[str, list[str]], root: Path) -> str:
    """What is in `root`, and the command that trains on it. `volumes`: entries of prepare.json; `patients`: of the volumes."""
    shapes = [entry["shape"] for entry in volumes.values()]
    slices, planes = [shape[0] for shape in shapes], Counter(f"{height} x {width}" for _, height, width in shapes)
    common = ", ".join(f"{plane} ({count})" for plane, count in planes.most_common(3))
    known = np.array([entry["spacing"] for entry in volumes.values() if entry["spacing"]])
    spacing = ", ".join(f"{axis} {low:.3g} / {middle:.3g} / {high:.3g}" for axis, low, middle, high in
                        zip("zyx", known.min(axis=0), np.median(known, axis=0), known.max(axis=0))) if len(known) else "unknown"
    voxels = np.sum([entry["voxels"] for entry in volumes.values()], axis=0)
    shares = ", ".join(f"{name} {100 * share:.2f} %" for name, share in zip(DATASETS[dataset].classes, voxels / voxels.sum()))
    sizes = ", ".join(f"{name} {len({patients[volume] for volume in names})} ({len(names)})" for name, names in lists.items())
    # The paper's share of labeled patients, which is its number of them where all patients are there.
    train = len({patients[volume] for volume in lists["train"]})
    labeled = max(1, round(train * int(DATASETS[dataset].default_labeled) / SOURCES[dataset].train))
    return "\n".join((
        f"patients     {len(set(patients.values()))}, volumes {len(volumes)}",
        f"slices       {sum(slices)}, {min(slices)} to {max(slices)} a volume",
        f"in plane     {common}" + (f" and {len(planes) - 3} other sizes" if len(planes) > 3 else ""),
        f"spacing      {spacing}" + (" (mm: min / median / max)" if len(known) else ""),
        f"labels       {shares}",
        f"lists        {sizes}: patients (volumes), in {root / 'lists'}",
        f"next         python diffrect.py --dataset {dataset} --data-root {shlex.quote(str(root))} --labeled {labeled}",
    ))
