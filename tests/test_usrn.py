"""usrn.py against other ways to the same numbers: Eq. 9 as it is printed, plain loops, autograd; and its three stages as programs."""

import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import usrn
from common import augment, evaluate, predict, runtime, synthetic
from common.data import load_data
from common.deeplab import DeepLabV3Plus
from common.loading import EvaluationSet
from common.run import Run
import programs
from programs import assert_identical, kill_after_first_checkpoint, start, state, succeed

IGNORE = 255
CPU = runtime.Context(0, 1, torch.device("cpu"))
PARENTS = torch.tensor([0, 0, 0, 1, 1, 2, 3])  # 7 subclasses of 4 classes


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw_probs(seed, *shape, sharpness=2.0):
    return (sharpness * torch.randn(*shape, generator=seeded(seed))).softmax(dim=1)


# ---------------------------------------------------------------- Eq. 9 and the number of subclasses


def rate_as_printed(counts):
    n, classes = np.asarray(counts, np.float64), len(counts)
    deviation = np.sqrt((n**2).sum() / classes - (n.sum() / classes) ** 2)
    worst = np.sqrt(n.sum() ** 2 / classes - (n.sum() / classes) ** 2)
    return 1 - deviation / worst


@pytest.mark.parametrize("classes", [2, 3, 8, 21, 177])
def test_class_balance_rate_is_eq_9(classes):
    rng = np.random.default_rng(classes)
    for _ in range(20):
        counts = (10 ** rng.uniform(1, 7, classes)).astype(np.int64)
        rate = usrn.class_balance_rate(torch.from_numpy(counts))
        assert type(rate) is float and 0 < rate < 1
        assert rate == pytest.approx(rate_as_printed(counts), abs=1e-9)
        assert usrn.class_balance_rate(torch.from_numpy(3 * counts)) == pytest.approx(rate, abs=1e-12)
    assert usrn.class_balance_rate(torch.full((classes,), 12345)) == 1
    one = torch.zeros(classes, dtype=torch.long)
    one[classes // 2] = 987654321
    assert usrn.class_balance_rate(one) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("counts", [[7], [0], [0, 0, 0]])
def test_class_balance_rate_of_nothing_to_balance_is_nan(counts):
    assert math.isnan(usrn.class_balance_rate(torch.tensor(counts)))


def counts_by_search(pixels, most):
    """Cluster sizes from the smallest class's upwards, until there are no more clusters than allowed."""
    pixels = np.asarray(pixels, np.float64)
    size = pixels[pixels > 0].min()
    while (counts := np.maximum(np.rint(pixels / size), 1)).sum() > most:
        size += 1
    return counts.tolist()


@pytest.mark.parametrize("pixels, expected", [
    ([121000, 2000, 1000, 1000, 3000], [121, 2, 1, 1, 3]), ([1000, 1000, 1000], [1, 1, 1]), ([2600, 1000, 3400], [3, 1, 3]),
    ([2400, 1000, 0, 1499], [2, 1, 1, 1]), ([0, 0], [1, 1]), ([0, 9], [1, 1]), ([5], [1])])
def test_the_smallest_class_sets_the_size_of_subclasses(pixels, expected):
    counts = usrn.subclass_counts(torch.tensor(pixels))
    assert counts.dtype == torch.int64 and counts.tolist() == expected


def test_clusters_become_larger_only_as_far_as_the_limit_demands():
    enlarged = 0
    rng = np.random.default_rng(0)
    cases = [([1, 10**6], 255), ([10**6, 1, 1, 0, 10**5], 255), ([1, 10**4], 2), ([1, 3, 5, 1000], 4), ([300, 299, 1], 100)]
    for _ in range(60):
        classes = int(rng.integers(1, 22))
        pixels = (10 ** rng.uniform(1, rng.uniform(1.5, 4), classes)).astype(int) * (rng.random(classes) < 0.9)
        cases.append((pixels.tolist(), int(rng.integers(classes, 256))))
    for pixels, most in cases:
        counts = usrn.subclass_counts(torch.tensor(pixels), most)
        assert int(counts.sum()) <= most and int(counts.min()) >= 1
        if any(pixels):
            assert counts.tolist() == counts_by_search(pixels, most), (pixels, most)
            enlarged += counts.tolist() != counts_by_search(pixels, math.inf)
    assert 15 < enlarged < 60


def test_more_classes_than_subclasses_are_an_error():
    assert usrn.subclass_counts(torch.ones(255)).tolist() == [1] * 255
    for pixels, most in ((torch.ones(256), {}), (torch.ones(3), {"most": 2})):
        with pytest.raises(ValueError, match="classes"):
            usrn.subclass_counts(pixels, **most)


# ---------------------------------------------------------------- Eq. 3, 4, 6: pseudo labels


@pytest.mark.parametrize("shape", [(), (6,), (3, 5)])
@pytest.mark.parametrize("classes", [None, 4, 6])
def test_parents_have_the_sum_of_their_subclasses(shape, classes):
    probs = draw_probs(0, 2, 7, *shape).requires_grad_()
    parents = usrn.subclasses_to_parents(probs, PARENTS, classes)
    assert parents.shape == (2, classes or 4, *shape)
    for place in np.ndindex(2, *shape):
        expected = [0.0] * (classes or 4)
        for subclass, parent in enumerate(PARENTS.tolist()):
            expected[parent] += probs[(place[0], subclass, *place[1:])].item()
        assert parents[(place[0], slice(None), *place[1:])].tolist() == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(parents.sum(dim=1), torch.ones(2, *shape))
    weight = torch.randn(parents.shape, generator=seeded(1))
    (slope,) = torch.autograd.grad((weight * parents).sum(), probs)
    torch.testing.assert_close(slope, weight[:, PARENTS])


def test_pseudo_labels_are_used_strictly_above_the_threshold():
    probs = torch.tensor([[0.75, 0.25, 0.0], [0.125, 0.875, 0.0], [0.25, 0.0, 0.75], [0.25, 0.5, 0.25], [0.0, 0.0, 1.0]]).T[None]
    pseudo_label, used = usrn.select(probs, 0.75)
    assert pseudo_label.dtype == torch.int64 and used.dtype == torch.bool
    assert pseudo_label.tolist() == [[0, 1, 2, 1, 2]] and used.tolist() == [[False, True, False, False, True]]
    pseudo_label, used = usrn.select(torch.zeros(1, 3, 2), 0.0)
    assert not used.any()  # regularized away


def plain_entropy(probs):
    probs = np.asarray(probs, np.float64)
    return -(probs[probs > 0] * np.log(probs[probs > 0])).sum() / np.log(len(probs))


def pixels(*rows):
    """One image [1, C, 1, n] of pixels with these probabilities."""
    return torch.tensor(rows).T[None, :, None]


def test_the_gate_is_open_where_f_sub_is_surer():
    parent_of = torch.tensor([0, 0, 1, 1])
    sure, unsure = [0.97, 0.03], [0.55, 0.45]
    of_sure, of_unsure = [0.9, 0.07, 0.02, 0.01], [0.3, 0.25, 0.25, 0.2]
    probs = pixels(unsure, sure, sure, unsure, [0.5, 0.5])
    sub_probs = pixels(of_sure, of_unsure, of_sure, of_unsure, [0.5, 0.0, 0.5, 0.0])
    for compare in ("parents", "subclasses"):
        gate = usrn.entropy_gate(probs, sub_probs, parent_of, compare)
        assert gate.dtype == torch.bool and gate.shape == (1, 1, 5)
        assert gate[0, 0, :2].tolist() == [True, False]
    assert not usrn.entropy_gate(probs, sub_probs, parent_of)[0, 0, 4]  # equal: not lower


def test_parents_and_subclasses_give_different_gates():
    # F_sub knows the class and not which of its two subclasses.
    probs, sub_probs, parent_of = pixels([0.96, 0.04]), pixels([0.5, 0.5, 0.0, 0.0]), torch.tensor([0, 0, 1, 1])
    assert usrn.entropy_gate(probs, sub_probs, parent_of, "parents").item() is True
    assert usrn.entropy_gate(probs, sub_probs, parent_of, "subclasses").item() is False
    assert usrn.entropy_gate(probs, sub_probs, parent_of).item() is True


@pytest.mark.parametrize("compare", ["parents", "subclasses"])
def test_the_gate_equals_numpy_pixel_by_pixel(compare):
    probs, sub_probs = draw_probs(2, 3, 4, 6, 7, sharpness=1.5), draw_probs(3, 3, 7, 6, 7)
    gate, without_log, opened = usrn.entropy_gate(probs, sub_probs, PARENTS, compare), 0, 0
    for b, row, column in np.ndindex(3, 6, 7):
        p, q = probs[b, :, row, column].numpy(), sub_probs[b, :, row, column].numpy()
        if compare == "parents":
            q = np.array([q[PARENTS.numpy() == parent].sum() for parent in range(4)])
        opened += (expected := plain_entropy(q) < plain_entropy(p))
        assert gate[b, row, column].item() == expected
        without_log += expected != (plain_entropy(q) * np.log(len(q)) < plain_entropy(p) * np.log(len(p)))
    assert 20 < opened < 106 and (without_log > 3) == (compare == "subclasses")
    torch.testing.assert_close(usrn.entropy(torch.full((1, 7, 1), 1 / 7)), torch.ones(1, 1))
    assert usrn.entropy(torch.eye(3)[:, :, None]).tolist() == [[0]] * 3


@pytest.mark.parametrize("shape", [(5,), (4, 5)])
@pytest.mark.parametrize("gated", [False, True])
def test_only_the_class_that_f_sub_sees_is_left_where_the_gate_is_open(shape, gated):
    probs, sub_probs = draw_probs(4, 3, 4, *shape), draw_probs(5, 3, 7, *shape)
    gate = torch.rand(3, *shape, generator=seeded(6)) < 0.5 if gated else None
    regularized = usrn.regularize(probs, sub_probs, PARENTS, gate)
    changed = 0
    for place in np.ndindex(3, *shape):
        at = (place[0], slice(None), *place[1:])
        expected = probs[at].tolist()
        if gate is None or gate[place]:
            q = sub_probs[at].tolist()
            seen = PARENTS[q.index(max(q))].item()
            changed += seen != expected.index(max(expected))
            expected = [p if parent == seen else 0 for parent, p in enumerate(expected)]
        assert regularized[at].tolist() == expected
    assert changed >= 2


def test_the_likeliest_subclass_decides_and_not_the_likeliest_parent():
    probs = pixels([0.5, 0.5, 0.0, 0.0])
    assert usrn.regularize(probs, pixels([0.2, 0.2, 0.2, 0.4, 0.0, 0.0, 0.0]), PARENTS).flatten().tolist() == [0, 0.5, 0, 0]


def test_from_one_half_on_f_sub_can_only_veto():
    """Random predictions and gates; below one half a pseudo label may change."""
    vetoed = changed = 0
    for seed in range(40):
        probs, sub_probs = draw_probs(seed, 2, 4, 50), draw_probs(100 + seed, 2, 7, 50)
        probs[0, :, 0] = torch.tensor([0.5, 0.5, 0, 0])
        gate = torch.rand(2, 50, generator=seeded(seed)) < 0.8
        for threshold in (0.3, 0.5, 0.75, 0.9):
            own, confident = usrn.select(probs, threshold)
            label, used = usrn.select(usrn.regularize(probs, sub_probs, PARENTS, gate), threshold)
            assert not (used & ~confident).any()
            if threshold < 0.5:
                changed += int((used & (label != own)).sum())
            else:
                assert torch.equal(label[used], own[used])
                vetoed += int((confident & ~used).sum())
    assert vetoed > 100 and changed > 10


# ---------------------------------------------------------------- Eq. 2, 4, 5, 8: losses


def plain_loss(logits, label, used):
    """Sum of the cross entropy over used pixels and its gradient [B, C, H, W], pixel by pixel in float64."""
    total, gradient = 0.0, torch.zeros_like(logits)
    for b, row, column in np.ndindex(*label.shape):
        if used[b, row, column]:
            values = logits[b, :, row, column].detach().double().numpy()
            probs = np.exp(values - values.max())
            probs /= probs.sum()
            total -= np.log(probs[label[b, row, column]])
            probs[label[b, row, column]] -= 1
            gradient[b, :, row, column] = torch.from_numpy(probs).float()
    return total, gradient


def test_losses_and_their_gradients_equal_numpy():
    logits = (3 * torch.randn(2, 4, 3, 5, generator=seeded(7))).requires_grad_()
    label = torch.randint(4, (2, 3, 5), generator=seeded(8), dtype=torch.uint8)
    label[torch.rand(label.shape, generator=seeded(9)) < 0.3] = IGNORE
    used = torch.rand(label.shape, generator=seeded(10)) < 0.6
    pseudo_label = torch.randint(4, (2, 3, 5), generator=seeded(11))
    for loss, (expected, slope) in ((usrn.supervised_loss(logits, label), plain_loss(logits, label, label != IGNORE)),
                                    (usrn.self_training_loss(logits, pseudo_label, used), plain_loss(logits, pseudo_label, used))):
        assert loss.item() == pytest.approx(expected, rel=1e-5) and loss.dtype == torch.float32
        torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], slope, rtol=1e-4, atol=1e-6)
    for loss in (usrn.supervised_loss(logits, torch.full_like(label, IGNORE)), usrn.self_training_loss(logits, pseudo_label, used & False)):
        assert loss.item() == 0 and not torch.autograd.grad(loss, logits)[0].any()
    assert usrn.supervised_loss(logits.bfloat16(), label).dtype == torch.float32


