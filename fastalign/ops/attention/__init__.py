"""Attention: one function for all implementations, and the selection of one, with its reason.

A requested implementation is used if it supports the case. Otherwise, on a GPU that `python -m benchmarks.attention`
has measured, the fastest usable one by `table.json`, which that command writes; elsewhere a default.
"""

import json
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign import ops
from fastalign.ops.attention.backends import BACKENDS, HALF, Case, Sequences
from fastalign.utils.errors import unknown

__all__ = ["BACKENDS", "Case", "Sequences", "attention", "check", "choose"]
TABLE = Path(__file__).with_name("table.json")
"""Architecture ("sm_90") -> the environment, and for each case the milliseconds of each implementation."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sequences: Sequences | None = None,
    backend: str = "auto",
) -> Tensor:
    """Full (non-causal) multi-head attention with the scale 1 / sqrt(d), in the shape of q. Padding rows are finite.

    Args:
        q, k, v: [B, H, T, d], one dtype; with `sequences` packed, [L, H, d].
        softcap, bias: as for `fastalign.ops.softcap_attention`.
        sequences: the packed sequences; each attends only to itself.
        backend: a name of `BACKENDS`, used if it supports the case; "auto" = the fastest that does.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast a norm may have returned fp32
    if bias is not None:
        bias = bias.to(v.dtype)
    length = q.shape[2] if sequences is None else sequences.longest
    gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    kind = softcap is not None, bias is not None, sequences is not None
    compiled = torch.compiler.is_compiling()
    name = _name(backend, q.device.type, v.dtype, *kind, int(length), int(q.shape[-1]), gradient, compiled)
    return BACKENDS[name].run(q, k, v, softcap, bias, sequences)


def _name(backend: str, *facts) -> str:
    """The chosen name, a constant in a compiled graph: it depends only on what torch.compile guards anyway."""
    return choose(Case(*facts), backend).backend


# As torch.compiler.assume_constant_result sets it, without importing torch._dynamo.
_name._dynamo_marked_constant = True


class Choice(NamedTuple):
    """The name of a backend, and the reason."""

    backend: str
    reason: str


def architecture() -> int:
    """90 for a GPU of sm_90; 0 without a GPU."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    return 10 * major + minor


def choose(case: Case, wanted: str = "auto") -> Choice:
    """The implementation for a case: `wanted` (a name of `BACKENDS`, or "auto") if it supports the case.

    Raises:
        ValueError: an unknown name, or a bias with packed sequences.
    """
    if case.biased and case.packed:
        raise ValueError("attention: a bias needs dense input, got packed sequences")
    if wanted not in ("auto", *BACKENDS):
        check(wanted)
    return _choose(case, wanted, ops.MODE)


@lru_cache(maxsize=4096)
def _choose(case: Case, wanted: str, mode: str) -> Choice:
    arch = architecture() if case.device == "cuda" else 0
    refusals = {name: backend.refuses(case, arch) for name, backend in BACKENDS.items()}
    if wanted != "auto" and refusals[wanted] is None:
        return Choice(wanted, "as configured")
    prefix = "" if wanted == "auto" else f"{wanted} {refusals[wanted]}; "
    times, where = _measured(case, arch)
    if fastest := next((name for name in times if refusals[name] is None), None):
        reason = f"{prefix}the fastest usable one of {len(times)} measured at {where}"
        for name in takewhile(refusals.get, times):
            reason += f"; {name}, {times[fastest] / times[name]:.2f}x as fast, {refusals[name]}"
        return Choice(fastest, reason)
    rule = ("triton", "sdpa", "eager") if case.capped or case.packed else ("sdpa", "triton", "eager")
    name = next(name for name in rule if refusals[name] is None)
    if case.device == "cpu":
        return Choice(name, prefix + ("FASTALIGN_KERNELS=1" if name == "triton" else "the default on a CPU"))
    kind = " and ".join(kind for kind in ("capped", "packed", "biased") if getattr(case, kind)) or "plain"
    reason = f"the default for {kind} attention; sm_{arch} is not measured (python -m benchmarks.attention)"
    return Choice(name, prefix + reason)


def _measured(case: Case, arch: int) -> tuple[dict[str, float], str]:
    """Milliseconds by implementation, fastest first, in the table's row nearest to the case, and that row's shape.

    The row has the same kind, then the nearest head width, then the nearest length.
    """
    kind = {"capped": case.capped, "packed": case.packed, "gradient": case.gradient}
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    rows = [row for row in table.get(f"sm_{arch}", {}).get("rows", []) if kind.items() <= row.items()]
    if case.device != "cuda" or case.biased or case.dtype not in HALF or not rows:
        return {}, ""
    row = min(rows, key=lambda row: (abs(row["width"] - case.width), abs(row["length"] - case.length)))
    times = {name: ms for name, ms in row["ms"].items() if name in BACKENDS}
    fastest_first = dict(sorted(times.items(), key=lambda item: item[1]))
    return fastest_first, f"T {row['length']}, d {row['width']} on sm_{arch}"


def check(name: str) -> None:
    """Refuse an unknown name or an implementation that is not installed.

    Raises:
        ValueError: names the nearest name, or how to install it.
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"{unknown('name', name, BACKENDS)}; choose from auto, {', '.join(BACKENDS)}")
    if name != "auto" and (missing := BACKENDS[name].missing()):
        raise ValueError(f"{name} {missing}")
