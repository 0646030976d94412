"""common/backbones.py: public files' keys, networks by hand, strides, weights, checkpointing."""

import copy
import functools
import math
import re
import urllib.error
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.vision_transformer import EncoderBlock

from common.backbones import (DEFAULT_WEIGHTS, VisionTransformer, build_encoder,
                              checkpoint_activations, random_weights_like)
from programs import error_of

NORM = ("weight", "bias", "running_mean", "running_var")


def shapes_of(module: nn.Module) -> dict[str, tuple]:
    state = module.state_dict().items()
    return {key: tuple(value.shape) for key, value in state if not key.endswith("batches_tracked")}


def norm_by_hand(x, state, name):
    weight, bias, mean, variance = (state[f"{name}.{part}"] for part in NORM)
    return F.batch_norm(x, mean, variance, weight, bias)


def constants(shapes: dict[str, tuple]) -> dict[str, torch.Tensor]:
    """One value a key, which takes no space."""
    return {key: torch.tensor(float(i)).expand(shapes[key]) for i, key in enumerate(shapes)}


def save(state: dict, path) -> str:
    torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("backbone, weights, strides", [
    ("resnet50", "none", (4, 16)), ("resnet50", "deep_stem", (4, 16)), ("tiny", "none", (2, 8)),
    ("xception65", "none", (4, 16)), ("mobilenet_v2", "none", (4, 16))])
def test_strides_and_the_two_halves(backbone, weights, strides):
    encoder = build_encoder(backbone, weights).eval()
    state = nn.ModuleDict({"encoder": encoder}).state_dict()
    assert random_weights_like(state) == weights  # as a checkpoint's network is built
    images = torch.randn(1, 3, 33, 50)
    for name in ("conv1.3", "layer1.0.conv1") if weights == "deep_stem" else ():
        weight = encoder.get_submodule(name).weight
        deviation = math.sqrt(2 / weight[:, 0].numel())  # He et al. 2015
        assert weight.std().item() == pytest.approx(deviation, rel=0.1)
    with torch.no_grad():
        low, high = encoder(images)
        both = encoder.low_level(images)
        again = encoder.high_level(both)
    channels = (encoder.low_channels, encoder.high_channels)
    for x, count, stride in zip((low, high), channels, strides):
        assert x.shape == (1, count, -(-33 // stride), -(-50 // stride))
    assert torch.equal(both[:, : encoder.low_channels], low) and torch.equal(again, high)
    # Another encoder computes the low part: without its modules the high part is the same.
    for name in encoder.low_parts:
        encoder.set_submodule(name, nn.Identity())
    with torch.no_grad():
        assert torch.equal(encoder.high_level(both), high)


def test_torchvisions_resnet_loads_as_it_is(tmp_path):
    resnet = torchvision.models.resnet50()
    encoder = build_encoder("resnet50", save(resnet.state_dict(), tmp_path / "resnet50.pth")).eval()
    own, theirs = encoder.state_dict(), resnet.state_dict()
    assert all(torch.equal(own[key], theirs[key]) for key in own)
    dilated = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True])
    dilated.load_state_dict(resnet.state_dict())
    x = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        want = nn.Sequential(*list(dilated.eval().children())[:-2])(x)
        torch.testing.assert_close(encoder(x)[1], want)


STEM_AND_FIRST_BLOCK = {  # of the field's resnet50.pth; the rest is torchvision's
    "conv1.0.weight": (64, 3, 3, 3), "conv1.3.weight": (64, 64, 3, 3),
    "conv1.6.weight": (128, 64, 3, 3),
    **{f"conv1.{index}.{part}": (64,) for index in (1, 4) for part in NORM},
    **{f"bn1.{part}": (128,) for part in NORM},
    "layer1.0.conv1.weight": (64, 128, 1, 1), "layer1.0.downsample.0.weight": (256, 128, 1, 1),
}


