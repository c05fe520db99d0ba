"""`benchmarks.kernels`: every operation runs through it, a wrong kernel is refused, parts add up to one result."""

import dataclasses
import json

import pytest
import torch

from benchmarks import compare, kernels, measure, record
from benchmarks.cases import TINY_CASES
from benchmarks.targets import attention_targets, summary, targets
from fastalign import reference


@pytest.fixture(autouse=True)
def _results(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)


@pytest.mark.slow
def test_every_operation_runs(capsys, tmp_path):
    assert kernels.main(["--tiny"]) == 0
    text = capsys.readouterr().out
    for case in TINY_CASES:
        for implementation in ("ours", "eager", *(("compile",) if case.compiles else ())):
            lines = [line for line in text.splitlines() if line.startswith(f"{case.name:26}{case.label:36}")]
            modes = [line.split()[-4:] for line in lines if f" {implementation} " in line]
            assert len(modes) == 3, (case.label, implementation, lines)
    assert "not timed" not in text
    assert text.count("unmeasured") == 6
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.main([]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_unknown_names_are_refused():
    with pytest.raises(SystemExit, match="no operation packs; there are"):
        kernels.main(["--tiny", "--ops", "packs"])
    with pytest.raises(SystemExit, match="no case starts with B/32"):
        kernels.main(["--tiny", "--models", "B/32"])


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
    assert "missed     every kernel is as right as eager PyTorch" in text


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


def test_the_check_takes_the_batch_that_fits(monkeypatch):
    case = next(case for case in TINY_CASES if case.name == "expand_masked")
    seen, original = [], measure.check

    def check(built, functions, yardsticks):
        seen.append((len(built.inputs["tokens"]), sorted(functions)))
        if len(seen) == 1:
            raise torch.OutOfMemoryError
        return original(built, functions, yardsticks)

    monkeypatch.setattr(measure, "check", check)
    functions = {"ours": case.kernel, "eager": case.reference, "other": case.reference}
    verdict = measure.fitting_check(case, case.build("cpu", 2), functions, set(), "cpu")
    assert seen == [(2, ["eager", "other", "ours"]), (1, ["eager", "ours"])]
    assert verdict.batch == 1
    assert not verdict.refused


@pytest.fixture
def on_a_gpu(monkeypatch):
    """`main` as on a GPU, where every case gives one row at once."""
    measured = []

    def measure_case(case, device, limits, implementations, tiny):
        measured.append(case.label)
        return [{"op": case.name, "label": case.label, "implementation": "ours", "mode": "full", "ms": 1.0}]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(record, "environment", lambda: {"gpu": "G", "commit": "abc-dirty", "date": "today"})
    monkeypatch.setattr(measure, "machine", lambda: {"copy_gbps": 1000.0, "matmul_tflops": 100.0})
    monkeypatch.setattr(compare, "measure_case", measure_case)
    monkeypatch.setattr(compare, "show", lambda rows: None)
    monkeypatch.setattr(kernels, "CASES", TINY_CASES)
    return measured


def test_parts_add_up_to_one_result(on_a_gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "targets", lambda rows: [])
    part = ["--ops", "bias_activation"]
    assert kernels.main(part) == 0
    assert len(on_a_gpu) == 3
    assert kernels.main(["--resume"]) == 0
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert len(result["rows"]) == len(TINY_CASES)
    assert [run["copy_gbps"] for run in result["runs"]] == [1000.0, 1000.0]
    # The commit is not asked: results make a clean tree dirty, and a copy of the tree may have none.
    monkeypatch.setattr(record, "environment", lambda: {"gpu": "G", "commit": None})
    kernels.main(["--resume"])
    assert len(on_a_gpu) == len(TINY_CASES)
    monkeypatch.setattr(record, "environment", lambda: {"gpu": "another", "commit": "abc"})
    kernels.main(["--resume", *part])
    assert "starting anew: kernels.json has another gpu" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "kernels.json").read_text())["rows"]) == 3


