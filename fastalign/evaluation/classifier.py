"""Backbone and head as one module, and the learning rate of each of its layers."""

import copy
import re

import torch
from torch import Tensor, nn

from fastalign.backbones.vit import ViT
from fastalign.evaluation.image_heads import make_head, represent

_BLOCK = re.compile(r"backbone\.blocks\.(\d+)\.")
_BEFORE_BLOCKS = ("patch_embed.", "cls_token", "reg_token", "pos_embed", "norm_pre.")


class Classifier(nn.Module):
    """A copy of a backbone, frozen or trained, and a fresh head drawn from torch's generator."""

    def __init__(self, vit: ViT, head: str, classes: int, *, unfreeze: bool):
        super().__init__()
        self.head_name, self.unfreeze = head, unfreeze
        self.backbone = reading_copy(vit, head).freeze(not unfreeze)
        self.head = make_head(head, vit, classes)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, height, width], normalised -> logits [B, C]"""
        with torch.set_grad_enabled(self.unfreeze and torch.is_grad_enabled()):
            features = represent(self.backbone, self.backbone.forward_features(images), self.head_name)
        return self.head(features)


def reading_copy(vit: ViT, head: str) -> ViT:
    """A copy of the backbone without what the head does not read: pooling, output layer, norm after pooling."""
    copied = copy.deepcopy(vit)
    copied.head, copied.attn_pool, copied.pool = nn.Identity(), None, "none"
    if head != "linear":
        copied.fc_norm = nn.Identity()
    return copied


def learning_rate_factor(name: str, depth: int, decay: float) -> float:
    """A parameter's learning rate over the head's.

    decay^(depth - i) in block i of 0..depth-1, decay^(depth + 1) before the blocks, 1 behind them.

    Args:
        name: of the parameter in a `Classifier`.
        depth: number of blocks.
        decay: in (0, 1].
    """
    block = _BLOCK.match(name)
    if block:
        return decay ** (depth - int(block[1]))
    before = name.startswith(tuple(f"backbone.{part}" for part in _BEFORE_BLOCKS))
    return decay ** (depth + 1) if before else 1.0


def parameter_groups(model: nn.Module, *, depth: int, decay: float, weight_decay: float) -> list[dict]:
    """Parameters that are trained, by learning-rate factor and weight decay.

    Vectors and tokens (biases, norms, queries, positions) have no weight decay.

    Returns:
        Groups for an optimiser, each with its "factor".
    """
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = learning_rate_factor(name, depth, decay)
        decayed = weight_decay if name.endswith("weight") and parameter.ndim > 1 else 0.0
        group = groups.setdefault(
            (factor, decayed), {"params": [], "factor": factor, "weight_decay": decayed}
        )
        group["params"].append(parameter)
    return list(groups.values())
