"""Synthetic cardiac short-axis MR, the embedded data set of volumes. Training makes it on first use, and so does

    python -m common.phantom --variant phantom --root data/phantom

A patient is one heart in two phases, end-diastole (ED) and end-systole (ES), 6 to 10 slices each from base to apex, with
the classes of ACDC: left ventricle (LV, papillary muscles included), the ring of myocardium around it, right ventricle
(RV, a crescent on the septum; its thin wall is background). What makes it hard with few labeled patients:

- *Style* differs between patients: contrasts of blood, muscle, fat, lung and liver, bias field, gamma, blur, noise.
- *Anatomy* differs between patients, slices and phases: the apex closes, the ring may be open at the base, the RV vanishes.
- *Distractors*: bright vessels, some with a dark wall as if they were ventricles, liver, lung, chest wall, fat.

It is a drawing, not a simulation of MR, and its hearts are small: about half the size of an adult's.
"""

import argparse
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from common.runtime import run_main
from common.synthetic import publish, smooth_field

CLASSES = ("background", "right ventricle", "myocardium", "left ventricle")  # the index is the label, as in ACDC
RV, MYOCARDIUM, LV = 1, 2, 3

FORMAT = 1  # raise it when the same dials give other files
SPLITS = ("train", "val", "test")  # val: choose hyper-parameters here; test: report here
TRAIN_ORDERS = 3  # train.txt, train_split1.txt, ...: the labeled patients are the first ones of a list
UNITS = 64  # lengths in the image plane are in 1/64 of the image's side, whatever its size in pixels

Range = tuple[float, float]


@dataclass(frozen=True)
class Phantom:
    """The dials of one data set. A range (low, high) is drawn from uniformly, once for each patient.

    Lengths are in 1/64 of the image's side unless a line says otherwise; t is 0 at the base and 1 in the last slice.
    """

    seed: int  # patient i of split s is drawn from the seed (seed, s, i)
    size: int = 64  # height and width of a slice, pixels
    slices: tuple[int, int] = (6, 10)  # slices of a volume, both ends included
    train: int = 40  # patients
    val: int = 10
    test: int = 20
    field_of_view: Range = (77.0, 115.0)  # side of the image, mm: 1.2 to 1.8 mm between 64 pixels
    slice_distance: Range = (5.0, 10.0)  # mm
    # the heart
    shift_x: Range = (-6.0, 6.0)  # of the LV's centre from the image's
    shift_y: Range = (-6.0, 6.0)
    tilt_x: Range = (-4.0, 4.0)  # of the LV's centre from base to apex
    tilt_y: Range = (-4.0, 4.0)
    breath: float = 0.3  # standard deviation of a slice's displacement: slices come from different breath-holds
    septum: Range = (135.0, 225.0)  # direction from the LV to the RV, degrees; 180 is left, 90 down
    cavity: Range = (7.0, 11.0)  # radius of the LV at the base, ED
    wall: Range = (2.4, 4.8)  # thickness of the myocardium at the base, ED
    outline: tuple[float, ...] = (0.07, 0.04, 0.02)  # largest amplitudes of harmonics 2, 3, 4 of the radius, relative
    apex: Range = (1.01, 1.25)  # t at which the cavity closes, ED
    taper: Range = (2.0, 3.2)  # exponent of the radius over t: 2 is an ellipsoid, more is a bullet
    shortening: Range = (0.86, 0.96)  # apex in ES / ED
    contraction: Range = (0.50, 0.78)  # radius of the cavity in ES / ED
    epicardium: Range = (0.90, 0.98)  # outer radius of the myocardium in ES / ED
    open_base: float = 0.35  # probability that the ring of the first slice is open
    papillary: Range = (0.16, 0.30)  # radius of a papillary muscle / of the cavity
    rv_width: Range = (0.55, 1.00)  # thickness of the crescent at the base, ED / outer radius of the myocardium
    rv_span: Range = (56.0, 78.0)  # degrees from the septum's middle to the RV's ends, at the base
    rv_height: Range = (1.05, 1.30)  # half the RV's length along the septum / half the chord between its ends
    rv_tilt: Range = (-20.0, 20.0)  # of the crescent against the septum, degrees
    rv_end: Range = (0.70, 0.97)  # t at which the RV vanishes
    rv_contraction: Range = (0.50, 0.80)  # thickness of the crescent in ES / ED
    # around it
    vessels: tuple[int, int] = (2, 5)  # bright discs, both ends included
    vessel_wall: float = 0.55  # probability that a vessel has a wall as dark as the myocardium
    fat_layer: Range = (0.3, 2.2)  # thickness on the heart
    # style; signal intensities are relative
    blood: Range = (0.55, 1.0)
    muscle: Range = (0.25, 0.65)  # myocardium / blood
    rv_blood: Range = (0.82, 1.12)  # blood in the RV / in the LV
    tissue: Range = (0.12, 0.65)
    lung: Range = (0.02, 0.15)
    liver: Range = (0.15, 0.70)
    fat: Range = (0.50, 1.15)
    texture: Range = (0.05, 0.25)  # relative standard deviation within the tissue
    bias: Range = (0.0, 0.22)  # largest relative change of the intensity from centre to edge, in a random direction
    bias_bowl: Range = (-0.12, 0.12)  # relative change from centre to edge, in all directions
    gamma: Range = (-0.24, 0.24)  # logarithm of the exponent
    blur: Range = (0.2, 0.56)  # standard deviation of the Gaussian
    noise: Range = (0.015, 0.043)  # standard deviation in each channel of the Rician noise


