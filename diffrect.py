"""DiffRect: Latent Diffusion Label Rectification for Semi-supervised Medical Image Segmentation
Liu et al., MICCAI 2024.

A U-Net that learns from its own pseudo labels keeps its errors. A second network, the rectifier,
learns how label maps get better: from the strong view's to the weak view's on unlabeled slices,
from the weak view's to the truth on labeled ones. It embeds both, and recovers the finer one's
latent from noise by diffusion, on condition of the coarser one's. So it turns weak pseudo labels
into better ones, which the U-Net learns from. Only the U-Net is used afterwards.

    Eq. 1, 7      forward diffusion                      cosine_alpha_bar, add_noise
    Eq. 2, 3, 12  reverse diffusion                      reverse_step, Rectifier.rectify
    Eq. 4         classes as colours far apart (SCS)     semantic_colors, color_masks
    Eq. 5         embedding of a coloured mask           Rectifier.embed
    Eq. 6         calibration guidance tau (CG)          dice_coefficient, calibration_guidance
    Eq. 8-11      S2W and W2G, losses of latents         Denoiser, Rectifier.forward
    Eq. 13, 14    the two networks' losses               fixmatch_loss, mask_loss, train
The denoiser predicts the clean latent, as in Eq. 9 and 11, not the noise as in Eq. 3 and 12; a step
has the posterior's variance. As released: no gradient to targets of Eq. 9, 11; latents decoded with
skips from the condition; a Dice loss on labels; weights of pseudo labels rise, rectified ones wait.

    python diffrect.py                                     embedded phantom
    python diffrect.py --dataset acdc --labeled 7          the paper; --rules released: the authors
    torchrun --nproc_per_node=3 diffrect.py --dataset acdc --labeled 7
Data, results, tables and all differences from the paper and the released code: .docs/diffrect.md
"""

import math
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations, pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from common import augment
from common.augment import IGNORE, to_float
from common.backbones import load_strictly
from common.medical import (VolumeData, VolumeInfo, VolumeOptions, evaluate_volumes, load_volumes,
                            slice_loader, write_sample_grid)
from common.runtime import (KEEP_BUFFERS, Checkpoint, Log, Milestones, RunOptions, all_reduce_sum,
                            bf16_is_fast, init_distributed, mean_over_ranks, option, parse, require,
                            run_main, say, with_defaults, world_size)

RECTIFY = ("lcc", "diffrect")
MODELS = ("supervised", "fixmatch", *RECTIFY)
GUIDANCE = ("dice", "jaccard", "both", "fixed", "random", "none", "released")
STEPS = 10  # T of Eq. 7: the released code's, the paper gives none
TAU_SCALE = 1000  # tau of 0 to 1 is embedded as DDPM embeds its 1000 steps; released: 999


@dataclass
class Config(VolumeOptions, RunOptions):
    """What touches learning; None: as `complete` has it."""

    model: str = option("diffrect", "supervised, or a row of Table 4", choices=MODELS)
    rules: str = option("paper", "of pseudo labels and their loss, tau, lambda_1, reverse steps",
                        choices=("paper", "released"))
    strong_labeled: bool = option(False, "with --model supervised: the strong view of slices")
    s2w: bool = option(True, "rectifier on unlabeled slices, strong to weak: Eq. 9, its masks")
    w2g: bool = option(True, "weak-to-truth transport on labeled ones, Eq. 11; off: strong to weak")
    colors: bool = option(True, "semantic colours (SCS); off: grey levels")
    guidance: str | None = option(None, "tau (CG), Table 5 (dice; released)", choices=GUIDANCE)
    threshold: float = option(0.8, "least confidence of a pseudo label", low=0, below=1)
    consistency: float | None = option(None, "weight of pseudo labels, once it has risen", low=0)
    rampup: int | None = option(None, "iterations in which it rises", low=0)
    warmup: int | None = option(None, "iterations before rectified labels are used", low=0)
    rectify_weight: float | None = option(None, "of rectified labels (there 1), Eq. 13", low=0)
    batch_statistics: bool = option(True, "in the rectifier while it rectifies; off: running ones")
    dropout: bool = option(True, "in the U-Net's encoder, as released; the paper says nothing")
    channels: int | None = option(None, "of the first level of both networks", low=1)
    crop: int | None = option(None, "slices are resized to crop x crop", low=64, multiple=64)
    batch_size: int | None = option(None, "labeled (and unlabeled) slices a step, all GPUs", low=1)
    iterations: int | None = option(None, "optimizer steps", low=1)
    lr: float | None = option(None, "of both networks; a recipe's grows with --batch-size", above=0)
    weight_decay: float = option(1e-4, "of SGD", low=0)
    seed: int = option(0, "of weights, sampling and augmentation", low=0)


