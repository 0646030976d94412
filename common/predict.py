"""Segment your own pictures, or volumes, with a trained checkpoint.

    python -m common.predict --checkpoint runs/mine/best.pt --output segmented holiday.jpg pictures/

holiday.jpg gives holiday.png, a palette PNG of its size whose values are the class numbers (for
Cityscapes grey labelIds), and holiday_overlay.png. (`--mode whole` is how pascal and coco are
scored.) A checkpoint of volumes takes .npz and NIfTI: heart.npz gives heart.npz, the image
(min-max normalised) with the predicted label, heart.nii.gz gives heart.nii.gz, class numbers on
its grid. What cannot be read is reported and left out; the exit status is then 1. Under torchrun
the ranks share the files.
"""

import dataclasses
import gzip
import sys
import unicodedata
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.augment import normalize
from common.data import PICTURES, TO_LABEL_ID, DatasetInfo, open_image
from common.evaluate import MODES, Predict, class_probabilities, load_predictor
from common.figures import colorize, save_indexed_png, save_png
from common.medical import (VolumeInfo, min_max, read_nifti, read_volume, segment_volume, turn,
                            write_volume)
from common.runtime import (Parser, UserError, all_reduce_sum, explain, init_distributed, rank,
                            reading, require, require_finite, run_main, world_size,
                            write_atomically)

VOLUMES = (".npz", ".nii", ".nii.gz")


def find_files(arguments: list[Path], endings: tuple[str, ...]) -> tuple[list[Path], list[str]]:
    """Files, and those in folders that end so -> (each once, a line per argument without one)."""
    files, problems = {}, []
    for argument in arguments:
        found = [argument] if argument.is_file() else []
        if argument.is_dir():  # without macOS's ._ doubles
            found = [file for file in sorted(argument.iterdir()) if not file.is_dir()
                     and file.name.lower().endswith(endings) and not file.name.startswith(".")]
        if not found:
            problems.append(f"{argument} is no file, and no folder with any ({' '.join(endings)})")
        files.update((file.parent.resolve() / file.name, file) for file in found)
    return list(files.values()), problems


def output_paths(files: list[Path], folder: Path, of_volumes: bool) -> dict[Path, list[Path]]:
    """File -> what is written for it. Equal names get a number: a/x.jpg x.png, b/x.jpg x_2.png.

    Raises UserError where an input would be overwritten.
    """
    def place(path: Path) -> tuple[Path, str]:  # some disks know no case, and one form of an é
        return path.resolve().parent, unicodedata.normalize("NFC", path.name.lower())

    inputs, outputs, taken = set(map(place, files)), {}, set()
    for file in files:
        compressed = file.suffix.lower() == ".gz"
        ending = "".join(file.suffixes[-2:]) if compressed else file.suffix
        endings = (ending,) if of_volumes else (".png", "_overlay.png")
        stem = name = file.name.removesuffix(ending)
        number = 1
        while not taken.isdisjoint(place(folder / f"{name}{ending}") for ending in endings):
            number += 1
            name = f"{stem}_{number}"
        outputs[file] = [folder / f"{name}{ending}" for ending in endings]
        taken.update(map(place, outputs[file]))
        require(inputs.isdisjoint(map(place, outputs[file])),
                f"the result for {file} would overwrite an input: choose another --output")
    return outputs


@torch.inference_mode()
def predict_picture(predict: Predict, source: Path, targets: list[Path], info: DatasetInfo,
                    mode: str, crop: int, device: torch.device) -> None:
    """Write the label map and the overlay."""
    picture = open_image(source)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].to(device)
    probabilities = class_probabilities(predict, normalize(pixels), mode, crop)
    require_finite(probabilities)
    label = probabilities[0].argmax(dim=0).byte().cpu().numpy()
    if info.name == "cityscapes":
        save_png(Image.fromarray(TO_LABEL_ID[label]), targets[0])
    else:
        save_indexed_png(label, info.palette, targets[0])
    colors = Image.fromarray(colorize(label, info.palette))
    save_png(Image.blend(picture, colors, 0.5), targets[1])


def predict_volume(predict: Predict, source: Path, target: Path, info: VolumeInfo, size: int,
                   device: torch.device) -> None:
    """Write .npz: image and labels; NIfTI: labels, uint8, on the image's grid, with its affine."""
    require(source.name.lower().endswith(VOLUMES), f"{source} is no volume ({' '.join(VOLUMES)})")
    if source.suffix.lower() == ".npz":
        volume = read_volume(source, with_label=False)
        label = segment_volume(predict, volume.image, size, device)
        return write_volume(target, dataclasses.replace(volume, label=label))
    with reading(source):
        original, image, _ = read_nifti(source, info.name == "prostate")  # T2, as in training
        require(bool(np.isfinite(image).all()), f"{source} holds numbers that are not finite")
    label = segment_volume(predict, min_max(image), size, device)
    with reading(source):  # a damaged header may show only here
        header = original.header.copy()
        header.set_data_dtype(np.uint8)
        header["cal_min"] = header["cal_max"] = 0  # the brightness that viewers would show
        label = turn(label.T, original, back=True)
        content = type(original)(label, original.affine, header).to_bytes()
    if target.suffix.lower() == ".gz":
        content = gzip.compress(content)
    write_atomically(target, lambda temporary: temporary.write_bytes(content))


def main() -> int:
    parser = Parser(prog="python -m common.predict", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="pictures or volumes, or their folders")
    parser.add_argument("--checkpoint", required=True, help="best.pt or latest.pt of a run")
    parser.add_argument("--output", type=Path, default=Path("segmented"), help="folder of results")
    parser.add_argument("--mode", choices=MODES, help="default: aligned or sliding")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
                        help="options to change in the checkpoint's config")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    args = parser.parse_args()

    device = init_distributed(args.device)[2]
    predict, config, info = load_predictor(args.checkpoint, device, args.set)
    of_volumes, crop = isinstance(info, VolumeInfo), config["crop"]
    require(not of_volumes or not args.mode, "--mode is for pictures, not for volumes")
    files, problems = find_files(args.files, VOLUMES if of_volumes else PICTURES)
    problems = problems if rank() == 0 else []  # said once
    work = list(output_paths(files, args.output, of_volumes).items())
    for file, targets in work[rank() :: world_size()]:
        try:
            if of_volumes:
                predict_volume(predict, file, targets[0], info, crop, device)
            else:
                mode = args.mode or ("sliding" if info.evaluation == "sliding" else "aligned")
                predict_picture(predict, file, targets, info, mode, crop, device)
            print(f"{file} -> {targets[0]}")
        except UserError as error:
            problems.append(str(error))
        except (RuntimeError, MemoryError) as error:
            if explain(error) is None:
                raise
            problems.append(f"{file}: {explain(error)}")
    for problem in problems:
        print(f"error: {' '.join(problem.split())}", file=sys.stderr)
    return int(all_reduce_sum(torch.tensor(len(problems), device=device)) > 0)


if __name__ == "__main__":
    run_main(main)
