"""`benchmarks.kernels` and `benchmarks.attention`: wrong kernels are not timed, failures are rows, the table."""

import dataclasses
import json
import sys

import pytest
import torch

from benchmarks import attention, kernels, record, timing
from benchmarks.cases import TINY_CASES, attention_case
from fastalign import ops
from fastalign.ops import attention as selection
from fastalign.ops import reference
from fastalign.ops.attention import Case, choose

ATTENTION = next(case for case in TINY_CASES if case.name == "softcap_attention")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "needs a GPU"),
        (["--tiny", "--ops", "packs"], "choose from"),
        (["--tiny", "--cases", "B/32"], "no case starts with 'B/32'"),
    ],
)
def test_bad_input(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        sys.exit(kernels.main(arguments))
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("error", ["forward", "backward", "not finite", "raises"])
def test_a_wrong_kernel_is_not_timed(error, capsys, monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tokens):
            return tokens * (1.1 if error == "forward" else float("nan") if error == "not finite" else 1.0)

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 1.1

    def wrong(tokens, visible, position):
        if error == "raises":
            raise ValueError("never mind")
        return reference.expand_masked(Wrong.apply(tokens), visible, position)

    cases = [dataclasses.replace(c, kernel=wrong) for c in TINY_CASES if c.name == "expand_masked"]
    monkeypatch.setattr(kernels, "TINY_CASES", cases)
    assert kernels.main(["--tiny"]) == 1
    text = capsys.readouterr().out
    assert " ms " not in text
    messages = {"raises": "ValueError: never mind", "backward": "wrong: gradient of tokens"}
    assert messages.get(error, "wrong: output 0") in text


def test_failures_are_rows_and_another_function_is_not_timed():
    def too_large(**inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def implementations(case, inputs, tiny):
        functions, uncapped = kernels.implementations(case, inputs, tiny)
        return functions | {"large": too_large, "sum": lambda q, k, v, softcap: q + k + v}, uncapped

    rows = kernels.measure_case(ATTENTION, "cpu", {}, implementations, tiny=True)
    failed = {row["implementation"]: row["failed"] for row in rows if "failed" in row}
    assert failed["large"] == timing.NO_MEMORY
    assert "computes another function" in failed["sum"]
    assert {row["implementation"] for row in rows if "ms" in row} == {"ours", "eager", "compile"}


def test_a_complete_result(tmp_path, monkeypatch):
    """The path of a GPU, with a fake clock and fake memory."""
    original = kernels.measure_case
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(record, "environment", lambda: {"gpu": "G", "commit": None, "date": "d"})
    monkeypatch.setattr(timing, "machine", lambda: {"copy_gbps": 1e-3, "matmul_tflops": 1e-6})
    monkeypatch.setattr(timing, "device_times", lambda call: [(call(), 2.0)[1], 1.0])
    monkeypatch.setattr(timing, "host_ms", lambda call: (call(), 0.5)[1])
    monkeypatch.setattr(timing, "peak_mib", lambda call: (call(), 7.0)[1])
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(kernels, "measure_case", lambda case, _, *rest: original(case, "cpu", *rest))
    chosen = [case for case in TINY_CASES if case.label in ("tiny mse", "tiny T 18 d 16 cap")]
    monkeypatch.setattr(kernels, "CASES", chosen)
    assert kernels.main([]) == 0
    result = json.loads((tmp_path / "kernels.json").read_text())
    rows = {(row["op"], row["implementation"], row["mode"]): row for row in result["rows"]}
    full = rows["softcap_attention", "ours", "full"]
    assert full["ms"] == 1.5
    assert full["times_faster_than"] == {"eager": 1.0, "compile": 1.0}
    assert (full["host_ms"], full["peak_mib"]) == (0.5, 7.0)
    assert 0 < full["error"] < 0.02
    assert full["bytes"] == sum(ATTENTION.bytes(2))
    assert full["gbps"] == pytest.approx(full["bytes"] / 1.5e-3 / 1e9)
    assert full["tflops"] == pytest.approx(sum(ATTENTION.operations(2)) / 1.5e-3 / 1e12)
    assert full["matmul_share"] == pytest.approx(full["tflops"] * 1e6)
    assert rows["reconstruction_loss", "ours", "backward"]["derived"] == "full - forward"
    assert "gbps" not in rows["reconstruction_loss", "ours", "backward"]


def test_turns_alternate_and_quantiles_by_hand():
    assert timing.in_turns(["a", "b"], 3) == ["a", "b", "b", "a", "a", "b"]
    assert timing.quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == {"ms": 3.5, "ms_p20": 2.0, "ms_p80": 5.0}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_computes_the_definition(packed, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    case = attention_case("tiny", 2, 18, 2, 16, 30.0, packed, torch.float32)
    inputs = case.build("cpu")
    wanted = case.reference(**inputs)
    detached = inputs | {name: inputs[name].detach() for name in "qkv"}  # on a CPU it has no gradient
    torch.testing.assert_close(attention.flex(inputs)(**detached), wanted)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The path of a table of attention in a folder of the test, with a row of sm_80."""
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"sm_80": {"environment": {}, "rows": []}}))
    monkeypatch.setattr(selection, "TABLE", path)
    selection._choose.cache_clear()
    yield path
    selection._choose.cache_clear()


def measured(implementation, mode, ms, length=577, **more):
    facts = {"softcap": 30.0, "packed": False, "length": length, "width": 64}
    return facts | {"implementation": implementation, "mode": mode, "ms": ms} | more


def test_the_table_is_what_the_choice_reads(table, monkeypatch):
    """Also after a measurement of another case alone."""
    monkeypatch.setattr(selection, "architecture", lambda: 90)
    monkeypatch.setattr(ops, "MODE", "auto")
    rows = [
        measured("ours", "full", 2.0),
        measured("eager", "full", 1.0),
        measured("ours", "forward", 1.0),
        measured("eager", "forward", 3.0),
        measured("compile", "forward", 0.1),
        measured("sdpa_flash", "full", 0.1, computes="without the cap"),
        measured("ours", "backward", 0.5),
        {"softcap": 30.0, "implementation": "flex", "failed": "out of memory"},
    ]
    attention.write_table(rows, {"architecture": "sm_90"})
    attention.write_table([measured("ours", "full", 4.0, length=197)], {"architecture": "sm_90"})
    written = json.loads(table.read_text())
    assert set(written) == {"sm_80", "sm_90"}
    times = [row["ms"] for row in written["sm_90"]["rows"]]
    assert times == [{"triton": 2.0, "eager": 1.0}, {"triton": 1.0, "eager": 3.0}, {"triton": 4.0}]
    call = Case("cuda", torch.bfloat16, True, False, False, 577, 64, gradient=True)
    assert choose(call).backend == "eager"
    assert choose(call._replace(gradient=False)).backend == "triton"


def test_the_table_has_the_cases_measured_before_a_time_limit(table, tmp_path, monkeypatch):
    def measure(case, *_):
        if "packed" in case.label:
            raise KeyboardInterrupt
        return [measured("ours", "full", 2.0, length=197)]

    environment = {"architecture": "sm_90", "cpu": "", "commit": None, "date": ""}
    for place, name, value in (
        (kernels, "measure_case", measure),
        (kernels, "show", lambda rows: None),
        (torch.cuda, "is_available", lambda: True),
        (timing, "machine", dict),
        (record, "RESULTS", tmp_path),
        (record, "environment", lambda: environment),
    ):
        monkeypatch.setattr(place, name, value)
    with pytest.raises(KeyboardInterrupt):
        attention.main(["--cases", "T 197 d 64 cap"])
    assert [row["ms"] for row in json.loads(table.read_text())["sm_90"]["rows"]] == [{"triton": 2.0}]
