"""usrn.py against other ways to the same numbers: all balanced assignments there are, a matching,
Eq. 9 as printed, loops over pixels; and its three stages as programs."""

import functools
import itertools
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from programs import (QUICK, are_hard, assert_identical, assert_near, assert_same_run,
                      assert_scored_as_in_training, draw_labels, lines_of, on_ranks, picture,
                      ranks_draw_apart, recorded, refuse, seeded, state, stop_at, sum_of_losses)
from torch import nn

import usrn
from common import runtime
from common.augment import IGNORE, Photometry, normalize
from common.data import Data, Sample, dataset_info
from common.models import DeepLabV3Plus, PSPNet, resize

PARENTS = torch.tensor([0, 0, 0, 1, 1, 2, 3])  # 7 subclasses of 4 classes


# ---------------------------------------------------------------- balanced k-means


def draw_cost(seed, points, clusters, channels=2):
    """Squared distances, float64 [N, K], to centroids that leave the nearest assignment uneven."""
    x = torch.randn(points, channels, generator=seeded(seed), dtype=torch.float64)
    scale = 0.3 + 2 * torch.rand(clusters, 1, generator=seeded(seed + 1), dtype=torch.float64)
    m = torch.randn(clusters, channels, generator=seeded(seed + 2), dtype=torch.float64) * scale
    if seed % 3 == 2:  # ties
        x, m = x.round(), m.round()
    return (x[:, None] - m - 0.5).square().sum(dim=2)


def is_balanced(clusters, number):
    sizes = torch.bincount(clusters, minlength=number)
    return clusters.dtype == torch.int64 and len(sizes) == number and sizes.max() - sizes.min() <= 1


def cost_of_assignment(cost, price):
    """The total of what balanced_assignment finds; it must be balanced."""
    kept = cost.clone()
    clusters, _ = usrn.balanced_assignment(cost, price)
    assert is_balanced(clusters, cost.shape[1]) and torch.equal(cost, kept)
    return cost.double().gather(1, clusters[:, None]).sum().item()


def least_by_matching(cost):
    """scipy's optimum: a column for each place, and rows that take those which stay free."""
    optimize = pytest.importorskip("scipy.optimize", reason="compares with scipy's solver")
    least, rest = divmod(len(cost), cost.shape[1])
    places = cost.double().repeat_interleave(least, dim=1)
    if rest:
        free = torch.zeros(cost.shape[1] - rest, places.shape[1] + cost.shape[1]).double()
        free[:, : places.shape[1]] = 1e9
        places = torch.cat([torch.cat([places, cost.double()], dim=1), free])
    return places[optimize.linear_sum_assignment(places.numpy())].sum().item()


