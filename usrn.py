"""USRN: Unbiased Subclass Regularization for Semi-Supervised Semantic Segmentation
Guan et al., CVPR 2022.

Labeled pixels are imbalanced, so a network F trained on them is biased towards large classes, and
so are its pseudo labels. Cluster the labeled pixels of each class into subclasses as large as the
smallest class: F_sub, a second network, learns these and is not biased. On unlabeled images, where
F_sub is surer, a pseudo label must be of the class that it sees. Only F is used afterwards. Stage 2
clusters cells, means of 2 x 2 features (PSPNet: of one), and unlabeled losses are on cells.

    stages 1, 3   F on labeled images; F and F_sub anew      train
    stage 2       balanced clusters of F's features          make_subclasses, balanced_kmeans
    Eq. 2         losses on classes and on subclasses        supervised_loss
    Eq. 3         S: pseudo labels above gamma               select
    Eq. 4, 6, 7   regularized labels; the gate               regularize, entropy_gate
    Eq. 4, 5, 7   losses; 5 is L_st^sub of Eq. 8             weighted_loss
    Eq. 8         the total                                  usrn_loss
    Eq. 9         class balance rate                         class_balance_rate

Run
    python usrn.py                                              embedded data
    torchrun --nproc_per_node=8 usrn.py --dataset pascal --labeled usrn_331 --backbone resnet50
Ablations: --model (Table 3), --clustering (4), --share (5), --threshold (6), --architecture (9).
A run folder holds supervised/ (stage 1) and subclasses/ (stage 2), used again where they are there.
Results, figures and differences from the paper and the released code: .docs/usrn.md
"""

import math
import shutil
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.augment import IGNORE, Photometry, normalize, strong_augment, to_float
from common.backbones import checkpoint_activations, load_strictly, random_weights_like
from common.data import Data, DataOptions, EvaluationSet, Sample, load_data, training_loader
from common.evaluate import evaluate, pixel_accuracy, write_samples
from common.figures import colorize, sample_grid, save_indexed_png, voc_palette
from common.models import ARCHITECTURES, hard_pixel_loss, resize
from common.runtime import (KEEP_BUFFERS, Checkpoint, Log, Milestones, RunOptions, bf16_is_fast,
                            init_distributed, main_first, mean_over_ranks, option, parse, rank,
                            read_json, require, run_main, say, with_defaults, world_size,
                            write_json)

PARTS = ("MSL",  # supervised losses on classes and on subclasses, Eq. 2
         "OST",  # self-training of F, Eq. 3
         "USR",  # regularization of its pseudo labels by F_sub, Eq. 4
         "SST",  # self-training of F_sub, Eq. 5
         "EGM")  # entropy gate, Eq. 6, 7
MODELS = {"baseline": (), "self-training": ("OST",), "I": PARTS[:1], "II": PARTS[:2],
          "III": PARTS[:3], "IV": PARTS[:4], "USRN": PARTS}  # Table 3
STAGE_3_OPTIONS = ("threshold", "gate", "lambda_sub", "lambda_u", "clustering", "share",
                   "max_subclasses")  # stage 1 has their defaults: one serves all rows


