"""DeepLabv3+ and its encoders.

Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation", ECCV 2018, in the
form that semi-supervised segmentation uses (CPS, U2PL, ST++, UniMatch): plain 3x3 convolutions, output stride 16.

    images [B, 3, H, W], normalised
      -> encoder: low [B, 256, H/4, W/4], high [B, 2048, H/16, W/16]       ResNet-50/101, last stage dilated; Xception-65
      -> ASPP(high): 1x1, three dilated 3x3, global pooling -> 256 channels, upsampled to H/4
      -> concat with low reduced to 48 channels -> two 3x3 convs -> z [B, 256, H/4, W/4]
      -> 1x1 classifier -> bilinear upsampling (align_corners=True) -> logits [B, C, H, W]

ResNets come with either of two stems: torchvision's 7x7 convolution, or the three 3x3 convolutions of the `resnet50.pth` and
`resnet101.pth` that the codes of the field share (40.48 M and 59.47 M parameters at 21 classes). A file's keys say which.

`TinyEncoder` (0.3 M parameters) is for the embedded data sets; its pretrained weights are in `tiny_encoder.pt`.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from common.runtime import UserError
from common.xception import Xception65, from_public_file

TINY_WEIGHTS = Path(__file__).with_name("tiny_encoder.pt")
STAGES = ("layer1", "layer2", "layer3", "layer4")
BACKBONES = ("resnet50", "resnet101", "xception65", "tiny")


def conv_bn_relu(in_channels: int, out_channels: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, dilation * (kernel // 2), dilation, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


# ---------------------------------------------------------------- encoders


class ResNetEncoder(nn.Module):
    """torchvision's ResNet without its classifier; stage 4 is dilated, so the output stride is 16.

    forward: images [B, 3, H, W] -> (low [B, 256, H/4, W/4], high [B, 2048, H/16, W/16]).
    The state dict is torchvision's without `fc.*`: the ImageNet files that users have load as they are. So do the field's with
    `deep_stem`: conv1 is three 3x3 convolutions (conv1.0, conv1.3, conv1.6) that end in 128 channels, which stage 1 reads.
    """

    low_channels, high_channels = 256, 2048
    low_parts = ("conv1", "bn1", "relu", "maxpool", "layer1")

    def __init__(self, name: str, deep_stem: bool = False):
        super().__init__()
        resnet = getattr(torchvision.models, name)(weights=None, replace_stride_with_dilation=[False, False, True])
        for stage in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            setattr(self, stage, getattr(resnet, stage))
        if deep_stem:
            self.conv1 = nn.Sequential(
                *conv_bn_relu(3, 64, 3, stride=2), *conv_bn_relu(64, 64, 3), nn.Conv2d(64, 128, 3, padding=1, bias=False)
            )
            self.bn1 = nn.BatchNorm2d(128)
            first = self.layer1[0]
            first.conv1, first.downsample[0] = nn.Conv2d(128, 64, 1, bias=False), nn.Conv2d(128, 256, 1, bias=False)
            for conv in (self.conv1[0], self.conv1[3], self.conv1[6], first.conv1, first.downsample[0]):  # as torchvision does
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def checkpointed(self) -> list[nn.Module]:
        """The blocks that `--checkpoint-activations` computes again. Low stages may have been taken out (usrn.py)."""
        return [block for name in STAGES if hasattr(self, name) for block in getattr(self, name)]

    def low_level(self, images: Tensor) -> Tensor:
        return self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(images)))))

    def high_level(self, low: Tensor) -> Tensor:
        return self.layer4(self.layer3(self.layer2(low)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        low = self.low_level(images)
        return low, self.high_level(low)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: He et al. 2016, Figure 2."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1):
        super().__init__()
        self.conv1 = conv_bn_relu(in_channels, out_channels, 3, stride, dilation)
        self.conv2 = nn.Sequential(
            nn.Conv2d(out_channels, out_channels, 3, 1, dilation, dilation, bias=False), nn.BatchNorm2d(out_channels)
        )
        same_shape = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same_shape else nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(self.conv1(x)) + self.shortcut(x))


class TinyEncoder(nn.Module):
    """Ten convolutions for 64x64 pictures: stem at stride 2, four residual blocks to stride 8, the last one dilated.

    forward: images [B, 3, H, W] -> (low [B, 24, H/2, W/2], high [B, 96, H/8, W/8]).
    """

    low_channels, high_channels = 24, 96
    low_parts = ("stem", "layer1")

    def __init__(self, width: int = 24):
        super().__init__()
        self.stem = nn.Sequential(conv_bn_relu(3, width, 3, stride=2), conv_bn_relu(width, width, 3))
        self.layer1 = ResidualBlock(width, width)
        self.layer2 = ResidualBlock(width, 2 * width, stride=2)
        self.layer3 = ResidualBlock(2 * width, 4 * width, stride=2)
        self.layer4 = ResidualBlock(4 * width, 4 * width, dilation=2)

    def checkpointed(self) -> list[nn.Module]:
        return [getattr(self, name) for name in STAGES if hasattr(self, name)]

    def low_level(self, images: Tensor) -> Tensor:
        return self.layer1(self.stem(images))

    def high_level(self, low: Tensor) -> Tensor:
        return self.layer4(self.layer3(self.layer2(low)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        low = self.low_level(images)
        return low, self.high_level(low)


def build_encoder(backbone: str, weights: str = "default") -> nn.Module:
    """`weights`: "default" (torchvision's ImageNet weights for ResNets, the shipped file for tiny), the path of a state dict, or
    random ones: "none", and for ResNets with the stem of three convolutions "deep_stem".

    A ResNet's stem is that of the file. Raises UserError for an unknown backbone and for weights that cannot be had or do not fit.
    """
    if backbone not in BACKBONES:
        raise UserError(f"unknown backbone {backbone!r}: choose one of {', '.join(BACKBONES)}")
    is_resnet = backbone.startswith("resnet")
    if weights == "deep_stem" and not is_resnet:
        raise UserError(f"the weights deep_stem are random ones of a ResNet; {backbone} has one stem only: --weights none")
    state = None if weights in ("none", "deep_stem") else encoder_weights(backbone, weights)
    if is_resnet:
        encoder = ResNetEncoder(backbone, deep_stem=weights == "deep_stem" or state is not None and has_deep_stem(state))
    else:
        encoder = Xception65() if backbone == "xception65" else TinyEncoder()
    if state is not None:
        load_weights(encoder, backbone, weights, state)
    return encoder


def encoder_weights(backbone: str, weights: str) -> dict:
    """The state dict that `weights`, "default" or a path, stands for, without a classifier."""
    if weights == "default" and backbone == "xception65":
        raise UserError("xception65 has no weights to download: pass the field's xception.pth as --weights PATH, or train from random "
                        "weights with --weights none")
    if weights == "default" and backbone != "tiny":
        enum = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1  # what the field's tables start from
        state = download_weights(f"ImageNet weights of {backbone}", enum.url,
                                 lambda: enum.get_state_dict(progress=False, check_hash=True))
    else:
        state = read_weights(TINY_WEIGHTS if weights == "default" else Path(weights))
    state = from_public_file(state) if backbone == "xception65" else state
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def has_deep_stem(state: dict) -> bool:
    """Whether the state dict of a ResNet, or of a network whose `encoder` is one, is of the stem of three convolutions."""
    return any(key == "conv1.0.weight" or key.endswith("encoder.conv1.0.weight") for key in state)


def download_weights(what: str, url: str, download) -> dict:
    """download(), with a UserError where the network fails."""
    try:
        return download()
    except OSError as error:  # urllib's errors are OSErrors
        raise UserError(
            f"cannot download {what} from {url} ({error}). Download the file on a machine with network access and pass "
            f"--weights PATH, or train from random weights with --weights none"
        ) from error


def read_weights(path: Path) -> dict:
    """The state dict in a file. Raises UserError if there is no such file or it holds anything else."""
    if not path.is_file():
        raise UserError(f"no weight file at {path}: --weights takes default, none or the path of a state dict")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a foreign file can raise anything; each means the same to the user
        raise UserError(f"{path} is not a PyTorch state dict that loads with weights_only=True: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise UserError(f"{path} is not a state dict of an encoder: it does not hold tensors by name")
    return state


def load_weights(encoder: nn.Module, backbone: str, weights: str, state: dict) -> None:
    """Strictly, in float32; only counters of batches may be missing, which old files lack. Raises UserError if it does not fit."""
    counters = {key: value for key, value in encoder.state_dict().items() if key.endswith("num_batches_tracked")}
    state = counters | {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    if wrong := misfit(encoder, state):
        raise UserError(f"the weights {weights!r} do not fit the backbone {backbone}: {wrong}")
    encoder.load_state_dict(state)


def misfit(model: nn.Module, state: dict[str, Tensor]) -> str:
    """What is wrong with the first keys that keep `state` from being loaded; empty if it fits."""
    own = model.state_dict()
    wrong = [f"{key} is missing" for key in own if key not in state]
    wrong += [f"{key} is unknown" for key in state if key not in own]
    wrong += [f"{key} is {list(state[key].shape)} instead of {list(own[key].shape)}"
              for key in own if key in state and state[key].shape != own[key].shape]
    return "; ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")


# ---------------------------------------------------------------- segmentation network


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: [B, in, h, w] -> [B, out, h, w]."""

    def __init__(self, in_channels: int, out_channels: int, rates: tuple[int, ...]):
        super().__init__()
        self.branches = nn.ModuleList(
            [conv_bn_relu(in_channels, out_channels, 1)]
            + [conv_bn_relu(in_channels, out_channels, 3, dilation=rate) for rate in rates]
        )
        self.pooling = conv_bn_relu(in_channels, out_channels, 1)
        self.project = conv_bn_relu((len(rates) + 2) * out_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pooling(x.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        return self.project(torch.cat([branch(x) for branch in self.branches] + [pooled], dim=1))


class DeepLabV3Plus(nn.Module):
    """forward(images [B, 3, H, W]) -> logits [B, num_classes, H, W].

    forward(images, perturb=k) also returns the logits of the last k images decoded from features under channel
    dropout (UniMatch's feature perturbation): ([B, C, H, W], [k, C, H, W]).
    """

    cell = 2  # usrn.py clusters averages of so many features each way

    def __init__(self, backbone: str, num_classes: int, weights: str = "default"):
        super().__init__()
        self.encoder = build_encoder(backbone, weights)
        low, high = self.encoder.low_channels, self.encoder.high_channels
        self.channels, reduced, rates = (32, 16, (2, 4)) if backbone == "tiny" else (256, 48, (6, 12, 18))
        self.aspp = ASPP(high, self.channels, rates)
        self.reduce = conv_bn_relu(low, reduced, 1)
        self.fuse = nn.Sequential(
            conv_bn_relu(self.channels + reduced, self.channels, 3), conv_bn_relu(self.channels, self.channels, 3)
        )
        self.classifier = nn.Conv2d(self.channels, num_classes, 1)

    def decode(self, low: Tensor, high: Tensor) -> Tensor:
        """Encoder features -> z, the [B, 256, H/4, W/4] features before the classifier."""
        high = F.interpolate(self.aspp(high), size=low.shape[2:], mode="bilinear", align_corners=True)
        low = low[:, : self.encoder.low_channels]  # Xception's low_level carries more than the decoder reads
        return self.fuse(torch.cat([self.reduce(low), high], dim=1))

    def features(self, images: Tensor, perturb: int = 0) -> Tensor:
        """z [B + k, 256, H/4, W/4]; the last k of it are those of the last k images under channel dropout."""
        low, high = self.encoder(images)
        if perturb:  # decode clean and perturbed features together: one pass, joint batch statistics
            low = torch.cat([low, F.dropout2d(low[-perturb:], 0.5)])
            high = torch.cat([high, F.dropout2d(high[-perturb:], 0.5)])
        return self.decode(low, high)

    def forward(self, images: Tensor, perturb: int = 0) -> Tensor | tuple[Tensor, Tensor]:
        # float32 before the upsampling: in bf16 it would move confidences across a threshold
        logits = self.classifier(self.features(images, perturb)).float()
        # Enlarged apart, so that a loss of the clean logits alone does not go through the perturbed ones'.
        sizes = [len(images), perturb] if perturb else [len(images)]
        clean_and_perturbed = [F.interpolate(part, size=images.shape[2:], mode="bilinear", align_corners=True) for part in logits.split(sizes)]
        return tuple(clean_and_perturbed) if perturb else clean_and_perturbed[0]

    def parameter_groups(self, lr: float, head_lr_multiplier: float) -> list[dict]:
        """Two groups for the optimizer: the encoder at `lr`, everything else at `lr` x `head_lr_multiplier`."""
        encoder = list(self.encoder.parameters())
        in_encoder = {id(parameter) for parameter in encoder}
        head = [parameter for parameter in self.parameters() if id(parameter) not in in_encoder]
        return [{"params": encoder, "lr": lr}, {"params": head, "lr": lr * head_lr_multiplier}]


class PSPNet(DeepLabV3Plus):
    """Pyramid scene parsing network, Zhao et al., CVPR 2017, on the same encoders (output stride 16): the high features beside their averages
    over 1, 2x2, 3x3 and 6x6 regions. No low features, so z is at the encoder's stride.
    """

    BINS = (1, 2, 3, 6)
    cell = 1

    def __init__(self, backbone: str, num_classes: int, weights: str = "default"):
        nn.Module.__init__(self)
        self.encoder = build_encoder(backbone, weights)
        high = self.encoder.high_channels
        self.channels = 32 if backbone == "tiny" else 512
        self.pyramid = nn.ModuleList(conv_bn_relu(high, high // len(self.BINS), 1) for _ in self.BINS)
        self.fuse = conv_bn_relu(high + len(self.BINS) * (high // len(self.BINS)), self.channels, 3)
        self.classifier = nn.Conv2d(self.channels, num_classes, 1)

    def decode(self, low: Tensor, high: Tensor) -> Tensor:
        """Encoder features -> z [B, 512, H/16, W/16]; `low` is not used."""
        averages = [F.interpolate(conv(F.adaptive_avg_pool2d(high, bins)), size=high.shape[2:], mode="bilinear", align_corners=True)
                    for bins, conv in zip(self.BINS, self.pyramid)]
        return self.fuse(torch.cat([high, *averages], dim=1))


ARCHITECTURES = {"deeplabv3plus": DeepLabV3Plus, "pspnet": PSPNet}
