"""Any timm ViT on our parts, in place: `fastalign.accelerate`.

A module keeps its parameters, buffers, hooks and name; only its class becomes a subclass of timm's with another
`forward`. State dicts, copies, pickles, wrappers and `isinstance` work as before.

Left to timm, because a swap would gain nothing: GELU and tanh-GELU, which torch computes in one pass each way; gated
MLPs; LayerScale and norms, which torch.compile fuses.

Shapes: B images, T tokens, D width, H heads, d head width.
"""

from collections.abc import Callable

import torch
from timm.layers import Attention, AttentionRope, DropPath, apply_rot_embed_cat
from timm.models import beit, eva, vision_transformer
from torch import Tensor, nn
from torch.nn import functional

from fastalign.backbones.spec import check_softcap
from fastalign.backbones.vit import ViT
from fastalign.ops.attention import attention
from fastalign.ops.attention.choice import check
from fastalign.utils.errors import UserError


class FastSelfAttention:
    """What the replacements of timm's four kinds of self-attention share."""

    softcap: float | None = None
    backend = "auto"

    def extra_repr(self) -> str:
        return f"softcap={self.softcap}, backend={self.backend}"

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """As timm's. Dropout of attention weights runs timm's own code: none of our implementations has it."""
        if not self.training or self.attn_drop.p == 0:
            return self._fast(x, *args, **kwargs)
        if self.softcap is not None:
            raise _dropout_error("an attention", self)
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
        """A norm that BEiT's attention does not have."""
        norm = getattr(self, name, None)
        return x if norm is None else norm(x)

    def _rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        """Rotary embedding of all but the prefix tokens; x: [B, H, T, d]."""
        prefix, half = self.num_prefix_tokens, self.rotate_half
        return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, half)], dim=2)

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


def _dropout_error(path: str, module: nn.Module) -> UserError:
    return UserError(
        f"accelerate: {path} drops attention weights (p = {module.attn_drop.p}), which a softcap does not "
        "support: make the model with attn_drop_rate=0, or leave softcap=None"
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
    """Stochastic depth that computes a branch only for the samples that keep it.

    Outputs and gradients are timm's for the same draw. On a CPU the draw is timm's own unless the branch draws
    numbers too; for a GPU it is made on the host, so that nothing waits for the device. If no sample is kept, one is
    computed with weight zero, so that every parameter has a gradient.
    """

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """As timm's, which runs itself where shapes must be fixed or an argument has a row for each sample."""
        fixed = torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())
        by_sample = any(
            isinstance(part, Tensor) and part.dim() > 2 and len(part) == len(x)
            for part in (*args, *kwargs.values())
        )
        if not (self.training and _drops_paths(self)) or fixed or by_sample:
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


def _drops_paths(block: nn.Module) -> bool:
    """Whether both branches of a block have timm's stochastic depth at a rate above zero."""
    return all(type(drop) is DropPath and drop.drop_prob for drop in (block.drop_path1, block.drop_path2))


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


def accelerate(
    model: nn.Module, *, softcap: float | None = None, backend: str = "auto", undo: bool = False
) -> nn.Module:
    """Swap the attention and stochastic depth of a timm ViT for ours, in place.

    The state dict stays the same; without a cap outputs and gradients too, to rounding. Call it again to change the
    cap or the implementation. Call it before torch.compile, DDP or FSDP.

    Args:
        model: a timm VisionTransformer, Eva, Beit or anything else made of their attention modules.
        softcap: logits s become ``softcap * tanh(s / softcap)``; None = plain attention. Attention pooling stays
            plain. The cap is not in the state dict: set it again after loading one.
        backend: a name of `fastalign.ops.attention.BACKENDS`, used where it supports the case; "auto" = the fastest.
        undo: restore timm's modules.

    Returns:
        The model itself. `accelerated` lists what was swapped.

    Raises:
        UserError: a wrong argument; or the model has no attention of a known class, one of an unknown class, one
            whose forward was replaced, or with a cap one that drops attention weights. The model is then unchanged.
    """
    _check(model, softcap, backend)
    for module in model.modules():
        theirs = TIMM.get(type(module), type(module))
        if theirs not in FAST:
            continue
        fast = not undo and (not issubclass(FAST[theirs], FastDropPath) or _drops_paths(module))
        module.__class__ = FAST[theirs] if fast else theirs
        if isinstance(module, FastSelfAttention):
            module.softcap, module.backend = softcap, backend
    return model


def accelerated(model: nn.Module) -> dict[str, str]:
    """What `accelerate` swapped: the path of each module in the model, and timm's name of its class."""
    return {path: TIMM[type(part)].__name__ for path, part in model.named_modules() if type(part) in TIMM}


def _check(model: nn.Module, softcap: float | None, backend: str) -> None:
    check_softcap(softcap, "accelerate: ")
    try:
        check(backend)
    except ValueError as error:
        raise UserError(f"accelerate: backend: {error}") from error
    if isinstance(model, ViT):
        raise UserError(
            "accelerate: a backbone of fastalign has these parts already: set its softcap instead"
        )
    known = False
    for path, module in model.named_modules():
        kind = type(module)
        if issubclass(FAST.get(TIMM.get(kind, kind), object), FastSelfAttention):
            known = True
            if "forward" in vars(module):
                raise UserError(f"accelerate: the forward of {path} was replaced: restore it first")
            if softcap is not None and module.attn_drop.p > 0:
                raise _dropout_error(path, module)
        elif (
            (path.rpartition(".")[2] == "attn" or hasattr(module, "fused_attn"))
            and not isinstance(module, nn.Identity)
            and "Pool" not in kind.__name__
        ):
            raise UserError(
                f"accelerate: {path} is {kind.__module__}.{kind.__qualname__}, an attention that is not supported: "
                "leave the model as it is, or pass only parts without it"
            )
    if not known:
        raise UserError(
            f"accelerate: {type(model).__name__} has no attention of a timm VisionTransformer, Eva or Beit: "
            "leave it as it is"
        )
