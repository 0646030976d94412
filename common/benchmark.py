"""Speed and memory, measured side by side in one run: `python -m common.benchmark loader|step|strategies|sampling|kmeans|rectification`.

    loader       unlabeled training samples a second on one core, from 500x375 JPEG files as PASCAL VOC's. With
                 `--released FOLDER`, a checkout of LiheYoung/UniMatch, its loader takes turns with ours.
    step         time and peak memory of a DAW training step, and the share that its statistics and alignment take.
    strategies   a step of pos_meo.py with two gradients (pos_meo) against one with their sum (uniform): time and peak memory.
    sampling     diffmatch.py at inference: its feature extractor and one call of its denoiser, and images a second with 1 to 5
                 denoising steps beside DeepLabv3+ alone, one image at a time.
    kmeans       usrn.py's balanced k-means on `--points` made-up features: time, peak memory, objective. Before it, on
                 `--reference-points` of them, beside k-means-constrained (PyPI), if that is installed: same points, one start.
    rectification  a training step of diffrect.py beside one without its rectifier (fixmatch), and the colouring: `--crop 256 --batch 3`.

Timings are medians over rounds that take turns, so that a busy machine slows all candidates alike: use the ratios.
"""

import argparse
import copy
import dataclasses
import functools
import importlib
import resource
import statistics as stats
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from common import kmeans, medical, runtime
from common.data import DATASETS, Data, Sample
from common.deeplab import DeepLabV3Plus
from common.loading import TrainingSet
from common.runtime import UserError, run_main


def median_seconds(candidates: dict, rounds: int, device: torch.device | None = None) -> dict[str, float]:
    """{name: median seconds of a call}; candidates take turns, after one call each that is not counted."""
    seconds = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, call in candidates.items():
            started = time.perf_counter()
            call()
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: stats.median(values) for name, values in seconds.items()}


# ---------------------------------------------------------------- loader


