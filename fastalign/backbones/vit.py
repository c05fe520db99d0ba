"""The vision transformer backbone. `fastalign.backbones.zoo` builds it from a timm name.

Shapes: B images, M masks per image, N patches, P prefix tokens (class, registers), T = P + N tokens, L packed tokens,
D width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastalign import ops
from fastalign.backbones.blocks import Block, MixedRope, PatchEmbed, make_norm, pack_table
from fastalign.backbones.spec import ViTSpec
from fastalign.ops.attention import Sequences
from fastalign.ops.reference import Packing, with_prefix
from fastalign.utils.errors import UserError


class ViT(nn.Module):
    """A vision transformer backbone. Build one with `fastalign.create_backbone`."""

    def __init__(
        self,
        spec: ViTSpec,
        *,
        drop_path: float = 0.0,  # rate of stochastic depth in the last block; it falls linearly to 0 in the first
        data: dict | None = None,  # how images become its input: "mean", "std", "interpolation", "crop_pct"
        recipe: dict | None = None,  # the "name" and "kwargs" for `fastalign.create_backbone`, if known
    ):
        super().__init__()
        self.spec, self.data, self._recipe, self.frozen = spec, data, recipe, False
        width = spec.block.width
        self.embed_dim, self.num_prefix_tokens = width, spec.prefix  # D and P, by timm's names
        self.patch_embed = PatchEmbed(spec)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if spec.class_token else None
        self.dist_token = nn.Parameter(torch.zeros(1, 1, width)) if spec.distilled else None
        self.reg_token = nn.Parameter(torch.zeros(1, spec.registers, width)) if spec.registers else None
        entries = spec.patches + (spec.prefix if spec.position_prefix else 0)
        table = torch.zeros(1, entries, width)
        self.pos_embed = nn.Parameter(table, not spec.position_fixed) if spec.position else None
        self.norm_pre = make_norm(spec.block, present=spec.pre_norm)
        window = spec.grid if spec.relative_position else None
        rates = torch.linspace(0, drop_path, spec.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(spec.block, drop_path=rate, window=window) for rate in rates)
        self.norm = make_norm(spec.block, present=spec.final_norm)
        self.pool, self.attn_pool = spec.pool, None
        self.fc_norm = make_norm(spec.block, present=spec.pooled_norm)
        self.head, self.head_dist = nn.Identity(), None
        self.grad_checkpointing = False
        self.rope = MixedRope(spec.block, spec.depth) if spec.rotary_mixed else None
        # The relative position index, the rotary table or mixed rope's coordinates: not a parameter, not stored.
        self.register_buffer("position", None, persistent=False)

    def freeze(self, frozen: bool = True) -> "ViT":
        """Freeze the weights and stay in evaluation mode, even inside a module in training mode; False: unfreeze."""
        self.frozen = frozen
        self.requires_grad_(not frozen)
        if self.spec.position_fixed:
            self.pos_embed.requires_grad_(False)
        return self.train(not frozen)

    def train(self, mode: bool = True) -> "ViT":
        """Training or evaluation mode; a frozen backbone stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    @property
    def recipe(self) -> dict:
        """The "name" and "kwargs" for `fastalign.create_backbone`; a UserError if they are not known."""
        if self._recipe is None:
            raise UserError(
                "the backbone's timm name and arguments are not known: create it by its timm name"
            )
        return self._recipe

    @property
    def pretrained_cfg(self) -> dict:
        """Image size and preprocessing, as `timm.data.resolve_model_data_config` reads them."""
        return {"input_size": (self.spec.channels, *self.spec.image_size), **(self.data or {})}

    @property
    def softcap(self) -> float | None:
        """The cap of every block's attention logits; None = plain attention."""
        return self.spec.block.softcap

    @softcap.setter
    def softcap(self, value: float | None) -> None:
        self.spec = replace(self.spec, block=replace(self.spec.block, softcap=value))
        for block in self.blocks:
            block.attn.spec = replace(block.attn.spec, softcap=value)

    def prefix_rows(self) -> Tensor | None:
        """[P, D]: the prefix tokens with their position."""
        tokens = [t[0] for t in (self.cls_token, self.dist_token, self.reg_token) if t is not None]
        if not tokens:
            return None
        prefix = torch.cat(tokens)
        with_position = self.pos_embed is not None and self.spec.position_prefix
        return prefix + self.pos_embed[0, : len(prefix)] if with_position else prefix

    def patch_position(self) -> Tensor | None:
        """[N, D]: the position embedding of the patches."""
        if self.pos_embed is None:
            return None
        return self.pos_embed[0, self.num_prefix_tokens if self.spec.position_prefix else 0 :]

    def add_position(self, patches: Tensor) -> Tensor:
        """Patch embeddings [B, N, D] -> the first block's input [B, T, D]: prefix, position, norm."""
        return self.norm_pre(with_prefix(patches, self.prefix_rows(), self.patch_position()))

    def embed_masked(self, images: Tensor, visible: Tensor) -> Tensor:
        """Images and visible [B, M, N] bool -> the first block's input with blank hidden patches, [B M, T, D]."""
        patches = self.patch_embed(images)
        blank = self.patch_embed.blank().to(patches.dtype)
        tokens = ops.mask_tokens(patches, blank, visible, self.prefix_rows(), self.patch_position())
        return self.norm_pre(tokens.flatten(0, 1))

    def embed_packed(self, images: Tensor, packing: Packing) -> Tensor:
        """Images and their packed masks -> the first block's input without hidden patches, [L, D]."""
        tokens = ops.pack(self.patch_embed(images), packing, self.prefix_rows(), self.patch_position())
        return self.norm_pre(tokens)

    def encode(self, tokens: Tensor, packing: Packing | None = None) -> Tensor:
        """The blocks and the final norm: [B, T, D] -> [B, T, D], or packed, [L, D] -> [L, D]."""
        sequences = None if packing is None else Sequences(packing.cu_seqlens, packing.slots.shape[2])
        for block, position in zip(self.blocks, self.positions(packing), strict=True):
            if self.grad_checkpointing and self.training:
                tokens = checkpoint(block, tokens, position, sequences, use_reentrant=False)
            else:
                tokens = block(tokens, position, sequences)
        return self.norm(tokens)

    def positions(self, packing: Packing | None = None) -> Iterable[Tensor | None]:
        """Each block's `position` argument: a rotary table, a relative position index or None."""
        depth, position = len(self.blocks), self.position
        if self.rope is not None:
            tables = self.rope(position, depth).unbind()
            return tables if packing is None else (pack_table(table, packing) for table in tables)
        if packing is not None and position is not None:
            position = pack_table(position, packing)
        return [position] * depth

    def forward_features(self, images: Tensor) -> Tensor:
        """Normalized images [B, C, height, width] -> tokens [B, T, D]."""
        return self.encode(self.add_position(self.patch_embed(images)))

    def forward_layers(self, images: Tensor, skip_blocks: Sequence[int]) -> list[Tensor]:
        """For each entry, the tokens [B, T, D] without that many last blocks, after the final norm."""
        wanted = [len(self.blocks) - skip for skip in skip_blocks]
        if not wanted or min(wanted) < 0 or max(wanted) > len(self.blocks):
            raise ValueError(f"skip_blocks must lie in 0..{len(self.blocks)}, got {list(skip_blocks)}")
        tokens = self.add_position(self.patch_embed(images))
        found = {0: self.norm(tokens)} if 0 in wanted else {}
        for depth, position in zip(range(1, max(wanted) + 1), self.positions(), strict=False):
            tokens = self.blocks[depth - 1](tokens, position)
            if depth in wanted:
                found[depth] = self.norm(tokens)
        return [found[depth] for depth in wanted]

    def pooled(self, tokens: Tensor) -> Tensor:
        """[B, T, D] -> [B, D], pooled and normed; with pool "none" every token, [B, T, D]."""
        read = tokens if self.spec.pool_prefix else tokens[:, self.num_prefix_tokens :]
        pools = {
            "none": lambda: tokens,
            "map": lambda: self.attn_pool(read),
            "token": lambda: tokens[:, 0],
            "pair": lambda: tokens[:, :2].mean(1),
            "avg": lambda: read.mean(1),
            "max": lambda: read.amax(1),
            "avgmax": lambda: 0.5 * (read.mean(1) + read.amax(1)),
        }
        return self.fc_norm(pools[self.pool]())

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Pooling, norm and the output layer; with two (DeiT's) the mean of both outputs."""
        if self.head_dist is not None and self.pool == "pair":
            return (self.head(tokens[:, 0]) + self.head_dist(tokens[:, 1])) / 2
        return self.head(self.pooled(tokens))

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, height, width] -> the head's output: [B, classes], or [B, T, out] with pool "none"."""
        return self.forward_head(self.forward_features(images))
