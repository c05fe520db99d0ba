"""Mode drop against one sequence after another with timm's modules, in float64."""

import pytest
import timm
import torch

import fastalign as fa
from fastalign import ops
from fastalign.ops.reference import LOSSES
from tests.numerics import DEVICE, gradient_error, needs_compiler, randomise, relative_error
from tests.truth import StudentTruth

NARROW = {"embed_dim": 96, "num_heads": 3, "depth": 3}
# timm's name and arguments, the soft-cap of the student.
BACKBONES = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 48, **NARROW}, 0.5),
    "clip": ("vit_base_patch16_clip_quickgelu_224", {"img_size": 48, **NARROW}, 30.0),
    "siglip": ("vit_base_patch16_siglip_224", {"img_size": 48, **NARROW}, 30.0),
    "dinov2": ("vit_base_patch14_reg4_dinov2", {"img_size": 42, **NARROW}, None),
    "eva": ("eva02_base_patch16_clip_224", {"img_size": 48, **NARROW}, None),
}


def build(case, loss="mse"):
    """Our objective in mode drop, timm's backbone, and the student's truth, with the same moved weights."""
    name, kwargs, softcap = BACKBONES[case]
    backbone = timm.create_model(name, num_classes=0, **kwargs).double().eval()
    randomise(backbone)
    vit = fa.create_backbone(name, **kwargs).double()
    vit.load_state_dict(backbone.state_dict())
    student = fa.MaskEmbedStudent.from_backbone(vit, softcap=softcap).double()
    masks = fa.UniformMasks(seed=4)
    objective = fa.MaskEmbed(fa.MaskedTeacher(vit, masking="drop"), student, masks, loss=loss).double()
    objective.target_scale.fill_(1.3)
    randomise(student.decoder), randomise(student.encoder.head)
    truth = StudentTruth(name, cap=softcap, target_dim=vit.embed_dim, **kwargs).double()
    truth.load_state_dict(student.state_dict())
    return objective, backbone, truth


def kept(mask, prefix):
    """Indices of the tokens that a mask leaves."""
    return [*range(prefix), *(prefix + n for n in range(len(mask)) if mask[n])]


def through(model, image, mask, blocks):
    """One sequence without its hidden patches through timm's modules: [t, D]."""
    x = model._pos_embed(model.patch_embed(image[None]))
    x, rope = x if isinstance(x, tuple) else (x, None)
    x = model.norm_pre(x[:, kept(mask, model.num_prefix_tokens)])
    for block in model.blocks[:blocks]:
        x = block(x) if rope is None else block(x, rope=rope[mask])
    return model.norm(x)[0]


def decoded(truth, tokens, mask):
    """One sequence without its hidden patches through the decoder: [t, D]."""
    x = tokens * torch.arange(len(tokens)).ge(truth.prefix)[:, None] + truth.decoder.pos_embed[0]
    x = x[kept(mask, truth.prefix)][None]
    for block in truth.decoder.blocks:
        x = block(x)
    return truth.decoder.head(truth.decoder.norm(x))[0]


def each(visible):
    return [(b, m) for b in range(len(visible)) for m in range(visible.shape[1])]


@pytest.mark.parametrize("case", BACKBONES)
def test_targets_predictions_loss_and_gradients(case):
    objective, backbone, truth = build(case)
    images, ids = torch.randn(3, 3, *objective.teacher.spec.image_size, dtype=torch.float64), torch.arange(3)
    visible, packing = objective.draw(images, ids, 0)
    assert torch.equal(visible, objective.masks(ids, (3, 3), 0))
    tokens = truth.encoder(images)
    targets = torch.cat([through(backbone, images[b], visible[b, m], 2).detach() for b, m in each(visible)])
    predictions = torch.cat([decoded(truth, tokens[b], visible[b, m]) for b, m in each(visible)])
    assert relative_error(objective.teacher(images, visible, packing), targets) < 1e-10
    assert relative_error(objective.student(images, visible, packing), predictions) < 1e-10
    loss, true_loss = objective(images, ids), (predictions - 1.3 * targets).square().mean()
    assert relative_error(loss, true_loss) < 1e-10
    loss.backward(), true_loss.backward()
    ours = {n: p.grad for n, p in objective.student.named_parameters() if p.grad is not None}
    theirs = {n: p.grad for n, p in truth.named_parameters() if p.grad is not None}
    assert gradient_error(ours, theirs) < 1e-8


