"""Speed of every installed attention, and FlexAttention: ``python -m benchmarks.attention [--cases LABEL ...]``.

Cases are lengths, head widths, caps and layouts of vision transformers, compared as in `benchmarks.kernels`.
In capped cases the `UNCAPPED` implementations are timed without the cap, as an upper bound of its cost. On a GPU it
also writes the table by which `auto` chooses on this architecture, `fastalign/ops/attention/table.json`.
"""

import json
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import kernels, record
from benchmarks.cases import TINY_CASES, Case, attention_case
from fastalign.ops import attention as selection
from fastalign.ops.attention import BACKENDS, Sequences
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
    return attention_case("", TOKENS // length, length, heads, width, softcap, packed)


KINDS = ((30.0, False), (None, False), (30.0, True), (None, True))
CASES = [_case(length, width, *kind) for length in LENGTHS for width in (64, 72, 80) for kind in KINDS]
TINY = [case for case in TINY_CASES if case.name == "softcap_attention"]


def _run(backend: str, q: Tensor, k: Tensor, v: Tensor, capped=True, softcap=None, **packing) -> Tensor:
    sequences = Sequences(packing["cu_seqlens"], packing["max_seqlen"]) if packing else None
    return BACKENDS[backend].run(q, k, v, softcap if capped else None, None, sequences)


@torch.library.custom_op("fastalign::flex_tanh", mutates_args=())
def _tanh(x: Tensor) -> Tensor:
    """tanh, which Inductor lowers to the GPU's instruction, as our kernel has it."""
    return torch.tanh(x)


_tanh.register_fake(torch.empty_like)
_tanh.register_vmap(lambda info, in_dims, x: (_tanh(x), in_dims[0]))  # FlexAttention maps it over positions
_tanh.register_autograd(
    lambda ctx, gradient: gradient * (1 - ctx.saved_tensors[0].square()),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output),
)


def flex(inputs: dict) -> Callable:
    """FlexAttention for these inputs. The mask of packed sequences exists already, as in a model's later layers."""
    from torch._inductor.lowering import lowerings, make_pointwise, register_lowering
    from torch._inductor.virtualized import ops
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if (tanh := torch.ops.fastalign.flex_tanh.default) not in lowerings:
        assembly = {"asm": "tanh.approx.f32 $0, $1;", "constraints": "=f,f", "dtype": torch.float32}
        register_lowering(tanh)(make_pointwise(partial(ops.inline_asm_elementwise, **assembly)))
    cap, bounds, rows = inputs["softcap"], inputs.get("cu_seqlens"), len(inputs["q"])
    options = {"score_mod": cap and (lambda score, b, h, i, j: cap * tanh(score / cap))}
    if bounds is not None:
        sequence = torch.searchsorted(bounds, torch.arange(rows, device=bounds.device), right=True)
        options["block_mask"] = create_block_mask(
            lambda b, h, i, j: sequence[i] == sequence[j], None, None, rows, rows, device=bounds.device
        )
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor, **_) -> Tensor:
        if bounds is None:
            return compiled(q, k, v, **options)
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        return compiled(q, k, v, **options).squeeze(0).transpose(0, 1)

    return run


def implementations(case: Case, inputs: dict, tiny: bool) -> tuple[dict[str, Callable], set[str]]:
    """Every implementation that supports the case, and those of them without its soft-cap."""
    q, options, arch = inputs["q"], case.options, selection.architecture()
    functions, uncapped = {"ours": case.kernel, "eager": case.reference}, set()
    capped, packed = options["softcap"] is not None, options["packed"]
    call = Call(q.device.type, q.dtype, capped, False, packed, options["length"], q.shape[-1], gradient=True)
    for name, backend in BACKENDS.items():
        if name in ("triton", "eager"):
            continue
        if backend.refuses(call, arch) is None:
            functions[name] = partial(_run, name)
        elif name in UNCAPPED and backend.refuses(call._replace(capped=False), arch) is None:
            functions[name] = partial(_run, name, capped=False)
            uncapped.add(name)
    if q.is_cuda and call.length in FLEX_LENGTHS:
        functions["flex"] = flex(inputs)
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
    tables = json.loads(selection.TABLE.read_text()) if selection.TABLE.exists() else {}
    earlier = tables.get(environment["architecture"], {}).get("rows", [])
    merged = {tuple(row[key] for key in FACTS): row for row in (*earlier, *table(rows))}
    tables[environment["architecture"]] = {"environment": environment, "rows": list(merged.values())}
    record.replace(selection.TABLE, json.dumps(tables, indent=1) + "\n")


def save(rows: list[dict]) -> None:
    """Write the table after each case, because a time limit may end the run."""
    if any("ms" in row for row in rows):
        write_table(rows, record.environment())


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; the exit code."""
    for name, backend in BACKENDS.items():
        if missing := backend.missing():
            print(f"{name} {missing}")
    return kernels.run("attention", __doc__, CASES, TINY, implementations, arguments, save)


if __name__ == "__main__":
    sys.exit(main())
