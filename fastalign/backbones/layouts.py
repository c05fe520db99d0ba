"""Layouts of weights: tables of how libraries name the parameters of a vision transformer, used in both directions.

`find` recognizes the layout of a file, `to_timm` renames its weights to timm's keys, `from_timm` is for exports.
"""

import math
import re
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Names in a library, as pairs of timm's name and theirs; other names are the same in both."""

    name: str  # for messages
    root: dict[str, str]  # outside of the blocks: a key, or its prefix
    blocks: str  # the prefix of a block's number
    # As `root`, within a block; `attn.q.`, `attn.k.`, `attn.v.` where these are separate.
    block: dict[str, str]
    flat: bool = False  # class token [D] and positions [T, D]; timm's have a first axis of 1
    unread: tuple[str, ...] = ()  # prefixes of keys that the backbone does not have

    @property
    def marks(self) -> tuple[str, ...]:
        """The keys that identify the layout; the patch embedding comes first."""
        first = [key for key in ("norm1.", "attn.q.", "attn.qkv.") if key in self.block]
        patch = self.root.get("patch_embed.proj.", "patch_embed.proj.")
        return (f"{patch}weight", *(f"{self.blocks}.0.{self.block[key]}weight" for key in first))


_ROOT = """
timm                  open_clip                  CLIP
cls_token             class_embedding            embeddings.class_embedding
pos_embed             positional_embedding       embeddings.position_embedding.weight
patch_embed.proj.     conv1.                     embeddings.patch_embedding.
norm_pre.             ln_pre.                    pre_layrnorm.
norm.                 ln_post.                   post_layernorm.
attn_pool.latent      attn_pool.probe            head.probe
attn_pool.in_proj.    attn_pool.attn.in_proj_    head.attention.in_proj_
attn_pool.proj.       attn_pool.attn.out_proj.   head.attention.out_proj.
attn_pool.norm.       attn_pool.layernorm.       head.layernorm.
attn_pool.mlp.fc1.    attn_pool.mlp.c_fc.        head.mlp.fc1.
attn_pool.mlp.fc2.    attn_pool.mlp.c_proj.      head.mlp.fc2.
"""
"""Names outside of the blocks. Those of pooling and LayerScale in open_clip's column are Perception Encoder's."""
_HF_ROOT = """
timm                 ViT                                       DINOv3
cls_token            embeddings.cls_token                      embeddings.cls_token
reg_token            -                                         embeddings.register_tokens
register_tokens      embeddings.register_tokens                -
mask_token           embeddings.mask_token                     -
pos_embed            embeddings.position_embeddings            -
patch_embed.proj.    embeddings.patch_embeddings.projection.   embeddings.patch_embeddings.
norm.                layernorm.                                -
"""
_BLOCK = """
timm          open_clip        CLIP                  ViT                          DINOv3
norm1.        ln_1.            layer_norm1.          layernorm_before.            norm1.
norm2.        ln_2.            layer_norm2.          layernorm_after.             -
attn.qkv.     attn.in_proj_    -                     -                            -
attn.q_bias   -                -                     -                            attention.q_proj.bias
attn.v_bias   -                -                     -                            attention.v_proj.bias
attn.q.       -                self_attn.q_proj.     attention.attention.query.   attention.q_proj.
attn.k.       -                self_attn.k_proj.     attention.attention.key.     attention.k_proj.
attn.v.       -                self_attn.v_proj.     attention.attention.value.   attention.v_proj.
attn.proj.    attn.out_proj.   self_attn.out_proj.   attention.output.dense.      attention.o_proj.
mlp.fc1_g.    -                -                     -                            mlp.gate_proj.
mlp.fc1_x.    -                -                     -                            mlp.up_proj.
mlp.fc1.      mlp.c_fc.        -                     intermediate.dense.          mlp.up_proj.
mlp.fc2.      mlp.c_proj.      -                     output.dense.                mlp.down_proj.
gamma_1       ls_1.gamma       -                     -                            layer_scale1.lambda1
gamma_2       ls_2.gamma       -                     -                            layer_scale2.lambda1
"""
"""Names within a block; the first row that fits applies. "-" = as timm's, or not there."""


def _column(table: str, library: str) -> dict[str, str]:
    header, *rows = (line.split() for line in table.strip().splitlines())
    return {row[0]: row[header.index(library)] for row in rows if row[header.index(library)] != "-"}


_VIT, _DINOV3 = _column(_BLOCK, "ViT"), _column(_BLOCK, "DINOv3")
_DINOV2 = {
    **{ours: theirs for ours, theirs in _VIT.items() if ours.startswith("attn.")},
    "norm1.": "norm1.",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}
_IN_MEMORY = {ours: _DINOV3[ours] for ours in ("attn.q.", "attn.k.", "attn.v.", "attn.proj.")}