class Playback(nn.Module):
    """A "network" that answers with prepared logits, so that each use of each view has its own gradient."""

    def __init__(self, size=2, side=5, cells=4):
        super().__init__()
        for number, (name, images, classes, pixels_) in enumerate([
                ("labeled", size, 4, side), ("weak", size, 4, cells), ("strong", size, 4, cells),
                ("sub_labeled", size, 7, side), ("sub_weak", size, 7, cells), ("sub_strong", size, 7, cells)]):
            setattr(self, name, nn.Parameter(2.5 * torch.randn(images, classes, pixels_, pixels_ + 1, generator=seeded(20 + number))))
        self.calls = []

    def forward(self, images, cells=0, subclasses=0):
        if images.device.type == "cpu":
            shown = images.amax(dim=(1, 2, 3))
            assert torch.equal(shown, images.amin(dim=(1, 2, 3)))
            self.calls.append((shown.tolist(), cells, subclasses))
        if cells == len(images):
            answers = [self.labeled[:0], self.strong, self.sub_labeled[:0], self.sub_strong]
        else:
            answers = [self.labeled, self.weak[:cells], self.sub_labeled, self.sub_weak[: max(0, subclasses - 2)]]
        return tuple(answers if subclasses else answers[:2] + [None, None])


def draw_label(seed, classes, *shape):
    label = torch.randint(classes, shape, generator=seeded(seed), dtype=torch.uint8)
    label[torch.rand(shape, generator=seeded(seed + 1)) < 0.2] = IGNORE
    return label


def playback_views(model="USRN", device="cpu"):
    subclass = draw_label(30, 7, 2, 5, 6)
    views = {"labeled": torch.full((2, 3, 5, 6), 1.0), "weak": torch.full((2, 3, 5, 6), 2.0), "strong": torch.full((2, 3, 5, 6), 3.0),
             "subclass": subclass, "label": torch.where(subclass == IGNORE, IGNORE, PARENTS[subclass.long().clamp(max=6)]).byte(),
             "valid": torch.rand(2, 4, 5, generator=seeded(32)) < 0.8, "truth": draw_label(33, 4, 2, 4, 5)}
    unlabeled = ("weak", "strong", "valid", "truth") if "OST" in usrn.MODELS[model] else ()
    return {name: views[name].to(device) for name in ("labeled", "label", "subclass", *unlabeled)}


