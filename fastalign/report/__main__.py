"""The command `fastalign report RUN`."""

import argparse
import re
import sys
from pathlib import Path

from fastalign.training.command import run_command
from fastalign.utils.errors import UserError
from fastalign.utils.files import write_atomically
from fastalign.utils.paths import path_argument

IMAGES = 6


def _wanted_images(given: list[str]) -> int | list[str]:
    """--images: a number, or files."""
    if len(given) > 1 or not re.fullmatch(r"[+-]?\d+", given[0]):
        return given
    if int(given[0]) < 0:
        raise UserError(f"--images {given[0]}: give how many pictures (0 = none), or image files")
    return int(given[0])


def write_report(options: argparse.Namespace) -> list[str]:
    """Write what the options ask for. Returns the lines that the command prints."""
    folder = Path(options.run)
    output = Path(options.output) if options.output else folder / "report.html"
    if output.is_dir():
        raise UserError(
            f"--output {output}: it is a directory; name a file, such as {output / 'report.html'}"
        )
    wanted = _wanted_images(options.images or [str(IMAGES)])
    # Here: they need matplotlib, which `--help` does not.
    from fastalign.report import charts, features
    from fastalign.report.page import render_page
    from fastalign.report.run import load_backbones, read_run

    run = read_run(folder, Path(options.probe) if options.probe else None)
    pictures = maps = None
    if run.facts and wanted != 0:
        models = load_backbones(run)
        data = (run.config.data.val or run.config.data.train) if run.config else None
        try:
            pictures = features.load_pictures(wanted, data, next(iter(models.values())))
            maps = features.compute_maps(models, pictures.inputs)
        except UserError as error:
            if pictures or isinstance(wanted, list):
                raise
            run.notes.append(f"No pictures are shown: {error}")
    text = render_page(run, pictures, maps).encode()
    write_atomically(output, lambda file: file.write(text))
    lines = [*run.notes, f"report: {output} ({len(text) / 1e6:.1f} MB)"]
    if options.pngs:
        place = Path(options.pngs)
        place.mkdir(parents=True, exist_ok=True)
        figures = {
            "curves": charts.curves_figure(run.metrics, (charts.LOSS, charts.PROBE, charts.THROUGHPUT)),
            "patches": charts.patches_figure(pictures, maps) if pictures else None,
            "probe": charts.probe_figure(run.probe) if run.probe else None,
        }
        for name, figure in figures.items():
            if figure:
                figure.savefig(place / f"{name}.png", **charts.PNG)
                lines.append(f"picture: {place / name}.png")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="fastalign report",
        description="A page about a run: one HTML file that loads nothing else.",
    )
    add = parser.add_argument
    add("run", type=path_argument, metavar="RUN", help="the folder of a run, finished or not")
    add("--output", type=path_argument, metavar="FILE.html", help="the page; default RUN/report.html")
    add(
        "--images",
        nargs="+",
        type=path_argument,
        metavar="N",
        help=f"how many pictures of the run's validation data (default {IMAGES}; 0 = none), or image files",
    )
    add("--probe", type=path_argument, metavar="FILE", help="results of a probe; default RUN/probe.json")
    add("--pngs", type=path_argument, metavar="DIR", help="also write pictures for a README")
    options = parser.parse_args(arguments)
    return run_command(lambda: print("\n".join(write_report(options))))


if __name__ == "__main__":
    sys.exit(main())
