"""POS + MEO: Two Losses, One Goal: Balancing Conflict Gradients for Semi-supervised Semantic
Segmentation. Sun et al., ICCV 2025.

The supervised and the unsupervised loss are mostly summed with equal weights, but their gradients
g_s and g_u often conflict: a step along their mean may make one loss worse. POS takes the shortest
vector between g_s and g_u instead (the minimum-norm point): to first order no step along it harms
either loss of the batch. It is short; MEO gives it the length of the mean back. All this is said of
gradients: weight decay, momentum, the head's learning rate and AdamW come after it. From step 1 on
it can collapse: the smaller g_u, the more h follows it alone, and a student that teaches itself
then agrees only with itself. Hence uniform steps first, and runs that stop as COLLAPSED (ours).

    Eq. 1-3     the losses of the baselines           supervised_loss, pseudo_labels, weighted_loss
    Eq. 4       h = w_s g_s + w_u g_u                 integration_weights, Gradients.integrate
    Eq. 5, 6    minimum-norm weights (POS)            minimum_norm_weight; pos_weight
    Eq. 13      magnitude enhancement (MEO)           magnification
    Fig. 1, 3   conflict, norms, alpha                gradient_statistics
    Fig. 5      loss and mIoU around the weights      landscape; --landscape a/latest.pt,b/latest.pt

Run
    python pos_meo.py                                              embedded data, on a laptop
    python pos_meo.py --dataset pascal --labeled 92 --warmup 0     the paper's; else 5 % are uniform
    torchrun --nproc_per_node=8 pos_meo.py --dataset pascal --labeled 92 --baseline unimatch_v2
Baselines: --strategy uniform, pos (Table 4), or fixed with --alpha-unsup 0.33 (Table 5).
Results, figures and all differences from the paper and UniMatch's code: .docs/pos_meo.md, daw.md
"""

import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch import config as functorch

from common.augment import (IGNORE, Photometry, cutmix, cutmix_boxes, normalize, strong_augment,
                            to_float)
from common.backbones import checkpoint_activations, load_strictly, random_weights_like
from common.data import DataOptions, load_data, training_loader
from common.evaluate import (data_options, evaluate, finite, load_predictor, pixel_accuracy,
                             write_samples)
from common.figures import filter_normalized_direction
from common.models import DPT, DeepLabV3Plus, hard_pixel_loss
from common.runtime import (Checkpoint, Log, Milestones, RunOptions, all_reduce_sum, bf16_is_fast,
                            cutmix_partner, init_distributed, make_ema, mean_over_ranks, option,
                            parse, require, run_main, say, update_ema, with_defaults, write_json)

BASELINES = {"unimatch_v1": DeepLabV3Plus, "unimatch_v2": DPT}
STRATEGIES = ("uniform", "pos", "pos_meo", "fixed")
SUP, UNSUP = 0, 1  # g_s and g_u wherever something has two rows
ROUNDING = 1e-6  # a cosine, or a length beside another one, below this is rounding error
COLLAPSED = ("every pseudo label is of one class and the loss on labels has tripled: start again "
             "in a new folder with a longer --warmup, or with --cap 0.8")
MIN_ONE_CLASS_STEPS = 20  # a line of the log over fewer may be all of one class by chance
CHUNK = 2**20  # of a gradient, whose float64 copies stay small
DISTANCES = [step / 10 for step in range(-10, 11)]  # of the landscape
DIRECTIONS, LANDSCAPE_BATCHES = 3, 6

# UniMatch V2's recipe (folder, shapes: ours) where it differs from the data set's, UniMatch V1's.
VIT = {"backbone": "dinov2_s", "crop": 518, "epochs": 60, "batch_size": 16, "lr": 5e-6,
       "head_lr_multiplier": 40, "threshold": 0.95}
UNIMATCH_V2 = {"pascal": VIT, "folder": VIT, "coco": {**VIT, "epochs": 20},
               "cityscapes": {**VIT, "crop": 798, "epochs": 180, "batch_size": 8},
               "shapes": {"backbone": "tiny_vit", "lr": 2e-4, "head_lr_multiplier": 5}}


