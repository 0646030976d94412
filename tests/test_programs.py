"""The programs as users run them: plain, under torchrun, stopped, killed, and with bad input.

A process costs seconds before its first step: where nobody kills it, a program runs in this one.
"""

import signal
from pathlib import Path

import pytest

from common import augment
from common.data import DATASETS
from common.runtime import read_json, run_main
from conftest import write_voc
from programs import (QUICK, assert_same_run, interrupt, log_of, ranks_draw_apart, recorded, refuse,
                      run, run_as_program, start, state, stop_at)

STEPS = 12


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """3 labeled images, 6 without labels and 5 for validation, which two ranks cannot halve."""
    root = write_voc(tmp_path_factory.mktemp("data") / "VOC2012")
    names = (root / "ImageSets" / "Segmentation" / "train.txt").read_text().splitlines()
    (root / "labeled.txt").write_text("\n".join(names[:3]))
    return root


def options(root: Path, output: Path) -> list:
    return ["--dataset", "pascal", "--data-root", root, "--labeled-list", root / "labeled.txt",
            "--unlabeled-list", root / "ImageSets" / "Segmentation" / "train.txt", "--backbone",
            "tiny", *QUICK, "--crop", "33", "--iterations", STEPS, "--eval-every", "6",
            "--num-workers", "1", "--output", output]


@pytest.fixture
def here(monkeypatch, capfd):
    """Run a script to its end in this process: what it printed."""
    def run_here(script: str, *arguments) -> str:
        status, out, err = run_as_program(script, monkeypatch, capfd, *arguments)
        assert status == 0, err
        return out

    return run_here


def stop_at_next(file: Path, number: int, command: list) -> tuple[int, str, str]:
    """Start the program and send the signal as soon as the file is written (again)."""
    def written() -> int:
        return file.stat().st_mtime_ns if file.exists() and file.stat().st_size else 0

    before = written()
    return interrupt(number, lambda: written() > before, *command)


def test_sigterm_and_sigkill_leave_a_run_that_goes_on_bit_for_bit(pictures, tmp_path, here):
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    out = here("daw.py", *options(pictures, whole))
    assert f"iteration {STEPS}: miou" in out
    names = {path.name for path in whole.iterdir()}
    assert {"config.json", "metrics.jsonl", "results.json", "latest.pt", "best.pt"} < names
    assert read_json(whole / "results.json")["last"]["images"] == 5

    command = ["daw.py", *options(pictures, folder)]
    status, out, err = stop_at_next(folder / "metrics.jsonl", signal.SIGTERM, command)
    assert status == 128 + signal.SIGTERM and "Traceback" not in err, err
    first = state(folder)["iteration"]
    assert out.splitlines()[-1].startswith(f"stopped by SIGTERM; saved iteration {first}: ")
    assert stop_at_next(folder / "latest.pt", signal.SIGKILL, command)[0] == -signal.SIGKILL
    killed_at = state(folder)["iteration"]
    assert 0 < killed_at < STEPS
    assert f"at iteration {killed_at}\n" in here(*command)

    assert_same_run(folder, whole)

    saved = (folder / "latest.pt").stat().st_mtime_ns
    here(*command)  # a finished run is not trained again
    assert (folder / "latest.pt").stat().st_mtime_ns == saved


