"""POS + MEO: Two Losses, One Goal: Balancing Conflict Gradients for Semi-supervised Semantic Segmentation (Sun et al., ICCV 2025).

Idea. The supervised and the unsupervised loss are summed with equal weights by everyone, but their gradients g_s and g_u
often conflict: a step along (g_s + g_u) / 2 may make one of the losses worse. POS takes the shortest vector of the segment
between g_s and g_u instead (the minimum-norm point of MGDA): to first order no step along it harms either loss. It leans
towards the shorter gradient and is itself short; MEO gives it the length of the uniform step back.

    Eq. 1-3     the losses of the baselines           supervised_loss, pseudo_labels, consistency_loss
    Eq. 4       uniform and fixed weights             strategy_weights
    Eq. 5, 6    minimum-norm weights (POS)            minimum_norm_weights; pareto_weights on two vectors
    Eq. 13      magnitude enhancement (MEO)           magnification; integrate_gradients on two vectors
    Fig. 1, 3   conflict, norms, alpha over training  gradient_statistics, plot_gradients
    Fig. 5      loss and mIoU around the weights      landscape

                      paper                          here (the authors released no code)
    alpha             Eq. 6, in [0, 1]               OUR ADDITION: in [0.2, 0.8], and outside only as far as one loss would be
                                                     harmed otherwise. --cap 1 is Eq. 6, which collapses on the embedded data
    parameters        "gradients"                    of all trainable parameters, encoder and head, as one vector
    zero gradient     not said                       on either side (no confident pixel): the uniform step
    equal gradients   not said                       1/2, 1/2
    h = 0 in Eq. 13   not said                       a zero step, where |h| <= 1e-6 (|g_s| + |g_u|)
    fixed weights     2:1, 1:2                       scaled to sum to one, as Eq. 4 demands
    pixel averages    over H x W of each image       over non-ignored pixels of the global batch
    gamma, Eq. 2      c > gamma                      c >= gamma, as UniMatch
    optimizer         not said                       sees h as its gradient: weight decay, momentum, the head's larger learning rate
                                                     and AdamW's scaling come after; for AdamW only changes of |h| count
    several ranks     not said                       alpha from the gradients of the global batch: they meet in one all-reduce
    batch norm        of the baseline                of the baseline: forward passes for both losses together, then two backward
    "covariance"      0.110 and 1.584 (Fig. 3a)      variance of |g_u| and of |g_s| over the run

    UniMatch V1       released code                  here
    CutMix partner    a second unlabeled batch,      the neighbour in the global batch, with the pseudo label it has anyway
                      predicted in eval mode
    perturbed decode  labeled and unlabeled          unlabeled only: the labeled half has no loss
    ResNet stem       three 3x3 convolutions         7x7, for torchvision's ImageNet weights
    UniMatch V2
    CutMix partner    the batch reversed             the neighbour in the global batch
    undropped images  floor(half) of a rank's batch  each with probability 1/2, so that one image a GPU trains the same thing
    position encoding resampled with offset 0.1      resampled by size (common/dpt.py)
    evaluated model   raw and EMA                    the EMA
    both
    pixel averages    of each rank                   of the global batch
    precision         fp32                           bf16 autocast on GPUs that have it: --no-amp
    learning rate     the same for any batch         linear in --batch-size unless given

Commands
    python pos_meo.py                                                     embedded data, some minutes on a laptop
    python pos_meo.py --baseline unimatch_v2                              with a tiny vision transformer
    python pos_meo.py --dataset pascal --data-root VOC2012 --labeled 92   one GPU
    torchrun --nproc_per_node=8 pos_meo.py --dataset pascal --data-root VOC2012 --labeled 92 --baseline unimatch_v2
    python pos_meo.py --landscape runs/a/latest.pt,runs/b/latest.pt       Figure 5

Measured on the embedded data (24 labels, mIoU, three seeds; README): V1 uniform 53.8, fixed 2:1 53.0, 1:2 55.1, POS 54.4,
POS + MEO 55.4; V2 uniform 53.2, POS + MEO 52.0. PASCAL has not been run.

Baselines and ablations: --strategy uniform | pos (without MEO) | pos_meo (Table 4), --strategy fixed --fixed-weights 1 2
(Table 5), --cap.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, runtime
from common.data import IGNORE, load_data
from common.deeplab import DeepLabV3Plus
from common.dpt import DPT
from common.evaluate import evaluate, load_model
from common.files import write_atomically, write_json
from common.landscape import save, scan, table
from common.loading import class_pixels, evaluation_loader, training_loader
from common.ohem import hard_pixel_loss
from common.options import TrainingOptions, fill_from_recipe, option, parse, require
from common.run import Run
from common.runtime import pixel_counts

BASELINES = ("unimatch_v1", "unimatch_v2")
STRATEGIES = ("uniform", "pos", "pos_meo", "fixed")
PARETO = ("pos", "pos_meo")  # these need both gradients in every step
SUP, UNSUP = 0, 1  # g_s and g_u wherever something has two rows
STATIONARY = 1e-6  # a Pareto step shorter than this share of |g_s| + |g_u| is rounding error
LANDSCAPE_DISTANCES = [step / 10 for step in range(-10, 11)]
LANDSCAPE_DIRECTIONS = 3
LANDSCAPE_BATCHES = 6
CHUNK = 2**18  # of a gradient, for inner products: float64 copies stay in a CPU's cache

# UniMatch V2's recipe where it differs from the data set's (UniMatch V1's).
UNIMATCH_V2 = {
    "pascal": {"backbone": "dinov2_s", "crop": 518, "epochs": 60, "batch_size": 16, "lr": 5e-6, "head_lr_multiplier": 40},
    "cityscapes": {"backbone": "dinov2_s", "crop": 798, "epochs": 180, "lr": 5e-6, "head_lr_multiplier": 40},
    "coco": {"backbone": "dinov2_s", "crop": 518, "epochs": 20, "batch_size": 16, "lr": 5e-6, "head_lr_multiplier": 40},
    "folder": {"backbone": "dinov2_s", "crop": 518, "epochs": 60, "batch_size": 16, "lr": 5e-6, "head_lr_multiplier": 40},
    "shapes": {"backbone": "tiny_vit", "lr": 2e-4, "head_lr_multiplier": 5},
}


@dataclass
class Config(TrainingOptions):
    baseline: str = option("unimatch_v1", "what the gradients are of: UniMatch V1 (DeepLabv3+) or V2 (ViT, DPT head, EMA teacher)",
                           choices=BASELINES)
    strategy: str = option("pos_meo", "how they are integrated: uniform (Eq. 4 with 1/2, 1/2), pos (Eq. 6), pos_meo (Eq. 13) or fixed",
                           choices=STRATEGIES)
    fixed_weights: tuple[float, float] | None = option(None, "alpha_s and alpha_u of --strategy fixed, scaled to sum to one (Table 5)",
                                                       names=("SUP", "UNSUP"))
    cap: float = option(0.8, "POS gives no loss a larger weight than this unless a smaller one harms it; 1: Eq. 6 as it is, which collapses on "
                             "the embedded data")
    threshold: float | None = option(None, "gamma of Eq. 2; default: the data set's recipe (0.95)")
    measure: bool = option(True, "with uniform and fixed, too: both gradients at every logged step, for Figures 1 and 3")
    ema_decay: float | None = option(None, "decay of the averaged weights: the teacher of UniMatch V2 (default 0.996); V1 learns from itself "
                                           "and only evaluates them (default 0: off)")
    weight_decay: float | None = option(None, "default: 1e-4 for V1's SGD, 0.01 for V2's AdamW")
    landscape: str | None = option(None, "do not train: loss and mIoU around the weights of this checkpoint, or of several, separated by "
                                         "commas, into --output (Figure 5)")


# ================================================================ the method


def inner_products(g_sup: Tensor, g_unsup: Tensor) -> Tensor:
    """[[<g_s, g_s>, <g_s, g_u>], [<g_u, g_s>, <g_u, g_u>]] of flat gradients [P], float64 [2, 2].

    All of the method follows from these three numbers. In float64 the products of float32 numbers are exact, so that
    they can be subtracted from each other where gradients are nearly equal or opposite.
    """
    sums = g_sup.new_zeros(3, dtype=torch.float64)
    chunk = CHUNK if g_sup.device.type == "cpu" else 64 * CHUNK  # few launches on a GPU
    for a, b in zip(g_sup.split(chunk), g_unsup.split(chunk)):
        a, b = a.double(), b.double()
        sums += torch.stack([a.dot(a), a.dot(b), b.dot(b)])
    return torch.stack([sums[:2], sums[1:]])


def minimum_norm_weights(products: Tensor, cap: float = 1.0) -> Tensor:
    """[alpha_s, alpha_u] from `inner_products`, float64 [2]: Eq. 6, with neither weight above `cap` unless that does harm.

    The minimum on the whole line through g_s and g_u lies at <g_s - g_u, g_s> / |g_s - g_u|^2; the two other cases of
    Eq. 6 are those where this is above 1 or below 0. Equal gradients get 1/2, 1/2, and so does a pair of which one is zero:
    its minimum-norm point is that zero, and a batch without one confident pixel would stop the supervised loss.

    `cap` is ours. A student that is its own teacher can shrink g_u by agreeing with itself; the smaller g_u, the more
    Eq. 6 listens to it alone, until nothing of the labels is left. Weights between those of Eq. 6 and 1/2 harm no loss
    either, as long as <h, g_s> and <h, g_u> are not negative: `harmless` is where they are.
    """
    ss, su, uu = products[SUP, SUP], products[SUP, UNSUP], products[UNSUP, UNSUP]
    distance = ss - 2 * su + uu
    alpha_unsup = ((ss - su) / distance).clamp(0, 1)  # Eq. 6
    conflict = su.clamp(max=0)
    harmless = -conflict / (uu - conflict), ss / (ss - conflict)  # alpha_u where h is orthogonal to g_u, to g_s
    alpha_unsup = alpha_unsup.clamp(1 - cap, cap).clamp(*harmless)
    undecided = (distance <= 0) | (ss == 0) | (uu == 0)
    alpha_unsup = torch.where(undecided, 0.5, alpha_unsup)
    return torch.stack([1 - alpha_unsup, alpha_unsup])


def magnification(products: Tensor, weights: Tensor) -> Tensor:
    """lambda of Eq. 13, |(g_s + g_u) / 2| / |alpha_s g_s + alpha_u g_u|; 0 at a Pareto-stationary point. 0-d."""
    taken, uniform = length(products, weights), length(products, torch.full_like(weights, 0.5))
    stationary = taken <= STATIONARY * products.diagonal().sqrt().sum()
    return torch.where(stationary, 0.0, uniform / taken)  # Eq. 13


def length(products: Tensor, weights: Tensor) -> Tensor:
    """|w_s g_s + w_u g_u|, 0-d."""
    return (weights @ products @ weights).clamp(min=0).sqrt()


def pareto_weights(g_sup: Tensor, g_unsup: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha_s, alpha_u) of Eq. 6 for flat gradients [P]: 0-d float64 tensors on their device, without a host sync."""
    return tuple(minimum_norm_weights(inner_products(g_sup, g_unsup)).unbind())


