"""``python -m fastalign.compat run SCRIPT ...``: runs a script, with `locality_alignment` resolved to ours."""

import importlib
import pkgutil
import runpy
import sys
from pathlib import Path

from fastalign.compat import shims
from fastalign.utils.errors import UserError
from fastalign.utils.paths import user_path

NAME = "locality_alignment"
USAGE = "usage: python -m fastalign.compat run SCRIPT [arguments of the script]"


def install() -> None:
    """Make ``import locality_alignment``, and of any of its submodules, give ours."""
    package = importlib.import_module(f"fastalign.compat.{NAME}")
    modules = [package.__name__]
    modules += [module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    for module in modules:
        sys.modules[module.removeprefix("fastalign.compat.")] = importlib.import_module(module)


def run(script: str, arguments: list[str]) -> None:
    """Run a script as ``python SCRIPT ...`` would, with our package and what current libraries dropped.

    Raises:
        UserError: no such file.
    """
    if not Path(script).is_file():
        raise UserError(f"no script at {script}: give the path of a Python file")
    install()
    shims.install()
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


def main(arguments: list[str]) -> int:
    """The command. Returns the exit code: 0, or 2 for bad input; else what the script exits with."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        if len(arguments) < 2 or arguments[0] != "run":
            raise UserError(USAGE)
        run(user_path(arguments[1]), arguments[2:])
    except UserError as error:
        print(f"fastalign.compat: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
