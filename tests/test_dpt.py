"""DPT on a vision transformer: the public file's keys, attention by hand, positions, sizes, masks, gradients, weights."""

import math
import urllib.error

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import dpt, pretrain
from common.dpt import DPT, Block, VisionTransformer, build_vit
from common.runtime import UserError

BLOCK_SHAPES = {  # of one of the twelve blocks of dinov2_vits14_pretrain.pth
    "norm1.weight": (384,), "norm1.bias": (384,),
    "attn.qkv.weight": (1152, 384), "attn.qkv.bias": (1152,), "attn.proj.weight": (384, 384), "attn.proj.bias": (384,),
    "ls1.gamma": (384,),
    "norm2.weight": (384,), "norm2.bias": (384,),
    "mlp.fc1.weight": (1536, 384), "mlp.fc1.bias": (1536,), "mlp.fc2.weight": (384, 1536), "mlp.fc2.bias": (384,),
    "ls2.gamma": (384,),
}
DINOV2_SHAPES = {
    "cls_token": (1, 1, 384), "pos_embed": (1, 1370, 384), "mask_token": (1, 384),
    "patch_embed.proj.weight": (384, 3, 14, 14), "patch_embed.proj.bias": (384,),
    **{f"blocks.{index}.{key}": shape for index in range(12) for key, shape in BLOCK_SHAPES.items()},
    "norm.weight": (384,), "norm.bias": (384,),
}


def small_vit(dtype: torch.dtype = torch.float32) -> VisionTransformer:
    """A 2 x 2 grid of patches, every parameter random and large enough to matter."""
    torch.manual_seed(0)
    encoder = VisionTransformer(image_size=8, patch=4, dim=12, depth=5, heads=3, layers=(0, 2, 3, 4)).to(dtype)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder.requires_grad_(False)


# ---------------------------------------------------------------- encoder


def test_state_dict_is_that_of_the_public_file():
    encoder = build_vit("dinov2_s", "none")
    assert {key: tuple(value.shape) for key, value in encoder.state_dict().items()} == DINOV2_SHAPES
    assert sum(math.prod(shape) for shape in DINOV2_SHAPES.values()) == 22_056_576  # 21.7 M, and a grid for 518 x 518
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 22_056_576
    assert encoder.layers == (2, 5, 8, 11) and (encoder.patch, encoder.grid) == (14, 37)
    assert all(block.attn.heads == 6 for block in encoder.blocks)


def layer_norm(x: np.ndarray, state: dict, name: str) -> np.ndarray:
    x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def block_by_hand(x: np.ndarray, state: dict, name: str, heads: int) -> np.ndarray:
    """[N, dim] -> [N, dim]: one picture, head by head."""
    size = x.shape[1] // heads
    qkv = layer_norm(x, state, f"{name}norm1") @ state[f"{name}attn.qkv.weight"].T + state[f"{name}attn.qkv.bias"]
    q, k, v = np.split(qkv, 3, axis=1)
    joined = np.zeros_like(x)
    for head in range(heads):
        columns = slice(head * size, (head + 1) * size)
        scores = np.exp(q[:, columns] @ k[:, columns].T / math.sqrt(size))
        joined[:, columns] = scores / scores.sum(axis=1, keepdims=True) @ v[:, columns]
    attention = joined @ state[f"{name}attn.proj.weight"].T + state[f"{name}attn.proj.bias"]
    x = x + state[f"{name}ls1.gamma"] * attention
    hidden = layer_norm(x, state, f"{name}norm2") @ state[f"{name}mlp.fc1.weight"].T + state[f"{name}mlp.fc1.bias"]
    hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    return x + state[f"{name}ls2.gamma"] * (hidden @ state[f"{name}mlp.fc2.weight"].T + state[f"{name}mlp.fc2.bias"])


def test_block_is_the_one_written_out_by_hand():
    torch.manual_seed(0)
    block = Block(12, 3).double().requires_grad_(False)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    state = {key: value.numpy() for key, value in block.state_dict().items()}
    expected = np.stack([block_by_hand(picture, state, "", heads=3) for picture in x.numpy()])
    np.testing.assert_allclose(block(x).numpy(), expected, rtol=1e-10, atol=1e-12)


