"""NaFlexViT and RADIO: timm's `NaFlexVit`, which takes images of any size, as a ViT of one image size.

timm resamples the position table (16x16 patches; RADIO 128x128) to each image. The ViT has the table of its own
grid, resampled once, and the keys and shapes of timm's VisionTransformer.
"""

from collections.abc import Mapping

from timm.models import naflexvit
from torch import Tensor, nn

NaFlexVit, Embeds = naflexvit.NaFlexVit, naflexvit.NaFlexEmbeds
checkpoint_filter_fn = naflexvit.checkpoint_filter_fn


def vit_state(source: nn.Module, grid: tuple[int, int]) -> dict[str, Tensor]:
    """The parameters by the keys of timm's VisionTransformer, differentiable; positions for a grid of patches."""
    embeds, state, table = source.embeds, {}, None
    for key, value in source.state_dict(keep_vars=True).items():
        if key == "embeds.proj.weight":
            value = value.unflatten(1, (*embeds.patch_size, -1)).permute(0, 3, 1, 2).contiguous()
        if key.startswith("embeds.pos_embed"):
            table = value
        elif key.startswith(("embeds.proj.", "embeds.norm.")):
            state[key.replace("embeds.", "patch_embed.")] = value
        else:
            state[key.removeprefix("embeds.")] = value
    if table is not None:
        factorized = embeds.pos_embed_type == "factorized"
        add = embeds._apply_factorized_pos_embed if factorized else embeds._apply_learned_pos_embed
        state["pos_embed"] = table.new_zeros(1, grid[0] * grid[1], table.shape[-1])
        add(state["pos_embed"], grid)  # in place
    return state


def timm_state(state: Mapping[str, Tensor], grid: tuple[int, int]) -> dict[str, Tensor]:
    """The inverse of `vit_state`: a ViT's parameters by the keys of a NaFlexVit with a table for the grid."""
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
    """timm's arguments for the position table in a NaFlexVit's weights; none if there is no such table."""
    if (table := state.get("embeds.pos_embed")) is not None:
        return {"pos_embed": "learned", "pos_embed_grid_size": tuple(table.shape[1:3])}
    axes = [state[key].shape[1] for key in ("embeds.pos_embed_y", "embeds.pos_embed_x") if key in state]
    return {"pos_embed": "factorized", "pos_embed_grid_size": tuple(axes)} if axes else {}
