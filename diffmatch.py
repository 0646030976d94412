"""DiffMatch: Towards Unbiased Learning in Semi-Supervised Semantic Segmentation (Sun et al., ICLR 2025).

Idea. Segmentation as conditional generation. A feature extractor g sees the image once; a light mask denoiser f turns
pure noise into the label map in a few steps, guided by the features. It learns as diffusion models do: a label map (ground truth, or
the network's own pseudo label, itself generated from noise) is written as real numbers, mixed with noise at a random time t and
predicted back. A debiased adjustment pulls every prediction towards what it would be if all classes were equally frequent.

    Eq. 1, 3     schedule, forward diffusion            alpha_bar, add_noise
    Eq. 9        debiased adjustment                    debias_penalty, ClassPrior
    Eq. 4-11     the losses of a step (Algorithm 1)     diffmatch_loss
    Alg. 2       labels as real numbers                 LabelEncoding
    Alg. 3       DDIM sampling                          ddim_step, sample
    Sec. 3.2     g without its classifier; f            DeepLabV3Plus.features; MaskDenoiser, DeformableAttention
    Fig. 1, 8    pseudo labels per class                finish: pseudo_labels.png
    Fig. 4, 5    calibration, confusion, unlabeled      finish: unlabeled.json, unlabeled.png
    Fig. 10      prediction after each step             write_trajectory

                      paper                          here (the authors released no code)             flag
    schedule          Algorithm 2's code returns     alpha_bar itself, the sigmoid of it
                      the log SNR
    denoiser's input  mask_enc twice (Algorithm 2)   y_t and the image's features, as in Algorithm 3
    DDIM step         noise scaled by 1 - a_now,     by 1 - a_next, y_0 encoded; at t_next = 0 exactly y_0
                      y_0 not encoded
    td                1 (Algorithm 3)                1                                               --time-difference
    labels as numbers embedding (Algorithm 2), bits  embedding; with bits, too, f predicts classes   --encoding bits
                      (Section 3.4)                  and no bit is thresholded
    z, y_t            H x W (Section 3.2.1), H/4 x   H/4 x W/4, y_0 the nearest label; ignored pixels
                      W/4 (Algorithm 3)              are a class of their own, unconfident ones are not
    concat(y_t, z)    1x1 convolution                its half for y_t starts at zero
    scale of y_t      as it is                       as it is                                        --normalize-mask
    a layer of f      deformable attention           attention, layer norm, scale and shift by t;    --ffn-channels
                                                     neither feed-forward block nor positions
    parameters, L =   42.4 43.3 44.9 45.8 49.9 M     42.5 43.2 44.5 45.9 50.0 M                      --layers
    1 2 4 6 12 (R50)
    pseudo label      f(eps, g(x)) in Eq. 6          one step from t = 1, in training mode           --pseudo-steps
    threshold         none is mentioned              the baseline's (0.95 on pascal)                 --threshold 0
    strong views      one, features dropped in it    UniMatch's: two, and perturbed features         --single-view
    CutMix            not mentioned                  as UniMatch                                     --no-cutmix
    t, noise          of each image                  of each view of each image
    Eq. 9             f - f / (C p(y_0))             on probabilities, each class over its own p; f / (C p) is scaled
                                                     to sum to one and a constant for the gradient   --tau
    its pixels        not said                       all but ignored ones, confident or not
    p of pseudo       EMA                            momentum 0.99, over all pseudo labels of a step --prior-momentum
    rare classes      not said                       p at least 1e-4; 1/C for a class without labels
    total loss        L_sup + L_unsup                half of it, as UniMatch                         --lr
    optimizer         not said                       the baseline's SGD; f learns like the head      --head-lr-multiplier
    noise at test     not said                       of a fixed seed, the same for every image       --noise-seed
    PASCAL crop       513                            321 (513 overfits with few labels)              --crop
    Cityscapes, COCO  Tables 3 and 4                 not yet: no recipe in common/data.py

Commands
    python diffmatch.py                                                    embedded data, some minutes on a laptop
    python diffmatch.py --dataset pascal --data-root VOC2012 --labeled 92  one GPU
    python diffmatch.py --dataset pascal --data-root VOC2012 --labeled 92 --crop 513 --grad-accum 4        less memory
    torchrun --nproc_per_node=8 diffmatch.py --dataset pascal --data-root VOC2012 --labeled 92 --crop 513
    python -m common.evaluate --checkpoint runs/a/latest.pt --steps 1      Table 5
    python diffmatch.py --trajectory runs/a/latest.pt --steps 5            Figure 10, and the scores after each step

Measured on the embedded data (24 labels, mIoU, three seeds; README): UniMatch 54.5, discriminative 56.8, without
adjustment 57.6, DiffMatch 57.8; without threshold UniMatch 58.1, DiffMatch 59.0. On the tuning list,
700 iterations, seed 0: default 50.5, --encoding bits 54.0, --ffn-channels 128 51.0, --normalize-mask 48.7 (50.9 with
--time-difference 0). PASCAL has not been run.

Baselines and ablations: --discriminative and --tau 0 (Table 5), --steps (Table 5), --layers (Table 7), --scale (Table 8),
--tau (Table 9). UniMatch is `daw.py --weighting fixed`.
"""

