"""Pretraining of the tiny encoders by classification, as ImageNet does it for real backbones.

    python -m common.pretrain                       # makes common/tiny_encoder.pt again: four minutes on one CPU core
    python -m common.pretrain --encoder tiny_vit    # makes common/tiny_vit.pt again: eight minutes

They see single blobs with image labels only: in pictures of their own, the benchmark's textures among others, and with
half of the geometry's variety (an encoder that has seen all of it leaves little for semi-supervised training to gain).
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.augment import normalize
from common.deeplab import TINY_WEIGHTS, TinyEncoder
from common.dpt import TINY_VIT_WEIGHTS, build_vit
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


def pooled_features(encoder: nn.Module, x: Tensor) -> Tensor:
    """What is classified, [N, dim]: the mean over each picture of [N, 3, 32, 32] of the encoder's last features.

    The transformer gets four pictures as one of 64 x 64, its own size: so it learns every position embedding, and that
    the neighbourhood counts, which a convolution knows by construction. The four are shifted together in a circle by
    whole patches, else it would learn the seams' places instead. N is a multiple of 4 then.
    """
    if isinstance(encoder, TinyEncoder):
        return encoder(x)[1].mean(dim=(2, 3))
    mosaics = x.unflatten(0, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # [N/4, 3, 64, 64]
    shift = torch.randint(encoder.grid, (2,)).tolist() if encoder.training else [0, 0]
    features = encoder(mosaics.roll([side * encoder.patch for side in shift], dims=(2, 3)))[-1]
    features = features.roll([-side for side in shift], dims=(2, 3)).unflatten(3, (2, -1)).unflatten(2, (2, -1))
    return features.mean(dim=(3, 5)).permute(0, 2, 3, 1).flatten(0, 2)


def pretrain(output: Path, epochs: int, pictures: int, seed: int, device: str, backbone: str = "tiny") -> float:
    """Classify single blobs by texture, save the encoder's state dict in float16, return the held-out accuracy."""
    torch.manual_seed(seed)
    start = time.time()
    kinds = [i % len(PRETRAINING_TEXTURES) for i in range(pictures)]
    x, y = single_blobs(kinds, seed).to(device), torch.tensor(kinds, device=device)
    print(f"{pictures} pictures of {len(PRETRAINING_TEXTURES)} textures, {time.time() - start:.0f} s", flush=True)
    held_out, batch = pictures // 64 * 4, 64  # a sixteenth, in whole mosaics
    steps = (pictures - held_out) // batch  # per epoch

    encoder = (TinyEncoder() if backbone == "tiny" else build_vit(backbone, "none")).to(device)
    head = nn.Linear(encoder.high_channels if backbone == "tiny" else encoder.dim, len(PRETRAINING_TEXTURES)).to(device)
    net = nn.ModuleList([encoder, head])
    if backbone == "tiny":
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    else:
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(  # a short warm-up, then cosine
        optimizer, max_lr=optimizer.defaults["lr"], total_steps=epochs * steps, pct_start=0.02 if backbone == "tiny" else 0.1,
        cycle_momentum=False,
    )
    for epoch in range(epochs):
        net.train()
        for rows in (held_out + torch.randperm(pictures - held_out)).to(device)[: steps * batch].split(batch):
            inputs = x[rows][:, torch.randperm(3)]  # colour carries no class
            inputs = inputs.flip([axis for axis in (2, 3) if torch.rand(()) < 0.5])
            loss = F.cross_entropy(head(pooled_features(encoder, inputs)), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        net.eval()
        with torch.no_grad():
            outputs = torch.cat([head(pooled_features(encoder, part)) for part in x[:held_out].split(256)])
        hits = (outputs.argmax(dim=1) == y[:held_out]).float()
        print(f"epoch {epoch + 1}  held-out accuracy {hits.mean():.3f}  {time.time() - start:.0f} s", flush=True)
    print("  ".join(f"{name} {hits[y[:held_out] == k].mean():.2f}" for k, name in enumerate(PRETRAINING_TEXTURES)))

    state = {key: value.cpu().half() if value.is_floating_point() else value.cpu()
             for key, value in encoder.state_dict().items()}
    write_atomically(output, lambda temporary: torch.save(state, temporary))
    return hits.mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m common.pretrain", description="Train a tiny encoder to classify single textures.")
    parser.add_argument("--encoder", dest="backbone", choices=("tiny", "tiny_vit"), default="tiny")
    parser.add_argument("--output", type=Path, help="default: the shipped file")
    parser.add_argument("--epochs", type=int, help="default: 10; tiny_vit: 24")
    parser.add_argument("--pictures", type=int, help="default: 16000; tiny_vit: 24000")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    defaults = (TINY_WEIGHTS, 10, 16000) if args.backbone == "tiny" else (TINY_VIT_WEIGHTS, 24, 24000)
    for name, value in zip(("output", "epochs", "pictures"), defaults):
        if getattr(args, name) is None:
            setattr(args, name, value)
    pretrain(**vars(args))


if __name__ == "__main__":
    run_main(main)
