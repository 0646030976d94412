"""The embedded data sets, and the pretraining of the tiny encoders that are fine-tuned on them.

shapes, shapes_severe, in PASCAL VOC's layout: blobs whose class is a *local texture*; colour and
outline carry none. Images differ in style, which strong augmentation imitates, textures in
geometry, which it does not: few labeled images show little of it, the unlabeled ones show all.
phantom: cardiac short-axis MR, a drawing, not a simulation. A patient is one heart in end-diastole
(ED) and end-systole (ES), with ACDC's classes, among organs and bright vessels.

    python -m common.synthetic --dataset shapes      # training makes it by itself on first use
    python -m common.synthetic --encoder tiny        # tiny_encoder.pt again: four minutes on a CPU
    python -m common.synthetic --encoder tiny_vit    # tiny_vit.pt again: eight minutes
"""

import json
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur

from common.augment import normalize
from common.backbones import DEFAULT_WEIGHTS, build_encoder
from common.figures import voc_palette
from common.runtime import option, parse, require, run_main, write_atomically, write_lines

FORMAT = 1  # raise it when the same dials give other files
SHAPE_CLASSES = ("background", "hstripe", "vstripe", "check", "dots", "cross", "grain", "blocks")
CARDIAC_CLASSES = ("background", "right ventricle", "myocardium", "left ventricle")
RV, MYOCARDIUM, LV = 1, 2, 3


def with_changes(dials: SimpleNamespace, **changes) -> SimpleNamespace:
    return SimpleNamespace(**(vars(dials) | changes))


# ---------------------------------------------------------------- shapes

# Dials: a range (low, high) is drawn from uniformly unless it says otherwise; lengths in pixels.
SHAPES = {"shapes": SimpleNamespace(
    seed=1, size=64, classes=SHAPE_CLASSES, train=600, val=200, tune=200,  # tune: choose options
    exponent=0.6,  # a blob is of the k-th class with a probability proportional to k^-exponent
    distractors=0.25,  # or smooth, labeled background
    # layout: blobs in an image, both ends included; their mean radius; deviation of each harmonic
    # of the outline, relative to it; largest width / height; the centres' distance from the edge
    blobs=(2, 5), radius=(8.0, 18.0), irregularity=0.14, elongation=1.3, margin=4.0,
    # style of an image: deviation of a texture along its colour axis (RGB in [0, 1]) and of white
    # noise; change of light from edge to edge; deviation of log(gamma); 0 is grey, 1 as it was
    contrast=(0.07, 0.28), noise=(0.02, 0.07), light=0.5, gamma=0.35, saturation=(0.2, 1.3),
    # geometry of a texture: period; largest ratio of the periods in x and y; largest rotation in
    # degrees; bright share; slope of edges, log-uniform; deviation and scale of a distortion
    period=(4.5, 9.0), aspect=1.4, tilt=15.0, duty=(0.35, 0.65), sharpness=(0.7, 5.0),
    warp=(0.0, 1.8), warp_cell=12.0)}
SHAPES["shapes_severe"] = with_changes(SHAPES["shapes"], seed=2, exponent=1.2)

LABELED = {12: 2, 24: 3, 48: 4}  # labeled images: in how many of them every class is to be seen

# Periodic textures: a factor on the bright share, a function of the angles x and y. Crosses, grids
# are thin and dots small: otherwise one class's bright phase would be another one's dark phase.
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
    "hexagons": (0.6, lambda x, y: np.cos(x) + np.cos(0.5 * x + 0.87 * y)
                 + np.cos(0.5 * x - 0.87 * y)),
    "bricks": (0.8, lambda x, y: np.maximum(
        np.sin(y), np.sin(0.5 * x + math.pi * np.floor(y / math.tau - 0.25)))),
}


def smooth_field(rng: np.random.Generator, size: int, cell: float) -> np.ndarray:
    """[size, size] float32: standard normal values every `cell` pixels, bicubic in between."""
    points, extent = math.ceil(size / cell) + 1, size / cell
    lattice = Image.fromarray(rng.standard_normal((points, points), dtype=np.float32))
    bicubic = Image.Resampling.BICUBIC
    return np.asarray(lattice.resize((size, size), bicubic, box=(0, 0, extent, extent)))


