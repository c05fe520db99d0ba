"""Mode drop against one sequence after another with timm's modules, in float64."""

import pytest
import timm
import torch

import fastalign as fa
from fastalign import ops
from fastalign.ops.reference import LOSSES
from tests.method.helpers import NARROW, build_pair, gradients, in_float64
from tests.numerics import gradient_error, randomise, relative_error

# timm's name and arguments, the soft-cap of the student.
BACKBONES = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 48, **NARROW}, 0.5),
    "clip": ("vit_base_patch16_clip_quickgelu_224", {"img_size": 48, **NARROW}, 30.0),
    "siglip": ("vit_base_patch16_siglip_224", {"img_size": 48, **NARROW}, 30.0),
    "dinov2": ("vit_base_patch14_reg4_dinov2", {"img_size": 42, **NARROW}, None),
    "eva": ("eva02_base_patch16_clip_224", {"img_size": 48, **NARROW}, None),
    "aimv2": ("aimv2_large_patch14_224", {"img_size": 42, **NARROW}, 0.5),
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 48, **NARROW}, 30.0),
    # Of a fixed size timm keeps its table in fp32, as we do.
    "dinov3": ("vit_small_patch16_dinov3_qkvb", {"img_size": 48, "dynamic_img_size": False, **NARROW}, None),
    "pe": ("vit_pe_core_base_patch16_224", {"img_size": 48, "attn_pool_num_heads": 3, **NARROW}, None),
    "mixed": ("vit_base_patch16_rope_mixed_ape_224", {"img_size": 48, **NARROW}, None),
}


def build(case, loss="mse"):
    """The objective in mode drop, timm's backbone, the student's truth, and images."""
    name, kwargs, softcap = BACKBONES[case]
    parts = build_pair(name, kwargs, {"softcap": softcap}, {"masking": "drop"}, loss)
    return *parts, torch.randn(3, 3, *parts[0].teacher.spec.image_size, dtype=torch.float64)


def kept(mask, prefix):
    """Indices of the tokens that a mask keeps."""
    return [*range(prefix), *(prefix + n for n in range(len(mask)) if mask[n])]


def through(model, image, mask, blocks):
    """One sequence without its hidden patches through timm's modules: [t, D]."""
    x = model._pos_embed(model.patch_embed(image[None]))
    x, rope = x if isinstance(x, tuple) else (x, None)
    x = model.norm_pre(x[:, kept(mask, model.num_prefix_tokens)])
    for index, block in enumerate(model.blocks[:blocks]):
        table = rope[index] if rope is not None and rope.dim() == 4 else rope
        x = block(x) if rope is None else block(x, rope=table[..., mask, :])
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


def true_targets(backbone, images, visible):
    """The teacher's tokens of every sequence in order: a list of [t, D]."""
    return [through(backbone, images[b], visible[b, m], 2).detach() for b, m in each(visible)]


def true_predictions(truth, images, visible):
    """The student's predictions of every sequence in order: a list of [t, D]."""
    tokens = truth.tokens(images)
    return [decoded(truth, tokens[b], visible[b, m]) for b, m in each(visible)]


@pytest.mark.parametrize("case", BACKBONES)
def test_targets_predictions_loss_and_gradients(case):
    objective, backbone, truth, images = build(case)
    ids = torch.arange(3)
    visible, packing = objective.draw(images, ids, 0)
    assert torch.equal(visible, objective.masks(ids, (3, 3), 0))
    targets = torch.cat(true_targets(backbone, images, visible))
    predictions = torch.cat(true_predictions(truth, images, visible))
    assert relative_error(objective.teacher(images, visible, packing), targets) < 1e-10
    assert relative_error(objective.student(images, visible, packing), predictions) < 1e-10
    loss, true_loss = objective(images, ids), (predictions - 1.3 * targets).square().mean()
    assert relative_error(loss, true_loss) < 1e-10
    loss.backward(), true_loss.backward()
    assert gradient_error(gradients(objective.student), gradients(truth)) < 1e-8


