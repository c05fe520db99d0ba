"""Common to all kernel files: registration, casts that round the same way everywhere, exp2 and tanh.

Names inside kernels: `i_` an index, `o_` offsets, `m_` a mask, `p_` a pointer, `b_` a block of values; compile-time
constants in capitals. Program ids are widened to int64 before they are multiplied.
"""

import os
from collections.abc import Callable
from functools import lru_cache, reduce
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

LIBRARY = torch.library.Library("fastalign", "FRAGMENT")
# torch.compile sets this variable to the CUDA toolkit's assembler while a process runs. `benchmarks.aot` checks the
# code of Triton's own assembler, so every kernel must use that one.
_PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
if _PTXAS.exists():
    os.environ.setdefault("TRITON_PTXAS_PATH", str(_PTXAS))

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether kernels run in Triton's interpreter on the CPU, for tests without a GPU."""

if INTERPRETED:
    # Triton 3.6's interpreter reads a loop bound with int(array of one element), which numpy 2.4 refuses.
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_index(tensor, scope):
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_tensor_index


def register(name: str, mutates: tuple[str, ...] = ()) -> Callable:
    """Decorator: register a function that allocates outputs and launches kernels as the operator ``fastalign::NAME``.

    The operator is private and has no gradient: each operation's `autograd.Function` calls forward and backward
    operators, which takes about half the host time of `torch.library.custom_op`. The function's annotations define
    the schema. With fake tensors, as under torch.compile, it must return after the allocation (`is_fake`).
    `mutates` names the arguments that are changed in place.
    """

    def decorate(function: Callable):
        def implementation(*arguments):
            device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
            try:
                if device.type == "cuda" and device.index != torch.cuda.current_device():
                    with torch.cuda.device(device):  # Triton launches on the current device
                        return function(*arguments)
                return function(*arguments)
            except (RuntimeError, ValueError) as error:
                # Triton's, without a driver, or of a pointer that no GPU can read.
                if device.type != "cpu" or INTERPRETED:
                    raise
                raise ValueError(
                    "fastalign.kernels take tensors on a GPU, got cpu: "
                    "call the function of the same name in fastalign.ops"
                ) from error

        LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=mutates))
        LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastalign::{name}", function, lib=LIBRARY)
        return getattr(torch.ops.fastalign, name).default

    return decorate


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no memory."""
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def promoted(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of the sum of the given tensors, as in eager PyTorch."""
    return reduce(torch.promote_types, [tensor.dtype for tensor in tensors if tensor is not None])


def with_unit_stride(tensor: Tensor | None) -> Tensor | None:
    """The tensor, copied only if its last dimension is not contiguous."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def architecture() -> int:
    """80, 90, 100...: the current GPU's compute capability, for tables of tiles; 90 in the interpreter."""
    return 90 if INTERPRETED else _architecture(triton.runtime.driver.active.get_current_device())


@lru_cache  # called at each launch
def _architecture(device: int) -> int:
    return triton.runtime.driver.active.get_current_target().arch


def row_tiles(rows: int, width: int, height: int = 4) -> tuple[int, dict[str, int]]:
    """How many tiles cover [rows, width], and the tile of kernels that move rows.

    A tile has `height` rows of up to 256 channels: with four rows, sixteen bytes of bf16 per thread.
    """
    channels = min(256, triton.next_power_of_2(width))
    count = triton.cdiv(rows, height) * triton.cdiv(width, channels)
    return count, {"BLOCK_T": height, "BLOCK_D": channels, "num_warps": 4}


def image_chunks(images: int, tiles: int) -> tuple[int, int]:
    """Images per chunk and number of chunks for sums over images in two stages.

    There are enough programs to fill a GPU, and as many on every GPU, so that the order of summation is fixed.
    """
    per_chunk = triton.cdiv(images, max(1, min(images, triton.cdiv(2048, max(tiles, 1)))))
    return per_chunk, triton.cdiv(images, max(per_chunk, 1))


@triton.jit
def tile_of_rows(i_tile, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets [BLOCK_T] of rows and [BLOCK_D] of channels of a tile of [rows, D]."""
    i_t, i_d = i_tile // tl.cdiv(D, BLOCK_D), i_tile % tl.cdiv(D, BLOCK_D)
    return i_t * BLOCK_T + tl.arange(0, BLOCK_T), i_d * BLOCK_D + tl.arange(0, BLOCK_D)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """fp32 -> DTYPE, to the nearest even. The interpreter's own cast to bf16 truncates."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def store(p_x, x, mask):
    """Store fp32 values in the pointer's dtype."""
    tl.store(p_x, narrow(x, p_x.dtype.element_ty), mask=mask)


@triton.jit
def exp2(x):
    """2^x of fp32 in one instruction; results below 2^-126 become zero. tl.exp2 adds three instructions for those."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def tanh(x, APPROXIMATE: tl.constexpr):
    """The hyperbolic tangent of fp32. APPROXIMATE: the hardware's, with a relative error of 2^-11."""
    if APPROXIMATE and not INTERPRETED:
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    # Below one the quotient loses relative precision; the series at x / 4, doubled twice, keeps that of fp32.
    quotient = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    quarter = 0.25 * tl.minimum(tl.abs(x), 1.0)
    y = quarter * quarter
    tail = y * (-1.0 / 3.0 + y * (2.0 / 15.0 + y * (-17.0 / 315.0 + y * (62.0 / 2835.0))))
    half = quarter + quarter * tail
    half = 2.0 * half / (1.0 + half * half)
    small = 2.0 * half / (1.0 + half * half)
    return tl.where(tl.abs(x) < 1.0, tl.where(x < 0, -small, small), quotient)
