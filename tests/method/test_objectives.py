"""MaskEmbed and masked image modeling against an independent computation with timm modules, in float64."""

import copy

import pytest
import timm
import torch

import fastalign as fa
from fastalign.ops.reference import LOSSES, reconstruction_loss
from tests.numerics import gradient_error, needs_compiler, randomise, relative_error
from tests.truth import CappedAttention, StudentTruth, blank_pixels, loss_truth, teacher_targets

EXACT = 1e-10

NARROW = {"embed_dim": 96, "num_heads": 3, "depth": 3}
SMALL = {"img_size": 32, **NARROW}
# timm's name and arguments, the student's options, the teacher's options.
CASES = {
    "plain": ("vit_tiny_patch16_224", {**SMALL, "img_size": 48}, {}, {}),
    "no cap": ("vit_tiny_patch16_224", SMALL, {"softcap": None}, {}),
    "small cap": ("vit_tiny_patch16_224", SMALL, {"softcap": 0.5}, {}),
    "skip 0": ("vit_tiny_patch16_224", SMALL, {}, {"skip_blocks": 0}),
    "skip 2": ("vit_tiny_patch16_224", SMALL, {}, {"skip_blocks": 2}),
    "clip": ("vit_base_patch16_clip_quickgelu_224", SMALL, {}, {}),
    "siglip": ("vit_base_patch16_siglip_224", SMALL, {}, {}),
    "so400m": ("vit_so400m_patch14_siglip_224", {**SMALL, "img_size": 28}, {}, {}),
    "dinov2": ("vit_base_patch14_reg4_dinov2", {**SMALL, "img_size": 28}, {}, {}),
    "beit": ("beit_base_patch16_224", SMALL, {"softcap": None, "decoder_qk_norm": False}, {}),
    "eva": ("eva02_base_patch16_clip_224", SMALL, {"softcap": None}, {}),
    "mlp head": ("vit_tiny_patch16_224", SMALL, {"head": "mlp"}, {}),
    "deep decoder": (
        "vit_tiny_patch16_224",
        SMALL,
        {"decoder_layers": 3, "decoder_width": 64, "decoder_heads": 4, "decoder_init_values": None},
        {},
    ),
    "no decoder blocks": ("vit_tiny_patch16_224", SMALL, {"decoder_layers": 0}, {}),
    "decoder qk norm": (
        "vit_tiny_patch16_224",
        SMALL,
        {"decoder_qk_norm": True, "decoder_qkv_bias": False},
        {},
    ),
    "student qk norm": ("vit_tiny_patch16_224", {**SMALL, "qk_norm": True}, {}, {}),
    "frozen": ("vit_tiny_patch16_224", SMALL, {"freeze_encoder": True}, {}),
    "prefix only": (
        "vit_tiny_patch16_224",
        SMALL,
        {"prefix_only": True},
        {"skip_blocks": 0, "prefix_only": True},
    ),
}


def build(case: str, loss: str = "mse", scale: float = 1.0):
    """Our objective and the truth's parts, with the same random weights, in float64."""
    name, kwargs, student_options, teacher_options = CASES[case]
    backbone = timm.create_model(name, num_classes=0, **kwargs).double().eval()
    randomise(backbone)
    vit = fa.create_backbone(name, **kwargs).double()
    vit.load_state_dict(backbone.state_dict())
    teacher = fa.MaskedTeacher(vit, **teacher_options)
    student = fa.MaskEmbedStudent.from_backbone(vit, **student_options).double()
    objective = fa.MaskEmbed(teacher, student, fa.UniformMasks(seed=1), loss=loss).double()
    objective.target_scale.fill_(scale)
    randomise(student.decoder), randomise(student.encoder.head)
    options = dict(student_options)
    renamed = {
        "softcap": "cap",
        "freeze_encoder": "frozen",
        "decoder_width": "width",
        "decoder_layers": "layers",
    }
    renamed["decoder_init_values"] = "init_values"
    options = {renamed.get(key, key): value for key, value in {"softcap": 30.0, **options}.items()}
    truth = StudentTruth(name, target_dim=vit.embed_dim, **options, **kwargs).double()
    truth.load_state_dict(student.state_dict())
    return objective, backbone, truth, teacher_options