VARIANTS: dict[str, Phantom] = {
    "phantom": Phantom(seed=1),
    "phantom_large": Phantom(seed=2, size=128, train=100, val=20, test=40),
}


# ---------------------------------------------------------------- shapes
# A shape is an array [size, size]: roughly the distance to its edge in units, positive inside.


def coverage(shape: np.ndarray, softness: float = 0.55) -> np.ndarray:
    """Share of the shape in each pixel, in [0, 1]; its edge is about four times `softness` wide."""
    return 1 / (1 + np.exp(-np.clip(shape / softness, -30, 30)))


def paint(picture, cover: np.ndarray, value) -> np.ndarray:
    """`value` where `cover` is 1, `picture` where it is 0, a mixture in between."""
    return picture + cover * (value - picture)


def ellipse(x: np.ndarray, y: np.ndarray, a: float, b: float) -> np.ndarray:
    """An ellipse around the origin with half axes a along x and b along y."""
    q = np.hypot(x / a, y / b) + 1e-9
    slope = np.hypot(x / a**2, y / b**2) / q  # of q; dividing by it makes (1 - q) a distance
    return (1 - q) / slope.clip(1 / max(a, b))


def rotate(x: np.ndarray, y: np.ndarray, direction: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates along `direction` (radians, clockwise from x to the right, as y points down) and across it."""
    return x * math.cos(direction) + y * math.sin(direction), y * math.cos(direction) - x * math.sin(direction)


def turn(angle: np.ndarray) -> np.ndarray:
    """Angles in radians, wrapped to [-pi, pi)."""
    return (angle + math.pi) % math.tau - math.pi


def blur(volume: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian of `sigma` pixels over the last two axes of [Z, H, W]; mirrored at the edges."""
    radius = math.ceil(3 * sigma)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / max(sigma, 1e-6)) ** 2)
    for axis in (1, 2):
        length = volume.shape[axis]
        padded = np.pad(volume, [(radius, radius) if a == axis else (0, 0) for a in range(3)], mode="reflect")
        shifted = (padded.take(range(k, k + length), axis) for k in range(2 * radius + 1))
        volume = sum(w * s for w, s in zip(weights / weights.sum(), shifted))
    return volume


# ---------------------------------------------------------------- one patient


