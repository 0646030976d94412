"""Metrics against plain Python loops, windows against whole images, checkpoints, pictures, figures and both command lines."""

import dataclasses
import importlib.util
import json
import math
import random
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from programs import run as run_program
from torch import nn

import daw
from common import evaluate as ev
from common import pictures, predict
from common.augment import normalize
from common.data import DATASETS
from common.options import TrainingOptions
from common.runtime import Context, UserError, run_main

CPU = torch.device("cpu")
CONTEXT = Context(0, 1, CPU)
INFO = DATASETS["shapes"]  # 8 classes
PALETTE = INFO.palette


def brute_force_iou(prediction, label, classes):
    """IoU per class by counting pixel by pixel; None where a class never occurs."""
    scores = []
    for c in range(classes):
        pairs = [(p, t) for p, t in zip(prediction, label) if t != 255]
        union = sum(p == c or t == c for p, t in pairs)
        scores.append(sum(p == c and t == c for p, t in pairs) / union if union else None)
    return scores


def brute_force_ece(confidence, correct, bins=15):
    error = 0.0
    for m in range(bins):
        inside = [i for i, c in enumerate(confidence) if m / bins < c <= (m + 1) / bins or (m == 0 and c == 0)]
        if inside:
            gap = sum(correct[i] for i in inside) / len(inside) - sum(confidence[i] for i in inside) / len(inside)
            error += len(inside) / len(confidence) * abs(gap)
    return error


# ---------------------------------------------------------------- metrics


def test_confusion_and_iou_equal_plain_loops():
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randint(0, 5, (2, 9, 11), generator=generator)  # predicts 4 too
    label = torch.randint(0, 4, (2, 9, 11), generator=generator, dtype=torch.uint8)
    label[torch.rand(label.shape, generator=generator) < 0.2] = 255
    confusion = ev.confusion_matrix(prediction, label, 6)  # class 4: predicted only; class 5: nowhere
    assert confusion.shape == (6, 6) and confusion.dtype == torch.int64
    for truth in range(6):
        for predicted in range(6):
            assert confusion[truth, predicted] == ((label == truth) & (prediction == predicted)).sum()
    assert confusion.sum() == (label != 255).sum()
    expected = brute_force_iou(prediction.flatten().tolist(), label.flatten().tolist(), 6)
    iou = ev.iou_per_class(confusion)
    assert iou.dtype == torch.float64
    assert expected[4] == 0 and expected[5] is None and math.isnan(iou[5])
    assert iou[:5].tolist() == pytest.approx(expected[:5])
    assert ev.mean_iou(confusion) == pytest.approx(sum(expected[:5]) / 5)
    assert ev.pixel_accuracy(confusion) == pytest.approx((prediction == label).sum().item() / (label != 255).sum().item())


def test_everything_ignored_gives_nan_and_none():
    confusion = ev.confusion_matrix(torch.zeros(4, 4).long(), torch.full((4, 4), 255, dtype=torch.uint8), 3)
    assert confusion.sum() == 0 and math.isnan(ev.mean_iou(confusion)) and math.isnan(ev.pixel_accuracy(confusion))


def test_head_and_tail():
    assert ev.head_and_tail([5, 100, 0, 7, 50, 6, 1, 30, 20, 10, 9, 8]) == ([1, 4, 7, 8, 9], [2, 6, 0, 5, 3])
    assert ev.head_and_tail(torch.tensor([3, 9, 1])) == ([1], [2])  # k = 3 // 2
    head, tail = ev.head_and_tail([4] * 10)
    assert sorted(head + tail) == list(range(10))  # ties: still no class in both


def test_ece_equals_a_plain_loop():
    rng = random.Random(0)
    confidence = [rng.random() for _ in range(500)] + [0.0, 1.0, 1 / 15, 2 / 15, 7 / 15, 0.2, 0.6, 0.8]
    correct = [rng.random() < 0.7 for _ in confidence]
    histogram = ev.calibration_histogram(torch.tensor(confidence, dtype=torch.float64), torch.tensor(correct),
                                         torch.ones(len(confidence), dtype=torch.bool))
    assert histogram.shape == (3, 15) and histogram.dtype == torch.float64
    assert ev.expected_calibration_error(histogram) == pytest.approx(brute_force_ece(confidence, correct))