def test_two_ranks_train_and_evaluate_every_image_once(pictures, tmp_path, here):
    folder = tmp_path / "run"
    done = run("daw.py", *options(pictures, folder), torchrun=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("iteration 12: miou") == 1 and ranks_draw_apart(folder)
    lines = [line["iteration"] for line in log_of(folder)]
    assert lines == sorted([*range(1, STEPS + 1), 6, STEPS])  # of one rank
    best = read_json(folder / "results.json")["best"]
    here("common/evaluate.py", "--checkpoint", folder / "best.pt", "--data-root", pictures,
         "--output", tmp_path / "alone.json", "--device", "cpu", "--num-workers", "0")
    alone = read_json(tmp_path / "alone.json")
    assert alone["images"] == best["images"] == 5 and alone["confusion"] == best["confusion"]
    assert alone["ece"] == pytest.approx(best["ece"], rel=1e-6)


def test_the_last_line_of_torchrun_is_ours(tmp_path):
    done = run("daw.py", "--dataset", "pascal", "--data-root", tmp_path / "nowhere", torchrun=2)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("error: no ImageSets/Segmentation/train")
    assert done.stderr.count("error: no ImageSets") == 1


@pytest.mark.parametrize("script", ["daw.py", "pos_meo.py", "diffmatch.py", "usrn.py"])
def test_options_arrive(script, shapes, tmp_path, monkeypatch, capfd):
    """In the optimizer after half of the schedule, in the strong views, in the evaluation."""
    augmented = recorded(monkeypatch, augment, "strong_augment")
    draws = recorded(monkeypatch, augment.np.random, "default_rng")
    more = "--seed 3 --lr 0.02 --head-lr-multiplier 5 --weight-decay 0.001 --photometry 0.5"
    program = (script, monkeypatch, capfd, *QUICK, "--data-root", shapes, *more.split(),
               "--eval-split", "tune", "--output")
    stop_at(2, tmp_path / "run", run_as_program, *program, tmp_path / "run")
    groups = state(tmp_path / "run")["optimizer"]["param_groups"]
    rates = [group["lr"] for group in groups[:2]]
    assert rates == pytest.approx([rate * (1 - 2 / 4) ** 0.9 for rate in (0.02, 5 * 0.02)])
    assert {(group["momentum"], group["weight_decay"]) for group in groups} == {(0.9, 0.001)}
    assert run_as_program(*program, tmp_path / "run")[0] == 0
    last = read_json(tmp_path / "run" / "results.json")["last"]
    assert last["images"] == 3  # where the val list has four
    assert script != "usrn.py" or state(tmp_path / "run" / "supervised")["iteration"] == 1
    photometry = DATASETS["shapes"].photometry.scaled(0.5)
    assert {given for _, given in augmented} == {photometry}
    assert {seed for ((seed, *_),) in draws} == {3}
    assert "no.pth" in refuse(*program, tmp_path / "none", "--weights", "no.pth")
    assert not (tmp_path / "none").exists()


def test_bad_input_gives_one_line(pictures, tmp_path, monkeypatch, capfd):
    program = ("daw.py", monkeypatch, capfd, *options(pictures, tmp_path / "run"))
    assert "--strong-labeled needs --supervised" in refuse(*program, "--strong-labeled")
    line = refuse(*program, "--lr", "1e18", "--iterations", "99")
    assert "not finite" in line and "--lr" in line
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_damaged_picture_is_named_by_the_worker_that_meets_it(tmp_path, monkeypatch, capfd):
    root = write_voc(tmp_path / "VOC2012")
    (root / "labeled.txt").write_text("2007_000001")
    picture = root / "JPEGImages" / "2007_000002.jpg"
    picture.write_bytes(picture.read_bytes()[:300])
    line = refuse("daw.py", monkeypatch, capfd, *options(root, tmp_path / "run"))
    assert line.startswith(f"error: cannot read {picture}: ")


def test_tensorboard_events(pictures, tmp_path, here):
    pytest.importorskip("tensorboard", reason="--tensorboard needs the package tensorboard")
    here("daw.py", *options(pictures, tmp_path), "--iterations", "1", "--tensorboard")
    (events,) = (tmp_path / "tensorboard").glob("events*")
    assert b"loss" in events.read_bytes() and b"miou" in events.read_bytes()


def test_a_reader_that_has_enough_is_no_error(pictures):
    process = start("-m", "common.data", "check", *options(pictures, "unused")[:8], bufsize=1)
    process.stdout.close()
    assert process.wait(timeout=120) == 128 + signal.SIGPIPE and process.stderr.read() == ""


def test_another_broken_pipe_is_one(capsys):
    with pytest.raises(BrokenPipeError):
        run_main(lambda: exec("raise BrokenPipeError"))
