"""Pretraining of the tiny encoder by classification, as ImageNet does it for real backbones.

    python -m common.pretrain          # makes common/tiny_encoder.pt again: four minutes on one CPU core

It sees single blobs with image labels only: in pictures of their own, the benchmark's textures among others, and with
half of the geometry's variety (an encoder that has seen all of it leaves little for semi-supervised training to gain).
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.augment import normalize
from common.deeplab import TINY_WEIGHTS, TinyEncoder
from common.files import write_atomically
from common.runtime import run_main
from common.synthetic import LABELED_CHOICES, LARGE_CLASSES, SPLITS, VARIANTS, draw

PRETRAINING_TEXTURES = LARGE_CLASSES[1:] + ("plain", "vwave", "hexagons", "spots", "worms", "bricks")
PRETRAINING = replace(
    VARIANTS["shapes"], size=32, radius=(9.0, 17.0), margin=10.0, period=(5.0, 8.0), aspect=1.2, tilt=6.0,
    duty=(0.43, 0.57), sharpness=(1.0, 3.5), warp=(0.0, 0.8),
)


def single_blobs(kinds: list[int], seed: int) -> torch.Tensor:
    """One picture for each index into PRETRAINING_TEXTURES: [N, 3, 32, 32] float32, normalised."""
    stream = len(SPLITS) + LABELED_CHOICES  # one of its own: no benchmark image is ever seen in pretraining
    pictures = [draw(PRETRAINING, np.random.default_rng([seed, stream, i]), [PRETRAINING_TEXTURES[kind]])[0]
                for i, kind in enumerate(kinds)]
    return normalize(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2))


def pretrain(output: Path, epochs: int, pictures: int, seed: int, device: str) -> float:
    """Classify single blobs by texture, save the encoder's state dict in float16, return the held-out accuracy."""
    torch.manual_seed(seed)
    start = time.time()
    kinds = [i % len(PRETRAINING_TEXTURES) for i in range(pictures)]
    x, y = single_blobs(kinds, seed).to(device), torch.tensor(kinds, device=device)
    print(f"{pictures} pictures of {len(PRETRAINING_TEXTURES)} textures, {time.time() - start:.0f} s", flush=True)
    held_out, batch = pictures // 16, 64
    steps = (pictures - held_out) // batch  # per epoch

    encoder = TinyEncoder().to(device)
    head = nn.Linear(encoder.high_channels, len(PRETRAINING_TEXTURES)).to(device)
    net = nn.ModuleList([encoder, head])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(  # a short warm-up, then cosine
        optimizer, max_lr=0.1, total_steps=epochs * steps, pct_start=0.02, cycle_momentum=False
    )
    for epoch in range(epochs):
        net.train()
        for rows in (held_out + torch.randperm(pictures - held_out)).to(device)[: steps * batch].split(batch):
            inputs = x[rows][:, torch.randperm(3)]  # colour carries no class
            inputs = inputs.flip([axis for axis in (2, 3) if torch.rand(()) < 0.5])
            loss = F.cross_entropy(head(encoder(inputs)[1].mean(dim=(2, 3))), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        net.eval()
        with torch.no_grad():
            outputs = torch.cat([head(encoder(part)[1].mean(dim=(2, 3))) for part in x[:held_out].split(256)])
        hits = (outputs.argmax(dim=1) == y[:held_out]).float()
        print(f"epoch {epoch + 1}  held-out accuracy {hits.mean():.3f}  {time.time() - start:.0f} s", flush=True)
    print("  ".join(f"{name} {hits[y[:held_out] == k].mean():.2f}" for k, name in enumerate(PRETRAINING_TEXTURES)))

    state = {key: value.cpu().half() if value.is_floating_point() else value.cpu()
             for key, value in encoder.state_dict().items()}
    write_atomically(output, lambda temporary: torch.save(state, temporary))
    return hits.mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m common.pretrain", description="Train the tiny encoder to classify single textures.")
    parser.add_argument("--output", type=Path, default=TINY_WEIGHTS)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--pictures", type=int, default=16000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    pretrain(**vars(parser.parse_args()))


if __name__ == "__main__":
    run_main(main)
