"""Pictures of label maps, which need only Pillow, and the papers' figures, which need matplotlib.

    python -m common.figures runs/shapes/daw/seed0    # draws what a run folder's log holds

Label maps are uint8 [H, W]; 255 (ignored) and other values without a colour are light grey.
Images are uint8. Arrays and CPU tensors are both fine. Files appear whole or not at all; UserError
if one cannot be written.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common.augment import IGNORE
from common.runtime import Parser, read_json, read_metrics, require, run_main, write_atomically

Palette = Sequence[tuple[int, int, int]]  # RGB of the classes

IGNORE_COLOR = (225, 225, 225)
INK, PAPER = (40, 40, 40), (255, 255, 255)
SMALL, LARGE = 160, 512  # a grid enlarges pictures to at least, reduces them to at most this side
MARGIN, SWATCH, FONT_SIZE = 8, 12, 13  # pixels
FONT = ImageFont.load_default(FONT_SIZE)


def voc_palette() -> tuple[tuple[int, int, int], ...]:
    """PASCAL VOC: bits 0, 1, 2 of a label are the top bits of R, G, B, bits 3, 4, 5 the next."""
    label, colors = np.arange(256)[:, None], np.zeros((256, 3), int)
    for bit in range(8):
        colors |= (label >> (3 * bit + np.arange(3)) & 1) << (7 - bit)
    return tuple(map(tuple, colors.tolist()))


def color_table(palette: Palette) -> np.ndarray:
    """The colour of every label value: uint8 [256, 3]."""
    table = np.full((256, 3), IGNORE_COLOR, np.uint8)
    table[: min(len(palette), IGNORE)] = palette[:IGNORE]
    return table


def colorize(label, palette: Palette) -> np.ndarray:
    """Label map [H, W] -> colours, uint8 [H, W, 3]."""
    return color_table(palette)[np.asarray(label)]


def save_png(picture: Image.Image, path: str | Path) -> None:
    write_atomically(Path(path), lambda temporary: picture.save(temporary, format="PNG"))


def save_indexed_png(label, palette: Palette, path: str | Path) -> None:
    """A palette PNG: viewers show the colours, readers get the class numbers."""
    picture = Image.fromarray(np.ascontiguousarray(label, np.uint8))
    picture.putpalette(color_table(palette).tobytes())  # makes it mode P
    save_png(picture, path)


# ---------------------------------------------------------------- grids of samples


def sample_grid(rows: Sequence[tuple], classes: Sequence[str], palette: Palette, path: str | Path,
                captions: Sequence[str]) -> None:
    """A PNG with a row (image [3, H, W], label map, ...) per sample and a legend of their classes.

    `captions` heads the columns; ValueError if a row has more or fewer pictures. A map that is
    uint8 [H, W, 3], colours already, is shown as it is.
    """
    cells, occurring = [], set()
    for image, *maps in rows:
        cells.append([fit(np.moveaxis(np.asarray(image), 0, -1), Image.Resampling.LANCZOS)])
        for map_ in map(np.asarray, maps):
            if map_.ndim == 2:
                occurring.update(np.unique(map_).tolist())
                map_ = colorize(map_, palette)
            cells[-1].append(fit(map_, Image.Resampling.NEAREST))
    entries = [(name, palette[k]) for k, name in enumerate(classes) if k in occurring]
    entries += [("ignored", IGNORE_COLOR)] if IGNORE in occurring else []

    side = max(picture.width for row in cells for picture in row)
    heights = [max(picture.height for picture in row) for row in cells]
    key = legend(entries, width=len(captions) * (side + MARGIN) + MARGIN)
    top = FONT_SIZE + 2 * MARGIN
    height = top + sum(heights) + MARGIN * len(rows) + key.height
    grid = Image.new("RGB", (key.width, height), PAPER)
    draw = ImageDraw.Draw(grid)
    middles = [MARGIN + side // 2 + column * (side + MARGIN) for column in range(len(captions))]
    for middle, caption in zip(middles, captions):
        draw.text((middle, top // 2), caption, INK, FONT, anchor="mm")
    for row, height in zip(cells, heights):
        for middle, picture in zip(middles, row, strict=True):
            grid.paste(picture, (middle - picture.width // 2, top))
        top += height + MARGIN
    grid.paste(key, (0, top))
    save_png(grid, path)


def legend(entries: Sequence[tuple], width: int) -> Image.Image:
    """Swatches of [(name, colour)], in columns of equal width: RGB, `width` pixels wide."""
    longest = max((math.ceil(FONT.getlength(name)) for name, _ in entries), default=0)
    step = longest + SWATCH + 3 * MARGIN
    lines = math.ceil(len(entries) / max(1, (width - MARGIN) // step))
    picture = Image.new("RGB", (width, lines * (SWATCH + MARGIN) + MARGIN), PAPER)
    draw = ImageDraw.Draw(picture)
    for index, (name, color) in enumerate(entries):
        left, top = MARGIN + index // lines * step, MARGIN + index % lines * (SWATCH + MARGIN)
        draw.rectangle((left, top, left + SWATCH, top + SWATCH), fill=color, outline=INK)
        draw.text((left + SWATCH + 6, top + SWATCH // 2), name, INK, FONT, anchor="lm")
    return picture


def fit(picture: np.ndarray, reduction: Image.Resampling) -> Image.Image:
    """Small pictures grow by a whole factor, so that a pixel stays a square; large ones shrink."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    image = ImageOps.scale(image, math.ceil(SMALL / max(image.size)), Image.Resampling.NEAREST)
    image.thumbnail((LARGE, LARGE), reduction)
    return image