@pytest.mark.parametrize("gate", ["parents", "subclasses"])
@pytest.mark.parametrize("model", usrn.MODELS)
def test_the_loss_of_each_row_of_table_3_equals_plain_loops(model, gate):
    """Eq. 2-8 pixel by pixel: pseudo labels, the gate, averages, weights, what is logged and where gradients go."""
    on, network, views = usrn.MODELS[model], Playback(), playback_views(model)
    config = usrn.Config(model=model, gate=gate, threshold=0.55, lambda_sub=0.7, lambda_u=1.3)
    loss, terms = usrn.usrn_loss(network, views, runtime.pixel_counts([views]), PARENTS, config)
    loss.backward()

    probs, sub_probs = (logits.detach().double().softmax(dim=1).numpy() for logits in (network.weak, network.sub_weak))
    label, sub_label = np.zeros((2, 4, 5), int), np.zeros((2, 4, 5), int)
    used, sub_used, opened, vetoed = (np.zeros((2, 4, 5), bool) for _ in range(4))
    for place in np.ndindex(2, 4, 5) if "OST" in on else ():
        at = (place[0], slice(None), *place[1:])
        p, q, valid = probs[at], sub_probs[at], bool(views["valid"][place])
        of_parents = np.array([q[PARENTS.numpy() == parent].sum() for parent in range(4)])
        compared = plain_entropy(of_parents if gate == "parents" else q) < plain_entropy(p)
        opened[place] = valid and ("EGM" not in on or compared)
        seen = PARENTS[q.argmax()].item()
        left = np.where(np.arange(4) == seen, p, 0) if "USR" in on and opened[place] else p
        label[place], used[place] = left.argmax(), valid and left.max() > 0.55
        vetoed[place] = valid and p.max() > 0.55 and not used[place]
        sub_label[place], sub_used[place] = q.argmax(), valid and q.max() > 0.55
    if "USR" in on:
        assert 0 < vetoed.sum() and 5 < used.sum()
    labeled, valid = (views["label"] != IGNORE).sum().item(), views["valid"].sum().item() if "OST" in on else 0

    slopes, expected = {}, {}

    def note(name, logits, target, where, count, weight):
        total, slope = plain_loss(logits, target, where)
        expected[name] = (total / count, weight)
        slopes[logits] = weight / count * slope

    note("loss_sup", network.labeled, views["label"], views["label"] != IGNORE, labeled, 1)
    if "MSL" in on:
        note("loss_sup_sub", network.sub_labeled, views["subclass"], views["subclass"] != IGNORE, labeled, 0.7)
    if "OST" in on:
        note("loss_unsup", network.strong, label, used, valid, 1.3)
    if "SST" in on:
        note("loss_unsup_sub", network.sub_strong, sub_label, sub_used, valid, 1.3 * 0.7)
    assert {name for name in terms if name.startswith("loss_")} == expected.keys()
    for name, (value, _) in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-5), name
    assert loss.item() == terms["loss"].item() == pytest.approx(sum(value * weight for value, weight in expected.values()), rel=1e-5)
    for parameter in network.parameters():
        if parameter in slopes:
            torch.testing.assert_close(parameter.grad, slopes[parameter], rtol=1e-4, atol=1e-7)
        else:  # no gradient through pseudo labels
            assert parameter.grad is None or not parameter.grad.any()

    logged = {"used": used.sum() / valid} if "OST" in on else {}
    logged |= {"gate": opened.sum() / valid, "vetoed": vetoed.sum() / valid} if "USR" in on else {}
    logged |= {"used_sub": sub_used.sum() / valid} if "SST" in on else {}
    if "OST" in on:
        truth = views["truth"].numpy()
        known = truth != IGNORE
        logged |= {"used_known": (used & known).sum(), "used_right": (used & known & (label == truth)).sum()}
    if "USR" in on:
        logged |= {"vetoed_known": (vetoed & known).sum(), "vetoed_right": (vetoed & known & (probs.argmax(axis=1) == truth)).sum()}
    for name, value in logged.items():
        assert terms[name].item() == pytest.approx(value, abs=1e-6), name
    # Labeled and weak images share batch norm; F_sub sees no more images than it is asked about.
    of_subclasses = (4 if "USR" in on else 2) if "MSL" in on else 0
    strong = ([3, 3], 2, 2 if "SST" in on else 0)
    assert network.calls == ([([1, 1, 2, 2], 2, of_subclasses), strong] if "OST" in on else [([1, 1], 0, of_subclasses)])


@pytest.mark.parametrize("model", ["I", "II", "III", "USRN"])
def test_a_step_reads_nothing_back_from_the_device(model):
    """On the meta device tensors have no values: .item(), boolean indexing and branches on values raise there."""
    views = playback_views(model, "meta")
    loss, terms = usrn.usrn_loss(Playback().to("meta"), views, runtime.pixel_counts([views]), PARENTS.to("meta"), usrn.Config(model=model))
    loss.backward()
    assert loss.device.type == "meta" and {value.dim() for value in terms.values()} == {0}
    with pytest.raises(Exception):
        loss.item()


def test_nothing_labeled_and_nothing_valid_give_zero_not_nan():
    network, views = Playback(), playback_views()
    views["label"], views["subclass"] = (torch.full_like(views["label"], IGNORE) for _ in range(2))
    views["valid"] = views["valid"] & False
    loss, terms = usrn.usrn_loss(network, views, runtime.pixel_counts([views]), PARENTS, usrn.Config())
    loss.backward()
    assert loss == 0 and all(value.isfinite() for value in terms.values())
    assert not any(parameter.grad.any() for parameter in network.parameters() if parameter.grad is not None)


def test_a_line_of_the_log_says_how_many_pseudo_labels_are_right():
    means = {"used_known": 8.0, "used_right": 6.0, "vetoed_known": 4.0, "vetoed_right": 1.0, "loss": 3.0}
    assert usrn.report(means) == {"used_accuracy": 0.75, "vetoed_accuracy": 0.25}
    assert usrn.report({"used_known": 0.0, "used_right": 0.0}) == usrn.report({}) == {}


# ---------------------------------------------------------------- F and F_sub


SHARED = {"none": (), "low": ("stem", "layer1"), "all": ("stem", "layer1", "layer2", "layer3", "layer4")}


def make_both(share="low", pool=2, seed=0, subclasses=7, gain=1):
    torch.manual_seed(seed)
    model = DeepLabV3Plus("tiny", 4, "none")
    both = usrn.USRN(model, DeepLabV3Plus("tiny", subclasses, "none") if subclasses else None, share, pool)
    for part in both.modules():  # running statistics as after some training
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -0.3, 0.3)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    with torch.no_grad():
        for part in (both.model, both.subclass_model) if subclasses else ():
            part.classifier.weight *= gain  # confident, if it is large
    return both


def plain_f_sub(both):
    """F_sub as a whole network: with a copy of what it shares."""
    plain = DeepLabV3Plus("tiny", 7, "none")
    own = both.subclass_model.state_dict()
    plain.load_state_dict({name: own.get(name, both.model.state_dict().get(name)) for name in plain.state_dict()})
    return plain


def test_sharing_saves_parameters():
    whole, low, encoder = (sum(parameter.numel() for parameter in part) for part in (
        DeepLabV3Plus("tiny", 7, "none").parameters(),
        [p for name, p in DeepLabV3Plus("tiny", 7, "none").encoder.named_parameters() if name.startswith(SHARED["low"])],
        DeepLabV3Plus("tiny", 7, "none").encoder.parameters()))
    sizes = {share: sum(parameter.numel() for parameter in make_both(share).parameters()) for share in SHARED}
    f = sum(parameter.numel() for parameter in DeepLabV3Plus("tiny", 4, "none").parameters())
    assert sizes == {"none": f + whole, "low": f + whole - low, "all": f + whole - encoder} and 0 < low < encoder


def test_a_resnets_low_level_is_its_stem_and_first_stage():
    with torch.device("meta"):
        both = usrn.USRN(DeepLabV3Plus("resnet50", 4, "none"), DeepLabV3Plus("resnet50", 7, "none"), "low", 2)
    assert {name.split(".")[1] for name, _ in both.subclass_model.named_parameters() if name.startswith("encoder.")} == {"layer2", "layer3", "layer4"}


@pytest.mark.parametrize("pool", [0, 2])
@pytest.mark.parametrize("share", SHARED)
def test_f_and_f_sub_are_plain_networks(share, pool):
    both = make_both(share, pool).eval()
    f, f_sub = both.model, plain_f_sub(both).eval()
    images = torch.randn(5, 3, 32, 36, generator=seeded(41))
    with torch.inference_mode():
        plain, plain_sub = f(images), f_sub(images)
        for subclasses in (0, 5):
            logits, cells, sub_logits, sub_cells = both(images, subclasses=subclasses)
            assert torch.equal(logits, plain) and len(cells) == 0  # bit for bit
            assert sub_logits is None if not subclasses else torch.equal(sub_logits, plain_sub)
        for subclasses in (0, 3, 5):
            logits, cells, sub_logits, sub_cells = both(images, cells=2, subclasses=subclasses)
            torch.testing.assert_close(logits, plain[:3], rtol=0, atol=1e-5)
            z = torch.cat([f.classifier(f.features(images[3:])), torch.zeros(2, 0, 16, 18)], dim=1)
            means = z.unflatten(3, (9, 2)).unflatten(2, (8, 2)).mean(dim=(3, 5))  # a classifier of means = means of the classifier
            torch.testing.assert_close(cells, means if pool else plain[3:], rtol=0, atol=1e-5)
            if not subclasses:
                assert sub_logits is None and sub_cells is None
                continue
            torch.testing.assert_close(sub_logits, plain_sub[:3], rtol=0, atol=1e-5)
            assert len(sub_cells) == subclasses - 3
            if pool == 0:
                torch.testing.assert_close(sub_cells, plain_sub[3:subclasses], rtol=0, atol=1e-5)
            elif subclasses == 5:
                means = f_sub.classifier(f_sub.features(images[3:])).unflatten(3, (9, 2)).unflatten(2, (8, 2)).mean(dim=(3, 5))
                torch.testing.assert_close(sub_cells, means, rtol=0, atol=1e-5)


