"""Every benchmark runs, at a tiny size, so that none is ever broken."""

import pytest
import torch

import fastalign as fa
from benchmarks import data, masks, profile, record, step
from benchmarks.baseline import Baseline
from tests.numerics import gradient_error, randomise, relative_error


@pytest.fixture(autouse=True)
def _results(tmp_path, monkeypatch):
    """Nothing is read from or left among the real results."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)


def test_step(capsys):
    rows = step.main(["--tiny"])
    assert [row["implementation"] for row in rows] == ["zero", "baseline"]
    assert all(row["images_per_second"] > 0 for row in rows)
    assert "images/s" in capsys.readouterr().out


def test_ratios_on_a_cpu():
    rows = step.main(["--ratios", "--tiny"])
    assert rows[0]["speedup_over_baseline"] > 0
    assert rows[1]["speedup_over_zero"] > 0


def test_masks():
    assert masks.main(["--tiny"]) is not None


def test_data():
    rows = data.main(["--tiny", "--needs", "100"])
    assert [row["source"] for row in rows] == ["folder", "tar"]
    assert all(row["images_per_second"] > 0 and row["threads_needed"] >= 1 for row in rows)


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
