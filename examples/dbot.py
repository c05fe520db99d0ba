"""dBOT: a fresh student reads masked images and predicts a frozen teacher's tokens; then it becomes the teacher."""

import torch

import fastalign as fa


def train(vit, loader, stages=2, lr=1.5e-4, softcap=30.0):
    """Yields stage and loss of each step.

    vit: the first teacher, which may be untrained, from `fa.create_backbone`; loader: a function that is called at
    the start of each stage and returns an iterable of normalized images [B, 3, height, width].
    """
    masks = fa.BernoulliMasks(ratio=0.25, complement=False, full=False)
    teacher = fa.MaskedTeacher(vit, skip_blocks=0)
    for stage in range(stages):
        fresh = fa.create_backbone(vit.recipe["name"], **vit.recipe["kwargs"])
        student = fa.MIMStudent.from_backbone(fresh, softcap=softcap)
        step = fa.MaskedImageModeling(teacher, student, masks, loss="masked_mse").to(vit.cls_token.device)
        weights = student.train().parameters()
        optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
        for index, images in enumerate(loader()):
            sample_ids = torch.arange(len(images), device=images.device) + index * len(images)
            loss = step(images, sample_ids, epoch=stage)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield stage, loss.item()
        teacher = fa.MaskedTeacher(student.encoder, skip_blocks=0)


if __name__ == "__main__":
    first = fa.create_backbone("vit_base_patch16_224")
    for stage, loss in train(first, lambda: (torch.randn(8, 3, 224, 224) for _ in range(10))):
        print(stage, loss)
