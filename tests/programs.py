"""Running the programs as users do, and what their runs leave, for the tests that need it."""

import contextlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import runtime
from common.data import load_data
from common.evaluate import data_options, evaluate, load_predictor

ROOT = Path(__file__).resolve().parent.parent
QUICK = ("--batch-size 2 --crop 32 --iterations 4 --eval-every 4 --save-every 2 --log-every 1 "
         "--num-workers 0 --device cpu").split()


def start(*arguments, torchrun: int = 0, **options) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    launcher = ["-m", "torch.distributed.run", "--rdzv-backend=c10d", f"--rdzv-id={120 * 'x'}",
                "--rdzv-endpoint=localhost:0", f"--nproc_per_node={torchrun}"]
    command = [sys.executable, *(launcher if torchrun else ()), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **options)


def run(*arguments, torchrun: int = 0) -> subprocess.CompletedProcess:
    process = start(*arguments, torchrun=torchrun)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def interrupt(number: int, ready, *arguments) -> tuple[int, str, str]:
    """Start the program; when `ready()`, the signal for it and all that it has started, as from a
    scheduler: (status, out, err)."""
    process = start(*arguments, start_new_session=True)
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in map(int, children):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def run_as_program(script: str, monkeypatch, capfd, *arguments) -> tuple[int, str, str]:
    """As `python SCRIPT` runs it, but in this process: (exit status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return (caught.value.code or 0, *capfd.readouterr())


def refuse(script: str, monkeypatch, capfd, *arguments) -> str:
    """The one line with which the script refuses these arguments."""
    status, _, err = run_as_program(script, monkeypatch, capfd, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 1 and len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def stop_at(step: int, folder: Path, program, *arguments) -> None:
    """Run the program in this process; in that step of the run in `folder` it gets a SIGTERM."""
    def step_and_signal(log, number, terms, *more):
        if number == step and log.folder == folder:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(log, number, terms, *more)

    original = runtime.Log.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime.Log, "step", step_and_signal)
        status, *_ = program(*arguments)
    assert status == 128 + signal.SIGTERM and state(folder)["iteration"] == step


def in_processes(function, arguments: list[tuple], timeout: float = 100) -> None:
    """Call it in a forked process for each of these arguments; all of them end well."""
    fork = multiprocessing.get_context("fork")  # spawning would import torch again
    processes = [fork.Process(target=function, args=given) for given in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * len(processes)


def on_ranks(work, folder: Path, ranks: int = 2, timeout: float = 100) -> list:
    """What `work(rank)` returns in each of the forked processes of one gloo group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def enter(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.cuda.is_available = lambda: False  # CUDA does not survive a fork
        assert runtime.init_distributed("cpu") == (rank, ranks, torch.device("cpu"))
        torch.save(work(rank), folder / f"rank_{rank}.pt")

    in_processes(enter, [(rank,) for rank in range(ranks)], timeout)
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(ranks)]


def error_of(function, *arguments, **options) -> str:
    """The one line of the UserError that the call raises."""
    with pytest.raises(runtime.UserError) as caught:
        function(*arguments, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def recorded(monkeypatch, where, name: str) -> list[tuple]:
    """The arguments of every call of where.name from here on, which does what it did."""
    def note(*arguments, **options):
        calls.append((*arguments, *options.values()))
        return function(*arguments, **options)

    calls, function = [], getattr(where, name)
    monkeypatch.setattr(where, name, note)
    return calls


def state(folder: Path, name: str = "latest.pt") -> dict:
    return torch.load(folder / name, weights_only=True)


def ranks_draw_apart(folder: Path) -> bool:
    """Two ranks' random states differ, as their seeds did."""
    first, second = (cpu for cpu, *_ in state(folder)["rng"])
    return not torch.equal(first, second)


def log_of(folder: Path) -> list[dict]:
    """metrics.jsonl without the speed, which is never the same twice."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line.pop("images_per_second") > 0 for line in lines if "loss" in line)
    return lines


def lines_of(folder: Path) -> list[dict]:
    """The training's lines."""
    return [line for line in log_of(folder) if "loss" in line]


def picture(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def ids(root: Path, name: str = "train") -> list[str]:
    """VOC's list of that name."""
    return (root / "ImageSets" / "Segmentation" / f"{name}.txt").read_text().split()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_labels(seed: int, *shape: int, classes: int = 4, ignored: float = 0.0) -> torch.Tensor:
    labels = torch.randint(classes, shape, generator=seeded(seed))
    return torch.where(torch.rand(shape, generator=seeded(seed + 1)) < ignored, 255, labels)


def pasted(values: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """CutMix by loops: inside its boxes an image has the values of the one before it."""
    mixed = values.clone()
    for b, row, column in boxes.nonzero().tolist():
        mixed[b, ..., row, column] = values[b - 1, ..., row, column]
    return mixed


def sum_of_losses(logits: torch.Tensor, label: torch.Tensor, weight: torch.Tensor):
    """Weight x cross entropy, pixel by pixel."""
    total = 0
    for b, row, column in weight.nonzero().tolist():
        log_probs = logits[b, :, row, column].log_softmax(dim=0)
        total = total - weight[b, row, column] * log_probs[label[b, row, column].long()]
    return total


def are_hard(logits: torch.Tensor, label: torch.Tensor, threshold: float) -> torch.Tensor:
    """Where OHEM's loss is: on labeled pixels whose class has at most this probability."""
    own = logits.softmax(dim=1).gather(1, label.long().clamp(max=logits.shape[1] - 1)[:, None])
    hard = (label != 255) & (own[:, 0] <= threshold)
    assert 0.2 * hard.numel() < hard.sum() < (label != 255).sum()  # more than its least share
    return hard


def assert_same_run(folder: Path, other: Path) -> None:
    """What two runs leave is equal bit for bit, but for their options and speed."""
    for name in ("latest.pt", "best.pt"):
        assert_identical(*({**state(of, name), "config": None} for of in (folder, other)))
    assert log_of(folder) == log_of(other)
    assert (folder / "results.json").read_text() == (other / "results.json").read_text()


def assert_scored_as_in_training(folder: Path) -> None:
    """What its checkpoint gives back predicts what the training's last evaluation noted."""
    network, config, _ = load_predictor(folder / "latest.pt", "cpu")
    data = load_data(data_options(config))
    again = evaluate(network, data, "val", config["crop"], torch.device("cpu"), num_workers=0)
    last = runtime.read_json(folder / "results.json")["last"]
    assert again["confusion"] == last["confusion"] and last["images"] == len(data.val) > 0


def assert_near(ours: torch.Tensor, theirs: torch.Tensor, rel: float = 1e-5) -> None:
    """The difference is short beside `theirs`: sums in another order differ by a part of that."""
    difference = torch.linalg.vector_norm(ours.double() - theirs.double())
    assert difference <= rel * torch.linalg.vector_norm(theirs.double())


def assert_identical(left, right, path="checkpoint") -> None:
    """Equal in every number, and in every tensor bit for bit (nan equals nan)."""
    if isinstance(left, torch.Tensor):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True, msg=path)
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_identical(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, (list, tuple)):
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_identical(a, b, f"{path}[{index}]")
    else:
        assert left == right, path
