"""FlexAttention with a soft-cap, dense and packed. Importing this loads Inductor."""

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch._inductor.lowering import make_pointwise, register_lowering
from torch._inductor.virtualized import ops
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
"""Rows and columns of a block of a mask, FlexAttention's default."""
SHAPES = 256
"""Shapes that may be compiled; torch's limit of eight would end a run whose lengths vary."""


@torch.library.custom_op("fastalign::flex_tanh_approx", mutates_args=())
def _operator(x: Tensor) -> Tensor:
    return torch.tanh(x)


@_operator.register_fake
def _fake(x):
    return torch.empty_like(x)


def _backward(ctx, gradient):
    (y,) = ctx.saved_tensors
    return gradient * (1 - y * y)


# FlexAttention traces a score_mod for its gradient, and without compilation maps it over batch, heads and positions.
_operator.register_autograd(
    _backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output)
)
_operator.register_vmap(lambda info, in_dims, x: (_operator(x), in_dims[0]))
tanh_approx = torch.ops.fastalign.flex_tanh_approx.default
"""tanh as an operator that Inductor lowers to the GPU's instruction."""
_INSTRUCTION = partial(
    ops.inline_asm_elementwise, asm="tanh.approx.f32 $0, $1;", constraints="=f,f", dtype=torch.float32
)
register_lowering(tanh_approx)(make_pointwise(_INSTRUCTION))


def block_mask(bounds: Tensor, length: int) -> BlockMask:
    """FlexAttention's mask of packed sequences [S + 1] int32 in `length` rows; padding attends to itself.

    Built from the first and last sequence of each block: `create_block_mask` materializes every pair of rows, ten
    gigabytes for 100,000 rows.
    """
    rows = torch.arange(length, device=bounds.device)
    sequence = torch.searchsorted(bounds.contiguous(), rows.int(), right=True).int()
    first = sequence[::BLOCK]
    ends = (torch.arange(len(first), device=bounds.device) + 1) * BLOCK
    last = sequence[(ends - 1).clamp_max(length - 1)]
    touched = (first[:, None] <= last) & (first <= last[:, None])
    single = (first == last) & (ends <= length)
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


def score_mod(softcap: float | None, tanh: Callable = torch.tanh) -> Callable | None:
    """FlexAttention's modification of a logit."""
    return softcap and (lambda score, b, h, i, j: softcap * tanh(score / softcap))


@lru_cache
def _compiled() -> Callable:
    """FlexAttention as a kernel, one per shape; without torch.compile it would materialize the scores."""
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, SHAPES)
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


def flex(q: Tensor, k: Tensor, v: Tensor, softcap: float | None, mask: BlockMask | None) -> Tensor:
    """Attention by FlexAttention: packed [L, H, d] with a `block_mask`, or dense [B, H, T, d] with None.

    In 16 bits it uses the GPU's tanh, as our kernel does.
    """
    # On a CPU FlexAttention refuses inputs that require a gradient, even under no_grad.
    if not torch.is_grad_enabled():
        q, k, v = (x.detach() for x in (q, k, v))
    modification = score_mod(softcap, tanh_approx if softcap and _approximate(q) else torch.tanh)
    function = flex_attention if torch.compiler.is_compiling() else _compiled()
    if mask is None:
        return function(q, k, v, score_mod=modification)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return function(q, k, v, score_mod=modification, block_mask=mask).squeeze(0).transpose(0, 1)


def _approximate(q: Tensor) -> bool:
    return q.is_cuda and q.dtype != torch.float32
