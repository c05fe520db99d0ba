"""timm's modules with another `forward`: attention and blocks with stochastic depth on our parts.

Each class is a subclass of timm's without anything new in its state: `fastalign.backbones.accelerate` gives it to
modules that exist. It is written against timm's public attributes.

Left to timm, because a swap would gain nothing: GELU and tanh-GELU, which torch does in one pass each way, with the
bias for free at the end of the product; gated MLPs; LayerScale and norms, which torch.compile fuses.

Shapes: B images, T tokens, D width, H heads, d head width.
"""

from collections.abc import Callable

import torch
from timm.layers import Attention, AttentionRope, DropPath, apply_rot_embed_cat
from timm.models import beit, eva, vision_transformer
from torch import Tensor, nn
from torch.nn import functional

from fastalign.ops.attention import attention
from fastalign.utils.errors import UserError


class FastSelfAttention:
    """What timm's four kinds of self-attention share."""

    softcap: float | None = None
    backend = "auto"

    def extra_repr(self) -> str:
        return f"softcap={self.softcap}, backend={self.backend}"

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """As timm's, which runs itself where weights are dropped: no implementation of ours does that."""
        if not self.training or self.attn_drop.p == 0:
            return self._fast(x, *args, **kwargs)
        if self.softcap is not None:
            refuse_cap(self, "an attention")
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

    def _norm(self, name: str, x: Tensor) -> Tensor:
        """A norm that BEiT's attention has not got."""
        norm = getattr(self, name, None)
        return x if norm is None else norm(x)

    def _rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        """Rotary embedding of all but the prefix tokens; x: [B, H, T, d]."""
        options = {"half": True} if getattr(self, "rotate_half", False) else {}
        prefix = self.num_prefix_tokens
        return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, **options)], dim=2)

    def _attend(self, x: Tensor, rope: Tensor | None, bias: Tensor | None) -> Tensor:
        """[B, T, D] -> [B, T, D]; the bias, [T, T] to [B, H, T, T], is added to the capped logits."""
        gate = getattr(self, "gate", None)
        gate = None if gate is None else gate(x).sigmoid()
        q, k, v = self._project(x)
        q, k = self._norm("q_norm", q), self._norm("k_norm", k)
        if rope is not None:
            q, k = self._rotate(q, rope), self._rotate(k, rope)
        if (groups := q.shape[1] // k.shape[1]) > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        if bias is not None:
            bias = bias[(None,) * (4 - bias.dim())].expand(-1, -1, q.shape[2], k.shape[2])
        x = self._mix(q, k, v, bias)
        x = self._norm("norm", x.transpose(1, 2).flatten(2))
        return self.proj_drop(self.proj(x if gate is None else x * gate))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        return attention(q, k, v, softcap=self.softcap, bias=bias, backend=self.backend)


def refuse_cap(attention: nn.Module, path: str) -> None:
    """Raise the `UserError` of a cap on attention that drops weights."""
    raise UserError(
        f"accelerate: {path} drops attention weights (p = {attention.attn_drop.p}), which goes with no softcap: "
        "make the model with attn_drop_rate=0, or leave softcap=None"
    )


def _mask_bias(x: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """A mask as what is added to the logits: x [B, T, D]; the mask bool (True = attend) or additive."""
    if causal:
        mask = x.new_ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    if mask is None or mask.dtype != torch.bool:
        return mask
    return x.new_zeros(mask.shape).masked_fill(~mask, float("-inf"))


class FastAttention(FastSelfAttention, Attention):
    """timm's `Attention`."""

    def _fast(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return self._attend(x, None, _mask_bias(x, attn_mask, is_causal))


class _FastRotary(FastSelfAttention):
    def _fast(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        return self._attend(x, rope, _mask_bias(x, attn_mask, is_causal))


class FastAttentionRope(_FastRotary, AttentionRope):
    """timm's `AttentionRope`."""


class FastEvaAttention(_FastRotary, eva.EvaAttention):
    """timm's `EvaAttention`."""


class FastBeitAttention(FastSelfAttention, beit.Attention):
    """timm's `beit.Attention`."""

    def _fast(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            bias = self._get_rel_pos_bias() if bias is None else self._get_rel_pos_bias() + bias
        return self._attend(x, None, bias)


class FastDropPath:
    """Stochastic depth that computes a branch for the samples that keep it, and for no other.

    Each sample is kept with timm's probability, independently, and scaled as timm does: outputs and gradients are
    timm's for the same draw. On a CPU the draw is timm's own unless the branch draws numbers too; for a GPU it is
    made on the host, so that nothing waits for the device. Where no sample is kept one is computed, with weight zero,
    so that every parameter has a gradient.
    """

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """As timm's, which runs itself where shapes must be fixed or arguments are given sample by sample."""
        drops = self.training and drops_paths(self)
        if not drops or _shapes_are_fixed(x) or _by_sample(x, *args, *kwargs.values()):
            return super().forward(x, *args, **kwargs)
        x = _join(
            x, lambda part: self._scale(self.attn(self.norm1(part), *args, **kwargs), 1), self.drop_path1
        )
        return _join(x, lambda part: self._scale(self.mlp(self.norm2(part)), 2), self.drop_path2)

    def _scale(self, branch: Tensor, number: int) -> Tensor:
        """LayerScale, a module in a ViT and a parameter in BEiT and EVA."""
        if hasattr(self, f"ls{number}"):
            return getattr(self, f"ls{number}")(branch)
        gamma = getattr(self, f"gamma_{number}")
        return branch if gamma is None else gamma * branch


def drops_paths(block: nn.Module) -> bool:
    """Whether both branches of a block have timm's stochastic depth, at a rate above zero."""
    return all(type(drop) is DropPath and drop.drop_prob for drop in (block.drop_path1, block.drop_path2))


def _shapes_are_fixed(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _by_sample(x: Tensor, *arguments: object) -> bool:
    """Whether a mask or a rotary table has a row for each sample of x, or may have one."""
    return any(isinstance(part, Tensor) and part.dim() > 2 and len(part) == len(x) for part in arguments)


def _join(x: Tensor, branch: Callable[[Tensor], Tensor], drop: nn.Module) -> Tensor:
    """x + drop(branch(x)), with the branch computed for the samples that keep it. x: [B, T, D]"""
    keep = 1 - drop.drop_prob
    weight = torch.empty(len(x), 1, 1, dtype=x.dtype).bernoulli_(keep)
    index = weight.flatten().nonzero().flatten()
    if not len(index):
        index = index.new_zeros(1)
    if drop.scale_by_keep and keep > 0:
        weight = weight / keep
    weight, index = (part.to(x.device, non_blocking=True) for part in (weight[index], index))
    kept = branch(x.index_select(0, index)) * weight
    dtype = torch.promote_types(x.dtype, kept.dtype)
    return x.to(dtype).index_add(0, index, kept.to(dtype))


class FastBlock(FastDropPath, vision_transformer.Block):
    """A VisionTransformer's block."""


class FastEvaBlock(FastDropPath, eva.EvaBlock):
    """Eva's block."""


class FastBeitBlock(FastDropPath, beit.Block):
    """BEiT's block."""


FAST = {
    Attention: FastAttention,
    AttentionRope: FastAttentionRope,
    eva.EvaAttention: FastEvaAttention,
    beit.Attention: FastBeitAttention,
    vision_transformer.Block: FastBlock,
    eva.EvaBlock: FastEvaBlock,
    beit.Block: FastBeitBlock,
}
TIMM = {fast: theirs for theirs, fast in FAST.items()}
