"""The input of an export: a run's backbone, its metadata, and its MaskEmbed decoder."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastalign.backbones.blocks import MLP, make_norm
from fastalign.backbones.spec import BlockSpec
from fastalign.backbones.vit import ViT
from fastalign.backbones.weight_files import backbone_facts, read_facts, read_json
from fastalign.backbones.zoo import MOCO, load_backbone
from fastalign.config import Config, load_config
from fastalign.method.student import MaskEmbedDecoder, decoder_block_spec
from fastalign.training.build import named_backbone
from fastalign.training.checkpoint_files import DamagedFile, read_state
from fastalign.utils.errors import UserError
from fastalign.utils.sections import merge

DECODER = "decoder.safetensors"


@dataclass
class Run:
    """A finished run, or weights that are not one: a backbone and what is known about it."""

    folder: Path | None  # None for weights that are not a run
    vit: ViT
    facts: dict[str, Any]  # backbone.json
    config: Config | None = None  # of the training; None if config.yaml is missing
    val: str | None = None  # the present path of its validation data
    decoder: dict[str, Any] | None = None  # arguments of `AlignedDecoder`; `notes` says why there is none
    decoder_weights: dict[str, Tensor] = field(default_factory=dict)
    probe: Any = None  # probe.json, if the run was probed
    notes: list[str] = field(default_factory=list)

    def source(self) -> dict[str, Any]:
        """The backbone's name, the weights that it started from, and page and licence of the published weights.

        None = unknown; the licence is known only if alignment started from the published weights.
        """
        name = self.facts["name"]
        weights = self.config.student.weights if self.config else self.facts.get("weights")
        known = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
        licence, hub = getattr(known, "license", None), getattr(known, "hf_hub_id", None)
        page = f"https://huggingface.co/{hub}" if hub else None
        if name.startswith(MOCO):
            licence, page = "cc-by-nc-4.0", "https://github.com/facebookresearch/moco-v3"
        if weights != "pretrained":  # derived from published weights only if the name has their tag
            licence, page = None, page if "." in name or name.startswith(MOCO) else None
        return {"name": name, "weights": weights, "licence": licence, "page": page}


def read_run(folder: str | Path) -> Run:
    """Read a run, or the folder of `fastalign.save_backbone`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"RUN {folder} is not a directory: give the folder of a finished run")
    run = Run(folder, load_backbone(folder), read_facts(folder / "backbone.json"))
    if (probe := folder / "probe.json").is_file():
        run.probe = read_json(probe)
    if not (folder / "config.yaml").is_file():
        run.notes.append("config.yaml is missing: no recipe and no decoder")
        return run
    # config.yaml is of the newest start; resume=force may have changed settings after this backbone was saved.
    newest = load_config(folder / "config.yaml")
    run.val = newest.data.val
    run.config = Config(**merge(newest.model_dump(mode="json"), run.facts.get("settings", {})))
    if run.config.objective != "maskembed":
        run.notes.append("masked image modeling has no decoder")
    elif (student := _student(run)) is None:
        run.notes.append(f"the checkpoint of step {run.facts.get('step')} is gone: no decoder")
    else:
        run.decoder, run.decoder_weights = _describe_decoder(run, student)
    return run


def read_weights(name: str, weights: str, *, kwargs: str = "{}", softcap: float | None = None) -> Run:
    """The backbone in weights that are not a run, without head, decoder and pooling. Arguments as for the command."""
    vit, _ = named_backbone(name, weights=weights, kwargs=kwargs, softcap=softcap)
    vit.attn_pool, vit.pool, vit.head = None, "none", nn.Identity()
    facts = backbone_facts(vit.eval(), weights=weights)
    return Run(None, vit, facts, notes=["not a run of fastalign: no recipe and no decoder"])


def _student(run: Run) -> dict[str, Tensor] | None:
    """The student's weights in the checkpoint of the backbone's step; None if it is gone."""
    checkpoints, step = run.folder / "checkpoints", run.facts.get("step", 0)
    for path in filter(Path.is_file, (checkpoints / f"step-{step:08d}.pt", checkpoints / "best.pt")):
        try:
            state = read_state(path)
        except DamagedFile as error:
            raise UserError(f"{path} is damaged ({error}): remove it to export no decoder") from error
        if state["step"] == step:
            return state["average"] or state["student"]
    return None


class AlignedDecoder(nn.Module):
    """The student after the backbone's tokens: `norm` (of backbones with a norm after pooling), `head`, `decoder`."""

    def __init__(self, *, backbone: dict, norm: bool, block: dict, **shape: Any):
        super().__init__()
        inner, block = BlockSpec(**backbone), BlockSpec(**block)
        self.norm = make_norm(inner) if norm else nn.Identity()
        self.head = MLP(inner, block.width) if inner.mlp_hidden else nn.Linear(inner.width, block.width)
        self.decoder = MaskEmbedDecoder(block, **shape)

    def forward(self, tokens: Tensor) -> Tensor:
        """The backbone's tokens [B, T, D] -> the teacher's tokens of the whole image [B, T, out]."""
        patches = tokens.shape[1] - self.decoder.prefix
        visible = torch.ones(len(tokens), 1, patches, dtype=torch.bool, device=tokens.device)
        return self.decoder(self.head(self.norm(tokens)), visible)[:, 0]


def _describe_decoder(run: Run, student: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments and weights of `AlignedDecoder`, from a student's weights `encoder.*` and `decoder.*`."""
    spec, config = run.vit.spec, run.config
    parts = {"decoder.": "decoder.", "encoder.head.": "head.", "encoder.fc_norm.": "norm."}
    weights = {
        ours + name.removeprefix(theirs): value
        for theirs, ours in parts.items()
        for name, value in student.items()
        if name.startswith(theirs)
    }
    _, tokens, width = weights["decoder.pos_embed"].shape
    hidden = len(weights.get("head.fc1.weight", ()))  # of the head "mlp"
    kinds = {"activation": spec.block.activation, "norm": spec.block.norm, "norm_eps": spec.fresh_norm_eps}
    backbone = BlockSpec(spec.block.width, heads=1, mlp_hidden=hidden, **kinds)
    block = decoder_block_spec(spec, **{**config.decoder.kwargs.model_dump(), "width": width})
    facts = {
        "backbone": asdict(backbone),
        "norm": "norm.weight" in weights,
        "block": asdict(block),
        "tokens": tokens,
        "prefix": spec.prefix,
        "out": len(weights["decoder.head.weight"]),
        "layers": config.decoder.layers,
        "prefix_only": config.teacher.prefix_only,
    }
    return facts, weights


def load_decoder(folder: str | Path) -> AlignedDecoder:
    """The MaskEmbed decoder in the folder of an export, ready for further training; UserError if there is none."""
    path = Path(folder) / DECODER
    if not path.is_file():
        raise UserError(f"no {DECODER} in {folder}: export a MaskEmbed run that kept its checkpoints")
    decoder = AlignedDecoder(**read_json(path.with_name("fastalign.json"))["decoder"])
    decoder.load_state_dict(load_file(path))
    return decoder
