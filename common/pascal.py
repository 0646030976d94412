"""PASCAL VOC 2012 as users have it: its folder, and the masks of the augmented set, which are SBD's.

VOC itself has masks of 1,464 training images. The other 9,118 of the field's 10,582 come from SBD (Hariharan et al. 2011), as
SegmentationClassAug/*.png, which many have beside or instead of SegmentationClass, or as SBD's own files cls/*.mat, which are converted
once (needs scipy). SBD's masks have no ignored border.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from common.pictures import save_png
from common.runtime import UserError

MASKS = ("SegmentationClass", "SegmentationClassAug")  # the second is looked in where the first has none, and the other way round
SBD_FOLDERS = ("SBD/cls", "benchmark_RELEASE/dataset/cls", "dataset/cls", "cls")  # below VOC2012 or its parent folders up to --data-root


def voc_folder(root: Path) -> Path:
    """The folder that holds JPEGImages: `root`, or VOCdevkit/VOC2012 below it, where the official archive unpacks."""
    for folder in (root, root / "VOCdevkit" / "VOC2012", root / "VOC2012"):
        if (folder / "JPEGImages").is_dir():
            return folder
    raise UserError(f"no folder JPEGImages in {root} (nor in VOCdevkit/VOC2012 below it): point --data-root at VOC2012, "
                    f"or fetch it with --download")


def download_voc(root: Path) -> None:
    from torchvision.datasets import VOCSegmentation

    try:
        voc_folder(root)
    except UserError:
        root.mkdir(parents=True, exist_ok=True)
        try:
            VOCSegmentation(str(root), year="2012", image_set="trainval", download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(f"PASCAL VOC 2012 could not be downloaded into {root}: {error}".replace("\n", " ")) from error


def find_masks(samples: list, root: Path, top: Path, download: bool) -> list:
    """The samples with masks where they are: in the folder that their list names or in the other of `MASKS`.

    Masks that neither has are made from SBD's .mat files, if these lie in one of `SBD_FOLDERS` below `root` (VOC2012) or `top`, or are
    downloaded. Otherwise the samples stay as they are, and `check_lists` will name what is missing.
    """
    present = {folder: names_in(root / folder) for folder in MASKS}

    def located(sample):
        folder, _, name = (sample.mask or "").rpartition("/")
        if folder in MASKS and name not in present[folder]:
            other = MASKS[1 - MASKS.index(folder)]
            return replace(sample, mask=f"{other}/{name}") if name in present[other] else sample
        return sample

    def missing() -> list[str]:
        return [Path(sample.mask).stem for sample in samples if sample.mask and Path(sample.mask).parent.as_posix() in MASKS
                and not any(Path(sample.mask).name in names for names in present.values())]

    absent = missing()
    if absent:
        folder = sbd_folder(root, top)
        if folder is None and download:
            folder = download_sbd(top)
        if folder is not None:
            convert_sbd(folder, root / MASKS[1], absent)
            present[MASKS[1]] = names_in(root / MASKS[1])
    return [located(sample) for sample in samples]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def sbd_folder(*roots: Path) -> Path | None:
    """Where SBD's .mat files of classes lie, if anywhere."""
    return next((root / folder for root in roots for folder in SBD_FOLDERS if (root / folder).is_dir()), None)


def download_sbd(root: Path) -> Path:
    """SBD through torchvision, into `root`/SBD; its folder of .mat files."""
    try:
        from torchvision.datasets import SBDataset

        SBDataset(str(root / "SBD"), mode="segmentation", download=True)
    except (OSError, RuntimeError, ImportError) as error:
        raise UserError(f"SBD could not be downloaded into {root / 'SBD'}: {error}".replace("\n", " ")) from error
    return root / "SBD" / "cls"


def convert_sbd(folder: Path, target: Path, names: list[str]) -> None:
    """folder/<name>.mat -> target/<name>.png, class indices, for those of `names` that SBD has. Raises UserError for a damaged file."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError(f"reading SBD's masks in {folder} needs the package scipy: pip install scipy") from error
    names = [name for name in names if (folder / f"{name}.mat").is_file()]
    for number, name in enumerate(names, 1):
        path = folder / f"{name}.mat"
        try:
            mask = np.asarray(loadmat(path)["GTcls"]["Segmentation"][0, 0])
            assert mask.ndim == 2 and mask.dtype.kind in "iu" and 0 <= mask.min() and mask.max() <= 20
        except Exception as error:  # a damaged or foreign file can raise anything; each means the same to the user
            raise UserError(f"{path} cannot be read as a mask of SBD: delete it and fetch SBD again") from error
        save_png(Image.fromarray(mask.astype(np.uint8)), target / f"{name}.png")
        if sys.stdout.isatty() or number == len(names):
            print(f"\rSBD's masks: {number} of {len(names)} written to {target}", end="\n" if number == len(names) else "", flush=True)