@pytest.mark.parametrize("crop, pool, expected", [(32, 0, 32), (32, 1, 16), (32, 2, 8), (33, 0, 33), (33, 1, 17), (33, 2, 8)])
def test_unlabeled_losses_are_computed_at_cells(crop, pool, expected):
    both = make_both(pool=pool)
    assert usrn.cells_of(both, crop) == (expected, expected) and both.training and both.model.training
    with torch.no_grad():
        logits, cells, sub_logits, sub_cells = both(torch.zeros(3, 3, crop, crop), cells=2, subclasses=3)
    assert logits.shape == (1, 4, crop, crop) and sub_logits.shape == (1, 7, crop, crop)
    assert cells.shape == (2, 4, expected, expected) and sub_cells.shape == (2, 7, expected, expected)
    assert logits.dtype == cells.dtype == torch.float32


def draw_views(seed, size=2, crop=32, cells=8):
    """Views of real size. Images differ in how much of them is labeled and valid."""
    views = {name: torch.randn(size, 3, crop, crop, generator=seeded(seed + number)) for number, name in enumerate(("labeled", "weak", "strong"))}
    views["subclass"] = draw_label(seed + 3, 7, size, crop, crop)
    views["valid"] = torch.zeros(size, cells, cells, dtype=torch.bool)
    for number in range(size):
        views["valid"][number, number:] = True
        views["subclass"][number, :, 6 * number + 8 :] = IGNORE
    views["label"] = torch.where(views["subclass"] == IGNORE, IGNORE, PARENTS[views["subclass"].long().clamp(max=6)]).byte()
    return views


@pytest.mark.parametrize("share", SHARED)
def test_losses_reach_the_networks_that_they_are_of(share):
    both, views = make_both(share), draw_views(50)
    _, terms = usrn.usrn_loss(both, views, runtime.pixel_counts([views]), PARENTS, usrn.Config(model="USRN", threshold=0.0))
    names, parameters = zip(*both.named_parameters())

    def reached(term):
        slopes = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        return {name for name, slope in zip(names, slopes) if slope is not None and slope.any()}

    f = {name for name in names if name.startswith("model.")}
    f_sub = {name for name in names if name.startswith("subclass_model.")}
    shared = {name for name in f if name.startswith(tuple(f"model.encoder.{part}." for part in SHARED[share]))}
    assert bool(shared) is (share != "none") and f and f_sub
    assert reached(terms["loss_sup"]) == reached(terms["loss_unsup"]) == f
    assert reached(terms["loss_sup_sub"]) == reached(terms["loss_unsup_sub"]) == f_sub | shared


@pytest.mark.parametrize("share", SHARED)
@pytest.mark.parametrize("model", usrn.MODELS)
def test_every_parameter_is_trained(model, share):
    """Data-parallel training would wait for one that is not."""
    both = make_both(share, subclasses=7 if "MSL" in usrn.MODELS[model] else 0)
    views = draw_views(60)
    loss, _ = usrn.usrn_loss(both, views, runtime.pixel_counts([views]), PARENTS, usrn.Config(model=model, threshold=0.0))
    loss.backward()
    assert not [name for name, parameter in both.named_parameters() if not parameter.requires_grad or parameter.grad is None or not parameter.grad.any()]


def one_step(network, both, views, parts):
    """The gradient part of train's loop: (terms, gradients)."""
    parts = runtime.split_batch(views, parts, torch.device("cpu"))
    counts, logged = runtime.pixel_counts(parts), {}
    for number, part in enumerate(parts):
        with runtime.no_sync_unless(number == len(parts) - 1, network):
            loss, terms = usrn.usrn_loss(network, part, counts, PARENTS, usrn.Config(threshold=0.3))
            loss.backward()
        logged = {name: value.item() + logged.get(name, 0.0) for name, value in terms.items()}
    return logged, torch.cat([parameter.grad.flatten() for parameter in both.parameters()])


def step_in_float64(context, parts):
    """`one_step` of this rank's part of a batch, in float64: in float32, convolutions of half a batch round differently."""
    both = make_both(seed=0, gain=8).double().eval()
    with torch.no_grad():
        for parameter in both.parameters():
            parameter += context.rank  # ranks must start from rank 0's weights
    network = runtime.wrap(both, usrn.Config(), context)
    views = {name: value.chunk(context.world_size)[context.rank] for name, value in draw_views(70, size=4).items()}
    return one_step(network, both, {name: value.double() if value.is_floating_point() else value for name, value in views.items()}, parts)