@pytest.mark.parametrize("points, clusters", [(5, 1), (7, 2), (5, 5), (8, 3), (7, 4), (3, 5)])
def test_no_balanced_assignment_costs_less(points, clusters):
    every = np.array(list(itertools.product(range(clusters), repeat=points)))
    sizes = (every[:, :, None] == np.arange(clusters)).sum(axis=1)
    every = every[sizes.max(axis=1) - sizes.min(axis=1) <= 1]
    for seed in range(6):
        cost = draw_cost(seed, points, clusters) * (-1) ** seed  # any sign is a cost
        least = cost.numpy()[np.arange(points), every].sum(axis=1).min()
        total = cost_of_assignment(cost, cost.new_zeros(clusters))
        assert total == pytest.approx(least, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("points, clusters", [(40, 40), (91, 2), (127, 8), (700, 6)])
def test_an_assignment_costs_what_a_matching_costs(points, clusters):
    for seed, dtype in itertools.product(range(3), (torch.float64, torch.float32)):
        cost = draw_cost(seed, points, clusters, channels=1 + seed).to(dtype) - 2 * seed
        optimum = least_by_matching(cost)
        rel = 1e-9 if dtype == torch.float64 else 1e-5
        for price in (torch.zeros(clusters), torch.linspace(-9, 9, clusters)):  # guesses
            total = cost_of_assignment(cost, price.to(dtype))
            assert total == pytest.approx(optimum, rel=rel, abs=1e-12)


def draw_groups(seed, sizes, dtype=torch.float16):
    """Groups of points far apart, in random order, and the group of each point."""
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    groups = groups[torch.randperm(len(groups), generator=seeded(seed))]
    corners = torch.tensor(list(itertools.product((0.0, 20.0), repeat=3)))
    noise = 0.3 * torch.randn(len(groups), 3, generator=seeded(seed + 1))
    return (corners[groups] + noise).to(dtype), groups


def same_partition(clusters, groups):
    pairs = set(zip(clusters.tolist(), groups.tolist()))
    return len(pairs) == len(set(clusters.tolist())) == len(set(groups.tolist()))


def test_groups_are_found():
    found = 0
    for seed in range(6):
        features, groups = draw_groups(seed, (40,) * 7)
        assert same_partition(usrn.balanced_kmeans(features, 7, seed), groups)
        features, groups = draw_groups(seed, (20, 30, 50, 100))
        found += same_partition(usrn.balanced_kmeans(features, 4, seed, balanced=False), groups)
        balanced = usrn.balanced_kmeans(features, 4, seed)
        assert torch.bincount(balanced).tolist() == [50] * 4
    assert found >= 5  # the start may be unlucky
    features, groups = draw_groups(9, (2100,) * 4, torch.float32)  # a fourth of them comes first
    for origin in (0, 1000):
        assert same_partition(usrn.balanced_kmeans(features + origin, 4, 9), groups)


@pytest.mark.parametrize("points, clusters", [(1, 1), (9, 9), (10, 9), (199, 64), (2001, 6)])
def test_sizes_differ_by_at_most_one(points, clusters):
    features = torch.randn(points, 3, generator=seeded(points)).exp()
    assert is_balanced(usrn.balanced_kmeans(features, clusters, points), clusters)
    few = features[torch.randint(max(1, points // 5), (points,), generator=seeded(0))]  # duplicates
    assert is_balanced(usrn.balanced_kmeans(few.half(), clusters, 0), clusters)


def spread(features, clusters):
    members = [features[clusters == number].double() for number in clusters.unique()]
    return sum((points - points.mean(dim=0)).square().sum().item() for points in members)


def test_a_seed_decides_and_blocks_do_not(monkeypatch):
    features, before = torch.randn(2500, 4, generator=seeded(2)).half(), torch.get_rng_state()
    runs = [usrn.balanced_kmeans(features, 6, seed) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not same_partition(runs[0], runs[2])
    assert torch.equal(torch.get_rng_state(), before)
    calls = recorded(monkeypatch, torch, "cdist")
    monkeypatch.setattr(usrn, "BLOCK", 100)
    assert spread(features, usrn.balanced_kmeans(features, 6, 0)) == pytest.approx(
        spread(features, runs[0]), rel=1e-2)
    assert max(len(points) for points, _ in calls) == 100  # computed at once


# ---------------------------------------------------------------- Eq. 9, numbers of subclasses


def rate_as_printed(counts):
    n, classes = np.asarray(counts, np.float64), len(counts)
    deviation = np.sqrt((n**2).sum() / classes - (n.sum() / classes) ** 2)
    worst = np.sqrt(n.sum() ** 2 / classes - (n.sum() / classes) ** 2)
    return 1 - deviation / worst


def test_class_balance_rate_is_eq_9():
    rng = np.random.default_rng(0)
    for classes in (2, 3, 21, 177) * 5:
        counts = (10 ** rng.uniform(1, 7, classes)).astype(np.int64)
        rate = usrn.class_balance_rate(torch.from_numpy(counts))
        assert 0 < rate < 1 and rate == pytest.approx(rate_as_printed(counts), rel=1e-9)
    assert usrn.class_balance_rate(torch.full((5,), 12345)) == 1
    assert usrn.class_balance_rate(torch.tensor([0, 987654321, 0])) == pytest.approx(0, abs=1e-12)
    assert math.isnan(usrn.class_balance_rate(torch.tensor([7])))


@pytest.mark.parametrize("pixels, most, expected", [
    ([121000, 2000, 1000, 3000], 255, [121, 2, 1, 3]), ([2600, 1000, 3400], 255, [3, 1, 3]),
    ([2400, 1000, 0, 1499], 255, [2, 1, 1, 1]), ([0, 9], 255, [1, 1]), ([5], 255, [1]),
    ([8, 4, 1], 3, [1, 1, 1]), ([100, 10, 1], 12, [10, 1, 1]), ([1, 10**6], 255, [1, 254])])
def test_the_smallest_class_or_the_limit_sets_the_size_of_clusters(pixels, most, expected):
    counts = usrn.subclass_counts(torch.tensor(pixels), most)
    assert counts.dtype == torch.int64 and counts.tolist() == expected


# ---------------------------------------------------------------- Eq. 3, 4, 6: pseudo labels


def test_pseudo_labels_are_used_strictly_above_the_threshold():
    probs = torch.tensor([[0.75, 0.25, 0], [0.125, 0.875, 0], [0.25, 0.5, 0.25]]).T[None]
    pseudo_label, used = usrn.select(probs, 0.75)
    assert pseudo_label.tolist() == [[0, 1, 1]] and used.tolist() == [[False, True, False]]


def plain_entropy(probs):
    probs = np.asarray(probs, np.float64)
    return -(probs[probs > 0] * np.log(probs[probs > 0])).sum() / np.log(len(probs))


def plain_gate(p, q, rule):
    """By pixel: is F_sub surer, and the class that it sees, from [C] of F and [K] of F_sub."""
    seen = PARENTS[q.argmax()].item()
    if rule == "paper":
        q = [sum(q[k] for k in range(7) if PARENTS[k] == parent) for parent in range(4)]
        seen = int(np.argmax(q))
    return bool(plain_entropy(q) < plain_entropy(p)), seen


@pytest.mark.parametrize("rule", ["paper", "released"])
def test_entropy_and_class_of_the_gate(rule):
    probs, sub_probs = (
        (1.5 * torch.randn(3, count, 6, 7, generator=seeded(seed))).softmax(dim=1).double()
        for seed, count in ((2, 4), (3, 7)))
    gate, seen = usrn.entropy_gate(probs, sub_probs, PARENTS, rule)
    regularized, likeliest = usrn.regularize(probs, seen, gate), PARENTS[sub_probs.argmax(dim=1)]
    for b, row, column in np.ndindex(3, 6, 7):
        p, q = probs[b, :, row, column].numpy(), sub_probs[b, :, row, column].numpy()
        opened, expected = plain_gate(p, q, rule)
        assert (gate[b, row, column].item(), seen[b, row, column].item()) == (opened, expected)
        left = [value if parent == expected or not opened else 0 for parent, value in enumerate(p)]
        assert regularized[b, :, row, column].tolist() == left
    assert 20 < gate.sum() < 106 and (seen != likeliest).any() == (rule == "paper")


# ---------------------------------------------------------------- Eq. 2, 4, 5, 8: a step


class Playback(nn.Module):
    """A "network" of prepared logits, so that each use of each view has a gradient of its own."""

    def __init__(self):
        super().__init__()
        shapes = {"labeled": (4, 8), "weak": (4, 4), "strong": (4, 4)}
        shapes |= {"sub_" + name: (7, side) for name, (_, side) in shapes.items()}
        for number, (name, (classes, side)) in enumerate(shapes.items()):
            logits = 2.5 * torch.randn(2, classes, side, side, generator=seeded(20 + number))
            setattr(self, name, nn.Parameter(logits))
        self.calls = []

    def forward(self, images, labeled, subclassed=0):
        if images.device.type == "cpu":
            self.calls.append((images[:, 0, 0, 0].tolist(), labeled, subclassed))
        if not labeled:
            answers = (self.labeled[:0], self.strong, self.sub_labeled[:0], self.sub_strong)
        else:
            answers = (self.labeled, self.weak, self.sub_labeled, self.sub_weak)
        return answers if subclassed else (*answers[:2], None, None)


def draw_views(device="cpu"):
    subclass = draw_labels(30, 2, 8, 8, classes=7, ignored=0.2).byte()
    parents = PARENTS[subclass.long().clamp(max=6)]
    views = {name: torch.full((2, 3, 8, 8), float(number))
             for number, name in enumerate(("labeled", "weak", "strong"))}
    label = torch.where(subclass == IGNORE, subclass, parents.byte())
    views |= {"subclass": subclass, "label": label,
              "valid": torch.rand(2, 8, 8, generator=seeded(32)) < 0.8,
              "truth": draw_labels(33, 2, 8, 8, ignored=0.2).byte()}
    return {name: value.to(device) for name, value in views.items()}


def take_step(network, model, views, gate="paper", threshold=0.55, ohem=0.0):
    config = usrn.Config(model=model, gate=gate, threshold=threshold, lambda_sub=0.7, lambda_u=1.3,
                         ohem=ohem)
    return usrn.usrn_loss(network, views, PARENTS.to(views["label"].device), config)


@pytest.mark.parametrize("rule, ohem", [("paper", 0.0), ("released", 0.7)])
@pytest.mark.parametrize("model", ["self-training", *"I II III IV USRN".split()])
def test_a_step_of_each_row_of_table_3_equals_plain_loops(model, rule, ohem):
    """Losses and, by autograd of loops in float64, the gradient of every use of every view."""
    on, network, views = usrn.MODELS[model], Playback(), draw_views()
    loss, terms = take_step(network, model, views, rule, ohem=ohem)
    loss.backward()

    logits = {name: value.detach().double().requires_grad_()
              for name, value in network.named_parameters()}
    # Of the 4 x 4 cells of a crop of 8 x 8: their middle pixels, rounded up.
    valid, truth = (views[name][:, 1::2, 1::2] for name in ("valid", "truth"))
    probs, sub_probs = (logits[name].softmax(dim=1).detach().numpy()
                        for name in ("weak", "sub_weak"))
    label, sub_label, seen_class = torch.zeros(3, 2, 4, 4, dtype=torch.long)
    used, sub_used, opened, vetoed = torch.zeros(4, 2, 4, 4, dtype=torch.bool)
    for b, row, column in valid.nonzero().tolist():
        p, q, place = probs[b, :, row, column], sub_probs[b, :, row, column], (b, row, column)
        opened[place], seen_class[place] = plain_gate(p, q, rule)
        if "EGM" not in on:  # Eq. 4
            opened[place], seen_class[place] = True, PARENTS[q.argmax()]
        of_seen = np.where(np.arange(4) == seen_class[place].item(), p, 0)
        left = of_seen if "USR" in on and opened[place] else p
        label[place], used[place] = int(left.argmax()), bool(left.max() > 0.55)
        vetoed[place] = bool(p.max() > 0.55 and not used[place])
        sub_label[place], sub_used[place] = int(q.argmax()), bool(q.max() > 0.55)

    seen, count = views["label"] != IGNORE, valid.sum()
    hard = are_hard(logits["labeled"], views["label"], ohem) if ohem else seen
    total = sum_of_losses(logits["labeled"], views["label"], hard) / hard.sum()
    expected = {"loss_sup": total}
    if "MSL" in on:
        sub_sup = sum_of_losses(logits["sub_labeled"], views["subclass"], seen) / seen.sum()
        expected["loss_sup_sub"], total = sub_sup, total + 0.7 * sub_sup
    if "OST" in on:
        unsup = sum_of_losses(logits["strong"], label, used) / count
        expected |= {"loss_unsup": unsup, "used": used.sum() / count}
        known = used & (truth != IGNORE)
        expected["used_accuracy"] = (known & (label == truth)).sum() / known.sum()
        total = total + 1.3 * unsup
    if "USR" in on:
        expected |= {"gate": opened.sum() / count, "vetoed": vetoed.sum() / count}
        own = torch.from_numpy(probs.argmax(axis=1))
        for name, given, where in (("vetoed", own, vetoed), ("f", own, valid),
                                   ("f_sub", seen_class, valid)):
            known = where & (truth != IGNORE)
            expected[f"{name}_accuracy"] = (known & (given == truth)).sum() / known.sum()
        assert vetoed.any() and used.any()
    if "SST" in on:
        sub_unsup = sum_of_losses(logits["sub_strong"], sub_label, sub_used) / count
        expected |= {"loss_unsup_sub": sub_unsup, "used_sub": sub_used.sum() / count}
        total = total + 1.3 * 0.7 * sub_unsup
    for name, value in {**expected, "loss": total}.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-5), name
    total.backward()
    for name, value in network.named_parameters():  # none through pseudo labels
        ours, theirs = (torch.zeros_like(value) if grad is None else grad.float()
                        for grad in (value.grad, logits[name].grad))
        assert_near(ours, theirs, rel=1e-4)
    # Labeled and weak images share batch norm; F_sub sees no more images than it is asked about.
    of_subclasses = (4 if "USR" in on else 2) if "MSL" in on else 0
    first, strong = ([0, 0, 1, 1], 2, of_subclasses), ([2, 2], 0, 2 if "SST" in on else 0)
    assert network.calls == ([first, strong] if "OST" in on else [([0, 0], 2, of_subclasses)])


def step_of_rank(rank, ranks):
    """The loss of this rank's images, and the gradient of every use of their views."""
    network, views = Playback(), draw_views()
    for name, value in list(network.named_parameters()):
        setattr(network, name, nn.Parameter(value.detach().chunk(ranks)[rank]))
    views = {name: value.chunk(ranks)[rank] for name, value in views.items()}
    loss, _ = take_step(network, "USRN", views)
    loss.backward()
    return loss.detach(), [value.grad for value in network.parameters() if value.grad is not None]


def test_two_ranks_take_the_step_of_one_process(tmp_path):
    (first, gradients), (second, others) = on_ranks(lambda rank: step_of_rank(rank, 2), tmp_path)
    loss, expected = step_of_rank(0, 1)
    assert_near((first + second) / 2, loss)
    for *parts, whole in zip(gradients, others, expected, strict=True):
        assert_near(torch.cat(parts) / 2, whole)


def test_a_step_reads_nothing_back_from_the_device():
    for model in ("I", "II", "USRN"):
        loss, terms = take_step(Playback().to("meta"), model, draw_views("meta"))
        loss.backward()
        assert {(value.dim(), value.device.type) for value in terms.values()} == {(0, "meta")}


def test_nothing_labeled_and_nothing_valid_give_zero_not_nan():
    network, views = Playback(), draw_views()
    for name in ("label", "subclass"):
        views[name] = torch.full_like(views[name], IGNORE)
    views["valid"] = views["valid"] & False
    loss, terms = take_step(network, "USRN", views)
    loss.backward()
    assert loss == 0 and all(value.isfinite() != name.endswith("_accuracy")  # of no pixel
                             for name, value in terms.items())


def test_views_and_the_classes_of_subclasses(monkeypatch):
    monkeypatch.setattr(usrn, "strong_augment", lambda images, photometry: 1 - images)
    images = torch.randint(256, (2, 2, 3, 9, 9), generator=seeded(80), dtype=torch.uint8)
    label = draw_labels(81, 2, 9, 9, classes=7, ignored=0.2).byte()
    batch = {"labeled": images[0], "unlabeled": images[1], "label": label}
    views = usrn.make_views(batch, Photometry(blur=(0.1, 1.0)), PARENTS)
    assert torch.equal(views["subclass"], batch["label"]) and views["label"].dtype == torch.uint8
    pairs = set(zip(views["subclass"].flatten().tolist(), views["label"].flatten().tolist()))
    assert pairs == {*enumerate(PARENTS.tolist()), (IGNORE, IGNORE)}
    for name, image in (("labeled", images[0] / 255), ("weak", images[1] / 255),
                        ("strong", 1 - images[1] / 255)):
        assert torch.equal(views[name], normalize(image))
    middles = usrn.at_cells(torch.arange(81).view(1, 9, 9), (3, 2))
    assert middles.tolist() == [[[9 * y + x for x in (2, 6)] for y in (1, 4, 7)]]


# ---------------------------------------------------------------- F and F_sub

SHARED = {"none": (), "low": ("stem", "layer1"),
          "all": ("stem", "layer1", "layer2", "layer3", "layer4")}


def make_both(share="low", build=DeepLabV3Plus):
    torch.manual_seed(0)
    return usrn.USRN(build("tiny", 4, "none"), build("tiny", 7, "none"), share)


@pytest.mark.parametrize("share, build", [
    ("none", DeepLabV3Plus), ("low", DeepLabV3Plus), ("all", DeepLabV3Plus), ("low", PSPNet)])
def test_f_and_f_sub_are_plain_networks(share, build):
    both = make_both(share, build).eval()
    kept = {name.split(".")[2] for name, _ in both.named_parameters()
            if name.startswith("subclass_model.encoder.")}
    assert kept == set(SHARED["all"]) - set(SHARED[share])
    images = torch.randn(5, 3, 32, 48, generator=seeded(41))
    f, f_sub, own = both.model, build("tiny", 7, "none").eval(), both.subclass_model.state_dict()
    f_sub.load_state_dict({name: own.get(name, f.state_dict().get(name))  # what it shares is F's
                           for name in f_sub.state_dict()})
    with torch.inference_mode():
        for model, answers in ((f, both(images, 3, 5)[:2]), (f_sub, both(images, 3, 5)[2:]),
                               (f, both(images, 3)[:2])):
            logits, cells, expected = *answers, model(images)
            assert_near(logits, expected[:3])
            if build is DeepLabV3Plus:  # a classifier of means = means of the classifier
                z = model.classifier(model.features(images[3:]))
                blocks = z.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
                assert_near(cells, blocks.mean(dim=(3, 5)))
            else:
                assert_near(resize(cells, images.shape[2:]), expected[3:])
        assert both(images, 3)[2:] == (None, None)
        assert_near(both(images, 3, 3)[2], f_sub(images)[:3])


def test_an_encoder_of_numbered_layers_shares_those_before_the_low_features():
    with torch.device("meta"):
        models = [DeepLabV3Plus("mobilenet_v2", classes, "none") for classes in (4, 7)]
        both = usrn.USRN(*models, "low")
        logits, _, _, sub_cells = both(torch.zeros(4, 3, 64, 64), 2, 4)
    assert logits.shape == (2, 4, 64, 64) and sub_cells.shape == (2, 7, 8, 8)
    own = [name for name, _ in both.subclass_model.encoder.named_parameters()]
    assert own[0].startswith("features.4.")


def test_the_released_network_and_its_evaluation():
    config = {"architecture": "deeplabv3plus", "backbone": "resnet50", "network": "released"}
    torch.manual_seed(0)
    plain = usrn.build_network({**config, "network": "plain"}, 3, "none").eval()
    model = usrn.build_predictor(config, 3, plain.state_dict())
    assert [part.p for part in model.modules() if isinstance(part, nn.Dropout)] == [0.5, 0.5, 0.1]
    for block, rate in zip(plain.encoder.layer4, (2, 4, 8)):
        weight = block.conv2.weight
        block.conv2.forward = functools.partial(nn.functional.conv2d, weight=weight, padding=rate,
                                                dilation=rate)
    images = torch.randn(2, 3, 64, 48, generator=seeded(60))
    with torch.inference_mode():
        assert_near(model.eval()(images), plain(images))
        assert not torch.equal(model.train().features(images), model.features(images))


@pytest.mark.parametrize("share", SHARED)
def test_every_loss_trains_what_it_is_of_and_together_all(share):
    both, views = make_both(share), draw_views()
    views |= {name: torch.randn(2, 3, 32, 32, generator=seeded(50)) for name in
              ("labeled", "weak", "strong")}
    views |= {name: views[name].repeat(1, 4, 4) for name in ("label", "subclass", "valid", "truth")}
    _, terms = take_step(both, "USRN", views, threshold=0.0)
    names, parameters = zip(*both.named_parameters())

    def reached(term):
        slopes = torch.autograd.grad(terms[term], parameters, retain_graph=True, allow_unused=True)
        return {name for name, slope in zip(names, slopes) if slope is not None and slope.any()}

    f = {name for name in names if name.startswith("model.")}
    shared = {name for name in f if name.split(".")[2] in SHARED[share] and "encoder" in name}
    assert reached("loss_sup") == reached("loss_unsup") == f
    assert reached("loss_sup_sub") == reached("loss_unsup_sub") == set(names) - f | shared
    assert reached("loss") == set(names)  # data-parallel training would wait for the others


def test_subclasses_divide_the_label_maps(tmp_path, monkeypatch):
    """Own cell where it is of the pixel's class, or else the nearest subclass of that class."""
    rng, samples = np.random.default_rng(0), []
    for number, (height, width) in enumerate([(21, 34), (30, 17)]):
        label = np.repeat(rng.integers(0, 2, (height, 1 + width // 9)), 9, axis=1)[:, :width]
        label[3:11, 4:9] = 2
        label = np.where(rng.random(label.shape) < 0.1, IGNORE, label).astype(np.uint8)
        label[0, 0] = 3  # no cell's middle
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        picture(tmp_path / f"image{number}.png", image)
        picture(tmp_path / f"mask{number}.png", label)
        samples.append(Sample(f"image{number}.png", f"mask{number}.png"))
    data = Data(dataset_info("folder", "a,b,c,d,e"), tmp_path, samples, [], [], [], "test")
    torch.manual_seed(0)
    model, files = DeepLabV3Plus("tiny", 5), [tmp_path / "maps" / f"{n}.png" for n in range(2)]
    shown = recorded(monkeypatch, DeepLabV3Plus, "features")
    features, labels, grids = usrn.extract_features(model, data, torch.device("cpu"))
    assert shown[0][1].min() < -1  # normalised
    assert grids == [(6, 9), (8, 5)] and features.shape == (94, 32)  # 2 x 2 at stride 2
    made = usrn.make_subclasses(model, data, files, "cpu", usrn.Config(max_subclasses=25, seed=3))

    pixels, parent_of = torch.bincount(labels, minlength=256)[:5], torch.tensor(made["parent_of"])
    counts, own = usrn.subclass_counts(pixels, 25).tolist(), torch.full_like(labels, IGNORE)
    assert made["cells"] == pixels.tolist() and parent_of.bincount().tolist() == counts
    assert max(counts) > 3 and counts[3:] == [1, 1] and pixels[3] == 0
    for parent in range(3):
        members = labels == parent
        clusters = usrn.balanced_kmeans(features[members], counts[parent], 3)
        own[members] = sum(counts[:parent]) + clusters
    assert made["sizes"] == own.bincount(minlength=256)[: len(parent_of)].tolist()
    assert made["cbr_subclasses"] == pytest.approx(rate_as_printed(made["sizes"]), rel=1e-9)

    centroids = [features[own == k].double().mean(dim=0) for k in range(sum(counts[:3]))]
    distance = torch.cdist(features.double(), torch.stack(centroids))
    kept = moved = 0
    for number, ((h, w), start) in enumerate(zip(grids, (0, 54))):
        label, map_ = (np.array(Image.open(file)) for file in (tmp_path / f"mask{number}.png",
                                                               files[number]))
        assert map_.shape == label.shape and np.array_equal(map_ == IGNORE, label == IGNORE)
        for row, column in np.argwhere(label < IGNORE):
            cell = start + row * h // label.shape[0] * w + column * w // label.shape[1]
            found, parent = map_[row, column], label[row, column]
            assert parent_of[found] == parent
            if labels[cell] == parent:
                assert found == own[cell]
                kept += 1
            elif parent < 3:
                others = parent_of[: len(centroids)] != parent
                assert found == distance[cell].masked_fill(others, math.inf).argmin()
                moved += 1
    assert kept > 100 and moved > 50 and (tmp_path / "maps" / "subclasses.png").exists()


# ---------------------------------------------------------------- runs

SHORT = [*QUICK, *"--labeled 12 --supervised-iterations 2 --threshold 0.2".split()]


def test_three_stages_that_were_stopped_and_that_were_not(program, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    status, out, _ = program("--output", whole)
    assert status == 0 and out.count("class balance rate") == 1
    made = runtime.read_json(whole / "subclasses" / "subclasses.json")
    assert 8 < len(made["parent_of"]) <= 12  # embedded data: one a labeled image
    assert made["cbr_subclasses"] > made["cbr_classes"]
    lines = lines_of(whole)
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        losses = [value for name, value in line.items() if name.startswith("loss_")]
        assert len(losses) == 4 and line["loss"] == pytest.approx(sum(losses), rel=1e-5)
    assert all(line["loss"] == line["loss_sup"] for line in lines_of(whole / "supervised"))

    stop_at(1, parts / "supervised", program, "--output", parts)
    stop_at(2, parts, program, "--output", parts)
    kept = [parts / name for name in ("supervised/latest.pt", "subclasses/subclasses.json")]
    before = [path.stat().st_mtime_ns for path in kept]
    assert program("--output", parts)[0] == 0
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert_same_run(parts, whole)

    assert_scored_as_in_training(whole)
    assert "subclass_model" not in state(whole, "best.pt")  # F alone is what it gives back
    name, saved = "encoder.layer4.conv1.0.weight", state(whole)  # both begin as the shipped encoder
    assert_near(saved["subclass_model"][name], saved["model"][name], rel=0.5)


def test_clusters_end_balanced_beside_a_cell_far_away():
    generator = seeded(57)
    torch.randint(2, 12, (), generator=generator)
    features = torch.rand(150, 4, generator=generator)
    features *= 10 ** float(-torch.rand((), generator=generator))
    features[0] = 3e3
    assert is_balanced(usrn.balanced_kmeans(features.half(), 7, 0), 7)


def test_no_stage_in_the_folder_of_another_method(program, tmp_path):
    runtime.write_json(tmp_path / "config.json", {"method": "daw"})
    assert "another method" in program("--iterations", 2, "--output", tmp_path)[2]
    assert not (tmp_path / "supervised").exists()


def test_finished_stages_are_used_again_and_made_again(program, tmp_path):
    first, second, plain = (tmp_path / name for name in ("first", "second", "plain"))
    common = ("--iterations", 2, "--share", "none", "--output")
    assert program("--model", "I", *common, first)[0] == 0
    for stage in ("supervised", "subclasses"):
        shutil.copytree(first / stage, second / stage)
    options = ("--model", "II", *common, second)
    status, out, _ = program(*options)
    assert status == 0 and "class balance" not in out
    assert program("--model", "self-training", *common, plain)[0] == 0
    assert_identical(state(second)["model"], state(plain)["model"])

    (second / "latest.pt").unlink()
    record = second / "subclasses" / "subclasses.json"
    ours, refused = record.read_text(), f"error: {second}/subclasses is of other images"
    assert program(*options, "--clustering", "plain")[2].startswith(refused)
    record.write_text(ours.replace(json.loads(ours)["lists"], "another"))
    assert program(*options)[2].startswith(refused)
    shutil.rmtree(second / "subclasses")  # stage 1 is the same for all that comes later
    before = (second / "supervised" / "latest.pt").stat().st_mtime_ns
    status, out, _ = program(*options, "--clustering", "plain", "--gate", "released")
    assert status == 0 and "class balance" in out
    assert (second / "supervised" / "latest.pt").stat().st_mtime_ns == before


def test_real_data_have_the_paper_s_number_of_subclasses(program, voc_root, tmp_path):
    """Embedded data have one a labeled image, or a class, at most: here that would be 21."""
    full = voc_root / "ImageSets" / "Segmentation" / "train.txt"
    four = "".join(full.read_text().splitlines(True)[:4])
    full.with_name("labeled_12.txt").write_text(four)
    assert program("--dataset", "pascal", "--data-root", voc_root, "--unlabeled-list", full,
                   "--backbone", "tiny", "--model", "I", "--iterations", 1,
                   "--output", tmp_path / "run")[0] == 0
    made = runtime.read_json(tmp_path / "run" / "subclasses" / "subclasses.json")
    smallest = min(filter(None, made["cells"]))
    paper = [max(1, round(cells / smallest)) for cells in made["cells"]]
    assert torch.tensor(made["parent_of"]).bincount().tolist() == paper and sum(paper) > 21


@pytest.mark.parametrize("options", [
    ["--model", "baseline", "--labeled", "all"],
    ["--clustering", "plain", "--share", "all", "--gate", "released", "--network", "released"],
    ["--architecture", "pspnet", "--ohem", "0.7", "--checkpoint-activations"]])
def test_variants_train(options, program, tmp_path, monkeypatch):
    seeds = recorded(monkeypatch, torch, "manual_seed")
    assert program("--iterations", 2, "--seed", 3, "--output", tmp_path, *options)[0] == 0
    assert set(seeds) == {(3,)}
    saved = state(tmp_path)
    learned = [name for part in ("model", "subclass_model") for name in saved.get(part, ())
               if name.endswith((".weight", ".bias"))]
    assert len(saved["optimizer"]["state"]) == len(learned)
    lines = lines_of(tmp_path)
    assert len(lines) == 2 and all(0 < line["loss"] < 20 for line in lines)
    assert (tmp_path / "subclasses").exists() is ("baseline" not in options)
    if "baseline" not in options:
        made = runtime.read_json(tmp_path / "subclasses" / "subclasses.json")
        parent_of, sizes = (torch.tensor(made[name]) for name in ("parent_of", "sizes"))
        of_classes = [sizes[parent_of == parent] for parent in parent_of.unique()]
        uneven = max(clusters.max() - clusters.min() for clusters in of_classes) > 1
        assert uneven == ("plain" in options)


def test_stage_1_saves_as_often_as_stage_3(tmp_path, monkeypatch):
    def train(config, data, device):
        assert (config.eval_every, config.save_every) == (50, 3)
        raise InterruptedError

    monkeypatch.setattr(usrn, "train", train)
    config = usrn.Config(output=str(tmp_path), eval_every=3, supervised_iterations=50)
    with pytest.raises(InterruptedError):
        usrn.stages_1_and_2(config, SimpleNamespace(labeled=[]), torch.device("cpu"))


@pytest.mark.parametrize("options, named", [
    (["--architecture", "pspnet", "--network", "released"], "--network"),
    (["--max-subclasses", "7"], "--max-subclasses must be >= 8"),
    (["--max-subclasses", "256"], "--max-subclasses must be <= 255"),
    (["--labeled", "all"], "unlabeled")])
def test_bad_options_are_refused_in_one_line_before_anything_is_written(options, named, program,
                                                                         tmp_path):
    assert named in refuse(*program.args, "--output", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_two_ranks_cluster_once_and_train_together(shapes, tmp_path, capfd):
    options = [*SHORT, "--batch-size", "4", "--data-root", str(shapes)]
    config = runtime.parse(usrn.Config, argv=[*options, "--output", str(tmp_path / "run")])
    on_ranks(lambda rank: usrn.run_stages(config), tmp_path)
    assert capfd.readouterr().out.count("class balance rate") == 1
    saved = state(tmp_path / "run")
    assert saved["iteration"] == 4 and "subclass_model" in saved
    assert ranks_draw_apart(tmp_path / "run")
    assert len(lines_of(tmp_path / "run")) == 4
