"""The command: what it refuses, replaces and publishes."""

import argparse
import errno
import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import fastalign as fa
from fastalign.export import hf
from fastalign.export.__main__ import main
from tests.export.helpers import FAMILIES, LOADERS, by_transformers, facts, images, small
from tests.numerics import randomise, relative_error
from tests.truth import CappedAttention


def test_a_model_that_differs_is_not_written(tmp_path, capsys):
    """Random weights feel that timm's epsilon of the final norm is another."""
    vit = fa.create_backbone(FAMILIES["dinov3"], **small("dinov3"))
    fa.save_backbone(fa.MaskEmbedStudent.from_backbone(vit), tmp_path)
    assert main([str(tmp_path), "--to", "timm"]) == 2
    assert "differs from ours by" in capsys.readouterr().err
    assert not list(tmp_path.glob("exports/*"))


def not_a_number(path: Path) -> None:
    weights = load_file(path)
    weights["norm.weight"][3] = float("nan")
    save_file(weights, path)


def keep(run: Path) -> None:
    pass


WEIGHTS = "--weights random --name vit_tiny_patch16_224"
BAD = [
    (shutil.rmtree, "RUN --to timm", "is not a directory"),
    (lambda run: (run / "backbone.json").unlink(), "RUN --to timm", "student.freeze writes none"),
    (lambda run: (run / "checkpoints/step-00000003.pt").write_bytes(b""), "RUN --to timm", "pt is damaged"),
    (lambda run: not_a_number(run / "backbone.safetensors"), "RUN --to timm", "norm.weight is not finite"),
    (lambda run: (run / "probe.json").write_text("{"), "RUN --to timm", "probe.json is damaged"),
    (lambda run: (run / "probe.json").write_text("[1]"), "RUN --to timm", "probe.json has no results of"),
    (keep, "RUN --to hf-siglip", "class_token is True, wanted False"),
    (keep, "RUN --to timm --output /tmp", "is not an export"),
    (keep, "RUN --to timm --images /no/images", "/no/images"),
    (keep, "RUN --to timm --output /dev/null/x", "/dev/null"),
    (keep, "RUN --to timm --weights a.pth", "--weights is for weights that are not a run"),
    (keep, "--to timm --weights a.pth", "give the folder of a run, or --weights FILE and --name TIMM_NAME"),
    (keep, "--to timm --weights /no/a.pth --name vit_tiny_patch16_224", "--weights=/no/a.pth: not found"),
    (keep, f"--to timm {WEIGHTS} --kwargs '{{depth: 1}}'", "--output: give"),
    (
        keep,
        f"--to hf-dinov2 {WEIGHTS} --kwargs '{{depth: 1, mlp_ratio: 2.5}}' --output RUN/exports/timm",
        "whole_mlp_ratio is False, wanted True",
    ),
]


@pytest.mark.parametrize(("damage", "line", "words"), BAD, ids=[words for _, _, words in BAD])
def test_bad_input_is_one_line_and_exit_code_2(damaged, capsys, damage, line, words):
    damage(damaged)
    assert main(shlex.split(line.replace("RUN", str(damaged)))) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastalign:")]
    assert len(error) == 1
    assert words in error[0]
    assert not list(damaged.glob("exports/*"))


def test_a_full_disk_is_named(damaged, capsys, monkeypatch):
    monkeypatch.setattr(Path, "write_text", Mock(side_effect=OSError(errno.ENOSPC, "full")))
    assert main([str(damaged), "--to", "timm"]) == 2
    assert f"{damaged}/exports/timm cannot be written (full): free some space" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "targets"), [("clip", ["timm", "hf-clip"]), ("siglip", ["timm", "hf-siglip"])]
)
@torch.no_grad()
def test_weights_that_are_not_a_run(tmp_path, family, targets):
    """A student's checkpoint of the authors' scripts; its head and decoder, and SigLIP's pooling, are left out."""
    name, kwargs = FAMILIES[family], small(family)
    model = timm.create_model(name, num_classes=0, **kwargs).eval()
    randomise(model, 0.2)
    student = {f"encoder.{key}": value for key, value in model.state_dict().items()}
    student |= {"encoder.head.weight": torch.ones(48, 48), "decoder.pos_embed": torch.ones(1, 5, 48)}
    arguments = argparse.Namespace(student_model=f"s{name}")
    torch.save({"state_dict": student, "args": arguments}, tmp_path / "model_best.pth.tar")
    line = ["--weights", str(tmp_path / "model_best.pth.tar"), "--name", name, "--kwargs", json.dumps(kwargs)]
    for block in model.blocks:
        block.attn = CappedAttention(block.attn, 0.5)
    wanted = model.double().forward_features(images(family).double())
    for target in targets:
        output = tmp_path / target
        assert main([*line, "--to", target, "--output", str(output)]) == 0
        assert facts(output)["softcap"]["value"] == 30, "recorded in the file"
        assert main([*line, "--softcap", "0.5", "--to", target, "--output", str(output)]) == 0
        found = LOADERS.get(target, by_transformers)(output, images(family), family)
        assert relative_error(found, wanted) < 1e-4, "timm's epsilon of the last norm"
    assert "started from | `model_best.pth.tar`" in (output / "README.md").read_text()


def test_a_library_that_is_not_installed(runs, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastalign.export.hf", None)
    assert main([str(runs("clip")), "--to", "hf-clip"]) == 2
    assert "pip install 'transformers>=5.20'" in capsys.readouterr().err


def test_loading_what_is_no_export(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(fa.UserError, match=r"config\.json: the model type is .*: give the folder"):
            hf.load_tower(folder)


def test_an_earlier_export_is_replaced_and_files_follow_the_umask(exported, tmp_path):
    before = os.umask(0o027)
    try:
        for target in ("hf-clip", "timm"):
            output = exported("clip", target)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in output.iterdir()} == {0o640}
    assert not (output / "preprocessor_config.json").exists()
    assert facts(output)["target"] == "timm"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
