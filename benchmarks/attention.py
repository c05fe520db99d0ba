"""Speed of attention by every installed implementation: ``python -m benchmarks.attention [--cases LABEL ...]``.

Cases are lengths, head widths, caps and layouts of vision transformers, compared as in `benchmarks.kernels`.
In capped cases the `UNCAPPED` implementations are timed without the cap, as an upper bound of its cost. On a GPU it
also writes the table by which `auto` chooses on this architecture, `fastalign/ops/attention/table.json`.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor

from benchmarks import kernels, record
from benchmarks.cases import TINY_CASES, Case, attention_case
from fastalign.ops.attention import BACKENDS, Sequences, choice
from fastalign.ops.attention import Case as Call

TOKENS = 49_152  # of a batch: 256 sequences of 192
LENGTHS = (197, 577, 257, 729, 196, 256, 576)
"""The most important first, because a time limit may end the run."""
FLEX_LENGTHS = (197, 577)
"""FlexAttention compiles each shape for ten seconds or more."""
UNCAPPED = ("sdpa_flash", "sdpa_cudnn", "varlen_attn")
FACTS = ("capped", "packed", "gradient", "length", "width")
"""Columns that identify a row of the table."""


def _case(length: int, width: int, softcap: float | None, packed: bool) -> Case:
    heads = 12 if width == 64 else 16
    case = attention_case("", TOKENS // length, length, heads, width, softcap, packed)
    return replace(case, backward_alone=False)  # full - forward: two timings instead of three


KINDS = ((30.0, False), (None, False), (30.0, True), (None, True))
CASES = [_case(length, width, *kind) for length in LENGTHS for width in (64, 72, 80) for kind in KINDS]
TINY = [case for case in TINY_CASES if case.name == "softcap_attention"]


def _run(backend: str, q: Tensor, k: Tensor, v: Tensor, capped=True, softcap=None, **packing) -> Tensor:
    sequences = Sequences(packing["cu_seqlens"], packing["max_seqlen"]) if packing else None
    return BACKENDS[backend].run(q, k, v, softcap if capped else None, None, sequences)


def _packed_flex(inputs: dict) -> Callable:
    """FlexAttention of packed sequences with an existing mask, because a model makes one for all layers."""
    from fastalign.ops.attention import flex  # loads Inductor

    mask = flex.block_mask(inputs["cu_seqlens"], len(inputs["q"]))
    return lambda q, k, v, softcap, **_: flex.flex(q, k, v, softcap, mask)


def implementations(case: Case, inputs: dict, tiny: bool) -> tuple[dict[str, Callable], set[str]]:
    """Every implementation that supports the case, and those of them without its soft-cap."""
    q, options, arch = inputs["q"], case.options, choice.architecture()
    functions, uncapped = {"ours": case.kernel, "eager": case.reference}, set()
    capped, packed = options["softcap"] is not None, options["packed"]
    call = Call(q.device.type, q.dtype, capped, False, packed, options["length"], q.shape[-1], gradient=True)
    for name, backend in BACKENDS.items():
        if name in ("triton", "eager") or (name == "flex" and not tiny and call.length not in FLEX_LENGTHS):
            continue
        if backend.refuses(call, arch) is None:
            functions[name] = _packed_flex(inputs) if name == "flex" and packed else partial(_run, name)
        elif name in UNCAPPED and backend.refuses(call._replace(capped=False), arch) is None:
            functions[name] = partial(_run, name, capped=False)
            uncapped.add(name)
    return functions, uncapped


def table(rows: list[dict]) -> list[dict]:
    """The rows of the choice's table: milliseconds by implementation, with and without a backward pass."""
    found: dict[tuple, dict] = {}
    for row in rows:
        name = "triton" if row["implementation"] == "ours" else row["implementation"]
        if "ms" not in row or row["mode"] == "backward" or name not in BACKENDS or "computes" in row:
            continue
        case = (
            row["softcap"] is not None, row["packed"], row["mode"] == "full", row["length"], row["width"]
        )  # fmt: skip
        facts = dict(zip(FACTS, case, strict=True))
        found.setdefault(case, facts | {"ms": {}})["ms"][name] = round(row["ms"], 5)
    return list(found.values())


def write_table(rows: list[dict], environment: dict) -> None:
    """Update the table that `auto` reads; rows of other cases and architectures stay."""
    tables = json.loads(choice.TABLE.read_text()) if choice.TABLE.exists() else {}
    earlier = tables.get(environment["architecture"], {}).get("rows", [])
    merged = {tuple(row[key] for key in FACTS): row for row in (*earlier, *table(rows))}
    tables[environment["architecture"]] = {"environment": environment, "rows": list(merged.values())}
    record.replace(choice.TABLE, json.dumps(tables, indent=1) + "\n")
    print(f"auto chooses by {choice.TABLE}")


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; the exit code."""
    for name, backend in BACKENDS.items():
        if backend.missing():
            print(f"not installed: {name} ({backend.missing()})")
    code, rows = kernels.run("attention", __doc__, CASES, TINY, implementations, arguments)
    if "--tiny" not in (arguments or sys.argv) and any("ms" in row for row in rows):
        write_table(rows, record.environment())
    return code


if __name__ == "__main__":
    sys.exit(main())
