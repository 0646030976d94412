"""pos_meo.py against a search along the segment of gradients, plain steps, daw.py; its runs."""

import ast
import copy
import inspect
import shutil
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from programs import (QUICK, assert_identical, assert_near, assert_same_run, error_of, lines_of,
                      on_ranks, ranks_draw_apart, recorded, refuse, seeded, state, stop_at)
from torch import nn

import daw
import pos_meo
from common import runtime
from common.augment import Photometry
from common.data import DATASETS, Data, Sample, load_data, training_loader
from common.models import DeepLabV3Plus
from pos_meo import SUP, UNSUP

BACKBONES = {"unimatch_v1": "tiny", "unimatch_v2": "tiny_vit"}


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


# ---------------------------------------------------------------- Eq. 5, 6: the weights


def shortest(g_sup, g_unsup):
    """alpha_u of the shortest vector of the segment: ever finer grids, in the plane of the two."""
    a, b = torch.linalg.qr(torch.stack([g_sup, g_unsup], dim=1).double()).R.T
    low, high = 0.0, 1.0
    for _ in range(10):
        alphas = torch.linspace(low, high, 21, dtype=torch.float64)[:, None]
        lengths = torch.linalg.vector_norm((1 - alphas) * a + alphas * b, dim=1)
        best, width = alphas[lengths.argmin()].item(), (high - low) / 20
        low, high = max(0.0, best - width), min(1.0, best + width)
    return best


def pairs():
    """float32; at all angles, the second one up to fifty times as long or as short."""
    vectors = torch.randn(50, 2, generator=seeded(0), dtype=torch.float64)
    first, second = torch.linalg.qr(vectors).Q.T
    for cosine in torch.linspace(-0.999, 0.999, 11).tolist():
        other = cosine * first + (1 - cosine**2) ** 0.5 * second
        for ratio in (0.02, 0.3, 0.8, 1.0, 1.5, 50.0):
            yield first.float(), (ratio * other).float()


def test_weights_give_the_shortest_vector_of_the_segment():
    seen = {"inside": 0, "g_sup": 0, "g_unsup": 0}
    for pair in pairs():
        expected = shortest(*pair)
        alpha_sup, alpha_unsup = pos_meo.pareto_weights(*pair)
        of_eq_6 = pos_meo.minimum_norm_weight(*pos_meo.inner_products(*pair))
        assert [alpha_unsup.item(), of_eq_6.item()] == pytest.approx(2 * [expected], abs=1e-6)
        assert alpha_sup + alpha_unsup == 1 and alpha_unsup.dtype == torch.float64
        seen[{0: "g_sup", 1: "g_unsup"}.get(expected, "inside")] += 1
    assert min(seen.values()) > 5, seen


@pytest.mark.parametrize("size", [1, 7, 12345])
def test_weights_of_parallel_opposite_and_zero_gradients(size):
    g, zero = torch.randn(size, generator=seeded(size)), torch.zeros(size)
    expected = [(g, 2 * g, 0), (g, 0.5 * g, 1), (g, g, 0.5), (g, -g, 0.5), (g, -3 * g, 0.25),
                (1e-20 * g, -3e-20 * g, 0.25), (g, zero, 0.5), (zero, g, 0.5), (zero, zero, 0.5)]
    for g_sup, g_unsup, alpha in expected:  # a gradient of zero does not stop the other loss
        found = pos_meo.pareto_weights(g_sup, g_unsup)[UNSUP]
        assert found.item() == pytest.approx(alpha, abs=1e-6)


@pytest.mark.parametrize("cap", [0.5, 0.8])
def test_cap_lowers_alpha_as_long_as_the_unsupervised_loss_is_not_harmed(cap):
    seen = {"Eq. 6": 0, "cap": 0, "harm": 0}
    for g_sup, g_unsup in pairs():
        expected, case = shortest(g_sup, g_unsup), "Eq. 6"
        if expected > cap:
            alphas = torch.linspace(cap, expected, 2001, dtype=torch.float64)[:, None]
            steps = (1 - alphas) * g_sup.double() + alphas * g_unsup.double()
            lowest = (steps @ g_unsup.double() >= -1e-9 * g_unsup.norm() ** 2).nonzero()[0]
            expected, case = alphas[lowest].item(), "harm" if lowest else "cap"
        products = pos_meo.inner_products(g_sup, g_unsup)
        weights = pos_meo.integration_weights(products, "pos", cap=cap)
        assert weights[UNSUP].item() == pytest.approx(expected, abs=1e-3)
        seen[case] += 1
    assert min(seen.values()) > 4, seen


