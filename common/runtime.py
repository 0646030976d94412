"""What a training loop stands on: options, ranks, files, weight averages, checkpoints, a log.

Everything works in one plain process and under torchrun, on one node or many. Without a process
group the collectives are the identity, so that a method's loop has one form.
"""

import argparse
import contextlib
import copy
import dataclasses
import inspect
import json
import math
import operator
import os
import pickle
import re
import select
import signal
import socket
import statistics
import sys
import time
import traceback
import typing
import zipfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

FORMAT = 2  # of checkpoints


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, where, what to do."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def require_finite(outputs: Tensor) -> None:
    require(bool(outputs.isfinite().all()), "the network's outputs are not finite: it has diverged "
                                            "and needs a lower --lr, or --no-amp")


def run_main(main) -> None:
    """Call `main()` and exit with its status; what the user can mend is one line and status 1."""
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold any bytes
    try:
        status = main()
        sys.stdout.flush()
        if dist.is_initialized():
            dist.destroy_process_group()
    except SystemExit as leaving:
        status = leaving.code
    except KeyboardInterrupt:  # before a StopSignal is there
        complain("stopped by SIGINT: nothing to save")
        status = 128 + signal.SIGINT
    except BrokenPipeError as error:
        try:
            print(flush=True)
        except BrokenPipeError:  # whoever read our output has gone, such as `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 128 + signal.SIGPIPE
        else:
            raise error
    except Exception as error:
        line = explain(error)
        if line is None and not dist.is_initialized():
            raise
        complain(f"error: {line}") if line else traceback.print_exc()
        status = 1
    if dist.is_initialized():  # the others may wait for this rank, and NCCL's clean end for them
        os._exit(status or 0)
    sys.exit(status)


def explain(error: Exception) -> str | None:
    """What the user can do about an error, ours or PyTorch's; None where it is none of these."""
    if isinstance(error, UserError):  # of a loader worker, below a traceback: the last line is ours
        return str(error).strip().splitlines()[-1].removeprefix("common.runtime.UserError: ")
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"this needs the package {error.name}: pip install {error.name}"
    memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    if memory or "can't allocate memory" in str(error):
        return ("out of memory: lower --batch-size or --crop, or take --checkpoint-activations; "
                "for large pictures --mode sliding")
    if "more than 1 value per channel" in str(error):
        return "batch norm needs two images a rank: a larger --batch-size"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = str(error).strip().splitlines()[0]
        return f"--compile failed, install a C++ compiler or leave it out: {reason}"
    gone = re.search(r"DataLoader worker.*(killed|exited)|(gloo|NCCL)", str(error))
    if isinstance(error, RuntimeError) and gone:
        return ("another process of this run has gone, killed perhaps or out of memory, and the "
                "same command goes on from the last checkpoint"
                + "; or ranks cannot meet: NCCL_DEBUG=INFO, GLOO_SOCKET_IFNAME" * bool(gone[2])
                + f" ({' '.join(str(error).split())})")
    return None


def complain(line: str) -> None:
    """To stderr; under torchrun once for a node's ranks, and below the launcher's own report."""
    launcher, run = os.getppid(), os.environ.get("TORCHELASTIC_RUN_ID")
    ended = None
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or a container that forbids it
        ended = os.pidfd_open(launcher) if run and "RANK" in os.environ else None
    if ended is None:
        print(line, file=sys.stderr, flush=True)
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher ends ranks after the first
    speaker = socket.socket(socket.AF_UNIX)
    try:
        speaker.bind(f"\0{run[-60:]} {launcher}")  # a name for one process and what it forks
    except OSError:
        return  # another rank has it and speaks
    if os.fork() == 0:
        os.setsid()
        select.select([ended], [], [], 60)  # until the launcher has gone
        print(line, file=sys.stderr, flush=True)
        os._exit(0)


# ---------------------------------------------------------------- options

BOUNDS = {"low": (">=", operator.ge), "high": ("<=", operator.le),
          "above": (">", operator.gt), "below": ("<", operator.lt),
          "multiple": ("a multiple of", lambda value, of: value % of == 0)}


