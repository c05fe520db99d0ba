"""MaskEmbed with timm's modules, as the authors' script does it: the baseline of `benchmarks.step`.

Soft-capped attention materializes its scores, every image is copied and blanked once per mask, masks are drawn on the
CPU, and the decoder's input is made of copies too. Autocast, the teacher's dtype, torch.compile's options and the
optimizer are the caller's, the same for both sides. The loss is that of `fastalign.MaskEmbed`.
"""

import copy

import timm
import torch
from timm.layers import apply_rot_embed_cat
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional


class CappedAttention(nn.Module):
    """timm's attention with capped logits, in plain PyTorch."""

    def __init__(self, inner: nn.Module, softcap: float):
        super().__init__()
        self.inner, self.softcap = inner, softcap

    def forward(self, x: Tensor, rope: Tensor | None = None, **_) -> Tensor:
        """[B, T, D] -> [B, T, D]; `rope` is timm's rotary table"""
        inner = self.inner
        shape = (*x.shape[:2], 3, inner.num_heads, -1)
        q, k, v = inner.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        if rope is not None:
            p, half = inner.num_prefix_tokens, inner.rotate_half
            q, k = (
                torch.cat([part[:, :, :p], apply_rot_embed_cat(part[:, :, p:], rope, half)], 2)
                for part in (q, k)
            )
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        weights = (self.softcap * torch.tanh(scores / self.softcap)).softmax(-1)
        return inner.proj((weights @ v).transpose(1, 2).flatten(2))


class Teacher(nn.Module):
    """A frozen timm encoder without its last block."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = copy.deepcopy(backbone).requires_grad_(False).eval()
        self.backbone.blocks = self.backbone.blocks[:-1]

    # In a method of its own, because a compiled module compiles only its own call.
    def forward(self, images: Tensor) -> Tensor:
        """[B M, 3, h, w] -> [B M, T, D]"""
        with torch.no_grad():
            return self.backbone.forward_features(images)


class Student(nn.Module):
    """A timm encoder with fresh norms and a zero head, and a decoder of two timm blocks."""

    def __init__(self, backbone: nn.Module, softcap: float | None):
        super().__init__()
        width, norm = backbone.embed_dim, type(backbone.norm)
        self.encoder = copy.deepcopy(backbone)
        self.encoder.norm, self.encoder.head = norm(width), nn.Linear(width, width)
        self.encoder.attn_pool, self.encoder.fc_norm, self.encoder.global_pool = None, nn.Identity(), ""
        nn.init.zeros_(self.encoder.head.weight), nn.init.zeros_(self.encoder.head.bias)
        block = backbone.blocks[0]
        bias = block.attn.qkv.bias is not None
        if softcap:
            for one in self.encoder.blocks:
                one.attn = CappedAttention(one.attn, softcap)
        self.prefix = backbone.num_prefix_tokens
        self.pos_embed = nn.Parameter(
            0.02 * torch.randn(1, backbone.patch_embed.num_patches + self.prefix, width)
        )
        layers = {"norm_layer": norm, "act_layer": type(block.mlp.act), "mlp_layer": type(block.mlp)}
        options = {"qkv_bias": bias, "init_values": 1e-6, **layers}
        self.blocks = nn.Sequential(*(Block(width, block.attn.num_heads, **options) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        """images [B, 3, h, w], masks [B M, N] -> [B M, T, D]"""
        tokens = self.encoder.forward_head(self.encoder.forward_features(images))
        tokens = tokens.repeat_interleave(len(masks) // len(tokens), 0)
        keep = functional.pad(masks, (self.prefix, 0))
        return self.head(self.norm(self.blocks(tokens * keep.unsqueeze(-1) + self.pos_embed)))


class Baseline(nn.Module):
    """MaskEmbed's loss for a timm backbone with random weights and a student with a soft-cap (None = plain)."""

    def __init__(self, name: str, softcap: float | None, **kwargs):
        super().__init__()
        backbone = timm.create_model(name, num_classes=0, **kwargs)
        self.teacher, self.student = Teacher(backbone), Student(backbone, softcap)
        self.grid, self.patch = backbone.patch_embed.grid_size, backbone.patch_embed.patch_size[0]

    def draw(self, images: int) -> Tensor:
        """[B 3, N] fp32 on the CPU: a uniform mask, its complement, the full mask, image by image."""
        count = self.grid[0] * self.grid[1]
        sample = (torch.rand(images, count) > torch.rand(images, 1)).float()
        return torch.stack([sample, 1 - sample, torch.ones_like(sample)], 1).flatten(0, 1)

    def targets(self, images: Tensor, masks: Tensor) -> Tensor:
        """[B M, T, D], from copies of the images with hidden patches blanked."""
        copies = images.repeat_interleave(len(masks) // len(images), 0)
        pixels = masks.unflatten(1, self.grid).unsqueeze(1)
        pixels = pixels.repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)
        rows, columns = pixels.shape[2:]
        # Pixels outside of all patches, where the side is not a multiple of the patch, have no effect.
        pixels = functional.pad(pixels, (0, copies.shape[3] - columns, 0, copies.shape[2] - rows))
        return self.teacher(copies * pixels)

    def forward(self, images: Tensor, sample_ids: Tensor, epoch: int = 0) -> Tensor:
        """The loss. Masks are random; ids and epoch are ignored."""
        masks = self.draw(len(images)).to(images.device, non_blocking=True)
        return functional.mse_loss(self.student(images, masks).float(), self.targets(images, masks).float())

    def compile(self, **options) -> None:
        """torch.compile both models, each as one graph of fixed shapes, as ours are."""
        self.teacher.compile(fullgraph=True, dynamic=False, **options)
        self.student.compile(fullgraph=True, dynamic=False, **options)
