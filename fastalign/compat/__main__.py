"""``python -m fastalign.compat run SCRIPT ...``: runs a script of the authors on our package."""

import argparse
import runpy
import sys
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer

from fastalign.utils.errors import UserError
from fastalign.utils.files import path_argument


def install() -> None:
    """Make ``import locality_alignment``, and of any of its submodules, import ours; adapt current torch and timm."""
    import fastalign.compat.locality_alignment as ours

    for name, module in list(sys.modules.items()):
        if name.startswith(ours.__name__):
            sys.modules[name.removeprefix("fastalign.compat.")] = module
    # timm's own readers (--resume, checkpoint_path) then accept the authors' checkpoints: plain values, no code.
    torch.serialization.add_safe_globals([argparse.Namespace])
    # timm's pooling layers used to read every token; now they leave prefix tokens out.
    pool = VisionTransformer.pool
    VisionTransformer.pool = lambda self, x, pool_type=None: (
        self.attn_pool(x) if self.attn_pool is not None else pool(self, x, pool_type)
    )


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, 2 for bad input, otherwise that of the script."""
    about = "Runs a script of the authors."
    parser = argparse.ArgumentParser(prog="python -m fastalign.compat", description=about)
    parser.add_argument("command", choices=["run"])
    parser.add_argument("script", type=path_argument, metavar="SCRIPT")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="those of the script")
    options = parser.parse_args(arguments)
    script = Path(options.script)
    if not script.is_file():
        parser.error(f"{script} is not a file: give the path of a Python script")
    install()
    sys.argv = [str(script), *options.arguments]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except UserError as error:
        print(f"fastalign.compat: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
