"""The MaskEmbed decoder of a run, beside its backbone: a VLM's adapter starts from it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastalign.backbones.blocks import MLP
from fastalign.backbones.spec import BlockSpec
from fastalign.backbones.vit import ViT
from fastalign.config import Config
from fastalign.method.decoder import MaskEmbedDecoder, decoder_block_spec
from fastalign.utils.errors import UserError

WEIGHTS = "decoder.safetensors"


class AlignedDecoder(nn.Module):
    """The student from its tokens on: `norm` (of backbones that pool before it), `head`, `decoder`.

    Args:
        facts: what `describe` returns.
    """

    def __init__(self, facts: dict[str, Any]):
        super().__init__()
        block, width = BlockSpec(**facts["block"]), facts["backbone_width"]
        self.norm = nn.LayerNorm(width, eps=facts["norm_eps"]) if facts["norm"] else nn.Identity()
        if facts["mlp_hidden"]:
            shape = {"width": width, "heads": 1, "mlp_hidden": facts["mlp_hidden"]}
            self.head = MLP(BlockSpec(**shape, activation=facts["head_activation"]), block.width)
        else:
            self.head = nn.Linear(width, block.width)
        names = ("tokens", "prefix", "out", "layers", "prefix_only")
        self.decoder = MaskEmbedDecoder(block, **{name: facts[name] for name in names})

    def forward(self, tokens: Tensor) -> Tensor:
        """The backbone's tokens [B, T, D] -> the teacher's view of the whole image [B, T, out]."""
        patches = tokens.shape[1] - self.decoder.prefix
        visible = torch.ones(len(tokens), 1, patches, dtype=torch.bool, device=tokens.device)
        return self.decoder(self.head(self.norm(tokens)), visible)[:, 0]


def describe(
    vit: ViT, config: Config, student: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `AlignedDecoder` is made from, and its weights.

    Args:
        vit: the run's backbone.
        config: the run's.
        student: the weights of a checkpoint, `encoder.*` and `decoder.*`.
    """
    kept = {name: value for name, value in student.items() if name.startswith("decoder.")}
    kept |= {
        name.removeprefix("encoder."): value
        for name, value in student.items()
        if name.startswith("encoder.head.")
    }
    kept |= {
        f"norm.{name.rpartition('.')[2]}": value
        for name, value in student.items()
        if name.startswith("encoder.fc_norm.")
    }
    position, last = student["decoder.pos_embed"], student["decoder.head.weight"]
    # The width is that of the weights, whatever was asked for.
    block = decoder_block_spec(vit.spec, **{**config.decoder.kwargs.model_dump(), "width": position.shape[2]})
    facts = {
        "block": asdict(block),
        "tokens": position.shape[1],
        "prefix": vit.spec.prefix,
        "out": last.shape[0],
        "layers": config.decoder.layers,
        "prefix_only": config.teacher.prefix_only,
        "backbone_width": vit.embed_dim,
        "norm": "norm.weight" in kept,
        "norm_eps": vit.spec.fresh_norm_eps,
        "mlp_hidden": len(kept["head.fc1.weight"]) if "head.fc1.weight" in kept else None,
        "head_activation": vit.spec.block.activation,
    }
    return facts, {name: value.float().contiguous() for name, value in kept.items()}


def load_decoder(folder: str | Path) -> AlignedDecoder:
    """The MaskEmbed decoder of an export, ready to be trained further.

    Args:
        folder: of an export.

    Raises:
        UserError: the export has none.
    """
    path = Path(folder)
    if not (path / WEIGHTS).is_file():
        raise UserError(
            f"no {WEIGHTS} in {folder}: give an export of a MaskEmbed run that kept its checkpoints"
        )
    decoder = AlignedDecoder(json.loads((path / "fastalign.json").read_text())["decoder"])
    decoder.load_state_dict(load_file(path / WEIGHTS))
    return decoder
