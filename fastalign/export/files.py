"""How the files of an export are written."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign.utils.files import write_tensors


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a configuration."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_weights(path: Path, state: dict[str, Tensor], **metadata: str) -> None:
    """Write weights in fp32, each with memory of its own, as safetensors wants it."""
    weights = {
        name: value.detach().float().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
    write_tensors(path, weights, **metadata)