def test_a_vanishing_gradient_gives_the_uniform_step_and_a_small_one_does_not():
    g, other = torch.randn(2, 300, generator=seeded(5))
    for ratio in (0, 1e-30, 1e-12, 1e-7):
        for pair in ((g, ratio * other), (ratio * other, g)):
            for magnified in (False, True):
                step = pos_meo.integrate_gradients(*pair, magnified)
                assert_near(step, (pair[0] + pair[1]) / 2)
    small = 1e-5 * other
    assert cosine(pos_meo.integrate_gradients(g, small), small) > 0.999  # MEO's long step, Eq. 13
    assert_near(pos_meo.integrate_gradients(g, small).norm(), g.norm() / 2, 1e-4)
    for ratio in (1.0, 1.7, 0.013, 1e-5):  # a stationary point: no step
        assert not pos_meo.integrate_gradients(g, -ratio * g).any()
    assert not pos_meo.integrate_gradients(0 * g, 0 * g).any()


def test_a_step_of_half_precision_does_no_harm_where_gradients_are_nearly_opposite():
    a, b = torch.randn(2, 20_000, generator=seeded(9))
    for dtype in (torch.bfloat16, torch.float16):
        for share in (0.55, 0.7, 0.85, 0.97):
            pair = a.to(dtype), (0.02 * b - share * a).to(dtype)
            step = pos_meo.integrate_gradients(*pair)
            assert step.dtype == dtype and min(cosine(step, g) for g in pair) > -1e-3


def test_inner_products_are_those_of_float64_whatever_the_chunk(monkeypatch):
    a, b = torch.randn(2, 640, generator=seeded(2))
    x, y = a.double().numpy(), b.double().numpy()
    for chunk in (1, 7, 640, 2**20):
        monkeypatch.setattr(pos_meo, "CHUNK", chunk)
        assert pos_meo.inner_products(a, b).tolist() == pytest.approx([x @ x, x @ y, y @ y], 1e-13)


# ---------------------------------------------------------------- Eq. 5, 13: the step


def cosine(a, b):
    return F.cosine_similarity(a.double(), b.double(), dim=0, eps=1e-40).item()


def step_of(strategy, g_sup, g_unsup, alpha_unsup=0.25):
    g_sup, g_unsup = g_sup.double(), g_unsup.double()
    uniform = (g_sup + g_unsup) / 2
    alpha = {"uniform": 0.5, "fixed": alpha_unsup}.get(strategy, shortest(g_sup, g_unsup))
    step = (1 - alpha) * g_sup + alpha * g_unsup
    return step * uniform.norm() / step.norm() if strategy == "pos_meo" else step


