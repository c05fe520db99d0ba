"""timm's vision transformers with soft-capped attention.

Import it before ``timm.create_model("local-dir:FOLDER", pretrained=True)`` of a folder that
``python -m fastalign.export --to timm`` (or prismatic) wrote with a cap: its architecture is `fastalign_softcap`,
timm's own with the attention below. Without the import timm refuses it, as a model it does not know, instead of
dropping the cap in silence.
"""

import timm
from timm.models import register_model
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from fastalign.attention import attention
from fastalign.errors import UserError

ARCHITECTURE = "fastalign_softcap"


class SoftcapAttention(Attention):
    """timm's attention with logits s capped to ``softcap * tanh(s / softcap)``; parameters and keys are timm's."""

    softcap: float

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, T, D] -> [B, T, D]. Raises ValueError for a mask, which alignment has none of."""
        if attn_mask is not None or is_causal:
            raise ValueError("soft-capped attention takes no mask")
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = attention(self.q_norm(q), self.k_norm(k), v, softcap=self.softcap)
        return self.proj_drop(self.proj(self.norm(x.transpose(1, 2).flatten(2))))


def apply_softcap(model: nn.Module, softcap: float) -> nn.Module:
    """Cap the attention logits of every block of a timm `VisionTransformer`, in place.

    Raises:
        UserError: a model of another kind.
    """
    blocks = getattr(model, "blocks", ())
    if not isinstance(model, VisionTransformer) or not all(
        type(block.attn) in (Attention, SoftcapAttention) for block in blocks
    ):
        raise UserError(f"{type(model).__name__}: only timm's VisionTransformer can be soft-capped")
    for block in blocks:
        block.attn.__class__ = SoftcapAttention  # its own forward pass; modules, keys and hooks stay
        block.attn.softcap = softcap
    return model


@register_model
def fastalign_softcap(pretrained: bool = False, *, architecture: str, softcap: float, **kwargs) -> nn.Module:
    """timm's `architecture` with capped attention; what else timm passes on is its own."""
    kwargs.pop("pretrained_model_args", None)  # ours; the inner model has its own
    return apply_softcap(timm.create_model(architecture, pretrained=pretrained, **kwargs), softcap)
