"""common/coco.py: polygons and run lengths against COCO's own tools, the official layout, damaged files, runs that end in the middle."""

import concurrent.futures
import copy
import hashlib
import json
import os
import signal
import time
from array import array
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import coco
from common.coco import CLASSES, decode_rle, polygon_mask, prepare
from common.loading import open_mask
from common.runtime import UserError
from programs import refuse, run_as_program, start


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


def error_of(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- polygons


def random_polygons(rng: np.random.Generator, kind: int) -> tuple[list[list[float]], int, int]:
    """One to three polygons and a height and width: any, beyond the image, on whole and half pixels, with corners twice, stars, tiny."""
    height, width = rng.integers(1, 90, 2).tolist()
    polygons = []
    for _ in range(rng.integers(1, 4)):
        points = rng.uniform(0, 1, (rng.integers(3, 40), 2)) * (width, height)
        if kind == 1:
            points = 1.6 * points - 0.3 * np.array([width, height])
        elif kind == 2:
            points = np.rint(2 * points) / 2
        elif kind == 3:
            points = points.round(2)[np.sort(rng.integers(0, len(points), len(points) + 2))]
        elif kind == 4:
            angle, radius = np.sort(rng.uniform(0, 2 * np.pi, len(points))), rng.uniform(0.1, 0.6, len(points))
            points = np.array([width, height]) * (0.5 + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1))
        elif kind == 5:
            points = points[0] + rng.uniform(-2, 2, points.shape)
        polygons.append(points.ravel().tolist())
    return polygons, height, width


def test_polygons_are_those_of_cocos_tools():
    tools = pytest.importorskip("pycocotools.mask", reason="compares with pycocotools where it is installed")
    rng = np.random.default_rng(0)
    for number in range(1000):
        polygons, height, width = random_polygons(rng, number % 6)
        expected = tools.decode(tools.merge(tools.frPyObjects(polygons, height, width)))
        mask = polygon_mask(polygons, height, width)
        assert mask.dtype == bool and mask.shape == (height, width)
        assert np.array_equal(mask, expected), (number, polygons, height, width)


def test_polygons_are_those_that_cocos_tools_drew_before():
    """Where they are not installed: the hash of 200 masks that pycocotools 2.0.11 drew. Coordinates are exact, so that no machine's are others."""
    assert hash_of_masks(lambda polygon, height, width: polygon_mask([polygon], height, width)) == DRAWN_BY_PYCOCOTOOLS


def hash_of_masks(draw) -> str:
    state, masks = 1, hashlib.sha256()
    for number in range(200):
        numbers = []
        for _ in range(2 * (3 + number % 17)):
            state = (1103515245 * state + 12345) % 2**31
            numbers.append((state >> 8) % (7000 if number % 2 else 9000) / 128 - (0 if number % 2 else 8))
        masks.update(np.packbits(np.asarray(draw(numbers, 41, 53), bool)).tobytes())
    return masks.hexdigest()


DRAWN_BY_PYCOCOTOOLS = "69e9a472cfc36165db224aa8ae5aca57748dfab9f086493754ed2e3721dfd298"


def test_the_hash_is_of_cocos_tools():
    tools = pytest.importorskip("pycocotools.mask", reason="compares with pycocotools where it is installed")
    assert hash_of_masks(lambda polygon, height, width: tools.decode(tools.frPyObjects([polygon], height, width)[0])) == DRAWN_BY_PYCOCOTOOLS


@pytest.mark.parametrize("seed", range(6))
def test_convex_polygons_hold_the_pixels_whose_middles_they_hold(seed):
    """Except on the outline, whose corners are rounded to fifths of a pixel."""
    rng = np.random.default_rng(seed)
    angle = np.sort(rng.uniform(0, 2 * np.pi, 9))
    points = np.array([150, 110]) + np.array([130, 90]) * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    middles = np.stack(np.meshgrid(np.arange(300) + 0.5, np.arange(220) + 0.5), axis=2)
    start, end = points, np.roll(points, -1, axis=0)
    side = end - start
    across = np.stack([side[:, 1], -side[:, 0]], axis=1) / np.linalg.norm(side, axis=1, keepdims=True)  # outwards
    outside = np.max([(middles - corner) @ normal for corner, normal in zip(start, across)], axis=0)  # pixels beyond the nearest edge's line
    mask = polygon_mask([points.ravel().tolist()], 220, 300)
    assert mask[outside < -0.6].all() and not mask[outside > 0.6].any()
    assert 0.9 < mask.sum() / (outside < 0).sum() < 1.1 and mask.sum() > 5000