def write_pictures(folder: Path, count: int) -> list[str]:
    """`count` JPEGs of 500x375 pixels with the detail of photographs (about 90 kB each), and blank masks."""
    rng = np.random.default_rng(0)
    names = [f"picture{number:03d}" for number in range(count)]
    for name in names:
        scales = [Image.fromarray(rng.integers(0, 256, (375 // s + 1, 500 // s + 1, 3), dtype=np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
                  for s in (4, 16, 64)]
        picture = np.mean([np.asarray(scale, np.float32) for scale in scales], axis=0)
        for sub, image, options in (("JPEGImages", Image.fromarray(picture.astype(np.uint8)), {"quality": 90}),
                                    ("SegmentationClass", Image.new("L", (500, 375)), {})):
            (folder / sub).mkdir(exist_ok=True)
            image.save(folder / sub / f"{name}.{'jpg' if options else 'png'}", **options)
    return names


def loader(released: Path | None, rounds: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = write_pictures(folder, 16)
        samples = [Sample(f"JPEGImages/{name}.jpg", None) for name in names]
        size = sum((folder / sample.image).stat().st_size for sample in samples) / len(samples)
        print(f"{len(names)} JPEG files of 500x375 pixels, {size / 1000:.0f} kB each; one core, everything a worker does")
        for crop in (321, 513):
            ours = TrainingSet(Data(DATASETS["pascal"], folder, [], samples, [], []), crop, seed=0)
            candidates = {"ours": lambda: [ours[1, index, index] for index in range(len(samples))]}
            if released:
                theirs = released_dataset(released, folder, names, crop)
                candidates["UniMatch"] = lambda: [theirs[index] for index in range(len(samples))]
            seconds = median_seconds(candidates, rounds)
            line = "   ".join(f"{name} {len(samples) / value:6.1f}/s" for name, value in seconds.items())
            print(f"crop {crop}: {line}" + (f"   ratio {seconds['UniMatch'] / seconds['ours']:.1f}" if released else ""))


def released_dataset(checkout: Path, folder: Path, names: list[str], crop: int):
    """UniMatch's own data set class over the same files."""
    if not (checkout / "dataset" / "semi.py").is_file():
        raise UserError(f"{checkout} is no checkout of LiheYoung/UniMatch: it lacks dataset/semi.py")
    sys.path.insert(0, str(checkout))
    ids = folder / "ids.txt"
    ids.write_text("\n".join(f"JPEGImages/{name}.jpg SegmentationClass/{name}.png" for name in names))
    return importlib.import_module("dataset.semi").SemiDataset("pascal", str(folder), "train_u", crop, str(ids))


# ---------------------------------------------------------------- training step


def random_batch(batch: int, crop: int, classes: int, device: torch.device) -> dict[str, torch.Tensor]:
    """What the loader would give: `batch` labeled and as many unlabeled crops, all noise."""
    generator = torch.Generator().manual_seed(0)
    part = {"labeled": torch.randint(0, 256, (batch, 3, crop, crop), generator=generator, dtype=torch.uint8),
            "label": torch.randint(0, classes, (batch, crop, crop), generator=generator, dtype=torch.uint8),
            "unlabeled": torch.randint(0, 256, (batch, 3, crop, crop), generator=generator, dtype=torch.uint8),
            "valid": torch.ones(batch, crop, crop, dtype=torch.bool)}
    return {name: value.to(device) for name, value in part.items()}


def peak_memory(device: torch.device) -> float:
    """GiB: of the tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def step(backbone: str, crop: int, batch: int, rounds: int, device: str | None, options: list[str]) -> None:
    import daw

    context = runtime.start(device)
    device = context.device
    config = daw.parse(daw.Config, ["--backbone", backbone, "--weights", "none", "--crop", str(crop), *options])
    config.threshold, config.align = 0.95, True
    classes = 21
    model = daw.build_model(config, classes).train()
    network = runtime.wrap(model, config, context)
    optimizer = torch.optim.SGD(model.parameter_groups(1e-3, 10), momentum=0.9)
    statistics = daw.Statistics(classes, 0.99).to(device)
    part = random_batch(batch, crop, classes, device)
    logits = torch.randn(batch, classes, crop, crop, device=device)
    weak_probs = logits.softmax(dim=1)  # pseudo labels need these in any case

    def whole() -> None:
        views = daw.make_views(part, config, (0.1, 2.0))
        with runtime.autocast(config, device):
            loss, _, sums = daw.daw_loss(network, views, daw.pixel_counts([views]), statistics, statistics.empty_sums(), config)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        statistics.update(sums)

    @torch.no_grad()
    def statistics_and_alignment() -> None:
        mean, variance, class_mean = statistics.after(daw.batch_sums(logits.softmax(dim=1), part["label"], weak_probs, part["valid"]))
        daw.optimal_threshold(mean[0], variance[0], mean[1], variance[1], classes)
        daw.align_distribution(weak_probs, *class_mean)

    candidates = {"step": whole, "statistics": statistics_and_alignment, "augmentation": lambda: daw.make_views(part, config, (0.1, 2.0))}
    seconds = median_seconds(candidates, rounds, device)
    print(f"{backbone}, crop {crop}, {batch} labeled + {batch} unlabeled, {device}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    print(f"step {1000 * seconds['step']:.0f} ms, peak memory {peak_memory(device):.2f} GiB; of the step, statistics and alignment "
          f"{1000 * seconds['statistics']:.1f} ms ({100 * seconds['statistics'] / seconds['step']:.1f} %), augmentation "
          f"{1000 * seconds['augmentation']:.1f} ms ({100 * seconds['augmentation'] / seconds['step']:.1f} %)")


def strategies(backbone: str, crop: int, batch: int, rounds: int, device: str | None, options: list[str]) -> None:
    """Times from steps that take turns; peak memory from a process of its own for each, as a process's peak never falls."""
    names = ("uniform", "pos_meo")
    if "--strategy" in options:
        steps, config, device = strategy_steps([options[options.index("--strategy") + 1]], backbone, crop, batch, device, options)
        for call in steps.values():
            call(), call()
        print(peak_memory(device))
        return
    memory = {}
    for name in names:
        command = [sys.executable, "-m", "common.benchmark", "strategies", "--backbone", backbone, "--crop", str(crop), "--batch", str(batch),
                   *(["--device", device] if device else []), *options, "--strategy", name]
        memory[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    steps, config, device = strategy_steps(names, backbone, crop, batch, device, options)
    seconds = median_seconds(steps, rounds, device)
    print(f"{config.baseline}, {backbone}, crop {crop}, {batch} labeled + {batch} unlabeled, {device}, {torch.get_num_threads()} threads, "
          f"PyTorch {torch.__version__}")
    for name in names:
        print(f"{name:8} {1000 * seconds[name]:8.0f} ms ({seconds[name] / seconds['uniform']:.2f})   {memory[name]:.2f} GiB "
              f"({memory[name] / memory['uniform']:.2f})")


def strategy_steps(names, backbone: str, crop: int, batch: int, device: str | None, options: list[str]) -> tuple:
    """({strategy: a training step of pos_meo.py}, config, device); each strategy has a network of its own."""
    import pos_meo

    context, steps = runtime.start(device), {}
    for name in names:
        config = pos_meo.parse(pos_meo.Config, ["--weights", "none", "--crop", str(crop), *options, "--backbone", backbone, "--strategy", name])
        config.threshold, config.lr, config.head_lr_multiplier, config.weight_decay = 0.0, 1e-5, 10.0, 1e-4
        classes = 21
        model = pos_meo.build_model(config, classes).train()
        network = runtime.wrap(model, config, context, average_gradients=False)
        optimizer = pos_meo.build_optimizer(model, config)
        teacher = copy.deepcopy(model).eval() if config.baseline == "unimatch_v2" else None
        gradients = pos_meo.Gradients(model, rows=1 if name == "uniform" else 2)
        part = random_batch(batch, crop, classes, context.device)

        def step(network=network, teacher=teacher, gradients=gradients, config=config, optimizer=optimizer, part=part) -> None:
            views = pos_meo.make_views(part, config, (0.1, 2.0))
            pos_meo.optimizer_step(network, teacher, [views], gradients, optimizer, config, context, measure=False)

        steps[name] = step
    return steps, config, context.device


@torch.inference_mode()
def sampling(backbone: str, crop: int, batch: int, rounds: int, device: str | None, options: list[str]) -> None:
    import diffmatch

    device, classes = runtime.start(device).device, 21
    config = diffmatch.parse(diffmatch.Config, ["--backbone", backbone, "--weights", "none", *options])
    layout = {"device": device, "memory_format": torch.channels_last}
    model = diffmatch.build_model(config, classes).to(**layout).eval()
    deeplab = DeepLabV3Plus(backbone, classes, "none").to(**layout).eval()
    images = torch.randn(1, 3, crop, crop).to(**layout)
    with runtime.autocast(config, device):
        z = model(images)
        noise, t = torch.randn(1, model.mask_channels, *z.shape[2:]).to(**layout), torch.ones(1, device=device)
        candidates = {"extractor": lambda: model(images), "denoiser": lambda: model.denoise(z, noise, t), "DeepLabv3+": lambda: deeplab(images)}
        for steps in range(1, 6):
            predict = diffmatch.predictor(model, dataclasses.replace(config, steps=steps))
            candidates[f"{steps} steps"] = functools.partial(predict, images)
        seconds = median_seconds(candidates, rounds, device)
        operations = {}
        for name in ("extractor", "denoiser"):
            with FlopCounterMode(display=False) as counter:
                candidates[name]()
            operations[name] = counter.get_total_flops()
    print(f"{backbone}, one image of {crop}x{crop}, {device}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    print(diffmatch.parameter_report(model))
    print(f"feature extractor {1000 * seconds['extractor']:.0f} ms, one denoising call {1000 * seconds['denoiser']:.0f} ms: "
          f"{100 * seconds['denoiser'] / seconds['extractor']:.0f} % of it, with {100 * operations['denoiser'] / operations['extractor']:.1f} % "
          f"of its multiplications")
    print("   ".join(f"{name} {1 / seconds[name]:.2f}/s" for name in candidates if name not in ("extractor", "denoiser")))


def rectification(backbone: str, crop: int, batch: int, rounds: int, device: str | None, options: list[str]) -> None:
    import diffrect

    context = runtime.start(device)
    device, classes, info = context.device, 4, dataclasses.replace(medical.DATASETS["acdc"], crop=crop)
    config = diffrect.parse(diffrect.Config, ["--dataset", "acdc", *options])
    config.threshold, config.channels, config.rectify_weight = info.threshold, config.channels or info.channels, info.rectify_weight
    model, rectifier = diffrect.build_model(config, classes), diffrect.Rectifier(classes, config.channels)
    networks = [runtime.wrap(module, config, context) for module in (model, rectifier)]
    optimizers = [torch.optim.SGD(module.parameters(), 0.01, 0.9) for module in (model, rectifier)]
    part = {name: value[:, :1] if value.dim() == 4 else value for name, value in random_batch(batch, crop, classes, device).items()}
    colors = diffrect.semantic_colors(classes).to(device)

    def rectify(outputs: dict, views: dict, counts: dict) -> torch.Tensor:
        masks = diffrect.embedded_masks(outputs, views)
        with runtime.autocast(config, device):
            loss, _ = diffrect.rectifier_loss(networks[1], masks, views, counts, colors, outputs, 0.1, config)
        loss.backward()
        update(1)
        with runtime.autocast(config, device):
            return rectifier.rectify(diffrect.color_masks(masks["weak"], colors), views["weak"], masks["tau_u"], config.sampling_steps, config.eta)

    def update(number: int) -> None:
        optimizers[number].step()
        optimizers[number].zero_grad(set_to_none=True)

    def step(config) -> None:
        views = diffrect.make_views(part, config, info)
        counts = runtime.pixel_counts([views])
        with runtime.autocast(config, device):
            outputs = diffrect.forward_views(networks[0], views, config)
        rectified = rectify(outputs, views, counts) if config.model == "diffrect" else None
        diffrect.segmentation_loss(outputs, views, counts, rectified, 0.1, config)[0].backward()
        update(0)

    baseline = dataclasses.replace(config, model="fixmatch")
    labels = part["label"].long()
    candidates = {"step": lambda: step(config), "fixmatch": lambda: step(baseline), "colouring": lambda: diffrect.color_masks(labels, colors)}
    seconds = median_seconds(candidates, rounds, device)
    print(f"{crop}x{crop}, {batch} labeled + {batch} unlabeled, {device}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    print(f"step {1000 * seconds['step']:.0f} ms, without rectifier {1000 * seconds['fixmatch']:.0f} ms, colouring of {batch} masks "
          f"{1000 * seconds['colouring']:.1f} ms, peak memory {peak_memory(device):.2f} GiB")


# ---------------------------------------------------------------- clustering


def made_up_features(points: int, channels: int) -> torch.Tensor:
    """Like a class's features after a ReLU: 40 groups of very different size with correlated noise, float32 [points, channels]."""
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(40, channels, generator=generator).relu()
    groups = torch.multinomial(torch.rand(40, generator=generator) ** 3, points, True, generator=generator)
    mixing = 0.7 * torch.randn(channels, channels, generator=generator) / channels**0.5
    features = torch.empty(points, channels)
    for first in range(0, points, 65536):
        part = groups[first : first + 65536]
        features[first : first + len(part)] = (centres[part] + torch.randn(len(part), channels, generator=generator) @ mixing).relu()
    return features


def clustering(points: int, reference_points: int, clusters: int, channels: int) -> None:
    features = made_up_features(points, channels)

    def measure(name: str, assign, features: torch.Tensor) -> None:
        started = time.perf_counter()
        assignment = torch.as_tensor(assign(features)).long()
        seconds = time.perf_counter() - started
        centroids = kmeans.means(features, assignment, features[:clusters])
        sizes = torch.bincount(assignment, minlength=clusters)
        print(f"{name}: {len(features)} points of {channels} channels into {clusters} clusters of {sizes.min()} to {sizes.max()}: {seconds:.1f} s, "
              f"mean squared distance {kmeans.sum_of_squares(features, assignment, centroids) / len(features):.3f}", flush=True)

    def constrained(features: torch.Tensor) -> np.ndarray:
        least, rest = divmod(len(features), clusters)
        return KMeansConstrained(clusters, size_min=least, size_max=least + (rest > 0), n_init=1, random_state=0).fit_predict(features.double().numpy())

    print(f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    ours = functools.partial(kmeans.balanced_kmeans, num_clusters=clusters, seed=0)
    measure("balanced_kmeans", ours, features[:reference_points])
    try:
        from k_means_constrained import KMeansConstrained
    except ImportError:
        print("k-means-constrained is not installed")
    else:
        measure("k-means-constrained", constrained, features[:reference_points])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    measure("balanced_kmeans", ours, features)
    measure("plain k-means", functools.partial(kmeans.kmeans, num_clusters=clusters, seed=0), features)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory {peak / 2**20:.2f} GiB, features included ({features.nbytes / 2**30:.2f} GiB; {before / 2**20:.2f} GiB before)")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m common.benchmark", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("loader", "step", "strategies", "sampling", "kmeans", "rectification"))
    parser.add_argument("--released", type=Path, help="loader: a checkout of LiheYoung/UniMatch to measure beside ours")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--crop", type=int, default=321)
    parser.add_argument("--batch", type=int, default=2, help="labeled images, and as many unlabeled")
    parser.add_argument("--device")
    parser.add_argument("--points", type=int, default=1_000_000, help="kmeans: made-up pixels")
    parser.add_argument("--reference-points", type=int, default=10_000, help="kmeans: of them also clustered by k-means-constrained")
    parser.add_argument("--clusters", type=int, default=121)
    parser.add_argument("--channels", type=int, default=256)
    args, options = parser.parse_known_args()  # the rest are options of daw.py, pos_meo.py or diffmatch.py, such as --compile or --no-amp
    if args.what == "loader":
        loader(args.released, args.rounds)
    elif args.what == "kmeans":
        clustering(args.points, args.reference_points, args.clusters, args.channels)
    else:
        {"step": step, "strategies": strategies, "sampling": sampling, "rectification": rectification}[args.what](args.backbone, args.crop, args.batch, args.rounds, args.device, options)


if __name__ == "__main__":
    run_main(main)
