"""common/data.py and common/loading.py: lists, splits, downloads, damaged pictures, and what every rank and worker sees."""

import hashlib
import http.client
import io
import multiprocessing
import os
import random
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import daw
from common import loading
from common.data import DATASETS, VOC_CLASSES, Data, PublishedList, Sample, load_data, published_list, read_list, voc_folder
from common.loading import EvaluationSet, SampleStream, TrainingBatches, TrainingSet, evaluation_loader, open_image, open_mask, training_loader
from common.options import TrainingOptions
from common.runtime import Context, UserError

CPU = torch.device("cpu")
ALONE = Context(0, 1, CPU)


def write_list(folder: Path, text: str, name: str = "list.txt") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def error_of(function, *arguments) -> str:
    """The message of the UserError that the call raises: one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- lists


def test_list_formats(tmp_path):
    path = write_list(tmp_path, "2007_000032\n\n  2007_000039  \r\na/left.png b/left_label.png\nJPEGImages/x.jpg\t m/x.png\n\nonly.jpeg\n")
    assert read_list(path) == [
        Sample("JPEGImages/2007_000032.jpg", "SegmentationClass/2007_000032.png"),
        Sample("JPEGImages/2007_000039.jpg", "SegmentationClass/2007_000039.png"),
        Sample("a/left.png", "b/left_label.png"),
        Sample("JPEGImages/x.jpg", "m/x.png"),
        Sample("only.jpeg", None),
    ]
    assert [sample.name for sample in read_list(path)] == ["2007_000032", "2007_000039", "left", "x", "only"]


@pytest.mark.parametrize("bad, says", [
    ("first", "twice"),  # listed above already
    ("JPEGImages/first.jpg SegmentationClass/other.png", "twice"),  # the same image under its full name
    ("../outside.jpg mask.png", "inside"),
    ("a/../../outside.jpg mask.png", "inside"),
    ("image.jpg ../mask.png", "inside"),
    ("/etc/passwd.jpg mask.png", "inside"),
    ("image.jpg /etc/mask.png", "inside"),
    ("image.jpg mask.png extra", "expected"),
])
def test_bad_lines_are_named(tmp_path, bad, says):
    path = write_list(tmp_path, f"first\n\nsecond\n{bad}\nlast\n")
    message = error_of(read_list, path)
    assert str(path) in message and "line 4" in message and says in message


@pytest.mark.parametrize("spelling", ["./JPEGImages/first.jpg mask.png", "JPEGImages//first.jpg mask.png", "JPEGImages/./first.jpg mask.png"])
def test_another_spelling_of_a_path_is_the_same_image(tmp_path, spelling):
    path = write_list(tmp_path, f"first\n{spelling}\n")
    message = error_of(read_list, path)
    assert str(path) in message and "line 2" in message and "twice" in message


def test_missing_and_empty_lists(tmp_path):
    assert str(tmp_path / "no.txt") in error_of(read_list, tmp_path / "no.txt")
    for text in ("", "\n  \n\n"):
        path = write_list(tmp_path, text)
        assert str(path) in error_of(read_list, path)


# ---------------------------------------------------------------- folder and splits


@pytest.fixture
def voc(voc_root, monkeypatch) -> TrainingOptions:
    """Options of a data set with pascal's classes whose lists are all in `voc_root`; 3 of the 9 training images are labeled."""
    info = replace(DATASETS["pascal"], name="tinyvoc", full_list="train", labeled_lists=(), default_labeled="3")
    monkeypatch.setitem(DATASETS, "tinyvoc", info)
    lists = voc_root / "ImageSets" / "Segmentation"
    write_list(lists, "".join(f"{name}\n" for name in ids(voc_root)[1:8:3]), "labeled_3.txt")
    return TrainingOptions(dataset="tinyvoc", data_root=str(voc_root), crop=49, batch_size=4, num_workers=0)


def ids(root: Path, name: str = "train") -> list[str]:
    return (root / "ImageSets" / "Segmentation" / f"{name}.txt").read_text().split()


