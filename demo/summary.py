"""Sums up a training run from its metrics.jsonl: a short table, and the curves as a picture beside it.

python -m demo.summary runs/demo
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from fastalign.errors import UserError


def read_metrics(path: Path) -> tuple[list[dict], list[dict]]:
    """Reads a metrics file; a last line that was cut short by a killed run is left out.

    Args:
        path: one JSON object a line.

    Returns:
        The training lines (those with `loss`) and the validation lines (those with `val_loss`), each by step.
        After a resume a step may occur twice; the later line counts.
    """
    if not path.is_file():
        raise UserError(f"summary: {path} does not exist; name the folder of a run that has started")
    lines = path.read_text().splitlines()
    training, validation = {}, {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            step = entry["step"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise UserError(f"summary: {path}, line {number} is no JSON object with a step") from None
        if "val_loss" in entry:
            validation[step] = entry
        elif "loss" in entry:
            training[step] = entry
    if not validation:
        raise UserError(f"summary: {path} has no validation line yet; let the run reach its first validation")
    return [training[step] for step in sorted(training)], [validation[step] for step in sorted(validation)]


def _median(lines: list[dict], key: str) -> float | None:
    """The middle value of a key over the lines that have it; None where none does."""
    values = [line[key] for line in lines if line.get(key) is not None]
    return median(values) if values else None


def summarise(run: Path, training: list[dict], validation: list[dict]) -> Table:
    """The summary of a run as a two-column table."""
    table = Table(title=str(run), show_header=False)
    first, last = validation[0], validation[-1]
    table.add_row("validation loss at the start", f"{first['val_loss']:.4f}  (step {first['step']})")
    table.add_row("validation loss at the end", f"{last['val_loss']:.4f}  (step {last['step']})")
    table.add_row("steps", str(max(line["step"] for line in training + validation)))
    speed, wait = _median(training, "images_per_second"), _median(training, "data_wait")
    table.add_row("images/s, median", "unknown" if speed is None else f"{speed:.0f}")
    table.add_row(
        "share of time spent waiting for data, median", "unknown" if wait is None else f"{wait:.1%}"
    )
    backbone = run / "backbone.safetensors"
    table.add_row("backbone", str(backbone) if backbone.is_file() else "not saved yet")
    return table


def _series(lines: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a key, over the lines that have it."""
    kept = [line for line in lines if line.get(key) is not None]
    return [line["step"] for line in kept], [line[key] for line in kept]


def plot(path: Path, training: list[dict], validation: list[dict]) -> None:
    """Writes the curves of loss, learning rate and images per second over the steps as a PNG."""
    figure, (losses, rate, speed) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    losses.plot(*_series(training, "loss"), color="tab:blue", alpha=0.7, linewidth=1, label="training")
    losses.plot(*_series(validation, "val_loss"), "o-", color="tab:red", markersize=4, label="validation")
    losses.set_ylabel("loss")
    losses.legend(frameon=False)
    rate.plot(*_series(training, "lr"), color="tab:green")
    rate.set_ylabel("learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    speed.plot(*_series(training, "images_per_second"), color="tab:purple", linewidth=1)
    speed.set_ylabel("images per second")
    for axes in (losses, rate, speed):
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m demo.summary", description="Sum up a training run.")
    parser.add_argument("run", type=Path, help="the run folder, e.g. runs/demo")
    run = parser.parse_args(argv).run
    try:
        training, validation = read_metrics(run / "metrics.jsonl")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    curves = run / "curves.png"
    plot(curves, training, validation)
    table = summarise(run, training, validation)
    table.add_row("curves", str(curves))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
