"""Xception-65: the public file's keys, the network by hand, strides, files that load or not, training."""

import pytest
import torch
import torch.nn.functional as F

import usrn
from common.deeplab import DeepLabV3Plus, build_encoder
from common.runtime import UserError
from common.xception import Block, SeparableConv, Xception65

NORM = ("weight", "bias", "running_mean", "running_var")


def norm_shapes(name: str, channels: int) -> dict:
    return {f"{name}.{part}": (channels,) for part in NORM}


def separable_shapes(name: str, channels: int, out: int) -> dict:
    return {f"{name}.depthwise.weight": (channels, 1, 3, 3), **norm_shapes(f"{name}.bn1", channels),
            f"{name}.pointwise.weight": (out, channels, 1, 1), **norm_shapes(f"{name}.bn2", out)}


BLOCK2 = {  # written out once
    "block2.skip.weight": (256, 128, 1, 1),
    "block2.skipbn.weight": (256,), "block2.skipbn.bias": (256,), "block2.skipbn.running_mean": (256,), "block2.skipbn.running_var": (256,),
    "block2.sepconv1.depthwise.weight": (128, 1, 3, 3),
    "block2.sepconv1.bn1.weight": (128,), "block2.sepconv1.bn1.bias": (128,),
    "block2.sepconv1.bn1.running_mean": (128,), "block2.sepconv1.bn1.running_var": (128,),
    "block2.sepconv1.pointwise.weight": (256, 128, 1, 1),
    "block2.sepconv1.bn2.weight": (256,), "block2.sepconv1.bn2.bias": (256,),
    "block2.sepconv1.bn2.running_mean": (256,), "block2.sepconv1.bn2.running_var": (256,),
    **separable_shapes("block2.sepconv2", 256, 256), **separable_shapes("block2.sepconv3", 256, 256),
}
SHAPES = {
    "conv1.weight": (32, 3, 3, 3), **norm_shapes("bn1", 32), "conv2.weight": (64, 32, 3, 3), **norm_shapes("bn2", 64),
    "block1.skip.weight": (128, 64, 1, 1), **norm_shapes("block1.skipbn", 128), **separable_shapes("block1.sepconv1", 64, 128),
    **separable_shapes("block1.sepconv2", 128, 128), **separable_shapes("block1.sepconv3", 128, 128),
    **BLOCK2,
    "block3.skip.weight": (728, 256, 1, 1), **norm_shapes("block3.skipbn", 728), **separable_shapes("block3.sepconv1", 256, 728),
    **separable_shapes("block3.sepconv2", 728, 728), **separable_shapes("block3.sepconv3", 728, 728),
    **{key: shape for block in range(4, 20) for part in (1, 2, 3) for key, shape in separable_shapes(f"block{block}.sepconv{part}", 728, 728).items()},
    "block20.skip.weight": (1024, 728, 1, 1), **norm_shapes("block20.skipbn", 1024), **separable_shapes("block20.sepconv1", 728, 728),
    **separable_shapes("block20.sepconv2", 728, 1024), **separable_shapes("block20.sepconv3", 1024, 1024),
    **separable_shapes("conv3", 1024, 1536), **separable_shapes("conv4", 1536, 1536), **separable_shapes("conv5", 1536, 2048),
}


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """The public file's keys and shapes; values that keep the features' size and matter in every layer."""
    torch.manual_seed(0)
    return {key: torch.randn(shape) * (2 / shape[1:].numel()) ** 0.5 if len(shape) > 1 else torch.rand(shape) + 0.5 if key.endswith(("weight", "var"))
            else 0.3 * torch.randn(shape) for key, shape in ((key, torch.Size(shape)) for key, shape in SHAPES.items())}


@pytest.fixture(scope="module")
def encoder(state) -> Xception65:
    with torch.device("meta"):
        encoder = Xception65()
    encoder.to_empty(device="cpu").load_state_dict(state)
    return encoder.requires_grad_(False).eval()


# ---------------------------------------------------------------- the public network


def norm_by_hand(x, state, name):
    return F.batch_norm(x, state[f"{name}.running_mean"], state[f"{name}.running_var"], state[f"{name}.weight"], state[f"{name}.bias"])