def test_accumulated_parts_equal_the_whole_batch(monkeypatch):
    """Batch norm by running statistics; everything else sees the whole batch."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    (whole, gradients), (logged, accumulated) = (step_in_float64(CPU, parts) for parts in (1, 2))
    assert all(0.02 < whole[name] < 0.98 for name in ("gate", "used", "vetoed", "used_sub"))
    assert logged == pytest.approx(whole, rel=1e-12)
    torch.testing.assert_close(accumulated, gradients, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- views


def test_masks_of_cells_are_those_of_their_middle_pixels(monkeypatch):
    monkeypatch.setattr(augment, "strong_augment", lambda x, blur_sigma: 1 - x)
    batch = {name: torch.randint(256, (2, 3, 33, 33), generator=seeded(80), dtype=torch.uint8) for name in ("labeled", "unlabeled")}
    batch |= {"label": draw_label(81, 7, 2, 33, 33), "truth": draw_label(83, 4, 2, 33, 33), "valid": torch.rand(2, 33, 33, generator=seeded(85)) < 0.5}
    views = usrn.make_views(batch, usrn.Config(crop=33), (0.1, 1.0), PARENTS, (8, 8))
    assert torch.equal(views["subclass"], batch["label"]) and views["label"].dtype == torch.uint8
    for subclass, parent in zip(batch["label"].flatten().tolist(), views["label"].flatten().tolist()):
        assert parent == (IGNORE if subclass == IGNORE else PARENTS[subclass])
    weak = batch["unlabeled"].float() / 255
    for name, image in (("labeled", batch["labeled"].float() / 255), ("weak", weak), ("strong", 1 - weak)):
        torch.testing.assert_close(views[name], augment.normalize(image))
    for name in ("valid", "truth"):
        assert views[name].shape == (2, 8, 8)
        for b, row, column in np.ndindex(2, 8, 8):
            assert views[name][b, row, column] == batch[name][b, int((row + 0.5) * 33 / 8), int((column + 0.5) * 33 / 8)]
    del batch["truth"]
    assert "truth" not in usrn.make_views(batch, usrn.Config(crop=33), (0.1, 1.0), PARENTS, (8, 8))
    plain = usrn.make_views(batch, usrn.Config(crop=33, model="baseline"), (0.1, 1.0), None, (8, 8))
    assert plain.keys() == {"labeled", "label"} and torch.equal(plain["label"], batch["label"])


# ---------------------------------------------------------------- stage 2: cells and maps


def test_a_cells_centre_lies_in_the_cell():
    for pixels_ in (*range(1, 40), 321, 500):
        for cells in {1, 2, 3, (pixels_ + 1) // 2, (pixels_ + 7) // 8, pixels_}:
            if cells <= pixels_:
                centres = usrn.cell_centres(pixels_, cells)
                assert centres.dtype == torch.int64 and (centres * cells // pixels_).tolist() == list(range(cells))
    assert usrn.cell_centres(9, 3).tolist() == [1, 4, 7] and usrn.cell_centres(7, 7).tolist() == list(range(7))


def test_subclasses_of_pixels_equal_a_loop():
    """Own cell where it is of the pixel's class, otherwise the nearest subclass of the pixel's class."""
    features, label = torch.randn(4, 5, 3, generator=seeded(90)), draw_label(91, 4, 13, 17)
    subclass, centroids = draw_label(93, 7, 4, 5), torch.randn(7, 3, generator=seeded(95))
    map_ = usrn.subclass_map(features, subclass.long(), centroids, PARENTS, label)
    assert map_.dtype == np.uint8 and map_.shape == (13, 17)
    kept = moved = 0
    for row, column in np.ndindex(13, 17):
        cell = row * 4 // 13, column * 5 // 17
        own = label[row, column].item()
        if own == IGNORE:
            assert map_[row, column] == IGNORE
            continue
        expected = subclass[cell].item()
        if expected == IGNORE or PARENTS[expected] != own:
            distance = {k: np.linalg.norm(features[cell].numpy() - centroids[k].numpy()) for k in range(7) if PARENTS[k] == own}
            expected = min(distance, key=distance.get)
            moved += 1
        else:
            kept += 1
        assert map_[row, column] == expected
    assert kept > 20 and moved > 20


def make_voc(voc_root, folder, edit=lambda masks: None):
    """(data, config) of the first three pictures, classes 0 to 9; `edit` changes their masks [H, W] in place."""
    names = (voc_root / "ImageSets" / "Segmentation" / "train.txt").read_text().split()
    (folder / "labeled.txt").write_text("\n".join(names[:3]))
    masks = []
    for name in names[:3]:
        with Image.open(voc_root / "SegmentationClass" / f"{name}.png") as image:
            masks.append((image.copy(), np.array(image)))
    edit([mask for _, mask in masks])
    for name, (image, mask) in zip(names, masks):
        changed = Image.fromarray(mask)
        changed.putpalette(image.getpalette())
        changed.save(voc_root / "SegmentationClass" / f"{name}.png")
    config = usrn.Config(dataset="pascal", data_root=str(voc_root), labeled_list=str(folder / "labeled.txt"), output=str(folder / "run"),
                         unlabeled_list=str(voc_root / "ImageSets" / "Segmentation" / "train.txt"))
    return load_data(config, CPU), config


def tiny_features(data):
    torch.manual_seed(0)
    return usrn.extract_features(DeepLabV3Plus("tiny", 21, "default"), data.labeled, data, CPU)


def test_a_cell_is_the_mean_of_two_by_two_features(voc_root, tmp_path):
    data, _ = make_voc(voc_root, tmp_path)
    cells = tiny_features(data)
    torch.manual_seed(0)
    model = DeepLabV3Plus("tiny", 21, "default").eval()
    assert list(cells) == [sample.name for sample in data.labeled]
    odd = 0
    for item in EvaluationSet(data.labeled, data.root, 21):
        with torch.inference_mode():
            z = model.features(augment.normalize(item["image"][None]))[0]
        features, label = cells[item["name"]]
        height, width = z.shape[1:]
        assert features.shape == (math.ceil(height / 2), math.ceil(width / 2), 32) and label.shape == features.shape[:2]
        assert features.dtype == torch.float16 and label.dtype == torch.uint8
        odd += height % 2 + width % 2
        for row, column in np.ndindex(*label.shape):
            mean = z[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean(dim=(1, 2))
            torch.testing.assert_close(features[row, column].float(), mean, rtol=2e-3, atol=2e-3)
            middle = tuple(int((index + 0.5) * pixels_ / count) for index, pixels_, count in zip((row, column), item["label"].shape, label.shape))
            assert label[row, column] == item["label"][middle]
    assert odd


def check_maps(folder, data, record):
    """Each map divides its label map; returns the maps."""
    parent_of = np.array([*record["parent_of"], *[IGNORE] * (256 - len(record["parent_of"]))])
    maps = []
    for item in EvaluationSet(data.labeled, data.root, data.info.num_classes):
        with Image.open(folder / f"{item['name']}.png") as image:
            assert image.mode == "P" and len(set(zip(*[iter(image.getpalette())] * 3))) > len(record["parent_of"]) // 2
            maps.append(np.array(image))
        assert np.array_equal(parent_of[maps[-1]], item["label"].numpy()) and np.array_equal(maps[-1] == IGNORE, item["label"].numpy() == IGNORE)
    assert (folder / "subclasses.png").read_bytes().startswith(b"\x89PNG")
    return maps


def write(data, config, **options):
    cells = tiny_features(data)
    config = dataclasses.replace(config, **{"max_subclasses": usrn.MOST_SUBCLASSES, **options})
    folder = Path(config.output) / "subclasses"
    record = usrn.write_subclasses(folder, [cells[sample.name] for sample in data.labeled], data, config, {"test": 1}, torch.device("cpu"))
    assert json.loads((folder / "subclasses.json").read_text()) == record and record["key"] == {"test": 1}
    labels = torch.cat([label.flatten() for _, label in cells.values()]).numpy()
    assert record["cells"] == np.bincount(labels, minlength=256)[:21].tolist()
    assert record["cbr_classes"] == pytest.approx(rate_as_printed(record["cells"]), abs=1e-9)
    assert record["cbr_subclasses"] == pytest.approx(rate_as_printed(record["sizes"]), abs=1e-9)
    assert record["subclasses"] == counts_by_search(record["cells"], config.max_subclasses)
    assert record["parent_of"] == [parent for parent, count in enumerate(record["subclasses"]) for _ in range(int(count))]
    of_classes = np.bincount(record["parent_of"], weights=record["sizes"])
    assert of_classes.tolist() == record["cells"]  # each cell is in a subclass of its class
    return record, check_maps(folder, data, record)


def test_subclasses_divide_classes_of_every_size(voc_root, tmp_path, capsys):
    """Classes that are absent, of one cell, and of one pixel that is no cell's centre."""
    def edit(masks):
        height, width = masks[0].shape
        rows, columns = usrn.cell_centres(height, math.ceil(height / 4)), usrn.cell_centres(width, math.ceil(width / 4))
        masks[0][rows[1], columns[1]] = 19
        masks[0][rows[1] + 1, columns[1]] = 20

    data, config = make_voc(voc_root, tmp_path, edit)
    record, maps = write(data, config, max_subclasses=40)
    assert record["cells"][19] == 1 and record["cells"][20] == 0 and record["cells"][11] == 0
    assert record["subclasses"][10:] == [1] * 11 and 21 < len(record["parent_of"]) <= 40
    for single in (19, 20):
        assert (maps[0] == record["parent_of"].index(single)).sum() == 1
    for label, count in enumerate(record["subclasses"]):
        sizes = [size for size, parent in zip(record["sizes"], record["parent_of"]) if parent == label]
        assert max(sizes) - min(sizes) <= 1 and sum(sizes) == record["cells"][label]
    out = capsys.readouterr().out
    assert "--max-subclasses 40" in out and "smallest class has 1 of" in out and "class balance rate" in out


def test_the_smallest_class_has_one_subclass_of_its_size(voc_root, tmp_path, capsys):
    def edit(masks):  # background, one large and one small class
        for mask in masks:
            mask[(mask != 0) & (mask != IGNORE)] = 1
        masks[1][:8, :30] = 2

    record, _ = write(*make_voc(voc_root, tmp_path, edit), max_subclasses=255)
    smallest = min(size for size in record["cells"] if size)
    assert record["subclasses"] == [max(1, round(size / smallest)) for size in record["cells"]] and max(record["subclasses"]) > 5
    assert record["cbr_subclasses"] > record["cbr_classes"] + 0.2 and "--max-subclasses" not in capsys.readouterr().out
    plain, _ = write(*make_voc(voc_root, tmp_path), clustering="plain", max_subclasses=30)
    assert max(np.abs(np.diff([size for size, parent in zip(plain["sizes"], plain["parent_of"]) if parent == 0]))) > 1


def test_nothing_to_cluster_is_one_clear_line(voc_root, tmp_path):
    def edit(masks):
        for mask in masks:
            mask[:] = IGNORE

    data, config = make_voc(voc_root, tmp_path, edit)
    with pytest.raises(runtime.UserError, match="nothing to cluster"):
        write(data, config)


# ---------------------------------------------------------------- programs


QUICK = ["--labeled", "12", "--batch-size", "4", "--iterations", "6", "--supervised-iterations", "6", "--eval-every", "6", "--save-every", "1",
         "--log-every", "2", "--num-workers", "0", "--crop", "32", "--max-subclasses", "24", "--threshold", "0.2", "--device", "cpu"]
PARTS = ("model", "subclass_model", "subclasses", "optimizer", "rng", "iteration")
STAGES = ("supervised/stage.json", "supervised/latest.pt", "subclasses/subclasses.json")

run_as_program = functools.partial(programs.run_as_program, "usrn.py")
refuse = functools.partial(programs.refuse, "usrn.py")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """The embedded data, of which only what short lists name is drawn."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    synthetic.write_voc(root, dataclasses.replace(synthetic.VARIANTS["shapes"], train=64, val=6, tune=1))
    dials = {"format": synthetic.FORMAT, "name": "shapes", "dials": dataclasses.asdict(synthetic.VARIANTS["shapes"])}
    (root / "generator.json").write_text(json.dumps(dials))
    return root


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory) -> Path:
    """A finished run, never interrupted; what it printed lies beside it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    out = succeed("usrn.py", *QUICK, "--data-root", shapes, "--output", folder)
    (folder.parent / "stdout").write_text(out)
    return folder


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    """A copy of the finished run, to be changed."""
    shutil.copytree(trained, tmp_path / "copied")
    return tmp_path / "copied"


