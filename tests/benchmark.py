"""Speed and memory, measured side by side: `python tests/benchmark.py [WHAT ...] [options]`.

    loader         unlabeled samples of one core; --released FOLDER: a checkout of UniMatch beside
    step           training steps of all methods for images; DAW's augmentation and statistics
    gpu            UniMatch's step in bf16, fp32 and compiled: operations a second, host syncs
    growth         a training step of UniMatch with twice the crop, batch, four times the classes
    ranks          collectives, and numbers in them, of a step on two gloo ranks
    strategies     training steps of pos_meo.py: one gradient of the sum (uniform), and two;
                   their operations
    harm           steps of pos_meo.py against the mean gradient of all labeled images, or of many
                   unlabeled ones: --checkpoint of a run with UniMatch V1
    alignment      confidences and classes on unlabeled images without and with daw.py's alignment
                   (Figure 5), beside those on labeled ones: --checkpoint of a run
    sampling       diffmatch.py at inference: its parts, 1 to 5 denoising steps, and DeepLabv3+
    feedback       mIoU of diffmatch.py by steps and by what they are shown of the last prediction;
                   of one pass without a mask, with a true and with a wrong one: --checkpoint
    latent         Dice of diffrect.py's rectified labels, decoded from the recovered latent and
                   from others: --checkpoint of a run on the phantom
    statistics     test Dice of diffrect.py with batch statistics averaged anew: --checkpoint
    kmeans         usrn.py's balanced k-means, k-means-constrained (PyPI) and plain k-means, once
    rectification  training steps of diffrect.py without and with its rectifier
    distances      surface distances of a heart's masks, beside medpy's (PyPI)

Without WHAT all of them, in small sizes. Candidates take turns, so that a busy machine slows all of
them alike: use the ratios of medians. What warms up does not count. Training steps are those of the
programs on embedded data (growth: on noise), loading included, in a process for each run: memory is
its peak, or on a GPU that of tensors. Other options, last, go to the program: --no-amp, --baseline
unimatch_v2.
"""

import argparse
import contextlib
import importlib
import math
import multiprocessing
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch._dynamo as dynamo
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import daw
import diffmatch
import diffrect
import pos_meo
import usrn
from common import medical
from common.augment import IGNORE, Photometry, normalize, strong_augment, to_float
from common.data import (DATASETS, Data, EvaluationSet, Sample, TrainingSet, load_data,
                         training_loader)
from common.evaluate import confusion_matrix, data_options, evaluate, iou_per_class, load_predictor
from common.models import DeepLabV3Plus, resize
from common.runtime import (bf16_is_fast, init_distributed, parse, read_checkpoint, require,
                            run_main, say)
from programs import on_ranks

CLASSES = 21
SIZES = {"rounds": 5, "backbone": "resnet50", "crop": 321, "batch": 2, "points": 1_000_000,
         "reference_points": 10_000, "clusters": 121, "channels": 256, "released": "",
         "checkpoint": ""}
OTHER_SIZES = {"sampling": {"crop": 513}, "rectification": {"crop": 256, "batch": 3}}
SMALL = {"rounds": 2, "backbone": "tiny", "crop": 64, "points": 20_000, "reference_points": 2_000,
         "clusters": 20, "channels": 32}
WARM_UP, STEPS = 2, 4  # of a training
SHAPES = ["--data-root", str(ROOT / "data/shapes"), "--weights", "none", "--backbone"]
UNIMATCH = "daw", ["--weighting", "fixed"]
PHANTOM = ["--data-root", str(ROOT / "data/phantom"), "--channels", "16"]


