"""Reading pictures and masks, and the loaders of training and evaluation.

Loader workers do geometry only and hand over uint8; colours are changed in batches on the device (common.augment).
Every sample has its own generator seeded by (seed, stream, position in the run): which crops a step sees depends neither
on the number of ranks nor on the number of workers, and a resumed run goes on with the samples it would have seen.
"""

import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler

from common.augment import weak_geometry
from common.cityscapes import to_classes
from common.data import IGNORE, Data, Sample
from common.files import open_picture
from common.runtime import Context, UserError

# ---------------------------------------------------------------- reading


def open_image(path: Path) -> Image.Image:
    """An RGB picture, fully decoded, upright as its EXIF data say. Raises UserError for what cannot be read.

    16-bit grey values are divided by 257; transparency is dropped.
    """
    try:
        with open_picture(path) as file:
            image = Image.open(file)
            if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # convert would cut off at 255
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, zipfile.BadZipFile, Image.DecompressionBombError) as error:  # each for damaged files
        raise UserError(f"cannot read the image {path}: {error}") from error


def open_mask(path: Path, num_classes: int) -> np.ndarray:
    """uint8 [H, W] of class indices and 255. Raises UserError for what cannot be read or is out of range."""
    try:
        with open_picture(path) as file, Image.open(file) as image:
            mask = to_classes(np.asarray(image), path)
    except (OSError, SyntaxError, ValueError, zipfile.BadZipFile, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the mask {path}: {error}") from error
    if mask.ndim != 2:
        raise UserError(f"the mask {path} is not a picture of class indices (palette or grey) but {image.mode}")
    wrong = (mask >= num_classes) & (mask != IGNORE)
    if wrong.any():
        raise UserError(f"the mask {path} holds the label {mask[wrong][0]}; there are {num_classes} classes "
                        f"(0 to {num_classes - 1}, and {IGNORE} = ignore)")
    return mask.astype(np.uint8, copy=False)


def class_pixels(data: Data) -> torch.Tensor:
    """int64 [C]: how many labeled pixels each class has."""
    counts = np.zeros(IGNORE + 1, np.int64)
    for sample in data.labeled:
        counts += np.bincount(open_mask(data.root / sample.mask, data.info.num_classes).ravel(), minlength=IGNORE + 1)
    return torch.from_numpy(counts[: data.info.num_classes])


class EvaluationSet(Dataset):
    """Whole pictures with their labels: {"image": uint8 [3, H, W], "label": uint8 [H, W], "name": str}."""

    def __init__(self, samples: list[Sample], root: Path, num_classes: int):
        self.samples, self.root, self.num_classes = samples, root, num_classes

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        sample = self.samples[index]
        image = np.array(open_image(self.root / sample.image)).transpose(2, 0, 1)
        label = open_mask(self.root / sample.mask, self.num_classes)
        check_same_size(image.shape[1:], label, self.root / sample.mask)
        return {"image": torch.from_numpy(np.ascontiguousarray(image)), "label": torch.from_numpy(label.copy()), "name": sample.name}


def check_same_size(size: tuple[int, int], mask: np.ndarray, path: Path) -> None:
    """Raise UserError unless the mask at `path` is of its image's (height, width)."""
    if mask.shape != size:
        raise UserError(f"the mask {path} is {mask.shape[1]}x{mask.shape[0]} pixels, its image {size[1]}x{size[0]}")


class TrainingSet(Dataset):
    """Weakly augmented crops. An index is (stream, sample, position); see `TrainingBatches`."""

    def __init__(self, data: Data, crop: int, seed: int):
        self.data, self.crop, self.seed = data, crop, seed

    def __getitem__(self, key: tuple[int, int, int]) -> dict:
        stream, index, position = key
        sample = (self.data.labeled, self.data.unlabeled)[stream][index]
        image = open_image(self.data.root / sample.image)
        mask = None
        if sample.mask is not None:
            path = self.data.root / sample.mask
            mask = open_mask(path, self.data.info.num_classes)
            check_same_size((image.height, image.width), mask, path)
        rng = np.random.default_rng([self.seed, stream, position])
        image, mask, valid = weak_geometry(image, mask, self.crop, self.data.info.scale, rng)
        item = {"image": torch.from_numpy(image), "valid": torch.from_numpy(valid), "stream": stream}
        if mask is not None:
            item["label"] = torch.from_numpy(mask)
        return item


class SampleStream:
    """An endless shuffled sequence over `size` samples: position -> index, each pass its own permutation."""

    def __init__(self, size: int, seed: int, stream: int):
        self.size, self.seed, self.stream = size, seed, stream
        self.passed, self.order = -1, None

    def __getitem__(self, position: int) -> int:
        number, offset = divmod(position, self.size)
        if number != self.passed:
            self.passed = number
            self.order = np.random.default_rng([self.seed, self.stream, number, 1]).permutation(self.size)
        return int(self.order[offset])


class TrainingBatches(Sampler):
    """This rank's part of each global batch: `per_rank` labeled and as many unlabeled keys a step, from step `start`."""

    def __init__(self, data: Data, per_rank: int, unlabeled: bool, seed: int, context: Context, start: int, total: int):
        self.streams = [SampleStream(len(data.labeled), seed, 0)]
        if unlabeled:
            self.streams.append(SampleStream(len(data.unlabeled), seed, 1))
        self.per_rank, self.context, self.start, self.total = per_rank, context, start, total

    def __len__(self) -> int:
        return self.total - self.start

    def __iter__(self):
        for step in range(self.start, self.total):
            first = (step * self.context.world_size + self.context.rank) * self.per_rank
            yield [(number, stream[position], position)
                   for number, stream in enumerate(self.streams) for position in range(first, first + self.per_rank)]


def collate_training(items: list[dict]) -> dict[str, torch.Tensor]:
    """{"labeled": uint8 [b, 3, S, S], "label": uint8 [b, S, S], "unlabeled", "valid": bool [b, S, S], "truth" if known}."""
    labeled = [item for item in items if item["stream"] == 0]
    unlabeled = [item for item in items if item["stream"] == 1]
    batch = {"labeled": torch.stack([item["image"] for item in labeled]),
             "label": torch.stack([item["label"] for item in labeled])}
    if unlabeled:
        batch["unlabeled"] = torch.stack([item["image"] for item in unlabeled])
        batch["valid"] = torch.stack([item["valid"] for item in unlabeled]).bool()
        if "label" in unlabeled[0]:
            batch["truth"] = torch.stack([item["label"] for item in unlabeled])
    return batch


def default_workers(context: Context) -> int:
    """Loader processes a rank: the cores this rank may use, at most 8; none where the network needs every core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(8, share) if context.device.type == "cuda" else min(2, share - 1)


def training_loader(data: Data, config, context: Context, start: int, total: int, unlabeled: bool = True) -> DataLoader:
    """Batches of this rank for steps `start` to `total`, as `collate_training` describes them."""
    batches = TrainingBatches(data, config.batch_size // context.world_size, unlabeled, config.seed, context, start, total)
    return loader(TrainingSet(data, config.crop, config.seed), config.num_workers, context,
                  batch_sampler=batches, collate_fn=collate_training)


def evaluation_loader(samples: list[Sample], data: Data, context: Context, num_workers: int | None) -> DataLoader:
    """Rank r's images are samples[r::world_size]: each image is seen exactly once, whatever the number of ranks."""
    mine = samples[context.rank :: context.world_size]
    return loader(EvaluationSet(mine, data.root, data.info.num_classes), num_workers, context, batch_size=data.info.eval_batch)


def loader(dataset: Dataset, num_workers: int | None, context: Context, **options) -> DataLoader:
    workers = max(default_workers(context), 0) if num_workers is None else num_workers
    # A generator of its own: a loader draws a seed when it starts, and that draw must not shift training's random numbers.
    return DataLoader(dataset, num_workers=workers, pin_memory=context.device.type == "cuda", worker_init_fn=prepare_worker,
                      generator=torch.Generator(), **options)


def prepare_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # A process group of its own: Ctrl-C or a scheduler's SIGTERM for the trainer's group is the trainer's to answer. It
    # saves first, and its workers end with it.
    os.setpgrp()
