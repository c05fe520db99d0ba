"""The command ``fastalign classify --backbone NAME_OR_RUN --data ROOT``, and `classify` for Python."""

import shlex
import sys
from datetime import timedelta
from pathlib import Path

from rich.console import Console

from fastalign.evaluation.images import RESULTS, classify
from fastalign.evaluation.options import (
    ImageOptions,
    add_flags,
    evaluation_parser,
    from_flags,
    open_backbones,
)
from fastalign.evaluation.results import image_table
from fastalign.training import distributed
from fastalign.training.command import run_command

__all__ = ["classify", "main"]


def run(arguments: list[str]) -> None:
    """Classifies; rank 0 writes the results and prints the tables."""
    parser = evaluation_parser(
        "classify",
        "Image classification with a backbone: a head on its frozen features, or fine-tuning.",
        data="folder with train/ and val/, and perhaps test/",
        output="RUN or runs/classify-NAME, a folder",
    )
    parser.epilog = "Defaults that depend on head and mode are in docs/classify.md."
    add_flags(parser, ImageOptions)
    given = parser.parse_args(arguments)
    options = from_flags(ImageOptions, given)
    options.resolved()  # refused before anything is loaded
    # Ranks without a seed of their own wait while others train.
    world = distributed.start(timeout=timedelta(days=30))
    vits, run_folder = open_backbones(given)
    folder = Path(given.output or run_folder or Path("runs") / f"classify-{given.backbone}")
    common = {"command": shlex.join(["fastalign", "classify", *arguments]), **dict(options)}
    common |= {"world": world, "say": lambda text: print(text, flush=True) if world.main else None}
    for name, vit in vits.items():
        output = folder / name if name == "before" else folder
        results = classify(vit, given.data, output=output, **common)
        if world.main:
            console = Console()
            console.print(image_table(results, name if name == "before" else ""))
            console.print(f"chosen: {results['selection']}", highlight=False)
            console.print(f"written: {output / RESULTS}", highlight=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 for bad input."""
    return run_command(lambda: run(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