@pytest.mark.parametrize("strategy", pos_meo.STRATEGIES)
def test_statistics_equal_those_of_the_vectors(strategy):
    harmful = 0
    for pair in pairs():
        products = pos_meo.inner_products(*pair)
        weights = pos_meo.integration_weights(products, strategy, 0.25)
        norms, alpha = [g.double().norm() for g in pair], shortest(*pair)
        step, uniform = step_of(strategy, *pair), step_of("uniform", *pair)
        assert_near(weights[SUP] * pair[SUP] + weights[UNSUP] * pair[UNSUP], step, 1e-4)
        if "pos" in strategy:  # harms no loss; MEO's is as long as the uniform one
            own = pos_meo.integrate_gradients(*pair, strategy == "pos_meo")
            assert own.dtype == torch.float32 and min(cosine(own, g) for g in pair) > -1e-4
            assert_near(own, step, 1e-4)
            if strategy == "pos_meo":
                assert own.norm().item() == pytest.approx(uniform.norm().item(), rel=1e-5)
        worst, worst_uniform = (min(cosine(h, g) for g in pair) for h in (step, uniform))
        expected = {"cosine": cosine(*pair), "norm_sup": norms[SUP], "norm_unsup": norms[UNSUP],
                    "alpha_unsup": alpha, "lambda": uniform.norm() / step_of("pos", *pair).norm(),
                    "min_cosine_uniform": worst_uniform, "min_cosine": worst}
        statistics = pos_meo.gradient_statistics(products, weights)
        for name, value in expected.items():
            assert statistics[name].item() == pytest.approx(float(value), rel=1e-4, abs=1e-4), name
        assert statistics["conflict"] == (cosine(*pair) < 0)
        assert statistics["harmful_uniform"] == (worst_uniform < -1e-6)
        assert statistics["harmful"] == (worst < -1e-6 and "pos" not in strategy)
        if abs(alpha - 0.5) > 1e-3:  # or both remarks hang on rounding
            is_shorter = norms[UNSUP] < norms[SUP]
            assert statistics["remark_1"] == (statistics["alpha_unsup"] > 0.5) == is_shorter
        harmful += worst_uniform < -0.01
    assert harmful > 10  # of uniform steps


@pytest.mark.parametrize("strategy", pos_meo.STRATEGIES)
def test_statistics_of_zero_and_opposite_gradients_are_finite(strategy):
    g, zero = torch.randn(9, generator=seeded(6)), torch.zeros(9)
    for pair in ((g, zero), (zero, g), (zero, zero), (g, g), (g, -g)):
        products = pos_meo.inner_products(*pair)
        weights = pos_meo.integration_weights(products, strategy, 0.7)
        statistics = pos_meo.gradient_statistics(products, weights)
        assert all(value.isfinite() for value in (*weights, *statistics.values()))
        assert statistics["alpha_unsup"] == pytest.approx(0.5)
        if not products[0] * products[2]:
            assert statistics["cosine"] == statistics["min_cosine"] == 0


# ---------------------------------------------------------------- Eq. 1-3: the baselines


def test_unimatchs_step_is_written_as_in_daw():
    for name in ("make_views", "supervised_loss", "weighted_loss", "strong_loss"):
        trees = [ast.parse(inspect.getsource(getattr(module, name))) for module in (daw, pos_meo)]
        for tree in trees:
            del tree.body[0].body[0]  # the docstring, with its paper's equation
        assert ast.dump(trees[0]) == ast.dump(trees[1])


def draw_views(size=2, side=32, device="cpu"):
    images = torch.randint(256, (2, size, 3, side, side), generator=seeded(size)).byte().to(device)
    batch = {"labeled": images[0], "unlabeled": images[1], "label": images[0, :, 0] % 4,
             "valid": images[1, :, 0] < 200}
    return pos_meo.make_views(batch, side, Photometry(blur=(0.1, 1.0)))


def test_unimatch_v1_is_daws_with_a_fixed_threshold():
    torch.manual_seed(0)
    network, views = DeepLabV3Plus("tiny", 4, "none"), draw_views()
    torch.manual_seed(1)
    loss_sup, loss_unsup, _, used = pos_meo.unimatch_v1_losses(network, views, 0.3, 0.0)
    torch.manual_seed(1)
    loss, terms = daw.daw_loss(network, views, daw.Statistics(4, 0.9), "fixed", 0.3, False, 0.0)
    share = used.sum() / views["valid"].sum()
    ours = [value.item() for value in (share, loss_sup, loss_unsup)]
    theirs = [terms[name].item() for name in ("used", "loss_sup", "loss_unsup")]
    assert ours == pytest.approx(theirs, rel=1e-5) and 0.1 < share < 0.99
    totals, parameters = ((loss_sup + loss_unsup) / 2, loss), list(network.parameters())
    assert_near(*(flat(torch.autograd.grad(total, parameters)) for total in totals))


