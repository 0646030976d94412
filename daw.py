"""DAW: Exploring the Better Weighting Function for Semi-supervised Semantic Segmentation (Sun et al., NeurIPS 2023).

Idea. A pseudo label is trusted by a weight f(p) of its confidence p. A wrong pseudo label that is used costs E1, a
right one that is thrown away costs E2. Fit the confidences of right and of wrong predictions on *labeled* pixels by
two truncated Gaussians g+ and g-; of all steps f(p) = 1[p >= t], the one at the point t* where g+ overtakes g-
minimises E1 + E2 (and of all f, where g+ and g- cross once). The threshold follows the network as it learns, nothing is
set by hand. Distribution alignment first rescales the predictions on unlabeled images so that their average agrees with
that on labeled ones.

    Eq. 1, 2    supervised loss, weighted loss on pseudo labels         supervised_loss, weighted_loss
    Eq. 3, 4    truncated Gaussians g+, g-                              truncated_gaussian_mass
    Eq. 5, 6    their means and variances, EMA                          batch_sums, Statistics
    Eq. 7-9     E1, E2                                                  tradeoff
    Eq. 10, 11  t*                                                      optimal_threshold
    Eq. 12      distribution alignment                                  align_distribution
    Eq. 13      the loss of a step                                      daw_loss

                      paper                      released code              here
    threshold t*      Eq. 11 with alpha, beta    without alpha, beta        Eq. 11
    t* not in [1/C,1] not said                   clamped: above 1, nothing  1/C: everything is used; see
    or no crossing                               is used; none: the last t* optimal_threshold
    mean, variance    per image, then averaged   pooled over the batch      per image (Eq. 5)
    start             mean 1/C, variance 1       mean 1/C, variance 1/2,    mean 1/C, variance 1
                                                 threshold 0.95
    few pixels        not said                   under 10: keep old values  under 10 in the global batch: keep old values
    several ranks     not said                   mean of each rank's        sums over ranks: equal to one process
    --grad-accum      -                          -                          part k of a batch sees the statistics of parts
                                                                            1..k; after the step they are the whole batch's
    alignment         E[q(x)]                    E[max q(x)] of the pixels  E[q(x)] (Eq. 12)
                                                 predicted as the class
    total loss        L_s + L_u                  (L_s + L_u) / 2            (L_s + L_u) / 2, as UniMatch
    pixel averages    over H x W of each image   over non-ignored pixels    over non-ignored pixels of the global batch
                                                 of each rank
    CutMix partner    not said                   a second unlabeled batch,  the neighbour in the global batch, with the
                                                 predicted in eval mode     pseudo label it has anyway
    perturbed decode  "channel dropout"          labeled and unlabeled      unlabeled only: the labeled half has no loss
    ResNet stem       not said                   three 3x3 convolutions     7x7, for torchvision's ImageNet weights
    PASCAL crop       513                        513                        321 (513 overfits with few labels): --crop
    precision         not said                   fp32                       bf16 autocast on GPUs that have it: --no-amp
    Sup.-only length  not said                   epochs of the labeled      as many steps as the semi-supervised runs
                                                 list
    evaluated model   not said                   raw and EMA, the better    the raw one; with --ema-decay the EMA

Commands
    python daw.py                                                    embedded data, a few minutes on a laptop
    python daw.py --dataset pascal --data-root VOC2012 --labeled 92  one GPU
    torchrun --nproc_per_node=8 daw.py --dataset pascal --data-root VOC2012 --labeled 92 --crop 513

Measured on the embedded data (24 labels, mIoU, three seeds; README): labeled only 51.7, --weighting none 58.1, fixed 54.5,
DAW without alignment 57.1, DAW 56.8, all labeled 71.7. PASCAL has not been run.

Baselines and ablations: --supervised (Sup.-only of Table 2), --weighting none | fixed | daw and --no-align (Table 4),
--weighting power (AEL in Table 1), --stats-momentum (Table 5). The first two rows of Table 4 keep UniMatch's three views,
as the paper does; Pseudo-Label and FixMatch of Table 2 are other methods' numbers.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, runtime
from common.data import IGNORE, load_data
from common.deeplab import DeepLabV3Plus
from common.files import write_atomically
from common.loading import class_pixels, training_loader
from common.ohem import hard_pixel_loss
from common.options import TrainingOptions, fill_from_recipe, option, parse, require
from common.run import Run
from common.runtime import pixel_counts

WEIGHTINGS = ("none", "fixed", "power", "daw")
MIN_PIXELS = 10  # fewer right (or wrong) pixels than this in a batch say nothing about their distribution


@dataclass
class Config(TrainingOptions):
    weighting: str = option("daw", "f(p) of Table 1: none (Pseudo-Label), fixed (step at --threshold: UniMatch), power (p^2: AEL) "
                                   "or daw (step at t*, Eq. 11)", choices=WEIGHTINGS)
    align: bool | None = option(None, "distribution alignment, Eq. 12; default: on with --weighting daw")
    threshold: float | None = option(None, "confidence threshold of --weighting fixed; default: the data set's recipe (0.95)")
    stats_momentum: float = option(0.99, "m of Eq. 6, for the Gaussians and for the means of the alignment (Table 5)")
    supervised: bool = option(False, "labeled images only (Sup.-only of Table 2)")
    strong_labeled: bool = option(False, "with --supervised: colour jitter, grayscale and blur on labeled images too")


# ================================================================ the method


def truncated_gaussian_mass(low, high, mean, std) -> Tensor:
    """Probability that a Gaussian puts on [low, high]; with low = 1/C, high = 1 it is 1/alpha (1/beta) of Eq. 3, 4."""
    return torch.special.ndtr((high - mean) / std) - torch.special.ndtr((low - mean) / std)


def optimal_threshold(mu_pos, var_pos, mu_neg, var_neg, num_classes: int):
    """t* of Eq. 11: the confidence in [1/C, 1] at which g+ overtakes g- as p grows.

    Numbers give a float; 0-d tensors give a float64 tensor on their device, without a host sync.

    The printed root divides by beta_1, which is 0 for equal variances. Where beta_2 > 0 its other form,
    -2 beta_3 / (beta_2 + sqrt(beta_2^2 - 4 beta_1 beta_3)), is the same number and becomes the linear root by itself.
    Where g+ nowhere overtakes g- in [1/C, 1], using every pseudo label (t* = 1/C) and using none are the best steps,
    equally good: E1 + E2 = 1 for both, as g+ and g- each integrate to one. We then use every label.
    """
    given = (mu_pos, var_pos, mu_neg, var_neg)
    mu_pos, var_pos, mu_neg, var_neg = (torch.as_tensor(value, dtype=torch.float64) for value in given)
    low = 1.0 / num_classes
    std_pos, std_neg = var_pos.sqrt(), var_neg.sqrt()
    alpha = 1 / truncated_gaussian_mass(low, 1.0, mu_pos, std_pos)
    beta = 1 / truncated_gaussian_mass(low, 1.0, mu_neg, std_neg)
    # g+ > g-  <=>  beta_1 p^2 + beta_2 p + beta_3 > 0
    beta_1 = var_pos - var_neg
    beta_2 = 2 * (mu_pos * var_neg - mu_neg * var_pos)
    beta_3 = (
        var_pos * mu_neg**2 - var_neg * mu_pos**2 + 2 * var_pos * var_neg * torch.log(alpha * std_neg / (beta * std_pos))
    )
    root = (beta_2**2 - 4 * beta_1 * beta_3).sqrt()  # nan without a crossing
    crossing = torch.where(beta_2 > 0, -2 * beta_3 / (beta_2 + root), (root - beta_2) / (2 * beta_1))
    inside = (crossing >= low) & (crossing <= 1)  # False for nan
    threshold = torch.where(inside, crossing, torch.full_like(crossing, low))
    return threshold if any(isinstance(value, Tensor) for value in given) else float(threshold)


def tradeoff(weight, mu_pos: float, var_pos: float, mu_neg: float, var_neg: float, num_classes: int) -> tuple[float, float]:
    """(E1, E2) of Eq. 7, 8 for a weighting `weight`: confidences [n] -> weights [n] in [0, 1].

    Each of 20,000 cells of [1/C, 1] counts with its exact Gaussian mass and the weight at its middle.
    """
    edges = torch.linspace(1 / num_classes, 1, 20001, dtype=torch.float64)
    weights = torch.as_tensor(weight((edges[1:] + edges[:-1]) / 2), dtype=torch.float64)

    def expectation(mean: float, variance: float) -> float:
        mass = truncated_gaussian_mass(edges[:-1], edges[1:], mean, math.sqrt(variance))
        return float((weights * mass).sum() / mass.sum())

    return expectation(mu_neg, var_neg), 1 - expectation(mu_pos, var_pos)


def align_distribution(probs: Tensor, labeled_mean: Tensor, unlabeled_mean: Tensor) -> Tensor:
    """DA of Eq. 12: probs [B, C, ...] times E_l / E_u ([C] each), normalised to sum to one over classes."""
    ratio = (labeled_mean / unlabeled_mean).to(probs.dtype)
    aligned = probs * ratio.view(1, -1, *[1] * (probs.dim() - 2))
    return aligned / aligned.sum(dim=1, keepdim=True)


def pseudo_label_weight(confidence: Tensor, weighting: str, threshold) -> Tensor:
    """f(p) of Table 1 for confidences of any shape, in [0, 1]."""
    if weighting == "none":
        return torch.ones_like(confidence)
    if weighting == "power":
        return confidence**2
    return (confidence >= threshold).to(confidence.dtype)


def confidence_sums(probs: Tensor, label: Tensor) -> Tensor:
    """Sums for Eq. 5 over labeled images: probs [B, C, H, W], label [B, H, W] with 255 = ignore.

    Returns float64 [2, 4], rows for right and wrong predictions: images that have such pixels, the sum over these images
    of the mean of p, the sum of the mean of p^2, pixels.
    """
    confidence, prediction = probs.max(dim=1)
    right, seen = prediction == label, label != IGNORE
    chosen = torch.stack([right & seen, ~right & seen])
    confidence = confidence.double()
    pixels = chosen.sum(dim=(2, 3))
    means = [(power * chosen).sum(dim=(2, 3)) / pixels.clamp(min=1) for power in (confidence, confidence.square())]
    return torch.stack([(pixels > 0).double(), *means, pixels.double()], dim=-1).sum(dim=1)


def class_sums(probs: Tensor, counted: Tensor) -> Tensor:
    """Sums for the expectations of Eq. 12: q(x) per class over the pixels of `counted` (bool [B, H, W]), and their number.

    probs [B, C, H, W]; returns float64 [C + 1].
    """
    return torch.cat([(probs * counted.unsqueeze(1)).sum(dim=(0, 2, 3)), counted.sum().view(1)]).double()


def batch_sums(labeled_probs: Tensor, label: Tensor, unlabeled_probs: Tensor, valid: Tensor) -> Tensor:
    """Both of the above as one float64 [2, 4 + C + 1], which adds up over parts of a batch and over ranks.

    Columns 0-3: `confidence_sums`, rows right and wrong. The others: `class_sums`, rows labeled and unlabeled.
    """
    classes = torch.stack([class_sums(labeled_probs, label != IGNORE), class_sums(unlabeled_probs, valid)])
    return torch.cat([confidence_sums(labeled_probs, label), classes], dim=1)


class Statistics(nn.Module):
    """The running statistics that a checkpoint keeps: mu+-, sigma+-^2 (Eq. 6) and the class means of Eq. 12."""

    def __init__(self, num_classes: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        ones = torch.ones(2, dtype=torch.float64)
        self.register_buffer("mean", ones / num_classes)  # [mu+, mu-]
        self.register_buffer("variance", ones.clone())  # [sigma+^2, sigma-^2]
        self.register_buffer("class_mean", torch.full((2, num_classes), 1 / num_classes, dtype=torch.float64))

    def empty_sums(self) -> Tensor:
        """The `batch_sums` of no image at all."""
        return self.class_mean.new_zeros(2, self.class_mean.shape[1] + 5)

    def after(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(mean [2], variance [2], class_mean [2, C]) after a batch with these `batch_sums`; nothing is stored."""
        images, mean_sum, square_sum, pixels = sums[:, :4].unbind(dim=1)
        mean = mean_sum / images.clamp(min=1)  # Eq. 5
        variance = (square_sum / images.clamp(min=1) - mean**2).clamp(min=0)
        variance = variance * pixels / (pixels - 1).clamp(min=1)  # unbiased, Eq. 6
        enough = pixels >= MIN_PIXELS
        class_sum, counted = sums[:, 4:-1], sums[:, -1:]
        class_mean = class_sum / counted.clamp(min=1)
        return (
            torch.where(enough, torch.lerp(mean, self.mean, self.momentum), self.mean),
            torch.where(enough, torch.lerp(variance, self.variance, self.momentum), self.variance).clamp(min=1e-8),
            torch.where(counted > 0, torch.lerp(class_mean, self.class_mean, self.momentum), self.class_mean).clamp(min=1e-8),
        )

    def update(self, sums: Tensor) -> None:
        """Eq. 6, once a step."""
        for buffer, value in zip((self.mean, self.variance, self.class_mean), self.after(sums)):
            buffer.copy_(value)


