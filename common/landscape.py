"""The loss landscape around trained weights: Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018.

Section 4: f(a) = L(theta + a d) along random directions d. A ReLU network stays the same function with one layer's
weights times 10 and the next one's divided by 10, but to the larger weights a step of fixed length means less. Each
filter of d therefore gets the norm of the weights' filter, and curves of different networks can be laid over each other.

                      paper's released code       here
    1-D parameters    0 (--xignore biasbn)        0: biases, batch and layer norm, LayerScale
    a filter          a slice along dimension 0   the same, but along dimension 1 for transposed convolutions, whose
                                                  weights are [in, out, k, k]; cls_token [1, 1, D] and pos_embed
                                                  [1, N, D] are one filter each
    frozen weights    moved                       0
    directions        one                         several: their mean and range

    rows = scan(model.eval(), lambda: {"loss": loss(model), "miou": miou(model)}, [i / 10 for i in range(-10, 11)], 5, seed=0)
    print(table({"DAW": rows}))
    save({"DAW": rows}, Path("runs"), {"loss": "training loss", "miou": "mIoU (%)"})
"""

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from common.files import write_atomically, write_json

RADIUS = 0.5  # of the neighbourhood whose sharpness is reported; at distance 1 a step is as long as the weights
COLUMNS = 9  # distances in a table, at most


def filter_normalized_direction(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """{name: direction of the parameter's shape, dtype and device}; the paper's d <- d / ||d|| ||theta||, per filter.

    `generator` lives on the CPU and everything is computed there: the same seed gives the same direction on every
    device and rank. Raises ValueError if no parameter requires grad, as there would be nothing to move.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("no parameter requires grad: every direction would be zero")
    transposed = {id(module.weight) for module in model.modules()
                  if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))}
    direction = {}
    for name, parameter in model.named_parameters():
        # Drawn for every parameter, so that networks of one shape share the Gaussian whatever is frozen in them.
        gaussian = torch.randn(parameter.shape, generator=generator, dtype=torch.float64, device="cpu")
        if parameter.dim() < 2 or not parameter.requires_grad:
            direction[name] = torch.zeros_like(parameter, requires_grad=False)
            continue
        weights = parameter.detach().to(gaussian)
        filter_dim = 1 if id(parameter) in transposed else 0
        within = [dim for dim in range(weights.dim()) if dim != filter_dim]
        norm, length = (torch.linalg.vector_norm(tensor, dim=within, keepdim=True) for tensor in (weights, gaussian))
        direction[name] = (gaussian * (norm / length)).to(parameter)
    return direction


@contextlib.contextmanager
def moved(model: nn.Module, direction: dict[str, Tensor], distance: float) -> Iterator[None]:
    """The model at theta + distance * direction inside the block; buffers stay. Afterwards theta again, bit for bit."""
    parameters = dict(model.named_parameters())
    trained = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(direction[name], alpha=distance)
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():  # a step back would leave rounding errors
                parameter.copy_(trained[name])


def scan(model: nn.Module, measure: Callable[[], dict[str, float]], distances: Sequence[float], directions: int,
         seed: int) -> list[dict]:
    """Rows {"direction": k, "distance": a, **measure()}, the model moved by a along direction k; None: not finite.

    `measure` uses `model`, in eval mode: otherwise batch norm's statistics would change from row to row. Distance 0
    is the same point in every direction and measured once.
    """
    rows, centre = [], None
    for k in range(directions):
        direction = filter_normalized_direction(model, torch.Generator().manual_seed(seed * 1000 + k))
        for distance in map(float, distances):
            if distance == 0 and centre is not None:
                values = centre
            else:
                with moved(model, direction, distance):
                    values = {name: _number(value) for name, value in measure().items()}
                centre = values if distance == 0 else centre
            rows.append({"direction": k, "distance": distance, **values})
    return rows


def _number(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None  # JSON has no nan


def summary(rows: list[dict], name: str) -> dict[float, tuple[float, float, float] | None]:
    """{distance, ascending: (mean, lowest, highest) over the directions, or None if one of them has no finite value}."""
    groups: dict[float, list] = {distance: [] for distance in sorted({row["distance"] for row in rows})}
    for row in rows:
        groups[row["distance"]].append(row[name])
    return {distance: None if None in values else (statistics.fmean(values), min(values), max(values))
            for distance, values in groups.items()}


def sharpness(rows: list[dict], name: str = "loss", radius: float = RADIUS) -> float | None:
    """Mean of f(a) - f(0) over the directions and the distances 0 < |a| <= radius; None if one of the values is."""
    centre = [row[name] for row in rows if row["distance"] == 0]
    around = [row[name] for row in rows if 0 < abs(row["distance"]) <= radius + 1e-9]  # 0.1 * 3 is above 0.3
    return statistics.fmean(around) - centre[0] if centre and around and None not in centre + around else None


def table(curves: dict[str, list[dict]]) -> str:
    """{checkpoint: rows of `scan`} -> Markdown: means over the directions at some distances, and the sharpness."""
    distances = sorted({row["distance"] for rows in curves.values() for row in rows})
    last, columns = len(distances) - 1, min(COLUMNS, len(distances))
    shown = [distances[round(last * column / max(1, columns - 1))] for column in range(columns)]
    lines = [["checkpoint", "measure", *(f"{distance:g}" for distance in shown), f"mean rise within {RADIUS:g}"]]
    for checkpoint, rows in curves.items():
        for name in [name for name in rows[0] if name not in ("direction", "distance")]:
            points = summary(rows, name)
            values = [(points.get(distance) or [None])[0] for distance in shown] + [sharpness(rows, name)]
            lines.append([checkpoint, name, *("-" if value is None else f"{value:.4g}" for value in values)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["| " + " | ".join(entry.ljust(width) for entry, width in zip(line, widths)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]])


def save(curves: dict[str, list[dict]], folder: Path, panels: dict[str, str]) -> None:
    """landscape.json, {checkpoint: rows}; if matplotlib is installed landscape.png, a panel per {measure: axis label}."""
    write_json(folder / "landscape.json", curves)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for index, (checkpoint, rows) in enumerate(curves.items()):
            points = summary(rows, name)
            mean, lowest, highest = zip(*(point or (math.nan,) * 3 for point in points.values()))  # nan: a gap
            axes.plot(list(points), mean, color=f"C{index}", label=checkpoint)
            axes.fill_between(list(points), lowest, highest, color=f"C{index}", alpha=0.15, linewidth=0)
        axes.set(xlabel="distance along filter-normalised directions", ylabel=label)
        axes.legend()
    write_atomically(folder / "landscape.png", lambda temporary: figure.savefig(temporary, format="png", dpi=120))