def report(title: str, seconds: dict[str, list[float]], memory: dict[str, float]) -> None:
    """Print medians, and their ratios to the first candidate."""
    say(f"{title}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    first = next(iter(seconds))
    for name, values in seconds.items():
        median, reference = np.median(values), np.median(seconds[first])
        line = f"  {name:24}{1000 * median:10.2f} ms{1 / median:10.2f}/s{median / reference:8.3f}"
        if memory:
            line += f"{memory[name]:10.2f} GiB{memory[name] / memory[first]:8.3f}"
        say(line)


def compare(title: str, candidates: dict, rounds: int, count: int = 1) -> None:
    """{name: function of nothing, which treats `count` items}: seconds an item."""
    seconds = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, call in candidates.items():
            started = time.perf_counter()
            call()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if number:
                seconds[name].append((time.perf_counter() - started) / count)
    report(title, seconds, {})


def in_own_process(function, *arguments):
    """Its result, from a process whose peak memory and threads are nobody else's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory() -> float:
    """GiB so far: of tensors where a GPU is used, else of the process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def train(method: str, options: list[str]) -> tuple[list[float], float]:
    """The first steps of a method's program: (seconds of each, peak memory in GiB)."""
    ticks = []

    def note(step: int) -> None:
        if step == 1:  # of usrn.py's last stage
            ticks.clear()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        ticks.append(time.perf_counter())

    steps_of(method, options, note)
    return np.diff(ticks[WARM_UP - 1 :]).tolist(), peak_memory()


def steps_of(method: str, options: list[str], note) -> None:
    """Run the program's first steps; it calls note(step) at the end of each."""
    module = importlib.import_module(method)
    log_step = module.Log.step

    def noted(log, step: int, terms: dict, *more):
        note(step)
        if step == WARM_UP + STEPS:
            raise StopIteration
        return log_step(log, step, terms, *more)

    module.Log.step = noted
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(StopIteration):
        run = getattr(module, "run_stages", module.train)
        run(parse(module.Config, argv=["--output", folder, *options]))


def compare_trainings(candidates: dict[str, tuple[str, list[str]]], sizes, common: list[str]):
    """{name: (method, flags)}, besides the flags that are common to all."""
    common = [*common, "--crop", str(sizes.crop), "--batch-size", str(sizes.batch), *sizes.options]
    seconds, memory = {name: [] for name in candidates}, dict.fromkeys(candidates, 0.0)
    for _ in range(sizes.rounds):
        for name, (method, flags) in candidates.items():
            steps, peak = in_own_process(train, method, [*common, *flags])
            seconds[name] += steps
            memory[name] = max(memory[name], peak)
    report(f"training steps, {' '.join(common)}", seconds, memory)
    return seconds


def methods() -> dict[str, tuple[str, list[str]]]:
    return {"UniMatch": UNIMATCH, "labeled only": ("daw", ["--supervised"]), "DAW": ("daw", []),
            "POS + MEO": ("pos_meo", ["--warmup", "0", "--cap", "0.8"]),
            "DiffMatch": ("diffmatch", []),
            "  discriminative": ("diffmatch", ["--discriminative"]),
            "USRN, stage 3": ("usrn", ["--supervised-iterations", "1"])}


def step(sizes) -> None:
    compare_trainings(methods(), sizes, [*SHAPES, sizes.backbone])

    device, batch, crop = init_distributed()[2], sizes.batch, sizes.crop
    images = torch.zeros(batch, 3, crop, crop, dtype=torch.uint8, device=device)
    views = {"labeled": images, "unlabeled": images}
    logits = torch.randn(batch, CLASSES, crop, crop, device=device)
    probs, label = logits.softmax(dim=1), logits.argmax(dim=1)  # which any method needs
    state = daw.Statistics(CLASSES, 0.99).to(device)

    def align() -> None:
        state.update(logits.softmax(dim=1), label, probs, label >= 0)
        daw.optimal_threshold(*state.gaussians())
        daw.align_distribution(probs, *state.class_mean)

    weak, per_image = to_float(images), v2.Compose([
        v2.RandomApply([v2.ColorJitter(0.5, 0.5, 0.5, 0.25)], 0.8), v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], 0.5)])
    candidates = {"augmentation": partial(daw.make_views, views, crop, Photometry()),
                  "statistics and alignment": align,
                  "a strong view": lambda: strong_augment(weak, Photometry()),
                  "by torchvision": lambda: [per_image(image) for image in weak]}
    compare(f"parts of a DAW step of {CLASSES} classes", candidates, sizes.rounds)


