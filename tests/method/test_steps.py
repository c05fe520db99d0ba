"""A step's properties: scale of targets, frozen teacher, checkpointing, compilation, bf16, bad arguments."""

import copy

import pytest
import torch

import fastalign as fa
from tests.method.helpers import SMALL, VIT, gradients, maskembed, tiny
from tests.numerics import gradient_error, needs_compiler, randomise, relative_error


def test_teacher_and_student_of_different_width_and_depth():
    teacher = fa.MaskedTeacher(fa.create_backbone("vit_small_patch16_224", img_size=32, depth=4))
    student = fa.MaskEmbedStudent.from_backbone(tiny(), target_dim=384)
    step = fa.MaskEmbed(teacher, student, fa.UniformMasks())
    images, ids = torch.randn(2, 3, 32, 32), torch.arange(2)
    assert teacher(images, step.masks(ids, 4)).shape == (2, 3, 5, 384)
    assert student.encoder(images).shape == (2, 5, 384)
    step(images, ids).backward()


def test_target_scale_gives_unit_variance_and_the_known_first_loss():
    vit = fa.create_backbone(VIT, img_size=64, depth=3)
    randomise(vit, 0.1)
    step = fa.MaskEmbed(fa.MaskedTeacher(vit), fa.MaskEmbedStudent.from_backbone(vit), fa.UniformMasks())
    batches = [(torch.randn(8, 3, 64, 64), torch.arange(8) + 8 * i) for i in range(3)]
    scale = step.set_target_scale(sum(step.target_moments(*batch, 0) for batch in batches))
    targets = torch.cat([step.targets(images, step.masks(ids, 16)) for images, ids in batches])
    assert (targets.double() * scale).var(correction=0).item() == pytest.approx(1, rel=1e-5)
    assert "target_scale" in step.state_dict()
    loss = step(*batches[0])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(4 / 3, abs=0.1)
    loss.backward()
    body = [p.grad for n, p in step.student.encoder.named_parameters() if not n.startswith("head")]
    assert all(grad is not None and not grad.any() for grad in body), "a zero head passes no gradient on"
    assert step.student.encoder.head.weight.grad.any()


def test_teacher_is_frozen_and_the_backbone_is_copied():
    vit = tiny(drop_path_rate=0.5)
    before = copy.deepcopy(vit.state_dict())
    teacher, student = fa.MaskedTeacher(vit), fa.MaskEmbedStudent.from_backbone(vit)
    step = fa.MaskEmbed(teacher, student, fa.UniformMasks()).train()
    assert not any(p.requires_grad for p in teacher.parameters())
    images, visible = torch.randn(2, 3, 32, 32), fa.UniformMasks()(torch.arange(2), 4)
    assert torch.equal(teacher(images, visible), teacher(images, visible)), "no dropout in a teacher"
    step(images, torch.arange(2)).backward()
    torch.optim.SGD(student.parameters(), 1.0).step()
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())


def test_gradient_checkpointing_changes_nothing():
    step = maskembed(tiny(depth=3))
    randomise(step.student)
    images, ids, found = torch.randn(2, 3, 32, 32), torch.arange(2), []
    for enabled in (False, True):
        step.zero_grad()
        step.student.encoder.grad_checkpointing = enabled
        step(images, ids).backward()
        found.append(gradients(step.student))
    assert gradient_error(found[1], found[0]) < 1e-6


@pytest.mark.slow
@needs_compiler
def test_blocks_of_one_kind_share_a_graph():
    """Compiled block by block, twice the depth compiles no more; each rate of stochastic depth has its own graph."""
    counts = {}
    for depth, drop_path in ((3, 0.0), (6, 0.0), (6, 0.1)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        step = maskembed(tiny(depth=depth, drop_path_rate=drop_path))
        randomise(step.student)
        images, ids = torch.randn(2, 3, 32, 32), torch.arange(2)
        wanted = step(images, ids)
        step.compile(blocks=True)
        found = step(images, ids)
        found.backward()
        assert drop_path or relative_error(found, wanted) < 1e-5
        counts[depth, drop_path] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert counts[3, 0.0] == counts[6, 0.0]
    assert counts[6, 0.1] > counts[6, 0.0]


def beit():
    return fa.create_backbone("beit_base_patch16_224", **SMALL)


def of_other(**kwargs):
    """MaskEmbed of a student whose tokens are not the teacher's."""
    student = fa.MaskEmbedStudent.from_backbone(tiny(**kwargs))
    return fa.MaskEmbed(fa.MaskedTeacher(tiny()), student, fa.UniformMasks())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda v: fa.MaskedTeacher(v, skip_blocks=2), "skip_blocks"),
        (lambda v: fa.MaskedTeacher(v, masking="dorp"), "masking must be 'zero' or 'drop', got 'dorp'"),
        (lambda v: fa.MaskedTeacher(v, skip_blocks=1, prefix_only=True), "skip_blocks=0"),
        (lambda v: fa.MaskedTeacher(v, 0, masking="drop", prefix_only=True), "prefix_only"),
        (lambda v: fa.MaskedTeacher(beit(), masking="drop"), "relative position bias"),
        (lambda v: fa.MaskEmbedStudent.from_backbone(v, head="conv"), "head"),
        (lambda v: fa.MaskEmbedStudent.from_backbone(v, decoder_heads=7), "decoder_heads"),
        (lambda v: fa.MaskEmbedStudent.from_backbone(v, softcap=-1.0), "softcap"),
        (lambda v: maskembed(v, target_dim=96), "target_dim"),
        (lambda v: of_other(img_size=48), "different patch grids"),
        (lambda v: of_other(reg_tokens=2), "prefix tokens"),
    ],
)
def test_bad_arguments_are_named(make, words):
    vit = tiny()
    with pytest.raises((ValueError, fa.UserError), match=words):
        make(vit)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_clip_quickgelu_224",
        "vit_base_patch14_reg4_dinov2",
        "vit_base_patch16_siglip_224",
        "beit_base_patch16_224",
        "eva02_base_patch16_clip_224",
        "aimv2_large_patch14_224",
        "eva02_tiny_patch14_224",
        "naflexvit_base_patch16_radio_v3",
        "vit_small_plus_patch16_dinov3_qkvb",
        "vit_base_patch16_rope_mixed_ape_224",
    ],
)
def test_each_family_in_bf16_autocast_is_close_and_one_graph(name, softcap):
    torch._dynamo.reset()
    vit = fa.create_backbone(name, **SMALL | {"img_size": 56 if "patch14" in name else 64})
    step = maskembed(vit, softcap=softcap)
    images, ids = torch.randn(2, 3, *vit.spec.image_size), torch.arange(2)
    loss = step(images, ids)
    with torch.autocast("cpu", torch.bfloat16):
        low = step(images.bfloat16(), ids)
        low.backward()
        explained = [
            torch._dynamo.explain(part)(images, step.masks(ids, 16)) for part in (step.student, step.teacher)
        ]
    assert low.dtype == torch.float32
    assert relative_error(low, loss) < 0.01
    assert [(each.graph_count, each.graph_break_count) for each in explained] == [(1, 0), (1, 0)]