def test_the_fields_resnet_with_the_deep_stem_loads_as_it_is(tmp_path):
    with torch.device("meta"):
        shapes = shapes_of(torchvision.models.resnet50())  # the field's: fc too, no counters
    rest = {key: shapes[key] for key in shapes if not key.startswith(("conv1.", "bn1."))}
    torch.manual_seed(0)
    stem = {key: torch.rand(shape) - (0.4 if len(shape) > 1 else -0.5)
            for key, shape in STEM_AND_FIRST_BLOCK.items()}
    state = constants(rest) | stem
    path = save(state, tmp_path / "resnet50.pth")
    encoder = build_encoder("resnet50", path).eval()
    own = encoder.state_dict()
    kept = {key: value for key, value in state.items() if not key.startswith("fc.")}
    assert shapes_of(encoder) == {key: tuple(value.shape) for key, value in kept.items()}
    assert all(torch.equal(own[key], value) for key, value in kept.items())
    seen, images = [], torch.randn(1, 3, 33, 47)
    encoder.layer1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        encoder.low_level(images)
    x = F.conv2d(images, state["conv1.0.weight"], stride=2, padding=1)
    x = F.conv2d(F.relu(norm_by_hand(x, state, "conv1.1")), state["conv1.3.weight"], padding=1)
    x = F.conv2d(F.relu(norm_by_hand(x, state, "conv1.4")), state["conv1.6.weight"], padding=1)
    x = F.max_pool2d(F.relu(norm_by_hand(x, state, "bn1")), 3, stride=2, padding=1)
    torch.testing.assert_close(seen[0], x, rtol=1e-5, atol=1e-4)

    line = error_of(build_encoder, "resnet101", path)
    assert 'do not fit: Missing key(s) in state_dict: "layer3.6.' in line
    path = save(state | {"conv1.6.weight": torch.zeros(64, 64, 3, 3)}, tmp_path / "other.pth")
    assert "size mismatch for conv1.6.weight" in error_of(build_encoder, "resnet50", path)


def test_torchvisions_mobilenet_loads_and_every_second_feature_is_its_own(tmp_path):
    torch.manual_seed(0)
    network = torchvision.models.mobilenet_v2()
    images = torch.randn(2, 3, 65, 98)
    with torch.no_grad():
        for _ in range(30):
            network(images)  # statistics that keep the features' size
        network.eval()
        low, high = network.features[:4](images), network.features[:18](images)
    state = network.state_dict()
    bare = {key: state[key] for key in state if not key.startswith(("classifier.", "features.18."))}
    path = save(bare, tmp_path / "up_to_features_17.pth")
    loaded = build_encoder("mobilenet_v2", path).state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in bare if "tracked" not in key)
    encoder = build_encoder("mobilenet_v2", save(state, tmp_path / "whole.pth")).eval()
    with torch.no_grad():
        ours = encoder(images)
    assert high.std() > 0.1
    torch.testing.assert_close(ours[0], low)
    torch.testing.assert_close(ours[1][:, :, ::2, ::2], high, rtol=1e-4, atol=1e-4)


def separable_by_hand(x, state, name, stride=1, after=lambda x: x):
    x = F.conv2d(x, state[f"{name}.depthwise.weight"], None, stride, 1, groups=x.shape[1])
    x = after(norm_by_hand(x, state, f"{name}.bn1"))
    return after(norm_by_hand(F.conv2d(x, state[f"{name}.pointwise.weight"]), state, f"{name}.bn2"))


def xception_by_hand(images, state):
    """low and high: the public network layer by layer, without this project's modules."""
    x = F.relu(norm_by_hand(F.conv2d(images, state["conv1.weight"], None, 2, 1), state, "bn1"))
    x = F.relu(norm_by_hand(F.conv2d(x, state["conv2.weight"], None, 1, 1), state, "bn2"))
    for block in range(1, 21):
        name, stride = f"block{block}", 2 if block < 4 else 1
        shortcut = x.clamp(min=0)  # the in-place ReLU
        if block in (1, 2, 3, 20):
            shortcut = F.conv2d(x, state[f"{name}.skip.weight"], stride=stride)
            shortcut = norm_by_hand(shortcut, state, f"{name}.skipbn")
        x = separable_by_hand(F.relu(x), state, f"{name}.sepconv1")
        x = separable_by_hand(F.relu(x), state, f"{name}.sepconv2")
        low = x if block == 2 else low if block > 2 else None
        x = separable_by_hand(F.relu(x), state, f"{name}.sepconv3", stride) + shortcut
    for name in ("conv3", "conv4", "conv5"):
        x = separable_by_hand(x, state, name, after=F.relu)
    return low, x