@pytest.mark.parametrize("case", ["vit", "siglip", "eva"])
def test_everything_and_nothing_visible(case):
    """With P = 0 a copy that hides everything is an empty sequence."""
    objective, backbone, truth = build(case)
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    visible = torch.zeros(2, 3, 9, dtype=torch.bool)
    visible[0, 0], visible[1, 1, 4] = True, True
    present = int(visible.sum()) + 6 * backbone.num_prefix_tokens
    packing = ops.pack_masks(visible, backbone.num_prefix_tokens, present + 5)
    targets = torch.cat([through(backbone, images[b], visible[b, m], 2) for b, m in each(visible)])
    found = objective.teacher(images, visible, packing)
    assert torch.isfinite(found).all()
    assert relative_error(found[: len(targets)], targets) < 1e-10
    tokens = objective.student.encoder(images)
    predictions = torch.cat([decoded(truth, tokens[b], visible[b, m]) for b, m in each(visible)])
    assert relative_error(objective.student(images, visible, packing)[: len(targets)], predictions) < 1e-10


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_count_the_tokens_that_are_there(loss):
    """Of the tokens there, those of patches are visible, and prefix tokens count as hidden."""
    objective, backbone, truth = build("dinov2", loss=loss)
    images, ids = torch.randn(2, 3, 42, 42, dtype=torch.float64), torch.arange(2)
    visible, _ = objective.draw(images, ids, 0)
    tokens, parts = truth.encoder(images), []
    for b, m in each(visible):
        target = 1.3 * through(backbone, images[b], visible[b, m], 2)
        prediction = decoded(truth, tokens[b], visible[b, m])
        difference = prediction - target
        if loss == "cosine":
            parts.append(1 - (prediction * target).sum(1) / (prediction.norm(dim=1) * target.norm(dim=1)))
        elif loss == "l1":
            parts.append(difference.abs().mean(1))
        else:
            parts.append(difference.square().mean(1))
            if loss == "masked_mse":
                parts[-1][truth.prefix :] = 0
    assert relative_error(objective(images, ids), torch.cat(parts).mean()) < 1e-10


@pytest.mark.parametrize("complement", [True, False])
@pytest.mark.parametrize("case", ["vit", "siglip", "eva"])
def test_masked_image_modeling_packs_the_student(case, complement):
    """Visible tokens of the packed student against the teacher's of the whole image."""
    name, kwargs, _ = BACKBONES[case]
    vit = fa.create_backbone(name, **kwargs).double()
    randomise(vit)
    student = fa.MIMStudent.from_backbone(vit, softcap=None, masking="drop").double()
    randomise(student)
    masks = fa.UniformMasks(complement=complement, full=False, seed=3)
    objective = fa.MaskedImageModeling(fa.MaskedTeacher(vit, skip_blocks=0), student, masks)
    student_truth = timm.create_model(name, num_classes=0, **kwargs).double().eval()
    student_truth.load_state_dict(
        {k: v for k, v in student.encoder.state_dict().items() if "head" not in k}, strict=False
    )
    images, ids = torch.randn(3, 3, 48, 48, dtype=torch.float64), torch.arange(3)
    visible = masks(ids, (3, 3), 0)
    whole = vit.forward_features(images).detach()
    squares = []
    for b, m in each(visible):
        tokens = through(student_truth, images[b], visible[b, m], 3)
        prediction = student.encoder.forward_head(tokens)
        squares.append((prediction - whole[b, kept(visible[b, m], vit.spec.prefix)]).square().mean(1))
    wanted = torch.cat(squares).mean()
    loss = objective(images, ids)
    assert relative_error(loss, wanted) < 1e-6  # the fresh norm's eps is timm's own
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_moments_of_the_targets_leave_padding_out():
    objective, _, _ = build("vit")
    objective.masks = fa.BernoulliMasks(complement=False, full=False, ratio=0.3)
    images, ids = torch.randn(4, 3, 48, 48, dtype=torch.float64), torch.arange(4)
    visible, packing = objective.draw(images, ids, 0)
    count, total, squares = objective.target_moments(images, ids, 0)
    present = objective.teacher(images, visible, packing)[: int(packing.cu_seqlens[-1])]
    assert count == present.numel()
    assert relative_error(total, present.sum()) < 1e-10
    assert relative_error(squares, present.square().sum()) < 1e-10


