"""softcap_attention: flash attention for short, non-causal sequences, with an optional cap of the logits.

    out = softmax(cap * tanh(q k^T / (sqrt(d) cap))) v

Shapes: q, k, v [B, H, T, d] with any strides, or packed [L, H, d] with the bounds of the sequences; tiles are made
for T of 50 to 1025 and d of 32 to 128. No score reaches memory: forward moves ``4 s BHTd`` bytes and computes
``4 BHT^2 d`` operations, backward ``8 s BHTd`` and ``14 BHT^2 d``: dq, and dk with dv, each in a kernel that
recomputes the scores, so there are no atomics and results are reproducible.

A head of 72, 80 or 96 channels is two tiles (64 and 16 or 32), not 128. A cap bounds the logits, so up to 41 the
softmax needs no running maximum or rescaling.
"""

import math

import torch
import triton
from torch import Tensor

from fastalign.kernels.common import architecture, is_fake, register, with_unit_stride
from fastalign.kernels.softcap_attention_backward import dkdv_kernel, dq_kernel
from fastalign.kernels.softcap_attention_forward import forward_kernel

_LARGEST_STATIC_CAP = 41.0
"""exp(41) squared times a thousand keys stays far from the ends of fp32 and bf16."""


def _head_split(width: int) -> tuple[int, int]:
    """A head of `width` channels as two powers of two, the second possibly none: 64 + 16 for 72 and 80."""
    first = max(16, 1 << (width.bit_length() - 1))
    rest = max(0, width - first)
    second = max(16, triton.next_power_of_2(rest)) if rest else 0
    return (2 * first, 0) if second >= first else (first, second)


def _tile(kernel: str, length: int, width: int, itemsize: int, arch: int) -> dict[str, int]:
    """Rows of the program's own block (BLOCK) and of the blocks it loops over (WALK), warps and stages.

    128 rows only if they waste no more than blocks of 64. The rest avoids register spills, which `benchmarks.aot`
    checks (Triton 3.6 and 3.8): wide heads and dkdv take shorter steps; before sm_90 registers hold more.
    """
    if itemsize > 2:
        widest = {"forward": 64 if arch < 100 else 128, "dq": 64, "dkdv": 32}[kernel]
        rows = 32 if width <= widest else 16
        return {"BLOCK": rows, "WALK": 16, "num_warps": 8, "num_stages": 1}
    wide = width > 64
    fits = triton.cdiv(length, 128) * 128 <= triton.cdiv(length, 64) * 64
    rows = 128 if kernel == "forward" and fits and not wide else 64
    crowded = kernel == "dkdv" and arch < 90 and 80 < width < 128
    if kernel == "forward":
        walked, warps = 32 if width <= 32 and arch >= 100 else 64, 8 if rows == 128 else 4
    elif kernel == "dq":
        walked, warps = 32 if wide and arch < 100 else 64, 8 if wide and arch != 90 else 4
    else:
        walked = 64 if arch >= 90 and not wide else 16 if crowded else 32
        warps = 8 if wide and (arch >= 90 or width > 80) else 4
    # Three stages hide the fetch of a step's rows better than two; on Blackwell three spill.
    stages = 2 if crowded or arch >= 100 else 3
    return {"BLOCK": rows, "WALK": walked, "num_warps": warps, "num_stages": stages}


def _arguments(
    kernel: str, q: Tensor, softcap: float | None, cu_seqlens: Tensor | None, length: int
) -> tuple[int, dict]:
    """Number of programs, and the arguments that all kernels share: sequences, cap, tile."""
    heads, width = q.shape[1], q.shape[-1]
    first, second = _head_split(width)
    scale = width**-0.5
    fast = q.element_size() == 2
    static = softcap is not None and softcap <= _LARGEST_STATIC_CAP and q.dtype != torch.float16
    tile = _tile(kernel, length, width, q.element_size(), architecture())
    blocks = max(1, triton.cdiv(length, tile["BLOCK"]))
    sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    # Packed rows after the last sequence form one more sequence, whose programs clear them.
    programs = blocks * heads * (sequences + (cu_seqlens is not None))
    return programs, {
        "p_bounds": None if cu_seqlens is None else cu_seqlens.contiguous(),
        "ROWS": q.shape[0] if cu_seqlens is not None else 0,
        "SEQUENCES": sequences,
        "T": max(1, length),
        "to_tanh": scale / softcap if softcap is not None else 1.0,
        "to_logit": (scale if softcap is None else softcap) * (math.log2(math.e) if fast else 1.0),
        "scale": scale,
        "H": heads,
        "D": width,
        "D0": first,
        "D1": second,
        "CAP": softcap is not None,
        "STATIC": static,
        "WIDEST": triton.next_power_of_2(width),
        "FAST": fast,
        **tile,
    }


