"""The heads: of patches, as Covert et al. (2025) define them, and of images, with the backbone as a classifier.

Shapes: B images, N patches, P prefix tokens, T = P + N tokens, D width, C classes.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastalign.backbones.blocks import Block
from fastalign.backbones.spec import BlockSpec, ViTSpec
from fastalign.backbones.vit import ViT

PATCH_HEADS = ("linear", "mlp", "transformer", "latent", "latent-global")
HEADS_FOR = {  # the patch heads that can predict each kind of labels
    "union": PATCH_HEADS,
    "majority": PATCH_HEADS,
    "global-union": ("linear", "mlp", "transformer"),
    "global-in-patch": ("linear", "mlp"),  # read from each token alone
}
IMAGE_HEADS = ("linear", "attention", "transformer")
_STD = 0.02
_CHUNK = 65_536


def image_token(tokens: Tensor, prefix: int) -> Tensor:
    """[B, T, D] -> [B, 1, D]: the mean of the prefix tokens, or of all tokens if there is no prefix."""
    return tokens[:, : prefix or None].mean(1, keepdim=True)


class SelectTokens(nn.Module):
    """`patches` [B, N, D], `all` [B, T, D], or `image` [B, 1, D]."""

    def __init__(self, which: str, prefix: int):
        super().__init__()
        self.which, self.prefix = which, prefix

    def forward(self, tokens: Tensor) -> Tensor:
        if self.which == "image":
            return image_token(tokens, self.prefix)
        return tokens[:, self.prefix :] if self.which == "patches" else tokens


class PatchTransformer(nn.Module):
    """Position embedding, norm, pre-norm blocks with LayerScale 0.01, norm, linear layer: tokens -> [B, N, C].

    With `latent`, the logits are those of N appended learned queries, and the tokens get no position embedding. With
    `image`, the output is [B, 1, C], the `image_token` of the logits.
    """

    def __init__(self, spec: ViTSpec, classes: int, tokens: int, layers: int, latent: bool, image: bool):
        super().__init__()
        self.spec, self.latent, self.image = spec, latent, image
        width = spec.block.width
        how = {"mlp_hidden": 4 * width, "qkv_bias": False, "layer_scale": 0.01, "norm_eps": 1e-5}
        block = BlockSpec(width, spec.block.heads, **how)
        self.pos_embed = nn.Parameter(_STD * torch.randn(spec.patches if latent else tokens, width))
        self.norm_pre = nn.LayerNorm(width)
        self.blocks = nn.Sequential(*(Block(block) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.latent:
            tokens = torch.cat([tokens, self.pos_embed.to(tokens.dtype).expand(len(tokens), -1, -1)], 1)
        else:
            tokens = tokens + self.pos_embed
        logits = self.head(self.norm(self.blocks(self.norm_pre(tokens))))
        return image_token(logits, self.spec.prefix) if self.image else logits[:, -self.spec.patches :]


def make_patch_head(
    name: str, labels: str, spec: ViTSpec, classes: int, *, hidden: int = 1024, layers: int = 2
) -> nn.Module:
    """A patch head with fresh weights: tokens [B, T, D] -> logits [B, N, C], or [B, 1, C] for `global-union`.

    `spec`: the backbone's.
    """
    image, width = labels == "global-union", spec.block.width
    own = {"latent-global": "image", "latent": "all", "transformer": "all"}
    which = own.get(name, "image" if image else "patches")
    if name == "linear":
        head = nn.Linear(width, classes)
    elif name == "mlp":
        head = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, classes))
    else:
        tokens = 1 if which == "image" else spec.prefix + spec.patches
        head = PatchTransformer(spec, classes, tokens, layers, name != "transformer", image)
    return nn.Sequential(SelectTokens(which, spec.prefix), head)


class StandardizedLinear(nn.Module):
    """A linear layer on standardized features, zero at the start."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.linear = nn.Linear(width, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    @torch.no_grad()
    def standardize(self, features: Tensor) -> None:
        """Set mean and standard deviation from features [n, D], so that one learning rate suits all backbones."""
        parts = features.split(_CHUNK)
        mean = sum(part.sum(0, dtype=torch.float64) for part in parts) / len(features)
        std = (sum((part - mean).square().sum(0) for part in parts) / len(features)).sqrt()
        # A constant channel is dropped: dividing by its rounding noise would amplify it.
        varies = std > 1e-6 * std.max().clamp(min=1e-12)
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(varies, 1 / std.clamp(min=1e-30), torch.zeros_like(std)))

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C]"""
        return self.linear((features - self.mean) * self.scale)


class AttentionHead(nn.Module):
    """One learned query that attends over all tokens, then a linear layer: [B, T, D] -> [B, C]."""

    def __init__(self, width: int, heads: int, classes: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(_STD * torch.randn(width))
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm_out = nn.LayerNorm(width)
        self.linear = nn.Linear(width, classes)
        self.apply(_initialize)

    def forward(self, tokens: Tensor) -> Tensor:
        keys, values = self.kv(self.norm(tokens)).unflatten(-1, (2, self.heads, -1)).unbind(2)
        query = self.query.to(keys.dtype).view(self.heads, 1, -1).expand(len(tokens), -1, -1, -1)
        pooled = functional.scaled_dot_product_attention(query, keys.transpose(1, 2), values.transpose(1, 2))
        return self.linear(self.norm_out(self.proj(pooled.flatten(1))))


class ClassTokenTransformer(nn.Module):
    """Two transformer blocks over a learned class token and all tokens, then a linear layer on it: -> [B, C]."""

    def __init__(self, width: int, heads: int, classes: int, tokens: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(_STD * torch.randn(1, 1, width))
        self.position = nn.Parameter(_STD * torch.randn(1, tokens, width))
        spec = BlockSpec(width=width, heads=heads, mlp_hidden=4 * width)
        self.blocks = nn.Sequential(Block(spec), Block(spec))
        self.norm_out = nn.LayerNorm(width)
        self.linear = nn.Linear(width, classes)
        self.apply(_initialize)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.norm(tokens) + self.position
        tokens = torch.cat([self.query.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], 1)
        return self.linear(self.norm_out(self.blocks(tokens)[:, 0]))


def make_image_head(name: str, vit: ViT, classes: int) -> nn.Module:
    """An image head with fresh weights: [B, D] for `linear`, else [B, T, D] -> logits [B, C]."""
    width = vit.embed_dim
    if name == "linear":
        return StandardizedLinear(width, classes)
    heads = width // 64 if width % 64 == 0 else 1
    if name == "attention":
        return AttentionHead(width, heads, classes)
    return ClassTokenTransformer(width, heads, classes, vit.spec.prefix + vit.spec.patches)


def _initialize(part: nn.Module) -> None:
    if isinstance(part, nn.Linear):
        nn.init.trunc_normal_(part.weight, std=_STD)
        nn.init.zeros_(part.bias)


class Classifier(nn.Module):
    """A copy of a backbone, frozen or trained, and a fresh head."""

    def __init__(self, vit: ViT, head: str, classes: int, *, unfreeze: bool = False):
        super().__init__()
        self.pooled = head == "linear"
        self.backbone = copy.deepcopy(vit).freeze(not unfreeze)
        # Remove what no head reads: DDP waits for the gradient of every trained parameter.
        self.backbone.head, self.backbone.attn_pool, self.backbone.pool = nn.Identity(), None, "none"
        if not self.pooled:
            self.backbone.fc_norm = nn.Identity()
        self.head = make_image_head(head, vit, classes)

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, height, width], normalized -> what the head reads: [B, D] for "linear", else all tokens [B, T, D].

        "linear" reads the class token, else the mean of the patches, after the norm that follows pooling. A published
        model's own pooling is not used: alignment removes it, and both models must be read in the same way.
        """
        vit, tokens = self.backbone, self.backbone.forward_features(images)
        if not self.pooled:
            return tokens
        return vit.fc_norm(tokens[:, 0] if vit.spec.class_token else tokens[:, vit.spec.prefix :].mean(1))

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, height, width], normalized -> logits [B, C]"""
        return self.head(self.features(images))


_BEFORE_BLOCKS = ("patch_embed", "cls_token", "reg_token", "pos_embed", "norm_pre")


def parameter_groups(model: nn.Module, *, decay: float, weight_decay: float) -> list[dict]:
    """Trained parameters by learning-rate "factor" and weight decay; only matrices have weight decay.

    The factor in a `Classifier` of depth d is decay^(d - i) in block i from 0, decay^(d + 1) before them, else 1.
    """
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parts, factor = name.split("."), 1.0
        if parts[:2] == ["backbone", "blocks"]:
            factor = decay ** (model.backbone.spec.depth - int(parts[2]))
        elif parts[0] == "backbone" and parts[1] in _BEFORE_BLOCKS:
            factor = decay ** (model.backbone.spec.depth + 1)
        decayed = weight_decay if name.endswith("weight") and parameter.ndim > 1 else 0.0
        group = {"params": [], "factor": factor, "weight_decay": decayed}
        groups.setdefault((factor, decayed), group)["params"].append(parameter)
    return list(groups.values())
