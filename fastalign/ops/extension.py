"""The C++/CUDA extension of `csrc/`: mask drawing and packing in one pass, with the bits of `fastalign.method.masks`.

It is optional. `status` says whether it is there and why not; FASTALIGN_EXTENSION=0 in the environment leaves
it unused, so that a run with and without it can be compared.

Shapes: B images, M = 1 + complement + full masks an image, N = rows * columns patches, P prefix tokens,
T = P + N, L rows of the packed row.
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
    """ "C++ and CUDA", "C++ only", or "absent: " and the reason."""
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
    """Masks, the same bits as `fastalign.method.masks`' PyTorch path gives.

    Args:
        sample_ids: [B] int64.
        grid: (rows, columns) of patches.
        kind: uniform | bernoulli | blockwise.
        ratio: of Bernoulli and blockwise masks.
        seed: 64-bit.
        epoch: 0..2^32-1.
        complement, full: which masks follow the sample.

    Returns:
        [B, M, N] bool, True = visible, on the device of `sample_ids`.

    Raises:
        ValueError: a wrong argument, named.
    """
    arguments = _draw_arguments("draw_masks", sample_ids, grid, kind, ratio, seed, epoch, complement, full)
    return torch.ops.fastalign.draw_masks(*arguments)


def pack_masks(visible: Tensor, prefix: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where the visible tokens of all masked copies stand when they are laid one after another.

    Sequence s = b * M + m holds its P prefix tokens and then its visible patches, ascending.

    Args:
        visible: [B, M, N] bool.
        prefix: P.
        length: L, at least the number of visible tokens. On the CPU a smaller one is a RuntimeError; a GPU
            drops the rows from L on and gives them slot -1, because nobody waits for it to find out.

    Returns:
        indices [L] int32: b * T + t of the token in each row, -1 in the padding at the end;
        slots [B, M, T] int32: each token's row, -1 where it is hidden;
        cu_seqlens [B * M + 1] int32: the first row of each sequence, and the end;
        counts [B * M] int32: tokens of each sequence, its prefix included.

    Raises:
        ValueError: a wrong argument, named.
    """
    _check_tensor("pack_masks", "visible", visible, torch.bool, 3)
    _check_packing("pack_masks", prefix, length)
    return torch.ops.fastalign.pack_masks(visible, prefix, length)


def draw_packed_masks(
    sample_ids: Tensor,
    grid: tuple[int, int],
    *,
    kind: str,
    ratio: float,
    seed: int,
    epoch: int = 0,
    complement: bool,
    full: bool,
    prefix: int,
    length: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`draw_masks` and `pack_masks` in one go: (visible, indices, slots, cu_seqlens, counts).

    On a GPU this is one launch with `complement`, because then every image has the same number of visible
    tokens, 2P + N, and P + N more with `full`; else two. Arguments and errors as of the two functions.
    """
    name = "draw_packed_masks"
    arguments = _draw_arguments(name, sample_ids, grid, kind, ratio, seed, epoch, complement, full)
    _check_packing(name, prefix, length)
    return torch.ops.fastalign.draw_packed_masks(*arguments, prefix, length)


def _draw_arguments(name, sample_ids, grid, kind, ratio, seed, epoch, complement, full) -> tuple:
    """The operator's arguments: the kind as its number, the seed as the signed integer of the same bits."""
    _check_tensor(name, "sample_ids", sample_ids, torch.int64, 1)
    if kind not in KINDS:
        raise ValueError(f"{name}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    rows, columns = grid
    if rows < 0 or columns < 0:
        raise ValueError(f"{name}: grid must not be negative, got {rows} x {columns}")
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"{name}: ratio must lie in 0..1, got {ratio}")
    signed = ((seed + 2**63) & (2**64 - 1)) - 2**63
    return sample_ids, rows, columns, KINDS.index(kind), ratio, signed, epoch, complement, full


def _check_tensor(name: str, argument: str, tensor: Tensor, dtype: torch.dtype, dimensions: int) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{name}: {argument} must be {dtype}, got {tensor.dtype}")
    if tensor.dim() != dimensions:
        raise ValueError(f"{name}: {argument} must have {dimensions} dimension(s), got {tuple(tensor.shape)}")
    if not available(tensor.device):
        raise ValueError(
            f"{name}: {argument} is on {tensor.device}, where the extension ({_STATUS}) has no kernel"
        )


def _check_packing(name: str, prefix: int, length: int) -> None:
    if prefix < 0:
        raise ValueError(f"{name}: prefix must not be negative, got {prefix}")
    if length < 0:
        raise ValueError(f"{name}: length must not be negative, got {length}")


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
