"""Metrics against counting, windows against whole images; checkpoints, tables, the command."""

import json
import math
import random
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn

import daw
from common import evaluate as ev
from common import medical
from common.augment import normalize
from common.data import Data, DataOptions, Sample, dataset_info, load_data
from common.models import DeepLabV3Plus, resize
from common.runtime import UserError, read_json, run_main, write_json
from programs import error_of, on_ranks, picture

CPU = torch.device("cpu")
CLASSES = ("ground", "water", "trees", "houses", "roads")
INFO = dataset_info("folder", ",".join(CLASSES))


def iou_by_counting(pairs: list[tuple[int, int]], classes: int) -> list[float | None]:
    """From (label, prediction) of each pixel; None where a class occurs nowhere."""
    scores = []
    for c in range(classes):
        union = sum(c in pair for pair in pairs)
        scores.append(pairs.count((c, c)) / union if union else None)
    return scores


def ece_by_counting(confidence: list[float], correct: list[bool]) -> float:
    error = 0.0
    for m in range(15):
        inside = [i for i, c in enumerate(confidence) if m / 15 < c <= (m + 1) / 15 or c == m == 0]
        gap = sum(correct[i] for i in inside) - sum(confidence[i] for i in inside)
        error += abs(gap) / len(confidence)
    return error


# ---------------------------------------------------------------- metrics


def test_confusion_and_iou_equal_counting():
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randint(0, 5, (2, 9, 11), generator=generator)
    label = torch.randint(0, 4, (2, 9, 11), generator=generator, dtype=torch.uint8)
    label[torch.rand(label.shape, generator=generator) < 0.2] = 255
    confusion = ev.confusion_matrix(prediction, label, 6)  # 4: predicted only; 5: nowhere
    pairs = list(zip(label[label < 255].tolist(), prediction[label < 255].tolist()))
    assert confusion.tolist() == [[pairs.count((t, p)) for p in range(6)] for t in range(6)]
    expected, iou = iou_by_counting(pairs, 6), ev.iou_per_class(confusion).tolist()
    assert expected[4] == 0 and expected[5] is None and math.isnan(iou[5])
    assert iou[:5] == pytest.approx(expected[:5], rel=1e-12)
    assert ev.iou_per_class(confusion).nanmean() == pytest.approx(sum(expected[:5]) / 5, rel=1e-12)


def test_head_and_tail():
    pixels = [5, 100, 0, 7, 50, 6, 1, 30, 20, 10, 9, 8]
    assert ev.head_and_tail(pixels) == ([1, 4, 7, 8, 9], [2, 6, 0, 5, 3])
    assert ev.head_and_tail(torch.tensor([3, 9, 1])) == ([1], [2])  # of three classes half is one
    head, tail = ev.head_and_tail([4] * 10)
    assert sorted(head + tail) == list(range(10))  # ties: still no class in both


def test_ece_equals_counting():
    rng = random.Random(0)
    ends = [0.0, 1.0, 1 / 15, 2 / 15, 7 / 15, 0.2, 0.6, 0.8]  # of bins, to which they belong
    confidence = ends + [rng.random() for _ in range(500)]
    correct = [rng.random() < 0.7 for _ in confidence]
    valid = torch.ones(len(confidence), dtype=torch.bool)
    histogram = ev.calibration_histogram(
        torch.tensor(confidence, dtype=torch.float64), torch.tensor(correct), valid)
    expected = ece_by_counting(confidence, correct)
    assert ev.expected_calibration_error(histogram) == pytest.approx(expected, rel=1e-9)
    rows = ev.reliability(histogram)
    gaps = [row["share"] * abs(row["accuracy"] - row["confidence"]) for row in rows]
    assert sum(gaps) == pytest.approx(expected, rel=1e-9)
    for m, row in enumerate(rows):
        assert m / 15 <= row["confidence"] <= row["upper"] == (m + 1) / 15


@pytest.mark.parametrize("size, tops, lefts", [  # windows of 12 x 12 pixels, 8 apart
    ((25, 12), (0, 8, 13), (0,)), ((5, 33), (0,), (0, 8, 16, 21)), ((12, 12), (0,), (0,)),
    ((28, 20), (0, 8, 16), (0, 8))])