def option(default, help: str, choices: tuple | None = None, **bounds: float):
    """A dataclass field with its line of help; bounds (see BOUNDS) are checked by `parse`."""
    metadata = {"help": help, "choices": choices, "bounds": bounds}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class RunOptions:
    """How a run runs, whatever it learns; None: chosen as the brackets say."""

    output: str | None = option(None, "run folder, where a second start goes on (runs/...)")
    eval_every: int | None = option(None, "steps between evaluations (an epoch, >= 200)", low=1)
    eval_split: str = option("val", "or tune, for choosing options", choices=("val", "tune"))
    save_every: int | None = option(None, "steps between checkpoints (--eval-every)", low=1)
    log_every: int = option(20, "steps between lines of metrics.jsonl", low=1)
    num_workers: int | None = option(None, "loader processes a rank (by the CPU cores)", low=0)
    device: str | None = option(None, "cpu or cuda (cuda where there is one)")
    amp: bool | None = option(None, "bf16 autocast (on for GPUs that have bf16)")
    compile: bool = option(False, "torch.compile the network")
    checkpoint_activations: bool = option(False, "less memory, more time")
    tensorboard: bool = option(False, "TensorBoard events as well (package tensorboard)")


# A run may be resumed with other values of these; --lr and --weights: see `check_options`.
RESUMABLE = {field.name for field in dataclasses.fields(RunOptions)} - {"eval_split"}
RESUMABLE |= {"data_root", "download"}
# So may the ranks of one run: nothing that they meet at depends on these.
RANKS_OWN = {"output", "num_workers", "device", "tensorboard", "data_root", "download"}
LOCKS = []  # of this process' run folders, also of those that it has done with


class Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message} (see --help)")


def parse(config_class, description: str | None = None, argv: list[str] | None = None):
    """The command line as an instance of the dataclass. Raises UserError for bad options."""
    parser = Parser(description=description, allow_abbrev=False)
    hints, fields = typing.get_type_hints(config_class), dataclasses.fields(config_class)
    flags = {field.name: "--" + field.name.replace("_", "-") for field in fields}
    for field in fields:
        hint, *_ = typing.get_args(hints[field.name]) or (hints[field.name],)  # X of X | None
        text = field.metadata["help"].replace("%", "%%")
        if field.default is not None:
            text += f" ({field.default})"
        options = {"type": hint, "choices": field.metadata["choices"]}
        if hint is bool:
            options = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(flags[field.name], default=field.default, help=text, **options)
    config = config_class(**vars(parser.parse_args(argv)))
    for field in fields:
        value = getattr(config, field.name)
        usable = value != "" if isinstance(value, str | None) else abs(value) < 2**62  # nan is not
        require(usable, f"{flags[field.name]} must not be {value or 'empty'}")
        for bound, limit in field.metadata["bounds"].items():
            sign, holds = BOUNDS[bound]
            require(value is None or holds(value, limit),
                    f"{flags[field.name]} must be {sign} {limit}, not {value}")
    return config


def with_defaults(config, **values):
    """A copy of the dataclass whose None fields have these values."""
    unset = {name: value for name, value in values.items() if getattr(config, name, 0) is None}
    return dataclasses.replace(config, **unset)


# ---------------------------------------------------------------- ranks


