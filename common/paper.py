"""What the papers report for a run with the same method, data set, labels and backbone: put beside our scores in results.json.

mIoU in % on the validation list, of volumes Dice in % on both lists. Numbers are the papers' own tables'; where two papers report a baseline,
the one of the method's file.
"""

from common.data import DATASETS

CLASSIC = ("92", "183", "366", "732", "1464")
BLENDER = ("1/16", "1/8", "1/4")
STREETS = ("1/16", "1/8", "1/4", "1/2")
OBJECTS = ("1/512", "1/256", "1/128", "1/64", "1/32")

# (method, row, data set, backbone): source, labeled lists, mIoU of each
TABLES = (
    ("daw", "supervised", "pascal", "resnet50", "DAW, Table 2", CLASSIC + BLENDER, (44.0, 52.3, 61.7, 66.7, 72.9, 62.4, 68.2, 72.3)),
    ("daw", "supervised", "pascal", "resnet101", "DAW, Table 2", CLASSIC + BLENDER, (45.1, 55.3, 64.8, 69.7, 73.5, 67.5, 71.1, 74.2)),
    ("daw", "daw", "pascal", "resnet50", "DAW, Table 2", CLASSIC + BLENDER, (68.5, 73.1, 76.3, 78.6, 79.7, 76.2, 77.6, 77.4)),
    ("daw", "daw", "pascal", "resnet101", "DAW, Table 2", CLASSIC + BLENDER, (74.8, 77.4, 79.5, 80.6, 81.5, 78.5, 78.9, 79.6)),
    ("daw", "none", "pascal", "resnet50", "DAW, Table 4", ("92",), (62.7,)),
    ("daw", "fixed", "pascal", "resnet50", "DAW, Table 4", ("92",), (66.9,)),
    ("daw", "daw, no alignment", "pascal", "resnet50", "DAW, Table 4", ("92",), (68.0,)),
    ("daw", "supervised", "cityscapes", "resnet50", "DAW, Table 3", STREETS, (63.3, 70.2, 73.1, 76.6)),
    ("daw", "supervised", "cityscapes", "resnet101", "DAW, Table 3", STREETS, (66.3, 72.8, 75.0, 78.0)),
    ("daw", "daw", "cityscapes", "resnet50", "DAW, Table 3", STREETS, (75.2, 77.5, 79.1, 79.5)),
    ("daw", "daw", "cityscapes", "resnet101", "DAW, Table 3", STREETS, (76.6, 78.4, 79.8, 80.6)),
    ("daw", "daw", "lucchi", "resnet101", "DAW, Table 6", ("5", "10", "20"), (85.9, 86.6, 87.6)),
    ("daw", "supervised", "lucchi", "resnet101", "DAW, Table 6", ("5", "10", "20"), (45.7, 57.4, 61.8)),
    ("pos_meo", "unimatch_v1 uniform", "pascal", "resnet101", "POS, Table 2", CLASSIC, (75.2, 77.2, 78.8, 79.9, 81.2)),
    ("pos_meo", "unimatch_v1 pos+meo", "pascal", "resnet101", "POS, Table 2", CLASSIC, (77.6, 78.7, 79.7, 80.9, 81.9)),
    ("pos_meo", "unimatch_v1 pos", "pascal", "resnet101", "POS, Table 4", CLASSIC[:2], (77.0, 78.1)),
    ("pos_meo", "unimatch_v2 uniform", "pascal", "dinov2_s", "POS, Table 2", CLASSIC, (79.0, 85.5, 85.9, 86.7, 87.8)),
    ("pos_meo", "unimatch_v2 pos+meo", "pascal", "dinov2_s", "POS, Table 2", CLASSIC, (80.7, 86.8, 87.2, 87.5, 88.3)),
    ("pos_meo", "unimatch_v1 uniform", "cityscapes", "resnet101", "POS, Table 3", STREETS, (76.6, 77.9, 79.2, 79.5)),
    ("pos_meo", "unimatch_v1 pos+meo", "cityscapes", "resnet101", "POS, Table 3", STREETS, (77.6, 78.5, 79.8, 80.4)),
    ("pos_meo", "unimatch_v2 uniform", "cityscapes", "dinov2_s", "POS, Table 3", STREETS, (80.6, 81.9, 82.4, 82.6)),
    ("pos_meo", "unimatch_v2 pos+meo", "cityscapes", "dinov2_s", "POS, Table 3", STREETS, (81.4, 82.7, 83.0, 83.2)),
    ("pos_meo", "unimatch_v1 uniform", "coco", "xception65", "POS, Table 1", OBJECTS, (31.9, 38.9, 44.4, 48.2, 49.8)),
    ("pos_meo", "unimatch_v1 pos+meo", "coco", "xception65", "POS, Table 1", OBJECTS, (34.0, 40.3, 45.9, 49.3, 50.7)),
    ("pos_meo", "unimatch_v1 pos", "coco", "xception65", "POS, Table 4", OBJECTS[:2], (33.4, 39.8)),
    ("pos_meo", "unimatch_v2 uniform", "coco", "dinov2_s", "POS, Table 1", OBJECTS, (39.3, 45.4, 53.2, 55.0, 57.0)),
    ("pos_meo", "unimatch_v2 pos+meo", "coco", "dinov2_s", "POS, Table 1", OBJECTS, (40.9, 46.8, 54.3, 56.2, 57.7)),
    ("diffmatch", "diffmatch", "pascal", "resnet50", "DiffMatch, Tables 1 and 2", CLASSIC + BLENDER, (73.3, 75.7, 77.9, 79.6, 81.6, 77.9, 78.7, 79.0)),
    ("diffmatch", "diffmatch", "pascal", "resnet101", "DiffMatch, Tables 1 and 2", CLASSIC + BLENDER, (77.5, 78.3, 80.6, 81.5, 83.3, 80.3, 81.4, 81.6)),
    ("diffmatch", "discriminative", "pascal", "resnet50", "DiffMatch, Table 5", ("92", "1464"), (67.9, 79.5)),
    ("diffmatch", "no adjustment", "pascal", "resnet50", "DiffMatch, Table 5", ("92", "1464"), (72.2, 81.3)),
    ("diffmatch", "diffmatch", "cityscapes", "resnet50", "DiffMatch, Table 3", STREETS, (76.5, 78.3, 79.8, 80.0)),
    ("diffmatch", "diffmatch", "cityscapes", "resnet101", "DiffMatch, Table 3", STREETS, (77.8, 79.1, 80.5, 81.3)),
    ("diffmatch", "diffmatch", "coco", "xception65", "DiffMatch, Table 4", OBJECTS, (34.6, 41.9, 47.2, 49.8, 52.4)),
    ("usrn", "USRN", "pascal", "resnet50", "USRN, Table 1", ("usrn_165", "usrn_331", "usrn_662"), (61.7, 68.6, 72.3)),
    ("usrn", "I", "pascal", "resnet50", "USRN, Table 3", ("usrn_331",), (59.1,)),
    ("usrn", "II", "pascal", "resnet50", "USRN, Table 3", ("usrn_331",), (64.1,)),
    ("usrn", "III", "pascal", "resnet50", "USRN, Table 3", ("usrn_331",), (65.0,)),
    ("usrn", "IV", "pascal", "resnet50", "USRN, Table 3", ("usrn_331",), (67.1,)),
    ("usrn", "USRN", "cityscapes", "resnet50", "USRN, Table 2", ("usrn_93", "usrn_186", "usrn_372"), (64.6, 71.2, 75.0)),
    ("usrn", "baseline", "cityscapes", "resnet50", "USRN, Table 2", ("usrn_93", "usrn_186", "usrn_372"), (59.8, 64.3, 68.9)),
)
# DiffRect: (data set, labeled patients, model): Dice on validation and test list
DIFFRECT = {
    ("acdc", "1", "fixmatch"): (69.67, 60.80), ("acdc", "3", "fixmatch"): (83.12, 74.68), ("acdc", "7", "fixmatch"): (88.31, 87.96),
    ("acdc", "1", "diffrect"): (82.40, 71.85), ("acdc", "3", "diffrect"): (86.95, 82.46), ("acdc", "7", "diffrect"): (90.18, 89.27),
    ("acdc", "1", "lcc"): (78.28, None), ("acdc", "all", "supervised"): (91.48, 91.65),
    ("mscmrseg", "7", "fixmatch"): (84.31, None), ("mscmrseg", "7", "diffrect"): (86.78, None), ("mscmrseg", "all", "supervised"): (88.19, None),
    ("prostate", "2", "fixmatch"): (54.70, None), ("prostate", "2", "diffrect"): (62.23, None), ("prostate", "all", "supervised"): (73.81, None),
}
DIFFRECT_TABLES = {"acdc": "DiffRect, Table 1", "mscmrseg": "DiffRect, Table 2", "prostate": "DiffRect, Table 3"}


