"""Passes over the validation set: its loss, and the scale of the targets."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastalign.training import build
from fastalign.training.hang import WAITING
from fastalign.training.optim import MovingAverage
from fastalign.training.run import Run
from fastalign.utils.errors import SharedError
from fastalign.utils.random import EVAL_EPOCH

Track = Callable[[Iterable, str, int], Iterable]  # `Reporter.track`


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
def evaluate(run: Run, track: Track) -> float:
    """The loss over the validation set with its fixed masks, of the averaged weights if there are any."""
    sums = torch.zeros(2, dtype=torch.float64, device=run.world.device)
    with eval_mode(run.objective.student, run.average), run.unsharded(), run.cached_autocast():
        for batch in track(run.val.batches(), "validating", len(run.val)):
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


def measure_target_scale(run: Run, track: Track) -> None:
    """Set the objective's target scale: given, or measured for the mean squared error, else 1.

    It is measured on the validation set, or on unaugmented training images.
    """
    scale, objective = run.config.loss.target_scale, run.objective
    if not isinstance(scale, str) or run.config.loss.name != "mse":
        objective.target_scale.fill_(1.0 if isinstance(scale, str) else scale)
        return
    loader, split, limit = run.val, "val", None
    if loader is None:
        loader = build.evaluation_loader(run.config, run.world, run.backbone, run.config.data.train)
        split, limit = "train", 50
    limit = int(scale.partition(":")[2] or limit or len(loader))
    moments = torch.zeros(3, dtype=torch.float64, device=run.world.device)
    batches, count = itertools.islice(loader.batches(), limit), min(limit, len(loader))
    for batch in track(batches, "measuring the scale of the targets", count):
        run.beat("measuring the target scale")
        with run.autocast():
            moments += objective.target_moments(batch.images, batch.ids, EVAL_EPOCH)
    if loader is not run.val:
        loader.close()
    objective.set_target_scale(_sum(run, moments, split, count=0))