def complete(config: Config, data: VolumeData, device: torch.device) -> Config:
    """With the recipe's values for None. Raises UserError for options that do not go together."""
    info = data.info
    config = with_defaults(config, batch_size=info.batch_size, iterations=info.iterations)
    scale = config.batch_size / info.batch_size
    steps = info.iterations  # of the recipe: a shorter run sees the beginning of its ramps
    config = with_defaults(
        config, guidance="dice" if config.rules == "paper" else "released",
        consistency=info.consistency, rectify_weight=info.rectify_weight, lr=info.lr * scale,
        rampup=round(info.rampup * steps), warmup=round(info.warmup * steps), crop=info.crop,
        channels=info.channels, eval_every=200, amp=bf16_is_fast(device), lists=data.digest,
        output=f"runs/diffrect_{data.tag}_{config.seed}")
    require(config.model == "supervised" or not config.strong_labeled,
            "--strong-labeled needs --model supervised")
    require(config.s2w and config.w2g or config.model == "diffrect" and config.s2w != config.w2g,
            "--no-s2w and --no-w2g: one of them, for --model diffrect; without both: --model lcc")
    require(len(getattr(data, config.eval_split)) > 0, f"there is no {config.eval_split} list")
    require(not config.checkpoint_activations, "--checkpoint-activations is not for diffrect.py")
    if config.model in RECTIFY and config.warmup >= config.iterations:
        say(f"--warmup is {config.warmup}: {config.iterations} steps use no rectified label")
    return config


# ---------------------------------------------------------------- the method


def semantic_colors(num_classes: int) -> Tensor:
    """M_C of Eq. 4, uint8 [C, 3]: black and the corners of the RGB cube farthest apart; C <= 8."""
    black, *corners = product((0, 255), repeat=3)
    choices = [(black, *others) for others in combinations(corners, num_classes - 1)]
    best = max(choices, key=lambda choice: sorted(  # first by the smallest distance
        math.dist(*pair) for pair in combinations(choice, 2)))
    return torch.tensor(best, dtype=torch.uint8)


def color_masks(labels: Tensor, colors: Tensor) -> Tensor:
    """f of Eq. 4: labels [B, H, W], colors uint8 [C, 3] -> [B, 3, H, W] in [0, 1]; 255 as 0."""
    labels = torch.where(labels == IGNORE, 0, labels.long())
    return (colors.float() / 255)[labels].permute(0, 3, 1, 2)


def dice_coefficient(a: Tensor, b: Tensor, num_classes: int, jaccard: bool = False,
                     background: bool = False) -> Tensor:
    """Eq. 6: Dice (or Jaccard) of label maps [B, H, W], [B] in [0, 1]; 255 in either is left out.

    A mean over the classes (0 only with `background`) that occur in either map; 1 if none does.
    """
    classes = torch.arange(1 - background, num_classes, device=a.device)[:, None, None]
    known = ((a != IGNORE) & (b != IGNORE))[:, None]
    a, b = (a[:, None] == classes) & known, (b[:, None] == classes) & known
    both, total = (a & b).sum(dim=(2, 3)), a.sum(dim=(2, 3)) + b.sum(dim=(2, 3))  # [B, classes]
    values = both / (total - both).clamp(min=1) if jaccard else 2 * both / total.clamp(min=1)
    occurring = (total > 0).sum(dim=1)
    return torch.where(occurring > 0, values.sum(dim=1) / occurring.clamp(min=1), 1.0)