# ---------------------------------------------------------------- figures, with matplotlib


def panels(height: float, *widths: float, rows: int = 1):
    """(figure, axes [rows * len(widths)]): rows of panels, in inches; columns share their axes."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["text.parse_math"] = False  # of class names with $
    figure = Figure(figsize=(sum(widths), rows * height), layout="constrained")
    axes = figure.subplots(rows, len(widths), width_ratios=widths, sharex="col", sharey="col")
    return figure, axes.ravel()


def save_figure(figure, path: str | Path) -> None:
    write_atomically(Path(path), lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def plot_calibration(results: dict, classes: Sequence[str], path: str | Path) -> None:
    """Of evaluate's results: accuracy per bin of confidence (Guo et al. 2017, Figure 1), with the
    bin's share of the pixels; the confusion matrix in % of the pixels of each row's true class."""
    few = len(classes) <= 21  # cells have room for their values
    side = max(3.5, len(classes) * (0.36 if few else 0.15))  # of the matrix, inches
    figure, (left, right) = panels(side + 1.5, 5, side + 1.5)
    bins = results["reliability"]
    centers = [row["upper"] - 0.5 / len(bins) for row in bins]
    for name, width, color in (("accuracy", 1, "tab:blue"), ("share", 0.5, "lightgrey")):
        heights = [row[name] or 0 for row in bins]
        left.bar(centers, heights, width / len(bins), color=color, edgecolor="white", label=name)
    left.plot((0, 1), (0, 1), "k--", linewidth=1)
    ece = "-" if results["ece"] is None else f"{100 * results['ece']:.1f} %"
    left.set(title=f"ECE {ece}", xlabel="confidence", xlim=(0, 1), ylim=(0, 1), box_aspect=1)
    left.legend(loc="upper left")

    counts = np.array(results["confusion"], float)
    total = counts.sum(axis=1, keepdims=True)
    percent = 100 * counts / np.where(total > 0, total, np.nan)  # no pixels: a blank row
    right.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    font = {"fontsize": 8 if few else 6}
    right.set_xticks(range(len(classes)), classes, rotation=90, **font)
    right.set_yticks(range(len(classes)), classes, **font)
    right.set(title="% of the true class's pixels", xlabel="predicted class", ylabel="true class")
    for (row, column), value in np.ndenumerate(percent):
        if few and np.isfinite(value):
            color = "white" if value > 60 else "black"
            right.text(column, row, f"{value:.0f}", ha="center", va="center", color=color, **font)
    save_figure(figure, path)


def columns_of(lines: Sequence[dict], key: str) -> dict[str, np.ndarray]:
    """{name: values [n]} of the n lines of metrics.jsonl with `key`; nan where one lacks a name."""
    lines = [line for line in lines if key in line]
    return {name: np.array([line.get(name) for line in lines], float) for name in lines[0]}


def plot_class_shares(lines: Sequence[dict], classes: Sequence[str], path: str | Path) -> None:
    """How far rare classes are from their share of the pseudo labels.

    `lines` hold "pseudo <class>", "used <class>" and, where it is known, "true <class>", of all
    pixels, in 0..1. Left, all classes in the last tenth of the training, by their mean share of the
    first of these; right, the class with most and the one with fewest over the training.
    """
    column = columns_of(lines, f"pseudo {classes[0]}")
    kinds = [kind for kind in ("true", "pseudo", "used") if f"{kind} {classes[0]}" in column]
    names = sorted(classes, key=lambda name: -column[f"{kinds[0]} {name}"].mean())
    last = max(1, len(column["iteration"]) // 10)
    figure, (bars, *curves) = panels(3.6, 3.5 + 0.3 * len(names), 3.5, 3.5)
    places = np.arange(len(names))
    for index, kind in enumerate(kinds):
        percent = [100 * column[f"{kind} {name}"] for name in names]
        heights = [values[-last:].mean() for values in percent]
        bars.bar(places + 0.27 * index, heights, 0.27, color=f"C{index}", label=kind)
        for axes, k in zip(curves, (0, -1)):
            axes.plot(column["iteration"], percent[k], color=f"C{index}")
    for axes, k in zip(curves, (0, -1)):  # after all curves: a limit ends autoscaling
        axes.set(xlabel="iteration", title=names[k], ylim=(0, None))
    bars.set_xticks(places + 0.27, names, rotation=60, ha="right")
    bars.set(yscale="log", ylabel="% of the pixels", title="last tenth of the training")
    bars.legend()
    save_figure(figure, path)


def plot_distributions(runs: dict[Path, Sequence[dict]], path: str | Path) -> None:
    """DAW, Figures 2 and 4, a row for each of {folder: lines}: the fit over the steps; densities of
    right and of wrong predictions' confidences, and t*, after a tenth of the training, as averages
    begin far off, and at its end."""
    figure, grid = panels(3.6, 4.3, 4.3, 4.3, rows=len(runs))
    for (folder, lines), (time, *pair) in zip(runs.items(), grid.reshape(-1, 3)):
        column = columns_of(lines, "t_star")
        steps, t_star = column["iteration"], column["t_star"]
        ends = list(zip(pair, (len(steps) // 10, -1)))
        for sign, name, color in (("pos", "right", "tab:green"), ("neg", "wrong", "tab:red")):
            mu, sigma = column[f"mu_{sign}"], column[f"sigma_{sign}"]
            time.plot(steps, mu, color=color, label=name)
            time.fill_between(steps, mu - sigma, mu + sigma, color=color, alpha=0.15)
            for axes, k in ends:
                p = np.linspace(column["lowest"][k], 1, 400)
                density = np.exp(-(((p - mu[k]) / sigma[k]) ** 2) / 2)
                axes.plot(p, density / (density.mean() * (1 - p[0])), color=color)
        time.plot(steps, t_star, "k--", label="t*")
        time.set(title="/".join(folder.parts[-2:]), xlabel="iteration", ylabel="confidence",
                 ylim=(0, 1.05))
        time.legend()
        for axes, k in ends:
            axes.axvline(t_star[k], color="black", linestyle="--")
            axes.set(xlabel="confidence", title=f"iteration {steps[k]:.0f}")
    save_figure(figure, path)


def plot_gradients(lines: Sequence[dict], path: str | Path) -> None:
    """Gradients of two losses over the steps (POS, Figures 1 and 3). `lines` hold cosine,
    min_cosine_uniform, min_cosine (of the step taken), alpha_unsup, norm_sup, norm_unsup."""
    column = columns_of(lines, "cosine")
    figure, (*scatters, norms) = panels(3.8, 3.6, 3.6, 3.6, 3.6, 3.6)
    figure.suptitle("means over the steps of a line")
    names = {"cosine": 0, "min_cosine_uniform": 0, "min_cosine": 0, "alpha_unsup": 0.5}
    for axes, (name, reference) in zip(scatters, names.items()):
        color = np.where(column[name] < reference, "tab:red", "tab:blue")
        axes.scatter(column["iteration"], column[name], s=3, c=color, linewidths=0)
        axes.axhline(reference, color="black", linewidth=0.8)
        axes.set(title=name, xlabel="iteration", ylim=(2 * reference - 1.05, 1.05))
    pair = {name: column[name] for name in ("norm_sup", "norm_unsup")}
    edges = np.linspace(0, np.nanquantile(list(pair.values()), 0.995), 61)
    norms.hist(pair.values(), edges, histtype="stepfilled", alpha=0.6, label=list(pair))
    norms.set(title="gradient norms", xlabel="norm", ylabel="lines of the log")
    norms.legend()
    save_figure(figure, path)


def filter_normalized_direction(model: torch.nn.Module,
                                generator: torch.Generator) -> list[torch.Tensor]:
    """Li et al. 2018, Section 4: random, each filter as long as the weights'; zero for vectors."""
    direction = []
    for weight in model.parameters():
        drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        length = torch.norm_except_dim(weight.detach().to(drawn)) if weight.dim() > 1 else 0
        direction.append((drawn * (length / torch.norm_except_dim(drawn))).to(weight))
    return direction


