"""common/figures.py: colours, grids and PNG files with Pillow; what the matplotlib figures show."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from programs import refuse, run_as_program

from common import figures
from common.models import DeepLabV3Plus
from common.runtime import UserError

CLASSES = ("background", "hstripe", "vstripe", "check", "dots", "cross", "grain", "blocks")
PALETTE = figures.voc_palette()
GAUSSIANS = {"mu_pos": 0.9, "sigma_pos": 0.1, "mu_neg": 0.4, "sigma_neg": 0.2, "lowest": 0.125}


def label_map(height=40, width=64):
    label = (np.arange(height * width).reshape(height, width) // 400).astype(np.uint8)
    label[:3] = 255
    return label


# ---------------------------------------------------------------- label maps


def test_palette_is_vocs():
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128),
             255: (224, 224, 192)}
    assert len(PALETTE) == len(set(PALETTE)) == 256
    assert {label: PALETTE[label] for label in known} == known


def test_colors():
    label = label_map()
    colors = figures.colorize(torch.from_numpy(label), PALETTE)
    assert colors.dtype == np.uint8 and colors.shape == (40, 64, 3)
    assert tuple(colors[0, 0]) == figures.IGNORE_COLOR  # not the palette's entry 255
    assert tuple(colors[10, 10]) == PALETTE[label[10, 10]]
    assert tuple(figures.colorize(label, PALETTE[:2])[39, 63]) == figures.IGNORE_COLOR


def test_indexed_png_reads_back_as_the_label(tmp_path):
    path = tmp_path / "new" / "label.png"
    figures.save_indexed_png(label_map(), PALETTE, path)
    with Image.open(path) as picture:
        assert picture.mode == "P" and (np.asarray(picture) == label_map()).all()
        assert (np.asarray(picture.convert("RGB")) == figures.colorize(label_map(), PALETTE)).all()
    assert [file.name for file in path.parent.iterdir()] == ["label.png"]  # no temporary file
    with pytest.raises(UserError, match="cannot write .*below.png"):
        figures.save_indexed_png(label_map(), PALETTE, path / "below.png")


@pytest.mark.parametrize("columns", [1, 2, 5])
def test_grid_shows_every_picture_where_arithmetic_puts_it(tmp_path, columns):
    rows = []
    for row, height in enumerate((200, 180)):  # neither enlarged nor reduced
        labels = [np.full((height, 170), 2 * row + k, np.uint8) for k in range(columns - 1)]
        rows.append((np.full((3, height, 170), 90 + row, np.uint8), *labels))
    figures.sample_grid(rows, CLASSES, PALETTE, tmp_path / "grid.png", "abcde"[:columns])
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    top = 13 + 2 * 8
    for image, *labels in rows:
        colors = [np.moveaxis(image, 0, -1),
                  *(figures.colorize(label, PALETTE) for label in labels)]
        for column, expected in enumerate(colors):
            left = 8 + column * 178
            assert (grid[top : top + len(expected), left : left + 170] == expected).all()
            assert (grid[:29, left : left + 170] < 128).any()  # the column's caption
        top += len(expected) + 8
    assert grid.shape[1] == columns * 178 + 8
    for row in ((*rows[0], np.zeros((9, 9), np.uint8)), ()):
        with pytest.raises(ValueError):
            figures.sample_grid([row], CLASSES, PALETTE, tmp_path / "none.png", "abcde"[:columns])
    assert not (tmp_path / "none.png").exists()


def test_grid_of_small_large_and_coloured_pictures(tmp_path):
    """Small ones grow by a whole factor, large ones shrink; the legend shows what occurs."""
    colours = np.full((700, 30, 3), (12, 34, 56), np.uint8)
    rows = [(torch.zeros(3, 40, 64).byte(), label_map(), label_map() % 8),
            (np.zeros((3, 700, 30), np.uint8), np.full((700, 30), 5, np.uint8), colours)]
    figures.sample_grid(rows, CLASSES, PALETTE, tmp_path / "grid.png", "abc")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape[1] == 3 * (3 * 64 + 8) + 8 and 29 + 120 + 512 + 24 < grid.shape[0] < 750
    enlarged = figures.colorize(label_map(), PALETTE).repeat(3, axis=0).repeat(3, axis=1)
    assert (grid[29:149, 208:400] == enlarged).all()
    assert (grid[157:669] == (12, 34, 56)).all(axis=2).any()
    for color in (*PALETTE[1:8], figures.IGNORE_COLOR):
        assert (grid[677:] == color).all(axis=2).sum() > 50
    for width in (60, 900):
        key = figures.legend(list(zip(CLASSES, PALETTE)), width)
        assert key.width == width and set(PALETTE[:8]) <= {c for _, c in key.getcolors(1 << 20)}


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize("classes", [3, 22])
def test_calibration(drawn, tmp_path, classes):
    confusion = np.random.default_rng(classes).integers(1, 1000, (classes, classes))
    confusion[1] = 0  # no pixels
    bins = [{"upper": (m + 1) / 5, "share": m / 10, "accuracy": m / 8} for m in range(5)]
    bins[0]["accuracy"] = None
    results = {"confusion": confusion.tolist(), "reliability": bins, "ece": 0.0423}
    names = [f"class {c} $^$" for c in range(classes)]  # no formula
    figures.plot_calibration(results, names, tmp_path / "new" / "figure.png")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["figure.png"]
    left, right = drawn[0][0].axes
    assert "ECE 4.2 %" in left.get_title()
    accuracy, share = left.containers
    assert [bar.get_height() for bar in accuracy] == pytest.approx([0, 1 / 8, 2 / 8, 3 / 8, 4 / 8])
    assert [bar.get_height() for bar in share] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert [bar.get_x() for bar in accuracy] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert [label.get_text() for label in right.get_yticklabels()] == names
    shown = right.images[0].get_array().filled(-1)  # what is masked is not drawn
    texts = {text.get_position(): text.get_text() for text in right.texts}
    for (truth, predicted), count in np.ndenumerate(confusion):
        percent = 100 * count / confusion[truth].sum() if truth != 1 else -1
        assert shown[truth, predicted] == pytest.approx(percent)
        expected = f"{percent:.0f}" if truth != 1 and classes == 3 else None
        assert texts.get((predicted, truth)) == expected


def share_lines(*kinds: str) -> list[dict]:
    shares = {f"{kind} {name}": 0.1 * c + 0.01 for kind in kinds for c, name in enumerate(CLASSES)}
    lines = [{"iteration": 10 * (i + 1), **shares} for i in range(20)]
    for line in lines:
        line["pseudo blocks"] = line["iteration"] / 1000
    return [{"iteration": 5, "miou": 1.0}, *lines]


def test_class_shares(drawn, tmp_path):
    lines = share_lines("true", "pseudo", "used")
    lines[1]["pseudo background"] = 0.9
    figures.plot_class_shares(lines, CLASSES, tmp_path / "shares.png")
    bars, most, fewest = drawn[0][0].axes
    order = [label.get_text() for label in bars.get_xticklabels()]
    assert order == list(CLASSES[::-1])
    _, pseudo, _ = bars.containers
    assert pseudo[0].get_height() == pytest.approx(100 * (0.19 + 0.2) / 2)  # last 2 of 20 lines
    assert (most.get_title(), fewest.get_title()) == ("blocks", "background")
    assert fewest.lines[1].get_ydata() == pytest.approx([90] + [1] * 19)
    assert fewest.get_ylim()[1] > 90  # no curve leaves its panel


def test_distributions(drawn, tmp_path):
    lines = [{"iteration": i, "t_star": 0.02 * i, **GAUSSIANS} for i in range(1, 41)]
    runs = {tmp_path / "run": [{"iteration": 1, "loss": 2.0}, *lines]}
    figures.plot_distributions(runs, tmp_path / "figure.png")
    time, first, last = drawn[0][0].axes
    assert list(time.lines[0].get_ydata()) == [0.9] * 40
    assert list(time.lines[2].get_ydata()) == pytest.approx([0.02 * i for i in range(1, 41)])
    assert (first.get_title(), last.get_title()) == ("iteration 5", "iteration 40")
    for curve, peak in zip(last.lines, (0.9, 0.4)):
        p, density = curve.get_data()
        assert p[np.argmax(density)] == pytest.approx(peak, abs=0.01)
        area = ((density[1:] + density[:-1]) / 2 * np.diff(p)).sum()
        assert area == pytest.approx(1, rel=0.01)


def gradient_columns(n: int) -> dict:
    names = ("cosine", "min_cosine_uniform", "min_cosine", "alpha_unsup", "norm_sup", "norm_unsup")
    return {name: torch.linspace(0.1, 0.9, n) + k / 10 for k, name in enumerate(names)}


def test_gradients(drawn, tmp_path):
    columns = {name: values.tolist() for name, values in gradient_columns(25).items()}
    lines = [{"iteration": 20 * k, "loss": 1.0} for k in range(50)]  # half are not measured
    for k, values in enumerate(zip(*columns.values())):
        lines[2 * k + 1] |= dict(zip(columns, values))
    figures.plot_gradients(lines, tmp_path / "figure.png")
    assert len(drawn[0][0].axes) == 5
    steps, cosines = drawn[0][0].axes[0].collections[0].get_offsets().T
    assert steps.tolist() == list(range(20, 1000, 40))
    assert cosines.tolist() == columns["cosine"]


def test_landscape(drawn, tmp_path):
    curves = {}
    for name, steep in (("POS", 2), ("uniform", 20)):
        curves[name] = [{"direction": k, "distance": a, "loss": steep * a * a * (k + 1), "miou": 5}
                        for k in range(2) for a in (0.5, -1.0, 0.0)]
    curves["uniform"][1]["loss"] = None
    figures.plot_landscape(curves, tmp_path / "landscape.png")
    left, right = drawn[0][0].axes
    assert (left.get_ylabel(), right.get_ylabel()) == ("training loss", "mIoU (%)")
    pos, uniform = left.lines
    assert list(pos.get_xdata()) == [-1, 0, 0.5] and list(pos.get_ydata()) == [3, 0, 0.75]
    assert math.isnan(uniform.get_ydata()[0]) and uniform.get_ydata()[2] == 7.5
    corners = left.collections[0].get_paths()[0].vertices  # the band over the directions
    assert {(-1.0, 2.0), (-1.0, 4.0)} <= {tuple(corner) for corner in corners.tolist()}


def test_command_draws_what_a_run_has_logged(tmp_path, monkeypatch, capfd, drawn):
    command, log = ("common/figures.py", monkeypatch, capfd, tmp_path), tmp_path / "metrics.jsonl"
    assert "nothing to draw" in refuse(*command)
    log.write_text('{"iteration": 1, "loss": 2.0}\n')
    assert "nothing to draw" in refuse(*command)
    lines = share_lines("pseudo", "used")
    for i, line in enumerate(lines[1:]):
        gradients = {name: float(values[i]) for name, values in gradient_columns(20).items()}
        line |= GAUSSIANS | gradients | {"t_star": 0.5}
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"iterat')  # killed
    assert run_as_program(*command)[0] == 0
    (tmp_path / "gradients.png").unlink()
    (tmp_path / "landscape.json").write_text('{"x": [{"distance": 0, "loss": 1, "miou": 5}]}')
    assert run_as_program(*command)[0] == 0
    names = {"distributions.png", "gradients.png", "metrics.jsonl", "pseudo_labels.png",
             "landscape.json", "landscape.png"}
    assert {file.name for file in tmp_path.iterdir()} == names
    scatter = next(figure for figure, *_ in drawn if len(figure.axes) == 5).axes[0].collections[0]
    assert scatter.get_offsets()[:, 0].tolist() == list(range(10, 210, 10))

    other = tmp_path / "other"
    other.mkdir()
    lines = [{**line, "t_star": 0.7} for line in lines if "t_star" in line]
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run_as_program(*command, other)[0] == 0 and (tmp_path / "comparison.png").is_file()
    rows = np.reshape(drawn[-1][0].axes, (2, 3))
    thresholds = [axes.lines[-1].get_xdata()[0] for axes in rows[:, 1:].flat]
    assert thresholds == [0.5, 0.5, 0.7, 0.7]
    assert [axes.get_title() for axes in rows[1, :2]] == [f"{tmp_path.name}/other", "iteration 30"]
    (other / "metrics.jsonl").write_text('{"iteration": 1, "loss": 2.0}\n')
    assert "other has no t_star" in refuse(*command, other)


def test_without_matplotlib(tmp_path, monkeypatch, capfd):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    line = {"iteration": 1, "t_star": 0.5, **GAUSSIANS}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert "pip install matplotlib" in refuse("common/figures.py", monkeypatch, capfd, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_directions_are_as_long_as_the_weights_filter_by_filter():
    model = DeepLabV3Plus("tiny", 4, "none")
    directions = figures.filter_normalized_direction(model, torch.Generator().manual_seed(0))
    for value, direction in zip(model.parameters(), directions, strict=True):
        assert direction.any() == (value.dim() > 1)
        if value.dim() > 1:
            lengths = [filters.flatten(1).norm(dim=1) for filters in (direction, value)]
            torch.testing.assert_close(*lengths)
