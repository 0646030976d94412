"""The programs as users run them: plain, under torchrun, stopped, killed, and with bad input."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from programs import assert_identical, kill_after_first_checkpoint, run, start, state, succeed

QUICK = ["--batch-size", "2", "--iterations", "8", "--eval-every", "8", "--save-every", "2", "--num-workers", "1"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "shapes"
    succeed("-m", "common.synthetic", "--variant", "shapes", "--root", root)
    return root


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory) -> Path:
    """A finished run, never interrupted."""
    folder = tmp_path_factory.mktemp("trained")
    succeed("daw.py", *QUICK, "--data-root", shapes, "--output", folder)
    return folder


def test_a_run_leaves_its_folder(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"config.json", "metrics.jsonl", "results.json", "latest.pt", "best.pt", "samples.png"} <= names
    assert not [name for name in names if name.endswith(".part")]
    results = json.loads((trained / "results.json").read_text())
    assert results["last"]["iteration"] == 8 and 0 <= results["last"]["miou"] <= 100 and results["last"]["images"] == 200
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert any("t_star" in line for line in lines) and any("miou" in line for line in lines)


def test_a_finished_run_is_not_trained_again(trained, shapes):
    before = (trained / "latest.pt").stat().st_mtime_ns
    succeed("daw.py", *QUICK, "--data-root", shapes, "--output", trained)
    assert (trained / "latest.pt").stat().st_mtime_ns == before


def test_sigkill_then_the_same_command_ends_with_identical_bits(trained, shapes, tmp_path):
    command = ["daw.py", *QUICK, "--data-root", shapes, "--output", tmp_path]
    interrupted_at = kill_after_first_checkpoint(tmp_path, *command)["iteration"]
    assert interrupted_at < 8, "the run ended before it could be killed"
    assert f"at iteration {interrupted_at}" in succeed(*command)
    ours, theirs = state(tmp_path), state(trained)
    for name in ("model", "optimizer", "statistics", "rng", "iteration"):
        assert_identical(ours[name], theirs[name], name)


def test_sigterm_saves_and_exits(shapes, tmp_path):
    process = start("daw.py", *QUICK, "--iterations", "100000", "--save-every", "100000", "--data-root", shapes, "--output", tmp_path,
                    start_new_session=True)
    while not (tmp_path / "config.json").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    time.sleep(2)
    os.killpg(process.pid, signal.SIGTERM)  # the whole group, loader workers too, as a job scheduler does
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert state(tmp_path)["iteration"] >= 1 and "stopped by SIGTERM" in out and "Traceback" not in err


def test_two_ranks_train_and_evaluate_like_one_process(shapes, tmp_path):
    succeed("daw.py", *QUICK, "--data-root", shapes, "--output", tmp_path / "run", torchrun=2)
    assert len(state(tmp_path / "run")["rng"]) == 2
    results = []
    for ranks in (0, 2):
        path = tmp_path / f"{ranks}.json"
        succeed("-m", "common.evaluate", "--checkpoint", tmp_path / "run" / "best.pt", "--data-root", shapes, "--output", path, torchrun=ranks)
        results.append(json.loads(path.read_text()))
    one, two = results
    assert one["iou"] == two["iou"] and one["images"] == two["images"] == 200
    assert one["ece"] == pytest.approx(two["ece"], abs=1e-9)
    trained = json.loads((tmp_path / "run" / "results.json").read_text())
    assert trained["best"]["miou"] == pytest.approx(one["miou"], abs=1e-9)


COLLECTIVES = """
import sys, torch
from common import runtime
import daw
context = runtime.start("cpu")
batch = torch.arange(6.0).view(6, 1)
mine = batch.chunk(context.world_size)[context.rank]
rolled = runtime.roll_global_batch(mine)
assert torch.equal(rolled, torch.roll(batch, 1, 0).chunk(context.world_size)[context.rank]), rolled

