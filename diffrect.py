"""DiffRect: Latent Diffusion Label Rectification for Semi-supervised Medical Image Segmentation (Liu et al., MICCAI 2024).

Idea. A segmentation U-Net learns from its own pseudo labels, and so keeps its errors. A second network, the rectifier, learns how label
maps get better: it embeds a coarse one (of the strong view) and a finer one (of the weak view), and the finer one's embedding is
recovered from noise by diffusion, on condition of the coarse one's; on labeled slices likewise from the weak view's to the truth. Then it
turns the weak view's pseudo labels of unlabeled slices into better ones, which the U-Net learns from. Only the U-Net is used afterwards.

    Eq. 1, 7       forward diffusion                                          cosine_alpha_bar, diffuse
    Eq. 3, 12      reverse diffusion, from a predicted clean latent           reverse_step, Rectifier.rectify
    Eq. 4          M_C: classes become colours far apart (SCS)                semantic_colors, color_masks
    Eq. 5          embedding of a coloured mask, B_sem                        Rectifier.embed
    Eq. 6          calibration guidance tau (CG)                              dice_coefficient, calibration_guidance
    Eq. 8, 10      the denoiser                                               Denoiser
    Eq. 9, 11      latent losses, strong to weak (S2W), weak to truth (W2G)   Rectifier.forward, rectifier_loss
    Eq. 13         total loss                                                 segmentation_loss, rectifier_loss
    Eq. 14         loss on rectified labels                                   segmentation_loss

                      paper                      released code              here
    one iteration     one loss (Eq. 13)          U-Net step, rectifier      rectifier step, then one U-Net step for all its losses
                                                 step, second U-Net step
                                                 on the rectified labels
    pseudo labels     as FixMatch                argmax where (p - min) /   FixMatch: pixels below --threshold are not learned from;
                                                 max > 0.8, which is nearly masks that are embedded are the plain argmax
                                                 everywhere; else
                                                 background
    loss on pseudo    as FixMatch                CE + Dice                  CE; Dice let small wrong regions grow on the phantom
    labels                                                                  (--pseudo-dice: released)
    complementary     -                          least likely class of weak -
    loss                                         view, in all FixMatch
                                                 losses
    colours           far apart                  black, red, green, blue    corners of the RGB cube farthest apart, background black
    without SCS       not said                   -                          evenly spaced grey levels
    tau               Dice, one a pair           1 - Dice over the batch,   Dice of each slice, classes that occur, not background,
                                                 with background, x 999;    x 1000
                                                 S2W: against the decoder's
                                                 output
    tau when labels   tau^u (Eq. 5)              of the labeled slices      tau^u
    are rectified
    slices in B_sem   concatenated               beside the mask, and their as released
                                                 features added
    transports on     S2W unlabeled, W2G         both on all slices (W2G    S2W unlabeled, W2G labeled
                      labeled                    of unlabeled: weak to
                                                 itself)
    image of S2W      not said                   of the strong view, for    as released
                                                 both masks
    epsilon predicts  noise (Eq. 3, 12), clean   clean latent               clean latent
                      latent (Eq. 9, 11)
    latent losses     l2 norm                    mean square, target        mean square, target detached
                                                 detached
    lambda_1          not said                   the ramped weight          1; L_Semi^Lat on unlabeled slices has the ramped weight
    condition         added to z_t               added, but only in the     added to z_t
                                                 last skip connection
    target of S2W's   pseudo label               decoder's own output on    the U-Net's weak pseudo label
    decoded mask                                 weak masks
    decoder           Upsample(r_l)              U-Net decoder with skips   U-Net decoder (--decoder upsample: 1x1 classifier first)
                                                 from the condition
    schedule          T not said, "e.g. cosine"  cosine, T = 10             cosine, T = 10
    reverse steps     all T, DDPM                DDIM at steps 10 and 1,    DDIM at steps 10 and 5, not clamped (--sampling-steps 10
                                                 latent clamped to [-1, 1]  --eta 1: the paper's)
    rectifier while   not said                   training mode              evaluation mode
    it rectifies
    rectified labels  Eq. 14, all pixels         as pseudo labels           plain argmax, all pixels of the slice
    weight of their   1                          1                          1; phantom 0.3, see README
    loss
    LCC alone         not said                   -                          the condition's latent is decoded
    batch statistics  not said                   strong: all slices; masks  strong: unlabeled slices; conditions of all pairs together,
                                                 of each pass apart         targets apart
    rectifier's lr    not said                   constant                   poly, as the U-Net's
    weak view         flips, rotation            nearest neighbour; outside bilinear (labels nearest); outside is ignored
                                                 is background, learned
    strong view       blur, contrast, sharpness, factors 1 to 1.1, blur     the released strengths, in this order; stronger on the
                      brightness                 radius up to 1, p 0.5,     phantom, which varies more
                                                 random order
    intensities       not said                   min-max per volume (ACDC)  min-max per volume
                                                 or slice
    test volumes      not said                   nearest neighbour to 256   bilinear to 256, logits bilinear back
                                                 and back
    tested weights    not said                   best on validation         results.json: the last; best.pt is there for
                                                                            python -m common.evaluate --split test
    empty masks       not said                   Dice 0, HD95 50, ASD 10    listed, no distance (common.evaluate --released-empty)
    several GPUs      -                          -                          batch shared, SyncBatchNorm, Dice over all ranks

Commands
    python diffrect.py                                                                embedded phantom, 3 labeled patients
    python -m common.medical prepare --dataset acdc --source ACDC --root data/acdc    once
    python diffrect.py --dataset acdc --labeled 7                                     one GPU
    torchrun --nproc_per_node=3 diffrect.py --dataset acdc --labeled 7

With lcc and diffrect a run folder also holds rectified.png: weak pseudo labels, what they are rectified to, and the truth.

Measured on the embedded phantom (3 labeled patients, test Dice, three seeds; README): labeled only 66.6, with strong augmentation 78.5, FixMatch
79.4, DiffRect 80.6, without W2G 84.8, without S2W 77.9, LCC alone 63.4 (one of three seeds ran away). ACDC has not been run.

Ablations. Table 4: --model fixmatch (baseline); --model lcc with --no-colors (w/o SCS), --guidance none (w/o CG) or neither; --no-s2w,
--no-w2g or neither. Without W2G, labeled slices also go from strong to weak, and the decoder still learns the truth from them. Table 5:
--guidance. Others: --model supervised, --strong-labeled, --decoder, --sampling-steps, --eta.
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, medical, runtime, scores
from common.augment import IGNORE
from common.options import TrainingOptions, fill_from_recipe, option, parse, require
from common.pictures import sample_grid
from common.run import Run
from common.runtime import pixel_counts

DROPOUT = (0.05, 0.1, 0.2, 0.3, 0.5)  # of the encoders' levels
TAU_SCALE = 1000  # tau is embedded like a time step of 0 to 1000


@dataclass
class Config(TrainingOptions):
    dataset: str = option("phantom", "phantom, phantom_large (embedded, made on first use), acdc, mscmrseg or prostate (converted by python -m common.medical prepare)")
    classes: str | None = option(None, "not used")
    labeled: str | None = option(None, "labeled patients: the first so many of train.txt, or all; 3_split2 takes train_split2.txt; default: "
                                       "phantom 3, acdc and mscmrseg 7, prostate 2")
    split_seed: int | None = option(None, "draw --labeled many patients at random by this seed")
    labeled_list: str | None = option(None, "a file with the labeled volumes instead: a patient and a volume a line")
    unlabeled_list: str | None = option(None, "a file with the volumes to learn from without labels, likewise; default: all others of train.txt")
    download: bool = option(False, "not used: see python -m common.medical prepare")
    backbone: str | None = option(None, "unet")
    weights: str = option("default", "not used: the U-Net starts from random weights")
    crop: int | None = option(None, "slices are resized to so many pixels each way, a multiple of 64; default: the data set's recipe")
    batch_size: int | None = option(None, "labeled slices a step over all GPUs, and as many unlabeled; default: the recipe's")
    epochs: int | None = option(None, "refused: see --iterations")
    grad_accum: int = option(1, "1: Dice is a ratio of sums over the whole batch")
    head_lr_multiplier: float | None = option(None, "not used: one learning rate for the U-Net")
    ohem: float | None = option(None, "not used")
    model: str = option("diffrect", "supervised (labeled slices only), or a row of Table 4: fixmatch, lcc (+ rectified labels without diffusion) or diffrect",
                        choices=("supervised", "fixmatch", "lcc", "diffrect"))
    strong_labeled: bool = option(False, "supervised: learn from the strong view of labeled slices")
    s2w: bool = option(True, "strong-to-weak transport on unlabeled slices (Eq. 9)")
    w2g: bool = option(True, "weak-to-truth transport on labeled slices (Eq. 11)")
    colors: bool = option(True, "semantic coloring (SCS); off: masks are embedded as grey levels")
    guidance: str = option("dice", "calibration guidance (CG, Table 5)", choices=("dice", "jaccard", "both", "fixed", "random", "none"))
    decoder: str = option("unet", "from the latent to the rectified label: unet (released code) or upsample (Section 2.3)", choices=("unet", "upsample"))
    threshold: float | None = option(None, "confidence from which a pseudo label is learned from (not a rectified one); default: 0.8")
    pseudo_dice: bool = option(False, "add Dice to the losses on pseudo labels, as the released code")
    consistency: float | None = option(None, "weight of the losses on pseudo labels after its ramp; default: 0.1, phantom 1")
    rampup: int | None = option(None, "iterations in which that weight rises; default: all, phantom the first 30 %")
    warmup: int | None = option(None, "iterations before rectified labels are learned from; default: 1,000 of 30,000, phantom 30 %")
    rectify_weight: float | None = option(None, "weight of the loss on rectified labels, Eq. 13; default: 1, phantom 0.3")
    lambda_u: float = option(1.0, "lambda_1 of Eq. 13: the latent loss on unlabeled slices")
    lambda_l: float = option(1.0, "lambda_2 of Eq. 13: the latent loss on labeled slices")
    diffusion_steps: int = option(10, "T, steps of the forward diffusion")
    sampling_steps: int = option(2, "reverse steps when labels are rectified")
    eta: float = option(0.0, "noise of a reverse step: 0 DDIM, 1 DDPM (Eq. 12)")
    channels: int | None = option(None, "channels of the first level, of both networks; default: 16, phantom 8")
    rectifier_lr: float | None = option(None, "learning rate of the rectifier; default: the U-Net's")


# ================================================================ the method


def semantic_colors(num_classes: int) -> Tensor:
    """M_C of Eq. 4: a colour for each class, uint8 [C, 3]; background is black, the others are far from it and from each other.

    Up to 8 classes get corners of the RGB cube, the choice of all with the largest distances (sorted, the smallest counts first). Further ones
    are taken one by one from a grid of 16 levels a channel, each as far from all others as possible. Raises ValueError beyond 256.
    """
    if not 1 <= num_classes <= 256:
        raise ValueError(f"there are colours for 1 to 256 classes, not {num_classes}")
    corners = list(itertools.product((0, 255), repeat=3))
    choices = (((0, 0, 0), *others) for others in itertools.combinations(corners[1:], min(num_classes, 8) - 1))
    colors = list(max(choices, key=lambda choice: sorted(math.dist(*pair) for pair in itertools.combinations(choice, 2))))
    levels = torch.arange(0, 256, 17)
    grid = torch.cartesian_prod(levels, levels, levels)
    while len(colors) < num_classes:
        nearest = torch.cdist(grid.double(), torch.tensor(colors).double()).amin(dim=1)
        colors.append(tuple(grid[int(nearest.argmax())].tolist()))
    return torch.tensor(colors, dtype=torch.uint8)


def color_masks(labels: Tensor, colors: Tensor) -> Tensor:
    """f of Eq. 4: labels [B, H, W] and colors uint8 [C, 3] -> float [B, 3, H, W] in [0, 1]. 255 (ignored) gets the colour of class 0."""
    labels = torch.where(labels == IGNORE, 0, labels.long())
    return (colors.float() / 255).to(labels.device)[labels].permute(0, 3, 1, 2)


def dice_coefficient(first: Tensor, second: Tensor, num_classes: int, jaccard: bool = False) -> Tensor:
    """Eq. 6: Dice of two label maps [B, H, W] in [0, 1], float [B]: mean over classes but 0 that occur in either; 1 if none does.

    Pixels where either map is 255 are left out. `jaccard`: intersection over union instead, of the same classes.
    """
    classes = torch.arange(1, num_classes, device=first.device)[:, None, None]
    known = ((first != IGNORE) & (second != IGNORE))[:, None]
    a, b = (first[:, None] == classes) & known, (second[:, None] == classes) & known
    both, total = (a & b).sum((2, 3)), a.sum((2, 3)) + b.sum((2, 3))  # [B, C - 1]
    values = both / (total - both).clamp(min=1) if jaccard else 2 * both / total.clamp(min=1)
    occurring = (total > 0).sum(dim=1)
    return torch.where(occurring > 0, values.sum(dim=1) / occurring.clamp(min=1), 1.0)


def calibration_guidance(kind: str, coarse: Tensor, fine: Tensor, num_classes: int) -> Tensor:
    """tau of Eq. 6 for pairs of label maps [B, H, W], and its other choices in Tables 4 and 5: float [B] in [0, 1], "both" in [0, 2]."""
    if kind == "random":
        return torch.rand(len(coarse), device=coarse.device)
    if kind in ("fixed", "none"):
        return torch.full((len(coarse),), 0.5 if kind == "fixed" else 0.0, device=coarse.device)
    dice = dice_coefficient(coarse, fine, num_classes) if kind != "jaccard" else 0
    return dice + dice_coefficient(coarse, fine, num_classes, jaccard=True) if kind != "dice" else dice


def cosine_alpha_bar(steps: int) -> Tensor:
    """alpha-bar of steps 0 (clean: 1) to T, float64 [T + 1]: cosine schedule, Nichol and Dhariwal 2021, Eq. 17, with beta <= 0.999."""
    phase = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2
    f = torch.cos(phase).square()
    beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, dim=0)])


def diffuse(z0: Tensor, alpha_bar: Tensor, noise: Tensor) -> Tensor:
    """Eq. 1, 7: a sample of q(z_t | z_0) for alpha_bar of the step, broadcast to z0."""
    return alpha_bar.sqrt() * z0 + (1 - alpha_bar).sqrt() * noise


def reverse_step(z_t: Tensor, z0: Tensor, alpha_bar: Tensor, alpha_bar_next: Tensor, eta: float = 0.0, noise: Tensor | None = None) -> Tensor:
    """From z_t to an earlier step, given the predicted clean z0: DDIM (Song et al. 2021, Eq. 12 and 16).

    eta = 1 between neighbouring steps is the DDPM's p(z_{t-1} | z_t) of Eq. 3 and 12, written for a network that predicts z_0, with the variance
    of the posterior q(z_{t-1} | z_t, z_0). `noise` is needed where eta > 0.
    """
    noise_in_z = (z_t - alpha_bar.sqrt() * z0) / (1 - alpha_bar).sqrt()
    sigma = eta * ((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)).sqrt()
    z = alpha_bar_next.sqrt() * z0 + (1 - alpha_bar_next - sigma.square()).clamp(min=0).sqrt() * noise_in_z
    return z + sigma * noise if eta else z


def ramp(iteration: int, length: int) -> float:
    """exp(-5 (1 - k / K)^2) up to iteration K = length, 1 after it (Laine and Aila 2017)."""
    return math.exp(-5 * (1 - min(iteration / max(length, 1), 1)) ** 2)


def over_ranks(sums: Tensor) -> Tensor:
    """Sums of this rank -> of all ranks, of which every rank must then compute the same loss.

    The gradient is this rank's times the number of ranks, which data parallelism averages out.
    """
    world = runtime.world_size()
    return sums if world == 1 else sums * world + (runtime.all_reduce_sum(sums.detach().clone()) - sums.detach() * world)


def cross_entropy(logits: Tensor, label: Tensor, used: Tensor, count: Tensor) -> Tensor:
    """Over the pixels that are `used`, bool [B, H, W], divided by `count` as `pixel_counts` gives it: logits [B, C, H, W], label int64 [B, H, W]."""
    label = torch.where(used, label, 0)  # of ignored ones too, which no class has
    return (F.cross_entropy(logits.float(), label, reduction="none") * used).sum() / count


def cross_entropy_and_dice(logits: Tensor, label: Tensor, used: Tensor, count: Tensor) -> Tensor:
    """CE + Dice of Eq. 14 and on labeled slices; arguments as above.

    Dice has squares in the denominator (V-Net), sums over the batch of all ranks and is a mean over classes, background included.
    """
    probs = logits.float().softmax(dim=1) * used[:, None]
    truth = F.one_hot(torch.where(used, label, 0), logits.shape[1]).permute(0, 3, 1, 2) * used[:, None]
    both, total = over_ranks(torch.stack([(probs * truth).sum((0, 2, 3)), (probs.square() + truth).sum((0, 2, 3))]))
    return cross_entropy(logits, label, used, count) + (1 - (2 * both + 1e-5) / (total + 1e-5)).mean()


# ================================================================ networks


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.LeakyReLU())


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm and LeakyReLU, dropout and, if guided, a shift by an embedding [B, E] between them."""

    def __init__(self, inputs: int, outputs: int, dropout: float = 0.0, guided: int = 0):
        super().__init__()
        self.first, self.second = convolution(inputs, outputs), convolution(outputs, outputs)
        self.shift = nn.Linear(guided, outputs) if guided else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        x = self.first(x)
        if self.shift is not None:
            x = x + self.shift(F.silu(embedding))[:, :, None, None]
        return self.second(self.dropout(x))


