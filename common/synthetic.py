"""Embedded data sets: textured blobs in PASCAL VOC's layout. Training makes them on first use, and so does

    python -m common.synthetic --variant shapes --root data/shapes

Every class is a *local, flip-invariant texture* on random blobs in random colours: colour and outline carry no class.
Background and distractor blobs are smooth. Three things make the data tell semi-supervised methods apart:

- *Style* differs between images (contrast, noise, light, gamma, saturation). Strong augmentation imitates it.
- *Texture geometry* differs between blobs (period, aspect, tilt, line thickness, edge softness, warp). Photometric
  augmentation does not imitate it; a few labeled images show little of it, the unlabeled images show all.
- *Imbalance*: the k-th class is drawn with a frequency proportional to k^-exponent.

The encoder that is fine-tuned on them comes from `common.pretrain`.
"""

import argparse
import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from common.runtime import UserError, run_main

SHAPE_CLASSES = ("background", "hstripe", "vstripe", "check", "dots", "cross", "grain", "blocks")
LARGE_CLASSES = SHAPE_CLASSES + ("diag", "grid", "wave", "rings")

FORMAT = 1  # raise it when the same dials give other files
SPLITS = ("train", "val", "tune")  # tune: choose hyper-parameters here, report on val
LABELED = {12: 2, 24: 3, 48: 4}  # labeled images -> in how many of them every class is to be seen
LABELED_CHOICES = 3  # independent choices of labeled images


@dataclass(frozen=True)
class Variant:
    """The dials of one data set. A range (low, high) is drawn from uniformly unless its line says otherwise."""

    seed: int  # image i of split s is drawn from the seed (seed, s, i)
    size: int = 64  # height and width of an image, pixels
    classes: tuple[str, ...] = SHAPE_CLASSES  # names; the index is the label, and the rank from frequent to rare
    train: int = 600  # images in train.txt, the labeled ones included
    val: int = 200  # images in val.txt
    tune: int = 200  # images in tune.txt
    exponent: float = 0.6  # imbalance: a blob is of the k-th foreground class with probability ~ k^-exponent
    distractors: float = 0.25  # probability that a blob is smooth, labeled background
    # layout
    blobs: tuple[int, int] = (2, 5)  # blobs in an image, both ends included; later ones cover earlier ones
    radius: tuple[float, float] = (8.0, 18.0)  # mean radius of a blob, pixels
    irregularity: float = 0.14  # standard deviation of each of four harmonics of the outline, relative to the radius
    elongation: float = 1.3  # largest ratio of a blob's width and height, log-uniform
    margin: float = 4.0  # blob centres keep this distance from the image's edge, pixels
    # style, one draw for an image
    contrast: tuple[float, float] = (0.07, 0.28)  # standard deviation of a texture along its colour axis; RGB in [0, 1]
    noise: tuple[float, float] = (0.02, 0.07)  # standard deviation of white noise per channel
    light: float = 0.5  # lighting changes by up to +- this fraction from edge to edge, in x and in y
    gamma: float = 0.35  # standard deviation of the logarithm of gamma
    saturation: tuple[float, float] = (0.2, 1.3)  # 0 is grey, 1 leaves the colours alone
    # texture geometry, one draw for a blob
    period: tuple[float, float] = (4.5, 9.0)  # pixels; cell size for grain and blocks is proportional to it
    aspect: float = 1.4  # largest ratio of the periods along x and y, log-uniform
    tilt: float = 15.0  # largest rotation to either side, degrees
    duty: tuple[float, float] = (0.35, 0.65)  # share of the bright phase: line thickness, size of dots
    sharpness: tuple[float, float] = (0.7, 5.0)  # slope of the edges between the phases, log-uniform; small is soft
    warp: tuple[float, float] = (0.0, 1.8)  # standard deviation of a smooth displacement of the texture, pixels
    warp_cell: float = 12.0  # distance over which that displacement changes, pixels


VARIANTS: dict[str, Variant] = {
    "shapes": Variant(seed=1),
    "shapes_severe": Variant(seed=2, exponent=1.2),
    "shapes_large": Variant(
        seed=3, size=128, classes=LARGE_CLASSES, train=2000, val=400, tune=400, exponent=0.8,
        blobs=(4, 9), radius=(11.0, 30.0), margin=6.0,
    ),
}


# ---------------------------------------------------------------- drawing