@needs_compiler
@pytest.mark.slow
def test_compiles_as_one_graph_for_all_masks():
    """Other masks, the same shapes: no second graph."""
    objective, _, _ = build("vit")
    objective = objective.float()
    images = torch.randn(2, 3, 48, 48)
    wanted = [objective(images, torch.tensor(ids)).item() for ids in ([0, 1], [2, 3], [4, 5])]
    torch._dynamo.reset()
    objective.compile()
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = [objective(images, torch.tensor(ids)).item() for ids in ([0, 1], [2, 3], [4, 5])]
    assert found == pytest.approx(wanted, rel=1e-5)


def test_where_lengths_vary_few_graphs_fit_them_all():
    """Without complements every batch has its own number of tokens, rounded up."""
    torch._dynamo.reset()
    objective, *_ = build("vit")
    objective.masks = fa.BernoulliMasks(complement=False, full=False)
    images, ids = torch.randn(4, 3, 48, 48, dtype=torch.float64), torch.arange(4)
    batches = [ids + 4 * index for index in range(12)]
    wanted = [objective(images, ids).item() for ids in batches]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    objective.compile(backend=backend)
    assert [objective(images, ids).item() for ids in batches] == pytest.approx(wanted, rel=1e-10)
    lengths = {len(objective.draw(images, ids, 0)[1].indices) for ids in batches}
    assert len(lengths) > 3
    assert len(graphs) == 4, "student and teacher, for the first length and for all others"


@pytest.mark.parametrize("name", ["vit", "siglip", "eva"])
def test_on_kernels(name, monkeypatch):
    """Everything in Triton, against float64."""
    objective, _, _ = build(name)
    images, ids = torch.randn(2, 3, 48, 48, dtype=torch.float64), torch.arange(2)
    wanted = objective(images, ids)
    wanted.backward()
    gradient = {n: p.grad.clone() for n, p in objective.student.named_parameters() if p.grad is not None}
    objective = objective.float().to(DEVICE)
    objective.zero_grad()
    monkeypatch.setattr(ops, "MODE", "1")
    loss = objective(images.float().to(DEVICE), ids)
    loss.backward()
    assert relative_error(loss.cpu(), wanted) < 1e-5
    found = {n: p.grad.cpu() for n, p in objective.student.named_parameters() if p.grad is not None}
    assert gradient_error(found, gradient) < 1e-3


def test_what_does_not_go_together_is_refused():
    beit = fa.create_backbone("beit_base_patch16_224", img_size=48, **NARROW)
    with pytest.raises(ValueError, match="relative position bias"):
        fa.MaskedTeacher(beit, masking="drop")
    vit = fa.create_backbone("vit_tiny_patch16_224", img_size=48, **NARROW)
    with pytest.raises(ValueError, match="prefix_only"):
        fa.MaskedTeacher(vit, skip_blocks=0, masking="drop", prefix_only=True)
    with pytest.raises(ValueError, match="'zero' or 'drop', got 'drip'"):
        fa.MIMStudent.from_backbone(vit, masking="drip")