def test_ece_of_known_cases_and_right_closed_bins():
    ones = torch.ones(4, 5, dtype=torch.bool)
    perfect = ev.calibration_histogram(torch.full((4, 5), 0.6), torch.arange(20).view(4, 5) < 12, ones)
    assert ev.expected_calibration_error(perfect) == pytest.approx(0, abs=1e-6)
    wrong = ev.calibration_histogram(torch.ones(4, 5), ~ones, ones)
    assert ev.expected_calibration_error(wrong) == 1
    assert math.isnan(ev.expected_calibration_error(ev.calibration_histogram(torch.ones(4, 5), ones, ~ones)))

    edges = torch.tensor([0.0, 0.25, 0.26, 0.5, 0.75, 1.0])
    histogram = ev.calibration_histogram(edges, edges > 0.3, torch.tensor([1, 1, 1, 1, 1, 0]).bool(), bins=4)
    assert histogram[0].tolist() == [2, 2, 1, 0]  # the last is not valid
    assert histogram[2].tolist() == [0, 1, 1, 0]
    table = ev.reliability(histogram)
    assert table[0] == {"upper": 0.25, "share": 0.4, "confidence": 0.125, "accuracy": 0}
    assert table[3] == {"upper": 1.0, "share": 0, "confidence": None, "accuracy": None}


# ---------------------------------------------------------------- windows and evaluation


@pytest.mark.parametrize("size", [(64, 64), (31, 45), (17, 40), (5, 9), (1, 33), (16, 16)])
@pytest.mark.parametrize("stride", [None, 7, 16])
def test_sliding_window_of_a_pointwise_model_is_the_whole_image(size, stride):
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 1)
    images = torch.randn(2, 3, *size)
    shapes, visited = [], torch.zeros(size)

    def watched(window):
        shapes.append(tuple(window.shape[2:]))
        return model(window)

    with torch.no_grad():
        probabilities = ev.sliding_window(watched, images, crop=16, stride=stride)
        torch.testing.assert_close(probabilities, model(images).softmax(1))
    assert set(shapes) == {(min(16, size[0]), min(16, size[1]))}  # full windows, clipped only to a smaller image
    step = stride or 10
    for top in ev._window_starts(size[0], 16, step):
        for left in ev._window_starts(size[1], 16, step):
            visited[top : top + 16, left : left + 16] += 1
    assert visited.min() > 0


def test_sliding_window_refuses_gaps_and_averages_probabilities():
    with pytest.raises(ValueError, match="cover"):
        ev.sliding_window(lambda window: window, torch.zeros(1, 3, 20, 20), crop=8, stride=9)
    # A model whose answer depends on the window: the overlap is the mean of the two softmaxes, not of the logits.
    answers = iter([torch.tensor([4.0, 0.0]), torch.tensor([0.0, 1.0])])
    result = ev.sliding_window(lambda window: next(answers).view(1, 2, 1, 1).expand(1, 2, 4, 4), torch.zeros(1, 3, 4, 6), 4, 2)
    first, second = torch.tensor([4.0, 0.0]).softmax(0), torch.tensor([0.0, 1.0]).softmax(0)
    torch.testing.assert_close(result[0, :, 0, 0], first)
    torch.testing.assert_close(result[0, :, 0, 3], (first + second) / 2)
    torch.testing.assert_close(result[0, :, 0, 5], second)


