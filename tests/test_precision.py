"""The teacher's stored weights, against autocast with fp32 weights."""

import copy

import pytest
import torch
from torch import nn

import fastalign as fa
from tests.numerics import randomise

NARROW = {"embed_dim": 96, "num_heads": 3, "depth": 3}
SMALL = {"img_size": 48, **NARROW}
# timm's name and arguments, the teacher's options.
FAMILIES = {
    "plain": ("vit_tiny_patch16_224", SMALL, {}),
    "clip": ("vit_base_patch16_clip_quickgelu_224", SMALL, {}),
    "siglip": ("vit_base_patch16_siglip_224", SMALL, {}),
    "map pooling": ("vit_base_patch16_siglip_224", SMALL, {"skip_blocks": 0, "prefix_only": True}),
    "beit": ("beit_base_patch16_224", SMALL, {}),
    "eva": ("eva02_base_patch16_clip_224", SMALL, {}),
    "dinov2": ("vit_base_patch14_reg4_dinov2", {**SMALL, "img_size": 42}, {}),
    "qk norm": ("vit_tiny_patch16_224", {**SMALL, "qk_norm": True}, {}),
}
MODES = [
    (family, masking)
    for family in FAMILIES
    for masking in ("zero", "drop")
    if masking == "zero" or family not in ("beit", "map pooling")  # which go with zero only
]


def build(family: str, masking: str = "zero") -> tuple[fa.MaskedTeacher, torch.Tensor, torch.Tensor]:
    """A teacher with moved weights, images and masks."""
    name, kwargs, options = FAMILIES[family]
    vit = fa.create_backbone(name, **kwargs)
    randomise(vit)
    teacher = fa.MaskedTeacher(vit, masking=masking, **options)
    images = torch.randn(2, 3, *vit.spec.image_size)
    return teacher, images, fa.UniformMasks(seed=1)(torch.arange(2), vit.spec.grid, 0)


def autocast(teacher, *inputs):
    with torch.autocast("cpu", torch.bfloat16):
        return teacher(*inputs)


@pytest.mark.parametrize(("family", "masking"), MODES)
def test_bf16_weights_give_autocasts_bits(family, masking):
    teacher, images, visible = build(family, masking)
    stored = copy.deepcopy(teacher).store_as(torch.bfloat16)
    for inputs in ((images, visible), (images,)):
        assert torch.equal(autocast(stored, *inputs), autocast(teacher, *inputs))
    kept = {name for name, value in stored.named_parameters() if value.dtype == torch.float32}
    assert not any(isinstance(stored.get_submodule(name.rpartition(".")[0]), nn.Linear) for name in kept)
    assert all(word in " ".join(kept) for word in ("norm1.weight", "norm1.bias"))
    assert not any("q_bias" in name for name in kept)
    ours, theirs = (sum(p.nbytes for p in model.vit.blocks.parameters()) for model in (stored, teacher))
    assert ours < 0.6 * theirs


def test_the_backbone_and_the_student_keep_their_weights():
    vit = fa.create_backbone("vit_tiny_patch16_224", **SMALL)
    teacher, student = fa.MaskedTeacher(vit), fa.MaskEmbedStudent.from_backbone(vit)
    teacher.store_as(torch.bfloat16)
    for module in (vit, student):
        assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
