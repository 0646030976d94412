"""Command lines from dataclasses, and the options that every method shares.

A method writes `@dataclass class Config(TrainingOptions)` and adds its own fields with `option(default, help)`;
`parse(Config)` turns the fields into `--field-name` flags. Names, types and defaults stand in one place, the field.
"""

import argparse
import dataclasses
import types
import typing
from dataclasses import dataclass
from pathlib import Path

from common.runtime import UserError


def option(default, help: str, choices: tuple | None = None, names: tuple[str, ...] | None = None):
    """A dataclass field with its line of help; `choices` restricts the values, `names` are those of a tuple's parts."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "names": names})


@dataclass
class TrainingOptions:
    # data
    dataset: str = option("shapes", "a name from common.data.DATASETS: shapes, shapes_severe, shapes_large (embedded, "
                                    "made on first use), pascal, cityscapes, coco, lucchi, or folder (your own pictures, see common/folder.py)")
    classes: str | None = option(None, "of --dataset folder: a file with a class a line, or their names separated by commas")
    data_root: str | None = option(None, "folder of the data set; default: data/<dataset>")
    labeled: str | None = option(None, "published labeled list, by its number of images or its fraction (pascal: 92, 183, 366, 732, 1464; of the "
                                       "augmented set 1/16, 1/8, 1/4, u2pl_1/16, ...; usrn_165, usrn_331, usrn_662; cityscapes: 1/30 to 1/2, 93, usrn_186, ...; coco: 1/512 to 1/32; lucchi: 5, 10, 20; shapes: 12, 24, 48), or all; "
                                       "default: 24 for shapes, 92 for pascal, 1/16 for cityscapes, 1/512 for coco, 10 for lucchi, all for folder")
    split_seed: int | None = option(None, "draw --labeled many images at random by this seed, every class among them, instead of a published list")
    labeled_list: str | None = option(None, "a file with the labeled images instead: one id, or image path and mask path, "
                                            "a line")
    unlabeled_list: str | None = option(None, "a file with the images to learn from without labels, likewise; default: the full "
                                              "training list. Labeled images in it are left out")
    download: bool = option(False, "fetch what is missing of the data set (pascal: VOC2012 through torchvision, and the "
                                   "published lists)")
    # network
    backbone: str | None = option(None, "resnet50, resnet101, xception65 or tiny (pos_meo.py's UniMatch V2: dinov2_s or tiny_vit); default: tiny for "
                                        "shapes, resnet50 for folder, xception65 for coco, resnet101 for others")
    weights: str = option("default", "encoder weights: default (ImageNet, DINOv2, or the shipped file for tiny ones), none, deep_stem (none, "
                                              "for a ResNet whose stem is three convolutions), or the path of a state dict, whose keys say which stem")
    # optimisation
    crop: int | None = option(None, "training crop in pixels; default: the data set's recipe")
    batch_size: int | None = option(None, "labeled images a step over all GPUs, and as many unlabeled; default: the recipe's")
    grad_accum: int = option(1, "split each step's batch into so many parts, to save memory; averages over pixels stay those of the "
                                "whole batch, batch norm and CutMix see the parts")
    epochs: int | None = option(None, "passes over the unlabeled list; default: the recipe's")
    iterations: int | None = option(None, "optimizer steps instead of epochs")
    lr: float | None = option(None, "learning rate of the encoder; default: the recipe's, linear in the batch size")
    head_lr_multiplier: float | None = option(None, "learning rate of the rest = lr x this; default: the recipe's")
    ohem: float | None = option(None, "learn labeled images from hard pixels only: those whose class has at most this probability, 16 % at least; 0 = "
                                      "all; default: the recipe's")
    momentum: float = option(0.9, "SGD momentum")
    weight_decay: float = option(1e-4, "SGD weight decay")
    ema_decay: float = option(0.0, "keep an average of the weights with this decay and evaluate, save and predict with it; 0 = off")
    # running
    seed: int = option(0, "seed of weights, sampling and augmentation")
    output: str | None = option(None, "run folder; default: runs/<method>_<dataset>_<labeled>_seed<seed>; a rerun resumes there")
    eval_every: int | None = option(None, "iterations between evaluations and checkpoints; default: an epoch, at least 200")
    eval_split: str = option("val", "list to evaluate on during training: val, or tune (shapes) for choosing options", choices=("val", "tune"))
    save_every: int | None = option(None, "iterations between checkpoints if they should come more often than evaluations")
    log_every: int = option(20, "iterations between lines of metrics.jsonl")
    num_workers: int | None = option(None, "loader processes a rank; default: from the number of CPU cores")
    device: str | None = option(None, "cpu or cuda; default: cuda where there is one")
    amp: bool | None = option(None, "bf16 autocast; default: on for GPUs that have bf16")
    channels_last: bool = option(True, "NHWC memory format")
    tf32: bool = option(True, "TF32 matrix products and convolutions on GPUs that have it")
    compile: bool = option(False, "torch.compile the network")
    checkpoint_activations: bool = option(False, "keep less of the encoder for the backward pass and compute it again: less memory, about a third more time")
    tensorboard: bool = option(False, "write TensorBoard events as well (needs the package tensorboard)")


# Changing these does not change what is learned, so a run may be resumed under other values.
RESUMABLE = {"data_root", "output", "download", "eval_every", "save_every", "log_every", "num_workers", "device",
             "tensorboard", "channels_last", "compile", "weights", "checkpoint_activations"}


def parse(config_class, argv: list[str] | None = None, description: str | None = None, **defaults):
    """`argv` (default: sys.argv) -> an instance of `config_class`; argparse prints usage and exits on bad options."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    shared = {field.name for field in dataclasses.fields(TrainingOptions)}
    groups = {False: parser.add_argument_group("the method"), True: parser.add_argument_group("shared by all methods")}
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        add_argument(groups[field.name in shared], field, hints[field.name])
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(parser.parse_args(argv)).items()}
    return config_class(**{**defaults, **given})


