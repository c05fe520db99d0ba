"""The frozen teacher: a pre-trained backbone that reads masked images."""

import copy

import torch
from torch import Tensor, nn

from fastalign import ops
from fastalign.backbones import precision
from fastalign.backbones.spec import ViTSpec
from fastalign.backbones.vit import ViT
from fastalign.ops.reference import Packing


class MaskedTeacher(nn.Module):
    """A frozen copy of a backbone that reads masked images.

    >>> teacher = fa.MaskedTeacher(fa.create_backbone("vit_tiny_patch16_224", depth=2))
    >>> teacher(torch.randn(2, 3, 224, 224), torch.ones(2, 1, 196, dtype=torch.bool)).shape
    torch.Size([2, 1, 197, 192])

    It returns all tokens of the last remaining block, after the backbone's final norm.

    Args:
        vit: the backbone; it is copied.
        skip_blocks: how many of the last blocks are removed.
        masking: "zero": hidden patches are blank (the mean colour); "drop": they leave the sequence.
        prefix_only: the pooled output instead of the tokens; needs ``skip_blocks=0``.
    """

    def __init__(self, vit: ViT, skip_blocks: int = 1, masking: str = "zero", prefix_only: bool = False):
        super().__init__()
        check_masking("MaskedTeacher", masking, vit.spec)
        if prefix_only and (masking == "drop" or skip_blocks):
            raise ValueError("MaskedTeacher: prefix_only needs masking='zero' and skip_blocks=0")
        if not 0 <= skip_blocks < vit.spec.depth:
            raise ValueError(
                f"MaskedTeacher: skip_blocks must lie in 0..{vit.spec.depth - 1}, got {skip_blocks}"
            )
        self.vit = copy.deepcopy(vit).freeze()
        self.vit.head, self.vit.head_dist = nn.Identity(), None
        self.vit.grad_checkpointing = False
        self.vit.blocks = self.vit.blocks[: vit.spec.depth - skip_blocks]
        if not prefix_only:
            self.vit.attn_pool, self.vit.fc_norm = None, nn.Identity()
        self.skip_blocks, self.masking, self.prefix_only = skip_blocks, masking, prefix_only
        self.spec, self.embed_dim = vit.spec, vit.embed_dim

    def store_as(self, dtype: torch.dtype) -> "MaskedTeacher":
        """Keep the matrices in a lower precision. From then on the teacher runs under bf16 autocast only.

        torch.bfloat16: the targets equal those of autocast bit for bit; half the memory and no cast at each step.
        torch.float8_e4m3fn: the linear layers of the blocks multiply in FP8, the rest is bf16.
        """
        if dtype == torch.float8_e4m3fn:
            precision.quantize(self)
        elif dtype != torch.bfloat16:
            raise ValueError(f"store_as: dtype must be torch.bfloat16 or torch.float8_e4m3fn, got {dtype}")
        precision.store_as(self, torch.bfloat16)
        return self

    @torch.no_grad()
    def forward(
        self, images: Tensor, visible: Tensor | None = None, packing: Packing | None = None
    ) -> Tensor:
        """Targets, unscaled.

        Args:
            images: [B, C, height, width], normalized.
            visible: [B, M, N] bool; None = the whole image, M = 1.
            packing: mode drop only: the packing of the visible tokens; computed if not given.

        Returns:
            [B, M, T, D]; [B, M, 1, D] with prefix_only; in mode drop [L, D], the visible tokens and padding.
        """
        if visible is not None and self.masking == "drop":
            packing = packing or ops.pack_masks(visible, self.vit.num_prefix_tokens)
            return self.vit.encode(self.vit.embed_packed(images, packing), packing)
        if visible is None:
            tokens = self.vit.forward_features(images)
        else:
            tokens = self.vit.encode(self.vit.embed_masked(images, visible))
        if self.prefix_only:
            tokens = self.vit.pooled(tokens).unsqueeze(1)
        return tokens.unflatten(0, (len(images), -1))


def check_masking(owner: str, masking: str, spec: ViTSpec) -> None:
    """Refuse an unknown mode, or one that the backbone does not support."""
    if masking not in ("zero", "drop"):
        raise ValueError(f"{owner}: masking must be 'zero' or 'drop', got {masking!r}")
    if masking == "drop" and spec.relative_position:
        raise ValueError(
            f"{owner}: masking='drop' does not support this backbone's relative position bias; choose 'zero'"
        )
