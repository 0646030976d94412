"""Which run has which number of the papers, and that results.json says it."""

import json

import pytest

import daw
import diffmatch
import diffrect
import pos_meo
import usrn
from common.data import DATASETS
from common.paper import OBJECTS, TABLES, paper_number

CONFIGS = {"daw": daw.Config, "pos_meo": pos_meo.Config, "diffmatch": diffmatch.Config, "usrn": usrn.Config, "diffrect": diffrect.Config}
PASCAL = {"dataset": "pascal", "labeled": "92", "backbone": "resnet50"}


@pytest.mark.parametrize(("method", "options", "value"), [
    ("daw", PASCAL | {"align": True}, 68.5), ("daw", PASCAL | {"align": False}, 68.0), ("daw", PASCAL | {"weighting": "fixed"}, 66.9),
    ("daw", PASCAL | {"weighting": "none"}, 62.7), ("daw", PASCAL | {"supervised": True}, 44.0), ("daw", PASCAL | {"align": True, "labeled": "662"}, 76.2),
    ("daw", PASCAL | {"align": True, "labeled": "1/16"}, 76.2), ("daw", PASCAL | {"align": True, "dataset": "cityscapes", "labeled": "372"}, 77.5),
    ("daw", PASCAL | {"supervised": True, "strong_labeled": True}, None), ("daw", PASCAL | {"weighting": "power"}, None),
    ("daw", PASCAL | {"align": True, "labeled": "u2pl_1/16"}, None), ("daw", PASCAL | {"align": True, "split_seed": 1}, None),
    ("daw", PASCAL | {"align": True, "labeled_list": "own.txt"}, None), ("daw", {"dataset": "shapes", "labeled": "24", "backbone": "tiny"}, None),
    ("pos_meo", PASCAL | {"backbone": "resnet101"}, 77.6), ("pos_meo", PASCAL | {"backbone": "resnet101", "strategy": "pos"}, 77.0),
    ("pos_meo", PASCAL | {"backbone": "dinov2_s", "baseline": "unimatch_v2", "strategy": "uniform"}, 79.0), ("pos_meo", PASCAL, None),
    ("diffmatch", PASCAL, 73.3), ("diffmatch", PASCAL | {"tau": 0.0}, 72.2), ("diffmatch", PASCAL | {"discriminative": True}, 67.9),
    ("usrn", PASCAL | {"labeled": "usrn_331"}, 68.6), ("usrn", PASCAL | {"labeled": "usrn_331", "model": "II"}, 64.1), ("usrn", PASCAL, None),
    ("usrn", PASCAL | {"dataset": "cityscapes", "labeled": "93", "model": "baseline"}, 59.8)])
def test_rows(method, options, value):
    found = paper_number(method, CONFIGS[method](**options))
    assert found is None if value is None else found["miou"] == value and "Table" in found["source"]


@pytest.mark.parametrize(("options", "values"), [
    ({"dataset": "acdc", "labeled": "1"}, (82.40, 71.85)), ({"dataset": "acdc", "labeled": "7", "model": "fixmatch"}, (88.31, 87.96)),
    ({"dataset": "mscmrseg", "labeled": "7_split2"}, (86.78, None)), ({"dataset": "acdc", "labeled": "1", "model": "lcc"}, (78.28, None)),
    ({"dataset": "acdc", "labeled": "1", "colors": False}, None), ({"dataset": "acdc", "labeled": "2"}, None), ({"dataset": "phantom", "labeled": "3"}, None)])
def test_rows_of_diffrect(options, values):
    found = paper_number("diffrect", diffrect.Config(**options))
    assert found is None if values is None else (found["dice"], found["test_dice"]) == values


def test_tables_are_whole():
    keys = [tuple(row[:4]) for row in TABLES]
    assert len(set(keys)) == len(keys)
    for method, row, dataset, backbone, source, lists, values in TABLES:
        assert len(lists) == len(values) and all(20 < value < 95 for value in values) and method in CONFIGS
        known = dict(DATASETS[dataset].labeled_lists) if dataset in DATASETS else dict.fromkeys(OBJECTS)
        assert set(lists) <= set(known) or dataset == "lucchi"


def test_results_name_the_papers_number(voc_root, tmp_path, monkeypatch, keep_signal_handlers):
    from common import run as common_run

    monkeypatch.setattr(common_run, "paper_number", lambda method, config: {"miou": 68.5, "source": f"{method}, Table 2"})
    labeled = tmp_path / "labeled.txt"
    labeled.write_text("\n".join((voc_root / "ImageSets" / "Segmentation" / "train.txt").read_text().split()[:3]))
    config = daw.Config(dataset="pascal", data_root=str(voc_root), labeled_list=str(labeled), unlabeled_list=str(voc_root / "ImageSets" / "Segmentation" / "train.txt"),
                        backbone="tiny", crop=33, batch_size=2, iterations=1, num_workers=0, output=str(tmp_path / "run"), device="cpu")
    daw.train(config)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["paper"] == {"miou": 68.5, "source": "daw, Table 2"}
