"""``python -m fastalign.compat run SCRIPT ...``: runs a script of the authors on our package."""

import argparse
import runpy
import sys
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer

from fastalign.utils.errors import UserError
from fastalign.utils.paths import user_path

USAGE = "usage: python -m fastalign.compat run SCRIPT [arguments of the script]"


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


def main(arguments: list[str]) -> int:
    """The command. Returns the exit code: 0, 2 for bad input, otherwise that of the script."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    try:
        if len(arguments) < 2 or arguments[0] != "run":
            raise UserError(USAGE)
        script = Path(user_path(arguments[1]))
        if not script.is_file():
            raise UserError(f"{script} is not a file: give the path of a Python script")
        install()
        sys.argv = [str(script), *arguments[2:]]
        sys.path.insert(0, str(script.resolve().parent))
        runpy.run_path(str(script), run_name="__main__")
    except UserError as error:
        print(f"fastalign.compat: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
