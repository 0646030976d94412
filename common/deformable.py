"""Deformable attention in plain PyTorch: no compiled extension, on CPUs and GPUs, in any precision."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention of Zhu et al., "Deformable DETR", ICLR 2021, Eq. 2, on one level.

    Every pixel looks, in each head, at a few points around itself; where, and how much each counts, are linear functions
    of its own features. Points between pixels are interpolated bilinearly, outside of the map there are zeros.
    forward: [B, h * w, D] -> [B, h * w, D], at least 2 x 2 pixels; its cost is linear in their number. Raises ValueError
    unless the heads share the channels evenly.
    """

    def __init__(self, channels: int, heads: int = 8, points: int = 4):
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be shared by {heads} heads")
        self.heads, self.points = heads, points
        self.sampling = nn.Linear(channels, 3 * heads * points)  # offsets x [heads, points] and y, in pixels; attention logits [points, heads]
        self.value, self.out = nn.Linear(channels, channels), nn.Linear(channels, channels)
        # As in Deformable DETR: each head starts with points in a direction of its own, all counting the same.
        nn.init.zeros_(self.sampling.weight)
        angle = torch.arange(heads) * (2 * math.pi / heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=1)
        direction = direction / direction.abs().amax(dim=1, keepdim=True)
        offsets = direction[:, None] * torch.arange(1, points + 1)[:, None]  # [heads, points, 2]
        bias = torch.cat([offsets, torch.zeros(heads, points, 1)], dim=2).permute(2, 0, 1)
        with torch.no_grad():
            self.sampling.bias.copy_(bias.flatten())
        for linear in (self.value, self.out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        offset_x, offset_y, logits = self.sampling(x).chunk(3, dim=-1)
        offset_x, offset_y = (offset.unflatten(-1, (self.heads, self.points)) for offset in (offset_x, offset_y))
        weight = logits.unflatten(-1, (self.points, self.heads)).softmax(dim=-2).transpose(-1, -2)  # along the last axis it is slow
        row = torch.arange(height, device=x.device, dtype=torch.float32).repeat_interleave(width).view(1, -1, 1, 1)
        column = torch.arange(width, device=x.device, dtype=torch.float32).repeat(height).view(1, -1, 1, 1)
        value = self.value(x).unflatten(-1, (self.heads, -1))
        # float32 coordinates: in bf16 they would be whole pixels beyond 128
        attended = bilinear_sum(value, column + offset_x, row + offset_y, weight, height, width)
        return self.out(attended)


def bilinear_sum(value: Tensor, x: Tensor, y: Tensor, weight: Tensor, height: int, width: int) -> Tensor:
    """Sum over points of weight x value at (x, y): value [B, h w, heads, d], the others [B, N, heads, points] -> [B, N, heads d].

    x, y in pixels: (0, 0) is the centre of the first one. Zeros outside.
    """
    if value.is_cuda or torch.is_grad_enabled():
        return bilinear_sum_by_grid_sample(value, x, y, weight, height, width)
    return bilinear_sum_by_rows(value, x, y, weight, height, width)


def bilinear_sum_by_grid_sample(value: Tensor, x: Tensor, y: Tensor, weight: Tensor, height: int, width: int) -> Tensor:
    """`bilinear_sum` for training and for GPUs."""
    batch, pixels, heads, points = x.shape
    maps = value.permute(0, 2, 3, 1).reshape(batch * heads, -1, height, width).to(x.dtype)
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    grid = grid.transpose(1, 2).reshape(batch * heads, pixels, points, 2)
    weight = weight.transpose(1, 2).reshape(batch * heads, 1, pixels, points)
    found = (F.grid_sample(maps, grid, align_corners=False) * weight).sum(dim=-1)  # [B heads, d, N]
    return found.view(batch, -1, pixels).transpose(1, 2)


def bilinear_sum_by_rows(value: Tensor, x: Tensor, y: Tensor, weight: Tensor, height: int, width: int) -> Tensor:
    """`bilinear_sum` through embedding_bag, which reads the four neighbours of a point as rows: several times as fast as
    grid_sample on a CPU, but slow backwards."""
    batch, pixels, heads, points = x.shape
    x, y, weight = (part.flatten(2) for part in (x, y, weight))
    left, top = x.floor().clamp_(0, width - 2), y.floor().clamp_(0, height - 2)
    # The hat function 1 - |d|, at least 0, is the bilinear weight, and is zero where the point lies outside of the map.
    at_left, at_top = x - left, y - top
    at_right, at_bottom = at_left - 1, at_top - 1
    for part in (at_left, at_right, at_top, at_bottom):
        part.abs_().neg_().add_(1).clamp_(min=0)
    at_top, at_bottom = at_top.mul_(weight), at_bottom.mul_(weight)
    weights = torch.stack([at_top * at_left, at_top * at_right, at_bottom * at_left, at_bottom * at_right], dim=-1)
    # Row of (image, pixel, head) in value.view(-1, d).
    options = {"device": x.device, "dtype": torch.int32 if batch * pixels * heads < 2**31 else torch.int64}
    image, head = torch.arange(batch, **options).view(-1, 1, 1) * pixels, torch.arange(heads, **options).repeat_interleave(points)
    row = top.mul_(width).add_(left).to(options["dtype"]).add_(image).mul_(heads).add_(head)
    rows = torch.stack([row, row + heads, row + width * heads, row + (width + 1) * heads], dim=-1)
    found = F.embedding_bag(rows.view(-1, 4 * points), value.reshape(-1, value.shape[-1]).to(x.dtype), mode="sum",
                            per_sample_weights=weights.view(-1, 4 * points))
    return found.view(batch, pixels, -1)
