"""daw.py against sums over fine grids, a search over all steps, and plain loops; its runs."""

import numpy as np
import pytest
import torch
from programs import (QUICK, are_hard, assert_identical, assert_near, assert_scored_as_in_training,
                      lines_of, on_ranks, pasted, recorded, seeded, state, sum_of_losses)
from torch import nn

import daw
import diffmatch
from common import runtime
from common.augment import IGNORE, Photometry, normalize


# ---------------------------------------------------------------- Eq. 3-11: the threshold, E1, E2


def cells(mu_pos, var_pos, mu_neg, var_neg, classes, count=40_000):
    """[1/C, 1] in cells: their edges [count + 1], and the shares of g+ and g- in each, [count]."""
    edges = np.linspace(1 / classes, 1, count + 1)
    p = (edges[1:] + edges[:-1]) / 2
    right = np.exp(-((p - mu_pos) ** 2) / (2 * var_pos))
    wrong = np.exp(-((p - mu_neg) ** 2) / (2 * var_neg))
    return edges, right / right.sum(), wrong / wrong.sum()


def effects(*gaussians):
    """(t, E1 + E2 of the step at t) for every edge of the cells."""
    edges, right, wrong = cells(*gaussians)
    return edges, 1 + np.append(0, np.cumsum(right - wrong))


def test_no_step_is_better_than_the_one_at_t_star():
    start, nearly_certain = (1 / 21, 1, 1 / 21, 1, 21), (1.0, 1e-8, 0.6, 0.03, 21)
    cases, rng = [start, nearly_certain, (0.7, 0.01, 0.7, 0.01, 2)], np.random.default_rng(1)
    for number in range(300):
        classes = int(rng.choice([2, 5, 21, 81]))
        mu_pos, mu_neg = rng.uniform(1 / classes, 1, 2)
        var_pos, var_neg = np.exp(2 * rng.uniform(np.log(0.03), np.log(0.7), 2))
        if number < 80:  # equal or nearly
            var_neg = var_pos * (1 + rng.choice([0, 1e-15, -1e-15, 1e-12, -1e-9, 1e-7, -1e-5]))
        cases.append((mu_pos, var_pos, mu_neg, var_neg, classes))
    useless = 0
    for gaussians in cases:
        thresholds, effect = effects(*gaussians)
        t_star = daw.optimal_threshold(*gaussians).item()
        assert np.interp(t_star, thresholds, effect) <= effect.min() + 1e-7, gaussians
        if effect.argmin() == 0:  # no step gains anything: all labels are used
            assert t_star == 1 / gaussians[-1], gaussians
            useless += 1
    assert 30 < useless < 150


@pytest.mark.parametrize("name", daw.WEIGHTINGS)
def test_tradeoff_equals_sums_over_cells(name):
    for gaussians in ((0.91, 0.012, 0.62, 0.03, 21), (1 / 21, 1, 1 / 21, 1, 21)):
        edges, right, wrong = cells(*gaussians)
        p = (edges[1:] + edges[:-1]) / 2
        weight = {"none": np.ones_like(p), "power": p * p}.get(name, p >= 0.8)
        errors = daw.tradeoff(lambda p: daw.pseudo_label_weight(p, name, 0.8), *gaussians)
        cell = 2 * max(right.max(), wrong.max())  # a step may be off by one of tradeoff's
        expected = (weight * wrong).sum(), 1 - (weight * right).sum()
        assert errors == pytest.approx(expected, abs=1e-7 + cell * (name in ("fixed", "daw")))


