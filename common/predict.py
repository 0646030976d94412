"""Segment your own pictures with a trained checkpoint.

    python -m common.predict --checkpoint runs/daw/latest.pt --output segmented holiday.jpg pictures/

For every picture, of any size, two files: <stem>.png, a palette PNG of the picture's size whose values are the class
numbers (for Cityscapes its labelIds, in grey), and <stem>_overlay.png, the classes' colours over the picture. Folders stand for the pictures in them (not
below). A picture that cannot be read is reported and skipped, and the exit status is then 1.

    python -m common.predict --checkpoint runs/diffrect/best.pt --output segmented patient.nii.gz volumes/

A checkpoint of volumes takes .npz and NIfTI files. An .npz gives <stem>.npz, the volume with the predicted label; a NIfTI file gives
<stem>.nii.gz (or .nii), the labels on its grid, with its affine (needs nibabel).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import cityscapes, medical, scores
from common.augment import normalize
from common.data import DatasetInfo
from common.evaluate import MODES, Predict, class_probabilities, load_model
from common.loading import open_image
from common.pictures import overlay, save_indexed_png, save_png
from common.runtime import UserError, run_main, start

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
VOLUME_SUFFIXES = (".npz", ".nii", ".nii.gz")


def find_images(arguments: list[Path], suffixes: tuple[str, ...] = SUFFIXES) -> tuple[list[Path], list[str]]:
    """Files and folders -> (files in order, each once, in folders those that end so; one line per argument that is neither)."""
    images, problems = {}, []
    for argument in arguments:
        found = [argument]
        if argument.is_dir():
            found = sorted(file for file in argument.iterdir() if file.name.lower().endswith(suffixes) and file.is_file())
            if not found:
                problems.append(f"no {'pictures' if suffixes == SUFFIXES else 'volumes'} ({' '.join(suffixes)}) in the folder {argument}")
        elif not argument.is_file():
            problems.append(f"no file or folder {argument}")
            continue
        for file in found:
            images.setdefault(file.resolve(), file)
    return list(images.values()), problems


def output_paths(images: list[Path], folder: Path) -> dict[Path, tuple[Path, Path]]:
    """Picture -> (label map, overlay). Equal stems get a number: a/x.jpg -> x.png, b/x.jpg -> x_2.png.

    Raises UserError if a picture would be overwritten.
    """
    inputs = {image.resolve(): image for image in images}
    outputs, taken = {}, set()
    for image in images:
        name, number = image.stem, 1
        while taken & {name.lower(), f"{name}_overlay".lower()}:  # some file systems ignore case
            number += 1
            name = f"{image.stem}_{number}"
        taken |= {name.lower(), f"{name}_overlay".lower()}
        outputs[image] = folder / f"{name}.png", folder / f"{name}_overlay.png"
        for path in outputs[image]:
            if path.resolve() in inputs:
                raise UserError(f"the result for {image} would overwrite the picture {inputs[path.resolve()]}: "
                                f"choose another folder with --output")
    return outputs


@torch.inference_mode()
def segment(predict: Predict, image: Image.Image, info: DatasetInfo, device: torch.device,
            mode: str | None = None) -> np.ndarray:
    """RGB picture -> class numbers, uint8 [H, W]."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(device)
    return class_probabilities(predict, normalize(pixels), info, mode)[0].argmax(dim=0).byte().cpu().numpy()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m common.predict", description="Segment pictures or volumes.")
    parser.add_argument("images", nargs="+", type=Path, help="picture files (for volumes .npz or NIfTI files), or folders of them")
    parser.add_argument("--checkpoint", required=True, help="file written by a method's training")
    parser.add_argument("--output", type=Path, default=Path("segmented"), help="folder for the results (default: segmented)")
    parser.add_argument("--mode", choices=MODES, help="whole picture or sliding window; default: the data set's protocol")
    parser.add_argument("--steps", type=int, help="sampling steps of diffmatch; default: the checkpoint's")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    args = parser.parse_args()

    context = start(args.device)
    predict, _, info = load_model(args.checkpoint, context.device, steps=args.steps)
    if isinstance(info, medical.VolumeInfo):
        problems = predict_volumes(args, predict, info.crop, context.device)
    else:
        problems = predict_pictures(args, predict, info, context.device)
    for problem in problems:
        print(f"error: {' '.join(problem.split())}", file=sys.stderr)
    return 1 if problems else 0


def predict_pictures(args: argparse.Namespace, predict: Predict, info: DatasetInfo, device: torch.device) -> list[str]:
    """Segment every picture; returns a line for each that could not be."""
    images, problems = find_images(args.images)
    outputs = output_paths(images, args.output)
    for image, (label_path, overlay_path) in outputs.items():
        try:
            picture = open_image(image)
            label = segment(predict, picture, info, device, args.mode)
            save_label_map(label, info, label_path)
            save_png(Image.fromarray(overlay(np.asarray(picture), label, info.palette)), overlay_path)
            print(f"{image} -> {label_path}")
        except torch.OutOfMemoryError:
            problems.append(f"{image} ({picture.width}x{picture.height}) does not fit into memory: try --mode sliding")
        except UserError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{image}: {error}")
    return problems


def save_label_map(label: np.ndarray, info: DatasetInfo, path: Path) -> None:
    """A palette PNG of class numbers; for Cityscapes grey values that are labelIds, as the benchmark's server wants them."""
    if info.name == "cityscapes":
        save_png(Image.fromarray(cityscapes.TO_LABEL_ID[label]), path)
    else:
        save_indexed_png(label, info.palette, path)


def predict_volumes(args: argparse.Namespace, predict: Predict, size: int, device: torch.device) -> list[str]:
    """Likewise for volumes."""
    if args.mode:
        raise UserError("--mode is for pictures, not for volumes")
    volumes, problems = find_images(args.images, VOLUME_SUFFIXES)
    inputs, targets = {volume.resolve() for volume in volumes}, set()
    for volume in volumes:
        target = args.output / volume.name
        if not volume.name.lower().endswith(VOLUME_SUFFIXES):
            problems.append(f"{volume} is no volume ({' '.join(VOLUME_SUFFIXES)})")
        elif target.resolve() in inputs | targets:
            problems.append(f"the result for {volume} would overwrite {target}: choose another folder with --output")
        else:
            targets.add(target.resolve())
            try:
                scores.predict_file(predict, volume, target, size, device)
                print(f"{volume} -> {target}")
            except UserError as error:
                problems.append(str(error))
    return problems


if __name__ == "__main__":
    run_main(main)
