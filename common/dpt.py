"""DPT on a vision transformer: the network of UniMatch V2.

Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", TMLR 2024 (encoder); Ranftl et al., "Vision
Transformers for Dense Prediction", ICCV 2021 (head), in the small form of Yang et al., "UniMatch V2", TPAMI 2025.

    images [B, 3, H, W], normalised, resized to the nearest multiples of the patch (h x w patches)
      -> encoder: patch tokens of four blocks, normalised, as maps [B, 384, h, w]                       ViT-S/14
      -> one map per scale: 4h x 4w, 2h x 2w, h x w, h/2 x w/2, 64 channels each
      -> fused from coarse to fine, every step to the next scale's size; the last one to 8h x 8w
      -> 3x3 conv, ReLU, 1x1 classifier -> bilinear upsampling (align_corners=True) -> logits [B, C, H, W]

`tiny_vit` (0.5 M parameters) is for the embedded data sets; its pretrained weights are in `tiny_vit.pt`.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.deeplab import download_weights, load_weights, read_weights
from common.runtime import UserError

TINY_VIT_WEIGHTS = Path(__file__).with_name("tiny_vit.pt")
DINOV2_S_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"
VIT_BACKBONES = ("dinov2_s", "tiny_vit")


# ---------------------------------------------------------------- encoder


class Attention(nn.Module):
    """Multi-head self-attention: [B, N, dim] -> [B, N, dim]."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, N, dim/heads]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al. 2021); 1 before training."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Attention and MLP, each normalised before and scaled after: [B, N, dim] -> [B, N, dim]."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)
        self.ls2 = LayerScale(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbedding(nn.Module):
    """A linear map of every patch: [B, 3, h * patch, w * patch] -> [B, h * w, dim]."""

    def __init__(self, patch: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """DINOv2's ViT without register tokens. Its state dict is that of `dinov2_vits14_pretrain.pth` for ViT-S/14.

    forward: images [B, 3, h * patch, w * patch] -> four maps [B, dim, h, w], the patch tokens of the blocks `layers`
    (counted from 0) after the final norm. Any h and w will do: the position embeddings, made for `image_size`, follow.
    """

    def __init__(self, image_size: int, patch: int, dim: int, depth: int, heads: int, layers: tuple[int, ...]):
        super().__init__()
        self.patch, self.dim, self.layers = patch, dim, layers
        self.grid = image_size // patch  # side of the grid that pos_embed holds, in patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim), requires_grad=False)  # only DINOv2's own training uses it
        self.patch_embed = PatchEmbedding(patch, dim)
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def position_embeddings(self, h: int, w: int) -> Tensor:
        """[1, 1 + h * w, dim], the class token's first. The grid is resampled bicubically if it has another size.

        By size: the public code resamples by a factor that a constant 0.1 is added to, which moves the grid slightly.
        """
        if (h, w) == (self.grid, self.grid):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))
        grid = F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def checkpointed(self) -> list[nn.Module]:
        """The blocks that `--checkpoint-activations` computes again."""
        return list(self.blocks)

    def forward(self, images: Tensor) -> list[Tensor]:
        h, w = images.shape[2] // self.patch, images.shape[3] // self.patch
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.position_embeddings(h, w)
        maps = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.layers:
                maps.append(self.norm(x)[:, 1:].transpose(1, 2).unflatten(2, (h, w)))
        return maps


def build_vit(backbone: str, weights: str = "default") -> VisionTransformer:
    """`weights`: "default" (DINOv2's for dinov2_s, the shipped file for tiny_vit), "none", or a path to a state dict.

    Raises UserError for an unknown backbone and for weights that cannot be had or do not fit.
    """
    if backbone == "dinov2_s":
        encoder = VisionTransformer(image_size=518, patch=14, dim=384, depth=12, heads=6, layers=(2, 5, 8, 11))
    elif backbone == "tiny_vit":
        encoder = VisionTransformer(image_size=64, patch=8, dim=96, depth=4, heads=3, layers=(0, 1, 2, 3))
    else:
        raise UserError(f"unknown backbone {backbone!r}: choose one of {', '.join(VIT_BACKBONES)}")
    if weights == "default" and backbone == "dinov2_s":
        load_weights(encoder, backbone, weights, download_weights("DINOv2 weights", DINOV2_S_URL, lambda: (
            torch.hub.load_state_dict_from_url(DINOV2_S_URL, map_location="cpu", progress=False, weights_only=True))))
    elif weights != "none":
        path = TINY_VIT_WEIGHTS if weights == "default" else Path(weights)
        load_weights(encoder, backbone, weights, read_weights(path))
    return encoder