def integrate_gradients(g_sup: Tensor, g_unsup: Tensor, magnitude_enhancement: bool = True) -> Tensor:
    """The step h of POS (Eq. 5) with the length of the uniform step (MEO, Eq. 13): flat gradients [P] -> [P].

    <h, g_s> and <h, g_u> are not negative. At a Pareto-stationary point, where h is zero, MEO leaves a zero step.
    """
    products = inner_products(g_sup, g_unsup)
    weights = strategy_weights(products, "pos_meo" if magnitude_enhancement else "pos").to(g_sup.dtype)
    return weights[SUP] * g_sup + weights[UNSUP] * g_unsup


def strategy_weights(products: Tensor, strategy: str, fixed_weights: tuple[float, float] | None = None, cap: float = 1.0) -> Tensor:
    """What g_s and g_u are multiplied with before they are added, float64 [2]; fixed weights are scaled to sum to one."""
    if strategy == "fixed":  # filled on the device: a tensor made of Python numbers would be copied there
        return torch.stack([torch.full_like(products[0, 0], weight / sum(fixed_weights)) for weight in fixed_weights])
    if strategy == "uniform":
        return torch.full_like(products[0], 0.5)
    weights = minimum_norm_weights(products, cap)
    return weights * magnification(products, weights) if strategy == "pos_meo" else weights