import dataclasses
import functools
import json
import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, runtime
from common.data import IGNORE, load_data
from common.deeplab import DeepLabV3Plus
from common.deformable import DeformableAttention
from common.evaluate import evaluate, load_model
from common.files import write_json
from common.loading import class_pixels, evaluation_loader, training_loader
from common.ohem import hard_pixel_loss
from common.options import TrainingOptions, fill_from_recipe, option, parse, require
from common.pictures import plot_calibration, plot_class_shares
from common.run import Run, write_sample_grid
from common.runtime import pixel_counts

LEAST_PRIOR = 1e-4  # no class that has labels is taken for rarer than this


@dataclass
class Config(TrainingOptions):
    layers: int = option(4, "L, layers of deformable attention in the mask denoiser (Table 7)")
    ffn_channels: int = option(0, "hidden channels of a feed-forward block behind each layer's attention; 0: none")
    encoding: str = option("embedding", "how labels become real numbers: embedding (a learned vector per class, Algorithm 2) or bits "
                                        "(analog bits, Section 3.4)", choices=("embedding", "bits"))
    scale: float = option(0.1, "b: encoded labels lie in [-b, b] (Table 8)")
    normalize_mask: bool = option(False, "show the noisy mask to the denoiser at unit variance, whatever b and the time")
    tau: float = option(0.1, "weight of the debiased adjustment, Eq. 9 (Table 9); 0: without")
    prior_momentum: float = option(0.99, "momentum of the class prior of pseudo labels")
    threshold: float | None = option(None, "pseudo labels below this confidence are not learned from; default: the data set's recipe (0.95)")
    pseudo_steps: int = option(1, "denoising steps of a pseudo label")
    steps: int = option(3, "denoising steps at inference (Table 5)")
    time_difference: int = option(1, "td of Algorithm 3: a step goes so many steps further down in noise than in time")
    noise_seed: int = option(0, "seed of the noise that evaluation and prediction start from, the same for every image")
    single_view: bool = option(False, "one strong view, as in Eq. 6, instead of UniMatch's two and the perturbed features")
    cutmix: bool = option(True, "CutMix between the strong views of unlabeled images, as in UniMatch")
    discriminative: bool = option(False, "the discriminative baseline of Table 5: the same layers, no noisy mask")
    trajectory: str | None = option(None, "no training: write this checkpoint's prediction after each step, Figure 10")


# ================================================================ diffusion


def alpha_bar(t) -> Tensor:
    """The cosine schedule, in (0, 1), for times in [0, 1]; any shape, float64. y_t keeps alpha_bar of y_0's variance."""
    t = torch.as_tensor(t, dtype=torch.float64)
    n = torch.cos((t + 0.0002) / 1.00025 * (math.pi / 2)) ** 2
    return n.clamp(1e-9, 1 - 1e-9)


def add_noise(y0: Tensor, t, noise: Tensor) -> Tensor:
    """Eq. 3: y_t from encoded labels y0 [B, K, h, w] at times t, a number or one per image [B]; noise is standard normal."""
    level = alpha_bar(t)
    signal, spread = ((root if root.dim() == 0 else root.view(-1, 1, 1, 1)).to(y0.dtype) for root in (level.sqrt(), (1 - level).sqrt()))
    return signal * y0 + spread * noise