class Answers(nn.Module):
    """Student or teacher: random logits, and a memory of what was shown."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.dim, self.seen, self.given = 96, [], []

    def forward(self, images, channel_mask=None):
        self.seen += [images, channel_mask]
        self.given.append(2 * torch.randn(len(images), 4, *images.shape[2:]))
        return self.given[-1]


def test_unimatch_v2_drops_complementary_channels_and_learns_the_teachers_labels():
    student, teacher, views = Answers(), Answers(), draw_views(size=300, side=12)
    loss_sup, loss_unsup, pseudo_label, used = pos_meo.unimatch_v2_losses(
        student, teacher, views, 0.6, 0.0)
    assert teacher.seen[0] is views["weak"] and teacher.seen[1] is student.seen[1] is None
    labeled, _, strong, masks = student.seen
    assert labeled is views["labeled"]
    assert torch.equal(strong, torch.cat([views["strong_1"], views["strong_2"]]))
    first, second = masks.chunk(2)
    assert torch.equal(first + second, torch.full((300, 96), 2.0))
    whole = (first == 1).all(dim=1)
    assert 110 < whole.sum() < 190 and set(first[~whole].unique().tolist()) == {0, 2}
    assert first[~whole].mean().item() == pytest.approx(1, abs=0.05)
    confidence = teacher.given[0].double().softmax(dim=1).amax(dim=1)
    assert torch.equal(pseudo_label, teacher.given[0].argmax(dim=1))
    assert torch.equal(used.bool(), (confidence >= 0.6) & views["valid"])
    assert loss_sup == pos_meo.supervised_loss(student.given[0], views["label"])
    assert loss_unsup == pos_meo.strong_loss(student.given[1], pseudo_label, used, views)


def test_gradients_of_a_parameter_with_gaps_in_memory():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    network[0].weight = nn.Parameter(network[0].weight[:, :1].detach())  # for grey pictures
    loss, parameters = network(torch.randn(2, 1, 9, 9)).square().mean(), [*network.parameters()]
    pos_meo.Gradients(network, rows=2).backward(loss, UNSUP, retain_graph=True)
    found = flat(value.grad for value in parameters)
    assert_near(found, flat(torch.autograd.grad(loss, parameters)))


@pytest.mark.parametrize("baseline", pos_meo.BASELINES)
def test_a_step_reads_nothing_back_from_the_device(baseline):
    model = pos_meo.BASELINES[baseline](BACKBONES[baseline], 4, "none").to("meta")
    views, teacher = draw_views(device="meta"), [model] if baseline == "unimatch_v2" else []
    losses = getattr(pos_meo, baseline + "_losses")(model, *teacher, views, 0.9, 0.7)
    gradients = pos_meo.Gradients(model, rows=2)
    for row in (SUP, UNSUP):
        gradients.backward(losses[row], row, retain_graph=True)
    products = pos_meo.inner_products(*gradients.flat)
    weights = pos_meo.integration_weights(products, "pos_meo", cap=0.8)
    gradients.integrate(weights)
    statistics = pos_meo.gradient_statistics(products, weights)
    assert {value.device.type for value in statistics.values()} == {"meta"}


# ---------------------------------------------------------------- training

SHORT = [*QUICK, *"--warmup 0 --threshold 0.15".split()]
SECOND = ["--baseline", "unimatch_v2"]


def configured(*arguments) -> pos_meo.Config:
    return runtime.parse(pos_meo.Config, argv=[str(value) for value in (*QUICK, *arguments)])


@pytest.fixture
def float64(monkeypatch):
    """Sums in another order then give nearly the same weights, and nothing is evaluated."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(pos_meo, "evaluate", lambda *arguments: {"miou": 0.0})
    monkeypatch.setattr(pos_meo, "write_samples", lambda *arguments: None)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def plain_training(config, strategy, warmup):
    """Weights before, after and their average over two steps of two calls of autograd.grad each."""
    is_v2, data = config.baseline == "unimatch_v2", load_data(config)
    torch.manual_seed(config.seed)
    model = pos_meo.BASELINES[config.baseline](BACKBONES[config.baseline], 8)
    teacher = [copy.deepcopy(model).eval()] if is_v2 else []
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(model.parameter_groups(0, 0), momentum=0.9, weight_decay=1e-4)
    if is_v2:
        optimizer = torch.optim.AdamW(model.parameter_groups(0, 0), weight_decay=0.01)
    before, after = flat(parameters), []
    torch.manual_seed(config.seed)
    cpu = torch.device("cpu")
    batches = training_loader(data, config.crop, 2, config.seed, 0, 2, cpu, num_workers=0)
    for step, batch in enumerate(batches):
        views = pos_meo.make_views(batch, config.crop, data.info.photometry)
        losses = getattr(pos_meo, config.baseline + "_losses")(model, *teacher, views,
                                                               config.threshold, config.ohem or 0.0)
        g_sup, g_unsup = (flat(torch.autograd.grad(
            loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True))
            for loss in losses[:2])
        gradient = step_of(strategy if step >= warmup else "uniform", g_sup, g_unsup)
        for value, part in zip(parameters, gradient.split([value.numel() for value in parameters])):
            value.grad = part.view_as(value)
        for group, multiplier in zip(optimizer.param_groups, (1, config.head_lr_multiplier)):
            group["lr"] = config.lr * multiplier * (1 - step / 2) ** 0.9
        optimizer.step()
        after.append(flat(parameters))
        if is_v2:  # min(1 - 1 / 1, 0.996) of the old average, after the first step
            teacher = [copy.deepcopy(model).eval()]
    return before, after[1], (after[0] + after[1]) / 2  # min(1 - 1 / 2, 0.996) of the old average