def test_xception_is_the_public_network(tmp_path):
    torch.manual_seed(0)
    with torch.device("meta"):
        state = shapes_of(build_encoder("xception65", "none"))
    for key, shape in state.items():
        state[key] = 0.3 * torch.randn(shape)
        if len(shape) > 1:  # values that keep the features' size
            state[key] = torch.randn(shape) * (2 / math.prod(shape[1:])) ** 0.5
        elif key.endswith(("weight", "var")):
            state[key] = torch.rand(shape) + 0.5
    leftovers = {"bn1._itr": torch.zeros(1), "bn1._tmp_running_mean": torch.zeros(32),
                 "bn1.num_batches_tracked": torch.tensor(7)}
    path = save(state | leftovers, tmp_path / "xception.pth")
    encoder = build_encoder("xception65", path).requires_grad_(False).eval()
    asked = mock.MagicMock()  # a dict that remembers what it was asked for
    asked.__getitem__.side_effect = state.__getitem__
    for height, width in ((33, 33), (32, 48)):
        images = torch.randn(2, 3, height, width)
        for features, want in zip(encoder(images), xception_by_hand(images, asked)):
            assert want.std() > 0.1
            torch.testing.assert_close(features, want, rtol=1e-5, atol=1e-5)
    assert {call.args[0] for call in asked.__getitem__.call_args_list} == state.keys()
    assert len(state) == 660  # the public names
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(3e-4, 1e-5)}
    # low_level carries block2's output, each value four times: high_level has it at every size.
    seen = []
    encoder.block2.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
    for size in (*range(1, 40), 321, 513):
        both = encoder.low_level(torch.randn(1, 3, size, 7))
        assert torch.equal(both[:, 256:, ::2, ::2], seen[-1]), size


BLOCK_SHAPES = {  # of one of the twelve blocks of dinov2_vits14_pretrain.pth
    "norm1.weight": (384,), "norm1.bias": (384,),
    "attn.qkv.weight": (1152, 384), "attn.qkv.bias": (1152,),
    "attn.proj.weight": (384, 384), "attn.proj.bias": (384,), "ls1.gamma": (384,),
    "norm2.weight": (384,), "norm2.bias": (384,),
    "mlp.fc1.weight": (1536, 384), "mlp.fc1.bias": (1536,),
    "mlp.fc2.weight": (384, 1536), "mlp.fc2.bias": (384,), "ls2.gamma": (384,),
}
DINOV2_SHAPES = {
    "cls_token": (1, 1, 384), "pos_embed": (1, 1370, 384), "mask_token": (1, 384),
    "patch_embed.proj.weight": (384, 3, 14, 14), "patch_embed.proj.bias": (384,),
    **{f"blocks.{i}.{key}": shape for i in range(12) for key, shape in BLOCK_SHAPES.items()},
    "norm.weight": (384,), "norm.bias": (384,),
}


def test_dinov2s_state_dict_is_that_of_the_public_file():
    encoder = build_encoder("dinov2_s", "none")
    assert shapes_of(encoder) == DINOV2_SHAPES
    assert (encoder.patch, encoder.grid) == (14, 37) and encoder.blocks[0].heads == 6


def torchvisions_block(block: nn.Module) -> EncoderBlock:
    """With the block's weights; it scales neither sum, so its last layers take that over."""
    state = block.state_dict()
    for gamma, last in (("ls1.gamma", "attn.proj"), ("ls2.gamma", "mlp.fc2")):
        scale = torch.diag(state.pop(gamma))
        for part in ("weight", "bias"):
            state[f"{last}.{part}"] = scale @ state[f"{last}.{part}"]
    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    theirs = EncoderBlock(block.heads, 12, 48, 0.0, 0.0, norm).double()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), state.values(), strict=True)))
    return theirs


@pytest.mark.parametrize("h, w", [(3, 3), (2, 5)])
def test_vision_transformer_is_torchvisions(h, w):
    torch.manual_seed(0)
    encoder = VisionTransformer(image_size=12, patch=4, dim=12, depth=8, heads=3).double()
    encoder.requires_grad_(False)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    images = torch.randn(2, 3, 4 * h, 4 * w, dtype=torch.float64)
    first, grid = encoder.pos_embed.split([1, 9], dim=1)
    grid = F.interpolate(grid.mT.view(1, 12, 3, 3), size=(h, w), mode="bicubic")
    weight, bias = encoder.patch_embed["proj"].parameters()
    patches = F.unfold(images, 4, stride=4).mT @ weight.flatten(1).T + bias  # [2, h w, 12]
    cls_token = (encoder.cls_token + first).expand(2, 1, 12)
    x, expected = torch.cat([cls_token, patches + grid.flatten(2).mT], dim=1), []
    for number, block in enumerate(encoder.blocks, 1):
        x = torchvisions_block(block)(x)
        if number in (2, 4, 6, 8):
            normalised = F.layer_norm(x, (12,), encoder.norm.weight, encoder.norm.bias, 1e-6)
            expected.append(normalised[:, 1:].mT.view(2, 12, h, w))
    torch.testing.assert_close(encoder(images), expected, rtol=1e-8, atol=1e-10)


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("backbone", ["resnet50", "resnet101", "mobilenet_v2", "dinov2_s"])
def test_default_weights_are_the_public_files(backbone, monkeypatch):
    with torch.device("meta"):
        shapes = shapes_of(build_encoder(backbone, "none"))
    state, asked = constants(shapes), []

    def download(url, **options):
        asked.append(url)
        hashed = options["file_name"] or url  # torch.hub compares what follows the last dash
        assert options["check_hash"] and re.search(r"-[0-9a-f]{8,}\.pth$", hashed)
        return state if backbone == "dinov2_s" else state | {"fc.weight": torch.zeros(1)}

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    own = build_encoder(backbone).state_dict()
    assert all(torch.equal(own[key], state[key]) for key in state)
    if backbone != "dinov2_s":  # the ImageNet weights that the field's tables start from
        weights = torchvision.models.get_model_weights(backbone)
        assert asked == [weights.IMAGENET1K_V1.url]

    offline = mock.Mock(side_effect=urllib.error.URLError("no network"))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    text = error_of(build_encoder, backbone, "default")
    assert "no network" in text and "--weights PATH" in text and DEFAULT_WEIGHTS[backbone] in text


