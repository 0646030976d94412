"""DiffMatch: Towards Unbiased Learning in Semi-Supervised Semantic Segmentation
Sun et al., ICLR 2025. The denoiser is that of Ji et al., "DDP", ICCV 2023, without feed-forward and
positions.

Segmentation as conditional generation. A feature extractor g sees the image once; a light mask
denoiser f turns pure noise into the label map in a few steps, guided by the features. It learns as
diffusion models do: a label map (ground truth, or the network's own pseudo label, itself generated
from noise) is written as real numbers, mixed with noise at a random time t and predicted back. A
debiased adjustment pulls predictions towards what they would be if all classes were as frequent.

    Alg. 2, Eq. 3   schedule, forward diffusion         log_snr, alpha_bar, add_noise
    Alg. 3          DDIM sampling                       ddim_step, sample
    Eq. 9           debiased adjustment, p(y_0)         debias_penalty, ClassPrior
    Alg. 2          labels as real numbers              LabelEncoding
    Sec. 3.2        g and f                             DiffMatch: DeepLabV3Plus, MaskDenoiser
    Eq. 6, 10, 11   a step (Algorithm 1)                pseudo_labels, view_loss, diffmatch_loss

Run
    python diffmatch.py                                              embedded data, on a laptop
    torchrun --nproc_per_node=8 diffmatch.py --dataset pascal --labeled 92 --download
    python -m common.evaluate --checkpoint runs/a/latest.pt --set feedback=nothing steps=3
The paper's literal command, its baselines, differences and results: .docs/diffmatch.md
"""

import math
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.augment import (IGNORE, Photometry, cutmix, cutmix_boxes, normalize, strong_augment,
                            to_float)
from common.backbones import checkpoint_activations, load_strictly, random_weights_like
from common.data import DataOptions, load_data, training_loader
from common.evaluate import evaluate, pixel_accuracy, write_samples
from common.models import DeepLabV3Plus, hard_pixel_loss, resize
from common.runtime import (KEEP_BUFFERS, Checkpoint, Log, Milestones, RunOptions, all_reduce_sum,
                            bf16_is_fast, cutmix_partner, init_distributed, mean_over_ranks, option,
                            parse, require, run_main, with_defaults)


@dataclass
class Config(DataOptions, RunOptions):
    """What touches learning; None: as the data set's recipe in common/data.py has it."""

    layers: int = option(4, "L, of deformable attention in the mask denoiser (Table 7)", low=1)
    encoding: str = option("embedding", "Algorithm 2 or Section 3.4", choices=("embedding", "bits"))
    mask_channels: int = option(256, "of encoded labels (Algorithm 3); 0: no mask", low=0)
    mask_start: str = option("zero", "of f's weights for y_t, ours", choices=("zero", "ddp"))
    scale: float = option(0.1, "b: encoded labels lie in [-b, b] (Table 8)", above=0)
    tau: float = option(0.1, "weight of the adjustment, Eq. 9 (Table 9); 0: none", low=0)
    adjustment: str = option("scaled", "f / (C p) of Eq. 9, ours", choices=("scaled", "printed"))
    prior_momentum: float = option(0.99, "of the class prior of pseudo labels", low=0, below=1)
    threshold: float | None = option(None, "of pseudo labels; not the paper's", low=0, below=1)
    pseudo_steps: int = option(1, "denoising steps of a pseudo label", low=1)
    steps: int = option(3, "denoising steps at inference (Table 5)", low=1)
    time_difference: int = option(1, "td of Algorithm 3: by so many steps y_t is less noisy", low=0)
    feedback: str = option("own", "of a step (Algorithm 3)", choices=("own", "softmax", "nothing"))
    noise_seed: int = option(0, "of the noise that inference starts from", low=0)
    single_view: bool = option(False, "one strong view, as in Eq. 6, not UniMatch's three")
    cutmix: bool = option(True, "CutMix between strong views, UniMatch's")
    discriminative: bool = option(False, "baseline of Table 5: no noisy mask, t 1, tau 0, one step")
    backbone: str | None = option(None, "resnet50, resnet101, xception65, mobilenet_v2 or tiny")
    weights: str = option("default", "of the encoder: default, none, deep_stem or a file's path")
    crop: int | None = option(None, "training crop in pixels, 16 k + 1", low=16)
    batch_size: int | None = option(None, "labeled (and unlabeled) images a step, all GPUs", low=2)
    epochs: int | None = option(None, "passes over the unlabeled list", low=1)
    iterations: int | None = option(None, "optimizer steps, instead of --epochs", low=1)
    lr: float | None = option(None, "of the encoder; a recipe's grows with --batch-size", above=0)
    head_lr_multiplier: float | None = option(None, "of the rest: --lr times this", above=0)
    ohem: float | None = option(None, "OHEM's threshold, not the paper's; 15.6 % count anyway",
                                low=0, below=1)
    weight_decay: float = option(1e-4, "of SGD", low=0)
    seed: int = option(0, "of weights, sampling and augmentation", low=0)


