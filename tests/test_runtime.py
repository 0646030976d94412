"""common/options.py, common/runtime.py, common/files.py and common/run.py in one process; tests/test_programs.py runs the programs."""

import dataclasses
import json
import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import daw
from common import runtime
from common.data import DATASETS, Sample
from common.files import read_checkpoint, write_atomically, write_json
from common.options import RESUMABLE, TrainingOptions, fill_from_recipe, option, parse
from common.run import Run, open_tensorboard
from common.runtime import Context, UserError, WeightAverage, poly_lr

CPU = torch.device("cpu")
ALONE = Context(0, 1, CPU)


# ---------------------------------------------------------------- options


def test_options_have_the_types_of_their_fields():
    config = parse(daw.Config, ["--lr", "1e-3", "--crop", "33", "--labeled", "92", "--weighting", "power", "--supervised", "--no-align",
                                "--no-tf32", "--amp", "--eval-split", "tune", "--data-root", "a/b"])
    assert (config.lr, config.crop, config.labeled, config.weighting) == (0.001, 33, "92", "power")
    assert type(config.crop) is int and type(config.lr) is float
    assert (config.supervised, config.align, config.tf32, config.amp) == (True, False, False, True)
    assert (config.eval_split, config.data_root) == ("tune", "a/b")


def test_options_default_to_their_fields():
    assert parse(daw.Config, []) == daw.Config()
    config = parse(daw.Config, [], dataset="pascal", seed=3)  # a program's own defaults
    assert (config.dataset, config.seed, config.threshold) == ("pascal", 3, None)
    assert parse(daw.Config, ["--seed", "4"], seed=3).seed == 4
    assert {field.name for field in dataclasses.fields(TrainingOptions)} >= RESUMABLE


@pytest.mark.parametrize("arguments", [
    ["--weighting", "nonsense"], ["--eval-split", "train"], ["--crop", "1.5"], ["--lr", "fast"], ["--nonsense"], ["--cro", "3"],
    ["--supervised", "yes"], ["positional"], ["--crop"]])
def test_bad_options_exit_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(daw.Config, arguments)
    assert caught.value.code == 2 and "usage" in capsys.readouterr().err