def separable_by_hand(x, state, name, stride=1):
    """Without the ReLUs."""
    x = norm_by_hand(F.conv2d(x, state[f"{name}.depthwise.weight"], stride=stride, padding=1, groups=x.shape[1]), state, f"{name}.bn1")
    return norm_by_hand(F.conv2d(x, state[f"{name}.pointwise.weight"]), state, f"{name}.bn2")


def network_by_hand(images, state):
    """low and high: the public network layer by layer, without this project's modules."""
    x = F.relu(norm_by_hand(F.conv2d(images, state["conv1.weight"], stride=2, padding=1), state, "bn1"))
    x = F.relu(norm_by_hand(F.conv2d(x, state["conv2.weight"], padding=1), state, "bn2"))
    for block in range(1, 21):
        name, stride = f"block{block}", 2 if block < 4 else 1
        if block in (1, 2, 3, 20):
            shortcut = norm_by_hand(F.conv2d(x, state[f"{name}.skip.weight"], stride=stride), state, f"{name}.skipbn")
        else:
            shortcut = x.clamp(min=0)  # the in-place ReLU
        x = separable_by_hand(F.relu(x), state, f"{name}.sepconv1")
        x = separable_by_hand(F.relu(x), state, f"{name}.sepconv2")
        low = x if block == 2 else low if block > 2 else None
        x = separable_by_hand(F.relu(x), state, f"{name}.sepconv3", stride) + shortcut
    for name in ("conv3", "conv4", "conv5"):
        channels = x.shape[1]
        x = F.relu(norm_by_hand(F.conv2d(x, state[f"{name}.depthwise.weight"], padding=1, groups=channels), state, f"{name}.bn1"))
        x = F.relu(norm_by_hand(F.conv2d(x, state[f"{name}.pointwise.weight"]), state, f"{name}.bn2"))
    return low, x