def run_to_end(monkeypatch, capfd, *arguments) -> str:
    status, out, err = run_as_program(monkeypatch, capfd, *arguments)
    assert status == 0, err
    return out


def stages_of(trained, folder, *options) -> list:
    """The command of a short run that finds the stages 1 and 2 of `trained` in its folder."""
    for stage in ("supervised", "subclasses"):
        shutil.copytree(trained / stage, folder / stage)
    return [*QUICK, "--iterations", "2", "--log-every", "1", "--output", folder, *options]


def times(folder, *names) -> dict:
    return {name: (folder / name).stat().st_mtime_ns for name in names}


def files(folder) -> dict:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*")) if path.is_file()}


def loss_lines(folder) -> list[dict]:
    return [line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in line]


def maps_of(folder) -> dict:
    return {path.name: path.read_bytes() for path in (folder / "subclasses").glob("train_*.png")}


def assert_same_end(folder, trained):
    ours, theirs = state(folder), state(trained)
    for name in PARTS:
        assert_identical(ours[name], theirs[name], name)
    assert (folder / "results.json").read_text() == (trained / "results.json").read_text()
    assert maps_of(folder) == maps_of(trained)


def test_a_run_leaves_its_folder(trained, shapes):
    names = {str(path.relative_to(trained)) for path in trained.rglob("*")}
    whole = {"config.json", "metrics.jsonl", "results.json", "latest.pt", "best.pt", "samples.png"}
    assert whole | {f"supervised/{name}" for name in whole} | set(STAGES) | {"subclasses/subclasses.png"} <= names
    assert not [name for name in names if name.endswith(".part")]
    assert "class balance rate" in (trained.parent / "stdout").read_text()
    results, stage_1 = (json.loads((folder / "results.json").read_text()) for folder in (trained, trained / "supervised"))
    assert results["last"]["iteration"] == stage_1["last"]["iteration"] == 6 and results["last"]["images"] == 6
    config = usrn.Config(data_root=str(shapes), labeled="12")
    record = json.loads((trained / "subclasses" / "subclasses.json").read_text())
    check_maps(trained / "subclasses", load_data(config, CPU), record)
    assert 8 < len(record["parent_of"]) <= 24 and record["cbr_subclasses"] > record["cbr_classes"]
    assert [line["iteration"] for line in loss_lines(trained)] == [2, 4, 6]
    for line in loss_lines(trained):
        assert line["loss"] == pytest.approx(sum(value for name, value in line.items() if name.startswith("loss_")), abs=1e-5)
        assert 0 < line["used"] <= 1 and 0 < line["gate"] <= 1 and 0 < line["vetoed"] < 1 and 0 <= line["used_accuracy"] <= 1
    assert all(line["loss"] == line["loss_sup"] for line in loss_lines(trained / "supervised"))


def test_checkpoints_hold_what_a_resume_and_what_inference_needs(trained):
    latest, best = state(trained), torch.load(trained / "best.pt", weights_only=True)
    plain = DeepLabV3Plus("tiny", 8, "none").state_dict()
    assert latest["model"].keys() == best["model"].keys() == plain.keys() and "subclass_model" not in best
    assert_identical(latest["model"], best["model"])
    assert not [name for name in latest["subclass_model"] if name.startswith(("encoder.stem.", "encoder.layer1."))]
    assert len(latest["subclass_model"]["classifier.bias"]) == len(latest["subclasses"]["parent_of"])
    rates = sorted({group["initial_lr"] for group in latest["optimizer"]["param_groups"]})
    assert rates == pytest.approx([0.005, 0.015])  # half the recipe's batch; the head's is three times the encoder's
    parameters = sum(len(group["params"]) for group in latest["optimizer"]["param_groups"])
    assert parameters == len(list(make_both("low").parameters()))
    # Stage 3 starts from the encoder's weights, not from stage 1's F.
    assert state(trained / "supervised").keys() >= {"model", "optimizer"} and "subclass_model" not in state(trained / "supervised")


def test_the_same_command_trains_nothing(copied, shapes, monkeypatch, capfd, keep_signal_handlers):
    before = times(copied, *STAGES, "latest.pt", "best.pt", "results.json")
    maps = {path: path.stat().st_mtime_ns for path in (copied / "subclasses").glob("*.png")}
    out = run_to_end(monkeypatch, capfd, *QUICK, "--data-root", shapes, "--output", copied)
    assert times(copied, *before) == before and {path: path.stat().st_mtime_ns for path in maps} == maps
    subclasses = len(json.loads((copied / "subclasses" / "subclasses.json").read_text())["parent_of"])
    assert f"{subclasses} subclasses from" in out and "supervised" not in out and "class balance rate" not in out


def test_other_options_keep_the_stages_that_do_not_depend_on_them(copied, shapes, monkeypatch, capfd, keep_signal_handlers):
    command = [*QUICK, "--data-root", shapes, "--output", copied]
    before = files(copied)
    message = refuse(monkeypatch, capfd, *command, "--threshold", "0.9")
    assert "other options" in message and "--threshold 0.2" in message and "--retrain" in message
    assert files(copied) == before

    command += ["--iterations", "2", "--retrain"]
    before = times(copied, *STAGES, "latest.pt")
    out = run_to_end(monkeypatch, capfd, *command, "--threshold", "0.9")
    after = times(copied, *before)
    assert {name for name in before if before[name] != after[name]} == {"latest.pt"} and "resuming" in out  # stage 1
    assert state(copied)["iteration"] == 2 and state(copied)["config"]["threshold"] == 0.9 and state(copied)["config"]["retrain"] is False
    assert json.loads((copied / "results.json").read_text())["best"]["iteration"] == 2  # nothing of the other run is left
    assert [line["iteration"] for line in loss_lines(copied)] == [2]

    out = run_to_end(monkeypatch, capfd, *command, "--clustering", "plain")
    before, after = after, times(copied, *before)
    assert {name for name in before if before[name] != after[name]} == {"latest.pt", "subclasses/subclasses.json"}
    assert "class balance rate" in out and "other options" not in out

    out = run_to_end(monkeypatch, capfd, *command, "--lr", "0.02")
    before, after = after, times(copied, *before)
    assert {name for name in before if before[name] != after[name]} == {*STAGES, "latest.pt"} and "stage 1" in out and "made anew" in out


@pytest.mark.parametrize("options", [["--threshold", "1"], ["--batch-size", "1"], ["--max-subclasses", "3"], ["--labeled", "13"],
                                     ["--lr", "0.02", "--backbone", "nonsense"], ["--lr", "0.02", "--weights", "nowhere.pt"]])
def test_a_refused_retrain_deletes_nothing(options, copied, shapes, monkeypatch, capfd, keep_signal_handlers):
    before = files(copied)
    refuse(monkeypatch, capfd, *QUICK, "--data-root", shapes, "--output", copied, "--retrain", *options)
    assert files(copied) == before


def test_a_run_that_has_begun_needs_neither_stage_1_nor_its_weights(copied, shapes, monkeypatch, capfd, keep_signal_handlers):
    before = files(copied)
    out = run_to_end(monkeypatch, capfd, *QUICK, "--data-root", shapes, "--output", copied, "--weights", "none", "--retrain")
    assert "resuming" in out and files(copied).keys() == before.keys()
    shutil.rmtree(copied / "supervised")
    run_to_end(monkeypatch, capfd, *QUICK, "--data-root", shapes, "--output", copied)
    assert not (copied / "supervised").exists()


def test_a_signal_after_the_last_step_of_a_stage_is_obeyed(tmp_path, monkeypatch, keep_signal_handlers):
    config = usrn.Config(iterations=3, output=str(tmp_path))
    run = Run("usrn", config, CPU, {"model": nn.Linear(1, 1)}, images_per_step=1)
    run.on_signal(signal.SIGTERM, None)
    with pytest.raises(SystemExit) as stop:
        run.release_signals()
    assert stop.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_other_encoder_weights_make_stage_1_anew(trained, shapes, tmp_path, monkeypatch, capfd, keep_signal_handlers):
    command = stages_of(trained, tmp_path, "--data-root", shapes)
    before = times(tmp_path, *STAGES)
    run_to_end(monkeypatch, capfd, *command, "--weights", "none")
    assert not set(before.values()) & set(times(tmp_path, *STAGES).values())