def log_snr(t) -> Tensor:
    """The cosine schedule, `alpha_cumprod` of Algorithm 2: times in [0, 1] of any shape ->
    float64, log(alpha_bar / (1 - alpha_bar)), within [-19, 12]."""
    t = torch.as_tensor(t, dtype=torch.float64)
    n = torch.cos((t + 0.0002) / 1.00025 * (math.pi / 2)) ** -2  # 1 + noise / signal
    return -(n - 1).clamp(min=1e-5).log()


def alpha_bar(t) -> Tensor:
    """Times in [0, 1] -> float64 in (0, 1), never rising; Algorithm 2 leaves out the sigmoid."""
    return log_snr(t).sigmoid()


def add_noise(y0: Tensor, t, noise: Tensor) -> Tensor:
    """Eq. 3: y_t from y0 [B, K, h, w] at times t, a number or [B]; noise is standard normal."""
    level = alpha_bar(t).to(y0.device).view(-1, 1, 1, 1)
    return level.sqrt().to(y0.dtype) * y0 + (1 - level).sqrt().to(y0.dtype) * noise


def ddim_step(y_t: Tensor, y0: Tensor, t_now: float, t_next: float) -> Tensor:
    """Algorithm 3: from y_t, taken to be at t_now, to t_next, for the predicted, encoded y0
    [B, K, h, w]."""
    signal = alpha_bar(t_now)
    noise = (y_t - signal.sqrt() * y0) / (1 - signal).sqrt()
    return add_noise(y0, t_next, noise)  # printed: noise scaled as at t_now


@torch.no_grad()
def sample(model, z: Tensor, noise: Tensor, steps: int, time_difference: int = 1,
           feedback: str = "own") -> Tensor:
    """Algorithm 3: logits after each step, [steps, B, C, h, w], for features z [B, D, h, w] and
    noise [B, K, h, w], or [1, K, h, w] for all images. model: a DiffMatch. feedback: what a step
    is shown of the last one's prediction; own: its label; softmax: its mean code; nothing: 0."""
    y_t, predictions = noise.expand(len(z), -1, -1, -1), []
    for step in range(steps):
        t_now, t_next = 1 - step / steps, max(1 - (step + 1 + time_difference) / steps, 0)
        logits = model(denoise=(z, y_t, torch.full((len(z),), t_now, device=z.device)))
        predictions.append(logits)
        if step + 1 == steps:
            break
        y0 = model.encode(logits.argmax(dim=1)) * (feedback == "own")
        if feedback == "softmax":
            y0 = torch.einsum("bchw,ck->bkhw", logits.softmax(dim=1), model.encode.codes()[:-1])
        y_t = ddim_step(y_t, y0, t_now, t_next)
    return torch.stack(predictions)


def debias_penalty(logits: Tensor, class_prior: Tensor, t: Tensor, tau: float,
                   adjustment: str = "scaled") -> Tensor:
    """tau t |f - f / (C p(y_0))|^2 of Eq. 9, [B, H, W], for logits [B, C, H, W], prior [C], t [B].
    scaled: f / (C p) is made to sum to one and a constant for the gradient, which thus pulls f
    towards it, mostly from head to tail classes. printed: neither: f moves to where C p is near 1.
    """
    probs = logits.float().softmax(dim=1)
    debiased = probs / (len(class_prior) * class_prior).to(probs).view(1, -1, 1, 1)
    if adjustment == "scaled":
        debiased = F.normalize(debiased.detach(), p=1, dim=1)
    return tau * t.view(-1, 1, 1) * (probs - debiased).square().sum(dim=1)