def row_of(method: str, config) -> str | None:
    """The row of the paper's tables that these options make, as far as it has one; other ablations have none."""
    if method == "daw" and config.supervised:
        return None if config.strong_labeled else "supervised"
    if method == "daw":
        return config.weighting if config.weighting != "daw" else "daw" if config.align else "daw, no alignment"
    if method == "pos_meo" and config.strategy in ("uniform", "pos", "pos_meo"):
        return f"{config.baseline} {config.strategy.replace('pos_meo', 'pos+meo')}"
    if method == "diffmatch":
        return "discriminative" if config.discriminative else "diffmatch" if config.tau else "no adjustment"
    return config.model if method == "usrn" else None


def paper_number(method: str, config) -> dict | None:
    """{"miou": in %, "source": table} or, of volumes, {"dice", "test_dice", "source"}; None where the paper has no such run.

    Only for published lists: not with --labeled-list or --split-seed.
    """
    if config.labeled_list or config.split_seed is not None or not config.labeled:
        return None
    if method == "diffrect":
        if not (config.s2w and config.w2g and config.colors and config.guidance == "dice" and not config.strong_labeled):
            return None
        labeled = config.labeled.split("_")[0] if config.dataset != "acdc" else config.labeled  # the other two are means over two splits
        found = DIFFRECT.get((config.dataset, labeled, config.model))
        return found and {"dice": found[0], "test_dice": found[1], "source": "DiffRect, Table 4" if config.model == "lcc" else DIFFRECT_TABLES[config.dataset]}
    published = dict(DATASETS[config.dataset].labeled_lists)  # some under two names: 662 is 1/16
    same = {config.labeled, *(name for name, source in published.items() if source == published.get(config.labeled))}
    wanted = (method, row_of(method, config), config.dataset, config.backbone)
    for *key, source, lists, values in TABLES:
        for name, value in zip(lists, values):
            if tuple(key) == wanted and name in same:
                return {"miou": value, "source": source}
    return None