def rectangle(left: float, top: float, right: float, bottom: float) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]


def test_simple_polygons():
    mask = polygon_mask([rectangle(2, 3, 6, 5)], 9, 8)
    assert mask[3:5, 2:6].all() and mask.sum() == 8
    assert polygon_mask([rectangle(0, 0, 8, 9)], 9, 8).all() and polygon_mask([rectangle(-20, -20, 30, 30)], 9, 8).all()
    parts = polygon_mask([rectangle(0, 0, 2, 2), rectangle(1, 1, 4, 4), rectangle(6, 7, 8, 9)], 9, 8)
    assert parts[:2, :2].all() and parts[1:4, 1:4].all() and parts[7:, 6:].all() and parts.sum() == 4 + 9 - 1 + 4  # a union, no hole
    for nothing in (rectangle(20, 20, 30, 30), rectangle(-9, 2, -3, 4), rectangle(3.6, 0, 4.4, 9), [3, 3, 3, 3, 3, 3]):
        assert not polygon_mask([nothing], 9, 8).any()
    assert not polygon_mask([], 9, 8).any()


@pytest.mark.parametrize("polygon, reason", [
    ([1, 2, 3, 4, 5, 6, 7], "7 coordinates, an odd number"), ([1, 2, 3, 4], "2 points"), ([], "0 points"), ([1, 2, 3, 4, 5, float("nan")], "no numbers"),
    ([1, 2, 3, 4, 5, float("inf")], "no numbers"), ([1, 2, 3, 4, 5, 2e5], "beyond 100000 pixels"), ([1, 2, 3, 4, 5, 10**400], "not a list of numbers"),
    ([1, 2, 3, 4, 5, "6"], "not a list of numbers"), ([[1, 2], [3, 4], [5, 6]], "not a list of numbers"), ("123456", "not a list of numbers"),
    (None, "not a list of numbers"), (3, "not a list of numbers"),
])
def test_wrong_polygons(polygon, reason):
    assert reason in error_of(polygon_mask, [rectangle(1, 1, 4, 4), polygon], 9, 8)


# ---------------------------------------------------------------- run lengths


def run_lengths(mask: np.ndarray) -> list[int]:
    runs, value = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


def compress(runs: list[int]) -> str:
    text = ""
    for index, run in enumerate(runs):
        value, more = run - (runs[index - 2] if index > 2 else 0), True
        while more:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(48 + bits + 32 * more)
    return text


def masks_to_encode() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    masks = [rng.uniform(size=rng.integers(1, 30, 2)) < share for share in (0.02, 0.3, 0.5, 0.9) for _ in range(20)]
    masks += [np.zeros((7, 5), bool), np.ones((7, 5), bool), np.ones((1, 1), bool), np.zeros((700, 900), bool)]
    masks[-1][3, 1] = masks[-1][600:, 700:] = True  # runs of one pixel between runs of hundred thousands
    return masks


def test_run_lengths_round_trip():
    for mask in masks_to_encode():
        runs = run_lengths(mask)
        for counts in (runs, np.array(runs), compress(runs), compress(runs).encode()):
            decoded = decode_rle(counts, *mask.shape)
            assert decoded.dtype == bool and np.array_equal(decoded, mask)


def test_compressed_run_lengths_are_those_of_cocos_tools():
    tools = pytest.importorskip("pycocotools.mask", reason="compares with pycocotools where it is installed")
    for mask in masks_to_encode():
        assert tools.encode(np.asfortranarray(mask, np.uint8))["counts"].decode() == compress(run_lengths(mask))


