"""Build timm's models by name and convert them to our `ViT`, whose shape is read from their modules.

The `ViT` shares the model's parameters. Not supported: a module of a type outside `_MODULES`, certain options, or a
state dict with other keys or shapes than ours.
"""

import copy
from dataclasses import replace

import timm
import torch
from timm import layers
from timm.layers import activations
from timm.models import beit, deit, eva, get_model_input_config, vision_transformer
from torch import Tensor, nn
from torch.nn import functional

from fastalign.backbones import naflex
from fastalign.backbones.moco import MoCoViT
from fastalign.backbones.spec import BlockSpec, ViTSpec
from fastalign.backbones.vit import ViT
from fastalign.utils.errors import UserError, first_line, prefixed, unknown

MODELS = {
    vision_transformer.VisionTransformer: vision_transformer.checkpoint_filter_fn,
    deit.VisionTransformerDistilled: vision_transformer.checkpoint_filter_fn,
    MoCoViT: vision_transformer.checkpoint_filter_fn,
    beit.Beit: beit.checkpoint_filter_fn,
    eva.Eva: eva.checkpoint_filter_fn,
    naflex.NaFlexVit: naflex.checkpoint_filter_fn,
}
"""timm's supported classes, each with timm's function that converts other layouts of its weights to timm's keys."""
_ACTIVATIONS = {
    nn.GELU: "gelu",
    activations.GELU: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.QuickGELU: "quick_gelu",
    nn.SiLU: "silu",
    activations.Swish: "silu",
    nn.ReLU: "relu",
}
_NORMS = {nn.LayerNorm: "layer_norm", layers.LayerNorm: "layer_norm", layers.RmsNorm: "rms_norm"}
_POST_NORM = (vision_transformer.ResPostBlock, eva.EvaBlockPostNorm)
_MODULES = {
    *MODELS,
    *_ACTIVATIONS,
    *_NORMS,
    *(nn.ModuleList, nn.Sequential, nn.Identity, nn.Linear, nn.Conv2d, nn.Dropout),
    *(vision_transformer.Block, beit.Block, eva.EvaBlock, *_POST_NORM),
    *(layers.Attention, layers.AttentionRope, beit.Attention, eva.EvaAttention),
    *(layers.RotaryEmbeddingCat, layers.RotaryEmbeddingDinoV3, layers.RotaryEmbeddingMixed),
    *(layers.PatchEmbed, layers.LayerScale, layers.DropPath, layers.Mlp, layers.SwiGLU, layers.GluMlp),
    naflex.Embeds,
}
_FAMILIES = ("vision_transformer", "deit", "beit", "eva", "naflexvit", "moco")  # timm's modules, and ours


