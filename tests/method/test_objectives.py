"""MaskEmbed and masked image modeling against an independent computation with timm modules, in float64."""

import copy

import pytest
import timm
import torch
from torch import nn

import fastalign as fa
from fastalign.backbones.zoo import from_timm
from fastalign.ops.reference import LOSSES
from tests.method.helpers import SMALL, VIT, build_pair, gradients
from tests.numerics import gradient_error, randomise, relative_error
from tests.truth import CappedAttention, loss_truth, of_masked_images, teacher_targets

EXACT = 1e-10
DEEP = {"decoder_layers": 3, "decoder_width": 64, "decoder_heads": 4, "decoder_init_values": None}
SMALL_28 = {**SMALL, "img_size": 28}
PREFIX_ONLY = {"skip_blocks": 0, "prefix_only": True}
# timm's name and arguments, the student's options, the teacher's options.
CASES = {
    "plain": (VIT, {**SMALL, "img_size": 48}, {}, {}),
    "no cap": (VIT, SMALL, {"softcap": None}, {}),
    "small cap": (VIT, SMALL, {"softcap": 0.5}, {}),
    "skip 0": (VIT, SMALL, {}, {"skip_blocks": 0}),
    "skip 2": (VIT, SMALL, {}, {"skip_blocks": 2}),
    "clip": ("vit_base_patch16_clip_quickgelu_224", SMALL, {}, {}),
    "siglip": ("vit_base_patch16_siglip_224", SMALL, {}, {}),
    "so400m": ("vit_so400m_patch14_siglip_224", SMALL_28, {}, {}),
    "dinov2": ("vit_base_patch14_reg4_dinov2", SMALL_28, {}, {}),
    "beit": ("beit_base_patch16_224", SMALL, {"softcap": None, "decoder_qk_norm": False}, {}),
    "eva": ("eva02_base_patch16_clip_224", SMALL, {"softcap": None}, {}),
    "aimv2": ("aimv2_large_patch14_224", SMALL_28, {"softcap": 0.5, "decoder_qkv_bias": False}, {}),
    "packed swiglu": ("vit_giant_patch14_dinov2", SMALL_28, {"head": "mlp"}, {}),
    "internvit": ("vit_intern300m_patch14_448", SMALL_28, {}, {}),
    "distilled": ("deit_tiny_distilled_patch16_224", SMALL, {}, {}),
    "mlp head": (VIT, SMALL, {"head": "mlp"}, {}),
    "deep decoder": (VIT, SMALL, DEEP, {}),
    "no decoder blocks": (VIT, SMALL, {"decoder_layers": 0}, {}),
    "decoder qk norm": (VIT, SMALL, {"decoder_qk_norm": True, "decoder_qkv_bias": False}, {}),
    "student qk norm": (VIT, {**SMALL, "qk_norm": True}, {}, {}),
    "frozen": (VIT, SMALL, {"freeze_encoder": True}, {}),
    "prefix only": (VIT, SMALL, {"prefix_only": True}, PREFIX_ONLY),
}


@pytest.mark.parametrize(
    ("case", "loss"),
    [(case, "mse") for case in CASES] + [("plain", loss) for loss in LOSSES if loss != "mse"],
)
def test_targets_tokens_predictions_loss_and_gradients(case, loss):
    name, kwargs, student_options, teacher_options = CASES[case]
    objective, backbone, truth = build_pair(
        name, kwargs, {"softcap": 30.0, **student_options}, teacher_options, loss
    )
    spec = objective.teacher.spec
    images, ids = torch.randn(2, 3, *spec.image_size, dtype=torch.float64), torch.tensor([3, 8])
    visible = objective.masks(ids, spec.grid, 0)
    if teacher_options.get("prefix_only"):
        wanted = of_masked_images(backbone, images, visible, 16).unsqueeze(2).detach()
    else:
        wanted = teacher_targets(backbone, images, visible, teacher_options.get("skip_blocks", 1))
    assert relative_error(objective.teacher(images, visible), wanted) < EXACT
    assert relative_error(objective.student.encoder(images), truth.tokens(images)) < EXACT
    predictions = truth(images, visible)
    assert relative_error(objective.student(images, visible), predictions) < EXACT
    found, true_loss = objective(images, ids), loss_truth(loss, predictions, 1.3 * wanted, visible)
    assert relative_error(found, true_loss) < EXACT
    found.backward()
    trained = {name for name, p in objective.student.named_parameters() if p.requires_grad}
    torch.autograd.backward(true_loss, inputs=[p for name, p in truth.named_parameters() if name in trained])
    assert gradient_error(gradients(objective.student), gradients(truth)) < 1e-8


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_masked_image_modeling(loss, softcap):
    backbone = timm.create_model(VIT, num_classes=0, img_size=32, depth=2).double().eval()
    randomise(backbone)
    vit = fa.create_backbone(VIT, img_size=32, depth=2).double()
    vit.load_state_dict(backbone.state_dict())
    student = fa.MIMStudent.from_backbone(vit, softcap=softcap).double()
    randomise(student)
    teacher = fa.MaskedTeacher(vit, skip_blocks=0)
    objective = fa.MaskedImageModeling(teacher, student, fa.UniformMasks(), loss).double()
    images, ids = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 4])
    visible = objective.masks(ids, 4, 0)
    truth = copy.deepcopy(backbone)
    truth.norm, truth.head = type(truth.norm)(192).double(), nn.Linear(192, 192).double()
    truth.global_pool = ""
    if softcap:
        for block in truth.blocks:
            block.attn = CappedAttention(block.attn, softcap)
    truth.load_state_dict(student.encoder.state_dict())
    predictions = of_masked_images(truth, images, visible, 16)
    targets = backbone.forward_features(images)[:, None].expand_as(predictions).detach()
    wanted = loss_truth(loss, predictions, targets, visible, prefix_hidden=False)
    found = objective(images, ids)
    assert relative_error(found, wanted) < EXACT
    found.backward(), wanted.backward()
    assert gradient_error(gradients(student.encoder), gradients(truth)) < 1e-8


def test_one_patch_embedding_for_all_masks_equals_blanking_pixels():
    """With a norm of the patch embedding; an image with a remainder; a mask that hides everything."""
    options = {"img_size": 50, "embed_norm_layer": "layernorm"}
    model = timm.create_model(VIT, num_classes=0, depth=1, **options).double().eval()
    randomise(model)
    teacher = fa.MaskedTeacher(from_timm(copy.deepcopy(model)), skip_blocks=0)
    images = torch.randn(2, 3, *teacher.spec.image_size, dtype=torch.float64)
    visible = fa.UniformMasks()(torch.arange(2), 9)
    visible[1, 1] = False
    assert relative_error(teacher(images, visible), teacher_targets(model, images, visible, 0)) < EXACT


@pytest.mark.parametrize("mode", ["zero", "drop"])
def test_masks_may_be_a_function(mode):
    vit, masks = fa.create_backbone(VIT, **SMALL), fa.UniformMasks(seed=3)
    student, teacher = fa.MaskEmbedStudent.from_backbone(vit), fa.MaskedTeacher(vit, masking=mode)
    images, ids = torch.randn(2, 3, *vit.spec.image_size), torch.tensor([5, 7])
    theirs = fa.MaskEmbed(teacher, student, lambda sample_ids, grid, epoch: masks(sample_ids, grid, epoch))
    assert torch.equal(theirs(images, ids, 2), fa.MaskEmbed(teacher, student, masks)(images, ids, 2))
