"""The doctor's report: true about this machine, complete, and honest about failures."""

import re
from importlib import metadata
from pathlib import Path

import pytest

from fastalign import doctor, ops
from fastalign.ops import extension


def test_the_report_says_what_is_here(capsys, monkeypatch):
    monkeypatch.setattr(ops, "MODE", "0")
    monkeypatch.setitem(doctor.PACKAGES, "no-such-package", "for nothing")
    assert doctor.main([]) == 0
    report = capsys.readouterr().out
    for words in (
        f"torch: {metadata.version('torch')} (tested with 2.11.0 and ",
        "no-such-package: not installed (for nothing)",
        "eager PyTorch: FASTALIGN_KERNELS=0",
        extension.status(),
        "student, soft-capped: ",
        "flash_attn_4 is not installed (",
        "ok: a step on the cpu",
    ):
        assert words in report
    assert len(set(report.splitlines())) == len(report.splitlines())


def test_a_failing_step_is_reported_and_counts(capsys, monkeypatch):
    def fail(device):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(doctor, "smoke", fail)
    with pytest.raises(SystemExit, match="1"):
        doctor.main([])
    assert "FAILED on the cpu: RuntimeError: two\\nlines" in capsys.readouterr().out


def test_tested_versions_are_those_of_the_constraints():
    for position, file in enumerate(("constraints.txt", "constraints-newest.txt")):
        text = (Path(__file__).parents[1] / file).read_text()
        pinned = dict(re.findall(r"^(\S+)==([\d.]+)(?:$|; python_version >=)", text, re.M))
        for name, about in doctor.PACKAGES.items():
            if versions := re.findall(r"\d+(?:\.\d+)+", about):
                assert versions[min(position, len(versions) - 1)] == pinned[name]