class ClassPrior(nn.Module):
    """p(y_0) of labels, fixed, and of pseudo labels, which starts there and follows them: [C] each.
    counts: labeled pixels [C]; a class without any keeps 1/C, beside the others. least: p's floor.
    """

    def __init__(self, counts: Tensor, momentum: float, least: float = 1e-4):
        super().__init__()
        self.momentum, self.least = momentum, least
        prior = (counts.double() / counts.sum()).clamp(min=least)
        prior = torch.where(counts > 0, prior, 1 / len(counts))
        self.register_buffer("known", counts > 0, persistent=False)
        self.register_buffer("labels", prior)
        self.register_buffer("pseudo_labels", prior.clone())

    def update(self, pseudo_label: Tensor) -> None:
        """With this rank's pseudo labels of a step, [B, H, W], int64 with 255 = ignore."""
        counts = all_reduce_sum(class_counts(pseudo_label, len(self.known)))
        shares = torch.where(counts.sum() > 0, counts / counts.sum(), self.pseudo_labels)
        average = torch.lerp(shares, self.pseudo_labels, self.momentum).clamp(min=self.least)
        self.pseudo_labels.copy_(torch.where(self.known, average, self.pseudo_labels))


def class_counts(label: Tensor, num_classes: int) -> Tensor:
    """Pixels of each class, float64 [C], in int64 label maps of any shape with 255 = ignore."""
    counts = torch.zeros(IGNORE + 1, dtype=torch.float64, device=label.device)
    ones = torch.ones_like(label, dtype=torch.float64)  # bincount would wait for the device
    return counts.scatter_add_(0, label.flatten(), ones.flatten())[:num_classes]


class DeformableAttention(nn.Module):
    """Zhu et al., "Deformable DETR", ICLR 2021, Eq. 2, on one level: [B, h w, D] -> [B, h w, D].
    In each head a pixel looks at a few points around itself; where, and how much each counts, are
    linear functions of its features."""

    def __init__(self, channels: int, heads: int = 8, points: int = 4):
        super().__init__()
        self.heads, self.points = heads, points
        self.sampling = nn.Linear(channels, 3 * heads * points)
        self.value, self.out = nn.Linear(channels, channels), nn.Linear(channels, channels)
        # Each head starts with points in a direction of its own, all counting the same.
        angle = torch.arange(heads) * (2 * math.pi / heads)
        direction = F.normalize(torch.stack([angle.cos(), angle.sin()]), p=math.inf, dim=0)
        offsets = direction[:, :, None] * torch.arange(1, points + 1)  # [2, heads, points]
        self.sampling.bias.data = torch.cat([offsets, torch.zeros(1, heads, points)]).flatten()
        nn.init.zeros_(self.sampling.weight)
        for linear in (self.value, self.out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, features: Tensor, height: int, width: int) -> Tensor:
        batch, pixels, _ = features.shape
        offset_x, offset_y, logits = self.sampling(features).chunk(3, dim=-1)
        # float32: in bf16 they would be whole pixels beyond 128; x, y: [B, h w, heads, points]
        pixel = torch.arange(pixels, device=features.device, dtype=torch.float32)[:, None, None]
        x = pixel % width + offset_x.unflatten(-1, (self.heads, self.points))
        y = pixel // width + offset_y.unflatten(-1, (self.heads, self.points))
        grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
        grid = grid.transpose(1, 2).flatten(0, 1)  # [B heads, h w, points, 2]
        weight = logits.unflatten(-1, (self.points, self.heads)).softmax(dim=2)  # dim -1 is slower
        weight = weight.permute(0, 3, 1, 2).flatten(0, 1)  # [B heads, h w, points]
        maps = self.value(features).transpose(1, 2).reshape(len(grid), -1, height, width)
        found = F.grid_sample(maps.to(grid.dtype), grid, align_corners=False)
        attended = (found * weight.unsqueeze(1)).sum(dim=-1)  # [B heads, d, h w]
        return self.out(attended.view(batch, -1, pixels).transpose(1, 2))


