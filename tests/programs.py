"""Running the programs as users do, for the tests that need it."""

import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def start(*arguments, torchrun: int = 0, **options) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}"]
    command = [sys.executable, *(launcher if torchrun else ()), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **options)


def run(*arguments, torchrun: int = 0) -> subprocess.CompletedProcess:
    process = start(*arguments, torchrun=torchrun)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def succeed(*arguments, torchrun: int = 0) -> str:
    done = run(*arguments, torchrun=torchrun)
    assert done.returncode == 0, done.stderr
    return done.stdout


def interrupt(number: int, ready, *arguments) -> tuple[int, str, str]:
    """Start the program; when `ready()`, the signal for its process group: (status, out, err)."""
    process = start(*arguments, start_new_session=True)
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
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


def state(folder: Path) -> dict:
    return torch.load(folder / "latest.pt", weights_only=True)


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
