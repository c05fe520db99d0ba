"""Position tables resampled from the grid of their training to another, against timm's `set_input_size`."""

import json

import pytest
import safetensors.torch
import timm
import torch

import fastalign as fa
from fastalign.backbones.zoo import MOCO, from_timm
from fastalign.export import export
from fastalign.training.build import make_backbone, named_backbone
from tests.backbones.helpers import random_timm
from tests.numerics import relative_error

NARROW = {"depth": 1, "embed_dim": 64, "num_heads": 2}
FAMILIES = {
    "absolute": ("vit_tiny_patch16_224", {}),
    "CLIP": ("vit_base_patch16_clip_quickgelu_224", {}),
    "SigLIP": ("vit_base_patch16_siglip_224", {"global_pool": ""}),
    "DINOv2 with registers": ("vit_base_patch14_reg4_dinov2", {"patch_size": 16}),
    "relative": ("beit_base_patch16_224", {}),
    "rotary": ("eva02_base_patch16_clip_224", {}),
    "DINOv3": ("vit_small_patch16_dinov3_qkvb", {}),
    "Perception Encoder": ("vit_pe_spatial_base_patch16_512", {}),
    "mixed rope": ("vit_base_patch16_rope_mixed_ape_224", {}),
}
FLEXIBLE = {
    "NaFlexViT": ("naflexvit_base_patch16_siglip", {"global_pool": ""}),
    "NaFlexViT, aspect ratio kept": ("naflexvit_base_patch16_radio_v3", {}),
}
"""timm resamples their tables to each image."""
GRIDS = [((2, 8), (4, 2)), ((2, 8), (6, 6)), ((2, 8), (4, 4)), ((2, 4), (4, 4)), ((4, 4), (2, 8))]
"""From, to: fewer patches, more, as many in another shape, a number that is no square's, and back."""
BOUND = 1e-6


def pixels(grid: tuple[int, int]) -> tuple[int, int]:
    return grid[0] * 16, grid[1] * 16


def timm_model(name: str, grid: tuple[int, int], **kwargs):
    torch.manual_seed(grid[0])
    if "naflex" in name:
        kwargs = {"pos_embed_grid_size": grid, **kwargs}
    return random_timm(name, 0.1, img_size=pixels(grid), **NARROW, **kwargs)


def same(vit, model, grid: tuple[int, int], patch_size: int = 16) -> bool:
    """Whether our tokens are those of timm's model, resized by timm."""
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=pixels(grid), patch_size=patch_size)
    images = torch.randn(2, 3, *pixels(grid))
    found, wanted = vit.eval().forward_features(images), model.forward_features(images)
    return relative_error(found, wanted) < BOUND


def save_run(folder, model, name: str, kwargs: dict):
    """The files of a run that are read here."""
    folder.mkdir()
    facts = {"name": name, "kwargs": {"num_classes": 0, **NARROW, **kwargs}, "softcap": None}
    (folder / "backbone.json").write_text(json.dumps(facts))
    metadata = {"format": "pt", "facts": json.dumps(facts)}
    safetensors.torch.save_file(from_timm(model).state_dict(), folder / "backbone.safetensors", metadata)
    return folder


@pytest.mark.parametrize(("before", "after"), GRIDS)
@pytest.mark.parametrize("family", FAMILIES | FLEXIBLE)
def test_a_run_is_read_at_another_image_size(tmp_path, family, before, after):
    name, kwargs = (FAMILIES | FLEXIBLE)[family]
    model = timm_model(name, before, **kwargs)
    run = save_run(tmp_path / "run", model, name, {**kwargs, "img_size": pixels(before)})
    wanted = {"img_size": list(pixels(after))}
    found = [
        fa.load_backbone(run, **wanted),
        fa.create_backbone(name, checkpoint=run / "backbone.safetensors", **NARROW, **kwargs, **wanted),
        named_backbone(str(run), kwargs=str(wanted))[0],
        make_backbone("student.weights", name, str(run), wanted),
    ]
    assert all(same(vit, model, after) for vit in found)
    assert same(fa.load_backbone(run / "backbone.safetensors"), timm_model(name, before, **kwargs), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bare_file_is_of_a_square_grid(tmp_path, family):
    """Resampled to another shape with as many patches too; a table of no square has the grid asked for."""
    name, kwargs = FAMILIES[family]
    for before, after in (((4, 4), (2, 8)), ((4, 4), (3, 5)), ((2, 4), (2, 4))):
        model = timm_model(name, before, **kwargs)
        torch.save(model.state_dict(), tmp_path / "w.pth")
        options = {**NARROW, **kwargs, "img_size": pixels(after)}
        assert same(fa.create_backbone(name, checkpoint=tmp_path / "w.pth", **options), model, after)
    if family not in ("rotary", "DINOv3"):
        with pytest.raises(fa.UserError, match="positions are neither a square nor 4x4 patches"):
            fa.create_backbone(name, checkpoint=tmp_path / "w.pth", **{**options, "img_size": 64})


@pytest.mark.parametrize("family", FAMILIES)
def test_published_weights_are_resampled_from_their_native_grid(tmp_path, monkeypatch, family):
    """timm reads the file in the place of its download."""
    name, kwargs = FAMILIES[family]
    options = {**NARROW, **{key: value for key, value in kwargs.items() if key != "patch_size"}}
    torch.manual_seed(0)
    model = random_timm(name, 0.1, **options)
    torch.save(model.state_dict(), tmp_path / "published.pth")
    create = timm.create_model

    def local(*args, **given):
        overlay = {"file": str(tmp_path / "published.pth"), "custom_load": False, "num_classes": 0}
        return create(*args, **given, pretrained_cfg_overlay=overlay)

    monkeypatch.setattr(timm, "create_model", local)
    native = fa.create_backbone(name, pretrained=True, **options)
    assert native.spec.image_size == model.patch_embed.img_size
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in native.state_dict().items())
    vit = fa.create_backbone(name, pretrained=True, **options, img_size=(112, 448))
    assert same(vit, model, (7, 28), patch_size=model.patch_embed.patch_size[0])


