"""Training from Python, in one process: `fastalign.align`."""

import json
import os
from pathlib import Path
from typing import Any

from fastalign.backbones.vit import ViT
from fastalign.backbones.zoo import load_backbone
from fastalign.config import load_config
from fastalign.train import train
from fastalign.training import distributed
from fastalign.utils.errors import UserError


def align(recipe: str | Path | None = None, *, data: str | Path, output: str | Path, **keys: Any) -> ViT:
    """Align a backbone with MaskEmbed, as `fastalign train` does, and load the result.

        vit = fa.align("clip-vit-b", data="/data/images", output="runs/clip", **{"optim.epochs": 1})

    Calling it again on the same `output` resumes an interrupted run, or loads the backbone of a finished one.

    Args:
        recipe: the name of a published recipe, or a file; None = the defaults.
        data: `data.train`, a folder of images, tar shards or "synthetic:COUNT".
        output: the run folder.
        **keys: other configuration keys as "section.key", with their values.

    Returns:
        The aligned backbone in evaluation mode, soft-cap included.

    Raises:
        UserError: an unknown recipe or key, a wrong value, or data that cannot be used.
    """
    given = {"data.train": data, "output": output, **keys}
    # JSON is YAML.
    overrides = [
        f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" for key, value in given.items()
    ]
    config = load_config(recipe, overrides)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("align runs in one process: use torchrun -m fastalign.train for several GPUs")
    train(config, distributed.start())
    return load_backbone(config.output)
