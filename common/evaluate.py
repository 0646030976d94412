"""Metrics and evaluation: every number that this library reports is computed here.

    mIoU         from one confusion matrix over the whole set, every image exactly once whatever the number of GPUs.
                 A class that never occurs, neither in the labels nor in the predictions, has no IoU: it is nan (None in
                 results) and left out of the mean. A class that is predicted but never labeled scores 0.
    head, tail   mIoU over the five classes with most / fewest labeled training pixels (half of the classes if under ten).
    ECE          expected calibration error of Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, with
                 15 bins over the pixels.

    python -m common.evaluate --checkpoint runs/daw/latest.pt
    python -m common.evaluate --checkpoint runs/daw/latest.pt --split unlabeled --threshold 0.95 --output results.json
    python -m common.evaluate --checkpoint runs/daw/latest.pt --figure calibration.png
    torchrun --nproc-per-node 4 -m common.evaluate --checkpoint runs/daw/latest.pt

Checkpoints of volumes (diffrect.py) are scored by common.scores: Dice, Jaccard and surface distances of each volume.

    python -m common.evaluate --checkpoint runs/diffrect/best.pt --split test
    python -m common.evaluate --checkpoint runs/diffrect/best.pt --volumes folder_of_npz_files
"""

import argparse
import dataclasses
import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from common import medical, scores
from common.augment import normalize
from common.data import DATASETS, IGNORE, DatasetInfo, dataset_info, load_data
from common.deeplab import has_deep_stem, misfit
from common.loading import class_pixels as count_class_pixels
from common.loading import evaluation_loader
from common.files import read_checkpoint, write_json
from common.pictures import figure_class, plot_calibration
from common.runtime import Context, UserError, all_reduce_sum, run_main, start

METHODS = ("daw", "pos_meo", "usrn", "diffmatch", "diffrect")
MODES = ("whole", "sliding")

Predict = Callable[[Tensor], Tensor]  # normalised images [B, 3, H, W] -> logits [B, C, H, W]; the model in eval mode


# ---------------------------------------------------------------- intersection over union