@pytest.mark.parametrize("baseline, strategy, warmup, options", [
    ("unimatch_v1", "uniform", 0, ["--no-measure", "--seed", 3]),
    ("unimatch_v1", "fixed", 0, ["--alpha-unsup", 0.25, "--log-every", 4, "--ohem", 0.1]),
    ("unimatch_v1", "pos_meo", 1, ["--warmup", 1]),
    ("unimatch_v1", "pos_meo", 0, ["--warmup", 0]), ("unimatch_v2", "pos", 0, ["--warmup", 0]),
    ("unimatch_v2", "fixed", 0, ["--alpha-unsup", 0.25, "--log-every", 2])])
def test_training_takes_plain_steps(baseline, strategy, warmup, options, shapes, tmp_path, float64,
                                    monkeypatch):
    config = configured("--data-root", shapes, "--output", tmp_path, "--baseline", baseline,
                        "--strategy", strategy, "--iterations", 2, "--lr", 1e-4,
                        "--head-lr-multiplier", 5, "--threshold",
                        0.2 if baseline == "unimatch_v1" else 0.15, *options)
    weighted = recorded(monkeypatch, pos_meo, "integration_weights")
    pos_meo.train(config)
    assert all(rest == [config.alpha_unsup, config.cap] for _, _, *rest in weighted)
    before, *expected = plain_training(config, strategy, warmup)
    model, saved = pos_meo.BASELINES[baseline](BACKBONES[baseline], 8), state(tmp_path)
    for weights, value in zip((saved["model"], saved.get("ema")), expected):
        if weights:
            model.load_state_dict(weights)
            after = flat(value for value in model.parameters() if value.requires_grad)
            assert_near(after - before, value - before, rel=1e-5)
    assert_identical(state(tmp_path, "best.pt")["model"], saved.get("ema", saved["model"]))
    lines = lines_of(tmp_path)
    assert all(0.02 < line["used"] < 0.98 for line in lines)
    assert all(("alpha_unsup" in line) is ("--no-measure" not in options) for line in lines)
    if "pos" in strategy:
        assert all(abs(line["alpha_unsup"] - 0.5) > 0.02 for line in lines)


@pytest.mark.parametrize("dataset, baseline, expected", [
    ("pascal", "unimatch_v1", {"crop": 321, "iterations": 10_000, "warmup": 500, "cap": 1}),
    ("cityscapes", "unimatch_v1", {"crop": 801, "threshold": 0, "warmup": 1500, "ohem": 0.7,
                                    "lr": 0.005, "head_lr_multiplier": 1}),
    ("cityscapes", "unimatch_v2", {"crop": 798, "threshold": 0.95, "warmup": 1125, "ohem": 0.7,
                                    "lr": 5e-6, "ema_decay": 0.996}),
    ("shapes", "unimatch_v1", {"crop": 48, "iterations": 3500, "warmup": 1750, "cap": 1})])
