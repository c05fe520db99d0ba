"""Floating-point operations of a step, by formula, and the peak of the hardware.

A multiply-add counts as two operations, training as three forward passes, the frozen teacher as one.
"""

import torch
from torch import nn

from fastalign.backbones.spec import BlockSpec
from fastalign.backbones.vit import ViT
from fastalign.method.objectives import MaskedImageModeling, MaskEmbed

PEAK_BF16 = {"H100": 989.5e12, "H200": 989.5e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12}
"""Dense bf16 FLOP/s from the vendors' data sheets, by a substring of the device's name."""


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a device, None if it is not known."""
    return next((peak for part, peak in PEAK_BF16.items() if part in device_name), None)


def block_flops(block: BlockSpec, tokens: float, squares: float) -> float:
    """One block's forward pass: `tokens` in all, `squares` = the sum of the squared sequence lengths."""
    mlp = block.mlp_matrices * block.width * block.mlp_hidden
    return 2 * (4 * block.width**2 + mlp) * tokens + 4 * block.width * squares


def flops_per_image(objective: MaskEmbed | MaskedImageModeling) -> float:
    """A training step's operations for one image, forward and backward, teacher included."""
    teacher, student = objective.teacher, objective.student
    copies, tokens = objective.masks.copies, teacher.spec.prefix + teacher.spec.patches
    once, masked = (tokens, tokens**2), (copies * tokens, copies * tokens**2)
    if objective.masking == "drop":  # the means of many masks
        visible = objective.masks(torch.arange(4096), teacher.spec.grid)
        lengths = (visible.sum(-1) + teacher.spec.prefix).double()
        masked = lengths.sum(1).mean().item(), lengths.square().sum(1).mean().item()
    decoder = getattr(student, "decoder", None)
    total = encoder_flops(teacher.vit, *(masked if decoder else once))
    passes = 3 if any(parameter.requires_grad for parameter in student.encoder.parameters()) else 1
    total += encoder_flops(student.encoder, *(once if decoder else masked), passes)
    if decoder:
        blocks = sum(block_flops(block.attn.spec, *masked) for block in decoder.blocks)
        predicted = copies if decoder.prefix_only and decoder.prefix else masked[0]
        total += 3 * (blocks + head_flops(decoder.head) * predicted)
    return total


def encoder_flops(vit: ViT, tokens: float, squares: float, passes: int = 1) -> float:
    """A backbone's passes: blocks and head over all tokens, the patch embedding once per image."""
    transformer = (
        len(vit.blocks) * block_flops(vit.spec.block, tokens, squares) + head_flops(vit.head) * tokens
    )
    embedding = 2 * vit.spec.patches * vit.patch_embed.proj.weight.numel()
    # The embedding is the first layer: its backward pass computes no gradient of the input.
    return passes * transformer + min(passes, 2) * embedding


def head_flops(head: nn.Module) -> float:
    """A head's forward pass for one token."""
    return 2 * sum(module.weight.numel() for module in head.modules() if isinstance(module, nn.Linear))
