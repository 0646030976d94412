"""USRN: Unbiased Subclass Regularization for Semi-Supervised Semantic Segmentation (Guan et al., CVPR 2022).

Idea. Labeled pixels are imbalanced, so a network trained on them is biased towards large classes, and so are its pseudo
labels. Cluster the labeled pixels of every class into subclasses of the size of the smallest class: a second network F_sub
that learns these balanced subclasses is not biased. On unlabeled images, where F_sub is surer than the first network F, a
pseudo label must be of the class that F_sub sees. Only F is used afterwards.

    stage 1    F is trained on labeled images                            train_stage, model "baseline"
    stage 2    its features of labeled pixels are clustered              cluster_labels, balanced_kmeans, subclass_counts
    stage 3    F and F_sub are trained together, from the start          train_stage

    Eq. 2      supervised loss on classes and on subclasses              usrn_loss, supervised_loss
    Eq. 3      S: pseudo labels above the threshold gamma                select
    Eq. 4      F's prediction, times the class that F_sub sees           regularize
    Eq. 5      self-training of F_sub                                    usrn_loss
    Eq. 6, 7   the same as Eq. 4 where F_sub has the lower entropy       entropy_gate, regularize
    Eq. 8      total loss                                                usrn_loss
    Eq. 9      class balance rate                                        class_balance_rate

                      paper                      released code              here
    clusters per      pixels / pixels of the     typed in for each data     rounded ratio, at least 1; in all at most one a labeled
    class             smallest class             set's lists                image, see below (--max-subclasses 255: the paper's;
                                                                            differs on its lists of 165 and of Cityscapes' 93)
    clustering        balanced k-means           "regularized k-means" in   exact balanced assignment (common.kmeans)
                                                 C++, through CSV files
    features          not said                   best validation epoch,     last iteration, twice the features' stride (8 with
                                                 stride 8                   ResNets), 2 x 2 averaged
    pixels counted    of the labels              of the cells               of the cells; classes without any count as 0 in CBR
    strong view       colour jitter, blur        blur, grayscale, jitter    the recipe of all files here: the same, with jitter
                                                 0.4, 0.4, 0.4, 0.1         0.5, 0.5, 0.5, 0.25
    subclass maps     not said                   nearest cell, whatever     nearest cell; where that is of another class, the class's
                                                 the pixel's own class      centroid nearest to its features: subclasses divide
                                                                            the label map exactly
    entropies (Eq. 6) of parents                 of subclasses / log K,     parents: --gate parents | subclasses
                                                 against F's / log C
    class of F_sub    one-hot of M(p*) (Eq. 6)   parent of the likeliest    parent of the likeliest subclass: sums over parents
                      or M(one-hot) (Eq. 4)      subclass                   would favour large classes again (not measured)
    threshold, Eq. 6  of the one-hot, as printed of F's probability in the  of F's probability in the class
                                                 class
    gate closed       "no back-propagation"      F's own pseudo label       F's own pseudo label
    unlabeled losses  not said                   at stride 8, all pixels    on 2 x 2 averaged features (--pool), valid pixels
    batch norm        not said                   labeled, weak and strong   labeled with weak, strong apart, as UniMatch
                                                 apart
    stage 1's length  not said                   as stage 3                 a quarter of it (--supervised-iterations)
    start of stage 3  not said                   ImageNet                   ImageNet
    dropout           not said                   0.5 and 0.1 in the head    none: DeepLabv3+ of all files here
    learning rate     1e-3                       1e-3, head 1e-2            the recipe's: on PASCAL the same
    crop              320                        320                        321
    share "all"       both features              -                          the encoder; ASPP and decoder are F_sub's own

With gamma >= 0.5, Eq. 4 and 6 never change a pseudo label: where F_sub sees another class, F's confidence in it is below one
half, and the pixel is left out. Regularization here means that F_sub may veto.

Eq. 5 thresholds the confidence in one subclass. A class of many subclasses shares its probability among them and is rarely
above gamma, so that pseudo labels of F_sub are mostly of classes with few. Where clusters are as small as patches of single
images, which F_sub cannot tell apart, this runs away: on the embedded data with 83 subclasses of 24 images, F_sub ended by
seeing small classes everywhere and vetoed what was right (README). Hence our limit on the number of subclasses.

Commands
    python usrn.py                                                                          embedded data
    python usrn.py --dataset pascal --data-root VOC2012 --labeled 92 --backbone resnet50    one GPU
    torchrun --nproc_per_node=8 usrn.py --dataset pascal --data-root VOC2012 --labeled 92 --backbone resnet50

A run folder also holds supervised/ (stage 1, a run folder like any other) and subclasses/ (stage 2: PNG maps, subclasses.json,
subclasses.png). Both are used again as long as the options and labeled images that they depend on are the same, and made
anew otherwise.

Measured on the embedded data (24 labels, mIoU, one to three seeds; README): labeled only 51.7, Model I 51.0, II 57.6, III 57.2,
IV 56.0, USRN 56.7, with plain k-means 54.9: subclasses do not help there. PASCAL has not been run.

Ablations: --model baseline | self-training | I | II | III | IV | USRN (Table 3), --clustering (Table 4), --share (Table 5),
--threshold (Table 6), --architecture (Table 9), --gate.
"""

