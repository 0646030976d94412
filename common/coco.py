"""COCO 2017 for semantic segmentation: label maps of 81 classes, made once from the official instance annotations.

    python -m common.coco --root data/coco

ROOT holds what COCO gives out: annotations/instances_{train,val}2017.json and the pictures {train,val}2017/*.jpg. Written are
masks/{train,val}2017/<12 digits>.png, 8-bit grey without a palette: 0 = background, 1 to 80 = the categories in the order of their ids.
This is the layout of UniMatch's users, whose lists name these files.

Instances overlap and crowds are drawn roughly, so that a label map is a choice. We found no word on how the benchmark's masks were made:
PseudoSeg's repository reads 81 classes and 255 from files that it has no script for, and UniMatch hands out finished masks.

                    torchvision's references               here
    instances       all                                    all, from the largest to the smallest, equal sizes in file order
    overlaps        255                                    the smaller instance, so that the cake is not hidden by the table
    crowd regions   as any instance                        their class, below all instances; --crowd ignore: 255 where no instance lies
    polygons        by COCO's own tools                    as by COCO's own tools, pixel for pixel

Scores on these masks and on UniMatch's may differ by what is said here; compare methods on one of them.
"""

import argparse
import concurrent.futures
import contextlib
import json
import multiprocessing
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.augment import IGNORE
from common.files import names_below, write_json
from common.pictures import save_png
from common.runtime import UserError, run_main

CLASSES = (
    "background", "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light", "fire hydrant",
    "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack",
    "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove",
    "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv",
    "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase",
    "scissors", "teddy bear", "hair drier", "toothbrush",
)
SPLITS = ("train2017", "val2017")
IMAGES = {"train": 118_287, "val": 5_000}
CROWDS = ("class", "ignore")  # what a crowd region becomes
FORMAT = 1  # of the notes beside the masks and of what the masks hold; masks of another one are made again
CHUNK = 64  # images a worker gets at a time
FINE = 5  # steps a pixel in which COCO's tools walk along a polygon
FARTHEST = 100_000  # coordinates up to which a polygon is believed, in pixels


class Annotation(NamedTuple):
    id: int
    image_id: int
    category_id: int  # as in the file; the class in a `Job`
    crowd: bool
    segmentation: list | dict  # polygons, or the run lengths of a region


class Job(NamedTuple):
    """A mask to draw."""

    path: Path
    height: int
    width: int
    annotations: list[Annotation]


def prepare(root: Path, workers: int | None = None, crowd: str = "class") -> None:
    """Write the masks of both splits into `root`/masks; those made before from the same JSON are kept.

    A note beside the masks, masks/<split>.json, says what they were made from. Prints progress. Raises UserError for anything missing or wrong.
    """
    root = Path(root)
    if workers is not None and workers < 1:
        raise UserError(f"--workers takes a number from 1 on, not {workers}")
    if crowd not in CROWDS:
        raise UserError(f"--crowd takes one of {', '.join(CROWDS)}, not {crowd!r}")
    for split in SPLITS:  # before minutes are spent on the first
        if not annotation_file(root, split).is_file():
            raise UserError(f"no file {annotation_file(root, split)}: unpack annotations_trainval2017.zip of https://cocodataset.org into {root}")
        if not (root / split).is_dir():
            raise UserError(f"no folder {root / split}: unpack {split}.zip of https://cocodataset.org into {root}")
    for split in SPLITS:
        prepare_split(root, split, workers, crowd)


