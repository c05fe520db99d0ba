"""The optional C++/CUDA extension in `csrc/`: it draws and packs the same masks as `fastalign.method.masks`.

FASTALIGN_EXTENSION=0 in the environment disables it. `csrc/ops.cpp` has the operators' signatures and checks.
"""

import os
from pathlib import Path

import torch

_LIBRARY = Path(__file__).parents[1] / "_C.abi3.so"


def _load() -> tuple[str, frozenset[str]]:
    """The status, and the device types with kernels."""
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
