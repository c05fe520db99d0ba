"""The encoder as a graph, soft-cap inside: an ONNX model and a program of torch.export, both for any batch size."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fastalign.backbones.vit import ViT
from fastalign.export import measure
from fastalign.export.run import Run
from fastalign.export.towers import Tokens

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
    with warnings.catch_warnings(), _quiet("onnxscript", "torch.onnx"):
        warnings.simplefilter("ignore")
        error = measure.check_parity(run.vit, torch.export.load(folder / PROGRAM).module(), PROGRAM)
        graph = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["tokens"],
            dynamic_shapes=({0: "batch"},),
        )
    graph.save(folder / ONNX)
    return [f"{PROGRAM}: largest relative error {error:.1e}."]


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Loggers that report each operator that they do not fold."""
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    try:
        for logger in levels:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def read(folder: Path) -> Tokens:
    """onnxruntime on a CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / ONNX, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def usage(run: Run) -> str:
    """Lines of Python for the model card."""
    return (
        "import onnxruntime, torch\n\n"
        f'session = onnxruntime.InferenceSession("FOLDER/{ONNX}")\n'
        '(tokens,) = session.run(None, {"images": images.numpy()})  # prefix tokens first; any batch size\n\n'
        "# or as a program of torch.export, for AOTInductor and other compilers:\n"
        f'encoder = torch.export.load("FOLDER/{PROGRAM}").module()\n'
        "same = encoder(images)"
    )