def smooth_field(rng: np.random.Generator, size: int, cell: float) -> np.ndarray:
    """[size, size] float32: standard normal values on a lattice of `cell` pixels, bicubic in between."""
    points, extent = math.ceil(size / cell) + 1, size / cell
    lattice = Image.fromarray(rng.standard_normal((points, points), dtype=np.float32))
    return np.asarray(lattice.resize((size, size), Image.Resampling.BICUBIC, box=(0, 0, extent, extent)))


# Periodic textures: a factor on `duty`, and a function of the angles x and y. Lines of crosses and grids are thin and
# dots are small: otherwise one class's bright phase would be another one's dark phase.
PERIODIC = {
    "hstripe": (1.0, lambda x, y: np.sin(y)),
    "vstripe": (1.0, lambda x, y: np.sin(x)),
    "check": (1.0, lambda x, y: np.sin(0.8 * x) * np.sin(0.8 * y)),
    "dots": (0.5, lambda x, y: np.cos(0.9 * x) + np.cos(0.9 * y)),
    "cross": (0.8, lambda x, y: np.maximum(np.sin(0.55 * (x + y)), np.sin(0.55 * (x - y)))),
    "diag": (1.0, lambda x, y: np.sin(0.71 * (x + y))),
    "grid": (0.8, lambda x, y: np.maximum(np.sin(0.75 * x), np.sin(0.75 * y))),
    "wave": (1.0, lambda x, y: np.sin(y + 1.8 * np.sin(0.55 * x))),
    "rings": (0.8, lambda x, y: -np.abs(np.cos(0.55 * x) + np.cos(0.55 * y) - 0.6)),
    "vwave": (1.0, lambda x, y: np.sin(x + 1.8 * np.sin(0.55 * y))),
    "hexagons": (0.6, lambda x, y: np.cos(x) + np.cos(0.5 * x + 0.87 * y) + np.cos(0.5 * x - 0.87 * y)),
    "bricks": (0.8, lambda x, y: np.maximum(np.sin(y), np.sin(0.5 * x + math.pi * np.floor(y / math.tau - 0.25)))),
}


