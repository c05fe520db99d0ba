"""Every benchmark runs, at a tiny size, so that none is ever broken."""

import re
import sys
import time
from pathlib import Path

import pytest
import torch

import fastalign as fa
from benchmarks import (
    checkpoint,
    data,
    export,
    fp8,
    masks,
    needs,
    parts,
    profile,
    record,
    scaling,
    step,
    targets,
)
from benchmarks.baseline import Baseline
from benchmarks.measure import NO_ROOM
from benchmarks.targets import BASE, step_targets
from tests.numerics import gradient_error, randomise, relative_error


@pytest.fixture(autouse=True)
def _results(tmp_path, monkeypatch):
    """Nothing is read from or left among the real results."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)


COMMANDS = [
    path.stem
    for path in sorted((record.ROOT / "benchmarks").glob("*.py"))
    if 'if __name__ == "__main__"' in path.read_text()
]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_run_by_a_test(name):
    """Whoever adds a benchmark adds a test that runs it at a tiny size."""
    tests = "".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    assert re.search(rf"\b{name}\.main\(|\bbenchmarks\.{name}\b", tests), f"no test runs benchmarks.{name}"


PARTS = ["masks", "teacher", "student's encoder", "decoder", "loss", "backward", "optimiser"]


def test_step(capsys):
    rows = step.main(["--tiny"])
    assert [row["implementation"] for row in rows] == ["baseline", "zero", "drop"]
    assert all(row["images_per_second"] > 0 for row in rows)
    assert all(list(row["parts_ms"]) == PARTS and min(row["parts_ms"].values()) > 0 for row in rows)
    assert "images/s" in capsys.readouterr().out


def test_checkpoint(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # which a machine with a GPU may lack
    (row,) = checkpoint.main(["--tiny"])
    assert row["blocked_steps"] > 0
    assert row["synchronous_steps"] > 0
    assert row["steps_beside_the_writer"] >= 1
    assert row["share_each_1000_steps"] == (row["blocked_steps"] + row["slowed_steps"]) / 1000
    assert "of 1,000 steps" in capsys.readouterr().out


def test_ratios_on_a_cpu():
    rows = {row["implementation"]: row for row in step.main(["--ratios", "--tiny"])}
    assert rows["zero"]["speedup_over_baseline"] > 0
    assert rows["drop"]["speedup_over_zero"] > 0
    assert list(rows["baseline"]["parts"]) == PARTS
    assert sum(rows["baseline"]["parts"].values()) == pytest.approx(1)


def test_parts_that_cannot_be_had_cost_no_row(monkeypatch):
    monkeypatch.setattr(step, "parts", lambda *_: 1 / 0)
    row = step.measure("zero", "vit_tiny_patch16_224", 2, 30.0, False, 1, img_size=32, depth=2)
    assert row["images_per_second"] > 0
    assert row["parts_ms"] == {}
    assert row["parts_failed"].startswith("ZeroDivisionError")


@pytest.mark.parametrize("implementation", ["baseline", "zero", "drop"])
def test_the_parts_are_a_whole_step(implementation):
    """Cut into parts or not, a step leaves the same weights."""
    weights = []
    for cut in (False, True):
        torch.manual_seed(0)
        contestant = step.Contestant(implementation, "vit_tiny_patch16_224", 2, 30.0, img_size=32, depth=2)
        randomise(contestant.model.student)
        torch.manual_seed(1)
        for _ in range(2):
            names = list(parts.stages(contestant)) if cut else contestant.step()
        assert not cut or names == PARTS
        weights.append({name: p.clone() for name, p in contestant.model.student.named_parameters()})
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-6, msg=name)


def _measured(room):
    """`step.measure` with made-up figures, where a contestant fits up to a batch."""
    calls = []

    def measure(implementation, name, batch, softcap, compiled, repeats):
        calls.append((implementation, name, batch, softcap, compiled))
        if batch > room[implementation]:
            raise torch.OutOfMemoryError
        if compiled == "blocks":
            raise ValueError("no such luck")
        figures = {"baseline": (100.0, 2.0), "zero": (200.0, 1.0), "drop": (260.0, 1.0), "fp8": (220.0, 1.0)}
        rate, gib = figures[implementation]
        row = {"batch": batch, "images_per_second": rate, "mfu": rate / 400, "peak_gib": gib * batch}
        return row | {"first_step_s": 1.0, "parts_ms": {"teacher": 1.0}}

    return measure, calls


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(record, "environment", lambda: {"gpu": "G"})


def test_a_group_is_measured_with_the_batches_that_fit(monkeypatch):
    measure, calls = _measured({"baseline": 8, "zero": 16, "drop": 8})
    monkeypatch.setattr(step, "measure", measure)
    rows = step.measure_group("x", 32, (30.0, True, ("baseline", "zero", "drop")), 5)
    assert [call[2] for call in calls] == [32, 16, 8, 32, 16, 32, 16, 8, 8]
    found = [(row["implementation"], row["batch"]) for row in rows]
    assert found == [("baseline", 8), ("zero", 16), ("drop", 8), ("zero", 8)]
    assert len({row["run"] for row in rows}) == 1
    measure, calls = _measured({"baseline": 0})
    monkeypatch.setattr(step, "measure", measure)
    assert step.measure_group("x", 2, (30.0, True, ("baseline",)), 5)[0]["failed"] == NO_ROOM


def test_groups_add_up_to_one_result(on_a_gpu, monkeypatch, capsys):
    measure, calls = _measured({"baseline": 256, "zero": 256, "drop": 256, "fp8": 256})
    monkeypatch.setattr(step, "measure", measure)
    now = iter(range(0, 100_000, 10))  # every look at the clock costs ten seconds
    monkeypatch.setattr(step.time, "perf_counter", lambda: next(now))
    backbones = ["--backbones", *list(step.BACKBONES)[:2]]
    rows = step.main([*backbones, "--budget", "25"])
    assert [(row["backbone"], row["softcap"]) for row in rows] == [(backbones[1], 30.0)] * 4
    assert "budget spent, 9 groups left" in capsys.readouterr().out
    rows = step.main([*backbones, "--resume"])
    assert len(calls) == len(set(calls)) == len(rows) == 2 * (4 * 3 + 1 + 2)
    assert {row["failed"] for row in rows if row["compiled"] == "blocks"} == {"ValueError: no such luck"}
    written = record.read("step")
    assert written["rows"] == rows
    assert [entry["state"] for entry in written["targets"]] == [
        *("met", "missed", "unmeasured"),  # 2.0 times faster than the baseline
        *("met", "met"),  # MFU 50 %
        *("unmeasured", "unmeasured"),  # one backbone lacks
    ]


def test_a_group_in_which_one_of_ours_failed_is_measured_again(on_a_gpu, monkeypatch):
    room = {"baseline": 256, "zero": 256, "drop": 256, "fp8": 256}
    measure, calls = _measured(room)
    monkeypatch.setattr(step, "measure", measure)
    command = ["--backbones", next(iter(step.BACKBONES)), "--resume"]
    first = step.main(command)
    del calls[:]
    rows = step.main(command)
    assert [call[4] for call in calls] == ["blocks"] * 2
    assert len(rows) == len(first)
    assert [row["compiled"] for row in rows[-2:]] == ["blocks"] * 2


def test_a_failed_number_of_ranks_is_measured_again():
    rows = [{"ranks": 1, "failed": "x"}, {"ranks": 2, "failed": "CUDA out of memory"}]
    assert record.left([1, 2, 4], rows, lambda row: row["ranks"]) == [4, 1]


def test_every_result_has_a_row_in_the_summary():
    folder = record.ROOT / "benchmarks/results"
    page = (folder / "SUMMARY.md").read_text()
    for path in folder.glob("*.json"):
        assert re.search(rf"^\| {path.stem} \| (?!not measured)", page, re.MULTILINE), (
            f"no row for {path.name}: python -m benchmarks.targets"
        )


def test_what_make_gpu_needs(monkeypatch, capsys):
    assert needs.main() == 0
    versions = {name: "1.0" for name in needs.NEEDS if name != "hypothesis"} | {"setuptools": "76.1"}
    monkeypatch.setattr(needs, "installed", versions.get)
    assert needs.main() == 2
    assert capsys.readouterr().err.startswith("missing: hypothesis, setuptools>=77;")


def test_a_summary_of_all_results(tmp_path, capsys):
    rows = [_step_row("baseline", 100.0), _step_row("zero", 190.0, mfu=0.4)]
    record.write("step", rows)
    own = {"target": "own", "state": "missed", "least": 1, "rows": 1, "worst": 0.5, "worst_at": "x|y"}
    record.write("another", [], {"targets": [own | {"missed": {"x|y": 0.5}}]})
    (tmp_path / "step.png").touch()
    assert targets.main([]) == 0
    out, page = capsys.readouterr().out, (tmp_path / "SUMMARY.md").read_text()
    assert re.search(r"1 met, 3 missed, \d+ unmeasured", out)
    assert (
        f"| met | step, mode zero, {BASE}: times faster than the baseline | 1.90 | at least 1.8 | {BASE} |"
        in page
    )
    assert "| missed | own | 0.50 | at least 1 | x/y |" in page
    assert "| unmeasured | every kernel is as right as eager PyTorch | - | all | - |" in page
    assert re.search(r"\| step \| .* \[plot\]\(step.png\) \|", page)
    assert "| scaling | not measured |" in page


def _step_row(implementation, rate, run="a", batch=8, **extra):
    row = {"backbone": BASE, "softcap": 30.0, "compiled": True, "implementation": implementation, "run": run}
    return row | {"batch": batch, "images_per_second": rate, "mfu": None, "peak_gib": 1.0 * batch} | extra


def test_targets_of_the_step_compare_what_is_comparable():
    def found(*rows):
        judged = {entry["target"]: entry for entry in step_targets(list(rows))}
        names = (
            f"step, mode zero, {BASE}: times faster than the baseline",
            "step: times mode drop is faster",
        )
        memory = "step, mode zero: peak memory over"
        return [next(e["worst"] for t, e in judged.items() if t.startswith(n)) for n in (*names, memory)]

    baseline = _step_row("baseline", 100.0)
    assert found(baseline, _step_row("zero", 190.0, peak_gib=4.0)) == [1.9, None, 0.5]
    # Another process, another batch, eager and uncapped rows, and rows without a figure.
    assert found(baseline, _step_row("zero", 190.0, run="b")) == [None, None, None]
    assert found(baseline, _step_row("zero", 190.0, batch=16)) == [1.9, None, None]
    assert found(baseline, _step_row("zero", 190.0, compiled=False)) == [None, None, None]
    assert found(baseline, _step_row("zero", 190.0, softcap=None)) == [None, None, None]
    assert found(baseline, _step_row("zero", 190.0, failed="x")) == [None, None, None]
    assert found(_step_row("zero", 100.0), _step_row("drop", 110.0)) == [None, 1.1, None]


@pytest.mark.slow
def test_scaling():
    rows = scaling.main(["--tiny"])
    assert [row["ranks"] for row in rows] == ([1] if torch.cuda.device_count() == 1 else [1, 2])
    assert all(row["images_per_second"] > 0 for row in rows)
    assert rows[0]["efficiency"] == 1


def test_scaling_over_the_gpus_there_are(on_a_gpu, monkeypatch, capsys):
    asked = []

    def measure(ranks, name, batch, tiny):
        asked.append((ranks, batch))
        row = {"ranks": ranks, "batch_per_rank": batch}
        return row | ({"failed": "x"} if ranks == 6 else {"images_per_second": 90.0 * ranks + 10})

    monkeypatch.setattr(scaling, "measure", measure)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    record.write("step", [_step_row("zero", 1.0, batch=96), _step_row("baseline", 1.0, batch=128)])
    now = iter(range(0, 100_000, 10))
    monkeypatch.setattr(scaling.time, "perf_counter", lambda: next(now))
    assert [row["ranks"] for row in scaling.main(["--budget", "25"])] == [1]
    rows = scaling.main(["--resume"])
    assert asked == [(1, 96), (2, 96), (4, 96), (6, 96)]
    assert [row.get("efficiency") for row in rows] == [1, 0.95, 0.925, None]
    assert record.read("scaling")["rows"] == rows
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert [row["ranks"] for row in scaling.main([])] == [1]
    assert "one GPU" in capsys.readouterr().out


@pytest.mark.parametrize("trap", ["kill $rank; exit 1", ""])
def test_ranks_that_wait_for_one_another_are_ended(trap, tmp_path, monkeypatch):
    """This program has its rank in another session, as torchrun, and ends it when told to; or it does not listen."""
    torchrun = tmp_path / "torchrun"
    start = "setsid sleep 60 & rank=$!; echo $rank > rank; wait" if trap else "exec sleep 60"
    torchrun.write_text(f"#!/bin/bash\ncd {tmp_path}\ntrap '{trap}' TERM\n{start}\n")
    torchrun.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(torchrun))
    monkeypatch.setattr(scaling, "TIMEOUT", 2)
    monkeypatch.setattr(scaling, "GRACE", 20 if trap else 0.5)
    before = time.monotonic()
    assert scaling.measure(2, "x", 1, False)["failed"] == "no result within 2 seconds"
    assert time.monotonic() - before < 20
    if trap:
        state = Path(f"/proc/{int((tmp_path / 'rank').read_text())}/stat")
        while state.exists() and state.read_text().split()[2] != "Z":
            assert time.monotonic() - before < 20


def test_a_rank_that_fails_is_a_row():
    row = scaling.measure(1, "vit_tiny_patch16_224", -1, True)
    assert "negative dimension" in row["failed"]


def test_fp8():
    """FP8 has a 3-bit mantissa where bf16 has 7."""
    rows = fp8.main(["--tiny"])
    for masking in ("zero", "drop"):
        bf16, reduced = (row["relative_error"] for row in rows if row["masking"] == masking)
        assert 0 < 3 * bf16 < reduced < 0.1


def test_padding_is_no_target(monkeypatch):
    """However long the row is into which the visible tokens are packed, the error is that of the tokens."""
    vit, images = fp8.random_batch("vit_tiny_patch16_224", torch.device("cpu"), 2, img_size=32, depth=2)
    randomise(vit)  # else padding is zero, which changes no ratio
    packed, lengths = fa.UniformMasks.packed, []

    def longer(masks, ids, grid, prefix):
        lengths.append(len(packed(masks, ids, grid, prefix)[1].indices))
        return packed(masks, ids, grid, prefix, length=20 * lengths[-1])

    wanted = fp8.errors(vit, images, "drop")
    monkeypatch.setattr(fa.UniformMasks, "packed", longer)
    found = fp8.errors(vit, images, "drop")
    assert lengths
    for row, other in zip(wanted, found, strict=True):
        assert other["relative_error"] == pytest.approx(row["relative_error"], rel=0.02)
        assert other["error_over_variance"] == pytest.approx(row["error_over_variance"], rel=0.04)


def test_export():
    rows = {row["target"]: row for row in export.main(["--tiny"])}
    assert rows["hf-clip"]["plain"] > 0  # its final norm's epsilon is another than the student's
    assert set(rows) == {"timm", "hf-clip", "open-clip", "prismatic"}
    assert rows["open-clip"].pop("capped") is None
    assert all(max(row["plain"], row.get("capped", 0)) < 1e-5 for row in rows.values())


def test_masks():
    assert masks.main(["--tiny"]) is not None


def test_what_is_measured_already_is_not_measured_again(capsys):
    record.write("masks", [{"kind": "x"}], {"identity": record.identity()})
    assert masks.main(["--resume"]) == [{"kind": "x"}]
    name = next(iter(step.BACKBONES))
    facts = {"identity": record.identity() | {"backbone": name, "mode": "zero"}}
    record.write("profile", [{"operation": "x"}], facts)
    assert profile.main(["--resume"]) == [{"operation": "x"}]
    assert profile.main(["--tiny", "--resume", "--mode", "drop"]) != [{"operation": "x"}]


def test_data(capsys):
    rows = data.main(["--tiny", "--needs", "100"])
    assert [row["source"] for row in rows] == ["folder", "tar"]
    assert all(row["images_per_second"] > 0 and row["threads_needed"] >= 1 for row in rows)
    assert "folder: to feed 100 images/s you need" in capsys.readouterr().out


def test_threads_that_feed_a_step():
    rates = {1: 100.0, 2: 180.0, 4: 300.0}
    assert data.threads_needed(90, rates) == (1, True)
    assert data.threads_needed(180, rates) == (2, True)
    assert data.threads_needed(230, rates) == (3, True)  # 2.83 on the line
    assert data.threads_needed(600, rates) == (8, False)  # at 75 a thread
    rows = [
        {"source": "tar", "decoder": "DALI GPU mixed", "hw_decoder_load": load, "threads": number}
        | {"images_per_second": rate * (1 + load)}
        for load in (0.0, 0.5)
        for number, rate in rates.items()
    ]
    line = "tar: to feed 600 images/s you need 6 threads (DALI GPU mixed, hw_decoder_load 0.5, more than were"
    assert data.closing(rows, 600)[0].startswith(line)


def test_data_on_a_gpu_goes_on_and_feeds_the_fastest_step(on_a_gpu, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(data, "measure", lambda *arguments: asked.append(arguments) or 100.0)
    monkeypatch.setattr(data, "make_images", lambda *_: ["x/images", "x/shard.tar"])
    record.write("step", [_step_row("zero", 350.0), _step_row("drop", 420.0), {"failed": "x"}])
    now = iter(range(0, 100_000, 10))
    monkeypatch.setattr(data.time, "perf_counter", lambda: next(now))
    assert len(data.main(["--threads", "1", "2", "--budget", "45"])) == 4
    rows = data.main(["--threads", "1", "2", "--resume"])
    assert len(asked) == len(set(asked)) == len(rows) == 16
    assert "tar: to feed 420 images/s you need 9 threads" in capsys.readouterr().out
    assert record.read("data")["needs"] == 420
    assert targets.main([]) == 0
    assert "- tar: to feed 420 images/s you need 9" in (record.RESULTS / "SUMMARY.md").read_text()
    assert {row["decoder"] for row in rows} == {"DALI GPU mixed"}


@pytest.mark.parametrize("mode", ["zero", "drop", "baseline"])
def test_profile(mode):
    rows = profile.main(["--tiny", "--mode", mode])
    assert any("addmm" in row["operation"] or "mm" in row["operation"] for row in rows)
    assert sum(row["share"] for row in rows) <= 1.001


def test_without_a_gpu_the_step_is_not_timed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a GPU"):
        step.main([])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_clip_quickgelu_224"])
@pytest.mark.parametrize("softcap", [0.5, None])
def test_the_baseline_computes_the_same_loss(name, softcap, monkeypatch):
    """An honest yardstick: with our masks and weights it gives our loss and gradient."""
    kwargs = {"img_size": 48, "embed_dim": 96, "num_heads": 3, "depth": 3}
    baseline = Baseline(name, softcap, **kwargs).double()
    randomise(baseline)
    vit = fa.create_backbone(name, **kwargs).double()
    teacher, student = fa.MaskedTeacher(vit), fa.MaskEmbedStudent.from_backbone(vit, softcap=softcap).double()
    teacher.vit.load_state_dict(baseline.teacher.state_dict())

    def renamed(key):
        key = key.replace("attn.inner.", "attn.")
        return key if key.startswith("encoder.") else f"decoder.{key}"

    student.load_state_dict({renamed(key): value for key, value in baseline.student.state_dict().items()})
    objective = fa.MaskEmbed(teacher, student, fa.UniformMasks())
    images, ids = torch.randn(2, 3, 48, 48, dtype=torch.float64), torch.arange(2)
    monkeypatch.setattr(baseline, "draw", lambda images: objective.masks(ids, 9).flatten(0, 1).double())
    found, wanted = baseline(images, ids), objective(images, ids)
    assert relative_error(found, wanted) < 1e-5  # the baseline's loss is in fp32
    found.backward(), wanted.backward()
    theirs = {renamed(n): p.grad for n, p in baseline.student.named_parameters() if p.grad is not None}
    ours = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    assert gradient_error(theirs, ours) < 1e-4


def test_a_record_says_where_it_was_taken():
    text = record.write("x", [{"a": 1}]).read_text()
    for key in ("gpu", "torch", "commit", "command", "rows"):
        assert f'"{key}"' in text


@pytest.mark.parametrize("tool", ["there", "missing"])
def test_the_environment_needs_no_git(tool, tmp_path, monkeypatch):
    if tool == "missing":
        monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert record.environment()["commit"] is None


def test_an_earlier_part_counts_while_machine_and_sources_are_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    source = tmp_path / "benchmarks/step.py"
    source.write_text("a = 1")
    before = record.identity()
    assert record.resume("x", before) == {}
    record.write("x", [{"a": 1}], {"identity": before})
    # What is written, and what only reads it, changes nothing.
    (tmp_path / "benchmarks/plots.py").write_text("b = 1")
    assert record.resume("x", record.identity())["rows"] == [{"a": 1}]
    source.write_text("a = 2")
    assert record.resume("x", record.identity()) == {}
    assert "starting anew: x.json has another sources" in capsys.readouterr().out
