"""`benchmarks.kernels` and `benchmarks.attention`: wrong kernels are not timed, failures are rows, the table."""

import dataclasses
import json

import pytest
import torch

from benchmarks import attention, compare, kernels, record
from benchmarks.cases import TINY_CASES, attention_case
from fastalign import ops
from fastalign.ops import reference
from fastalign.ops.attention import Case, choice, choose, flex

ATTENTION = next(case for case in TINY_CASES if case.name == "softcap_attention")


def test_without_a_gpu_the_command_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.main([]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_unknown_names_are_refused(capsys):
    for option, name, words in (
        ("--ops", "packs", "choose from"),
        ("--cases", "B/32", "no case starts with 'B/32'"),
    ):
        with pytest.raises(SystemExit):
            kernels.main(["--tiny", option, name])
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

    rows = compare.measure_case(ATTENTION, "cpu", {}, implementations, tiny=True)
    failed = {row["implementation"]: row["failed"] for row in rows if "failed" in row}
    assert failed["large"] == compare.NO_MEMORY
    assert "computes another function" in failed["sum"]
    assert {row["implementation"] for row in rows if "ms" in row} == {"ours", "eager", "compile"}


def test_a_complete_result(tmp_path, monkeypatch, capsys):
    """The path of a GPU, with a fake clock and fake memory."""
    original = compare.measure_case
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(record, "environment", lambda: {"gpu": "G", "commit": None, "date": "d"})
    monkeypatch.setattr(compare, "machine", lambda: {"copy_gbps": 1e-3, "matmul_tflops": 1e-6})
    monkeypatch.setattr(compare, "device_times", lambda call: [(call(), 2.0)[1], 1.0])
    monkeypatch.setattr(compare, "host_ms", lambda call: (call(), 0.5)[1])
    monkeypatch.setattr(compare, "peak_mib", lambda call: (call(), 7.0)[1])
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(
        compare, "measure_case", lambda case, _, *rest, **more: original(case, "cpu", *rest, **more)
    )
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
    assert "copy 0 GB/s" in capsys.readouterr().out


def test_rounds_alternate():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = compare.interleaved(calls, lambda call: [call() or 1.0], rounds=3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert times == {"a": [1.0] * 3, "b": [1.0] * 3}
    assert compare.quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == {"ms": 3.5, "ms_p20": 2.0, "ms_p80": 5.0}


def test_packed_flex_attention_is_timed_without_its_mask(monkeypatch):
    """The mask is made before timing, and the result equals the definition."""
    case = attention_case("tiny", 2, 18, 2, 16, 30.0, packed=True, dtype=torch.float32)
    inputs = case.build("cpu")
    function = attention._packed_flex(inputs)
    monkeypatch.setattr(flex, "block_mask", lambda *_: 1 / 0)
    monkeypatch.setattr(flex, "_compiled", lambda: flex.flex_attention)
    with torch.no_grad():
        torch.testing.assert_close(function(**inputs), case.reference(**inputs))


def test_the_table_is_what_the_choice_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "TABLE", tmp_path / "table.json")
    monkeypatch.setattr(choice, "architecture", lambda: 90)
    monkeypatch.setattr(ops, "MODE", "auto")
    (tmp_path / "table.json").write_text(json.dumps({"sm_80": {"environment": {}, "rows": []}}))
    facts = {"softcap": 30.0, "packed": False, "length": 577, "width": 64}
    rows = [
        facts | {"implementation": "ours", "mode": "full", "ms": 2.0},
        facts | {"implementation": "eager", "mode": "full", "ms": 1.0},
        facts | {"implementation": "ours", "mode": "forward", "ms": 1.0},
        facts | {"implementation": "eager", "mode": "forward", "ms": 3.0},
        facts | {"implementation": "compile", "mode": "forward", "ms": 0.1},
        facts | {"implementation": "sdpa_flash", "mode": "full", "ms": 0.1, "computes": "without the cap"},
        facts | {"implementation": "ours", "mode": "backward", "ms": 0.5},
        facts | {"implementation": "flex", "failed": "out of memory"},
    ]
    choice._choose.cache_clear(), choice._table.cache_clear()
    try:
        attention.write_table(rows, {"architecture": "sm_90"})
        written = json.loads((tmp_path / "table.json").read_text())
        assert set(written) == {"sm_80", "sm_90"}
        assert [row["ms"] for row in written["sm_90"]["rows"]] == [
            {"triton": 2.0, "eager": 1.0},
            {"triton": 1.0, "eager": 3.0},
        ]
        call = Case("cuda", torch.bfloat16, True, False, False, 577, 64, gradient=True)
        assert choose(call).backend == "eager"
        assert choose(call._replace(gradient=False)).backend == "triton"
    finally:
        choice._choose.cache_clear(), choice._table.cache_clear()


def _row(length, ms):
    facts = {"softcap": 30.0, "packed": False, "length": length, "width": 64}
    return facts | {"implementation": "ours", "mode": "full", "ms": ms}


def test_cases_that_were_not_measured_stay_in_the_table(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    monkeypatch.setattr(choice, "TABLE", path)
    attention.write_table([_row(197, 1.0), _row(577, 2.0)], {"architecture": "sm_90"})
    attention.write_table([_row(577, 3.0)], {"architecture": "sm_90", "date": "later"})
    found = json.loads(path.read_text())["sm_90"]
    assert [(row["length"], row["ms"]["triton"]) for row in found["rows"]] == [(197, 1.0), (577, 3.0)]
    # Stopped while writing: the old table is intact.
    monkeypatch.setattr(type(path), "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attention.write_table([_row(577, 4.0)], {"architecture": "sm_90"})
    assert json.loads(path.read_text())["sm_90"] == found