def ddim_step(y_t: Tensor, y0: Tensor, t_now: float, t_next: float) -> Tensor:
    """Algorithm 3: from y_t at t_now > 0 to t_next, given the predicted and encoded y0; all [B, K, h, w].

    At t_next = 0 the result is y0 itself, without the trace of noise that the schedule has there.
    """
    if t_next <= 0:
        return y0
    level = alpha_bar(t_now)
    noise = (y_t - level.sqrt() * y0) / (1 - level).sqrt()
    return add_noise(y0, t_next, noise)


@torch.no_grad()
def sample(model, z: Tensor, steps: int, noise: Tensor, time_difference: int = 1) -> list[Tensor]:
    """Algorithm 3: the logits [B, C, h, w] after each of `steps` denoising steps, given features z [B, D, h, w].

    `model` has denoise(z, y_t, t [B]) -> logits and encode(label [B, h, w]) -> y_0; `noise` [B or 1, K, h, w] is y at t = 1.
    Where K is 0 there is no mask to denoise: one pass, by the discriminative baseline.
    """
    if not noise.shape[1]:
        return [model.denoise(z, None, torch.zeros(len(z), device=z.device))]
    y_t, predictions = noise.expand(len(z), -1, -1, -1), []
    for step in range(steps):
        t_now, t_next = 1 - step / steps, max(1 - (step + 1 + time_difference) / steps, 0)
        predictions.append(model.denoise(z, y_t, torch.full((len(z),), t_now, device=z.device)))
        if step + 1 < steps:
            y_t = ddim_step(y_t, model.encode(predictions[-1].argmax(dim=1)), t_now, t_next)
    return predictions


def debias_penalty(logits: Tensor, class_prior: Tensor, t: Tensor, tau: float) -> Tensor:
    """Second term of Eq. 9, per pixel [B, H, W]: tau t |f - f*|^2 for logits [B, C, H, W], a positive class_prior [C], t [B].

    f is the predicted distribution and f* its debiased version, f / (C p(y_0)) normalised to sum to one, a constant for the
    gradient: pulling f to it moves probability from head to tail classes. Zero for a uniform prior.
    """
    offset = (class_prior * len(class_prior)).log().to(logits)
    debiased = (logits.detach() - offset.view(1, -1, 1, 1)).softmax(dim=1)
    return tau * t.view(-1, 1, 1) * (logits.softmax(dim=1) - debiased).square().sum(dim=1)


class ClassPrior(nn.Module):
    """p(y_0) of labels, fixed, and of pseudo labels, which starts there and follows them: [C] each, in a checkpoint.

    counts: labeled pixels per class [C]. A class without any has 1/C in both, for ever: it is not adjusted.
    """

    def __init__(self, counts: Tensor, momentum: float):
        super().__init__()
        self.momentum = momentum
        counts = counts.double()
        prior = torch.where(counts > 0, (counts / counts.sum()).clamp(min=LEAST_PRIOR), 1 / len(counts))
        self.register_buffer("known", counts > 0, persistent=False)
        self.register_buffer("labels", prior)
        self.register_buffer("pseudo_labels", prior.clone())

    def update(self, counts: Tensor) -> None:
        """Once a step, with the pseudo labels' pixel counts [C] over all ranks; without a pixel nothing changes."""
        share = torch.lerp((counts / counts.sum().clamp(min=1)).double(), self.pseudo_labels, self.momentum).clamp(min=LEAST_PRIOR)
        self.pseudo_labels.copy_(torch.where(self.known & (counts.sum() > 0), share, self.pseudo_labels))


# ================================================================ the network


