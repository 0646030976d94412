"""Volumes segmented and scored: Dice, Jaccard and surface distances of each, on its own grid (common.surface says how).

A volume is a patient in one phase. HD95 and ASD are medpy's, in voxels, as the field's tables have them; the symmetric ASSD and all three in
mm stand beside them.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import surface
from common.augment import IGNORE
from common.files import write_atomically
from common.medical import VolumeData, VolumeFile, VolumeInfo, min_max, read_volume, resize_labels, resize_slices, write_volume
from common.pictures import sample_grid
from common.runtime import Context, UserError, all_reduce_sum

METRICS = ("dice", "jaccard", "hd95", "asd", "assd", "hd95_mm", "asd_mm", "assd_mm")
RELEASED_EMPTY = {"dice": 0.0, "jaccard": 0.0, "hd95": 50.0, "asd": 10.0}  # what DiffRect's test script gives an empty mask
SLICES_AT_ONCE = 16  # in a forward pass of the evaluation


@torch.inference_mode()
def segment_volume(predict, image: np.ndarray, size: int, device: torch.device) -> np.ndarray:
    """float [Z, H, W] in [0, 1] -> classes uint8 [Z, H, W].

    `predict`: slices float [B, 1, size, size] in [0, 1] -> logits. They are resized (bilinear) to the volume's own grid before the argmax.
    """
    slices, labels = torch.from_numpy(resize_slices(image, size))[:, None], []
    for part in slices.split(SLICES_AT_ONCE):
        logits = predict(part.to(device).float() / 255).float()
        labels.append(F.interpolate(logits, image.shape[1:], mode="bilinear", align_corners=False).argmax(dim=1).byte().cpu())
    return torch.cat(labels).numpy()


def score(prediction: np.ndarray, label: np.ndarray, num_classes: int, spacing: tuple | None) -> np.ndarray:
    """Every class but 0 of a volume [Z, H, W]: float64 [C - 1, len(METRICS)]; distances are nan where a mask is empty or, in mm, without spacing.

    Voxels labeled 255 are taken out of both masks.
    """
    table = np.full((num_classes - 1, len(METRICS)), np.nan)
    for row, label_value in zip(table, range(1, num_classes)):
        ours, theirs = (prediction == label_value) & (label != IGNORE), label == label_value
        values = {"dice": surface.dice(ours, theirs), "jaccard": surface.jaccard(ours, theirs)}
        if ours.any() and theirs.any():
            values |= surface.distance_metrics(ours, theirs)
            if spacing is not None:
                values |= {f"{name}_mm": value for name, value in surface.distance_metrics(ours, theirs, spacing).items()}
        row[:] = [values.get(name, np.nan) for name in METRICS]
    return table


def evaluate_volumes(predict, files: list[VolumeFile], info: VolumeInfo, context: Context, released_empty: bool = False) -> dict:
    """Scores of every volume, shared among ranks; the same plain dict on every rank.

    In %: dice, jaccard. In voxels: hd95, asd (directed, prediction to label), assd; in mm with the names' ending _mm. Each is the mean over
    classes but 0 of the mean over volumes; per_class and volumes hold the parts. A class that is empty in the prediction or the label has no
    distance: `empty` lists these cases and the means leave them out, unless `released_empty` scores them as DiffRect's test script does
    (Dice and Jaccard 0, HD95 50, ASD 10). Undefined means are None.
    """
    classes = info.classes[1:]
    table = torch.zeros(len(files), len(classes), len(METRICS) + 2, dtype=torch.float64)
    for index in range(context.rank, len(files), context.world_size):
        volume = read_volume(files[index].path, info.num_classes)
        if volume.label is None:
            raise UserError(f"{files[index].path} has no label to score against")
        prediction = segment_volume(predict, volume.image, info.crop, context.device)
        table[index, :, :-2] = torch.from_numpy(score(prediction, volume.label, info.num_classes, volume.spacing))
        known = volume.label != IGNORE
        voxels = [np.bincount(map_[known], minlength=info.num_classes)[1:] for map_ in (prediction, volume.label)]
        table[index, :, -2:] = torch.from_numpy(np.stack(voxels, axis=1))  # to see which mask is empty
    table = all_reduce_sum(table.to(context.device)).cpu().numpy()
    return summary(table[..., :-2], table[..., -2:], files, classes, released_empty)


def summary(table: np.ndarray, voxels: np.ndarray, files: list[VolumeFile], classes: tuple[str, ...], released_empty: bool) -> dict:
    """`evaluate_volumes`' dict from scores [V, C - 1, M] and voxels of prediction and label [V, C - 1, 2]."""
    table = table.copy()
    empty = [{"volume": files[volume].name, "class": classes[number],
              "empty": "both" if not voxels[volume, number].any() else "prediction" if voxels[volume, number, 0] == 0 else "label"}
             for volume, number in np.argwhere((voxels == 0).any(axis=2))]
    if released_empty:
        for name, value in RELEASED_EMPTY.items():
            table[..., METRICS.index(name)][(voxels == 0).any(axis=2)] = value
    table[..., :2] *= 100
    per_class = {name: dict(zip(METRICS, map(mean, table[:, number].T))) for number, name in enumerate(classes)}
    means = {metric: mean([values[metric] for values in per_class.values()]) for metric in METRICS}
    volumes = {file.name: {name: dict(zip(METRICS, map(finite, row))) for name, row in zip(classes, rows)} for file, rows in zip(files, table)}
    return {**means, "volumes": len(files), "patients": len({file.patient for file in files}), "empty_masks": len(empty),
            "per_class": per_class, "empty": empty, "scores": volumes}


def finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None  # JSON has no nan


def mean(values) -> float | None:
    """Of those that are defined."""
    defined = [value for value in values if value is not None and np.isfinite(value)]
    return float(np.mean(defined)) if defined else None


def report(results: dict) -> str:
    """The table that `python -m common.evaluate` prints for volumes."""
    rows = [("", "Dice %", "Jaccard %", "HD95", "ASD", "ASSD", "HD95 mm", "ASD mm", "ASSD mm")]
    for name, values in [*results["per_class"].items(), ("mean", results)]:
        rows.append((name, *("-" if values[metric] is None else f"{values[metric]:.2f}" for metric in METRICS)))
    width = max(len(row[0]) for row in rows)
    lines = [f"{row[0]:{width}}" + "".join(f"{cell:>11}" for cell in row[1:]) for row in rows]
    lines.append(f"{results['volumes']} volumes of {results['patients']} patients; distances without mm are in voxels")
    lines += [f"empty mask: {case['class']} of {case['volume']} ({case['empty']})" for case in results["empty"]]
    if results["empty"]:
        lines.append("the means of distances " + ("count each as the released test script does" if results.get("released_empty") else "leave these out"))
    return "\n".join(lines)


def predict_file(predict, source: Path, target: Path, size: int, device: torch.device) -> None:
    """Segment the volume of a file: an .npz gives an .npz (image, label, spacing), a NIfTI file one of labels with its affine.

    Raises UserError for what cannot be read or written.
    """
    if source.suffix.lower() == ".npz":
        volume = read_volume(source)
        write_volume(target, dataclasses.replace(volume, label=segment_volume(predict, volume.image, size, device)))
        return
    try:
        import nibabel
    except ImportError as error:
        raise UserError(f"reading {source} needs the package nibabel: pip install nibabel") from error
    from common.convert import checked_image, read_nifti

    image, _ = read_nifti(source)  # [Z, Y, X]
    label = segment_volume(predict, min_max(checked_image(image, source)), size, device)
    try:
        original = nibabel.load(source)
        header = original.header.copy()
        header.set_data_dtype(np.uint8)
        header["cal_min"] = header["cal_max"] = 0  # the window in which viewers would show the image
        result = nibabel.Nifti1Image(label.transpose(2, 1, 0), original.affine, header)
    except Exception as error:  # damaged headers raise all sorts
        raise UserError(f"{source}: its header cannot be used for the labels: {str(error).splitlines()[0]}") from error

    def write(temporary: Path) -> None:
        named = temporary.with_name(temporary.name + "".join(target.suffixes[-2:]))  # nibabel compresses by the name
        try:
            nibabel.save(result, named)
            named.replace(temporary)
        finally:
            named.unlink(missing_ok=True)

    write_atomically(target, write)


# ---------------------------------------------------------------- pictures


def middle_slices(files: list[VolumeFile], info: VolumeInfo, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The middle slice of each volume and its label, uint8 [size, size]."""
    pairs = []
    for file in files:
        volume = read_volume(file.path, info.num_classes)
        middle = slice(len(volume.image) // 2, len(volume.image) // 2 + 1)
        label = np.full(volume.image.shape, IGNORE, np.uint8) if volume.label is None else volume.label
        pairs.append((resize_slices(volume.image[middle], size)[0], resize_labels(label[middle], size)[0]))
    return pairs


@torch.inference_mode()
def write_samples(predict, data: VolumeData, size: int, device: torch.device, path: Path) -> None:
    """A picture of the middle slices of some validation volumes: image | label | prediction."""
    rows = []
    for image, label in middle_slices(data.val[:6], data.info, size):
        prediction = predict(torch.from_numpy(image)[None, None].to(device).float() / 255).argmax(dim=1)[0].byte().cpu().numpy()
        rows.append((image[..., None].repeat(3, axis=2), label, prediction))
    sample_grid(rows, data.info.classes, data.info.palette, path)