def add_argument(group, field: dataclasses.Field, hint) -> None:
    flag = "--" + field.name.replace("_", "-")
    text = field.metadata["help"].replace("%", "%%")
    if isinstance(hint, types.UnionType):  # X | None: an option whose default is worked out later
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    elif hint is not bool:
        text += f" (default: {field.default})"
    if hint is bool:
        text += "" if field.default is None else f" (default: {'on' if field.default else 'off'})"
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    elif typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        group.add_argument(flag, type=parts[0], nargs=len(parts), help=text, metavar=field.metadata["names"])
    else:
        group.add_argument(flag, type=hint, choices=field.metadata["choices"], help=text,
                           metavar=None if field.metadata["choices"] else hint.__name__.upper())


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless `condition`."""
    if not condition:
        raise UserError(message)


def fill_from_recipe(config: TrainingOptions, method: str, data, context, images_per_label: int = 2) -> None:
    """Check `config` and replace its None values by the data set's recipe; `data.info` gets the crop that was chosen.

    `images_per_label`: images that a forward pass sees for each labeled one, itself included; 1 without unlabeled images.
    The learning rate follows the linear rule: the recipe's x batch size / the recipe's batch size. Raises UserError for
    values that no run could use.
    """
    info = data.info
    for name in ("crop", "batch_size", "grad_accum", "epochs", "iterations", "eval_every", "save_every", "log_every"):
        value = getattr(config, name)
        require(value is None or value >= 1, f"--{name.replace('_', '-')} must be at least 1, not {value}")
    require(config.lr is None or config.lr > 0, f"--lr must be positive, not {config.lr}")
    require(0 <= config.ema_decay < 1, f"--ema-decay must lie in [0, 1), not {config.ema_decay}")
    require(config.seed >= 0, f"--seed must not be negative, not {config.seed}")
    require(config.num_workers is None or config.num_workers >= 0, "--num-workers must not be negative")
    require(bool(getattr(data, config.eval_split)), f"{info.name} has no {config.eval_split} list: --eval-split val")
    require(config.ohem is None or 0 <= config.ohem < 1, f"--ohem must lie in [0, 1), not {config.ohem}")
    for name in ("backbone", "crop", "batch_size", "head_lr_multiplier", "ohem"):
        if getattr(config, name) is None:
            setattr(config, name, getattr(info, name))
    if config.labeled is None and config.labeled_list is None:
        config.labeled = info.default_labeled
    if config.output is None:
        labeled = Path(config.labeled_list).stem if config.labeled_list else config.labeled.replace("/", "_")
        labeled += f"_random{config.split_seed}" if config.split_seed is not None else ""
        config.output = f"runs/{method}_{info.name}_{labeled}_seed{config.seed}"
    parts = context.world_size * config.grad_accum
    require(config.batch_size % parts == 0, f"--batch-size {config.batch_size} cannot be shared by {context.world_size} "
            f"ranks in {config.grad_accum} accumulated parts: make it a multiple of {parts}")
    # The pooled branch of ASPP normalises over images: one image alone has no batch statistics.
    require(config.batch_size // parts * images_per_label > 1, f"--batch-size {config.batch_size} leaves one image a rank and part: batch norm needs two")
    data.info = dataclasses.replace(info, crop=config.crop)  # a sliding window is as large as the training crop
    if config.lr is None:
        config.lr = info.lr * config.batch_size / info.batch_size
    per_epoch = max(1, len(data.unlabeled or data.labeled) // config.batch_size)
    if config.iterations is None:
        config.iterations = (config.epochs or info.epochs) * per_epoch or info.iterations  # medical recipes count iterations
    config.epochs = None  # `iterations` says it from here on
    config.eval_every = config.eval_every or max(per_epoch, 200)
    config.save_every = config.save_every or config.eval_every