# ================================================================ two gradients of one step


class Gradients:
    """g_s and g_u of all trainable parameters: flat float32 [2, P], into which backward passes write directly.

    Every .grad is a view of a row, so autograd adds into the row in place and no gradient is copied. There is no DDP: it
    expects one backward pass for each forward pass and would average in both. Ranks add up what they have over all parts
    and meet in one collective a step, after which both gradients are the global batch's on every rank.
    """

    def __init__(self, model: nn.Module, rows: int):
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        sizes = [parameter.numel() for parameter in self.parameters]
        self.flat = self.parameters[0].new_zeros(rows, sum(sizes))
        # In the parameters' own memory format, as the optimizer's fused loops want it.
        self.slots = [[piece.as_strided(parameter.shape, parameter.stride()) for parameter, piece in zip(self.parameters, row.split(sizes))]
                      for row in self.flat]

    def backward(self, loss: Tensor, row: int, retain_graph: bool = False) -> None:
        """Add the gradient of `loss` to a row."""
        for parameter, view in zip(self.parameters, self.slots[row]):
            parameter.grad = view
        loss.backward(retain_graph=retain_graph)

    def average_over_ranks(self, rows: int) -> None:
        if runtime.world_size() > 1:
            runtime.all_reduce_sum(self.flat[:rows]).div_(runtime.world_size())

    def integrate(self, weights: Tensor) -> None:
        """Leave weights[0] g_s + weights[1] g_u as the parameters' gradient."""
        weights = weights.to(self.flat.dtype)
        self.flat[SUP].mul_(weights[SUP]).addcmul_(self.flat[UNSUP], weights[UNSUP])
        for parameter, view in zip(self.parameters, self.slots[SUP]):
            parameter.grad = view


