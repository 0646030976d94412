"""One training run: its folder, checkpoints, logs and orderly end.

A run folder holds
    config.json      every option as it was resolved      metrics.jsonl   a line per log interval and evaluation
    latest.pt        everything needed to go on           best.pt         the weights of the best evaluation (mIoU, or Dice)
    results.json     the last and the best evaluation, the paper's number     samples.png     image | label | prediction
"""

import dataclasses
import json
import math
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from common import runtime
from common.augment import normalize
from common.evaluate import class_probabilities, evaluate
from common.files import FORMAT, read_checkpoint, write_atomically, write_json
from common.loading import EvaluationSet, evaluation_loader
from common.options import RESUMABLE
from common.paper import paper_number
from common.pictures import sample_grid
from common.runtime import Context, UserError


class Run:
    """`state` names everything that a checkpoint must restore: objects with state_dict and load_state_dict.

    state["model"] is required; state["ema"], if there, is what is evaluated and predicted with. `metric`, in %, of an evaluation says which is best.
    """

    def __init__(self, method: str, config, context: Context, state: dict, images_per_step: int | None = None, metric: str = "miou"):
        self.method, self.config, self.context, self.state, self.metric = method, config, context, state, metric
        self.images_per_step = images_per_step or 2 * config.batch_size  # labeled and unlabeled
        self.folder = Path(config.output)
        self.best: dict | None = None
        self.last: dict | None = None
        self.pending: list[dict] = []  # device scalars of the steps since the last log line
        self.stop_signal = 0
        self.host_group = dist.new_group(backend="gloo") if context.world_size > 1 else None
        self.tensorboard = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)

    # ---------------------------------------------------------------- start and resume

    def begin(self) -> int:
        """Make the folder, or go on with the run that it holds. Returns the iteration to start from."""
        latest = self.folder / "latest.pt"
        start = 0
        if latest.is_file():
            start = self.restore(read_checkpoint(latest))
        if self.context.is_main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot make the run folder {self.folder}: {error}") from error
            write_json(self.folder / "config.json", {"method": self.method, **dataclasses.asdict(self.config)})
            self.forget_lines_after(start)
            if self.config.tensorboard:
                self.tensorboard = open_tensorboard(self.folder)
            if start:
                self.say(f"resuming {self.folder} at iteration {start}")
        self.started, self.start_iteration, self.evaluating = time.monotonic(), start, 0.0
        return start

    def restore(self, checkpoint: dict) -> int:
        check_options(checkpoint, self.method, self.config, self.folder)
        for name, part in self.state.items():
            try:
                part.load_state_dict(checkpoint[name])
            except (RuntimeError, KeyError, ValueError) as error:
                raise UserError(f"{self.folder / 'latest.pt'} does not fit this network ({name}): "
                                f"{str(error).splitlines()[0]}") from error
        if len(checkpoint["rng"]) == self.context.world_size:
            runtime.set_rng_state(checkpoint["rng"][self.context.rank])
        else:
            runtime.seed_everything(self.config.seed + 1000 * self.context.rank + checkpoint["iteration"])
            self.say(f"the run had {len(checkpoint['rng'])} ranks and has {self.context.world_size} now: it goes on with fresh "
                     f"random numbers for augmentation")
        self.best, self.last = checkpoint["best"], checkpoint["last"]
        return checkpoint["iteration"]

    def forget_lines_after(self, iteration: int) -> None:
        """Drop log lines of steps that the checkpoint does not know, which will be made again."""
        path = self.folder / "metrics.jsonl"
        if path.is_file():
            kept = [line for line in path.read_text().splitlines() if is_line_until(line, iteration)]
            write_atomically(path, lambda temporary: temporary.write_text("".join(line + "\n" for line in kept)))

    # ---------------------------------------------------------------- during training

    def log(self, iteration: int, scalars: dict, slow=None) -> None:
        """Note a step's device scalars (0-d tensors; means over ranks are logged); write a line every `log_every` steps.

        Nothing is read back from the device in between. `slow(means)` is called only for a line and returns more numbers.
        Raises UserError naming the step if a loss was not finite.
        """
        self.pending.append(scalars)
        if (iteration + 1) % self.config.log_every == 0 or iteration + 1 == self.config.iterations:
            means = self.read_pending(iteration)
            self.pending = []
            training = time.monotonic() - self.started - self.evaluating
            speed = self.images_per_step * (iteration + 1 - self.start_iteration) / training
            line = {"iteration": iteration + 1, **means, **(slow(means) if slow else {}), "images_per_second": round(speed, 2)}
            self.write_line(line)
            self.show_progress(line)

    def read_pending(self, iteration: int) -> dict:
        """Means of the pending scalars, read in one transfer, after a check that each loss was finite."""
        if not self.pending:
            return {}
        names = list(self.pending[0])
        table = torch.stack([torch.stack([step[name].detach().float() for name in names]) for step in self.pending])
        table = (runtime.all_reduce_sum(table) / self.context.world_size).cpu()
        first = iteration + 1 - len(self.pending)
        losses = [column for column, name in enumerate(names) if name.startswith("loss")]
        bad = (~torch.isfinite(table[:, losses])).any(dim=1).nonzero()
        if len(bad):
            latest = self.folder / "latest.pt"
            raise UserError(f"the loss is not finite at iteration {first + int(bad[0]) + 1}: lower --lr or try --no-amp"
                            + (f"; {latest} holds the last good state" if latest.is_file() else ""))
        return {name: round(float(value), 6) for name, value in zip(names, table.mean(dim=0))}

    @property
    def networks(self) -> list[nn.Module]:
        """What is trained."""
        return [part for part in self.state.values() if isinstance(part, nn.Module) and next(part.parameters(), None) is not None]

    @property
    def evaluated_model(self) -> nn.Module:
        """What is evaluated, saved in best.pt and predicted with: the EMA if there is one, else the network itself."""
        return self.state["ema"].model if "ema" in self.state else self.state["model"]

    def should_evaluate(self, iteration: int) -> bool:
        """Whether to call `note_results` after this step; if so, the network is made ready for it on every rank."""
        if (iteration + 1) % self.config.eval_every and iteration + 1 < self.config.iterations:
            return False
        self.read_pending(iteration)  # never evaluate after a loss that was not finite
        self.average_buffers()
        self.evaluation_started = time.monotonic()
        return True

    def average_buffers(self) -> None:
        for model in self.networks + ([self.state["ema"].model] if "ema" in self.state else []):
            runtime.average_buffers(model)

    def evaluate(self, predict, data, samples, labeled_pixels: torch.Tensor) -> dict:
        """`common.evaluate.evaluate` of `predict` on a list of samples; leaves the network in training mode."""
        loader = evaluation_loader(samples, data, self.context, self.config.num_workers)
        results = evaluate(predict, loader, data.info, self.context, labeled_pixels)
        self.state["model"].train()
        return results

    def note_results(self, iteration: int, results: dict) -> None:
        """Keep an evaluation: log it, write results.json, and best.pt if it is the best so far."""
        self.evaluating += time.monotonic() - self.evaluation_started
        self.last = {"iteration": iteration + 1, **results}
        value = results[self.metric]
        if value is None:
            raise UserError("no pixel of the validation list has a label: nothing to evaluate")
        is_best = self.best is None or value > self.best[self.metric]
        if is_best:
            self.best = self.last
        if self.context.is_main:
            self.write_line({name: value for name, value in self.last.items() if isinstance(value, (int, float))})
            name = {"miou": "mIoU", "dice": "Dice"}[self.metric]
            self.say(f"iteration {iteration + 1}: {name} {value:.2f} (best {self.best[self.metric]:.2f} at {self.best['iteration']})")
            self.write_results()
            if is_best:
                self.write_checkpoint("best.pt", {"model": self.evaluated_model.state_dict(), "iteration": iteration + 1})

    def note_test(self, results: dict) -> None:
        """Add an evaluation of the last weights on a test list to results.json."""
        if self.context.is_main:
            self.say(f"test list: {', '.join(f'{name} {value:.2f}' for name, value in results.items() if isinstance(value, float))}")
            self.write_results(test=results)

    def write_results(self, **more) -> None:
        """results.json: the last and the best evaluation, the paper's number of the same row if there is one, and `more`."""
        write_json(self.folder / "results.json", {"method": self.method, "paper": paper_number(self.method, self.config), "last": self.last,
                                                  "best": self.best, **more})

    def end_of_step(self, iteration: int) -> None:
        """Save where it is time to; stop in good order after SIGTERM or Ctrl-C."""
        stopping = self.must_stop(iteration)
        if stopping or (iteration + 1) % self.config.save_every == 0 or iteration + 1 == self.config.iterations:
            self.save(iteration)
        if stopping:
            self.say(f"stopped by {signal.Signals(stopping).name}; saved iteration {iteration + 1}: the same command goes on from there")
            runtime.finish()
            sys.exit(128 + stopping)

    def save(self, iteration: int) -> None:
        """latest.pt: all of `state`, the random generators of every rank and the position in the data."""
        self.read_pending(iteration)  # never save after a loss that was not finite, nor weights that are not
        if not torch.stack([parameter.isfinite().all() for model in self.networks for parameter in model.parameters()]).all():
            raise UserError(f"the weights are not finite after iteration {iteration + 1}: lower --lr or try --no-amp")
        self.average_buffers()
        rng = [runtime.rng_state()]
        if self.context.world_size > 1:
            rng = [None] * self.context.world_size
            dist.all_gather_object(rng, runtime.rng_state(), group=self.host_group)
        if self.context.is_main:
            parts = {name: part.state_dict() for name, part in self.state.items()}
            self.write_checkpoint("latest.pt", {**parts, "rng": rng, "iteration": iteration + 1, "best": self.best, "last": self.last})

    def write_checkpoint(self, name: str, content: dict) -> None:
        common = {"format": FORMAT, "method": self.method, "dataset": self.config.dataset, "config": dataclasses.asdict(self.config)}
        write_atomically(self.folder / name, lambda temporary: torch.save({**common, **content}, temporary))

    def on_signal(self, number: int, frame) -> None:
        if self.stop_signal:  # a second one: leave at once
            sys.exit(128 + number)
        self.stop_signal = number

    def release_signals(self) -> None:
        """For work after the run that has nothing to save: signals end the process again, also one since the last step."""
        stopping = self.must_stop(self.config.iterations - 1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        if stopping:
            runtime.finish()
            sys.exit(128 + stopping)

    def must_stop(self, iteration: int) -> int:
        """The signal to stop for, agreed on by all ranks (on the host, every tenth step and after the last), or 0."""
        if self.host_group is None:
            return self.stop_signal
        if (iteration + 1) % 10 and iteration + 1 < self.config.iterations:
            return 0
        flag = torch.tensor(self.stop_signal)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.host_group)
        return int(flag)

    # ---------------------------------------------------------------- showing

    def say(self, text: str) -> None:
        if self.context.is_main:
            print(f"\r\033[K{text}" if sys.stdout.isatty() else text, flush=True)

    def write_samples(self, predict, data) -> None:
        """samples.png: the first images of the validation list beside label and prediction."""
        if self.context.is_main:
            write_sample_grid(lambda images: [class_probabilities(predict, images, data.info).argmax(dim=1)[0]],
                              ("image", "label", "prediction"), data, self.context.device, self.folder / "samples.png")

    def write_line(self, line: dict) -> None:
        if not self.context.is_main:
            return
        line = {name: value if isinstance(value, int) or math.isfinite(value) else None for name, value in line.items()}
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.tensorboard:
            for name, value in line.items():
                if value is not None and name != "iteration":
                    self.tensorboard.add_scalar(name, value, line["iteration"])

    def show_progress(self, line: dict) -> None:
        if not self.context.is_main:
            return
        seconds = (time.monotonic() - self.started) / (line["iteration"] - self.start_iteration)
        left = round(seconds * (self.config.iterations - line["iteration"]))
        text = (f"{line['iteration']}/{self.config.iterations}  loss {line['loss']:.4f}  "
                f"{line['images_per_second']:.1f} images/s  {left // 60}:{left % 60:02} left")
        if sys.stdout.isatty():
            print(f"\r\033[K{text}", end="", flush=True)
        elif line["iteration"] % (5 * self.config.log_every) == 0:
            print(text, flush=True)