class Up(nn.Module):
    """A 1x1 convolution, twice the size (bilinear), then the features of that size from the way down, then a block."""

    def __init__(self, inputs: int, skip: int, outputs: int, guided: int = 0):
        super().__init__()
        self.narrow, self.block = nn.Conv2d(inputs, skip, 1), Block(2 * skip, outputs, guided=guided)

    def forward(self, x: Tensor, skip: Tensor, embedding: Tensor | None = None) -> Tensor:
        x = F.interpolate(self.narrow(x), scale_factor=2, mode="bilinear", align_corners=True)
        return self.block(torch.cat([skip, x], dim=1), embedding)


class Encoder(nn.Module):
    """[B, inputs, S, S] -> features of five levels, c to 16 c channels at strides 1 to 16. `added`: features to add to each."""

    def __init__(self, inputs: int, channels: int, guided: int = 0):
        super().__init__()
        widths = [inputs, *(channels << level for level in range(5))]
        self.blocks = nn.ModuleList(Block(a, b, dropout, guided) for a, b, dropout in zip(widths, widths[1:], DROPOUT))

    def forward(self, x: Tensor, embedding: Tensor | None = None, added: list[Tensor] | None = None) -> list[Tensor]:
        features = []
        for level, block in enumerate(self.blocks):
            x = block(F.max_pool2d(x, 2) if level else x, embedding)
            x = x if added is None else x + added[level]
            features.append(x)
        return features