def test_recipes(dataset, baseline, expected, monkeypatch):
    start = mock.Mock(side_effect=InterruptedError)
    data = Data(DATASETS[dataset], None, [], 1000 * [Sample("x.jpg", None)], [], [], "tag")
    monkeypatch.setattr(pos_meo, "load_data", lambda config: data)
    monkeypatch.setattr(pos_meo, "Checkpoint", start)
    options = f"--backbone {BACKBONES[baseline]} --weights none --device cpu --baseline {baseline}"
    for more in ("", " --iterations 100"):  # a shorter run begins as the whole one
        with pytest.raises(InterruptedError):
            pos_meo.train(runtime.parse(pos_meo.Config, argv=(options + more).split()))
        config = start.call_args.args[2]
        expected |= {"iterations": 100} if more else {}
        assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize("classes, factor, every, watched, stops", [
    (1, 1.5, 1, 1, True), (2, 1.5, 1, 1, False), (1, 1.4, 1, 1, False), (1, 1.5, 1, 2, False),
    (1, 4, 3, 3, False)])  # there the fourth step has a line of its own, as it is the last
def test_a_collapsed_run_is_stopped(classes, factor, every, watched, stops, shapes, tmp_path,
                                    float64, monkeypatch):
    """The loss on labels grows to 3.4 or 2.7 times what it was in the first of four steps."""
    growth = [factor**step for step in range(4)]

    def losses(network, views, threshold, ohem):
        loss = growth.pop(0) + 0 * network(views["weak"]).sum()
        pseudo_label = torch.arange(views["valid"].numel()).view_as(views["valid"]) % classes
        return loss, loss, pseudo_label, views["valid"].float()

    monkeypatch.setattr(pos_meo, "unimatch_v1_losses", losses)
    monkeypatch.setattr(pos_meo, "MIN_ONE_CLASS_STEPS", watched)
    expected = pytest.raises(runtime.UserError, match="--warmup") if stops else nullcontext()
    for _ in range(1 + stops):  # the same command goes on from the second step, and stops again
        with expected:
            pos_meo.train(configured("--data-root", shapes, "--output", tmp_path,
                                     "--log-every", every))
        growth += [factor**2, factor**3]
    logged = [line["one_class"] for line in lines_of(tmp_path)]
    assert logged == (4 if every == 1 else 2) * [classes == 1]