def test_encoder_is_the_one_written_out_by_hand():
    encoder = small_vit(torch.float64)
    state = {key: value.numpy() for key, value in encoder.state_dict().items()}
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    maps = encoder(images)
    assert len(maps) == 4 and all(features.shape == (2, 12, 2, 2) for features in maps)
    weight = state["patch_embed.proj.weight"].reshape(12, -1)
    for picture, image in enumerate(images.numpy()):
        patches = [image[:, i : i + 4, j : j + 4].ravel() for i in (0, 4) for j in (0, 4)]
        x = np.stack([state["cls_token"][0, 0]] + [weight @ patch + state["patch_embed.proj.bias"] for patch in patches])
        x, expected = x + state["pos_embed"][0], []
        for index in range(5):
            x = block_by_hand(x, state, f"blocks.{index}.", heads=3)
            if index in (0, 2, 3, 4):
                expected.append(layer_norm(x, state, "norm")[1:].T.reshape(12, 2, 2))
        for features, by_hand in zip(maps, expected):
            np.testing.assert_allclose(features[picture].numpy(), by_hand, rtol=1e-8, atol=1e-10)


def bicubic_matrix(source: int, target: int) -> np.ndarray:
    """[target, source]: Keys' cubic convolution with a = -0.75 at half-pixel centres, the edge repeated."""
    matrix = np.zeros((target, source))
    for row in range(target):
        centre = (row + 0.5) * source / target - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            d = abs(centre - tap)
            weight = 1.25 * d**3 - 2.25 * d**2 + 1 if d <= 1 else -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[row, min(max(tap, 0), source - 1)] += weight
    return matrix


def test_position_embeddings_are_resampled_bicubically_and_the_class_tokens_is_not():
    encoder = VisionTransformer(image_size=28, patch=4, dim=6, depth=1, heads=3, layers=(0,)).requires_grad_(False)
    torch.nn.init.normal_(encoder.pos_embed)
    assert encoder.position_embeddings(7, 7) is encoder.pos_embed
    grid = encoder.pos_embed[0, 1:].view(7, 7, 6).double().numpy()
    for h, w in ((7, 5), (12, 12), (3, 14)):
        resampled = encoder.position_embeddings(h, w)
        assert resampled.shape == (1, 1 + h * w, 6)
        assert torch.equal(resampled[:, 0], encoder.pos_embed[:, 0])
        expected = np.einsum("ha,wb,abc->hwc", bicubic_matrix(7, h), bicubic_matrix(7, w), grid)
        np.testing.assert_allclose(resampled[0, 1:].view(h, w, 6).numpy(), expected, atol=1e-5)


def test_channel_order_is_rows_then_columns():
    """A picture that is bright in one patch, and an encoder that only embeds: the map is bright there."""
    encoder = VisionTransformer(image_size=16, patch=4, dim=3, depth=1, heads=1, layers=(0,)).requires_grad_(False)
    for parameter in (encoder.pos_embed, encoder.blocks[0].ls1.gamma, encoder.blocks[0].ls2.gamma):
        parameter.zero_()
    images = torch.zeros(1, 3, 12, 20)
    images[:, :, 4:8, 12:16] = 1
    features = encoder(images)[0][0]
    others = features - features[:, :1, :1]
    assert others.abs().sum(dim=0).nonzero().tolist() == [[1, 3]]


# ---------------------------------------------------------------- segmentation network


@pytest.mark.parametrize("height, width", [(64, 64), (61, 90), (3, 48)])
def test_logits_have_the_images_size_and_constant_predictions_stay_constant(height, width):
    model = DPT("tiny_vit", 5, "none").eval()
    with torch.no_grad():
        assert model(torch.randn(2, 3, height, width)).shape == (2, 5, height, width)
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.arange(5.0))
        logits = model(torch.randn(1, 3, height, width))
    torch.testing.assert_close(logits, torch.arange(5.0).view(1, 5, 1, 1).expand(1, 5, height, width))