import dataclasses
import hashlib
import json
import math
import shutil
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, runtime
from common.data import IGNORE, Data, Sample, load_data
from common.deeplab import ARCHITECTURES, DeepLabV3Plus
from common.files import open_picture, read_checkpoint, write_json
from common.kmeans import balanced_kmeans, kmeans, means
from common.loading import EvaluationSet, class_pixels, training_loader
from common.ohem import hard_pixel_loss
from common.options import RESUMABLE, TrainingOptions, fill_from_recipe, option, parse, require
from common.pictures import colorize, sample_grid, save_indexed_png
from common.run import Run, check_options
from common.runtime import Context, pixel_counts

MODELS = {  # Table 3
    "baseline": (),
    "self-training": ("OST",),
    "I": ("MSL",),
    "II": ("MSL", "OST"),
    "III": ("MSL", "OST", "USR"),
    "IV": ("MSL", "OST", "USR", "SST"),
    "USRN": ("MSL", "OST", "USR", "SST", "EGM"),
}
MOST_SUBCLASSES = 255  # 0 to 254: what a PNG with 255 = ignore can hold


@dataclass
class Config(TrainingOptions):
    model: str = option("USRN", "row of Table 3: I (MSL, supervised losses of both), II (+ OST, self-training of F), III (+ USR, Eq. 4), "
                                "IV (+ SST, Eq. 5), USRN (+ EGM, Eq. 6); without F_sub: baseline (labeled images) or self-training",
                        choices=tuple(MODELS))
    threshold: float = option(0.75, "gamma of Eq. 3 (Table 6)")
    gate: str = option("parents", "whose entropies Eq. 6 compares: of F_sub's probabilities summed over parents, or of subclasses, each "
                                  "divided by the log of their number (released code)", choices=("parents", "subclasses"))
    lambda_sub: float = option(1.0, "weight of F_sub's losses, Eq. 2 and 8")
    lambda_u: float = option(1.0, "weight of the losses on unlabeled images, Eq. 8")
    clustering: str = option("balanced", "balanced or plain k-means (Table 4)", choices=("balanced", "plain"))
    share: str = option("low", "what F and F_sub share (Table 5): nothing, the stem and stage 1, or the whole encoder", choices=("none", "low", "all"))
    architecture: str = option("deeplabv3plus", "of both networks (Table 9, without PSANet)", choices=tuple(ARCHITECTURES))
    max_subclasses: int | None = option(None, "subclasses in all; clusters are larger than the smallest class where these would be more. "
                                              "Default: the labeled images, 255 at most; 255: the paper's rule")
    pool: int = option(2, "unlabeled losses at features averaged over so many cells each way; 0: at the pixels of the crop")
    supervised_iterations: int | None = option(None, "length of stage 1; default: a quarter of --iterations")
    retrain: bool = option(False, "start stage 3 anew though --output holds one of other options; its checkpoints are deleted")


# ================================================================ the method


def class_balance_rate(counts: Tensor) -> float:
    """CBR of Eq. 9 in [0, 1] for the pixels of each class, [C]: 1 if all are equal, 0 if all pixels are of one class.

    nan for a single class and for no pixel at all, where the equation is 0 / 0.
    """
    counts = counts.double()
    deviation = counts.std(correction=0)
    worst = counts.sum() * (len(counts) - 1) ** 0.5 / len(counts)  # the deviation of (N, 0, ..., 0)
    return float(1 - deviation / worst)


def subclass_counts(pixels: Tensor, most: int = MOST_SUBCLASSES) -> Tensor:
    """How many subclasses each class gets, int64 [C], for its pixels [C]: as many as clusters of the smallest class's size.

    Every class has one at least, also one without pixels. If all of them are more than `most`, clusters become larger, by the
    least whole number of pixels that is enough. Raises ValueError for more classes than `most`.
    """
    if len(pixels) > most:
        raise ValueError(f"{len(pixels)} classes cannot have {most} subclasses")
    pixels = pixels.double()

    def counts(size: int) -> Tensor:
        return (pixels / size).round().clamp(min=1).long()

    low = int(pixels[pixels > 0].min()) if bool((pixels > 0).any()) else 1
    high = max(low, int(pixels.max()))  # one each
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if int(counts(middle).sum()) <= most else (middle + 1, high)
    return counts(low)


