"""DeepLabv3+: shapes, sizes, weights that load, feature perturbation."""

import urllib.error

import pytest
import torch
import torchvision

from common.deeplab import DeepLabV3Plus, ResNetEncoder, TinyEncoder, build_encoder
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


def test_output_stride_is_16_and_the_last_stage_is_dilated():
    encoder = ResNetEncoder("resnet50").eval()
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
    with pytest.raises(UserError, match="resnet50"):
        build_encoder("resnet18")


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


def test_parameter_groups_hold_every_parameter_once():
    model = DeepLabV3Plus("tiny", 4, "none")
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