def prepare_split(root: Path, split: str, workers: int | None, crowd: str) -> None:
    source, folder, note = annotation_file(root, split), root / "masks" / split, root / "masks" / f"{split}.json"
    state = source.stat()
    origin = {"format": FORMAT, "source": [source.name, state.st_size, state.st_mtime_ns], "crowd": crowd}
    known = read_note(note)
    present = {path.name for path in folder.glob("*.png")} if folder.is_dir() else set()
    if present and not known:
        raise UserError(f"{folder} holds {len(present)} masks that were not made by this program: train on them as they are, or move them away")
    same = all(known.get(name) == value for name, value in origin.items())
    if same and known.get("masks") == len(present):
        print(f"{split}: all {len(present)} masks were made before", flush=True)
        return
    print(f"{split}: reading {source}", flush=True)
    jobs = read_jobs(source, folder)
    if not same:  # only now that there is something to replace them with; the note comes last, so that a killed run does this again
        for name in present:
            (folder / name).unlink(missing_ok=True)
        present = set()
        write_json(note, origin)
    pictures = {path.name for path in (root / split).iterdir()}
    missing = [job for job in jobs if f"{job.path.stem}.jpg" not in pictures]
    if missing:
        print(f"{split}: {len(missing)} of {len(jobs)} images are not in {root / split}, the first is {missing[0].path.stem}.jpg", flush=True)
    todo = [job for job in jobs if job.path.name not in present]
    empty = sum(not job.annotations for job in jobs)
    print(f"{split}: {len(jobs)} images ({empty} without objects), {len(jobs) - len(todo)} masks made before, {len(todo)} to make", flush=True)
    draw_all(split, todo, source, workers, crowd)
    write_json(note, {**origin, "masks": len(jobs)})
    print(f"{split}: {len(jobs)} masks in {folder}", flush=True)


def annotation_file(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}.json"


def read_note(path: Path) -> dict:
    """What the masks were made from; nothing where there is no note or a damaged one."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


# ---------------------------------------------------------------- reading the annotations


def read_jobs(source: Path, folder: Path) -> list[Job]:
    """The masks of all images in the order of the file. Raises UserError for a file that is not COCO 2017's."""
    try:
        with open(source, encoding="utf-8") as file:
            content = json.load(file, object_hook=compact)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{source} cannot be read as JSON: {error}; unpack or download it again") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{source} holds no list {key!r}: is it COCO's {source.name}?")
    categories = class_of_category(content["categories"], source)
    jobs: dict[int, Job] = {}
    for image in content["images"]:
        sizes = [image.get(key) for key in ("id", "height", "width")] if isinstance(image, dict) else [None]
        if not all(type(size) is int and size > 0 for size in sizes):
            raise UserError(f"{source}: an image has no id, height or width: {str(image)[:80]!r}")
        number, height, width = sizes
        if image.get("file_name") != f"{number:012}.jpg":
            raise UserError(f"{source}: image {number} is called {image.get('file_name')!r}, not {number:012}.jpg as in 2017: "
                            f"is it another year's file?")
        if number in jobs:
            raise UserError(f"{source}: image {number} is listed twice")
        jobs[number] = Job(folder / f"{number:012}.png", height, width, [])
    if not jobs:
        raise UserError(f"{source} lists no image")
    for annotation in content["annotations"]:
        if not isinstance(annotation, Annotation):
            raise UserError(f"{source}: an annotation has no segmentation: {str(annotation)[:80]!r}; is it COCO's {source.name}?")
        if type(annotation.image_id) is not int or annotation.image_id not in jobs:
            raise UserError(f"{source}: annotation {annotation.id} belongs to the image {annotation.image_id!r}, which is not listed")
        if type(annotation.category_id) is not int or annotation.category_id not in categories:
            raise UserError(f"{source}: annotation {annotation.id} has the category {annotation.category_id!r}, which is not listed")
        jobs[annotation.image_id].annotations.append(annotation._replace(category_id=categories[annotation.category_id]))
    return list(jobs.values())


def compact(value: dict) -> dict | Annotation:
    """json's hook: an annotation as soon as it is read, its numbers in arrays: 8 bytes each instead of a list's 32.

    What is no list of numbers stays as it is, for `region` to name.
    """
    if "segmentation" not in value:
        return value
    shape = value["segmentation"]
    if isinstance(shape, list):
        with contextlib.suppress(TypeError, OverflowError):
            shape = [array("d", polygon) for polygon in shape]
    return Annotation(value.get("id"), value.get("image_id"), value.get("category_id"), bool(value.get("iscrowd")), shape)