def subclasses_to_parents(probs: Tensor, parent_of: Tensor, num_classes: int | None = None) -> Tensor:
    """M of Eq. 4 and 7: probabilities of subclasses [B, K, ...] -> of classes [B, C, ...], by summing; parent_of: int64 [K].

    `num_classes`: C; without it the largest parent says, which waits for the device.
    """
    num_classes = num_classes or int(parent_of.max()) + 1
    return probs.new_zeros(len(probs), num_classes, *probs.shape[2:]).index_add_(1, parent_of, probs)


def select(probs: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """S of Eq. 3: probs [B, C, ...] -> pseudo labels int64 [B, ...] and where they are used, bool: above the threshold."""
    confidence, pseudo_label = probs.max(dim=1)
    return pseudo_label, confidence > threshold


def entropy(probs: Tensor) -> Tensor:
    """[B, C, ...] -> [B, ...] in [0, 1]: divided by log C."""
    return torch.special.entr(probs).sum(dim=1) / math.log(probs.shape[1])


def entropy_gate(probs: Tensor, sub_probs: Tensor, parent_of: Tensor, compare: str = "parents") -> Tensor:
    """Where F_sub may regularize F, bool [B, ...]: its entropy is the lower one (Eq. 6).

    probs [B, C, ...] of F, sub_probs [B, K, ...] of F_sub. `compare`: entropies of "parents" (Eq. 7) or of "subclasses".
    """
    if compare == "parents":
        sub_probs = subclasses_to_parents(sub_probs, parent_of, probs.shape[1])
    return entropy(sub_probs) < entropy(probs)


def regularize(probs: Tensor, sub_probs: Tensor, parent_of: Tensor, gate: Tensor | None = None) -> Tensor:
    """F's probabilities [B, C, ...], zero but for the class that F_sub sees (Eq. 4); only where `gate` is True (Eq. 6)."""
    seen = parent_of[sub_probs.argmax(dim=1)]
    other = torch.arange(probs.shape[1], device=probs.device).view(1, -1, *[1] * (probs.dim() - 2)) != seen.unsqueeze(1)
    return probs.masked_fill(other if gate is None else other & gate.unsqueeze(1), 0)


def supervised_loss(logits: Tensor, label: Tensor, ohem: float = 0.0) -> Tensor:
    """Sum of the cross entropy over labeled pixels, or hard ones (`ohem`): logits [B, C, H, W], label [B, H, W] with 255 = ignore."""
    if ohem:
        return hard_pixel_loss(F.cross_entropy(logits.float(), label.long(), ignore_index=IGNORE, reduction="none"), label, ohem)
    return F.cross_entropy(logits.float(), label.long(), ignore_index=IGNORE, reduction="sum")


def self_training_loss(logits: Tensor, pseudo_label: Tensor, used: Tensor) -> Tensor:
    """Sum of the cross entropy over the pixels that are used: logits [B, C, H, W], pseudo_label and used [B, H, W]."""
    return (F.cross_entropy(logits.float(), pseudo_label, reduction="none") * used).sum()


class USRN(nn.Module):
    """F and F_sub, which share the encoder's first part, nothing or the whole encoder.

    forward(images [B, 3, H, W], cells=k, subclasses=n) -> logits of the first B - k images [B-k, C, H, W] and of the last k at the
    resolution of the unlabeled losses [k, C, h, w]; then the same of F_sub for the first n images only (None: n = 0).
    """

    def __init__(self, model: DeepLabV3Plus, subclass_model: DeepLabV3Plus | None, share: str, pool: int):
        super().__init__()
        self.model, self.subclass_model, self.share, self.pool = model, subclass_model, share, pool
        if subclass_model is not None:  # what is shared is F's
            encoder = subclass_model.encoder
            parts = {"none": (), "low": encoder.low_parts, "all": [name for name, _ in encoder.named_children()]}[share]
            for name in parts:
                delattr(encoder, name)

    def forward(self, images: Tensor, cells: int = 0, subclasses: int = 0) -> tuple:
        low = self.model.encoder.low_level(images)
        high = self.model.encoder.high_level(low)
        logits = self.classify(self.model, low, high, len(images) - cells, images.shape[2:])
        if not subclasses:
            return *logits, None, None
        if self.share == "none":
            low = self.subclass_model.encoder.low_level(images[:subclasses])
        if self.share != "all":
            high = self.subclass_model.encoder.high_level(low[:subclasses])
        sub_logits = self.classify(self.subclass_model, low[:subclasses], high[:subclasses], len(images) - cells, images.shape[2:])
        return *logits, *sub_logits

    def classify(self, model: DeepLabV3Plus, low: Tensor, high: Tensor, whole: int, size: torch.Size) -> tuple[Tensor, Tensor]:
        z = model.decode(low, high)
        if self.pool:
            z, z_cells = z[:whole], z[whole:]
            logits_cells = model.classifier(F.avg_pool2d(z_cells, self.pool)).float()
            logits = F.interpolate(model.classifier(z).float(), size=size, mode="bilinear", align_corners=True)
            return logits, logits_cells
        logits = F.interpolate(model.classifier(z).float(), size=size, mode="bilinear", align_corners=True)
        return logits[:whole], logits[whole:]


# ================================================================ stage 2: subclasses


@dataclass
class Subclasses:
    """Stage 2's result, and what a checkpoint keeps of it: maps that are no longer the same make it worthless."""

    parent_of: list[int]  # K
    folder: Path  # of the maps: <name>.png for each labeled image
    labeled: str  # SHA-256 of the labeled images and masks
    maps: str  # SHA-256 of the maps

    def state_dict(self) -> dict:
        return {"parent_of": self.parent_of, "labeled": self.labeled, "maps": self.maps}

    def load_state_dict(self, state: dict) -> None:
        if state != self.state_dict():
            raise ValueError("the labeled images or their subclasses are not those that it was trained with; --retrain starts anew")

    def labels(self, data: Data) -> Data:
        """`data` whose labeled masks are the subclass maps."""
        samples = [Sample(sample.image, str((self.folder / f"{sample.name}.png").resolve())) for sample in data.labeled]
        names = tuple(f"{data.info.classes[parent]} {number}" for number, parent in enumerate(self.parent_of))
        return dataclasses.replace(data, labeled=samples, info=dataclasses.replace(data.info, classes=names))


def cluster_labels(model: nn.Module, data: Data, config: Config, context: Context, labeled: str) -> Subclasses:
    """Stage 2: subclass maps of the labeled images from F's features, or those of an earlier run if nothing has changed."""
    folder = Path(config.output) / "subclasses"
    key = {"labeled": labeled, "model": sha256_of_state(model), "clustering": config.clustering, "max_subclasses": config.max_subclasses,
           "seed": config.seed}
    group = dist.new_group(backend="gloo", timeout=timedelta(days=1)) if context.world_size > 1 else None  # others wait while rank 0 clusters
    record = read_record(folder, key, data) if context.is_main else None
    if group:
        shared = [record]
        dist.broadcast_object_list(shared, src=0, group=group)
        record = shared[0]
    if record is None:
        mine = extract_features(model, data.labeled[context.rank :: context.world_size], data, context)
        parts = [mine]
        if group:
            parts = [None] * context.world_size if context.is_main else None
            dist.gather_object(mine, parts, dst=0, group=group)
        if context.is_main:
            cells = {name: value for part in parts for name, value in part.items()}
            del mine, parts  # gigabytes
            record = write_subclasses(folder, [cells[sample.name] for sample in data.labeled], data, config, key, context.device)
        if group:
            shared = [record]
            dist.broadcast_object_list(shared, src=0, group=group)
            record = shared[0]
    elif context.is_main:
        print(f"stage 2: {len(record['parent_of'])} subclasses from {folder}", flush=True)
    return Subclasses(record["parent_of"], folder, labeled, record["maps"])


def sha256_of_state(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def sha256_of_file(path: Path) -> bytes:
    with open_picture(path) as file:
        return hashlib.sha256(file.read()).digest()


def sha256_of_labeled(data: Data) -> str:
    """Of the labeled images and masks with their names, in the list's order."""
    digest = hashlib.sha256()
    for sample in data.labeled:
        for file in (sample.image, sample.mask):
            digest.update(file.encode() + b"\0" + sha256_of_file(data.root / file))
    return digest.hexdigest()


def sha256_of_maps(folder: Path, data: Data) -> str | None:
    """Of the subclass maps; None if one is missing."""
    files = [folder / f"{sample.name}.png" for sample in data.labeled]
    if not all(file.is_file() for file in files):
        return None
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def read_record(folder: Path, key: dict, data: Data) -> dict | None:
    """subclasses.json, if it is of this key and its maps are as it left them."""
    try:
        record = json.loads((folder / "subclasses.json").read_text())
        return record if record["key"] == key and record["maps"] == sha256_of_maps(folder, data) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@torch.inference_mode()
def extract_features(model: nn.Module, samples: list[Sample], data: Data, context: Context) -> dict[str, tuple[Tensor, Tensor]]:
    """name -> features of the image's cells, float16 [h, w, D], and their labels uint8 [h, w]; a cell is 2 x 2 features (PSPNet: one)."""
    model.eval()
    tuning, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # it would start anew for every size
    cells = {}
    for item in EvaluationSet(samples, data.root, data.info.num_classes):
        features = F.avg_pool2d(model.features(augment.normalize(item["image"][None].to(context.device))), model.cell, ceil_mode=True)
        rows, columns = (cell_centres(pixels, count) for pixels, count in zip(item["label"].shape, features.shape[2:]))
        cells[item["name"]] = features[0].permute(1, 2, 0).clamp(-65504, 65504).half().cpu(), item["label"][rows][:, columns]
    model.train()
    torch.backends.cudnn.benchmark = tuning
    return cells


def cell_centres(pixels: int, cells: int, device: torch.device | str = "cpu") -> Tensor:
    """The pixel in the middle of each of the cells that a line of pixels is divided into, int64 [cells]."""
    return ((torch.arange(cells, device=device) + 0.5) * pixels / cells).long()


def write_subclasses(folder: Path, cells: list[tuple[Tensor, Tensor]], data: Data, config: Config, key: dict, device: torch.device) -> dict:
    """Cluster the cells of each class; write the maps, subclasses.png and at last subclasses.json, whose content is returned."""
    shutil.rmtree(folder, ignore_errors=True)
    features = torch.cat([feature.flatten(0, 1) for feature, _ in cells])
    labels = torch.cat([label.flatten() for _, label in cells]).long()
    pixels = torch.bincount(labels, minlength=IGNORE + 1)[: data.info.num_classes]
    require(bool(pixels.any()), "no cell of the labeled images has a label: there is nothing to cluster")
    counts = subclass_counts(pixels, config.max_subclasses)
    parent_of = torch.arange(len(counts)).repeat_interleave(counts)
    smallest = int(pixels[pixels > 0].min())
    wanted = int(subclass_counts(pixels, int(pixels.sum()) + len(pixels)).sum())
    if wanted > config.max_subclasses:
        print(f"stage 2: the smallest class has {smallest} of {int(pixels.sum())} cells; clusters of its size would be {wanted} in all. They are "
              f"made larger, so that there are {len(parent_of)} (--max-subclasses {config.max_subclasses})", flush=True)
    before = time.monotonic()
    subclass = cluster_cells(features.to(device), labels.to(device), counts, config).cpu()
    clustering = round(time.monotonic() - before, 2)
    sizes = torch.bincount(subclass, minlength=IGNORE + 1)[: len(parent_of)]
    known = subclass != IGNORE
    centroids = means(features[known], subclass[known], torch.full((len(parent_of), features.shape[1]), 1e4))  # empty ones: far away
    shown, of_maps, palette = [], torch.zeros(IGNORE + 1, dtype=torch.long), subclass_palette(parent_of, data.info.palette)
    for (feature, label), own, sample in zip(cells, subclass.split([label.numel() for _, label in cells]), data.labeled):
        item = EvaluationSet([sample], data.root, len(counts))[0]
        map_ = subclass_map(feature, own.view(label.shape), centroids, parent_of, item["label"])
        save_indexed_png(map_, palette, folder / f"{sample.name}.png")
        of_maps += torch.from_numpy(np.bincount(map_.ravel(), minlength=IGNORE + 1))
        if len(shown) < 6:
            shown.append((item["image"].numpy(), item["label"].numpy(), colorize(map_, palette)))
    sample_grid(shown, data.info.classes, data.info.palette, folder / "subclasses.png", ("image", "label", "subclasses"))
    record = {"key": key, "parent_of": parent_of.tolist(), "subclasses": counts.tolist(), "cells": pixels.tolist(), "sizes": sizes.tolist(),
              "cbr_classes": class_balance_rate(pixels), "cbr_subclasses": class_balance_rate(sizes),
              "cbr_maps": class_balance_rate(of_maps[: len(parent_of)]), "clustering_seconds": clustering,
              "maps": sha256_of_maps(folder, data)}
    write_json(folder / "subclasses.json", record)
    print(f"stage 2: {int(pixels.sum())} cells of {len(counts)} classes into {len(parent_of)} subclasses in {clustering:.1f} s; class "
          f"balance rate {100 * record['cbr_classes']:.1f} % -> {100 * record['cbr_subclasses']:.1f} %", flush=True)
    return record


def cluster_cells(features: Tensor, labels: Tensor, counts: Tensor, config: Config) -> Tensor:
    """Subclass of each cell, int64 [N], for its features [N, D] and label [N]; 255 where there is none. counts [C]: `subclass_counts`."""
    cluster = balanced_kmeans if config.clustering == "balanced" else kmeans
    subclass, first = torch.full_like(labels, IGNORE), 0
    for label, count in enumerate(counts.tolist()):
        chosen = (labels == label).nonzero().squeeze(1)
        if len(chosen):
            subclass[chosen] = first + (cluster(features[chosen], count, config.seed) if count > 1 else 0)
        first += count
    return subclass


def subclass_map(features: Tensor, subclass: Tensor, centroids: Tensor, parent_of: Tensor, label: Tensor) -> np.ndarray:
    """Subclasses of an image's pixels, uint8 [H, W], which divide the classes of its label map [H, W]; 255 stays 255.

    A pixel has the subclass of its cell (`subclass` [h, w]) or, where the cell is of another class, the subclass of its own class
    whose centroid is nearest to the cell's features [h, w, D].
    """
    distance = torch.cdist(features.flatten(0, 1).float(), centroids)
    by_class = torch.stack([distance.masked_fill(parent_of != parent, torch.inf).argmin(dim=1) for parent in range(int(parent_of.max()) + 1)], dim=1)
    own = subclass.flatten()
    known = own != IGNORE
    by_class[known, parent_of[own[known]]] = own[known]
    rows, columns = ((torch.arange(pixels) * cells // pixels) for pixels, cells in zip(label.shape, subclass.shape))
    cell = rows[:, None] * subclass.shape[1] + columns
    found = by_class[cell, label.long().clamp(max=by_class.shape[1] - 1)]
    return torch.where(label == IGNORE, IGNORE, found).byte().numpy()


def subclass_palette(parent_of: Tensor, palette) -> list[tuple[int, int, int]]:
    """A colour for each subclass: its class's, lighter or darker and with a tint of its own."""
    random = np.random.default_rng(0)
    return [tuple(np.clip(0.6 * np.array(palette[parent]) + 0.4 * random.integers(0, 256, 3), 0, 255).astype(int).tolist()) for parent in parent_of]


# ================================================================ training


def train(config: Config) -> dict:
    """All stages that `config.model` needs; returns the last evaluation."""
    context = runtime.start(config.device)
    data = load_data(config, context)
    on = MODELS[config.model]
    fill_from_recipe(config, "usrn", data, context, 2 if "OST" in on else 1)
    require(0 <= config.threshold < 1, f"--threshold must lie in [0, 1), not {config.threshold}")
    require(0 <= config.pool <= config.crop // 16, f"--pool must lie in [0, crop / 16], not {config.pool}")  # a few cells at least
    per_part = config.batch_size // (context.world_size * config.grad_accum)
    require(per_part > 1 or context.device.type == "cuda" and context.world_size > 1, f"--batch-size {config.batch_size} leaves one labeled "
            f"(or strong) image a rank and part: batch norm needs two")
    if config.max_subclasses is None:
        config.max_subclasses = min(max(data.info.num_classes, len(data.labeled)), MOST_SUBCLASSES)
    require(data.info.num_classes <= config.max_subclasses <= MOST_SUBCLASSES, f"--max-subclasses takes {data.info.num_classes} (the classes "
            f"of {data.info.name}) to {MOST_SUBCLASSES}, not {config.max_subclasses}")
    require("OST" not in on or bool(data.unlabeled), "no unlabeled image is left: add --model baseline or I")
    require(config.supervised_iterations is None or config.supervised_iterations >= 1, "--supervised-iterations must be at least 1")
    if config.supervised_iterations is None:
        config.supervised_iterations = max(1, config.iterations // 4)
    names = [sample.name for sample in data.labeled]
    require("MSL" not in on or len({*names, "subclasses"}) == len(names) + 1, "two labeled images have the same file name, or one is called "
            "subclasses: their subclass maps would be one file")
    retrain, config.retrain = config.retrain, False
    labeled = sha256_of_labeled(data)
    problem, subclasses = earlier_run(config, data, labeled, context)  # before hours are spent on stages that it could not go on from
    require(problem is None or retrain, problem)
    if "MSL" in on and subclasses is None:
        subclasses = cluster_labels(train_supervised(config, data, context, labeled), data, config, context, labeled)
        problem = problem or "its subclasses are no longer there"
    if retrain and problem and context.is_main:
        for name in ("latest.pt", "best.pt", "results.json", "metrics.jsonl"):
            (Path(config.output) / name).unlink(missing_ok=True)
    runtime.barrier()
    return train_stage(config, data, context, subclasses)[1]


def earlier_run(config: Config, data: Data, labeled: str, context: Context) -> tuple[str | None, Subclasses | None]:
    """Why this run cannot go on from the latest.pt of its folder (None: it can, or there is none), and the subclasses of that if
    their maps are still there: then stages 1 and 2 are not needed any more."""
    latest, maps = Path(config.output) / "latest.pt", Path(config.output) / "subclasses"
    if not latest.is_file():
        return None, None
    checkpoint = read_checkpoint(latest)
    try:
        check_options(checkpoint, "usrn", config, latest.parent, "choose another --output, or --retrain to delete it")
    except runtime.UserError as error:
        return str(error), None
    kept = checkpoint.get("subclasses")
    if kept is None:
        return None, None
    if kept["labeled"] != labeled:
        return f"the labeled images are not those that {latest} was trained with: choose another --output, or --retrain to delete it", None
    if sha256_of_maps(maps, data) != kept["maps"]:
        return None, None
    if context.is_main:
        print(f"stage 2: {len(kept['parent_of'])} subclasses from {maps}", flush=True)
    return None, Subclasses(kept["parent_of"], maps, labeled, kept["maps"])


def train_supervised(config: Config, data: Data, context: Context, labeled: str) -> nn.Module:
    """Stage 1: F trained on labeled images, in the folder supervised/; what lies there is used if it is what would be made."""
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainingOptions)}
    own = Config(**{**shared, "output": str(Path(config.output) / "supervised"), "iterations": config.supervised_iterations, "model": "baseline", "architecture": config.architecture})
    own.eval_every, own.save_every = own.iterations, min(config.save_every, own.iterations)
    folder = Path(own.output)
    options = {name: value for name, value in dataclasses.asdict(own).items() if name not in RESUMABLE or name == "weights"}
    key = {"images_and_masks": labeled, "options": options}
    if context.is_main:
        try:
            same = json.loads((folder / "stage.json").read_text()) == json.loads(json.dumps(key))
        except (OSError, ValueError):
            same = False
        if not same:
            build_model(own, data.info.num_classes)  # fails where weights cannot be had, before anything is deleted
            if folder.exists():
                print(f"stage 1: {folder} was made with other options or labels; it is made anew", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            write_json(folder / "stage.json", key)
    runtime.barrier()
    return train_stage(own, data, context, None)[0]


def make_views(part: dict[str, Tensor], config: Config, blur: tuple[float, float], parent_of: Tensor | None, cells: tuple[int, int] | None) -> dict[str, Tensor]:
    """Weak crops as the loader gives them -> everything a step needs that does not depend on the network.

    Masks of unlabeled images are taken at the middle of the cells [h, w] that their losses are computed at.
    """
    views = {"labeled": augment.normalize(part["labeled"]), "label": part["label"]}
    if parent_of is not None:  # the masks are subclass maps
        views["subclass"] = part["label"]
        parents = torch.cat([parent_of, parent_of.new_full((IGNORE + 1 - len(parent_of),), IGNORE)])
        views["label"] = parents[part["label"].long()].byte()
    if "OST" in MODELS[config.model]:
        weak = augment.to_float(part["unlabeled"])
        views |= {"weak": augment.normalize(weak), "strong": augment.normalize(augment.strong_augment(weak, blur_sigma=blur))}
        rows, columns = (cell_centres(config.crop, count, weak.device) for count in cells)
        views |= {name: part[name][:, rows][:, :, columns] for name in ("valid", "truth") if name in part}
    return views


def train_stage(config: Config, data: Data, context: Context, subclasses: Subclasses | None) -> tuple[nn.Module, dict]:
    """Stage 1 (model "baseline") or 3: train, evaluate and save; returns the trained F and its last evaluation."""
    on = MODELS[config.model]
    images_per_label = 2 if "OST" in on else 1
    runtime.seed_everything(config.seed)
    model = build_model(config, data.info.num_classes)
    subclass_model = build_model(config, len(subclasses.parent_of)) if subclasses else None
    both = USRN(model, subclass_model, config.share, config.pool)
    cells = cells_of(both, config.crop) if "OST" in on else None
    network = runtime.wrap(both, config, context)
    groups = [group for part in (model, subclass_model) if part for group in part.parameter_groups(config.lr, config.head_lr_multiplier)]
    optimizer = torch.optim.SGD([group for group in groups if group["params"]], momentum=config.momentum, weight_decay=config.weight_decay)
    state = {"model": model, "optimizer": optimizer}
    if subclasses:
        state |= {"subclass_model": subclass_model, "subclasses": subclasses}
    if config.ema_decay:
        state["ema"] = runtime.WeightAverage(model, config.ema_decay)
    runtime.seed_everything(config.seed + 1000 * context.rank)  # ranks augment differently

    run = Run("usrn", config, context, state, images_per_step=config.batch_size * images_per_label)
    start = run.begin()
    labeled_pixels = class_pixels(data)
    labels = subclasses.labels(data) if subclasses else data
    parent_of = torch.tensor(subclasses.parent_of, device=context.device) if subclasses else None
    loader = training_loader(labels, config, context, start, config.iterations, unlabeled="OST" in on)

    for iteration, batch in enumerate(loader, start):
        runtime.poly_lr(optimizer, iteration, config.iterations)
        parts = [make_views(part, config, data.info.blur, parent_of, cells) for part in runtime.split_batch(batch, config.grad_accum, context.device)]
        counts = pixel_counts(parts)
        logged = {}
        for number, views in enumerate(parts):
            last = number == len(parts) - 1
            with runtime.no_sync_unless(last, network), runtime.autocast(config, context.device):
                loss, terms = usrn_loss(network, views, counts, parent_of, config)
            with runtime.no_sync_unless(last, network):
                loss.backward()
            logged = {name: value.detach() + logged.get(name, 0.0) for name, value in terms.items()}
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if config.ema_decay:
            state["ema"].update(iteration)

        run.log(iteration, logged, slow=report)
        if run.should_evaluate(iteration):
            predict = predictor(run.evaluated_model, config)
            run.note_results(iteration, run.evaluate(predict, data, getattr(data, config.eval_split), labeled_pixels))
        run.end_of_step(iteration)

    run.write_samples(predictor(run.evaluated_model, config), data)
    run.release_signals()
    return run.evaluated_model, run.last


@torch.no_grad()
def cells_of(both: USRN, crop: int) -> tuple[int, int]:
    """Height and width at which the unlabeled losses of a crop are computed."""
    both.eval()
    logits = both(torch.zeros(1, 3, crop, crop), cells=1)[1]
    both.train()
    return tuple(logits.shape[2:])


def usrn_loss(network, views: dict, counts: dict, parent_of: Tensor | None, config: Config) -> tuple[Tensor, dict]:
    """One part of a batch through Eq. 2-8: (loss, terms for the log)."""
    on = MODELS[config.model]
    labeled = len(views["labeled"])
    if "OST" not in on:
        logits, _, sub_logits, _ = network(views["labeled"], subclasses=labeled if "MSL" in on else 0)
    else:
        unlabeled = len(views["weak"])
        of_subclasses = (labeled + unlabeled if "USR" in on else labeled) if "MSL" in on else 0
        logits, logits_weak, sub_logits, sub_logits_weak = network(torch.cat([views["labeled"], views["weak"]]), unlabeled, of_subclasses)
        _, logits_strong, _, sub_logits_strong = network(views["strong"], unlabeled, unlabeled if "SST" in on else 0)
        with torch.no_grad():
            probs = logits_weak.softmax(dim=1)
            if "USR" in on:
                sub_probs = sub_logits_weak.softmax(dim=1)
                gate = entropy_gate(probs, sub_probs, parent_of, config.gate) if "EGM" in on else torch.ones_like(views["valid"])
                regularized = regularize(probs, sub_probs, parent_of, gate)  # Eq. 4, 6
            else:
                regularized = probs
            pseudo_label, used = select(regularized, config.threshold)
            used = used & views["valid"]

    loss = loss_sup = supervised_loss(logits, views["label"], config.ohem) / counts["label"]  # Eq. 2
    terms = {"loss_sup": loss_sup}
    if "MSL" in on:
        terms["loss_sup_sub"] = supervised_loss(sub_logits, views["subclass"]) / counts["label"]
        loss = loss + config.lambda_sub * terms["loss_sup_sub"]
    if "OST" in on:
        terms["loss_unsup"] = self_training_loss(logits_strong, pseudo_label, used) / counts["valid"]  # Eq. 4 or 7
        loss = loss + config.lambda_u * terms["loss_unsup"]
        terms["used"] = used.sum() / counts["valid"]
    if "USR" in on:
        vetoed = select(probs, config.threshold)[1] & views["valid"] & ~used
        terms |= {"gate": (gate & views["valid"]).sum() / counts["valid"], "vetoed": vetoed.sum() / counts["valid"]}
    if "SST" in on:
        sub_label, sub_used = select(sub_probs, config.threshold)
        sub_used = sub_used & views["valid"]
        terms["loss_unsup_sub"] = self_training_loss(sub_logits_strong, sub_label, sub_used) / counts["valid"]  # Eq. 5
        loss = loss + config.lambda_u * config.lambda_sub * terms["loss_unsup_sub"]  # Eq. 8
        terms["used_sub"] = sub_used.sum() / counts["valid"]
    if "truth" in views:  # for the log only
        known = views["truth"] != IGNORE
        right = pseudo_label == views["truth"]
        terms |= {"used_known": (used & known).sum(), "used_right": (used & known & right).sum()}
        if "USR" in on:
            terms |= {"vetoed_known": (vetoed & known).sum(), "vetoed_right": (vetoed & known & (probs.argmax(dim=1) == views["truth"])).sum()}
    return loss, {"loss": loss, **terms}


def report(means: dict[str, float]) -> dict[str, float]:
    """For the log: how many used pseudo labels are right, and how many of those that F_sub vetoed."""
    return {f"{name}_accuracy": round(means[f"{name}_right"] / means[f"{name}_known"], 5) for name in ("used", "vetoed") if means.get(f"{name}_known")}


def build_model(config: Config, num_classes: int) -> nn.Module:
    """F, which is all that inference needs."""
    return ARCHITECTURES[config.architecture](config.backbone, num_classes, config.weights)


def predictor(model: nn.Module, config: Config):
    """images [B, 3, H, W], normalised -> logits [B, C, H, W]."""
    return model.eval()


def main() -> None:
    train(parse(Config, description=__doc__))


if __name__ == "__main__":
    runtime.run_main(main)
