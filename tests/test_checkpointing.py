"""--checkpoint-activations: the same losses, gradients and statistics, with less kept for the backward pass; in every program."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common import runtime
from common.deeplab import DeepLabV3Plus
from common.dpt import DPT
from common.runtime import Context, WeightAverage
from programs import assert_identical, run_as_program, succeed, state

CPU = Context(0, 1, torch.device("cpu"))
CONFIG = {"tf32": True, "channels_last": False, "compile": False}


def networks(make) -> tuple[nn.Module, nn.Module]:
    """The same network twice: as it is, and with checkpoints."""
    torch.manual_seed(0)
    plain = make().train()
    lean = copy.deepcopy(plain)
    runtime.wrap(plain, SimpleNamespace(**CONFIG, checkpoint_activations=False), CPU)
    runtime.wrap(lean, SimpleNamespace(**CONFIG, checkpoint_activations=True), CPU)
    return plain, lean


def kept_bytes(network: nn.Module, images: torch.Tensor) -> int:
    """Of all tensors that the forward pass keeps for the backward pass, each once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(images)
    del output
    return sum(kept.values())


@pytest.mark.parametrize(("make", "size", "share"), [
    (lambda: DeepLabV3Plus("resnet50", 3, "none"), 32, 0.7), (lambda: DeepLabV3Plus("tiny", 3, "none"), 32, 0.9), (lambda: DPT("tiny_vit", 3, "none"), 64, 0.7)])
def test_the_same_training_with_less_memory(make, size, share):
    plain, lean = networks(make)
    images = torch.randn(2, 3, size, size)
    results = []
    for network in (plain, lean):
        optimizer = torch.optim.SGD(network.parameters(), 0.01)
        torch.manual_seed(1)
        for _ in range(2):
            loss = network(images).square().mean() + network(images.flip(3)).mean()  # two forward passes, as the methods have
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            network(images)  # in training mode, without a graph: statistics move once
        results.append(loss.detach())
    assert torch.equal(*results)
    assert_identical(plain.state_dict(), lean.state_dict())  # num_batches_tracked too
    assert kept_bytes(lean, images) < share * kept_bytes(plain, images)


def test_an_average_of_the_weights_does_not_share_the_blocks():
    _, lean = networks(lambda: DeepLabV3Plus("tiny", 3, "none"))
    average = WeightAverage(lean, 0.9)
    before = average.model(torch.ones(1, 3, 16, 16))
    with torch.no_grad():
        for parameter in lean.parameters():
            parameter.add_(1.0)
    assert torch.equal(average.model(torch.ones(1, 3, 16, 16)), before)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    succeed("-m", "common.synthetic", "--variant", "shapes", "--root", root)
    return root


@pytest.mark.parametrize("script", ["daw.py", "pos_meo.py", "diffmatch.py", "usrn.py"])
def test_every_program_ends_with_the_same_weights(script, shapes, tmp_path, monkeypatch, capfd):
    for name, more in (("plain", []), ("lean", ["--checkpoint-activations"])):
        options = ["--crop", "32", "--batch-size", "2", "--iterations", "2", "--num-workers", "0", "--data-root", shapes, "--output", tmp_path / name]
        status, _, err = run_as_program(script, monkeypatch, capfd, *options, *more)
        assert status == 0, err
    plain, lean = state(tmp_path / "plain"), state(tmp_path / "lean")
    assert_identical(plain["model"], lean["model"])