def supervised_loss(logits: Tensor, label: Tensor, ohem: float = 0.0) -> Tensor:
    """Sum of the cross entropy over labeled pixels, or hard ones (`ohem`): logits [B, C, H, W], label [B, H, W] with 255 = ignore."""
    if ohem:
        return hard_pixel_loss(F.cross_entropy(logits.float(), label.long(), ignore_index=IGNORE, reduction="none"), label, ohem)
    return F.cross_entropy(logits.float(), label.long(), ignore_index=IGNORE, reduction="sum")


def weighted_loss(logits: Tensor, pseudo_label: Tensor, weight: Tensor) -> Tensor:
    """Sum over pixels of f(p) x cross entropy (Eq. 2): logits [B, C, H, W], pseudo_label and weight [B, H, W]."""
    return (F.cross_entropy(logits.float(), pseudo_label, reduction="none") * weight).sum()


# ================================================================ training


def make_views(part: dict[str, Tensor], config: Config, blur: tuple[float, float]) -> dict[str, Tensor]:
    """Weak crops as the loader gives them -> everything a step needs that does not depend on the network."""
    labeled = augment.to_float(part["labeled"])
    if config.strong_labeled:
        labeled = augment.strong_augment(labeled, blur_sigma=blur)
    views = {"labeled": augment.normalize(labeled), "label": part["label"]}
    if config.supervised:
        return views
    weak = augment.to_float(part["unlabeled"])
    views |= {"weak": augment.normalize(weak), "valid": part["valid"]}
    if "truth" in part:
        views["truth"] = part["truth"]
    neighbour_valid = runtime.roll_global_batch(part["valid"])
    for view in ("strong_1", "strong_2"):
        strong = augment.strong_augment(weak, blur_sigma=blur)
        boxes = augment.cutmix_boxes(len(weak), config.crop, device=weak.device)
        views[view] = augment.normalize(augment.cutmix(boxes, strong, runtime.roll_global_batch(strong)))
        views[view + "_boxes"] = boxes
        views[view + "_valid"] = augment.cutmix(boxes, part["valid"], neighbour_valid)
    return views