TIMM = Layout(
    "timm (and training checkpoints of DINO, DINOv2, DINOv3, MAE, MoCo-v3 and Lightning)", {}, "blocks", {}
)
_OPEN_CLIP = _column(_ROOT, "open_clip"), "transformer.resblocks", _column(_BLOCK, "open_clip")
OPEN_CLIP = Layout("open_clip", *_OPEN_CLIP, flat=True, unread=("proj",))
_CLIP = _column(_ROOT, "CLIP"), "encoder.layers", _column(_BLOCK, "CLIP")
HF_CLIP = Layout("transformers' CLIP and SigLIP", *_CLIP, flat=True, unread=("embeddings.position_ids",))
_VIT_ROOT, _UNREAD = _column(_HF_ROOT, "ViT"), ("embeddings.mask_token", "pooler.")
HF_VIT = Layout("transformers' ViT", _VIT_ROOT, "encoder.layer", _VIT, unread=_UNREAD)
HF_DINOV2 = Layout("transformers' DINOv2", _VIT_ROOT, "encoder.layer", _DINOV2)
HF_DINOV3 = Layout("transformers' DINOv3", _column(_HF_ROOT, "DINOv3"), "layer", _DINOV3, unread=_UNREAD)
LAYOUTS = (
    TIMM,
    OPEN_CLIP,
    HF_CLIP,
    HF_VIT,
    HF_DINOV2,
    HF_DINOV3,
    # transformers 5 uses these names in memory, and those above in files.
    HF_DINOV3._replace(blocks="model.layer"),
    HF_VIT._replace(
        blocks="layers", block={"norm1.": _VIT["norm1."], "norm2.": _VIT["norm2."], **_IN_MEMORY}
    ),
    HF_DINOV2._replace(block=_DINOV2 | _IN_MEMORY),
)
HF_ACTIVATIONS = {name: name for name in ("gelu", "quick_gelu", "silu", "relu")}
HF_ACTIVATIONS["gelu_tanh"] = "gelu_pytorch_tanh"
"""timm's names of activations, and transformers'."""
READ = ", ".join(dict.fromkeys(layout.name for layout in LAYOUTS))
"""The supported layouts, for messages."""

_CHUNKED = re.compile(r"blocks\.\d+\.(\d+\.)")


def find(names: Collection[str]) -> list[tuple[Layout, str]]:
    """Every backbone among plain keys: its layout, and the prefix of its keys."""
    found = []
    for layout in LAYOUTS:
        first, *others = layout.marks
        prefixes = [name.removesuffix(first) for name in names if f".{name}".endswith(f".{first}")]
        found += [(layout, p) for p in prefixes if all(p + other in names for other in others)]
    return found


def to_timm(state: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Weights of a layout, without a prefix, by timm's keys."""
    inverse = layout._replace(
        root={theirs: ours for ours, theirs in layout.root.items()},
        block={theirs: ours for ours, theirs in layout.block.items()},
    )
    state = {
        _renamed(key, inverse, layout.blocks, "blocks"): value
        for key, value in state.items()
        if not key.startswith(layout.unread)
    }
    for key in ("cls_token", "pos_embed"):
        if key in state:
            state[key] = state[key].reshape(1, -1, state[key].shape[-1])
    for key in [key for key in state if ".attn.q." in key]:
        parts = [key.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in state for part in parts):
            state[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat([state.pop(part) for part in parts])
    if any(".mlp.fc1_g." in key for key in state):  # DINOv3's files name fc1_x and a plain MLP's fc1 alike
        state = {key.replace(".mlp.fc1.", ".mlp.fc1_x."): value for key, value in state.items()}
    patch = state.get("patch_embed.proj.weight")  # a text tower has none
    if patch is not None and patch.ndim == 2:  # SigLIP 2 flattens its patches, channels last
        side = math.isqrt(patch.shape[1] // 3)
        state["patch_embed.proj.weight"] = patch.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2)
    for kind in ("weight", "bias"):
        if (joint := state.pop(f"attn_pool.in_proj.{kind}", None)) is not None:
            width = len(joint) // 3
            state[f"attn_pool.q.{kind}"], state[f"attn_pool.kv.{kind}"] = joint[:width], joint[width:]
    if "storage_tokens" in state:  # Meta's DINOv3: timm would silently drop biases that the model lacks
        for key in [key for key in state if key.endswith(".attn.qkv.bias")]:
            state[key.replace("qkv.", "q_")], _, state[key.replace("qkv.", "v_")] = state.pop(key).chunk(3)
    return {_CHUNKED.sub(r"blocks.\1", key): value for key, value in state.items()}


def from_timm(state: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Weights with timm's keys by the names of a layout: the inverse of `to_timm`, except registers and pooling."""
    state = dict(state)
    if "attn.q." in layout.block:
        for key in [key for key in state if ".attn.qkv." in key]:
            names = [key.replace(".attn.qkv.", f".attn.{part}.") for part in "qkv"]
            state |= dict(zip(names, state.pop(key).chunk(3), strict=True))
    if layout.flat:
        state |= {"pos_embed": state["pos_embed"][0]}
        state |= {"cls_token": state["cls_token"][0, 0]} if "cls_token" in state else {}
    return {_renamed(key, layout, "blocks", layout.blocks): value for key, value in state.items()}


def _renamed(key: str, names: Layout, old: str, new: str) -> str:
    """A key renamed by the tables of `names`; `old` and `new` are the prefixes of a block's number."""
    block = re.fullmatch(rf"{re.escape(old)}\.(\d+)\.(.+)", key)
    table, rest = (names.block, block[2]) if block else (names.root, key)
    start = next((start for start in table if rest.startswith(start)), "")
    rest = table.get(start, "") + rest.removeprefix(start)
    return f"{new}.{block[1]}.{rest}" if block else rest