def class_of_category(categories: list, source: Path) -> dict[int, int]:
    """{id in the file: class}. Raises UserError if they are not COCO's 80."""
    try:
        names = {category["id"]: category["name"] for category in categories}
        order = sorted(names)
        known = len(categories) == len(order) and tuple(names[number] for number in order) == CLASSES[1:]
    except (TypeError, KeyError):
        known = False
    if not known:
        raise UserError(f"{source}: the categories are not the {len(CLASSES) - 1} of COCO's instances, in the order of their ids")
    return {number: index for index, number in enumerate(order, 1)}


# ---------------------------------------------------------------- drawing


def draw_all(split: str, jobs: list[Job], source: Path, workers: int | None, crowd: str) -> None:
    """Every mask, in processes that get only what they draw. Raises UserError at the first that cannot be drawn; the others are kept."""
    from common.convert import default_workers, follow_parent  # which needs common.data, which may need this module

    chunks = [jobs[start : start + CHUNK] for start in range(0, len(jobs), CHUNK)]
    workers, done = min(workers or default_workers(), len(chunks)), 0
    if workers <= 1:
        for chunk in chunks:
            draw_chunk(chunk, source, crowd)
            done = show_progress(split, done, len(chunk), len(jobs))
        return
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=follow_parent)
    try:
        futures = {pool.submit(draw_chunk, chunk, source, crowd): len(chunk) for chunk in chunks}
        for future in concurrent.futures.as_completed(futures):
            future.result()
            done = show_progress(split, done, futures[future], len(jobs))
    except concurrent.futures.BrokenExecutor as error:
        raise UserError("a worker process was ended from outside, perhaps for want of memory: run the same command again with --workers 1 "
                        "(finished masks are kept)") from error
    finally:
        pool.shutdown(cancel_futures=True)


def show_progress(split: str, done: int, more: int, total: int) -> int:
    """The new number of masks done; printed on a terminal at every call, elsewhere at every tenth of them."""
    if sys.stdout.isatty():
        print(f"\r\033[K{split}: {done + more} of {total}", end="\n" if done + more == total else "", flush=True)
    elif (done + more) * 10 // total != done * 10 // total:
        print(f"{split}: {done + more} of {total}", flush=True)
    return done + more


def draw_chunk(jobs: list[Job], source: Path, crowd: str) -> None:
    for job in jobs:
        try:
            picture = Image.fromarray(label_map(job.annotations, job.height, job.width, crowd))
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        save_png(picture, job.path)


def label_map(annotations: Sequence[Annotation], height: int, width: int, crowd: str = "class") -> np.ndarray:
    """uint8 [H, W]: crowds, then instances over them, each kind from the largest to the smallest. `category_id` is the class.

    Raises UserError, naming the annotation, for a region that cannot be drawn.
    """
    regions = [region(annotation, height, width) for annotation in annotations]
    sizes = [np.count_nonzero(mask) for mask in regions]  # of what is seen; the file's "area" may be missing in an edited one
    label = np.zeros((height, width), np.uint8)
    for index in sorted(range(len(regions)), key=lambda index: (not annotations[index].crowd, -sizes[index])):  # stable: then file order
        ignored = annotations[index].crowd and crowd == "ignore"
        np.copyto(label, IGNORE if ignored else annotations[index].category_id, where=regions[index])
    return label