@pytest.mark.parametrize("case", CASES)
def test_targets_tokens_predictions_loss_and_gradients(case):
    objective, backbone, truth, teacher_options = build(case, scale=1.7)
    size = objective.teacher.spec.image_size
    images, ids = torch.randn(2, 3, *size, dtype=torch.float64), torch.tensor([3, 8])
    visible = objective.masks(ids, objective.teacher.spec.grid, 0)
    if teacher_options.get("prefix_only"):
        wanted = teacher_targets_pooled(backbone, images, visible)
    else:
        wanted = teacher_targets(backbone, images, visible, teacher_options.get("skip_blocks", 1))
    assert relative_error(objective.teacher(images, visible), wanted) < EXACT
    assert relative_error(objective.student.encoder(images), truth.encoder(images)) < EXACT
    predictions = truth(images, visible)
    assert relative_error(objective.student(images, visible), predictions) < EXACT
    loss, true_loss = objective(images, ids), loss_truth("mse", predictions, 1.7 * wanted, visible)
    assert relative_error(loss, true_loss) < EXACT
    loss.backward()
    trained = {name for name, p in objective.student.named_parameters() if p.requires_grad}
    torch.autograd.backward(true_loss, inputs=[p for name, p in truth.named_parameters() if name in trained])
    ours = {n: p.grad for n, p in objective.student.named_parameters() if p.grad is not None}
    theirs = {n: p.grad for n, p in truth.named_parameters() if p.grad is not None}
    assert gradient_error(ours, theirs) < 1e-8


def teacher_targets_pooled(backbone, images, visible):
    """[B, M, 1, D]: the class output of the whole model for each masked image."""
    patch = backbone.patch_embed.patch_size[0]
    rows = [
        torch.cat([backbone(blank_pixels(image, mask, patch)[None]) for mask in masks])
        for image, masks in zip(images, visible, strict=True)
    ]
    return torch.stack(rows).unsqueeze(2).detach()


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_of_maskembed(loss):
    objective, backbone, truth, _ = build("plain", loss=loss)
    images, ids = torch.randn(2, 3, 48, 48, dtype=torch.float64), torch.tensor([0, 5])
    visible = objective.masks(ids, objective.teacher.spec.grid, 0)
    wanted = loss_truth(loss, truth(images, visible), teacher_targets(backbone, images, visible, 1), visible)
    found = objective(images, ids)
    assert relative_error(found, wanted) < EXACT
    found.backward(), wanted.backward()
    ours = {n: p.grad for n, p in objective.student.named_parameters()}
    assert gradient_error(ours, {n: p.grad for n, p in truth.named_parameters()}) < 1e-8


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_masked_image_modeling(loss, softcap):
    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=2).double().eval()
    randomise(backbone)
    vit = fa.create_backbone("vit_tiny_patch16_224", img_size=32, depth=2).double()
    vit.load_state_dict(backbone.state_dict())
    student = fa.MIMStudent.from_backbone(vit, softcap=softcap).double()
    randomise(student)
    teacher = fa.MaskedTeacher(vit, skip_blocks=0)
    objective = fa.MaskedImageModeling(teacher, student, fa.UniformMasks(), loss).double()
    images, ids = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 4])
    visible = objective.masks(ids, objective.teacher.spec.grid, 0)
    truth = copy.deepcopy(backbone)
    truth.norm, truth.head, truth.global_pool = (
        type(truth.norm)(192).double(),
        torch.nn.Linear(192, 192).double(),
        "",
    )
    if softcap:
        for block in truth.blocks:
            block.attn = CappedAttention(block.attn, softcap)
    truth.load_state_dict(student.encoder.state_dict())
    blanked = [
        [blank_pixels(image, mask, 16) for mask in masks]
        for image, masks in zip(images, visible, strict=True)
    ]
    predictions = torch.stack([truth(torch.stack(copies)) for copies in blanked])
    targets = backbone.forward_features(images)[:, None].expand_as(predictions).detach()
    wanted = loss_truth(loss, predictions, targets, visible, prefix_hidden=False)
    found = objective(images, ids)
    assert relative_error(found, wanted) < EXACT
    found.backward(), wanted.backward()
    ours = {n: p.grad for n, p in student.encoder.named_parameters()}
    assert gradient_error(ours, {n: p.grad for n, p in truth.named_parameters()}) < 1e-8