def test_known_run_lengths():
    expected = np.zeros((100, 60), bool)
    expected[10:40, 5:8] = True
    assert np.array_equal(decode_rle([510, 30, 70, 30, 70, 30, 5260], 100, 60), expected)
    assert np.array_equal(decode_rle("n?n0V2000VR5", 100, 60), expected)


@pytest.mark.parametrize("counts, reason", [
    ([3, 4], "do not add up to the 4 x 5 pixels"), ([21], "do not add up"), ([], "no list of whole numbers"), ([10, -5, 15], "do not add up"),
    ([2**62] * 4 + [20], "do not add up"), ([10.0, 10.0], "no list of whole"), (["10", "10"], "no list of whole"), ([10**30, 10], "no list of whole"),
    ([[10, 10]], "no list of whole"), ([[1], [2, 3]], "no list of whole"), (None, "no list of whole"), (20, "no list of whole"), ("4", "do not add up"),
    ("", "no list of whole"), ("~0", "are damaged"), (" ", "are damaged"), ("4P", "are damaged"), (b"\xff", "are damaged"), ("é", "are damaged"),
])
def test_wrong_run_lengths(counts, reason):
    assert reason in error_of(decode_rle, counts, 4, 5)


# ---------------------------------------------------------------- the official layout

IDS = [*range(1, 12), *range(13, 26), 27, 28, *range(31, 45), *range(46, 66), 67, 70, *range(72, 83), *range(84, 91)]
PERSON, CAT, TABLE, CAKE, BRUSH = (CLASSES.index(name) for name in ("person", "cat", "dining table", "cake", "toothbrush"))


def image(number: int, width: int = 50, height: int = 40) -> dict:
    return {"license": 3, "file_name": f"{number:012}.jpg", "coco_url": f"http://images.cocodataset.org/train2017/{number:012}.jpg", "height": height,
            "width": width, "date_captured": "2013-11-14 11:18:45", "flickr_url": "http://farm9.staticflickr.com/1_z.jpg", "id": number}


def annotation(image_id: int, label: int, segmentation, crowd: int = 0) -> dict:
    return {"segmentation": segmentation, "area": 1.5, "iscrowd": crowd, "image_id": image_id, "bbox": [1.0, 2.0, 3.0, 4.0],
            "category_id": IDS[label - 1], "id": annotation.count.__next__()}


annotation.count = iter(range(900100000000, 900200000000))


def write_split(root: Path, split: str, content: dict) -> None:
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    for entry in content["images"]:
        (root / split / entry["file_name"]).touch()  # never read


def official(images: list[dict], annotations: list[dict]) -> dict:
    categories = [{"supercategory": "thing", "id": number, "name": name} for number, name in zip(IDS, CLASSES[1:], strict=True)]
    return {"info": {"year": 2017}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}


CROWD = np.zeros((40, 50), bool)
CROWD[25:40, 20:50] = True  # smaller than the table that lies over it


@pytest.fixture
def content() -> dict:
    """The training split: four images, not in the order of their numbers, and annotations in no order at all."""
    return official([image(522418), image(9), image(318219, 30, 60), image(554625)], [
        annotation(318219, BRUSH, [rectangle(0, 0, 2, 3), rectangle(5, 50, 30, 60)]),
        annotation(522418, CAKE, [rectangle(12, 12, 20, 16)]),
        annotation(9, CAT, [rectangle(15, 15, 25, 30)]),
        annotation(522418, TABLE, [rectangle(10, 10, 40, 30)]),  # under the cake and over the crowd, though it is listed between them
        annotation(9, PERSON, {"counts": run_lengths(CROWD), "size": [40, 50]}, crowd=1),
        annotation(522418, PERSON, {"counts": compress(run_lengths(CROWD)), "size": [40, 50]}, crowd=1),
        annotation(318219, CAT, [rectangle(1, 1, 3, 3)]),  # as large as the next one, which lies over it
        annotation(318219, PERSON, [rectangle(2, 2, 4, 4)]),
    ])


