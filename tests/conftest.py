"""Fixtures of several test files. Tests import the modules from the repository root, as a user does."""

import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

torch.set_num_threads(1)  # tests are small: threads would only wait for each other


@pytest.fixture
def keep_signal_handlers():
    """A Run takes SIGTERM and SIGINT; pytest wants them back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures made in the test."""
    figure = pytest.importorskip("matplotlib.figure", reason="draws figures only where matplotlib is installed")
    figures = []

    class Kept(figure.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            figures.append(self)

    monkeypatch.setattr(figure, "Figure", Kept)
    return figures


@pytest.fixture
def voc_root(tmp_path) -> Path:
    """A PASCAL VOC of 9 training and 5 validation pictures in the real layout and file formats, sizes odd and different.

    Masks are palette PNGs: rectangles of the 20 classes on background, each with a border of 255.
    """
    return write_voc(tmp_path / "VOC2012", train=9, val=5)


def write_voc(root: Path, train: int, val: int, classes: int = 21) -> Path:
    rng = np.random.default_rng(0)
    lists = root / "ImageSets" / "Segmentation"
    for folder in (root / "JPEGImages", root / "SegmentationClass", lists):
        folder.mkdir(parents=True)
    names = [f"2007_{number:06d}" for number in range(1, train + val + 1)]
    for number, name in enumerate(names):
        width, height = 59 + 2 * (number % 4), 43 + 2 * (number % 3)
        if number % 3 == 2:
            width, height = height, width
        rows, columns = np.mgrid[:height, :width]
        image = np.stack([rows * 4, columns * 4, rows + columns], axis=2) + rng.integers(0, 40, (height, width, 3))
        mask = np.zeros((height, width), np.uint8)
        for copy in range(3):
            top, left = rng.integers(2, height - 20), rng.integers(2, width - 20)
            mask[top - 2 : top + 17, left - 2 : left + 17] = 255
            mask[top : top + 15, left : left + 15] = 1 + (3 * number + copy) % (classes - 1)
            image[top : top + 15, left : left + 15] += 60 * copy
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / "JPEGImages" / f"{name}.jpg")
        palette_image = Image.fromarray(mask).convert("P")
        palette_image.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
        palette_image.putdata(mask.ravel().tolist())  # convert("P") may have moved the indices
        palette_image.save(root / "SegmentationClass" / f"{name}.png")
    (lists / "train.txt").write_text("".join(f"{name}\n" for name in names[:train]))
    (lists / "val.txt").write_text("".join(f"{name}\n" for name in names[train:]))
    return root
