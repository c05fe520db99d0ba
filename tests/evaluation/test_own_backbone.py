"""Everything that reads a run reads the folder of `fastalign.save_backbone` from one's own loop."""

import json

import pytest
import torch
from torch import nn

import fastalign as fa
from fastalign import classify, probe
from fastalign.config import Config
from fastalign.export.__main__ import main as export
from fastalign.report.__main__ import main as report
from fastalign.training.build import build_backbones
from tests.data_helpers import needs_dali
from tests.evaluation.helpers import KWARGS, NAME, classify_line, command_error, probe_line, results
from tests.numerics import randomise


@pytest.fixture
def student():
    made = fa.MaskEmbedStudent.from_backbone(fa.create_backbone(NAME, **KWARGS), softcap=0.5).eval()
    randomise(made, 0.2)
    return made


@pytest.fixture
def own(student, tmp_path):
    fa.save_backbone(student, tmp_path / "own", step=7, weights="pretrained")
    return tmp_path / "own"


@torch.no_grad()
def test_the_backbone_comes_back(student, own, tmp_path):
    """As it is, as the start of a run, from wrapped modules, and after it was saved again with other weights."""
    start = {"name": NAME, "kwargs": KWARGS, "weights": str(own)}
    found = [fa.load_backbone(own), build_backbones(Config(student=start))[0].eval()]
    for number, wrapped in enumerate((torch.compile(student), nn.DataParallel(student), student.encoder)):
        fa.save_backbone(wrapped, tmp_path / str(number))
        found.append(fa.load_backbone(tmp_path / str(number)))
    images = torch.randn(2, 3, 32, 32)
    wanted = student.encoder.forward_features(images)
    for vit in found:
        assert vit.softcap == 0.5
        assert torch.equal(vit.forward_features(images), wanted)
    randomise(student, 0.2)
    fa.save_backbone(student, own, step=7, weights="pretrained")
    assert torch.equal(fa.load_backbone(own).norm.weight, student.encoder.norm.weight)
    with pytest.raises(fa.UserError, match="save_backbone: softcap is recorded of the student"):
        fa.save_backbone(student, own, softcap=2.0)
    with pytest.raises(fa.UserError, match="save_backbone: got Linear; give a student"):
        fa.save_backbone(nn.Linear(2, 2), own)


@needs_dali
def test_the_commands(own, scenes, images, capsys):
    assert export([str(own), "--to", "timm"]) == 0
    found = json.loads((own / "exports" / "timm" / "fastalign.json").read_text())
    assert (found["step"], found["source"]["licence"], found["softcap"]["value"]) == (7, "apache-2.0", 0.5)
    assert report([str(own)]) == 0
    assert "before alignment is unknown" in capsys.readouterr().out
    assert probe.main(probe_line(scenes, "--heads", "linear", "--labels", "union", backbone=own)) == 0
    assert results(own / "probe.json")["results"][0]["model"] == "aligned"
    assert classify.main(classify_line(images, "--epochs", "1", backbone=own)) == 0
    assert results(own / "classify.json")["backbone"]["softcap"] == 0.5
    error = command_error(capsys, "probe", probe_line(scenes, "--before", backbone=own))
    assert "config.yaml is missing" in error