def gpu(sizes) -> None:
    if not torch.cuda.is_available():
        return say("  not measured: there is no GPU")
    method, flags = UNIMATCH
    kinds = {"bf16": ["--amp"], "fp32 (tf32)": ["--no-amp"],
             "compiled, bf16": ["--amp", "--compile"]}
    candidates = {name: (method, [*flags, *more]) for name, more in kinds.items()}
    common = [*SHAPES, sizes.backbone, "--crop", str(sizes.crop), "--batch-size", str(sizes.batch)]
    seconds = compare_trainings(candidates, sizes, common)
    counts = {name: in_own_process(counted, method, [*common, *sizes.options, *options])
              for name, (_, options) in candidates.items()}
    operations = counts["bf16"][0]  # a compiled step hides its own
    for name, (_, syncs, breaks) in counts.items():
        rate = operations / np.median(seconds[name]) / 1e12
        say(f"  {name:24}{rate:8.1f} TFLOP/s, {syncs} host syncs a step, {breaks} graph breaks")


def counted(method: str, options: list[str]) -> tuple[int, int, int]:
    """Operations of a step (2 a multiplication; of a compiled one those outside its graphs), the
    host's syncs in it, and the graph breaks so far."""
    counter, on_gpu = FlopCounterMode(display=False), torch.cuda.is_available()

    def note(step: int) -> None:
        if step == WARM_UP:
            counter.__enter__()
        elif step == WARM_UP + 1:
            counter.__exit__(None, None, None)
        if on_gpu:
            torch.cuda.set_sync_debug_mode("warn" if step == WARM_UP else "default")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps_of(method, options, note)
    syncs = sum("synchronizing CUDA" in str(warning.message) for warning in caught)
    return counter.get_total_flops(), syncs, sum(dynamo.utils.counters["graph_break"].values())


def growth(sizes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for seed, name in enumerate(("images", "val_images")):
            (Path(folder) / name).mkdir()
            write_pictures(Path(folder) / name, 8, seed)
            masks = Path(folder) / name.replace("images", "masks")
            masks.mkdir()
            for file in (Path(folder) / name).glob("*.png"):
                file.rename(masks / file.name)
        candidates = {"as it is": [], "twice the crop": ["--crop", str(2 * sizes.crop)],
                      "twice the batch": ["--batch-size", str(2 * sizes.batch)],
                      "84 classes": ["--classes", ",".join(map(str, range(4 * CLASSES)))]}
        method, flags = UNIMATCH
        candidates = {name: (method, [*flags, *more]) for name, more in candidates.items()}
        common = ["--dataset", "folder", "--data-root", folder, "--labeled", "4", "--weights",
                  "none", "--backbone", sizes.backbone, "--classes",
                  ",".join(map(str, range(CLASSES)))]
        compare_trainings(candidates, sizes, common)


def collectives(method: str, options: list[str], rank: int) -> list[list[tuple]]:
    """[(kind, numbers in it), ...] a rank sends in each step after the warm-up."""
    running, steps = [], []

    def note(step: int) -> None:
        if running:
            profiler = running.pop()
            profiler.stop()
            steps.append([(event.name.removeprefix("gloo:"), math.prod(*event.input_shapes))
                          for event in profiler.events()
                          if event.name in ("gloo:all_reduce", "gloo:all_gather", "gloo:send")])
        if WARM_UP <= step < WARM_UP + STEPS:
            running.append(torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                                  record_shapes=True))
            running[0].start()

    steps_of(method, [*options, "--device", "cpu"], note)
    return steps


def ranks(sizes) -> None:
    candidates = {name: (method, [*SHAPES, sizes.backbone, *flags])
                  for name, (method, flags) in methods().items()}
    candidates["DiffRect"] = "diffrect", [*PHANTOM, "--warmup", "0"]
    for name, (method, flags) in candidates.items():
        crop = 64 * math.ceil(sizes.crop / 64) if method == "diffrect" else sizes.crop
        flags = [*flags, "--crop", str(crop), "--batch-size", str(2 * sizes.batch)]
        with tempfile.TemporaryDirectory() as folder:
            work = partial(collectives, method, [*flags, "--output", folder])
            first, second = on_ranks(work, Path(folder), timeout=3600)
        same = first == second and all(sorted(one) == sorted(first[0]) for one in first)
        kinds = Counter(kind for kind, _ in first[0])
        numbers = sum(numbers for _, numbers in first[0])
        say(f"  {name:20}{numbers / 1e6:10.3f} M numbers a step in {dict(kinds)}; "
            f"{'the same' if same else 'NOT the same'} in {len(first)} steps and on both ranks")


