"""Encoders and their weights.

    resnet50, resnet101   He et al., CVPR 2016, with one of two stems
    xception65            Chollet, CVPR 2017, as deepened by Chen et al., ECCV 2018 (DeepLabv3+)
    mobilenet_v2          Sandler et al., CVPR 2018
    dinov2_s              the vision transformer of Oquab et al., TMLR 2024
    tiny, tiny_vit        0.3 and 0.5 M parameters, for the embedded data sets

Their state dicts are those of the public files, which load as they are.
"""

import textwrap
from collections import OrderedDict
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import Bottleneck
from torchvision.ops import Conv2dNormActivation as conv_bn_relu  # no bias; padding keeps sizes

from common.runtime import UserError, main_first, read_tensors, reading, require

BACKBONES = ("resnet50", "resnet101", "xception65", "mobilenet_v2", "tiny")
VIT_BACKBONES = ("dinov2_s", "tiny_vit")
DEFAULT_WEIGHTS = {
    "resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    "resnet101": "https://download.pytorch.org/models/resnet101-63fe2227.pth",
    "mobilenet_v2": "https://download.pytorch.org/models/mobilenet_v2-b0353104.pth",
    "dinov2_s": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
    "tiny": str(Path(__file__).with_name("tiny_encoder.pt")),
    "tiny_vit": str(Path(__file__).with_name("tiny_vit.pt")),
}
# A name with the beginning of the file's SHA-256, which torch.hub compares.
HASHED = {"dinov2_s": "dinov2_vits14_pretrain-b938bf1bc15cd2ec.pth"}
FIRST_KEYS = {"mobilenet_v2": "features.0.0.weight", "tiny": "stem.0.0.weight",
              "dinov2_s": "cls_token", "tiny_vit": "cls_token"}  # of the others: bn1.weight
# In public files: classifiers; of batch norm, temporaries and counters, which nothing reads.
LEFTOVERS = ("fc.", "classifier.", "features.18.", "itr", "tmp", "track")


# ---------------------------------------------------------------- convolutional encoders


class Encoder(nn.Module):
    """images [B, 3, H, W] -> (low features [B, low_channels, ...], high [B, high_channels, ...]).

    A chain of submodules: `low_parts`, which usrn.py may share between networks, and `high_parts`.
    """

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        low = self.low_level(images)
        return low, self.high_level(low)

    def low_level(self, x: Tensor) -> Tensor:
        for name in self.low_parts:
            x = self.get_submodule(name)(x)
        return x

    def high_level(self, x: Tensor) -> Tensor:
        for name in self.high_parts:
            x = self.get_submodule(name)(x)
        return x


class ResNet(Encoder):
    """Strides 4 and 16: torchvision's with a dilated last stage.

    `deep_stem`: in the files that the codes of the field share (40.48 M and 59.47 M parameters in
    DeepLabv3+), conv1 is three 3x3 convolutions that end in 128 channels.
    """

    low_channels, high_channels = 256, 2048
    low_parts = ("conv1", "bn1", "relu", "maxpool", "layer1")
    high_parts = ("layer2", "layer3", "layer4")

    def __init__(self, name: str, deep_stem: bool):
        super().__init__()
        dilate = [False, False, True]
        resnet = torchvision.models.get_model(name, replace_stride_with_dilation=dilate)
        for part in self.low_parts + self.high_parts:
            setattr(self, part, getattr(resnet, part))
        if deep_stem:
            first, second = conv_bn_relu(3, 64, 3, stride=2), conv_bn_relu(64, 64, 3)
            third = nn.Conv2d(64, 128, 3, padding=1, bias=False)
            self.conv1, self.bn1 = nn.Sequential(*first, *second, third), nn.BatchNorm2d(128)
            block = self.layer1[0]
            block.conv1 = nn.Conv2d(128, 64, 1, bias=False)
            block.downsample[0] = nn.Conv2d(128, 256, 1, bias=False)
            for conv in (first[0], second[0], third, block.conv1, block.downsample[0]):
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