def test_labeled_and_unlabeled_make_up_the_full_list(voc, voc_root):
    data = load_data(voc, ALONE)
    labeled, unlabeled = [[sample.name for sample in samples] for samples in (data.labeled, data.unlabeled)]
    assert labeled == ids(voc_root, "labeled_3") and len(unlabeled) == 6
    assert set(labeled).isdisjoint(unlabeled) and sorted(labeled + unlabeled) == ids(voc_root)
    assert [sample.name for sample in data.val] == ids(voc_root, "val") and data.tune == []
    assert all(sample.mask is None for sample in data.unlabeled)  # masks of unlabeled images are not read
    assert data.root == voc_root and data.info.num_classes == 21


def test_masks_of_unlabeled_images_need_not_exist(voc, voc_root):
    for name in set(ids(voc_root)) - set(ids(voc_root, "labeled_3")):
        (voc_root / "SegmentationClass" / f"{name}.png").unlink()
    assert len(load_data(voc, ALONE).unlabeled) == 6


def test_labeled_all_and_unknown_splits(voc, voc_root):
    data = load_data(replace(voc, labeled="all"), ALONE)
    assert [sample.name for sample in data.labeled] == ids(voc_root) and data.unlabeled == []
    message = error_of(load_data, replace(voc, labeled="17"), ALONE)
    assert "17" in message and "3" in message.split("takes")[1]
    message = error_of(load_data, replace(voc, dataset="nonsense"), ALONE)
    assert "nonsense" in message and "pascal" in message and "shapes" in message
    message = error_of(load_data, TrainingOptions(dataset="pascal", data_root=str(voc_root), labeled="93"), ALONE)
    assert "1464" in message or "--download" in message


def test_a_list_of_ones_own(voc, voc_root, tmp_path):
    own = write_list(tmp_path, "\n".join(f"JPEGImages/{name}.jpg SegmentationClass/{name}.png" for name in ids(voc_root)[:2]), "own.txt")
    data = load_data(replace(voc, labeled_list=str(own)), ALONE)
    assert [sample.name for sample in data.labeled] == ids(voc_root)[:2]
    assert [sample.name for sample in data.unlabeled] == ids(voc_root)[2:]
    missing_mask = write_list(tmp_path, f"JPEGImages/{ids(voc_root)[0]}.jpg", "bare.txt")
    assert "no mask" in error_of(load_data, replace(voc, labeled_list=str(missing_mask)), ALONE)


def test_an_unlabeled_list_of_ones_own(voc, voc_root, tmp_path):
    own = write_list(tmp_path, "".join(f"{name}\n" for name in ids(voc_root)[:5]), "own.txt")
    data = load_data(replace(voc, unlabeled_list=str(own)), ALONE)
    assert [sample.name for sample in data.labeled] == ids(voc_root, "labeled_3")
    assert [sample.name for sample in data.unlabeled] == [name for name in ids(voc_root)[:5] if name not in ids(voc_root, "labeled_3")]
    leaked = ids(voc_root, "val")[0]
    write_list(tmp_path, f"{leaked}\n", "own.txt")
    assert f"JPEGImages/{leaked}.jpg" in error_of(load_data, replace(voc, unlabeled_list=str(own)), ALONE)


def test_training_without_an_unlabeled_image_is_refused(voc, tmp_path, keep_signal_handlers):
    config = daw.Config(**{**vars(voc), "labeled": "all", "backbone": "tiny", "weights": "none", "iterations": 1, "device": "cpu",
                           "output": str(tmp_path / "run")})
    assert "unlabeled" in error_of(daw.train, config)