class DenoiserLayer(nn.Module):
    """x + attention(x), layer norm, the time's scale and shift: [B, h * w, D] -> [B, h * w, D]."""

    def __init__(self, channels: int, time_channels: int, ffn_channels: int):
        super().__init__()
        self.attention, self.norm = DeformableAttention(channels, heads=min(8, channels // 8)), nn.LayerNorm(channels)
        self.ffn = None
        if ffn_channels:
            self.ffn = nn.Sequential(nn.Linear(channels, ffn_channels), nn.ReLU(), nn.Linear(ffn_channels, channels))
            self.ffn_norm = nn.LayerNorm(channels)
        self.scale_and_shift = nn.Linear(time_channels, 2 * channels)

    def forward(self, x: Tensor, time: Tensor, height: int, width: int) -> Tensor:
        x = self.norm(x + self.attention(x, height, width))
        if self.ffn is not None:
            x = self.ffn_norm(x + self.ffn(x))
        scale, shift = self.scale_and_shift(time).unsqueeze(1).chunk(2, dim=-1)
        return torch.addcmul(shift, x, 1 + scale)


class MaskDenoiser(nn.Module):
    """f: features z [B, D, h, w], noisy mask y_t [B, K, h, w], t [B] -> logits [B, C, h, w] of the clean mask.

    mask_channels = 0 makes the discriminative baseline, which sees z alone.
    """

    def __init__(self, channels: int, mask_channels: int, num_classes: int, layers: int, ffn_channels: int = 0,
                 normalize_mask: bool = False):
        super().__init__()
        self.normalize_mask = normalize_mask
        # The 1x1 convolution of concat(y_t, z), as the sum of its two halves.
        self.fuse_image = nn.Linear(channels, channels)
        self.fuse_mask = nn.Linear(mask_channels, channels, bias=False) if mask_channels else None
        if mask_channels:
            nn.init.zeros_(self.fuse_mask.weight)  # else the features start, and with SGD stay, under a layer of noise
        self.time = nn.Sequential(nn.Linear(channels, 4 * channels), nn.SiLU(), nn.Linear(4 * channels, 4 * channels), nn.SiLU())
        self.layers = nn.ModuleList(DenoiserLayer(channels, 4 * channels, ffn_channels) for _ in range(layers))
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, z: Tensor, y_t: Tensor | None, t: Tensor) -> Tensor:
        height, width = z.shape[2:]
        x = self.fuse_image(pixels_last(z))
        if self.fuse_mask is not None:
            if self.normalize_mask:
                y_t = y_t * y_t.square().mean(dim=(1, 2, 3), keepdim=True).rsqrt()
            x = x + self.fuse_mask(pixels_last(y_t))
        time = self.time(sinusoids(t, z.shape[1]))
        for layer in self.layers:
            x = layer(x, time, height, width)
        return self.classifier(x).transpose(1, 2).unflatten(2, (height, width))


def pixels_last(x: Tensor) -> Tensor:
    """[B, D, h, w] -> [B, h * w, D]."""
    return x.flatten(2).transpose(1, 2)


def sinusoids(t: Tensor, channels: int) -> Tensor:
    """Times [B] in [0, 1] -> [B, channels]: sines and cosines of 1000 t, periods from 2 pi to 20,000 pi (Vaswani et al. 2017)."""
    frequency = torch.exp(torch.arange(channels // 2, device=t.device) * (-math.log(10000) / (channels // 2)))
    angle = 1000 * t[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class LabelEncoding(nn.Module):
    """Label maps [B, h, w] of 0..C-1 and C (or 255) for unknown -> real numbers in [-b, b], [B, K, h, w].

    embedding: one learned vector per class, through (sigmoid(e) 2 - 1) b; K = `channels`. bits: the binary digits of the
    class as -b and b; K = ceil(log2(C + 1)).
    """

    def __init__(self, kind: str, num_classes: int, channels: int, scale: float):
        super().__init__()
        self.num_classes, self.scale = num_classes, scale
        self.channels = channels if kind == "embedding" else math.ceil(math.log2(num_classes + 1))
        if kind == "embedding":
            self.embedding = nn.Parameter(torch.randn(num_classes + 1, channels))
        else:
            bits = torch.arange(num_classes + 1)[:, None] >> torch.arange(self.channels) & 1
            self.register_buffer("bits", bits.float() * 2 - 1, persistent=False)

    def forward(self, label: Tensor) -> Tensor:
        label = label.long().clamp(max=self.num_classes)
        table = self.bits if hasattr(self, "bits") else self.embedding.float().sigmoid() * 2 - 1
        return F.embedding(label, table * self.scale).permute(0, 3, 1, 2)


class DiffMatch(nn.Module):
    """g and f. forward(images [B, 3, H, W]) -> z [B, D, H/4, W/4]; forward(denoise=(z, y_t, t)) -> logits [B, C, H/4, W/4].

    forward(images, perturb=k) -> (z, z of the last k images under channel dropout).
    """

    def __init__(self, config: Config, num_classes: int):
        super().__init__()
        self.extractor = DeepLabV3Plus(config.backbone, num_classes, config.weights)
        self.extractor.classifier = nn.Identity()
        channels = self.extractor.channels
        self.encode = None if config.discriminative else LabelEncoding(config.encoding, num_classes, channels, config.scale)
        self.mask_channels = 0 if config.discriminative else self.encode.channels
        self.denoiser = MaskDenoiser(channels, self.mask_channels, num_classes, config.layers, config.ffn_channels,
                                     config.normalize_mask)

    def forward(self, images: Tensor | None = None, perturb: int = 0, denoise: tuple | None = None):
        if denoise is not None:
            return self.denoise(*denoise)
        z = self.extractor.features(images, perturb)
        return z.split([len(images), perturb]) if perturb else z

    def denoise(self, z: Tensor, y_t: Tensor | None, t: Tensor) -> Tensor:
        return self.denoiser(z, y_t, t).float().contiguous()

    def parameter_groups(self, lr: float, head_lr_multiplier: float) -> list[dict]:
        """The encoder at `lr`, everything else at `lr` x `head_lr_multiplier`."""
        encoder, head = self.extractor.parameter_groups(lr, head_lr_multiplier)
        mask = [*self.denoiser.parameters(), *(self.encode.parameters() if self.encode else ())]
        return [encoder, {**head, "params": head["params"] + mask}]


def upsample(logits: Tensor, size) -> Tensor:
    """Logits [B, C, h, w] -> [B, C, H, W], as DeepLabv3+ enlarges its own."""
    return F.interpolate(logits.float(), size=tuple(size), mode="bilinear", align_corners=True)


def downsample(label: Tensor, size) -> Tensor:
    """Label maps [B, H, W] -> [B, h, w], nearest; the inverse of `upsample`'s grid: the corners' labels stay in the corners."""
    rows, columns = (torch.linspace(0, full - 1, small, device=label.device).round().long() for full, small in zip(label.shape[1:], size))
    return label[:, rows][:, :, columns]


# ================================================================ training


def make_views(part: dict[str, Tensor], config: Config, blur: tuple[float, float]) -> dict[str, Tensor]:
    """Weak crops as the loader gives them -> everything a step needs that does not depend on the network."""
    weak = augment.to_float(part["unlabeled"])
    views = {"labeled": augment.normalize(part["labeled"]), "label": part["label"], "weak": augment.normalize(weak), "valid": part["valid"]}
    if "truth" in part:
        views["truth"] = part["truth"]
    neighbour_valid = runtime.roll_global_batch(part["valid"])
    for view in strong_views(config):
        strong = augment.strong_augment(weak, blur_sigma=blur)
        boxes = augment.cutmix_boxes(len(weak), config.crop, p=0.5 if config.cutmix else 0.0, device=weak.device)
        views[view] = augment.normalize(augment.cutmix(boxes, strong, runtime.roll_global_batch(strong)))
        views[view + "_boxes"] = boxes
        views[view + "_valid"] = augment.cutmix(boxes, part["valid"], neighbour_valid)
    return views


def strong_views(config: Config) -> tuple[str, ...]:
    return ("strong_1",) if config.single_view else ("strong_1", "strong_2")


def train(config: Config) -> dict:
    """Train, evaluate and save as `config` says; returns the last evaluation."""
    context = runtime.start(config.device)
    data = load_data(config, context)
    fill_from_recipe(config, "diffmatch", data, context)
    if config.threshold is None:
        config.threshold = data.info.threshold
    check(config)
    require(bool(data.unlabeled), "no unlabeled image is left: DiffMatch learns from both kinds")

    runtime.seed_everything(config.seed)
    model = build_model(config, data.info.num_classes)
    network = runtime.wrap(model, config, context)
    optimizer = torch.optim.SGD(model.parameter_groups(config.lr, config.head_lr_multiplier), momentum=config.momentum,
                                weight_decay=config.weight_decay)
    labeled_pixels = class_pixels(data)
    prior = ClassPrior(labeled_pixels, config.prior_momentum).to(context.device)
    state = {"model": model, "optimizer": optimizer, "prior": prior}
    if config.ema_decay:
        state["ema"] = runtime.WeightAverage(model, config.ema_decay)
    runtime.seed_everything(config.seed + 1000 * context.rank)  # ranks augment and add noise differently

    run = Run("diffmatch", config, context, state)
    start = run.begin()
    run.say(parameter_report(model))
    loader = training_loader(data, config, context, start, config.iterations)

    for iteration, batch in enumerate(loader, start):
        runtime.poly_lr(optimizer, iteration, config.iterations)
        parts = [make_views(part, config, data.info.blur) for part in runtime.split_batch(batch, config.grad_accum, context.device)]
        counts, observed, logged = pixel_counts(parts), 0.0, {}
        for number, views in enumerate(parts):
            with runtime.no_sync_unless(number == len(parts) - 1, network):
                with runtime.autocast(config, context.device):
                    loss, terms, pixels = diffmatch_loss(network, model, views, counts, prior, config)
                loss.backward()
            logged = {name: value.detach() + logged.get(name, 0.0) for name, value in terms.items()}
            observed = observed + pixels
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        logged |= class_shares(observed / counts["valid"], data.info.classes)
        prior.update(runtime.all_reduce_sum(observed[0]))
        if config.ema_decay:
            state["ema"].update(iteration)

        run.log(iteration, logged, slow=lambda means: report(means, prior, data.info.classes))
        if run.should_evaluate(iteration):
            predict = predictor(run.evaluated_model, config)
            run.note_results(iteration, run.evaluate(predict, data, getattr(data, config.eval_split), labeled_pixels))
        run.end_of_step(iteration)

    finish(run, data, labeled_pixels)
    return run.last


def diffmatch_loss(network, model: DiffMatch, views: dict, counts: dict, prior: ClassPrior, config: Config):
    """One part of a batch through Algorithm 1: (loss, terms for the log, `class_counts` [3, C] of pseudo labels, of those that
    are learned from, and of the truth where it is known; two rows where it is not)."""
    names, size, unlabeled = strong_views(config), views["weak"].shape[2:], len(views["weak"])
    images, strong = torch.cat([views["labeled"], views["weak"]]), torch.cat([views[name] for name in names])
    if config.single_view:  # features dropped in the strong view itself
        z, z_perturbed = network(images), None
        _, z_strong = network(strong, perturb=unlabeled)
    else:
        z, z_perturbed = network(images, perturb=unlabeled)
        z_strong = network(strong)
    z_labeled, z_weak = z.split([len(z) - unlabeled, unlabeled])
    pseudo_label, used = pseudo_labels(model, z_weak, views["valid"], config)
    neighbour_label, neighbour_used = runtime.roll_global_batch(pseudo_label), runtime.roll_global_batch(used)

    # For each view: features, y_0, the pixels whose cross entropy counts, class prior, and what the sum is divided by.
    targets = [(z_labeled, views["label"].long(), views["label"] != IGNORE, prior.labels, counts["label"])]
    if z_perturbed is not None:
        targets.append((z_perturbed, pseudo_label, used, prior.pseudo_labels, counts["valid"]))
    for name, z_view in zip(names, z_strong.chunk(len(names))):
        mixed_label = augment.cutmix(views[name + "_boxes"], pseudo_label, neighbour_label)
        mixed_used = augment.cutmix(views[name + "_boxes"], used, neighbour_used)
        targets.append((z_view, mixed_label, mixed_used, prior.pseudo_labels, counts[name + "_valid"]))

    # One pass of the denoiser for all views; each image has a time and noise of its own.
    z, label = torch.cat([target[0] for target in targets]), torch.cat([target[1] for target in targets])
    t, y_t = torch.zeros(len(z), device=z.device), None
    if not config.discriminative:
        t, y0 = torch.rand_like(t), model.encode(downsample(label, z.shape[2:]))
        y_t = add_noise(y0, t, torch.randn_like(y0))
    sizes = [len(target[0]) for target in targets]
    predictions = zip(targets, upsample(network(denoise=(z, y_t, t)), size).split(sizes), t.split(sizes))

    losses, penalties = [], []
    for (_, label, learned, class_prior, pixels), logits, time in predictions:
        cross_entropy = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")
        hard = config.ohem and not losses  # of the labeled images
        losses.append((hard_pixel_loss(cross_entropy, label, config.ohem) if hard else (cross_entropy * learned).sum()) / pixels)
        if config.tau and not config.discriminative:
            penalties.append((debias_penalty(logits, class_prior, time, config.tau) * (label != IGNORE)).sum() / pixels)
            losses[-1] = losses[-1] + penalties[-1]
    loss_sup = losses[0]  # Eq. 10
    loss_unsup = losses[1] if config.single_view else 0.5 * losses[1] + 0.5 * (losses[2] + losses[3]) / 2  # Eq. 11
    loss = 0.5 * (loss_sup + loss_unsup)

    terms = {"loss": loss, "loss_sup": loss_sup, "loss_unsup": loss_unsup, "used": used.sum() / counts["valid"]}
    if penalties:
        terms["penalty_sup"] = penalties[0]
    num_classes = logits.shape[1]
    pixels = [class_counts(pseudo_label, num_classes), class_counts(torch.where(used, pseudo_label, IGNORE), num_classes)]
    if "truth" in views:  # for the log only
        truth = views["truth"].long()
        known = used & (truth != IGNORE)
        terms |= {"used_known": known.sum(), "used_right": (known & (pseudo_label == truth)).sum()}
        pixels.append(class_counts(truth, num_classes))
    return loss, terms, torch.stack(pixels)


@torch.no_grad()
def pseudo_labels(model: DiffMatch, z_weak: Tensor, valid: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Eq. 6, by denoising pure noise: (label int64 [B, H, W], 255 outside of `valid`; bool, those at or above the threshold)."""
    noise = torch.randn(len(z_weak), model.mask_channels, *z_weak.shape[2:], device=z_weak.device)
    logits = upsample(sample(model, z_weak, config.pseudo_steps, noise, config.time_difference)[-1], valid.shape[1:])
    confidence, label = logits.softmax(dim=1).max(dim=1)
    return torch.where(valid, label, IGNORE), (confidence >= config.threshold) & valid


def class_counts(label: Tensor, num_classes: int) -> Tensor:
    """Pixels of each class, float64 [C], in int64 label maps of any shape with 255 = ignore."""
    counts = torch.zeros(IGNORE + 1, dtype=torch.float64, device=label.device)
    return counts.scatter_add_(0, label.flatten(), torch.ones_like(label, dtype=torch.float64).flatten())[:num_classes]


def class_shares(shares: Tensor, classes) -> dict[str, Tensor]:
    """[3 or 2, C] -> scalars for the log: "pseudo <class>", "used <class>" and "true <class>"."""
    return {f"{kind} {name}": share for kind, row in zip(("pseudo", "used", "true"), shares) for name, share in zip(classes, row)}


def check(config: Config) -> None:
    """Raise UserError for options that no run could use."""
    for name in ("layers", "pseudo_steps", "steps"):
        require(getattr(config, name) >= 1, f"--{name.replace('_', '-')} must be at least 1, not {getattr(config, name)}")
    for name in ("ffn_channels", "tau", "time_difference", "noise_seed"):
        require(getattr(config, name) >= 0, f"--{name.replace('_', '-')} must not be negative, not {getattr(config, name)}")
    require(config.scale > 0, f"--scale must be positive, not {config.scale}")
    require(0 <= config.prior_momentum < 1, f"--prior-momentum must lie in [0, 1), not {config.prior_momentum}")


def parameter_report(model: DiffMatch) -> str:
    """The counts of Table 7."""
    def millions(module) -> str:
        return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f} M"

    return f"{millions(model)} parameters: {millions(model.extractor)} feature extractor, {millions(model.denoiser)} mask denoiser"


def report(means: dict[str, float], prior: ClassPrior, classes) -> dict[str, float]:
    """For the log: how many used pseudo labels are right, and p(y_0) of the pseudo labels."""
    line = {f"prior {name}": round(value, 6) for name, value in zip(classes, prior.pseudo_labels.tolist())}
    if means.get("used_known"):
        line["used_accuracy"] = round(means["used_right"] / means["used_known"], 5)
    return line


def finish(run: Run, data, labeled_pixels: Tensor) -> None:
    """What a finished run leaves: samples and Figure 10; Figures 4 and 5 where the unlabeled images' truth is known; with
    matplotlib, Figures 1 and 8."""
    predict, draw = predictor(run.evaluated_model, run.config), find_spec("matplotlib") is not None
    run.write_samples(predict, data)
    if run.context.is_main:
        write_trajectory(predict, data, run.context.device, run.folder / "trajectory.png")
        if draw:
            lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
            plot_class_shares(lines, data.info.classes, labeled_pixels, run.folder / "pseudo_labels.png")
    if data.unlabeled[0].mask is not None:
        results = run.evaluate(predict, data, data.unlabeled, labeled_pixels)
        if run.context.is_main:
            write_json(run.folder / "unlabeled.json", results)
            if draw:
                plot_calibration(results, data.info.classes, run.folder / "unlabeled.png")


# ================================================================ prediction


def build_model(config: Config, num_classes: int) -> nn.Module:
    return DiffMatch(config, num_classes)


class Predictor:
    """images [B, 3, H, W], normalised -> logits [B, C, H, W] after `config.steps` denoising steps."""

    def __init__(self, model: DiffMatch, config: Config):
        self.model, self.config = model.eval(), config

    def noise(self, z: Tensor) -> Tensor:
        """One image's, for every image of this size: a score depends neither on the order of the images nor on the batch."""
        generator = torch.Generator(z.device).manual_seed(self.config.noise_seed)
        noise = torch.randn(1, self.model.mask_channels, *z.shape[2:], generator=generator, device=z.device)
        return noise.contiguous(memory_format=torch.channels_last)

    def trajectory(self, images: Tensor) -> list[Tensor]:
        """The logits [B, C, h, w] after each step."""
        z = self.model(images)
        return sample(self.model, z, self.config.steps, self.noise(z), self.config.time_difference)

    def __call__(self, images: Tensor, step: int = -1) -> Tensor:
        return upsample(self.trajectory(images)[step], images.shape[2:])


def predictor(model: DiffMatch, config: Config) -> Predictor:
    return Predictor(model, config)


def write_trajectory(predict: Predictor, data, device, path: Path) -> None:
    """Figure 10: image | label | prediction after each step, of the first validation images."""
    steps = 1 if predict.config.discriminative else predict.config.steps
    captions = ("image", "label", *(f"step {step + 1}" for step in range(steps)))

    def label_maps(images: Tensor) -> list[Tensor]:
        return [upsample(logits, images.shape[2:])[0].argmax(dim=0) for logits in predict.trajectory(images)]

    write_sample_grid(label_maps, captions, data, device, path)


def trajectory(config: Config) -> None:
    """Figure 10 for the checkpoint `config.trajectory`, with this run's steps, time difference and noise seed; scores of every step."""
    context = runtime.start(config.device)
    check(config)
    predict, saved, info = load_model(config.trajectory, context.device)
    require(hasattr(saved, "pseudo_steps"), f"{config.trajectory} is no checkpoint of diffmatch.py")
    chosen = {name: getattr(config, name) for name in ("steps", "time_difference", "noise_seed")}
    predict = Predictor(predict.model, dataclasses.replace(saved, **chosen))
    data = load_data(dataclasses.replace(saved, data_root=config.data_root or saved.data_root), context)
    labeled_pixels, samples = class_pixels(data), getattr(data, config.eval_split)
    for step in range(1 if saved.discriminative else config.steps):
        results = evaluate(functools.partial(predict, step=step), evaluation_loader(samples, data, context, config.num_workers),
                           info, context, labeled_pixels)
        if context.is_main:
            print(f"step {step + 1}: mIoU {results['miou']:.2f}   head {results['head_miou']:.2f}   tail {results['tail_miou']:.2f}   "
                  f"ECE {100 * results['ece']:.2f} %", flush=True)
    if context.is_main:
        path = Path(config.output or Path(config.trajectory).parent) / "trajectory.png"
        write_trajectory(predict, data, context.device, path)
        print(path)


def main() -> None:
    config = parse(Config, description=__doc__)
    trajectory(config) if config.trajectory else train(config)


if __name__ == "__main__":
    runtime.run_main(main)
