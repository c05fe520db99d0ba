"""Students: a timm model, changed in place: new norms, no pooling, a new head that starts at zero."""

import types

from timm.layers import Mlp
from torch import Tensor, nn

from fastalign.compat.locality_alignment.model_utils import mask_layer, use_our_attention
from fastalign.utils.errors import UserError


def convert_to_student_model(model: nn.Module, output_dim: int, output_head: str = "linear") -> nn.Module:
    """A timm model, changed in place into the encoder of MaskEmbed: [B, C, h, w] -> [B, T, output_dim]."""
    if output_head not in ("linear", "mlp"):
        raise UserError(f"output_head must be 'linear' or 'mlp', got {output_head!r}")
    for name in ("norm", "fc_norm"):
        norm = getattr(model, name)
        if not isinstance(norm, nn.Identity):
            setattr(model, name, type(norm)(model.embed_dim))
    model.attn_pool = model.global_pool = None
    if output_head == "linear":
        model.head = last = nn.Linear(model.embed_dim, output_dim)
    else:
        mlp = model.blocks[-1].mlp
        model.head = Mlp(model.embed_dim, mlp.fc1.out_features, output_dim, act_layer=type(mlp.act))
        last = model.head.fc2
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return use_our_attention(model)


def convert_to_mim_student_model(model: nn.Module, output_dim: int, output_head: str = "linear") -> nn.Module:
    """As `convert_to_student_model`, of masked images: ``model(x [n, C, h, w], mask [n, N])``: [n, T, output_dim]."""
    model.mask_layer = mask_layer(model)
    model.forward = types.MethodType(_masked, convert_to_student_model(model, output_dim, output_head))
    return model


def _masked(self: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return self.forward_head(self.forward_features(self.mask_layer(x, mask)))
