"""Running the programs as users do, for the tests that need it."""

import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def start(*arguments, torchrun: int = 0, **options) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={torchrun}", "--standalone"] if torchrun else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *launcher, *map(str, arguments)], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def kill_after_first_checkpoint(folder: Path, *command) -> dict:
    """Start the program, kill -9 its process group once `folder` holds latest.pt; returns that checkpoint."""
    process = start(*command, start_new_session=True)
    while not (folder / "latest.pt").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return state(folder)


def run(*arguments, torchrun: int = 0) -> subprocess.CompletedProcess:
    process = start(*arguments, torchrun=torchrun)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def succeed(*arguments, torchrun: int = 0) -> str:
    done = run(*arguments, torchrun=torchrun)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_as_program(script: str, monkeypatch, capfd, *arguments) -> tuple[int, str, str]:
    """The script as `python SCRIPT` runs it, but in this process: (exit status, stdout, stderr)."""
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


def assert_identical(left, right, path="checkpoint"):
    """Equal in every tensor, bit for bit (nan equals nan), and in every number."""
    if isinstance(left, torch.Tensor):
        bits = (tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor for tensor in (left, right))
        assert torch.equal(*bits), path
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_identical(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, (list, tuple)):
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_identical(a, b, f"{path}[{index}]")
    else:
        assert left == right, path
