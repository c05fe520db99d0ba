"""Weights from files into a backbone, without running code from them."""

from pathlib import Path

import timm
from timm.models import beit, eva, vision_transformer
from torch import Tensor, nn

from fastalign.errors import UserError
from fastalign.models.vit import ViT

_PREFIXES = ("module.", "_orig_mod.", "base_encoder.", "encoder.")
_NOT_BACKBONE = ("head.", "head_dist.", "decoder.")
_FILTERS = {
    "VisionTransformer": vision_transformer.checkpoint_filter_fn,
    "Beit": beit.checkpoint_filter_fn,
    "Eva": eva.checkpoint_filter_fn,
}


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file, without running code from it.

    Raises:
        UserError: no such file, or not a weights file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weights file at {path}")
    try:
        return timm.models.load_state_dict(str(path), use_ema=False, weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a weights file that can be read safely: {reason}") from error


def load_weights(vit: ViT, source: nn.Module, state: dict[str, Tensor], path: str) -> None:
    """Load timm-keyed weights into a backbone; position embeddings of another size are resampled by timm.

    Args:
        vit: the backbone.
        source: the timm model that it was built from.
        state: the weights, perhaps under a prefix such as `module.`; a student's decoder and head are left out.
        path: where they came from, for messages.

    Raises:
        UserError: the weights of another model.
    """
    wanted = vit.state_dict()
    state = _strip(state.get("state_dict", state))
    heads = {key: state[key] for key in wanted if key.startswith("head.") and key in state}
    state = {key: value for key, value in state.items() if not key.startswith(_NOT_BACKBONE)} | heads
    try:
        # timm's filter: other layouts of the same weights, and position tables of another size.
        state = _FILTERS[type(source).__name__](dict(state), source)
    except Exception as error:
        raise UserError(f"{path} holds the weights of another model: timm says {error}") from error
    if vit.spec.position_fixed:
        state["pos_embed"] = wanted["pos_embed"]
    missing, extra = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    other = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if missing:
        raise UserError(f"{path} holds the weights of another model: it lacks {missing[0]}")
    if extra:
        raise UserError(f"{path} holds the weights of another model: it has {extra[0]} too")
    if other:
        found, shape = list(state[other[0]].shape), list(wanted[other[0]].shape)
        raise UserError(f"{path} holds the weights of another model: {other[0]} is {found}, wanted {shape}")
    vit.load_state_dict(state)


def _strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if any(key.startswith(prefix) for key in state):
            state = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    return state
