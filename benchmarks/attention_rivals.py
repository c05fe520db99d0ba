"""Other implementations of attention, as `benchmarks.kernels` times them beside ours.

A rival is prepared once for given sequences (masks of blocks, compiled functions), outside the timing, and gives
a function of q, k and v: [B, H, T, d], packed [L, H, d]. Those without a cap stand in for capped attention only
where they are marked as yardsticks. What is not installed is named with the reason; what fails becomes a row
that says why.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BLOCK = 128
"""Rows and columns of a block of FlexAttention's masks, its default."""


@dataclass(frozen=True)
class Rival:
    """One implementation and the cases it can do.

    Args:
        prepare: (softcap, bounds, max_seqlen) -> a function of q, k, v; bounds is None for dense input.
        needs: "module:attribute" that must be there.
        capped, plain: does attention with and without the cap.
        dense, packed: takes that layout.
        single: does fp32.
        cpu: runs on a CPU as well, with gradients.
        yardstick: is timed in capped cases too, without the cap.
    """

    prepare: Callable
    needs: str = "torch:nn"
    capped: bool = False
    plain: bool = False
    dense: bool = True
    packed: bool = False
    single: bool = False
    cpu: bool = False
    yardstick: bool = False

    def missing(self) -> str | None:
        """Why it cannot be used here, or None."""
        module, _, attribute = self.needs.partition(":")
        try:
            found = importlib.import_module(module)
        except Exception as error:  # a package built for another torch fails in any way it likes
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return None if hasattr(found, attribute) else f"{module} has no {attribute}"

    def supports(self, softcap: float | None, packed: bool, dtype: torch.dtype, device: str) -> bool:
        """Whether it can do this case."""
        cap = self.plain if softcap is None else self.capped or self.yardstick
        layout = self.packed if packed else self.dense
        return cap and layout and (self.single or dtype != torch.float32) and (self.cpu or device != "cpu")


@lru_cache
def tanh_approx() -> Callable[[Tensor], Tensor]:
    """tanh as an operator that Inductor turns into the GPU's own instruction.

    FlexAttention traces a score_mod for its gradient (register_autograd) and maps it over batch, heads and both
    positions when it is not compiled (register_vmap). Made on first use: it loads Inductor.
    """
    from torch._inductor.lowering import make_pointwise, register_lowering
    from torch._inductor.virtualized import ops

    @torch.library.custom_op("fastalign_benchmarks::tanh_approx", mutates_args=())
    def operator(x: Tensor) -> Tensor:
        return torch.tanh(x)

    @operator.register_fake
    def fake(x):
        return torch.empty_like(x)

    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y)

    def keep(ctx, inputs, output):
        ctx.save_for_backward(output)

    operator.register_autograd(backward, setup_context=keep)
    operator.register_vmap(lambda info, in_dims, x: (operator(x), in_dims[0]))
    instruction = partial(
        ops.inline_asm_elementwise,
        asm="tanh.approx.f32 $0, $1;",
        constraints="=f,f",
        dtype=torch.float32,
    )
    registered = torch.ops.fastalign_benchmarks.tanh_approx.default
    register_lowering(registered)(make_pointwise(instruction))
    return registered


def block_mask(bounds: Tensor, length: int):
    """FlexAttention's mask of packed sequences; rows after the last sequence attend to one another.

    From the first and last sequence of each block: `create_block_mask` would write down every pair of rows,
    which for 100,000 rows is ten gigabytes.
    """
    from torch.nn.attention.flex_attention import BlockMask

    rows = torch.arange(length, device=bounds.device)
    sequence = torch.searchsorted(bounds.contiguous(), rows.int(), right=True).int()
    first = sequence[::BLOCK]
    last = sequence[
        (torch.arange(len(first), device=bounds.device) * BLOCK + BLOCK - 1).clamp_max(length - 1)
    ]
    touched = (first[:, None] <= last) & (first <= last[:, None])
    single = (first == last) & ((torch.arange(len(first), device=bounds.device) + 1) * BLOCK <= length)
    full = touched & single & single[:, None]

    def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.int().argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1).int()[None, None], order.int()[None, None]

    return BlockMask.from_kv_blocks(
        *ordered(touched & ~full),
        *ordered(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda b, h, i, j: sequence[i] == sequence[j],
        seq_lengths=(length, length),
    )


def score_mod(softcap: float | None, tanh: Callable) -> Callable | None:
    """FlexAttention's modification of a logit."""
    return softcap and (lambda score, b, h, i, j: softcap * tanh(score / softcap))


def _flex(tanh: Callable[[], Callable], softcap: float | None, bounds: Tensor | None, length: int | None):
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    modification = score_mod(softcap, tanh())
    if bounds is None:
        return lambda q, k, v: compiled(q, k, v, score_mod=modification)
    masks: dict[int, object] = {}

    def packed(q, k, v):
        if len(q) not in masks:  # once, in the warm-up
            masks[len(q)] = block_mask(bounds, len(q))
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = compiled(q, k, v, score_mod=modification, block_mask=masks[q.shape[2]])
        return out.squeeze(0).transpose(0, 1)

    return packed


def _sdpa(backend: SDPBackend, softcap, bounds, length):
    def run(q, k, v):
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v)

    return run