class MobileNetV2(Encoder):
    """Strides 4 and 16: torchvision's without its last layer, dilated where DeepLab does it, so
    that every second feature of a row and a column is that of the network that was trained.
    """

    low_channels, high_channels = 24, 320
    low_parts = tuple(f"features.{index}" for index in range(4))
    high_parts = tuple(f"features.{index}" for index in range(4, 18))

    def __init__(self):
        super().__init__()
        self.features = torchvision.models.mobilenet_v2().features[:18]
        self.features[14].conv[1][0].stride = (1, 1)
        for block in self.features[15:]:
            block.conv[1][0].dilation = block.conv[1][0].padding = (2, 2)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: He et al. 2016, Figure 2."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, dilation: int = 1):
        super().__init__()
        self.conv1 = conv_bn_relu(inputs, outputs, 3, stride, dilation=dilation)
        self.conv2 = conv_bn_relu(outputs, outputs, 3, dilation=dilation, activation_layer=None)
        self.shortcut = nn.Identity()
        if inputs != outputs:
            self.shortcut = conv_bn_relu(inputs, outputs, 1, stride, activation_layer=None)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(self.conv1(x)) + self.shortcut(x))


class TinyEncoder(Encoder):
    """Strides 2 and 8."""

    low_channels, high_channels = 24, 96
    low_parts, high_parts = ("stem", "layer1"), ("layer2", "layer3", "layer4")

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(conv_bn_relu(3, 24, 3, stride=2), conv_bn_relu(24, 24, 3))
        self.layer1 = ResidualBlock(24, 24)
        self.layer2 = ResidualBlock(24, 48, stride=2)
        self.layer3 = ResidualBlock(48, 96, stride=2)
        self.layer4 = ResidualBlock(96, 96, dilation=2)


def separable_conv(inputs: int, outputs: int, stride: int = 1, relu_first: bool = True):
    """3x3 for each channel, 1x1 over channels, and ReLU once before both or after each."""
    before, after = (nn.ReLU, nn.Identity) if relu_first else (nn.Identity, nn.ReLU)
    return nn.Sequential(OrderedDict(
        relu=before(),
        depthwise=nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
        bn1=nn.BatchNorm2d(inputs),
        relu1=after(),
        pointwise=nn.Conv2d(inputs, outputs, 1, bias=False),
        bn2=nn.BatchNorm2d(outputs),
        relu2=after(),
    ))


class XceptionBlock(nn.Module):
    """-> what the second convolution gives, at the input's stride, and the block's output."""

    def __init__(self, inputs: int, middle: int, outputs: int, stride: int):
        super().__init__()
        self.projects = inputs != outputs
        if self.projects:
            self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.skipbn = nn.BatchNorm2d(outputs)
        self.sepconv1 = separable_conv(inputs, middle)
        self.sepconv2 = separable_conv(middle, outputs)
        self.sepconv3 = separable_conv(outputs, outputs, stride)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shortcut = self.skipbn(self.skip(x)) if self.projects else F.relu(x)
        inner = self.sepconv2(self.sepconv1(x))
        return inner, self.sepconv3(inner) + shortcut