@dataclass
class Config(DataOptions, RunOptions):
    """What touches learning; None: as the brackets say, or the recipe in common/data.py."""

    model: str = option("USRN", "row of Table 3, or without F_sub", choices=tuple(MODELS))
    threshold: float = option(0.75, "gamma of Eq. 3", low=0, below=1)
    gate: str = option("paper", "of USRN; F_sub's entropy and class: of sums over parents (Eq. 6, "
                                "7), or of subclasses (released)", choices=("paper", "released"))
    lambda_sub: float = option(1.0, "weight of F_sub's losses, Eq. 2 and 8", low=0)
    lambda_u: float = option(1.0, "weight of the losses on unlabeled images, Eq. 8", low=0)
    clustering: str = option("balanced", "k-means of stage 2", choices=("balanced", "plain"))
    share: str = option("low", "of F and F_sub: nothing, the stem and stage 1, or the encoder",
                        choices=("none", "low", "all"))
    architecture: str = option("deeplabv3plus", "of both", choices=tuple(ARCHITECTURES))
    network: str = option("plain", "released: dropout, last stage of a ResNet dilated by 2, 4, 8",
                          choices=("plain", "released"))
    max_subclasses: int | None = option(None, "in all (255; embedded: images)", low=2, high=IGNORE)
    supervised_iterations: int | None = option(None, "stage 1 (a quarter of --iterations)", low=1)
    backbone: str | None = option(None, "resnet50, resnet101, xception65, mobilenet_v2 or tiny")
    weights: str = option("default", "of the encoder: default, none, deep_stem or a file's path")
    crop: int | None = option(None, "training crop in pixels, 16 k + 1", low=16)
    batch_size: int | None = option(None, "labeled (and unlabeled) images a step, all GPUs", low=2)
    epochs: int | None = option(None, "passes over the unlabeled list", low=1)
    iterations: int | None = option(None, "optimizer steps, instead of --epochs", low=1)
    lr: float | None = option(None, "of the encoder; a recipe's grows with --batch-size", above=0)
    head_lr_multiplier: float | None = option(None, "of the rest: --lr times this", above=0)
    ohem: float | None = option(None, "of F's OHEM (ours); 15.6 % count anyway", low=0, below=1)
    weight_decay: float = option(1e-4, "of SGD", low=0)
    seed: int = option(0, "of weights, sampling and augmentation", low=0)


# ---------------------------------------------------------------- pseudo labels, losses


def subclasses_to_parents(probs: Tensor, parent_of: Tensor, num_classes: int) -> Tensor:
    """M of Eq. 4, 7: of subclasses [B, K, ...] -> of classes [B, C, ...], sums; parent_of [K]."""
    parents = probs.new_zeros(len(probs), num_classes, *probs.shape[2:])
    return parents.index_add_(1, parent_of, probs)