def test_validation_images_in_training_lists_are_refused(voc, voc_root, tmp_path):
    leaked = ids(voc_root, "val")[1]
    own = write_list(tmp_path, f"{ids(voc_root)[0]}\n{leaked}\n", "own.txt")
    message = error_of(load_data, replace(voc, labeled_list=str(own)), ALONE)
    assert f"JPEGImages/{leaked}.jpg" in message and "labeled" in message and "val" in message
    own = write_list(tmp_path, f"{ids(voc_root)[0]}\n./JPEGImages/{leaked}.jpg ./SegmentationClass/{leaked}.png\n", "own.txt")
    assert leaked in error_of(load_data, replace(voc, labeled_list=str(own)), ALONE)
    lists = voc_root / "ImageSets" / "Segmentation"
    write_list(lists, "".join(f"{name}\n" for name in [leaked, *ids(voc_root)]), "train.txt")
    message = error_of(load_data, voc, ALONE)
    assert f"JPEGImages/{leaked}.jpg" in message and "unlabeled" in message


@pytest.mark.parametrize("folder, ending, which", [
    ("JPEGImages", "jpg", "labeled_3"), ("SegmentationClass", "png", "labeled_3"), ("JPEGImages", "jpg", "train"),
    ("JPEGImages", "jpg", "val"), ("SegmentationClass", "png", "val")])
def test_a_missing_file_is_named(voc, voc_root, folder, ending, which):
    path = voc_root / folder / f"{ids(voc_root, which)[0]}.{ending}"
    path.unlink()
    message = error_of(load_data, voc, ALONE)
    assert str(path) in message and "missing" in message


def test_voc_folder(tmp_path):
    message = error_of(voc_folder, tmp_path)
    assert str(tmp_path) in message and "--data-root" in message
    assert "nowhere" in error_of(voc_folder, tmp_path / "nowhere")
    for layout in (tmp_path / "a", tmp_path / "b" / "VOC2012", tmp_path / "c" / "VOCdevkit" / "VOC2012"):
        (layout / "JPEGImages").mkdir(parents=True)
    assert voc_folder(tmp_path / "a") == tmp_path / "a"
    assert voc_folder(tmp_path / "b") == tmp_path / "b" / "VOC2012"
    assert voc_folder(tmp_path / "c") == tmp_path / "c" / "VOCdevkit" / "VOC2012"


def test_pascals_entry():
    info = DATASETS["pascal"]
    assert info.num_classes == len(set(VOC_CLASSES)) == 21 and not info.unlabeled_truth
    assert info.full_list.lines == 10582
    lists = dict(info.labeled_lists)
    counts = {"1/16": 662, "1/8": 1323, "1/4": 2646, "u2pl_1/16": 662, "u2pl_1/8": 1323, "u2pl_1/4": 2646}
    counts |= {str(n): n for n in (92, 183, 366, 732, 1464, 662, 1323, 2646)} | {f"usrn_{n}": n for n in (165, 331, 662)}
    assert {name: source.lines for name, source in lists.items()} == counts
    assert lists["662"] == lists["1/16"] != lists["u2pl_1/16"] != lists["usrn_662"]
    sources = [info.full_list, *lists.values()]
    assert len({source.sha256 for source in sources}) == 15 and all(len(source.sha256) == 64 for source in sources)  # three names are second ones
    assert all(lists[name].rooted == name.startswith("usrn") for name in lists)
    assert info.full_list.url == ("https://raw.githubusercontent.com/LiheYoung/UniMatch/"
                                  "0324f3dd4a22128105a5eb135d2586c0bb3cc647/splits/pascal/train_aug.txt")
    assert info.palette[:3] == ((0, 0, 0), (128, 0, 0), (0, 128, 0)) and info.palette[255] == (224, 224, 192)


# ---------------------------------------------------------------- published lists


