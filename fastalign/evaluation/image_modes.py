"""The two ways to train: heads on features computed once, or on images that go through the backbone each epoch."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fastalign.backbones.precision import compute_dtype
from fastalign.backbones.vit import ViT
from fastalign.data.loader import Loader
from fastalign.data.transforms import Transform
from fastalign.evaluation.classifier import Classifier, reading_copy
from fastalign.evaluation.image_features import FeatureLoader, extract, fits
from fastalign.evaluation.image_fit import Fit, Task
from fastalign.evaluation.image_heads import LinearHead, make_head
from fastalign.evaluation.image_labels import Split
from fastalign.evaluation.options import Options
from fastalign.training.build import image_constants
from fastalign.training.distributed import World
from fastalign.utils.errors import UserError

_READ_AT_ONCE = 256
"""Images a rank and pass, where features are computed once."""


@dataclass(frozen=True)
class Job:
    """All that both ways need."""

    backbone: ViT
    splits: dict[str, Split]
    classes: int
    options: Options
    world: World
    say: Callable[[str], None]
    folder: Path
    "the same on all ranks"
    identity: dict | None
    "plain values that a checkpoint must share; None = no checkpoints"

    @property
    def dtype(self) -> torch.dtype:
        """What the backbone and the heads compute in."""
        return compute_dtype(self.options.precision, self.world.device)

    def task(self, loaders: dict) -> Task:
        """What a seed's training is given."""
        labels = {name: split.labels.to(self.world.device) for name, split in self.splits.items()}
        return Task(loaders, labels, self.classes, self.dtype, self.backbone.spec.depth)


def check_batch(options: Options, images: int, world: World) -> None:
    """Refuse a batch that the data or the ranks cannot fill.

    Raises:
        UserError: it is larger than the training split, or cannot be shared evenly.
    """
    parts = options.accumulate * world.size if options.live else 1
    if options.batch_size % parts:
        raise UserError(
            f"--batch-size {options.batch_size} must be a multiple of --accumulate x ranks = {parts}: change it"
        )
    if options.batch_size > images:
        raise UserError(
            f"--batch-size {options.batch_size} is more than the {images} images of train/: lower it"
        )


def train_on_features(job: Job) -> list[dict]:
    """Frozen backbone: all ranks compute its features together, once; then each rank trains its share of the seeds.

    Returns:
        What `Fit.run` says, a seed each, in their order.
    """
    options, world = job.options, job.world
    features = _features(job)
    statistics = features["train"]
    solo = World(0, 1, world.device)
    for name, values in features.items():
        if world.device.type == "cuda" and fits(values, world.device, options.memory_share):
            features[name] = values.to(world.device)
    done, failure = [], None
    for seed in options.seeds[world.rank :: world.size]:
        common = {"batch_size": options.batch_size, "device": world.device, "seed": seed}
        loaders = {
            name: FeatureLoader(values, train=name == "train", **common) for name, values in features.items()
        }
        torch.manual_seed(seed)
        head = make_head(options.head, job.backbone, job.classes)
        if isinstance(head, LinearHead):
            head.standardise(statistics)
        fit = Fit(head.to(world.device), job.task(loaders), options, seed=seed, world=solo)
        try:
            done.append(fit.run())
        except UserError as error:  # the other ranks wait for this one
            failure = str(error)
            break
        val = done[-1]["val"]["top1"]
        job.say(f"seed {seed}: val top-1 {100 * val:.2f}% after epoch {done[-1]['epoch']}")
    parts = world.gather((done, failure))
    failures = [message for _, message in parts if message is not None]
    if failures:
        raise UserError(failures[0])
    found = {result["seed"]: result for results, _ in parts for result in results}
    return [found[seed] for seed in options.seeds]


def _features(job: Job) -> dict[str, Tensor]:
    """What the head reads of every image, by split."""
    vit = reading_copy(job.backbone, job.options.head).to(job.world.device)
    found = {}
    for name, split in job.splits.items():
        job.say(f"{name}: features of {len(split.source)} images")
        loader = _loader(job, name, Transform(crop="eval", **image_constants(vit)), _READ_AT_ONCE)
        try:
            found[name] = extract(
                vit,
                job.options.head,
                loader,
                job.world,
                dtype=job.dtype,
                folder=job.folder,
                share=job.options.memory_share,
            )
            job.world.barrier()
        finally:
            loader.close()
    return found


def train_on_images(job: Job) -> list[dict]:
    """Images go through the backbone, augmented, each epoch; all ranks share each seed's batches.

    Returns:
        What `Fit.run` says, a seed each, in their order.
    """
    options, world = job.options, job.world
    ranked = options.batch_size // (options.accumulate * world.size)
    constants = image_constants(job.backbone)
    training = Transform(
        crop=options.crop, color_jitter=options.color_jitter, randaugment=options.randaugment, **constants
    )
    statistics = None
    if options.head == "linear" and not options.unfreeze:
        alone = replace(job, splits={"train": job.splits["train"]})
        statistics = _features(alone)["train"]
    results = []
    with ExitStack() as stack:
        loaders = {}
        for name in job.splits:
            if name != "train":
                loaders[name] = _loader(job, name, Transform(crop="eval", **constants), ranked)
                stack.callback(loaders[name].close)
        for seed in options.seeds:
            loaders["train"] = _loader(
                job,
                "train",
                training,
                ranked,
                train=True,
                seed=seed,
                accumulate=options.accumulate,
                mixup=options.mixup,
                cutmix=options.cutmix,
            )
            stack.callback(loaders["train"].close)
            results.append(_fit(job, dict(loaders), seed, statistics))
            loaders["train"].close()
    return results


def _fit(job: Job, loaders: dict[str, Loader], seed: int, statistics: Tensor | None) -> dict:
    torch.manual_seed(seed)
    model: nn.Module = Classifier(job.backbone, job.options.head, job.classes, unfreeze=job.options.unfreeze)
    model.backbone.grad_checkpointing = job.options.grad_checkpointing
    if statistics is not None:
        model.head.standardise(statistics)
    resumable = job.identity is not None
    fit = Fit(
        model.to(job.world.device),
        job.task(loaders),
        job.options,
        seed=seed,
        world=job.world,
        say=job.say,
        folder=job.folder / "classify" / f"seed-{seed}" if resumable else None,
        identity=job.identity,
    )
    return fit.run()


def _loader(
    job: Job, name: str, transform: Transform, batch_size: int, *, train: bool = False, **more
) -> Loader:
    """The loader of a split for this rank."""
    return Loader(
        job.splits[name].source,
        transform,
        batch_size=batch_size,
        device=job.world.device,
        dtype=job.dtype,
        rank=job.world.rank,
        world_size=job.world.size,
        train=train,
        threads=job.options.threads,
        **more,
    )