def test_state_dict_is_that_of_the_public_file():
    with torch.device("meta"):
        encoder, model = Xception65(), DeepLabV3Plus("xception65", 81, "none")
    own = {key: tuple(value.shape) for key, value in encoder.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert own == SHAPES
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 37_867_312
    assert sum(parameter.numel() for parameter in model.parameters()) == 54_726_881  # the field's tables: 54.7 M


@pytest.mark.parametrize("height, width", [(33, 33), (32, 48)])
def test_features_are_those_of_the_network_by_hand(encoder, state, height, width):
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    for feature, expected in zip(encoder(images), network_by_hand(images, state)):
        assert expected.std() > 0.1
        torch.testing.assert_close(feature, expected, rtol=1e-5, atol=1e-5)


def test_batch_norm_is_that_of_the_public_network(encoder):
    norms = [module for module in encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) == 2 + 4 + 2 * 63 and {(norm.momentum, norm.eps) for norm in norms} == {(3e-4, 1e-5)}


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize("height, width", [(65, 33), (40, 64), (17, 90), (1, 1)])
def test_strides_are_4_and_16_and_the_parts_make_the_whole(encoder, height, width):
    images = torch.randn(1, 3, height, width)
    low, high = encoder(images)
    assert low.shape == (1, 256, -(-height // 4), -(-width // 4)) and high.shape == (1, 2048, -(-height // 16), -(-width // 16))
    assert low.min() < 0 and high.min() >= 0
    both = encoder.low_level(images)
    assert torch.equal(both[:, :256], low) and torch.equal(encoder.high_level(both), high)


def test_low_level_carries_what_high_level_reads_at_every_size(encoder):
    for size in (*range(1, 40), 321, 513):
        images = torch.randn(1, 3, size, 7)
        assert torch.equal(encoder.low_level(images)[:, 256:, ::2, ::2], encoder.entry(images)[1]), size


def test_nothing_is_dilated_and_four_convolutions_halve_the_resolution(encoder):
    convs = {name: module for name, module in encoder.named_modules() if isinstance(module, torch.nn.Conv2d)}
    assert {conv.dilation for conv in convs.values()} == {(1, 1)}
    assert {name for name, conv in convs.items() if conv.stride == (2, 2)} == {
        "conv1", *(f"block{block}.{part}" for block in (1, 2, 3) for part in ("skip", "sepconv3.depthwise"))}


def test_modules_stand_alone():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 9, 8)
    assert SeparableConv(6, 10, stride=2)(x).shape == (2, 10, 5, 4)
    assert SeparableConv(6, 10, relu_first=False)(x).min() == 0
    block = Block(6, 6, 6)
    torch.nn.init.zeros_(block.sepconv3.bn2.weight)
    assert torch.equal(block(x), x.relu()) and block(x).min() == 0
    inner, out = Block(6, 8, 10, stride=2).stages(x)
    assert inner.shape == (2, 10, 9, 8) and out.shape == (2, 10, 5, 4)


# ---------------------------------------------------------------- files


def test_the_public_file_loads_as_it_is_and_a_wrong_one_is_explained(state, tmp_path):
    path = tmp_path / "xception.pth"
    state = {key: torch.tensor(float(index)).expand(value.shape) for index, (key, value) in enumerate(state.items())}  # takes no space
    leftovers = {"bn1._itr": torch.zeros(1), "bn1._tmp_running_mean": torch.zeros(32), "bn1.num_batches_tracked": torch.tensor(7)}
    torch.save({**state, **leftovers}, path)
    own = build_encoder("xception65", str(path)).state_dict()
    assert all(torch.equal(own[key], value) for key, value in state.items()) and own["bn1.num_batches_tracked"] == 0

    def message(weights: str) -> str:
        with pytest.raises(UserError) as caught, torch.device("meta"):
            build_encoder("xception65", weights)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, path)
    assert "do not fit the backbone xception65: bn1.weight is missing; bn1.bias is missing; bn1.running_mean is missing and " in message(str(path))
    torch.save({**state, "conv1.weight": torch.zeros(64, 3, 7, 7), "head.weight": torch.zeros(1)}, path)
    assert message(str(path)).endswith(": head.weight is unknown; conv1.weight is [64, 3, 7, 7] instead of [32, 3, 3, 3]")
    assert "--weights PATH" in message("default") and "nowhere.pth" in message("nowhere.pth")


# ---------------------------------------------------------------- training


def test_a_step_in_bf16_trains_every_parameter_and_moves_statistics_slowly():
    """Labeled and unlabeled pictures in one pass, the last ones perturbed, as a step of daw.py has it."""
    torch.manual_seed(0)
    model = DeepLabV3Plus("xception65", 3, "none").to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameter_groups(0.01, 10), momentum=0.9)
    images, label = torch.randn(3, 3, 33, 33).contiguous(memory_format=torch.channels_last), torch.randint(0, 3, (4, 33, 33))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, perturbed = model(images, perturb=1)
        loss = F.cross_entropy(torch.cat([logits, perturbed]), label)
    assert logits.dtype == torch.float32 and logits.shape == (3, 3, 33, 33) and loss.isfinite()
    loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    before = model.encoder.block20.sepconv2.pointwise.weight.clone()
    optimizer.step()
    assert not torch.equal(model.encoder.block20.sepconv2.pointwise.weight, before)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    variance = model.encoder.bn1.running_var
    assert 0 < (variance - 1).abs().max() < 0.01


@pytest.mark.parametrize("share", ["low", "all"])
def test_usrn_shares_its_first_part(encoder, share):
    torch.manual_seed(0)
    with torch.device("meta"):
        model, subclass_model = DeepLabV3Plus("xception65", 2, "none"), DeepLabV3Plus("xception65", 5, "none")
    model.encoder = encoder
    both = usrn.USRN(model, subclass_model, share, pool=0)
    names = {name for name, _ in subclass_model.encoder.named_children()}
    assert names == {"low": {*(f"block{block}" for block in range(3, 21)), "conv3", "conv4", "conv5"}, "all": set()}[share]
    low = encoder.low_level(torch.randn(2, 3, 33, 33))
    high = low.new_empty(2, 2048, 3, 3, device="meta")
    assert both.subclass_model.decode(low.to("meta"), high).shape == (2, 256, 9, 9)
    if share == "low":
        assert both.subclass_model.encoder.high_level(low.to("meta")[:1]).shape == (1, 2048, 3, 3)
