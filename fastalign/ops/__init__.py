"""The only entry point to the kernels: checks arguments, then runs Triton on a GPU and eager PyTorch elsewhere.

Both give the same result up to rounding. `fastalign.ops.reference` defines each operation; the function here and the
kernel have the same name and signature. A wrong dtype, shape or device is a ValueError that names the argument.
The environment variable FASTALIGN_KERNELS=0 selects eager PyTorch; FASTALIGN_KERNELS=1 selects Triton also on a CPU,
which then needs TRITON_INTERPRET=1 (slow, for tests).
"""

import functools
import inspect
import os
from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from fastalign.ops import extension, reference
from fastalign.ops.reference import LOSSES, Packing

__all__ = [
    "expand_masked",
    "mask_tokens",
    "pack",
    "pack_masks",
    "reconstruction_loss",
    "softcap_attention",
    "unpack",
]
MODE = os.environ.get("FASTALIGN_KERNELS", "auto")
try:
    names = [name for name in __all__ if name != "pack_masks"]
    KERNELS = {name: getattr(import_module(f"fastalign.kernels.{name}"), name) for name in names}
except ImportError:
    KERNELS = {}
"""Operation -> its Triton kernel; empty where triton is not installed."""

_PACKING = {
    "packing.indices": "int32 L",
    "packing.slots": "int32 B M T",
    "packing.cu_seqlens": "int32 S",
    "packing.counts": "int32 C",
}


def kernels_on(device: str, dtype: torch.dtype) -> bool:
    """Whether an operation on tensors of this dtype on this kind of device runs in Triton."""
    if not KERNELS or MODE == "0" or (MODE != "1" and device != "cuda"):
        return False
    return not dtype.is_floating_point or dtype in (torch.float32, torch.bfloat16, torch.float16)


def _check(condition: bool, name: str, wanted: str, found: Tensor) -> bool:
    if not condition:
        raise ValueError(f"{name} must be {wanted}, got {found.dtype} {list(found.shape)}")
    return True