def calibration_guidance(kind: str, coarse: Tensor, fine: Tensor, num_classes: int) -> Tensor:
    """tau of Eq. 6, Table 5 for pairs of label maps [B, H, W]: [B] in [0, 1], both: [0, 2].

    none: 0 (Table 4, w/o CG). released: 1 - Dice with background of this rank's slices as one map.
    """
    dice = dice_coefficient(coarse, fine, num_classes)  # all kinds, so that all make equal draws
    jaccard = dice_coefficient(coarse, fine, num_classes, jaccard=True)
    maps = (labels.flatten(0, 1)[None] for labels in (coarse, fine))
    of_batch = dice_coefficient(*maps, num_classes, background=True)
    return {"dice": dice, "jaccard": jaccard, "both": dice + jaccard,
            "fixed": torch.full_like(dice, 0.5), "random": torch.rand_like(dice),
            "none": torch.zeros_like(dice), "released": (1 - of_batch).expand_as(dice)}[kind]


def cosine_alpha_bar(steps: int) -> Tensor:
    """alpha-bar of steps 0 (clean: 1) to T, float64 [T + 1]: Nichol and Dhariwal 2021, Eq. 17, with
    beta at most 0.999."""
    phase = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2
    f = torch.cos(phase).square()
    beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, dim=0)])


def add_noise(z0: Tensor, alpha_bar: Tensor, noise: Tensor) -> Tensor:
    """Eq. 1, 7: a sample of q(z_t | z_0), for alpha_bar of step t that broadcasts to z0."""
    return alpha_bar.sqrt() * z0 + (1 - alpha_bar).sqrt() * noise


def reverse_step(z_t: Tensor, z0: Tensor, alpha_bar: Tensor, alpha_bar_next: Tensor,
                 noise: Tensor | None = None) -> Tensor:
    """Eq. 3, 12, given the predicted z0; noise: their eta, N(0, I). Without it, as released, the
    step is DDIM's. Latents [B, D, h, w], half ones in float32; alpha_bar 0-d, of this step, of the
    one it leads to."""
    z_t, z0 = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (z_t, z0))
    epsilon = (z_t - alpha_bar.sqrt() * z0) / (1 - alpha_bar).sqrt()
    if noise is None:
        return add_noise(z0, alpha_bar_next, epsilon)
    alpha = alpha_bar / alpha_bar_next
    mean = (z_t - (1 - alpha) / (1 - alpha_bar).sqrt() * epsilon) / alpha.sqrt()
    return mean + ((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha)).sqrt() * noise


def ramp(iteration: int, length: int) -> float:
    """exp(-5 (1 - k / K)^2) up to iteration K = length, then 1 (Laine and Aila 2017)."""
    return math.exp(-5 * (1 - min(iteration / length, 1)) ** 2) if length else 1.0


# ---------------------------------------------------------------- networks


def conv_bn_lrelu(inputs: int, outputs: int) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, 3, padding=1)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.LeakyReLU())


class Block(nn.Module):
    """Two convolutions; dropout between them and, if embedding_dim, a shift by embedding [B, E]."""

    def __init__(self, inputs: int, outputs: int, dropout: float = 0.0, embedding_dim: int = 0):
        super().__init__()
        self.first, self.second = conv_bn_lrelu(inputs, outputs), conv_bn_lrelu(outputs, outputs)
        self.shift = nn.Linear(embedding_dim, outputs) if embedding_dim else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        x = self.first(x)
        if self.shift is not None:
            x = x + self.shift(F.silu(embedding))[:, :, None, None]
        return self.second(self.dropout(x))


