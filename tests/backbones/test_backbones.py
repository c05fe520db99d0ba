"""Backbones against timm's on random weights, and bad input."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import fastalign as fa
from benchmarks.parity import BACKBONES, measure
from fastalign.backbones.zoo import MOCO
from tests.numerics import relative_error

VIT, ROPE = "vit_tiny_patch16_224", "vit_base_patch16_rope_224"
VARIANTS = {
    "registers": (VIT, {"img_size": 64, "reg_tokens": 3}),
    "registers without position": (VIT, {"img_size": 64, "reg_tokens": 3, "no_embed_class": True}),
    "qk norm": (VIT, {"img_size": 64, "qk_norm": True}),
    "layer scale": (VIT, {"img_size": 64, "init_values": 0.1}),
    "no qkv bias": (VIT, {"img_size": 64, "qkv_bias": False}),
    "average pooling": (VIT, {"img_size": 64, "global_pool": "avg"}),
    "maximum pooling": (VIT, {"img_size": 64, "global_pool": "max"}),
    "no class token": (VIT, {"img_size": 64, "class_token": False, "global_pool": "avg"}),
    "two classifiers": ("deit_tiny_distilled_patch16_224", {"img_size": 64, "num_classes": 7}),
    "residual pooling": (VIT, {"img_size": 64, "global_pool": "prr"}),
    "any image size": (VIT, {"img_size": (32, 48), "dynamic_img_size": True}),
    "naflex of a vit": ("vit_base_patch16_clip_224", {"img_size": 64, "use_naflex": True}),
}


@pytest.mark.parametrize("variant", [*BACKBONES, *VARIANTS])
def test_tokens_output_and_gradient_equal_timm(variant):
    name, kwargs = VARIANTS.get(variant, (variant, {}))
    errors = measure(name, **{"images": 2} if kwargs else {}, depth=3, **kwargs)
    assert max(errors.values()) < 1e-5, errors


def test_moco_position_table_is_the_published_formula():
    vit = fa.create_backbone(MOCO, depth=1)
    assert not vit.pos_embed.requires_grad
    table = np.zeros((197, 768))
    for patch in range(196):
        first, second = divmod(patch, 14)
        omega = 1 / 10000 ** (np.arange(192) / 192)
        angles = np.concatenate([first * omega, first * omega, second * omega, second * omega])
        table[1 + patch] = np.where(np.arange(768) // 192 % 2 == 0, np.sin(angles), np.cos(angles))
    assert relative_error(vit.pos_embed[0], torch.from_numpy(table)) < 1e-6


def test_a_fresh_norm_has_the_default_epsilon_of_the_backbones_norm_class():
    """As the authors' `type(norm)(width)` gives it: timm's is 1e-6, torch's, which MoCo-v3 is made of, 1e-5."""
    for name, eps in {MOCO: 1e-5, "vit_base_patch16_clip_quickgelu_224": 1e-6}.items():
        vit = fa.create_backbone(name, img_size=32, depth=1)
        assert fa.MaskEmbedStudent.from_backbone(vit).encoder.norm.eps == eps


def test_a_frozen_backbone_stays_in_evaluation_mode_in_a_module_in_training():
    """No stochastic depth: two passes of the same images give the same tokens, those of the backbone itself."""
    vit = fa.create_backbone(VIT, img_size=32, depth=3, drop_path_rate=0.5)
    assert [getattr(block.drop_path, "drop_prob", 0) for block in vit.blocks] == pytest.approx([0, 0.25, 0.5])
    student = fa.MaskEmbedStudent.from_backbone(vit, freeze_encoder=True, softcap=None)
    teacher, images = fa.MaskedTeacher(vit, skip_blocks=0), torch.randn(4, 3, 32, 32)
    wanted = vit.eval().forward_features(images)
    nn.ModuleList([student, teacher]).train()
    assert student.decoder.training
    for encoder in (student.encoder, teacher.vit):
        assert torch.equal(encoder.forward_features(images), wanted)
        assert not any(p.requires_grad for p in encoder.parameters())
    trained = fa.MaskEmbedStudent.from_backbone(student.encoder).train().encoder
    assert all(module.training for module in trained.modules())
    assert all(parameter.requires_grad for parameter in trained.parameters())


def test_timm_reads_the_preprocessing_of_a_backbone(tmp_path):
    """Constants of the weights, not of ImageNet, and the image size that was asked for."""
    name, kwargs = "vit_base_patch16_clip_quickgelu_224.openai", {"depth": 1, "img_size": (48, 80)}
    theirs = timm.create_model(name, num_classes=0, **kwargs)
    save_file(theirs.state_dict(), tmp_path / "backbone.safetensors")
    facts = {"name": name, "kwargs": {"num_classes": 0, **kwargs}, "softcap": None}
    (tmp_path / "backbone.json").write_text(json.dumps(facts))
    vit = fa.load_backbone(tmp_path)
    assert not any(module.training for module in vit.modules())
    wanted = timm.data.resolve_model_data_config(theirs) | {"input_size": (3, 48, 80)}
    found = timm.data.resolve_model_data_config(vit)
    assert {key: tuple(v) if isinstance(v, list) else v for key, v in found.items()} == wanted
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8))
    pixels = fa.transform(vit)(image)
    assert torch.equal(pixels, timm.data.create_transform(**wanted, is_training=False)(image))
    assert vit(pixels[None]).shape == (1, 768)
    for call in (vit, vit.forward_features, lambda x: vit.embed_masked(x, torch.ones(1, 1, 15))):
        with pytest.raises(ValueError, match=r"are \[1, 3, 80, 48\], .* takes \[B, 3, 48, 80\]: .*img_size"):
            call(pixels.mT[None])


BAD_INPUT = {
    "a wrong name": ("vit_base_patch61_224", {}, ["unknown backbone", "vit_base_patch16_224"]),
    "part of a name": ("vit_tiny", {}, ["the nearest is vit_tiny_patch16_"]),
    "another family": ("resnet50", {}, ["ResNet", "VisionTransformer"]),
    "a wrong tag": (f"{VIT}.foo", {}, ["Invalid pretrained tag (foo)", "correct its tag"]),
    "a wrong argument": (VIT, {"depht": 3}, ["unexpected keyword argument 'depht'", "kwargs {"]),
    "an unsupported part": ("vit_base_patch16_18x2_224", {}, ["ParallelThingsBlock is not supported"]),
    "padded images": ("vit_small_patch16_dinov3", {"dynamic_img_pad": True}, ["padded images"]),
    "dropped patches": ("vit_small_patch16_dinov3", {"patch_drop_rate": 0.5}, ["PatchDropoutWithIndices"]),
    "grouped heads": (ROPE, {"qkv_fused": False, "num_kv_heads": 3}, ["grouped heads"]),
    "another rope": (ROPE, {"rope_type": "mrope", "rope_grid_indexing": "ij"}, ["RotaryEmbeddingMRope"]),
    "no name": (None, {}, ["unknown backbone None"]),
    "too much stochastic depth": (VIT, {"drop_path_rate": 2}, ["drop_path_rate must be less than 1"]),
    "a wrong size": (VIT, {"img_size": [48, 50]}, ["img_size 50", "use 48"]),
    "no file": (VIT, {"checkpoint": "none.pth"}, ["none.pth"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_line(case):
    name, kwargs, words = BAD_INPUT[case]
    with pytest.raises(fa.UserError) as caught:
        fa.create_backbone(name, **kwargs)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)