CONTENT = b"JPEGImages/a.jpg SegmentationClass/a.png\nJPEGImages/b.jpg SegmentationClass/b.png\n"
SOURCE = PublishedList("owner/repository", "c" * 40, "splits/two.txt", 2, hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def network(monkeypatch) -> SimpleNamespace:
    """Instead of the network: `answer` is the bytes of any page, or the exception that fetching raises."""
    fake = SimpleNamespace(answer=CONTENT, asked=[])

    def urlopen(url, *arguments, **options):
        fake.asked.append(url)
        if isinstance(fake.answer, Exception):
            raise fake.answer
        return io.BytesIO(fake.answer)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return fake


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_published_list_is_downloaded_once(tmp_path, network):
    path = published_list(SOURCE, tmp_path, True)
    assert path.read_bytes() == CONTENT and files_below(tmp_path) == [path]
    assert network.asked == ["https://raw.githubusercontent.com/owner/repository/" + "c" * 40 + "/splits/two.txt"]
    assert [sample.image for sample in read_list(path)] == ["JPEGImages/a.jpg", "JPEGImages/b.jpg"]
    network.answer = OSError("the network must not be asked again")
    assert published_list(SOURCE, tmp_path, True) == published_list(SOURCE, tmp_path, False) == path


def test_a_list_with_another_checksum_is_refused(tmp_path, network):
    network.answer = CONTENT + b"\n"
    message = error_of(published_list, SOURCE, tmp_path, True)
    assert SOURCE.url in message and SOURCE.sha256[:12] in message
    assert files_below(tmp_path) == []  # nothing wrong is kept
    network.answer = CONTENT
    path = published_list(SOURCE, tmp_path, True)
    path.write_bytes(CONTENT.replace(b"b.jpg", b"c.jpg"))  # changed on the disk
    for download in (False, True):
        assert str(path) in error_of(published_list, SOURCE, tmp_path, download)


def test_offline_and_without_download(tmp_path, network):
    message = error_of(published_list, SOURCE, tmp_path, False)
    assert "--download" in message and "--labeled-list" in message and SOURCE.url in message and network.asked == []
    for failure in (urllib.error.URLError("Name or service not known"), TimeoutError("timed out"), ConnectionResetError("reset"),
                    urllib.error.HTTPError(SOURCE.url, 404, "Not Found", None, None), http.client.IncompleteRead(b"JPEG", 90)):
        network.answer = failure
        assert SOURCE.url in error_of(published_list, SOURCE, tmp_path, True)
        assert files_below(tmp_path) == []


def test_pascal_reads_its_published_lists(voc_root, monkeypatch):
    """load_data with lists as published: pairs of paths, below <data root>/splits."""
    lines = [f"JPEGImages/{name}.jpg SegmentationClass/{name}.png\n" for name in ids(voc_root)]
    sources = []
    for path, content in (("splits/full.txt", "".join(lines)), ("splits/2/labeled.txt", "".join(lines[3:5]))):
        sources.append(PublishedList("owner/repository", "d" * 40, path, 0, hashlib.sha256(content.encode()).hexdigest()))
        file = voc_root / "splits" / "owner_repository" / ("d" * 10) / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    info = replace(DATASETS["pascal"], full_list=sources[0], labeled_lists=(("2", sources[1]),))
    monkeypatch.setitem(DATASETS, "pascal", info)
    data = load_data(TrainingOptions(dataset="pascal", data_root=str(voc_root), labeled="2"), ALONE)
    assert [sample.name for sample in data.labeled] == ids(voc_root)[3:5]
    assert [sample.name for sample in data.unlabeled] == ids(voc_root)[:3] + ids(voc_root)[5:]
    assert "2" in error_of(load_data, TrainingOptions(dataset="pascal", data_root=str(voc_root), labeled="3"), ALONE)


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize(("mode", "suffix"), [("L", "png"), ("LA", "png"), ("RGBA", "png"), ("P", "png"), ("1", "png"), ("CMYK", "jpg"), ("L", "jpg"), ("RGB", "bmp")])
def test_pictures_of_every_mode_are_read_as_rgb(tmp_path, mode, suffix):
    grey = np.repeat(np.arange(0, 256, 5, dtype=np.uint8)[None], 7, axis=0)
    if mode == "1":
        grey = np.where(grey > 100, 255, 0).astype(np.uint8)
    picture = Image.fromarray(grey).convert("RGB")
    picture = picture.quantize(256) if mode == "P" else picture.convert(mode)  # fewer colours than that: nothing is lost
    picture.save(tmp_path / f"picture.{suffix}")
    read = open_image(tmp_path / f"picture.{suffix}")
    assert read.mode == "RGB" and read.size == (52, 7)
    assert np.abs(np.asarray(read).astype(int) - grey[..., None]).max() <= (6 if suffix == "jpg" else 0)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path, suffix):
    values = np.linspace(0, 65535, 60).astype(np.uint16).reshape(6, 10)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    read = np.asarray(open_image(tmp_path / f"deep.{suffix}"))
    assert read.shape == (6, 10, 3) and np.abs(read[..., 0] - values / 65535 * 255).max() < 1 and read.max() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(tmp_path, orientation):
    """The camera's note says how to turn the stored picture; viewers and our masks show it turned."""
    stored = np.zeros((8, 16, 3), np.uint8)
    stored[:4, :8] = 255  # a mark in the stored picture's top left
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "photo.png", exif=exif)
    read = np.asarray(open_image(tmp_path / "photo.png"))
    assert read.shape == ((8, 16, 3) if orientation < 5 else (16, 8, 3))
    row, column = np.argwhere(read[..., 0]).mean(axis=0) < (np.array(read.shape[:2]) - 1) / 2
    corner = {1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left", 5: "top left", 6: "top right", 7: "bottom right", 8: "bottom left"}
    assert f"{'top' if row else 'bottom'} {'left' if column else 'right'}" == corner[orientation]



def some_mask(root: Path) -> Path:
    return root / "SegmentationClass" / f"{ids(root)[0]}.png"


def test_masks_of_every_kind_of_file(tmp_path):
    values = np.random.default_rng(0).integers(0, 21, (11, 13), dtype=np.uint8)
    values[0] = 255
    palette = Image.fromarray(values).copy()
    palette = Image.frombytes("P", (13, 11), values.tobytes())
    palette.putpalette(list(range(255, -1, -1)) * 3)
    for name, image in (("palette", palette), ("grey", Image.fromarray(values)), ("deep", Image.fromarray(values.astype(np.uint16)))):
        path = tmp_path / f"{name}.png"
        image.save(path)
        mask = open_mask(path, 21)
        assert mask.dtype == np.uint8 and np.array_equal(mask, values), name
    binary = tmp_path / "binary.png"
    Image.fromarray(values > 10).save(binary)
    assert np.array_equal(open_mask(binary, 2), (values > 10).astype(np.uint8))


def test_the_fixture_is_what_pascal_looks_like(voc_root):
    sizes, classes = set(), set()
    for name in ids(voc_root) + ids(voc_root, "val"):
        with Image.open(voc_root / "JPEGImages" / f"{name}.jpg") as image, Image.open(voc_root / "SegmentationClass" / f"{name}.png") as mask:
            assert image.mode == "RGB" and mask.mode == "P" and image.size == mask.size
            sizes.add(image.size)
        values = set(np.unique(open_mask(voc_root / "SegmentationClass" / f"{name}.png", 21)).tolist())
        assert {0, 255} < values
        classes |= values
    assert classes == {*range(21), 255} and len(sizes) > 5 and all(width % 2 and height % 2 for width, height in sizes)


@pytest.mark.parametrize("label", [21, 200, 254])
def test_a_label_out_of_range_is_named(voc_root, label):
    path = some_mask(voc_root)
    values = open_mask(path, 21).copy()
    values[4, 5] = label
    Image.fromarray(values).save(path)
    message = error_of(open_mask, path, 21)
    assert str(path) in message and str(label) in message and "21" in message


def test_a_16_bit_label_out_of_range_is_not_wrapped(tmp_path):
    Image.fromarray(np.full((4, 4), 256 + 3, np.uint16)).save(tmp_path / "deep.png")
    assert "259" in error_of(open_mask, tmp_path / "deep.png", 21)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_a_coloured_mask_is_refused(tmp_path, mode):
    Image.new(mode, (8, 6)).save(tmp_path / "mask.png")
    message = error_of(open_mask, tmp_path / "mask.png", 21)
    assert str(tmp_path / "mask.png") in message and mode in message


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_cut_off_and_foreign_files_are_named(voc_root, kind):
    path = voc_root / "JPEGImages" / f"{ids(voc_root)[0]}.jpg" if kind == "image" else some_mask(voc_root)
    read = open_image if kind == "image" else lambda path: open_mask(path, 21)
    content = path.read_bytes()
    read(path)
    for length in range(0, len(content) - 30, 7):
        path.write_bytes(content[:length])
        assert str(path) in error_of(read, path)
    path.write_text("<html>404</html>")
    assert str(path) in error_of(read, path)
    path.unlink()
    assert str(path) in error_of(read, path)


def test_images_are_read_as_rgb(tmp_path):
    for mode in ("L", "RGBA", "P", "CMYK"):
        path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (7, 5)).save(path)
        image = open_image(path)
        assert image.mode == "RGB" and image.size == (7, 5)


