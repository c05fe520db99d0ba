"""How a frozen model keeps its weights, where it only ever runs under autocast."""

import torch
from torch import nn

from fastalign.models.blocks import Attention


def store_as(module: nn.Module, dtype: torch.dtype) -> None:
    """Keep in `dtype` what autocast would cast at every use: weights and biases of products and convolutions.

    Under autocast of that dtype the output keeps its bits. Norms, positions, tokens and LayerScale stay as they are.

    Args:
        module: changed in place; it must not be trained.
        dtype: autocast's.
    """
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            part.to(dtype)
        elif isinstance(part, Attention) and hasattr(part, "q_bias"):  # BEiT's, which become a bias of qkv
            part.q_bias.data, part.v_bias.data = part.q_bias.data.to(dtype), part.v_bias.data.to(dtype)