def test_changed_labels_are_noticed(copied, shapes, tmp_path, monkeypatch, capfd, keep_signal_handlers):
    root = tmp_path / "shapes"
    shutil.copytree(shapes, root)
    name = (root / "ImageSets" / "Segmentation" / "labeled_12.txt").read_text().split()[3]
    path = root / "SegmentationClass" / f"{name}.png"
    with Image.open(path) as mask:
        mask.putpixel((5, 7), (mask.getpixel((5, 7)) + 1) % 8)
        mask.save(path)
    command = [*QUICK, "--data-root", root, "--output", copied]
    before = files(copied)
    message = refuse(monkeypatch, capfd, *command)
    assert "labeled images" in message and "--retrain" in message and files(copied) == before
    before = times(copied, *STAGES, "latest.pt")
    run_to_end(monkeypatch, capfd, *command, "--retrain")
    assert not set(before.values()) & set(times(copied, *before).values())


@pytest.mark.parametrize("damage", ["missing map", "changed map", "cut json", "all gone"])
def test_lost_maps_are_made_again_as_they_were(damage, copied, trained, shapes, monkeypatch, capfd, keep_signal_handlers):
    folder = copied / "subclasses"
    first = sorted(folder.glob("train_*.png"))[0]
    if damage == "missing map":
        first.unlink()
    elif damage == "changed map":
        first.write_bytes(first.read_bytes()[:-20])
    elif damage == "cut json":
        (folder / "subclasses.json").write_text((folder / "subclasses.json").read_text()[:200])
    else:
        shutil.rmtree(folder)
    before = times(copied, *STAGES[:2], "latest.pt")
    out = run_to_end(monkeypatch, capfd, *QUICK, "--data-root", shapes, "--output", copied)
    assert times(copied, *before) == before
    assert "class balance rate" in out or damage == "cut json"  # the maps alone are enough for a run that knows their digest
    assert_same_end(copied, trained)


def test_a_run_does_not_go_on_with_other_subclasses(copied, shapes, monkeypatch, capfd, keep_signal_handlers):
    """Those of another stage 1, which this run's checkpoint does not know."""
    checkpoint = state(copied / "supervised")
    for value in checkpoint["model"].values():
        if value.is_floating_point():
            value *= 1 + 0.5 * torch.rand(value.shape, generator=seeded(0))
    torch.save(checkpoint, copied / "supervised" / "latest.pt")
    shutil.rmtree(copied / "subclasses")
    before = (copied / "latest.pt").read_bytes()
    message = refuse(monkeypatch, capfd, *QUICK, "--data-root", shapes, "--output", copied)
    assert "subclasses" in message and "--retrain" in message and (copied / "latest.pt").read_bytes() == before


STOP_IN_STAGE_2 = """
import time
import usrn

write_map = usrn.save_indexed_png
usrn.save_indexed_png = lambda *arguments: (write_map(*arguments), time.sleep(600))
usrn.runtime.run_main(usrn.main)
"""


def test_sigkill_in_each_stage_then_the_same_command_ends_with_identical_bits(trained, shapes, tmp_path, monkeypatch, capfd, keep_signal_handlers):
    command = [*QUICK, "--data-root", shapes, "--output", tmp_path]
    interrupted_at = kill_after_first_checkpoint(tmp_path / "supervised", "usrn.py", *command)["iteration"]
    assert interrupted_at < 6 and not (tmp_path / "subclasses").exists(), "stage 1 ended before it could be killed"

    process = start("-c", STOP_IN_STAGE_2, *command, start_new_session=True)
    while not maps_of(tmp_path):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert f"supervised at iteration {interrupted_at}" in process.communicate()[0]
    assert len(maps_of(tmp_path)) == 1 and not (tmp_path / "subclasses" / "subclasses.json").exists()

    before = times(tmp_path, *STAGES[:2])
    interrupted_at = kill_after_first_checkpoint(tmp_path, "usrn.py", *command)["iteration"]
    assert interrupted_at < 6, "stage 3 ended before it could be killed"
    assert times(tmp_path, *before) == before
    before = times(tmp_path, *STAGES)
    assert f"{tmp_path} at iteration {interrupted_at}" in run_to_end(monkeypatch, capfd, *command)
    assert times(tmp_path, *before) == before
    assert_identical(state(tmp_path / "supervised")["model"], state(trained / "supervised")["model"])
    assert_same_end(tmp_path, trained)


def test_sigterm_saves_and_the_same_command_ends_with_identical_bits(trained, shapes, tmp_path, monkeypatch, capfd, keep_signal_handlers):
    command, log = [*QUICK, "--save-every", "100", "--data-root", shapes, "--output", tmp_path], Run.log
    for folder in (tmp_path / "supervised", tmp_path):
        def log_and_stop(self, iteration, *arguments, **options):
            log(self, iteration, *arguments, **options)
            if iteration == 2 and self.folder == folder:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(Run, "log", log_and_stop)
            status, out, err = run_as_program(monkeypatch, capfd, *command)
        assert status == 128 + signal.SIGTERM and "stopped by SIGTERM" in out and "Traceback" not in err
        assert state(folder)["iteration"] == 3
    assert f"{tmp_path} at iteration 3" in run_to_end(monkeypatch, capfd, *command)
    assert_same_end(tmp_path, trained)


RANKS = """
import sys

import torch
import usrn
from common import options, runtime
from common.run import Run

sys.path.insert(0, "tests")
import test_usrn

save = Run.save


def save_each_rank(self, iteration):
    save(self, iteration)
    if "subclass_model" in self.state:
        torch.save({name: self.state[name].state_dict() for name in ("model", "subclass_model")}, f"{sys.argv[1]}/{self.context.rank}.pt")


Run.save = save_each_rank
usrn.train(options.parse(usrn.Config, sys.argv[2:]))
context = runtime.start("cpu")
torch.Tensor.float = torch.Tensor.double
for parts in (1, 2):
    torch.save(test_usrn.step_in_float64(context, parts), f"{sys.argv[1]}/step_{parts}_{context.rank}.pt")
runtime.finish()
"""


