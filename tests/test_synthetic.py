"""common/synthetic.py: files in VOC's layout, determinism, the imbalance dial, and the shipped encoder."""

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import pretrain, synthetic
from common.deeplab import TINY_WEIGHTS, TinyEncoder
from common.runtime import UserError
from common.synthetic import VARIANTS, choose_labeled, draw, generate, voc_palette

SMALL = replace(VARIANTS["shapes"], train=120, val=10, tune=8)
LABELED_NAMES = [f"labeled_{size}{suffix}" for size in (12, 24, 48) for suffix in ("", "_split1", "_split2")]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "shapes"
    generate(folder, SMALL, "small")
    return folder


def read_list(root: Path, name: str) -> list[str]:
    return (root / "ImageSets" / "Segmentation" / f"{name}.txt").read_text().splitlines()


def read_label(root: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(root / "SegmentationClass" / f"{name}.png"))


def contents(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


# ---------------------------------------------------------------- files


def test_palette_is_vocs():
    palette = voc_palette()
    assert palette.dtype == np.uint8 and palette.shape == (256, 3)
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    for label, color in known.items():
        assert tuple(palette[label]) == color
    assert voc_palette(21).shape == (21, 3)


def test_layout_and_formats(root):
    assert {entry.name for entry in root.iterdir()} == {
        "JPEGImages", "SegmentationClass", "ImageSets", "classes.txt", "generator.json"}
    assert (root / "classes.txt").read_text().split() == list(synthetic.SHAPE_CLASSES)
    names = [name for split in ("train", "val", "tune") for name in read_list(root, split)]
    assert {file.stem for file in (root / "JPEGImages").iterdir()} == set(names)
    assert {file.stem for file in (root / "SegmentationClass").iterdir()} == set(names)
    seen = set()
    for name in names:
        image = Image.open(root / "JPEGImages" / f"{name}.jpg")
        label = Image.open(root / "SegmentationClass" / f"{name}.png")
        assert (image.mode, image.format, image.size) == ("RGB", "JPEG", (64, 64))
        assert (label.mode, label.format, label.size) == ("P", "PNG", (64, 64))
        assert np.array_equal(np.array(label.getpalette(), np.uint8).reshape(-1, 3), voc_palette())
        seen |= set(np.unique(label).tolist())
    assert seen == set(range(8)) | {255}


def test_files_hold_what_was_drawn(root):
    for s, split in enumerate(synthetic.SPLITS):
        image, label = draw(SMALL, np.random.default_rng([SMALL.seed, s, 5]))
        assert np.array_equal(read_label(root, f"{split}_000005"), label)
        stored = np.asarray(Image.open(root / "JPEGImages" / f"{split}_000005.jpg")).astype(int)
        assert np.abs(stored - image).mean() < 6  # JPEG at quality 95


def test_borders_are_thin_and_only_at_changes():
    _, label = draw(VARIANTS["shapes"], np.random.default_rng(3))
    border = label == 255
    assert 0 < border.mean() < 0.15
    inner = ~border[:, :-1] & ~border[:, 1:]
    assert (label[:, :-1] == label[:, 1:])[inner].all()  # without a border between them, neighbours agree
    inner = ~border[:-1] & ~border[1:]
    assert (label[:-1] == label[1:])[inner].all()


def test_labels_follow_the_textures():
    """Without noise, horizontal stripes change along y, and only where the label says so."""
    plain = replace(SMALL, noise=(0.0, 0.0), warp=(0.0, 0.0), tilt=0.0, contrast=(0.25, 0.25), saturation=(1.0, 1.0))
    for seed in range(20):
        image, label = draw(plain, np.random.default_rng(seed), ["hstripe"])
        grey = image.astype(float).mean(axis=2)
        across, along = np.abs(np.diff(grey, axis=0))[:, :-1], np.abs(np.diff(grey, axis=1))[:-1]
        one = (label[:-1, :-1] == 1) & (label[1:, :-1] == 1) & (label[:-1, 1:] == 1)
        zero = (label[:-1, :-1] == 0) & (label[1:, :-1] == 0) & (label[:-1, 1:] == 0)
        assert across[one].mean() > 3 * along[one].mean()
        assert across[one].mean() > 3 * across[zero].mean()


# ---------------------------------------------------------------- lists


def test_lists(root):
    splits = {split: read_list(root, split) for split in ("train", "val", "tune")}
    assert {split: len(names) for split, names in splits.items()} == {"train": 120, "val": 10, "tune": 8}
    everything = sum(splits.values(), [])
    assert len(set(everything)) == len(everything)
    chosen = {name: set(read_list(root, name)) for name in LABELED_NAMES}
    for name, members in chosen.items():
        assert len(members) == len(read_list(root, name)) == int(name.split("_")[1])
        assert members <= set(splits["train"])
    for suffix in ("", "_split1", "_split2"):
        assert chosen[f"labeled_12{suffix}"] < chosen[f"labeled_24{suffix}"] < chosen[f"labeled_48{suffix}"]
    assert len({frozenset(chosen[f"labeled_12{suffix}"]) for suffix in ("", "_split1", "_split2")}) == 3


@pytest.mark.parametrize("name", LABELED_NAMES)
def test_labeled_lists_cover_the_classes(root, name):
    wanted = {12: 2, 24: 3, 48: 4}[int(name.split("_")[1])]
    labels = [read_label(root, member) for member in read_list(root, name)]
    for k in range(1, 8):
        assert sum((label == k).sum() >= 41 for label in labels) >= wanted  # 41: 1 % of the pixels


def test_labeled_choice_takes_what_there_is():
    present = np.zeros((60, 3), bool)
    present[:, 0], present[:30, 1], present[7, 2] = True, True, True  # one single image shows the last class
    sets = choose_labeled(present, np.random.default_rng(0))
    assert {size: len(set(rows)) for size, rows in sets.items()} == {12: 12, 24: 24, 48: 48}
    assert 7 in sets[12]


def count_pictures(variant, pictures: int) -> np.ndarray:
    """In how many pictures each foreground class is seen."""
    labels = [draw(variant, np.random.default_rng([99, i]))[1] for i in range(pictures)]
    return np.array([sum((label == k).any() for label in labels) for k in range(1, len(variant.classes))])


def test_exponent_sets_the_frequencies():
    one_blob = dict(size=24, blobs=(1, 1), distractors=0.0, radius=(6.0, 8.0), margin=10.0)
    for name in ("shapes", "shapes_severe"):
        variant = replace(VARIANTS[name], **one_blob)
        expected = np.arange(1, 8) ** -variant.exponent
        measured = count_pictures(variant, 600) / 600
        assert np.abs(measured - expected / expected.sum()).max() < 0.05
        ratio = measured[0] / measured[-1]
        assert 0.6 < ratio / 7**variant.exponent < 1.7


# ---------------------------------------------------------------- repeated and simultaneous calls


def test_deterministic_and_idempotent(root, tmp_path):
    generate(tmp_path / "again", SMALL, "small")
    first = contents(root)
    assert contents(tmp_path / "again") == first
    stamps = {file: file.stat().st_mtime_ns for file in root.rglob("*")}
    generate(root, SMALL)  # the name is no dial
    assert stamps == {file: file.stat().st_mtime_ns for file in root.rglob("*")}


def test_refuses_other_dials_versions_and_foreign_folders(root, tmp_path, monkeypatch):
    before = contents(root)
    with pytest.raises(UserError, match="delete that folder") as error:
        generate(root, replace(SMALL, exponent=1.0))
    assert str(root) in str(error.value)
    monkeypatch.setattr(synthetic, "FORMAT", synthetic.FORMAT + 1)
    with pytest.raises(UserError, match="another version"):
        generate(root, SMALL)
    assert contents(root) == before
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not generated here"):
        generate(tmp_path, SMALL)
    assert contents(tmp_path) == {"thesis.txt": b"mine"}
    with pytest.raises(KeyError):
        generate(tmp_path / "x", "no such variant")


def test_simultaneous_processes_agree(tmp_path):
    variant = replace(SMALL, train=50, val=1, tune=1)
    context = multiprocessing.get_context("fork")  # spawning would spend the time on importing torch
    processes = [context.Process(target=generate, args=(tmp_path / "data", variant)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]  # no temporary folder is left
    assert json.loads((tmp_path / "data" / "generator.json").read_text())["dials"]["train"] == 50
    assert len(list((tmp_path / "data" / "JPEGImages").iterdir())) == 52


def test_failure_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt
    monkeypatch.setattr(synthetic, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "data", SMALL)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_empty_folder_is_filled(tmp_path):
    variant = replace(SMALL, train=48, val=1, tune=1)
    generate(tmp_path, variant)
    assert (tmp_path / "generator.json").is_file()


# ---------------------------------------------------------------- textures and the shipped encoder


def test_every_texture_is_normalised_and_unknown_ones_are_refused():
    for name in set(pretrain.PRETRAINING_TEXTURES) - {"plain"}:
        field = synthetic.texture(name, VARIANTS["shapes"], np.random.default_rng(0))
        assert field.shape == (64, 64) and field.dtype == np.float32
        assert abs(field.mean()) < 1e-3 and abs(field.std() - 1) < 1e-3
    with pytest.raises(ValueError, match="plaid"):
        synthetic.texture("plaid", VARIANTS["shapes"], np.random.default_rng(0))


def shipped_encoder() -> TinyEncoder:
    state = torch.load(TINY_WEIGHTS, map_location="cpu", weights_only=True)
    encoder = TinyEncoder()
    encoder.load_state_dict(state, strict=True)
    return encoder


def test_shipped_weights_are_small_and_half_precision():
    assert TINY_WEIGHTS.stat().st_size <= 2**20
    state = torch.load(TINY_WEIGHTS, map_location="cpu", weights_only=True)
    for key, value in state.items():
        assert value.dtype == (torch.int64 if key.endswith("num_batches_tracked") else torch.float16), key
        assert torch.isfinite(value).all()
    shipped_encoder()


def test_shipped_encoder_tells_textures_apart():
    """Nearest class centroid in pooled features: far above random weights, on pictures never used in pretraining."""
    count = len(pretrain.PRETRAINING_TEXTURES)
    kinds = [i % count for i in range(40 * count)]
    x, y, half = pretrain.single_blobs(kinds, seed=1234), torch.tensor(kinds), len(kinds) // 2

    def accuracy(encoder: TinyEncoder) -> float:
        with torch.no_grad():
            features = encoder.eval()(x)[1].mean(dim=(2, 3))
        features = (features - features[:half].mean(dim=0)) / (features[:half].std(dim=0) + 1e-6)
        centroids = torch.stack([features[:half][y[:half] == k].mean(dim=0) for k in range(count)])
        return (torch.cdist(features[half:], centroids).argmin(dim=1) == y[half:]).float().mean().item()

    torch.manual_seed(0)
    random, shipped = accuracy(TinyEncoder()), accuracy(shipped_encoder())
    assert shipped > 0.75 and shipped > random + 0.3, (shipped, random)


def test_pretraining_runs_and_writes_loadable_weights(tmp_path):
    accuracy = pretrain.pretrain(tmp_path / "encoder.pt", epochs=1, pictures=160, seed=0, device="cpu")
    assert 0 <= accuracy <= 1
    TinyEncoder().load_state_dict(torch.load(tmp_path / "encoder.pt", weights_only=True))
    assert [file.name for file in tmp_path.iterdir()] == ["encoder.pt"]
