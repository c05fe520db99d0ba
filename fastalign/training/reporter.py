"""What a run says: metrics to their log, and its start, progress and end to the terminal."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from fastalign import __version__
from fastalign.training.build import teacher_of
from fastalign.training.metrics import MetricLog, Speed, SpikeDetector
from fastalign.training.run import Run

_Item = TypeVar("_Item")
LINE_SECONDS = 10
"""Between two lines of progress where there is no terminal, at least."""


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 20 min"""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def clock(seconds: float) -> str:
    """The local time in so many seconds: 15:42, on another day with its date."""
    end, now = time.localtime(time.time() + seconds), time.localtime()
    return time.strftime("%H:%M" if end[:3] == now[:3] else "%a %d %b, %H:%M", end)


class Reporter:
    """A bar on a terminal, plain lines elsewhere; silent unless `main`. `total`, `step`: of the run."""

    def __init__(self, log: MetricLog, *, total: int, step: int, main: bool):
        self.log, self.main, self.total, self.first, self._bar = log, main, total, step, None
        self._spikes, self._shown, self._announced = SpikeDetector(), 0.0, False
        self.start_clock()
        if main and sys.stderr.isatty():
            columns = [BarColumn(bar_width=12), MofNCompleteColumn(), TextColumn("{task.fields[text]}")]
            columns.append(TextColumn("{task.fields[left]}"))  # all fits 80 columns
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("training", total=total, completed=step, text="", left="")
            self._bar.start()

    def start_clock(self) -> None:
        """Training begins: the time left is estimated from here."""
        self.started = time.monotonic()

    def say(self, text: str) -> None:
        """Print lines that stay."""
        if not text:
            return
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False)
        elif self.main:
            print(text, flush=True)

    def track(self, items: Iterable[_Item], text: str, total: int) -> Iterator[_Item]:
        """Iterate with a bar of its own, or with a line at times where there is no terminal."""
        shown = time.monotonic()
        task = self._bar and self._bar.add_task(text, total=total, text=text, left="")
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

    def update(self, step: int) -> None:
        """Move the bar: an update is done, on the host at least."""
        if self._bar:
            left = self._left(step)
            text = "" if left is None else f"{duration(left)} left"
            self._bar.update(self._task, completed=step, left=text)

    def _left(self, step: int) -> float | None:
        """Seconds to the end of the run, after two updates."""
        done = step - self.first
        return (time.monotonic() - self.started) / done * (self.total - step) if done >= 2 else None

    def flush(self, speed: Speed | None = None) -> None:
        """Write the pending metrics; report compilation, loss spikes, and the newest training line."""
        lines = self.log.flush(speed)
        for line in lines:
            if "compile_seconds" in line:
                hits, misses = line["compile_cache_hits"], line["compile_cache_misses"]
                text = f"compiled in {line['compile_seconds']:.1f} s"
                self.say(f"{text}, {hits} of {hits + misses} graphs from torch's cache")
        training = [line for line in lines if "loss" in line]
        for line in training:
            median = None if line["loss"] is None else self._spikes.update(line["loss"])
            if median is not None:
                jump = f"the loss jumped to {line['loss']:.4f}, from about {median:.4f}"
                self.say(f"step {line['step']}: {jump}")
        if training and self.main:
            self._show(training[-1])

    def _show(self, line: dict) -> None:
        step, left = line["step"], self._left(line["step"])
        speed, wait = f"{line['images_per_second']:.0f} images/s", f"{100 * line['data_wait']:.1f}%"
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        text = f"loss {loss}  {speed}  data wait {wait}"
        if not self._announced and left:
            self._announced = True
            self.say(f"expected end: {clock(left)}, in {duration(left)}")
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        elif step == self.total or time.monotonic() - self._shown > LINE_SECONDS:
            self._shown = time.monotonic()
            remaining = f"  {duration(left)} left" if left else ""
            self.say(f"step {step}/{self.total}  epoch {line['epoch']}  {text}{remaining}")

    def close(self) -> None:
        """Remove the bar and close the log."""
        if self._bar:
            self._bar.stop()
        self.log.close()


def start_lines(run: Run) -> list[str]:
    """What a run is about to do, one fact per line."""
    config, world, spec, optim = run.config, run.world, run.backbone.spec, run.config.optim
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    parameters = sum(p.numel() for p in run.objective.student.encoder.parameters())
    cap, rows, columns = config.student.softcap, *spec.grid
    images, epoch = len(run.train.source), run.epoch_steps * optim.batch_size
    batch = optim.batch_size // (world.size * optim.accumulate)
    teacher = teacher_of(config)
    lines = [
        f"fastalign {__version__}, torch {torch.__version__}, {device}, {world.size} rank{'s' * (world.size > 1)}, "
        f"{optim.accumulate} pass{'es' * (optim.accumulate > 1)} per update",
        *run.notes,
        f"backbone: {config.student.name}, {parameters / 1e6:.1f} M parameters, {rows} x {columns} patches of "
        f"{' x '.join(map(str, spec.image_size))} pixels, soft-cap {cap or 'none'}, weights {config.student.weights}",
        f"data: {images} images"
        + (f", of which each epoch leaves out {images - epoch}" if images > epoch else "")
        + (f"; {len(run.val.source)} for validation" if run.val else "; none for validation"),
        f"batch: {optim.batch_size} images, {batch} per rank and pass",
        f"length: {optim.epochs} epoch{'s' * (optim.epochs > 1)} of {run.epoch_steps} updates"
        + (f", stopped after {run.last_step} updates" if run.last_step < run.total_steps else ""),
    ]
    if teacher[:2] != (config.student.name, config.student.weights):
        lines.insert(-3, f"teacher: {teacher[0]}, weights {teacher[1]}")
    return lines


def end_lines(run: Run) -> list[str]:
    """Where the backbone is, and what to do with it."""
    if not (run.folder / "backbone.json").exists():
        return []
    best, place = run.state.best if run.val and not run.config.probe.best else None, run.folder
    return [
        f"aligned backbone: {place / 'backbone.safetensors'}"
        + ("" if best is None else f", validation loss {best:.4f}"),
        "next:",
        f"  fastalign probe --backbone {place} --before --data coco:PATH",
        f"  fastalign export {place} --to timm",
        f"  fastalign report {place}",
    ]
