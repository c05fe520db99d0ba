"""The probe: train, select and evaluate heads on the patch tokens of frozen backbones, divided among ranks."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from fastalign.backbones.spec import ViTSpec
from fastalign.backbones.vit import ViT
from fastalign.config import Config
from fastalign.evaluation.datasets import open_labelled
from fastalign.evaluation.features import PatchFeatures, read_patch_features
from fastalign.evaluation.fit import FeatureLoader, Fit, Track, check_loss, evaluate, say_progress, untracked
from fastalign.evaluation.heads import HEADS_FOR, make_patch_head
from fastalign.evaluation.label_maps import LabelledImages
from fastalign.evaluation.options import Plan, Recipe
from fastalign.evaluation.results import MultiClassCounts, MultiLabelCounts, patch_loss
from fastalign.training.command import report_rank_error
from fastalign.training.distributed import World, on_first_rank
from fastalign.training.update import learning_rate
from fastalign.utils.errors import UserError, prefixed

_EVALUATION_BATCH = 256
# During training: images of each split at most, evenly chosen; epochs; metrics.
IMAGES, EPOCHS, REPORTED = {"train": 2_000, "val": 1_000}, 3, ("macro_recall", "map", "loss")


@dataclass(frozen=True)
class Task:
    """One head on one set of tokens."""

    head: str
    labels: str
    skip_blocks: int
    seed: int


def fit_head(
    task: Task,
    spec: ViTSpec,
    train: PatchFeatures,
    val: PatchFeatures | None,
    plan: Plan,
    *,
    device: torch.device,
    dtype: torch.dtype,
    track: Track = untracked,
) -> tuple[nn.Module, int, dict]:
    """Train a head on the tokens of a backbone and keep the epoch that is best on `val`, without it the last one.

    Returns the head, the epoch (from 1), and its metrics on `val`, {} without one.
    """
    recipe, size = plan.recipe, plan.recipe.batch_size
    steps = len(train) // size
    total = steps * recipe.epochs

    def order(epoch: int) -> np.ndarray:
        """A permutation of rows, sorted within each batch so that files are read in order."""
        shuffled = np.random.default_rng([task.seed, epoch]).permutation(len(train))
        return np.sort(shuffled[: steps * size].reshape(steps, size), 1).ravel()

    torch.manual_seed(task.seed)
    shape = {"hidden": plan.hidden, "layers": plan.layers}
    head = make_patch_head(task.head, task.labels, spec, train.classes, **shape).to(device)
    groups = [{"params": list(head.parameters()), "factor": 1.0, "weight_decay": recipe.weight_decay}]
    rates = {"lr": recipe.lr, "min_lr": recipe.min_lr, "start": 0.0}
    rate = partial(learning_rate, total=total, warmup=min(recipe.warmup_steps, total // 10), **rates)
    labels = partial(train.labels, kind=task.labels)
    fit = Fit(head, groups, patch_loss, labels, rate, World(0, 1, device), dtype)
    loader = FeatureLoader(train.tokens[task.skip_blocks], size, device, order, torch.float32)
    best, best_score = (head.state_dict(), recipe.epochs, {}), -math.inf
    for epoch in range(1, recipe.epochs + 1):
        fit.epoch(track(loader.batches(epoch), f"epoch {epoch} of {recipe.epochs} of the head", steps), steps)
        if val is None:
            continue
        found = evaluate_head(head, task, val, device=device, dtype=dtype)
        check_loss(found["loss"], f"{task.labels} {task.head} of seed {task.seed} in epoch {epoch}")
        score = found.get(recipe.select, found["macro_recall"])
        score = -math.inf if math.isnan(score) else -score if recipe.select == "loss" else score
        if epoch == 1 or score > best_score:
            best, best_score = (copy.deepcopy(head.state_dict()), epoch, found), score
    state, epoch, found = best
    head.load_state_dict(state)
    return head, epoch, found


def evaluate_head(
    head: nn.Module,
    task: Task,
    features: PatchFeatures,
    *,
    device: torch.device,
    dtype: torch.dtype,
    track: Track = untracked,
) -> dict:
    """The metrics of a head on a split, and its mean `loss` over all predictions (`majority`: labelled patches)."""
    counts = (MultiClassCounts if task.labels == "majority" else MultiLabelCounts)(features.classes, device)
    tokens = features.tokens[task.skip_blocks]
    loader = FeatureLoader(tokens, _EVALUATION_BATCH, device, dtype=torch.float32)
    batches = track(loader.batches(), "evaluation of the head", len(loader))
    evaluate(head, batches, partial(features.labels, kind=task.labels), counts, device, dtype)
    found = counts.results()
    if task.labels != "union":
        found.pop("by_size", None)
    return found


def probe(
    backbones: dict[str, ViT],  # in evaluation mode, by their name in the results
    splits: dict[str, LabelledImages],  # val selects the epoch; others evaluate finished heads
    plans: Sequence[Plan],
    world: World,
    *,
    skip_blocks: Sequence[int] = (0,),
    dtype: torch.dtype = torch.float32,  # of autocast
    say: Callable[[str], None] = lambda text: None,
    **reading,  # as for `read_patch_features`
) -> list[dict]:
    """Train and evaluate every head of the plans on every backbone. Returns the rows of probe.json on every rank."""
    images, largest = len(splits["train"]), max(plan.recipe.batch_size for plan in plans)
    if images < largest:
        raise UserError(f"--batch-size {largest}: the training split has {images} images; lower it")
    reading |= {"skip_blocks": skip_blocks, "track": say_progress(say) if world.main else untracked}
    read = {name: {} for name in backbones}
    for name, split in product(backbones, splits):
        if world.main:
            say(f"{name}: {len(splits[split])} images ({split})")
        read[name][split] = read_patch_features(backbones[name], splits[split], world, dtype=dtype, **reading)
        if not read[name][split].image.any():
            raise UserError(f"the {split} split has only void pixels: check its label maps")
    # The heads of all backbones are divided at once, so that ranks wait for each other only at the end.
    skips = dict.fromkeys(skip_blocks)
    tasks = [
        (name, plan, Task(head, labels, skip, seed))
        for name, plan in product(backbones, plans)
        for skip, labels, head, seed in product(skips, plan.labels, plan.heads, plan.seeds)
        if head in HEADS_FOR[labels]
    ]
    rows, where = {}, {"device": world.device, "dtype": dtype}
    for number in range(world.rank, len(tasks), world.size):
        name, plan, task = tasks[number]
        about = f"{task.labels} {task.head}, {task.skip_blocks} blocks skipped, seed {task.seed}"
        features, spec = read[name], backbones[name].spec
        with report_rank_error(world.rank):
            head, epoch, val = fit_head(task, spec, features["train"], features["val"], plan, **where)
        found = {"val": {key: value for key, value in val.items() if key not in ("per_class", "by_size")}}
        for split in (name for name in splits if name not in ("train", "val")):
            found[split] = evaluate_head(head, task, features[split], **where)
        rows[number] = {"model": name, **asdict(task), "epoch": epoch, **found}
        say(f"{name}: {about}: macro recall {found[list(splits)[-1]]['macro_recall']:.4f}")
    for part in world.gather(rows):
        rows |= part
    return [rows[number] for number in range(len(tasks))]


def open_splits(config: Config, world: World) -> dict[str, LabelledImages]:
    """Parts of the train and val splits of `probe.data` on rank 0, nothing elsewhere; `test` is not opened."""

    def open_parts() -> None:
        for split, most in IMAGES.items():
            with prefixed("probe.data: "):
                data = open_labelled(config.probe.data, split)
            found[split] = data.subset(np.arange(most) * len(data) // most) if len(data) > most else data

    found = {}
    if config.probe.data is not None:
        on_first_rank(world, open_parts)
    return found


def contents(splits: dict[str, LabelledImages]) -> dict[str, list[str]]:
    """The fingerprints of `probe.data`, which a run compares when it resumes."""
    marks = " ".join(f"{split.fingerprint():08x}" for split in splits.values())
    return {"probe.data": [marks]} if marks else {}


def probe_encoder(
    encoder: ViT,
    splits: dict[str, LabelledImages],
    device: torch.device,
    *,
    average: dict[str, Tensor] | None,
    threads: int,
    seed: int,
    dtype: torch.dtype,
    track: Track,
    beat: Callable[[], None],
) -> dict[str, float]:
    """Train a head on an encoder's frozen tokens, in memory, and evaluate its last epoch on val.

    `average`: averaged weights of the student, used instead of the encoder's; `beat` is called at each batch.
    """

    def beating(items: Iterable, text: str, total: int) -> Iterator:
        for item in track(items, f"probe: {text}", total):
            beat()
            yield item

    vit = copy.deepcopy(encoder).eval()  # a copy is not compiled, so no graph of training is compiled again
    if average is not None:
        vit.load_state_dict({name: average[f"encoder.{name}"] for name in vit.state_dict()})
    how = {"dtype": dtype, "track": beating}
    more = {"world": World(0, 1, device), "threads": threads, **how}
    read = {name: read_patch_features(vit, split, **more) for name, split in splits.items()}
    task = Task("transformer", "union", skip_blocks=0, seed=seed)
    plan = Plan(recipe=Recipe(epochs=EPOCHS, batch_size=min(Recipe().batch_size, len(read["train"]))))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        head, *_ = fit_head(task, vit.spec, read["train"], None, plan, device=device, **how)
    scores = evaluate_head(head, task, read["val"], device=device, **how)
    return {name: scores[name] for name in REPORTED}