def settled_statistics(momentum=0.9):
    """Of four classes, as after some training."""
    statistics = daw.Statistics(4, momentum)
    statistics.mean.copy_(torch.tensor([0.85, 0.6]))
    statistics.variance.copy_(torch.tensor([0.02, 0.03]))
    statistics.class_mean.copy_(torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.2, 0.2, 0.25, 0.35]]))
    return statistics


ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_a_line_of_the_log(device):
    line = daw.describe(settled_statistics().to(device), 0.95)
    thresholds, effect = effects(0.85, 0.02, 0.6, 0.03, 4)
    assert line["t_star"] == pytest.approx(thresholds[effect.argmin()], abs=1e-4)
    assert line["E1_daw"] + line["E2_daw"] == pytest.approx(effect.min(), abs=1e-3)
    assert (line["E1_none"], line["E2_none"], line["lowest"]) == (1, 0, 0.25)
    assert line["shift"] == pytest.approx(0.3)  # 0.2, 0.1 less of two classes, 0.05, 0.25 more
    assert line["E1_fixed"] < line["E1_daw"] and line["E2_fixed"] > line["E2_daw"]
    logged = line["mu_pos"], line["mu_neg"], line["sigma_pos"] ** 2, line["sigma_neg"] ** 2
    assert logged == pytest.approx((0.85, 0.6, 0.02, 0.03), rel=1e-4)


# ---------------------------------------------------------------- Eq. 5, 6, 12: statistics


class Playback(nn.Module):
    """Answers with prepared logits of three images, so that each use of a view has a gradient."""

    def __init__(self, seed=0, sides=(4, 5)):
        super().__init__()
        logits = 2 * torch.randn(15, 4, *sides, generator=seeded(seed))
        parts = logits.split([6, 3, 6])
        self.first, self.perturbed, self.strong = (nn.Parameter(part) for part in parts)
        self.seen = []

    def forward(self, images, perturb=0):
        self.seen.append(images)
        assert perturb in (0, 3)
        if perturb:
            return self.first, self.perturbed
        return self.strong[: len(images)] if len(self.seen) % 2 == 0 else self.first

    def predictions(self):  # of labeled, of weak images
        return self.first.detach().softmax(dim=1).chunk(2)


def draw_views(seed):
    """Images differ in how much of them is labeled and valid."""
    generator, share = seeded(seed), torch.tensor([0.5, 0.7, 1])[:, None, None]
    names = ("labeled", "weak", "strong_1", "strong_2")
    views = {name: torch.randn(3, 3, 4, 5, generator=generator) for name in names}
    for name in ("label", "truth"):
        views[name] = torch.randint(4, (3, 4, 5), generator=generator)
        views[name][torch.rand(3, 4, 5, generator=generator) > share] = IGNORE
    views["valid"] = torch.rand(3, 4, 5, generator=generator) < share
    for number, view in enumerate(("strong_1", "strong_2")):
        views[view + "_boxes"] = torch.zeros(3, 4, 5, dtype=torch.bool)
        views[view + "_boxes"][0, 1:3, 1:4] = views[view + "_boxes"][2, number:, 2:] = True
    return views


def statistics_of_batch(labeled, label, unlabeled, valid):
    """Eq. 5 image by image, the unbiased variance of Eq. 6, E[q(x)] of Eq. 12; in float64."""
    labeled, unlabeled = labeled.double(), unlabeled.double()
    confidence, prediction = labeled.max(dim=1)
    means, variances = [], []
    for chosen in (prediction == label, (prediction != label) & (label != IGNORE)):
        images = [p[mask] for p, mask in zip(confidence, chosen) if mask.any()]
        means.append(sum(p.mean() for p in images) / len(images))
        variance = sum(((p - means[-1]) ** 2).mean() for p in images) / len(images)
        variances.append(variance * chosen.sum() / (chosen.sum() - 1))
    counted = (labeled, label != IGNORE), (unlabeled, valid)
    class_means = [probs.movedim(1, 3)[mask].mean(dim=0) for probs, mask in counted]
    return {"mean": torch.stack(means), "variance": torch.stack(variances),
            "class_mean": torch.stack(class_means)}


def test_statistics_equal_those_of_single_images():
    statistics = daw.Statistics(4, momentum=0.9)
    assert statistics.mean.tolist() == [0.25, 0.25] and statistics.variance.tolist() == [1, 1]
    for seed in range(3):
        (labeled, unlabeled), views = Playback(seed).predictions(), draw_views(seed)
        label = views["label"]
        if seed > 0:
            label[0] = labeled[0].argmax(dim=0)  # all right
        if seed > 1:
            label[1] = IGNORE
        batch = labeled.requires_grad_(), label, unlabeled, views["valid"]
        expected = {name: 0.9 * statistics.state_dict()[name] + 0.1 * new
                    for name, new in statistics_of_batch(*batch).items()}
        statistics.update(*batch)
        for name, value in statistics.named_buffers():
            assert_near(value, expected[name])
        assert not statistics.mean.requires_grad


