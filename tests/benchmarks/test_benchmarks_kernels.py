"""How operations are compared: a wrong kernel is not timed, what fails is a row, figures follow from times."""

import dataclasses
import json

import pytest
import torch

from benchmarks import compare, kernels, measure, record
from benchmarks.cases import TINY_CASES
from fastalign.ops import reference


@pytest.fixture(autouse=True)
def _results(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.main([]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_unknown_names_are_refused():
    with pytest.raises(SystemExit, match="--ops: no operation packs; there are"):
        kernels.main(["--tiny", "--ops", "packs"])
    with pytest.raises(SystemExit, match="--cases: no case starts with 'B/32'"):
        kernels.main(["--tiny", "--cases", "B/32"])


def _replace(monkeypatch, name, kernel):
    cases = [dataclasses.replace(case, kernel=kernel) for case in TINY_CASES if case.name == name]
    monkeypatch.setattr(kernels, "TINY_CASES", cases)


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

    _replace(monkeypatch, "expand_masked", wrong)
    assert kernels.main(["--tiny"]) == 1
    text = capsys.readouterr().out
    assert " ms " not in text
    messages = {"raises": "ValueError: never mind", "backward": "wrong: gradient of tokens"}
    assert messages.get(error, "wrong: output 0") in text


def _with(name, function):
    """`kernels.implementations` and one more."""

    def found(case, built, tiny):
        functions, *rest = kernels.implementations(case, built, tiny)
        return functions | {name: function}, *rest

    return found


def test_what_does_not_fit_is_a_row_and_no_error():
    def too_large(**inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    case = next(case for case in TINY_CASES if case.name == "softcap_attention")
    rows = compare.measure_case(case, "cpu", {}, _with("large", too_large), tiny=True)
    assert [row["failed"] for row in rows if row["implementation"] == "large"] == [measure.NO_ROOM]
    assert {row["implementation"] for row in rows if "ms" in row} == {"ours", "eager", "compile"}


def test_a_rival_that_computes_something_else_is_not_compared():
    case = next(case for case in TINY_CASES if case.name == "softcap_attention")
    rival = _with("sum", lambda q, k, v, softcap: q + k + v)
    rows = compare.measure_case(case, "cpu", {}, rival, tiny=True)
    assert "computes something else" in next(r["failed"] for r in rows if r["implementation"] == "sum")


def test_a_result_with_everything_in_it(tmp_path, monkeypatch, capsys):
    """The path of a GPU, with a clock and a memory that are made up."""
    original = compare.measure_case
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(record, "environment", lambda: {"gpu": "G", "commit": None, "date": "d"})
    monkeypatch.setattr(measure, "machine", lambda: {"copy_gbps": 1e-3, "matmul_tflops": 1e-6})
    monkeypatch.setattr(measure, "device_times", lambda call: [(call(), 2.0)[1], 1.0])
    monkeypatch.setattr(measure, "host_ms", lambda call: (call(), 0.5)[1])
    monkeypatch.setattr(measure, "peak_mib", lambda call: (call(), 7.0)[1])
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
    assert full["matmul_share"] == pytest.approx(full["tflops"] * 1e6)
    assert rows["reconstruction_loss", "ours", "backward"]["derived"] == "full - forward"
    assert "gbps" not in rows["reconstruction_loss", "ours", "backward"]
    assert "copy 0 GB/s" in capsys.readouterr().out


def test_figures_of_a_row():
    case = TINY_CASES[-1]
    limits = {"copy_gbps": 1e-3, "matmul_tflops": 1e-3}
    row = compare.figures(case, "full", {"ms": 2.0}, limits)
    assert row["bytes"] == sum(case.bytes(2))
    assert row["gbps"] == pytest.approx(row["bytes"] / 2e-3 / 1e9)
    assert row["copy_share"] == pytest.approx(1e3 * row["gbps"])
    assert row["tflops"] == pytest.approx(sum(case.operations(2)) / 2e-3 / 1e12)


def test_rounds_alternate():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = measure.interleaved(calls, lambda call: [call() or 1.0], rounds=3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert times == {"a": [1.0] * 3, "b": [1.0] * 3}
    assert measure.quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == {"ms": 3.5, "ms_p20": 2.0, "ms_p80": 5.0}