def confusion_matrix(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Pixel counts, int64 [C, C]: rows are true classes, columns predicted ones.

    `prediction` holds classes 0..C-1, `label` of the same shape classes or 255, which is left out.
    """
    label, prediction = label.flatten().long(), prediction.flatten().long()
    cell = torch.where(label == IGNORE, num_classes**2, label * num_classes + prediction)  # last cell: left out
    counts = torch.zeros(num_classes**2 + 1, dtype=torch.int64, device=label.device)
    counts.scatter_add_(0, cell, torch.ones_like(cell))  # unlike bincount, it never waits for the GPU
    return counts[:-1].view(num_classes, num_classes)


def iou_per_class(confusion: Tensor) -> Tensor:
    """Confusion [C, C] -> IoU in 0..1, float64 [C]; nan where a class is neither in the labels nor predicted."""
    confusion = confusion.double()
    intersection = confusion.diagonal()
    return intersection / (confusion.sum(0) + confusion.sum(1) - intersection)  # 0 / 0 is the nan


def mean_iou(confusion: Tensor) -> float:
    """Mean of `iou_per_class` over the classes that have one; nan if none has."""
    return iou_per_class(confusion).nanmean().item()


def pixel_accuracy(confusion: Tensor) -> float:
    """Share of the labeled pixels whose class is right, in 0..1; nan without pixels."""
    confusion = confusion.double()
    return (confusion.trace() / confusion.sum()).item()


def head_and_tail(class_pixels: Sequence[int] | Tensor, k: int = 5) -> tuple[list[int], list[int]]:
    """The k classes with most labeled pixels, most first, and the k with fewest, fewest first.

    With C classes, k is at most C // 2, so that no class is in both.
    """
    pixels = torch.as_tensor(class_pixels).tolist()
    order = sorted(range(len(pixels)), key=lambda index: -pixels[index])  # stable: ties stay in class order
    k = min(k, len(pixels) // 2)
    return order[:k], order[::-1][:k]


# ---------------------------------------------------------------- calibration


def calibration_histogram(confidence: Tensor, correct: Tensor, valid: Tensor, bins: int = 15) -> Tensor:
    """Float64 [3, bins]: pixels, sum of their confidence and number correct, per bin of confidence.

    `confidence` in 0..1; `correct` and `valid` are bool, all of one shape. Bin m is the right-closed interval
    ((m - 1) / bins, m / bins] of Guo et al., Section 2; a confidence of 0 falls into the first.
    """
    inner = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device)[1:-1]
    index = torch.bucketize(confidence.flatten(), inner)
    weight = valid.flatten().double()
    rows = torch.stack([weight, torch.where(valid, confidence, 0).flatten().double(), weight * correct.flatten()])
    return rows.new_zeros(3, bins).scatter_add_(1, index.expand(3, -1), rows)


def expected_calibration_error(histogram: Tensor) -> float:
    """Sum over bins of (share of the pixels) x |accuracy - mean confidence|, Guo et al. Eq. 3; nan without pixels."""
    count, confidence, correct = histogram.double()
    return ((correct - confidence).abs().sum() / count.sum()).item()  # a bin's count cancels out


def reliability(histogram: Tensor) -> list[dict]:
    """One dict per bin: its `upper` end, `share` of the pixels, mean `confidence` and `accuracy` (None if empty)."""
    count, confidence, correct = histogram.double()
    columns = zip((count / count.sum()).tolist(), (confidence / count).tolist(), (correct / count).tolist())
    return [{"upper": (index + 1) / len(count), "share": _number(share), "confidence": _number(mean),
             "accuracy": _number(accuracy)} for index, (share, mean, accuracy) in enumerate(columns)]


# ---------------------------------------------------------------- prediction


def sliding_window(predict: Predict, images: Tensor, crop: int, stride: int | None = None) -> Tensor:
    """Class probabilities [B, C, H, W], float32, averaged over overlapping windows of crop x crop pixels.

    `stride` is 2/3 of the crop unless given. Every window has the full size: the last one of a row or column is
    shifted back to end at the border. Along a side shorter than the crop the window is as long as the image.
    """
    stride = max(1, crop * 2 // 3) if stride is None else stride
    if not 0 < stride <= crop:
        raise ValueError(f"stride {stride} with crop {crop}: the windows would not cover the image")
    height, width = images.shape[2:]
    total, count = None, images.new_zeros(height, width, dtype=torch.float32)
    for top in _window_starts(height, crop, stride):
        for left in _window_starts(width, crop, stride):
            window = (..., slice(top, top + crop), slice(left, left + crop))
            probabilities = predict(images[window]).float().softmax(dim=1)
            if total is None:
                total = probabilities.new_zeros(*probabilities.shape[:2], height, width)
            total[window] += probabilities
            count[window] += 1
    return total.div_(count)


def _window_starts(size: int, crop: int, stride: int) -> list[int]:
    last = max(size - crop, 0)
    return [min(start, last) for start in range(0, last + stride, stride)]


def class_probabilities(predict: Predict, images: Tensor, info: DatasetInfo, mode: str | None = None) -> Tensor:
    """Normalised images [B, 3, H, W] -> probabilities [B, C, H, W], float32 whatever `predict` computes in.

    `mode`: "whole" or "sliding" (windows of `info.crop`); None follows the data set's protocol.
    """
    mode = mode or info.evaluation
    if mode not in MODES:
        raise UserError(f"unknown evaluation mode {mode!r}: choose one of {', '.join(MODES)}")
    return sliding_window(predict, images, info.crop) if mode == "sliding" else predict(images).float().softmax(dim=1)


# ---------------------------------------------------------------- evaluation


@torch.inference_mode()
def evaluate(predict: Predict, loader: Iterable[dict], info: DatasetInfo, context: Context,
             class_pixels: Sequence[int] | Tensor | None = None, threshold: float | None = None,
             mode: str | None = None) -> dict:
    """One pass over every rank's `loader` (common.loading.evaluation_loader); the same plain Python dict on every rank.

    In %: miou, iou {class: value}, pixel_accuracy; with the labeled set's `class_pixels` head_miou and tail_miou.
    In pixels: confusion, a list of rows (true classes) of counts (predicted classes).
    In 0..1: ece, reliability (see there); with a `threshold` pseudo_label_share, of the pixels with at least this
    confidence, and pseudo_label_accuracy among them. images is their number. Undefined values are None.
    """
    classes = info.num_classes
    shapes = {"confusion": (classes, classes), "histogram": (3, 15), "accepted": (2,), "images": (1,)}
    totals = {name: torch.zeros(shape, dtype=torch.float64, device=context.device) for name, shape in shapes.items()}
    tuning, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # it would start anew for every size
    for batch in loader:
        images = normalize(batch["image"].to(context.device, non_blocking=True))
        label = batch["label"].to(context.device, non_blocking=True)
        confidence, prediction = class_probabilities(predict, images, info, mode).max(dim=1)
        valid, correct = label != IGNORE, prediction == label
        totals["confusion"] += confusion_matrix(prediction, label, classes)
        totals["histogram"] += calibration_histogram(confidence, correct, valid)
        totals["images"] += len(images)
        if threshold is not None:
            accepted = valid & (confidence >= threshold)
            totals["accepted"] += torch.stack([accepted.sum(), (accepted & correct).sum()])

    torch.backends.cudnn.benchmark = tuning
    # One message between the ranks; float64 holds counts exactly up to 2^53.
    flat = all_reduce_sum(torch.cat([total.flatten() for total in totals.values()])).cpu()
    parts = flat.split([total.numel() for total in totals.values()])
    confusion, histogram, accepted, images = (part.view(shape) for part, shape in zip(parts, shapes.values()))
    iou = 100 * iou_per_class(confusion)
    results = {
        "miou": _number(100 * mean_iou(confusion)),
        "iou": {name: _number(value) for name, value in zip(info.classes, iou.tolist())},
        "pixel_accuracy": _number(100 * pixel_accuracy(confusion)),
        "ece": _number(expected_calibration_error(histogram)),
        "images": int(images.item()),
        "reliability": reliability(histogram),
        "confusion": confusion.long().tolist(),
    }
    if class_pixels is not None:
        head, tail = head_and_tail(class_pixels)
        results["head_miou"] = _number(iou[head].nanmean().item())
        results["tail_miou"] = _number(iou[tail].nanmean().item())
    if threshold is not None:
        results["pseudo_label_share"] = _number((accepted[0] / confusion.sum()).item())
        results["pseudo_label_accuracy"] = _number((accepted[1] / accepted[0]).item())
    return results


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no nan


# ---------------------------------------------------------------- checkpoints


def load_model(path: str | Path, device: torch.device | str, use: str = "best available",
               steps: int | None = None) -> tuple[Predict, object, DatasetInfo | medical.VolumeInfo]:
    """Checkpoint -> (predict, config, info). `use`: "ema", "model", or the EMA weights where the checkpoint has them.

    `steps` replaces the config's number of sampling steps. `info.crop`, the sliding window, is the crop of training.
    Raises UserError for whatever is wrong with the file, and for `steps` below 1 or of a method that does not sample.
    """
    checkpoint = read_checkpoint(Path(path))
    method, saved = checkpoint.get("method"), checkpoint.get("config", {})
    if method not in METHODS:
        raise UserError(f"{path} is of an unknown method {method!r}; known are {', '.join(METHODS)}")
    known = {**DATASETS, **medical.DATASETS}
    if saved.get("dataset") not in known:
        raise UserError(f"{path} is of an unknown data set {saved.get('dataset')!r}; known are {', '.join(known)}")
    choices = {"best available": ("ema", "model"), "ema": ("ema",), "model": ("model",)}[use]
    state = next((checkpoint[name] for name in choices if checkpoint.get(name)), None)
    if state is None:
        raise UserError(f"{path} holds no weights under {' or '.join(choices)}")

    module, name = importlib.import_module(method), saved["dataset"]
    info = medical.DATASETS[name] if name in medical.DATASETS else dataset_info(name, saved.get("classes"))
    fields = {field.name for field in dataclasses.fields(module.Config) if field.init}
    config = module.Config(**{name: value for name, value in saved.items() if name in fields})
    if steps is not None:
        if "steps" not in fields:
            raise UserError(f"{path}: --steps is for methods that sample (diffmatch); this checkpoint is of {method}")
        if steps < 1:
            raise UserError(f"{path}: --steps takes at least 1, not {steps}")
        config = dataclasses.replace(config, steps=steps)
    try:  # with random weights: the encoder's come from the checkpoint, there is no need to download them first
        weights = "deep_stem" if has_deep_stem(state) else "none"
        model = module.build_model(dataclasses.replace(config, weights=weights), info.num_classes)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{path}: cannot build the model of its config: {error}") from error
    load_weights(model, state, path)
    predict = module.predictor(model.to(device).eval(), config)
    return predict, config, dataclasses.replace(info, crop=config.crop or info.crop)


def load_weights(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Strict `load_state_dict` whose UserError names the first keys that do not fit."""
    if wrong := misfit(model, state):
        raise UserError(f"the weights in {path} do not fit the model: {wrong}")
    model.load_state_dict(state)


# ---------------------------------------------------------------- command line


def report(results: dict, info: DatasetInfo, class_pixels: Tensor) -> str:
    """The tables that the command line prints, everything in %."""
    def percent(value, scale=100):
        return "    -" if value is None else f"{scale * value:5.1f}"

    shares, (head, tail) = (class_pixels / class_pixels.sum()).tolist(), head_and_tail(class_pixels)
    width = max(map(len, ("class", *info.classes)))
    lines = [f"{'class':{width}}    IoU   labeled pixels"]
    for index, (name, iou) in enumerate(results["iou"].items()):
        mark = "  head" if index in head else "  tail" if index in tail else ""
        lines.append(f"{name:{width}}  {percent(iou, 1)}   {100 * shares[index]:14.2f}{mark}")
    lines += ["", "confidence   pixels   mean confidence   accuracy"]
    lines += [f"<= {row['upper']:.3f}  {percent(row['share']):>8}{percent(row['confidence']):>18}"
              f"{percent(row['accuracy']):>11}" for row in results["reliability"]]
    lines += ["", f"mIoU {percent(results['miou'], 1)}   head {percent(results['head_miou'], 1)}   tail "
              f"{percent(results['tail_miou'], 1)}   pixel accuracy {percent(results['pixel_accuracy'], 1)}   "
              f"ECE {percent(results['ece'])}   ({results['images']} images, all in %)"]
    if "pseudo_label_share" in results:
        lines.append(f"pseudo-labels at confidence >= {results['threshold']}: {percent(results['pseudo_label_share'])} % "
                     f"of the pixels, {percent(results['pseudo_label_accuracy'])} % of them right")
    return "\n".join(lines)


def evaluate_volumes(args: argparse.Namespace, predict: Predict, config, info: medical.VolumeInfo, context: Context) -> None:
    """The command for a checkpoint of volumes."""
    if args.mode or args.threshold is not None or args.figure:
        raise UserError("--mode, --threshold and --figure are for images, not for volumes")
    files = medical.volumes_in(args.volumes) if args.volumes else getattr(medical.load_volumes(config, context), args.split)
    if not files:
        raise UserError(f"{info.name} has no {args.split} list")
    results = {"checkpoint": args.checkpoint, "split": str(args.volumes or args.split), "released_empty": args.released_empty,
               **scores.evaluate_volumes(predict, files, info, context, args.released_empty)}
    if context.is_main:
        print(scores.report(results))
        if args.output:
            write_json(args.output, results)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m common.evaluate", description="Evaluate a checkpoint.")
    parser.add_argument("--checkpoint", required=True, help="file written by a method's training")
    parser.add_argument("--data-root", help="folder of the data set, if not where training had it")
    parser.add_argument("--split", default="val", choices=("val", "test", "tune", "unlabeled"), help="test: volumes only")
    parser.add_argument("--volumes", type=Path, help="score the volumes in this folder (.npz with labels) instead of a data set's")
    parser.add_argument("--released-empty", action="store_true", help="volumes: score empty masks as DiffRect's test script (0, HD95 50, ASD 10)")
    parser.add_argument("--mode", choices=MODES, help="default: the data set's protocol")
    parser.add_argument("--threshold", type=float, help="also report the pseudo-labels at or above this confidence")
    parser.add_argument("--steps", type=int, help="sampling steps of diffmatch; default: the checkpoint's")
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    parser.add_argument("--figure", type=Path, help="draw reliability and confusion matrix into this PNG file (needs matplotlib)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    parser.add_argument("--num-workers", type=int, help="processes that read images, per GPU")
    args = parser.parse_args()
    if args.figure:
        figure_class()  # if it is missing, say so now and not after the evaluation

    context = start(args.device)
    predict, config, info = load_model(args.checkpoint, context.device, steps=args.steps)
    if args.data_root:
        config = dataclasses.replace(config, data_root=args.data_root)
    if isinstance(info, medical.VolumeInfo):
        evaluate_volumes(args, predict, config, info, context)
        return
    if args.volumes or args.released_empty:
        raise UserError(f"--volumes and --released-empty are for checkpoints of volumes; {args.checkpoint} is of {info.name}")
    data = load_data(config, context)
    samples, pixels = getattr(data, args.split, None), count_class_pixels(data)
    if not samples or any(sample.mask is None for sample in samples):
        raise UserError(f"{info.name} has no {args.split} images with labels")
    loader = evaluation_loader(samples, data, context, args.num_workers)
    sampling = {"steps": config.steps} if hasattr(config, "steps") else {}
    results = {"checkpoint": args.checkpoint, "split": args.split, "mode": args.mode or info.evaluation, **sampling,
               "threshold": args.threshold, **evaluate(predict, loader, info, context, pixels, args.threshold, args.mode)}
    if context.is_main:
        print(report(results, info, pixels))
        if args.output:
            write_json(args.output, results)
        if args.figure:
            plot_calibration(results, info.classes, args.figure)


if __name__ == "__main__":
    run_main(main)
