"""The optional C++/CUDA extension of `csrc/`: drawing and packing masks, with the bits of `fastalign.method.masks`.

FASTALIGN_EXTENSION=0 in the environment disables it.

Shapes: B images, M = 1 + complement + full masks per image, N = rows * columns patches, P prefix tokens, T = P + N,
L packed rows.
"""

import os
from pathlib import Path

import torch
from torch import Tensor

KINDS = ("uniform", "bernoulli", "blockwise")
_LIBRARY = Path(__file__).parents[1] / "_C.abi3.so"


def _load() -> tuple[str, frozenset[str]]:
    """The status, and the device types that have kernels."""
    if os.environ.get("FASTALIGN_EXTENSION", "1") == "0":
        return "absent: FASTALIGN_EXTENSION=0", frozenset()
    if not _LIBRARY.exists():
        return "absent: it was not built at install (see setup.py)", frozenset()
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"absent: {str(error).splitlines()[0]}", frozenset()
    if torch._C._dispatch_has_kernel_for_dispatch_key("fastalign::draw_masks", "CUDA"):
        return "C++ and CUDA", frozenset({"cpu", "cuda"})
    return "C++ only", frozenset({"cpu"})


_STATUS, _DEVICES = _load()


def status() -> str:
    """'C++ and CUDA', 'C++ only', or 'absent: ' and the reason."""
    return _STATUS


def available(device: torch.device) -> bool:
    """Whether the extension has kernels for tensors of this device."""
    return device.type in _DEVICES


def draw_masks(
    sample_ids: Tensor,
    grid: tuple[int, int],
    *,
    kind: str,
    ratio: float,
    seed: int,
    epoch: int = 0,
    complement: bool,
    full: bool,
) -> Tensor:
    """Masks, the same bits as those of `fastalign.method.masks` in PyTorch.

    Args:
        sample_ids: [B] int64.
        grid: (rows, columns) of patches.
        kind: uniform | bernoulli | blockwise.
        ratio: of Bernoulli and blockwise masks.
        seed: 64-bit.
        epoch: 0..2^32-1.
        complement, full: which masks follow the sampled one.

    Returns:
        [B, M, N] bool, True = visible, on the device of `sample_ids`.

    Raises:
        ValueError: a wrong argument, named.
    """
    arguments = _draw_arguments(sample_ids, grid, kind, ratio, seed, epoch, complement, full)
    return torch.ops.fastalign.draw_masks(*arguments)


def pack_masks(visible: Tensor, prefix: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `fastalign.ops.reference.Packing`.

    Args:
        visible: [B, M, N] bool.
        prefix: P.
        length: L. If it is less than the number of visible tokens, the CPU raises a RuntimeError; a GPU, which does
            not wait for the number, drops the rows from L on and gives their tokens slot -1.

    Raises:
        ValueError: a wrong argument, named.
    """
    _check_tensor("visible", visible, torch.bool, 3)
    _check(prefix >= 0 and length >= 0, f"prefix and length must not be negative, got {prefix} and {length}")
    return torch.ops.fastalign.pack_masks(visible, prefix, length)


def draw_packed_masks(
    sample_ids: Tensor, grid: tuple[int, int], *, prefix: int, length: int, epoch: int = 0, **options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`draw_masks` and `pack_masks` in one call: (visible, indices, slots, cu_seqlens, counts).

    On a GPU this is one launch with `complement`, because then every image has the same number of visible tokens,
    2P + N, or 3P + 2N with `full`; else two. Arguments and errors as of the two functions.
    """
    arguments = _draw_arguments(sample_ids, grid, epoch=epoch, **options)
    _check(prefix >= 0 and length >= 0, f"prefix and length must not be negative, got {prefix} and {length}")
    return torch.ops.fastalign.draw_packed_masks(*arguments, prefix, length)


def _draw_arguments(sample_ids, grid, kind, ratio, seed, epoch, complement, full) -> tuple:
    """The operator's arguments: the kind as its number, the seed as the signed integer of the same bits."""
    _check_tensor("sample_ids", sample_ids, torch.int64, 1)
    _check(kind in KINDS, f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    rows, columns = grid
    _check(rows >= 0 and columns >= 0, f"grid must not be negative, got {rows} x {columns}")
    _check(0.0 <= ratio <= 1.0, f"ratio must be in 0..1, got {ratio}")
    signed = ((seed + 2**63) & (2**64 - 1)) - 2**63
    return sample_ids, rows, columns, KINDS.index(kind), ratio, signed, epoch, complement, full


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"masks: {message}")


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, dimensions: int) -> None:
    wanted, found = f"{dtype} with {dimensions} dimension(s)", f"{tensor.dtype} {list(tensor.shape)}"
    _check(tensor.dtype == dtype and tensor.dim() == dimensions, f"{name} must be {wanted}, got {found}")
    _check(available(tensor.device), f"{name}: the extension ({_STATUS}) does not support {tensor.device}")


def _draw_fake(sample_ids, rows, columns, kind, ratio, seed, epoch, complement, full):
    shape = (sample_ids.shape[0], 1 + complement + full, rows * columns)
    return sample_ids.new_empty(shape, dtype=torch.bool)


def _pack_fake(visible, prefix, length):
    images, copies, patches = visible.shape
    shapes = ((length,), (images, copies, prefix + patches), (images * copies + 1,), (images * copies,))
    return tuple(visible.new_empty(shape, dtype=torch.int32) for shape in shapes)


def _draw_packed_fake(*arguments):
    *draw, prefix, length = arguments
    visible = _draw_fake(*draw)
    return visible, *_pack_fake(visible, prefix, length)


if _DEVICES:
    torch.library.register_fake("fastalign::draw_masks", _draw_fake)
    torch.library.register_fake("fastalign::pack_masks", _pack_fake)
    torch.library.register_fake("fastalign::draw_packed_masks", _draw_packed_fake)