@dataclass
class Config(DataOptions, RunOptions):
    """What touches learning; None: as the brackets say, or the recipe in common/data.py."""

    baseline: str = option("unimatch_v1", "V2: ViT, DPT, EMA teacher", choices=tuple(BASELINES))
    strategy: str = option("pos_meo", "how gradients are integrated", choices=STRATEGIES)
    alpha_unsup: float | None = option(None, "of --strategy fixed", low=0, high=1)
    warmup: int | None = option(None, "uniform steps first (5 % of a recipe; embedded 50 %)", low=0)
    cap: float = option(1.0, "of alpha_u, where it does no harm; below 1: ours", low=0.5, high=1)
    threshold: float | None = option(None, "gamma of Eq. 2", low=0, below=1)
    measure: bool = option(True, "at logged steps of uniform and fixed, too: two backward passes")
    landscape: str | None = option(None, "no training: Figure 5 of these checkpoints (commas)")
    backbone: str | None = option(None, "as in daw.py; unimatch_v2: dinov2_s or tiny_vit")
    weights: str = option("default", "of the encoder: default, none, deep_stem or a file's path")
    crop: int | None = option(None, "training crop in pixels, 16 k + 1; unimatch_v2: 14 k", low=16)
    batch_size: int | None = option(None, "labeled (and unlabeled) images a step, all GPUs", low=2)
    epochs: int | None = option(None, "passes over the unlabeled list", low=1)
    iterations: int | None = option(None, "optimizer steps, instead of --epochs", low=1)
    lr: float | None = option(None, "of the encoder; a recipe's grows with --batch-size", above=0)
    head_lr_multiplier: float | None = option(None, "of the rest: --lr times this", above=0)
    ohem: float | None = option(None, "OHEM's threshold; 15.6 % count anyway", low=0, below=1)
    weight_decay: float | None = option(None, "of SGD (1e-4), of V2's AdamW (0.01)", low=0)
    ema_decay: float | None = option(None, "of V2's teacher (0.996); V1: off (0)", low=0, below=1)
    seed: int = option(0, "of weights, sampling and augmentation", low=0)


def inner_products(g_sup: Tensor, g_unsup: Tensor) -> Tensor:
    """<g_s, g_s>, <g_s, g_u>, <g_u, g_u> of flat gradients [P], of which all follows: float64 [3].

    Products of float32 numbers are exact there, so that nearly equal ones may be subtracted.
    """
    sums = g_sup.new_zeros(3, dtype=torch.float64)
    for a, b in zip(g_sup.split(CHUNK), g_unsup.split(CHUNK)):
        a, b = a.double(), b.double()
        sums += torch.stack([a.dot(a), a.dot(b), b.dot(b)])
    return sums


def minimum_norm_weight(ss: Tensor, su: Tensor, uu: Tensor) -> Tensor:
    """alpha_u of Eq. 6, 0-d; its other two cases are this one above 1 and below 0."""
    distance = ss - 2 * su + uu  # |g_s - g_u|^2
    alpha_unsup = ((ss - su) / distance).clamp(0, 1)
    return torch.where(distance > 0, alpha_unsup, 0.5)  # equal gradients


def pos_weight(ss: Tensor, su: Tensor, uu: Tensor, cap: float = 1.0) -> Tensor:
    """alpha_u that POS takes after the warm-up, 0-d: Eq. 6 but for two more rules of ours.

    A gradient that vanishes (no confident pixel) must not stop the other loss: the uniform step.
    With `cap`, what Eq. 6 has above it is lowered, as long as that does not harm L_unsup.
    """
    conflict = su.clamp(max=0)
    least = -conflict / (uu - conflict)  # (1 - a) su + a uu = 0; below it L_unsup is harmed
    alpha_unsup = minimum_norm_weight(ss, su, uu).clamp(max=cap).clamp(min=least)
    vanishing = torch.minimum(ss, uu) <= ROUNDING**2 * torch.maximum(ss, uu)
    return torch.where(vanishing, 0.5, alpha_unsup)


def combined_norm(products: Tensor, w_sup: Tensor | float, w_unsup: Tensor | float) -> Tensor:
    """|w_s g_s + w_u g_u| from `inner_products`, 0-d."""
    ss, su, uu = products
    return (w_sup**2 * ss + 2 * w_sup * w_unsup * su + w_unsup**2 * uu).clamp(min=0).sqrt()