@pytest.mark.parametrize("options", [[], ["--strategy", "uniform", "--no-measure"]])
def test_two_ranks_learn_what_one_process_learns(options, shapes, tmp_path, float64, monkeypatch):
    """Nothing is drawn but the order of images, and the transformer has no batch norm."""
    monkeypatch.setattr(pos_meo, "strong_augment", lambda images, photometry: 1 - images)
    monkeypatch.setattr(pos_meo, "cutmix_boxes", lambda batch, size, device: (
        (torch.arange(size) < size // 2)[:, None].expand(batch, size, size)))
    monkeypatch.setattr(torch, "rand", torch.zeros)  # all channels are kept
    options = [*SECOND, *options, "--data-root", shapes, "--batch-size", 4, "--iterations", 3,
               "--crop", 48, "--warmup", 0, "--output"]
    configs = [configured("--threshold", 0.15, *options, tmp_path / n) for n in ("one", "two")]
    pos_meo.train(configs[0])
    on_ranks(lambda rank: pos_meo.train(configs[1]), tmp_path)
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    assert ranks_draw_apart(tmp_path / "two")
    for name, value in one["model"].items():
        assert_near(two["model"][name], value, rel=1e-9)
    for alone, shared in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "two"), strict=True):
        for name in ("used_accuracy", "one_class"):  # means of what the ranks have
            del alone[name], shared[name]
        assert shared == pytest.approx(alone, rel=1e-5, abs=2e-6)  # six digits are written


def test_a_run_and_one_that_was_stopped_and_their_landscape(program, shapes, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert program(*SECOND, "--output", whole)[0] == 0
    stop_at(2, parts, program, *SECOND, "--output", parts)
    assert program(*SECOND, "--output", parts)[0] == 0
    assert_same_run(parts, whole)
    assert [line["iteration"] for line in lines_of(whole)] == [1, 2, 3, 4]
    out = program(*SECOND, "--output", tmp_path / "uniform", "--warmup", 4)[1]
    assert "--warmup is 4: all 4 steps are uniform" in out

    # Around a checkpoint's weights, which are those of the teacher, as in training's evaluation.
    monkeypatch.setattr(pos_meo, "DISTANCES", [-0.5, 0.0, 0.5])
    monkeypatch.setattr(pos_meo, "LANDSCAPE_BATCHES", 1)
    monkeypatch.setattr(pos_meo, "DIRECTIONS", 2)
    path = str(whole / "latest.pt")
    learned = recorded(monkeypatch, pos_meo, "strong_loss")
    paths = f"{path},{path},none.pt"  # those that are there are kept
    error_of(pos_meo.landscape, configured("--landscape", paths, "--output", tmp_path))
    assert len(learned) == 2 * 6 and learned[0][2].any()
    rows = runtime.read_json(tmp_path / "landscape.json")[path]
    assert [row["distance"] for row in rows] == 2 * [-0.5, 0, 0.5]
    miou = runtime.read_json(whole / "results.json")["last"]["miou"]
    assert rows[1]["miou"] == rows[4]["miou"] == miou != rows[0]["miou"]
    assert rows[1]["loss"] == rows[4]["loss"] and len({row["loss"] for row in rows}) == 5


@pytest.mark.skipif(not shutil.which("g++"), reason="compiles, which needs a C++ compiler")
def test_code_that_another_method_has_compiled_is_not_taken(shapes, tmp_path, monkeypatch):
    """PyTorch keeps it on disk, whether or not it frees what a second backward pass reads."""
    class Network(nn.Module):
        def __init__(self, *arguments):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(),
                                        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
                                        nn.Conv2d(8, 8, 1))

        def parameter_groups(self, *rates):
            return [{"params": list(self.parameters()), "lr": 0.1}]

        def forward(self, images, perturb=0):
            logits = self.layers(images)
            return (logits, 2 * logits[-perturb:]) if perturb else logits

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(daw, "DeepLabV3Plus", Network)
    monkeypatch.setitem(pos_meo.BASELINES, "unimatch_v1", Network)
    options = [*QUICK, "--data-root", shapes, "--iterations", "1", "--eval-every", "1"]
    for name, script, *more in (("eager", pos_meo), ("other", daw, "--compile"),
                                ("compiled", pos_meo, "--compile")):
        monkeypatch.setattr(pos_meo.functorch, "donated_buffer", True)  # as in a new process
        argv = [*options, *more, "--output", tmp_path / name]
        argv += ["--warmup", "0", "--threshold", "0"] if script is pos_meo else []
        script.train(runtime.parse(script.Config, argv=[*map(str, argv)]))
        torch._dynamo.reset()
    eager, compiled = (lines_of(tmp_path / name)[0] for name in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=1e-3)


@pytest.mark.parametrize("options, named", [
    (["--strategy", "fixed"], "--alpha-unsup"), (["--alpha-unsup", "0.3"], "--strategy fixed"),
    (["--strategy", "fixed", "--alpha-unsup", "1.5"], "--alpha-unsup must be <= 1"),
    (["--cap", "0.3"], "--cap must be >= 0.5"), ([*SECOND, "--ema-decay", "0"], "--ema-decay"),
    ([*SECOND, "--backbone", "tiny"], "tiny"), (["--landscape", "missing.pt"], "missing.pt")])
def test_bad_options_are_refused_in_one_line(options, named, program, tmp_path):
    assert named in refuse(*program.args, "--output", tmp_path, *options)
