"""Weights from files into a backbone, without running code from them."""

from pathlib import Path

import timm
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fastalign.errors import UserError
from fastalign.models.vit import ViT


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
    """Load timm-keyed weights into `vit`, resampling position embeddings as timm does."""
    state = state.get("state_dict", state)
    for prefix in ("module.", "_orig_mod.", "base_encoder.", "encoder."):
        if any(key.startswith(prefix) for key in state):
            state = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    wanted = vit.state_dict()
    position = state.get("pos_embed")
    if position is not None and vit.pos_embed is not None and position.shape[-1] == vit.embed_dim:
        source_filter = {VisionTransformer: "vision_transformer", Beit: "beit", Eva: "eva"}[type(source)]
        state = getattr(timm.models, source_filter).checkpoint_filter_fn(dict(state), source)
    if vit.spec.position_fixed:
        state = {**state, "pos_embed": wanted["pos_embed"]}
    state = {
        key: value for key, value in state.items() if not key.startswith(("head.", "head_dist.", "decoder."))
    } | {key: state[key] for key in wanted if key.startswith("head.") and key in state}
    missing, extra = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    other = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if missing or extra or other:
        kind = f"lacks {missing[0]}" if missing else f"has {extra[0]} too" if extra else ""
        if other:
            kind = f"has {other[0]} of shape {list(state[other[0]].shape)}, wanted {list(wanted[other[0]].shape)}"
        raise UserError(f"{path} holds the weights of another model: it {kind}")
    vit.load_state_dict(state)
