"""MAE: the encoder reads a quarter of the patches, and a small decoder reconstructs the others."""

import torch
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn.functional import layer_norm, unfold

import fastalign as fa


class MAE(nn.Module):
    def __init__(self, vit, width=512, heads=16, depth=8):
        super().__init__()
        self.vit, self.prefix, self.patch = vit, vit.num_prefix_tokens, vit.spec.patch_size
        self.masks = fa.BernoulliMasks(ratio=0.25, complement=False, full=False)
        self.embed = nn.Linear(vit.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(self.prefix + vit.spec.patches, width))
        self.blocks = fa.accelerate(nn.Sequential(*(Block(width, heads) for _ in range(depth))))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * self.patch[0] * self.patch[1]))

    def forward(self, images, sample_ids):
        visible, packing = self.masks.packed(sample_ids, self.vit.spec.grid, self.prefix)
        packed = self.vit.embed_packed(images, packing)  # [L, D]: visible tokens only
        packed = self.embed(self.vit.encode(packed, packing))
        tokens = fa.ops.unpack(packed, packing)[:, 0]  # [B, T, width]
        tokens = tokens.where(packing.slots[:, 0, :, None] >= 0, self.mask_token) + self.pos_embed
        predicted = self.head(self.blocks(tokens))[:, self.prefix :]
        pixels = unfold(images, self.patch, stride=self.patch).mT  # [B, N, 3 x height x width]
        error = predicted - layer_norm(pixels, pixels.shape[-1:])
        return error[~visible[:, 0]].square().mean()


def train(mae, loader, lr=1.5e-4):
    """Yields the loss of each step. loader: normalized images [B, 3, height, width]."""
    optimizer = torch.optim.AdamW(mae.train().parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    for step, images in enumerate(loader):
        loss = mae(images, torch.arange(len(images), device=images.device) + step * len(images))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


if __name__ == "__main__":
    your_images = (torch.randn(8, 3, 224, 224) for _ in range(10))
    for step, loss in enumerate(train(MAE(fa.create_backbone("vit_base_patch16_224")), your_images)):
        print(step, loss)
