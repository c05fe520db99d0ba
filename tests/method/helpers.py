"""Small objectives for the tests of the method, and their truths."""

import timm
import torch
from torch import nn

import fastalign as fa
from tests.numerics import randomise
from tests.truth import StudentTruth

VIT = "vit_tiny_patch16_224"
NARROW = {"embed_dim": 96, "num_heads": 3, "depth": 3}
SMALL = {"img_size": 32, **NARROW}


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def tiny(**kwargs):
    """A very small backbone."""
    return fa.create_backbone(VIT, **{"img_size": 32, "depth": 2, **kwargs})


def maskembed(vit, loss="mse", **options):
    """MaskEmbed of a student and a teacher of a backbone."""
    student = fa.MaskEmbedStudent.from_backbone(vit, **options)
    return fa.MaskEmbed(fa.MaskedTeacher(vit), student, fa.UniformMasks(), loss=loss)


TRUTHS_NAMES = {
    "softcap": "cap",
    "freeze_encoder": "frozen",
    "decoder_width": "width",
    "decoder_layers": "layers",
    "decoder_init_values": "init_values",
}


def build_pair(name, kwargs, student_options, teacher_options, loss):
    """MaskEmbed, timm's backbone and the student's truth, with the same random weights, in float64.

    Args:
        name, kwargs: timm's.
        student_options, teacher_options: of `MaskEmbedStudent.from_backbone` and `MaskedTeacher`.
        loss: its name.
    """
    backbone = in_float64(timm.create_model(name, num_classes=0, **kwargs)).eval()
    randomise(backbone)
    vit = fa.create_backbone(name, **kwargs).double()
    vit.load_state_dict(backbone.state_dict())
    student = fa.MaskEmbedStudent.from_backbone(vit, **student_options).double()
    teacher = fa.MaskedTeacher(vit, **teacher_options)
    objective = fa.MaskEmbed(teacher, student, fa.UniformMasks(seed=4), loss=loss).double()
    objective.target_scale.fill_(1.3)
    randomise(student.decoder), randomise(student.encoder.head)
    options = {TRUTHS_NAMES.get(key, key): value for key, value in student_options.items()}
    options.setdefault("decoder_qkv_bias", vit.spec.block.qkv_bias)
    truth = StudentTruth(name, target_dim=vit.embed_dim, **options, **kwargs).double()
    truth.load_state_dict(student.state_dict())
    in_float64(truth.encoder)
    return objective, backbone, truth


def in_float64(model):
    """timm's model, its mixed rope in float64 too, where timm's own rounds to fp32."""
    if isinstance(rope := getattr(model, "rope", None), timm.layers.RotaryEmbeddingMixed):

        def get_embed():
            x, y = (
                place[:, None] * f[..., None, :]
                for place, f in zip((rope.t_x, rope.t_y), rope.freqs, strict=True)
            )
            angles = (x + y).repeat_interleave(2, -1)
            return torch.cat([angles.sin(), angles.cos()], -1)

        rope.get_embed = get_embed
    return model.double()