def test_teacher_and_student_of_different_width_and_depth():
    teacher = fa.MaskedTeacher(fa.create_backbone("vit_small_patch16_224", img_size=32, depth=4))
    backbone = fa.create_backbone("vit_tiny_patch16_224", img_size=32, depth=2)
    student = fa.MaskEmbedStudent.from_backbone(backbone, target_dim=384)
    step = fa.MaskEmbed(teacher, student, fa.UniformMasks())
    images, ids = torch.randn(2, 3, 32, 32), torch.arange(2)
    assert teacher(images, step.masks(ids, 4)).shape == (2, 3, 5, 384)
    assert student.encoder(images).shape == (2, 5, 384)
    step(images, ids).backward()


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_base_patch16_clip_224", "vit_base_patch16_siglip_224", "patch norm"]
)
def test_selecting_tokens_equals_blanking_pixels(name):
    """For patch embeddings with a bias, without one, and with a norm; images with a remainder too."""
    kwargs = {"embed_norm_layer": "layernorm"} if name == "patch norm" else {}
    name = "vit_tiny_patch16_224" if name == "patch norm" else name
    model = (
        timm.create_model(name, num_classes=0, img_size=50 if kwargs else 48, depth=1, **kwargs)
        .double()
        .eval()
    )
    randomise(model)
    from fastalign.backbones.zoo import from_timm

    teacher = fa.MaskedTeacher(from_timm(copy.deepcopy(model)), skip_blocks=0)
    images = torch.randn(2, 3, *teacher.spec.image_size, dtype=torch.float64)
    visible = fa.UniformMasks()(torch.arange(2), 9)
    assert relative_error(teacher(images, visible), teacher_targets(model, images, visible, 0)) < EXACT


@pytest.mark.parametrize("case", [*CASES, "norm of patches"])
def test_one_patch_embedding_for_all_copies_equals_every_copy_by_itself(case):
    """A copy by itself: its pixels blanked and embedded."""
    objective, *_ = build("plain" if case == "norm of patches" else case)
    teacher = objective.teacher
    if case == "norm of patches":
        teacher.vit.patch_embed.norm = torch.nn.LayerNorm(teacher.embed_dim).double()
        randomise(teacher.vit.patch_embed)
    images, ids = torch.randn(2, 3, *teacher.spec.image_size, dtype=torch.float64), torch.tensor([3, 8])
    visible = objective.masks(ids, objective.teacher.spec.grid, 0)
    visible[1, 1] = False
    found = teacher(images, visible)
    for image, masks, targets in zip(images, visible, found, strict=True):
        copies = torch.stack([blank_pixels(image, mask, teacher.spec.patch_size[0]) for mask in masks])
        assert relative_error(targets, teacher(copies).squeeze(1)) < 1e-12


@pytest.mark.parametrize("visible", [torch.ones(2, 3, 5) > 0, torch.ones(1, 3, 4) > 0, torch.ones(2, 3, 4)])
def test_masks_that_do_not_fit_are_named(visible):
    with pytest.raises(ValueError, match=r"visible must be bool \[B = 2, M, N = 4\]"):
        fa.MaskedTeacher(tiny())(torch.randn(2, 3, 32, 32), visible)


