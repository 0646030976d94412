"""Ranks, devices, seeds, precision, learning rate, weight averaging: what a training loop stands on.

Everything works in one plain process and under torchrun (one node or many); the collectives below are the identity
when there is no process group, so that a method's loop has one form.
"""

import contextlib
import copy
import functools
import inspect
import os
import random
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.augment import IGNORE


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, where, and what to do."""


def run_main(main) -> None:
    """Call `main()`; print a UserError as one line and exit with status 1. Leaves the process group either way."""
    try:
        status = main()
    except UserError as error:
        # An error in a loader worker arrives with the worker's traceback around it; its last line is ours.
        message = str(error).strip().splitlines()[-1].removeprefix("common.runtime.UserError: ")
        print(f"error: {message}", file=sys.stderr, flush=True)
        status = 1
    finally:
        finish()
    sys.exit(status)


# ---------------------------------------------------------------- ranks


@dataclass(frozen=True)
class Context:
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(device: str | None = None) -> Context:
    """Join torchrun's process group if there is one (nccl on GPUs, gloo on CPUs) and choose this rank's device."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind.split(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"--device takes cpu or cuda (cuda:1, ...), not {kind!r}")
    if kind.startswith("cuda"):
        if not torch.cuda.is_available():
            raise UserError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"rank {local_rank} of this node has no GPU: there are {torch.cuda.device_count()}; "
                            f"lower --nproc_per_node")
        if kind == "cuda":
            kind = f"cuda:{local_rank}"
        torch.cuda.set_device(kind)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if kind.startswith("cuda") else "gloo")
    grouped = dist.is_initialized()
    return Context(dist.get_rank() if grouped else 0, dist.get_world_size() if grouped else 1, torch.device(kind))


def finish() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, in place; without a process group the tensor itself."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def main_first(context: Context):
    """The first rank of every node runs the block before the others do: for work that fills a shared folder."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        barrier()
    try:
        yield
    finally:  # also after an error, so that the others meet it too instead of waiting
        if first:
            barrier()


def roll_global_batch(batch: Tensor) -> Tensor:
    """Each image's neighbour in the *global* batch: torch.roll by one over the concatenation of all ranks' [B, ...].

    CutMix takes its partners from here, so that one image a GPU still mixes and the number of GPUs changes nothing.
    """
    rolled = torch.roll(batch, 1, dims=0)
    if dist.is_initialized():
        last = [torch.empty_like(batch[-1]) for _ in range(dist.get_world_size())]
        dist.all_gather(last, batch[-1].contiguous())
        rolled[0] = last[dist.get_rank() - 1]
    return rolled


def pixel_counts(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Non-ignored pixels of each view in the whole batch, as the mean over ranks: what the loss sums are divided by.

    `parts` of the batch hold "label" [B, H, W] and masks of views, bool [B, H, W], whose names end with "valid". With
    these counts, neither the number of ranks nor of accumulated parts changes the weight of a pixel.
    """
    names = [name for name in parts[0] if name.endswith("valid")]
    counts = [sum((part["label"] != IGNORE).sum() for part in parts)] + [sum(part[name].sum() for part in parts) for name in names]
    counts = all_reduce_sum(torch.stack(counts).float())
    return dict(zip(["label", *names], (counts / world_size()).clamp(min=1).unbind()))


