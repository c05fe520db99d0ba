"""Training image classifiers, one for each seed: heads on features, heads on augmented images, fine-tuning."""

import math
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastalign.backbones.precision import compute_dtype
from fastalign.backbones.vit import ViT
from fastalign.data.loader import Batch, Loader
from fastalign.data.transforms import Transform
from fastalign.evaluation.datasets import ImageSplit
from fastalign.evaluation.features import as_tensor, frozen_encoder, read_features
from fastalign.evaluation.fit import FeatureLoader, Fit, predict
from fastalign.evaluation.heads import (
    Classifier,
    StandardizedLinear,
    copy_for_head,
    head_input,
    make_image_head,
    parameter_groups,
)
from fastalign.evaluation.metrics import ImageCounts
from fastalign.evaluation.options import ImageOptions
from fastalign.evaluation.results import difference
from fastalign.training.build import image_constants
from fastalign.training.checkpoint_files import Checkpoints, snapshot
from fastalign.training.distributed import World, on_first_rank
from fastalign.training.optim import learning_rate
from fastalign.utils.errors import UserError
from fastalign.utils.files import remove_leftovers
from fastalign.utils.random import permutation

_READ_BATCH = 256
_GPU_SHARE = 0.25  # of the free GPU memory, for the features of a split

Loaders = dict[str, Loader | FeatureLoader]


@dataclass(frozen=True)
class Job:
    """What the trainings of all seeds share."""

    backbone: ViT
    splits: dict[str, ImageSplit]
    classes: int
    options: ImageOptions  # resolved
    world: World
    say: Callable[[str], None]
    folder: Path | None  # for checkpoints and features; the same on all ranks; None = neither is in files
    identity: dict  # plain values that a checkpoint must share

    @property
    def dtype(self) -> torch.dtype:
        """Of autocast."""
        return compute_dtype(self.options.precision, self.world.device)

    def open_loader(self, split: str, transform: Transform, batch_size: int, **more) -> Loader:
        """A loader of a split for this rank, in order unless `train` is given."""
        world, source = self.world, self.splits[split].source
        more = {"train": False, "dtype": self.dtype, "threads": self.options.threads} | more
        more |= {"device": world.device, "rank": world.rank, "world_size": world.size}
        return Loader(source, transform, batch_size=batch_size, **more)


def mixed_loss(logits: Tensor, labels: Tensor, *, weight: float, smoothing: float) -> Tensor:
    """Cross-entropy of logits [B, C] against labels [B] mixed with the same in reverse order, at 1 - `weight`."""
    logits = logits.float()
    own = functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    if weight == 1:
        return own
    other = functional.cross_entropy(logits, labels.flip(0), label_smoothing=smoothing)
    return weight * own + (1 - weight) * other


def update_best(
    best: dict | None, epoch: int, epochs: int, measure: Callable[[str], dict], *, has_test: bool
) -> tuple[dict | None, dict]:
    """After an epoch (from 1): what is reported if training ends here, and the validation metrics.

    With a test split, the first epoch with the best validation top-1; without one, the last epoch.
    """
    val = measure("val")
    if not has_test:
        return ({"epoch": epoch, "val": val} if epoch == epochs else None), val
    if best is None or val["top1"] > best["val"]["top1"]:
        return {"epoch": epoch, "val": val, "test": measure("test")}, val
    return best, val


def train_on_features(job: Job) -> list[dict]:
    """Frozen backbone: all ranks compute its features once; then each rank trains its share of the seeds."""
    options, world, device = job.options, job.world, job.world.device
    features = {name: _read(job, name) for name in job.splits}
    on_cpu = features["train"]
    if device.type == "cuda":
        for name, values in features.items():
            if values.nbytes <= _GPU_SHARE * torch.cuda.mem_get_info(device)[0]:
                features[name] = values.to(device)
    done = {}
    for seed in options.seeds[world.rank :: world.size]:
        loaders = {name: FeatureLoader(each, options.batch_size, device) for name, each in features.items()}
        loaders["train"].order = lambda epoch, seed=seed: permutation(len(on_cpu), seed=seed, epoch=epoch)
        torch.manual_seed(seed)
        head = make_image_head(options.head, job.backbone, job.classes)
        if isinstance(head, StandardizedLinear):
            head.standardize(on_cpu)
        done[seed] = found = train_seed(job, head.to(device), loaders, seed, World(0, 1, device))
        job.say(f"seed {seed}: val top-1 {100 * found['val']['top1']:.2f}% after epoch {found['epoch']}")
    results = {seed: result for part in world.gather(done) for seed, result in part.items()}
    return [results[seed] for seed in options.seeds]


def train_on_images(job: Job) -> list[dict]:
    """Augmented images go through the backbone in each epoch; all ranks share the batches of each seed."""
    options, world = job.options, job.world
    size = options.batch_size // (options.accumulate * world.size)
    constants = image_constants(job.backbone)
    evaluated = Transform(crop="eval", **constants)
    augment = {name: getattr(options, name) for name in ("crop", "color_jitter", "randaugment")}
    mix = {name: getattr(options, name) for name in ("accumulate", "mixup", "cutmix")}
    standardize = options.head == "linear" and not options.unfreeze
    statistics = _read(job, "train") if standardize else None
    results = []
    for seed in options.seeds:
        loaders = {name: job.open_loader(name, evaluated, size) for name in job.splits if name != "train"}
        training = Transform(**augment, **constants)
        loaders["train"] = job.open_loader("train", training, size, train=True, seed=seed, **mix)
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