class Up(nn.Module):
    """A 1x1 convolution, twice the size, then a block that also sees `skip`, of that size."""

    def __init__(self, inputs: int, skip: int, embedding_dim: int = 0):
        super().__init__()
        self.narrow = nn.Conv2d(inputs, skip, 1)
        self.block = Block(2 * skip, skip, embedding_dim=embedding_dim)

    def forward(self, x: Tensor, skip: Tensor, embedding: Tensor | None = None) -> Tensor:
        x = F.interpolate(self.narrow(x), scale_factor=2, mode="bilinear", align_corners=True)
        return self.block(torch.cat([skip, x], dim=1), embedding)


class Encoder(nn.Module):
    """[B, inputs, S, S] -> features of five levels, strides 1 to 16, plus those of `added`."""

    def __init__(self, inputs: int, channels: int, embedding_dim: int = 0, dropout: bool = True):
        super().__init__()
        widths = [inputs, *(channels * 2**level for level in range(5))]
        sizes = zip(widths, widths[1:], (0.05, 0.1, 0.2, 0.3, 0.5) if dropout else [0.0] * 5)
        self.blocks = nn.ModuleList(Block(*size, embedding_dim) for size in sizes)

    def forward(self, x: Tensor, embedding=None, added=None) -> list[Tensor]:
        features = []
        for level, block in enumerate(self.blocks):
            x = block(F.max_pool2d(x, 2) if level else x, embedding)
            x = x if added is None else x + added[level]
            features.append(x)
        return features


class Decoder(nn.Module):
    """Features of five levels -> logits [B, C, S, S]."""

    def __init__(self, channels: int, num_classes: int, embedding_dim: int = 0):
        super().__init__()
        widths = [channels * 2**level for level in (3, 2, 1, 0)]
        self.ups = nn.ModuleList(Up(2 * width, width, embedding_dim) for width in widths)
        self.classifier = nn.Conv2d(channels, num_classes, 3, padding=1)

    def forward(self, features: list[Tensor], embedding: Tensor | None = None) -> Tensor:
        *skips, x = features
        for up, skip in zip(self.ups, reversed(skips)):
            x = up(x, skip, embedding)
        return self.classifier(x)


class UNet(nn.Sequential):
    """Slices [B, 1, S, S] in [0, 1], S a multiple of 16 -> logits [B, C, S, S]."""

    def __init__(self, num_classes: int, channels: int = 16, dropout: bool = True):
        super().__init__(Encoder(1, channels, 0, dropout), Decoder(channels, num_classes))


