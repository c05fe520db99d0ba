"""Every benchmark runs at a tiny size; the two sides of the step, and of the data pipeline, do the same work."""

import os
import re
import subprocess
import sys
from contextlib import closing
from itertools import islice

import pytest
import torch
from torch import nn

import fastalign as fa
from benchmarks import checkpoint, data, export, fp8, masks, record, step, step_bench, summary
from benchmarks.baseline import Baseline
from benchmarks.step_bench import FIXED_SIZE, KEY, TINY_KWARGS, Row, StepBench
from tests.numerics import gradient_error, randomise, relative_error

CPU = torch.device("cpu")


@pytest.mark.parametrize("mode", ["baseline", "zero", "drop"])
def test_the_graphs_contain_the_whole_step(mode):
    """Every linear layer of an eager step is in a compiled graph; trained weights are fp32, frozen products bf16."""
    bench = StepBench(Row("tiny", mode, compiled="eager"), 2, CPU)
    student, teacher = bench.model.student, bench.model.teacher
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    products = [m for m in teacher.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert {m.weight.dtype for m in products} == {torch.bfloat16}
    others = {id(p) for m in products for p in m.parameters()}
    assert {p.dtype for p in teacher.parameters() if id(p) not in others} == {torch.float32}
    called, graphs = [], []
    layers = [module for module in bench.model.modules() if isinstance(module, nn.Linear)]
    hooks = [layer.register_forward_hook(lambda *_: called.append(1)) for layer in layers]
    bench.step()
    for hook in hooks:
        hook.remove()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    bench.model.compile(backend=backend)
    bench.step()
    nodes = [node for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert sum(node.target is torch._C._nn.linear for node in nodes) == len(called)
    depth = TINY_KWARGS["depth"]
    assert len(called) == 4 * (depth - 1) + 4 * depth + 1 + 2 * 4 + 1
    assert len(graphs) == 2  # one of the teacher, one of student and decoder


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_base_patch16_clip_quickgelu_224", {}),
        ("vit_base_patch16_dinov3", FIXED_SIZE),
        ("aimv2_large_patch14_224", {"patch_size": 16}),
        ("vit_pe_core_large_patch14_336", {"patch_size": 16, "attn_pool_num_heads": 3}),
    ],
)
@pytest.mark.parametrize("softcap", [0.5, None])
def test_the_baseline_computes_the_same_loss(name, options, softcap, monkeypatch):
    """With our masks and weights it gives our loss and gradient."""
    kwargs = {"img_size": 48, "embed_dim": 96, "num_heads": 3, "depth": 3, **options}
    baseline = Baseline(name, softcap, **kwargs).double()
    randomise(baseline)
    vit = fa.create_backbone(name, **kwargs).double()
    teacher, student = fa.MaskedTeacher(vit), fa.MaskEmbedStudent.from_backbone(vit, softcap=softcap).double()
    teacher.vit.load_state_dict(baseline.teacher.backbone.state_dict())

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


def test_a_row_that_fails_is_named_and_the_others_continue(monkeypatch):
    saved, bench = [], step_bench.StepBench

    def build(row, *arguments):
        if row.mode == "fp8":
            raise torch.OutOfMemoryError
        return bench(row, *arguments)

    monkeypatch.setattr(step_bench, "StepBench", build)
    rows = [Row("tiny", mode, compiled="eager") for mode in ("zero", "fp8", "baseline")]
    step_bench.measure(rows, 2, CPU, rounds=2, steps=1, save=saved.append)
    assert [[row.get("failed") for row in rows] for rows in saved] == [[None, "out of memory", None]] * 2
    assert [rows[0]["steps"] for rows in saved] == [1, 2]


def test_rows_that_were_measured_are_not_missing(monkeypatch):
    rows = step.every_row("B/16-224")
    assert len(rows) == len(set(rows)) == 15
    monkeypatch.setattr(record, "environment", lambda: {"gpu": "G", "cpu": "C", "commit": "a", "date": "b"})
    done = rows[0]._asdict() | {"images_per_second": 1.0}
    record.write("step", [done, rows[1]._asdict() | {"failed": "x"}], key=KEY)
    assert step.missing(rows) == rows[1:]
    monkeypatch.setattr(record, "environment", lambda: {"gpu": "another"})
    assert step.missing(rows) == rows


def test_ratios_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a GPU"):
        step.main([])
    rows = step.main(["--ratios", "--tiny"])
    assert rows[0]["speedup"] == 1
    assert {row["mode"] for row in rows} == {"baseline", "zero", "drop"}
    assert all(row["speedup"] > 0 and row["matmul_share"] > 0 for row in rows)


