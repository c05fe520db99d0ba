"""Any timm ViT with our attention, in place: `fastalign.accelerate`.

A module keeps its parameters, buffers, hooks and name; only its class becomes a subclass of timm's with another
`forward`. State dicts, copies, pickles, wrappers and `isinstance` work as before.

Shapes: B images, T tokens, D width, H heads, d head width.
"""

import torch
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models import beit, eva
from torch import Tensor, nn
from torch.nn import functional

from fastalign.backbones.spec import check_softcap
from fastalign.ops.attention import attention, check
from fastalign.utils.errors import UserError


class FastSelfAttention:
    """Common to the replacements of timm's four self-attention classes."""

    softcap: float | None = None
    backend = "auto"

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """Arguments are timm's. timm's code runs with dropout of attention weights, which ours does not support."""
        if not self.training or self.attn_drop.p == 0:
            return self._fast(x, *args, **kwargs)
        if self.softcap is not None:
            raise UserError("attn_drop_rate is incompatible with a softcap: make the model without it")
        return super().forward(x, *args, **kwargs)

    def _project(self, x: Tensor) -> list[Tensor]:
        """[B, T, D] -> q, k, v, each [B, H, T, d], before their norms; grouped k and v have fewer heads."""
        if self.qkv is None:
            parts = self.q_proj(x), self.k_proj(x), self.v_proj(x)
            heads = self.num_heads, *[getattr(self, "num_kv_heads", self.num_heads)] * 2
            return [part.unflatten(-1, (h, -1)).transpose(1, 2) for part, h in zip(parts, heads, strict=True)]
        if getattr(self, "q_bias", None) is None:
            qkv = self.qkv(x)
        else:
            bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
            separate = self.qkv_bias_separate
            qkv = self.qkv(x) + bias if separate else functional.linear(x, self.qkv.weight, bias)
        return list(qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0))

    def _fast(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]; the mask, [T, T] to [B, H, T, T], is bool (True = attend) or added to logits."""
        gate = None if self.gate is None else self.gate(x).sigmoid()
        q, k, v = self._project(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            prefix, half = self.num_prefix_tokens, self.rotate_half
            q, k = (
                torch.cat([part[:, :, :prefix], apply_rot_embed_cat(part[:, :, prefix:], rope, half)], dim=2)
                for part in (q, k)
            )
        if (groups := q.shape[1] // k.shape[1]) > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        mask = x.new_ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() if is_causal else attn_mask
        if mask is not None and mask.dtype == torch.bool:
            mask = x.new_zeros(mask.shape).masked_fill(~mask, float("-inf"))
        if mask is not None:
            mask = mask[(None,) * (4 - mask.dim())].expand(-1, -1, q.shape[2], k.shape[2])
        x = attention(q, k, v, softcap=self.softcap, bias=mask, backend=self.backend)
        x = self.norm(x.transpose(1, 2).flatten(2))
        return self.proj_drop(self.proj(x if gate is None else x * gate))


class FastAttention(FastSelfAttention, Attention):
    """timm's `Attention`."""

    def _fast(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return super()._fast(x, None, attn_mask, is_causal)


class FastEvaAttention(FastSelfAttention, eva.EvaAttention):
    """timm's `EvaAttention`."""


class FastAttentionRope(FastSelfAttention, AttentionRope):
    """timm's `AttentionRope`."""


class FastBeitAttention(FastSelfAttention, beit.Attention):
    """timm's `beit.Attention`, which has no gate and no norms."""

    gate, q_norm, k_norm, norm = None, nn.Identity(), nn.Identity(), nn.Identity()

    def _fast(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            bias = self._get_rel_pos_bias() if bias is None else self._get_rel_pos_bias() + bias
        return super()._fast(x, None, bias)


FAST = {
    Attention: FastAttention,
    AttentionRope: FastAttentionRope,
    eva.EvaAttention: FastEvaAttention,
    beit.Attention: FastBeitAttention,
}
TIMM = {fast: theirs for theirs, fast in FAST.items()}


def accelerate(
    model: nn.Module, *, softcap: float | None = None, backend: str = "auto", undo: bool = False
) -> nn.Module:
    """Replace the attention of a timm ViT by ours, in place; call it again to change cap or implementation.

    The state dict stays the same; without a cap, so do outputs and gradients up to rounding. Call it before
    torch.compile, DDP or FSDP.

    Args:
        model: a timm VisionTransformer, Eva, Beit or any other module with their attention.
        softcap: logits s become ``softcap * tanh(s / softcap)``; None = plain attention. Attention pooling stays
            plain. The cap is not in the state dict: set it again after loading one.
        backend: a name of `fastalign.ops.attention.BACKENDS`, used where it supports the case; "auto" = the fastest.
        undo: restore timm's modules.

    Returns:
        The model itself; `accelerated` lists what was replaced. A UserError leaves it unchanged.
    """
    check_softcap(softcap, "accelerate: ")
    try:
        check(backend)
    except ValueError as error:
        raise UserError(f"accelerate: backend: {error}") from error
    _check_modules(model)
    for module in model.modules():
        if (theirs := TIMM.get(type(module), type(module))) in FAST:
            module.__class__ = theirs if undo else FAST[theirs]
            module.softcap, module.backend = softcap, backend
    return model


def accelerated(model: nn.Module) -> dict[str, str]:
    """What `accelerate` replaced: the path of each module in the model -> the name of timm's class."""
    return {path: TIMM[type(part)].__name__ for path, part in model.named_modules() if type(part) in TIMM}


def _check_modules(model: nn.Module) -> None:
    parts = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    found = {path for path, part in parts.items() if type(part) in FAST or type(part) in TIMM}
    for path, part in parts.items():
        kind, is_attention = type(part), path.split(".")[-1] == "attn" or hasattr(part, "fused_attn")
        if path in found and "forward" in vars(part):
            raise UserError(f"accelerate: the forward of {path} was replaced: restore it first")
        if path not in found and is_attention and kind is not nn.Identity and "Pool" not in kind.__name__:
            name = f"{kind.__module__}.{kind.__qualname__}"
            raise UserError(f"accelerate: {path} is a {name}, not supported: pass only parts without it")
    if not found:
        raise UserError(f"accelerate: {type(model).__name__} has no attention of a timm ViT, Eva or Beit")
