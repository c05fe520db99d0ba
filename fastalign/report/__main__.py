"""The command: ``python -m fastalign.report RUN``."""

import argparse
import re
import sys
from pathlib import Path

from fastalign.report.features import Maps, compare
from fastalign.report.page import page
from fastalign.report.pictures import Pictures, pick
from fastalign.report.source import Run, backbones, read_run
from fastalign.training.command import run_command
from fastalign.utils.errors import UserError
from fastalign.utils.files import write_atomically
from fastalign.utils.paths import path_argument

IMAGES = 6


def look(run: Run, wanted: int | list[str]) -> tuple[Pictures, Maps] | None:
    """Pictures and their maps; None, with a note, where there are none.

    Args:
        run: a run; without a backbone there is nothing to look at.
        wanted: how many pictures of the run's data, or image files.

    Raises:
        UserError: image files, or weights, that cannot be read.
    """
    if run.facts is None or wanted == 0:
        return None
    models = backbones(run)
    vit = next(iter(models.values()))
    data = (run.config.data.val or run.config.data.train) if run.config else None
    try:
        pictures = pick(wanted, data, vit)
    except UserError as error:
        if not isinstance(wanted, int):
            raise
        run.notes.append(f"No pictures are shown: {error}")
        return None
    return pictures, compare(models, pictures.inputs)


def wanted_images(given: list[str]) -> int | list[str]:
    """--images: a number, or files."""
    if len(given) > 1 or not re.fullmatch(r"[+-]?\d+", given[0]):
        return given
    if int(given[0]) < 0:
        raise UserError(f"--images {given[0]}: give how many pictures (0 = none), or image files")
    return int(given[0])


def report(options: argparse.Namespace) -> list[str]:
    """Write what was asked for. Returns the lines that the command prints."""
    folder = Path(options.run)
    output = Path(options.output) if options.output else folder / "report.html"
    if output.is_dir():
        raise UserError(f"--output {output}: it is a folder; name a file, such as {output / 'report.html'}")
    wanted = wanted_images(options.images or [str(IMAGES)])
    if options.pngs:
        if Path(options.pngs).exists() and not Path(options.pngs).is_dir():
            raise UserError(f"--pngs {options.pngs}: it is a file; name a folder")
        from fastalign.report import pngs  # needs matplotlib: said before the work, not after
    run = read_run(folder, Path(options.probe) if options.probe else None)
    if run.facts is None and isinstance(wanted, list):
        run.notes.append("The pictures of --images are left out: there is no backbone to show them to.")
    found = look(run, wanted)
    pictures, maps = found or (None, None)
    text = page(run, pictures, maps).encode()
    write_atomically(output, lambda file: file.write(text))
    said = [*run.notes, f"report: {output} ({len(text) / 1e6:.1f} MB)"]
    if options.pngs:
        said += [f"picture: {path}" for path in pngs.write(Path(options.pngs), run, pictures, maps)]
    return said


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m fastalign.report",
        description="A page about a run: one HTML file that needs nothing else.",
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
    add(
        "--pngs", type=path_argument, metavar="DIR", help="also write pictures for a README; needs matplotlib"
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: print("\n".join(report(options))))


if __name__ == "__main__":
    sys.exit(main())
