"""Cityscapes as its archives give it: pictures in leftImg8bit/<split>/<city>, masks in gtFine/<split>/<city>.

The archives leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip may stay zipped in the data set's folder. Masks are *_labelTrainIds.png
where there are such files (made by Cityscapes' scripts), and else *_labelIds.png, whose 34 labels become the 19 classes when they are read.
Predictions are written with labelIds again, as the benchmark's server wants them.
"""

from pathlib import Path

import numpy as np

from common.files import names_below
from common.runtime import UserError

# name, labelId, colour: the 19 classes that are evaluated, in the order of their trainIds (from Cityscapes' published table of labels)
LABELS = (
    ("road", 7, (128, 64, 128)), ("sidewalk", 8, (244, 35, 232)), ("building", 11, (70, 70, 70)), ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)), ("pole", 17, (153, 153, 153)), ("traffic light", 19, (250, 170, 30)), ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)), ("terrain", 22, (152, 251, 152)), ("sky", 23, (70, 130, 180)), ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)), ("car", 26, (0, 0, 142)), ("truck", 27, (0, 0, 70)), ("bus", 28, (0, 60, 100)), ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)), ("bicycle", 33, (119, 11, 32)),
)
CLASSES, LABEL_IDS, COLORS = zip(*LABELS)
IMAGES = {"train": 2975, "val": 500}
LABEL_ID_FILE, TRAIN_ID_FILE = "_gtFine_labelIds.png", "_gtFine_labelTrainIds.png"

TO_CLASS = np.full(256, 255, np.uint8)
TO_CLASS[list(LABEL_IDS)] = range(len(CLASSES))
TO_LABEL_ID = np.zeros(256, np.uint8)
TO_LABEL_ID[: len(CLASSES)] = LABEL_IDS


def listed(root: Path, split: str, sample_class) -> list:
    """All pictures of "train" or "val" with their masks, in order of their names. Raises UserError unless there are as many as there should be."""
    pictures = sorted(name for name in names_below(root, f"leftImg8bit/{split}") if name.endswith("_leftImg8bit.png"))
    if len(pictures) != IMAGES[split]:
        raise UserError(f"{root} has {len(pictures)} pictures in leftImg8bit/{split} (in folders or in leftImg8bit_trainvaltest.zip), Cityscapes has "
                        f"{IMAGES[split]}: fetch leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from https://www.cityscapes-dataset.com")
    return located([sample_class(name, None) for name in pictures], root, with_masks=True)


def located(samples: list, root: Path, with_masks: bool = False) -> list:
    """The samples of a list with paths as the archives have them: USRN's lists leave out the cities, UniMatch's name labelTrainIds.

    `with_masks`: also those that name no mask. Where there is neither kind of mask, labelIds are named, and `check_lists` will miss them.
    """
    known: dict[str, set[str]] = {}
    placed = []
    for sample in samples:
        stem = Path(sample.image).name.removesuffix("_leftImg8bit.png")
        split = next((part for part in Path(sample.image).parts if part in (*IMAGES, "test")), "train")
        city, mask = stem.split("_")[0], None
        if sample.mask is not None or with_masks:
            if split not in known:
                known[split] = names_below(root, f"gtFine/{split}")
            candidates = [f"gtFine/{split}/{city}/{stem}{ending}" for ending in (TRAIN_ID_FILE, LABEL_ID_FILE)]
            mask = candidates[0] if candidates[0] in known[split] else candidates[1]
        placed.append(type(sample)(f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png", mask))
    return placed


def to_classes(mask: np.ndarray, path: Path) -> np.ndarray:
    """labelIds -> classes 0 to 18 and 255, uint8; files of another name are returned as they are."""
    return TO_CLASS[mask] if path.name.endswith(LABEL_ID_FILE) else mask
