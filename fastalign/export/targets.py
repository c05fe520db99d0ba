"""The libraries that a backbone can be exported to."""

from importlib.util import find_spec

from fastalign.export.source import Run
from fastalign.export.target import Target
from fastalign.export.to_open_clip import OpenClip
from fastalign.export.to_timm import Prismatic, Timm
from fastalign.export.to_transformers import Clip, Dinov2, Siglip
from fastalign.utils.errors import UserError

TARGETS: dict[str, Target] = {
    "timm": Timm(),
    "hf-clip": Clip(),
    "hf-siglip": Siglip(),
    "hf-dinov2": Dinov2(),
    "open-clip": OpenClip(),
    "prismatic": Prismatic(),
}


def find_target(name: str, run: Run) -> Target:
    """The target of a name, checked against the backbone.

    Raises:
        UserError: its library is not installed, or the backbone does not fit.
    """
    target = TARGETS[name]
    if find_spec(target.package) is None:
        raise UserError(
            f"--to {name} needs {target.package}: pip install 'transformers>=5.20' 'open_clip_torch>=3.3'"
        )
    problems = target.misfits(run.vit.spec)
    if problems:
        fitting = ", ".join(other for other in TARGETS if not TARGETS[other].misfits(run.vit.spec))
        raise UserError(
            f"--to {name}: {run.name} does not fit ({'; '.join(problems[:3])}); what fits: {fitting}"
        )
    return target