def magnification(products: Tensor, alpha_unsup: Tensor) -> Tensor:
    """lambda of Eq. 13, 0-d; 0 for opposite gradients, whose shortest mean is zero."""
    pos_norm = combined_norm(products, 1 - alpha_unsup, alpha_unsup)
    stationary = pos_norm <= ROUNDING * torch.minimum(products[0], products[2]).sqrt()
    return torch.where(stationary, 0.0, combined_norm(products, 0.5, 0.5) / pos_norm)


def integration_weights(products: Tensor, strategy: str, alpha_unsup: float | None = None,
                        cap: float = 1.0) -> Tensor:
    """What g_s and g_u are multiplied with, float64 [2], by uniform, fixed, pos or pos_meo."""
    if strategy in ("uniform", "fixed"):
        alpha = torch.full_like(products[0], 0.5 if strategy == "uniform" else alpha_unsup)
    else:
        alpha = pos_weight(*products, cap)
    weights = torch.stack([1 - alpha, alpha])
    return weights * magnification(products, alpha) if strategy == "pos_meo" else weights  # Eq. 13


def pareto_weights(g_sup: Tensor, g_unsup: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha_s, alpha_u) of POS for flat gradients [P], to be used elsewhere: 0-d float64."""
    return tuple(integration_weights(inner_products(g_sup, g_unsup), "pos"))


def integrate_gradients(g_sup: Tensor, g_unsup: Tensor, magnitude_enhancement=True) -> Tensor:
    """h of Eq. 4, 6, with MEO Eq. 13, to be used elsewhere: flat [P], summed in float32; but for
    rounding <h, g_s> and <h, g_u> are not negative, unless one of the two vanishes."""
    strategy = "pos_meo" if magnitude_enhancement else "pos"
    weights = integration_weights(inner_products(g_sup, g_unsup), strategy).float()
    return (weights[SUP] * g_sup.float() + weights[UNSUP] * g_unsup.float()).to(g_sup.dtype)


def gradient_statistics(products: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Figures 1 and 3, for h = weights[0] g_s + weights[1] g_u; 0-d tensors.

    cosine: 1a; min_cosine_uniform: 1b; min_cosine: 1c; norm_*: 3a; alpha_unsup: 3b. alpha_unsup and
    lambda are what POS, without a cap, and MEO would take, whatever was done. harmful: h is against
    a gradient. remark_1: g_u is the shorter one, which is why alpha_unsup > 0.5 (Eq. 9).
    """
    ss, su, uu = products
    alpha = pos_weight(ss, su, uu)

    def min_cosine(w_sup: Tensor | float, w_unsup: Tensor | float) -> Tensor:
        along = w_sup * products[:2] + w_unsup * products[1:]  # <h, g_s>, <h, g_u>
        norms = combined_norm(products, w_sup, w_unsup) * products[::2].sqrt()  # |h| |g_s|, ...
        return torch.where(norms > 0, along / norms, 0.0).min()

    uniform, taken = min_cosine(0.5, 0.5), min_cosine(*weights)
    cosine = torch.where((ss > 0) & (uu > 0), su / (ss * uu).sqrt(), 0.0)
    return {"cosine": cosine, "norm_sup": ss.sqrt(), "norm_unsup": uu.sqrt(), "alpha_unsup": alpha,
            "lambda": magnification(products, alpha), "min_cosine_uniform": uniform,
            "min_cosine": taken, "conflict": cosine < 0, "harmful_uniform": uniform < -ROUNDING,
            "harmful": taken < -ROUNDING, "remark_1": uu < ss}