# ---------------------------------------------------------------- seeds and precision


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict:
    """Every generator that training draws from on this rank. Loader workers need none: see common.data."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}


def set_rng_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def bf16_is_fast(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


def wrap(model: nn.Module, config, context: Context, average_gradients: bool = True) -> nn.Module:
    """Move `model` to the device in the configured form; return what the loop calls (compiled and data-parallel).

    `model` keeps its parameters and its plain state dict, whatever wraps it. Batch-norm layers become SyncBatchNorm
    (in place of their parents) when several GPUs train together. average_gradients=False is for loops that make and reduce
    several gradients of one forward pass: ranks then only start from the same weights, as under DDP, no hook touches a
    gradient, and a compiled graph may be walked more than once.
    """
    device = context.device
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
    torch.backends.cudnn.benchmark = True
    if context.world_size > 1 and device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if getattr(config, "checkpoint_activations", False):
        checkpoint_activations(model)
    model.to(device, memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
    if config.compile and not average_gradients:
        import torch._functorch.config as functorch  # by default a compiled backward pass reuses what the forward pass left

        if hasattr(functorch, "donated_buffer"):
            functorch.donated_buffer = False
    network = torch.compile(model) if config.compile else model
    if context.world_size > 1 and not average_gradients:
        for tensor in model.state_dict().values():
            value = tensor.contiguous()
            dist.broadcast(value, src=0)
            tensor.copy_(value)
    elif context.world_size > 1:
        # Buffers are not broadcast: forward runs twice a step, and SyncBatchNorm keeps them equal (on CPUs see
        # `average_buffers`). The option's name changed in PyTorch 2.15.
        data_parallel = nn.parallel.DistributedDataParallel
        new_name = "forward_sync_buffers" in inspect.signature(data_parallel.__init__).parameters
        network = data_parallel(network, device_ids=[device.index] if device.type == "cuda" else None,
                                **{"forward_sync_buffers" if new_name else "broadcast_buffers": False})
    return network


def checkpoint_activations(model: nn.Module) -> None:
    """Keep of each residual or transformer block only its input for the backward pass, which computes the rest again.

    Running statistics of batch norm are those of the first time only.
    """
    for stage in model.modules():
        for block in getattr(stage, "checkpointed", lambda: ())():
            block.forward = functools.partial(checkpointed_forward, block, block.forward)


def checkpointed_forward(block: nn.Module, forward, *arguments):
    if not torch.is_grad_enabled():
        return forward(*arguments)
    return checkpoint(forward, *arguments, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), KeepStatistics(block)))


class KeepStatistics:
    """Within it, batch norm leaves its running statistics as they are. (Not to track them would save other tensors than the first time.)

    A class, as a graph that is walked twice enters it twice.
    """

    def __init__(self, block: nn.Module):
        self.layers = [(layer, layer.momentum) for layer in block.modules() if getattr(layer, "track_running_stats", False)]

    def __enter__(self) -> None:
        for layer, _ in self.layers:
            layer.momentum = 0.0

    def __exit__(self, *error) -> None:
        for layer, momentum in self.layers:
            layer.momentum = momentum
            layer.num_batches_tracked.sub_(1)


def autocast(config, device: torch.device):
    """bf16 autocast if --amp, or by default on GPUs where bf16 is native."""
    enabled = bf16_is_fast(device) if config.amp is None else config.amp
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def average_buffers(model: nn.Module) -> None:
    """Mean over ranks of the running statistics: ranks without SyncBatchNorm (CPUs) have seen different images.

    Before every evaluation and every save, so that all ranks use, keep and resume from the same ones.
    """
    if dist.is_initialized():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= dist.get_world_size()


def split_batch(batch: dict[str, Tensor], parts: int, device: torch.device) -> list[dict[str, Tensor]]:
    """The batch on the device, cut along its first dimension for gradient accumulation."""
    batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    columns = {name: value.chunk(parts) for name, value in batch.items()}
    return [{name: column[part] for name, column in columns.items()} for part in range(parts)]


def no_sync_unless(last: bool, network: nn.Module):
    """DDP sums gradients over ranks only in the last of the accumulated backward passes."""
    if last or not isinstance(network, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return network.no_sync()


# ---------------------------------------------------------------- schedule and averaging


def poly_lr(optimizer: torch.optim.Optimizer, iteration: int, total: int, power: float = 0.9) -> None:
    """Learning rate of each group = its initial one x (1 - iteration/total)^power."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * (1 - iteration / total) ** power


class WeightAverage:
    """Exponential moving average of a model's parameters and running statistics, in fused multi-tensor calls.

    The decay of update k (from 0) is min(1 - 1/(k+1), decay), so the first steps are not held by the random start.
    Make it after `wrap`, which may move the model's tensors.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values()))
        self.averaged, self.sources = zip(*((a, b) for a, b in pairs if a.is_floating_point()))
        self.counters = [(a, b) for a, b in pairs if not a.is_floating_point()]  # such as num_batches_tracked

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        decay = min(1 - 1 / (iteration + 1), self.decay)
        torch._foreach_lerp_(self.averaged, self.sources, 1 - decay)
        for counter, source in self.counters:
            counter.copy_(source)

    def state_dict(self) -> dict:
        return self.model.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state)
