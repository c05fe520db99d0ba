"""What a run prints besides its progress: its start and its end, durations and times."""

import time

import torch

from fastalign import __version__
from fastalign.training.build import teacher_of
from fastalign.training.run import Run


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


def setup_lines(run: Run) -> list[str]:
    """What a run trains with, one fact per line."""
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
    """What a run is about to do, one fact per line."""
    epochs, size = run.config.optim.epochs, run.config.optim.batch_size
    images, epoch = len(run.train.source), run.epoch_steps * size
    return [
        *setup_lines(run),
        f"data: {images} images"
        + (f", of which each epoch leaves out {images - epoch}" if images > epoch else "")
        + (f"; {len(run.val.source)} for validation" if run.val else "; none for validation"),
        f"length: {epochs} epoch{'s' * (epochs > 1)} of {run.epoch_steps} updates"
        + (f", stopped after {run.last_step} updates" if run.last_step < run.total_steps else ""),
    ]


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
