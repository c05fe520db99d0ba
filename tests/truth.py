"""An independent implementation of the method, from its description, with timm's modules and eager code.

It is slow and simple: one image, one mask and one patch at a time, in float64.
"""

import copy
import functools
import math
from collections.abc import Callable

import timm
import torch
from timm.layers import apply_rot_embed_cat
from timm.models.vision_transformer import Block
from torch import Tensor, nn


def blank_pixels(image: Tensor, mask: Tensor, patch: int) -> Tensor:
    """[C, h, w] with the pixels of hidden patches zero; pixels outside of all patches are unchanged."""
    image = image.clone()
    columns = image.shape[2] // patch
    for index, shown in enumerate(mask.tolist()):
        if not shown:
            row, column = divmod(index, columns)
            image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = 0
    return image


def of_masked_images(function: Callable, images: Tensor, visible: Tensor, patch: int) -> Tensor:
    """[B, M, ...]: a function of one image, [1, C, h, w] -> [1, ...], for every masked copy."""
    rows = [
        torch.cat([function(blank_pixels(image, mask, patch)[None]) for mask in masks])
        for image, masks in zip(images, visible, strict=True)
    ]
    return torch.stack(rows)


def teacher_targets(model: nn.Module, images: Tensor, visible: Tensor, skip_blocks: int) -> Tensor:
    """[B, M, T, D] from a timm model."""
    model = copy.deepcopy(model).eval()
    model.blocks = model.blocks[: len(model.blocks) - skip_blocks]
    return of_masked_images(model.forward_features, images, visible, model.patch_embed.patch_size[0]).detach()


class CappedAttention(nn.Module):
    """timm's attention with capped logits, in explicit loops over heads."""

    def __init__(self, inner: nn.Module, cap: float):
        super().__init__()
        self.qkv, self.proj, self.heads, self.cap = inner.qkv, inner.proj, inner.num_heads, cap
        self.q_norm, self.k_norm = inner.q_norm, inner.k_norm
        self.prefix, self.half = getattr(inner, "num_prefix_tokens", 0), getattr(inner, "rotate_half", False)
        self.biases = [getattr(inner, "q_bias", None), getattr(inner, "v_bias", None)]  # Eva's keys have none

    def forward(self, x: Tensor, rope: Tensor | None = None, **_) -> Tensor:
        width = x.shape[-1]
        size = width // self.heads
        q, k, v = self.qkv(x).split(width, dim=-1)
        if self.biases[0] is not None:
            q, v = q + self.biases[0], v + self.biases[1]
        outputs = []
        for head in range(self.heads):
            part = slice(head * size, (head + 1) * size)
            query = self.turn(self.q_norm(q[..., part]), rope)
            key = self.turn(self.k_norm(k[..., part]), rope)
            logits = self.cap * torch.tanh(query @ key.mT / math.sqrt(size) / self.cap)
            outputs.append(torch.softmax(logits, -1) @ v[..., part])
        return self.proj(torch.cat(outputs, -1))

    def turn(self, x: Tensor, rope: Tensor | None) -> Tensor:
        """A head's queries or keys by the rotary embedding of the patches."""
        if rope is None:
            return x
        patches = apply_rot_embed_cat(x[:, self.prefix :], rope, half=self.half)
        return torch.cat([x[:, : self.prefix], patches], 1)