def test_images_are_resized_to_the_nearest_multiple_of_the_patch():
    model, seen = DPT("tiny_vit", 5, "none").requires_grad_(False), []
    patch = model.patch
    model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    sides = (3 * patch - patch // 2 - 1, 3 * patch - patch // 2, 3 * patch, 3 * patch + patch // 2 - 1, 1)
    for side, expected in zip(sides, (2, 3, 3, 3, 1)):
        image = torch.randn(1, 3, 4 * patch, side)
        model(image)
        assert seen[-1].shape == (1, 3, 4 * patch, expected * patch)
    image = torch.randn(1, 3, 4 * patch, 4 * patch)
    model(image)
    assert seen[-1] is image


def test_dinov2_head_has_the_reference_sizes():
    model = DPT("dinov2_s", 21, "none").requires_grad_(False).eval()
    seen = []
    for module in [*model.scales, *model.fusions]:
        module.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[1:])))
    assert model(torch.randn(1, 3, 70, 98)).shape == (1, 21, 70, 98)  # 5 x 7 patches
    assert seen[:4] == [(64, 20, 28), (64, 10, 14), (64, 5, 7), (64, 3, 4)]
    assert seen[4:] == [(64, 5, 7), (64, 10, 14), (64, 20, 28), (64, 40, 56)]


def test_coarsest_scale_passes_one_residual_unit_and_the_others_are_added():
    model = DPT("tiny_vit", 5, "none").requires_grad_(False)
    coarse, fine = model.fusions[3], model.fusions[0]
    assert coarse.skip is None and all(fusion.skip is not None for fusion in model.fusions[:3])
    channels = fine.project.in_channels
    scale, path = torch.randn(2, 1, channels, 6, 6)

    def unit(module, x):
        return x + module.conv2(F.relu(module.conv1(F.relu(x))))

    x = unit(fine.refine, path + unit(fine.skip, scale))
    expected = fine.project(F.interpolate(x, size=(11, 11), mode="bilinear", align_corners=True))
    torch.testing.assert_close(fine(scale, path, (11, 11)), expected)
    torch.testing.assert_close(expected[:, :, ::2, ::2], fine.project(x))  # corners aligned: every old point is a new one
    torch.testing.assert_close(coarse(scale, None, (6, 6)), coarse.project(unit(coarse.refine, scale)))


def test_channel_mask_multiplies_all_four_maps():
    torch.manual_seed(0)
    model = DPT("tiny_vit", 4, "none").requires_grad_(False)
    images, dim = torch.randn(2, 3, 32, 32), model.encoder.dim
    plain = model(images)
    torch.testing.assert_close(model(images, torch.ones(2, dim)), plain)
    maps = []
    for scale in model.scales:
        scale.register_forward_pre_hook(lambda module, inputs: maps.append(inputs[0]))
    mask = torch.ones(2, dim)
    mask[1, 7] = 0
    masked = model(images, mask)
    torch.testing.assert_close(masked[0], plain[0])
    assert not torch.allclose(masked[1], plain[1])
    assert len(maps) == 4 and all((features[1, 7] == 0).all() and (features[0, 7] != 0).all() for features in maps)
    # A channel that the head does not read can be masked without a trace.
    for scale in model.scales:
        scale[0].weight[:, 7] = 0
    torch.testing.assert_close(model(images), model(images, mask))


@pytest.mark.parametrize("backbone", dpt.VIT_BACKBONES)
def test_every_parameter_but_the_mask_token_gets_a_gradient(backbone):
    model = DPT(backbone, 3, "none")
    model(torch.randn(2, 3, 45, 30)).square().mean().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert without == ["encoder.mask_token"]


def test_parameter_groups_hold_every_trained_parameter_once():
    model = DPT("tiny_vit", 4, "none")
    encoder, head = model.parameter_groups(0.1, 10)
    assert (encoder["lr"], head["lr"]) == (0.1, 1.0)
    ids = [id(parameter) for group in (encoder, head) for parameter in group["params"]]
    assert sorted(ids) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    assert id(model.encoder.mask_token) not in ids
    assert {id(parameter) for parameter in model.encoder.blocks.parameters()} <= {id(p) for p in encoder["params"]}
    assert {id(parameter) for parameter in model.classifier.parameters()} <= {id(p) for p in head["params"]}


def test_bf16_and_channels_last_agree_with_plain_float32():
    """Logits are float32 before the upsampling: bf16 would move confidences across a threshold."""
    torch.manual_seed(0)
    model = DPT("tiny_vit", 4, "none").requires_grad_(False)
    images = torch.randn(2, 3, 32, 48)
    plain = model(images)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(images.contiguous(memory_format=torch.channels_last)), plain, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(images)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, plain, rtol=0, atol=0.05 * plain.abs().max().item())


# ---------------------------------------------------------------- weights


