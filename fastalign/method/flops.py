"""Floating-point operations of a step, by formula.

A multiply-add counts as two; training as three forward passes; the frozen teacher as one.
"""

import torch
from torch import nn

from fastalign.backbones.spec import BlockSpec
from fastalign.backbones.vit import ViT
from fastalign.method.objectives import MaskedImageModeling, MaskEmbed


def block_flops(block: BlockSpec, tokens: float, squares: float) -> float:
    """One block's forward pass: `tokens` in all, `squares` = the sum of the squared sequence lengths."""
    mlp = (3 if block.mlp == "swiglu" else 2) * block.width * block.mlp_hidden
    return 2 * (4 * block.width**2 + mlp) * tokens + 4 * block.width * squares


def flops_per_image(objective: MaskEmbed | MaskedImageModeling) -> float:
    """A training step's operations for one image, forward and backward, teacher included."""
    teacher, student = objective.teacher, objective.student
    copies, tokens = objective.masks.copies, student.encoder.spec.prefix + student.encoder.spec.patches
    once, masked = (tokens, tokens**2), (copies * tokens, copies * tokens**2)
    if objective.masking == "drop":
        masked = _dropped(objective)
    decoder = getattr(student, "decoder", None)
    total = encoder_flops(teacher.vit, *(masked if decoder else once))
    trained = 3 if any(parameter.requires_grad for parameter in student.encoder.parameters()) else 1
    total += trained * encoder_flops(student.encoder, *(once if decoder else masked))
    # The patch embedding is the first layer: its backward pass has no gradient of the input to make.
    total -= patch_flops(student.encoder) if trained == 3 else 0
    if decoder:
        blocks = sum(block_flops(block.attn.spec, *masked) for block in decoder.blocks)
        predicted = copies if decoder.prefix_only and decoder.prefix else masked[0]
        total += 3 * (blocks + head_flops(decoder.head) * predicted)
    return total


def _dropped(objective: MaskEmbed | MaskedImageModeling) -> tuple[float, float]:
    """Tokens of an image's copies without their hidden patches, and the sum of their squares: means of many masks."""
    visible = objective.masks(torch.arange(4096), objective.teacher.spec.grid)
    lengths = (visible.sum(-1) + objective.teacher.spec.prefix).double()
    return lengths.sum(1).mean().item(), lengths.square().sum(1).mean().item()


def encoder_flops(vit: ViT, tokens: float, squares: float) -> float:
    """A backbone's forward pass: patch embedding once an image, blocks and head over all tokens."""
    blocks = len(vit.blocks) * block_flops(vit.spec.block, tokens, squares)
    return blocks + head_flops(vit.head) * tokens + patch_flops(vit)


def patch_flops(vit: ViT) -> float:
    """The patch embedding of one image."""
    return 2 * vit.spec.patches * vit.patch_embed.proj.weight.numel()


def head_flops(head: nn.Module) -> float:
    """A head's forward pass for one token."""
    return 2 * sum(module.weight.numel() for module in head.modules() if isinstance(module, nn.Linear))