class StudentTruth(nn.Module):
    """timm encoder with norms renewed, pooling removed and a new head, then the decoder, parameters named as ours."""

    def __init__(
        self,
        name: str,
        *,
        cap,
        target_dim,
        width=None,
        head="linear",
        layers=2,
        init_values=1e-6,
        decoder_heads=None,
        decoder_qk_norm=None,
        decoder_qkv_bias=True,
        frozen=False,
        prefix_only=False,
        **kwargs,
    ):
        super().__init__()
        encoder = timm.create_model(name, num_classes=0, **kwargs)
        dim, width = encoder.embed_dim, width or target_dim
        norm_class, block = type(encoder.norm), encoder.blocks[0]
        if not frozen:
            for part in ("norm", "fc_norm"):
                if not isinstance(getattr(encoder, part), nn.Identity):
                    setattr(encoder, part, type(getattr(encoder, part))(dim))
            hidden = block.mlp.fc1.out_features if head == "mlp" else None
            encoder.head = nn.Linear(dim, width)
            if head == "mlp":
                encoder.head = timm.layers.Mlp(dim, hidden, width, act_layer=type(block.mlp.act))
        encoder.attn_pool, encoder.global_pool = None, ""
        if hasattr(encoder, "head_dist"):
            del encoder.head_dist
        if frozen:
            encoder.fc_norm = nn.Identity()
        heads = decoder_heads or block.attn.num_heads
        norm_on = decoder_qk_norm
        if norm_on is None:
            norm_on = not isinstance(getattr(block.attn, "q_norm", nn.Identity()), nn.Identity)
        if cap:
            for one in encoder.blocks:
                one.attn = CappedAttention(one.attn, cap)
        self.encoder = encoder
        tokens = encoder.patch_embed.num_patches + encoder.num_prefix_tokens
        self.decoder = nn.Module()
        self.decoder.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        options = {"qkv_bias": decoder_qkv_bias, "qk_norm": norm_on, "init_values": init_values}
        mlp = type(block.mlp)
        if mlp is timm.layers.GluMlp:  # which half is called the gate: the backbone's
            mlp = functools.partial(mlp, gate_last=False)
        classes = {"norm_layer": norm_class, "act_layer": type(block.mlp.act), "mlp_layer": mlp}
        self.decoder.blocks = nn.ModuleList(Block(width, heads, **options, **classes) for _ in range(layers))
        self.decoder.norm = nn.LayerNorm(width)
        self.decoder.head = nn.Linear(width, target_dim)
        self.prefix, self.prefix_only = encoder.num_prefix_tokens, prefix_only

    def tokens(self, images: Tensor) -> Tensor:
        """The encoder's, [B, T, width]; distilled DeiT's own forward pools them."""
        return self.encoder.head(self.encoder.fc_norm(self.encoder.forward_features(images)))

    def forward(self, images: Tensor, visible: Tensor) -> Tensor:
        """[B, M, T, D]"""
        pairs = zip(self.tokens(images), visible, strict=True)
        rows = [torch.stack([self.decode(tokens, mask) for mask in masks]) for tokens, masks in pairs]
        return torch.stack(rows)

    def decode(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """[T, width], [N] -> [T, D]"""
        keep = [0.0] * self.prefix + [float(shown) for shown in mask.tolist()]
        kept = [token * factor for token, factor in zip(tokens, keep, strict=True)]
        x = torch.stack(kept)[None] + self.decoder.pos_embed
        for block in self.decoder.blocks:
            x = block(x)
        x = self.decoder.head(self.decoder.norm(x))[0]
        return x[:1] if self.prefix_only else x


def loss_truth(
    name: str, prediction: Tensor, target: Tensor, visible: Tensor, prefix_hidden: bool = True
) -> Tensor:
    """The losses, token by token."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    prefix = prediction.shape[2] - visible.shape[2]
    for b in range(prediction.shape[0]):
        for m in range(prediction.shape[1]):
            for t in range(prediction.shape[2]):
                p, q = prediction[b, m, t], target[b, m, t]
                hidden = prefix_hidden if t < prefix else not visible[b, m, t - prefix]
                if t < prefix and name == "unmasked_mse":
                    hidden = False
                if name == "cosine":
                    total = total + 1 - p @ q / (p.norm() * q.norm())
                elif name == "l1":
                    total = total + (p - q).abs().mean()
                elif name == "mse" or (name == "masked_mse") == hidden:
                    total = total + ((p - q) ** 2).mean()
                tokens += 1
    return total / tokens
