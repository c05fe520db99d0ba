"""Passes over the validation set: its loss, and the scale of the targets."""

import itertools
from collections.abc import Iterator
from contextlib import closing, contextmanager

import torch
from torch import Tensor, nn

from fastalign.data.loader import Loader
from fastalign.training import build
from fastalign.training.hang import WAITING
from fastalign.training.optim import MovingAverage
from fastalign.training.reporter import Reporter
from fastalign.training.run import Run
from fastalign.utils.errors import SharedError
from fastalign.utils.random import EVAL_EPOCH


@contextmanager
def eval_mode(student: nn.Module, average: MovingAverage | None) -> Iterator[None]:
    """The student in eval mode, with the averaged weights if there are any; restored afterwards."""
    modes = {part: part.training for part in student.modules()}
    live = {name: value.clone() for name, value in student.state_dict().items()} if average else None
    try:
        if average:
            student.load_state_dict(average.state)
        student.eval()
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
        if live is not None:
            student.load_state_dict(live)


@torch.no_grad()
def evaluate(run: Run, reporter: Reporter) -> float:
    """The loss over the validation set with its fixed masks, of the averaged weights if there are any."""
    sums = torch.zeros(2, dtype=torch.float64, device=run.world.device)
    with eval_mode(run.objective.student, run.average), run.cached_autocast():
        for batch in reporter.track(run.val.batches(), "validating", len(run.val)):
            run.beat("validating")
            with run.autocast():
                loss = run.objective(batch.images, batch.ids, EVAL_EPOCH)
            sums += torch.stack([loss.double() * len(batch.ids), loss.new_tensor(len(batch.ids)).double()])
    total, count = _sum(run, sums, "val", count=1).tolist()
    return total / count


def _sum(run: Run, sums: Tensor, split: str, *, count: int) -> Tensor:
    """The sums over ranks; SharedError if that of the images, at index `count`, is zero."""
    run.beat(WAITING)
    with run.hang_timer.paused():  # another rank may take longer
        run.world.sum(sums)
    if not sums[count].item():
        place = getattr(run.config.data, split)
        raise SharedError(f"data.{split}={place}: none of its images can be used; name another data set")
    return sums


def measure_target_scale(run: Run, reporter: Reporter) -> None:
    """Set the objective's target scale, and report it: given, or measured for the mean squared error, else 1.

    It is measured on the validation set, or on unaugmented training images.
    """
    given, scale = run.config.loss.target_scale, run.objective.target_scale
    if not isinstance(given, str) or run.config.loss.name != "mse":
        scale.fill_(1.0 if isinstance(given, str) else given)
    elif run.val is not None:
        _measure(run, reporter, run.val, "val", given, len(run.val))
    else:
        loader = build.evaluation_loader(run.config, run.world, run.backbone, run.config.data.train)
        with closing(loader):
            _measure(run, reporter, loader, "train", given, 50)
    reporter.say(f"target scale {scale.item():.4g}: the targets are multiplied by it (loss.target_scale)")


def _measure(run: Run, reporter: Reporter, loader: Loader, split: str, given: str, limit: int) -> None:
    limit = min(int(given.partition(":")[2] or limit), len(loader))
    moments = torch.zeros(3, dtype=torch.float64, device=run.world.device)
    batches = itertools.islice(loader.batches(), limit)
    for batch in reporter.track(batches, "measuring the scale of the targets", limit):
        run.beat("measuring the target scale")
        with run.autocast():
            moments += run.objective.target_moments(batch.images, batch.ids, EVAL_EPOCH)
    run.objective.set_target_scale(_sum(run, moments, split, count=0))