def _strides(tensors: tuple[Tensor, ...], packed: bool) -> tuple[list[int], int]:
    """Strides over sequences, heads and tokens in units of eight elements, or of one, and the unit.

    Triton specializes on multiples of 16, not of 8: without the unit, heads of 72 channels are read by element.
    """
    strides = []
    for x in tensors:
        strides += (0, x.stride(1), x.stride(0)) if packed else (x.stride(0), x.stride(1), x.stride(2))
    unit = 1 if any(stride % 8 for stride in strides) else 8
    return [stride // unit for stride in strides], unit


def _readable(x: Tensor, length: int, packed: bool) -> Tensor:
    """The tensor, copied if its channels are not contiguous or offsets in a sequence exceed 32 bits."""
    x = with_unit_stride(x)
    return x.contiguous() if length * x.stride(0 if packed else 2) >= 2**31 else x


def _rows_first(like: Tensor, packed: bool) -> Tensor:
    """An empty tensor of this shape in memory order [B, T, H, d], which the output projection reads."""
    if packed:
        return like.new_empty(like.shape)
    images, heads, length, width = like.shape
    return like.new_empty((images, length, heads, width)).transpose(1, 2)


@register("softcap_attention")
def forward_op(
    q: Tensor, k: Tensor, v: Tensor, softcap: float | None, cu_seqlens: Tensor | None, max_seqlen: int
) -> tuple[Tensor, Tensor]:
    """The output, and the logarithm of each row's sum."""
    packed = cu_seqlens is not None
    shape = (q.shape[1], q.shape[0]) if packed else q.shape[:3]
    out, lse = _rows_first(q, packed), q.new_empty(shape, dtype=torch.float32)
    if not is_fake(out) and out.numel():
        q, k, v = (_readable(x, max_seqlen, packed) for x in (q, k, v))
        programs, arguments = _arguments("forward", q, softcap, cu_seqlens, max_seqlen)
        strides, unit = _strides((q, k, v), packed)
        forward_kernel[(programs,)](q, k, v, out, lse, *strides, UNIT=unit, **arguments)
    return out, lse


@register("softcap_attention_backward")
def backward_op(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, softcap: float | None,
    cu_seqlens: Tensor | None, max_seqlen: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v."""
    packed = cu_seqlens is not None
    dq, dk, dv = (_rows_first(x, packed) for x in (q, k, v))
    if not is_fake(dq) and dq.numel():
        gradient, q, k, v = (_readable(x, max_seqlen, packed) for x in (gradient, q, k, v))
        rows = lse.new_empty((*lse.shape, 2))
        strides, unit = _strides((q, k, v, gradient), packed)
        programs, arguments = _arguments("dq", q, softcap, cu_seqlens, max_seqlen)
        dq_kernel[(programs,)](q, k, v, gradient, out, lse, rows, dq, *strides, UNIT=unit, **arguments)
        programs, arguments = _arguments("dkdv", q, softcap, cu_seqlens, max_seqlen)
        dkdv_kernel[(programs,)](q, k, v, gradient, rows, dk, dv, *strides, UNIT=unit, **arguments)
    return dq, dk, dv


class _SoftcapAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, softcap, cu_seqlens, max_seqlen):
        out, lse = forward_op(q, k, v, softcap, cu_seqlens, max_seqlen)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
        ctx.softcap, ctx.max_seqlen = softcap, max_seqlen
        return out

    @staticmethod
    def backward(ctx, gradient):
        *tensors, cu_seqlens = ctx.saved_tensors
        return *backward_op(gradient, *tensors, ctx.softcap, cu_seqlens, ctx.max_seqlen), None, None, None


def softcap_attention(q, k, v, *, softcap=None, cu_seqlens=None, max_seqlen=None):
    """As `fastalign.ops.softcap_attention` without a bias, for fp32, bf16 and fp16 and d <= 128, on a GPU."""
    length = q.shape[2] if cu_seqlens is None else max_seqlen
    return _SoftcapAttention.apply(q, k, v, softcap, cu_seqlens, length)