def region(annotation: Annotation, height: int, width: int) -> np.ndarray:
    """bool [H, W]. Raises UserError for what is neither polygons nor run lengths of this image."""
    shape = annotation.segmentation
    try:
        if isinstance(shape, dict):
            if shape.get("size") != [height, width]:
                raise UserError(f"the size of its run lengths is {shape.get('size')}, the image's {[height, width]}")
            return decode_rle(shape.get("counts"), height, width)
        if not isinstance(shape, list) or not shape:
            raise UserError(f"its segmentation is neither polygons nor run lengths but {str(shape)[:40]!r}")
        return polygon_mask(shape, height, width)
    except UserError as error:
        raise UserError(f"annotation {annotation.id}: {error}") from error


def polygon_mask(polygons: Sequence[Sequence[float]], height: int, width: int) -> np.ndarray:
    """bool [H, W]: the union of `polygons`, each [x1, y1, x2, y2, ...] in pixels, as pycocotools fills them, pixel for pixel.

    Raises UserError for a polygon of an odd number of coordinates, of fewer than three points, or with coordinates that are no sensible
    numbers. (pycocotools drops an odd last number, and takes four numbers for a box; COCO's files hold neither.)
    """
    mask = np.zeros((height, width), bool)
    for polygon in polygons:
        try:
            points = np.frombuffer(array("d", polygon)).reshape(-1, 2)
        except (TypeError, OverflowError) as error:
            raise UserError(f"a polygon is not a list of numbers: {str(polygon)[:40]!r}") from error
        except ValueError as error:
            raise UserError(f"a polygon has {len(polygon)} coordinates, an odd number") from error
        if len(points) < 3:
            raise UserError(f"a polygon has {len(points)} points: three are the fewest")
        if not (np.abs(points) <= FARTHEST).all():  # nor for nan
            raise UserError(f"a polygon has coordinates that are no numbers or beyond {FARTHEST} pixels")
        columns, rows = crossings(points, height, width)
        if len(columns) == 0:  # between the middles of two columns, or outside
            continue
        left, right, top, bottom = columns.min(), columns.max() + 1, rows.min(), rows.max()
        counts = np.bincount((rows - top) * (right - left) + columns - left, minlength=(bottom - top + 1) * (right - left))
        odd = (counts & 1).astype(bool).reshape(-1, right - left)
        mask[top:bottom, left:right] |= np.logical_xor.accumulate(odd, axis=0)[:-1]
    return mask


