"""DAW: Exploring the Better Weighting Function for Semi-supervised Semantic Segmentation
Sun et al., NeurIPS 2023.

A pseudo label counts with a weight f(p) of its confidence p. E1 is the mean weight of wrong ones,
E2 one minus that of right ones, however common each kind is. The confidences of both on *labeled*
pixels give the means and variances of two truncated Gaussians, g+ (right) and g- (wrong): of all
step functions f(p) = 1[p >= t], the one at t*, where g+ overtakes g-, has the smallest E1 + E2.

    Eq. 1, 2    supervised loss, weighted loss      supervised_loss, weighted_loss
    Eq. 3, 4    the two Gaussians                   gaussian_mass
    Eq. 5, 6    their means and variances, EMA      confidence_sums, Statistics
    Eq. 7-9     E1, E2                              tradeoff
    Eq. 10, 11  t*                                  optimal_threshold
    Table 1     f(p)                                pseudo_label_weight
    Eq. 12      distribution alignment              class_sums, Statistics, align_distribution
    Eq. 13      L_u of a step, aligned labels       daw_loss

Run
    python daw.py                                              embedded data, minutes on a laptop
    python daw.py --dataset pascal --labeled 92 --download     one GPU
    torchrun --nproc_per_node=8 daw.py --dataset pascal --labeled 92 --crop 513
Baselines: --supervised; --weighting none, fixed (UniMatch; FixMatch: --views 1), power; --no-align.
Results, figures and all differences from the paper and the released code: .docs/daw.md
"""

import math
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.augment import (IGNORE, Photometry, cutmix, cutmix_boxes, normalize, strong_augment,
                            to_float)
from common.backbones import checkpoint_activations, load_strictly, random_weights_like
from common.data import DataOptions, load_data, training_loader
from common.evaluate import evaluate, pixel_accuracy, write_samples
from common.models import DeepLabV3Plus, hard_pixel_loss
from common.runtime import (KEEP_BUFFERS, Checkpoint, Log, Milestones, RunOptions, all_reduce_sum,
                            bf16_is_fast, cutmix_partner, init_distributed, make_ema,
                            mean_over_ranks, option, parse, require, run_main, update_ema,
                            with_defaults)

WEIGHTINGS = ("none", "fixed", "power", "daw")


@dataclass
class Config(DataOptions, RunOptions):
    """What touches learning; None: as the data set's recipe in common/data.py has it."""

    weighting: str = option("daw", "f(p) of Table 1; daw: a step at t*", choices=WEIGHTINGS)
    align: bool = option(True, "distribution alignment of --weighting daw, Eq. 12")
    threshold: float | None = option(None, "of --weighting fixed", low=0, below=1)
    stats_momentum: float = option(0.99, "m of Eq. 6 and of the means of Eq. 12", low=0, below=1)
    views: int = option(3, "3: UniMatch's; 1: one strong view, as FixMatch", choices=(1, 3))
    supervised: bool = option(False, "labeled images only")
    strong_labeled: bool = option(False, "with --supervised: the strong view of labeled images")
    backbone: str | None = option(None, "resnet50, resnet101, xception65, mobilenet_v2 or tiny")
    weights: str = option("default", "of the encoder: default, none, deep_stem or a file's path")
    crop: int | None = option(None, "training crop in pixels, 16 k + 1", low=16)
    batch_size: int | None = option(None, "labeled (and unlabeled) images a step, all GPUs", low=2)
    epochs: int | None = option(None, "passes over the unlabeled list", low=1)
    iterations: int | None = option(None, "optimizer steps, instead of --epochs", low=1)
    lr: float | None = option(None, "of the encoder; a recipe's grows with --batch-size", above=0)
    head_lr_multiplier: float | None = option(None, "of the rest: --lr times this", above=0)
    ohem: float | None = option(None, "OHEM's threshold; 15.6 % count anyway", low=0, below=1)
    weight_decay: float = option(1e-4, "of SGD", low=0)
    ema_decay: float = option(0.0, "evaluate an average of the weights; 0: off", low=0, below=1)
    seed: int = option(0, "of weights, sampling and augmentation", low=0)


