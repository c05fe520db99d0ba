"""Weights into a backbone: other layouts, other sizes, with and without LayerScale."""

import re
from collections.abc import Container

import torch
from timm.models import beit, eva, vision_transformer
from torch import Tensor, nn

from fastalign.models.checkpoint import Checkpoint, check_config, misfit
from fastalign.models.vit import ViT

_NOT_BACKBONE = ("head.", "head_dist.", "decoder.", "decoder_")
_FILTERS = {
    "VisionTransformer": vision_transformer.checkpoint_filter_fn,
    "Beit": beit.checkpoint_filter_fn,
    "Eva": eva.checkpoint_filter_fn,
}
_LAYER_SCALE = re.compile(r"(blocks\.\d+\.)(?:ls([12])\.gamma|gamma_([12]))")


def load_weights(vit: ViT, source: nn.Module, checkpoint: Checkpoint, path: str) -> None:
    """Load timm-keyed weights into a backbone; position embeddings of another size are resampled by timm.

    LayerScale that the backbone has not got goes into the projections before it; one that the file has not got
    is 1. Both are exact. The pooling that a student has not got is taken off the backbone; the soft-cap that the
    file was trained with is set.

    Args:
        vit: the backbone.
        source: the timm model that it was built from.
        checkpoint: the weights; a student's decoder and head are left out.
        path: where they came from, for messages.

    Raises:
        UserError: the weights of another model.
    """
    wanted, state = vit.state_dict(), checkpoint.state
    heads = {key: state[key] for key in wanted if key.startswith("head.") and key in state}
    state = {key: value for key, value in state.items() if not key.startswith(_NOT_BACKBONE)}
    state |= {} if checkpoint.student else heads
    check_config(vit.spec, checkpoint.config, path)
    try:
        # timm's filter: other layouts of the same weights, and position tables of another size.
        state = _FILTERS[type(source).__name__](dict(state), source)
    except Exception as error:
        raise misfit(checkpoint, path, f"timm says {error}") from error
    if vit.spec.position_fixed:
        state["pos_embed"] = wanted["pos_embed"]
    state = _fit_layer_scale(state, wanted)
    if (
        checkpoint.student
        and vit.attn_pool is not None
        and not any(key.startswith("attn_pool.") for key in state)
    ):
        vit.pool, vit.attn_pool = "none", None
        wanted = vit.state_dict()
    missing, extra = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    other = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if missing:
        raise misfit(checkpoint, path, f"it lacks {missing[0]}")
    if extra:
        raise misfit(checkpoint, path, f"it has {extra[0]} too")
    if other:
        found, shape = list(state[other[0]].shape), list(wanted[other[0]].shape)
        raise misfit(checkpoint, path, f"{other[0]} is {found}, wanted {shape}")
    vit.load_state_dict(state)
    if checkpoint.softcap is not None:
        vit.softcap = checkpoint.softcap


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
        key: torch.ones_like(value) for key, value in wanted.items() if _LAYER_SCALE.fullmatch(key)
    }
