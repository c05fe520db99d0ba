"""From timm's keys to those of transformers and open_clip: what fits which class, and the weights by their names."""

from typing import Any

import torch
from torch import Tensor

from fastalign.models.spec import ViTSpec
from fastalign.models.vit import ViT

PLAIN = {
    "channels": 3,
    "position": True,
    "relative_position": False,
    "rotary": False,
    "patch_norm": False,
    "final_norm": True,
    "block.mlp": "mlp",
    "block.mlp_norm": False,
    "block.qkv": "fused",
    "block.qkv_bias": True,
    "block.qk_norm": False,
    "block.attention_norm": False,
    "block.norm": "layer_norm",
}
"""What every tower below takes for granted."""
CLIP = PLAIN | {
    "class_token": True,
    "registers": 0,
    "position_prefix": True,
    "pre_norm": True,
    "patch_bias": False,
    "block.layer_scale": None,
}
SIGLIP = PLAIN | {
    "class_token": False,
    "registers": 0,
    "pre_norm": False,
    "patch_bias": True,
    "block.layer_scale": None,
}
DINOV2 = PLAIN | {"class_token": True, "pre_norm": False, "patch_bias": True}
HF_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "relu": "relu",
}


def misfits(spec: ViTSpec, wanted: dict[str, Any]) -> list[str]:
    """What of a backbone a tower cannot express, as "field is x, wanted y"; empty = it fits."""
    found = []
    for name, value in wanted.items():
        have = getattr(spec.block if name.startswith("block.") else spec, name.removeprefix("block."))
        if have != value:
            found.append(f"{name.removeprefix('block.')} is {have}, wanted {value}")
    if len({*spec.grid}) > 1 or len({*spec.image_size}) > 1 or len({*spec.patch_size}) > 1:
        found.append(f"images of {spec.image_size[0]}x{spec.image_size[1]}, wanted square ones")
    return found


def hf_config(spec: ViTSpec) -> dict[str, Any]:
    """What the configurations of transformers' towers share."""
    return {
        "hidden_size": spec.block.width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.block.heads,
        "image_size": spec.image_size[0],
        "patch_size": spec.patch_size[0],
        "num_channels": spec.channels,
        "hidden_act": HF_ACTIVATIONS[spec.block.activation],
        "layer_norm_eps": spec.block.norm_eps,
    }


def _blocks(vit: ViT, at: str, names: dict[str, str], qkv: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The blocks' weights under other names; `qkv` names the three parts where they are apart there."""
    state = {}
    for index, block in enumerate(vit.blocks):
        for key, value in block.state_dict().items():
            module, _, kind = key.rpartition(".")
            if module == "attn.qkv" and qkv:
                parts = dict(zip(qkv, value.chunk(3), strict=True))
            else:
                parts = {names.get(module, module): value}
            for name, part in parts.items():
                state[f"{at}.{index}.{name}" + ("" if name.endswith("_") else ".") + kind] = part
    return state


def _norm(norm: torch.nn.LayerNorm, name: str) -> dict[str, Tensor]:
    return {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}


def _clip_blocks(vit: ViT) -> dict[str, Tensor]:
    names = {"attn.proj": "self_attn.out_proj", "norm1": "layer_norm1", "norm2": "layer_norm2"}
    return _blocks(vit, "encoder.layers", names, tuple(f"self_attn.{part}_proj" for part in "qkv"))


def _finish(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    return {prefix + key: value.detach().float().contiguous().clone() for key, value in state.items()}


def clip_state(vit: ViT) -> dict[str, Tensor]:
    """For transformers' CLIPVisionModel, with the prefix that files have in all its versions."""
    state = {
        "embeddings.class_embedding": vit.cls_token[0, 0],
        "embeddings.patch_embedding.weight": vit.patch_embed.proj.weight,
        "embeddings.position_embedding.weight": vit.pos_embed[0],
        **_norm(vit.norm_pre, "pre_layrnorm"),
        **_clip_blocks(vit),
        **_norm(vit.norm, "post_layernorm"),
    }
    return _finish(state, "vision_model.")


def siglip_state(vit: ViT) -> dict[str, Tensor]:
    """For transformers' SiglipVisionModel without its pooling head, with the prefix that files have."""
    state = {
        "embeddings.patch_embedding.weight": vit.patch_embed.proj.weight,
        "embeddings.patch_embedding.bias": vit.patch_embed.proj.bias,
        "embeddings.position_embedding.weight": vit.pos_embed[0],
        **_clip_blocks(vit),
        **_norm(vit.norm, "post_layernorm"),
    }
    return _finish(state, "vision_model.")


def dinov2_state(vit: ViT) -> dict[str, Tensor]:
    """For transformers' Dinov2Model, or Dinov2WithRegistersModel: the prefix's positions go into its tokens.

    A backbone without LayerScale gets factors of one.
    """
    prefix, patches = vit.prefix_rows(), vit.patch_position()
    names = {
        "attn.proj": "attention.output.dense",
        "ls1": "layer_scale1",
        "ls2": "layer_scale2",
    }
    parts = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))
    state = _blocks(vit, "encoder.layer", names, parts)
    state = {key.replace(".gamma", ".lambda1"): value for key, value in state.items()}
    for index in range(len(vit.blocks)):
        for number in (1, 2):
            key = f"encoder.layer.{index}.layer_scale{number}.lambda1"
            state.setdefault(key, torch.ones(vit.embed_dim))
    state |= {
        "embeddings.cls_token": prefix[None, :1],
        "embeddings.mask_token": torch.zeros(1, vit.embed_dim),
        "embeddings.position_embeddings": torch.cat([torch.zeros_like(patches[:1]), patches])[None],
        "embeddings.patch_embeddings.projection.weight": vit.patch_embed.proj.weight,
        "embeddings.patch_embeddings.projection.bias": vit.patch_embed.proj.bias,
        **_norm(vit.norm, "layernorm"),
    }
    if vit.spec.registers:
        state["embeddings.register_tokens"] = prefix[None, 1:]
    return _finish(state)


def open_clip_state(vit: ViT) -> dict[str, Tensor]:
    """For open_clip's VisionTransformer; its projection, which alignment has none of, is the identity."""
    names = {
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attn.qkv": "attn.in_proj_",
        "attn.proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    state = {
        "class_embedding": vit.cls_token[0, 0],
        "conv1.weight": vit.patch_embed.proj.weight,
        "positional_embedding": vit.pos_embed[0],
        **_norm(vit.norm_pre, "ln_pre"),
        **_blocks(vit, "transformer.resblocks", names),
        **_norm(vit.norm, "ln_post"),
        "proj": torch.eye(vit.embed_dim),
    }
    return _finish(state)