def test_target_scale_gives_unit_variance_and_the_known_first_loss():
    vit = fa.create_backbone("vit_tiny_patch16_224", img_size=64, depth=3)
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
    assert all(grad is not None and not grad.any() for grad in body), "a zero head lets none through"
    assert step.student.encoder.head.weight.grad.any()


def test_teacher_is_frozen_and_the_backbone_is_copied():
    vit = fa.create_backbone("vit_tiny_patch16_224", img_size=32, depth=2, drop_path_rate=0.5)
    before = copy.deepcopy(vit.state_dict())
    step = fa.MaskEmbed(
        fa.MaskedTeacher(vit), fa.MaskEmbedStudent.from_backbone(vit), fa.UniformMasks()
    ).train()
    assert not any(p.requires_grad for p in step.teacher.parameters())
    images, visible = torch.randn(2, 3, 32, 32), fa.UniformMasks()(torch.arange(2), 4)
    assert torch.equal(step.teacher(images, visible), step.teacher(images, visible)), (
        "no dropout in a teacher"
    )
    step(images, torch.arange(2)).backward()
    torch.optim.SGD(step.student.parameters(), 1.0).step()
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())


def test_gradient_checkpointing_changes_nothing():
    vit = fa.create_backbone("vit_tiny_patch16_224", img_size=32, depth=3)
    step = fa.MaskEmbed(fa.MaskedTeacher(vit), fa.MaskEmbedStudent.from_backbone(vit), fa.UniformMasks())
    randomise(step.student)
    images, ids, grads = torch.randn(2, 3, 32, 32), torch.arange(2), []
    for enabled in (False, True):
        step.zero_grad()
        step.student.encoder.grad_checkpointing = enabled
        step(images, ids).backward()
        grads.append({n: p.grad.clone() for n, p in step.student.named_parameters()})
    assert gradient_error(grads[1], grads[0]) < 1e-6


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("objective", ["maskembed", "mim"])
def test_compiles_without_a_graph_break_and_gives_the_same(objective):
    torch._dynamo.reset()
    vit = fa.create_backbone("vit_tiny_patch16_224", img_size=32, depth=2)
    if objective == "maskembed":
        step = fa.MaskEmbed(fa.MaskedTeacher(vit), fa.MaskEmbedStudent.from_backbone(vit), fa.UniformMasks())
    else:
        step = fa.MaskedImageModeling(
            fa.MaskedTeacher(vit, 0), fa.MIMStudent.from_backbone(vit), fa.UniformMasks()
        )
    randomise(step.student)
    images, ids, results = torch.randn(2, 3, 32, 32), torch.arange(2), []
    for part, inputs in (
        (step.student, (images, step.masks(ids, 4))),
        (step.teacher, (images, step.masks(ids, 4))),
    ):
        explained = torch._dynamo.explain(part)(*inputs)
        assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons
    torch._dynamo.reset()
    for compiled in (False, True):
        if compiled:
            step.compile()  # fullgraph: a break is an error
        step.zero_grad()
        loss = step(images, ids)
        loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in step.student.named_parameters()}))
    assert relative_error(results[1][0], results[0][0]) < 1e-5
    assert gradient_error(results[1][1], results[0][1]) < 1e-4


