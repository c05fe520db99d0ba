"""A backbone with an image head as one module, and the learning rate of each of its layers."""

import copy
import re

import torch
from torch import Tensor, nn

from fastalign.backbones.vit import ViT
from fastalign.evaluation.heads import make_image_head

_BLOCK = re.compile(r"backbone\.blocks\.(\d+)\.")
_BEFORE_BLOCKS = ("patch_embed.", "cls_token", "reg_token", "pos_embed", "norm_pre.")


def head_input(vit: ViT, tokens: Tensor, head: str) -> Tensor:
    """What an image head reads of a backbone's output.

    Args:
        vit: the backbone.
        tokens: [B, T, D], its output.
        head: "linear" reads the class token, or the mean of the patches where there is none, after the backbone's
            norm after pooling; the others read all tokens. A published model's own pooling is not used: alignment
            drops it, and both backbones must be read in the same way.

    Returns:
        [B, D] or [B, T, D].
    """
    if head != "linear":
        return tokens
    pooled = tokens[:, 0] if vit.spec.class_token else tokens[:, vit.num_prefix_tokens :].mean(1)
    return vit.fc_norm(pooled)


def copy_for_head(vit: ViT, head: str) -> ViT:
    """A copy of the backbone without what the head does not read: pooling, output layer, norm after pooling."""
    copied = copy.deepcopy(vit)
    copied.head, copied.attn_pool, copied.pool = nn.Identity(), None, "none"
    if head != "linear":
        copied.fc_norm = nn.Identity()
    return copied


class Classifier(nn.Module):
    """A copy of a backbone, frozen or trained, and a fresh head."""

    def __init__(self, vit: ViT, head: str, classes: int, *, unfreeze: bool):
        super().__init__()
        self.head_name, self.unfreeze = head, unfreeze
        self.backbone = copy_for_head(vit, head).freeze(not unfreeze)
        self.head = make_image_head(head, vit, classes)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, height, width], normalized -> logits [B, C]"""
        with torch.set_grad_enabled(self.unfreeze and torch.is_grad_enabled()):
            features = head_input(self.backbone, self.backbone.forward_features(images), self.head_name)
        return self.head(features)


def learning_rate_factor(name: str, depth: int, decay: float) -> float:
    """A parameter's learning rate relative to the head's.

    decay^(depth - i) in block i of 0..depth-1, decay^(depth + 1) before the blocks, 1 after them.
    """
    block = _BLOCK.match(name)
    if block:
        return decay ** (depth - int(block[1]))
    before = name.startswith(tuple(f"backbone.{part}" for part in _BEFORE_BLOCKS))
    return decay ** (depth + 1) if before else 1.0


def parameter_groups(model: nn.Module, *, decay: float, weight_decay: float) -> list[dict]:
    """Trained parameters by learning-rate "factor" and weight decay; only matrices have weight decay."""
    depth = model.backbone.spec.depth if isinstance(model, Classifier) else 0
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = learning_rate_factor(name, depth, decay)
        decayed = weight_decay if name.endswith("weight") and parameter.ndim > 1 else 0.0
        group = {"params": [], "factor": factor, "weight_decay": decayed}
        groups.setdefault((factor, decayed), group)["params"].append(parameter)
    return list(groups.values())