def fake_batches(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for number, (height, width) in enumerate(sizes):
        label = torch.randint(0, 7, (1, height, width), generator=generator, dtype=torch.uint8)  # class 7 is in no label
        label[:, 0] = 255
        image = torch.randint(0, 256, (1, 3, height, width), generator=generator, dtype=torch.uint8)
        batches.append({"image": image, "label": label, "name": [str(number)]})
    return batches


@pytest.mark.parametrize("mode", ["whole", "sliding"])
def test_evaluate_equals_plain_loops(mode):
    torch.manual_seed(1)
    model = nn.Conv2d(3, 8, 1).requires_grad_(False)
    with torch.no_grad():
        model.weight *= 4
        model.bias[7] = -100  # class 7 is never predicted: it occurs nowhere
    batches = fake_batches([(20, 30), (71, 13), (9, 80)])
    pixels = [900, 800, 700, 600, 50, 40, 30, 20]
    results = ev.evaluate(model, batches, INFO, CONTEXT, class_pixels=pixels, threshold=0.7, mode=mode)

    prediction, label, confidence = [], [], []
    for batch in batches:
        top = model(normalize(batch["image"])).softmax(1).max(1)
        prediction += top.indices.flatten().tolist()
        confidence += top.values.flatten().tolist()
        label += batch["label"].flatten().tolist()
    iou = brute_force_iou(prediction, label, 8)
    valid = [i for i, t in enumerate(label) if t != 255]
    for t, row in enumerate(results["confusion"]):
        assert row == [sum(label[i] == t and prediction[i] == p for i in valid) for p in range(8)]
    assert all(type(count) is int for row in results["confusion"] for count in row)
    right = [prediction[i] == label[i] for i in valid]
    accepted = [prediction[i] == label[i] for i in valid if confidence[i] >= 0.7]
    assert iou[7] is None and results["iou"]["blocks"] is None
    assert [results["iou"][name] for name in INFO.classes[:7]] == pytest.approx([100 * value for value in iou[:7]])
    assert results["miou"] == pytest.approx(100 * sum(iou[:7]) / 7)
    assert results["head_miou"] == pytest.approx(25 * sum(iou[:4]))
    assert results["tail_miou"] == pytest.approx(100 * sum(iou[4:7]) / 3)  # of four classes one is nowhere
    assert results["pixel_accuracy"] == pytest.approx(100 * sum(right) / len(right))
    assert results["ece"] == pytest.approx(brute_force_ece([confidence[i] for i in valid], right), abs=1e-5)
    assert results["images"] == 3
    assert 0 < len(accepted) < len(valid)
    assert results["pseudo_label_share"] == pytest.approx(len(accepted) / len(valid), abs=1e-3)
    assert results["pseudo_label_accuracy"] == pytest.approx(sum(accepted) / len(accepted), abs=1e-2)
    json.dumps(results, allow_nan=False)


def test_evaluate_without_valid_pixels_or_images_is_none():
    batches = fake_batches([(1, 5)])  # its only row is 255
    for loader in (batches, []):
        results = ev.evaluate(nn.Conv2d(3, 8, 1), loader, INFO, CONTEXT, threshold=0.95)
        assert results["miou"] is None and results["ece"] is None and results["pseudo_label_share"] is None
        assert results["images"] == len(loader) and "head_miou" not in results
        assert results["confusion"] == [[0] * 8] * 8
        json.dumps(results, allow_nan=False)


def test_softmax_is_float32_and_the_mode_follows_the_data_set():
    model = lambda images: (images.sum(1, keepdim=True) * torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)).bfloat16()
    seen = []
    watched = lambda window: (seen.append(window.shape[-1]), model(window))[1]
    sliding = dataclasses.replace(INFO, evaluation="sliding", crop=8)
    assert ev.class_probabilities(watched, torch.randn(1, 3, 8, 20), INFO).dtype == torch.float32
    assert ev.class_probabilities(watched, torch.randn(1, 3, 8, 20), sliding).dtype == torch.float32
    assert seen == [20] + [8] * 4
    with pytest.raises(UserError, match="mode"):
        ev.class_probabilities(model, torch.randn(1, 3, 8, 8), INFO, "slide")


def test_ranks_are_summed_in_one_message(monkeypatch):
    model, batches = nn.Conv2d(3, 8, 1), fake_batches([(20, 30), (10, 13), (9, 8)])
    whole = ev.evaluate(model, batches, INFO, CONTEXT, threshold=0.2)
    sent = []
    monkeypatch.setattr(ev, "all_reduce_sum", lambda tensor: sent.append(tensor.clone()) or tensor)
    for rank in range(2):
        ev.evaluate(model, batches[rank::2], INFO, CONTEXT, threshold=0.2)
    assert len(sent) == 2  # one a rank
    monkeypatch.setattr(ev, "all_reduce_sum", lambda tensor: sent[0] + sent[1])
    both = ev.evaluate(model, [], INFO, CONTEXT, threshold=0.2)
    assert both.pop("confusion") == whole.pop("confusion")
    assert both.pop("iou") == pytest.approx(whole.pop("iou"))
    assert all(ours == pytest.approx(theirs) for ours, theirs in zip(both.pop("reliability"), whole.pop("reliability")))
    assert both == pytest.approx(whole)