class Decoder(nn.Module):
    """Features of five levels -> logits [B, C, S, S]."""

    def __init__(self, channels: int, num_classes: int, guided: int = 0):
        super().__init__()
        self.ups = nn.ModuleList(Up(channels << level + 1, channels << level, channels << level, guided) for level in (3, 2, 1, 0))
        self.classifier = nn.Conv2d(channels, num_classes, 3, padding=1)

    def forward(self, features: list[Tensor], embedding: Tensor | None = None) -> Tensor:
        *skips, x = features
        for up, skip in zip(self.ups, reversed(skips)):
            x = up(x, skip, embedding)
        return self.classifier(x)


class UNet(nn.Module):
    """The segmentation network: slices [B, 1, S, S] in [0, 1], S a multiple of 16 -> logits [B, C, S, S]."""

    def __init__(self, num_classes: int, channels: int = 16):
        super().__init__()
        self.encoder, self.decoder = Encoder(1, channels), Decoder(channels, num_classes)

    def forward(self, slices: Tensor) -> Tensor:
        return self.decoder(self.encoder(slices))


class Sinusoidal(nn.Module):
    """Numbers [B] -> embeddings [B, outputs]: sines and cosines of falling frequencies (Ho et al. 2020), then two layers."""

    def __init__(self, frequencies: int, outputs: int):
        super().__init__()
        self.register_buffer("rates", torch.exp(-math.log(10_000) * torch.arange(frequencies) / (frequencies - 1)), persistent=False)
        self.layers = nn.Sequential(nn.Linear(2 * frequencies, outputs), nn.SiLU(), nn.Linear(outputs, outputs))

    def forward(self, values: Tensor) -> Tensor:
        angles = values.float()[:, None] * self.rates
        return self.layers(torch.cat([angles.sin(), angles.cos()], dim=1))