class Gradients:
    """g_s and g_u of all trainable parameters: flat [rows, P], a row a backward pass.

    Every .grad is a view of a row. Instead of DDP, which expects one backward pass for a forward
    pass, ranks meet in one all-reduce: alpha is that of the global batch.
    """

    def __init__(self, model: nn.Module, rows: int):
        self.parameters = [value for value in model.parameters() if value.requires_grad]
        sizes = [value.numel() for value in self.parameters]
        self.flat = self.parameters[0].new_zeros(rows, sum(sizes))
        # In the parameters' own memory format, as optimizers that treat many at once want it.
        dense = [torch.empty_like(value, device="meta") for value in self.parameters]
        self.views = [[piece.as_strided(value.shape, value.stride())
                       for piece, value in zip(row.split(sizes), dense)] for row in self.flat]

    def backward(self, loss: Tensor, row: int, retain_graph: bool = False) -> None:
        self.flat[row].zero_()
        self.select(row)
        loss.backward(retain_graph=retain_graph)

    def select(self, row: int) -> None:
        """Make a row the parameters' gradient."""
        for parameter, view in zip(self.parameters, self.views[row]):
            parameter.grad = view

    def average_over_ranks(self, rows: int) -> None:
        if torch.distributed.is_initialized():
            all_reduce_sum(self.flat[:rows]).div_(torch.distributed.get_world_size())

    def integrate(self, weights: Tensor) -> None:
        """Make weights[0] g_s + weights[1] g_u the parameters' gradient, in the place of g_s."""
        weights = weights.to(self.flat.dtype)
        self.flat[SUP].mul_(weights[SUP]).addcmul_(self.flat[UNSUP], weights[UNSUP])
        self.select(SUP)


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


