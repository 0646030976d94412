"""Pictures of label maps: colours, legends, sample grids, overlays, indexed PNG files; the figure of an evaluation.

Label maps are uint8 [H, W]; 255 (ignored), and any other value without a colour in the palette, is drawn light grey.
Images are uint8, [H, W, 3] or [3, H, W]. Arrays and CPU tensors are both fine.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.augment import IGNORE
from common.files import write_atomically
from common.runtime import UserError

Palette = Sequence[tuple[int, int, int]]

IGNORE_COLOR = (225, 225, 225)
INK, PAPER, FRAME = (40, 40, 40), (255, 255, 255), (150, 150, 150)
SMALL, LARGE = 160, 512  # a picture's longer side in a grid, in pixels: enlarged to at least / reduced to at most
MARGIN, FONT_SIZE = 8, 13
MOST_VALUES = 21  # classes up to which a confusion matrix shows its values


def color_table(palette: Palette) -> np.ndarray:
    """The colour of every label value: uint8 [256, 3]."""
    table = np.full((256, 3), IGNORE_COLOR, np.uint8)
    table[: min(len(palette), IGNORE)] = palette[:IGNORE]
    return table


def colorize(label, palette: Palette) -> np.ndarray:
    """Label map [H, W] -> colours, uint8 [H, W, 3]."""
    return color_table(palette)[np.asarray(label)]


def overlay(image, label, palette: Palette, alpha: float = 0.5) -> np.ndarray:
    """The image with `alpha` of the label's colour over it, uint8 [H, W, 3]; ignored pixels show the image alone."""
    image, label = _channels_last(image), np.asarray(label)
    mixed = (1 - alpha) * image + alpha * colorize(label, palette)
    return np.where((label == IGNORE)[..., None], image, np.rint(mixed).astype(np.uint8))


