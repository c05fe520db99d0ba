"""The command: its PNGs, and every input that can be wrong."""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

import fastalign.report
from fastalign.report.probe import read_probe
from tests.report.helpers import probe_facts, refused, render


def test_pngs(run, tmp_path):
    (run / "probe.json").write_text(json.dumps(probe_facts()))
    pytest.importorskip("matplotlib")
    render(run, "--images", "2", "--pngs", str(tmp_path / "a"))
    render(run, "--images", "2", "--pngs", str(tmp_path / "b"))
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["curves.png", "patches.png", "probe.png"]
    for name in names:
        content = (tmp_path / "a" / name).read_bytes()
        assert content == (tmp_path / "b" / name).read_bytes()
        assert np.asarray(Image.open(io.BytesIO(content)).convert("L")).std() > 5
    (run / "backbone.json").unlink()
    (run / "probe.json").unlink()
    render(run, "--pngs", str(tmp_path / "c"))
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["curves.png"]


def test_folders_that_are_no_run(tmp_path, capsys):
    assert "there is no such folder" in refused(capsys, tmp_path / "nothing")
    assert "neither metrics.jsonl nor backbone.json" in refused(capsys, tmp_path)


def test_damaged_files_are_named(run, capsys):
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("{]\n" + whole)
    assert "metrics.jsonl, line 1 " in refused(capsys, run)
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe\n" + whole.encode())
    assert "metrics.jsonl, line 1 " in refused(capsys, run)
    (run / "metrics.jsonl").write_text(whole)
    (run / "backbone.json").write_text("[]")
    assert "backbone.json is damaged" in refused(capsys, run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda facts: facts.pop("summary"), "summary"),
        (lambda facts: facts["summary"].clear(), "summary"),
        (lambda facts: facts["results"][0].pop("test"), "results.0.test"),
        (lambda facts: facts["results"][0]["test"]["per_class"]["recall"].pop(), "per_class"),
        (lambda facts: facts["results"][0]["test"]["by_size"]["edges"].pop(), "by_size"),
        (
            lambda facts: facts["summary"][0]["test"]["macro_recall"].update(mean="good"),
            "summary.0.test.macro_recall",
        ),
    ],
)
def test_a_probe_of_another_format_is_refused(run, capsys, change, place):
    facts = probe_facts()
    change(facts)
    (run / "other.json").write_text(json.dumps(facts))
    said = refused(capsys, run, "--probe", run / "other.json")
    assert "other.json: " in said
    assert place in said


def test_a_probe_that_is_not_there_or_not_json(run, capsys):
    assert "no such file" in refused(capsys, run, "--probe", run / "gone.json")
    (run / "probe.json").write_text("{")
    assert "probe.json: Invalid JSON" in refused(capsys, run)


def test_a_probe_of_scores_alone_is_shown(run, tmp_path):
    facts = probe_facts() | {"results": []}
    (run / "probe.json").write_text(json.dumps(facts))
    page = render(run, "--images", "0", "--pngs", str(tmp_path / "pngs"))
    assert "55.0 ± 10.0" in page.text
    assert not page.all("rect")


def test_a_probe_with_less_than_usual_is_read(run):
    """Majority labels have no sizes; a score may be missing; another model's name is one, too."""
    facts = probe_facts()
    for row in facts["results"]:
        row["model"] = f"mine-{row['model']}"
        row["test"].pop("by_size")
        row["test"]["per_class"].pop("average_precision")
    for row in facts["summary"]:
        row |= {"model": f"mine-{row['model']}", "test": {"macro_recall": {"mean": None, "std": None}}}
    (run / "probe.json").write_text(json.dumps(facts))
    page = render(run, "--images", "0")
    assert "mine-aligned" in page.text
    assert not page.all("rect")
    assert read_probe(run / "probe.json").score("mine-before", ("union", "linear", "0"), "map") is None


def test_bad_arguments(run, tmp_path, capsys, monkeypatch):
    assert "--images -1" in refused(capsys, run, "--images", "-1")
    assert "it is no image file" in refused(capsys, run, "--images", tmp_path / "gone.jpg")
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    assert "bad.jpg is not an image" in refused(capsys, run, "--images", tmp_path / "bad.jpg")
    assert "it is a folder" in refused(capsys, run, "--output", tmp_path)
    assert "it is a file" in refused(capsys, run, "--images", "0", "--pngs", run / "config.yaml")
    for name in ("fastalign.report.pngs", "matplotlib", "matplotlib.figure"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(fastalign.report, "pngs", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "--pngs needs a package: pip install matplotlib" in refused(
        capsys, run, "--pngs", tmp_path / "out"
    )