def test_windows_are_averaged_as_probabilities(size, tops, lefts):
    torch.manual_seed(0)
    network = nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False)  # sees the window's border
    images = torch.randn(2, 3, *size)
    padded = F.pad(images, (0, 0, 0, max(0, 12 - size[0])), mode="replicate")  # a short side
    total, count = torch.zeros(2, 4, *size), torch.zeros(size)
    for top in tops:
        for left in lefts:
            window = (..., slice(top, top + 12), slice(left, left + 12))
            total[window] += network(padded[window]).softmax(dim=1)[:, :, : size[0]]
            count[window] += 1
    sliding = ev.class_probabilities(network, images, "sliding", crop=12)
    torch.testing.assert_close(sliding, total / count)
    whole = ev.class_probabilities(network.bfloat16(), images.bfloat16(), "whole", crop=12)
    expected = network(images.bfloat16()).float().softmax(dim=1)
    torch.testing.assert_close(whole, expected, rtol=0, atol=0)  # float32 too


@pytest.mark.parametrize("size, crop", [((40, 64), 33), ((49, 33), 321), ((53, 90), 17)])
def test_aligned_pictures_keep_their_places(size, crop):
    """A network with a stride, asked where its pixels are, says where they are."""
    def network(images):
        assert torch.equal(images[..., -1, -1], places[..., -1, -1])  # continued, not black
        return resize(images[:, :2, ::16, ::16], images.shape[2:])

    rows, columns = torch.meshgrid(*map(torch.arange, size), indexing="ij")
    places = torch.stack((rows, columns, rows)).double()[None] / 100
    inside = (0, *(slice((side - 1) // 16 * 16) for side in size))  # up to the last one it sees
    expected = (places[:, 0] - places[:, 1])[inside]

    def error(mode: str) -> float:
        log_probs = ev.class_probabilities(network, places, mode, crop).double().log()
        assert log_probs.shape[2:] == size
        found = (log_probs[:, 0] - log_probs[:, 1])[inside]
        return 100 * (found - expected).abs().max().item()  # in pixels

    assert error("aligned") < 1e-3
    assert error("whole") < 1e-3 if size == (49, 33) else error("whole") > 1


# ---------------------------------------------------------------- evaluation


@pytest.fixture
def data(tmp_path) -> Data:
    """One labeled picture, three to validate; no label is class 4, first rows are 255."""
    rng = np.random.default_rng(0)
    root = tmp_path / "data"
    for number, (height, width) in enumerate([(20, 30), (37, 13), (9, 40), (11, 11)]):
        prefix = "val_" if number else ""
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        picture(root / f"{prefix}images" / f"{number}.png", image)
        label = rng.integers(0, 4, (height, width), dtype=np.uint8)
        label[0] = 255
        picture(root / f"{prefix}masks" / f"{number}.png", label)
    return load_data(DataOptions(dataset="folder", data_root=str(root), classes=",".join(CLASSES)))


@pytest.fixture
def network() -> nn.Module:
    """It never predicts class 4, which thus occurs nowhere; train mode would show."""
    torch.manual_seed(1)
    layer = nn.Conv2d(3, 5, 1).requires_grad_(False)
    layer.weight *= 4
    layer.bias[4] = -100
    return nn.Sequential(nn.Dropout(), layer, nn.Identity().eval())  # frozen, as some users have it


def read(data: Data, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    image = np.array(Image.open(data.root / sample.image)).transpose(2, 0, 1)
    return torch.tensor(image)[None], torch.tensor(np.array(Image.open(data.root / sample.mask)))


@pytest.mark.parametrize("mode", [None, "sliding"])
def test_evaluation_equals_counting(data, network, mode):
    results = ev.evaluate(network, data, "val", 16, CPU, 0, threshold=0.7, mode=mode)
    json.dumps(results, allow_nan=False)
    assert [part.training for part in network] == [True, True, False]  # as before
    network.eval()
    pairs, confidence = [], []
    for sample in data.val:
        image, label = read(data, sample)
        top = network(normalize(image))[0].softmax(dim=0).max(dim=0)
        pairs += zip(label[label < 255].tolist(), top.indices[label < 255].tolist())
        confidence += top.values[label < 255].tolist()
    correct = [truth == predicted for truth, predicted in pairs]
    accepted = [right for right, value in zip(correct, confidence) if value >= 0.7]
    assert results["confusion"] == [[pairs.count((t, p)) for p in range(5)] for t in range(5)]
    iou = iou_by_counting(pairs, 5)
    assert iou[4] is None and results["iou"] == pytest.approx(
        {name: value and 100 * value for name, value in zip(CLASSES, iou)})
    assert results["miou"] == pytest.approx(25 * sum(iou[:4]))
    order = read(data, data.labeled[0])[1].flatten().bincount(minlength=256)[:5].argsort()
    assert order[0] == 4  # it is nowhere: the other one is the tail
    assert results["tail_miou"] == pytest.approx(100 * iou[order[1]])
    assert results["head_miou"] == pytest.approx(50 * (iou[order[4]] + iou[order[3]]))
    assert results["pixel_accuracy"] == pytest.approx(100 * sum(correct) / len(correct))
    assert results["ece"] == pytest.approx(ece_by_counting(confidence, correct), rel=1e-3)
    assert results["images"] == 3 and 0 < len(accepted) < len(correct)
    pseudo_labels = results["pseudo_label_share"], results["pseudo_label_accuracy"]
    assert pseudo_labels == pytest.approx(
        (len(accepted) / len(correct), sum(accepted) / len(accepted)), rel=1e-2)
    assert "pseudo_label_share" not in ev.evaluate(network, data, "val", 16, CPU, 0)
    assert not network.training


def test_outputs_that_are_not_finite_have_no_score(data, network):
    network[1].bias[2] = np.nan
    assert "not finite" in error_of(ev.evaluate, network, data, "val", 16, CPU, 0)


def test_the_mode_is_the_one_of_the_data_set(data, network):
    shapes = []
    network.register_forward_hook(lambda layer, shown, output: shapes.append(output.shape[2:]))
    ev.evaluate(network, data, "labeled", 16, CPU, 0)
    data.info = replace(INFO, evaluation="sliding")
    ev.evaluate(network, data, "labeled", 16, CPU, 0)
    assert shapes == [(32, 32)] + 6 * [(16, 16)]


def test_undefined_values_are_none(data, network):
    Image.new("L", (30, 20), 255).save(data.root / data.labeled[0].mask)
    results = ev.evaluate(network, data, "labeled", 16, CPU, 0, threshold=0.95)
    for name in ("miou", "ece", "pixel_accuracy", "tail_miou", "pseudo_label_share"):
        assert results[name] is None
    assert results["images"] == 1 and results["confusion"] == [[0] * 5] * 5
    assert all(row["share"] is row["accuracy"] is None for row in results["reliability"])
    json.dumps(results, allow_nan=False)
    data.unlabeled = [Sample("images/0.png", None)]
    for split in ("tune", "test", "unlabeled"):
        with pytest.raises(UserError, match=f"folder has no {split} images with labels"):
            ev.evaluate(network, data, split, 16, CPU)


def test_a_class_may_have_the_name_of_a_number():
    printed = ev.report({"iou": {"images": 61.5}, "images": 12})
    assert printed.split() == ["images", "61.5000", "images", "12"]


def test_ranks_share_the_images_and_agree_after_one_message(data, network, tmp_path):
    network = nn.Sequential(nn.BatchNorm2d(3), network)

    def on_rank(rank: int) -> list:
        images, messages, all_reduce = [], [], dist.all_reduce
        dist.all_reduce = lambda tensor: messages.append(all_reduce(tensor))
        network.register_forward_hook(lambda layer, shown, output: images.append(shown))
        network[0].running_mean += rank  # each rank has its own
        results = ev.evaluate(network, data, "val", 16, CPU, 0, threshold=0.5)
        return [results, len(images), len(messages), network[0].running_mean.tolist()]

    ranks = on_ranks(on_rank, tmp_path)
    network[0].running_mean += 0.5
    alone = ev.evaluate(network, data, "val", 16, CPU, 0, threshold=0.5)
    for number, images in enumerate((2, 1)):
        results, *rest = ranks[number]
        assert rest == [images, 3, [0.5] * 3]  # two messages are the running statistics
        assert results["confusion"] == alone["confusion"] and results["images"] == 3
        assert results["ece"] == pytest.approx(alone["ece"], rel=1e-9)
        assert results.keys() == alone.keys() and results["iou"] == alone["iou"]


def test_pictures_of_samples(data, network, tmp_path):
    def predict(images):
        assert images.min() < 0  # normalised
        logits = network(images)
        third = (torch.arange(5) == 3).float()[None, :, None, None]
        return torch.cat([logits, third.expand_as(logits)])

    ev.write_samples(network.eval(), data, 16, CPU, tmp_path / "samples.png")
    captions = ("image", "label", "prediction", "")
    ev.write_samples(predict, data, 16, CPU, tmp_path / "more.png", captions)
    three, four = (np.array(Image.open(tmp_path / f"{name}.png")) for name in ("samples", "more"))
    width = three.shape[1] - 8  # columns have margins of 8 pixels
    assert four.shape[1] == 4 * width // 3 + 8
    height = min(len(three), len(four)) - 60  # the legend is below
    assert (three[:height, :width] == four[:height, :width]).all()
    assert (four[:height, width:] == INFO.palette[3]).all(axis=2).any()


# ---------------------------------------------------------------- checkpoints


@pytest.fixture
def checkpoint(data) -> dict:
    """Of an untrained daw.py."""
    torch.manual_seed(2)
    model, ema = (DeepLabV3Plus("tiny", 5, "none") for _ in range(2))
    config = daw.Config(dataset="folder", data_root=str(data.root), classes=",".join(CLASSES),
                        backbone="tiny", crop=16)
    return {"format": 2, "method": "daw", "config": asdict(config), "iteration": 7,
            "model": model.state_dict(), "ema": ema.state_dict()}


def test_the_weights_of_the_average_are_taken_where_there_are_some(checkpoint, tmp_path):
    model, images = DeepLabV3Plus("tiny", 5, "none").eval(), torch.randn(2, 3, 20, 16)
    for name in ("ema", "model"):
        torch.save(checkpoint, tmp_path / "c.pt")
        network, config, info = ev.load_predictor(tmp_path / "c.pt", "cpu")
        assert config == checkpoint["config"] and info == INFO and not network.training
        model.load_state_dict(checkpoint.pop(name))
        with torch.inference_mode():
            torch.testing.assert_close(network(images), model(images), rtol=0, atol=0)


def test_changes_to_the_config(checkpoint, tmp_path):
    path = tmp_path / "c.pt"
    torch.save(checkpoint, path)
    words = ["crop=32", "amp=true", "align=false", "threshold=0.5", "labeled=183", "data_root=a=b"]
    changes = {"crop": 32, "amp": True, "align": False, "threshold": 0.5, "labeled": "183",
               "data_root": "a=b"}
    changed = ev.load_predictor(path, CPU, words)[1]
    assert changed == {**checkpoint["config"], **changes}
    names = ",".join(CLASSES[::-1])
    words = ["dataset=folder", f"classes={names}"]  # neither is valid alone
    config, info = ev.load_predictor(path, CPU, words)[1:]
    assert config["classes"] == names and info.name == "folder"
    for word in ("steps=1", "crop=wide", "crop=0", "crop", "amp", "labeled=", "align=2",
                 "weighting=mine"):
        assert word.split("=")[0] in error_of(ev.load_predictor, path, CPU, [word])


def test_what_is_wrong_with_a_checkpoint_is_said_in_one_line(checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "c.pt"

    def problem(**changes) -> str:
        torch.save({**checkpoint, **changes}, path)
        return error_of(ev.load_predictor, path, "cpu")

    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "foreign.py").write_text("raise SystemExit('was imported')")
    for method in ("foreign", "os", "tests.conftest", "../daw", None):
        assert f"{path} is of the method {method!r}" in problem(method=method)
    assert "'mars'" in problem(config={**checkpoint["config"], "dataset": "mars"})
    renamed = {f"module.{name}": value for name, value in checkpoint["ema"].items()}
    assert next(iter(checkpoint["ema"])) in problem(ema=renamed)
    assert str(path) in problem(format=1)
    wrong_kind = {name: [value] for name, value in checkpoint["ema"].items()}
    for crafted in ({"config": []}, {"config": {"dataset": [1]}}, {"ema": 3}, {"ema": wrong_kind}):
        assert problem(**crafted)


# ---------------------------------------------------------------- command line


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command in this process: (stdout, stderr), which says `error` if it fails."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments), "--device", "cpu"])
        with pytest.raises(SystemExit) as stopped:
            run_main(ev.main)
        out, err = capsys.readouterr()
        assert (stopped.value.code == 1) == ("error: " in err), err
        return out, err

    return run


def test_command_for_images(checkpoint, command, data, drawn, tmp_path):
    path, output = tmp_path / "c.pt", tmp_path / "r.json"
    torch.save(checkpoint, path)
    out, _ = command("--checkpoint", path, "--threshold", 0.3, "--mode", "sliding", "--output",
                     output, "--figure", tmp_path / "f.png", "--num-workers", 0, "--set", "crop=24")
    results = read_json(output)
    assert "warning" not in out
    write_json(tmp_path / "config.json", {})
    for option, value in (("--num-workers", -1), ("--threshold", "nan"),
                          ("--output", tmp_path / "latest.pt")):
        word = str(value) if option == "--output" else option
        assert word in command("--checkpoint", path, option, value)[1]
    torch.save({**checkpoint, "config": checkpoint["config"] | {"lists": "other"}}, path)
    assert "lists of images are not those" in command("--checkpoint", path, "--num-workers", 0)[0]
    network = ev.load_predictor(path, CPU)[0]
    expected = ev.evaluate(network, data, "val", 24, CPU, 0, 0.3, "sliding")
    assert {name: results[name] for name in expected} == expected
    assert results["set"] == {"crop": 24} and results["mode"] == "sliding"
    for name in (*CLASSES, "head_miou", "ece", "pseudo_label_accuracy"):
        assert name in out
    assert f"{results['miou']:.4f}" in out
    assert f"{100 * results['ece']:.1f} %" in drawn[0][0].axes[0].get_title()
    assert Image.open(tmp_path / "f.png").format == "PNG"

    for split in ("tune", "test"):
        assert f"no {split} images" in command("--checkpoint", path, "--split", split)[1]
    assert "volumes" in command("--checkpoint", path, "--released-empty")[1]


def test_command_without_matplotlib_stops_before_the_work(command, monkeypatch, tmp_path):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    _, error = command("--checkpoint", tmp_path / "missing.pt", "--figure", tmp_path / "f.png")
    assert error == "error: this needs the package matplotlib: pip install matplotlib\n"


def test_command_for_volumes(command, monkeypatch, tmp_path):
    class Predict(torch.nn.Module):  # slices [B, 1, S, S] in 0..1: bright pixels are class 2
        def forward(self, x):
            return torch.cat([0.5 - x, 0 * x - 9, x - 0.5, 0 * x - 9], dim=1)

    output, rng = tmp_path / "r.json", np.random.default_rng(0)
    (tmp_path / "lists").mkdir()
    for name, split in (("a", "train"), ("b", "val")):
        label = rng.integers(0, 4, (2, 8, 8), dtype=np.uint8)
        volume = medical.Volume(rng.random((2, 8, 8), np.float32), label, (2.0, 1.0, 1.0))
        medical.write_volume(tmp_path / "volumes" / f"{name}.npz", volume)
        (tmp_path / "lists" / f"{split}.txt").write_text(f"patient_{name} {name}")
    info = medical.DATASETS["acdc"]
    files = [medical.VolumeFile("patient_b", "b", tmp_path / "volumes" / "b.npz")]
    config = {"dataset": "acdc", "crop": 8, "data_root": str(tmp_path), "labeled": "1"}
    monkeypatch.setattr(ev, "load_predictor", lambda *arguments: (Predict(), config, info))
    for flags in ([], ["--released-empty"]):
        out, _ = command("--checkpoint", "c.pt", "--output", output, *flags)
        results = read_json(output)
        expected = medical.evaluate_volumes(Predict(), files, info, 8, CPU, bool(flags))
        assert {name: results[name] for name in expected} == expected
        assert results["empty_masks"] == 2 and f"{results['dice']:.2f}" in out

    assert list(results["scores"]) == ["b"]
    assert "no test list" in command("--checkpoint", "c.pt", "--split", "test")[1]
    assert "no unlabeled" in command("--checkpoint", "c.pt", "--split", "unlabeled")[1]
    monkeypatch.setitem(sys.modules, "matplotlib", ev)  # as if it were installed
    for flags in (["--mode", "whole"], ["--threshold", 0.5], ["--figure", "f.png"]):
        assert "not for volumes" in command("--checkpoint", "c.pt", *flags)[1]


# ---------------------------------------------------------------- the table of runs


def write_run(folder: Path, iteration: int = 9, *, last: dict, **more) -> None:
    write_json(folder / "config.json", {"method": "daw", "iterations": 9})
    method = "diffrect" if "dice" in last else "daw"
    results = {"method": method, "last": {"iteration": iteration, **last}, "best": None, **more}
    write_json(folder / "results.json", results)


def cells(table: str) -> list[list[str]]:
    header, _, *rows = table.splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *rows)]


def of_images(miou: float) -> dict:
    return {"miou": miou, "head_miou": 50.0, "tail_miou": None, "ece": 0.05,
            "iou": {"sky": miou + 1, "sea": None}}


def of_volumes(dice: float, hd95: float | None) -> dict:
    return {"dice": dice, "jaccard": 60.0, "hd95": hd95, "asd": 1.5, "empty_masks": 2,
            "per_class": {"heart": {"dice": dice + 1, "hd95": 3}, "lung": {"dice": None}}}


def test_table_of_images(command, tmp_path):
    for seed, miou, iteration in ((0, 40.0, 9), (1, 44.0, 9), (2, 10.0, 5)):
        write_run(tmp_path / "zebra" / f"seed{seed}", iteration, last=of_images(miou))
    write_run(tmp_path / "ant" / "seed0", last=of_images(20.0))  # started last
    (tmp_path / "zebra" / "seed2" / "results.json").rename(tmp_path / "zebra" / "results.json")
    out, notes = command("--table", tmp_path)
    assert cells(out) == [["run", "seeds", "mIoU", "head mIoU", "tail mIoU", "ECE"],
                          ["zebra", "2", "42.0 ± 2.8", "50.0 ± 0.0", "-", "5.0 ± 0.0"],
                          ["ant", "1", "20.0", "50.0", "-", "5.0"]]
    assert notes == f"not finished, left out: {tmp_path / 'zebra' / 'seed2'}\n"
    (tmp_path / "zebra" / "results.json").rename(tmp_path / "zebra" / "seed2" / "results.json")
    out, again = command("--table", tmp_path, "--per-class")
    assert again == notes
    assert [row[2:] for row in cells(out)] == [["sky", "sea"], ["43.0 ± 2.8", "-"], ["21.0", "-"]]
    for seed in (0, 1):
        config = {"method": "daw", "iterations": 9, "seed": seed, "amp": seed == 1, "lr": seed}
        write_json(tmp_path / "zebra" / f"seed{seed}" / "config.json", config)
    assert "runs of zebra differ in lr\n" in command("--table", tmp_path)[1]


def test_table_of_volumes_is_that_of_the_test_list(command, tmp_path):
    write_run(tmp_path / "a" / "seed0", last=of_volumes(1, 1), test=of_volumes(80.0, 5.0))
    write_run(tmp_path / "a" / "seed1", last=of_volumes(1, 1), test=of_volumes(84.0, None))
    write_run(tmp_path / "a" / "seed2", last=of_volumes(90.0, 1))  # killed before its test list
    assert cells(command("--table", tmp_path)[0]) == [
        ["run", "seeds", "Dice", "Jaccard", "HD95", "ASD", "empty masks"],
        ["a", "2", "82.0 ± 2.8", "60.0 ± 0.0", "5.0 (n = 1)", "1.5 ± 0.0", "2.0 ± 0.0"]]
    per_class = cells(command("--table", tmp_path, "--per-class")[0])
    assert per_class == [["run", "seeds", "heart", "lung"], ["a", "2", "83.0 ± 2.8", "-"]]
    write_run(tmp_path / "b" / "seed0", last=of_images(20.0))
    for flags in ([], ["--per-class"]):
        assert "folders of their own" in command("--table", tmp_path, *flags)[1]
    assert "no finished run in" in command("--table", tmp_path / "nowhere")[1]


def test_claims_are_paired_by_seed(command, tmp_path, monkeypatch):
    monkeypatch.setattr(ev, "CLAIMS", tmp_path / "claims.tsv")
    ev.CLAIMS.write_text("claim\thigher\tlower\tpaper\n" + "".join(
        f"{line}\n" for line in ("a > b\ta\tb\t+2", "b > a\tb\ta\t", "one\ta:only\tb:only\t",
                                 "steps\ta\ta:steps_1/miou\t", "sum\ta:e1+e2\ta:e2\t",
                                 "nobody\ta\tc\t", "noise\ta:tail\tb:tail\t")))
    for seed, (a, b, tail) in enumerate(((50, 40, 3), (54, 43, -3), (53, 45, 1))):
        for row, miou in (("a", a), ("b", b)):
            run = tmp_path / "runs" / row / f"seed{seed}"
            tail_miou = {"tail": tail if row == "a" else 0, **({"only": miou} if seed == 0 else {})}
            write_run(run, last={**of_images(float(miou)), **tail_miou})
            (run / "metrics.jsonl").write_text("".join(
                json.dumps({"iteration": k, "e1": 9 if k < 7 else k, "e2": 100}) + "\n"
                for k in range(10)))
            write_json(run / "steps_1.json", {"miou": miou - 1 - seed})
    write_run(tmp_path / "runs/a/seed9", last=of_images(0.0))  # nothing to pair it with
    (tmp_path / "runs/a/seed2/metrics.jsonl").unlink()
    title, *table = cells(command("--claims", tmp_path / "runs")[0])
    assert title == ["claim", "paper", str(tmp_path / "runs")]
    found = {row[0]: row[1:] for row in table}
    assert found["a > b"][0] == "+2" and found["a > b"][1].startswith("+9.67 [")
    assert found["b > a"][0] == "-" and found["b > a"][1].endswith("reversed")
    assert found["one"][1] == "+10 (one seed)"
    assert found["steps"][1].startswith("+2 [")
    assert found["sum"][1].startswith("+8 [+8, +8] holds")
    assert "nobody" not in found
    assert found["noise"][1].endswith("does not show")
    assert ev.verdict([1.0, 3.0] * 6) == "+2 [+1.34, +2.66] holds"
    stats = pytest.importorskip("scipy.stats", reason="compares with scipy's paired t-test")
    interval = stats.ttest_rel([50, 54, 53], [40, 43, 45]).confidence_interval()
    assert found["a > b"][1] == f"+9.67 [{interval.low:+.3g}, {interval.high:+.3g}] holds"
    assert np.allclose(ev.T_975, stats.t.ppf(0.975, range(1, 20)), atol=1e-3)


def test_every_claim_names_rows_of_run_all():
    rows = {line.split()[0].split("/")[1] for line in (ev.ROOT / ".docs/rows.txt").open()
            if not line.startswith("#")}
    claims = [line.split("\t") for line in ev.CLAIMS.read_text().splitlines()]
    assert {len(claim) for claim in claims} == {4}
    assert {side.split(":")[0] for claim in claims[1:] for side in claim[1:3]} <= rows
