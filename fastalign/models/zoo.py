"""Backbones by timm's names: timm's architectures and weights in, timm's state-dict keys in and out.

timm builds the model and loads its weights; `describe` reads the shape off its modules; our `ViT` takes the
parameters over without a copy. What the shape cannot express is refused, because the two state dicts
must have the same keys and shapes.
"""

import difflib
import json
from dataclasses import replace
from pathlib import Path

import timm
import torch
from timm.layers import activations as timm_activations
from timm.models.beit import Beit
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fastalign.errors import UserError
from fastalign.models.checkpoint import Checkpoint, interpret, read_checkpoint
from fastalign.models.spec import BlockSpec, ViTSpec
from fastalign.models.svit import uncapped
from fastalign.models.vit import ViT
from fastalign.models.weights import load_weights

MOCO = "vit_base_patch16_mocov3_224"
"""Not in timm: a ViT-B/16 with a fixed sin-cos position embedding (Chen et al., 2021)."""
MOCO_URL = "https://dl.fbaipublicfiles.com/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar"


def create_backbone(
    name: str, pretrained: bool = False, *, checkpoint: str | Path | None = None, **kwargs
) -> ViT:
    """A backbone by its timm name.

    Args:
        name: timm's name, with or without the tag of the weights, or `MOCO`'s; the authors' `svit_X` is `vit_X`
            with attention logits capped at 30 (`max_attn_val`).
        pretrained: load the published weights (through timm; needs the network or timm's cache).
        checkpoint: load these weights instead: a file or a folder, in a layout that docs/backbones.md names. Never
            unpickles code.
        **kwargs: timm's keyword arguments: `img_size`, `depth`, `num_classes` (default 0), `drop_path_rate`...

    Returns:
        A `ViT` with `data`, the normalisation and evaluation constants of the backbone, and `recipe`,
        the name and arguments that make it again.

    Raises:
        UserError: unknown name (with the nearest ones), unreachable or unfitting weights, or an
            architecture that this project has not got.
    """
    name, kwargs, softcap = uncapped(name, {"num_classes": 0, **kwargs})
    moco = name.split(".")[0] == MOCO
    timm_name = "vit_base_patch16_224" if moco else name
    _check_name(timm_name)
    source = _create_timm(timm_name, pretrained and not moco and checkpoint is None, kwargs)
    vit = from_timm(source)
    _check_arguments(name, source)
    if moco:
        _make_moco(vit)
        if pretrained and checkpoint is None:
            load_weights(vit, source, _download(MOCO_URL), MOCO_URL)
    if checkpoint is not None:
        load_weights(vit, source, read_checkpoint(checkpoint), str(checkpoint))
    data = timm.data.resolve_model_data_config(source)
    vit.data = {
        "mean": [0.485, 0.456, 0.406] if moco else list(data["mean"]),
        "std": [0.229, 0.224, 0.225] if moco else list(data["std"]),
        "interpolation": "bicubic" if moco else data["interpolation"],
        "crop_pct": 0.875 if moco else data["crop_pct"],
    }
    vit.recipe = {"name": name, "kwargs": kwargs}
    vit.softcap = softcap or vit.softcap
    return vit


def load_backbone(path: str | Path, **kwargs) -> ViT:
    """The backbone that a run saved: `backbone.json` and `backbone.safetensors`, soft-cap included.

    Args:
        path: the run's folder, or the `.json` file.
        **kwargs: timm's arguments that do not change the weights, such as `drop_path_rate`.
    """
    path = Path(path)
    path = path / "backbone.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no backbone at {path}: give the folder of a finished run, or its backbone.json")
    try:
        facts = json.loads(path.read_text())
        name, softcap, kwargs = facts["name"], facts["softcap"], {**facts["kwargs"], **kwargs}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): take the run's own") from error
    vit = create_backbone(name, checkpoint=path.with_suffix(".safetensors"), **kwargs)
    vit.softcap = softcap
    for norm in (vit.norm, vit.fc_norm):
        if isinstance(norm, nn.LayerNorm):  # fresh in a student: another epsilon than the backbone's
            norm.eps = facts.get("norm_eps") or norm.eps
    return vit


def _download(url: str) -> Checkpoint:
    try:
        content = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"cannot load {url} ({error}): check the network, or give checkpoint=FILE (recipe: student.weights=FILE)"
        ) from error
    return interpret(content, url)


def _check_name(name: str) -> None:
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, [*timm.list_models(), MOCO], n=4, cutoff=0.5)
        raise UserError(f"unknown backbone {name!r}: the nearest names are {', '.join(near) or 'none'}")