def legend(classes: Sequence[str], palette: Palette, width: int) -> Image.Image:
    """Colour swatches with the class names, in columns of equal width: RGB, `width` pixels wide, as high as needed."""
    font, swatch, line = ImageFont.load_default(FONT_SIZE), 12, 20
    names = [_shorten(name, font, width - swatch - 3 * MARGIN) for name in classes]
    entry = max((math.ceil(font.getlength(name)) for name in names), default=0) + swatch + 3 * MARGIN
    columns = min(max(1, (width - MARGIN) // entry), max(1, len(names)))
    rows = math.ceil(len(names) / columns)
    columns = math.ceil(len(names) / max(1, rows))  # even columns instead of a nearly empty last row
    picture = Image.new("RGB", (width, rows * line + MARGIN), PAPER)
    draw = ImageDraw.Draw(picture)
    for index, (name, color) in enumerate(zip(names, palette)):
        left, top = MARGIN + (index // rows) * entry, MARGIN // 2 + (index % rows) * line
        draw.rectangle((left, top + 4, left + swatch, top + 4 + swatch), fill=tuple(color), outline=FRAME)
        draw.text((left + swatch + MARGIN - 2, top + 10), name, INK, font, anchor="lm")
    return picture


def sample_grid(rows: Sequence[tuple], classes: Sequence[str], palette: Palette, path: str | Path,
                captions: Sequence[str] = ("image", "label", "prediction")) -> None:
    """Write a PNG with one row (image, label map, ...) per sample and, below, a legend of the classes that occur.

    `captions` heads the columns; a map that is uint8 [H, W, 3] already is shown as it is. Raises ValueError if a row has more or fewer
    pictures than there are captions.
    """
    for number, row in enumerate(rows):
        if len(row) != len(captions):
            raise ValueError(f"row {number} has {len(row)} pictures for {len(captions)} columns")
    rows = [(_channels_last(image), *map(np.asarray, maps)) for image, *maps in rows]
    pictures = [[_fit(image), *(_fit(map_ if map_.ndim == 3 else colorize(map_, palette), nearest=True) for map_ in maps)] for image, *maps in rows]
    cell = max(picture.width for row in pictures for picture in row)
    heights = [max(picture.height for picture in row) for row in pictures]
    width, header = len(captions) * (cell + MARGIN) + MARGIN, FONT_SIZE + 2 * MARGIN

    occurring = {value for _, *maps in rows for map_ in maps if map_.ndim == 2 for value in np.unique(map_).tolist()}
    shown = [index for index in sorted(occurring) if index < len(classes)]
    names, colors = [classes[index] for index in shown], [palette[index] for index in shown]
    if IGNORE in occurring:
        names, colors = [*names, "ignored"], [*colors, IGNORE_COLOR]
    key = legend(names, colors, width)

    grid = Image.new("RGB", (width, header + sum(heights) + MARGIN * len(heights) + key.height), PAPER)
    draw = ImageDraw.Draw(grid)
    for column, caption in enumerate(captions):
        middle = MARGIN + column * (cell + MARGIN) + cell // 2
        draw.text((middle, header // 2), caption, INK, ImageFont.load_default(FONT_SIZE), anchor="mm")
    top = header
    for row, height in zip(pictures, heights):
        for column, picture in enumerate(row):
            grid.paste(picture, (MARGIN + column * (cell + MARGIN) + (cell - picture.width) // 2, top))
        top += height + MARGIN
    grid.paste(key, (0, top))
    save_png(grid, path)


def figure_class():
    """matplotlib's Figure, imported only where one is drawn. Raises UserError if the package is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("figures need the package matplotlib: pip install matplotlib") from error
    return Figure


def plot_calibration(results: dict, classes: Sequence[str], path: str | Path) -> None:
    """Write a PNG of `results` (common.evaluate.evaluate): reliability diagram and confusion matrix.

    Left, accuracy per bin of confidence (as in Guo et al., Figure 1) and the bin's share of the pixels. Right, each row
    is a true class and adds up to 100 % of its pixels; a class without pixels leaves its row blank. Raises UserError if
    matplotlib is missing or the file cannot be written.
    """
    counts = np.asarray(results["confusion"], np.float64)
    total = counts.sum(axis=1, keepdims=True)
    shares = np.divide(100 * counts, total, where=total > 0, out=np.full_like(counts, np.nan))
    with_values = len(classes) <= MOST_VALUES
    side = max(3.5, len(classes) * (0.36 if with_values else 0.15))  # of the matrix, in inches
    figure = figure_class()(figsize=(side + 6.5, side + 1.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(4, side))

    bins = results["reliability"]
    width, centers = 1 / len(bins), [row["upper"] - 0.5 / len(bins) for row in bins]
    left.bar(centers, [row["accuracy"] or 0 for row in bins], width, color="tab:blue", edgecolor="white", label="accuracy")
    left.bar(centers, [row["share"] or 0 for row in bins], width / 2, color="lightgrey", label="share of the pixels")
    left.plot((0, 1), (0, 1), "k--", linewidth=1)
    ece = "-" if results["ece"] is None else f"{100 * results['ece']:.1f} %"
    left.set(title=f"ECE {ece}", xlabel="confidence", xlim=(0, 1), ylim=(0, 1), box_aspect=1)
    left.legend(loc="upper left")

    right.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    size = 8 if with_values else 6
    right.set_xticks(range(len(classes)), classes, rotation=90, fontsize=size)
    right.set_yticks(range(len(classes)), classes, fontsize=size)
    right.set(title="% of the true class's pixels", xlabel="predicted class", ylabel="true class")
    if with_values:
        for row, column in np.argwhere(np.isfinite(shares)):
            value, color = shares[row, column], "white" if shares[row, column] > 60 else "black"
            right.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=size, color=color)
    write_atomically(Path(path), lambda temporary: figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight"))


SHARES = {"true": ("real", "tab:gray"), "pseudo": ("pseudo labels", "tab:blue"), "used": ("those learned from", "tab:orange")}


def plot_class_shares(lines: Sequence[dict], classes: Sequence[str], labeled_pixels, path: str | Path) -> None:
    """Write a PNG of the classes' shares among real and pseudo labels: how far rare classes are from getting theirs.

    `lines` of metrics.jsonl hold "true <class>" (where it is known), "pseudo <class>" and "used <class>", of all pixels, each
    in 0..1; others are skipped. Left, all classes in the last tenth of the training, by `labeled_pixels` [C]; right, the class
    with most and with fewest of them over training. Raises UserError if matplotlib is missing.
    """
    lines = [line for line in lines if f"pseudo {classes[0]}" in line]
    kinds = {kind: style for kind, style in SHARES.items() if f"{kind} {classes[0]}" in lines[0]}
    order = np.argsort(-np.asarray(labeled_pixels), kind="stable").tolist()
    figure = figure_class()(figsize=(10 + 0.25 * len(classes), 3.6), layout="constrained")
    bars, *curves = figure.subplots(1, 3, width_ratios=(1 + 0.1 * len(classes), 1, 1))
    last = lines[-max(1, len(lines) // 10) :]
    for place, (kind, (name, color)) in enumerate(kinds.items()):
        heights = [100 * sum(line[f"{kind} {classes[index]}"] for line in last) / len(last) for index in order]
        bars.bar(np.arange(len(order)) + (place - 1) * 0.27, heights, 0.27, color=color, label=name)
    bars.set_xticks(range(len(order)), [classes[index] for index in order], rotation=60, ha="right")
    bars.set(yscale="log", ylabel="% of the pixels", title="last tenth of the training")
    bars.legend()
    for axes, index in zip(curves, (order[0], order[-1])):
        for kind, (name, color) in kinds.items():
            axes.plot([line["iteration"] for line in lines], [100 * line[f"{kind} {classes[index]}"] for line in lines], color=color)
        axes.set(xlabel="iteration", title=classes[index], ylim=(0, None))
    write_atomically(Path(path), lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def save_indexed_png(label, palette: Palette, path: str | Path) -> None:
    """Write a label map as a palette PNG: viewers show the colours, readers get the class numbers."""
    picture = Image.fromarray(np.ascontiguousarray(label, np.uint8))
    picture.putpalette(color_table(palette).tobytes())  # makes it mode P
    save_png(picture, path)


def save_png(picture: Image.Image, path: str | Path) -> None:
    """Whole or not at all; makes the folder. Raises UserError if it cannot be written."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), lambda temporary: picture.save(temporary, format="PNG"))


def _channels_last(image) -> np.ndarray:
    image = np.asarray(image)
    return np.moveaxis(image, 0, -1) if image.shape[-1] != 3 else image


def _fit(picture: np.ndarray, nearest: bool = False) -> Image.Image:
    """Enlarge small pictures by a whole factor, so that every pixel stays a square; reduce large ones."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    longer = max(image.size)
    if longer < SMALL:
        factor = math.ceil(SMALL / longer)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((LARGE, LARGE), Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS)
    return image


def _shorten(name: str, font, width: int) -> str:
    if font.getlength(name) <= width:
        return name
    while name and font.getlength(name + "...") > width:
        name = name[:-1]
    return name + "..."