class Xception65(Encoder):
    """Strides 4 and 16, as in the code that reads the field's xception.pth (UniMatch). DeepLab's
    TensorFlow model has middle blocks whose shortcut is the input before its ReLU, conv3 to conv5
    dilated, and 1e-3 as the epsilon of batch norm.
    """

    low_channels, high_channels = 256, 2048
    low_parts = ("conv1", "bn1", "conv2", "bn2", "block1", "block2")

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)
        widths = (64, 128, 256, *17 * (728,), 1024)
        for number in range(1, 21):
            inputs, outputs = widths[number - 1], widths[number]
            middle, stride = (inputs if number == 20 else outputs), (2 if number < 4 else 1)
            setattr(self, f"block{number}", XceptionBlock(inputs, middle, outputs, stride))
        self.conv3 = separable_conv(1024, 1536, relu_first=False)
        self.conv4 = separable_conv(1536, 1536, relu_first=False)
        self.conv5 = separable_conv(1536, 2048, relu_first=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 3e-4  # statistics stay close to the pretrained ones

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        low = self.low_level(images)
        return low[:, : self.low_channels], self.high_level(low)

    def low_level(self, x: Tensor) -> Tensor:
        """[B, 512, H/4, W/4]: low, then block2's output at H/8, each value repeated 2 x 2."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        low, x = self.block2(self.block1(x)[1])
        return torch.cat([low, F.interpolate(x, size=low.shape[2:], mode="nearest")], dim=1)

    def high_level(self, x: Tensor) -> Tensor:
        x = x[:, self.low_channels :, ::2, ::2]
        for number in range(3, 21):
            x = getattr(self, f"block{number}")(x)[1]
        return self.conv5(self.conv4(self.conv3(x)))


# ---------------------------------------------------------------- vision transformers


class TransformerBlock(nn.Module):
    """Attention and MLP, each normalised before and scaled after: [B, N, dim] -> [B, N, dim]."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.ls1 = nn.ParameterDict({"gamma": torch.ones(dim)})
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})
        self.ls2 = nn.ParameterDict({"gamma": torch.ones(dim)})

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, dim / heads]
        attention = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attn["proj"](attention) * self.ls1["gamma"]
        hidden = F.gelu(self.mlp["fc1"](self.norm2(x)))
        return x + self.mlp["fc2"](hidden) * self.ls2["gamma"]


