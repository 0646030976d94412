"""common/models.py: sizes, torchvision's ASPP, perturbed decoding, optimizer groups, OHEM."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.models.segmentation.deeplabv3 as torchvision_deeplab
from torch import nn

from common.models import DPT, DeepLabV3Plus, PSPNet, hard_pixel_loss
from programs import error_of, on_ranks

NETWORKS = [(DeepLabV3Plus, "tiny"), (DeepLabV3Plus, "mobilenet_v2"), (PSPNet, "tiny"),
            (DPT, "tiny_vit")]


# ---------------------------------------------------------------- every network


@pytest.mark.parametrize("network, backbone", NETWORKS)
@pytest.mark.parametrize("height, width", [(61, 90), (3, 48)])
def test_logits_have_the_images_size_and_constants_stay_constant(network, backbone, height, width):
    model = network(backbone, 5, "none").eval()
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.arange(5.0))
        logits = model(torch.randn(2, 3, height, width))
    want = torch.arange(5.0).view(1, 5, 1, 1).expand(2, 5, height, width)
    torch.testing.assert_close(logits, want)


@pytest.mark.parametrize("network, backbone", [
    *NETWORKS, (DeepLabV3Plus, "resnet50"), (DeepLabV3Plus, "xception65"), (DPT, "dinov2_s")])
def test_parameter_groups_hold_every_trained_parameter_once(network, backbone):
    with torch.device("meta"):
        model = network(backbone, 4, "none")
    encoder, head = model.parameter_groups(0.1, 10)
    assert (encoder["lr"], head["lr"]) == (0.1, 1.0)
    ids = [id(parameter) for group in (encoder, head) for parameter in group["params"]]
    trained = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(ids) == sorted(trained)
    inside = {id(parameter) for parameter in model.encoder.parameters()}
    assert inside.issuperset(id(parameter) for parameter in encoder["params"])
    assert inside.isdisjoint(id(parameter) for parameter in head["params"])


@pytest.mark.parametrize("network, backbone", NETWORKS)
def test_a_step_trains_every_parameter_and_logits_are_float32_in_bf16(network, backbone):
    torch.manual_seed(0)
    model = network(backbone, 3, "none").to(memory_format=torch.channels_last)
    images = torch.randn(3, 3, 45, 50).contiguous(memory_format=torch.channels_last)
    plain = model.eval()(images).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(images)
        logits = model.train()(images)
    assert half.dtype == logits.dtype == torch.float32  # enlarged in float32
    torch.testing.assert_close(half, plain, rtol=0, atol=0.1 * float(plain.abs().max()))
    logits.square().mean().backward()
    without = [name for name, parameter in model.named_parameters()
               if parameter.grad is None or not parameter.grad.any()]
    assert without == (["encoder.mask_token"] if network is DPT else [])


@pytest.mark.parametrize("network, backbone, expected", [
    (DeepLabV3Plus, "tiny", [1.52414, 3.19826, -2.98208]),
    (PSPNet, "tiny", [2.35798, 3.50593, -1.89412]),
    (DPT, "tiny_vit", [42.9979, 5.89860, -65.0137])])
def test_what_a_saved_network_predicts_has_not_changed(network, backbone, expected):
    """Weights fit, too, where features are joined in another order or an activation is gone."""
    torch.manual_seed(0)
    model = network(backbone, 3, "none").eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # how a layer draws its own differs between PyTorches
            nn.init.normal_(parameter, std=(2 / parameter[0].numel()) ** 0.5)
    logits = model(torch.linspace(-2, 2, 3 * 40 * 48).view(1, 3, 40, 48).sin())
    assert logits[0, :, 20, 20].tolist() == pytest.approx(expected, rel=1e-3)


# ---------------------------------------------------------------- DeepLabv3+, PSPNet


@pytest.mark.parametrize("backbone, weights, classes, parameters", [
    ("resnet50", "deep_stem", 21, 40_475_957),  # the field's tables: 40.48 M
    ("resnet101", "deep_stem", 21, 59_468_085),  # 59.47 M
    ("xception65", "none", 81, 54_726_881),  # 54.7 M
])
def test_sizes_are_the_published_ones(backbone, weights, classes, parameters):
    with torch.device("meta"):
        model = DeepLabV3Plus(backbone, classes, weights)
        small = DeepLabV3Plus("mobilenet_v2", classes, "none")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    rates = [branch[0].dilation[0] for branch in model.aspp.branches]
    assert rates == [branch[0].dilation[0] for branch in small.aspp.branches] == [1, 6, 12, 18]


@pytest.mark.parametrize("network, side", [(DeepLabV3Plus, 16), (PSPNet, 4)])
def test_mobilenet_has_a_small_head(network, side):
    model = network("mobilenet_v2", 5, "none")
    assert model.channels == 128 == model.classifier.in_channels
    assert model.eval().features(torch.randn(1, 3, 64, 64)).shape == (1, 128, side, side)


def test_aspp_is_torchvisions():
    torch.manual_seed(0)
    model = DeepLabV3Plus("tiny", 5, "none").eval()
    high = torch.randn(2, model.encoder.high_channels, 5, 7)
    theirs = torchvision_deeplab.ASPP(high.shape[1], [2, 4], model.channels).eval()
    own = model.aspp.state_dict().values()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), own, strict=True)))
    torch.testing.assert_close(model.aspp(high), theirs(high))


def test_pspnet_averages_regions():
    model, seen = PSPNet("tiny", 5, "none").eval(), []
    for conv in model.pyramid:
        conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    high = torch.randn(2, model.encoder.high_channels, 12, 6)
    model.decode(None, high)
    for bins, average in zip((1, 2, 3, 6), seen, strict=True):
        regions = high.unflatten(3, (bins, -1)).unflatten(2, (bins, -1))
        torch.testing.assert_close(average, regions.mean(dim=(3, 5)))


def test_perturbed_decoding_drops_whole_channels_of_the_last_images_only():
    torch.manual_seed(0)
    model = DeepLabV3Plus("tiny", 4, "none").eval()
    images, seen = torch.randn(3, 3, 32, 32), []
    for part in (model.aspp, model.reduce):  # high features, then low ones
        part.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        logits, perturbed = model(images, perturb=2)
        plain = model(images)
    assert logits.shape == (3, 4, 32, 32) and perturbed.shape == (2, 4, 32, 32)
    torch.testing.assert_close(logits, plain)  # in eval mode the others do not touch them
    for clean, dropped in ((features[1:3], features[3:5]) for features in seen[:2]):
        ratio = torch.where(clean > 0, dropped / clean, torch.nan).flatten(2).nanmean(dim=2)
        kept = ratio[~ratio.isnan()]
        assert set(kept.round().tolist()) == {0.0, 2.0}  # a channel is gone, or twice itself
    assert not torch.allclose(perturbed, plain[1:])


def test_a_backbone_of_the_other_kind_is_refused():
    assert "'tiny_vit': choose one of resnet50" in error_of(DeepLabV3Plus, "tiny_vit", 4, "none")
    assert "'tiny': choose one of dinov2_s" in error_of(DPT, "tiny", 4, "none")


# ---------------------------------------------------------------- DPT


def test_images_are_resized_to_the_nearest_multiple_of_the_patch():
    model, seen = DPT("tiny_vit", 5, "none").requires_grad_(False), []
    model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for side, expected in ((19, 16), (20, 24), (24, 24), (27, 24), (28, 32), (1, 8)):
        image = torch.randn(1, 3, 32, side)
        model(image)
        want = F.interpolate(image, (32, expected), mode="bilinear", align_corners=True)
        torch.testing.assert_close(seen[-1], want)


def test_dinov2s_head_has_the_reference_sizes():
    model, seen = DPT("dinov2_s", 21, "none").requires_grad_(False).eval(), []
    for module in [*model.scales, *model.fusions]:
        module.register_forward_hook(lambda module, inputs, out: seen.append(tuple(out.shape[1:])))
    assert model(torch.randn(1, 3, 70, 98)).shape == (1, 21, 70, 98)  # 5 x 7 patches
    assert seen[:4] == [(64, 20, 28), (64, 10, 14), (64, 5, 7), (64, 3, 4)]
    assert seen[4:] == [(64, 5, 7), (64, 10, 14), (64, 20, 28), (64, 40, 56)]


def test_a_residual_unit_adds_what_it_makes_of_the_positive_part():
    unit, negative = DPT("tiny_vit", 5, "none").fusions[0].skip, -torch.rand(2, 32, 6, 5)
    torch.testing.assert_close(unit(negative) - negative, unit(torch.zeros_like(negative)))


def test_channel_mask_multiplies_all_four_maps():
    torch.manual_seed(0)
    model, maps = DPT("tiny_vit", 4, "none").requires_grad_(False), []
    for scale in model.scales:
        scale.register_forward_pre_hook(lambda module, inputs: maps.append(inputs[0]))
    images, mask = torch.randn(2, 3, 32, 32), torch.ones(2, model.encoder.dim)
    plain = model(images, mask)
    torch.testing.assert_close(plain, model(images))
    mask[1, 7] = 0
    masked = model(images, mask)
    torch.testing.assert_close(masked[0], plain[0])
    assert not torch.allclose(masked[1], plain[1])
    assert all((features[1, 7] == 0).all() and features[0, 7].any() for features in maps[-4:])


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_hard_pixels_one_by_one(threshold):
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 13, 11, dtype=torch.float64).mul(2).requires_grad_()
    label = torch.randint(0, 4, (2, 13, 11))
    label[:, :3] = 255
    loss = F.cross_entropy(logits, label, ignore_index=255, reduction="none")
    result = hard_pixel_loss(loss, label, threshold) / (label != 255).sum()
    result.backward()
    values = np.sort(loss.detach().numpy()[label.numpy() != 255])[::-1]
    least = int(len(values) * 200_000 / (2 * 801**2))
    hard = [value for i, value in enumerate(values) if np.exp(-value) <= threshold or i < least]
    assert least <= len(hard) <= len(values) and (threshold == 1.0) == (len(hard) == len(values))
    assert abs(result.item() - np.mean(hard)) < 1e-6 * np.mean(hard)  # the scale is float32
    assert (logits.grad.abs().sum(1) > 0).sum() == len(hard)
    assert hard_pixel_loss(torch.zeros(1, 4, 4), torch.full((1, 4, 4), 255), threshold) == 0
    assert hard_pixel_loss(torch.full((1, 9, 9), 4e4).half(), torch.zeros(1, 9, 9), 1) == 81 * 4e4


def test_hard_pixels_of_two_ranks_are_those_of_one_process(tmp_path):
    """One rank's share of labeled pixels, and of hard ones among them, is not the other's."""
    torch.manual_seed(0)
    loss, label = torch.rand(4, 9, 7), torch.randint(5, (4, 9, 7))
    loss[:2], label[2:, 3:] = 2 * loss[:2], 255

    def of_rank(rank: int) -> torch.Tensor:
        return hard_pixel_loss(loss.chunk(2)[rank], label.chunk(2)[rank], 0.7)

    total = sum(on_ranks(of_rank, tmp_path))
    torch.testing.assert_close(total, hard_pixel_loss(loss, label, 0.7))
