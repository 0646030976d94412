"""DeepLabv3+: shapes, sizes, both stems of the ResNets, weights that load, feature perturbation."""

import dataclasses
import importlib
import urllib.error

import pytest
import torch
import torch.nn.functional as F
import torchvision

import daw
from common import evaluate
from common.deeplab import DeepLabV3Plus, PSPNet, ResNetEncoder, TinyEncoder, build_encoder, has_deep_stem
from common.runtime import UserError


def parameters(model: torch.nn.Module) -> float:
    """Millions."""
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


@pytest.mark.parametrize("backbone, published", [("resnet50", 40.48), ("resnet101", 59.47)])
def test_size_is_the_published_one_less_the_difference_of_the_stems(backbone, published):
    """The field's numbers are for a stem of three 3x3 convolutions: 3-64-64-128 with batch norm, then layer1 from 128."""
    deep_stem = 9 * (3 * 64 + 64 * 64 + 64 * 128) + 2 * (64 + 64 + 128) + 64 * (64 + 256)  # layer1 reads 64 channels more
    plain_stem = 49 * 3 * 64 + 2 * 64
    ours = parameters(DeepLabV3Plus(backbone, 21, "none"))
    assert ours == pytest.approx(published - (deep_stem - plain_stem) / 1e6, abs=0.006)


@pytest.mark.parametrize("backbone, published, exactly", [("resnet50", 40.48, 40_475_957), ("resnet101", 59.47, 59_468_085)])
def test_size_with_the_deep_stem_is_the_published_one(backbone, published, exactly):
    with torch.device("meta"):
        size = parameters(DeepLabV3Plus(backbone, 21, "deep_stem"))
    assert size == exactly / 1e6 and round(size, 2) == published


@pytest.mark.parametrize("deep_stem", [False, True])
def test_output_stride_is_16_and_the_last_stage_is_dilated(deep_stem):
    encoder = ResNetEncoder("resnet50", deep_stem).eval()
    low, high = encoder(torch.zeros(1, 3, 65, 97))
    assert low.shape == (1, 256, 17, 25) and high.shape == (1, 2048, 5, 7)
    dilations = {module.dilation for module in encoder.layer4.modules() if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3)}
    assert (2, 2) in dilations and all(module.stride == (1, 1) for module in encoder.layer4.modules() if isinstance(module, torch.nn.Conv2d))
    low, high = TinyEncoder().eval()(torch.zeros(1, 3, 64, 48))
    assert low.shape == (1, 24, 32, 24) and high.shape == (1, 96, 8, 6)


def test_torchvisions_state_dict_loads_as_it_is(tmp_path):
    resnet = torchvision.models.resnet50(weights=None)
    torch.save(resnet.state_dict(), tmp_path / "resnet50.pth")
    encoder = build_encoder("resnet50", str(tmp_path / "resnet50.pth"))
    assert torch.equal(encoder.layer4[2].conv3.weight, resnet.layer4[2].conv3.weight)
    # Same weights, undilated network: the stages before the dilation agree in every value.
    x = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        theirs = resnet.eval().layer1(resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x)))))
        assert torch.equal(encoder.eval()(x)[0], theirs)


STEM_AND_FIRST_BLOCK = {  # of the field's resnet50.pth; the rest is torchvision's
    "conv1.0.weight": (64, 3, 3, 3), "conv1.3.weight": (64, 64, 3, 3), "conv1.6.weight": (128, 64, 3, 3),
    **{f"conv1.{index}.{part}": (64,) for index in (1, 4) for part in ("weight", "bias", "running_mean", "running_var")},
    **{f"bn1.{part}": (128,) for part in ("weight", "bias", "running_mean", "running_var")},
    "layer1.0.conv1.weight": (64, 128, 1, 1), "layer1.0.downsample.0.weight": (256, 128, 1, 1),
}


def deep_stem_file() -> dict[str, torch.Tensor]:
    """A state dict with the keys and shapes of the field's resnet50.pth, with a classifier and without counters.

    The stem is random, everything else one value a key, which takes no space.
    """
    with torch.device("meta"):
        theirs = torchvision.models.resnet50(weights=None).state_dict()
    shapes = {key: tuple(value.shape) for key, value in theirs.items() if "num_batches" not in key and not key.startswith(("conv1.", "bn1."))}
    torch.manual_seed(0)
    stem = {key: torch.rand(shape) - 0.4 if len(shape) > 1 else torch.rand(shape) + 0.5 for key, shape in STEM_AND_FIRST_BLOCK.items()}
    return {**{key: torch.tensor(float(index)).expand(shape) for index, (key, shape) in enumerate(shapes.items())}, **stem}