def draw_values(phantom: Phantom, rng: np.random.Generator) -> SimpleNamespace:
    """A patient's value of every dial that is a range, and what else differs between patients but not slices."""
    p = SimpleNamespace()
    for name, dial in asdict(phantom).items():
        if name in ("slices", "vessels"):
            setattr(p, name, int(rng.integers(dial[0], dial[1] + 1)))
        elif isinstance(dial, tuple) and name != "outline":
            setattr(p, name, rng.uniform(*dial))

    p.septum, p.rv_span, p.rv_tilt = (math.radians(value) for value in (p.septum, p.rv_span, p.rv_tilt))
    p.harmonics = [(k, rng.uniform(0, a), rng.uniform(0, math.tau)) for k, a in enumerate(phantom.outline, start=2)]
    p.displacement = phantom.breath * rng.standard_normal((p.slices, 2))
    side = rng.choice([-1, 1])
    p.gap = (p.septum + side * rng.uniform(1.4, 2.3), rng.uniform(0.35, 0.7) if rng.random() < phantom.open_base else 0)
    # Papillary muscles: opposite the septum, (direction, distance from the centre / radius, factor on the size)
    p.muscles = [(p.septum + math.pi + s * rng.uniform(0.5, 1.2), rng.uniform(0.5, 0.75), rng.uniform(0.7, 1)) for s in (-1, 1)]
    p.muscle_range = rng.uniform(0.1, 0.35), rng.uniform(0.6, 0.85)  # of t

    # Surroundings: (direction from the heart, distance from its surface, radius or thickness)
    p.chest = p.septum + rng.uniform(-0.6, 0.6), rng.uniform(1, 12), rng.uniform(2, 7)
    p.lung_place = p.septum + math.pi + rng.uniform(-0.7, 0.7), rng.uniform(1, 8), rng.uniform(13, 22)
    p.liver_place = p.septum - side * rng.uniform(1.0, 1.9), rng.uniform(2, 8), rng.uniform(12, 20)
    p.vessel_list = [SimpleNamespace(
        direction=rng.uniform(0, math.tau), distance=rng.uniform(2, 16), radius=rng.uniform(2.5, 7), stretch=rng.uniform(1, 1.35),
        walled=rng.random() < phantom.vessel_wall, first=rng.uniform(-0.2, 0.6), extent=rng.uniform(0.4, 1.2),
        drift=rng.uniform(-4, 4)) for _ in range(p.vessels)]
    # Lattices that do not depend on the size: a patient of another size is the same patient
    p.coarse = smooth_field(rng, phantom.size, phantom.size / rng.uniform(4, 8)).astype(float)
    p.fine = smooth_field(rng, phantom.size, phantom.size / 23.5).astype(float)
    p.bias_direction = rng.uniform(0, math.tau)
    return p


def surroundings(p: SimpleNamespace, x: np.ndarray, y: np.ndarray, t: float) -> np.ndarray:
    """Intensities [size, size] without the heart; x and y are measured from the heart's mean position."""
    heart = p.cavity + p.wall
    picture = p.tissue * (1 + p.texture * p.coarse + 0.06 * p.fine)

    def along(direction: float, reach: float) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates that start `reach` from the heart's centre: outwards, and across."""
        outwards, across = rotate(x, y, direction)
        return outwards - reach, across

    liver = p.liver * (1 + 0.3 * p.texture * p.fine)
    for (direction, distance, radius), stretch, ragged, value in ((p.lung_place, 1.4, 2, p.lung), (p.liver_place, 1.3, 1, liver)):
        organ = ellipse(*along(direction, heart + distance + radius), radius, stretch * radius) + ragged * p.coarse
        picture = paint(picture, coverage(organ, 0.8), value)
    direction, distance, thickness = p.chest
    outwards, across = along(direction, heart * (1 + 0.8 * p.rv_width) + distance + 3)
    outwards = outwards + 0.008 * across**2 + 0.5 * p.coarse
    picture = paint(picture, coverage(outwards), p.fat * (1 + 0.5 * p.texture * p.coarse))
    picture = paint(picture, coverage(outwards - thickness), 0.03)  # air in front of the chest
    for v in p.vessel_list:
        if v.first <= t <= v.first + v.extent:
            outwards, across = along(v.direction, heart + v.distance + v.radius)
            shape = ellipse(outwards, across + v.drift * (t - 0.5), v.radius, v.radius * v.stretch)
            if v.walled:
                picture = paint(picture, coverage(shape + 2), p.muscle * p.blood)
            picture = paint(picture, coverage(shape), 0.97 * p.blood)
    return picture