@pytest.mark.parametrize("wrong", [0, 9, 10])
def test_few_pixels_keep_the_old_values_and_no_variance_is_zero(wrong):
    label = torch.randint(4, (3, 4, 5), generator=seeded(0))
    probs = torch.eye(4)[label].movedim(3, 1)  # certain everywhere
    label.view(-1)[:wrong] = (label.view(-1)[:wrong] + 1) % 4
    statistics = daw.Statistics(4, 0.0)
    statistics.update(probs, label, probs, label < 2)
    assert statistics.mean.tolist() == [1, 1 if wrong == 10 else 0.25]
    assert [0 < value < 1e-6 for value in statistics.variance.tolist()] == [True, wrong == 10]


def test_sums_and_alignment_of_half_precision_do_not_overflow():
    probs = torch.rand(2, 3, 300, 300, generator=seeded(3)).softmax(dim=1)
    means = torch.tensor([[0.6, 0.4, 1e-3], [0.7, 0.3, 1e-8]], dtype=torch.float64)
    for function, *rest in ((daw.class_sums, probs[:, 0] > 0.3), (daw.align_distribution, *means)):
        assert_near(function(probs.half(), *rest), function(probs, *rest), rel=1e-3)


# ---------------------------------------------------------------- Eq. 1, 2, 13: the step


@pytest.mark.parametrize("weighting, align, num_views, ohem", [
    ("none", True, 3, 0), ("fixed", True, 3, 0), ("power", True, 3, 0.7), ("daw", True, 3, 0),
    ("daw", False, 3, 0), ("fixed", True, 1, 0), ("daw", True, 1, 0)])
def test_a_step_equals_plain_loops(weighting, align, num_views, ohem):
    """The losses, and by autograd of loops in float64 the gradient of every use of every view."""
    views, network, statistics = draw_views(1), Playback(), settled_statistics()
    loss, terms = daw.daw_loss(network, views, statistics, weighting, 0.8, align, ohem, num_views)
    loss.backward()
    strong_views = ("strong_1", "strong_2")[:num_views]
    for images, names in zip(network.seen, (("labeled", "weak"), strong_views), strict=True):
        assert torch.equal(images, torch.cat([views[name] for name in names]))
    (labeled_probs, probs), after = network.predictions(), settled_statistics()
    after.update(labeled_probs, views["label"], probs, views["valid"])
    assert_identical(dict(after.state_dict()), dict(statistics.state_dict()))
    threshold = 0.8
    if weighting == "daw":
        thresholds, effect = effects(*map(float, after.gaussians()))
        threshold = thresholds[effect.argmin()].item()
    pseudo_label, weight = torch.zeros(3, 4, 5, dtype=torch.long), torch.zeros(3, 4, 5)
    for b, row, column in views["valid"].nonzero().tolist():
        q = probs[b, :, row, column].double()
        if weighting == "daw" and align:
            q = q * after.class_mean[0] / after.class_mean[1]
            q = q / q.sum()
        p = q.max().item()
        pseudo_label[b, row, column] = q.argmax()
        weight[b, row, column] = {"none": 1, "power": p**2}.get(weighting, p >= threshold)

    first, perturbed, strong = logits = [part.detach().double().requires_grad_()
                                         for part in network.parameters()]
    seen, valid = views["label"] != IGNORE, views["valid"]
    seen = are_hard(first[:3], views["label"], ohem) if ohem else seen
    loss_sup = sum_of_losses(first[:3], views["label"], seen.double()) / seen.sum()
    shares = (0.25, 0.5) if num_views == 3 else (1, 0)  # of a strong view, of the perturbed one
    loss_unsup = shares[1] * sum_of_losses(perturbed, pseudo_label, weight) / valid.sum()
    for view, logits_view in zip(strong_views, strong.chunk(2)):
        mixed = [pasted(part, views[view + "_boxes"]) for part in (pseudo_label, weight, valid)]
        part = sum_of_losses(logits_view, *mixed[:2]) / mixed[2].sum()
        loss_unsup = loss_unsup + shares[0] * part
    known = weight * (views["truth"] != IGNORE)
    expected = {"loss": (loss_sup + loss_unsup) / 2, "loss_sup": loss_sup, "loss_unsup": loss_unsup,
                "used": weight.sum() / valid.sum(),
                "used_accuracy": known[pseudo_label == views["truth"]].sum() / known.sum()}
    for name, value in terms.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-5)
    expected["loss"].backward()
    for ours, theirs in zip(network.parameters(), logits):
        assert_near(torch.zeros(()) if ours.grad is None else ours.grad, theirs.grad)