class Denoiser(nn.Module):
    """epsilon of Eq. 8-12: noisy latent and condition [B, 16 c, S/16, S/16], step [B] -> the clean latent. Two levels down, two up."""

    def __init__(self, channels: int):
        super().__init__()
        low, middle, deep = 16 * channels, 24 * channels, 32 * channels
        self.time = Sinusoidal(4 * channels, deep)
        self.down1, self.down2 = Block(low, middle, guided=deep), Block(middle, deep, guided=deep)
        self.up1, self.up2 = Up(deep, middle, middle, guided=deep), Up(middle, low, low, guided=deep)

    def forward(self, z_t: Tensor, condition: Tensor, step: Tensor) -> Tensor:
        time = self.time(step)
        z = z_t + condition
        half = self.down1(F.max_pool2d(z, 2), time)
        quarter = self.down2(F.max_pool2d(half, 2), time)
        return self.up2(self.up1(quarter, half, time), z, time)


class Rectifier(nn.Module):
    """LCC and LFR: embeds coloured masks beside their slices, recovers better latents by diffusion and decodes them.

    forward(condition, target [B, 3, S, S] coloured masks, slices [B, 1, S, S], tau [B]) -> logits [B, C, S, S] of the recovered mask and the
    latent loss of each pair [B] (Eq. 9, 11). Without diffusion (LCC alone) the condition itself is decoded and the latent loss is 0.
    """

    def __init__(self, num_classes: int, channels: int = 16, diffusion_steps: int | None = 10, decoder: str = "unet"):
        super().__init__()
        guided = 32 * channels
        self.guidance = Sinusoidal(4 * channels, guided)
        self.slice_encoder, self.mask_encoder = Encoder(1, channels, guided), Encoder(4, channels, guided)
        self.denoiser = Denoiser(channels) if diffusion_steps else None
        self.decoder = Decoder(channels, num_classes, guided) if decoder == "unet" else nn.Conv2d(16 * channels, num_classes, 1)
        self.register_buffer("alpha_bar", cosine_alpha_bar(diffusion_steps or 1).float(), persistent=False)

    def embed(self, masks: Tensor, slices: Tensor, guidance: Tensor, of_slices: list[Tensor]) -> list[Tensor]:
        """B_sem of Eq. 5: features of five levels, the last is z. `of_slices`: those of the slices alone, which are added."""
        return self.mask_encoder(torch.cat([slices, masks], dim=1), guidance, of_slices)

    def decode(self, features: list[Tensor], latent: Tensor, guidance: Tensor) -> Tensor:
        if isinstance(self.decoder, Decoder):
            return self.decoder([*features[:-1], latent], guidance)
        return F.interpolate(self.decoder(latent), features[0].shape[2:], mode="bilinear", align_corners=False)

    def forward(self, condition: Tensor, target: Tensor, slices: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        guidance = self.guidance(TAU_SCALE * tau)
        of_slices = self.slice_encoder(slices, guidance)
        features = self.embed(condition, slices, guidance, of_slices)
        if self.denoiser is None:
            return self.decode(features, features[-1], guidance), tau.new_zeros(len(tau))
        with torch.no_grad():  # if the target could learn too, both would shrink to nothing, where recovering is easy
            clean = self.embed(target, slices, guidance, of_slices)[-1]
        step = torch.randint(1, len(self.alpha_bar), (len(clean),), device=clean.device)
        noisy = diffuse(clean, self.alpha_bar[step][:, None, None, None], torch.randn_like(clean))
        recovered = self.denoiser(noisy, features[-1], step)
        latent_loss = (recovered.float() - clean.float()).square().mean((1, 2, 3))
        return self.decode(features, recovered, guidance), latent_loss

    @torch.no_grad()
    def rectify(self, masks: Tensor, slices: Tensor, tau: Tensor, sampling_steps: int = 2, eta: float = 0.0) -> Tensor:
        """Coloured masks [B, 3, S, S] -> better labels int64 [B, S, S]: from pure noise, on condition of the masks' latents (Eq. 12).

        In evaluation mode, whatever the mode before and after. Without diffusion the masks' own latents are decoded.
        """
        training = self.training
        self.eval()
        guidance = self.guidance(TAU_SCALE * tau)
        features = self.embed(masks, slices, guidance, self.slice_encoder(slices, guidance))
        latent = features[-1]
        if self.denoiser is not None:
            steps = torch.linspace(len(self.alpha_bar) - 1, 0, sampling_steps + 1).round().long().tolist()
            condition, latent = latent, torch.randn_like(latent, dtype=torch.float32)
            for step, following in zip(steps, steps[1:]):
                clean = self.denoiser(latent, condition, torch.full_like(tau, step))
                latent = reverse_step(latent, clean, self.alpha_bar[step], self.alpha_bar[following], eta, torch.randn_like(latent) if eta else None)
        logits = self.decode(features, latent, guidance)
        self.train(training)
        return logits.argmax(dim=1)


# ================================================================ training


def make_views(batch: dict[str, Tensor], config: Config, info: medical.VolumeInfo) -> dict[str, Tensor]:
    """Weak slices as the loader gives them -> everything a step needs that does not depend on the networks."""
    views = {"labeled": augment.to_float(batch["labeled"]), "label": batch["label"].long()}
    if config.strong_labeled or config.model == "diffrect" and not config.w2g:
        views["labeled_strong"] = strong_view(views["labeled"], info)
    if config.model != "supervised":
        views |= {"weak": augment.to_float(batch["unlabeled"]), "valid": batch["valid"]}
        views["strong"] = strong_view(views["weak"], info)
        views |= {"truth": batch["truth"].long()} if "truth" in batch else {}
    return views


def strong_view(slices: Tensor, info: medical.VolumeInfo, p: float = 0.5) -> Tensor:
    """Contrast, sharpness, brightness and Gaussian blur, each with probability p and drawn anew for every slice [B, 1, S, S] in [0, 1]."""
    (low, high), (least, most) = info.adjust, info.blur
    factors, chosen = low + (high - low) * torch.rand(3, len(slices), device=slices.device), torch.rand(4, len(slices), device=slices.device) < p
    for adjust, factor, which in zip((augment.adjust_contrast, augment.adjust_sharpness, augment.adjust_brightness), factors, chosen):
        slices = adjust(slices, torch.where(which, factor, 1))
    blurred = augment.gaussian_blur(slices, least + (most - least) * torch.rand(len(slices), device=slices.device))
    return torch.where(chosen[3][:, None, None, None], blurred, slices)


def train(config: Config) -> dict:
    """Train, evaluate and save; returns the last evaluation."""
    context = runtime.start(config.device)
    data = medical.load_volumes(config, context)
    unlabeled = config.model != "supervised"
    require(config.epochs is None, "--epochs is not for diffrect.py, whose recipes count --iterations")
    fill_from_recipe(config, "diffrect", data, context)
    check(config, data, context)
    runtime.seed_everything(config.seed)
    model = build_model(config, data.info.num_classes)
    network = runtime.wrap(model, config, context)
    optimizer = torch.optim.SGD(model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
    state = {"model": model, "optimizer": optimizer}
    rectifies = config.model in ("lcc", "diffrect")
    if rectifies:
        rectifier = Rectifier(data.info.num_classes, config.channels, config.diffusion_steps if config.model == "diffrect" else None, config.decoder)
        rectifier_network = runtime.wrap(rectifier, config, context)
        rectifier_optimizer = torch.optim.SGD(rectifier.parameters(), config.rectifier_lr, config.momentum, weight_decay=config.weight_decay)
        state |= {"rectifier": rectifier, "rectifier_optimizer": rectifier_optimizer}
    colors = mask_colors(config, data.info.num_classes).to(context.device)
    if config.ema_decay:
        state["ema"] = runtime.WeightAverage(model, config.ema_decay)
    runtime.seed_everything(config.seed + 1000 * context.rank)  # ranks augment differently

    run = Run("diffrect", config, context, state, images_per_step=config.batch_size * (2 if unlabeled else 1), metric="dice")
    start = run.begin()
    loader = medical.slice_loader(data, config, context, start, config.iterations, unlabeled)

    for iteration, batch in enumerate(loader, start):
        runtime.poly_lr(optimizer, iteration, config.iterations)
        views = make_views(runtime.split_batch(batch, 1, context.device)[0], config, data.info)
        counts = pixel_counts([views])
        weight = config.consistency * ramp(iteration, config.rampup)
        terms, rectified = {}, None

        with runtime.autocast(config, context.device):
            outputs = forward_views(network, views, config)
        if rectifies:
            masks = embedded_masks(outputs, views)
            runtime.poly_lr(rectifier_optimizer, iteration, config.iterations)
            with runtime.autocast(config, context.device):
                loss, terms = rectifier_loss(rectifier_network, masks, views, counts, colors, outputs, weight, config)
            loss.backward()
            rectifier_optimizer.step()
            rectifier_optimizer.zero_grad(set_to_none=True)
            if iteration >= config.warmup:
                with runtime.autocast(config, context.device):
                    rectified = rectifier.rectify(color_masks(masks["weak"], colors), views["weak"], masks["tau_u"], config.sampling_steps, config.eta)
        loss, own_terms = segmentation_loss(outputs, views, counts, rectified, weight, config)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if config.ema_decay:
            state["ema"].update(iteration)

        run.log(iteration, {name: value.detach() for name, value in {**own_terms, **terms}.items()})
        if run.should_evaluate(iteration):
            run.note_results(iteration, scores.evaluate_volumes(predictor(run.evaluated_model, config), data.val, data.info, context))
            model.train()
        run.end_of_step(iteration)

    run.release_signals()  # what follows can be done again by the same command
    predict = predictor(run.evaluated_model, config)
    if data.test:
        run.note_test(scores.evaluate_volumes(predict, data.test, data.info, context))
    if context.is_main:
        scores.write_samples(predict, data, config.crop, context.device, Path(config.output) / "samples.png")
        if rectifies:
            write_rectified(model, rectifier, colors, data, config, context.device, Path(config.output) / "rectified.png")
    return run.last


def check(config: Config, data: medical.VolumeData, context: runtime.Context) -> None:
    """Fill in what the shared options do not know, and raise UserError for values that no run could use."""
    info, own = data.info, {"rectifier_lr": config.lr}
    own |= {name: getattr(info, name) for name in ("threshold", "consistency", "channels", "rectify_weight")}
    own |= {name: round(getattr(info, name) * config.iterations) for name in ("rampup", "warmup")}
    for name, value in own.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    require(config.crop % 64 == 0, f"--crop must be a multiple of 64 (six levels of halving), not {config.crop}")
    require(config.grad_accum == 1, "--grad-accum is not for diffrect.py: Dice is a ratio of sums over the whole batch")
    require(config.backbone == "unet", f"--backbone takes unet here, not {config.backbone}")
    require(0 <= config.threshold < 1, f"--threshold must lie in [0, 1), not {config.threshold}")
    for name in ("consistency", "rectify_weight", "lambda_u", "lambda_l", "rampup", "warmup"):
        require(getattr(config, name) >= 0, f"--{name.replace('_', '-')} must not be negative, not {getattr(config, name)}")
    require(config.channels >= 1 and config.rectifier_lr > 0, "--channels and --rectifier-lr must be positive")
    require(0 <= config.eta <= 1, f"--eta must lie in [0, 1], not {config.eta}")
    require(1 <= config.sampling_steps <= config.diffusion_steps, f"--sampling-steps takes 1 to {config.diffusion_steps} (--diffusion-steps), not {config.sampling_steps}")
    require(config.model == "supervised" or bool(data.unlabeled), "no unlabeled patient is left: add --model supervised")
    require(config.model == "diffrect" or config.s2w and config.w2g, f"--no-s2w and --no-w2g belong to --model diffrect, not {config.model}")
    require(config.s2w or config.w2g, "--no-s2w with --no-w2g leaves no transport to learn: --model lcc is without diffusion")
    require(config.s2w or config.crop > 64 or config.batch_size > context.world_size, f"--no-s2w leaves one slice a rank, whose latent shrinks to one "
            f"pixel at --crop {config.crop}: batch norm needs two values")
    require(config.model == "supervised" or not config.strong_labeled, "--strong-labeled belongs to --model supervised")


def mask_colors(config: Config, num_classes: int) -> Tensor:
    """uint8 [C, 3]: semantic colours, or without SCS evenly spaced greys."""
    if config.colors:
        return semantic_colors(num_classes)
    return torch.linspace(0, 255, num_classes).round().byte()[:, None].expand(-1, 3)


def forward_views(network: nn.Module, views: dict, config: Config) -> dict[str, Tensor]:
    """The U-Net's logits of every view, [b, C, S, S]. Labeled and weak slices share their batch statistics, strong ones have their own."""
    if config.model == "supervised":
        return {"labeled": network(views["labeled_strong" if config.strong_labeled else "labeled"])}
    size = len(views["labeled"])
    labeled, weak = network(torch.cat([views["labeled"], views["weak"]])).split([size, len(views["weak"])])
    outputs = {"labeled": labeled, "weak": weak}
    if "labeled_strong" in views:
        strong = network(torch.cat([views["labeled_strong"], views["strong"]]))
        return {**outputs, "labeled_strong": strong[:size], "strong": strong[size:]}
    return {**outputs, "strong": network(views["strong"])}


def embedded_masks(outputs: dict[str, Tensor], views: dict) -> dict[str, Tensor]:
    """Label maps int64 [b, S, S] of every view, from which no gradient flows to the U-Net. Outside of turned slices all are background."""
    inside = views["label"] != IGNORE
    return {name: logits.detach().argmax(dim=1) * (inside if name.startswith("labeled") else views["valid"]) for name, logits in outputs.items()}


def rectifier_loss(network, masks: dict, views: dict, counts: dict, colors: Tensor, outputs: dict, weight: float, config: Config) -> tuple[Tensor, dict]:
    """Diff Loss of Eq. 13: (loss, terms for the log). Adds tau of both kinds of pairs to `masks`."""
    classes = len(colors)
    truth, labeled = views["label"], len(views["label"])
    masks["tau_u"] = calibration_guidance(config.guidance, masks["strong"], masks["weak"], classes)  # Eq. 6
    coarse, fine, slices = (masks["labeled"], truth, "labeled") if config.w2g else (masks["labeled_strong"], masks["labeled"], "labeled_strong")
    masks["tau_l"] = calibration_guidance(config.guidance, coarse, fine, classes)
    pairs = [(coarse, fine, views[slices], masks["tau_l"])]
    if config.s2w:
        pairs.append((masks["strong"], masks["weak"], views["strong"], masks["tau_u"]))
    coarse, fine, slices, tau = (torch.cat(column) for column in zip(*pairs))
    logits, latent = network(color_masks(coarse, colors), color_masks(fine, colors), slices, tau)

    loss = decoded = cross_entropy_and_dice(logits[:labeled], truth, truth != IGNORE, counts["label"])
    terms = {"loss_decoded": decoded, "tau_l": masks["tau_l"].mean(), "tau_u": masks["tau_u"].mean()}
    if config.model == "diffrect":
        terms["loss_latent_l"] = latent[:labeled].mean()  # Eq. 11
        loss = loss + config.lambda_l * terms["loss_latent_l"]
    if config.s2w:
        used = confident(outputs["weak"], views["valid"], config.threshold)
        terms["loss_decoded_u"] = pseudo_label_loss(config)(logits[labeled:], masks["weak"], used, counts["valid"])
        loss = loss + weight * terms["loss_decoded_u"]
        if config.model == "diffrect":
            terms["loss_latent_u"] = latent[labeled:].mean()  # Eq. 9
            loss = loss + config.lambda_u * terms["loss_latent_u"]
    return loss, {"loss_rectifier": loss, **terms}


def pseudo_label_loss(config: Config):
    """What FixMatch's term is: cross entropy, or with Dice."""
    return cross_entropy_and_dice if config.pseudo_dice else cross_entropy


@torch.no_grad()
def confident(logits: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Where pseudo labels are learned from, bool [B, H, W]."""
    return (logits.float().softmax(dim=1).amax(dim=1) >= threshold) & valid


def segmentation_loss(outputs: dict, views: dict, counts: dict, rectified: Tensor | None, weight: float, config: Config) -> tuple[Tensor, dict]:
    """Seg Loss of Eq. 13: (loss, terms for the log). `rectified`: labels of the weak view int64 [b, S, S], None during the warm-up."""
    truth = views["label"]
    loss = cross_entropy_and_dice(outputs["labeled"], truth, truth != IGNORE, counts["label"])
    terms = {"loss_sup": loss}
    if config.model == "supervised":
        return loss, {"loss": loss, **terms}
    pseudo_label, used = outputs["weak"].detach().argmax(dim=1), confident(outputs["weak"], views["valid"], config.threshold)
    terms["loss_unsup"] = pseudo_label_loss(config)(outputs["strong"], pseudo_label, used, counts["valid"])
    loss = loss + weight * terms["loss_unsup"]
    terms["used"] = used.sum() / counts["valid"]
    learned = pseudo_label if rectified is None else rectified
    if config.model != "fixmatch":
        terms["loss_rectified"] = loss.new_zeros(()) if rectified is None else cross_entropy_and_dice(outputs["weak"], rectified, views["valid"], counts["valid"])
        loss = loss + config.rectify_weight * terms["loss_rectified"]  # Eq. 14
    if "truth" in views:  # for the log only
        terms["pseudo_dice"] = dice_coefficient(pseudo_label, views["truth"], outputs["weak"].shape[1]).mean()
        if config.model != "fixmatch":
            terms["rectified_dice"] = dice_coefficient(learned, views["truth"], outputs["weak"].shape[1]).mean()
    return loss, {"loss": loss, **terms}


@torch.no_grad()
def write_rectified(model: UNet, rectifier: Rectifier, colors: Tensor, data: medical.VolumeData, config: Config, device: torch.device, path: Path) -> None:
    """A picture of validation slices: image | weak pseudo label | rectified label | truth. tau is that of a mask and itself: there is one view."""
    model.eval()
    rows = []
    for image, truth in scores.middle_slices(data.val[:6], data.info, config.crop):
        slices = torch.from_numpy(image)[None, None].to(device).float() / 255
        label = model(slices).argmax(dim=1)
        tau = calibration_guidance(config.guidance, label, label, data.info.num_classes)
        rectified = rectifier.rectify(color_masks(label, colors), slices, tau, config.sampling_steps, config.eta)
        rows.append((image[..., None].repeat(3, axis=2), *(map_[0].byte().cpu().numpy() for map_ in (label, rectified)), truth))
    sample_grid(rows, data.info.classes, data.info.palette, path, ("image", "weak pseudo label", "rectified label", "truth"))


def build_model(config: Config, num_classes: int) -> nn.Module:
    """The U-Net, which is all that inference needs."""
    return UNet(num_classes, config.channels)


def predictor(model: nn.Module, config: Config):
    """slices [B, 1, S, S] in [0, 1] -> logits [B, C, S, S]."""
    return model.eval()


def main() -> None:
    train(parse(Config, description=__doc__))


if __name__ == "__main__":
    runtime.run_main(main)