@torch.inference_mode()
def write_sample_grid(label_maps, captions, data, device: torch.device, path: Path, count: int = 6) -> None:
    """A picture of the first validation images: image | label | `label_maps`(normalised image [1, 3, H, W]), a list of [H, W]."""
    rows = []
    for item in EvaluationSet(data.val[:count], data.root, data.info.num_classes):
        images = normalize(item["image"][None].to(device))
        rows.append((item["image"].numpy(), item["label"].numpy(), *(label_map.byte().cpu().numpy() for label_map in label_maps(images))))
    sample_grid(rows, data.info.classes, data.info.palette, path, captions)


def check_options(checkpoint: dict, method: str, config, folder: Path, remedy: str = "choose another --output") -> None:
    """Raise UserError unless the checkpoint is of a run with these options."""
    theirs, ours = checkpoint["config"], dataclasses.asdict(config)
    # An option that the checkpoint does not know is younger than it.
    changed = [name for name in ours if name not in RESUMABLE and name in theirs and theirs[name] != ours[name]]
    if checkpoint["method"] != method or changed:
        what = ", ".join(f"--{name.replace('_', '-')} {theirs.get(name)}" for name in changed) or checkpoint["method"]
        raise UserError(f"{folder} holds a run with other options ({what}): repeat its options to go on with it, or {remedy}")


def is_line_until(line: str, iteration: int) -> bool:
    try:
        return json.loads(line)["iteration"] <= iteration
    except (ValueError, KeyError):  # the line that a kill cut off
        return False


def open_tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter(str(folder / "tensorboard"))