def _varlen(softcap, bounds, length):
    from torch.nn.attention.varlen import varlen_attn

    return lambda q, k, v: varlen_attn(q, k, v, bounds, bounds, length, length)


def _flash(module: str, softcap, bounds, length):
    """flash-attn 2, 3 and 4 share names and layout [B, T, H, d]; some releases return (out, lse)."""
    module, options = importlib.import_module(module), {"softcap": softcap} if softcap else {}

    def first(result):
        return result[0] if isinstance(result, tuple) else result

    def dense(q, k, v):
        result = module.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), **options)
        return first(result).transpose(1, 2)

    def packed(q, k, v):
        limits = {
            "cu_seqlens_q": bounds,
            "cu_seqlens_k": bounds,
            "max_seqlen_q": length,
            "max_seqlen_k": length,
        }
        return first(module.flash_attn_varlen_func(q, k, v, **limits, **options))

    return dense if bounds is None else packed


def _flash_4(softcap, bounds, length):
    if softcap and torch.cuda.get_device_capability()[0] >= 10:
        # No time limit here could end it.
        raise RuntimeError("may hang with a cap on this GPU (issue 2466 of Dao-AILab/flash-attention)")
    return _flash("flash_attn.cute", softcap, bounds, length)


def _xformers(softcap, bounds, length):
    from xformers.ops import fmha, memory_efficient_attention

    if bounds is None:
        return lambda q, k, v: memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(
            1, 2
        )
    mask = fmha.BlockDiagonalMask.from_seqlens(bounds.diff().tolist(), device=bounds.device)
    return lambda q, k, v: memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)[0]


_FLEX = {"needs": "torch.nn.attention.flex_attention:flex_attention", "packed": True, "single": True}
_BOTH = {"capped": True, "plain": True, "packed": True}
RIVALS = {
    "sdpa_flash": Rival(partial(_sdpa, SDPBackend.FLASH_ATTENTION), plain=True, cpu=True, yardstick=True),
    "sdpa_cudnn": Rival(partial(_sdpa, SDPBackend.CUDNN_ATTENTION), plain=True, yardstick=True),
    "sdpa_efficient": Rival(partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION), plain=True, single=True),
    "varlen_attn": Rival(
        _varlen, "torch.nn.attention.varlen:varlen_attn", plain=True, dense=False, packed=True, yardstick=True
    ),
    "flex": Rival(partial(_flex, lambda: torch.tanh), plain=True, **_FLEX),
    "flex_tanh": Rival(partial(_flex, lambda: torch.tanh), capped=True, **_FLEX),
    "flex_tanh_approx": Rival(partial(_flex, tanh_approx), capped=True, **_FLEX),
    "flash_attn_2": Rival(partial(_flash, "flash_attn"), "flash_attn:flash_attn_func", **_BOTH),
    "flash_attn_3": Rival(
        partial(_flash, "flash_attn_interface"), "flash_attn_interface:flash_attn_func", **_BOTH
    ),
    "flash_attn_4": Rival(_flash_4, "flash_attn.cute:flash_attn_func", **_BOTH),
    "xformers": Rival(_xformers, "xformers.ops:memory_efficient_attention", plain=True, packed=True),
}
