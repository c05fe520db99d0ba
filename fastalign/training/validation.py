"""Passes over the validation set: its loss, and the scale of the targets."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fastalign.training import build
from fastalign.training.hang import WAITING
from fastalign.training.optim import MovingAverage
from fastalign.training.run import Run
from fastalign.utils.errors import SharedError
from fastalign.utils.random import EVAL_EPOCH

Track = Callable[[Iterable, str, int], Iterable]
"""Shows the progress of an iteration: `Reporter.track`."""


def _untracked(items: Iterable, text: str, total: int) -> Iterable:
    return items


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
def evaluate(run: Run, track: Track = _untracked) -> float:
    """The loss over the validation set with its fixed masks, of the averaged weights if there are any."""
    sums = torch.zeros(2, dtype=torch.float64, device=run.world.device)
    with eval_mode(run.objective.student, run.average), run.unsharded(), run.cached_autocast():
        for batch in track(run.val.batches(), "validating", len(run.val)):
            run.beat("validating")
            with run.autocast():
                loss = run.objective(batch.images, batch.ids, EVAL_EPOCH)
            sums += torch.stack([loss.double() * len(batch.ids), loss.new_tensor(len(batch.ids)).double()])
    run.beat(WAITING)
    with run.hang_timer.paused():  # another rank may validate for longer
        total, count = run.world.sum(sums).tolist()
    _check_count(run, count)
    return total / count


def _check_count(run: Run, count: float) -> None:
    if not count:
        key = "train" if run.val is None else "val"
        place = getattr(run.config.data, key)
        raise SharedError(f"data.{key}={place}: none of its images can be used; name another data set")


def measure_target_scale(run: Run, track: Track = _untracked) -> None:
    """Set the objective's target scale: measured, given, or 1, by the configuration."""
    scale = run.config.loss.target_scale
    if not isinstance(scale, str):
        run.objective.target_scale.fill_(scale)
    elif run.config.loss.name == "mse":
        moments = torch.zeros(3, dtype=torch.float64, device=run.world.device)
        batches, count = build.scale_batches(run.config, run.world, run.backbone, run.val)
        for batch in track(batches, "measuring the scale of the targets", count):
            run.beat("measuring the target scale")
            with run.autocast():
                moments += run.objective.target_moments(batch.images, batch.ids, EVAL_EPOCH)
        run.beat(WAITING)
        with run.hang_timer.paused():
            run.world.sum(moments)
            _check_count(run, moments[0].item())
        run.objective.set_target_scale(moments)
    else:
        run.objective.target_scale.fill_(1.0)
