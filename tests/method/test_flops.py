"""The formula of operations against torch's own counter of the matrix products that really run."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastalign as fa
from fastalign.method.flops import flops_per_image

SMALL = {"img_size": 64, "depth": 3}
NARROW = {"embed_dim": 96, "num_heads": 3, "patch_size": 16}


def build(name="vit_tiny_patch16_224", mim=False, teacher=None, kwargs=None, **options):
    """A small objective."""
    vit = fa.create_backbone(name, **SMALL, **(kwargs or {}))
    if mim:
        student = fa.MIMStudent.from_backbone(vit)
        return fa.MaskedImageModeling(fa.MaskedTeacher(vit, 0), student, fa.UniformMasks())
    student = fa.MaskEmbedStudent.from_backbone(vit, **options)
    return fa.MaskEmbed(fa.MaskedTeacher(vit, **(teacher or {})), student, fa.UniformMasks(full=False))


CASES = {
    "maskembed": {},
    "swiglu": {"name": "eva02_base_patch16_clip_224", "softcap": None},
    "packed swiglu": {"name": "vit_giant_patch14_dinov2", "kwargs": NARROW},
    "aimv2": {"name": "aimv2_large_patch14_224", "kwargs": NARROW},
    "gated, registers": {"name": "vit_small_plus_patch16_dinov3", "softcap": None},
    "mixed rope": {"name": "vit_small_patch16_rope_mixed_ape_224"},
    "no prefix": {"name": "vit_base_patch16_siglip_224"},
    "mlp head": {"head": "mlp"},
    "narrow decoder": {"decoder_width": 96, "decoder_layers": 3},
    "frozen": {"freeze_encoder": True},
    "prefix only": {"prefix_only": True, "teacher": {"prefix_only": True, "skip_blocks": 0}},
    "masked image modeling": {"mim": True},
}


@pytest.mark.parametrize("case", CASES)
def test_formula_equals_the_counted_matrix_products(case):
    objective = build(**CASES[case])
    images = torch.randn(2, 3, 64, 64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        objective(images, torch.arange(2)).backward()
    assert flops_per_image(objective) == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "masking", "wanted"),
    [
        # 105.8 student + 96.7 teacher + 54.4 decoder
        ("vit_base_patch16_clip_quickgelu_224", "zero", 256.9e9),
        # packed lengths 2N + 3P, and the squares of uniformly many visible patches
        ("vit_base_patch16_clip_quickgelu_224", "drop", 205.9e9),
        ("vit_so400m_patch14_siglip_384", "drop", 3580e9),
    ],
)
def test_full_size_agrees_with_the_cost_model(name, masking, wanted):
    with torch.device("meta"):
        vit = fa.create_backbone(name)
        student = fa.MaskEmbedStudent.from_backbone(vit)
        objective = fa.MaskEmbed(fa.MaskedTeacher(vit, masking=masking), student, fa.UniformMasks())
    assert flops_per_image(objective) == pytest.approx(wanted, rel=0.005 if masking == "drop" else 0.003)