# ================================================================ the baselines


def supervised_loss(logits: Tensor, label: Tensor, ohem: float = 0.0) -> Tensor:
    """Sum of the cross entropy over labeled pixels (Eq. 1), or hard ones (`ohem`): logits [B, C, H, W], label [B, H, W] with 255 = ignore."""
    if ohem:
        return hard_pixel_loss(F.cross_entropy(logits.float(), label.long(), ignore_index=IGNORE, reduction="none"), label, ohem)
    return F.cross_entropy(logits.float(), label.long(), ignore_index=IGNORE, reduction="sum")


def pseudo_labels(logits: Tensor, valid: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Eq. 2 from the teacher's logits [B, C, H, W]: (pseudo label, 1 where it is used and 0 elsewhere), each [B, H, W]."""
    confidence, pseudo_label = logits.float().softmax(dim=1).max(dim=1)
    return pseudo_label, ((confidence >= threshold) & valid).float()


def consistency_loss(logits: Tensor, pseudo_label: Tensor, used: Tensor) -> Tensor:
    """Sum of the cross entropy with the used pseudo labels (Eq. 3): logits [B, C, H, W], the others [B, H, W]."""
    return (F.cross_entropy(logits.float(), pseudo_label, reduction="none") * used).sum()


def strong_loss(logits: Tensor, pseudo_label: Tensor, used: Tensor, views: dict, counts: dict) -> Tensor:
    """Eq. 3 on both strong views, logits [2B, C, H, W], averaged; where CutMix pasted, with the neighbour's pseudo label."""
    neighbour_label, neighbour_used = runtime.roll_global_batch(pseudo_label), runtime.roll_global_batch(used)
    losses = []
    for view, logits_view in zip(("strong_1", "strong_2"), logits.chunk(2)):
        boxes = views[view + "_boxes"]
        mixed_label, mixed_used = augment.cutmix(boxes, pseudo_label, neighbour_label), augment.cutmix(boxes, used, neighbour_used)
        losses.append(consistency_loss(logits_view, mixed_label, mixed_used) / counts[view + "_valid"])
    return sum(losses) / 2


def unimatch_v1_losses(network, views: dict, counts: dict, threshold: float, ohem: float = 0.0):
    """(L_sup, L_unsup, pseudo label, used) of UniMatch V1, whose teacher is the student itself.

    Labeled and weak images pass together, as the batch-norm statistics of UniMatch demand; L_sup has a gradient through
    the weak images' features for that reason alone. L_unsup is half of the strong views', half of the perturbed view's.
    """
    size = len(views["weak"])
    logits, logits_perturbed = network(torch.cat([views["labeled"], views["weak"]]), perturb=size)
    logits_strong = network(torch.cat([views["strong_1"], views["strong_2"]]))
    logits_labeled, logits_weak = logits.split([len(logits) - size, size])
    pseudo_label, used = pseudo_labels(logits_weak.detach(), views["valid"], threshold)
    loss_perturbed = consistency_loss(logits_perturbed, pseudo_label, used) / counts["valid"]
    loss_sup = supervised_loss(logits_labeled, views["label"], ohem) / counts["label"]
    loss_unsup = 0.5 * strong_loss(logits_strong, pseudo_label, used, views, counts) + 0.5 * loss_perturbed
    return loss_sup, loss_unsup, pseudo_label, used


def unimatch_v2_losses(network, teacher, views: dict, counts: dict, threshold: float, ohem: float = 0.0):
    """(L_sup, L_unsup, pseudo label, used) of UniMatch V2: pseudo labels of the EMA teacher, two strong views whose features
    lose complementary channels. The losses share no activation: two gradients take no more time than their sum."""
    with torch.no_grad():
        pseudo_label, used = pseudo_labels(teacher(views["weak"]), views["valid"], threshold)
    masks = complementary_masks(len(views["weak"]), teacher.encoder.dim, views["weak"].device)
    loss_sup = supervised_loss(network(views["labeled"]), views["label"], ohem) / counts["label"]
    logits_strong = network(torch.cat([views["strong_1"], views["strong_2"]]), masks)
    return loss_sup, strong_loss(logits_strong, pseudo_label, used, views, counts), pseudo_label, used


def complementary_masks(batch: int, channels: int, device: torch.device) -> Tensor:
    """Channel factors [2 batch, channels] of two views: 0 or 2 in one and 2 or 0 in the other; half of the images keep all (1)."""
    mask = 2.0 * torch.randint(2, (batch, channels), device=device)
    mask = torch.where(torch.rand(batch, 1, device=device) < 0.5, 1.0, mask)
    return torch.cat([mask, 2 - mask])


# ================================================================ training


def make_views(part: dict[str, Tensor], config: Config, blur: tuple[float, float]) -> dict[str, Tensor]:
    """Weak crops as the loader gives them -> everything a step needs that does not depend on the network."""
    weak = augment.to_float(part["unlabeled"])
    views = {"labeled": augment.normalize(part["labeled"]), "label": part["label"], "weak": augment.normalize(weak), "valid": part["valid"]}
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


def resolve(config: Config, context):
    """Replace what `config` leaves open by the baseline's and the data set's recipe; returns the data. Raises UserError."""
    data = load_data(config, context)
    is_v2 = config.baseline == "unimatch_v2"
    if is_v2:
        name = data.info.name.split("_")[0]
        require(name in UNIMATCH_V2, f"there is no UniMatch V2 recipe for {data.info.name}: use --baseline unimatch_v1")
        data.info = dataclasses.replace(data.info, **UNIMATCH_V2[name])
    for name, defaults in {"ema_decay": (0.0, 0.996), "weight_decay": (1e-4, 0.01)}.items():
        if getattr(config, name) is None:
            setattr(config, name, defaults[is_v2])
    require(not is_v2 or config.ema_decay > 0, "--baseline unimatch_v2 learns from averaged weights: --ema-decay must be above 0")
    fill_from_recipe(config, "pos_meo", data, context)
    if config.threshold is None:
        config.threshold = data.info.threshold
    require(0.5 <= config.cap <= 1, f"--cap must lie in [0.5, 1], not {config.cap}")
    require((config.strategy == "fixed") == (config.fixed_weights is not None), "--strategy fixed and --fixed-weights SUP UNSUP belong together")
    require(config.fixed_weights is None or (min(config.fixed_weights) >= 0 and sum(config.fixed_weights) > 0),
            "the --fixed-weights must not be negative, nor both zero")
    require(bool(data.unlabeled), "no unlabeled image is left: POS needs both losses")
    return data


def train(config: Config) -> dict:
    """Train, evaluate and save as `config` says; returns the last evaluation."""
    context = runtime.start(config.device)
    data = resolve(config, context)
    runtime.seed_everything(config.seed)
    model = build_model(config, data.info.num_classes)
    network = runtime.wrap(model, config, context, average_gradients=False)
    optimizer = build_optimizer(model, config)
    history = nn.Module()  # of every step, on the device and in the checkpoint; nan where not measured
    history.register_buffer("steps", torch.full((config.iterations, len(STATISTICS)), torch.nan, device=context.device))
    state = {"model": model, "optimizer": optimizer, "history": history}
    if config.ema_decay:
        state["ema"] = runtime.WeightAverage(model, config.ema_decay)
    teacher = state["ema"].model if config.baseline == "unimatch_v2" else None
    gradients = Gradients(model, rows=2 if config.strategy in PARETO or config.measure else 1)
    runtime.seed_everything(config.seed + 1000 * context.rank)  # ranks augment differently

    run = Run("pos_meo", config, context, state)
    start = run.begin()
    labeled_pixels = class_pixels(data)
    loader = training_loader(data, config, context, start, config.iterations)

    for iteration, batch in enumerate(loader, start):
        runtime.poly_lr(optimizer, iteration, config.iterations)
        parts = [make_views(part, config, data.info.blur) for part in runtime.split_batch(batch, config.grad_accum, context.device)]
        measure = config.measure and (iteration + 1) % config.log_every == 0
        logged, statistics = optimizer_step(network, teacher, parts, gradients, optimizer, config, context, measure)
        if statistics is not None:
            history.steps[iteration] = statistics
        if config.ema_decay:
            state["ema"].update(iteration)

        run.log(iteration, logged, slow=lambda means: report(history, iteration, means, config))
        if run.should_evaluate(iteration):
            predict = predictor(run.evaluated_model, config)
            run.note_results(iteration, run.evaluate(predict, data, getattr(data, config.eval_split), labeled_pixels))
        run.end_of_step(iteration)

    run.write_samples(predictor(run.evaluated_model, config), data)
    if context.is_main:
        write_json(run.folder / "gradients.json", {"strategy": config.strategy, **summarize(history.steps)})
        plot_gradients(history.steps.cpu(), config.strategy, run.folder)
    return run.last


def optimizer_step(network, teacher, parts: list[dict], gradients: Gradients, optimizer, config: Config, context, measure: bool):
    """One step on the views of all parts and ranks: (scalars for the log, STATISTICS where both gradients were computed, or None).

    That is always the case for POS, and for uniform and fixed weights where `measure` asks for it; else one traversal of
    the graph gives their weighted sum.
    """
    separate = measure or config.strategy in PARETO
    counts, logged = pixel_counts(parts), {}
    gradients.flat.zero_()
    for views in parts:
        with runtime.autocast(config, context.device):
            if config.baseline == "unimatch_v1":  # Eq. 1-3
                losses = unimatch_v1_losses(network, views, counts, config.threshold, config.ohem or 0.0)
            else:
                losses = unimatch_v2_losses(network, teacher, views, counts, config.threshold, config.ohem or 0.0)
        loss_sup, loss_unsup, pseudo_label, used = losses
        if separate:  # V1's losses share a graph: the first traversal must leave it for the second
            gradients.backward(loss_sup, SUP, retain_graph=config.baseline == "unimatch_v1")
            gradients.backward(loss_unsup, UNSUP)
        else:
            w_sup, w_unsup = config.fixed_weights if config.strategy == "fixed" else (1.0, 1.0)
            gradients.backward((w_sup * loss_sup + w_unsup * loss_unsup) / (w_sup + w_unsup), SUP)
        terms = {"loss": (loss_sup + loss_unsup) / 2, "loss_sup": loss_sup, "loss_unsup": loss_unsup, "used": used.sum() / counts["valid"]}
        if "truth" in views:  # for the log only
            known = used * (views["truth"] != IGNORE)
            terms |= {"used_known": known.sum(), "used_right": (known * (pseudo_label == views["truth"])).sum()}
        logged = {name: value.detach() + logged.get(name, 0.0) for name, value in terms.items()}
    gradients.average_over_ranks(rows=2 if separate else 1)
    statistics = None
    if separate:
        products = inner_products(*gradients.flat)
        weights = strategy_weights(products, config.strategy, config.fixed_weights, config.cap)  # Eq. 4-6, 13
        gradients.integrate(weights)
        statistics = gradient_statistics(products, weights, config.cap)
    optimizer.step()
    return logged, statistics


def report(history: nn.Module, iteration: int, means: dict[str, float], config: Config) -> dict[str, float]:
    """For the log: the gradients of the steps since the last line, and how many used pseudo labels are right."""
    line = summarize(history.steps[iteration - iteration % config.log_every : iteration + 1])
    if means.get("used_known"):
        line["used_accuracy"] = round(means["used_right"] / means["used_known"], 5)
    return line


def build_model(config: Config, num_classes: int) -> nn.Module:
    network = DeepLabV3Plus if config.baseline == "unimatch_v1" else DPT
    return network(config.backbone, num_classes, config.weights)


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    groups = model.parameter_groups(config.lr, config.head_lr_multiplier)
    if config.baseline == "unimatch_v1":
        return torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay)


