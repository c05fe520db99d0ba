"""Which implementation of attention to use, and why.

A name that was asked for is used if it supports the case. Otherwise, on a GPU that `python -m benchmarks.attention`
has measured, the fastest usable one by `table.json`, which that command writes; elsewhere a rule.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from fastalign import ops
from fastalign.ops.attention.backends import BACKENDS, Case
from fastalign.utils.errors import unknown

TABLE = Path(__file__).with_name("table.json")
"""Architecture ("sm_90") -> the environment, and milliseconds by implementation for each case."""
_RULES = {
    # capped or packed, biased
    (True, False): ("triton", "sdpa", "eager"),
    (True, True): ("sdpa", "eager"),
    (False, False): ("sdpa", "triton", "eager"),
    (False, True): ("sdpa", "eager"),
}


class Choice(NamedTuple):
    """The name of a backend, and the reason."""

    backend: str
    reason: str


class Faster(NamedTuple):
    """An implementation that was measured to be faster than the chosen one, and why it is not used."""

    backend: str
    times: float
    refusal: str
    get: str


def architecture() -> int:
    """90 for a GPU of sm_90; 0 without a GPU."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    return 10 * major + minor


def choose(case: Case, wanted: str = "auto") -> Choice:
    """The implementation for a case.

    Args:
        case: the facts of the call.
        wanted: a name of `BACKENDS`, or "auto".

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
    row = _measured(case, arch)
    ranked = sorted(row["ms"], key=row["ms"].get) if row else []
    for name in ranked:
        if refusals.get(name, "unknown") is None and BACKENDS[name].automatic:
            where = f"T {row['length']}, d {row['width']} on sm_{arch}"
            return Choice(name, f"{prefix}the fastest usable one of {len(ranked)} measured at {where}")
    name = next(name for name in _RULES[case.capped or case.packed, case.biased] if refusals[name] is None)
    if case.device == "cpu":
        return Choice(name, prefix + ("FASTALIGN_KERNELS=1" if name == "triton" else "the default on a CPU"))
    kind = " and ".join(kind for kind in ("capped", "packed", "biased") if getattr(case, kind)) or "plain"
    rule = f"the default for {kind} attention; sm_{arch} is not measured (python -m benchmarks.attention)"
    return Choice(name, prefix + rule)


def _measured(case: Case, arch: int) -> dict | None:
    """The nearest row of the table: the same kind, then the nearest head width, then length."""
    if case.device != "cuda" or case.biased or case.dtype not in (torch.bfloat16, torch.float16):
        return None
    kind = {"capped": case.capped, "packed": case.packed, "gradient": case.gradient}
    rows = [row for row in _table().get(f"sm_{arch}", {}).get("rows", []) if kind.items() <= row.items()]
    return min(
        rows, key=lambda row: (abs(row["width"] - case.width), abs(row["length"] - case.length)), default=None
    )


def faster(case: Case) -> list[Faster]:
    """Implementations that the table has as faster than the choice, and why they are not used; the fastest first."""
    arch = architecture()
    row = _measured(case, arch)
    if row is None or (chosen := row["ms"].get(choose(case).backend)) is None:
        return []
    found = []
    for name in sorted(row["ms"], key=row["ms"].get):
        backend = BACKENDS.get(name)
        if backend is None or row["ms"][name] >= chosen:
            continue
        refusal = backend.refuses(case, arch) or f"is used only with efficiency.attention={name}"
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
        raise ValueError(f"{unknown('name', name, BACKENDS)}; choose from auto, {', '.join(BACKENDS)}")
    if (missing := BACKENDS[name].missing()) is not None:
        get = BACKENDS[name].get
        raise ValueError(f"{name} is not installed ({missing})" + (f"; {get}" if get else ""))
