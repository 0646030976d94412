"""Predictions of pictures and volumes: what is written, what is reported, what never happens."""

import gzip
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import daw
from common import predict
from common.augment import normalize
from common.data import DATASETS, TO_LABEL_ID, dataset_info
from common.medical import DATASETS as VOLUME_DATASETS
from common.medical import Volume, read_volume, write_volume
from common.models import DeepLabV3Plus
from programs import error_of, on_ranks, picture, recorded, run_as_program

INFO = dataset_info("folder", "ground,water,trees")


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command in this process: (exit status, stdout, lines of stderr)."""
    def run(*arguments):
        words = ["predict", "--checkpoint", "c.pt", "--device", "cpu", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", words)
        status = predict.main()
        out, err = capsys.readouterr()
        return status, out, err.splitlines()

    return run


@pytest.fixture
def network(monkeypatch) -> nn.Module:
    """What the checkpoint c.pt holds: a network for pictures."""
    torch.manual_seed(0)
    network = nn.Conv2d(3, 3, 3, padding=1).eval()
    config = {"crop": 16}
    monkeypatch.setattr(predict, "load_predictor", lambda *arguments: (network, config, INFO))
    return network


def write_picture(path, width: int, height: int) -> None:
    rng = np.random.default_rng(width * height)
    picture(path, rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


# ---------------------------------------------------------------- pictures


def test_pictures_of_any_size(network, command, tmp_path):
    sizes = {"a.jpg": (37, 21), "a.png": (1, 1), "A_overlay.bmp": (70, 9), "sub/a.png": (5, 5)}
    for name, size in sizes.items():
        write_picture(tmp_path / "in" / name, *size)
    cut = (tmp_path / "in" / "a.jpg").read_bytes()[:300]
    (tmp_path / "in" / "broken.jpg").write_bytes(cut)
    (tmp_path / "in" / "notes.txt").write_text("no picture, and not asked for")
    (tmp_path / "empty").mkdir()
    (tmp_path / "in" / "z.png").symlink_to("a.png")  # another file, though of the same content
    (tmp_path / "in" / "gone.jpg").symlink_to("nowhere.jpg")
    given = [tmp_path / "in", tmp_path / "in" / "a.jpg", tmp_path / "in" / "sub" / "a.png",
             tmp_path / "none", tmp_path / "empty"]
    out = tmp_path / "out"
    status, said, problems = command("--output", out, *given)
    assert status == 1 and len(problems) == 4 and said.count(" -> ") == 5
    for name in ("none", "empty", "broken.jpg", "gone.jpg"):
        assert sum(name in line and line.startswith("error: ") for line in problems) == 1
    files = {path.name: Image.open(path) for path in out.iterdir()}
    assert len(files) == len({name.lower() for name in files}) == 10  # nothing of the broken one
    labels = {name: file for name, file in files.items() if file.mode == "P"}
    assert sorted(file.size for file in labels.values()) == sorted([*sizes.values(), (1, 1)])
    for name, label in labels.items():
        overlay = files[name.replace(".png", "_overlay.png")]
        assert overlay.mode == "RGB" and overlay.size == label.size
    assert command("--output", out, tmp_path / "in" / "sub")[0] == 0  # again: replaced


@pytest.mark.parametrize("mode, windows", [("whole", [(0, 24)]), ("sliding", [(0, 16), (8, 24)])])
def test_the_label_map_is_the_most_likely_class(network, command, tmp_path, mode, windows):
    write_picture(tmp_path / "x.png", 24, 12)
    pixels = np.array(Image.open(tmp_path / "x.png"))
    image = normalize(torch.tensor(pixels.transpose(2, 0, 1))[None])
    if mode == "sliding":  # a side shorter than the crop of 16 is aligned
        image = F.pad(image, (0, 0, 0, 4), mode="replicate")
    total = torch.zeros(3, 12, 24)
    for left, right in windows:
        logits = network(image[..., left:right])[0, :, :12].detach()
        total[..., left:right] += logits.softmax(dim=0)
    assert command("--output", tmp_path / "out", "--mode", mode, tmp_path / "x.png")[0] == 0
    file = Image.open(tmp_path / "out" / "x.png")
    assert file.getpalette()[:9] == [value for color in INFO.palette[:3] for value in color]
    label = np.array(file)
    assert (label == total.argmax(dim=0).numpy()).all()
    overlay = np.array(Image.open(tmp_path / "out" / "x_overlay.png")).astype(int)
    colors = np.array(INFO.palette)[label]
    assert abs(overlay - (pixels + colors) / 2).max() <= 1


def test_label_maps_are_aligned_where_scores_are_not(command, monkeypatch, tmp_path):
    def network(images):
        shown.append(tuple(images.shape[2:]))
        return images[:, :1].expand(-1, 21, -1, -1)

    shown, contents = [], (network, {"crop": 33}, DATASETS["pascal"])
    monkeypatch.setattr(predict, "load_predictor", lambda *arguments: contents)
    write_picture(tmp_path / "x.png", 30, 12)
    assert command("--output", tmp_path / "out", tmp_path / "x.png")[0] == 0 and shown == [(17, 33)]
    assert Image.open(tmp_path / "out" / "x.png").size == (30, 12)


def test_outputs_that_are_not_finite_give_no_label_map(network, command, tmp_path):
    network.bias.data[1] = np.nan
    write_picture(tmp_path / "x.jpg", 9, 7)
    status, _, problems = command("--output", tmp_path / "out", tmp_path / "x.jpg")
    assert status == 1 and "not finite" in problems[0] and not (tmp_path / "out").exists()


def test_inputs_are_never_overwritten(network, command, tmp_path):
    write_picture(tmp_path / "a.jpg", 9, 7)
    write_picture(tmp_path / "a.png", 9, 7)
    write_picture(tmp_path / "b.PNG", 9, 7)  # some disks know no case
    before = (tmp_path / "a.png").read_bytes()
    for given in (["a.jpg", "a.png"], ["a.png"], ["b.PNG"]):
        line = error_of(command, "--output", tmp_path, *(tmp_path / name for name in given))
        assert "overwrite an input: choose another --output" in line
    assert (tmp_path / "a.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 3
    letters = [Path("a/\u00e9.jpg"), Path("b/e\u0301.jpg")]  # on some disks one name
    assert predict.output_paths(letters, tmp_path, False)[letters[1]][0].name == "e\u0301_2.png"


def test_ranks_share_the_pictures(network, monkeypatch, tmp_path):
    for number in range(5):
        write_picture(tmp_path / "in" / f"{number}.png", 9, 7)
    (tmp_path / "in" / "3.png").write_bytes(b"broken")  # the second rank's
    words = f"predict --checkpoint c.pt --device cpu --output {tmp_path}/out {tmp_path}/in"
    monkeypatch.setattr(sys, "argv", words.split())
    drawn = recorded(monkeypatch, predict, "predict_picture")
    assert on_ranks(lambda rank: (predict.main(), len(drawn)), tmp_path) == [(1, 3), (1, 2)]
    assert {path.name for path in (tmp_path / "out").glob("?.png")} == {
        f"{number}.png" for number in (0, 1, 2, 4)}


def test_cityscapes_is_written_as_label_ids(command, monkeypatch, tmp_path):
    def network(images):  # class k in column k
        assert images.shape[2:] == (19, 19)  # sliding, as it is scored: aligned to 16 k + 3
        return torch.eye(19)[None, :, None].expand(1, 19, 19, 19)

    contents = network, {"crop": 99}, DATASETS["cityscapes"]
    monkeypatch.setattr(predict, "load_predictor", lambda *arguments: contents)
    write_picture(tmp_path / "x.png", 19, 4)
    assert command("--output", tmp_path / "out", tmp_path / "x.png")[0] == 0
    label = Image.open(tmp_path / "out" / "x.png")
    assert label.mode == "L" and (np.array(label) == TO_LABEL_ID[:19]).all()


def test_a_checkpoint_of_daw_as_a_program(monkeypatch, capfd, tmp_path):
    model = DeepLabV3Plus("tiny", 3, "none").eval()
    config = asdict(daw.Config(dataset="folder", classes="a,b,c", backbone="tiny", crop=16))
    content = {"format": 2, "method": "daw", "config": config, "model": model.state_dict()}
    torch.save(content, tmp_path / "c.pt")
    write_picture(tmp_path / "x.png", 33, 17)
    given = tmp_path / "x.png", "--checkpoint", tmp_path / "c.pt", "--output", tmp_path / "out"
    program = "common/predict.py", monkeypatch, capfd, *given
    status, _, err = run_as_program(*program, "--set", "crop=33", "amp=false")
    assert status == 0, err
    image = torch.tensor(np.array(Image.open(tmp_path / "x.png")).transpose(2, 0, 1))[None]
    with torch.inference_mode():
        expected = model(normalize(image))[0].argmax(dim=0).numpy()
    assert (np.array(Image.open(tmp_path / "out" / "x.png")) == expected).all()
    status, _, err = run_as_program(*program, "--set", "steps=1")
    assert status == 1 and err.startswith("error: ") and "'steps'" in err


# ---------------------------------------------------------------- volumes


@pytest.fixture
def for_volumes(monkeypatch) -> None:
    """The checkpoint c.pt is one of volumes: bright voxels are class 3, others class 0."""
    def network(slices):
        dark = torch.full_like(slices, -9)
        return torch.cat([0.5 - slices, dark, dark, slices - 0.5], dim=1)

    info = replace(VOLUME_DATASETS["acdc"], crop=16)
    monkeypatch.setattr(predict, "load_predictor", lambda *arguments: (network, {"crop": 8}, info))


def blobs() -> np.ndarray:
    """A volume [Z, Y, X] of halves that do not change when resized to 8 x 8 pixels."""
    image = np.full((3, 16, 24), 100, np.int16)
    image[0, :, :12] = image[1, 8:] = image[2, :8] = 900
    return image


def test_npz_volumes_keep_image_and_spacing(for_volumes, command, tmp_path):
    label = np.full((3, 16, 24), 500)  # of no class, and not needed
    volume = Volume(blobs().astype(np.float32), label, (5.0, 1.5, 1.25))
    for folder in "ab":
        write_volume(tmp_path / folder / "heart.npz", volume)
    status, said, problems = command("--output", tmp_path / "out", tmp_path / "a", tmp_path / "b")
    assert status == 0 and not problems
    for name in ("heart.npz", "heart_2.npz"):  # two of one name
        result = read_volume(tmp_path / "out" / name)
        assert (result.label == np.where(blobs() > 500, 3, 0)).mean() > 0.9
        assert result.spacing == volume.spacing
        assert (result.image == (blobs() > 500)).all()
    line = error_of(command, "--output", tmp_path / "a", tmp_path / "a")
    assert "overwrite an input" in line
    assert "--mode is for pictures" in error_of(command, "--mode", "whole", tmp_path / "a")


def test_nifti_volumes_keep_their_grid(for_volumes, command, tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="reads NIfTI files, which needs nibabel")
    write_volume(tmp_path / "in" / "same.npz", Volume(blobs().astype(np.float32), None, None))
    array = blobs().T  # [X, Y, Z]
    affine = np.array([[-1, 0, -0.9, 90], [0.75, 0.4, -1, -120], [0, 1.4, 8, 30], [0, 0, 0, 1]])
    plain, scaled = (nibabel.Nifti1Image(array, affine) for _ in range(2))
    scaled.header.set_slope_inter(0.5, -20)
    scaled.header["cal_max"] = 900
    second = nibabel.Nifti2Image(array[..., None].astype(np.float64), affine)
    images = {"plain.nii": plain, "a.b.nii.gz": plain, "SHOUTED.NII.GZ": plain,
              "scaled.nii.gz": scaled, "second.nii": second}
    for name, image in images.items():
        nibabel.save(image, tmp_path / "in" / name)
    out = tmp_path / "out"
    status, _, problems = command("--output", out, tmp_path / "in")
    assert status == 0 and not problems
    assert sorted(path.name for path in out.iterdir()) == sorted([*images, "same.npz"])
    expected = read_volume(out / "same.npz").label.T  # tested above
    for name in images:
        result = nibabel.load(out / name)
        labels = np.asarray(result.dataobj)
        assert labels.dtype == np.uint8 and np.array_equal(labels, expected)
        assert type(result) is type(images[name]) and result.header["cal_max"] == 0
        np.testing.assert_allclose(result.affine, affine, atol=1e-4)
        compressed = (out / name).read_bytes()[:2] == b"\x1f\x8b"
        assert compressed == name.lower().endswith(".gz")


@pytest.mark.filterwarnings("ignore:invalid value")  # of the damaged affine
def test_unreadable_volumes_are_reported_and_the_others_written(for_volumes, command, tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="reads NIfTI files, which needs nibabel")
    bad, rng = tmp_path / "bad", np.random.default_rng(0)
    bad.mkdir()
    whole = nibabel.Nifti1Image(rng.integers(0, 900, (9, 8, 3)).astype(np.int16), np.eye(4))
    nibabel.save(whole, bad / "cut.nii.gz")
    (bad / "cut.nii.gz").write_bytes((bad / "cut.nii.gz").read_bytes()[:-40])
    sound = gzip.compress(whole.to_bytes())
    (bad / "bits.nii.gz").write_bytes(sound[:-8] + bytes(4) + sound[-4:])  # another check sum
    (bad / "noise.nii").write_bytes(rng.bytes(900))
    arrays = {"four.nii": np.zeros((9, 8, 3, 2), np.int16), "two.nii": np.zeros((9, 8), np.int16),
              "nan.nii": np.full((9, 8, 3), np.nan, np.float32)}
    for name, array in arrays.items():
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), bad / name)
    nibabel.save(whole, bad / "affine.nii")
    content = bytearray((bad / "affine.nii").read_bytes())
    content[280:292] = np.full(3, np.nan, np.float32).tobytes()
    (bad / "affine.nii").write_bytes(content)
    (bad / "noise.npz").write_bytes(rng.bytes(900))
    (bad / "notes.txt").write_text("not a volume")
    wrong = [*arrays, "affine.nii", "bits.nii.gz", "cut.nii.gz", "noise.nii", "noise.npz",
             "notes.txt", "missing.npz"]
    write_volume(bad / "SHOUTED.NPZ", Volume(blobs().astype(np.float32), None, None))
    out = tmp_path / "out"
    status, said, problems = command("--output", out, bad, bad / "notes.txt", bad / "missing.npz")
    assert status == 1 and said.count(" -> ") == 1 and len(problems) == len(wrong), problems
    for name in wrong:
        assert sum(str(bad / name) in line for line in problems) == 1, name
    assert [path.name for path in out.iterdir()] == ["SHOUTED.NPZ"]


def test_the_first_channel_of_prostate_counts(for_volumes, command, tmp_path, monkeypatch):
    nibabel = pytest.importorskip("nibabel", reason="reads NIfTI files, which needs nibabel")
    network, config, info = predict.load_predictor()
    loaded = network, config, replace(info, name="prostate")
    monkeypatch.setattr(predict, "load_predictor", lambda *arguments: loaded)
    for name, channels in (("a", [blobs().T]), ("b", [blobs().T, 1000 - blobs().T])):
        volume = nibabel.Nifti1Image(np.stack(channels, axis=3), np.eye(4))
        nibabel.save(volume, tmp_path / f"{name}.nii")
        assert command("--output", tmp_path / "out", tmp_path / f"{name}.nii")[0] == 0
    a, b = (np.asarray(nibabel.load(tmp_path / "out" / f"{name}.nii").dataobj) for name in "ab")
    assert np.array_equal(a, b) and a.any()


def test_labels_go_back_to_the_axes_of_the_file(for_volumes, command, tmp_path, monkeypatch):
    nibabel = pytest.importorskip("nibabel", reason="reads NIfTI files, which needs nibabel")
    array, shown = blobs().T, recorded(monkeypatch, predict, "segment_volume")  # [X, Y, Z]
    plain = nibabel.Nifti1Image(array, np.diag([-1, -1, 5, 1]))  # to the left, the back, the head
    for name, codes in (("a", "LPS"), ("b", "RAS"), ("c", "SLA")):
        turned = plain.as_reoriented(nibabel.orientations.ornt_transform(
            nibabel.io_orientation(plain.affine), nibabel.orientations.axcodes2ornt(codes)))
        nibabel.save(turned, tmp_path / f"{name}.nii")
        assert command("--output", tmp_path / "out", tmp_path / f"{name}.nii")[0] == 0
        labels = nibabel.load(tmp_path / "out" / f"{name}.nii")
        assert np.array_equal(np.asarray(labels.dataobj) == 3, np.asarray(turned.dataobj) > 500)
        assert np.array_equal(shown[-1][1], shown[0][1])


def test_without_nibabel_the_package_is_named(for_volumes, command, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "nibabel", None)  # as if it were not installed
    (tmp_path / "heart.nii.gz").touch()
    status, _, (problem,) = command("--output", tmp_path / "out", tmp_path / "heart.nii.gz")
    assert status == 1 and "heart.nii.gz" in problem and "pip install nibabel" in problem