def test_a_mask_of_another_size_is_named(voc, voc_root):
    data = load_data(voc, ALONE)
    path = voc_root / data.labeled[0].mask
    mask = open_mask(path, 21)
    Image.fromarray(mask.T.copy()).save(path)
    with Image.open(voc_root / data.labeled[0].image) as image:
        assert image.width != image.height
    for read in (lambda: TrainingSet(data, 33, 0)[(0, 0, 0)], lambda: EvaluationSet(data.labeled, data.root, 21)[0]):
        message = error_of(read)
        assert str(path) in message and f"{mask.shape[0]}x{mask.shape[1]}" in message and f"{mask.shape[1]}x{mask.shape[0]}" in message


def test_evaluation_items_are_the_files(voc, voc_root):
    data = load_data(voc, ALONE)
    for index, item in enumerate(EvaluationSet(data.val, data.root, 21)):
        if index == len(data.val):
            break
        name = ids(voc_root, "val")[index]
        with Image.open(voc_root / "JPEGImages" / f"{name}.jpg") as image:
            pixels = np.asarray(image)
        assert item["name"] == name and item["image"].dtype == item["label"].dtype == torch.uint8
        assert np.array_equal(item["image"].numpy().transpose(1, 2, 0), pixels)
        assert np.array_equal(item["label"].numpy(), open_mask(voc_root / "SegmentationClass" / f"{name}.png", 21))