class Sinusoidal(nn.Sequential):
    """Numbers [B] -> [B, outputs]: sines and cosines (Ho et al. 2020), then two layers."""

    def __init__(self, count: int, outputs: int):
        super().__init__(nn.Linear(2 * count, outputs), nn.SiLU(), nn.Linear(outputs, outputs))

    def forward(self, values: Tensor) -> Tensor:
        numbers = torch.arange(self[0].in_features // 2, device=values.device)
        angles = values.float()[:, None] / 10_000 ** (numbers / (len(numbers) - 1))
        return super().forward(torch.cat([angles.sin(), angles.cos()], dim=1))


class Denoiser(nn.Module):
    """Eq. 8, 10: z_t, condition [B, 16 c, S/16, S/16], step [B] -> r of Eq. 9, 11: the clean z."""

    def __init__(self, channels: int):
        super().__init__()
        low, middle, deep = 16 * channels, 24 * channels, 32 * channels
        self.time = Sinusoidal(4 * channels, deep)
        self.down1, self.down2 = Block(low, middle, 0, deep), Block(middle, deep, 0, deep)
        self.up1, self.up2 = Up(deep, middle, deep), Up(middle, low, deep)

    def forward(self, z_t: Tensor, condition: Tensor, step: Tensor) -> Tensor:
        time, z = self.time(step), z_t + condition
        half = self.down1(F.max_pool2d(z, 2), time)
        quarter = self.down2(F.max_pool2d(half, 2), time)
        return self.up2(self.up1(quarter, half, time), z, time)


class Rectifier(nn.Module):
    """LCC and LFR. Without diffusion steps, LCC alone: the latent of a mask itself is decoded.

    colors: uint8 [C, 3]. Label maps: [B, S, S], slices [B, 1, S, S], tau [B]; S: 64 k (LCC: 16 k).
    """

    def __init__(self, colors: Tensor, channels: int = 16, diffusion_steps: int = STEPS,
                 batch_statistics: bool = True):
        super().__init__()
        self.batch_statistics, embedding_dim = batch_statistics, 32 * channels
        self.guidance = Sinusoidal(4 * channels, embedding_dim)
        self.slice_encoder = Encoder(1, channels, embedding_dim)
        self.mask_encoder = Encoder(4, channels, embedding_dim)
        self.denoiser = Denoiser(channels) if diffusion_steps else None
        self.decoder = Decoder(channels, len(colors), embedding_dim)
        self.register_buffer("alpha_bar", cosine_alpha_bar(diffusion_steps).float(),
                             persistent=False)
        self.register_buffer("colors", colors, persistent=False)

    def embed(self, labels: Tensor, slices: Tensor, guidance: Tensor,
              slice_features: list[Tensor]) -> list[Tensor]:
        """B_sem of Eq. 5: features of five levels. As released, the slice is an input channel, and
        its own features are added to each level (Section 3.1 concatenates some, not said where)."""
        masks = torch.cat([slices, color_masks(labels, self.colors)], dim=1)
        return self.mask_encoder(masks, guidance, slice_features)

    def forward(self, coarse: Tensor, fine: Tensor, slices: Tensor, tau: Tensor) -> tuple:
        """Label maps -> logits [B, C, S, S] of fine; latent losses [B] (Eq. 9, 11; random t)."""
        guidance = self.guidance(TAU_SCALE * tau)
        slice_features = self.slice_encoder(slices, guidance)
        features = self.embed(coarse, slices, guidance, slice_features)
        if self.denoiser is None:
            return self.decoder(features, guidance), torch.zeros_like(tau)
        with torch.no_grad():  # a target that learned too would shrink, to be recovered easily
            clean = self.embed(fine, slices, guidance, slice_features)[-1]
        step = torch.randint(1, len(self.alpha_bar), (len(clean),), device=clean.device)
        alpha_bar = self.alpha_bar[step][:, None, None, None]
        noisy = add_noise(clean, alpha_bar, torch.randn_like(clean))
        recovered = self.denoiser(noisy, features[-1], step)
        latent_loss = (recovered.float() - clean.float()).square().mean(dim=(1, 2, 3))
        return self.decoder([*features[:-1], recovered], guidance), latent_loss

    @torch.no_grad()
    def rectify(self, labels: Tensor, slices: Tensor, tau: Tensor, released=False) -> Tensor:
        """Label maps -> logits [B, C, S, S] of better ones, recovered from pure noise (Eq. 12).

        In training, batch norms take the batch's statistics, and update the running ones; dropout
        is off (ours). released: steps T and 1 only, without noise; clean latents are clamped.
        """
        modes = {part: part.training for part in self.modules()}  # frozen ones stay in eval mode
        for part in modes:
            part.training &= self.batch_statistics and not isinstance(part, nn.Dropout)
        guidance = self.guidance(TAU_SCALE * tau)
        features = self.embed(labels, slices, guidance, self.slice_encoder(slices, guidance))
        if self.denoiser is not None:
            condition, alpha_bar = features.pop(), self.alpha_bar
            latent = torch.randn_like(condition, dtype=torch.float32)  # r_l of step T
            last = len(alpha_bar) - 1
            for step, following in pairwise((last, 1, 0) if released else range(last, -1, -1)):
                clean = self.denoiser(latent, condition, torch.full_like(tau, step)).float()
                clean = clean.clamp(-1, 1) if released else clean
                noise = None if released else torch.randn_like(latent)
                latent = reverse_step(latent, clean, alpha_bar[step], alpha_bar[following], noise)
            features.append(latent)
        logits = self.decoder(features, guidance)
        for part, training in modes.items():
            part.training = training
        return logits


# ---------------------------------------------------------------- training


def strong_view(slices: Tensor, info: VolumeInfo) -> Tensor:
    """Contrast, sharpness, brightness, blur, each with p = 0.5; slices [B, 1, S, S] in [0, 1]."""
    (low, high), (least, most) = info.adjust, info.blur
    size, device = len(slices), slices.device
    factors = low + (high - low) * torch.rand(3, size, device=device)
    chosen = torch.rand(4, size, device=device) < 0.5
    adjustments = augment.adjust_contrast, augment.adjust_sharpness, augment.adjust_brightness
    for adjust, factor in zip(adjustments, torch.where(chosen[:3], factors, 1)):
        slices = adjust(slices, factor)
    sigma = least + (most - least) * torch.rand(size, device=device)
    return torch.where(chosen[3].view(-1, 1, 1, 1), augment.gaussian_blur(slices, sigma), slices)


def pseudo_labels(logits: Tensor, inside: Tensor, threshold: float, released=False) -> tuple:
    """FixMatch's: classes, int64, and the pixels confident enough to be learned from, bool.

    released: all are learned, as background where (p_max - p_min) / p_max is not above threshold.
    Outside of a turned slice is background, not learned. All are [B, H, W] but the logits.
    """
    probs = logits.detach().float().softmax(dim=1)
    confidence, label = probs.max(dim=1)
    if released:
        passes = (confidence - probs.amin(dim=1)) / confidence > threshold
        return label * (passes & inside), inside
    return label * inside, (confidence >= threshold) & inside


def mask_loss(logits: Tensor, label: Tensor, used: Tensor, valid: Tensor, dice=True) -> Tensor:
    """CE + Dice of `used` pixels, as in Eq. 14; CE is divided by the number of `valid` ones.

    logits [B, C, H, W]; label int64, used and valid bool, [B, H, W]. Dice has squares in the
    denominator (V-Net), sums over the batch of all ranks, and is a mean over all classes.
    """
    loss = F.cross_entropy(logits.float(), label, ignore_index=IGNORE, reduction="none")
    loss = (loss * used).sum() / mean_over_ranks(valid.sum())
    if not dice:
        return loss
    probs = logits.float().softmax(dim=1) * used[:, None]
    truth = F.one_hot(torch.where(used, label, 0), logits.shape[1]).movedim(3, 1) * used[:, None]
    sums = torch.stack([probs * truth, probs.square() + truth]).sum(dim=(1, 3, 4))  # [2, C]
    # Each rank then has the same Dice; its gradient is multiplied, as DDP takes the mean of ranks.
    total = all_reduce_sum(sums.detach().clone())
    both, squares = total + (sums - sums.detach()) * world_size()
    return loss + (1 - (2 * both + 1e-5) / (squares + 1e-5)).mean()


def fixmatch_loss(strong, weak, label, used, valid, released=False) -> Tensor:
    """L_Semi of Eq. 13 on unlabeled slices, as in FixMatch: CE of `used` pixels.

    strong, weak: logits [B, C, H, W]; the rest as for `mask_loss`. released: Dice too, and the
    complementary loss of SSL4MIS: weak's least likely class is to be unlikely in strong (there,
    too, a softmax of 1 - p; its weight is of each rank's slices, with pixels that are not valid).
    """
    loss = mask_loss(strong, label, used, valid, dice=released)
    if not released:
        return loss
    probs = strong.float().softmax(dim=1)
    share = F.normalize(probs.flatten(2), p=1, dim=2, eps=1e-30)  # its entropy: how spread a class
    entropy = -(share * share.clamp(min=1e-7).log()).sum(dim=2) / math.log(share.shape[2])
    complementary = mask_loss(1 - probs, weak.detach().argmin(dim=1), valid, valid, dice=False)
    return loss + (1 - entropy.mean()).square() * complementary


def distribute(model: nn.Module, device: torch.device, compile: bool):
    """The model, moved to the device in place, as training calls it."""
    if world_size() > 1 and device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device, memory_format=torch.channels_last)
    network = torch.compile(model) if compile else model
    return DDP(network, **KEEP_BUFFERS) if world_size() > 1 else network


