"""Metrics of label maps, the evaluation of a checkpoint, the table of a folder of runs.

mIoU is that of one confusion matrix over all images. A class that is neither labeled nor predicted
has no IoU: nan, None in results, left out of the mean. One predicted but never labeled scores 0.
Head and tail are the five classes (at most half) with most and fewest labeled pixels. ECE is that
of Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, 15 bins over the pixels.

    python -m common.evaluate --checkpoint runs/mine/best.pt --threshold 0.95 --figure c.png
    torchrun --nproc-per-node 4 -m common.evaluate --checkpoint runs/mine/best.pt --output r.json
    python -m common.evaluate --table runs/shapes      # mean ± sd over runs/shapes/<row>/seed<k>
    python -m common.evaluate --claims runs/shapes runs/phantom      # .docs/claims.tsv held to them
"""

import csv
import dataclasses
import importlib
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import medical
from common.augment import IGNORE, normalize
from common.data import Data, DataOptions, EvaluationSet, dataset_info, load_data, make_loader
from common.figures import plot_calibration, sample_grid
from common.runtime import (RESUMABLE, Parser, all_reduce_sum, evaluating, init_distributed,
                            parse, rank, read_checkpoint, read_json, read_metrics, reading,
                            require, require_finite, run_main, say, world_size, write_json)

ROOT = Path(__file__).resolve().parent.parent  # where the methods' scripts lie
CLAIMS = ROOT / ".docs/claims.tsv"
RUN_FILES = {"best.pt", "config.json", "latest.pt", "metrics.jsonl", "results.json", "samples.png"}
BINS = 15
MODES = "whole", "aligned", "sliding"
STRIDE = 16  # of convolutional encoders, or a multiple
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
         2.145, 2.131, 2.120, 2.110, 2.101, 2.093)  # Student's t, 1 to 19 df; then a bit too wide

Predict = Callable[[Tensor], Tensor]  # normalised images [B, 3, H, W] -> logits [B, C, H, W]


# ---------------------------------------------------------------- metrics