def pseudo_labels(logits: Tensor, valid: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Eq. 2: teacher's logits [B, C, H, W] -> (pseudo label, 1 where it is used), [B, H, W]."""
    confidence, pseudo_label = logits.float().softmax(dim=1).max(dim=1)
    return pseudo_label, ((confidence >= threshold) & valid).float()  # Eq. 2: >; UniMatch: >=


def weighted_loss(logits: Tensor, pseudo_label: Tensor, weight: Tensor, valid: Tensor) -> Tensor:
    """Eq. 3, a mean over valid pixels (weight 0 elsewhere): logits [B, C, H, W], rest [B, H, W]."""
    loss = F.cross_entropy(logits.float(), pseudo_label, reduction="none")
    return (loss * weight).sum() / mean_over_ranks(valid.sum())


def strong_loss(logits: Tensor, pseudo_label: Tensor, weight: Tensor, views: dict) -> Tensor:
    """Eq. 3 on both strong views, logits [2B, C, H, W]; in CutMix's boxes the partner's labels."""
    own = (pseudo_label, weight, views["valid"])
    partners = [cutmix_partner(part) for part in own]
    losses = []
    for view, logits_view in zip(("strong_1", "strong_2"), logits.split(len(weight))):
        boxes = views[view + "_boxes"]
        mixed = [cutmix(boxes, part, partner) for part, partner in zip(own, partners)]
        losses.append(weighted_loss(logits_view, *mixed))
    return sum(losses) / len(losses)


def unimatch_v1_losses(network, views: dict, threshold: float, ohem: float) -> tuple[Tensor, ...]:
    """(L_sup, L_unsup, pseudo label, used) of UniMatch V1, whose teacher is the student itself.

    Labeled and weak images share batch statistics, so that the losses share a graph: backward of
    L_sup must retain it.
    """
    size = len(views["weak"])
    logits, logits_perturbed = network(torch.cat([views["labeled"], views["weak"]]), perturb=size)
    logits_strong = network(torch.cat([views["strong_1"], views["strong_2"]]))
    logits_labeled, logits_weak = logits.split([len(logits) - size, size])
    pseudo_label, used = pseudo_labels(logits_weak.detach(), views["valid"], threshold)
    loss_perturbed = weighted_loss(logits_perturbed, pseudo_label, used, views["valid"])
    loss_strong = strong_loss(logits_strong, pseudo_label, used, views)
    loss_sup = supervised_loss(logits_labeled, views["label"], ohem)
    return loss_sup, 0.5 * loss_strong + 0.5 * loss_perturbed, pseudo_label, used


def unimatch_v2_losses(network, teacher, views: dict, threshold: float,
                       ohem: float) -> tuple[Tensor, ...]:
    """(L_sup, L_unsup, pseudo label, used) of UniMatch V2: EMA teacher; the strong views lose
    complementary channels of all four maps of the encoder."""
    with torch.no_grad():
        pseudo_label, used = pseudo_labels(teacher(views["weak"]), views["valid"], threshold)
    size, channels = len(views["weak"]), teacher.encoder.dim
    mask = 2.0 * torch.randint(2, (size, channels), device=used.device)  # [B, dim], 0 or 2
    whole = torch.rand(size, 1, device=used.device) < 0.5  # such an image keeps all channels
    masks = torch.cat([torch.where(whole, 1.0, mask), torch.where(whole, 1.0, 2 - mask)])
    loss_sup = supervised_loss(network(views["labeled"]), views["label"], ohem)
    logits_strong = network(torch.cat([views["strong_1"], views["strong_2"]]), masks)
    return loss_sup, strong_loss(logits_strong, pseudo_label, used, views), pseudo_label, used


# ---------------------------------------------------------------- training


def train(config: Config) -> None:
    rank, world_size, device = init_distributed(config.device)
    data = load_data(config)
    is_v2 = config.baseline == "unimatch_v2"
    if is_v2:
        name = data.info.name.split("_")[0]
        require(name in UNIMATCH_V2, f"no UniMatch V2 recipe for {name}: --baseline unimatch_v1")
        data = replace(data, info=replace(data.info, **UNIMATCH_V2[name]))
    pareto = config.strategy.startswith("pos")
    steps = data.recipe(config.batch_size, None)["iterations"]  # a shorter run needs no fewer
    warmup = steps // (2 if data.info.embedded else 20)  # until L_sup nears L_unsup
    config = with_defaults(config, **data.recipe(config.batch_size, config.epochs),
                           ema_decay=0.996 if is_v2 else 0.0, weight_decay=0.01 if is_v2 else 1e-4,
                           amp=bf16_is_fast(device), warmup=warmup if pareto else 0,
                           output=f"runs/pos_meo_{data.tag}_{config.seed}")
    require(not is_v2 or config.ema_decay > 0, "unimatch_v2 needs --ema-decay above 0")
    fixed = config.strategy == "fixed"
    require(fixed == (config.alpha_unsup is not None), "give --strategy fixed --alpha-unsup A")
    require(pareto or config.cap == 1, "--cap is for --strategy pos and pos_meo")
    if pareto and config.warmup >= config.iterations:
        say(f"--warmup is {config.warmup}: all {config.iterations} steps are uniform")

    torch.manual_seed(config.seed)
    model = BASELINES[config.baseline](config.backbone, data.info.num_classes, config.weights)
    if world_size > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if config.checkpoint_activations:
        checkpoint_activations(model, config.compile)
    model.to(device, memory_format=torch.channels_last)
    # The first backward, compiled, must not free the second's; code that daw.py has cached would.
    functorch.donated_buffer = False
    network = torch.compile(model, options={"fx_graph_cache": False}) if config.compile else model
    groups = model.parameter_groups(config.lr, config.head_lr_multiplier)
    if is_v2:
        optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    else:
        optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, config.iterations, power=0.9)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}
    evaluated = model  # with --ema-decay the average of its weights, of V2 the teacher
    if config.ema_decay:
        evaluated = state["ema"] = make_ema(model)
    losses = (partial(unimatch_v2_losses, network, evaluated) if is_v2
              else partial(unimatch_v1_losses, network))
    gradients = Gradients(model, rows=2 if pareto or config.measure else 1)
    torch.manual_seed(config.seed + 1000 * rank)  # ranks augment differently
    checkpoint = Checkpoint(config.output, "pos_meo", asdict(config), state)
    start = checkpoint.load()
    log = Log(checkpoint, start, 2 * config.batch_size)
    loader = training_loader(data, config.crop, config.batch_size, config.seed, start,
                             config.iterations, device, num_workers=config.num_workers)

    scores = partial(evaluate, evaluated, data, config.eval_split, config.crop, device,
                     config.num_workers)
    milestones = Milestones(checkpoint, log, evaluated, scores)
    for step, batch in enumerate(loader, start + 1):
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        views = make_views(batch, config.crop, data.info.photometry)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
            loss_sup, loss_unsup, pseudo_label, used = losses(views, config.threshold, config.ohem)
        terms = {"loss": (loss_sup + loss_unsup) / 2, "loss_sup": loss_sup,
                 "loss_unsup": loss_unsup, "one_class": pseudo_label.amin() == pseudo_label.amax(),
                 "used": used.sum() / mean_over_ranks(views["valid"].sum())}
        strategy = config.strategy if step > config.warmup else "uniform"
        if strategy.startswith("pos") or config.measure and log.line_is_due(step):
            gradients.backward(loss_sup, SUP, retain_graph=not is_v2)  # V1's losses share a graph
            gradients.backward(loss_unsup, UNSUP)
            gradients.average_over_ranks(rows=2)
            products = inner_products(*gradients.flat)
            weights = integration_weights(products, strategy, config.alpha_unsup, config.cap)
            gradients.integrate(weights)
            terms |= gradient_statistics(products, weights)
        else:  # one traversal gives the weighted sum
            alpha = config.alpha_unsup if strategy == "fixed" else 0.5
            gradients.backward((1 - alpha) * loss_sup + alpha * loss_unsup, SUP)
            gradients.average_over_ranks(rows=1)
        optimizer.step()
        schedule.step()
        if config.ema_decay:
            update_ema(evaluated, model, min(1 - 1 / step, config.ema_decay))  # first a plain mean

        if "truth" in views:  # for the log only
            terms["used_accuracy"] = pixel_accuracy(pseudo_label, views["truth"], used)
        if means := log.step(step, terms):
            collapsed = means["one_class"] == 1 and means["loss_sup"] >= 3 * min(log.sup_losses)
            covered = step % config.log_every or config.log_every  # steps of this line
            require(not (pareto and covered >= MIN_ONE_CLASS_STEPS and collapsed), COLLAPSED)
        del loss_sup, loss_unsup, terms  # a retained graph must not outlive the next forward pass
        milestones.after(step)  # saves, leaves when told to, evaluates

    write_samples(evaluated.eval(), data, config.crop, device, checkpoint.folder / "samples.png")


