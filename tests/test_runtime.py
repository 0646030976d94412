"""common/runtime.py in one process and in two forked ranks; test_programs.py runs the programs."""

import errno
import fcntl
import math
import os
import resource
import signal
import socket
import sys
import time
from dataclasses import asdict, fields, replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn

from common import runtime
from common.runtime import (Checkpoint, Log, Milestones, StopSignal, UserError, parse,
                            read_checkpoint, write_atomically)
from daw import Config
from programs import assert_same_run, error_of, in_processes, log_of, on_ranks, state


def status_of(function, *arguments) -> int | None:
    """The status with which the call ends the process."""
    with pytest.raises(SystemExit) as caught:
        function(*arguments)
    return caught.value.code


# ---------------------------------------------------------------- options


def test_flags_have_the_types_of_their_fields():
    flags = "--lr 1e-3 --crop 33 --no-align --weighting none --amp --eval-split tune --output 92"
    config = parse(Config, argv=flags.split())
    expected = Config(lr=0.001, crop=33, align=False, weighting="none", amp=True, output="92",
                      eval_split="tune")
    assert config == expected and type(config.crop) is int and type(config.amp) is bool
    assert parse(Config, argv=[]) == Config()
    assert parse(Config, argv="--ohem 0 --photometry 1 --crop 16".split()).crop == 16
    filled = runtime.with_defaults(config, crop=48, amp=False, device="cpu", of_another_method=1)
    assert filled == replace(expected, device="cpu") and config == expected


@pytest.mark.parametrize("arguments, named", [
    ("--weighting all", "--weighting"), ("--crop 1.5", "--crop"), ("--cro 3", "--cro"),
    ("--no-such-flag", "--no-such-flag"), ("word", "word"), ("--lr", "--lr"), ("--lr nan", "--lr"),
    ("--crop 15", "--crop must be >= 16, not 15"), ("--lr 0", "--lr must be > 0"),
    ("--lr inf", "--lr must not be inf"), (f"--seed {2**63}", "--seed must not be 9"),
    ("--output=", "--output must not be empty"),
    ("--ohem 1", "--ohem must be < 1"), ("--photometry 2", "--photometry must be <= 1"),
    ("--save-every 0", "--save-every"), ("--num-workers -1", "--num-workers")])
def test_options_that_no_run_could_use(arguments, named):
    assert named in error_of(parse, Config, argv=arguments.split())