def _check_arguments(name: str, source: nn.Module) -> None:
    """What timm accepts and training does not survive, or hardly anybody means."""
    rate = _drop_path(source)
    if not 0 <= rate < 1:
        raise UserError(f"{name}: drop_path_rate must lie in 0..1, 1 excluded, got {rate}")
    # A remainder of the image is ignored where the backbone was made so (384 / 14); asked for, it is a slip.
    native = source.pretrained_cfg.get("input_size", (3, 0, 0))[-2:]
    size, patch = _pair(source.patch_embed.img_size), _pair(source.patch_embed.patch_size)
    if size != tuple(native) and (size[0] % patch[0] or size[1] % patch[1]):
        below = max(size[0] // patch[0], 1) * patch[0]
        raise UserError(
            f"{name}: img_size {size[0]} is not a multiple of the patch size {patch[0]}: "
            f"use {below} or {below + patch[0]}"
        )


def _create_timm(name: str, pretrained: bool, kwargs: dict) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except TypeError as error:
        raise UserError(
            f"backbone {name}: timm refuses an argument among {sorted(kwargs)}: {error}"
        ) from error
    except Exception as error:
        if pretrained:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"cannot load the published weights of {name!r} ({reason}): check the name and the network, "
                "or give a local file, checkpoint=FILE (recipe: student.weights=FILE)"
            ) from error
        near = timm.list_pretrained(name.split(".")[0] + ".*")[:4]
        raise UserError(
            f"backbone {name!r}: {error}; weights known for it: {', '.join(near) or 'none'}"
        ) from error


def from_timm(source: nn.Module) -> ViT:
    """Our backbone from a timm VisionTransformer, Beit or Eva, whose parameters it takes over (no copy).

    Raises:
        UserError: the architecture has a part that `ViT` has not got.
    """
    spec = describe(source)
    with torch.device("meta"):
        vit = ViT(spec, drop_path=_drop_path(source))
    classes = getattr(source.head, "out_features", 0)
    vit.head = nn.Linear(spec.block.width, classes, device="meta") if classes else nn.Identity()
    vit.attn_pool = getattr(source, "attn_pool", None)
    theirs = source.state_dict()
    wrong = sorted(set(theirs) ^ set(vit.state_dict()))
    wrong += [
        key for key, value in vit.state_dict().items() if key in theirs and value.shape != theirs[key].shape
    ]
    if wrong:
        raise UserError(
            f"{type(source).__name__} with {', '.join(wrong[:3])}: an architecture that fastalign has not got"
        )
    vit.load_state_dict(theirs, assign=True)
    if spec.rotary:
        vit.position = source.rope.get_embed().detach().clone()
    elif spec.relative_position:
        vit.position = relative_index(spec.grid)
    return vit


def describe(source: nn.Module) -> ViTSpec:
    """Read the shape of a timm model off its modules."""
    if type(source) not in (VisionTransformer, Beit, Eva):
        raise UserError(f"{type(source).__name__} is not one of timm's VisionTransformer, Beit, Eva")
    if not len(source.blocks):
        raise UserError("depth must be at least 1")
    embed = source.patch_embed
    _refuse_unknown_parts(source)
    return ViTSpec(
        block=_describe_block(source.blocks[0], source),
        depth=len(source.blocks),
        image_size=_pair(embed.img_size),
        patch_size=_pair(embed.patch_size),
        channels=embed.proj.in_channels,
        class_token=source.cls_token is not None,
        registers=0 if getattr(source, "reg_token", None) is None else source.reg_token.shape[1],
        position=source.pos_embed is not None,
        position_prefix=not getattr(source, "no_embed_class", False),
        relative_position=isinstance(source, Beit),
        rotary=getattr(source, "rope", None) is not None,
        patch_bias=embed.proj.bias is not None,
        patch_norm=_has_norm(embed.norm),
        pre_norm=_has_norm(getattr(source, "norm_pre", None)),
        final_norm=_has_norm(source.norm),
        pooled_norm=_has_norm(source.fc_norm),
        pool=source.global_pool or "none",
        pool_prefix=bool(getattr(source, "pool_include_prefix", False)),
        fresh_norm_eps=_fresh_eps(source),
    )


def _describe_block(block: nn.Module, source: nn.Module) -> BlockSpec:
    attention, mlp = block.attn, block.mlp
    width = source.embed_dim
    bare_beit = isinstance(source, Beit) or (isinstance(block, EvaBlock) and attention.qkv is not None)
    qkv = "no_k_bias" if bare_beit else "split" if getattr(attention, "qkv", None) is None else "fused"
    if qkv == "no_k_bias":
        has_bias = attention.q_bias is not None
    else:
        has_bias = (attention.q_proj if qkv == "split" else attention.qkv).bias is not None
    gamma = getattr(block, "gamma_1", None)
    scale = getattr(getattr(block, "ls1", None), "gamma", gamma)
    gated = hasattr(mlp, "fc1_g")
    return BlockSpec(
        width=width,
        heads=attention.num_heads,
        mlp_hidden=(mlp.fc1_g if gated else mlp.fc1).out_features,
        mlp="swiglu" if gated else "mlp",
        activation=_activation(mlp.act),
        mlp_norm=_has_norm(mlp.norm),
        qkv=qkv,
        qkv_bias=has_bias,
        qk_norm=_has_norm(getattr(attention, "q_norm", None)),
        attention_norm=_has_norm(getattr(attention, "norm", None)),
        layer_scale=None if scale is None else 1.0,
        layer_scale_keys="gamma" if gamma is not None else "ls",
        norm_eps=block.norm1.eps,
    )


