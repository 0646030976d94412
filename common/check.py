"""What `python -m common.data check` prints: a data set on one screen, before hours are spent on it.

Every list is read and checked as training does it, every mask and every image's size with it. Problems are counted, and the first ten printed.
"""

import concurrent.futures
import os
from collections import Counter

import numpy as np
import torch
from PIL import Image

from common import medical
from common.augment import IGNORE
from common.data import Data, Sample, load_data
from common.files import open_picture
from common.loading import check_same_size, open_image, open_mask
from common.runtime import Context, UserError


def report(options) -> str:
    """The screen for the options of a run (common.options.TrainingOptions). Raises UserError where nothing can be trained."""
    context = Context(0, 1, torch.device("cpu"))
    if options.dataset in medical.DATASETS:
        return report_volumes(medical.load_volumes(options, context))
    return report_images(load_data(options, context))


def report_images(data: Data) -> str:
    lists = {name: getattr(data, name) for name in ("labeled", "unlabeled", "val", "tune") if getattr(data, name)}
    jobs = [(name, sample) for name, samples in lists.items() for sample in samples]
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding leaves the interpreter alone
        looked = list(pool.map(lambda job: look(job[1], data), jobs))
    pixels = {name: np.zeros(IGNORE + 1, np.int64) for name in lists}
    sizes, problems = {name: [] for name in lists}, []
    for (name, _), (size, counts, problem) in zip(jobs, looked):
        if problem:
            problems.append(problem)
        else:
            sizes[name].append(size)
            pixels[name] += counts
    lines = [f"{data.info.name} in {data.root}"]
    for name, samples in lists.items():
        width, height = (np.array(sizes[name] or [(0, 0)])[:, axis] for axis in (1, 0))
        masks = sum(sample.mask is not None for sample in samples)
        lines.append(f"{name:10} {len(samples):6} images, {masks} with masks to read, {width.min()} to {width.max()} pixels wide, {height.min()} to {height.max()} high")
    shown = [name for name in ("labeled", "val", "tune") if name in lists]
    return "\n".join([*lines, "", *shares_table(data.info.classes, {name: pixels[name] for name in shown}), "", *ending(problems, data.info.crop)])


def look(sample: Sample, data: Data) -> tuple[tuple[int, int] | None, np.ndarray | None, str | None]:
    """(height, width), pixels of each label [256], and what is wrong with the sample."""
    try:
        path = data.root / sample.image
        if sample.mask is None:
            with open_picture(path) as file, Image.open(file) as image:  # the header alone
                return (image.height, image.width), np.zeros(IGNORE + 1, np.int64), None
        image, mask = open_image(path), open_mask(data.root / sample.mask, data.info.num_classes)
        check_same_size((image.height, image.width), mask, data.root / sample.mask)
        return (image.height, image.width), np.bincount(mask.ravel(), minlength=IGNORE + 1), None
    except UserError as error:
        return None, None, str(error)
    except OSError as error:
        return None, None, f"cannot read the image {data.root / sample.image}: {error}"


def report_volumes(data: medical.VolumeData) -> str:
    lists = {name: getattr(data, name) for name in ("labeled", "unlabeled", "val", "test") if getattr(data, name)}
    lines, pixels, problems = [f"{data.info.name} in {data.root}"], {}, []
    for name, files in lists.items():
        shapes, pixels[name] = [], np.zeros(IGNORE + 1, np.int64)
        for file in files:
            try:
                volume = medical.read_volume(file.path, data.info.num_classes)
                if volume.label is None and name != "unlabeled":
                    raise UserError(f"{file.path} has no label")
            except UserError as error:
                problems.append(str(error))
                continue
            shapes.append(volume.image.shape)
            if name != "unlabeled":
                pixels[name] += np.bincount(volume.label.ravel(), minlength=IGNORE + 1)
        slices, sizes = [shape[0] for shape in shapes] or [0], Counter(f"{shape[2]}x{shape[1]}" for shape in shapes)
        lines.append(f"{name:10} {len({file.patient for file in files}):4} patients, {len(files)} volumes, {sum(slices)} slices ({min(slices)} to {max(slices)} "
                     f"a volume), {', '.join(size for size, _ in sizes.most_common(3))}{' and others' if len(sizes) > 3 else ''}")
    shown = {name: counts for name, counts in pixels.items() if name != "unlabeled"}
    return "\n".join([*lines, "", *shares_table(data.info.classes, shown), "", *ending(problems, data.info.crop)])


def shares_table(classes: tuple[str, ...], pixels: dict[str, np.ndarray]) -> list[str]:
    """Shares of the labeled pixels in %, and of all that are ignored; a class without pixels is marked."""
    width = max(map(len, ("% of the pixels", *classes)))
    lines = [f"{'% of the pixels':{width}}" + "".join(f"{name:>10}" for name in pixels)]
    for index, label in enumerate(classes):
        counts = [counts[index] / max(1, counts[:IGNORE].sum()) for counts in pixels.values()]
        lines.append(f"{label:{width}}" + "".join(f"{100 * share:10.2f}" if share else f"{'none':>10}" for share in counts))
    ignored = [counts[IGNORE] / max(1, counts.sum()) for counts in pixels.values()]
    return [*lines, f"{'(ignored)':{width}}" + "".join(f"{100 * share:10.2f}" for share in ignored)]


def ending(problems: list[str], crop: int) -> list[str]:
    """The last lines; raises UserError if there are problems, after printing each."""
    if problems:
        for problem in problems[:10]:
            print(f"error: {problem}")
        more = " (the first 10 are above)" if len(problems) > 10 else ""
        raise UserError(f"{len(problems)} files cannot be used{more}: mend or replace them")
    return [f"all files can be read; the recipe trains on {crop}x{crop} pixels"]
