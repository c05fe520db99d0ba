"""The command ``fastalign classify --backbone NAME_OR_RUN --data ROOT``, and `classify` for Python."""

import shlex
import sys
from datetime import timedelta
from pathlib import Path

from rich.console import Console

from fastalign.evaluation.images import RESULTS, classify
from fastalign.evaluation.options import ImageOptions, evaluation_parser, from_flags, open_backbones
from fastalign.evaluation.results import check_output, image_table
from fastalign.training import distributed
from fastalign.training.command import run_command


def run(arguments: list[str]) -> None:
    """Classify; rank 0 writes the results and prints the tables."""
    given = evaluation_parser(
        "classify",
        "Image classification with a backbone: a head on its frozen features, or fine-tuning. "
        "Defaults that depend on head and mode are in docs/classify.md.",
        ImageOptions,
        data="folder with train/, val/ and optionally test/",
        output="RUN or runs/classify-NAME, a folder",
    ).parse_args(arguments)
    options = from_flags(ImageOptions, given)
    settings = {"settings": options.resolved().facts()}  # bad options fail before anything is loaded
    # Ranks without a seed wait while others train.
    world = distributed.start(timeout=timedelta(days=30))
    vits, run_folder = open_backbones(given)
    folder = Path(given.output or run_folder or Path("runs") / f"classify-{given.backbone}")
    outputs = {name: folder / name if name == "before" else folder for name in vits}
    for output in outputs.values():  # before the first training
        check_output(output / RESULTS, settings)
    common = {"command": shlex.join(["fastalign", "classify", *arguments]), **dict(options)}
    common |= {"world": world, "say": lambda text: print(text, flush=True) if world.main else None}
    for name, output in outputs.items():
        results = classify(vits[name], given.data, output=output, **common)
        if world.main:
            console = Console()
            console.print(image_table(results, name))
            console.print(f"selection: {results['selection']}", highlight=False)
            console.print(f"written: {output / RESULTS}", highlight=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 for bad input."""
    return run_command(lambda: run(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