def confusion_matrix(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Pixel counts, int64 [C, C]: rows are labels but for 255, columns predictions, 0 to C - 1."""
    label = label.flatten().long()
    left_out = num_classes**2  # a last cell, which is cut off
    cell = label * num_classes + prediction.flatten()
    cell = torch.where(label == IGNORE, left_out, cell)
    counts = torch.zeros(left_out + 1, dtype=torch.int64, device=label.device)
    counts.scatter_add_(0, cell, torch.ones_like(cell))  # unlike bincount, no wait for the GPU
    return counts[:-1].view(num_classes, num_classes)


def iou_per_class(confusion: Tensor) -> Tensor:
    """Confusion [C, C] -> IoU in 0..1, float64 [C]; nan for a class that occurs nowhere."""
    confusion = confusion.double()
    intersection = confusion.diagonal()
    return intersection / (confusion.sum(dim=0) + confusion.sum(dim=1) - intersection)


def head_and_tail(pixels: Sequence[int] | Tensor) -> tuple[list[int], list[int]]:
    """The five classes with most pixels, most first, and with fewest; at most half each."""
    order = torch.as_tensor(pixels).argsort(descending=True, stable=True).tolist()
    k = min(5, len(order) // 2)
    return order[:k], order[::-1][:k]


def pixel_accuracy(prediction: Tensor, label: Tensor, chosen: Tensor) -> Tensor:
    """Share of right ones among `chosen` pixels, bool or weights, that have a label; nan of none.
    All [B, H, W]; 0-d."""
    known = chosen * (label != IGNORE)
    return (known * (prediction == label)).sum() / known.sum()


def calibration_histogram(confidence: Tensor, correct: Tensor, valid: Tensor) -> Tensor:
    """Float64 [3, BINS]: pixels, sum of their confidence, number of correct ones.

    `confidence` in 0..1; `correct` and `valid` are bool, all of one shape. Bin m is the interval
    ((m - 1) / BINS, m / BINS] of Guo et al., Section 2; a confidence of 0 is in the first.
    """
    edges = torch.linspace(0, 1, BINS + 1, dtype=confidence.dtype, device=confidence.device)
    bins = torch.bucketize(confidence.flatten(), edges[1:-1])
    rows = torch.stack([torch.ones_like(confidence), confidence, correct])
    rows = torch.where(valid, rows, 0).flatten(1).double()
    return rows.new_zeros(3, BINS).scatter_add_(1, bins.expand(3, -1), rows)


def expected_calibration_error(histogram: Tensor) -> float:
    """Guo et al. Eq. 3: mean over pixels of their bin's |accuracy - mean confidence|, in 0..1."""
    count, confidence, correct = histogram
    return ((correct - confidence).abs().sum() / count.sum()).item()  # a bin's count cancels out


def reliability(histogram: Tensor) -> list[dict]:
    """Per bin its `upper` end, `share` of the pixels, mean `confidence` and `accuracy`, in 0..1."""
    count, confidence, correct = histogram
    shares, confidence, accuracy = count / count.sum(), confidence / count, correct / count
    return [{"upper": (index + 1) / len(count), "share": finite(shares[index]),
             "confidence": finite(confidence[index]), "accuracy": finite(accuracy[index])}
            for index in range(len(count))]


def finite(value: float | Tensor) -> float | None:
    return float(value) if math.isfinite(value) else None  # JSON has no nan


# ---------------------------------------------------------------- evaluation


def class_probabilities(predict: Predict, images: Tensor, mode: str, crop: int) -> Tensor:
    """Softmax of normalised images, float32 [B, C, H, W], by one of MODES.

    "whole": as they are. "aligned": the same, first continued beyond the right and lower border to
    the crop's remainder by STRIDE. A convolution's stride s has feature i on pixel s i, enlarging
    with aligned corners leaves it there only on s k + 1 pixels, as UniMatch's crops have.
    "sliding": averaged over windows of crop x crop pixels that overlap by a third. The last one of
    a row or column ends at the border; a side shorter than the crop is one window, aligned.
    """
    height, width = images.shape[2:]
    if mode != "whole":
        below, right = ((crop - side) % STRIDE if mode == "aligned" or side < crop else 0
                        for side in (height, width))
        images = F.pad(images, (0, right, 0, below), mode="replicate")
    crop = crop if mode == "sliding" else max(images.shape[2:])  # one window of all
    stride = max(1, crop * 2 // 3)
    starts = ([*range(0, side - crop, stride), max(side - crop, 0)] for side in images.shape[2:])
    total = None
    count = images.new_zeros(images.shape[2:], dtype=torch.float32)
    for top, left in itertools.product(*starts):
        rows, columns = slice(top, top + crop), slice(left, left + crop)
        probabilities = predict(images[..., rows, columns]).float().softmax(dim=1)
        if total is None:
            total = probabilities.new_zeros(*probabilities.shape[:2], *images.shape[2:])
        total[..., rows, columns] += probabilities
        count[rows, columns] += 1
    return total.div_(count)[..., :height, :width]


@torch.backends.cudnn.flags(enabled=True)  # benchmark=False: it would start anew for every size
def evaluate(network: nn.Module, data: Data, split: str, crop: int, device: torch.device,
             num_workers: int | None = None, threshold: float | None = None,
             mode: str | None = None) -> dict:
    """Score a network on a list of `data`, each image once; the same plain dict on every rank.

    In %: miou, iou {class: value}, pixel_accuracy, head_miou, tail_miou. In pixels: confusion, rows
    (true classes) of counts. In 0..1: ece, reliability; with a `threshold` pseudo_label_share, of
    the pixels with at least this confidence, and pseudo_label_accuracy among them. images is their
    number. Undefined values are None. mode: the data set's unless given. The network is put
    into eval mode, with running statistics averaged over ranks, and each part back into its own.
    """
    samples = getattr(data, split, [])
    require(bool(samples) and all(sample.mask for sample in samples),
            f"{data.info.name} has no {split} images with labels")
    mode, classes = mode or data.info.evaluation, data.info.num_classes
    sizes = (classes**2, 3 * BINS, 2, 1)
    totals = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
    confusion, histogram, accepted, images = totals.split(sizes)  # views
    mine = EvaluationSet(samples[rank() :: world_size()], data.root, classes)  # each image once
    with evaluating(network), torch.inference_mode():
        for batch in make_loader(mine, device, num_workers, batch_size=data.info.eval_batch):
            image = normalize(batch["image"].to(device, non_blocking=True))
            label = batch["label"].to(device, non_blocking=True)
            confidence, prediction = class_probabilities(network, image, mode, crop).max(dim=1)
            valid, correct = label != IGNORE, prediction == label
            confusion += confusion_matrix(prediction, label, classes).flatten()
            histogram += calibration_histogram(confidence, correct, valid).flatten()
            images += len(image)
            if threshold is not None:
                chosen = valid & (confidence >= threshold)
                accepted += torch.stack([chosen.sum(), (chosen & correct).sum()])

    # One message between the ranks; float64 holds counts exactly up to 2^53.
    confusion, histogram, accepted, images = all_reduce_sum(totals).cpu().split(sizes)
    require_finite(histogram)
    confusion, histogram = confusion.view(classes, classes), histogram.view(3, BINS)
    iou, pixels = 100 * iou_per_class(confusion), confusion.sum()
    head, tail = head_and_tail(data.class_pixels)
    results = {
        "miou": finite(iou.nanmean()),
        "iou": dict(zip(data.info.classes, map(finite, iou))),
        "pixel_accuracy": finite(100 * (confusion.trace() / pixels)),
        "ece": finite(expected_calibration_error(histogram)),
        "images": int(images),
        "mode": mode,
        "reliability": reliability(histogram),
        "confusion": confusion.long().tolist(),
        "head_miou": finite(iou[head].nanmean()),
        "tail_miou": finite(iou[tail].nanmean()),
    }
    if threshold is not None:
        results["pseudo_label_share"] = finite(accepted[0] / pixels)
        results["pseudo_label_accuracy"] = finite(accepted[1] / accepted[0])
    return results


@torch.inference_mode()
def write_samples(predict: Predict, data: Data, crop: int, device: torch.device, path: Path,
                  captions: Sequence[str] = ("image", "label", "prediction")) -> None:
    """Image | label | each label map of `predict`, image [1, 3, H, W] -> logits [n, C, H, W]."""
    if rank() != 0:
        return
    rows = []
    for item in EvaluationSet(data.val[:6], data.root, data.info.num_classes):
        image = normalize(item["image"][None].to(device))
        maps = class_probabilities(predict, image, data.info.evaluation, crop).argmax(dim=1)
        rows.append((item["image"], item["label"], *maps.byte().cpu()))
    sample_grid(rows, data.info.classes, data.info.palette, path, captions)


# ---------------------------------------------------------------- checkpoints


def load_predictor(path: str | Path, device: torch.device | str, changes: Sequence[str] = ()):
    """Checkpoint -> (network in eval mode, config dict, info of the data set).

    The network, normalised images -> logits [B, C, H, W], is what `build_predictor` of the
    method's script makes of the EMA's weights, where there are some. `changes`, "name=value" each,
    replace values of the config, checked as on the command line. Raises UserError for whatever is
    wrong with the file or the changes.
    """
    checkpoint = read_checkpoint(path)
    with reading(path):
        method, config = checkpoint["method"], dict(checkpoint["config"])
        known = sorted(script.stem for script in ROOT.glob("*.py"))
        require(method in known,
                f"{path} is of the method {method!r}: known are {', '.join(known)}")
        script = importlib.import_module(method)
        argv = {}  # read together: a folder needs its classes
        for name, _, value in (change.partition("=") for change in changes):
            require(name in config, f"{path}: {method} has no option {name!r}")
            flag = name.replace("_", "-")
            flags = {"true": f"--{flag}", "false": f"--no-{flag}"}
            argv[name] = flags.get(value.lower(), f"--{flag}={value}")
        options = vars(parse(script.Config, argv=[*argv.values()]))
        config |= {name: options[name] for name in argv}
        info = medical.DATASETS.get(config["dataset"])
        info = info or dataset_info(config["dataset"], config.get("classes"))
        state = checkpoint.get("ema") or checkpoint["model"]
        network = script.build_predictor(config, info.num_classes, state)
    return network.to(device).eval(), config, info


def data_options(config: dict, options_class=DataOptions):
    """The part of a checkpoint's config from which load_data and load_volumes make lists again."""
    names = {field.name for field in dataclasses.fields(options_class)}
    return options_class(**{name: value for name, value in config.items() if name in names})


# ---------------------------------------------------------------- the table of runs

COLUMNS = {"miou": "mIoU", "head_miou": "head mIoU", "tail_miou": "tail mIoU", "ece": "ECE",
           "dice": "Dice", "jaccard": "Jaccard", "hd95": "HD95", "asd": "ASD",
           "empty_masks": "empty masks"}  # of images, of volumes


def finished_runs(folder: Path) -> dict[str, dict[str, Path]]:
    """{row: {"seed0": run folder}} of folder/<row>/seed<k>, as they were last started.

    A run whose scores of the test list are still to come, where others have them, is left out; rows
    whose runs have different options are named.
    """
    configs = sorted(folder.glob("*/seed*/config.json"), key=lambda path: path.stat().st_mtime)
    found = {path: read_json(path.with_name("results.json")) for path in configs}
    tested = {results["method"] for results in found.values() if "test" in results}
    rows = {}
    for path, results in found.items():
        run, last = path.parent, results.get("last", {})
        finished = last.get("iteration") == read_json(path)["iterations"]
        if finished and (results["method"] not in tested or "test" in results):
            rows.setdefault(run.parent.name, {})[run.name] = run
        else:
            print(f"not finished, left out: {run}", file=sys.stderr)
    for row, runs in rows.items():
        first, *others = (read_json(run / "config.json") for run in runs.values())
        differing = sorted(name for name in first.keys() - RESUMABLE - {"seed"}
                           if any(other.get(name) != first[name] for other in others))
        if differing:
            print(f"warning: the runs of {row} differ in {', '.join(differing)}", file=sys.stderr)
    return rows


def markdown(lines: list[list[str]]) -> str:
    """A table; the first line holds the titles."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def table_of_runs(folder: Path, per_class: bool = False) -> str:
    """Markdown: mean ± sd over seeds of every finished run in folder/<row>/seed<k>.

    The scores are those of the test list where a run has one (volumes), else of the last
    evaluation: none is picked by its score.
    """
    rows = {row: [columns(scores(run), per_class) for run in runs.values()]
            for row, runs in finished_runs(folder).items()}
    require(bool(rows), f"no finished run in {folder}: there is no <row>/seed<k>/results.json")
    titles = {tuple(one) for seeds in rows.values() for one in seeds}
    require(len(titles) == 1, f"{folder} has runs on different classes, or on images and volumes: "
                              f"put them into folders of their own")
    lines = [["run", "seeds", *titles.pop()]]
    for row, seeds in rows.items():
        values = zip(*(one.values() for one in seeds))  # of each column one per seed
        lines.append([row, str(len(seeds)), *map(cell, values)])
    return markdown(lines)


def scores(run: Path) -> dict:
    results = read_json(run / "results.json")
    return results.get("test") or results["last"]


def table_of_claims(folders: Sequence[Path]) -> str:
    """Markdown: what .docs/claims.tsv says of the papers, and what the runs of each folder say.

    A claim is a difference: of two rows' mIoU or Dice, or of what stands behind a colon, see
    `quantity`. Runs of one seed make a pair; a cell has the pairs' mean difference, its 95 %
    interval (Student's t) and a word: "holds" or "reversed" where 0 is not in the interval, which
    one claim in twenty shows by chance. Claims for which no folder has runs are left out.
    """
    found = {folder: finished_runs(folder) for folder in folders}
    require(any(found.values()), f"no finished run in {', '.join(map(str, folders))}")
    lines = [["claim", "paper", *map(str, found)]]
    for claim in csv.DictReader(CLAIMS.read_text().splitlines(), delimiter="\t"):
        cells = [verdict(differences(rows, claim["higher"], claim["lower"]))
                 for rows in found.values()]
        if set(cells) != {"-"}:
            lines.append([claim["claim"], claim["paper"] or "-", *cells])
    return markdown(lines)


def differences(rows: dict[str, dict[str, Path]], higher: str, lower: str) -> list[float]:
    """One for each seed that both have; none where a run lacks the quantity."""
    sides = [side.partition(":")[::2] for side in (higher, lower)]
    seeds = sorted(set.intersection(*(set(rows.get(row, ())) for row, _ in sides)))
    pairs = [[quantity(rows[row][seed], name) for row, name in sides] for seed in seeds]
    return [first - second for first, second in pairs if None not in (first, second)]


def quantity(run: Path, name: str) -> float | None:
    """A score: of results.json, of file.json for "file/name"; else a column of metrics.jsonl, its
    mean over the last third of the training. "a+b" is a sum, "" mIoU or Dice."""
    if "+" in name:
        parts = [quantity(run, part) for part in name.split("+")]
        return None if None in parts else sum(parts)
    file, _, name = name.rpartition("/")
    found = read_json(run / f"{file}.json") if file else scores(run)
    name = name or ("dice" if "dice" in found else "miou")
    if name in found or file:
        return found.get(name)
    lines = read_metrics(run)
    values = [line[name] for line in lines if line.get(name) is not None
              and line["iteration"] > 2 / 3 * lines[-1]["iteration"]]
    return statistics.fmean(values) if values else None


def verdict(values: list[float]) -> str:
    if not values:
        return "-"
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return f"{mean:+.3g} (one seed)"
    half = T_975[min(count, len(T_975) + 1) - 2] * statistics.stdev(values) / math.sqrt(count)
    word = "holds" if mean > half else "reversed" if mean < -half else "does not show"
    return f"{mean:+.3g} [{mean - half:+.3g}, {mean + half:+.3g}] {word}"


def columns(scores: dict, per_class: bool) -> dict[str, float | None]:
    """What the table shows of an evaluation, {title: value}."""
    if per_class:
        dice = {name: values["dice"] for name, values in scores.get("per_class", {}).items()}
        return scores.get("iou", dice)
    ece = scores.get("ece")
    scores = {**scores, "ece": 100 * ece} if ece else scores
    return {title: scores[name] for name, title in COLUMNS.items() if name in scores}


def cell(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    few = f" (n = {len(known)})" if len(known) < len(values) else ""
    return f"{statistics.fmean(known):.1f}{spread}{few}"


def report(results: dict) -> str:
    """What is printed of an evaluation: the IoU of every class in %, then all single numbers."""
    lines = []
    for name, value in (*results["iou"].items(), *results.items()):
        if isinstance(value, float):
            lines.append(f"{name:24}{value:10.4f}")
        elif not isinstance(value, (dict, list)):
            lines.append(f"{name:24}{'-' if value is None else value:>10}")
    return "\n".join(lines)


def main() -> None:
    parser = Parser(prog="python -m common.evaluate", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path, help="best.pt or latest.pt of a run")
    what.add_argument("--table", type=Path, metavar="FOLDER", help="print the table of these runs")
    what.add_argument("--claims", type=Path, nargs="+", metavar="FOLDER",
                      help="what the papers claim, and what the runs of these folders say")
    parser.add_argument("--per-class", action="store_true", help="the table of every class")
    parser.add_argument("--data-root", help="folder of the data set, if not where training had it")
    parser.add_argument("--split", default="val", choices=("val", "test", "tune", "unlabeled"))
    parser.add_argument("--mode", choices=MODES, help="default: the data set's")
    parser.add_argument("--threshold", type=float, help="confidence from which pseudo labels count")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
                        help="options to change in the checkpoint's config")
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    parser.add_argument("--figure", type=Path, help="draw reliability and confusion as a PNG file")
    parser.add_argument("--released-empty", action="store_true",
                        help="volumes: an empty mask scores 0, HD95 50, ASD 10, not nothing")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    parser.add_argument("--num-workers", type=int, help="processes that read images, per rank")
    args = parser.parse_args()
    require((args.num_workers or 0) >= 0, "--num-workers must be >= 0")
    require(args.threshold is None or 0 <= args.threshold <= 1, "--threshold must be 0 to 1")
    for path in filter(None, (args.output, args.figure)):
        of_a_run = path.name in RUN_FILES and (path.parent / "config.json").is_file()
        require(not of_a_run, f"{path} is a run's own file: choose another name")
    if args.table:
        return print(table_of_runs(args.table, args.per_class))
    if args.claims:
        return print(table_of_claims(args.claims))
    if args.figure:
        import matplotlib  # noqa: F401  missing: said now, not after the work

    device = init_distributed(args.device)[2]
    changes = args.set + [f"data_root={args.data_root}"] * bool(args.data_root)
    network, config, info = load_predictor(args.checkpoint, device, changes)
    results = {"checkpoint": str(args.checkpoint), "split": args.split,
               "set": {name: config[name] for name, *_ in (word.split("=") for word in changes)}}
    of_volumes = isinstance(info, medical.VolumeInfo)
    require(not of_volumes or not args.mode and not args.figure and args.threshold is None,
            "--mode, --threshold and --figure are for images, not for volumes")
    require(of_volumes or not args.released_empty, "--released-empty is for volumes, not images")
    load, options = ((medical.load_volumes, medical.VolumeOptions) if of_volumes else
                     (load_data, DataOptions))
    data = load(data_options(config | {"lists": None}, options))
    if config.get("lists") not in (None, data.digest):
        say("warning: the lists of images are not those of the training: what is scored may have "
            "been learned from")
    if of_volumes:
        files = getattr(data, args.split)
        require(bool(files) and (args.split != "unlabeled" or info.embedded),
                f"{info.name} has no {args.split} list of volumes with labels")
        results["released_empty"] = args.released_empty
        results |= medical.evaluate_volumes(network, files, info, config["crop"], device,
                                            args.released_empty)
    else:
        results["threshold"] = args.threshold
        results |= evaluate(network, data, args.split, config["crop"], device, args.num_workers,
                            args.threshold, args.mode)
    if rank() == 0:
        if args.output:
            write_json(args.output, results)
        if args.figure:
            plot_calibration(results, info.classes, args.figure)
        print((medical.report if of_volumes else report)(results))  # last: it may go into a pipe


if __name__ == "__main__":
    run_main(main)
