"""Weights into a timm model: other layouts, tables of unknown grids, with and without LayerScale."""

import copy
import math
import re
from collections.abc import Container

import torch
from torch import Tensor, nn

from fastalign.backbones.checkpoint import Checkpoint, misfit
from fastalign.backbones.describe import MODELS
from fastalign.backbones.spec import ViTSpec
from fastalign.utils.errors import UserError, first_line

_NOT_BACKBONE = ("head.", "head_dist.", "decoder.", "decoder_")
_RELATIVE = ".relative_position_bias_table"
_LAYER_SCALE = re.compile(r"(blocks\.\d+\.)(?:ls([12])\.gamma|gamma_([12]))")


def timm_state(checkpoint: Checkpoint, template: nn.Module, path: str) -> dict[str, Tensor]:
    """The weights by this model's keys. Position tables are as the file has them, whatever grid they are of.

    LayerScale that the model has not got goes into the projections before it; one that the file has not got is 1.
    Both are exact.

    Args:
        checkpoint: the weights; a student's decoder and head are left out.
        template: the timm model that they are for, on any device.
        path: where they came from, for messages.

    Raises:
        UserError: they lack a key of the model's, or have another one.
    """
    wanted, state = template.state_dict(), checkpoint.state
    heads = {key: state[key] for key in wanted if key.startswith("head.") and key in state}
    state = {key: value for key, value in state.items() if not key.startswith(_NOT_BACKBONE)}
    state |= {} if checkpoint.student else heads
    tables = {key: state.pop(key) for key in [key for key in state if key.endswith(_RELATIVE)]}
    # timm's function reads other layouts of the same weights. It resamples the tables that the model has, and takes
    # every table for a square one: it is shown a model without any.
    bare = copy.deepcopy(template)
    bare.pos_embed = None
    try:
        state = MODELS[type(template)](state, bare) | tables
    except Exception as error:
        raise misfit(checkpoint, path, f"timm says {first_line(error)}") from error
    state = _fit_layer_scale(state, wanted)
    if missing := sorted(set(wanted) - set(state)):
        raise misfit(checkpoint, path, f"it lacks {missing[0]}")
    if extra := sorted(set(state) - set(wanted)):
        raise misfit(checkpoint, path, f"it has {extra[0]} too")
    return state


def table_grid(state: dict[str, Tensor], spec: ViTSpec, path: str) -> tuple[int, int]:
    """The patches along height and width that position tables are of, where nothing but their length is known.

    A square where there is one, else the backbone's own grid; without tables, too.

    Args:
        state: of `timm_state`.
        spec: of the backbone that they are for.
        path: where they came from, for messages.

    Raises:
        UserError: neither fits.
    """
    relative = next((value for key, value in state.items() if key.endswith(_RELATIVE)), None)
    if relative is not None:
        # Displacements from -(side - 1) to side - 1 each way, and three entries of the class token.
        found, wanted = len(relative) - 3, (2 * spec.grid[0] - 1) * (2 * spec.grid[1] - 1)
        side = (math.isqrt(max(found, 0)) + 1) // 2
        square = (2 * side - 1) ** 2
    elif spec.position and "pos_embed" in state:
        found, wanted = state["pos_embed"].shape[-2] - spec.prefix * spec.position_prefix, spec.patches
        side = math.isqrt(max(found, 0))
        square = side**2
    else:
        return spec.grid
    if side and found == square:
        return side, side
    if found == wanted:
        return spec.grid
    raise UserError(
        f"{path}: its position tables have {found} entries, which is no square grid and not the "
        f"{spec.grid[0]}x{spec.grid[1]} patches asked for; give img_size as it was trained, or the run's folder"
    )


def load_weights(source: nn.Module, state: dict[str, Tensor], checkpoint: Checkpoint, path: str) -> None:
    """Load weights into a timm model of their own grid.

    Args:
        source: the timm model.
        state: of `timm_state`.
        checkpoint: what the file tells of the model, for messages.
        path: where the weights came from, for messages.

    Raises:
        UserError: the weights of another model, by their shapes.
    """
    for key, wanted in source.state_dict().items():
        if state[key].shape != wanted.shape:
            raise misfit(checkpoint, path, f"{key} is {list(state[key].shape)}, wanted {list(wanted.shape)}")
    source.load_state_dict(state)


def fold_layer_scale(state: dict[str, Tensor], wanted: Container[str]) -> dict[str, Tensor]:
    """x + gamma * (W h + b) = x + (gamma W) h + gamma b: LayerScale that is not wanted goes into W and b.

    Args:
        state: weights with timm's keys; its tensors are not changed.
        wanted: the keys of the model that they are for.
    """
    state = dict(state)
    for key in [key for key in state if key not in wanted]:
        if (found := _LAYER_SCALE.fullmatch(key)) is None:
            continue
        gamma = state.pop(key).double()
        layer = found[1] + ("attn.proj" if (found[2] or found[3]) == "1" else "mlp.fc2")
        for name, factor in ((f"{layer}.weight", gamma[:, None]), (f"{layer}.bias", gamma)):
            if name in state and len(state[name]) == len(gamma):
                state[name] = (state[name].double() * factor).to(state[name].dtype)
    return state


def _fit_layer_scale(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fold what is not wanted, and 1 where none is given."""
    if any(_LAYER_SCALE.fullmatch(key) for key in state):
        return fold_layer_scale(state, wanted)
    return state | {
        key: torch.ones(value.shape) for key, value in wanted.items() if _LAYER_SCALE.fullmatch(key)
    }
