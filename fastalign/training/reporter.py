"""Reporting of a run: metrics to files and services, progress and a few lines to the terminal."""

import importlib
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from fastalign import __version__
from fastalign.training.build import teacher_of
from fastalign.training.metrics import Speed, drop_later_lines, plain_number
from fastalign.training.run import Run
from fastalign.utils.errors import UserError
from fastalign.utils.files import wrap_io_errors

_Item = TypeVar("_Item")
LINE_SECONDS = 10  # at least, between two progress lines where there is no terminal


class Reporter:
    """Metrics, a line of JSON per step in the run folder, and progress: a bar on a terminal, plain lines elsewhere.

    Values stay on the device until they are flushed, so that the host never waits for a step. `step`: the present
    step; `evaluated`: whether it is evaluated; `total`: the last step; `epoch`: updates between two evaluations;
    `main`: rank 0, other ranks are silent.
    """

    def __init__(
        self,
        folder: Path,
        speed: Speed | None = None,
        *,
        step: int = 0,
        evaluated: bool = True,
        total: int = 0,
        epoch: int = 1,
        main: bool = True,
        sinks: Sequence[str] = (),
    ):
        self.main, self.total, self.epoch, self.speed = main, total, epoch, speed
        self._pending: list[dict] = []
        self._bar, self._text, self._shown, self._announced = None, "", 0.0, False
        self._first: tuple[int, float] | None = None  # step and time of the first update
        self._evaluation = 0.0  # seconds of the last evaluation
        if not main:
            return
        self._path = folder / "metrics.jsonl"
        if self._path.exists():
            drop_later_lines(self._path, step or -1, evaluated=evaluated)
        self._file = self._path.open("a")
        self._sinks = [_open_sink(sink, folder, step or -1) for sink in sinks]
        if sys.stderr.isatty():
            # Fits 80 columns: bar, steps, figures, time left.
            columns = [BarColumn(bar_width=12), MofNCompleteColumn(), TextColumn("{task.description}")]
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=total, completed=step)
            self._bar.start()

    def say(self, text: str) -> None:
        """Print lines, above the progress bar if there is one."""
        if self._bar and text:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        elif self.main and text:
            print(text, flush=True)

    def track(self, items: Iterable[_Item], text: str, total: int) -> Iterator[_Item]:
        """Iterate with a progress bar, or with a line from time to time where there is no terminal."""
        shown = time.monotonic()
        task = self._bar and self._bar.add_task(text, total=total)
        try:
            for number, item in enumerate(items, 1):
                yield item
                if self._bar:
                    self._bar.update(task, completed=number)
                elif number < total and time.monotonic() - shown > LINE_SECONDS:
                    shown = time.monotonic()
                    self.say(f"{text}: {number} of {total} batches")
        finally:
            if self._bar:
                self._bar.remove_task(task)
                self._bar.refresh()

    def update(self, step: int) -> None:
        """Advance the bar after an update, which may still be running on the device."""
        self._first = self._first or (step, time.monotonic())
        if self._bar:
            left = f" {duration(left)} left" if (left := self._left(step)) else ""
            self._bar.update(self._task, completed=step, description=f"{self._text}{left}")

    def _left(self, step: int) -> float:
        """Seconds to the end of the run; 0 before the second update."""
        first, since = self._first or (step, 0.0)
        if step <= first:
            return 0.0
        updates = (time.monotonic() - since) / (step - first) * (self.total - step)
        return updates + self._evaluation * (-(-self.total // self.epoch) - step // self.epoch)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Time an evaluation and its checkpoint, apart from the updates."""
        started = time.monotonic()
        yield
        self._evaluation = time.monotonic() - started
        if self._first:
            self._first = self._first[0], self._first[1] + self._evaluation

    def add(self, **values) -> None:
        """Hold a line until the next flush; values may be tensors on the device."""
        if self.main:
            self._pending.append(values)

    def flush(self) -> None:
        """Fetch and write the pending lines, training lines with the interval's speed, and show the last one."""
        if not self._pending:
            return
        lines = [{key: plain_number(value) for key, value in line.items()} for line in self._pending]
        self._pending.clear()
        training = [line for line in lines if "loss" in line and self.speed]
        if training:
            figures = self.speed.measure()  # after the fetch, when the device has done the work
            for line in training:
                line |= figures
        with wrap_io_errors(self._path):
            self._file.writelines(json.dumps(line) + "\n" for line in lines)
            self._file.flush()
        for line in lines:
            for sink in self._sinks:
                sink({k: v for k, v in line.items() if k != "step" and v is not None}, line["step"])
        if training:
            self._show(training[-1])

    def _show(self, line: dict) -> None:
        step, left = line["step"], self._left(line["step"])
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        self._text = (
            f"loss {loss}  {line['images_per_second']:.0f} images/s  data wait {line['data_wait']:.1%}"
        )
        if left and not self._announced:
            self._announced = True
            self.say(f"expected end: {clock(left)}, in {duration(left)}")
        if self._bar:
            self.update(step)
        elif step == self.total or time.monotonic() - self._shown > LINE_SECONDS:
            self._shown = time.monotonic()
            remaining = f"  {duration(left)} left" if left else ""
            self.say(f"step {step}/{self.total}  epoch {line['epoch']}  {self._text}{remaining}")

    def close(self) -> None:
        """Remove the bar, write pending lines and close the file."""
        if self._bar:
            self._bar.stop()
        if self.main:
            self.flush()
            with wrap_io_errors(self._path):
                os.fsync(self._file.fileno())
                self._file.close()


def _open_sink(sink: str, folder: Path, step: int) -> Callable[[dict, int], None]:
    kind, _, project = sink.partition(":")
    try:
        module = importlib.import_module("wandb" if kind == "wandb" else "torch.utils.tensorboard")
    except ImportError:
        raise UserError(f"log.to=[{sink}] needs a package: pip install {kind}") from None
    if kind == "wandb":
        # Resuming in the same folder continues the same run; two folders of one name are two runs.
        identity = f"{folder.name}-{zlib.crc32(str(folder.resolve()).encode()):08x}"
        run = module.init(project=project, name=folder.name, id=identity, dir=str(folder), resume="allow")
        return lambda values, step: run.log(values, step=step)
    writer = module.SummaryWriter(str(folder), purge_step=step + 1)

    def write(values: dict, step: int) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return write


def duration(seconds: float) -> str:
    """A time span as 45 s, 12 min or 3 h 20 min."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def clock(seconds: float) -> str:
    """The local time this many seconds from now: 15:42, with the date if it is another day."""
    end, now = time.localtime(time.time() + seconds), time.localtime()
    return time.strftime("%H:%M" if end[:3] == now[:3] else "%a %d %b, %H:%M", end)


def setup_lines(run: Run) -> list[str]:
    """Lines about hardware, backbone and batch of a run."""
    config, world, spec, optim = run.config, run.world, run.backbone.spec, run.config.optim
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    parameters = sum(p.numel() for p in run.objective.student.encoder.parameters())
    cap, rows, columns = config.student.softcap, *spec.grid
    teacher, weights, _ = teacher_of(config)
    other = (teacher, weights) != (config.student.name, config.student.weights)
    return [
        f"fastalign {__version__}, torch {torch.__version__}, {device}, {world.size} rank{'s' * (world.size > 1)}, "
        f"{optim.accumulate} pass{'es' * (optim.accumulate > 1)} per update",
        *run.notes,
        f"backbone: {config.student.name}, {parameters / 1e6:.1f} M parameters, {rows} x {columns} patches of "
        f"{' x '.join(map(str, spec.image_size))} pixels, soft-cap {cap or 'none'}, weights {config.student.weights}",
        *([f"teacher: {teacher}, weights {weights}"] if other else []),
        f"batch: {optim.batch_size} images, {optim.batch_size // (world.size * optim.accumulate)} per rank and pass",
    ]


def start_lines(run: Run) -> list[str]:
    """Lines about setup, data, length and first step of a run."""
    epochs, size = run.config.optim.epochs, run.config.optim.batch_size
    images, epoch = len(run.train.source), run.epoch_steps * size
    at = f"step {run.state.step} of {run.last_step}"
    if run.finished:
        return [f"{run.folder} is finished: {at}, nothing to train"]
    return [
        *setup_lines(run),
        f"data: {images} images"
        + (f", {images - epoch} left out in each epoch" if images > epoch else "")
        + (f"; {len(run.val.source)} for validation" if run.val else "; none for validation"),
        f"length: {epochs} epoch{'s' * (epochs > 1)} of {run.epoch_steps} updates"
        + (f", stopped after {run.last_step} updates" if run.last_step < run.total_steps else ""),
        f"resuming {run.folder} at {at}" if run.state.step else f"new run in {run.folder}",
    ]


def end_lines(run: Run) -> list[str]:
    """The path of the aligned backbone, and commands to use it."""
    if not (run.folder / "backbone.json").exists():
        why = "warning: no backbone was written, because no validation loss was finite: lower optim.lr"
        return [] if run.config.student.freeze else [why]
    best, place = run.state.best if run.val and not run.config.probe.best else None, run.folder
    first, warning = run.state.first_val_loss, []
    if None not in (best, first) and best > first:
        rise = f"from {first:.4g} before training to {best:.4g}"
        warning = [f"warning: the validation loss rose {rise}: lower optim.lr"]
    return [
        *warning,
        f"aligned backbone: {place / 'backbone.safetensors'}"
        + ("" if best is None else f", validation loss {best:.4f}"),
        "next:",
        f"  fastalign probe --backbone {place} --before --data coco:PATH",
        f"  fastalign export {place} --to timm",
        f"  fastalign report {place}",
    ]
