"""Attention by every implementation here: ``python -m benchmarks.attention [--cases LABEL ...] [--table]``.

The lengths, head widths, caps and layouts of vision transformers; how is in `benchmarks.compare`. In capped cases
`UNCAPPED` are timed too, without the cap: what the cap may cost. On a GPU it also writes the table by which `auto`
chooses on this architecture, `fastalign/ops/attention/table.json`; ``--table`` writes it anew from
`benchmarks/results/attention.json`, which needs no GPU.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported

from torch import Tensor

from benchmarks import compare, record
from benchmarks.cases import TINY_CASES, Built, Case, attention_case
from fastalign.ops.attention import BACKENDS, Sequences, choice
from fastalign.ops.attention import Case as Call

TOKENS = 49_152
"""Of a batch: 256 sequences of 192."""
LENGTHS = (197, 577, 257, 729, 196, 256, 576)
"""The most important first: a time limit may end the run before the last."""
FLEX_LENGTHS = (197, 577)
"""FlexAttention compiles for every shape, ten seconds or more."""
UNCAPPED = ("sdpa_flash", "sdpa_cudnn", "varlen_attn")
FACTS = ("capped", "packed", "gradient", "length", "width")
"""Columns that identify a row of the table."""


def _grid() -> list[Case]:
    cases = []
    for length in LENGTHS:
        for width in (64, 72, 80):
            for softcap, packed in ((30.0, False), (None, False), (30.0, True), (None, True)):
                heads = 12 if width == 64 else 16
                case = attention_case("", TOKENS // length, length, heads, width, softcap, packed)
                cases.append(replace(case, backward_alone=False))  # full - forward: two timings, not three
    return cases


CASES = _grid()
TINY = [case for case in TINY_CASES if case.name == "softcap_attention"]


def _run(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softcap: float | None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    uncapped: bool = False,
) -> Tensor:
    sequences = None if cu_seqlens is None else Sequences(cu_seqlens, max_seqlen)
    return BACKENDS[backend].run(q, k, v, None if uncapped else softcap, None, sequences)


def _flex(built: Built) -> Callable:
    """FlexAttention of packed sequences; its mask exists already, as in a model, which makes one for all layers."""
    from fastalign.ops.attention import flex  # loads Inductor

    mask = flex.block_mask(built.inputs["cu_seqlens"], len(built.inputs["q"]))
    return lambda q, k, v, softcap, **_: flex.flex(q, k, v, softcap, mask)


def implementations(case: Case, built: Built, tiny: bool) -> tuple[dict[str, Callable], set[str]]:
    """Every implementation that can do the case, and which of them leave out its soft-cap."""
    q, options = built.inputs["q"], case.options
    functions, uncapped = {"ours": case.kernel, "eager": case.reference}, set()
    call = Call(
        device=q.device.type,
        dtype=q.dtype,
        capped=options["softcap"] is not None,
        biased=False,
        packed=options["packed"],
        length=options["length"],
        width=q.shape[-1],
        gradient=True,
    )
    for name, backend in BACKENDS.items():
        refusal = backend.refuses(call, choice.architecture())
        if refusal == "does not support a soft-cap" and name in UNCAPPED:
            refusal = backend.refuses(call._replace(capped=False), choice.architecture())
            uncapped |= set() if refusal else {name}
        if refusal or name in ("triton", "eager"):
            continue
        if name == "flex" and not tiny and call.length not in FLEX_LENGTHS:
            continue
        functions[name] = partial(_run, name, uncapped=name in uncapped)
        if name == "flex" and call.packed:
            functions[name] = _flex(built)
    return functions, uncapped


def table(rows: list[dict]) -> list[dict]:
    """The choice's rows: milliseconds by implementation, forward alone and with its backward pass."""
    found: dict[tuple, dict] = {}
    for row in rows:
        name = "triton" if row["implementation"] == "ours" else row["implementation"]
        if "ms" not in row or row["mode"] == "backward" or name not in BACKENDS or "computes" in row:
            continue
        facts = {
            "capped": row["softcap"] is not None,
            "packed": row["packed"],
            "gradient": row["mode"] == "full",
            "length": row["length"],
            "width": row["width"],
        }
        case = tuple(facts[key] for key in FACTS)
        found.setdefault(case, facts | {"ms": {}})["ms"][name] = round(row["ms"], 5)
    return list(found.values())


def write_table(rows: list[dict], environment: dict) -> None:
    """Put rows into the table that `auto` reads; those of other cases and other architectures stay."""
    tables = json.loads(choice.TABLE.read_text()) if choice.TABLE.exists() else {}
    earlier = tables.get(environment["architecture"], {}).get("rows", [])
    merged = {tuple(row[key] for key in FACTS): row for row in (*earlier, *table(rows))}
    tables[environment["architecture"]] = {"environment": environment, "rows": list(merged.values())}
    record.replace(choice.TABLE, json.dumps(tables, indent=1) + "\n")
    print(f"auto chooses by {choice.TABLE}")


def _table_anew() -> int:
    """The table from what was measured; the exit code."""
    result = record.read("attention")
    if "architecture" not in result.get("environment", {}):
        print("benchmarks/results/attention.json has not been measured on a GPU", file=sys.stderr)
        return 2
    write_table(result["rows"], result["environment"])
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; the exit code."""
    if "--table" in (arguments or sys.argv):
        return _table_anew()
    for name, backend in BACKENDS.items():
        if backend.missing():
            print(f"no {name}: {backend.missing()}")
    code, rows = compare.main("attention", __doc__, CASES, TINY, implementations, arguments)
    if "--tiny" not in (arguments or sys.argv) and any("ms" in row for row in rows):
        write_table(rows, record.environment())
    return code


if __name__ == "__main__":
    sys.exit(main())