def train(config: Config) -> dict:
    """Train, evaluate and save as `config` says; returns the last evaluation."""
    context = runtime.start(config.device)
    data = load_data(config, context)
    images_per_label = 1 if config.supervised else 2
    fill_from_recipe(config, "daw", data, context, images_per_label)
    if config.threshold is None:
        config.threshold = data.info.threshold
    if config.align is None:
        config.align = config.weighting == "daw"
    require(0 <= config.stats_momentum < 1, f"--stats-momentum must lie in [0, 1), not {config.stats_momentum}")
    require(config.supervised or not config.strong_labeled, "--strong-labeled is for --supervised: the Gaussians of the "
            "other methods are those of weakly augmented labeled images")
    require(config.supervised or bool(data.unlabeled), "no unlabeled image is left: add --supervised")

    runtime.seed_everything(config.seed)
    model = build_model(config, data.info.num_classes)
    network = runtime.wrap(model, config, context)
    optimizer = torch.optim.SGD(model.parameter_groups(config.lr, config.head_lr_multiplier), momentum=config.momentum,
                                weight_decay=config.weight_decay)
    statistics = Statistics(data.info.num_classes, config.stats_momentum).to(context.device)
    state = {"model": model, "optimizer": optimizer, "statistics": statistics}
    if config.ema_decay:
        state["ema"] = runtime.WeightAverage(model, config.ema_decay)
    runtime.seed_everything(config.seed + 1000 * context.rank)  # ranks augment differently

    run = Run("daw", config, context, state, images_per_step=config.batch_size * images_per_label)
    start = run.begin()
    labeled_pixels = class_pixels(data)
    loader = training_loader(data, config, context, start, config.iterations, unlabeled=not config.supervised)

    for iteration, batch in enumerate(loader, start):
        runtime.poly_lr(optimizer, iteration, config.iterations)
        parts = [make_views(part, config, data.info.blur) for part in runtime.split_batch(batch, config.grad_accum, context.device)]
        counts = pixel_counts(parts)
        observed, logged = statistics.empty_sums(), {}
        for number, views in enumerate(parts):
            last = number == len(parts) - 1
            with runtime.no_sync_unless(last, network), runtime.autocast(config, context.device):
                if config.supervised:
                    loss = supervised_loss(network(views["labeled"]), views["label"], config.ohem) / counts["label"]
                    terms = {"loss": loss}
                else:
                    loss, terms, observed = daw_loss(network, views, counts, statistics, observed, config)
            with runtime.no_sync_unless(last, network):
                loss.backward()
            logged = {name: value.detach() + logged.get(name, 0.0) for name, value in terms.items()}
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        statistics.update(observed)
        if config.ema_decay:
            state["ema"].update(iteration)

        run.log(iteration, logged, slow=None if config.supervised else lambda means: report(statistics, means, config))
        if run.should_evaluate(iteration):
            predict = predictor(run.evaluated_model, config)
            run.note_results(iteration, run.evaluate(predict, data, getattr(data, config.eval_split), labeled_pixels))
        run.end_of_step(iteration)

    run.write_samples(predictor(run.evaluated_model, config), data)
    if context.is_main:
        plot_distributions(run.folder)
    return run.last


