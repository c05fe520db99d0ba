"""The command: ``fastalign export RUN --to TARGET``."""

import argparse
import sys

from fastalign.export.run import Run, read_weights
from fastalign.export.targets import TARGETS
from fastalign.export.write import change_in_words, export
from fastalign.training.command import run_command
from fastalign.utils.errors import UserError
from fastalign.utils.files import path_argument


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="fastalign export", description="Export an aligned backbone.")
    add = parser.add_argument
    add("run", nargs="?", type=path_argument, metavar="RUN", help="the folder of a run or of save_backbone")
    add("--weights", type=path_argument, help="instead of RUN: a file or folder of weights, with --name")
    add("--name", help="the timm name of --weights")
    add("--kwargs", help="timm's arguments of --weights, in YAML")
    add("--softcap", type=float, help="cap that --weights were trained with, if the file does not record it")
    add("--to", required=True, choices=TARGETS, help="the target library")
    add("--output", type=path_argument, help="the folder to write; default RUN/exports/TARGET")
    add("--drop-softcap", action="store_true", help="export without the cap")
    add("--images", type=path_argument, help="images to measure features on; default validation data")
    options = parser.parse_args(arguments)
    return run_command(lambda: _run(options))


def _source(given: argparse.Namespace) -> str | Run:
    """The source of the export: RUN, or weights that are not a run."""
    if given.run is not None:
        names = ("weights", "name", "kwargs", "softcap")
        if extra := [key for key in names if getattr(given, key) is not None]:
            raise UserError(f"--{extra[0]} is for weights that are not a run: remove it, or RUN")
        return given.run
    if not given.weights or not given.name:
        raise UserError("give the folder of a run, or --weights FILE and --name TIMM_NAME")
    return read_weights(given.name, given.weights, kwargs=given.kwargs or "{}", softcap=given.softcap)


def _run(given: argparse.Namespace) -> None:
    folder, facts = export(
        _source(given),
        given.to,
        output=given.output,
        drop_softcap=given.drop_softcap,
        images=given.images,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    parity, softcap = facts["parity"], facts["softcap"]
    print(f"parity: largest relative error {parity['largest_relative_error']:.1e} of {parity['of']}")
    if softcap["value"] is not None:
        change = change_in_words(softcap["effect"])
        if softcap["applied"]:
            print(f"soft-cap: {TARGETS[given.to].how_capped}\n--drop-softcap changes features by {change}")
        else:
            print(f"soft-cap dropped: features change by {change}")
    if facts["features"]["mean"] is None:
        print(f"feature mean and std {facts['features']['of']}")
    print("\n".join([*facts["notes"], f"exported: {folder}"]))


if __name__ == "__main__":
    sys.exit(main())
