"""NaFlexViT and RADIO: timm's `NaFlexVit`, which takes images of any size, as a ViT of one image size.

timm resamples the position table (16x16 patches; RADIO 128x128) to each image. The ViT has the table of its own
grid, resampled once, and the keys and shapes of timm's VisionTransformer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from timm.models import get_model_input_config, naflexvit
from torch import Tensor, nn

from fastalign.backbones.spec import ViTSpec
from fastalign.utils.errors import UserError

NaFlexVit, Embeds = naflexvit.NaFlexVit, naflexvit.NaFlexEmbeds
checkpoint_filter_fn = naflexvit.checkpoint_filter_fn


def image_size(source: nn.Module) -> tuple[int, int]:
    """The size that the model was asked for, or that of its weights."""
    return tuple(get_model_input_config(source)["input_size"][-2:])


def unsupported(source: nn.Module) -> list[str]:
    """What the ViT cannot express."""
    embeds = source.embeds
    found = {
        "a convolution as patch embedding": not embeds.is_linear,
        "channels first in patches": not embeds.channels_last,
        "a norm of pixels": embeds.norm_input is not None,
        "rotary embeddings": source.rope is not None,
        "padded images": embeds.dynamic_img_pad,
    }
    return [name for name, present in found.items() if present]


def vit_state(source: nn.Module, grid: tuple[int, int]) -> dict[str, Tensor]:
    """The parameters by the keys of timm's VisionTransformer, differentiable; positions for a grid of patches."""
    return TimmKeys.of(source, grid).rename(source.state_dict(keep_vars=True))


@dataclass
class TimmKeys:
    """A hook of `load_state_dict` that takes the keys and tables of timm's NaFlexVit too."""

    options: dict[str, Any]
    """of timm's NaFlexEmbeds"""
    grid: tuple[int, int]

    @classmethod
    def of(cls, source: nn.Module, grid: tuple[int, int]) -> "TimmKeys":
        """For models like a NaFlexVit."""
        names = ("interp_mode", "ar_preserving", "antialias", "align_corners")
        names = ("patch_size", *(f"pos_embed_{name}" for name in names))
        return cls({name: getattr(source.embeds, name) for name in names}, grid)

    def __call__(self, vit: nn.Module, state: dict[str, Tensor], prefix: str, *_) -> None:
        theirs = [key for key in state if key.startswith(f"{prefix}embeds.")]
        renamed = self.rename({key.removeprefix(prefix): state.pop(key) for key in theirs})
        state.update({prefix + key: value for key, value in renamed.items()})

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By the keys of timm's VisionTransformer."""
        renamed, tables = {}, {}
        for key, value in state.items():
            name = key.removeprefix("embeds.")
            if key == "embeds.proj.weight":
                value = value.unflatten(1, (*self.options["patch_size"], -1)).permute(0, 3, 1, 2).contiguous()
            if key.startswith("embeds.pos_embed"):
                tables[name] = value
            else:
                renamed[
                    f"patch_embed.{name}" if key.startswith(("embeds.proj.", "embeds.norm.")) else name
                ] = value
        if tables:
            embeds, table = SimpleNamespace(**self.options, **tables), next(iter(tables.values()))
            learned = "pos_embed" in tables
            add = Embeds._apply_learned_pos_embed if learned else Embeds._apply_factorized_pos_embed
            renamed["pos_embed"] = table.new_zeros(1, self.grid[0] * self.grid[1], table.shape[-1])
            add(embeds, renamed["pos_embed"], self.grid)  # in place
        return renamed


def timm_state(state: Mapping[str, Tensor], grid: tuple[int, int]) -> dict[str, Tensor]:
    """The inverse of `vit_state`: a ViT's parameters by the keys of a NaFlexVit with `vit_arguments`."""
    renamed = {}
    for key, value in state.items():
        if key == "patch_embed.proj.weight":
            value = value.permute(0, 2, 3, 1).flatten(1)
        elif key == "pos_embed":
            value = value.unflatten(1, grid)
        if key in ("cls_token", "reg_token", "pos_embed"):
            key = f"embeds.{key}"
        renamed[key.replace("patch_embed.", "embeds.")] = value
    return renamed


def table_arguments(state: Mapping[str, Tensor]) -> dict:
    """timm's arguments for a model with the position table of a state dict."""
    if (table := state.get("embeds.pos_embed")) is not None:
        return {"pos_embed_grid_size": tuple(table.shape[1:3])}
    axes = [state[key].shape[1] for key in ("embeds.pos_embed_y", "embeds.pos_embed_x") if key in state]
    return {"pos_embed_grid_size": tuple(axes)} if axes else {}


def model_arguments(model: nn.Module) -> dict:
    """timm's arguments for the position table of a model, which may not be a NaFlexVit."""
    if not isinstance(model, NaFlexVit):
        return {}
    embeds = model.embeds
    return {"pos_embed": embeds.pos_embed_type, "pos_embed_grid_size": embeds.pos_embed_grid_size}


def vit_arguments(spec: ViTSpec) -> dict:
    """timm's arguments for a NaFlexVit with the ViT's position table."""
    return {"pos_embed": "learned", "pos_embed_grid_size": list(spec.grid)} if spec.position else {}


def check_patch_size(source: nn.Module, spec: ViTSpec) -> None:
    """timm resamples no patch embedding here."""
    if source.embeds.patch_size != spec.patch_size:
        raise UserError(
            f"patch_size {spec.patch_size[0]}: the weights of a NaFlexVit have {source.embeds.patch_size[0]} and are "
            "not resampled: leave patch_size out"
        )
