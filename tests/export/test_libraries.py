"""Exports, loaded back by each library's own classes, against timm's model with capped attention in float64."""

import json
import subprocess
import sys

import pytest
import torch

import fastalign as fa
from fastalign.export import measure
from fastalign.export.__main__ import main
from tests.export.helpers import FAMILIES, LOADERS, SMALL, by_transformers, facts, images, tokens, truth
from tests.numerics import randomise, relative_error

CASES = [
    (family, target, softcap)
    for family, fitting in {
        "clip": ("timm", "hf-clip", "prismatic"),
        "openclip": ("timm", "hf-clip"),
        "siglip": ("timm", "hf-siglip", "prismatic"),
        "dinov2": ("timm", "hf-dinov2"),
        "registers": ("timm", "hf-dinov2"),
        "dinov3": ("timm", "hf-dinov3"),
        "gated": ("hf-dinov3",),
        "vit": ("timm", "hf-dinov2"),
    }.items()
    for target in fitting
    for softcap in ("applied", "dropped", *(["none"] if family in ("clip", "siglip") else []))
]


@pytest.mark.parametrize(("family", "target", "softcap"), CASES, ids=["-".join(case) for case in CASES])
@torch.no_grad()
def test_each_library_gives_our_features(runs, tmp_path, capsys, family, target, softcap):
    folder, output = runs(family, None if softcap == "none" else 0.5), tmp_path / "export"
    options = ["--drop-softcap"] if softcap == "dropped" else []
    assert main([str(folder), "--to", target, "--output", str(output), *options]) == 0
    wanted = tokens(folder, family, 0.5 if softcap == "applied" else None)
    found = LOADERS.get(target, by_transformers)(output, images(family), family)
    prefix = facts(output)["read"]["prefix_tokens"]
    assert relative_error(found, wanted[:, prefix:] if target == "prismatic" else wanted) < 1e-5
    assert 0 <= facts(output)["parity"]["largest_relative_error"] < 1e-5
    assert "largest relative error" in capsys.readouterr().out
    card = (output / "README.md").read_text()
    assert f"# {FAMILIES[family]}, locality-aligned" in card
    assert "FOLDER" not in card
    kwargs = json.loads((folder / "backbone.json").read_text())["kwargs"]
    again = fa.create_backbone(FAMILIES[family], checkpoint=output, **kwargs).eval()
    assert again.softcap == (0.5 if softcap == "applied" else None)
    assert relative_error(again.forward_features(images(family)), wanted) < 1e-5
    if target.startswith("hf-"):
        assert again.norm.eps == fa.load_backbone(folder).norm.eps


def test_what_dropping_the_cap_changes(runs, exported, capsys):
    found = facts(exported("clip", "hf-clip", "--drop-softcap"))["softcap"]
    assert facts(exported("clip", "timm"))["softcap"] == {**found, "applied": True}, "measured in advance too"
    noise = measure.noise(fa.load_backbone(runs("clip"))).double()
    with torch.no_grad():
        plain, capped = (truth(runs("clip"), "clip", cap).forward_features(noise) for cap in (None, 0.5))
    assert (found["value"], found["applied"]) == (0.5, False)
    change = found["effect"]["noise"]
    assert change["relative_change"] == pytest.approx(relative_error(plain, capped), rel=1e-4)
    cosine = torch.cosine_similarity(plain, capped, dim=-1).min().item()
    assert change["lowest_cosine"] == pytest.approx(cosine, abs=1e-5)
    assert change["relative_change"] > 0.02
    said = capsys.readouterr()
    assert "soft-cap dropped: features change by" in said.out
    assert "measuring features\nwriting files for transformers\n" in said.err


@pytest.mark.slow
def test_timm_without_the_import_says_what_to_do(exported):
    code = f"import timm; timm.create_model('local-dir:{exported('clip', 'timm')}', pretrained=True)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "`import fastalign.export.timm_model` first, or export again with --drop-softcap" in last


@pytest.mark.parametrize(
    ("name", "softcap", "targets"),
    [
        ("beit_base_patch16_224", 0.5, ["timm", "onnx"]),
        ("eva02_base_patch16_clip_224", 0.5, ["timm", "onnx"]),
        (FAMILIES["clip"], 0.5, ["onnx"]),
        (FAMILIES["registers"], None, ["onnx"]),
    ],
)
@torch.no_grad()
def test_other_attention_and_graphs(tmp_path, name, softcap, targets):
    """Relative bias, rotary embedding, plain attention. The truth is our model, whose attention has its own tests."""
    vit = fa.create_backbone(name, **SMALL | ({"img_size": 28} if "patch14" in name else {})).eval()
    randomise(vit, 0.2)
    vit.softcap = softcap
    fa.save_backbone(vit, tmp_path)
    x = torch.randn(4, 3, *vit.spec.image_size)
    wanted = vit.forward_features(x)
    for target in targets:
        assert main([str(tmp_path), "--to", target]) == 0
        found = LOADERS[target](tmp_path / "exports" / target, x, "")
        assert relative_error(found, wanted) < 1e-5
    vit.softcap = None
    assert softcap is None or relative_error(vit.forward_features(x), wanted) > 1e-3, "the cap is felt"