def test_help_mentions_every_field(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(daw.Config, ["--help"], description="the description, 100 %")
    out = capsys.readouterr().out
    assert caught.value.code == 0 and "the description, 100 %" in out
    words = out.split()
    for field in dataclasses.fields(daw.Config):
        assert any(word.strip("[],") == "--" + field.name.replace("_", "-") for word in words), field.name
        assert field.metadata["help"].split()[0] in words
    assert "(default: 0.99)" in out and "none,fixed,power,daw" in out

    @dataclasses.dataclass
    class Percent(TrainingOptions):
        share: float = option(0.5, "share: 50 % (of all)")

    with pytest.raises(SystemExit) as caught:
        parse(Percent, ["--help"])
    assert caught.value.code == 0 and "share: 50 % (of all) (default: 0.5)" in capsys.readouterr().out


def lists(labeled=92, unlabeled=10490, dataset="pascal", tune=0):
    samples = [Sample("image.jpg", "mask.png")]
    return SimpleNamespace(info=DATASETS[dataset], labeled=samples * labeled, unlabeled=samples * unlabeled, val=samples, tune=samples * tune)


def test_the_recipe_fills_what_is_not_given():
    config = daw.Config(dataset="pascal")
    data = lists()
    fill_from_recipe(config, "daw", data, ALONE)
    assert (config.backbone, config.crop, config.batch_size, config.lr, config.head_lr_multiplier) == ("resnet101", 321, 8, 0.001, 10)
    assert config.iterations == 80 * 1311  # 10,490 // 8 steps an epoch
    assert (config.eval_every, config.save_every, config.labeled, config.epochs) == (1311, 1311, "92", None)
    assert config.output == "runs/daw_pascal_92_seed0"

    config = daw.Config(dataset="pascal", crop=513, batch_size=16, epochs=2, seed=5, save_every=100, backbone="resnet50", labeled_list="my/own.txt")
    fill_from_recipe(config, "daw", data, Context(3, 4, CPU))
    assert (config.crop, config.lr, config.iterations, config.backbone) == (513, pytest.approx(0.002), 2 * 655, "resnet50")
    assert (config.eval_every, config.save_every, config.output) == (655, 100, "runs/daw_pascal_own_seed5")
    assert DATASETS["pascal"].crop == 321

    for batch_size, lr in ((4, 0.0005), (8, 0.001), (64, 0.008)):
        config = daw.Config(batch_size=batch_size)
        fill_from_recipe(config, "daw", lists(), ALONE)
        assert config.lr == pytest.approx(lr)
    config = daw.Config(batch_size=16, lr=0.3, head_lr_multiplier=1.0, iterations=7)
    fill_from_recipe(config, "daw", lists(), ALONE)
    assert (config.lr, config.head_lr_multiplier, config.iterations) == (0.3, 1.0, 7)
    config = daw.Config()
    fill_from_recipe(config, "daw", lists(24, 100), ALONE)
    assert (config.eval_every, config.save_every) == (200, 200)  # an epoch of 12 steps is too short for an evaluation
    config = daw.Config(labeled="all", supervised=True, epochs=3)  # an epoch of the labeled images where there are no others
    fill_from_recipe(config, "daw", lists(40, 0), ALONE)
    assert config.iterations == 15


@pytest.mark.parametrize("options, ranks, says", [
    ({"batch_size": 6}, 4, "--batch-size 6"), ({"grad_accum": 3}, 1, "multiple of 3"), ({"batch_size": 8, "grad_accum": 4}, 4, "multiple of 16"),
    ({"crop": 0}, 1, "--crop"), ({"batch_size": 0}, 1, "--batch-size"), ({"grad_accum": 0}, 1, "--grad-accum"), ({"lr": 0.0}, 1, "--lr"),
    ({"lr": float("nan")}, 1, "--lr"), ({"iterations": 0}, 1, "--iterations"), ({"epochs": -1}, 1, "--epochs"), ({"log_every": 0}, 1, "--log-every"),
    ({"ema_decay": 1.0}, 1, "--ema-decay"), ({"seed": -1}, 1, "--seed"), ({"num_workers": -1}, 1, "--num-workers"),
    ({"eval_split": "tune"}, 1, "tune"), ({"batch_size": 4, "supervised": True}, 4, "batch norm")])
def test_options_that_no_run_could_use(options, ranks, says):
    with pytest.raises(UserError) as caught:
        fill_from_recipe(daw.Config(**options), "daw", lists(), Context(0, ranks, CPU), 1 if options.get("supervised") else 2)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    good = {"batch_size": 16, "grad_accum": 2, "eval_split": "tune"}
    fill_from_recipe(daw.Config(**good), "daw", lists(tune=1), Context(0, 4, CPU))


# ---------------------------------------------------------------- schedule, averages, small things


def test_poly_learning_rate():
    def check(optimizer, iteration):  # rates = the first ones x f with f = (1 - i/100)^0.9, so f^10 = (1 - i/100)^9
        poly_lr(optimizer, iteration, 100)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert [(rate / first) ** 10 for rate, first in zip(rates, (0.001, 0.01))] == pytest.approx([(1 - iteration / 100) ** 9] * 2, rel=1e-9)

    optimizer, resumed = (torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.001, 0.01)]) for _ in range(2))
    for iteration in (0, 1, 50, 99, 25, 100):
        check(optimizer, iteration)
    check(optimizer, 30)
    resumed.load_state_dict(optimizer.state_dict())  # saved in the middle: the first rates are in it
    check(resumed, 60)