def _check_shape(name: str, tensor: Tensor, spec: str, sizes: dict[str, int]) -> None:
    """Compare a tensor with a spec such as "bool B M N". The first use of a letter sets its size in `sizes`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    kind, *dimensions = spec.split()
    wanted = [int(d) if d.isdigit() else sizes.get(d) for d in dimensions]
    fits = tensor.is_floating_point() if kind == "float" else tensor.dtype == getattr(torch, kind)
    fits = fits and tensor.dim() == len(dimensions)
    if not (fits and all(w is None or w == n for w, n in zip(wanted, tensor.shape, strict=True))):
        pairs = zip(dimensions, wanted, strict=True)
        shape = ", ".join(d if w is None or d.isdigit() else f"{d} = {w}" for d, w in pairs)
        _check(False, name, f"{kind} [{shape}]", tensor)
    sizes.update(zip(dimensions, tensor.shape, strict=True))


def _operation(definition: Callable, check=lambda sizes, **given: True, **specs: str) -> Callable:
    """Wrap a definition of `reference`, the eager function, in checks and dispatch; signature and docstring stay.

    `check`: (sizes, **arguments) -> whether the kernel supports the case; it also checks what `specs` cannot express.
    `specs`: dtype and shape of each tensor argument, in the format of `_check_shape`; `_PACKING` has a packing's.
    """
    parameters = inspect.signature(definition).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    name = definition.__name__

    @functools.wraps(definition)
    def operation(*args, **kwargs):
        given = {**defaults, **dict(zip(positional, args, strict=False)), **kwargs}
        tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
        if (packing := given.get("packing")) is not None:
            tensors |= {f"packing.{key}": tensor for key, tensor in Packing(*packing)._asdict().items()}
        sizes: dict[str, int] = {}
        for key, spec in (_PACKING | specs).items():
            tensor = tensors.get(key, given.get(key))
            if tensor is not None or (key in given and key not in defaults):
                _check_shape(key, tensor, spec, sizes)
        supported = check(sizes, **given)
        tensors = {key: tensor for key, tensor in tensors.items() if tensor.dim()}  # a scale may be on any
        if len({tensor.device for tensor in tensors.values()}) > 1:
            places = ", ".join(f"{key} on {tensor.device}" for key, tensor in tensors.items())
            raise ValueError(f"{name}: all arguments must be on one device, got {places}")
        if supported and all(kernels_on(tensor.device.type, tensor.dtype) for tensor in tensors.values()):
            # A kernel may lack an argument that `check` requires to be None.
            return KERNELS[name](*args, **{key: value for key, value in kwargs.items() if value is not None})
        return definition(*args, **kwargs)

    return operation


def _check_pack(sizes, packing, **_) -> bool:
    tokens = sizes.get("P", 0) + sizes["N"]
    return _check(sizes["T"] == tokens, "packing.slots", f"int32 [B, M, P + N = {tokens}]", packing.slots)


def _check_expand(sizes, tokens, visible, **_) -> bool:
    return _check(sizes["N"] <= sizes["T"], "visible", f"[B, M, N] with N <= T = {sizes['T']}", visible)


def _check_attention(sizes, q, k, v, softcap, bias, cu_seqlens, max_seqlen) -> bool:
    _check_shape("q", q, "float B H T d" if cu_seqlens is None else "float L H d", sizes)
    for name, x in (("k", k), ("v", v)):
        _check(x.shape == q.shape and x.dtype == q.dtype, name, f"as q, {q.dtype} {list(q.shape)}", x)
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be a positive finite number or None, got {softcap}")
    if cu_seqlens is not None and (max_seqlen is None or bias is not None):
        raise ValueError("packed attention (cu_seqlens) needs max_seqlen and takes no bias")
    return bias is None and q.shape[-1] <= 128


def _check_loss(sizes, prediction, target, visible, loss, scale, packing, **_) -> bool:
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    if packing is None:
        _check_shape("prediction", prediction, "float B M T D", sizes)
        shape = prediction.shape
        fits = target.dim() == 4 and all(n in (1, m) for n, m in zip(target.shape, shape, strict=True))
        _check(fits, "target", f"broadcastable to {list(shape)}", target)
    else:
        _check_shape("prediction", prediction, "float L D", sizes)
        shapes = [sizes["L"], sizes["D"]], [sizes["B"], sizes["T"], sizes["D"]]
        _check(list(target.shape) in shapes, "target", f"{shapes[0]} or {shapes[1]}", target)
    learned = target.requires_grad
    if isinstance(scale, Tensor):
        _check_shape("scale", scale, "float", sizes)
        learned = learned or scale.requires_grad
    # fp16 gradients of a mean would underflow before a gradient scaler sees them; a cosine needs a row in registers.
    return not learned and prediction.dtype != torch.float16 and prediction.shape[-1] <= 8192


_ROWS = {"prefix": "float P D", "position": "float N D"}
mask_tokens = _operation(
    reference.mask_tokens, patches="float B N D", hidden="float D", visible="bool B M N", **_ROWS
)
expand_masked = _operation(
    reference.expand_masked, _check_expand, tokens="float B T D", visible="bool B M N", position="float 1 T D"
)
pack = _operation(reference.pack, _check_pack, patches="float B N D", **_ROWS)
unpack = _operation(reference.unpack, packed="float L D")
softcap_attention = _operation(reference.softcap_attention, _check_attention, cu_seqlens="int32 S")
reconstruction_loss = _operation(reference.reconstruction_loss, _check_loss, visible="bool B M N")


def pack_masks(visible: Tensor, prefix: int, length: int | None = None) -> Packing:
    """The `Packing` of the visible tokens of all masked copies.

    Args:
        visible: [B, M, N] bool.
        prefix: P, tokens that every copy keeps.
        length: L, rows. The default is the number of tokens, rounded up to one of sixteen lengths to limit the number
            of shapes; computing it waits for a GPU. Too small a length is an error, on a GPU an asynchronous one.
    """
    _check_shape("visible", visible, "bool B M N", {})
    if length is None:
        images, copies, patches = visible.shape
        tokens = int(visible.sum()) + images * copies * prefix
        step = max(1, -(-images * copies * (patches + prefix) // 16))
        length = -(-tokens // step) * step
    if extension.available(visible.device):
        packing = Packing(*torch.ops.fastalign.pack_masks(visible, prefix, length))
    else:
        packing = reference.pack_masks(visible, prefix, length)
    # Without waiting for a GPU.
    torch._assert_async(packing.cu_seqlens[-1] <= length, f"pack_masks: more tokens than length={length}")
    return packing


def __dir__() -> list[str]:
    return __all__