def daw_loss(network, views: dict, counts: dict, statistics: Statistics, observed: Tensor, config: Config):
    """One part of a batch through Eq. 1-13: (loss, terms for the log, `batch_sums` observed so far in this step)."""
    size = len(views["weak"])
    logits, logits_perturbed = network(torch.cat([views["labeled"], views["weak"]]), perturb=size)
    logits_strong = network(torch.cat([views["strong_1"], views["strong_2"]])).chunk(2)
    logits_labeled, logits_weak = logits.split([len(logits) - size, size])

    with torch.no_grad():
        labeled_probs, weak_probs = logits_labeled.float().softmax(dim=1), logits_weak.float().softmax(dim=1)
        observed = observed + runtime.all_reduce_sum(batch_sums(labeled_probs, views["label"], weak_probs, views["valid"]))
        mean, variance, class_mean = statistics.after(observed)
        threshold = config.threshold
        if config.weighting == "daw":
            threshold = optimal_threshold(mean[0], variance[0], mean[1], variance[1], weak_probs.shape[1])  # Eq. 11
        if config.align:
            weak_probs = align_distribution(weak_probs, *class_mean)  # Eq. 12
        confidence, pseudo_label = weak_probs.max(dim=1)  # Eq. 13: both from the aligned prediction
        weight = pseudo_label_weight(confidence, config.weighting, threshold) * views["valid"]
        label_of_neighbour, weight_of_neighbour = runtime.roll_global_batch(pseudo_label), runtime.roll_global_batch(weight)

    loss_sup = supervised_loss(logits_labeled, views["label"], config.ohem) / counts["label"]  # Eq. 1
    loss_perturbed = weighted_loss(logits_perturbed, pseudo_label, weight) / counts["valid"]
    loss_strong = []
    for view, logits_view in zip(("strong_1", "strong_2"), logits_strong):
        boxes = views[view + "_boxes"]
        mixed_label = augment.cutmix(boxes, pseudo_label, label_of_neighbour)
        mixed_weight = augment.cutmix(boxes, weight, weight_of_neighbour)
        loss_strong.append(weighted_loss(logits_view, mixed_label, mixed_weight) / counts[view + "_valid"])
    loss_unsup = 0.5 * (sum(loss_strong) / 2) + 0.5 * loss_perturbed  # Eq. 13 on UniMatch's three views
    loss = 0.5 * (loss_sup + loss_unsup)

    terms = {"loss": loss, "loss_sup": loss_sup, "loss_unsup": loss_unsup, "used": weight.sum() / counts["valid"]}
    if "truth" in views:  # for the log only
        known = weight * (views["truth"] != IGNORE)
        terms |= {"used_known": known.sum(), "used_right": (known * (pseudo_label == views["truth"])).sum()}
    return loss, terms, observed