def ventricles(p: SimpleNamespace, x: np.ndarray, y: np.ndarray, z: int, systole: bool) -> SimpleNamespace:
    """Shapes of the heart in slice z; x and y are measured from the LV's centre.

    heart: what the myocardium's outer edge encloses; cavity: the LV; crescent: the RV, which reaches under `heart`; gap: the
    sector in which the ring is open. `inner` and `outer` are the ring's mean radii; inner is 0 where the cavity is closed.
    """
    t, nothing = z / (p.slices - 1), np.full_like(x, -99.0)
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    waves = 1 + sum(a * np.cos(k * angle + phase) for k, a, phase in p.harmonics)

    closes = p.apex * (p.shortening if systole else 1)
    inner = p.cavity * (p.contraction if systole else 1) * math.sqrt(max(0, 1 - (t / closes) ** p.taper))
    outer = (p.cavity + p.wall) * (p.epicardium if systole else 1) * math.sqrt(max(0, 1 - (t / (p.apex + 0.12)) ** p.taper))
    outer, inner = max(outer, inner + 2, 3), inner if inner > 1.2 else 0

    # The crescent is what of an egg lies outside the ring. Its centre is that of the chord between the RV's ends.
    part = math.sqrt(max(0, 1 - (t / p.rv_end) ** 2))  # of the RV's size at the base
    width = p.rv_width * (p.cavity + p.wall) * part * (p.rv_contraction if systole else 1)
    span = p.rv_span * (0.6 + 0.4 * part)
    towards, across = rotate(x, y, p.septum)
    towards, across = rotate(towards - outer * math.cos(span), across, p.rv_tilt)
    towards = np.where(towards < 0, 2.5 * towards, towards)  # so that it does not come out on the far side
    crescent = ellipse(towards, across, outer * (1 - math.cos(span)) + width, p.rv_height * outer * math.sin(span))

    gap = (p.gap[1] - np.abs(turn(angle - p.gap[0]))) * outer
    return SimpleNamespace(
        inner=inner, outer=outer, heart=outer * waves - radius, cavity=inner * waves - radius if inner else nothing,
        crescent=crescent if width > 1.5 else nothing, gap=gap if z == 0 and p.gap[1] else nothing)


def draw_slice(p: SimpleNamespace, size: int, z: int, systole: bool) -> tuple[np.ndarray, np.ndarray]:
    """One slice before bias, blur and noise: (intensities [size, size], label [size, size] uint8)."""
    t = z / (p.slices - 1)
    axis = (np.arange(size) + 0.5) * UNITS / size - UNITS / 2
    x, y = np.meshgrid(axis - p.shift_x, axis - p.shift_y)
    picture = surroundings(p, x, y, t)
    x, y = x - p.tilt_x * (t - 0.5) - p.displacement[z, 0], y - p.tilt_y * (t - 0.5) - p.displacement[z, 1]
    s, muscle = ventricles(p, x, y, z, systole), p.muscle * p.blood

    picture = paint(picture, 0.8 * coverage(np.maximum(s.heart, s.crescent + 1.2) + p.fat_layer), 0.85 * p.fat)
    picture = paint(picture, coverage(s.crescent + 1.2), muscle)  # the RV's wall
    picture = paint(picture, coverage(s.crescent), p.rv_blood * p.blood * (1 + 0.06 * p.fine))
    if s.gap.max() > 0:  # the outflow tract, seen through the gap
        direction = p.gap[0]
        root = ellipse(x - s.outer * math.cos(direction), y - s.outer * math.sin(direction), 0.5 * s.outer, 0.5 * s.outer)
        picture = paint(picture, coverage(root), p.blood)
    ring = paint(p.blood, coverage(-s.gap), muscle)  # blood in the gap
    picture = paint(picture, coverage(s.heart), ring * (1 + 0.06 * p.fine))
    picture = paint(picture, coverage(s.cavity), p.blood * (1 + 0.04 * p.fine))
    if s.inner and p.muscle_range[0] <= t <= p.muscle_range[1]:
        for direction, distance, factor in p.muscles:
            reach, size_here = distance * s.inner, factor * p.papillary * s.inner
            column = ellipse(x - reach * math.cos(direction), y - reach * math.sin(direction), size_here, size_here)
            picture = paint(picture, 0.85 * coverage(column), muscle)

    label = np.zeros((size, size), np.uint8)
    label[s.crescent > 0] = RV
    label[s.heart > 0] = MYOCARDIUM
    label[(s.heart > 0) & (s.gap > 0)] = 0
    label[s.cavity > 0] = LV
    return picture, label