@pytest.mark.slow
@needs_compiler
def test_blocks_of_one_kind_share_a_graph():
    """Compiled block by block, twice the depth compiles no more; stochastic depth, of another rate each, does."""
    counts = {}
    for depth, drop_path in ((3, 0.0), (6, 0.0), (6, 0.1)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        vit = fa.create_backbone("vit_tiny_patch16_224", img_size=32, depth=depth, drop_path_rate=drop_path)
        step = fa.MaskEmbed(fa.MaskedTeacher(vit), fa.MaskEmbedStudent.from_backbone(vit), fa.UniformMasks())
        randomise(step.student)
        images, ids = torch.randn(2, 3, 32, 32), torch.arange(2)
        if not drop_path:
            wanted = step(images, ids)
        step.compile(blocks=True)
        found = step(images, ids)
        found.backward()
        if not drop_path:
            assert relative_error(found, wanted) < 1e-5
        counts[depth, drop_path] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert counts[3, 0.0] == counts[6, 0.0]
    assert counts[6, 0.1] > counts[6, 0.0]


def test_loss_in_bf16_is_computed_in_fp32():
    prediction, target = torch.randn(2, 3, 5, 64).bfloat16(), torch.randn(2, 3, 5, 64).bfloat16()
    visible = torch.ones(2, 3, 4, dtype=torch.bool)
    loss = reconstruction_loss(prediction, target, visible, loss="mse")
    assert loss.dtype == torch.float32
    assert relative_error(loss, (prediction.double() - target.double()).square().mean()) < 1e-6


def tiny(**kwargs):
    """A very small backbone."""
    return fa.create_backbone("vit_tiny_patch16_224", **{"img_size": 32, "depth": 2, **kwargs})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda v: fa.MaskedTeacher(v, skip_blocks=2), "skip_blocks"),
        (lambda v: fa.MaskedTeacher(v, masking="dorp"), "masking"),
        (lambda v: fa.MaskedTeacher(v, skip_blocks=1, prefix_only=True), "skip_blocks=0"),
        (lambda v: fa.MaskEmbedStudent.from_backbone(v, head="conv"), "head"),
        (lambda v: fa.MaskEmbedStudent.from_backbone(v, decoder_heads=7), "decoder_heads"),
        (lambda v: fa.MaskEmbedStudent.from_backbone(v, softcap=-1.0), "softcap"),
        (lambda v: objective_of(v, loss="huber"), "loss"),
        (lambda v: objective_of(v, target_dim=96), "target_dim"),
        (lambda v: objective_of(tiny(img_size=48)), "different patch grids"),
        (lambda v: objective_of(tiny(reg_tokens=2)), "prefix tokens"),
    ],
)
def test_bad_arguments_are_named(make, words):
    vit = tiny()
    with pytest.raises((ValueError, fa.UserError), match=words):
        make(vit)


def objective_of(vit, loss="mse", **options):
    """MaskEmbed of a student of `vit` and a teacher of a tiny backbone."""
    teacher = fa.MaskedTeacher(tiny())
    return fa.MaskEmbed(
        teacher, fa.MaskEmbedStudent.from_backbone(vit, **options), fa.UniformMasks(), loss=loss
    )


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_clip_quickgelu_224",
        "vit_base_patch14_reg4_dinov2",
        "vit_base_patch16_siglip_224",
        "beit_base_patch16_224",
        "eva02_base_patch16_clip_224",
    ],
)
def test_each_family_in_bf16_autocast_is_close_and_one_graph(name, softcap):
    torch._dynamo.reset()
    vit = fa.create_backbone(
        name, img_size=56 if "patch14" in name else 64, embed_dim=96, num_heads=3, depth=2
    )
    student = fa.MaskEmbedStudent.from_backbone(vit, softcap=softcap)
    step = fa.MaskEmbed(fa.MaskedTeacher(vit), student, fa.UniformMasks())
    images, ids = torch.randn(2, 3, *vit.spec.image_size), torch.arange(2)
    loss = step(images, ids)
    with torch.autocast("cpu", torch.bfloat16):
        low = step(images.bfloat16(), ids)
        low.backward()
        explained = [
            torch._dynamo.explain(part)(images, step.masks(ids, 16)) for part in (student, step.teacher)
        ]
    assert low.dtype == torch.float32
    assert relative_error(low, loss) < 0.01
    assert [(each.graph_count, each.graph_break_count) for each in explained] == [(1, 0), (1, 0)]