@pytest.mark.parametrize("axes", ["learned", "factorized"])
def test_a_table_for_images_of_any_size_is_resampled_once(tmp_path, axes):
    """The file has timm's table, 6x4; what is saved has that of the backbone's grid, and timm reads it."""
    name, kwargs = "naflexvit_base_patch16_par_gap", {"pos_embed": axes, **NARROW}
    model = timm_model(name, (3, 5), pos_embed=axes, pos_embed_grid_size=(6, 4))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    for grid in ((4, 7), (5, 5)):
        vit = fa.create_backbone(name, checkpoint=tmp_path / "w.pth", **kwargs, img_size=pixels(grid))
        assert same(vit, model, grid)
        fa.save_backbone(vit, tmp_path / "run")
        folder, _ = export(tmp_path / "run", "timm", output=tmp_path / f"{grid}", images="synthetic:4")
        assert same(vit, timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), grid)
    assert same(fa.create_backbone(model), model, (3, 5))
    with pytest.raises(fa.UserError, match=r"proj\.weight"):
        fa.create_backbone(name, checkpoint=tmp_path / "w.pth", **kwargs, patch_size=8)


def test_an_export_to_timm_knows_its_grid_and_cap(tmp_path):
    name = "vit_tiny_patch16_224"
    model = timm_model(name, (2, 8))
    run = save_run(tmp_path / "run", model, name, {"img_size": pixels((2, 8))})
    facts = json.loads((run / "backbone.json").read_text()) | {"softcap": 7.0}
    (run / "backbone.json").write_text(json.dumps(facts))
    folder, _ = export(run, "timm", images="synthetic:4")
    vit = fa.create_backbone(name, checkpoint=folder / "model.safetensors", **NARROW, img_size=64)
    assert vit.softcap == 7.0
    vit.softcap = None
    assert same(vit, model, (4, 4))


def test_a_patch_size_is_resampled_too(tmp_path):
    model = timm_model("vit_tiny_patch16_224", (2, 8))
    run = save_run(tmp_path / "run", model, "vit_tiny_patch16_224", {"img_size": pixels((2, 8))})
    assert same(fa.load_backbone(run, patch_size=8, img_size=(32, 64)), model, (2, 4), patch_size=8)


def test_a_fixed_table_is_computed_for_the_new_grid(tmp_path, monkeypatch):
    """Also for the published checkpoint, whose head and second encoder are not read."""
    model = timm_model("vit_base_patch16_224", (2, 8))
    run = save_run(tmp_path / "run", model, MOCO, {"img_size": pixels((2, 8))})
    state = {f"module.base_encoder.{key}": value for key, value in model.state_dict().items()}
    state |= {"module.base_encoder.head.0.weight": torch.ones(8, 64)}
    state |= {key.replace("base", "momentum"): torch.zeros_like(value) for key, value in state.items()}
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save({"arch": "vit_base", "state_dict": state}, tmp_path / "hub/checkpoints/vit-b-300ep.pth.tar")
    fresh = fa.create_backbone(MOCO, img_size=96, **NARROW)
    published = fa.create_backbone(MOCO, pretrained=True, img_size=96, **NARROW)
    for vit in (fa.load_backbone(run, img_size=96), published):
        assert torch.equal(vit.pos_embed, fresh.pos_embed)
        assert not vit.pos_embed.requires_grad
        assert torch.equal(vit.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
