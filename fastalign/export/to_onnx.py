"""The encoder as an ONNX model and a torch.export program, both with the soft-cap and for any batch size."""

import copy
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

from fastalign.export.measure import check_parity
from fastalign.export.run import Run

ONNX, PROGRAM = "model.onnx", "model.pt2"


def files(run: Run, folder: Path, target: str) -> dict[str, Any]:
    """Writes both files: normalized images [B, C, height, width] -> tokens [B, T, D], fp32."""
    vit = copy.deepcopy(run.vit).requires_grad_(False)
    vit.pool, vit.fc_norm, vit.head, vit.head_dist = "none", nn.Identity(), nn.Identity(), None
    for block in vit.blocks:
        block.attn.backend = "eager"  # plain operations, which onnxruntime and compilers fuse
    example, batch = torch.zeros(2, vit.spec.channels, *vit.spec.image_size), torch.export.Dim("batch", min=1)
    program = torch.export.export(vit, (example,), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / PROGRAM)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # a line for each operator that is not folded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_parity(run.vit, torch.export.load(folder / PROGRAM).module(), PROGRAM)
        names = {"input_names": ["images"], "output_names": ["tokens"], "dynamic_shapes": ({0: "batch"},)}
        torch.onnx.export(program, dynamo=True, verbose=False, **names).save(folder / ONNX)
    return {}


def read(folder: Path) -> Callable[[Tensor], Tensor]:
    """The ONNX model in onnxruntime on a CPU: normalized images -> all tokens."""
    session = onnxruntime.InferenceSession(folder / ONNX, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
