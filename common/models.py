"""Segmentation networks: images [B, 3, H, W], normalised -> logits [B, C, H, W] in float32.

    DeepLabV3Plus   Chen et al., ECCV 2018, as semi-supervised segmentation has it (CPS, UniMatch)
    PSPNet          Zhao et al., CVPR 2017
    DPT             Ranftl et al., ICCV 2021, in the small form of UniMatch V2 (Yang et al., 2025)

Each is `encoder`, `decode` -> features [B, channels, h, w], and a 1x1 `classifier`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.augment import IGNORE
from common.backbones import BACKBONES, VIT_BACKBONES, ResNet, build_encoder, conv_bn_relu
from common.runtime import all_reduce_sum

# UniMatch keeps at least 200,000 pixels of the two crops of 801x801 on each of its GPUs: 15.6 %.
HARD_SHARE = 200_000 / (2 * 801**2)


def hard_pixel_loss(loss: Tensor, label: Tensor, threshold: float) -> Tensor:
    """Online hard example mining (Shrivastava et al., CVPR 2016) on pixels.

    loss: cross entropy [B, H, W]; label [B, H, W], 255 = ignore. Hard are pixels whose class has
    at most the probability `threshold`, and always this rank's HARD_SHARE with the lowest. Returns
    their sum x labeled / hard pixels: divided by the labeled ones it is their mean (all ranks).
    """
    valid = label != IGNORE
    probability = torch.where(valid, (-loss.detach()).exp(), 2.0)  # ignored pixels come last
    last = (valid.sum() * HARD_SHARE).long().clamp(min=1) - 1
    limit = probability.flatten().sort().values.gather(0, last[None]).clamp(min=threshold)
    hard = valid & (probability <= limit)
    labeled, kept = all_reduce_sum(torch.stack([valid.sum(), hard.sum()]).float()).unbind()
    return (loss.float() * hard).sum() * (labeled / kept.clamp(min=1))


def resize(x: Tensor, size) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


class SegmentationNetwork(nn.Module):
    """forward(images) -> logits; forward(images, perturb=k) -> logits, and the logits [k, C, H, W]
    of the last k images under channel dropout (UniMatch's feature perturbation).
    """

    def features(self, images: Tensor, perturb: int = 0) -> Tensor:
        """[B + k, channels, h, w], before the classifier; the last k under channel dropout."""
        low, high = self.encoder(images)
        if perturb:  # decode clean and perturbed features together: joint batch statistics
            low = torch.cat([low, F.dropout2d(low[-perturb:], 0.5)])
            high = torch.cat([high, F.dropout2d(high[-perturb:], 0.5)])
        return self.decode(low, high)

    def forward(self, images: Tensor, perturb: int = 0) -> Tensor | tuple[Tensor, Tensor]:
        # float32 before the upsampling: in bf16 it would move confidences across a threshold
        logits = self.classifier(self.features(images, perturb)).float()
        size = images.shape[2:]
        if not perturb:
            return resize(logits, size)
        # Enlarged apart: a loss of the clean logits alone then does not go through the others.
        clean, perturbed = logits.split([len(images), perturb])
        return resize(clean, size), resize(perturbed, size)

    def parameter_groups(self, lr: float, head_lr_multiplier: float) -> list[dict]:
        """The encoder at `lr`, everything else at `lr` x `head_lr_multiplier`."""
        encoder = [weight for weight in self.encoder.parameters() if weight.requires_grad]
        named = self.named_parameters()
        head = [weight for name, weight in named if not name.startswith("encoder.")]
        return [{"params": encoder, "lr": lr}, {"params": head, "lr": lr * head_lr_multiplier}]


# ---------------------------------------------------------------- on convolutional encoders


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: [B, inputs, h, w] -> [B, outputs, h, w]."""

    def __init__(self, inputs: int, outputs: int, rates: tuple[int, ...]):
        super().__init__()
        self.branches = nn.ModuleList([conv_bn_relu(inputs, outputs, 1)])
        for rate in rates:
            self.branches.append(conv_bn_relu(inputs, outputs, 3, dilation=rate))
        self.pooling = conv_bn_relu(inputs, outputs, 1)
        self.project = conv_bn_relu((len(rates) + 2) * outputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pooling(x.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        return self.project(torch.cat([*(branch(x) for branch in self.branches), pooled], dim=1))


class DeepLabV3Plus(SegmentationNetwork):
    cell = 2  # usrn.py clusters averages of so many features each way
    heads = {"tiny": (32, 16, (2, 4)), "mobilenet_v2": (128, 24, (6, 12, 18))}

    def __init__(self, backbone: str, num_classes: int, weights: str = "default"):
        super().__init__()
        self.encoder = build_encoder(backbone, weights, BACKBONES)
        self.channels, reduced, rates = self.heads.get(backbone, (256, 48, (6, 12, 18)))
        self.aspp = ASPP(self.encoder.high_channels, self.channels, rates)
        self.reduce = conv_bn_relu(self.encoder.low_channels, reduced, 1)
        self.fuse = nn.Sequential(conv_bn_relu(self.channels + reduced, self.channels, 3),
                                  conv_bn_relu(self.channels, self.channels, 3))
        self.classifier = nn.Conv2d(self.channels, num_classes, 1)

    def add_dropout_and_multi_grid(self) -> None:
        """As early PyTorch code had it: 0.5, 0.5, 0.1, and a ResNet's last stage by 2, 4, 8."""
        if isinstance(self.encoder, ResNet):
            for block, rate in zip(self.encoder.layer4, (2, 4, 8)):
                block.conv2.dilation = block.conv2.padding = (rate, rate)
        for layers, share in ((self.aspp.project, 0.5), (self.fuse[0], 0.5), (self.fuse[1], 0.1)):
            layers.append(nn.Dropout(share))

    def decode(self, low: Tensor, high: Tensor) -> Tensor:
        """-> [B, channels, H/4, W/4] (tiny: H/2)."""
        high = resize(self.aspp(high), low.shape[2:])
        low = self.reduce(low[:, : self.encoder.low_channels])  # Xception's low_level has more
        return self.fuse(torch.cat([low, high], dim=1))


class PSPNet(SegmentationNetwork):
    """The high features beside their averages over 1, 2x2, 3x3 and 6x6 regions."""

    bins = (1, 2, 3, 6)
    cell = 1
    heads = {"tiny": 32, "mobilenet_v2": 128}

    def __init__(self, backbone: str, num_classes: int, weights: str = "default"):
        super().__init__()
        self.encoder = build_encoder(backbone, weights, BACKBONES)
        high = self.encoder.high_channels
        reduced = high // len(self.bins)
        self.channels = self.heads.get(backbone, 512)
        self.pyramid = nn.ModuleList(conv_bn_relu(high, reduced, 1) for _ in self.bins)
        self.fuse = conv_bn_relu(high + len(self.bins) * reduced, self.channels, 3)
        self.classifier = nn.Conv2d(self.channels, num_classes, 1)

    def decode(self, low: Tensor, high: Tensor) -> Tensor:
        """-> [B, channels, H/16, W/16] (tiny: H/8); `low` is not used."""
        scales = [high]
        for bins, conv in zip(self.bins, self.pyramid):
            average = conv(F.adaptive_avg_pool2d(high, bins))
            scales.append(resize(average, high.shape[2:]))
        return self.fuse(torch.cat(scales, dim=1))


ARCHITECTURES = {"deeplabv3plus": DeepLabV3Plus, "pspnet": PSPNet}


# ---------------------------------------------------------------- on a vision transformer


class ResidualUnit(nn.Module):
    """x + conv(relu(conv(relu(x)))): [B, C, h, w] -> [B, C, h, w]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Fusion(nn.Module):
    """scale, plus path unless it is the coarsest, both [B, C, h, w] -> refined, [B, C, *size]."""

    def __init__(self, channels: int, coarsest: bool):
        super().__init__()
        self.skip = None if coarsest else ResidualUnit(channels)
        self.refine = ResidualUnit(channels)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, scale: Tensor, path: Tensor | None, size) -> Tensor:
        x = scale if self.skip is None else path + self.skip(scale)
        return self.project(resize(self.refine(x), size))


class DPT(SegmentationNetwork):
    """forward(images, channel_mask [B, encoder.dim]) multiplies the encoder's four maps by the mask
    (UniMatch V2's complementary dropout); has no `features`. Images become whole patches first.
    """

    def __init__(self, backbone: str, num_classes: int, weights: str = "default"):
        super().__init__()
        self.encoder = build_encoder(backbone, weights, VIT_BACKBONES)
        self.channels, widths = 64, (48, 96, 192, 384)
        if backbone == "tiny_vit":
            self.channels, widths = 32, (24, 32, 48, 64)
        enlarge = (nn.ConvTranspose2d(widths[0], widths[0], 4, stride=4),
                   nn.ConvTranspose2d(widths[1], widths[1], 2, stride=2),
                   nn.Identity(),
                   nn.Conv2d(widths[3], widths[3], 3, stride=2, padding=1))
        self.scales = nn.ModuleList()  # from fine to coarse: early blocks serve fine scales
        for width, change in zip(widths, enlarge):
            first = nn.Conv2d(self.encoder.dim, width, 1)
            last = nn.Conv2d(width, self.channels, 3, padding=1, bias=False)
            self.scales.append(nn.Sequential(first, change, last))
        self.fusions = nn.ModuleList(Fusion(self.channels, coarsest=i == 3) for i in range(4))
        self.output = nn.Sequential(nn.Conv2d(self.channels, self.channels, 3, padding=1),
                                    nn.ReLU(inplace=True))
        self.classifier = nn.Conv2d(self.channels, num_classes, 1)

    def decode(self, maps: list[Tensor]) -> Tensor:
        """Four maps [B, dim, h, w] -> [B, channels, 8h, 8w]."""
        scales = [scale(features) for scale, features in zip(self.scales, maps)]
        path = None
        for i in (3, 2, 1, 0):
            size = scales[i - 1].shape[2:] if i else [2 * side for side in scales[0].shape[2:]]
            path = self.fusions[i](scales[i], path, size)
        return self.output(path)

    def forward(self, images: Tensor, channel_mask: Tensor | None = None) -> Tensor:
        patch, size = self.encoder.patch, images.shape[2:]
        whole = [max(1, (side + patch // 2) // patch) * patch for side in size]  # the nearest
        maps = self.encoder(resize(images, whole))
        if channel_mask is not None:
            maps = [features * channel_mask[:, :, None, None] for features in maps]
        return resize(self.classifier(self.decode(maps)).float(), size)
