"""The only door to the kernels: checks arguments, then Triton on a GPU, eager PyTorch elsewhere.

Both give the same result to rounding; `fastalign.ops.reference` documents each operation. The environment variable
FASTALIGN_KERNELS=0 keeps to eager PyTorch; FASTALIGN_KERNELS=1 insists on Triton, also on a CPU, which then
needs Triton's interpreter (TRITON_INTERPRET=1, slow, for tests).
"""

import os

import torch
from torch import Tensor

from fastalign.ops import extension, reference
from fastalign.ops.reference import LOSSES, Packing

try:
    from fastalign.kernels.expand_masked import expand_masked as _expand_masked
    from fastalign.kernels.mask_tokens import mask_tokens as _mask_tokens
    from fastalign.kernels.pack import pack as _pack
    from fastalign.kernels.reconstruction_loss import reconstruction_loss as _reconstruction_loss
    from fastalign.kernels.softcap_attention import softcap_attention as _softcap_attention
    from fastalign.kernels.unpack import unpack as _unpack
except ImportError:  # no Triton for this platform
    TRITON = False
else:
    TRITON = True

MODE = os.environ.get("FASTALIGN_KERNELS", "auto")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels_on(device: str, dtype: torch.dtype) -> bool:
    """Whether an operation on tensors of this dtype on this kind of device runs in Triton."""
    if not TRITON or MODE == "0" or (MODE != "1" and device != "cuda"):
        return False
    return dtype in _DTYPES or not dtype.is_floating_point


def uses_kernels(*tensors: Tensor | None) -> bool:
    """Whether an operation on these tensors runs in Triton."""
    given = [tensor for tensor in tensors if tensor is not None]
    return all(kernels_on(tensor.device.type, tensor.dtype) for tensor in given)


def _check(condition: bool, name: str, wanted: str, found: Tensor) -> None:
    if not condition:
        raise ValueError(f"{name} must be {wanted}, got {found.dtype} {list(found.shape)}")


def _check_devices(**tensors: Tensor | None) -> None:
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if len({tensor.device for tensor in given.values()}) > 1:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in given.items())
        raise ValueError(f"all arguments must be on one device, got {places}")


def _check_masks(visible: Tensor, images: int, patches: int | None = None) -> None:
    """Refuse masks that are not bool [B, M, N] of so many images and patches."""
    right = visible.dtype == torch.bool and visible.dim() == 3 and visible.shape[0] == images
    right = right and patches in (None, visible.shape[2])
    _check(
        right, "visible", f"bool [B = {images}, M, N{'' if patches is None else f' = {patches}'}]", visible
    )


def _check_rows(prefix: Tensor | None, position: Tensor | None, count: int, width: int) -> None:
    if prefix is not None:
        _check(prefix.dim() == 2 and prefix.shape[1] == width, "prefix", f"[P, D = {width}]", prefix)
    if position is not None:
        _check(position.shape == (count, width), "position", f"[N = {count}, D = {width}]", position)