def test_two_ranks_train_like_one_process(trained, shapes, tmp_path, monkeypatch):
    script, folder = tmp_path / "ranks.py", tmp_path / "run"
    script.write_text(RANKS)
    shutil.copytree(trained / "supervised", folder / "supervised")
    before = times(folder, *STAGES[:2])
    out = succeed(script, tmp_path, *QUICK, "--data-root", shapes, "--output", folder, torchrun=2)
    assert times(folder, *before) == before and out.count("class balance rate") == 1
    ours, theirs = (json.loads((path / "subclasses" / "subclasses.json").read_text()) for path in (folder, trained))
    assert {**ours, "clustering_seconds": 0} == {**theirs, "clustering_seconds": 0} and maps_of(folder) == maps_of(trained)
    saved, ranks = state(folder), [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert saved["iteration"] == 6 and len(saved["rng"]) == 2
    assert_identical(*ranks)
    assert_identical({name: saved[name] for name in ranks[0]}, ranks[0])
    assert len(loss_lines(folder)) == 3 and all(math.isfinite(line["loss"]) for line in loss_lines(folder))
    two = json.loads((folder / "results.json").read_text())["last"]
    one = evaluate_as_program(monkeypatch, shapes, folder / "latest.pt", tmp_path / "one.json")
    assert one["confusion"] == two["confusion"] and one["images"] == two["images"] == 6

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    whole, gradients = step_in_float64(CPU, 1)
    for parts in (1, 2):
        (first, first_gradients), (second, second_gradients) = (torch.load(tmp_path / f"step_{parts}_{rank}.pt") for rank in range(2))
        assert torch.equal(first_gradients, second_gradients)
        torch.testing.assert_close(first_gradients, gradients, rtol=1e-9, atol=1e-12)
        assert {name: (first[name] + second[name]) / 2 for name in first} == pytest.approx(whole, rel=1e-12)
        assert abs(first["loss"] - second["loss"]) > 1e-3


def evaluate_as_program(monkeypatch, root, checkpoint, output) -> dict:
    monkeypatch.setattr(sys, "argv", ["evaluate", "--checkpoint", str(checkpoint), "--data-root", str(root), "--num-workers", "0", "--output",
                                      str(output), "--device", "cpu"])
    evaluate.main()
    return json.loads(output.read_text())


@pytest.mark.parametrize("name", ["latest.pt", "best.pt"])
def test_evaluate_and_predict_need_f_only(name, trained, shapes, tmp_path, monkeypatch):
    checkpoint = torch.load(trained / name, weights_only=True)
    torch.save({key: value for key, value in checkpoint.items() if key not in ("subclass_model", "subclasses", "optimizer")}, tmp_path / name)
    results = json.loads((trained / "results.json").read_text())["last" if name == "latest.pt" else "best"]
    for path in (trained / name, tmp_path / name):
        again = evaluate_as_program(monkeypatch, shapes, path, tmp_path / "results.json")
        assert {key: again[key] for key in ("confusion", "iou", "miou", "images")} == {key: results[key] for key in ("confusion", "iou", "miou", "images")}
        assert again["ece"] == pytest.approx(results["ece"], abs=1e-6)  # another memory format, other last digits
    Image.radial_gradient("L").convert("RGB").resize((91, 50)).save(tmp_path / "mine.png")
    monkeypatch.setattr(sys, "argv", ["predict", "--checkpoint", str(tmp_path / name), "--output", str(tmp_path / "out"), "--device", "cpu",
                                      str(tmp_path / "mine.png")])
    assert not predict.main()
    with Image.open(tmp_path / "out" / "mine.png") as prediction:
        assert prediction.mode == "P" and prediction.size == (91, 50) and np.asarray(prediction).max() < 8


def test_model_ii_without_sharing_trains_f_as_plain_self_training_does(trained, shapes, tmp_path, monkeypatch, capfd, keep_signal_handlers):
    command = stages_of(trained, tmp_path / "II", "--data-root", shapes, "--iterations", "3", "--model", "II", "--share", "none")
    run_to_end(monkeypatch, capfd, *command)
    run_to_end(monkeypatch, capfd, *command, "--model", "self-training", "--output", tmp_path / "self-training")
    assert not (tmp_path / "self-training" / "supervised").exists() and not (tmp_path / "self-training" / "subclasses").exists()
    two, plain = (state(tmp_path / name) for name in ("II", "self-training"))
    assert "subclass_model" in two and "subclass_model" not in plain and two["iteration"] == plain["iteration"] == 3
    assert_identical(two["model"], plain["model"])
    assert all(line["used"] > 0 for line in loss_lines(tmp_path / "II"))


def test_the_baseline_trains_on_labeled_images_alone(trained, shapes, tmp_path, monkeypatch, capfd, keep_signal_handlers):
    limit = QUICK.index("--max-subclasses")
    command = [*QUICK[:limit], *QUICK[limit + 2 :], "--data-root", shapes, "--output", tmp_path / "a", "--model", "baseline"]
    run_to_end(monkeypatch, capfd, *command)
    assert not (tmp_path / "a" / "supervised").exists() and not (tmp_path / "a" / "subclasses").exists()
    assert len(loss_lines(tmp_path / "a")) == 3
    for line in loss_lines(tmp_path / "a"):
        assert line["loss"] == line["loss_sup"] > 0 and not {"loss_unsup", "loss_sup_sub", "used", "gate"} & line.keys()
    assert_identical(state(tmp_path / "a")["model"], state(trained / "supervised")["model"])  # which is what stage 1 is
    assert state(tmp_path / "a")["config"]["max_subclasses"] == 12  # by default one a labeled image


VARIANTS = {
    "ema": ["--ema-decay", "0.9", "--supervised-iterations", "2"],
    "parts": ["--grad-accum", "2", "--supervised-iterations", "2"],
    "amp": ["--amp", "--supervised-iterations", "1"],
    "pool 0": ["--pool", "0", "--crop", "33", "--supervised-iterations", "1"],
    "share all": ["--share", "all", "--gate", "subclasses"],
    "share none": ["--share", "none", "--pool", "1", "--lambda-sub", "0.5", "--lambda-u", "2"],
    "model I": ["--model", "I"],
    "model III": ["--model", "III"],
    "model IV": ["--model", "IV", "--clustering", "plain"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_run(name, trained, shapes, tmp_path, monkeypatch, capfd, keep_signal_handlers):
    out = run_to_end(monkeypatch, capfd, *stages_of(trained, tmp_path, "--data-root", shapes, *VARIANTS[name]))
    saved, lines = state(tmp_path), loss_lines(tmp_path)
    assert saved["iteration"] == len(lines) == 2 and all(0 < line["loss"] < 100 for line in lines)
    assert "subclass_model" in saved and ("subclasses from" in out) is (name not in ("ema", "parts", "amp", "pool 0", "model IV"))
    logged = {key for key in lines[0] if key.startswith("loss_")}
    missing = {"model I": {"loss_unsup", "loss_unsup_sub"}, "model III": {"loss_unsup_sub"}}.get(name, set())
    assert logged == {"loss_sup", "loss_sup_sub", "loss_unsup", "loss_unsup_sub"} - missing
    assert all(("gate" not in line) is (name == "model I") for line in lines)
    assert name not in ("model III", "model IV") or all(line["gate"] == 1 for line in lines)
    if name == "ema":
        assert_identical(torch.load(tmp_path / "best.pt", weights_only=True)["model"], saved["ema"])
        assert not torch.equal(saved["ema"]["classifier.weight"], saved["model"]["classifier.weight"])
    if name == "share none":
        for line in lines:
            weighted = line["loss_sup"] + 0.5 * line["loss_sup_sub"] + 2 * (line["loss_unsup"] + 0.5 * line["loss_unsup_sub"])
            assert line["loss"] == pytest.approx(weighted, abs=1e-5)


@pytest.mark.parametrize("options, named", [
    (["--threshold", "1"], "--threshold"), (["--threshold", "-0.1"], "--threshold"), (["--pool", "-1"], "--pool"), (["--pool", "30"], "--pool"),
    (["--max-subclasses", "3"], "--max-subclasses"), (["--max-subclasses", "300"], "--max-subclasses"),
    (["--supervised-iterations", "0"], "--supervised-iterations"), (["--batch-size", "1"], "--batch-size"),
    (["--batch-size", "1", "--model", "baseline"], "--batch-size"), (["--batch-size", "1", "--model", "self-training"], "--batch-size"),
    (["--batch-size", "4", "--grad-accum", "4"], "--batch-size"), (["--labeled", "all"], "unlabeled")])
def test_bad_options_give_one_line_and_write_nothing(options, named, shapes, tmp_path, monkeypatch, capfd, keep_signal_handlers):
    assert named in refuse(monkeypatch, capfd, *QUICK, "--data-root", shapes, "--output", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("names", [("twice", "twice"), ("subclasses", "other")])
def test_maps_of_one_name_are_one_clear_line(names, shapes, tmp_path, monkeypatch, capfd, keep_signal_handlers):
    root, lines = tmp_path / "shapes", []
    shutil.copytree(shapes, root)
    first = (root / "ImageSets" / "Segmentation" / "labeled_12.txt").read_text().split()[0]
    for number, name in enumerate(names):
        lines.append(f"{number}/{name}.jpg {number}/{name}.png\n")
        for source, suffix in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
            (root / str(number)).mkdir(exist_ok=True)
            shutil.copy(root / source / f"{first}.{suffix}", root / str(number) / f"{name}.{suffix}")
    (tmp_path / "list.txt").write_text("".join(lines))
    message = refuse(monkeypatch, capfd, *QUICK[2:], "--labeled-list", tmp_path / "list.txt", "--data-root", root, "--output", tmp_path / "run")
    assert "name" in message and not (tmp_path / "run").exists()


def test_model_i_needs_no_unlabeled_image(shapes, tmp_path, monkeypatch, capfd, keep_signal_handlers):
    """As the message says that --labeled all gets without it."""
    names = [shapes / "ImageSets" / "Segmentation" / "labeled_12.txt", tmp_path / "list.txt"]
    names[1].write_text(names[0].read_text())
    run_to_end(monkeypatch, capfd, *QUICK[2:], "--iterations", "1", "--supervised-iterations", "1", "--labeled-list", names[1], "--unlabeled-list",
               names[1], "--data-root", shapes, "--output", tmp_path / "run", "--model", "I")
    assert state(tmp_path / "run")["iteration"] == 1


def test_pspnet_in_every_stage(voc_root, tmp_path, keep_signal_handlers):
    """--architecture pspnet: stages 1 to 3 train it, and the checkpoint says so."""
    lists = voc_root / "ImageSets" / "Segmentation"
    (tmp_path / "labeled.txt").write_text("\n".join((lists / "train.txt").read_text().split()[:3]))
    config = usrn.Config(dataset="pascal", data_root=str(voc_root), labeled_list=str(tmp_path / "labeled.txt"), unlabeled_list=str(lists / "train.txt"), backbone="tiny",
                         crop=33, batch_size=2, iterations=2, num_workers=0, output=str(tmp_path / "run"), architecture="pspnet", device="cpu")
    usrn.train(config)
    for folder in (tmp_path / "run", tmp_path / "run" / "supervised"):
        assert any(key.startswith("pyramid.") for key in state(folder)["model"])
    assert any(key.startswith("pyramid.") for key in state(tmp_path / "run")["subclass_model"])
