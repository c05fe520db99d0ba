"""The command: every input that can be wrong, and probes with less than usual."""

import json
import sys

import pytest

import fastalign.report
from tests.report.helpers import probe_facts, refused, render


def test_folders_without_a_run(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nothing"):
        assert "neither metrics.jsonl nor backbone.json" in refused(capsys, folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", '{]\n{"step": 1}\n', "metrics.jsonl, line 1 "),
        ("backbone.json", "[]", "backbone.json is damaged"),
        ("probe.json", "{", "probe.json has no results"),
        (
            "probe.json",
            '{"data": {"classes": []}, "summary": [], "results": []}',
            "probe.json has no results",
        ),
        ("probe.json", '{"data": {"classes": []}, "summary": [{"seeds": 1}]}', "probe.json has no results"),
        ("classify.json", "{}", "classify.json has no results"),
    ],
)
def test_damaged_files_are_named(run, capsys, name, content, message):
    (run / name).write_text(content)
    assert message in refused(capsys, run)
    assert not (run / "report.html").exists()


def test_bad_arguments(run, tmp_path, capsys, monkeypatch):
    cases = [
        (("--images", "-1"), "-1 cannot be read as an image"),
        (("--images", tmp_path / "gone.jpg"), "gone.jpg cannot be read as an image"),
        (("--output", tmp_path), "is a directory"),
        (("--images", "0", "--pngs", run / "config.yaml"), "config.yaml: File exists"),
        (("--probe", run / "gone.json"), "gone.json: no such file"),
    ]
    for arguments, message in cases:
        assert message in refused(capsys, run, *arguments)
    for name in ("fastalign.report.charts", "fastalign.report.page", "matplotlib"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(fastalign.report, "charts", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "figures need a package: pip install matplotlib" in refused(capsys, run)


def test_a_probe_with_less_than_usual_is_read(run):
    """Majority labels have no sizes; a score may be missing; models may have other names."""
    facts = probe_facts()
    for row in facts["results"]:
        row["model"] = f"mine-{row['model']}"
        del row["test"]["by_size"], row["test"]["per_class"]["average_precision"]
    for row in facts["summary"]:
        row |= {"model": f"mine-{row['model']}", "test": {"macro_recall": {"mean": None, "std": None}}}
    (run / "probe.json").write_text(json.dumps(facts))
    page = render(run, "--images", "0")
    assert "mine-aligned" in page.text
    assert "Recall by size" not in page.text
    assert "Recall, mine-aligned" in page.text
    assert "AP, mine-aligned" not in page.text
