"""Overlap and surface distances of two binary masks, such as one class of a predicted and of a labeled volume.

    dice      2 |A and B| / (|A| + |B|), in 0..1
    jaccard   |A and B| / |A or B|, in 0..1, also called IoU
    hd95      95 % Hausdorff distance: the 95th percentile of the distances of both directions, pooled into one list
    asd       average surface distance, directed: the mean distance from the prediction's surface to the label's
    assd      average symmetric surface distance: the mean of asd and of the asd from the label to the prediction

The surface of a mask is its voxels with a face neighbour outside of it; a distance is that from the centre of a surface
voxel of one mask to the centre of the nearest surface voxel of the other. hd95 and asd are what medpy.metric.binary's
hd95(prediction, label) and asd(prediction, label) return, up to rounding, and the field's tables are medpy's in voxels: leave
`spacing` out to compare with them. With the spacing in mm, all three are in mm. Others' numbers of the same name differ:
MONAI's hd95 is the larger of the two directed percentiles, and medpy's own assd, as here up to version 0.5.1, is since 0.5.2
the mean of both lists together, in which the larger surface weighs more.

    from common.surface import dice, distance_metrics

    prediction, label = predicted_classes == 1, volume.label == 1  # bool [Z, H, W], arrays or tensors
    dice(prediction, label)  # 0.91
    if prediction.any() and label.any():  # a distance to nothing is not defined
        distance_metrics(prediction, label)  # {"hd95": 3.0, "asd": 0.74, "assd": 0.69} in voxels
        distance_metrics(prediction, label, volume.spacing)  # the same in mm, if the spacing is known
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Mask = np.ndarray | Tensor  # bool or numbers, where all but 0 is in the mask; tensors on the CPU


def _as_mask(mask: Mask) -> Tensor:
    if isinstance(mask, Tensor):
        return mask.bool()
    return torch.from_numpy(np.array(mask, dtype=bool, order="C"))  # a copy: torch takes no negative strides or read-only arrays


def _as_masks(first: Mask, second: Mask) -> tuple[Tensor, Tensor]:
    first, second = _as_mask(first), _as_mask(second)
    if first.shape != second.shape:
        raise ValueError(f"two masks of different shapes: {tuple(first.shape)} and {tuple(second.shape)}")
    return first, second


# ---------------------------------------------------------------- overlap


def dice(a: Mask, b: Mask) -> float:
    """Dice coefficient in 0..1 of two masks of one shape; 1 if both are empty, 0 if one is. ValueError for different shapes."""
    a, b = _as_masks(a, b)
    total = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / total if total else 1.0


def jaccard(a: Mask, b: Mask) -> float:
    """Jaccard index in 0..1 of two masks of one shape; 1 if both are empty, 0 if one is. ValueError for different shapes."""
    a, b = _as_masks(a, b)
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


# ---------------------------------------------------------------- distance transform


def distance_transform(mask: Mask, spacing: Sequence[float] | None = None) -> Tensor:
    """Exact Euclidean distance from every voxel to the nearest voxel of the mask: float64 of the mask's shape.

    `mask` is [Z, H, W], [H, W] or of any other number of axes; `spacing` the distance between voxel centres along each of
    them, 1 if None. A voxel of the mask has distance 0; all are inf if the mask is empty. Raises ValueError for a spacing
    of another length or that is not positive.

    The square of the distance is a sum over axes, so its minimum is found one axis at a time (Felzenszwalb and
    Huttenlocher, "Distance Transforms of Sampled Functions", Theory of Computing 2012): the first axis gives the distance
    to the mask's nearest voxel in the same line, each further axis min over j of f(j) + (step (i - j))^2 of what is so far.
    """
    mask = _as_mask(mask)
    steps, (first, *others) = _steps(mask, spacing), _order(mask)
    squared = _in_line(mask, first, steps[first])
    for axis in others:
        squared = _min_plus(squared, axis, steps[axis])
    return squared.sqrt_()


def _distances_at(points: Tensor, mask: Tensor, spacing: Sequence[float] | None) -> Tensor:
    """`distance_transform(mask, spacing)[points]` for bool `points`, which leaves the last axis at all other voxels out."""
    if mask.ndim == 1 or 5 * int(points.sum()) > points.numel():  # reading so many voxels one by one takes longer than all in order
        return distance_transform(mask, spacing)[points]
    steps, (first, *others) = _steps(mask, spacing), _order(mask)
    squared = _in_line(mask, first, steps[first])
    for axis in others[:-1]:
        squared = _min_plus(squared, axis, steps[axis])
    return _min_plus_at(points, squared, others[-1], steps[others[-1]]).sqrt_()


def _order(mask: Tensor) -> list[int]:
    """The axes, the longest first, where length costs least, and the second longest last, where only some voxels may be wanted."""
    *others, longest = sorted(range(mask.ndim), key=lambda axis: mask.shape[axis])
    return [longest, *others]


def _steps(mask: Tensor, spacing: Sequence[float] | None) -> list[float]:
    steps = [1.0] * mask.ndim if spacing is None else [float(step) for step in spacing]
    if len(steps) != mask.ndim or not all(0 < step < float("inf") for step in steps):
        raise ValueError(f"spacing {steps}: a mask with {mask.ndim} axes needs {mask.ndim} positive numbers")
    return steps


def _in_line(mask: Tensor, axis: int, step: float) -> Tensor:
    """Squared distance from each voxel to the nearest of the mask along an axis, float64; inf in lines without any."""
    shape = [-1 if other == axis else 1 for other in range(mask.ndim)]
    position = torch.arange(mask.shape[axis], dtype=torch.float64).view(shape)
    before = torch.where(mask, position, -torch.inf).cummax(axis).values  # the mask's last voxel up to here
    after = torch.where(mask, position, torch.inf).flip(axis).cummin(axis).values.flip(axis)  # its first from here on
    return torch.minimum(position - before, after - position).mul_(step).square_()


def _min_plus(values: Tensor, axis: int, step: float) -> Tensor:
    """min over j of values(j) + (step (i - j))^2 for each i along an axis; `values`, of any shape, are at least 0."""
    length = values.shape[axis]
    lowest, sums = values.clone(), torch.empty_like(values)
    for offset in range(1, length):
        added = (step * offset) ** 2
        if not added < lowest.max():  # nothing this far away, or farther, can be nearer
            break
        for here, there in ((0, offset), (offset, 0)):
            part, total = (tensor.narrow(axis, here, length - offset) for tensor in (lowest, sums))
            torch.add(values.narrow(axis, there, length - offset), added, out=total)
            torch.minimum(part, total, out=part)
    return lowest


def _min_plus_at(points: Tensor, values: Tensor, axis: int, step: float) -> Tensor:
    """`_min_plus(values, axis, step)[points]`, where each of the points is soon dropped when its minimum is found."""
    length, stride = values.shape[axis], values.shape[axis + 1 :].numel()
    values, point = values.flatten(), points.flatten().nonzero().squeeze(1)
    start = point - point // stride % length * stride  # both ends of the line that each point is on
    end = start + (length - 1) * stride
    lowest = values[point]
    found, place = lowest.clone(), torch.arange(len(point))
    for offset in range(1, length):
        added = (step * offset) ** 2
        unfinished = lowest > added  # the others' minimum is found, as in _min_plus
        if 2 * int(unfinished.sum()) <= len(unfinished):
            found[place] = lowest
            lowest, place, point, start, end = (tensor[unfinished] for tensor in (lowest, place, point, start, end))
            if not len(place):
                break
        # Beyond an end, the end itself is taken: it is nearer than `offset`, so that `added` is too much and it changes nothing.
        nearby = torch.minimum(values[torch.maximum(point - offset * stride, start)], values[torch.minimum(point + offset * stride, end)])
        lowest = torch.minimum(lowest, nearby.add_(added))
    found[place] = lowest
    return found


# ---------------------------------------------------------------- surface distances


def surface(mask: Mask) -> Tensor:
    """Voxels of the mask with a face neighbour that is not in it, bool of the mask's shape.

    Outside of the volume counts as not in the mask, as in medpy: in the first and last slice of a volume, all of the mask
    is surface, and so is the whole of a volume of one or two slices.
    """
    mask = _as_mask(mask)
    inside = mask.clone()
    for axis in range(mask.ndim):
        for end in (0, -1):
            inside.select(axis, end).fill_(False)
        rest = mask.shape[axis] - 1
        inside.narrow(axis, 1, rest).logical_and_(mask.narrow(axis, 0, rest))
        inside.narrow(axis, 0, rest).logical_and_(mask.narrow(axis, 1, rest))
    return mask & ~inside


def surface_distances(prediction: Mask, label: Mask, spacing: Sequence[float] | None = None) -> tuple[Tensor, Tensor]:
    """Distance of every surface voxel of each mask to the other's nearest: (prediction to label, label to prediction).

    Two masks of one shape -> float64 [N] and [M], as many as the prediction and the label have surface voxels, in their
    order in memory; in voxels, or in the unit of `spacing` (one number an axis). Raises ValueError for different shapes and for
    an empty mask.
    """
    prediction, label = _as_masks(prediction, label)
    for name, mask in (("prediction", prediction), ("label", label)):
        if not mask.any():
            raise ValueError(f"the {name} is empty: it has no surface to measure a distance to")
    # Both are cropped to the box around their union. What this cuts off is in neither mask, and so counts like the outside of
    # the volume: no voxel becomes or ceases to be surface, and the nearest surface voxel is never cut off.
    box = _bounding_box(prediction | label)
    prediction, label = surface(prediction[box]), surface(label[box])
    return _distances_at(prediction, label, spacing), _distances_at(label, prediction, spacing)


def _bounding_box(mask: Tensor) -> tuple[slice, ...]:
    """The smallest box around a mask that is not empty, as an index."""
    positions = mask.nonzero()
    return tuple(slice(low, high + 1) for low, high in zip(positions.amin(dim=0).tolist(), positions.amax(dim=0).tolist()))


def distance_metrics(prediction: Mask, label: Mask, spacing: Sequence[float] | None = None) -> dict[str, float]:
    """{"hd95", "asd", "assd"} of two masks of one shape, as defined above: in voxels, or mm if the spacing is in mm.

    Raises ValueError for different shapes and for an empty mask.
    """
    to_label, to_prediction = surface_distances(prediction, label, spacing)
    asd = to_label.mean().item()
    pooled = torch.cat([to_label, to_prediction]).numpy()
    return {
        "hd95": float(np.percentile(pooled, 95)),  # torch.quantile takes no more than 16 million
        "asd": asd,
        "assd": (asd + to_prediction.mean().item()) / 2,
    }