def gaussian_mass(low, high, mean, std) -> Tensor:
    """Probability of [low, high] under a Gaussian; on [1/C, 1]: 1/alpha or 1/beta of Eq. 3, 4."""
    return torch.special.ndtr((high - mean) / std) - torch.special.ndtr((low - mean) / std)


def optimal_threshold(mu_pos, var_pos, mu_neg, var_neg, num_classes: int) -> Tensor:
    """t* of Eq. 11, 0-d float64: the confidence in [1/C, 1] at which g+ overtakes g-, or 1/C."""
    mu_pos, var_pos, mu_neg, var_neg = (torch.as_tensor(value, dtype=torch.float64)
                                        for value in (mu_pos, var_pos, mu_neg, var_neg))
    low = 1 / num_classes
    std_pos, std_neg = var_pos.sqrt(), var_neg.sqrt()
    alpha = 1 / gaussian_mass(low, 1, mu_pos, std_pos)
    beta = 1 / gaussian_mass(low, 1, mu_neg, std_neg)
    # g+ > g-  <=>  beta_1 p^2 + beta_2 p + beta_3 > 0
    beta_1 = var_pos - var_neg
    beta_2 = 2 * (mu_pos * var_neg - mu_neg * var_pos)
    log_ratio = torch.log(alpha * std_neg / (beta * std_pos))
    beta_3 = var_pos * mu_neg**2 - var_neg * mu_pos**2 + 2 * var_pos * var_neg * log_ratio
    root = (beta_2**2 - 4 * beta_1 * beta_3).sqrt()
    # The same root twice; the first form does not divide by beta_1, 0 for equal variances.
    crossing = torch.where(beta_2 > 0, -2 * beta_3 / (beta_2 + root),
                           (root - beta_2) / (2 * beta_1))
    inside = (crossing >= low) & (crossing <= 1)  # False for nan: equal Gaussians
    # Where g+ never overtakes g-, every step has E1 + E2 >= 1, and 1/C, all labels, has 1.
    return torch.where(inside, crossing, low)


def tradeoff(weight, mu_pos, var_pos, mu_neg, var_neg, num_classes: int) -> tuple[float, float]:
    """(E1, E2) of Eq. 7, 8 for `weight`: confidences [n] -> weights [n] in [0, 1]."""
    edges = torch.linspace(1 / num_classes, 1, 20001, dtype=torch.float64)
    weights = weight((edges[1:] + edges[:-1]) / 2)

    def expectation(mean: float, variance: float) -> float:
        mass = gaussian_mass(edges[:-1], edges[1:], mean, math.sqrt(variance))
        return float((weights * mass).sum() / mass.sum())

    return expectation(mu_neg, var_neg), 1 - expectation(mu_pos, var_pos)


def align_distribution(probs: Tensor, labeled_mean: Tensor, unlabeled_mean: Tensor) -> Tensor:
    """Eq. 12: probs [B, C, H, W] times E_l / E_u ([C] each), normalised over classes."""
    aligned = probs * (labeled_mean / unlabeled_mean).float().view(1, -1, 1, 1)
    return aligned / aligned.sum(dim=1, keepdim=True)


def pseudo_label_weight(confidence: Tensor, weighting: str, threshold) -> Tensor:
    """f(p) of Table 1, in [0, 1]. none: Pseudo-Label; power: AEL; fixed: FixMatch, UniMatch; daw:
    with t* as the threshold."""
    if weighting == "none":
        return torch.ones_like(confidence)
    if weighting == "power":
        return confidence**2
    return (confidence >= threshold).to(confidence.dtype)