def crossings(points: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the outline of the polygon `points`, float64 [N, 2], meets the middles of the pixel columns: (columns, rows), int64.

    A pixel is inside if an odd number of crossings of its column lie at its row or above. As COCO's tools do it: corners are rounded to a
    grid of FINE x FINE steps a pixel; every edge is walked in unit steps along its longer side, from its lower end, with the other coordinate
    rounded; a step from one fine column to the next crosses a pixel column if the lower of both is the pixel's middle one, and counts from
    the first row whose middle is not above the upper end of the step.
    """
    corners = (FINE * points + 0.5).astype(np.int64)  # towards zero, which matters for negative numbers: a cast in C
    ends = np.roll(corners, -1, axis=0)
    step = ends - corners
    steep = np.abs(step[:, 1]) > np.abs(step[:, 0])
    along, across = np.where(steep, step[:, 1], step[:, 0]), np.where(steep, step[:, 0], step[:, 1])
    length, back = np.abs(along), along < 0
    slope = np.where(back, -across, across) / np.maximum(length, 1)
    low = np.where(back[:, None], ends, corners)
    low_along, low_across = np.where(steep, low[:, 1], low[:, 0]), np.where(steep, low[:, 0], low[:, 1])

    edge = np.repeat(np.arange(len(points)), length + 1)
    walked = np.arange(len(edge)) - np.repeat(np.cumsum(length + 1) - length - 1, length + 1)
    walked = np.where(back[edge], length[edge] - walked, walked)
    a, b = low_along[edge] + walked, (low_across[edge] + slope[edge] * walked + 0.5).astype(np.int64)
    x, y = np.where(steep[edge], b, a), np.where(steep[edge], a, b)

    lower = np.where(x[1:] < x[:-1], x[1:], x[1:] - 1)
    middle = (x[1:] != x[:-1]) & (lower % FINE == FINE // 2) & (lower >= 0) & (lower < FINE * width)
    upper = np.minimum(y[1:], y[:-1])[middle]
    return lower[middle] // FINE, np.clip((upper + FINE // 2) // FINE, 0, height)


def decode_rle(counts: Sequence[int] | str | bytes, height: int, width: int) -> np.ndarray:
    """bool [H, W] of COCO's run lengths, which go down the columns and begin with the zeros: a list, or its compressed string.

    Raises UserError if they are no run lengths of such an image.
    """
    try:
        runs = np.asarray(decompress(counts) if isinstance(counts, (str, bytes)) else counts)
    except ValueError:  # lists of different lengths in it
        runs = np.zeros(0)
    if runs.ndim != 1 or runs.dtype.kind not in "iu":
        raise UserError(f"its run lengths are no list of whole numbers: {str(counts)[:40]!r}")
    if (runs < 0).any() or (runs > height * width).any() or runs.sum() != height * width:
        raise UserError(f"its run lengths do not add up to the {height} x {width} pixels of the image")
    values = np.arange(len(runs)) % 2 == 1
    return np.ascontiguousarray(np.repeat(values, runs).reshape(width, height).T)


def decompress(text: str | bytes) -> list[int]:
    """The run lengths in COCO's string. A character less "0" is five bits of a number, low ones first, and a sixth if more of it follow.

    Numbers have a sign, and from the fourth on they are differences to the last but one. Raises UserError for a string that is none.
    """
    codes = [ord(letter) - 48 for letter in text] if isinstance(text, str) else [letter - 48 for letter in text]
    if not all(0 <= code < 64 for code in codes) or codes and codes[-1] & 32:
        raise UserError("its compressed run lengths are damaged")
    runs: list[int] = []
    value = shift = 0
    for code in codes:
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


# ---------------------------------------------------------------- lists


def listed(root: Path, split: str, sample_class) -> list:
    """All pictures of "train" or "val" with their masks, which are made if there are none. Raises UserError unless all pictures are there."""
    folder = f"{split}2017"
    pictures = sorted(name for name in names_below(root, folder) if name.endswith(".jpg"))
    if len(pictures) != IMAGES[split]:
        raise UserError(f"{root} has {len(pictures)} pictures in {folder}, COCO has {IMAGES[split]}: fetch {folder}.zip and annotations_trainval2017.zip "
                        f"from https://cocodataset.org and unpack them there")
    if not (root / "masks").is_dir():
        prepare(root)
    return located([sample_class(name, None) for name in pictures], root, with_masks=True)


def located(samples: list, root: Path, with_masks: bool = False) -> list:
    """The samples with masks where they are: ours in masks/train2017, UniMatch's in masks itself. `with_masks`: also those that name none."""
    known = {folder: {path.name for path in (root / folder).glob("*.png")} for folder in ("masks", "masks/train2017", "masks/val2017")}
    placed = []
    for sample in samples:
        name, mask = f"{Path(sample.image).stem}.png", None
        if sample.mask is not None or with_masks:
            mask = f"masks/{name}" if name in known["masks"] else f"masks/{Path(sample.image).parent.name}/{name}"
        placed.append(type(sample)(sample.image, mask))
    return placed


# ---------------------------------------------------------------- command line


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m common.coco", description="COCO 2017: semantic masks from the instance annotations.")
    parser.add_argument("--root", type=Path, required=True, help="folder with annotations/, train2017/ and val2017/; masks/ is written there")
    parser.add_argument("--workers", type=int, help="processes; default: one per core, 8 at most")
    parser.add_argument("--crowd", default="class", help="what crowd regions become: class (of their objects) or ignore (255)")
    args = parser.parse_args()
    prepare(args.root, args.workers, args.crowd)


if __name__ == "__main__":
    run_main(main)
