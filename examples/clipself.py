"""CLIPSelf: the student's features of an image region match the frozen teacher's features of the cropped region."""

import copy

import timm
import torch
from torch.nn.functional import cosine_similarity, interpolate
from torchvision.ops import roi_align

import fastalign as fa


def train(model, loader, lr=1e-5, softcap=None):
    """Yields the loss of each step. model: a timm ViT; loader: normalized square images [B, 3, size, size]."""
    teacher = fa.accelerate(copy.deepcopy(model)).eval().requires_grad_(False)
    student = fa.accelerate(model, softcap=softcap).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.1)
    for images in loader:
        size, index = images.shape[-1], torch.arange(len(images), device=images.device)
        corner = torch.rand(len(images), 2, device=images.device) * size / 2
        # A quarter of each image, in pixels.
        boxes = torch.cat([index[:, None], corner, corner + size / 2], 1)
        crops = interpolate(roi_align(images, boxes, size // 2, aligned=True), size=size, mode="bicubic")
        with torch.no_grad():
            target = teacher(crops)
        tokens = student.head(student.fc_norm(student.forward_features(images)))
        features = tokens[:, student.num_prefix_tokens :].mT.unflatten(2, student.patch_embed.grid_size)
        pooled = roi_align(features, boxes, 1, features.shape[-1] / size, aligned=True).flatten(1)
        loss = 1 - cosine_similarity(pooled, target).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


if __name__ == "__main__":
    clip = timm.create_model("vit_base_patch16_clip_quickgelu_224.openai", pretrained=True)
    your_images = (torch.randn(8, 3, 224, 224) for _ in range(10))
    for step, loss in enumerate(train(clip, your_images, softcap=30.0)):
        print(step, loss)