def report(statistics: Statistics, means: dict[str, float], config: Config) -> dict[str, float]:
    """For the log: t*, the Gaussians, E1 and E2 of every weighting of Table 1, and how many used pseudo labels are right."""
    (mu_pos, mu_neg), (var_pos, var_neg) = statistics.mean.tolist(), statistics.variance.tolist()
    gaussians = (mu_pos, var_pos, mu_neg, var_neg, statistics.class_mean.shape[1])
    t_star = optimal_threshold(*gaussians)
    line = {"t_star": t_star, "mu_pos": mu_pos, "mu_neg": mu_neg, "sigma_pos": var_pos**0.5, "sigma_neg": var_neg**0.5,
            "lowest": 1 / gaussians[-1]}
    for name in WEIGHTINGS:
        step = t_star if name == "daw" else config.threshold
        line[f"E1_{name}"], line[f"E2_{name}"] = tradeoff(lambda p: pseudo_label_weight(p, name, step), *gaussians)
    if means.get("used_known"):
        line["used_accuracy"] = means["used_right"] / means["used_known"]
    return {name: round(value, 5) for name, value in line.items()}


def build_model(config: Config, num_classes: int) -> nn.Module:
    return DeepLabV3Plus(config.backbone, num_classes, config.weights)


def predictor(model: nn.Module, config: Config):
    """images [B, 3, H, W], normalised -> logits [B, C, H, W]."""
    return model.eval()