def test_help_shows_every_field(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert status_of(parse, Config, "the method, 100 %", ["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "the method, 100 %" in text
    assert "{none,fixed,power,daw} f(p) of Table 1; daw: a step at t* (daw)" in text
    for field in fields(Config):
        assert f" --{field.name.replace('_', '-')}" in text and field.metadata["help"] in text


def test_a_user_error_is_one_line_and_status_1(capsys, monkeypatch):
    def fail():
        raise UserError("Caught UserError in DataLoader worker process 0.\nTraceback (most recent "
                        "call last):\n  ...\ncommon.runtime.UserError: cannot read a.jpg\n")

    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert status_of(runtime.run_main, fail) == 1
    assert capsys.readouterr().err == "error: cannot read a.jpg\n"
    assert [status_of(runtime.run_main, lambda: status) for status in (None, 0, 3)] == [None, 0, 3]
    with pytest.raises(ZeroDivisionError):  # a mistake of ours keeps its traceback
        runtime.run_main(lambda: 1 / 0)


def test_what_pytorch_raises_for_the_users_machine_is_explained(capsys, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert status_of(runtime.run_main, lambda: torch.empty(2**60, dtype=torch.uint8)) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: out of memory") and "--batch-size" in line

    class InvalidCxxCompiler(RuntimeError):
        __module__ = "torch._inductor.exc"

    error = InvalidCxxCompiler("No working C++ compiler found\nand sixty lines more")
    assert status_of(runtime.run_main, mock.Mock(side_effect=error)) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: --compile failed") and line.endswith("compiler found\n")
    assert status_of(runtime.run_main, lambda: torch.nn.BatchNorm2d(3)(torch.ones(1, 3, 1, 1))) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: batch norm needs two images a rank") and "--batch-size" in line


# ---------------------------------------------------------------- ranks


def test_one_process_is_a_group_of_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert runtime.init_distributed() == (0, 1, torch.device("cpu"))
    assert "--device cpu" in error_of(runtime.init_distributed, "cuda")
    for name in ("gpu", "cuda:x", "cuda:"):
        assert f"'{name}'" in error_of(runtime.init_distributed, name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "cuda:2: 2 GPUs" in error_of(runtime.init_distributed, "cuda:2")
    monkeypatch.setenv("RANK", "0")  # each rank would take the same GPU
    assert "cuda:1 is one GPU" in error_of(runtime.init_distributed, "cuda:1")
    assert runtime.cutmix_partner(torch.tensor([7, 8, 9])).tolist() == [9, 7, 8]
    assert runtime.cutmix_partner(torch.tensor([7])).tolist() == [7]
    assert runtime.mean_over_ranks(torch.tensor(3)) == 3


def test_a_rank_has_the_gpu_of_its_number_on_its_node(monkeypatch):
    chosen, matmul, cudnn = [], SimpleNamespace(), SimpleNamespace()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert runtime.init_distributed("cuda")[2] == torch.device("cuda:1") and chosen == ["cuda:1"]
    assert matmul.allow_tf32 and cudnn.allow_tf32 and cudnn.benchmark


def test_two_ranks_share_a_batch(tmp_path):
    known = torch.tensor([5, 2])

    def work(rank: int):
        norm = nn.BatchNorm1d(2)
        norm.running_mean += 3 * rank + 1
        norm.weight.data += rank
        norm.num_batches_tracked += 4
        runtime.average_buffers(norm)
        count = known[rank].clone()
        mean, least = runtime.mean_over_ranks(count), runtime.mean_over_ranks(torch.tensor(0))
        total = runtime.all_reduce_sum(torch.tensor([1.0, rank]))
        assert (count, mean, least, total.tolist()) == (known[rank], 3.5, 1, [2, 1])
        return norm.state_dict()

    for rank, norm in enumerate(on_ranks(work, tmp_path)):
        assert norm["running_mean"].tolist() == [2.5, 2.5] and norm["num_batches_tracked"] == 4
        assert norm["weight"].tolist() == [1 + rank] * 2  # parameters are DDP's


@pytest.mark.parametrize("ranks", [2, 3])
def test_neighbour_in_the_global_batch(tmp_path, ranks):
    images = torch.arange(6 * 3 * 2 * 2).view(6, 3, 2, 2)
    batches = [images > 35, images.byte(), images,  # masks, pictures, labels, normalised
               images.float().to(memory_format=torch.channels_last)]

    def work(rank: int):
        return [runtime.cutmix_partner(batch.tensor_split(ranks)[rank]) for batch in batches]

    for batch, *partners in zip(batches, *on_ranks(work, tmp_path, ranks)):
        assert torch.equal(torch.cat(partners), batch[[5, 0, 1, 2, 3, 4]])


def test_ranks_wait_for_the_first_and_stop_together(tmp_path):
    def work(rank: int):
        os.environ["LOCAL_RANK"] = "001"[rank]  # of two nodes
        with runtime.main_first(), open(tmp_path / "order", "a") as file:
            time.sleep(0.2 * (2 - rank))
            file.write(str(rank))
        for fails in (2, 1, 0):  # none is left waiting, and one alone says why
            with pytest.raises(SystemExit if rank != fails else UserError), runtime.main_first():
                runtime.require(rank != fails, "no data")
        stop = StopSignal()
        for step in range(1, 41):
            if (rank, step) == (1, 13):
                os.kill(os.getpid(), signal.SIGTERM)
            if number := stop.requested(step):
                break
        return (tmp_path / "order").read_text(), step, status_of(stop.leave, step, number)

    assert on_ranks(work, tmp_path, ranks=3) == [("012", 20, 143)] * 3


def test_ranks_wait_before_they_fork(tmp_path):
    def work(rank: int) -> float:
        start = time.monotonic()
        os.waitpid(os.fork() or os._exit(0), 0)
        return time.monotonic() - start

    assert min(on_ranks(work, tmp_path)) > 0.05 * (sys.version_info < (3, 12))


def test_ranks_log_one_mean_and_save_each_random_state(tmp_path):
    def work(rank: int):
        run = Run(tmp_path / "run", log_every=2)
        torch.manual_seed(rank)
        for step in (1, 2):
            loss = torch.tensor(4.0 * rank + step)
            of_one = torch.tensor(math.nan if rank else step)  # the other has nothing to count
            means = run.log.step(step, {"loss": loss, "of_one": of_one})
        run.model[1].running_mean += rank
        run.checkpoint.save(2)
        expected = torch.rand(4)
        return means, Run(tmp_path / "run").first, torch.equal(torch.rand(4), expected)

    means = {"loss": 3.5, "of_one": 1.5}  # of 1, 2, 5, 6; of 1, 2
    assert on_ranks(work, tmp_path) == [(means, 2, True)] * 2
    assert log_of(tmp_path / "run") == [{"iteration": 2, **means}]  # by the first rank
    assert state(tmp_path / "run")["model"]["1.running_mean"].tolist() == [0.5] * 4


def test_a_signal_in_one_process(capsys, monkeypatch):
    stop = StopSignal()
    assert not stop.requested(1)
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)  # the launcher passes its own on
    assert status_of(stop.leave, 2, stop.requested(2)) == 130
    assert "SIGINT; saved iteration 2" in capsys.readouterr().out
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 6)
    assert status_of(os.kill, os.getpid(), signal.SIGTERM) == 143  # at once
    assert status_of(stop.at_once, 3) == 130  # before an evaluation


def test_a_signal_during_an_evaluation_after_it_and_at_the_end(tmp_path, capsys):
    def signalled() -> dict:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    run = Run(tmp_path)
    run.scores = signalled
    assert status_of(run.train) == 143 and "saved iteration 10" in capsys.readouterr().out
    run = Run(tmp_path).train(until=12)
    os.kill(os.getpid(), signal.SIGTERM)
    assert run.milestones.stop.requested(12)  # and has not left: two steps are not saved
    for _ in range(2):  # what follows the last step, and where there was none to do
        run = Run(tmp_path).train()
        assert status_of(os.kill, os.getpid(), signal.SIGTERM) == 143
        assert "saved iteration 20" in capsys.readouterr().out


def test_ema_equals_its_closed_form():
    """Step k enters with weight (1 - d_k) d_(k+1) ... d_n."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    model[1].tied = model[0].weight
    ema, states = runtime.make_ema(model), []
    decays = [min(1 - 1 / step, 0.6) for step in range(1, 8)]
    for own in decays:
        model(torch.randn(5, 3, dtype=torch.float64))  # running statistics
        for parameter in model.parameters():
            parameter.data.normal_()
        runtime.update_ema(ema, model, own)
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    weights = [(1 - own) * math.prod(decays[k + 1 :]) for k, own in enumerate(decays)]
    for name, value in ema.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert value.dtype == torch.int64 and value == 7  # a counter is copied
            continue
        expected = sum(weight * state[name] for weight, state in zip(weights, states))
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    assert not ema.training and model.training and model[0].weight.requires_grad
    assert not any(parameter.requires_grad for parameter in ema.parameters())


# ---------------------------------------------------------------- files


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "runs" / ("f" * 252 + ".pt")  # the longest name that there may be
    write_atomically(path, lambda temporary: torch.save("old", temporary))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # fails like a full disk
    try:
        for write in (lambda temporary: torch.save(torch.zeros(99_999), temporary),
                      lambda temporary: temporary.write_bytes(bytes(200_000))):
            assert f"cannot write {path}: " in error_of(write_atomically, path, write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(ZeroDivisionError):  # half written
        write_atomically(path, lambda temporary: temporary.write_text("new") / 0)
    assert torch.load(path) == "old" and os.listdir(path.parent) == [path.name]
    with open(path, "rb") as reader:  # one who reads keeps the old file, whole
        write_atomically(path, lambda temporary: torch.save("new", temporary))
        assert torch.load(reader) == "old" and torch.load(path) == "new"
    assert "a.json" in error_of(runtime.write_json, path / "a.json", {})  # a file is no folder


def test_damaged_and_foreign_checkpoints(tmp_path):
    path = tmp_path / "file.pt"
    assert str(path) in error_of(read_checkpoint, path)  # missing
    for content in (b"", b"no checkpoint"):
        path.write_bytes(content)
        assert str(path) in error_of(read_checkpoint, path)
    for content in (b"\n<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\noid x"):
        path.write_bytes(content)
        assert "web page or a pointer of Git LFS" in error_of(read_checkpoint, path)
    program = {"format": runtime.FORMAT, "model": path}  # unpickling an object runs its code
    for content in ({"state_dict": {}}, [1], {"format": 1}, program):
        torch.save(content, path)
        line = error_of(read_checkpoint, path)
        assert str(path) in line and "weights_only" not in line  # PyTorch advises to trust it


def test_a_line_is_said_where_the_launcher_cannot_be_watched(monkeypatch, capfd):
    forbidden = mock.Mock(side_effect=PermissionError)  # as by a container's rules
    monkeypatch.setattr(os, "pidfd_open", forbidden)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # alone it is left over in a shell
    for started in (False, True):
        runtime.complain("error: no list")
        assert capfd.readouterr().err == "error: no list\n" and forbidden.called == started
        monkeypatch.setenv("RANK", "0")


def test_reading_names_the_file_and_the_reason():
    def read(error: Exception) -> None:
        with runtime.reading("a.png"):
            raise error

    assert error_of(read, ValueError("bad\nof 8 bytes")) == "cannot read a.png: bad"
    assert error_of(read, EOFError()) == "cannot read a.png: EOFError"
    assert error_of(read, UserError("label 7 of b.png")) == "label 7 of b.png"  # says it better
    with pytest.raises(NameError):  # not the file's fault
        read(NameError("tensr"))


# ---------------------------------------------------------------- checkpoints and the log


class Run:
    """A small run as the methods have it: 20 steps, saved every 5, evaluated every 10."""

    def __init__(self, folder, method="daw", **options):
        self.config = Config(**{"output": str(folder), "lr": 0.1, "crop": 33, "save_every": 5,
                                "eval_every": 10, "log_every": 10,
                                "weights": f"{folder}.pth"} | options)
        torch.manual_seed(0)
        self.folder, self.model = folder, nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.ema = runtime.make_ema(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.schedule = torch.optim.lr_scheduler.PolynomialLR(self.optimizer, 20, power=0.9)
        state = {"model": self.model, "ema": self.ema, "optimizer": self.optimizer,
                 "schedule": self.schedule}
        config = {**asdict(self.config), "iterations": 20}
        self.checkpoint = Checkpoint(folder, method, config, state)
        self.first = self.checkpoint.load()
        self.log = Log(self.checkpoint, self.first, 2)

    def train(self, until=20, evaluates=True) -> "Run":
        """Steps up to `until`; evaluates=False: killed between saving and evaluating."""
        self.milestones = Milestones(self.checkpoint, self.log, self.ema, self.scores)
        for step in range(self.first + 1, until + 1):
            loss = (self.model(torch.randn(6, 3)) - torch.randn(6, 4)).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            runtime.update_ema(self.ema, self.model, 0.9)
            self.log.step(step, {"loss": loss})
            if step == until and not evaluates:
                self.checkpoint.save(step)
            else:
                self.milestones.after(step)
        return self

    def scores(self) -> dict:
        return {"miou": float(self.ema[0].weight.sum().abs()), "iou": {"sky": None}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
    return Run(tmp_path_factory.mktemp("runs") / "whole").train()


@pytest.mark.parametrize("until, evaluates", [(4, True), (9, True), (10, False), (20, False)])
def test_a_killed_run_goes_on_bit_for_bit(until, evaluates, whole, tmp_path):
    Run(tmp_path / "run").train(until, evaluates)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 99}\n{"loss": 1}\n3\n{"iteration": 1')  # cut off by the kill
    (tmp_path / "run" / ".latest.pt.123.part").write_text("likewise")
    resumed = Run(tmp_path / "run", num_workers=3, eval_every=10).train()
    assert resumed.first == until // 5 * 5
    assert len(os.listdir(resumed.folder)) == 6
    assert_same_run(resumed.folder, whole.folder)
    assert [line["iteration"] for line in log_of(whole.folder)] == [10, 10, 20, 20]
    config = runtime.read_json(whole.folder / "config.json")
    assert config == {"method": "daw", **whole.checkpoint.config}
    assert state(whole.folder)["config"] == whole.checkpoint.config
    assert len(os.listdir(whole.folder)) == 6 and ".lock" in os.listdir(whole.folder)


@pytest.mark.parametrize("options, named", [
    ({"photometry": 0.2}, "--photometry 1"), ({"eval_split": "tune"}, "--eval-split val"),
    ({"crop": None}, "--crop 33"), ({"method": "usrn"}, "daw.py"),
    ({"lists": "0123abc"}, "lists have changed"), ({"weights": "none"}, "--weights"),
    ({"lr": 0.2}, "--lr 0.1")])  # the run is finished: nothing would be learned with it
def test_a_folder_with_another_run_is_refused(options, named, whole):
    before = {path.name: path.read_bytes() for path in whole.folder.iterdir()}
    line = error_of(Run, whole.folder, **options)
    assert named in line and str(whole.folder) in line and "--output" in line
    assert {path.name: path.read_bytes() for path in whole.folder.iterdir()} == before


def test_checkpoints_that_cannot_go_on_as_they_are(tmp_path, capsys):
    run = Run(tmp_path / "run").train(until=5)
    for values in (run.model[0].bias.data, run.model[1].running_var):
        kept = values.clone()
        values[1] = math.inf
        assert "not finite after iteration 6" in error_of(run.checkpoint.save, 6)
        values.copy_(kept)
    path, draws = run.folder / "latest.pt", []
    saved = read_checkpoint(path)
    torch.save({**saved, "rng": saved["rng"] * 4}, path)
    for noise in range(2):
        assert Run(run.folder).first == 5 and "4 ranks" in capsys.readouterr().out
        draws.append(torch.rand(2).tolist())
    assert draws[0] == draws[1]  # anew, by the seed
    for crafted in ({"model": 3}, {"config": []}, {"rng": [None]}, {"optimizer": {"state": 1}}):
        torch.save({**saved, **crafted}, path)
        assert f"cannot read {path}" in error_of(Run, run.folder)
    torch.save(saved, path)
    content = path.read_bytes()
    where = content.index(saved["model"]["0.weight"].numpy().tobytes())
    path.write_bytes(content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :])
    assert f"{path} is damaged" in error_of(Run, run.folder)
    path.write_bytes(content[:1000])
    assert str(path) in error_of(Run, run.folder)
    assert str(path / "run") in error_of(Run, path / "run")  # a folder that cannot be made


def test_a_run_that_diverged_goes_on_with_a_lower_learning_rate(tmp_path, capsys):
    Run(tmp_path / "run").train(until=5)
    lower = Run(tmp_path / "run", lr=0.05, amp=True, weights="moved/run.pth")
    assert lower.first == 5 and "--lr 0.1 becomes 0.05" in capsys.readouterr().out
    rates = []
    for _ in range(15):
        rates.append(lower.optimizer.param_groups[0]["lr"])
        lower.schedule.step()
    expected = [0.05 * (1 - step / 20) ** 0.9 for step in range(5, 20)]
    assert rates == pytest.approx(expected)


def test_two_runs_in_one_folder_are_refused(tmp_path, monkeypatch, capsys):
    folder = Run(tmp_path / "run").folder  # of a stage that is done, whose process lives

    def second() -> None:  # locks are between processes
        line = error_of(Run, folder)
        assert f"in use by process {os.getppid()} on {socket.gethostname()}" in line

    in_processes(second, [()])

    unsupported = mock.Mock(side_effect=OSError(errno.ENOSYS, "Function not implemented"))
    monkeypatch.setattr(fcntl, "lockf", unsupported)  # as on some network file systems
    assert Run(tmp_path / "other").first == 0 and "not implemented" in capsys.readouterr().out


def test_nodes_with_other_options_or_without_a_shared_folder_are_refused(tmp_path):
    def work(rank: int) -> str:
        run, weights = tmp_path / str(rank), f"node{rank}/run.pth"
        Run(run, weights=weights).train(until=5)
        return error_of(Run, run, seed=rank, log_every=4 + rank, weights=weights)

    for line in on_ranks(work, tmp_path):
        assert "differ in iteration, log_every, seed:" in line and "one folder" in line


def log_in(folder, start=0, every=2, tensorboard=False) -> Log:
    config = {"iterations": 10, "log_every": every, "eval_every": 4, "tensorboard": tensorboard}
    return Log(Checkpoint(folder, "daw", config, {}), start, 2)


def test_the_log_has_means(tmp_path, monkeypatch):
    log = log_in(tmp_path, every=4)
    rows = [{"loss": 1.0}, {"loss": 2.0, "used": 0.5}, {"loss": 3.0, "used": 1.0, "dice": math.nan},
            {"loss": 6.0}, *[{"loss": 1.0}] * 5, {"loss": 1.0, "loss_late": 2.0}]
    means = [log.step(step, {name: torch.tensor(value) for name, value in row.items()})
             for step, row in enumerate(rows, 1)]
    assert [step for step, line in enumerate(means, 1) if line] == [4, 8, 10]  # and the last one
    assert means[9] == {"loss": 1.0, "loss_late": 2.0}  # a part of the loss that begins late
    assert log_of(tmp_path)[0] == {"iteration": 4, "loss": 3.0, "used": 0.75, "dice": None}
    for bad in ({"loss": math.nan}, {"loss_sup": math.inf}):
        log, good = log_in(tmp_path), {"loss": torch.tensor(1.0), "loss_sup": torch.tensor(1.0)}
        log.step(1, {**good, **{name: torch.tensor(value) for name, value in bad.items()}})
        assert "the loss is not finite at iteration 2" in error_of(log.step, 2, good)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if not installed
    with pytest.raises(ModuleNotFoundError) as caught:
        log_in(tmp_path, tensorboard=True)
    assert "pip install tensorboard" in runtime.explain(caught.value)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    assert "metrics.jsonl" in error_of(log.append, 1, {"loss": 1.0})  # a full disk is one line


def test_a_run_says_that_its_loss_on_labels_multiplies(tmp_path, capsys):
    log = log_in(tmp_path)
    for step in range(2, 102, 2):  # noise of 60 % until 60
        if step == 82:  # a restart forgets nothing
            log = log_in(tmp_path, start=80)
        log.steps = step  # for the speed
        loss = 0.1 * (1 + 0.6 * (-1) ** (step // 2)) if step <= 60 else 0.6
        log.write(step, {"loss": 9.0, "loss_sup": loss})
    shown = capsys.readouterr().out.splitlines()
    warned = ["LOSS ON LABELS" in line for line in shown]
    assert warned == [step > 60 for step in range(10, 110, 10)]
    assert shown[-1].endswith("LOSS ON LABELS 0.60, WAS 0.09")


def test_results_hold_the_last_and_the_best(tmp_path, capsys):
    log = log_in(tmp_path)
    assert [step for step in range(11) if log.evaluation_is_due(step)] == [4, 8, 10]
    scores = {4: 50.0, 5: 70.0, 6: 60.0, 8: 70.0}
    best = []
    for step, score in scores.items():
        best.append(log.note_evaluation(step, {"miou": score}))
        log.write_evaluation()
    assert best == [True, True, False, False] and "best 70.00 at 5" in capsys.readouterr().out
    log.write_results(test={"dice": 1.0})
    assert runtime.read_json(tmp_path / "results.json") == {
        "method": "daw", "last": {"iteration": 8, "miou": 70.0},
        "best": {"iteration": 5, "miou": 70.0}, "test": {"dice": 1.0}}
    resumed = log_in(tmp_path, start=8)
    assert resumed.results["best"]["iteration"] == 5 and not resumed.evaluation_is_due(8)
    assert log_in(tmp_path, start=0).results["best"] is None  # another run in the same folder
    assert not (tmp_path / "results.json").exists()
    assert "no pixel" in error_of(log.note_evaluation, 9, {"miou": None})