def empty_model(name: str, kwargs: dict) -> nn.Module:
    """A timm model on the meta device; a UserError if it cannot be converted to a `ViT`."""
    if not timm.is_model(str(name).split(".")[0]):
        names = (name for family in _FAMILIES for name in timm.list_models(module=family))
        raise UserError(unknown("backbone", name, names))
    with torch.device("meta"):
        model = create_timm(name, kwargs)
    with prefixed(f"backbone {name}: "):
        spec = from_timm(model).spec
    # timm ignores the remainder of an image. Native sizes rely on that (384 / 14); for other sizes it is an error.
    native = tuple(model.pretrained_cfg.get("input_size", (3, 0, 0))[-2:])
    for side, patch in zip(spec.image_size, spec.patch_size, strict=True):
        if side % patch and spec.image_size != native:
            near = max(side // patch, 1) * patch
            raise UserError(f"{name}: img_size {side} must be a multiple of patch size {patch}: use {near}")
    return model


def create_timm(name: str, kwargs: dict, pretrained: bool = False) -> nn.Module:
    """timm's model; a UserError for bad arguments or a failed download."""
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except Exception as error:
        if pretrained:
            remedy = "or set student.weights (in Python checkpoint) to a file with them"
            problem = f"cannot load the published weights of {name!r} ({first_line(error)})"
            raise UserError(f"{problem}: check the network and the arguments, {remedy}") from error
        remedy = f"correct its tag or its kwargs {kwargs}"
        raise UserError(f"backbone {name}: {first_line(error)}; {remedy}") from error


def from_timm(source: nn.Module, recipe: dict | None = None, **changes) -> ViT:
    """Our backbone from a timm model, whose parameters it shares; `changes` are fields of `ViTSpec`."""
    spec, is_naflex = replace(describe(source), **changes), isinstance(source, naflex.NaFlexVit)
    if recipe and is_naflex and spec.position:
        table = {"pos_embed": "learned", "pos_embed_grid_size": list(spec.grid)}
        recipe = {**recipe, "kwargs": {**recipe["kwargs"], **table}}
    rate = max((getattr(part, "drop_prob", None) or 0.0) for part in source.modules())
    if rate >= 1:
        raise UserError(f"drop_path_rate must be less than 1, got {rate}")
    data = timm.data.resolve_model_data_config(source)
    data = {key: data[key] for key in ("mean", "std", "interpolation", "crop_pct")}
    data |= {"mean": list(data["mean"]), "std": list(data["std"])}
    with torch.device("meta"):
        vit = ViT(spec, drop_path=rate, data=data, recipe=recipe)
        if classes := getattr(source.head, "out_features", 0):
            vit.head = nn.Linear(spec.block.width, classes)
            vit.head_dist = nn.Linear(spec.block.width, classes) if spec.distilled else None
    vit.attn_pool = getattr(source, "attn_pool", None)
    theirs, ours = source.state_dict(), vit.state_dict()
    if is_naflex:
        with torch.no_grad():
            theirs = {key: value.detach() for key, value in naflex.vit_state(source, spec.grid).items()}
    wrong = sorted(set(theirs) ^ set(ours))
    wrong += [key for key in ours if key in theirs and ours[key].shape != theirs[key].shape]
    norms = {path: part.eps for path, part in vit.named_modules() if hasattr(part, "eps")}
    for path, part in source.named_modules():
        if getattr(part, "eps", 0) != norms.get(path, 0):
            wrong.append(f"another epsilon in {path}")
    if wrong:
        raise _unsupported(source, wrong)
    vit.load_state_dict(theirs, assign=True)
    if spec.rotary:
        vit.position = read_position(source.rope, spec)
    elif spec.relative_position:
        vit.position = source.blocks[0].attn.relative_position_index.clone()
    return vit


def describe(source: nn.Module) -> ViTSpec:
    """Read the shape of a timm model from its modules."""
    if type(source) not in MODELS:
        name, supported = type(source).__name__, ", ".join(model.__name__ for model in MODELS)
        raise UserError(f"{name} is not supported: give one of timm's {supported}, not wrapped")
    if not len(source.blocks):
        raise UserError("depth must be at least 1")
    if found := _unknown_parts(source):
        raise _unsupported(source, found)
    is_naflex, rope = isinstance(source, naflex.NaFlexVit), getattr(source, "rope", None)
    embed = source.embeds if is_naflex else source.patch_embed
    tokens = embed if is_naflex else source
    size = get_model_input_config(source)["input_size"][-2:] if is_naflex else embed.img_size
    distilled = isinstance(source, deit.VisionTransformerDistilled)
    mapped = getattr(source, "attn_pool", None) is not None  # timm has several modules of attention pooling
    pool = "map" if mapped else "pair" if distilled else source.global_pool or "none"
    block, *others = (_describe_block(block, source) for block in source.blocks)
    if any(other != block for other in others):
        raise _unsupported(source, ["blocks that differ"])
    fresh = [type(norm)(8).eps for norm in (source.norm, source.fc_norm) if _has_norm(norm)]
    return ViTSpec(
        block=block,
        depth=len(source.blocks),
        image_size=layers.to_2tuple(size),
        patch_size=layers.to_2tuple(embed.patch_size),
        channels=embed.in_chans if is_naflex else embed.proj.in_channels,
        class_token=tokens.cls_token is not None,
        distilled=distilled,
        registers=0 if getattr(tokens, "reg_token", None) is None else tokens.reg_token.shape[1],
        position=embed.pos_embed_type != "none" if is_naflex else source.pos_embed is not None,
        position_fixed=isinstance(source, MoCoViT),
        position_prefix=not is_naflex and not getattr(source, "no_embed_class", False),
        relative_position=isinstance(source, beit.Beit),
        rotary=rope is not None,
        rotary_mixed=isinstance(rope, layers.RotaryEmbeddingMixed),
        patch_bias=embed.proj.bias is not None,
        patch_norm=_has_norm(embed.norm),
        pre_norm=_has_norm(getattr(source, "norm_pre", None)),
        final_norm=_has_norm(source.norm),
        pooled_norm=_has_norm(source.fc_norm) and not distilled,  # timm's has one but does not apply it
        pool=pool,
        # Eva's attention pooling reads all tokens.
        pool_prefix=getattr(source, "pool_include_prefix", mapped),
        fresh_norm_eps=fresh[0] if fresh else 1e-6,
    )


def read_position(rope: nn.Module, spec: ViTSpec) -> Tensor:
    """timm's rotary table for the grid, in the layout of `rotate`; for mixed rope, the coordinates [2, T].

    Prefix tokens have angle 0.
    """
    if spec.rotary_mixed:
        sides = [torch.arange(side, dtype=torch.float32, device=rope.freqs.device) for side in spec.grid]
        coordinates = torch.cartesian_prod(*sides).T
        coordinates = coordinates.flip(0) if rope.grid_indexing == "xy" else coordinates
        return functional.pad(coordinates, (spec.prefix, 0))
    rope = copy.deepcopy(rope).eval()  # without the augmentation of training
    angles = slice(rope.dim // 2) if rope.rotate_half else slice(0, None, 2)  # timm repeats each
    sines, cosines = (part[:, angles] for part in rope.get_embed(spec.grid).chunk(2, 1))
    rows = (0, 0, spec.prefix, 0)
    return torch.cat([functional.pad(sines, rows), functional.pad(cosines, rows, value=1)], 1).unsqueeze(0)


def _describe_block(block: nn.Module, source: nn.Module) -> BlockSpec:
    attention, mlp = block.attn, block.mlp
    if attention.qkv is None:
        qkv, bias = "split", attention.q_proj.bias
    elif getattr(attention, "q_bias", None) is not None:
        qkv, bias = "no_k_bias", attention.q_bias
    else:
        qkv, bias = "fused", attention.qkv.bias
    gamma = getattr(block, "gamma_1", None)
    scale = getattr(getattr(block, "ls1", None), "gamma", gamma)
    tanh = getattr(mlp.act, "approximate", "none") == "tanh"
    return BlockSpec(
        width=source.embed_dim,
        heads=attention.num_heads,
        mlp_hidden=mlp.fc2.in_features,
        mlp={layers.SwiGLU: "swiglu", layers.GluMlp: "swiglu_packed"}.get(type(mlp), "mlp"),
        activation="gelu_tanh" if tanh else _ACTIVATIONS[type(mlp.act)],
        mlp_norm=_has_norm(mlp.norm),
        qkv=qkv,
        qkv_bias=bias is not None,
        qk_norm=_has_norm(getattr(attention, "q_norm", None)),
        attention_norm=_has_norm(getattr(attention, "norm", None)),
        proj_bias=mlp.fc2.bias is not None,
        rotate_half=getattr(source, "rope", None) is not None and attention.rotate_half,
        layer_scale=None if scale is None else 1.0,
        layer_scale_keys="gamma" if gamma is not None else "ls",
        post_norm=isinstance(block, _POST_NORM),
        norm=_NORMS[type(block.norm1)],
        norm_eps=block.norm1.eps,
    )


def _unknown_parts(source: nn.Module) -> list[str]:
    """The names of unsupported parts, each once. Attention pooling stays timm's own module, so any is allowed."""
    parts = {k: part for k, part in source.named_modules() if not f"{k}.".startswith("attn_pool.")}
    found = [type(part).__name__ for part in parts.values() if type(part) not in _MODULES]
    for path, part in parts.items():
        if isinstance(part, nn.Dropout) and part.p > 0 and path != "head_drop":
            found.append("dropout")
        if hasattr(part, "num_kv_heads") and part.num_kv_heads != part.num_heads:
            found.append("grouped heads")
        if getattr(part, "gate_last", False):
            found.append("the gate last")
    if isinstance(source, naflex.NaFlexVit):
        refused = {
            "a convolution as patch embedding": not source.embeds.is_linear,
            "channels first in patches": not source.embeds.channels_last,
            "a norm of pixels": source.embeds.norm_input is not None,
            "rotary embeddings": source.rope is not None,
            "padded images": source.embeds.dynamic_img_pad,
        }
        found += [name for name, present in refused.items() if present]
    elif getattr(source.patch_embed, "dynamic_img_pad", False):
        found.append("padded images")
    return list(dict.fromkeys(found))


def _unsupported(source: nn.Module, parts: list[str]) -> UserError:
    parts, name = ", ".join(parts[:3]), type(source).__name__
    return UserError(f"{name} with {parts} is not supported: choose another backbone or argument")


def _has_norm(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, nn.Identity)
