"""Your own pictures: `--dataset folder --data-root ROOT --classes names.txt`.

    ROOT/images/*          pictures to learn from, of any format that PIL reads
    ROOT/masks/*           for those with labels: <the picture's name>.png, class indices (palette or grey), 255 = ignore
    ROOT/unlabeled/*       more pictures without labels, if there are any
    ROOT/val_images/*      and val_masks/*: for validation. Without them a fifth of the labeled pictures is set apart, always the same ones

names.txt has a class a line, in the order of the indices. Pictures in images/ without a mask are learned from without labels. `--labeled 20`
or `1/8` uses so many of the masks, every class among them, and the other pictures without theirs; the default is all.
"""

import os
from pathlib import Path

import numpy as np

from common.files import read_text
from common.runtime import UserError
from common.splits import covering_choice, images_asked_for

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
HELD_OUT = 5  # one in so many labeled pictures is for validation where there is no folder of them
MOST_CLASSES = 255


def class_names(classes: str | None) -> tuple[str, ...]:
    """`--classes`: a file with a name a line, or the names themselves, separated by commas. Raises UserError for none, too many or equal ones."""
    if not classes:
        raise UserError("--dataset folder needs --classes: a file with a class a line, or their names separated by commas")
    if os.path.isfile(classes):  # False, where Path raises, for a long list of names
        names = tuple(line.strip() for line in read_text(Path(classes)).splitlines() if line.strip())
    elif "," in classes:
        names = tuple(name.strip() for name in classes.split(","))
    else:
        raise UserError(f"no file {classes}: --classes takes a file with a class a line, or at least two names separated by commas")
    if not 2 <= len(names) <= MOST_CLASSES or len(set(names)) < len(names) or not all(names) or any("," in name for name in names):
        raise UserError(f"--classes {classes}: 2 to {MOST_CLASSES} different names without commas are needed, found {len(names)}")
    return names


def pictures_in(folder: Path) -> dict[str, str]:
    """{name without suffix: path relative to the data set's folder}. Raises UserError for two pictures of one name."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")) if folder.is_dir() else []
    found: dict[str, str] = {}
    for path in files:
        if path.stem in found:
            raise UserError(f"{folder} holds {Path(found[path.stem]).name} and {path.name}: which one belongs to the name {path.stem}?")
        found[path.stem] = f"{folder.name}/{path.name}"
    return found


def folder_lists(root: Path, labeled: str, split_seed: int | None, num_classes: int, sample_class) -> tuple[list, list, list]:
    """Samples of the folder: (labeled, unlabeled, val). Raises UserError where one of labeled and val would be empty, and for masks without pictures."""
    images, masks = pictures_in(root / "images"), pictures_in(root / "masks")
    val_images, val_masks = pictures_in(root / "val_images"), pictures_in(root / "val_masks")
    if not images or not masks:
        raise UserError(f"{root} has no pictures in images/ or no masks in masks/: see common/folder.py for what lies where")
    for folder, stray in (("masks", masks.keys() - images.keys()), ("val_masks", val_masks.keys() - val_images.keys()), ("val_images", val_images.keys() - val_masks.keys())):
        if stray:
            more = f", and {len(stray) - 1} more have none" if len(stray) > 1 else ""
            raise UserError(f"{root / folder}: {min(stray)} has no {'picture' if folder.endswith('masks') else 'mask'} of its name{more}")
    pairs = [sample_class(images[name], masks[name]) for name in sorted(masks)]
    val = [sample_class(val_images[name], val_masks[name]) for name in sorted(val_masks)]
    if not val:
        held_out = set(np.random.default_rng(0).permutation(len(pairs))[: max(1, len(pairs) // HELD_OUT)].tolist())
        val, pairs = [pairs[index] for index in sorted(held_out)], [pair for index, pair in enumerate(pairs) if index not in held_out]
    if not pairs:
        raise UserError(f"{root} has only {len(masks)} picture with a mask: one is needed to learn from and one to validate")
    chosen = pairs
    if labeled != "all":
        count = images_asked_for(labeled, len(pairs))
        chosen = [pairs[index] for index in covering_choice(present_classes(pairs, root, num_classes), count, np.random.default_rng(split_seed or 0))]
    taken = {sample.image for sample in chosen + val}
    others = [path for path in images.values() if path not in taken] + list(pictures_in(root / "unlabeled").values())
    return chosen, [sample_class(path, None) for path in others], val


def present_classes(samples: list, root: Path, num_classes: int) -> np.ndarray:
    """Which class occurs in which mask, bool [N, C]."""
    from common.loading import open_mask  # which needs common.data, and that this module

    present = np.zeros((len(samples), num_classes), bool)
    for row, sample in zip(present, samples):
        row[np.intersect1d(open_mask(root / sample.mask, num_classes), np.arange(num_classes))] = True
    return present