def plot_landscape(curves: dict[str, list[dict]], path: str | Path) -> None:
    """Mean and range over random directions around the weights (POS, Figure 5). `curves`
    {checkpoint: [{"direction", "distance", "loss", "miou": number or None: a gap}]}."""
    figure, row = panels(4, 5.5, 5.5)
    for axes, (measure, label) in zip(row, (("loss", "training loss"), ("miou", "mIoU (%)"))):
        for checkpoint, points in curves.items():
            distances = sorted({point["distance"] for point in points})
            at = [[point[measure] for point in points if point["distance"] == x] for x in distances]
            values = np.array(at, float)  # [distances, directions]; None becomes nan
            (line,) = axes.plot(distances, values.mean(axis=1), label=checkpoint)
            low, high, color = values.min(axis=1), values.max(axis=1), line.get_color()
            axes.fill_between(distances, low, high, color=color, alpha=0.15, linewidth=0)
        axes.set(xlabel="distance along filter-normalised directions", ylabel=label)
        axes.legend()
    save_figure(figure, path)


def main():
    parser = Parser(prog="python -m common.figures", description="Draw a run.")
    parser.add_argument("runs", type=Path, nargs="+", help="folder with metrics.jsonl or "
                        "landscape.json; several: DAW's Figures 2 and 4, into the first")
    runs = {run: read_metrics(run) for run in parser.parse_args().runs}
    folder, *others = runs
    if others:
        for run, lines in runs.items():
            require(any("t_star" in line for line in lines), f"{run} has no t_star to compare")
        return plot_distributions(runs, folder / "comparison.png")
    curves = read_json(folder / "landscape.json")
    keys = sorted({key for line in runs[folder] for key in line})
    classes = [key.removeprefix("pseudo ") for key in keys if key.startswith("pseudo ")]
    require(bool(curves or "t_star" in keys or "cosine" in keys or classes),
            f"{folder}/metrics.jsonl has nothing to draw: no t_star, cosine or pseudo <class>")
    if curves:
        plot_landscape(curves, folder / "landscape.png")
    if "t_star" in keys:
        plot_distributions(runs, folder / "distributions.png")
    if "cosine" in keys:
        plot_gradients(runs[folder], folder / "gradients.png")
    if classes:
        plot_class_shares(runs[folder], classes, folder / "pseudo_labels.png")


if __name__ == "__main__":
    run_main(main)