@pytest.mark.parametrize("case", ["vit", "siglip", "eva"])
def test_everything_and_nothing_visible(case):
    """With P = 0 a copy that hides everything is an empty sequence."""
    objective, backbone, truth, images = build(case)
    visible = torch.zeros(3, 2, 9, dtype=torch.bool)
    visible[0, 0], visible[1, 1, 4] = True, True
    present = int(visible.sum()) + 6 * backbone.num_prefix_tokens
    packing = ops.pack_masks(visible, backbone.num_prefix_tokens, present + 5)
    found = objective.teacher(images, visible, packing)
    assert torch.isfinite(found).all()
    assert relative_error(found[:present], torch.cat(true_targets(backbone, images, visible))) < 1e-10
    found = objective.student(images, visible, packing)
    assert relative_error(found[:present], torch.cat(true_predictions(truth, images, visible))) < 1e-10


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_means_over_the_tokens_present(loss):
    """All patches present are visible, and prefix tokens count as hidden."""
    objective, backbone, truth, images = build("dinov2", loss=loss)
    visible, _ = objective.draw(images, torch.arange(3), 0)
    targets, parts = true_targets(backbone, images, visible), []
    for prediction, target in zip(true_predictions(truth, images, visible), targets, strict=True):
        difference = prediction - 1.3 * target
        if loss == "cosine":
            parts.append(1 - torch.cosine_similarity(prediction, target))
        elif loss == "l1":
            parts.append(difference.abs().mean(1))
        else:
            parts.append(difference.square().mean(1))
            if loss == "masked_mse":
                parts[-1][truth.prefix :] = 0
    assert relative_error(objective(images, torch.arange(3)), torch.cat(parts).mean()) < 1e-10


@pytest.mark.parametrize("complement", [True, False])
@pytest.mark.parametrize("case", ["vit", "siglip", "eva", "mixed"])
def test_masked_image_modeling_packs_the_student(case, complement):
    """Visible tokens of the packed student against the teacher's of the whole image."""
    name, kwargs, _ = BACKBONES[case]
    vit = fa.create_backbone(name, **kwargs).double()
    randomise(vit)
    student = fa.MIMStudent.from_backbone(vit, softcap=None, masking="drop").double()
    randomise(student)
    masks = fa.UniformMasks(complement=complement, full=False, seed=3)
    objective = fa.MaskedImageModeling(fa.MaskedTeacher(vit, skip_blocks=0), student, masks)
    truth = in_float64(timm.create_model(name, num_classes=0, **kwargs)).eval()
    weights = {k: v for k, v in student.encoder.state_dict().items() if "head" not in k}
    truth.load_state_dict(weights, strict=False)
    images, ids = torch.randn(3, 3, 48, 48, dtype=torch.float64), torch.arange(3)
    visible, whole, squares = masks(ids, (3, 3), 0), vit.forward_features(images).detach(), []
    for b, m in each(visible):
        prediction = student.encoder.forward_head(through(truth, images[b], visible[b, m], 3))
        squares.append((prediction - whole[b, kept(visible[b, m], vit.spec.prefix)]).square().mean(1))
    loss = objective(images, ids)
    assert relative_error(loss, torch.cat(squares).mean()) < 1e-6  # timm's norm has another epsilon
    loss.backward()
    assert all(torch.isfinite(grad).all() for grad in gradients(student).values())


def test_moments_of_the_targets_exclude_padding():
    objective, _, _, images = build("vit")
    objective.masks = fa.BernoulliMasks(complement=False, full=False, ratio=0.3)
    ids = torch.arange(3)
    visible, packing = objective.draw(images, ids, 0)
    count, total, squares = objective.target_moments(images, ids, 0)
    present = objective.teacher(images, visible, packing)[: int(packing.cu_seqlens[-1])]
    assert count == present.numel()
    assert relative_error(total, present.sum()) < 1e-10
    assert relative_error(squares, present.square().sum()) < 1e-10


@pytest.mark.parametrize(
    ("masks", "lengths", "graphs"),
    [
        (fa.UniformMasks(), 1, 2),  # one for the student, one for the teacher
        (fa.BernoulliMasks(complement=False, full=False), 4, 4),  # and two for all other lengths
    ],
)
def test_few_graphs_fit_all_masks(masks, lengths, graphs):
    """Without complements every batch has its own number of tokens, rounded up."""
    torch._dynamo.reset()
    objective, _, _, images = build("vit")
    objective.masks = masks
    batches, made = torch.arange(36).split(3), []
    wanted = [objective(images, ids).item() for ids in batches]

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    objective.compile(backend=backend)
    assert [objective(images, ids).item() for ids in batches] == pytest.approx(wanted, rel=1e-10)
    assert len({len(objective.draw(images, ids, 0)[1].indices) for ids in batches}) >= lengths
    assert len(made) == graphs