class DenoiserLayer(nn.Module):
    """x + attention(x), layer norm, the time's scale and shift: [B, h w, D] -> [B, h w, D]."""

    def __init__(self, channels: int, time_channels: int):
        super().__init__()
        self.attention = DeformableAttention(channels, heads=min(8, channels // 8))
        self.norm = nn.LayerNorm(channels)
        self.scale_and_shift = nn.Linear(time_channels, 2 * channels)

    def forward(self, x: Tensor, time: Tensor, height: int, width: int) -> Tensor:
        x = self.norm(x + self.attention(x, height, width))
        scale, shift = self.scale_and_shift(time).unsqueeze(1).chunk(2, dim=-1)
        return torch.addcmul(shift, x, 1 + scale)


class MaskDenoiser(nn.Module):
    """f: features z [B, D, h, w], noisy mask y_t [B, K, h, w], t [B] -> logits [B, C, h, w]."""

    def __init__(self, channels: int, mask_channels: int, num_classes: int, layers: int,
                 mask_start: str):
        super().__init__()
        self.fuse = nn.Linear(mask_channels + channels, channels)  # a 1x1 convolution
        nn.init.kaiming_normal_(self.fuse.weight, mode="fan_out")  # as Ji et al.
        nn.init.zeros_(self.fuse.bias)
        if mask_start == "zero":  # ours: otherwise noise is added to z from the first step on
            self.fuse.weight.data[:, :mask_channels] = 0
        wide = 4 * channels
        self.frequencies = nn.Parameter(torch.randn(8))  # of time, whose embedding is Ji et al.'s
        self.time = nn.Sequential(nn.Linear(1 + 2 * 8, wide), nn.GELU(), nn.Linear(wide, wide))
        self.layers = nn.ModuleList(DenoiserLayer(channels, wide) for _ in range(layers))
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, z: Tensor, y_t: Tensor, t: Tensor) -> Tensor:
        height, width = z.shape[2:]
        x = torch.cat([y_t.to(z.dtype), z], dim=1)
        x = self.fuse(x.flatten(2).transpose(1, 2))  # [B, h w, D]
        # Ours: sampling begins at log SNR -19, but of the times in training 2 % lie below -7.
        logsnr = log_snr(t).clamp(-7, 7).float()[:, None]
        angle = 2 * math.pi * logsnr * self.frequencies
        time = F.silu(self.time(torch.cat([logsnr, angle.sin(), angle.cos()], dim=1)))  # [B, 4 D]
        for layer in self.layers:
            x = layer(x, time, height, width)
        return self.classifier(x).transpose(1, 2).unflatten(2, (height, width))


class LabelEncoding(nn.Module):
    """Label maps [B, h, w] of 0 to C - 1, or C and 255 for unknown -> [B, K, h, w] in [-b, b]."""

    def __init__(self, kind: str, num_classes: int, channels: int, scale: float):
        super().__init__()
        self.num_classes, self.scale = num_classes, scale
        if kind == "embedding" or channels == 0:  # Algorithm 2
            self.embedding = nn.Parameter(torch.randn(num_classes + 1, channels), channels > 0)
        else:  # Section 3.4: the class's binary digits, as +-inf, whose sigmoid is 1 or 0
            digits = torch.arange(math.ceil(math.log2(num_classes + 1)))
            bits = torch.arange(num_classes + 1)[:, None] >> digits & 1
            self.register_buffer("embedding", (2 * bits - 1) * math.inf, persistent=False)
        self.channels = self.embedding.shape[1]

    def codes(self) -> Tensor:
        """Of all classes and `unknown`, [C + 1, K]."""
        return (self.embedding.float().sigmoid() * 2 - 1) * self.scale

    def forward(self, label: Tensor) -> Tensor:
        label = label.long().clamp(max=self.num_classes)
        return F.embedding(label, self.codes()).permute(0, 3, 1, 2)


class DiffMatch(nn.Module):
    """forward(images [B, 3, H, W]): g -> z [B, D, h, w], a quarter of the size (tiny: half); with
    perturb=k also z of the last k images without half of the encoder's channels, decoded beside
    the others. forward(denoise=(z, y_t, t)): f -> logits [B, C, h, w]; also a forward, as
    DistributedDataParallel sees no other calls."""

    def __init__(self, backbone: str, num_classes: int, weights: str = "default", layers: int = 4,
                 encoding: str = "embedding", mask_channels: int = 256, mask_start: str = "zero",
                 scale: float = 0.1):
        super().__init__()
        self.extractor = DeepLabV3Plus(backbone, num_classes, weights)
        self.extractor.classifier = nn.Identity()
        self.encode = LabelEncoding(encoding, num_classes, mask_channels, scale)
        self.denoiser = MaskDenoiser(self.extractor.channels, self.encode.channels, num_classes,
                                     layers, mask_start)

    def forward(self, images=None, perturb: int = 0, denoise: tuple | None = None):
        if denoise is not None:
            return self.denoiser(*denoise).float().contiguous()  # `resize` is slow on channels last
        z = self.extractor.features(images, perturb)
        return z.split([len(images), perturb]) if perturb else z

    def parameter_groups(self, lr: float, head_lr_multiplier: float) -> list[dict]:
        encoder, head = self.extractor.parameter_groups(lr, head_lr_multiplier)
        head["params"] += [*self.denoiser.parameters(), *self.encode.parameters()]
        return [encoder, head]


class Sampler(nn.Module):
    """images [B, 3, H, W], normalised -> logits [B, C, H, W] after `steps` denoising steps."""

    def __init__(self, model: DiffMatch, steps: int, time_difference: int, noise_seed: int,
                 feedback: str = "own"):
        super().__init__()
        self.model, self.noise_seed = model, noise_seed
        self.sampling = steps, time_difference, feedback

    def trajectory(self, images: Tensor) -> Tensor:
        """Logits after each step, [steps, B, C, h, w], from one noise for all images."""
        z = self.model(images)
        generator = torch.Generator().manual_seed(self.noise_seed)  # alike on CPUs and GPUs
        shape = (1, self.model.encode.channels, *z.shape[2:])
        noise = torch.randn(shape, generator=generator).to(z.device)
        return sample(self.model, z, noise, *self.sampling)

    def each_step(self, image: Tensor) -> Tensor:  # [1, 3, H, W] -> logits [steps, C, H, W]
        return resize(self.trajectory(image)[:, 0], image.shape[2:])

    def forward(self, images: Tensor) -> Tensor:
        return resize(self.trajectory(images)[-1], images.shape[2:])


def make_views(batch: dict, crop: int, photometry: Photometry, names: tuple,
               p: float) -> dict[str, Tensor]:
    """Weak crops, uint8 -> the normalised views of a step: weak, strong ones; p: of CutMix."""
    weak = to_float(batch["unlabeled"])
    views = {**batch, "labeled": normalize(batch["labeled"]), "weak": normalize(weak)}
    for view in names:
        strong = strong_augment(weak, photometry)
        boxes = cutmix_boxes(len(weak), crop, p, device=weak.device)
        views[view] = normalize(cutmix(boxes, strong, cutmix_partner(strong)))
        views[view + "_boxes"] = boxes
    return views


def pseudo_labels(model: DiffMatch, z: Tensor, valid: Tensor, config: Config) -> Tensor:
    """Eq. 6: weak features z and pure noise -> int64 [B, 2, H, W] with 255 = ignore: the label of
    all `valid` pixels; that of confident ones, by UniMatch's threshold, which the paper lacks."""
    noise = torch.randn(len(z), model.encode.channels, *z.shape[2:], device=z.device)
    logits = sample(model, z, noise, config.pseudo_steps, config.time_difference, config.feedback)
    logits = resize(logits[-1], valid.shape[1:])
    confidence, label = logits.softmax(dim=1).max(dim=1)
    label = torch.where(valid, label, IGNORE)
    used = torch.where(confidence >= config.threshold, label, IGNORE)
    return torch.stack([label, used], dim=1)


def downsample(label: Tensor, size: torch.Size) -> Tensor:
    """Label maps [B, H, W] -> [B, h, w], nearest, on `resize`'s grid: corners stay corners."""
    rows, columns = (torch.linspace(0, full - 1, small, device=label.device).round().long()
                     for full, small in zip(label.shape[1:], size))
    return label[:, rows][:, :, columns]


def view_loss(logits: Tensor, target: Tensor, t: Tensor, class_prior: Tensor, config: Config,
              ohem: float = 0.0) -> Tensor:
    """Eq. 10, 11 of one view: cross entropy, in place of L2 (Section 3.4), of used pixels, with
    OHEM of the hard ones, plus Eq. 9 of known pixels; divided by the known ones, of all ranks.
    logits [B, C, H, W], target [B, 2, H, W]: known and used labels, prior [C], t [B]."""
    known, used = target[:, 0] != IGNORE, target[:, 1]
    loss = F.cross_entropy(logits.float(), used, ignore_index=IGNORE, reduction="none")
    total = hard_pixel_loss(loss, used, ohem) if ohem else loss.sum()
    penalty = debias_penalty(logits, class_prior, t, config.tau, config.adjustment) * known
    return (total + penalty.sum()) / mean_over_ranks(known.sum())


def diffmatch_loss(network, model: DiffMatch, views: dict, names: tuple, prior: ClassPrior,
                   classes: tuple, config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """Algorithm 1: (loss, terms for the log). Updates the prior. names: of the strong views.
    network: `model`, or what torch.compile and DistributedDataParallel have made of it."""
    size, single_view = len(views["weak"]), len(names) == 1
    images = torch.cat([views["labeled"], views["weak"]])
    strong = torch.cat([views[name] for name in names])
    if single_view:  # as in the paper, channels are dropped in the strong view itself; decoded
        # beside the whole one, for batch statistics as with three views
        z, (_, z_strong) = network(images), network(strong, perturb=size)
    else:  # UniMatch's three views: perturbed features of the weak one, two strong ones
        z, z_perturbed = network(images, perturb=size)
        z_strong = torch.cat([z_perturbed, network(strong)])
    z_labeled, z_weak = z.split(size)

    pseudo = pseudo_labels(model, z_weak, views["valid"], config)
    torch.clear_autocast_cache()  # older PyTorch would use casts again that have no gradient
    partner = cutmix_partner(pseudo)
    label = views["label"].long()[:, None].expand(-1, 2, -1, -1)  # [B, 2, H, W]: all are used
    targets = [label] if single_view else [label, pseudo]
    targets += [cutmix(views[name + "_boxes"], pseudo, partner) for name in names]

    # One pass of the denoiser for all views; each image of each has a time and noise of its own.
    z = torch.cat([z_labeled, z_strong])
    t = (torch.ones if config.discriminative else torch.rand)(len(z), device=z.device)
    y0 = model.encode(downsample(torch.cat(targets)[:, 0], z.shape[2:]))
    y_t = add_noise(y0, t, torch.randn_like(y0, memory_format=torch.contiguous_format))  # faster
    logits = resize(network(denoise=(z, y_t, t)), images.shape[2:])

    parts = list(zip(logits.split(size), targets, t.split(size)))
    loss_sup = view_loss(*parts[0], prior.labels, config, config.ohem)  # Eq. 10
    losses = [view_loss(*part, prior.pseudo_labels, config) for part in parts[1:]]  # Eq. 11
    loss_unsup = losses[0] if single_view else 0.5 * losses[0] + 0.5 * (losses[1] + losses[2]) / 2
    loss = 0.5 * (loss_sup + loss_unsup)  # the paper writes their sum
    prior.update(pseudo[:, 0])
    terms = {"loss": loss, "loss_sup": loss_sup, "loss_unsup": loss_unsup}
    return loss, terms | describe(pseudo, views, prior, classes)


def describe(pseudo: Tensor, views: dict, prior: ClassPrior, classes: tuple) -> dict[str, Tensor]:
    """For the log: share and accuracy of the pseudo labels that are used; all classes' shares of
    the pixels, Figures 1 and 8."""
    label, used = pseudo.unbind(dim=1)
    pixels = mean_over_ranks(views["valid"].sum())
    maps, terms = {"pseudo": label, "used": used}, {"used": (used != IGNORE).sum() / pixels}
    if "truth" in views:
        truth = maps["true"] = views["truth"].long()
        terms["used_accuracy"] = pixel_accuracy(used, truth, used != IGNORE)
    shares = {kind: class_counts(map_, len(classes)) / pixels for kind, map_ in maps.items()}
    for kind, values in {**shares, "prior": prior.pseudo_labels}.items():
        terms |= {f"{kind} {name}": value for name, value in zip(classes, values)}
    return terms


# ---------------------------------------------------------------- training


def train(config: Config) -> None:
    rank, world_size, device = init_distributed(config.device)
    require(config.encoding == "embedding" or config.mask_channels == Config.mask_channels,
            "--mask-channels is for --encoding embedding; bits have their own number")
    data = load_data(config)
    config = with_defaults(config, **data.recipe(config.batch_size, config.epochs),
                           amp=bf16_is_fast(device),
                           output=f"runs/diffmatch_{data.tag}_{config.seed}")
    if config.discriminative:  # no y_t, t always 1: without diffusion Eq. 9 has no derivation
        config = replace(config, mask_channels=0, tau=0.0, pseudo_steps=1, steps=1)

    torch.manual_seed(config.seed)
    sampler = build_predictor(asdict(config), data.info.num_classes)
    model = sampler.model
    if world_size > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if config.checkpoint_activations:
        checkpoint_activations(model, config.compile)
    model.to(device, memory_format=torch.channels_last)
    network = torch.compile(model) if config.compile else model
    if world_size > 1:
        network = nn.parallel.DistributedDataParallel(network, **KEEP_BUFFERS)
    groups = model.parameter_groups(config.lr, config.head_lr_multiplier)
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, config.iterations, power=0.9)
    prior = ClassPrior(data.class_pixels, config.prior_momentum).to(device)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule, "prior": prior}
    torch.manual_seed(config.seed + 1000 * rank)  # ranks augment and add noise differently
    checkpoint = Checkpoint(config.output, "diffmatch", asdict(config), state)
    start = checkpoint.load()
    log = Log(checkpoint, start, 2 * config.batch_size)
    loader = training_loader(data, config.crop, config.batch_size, config.seed, start,
                             config.iterations, device, num_workers=config.num_workers)
    names = ("strong_1",) if config.single_view else ("strong_1", "strong_2")

    scores = partial(evaluate, sampler, data, config.eval_split, config.crop, device,
                     config.num_workers)
    milestones = Milestones(checkpoint, log, model, scores)
    for step, batch in enumerate(loader, start + 1):
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        views = make_views(batch, config.crop, data.info.photometry, names, 0.5 * config.cutmix)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
            loss, terms = diffmatch_loss(network, model, views, names, prior, data.info.classes,
                                         config)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()

        log.step(step, terms)
        milestones.after(step)  # saves, leaves when told to, evaluates

    write_samples(sampler.eval(), data, config.crop, device, checkpoint.folder / "samples.png")
    captions = ["image", "label"] + [f"step {step + 1}" for step in range(config.steps)]
    write_samples(sampler.each_step, data, config.crop, device,
                  checkpoint.folder / "trajectory.png", captions)


def build_predictor(config: dict, num_classes: int, state: dict | None = None) -> Sampler:
    """images -> logits: what training evaluates or, of a checkpoint's state, common.evaluate."""
    require(not config["discriminative"] or config["steps"] == 1, "--discriminative has one step")
    weights = random_weights_like(state) if state else config["weights"]
    options = ("layers", "encoding", "mask_channels", "mask_start", "scale")
    model = DiffMatch(config["backbone"], num_classes, weights, *map(config.get, options))
    if state:
        load_strictly(model, state, "the checkpoint's weights")
    return Sampler(model, config["steps"], config["time_difference"], config["noise_seed"],
                   config["feedback"])


if __name__ == "__main__":
    run_main(lambda: train(parse(Config, description=__doc__)))