def strategies(sizes) -> None:
    candidates = {"uniform": ("pos_meo", ["--strategy", "uniform", "--no-measure"]),
                  "POS + MEO": ("pos_meo", ["--warmup", "0"])}
    compare_trainings(candidates, sizes, [*SHAPES, sizes.backbone])

    model, images = DeepLabV3Plus(sizes.backbone, CLASSES, "none"), torch.zeros(2, 3, 64, 64)
    whole = torch.ones(2, 64, 64, dtype=torch.bool)
    batch = {"labeled": images, "unlabeled": images, "label": whole.long(), "valid": whole}
    views, operations = pos_meo.make_views(batch, 64, Photometry()), []
    for traversals in (lambda *losses: [sum(losses)], lambda *losses: losses):
        with FlopCounterMode(display=False) as counter:
            for loss in traversals(*pos_meo.unimatch_v1_losses(model, views, 0.95, 0)[:2]):
                loss.backward(retain_graph=True)
        operations.append(counter.get_total_flops())
    say(f"  operations of V1, two traversals to one: {operations[1] / operations[0]:.3f}")


def sixty_batches(data: Data, config: dict):
    """Of 8 + 8 weak crops."""
    return training_loader(data, config["crop"], 8, 1000, 0, 60, torch.device("cpu"), num_workers=0)


def harm(sizes) -> None:
    """A step takes 8 + 8 images; the means are over 60 such batches at the same weights."""
    model, config, _ = load_predictor(sizes.checkpoint, "cpu")
    model.train()
    data, gradients, pairs = load_data(data_options(config)), pos_meo.Gradients(model, 2), []
    for batch in sixty_batches(data, config):
        views = pos_meo.make_views(batch, config["crop"], data.info.photometry)
        losses = pos_meo.unimatch_v1_losses(model, views, config["threshold"], config["ohem"])
        for row in (pos_meo.SUP, pos_meo.UNSUP):
            gradients.backward(losses[row], row, retain_graph=True)
        pairs.append(gradients.flat.double())
    means = torch.stack(pairs).mean(dim=0)  # [2, P]
    for strategy in ("uniform", "pos"):
        weights = [pos_meo.integration_weights(pos_meo.inner_products(*pair), strategy)
                   for pair in pairs]
        along = torch.stack([means @ (w @ pair) for w, pair in zip(weights, pairs)])  # [60, 2]
        sup, unsup = (along < 0).sum(dim=0).tolist()
        say(f"  {strategy:8} of {len(pairs)} steps {sup} are against the mean supervised gradient, "
            f"{unsup} against the mean unsupervised one")


@torch.inference_mode()
def alignment(sizes) -> None:
    """The gap: half the sum of |share - true share|."""
    model, config, info = load_predictor(sizes.checkpoint, "cpu")
    data, both = load_data(data_options(config)), {"labeled": [], "unlabeled": []}
    for batch in sixty_batches(data, config):
        for name, label in (("labeled", batch["label"]), ("unlabeled", batch["truth"])):
            both[name].append((model(normalize(batch[name])).softmax(dim=1), label.long()))
    both = {name: tuple(map(torch.cat, zip(*parts))) for name, parts in both.items()}
    sums = [daw.class_sums(probs, label != IGNORE) for probs, label in both.values()]
    means = [total[:-1] / total[-1] for total in sums]
    probs, truth = both["unlabeled"]
    both["aligned"] = daw.align_distribution(probs, *means), truth
    true = torch.bincount(truth.flatten(), minlength=IGNORE + 1)[: info.num_classes].double()
    for name, (probs, label) in both.items():
        images, mean, square, _ = daw.confidence_sums(probs, label).unbind(dim=1)
        mean, variance = mean / images, square / images - (mean / images) ** 2
        fit = [value for pair in zip(mean, variance) for value in pair]
        t_star = daw.optimal_threshold(*fit, info.num_classes)
        right = (probs.argmax(dim=1) == label)[label != IGNORE].double().mean()
        shares = daw.class_sums(probs, label != IGNORE)
        gap = (shares[:-1] / shares[-1] - true / true.sum()).abs().sum() / 2
        say(f"  {name:10} right {mean[0]:.3f} ± {variance[0].sqrt():.3f}, wrong {mean[1]:.3f} ± "
            f"{variance[1].sqrt():.3f}, t* {t_star:.3f}, accuracy {right:.3f}, gap {gap:.4f}")