def rotate(x, y, direction: float, start: float = 0):
    """Coordinates along `direction`, from `start` on, and across it. Radians; y points down."""
    cos, sin = math.cos(direction), math.sin(direction)
    return x * cos + y * sin - start, y * cos - x * sin


def texture(name: str, dials: SimpleNamespace, rng: np.random.Generator) -> np.ndarray:
    """[size, size] float32 of zero mean and unit variance ("plain": zero)."""
    size, period, duty = dials.size, rng.uniform(*dials.period), rng.uniform(*dials.duty)
    stretch = dials.aspect ** rng.uniform(-0.5, 0.5)
    tilt, warp = math.radians(rng.uniform(-dials.tilt, dials.tilt)), rng.uniform(*dials.warp)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    u, v = rotate(x, y, tilt)
    u = u + warp * smooth_field(rng, size, dials.warp_cell)
    v = v + warp * smooth_field(rng, size, dials.warp_cell)
    x = math.tau / period * stretch * u + rng.uniform(0, math.tau)
    y = math.tau / period / stretch * v + rng.uniform(0, math.tau)
    if name == "plain":
        return np.zeros((size, size), np.float32)
    if name in PERIODIC:
        factor, function = PERIODIC[name]
        field = function(x if rng.random() < 0.5 else -x, y)
    elif name == "blocks":  # of 0.8 periods
        values = rng.standard_normal((2 * size, 2 * size), dtype=np.float32)
        factor, field = 1, values[(y // 5).astype(int), (x // 5).astype(int)]
    else:  # grain, spots, worms
        factor = 0.4 if name == "spots" else 1
        field = smooth_field(rng, size, period / 3 if name == "grain" else 0.8 * period)
        field = -np.abs(field) if name == "worms" else field
    threshold = np.quantile(field, 1 - factor * duty).astype(np.float32)
    sharpness = dials.sharpness[0] * (dials.sharpness[1] / dials.sharpness[0]) ** rng.random()
    field = np.tanh(sharpness * (field - threshold) / field.std())
    return (field - field.mean()) / field.std()


def blob(dials: SimpleNamespace, rng: np.random.Generator) -> np.ndarray:
    """[size, size] bool: a disc, stretched, its outline disturbed by four harmonics."""
    y, x = np.mgrid[: dials.size, : dials.size].astype(np.float32)
    center_x, center_y = rng.uniform(dials.margin, dials.size - dials.margin, 2).tolist()
    stretch = dials.elongation ** rng.uniform(-0.5, 0.5)
    x, y = (x - center_x) * stretch, (y - center_y) / stretch
    angle, radius = np.arctan2(y, x), rng.uniform(*dials.radius)
    waves = sum(rng.standard_normal() * np.sin(k * angle + rng.uniform(0, math.tau))
                for k in range(1, 5))
    return np.hypot(x, y) < radius * (1 + dials.irregularity * waves)


def smooth_colors(dials: SimpleNamespace, rng: np.random.Generator) -> np.ndarray:
    """[size, size, 3] in [0.15, 0.85]: two random colours, mixed smoothly."""
    field = smooth_field(rng, dials.size, dials.size / rng.uniform(1, 3))
    mix = 1 / (1 + np.exp(-field))[..., None]
    first, second = rng.uniform(0.15, 0.85, (2, 3)).astype(np.float32)
    return mix * first + (1 - mix) * second


def draw_shapes(dials: SimpleNamespace, rng: np.random.Generator, textures: list | None = None):
    """(image uint8 [size, size, 3], label uint8 [size, size], 255 where the right or lower pixel
    differs). `textures`: the blobs' in drawing order, random by default; no class is background."""
    if textures is None:
        count = rng.integers(dials.blobs[0], dials.blobs[1] + 1)
        frequency = np.arange(1, len(dials.classes)) ** -dials.exponent
        chosen = rng.choice(dials.classes[1:], size=count, p=frequency / frequency.sum())
        textures = ["plain" if rng.random() < dials.distractors else str(name) for name in chosen]
    contrast, noise = rng.uniform(*dials.contrast), rng.uniform(*dials.noise)
    saturation = rng.uniform(*dials.saturation)
    light_x, light_y = rng.uniform(-dials.light, dials.light, 2).tolist()
    gamma = math.exp(dials.gamma * rng.standard_normal())

    image, label = smooth_colors(dials, rng), np.zeros((dials.size, dials.size), np.uint8)
    for name in textures:
        inside, paint = blob(dials, rng), smooth_colors(dials, rng)
        # The colour axis is near grey, so that the texture survives low saturation.
        axis = (1 + 0.6 * rng.standard_normal(3)) * rng.choice([-1, 1])
        axis = (axis / np.linalg.norm(axis)).astype(np.float32)
        paint = paint + contrast * texture(name, dials, rng)[..., None] * axis
        image = np.where(inside[..., None], paint, image)
        label[inside] = dials.classes.index(name) if name in dials.classes else 0

    ramp = np.linspace(-0.5, 0.5, dials.size, dtype=np.float32)
    image = image * (1 + light_x * ramp[None, :] + light_y * ramp[:, None])[..., None]
    image = image + noise * rng.standard_normal(image.shape, dtype=np.float32)
    image = np.clip(image, 0, 1) ** gamma
    grey = image.mean(axis=2, keepdims=True)
    image = np.clip(grey + saturation * (image - grey), 0, 1)

    right = np.diff(label, axis=1, append=label[:, -1:])
    lower = np.diff(label, axis=0, append=label[-1:])
    label[(right != 0) | (lower != 0)] = 255
    return (255 * image).round().astype(np.uint8), label


# ---------------------------------------------------------------- phantom

UNITS = 64  # lengths in the image plane are in 1/64 of its side; t is 0 at the base, 1 at the apex
PHANTOMS = {"phantom": SimpleNamespace(  # ranges are drawn from once for each patient
    seed=1, size=64, slices=(6, 10), train=40, val=10, test=20,  # patients
    field_of_view=(77.0, 115.0), slice_distance=(5.0, 10.0),  # mm
    # the LV's centre, from the image's and from base to apex; a slice's displacement by breathing
    shift_x=(-6.0, 6.0), shift_y=(-6.0, 6.0), tilt_x=(-4.0, 4.0), tilt_y=(-4.0, 4.0), breath=0.3,
    septum=(135.0, 225.0),  # direction from the LV to the RV, degrees; 180 is left, 90 down
    # LV, ED: radius and wall at the base, amplitudes of harmonics 2, 3, 4 of the radius, t at which
    # the cavity closes, exponent of the radius over t (2: an ellipsoid)
    cavity=(7.0, 11.0), wall=(2.4, 4.8), outline=(0.07, 0.04, 0.02), apex=(1.01, 1.25),
    taper=(2.0, 3.2),
    # ES / ED of the cavity's length and radius and of the outer radius
    shortening=(0.86, 0.96), contraction=(0.50, 0.78), epicardium=(0.90, 0.98),
    open_base=0.35, papillary=(0.16, 0.30),  # share of open rings; muscles' radius / the cavity's
    # RV: thickness / radius of the LV, degrees to its ends, length / chord, rotation, t of its end
    rv_width=(0.55, 1.00), rv_span=(56.0, 78.0), rv_height=(1.05, 1.30), rv_tilt=(-20.0, 20.0),
    rv_end=(0.70, 0.97), rv_contraction=(0.50, 0.80),
    vessels=(2, 5), vessel_wall=0.55, fat_layer=(0.3, 2.2),  # some have a wall, as if ventricles
    # intensities; muscle and the RV's blood relative to the LV's
    blood=(0.55, 1.0), muscle=(0.25, 0.65), rv_blood=(0.82, 1.12), tissue=(0.12, 0.65),
    lung=(0.02, 0.15), liver=(0.15, 0.70), fat=(0.50, 1.15), texture=(0.05, 0.25),
    # bias field: slope and bowl; log(gamma); deviations of the blur and of the Rician noise
    bias=(0.0, 0.22), bias_bowl=(-0.12, 0.12), gamma=(-0.24, 0.24), blur=(0.2, 0.56),
    noise=(0.015, 0.043))}


# A shape is an array [size, size]: roughly the distance to its edge in units, positive inside.


def ellipse(x: np.ndarray, y: np.ndarray, a: float, b: float) -> np.ndarray:
    """An ellipse around the origin with half axes a along x and b along y."""
    q = np.hypot(x / a, y / b) + 1e-9
    slope = np.hypot(x / a**2, y / b**2) / q  # of q; dividing by it makes (1 - q) a distance
    return (1 - q) / slope.clip(1 / max(a, b))


def paint(picture, shape: np.ndarray, value, softness: float = 0.55, opacity: float = 1):
    """`value` inside the shape, with an edge about four times `softness` wide."""
    cover = opacity * (1 / (1 + np.exp(-np.clip(shape / softness, -30, 30))))
    return picture + cover * (value - picture)


def draw_values(dials: SimpleNamespace, rng: np.random.Generator) -> SimpleNamespace:
    """A patient's value of every dial that is a range, and what else is the same in all slices."""
    p = SimpleNamespace(**vars(dials))
    for name, dial in vars(dials).items():
        if name in ("slices", "vessels"):
            setattr(p, name, int(rng.integers(dial[0], dial[1] + 1)))
        elif isinstance(dial, tuple) and name != "outline":
            setattr(p, name, rng.uniform(*dial))
    p.septum, p.rv_span, p.rv_tilt = map(math.radians, (p.septum, p.rv_span, p.rv_tilt))
    p.harmonics = [(k, rng.uniform(0, amplitude), rng.uniform(0, math.tau))
                   for k, amplitude in enumerate(p.outline, start=2)]
    p.displacement = p.breath * rng.standard_normal((p.slices, 2))
    side, opposite = rng.choice([-1, 1]), p.septum + math.pi
    p.gap = p.septum + side * rng.uniform(1.4, 2.3)  # direction in which the ring may be open
    p.gap_width = rng.uniform(0.35, 0.7) if rng.random() < p.open_base else 0
    p.muscles = [(opposite + sign * rng.uniform(0.5, 1.2), rng.uniform(0.5, 0.75),
                  rng.uniform(0.7, 1)) for sign in (-1, 1)]  # direction, distance, size
    p.muscle_range = rng.uniform(0.1, 0.35), rng.uniform(0.6, 0.85)  # of t

    # Surroundings: (direction from the heart, distance from its surface, thickness or radius)
    p.chest = p.septum + rng.uniform(-0.6, 0.6), rng.uniform(1, 12), rng.uniform(2, 7)
    p.lung_place = opposite + rng.uniform(-0.7, 0.7), rng.uniform(1, 8), rng.uniform(13, 22)
    p.liver_place = p.septum - side * rng.uniform(1.0, 1.9), rng.uniform(2, 8), rng.uniform(12, 20)
    p.vessel_list = [SimpleNamespace(
        direction=rng.uniform(0, math.tau), distance=rng.uniform(2, 16), radius=rng.uniform(2.5, 7),
        stretch=rng.uniform(1, 1.35), walled=rng.random() < p.vessel_wall,
        first=rng.uniform(-0.2, 0.6), extent=rng.uniform(0.4, 1.2), drift=rng.uniform(-4, 4),
    ) for _ in range(p.vessels)]
    # Lattices that do not depend on the size: a patient of another size is the same patient
    p.coarse = smooth_field(rng, p.size, p.size / rng.uniform(4, 8)).astype(float)
    p.fine = smooth_field(rng, p.size, p.size / 23.5).astype(float)
    p.bias_direction = rng.uniform(0, math.tau)
    return p


def draw_surroundings(p: SimpleNamespace, x: np.ndarray, y: np.ndarray, t: float) -> np.ndarray:
    """Intensities [size, size] without the heart; x and y are measured from its mean position."""
    heart = p.cavity + p.wall
    picture = p.tissue * (1 + p.texture * p.coarse + 0.06 * p.fine)
    liver = p.liver * (1 + 0.3 * p.texture * p.fine)
    organs = ((p.lung_place, 1.4, 2, p.lung), (p.liver_place, 1.3, 1, liver))
    for (direction, distance, radius), stretch, ragged, value in organs:
        outwards, across = rotate(x, y, direction, heart + distance + radius)
        organ = ellipse(outwards, across, radius, stretch * radius) + ragged * p.coarse
        picture = paint(picture, organ, value, softness=0.8)
    direction, distance, thickness = p.chest
    outwards, across = rotate(x, y, direction, heart * (1 + 0.8 * p.rv_width) + distance + 3)
    outwards = outwards + 0.008 * across**2 + 0.5 * p.coarse
    picture = paint(picture, outwards, p.fat * (1 + 0.5 * p.texture * p.coarse))
    picture = paint(picture, outwards - thickness, 0.03)  # air in front of the chest
    for v in p.vessel_list:
        if v.first <= t <= v.first + v.extent:
            outwards, across = rotate(x, y, v.direction, heart + v.distance + v.radius)
            across = across + v.drift * (t - 0.5)
            vessel = ellipse(outwards, across, v.radius, v.radius * v.stretch)
            if v.walled:
                picture = paint(picture, vessel + 2, p.muscle * p.blood)
            picture = paint(picture, vessel, 0.97 * p.blood)
    return picture


def heart_shapes(p: SimpleNamespace, x: np.ndarray, y: np.ndarray, t: float):
    """Shapes in a slice; x and y are measured from the LV's centre: (inside of the myocardium's
    outer edge; LV; RV, which reaches under the first; sector in which the ring is open; mean outer
    and inner radius of the ring, the latter 0 where the cavity is closed)."""
    nothing = np.full_like(x, -99.0)
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    waves = 1 + sum(a * np.cos(k * angle + phase) for k, a, phase in p.harmonics)
    inner = p.cavity * p.contraction
    inner *= math.sqrt(max(0, 1 - (t / (p.apex * p.shortening)) ** p.taper))
    outer = (p.cavity + p.wall) * p.epicardium
    outer *= math.sqrt(max(0, 1 - (t / (p.apex + 0.12)) ** p.taper))
    outer, inner = max(outer, inner + 2, 3), inner if inner > 1.2 else 0
    cavity = inner * waves - radius if inner else nothing

    # The RV is what of an egg lies outside the ring. Its centre is that of the chord of its ends.
    part = math.sqrt(max(0, 1 - (t / p.rv_end) ** 2))  # of the RV's size at the base
    width = p.rv_width * (p.cavity + p.wall) * part * p.rv_contraction
    span = p.rv_span * (0.6 + 0.4 * part)
    towards, across = rotate(x, y, p.septum)
    towards, across = rotate(towards - outer * math.cos(span), across, p.rv_tilt)
    towards = np.where(towards < 0, 2.5 * towards, towards)  # not to come out on the far side
    length = p.rv_height * outer * math.sin(span)
    crescent = ellipse(towards, across, outer * (1 - math.cos(span)) + width, length)

    from_gap = np.abs((angle - p.gap + math.pi) % math.tau - math.pi)
    gap = (p.gap_width - from_gap) * outer if t == 0 and p.gap_width else nothing
    return outer * waves - radius, cavity, crescent if width > 1.5 else nothing, gap, outer, inner


def draw_slice(p: SimpleNamespace, z: int) -> tuple[np.ndarray, np.ndarray]:
    """Slice z before bias, blur and noise: (intensities, label uint8), both [size, size]."""
    t = z / (p.slices - 1)
    axis = (np.arange(p.size) + 0.5) * UNITS / p.size - UNITS / 2
    x, y = np.meshgrid(axis - p.shift_x, axis - p.shift_y)
    picture = draw_surroundings(p, x, y, t)
    x = x - p.tilt_x * (t - 0.5) - p.displacement[z, 0]
    y = y - p.tilt_y * (t - 0.5) - p.displacement[z, 1]
    heart, cavity, crescent, gap, outer, inner = heart_shapes(p, x, y, t)
    muscle = p.muscle * p.blood

    fat = np.maximum(heart, crescent + 1.2) + p.fat_layer
    picture = paint(picture, fat, 0.85 * p.fat, opacity=0.8)
    picture = paint(picture, crescent + 1.2, muscle)  # the RV's wall
    picture = paint(picture, crescent, p.rv_blood * p.blood * (1 + 0.06 * p.fine))
    if gap.max() > 0:  # the outflow tract, seen through the gap
        root = x - outer * math.cos(p.gap), y - outer * math.sin(p.gap)
        picture = paint(picture, ellipse(*root, 0.5 * outer, 0.5 * outer), p.blood)
    ring = paint(p.blood, -gap, muscle)  # blood in the gap
    picture = paint(picture, heart, ring * (1 + 0.06 * p.fine))
    picture = paint(picture, cavity, p.blood * (1 + 0.04 * p.fine))
    if inner and p.muscle_range[0] <= t <= p.muscle_range[1]:
        for direction, distance, factor in p.muscles:
            reach, radius = distance * inner, factor * p.papillary * inner
            center = x - reach * math.cos(direction), y - reach * math.sin(direction)
            picture = paint(picture, ellipse(*center, radius, radius), muscle, opacity=0.85)

    label = np.zeros((p.size, p.size), np.uint8)
    label[crescent > 0] = RV
    label[heart > 0] = MYOCARDIUM
    label[(heart > 0) & (gap > 0)] = 0
    label[cavity > 0] = LV
    return picture, label


def draw_patient(dials: SimpleNamespace, rng: np.random.Generator) -> list[tuple]:
    """[("ED", image, label, spacing), ("ES", ...)]: image float32 [Z, size, size], multiples of
    1/255 from 0 to 1; label uint8 [Z, size, size]; spacing in mm along z, y, x."""
    p = draw_values(dials, rng)
    pixel = round(p.field_of_view / p.size, 4)
    ramp = np.linspace(-1, 1, p.size)
    x, y = np.meshgrid(ramp, ramp)
    slope = p.bias * (math.cos(p.bias_direction) * x + math.sin(p.bias_direction) * y)
    bias = np.exp(slope + p.bias_bowl * (x**2 + y**2 - 0.5))
    relaxed = dict.fromkeys(("shortening", "contraction", "epicardium", "rv_contraction"), 1)
    sigma, phases = p.blur * p.size / UNITS, []
    for name, heart in (("ED", with_changes(p, **relaxed)), ("ES", p)):
        pictures, labels = zip(*(draw_slice(heart, z) for z in range(p.slices)))
        image = torch.from_numpy(np.stack(pictures) * bias)
        image = gaussian_blur(image, [2 * math.ceil(3 * sigma) + 1] * 2, [sigma] * 2).numpy()
        image = image.clip(0) ** math.exp(p.gamma)
        real, imaginary = p.noise * rng.standard_normal((2, *image.shape))  # Rician
        image = np.hypot(image + real, imaginary)
        low, high = np.percentile(image, [0.5, 99.5])
        image = (255 * ((image - low) / (high - low)).clip(0, 1)).round()
        image = image.astype(np.float32) / np.float32(255)
        phases.append((name, image, np.stack(labels), (round(p.slice_distance, 2), pixel, pixel)))
    return phases


# ---------------------------------------------------------------- files


def choose_labeled(present: np.ndarray, rng: np.random.Generator) -> dict[int, list[int]]:
    """Nested labeled sets {12: rows, 24: rows, 48: rows} of `present` [images, classes] bool.

    For each size, from the rarest class on: random images that show it until LABELED[size] do, as
    far as there are some and there is room; the rest is drawn from all images.
    """
    order = rng.permutation(len(present)).tolist()
    chosen, sets = [], {}
    for size, wanted in LABELED.items():
        for k in np.argsort(present.sum(axis=0), kind="stable"):
            for i in order:
                if present[chosen, k].sum() >= wanted or len(chosen) == size:
                    break
                if present[i, k] and i not in chosen:
                    chosen.append(i)
        chosen += [i for i in order if i not in chosen][: size - len(chosen)]
        sets[size] = list(chosen)
    return sets


def write_shapes(folder: Path, dials: SimpleNamespace) -> None:
    """JPEGImages/<id>.jpg, SegmentationClass/<id>.png (255 on borders), classes.txt,
    ImageSets/Segmentation/{train, val, tune, labeled_12, labeled_12_split1, ...}.txt."""
    images, labels = folder / "JPEGImages", folder / "SegmentationClass"
    lists = folder / "ImageSets" / "Segmentation"
    for part in (images, labels, lists):
        part.mkdir(parents=True)
    palette, seen = np.array(voc_palette(), np.uint8).tobytes(), []
    for s, split in enumerate(("train", "val", "tune")):
        names = [f"{split}_{i:06d}" for i in range(getattr(dials, split))]
        write_lines(lists / f"{split}.txt", names)
        for i, name in enumerate(names):
            image, label = draw_shapes(dials, np.random.default_rng([dials.seed, s, i]))
            Image.fromarray(image).save(images / f"{name}.jpg", quality=95, subsampling=0)
            mask = Image.fromarray(label)
            mask.putpalette(palette)  # turns mode "L" into "P"
            mask.save(labels / f"{name}.png")
            if split == "train":  # a class counts as seen from 1 % of the pixels on
                seen.append(np.bincount(label.ravel(), minlength=256) >= 0.01 * label.size)
    present = np.array(seen)[:, 1 : len(dials.classes)]
    for choice, suffix in enumerate(("", "_split1", "_split2")):
        rng = np.random.default_rng([dials.seed, 3, choice])
        for size, rows in choose_labeled(present, rng).items():
            write_lines(lists / f"labeled_{size}{suffix}.txt",
                        [f"train_{i:06d}" for i in sorted(rows)])
    write_lines(folder / "classes.txt", dials.classes)


def write_phantom(folder: Path, dials: SimpleNamespace) -> None:
    """volumes/patientNNN_{ED, ES}.npz (see common.medical), lists/{train, train_split1,
    train_split2, val, test}.txt with lines "<patient> <volume>", classes.txt."""
    volumes, lists, number = folder / "volumes", folder / "lists", 0
    volumes.mkdir(parents=True)
    for s, split in enumerate(("train", "val", "test")):
        patients = []  # their lines in the list, two for each
        for i in range(getattr(dials, split)):
            number += 1
            patient = f"patient{number:03d}"
            rng = np.random.default_rng([dials.seed, s, i])
            for phase, image, label, spacing in draw_patient(dials, rng):
                np.savez_compressed(volumes / f"{patient}_{phase}.npz",
                                    image=image, label=label, spacing=spacing)
            patients.append(f"{patient} {patient}_ED\n{patient} {patient}_ES")
        write_lines(lists / f"{split}.txt", patients)
        if split == "train":  # three orders: the labeled patients are the first ones of a list
            for order, suffix in enumerate(("", "_split1", "_split2")):
                rows = np.random.default_rng([dials.seed, 3, order]).permutation(len(patients))
                write_lines(lists / f"train{suffix}.txt", [patients[row] for row in rows])
    write_lines(folder / "classes.txt", CARDIAC_CLASSES)


def generate(root: Path | str, name: str) -> None:
    """Write a data set of SHAPES or PHANTOMS, unless generator.json says that it is there.

    UserError if `root` holds anything else, KeyError for another name. The folder appears complete:
    processes that start together agree.
    """
    write, dials = (write_shapes, SHAPES) if name in SHAPES else (write_phantom, PHANTOMS)
    root, dials = Path(root).resolve(), dials[name]
    text = json.dumps({"format": FORMAT, "name": name, "dials": vars(dials)}, indent=1) + "\n"

    def is_there() -> bool:
        file = root / "generator.json"
        return file.is_file() and file.read_text() == text

    if is_there():
        return
    free = not root.exists() or root.is_dir() and not any(root.iterdir())
    require(free, f"{root} is not empty, and holds no {name} of this version: delete that folder, "
                  f"or choose another one")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as temporary:
            folder = Path(temporary) / "data"  # a level below: only its owner can read `temporary`
            write(folder, dials)
            (folder / "generator.json").write_text(text)
            os.rename(folder, root)
    except OSError as error:  # of os.rename, too, where another process was faster
        require(is_there(), f"cannot write {root}: {error.strerror or error}")


# ---------------------------------------------------------------- pretraining
# Classification of single blobs, as ImageNet's for real backbones: the benchmark's textures among
# others, in half of the geometry's variety. An encoder that has seen all of it would leave little
# for semi-supervised training to gain.

TEXTURES = SHAPE_CLASSES[1:] + ("diag", "grid", "wave", "rings", "plain", "vwave", "hexagons",
                                "spots", "worms", "bricks")
PRETRAINING = with_changes(
    SHAPES["shapes"], size=32, radius=(9.0, 17.0), margin=10.0, period=(5.0, 8.0), aspect=1.2,
    tilt=6.0, duty=(0.43, 0.57), sharpness=(1.0, 3.5), warp=(0.0, 0.8))


def single_blobs(kinds: list[int], seed: int) -> Tensor:
    """A picture for each index into TEXTURES: [N, 3, 32, 32] float32, normalised."""
    pictures = []
    for i, kind in enumerate(kinds):
        rng = np.random.default_rng([seed, 6, i])  # 6: no picture is a benchmark's
        pictures.append(draw_shapes(PRETRAINING, rng, [TEXTURES[kind]])[0])
    return normalize(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2))


def pooled_features(encoder: nn.Module, x: Tensor) -> Tensor:
    """Pictures [N, 3, 32, 32] -> the mean of the encoder's last features over each one, [N, 96].

    The transformer gets four pictures as one of 64 x 64, its own size: so it learns every position
    embedding, and that the neighbourhood counts, which a convolution knows by construction. They
    are shifted together in a circle by whole patches, else it would learn where the seams are.
    """
    if not hasattr(encoder, "patch"):
        return encoder(x)[1].mean(dim=(2, 3))
    mosaics = x.unflatten(0, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5)
    mosaics = mosaics.flatten(4, 5).flatten(2, 3)  # [N/4, 3, 64, 64]
    shift = torch.randint(encoder.grid, (2,)) if encoder.training else torch.zeros(2, dtype=int)
    mosaics = mosaics.roll((shift * encoder.patch).tolist(), dims=(2, 3))
    features = encoder(mosaics)[-1].roll((-shift).tolist(), dims=(2, 3))  # [N/4, 96, 8, 8]
    features = features.unflatten(3, (2, -1)).unflatten(2, (2, -1)).mean(dim=(3, 5))
    return features.permute(0, 2, 3, 1).flatten(0, 2)


def pretrain(backbone: str, output: Path, epochs: int, pictures: int, seed: int = 7) -> None:
    """Write the encoder's state dict in float16; prints the accuracy on held-out pictures."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kinds = [i % len(TEXTURES) for i in range(pictures)]
    x, y = single_blobs(kinds, seed).to(device), torch.tensor(kinds, device=device)
    held_out, batch = pictures // 64 * 4, 64  # a sixteenth, in whole mosaics
    steps = (pictures - held_out) // batch  # per epoch
    encoder = build_encoder(backbone, "none")
    net = nn.Sequential(encoder, nn.Linear(96, len(TEXTURES))).to(device)
    if backbone == "tiny":
        optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=1e-4, nesterov=True)
    else:
        optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(  # a short warm-up, then cosine
        optimizer, optimizer.defaults["lr"], total_steps=epochs * steps, cycle_momentum=False,
        pct_start=0.02 if backbone == "tiny" else 0.1)

    for epoch in range(epochs):
        net.train()
        order = (held_out + torch.randperm(pictures - held_out)).to(device)
        for rows in order[: steps * batch].split(batch):
            inputs = x[rows][:, torch.randperm(3)]  # colour carries no class
            inputs = inputs.flip([axis for axis in (2, 3) if torch.rand(()) < 0.5])
            loss = F.cross_entropy(net[1](pooled_features(encoder, inputs)), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        net.eval()
        with torch.no_grad():
            features = [pooled_features(encoder, part) for part in x[:held_out].split(256)]
            right = net[1](torch.cat(features)).argmax(dim=1) == y[:held_out]
        accuracy = right.float().mean()
        print(f"epoch {epoch + 1}  loss {loss:.6f}  held-out accuracy {accuracy:.3f}", flush=True)
    state = dict(encoder.cpu().half().state_dict())  # counters stay whole numbers
    write_atomically(output, lambda temporary: torch.save(state, temporary))


@dataclass
class Config:
    dataset: str | None = option(None, "data set to write", choices=(*SHAPES, *PHANTOMS))
    encoder: str | None = option(None, "encoder to pretrain", choices=("tiny", "tiny_vit"))
    output: str | None = option(None, "folder (data/<dataset>) or file (the shipped weights)")
    epochs: int | None = option(None, "of the encoder (tiny 10, tiny_vit 24)", low=1)
    pictures: int | None = option(None, "of the encoder (tiny 16000, tiny_vit 24000)", low=160)


def main() -> None:
    config = parse(Config, description=__doc__)
    require(bool(config.dataset) != bool(config.encoder), "give --dataset or --encoder")
    if config.dataset:
        return generate(config.output or f"data/{config.dataset}", config.dataset)
    epochs, pictures = {"tiny": (10, 16000), "tiny_vit": (24, 24000)}[config.encoder]
    pretrain(config.encoder, Path(config.output or DEFAULT_WEIGHTS[config.encoder]),
             config.epochs or epochs, config.pictures or pictures)


if __name__ == "__main__":
    run_main(main)