def test_earlier_rows_of_the_same_machine_stay(monkeypatch):
    place = {"gpu": "G", "cpu": "C", "commit": "a", "date": "1"}
    monkeypatch.setattr(record, "environment", lambda: place)
    record.write("x", [{"name": "a"}, {"name": "b"}], key=("name",))
    place["commit"] = "b"
    record.write("x", [{"name": "b"}], key=("name",))
    rows = record.read("x")["rows"]
    assert [(row["name"], row["commit"]) for row in rows] == [("a", "a"), ("b", "b")]
    place["gpu"] = "another"
    record.write("x", [{"name": "c"}], key=("name",))
    assert [row["name"] for row in record.read("x")["rows"]] == ["c"]


def test_the_summary_compares_only_equal_conditions(monkeypatch):
    def row(mode, rate, **extra):
        measured = {"batch": 8, "images_per_second": rate, "peak_gib": rate / 100}
        return Row("B/16-224", mode)._asdict() | measured | extra

    def figures(*rows):
        record.write("step", list(rows))
        found = dict(re.findall(r"^\| B/16-224: (.+?) \| (.+?) \|", summary.main(), re.M))
        return [found[name] for name in ("zero over the compiled baseline", "drop over zero", "MFU of zero")]

    baseline = row("baseline", 100.0)
    assert figures(baseline, row("zero", 190.0, mfu=0.4)) == ["1.90", "not measured", "0.40"]
    assert figures(row("zero", 100.0, mfu=0.4), row("drop", 110.0)) == ["not measured", "1.10", "0.40"]
    for other in ({"batch": 16}, {"softcap": None}, {"compiled": "eager"}, {"failed": "x"}):
        assert figures(baseline, row("zero", 190.0, mfu=0.4) | other)[0] == "not measured"
    assert "failed: B/16-224 zero 30.0 compiled bf16: x" in summary.main()


def test_the_summary_of_operations():
    row = {"op": "pack", "implementation": "ours", "ms": 1.0, "times_faster_than": {"compile": 1.2}}
    rows = [
        row | {"label": "x", "mode": "forward", "copy_share": 0.9},
        row | {"label": "y", "mode": "forward", "copy_share": 0.8, "times_faster_than": {"compile": 0.99}},
        row | {"label": "x", "mode": "backward", "copy_share": 0.1, "derived": "full - forward"},
    ]
    record.write("kernels", rows)
    capped = {"op": "softcap_attention", "label": "T 577 d 64 cap", "mode": "full"}
    record.write("attention", [row | capped | {"times_faster_than": {"flex": 1.6, "sdpa_flash": 0.9}}])
    text = summary.main()
    assert "| pack: least share of the copy bandwidth | 0.80 | >= 0.85 |" in text
    assert "| pack: least speed over torch.compile | 0.99 | >= 1 |" in text
    assert "| attention, T 577 d 64 cap: over FlexAttention | 1.60 | >= 1.5 |" in text


@pytest.mark.slow
def test_scaling(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "benchmarks.scaling", "--tiny"]
    result = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert re.search(r"'ranks': 2, 'batch_per_rank': 2, 'images_per_second': \d", result.stdout)


def test_checkpoint(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # a machine with a GPU may lack it
    (row,) = checkpoint.main(["--tiny"])
    assert min(row["blocked_steps"], row["synchronous_steps"]) > 0
    assert row["steps_beside_the_writer"] >= 1


def test_fp8():
    """FP8 has a 3-bit mantissa where bf16 has 7."""
    rows = fp8.main(["--tiny"])
    for masking in ("zero", "drop"):
        bf16, reduced = (row["relative_error"] for row in rows if row["masking"] == masking)
        assert 0 < 3 * bf16 < reduced < 0.1


def test_export():
    rows = {row["target"]: row for row in export.main(["--tiny"])}
    assert set(rows) == {"timm", "hf-clip", "onnx"}
    assert all(max(row["plain"], row["capped"]) < 1e-5 for row in rows.values())


def test_masks():
    assert masks.main(["--tiny"]) is not None


def test_the_pipelines_take_turns():
    cores = os.sched_getaffinity(0)
    (row,) = data.main(["--tiny"])
    assert os.sched_getaffinity(0) == cores
    assert row["ratio"] > 0
    with pytest.raises(SystemExit):
        data.main(["--threads", "100000"])


@pytest.mark.parametrize("crop", ["rkrc", "rrc"])
def test_both_sides_deliver_the_same_images(tmp_path, monkeypatch, crop):
    """In any order, with the interpolation as the only random choice."""
    monkeypatch.setattr(data, "PIXELS", (60, 60))
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0}
    monkeypatch.setattr(data, "TRANSFORM", data.TRANSFORM | whole)
    common = (data.make_images(tmp_path, 8), crop, 4, 1, CPU)
    found = []
    for batches in (data.ours(*common), data.plain(*common)):
        with closing(batches):
            images = torch.cat(list(islice(batches, 2)))
        assert (images.shape, images.dtype) == ((8, 3, data.SIZE, data.SIZE), torch.float32)
        found.append(images[images.mean((1, 2, 3)).argsort()])
    assert (found[0] - found[1]).abs().mean() < 0.02  # of values in -1..1