def select(probs: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """S of Eq. 3: probs [B, C, ...] -> pseudo labels [B, ...] and whether they are used, bool."""
    confidence, pseudo_label = probs.max(dim=1)
    return pseudo_label, confidence > threshold


def entropy(probs: Tensor) -> Tensor:
    """Shannon's, [B, C, ...] -> [B, ...] in [0, 1]: divided by log C."""
    return torch.special.entr(probs).sum(dim=1) / math.log(probs.shape[1])


def entropy_gate(probs: Tensor, sub_probs: Tensor, parent_of: Tensor, rule: str) -> tuple:
    """Eq. 6, 7: where F_sub is surer and may regularize F, bool [B, ...]; its class, [B, ...].

    probs [B, C, ...] of F, sub_probs [B, K, ...] of F_sub. "paper": entropy and class of M(p*), the
    sums over parents; "released": entropy of p*, and the parent of the likeliest subclass.
    """
    if rule == "released":
        seen = parent_of[sub_probs.argmax(dim=1)]
    else:
        sub_probs = subclasses_to_parents(sub_probs, parent_of, probs.shape[1])
        seen = sub_probs.argmax(dim=1)
    return entropy(sub_probs) < entropy(probs), seen


def regularize(probs: Tensor, seen: Tensor, gate: Tensor) -> Tensor:
    """Eq. 4, 6: F's probabilities [B, C, ...], where `gate` is True of the class `seen` alone.

    S is of the product, as in Eq. 4; Eq. 6's S(p*) p would let every one-hot cell pass. With gamma
    >= 0.5 this never changes a pseudo label, it can only veto one: F's confidence in another class
    is at most one half.
    """
    is_seen = F.one_hot(seen, probs.shape[1]).movedim(-1, 1)
    return torch.where(gate.unsqueeze(1), is_seen * probs, probs)


def supervised_loss(logits: Tensor, label: Tensor, ohem: float = 0.0) -> Tensor:
    """Eq. 2, over labeled pixels, or OHEM's: logits [B, C, H, W], label [B, H, W], 255 = ignore."""
    loss = F.cross_entropy(logits.float(), label.long(), ignore_index=IGNORE, reduction="none")
    total = hard_pixel_loss(loss, label, ohem) if ohem else loss.sum()
    # The average of the ranks' gradients is then that of the mean over the global batch's pixels.
    return total / mean_over_ranks((label != IGNORE).sum())


def weighted_loss(logits: Tensor, pseudo_label: Tensor, used: Tensor, num_cells: Tensor) -> Tensor:
    """L_ce of Eq. 4, 5, 7: a sum over used cells by the number of all valid ones, `num_cells`.

    logits [B, C, h, w], the others [B, h, w].
    """
    loss = F.cross_entropy(logits.float(), pseudo_label, reduction="none")
    return (loss * used).sum() / num_cells


class USRN(nn.Module):
    """F and F_sub, which share nothing, the encoder's first part ("low") or all of it.

    forward(images [B, 3, H, W], labeled=k, subclassed=n) -> logits of the first k images
    [k, C, H, W] and of the others' cells [B-k, C, h, w]; then the same of F_sub for the first n
    images only (None if n = 0).
    """

    def __init__(self, model: nn.Module, subclass_model: nn.Module | None = None, share="low"):
        super().__init__()
        self.model, self.subclass_model, self.share = model, subclass_model, share
        if subclass_model is None:
            return
        encoder = subclass_model.encoder
        everything = [name for name, _ in encoder.named_children()]
        for name in {"none": (), "low": encoder.low_parts, "all": everything}[share]:
            parent, _, child = name.rpartition(".")
            delattr(encoder.get_submodule(parent), child)  # F's is used; DDP must not see this one

    def forward(self, images: Tensor, labeled: int, subclassed: int = 0) -> tuple:
        size = images.shape[2:]
        low = self.model.encoder.low_level(images)
        high = self.model.encoder.high_level(low)
        logits = self.classify(self.model, low, high, labeled, size)
        if not subclassed:
            return *logits, None, None
        low, high = low[:subclassed], high[:subclassed]
        if self.share == "none":
            low = self.subclass_model.encoder.low_level(images[:subclassed])
        if self.share != "all":
            high = self.subclass_model.encoder.high_level(low)
        return *logits, *self.classify(self.subclass_model, low, high, labeled, size)

    def classify(self, model: nn.Module, low: Tensor, high: Tensor, labeled: int, size) -> tuple:
        z = model.decode(low, high)
        cells = F.avg_pool2d(z[labeled:], model.cell)  # without an odd border, unlike stage 2's
        return resize(model.classifier(z[:labeled]).float(), size), model.classifier(cells).float()


def make_views(batch: dict[str, Tensor], photometry: Photometry,
               parent_of: Tensor | None) -> dict[str, Tensor]:
    """Weak crops, uint8 -> normalised views; with `parent_of` [K] "label" holds subclasses."""
    views = {**batch, "labeled": normalize(batch["labeled"])}
    if parent_of is not None:
        parents = F.pad(parent_of, (0, IGNORE + 1 - len(parent_of)), value=IGNORE)
        views["subclass"], views["label"] = batch["label"], parents[batch["label"].long()].byte()
    if "unlabeled" in batch:
        weak = to_float(batch["unlabeled"])
        views["weak"] = normalize(weak)
        views["strong"] = normalize(strong_augment(weak, photometry))
    return views


def at_cells(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, H, W] -> [B, h, w]: the values in the middle of each cell of a grid of `size`."""
    rows, columns = (((torch.arange(cells, device=mask.device) + 0.5) * pixels / cells).long()
                     for pixels, cells in zip(mask.shape[1:], size))
    return mask[:, rows][:, :, columns]


def usrn_loss(network, views: dict[str, Tensor], parent_of: Tensor | None,
              config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """One step through Eq. 2-8 with the parts of config.model: (loss, terms for the log)."""
    parts, threshold = MODELS[config.model], config.threshold
    images, size = views["labeled"], len(views["labeled"])
    if "OST" in parts:  # batch norm sees labeled and weak images together, strong ones apart
        images = torch.cat([images, views["weak"]])
    subclassed = size * (("MSL" in parts) + ("USR" in parts))  # of labeled, then weak images
    logits, logits_weak, sub_logits, sub_logits_weak = network(images, size, subclassed)

    loss = supervised_loss(logits, views["label"], config.ohem)
    terms = {"loss_sup": loss}
    if "MSL" in parts:
        terms["loss_sup_sub"] = supervised_loss(sub_logits, views["subclass"])
        loss = loss + config.lambda_sub * terms["loss_sup_sub"]  # Eq. 2
    if "OST" not in parts:
        return loss, {"loss": loss, **terms}

    _, logits_strong, _, sub_logits_strong = network(views["strong"], 0, size * ("SST" in parts))
    with torch.no_grad():
        valid = at_cells(views["valid"], logits_weak.shape[2:])
        num_cells = mean_over_ranks(valid.sum())
        probs = regularized = logits_weak.softmax(dim=1)
        own_label, confident = select(probs, threshold)
        if "USR" in parts:
            sub_probs = sub_logits_weak.softmax(dim=1)
            seen, gate = parent_of[sub_probs.argmax(dim=1)], torch.ones_like(valid)  # Eq. 4
            if "EGM" in parts:
                gate, seen = entropy_gate(probs, sub_probs, parent_of, config.gate)
            regularized = regularize(probs, seen, gate)  # Eq. 4, 6
        # Where the gate is closed, F's own label stays: by Section 3.3 confident predictions of F
        # are not to be regularized. By Eq. 3 and 6 such a cell would not be learned from.
        pseudo_label, used = select(regularized, threshold)
        used, vetoed = used & valid, confident & valid & ~used
    terms["loss_unsup"] = weighted_loss(logits_strong, pseudo_label, used, num_cells)  # Eq. 7
    loss = loss + config.lambda_u * terms["loss_unsup"]
    terms["used"] = used.sum() / num_cells
    if "USR" in parts:
        terms |= {"gate": (gate & valid).sum() / num_cells, "vetoed": vetoed.sum() / num_cells}
    if "SST" in parts:
        sub_label, sub_used = select(sub_probs, threshold)
        sub_used = sub_used & valid
        terms["loss_unsup_sub"] = weighted_loss(sub_logits_strong, sub_label, sub_used, num_cells)
        loss = loss + config.lambda_u * config.lambda_sub * terms["loss_unsup_sub"]  # Eq. 5, 8
        terms["used_sub"] = sub_used.sum() / num_cells
    if "truth" in views:  # for the log only
        truth = at_cells(views["truth"], logits_weak.shape[2:])
        labels = [("f_sub", seen, valid)] if "USR" in parts else []
        labels += [("f", own_label, valid), ("used", pseudo_label, used)]
        for name, label, chosen in (*labels, ("vetoed", own_label, vetoed)):
            terms[f"{name}_accuracy"] = pixel_accuracy(label, truth, chosen)
    return loss, {"loss": loss, **terms}


# ---------------------------------------------------------------- balanced k-means

BLOCK = 16384  # points whose distances or prices are computed at once


@torch.no_grad()
def balanced_kmeans(features: Tensor, num_clusters: int, seed: int, balanced=True) -> Tensor:
    """[N, D] on the CPU -> clusters int64 [N], whose sizes differ by at most one if `balanced`.

    Lloyd's, on a part of the points, as many as centroids need, until these hardly move or for 30
    steps, then at most two steps on all.
    """
    centroids = spread_centroids(features, num_clusters, torch.Generator().manual_seed(seed))
    price, enough = torch.zeros(num_clusters), max(8192, 128 * num_clusters)
    part = features[:: max(1, len(features) // enough)]
    for points, most in ((part, 30), (features, 2)):
        for _ in range(most):
            cost = squared_distances(points, centroids)
            assignment = cost.argmin(dim=1)
            if balanced:
                assignment, price = balanced_assignment(cost, price)
            before, centroids = centroids, cluster_means(points, assignment, centroids)
            spread = (centroids - centroids.mean(dim=0)).norm()
            if (centroids - before).norm() <= 0.01 * spread:
                break
    return assignment


def spread_centroids(features: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur, Vassilvitskii, 2007): points drawn by squared distance to drawn ones."""
    some = torch.randperm(len(features), generator=generator)[: max(64 * num_clusters, 2048)]
    sample, distance = features[some].float(), torch.tensor(math.inf)
    centroids = sample[:1]
    while len(centroids) < num_clusters:
        distance = torch.minimum(distance, (sample - centroids[-1]).square().sum(dim=1))
        drawn = torch.multinomial(distance + 1e-30, 1, generator=generator)  # all may be taken
        centroids = torch.cat([centroids, sample[drawn]])
    return centroids


def squared_distances(points: Tensor, centroids: Tensor) -> Tensor:
    """[N, D], float32 [K, D] -> float32 [N, K]."""
    middle = centroids.mean(dim=0)  # far from the origin, rounding would hide distances
    return torch.cat([torch.cdist(block.float() - middle, centroids - middle).square_()
                      for block in points.split(BLOCK)])


def cluster_means(points: Tensor, assignment: Tensor, centroids: Tensor) -> Tensor:
    """The mean of each cluster's points, [K, D]; of one without points the old centroid."""
    sums = torch.zeros_like(centroids).index_add_(0, assignment, points.float())
    sizes = torch.bincount(assignment, minlength=len(centroids)).unsqueeze(1)
    return torch.where(sizes > 0, sums / sizes.clamp(min=1), centroids)


def guess_prices(cost: Tensor, price: Tensor) -> Tensor:
    """Sinkhorn's iteration (Cuturi, 2013): even soft assignments, harder and harder; prices [K]."""
    points, clusters = cost.shape
    price, temperature = price.to(cost.dtype), cost.mean() / 50 + 1e-30
    for _ in range(10):
        share = sum((-(rows + price) / temperature).softmax(dim=1).sum(dim=0)
                    for rows in cost.split(BLOCK)) * clusters / points
        price = price + temperature * share.clamp(min=0.01).log()
        temperature = 0.8 * temperature
    return price.double()


def balanced_assignment(cost: Tensor, price: Tensor) -> tuple[Tensor, Tensor]:
    """Clusters int64 [N], N / K points each (rounded), at the least sum of cost [N, K]; prices [K].

    Successive shortest paths (Ahuja, Magnanti and Orlin, "Network Flows", 1993, section 9.7): first
    all points are where cost + price is least, which is best for sizes as they are then. Nodes are
    clusters, an edge a -> b is the point of a whose move to b costs least, and along the shortest
    path from a cluster that is too large to one that is too small, a point moves at each edge.
    """
    points, clusters = cost.shape
    if points > 16 * clusters:
        price = balanced_assignment(cost[::4], price)[1]  # a better guess
    price = guess_prices(cost, price)
    cluster = torch.cat([(rows + price).argmin(dim=1) for rows in cost.split(BLOCK)]).numpy()
    members = [np.flatnonzero(cluster == node) for node in range(clusters)]
    cost, edge, mover = cost.numpy(), np.zeros((clusters, clusters)), np.zeros((clusters,) * 2, int)

    def find_movers(a: int, to: np.ndarray) -> None:
        edge[a, to] = np.inf  # an empty cluster has no point that could move
        if len(members[a]):
            extra = cost[members[a][:, None], to].astype(float) - cost[members[a], a, None]
            edge[a, to], mover[a, to] = extra.min(axis=0), members[a][extra.argmin(axis=0)]

    for a in range(clusters):
        find_movers(a, np.arange(clusters))
    smallest, largest = points // clusters, -(-points // clusters)
    far = 2 * clusters * float(np.abs(cost).max()) or 1.0  # longer than any path
    while True:
        sizes = np.array([len(rows) for rows in members])
        # Ends of a path: 0 where a point may go or come, -far where it must, far where it must not.
        leave = far * ((sizes <= smallest) * 1.0 - (sizes > largest))
        enter = far * ((sizes >= largest) * 1.0 - (sizes < smallest))
        distance, before = shortest_paths(edge, leave, 1e-14 * far)
        b = int((distance + enter).argmin())
        if distance[b] + enter[b] > -1e-13 * far:  # all prefer where they are at these prices
            return torch.from_numpy(cluster), torch.from_numpy(distance.mean() - distance)
        while before[b] >= 0:
            a = before[b]
            point = mover[a, b]
            cluster[point] = b
            members[a] = members[a][members[a] != point]
            members[b] = np.append(members[b], point)
            find_movers(a, np.flatnonzero(mover[a] == point))  # other edges of a stay as they are
            extra = cost[point].astype(float) - cost[point, b]
            mover[b] = np.where(extra < edge[b], point, mover[b])
            edge[b] = np.minimum(extra, edge[b])
            b = a


def shortest_paths(edge: np.ndarray, start: np.ndarray, tolerance: float) -> tuple:
    """Bellman-Ford: edges [K, K], distances at the start -> distances, predecessors or -1."""
    distance, before, shorter = start.copy(), np.full(len(start), -1), True
    while np.any(shorter):
        through = distance[:, None] + edge
        shorter = through.min(axis=0) < distance - tolerance
        before[shorter] = through[:, shorter].argmin(axis=0)
        distance[shorter] = through[before[shorter], shorter]
    return distance, before


# ---------------------------------------------------------------- stage 2: subclasses


def class_balance_rate(counts: Tensor) -> float:
    """CBR of Eq. 9 for the pixels or cells of each class [C], in [0, 1]; nan where it is 0 / 0."""
    counts = counts.double()
    worst = counts.sum() * (len(counts) - 1) ** 0.5 / len(counts)  # the deviation of (N, 0, ..., 0)
    return float(1 - counts.std(correction=0) / worst)


def subclass_counts(pixels: Tensor, most: int) -> Tensor:
    """Subclasses of each class: pixels [C] -> int64 [C], at least 1.

    Clusters are as large as the smallest class or, if these are too many, as `most` (>= C) asks.
    """
    size = int(pixels[pixels > 0].min())
    while (counts := (pixels.double() / size).round().clamp(min=1).long()).sum() > most:
        size += 1
    return counts


@torch.backends.cudnn.flags(enabled=True)  # benchmark=False: it would start anew for every size
@torch.inference_mode()
def extract_features(model: nn.Module, data: Data, device: torch.device) -> tuple:
    """Of the cells of all labeled images: features float16 [N, D], labels [N]; each image's (h, w).

    A cell is a mean of 2 x 2 features (PSPNet: one): stride 8 with ResNets, of PSPNet 16.
    """
    model.eval()
    features, labels, grids = [], [], []
    for item in EvaluationSet(data.labeled, data.root, data.info.num_classes):
        z = model.features(normalize(item["image"][None].to(device)))
        z = F.avg_pool2d(z, model.cell, ceil_mode=True)[0]  # [D, h, w]
        grids.append(z.shape[1:])
        features.append(z.flatten(1).T.clamp(-65504, 65504).half().cpu())
        labels.append(at_cells(item["label"][None], z.shape[1:]).flatten())
    return torch.cat(features), torch.cat(labels).long(), grids


def make_subclasses(model: nn.Module, data: Data, files: list[Path], device: torch.device,
                    config: Config) -> dict:
    """Stage 2: write the labeled images' subclass maps; returns what subclasses.json says of them.

    A pixel has the subclass of its cell or, where that is of another class, the subclass of its own
    class whose centroid is nearest to the cell's features: subclasses divide label maps exactly.
    """
    features, labels, grids = extract_features(model, data, device)
    pixels = torch.bincount(labels, minlength=IGNORE + 1)[: data.info.num_classes]
    require(bool(pixels.any()), "no cell of the labeled images has a label: nothing to cluster")
    counts = subclass_counts(pixels, config.max_subclasses)
    parent_of = torch.arange(len(counts)).repeat_interleave(counts)
    sizes = torch.zeros(len(parent_of), dtype=torch.long)
    table = torch.full((len(labels), len(counts) + 1), IGNORE, dtype=torch.uint8)  # [cell, class]
    for parent, count in enumerate(counts.tolist()):
        first, members = int(counts[:parent].sum()), labels == parent
        table[:, parent] = first
        if members.any():
            own = features[members]
            clusters = balanced_kmeans(own, count, config.seed, config.clustering == "balanced")
            centroids = cluster_means(own, clusters, torch.zeros(count, own.shape[1]))
            distances = squared_distances(features, centroids)
            own_sizes = torch.bincount(clusters, minlength=count)
            distances[:, own_sizes == 0] = math.inf
            table[:, parent] += distances.argmin(dim=1).byte()
            table[members, parent] = (first + clusters).byte()
            sizes[first : first + count] = own_sizes

    tables, rows = table.split([h * w for h, w in grids]), []
    images = EvaluationSet(data.labeled, data.root, data.info.num_classes)
    for item, file, (h, w), of_class in zip(images, files, grids, tables):
        label, (height, width) = item["label"], item["label"].shape
        cell = (torch.arange(height) * h // height)[:, None] * w + torch.arange(width) * w // width
        map_ = of_class[cell, label.long().clamp(max=len(counts))]  # 255: from the last column
        save_indexed_png(map_, voc_palette(), file)
        if len(rows) < 6:
            rows.append((item["image"], label, colorize(map_, voc_palette())))
    picture, captions = files[0].with_name("subclasses.png"), ("image", "label", "subclasses")
    sample_grid(rows, data.info.classes, data.info.palette, picture, captions)
    cbr, sub_cbr = class_balance_rate(pixels), class_balance_rate(sizes)
    say(f"stage 2: {int(pixels.sum())} cells of {len(counts)} classes into {len(parent_of)} "
        f"subclasses; class balance rate {100 * cbr:.1f} % -> {100 * sub_cbr:.1f} %")
    return {"parent_of": parent_of.tolist(), "cells": pixels.tolist(), "sizes": sizes.tolist(),
            "cbr_classes": cbr, "cbr_subclasses": sub_cbr}


def stages_1_and_2(config: Config, data: Data, device: torch.device) -> tuple[Tensor, Data]:
    """Stages 1 and 2, or what they left: parents int64 [K], and `data` labeled with subclasses."""
    folder, steps = Path(config.output) / "subclasses", config.supervised_iterations
    record = folder / "subclasses.json"
    files = [folder / f"{k:05}_{sample.name[:60]}.png" for k, sample in enumerate(data.labeled)]
    own = {"clustering": config.clustering, "most": config.max_subclasses, "lists": config.lists}
    if not all(file.is_file() for file in (record, *files)):
        options = {name: getattr(Config, name) for name in STAGE_3_OPTIONS}
        options |= {"iterations": steps, "eval_every": steps, "model": "baseline",
                    "save_every": config.save_every or config.eval_every,
                    "output": str(folder.with_name("supervised"))}
        model = train(replace(config, **options), data, device)
        with main_first():
            if rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)
                write_json(record, own | make_subclasses(model, data, files, device, config))
    made = {"lists": config.lists, **read_json(record)}  # not in older ones
    require("parent_of" in made, f"{folder} must be one folder for all nodes")
    require(own.items() <= made.items(), f"{folder} is of other images, --clustering or "
                                         f"--max-subclasses: take another --output")
    labeled = [Sample(sample.image, str(file.resolve()))
               for sample, file in zip(data.labeled, files)]
    classes = [f"{data.info.classes[parent]}, {k}" for k, parent in enumerate(made["parent_of"])]
    info = replace(data.info, classes=tuple(classes))  # for the warning of empty ones
    return torch.tensor(made["parent_of"], device=device), replace(data, labeled=labeled, info=info)


# ---------------------------------------------------------------- training


def build_network(config: dict, num_classes: int, weights: str) -> nn.Module:
    model = ARCHITECTURES[config["architecture"]](config["backbone"], num_classes, weights)
    if config.get("network") == "released":  # not in older checkpoints
        model.add_dropout_and_multi_grid()
    return model


def train(config: Config, data: Data, device: torch.device, parent_of: Tensor | None = None,
          subclass_data: Data | None = None) -> nn.Module:
    """Stage 1 (model "baseline"), or 3 with what `stages_1_and_2` returns: F, in eval mode."""
    options, self_training = asdict(config), "OST" in MODELS[config.model]
    torch.manual_seed(config.seed)
    model = build_network(options, data.info.num_classes, config.weights)
    models = {"model": model}
    if parent_of is not None:
        models["subclass_model"] = build_network(options, len(parent_of), config.weights)
    both = USRN(**models, share=config.share)
    if world_size() > 1 and device.type == "cuda":
        both = nn.SyncBatchNorm.convert_sync_batchnorm(both)
    if config.checkpoint_activations:
        checkpoint_activations(both, config.compile)
    both.to(device, memory_format=torch.channels_last)
    network = torch.compile(both) if config.compile else both
    if world_size() > 1:
        network = nn.parallel.DistributedDataParallel(network, **KEEP_BUFFERS)
    groups = [group for part in models.values()
              for group in part.parameter_groups(config.lr, config.head_lr_multiplier)
              if group["params"]]  # none of an encoder that is shared
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, config.iterations, power=0.9)
    state = {**models, "optimizer": optimizer, "schedule": schedule}
    torch.manual_seed(config.seed + 1000 * rank())  # ranks augment differently
    checkpoint = Checkpoint(config.output, "usrn", options, state)
    start = checkpoint.load()
    log = Log(checkpoint, start, config.batch_size * (1 + self_training))
    loader = training_loader(subclass_data or data, config.crop, config.batch_size, config.seed,
                             start, config.iterations, device, self_training, config.num_workers)

    scores = partial(evaluate, model, data, config.eval_split, config.crop, device,
                     config.num_workers)
    milestones = Milestones(checkpoint, log, model, scores)
    for step, batch in enumerate(loader, start + 1):
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        views = make_views(batch, data.info.photometry, parent_of)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
            loss, terms = usrn_loss(network, views, parent_of, config)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()

        log.step(step, terms)
        milestones.after(step)  # saves, leaves when told to, evaluates

    write_samples(model.eval(), data, config.crop, device, checkpoint.folder / "samples.png")
    return model