@pytest.fixture
def root(tmp_path, content) -> Path:
    write_split(tmp_path / "coco", "train2017", content)
    write_split(tmp_path / "coco", "val2017", official([image(139, 20, 10)], [annotation(139, CAT, [rectangle(0, 0, 20, 10)])]))
    return tmp_path / "coco"


def expected_masks(crowd: int) -> dict[str, np.ndarray]:
    desk, pet, tall, empty = np.zeros((40, 50), np.uint8), np.zeros((40, 50), np.uint8), np.zeros((60, 30), np.uint8), np.zeros((40, 50), np.uint8)
    desk[25:, 20:], pet[25:, 20:] = crowd, crowd
    desk[10:30, 10:40], desk[12:16, 12:20] = TABLE, CAKE
    pet[15:30, 15:25] = CAT
    tall[:3, :2] = tall[50:, 5:] = BRUSH
    tall[1:3, 1:3], tall[2:4, 2:4] = CAT, PERSON
    return {"000000522418": desk, "000000000009": pet, "000000318219": tall, "000000554625": empty}


def assert_masks(root: Path, crowd: int = PERSON) -> None:
    for name, expected in expected_masks(crowd).items():
        path = root / "masks" / "train2017" / f"{name}.png"
        with Image.open(path) as picture:
            assert picture.mode == "L" and picture.format == "PNG" and picture.palette is None
        assert np.array_equal(open_mask(path, len(CLASSES)), expected), name
    assert np.array_equal(open_mask(root / "masks" / "val2017" / "000000000139.png", len(CLASSES)), np.full((10, 20), CAT))
    assert [len(list((root / "masks" / split).iterdir())) for split in coco.SPLITS] == [4, 1]  # nothing else


def times(root: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (root / "masks").glob("*/*.png")}


def test_classes():
    assert len(CLASSES) == len(set(CLASSES)) == 81 and len(IDS) == 80
    names = dict(zip(IDS, CLASSES[1:]))  # some of COCO's own pairs, around the gaps between its ids
    assert (names[1], names[11], names[13], names[25], names[27], names[44], names[46]) == (
        "person", "fire hydrant", "stop sign", "giraffe", "backpack", "bottle", "wine glass")
    assert (names[65], names[67], names[70], names[72], names[82], names[84], names[90]) == (
        "bed", "dining table", "toilet", "tv", "refrigerator", "book", "toothbrush")


def test_masks_of_both_splits(root, capsys):
    prepare(root, workers=1)
    assert_masks(root)
    text = capsys.readouterr().out
    assert "train2017: 4 images (1 without objects), 0 masks made before, 4 to make" in text and f"4 masks in {root / 'masks' / 'train2017'}" in text


def test_crowds_can_be_ignored(root, monkeypatch, capfd):
    """By the command, which makes masks of the other kind anew."""
    prepare(root, workers=1)
    status, out, err = run_as_program("common/coco.py", monkeypatch, capfd, "--root", root, "--crowd", "ignore", "--workers", 1)
    assert status == 0, err
    assert_masks(root, crowd=255)
    assert "--crowd takes one of class, ignore, not 'none'" in refuse("common/coco.py", monkeypatch, capfd, "--root", root, "--crowd", "none")
    assert "--workers takes a number from 1 on" in refuse("common/coco.py", monkeypatch, capfd, "--root", root, "--workers", 0)


def test_masks_are_as_cocos_tools_make_them(root):
    COCO = pytest.importorskip("pycocotools.coco", reason="compares with pycocotools where it is installed").COCO
    prepare(root, workers=1)
    tool = COCO(root / "annotations" / "instances_train2017.json")
    for number in tool.getImgIds():
        label = open_mask(root / "masks" / "train2017" / f"{number:012}.png", len(CLASSES))
        annotations = tool.loadAnns(tool.getAnnIds(imgIds=number))
        covered = np.zeros(label.shape, bool)
        for entry in annotations:
            covered |= tool.annToMask(entry).astype(bool)
        assert np.array_equal(label > 0, covered)