def texture(name: str, variant: Variant, rng: np.random.Generator) -> np.ndarray:
    """[size, size] float32 of zero mean and unit variance ("plain": zero); raises ValueError for an unknown name."""
    size, period, duty = variant.size, rng.uniform(*variant.period), rng.uniform(*variant.duty)
    stretch = variant.aspect ** rng.uniform(-0.5, 0.5)
    tilt, warp = math.radians(rng.uniform(-variant.tilt, variant.tilt)), rng.uniform(*variant.warp)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    u = x * math.cos(tilt) + y * math.sin(tilt) + warp * smooth_field(rng, size, variant.warp_cell)
    v = y * math.cos(tilt) - x * math.sin(tilt) + warp * smooth_field(rng, size, variant.warp_cell)
    x = math.tau / period * stretch * u + rng.uniform(0, math.tau)
    y = math.tau / period / stretch * v + rng.uniform(0, math.tau)

    if name in PERIODIC:
        factor, function = PERIODIC[name]
        duty, field = factor * duty, function(x if rng.random() < 0.5 else -x, y)
    elif name == "blocks":  # cells of 0.8 periods
        field = rng.standard_normal((2 * size, 2 * size), dtype=np.float32)[(y // 5).astype(int), (x // 5).astype(int)]
    elif name in ("grain", "spots", "worms"):
        field = smooth_field(rng, size, period / 3 if name == "grain" else 0.8 * period)
        duty, field = (duty, -np.abs(field)) if name == "worms" else (0.4 * duty if name == "spots" else duty, field)
    elif name == "plain":
        return np.zeros((size, size), np.float32)
    else:
        raise ValueError(f"unknown texture {name!r}")
    threshold = np.quantile(field, 1 - duty).astype(np.float32)  # the share `duty` of the area is bright
    sharpness = variant.sharpness[0] * (variant.sharpness[1] / variant.sharpness[0]) ** rng.random()
    field = np.tanh(sharpness * (field - threshold) / field.std())
    return (field - field.mean()) / field.std()


def blob(variant: Variant, rng: np.random.Generator) -> np.ndarray:
    """[size, size] bool: a disc, stretched, its outline disturbed by four harmonics."""
    y, x = np.mgrid[: variant.size, : variant.size].astype(np.float32)
    center_x, center_y = rng.uniform(variant.margin, variant.size - variant.margin, 2).tolist()
    stretch = variant.elongation ** rng.uniform(-0.5, 0.5)
    x, y = (x - center_x) * stretch, (y - center_y) / stretch
    angle, radius = np.arctan2(y, x), rng.uniform(*variant.radius)
    waves = (rng.standard_normal() * np.sin(k * angle + rng.uniform(0, math.tau)) for k in range(1, 5))
    return np.hypot(x, y) < radius * (1 + variant.irregularity * sum(waves))


def smooth_colors(variant: Variant, rng: np.random.Generator) -> np.ndarray:
    """[size, size, 3] in [0.15, 0.85]: two random colours, mixed smoothly."""
    mix = 1 / (1 + np.exp(-smooth_field(rng, variant.size, variant.size / rng.uniform(1, 3))))[..., None]
    first, second = rng.uniform(0.15, 0.85, (2, 3)).astype(np.float32)
    return mix * first + (1 - mix) * second


def draw(variant: Variant, rng: np.random.Generator, textures: list[str] | None = None):
    """One picture: (image [size, size, 3] uint8, label [size, size] uint8, 255 where the right or lower pixel differs).

    `textures`: those of the blobs, in drawing order, instead of random ones. One that is no class is background.
    """
    if textures is None:
        count = rng.integers(variant.blobs[0], variant.blobs[1] + 1)
        frequency = np.arange(1, len(variant.classes)) ** -variant.exponent
        chosen = rng.choice(variant.classes[1:], size=count, p=frequency / frequency.sum())
        textures = ["plain" if rng.random() < variant.distractors else str(name) for name in chosen]
    contrast, noise, saturation = (rng.uniform(*r) for r in (variant.contrast, variant.noise, variant.saturation))
    light_x, light_y = rng.uniform(-variant.light, variant.light, 2).tolist()
    gamma = math.exp(variant.gamma * rng.standard_normal())

    image, label = smooth_colors(variant, rng), np.zeros((variant.size, variant.size), np.uint8)
    for name in textures:
        inside, paint = blob(variant, rng), smooth_colors(variant, rng)
        axis = (1 + 0.6 * rng.standard_normal(3)) * rng.choice([-1, 1])  # near grey: survives low saturation
        axis = (axis / np.linalg.norm(axis)).astype(np.float32)
        paint = paint + contrast * texture(name, variant, rng)[..., None] * axis
        image = np.where(inside[..., None], paint, image)
        label[inside] = variant.classes.index(name) if name in variant.classes else 0

    ramp = np.linspace(-0.5, 0.5, variant.size, dtype=np.float32)
    image = image * (1 + light_x * ramp[None, :] + light_y * ramp[:, None])[..., None]
    image = image + noise * rng.standard_normal(image.shape, dtype=np.float32)
    image = np.clip(image, 0, 1) ** gamma
    grey = image.mean(axis=2, keepdims=True)
    image = np.clip(grey + saturation * (image - grey), 0, 1)

    border = np.zeros(label.shape, bool)
    border[:, :-1] |= label[:, :-1] != label[:, 1:]
    border[:-1] |= label[:-1] != label[1:]
    label[border] = 255
    return (255 * image).round().astype(np.uint8), label


# ---------------------------------------------------------------- files


def voc_palette(n: int = 256) -> np.ndarray:
    """[n, 3] uint8: VOC's colour map. Bits 0, 1, 2 are the top bits of R, G, B, bits 3, 4, 5 the next."""
    labels, palette = np.arange(n), np.zeros((n, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((labels >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette


def choose_labeled(present: np.ndarray, rng: np.random.Generator) -> dict[int, list[int]]:
    """Nested labeled sets {12: rows, 24: rows, 48: rows} out of `present` [images, foreground classes] bool.

    For each size, from the rarest class on: random images that show it until LABELED[size] do; the rest is drawn from
    all images. So the rarest class of `shapes_severe` is in just 2, 3, 4 images or hardly more, still more often than
    by pure chance. A class that too few images show, or that the size leaves no room for, gets what there is.
    """
    order, rarest_first = rng.permutation(len(present)), np.argsort(present.sum(axis=0), kind="stable")
    chosen, sets = [], {}
    for size, wanted in LABELED.items():
        for k in rarest_first:
            for i in order:
                if present[chosen, k].sum() >= wanted or len(chosen) == size:
                    break
                if present[i, k] and i not in chosen:
                    chosen.append(int(i))
        chosen += [int(i) for i in order if i not in chosen][: size - len(chosen)]
        sets[size] = list(chosen)
    return sets


def already_there(root: Path, wanted: dict) -> bool:
    """True if root holds the wanted data, False if it is free; raises UserError if it holds something else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    if not (root / "generator.json").is_file():
        raise UserError(f"{root} is not empty and was not generated here: choose another folder")
    found = json.loads((root / "generator.json").read_text())
    if any(found.get(key) != wanted[key] for key in ("format", "dials")):
        raise UserError(f"{root} holds synthetic data of another version or with other dials than variant "
                        f"{wanted['name']!r}: delete that folder, or choose another one")
    return True


def publish(root: Path, generator: dict, write) -> None:
    """`write(folder)` fills `root`, unless what `generator` (format, name, dials) describes is there already.

    The folder appears at once, complete with generator.json; of several processes that start together one wins and the others agree. Raises
    UserError if root holds anything else or cannot be written.
    """
    root = root.resolve()
    text = json.dumps(generator, indent=1) + "\n"
    wanted = json.loads(text)  # as it reads back: tuples are lists
    if already_there(root, wanted):
        return
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as temporary:
            folder = Path(temporary) / "data"  # a level below, because only its owner can read the temporary folder
            write(folder)
            (folder / "generator.json").write_text(text)
            try:
                os.rename(folder, root)
            except OSError:  # another process was faster
                if not already_there(root, wanted):
                    raise
    except OSError as error:
        raise UserError(f"cannot write {root}: {error.strerror or error}; choose another folder") from error


def generate(root: Path | str, variant: Variant | str, name: str | None = None) -> None:
    """Write the data set to `root` in VOC's layout, with labeled lists; do nothing if it is already there.

    JPEGImages/<id>.jpg, SegmentationClass/<id>.png (palette, 255 on borders), ImageSets/Segmentation/{train, val, tune,
    labeled_12, labeled_12_split1, ...}.txt, classes.txt, generator.json. `name` is noted in generator.json only.
    Raises UserError if root holds anything else or cannot be written, KeyError for an unknown variant.
    """
    if isinstance(variant, str):
        name, variant = name or variant, VARIANTS[variant]
    publish(Path(root), {"format": FORMAT, "name": name or "custom", "dials": asdict(variant)}, lambda folder: write_voc(folder, variant))


def write_voc(folder: Path, variant: Variant) -> None:
    """Everything but generator.json."""
    images, labels, lists = (folder / part for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"))
    for part in (images, labels, lists):
        part.mkdir(parents=True)
    palette, present = voc_palette().tobytes(), []
    for s, split in enumerate(SPLITS):
        names = [f"{split}_{i:06d}" for i in range(getattr(variant, split))]
        (lists / f"{split}.txt").write_text("\n".join(names) + "\n")
        for i, name in enumerate(names):
            image, label = draw(variant, np.random.default_rng([variant.seed, s, i]))
            Image.fromarray(image).save(images / f"{name}.jpg", quality=95, subsampling=0)
            mask = Image.fromarray(label)
            mask.putpalette(palette)  # turns mode "L" into "P"
            mask.save(labels / f"{name}.png")
            if split == "train":  # a class counts as seen from 1 % of the pixels on
                present.append(np.bincount(label.ravel(), minlength=256) >= 0.01 * label.size)
    for choice in range(LABELED_CHOICES):
        rng = np.random.default_rng([variant.seed, len(SPLITS), choice])
        suffix = f"_split{choice}" if choice else ""
        for size, rows in choose_labeled(np.array(present)[:, 1 : len(variant.classes)], rng).items():
            (lists / f"labeled_{size}{suffix}.txt").write_text("".join(f"train_{i:06d}\n" for i in sorted(rows)))
    (folder / "classes.txt").write_text("\n".join(variant.classes) + "\n")


# ---------------------------------------------------------------- command line


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m common.synthetic", description="Write an embedded data set in VOC's layout.")
    parser.add_argument("--variant", choices=VARIANTS, default="shapes")
    parser.add_argument("--root", type=Path, help="folder to write; default: data/<variant>")
    args = parser.parse_args()
    generate(args.root or Path("data") / args.variant, args.variant)


if __name__ == "__main__":
    run_main(main)