def mask_tokens(
    patches: Tensor,
    hidden: Tensor,
    visible: Tensor,
    prefix: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    """The first block's input for M masked copies of each image: see `reference.mask_tokens`."""
    _check(patches.dim() == 3 and patches.is_floating_point(), "patches", "floating point [B, N, D]", patches)
    images, count, width = patches.shape
    _check_masks(visible, images, count)
    _check(hidden.shape == (width,), "hidden", f"[D = {width}]", hidden)
    _check_rows(prefix, position, count, width)
    _check_devices(patches=patches, hidden=hidden, visible=visible, prefix=prefix, position=position)
    run = _mask_tokens if uses_kernels(patches, hidden, prefix, position) else reference.mask_tokens
    return run(patches, hidden, visible, prefix, position)


def expand_masked(tokens: Tensor, visible: Tensor, position: Tensor) -> Tensor:
    """The decoder's input: see `reference.expand_masked`."""
    _check(tokens.dim() == 3 and tokens.is_floating_point(), "tokens", "floating point [B, T, D]", tokens)
    images, count, width = tokens.shape
    _check_masks(visible, images)
    _check(visible.shape[2] <= count, "visible", f"[B, M, N] with N <= T = {count}", visible)
    _check(position.shape == (1, count, width), "position", f"[1, T = {count}, D = {width}]", position)
    _check_devices(tokens=tokens, visible=visible, position=position)
    run = _expand_masked if uses_kernels(tokens, position) else reference.expand_masked
    return run(tokens, visible, position)


def pack_masks(visible: Tensor, prefix: int, length: int | None = None) -> Packing:
    """Where the visible tokens of all masked copies stand in one row: see `reference.pack_masks`.

    Args:
        visible: [B, M, N] bool.
        prefix: P, tokens that every copy keeps.
        length: rows; default the tokens present, rounded up to one of sixteen lengths so that shapes stay few,
            which waits for a GPU. A length that is too small is an error, on a GPU an asynchronous one.
    """
    _check_masks(visible, len(visible))
    if length is None:
        length = packed_length(
            int(visible.sum()) + visible.shape[0] * visible.shape[1] * prefix, visible, prefix
        )
    if extension.available(visible.device):
        packing = Packing(*extension.pack_masks(visible, prefix, length))
    else:
        packing = reference.pack_masks(visible, prefix, length)
    check_length(packing)
    return packing


def check_length(packing: Packing) -> None:
    """Refuse a packing with more tokens than rows, without waiting for a GPU."""
    length = len(packing.indices)
    torch._assert_async(packing.cu_seqlens[-1] <= length, f"pack_masks: more tokens than length={length}")


def packed_length(tokens: int, visible: Tensor, prefix: int) -> int:
    """`tokens` rounded up to a sixteenth of all B M (P + N) tokens."""
    images, copies, patches = visible.shape
    step = max(1, -(-images * copies * (patches + prefix) // 16))
    return -(-tokens // step) * step


def _check_packing(packing: Packing, device: torch.device) -> None:
    shapes = {"indices": 1, "slots": 3, "cu_seqlens": 1, "counts": 1}
    for name, dimensions in shapes.items():
        tensor = getattr(packing, name)
        right = tensor.dtype == torch.int32 and tensor.dim() == dimensions and tensor.device == device
        _check(right, f"packing.{name}", f"int32 with {dimensions} dimension(s) on {device}", tensor)


def pack(
    patches: Tensor, packing: Packing, prefix: Tensor | None = None, position: Tensor | None = None
) -> Tensor:
    """The visible tokens of every masked copy in one row: see `reference.pack`."""
    _check(patches.dim() == 3 and patches.is_floating_point(), "patches", "floating point [B, N, D]", patches)
    images, count, width = patches.shape
    _check_packing(packing, patches.device)
    before = 0 if prefix is None else len(prefix)
    right = packing.slots.shape[0] == images and packing.slots.shape[2] == before + count
    _check(right, "packing.slots", f"[B = {images}, M, P + N = {before + count}]", packing.slots)
    _check_rows(prefix, position, count, width)
    _check_devices(patches=patches, prefix=prefix, position=position)
    if not uses_kernels(patches, prefix, position):
        return reference.pack(patches, packing, prefix, position)
    return _pack(patches, packing.slots, packing.cu_seqlens, len(packing.indices), prefix, position)


def unpack(packed: Tensor, packing: Packing) -> Tensor:
    """Each token back in its place, zeros where a patch is hidden: see `reference.unpack`."""
    _check_packing(packing, packed.device)
    right = packed.dim() == 2 and len(packed) == len(packing.indices) and packed.is_floating_point()
    _check(right, "packed", f"floating point [L = {len(packing.indices)}, D]", packed)
    return _unpack(packed, packing.slots) if uses_kernels(packed) else reference.unpack(packed, packing)


def softcap_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softcap: float | None = None,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Soft-capped attention, dense or packed: see `reference.softcap_attention`. A bias is eager PyTorch's."""
    dimensions = 4 if cu_seqlens is None else 3
    _check(q.dim() == dimensions, "q", "[B, H, T, d]" if dimensions == 4 else "packed [L, H, d]", q)
    for name, x in (("k", k), ("v", v)):
        _check(x.shape == q.shape and x.dtype == q.dtype, name, f"as q, {q.dtype} {list(q.shape)}", x)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be a positive number or None, got {softcap}")
    if cu_seqlens is not None:
        _check(
            cu_seqlens.dtype == torch.int32 and cu_seqlens.dim() == 1,
            "cu_seqlens",
            "int32 [S + 1]",
            cu_seqlens,
        )
        if max_seqlen is None or bias is not None:
            raise ValueError("packed attention (cu_seqlens) needs max_seqlen and takes no bias")
    _check_devices(q=q, k=k, v=v, bias=bias, cu_seqlens=cu_seqlens)
    options = {"softcap": softcap, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
    if bias is None and q.shape[-1] <= 128 and uses_kernels(q):
        return _softcap_attention(q, k, v, **options)
    return reference.softcap_attention(q, k, v, bias=bias, **options)


def reconstruction_loss(
    prediction: Tensor,
    target: Tensor,
    visible: Tensor,
    *,
    loss: str = "mse",
    scale: Tensor | float = 1.0,
    prefix_visible: bool = False,
    packing: Packing | None = None,
) -> Tensor:
    """The reconstruction loss, dense or packed: see `reference.reconstruction_loss`.

    The kernel writes the gradient along with the loss, so that backward through one loss can run once only.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    _check(visible.dtype == torch.bool and visible.dim() == 3, "visible", "bool [B, M, N]", visible)
    if packing is None:
        _check(prediction.dim() == 4, "prediction", "[B, M, T, D]", prediction)
        _check(prediction.shape[:2] == visible.shape[:2], "visible", "[B, M, N] of the prediction", visible)
        fits = target.dim() == 4 and all(
            n in (1, m) for n, m in zip(target.shape, prediction.shape, strict=True)
        )
        _check(fits, "target", f"broadcastable to {list(prediction.shape)}", target)
    else:
        _check_packing(packing, prediction.device)
        length, width = len(packing.indices), prediction.shape[-1]
        _check(prediction.shape == (length, width), "prediction", f"[L = {length}, D]", prediction)
        whole = (visible.shape[0], packing.slots.shape[2], width)
        fits = target.shape in ((length, width), whole)
        _check(fits, "target", f"[{length}, {width}] or {list(whole)}", target)
    if isinstance(scale, Tensor):
        _check(scale.dim() == 0, "scale", "a single number", scale)
    _check_devices(prediction=prediction, target=target, visible=visible)
    options = {"loss": loss, "scale": scale, "prefix_visible": prefix_visible, "packing": packing}
    # fp16 gradients of a mean would underflow before a gradient scaler sees them; a cosine needs a row in registers.
    fixed = not (target.requires_grad or (isinstance(scale, Tensor) and scale.requires_grad))
    suits = fixed and prediction.dtype != torch.float16 and prediction.shape[-1] <= 8192
    run = (
        _reconstruction_loss if suits and uses_kernels(prediction, target) else reference.reconstruction_loss
    )
    return run(prediction, target, visible, **options)
