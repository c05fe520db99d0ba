"""Floating-point operations of a step, by formula.

A multiply-add counts as two; training as three forward passes; the frozen teacher as one.
"""

from fastalign.models.spec import BlockSpec
from fastalign.objectives import MaskEmbed


def block_flops(block: BlockSpec, tokens: float, squares: float) -> float:
    """One block's forward pass: `tokens` in all, `squares` = the sum of the squared sequence lengths."""
    mlp = (3 if block.mlp == "swiglu" else 2) * block.width * block.mlp_hidden
    return 2 * (4 * block.width**2 + mlp) * tokens + 4 * block.width * squares


def flops_per_image(objective: MaskEmbed) -> float:
    """A training step's operations for one image, forward and backward, teacher included (mode `zero`)."""
    teacher, encoder = objective.teacher, objective.student.encoder
    spec, copies = encoder.spec, objective.masks.copies
    tokens = spec.prefix + spec.patches
    all_tokens, all_squares = copies * tokens, copies * tokens**2
    patch = 2 * spec.patches * spec.channels * spec.patch_size[0] * spec.patch_size[1]
    decoder = getattr(objective.student, "decoder", None)
    seen = (tokens, tokens**2) if decoder else (all_tokens, all_squares)
    taught = (all_tokens, all_squares) if decoder else (tokens, tokens**2)
    head = decoder.pos_embed.shape[-1] if decoder else teacher.embed_dim
    student = spec.depth * block_flops(spec.block, *seen) + 2 * seen[0] * spec.block.width * head
    total = 3 * student + 2 * patch * spec.block.width
    total += len(teacher.vit.blocks) * block_flops(teacher.spec.block, *taught) + patch * teacher.embed_dim
    if decoder:
        total += 3 * sum(block_flops(block.attn.spec, all_tokens, all_squares) for block in decoder.blocks)
        total += 3 * 2 * all_tokens * head * teacher.embed_dim
    return total