def rectification(sizes) -> None:
    candidates = {"FixMatch": ("diffrect", ["--model", "fixmatch"]),
                  "DiffRect": ("diffrect", ["--warmup", "0"])}
    compare_trainings(candidates, sizes, PHANTOM)


def write_pictures(folder: Path, count: int, seed: int = 0) -> list[Sample]:
    """JPEGs of 500x375 pixels, as detailed as photographs (90 kB), and masks of two classes."""
    rng, samples = np.random.default_rng(seed), []
    mask = np.repeat(np.uint8([[0], [1]]), [200, 175], axis=0).repeat(500, axis=1)
    for number in range(count):
        picture = np.zeros((375, 500, 3))
        for cell in (4, 16, 64):
            noise = rng.integers(0, 256, (375 // cell + 1, 500 // cell + 1, 3), dtype=np.uint8)
            picture += Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC)
        Image.fromarray((picture / 3).astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)
        Image.fromarray(mask).save(folder / f"{number}.png")
        samples.append(Sample(f"{number}.jpg", f"{number}.png"))
    return samples


def loader(sizes) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        samples, ids = write_pictures(folder, 16), folder / "ids.txt"
        ids.write_text("\n".join(f"{sample.image} {sample.mask}" for sample in samples))
        unlabeled = [Sample(sample.image, None) for sample in samples]
        data = Data(DATASETS["pascal"], folder, [], unlabeled, [], [], "benchmark")
        for crop in (321, 513):
            ours = TrainingSet(data, crop, seed=0)
            candidates = {"ours": lambda: [ours[1, k, k] for k in range(16)]}
            if sizes.released:  # also changes colours, which ours does on the device
                sys.path.insert(0, str(sizes.released))
                module = importlib.import_module("dataset.semi")
                theirs = module.SemiDataset("pascal", str(folder), "train_u", crop, str(ids))
                candidates["UniMatch"] = lambda: [theirs[k] for k in range(16)]
            compare(f"samples, crop {crop}", candidates, sizes.rounds, count=16)


@torch.inference_mode()
def sampling(sizes) -> None:
    device = init_distributed()[2]
    layout = {"device": device, "memory_format": torch.channels_last}
    model = diffmatch.DiffMatch(sizes.backbone, CLASSES, "none").to(**layout).eval()
    deeplab = DeepLabV3Plus(sizes.backbone, CLASSES, "none").to(**layout).eval()
    images = torch.randn(1, 3, sizes.crop, sizes.crop).to(**layout)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16_is_fast(device)):
        z, t = model(images), torch.ones(1, device=device)
        noise = torch.randn(1, model.encode.channels, *z.shape[2:]).to(**layout)
        candidates = {"feature extractor": partial(model, images),
                      "denoiser": partial(model, denoise=(z, noise, t)),
                      "DeepLabv3+": partial(deeplab, images)}
        for steps in range(1, 6):
            candidates[f"{steps} steps"] = partial(diffmatch.Sampler(model, steps, 1, 0), images)
        compare(f"{sizes.backbone}, an image of {sizes.crop} pixels", candidates, sizes.rounds)
    for name in ("feature extractor", "denoiser"):
        with FlopCounterMode(display=False) as counter:
            candidates[name]()
        say(f"  {name}: {counter.get_total_flops() / 2e9:.2f} G multiplications")


