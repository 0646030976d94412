"""Lucchi (EPFL's electron microscopy of the hippocampus, CA1): mitochondria in slices of a TIFF stack.

ROOT holds training.tif, training_groundtruth.tif, testing.tif and testing_groundtruth.tif as EPFL's page gives them, 165 slices of 1024x768
pixels each. They are written once as single pictures: JPEGImages/train_000.png, SegmentationClass/train_000.png (0 and 1) and lists in
ImageSets/Segmentation: train.txt, val.txt (the testing stack) and labeled_5, _10 and _20.txt. DAW trains on 5, 10 and 20 labeled slices, and
does not say which: ours lie at equal distances in the stack, as neighbours are nearly the same picture.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from common.files import write_atomically
from common.pictures import save_png
from common.runtime import UserError

CLASSES = ("background", "mitochondrion")
STACKS = {"train": "training", "val": "testing"}
LABELED = (5, 10, 20)


def prepare(root: Path) -> None:
    """Write the slices and lists below `root`; nothing if they are there. Raises UserError for stacks that are missing, damaged or do not fit."""
    lists = root / "ImageSets" / "Segmentation"
    if (lists / "train.txt").is_file():  # written last
        return
    names = {}
    for split, stack in reversed(STACKS.items()):
        images, labels = read_stack(root, stack), read_stack(root, f"{stack}_groundtruth")
        if images.shape != labels.shape:
            raise UserError(f"{root}: {stack} is {list(images.shape)} pixels, its ground truth {list(labels.shape)}")
        if len(np.unique(labels)) > 2:
            raise UserError(f"{root}: {stack}_groundtruth has {len(np.unique(labels))} values, expected 0 and 255")
        names[split] = [f"{split}_{number:03d}" for number in range(len(images))]
        for name, image, label in zip(names[split], images, labels):
            for folder, pixels in (("JPEGImages", image), ("SegmentationClass", (label > 0).astype(np.uint8))):
                save_png(Image.fromarray(pixels), root / folder / f"{name}.png")
        print(f"{root}: {len(images)} slices of {stack} written", flush=True)
    chosen = {f"labeled_{count}": [names["train"][int(index)] for index in (np.arange(count) + 0.5) * len(names["train"]) / count]
              for count in LABELED if count <= len(names["train"])}
    for name, members in {**chosen, "val": names["val"], "train": names["train"]}.items():
        text = "".join(f"JPEGImages/{member}.png SegmentationClass/{member}.png\n" for member in members)
        write_atomically(lists / f"{name}.txt", lambda temporary, text=text: temporary.write_text(text))


def read_stack(root: Path, name: str) -> np.ndarray:
    """All pages of root/<name>.tif, uint8 [N, H, W]."""
    path = next((root / f"{name}{suffix}" for suffix in (".tif", ".tiff") if (root / f"{name}{suffix}").is_file()), None)
    if path is None:
        raise UserError(f"no {name}.tif in {root}: lucchi needs {', '.join(f'{stack}.tif, {stack}_groundtruth.tif' for stack in STACKS.values())}, "
                        f"from EPFL's page on electron microscopy data")
    try:
        with Image.open(path) as stack:
            pages = [np.asarray(page.convert("L")) for page in ImageSequence.Iterator(stack)]
        return np.stack(pages)
    except Exception as error:  # a damaged or foreign file can raise anything; each means the same to the user
        raise UserError(f"{path} cannot be read as a stack of grey pictures: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