def train(config: Config) -> None:
    rank, _, device = init_distributed(config.device)
    data = load_volumes(config)
    config = complete(config, data, device)
    info, classes = data.info, data.info.num_classes
    supervised, rectifies = config.model == "supervised", config.model in RECTIFY
    released, streams = config.rules == "released", ["labeled", "unlabeled"][: 2 - supervised]

    torch.manual_seed(config.seed)
    model = UNet(classes, config.channels, config.dropout)
    network = distribute(model, device, config.compile)
    parameters, state = [*model.parameters()], {"model": model}
    if rectifies:
        grey = torch.linspace(0, 255, classes).round().byte()[:, None].repeat(1, 3)
        colors = semantic_colors(classes) if config.colors else grey
        steps = STEPS if config.model == "diffrect" else 0
        rectifier = Rectifier(colors, config.channels, steps, config.batch_statistics)
        rectifier_network = distribute(rectifier, device, config.compile)
        parameters += rectifier.parameters()
        state["rectifier"] = rectifier
    # One for both networks: a step leaves parameters alone that have no gradient.
    optimizer = torch.optim.SGD(parameters, config.lr, 0.9, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, config.iterations, power=0.9)
    state |= {"optimizer": optimizer, "schedule": schedule}
    torch.manual_seed(config.seed + 1000 * rank)  # ranks augment differently
    checkpoint = Checkpoint(config.output, "diffrect", asdict(config), state)
    start = checkpoint.load()
    log = Log(checkpoint, start, config.batch_size * len(streams), metric="dice")
    loader = slice_loader(data, config.crop, config.batch_size, config.seed, start,
                          config.iterations, device, not supervised, config.num_workers)
    amp = torch.autocast(device.type, torch.bfloat16, enabled=config.amp)

    scores = partial(evaluate_volumes, model, getattr(data, config.eval_split), info, config.crop,
                     device)
    milestones = Milestones(checkpoint, log, model, scores)
    for step, batch in enumerate(loader, start + 1):
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        weak = to_float(torch.cat([batch[name] for name in streams]))  # labeled, then unlabeled
        strong = strong_view(weak, info)
        label = batch["label"].long()
        known, size = label != IGNORE, len(label)
        with amp:
            logits_weak = network(strong if config.strong_labeled else weak)
            logits_strong = None if supervised else network(strong)
        loss_sup = mask_loss(logits_weak[:size], label, known, known)
        loss, terms = loss_sup, {"loss_sup": loss_sup}  # from here on Seg Loss of Eq. 13
        if not supervised:
            valid = batch["valid"]
            # Outside of turned slices labels are IGNORE, and `valid` of unlabeled ones is False.
            inside, threshold = torch.cat([known, valid]), config.threshold
            masks_weak, used = pseudo_labels(logits_weak, inside, threshold, released)
            masks_strong, _ = pseudo_labels(logits_strong, inside, threshold, released)
            pseudo_label, used = masks_weak[size:], used[size:]
            of_weak = logits_weak[size:], pseudo_label, used, valid  # for `fixmatch_loss`
            loss_unsup = fixmatch_loss(logits_strong[size:], *of_weak, released)
            weight = config.consistency * ramp(step - 1, config.rampup)
            loss = loss + weight * loss_unsup
            terms |= {"loss_unsup": loss_unsup, "used": used.sum() / mean_over_ranks(valid.sum())}
            maps = {"pseudo_dice": pseudo_label}
        if rectifies:
            w2g = config.w2g  # labeled: weak to truth, Eq. 11; unlabeled: strong to weak, Eq. 9
            coarse = torch.cat([(masks_weak if w2g else masks_strong)[:size], masks_strong[size:]])
            fine = torch.cat([label if w2g else masks_weak[:size], masks_weak[size:]])
            slices = torch.cat([(weak if w2g else strong)[:size], strong[size:]])  # of `coarse`
            tau_u = calibration_guidance(config.guidance, coarse[size:], fine[size:], classes)
            tau_l = calibration_guidance(config.guidance, coarse[:size], fine[:size], classes)
            tau = torch.cat([tau_l, tau_u])
            with amp:
                logits, latent_loss = rectifier_network(coarse, fine, slices, tau)
            # L_Semi^Lat: masks decoded from recovered latents, here against the truth.
            loss_decoded = mask_loss(logits[:size], label, known, known)
            loss_latent_l = latent_loss[:size].mean()
            loss_diff = loss_decoded + loss_latent_l  # Diff Loss of Eq. 13, lambda_2 = 1
            terms |= {"loss_decoded": loss_decoded, "loss_latent_l": loss_latent_l}
            if config.s2w:  # and here against pseudo labels
                loss_decoded_u = fixmatch_loss(logits[size:], *of_weak, released)
                loss_latent_u = latent_loss[size:].mean()
                lambda_1 = weight if released else 1
                loss_diff = loss_diff + weight * loss_decoded_u + lambda_1 * loss_latent_u
                terms |= {"loss_decoded_u": loss_decoded_u, "loss_latent_u": loss_latent_u}
            loss_diff.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            terms |= {"loss_diff": loss_diff, "tau_l": tau_l.mean(), "tau_u": tau_u.mean()}
            if step > config.warmup:
                tau = tau_l.repeat(2) if released else tau  # as many unlabeled ones
                with amp:  # labeled slices as well, for the batch statistics
                    logits = rectifier.rectify(masks_weak, weak, tau, released)[size:]
                rectified, _ = pseudo_labels(logits, valid, threshold, released)
                loss_rectified = mask_loss(logits_weak[size:], rectified, valid, valid)  # Eq. 14
                loss = loss + config.rectify_weight * loss_rectified
                terms["loss_rectified"], maps["rectified_dice"] = loss_rectified, rectified
        # For all losses of the U-Net; the released code makes two steps, one for rectified labels.
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()

        for name, labels in maps.items() if "truth" in batch else ():  # embedded: for the log
            terms[name] = dice_coefficient(labels, batch["truth"], classes).mean()
        log.step(step, {"loss": loss, **terms})
        milestones.after(step)  # saves, leaves when told to, evaluates

    if data.test:
        results = evaluate_volumes(model, data.test, info, config.crop, device)
        say(f"test list: dice {results['dice']:.2f}")
        log.write_results(test=results)

    def label_maps(slices: Tensor) -> list[Tensor]:
        label = model(slices).argmax(dim=1)
        if not rectifies:
            return [label]
        tau = calibration_guidance(config.guidance, label, label, classes)  # there is one view
        return [label, rectifier.rectify(label, slices, tau, released).argmax(dim=1)]

    for part in checkpoint.models:
        part.eval()  # running statistics, unlike in training: here one slice is a batch
    captions = ["image", "label", "prediction", "rectified"][: 3 + rectifies]
    write_sample_grid(label_maps, captions, data, config.crop, device,
                      checkpoint.folder / "samples.png")


def build_predictor(config: dict, num_classes: int, state: dict[str, Tensor]) -> nn.Module:
    """What common.evaluate and common.predict make of a checkpoint: slices -> logits."""
    model = UNet(num_classes, config["channels"], config.get("dropout", True))
    return load_strictly(model, state, "the checkpoint's weights")


if __name__ == "__main__":
    run_main(lambda: train(parse(Config, description=__doc__)))