def test_numbers_are_kept_in_arrays(root):
    """Lists of floats would take four times the memory: gigabytes for the training split."""
    jobs = coco.read_jobs(coco.annotation_file(root, "train2017"), root)
    shapes = [entry.segmentation for job in jobs for entry in job.annotations if not entry.crowd]
    assert len(shapes) == 6 and all(type(polygon) is array for shape in shapes for polygon in shape)
    assert [len(job.annotations) for job in jobs] == [3, 2, 3, 0]


# ---------------------------------------------------------------- resuming


def test_finished_masks_are_kept(root, capsys, monkeypatch):
    prepare(root, workers=1)
    before = times(root)
    (root / "masks" / "train2017" / "000000000009.png").unlink()
    prepare(root, workers=1)
    after = times(root)
    assert after.pop("000000000009.png") > before.pop("000000000009.png") and after == before
    assert "3 masks made before, 1 to make" in capsys.readouterr().out
    assert_masks(root)
    monkeypatch.setattr(coco, "read_jobs", None)  # half a gigabyte need not be read again
    prepare(root, workers=1)
    assert "train2017: all 4 masks were made before" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["touch", "size", "format"])
def test_masks_of_another_file_are_made_again(root, content, change, monkeypatch):
    prepare(root, workers=1)
    stray = root / "masks" / "train2017" / "000000000077.png"
    stray.write_bytes(b"of an image that is listed no more")
    path = coco.annotation_file(root, "train2017")
    state = path.stat()
    if change == "touch":
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    elif change == "format":
        monkeypatch.setattr(coco, "FORMAT", coco.FORMAT + 1)
    else:
        content["annotations"] = []
        path.write_text(json.dumps(content))
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    for mask in (root / "masks" / "train2017").glob("*.png"):
        mask.write_bytes(b"old")
    prepare(root, workers=1)
    assert not stray.exists()
    if change == "size":
        assert not open_mask(root / "masks" / "train2017" / "000000522418.png", len(CLASSES)).any()
    else:
        assert_masks(root)


def test_a_run_that_ends_while_it_removes_old_masks(root, monkeypatch):
    """The masks that are left are not taken for new ones afterwards."""
    prepare(root, workers=1)
    unlink, removed = Path.unlink, []

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".png" and len(removed) == 2:
            raise KeyboardInterrupt
        removed.append(path)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(root, workers=1, crowd="ignore")
    monkeypatch.undo()
    prepare(root, workers=1, crowd="ignore")
    assert_masks(root, crowd=255)


def test_a_damaged_file_does_not_cost_the_masks(root):
    prepare(root, workers=1)
    before = times(root)
    coco.annotation_file(root, "train2017").write_text('{"images": [')
    error_of(prepare, root, workers=1)
    assert times(root) == before


@pytest.mark.parametrize("note", [None, "", "[1]", "{"])
def test_masks_from_elsewhere_are_not_touched(root, note):
    """UniMatch's, say, unpacked where ours would lie."""
    (root / "masks" / "train2017").mkdir(parents=True)
    (root / "masks" / "train2017" / "000000000009.png").write_bytes(b"theirs")
    if note is not None:
        (root / "masks" / "train2017.json").write_text(note)
    assert "holds 1 masks that were not made by this program" in error_of(prepare, root, workers=1)
    assert (root / "masks" / "train2017" / "000000000009.png").read_bytes() == b"theirs"


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    """kill -9 in the middle of two workers: none stays behind, finished masks are whole and kept, and the end is that of a run left alone."""
    root, rng = tmp_path / "coco", np.random.default_rng(0)
    images = [image(number, 240, 180) for number in range(1, 151)]
    annotations = []
    for number in range(1, 151):
        for label in rng.integers(1, 81, 8).tolist():
            annotations.append(annotation(number, label, [(rng.uniform(0, 1, (30, 2)) * (240, 180)).round(2).ravel().tolist()]))
    write_split(root, "train2017", official(images, annotations))
    write_split(root, "val2017", official([image(300)], []))
    folder = root / "masks" / "train2017"
    process = start("-m", "common.coco", "--root", root, "--workers", 2)
    while not (folder.is_dir() and len(list(folder.glob("*.png"))) >= 5):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)  # waits for the workers too: they hold the pipes
    before = times(root)
    assert 5 <= len(before) < 150 and not (root / "masks" / "val2017").exists()
    prepare(root, workers=1)
    after = times(root)
    assert len(after) == 151 and all(after[name] == before[name] for name in before)
    jobs = {job.path.name: job for job in coco.read_jobs(coco.annotation_file(root, "train2017"), folder)}
    for name in [*before, "000000000150.png"]:
        job = jobs[name]
        assert np.array_equal(open_mask(folder / name, len(CLASSES)), coco.label_map(job.annotations, job.height, job.width)), name
    assert json.loads((root / "masks" / "train2017.json").read_text())["masks"] == 150