def small_network(seed=0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


@pytest.mark.parametrize("decay", [0.6, 0.999])
def test_weight_average_equals_a_plain_loop(decay):
    network = small_network()
    average = WeightAverage(network, decay)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    plain = None
    for iteration in range(8):
        network(torch.randn(2, 3, 5, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        current = {name: value.double().clone() for name, value in network.state_dict().items()}
        average.update(iteration)
        m = min(iteration / (iteration + 1), decay)
        plain = current if plain is None else {name: m * plain[name] + (1 - m) * current[name] for name in current}
    states = average.model.state_dict()
    assert states.keys() == plain.keys() and any("running_var" in name for name in states)
    for name, value in states.items():
        if "num_batches" in name:  # a counter is copied
            assert value.dtype == torch.int64 and value == 8
        else:
            torch.testing.assert_close(value.double(), plain[name], rtol=1e-5, atol=1e-7)
    assert not average.model.training and network.training
    assert not any(parameter.requires_grad for parameter in average.model.parameters()) and all(p.requires_grad for p in network.parameters())

    other = WeightAverage(small_network(1), decay)
    other.load_state_dict(average.state_dict())
    other.update(8)  # still the arrays that it averages
    assert not torch.equal(other.model[0].weight, average.model[0].weight)
    m = min(8 / 9, decay)
    torch.testing.assert_close(other.model[0].weight, m * average.model[0].weight + (1 - m) * small_network(1)[0].weight)


def test_split_batch_and_the_neighbour_in_one_process():
    batch = {"labeled": torch.arange(24).view(4, 6), "valid": torch.arange(4) > 1}
    parts = runtime.split_batch(batch, 2, CPU)
    assert [part["labeled"].tolist() for part in parts] == [batch["labeled"][:2].tolist(), batch["labeled"][2:].tolist()]
    assert [part["valid"].tolist() for part in parts] == [[False, False], [True, True]]
    assert runtime.roll_global_batch(torch.arange(4)).tolist() == [3, 0, 1, 2]
    assert runtime.roll_global_batch(torch.arange(1)).tolist() == [0]
    value = torch.ones(2)
    assert runtime.all_reduce_sum(value) is value and runtime.world_size() == 1


def test_random_state_is_restored():
    torch.manual_seed(5)
    state = runtime.rng_state()
    expected = torch.rand(4)
    torch.rand(7)
    runtime.set_rng_state(state)
    assert torch.equal(torch.rand(4), expected)


def test_autocast_is_off_on_cpus_unless_asked_for():
    for amp, dtype in ((None, torch.float32), (False, torch.float32), (True, torch.bfloat16)):
        with runtime.autocast(daw.Config(amp=amp), CPU):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_a_user_error_is_one_line_and_status_1(capsys):
    def fail():
        raise UserError("Caught UserError in DataLoader worker process 0.\nTraceback (most recent call last):\n  ...\n"
                        "common.runtime.UserError: cannot read the image a.jpg\n")

    with pytest.raises(SystemExit) as caught:
        runtime.run_main(fail)
    assert caught.value.code == 1 and capsys.readouterr().err == "error: cannot read the image a.jpg\n"
    for status in (0, None):
        with pytest.raises(SystemExit) as caught:
            runtime.run_main(lambda: status)
        assert not caught.value.code
    with pytest.raises(ZeroDivisionError):  # a mistake of ours keeps its traceback
        runtime.run_main(lambda: 1 / 0)


def test_a_missing_gpu_is_a_user_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="--device cpu"):
        runtime.start("cuda")
    assert runtime.start() == runtime.start("cpu") == ALONE


# ---------------------------------------------------------------- files


def names_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    write_atomically(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary, error):
        temporary.write_text("half of the n")
        assert path.read_text() == "old"  # what others read meanwhile
        raise error

    with pytest.raises(UserError, match="file.txt"):
        write_atomically(path, lambda temporary: fail(temporary, OSError(28, "No space left on device")))
    for error in (KeyboardInterrupt(), ValueError("a mistake of ours")):
        with pytest.raises(type(error)):
            write_atomically(path, lambda temporary: fail(temporary, error))
    assert path.read_text() == "old" and names_in(tmp_path) == ["file.txt"]
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new" and names_in(tmp_path) == ["file.txt"]
    with pytest.raises(UserError, match="x.json"):
        write_json(path / "x.json", {})  # "file.txt" is no folder


def test_a_checkpoint_that_does_not_fit_the_disk_is_a_user_error(tmp_path):
    """torch.save reports a full disk as a RuntimeError, not as an OSError."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "latest.pt"
    write_atomically(path, lambda temporary: torch.save({"old": 1}, temporary))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # Python ignores SIGXFSZ: writing more fails like a full disk
    try:
        with pytest.raises(UserError, match="latest.pt"):
            write_atomically(path, lambda temporary: torch.save({"new": torch.zeros(200_000)}, temporary))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.load(path) == {"old": 1} and names_in(tmp_path) == ["latest.pt"]


class Trap:
    """Unpickled, it makes a file: what a checkpoint of a stranger could do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_damaged_and_foreign_checkpoints(tmp_path):
    for name, write in (("garbage.pt", lambda path: path.write_bytes(b"no checkpoint")), ("empty.pt", lambda path: path.write_bytes(b"")),
                        ("other.pt", lambda path: torch.save({"state_dict": {}}, path)), ("list.pt", lambda path: torch.save([1], path)),
                        ("code.pt", lambda path: torch.save({"format": 1, "trap": Trap(tmp_path / "sprung")}, path)), ("missing.pt", lambda path: None)):
        write(tmp_path / name)
        with pytest.raises(UserError) as caught:
            read_checkpoint(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()


# ---------------------------------------------------------------- runs


pytestmark = pytest.mark.usefixtures("keep_signal_handlers")


def config_for(folder, **options) -> daw.Config:
    return daw.Config(**{"output": str(folder / "run"), "iterations": 20, "log_every": 10, "save_every": 5, "eval_every": 10, "batch_size": 2,
                         "lr": 0.1, **options})


def make_run(config, seed=0, ema=True) -> Run:
    network = small_network(seed)
    state = {"model": network, "optimizer": torch.optim.SGD(network.parameters(), lr=config.lr, momentum=0.9),
             "statistics": daw.Statistics(2, 0.9)}
    if ema:
        state["ema"] = WeightAverage(network, 0.9)
    return Run("daw", config, ALONE, state)


def five_steps(folder) -> Run:
    """A new run up to its first checkpoint."""
    run = make_run(config_for(folder))
    run.begin()
    for iteration in range(5):
        take_step(run, iteration)
    return run


def take_step(run: Run, iteration: int, loss=None, **more) -> None:
    """As the methods' loops do it, with random numbers where they augment; `loss` overrides what is logged."""
    poly_lr(run.state["optimizer"], iteration, run.config.iterations)
    value = run.state["model"](torch.randn(2, 3, 4, 4)).square().mean()
    value.backward()
    run.state["optimizer"].step()
    run.state["optimizer"].zero_grad()
    run.state["statistics"].mean += torch.rand(2)
    run.state["ema"].update(iteration)
    run.log(iteration, {"loss": value if loss is None else torch.tensor(loss), "used": torch.tensor(0.5), **more})
    if run.should_evaluate(iteration):
        run.note_results(iteration, {"miou": 40.0 + iteration, "per_class": [1.0, None]})
    run.end_of_step(iteration)


def lines_of(run: Run) -> list[dict]:
    """metrics.jsonl without the speed, which is never the same twice."""
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line.pop("images_per_second") > 0 for line in lines if "loss" in line)
    return lines


def test_a_run_writes_its_folder(tmp_path):
    run = make_run(config_for(tmp_path))
    assert run.begin() == 0
    for iteration in range(20):
        take_step(run, iteration, loss=float(iteration))
    assert names_in(run.folder) == ["best.pt", "config.json", "latest.pt", "metrics.jsonl", "results.json"]
    assert json.loads((run.folder / "config.json").read_text()) == {"method": "daw", **dataclasses.asdict(run.config)}
    assert [line for line in lines_of(run) if "loss" in line] == [
        {"iteration": 10, "loss": 4.5, "used": 0.5}, {"iteration": 20, "loss": 14.5, "used": 0.5}]
    assert [line for line in lines_of(run) if "miou" in line] == [{"iteration": 10, "miou": 49.0}, {"iteration": 20, "miou": 59.0}]
    results = json.loads((run.folder / "results.json").read_text())
    assert results["last"] == results["best"] == {"iteration": 20, "miou": 59.0, "per_class": [1.0, None]}
    best = read_checkpoint(run.folder / "best.pt")
    assert best["iteration"] == 20 and best["method"] == "daw" and best["dataset"] == "shapes"
    assert all(torch.equal(value, run.state["ema"].model.state_dict()[name]) for name, value in best["model"].items())
    assert read_checkpoint(run.folder / "latest.pt")["iteration"] == 20


def test_best_is_kept_when_results_get_worse(tmp_path):
    run = make_run(config_for(tmp_path, eval_every=1))
    run.begin()
    for iteration, miou in ((0, 50.0), (1, 70.0), (2, 60.0), (3, 70.0)):
        assert run.should_evaluate(iteration)
        run.note_results(iteration, {"miou": miou})
    results = json.loads((run.folder / "results.json").read_text())
    assert (results["best"]["iteration"], results["last"]["iteration"]) == (2, 4)
    assert read_checkpoint(run.folder / "best.pt")["iteration"] == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("save_every, noticed", [(5, 9), (100, 9), (8, 7)])
def test_a_loss_that_is_not_finite_names_its_step(tmp_path, bad, save_every, noticed):
    """Step 7 of 20 is bad; it is noticed at the next log line (10) or before the next checkpoint, whichever is first."""
    run = make_run(config_for(tmp_path, save_every=save_every))
    run.begin()
    latest = run.folder / "latest.pt"
    saved = None
    for iteration in range(noticed):
        take_step(run, iteration, loss=bad if iteration in (6, 8) else 1.0)
        saved = latest.read_bytes() if latest.is_file() else None
    with pytest.raises(UserError) as caught:
        take_step(run, noticed, loss=1.0)
    assert "iteration 7:" in str(caught.value) and "\n" not in str(caught.value)
    assert (latest.read_bytes() if latest.is_file() else None) == saved
    if saved:
        assert read_checkpoint(latest)["iteration"] == 5


def test_before_the_first_checkpoint_no_last_good_state_is_promised(tmp_path):
    run = make_run(config_for(tmp_path, log_every=1))
    run.begin()
    with pytest.raises(UserError, match="iteration 1:") as caught:
        take_step(run, 0, loss=float("nan"))
    assert "latest.pt" not in str(caught.value)


def test_each_logged_loss_is_checked_and_nothing_else(tmp_path):
    run = make_run(config_for(tmp_path, log_every=2))
    run.begin()
    for iteration in range(2):
        take_step(run, iteration, accuracy=torch.tensor(float("nan")))
    assert lines_of(run)[0]["accuracy"] is None
    with pytest.raises(UserError, match="iteration 3:"):
        for iteration in (2, 3):
            take_step(run, iteration, accuracy=torch.tensor(1.0), loss_sup=torch.tensor(float("nan") if iteration == 2 else 1.0))


def test_a_step_after_resuming_is_named_by_its_number(tmp_path):
    run = five_steps(tmp_path)
    run = make_run(config_for(tmp_path))
    assert run.begin() == 5
    with pytest.raises(UserError, match="iteration 8:"):
        for iteration in range(5, 10):
            take_step(run, iteration, loss=float("nan") if iteration == 7 else 1.0)


def test_no_results_of_a_network_whose_loss_was_not_finite(tmp_path):
    run = make_run(config_for(tmp_path, eval_every=4, save_every=100))
    run.begin()
    with pytest.raises(UserError, match="iteration 2:"):
        for iteration in range(4):
            take_step(run, iteration, loss=float("nan") if iteration == 1 else 1.0)
    assert not (run.folder / "best.pt").is_file() and not (run.folder / "results.json").is_file()


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = make_run(config_for(tmp_path / "whole"))
    whole.begin()
    for iteration in range(20):
        take_step(whole, iteration)

    interrupted = make_run(config_for(tmp_path / "parts"))
    interrupted.begin()
    for iteration in range(13):
        take_step(interrupted, iteration)
    resumed = make_run(config_for(tmp_path / "parts", log_every=10, num_workers=3), seed=7)
    assert resumed.begin() == 10
    assert resumed.best == resumed.last == {"iteration": 10, "miou": 49.0, "per_class": [1.0, None]}
    for iteration in range(10, 20):
        take_step(resumed, iteration)
    for name in ("model", "ema", "statistics"):
        for key, value in whole.state[name].state_dict().items():
            assert torch.equal(value, resumed.state[name].state_dict()[key]), (name, key)
    momenta = [[entry["momentum_buffer"] for entry in run.state["optimizer"].state_dict()["state"].values()] for run in (whole, resumed)]
    assert len(momenta[0]) == 6 and all(map(torch.equal, *momenta))
    assert lines_of(resumed) == lines_of(whole)


@pytest.mark.parametrize("options, flag", [
    ({"lr": 0.2}, "--lr 0.1"), ({"seed": 1}, "--seed 0"), ({"iterations": 30}, "--iterations 20"), ({"weighting": "fixed"}, "--weighting daw"),
    ({"stats_momentum": 0.9}, "--stats-momentum 0.99"), ({"labeled": "12"}, "--labeled None")])
def test_resuming_with_other_options_is_refused(tmp_path, options, flag):
    run = five_steps(tmp_path)
    before = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    with pytest.raises(UserError) as caught:
        make_run(config_for(tmp_path, **options)).begin()
    assert flag in str(caught.value) and str(run.folder) in str(caught.value) and "--output" in str(caught.value)
    assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == before
    harmless = {"log_every": 3, "save_every": 2, "eval_every": 4, "num_workers": 1, "download": True, "channels_last": False}
    assert make_run(config_for(tmp_path, **harmless)).begin() == 5


def test_resuming_another_methods_or_a_damaged_run_is_refused(tmp_path):
    run = five_steps(tmp_path)
    other = make_run(config_for(tmp_path))
    other.method = "usrn"
    with pytest.raises(UserError, match="daw"):
        other.begin()
    wider = make_run(config_for(tmp_path))
    wider.state["model"] = nn.Sequential(nn.Conv2d(3, 5, 1))
    with pytest.raises(UserError, match="model"):
        wider.begin()
    with pytest.raises(UserError, match="ema"):  # a checkpoint without one
        torch.save({name: value for name, value in torch.load(run.folder / "latest.pt").items() if name != "ema"}, run.folder / "latest.pt")
        make_run(config_for(tmp_path)).begin()
    (run.folder / "latest.pt").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match="latest.pt"):
        make_run(config_for(tmp_path)).begin()


@pytest.mark.parametrize("end", ['{"iteration": 9, "loss": 0.', '{"iteration": 9', "{", "", '{"iteration": 4, "loss": 0.5}', "\0\0\0\0"])
def test_log_lines_after_the_checkpoint_are_dropped(tmp_path, end):
    run = make_run(config_for(tmp_path, log_every=1))
    run.begin()
    for iteration in range(7):  # the checkpoint is of step 5
        take_step(run, iteration)
    path = run.folder / "metrics.jsonl"
    kept = path.read_text().splitlines()[:5]
    assert len(path.read_text().splitlines()) == 7
    path.write_text(path.read_text() + end)  # cut off by a kill: no newline
    resumed = make_run(config_for(tmp_path, log_every=1))
    assert resumed.begin() == 5
    expected = kept + ([end] if end.endswith("}") else [])
    assert path.read_text() == "".join(line + "\n" for line in expected)
    take_step(resumed, 5)
    lines = path.read_text().splitlines()
    assert lines[:-1] == expected and json.loads(lines[-1])["iteration"] == 6


def test_a_run_without_a_checkpoint_starts_a_new_log(tmp_path):
    run = make_run(config_for(tmp_path, log_every=1))
    run.begin()
    for iteration in range(3):
        take_step(run, iteration)
    again = make_run(config_for(tmp_path, log_every=1))
    assert again.begin() == 0 and lines_of(again) == []


def test_a_signal_saves_and_stops(tmp_path, capsys):
    run = make_run(config_for(tmp_path))
    run.begin()
    take_step(run, 0)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        take_step(run, 1)
    assert caught.value.code == 128 + signal.SIGTERM and "SIGTERM" in capsys.readouterr().out
    assert make_run(config_for(tmp_path)).begin() == 2


def test_a_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError) as caught:
        make_run(config_for(tmp_path)).begin()
    assert str(tmp_path / "run") in str(caught.value)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # what an import of a missing package meets
    with pytest.raises(UserError, match="pip install tensorboard"):
        open_tensorboard(tmp_path)