def test_weights_that_cannot_be_had_are_explained(tmp_path):
    message = functools.partial(error_of, build_encoder)
    (tmp_path / "text.pth").write_text("not weights")
    assert "text.pth" in message("resnet50", str(tmp_path / "text.pth"))
    assert "nowhere.pth" in message("tiny_vit", "nowhere.pth")
    assert "--weights PATH" in message("xception65", "default")
    assert '"stem.0.0.weight"' in message("tiny", save({}, tmp_path / "empty.pth"))
    assert "numbers.pth" in message("tiny", save({0: torch.zeros(1)}, tmp_path / "numbers.pth"))
    state = build_encoder("tiny", "none").state_dict()
    path = save(state, tmp_path / "tiny.pth")
    assert 'state_dict: "conv1.weight", "bn1.weight"' in message("resnet50", path)
    del state["layer4.conv2.1.bias"]
    assert '"layer4.conv2.1.bias"' in message("tiny", save(state, tmp_path / "less.pth"))
    for backbone in ("tiny", "xception65", "mobilenet_v2", "dinov2_s"):
        assert f"{backbone} has one stem only" in message(backbone, "deep_stem")
    assert "resnet50" in message("resnet18", "none")


@pytest.mark.parametrize("backbone", ["resnet50", "mobilenet_v2", "tiny", "tiny_vit"])
def test_weights_are_found_wherever_people_keep_them(backbone, tmp_path):
    state = constants(shapes_of(build_encoder(backbone, "none")))
    named = {prefix: {prefix + key: value for key, value in state.items()}
             for prefix in ("module.", "module.backbone.")}
    more = named["module.backbone."] | {"module.head.weight": torch.zeros(1)}
    for content in (named["module."], {"state_dict": state, "epoch": 3}, {"model": more}):
        own = build_encoder(backbone, save(content, tmp_path / "kept.pth")).state_dict()
        assert all(torch.equal(own[key], state[key]) for key in state)


# ---------------------------------------------------------------- --checkpoint-activations


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


@pytest.mark.parametrize("make, channels, size, share", [
    (lambda: build_encoder("resnet50", "none").layer2, 256, 8, 0.5),
    (lambda: build_encoder("xception65", "none").block3, 256, 8, 0.2),
    (lambda: build_encoder("mobilenet_v2", "none"), 3, 32, 0.6),
    (lambda: build_encoder("tiny", "none"), 3, 32, 0.9),
    (lambda: build_encoder("tiny_vit", "none"), 3, 64, 0.7),
])
def test_checkpoints_train_alike_with_less_memory(make, channels, size, share):
    torch.manual_seed(0)
    plain = make().train()
    lean = copy.deepcopy(plain)
    checkpoint_activations(lean)
    assert "--compile" in error_of(checkpoint_activations, lean, True)
    average = copy.deepcopy(lean).eval()  # has blocks of its own
    images, losses = torch.randn(2, channels, size, size), []
    before = average(images)[-1]
    for network in (plain, lean):
        optimizer = torch.optim.SGD(network.parameters(), 0.01)
        for _ in range(2):  # two forward passes, and a graph that is walked twice
            loss = network(images)[-1].square().mean() + network(images.flip(3))[-1].mean()
            loss.backward(retain_graph=True)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            network(images)  # in training mode, without a graph: statistics move once
        losses.append(loss.detach())
    assert torch.equal(*losses)
    own = lean.state_dict()
    assert all(torch.equal(own[key], value) for key, value in plain.state_dict().items())
    assert torch.equal(average(images)[-1], before)
    assert kept_bytes(lean, images) < share * kept_bytes(plain, images)