def test_a_worker_that_is_ended(root, monkeypatch):
    class Pool:
        def __init__(self, *arguments, **options):
            pass

        def submit(self, *arguments):
            future = concurrent.futures.Future()
            future.set_exception(BrokenProcessPool("terminated abruptly"))
            return future

        def shutdown(self, cancel_futures):
            assert cancel_futures

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(coco, "CHUNK", 1)
    assert "ended from outside" in error_of(prepare, root, workers=2)


def test_workers_get_their_own_images_alone(root, monkeypatch):
    """In the order of the file, each once, and without a copy of the others' annotations."""
    given = []

    class Pool:
        def __init__(self, workers, *arguments, **options):
            assert workers == 2

        def submit(self, call, jobs, *arguments):
            given.append([job.path.stem for job in jobs])
            assert call is coco.draw_chunk and sum(len(job.annotations) for job in jobs) <= 5
            future = concurrent.futures.Future()
            future.set_result(call(jobs, *arguments))
            return future

        def shutdown(self, cancel_futures):
            pass

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(coco, "CHUNK", 2)
    prepare(root, workers=5)
    assert given == [["000000522418", "000000000009"], ["000000318219", "000000554625"]]
    assert_masks(root)


# ---------------------------------------------------------------- what can be wrong


def spoil(root: Path, content: dict, change) -> str:
    content = copy.deepcopy(content)
    change(content)
    coco.annotation_file(root, "train2017").write_text(json.dumps(content))
    message = error_of(prepare, root, workers=1)
    assert str(coco.annotation_file(root, "train2017")) in message
    return message


