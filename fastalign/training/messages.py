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
