"""Xception-65, the encoder that the field's COCO tables use.

Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions", CVPR 2017, in the deeper, aligned form of Chen et al.
(DeepLabv3+), ECCV 2018, Sec. 3.2 and Figure 4: 16 middle blocks instead of 8, strided separable convolutions instead of max
pooling, batch norm after the depthwise convolutions too.

    images [B, 3, H, W] -> conv1 32, /2 -> conv2 64
      -> block1 128, /2 -> block2 256, /2 -> block3 728, /2              entry flow; every block is three separable convolutions
      -> block4 ... block19, 728                                         middle flow
      -> block20 1024, no stride -> conv3 1536 -> conv4 1536 -> conv5 2048       exit flow: output stride 16

The state dict is that of the `xception.pth` that UniMatch's users have (the TensorFlow weights, converted to PyTorch); on the same
weights the features are those of the code that reads it. Where that code and the TensorFlow model of DeepLab differ, this
file follows the code that the field's numbers come from:

                                   TensorFlow model                  that code, and here
    shortcut of the middle blocks  the block's input                 the block's input after its ReLU (an in-place one)
    conv3, conv4, conv5            dilation 2 at output stride 16    no dilation
    epsilon of batch norm          1e-3                              1e-5
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOMENTUM = 3e-4  # of batch norm's running statistics, which thus stay close to the pretrained ones; TensorFlow's decay of 0.9997


def batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, momentum=MOMENTUM)


class SeparableConv(nn.Module):
    """3x3 for each channel, then 1x1 over channels: [B, in, H, W] -> [B, out, H/stride, W/stride].

    ReLU stands once before both (`relu_first`, inside blocks) or after each of the two.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, relu_first: bool = True):
        super().__init__()
        self.relu_first = relu_first
        self.depthwise = nn.Conv2d(in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False)
        self.bn1 = batch_norm(in_channels)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn2 = batch_norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.relu_first:
            return self.bn2(self.pointwise(self.bn1(self.depthwise(F.relu(x)))))
        return F.relu(self.bn2(self.pointwise(F.relu(self.bn1(self.depthwise(x))))))


class Block(nn.Module):
    """Three separable convolutions, the last one strided, and a shortcut. `middle`: channels of the first one."""

    def __init__(self, in_channels: int, middle: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.projects = stride != 1 or in_channels != out_channels
        if self.projects:
            self.skip = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.skipbn = batch_norm(out_channels)
        self.sepconv1 = SeparableConv(in_channels, middle)
        self.sepconv2 = SeparableConv(middle, out_channels)
        self.sepconv3 = SeparableConv(out_channels, out_channels, stride)

    def stages(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the second convolution gives, at the input's stride, and the block's output."""
        shortcut = self.skipbn(self.skip(x)) if self.projects else F.relu(x)
        inner = self.sepconv2(self.sepconv1(x))
        return inner, self.sepconv3(inner) + shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(x)[1]


class Xception65(nn.Module):
    """forward: images [B, 3, H, W] -> (low [B, 256, H/4, W/4], high [B, 2048, H/16, W/16]).

    low is what block2's second convolution gives, before the next ReLU.
    """

    low_channels, high_channels = 256, 2048
    low_parts = ("conv1", "bn1", "conv2", "bn2", "block1", "block2")

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 3, 2, 1, bias=False), batch_norm(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 64, 3, 1, 1, bias=False), batch_norm(64)
        self.block1 = Block(64, 128, 128, stride=2)
        self.block2 = Block(128, 256, 256, stride=2)
        self.block3 = Block(256, 728, 728, stride=2)
        for number in range(4, 20):
            setattr(self, f"block{number}", Block(728, 728, 728))
        self.block20 = Block(728, 728, 1024)
        self.conv3 = SeparableConv(1024, 1536, relu_first=False)
        self.conv4 = SeparableConv(1536, 1536, relu_first=False)
        self.conv5 = SeparableConv(1536, 2048, relu_first=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def entry(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """low [B, 256, H/4, W/4] and block2's output [B, 256, H/8, W/8]."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.block2.stages(self.block1(x))

    def exit(self, x: Tensor) -> Tensor:
        """block2's output -> high."""
        for number in range(3, 21):
            x = getattr(self, f"block{number}")(x)
        return self.conv5(self.conv4(self.conv3(x)))

    def checkpointed(self) -> list[nn.Module]:
        """The blocks that `--checkpoint-activations` computes again; block2 is not called as a whole."""
        return [block for name, block in self.named_children() if name.startswith("block") and name != "block2"]

    def low_level(self, images: Tensor) -> Tensor:
        """[B, 512, H/4, W/4]: low, and for `high_level` block2's output, which cannot be computed from low.

        That output is of half the size, so each of its values stands four times; as one tensor both can be cut along the batch.
        """
        low, x = self.entry(images)
        return torch.cat([low, F.interpolate(x, size=low.shape[2:], mode="nearest")], dim=1)

    def high_level(self, low: Tensor) -> Tensor:
        return self.exit(low[:, self.low_channels:, ::2, ::2])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        low, x = self.entry(images)
        return low, self.exit(x)


def from_public_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Its own parameters and statistics: converted files also hold counters and temporaries of the batch norm they came from."""
    return {key: value for key, value in state.items() if not any(word in key for word in ("itr", "tmp", "track"))}