def _refuse_unknown_parts(source: nn.Module) -> None:
    """Parts without parameters, which the comparison of state dicts would not see."""
    block = source.blocks[0]
    if type(block).__name__ not in ("Block", "EvaBlock"):
        raise UserError(f"blocks of type {type(block).__name__}: an architecture that fastalign has not got")
    rope = getattr(source, "rope", None)
    problems = {
        "dropout": any(
            m.p > 0 for n, m in source.named_modules() if isinstance(m, nn.Dropout) and n != "head_drop"
        ),
        "patch dropout": type(getattr(source, "patch_drop", None)).__name__ not in ("Identity", "NoneType"),
        "dynamic image sizes": bool(getattr(source, "dynamic_img_size", False)),
        "a shared relative position bias": getattr(source, "rel_pos_bias", None) is not None,
        f"attention of type {type(block.attn).__name__}": type(block.attn).__name__
        not in ("Attention", "EvaAttention"),
        f"norms of type {type(block.norm1).__name__}": not isinstance(block.norm1, nn.LayerNorm),
        f"an MLP of type {type(block.mlp).__name__}": type(block.mlp).__name__ not in ("Mlp", "SwiGLU"),
        "rotary embeddings of another type": rope is not None and type(rope).__name__ != "RotaryEmbeddingCat",
        "half-rotated rotary embeddings": bool(getattr(block.attn, "rotate_half", False)),
    }
    found = [name for name, present in problems.items() if present]
    if found:
        raise UserError(
            f"{type(source).__name__} with {', '.join(found)}: an architecture that fastalign has not got"
        )


def _activation(module: nn.Module) -> str:
    if isinstance(module, (nn.GELU, timm_activations.GELU)):
        return "gelu_tanh" if getattr(module, "approximate", "none") == "tanh" else "gelu"
    known = {
        "GELUTanh": "gelu_tanh",
        "QuickGELU": "quick_gelu",
        "SiLU": "silu",
        "Swish": "silu",
        "ReLU": "relu",
    }
    if type(module).__name__ not in known:
        raise UserError(f"activation {type(module).__name__}: an architecture that fastalign has not got")
    return known[type(module).__name__]


def _fresh_eps(source: nn.Module) -> float:
    norms = [norm for norm in (source.norm, source.fc_norm) if _has_norm(norm)]
    return type(norms[0])(8).eps if norms else 1e-6


def _has_norm(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, nn.Identity)


def _drop_path(source: nn.Module) -> float:
    return max((getattr(m, "drop_prob", None) or 0.0) for m in source.modules())


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def relative_index(grid: tuple[int, int]) -> Tensor:
    """[1 + N, 1 + N] int64: for each pair of tokens, its row in BEiT's table of relative position biases.

    Rows are the (2h - 1)(2w - 1) displacements, then class-to-patch, patch-to-class, class-to-class.
    """
    height, width = grid
    entries = (2 * height - 1) * (2 * width - 1)
    row = torch.arange(height).repeat_interleave(width)
    column = torch.arange(width).repeat(height)
    rows = row[:, None] - row[None, :] + height - 1
    columns = column[:, None] - column[None, :] + width - 1
    index = torch.empty(1 + height * width, 1 + height * width, dtype=torch.int64)
    index[1:, 1:] = rows * (2 * width - 1) + columns
    index[0, :], index[:, 0], index[0, 0] = entries, entries + 1, entries + 2
    return index


def sincos_position(grid: tuple[int, int], width: int, prefix: int) -> Tensor:
    """[1, P + N, D]: MoCo-v3's fixed table, zeros for prefix tokens, then sines and cosines of column and row.

    The first two quarters of the channels follow the first index of each patch, as in the published weights.
    """
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float32) / (width // 4))
    # The published table orders patches with the width index outermost.
    across = torch.arange(grid[1], dtype=torch.float32).repeat_interleave(grid[0])[:, None] * frequency
    down = torch.arange(grid[0], dtype=torch.float32).repeat(grid[1])[:, None] * frequency
    table = torch.cat([across.sin(), across.cos(), down.sin(), down.cos()], dim=1)
    return torch.cat([torch.zeros(prefix, width), table])[None]


def _make_moco(vit: ViT) -> None:
    vit.spec = replace(vit.spec, position_fixed=True, fresh_norm_eps=1e-5)  # of torch's norm class
    position = sincos_position(vit.spec.grid, vit.embed_dim, vit.spec.prefix)
    vit.pos_embed = nn.Parameter(position, requires_grad=False)
