"""Teachers and students of MaskEmbed and masked image modeling, against the truth in float64."""

import copy

import pytest
import torch
from torch.nn import functional

import fastalign.compat.locality_alignment as la
from fastalign.utils.errors import UserError
from tests import truth
from tests.compat.helpers import MODELS, ONE, batch, make, student
from tests.numerics import gradient_error, randomise, relative_error


@pytest.mark.parametrize("name", MODELS)
def test_teachers(name):
    model = make(name).eval()
    images, mask, repeated = batch(model)
    teacher = la.convert_to_teacher_model(copy.deepcopy(model), skip_blocks=1)
    wanted = truth.teacher_targets(model, images, mask.unflatten(0, (2, 3)).bool(), 1).flatten(0, 1)
    assert relative_error(teacher(repeated, mask), wanted) < 1e-12
    teacher.output_scaling.scale *= 3
    assert relative_error(teacher(repeated, mask), 3 * wanted) < 1e-12
    assert set(teacher.state_dict()) - set(model.state_dict()) == {"output_scaling.scale"}
    assert (teacher.embed_dim, teacher.num_prefix_tokens) == (model.embed_dim, model.num_prefix_tokens)
    unmasked = la.convert_to_mim_teacher_model(copy.deepcopy(model))
    assert relative_error(unmasked(images), model.forward_features(images)) < 1e-12


@pytest.mark.parametrize(
    ("name", "cap"), [(name, None) for name in MODELS] + [(f"s{name}", 30.0) for name in list(MODELS)[:3]]
)
def test_student_and_its_gradients(name, cap):
    ours = student(make(name))
    assert not ours.encoder.head.weight.any()
    assert not ours.encoder.head.bias.any()
    randomise(ours)
    plain = name.removeprefix("s") if cap else name
    wanted = truth.StudentTruth(
        plain, cap=cap, target_dim=ours.encoder.embed_dim, width=40, decoder_heads=2, depth=3,
        decoder_qkv_bias=ours.decoder.blocks[0].attn.qkv.bias is not None, **MODELS[plain],
    ).double()  # fmt: skip
    wanted.load_state_dict(ours.state_dict())
    images, mask, _ = batch(ours.encoder)
    visible = mask.unflatten(0, (2, 3)).bool()
    predictions = ours(images, mask), wanted(images, visible).flatten(0, 1)
    assert relative_error(*predictions) < 1e-10
    cotangent = torch.randn_like(predictions[0])
    gradients = []
    for model, prediction in zip((ours, wanted), predictions, strict=True):
        (prediction * cotangent).sum().backward()
        gradients.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    gradients[1] = {key: gradients[1][key] for key in gradients[0]}
    assert gradient_error(*gradients) < 1e-8


def test_norms_are_new_and_the_mlp_head_starts_at_zero():
    model = make()
    encoder = la.convert_to_student_model(model, 24, output_head="mlp")
    assert encoder is model
    assert (encoder.norm.weight == 1).all()
    assert not encoder.norm.bias.any()
    assert encoder.head.fc1.out_features == encoder.blocks[0].mlp.fc1.out_features
    assert encoder.double()(batch(encoder)[0]).abs().max() == 0
    with pytest.raises(UserError, match="'linear' or 'mlp'"):
        la.convert_to_student_model(make(), 24, "conv")


@pytest.mark.parametrize("name", [ONE, "vit_base_patch16_siglip_224", "vit_small_patch14_reg4_dinov2"])
def test_prefix_only_predicts_each_image_its_own_vector(name):
    model = make(name).eval()
    images, mask, repeated = batch(model)
    teacher = la.convert_to_teacher_model(copy.deepcopy(model), prefix_only=True)
    ours = student(copy.deepcopy(model), prefix_only=True)
    randomise(ours)
    targets, predictions = teacher(repeated, mask), ours(images, mask)
    assert targets.shape == predictions.shape == (6, 1, model.embed_dim)
    blanked = [
        truth.blank_pixels(x, m, model.patch_embed.patch_size[0]) for x, m in zip(repeated, mask, strict=True)
    ]
    pooled = model.forward_head(model.forward_features(torch.stack(blanked)))
    assert relative_error(targets[:, 0], pooled) < 1e-12
    each = torch.stack([((p - t) ** 2).mean() for p, t in zip(predictions[:, 0], pooled, strict=True)]).mean()
    assert relative_error(functional.mse_loss(predictions, targets), each) < 1e-12


def test_bad_conversions():
    with pytest.raises(UserError, match="skip_blocks=0"):
        la.convert_to_teacher_model(make(), 1, prefix_only=True)
    with pytest.raises(UserError, match=r"0\.\.2"):
        la.convert_to_teacher_model(make(), 3)
    with pytest.raises(UserError, match="square"):
        la.convert_to_teacher_model(make(img_size=(64, 32)))
    ours = student(make())
    images, mask, _ = batch(ours.encoder)
    with pytest.raises(UserError, match="multiple of the 2 images"):
        ours(images, mask[:5])
    with pytest.raises(RuntimeError, match="0 and 1 only"):
        ours(images, mask / 2)


@pytest.mark.parametrize("name", MODELS)
def test_student_of_masked_image_modeling(name):
    model = make(name).eval()
    _, mask, repeated = batch(model)
    ours = la.convert_to_mim_student_model(copy.deepcopy(model), 24).double()
    randomise(ours)
    wanted = truth.StudentTruth(
        name, cap=None, target_dim=24, layers=0, decoder_heads=1, depth=3, **MODELS[name]
    )
    wanted.double().encoder.load_state_dict(ours.state_dict())
    patch = model.patch_embed.patch_size[0]
    blanked = torch.stack([truth.blank_pixels(x, m, patch) for x, m in zip(repeated, mask, strict=True)])
    assert relative_error(ours(repeated, mask), wanted.encoder(blanked)) < 1e-12


def test_grad_checkpointing_changes_no_gradient():
    ours = student(make(f"s{ONE}")).train()
    randomise(ours)
    images, mask, _ = batch(ours.encoder)
    gradients = []
    for enable in (False, True):
        ours.set_grad_checkpointing(enable=enable)
        assert ours.encoder.grad_checkpointing is enable
        ours.zero_grad()
        ours(images, mask).square().mean().backward()
        gradients.append({k: p.grad.clone() for k, p in ours.named_parameters() if p.grad is not None})
    assert gradient_error(*gradients) < 1e-12
