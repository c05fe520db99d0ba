"""Small objectives for the tests of the method."""

import torch
from torch import nn

import fastalign as fa

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