# ---------------------------------------------------------------- checkpoints


@dataclasses.dataclass
class FakeConfig(TrainingOptions):
    width: int = 5


@pytest.fixture
def method(monkeypatch):
    """A module `daw` with a network of two 1x1 convolutions."""
    def build_model(config, num_classes):
        assert config.weights == "none"  # nothing is downloaded
        return nn.Sequential(nn.Conv2d(3, config.width, 1), nn.BatchNorm2d(config.width), nn.Conv2d(config.width, num_classes, 1))

    module = types.ModuleType("daw")
    module.Config, module.build_model, module.predictor = FakeConfig, build_model, lambda model, config: model
    monkeypatch.setitem(sys.modules, "daw", module)
    return module


@pytest.fixture
def checkpoint(method):
    torch.manual_seed(2)
    config = FakeConfig(dataset="shapes", width=6, amp=False)
    model, ema = (method.build_model(dataclasses.replace(config, weights="none"), 8) for _ in range(2))
    return {"format": 1, "method": "daw", "config": {**dataclasses.asdict(config), "retired_option": 3},
            "model": model.state_dict(), "ema": ema.state_dict(), "iteration": 7}


def test_load_model_takes_the_ema_weights_where_there_are_some(checkpoint, method, tmp_path):
    path = tmp_path / "c.pt"
    images = torch.randn(1, 3, 6, 6)
    for use, saved in (("best available", "ema"), ("model", "model"), ("ema", "ema")):
        torch.save(checkpoint, path)
        predict_, config, info = ev.load_model(path, "cpu", use)
        assert config.width == 6 and config.weights == "default" and info == INFO
        model = method.build_model(dataclasses.replace(config, weights="none"), 8).eval()
        model.load_state_dict(checkpoint[saved])
        torch.testing.assert_close(predict_(images), model(images))
    torch.save({**checkpoint, "ema": None, "config": {"dataset": "shapes", "crop": 48, "width": 6}}, path)
    assert ev.load_model(path, "cpu")[2].crop == 48
    with pytest.raises(UserError, match="no weights under ema"):
        ev.load_model(path, "cpu", "ema")