def run_stages(config: Config) -> None:
    _, _, device = init_distributed(config.device)
    data = load_data(config)
    classes, most = data.info.num_classes, IGNORE  # 0 to 254: what label maps can hold
    if data.info.embedded:  # with more subclasses Eq. 5 runs away further: .docs/usrn.md
        most = min(max(classes, len(data.labeled)), most)
    config = with_defaults(config, **data.recipe(config.batch_size, config.epochs),
                           amp=bf16_is_fast(device), output=f"runs/usrn_{data.tag}_{config.seed}",
                           max_subclasses=most)
    config = with_defaults(config, supervised_iterations=max(1, config.iterations // 4))
    parts = MODELS[config.model]
    require(classes <= config.max_subclasses, f"--max-subclasses must be >= {classes}, the classes")
    require("OST" not in parts or bool(data.unlabeled), "no unlabeled image: --model baseline or I")
    require(config.network == "plain" or config.architecture != "pspnet", "--network: not PSPNet's")
    others = read_json(Path(config.output) / "config.json").get("method", "usrn") != "usrn"
    require(not others, f"{config.output} holds a run of another method: choose another --output")
    subclasses = stages_1_and_2(config, data, device) if "MSL" in parts else ()
    train(config, data, device, *subclasses)


def build_predictor(config: dict, num_classes: int, state: dict[str, Tensor]) -> nn.Module:
    """What common.evaluate and common.predict make of a checkpoint: images -> logits."""
    model = build_network(config, num_classes, random_weights_like(state))
    return load_strictly(model, state, "the checkpoint's weights")


if __name__ == "__main__":
    run_main(lambda: run_stages(parse(Config, description=__doc__)))