def init_distributed(device: str | None = None) -> tuple[int, int, torch.device]:
    """(rank, world size, device). Joins torchrun's process group: nccl on GPUs, gloo on CPUs."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    require(re.fullmatch(r"cpu|cuda(:\d+)?", name), f"--device takes cpu or cuda, not {name!r}")
    require(":" not in name or "RANK" not in os.environ,
            f"--device {name} is one GPU: torchrun gives each rank its own with --device cuda")
    if name.startswith("cuda"):
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
        gpus = torch.cuda.device_count()
        require(int(name[5:]) < gpus, f"--device {name}: {gpus} GPUs are too few; lower "
                                      f"--nproc_per_node or take --device cpu")
        torch.cuda.set_device(name)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys() and not dist.is_initialized():
        dist.init_process_group("nccl" if name.startswith("cuda") else "gloo")
        dist.new_group(backend="gloo", timeout=timedelta(minutes=5))  # can the nodes meet?
        if sys.version_info < (3, 12) and hasattr(os, "fork"):
            # There a loader's process hangs in its first line if it is forked while one of gloo's
            # threads enters Python, as it may right after a collective.
            os.register_at_fork(before=lambda: time.sleep(0.05))
    return rank(), world_size(), torch.device(name)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)


@contextlib.contextmanager
def main_first():
    """For work on files: rank 0 runs the block, then other nodes' first ranks, then all others."""
    turn = 2 if int(os.environ.get("LOCAL_RANK", 0)) else min(rank(), 1)
    error, group = None, None
    if dist.is_initialized():  # preparing data may take longer than NCCL's ten minutes
        group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    for now in range(3):
        if now == turn:
            try:
                yield
            except BaseException as caught:
                error = caught
        failures = torch.tensor(int(error is not None))
        if group:
            dist.all_reduce(failures, group=group)
        if failures:
            time.sleep(0 if error else 3)  # whoever failed says why
            raise error or SystemExit(1)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def mean_over_ranks(count: Tensor) -> Tensor:
    """A count's mean over ranks, >= 1: DDP turns sums divided by it into global means."""
    return (all_reduce_sum(count.to(torch.float32, copy=True)) / world_size()).clamp(min=1)


def cutmix_partner(batch: Tensor) -> Tensor:
    """The image before each one in the *global* batch, [B, ...]: CutMix's partner."""
    rolled, ranks = torch.roll(batch, 1, dims=0), world_size()
    if ranks > 1:  # the last image goes to the next rank, as one message
        sent = batch[-1].contiguous()
        received = torch.empty_like(sent)
        messages = [dist.P2POp(dist.isend, sent, (rank() + 1) % ranks),
                    dist.P2POp(dist.irecv, received, (rank() - 1) % ranks)]
        for request in dist.batch_isend_irecv(messages):
            request.wait()
        rolled[0] = received
    return rolled


# For DDP(network, **KEEP_BUFFERS): running statistics are not broadcast, as a step has two forward
# passes; SyncBatchNorm keeps them equal, on CPUs `average_buffers`. Renamed in PyTorch 2.13.
RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
KEEP_BUFFERS = {"forward_sync_buffers" if RENAMED else "broadcast_buffers": False}


def average_buffers(model: nn.Module) -> None:
    """Mean over ranks of the running statistics, before they are used or saved."""
    for buffer in model.buffers():
        if dist.is_initialized() and buffer.is_floating_point():
            all_reduce_sum(buffer).div_(world_size())


@contextlib.contextmanager
def evaluating(network: nn.Module):
    """In eval mode, with statistics averaged over ranks; after it every part is as it was."""
    average_buffers(network)
    modes = {part: part.training for part in network.modules()}  # some may be frozen
    network.eval()
    yield
    for part, training in modes.items():
        part.training = training


