"""Fixtures of several test files. Tests import modules from the repository root, as users do."""

import functools
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.synthetic import SHAPES, generate, with_changes
from programs import recorded, run_as_program

torch.set_num_threads(1)  # tests are small: threads would only wait for each other


HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}


@pytest.fixture(autouse=True)
def signals_given_back():
    """A training takes SIGTERM and SIGINT; pytest wants them back."""
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """The embedded data, fewer of them."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "shapes", with_changes(SHAPES["shapes"], train=60, val=4, tune=3))
        generate(root, "shapes")
        yield root


@pytest.fixture
def program(request, shapes, monkeypatch, capfd):
    """Run NAME.py from test_NAME.py with its SHORT and further options: (status, out, err)."""
    script = request.module.__name__.removeprefix("test_") + ".py"
    return functools.partial(run_as_program, script, monkeypatch, capfd, *request.module.SHORT,
                             "--data-root", shapes)


@pytest.fixture
def drawn(monkeypatch):
    """[(figure, ...)] of the matplotlib figures made in the test."""
    figure = pytest.importorskip("matplotlib.figure", reason="draws with matplotlib")
    return recorded(monkeypatch, figure.Figure, "__init__")


@pytest.fixture
def voc_root(tmp_path) -> Path:
    return write_voc(tmp_path / "VOC2012")


def write_voc(root: Path) -> Path:
    """9 training and 5 validation images in VOC's formats; 255 frames rectangles of classes."""
    rng, lists = np.random.default_rng(0), root / "ImageSets" / "Segmentation"
    for folder in (root / "JPEGImages", root / "SegmentationClass", lists):
        folder.mkdir(parents=True)
    names = [f"2007_{number:06d}" for number in range(1, 15)]
    palette = bytes(range(255, -1, -1)) * 3
    for number, name in enumerate(names):
        width, height = 59 + 2 * (number % 4), 43 + 2 * (number % 3)  # odd, and they differ
        if number % 3 == 2:
            width, height = height, width
        rows, columns = np.mgrid[:height, :width]
        image = np.stack([rows * 4, columns * 4, rows + columns], axis=2)
        image += rng.integers(0, 40, (height, width, 3))
        mask = np.zeros((height, width), np.uint8)
        for copy in range(3):
            top, left = rng.integers(2, height - 20), rng.integers(2, width - 20)
            mask[top - 2 : top + 17, left - 2 : left + 17] = 255
            mask[top : top + 15, left : left + 15] = 1 + (3 * number + copy) % 20
            image[top : top + 15, left : left + 15] += 60 * copy
        picture = Image.fromarray(image.clip(0, 255).astype(np.uint8))
        picture.save(root / "JPEGImages" / f"{name}.jpg")
        indexed = Image.frombytes("P", (width, height), mask.tobytes())
        indexed.putpalette(palette)
        indexed.save(root / "SegmentationClass" / f"{name}.png")
    (lists / "train.txt").write_text("".join(f"{name}\n" for name in names[:9]))
    (lists / "val.txt").write_text("".join(f"{name}\n" for name in names[9:]))
    return root
