"""The examples learn."""

import runpy
from itertools import repeat

import pytest
import timm
import torch
from torch.nn.functional import interpolate

import fastalign as fa
from tests.run_helpers import ROOT

TINY = {"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 2}


def images(steps: int):
    """The same eight smooth images again and again."""
    return repeat(interpolate(torch.randn(8, 3, 8, 8), size=64, mode="bilinear"), steps)


def example(name: str) -> dict:
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_clipself(softcap):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=32, **TINY)
    losses = list(example("clipself")["train"](model, images(20), lr=1e-3, softcap=softcap))
    assert losses[-1] < 0.2 * losses[0]
    assert model.blocks[0].attn.softcap == softcap


def test_mae():
    code = example("mae")
    vit = fa.create_backbone("vit_tiny_patch16_224", **TINY)
    mae = code["MAE"](vit, width=64, heads=2, depth=2)
    losses = list(code["train"](mae, images(60), lr=3e-3))
    # Predicting each patch's mean colour gives a loss of one: the decoder has learned more than that.
    assert losses[-1] < 0.99 < 1 < losses[0]


def test_maes_target_is_the_patches_own():
    code = example("mae")
    mae = code["MAE"](fa.create_backbone("vit_tiny_patch16_224", **TINY), width=64, heads=2, depth=1)
    pictures = torch.randn(2, 3, 64, 64)
    visible = mae.masks(torch.arange(2), mae.vit.spec.grid)[:, 0]
    mae.head = torch.nn.Module()
    mae.head.forward = lambda x: torch.zeros(2, 17, 768)
    rows = []
    for picture, seen in zip(pictures, visible, strict=True):
        for patch in (~seen).nonzero().flatten().tolist():
            y, x = divmod(patch, 4)
            piece = picture[:, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16]
            rows.append(((piece - piece.mean()) ** 2 / (piece.var(correction=0) + 1e-5)).mean())
    assert mae(pictures, torch.arange(2)).item() == pytest.approx(torch.stack(rows).mean().item(), rel=1e-4)


def test_dbot():
    vit = fa.create_backbone("vit_tiny_patch16_224", **TINY)
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    losses = list(example("dbot")["train"](vit, lambda: images(30), lr=1e-3))
    for stage in (0, 1):
        own = [loss for index, loss in losses if index == stage]
        assert len(own) == 30
        assert own[-1] < 0.9 * own[0]
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())


def test_the_notebook_runs(tmp_path):
    """With fewer pictures than it asks for."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "examples/quickstart.ipynb", as_version=4)
    sizes = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert sizes.source.startswith("images, epochs = 2000, 2")
    sizes.source = "images, epochs = 128, 1"
    for name in ("demo", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=place).execute()
    assert (tmp_path / "runs/quickstart/run/exports/timm/model.safetensors").is_file()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) == 1
