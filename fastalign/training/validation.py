"""Passes over the validation set: its loss, and the scale of the targets."""

import itertools
from contextlib import closing, nullcontext

import torch
from torch import Tensor

from fastalign.backbones.precision import autocast
from fastalign.training.build import evaluation_loader
from fastalign.training.command import WAITING
from fastalign.training.faults import report_bad_validation_samples
from fastalign.training.reporter import Reporter
from fastalign.training.run import Run
from fastalign.utils.errors import SharedError
from fastalign.utils.random import EVAL_EPOCH


def validate(run: Run, reporter: Reporter, epoch: int) -> None:
    """Evaluate on the validation set and report the loss."""
    step, loss = run.state.step, evaluate(run, reporter)
    run.state.val_loss = loss
    if step == 0:
        run.state.first_val_loss = loss
    report_bad_validation_samples(run, reporter)
    reporter.add(step=step, epoch=epoch, val_loss=loss)
    reporter.flush()
    reporter.say(f"step {step}: validation loss {loss:.4f}")


@torch.no_grad()
def evaluate(run: Run, reporter: Reporter) -> float:
    """The loss over the validation set with its fixed masks, computed with the averaged weights if there are any."""
    student, sums = run.objective.student, torch.zeros(2, dtype=torch.float64, device=run.world.device)
    if run.average:
        live = {name: value.clone() for name, value in student.state_dict().items()}
        student.load_state_dict(run.average.state)
    student.eval()
    with run.cached_autocast():
        for batch in reporter.track(run.val.batches(), "validating", len(run.val)):
            run.beat("validating")
            with autocast(run.world.device, run.dtype):
                loss = run.objective(batch.images, batch.ids, EVAL_EPOCH)
            sums[0] += len(batch.ids)
            sums[1] += loss.double() * len(batch.ids)
    student.train()
    if run.average:
        student.load_state_dict(live)
    count, total = _sum(run, sums, "val").tolist()
    return total / count


def _sum(run: Run, sums: Tensor, split: str) -> Tensor:
    """The sums over ranks; SharedError if the first one, which counts, is zero."""
    run.beat(WAITING)
    with run.hang_timer.paused():  # another rank may take longer
        run.world.sum(sums)
    if not sums[0].item():
        place = getattr(run.config.data, split)
        raise SharedError(f"data.{split}={place}: none of its images can be used; name another data set")
    return sums


def measure_target_scale(run: Run, reporter: Reporter) -> None:
    """Set the objective's target scale, and report it: given, or measured for the mean squared error, else 1.

    It is measured on the validation set, or on unaugmented training images.
    """
    config, given, scale = run.config, run.config.loss.target_scale, run.objective.target_scale
    note = " (loss.target_scale)"
    if not isinstance(given, str) or config.loss.name != "mse":
        scale.fill_(1.0 if isinstance(given, str) else given)
    else:
        split, most = ("train", 50) if run.val is None else ("val", len(run.val))
        opened = nullcontext(run.val)
        if run.val is None:
            opened = closing(evaluation_loader(config, run.world, run.backbone, config.data.train))
        moments = torch.zeros(3, dtype=torch.float64, device=run.world.device)
        with opened as loader:
            limit = min(int(given.partition(":")[2] or most), len(loader))
            batches = itertools.islice(loader.batches(), limit)
            for batch in reporter.track(batches, "measuring the scale of the targets", limit):
                run.beat("measuring the target scale")
                with autocast(run.world.device, run.dtype):
                    moments += run.objective.target_moments(batch.images, batch.ids, EVAL_EPOCH)
        run.objective.set_target_scale(_sum(run, moments, split))
        note = f"; loss.target_scale={scale.item():.9g} skips the measurement for the same teacher, masks and data"
    reporter.say(f"target scale {scale.item():.4g}: the targets are multiplied by it{note}")
