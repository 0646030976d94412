"""`python -m common.results FOLDER [--per-class]`: the table of all runs in FOLDER/<row>/seed<k>, or their scores of each class.

Rows come in the order in which their runs were last started. A cell is the mean over seeds of the last evaluation, with the standard
deviation over seeds where there are several; nothing is picked by its validation score. Of runs with a test list (volumes), its scores.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from common.runtime import UserError, run_main

COLUMNS = {"miou": "mIoU", "head_miou": "head mIoU", "tail_miou": "tail mIoU", "ece": "ECE"}
VOLUME_COLUMNS = {"dice": "Dice", "jaccard": "Jaccard", "hd95": "HD95", "asd": "ASD", "empty_masks": "empty masks"}  # distances in voxels


def collect(folder: Path) -> dict[str, list[dict]]:
    """{row: results.json of each finished seed}. Raises UserError where there is none."""
    rows: dict[str, list[dict]] = {}
    # config.json is written at every start, results.json only after an evaluation
    for start in sorted(folder.glob("*/seed*/config.json"), key=lambda path: path.stat().st_mtime):
        path = start.with_name("results.json")
        if not path.is_file():
            continue
        results, config = json.loads(path.read_text()), json.loads(start.read_text())
        if results["last"]["iteration"] == config["iterations"]:
            rows.setdefault(path.parent.parent.name, []).append(results)
        else:
            print(f"not finished, left out: {path.parent}", file=sys.stderr)
    if not rows:
        raise UserError(f"no results in {folder}: expected {folder}/<row>/seed<k>/results.json")
    return rows


def cell(values: list[float]) -> str:
    """"mean ± sd" in the values' own unit, without the sd for a single value."""
    mean = f"{statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def table(rows: dict[str, list[dict]], per_class: bool = False) -> str:
    """A Markdown table; everything in % but distances and numbers. Raises UserError for images and volumes in one folder."""
    scores = {row: [results.get("test") or results["last"] for results in seeds] for row, seeds in rows.items()}
    of_volumes = {"dice" in entry for entries in scores.values() for entry in entries}
    if len(of_volumes) > 1:
        raise UserError("there are runs on images and on volumes: put them into folders of their own")
    names = VOLUME_COLUMNS if of_volumes == {True} else COLUMNS
    classes = {name: None for entries in scores.values() for entry in entries for name in class_scores(entry)} if per_class else {}
    lines = [["run", "seeds", *(classes or names.values())]]
    for row, entries in scores.items():
        if per_class:
            columns = [[class_scores(entry)[name] for entry in entries if class_scores(entry).get(name) is not None] for name in classes]
        else:
            columns = [[entry[name] * (100 if name == "ece" else 1) for entry in entries if entry[name] is not None] for name in names]
        lines.append([row, str(len(entries)), *(cell(values) if values else "-" for values in columns)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["| " + " | ".join(entry.ljust(width) for entry, width in zip(line, widths)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]])


def class_scores(entry: dict) -> dict[str, float | None]:
    """Of each class: IoU, or Dice where volumes were scored."""
    return entry["iou"] if "iou" in entry else {name: values["dice"] for name, values in entry["per_class"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m common.results", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--per-class", action="store_true", help="IoU (volumes: Dice) of each class instead of the means")
    args = parser.parse_args()
    print(table(collect(args.folder), args.per_class))


if __name__ == "__main__":
    run_main(main)
