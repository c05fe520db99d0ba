"""Image classification, from a backbone and labelled images to `classify.json`: a head or fine-tuning per seed."""

from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastalign import __version__
from fastalign.backbones.precision import compute_dtype
from fastalign.backbones.vit import ViT
from fastalign.data.loader import Loader
from fastalign.data.transforms import Transform
from fastalign.evaluation.datasets import ImageSplit, open_image_splits
from fastalign.evaluation.features import make_tensor, read_features
from fastalign.evaluation.fit import FeatureLoader, Fit, check_loss, evaluate, say_progress
from fastalign.evaluation.heads import Classifier, StandardizedLinear, make_image_head, parameter_groups
from fastalign.evaluation.options import ImageOptions
from fastalign.evaluation.results import IMAGE_METRICS, ImageCounts, check_output, write_results
from fastalign.training.build import image_constants
from fastalign.training.checkpoint_files import Checkpoints, checksum
from fastalign.training.command import report_rank_error
from fastalign.training.distributed import World, on_first_rank
from fastalign.training.metrics import mean_and_spread
from fastalign.training.update import learning_rate
from fastalign.utils.errors import UserError
from fastalign.utils.random import permutation

RESULTS = "classify.json"
_READ_BATCH = 256


@dataclass(frozen=True)
class Job:
    """Everything that the training runs of all seeds share."""

    backbone: ViT
    splits: dict[str, ImageSplit]
    classes: int
    options: ImageOptions  # resolved
    world: World
    dtype: torch.dtype  # of autocast
    say: Callable[[str], None]
    folder: Path | None  # of checkpoints and features, the same on all ranks; None = no files
    identity: dict  # plain values; a checkpoint with others is refused

    def read(self, split: str) -> Tensor:
        """The head's inputs for every image of a split: [n, D] float32, or [n, T, D] in the compute dtype."""
        head, spec, source = self.options.head, self.backbone.spec, self.splits[split].source
        self.say(f"{split}: features of {len(source)} images")
        model = Classifier(self.backbone, head, self.classes).to(self.world.device)
        tokens = () if head == "linear" else (spec.prefix + spec.patches,)
        shape, dtype = (len(source), *tokens, spec.block.width), self.dtype if tokens else torch.float32
        features = make_tensor(shape, dtype, self.folder, self.world)
        transform = Transform(crop="eval", **image_constants(self.backbone))
        how = {"batch_size": _READ_BATCH, "threads": self.options.threads, "dtype": self.dtype}
        how["track"] = say_progress(self.say)
        read_features(lambda x: [model.features(x)], [features], source, transform, self.world, **how)
        return features


def train_on_features(job: Job) -> list[dict]:
    """Frozen backbone: all ranks compute its features once; then each rank trains its share of the seeds."""
    options, world, device = job.options, job.world, job.world.device
    features, done = {name: job.read(name) for name in job.splits}, {}
    for seed in options.seeds[world.rank :: world.size]:
        loaders = {name: FeatureLoader(each, options.batch_size, device) for name, each in features.items()}
        order = partial(permutation, len(features["train"]), seed=seed)
        loaders["train"] = replace(loaders["train"], order=order)
        torch.manual_seed(seed)
        head = make_image_head(options.head, job.backbone, job.classes)
        if isinstance(head, StandardizedLinear):
            head.standardize(features["train"])
        done[seed] = found = train_seed(job, head.to(device), loaders, seed, World(0, 1, device))
        job.say(f"seed {seed}: val top-1 {100 * found['val']['top1']:.2f}% after epoch {found['epoch']}")
    results = {seed: result for part in world.gather(done) for seed, result in part.items()}
    return [results[seed] for seed in options.seeds]


