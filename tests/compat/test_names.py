"""The names and signatures of the authors' package, and the backbones that they register with timm."""

import inspect

import pytest
import timm
import torch

import fastalign as fa
import fastalign.compat.locality_alignment as la
from fastalign.backbones.zoo import MOCO
from fastalign.compat.locality_alignment.backbones import svit
from fastalign.utils.errors import UserError
from tests import truth
from tests.compat.helpers import ONE, batch, make
from tests.numerics import relative_error

SIGNATURES = {
    "MaskLayer": "image_width, patch_size",
    "MaskEmbedDecoder": "embed_dim, num_heads, num_patch_tokens, num_prefix_tokens, output_size, num_layers, "
    "prefix_only=False, qkv_bias=False, qk_norm=False, init_values=None, norm_layer=LayerNorm, act_layer=GELU, "
    "mlp_layer=Mlp",
    "MaskEmbedStudent": "encoder, decoder",
    "TransformerPooling": "embed_dim, num_heads, num_tokens, num_layers",
    "UniformMaskSampler": "mask_size, antithetical_sampling=True, include_null=True",
    "BernoulliMaskSampler": "mask_size, mask_ratio=0.5, antithetical_sampling=True, include_null=True",
    "BlockwiseMaskSampler": "mask_size, target_ratio=0.4, antithetical_sampling=True, include_null=True",
    "convert_to_teacher_model": "model, skip_blocks=0, prefix_only=False",
    "convert_to_mim_teacher_model": "model",
    "convert_to_student_model": "model, output_dim, output_head=linear",
    "convert_to_mim_student_model": "model, output_dim, output_head=linear",
    "load_checkpoint": "model, checkpoint_path, use_ema=True, device=cpu, strict=True, filter_fn=None",
    "load_checkpoint_auto": "model, checkpoint_path, use_ema=True, device=cpu, strict=True",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    found = [
        p.name if p.default is p.empty else f"{p.name}={getattr(p.default, '__name__', p.default)}"
        for p in inspect.signature(getattr(la, name)).parameters.values()
    ]
    assert ", ".join(found) == SIGNATURES[name]


@pytest.mark.parametrize("name", svit.NAMES)
def test_svit_models(name):
    with torch.device("meta"):
        model = timm.create_model(f"s{name}", depth=1, num_classes=0, max_attn_val=7.0)
        plain = timm.create_model(name, depth=1, num_classes=0)
    assert len(svit.NAMES) == 14
    assert model.blocks[0].attn.softcap == 7.0
    shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in (model, plain)]
    assert shapes[0] == shapes[1]
    assert getattr(svit, f"s{name}").__name__ == f"s{name}"


def test_svit_takes_timms_tags():
    with torch.device("meta"):
        model = timm.create_model("svit_base_patch16_clip_quickgelu_224.openai", depth=1)
    assert model.pretrained_cfg["tag"] == "openai"
    assert model.blocks[0].attn.softcap == 30.0
    with pytest.raises(UserError, match="max_attn_val"):
        timm.create_model("svit_base_patch16_224", max_attn_val=0.0)


def test_capped_features_differ_from_plain_ones_and_equal_the_truth():
    model, plain = make(f"s{ONE}", max_attn_val=0.05).eval(), make(ONE).eval()
    plain.load_state_dict(model.state_dict())
    images = batch(model)[0]
    uncapped = plain.forward_features(images)
    for block in plain.blocks:
        block.attn = truth.CappedAttention(block.attn, 0.05)
    assert relative_error(model.forward_features(images), plain.forward_features(images)) < 1e-12
    assert relative_error(model.forward_features(images), uncapped) > 1e-3


def test_moco_is_registered():
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model("vit_base_patch16_mocov3_224.other")
    model = timm.create_model("vit_base_patch16_mocov3_224", img_size=32, depth=1, num_classes=0)
    assert torch.equal(model.pos_embed, fa.create_backbone(MOCO, img_size=32, depth=1).pos_embed)
    assert not model.pos_embed.requires_grad
    assert model.pretrained_cfg["crop_pct"] == 0.875
    assert type(model.norm)(8).eps == 1e-5  # torch's, from which the authors make the student's norm
    assert timm.data.resolve_model_data_config(model)["mean"] == (0.485, 0.456, 0.406)
