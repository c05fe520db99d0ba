"""Backbones from a user's timm model: equal to it, independent of it, and saved with what builds it again."""

import json

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import fastalign as fa
from tests.backbones.helpers import SMALL, random_timm
from tests.numerics import relative_error

MODELS = {
    "vit_base_patch16_224": {"num_classes": 5},
    "vit_base_patch16_siglip_224.v2_webli": {"img_size": (32, 64)},
    "vit_base_patch14_reg4_dinov2": {"patch_size": 16, "init_values": None},
    "beit_base_patch16_224": {"num_classes": 0, "drop_path_rate": 0.3},
    "eva02_base_patch16_clip_224": {"num_classes": 0, "dynamic_img_size": True, "ref_feat_shape": (7, 7)},
    "naflexvit_base_patch16_siglip": {"num_classes": 0},
    "naflexvit_base_patch16_gap": {"num_classes": 5, "pos_embed_grid_size": [3, 5]},
    "vit_base_patch16_dinov3": {"num_classes": 0, "dynamic_img_size": False},
    "aimv2_large_patch14_224": {"num_classes": 0, "patch_size": 16},
    "deit_tiny_distilled_patch16_224": {"num_classes": 5},
    "vit_small_patch16_224": {
        **{"class_token": False, "global_pool": "avg", "qkv_bias": False, "qk_norm": True, "mlp_ratio": 2.5},
        **{"act_layer": "gelu_tanh", "reg_tokens": 2, "in_chans": 1},
        **{"init_values": 0.1, "no_embed_class": True},
    },
}


def finetuned(name: str = "vit_base_patch16_224", **kwargs) -> nn.Module:
    return random_timm(name, **{**SMALL, **kwargs})


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_equals_the_model_and_is_built_again_from_its_recipe(name, tmp_path):
    model = finetuned(name, **MODELS[name])
    vit = fa.create_backbone(model)
    images = torch.randn(2, *vit.patch_embed.image_shape)
    theirs, wanted = model(images), vit(images)
    assert relative_error(wanted, theirs) < 2e-6
    assert not vit.training

    recipe = json.loads(json.dumps(vit.recipe))
    again = fa.create_backbone(recipe["name"], **recipe["kwargs"]).eval()
    assert again.spec == vit.spec
    again.load_state_dict(vit.state_dict())
    assert torch.equal(again(images), wanted)

    student = fa.MaskEmbedStudent.from_backbone(vit).eval()
    fa.save_backbone(student, tmp_path)
    loaded = fa.load_backbone(tmp_path)
    assert torch.equal(loaded.forward_features(images), student.encoder.forward_features(images))
    assert (loaded.data, loaded.softcap, loaded.recipe["name"]) == (vit.data, 30.0, recipe["name"])
    with pytest.raises(fa.UserError, match=r"backbone\.json is not a directory; name another folder"):
        fa.save_backbone(student, tmp_path / "backbone.json")

    for parameter in vit.parameters():
        parameter.zero_()
    assert torch.equal(model(images), theirs)


def test_keeps_dtype_mode_and_preprocessing(tmp_path):
    model = finetuned(pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.3), "crop_pct": 0.7}).double().train()
    vit = fa.create_backbone(model)
    assert {value.dtype for value in vit.state_dict().values()} == {torch.float64}
    assert vit.training
    assert (vit.data["mean"], vit.data["crop_pct"]) == ([0.1, 0.2, 0.3], 0.7)
    fa.save_backbone(vit, tmp_path)
    assert fa.load_backbone(tmp_path).data == vit.data


@torch.no_grad()
def test_a_changed_backbone_is_saved_whole_or_not_at_all(tmp_path):
    """What a folder does not record is refused: `load_backbone` would build a backbone with other tokens."""
    for words, path, name, value in (
        (r"blocks\.1\.norm2\.eps is 0\.1, but 1e-06", "blocks.1.norm2", "eps", 0.1),
        (r"blocks\.0\.mlp\.act is ReLU, but GELU", "blocks.0.mlp", "act", nn.ReLU()),
        (r"blocks\.0\.forward is <built-in", "blocks.0", "forward", print),
    ):
        vit = fa.create_backbone("vit_base_patch16_224", **SMALL)
        setattr(vit.get_submodule(path), name, value)
        with pytest.raises(fa.UserError, match=f"save_backbone: {words}"):
            fa.save_backbone(vit, tmp_path)
    assert not list(tmp_path.iterdir())
    vit = fa.create_backbone("vit_base_patch16_224", **SMALL).eval()
    vit.norm.eps, vit.blocks[1] = (
        0.1,
        vit.blocks[0],
    )  # recorded; tied weights, of which safetensors takes copies only
    fa.save_backbone(vit, tmp_path)
    images = torch.randn(2, *vit.patch_embed.image_shape)
    assert torch.equal(fa.load_backbone(tmp_path).forward_features(images), vit.forward_features(images))


def edited(path: str, name: str, value) -> nn.Module:
    model = finetuned()
    setattr(model.get_submodule(path), name, value)
    return model


class Own(VisionTransformer):
    """A user's subclass."""


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: Own(**SMALL), r"Own is not supported: give"),
        (lambda: timm.create_model("resnet18"), r"ResNet is not supported: give"),
        (lambda: nn.DataParallel(finetuned()), r"DataParallel is not supported: give"),
        (lambda: torch.compile(finetuned()), r"OptimizedModule is not supported: .*not wrapped"),
        (lambda: fa.accelerate(finetuned()), r"attention is replaced: .* undo=True"),
        (
            lambda: edited("blocks.1", "forward", print),
            r"blocks\.1 has hooks or its own forward: remove them",
        ),
        (lambda: finetuned(attn_drop_rate=0.1), r"VisionTransformer with dropout is not supported"),
        (lambda: edited("norm", "eps", 0.1), r"with another epsilon in norm is not supported"),
        (lambda: edited("blocks.1.attn", "num_heads", 4), r"with blocks that differ is not supported"),
        (lambda: edited("blocks.1.mlp", "act", nn.ReLU()), r"with blocks that differ is not supported"),
    ],
)
def test_says_what_it_cannot_take(model, message):
    with pytest.raises(fa.UserError, match=message) as error:
        fa.create_backbone(model())
    assert "\n" not in str(error.value)


def test_takes_a_model_without_other_arguments():
    for options in ({"pretrained": True}, {"checkpoint": "a.pth"}, {"img_size": 64}):
        with pytest.raises(fa.UserError, match="no other arguments: build the model with them"):
            fa.create_backbone(finetuned(), **options)


@pytest.mark.parametrize(
    "model",
    [lambda: VisionTransformer(**SMALL), lambda: finetuned(norm_layer=nn.LayerNorm)],
    ids=["of no name", "of an argument that is not in JSON"],
)
def test_an_unknown_recipe_is_an_error_when_saving(model, tmp_path):
    """Not before: such a backbone trains."""
    vit = fa.create_backbone(model())
    student = fa.MaskEmbedStudent.from_backbone(vit)
    assert student.encoder.spec.block.softcap == 30.0
    with pytest.raises(fa.UserError, match="timm name and arguments are not known"):
        fa.save_backbone(student, tmp_path)
