"""Files that are whole or not there: atomic writing, checkpoints read with care, and pictures in archives that stay zipped."""

import contextlib
import functools
import io
import json
import os
import zipfile
from pathlib import Path

import torch

from common.runtime import UserError

FORMAT = 1  # of checkpoints
ARCHIVES = ("leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip")  # looked into where a folder is not unpacked


def write_atomically(path: Path, write) -> None:
    """`write(temporary path)`, then rename: readers see the old file or the new one, never a part.

    Makes the folder if need be. Raises UserError if the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_text(path: Path) -> str:
    """Raises UserError for a file that is not text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as text: {error}") from error


@functools.cache
def archive(path: Path, process: int) -> zipfile.ZipFile:
    """An open archive; each process has its own, as a forked one would share the position in the file."""
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as a zip archive: {error}") from error


def archives_in(folder: Path) -> list[zipfile.ZipFile]:
    return [archive(folder / name, os.getpid()) for name in ARCHIVES if (folder / name).is_file()]


def open_picture(path: Path):
    """The open file, or one in memory if there is none and the path leads into an archive of one of its parent folders."""
    try:
        return open(path, "rb")
    except FileNotFoundError:
        for folder in path.parents:
            for zipped in archives_in(folder):
                with contextlib.suppress(KeyError):
                    return io.BytesIO(zipped.read(path.relative_to(folder).as_posix()))
        raise


def names_below(root: Path, folder: str) -> set[str]:
    """Paths relative to `root` of all files below root/folder, unpacked or in an archive."""
    if (root / folder).is_dir():
        return {Path(directory, name).relative_to(root).as_posix() for directory, _, names in os.walk(root / folder, followlinks=True) for name in names}
    return {name for zipped in archives_in(root) for name in zipped.namelist() if name.startswith(f"{folder}/") and not name.endswith("/")}


def write_json(path: Path, value) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n"))


def read_checkpoint(path: Path) -> dict:
    """A checkpoint's content on the CPU. Raises UserError where there is none or it cannot be read."""
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file can raise anything; each means the same to the user
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this project (format {FORMAT})")
    return checkpoint
