"""Which implementation of attention does a case, and why.

On a GPU that `python -m benchmarks.attention` has measured, the fastest of those that are installed, by the table
that it writes, `table.json`; elsewhere a rule. What was asked for by name comes first where it can do the case.
"""

import difflib
import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from fastalign import ops
from fastalign.ops.attention.backends import BACKENDS, Case

TABLE = Path(__file__).with_name("table.json")
"""By architecture ("sm_90"): the environment, and milliseconds by implementation for each case."""
_RULES = {
    # capped or packed, biased
    (True, False): ("triton", "sdpa", "eager"),
    (True, True): ("sdpa", "eager"),
    (False, False): ("sdpa", "triton", "eager"),
    (False, True): ("sdpa", "eager"),
}


class Choice(NamedTuple):
    """The name of a backend, and why it is the one."""

    backend: str
    reason: str


class Faster(NamedTuple):
    """An implementation that was measured to be faster than the chosen one, but cannot be used."""

    backend: str
    times: float
    refusal: str
    get: str


def architecture() -> int:
    """Of the current GPU, 90 for sm_90; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def choose(case: Case, wanted: str = "auto") -> Choice:
    """The implementation for a case.

    Args:
        case: all that is known beforehand.
        wanted: a name of `BACKENDS`, or "auto".

    Raises:
        ValueError: no such name; or a bias with packed sequences.
    """
    if case.biased and case.packed:
        raise ValueError("attention: a bias is for dense input, not for packed sequences")
    if wanted not in ("auto", *BACKENDS):
        check(wanted)
    return _choose(case, wanted, ops.MODE)


@lru_cache(maxsize=4096)
def _choose(case: Case, wanted: str, mode: str) -> Choice:
    arch = architecture() if case.device == "cuda" else 0
    refusals = {name: backend.refuses(case, arch) for name, backend in BACKENDS.items()}
    if wanted != "auto" and refusals[wanted] is None:
        return Choice(wanted, "asked for")
    prefix = "" if wanted == "auto" else f"{wanted} {refusals[wanted]}; "
    row = measured(case, arch)
    ranked = sorted(row["ms"], key=row["ms"].get) if row else []
    for name in ranked:
        if refusals.get(name, "unknown") is None and BACKENDS[name].automatic:
            where = f"T {row['length']}, d {row['width']} on sm_{arch}"
            return Choice(name, f"{prefix}the fastest here of {len(ranked)} measured at {where}")
    name = next(name for name in _RULES[case.capped or case.packed, case.biased] if refusals[name] is None)
    return Choice(name, prefix + _explain(name, case, arch))


def _explain(name: str, case: Case, arch: int) -> str:
    if case.device == "cpu":
        return "because FASTALIGN_KERNELS=1" if name == "triton" else "what a CPU has"
    kinds = {"capped": case.capped, "packed": case.packed, "biased": case.biased}
    kind = " and ".join(name for name, holds in kinds.items() if holds) or "plain"
    return (
        f"the rule for {kind} attention; nothing was measured on sm_{arch} (python -m benchmarks.attention)"
    )


def measured(case: Case, arch: int) -> dict | None:
    """The row of the table that is nearest to a case: the same kind, then head width, then length."""
    if case.device != "cuda" or case.biased or case.dtype not in (torch.bfloat16, torch.float16):
        return None
    kind = (case.capped, case.packed, case.gradient)
    rows = [
        row
        for row in _table().get(f"sm_{arch}", {}).get("rows", [])
        if (row["capped"], row["packed"], row["gradient"]) == kind
    ]
    distance = lambda row: (abs(row["width"] - case.width), abs(row["length"] - case.length))  # noqa: E731
    return min(rows, key=distance, default=None)


def faster(case: Case) -> list[Faster]:
    """What the table says is faster than the choice, but is not usable, with the reason; the fastest first."""
    arch = architecture()
    row = measured(case, arch)
    if row is None or (chosen := row["ms"].get(choose(case).backend)) is None:
        return []
    found = []
    for name in sorted(row["ms"], key=row["ms"].get):
        backend = BACKENDS.get(name)
        if backend is None or row["ms"][name] >= chosen:
            continue
        refusal = backend.refuses(case, arch) or f"is used when asked for, efficiency.attention={name}"
        found.append(Faster(name, chosen / row["ms"][name], refusal, backend.get))
    return found


@lru_cache
def _table() -> dict:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def check(name: str) -> None:
    """Refuse a name that does not exist or an implementation that is not installed.

    Raises:
        ValueError: with the nearest name, or how to get it.
    """
    if name == "auto":
        return
    if name not in BACKENDS:
        near = difflib.get_close_matches(name, BACKENDS, n=1, cutoff=0.0)[0]
        raise ValueError(f"there is no {name!r}; the nearest is {near}, all are auto, {', '.join(BACKENDS)}")
    if (missing := BACKENDS[name].missing()) is not None:
        get = BACKENDS[name].get
        raise ValueError(f"{name} is not installed ({missing})" + (f"; {get}" if get else ""))