def train_on_images(job: Job) -> list[dict]:
    """Augmented images pass through the backbone in each epoch; all ranks share the batches of each seed."""
    options, world, results = job.options, job.world, []
    constants = image_constants(job.backbone)
    augment = {name: getattr(options, name) for name in ("crop", "color_jitter", "randaugment")}
    mix = {name: getattr(options, name) for name in ("accumulate", "mixup", "cutmix")}
    how = {"batch_size": options.batch_size // (options.accumulate * world.size), "device": world.device}
    how |= {"rank": world.rank, "world_size": world.size, "dtype": job.dtype, "threads": options.threads}
    evaluated, training = Transform(crop="eval", **constants), Transform(**augment, **constants)
    standardize = options.head == "linear" and not options.unfreeze
    statistics = job.read("train") if standardize else None
    for seed in options.seeds:
        others = [name for name in job.splits if name != "train"]
        loaders = {name: Loader(job.splits[name].source, evaluated, train=False, **how) for name in others}
        loaders["train"] = Loader(job.splits["train"].source, training, seed=seed, **mix, **how)
        torch.manual_seed(seed)
        model = Classifier(job.backbone, options.head, job.classes, unfreeze=options.unfreeze)
        model.backbone.grad_checkpointing = options.grad_checkpointing
        if standardize:
            model.head.standardize(statistics)
        with ExitStack() as stack:
            for loader in loaders.values():
                stack.enter_context(closing(loader))
            results.append(train_seed(job, model.to(world.device), loaders, seed, world))
    return results


def train_seed(
    job: Job, model: nn.Module, loaders: dict[str, Loader | FeatureLoader], seed: int, world: World
) -> dict:
    """Train a model. Returns the seed, the selected epoch with its metrics, and a line for each epoch as "curve".

    With a test split, the first epoch with the best validation top-1 is selected; without one, the last epoch.
    """
    options, labels = job.options, {name: split.labels.__getitem__ for name, split in job.splits.items()}
    fit = make_fit(model, len(loaders["train"]), labels["train"], options, seed, world, job.dtype)
    epochs, updates = options.epochs, len(loaders["train"]) // options.accumulate
    progress, checkpoints = {"best": None, "curve": []}, None
    track = say_progress(lambda text: job.say(f"seed {seed} {text}"))

    def measure(split: str) -> dict:
        counts = ImageCounts(job.classes, world.device)
        evaluate(model, loaders[split].batches(), labels[split], counts, world.device, job.dtype)
        return counts.results(world)

    if options.on_images and job.folder:
        checkpoints = Checkpoints(job.folder / "classify" / f"seed-{seed}" / "checkpoints", keep=1)
        fit.resume(checkpoints, job.identity, progress)
        if fit.step:
            job.say(f"seed {seed} resumes after epoch {fit.step // updates} of {epochs}")
    for epoch in range(fit.step // updates + 1, epochs + 1):
        batches = track(loaders["train"].batches(epoch - 1), f"epoch {epoch}", len(loaders["train"]))
        loss = fit.epoch(batches, updates)
        val, best, has_test = measure("val"), progress["best"], "test" in loaders
        check_loss(val["loss"], f"seed {seed} in epoch {epoch}")
        if best is None or not has_test or val["top1"] > best["val"]["top1"]:
            test = {"test": measure("test")} if has_test else {}
            progress["best"] = {"epoch": epoch, "val": val, **test}
        figures = {"train_loss": loss, "val_loss": val["loss"], "val_top1": val["top1"]}
        progress["curve"].append({"epoch": epoch, **figures})
        if options.on_images:
            top1 = f"val top-1 {100 * val['top1']:.2f}%"
            job.say(f"seed {seed} epoch {epoch}/{epochs}  loss {loss:.4f}  {top1}")
        if checkpoints:
            fit.save(checkpoints, identity=job.identity, progress=progress)
    if checkpoints:
        on_first_rank(world, checkpoints.wait)
    return {"seed": seed, **progress["best"], "curve": progress["curve"]}


def make_fit(
    model: nn.Module, batches: int, labels, options: ImageOptions, seed: int, world: World, dtype: torch.dtype
) -> Fit:
    """The training of a head or a `Classifier`; `batches`: per epoch; `labels`: of sample ids."""
    steps = batches // options.accumulate
    groups = parameter_groups(model, decay=options.layer_decay or 1.0, weight_decay=options.weight_decay)
    schedule = {"total": options.epochs * steps, "warmup": round(options.warmup_epochs * steps)}
    rate = partial(learning_rate, **schedule, lr=options.lr, min_lr=options.min_lr)
    loss = partial(functional.cross_entropy, label_smoothing=options.label_smoothing)
    how = {"seed": seed, "accumulate": options.accumulate, "clip": options.clip}
    return Fit(model, groups, loss, labels, rate, world, dtype, **how)


def classify(
    backbone: ViT,
    data: str | Path,
    *,
    output: str | Path | None = None,
    world: World | None = None,
    say: Callable[[str], None] = lambda text: None,
    command: str | None = None,
    **options,
) -> dict:
    """Train classifiers on a backbone, one for each seed, and evaluate them; returns the content of classify.json.

    Args:
        backbone: is copied, not changed.
        data: a folder with ``train``, ``val`` and optionally ``test``: class folders, images with ``labels.csv``,
            or tar shards with ``.cls`` members.
        output: the folder for classify.json, checkpoints and features; None = nothing is written, features are in
            memory, nothing can be resumed.
        world: the ranks that share the work, with an output; None = this process alone.
        say: called with lines about the progress.
        command: the command line, recorded in the result.
        **options: fields of `fastalign.evaluation.options.ImageOptions`: head, seeds, unfreeze, epochs, lr...

    Raises:
        UserError: bad data or options; the message names the command's flag.
    """
    chosen = ImageOptions(**options).resolved()
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    world = world or World(0, 1, torch.device(device))
    splits, classes = open_image_splits(data, world, say)
    size, parts = chosen.batch_size, chosen.accumulate * world.size if chosen.on_images else 1
    if size % parts:
        raise UserError(f"--batch-size {size} must be a multiple of --accumulate x ranks = {parts}")
    if size > (images := len(splits["train"].source)):
        raise UserError(f"--batch-size {size} is more than the {images} images of train/: lower it")
    described = {name: split.facts() for name, split in splits.items()}
    about = {"root": str(data), "splits": described, "classes": classes}
    facts = {"command": command, **_facts(backbone, chosen, about), "ranks": world.size}
    folder = Path(output) if output else None
    if folder:
        check_output(folder / RESULTS, {key: facts[key] for key in ("settings", "data")})
    dtype = compute_dtype(chosen.precision, world.device)
    identity = {key: facts[key] for key in ("settings", "backbone", "data", "ranks")}
    job = Job(backbone, splits, len(classes), chosen, world, dtype, say, folder, identity)
    with report_rank_error(world.rank):
        results = (train_on_images if chosen.on_images else train_on_features)(job)
    facts |= _outcome(results, facts["reported"], world)
    if folder and world.main:
        write_results(folder / RESULTS, facts)
    world.barrier()
    return facts


def _facts(vit: ViT, options: ImageOptions, data: dict) -> dict:
    """The part of the results that is known before training starts."""
    reads = "the class token" if vit.spec.class_token else "the mean of the patches"
    reported, selection = "val", "none, the last epoch: there is no test split"
    if "test" in data["splits"]:
        reported, selection = "test", "the epoch with the best validation top-1 (ties: the first)"
    backbone = {"name": None, "kwargs": {}}
    with suppress(UserError):  # a user's own timm model may have no name
        backbone = dict(vit.recipe)
    backbone |= {"softcap": vit.softcap, "weights": f"{checksum(vit):08x}"}
    backbone["reads"] = reads if options.head == "linear" else "all tokens"
    facts = {"settings": options.facts(), "backbone": backbone, "data": data}
    return {**facts, "reported": reported, "selection": selection}


def _outcome(results: list[dict], split: str, world: World) -> dict:
    """The results of all seeds, with mean and sample standard deviation, and what they were computed on."""
    values = {name: [result[split][name] for result in results] for name in IMAGE_METRICS}
    found = {name: {} if None in of_seeds else mean_and_spread(of_seeds) for name, of_seeds in values.items()}
    over_seeds = {key: {name: each.get(key) for name, each in found.items()} for key in ("mean", "std")}
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    versions = {"fastalign": __version__, "torch": torch.__version__, "device": device}
    return {**over_seeds, "seeds": results, "versions": versions}
