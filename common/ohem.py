"""Online hard example mining (Shrivastava et al. 2016), per pixel, as the field trains on Cityscapes."""

import torch
from torch import Tensor

from common.augment import IGNORE
from common.runtime import all_reduce_sum

LEAST = 200_000 / (2 * 801**2)  # UniMatch keeps at least 200,000 pixels of the two crops of 801x801 on each of its GPUs: 15.6 %


def hard_pixel_loss(loss: Tensor, label: Tensor, threshold: float, least: float = LEAST) -> Tensor:
    """Sum of `loss` over the hard pixels, scaled so that dividing it by the number of labeled pixels gives the hard ones' mean.

    loss: cross entropy [B, H, W]; label [B, H, W], 255 = ignore. Hard are pixels whose class has at most the probability `threshold`, and always
    the share `least` of the labeled pixels (of this rank) with the lowest. The scale is that of all ranks' pixels.
    """
    valid = label != IGNORE
    probability = torch.where(valid, (-loss.detach()).exp(), 2.0)  # ignored pixels come last
    last = (valid.sum() * least).long().clamp(min=1) - 1
    limit = probability.flatten().sort().values.gather(0, last[None]).clamp(min=threshold)
    kept = valid & (probability <= limit)
    labeled, hard = all_reduce_sum(torch.stack([valid.sum(), kept.sum()]).float()).unbind()
    return (loss * kept).sum() * (labeled / hard.clamp(min=1))