# ---------------------------------------------------------------- segmentation network


class ResidualUnit(nn.Module):
    """x + conv(relu(conv(relu(x)))) without normalisation: [B, C, h, w] -> [B, C, h, w]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Fusion(nn.Module):
    """Adds a scale to the path from the coarser ones and enlarges the sum to `size`. The coarsest has no path yet."""

    def __init__(self, channels: int, coarsest: bool):
        super().__init__()
        self.skip = None if coarsest else ResidualUnit(channels)
        self.refine = ResidualUnit(channels)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, scale: Tensor, path: Tensor | None, size: tuple[int, int]) -> Tensor:
        x = scale if self.skip is None else path + self.skip(scale)
        return self.project(F.interpolate(self.refine(x), size=size, mode="bilinear", align_corners=True))


class DPT(nn.Module):
    """forward(images [B, 3, H, W]) -> logits [B, num_classes, H, W], for any H and W.

    forward(images, channel_mask [B, encoder.dim]) multiplies the encoder's four maps by the mask before the head
    (UniMatch V2's complementary dropout).
    """

    def __init__(self, backbone: str, num_classes: int, weights: str = "default"):
        super().__init__()
        self.encoder = build_vit(backbone, weights)
        dim, self.patch = self.encoder.dim, self.encoder.patch
        features, channels = (32, (24, 32, 48, 64)) if backbone == "tiny_vit" else (64, (48, 96, 192, 384))
        resize = (nn.ConvTranspose2d(channels[0], channels[0], 4, stride=4),
                  nn.ConvTranspose2d(channels[1], channels[1], 2, stride=2),
                  nn.Identity(),
                  nn.Conv2d(channels[3], channels[3], 3, stride=2, padding=1))
        self.scales = nn.ModuleList([  # from fine to coarse: the earlier a block, the finer the scale it serves
            nn.Sequential(nn.Conv2d(dim, c, 1), resize[i], nn.Conv2d(c, features, 3, padding=1, bias=False))
            for i, c in enumerate(channels)
        ])
        self.fusions = nn.ModuleList([Fusion(features, coarsest=i == 3) for i in range(4)])
        self.output = nn.Sequential(nn.Conv2d(features, features, 3, padding=1), nn.ReLU(inplace=True))
        self.classifier = nn.Conv2d(features, num_classes, 1)

    def decode(self, maps: list[Tensor]) -> Tensor:
        """Four maps [B, dim, h, w] -> [B, features, 8h, 8w], the features before the classifier."""
        scales = [scale(features) for scale, features in zip(self.scales, maps)]
        path, sizes = None, [tuple(2 * side for side in scales[0].shape[2:])] + [scale.shape[2:] for scale in scales[:3]]
        for i in (3, 2, 1, 0):
            path = self.fusions[i](scales[i], path, sizes[i])
        return self.output(path)

    def forward(self, images: Tensor, channel_mask: Tensor | None = None) -> Tensor:
        # The nearest multiple of the patch, at least one patch.
        size = tuple(max(1, (side + self.patch // 2) // self.patch) * self.patch for side in images.shape[2:])
        resized = images if size == tuple(images.shape[2:]) else F.interpolate(
            images, size=size, mode="bilinear", align_corners=True)
        maps = self.encoder(resized)
        if channel_mask is not None:
            maps = [features * channel_mask[:, :, None, None] for features in maps]
        # float32 before the upsampling: in bf16 it would move confidences across a threshold
        logits = self.classifier(self.decode(maps)).float()
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=True)

    def parameter_groups(self, lr: float, head_lr_multiplier: float) -> list[dict]:
        """Two groups for the optimizer: the encoder at `lr`, everything else at `lr` x `head_lr_multiplier`."""
        encoder = [parameter for parameter in self.encoder.parameters() if parameter.requires_grad]
        in_encoder = {id(parameter) for parameter in self.encoder.parameters()}
        head = [parameter for parameter in self.parameters() if id(parameter) not in in_encoder]
        return [{"params": encoder, "lr": lr}, {"params": head, "lr": lr * head_lr_multiplier}]