class VisionTransformer(nn.Module):
    """DINOv2's, without register tokens: images [B, 3, h * patch, w * patch], of any h and w ->
    four maps [B, dim, h, w], the normalised patch tokens after each quarter of the blocks.
    """

    def __init__(self, image_size: int, patch: int, dim: int, depth: int, heads: int):
        super().__init__()
        self.patch, self.dim, self.grid = patch, dim, image_size // patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim), requires_grad=False)  # not used
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, stride=patch)})
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> list[Tensor]:
        h, w = images.shape[2] // self.patch, images.shape[3] // self.patch
        # By size: the public code resamples by a factor to which it adds 0.1, a slight shift.
        grid = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))
        grid = F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False)
        patches = self.patch_embed["proj"](images) + grid  # [B, dim, h, w]
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        x = torch.cat([cls_token, patches.flatten(2).transpose(1, 2)], dim=1)
        maps = []
        for index, block in enumerate(self.blocks, start=1):
            x = block(x)
            if index % (len(self.blocks) // 4) == 0:
                maps.append(self.norm(x)[:, 1:].transpose(1, 2).unflatten(2, (h, w)))
        return maps


# ---------------------------------------------------------------- weights


def build_encoder(backbone: str, weights: str = "default", among=BACKBONES + VIT_BACKBONES):
    """`weights`: default (ImageNet's, DINOv2's, the shipped file), none, a state dict's path, or
    deep_stem: a random ResNet with the stem of three convolutions.

    Raises UserError for an unknown backbone and for weights that cannot be had or do not fit.
    """
    require(backbone in among, f"unknown backbone {backbone!r}: choose one of {', '.join(among)}")
    is_resnet = backbone.startswith("resnet")
    require(is_resnet or weights != "deep_stem", f"{backbone} has one stem only: --weights none")
    state = None if weights in ("none", "deep_stem") else read_weights(backbone, weights)
    if is_resnet:
        encoder = ResNet(backbone, "deep_stem" in (weights, random_weights_like(state or {})))
    elif backbone == "dinov2_s":
        encoder = VisionTransformer(image_size=518, patch=14, dim=384, depth=12, heads=6)
    elif backbone == "tiny_vit":
        encoder = VisionTransformer(image_size=64, patch=8, dim=96, depth=4, heads=3)
    else:
        classes = {"xception65": Xception65, "mobilenet_v2": MobileNetV2, "tiny": TinyEncoder}
        encoder = classes[backbone]()
    if state is not None:
        load_strictly(encoder, state, f"the weights {weights!r} of {backbone}")
    return encoder


def read_weights(backbone: str, weights: str) -> dict[str, Tensor]:
    """The state dict that `weights`, default or a path, stands for, without leftovers."""
    source = DEFAULT_WEIGHTS.get(backbone) if weights == "default" else weights
    require(source is not None, f"{backbone} has no weights to download: pass the field's file as "
                                f"--weights PATH, or train from random ones with --weights none")
    if source.startswith("https:"):
        with main_first(), reading(f"{source} (--weights PATH takes a state dict)"):
            state = torch.hub.load_state_dict_from_url(
                source, map_location="cpu", progress=False, check_hash=True, weights_only=True,
                file_name=HASHED.get(backbone))
    else:
        state = unwrapped(read_tensors(source), FIRST_KEYS.get(backbone, "bn1.weight"))
    return {key: state[key] for key in state if not any(part in key for part in LEFTOVERS)}


def unwrapped(state, first: str) -> dict[str, Tensor]:
    """The encoder's part of what people keep, {"model": {"module.backbone.bn1.weight": ...}, ...}:
    its `first` key tells what stands before all of its keys.
    """
    parts = [state, *state.values()] if isinstance(state, dict) else []
    for part in [part for part in parts if isinstance(part, dict)]:
        keys = [key for key in part if str(key).endswith(first)]
        if keys:
            prefix = min(keys, key=len).removesuffix(first)
            return {key.removeprefix(prefix): value for key, value in part.items()
                    if key.startswith(prefix)}
    return {}


def random_weights_like(state: dict[str, Tensor]) -> str:
    """`weights` for a network that will load `state`."""
    return "deep_stem" if any(key.endswith("conv1.6.weight") for key in state) else "none"


def load_strictly(model: nn.Module, state: dict[str, Tensor], what: str) -> nn.Module:
    """The model with these weights. Raises a UserError about `what` if they do not fit."""
    try:
        model.load_state_dict(dict(state))  # of a plain dict, counters may be missing
    except RuntimeError as error:
        reason = textwrap.shorten(str(error).partition("\n")[2], 250)  # there may be 100 keys
        raise UserError(f"{what} do not fit: {reason}") from error
    return model


def checkpoint_activations(model: nn.Module, compiled: bool = False) -> None:
    """Keep of each block only its input for the backward pass, which computes the rest again."""
    require(not compiled, "--compile and --checkpoint-activations do not go together")
    kinds = (Bottleneck, InvertedResidual, ResidualBlock, XceptionBlock, TransformerBlock)
    for block in model.modules():
        if isinstance(block, kinds):
            contexts = KeepStatistics(block).contexts
            block.forward = partial(checkpoint, block.forward, use_reentrant=False,
                                    context_fn=contexts, preserve_rng_state=False)


class KeepStatistics:
    """Batch norms keep their running statistics. A graph that is walked twice enters it twice."""

    def __init__(self, block: nn.Module):
        self.norms = [part for part in block.modules() if hasattr(part, "num_batches_tracked")]

    def contexts(self) -> tuple:
        return nullcontext(), self  # of the forward pass, of its recomputation

    def __enter__(self) -> None:
        self.kept = [(norm.momentum, norm.num_batches_tracked) for norm in self.norms]
        for norm, (_, counter) in zip(self.norms, self.kept):
            norm.momentum, norm.num_batches_tracked = 0.0, counter.clone()

    def __exit__(self, *error) -> None:
        for norm, kept in zip(self.norms, self.kept):
            norm.momentum, norm.num_batches_tracked = kept