@pytest.mark.parametrize("change, reason", [
    (lambda c: c.pop("images"), "holds no list 'images'"), (lambda c: c.update(annotations={}), "holds no list 'annotations'"),
    (lambda c: c.pop("categories"), "holds no list 'categories'"), (lambda c: c["images"].clear(), "lists no image"),
    (lambda c: c["categories"].pop(), "categories are not the 80"), (lambda c: c["categories"][3].update(name="plane"), "categories are not the 80"),
    (lambda c: c["categories"][3].update(id=3), "categories are not the 80"), (lambda c: c["categories"].append(c["categories"][0]), "categories are not the 80"),
    (lambda c: c["categories"].append(7), "categories are not the 80"), (lambda c: c["categories"][0].pop("id"), "categories are not the 80"),
    (lambda c: c["images"].append(7), "an image has no id, height or width"), (lambda c: c["images"][1].pop("height"), "an image has no id, height or width"),
    (lambda c: c["images"][1].update(width=0), "an image has no id, height or width"), (lambda c: c["images"][1].update(id="9"), "an image has no id"),
    (lambda c: c["images"][1].update(file_name="COCO_train2014_000000000009.jpg"), "not 000000000009.jpg as in 2017"),
    (lambda c: c["images"][1].update(file_name="../000000000009.jpg"), "not 000000000009.jpg"), (lambda c: c["images"][1].pop("file_name"), "is called None"),
    (lambda c: c["images"].append(c["images"][1]), "image 9 is listed twice"),
    (lambda c: c["annotations"][2].update(image_id=10), "belongs to the image 10, which is not listed"),
    (lambda c: c["annotations"][2].update(image_id=[9]), "belongs to the image [9]"), (lambda c: c["annotations"][2].pop("image_id"), "belongs to the image None"),
    (lambda c: c["annotations"][2].update(category_id=12), "has the category 12, which is not listed"),
    (lambda c: c["annotations"][2].pop("category_id"), "has the category None"), (lambda c: c["annotations"][2].update(category_id={}), "has the category {}"),
    (lambda c: c["annotations"][2].pop("segmentation"), "an annotation has no segmentation"), (lambda c: c["annotations"].append(7), "an annotation has no segmentation"),
    (lambda c: c["annotations"][2].update(segmentation=[]), "neither polygons nor run lengths"),
    (lambda c: c["annotations"][2].update(segmentation="x"), "neither polygons nor run lengths"),
    (lambda c: c["annotations"][2].update(segmentation=[[1, 2, 3, 4, 5]]), "5 coordinates, an odd number"),
    (lambda c: c["annotations"][2].update(segmentation=[[1, 2, 3, 4]]), "a polygon has 2 points"),
    (lambda c: c["annotations"][2].update(segmentation=[[1, 2, 3, 4, 5, None]]), "not a list of numbers"),
    (lambda c: c["annotations"][2].update(segmentation=[[1, 2, 3, 4, 5, 10**400]]), "not a list of numbers"),
    (lambda c: c["annotations"][2].update(segmentation=[[1, 2, 3, 4, 5, float("nan")]]), "no numbers"),
    (lambda c: c["annotations"][4]["segmentation"].update(size=[50, 40]), "the size of its run lengths is [50, 40], the image's [40, 50]"),
    (lambda c: c["annotations"][4]["segmentation"].pop("counts"), "no list of whole numbers: 'None'"),
    (lambda c: c["annotations"][4]["segmentation"]["counts"].pop(), "do not add up to the 40 x 50 pixels"),
    (lambda c: c["annotations"][4]["segmentation"].update(counts="~"), "are damaged"),
])
def test_a_damaged_or_foreign_file(root, content, change, reason):
    message = spoil(root, content, change)
    assert reason in message
    if "an annotation" not in reason and any(word in reason for word in ("polygon", "run lengths", "category", "belongs")):
        assert "annotation 9001" in message  # by its number in the file


def test_a_truncated_file(root, content):
    path = coco.annotation_file(root, "train2017")
    whole = path.read_bytes()
    for part in (b"", whole[: len(whole) // 2], whole[:-1], b"\xff\xfe\x00", b"[]", b"7", b'{"images": ' + b"[" * 100000):
        path.write_bytes(part)
        message = error_of(prepare, root, workers=1)
        assert str(path) in message and ("cannot be read as JSON" in message or "holds no list 'images'" in message)
    assert not (root / "masks").exists()


def test_what_is_missing(root, monkeypatch, capfd):
    """Of either split, before anything is read."""
    monkeypatch.setattr(coco, "read_jobs", None)
    annotations = root / "annotations" / "instances_val2017.json"
    annotations.rename(root / "aside")
    assert refuse("common/coco.py", monkeypatch, capfd, "--root", root).startswith(f"error: no file {annotations}: unpack annotations_trainval2017.zip")
    (root / "aside").rename(annotations)
    (root / "val2017").rename(root / "aside")
    assert f"no folder {root / 'val2017'}: unpack val2017.zip" in error_of(prepare, root)
    assert "no file" in error_of(prepare, root / "nowhere")


def test_missing_images_are_told(root, capsys):
    (root / "train2017" / "000000318219.jpg").unlink()
    prepare(root, workers=1)
    assert f"train2017: 1 of 4 images are not in {root / 'train2017'}, the first is 000000318219.jpg" in capsys.readouterr().out
    assert_masks(root)


def test_masks_that_cannot_be_written(root):
    (root / "masks").write_text("a file")
    assert "cannot write" in error_of(prepare, root, workers=1)