def test_state_dict_file_loads_as_it_is_and_a_wrong_one_is_explained(tmp_path, monkeypatch):
    saved = build_vit("tiny_vit", "none")
    torch.save(saved.state_dict(), tmp_path / "vit.pth")
    loaded = build_vit("tiny_vit", str(tmp_path / "vit.pth"))
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in saved.state_dict().items())
    with pytest.raises(UserError, match="do not fit the backbone dinov2_s"):
        build_vit("dinov2_s", str(tmp_path / "vit.pth"))
    incomplete = {key: value for key, value in saved.state_dict().items() if key != "norm.bias"}
    torch.save(incomplete, tmp_path / "incomplete.pth")
    with pytest.raises(UserError, match="norm.bias"):
        build_vit("tiny_vit", str(tmp_path / "incomplete.pth"))
    torch.save({"model": saved.state_dict(), "epoch": 3}, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match="checkpoint.pth"):
        build_vit("tiny_vit", str(tmp_path / "checkpoint.pth"))
    with pytest.raises(UserError, match="nowhere.pth"):
        build_vit("tiny_vit", "nowhere.pth")
    with pytest.raises(UserError, match="vit_giant"):
        build_vit("vit_giant")

    def offline(*arguments, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(UserError, match="DINOv2.*--weights PATH"):
        build_vit("dinov2_s")


def test_default_weights_of_dinov2_are_the_public_file(monkeypatch):
    saved, asked = build_vit("dinov2_s", "none").state_dict(), []

    def download(url, **options):
        asked.append(url)
        return saved

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    model = DPT("dinov2_s", 21)
    assert asked == ["https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"]
    assert torch.equal(model.encoder.pos_embed, saved["pos_embed"])


def test_shipped_weights_load():
    assert dpt.TINY_VIT_WEIGHTS.stat().st_size < 1e6
    state = torch.load(dpt.TINY_VIT_WEIGHTS, map_location="cpu", weights_only=True)
    assert all(value.dtype == torch.float16 and value.isfinite().all() for value in state.values())
    encoder = DPT("tiny_vit", 5).encoder
    assert all(torch.equal(value, state[key].float()) for key, value in encoder.state_dict().items())


# ---------------------------------------------------------------- pretraining


class Averages(torch.nn.Module):
    """Stands for an encoder: a patch's feature is its mean colour."""

    grid = patch = 8

    def forward(self, images):
        self.images = images
        return [F.avg_pool2d(images, self.patch)]


def test_every_picture_of_a_mosaic_is_pooled_by_itself_wherever_it_is_shifted_to():
    torch.manual_seed(0)
    encoder, pictures = Averages(), torch.randn(8, 3, 32, 32)
    for training in (True, True, False):
        torch.testing.assert_close(pretrain.pooled_features(encoder.train(training), pictures), pictures.mean(dim=(2, 3)))
    assert encoder.images.shape == (2, 3, 64, 64)
    assert torch.equal(encoder.images[1, :, :32, 32:], pictures[5]) and torch.equal(encoder.images[1, :, 32:, :32], pictures[6])


def test_shipped_weights_tell_textures_apart():
    """Nearest class centroid in pooled features: far above random weights, on pictures never used in pretraining."""
    count = len(pretrain.PRETRAINING_TEXTURES)
    kinds = [i % count for i in range(32 * count)]
    x, y, half = pretrain.single_blobs(kinds, seed=1234), torch.tensor(kinds), 16 * count
    accuracy = {}
    for weights in ("default", "none"):
        torch.manual_seed(0)
        with torch.no_grad():
            features = pretrain.pooled_features(build_vit("tiny_vit", weights).eval(), x)
        centroids = torch.stack([features[:half][y[:half] == k].mean(dim=0) for k in range(count)])
        accuracy[weights] = (torch.cdist(features[half:], centroids).argmin(dim=1) == y[half:]).float().mean().item()
    assert accuracy["default"] > 0.7 and accuracy["default"] > accuracy["none"] + 0.3, accuracy


def test_pretraining_runs_and_writes_loadable_weights(tmp_path):
    accuracy = pretrain.pretrain(tmp_path / "vit.pt", epochs=1, pictures=160, seed=0, device="cpu", backbone="tiny_vit")
    assert 0 <= accuracy <= 1
    build_vit("tiny_vit", str(tmp_path / "vit.pt"))