def test_load_model_says_what_is_wrong(checkpoint, tmp_path):
    path = tmp_path / "c.pt"

    def problem(content):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(UserError) as caught:
            ev.load_model(path, "cpu")
        assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    with pytest.raises(UserError, match="no checkpoint"):
        ev.load_model(tmp_path / "missing.pt", "cpu")
    torch.save(checkpoint, path)
    whole = path.read_bytes()
    assert "cannot be read" in problem(whole[: len(whole) // 2])
    assert "cannot be read" in problem(b"not a checkpoint")
    assert "cannot be read" in problem(b"")
    assert "not a checkpoint" in problem({"weight": torch.zeros(1)})
    assert "not a checkpoint" in problem([1, 2])
    assert "unknown method 'os'" in problem({**checkpoint, "method": "os"})
    assert "unknown data set 'mars'" in problem({**checkpoint, "config": {"dataset": "mars"}})
    wider = problem({**checkpoint, "config": {**checkpoint["config"], "width": 9}})
    assert "0.weight is [6, 3, 1, 1] instead of [9, 3, 1, 1]" in wider and "more" in wider
    renamed = {"module." + key: value for key, value in checkpoint["ema"].items()}
    assert "0.weight is missing" in problem({**checkpoint, "ema": renamed})


@dataclasses.dataclass
class SamplingConfig(TrainingOptions):
    steps: int = 2


@pytest.fixture
def sampler(monkeypatch, tmp_path):
    """A checkpoint, saved with 3 steps, of a module `diffmatch` whose prediction is class `steps` everywhere."""
    module = types.ModuleType("diffmatch")
    module.Config, module.built = SamplingConfig, []

    def build_model(config, num_classes):
        module.built.append(config.steps)
        return nn.Conv2d(3, num_classes, 1)

    def predictor(model, config):
        favour = torch.zeros(8, 1, 1)
        favour[config.steps] = 100
        return lambda images: model(images) + favour

    module.build_model, module.predictor = build_model, predictor
    monkeypatch.setitem(sys.modules, "diffmatch", module)
    config, weights = dataclasses.asdict(SamplingConfig(dataset="shapes", steps=3)), nn.Conv2d(3, 8, 1).state_dict()
    torch.save({"format": 1, "method": "diffmatch", "config": config, "model": weights}, tmp_path / "d.pt")
    return tmp_path / "d.pt"


@pytest.mark.parametrize("steps, used", [(None, 3), (1, 1), (5, 5)])
def test_steps_reach_the_model_and_the_predictor(sampler, steps, used):
    predict_, config, _ = ev.load_model(sampler, "cpu", steps=steps)
    assert config.steps == used and sys.modules["diffmatch"].built == [used]
    with torch.no_grad():
        assert (predict_(torch.randn(1, 3, 4, 5)).argmax(1) == used).all()


def test_steps_that_make_no_sense_are_refused(sampler, checkpoint, tmp_path):
    for steps in (0, -4):
        with pytest.raises(UserError, match=f"--steps takes at least 1, not {steps}"):
            ev.load_model(sampler, "cpu", steps=steps)
    torch.save(checkpoint, tmp_path / "c.pt")
    with pytest.raises(UserError, match="for methods that sample .* of daw"):
        ev.load_model(tmp_path / "c.pt", "cpu", steps=1)


@pytest.mark.parametrize("program", ["evaluate", "predict"])
def test_steps_for_a_daw_checkpoint_are_one_line_of_error(tmp_path, program):
    config = daw.Config(dataset="shapes", backbone="tiny", weights="none")
    weights = daw.build_model(config, 8).state_dict()
    torch.save({"format": 1, "method": "daw", "config": dataclasses.asdict(config), "model": weights}, tmp_path / "c.pt")
    Image.new("RGB", (20, 20)).save(tmp_path / "x.png")
    pictures_ = [tmp_path / "x.png", "--output", tmp_path / "out"] if program == "predict" else []
    done = run_program("-m", f"common.{program}", "--checkpoint", tmp_path / "c.pt", "--device", "cpu", "--steps", "4", *pictures_)
    assert done.returncode == 1 and done.stdout == "" and not (tmp_path / "out").exists()
    assert done.stderr == (f"error: {tmp_path / 'c.pt'}: --steps is for methods that sample (diffmatch); "
                           f"this checkpoint is of daw\n")


# ---------------------------------------------------------------- pictures


def label_map(height=40, width=64):
    label = (np.arange(height * width).reshape(height, width) // 400).astype(np.uint8)
    label[:3] = 255
    return label


def test_colors_and_overlay():
    label = label_map()
    colors = pictures.colorize(torch.from_numpy(label), PALETTE)
    assert colors.dtype == np.uint8 and colors.shape == (40, 64, 3)
    assert tuple(colors[0, 0]) == pictures.IGNORE_COLOR  # not the palette's entry 255
    assert tuple(colors[10, 10]) == PALETTE[label[10, 10]]
    image = np.full((3, 40, 64), 100, np.uint8)
    mixed = pictures.overlay(image, label, PALETTE, alpha=0.25)
    assert tuple(mixed[0, 0]) == (100, 100, 100)
    assert mixed[10, 10] == pytest.approx(0.75 * 100 + 0.25 * np.array(PALETTE[label[10, 10]]), abs=1)


def test_indexed_png_reads_back_as_the_label(tmp_path):
    path = tmp_path / "new" / "label.png"
    pictures.save_indexed_png(label_map(), PALETTE, path)
    with Image.open(path) as picture:
        assert picture.mode == "P" and picture.size == (64, 40)
        assert (np.asarray(picture) == label_map()).all()
        assert (np.asarray(picture.convert("RGB")) == pictures.colorize(label_map(), PALETTE)).all()
    assert [file.name for file in path.parent.iterdir()] == ["label.png"]  # no temporary file


def test_sample_grid_and_legend(tmp_path):
    rows = [(np.zeros((40, 64, 3), np.uint8), label_map(), label_map() % 8), (torch.zeros(3, 90, 20).byte(), label_map(90, 20), label_map(90, 20))]
    pictures.sample_grid(rows, INFO.classes, PALETTE, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.mode == "RGB" and grid.width == 3 * (64 * 3 + 8) + 8 and grid.height > 40 * 3 + 90 * 2
        colors = {color for _, color in grid.getcolors(1 << 20)}
    assert {PALETTE[1], PALETTE[6], pictures.IGNORE_COLOR} <= colors
    for width in (60, 120, 900):  # names too long for the width are shortened
        assert pictures.legend(INFO.classes, PALETTE, width).width == width


@pytest.mark.parametrize("columns", [1, 2, 3, 5])
def test_sample_grid_with_any_number_of_columns(tmp_path, columns):
    """Column k of row r lies where plain arithmetic puts it, and shows its own label map."""
    heights = (200, 180)  # between SMALL and LARGE: drawn as they are
    images = [np.full((height, 170, 3), 90 + row, np.uint8) for row, height in enumerate(heights)]
    maps = [[np.full((height, 170), 2 * row + column, np.uint8) for column in range(columns - 1)]
            for row, height in enumerate(heights)]
    rows = [(image, *own) for image, own in zip(images, maps)]
    pictures.sample_grid(rows, INFO.classes, PALETTE, tmp_path / "grid.png", "abcde"[:columns])
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape[1] == columns * 178 + 8
    names = [INFO.classes[c] for c in sorted({int(map_[0, 0]) for own in maps for map_ in own})]
    header = grid.shape[0] - sum(heights) - 2 * 8 - pictures.legend(names, PALETTE, grid.shape[1]).height
    for top, image, own in zip((header, header + heights[0] + 8), images, maps):
        for column, expected in enumerate((image, *(pictures.colorize(map_, PALETTE) for map_ in own))):
            left = 8 + column * 178
            assert (grid[top : top + len(image), left : left + 170] == expected).all()
    for column in range(columns):  # every column has a caption
        assert (grid[:header, column * 178 : column * 178 + 178] != 255).any()


def test_sample_grid_as_called_without_captions(tmp_path):
    row = (np.zeros((40, 64, 3), np.uint8), label_map(), label_map() % 8)
    files = [tmp_path / name for name in ("default.png", "same.png", "other.png")]
    pictures.sample_grid([row], INFO.classes, PALETTE, files[0])
    pictures.sample_grid([row], INFO.classes, PALETTE, files[1], ["image", "label", "prediction"])
    pictures.sample_grid([row], INFO.classes, PALETTE, files[2], ["image", "truth", "prediction"])
    default, same, other = (np.asarray(Image.open(file)) for file in files)
    assert (default == same).all() and default.shape == other.shape and (default != other).any()
    info, label = DATASETS["pascal"], np.array([[8, 1], [255, 8]], np.uint8)
    pictures.sample_grid([(np.zeros((2, 2, 3), np.uint8), label, label)], info.classes, info.palette, files[0])
    grid, names = np.asarray(Image.open(files[0])), [info.classes[1], info.classes[8], "ignored"]
    key = pictures.legend(names, [info.palette[1], info.palette[8], pictures.IGNORE_COLOR], grid.shape[1])
    assert (grid[-key.height :] == np.asarray(key)).all()  # in the order of the classes
    for rows in ([row[:2]], [row, (*row, label_map())]):
        with pytest.raises(ValueError, match=f"row {len(rows) - 1} has {len(rows[-1])} pictures for 3 columns"):
            pictures.sample_grid(rows, INFO.classes, PALETTE, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def fake_results(classes, bins=5):
    """Results of which plot_calibration reads; class 1 has no pixels, the first bin is empty."""
    rng = np.random.default_rng(classes)
    confusion = rng.integers(0, 1000, (classes, classes))
    confusion[1] = 0
    rows = [{"upper": (m + 1) / bins, "share": m / 10, "confidence": (m + 0.5) / bins, "accuracy": m / 8} for m in range(bins)]
    rows[0] |= {"confidence": None, "accuracy": None}
    return {"confusion": confusion.tolist(), "reliability": rows, "ece": 0.0423}


def bars(container):
    return [number for bar in container for number in (bar.get_x(), bar.get_x() + bar.get_width(), bar.get_height())]


@pytest.mark.parametrize("classes", [3, 21, 22])
def test_calibration_figure(drawn, tmp_path, classes):
    results, names = fake_results(classes), [f"class {c}" for c in range(classes)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures.plot_calibration(results, names, tmp_path / "new" / "figure.png")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["figure.png"]
    with Image.open(tmp_path / "new" / "figure.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300 and len(picture.convert("RGB").getcolors(1 << 24)) > 20

    left, right = drawn[0].axes
    assert "ECE 4.2 %" in left.get_title()
    accuracy, share = left.containers
    assert bars(accuracy) == pytest.approx([0, 0.2, 0, 0.2, 0.4, 1 / 8, 0.4, 0.6, 2 / 8, 0.6, 0.8, 3 / 8, 0.8, 1, 4 / 8])
    assert [bar.get_height() for bar in share] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert [bar.get_x() + bar.get_width() / 2 for bar in share] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert [tuple(line.get_xydata().ravel()) for line in left.lines] == [(0, 0, 1, 1)]

    for labels in (right.get_xticklabels(), right.get_yticklabels()):
        assert [label.get_text() for label in labels] == names
    assert (right.get_xlabel(), right.get_ylabel()) == ("predicted class", "true class")
    shown = right.images[0].get_array().filled(-1)  # what is masked is not drawn
    texts = {text.get_position(): text.get_text() for text in right.texts}
    for truth, counts in enumerate(results["confusion"]):
        for predicted, count in enumerate(counts):
            percent = 100 * count / sum(counts) if truth != 1 else -1
            assert shown[truth, predicted] == pytest.approx(percent)
            assert texts.get((predicted, truth)) == (f"{percent:.0f}" if truth != 1 and classes <= 21 else None)


def test_calibration_figure_of_nothing(drawn, tmp_path):
    results = ev.evaluate(nn.Conv2d(3, 8, 1), [], INFO, CONTEXT)
    pictures.plot_calibration(results, INFO.classes, tmp_path / "figure.png")
    left, right = drawn[0].axes
    assert "ECE -" in left.get_title() and not right.texts and right.images[0].get_array().mask.all()


def test_calibration_figure_that_cannot_be_drawn(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    if importlib.util.find_spec("matplotlib"):
        with pytest.raises(UserError, match="cannot write .*figure.png"):
            pictures.plot_calibration(fake_results(3), "abc", tmp_path / "file" / "figure.png")
    hide_matplotlib(monkeypatch)
    with pytest.raises(UserError, match="matplotlib: pip install matplotlib"):
        pictures.plot_calibration(fake_results(3), "abc", tmp_path / "figure.png")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def hide_matplotlib(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed


# ---------------------------------------------------------------- command lines


def run(monkeypatch, main, *arguments):
    monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments)])
    return main()


@pytest.fixture
def fake_data(monkeypatch):
    """Three validation images for the evaluation's command line; the unlabeled ones have no truth."""
    samples = [types.SimpleNamespace(mask="x")] * 3
    data = types.SimpleNamespace(info=INFO, val=samples, tune=[], unlabeled=[types.SimpleNamespace(mask=None)])
    monkeypatch.setattr(ev, "load_data", lambda config, context: data)
    monkeypatch.setattr(ev, "count_class_pixels", lambda data: torch.tensor([900, 80, 70, 60, 50, 40, 0, 20]))
    monkeypatch.setattr(ev, "evaluation_loader", lambda *arguments: fake_batches([(20, 30), (10, 13), (9, 8)]))


def test_evaluate_command(checkpoint, fake_data, tmp_path, monkeypatch, capsys):
    torch.save(checkpoint, tmp_path / "c.pt")
    arguments = ("--checkpoint", tmp_path / "c.pt", "--device", "cpu", "--threshold", "0.3")
    run(monkeypatch, ev.main, *arguments, "--output", tmp_path / "r.json", "--mode", "sliding")
    printed = capsys.readouterr().out
    assert all(name in printed for name in INFO.classes) and "mIoU" in printed and "pseudo-labels" in printed
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["images"] == 3 and results["mode"] == "sliding" and len(results["reliability"]) == 15
    assert sum(map(sum, results["confusion"])) == 19 * 30 + 9 * 13 + 8 * 8  # a row of each is ignored
    assert "steps" not in results and {file.name for file in tmp_path.iterdir()} == {"c.pt", "r.json"}
    for split in ("unlabeled", "tune"):
        with pytest.raises(UserError, match=f"no {split} images"):
            run(monkeypatch, ev.main, *arguments, "--split", split)


@pytest.mark.parametrize("flag, used", [([], 3), (["--steps", "6"], 6)])
def test_steps_on_both_command_lines(sampler, fake_data, tmp_path, monkeypatch, flag, used):
    arguments = ("--checkpoint", sampler, "--device", "cpu", *flag)
    run(monkeypatch, ev.main, *arguments, "--output", tmp_path / "r.json")
    results = json.loads((tmp_path / "r.json").read_text())
    predicted = np.array(results["confusion"]).sum(0)
    assert results["steps"] == used and predicted[used] == predicted.sum() > 0
    Image.new("RGB", (9, 7)).save(tmp_path / "x.png")
    assert run(monkeypatch, predict.main, *arguments, "--output", tmp_path / "out", tmp_path / "x.png") == 0
    assert (np.asarray(Image.open(tmp_path / "out" / "x.png")) == used).all()


def test_figure_of_the_evaluate_command(checkpoint, fake_data, drawn, tmp_path, monkeypatch):
    torch.save(checkpoint, tmp_path / "c.pt")
    arguments = ("--checkpoint", tmp_path / "c.pt", "--output", tmp_path / "r.json", "--figure", tmp_path / "figure.png")
    monkeypatch.setattr(ev, "start", lambda device: Context(1, 2, CPU))
    run(monkeypatch, ev.main, *arguments)
    assert not drawn and not (tmp_path / "figure.png").exists()  # the main rank draws
    monkeypatch.setattr(ev, "start", lambda device: CONTEXT)
    run(monkeypatch, ev.main, *arguments)
    results = json.loads((tmp_path / "r.json").read_text())
    left, right = drawn[0].axes
    assert f"{100 * results['ece']:.1f} %" in left.get_title() and right.get_yticklabels()[5].get_text() == INFO.classes[5]
    confusion = np.array(results["confusion"])
    assert right.images[0].get_array()[5].tolist() == pytest.approx((100 * confusion[5] / confusion[5].sum()).tolist())
    assert Image.open(tmp_path / "figure.png").format == "PNG"


def test_missing_matplotlib_is_reported_before_the_evaluation(tmp_path, monkeypatch, capsys):
    hide_matplotlib(monkeypatch)
    monkeypatch.setattr(ev, "load_model", lambda *arguments, **options: pytest.fail("evaluates"))
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, lambda: run_main(ev.main), "--checkpoint", "x.pt", "--device", "cpu", "--figure", tmp_path / "figure.png")
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "error: figures need the package matplotlib: pip install matplotlib\n"


def test_predict_command(checkpoint, tmp_path, monkeypatch, capsys):
    torch.save(checkpoint, tmp_path / "c.pt")
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in {"a.jpg": (37, 21), "a.png": (1, 1), "A_overlay.bmp": (70, 9), "sub/a.png": (5, 5)}.items():
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(folder / name)
    (folder / "broken.jpg").write_bytes((folder / "a.jpg").read_bytes()[:300])
    arguments = ("--checkpoint", tmp_path / "c.pt", "--device", "cpu", "--mode", "sliding")
    status = run(monkeypatch, predict.main, *arguments, "--output", tmp_path / "out", folder, folder / "a.jpg", folder / "sub" / "a.png", tmp_path / "none")
    errors = capsys.readouterr().err.splitlines()
    assert status == 1 and len(errors) == 2 and "none" in errors[0] and "broken.jpg" in errors[1]
    # Four pictures, two files each, nothing of the broken one.
    sizes = {file.name: Image.open(file).size for file in sorted((tmp_path / "out").iterdir())}
    assert len(sizes) == 8 and sorted(sizes.values()) == sorted([(37, 21), (1, 1), (70, 9), (5, 5)] * 2)
    assert len({name.lower() for name in sizes}) == 8 and {"a_2.png", "a_3.png"} <= set(sizes)
    assert Image.open(tmp_path / "out" / "a_2.png").mode == "P" and Image.open(tmp_path / "out" / "a_2_overlay.png").mode == "RGB"

    before = (folder / "a.png").read_bytes()
    with pytest.raises(UserError, match="overwrite"):
        run(monkeypatch, predict.main, *arguments, "--output", folder, folder / "a.jpg", folder / "a.png")
    assert (folder / "a.png").read_bytes() == before
    assert run(monkeypatch, predict.main, *arguments, "--output", tmp_path / "out", folder / "sub") == 0  # again: replaced