def plot_distributions(folder: Path) -> None:
    """distributions.png from metrics.jsonl, the paper's Figures 2 and 4; nothing if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "t_star" in line]
    if not lines:
        return
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    over_time, *snapshots = figure.subplots(1, 3)
    steps = [line["iteration"] for line in lines]
    for sign, label, colour in (("pos", "right: $\\mu^+ \\pm \\sigma^+$", "tab:green"), ("neg", "wrong: $\\mu^- \\pm \\sigma^-$", "tab:red")):
        mean, sigma = ([line[f"{name}_{sign}"] for line in lines] for name in ("mu", "sigma"))
        over_time.plot(steps, mean, color=colour, label=label)
        over_time.fill_between(steps, [m - s for m, s in zip(mean, sigma)], [m + s for m, s in zip(mean, sigma)], color=colour, alpha=0.15)
    over_time.plot(steps, [line["t_star"] for line in lines], "k--", label="$t^*$")
    over_time.set(xlabel="iteration", ylabel="confidence", ylim=(0, 1.05))
    over_time.legend()
    for axes, line in zip(snapshots, (lines[0], lines[-1])):
        p = torch.linspace(line["lowest"], 1, 400)
        for sign, colour in (("pos", "tab:green"), ("neg", "tab:red")):
            density = torch.exp(-((p - line[f"mu_{sign}"]) ** 2) / (2 * line[f"sigma_{sign}"] ** 2))
            axes.plot(p, density / torch.trapezoid(density, p), color=colour, label="$g^+$" if sign == "pos" else "$g^-$")
        axes.axvline(line["t_star"], color="black", linestyle="--", label="$t^*$")
        axes.set(xlabel="confidence", title=f"iteration {line['iteration']}")
        axes.legend()
    write_atomically(folder / "distributions.png", lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def main() -> None:
    train(parse(Config, description=__doc__))


if __name__ == "__main__":
    runtime.run_main(main)