generator = torch.Generator().manual_seed(0)
probs = torch.rand(6, 3, 5, 5, generator=generator).softmax(1)
label = torch.randint(0, 3, (6, 5, 5), generator=generator)
valid = torch.rand(6, 5, 5, generator=generator) > 0.3
part = lambda x: x.chunk(context.world_size)[context.rank]
sums = runtime.all_reduce_sum(daw.batch_sums(part(probs), part(label), part(probs.flip(1)), part(valid)))
torch.testing.assert_close(sums, daw.batch_sums(probs, label, probs.flip(1), valid))
counts = daw.pixel_counts([{"label": part(label), "valid": part(valid)}])
assert counts["valid"] * context.world_size == valid.sum()
print("agreed", context.rank)
runtime.finish()
"""


def test_collectives_equal_one_process(tmp_path):
    script = tmp_path / "collectives.py"
    script.write_text(COLLECTIVES)
    assert succeed(script, torchrun=2).count("agreed") == 2
    assert succeed(script).count("agreed") == 1


def test_predict_on_own_pictures(trained, shapes, tmp_path):
    from PIL import Image

    Image.radial_gradient("L").convert("RGB").resize((91, 50)).save(tmp_path / "mine.png")
    succeed("-m", "common.predict", "--checkpoint", trained / "best.pt", "--output", tmp_path / "out", tmp_path / "mine.png",
            shapes / "JPEGImages" / sorted(path.name for path in (shapes / "JPEGImages").iterdir())[0])
    with Image.open(tmp_path / "out" / "mine.png") as prediction:
        assert prediction.mode == "P" and prediction.size == (91, 50)
    assert (tmp_path / "out" / "mine_overlay.png").is_file()


@pytest.mark.parametrize("options", [["--supervised", "--strong-labeled", "--labeled", "12"], ["--weighting", "power", "--grad-accum", "2"],
                                     ["--weighting", "none", "--ema-decay", "0.9", "--amp"]])
def test_variants_run(options, shapes, tmp_path):
    succeed("daw.py", "--batch-size", "4", "--iterations", "3", "--num-workers", "0", "--data-root", shapes, "--output", tmp_path, *options)
    assert json.loads((tmp_path / "results.json").read_text())["last"]["iteration"] == 3


@pytest.mark.parametrize("script", ["daw.py", "diffmatch.py"])
def test_pascal_layout_trains_on_a_resnet(script, voc_root, tmp_path):
    sets = voc_root / "ImageSets" / "Segmentation"
    names = (sets / "train.txt").read_text().split()
    (tmp_path / "labeled.txt").write_text("\n".join(names[:2]))
    succeed(script, "--dataset", "pascal", "--data-root", voc_root, "--labeled-list", tmp_path / "labeled.txt", "--unlabeled-list",
            sets / "train.txt", "--backbone", "resnet50", "--weights", "none", "--crop", "33", "--batch-size", "2", "--iterations", "1",
            "--num-workers", "1", "--output", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["last"]["images"] == len((sets / "val.txt").read_text().split())


def refuse(*arguments) -> str:
    """The program must fail with one line that starts with `error:` and no traceback; returns the line."""
    done = run(*arguments)
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    return errors[0]


def test_bad_input_gives_one_line(shapes, trained, tmp_path):
    assert "24" in refuse("daw.py", "--data-root", shapes, "--labeled", "23", "--output", tmp_path / "a")
    assert "--data-root" in refuse("daw.py", "--dataset", "pascal", "--data-root", tmp_path / "nowhere")
    assert "other options" in refuse("daw.py", *QUICK, "--lr", "0.5", "--data-root", shapes, "--output", trained)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "latest.pt").write_bytes((trained / "latest.pt").read_bytes()[:1000])
    assert "latest.pt" in refuse("daw.py", *QUICK, "--data-root", shapes, "--output", tmp_path / "b")
    assert "best.pt" in refuse("-m", "common.evaluate", "--checkpoint", tmp_path / "best.pt")


def test_damaged_picture_in_a_worker_names_the_file(voc_root, tmp_path):
    sets = voc_root / "ImageSets" / "Segmentation"
    names = (sets / "train.txt").read_text().split()
    (tmp_path / "labeled.txt").write_text(names[0])
    picture = voc_root / "JPEGImages" / f"{names[1]}.jpg"
    picture.write_bytes(picture.read_bytes()[:300])
    message = refuse("daw.py", "--dataset", "pascal", "--data-root", voc_root, "--labeled-list", tmp_path / "labeled.txt", "--unlabeled-list",
                     sets / "train.txt", "--backbone", "resnet50", "--weights", "none", "--crop", "33", "--batch-size", "2", "--iterations", "9",
                     "--num-workers", "2", "--output", tmp_path / "run")
    assert str(picture) in message


def test_diverging_loss_names_the_step_and_keeps_the_checkpoint(shapes, tmp_path):
    message = refuse("daw.py", "--batch-size", "2", "--iterations", "400", "--lr", "1e18", "--data-root", shapes, "--output", tmp_path,
                     "--num-workers", "0", "--log-every", "5")
    assert "iteration" in message and "--lr" in message


def test_optional_extras_add_their_files(shapes, tmp_path):
    pytest.importorskip("tensorboard", reason="writes TensorBoard events only where tensorboard is installed")
    pytest.importorskip("matplotlib", reason="draws distributions.png only where matplotlib is installed")
    succeed("daw.py", *QUICK, "--iterations", "4", "--log-every", "2", "--data-root", shapes, "--output", tmp_path, "--tensorboard")
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert (tmp_path / "distributions.png").read_bytes().startswith(b"\x89PNG")


def test_tables_and_benchmarks_print(trained, tmp_path):
    for seed, miou, iteration in ((0, 40.0, 9), (1, 44.0, 9), (2, 10.0, 5)):  # the third has not finished
        folder = tmp_path / "method" / f"seed{seed}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"iterations": 9}))
        last = {"iteration": iteration, "miou": miou, "head_miou": 50.0, "tail_miou": None, "ece": 0.05,
                "iou": {"sky": miou + 1, "sea": None}}
        (folder / "results.json").write_text(json.dumps({"last": last, "best": last}))
    row = succeed("-m", "common.results", tmp_path).splitlines()[2]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["method", "2", "42.0 ± 2.8", "50.0 ± 0.0", "-", "5.0 ± 0.0"]
    header, _, row = succeed("-m", "common.results", tmp_path, "--per-class").splitlines()
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, row)] == \
        [["run", "seeds", "sky", "sea"], ["method", "2", "43.0 ± 2.8", "-"]]
    assert "no results" in refuse("-m", "common.results", tmp_path / "nowhere")
    out = succeed("-m", "common.benchmark", "step", "--backbone", "tiny", "--crop", "32", "--batch", "2", "--rounds", "1")
    assert "peak memory" in out
    out = succeed("-m", "common.benchmark", "strategies", "--backbone", "tiny", "--crop", "32", "--batch", "2", "--rounds", "1")
    assert "uniform" in out and out.count("GiB") == 2
    out = succeed("-m", "common.benchmark", "sampling", "--backbone", "tiny", "--crop", "32", "--rounds", "1")
    assert "one denoising call" in out and "of its multiplications" in out and out.count("steps ") == 5
    out = succeed("-m", "common.benchmark", "kmeans", "--points", "600", "--reference-points", "300", "--clusters", "7", "--channels", "8")
    assert "300 points of 8 channels into 7 clusters of 42 to 43" in out and "600 points of 8 channels into 7 clusters of 85 to 86" in out
    assert "peak memory" in out
    assert "crop 513" in succeed("-m", "common.benchmark", "loader", "--rounds", "1")
