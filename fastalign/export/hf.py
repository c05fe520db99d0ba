"""Exports for transformers, loaded without `trust_remote_code`: the module of the export is part of this package.

Importing it makes a capped export, and a saved VLM around one, known to transformers' auto classes.
"""

import json
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from fastalign.export.modeling_fastalign import TOWERS, LlavaConfig
from fastalign.utils.errors import UserError


def load_tower(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The tower of an ``hf-*`` export. Its `hidden_states[-1]` is our features, cap and norm included.

    Args:
        folder: the export, with or without a cap.
        dtype: of the weights.

    Raises:
        UserError: not an export.
    """
    return _tower_class(folder).from_pretrained(folder, dtype=dtype)


def llava_config(folder: str | Path, text_config: PreTrainedConfig, **kwargs) -> LlavaConfig:
    """LLaVA around the tower of an export: its configuration's method `llava_config`.

    Args:
        folder: the export.
        text_config: of the language model.
        **kwargs: other arguments of `LlavaConfig`, which take precedence.
    """
    return _tower_class(folder).config_class.from_pretrained(folder).llava_config(text_config, **kwargs)


def _tower_class(folder: str | Path) -> type[PreTrainedModel]:
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"no config.json in {folder}: give the folder of an export --to hf-*")
    kind = json.loads(path.read_text()).get("model_type", "")
    if kind not in TOWERS:
        raise UserError(f"{path}: model type {kind!r} is not one of an export --to hf-*")
    return TOWERS[kind]