def test_class_pixels(voc, voc_root):
    data = load_data(voc, ALONE)
    counts = [0] * 21
    for name in ids(voc_root, "labeled_3"):
        for value in open_mask(voc_root / "SegmentationClass" / f"{name}.png", 21).ravel().tolist():
            if value != 255:
                counts[value] += 1
    assert loading.class_pixels(data).tolist() == counts and 0 < sum(counts)


# ---------------------------------------------------------------- order of samples


def lists_of(labeled: int, unlabeled: int) -> Data:
    samples = [[Sample(f"{kind}{n}.jpg", None) for n in range(count)] for kind, count in (("l", labeled), ("u", unlabeled))]
    return Data(DATASETS["pascal"], Path("."), *samples, [], [])


def keys(data: Data, per_rank: int, rank=0, ranks=1, start=0, total=20, seed=3, unlabeled=True) -> list:
    return list(TrainingBatches(data, per_rank, unlabeled, seed, Context(rank, ranks, CPU), start, total))


def test_every_sample_once_a_pass():
    stream = SampleStream(7, seed=1, stream=0)
    passes = [[stream[position] for position in range(7 * number, 7 * number + 7)] for number in range(6)]
    assert all(sorted(order) == list(range(7)) for order in passes)
    assert len({tuple(order) for order in passes}) > 3  # shuffled anew
    assert [stream[position] for position in (40, 3, 12)] == [passes[5][5], passes[0][3], passes[1][5]]  # any order of asking
    others = [[SampleStream(7, seed, number)[position] for position in range(42)] for seed, number in ((2, 0), (1, 1))]
    assert all(other != sum(passes, []) for other in others)


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_ranks_together_see_what_one_process_sees(ranks):
    data = lists_of(5, 23)
    alone = keys(data, 4)
    each = [keys(data, 4 // ranks, rank, ranks) for rank in range(ranks)]
    assert len(alone) == 20 and all(len(key) == 8 for key in alone)
    for step in range(20):
        for stream in (0, 1):  # in the same order too: CutMix mixes neighbours
            together = [key for part in each for key in part[step] if key[0] == stream]
            assert together == [key for key in alone[step] if key[0] == stream]
    assert [sum(key[0] for key in step) for step in alone] == [4] * 20
    drawn = [key[1] for step in alone for key in step if key[0] == 1]
    assert {drawn.count(index) for index in range(23)} == {3, 4}  # 80 draws of 23
    positions = [key[2] for step in alone for key in step if key[0] == 1]
    assert positions == list(range(80))  # so each draw has its own augmentation


def test_a_resumed_run_goes_on_where_it_was():
    data = lists_of(5, 23)
    whole = keys(data, 4)
    for start in (0, 1, 7, 19, 20):
        assert keys(data, 4, start=start) == whole[start:]
        batches = TrainingBatches(data, 4, True, 3, ALONE, start, 20)
        assert len(batches) == 20 - start and list(batches) == list(batches)
    assert keys(data, 4, seed=4) != whole
    assert keys(data, 4, unlabeled=False) == [[key for key in step if key[0] == 0] for step in whole]


def test_training_items(voc):
    data = load_data(voc, ALONE)
    training = TrainingSet(data, 48, seed=0)
    for position in range(12):
        labeled, unlabeled = training[(0, position % 3, position)], training[(1, position % 6, position)]
        assert labeled["image"].shape == (3, 48, 48) and labeled["image"].dtype == labeled["label"].dtype == torch.uint8
        assert (labeled["label"][~labeled["valid"]] == 255).all() and not labeled["image"][:, ~labeled["valid"]].any()
        assert "label" not in unlabeled and unlabeled["valid"].dtype == torch.bool
    again = training[(0, 2, 11)]
    assert torch.equal(again["image"], labeled["image"])
    others = [training[(0, 2, 12)], TrainingSet(data, 48, seed=1)[(0, 2, 11)]]
    assert all(not torch.equal(other["image"], labeled["image"]) for other in others)


def batches_of(data: Data, config, workers: int | None, context=ALONE, start=0) -> list[dict]:
    return list(training_loader(data, replace(config, num_workers=workers), context, start, 4))


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_workers_ranks_and_resuming_change_no_batch(voc):
    data = load_data(voc, ALONE)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    alone = batches_of(data, voc, 0)
    random.seed(1), np.random.seed(1)
    with_workers = batches_of(data, voc, 2)
    assert torch.equal(torch.get_rng_state(), before)  # loaders leave training's random numbers alone
    assert len(alone) == len(with_workers) == 4 and all(map(same, alone, with_workers))
    assert all(map(same, alone[2:], batches_of(data, voc, 0, start=2)))
    halves = [batches_of(data, voc, 0, Context(rank, 2, CPU)) for rank in range(2)]
    for step, whole in enumerate(alone):
        assert same(whole, {name: torch.cat([half[step][name] for half in halves]) for name in whole})
    training = TrainingSet(data, voc.crop, voc.seed)
    for step, key_list in enumerate(TrainingBatches(data, 4, True, voc.seed, ALONE, 0, 4)):
        items = [training[key] for key in key_list]
        for number in range(4):
            assert torch.equal(alone[step]["labeled"][number], items[number]["image"])
            assert torch.equal(alone[step]["label"][number], items[number]["label"])
            assert torch.equal(alone[step]["unlabeled"][number], items[4 + number]["image"])
            assert torch.equal(alone[step]["valid"][number], items[4 + number]["valid"])
    assert {name: (value.dtype, tuple(value.shape)) for name, value in alone[0].items()} == {
        "labeled": (torch.uint8, (4, 3, 49, 49)), "label": (torch.uint8, (4, 49, 49)),
        "unlabeled": (torch.uint8, (4, 3, 49, 49)), "valid": (torch.bool, (4, 49, 49))}


def test_truth_of_unlabeled_images_where_the_data_set_has_it(voc, monkeypatch):
    monkeypatch.setitem(DATASETS, "tinyvoc", replace(DATASETS["tinyvoc"], unlabeled_truth=True))
    data = load_data(voc, ALONE)
    batch = next(iter(training_loader(data, voc, ALONE, 0, 1)))
    assert batch["truth"].shape == (4, 49, 49) and not batch["valid"].all() and (batch["truth"][~batch["valid"]] == 255).all()
    supervised = next(iter(training_loader(data, voc, ALONE, 0, 1, unlabeled=False)))
    assert supervised.keys() == {"labeled", "label"} and torch.equal(supervised["label"], batch["label"])


def test_truth_of_some_unlabeled_images(voc, voc_root, tmp_path, monkeypatch):
    """A list of one's own may name masks for some pictures only, also where the data set reads them for its log."""
    monkeypatch.setitem(DATASETS, "tinyvoc", replace(DATASETS["tinyvoc"], unlabeled_truth=True))
    first, *others = [name for name in ids(voc_root) if name not in ids(voc_root, "labeled_3")]
    own = write_list(tmp_path, "".join(f"JPEGImages/{name}.jpg\n" for name in others) + f"{first}\n")
    data = load_data(replace(voc, unlabeled_list=str(own)), ALONE)
    batches = batches_of(data, voc, 0)
    assert len(batches) == 4 and len({tuple(sorted(batch)) for batch in batches}) == 1  # what is logged does not change on the way


def test_an_error_in_a_worker_names_the_file(voc, voc_root):
    data = load_data(voc, ALONE)
    path = voc_root / data.labeled[0].image
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError) as caught:
        batches_of(data, voc, 1)
    assert str(path) in str(caught.value).strip().splitlines()[-1]


def test_sigterm_ends_a_worker_and_ctrl_c_is_not_its(voc):
    """PyTorch ends workers by SIGTERM where they do not end by themselves: one that ignored it would hang the program."""
    data = load_data(voc, ALONE)
    known = multiprocessing.active_children()
    batches = iter(training_loader(data, replace(voc, num_workers=1), ALONE, 0, 50))
    next(batches)
    (worker,) = [child for child in multiprocessing.active_children() if child not in known]
    assert os.getpgid(worker.pid) != os.getpgrp()  # so a Ctrl-C in the terminal is for the trainer alone
    worker.terminate()
    worker.join(4)
    assert not worker.is_alive()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_evaluation_sees_every_image_once_whatever_the_ranks(voc, count):
    data = load_data(voc, ALONE)
    samples = data.val[:count]
    seen = []
    for rank in range(3):
        for batch in evaluation_loader(samples, data, Context(rank, 3, CPU), 0):
            assert len(batch["name"]) == 1  # pictures differ in size
            seen += batch["name"]
    assert sorted(seen) == sorted(sample.name for sample in samples)
    assert [batch["name"][0] for batch in evaluation_loader(samples, data, ALONE, 0)] == [sample.name for sample in samples]


def test_default_number_of_workers(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(loading.os, "sched_getaffinity", lambda pid: range(16), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert loading.default_workers(Context(0, 1, cuda)) == 8 and loading.default_workers(ALONE) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert loading.default_workers(Context(0, 4, cuda)) == 4
    monkeypatch.setattr(loading.os, "sched_getaffinity", lambda pid: range(2), raising=False)
    assert loading.loader([], None, Context(0, 4, CPU)).num_workers == 0  # never negative
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert loading.default_workers(ALONE) == 1  # a core is left for the network