@torch.inference_mode()
def feedback(sizes) -> None:
    device = init_distributed()[2]
    sampler, config, info = load_predictor(sizes.checkpoint, device)
    model, data, seed = sampler.model, load_data(data_options(config)), config["noise_seed"]
    for shown in ("own", "softmax", "nothing"):
        scores = []
        for steps in (1, 2, 3, 5):
            network = diffmatch.Sampler(model, steps, config["time_difference"], seed, shown)
            network.eval()
            results = evaluate(network, data, "val", config["crop"], device, num_workers=0)
            scores.append(f"{results['miou']:.1f}")
        say(f"  {shown:8} fed back, steps 1, 2, 3, 5: {', '.join(scores)}")

    torch.manual_seed(seed)
    confusion = torch.zeros(4, info.num_classes, info.num_classes, dtype=torch.int64)
    for item in EvaluationSet(data.val, data.root, info.num_classes):
        z, label = model(normalize(item["image"][None].to(device))), item["label"][None].long()
        true = diffmatch.downsample(label, z.shape[2:]).to(device)
        wrong = torch.where(true == IGNORE, true, (true + 1) % info.num_classes)
        noise, zero = torch.randn_like(model.encode(true)), torch.zeros_like(model.encode(true))
        masks = [(zero, 1.0), (noise, 1.0)]
        masks += [(diffmatch.add_noise(model.encode(mask), 0.1, noise), 0.1)
                  for mask in (true, wrong)]
        for row, (y_t, t) in zip(confusion, masks):
            logits = model(denoise=(z, y_t, torch.full((1,), t, device=device)))
            prediction = resize(logits, label.shape[1:]).argmax(dim=1).cpu()
            row += confusion_matrix(prediction, label, info.num_classes)
    scores = [f"{name} {100 * iou_per_class(counts).nanmean():.1f}" for name, counts in zip(
        ("zeros at t = 1", "noise at t = 1", "true mask at t = 0.1", "wrong one"), confusion)]
    say(f"  one pass: {', '.join(scores)}")


@torch.no_grad()
def latent(sizes) -> None:
    device, state = init_distributed()[2], read_checkpoint(Path(sizes.checkpoint))
    config = diffrect.Config(**{**state["config"], "lists": None})
    data, size = medical.load_volumes(config), config.batch_size
    classes, released = data.info.num_classes, config.rules == "released"
    require(config.colors, "latent is not for --no-colors")
    networks = {"model": diffrect.UNet(classes, config.channels, config.dropout),
                "rectifier": diffrect.Rectifier(diffrect.semantic_colors(classes), config.channels)}
    for name, network in networks.items():
        network.load_state_dict(state[name])
        network.to(device).train()
    model, rectifier = networks.values()
    recover, dice = rectifier.denoiser.forward, defaultdict(list)
    for part in rectifier.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0  # as while it rectifies
    torch.manual_seed(config.seed)
    for batch in medical.slice_loader(data, config.crop, size, config.seed + 1, 0, sizes.rounds,
                                      device, num_workers=0):
        batch = {name: value.to(device) for name, value in batch.items()}
        weak = to_float(torch.cat([batch["labeled"], batch["unlabeled"]]))
        truth = torch.cat([batch["label"], batch["truth"]]).long()
        labels, of_strong = (
            diffrect.pseudo_labels(model(view), truth != IGNORE, config.threshold, released)[0]
            for view in (weak, diffrect.strong_view(weak, data.info)))
        tau = diffrect.calibration_guidance(config.guidance, of_strong, labels, classes)
        guidance = rectifier.guidance(diffrect.TAU_SCALE * tau)
        true = rectifier.embed(truth, weak, guidance, rectifier.slice_encoder(weak, guidance))[-1]
        maps = {"no latent, pseudo labels as they are": labels}
        for name, make in {"recovered": None, "zeros": torch.zeros_like, "noise": torch.randn_like,
                           "the truth's": lambda condition: true}.items():
            rectifier.denoiser.forward = (
                (lambda z_t, condition, step: make(condition)) if make else recover)
            maps[name] = rectifier.rectify(labels, weak, tau, released).argmax(dim=1)
        for name, found in maps.items():
            found = torch.where(truth == IGNORE, 0, found)
            dice[name] += diffrect.dice_coefficient(found[size:], truth[size:], classes).tolist()
    for name, scores in dice.items():
        say(f"  {name:37} {100 * np.mean(scores):.2f}  ({len(scores)} unlabeled slices)")