def test_a_result_with_everything_in_it(tmp_path, monkeypatch, capsys):
    """The path of a GPU, with a clock and a memory that are made up."""
    original = compare.measure_case
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(record, "environment", lambda: {"gpu": "G", "commit": None})
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
    assert (full["host_ms"], full["peak_mib"], full["checked_batch"]) == (0.5, 7.0, 2)
    assert 0 < full["error"] < 0.02
    assert full["matmul_share"] == pytest.approx(full["tflops"] * 1e6)
    assert rows["reconstruction_loss", "ours", "backward"]["derived"] == "full - forward"
    assert "gbps" not in rows["reconstruction_loss", "ours", "backward"]
    assert [entry["state"] for entry in result["targets"]][:2] == ["met", "met"]
    assert "copy 0 GB/s" in capsys.readouterr().out


def test_a_budget_ends_between_cases(on_a_gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "targets", lambda rows: [])
    now = iter(range(0, 10_000, 10))  # every look at the clock costs ten seconds
    monkeypatch.setattr(compare.time, "perf_counter", lambda: next(now))
    assert kernels.main(["--budget", "60"]) == 0
    assert 0 < len(on_a_gpu) < 4
    assert f"{len(TINY_CASES) - len(on_a_gpu)} cases left" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "kernels.json").read_text())["rows"]) == len(on_a_gpu)


@pytest.mark.parametrize(
    ("failed", "again"),
    [({"ours": "ValueError: x"}, True), ({"ours": measure.NO_ROOM}, False), ({"compile": "x"}, False)],
)
def test_what_ours_failed_at_is_measured_again_and_last(failed, again, on_a_gpu, monkeypatch):
    monkeypatch.setattr(kernels, "targets", lambda rows: [])
    case = TINY_CASES[0]
    rows = [
        {"op": case.name, "label": case.label, "implementation": name, "failed": why}
        for name, why in failed.items()
    ]
    record.write("kernels", rows, {"identity": record.identity(kernels.SOURCES)})
    kernels.main(["--resume"])
    found = json.loads((record.RESULTS / "kernels.json").read_text())["rows"]
    assert ("failed" in found[0]) is not again
    assert len(found) == len(TINY_CASES)
    assert ((found[-1]["op"], found[-1]["label"]) == (case.name, case.label)) is again


def _row(op, mode, ms=1.0, faster=None, **extra):
    row = {"op": op, "label": "x", "implementation": "ours", "mode": mode, "ms": ms}
    return row | {"times_faster_than": faster or {}} | extra


def test_targets():
    attention = {"op": "softcap_attention", "mode": "full", "softcap": 30.0, "packed": False}
    rows = [
        _row("pack", "forward", copy_share=0.9, faster={"compile": 1.2}),
        _row("unpack", "forward", copy_share=0.8, faster={"compile": 0.99}),
        _row("pack", "backward", copy_share=0.9, faster={"compile": 1.0}),
        _row("loss", "backward", copy_share=0.1, faster={"compile": 0.1}, derived="full - forward"),
        _row(**attention, length=197, faster={"flex": 1.6, "sdpa_flash": 0.9}),
        _row(**attention | {"packed": True}, length=577, faster={"flex": 1.6}),
        _row(**attention | {"softcap": None}, length=577, faster={"sdpa_flash": 1.6}),
        {"op": "other", "label": "y", "implementation": "ours", "failed": "wrong: output 0", "wrong": True},
    ]
    found = {entry["target"]: entry for entry in targets(rows) + attention_targets(rows)}
    states = {target: entry["state"] for target, entry in found.items()}
    assert states == {
        "every kernel is as right as eager PyTorch": "missed",
        "memory-bound kernels, forward: share of the copy bandwidth": "missed",
        "memory-bound kernels, forward: times faster than torch.compile": "missed",
        "memory-bound kernels, backward: share of the copy bandwidth": "met",
        "memory-bound kernels, backward: times faster than torch.compile": "met",
        "memory-bound kernels, full: share of the copy bandwidth": "unmeasured",
        "memory-bound kernels, full: times faster than torch.compile": "unmeasured",
        "soft-capped attention, T = 197, full: times faster than flex": "met",
        "soft-capped attention, T = 197, full: times faster than sdpa_flash": "missed",
        "soft-capped attention, T = 577, full: times faster than flex": "unmeasured",
        "soft-capped attention, T = 577, full: times faster than sdpa_flash": "unmeasured",
    }
    assert found["memory-bound kernels, forward: share of the copy bandwidth"]["missed"] == {"unpack x": 0.8}
    assert "  unpack x: 0.80" in summary(list(found.values()))


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
