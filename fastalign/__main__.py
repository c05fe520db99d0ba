"""The command ``fastalign COMMAND ...``; ``python -m fastalign.COMMAND ...`` is the same."""

import importlib
import sys

from fastalign import __version__
from fastalign.utils.errors import unknown

COMMANDS = {
    "train": "align a backbone; torchrun -m fastalign.train on several GPUs",
    "recipes": "list the recipes: backbone, resolution, cost",
    "probe": "train the paper's heads on patch embeddings",
    "classify": "train image classifiers on a backbone",
    "export": "write an aligned backbone for another library",
    "report": "write an HTML page about a run",
    "scan": "check every image of a data set",
    "doctor": "list installed packages and kernels, and run a step",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand and return its exit code; 2 for an unknown one."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print("usage: fastalign COMMAND ...    (fastalign COMMAND --help)\n")
        print("\n".join(f"  {command:<10}{text}" for command, text in COMMANDS.items()))
    elif name == "--version":
        print(f"fastalign {__version__}")
    elif name not in COMMANDS:
        print(f"fastalign: {unknown('command', name, COMMANDS)}", file=sys.stderr)
        return 2
    else:
        is_package = name in ("export", "report")
        return importlib.import_module(f"fastalign.{name}" + ".__main__" * is_package).main(rest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