@torch.no_grad()
def statistics(sizes) -> None:
    """Over weak views of 60 batches, with dropout as in training and without."""
    device = init_distributed()[2]
    network, config, info = load_predictor(sizes.checkpoint, device)
    data, crop = medical.load_volumes(data_options(config, medical.VolumeOptions)), config["crop"]
    rates = {part: part.p for part in network.modules() if isinstance(part, torch.nn.Dropout)}
    norms = [part for part in network.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    batches = list(medical.slice_loader(data, crop, config["batch_size"], config["seed"] + 77, 0,
                                        60, device, num_workers=0))
    scores = partial(medical.evaluate_volumes, network, data.test, info, crop, device)
    say(f"  {'as trained':30}{scores()['dice']:8.2f}")
    torch.manual_seed(config["seed"])
    network.train()
    for kept in ("with", "without"):
        for layer, rate in rates.items():
            layer.p = rate * (kept == "with")
        for stream in ("labeled", "unlabeled"):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean of all batches
            for batch in batches:
                network(to_float(batch[stream].to(device)))
            say(f"  {f'{stream}, {kept} dropout':30}{scores()['dice']:8.2f}")


def made_up_features(points: int, channels: int) -> torch.Tensor:
    """[N, D], as of a class after a ReLU: 40 groups of very different size, correlated noise."""
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(40, channels, generator=generator).relu()
    shares = torch.rand(40, generator=generator) ** 3
    groups = torch.multinomial(shares, points, True, generator=generator)
    mixing = 0.7 * torch.randn(channels, channels, generator=generator) / channels**0.5
    features = torch.empty(points, channels)
    for part, rows in zip(groups.split(65536), features.split(65536)):
        noise = torch.randn(len(part), channels, generator=generator)
        rows.copy_((centres[part] + noise @ mixing).relu())
    return features


def kmeans(sizes) -> None:
    features, clusters = made_up_features(sizes.points, sizes.channels), sizes.clusters
    few = features[: sizes.reference_points]
    ours = partial(usrn.balanced_kmeans, num_clusters=clusters, seed=0)
    candidates = [("balanced", ours, few), ("balanced", ours, features),
                  ("plain", partial(ours, balanced=False), features)]
    with contextlib.suppress(ImportError):
        from k_means_constrained import KMeansConstrained

        limits = len(few) // clusters, -(-len(few) // clusters)
        theirs = KMeansConstrained(clusters, *limits, n_init=1, random_state=0)
        candidates.insert(0, ("k-means-constrained", theirs.fit_predict, few))
    say(f"{sizes.channels} channels, {torch.get_num_threads()} threads; memory: the peak so far")
    for name, assign, points in candidates:
        started = time.perf_counter()
        assignment = torch.as_tensor(assign(points)).long()
        seconds, peak = time.perf_counter() - started, peak_memory()
        centroids = usrn.cluster_means(points, assignment, points[:clusters])
        cost = usrn.squared_distances(points, centroids).gather(1, assignment[:, None]).mean()
        counts = torch.bincount(assignment, minlength=clusters)
        say(f"  {name:20}{len(points):8} points, {clusters} clusters of {counts.min()} to "
            f"{counts.max()}: {seconds:.2f} s, mean squared distance {cost:.3f}, {peak:.2f} GiB")


def distances(sizes) -> None:
    z, y, x = np.ogrid[:10, :256, :256]
    masks = [((z - 5) / 4) ** 2 + ((y - middle) / 25) ** 2 + ((x - 128) / radius) ** 2 < 1
             for middle, radius in ((120, 30), (123, 28))]
    candidates = {"ours": partial(medical.surface_distances, *masks)}
    with contextlib.suppress(ImportError):
        from medpy.metric.binary import asd, assd, hd95

        candidates["medpy"] = lambda: [call(*masks) for call in (hd95, asd, assd)]
    compare("HD95, ASD and ASSD of 10x256x256 voxels", candidates, sizes.rounds)


SUBJECTS = {function.__name__: function for function in (
    loader, step, gpu, growth, ranks, strategies, harm, alignment, sampling, feedback, latent,
    statistics, kmeans, rectification, distances)}
OF_A_CHECKPOINT = ("harm", "alignment", "feedback", "latent", "statistics")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in SIZES.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), help=str(value),
                            default=argparse.SUPPRESS)
    given, words = parser.parse_known_args()
    names = [word for word in words if word in SUBJECTS]
    options = words[len(names) :]
    trainings = {"step", "gpu", "growth", "strategies", "rectification"}
    require(not options or names and trainings.issuperset(names),
            f"{' '.join(options)}: unknown or misplaced, see --help")
    for name in names or SUBJECTS:
        say(f"\n{name}")
        defaults = {**SIZES, **(OTHER_SIZES.get(name, {}) if names else SMALL)}
        sizes = argparse.Namespace(**{**defaults, **vars(given), "options": options})
        if name in OF_A_CHECKPOINT and not sizes.checkpoint:
            say("  needs --checkpoint")
        else:
            in_own_process(SUBJECTS[name], sizes)


if __name__ == "__main__":
    run_main(main)