def stem_by_hand(images: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """Images -> what stage 1 reads."""
    def norm(x, key):
        return F.batch_norm(x, *(state[f"{key}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")))

    x = F.relu(norm(F.conv2d(images, state["conv1.0.weight"], stride=2, padding=1), "conv1.1"))
    x = F.relu(norm(F.conv2d(x, state["conv1.3.weight"], padding=1), "conv1.4"))
    x = F.relu(norm(F.conv2d(x, state["conv1.6.weight"], padding=1), "bn1"))
    return F.max_pool2d(x, 3, stride=2, padding=1)


def test_the_fields_file_with_the_deep_stem_loads_as_it_is(tmp_path):
    state = deep_stem_file()
    torch.save(state, tmp_path / "resnet50.pth")
    encoder = build_encoder("resnet50", str(tmp_path / "resnet50.pth")).eval()
    own = encoder.state_dict()
    assert {key for key in own if not key.endswith("num_batches_tracked")} == {key for key in state if not key.startswith("fc.")}
    assert all(torch.equal(own[key], value) for key, value in state.items() if not key.startswith("fc."))
    seen, images = [], torch.randn(1, 3, 33, 47)
    encoder.layer1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        encoder.low_level(images)
    torch.testing.assert_close(seen[0], stem_by_hand(images, state), rtol=1e-5, atol=1e-4)

    with pytest.raises(UserError, match="resnet101: layer3.6.conv1.weight is missing; .* and [0-9]+ more$"), torch.device("meta"):
        build_encoder("resnet101", str(tmp_path / "resnet50.pth"))
    torch.save({**state, "conv1.6.weight": torch.zeros(64, 64, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"resnet50: conv1.6.weight is \[64, 64, 3, 3\] instead of \[128, 64, 3, 3\]$"), torch.device("meta"):
        build_encoder("resnet50", str(tmp_path / "other.pth"))


def test_a_checkpoint_says_which_stem_it_has(tmp_path):
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in DeepLabV3Plus("resnet50", 8, "deep_stem").state_dict().items()}
    state = {key: torch.tensor(float(index)).expand(shape) for index, (key, shape) in enumerate(shapes.items())}
    config = dataclasses.asdict(daw.Config(dataset="shapes", backbone="resnet50", weights="not/there/any/more.pth"))
    torch.save({"format": 1, "method": "daw", "config": config, "model": state}, tmp_path / "c.pt")
    loaded = evaluate.load_model(tmp_path / "c.pt", "cpu")[0].state_dict()
    assert all(torch.equal(loaded[key], value.to(loaded[key].dtype)) for key, value in state.items())


@pytest.mark.parametrize("method", ["daw", "usrn", "pos_meo", "diffmatch"])
@pytest.mark.parametrize("backbone, weights, deep", [
    ("resnet50", "none", False), ("resnet101", "deep_stem", True), ("tiny", "none", False), ("xception65", "none", False)])
def test_the_stem_is_recognised_in_every_methods_checkpoint(method, backbone, weights, deep):
    module = importlib.import_module(method)
    with torch.device("meta"):
        model = module.build_model(module.Config(backbone=backbone, weights=weights), 4)
    assert has_deep_stem(model.state_dict()) is deep


def test_weights_that_cannot_be_had_are_explained(tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    with pytest.raises(UserError, match="--weights PATH"):
        build_encoder("resnet50")
    with pytest.raises(UserError, match="nowhere.pth"):
        build_encoder("resnet50", "nowhere.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(UserError, match="text.pth"):
        build_encoder("resnet50", str(tmp_path / "text.pth"))
    torch.save(TinyEncoder().state_dict(), tmp_path / "tiny.pth")
    with pytest.raises(UserError, match="do not fit the backbone resnet50"):
        build_encoder("resnet50", str(tmp_path / "tiny.pth"))
    with pytest.raises(UserError, match="conv1.weight is missing; bn1.weight is missing; bn1.bias is missing and [0-9]+ more$"):
        build_encoder("resnet50", str(tmp_path / "tiny.pth"))
    torch.save({0: torch.zeros(1)}, tmp_path / "numbers.pth")
    with pytest.raises(UserError, match="numbers.pth"):
        build_encoder("resnet50", str(tmp_path / "numbers.pth"))
    with pytest.raises(UserError, match="resnet50"):
        build_encoder("resnet18")
    for backbone in ("tiny", "xception65"):
        with pytest.raises(UserError, match=f"{backbone} has one stem only"):
            build_encoder(backbone, "deep_stem")


def test_logits_have_the_images_size_and_constant_predictions_stay_constant():
    model = DeepLabV3Plus("tiny", 5, "none").eval()
    assert model(torch.randn(2, 3, 61, 90)).shape == (2, 5, 61, 90)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.arange(5.0))
        logits = model(torch.randn(1, 3, 40, 40))
    torch.testing.assert_close(logits, torch.arange(5.0).view(1, 5, 1, 1).expand(1, 5, 40, 40))


def test_perturbed_decoding_drops_whole_channels_of_the_last_images_only():
    torch.manual_seed(0)
    model = DeepLabV3Plus("tiny", 4, "none").eval()
    images = torch.randn(3, 3, 32, 32)
    seen = []
    model.aspp.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        logits, perturbed = model(images, perturb=2)
        plain = model(images)
    assert logits.shape == (3, 4, 32, 32) and perturbed.shape == (2, 4, 32, 32)
    torch.testing.assert_close(logits, plain)  # eval mode: the perturbed images do not touch the others
    clean, dropped = seen[0][1:3], seen[0][3:5]
    ratio = torch.where(clean > 0, dropped / clean, torch.nan)
    per_channel = ratio.flatten(2).nanmean(dim=2)
    kept = per_channel[~per_channel.isnan()]
    assert set(kept.round().tolist()) == {0.0, 2.0}  # a channel is gone, or twice itself
    assert not torch.allclose(perturbed, plain[1:])


@pytest.mark.parametrize("backbone, weights", [("tiny", "none"), ("resnet50", "none"), ("resnet50", "deep_stem"), ("xception65", "none")])
def test_parameter_groups_hold_every_parameter_once(backbone, weights):
    with torch.device("meta"):
        model = DeepLabV3Plus(backbone, 4, weights)
    encoder, head = model.parameter_groups(0.1, 10)
    assert (encoder["lr"], head["lr"]) == (0.1, 1.0)
    ids = [id(parameter) for group in (encoder, head) for parameter in group["params"]]
    assert sorted(ids) == sorted(id(parameter) for parameter in model.parameters())
    assert {id(parameter) for parameter in model.classifier.parameters()} <= {id(parameter) for parameter in head["params"]}


def test_upsampling_is_in_float32_under_autocast():
    """bf16 logits would move confidences across a threshold."""
    model = DeepLabV3Plus("tiny", 4, "none").eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.randn(1, 3, 32, 32)).dtype == torch.float32


@pytest.mark.parametrize("size", [32, 45])
def test_pspnet_by_hand(size):
    torch.manual_seed(0)
    model = PSPNet("tiny", 5, "none").eval()
    images = torch.randn(2, 3, size, size - 8)
    low, high = model.encoder(images)
    parts = [high]
    for bins, conv in zip((1, 2, 3, 6), model.pyramid):
        height, width = high.shape[2:]
        average = torch.stack([torch.stack([high[:, :, i * height // bins : -(-(i + 1) * height // bins), j * width // bins : -(-(j + 1) * width // bins)].mean((2, 3))
                                            for j in range(bins)], dim=2) for i in range(bins)], dim=2)
        parts.append(torch.nn.functional.interpolate(conv(average), size=(height, width), mode="bilinear", align_corners=True))
    logits = model.classifier(model.fuse(torch.cat(parts, dim=1)))
    expected = torch.nn.functional.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=True)
    torch.testing.assert_close(model(images), expected)
    clean, perturbed = model(images, perturb=1)
    assert perturbed.shape == (1, 5, size, size - 8)
    torch.testing.assert_close(clean, expected)
    groups = model.parameter_groups(0.1, 10)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
