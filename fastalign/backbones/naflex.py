"""NaFlexViT and RADIO: timm's `NaFlexVit`, which takes images of any size, as a ViT of one image size.

timm resamples the position table (16x16 patches; RADIO 128x128) to each image. The ViT has the table of its own
grid, resampled once, and the keys and shapes of timm's VisionTransformer, which timm's NaFlexVit also loads.
"""

from collections.abc import Mapping

from timm.models import get_model_input_config, naflexvit
from torch import Tensor, nn

from fastalign.backbones.spec import ViTSpec
from fastalign.utils.errors import UserError

NaFlexVit, checkpoint_filter_fn = naflexvit.NaFlexVit, naflexvit.checkpoint_filter_fn


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
    embeds, state = source.embeds, {}
    for key, value in source.state_dict(keep_vars=True).items():
        if key.startswith("embeds.proj."):
            if value.ndim == 2:
                value = value.unflatten(1, (*embeds.patch_size, -1)).permute(0, 3, 1, 2).contiguous()
            state[f"patch_embed.{key.removeprefix('embeds.')}"] = value
        elif key.startswith("embeds.norm."):
            state[f"patch_embed.{key.removeprefix('embeds.')}"] = value
        elif not key.startswith("embeds.pos_embed"):
            state[key.removeprefix("embeds.")] = value
    if embeds.pos_embed_type != "none":
        learned = embeds.pos_embed_type == "learned"
        add = embeds._apply_learned_pos_embed if learned else embeds._apply_factorized_pos_embed
        table = embeds.proj.weight.new_zeros(1, grid[0] * grid[1], source.embed_dim)
        add(table, grid)
        state["pos_embed"] = table
    return state


def table_arguments(state: Mapping[str, Tensor]) -> dict:
    """timm's arguments for a model with the position table of a state dict."""
    if (table := state.get("embeds.pos_embed")) is not None:
        return {"pos_embed_grid_size": tuple(table.shape[1:3])}
    axes = [state[key].shape[1] for key in ("embeds.pos_embed_y", "embeds.pos_embed_x") if key in state]
    return {"pos_embed_grid_size": tuple(axes)} if axes else {}


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