def predictor(model: nn.Module, config: Config):
    """images [B, 3, H, W], normalised -> logits [B, C, H, W]."""
    return model.eval()


# ================================================================ what Figures 1 and 3 show

STATISTICS = (  # of one step
    "cosine",  # between g_s and g_u
    "norm_sup", "norm_unsup",
    "alpha_unsup", "lambda",  # that Eq. 6 (with --cap) and Eq. 13 give, whatever the strategy
    "min_cosine_uniform", "min_cosine",  # the smaller one of the cosines between g_s, g_u and the uniform step, the step taken
)
HARM = -1e-6  # a cosine below this is no rounding error


def gradient_statistics(products: Tensor, weights: Tensor, cap: float = 1.0) -> Tensor:
    """STATISTICS of a step with these `inner_products` that takes weights[0] g_s + weights[1] g_u; float32 [7].

    Cosines with a zero vector are 0.
    """
    norms = products.diagonal().sqrt()

    def divide(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(b > 0, a / b, 0.0)

    def min_cosine(weights: Tensor) -> Tensor:
        return divide(weights @ products, norms * length(products, weights)).min()

    pareto = minimum_norm_weights(products, cap)
    return torch.stack([divide(products[SUP, UNSUP], norms.prod()), norms[SUP], norms[UNSUP], pareto[UNSUP],
                        magnification(products, pareto), min_cosine(torch.full_like(weights, 0.5)), min_cosine(weights)]).float()


def summarize(steps: Tensor) -> dict[str, float]:
    """STATISTICS of some steps [n, 7] in numbers: means, and in how many steps the paper's claims held; {} if none is measured."""
    steps = steps[steps[:, 0].isfinite()].double().cpu()
    if not len(steps):
        return {}
    column = dict(zip(STATISTICS, steps.unbind(dim=1)))
    numbers = {name: values.mean() for name, values in column.items()}
    if len(steps) > 1:
        numbers |= {f"{name}_variance": column[name].var() for name in ("norm_sup", "norm_unsup")}
    numbers |= {f"lowest_{name}": column[name].min() for name in ("min_cosine_uniform", "min_cosine")}
    shares = {
        "conflict": column["cosine"] < 0,  # Figure 1a
        "harmful_uniform": column["min_cosine_uniform"] < HARM,  # Figure 1b: the uniform step makes one of the losses worse
        "harmful": column["min_cosine"] < HARM,  # Figure 1c: so does the step that was taken
        "remark_1": column["norm_unsup"] < column["norm_sup"],
        "remark_2": column["alpha_unsup"] > 0.5,
    }
    numbers |= {name: held.double().mean() for name, held in shares.items()}
    return {name: float(f"{value.item():.6g}") for name, value in numbers.items()}


def plot_gradients(steps: Tensor, strategy: str, folder: Path) -> None:
    """gradients.png from STATISTICS of all steps, the paper's Figures 1 and 3; nothing if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    iterations = steps[:, 0].isfinite().nonzero()[:, 0]
    if not len(iterations):
        return
    column = dict(zip(STATISTICS, steps[iterations].unbind(dim=1)))
    figure = Figure(figsize=(18, 3.4), layout="constrained")
    *cosines, norms, alpha = figure.subplots(1, 5)
    for axes, name, title in zip(cosines, ("cosine", "min_cosine_uniform", "min_cosine"), (
            "1a: cos(g_sup, g_unsup)", "1b: min cos(uniform step, .)", f"1c: min cos({strategy} step, .)")):
        for sign, colour in ((column[name] >= 0, "tab:blue"), (column[name] < 0, "tab:red")):
            axes.scatter(iterations[sign], column[name][sign], s=3, color=colour, linewidths=0)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(title=title, xlabel="iteration", ylim=(-1.05, 1.05))
    edges = torch.linspace(0, torch.cat([column["norm_sup"], column["norm_unsup"]]).quantile(0.995), 61).numpy()
    for name, colour in (("norm_sup", "tab:blue"), ("norm_unsup", "tab:orange")):
        norms.hist(column[name].numpy(), bins=edges, color=colour, alpha=0.6, label=name)
    norms.set(title="3a: gradient norms", xlabel="norm", ylabel="steps")
    norms.legend()
    alpha.scatter(iterations, column["alpha_unsup"], s=3, color="tab:green", linewidths=0)
    alpha.axhline(0.5, color="black", linewidth=0.8, zorder=0)
    alpha.set(title="3b: alpha_unsup of POS", xlabel="iteration", ylim=(-0.05, 1.05))
    write_atomically(folder / "gradients.png", lambda temporary: figure.savefig(temporary, format="png", dpi=120))


# ================================================================ Figure 5


def landscape(config: Config) -> None:
    """Figure 5: loss and mIoU around the weights of the checkpoints in `config.landscape`, all along the same directions.

    The loss is (L_sup + L_unsup) / 2 over fixed batches of the training lists, L_unsup on the strong views alone with the
    pseudo labels that the unmoved weights give (so its level is each checkpoint's own); batch norm in eval mode; the EMA's
    weights where there are any. mIoU is that of the whole validation list, at 61 points a checkpoint.
    """
    context, curves = runtime.start(config.device), {}
    require(context.world_size == 1, "--landscape runs in one process")
    for path in config.landscape.split(","):
        model, saved, info = load_model(path, context.device)
        require(hasattr(saved, "strategy"), f"{path} is no checkpoint of pos_meo.py")
        saved = dataclasses.replace(saved, data_root=config.data_root or saved.data_root, seed=config.seed, batch_size=8, num_workers=0)
        data = dataclasses.replace(load_data(saved, context), info=info)
        runtime.seed_everything(config.seed)
        batches = []
        for batch in training_loader(data, saved, context, 0, LANDSCAPE_BATCHES):
            (part,) = runtime.split_batch(batch, 1, context.device)
            views = make_views(part, saved, info.blur)
            with torch.no_grad():
                batches.append((views, pixel_counts([views]), *pseudo_labels(model(views["weak"]), views["valid"], saved.threshold)))
        labeled_pixels = class_pixels(data)

        @torch.no_grad()
        def measure() -> dict[str, float]:
            losses = []
            for views, counts, pseudo_label, used in batches:
                loss_sup = supervised_loss(model(views["labeled"]), views["label"], saved.ohem or 0.0) / counts["label"]
                logits_strong = model(torch.cat([views["strong_1"], views["strong_2"]]))
                losses.append((loss_sup + strong_loss(logits_strong, pseudo_label, used, views, counts)) / 2)
            results = evaluate(model, evaluation_loader(data.val, data, context, 0), info, context, labeled_pixels)
            return {"loss": torch.stack(losses).mean().item(), "miou": results["miou"]}

        curves[path] = scan(model, measure, LANDSCAPE_DISTANCES, LANDSCAPE_DIRECTIONS, config.seed)
    folder = Path(config.output or "runs/landscape")
    folder.mkdir(parents=True, exist_ok=True)
    save(curves, folder, {"loss": "training loss", "miou": "mIoU (%)"})
    print(table(curves))


def main() -> None:
    config = parse(Config, description=__doc__)
    landscape(config) if config.landscape else train(config)


if __name__ == "__main__":
    runtime.run_main(main)