def train_seed(job: Job, model: nn.Module, loaders: Loaders, seed: int, world: World) -> dict:
    """Trains a model; returns the seed, what `update_best` selected, and a line for each epoch as "curve"."""
    options, labels = job.options, {name: split.labels for name, split in job.splits.items()}
    fit = make_fit(model, len(loaders["train"]), labels["train"], options, seed, world, job.dtype)
    epochs, updates = options.epochs, len(loaders["train"]) // options.accumulate

    def say(text: str) -> None:
        if options.live:
            job.say(f"seed {seed} {text}")

    def measure(split: str) -> dict:
        counts = ImageCounts(job.classes, world.device)
        for logits, batch in predict(model, loaders[split].batches(), world.device, job.dtype):
            counts.add(logits, labels[split][batch.ids].to(world.device))
        return counts.results(world)

    progress, checkpoints = {"best": None, "curve": []}, None
    if options.live and job.folder:
        checkpoints = Checkpoints(job.folder / "classify" / f"seed-{seed}" / "checkpoints", keep=1)
        resume(fit, checkpoints, progress, job.identity)
        if fit.step:
            say(f"resumes after epoch {fit.step // updates} of {epochs}")
    for epoch in range(fit.step // updates + 1, epochs + 1):
        loss = fit.epoch(loaders["train"].batches(epoch - 1), updates, say)
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} in epoch {epoch} of seed {seed}: lower --lr, or set --clip")
        best, val = update_best(progress["best"], epoch, epochs, measure, has_test="test" in loaders)
        figures = {"train_loss": loss, "val_loss": val["loss"], "val_top1": val["top1"]}
        progress["best"] = best
        progress["curve"].append({"epoch": epoch, **figures})
        say(f"epoch {epoch}/{epochs}  loss {loss:.4f}  val top-1 {100 * val['top1']:.2f}%")
        if checkpoints:
            save(fit, checkpoints, progress, job.identity)
    if checkpoints:
        on_first_rank(world, checkpoints.wait)
    return {"seed": seed, **progress["best"], "curve": progress["curve"]}


def save(fit: Fit, checkpoints: Checkpoints, progress: dict, identity: dict) -> None:
    """Writes a checkpoint in the background, without frozen weights, which are the backbone's own."""
    on_first_rank(fit.world, checkpoints.wait)
    if fit.world.main:
        frozen = {name for name, value in fit.module.named_parameters() if not value.requires_grad}
        weights = {name: value for name, value in fit.module.state_dict().items() if name not in frozen}
        state = {"weights": weights, "optimizer": fit.optimizer.state_dict(), "step": fit.step}
        checkpoints.save(snapshot({**state, "identity": identity, "progress": progress}), fit.step)


def resume(fit: Fit, checkpoints: Checkpoints, progress: dict, identity: dict) -> None:
    """Sets a fit and its progress to the newest checkpoint, if there is one; UserError if it has another identity."""
    if fit.world.main:
        remove_leftovers(checkpoints.folder)
    step, state, _ = checkpoints.resume(fit.world)
    if step is None:
        return
    if changed := difference(state.get("identity", {}), identity):
        raise UserError(
            f"{checkpoints.folder}: {changed}: set it back, remove the folder, or choose another --output"
        )
    fit.module.load_state_dict(state["weights"], strict=False)
    fit.optimizer.load_state_dict(state["optimizer"])
    fit.step = step
    progress |= state["progress"]


def make_fit(
    model: nn.Module,
    batches: int,
    labels: Tensor,
    options: ImageOptions,
    seed: int,
    world: World,
    dtype: torch.dtype,
) -> Fit:
    """The training loop of a head or a `Classifier`: batches per epoch, labels of all training images."""
    steps, epochs, smoothing = batches // options.accumulate, options.epochs, options.label_smoothing
    groups = parameter_groups(model, decay=options.layer_decay or 1.0, weight_decay=options.weight_decay)
    schedule = {"total": epochs * steps, "warmup": round(options.warmup_epochs * steps)}
    rate = partial(learning_rate, **schedule, lr=options.lr, min_lr=options.min_lr)

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        targets = labels[batch.ids].to(world.device)
        return mixed_loss(logits, targets, weight=batch.weight, smoothing=smoothing)

    how = {"seed": seed, "accumulate": options.accumulate, "clip": options.clip}
    return Fit(model, groups, loss, rate, world, dtype, **how)


def _read(job: Job, split: str) -> Tensor:
    """What the head reads of every image of a split: [n, D] float32, or [n, T, D] in the compute dtype."""
    head, data = job.options.head, job.splits[split]
    vit = copy_for_head(job.backbone, head).to(job.world.device)
    encoder, tokens = frozen_encoder(vit), () if head == "linear" else (vit.spec.prefix + vit.spec.patches,)
    job.say(f"{split}: features of {len(data.source)} images")
    kind = np.uint16 if tokens and job.dtype == torch.bfloat16 else np.float32
    layout = {"features": ((len(data.source), *tokens, vit.embed_dim), kind)}
    encode = lambda images: [head_input(vit, encoder.encode(images)[0], head)]  # noqa: E731
    loader = job.open_loader(split, Transform(crop="eval", **image_constants(vit)), _READ_BATCH)
    arrays = read_features(layout, encode, loader, job.world, job.dtype, folder=job.folder)
    return as_tensor(arrays["features"])