def draw_patient(phantom: Phantom, rng: np.random.Generator) -> list[tuple[str, np.ndarray, np.ndarray, tuple[float, float, float]]]:
    """Both phases of one patient: [("ED", image, label, spacing), ("ES", ...)].

    image float32 [Z, size, size] in [0, 1] in steps of 1/255 (small files), 0 and 1 included; label uint8 [Z, size, size];
    spacing in mm along z, y, x.
    """
    p, size = draw_values(phantom, rng), phantom.size
    spacing = (round(p.slice_distance, 2), *[round(p.field_of_view / size, 4)] * 2)
    ramp = np.linspace(-1, 1, size)
    x, y = np.meshgrid(ramp, ramp)
    bias = np.exp(p.bias * (math.cos(p.bias_direction) * x + math.sin(p.bias_direction) * y) + p.bias_bowl * (x**2 + y**2 - 0.5))
    phases = []
    for name in ("ED", "ES"):
        pictures, labels = zip(*(draw_slice(p, size, z, systole=name == "ES") for z in range(p.slices)))
        image = blur(np.stack(pictures) * bias, p.blur * size / UNITS).clip(0) ** math.exp(p.gamma)
        real, imaginary = p.noise * rng.standard_normal((2, *image.shape))
        image = np.hypot(image + real, imaginary)
        low, high = np.percentile(image, [0.5, 99.5])
        image = (255 * ((image - low) / (high - low)).clip(0, 1)).round().astype(np.float32) / np.float32(255)
        phases.append((name, image, np.stack(labels), spacing))
    return phases


# ---------------------------------------------------------------- files


def generate(root: Path, variant: str) -> None:
    """Write the data set to `root`; do nothing if it is already there.

    volumes/patientNNN_ED.npz and _ES.npz (see common.medical), lists/{train, val, test, train_split1, ...}.txt with lines
    "<patient> <volume>", classes.txt, generator.json. Raises UserError if root holds anything else or cannot be written,
    KeyError for an unknown variant.
    """
    publish(Path(root), {"format": FORMAT, "name": variant, "dials": asdict(VARIANTS[variant])}, lambda folder: write_files(folder, VARIANTS[variant]))


def write_files(folder: Path, phantom: Phantom) -> None:
    """Everything but generator.json."""
    from common.medical import Volume, write_volume

    for part in ("volumes", "lists"):
        (folder / part).mkdir(parents=True)
    patients = 0
    for s, split in enumerate(SPLITS):
        lines = []  # one string for each patient
        for i in range(getattr(phantom, split)):
            patients += 1
            patient, names = f"patient{patients:03d}", []
            for phase, image, label, spacing in draw_patient(phantom, np.random.default_rng([phantom.seed, s, i])):
                names.append(f"{patient}_{phase}")
                write_volume(folder / "volumes" / f"{names[-1]}.npz", Volume(image, label, spacing))
            lines.append("".join(f"{patient} {name}\n" for name in names))
        (folder / "lists" / f"{split}.txt").write_text("".join(lines))
        for order in range(TRAIN_ORDERS if split == "train" else 0):
            shuffled = np.random.default_rng([phantom.seed, len(SPLITS), order]).permutation(len(lines))
            name = f"train_split{order}.txt" if order else "train.txt"
            (folder / "lists" / name).write_text("".join(lines[k] for k in shuffled))
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")


# ---------------------------------------------------------------- command line


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m common.phantom", description="Write an embedded data set of volumes.")
    parser.add_argument("--variant", choices=VARIANTS, default="phantom")
    parser.add_argument("--root", type=Path, help="folder to write; default: data/<variant>")
    args = parser.parse_args()
    generate(args.root or Path("data") / args.variant, args.variant)


if __name__ == "__main__":
    run_main(main)