def test_nothing_confident_nothing_labeled_nothing_valid():
    views, network, statistics = draw_views(2), Playback(), settled_statistics()
    loss, terms = daw.daw_loss(network, views, settled_statistics(), "fixed", 0.9999, True, 0.0)
    assert terms["used"] == terms["loss_unsup"] == 0 < loss and terms["used_accuracy"].isnan()
    views["label"], views["valid"] = views["label"] | IGNORE, views["valid"] & False
    loss, _ = daw.daw_loss(network, views, statistics, "daw", 0.95, True, 0.0)
    loss.backward()
    assert loss == 0 and all(part.grad.isfinite().all() for part in network.parameters())
    assert_identical(dict(statistics.state_dict()), dict(settled_statistics().state_dict()))


def test_a_step_reads_nothing_back_from_the_device():
    """The meta device has no values: whatever reads one back, or branches on one, raises there."""
    batch = {"labeled": torch.empty(3, 3, 16, 16, dtype=torch.uint8, device="meta")}
    batch["unlabeled"], batch["label"] = batch["labeled"], batch["labeled"][:, 0]
    batch["truth"], batch["valid"] = batch["label"], batch["label"].bool()
    views = daw.make_views(batch, 16, Photometry(blur=(0.1, 1.0)))
    network, statistics = Playback(0, (16, 16)).to("meta"), daw.Statistics(4, 0.9).to("meta")
    loss, terms = daw.daw_loss(network, views, statistics, "daw", 0.95, True, 0.7)
    loss.backward()
    assert {(value.dim(), value.device.type) for value in terms.values()} == {(0, "meta")}


@pytest.mark.parametrize("module, more", [(daw, ()), (diffmatch, (("strong_1", "strong_2"), 1))])
def test_strong_views_show_the_neighbour_inside_the_box(module, more, monkeypatch):
    monkeypatch.setattr(module, "strong_augment", lambda images, photometry: 1 - images)
    images = torch.randint(256, (2, 4, 3, 16, 16), generator=seeded(0)).byte()
    torch.manual_seed(1)
    batch = {"labeled": images[0], "unlabeled": images[1]}
    views = module.make_views(batch, 16, Photometry(), *more)
    assert torch.equal(views["weak"], normalize(images[1]))
    for view in ("strong_1", "strong_2"):
        expected = pasted(normalize(1 - images[1] / 255), views[view + "_boxes"])
        assert torch.equal(views[view], expected)
    assert not torch.equal(views["strong_1_boxes"], views["strong_2_boxes"])


# ---------------------------------------------------------------- runs


def train(root, folder, *options):
    where = ["--data-root", str(root), "--output", str(folder)]
    daw.train(runtime.parse(daw.Config, argv=[*QUICK, *where, *options]))


