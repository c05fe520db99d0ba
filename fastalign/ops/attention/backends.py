"""Every implementation of attention behind one signature, with the cases that it supports.

Only this file knows the layouts, supported cases and packed formats of the libraries. A library is imported at its
first use, so those that are not installed cost nothing.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fastalign import ops
from fastalign.ops import reference

HALF = (torch.bfloat16, torch.float16)
SINGLE = (*HALF, torch.float32)
ANY = (*SINGLE, torch.float64)


class Sequences(NamedTuple):
    """Sequences packed in L rows: sequence s is rows bounds[s] to bounds[s + 1]; rows after the last are padding."""

    bounds: Tensor  # [S + 1] int32
    longest: int  # an upper bound on their lengths


class Case(NamedTuple):
    """The properties of a call that decide which implementations support it."""

    device: str  # cpu or cuda
    dtype: torch.dtype
    capped: bool
    biased: bool
    packed: bool
    length: int  # T, or of the longest packed sequence
    width: int  # d, of a head
    gradient: bool  # a backward pass follows
    compiled: bool = False  # inside torch.compile


@dataclass(frozen=True)
class Backend:
    """One implementation and the cases that it supports."""

    run: Callable  # (q, k, v, softcap, bias, sequences) -> out, shapes as for `attention`
    needs: str = "torch:nn"  # "module:attribute" that must be importable
    get: str = ""  # how to install it
    capped: bool = False
    biased: bool = False
    dense: bool = True
    packed: bool = False
    dtypes: tuple[torch.dtype, ...] = HALF  # on a GPU
    cpu: bool = False  # it runs on a CPU too, in any dtype
    step: int = 8  # the head width must be a multiple of it
    widest: int = 256
    archs: tuple[int, int] = (80, 999)  # first and last GPU architecture
    capped_arch: int = 999  # the last with a cap
    compiles: bool = True  # without a graph break under torch.compile

    def missing(self) -> str | None:
        """None if it is installed, else that it is not, why, and how to install it."""
        why = _missing(self.needs)
        return why and f"is not installed ({why})" + (f"; {self.get}" if self.get else "")

    def refuses(self, case: Case, arch: int = 0) -> str | None:
        """Why it does not support this case on a GPU of this architecture, or None."""
        cuda = case.device == "cuda"
        dtype = str(case.dtype).removeprefix("torch.")
        refusals = {
            "does not support this device": not (cuda or self.cpu),
            f"does not support {dtype}": cuda and case.dtype not in self.dtypes,
            "does not support a soft-cap": case.capped and not self.capped,
            "does not support a bias": case.biased and not self.biased,
            "does not support packed sequences": case.packed and not self.packed,
            "supports packed sequences only": not (case.packed or self.dense),
            f"does not support heads of {case.width}": case.width % self.step or case.width > self.widest,
            f"does not support sm_{arch}": cuda and not self.archs[0] <= arch <= self.archs[1],
            f"may hang with a cap on sm_{arch}": cuda and case.capped and arch > self.capped_arch,
            "breaks the graph of torch.compile": case.compiled and not self.compiles,
        }
        if reason := next((reason for reason, holds in refusals.items() if holds), None):
            return reason
        if self.run is _triton and not ops.kernels_on(case.device, case.dtype):
            if ops.MODE == "0":
                return "is disabled by FASTALIGN_KERNELS=0"
            return "needs a GPU" if case.device == "cpu" else "needs the package triton"
        return self.missing()


@lru_cache
def _missing(needs: str) -> str | None:
    module, _, attribute = needs.partition(":")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # a package built for another torch may raise anything
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None if hasattr(found, attribute) else f"{module} has no {attribute}"


def _triton(q, k, v, softcap, bias, sequences):
    bounds, longest = sequences or (None, None)
    return ops.softcap_attention(q, k, v, softcap=softcap, cu_seqlens=bounds, max_seqlen=longest)


def _sdpa(q, k, v, softcap, bias):
    return scaled_dot_product_attention(q, k, v, attn_mask=bias)


def _one_sdpa(backend: SDPBackend, q, k, v, softcap, bias, sequences):
    with sdpa_kernel(backend):
        return _sdpa(q, k, v, softcap, bias)


def _either(dense: Callable, q, k, v, softcap, bias, sequences):
    """A dense implementation, extended to packed sequences."""
    if sequences is None:
        return dense(q, k, v, softcap=softcap, bias=bias)
    if q.device.type == "cpu" and not torch.compiler.is_compiling():  # no device to wait for
        return reference.each_sequence(partial(dense, softcap=softcap, bias=None), q, k, v, sequences.bounds)
    return _padded(dense, q, k, v, softcap, sequences)


def _padded(dense: Callable, q, k, v, softcap, sequences: Sequences) -> Tensor:
    """Packed attention without a packed kernel: each sequence padded to the longest, in fixed shapes."""
    bounds, longest = sequences
    bounds, column = bounds.long(), torch.arange(longest, device=q.device)
    starts, lengths = bounds[:-1, None], bounds.diff()[:, None]
    place = (starts + column).clamp_max(len(q) - 1)
    # An empty sequence keeps one key, so that its unused softmax is finite.
    seen = (column < lengths.clamp_min(1))[:, None, None, :]
    bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, float("-inf"))
    out = dense(*(x[place].transpose(1, 2) for x in (q, k, v)), softcap=softcap, bias=bias)
    row = torch.arange(len(q), device=q.device)
    owner = (torch.searchsorted(bounds, row, right=True) - 1).clamp_max(len(lengths) - 1)
    return out.transpose(1, 2)[owner, (row - bounds[owner]).clamp_max(longest - 1)]


def covering(sequences: Sequences, length: int) -> Tensor:
    """Bounds that cover all `length` rows: the padding becomes additional sequences.

    Libraries leave rows outside all sequences uninitialized, gradients too; a NaN there would reach the weights.
    """
    bounds, longest = sequences
    steps = torch.arange(1, -(-length // longest) + 1, device=bounds.device, dtype=bounds.dtype)
    return torch.cat([bounds, (bounds[-1] + longest * steps).clamp_max(length)])


def _varlen(q, k, v, softcap, bias, sequences):
    from torch.nn.attention.varlen import varlen_attn

    # These seven positional arguments are the same in every release since 2.10; full attention is the default.
    bounds, longest = covering(sequences, len(q)), sequences.longest
    return varlen_attn(q, k, v, bounds, bounds, longest, longest)


def _flash_attn(module: str, q, k, v, softcap, bias, sequences):
    """flash-attn 2, 3 and 4 share names and layout, [B, T, H, d]; some releases return (out, lse)."""
    library = sys.modules[module]  # imported by `missing`; torch.compile cannot trace import_module
    options = {} if softcap is None else {"softcap": softcap}
    if sequences is None:
        out = library.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), **options)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)
    bounds, longest = covering(sequences, len(q)), sequences.longest
    options |= {f"cu_seqlens_{x}": bounds for x in "qk"} | {f"max_seqlen_{x}": longest for x in "qk"}
    out = library.flash_attn_varlen_func(q, k, v, **options)
    return out[0] if isinstance(out, tuple) else out


_SOURCE = "build it from its source, github:Dao-AILab/flash-attention"
_WHOLE = {
    "biased": True, "packed": True, "dtypes": ANY, "cpu": True, "step": 1, "widest": 1 << 30, "archs": (0, 999)
}  # fmt: skip
_FLASH = {"capped": True, "packed": True}
BACKENDS = {
    "triton": Backend(
        _triton, "triton:jit", "pip install triton", capped=True, packed=True, dtypes=SINGLE, cpu=True, step=1,
        widest=128,
    ),
    "sdpa": Backend(partial(_either, _sdpa), **_WHOLE),
    "sdpa_flash": Backend(partial(_one_sdpa, SDPBackend.FLASH_ATTENTION), cpu=True),
    "sdpa_cudnn": Backend(partial(_one_sdpa, SDPBackend.CUDNN_ATTENTION), widest=128),
    "sdpa_efficient": Backend(partial(_one_sdpa, SDPBackend.EFFICIENT_ATTENTION), dtypes=SINGLE, archs=(0, 999)),
    "varlen_attn": Backend(_varlen, "torch.nn.attention.varlen:varlen_attn", dense=False, packed=True),
    "flash_attn_2": Backend(partial(_flash_attn, "flash_attn"), "flash_attn:flash_attn_func", _SOURCE, **_FLASH),
    "flash_attn_3": Backend(
        partial(_flash_attn, "flash_attn_interface"), "flash_attn_interface:flash_attn_func",
        f"{_SOURCE}/hopper", archs=(90, 90), **_FLASH,
    ),
    "flash_attn_4": Backend(
        # It may hang with a cap on Blackwell: issue 2466 of its repository.
        partial(_flash_attn, "flash_attn.cute"), "flash_attn.cute:flash_attn_func",
        "pip install --pre flash-attn-4", archs=(90, 999), capped_arch=90, compiles=False, **_FLASH,
    ),
    "eager": Backend(partial(_either, reference.softcap_attention), capped=True, **_WHOLE),
}  # fmt: skip
"""Our kernel (triton), the definition (eager), torch's own choice (sdpa) and each of its implementations, torch's for
packed sequences (varlen_attn), and libraries that are installed separately."""