def bf16_is_fast(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


# ---------------------------------------------------------------- average of weights


def make_ema(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Parameters and running statistics: ema <- decay ema + (1 - decay) model; counters: copied.
    Weights that two layers share, a state_dict's under two names, are averaged once."""
    pairs = dict(zip(*(net.state_dict(keep_vars=True).values() for net in (ema, model))))
    averages, values = zip(*(pair for pair in pairs.items() if pair[0].is_floating_point()))
    torch._foreach_lerp_(averages, values, 1 - decay)
    for average, value in pairs.items():
        if not average.is_floating_point():
            average.copy_(value)


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def reading(path: str | Path):
    """Around reading one file: whatever a damaged or missing one raises becomes a UserError."""
    try:
        yield
    except (UserError, NameError):  # not of the file: ours
        raise
    except ModuleNotFoundError as error:
        raise UserError(f"{path} needs a package: pip install {error.name}") from error
    except Exception as error:  # foreign bytes can raise anything; all mean the same to the user
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read {path}: {reason}") from error


@contextlib.contextmanager
def writing(path: Path):
    """Around writing one file: a full or read-only disk becomes a UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, RuntimeError, UnicodeError) as error:  # of torch.save: a full disk
        raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}") from error


def write_atomically(path: Path, write) -> None:
    """`write(temporary path)`, then rename: readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.part")  # names end at 255 bytes
    try:
        with writing(path):
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_lines(path: Path, lines) -> None:
    text = "".join(f"{line}\n" for line in lines)
    write_atomically(path, lambda temporary: temporary.write_text(text))


def write_json(path: Path, value) -> None:
    write_lines(path, [json.dumps(value, indent=2, allow_nan=False)])


def read_json(path: Path) -> dict:
    """What `write_json` wrote; {} where it has not yet."""
    with reading(path):
        return json.loads(path.read_text()) if path.is_file() else {}


def read_tensors(path: str | Path):
    """What torch.save wrote, on the CPU. Raises UserError for more than tensors, plain values."""
    with reading(path):
        if zipfile.is_zipfile(path):  # torch.load does not compare its check sums
            damaged = zipfile.ZipFile(path).testzip()
            require(damaged is None, f"{path} is damaged, in {damaged}")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # whose text advises to trust the file
            raise UserError(f"{path} is no PyTorch file but perhaps a web page or a pointer of Git "
                            f"LFS, or it holds more than tensors") from error


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint's content, on the CPU."""
    checkpoint = read_tensors(path)
    known = isinstance(checkpoint, dict) and checkpoint.get("format") == FORMAT
    require(known, f"{path} is not a checkpoint of this project (format {FORMAT})")
    return checkpoint


class Checkpoint:
    """latest.pt and best.pt of a run folder, and config.json.

    config: the options by name. state: all that a run must restore, objects with state_dict and
    load_state_dict by name.
    """

    def __init__(self, folder: str | Path, method: str, config: dict, state: dict):
        self.folder, self.method = Path(folder), method
        self.config, self.state = config, state
        self.models = [part for part in state.values() if isinstance(part, nn.Module)]
        self.pending: list[dict[str, Tensor]] = []  # scalars of the steps since the log's last line

    def load(self) -> int:
        """Take the folder and restore the run in it: the iteration to go on from, 0 where there is
        none. Raises UserError where its options, or other ranks', are different ones."""
        path, iteration = self.folder / "latest.pt", 0
        if rank() == 0:
            with writing(self.folder / ".lock"):
                self.lock()
        if path.is_file():
            checkpoint = read_checkpoint(path)
            with reading(path):
                self.check_options(checkpoint)
                for name, part in self.state.items():
                    part.load_state_dict(checkpoint[name])
                self.change_lr(checkpoint["config"])
                iteration = checkpoint["iteration"]
                self.restore_rng(checkpoint["rng"], iteration)
            say(f"resuming {self.folder} at iteration {iteration}")
        weights = Path(str(self.config.get("weights"))).name  # in a folder of each node's
        ranks = [{**self.config, "iteration": iteration, "weights": weights}] * world_size()
        if dist.is_initialized():
            dist.all_gather_object(ranks, ranks[0])
        differing = [name for name in sorted(ranks[0].keys() - RANKS_OWN)
                     if any(other[name] != ranks[0][name] for other in ranks)]
        require(not differing, f"nodes differ in {', '.join(differing)}: they need the same data "
                               f"and options, and one folder {self.folder}")
        if rank() == 0:
            write_json(self.folder / "config.json", {"method": self.method, **self.config})
        return iteration

    def lock(self) -> None:
        """Refuse the folder while another run is in it; the lock ends with its process."""
        path = self.folder / ".lock"
        LOCKS.append(lock := open(path, "a+"))
        with contextlib.suppress(ImportError):  # Windows has no fcntl
            import fcntl

            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise UserError(f"{self.folder} is in use by {path.read_text()}") from None
            except OSError as error:  # file systems without locks
                say(f"{self.folder} cannot be locked ({error.strerror}): start one run in it only")
        lock.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", end="", file=lock, flush=True)
        for left_behind in self.folder.glob(".*.part"):  # by a run that was killed
            left_behind.unlink()

    def change_lr(self, theirs: dict) -> None:
        """A run that diverged may go on with another --lr: PolynomialLR scales the last one."""
        if self.config["lr"] != theirs["lr"]:
            say(f"--lr {theirs['lr']} becomes {self.config['lr']}")
            for group in self.state["optimizer"].param_groups:
                group["lr"] *= self.config["lr"] / theirs["lr"]

    def check_options(self, checkpoint: dict) -> None:
        theirs = checkpoint["config"]
        free = set(RESUMABLE)
        if checkpoint["iteration"] < theirs["iterations"]:  # not of a result that is there
            free.add("lr")
        files = {Path(config.get("weights", "")).name for config in (self.config, theirs)}
        if len(files) == 1:  # in another folder
            free.add("weights")
        changed = ["other images, as its lists have changed" if name == "lists"
                   else f"--{name.replace('_', '-')} {theirs[name]}"
                   for name, value in self.config.items()
                   if name not in free and name in theirs and theirs[name] != value]
        if checkpoint["method"] != self.method:
            changed = [f"of {checkpoint['method']}.py"]
        require(not changed, f"{self.folder} holds a run with other options ({', '.join(changed)})"
                             f": repeat its options to go on with it, or choose another --output")

    def restore_rng(self, states: list, iteration: int) -> None:
        if len(states) != world_size():
            say(f"the run had {len(states)} ranks: it goes on with fresh random augmentation")
            torch.manual_seed(self.config["seed"] + 1000 * rank() + iteration)
            return
        cpu, cuda, pending = states[rank()]
        self.pending.extend(pending)
        torch.set_rng_state(cpu)
        if cuda is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(cuda)

    def save(self, iteration: int) -> None:
        """latest.pt: `state`, iterations done, each rank's random generators and pending log."""
        for model in self.models:
            average_buffers(model)
        values = [value for model in self.models for value in model.state_dict().values()]
        finite = torch.stack([value.isfinite().all() for value in values]).all()
        require(bool(finite), f"the weights or statistics are not finite after iteration "
                              f"{iteration}: go on with a lower --lr, or with --no-amp")
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        pending = [{name: value.cpu() for name, value in row.items()} for row in self.pending]
        own = (torch.get_rng_state(), cuda, pending)  # loader workers need none: see common.data
        states = [own] * world_size()
        if dist.is_initialized():
            dist.all_gather_object(states, own)
        parts = {name: part.state_dict() for name, part in self.state.items()}
        self.write("latest.pt", {**parts, "rng": states, "iteration": iteration})
        if dist.is_initialized():
            dist.barrier()  # torchrun ends all as soon as one leaves: not before this is written

    def write(self, name: str, content: dict) -> None:
        content = {"format": FORMAT, "method": self.method, "config": self.config, **content}
        if rank() == 0:
            write_atomically(self.folder / name, lambda part: torch.save(content, part))


# ---------------------------------------------------------------- signals, and the log


class StopSignal:
    """SIGTERM or Ctrl-C: the loop saves and leaves in good order; one 5 s later ends it at once.

    An earlier one is the first again: schedulers signal every process, torchrun passes its own on.
    """

    def __init__(self):
        self.number = 0  # of the signal that this process has got
        self.saved: int | None = None  # the iteration, where nothing is left to save
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def note(self, number: int, frame) -> None:
        if self.saved is not None:
            self.leave(self.saved, number)
        if not self.number:
            self.number, self.since = number, time.monotonic()
        elif time.monotonic() > self.since + 5:
            sys.exit(128 + number)

    def requested(self, step: int) -> int:
        """The signal to leave for, or 0. Ranks agree on it, on the host, in every tenth step."""
        if self.group is None:
            return self.number
        if step % 10 > 0:
            return 0
        number = torch.tensor(self.number)
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self.group)
        return int(number)

    def leave(self, step: int, number: int) -> None:
        say(f"stopped by {signal.Signals(number).name}; saved iteration {step}: "
            f"the same command goes on from there")
        sys.exit(128 + number)

    def at_once(self, step: int) -> None:
        """All up to `step` is saved: a signal, also one that has come, now ends the process."""
        self.saved = step
        if self.number:
            self.leave(step, self.number)


class Milestones:
    """What may follow a step: saving, leaving after a signal, an evaluation with best.pt. From here
    on SIGTERM and Ctrl-C are heeded.

    scores: evaluates, without arguments. evaluated: the network whose weights best.pt holds.
    """

    def __init__(self, checkpoint: Checkpoint, log: "Log", evaluated: nn.Module,
                 scores: Callable[[], dict]):
        self.checkpoint, self.log, self.stop = checkpoint, log, StopSignal()
        self.save_every = checkpoint.config["save_every"] or log.eval_every
        self.evaluated, self.scores = evaluated, scores
        if log.evaluation_is_due(log.start):  # a kill came between saving and evaluating
            self.evaluate(log.start)
        elif log.start == log.total:
            self.stop.at_once(log.start)

    def after(self, step: int) -> None:
        stopped_by, evaluates = self.stop.requested(step), self.log.evaluation_is_due(step)
        if stopped_by or evaluates or step % self.save_every == 0:
            self.checkpoint.save(step)
        if stopped_by:
            self.stop.leave(step, stopped_by)
        if evaluates:
            self.evaluate(step)

    def evaluate(self, step: int) -> None:
        self.stop.at_once(step)
        results = self.scores()
        self.stop.saved = None
        if self.log.note_evaluation(step, results):  # before results.json promises best.pt
            best = {"model": self.evaluated.state_dict(), "iteration": step}
            self.checkpoint.write("best.pt", best)
        self.log.write_evaluation()
        if step == self.log.total:  # what follows has nothing to save
            self.stop.at_once(step)


class Log:
    """metrics.jsonl, results.json and the terminal. Device scalars are read every `every` steps.

    start: the iteration that the run of `checkpoint` goes on from. metric: the score, in %, by
    which an evaluation is the best.
    """

    def __init__(self, checkpoint: Checkpoint, start: int, images_per_step: int,
                 metric: str = "miou"):
        self.folder, self.start, config = checkpoint.folder, start, checkpoint.config
        self.total, self.every = config["iterations"], config["log_every"]
        self.eval_every = config["eval_every"]
        self.images_per_step, self.metric = images_per_step, metric
        self.pending = checkpoint.pending
        self.results = {"method": checkpoint.method, "last": None, "best": None}
        if start:
            self.results |= read_json(self.folder / "results.json")
        elif rank() == 0:  # of a run whose latest.pt is gone
            (self.folder / "results.json").unlink(missing_ok=True)
        self.tensorboard = None
        if config["tensorboard"] and rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(self.folder / "tensorboard"), flush_secs=10,
                                             purge_step=start + 1)
        kept = read_metrics(self.folder, start)
        if rank() == 0:  # steps after `start` will be made again
            write_lines(self.folder / "metrics.jsonl", map(json.dumps, kept))
        self.sup_losses = [line["loss_sup"] for line in kept if "loss_sup" in line]
        self.since, self.steps = time.monotonic(), 0  # for the speed

    def line_is_due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.total

    def step(self, step: int, scalars: dict[str, Tensor], more: dict | None = None) -> dict | None:
        """Note 0-d tensors. Where a line is due, write and return their means over steps and ranks,
        nan left out, and `more`. Raises UserError for a loss that is not finite."""
        self.pending.append({name: value.detach().float() for name, value in scalars.items()})
        self.steps += 1
        if not self.line_is_due(step):
            return None
        names = list(dict.fromkeys(name for row in self.pending for name in row))
        hole = scalars["loss"].new_full((), math.nan, dtype=torch.float32)  # not every step has all
        table = torch.stack([torch.stack([row.get(name, hole).to(hole) for name in names])
                             for row in self.pending])
        holes = torch.tensor([[name not in row for name in names] for row in self.pending])
        self.pending.clear()
        known = ~table.isnan()
        sums, counts = all_reduce_sum(torch.stack([table.where(known, 0), known])).cpu()
        losses = [column for column, name in enumerate(names) if name.startswith("loss")]
        finite = sums.isfinite() & (counts == world_size()) | holes
        require(bool(finite[:, losses].all()),
                f"the loss is not finite at iteration {step}: go on from the last checkpoint with "
                f"a lower --lr, or with --no-amp")
        means = sums.sum(dim=0) / counts.sum(dim=0)
        line = {name: round(value, 6) for name, value in zip(names, means.tolist())} | (more or {})
        self.write(step, line)
        return line

    def write(self, step: int, line: dict) -> None:
        """A line of metrics.jsonl with the speed since the last evaluation; some are shown."""
        speed = self.steps / (time.monotonic() - self.since)
        images = round(speed * self.images_per_step, 2)
        self.append(step, {**line, "images_per_second": images})
        if "loss_sup" in line:
            self.sup_losses.append(line["loss_sup"])
        if step % (5 * self.every) == 0:
            fives = [statistics.fmean(self.sup_losses[first : first + 5])
                     for first in range(0, len(self.sup_losses), 5)] or [0.0]
            running_away = fives[-1] > 3 * min(fives)  # wrong pseudo labels can do that
            say(f"{step}/{self.total}  loss {line['loss']:.4f}  {images:.1f} images/s  "
                f"{timedelta(seconds=round((self.total - step) / speed))} left"
                + running_away * f"  LOSS ON LABELS {fives[-1]:.2f}, WAS {min(fives):.2f}")

    def append(self, step: int, line: dict) -> None:
        if rank() > 0:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in line.items()}
        path = self.folder / "metrics.jsonl"
        with writing(path), open(path, "a") as file:
            file.write(json.dumps({"iteration": step, **finite}) + "\n")
        for name, value in finite.items():
            if self.tensorboard and value is not None:
                self.tensorboard.add_scalar(name, value, step)

    def evaluation_is_due(self, step: int) -> bool:
        last = self.results["last"]
        due = step and step % self.eval_every == 0 or step == self.total
        return due and (last is None or last["iteration"] != step)

    def note_evaluation(self, step: int, results: dict) -> bool:
        """Keep an evaluation in `results`, not yet in a file: whether it is the best."""
        best, value = self.results["best"], results[self.metric]
        require(value is not None, "no pixel of the evaluated list has a label")
        is_best = best is None or value > best[self.metric]
        last = {"iteration": step, **results}
        self.results |= {"last": last, "best": last if is_best else best}
        return is_best

    def write_evaluation(self) -> None:
        """The last evaluation: a line of metrics.jsonl, one on the terminal, results.json."""
        best, last = self.results["best"], dict(self.results["last"])
        step = last.pop("iteration")
        self.append(step, {name: value for name, value in last.items()
                           if isinstance(value, (int, float))})
        say(f"iteration {step}: {self.metric} {last[self.metric]:.2f} "
            f"(best {best[self.metric]:.2f} at {best['iteration']})")
        self.write_results()
        self.since, self.steps = time.monotonic(), 0

    def write_results(self, **more) -> None:
        """results.json: the last and the best evaluation, and `more`."""
        if rank() == 0:
            write_json(self.folder / "results.json", {**self.results, **more})


def read_metrics(folder: Path, until: float = math.inf) -> list[dict]:
    """metrics.jsonl, or [], up to an iteration: no line that a kill cut off or a resume doubled."""
    path, kept = folder / "metrics.jsonl", {}
    with reading(path):
        for line in path.read_text().splitlines() if path.is_file() else ():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                content = json.loads(line)
                if content["iteration"] <= until:
                    kept[line] = content
    return list(kept.values())