def test_the_average_of_the_weights_is_evaluated_and_saved(shapes, tmp_path):
    train(shapes, tmp_path / "one", "--ema-decay", "0.5", "--iterations", "1")
    one = state(tmp_path / "one")  # min(1 - 1 / 1, 0.5) of the old average: nothing is left of it
    assert_identical(one["ema"], one["model"])
    train(shapes, tmp_path, "--ema-decay", "0.5")
    saved, name = state(tmp_path), "classifier.weight"
    assert not torch.equal(saved["ema"][name], saved["model"][name])
    assert saved["optimizer"]["param_groups"][1]["lr"] == 0  # where its schedule ends
    assert_identical(state(tmp_path, "best.pt")["model"], saved["ema"])
    assert_scored_as_in_training(tmp_path)


@pytest.mark.parametrize("options", [
    ["--supervised", "--strong-labeled", "--labeled", "all"],
    ["--weighting", "none", "--views", "1", "--ohem", "0.7", "--checkpoint-activations",
     "--threshold", "0.6", "--no-align", "--stats-momentum", "0.9", "--amp"]])
def test_variants_train(options, shapes, tmp_path, monkeypatch):
    augmented = recorded(monkeypatch, daw, "strong_augment")
    shown = recorded(monkeypatch, daw.DeepLabV3Plus, "forward")
    seeds, supervised, steps = (recorded(monkeypatch, *of) for of in (
        (torch, "manual_seed"), (daw, "supervised_loss"), (daw, "daw_loss")))
    halves = recorded(monkeypatch, torch, "autocast")
    train(shapes, tmp_path, "--iterations", "2", "--seed", "3", *options)
    assert seeds[:2] == [(3,), (3,)] and shown[0][1].min() < -1  # normalised
    assert {ohem for _, _, ohem in supervised} == {0.7 if "none" in options else 0}
    assert halves[0][2] is ("none" in options)
    for _, _, statistics, *given in steps:
        assert given == ["none", 0.6, False, 0.7, 1] and statistics.momentum == 0.9
    lines = lines_of(tmp_path)
    assert len(lines) == 2 and all(0 < line["loss"] < 10 for line in lines)
    assert all(line.get("used", 0) == ("none" in options) for line in lines)
    assert {len(given) for given in shown} == {2}  # without perturb: neither wants three views
    assert len(augmented) == (2 if "--strong-labeled" in options else 4)


class Pointwise(nn.Conv2d):
    """A classifier of each pixel's colour: no batch norm, nothing drawn."""

    def __init__(self, backbone, classes, weights):
        super().__init__(3, classes, 1)

    def forward(self, images, perturb=0):
        logits = super().forward(images)
        return (logits, super().forward(images[-perturb:] / 2)) if perturb else logits

    def parameter_groups(self, lr, head_lr_multiplier):
        return [{"params": list(self.parameters()), "lr": lr}]


def test_two_ranks_learn_what_one_process_learns(shapes, tmp_path, monkeypatch, request):
    """In float64, where sums hardly round; nothing is drawn but the order of the images."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(daw, "DeepLabV3Plus", Pointwise)
    monkeypatch.setattr(daw, "strong_augment", lambda images, photometry: 1 - images)
    monkeypatch.setattr(daw, "cutmix_boxes", lambda batch, size, device: (
        (torch.arange(size) < size // 2)[:, None].expand(batch, size, size)))
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.float64)
    options = "--batch-size 4 --stats-momentum 0.5 --lr 1 --crop 64".split()  # with padding
    train(shapes, tmp_path / "one", *options)
    on_ranks(lambda rank: train(shapes, tmp_path / "two", *options), tmp_path)
    two, one = state(tmp_path / "two"), state(tmp_path / "one")
    lines, learned = lines_of(tmp_path / "one"), one["statistics"]["mean"].tolist()
    assert [lines[-1]["mu_pos"], lines[-1]["mu_neg"]] == pytest.approx(learned, abs=1e-5)
    assert len({line["mu_pos"] for line in lines}) == 4
    for name, value in {**one["model"], **one["statistics"]}.items():
        assert_near({**two["model"], **two["statistics"]}[name], value, rel=1e-9)
    for alone, shared in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "two"), strict=True):
        del alone["used_accuracy"], shared["used_accuracy"]  # a mean of the ranks' ratios
        assert shared == pytest.approx(alone, rel=1e-5, abs=2e-6)  # six digits are written