def confidence_sums(probs: Tensor, label: Tensor) -> Tensor:
    """Sums for Eq. 5: probs [B, C, H, W], label [B, H, W] with 255 = ignore -> float64 [2, 4].

    Rows: right and wrong predictions. Columns: images that have such pixels, the sums over them of
    mean p and of mean p^2, pixels.
    """
    confidence, prediction = probs.max(dim=1)
    right, known = prediction == label, label != IGNORE
    chosen = torch.stack([right & known, ~right & known])
    confidence, pixels = confidence.double(), chosen.sum(dim=(2, 3))
    mean = (confidence * chosen).sum(dim=(2, 3)) / pixels.clamp(min=1)
    mean_square = (confidence**2 * chosen).sum(dim=(2, 3)) / pixels.clamp(min=1)
    columns = ((pixels > 0).double(), mean, mean_square, pixels.double())
    return torch.stack(columns, dim=-1).sum(dim=1)


def class_sums(probs: Tensor, mask: Tensor) -> Tensor:
    """For Eq. 12: sums of probs [B, C, H, W] over mask [B, H, W], and its pixels: [C + 1]."""
    sums = (probs.float() * mask[:, None]).sum(dim=(0, 2, 3))
    return torch.cat([sums, mask.sum()[None]]).double()


class Statistics(nn.Module):
    """Running mu+-, sigma+-^2 (Eq. 6) and class means (Eq. 12), float64; in checkpoints."""

    def __init__(self, num_classes: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        ones = torch.ones(2, dtype=torch.float64)
        self.register_buffer("mean", ones / num_classes)  # [mu+, mu-]
        self.register_buffer("variance", ones.clone())
        # E_l, E_u of Eq. 12: [2, C]
        self.register_buffer("class_mean", ones[:, None].repeat(1, num_classes) / num_classes)

    def update(self, labeled_probs: Tensor, label: Tensor, probs: Tensor, valid: Tensor) -> None:
        """Eq. 5, 6, 12 on the global batch: probabilities [B, C, H, W] of labeled, weak images."""
        classes = [class_sums(labeled_probs, label != IGNORE), class_sums(probs, valid)]
        sums = torch.cat([confidence_sums(labeled_probs, label), torch.stack(classes)], dim=1)
        sums = all_reduce_sum(sums.detach())  # of all ranks in one message: [2, 4 + C + 1]
        # Rows: right and wrong pixels in the first four columns, labeled and weak ones after them.
        images, mean_sum, square_sum, pixels = sums[:, :4].unbind(dim=1)
        mean = mean_sum / images.clamp(min=1)  # Eq. 5, of the images that have such pixels
        variance = (square_sum / images.clamp(min=1) - mean**2).clamp(min=0)
        variance = variance * pixels / (pixels - 1).clamp(min=1)  # unbiased, Eq. 6
        enough = pixels >= 10  # fewer say nothing about a distribution: it stays
        counted = sums[:, -1:]
        class_mean = sums[:, 4:-1] / counted.clamp(min=1)
        for old, new, known in ((self.mean, mean, enough), (self.variance, variance, enough),
                                (self.class_mean, class_mean, counted > 0)):
            averaged = torch.lerp(new, old, self.momentum)
            old.copy_(torch.where(known, averaged, old).clamp(min=1e-8))  # variances, E_u divide

    def gaussians(self) -> tuple:
        """mu+, sigma+^2, mu-, sigma-^2 and C: the arguments of `optimal_threshold`."""
        (mu_pos, mu_neg), (var_pos, var_neg) = self.mean, self.variance
        return mu_pos, var_pos, mu_neg, var_neg, self.class_mean.shape[1]


def make_views(batch: dict[str, Tensor], crop: int, photometry: Photometry) -> dict[str, Tensor]:
    """Weak crops, uint8 -> the normalised views of a step: weak, two strong ones with CutMix."""
    weak = to_float(batch["unlabeled"])
    views = {**batch, "labeled": normalize(batch["labeled"]), "weak": normalize(weak)}
    for view in ("strong_1", "strong_2"):
        strong = strong_augment(weak, photometry)
        boxes = cutmix_boxes(len(weak), crop, device=weak.device)
        views[view] = normalize(cutmix(boxes, strong, cutmix_partner(strong)))
        views[view + "_boxes"] = boxes
    return views


def supervised_loss(logits: Tensor, label: Tensor, ohem: float = 0.0) -> Tensor:
    """Eq. 1, over labeled pixels, or OHEM's: logits [B, C, H, W], label [B, H, W], 255 = ignore."""
    loss = F.cross_entropy(logits.float(), label.long(), ignore_index=IGNORE, reduction="none")
    total = hard_pixel_loss(loss, label, ohem) if ohem else loss.sum()
    # The average of the ranks' gradients is then that of the mean over the global batch's pixels.
    return total / mean_over_ranks((label != IGNORE).sum())


def weighted_loss(logits: Tensor, pseudo_label: Tensor, weight: Tensor, valid: Tensor) -> Tensor:
    """Eq. 2, a mean over valid pixels (weight 0 elsewhere): logits [B, C, H, W], rest [B, H, W]."""
    loss = F.cross_entropy(logits.float(), pseudo_label, reduction="none")
    return (loss * weight).sum() / mean_over_ranks(valid.sum())


def strong_loss(logits: Tensor, pseudo_label: Tensor, weight: Tensor, views: dict) -> Tensor:
    """Eq. 2 on one or both strong views, [B or 2B, ...]; in CutMix's boxes the partner's labels."""
    own = (pseudo_label, weight, views["valid"])
    partners = [cutmix_partner(part) for part in own]
    losses = []
    for view, logits_view in zip(("strong_1", "strong_2"), logits.split(len(weight))):
        boxes = views[view + "_boxes"]
        mixed = [cutmix(boxes, part, partner) for part, partner in zip(own, partners)]
        losses.append(weighted_loss(logits_view, *mixed))
    return sum(losses) / len(losses)


def daw_loss(network, views: dict, statistics: Statistics, weighting: str, threshold: float,
             align: bool, ohem: float, num_views: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    """A step, (L_s + L_u) / 2 of Eq. 1 and 13, and terms for the log. Updates the statistics.

    views: see `make_views`. threshold: of "fixed"; "daw" takes t*. Pseudo labels are the network's
    own, in training mode: labeled and weak images share batch statistics.
    """
    size, images = len(views["weak"]), torch.cat([views["labeled"], views["weak"]])
    if num_views == 1:  # FixMatch, Pseudo-Label
        logits, logits_strong = network(images), network(views["strong_1"])
    else:  # of the last `size`, the weak ones, also with channels dropped (p 0.5)
        logits, logits_perturbed = network(images, perturb=size)
        logits_strong = network(torch.cat([views["strong_1"], views["strong_2"]]))
    logits_labeled, logits_weak = logits.split([len(views["labeled"]), size])

    with torch.no_grad():
        probs = logits_weak.float().softmax(dim=1)
        labeled_probs = logits_labeled.float().softmax(dim=1)
        statistics.update(labeled_probs, views["label"], probs, views["valid"])
        if weighting == "daw":
            threshold = optimal_threshold(*statistics.gaussians())  # Eq. 11
            if align:
                probs = align_distribution(probs, *statistics.class_mean)  # Eq. 12
        confidence, pseudo_label = probs.max(dim=1)  # Eq. 13: both from the aligned prediction
        weight = pseudo_label_weight(confidence, weighting, threshold) * views["valid"]

    loss_sup = supervised_loss(logits_labeled, views["label"], ohem)  # Eq. 1
    loss_unsup = strong_loss(logits_strong, pseudo_label, weight, views)  # Eq. 13
    if num_views == 3:  # UniMatch's: two strong ones, and the weak one with perturbed features
        loss_perturbed = weighted_loss(logits_perturbed, pseudo_label, weight, views["valid"])
        loss_unsup = 0.5 * loss_unsup + 0.5 * loss_perturbed
    loss = 0.5 * (loss_sup + loss_unsup)  # as UniMatch; the paper writes their sum
    terms = {"loss": loss, "loss_sup": loss_sup, "loss_unsup": loss_unsup,
             "used": weight.sum() / mean_over_ranks(views["valid"].sum())}
    if "truth" in views:  # for the log only
        terms["used_accuracy"] = pixel_accuracy(pseudo_label, views["truth"], weight)
    return loss, terms


def describe(statistics: Statistics, threshold: float) -> dict[str, float]:
    """For the log: t*, the Gaussians, (E1, E2) of every weighting, and "shift", how far the mean
    predictions of Eq. 12 on labeled and unlabeled images are apart (total variation, in [0, 1])."""
    gaussians = [float(value) for value in statistics.gaussians()]  # read back from the device
    mu_pos, var_pos, mu_neg, var_neg, num_classes = gaussians
    t_star = optimal_threshold(*gaussians)
    line = {"t_star": t_star, "mu_pos": mu_pos, "mu_neg": mu_neg, "sigma_pos": math.sqrt(var_pos),
            "sigma_neg": math.sqrt(var_neg), "lowest": 1 / num_classes,
            "shift": statistics.class_mean.diff(dim=0).abs().sum() / 2}
    for name in WEIGHTINGS:
        cut = t_star if name == "daw" else threshold
        weight = partial(pseudo_label_weight, weighting=name, threshold=cut)
        line[f"E1_{name}"], line[f"E2_{name}"] = tradeoff(weight, *gaussians)
    return {name: round(float(value), 5) for name, value in line.items()}


# ---------------------------------------------------------------- training


def train(config: Config) -> None:
    rank, world_size, device = init_distributed(config.device)
    data = load_data(config)
    config = with_defaults(config, **data.recipe(config.batch_size, config.epochs),
                           amp=bf16_is_fast(device), output=f"runs/daw_{data.tag}_{config.seed}")
    require(config.supervised or not config.strong_labeled, "--strong-labeled needs --supervised")

    torch.manual_seed(config.seed)
    model = DeepLabV3Plus(config.backbone, data.info.num_classes, config.weights)
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
    statistics = Statistics(data.info.num_classes, config.stats_momentum).to(device)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule, "statistics": statistics}
    evaluated = model
    if config.ema_decay:
        evaluated = state["ema"] = make_ema(model)
    torch.manual_seed(config.seed + 1000 * rank)  # ranks augment differently
    checkpoint = Checkpoint(config.output, "daw", asdict(config), state)
    start = checkpoint.load()
    log = Log(checkpoint, start, config.batch_size * (1 if config.supervised else 2))
    loader = training_loader(data, config.crop, config.batch_size, config.seed, start,
                             config.iterations, device, not config.supervised, config.num_workers)

    scores = partial(evaluate, evaluated, data, config.eval_split, config.crop, device,
                     config.num_workers)
    milestones = Milestones(checkpoint, log, evaluated, scores)
    for step, batch in enumerate(loader, start + 1):
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        if config.supervised:
            images = to_float(batch["labeled"])
            if config.strong_labeled:
                images = strong_augment(images, data.info.photometry)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
                loss = supervised_loss(network(normalize(images)), batch["label"], config.ohem)
            terms = {"loss": loss}
        else:
            views = make_views(batch, config.crop, data.info.photometry)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
                loss, terms = daw_loss(network, views, statistics, config.weighting,
                                       config.threshold, config.align, config.ohem, config.views)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if config.ema_decay:
            update_ema(evaluated, model, min(1 - 1 / step, config.ema_decay))  # first a plain mean

        due = log.line_is_due(step) and not config.supervised
        log.step(step, terms, describe(statistics, config.threshold) if due else None)
        milestones.after(step)  # saves, leaves when told to, evaluates

    write_samples(evaluated.eval(), data, config.crop, device, checkpoint.folder / "samples.png")


def build_predictor(config: dict, num_classes: int, state: dict[str, Tensor]) -> nn.Module:
    """What common.evaluate and common.predict make of a checkpoint: images -> logits."""
    model = DeepLabV3Plus(config["backbone"], num_classes, random_weights_like(state))
    return load_strictly(model, state, "the checkpoint's weights")


if __name__ == "__main__":
    run_main(lambda: train(parse(Config, description=__doc__)))