def build_predictor(config: dict, num_classes: int, state: dict[str, Tensor]) -> nn.Module:
    """What common.evaluate and common.predict make of a checkpoint: images -> logits."""
    weights = random_weights_like(state)
    model = BASELINES[config["baseline"]](config["backbone"], num_classes, weights)
    return load_strictly(model, state, "the checkpoint's weights")


@torch.no_grad()
def landscape(config: Config) -> None:
    """Figure 5: loss and mIoU around the weights of checkpoints, along the same random draws, each
    as long as the checkpoint's own filters.

    (L_sup + L_unsup) / 2 of fixed batches, in evaluation mode; L_unsup on the strong views alone,
    without dropout, with the pseudo labels of the unmoved weights.
    """
    _, world_size, device = init_distributed(config.device)
    require(world_size == 1, "--landscape runs in one process")
    folder, curves = Path(config.output or "runs/landscape"), {}
    for path in config.landscape.split(","):
        changes = [f"data_root={config.data_root}"] if config.data_root else []
        model, saved, _ = load_predictor(path, device, changes)
        require("alpha_unsup" in saved, f"{path} is no checkpoint of pos_meo.py")
        data, crop = load_data(data_options(saved)), saved["crop"]
        torch.manual_seed(config.seed)
        fixed = []
        for batch in training_loader(data, crop, 8, config.seed, 0, LANDSCAPE_BATCHES, device,
                                     num_workers=config.num_workers):
            batch = {name: value.to(device) for name, value in batch.items()}
            views = make_views(batch, crop, data.info.photometry)
            teaching = pseudo_labels(model(views["weak"]), views["valid"], saved["threshold"])
            fixed.append((views, *teaching))
        curves[path] = []
        for number in range(DIRECTIONS):
            generator = torch.Generator().manual_seed(config.seed * 1000 + number)
            direction = filter_normalized_direction(model, generator)
            for distance in DISTANCES:
                moved = copy.deepcopy(model)
                torch._foreach_add_(list(moved.parameters()), direction, alpha=distance)
                losses = []
                for views, pseudo_label, used in fixed:
                    logits = moved(torch.cat([views["strong_1"], views["strong_2"]]))
                    losses.append(strong_loss(logits, pseudo_label, used, views))
                    logits = moved(views["labeled"])
                    losses.append(supervised_loss(logits, views["label"], saved["ohem"]))
                miou = evaluate(moved, data, config.eval_split, crop, device,
                                config.num_workers)["miou"]
                curves[path].append({"direction": number, "distance": distance, "miou": miou,
                                     "loss": finite(torch.stack(losses).mean())})
        write_json(folder / "landscape.json", curves)  # python -m common.figures draws it


def main() -> None:
    config = parse(Config, description=__doc__)
    (landscape if config.landscape else train)(config)


if __name__ == "__main__":
    run_main(main)
