"""The command `fastalign report RUN`."""

import argparse
import sys
from pathlib import Path

from fastalign.training.command import run_command
from fastalign.utils.errors import UserError
from fastalign.utils.files import path_argument, write_atomically


def write_report(options: argparse.Namespace) -> None:
    """Write the page and, with --pngs, the PNG files."""
    folder, wanted = Path(options.run), options.images
    if len(wanted) == 1 and wanted[0].isdecimal():
        wanted = int(wanted[0])
    output = Path(options.output or folder / "report.html")
    if output.suffix != ".html" or output.is_dir():
        raise UserError(f"--output {output}: name a file that ends in .html, as in {folder / 'report.html'}")
    # Imported here, because `--help` needs neither matplotlib nor timm.
    from fastalign.report import charts, features
    from fastalign.report.page import render_page
    from fastalign.report.run import load_backbones, read_run

    run, maps = read_run(folder, Path(options.probe) if options.probe else None), None
    if run.facts and wanted != 0:
        models = load_backbones(run)
        data = (run.config.data.val or run.config.data.train) if run.config else None
        try:
            names, inputs = features.read_pictures(wanted, data, next(iter(models.values())))
            maps = features.compute_maps(names, inputs, models)
        except UserError as error:
            if isinstance(wanted, list):
                raise
            run.notes.append(f"No pictures are shown: {error}")
    text = render_page(run, maps).encode()
    write_atomically(output, lambda file: file.write(text))
    print(*run.notes, f"report: {output} ({len(text) / 1e6:.1f} MB)", sep="\n")
    if options.pngs:
        curves = charts.curves(run.metrics, (charts.LOSS, charts.PROBE, charts.THROUGHPUT))
        figures = {
            "curves": charts.curves_figure(curves) if curves else None,
            "patches": charts.patches_figure(maps, range(len(maps.names))) if maps else None,
            "probe": charts.probe_figure(*next(iter(run.settings.items()))) if run.settings else None,
        }
        Path(options.pngs).mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            if figure:
                path = Path(options.pngs, f"{name}.png")
                figure.savefig(path, **charts.PNG)
                print(f"picture: {path}")


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 for bad input."""
    about = "Write a self-contained HTML page about a run."
    parser = argparse.ArgumentParser(prog="fastalign report", description=about)
    add = parser.add_argument
    add("run", type=path_argument, metavar="RUN", help="the folder of a run, finished or not")
    add("--output", type=path_argument, metavar="FILE.html", help="the page; default RUN/report.html")
    about = "how many pictures of the run's validation data (default 6; 0 = none), or image files"
    add("--images", nargs="+", type=path_argument, default=["6"], metavar="N", help=about)
    add("--probe", type=path_argument, metavar="FILE", help="results of a probe; default RUN/probe.json")
    add("--pngs", type=path_argument, metavar="DIR", help="also write the figures as PNG files")
    options = parser.parse_args(arguments)
    return run_command(lambda: write_report(options))


if __name__ == "__main__":
    sys.exit(main())
