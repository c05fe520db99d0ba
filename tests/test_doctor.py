"""The doctor's report: true about this machine, complete, and honest about failures."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from fastalign import doctor, ops
from fastalign.ops import extension


def test_the_report_says_what_is_here(capsys):
    assert doctor.main([]) == 0
    report = capsys.readouterr().out
    for words in (
        torch.__version__,
        "nvidia-dali-cuda",
        extension.status(),
        "ok: a step on the cpu",
        "optional",
        "student, soft-capped: ",
        "not installed: ",
    ):
        assert words in report
    assert len(set(report.splitlines())) == len(report.splitlines())


def test_a_failing_step_is_reported_and_counts(capsys, monkeypatch):
    def fail(device):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(doctor, "smoke", fail)
    assert doctor.main([]) == 1
    assert "FAILED on the cpu: RuntimeError: two\\nlines" in capsys.readouterr().out


def test_another_project_under_a_known_name_is_recognised(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert any(line.startswith("wandb: another project") for line in doctor.optional())


def test_tested_versions_are_those_of_the_constraints():
    for position, file in enumerate(("constraints.txt", "constraints-newest.txt")):
        text = (Path(__file__).parents[1] / file).read_text()
        pinned = dict(re.findall(r"^(\S+)==([\d.]+)(?:$|; python_version >=)", text, re.M))
        assert {name: both[position] for name, both in doctor.TESTED.items()}.items() <= pinned.items()


def test_a_version_newer_than_tested_is_named(monkeypatch):
    found = {"torch": "2.15.0+cu130", "torchvision": "0.29.1+cu130", "triton": "3.10.0", "timm": "1.0.9"}
    monkeypatch.setattr(doctor, "version", found.get)
    stack, *newer = doctor.tested()
    assert "torch 2.11.0 and 2.14.1, " in stack
    assert [line.partition(" is newer")[0] for line in newer] == ["torch 2.15.0", "triton 3.10.0"]


def test_kernels_switched_off_are_named(monkeypatch):
    monkeypatch.setattr(ops, "MODE", "0")
    assert any("eager PyTorch: FASTALIGN_KERNELS=0" in line for line in doctor.operations())


def test_missing_dali(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: "1.0" if name == "nvidia-dali" else None)
    assert "missing: pip install nvidia-dali-cuda130" in doctor.machine()[-1]


def test_a_gpu_without_the_extension_gets_advice(monkeypatch):
    gpu = SimpleNamespace(name="Some GPU", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(extension, "available", lambda device: device.type == "cpu")
    assert "GPU 0: Some GPU, sm_90, 80 GiB" in doctor.machine()
    assert any("install the CUDA toolkit" in line for line in doctor.operations())
