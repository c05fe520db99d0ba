"""The encoder as a graph, soft-cap inside: an ONNX model and a program of torch.export, both for any batch size."""

import copy
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastalign.backbones.vit import ViT
from fastalign.export.measure import check_parity
from fastalign.export.run import Run

ONNX, PROGRAM = "model.onnx", "model.pt2"
HOW_CAPPED = "The graph contains the cap; nothing else is needed."


class _Encoder(nn.Module):
    def __init__(self, vit: ViT):
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        return self.vit.forward_features(images)


def write(run: Run, folder: Path) -> list[str]:
    """Write both files: normalised images [B, C, height, width] -> tokens [B, T, D], fp32."""
    vit = copy.deepcopy(run.vit).requires_grad_(False)
    for block in vit.blocks:
        block.attn.backend = "eager"  # plain operations, which onnxruntime and compilers fuse
    example = torch.zeros(2, vit.spec.channels, *vit.spec.image_size)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(_Encoder(vit), (example,), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / PROGRAM)
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # a line for each operator that is not folded
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            error = check_parity(run.vit, torch.export.load(folder / PROGRAM).module(), PROGRAM)
            graph = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=["images"],
                output_names=["tokens"],
                dynamic_shapes=({0: "batch"},),
            )
    finally:
        logging.disable(disabled)
    graph.save(folder / ONNX)
    return [f"{PROGRAM}: largest relative error {error:.1e}."]


def read(folder: Path) -> Callable[[Tensor], Tensor]:
    """onnxruntime on a CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / ONNX, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
