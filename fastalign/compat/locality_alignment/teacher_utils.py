"""Teachers: a timm model, changed in place, whose forward gives targets times the buffer `output_scaling.scale`."""

import types

from torch import Tensor, nn

from fastalign.compat.locality_alignment.model_utils import Scale, mask_layer, use_our_attention
from fastalign.utils.errors import UserError


def convert_to_teacher_model(model: nn.Module, skip_blocks: int = 0, prefix_only: bool = False) -> nn.Module:
    """A timm model, changed in place to read masked images: ``teacher(x [n, C, h, w], mask [n, N])``.

    The output is the final norm of the last `skip_blocks` blocks' input [n, T, D]; these blocks are removed. With
    `prefix_only`, which needs ``skip_blocks=0``, it is the pooled output [n, 1, D].
    """
    if prefix_only and skip_blocks:
        raise UserError("convert_to_teacher_model: prefix_only reads the whole model; set skip_blocks=0")
    most = len(model.blocks) - 1
    if not 0 <= skip_blocks <= most:
        raise UserError(f"convert_to_teacher_model: skip_blocks must lie in 0..{most}, got {skip_blocks}")
    model.mask_layer = mask_layer(model)
    model.blocks = model.blocks[: len(model.blocks) - skip_blocks]
    convert_to_mim_teacher_model(model)
    if prefix_only:
        model.forward = types.MethodType(_pooled, model)
    return model


def convert_to_mim_teacher_model(model: nn.Module) -> nn.Module:
    """A timm model, changed in place to give all tokens of whole images: ``teacher(x [B, C, h, w])``: [B, T, D]."""
    model.output_scaling = Scale(1)
    model.forward = types.MethodType(_tokens, use_our_attention(model))
    return model


def _tokens(self: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    x = x if mask is None else self.mask_layer(x, mask)
    return self.output_scaling(self.forward_features(x))


def _pooled(self: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    # [n, 1, D] like the student's prediction: [n, D] would broadcast to [n, n, D] in the loss.
    x = self.forward_head(self.forward_features(self.mask_layer(x, mask)))
    return self.output_scaling(x).unsqueeze(1)
